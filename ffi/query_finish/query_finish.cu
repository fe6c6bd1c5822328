// A warp per head, the head in its registers from its one read to its one write; a thread block
// takes some heads of one token, whose sines and cosines its first warp makes while the heads are
// on their way. Few heads are latency (one round to memory, five shuffles), so a warp takes one;
// many are memory, so a warp takes several, the next one read while this one is worked on.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/barrier.cuh"
#include "common/channels.cuh"
#include "query_finish/query_finish.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;  // of a thread block
constexpr int kThreads = kWarps * kRowLanes;

struct Head {
  Eight chunk[kRowChunks];
};

// kWhole: a head has kRowMaxChannels.
template <bool kWhole, bool kAligned>
__device__ __forceinline__ Head LoadHead(const QueryFinishParams& p, const uint16_t* x, int lane) {
  Head head = {};
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int channel = (lane + c * kRowLanes) * kChunkChannels;
    if (kWhole || channel < p.d) head.chunk[c] = LoadEight<kAligned>(x + channel);
  }
  return head;
}

__device__ __forceinline__ float Rounded(float x) { return Low(PackBf16(x, 0.0f)); }

template <bool kSteps>
__device__ __forceinline__ float SquaresOf(const Eight& x) {
  if constexpr (!kSteps) return SumOfSquares(x);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t squares = MulBf16x2(x.word[i], x.word[i]);
    sum += Low(squares);
    sum += High(squares);
  }
  return sum;
}

template <bool kWhole, bool kAligned, bool kSteps>
__device__ __forceinline__ void FinishHead(const QueryFinishParams& p, Head& head,
                                           const float2* turns, uint16_t* y, int lane) {
  const float squares =
      SumByHalves(SquaresOf<kSteps>(head.chunk[0]) + SquaresOf<kSteps>(head.chunk[1]));
  float scale;
  if constexpr (kSteps) {
    const float mean = Rounded(squares * p.reciprocal_d);
    scale = Rounded(__frsqrt_rn(Rounded(mean + p.eps)));
  } else {
    scale = __frsqrt_rn(squares * p.reciprocal_d + p.eps);
  }
  const int nope = static_cast<int>(p.d - p.rotary);
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int channel = (lane + c * kRowLanes) * kChunkChannels;
    if (!kWhole && channel >= p.d) continue;
    Eight& chunk = head.chunk[c];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      chunk.word[i] = PackBf16(Low(chunk.word[i]) * scale, High(chunk.word[i]) * scale);
    }
    // Of a whole head the first half has no rotary channels.
    if ((!kWhole || c > 0) && channel >= nope) Rotate(chunk, turns + (channel - nope) / 2);
    StoreEight(chunk, y + channel);
  }
}

template <bool kWhole, bool kAligned, bool kSteps>
__global__ void __launch_bounds__(kThreads)
    QueryFinishKernel(const __grid_constant__ QueryFinishParams p, int heads) {
  __shared__ __align__(16) float2 turns[kMaxRotary / 2];
  const int lane = threadIdx.x % kRowLanes, warp = threadIdx.x / kRowLanes;
  const int groups = (static_cast<int>(p.h) + heads - 1) / heads;
  const int64_t token = blockIdx.x / groups;
  const int first = static_cast<int>(blockIdx.x % groups) * heads;
  const int last = min(first + heads, static_cast<int>(p.h));
  const int64_t begin = token * p.h * p.d;
  const int d = kWhole ? kRowMaxChannels : static_cast<int>(p.d);

  int head = first + warp;
  Head x = {};
  if (head < last) x = LoadHead<kWhole, kAligned>(p, p.x + begin + head * int64_t{d}, lane);
  if (threadIdx.x < p.rotary / 2) {
    turns[threadIdx.x] = TurnAt(__ldg(p.positions + token), __ldg(p.frequencies + threadIdx.x));
  }
  __syncthreads();
  while (head < last) {
    const int next = head + kWarps;
    Head ahead = {};
    if (next < last) ahead = LoadHead<kWhole, kAligned>(p, p.x + begin + next * int64_t{d}, lane);
    FinishHead<kWhole, kAligned, kSteps>(p, x, turns, p.y + begin + head * int64_t{d}, lane);
    x = ahead;
    head = next;
  }
}

template <bool kWhole, bool kAligned>
cudaError_t Launch(const QueryFinishParams& params, int heads, cudaStream_t stream) {
  const int64_t blocks = params.t * ((params.h + heads - 1) / heads);
  if (blocks > INT32_MAX || params.h > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  if (params.bf16_steps) {
    QueryFinishKernel<kWhole, kAligned, true><<<grid, kThreads, 0, stream>>>(params, heads);
  } else {
    QueryFinishKernel<kWhole, kAligned, false><<<grid, kThreads, 0, stream>>>(params, heads);
  }
  return cudaGetLastError();
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
