// Heads of a token by a thread block: device code of query_finish and of index_query_finish, which
// has it as a second job.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/channels.cuh"
#include "query_finish/query_finish.h"

namespace dsv4 {

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

// `heads` of a token, those of this block, by kWarps warps: all of the thread block.
template <int kWarps, bool kWhole, bool kAligned, bool kSteps>
__device__ __forceinline__ void FinishHeads(const QueryFinishParams& p, int heads, uint32_t block) {
  __shared__ __align__(16) float2 turns[kMaxRotary / 2];
  const int lane = threadIdx.x % kRowLanes, warp = threadIdx.x / kRowLanes;
  const int groups = (static_cast<int>(p.h) + heads - 1) / heads;
  const int64_t token = block / groups;
  const int first = static_cast<int>(block % groups) * heads;
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

}  // namespace dsv4
