// Eight channels a thread, so that a warp has two heads of 128: three stages of butterflies in
// registers, four by shuffles. A thread block takes some heads of one token, whose sines and
// cosines its first warp makes while the heads are on their way. Behind those thread blocks there
// may be some that finish the layer's own queries, which share nothing with them but the launch.
#include <cuda_runtime.h>

#include "common/barrier.cuh"
#include "common/channels.cuh"
#include "common/ue8m0.h"
#include "index_query_finish/index_query_finish.h"
#include "query_finish/query_finish.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;  // of a thread block
constexpr int kThreads = kWarps * kRowLanes;

// Of 8 values times a power of two, the e-th and the (e + 4)-th in word e, the codes of E2M1
// (common/e2m1.h), nearest even. Up to 2 codes count halves, up to 4 ones from -2 on, beyond twos
// from -4 on, and where one of them does not apply it is not the least. Added to 64, 128 or 256, a
// BF16 number is rounded to halves, ones or twos, and its bits count them. Beyond 6, and NaN: 6.
__device__ __forceinline__ uint32_t EncodeE2m1(const Eight& x, uint32_t inverse, bool nan) {
  constexpr uint32_t kBase = 0x42804280u;  // 64
  uint32_t codes = 0, signs = 0;
#pragma unroll
  for (int e = 3; e >= 0; --e) {
    const uint32_t halves = FmaMagnitudeBf16x2(x.word[e], inverse, kBase);
    const uint32_t ones = FmaMagnitudeBf16x2(x.word[e], inverse, 0x43004300u);
    const uint32_t twos = FmaMagnitudeBf16x2(x.word[e], inverse, 0x43804380u);
    // 0x80 a binade, less 2 each.
    uint32_t least = __vminu2(halves, kBase + 0x00070007u);
    least = __viaddmin_u16x2(ones, 0xFF82FF82u, least);
    least = __viaddmin_u16x2(twos, 0xFF04FF04u, least);
    codes = codes * 16 + least;
    signs |= x.word[e] >> (12 - 4 * e) & 0x00080008u << 4 * e;
  }
  return (codes - kBase * 0x1111u) | (nan ? 0u : signs);
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
template <int kLanes, bool kFp8, bool kAligned>
__device__ __forceinline__ void FinishIndexHeads(const IndexQueryFinishParams& p, int heads) {
  constexpr int kWidth = kLanes * kChunkChannels;
  constexpr int kHeads = kThreads / kLanes;  // at a time
  __shared__ __align__(16) float2 turns[kMaxRotary / 2];
  constexpr int kScaleLanes = kFp8 ? kLanes : kIndexQueryBlock / kChunkChannels;
  const uint32_t lane = threadIdx.x % kLanes;
  const auto h = static_cast<uint32_t>(p.h);
  const uint32_t groups = (h + heads - 1) / heads;
  const uint32_t token = blockIdx.x / groups;
  const uint32_t first = (blockIdx.x - token * groups) * heads, last = min(first + heads, h);
  const uint32_t channel = lane * kChunkChannels, nope = kWidth - static_cast<uint32_t>(p.rotary);

  uint32_t head = first + threadIdx.x / kLanes;
  Eight x = {};
  const uint64_t row = uint64_t{token} * h + head;
  const uint16_t* from = p.x + row * kWidth + channel;
  uint8_t* codes = p.code + (row * kWidth + channel) / (kFp8 ? 1 : 2);
  uint8_t* scales = p.scale + row * (kLanes / kScaleLanes) + lane / kScaleLanes;
  if (head < last) x = LoadEight<kAligned>(from);
  if (threadIdx.x < p.rotary / 2) {
    turns[threadIdx.x] = TurnAt(__ldg(p.positions + token), __ldg(p.frequencies + threadIdx.x));
  }
  __syncthreads();
  // A lane has the same channels of every head.
  const bool turned = channel >= nope;
  float4 turn[2] = {};
  if (turned) {
    const auto* from_shared = reinterpret_cast<const float4*>(turns + (channel - nope) / 2);
    turn[0] = from_shared[0];
    turn[1] = from_shared[1];
  }
  // All of a warp go on while any of it has a head.
  while (__any_sync(kWarpLanes, head < last)) {
    const uint32_t next = head + kHeads;
    Eight ahead = {};
    from += kHeads * kWidth;
    if (next < last) ahead = LoadEight<kAligned>(from);
    if (turned) Rotate(x, turn);
    float y[kChunkChannels];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = Low(x.word[i]);
      y[2 * i + 1] = High(x.word[i]);
    }
    Transform<kLanes>(y, lane);
#pragma unroll
    for (int i = 0; i < kChunkChannels; ++i) y[i] *= p.norm;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // as the codes are made
      x.word[i] = kFp8 ? PackBf16(y[2 * i], y[2 * i + 1]) : PackBf16(y[i], y[i + 4]);
    }
    const uint32_t largest = LargerOf(LargestOfLanes<kScaleLanes>(LargestPair(x)));
    const uint32_t byte = kFp8 ? Fp8ScaleByteOfBf16(largest) : Mxfp4ScaleByteOfBf16(largest);
    const uint32_t inverse = InverseScaleBf16x2(byte);
    if (head < last) {
      if constexpr (kFp8) {
        StoreVector(codes, EncodeE4m3(x, inverse));
      } else {
        *reinterpret_cast<uint32_t*>(codes) = EncodeE2m1(x, inverse, byte == kUe8m0Nan);
      }
      if (lane % kScaleLanes == 0) *scales = static_cast<uint8_t>(byte);
    }
    codes += kHeads * kWidth / (kFp8 ? 1 : 2);
    scales += kHeads * (kLanes / kScaleLanes);
    x = ahead;
    head = next;
  }
}

