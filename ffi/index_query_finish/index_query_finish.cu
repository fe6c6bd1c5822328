// Eight channels a thread, so that a warp has two heads of 128: three stages of butterflies in
// registers, four by shuffles. A thread block takes some heads of one token, whose sines and
// cosines its first warp makes while the heads are on their way.
#include <cuda_runtime.h>

#include "common/barrier.cuh"
#include "common/channels.cuh"
#include "common/ue8m0.h"
#include "index_query_finish/index_query_finish.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;  // of a thread block
constexpr int kThreads = kWarps * kRowLanes;

// The code of E2M1 (common/e2m1.h): below 1 it counts halves, from 1 on it is the float's exponent
// and first bit. Nearest even both, NaN becomes the largest.
__device__ __forceinline__ uint32_t E2m1Code(float x) {
  const uint32_t bits = __float_as_uint(x);
  const float a = fminf(__uint_as_float(bits & 0x7FFFFFFFu), 6.0f);
  const uint32_t word = __float_as_uint(a);
  const uint32_t below = __float_as_uint(a + 0x1p22f) & 3;
  const uint32_t above = (word + 0x1FFFFFu + (word >> 22 & 1)) >> 22;
  return (a < 1.0f ? below : above - (126 << 1)) | bits >> 31 << 3;
}

// Stages of butterflies among 8 * kLanes channels, neighbours first.
template <int kLanes>
__device__ __forceinline__ void Transform(float (&y)[kChunkChannels], int lane) {
#pragma unroll
  for (int half = 1; half < kChunkChannels; half *= 2) {
#pragma unroll
    for (int i = 0; i < kChunkChannels; ++i) {
      if (i & half) continue;
      const float low = y[i], high = y[i + half];
      y[i] = low + high;
      y[i + half] = low - high;
    }
  }
#pragma unroll
  for (int half = 1; half < kLanes; half *= 2) {
    const float sign = lane & half ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kChunkChannels; ++i) {
      // y + other, or other - y; the product is exact.
      const float other = __shfl_xor_sync(kWarpLanes, y[i], half);
      y[i] = __fmaf_rn(sign, y[i], other);
    }
  }
}

// kLanes: threads of a head.
template <int kLanes, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    IndexQueryFinishKernel(const __grid_constant__ IndexQueryFinishParams p, int heads) {
  constexpr int kWidth = kLanes * kChunkChannels;
  constexpr int kHeads = kThreads / kLanes;  // at a time
  __shared__ __align__(16) float2 turns[kMaxRotary / 2];
  const int lane = threadIdx.x % kLanes;
  const int groups = (static_cast<int>(p.h) + heads - 1) / heads;
  const int64_t token = blockIdx.x / groups;
  const int first = static_cast<int>(blockIdx.x % groups) * heads;
  const int last = min(first + heads, static_cast<int>(p.h));
  const int channel = lane * kChunkChannels, nope = kWidth - static_cast<int>(p.rotary);

  int head = first + threadIdx.x / kLanes;
  Eight x = {};
  const uint16_t* const from = p.x + token * p.h * kWidth + channel;
  if (head < last) x = LoadEight<kAligned>(from + head * int64_t{kWidth});
  if (threadIdx.x < p.rotary / 2) {
    turns[threadIdx.x] = TurnAt(__ldg(p.positions + token), __ldg(p.frequencies + threadIdx.x));
  }
  __syncthreads();
  // All of a warp go on while any of it has a head.
  while (__any_sync(kWarpLanes, head < last)) {
    const int next = head + kHeads;
    Eight ahead = {};
    if (next < last) ahead = LoadEight<kAligned>(from + next * int64_t{kWidth});
    if (channel >= nope) Rotate(x, turns + (channel - nope) / 2);
    float y[kChunkChannels];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = Low(x.word[i]);
      y[2 * i + 1] = High(x.word[i]);
    }
    Transform<kLanes>(y, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x.word[i] = PackBf16(y[2 * i] * p.norm, y[2 * i + 1] * p.norm);
    }
    const bool fp8 = p.form == IndexQueryForm::kFp8;
    const int lanes = fp8 ? kLanes : kIndexQueryBlock / kChunkChannels;
    const uint32_t largest = LargestOfLanes(LargestBf16(x), lanes) << 16;
    const uint32_t byte = fp8 ? Fp8ScaleByte(largest) : Mxfp4ScaleByte(largest);
    const float inverse = InverseScale(byte);
    const int64_t row = token * p.h + head;
    if (head < last) {
      if (fp8) {
        StoreVector(p.code + row * kWidth + channel, EncodeE4m3(x, inverse));
      } else {
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          codes |= E2m1Code(Low(x.word[i]) * inverse) << 8 * i;
          codes |= E2m1Code(High(x.word[i]) * inverse) << (8 * i + 4);
        }
        *reinterpret_cast<uint32_t*>(p.code + (row * kWidth + channel) / 2) = codes;
      }
      if (lane % lanes == 0) {
        p.scale[row * (kLanes / lanes) + lane / lanes] = static_cast<uint8_t>(byte);
      }
    }
    x = ahead;
    head = next;
  }
}

// Thread blocks that an SM holds at a time: where there are more, a thread takes several heads.
constexpr int64_t kResident = 16;
constexpr int kMostRounds = 8;

template <int kLanes>
cudaError_t Launch(const IndexQueryFinishParams& params, cudaStream_t stream) {
  constexpr int kHeads = kThreads / kLanes;
  int heads = kHeads;  // of a thread block
  const int64_t most = kResident * Multiprocessors();
  while (heads < kMostRounds * kHeads && heads < params.h && params.t * params.h / heads > most) {
    heads *= 2;
  }
  const int64_t blocks = params.t * ((params.h + heads - 1) / heads);
  if (blocks > INT32_MAX || params.h > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  if (reinterpret_cast<uintptr_t>(params.x) % 16 != 0) {  // a slice
    IndexQueryFinishKernel<kLanes, false><<<grid, kThreads, 0, stream>>>(params, heads);
  } else {
    IndexQueryFinishKernel<kLanes, true><<<grid, kThreads, 0, stream>>>(params, heads);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t IndexQueryFinishCuda(const IndexQueryFinishParams& params, cudaStream_t stream) {
  if (params.t == 0 || params.h == 0) return cudaSuccess;
  if (params.d == 32) return Launch<4>(params, stream);
  if (params.d == 64) return Launch<8>(params, stream);
  return Launch<16>(params, stream);
}

}  // namespace dsv4
