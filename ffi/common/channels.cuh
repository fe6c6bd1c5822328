// Eight BF16 channels a lane: what the kernels that finish a projection share. Orders of sums are
// those of channels.h.
#pragma once

#include <cstdint>

#include "common/bf16x2.cuh"
#include "common/bits.h"
#include "common/channels.h"
#include "common/e4m3.cuh"
#include "common/rope.h"
#include "common/vector_store.cuh"

namespace dsv4 {

constexpr unsigned kWarpLanes = 0xFFFFFFFFu;

// Channels 2i and 2i + 1 in word i, the first in its low half.
struct Eight {
  uint32_t word[4];
};

// kAligned: to 16 bytes.
template <bool kAligned>
__device__ __forceinline__ Eight LoadEight(const uint16_t* from) {
  Eight x;
  if constexpr (kAligned) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    x = {v.x, v.y, v.z, v.w};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x.word[i] = __ldg(from + 2 * i) | static_cast<uint32_t>(__ldg(from + 2 * i + 1)) << 16;
    }
  }
  return x;
}

__device__ __forceinline__ void StoreEight(const Eight& x, uint16_t* to) {
  StoreVector(to, make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}

__device__ __forceinline__ float SumOfSquares(const Eight& x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // the squares are exact
    sum = __fmaf_rn(Low(x.word[i]), Low(x.word[i]), sum);
    sum = __fmaf_rn(High(x.word[i]), High(x.word[i]), sum);
  }
  return sum;
}

// By halves, in every one of a warp's lanes.
__device__ __forceinline__ float SumByHalves(float sum) {
#pragma unroll
  for (int half = kRowLanes / 2; half > 0; half /= 2) {
    sum += __shfl_xor_sync(kWarpLanes, sum, half);
  }
  return sum;
}

// The largest magnitudes of the even and of the odd channels, NaN above all; signs as MaxMagnitudes
// leaves them.
__device__ __forceinline__ uint32_t LargestPair(const Eight& x) {
  return MaxMagnitudes(MaxMagnitudes(x.word[0], x.word[1]), MaxMagnitudes(x.word[2], x.word[3]));
}

// Of kLanes neighbours, a power of two.
template <int kLanes>
__device__ __forceinline__ uint32_t LargestOfLanes(uint32_t pair) {
#pragma unroll
  for (int half = 1; half < kLanes; half *= 2) {
    pair = MaxMagnitudes(pair, __shfl_xor_sync(kWarpLanes, pair, half));
  }
  return pair;
}

// Four pairs, each by its own (cosine, sine), two of them in each of `turns`.
__device__ __forceinline__ void Rotate(Eight& x, const float4* turns) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float4 turn = turns[i / 2];
    const Pair a = Turned(Low(x.word[i]), High(x.word[i]), {turn.y, turn.x});
    const Pair b = Turned(Low(x.word[i + 1]), High(x.word[i + 1]), {turn.w, turn.z});
    x.word[i] = PackBf16(a.even, a.odd);
    x.word[i + 1] = PackBf16(b.even, b.odd);
  }
}

// In shared memory, aligned to 16 bytes.
__device__ __forceinline__ void Rotate(Eight& x, const float2* turns) {
  Rotate(x, reinterpret_cast<const float4*>(turns));
}

__device__ __forceinline__ float2 TurnAt(int32_t position, float frequency) {
  const SinCos turn = SinCosAt(position, frequency);
  return make_float2(turn.cos, turn.sin);
}

// E4M3 codes of 8 channels times a power of two, BF16 in both halves; what is NaN becomes 0x7F. The
// product is exact but where its code is 0.
__device__ __forceinline__ uint2 EncodeE4m3(const Eight& x, uint32_t inverse) {
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t scaled = MulBf16x2(x.word[i], inverse);
    pair[i] = EncodeE4m3Pair(Low(scaled), High(scaled));
  }
  return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

}  // namespace dsv4
