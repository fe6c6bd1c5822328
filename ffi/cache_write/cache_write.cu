// One warp per row: it reads the row's slot and copies the row of every part, in the widest unit
// that the part's pointers and row length allow. Rows are a few hundred bytes, so a decode step is
// all latency: one load of the slot, one of the row, one store.
#include <cuda_runtime.h>

#include <algorithm>

#include "cache_write/cache_write.h"

namespace dsv4 {
namespace {

constexpr int kWarpsPerBlock = 4;

struct Part {
  uint8_t* cache;
  const uint8_t* rows;
  int64_t row_bytes;
  int unit;  // 16, 4 or 1 bytes
};

struct KernelParams {
  Part parts[kMaxCacheWriteParts];
  int n_parts;
  const int32_t* slots;
  int64_t rows, s, t;
};

template <typename Unit>
__device__ void CopyRow(const Part& part, int64_t target, int64_t row, int lane) {
  Unit* to = reinterpret_cast<Unit*>(part.cache + target * part.row_bytes);
  const Unit* from = reinterpret_cast<const Unit*>(part.rows + row * part.row_bytes);
  const int64_t count = part.row_bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t i = lane; i < count; i += 32) to[i] = from[i];
}

__global__ void __launch_bounds__(kWarpsPerBlock * 32) CacheWriteKernel(
    const __grid_constant__ KernelParams params) {
  const int lane = threadIdx.x % 32;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32;
       row < params.rows; row += stride) {
    const int64_t slot = params.slots[row];
    if (slot < 0 || slot >= params.s) continue;
    const int64_t target = row / params.t * params.s + slot;
    // A part per block row: parts of one row are independent copies.
    const Part& part = params.parts[blockIdx.y];
    if (part.unit == 16) {
      CopyRow<uint4>(part, target, row, lane);
    } else if (part.unit == 4) {
      CopyRow<uint32_t>(part, target, row, lane);
    } else {
      CopyRow<uint8_t>(part, target, row, lane);
    }
  }
}

}  // namespace

cudaError_t CacheWriteCuda(const CacheWriteParams& params, cudaStream_t stream) {
  KernelParams kernel{};
  kernel.n_parts = params.n_parts;
  kernel.slots = params.slots;
  kernel.rows = params.b * params.t;
  kernel.s = params.s;
  kernel.t = params.t;
  if (kernel.rows == 0 || params.s == 0 || params.n_parts == 0) return cudaSuccess;
  for (int p = 0; p < params.n_parts; ++p) {
    const CacheWritePart& part = params.parts[p];
    const uintptr_t bits = reinterpret_cast<uintptr_t>(part.cache) |
                           reinterpret_cast<uintptr_t>(part.rows) |
                           static_cast<uintptr_t>(part.row_bytes);
    const int unit = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
    kernel.parts[p] = {part.cache, part.rows, part.row_bytes, unit};
  }
  const int64_t blocks = (kernel.rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 16)),
                  static_cast<unsigned>(params.n_parts));
  CacheWriteKernel<<<grid, kWarpsPerBlock * 32, 0, stream>>>(kernel);
  return cudaGetLastError();
}

}  // namespace dsv4