template <int kLanes, bool kFp8, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    IndexQueryFinishKernel(const __grid_constant__ IndexQueryFinishParams p, int heads) {
  FinishIndexHeads<kLanes, kFp8, kAligned>(p, heads);
}

constexpr int kModelLanes = kIndexQueryMaxWidth / kChunkChannels;
constexpr int kModelHeads = kThreads / kModelLanes;  // of a thread block

// The first `blocks` thread blocks finish indexer queries, the others those of the layer: one head
// a thread or warp.
template <bool kFp8, bool kSteps>
__global__ void __launch_bounds__(kThreads)
    BothQueriesKernel(const __grid_constant__ IndexQueryFinishParams p,
                      const __grid_constant__ QueryFinishParams heads, uint32_t blocks) {
  WaitForPrevious();
  LetNextBegin();
  if (blockIdx.x < blocks) {
    FinishIndexHeads<kModelLanes, kFp8, true>(p, kModelHeads);
  } else {
    FinishHeads<kWarps, true, true, kSteps>(heads, kWarps, blockIdx.x - blocks);
  }
}

// Thread blocks that an SM holds at a time: where there are more, a thread takes several heads.
constexpr int64_t kResident = 12;
constexpr int kMostRounds = 8;

template <int kLanes, bool kFp8>
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
    IndexQueryFinishKernel<kLanes, kFp8, false><<<grid, kThreads, 0, stream>>>(params, heads);
  } else {
    IndexQueryFinishKernel<kLanes, kFp8, true><<<grid, kThreads, 0, stream>>>(params, heads);
  }
  return cudaGetLastError();
}

template <bool kFp8>
cudaError_t LaunchForm(const IndexQueryFinishParams& params, cudaStream_t stream) {
  if (params.d == 32) return Launch<4, kFp8>(params, stream);
  if (params.d == 64) return Launch<8, kFp8>(params, stream);
  return Launch<16, kFp8>(params, stream);
}

// More tokens are the business of the kernels that are made for them, whose threads take several
// heads: a launch more is nothing to those.
constexpr int64_t kFewTokens = 32;

bool InOneLaunch(const IndexQueryFinishParams& p, const QueryFinishParams& heads) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(heads.x);
  const bool some = p.t > 0 && p.t <= kFewTokens && p.h > 0 && heads.h > 0;
  const bool few = p.h <= INT32_MAX / 64 && heads.h <= INT32_MAX / 64;  // thread blocks
  return some && few && p.d == kIndexQueryMaxWidth && heads.d == kRowMaxChannels &&
         addresses % 16 == 0;
}

template <bool kFp8>
cudaError_t LaunchBoth(const IndexQueryFinishParams& p, const QueryFinishParams& heads,
                       cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(p.t * ((p.h + kModelHeads - 1) / kModelHeads));
  const auto grid = blocks + static_cast<unsigned>(heads.t * ((heads.h + kWarps - 1) / kWarps));
  if (heads.bf16_steps) {
    return LaunchFirst(BothQueriesKernel<kFp8, true>, grid, kThreads, 0, stream, 1, p, heads,
                       blocks);
  }
  return LaunchFirst(BothQueriesKernel<kFp8, false>, grid, kThreads, 0, stream, 1, p, heads,
                     blocks);
}

}  // namespace

cudaError_t BothQueriesCuda(const IndexQueryFinishParams& params, const QueryFinishParams& heads,
                            cudaStream_t stream) {
  if (!InOneLaunch(params, heads)) {
    const cudaError_t error = IndexQueryFinishCuda(params, stream);
    return error != cudaSuccess ? error : QueryFinishCuda(heads, stream);
  }
  if (params.form == IndexQueryForm::kFp8) return LaunchBoth<true>(params, heads, stream);
  return LaunchBoth<false>(params, heads, stream);
}

cudaError_t IndexQueryFinishCuda(const IndexQueryFinishParams& params, cudaStream_t stream) {
  if (params.t == 0 || params.h == 0) return cudaSuccess;
  if (params.form == IndexQueryForm::kFp8) return LaunchForm<true>(params, stream);
  return LaunchForm<false>(params, stream);
}

}  // namespace dsv4
