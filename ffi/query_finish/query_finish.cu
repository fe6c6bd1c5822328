// A warp per head, the head in its registers from its one read to its one write; a thread block
// takes some heads of one token, whose sines and cosines its first warp makes while the heads are
// on their way. Few heads are latency (one round to memory, five shuffles), so a warp takes one;
// many are memory, so a warp takes several, the next one read while this one is worked on.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/barrier.cuh"
#include "query_finish/query_finish.cuh"
#include "query_finish/query_finish.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;  // of a thread block
constexpr int kThreads = kWarps * kRowLanes;

template <bool kWhole, bool kAligned, bool kSteps>
__global__ void __launch_bounds__(kThreads)
    QueryFinishKernel(const __grid_constant__ QueryFinishParams p, int heads) {
  WaitForPrevious();
  LetNextBegin();
  FinishHeads<kWarps, kWhole, kAligned, kSteps>(p, heads, blockIdx.x);
}

template <bool kWhole, bool kAligned>
cudaError_t Launch(const QueryFinishParams& params, int heads, cudaStream_t stream) {
  const int64_t blocks = params.t * ((params.h + heads - 1) / heads);
  if (blocks > INT32_MAX || params.h > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (params.bf16_steps) {
    return LaunchFirst(QueryFinishKernel<kWhole, kAligned, true>, grid, kThreads, 0, stream, 1,
                       params, heads);
  }
  return LaunchFirst(QueryFinishKernel<kWhole, kAligned, false>, grid, kThreads, 0, stream, 1,
                     params, heads);
}

// Thread blocks that an SM holds at a time: where there are more, a warp takes several heads.
constexpr int64_t kResident = 6;
constexpr int kMostHeads = 8 * kWarps;

}  // namespace

cudaError_t QueryFinishCuda(const QueryFinishParams& params, cudaStream_t stream) {
  if (params.t == 0 || params.h == 0) return cudaSuccess;
  int heads = kWarps;  // of a thread block
  const int64_t most = kResident * Multiprocessors();
  while (heads < kMostHeads && heads < params.h && params.t * params.h / heads > most) heads *= 2;
  if (reinterpret_cast<uintptr_t>(params.x) % 16 != 0) {
    return Launch<false, false>(params, heads, stream);  // a slice
  }
  if (params.d == kRowMaxChannels) return Launch<true, true>(params, heads, stream);
  return Launch<false, true>(params, heads, stream);
}

}  // namespace dsv4
