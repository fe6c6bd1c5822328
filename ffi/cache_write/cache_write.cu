// A warp per row and part: it copies the row in the widest unit that pointers and row length allow.
// Rows are a few hundred bytes, so a decode step is all latency: the row is read while its slot
// still is, and only the store waits for both.
#include <cuda_runtime.h>

#include <algorithm>

#include "cache_write/cache_write.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;  // of a thread block

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

constexpr int kAhead = 4;  // units a lane reads before the first store

template <typename Unit>
__device__ __forceinline__ void CopyRow(const KernelParams& params, const Part& part, int64_t row,
                                        int lane) {
  const Unit* from = reinterpret_cast<const Unit*>(part.rows + row * part.row_bytes);
  const int64_t count = part.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t slot = __ldg(params.slots + row);
  const int64_t sequence = params.t == 1 ? row : row / params.t;  // while the slot is on its way
  Unit* to = nullptr;
  for (int64_t first = lane; first < count; first += 32 * kAhead) {
    Unit units[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + 32 * i < count) units[i] = __ldg(from + first + 32 * i);
    }
    if (to == nullptr) {
      if (slot < 0 || slot >= params.s) return;
      to = reinterpret_cast<Unit*>(part.cache + (sequence * params.s + slot) * part.row_bytes);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + 32 * i < count) to[first + 32 * i] = units[i];
    }
  }
}

__global__ void __launch_bounds__(kWarps * 32)
    CacheWriteKernel(const __grid_constant__ KernelParams params) {
  const int lane = threadIdx.x % 32;
  const Part& part = params.parts[blockIdx.y];
  const int64_t warps = blockDim.x / 32;
  const int64_t stride = gridDim.x * warps;
  for (int64_t row = blockIdx.x * warps + threadIdx.x / 32; row < params.rows; row += stride) {
    if (part.unit == 16) {
      CopyRow<uint4>(params, part, row, lane);
    } else if (part.unit == 4) {
      CopyRow<uint32_t>(params, part, row, lane);
    } else {
      CopyRow<uint8_t>(params, part, row, lane);
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
  const int64_t blocks = (kernel.rows + kWarps - 1) / kWarps;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 16)),
                  static_cast<unsigned>(params.n_parts));
  CacheWriteKernel<<<grid, kWarps * 32, 0, stream>>>(kernel);
  return cudaGetLastError();
}

}  // namespace dsv4
