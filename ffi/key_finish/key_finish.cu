// A warp per key, the key in its registers from its one read to its one write: one round to memory
// for everything, a few shuffles for norm and scales. Sines and cosines go through shared memory to
// the eight lanes that hold rotary channels. Behind the thread blocks of the keys there may be some
// of a norm, one per token, which share nothing with them but the launch.
#include <cuda_runtime.h>

#include "common/barrier.cuh"
#include "common/channels.cuh"
#include "common/ue8m0.h"
#include "key_finish/key_finish.h"
#include "rmsnorm_fp8/rmsnorm_fp8.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;  // of a thread block
constexpr int kThreads = kWarps * kRowLanes;
constexpr int kBlockLanes = kKeyBlock / kChunkChannels;  // side by side

constexpr int kChunks = kRowChunks;  // of a lane: lane, lane + kRowLanes

// What a lane writes of a key.
struct Finished {
  uint2 codes[kChunks];
  uint32_t scale[kChunks];
  Eight rope[kChunks];
};

// kWhole: a key has kRowMaxChannels, kMaxRotary of them rotary: none but in a lane's last chunk.
template <bool kWhole>
struct Layout {
  __device__ __forceinline__ static uint32_t Channels(const KeyFinishParams& p) {
    return static_cast<uint32_t>(kWhole ? kRowMaxChannels : p.d);
  }
  __device__ __forceinline__ static uint32_t Rotary(const KeyFinishParams& p) {
    return static_cast<uint32_t>(kWhole ? kMaxRotary : p.rotary);
  }
  __device__ __forceinline__ static bool AreCodes(int c, uint32_t channel, uint32_t nope) {
    return (kWhole && c + 1 < kChunks) || channel < nope;
  }
  __device__ __forceinline__ static bool IsThere(uint32_t channel, uint32_t d) {
    return kWhole || channel < d;
  }
};

template <bool kWhole>
__device__ __forceinline__ void Store(const KeyFinishParams& p, const Finished& y,
                                      const KeyStore& store, int64_t row, uint32_t lane) {
  using Chunks = Layout<kWhole>;
  const uint32_t d = Chunks::Channels(p), rotary = Chunks::Rotary(p), nope = d - rotary;
  uint8_t* const codes = store.nope + row * nope + lane * kChunkChannels;
  uint8_t* const scales = store.scale + row * (nope / kKeyBlock) + lane / kBlockLanes;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t channel = (lane + c * kRowLanes) * kChunkChannels;
    if (!Chunks::IsThere(channel, d)) continue;
    if (Chunks::AreCodes(c, channel, nope)) {
      StoreVector(codes + c * kRowLanes * kChunkChannels, y.codes[c]);
      if (lane % kBlockLanes == 0) {
        scales[c * kRowLanes / kBlockLanes] = static_cast<uint8_t>(y.scale[c]);
      }
    } else {
      StoreEight(y.rope[c], store.rope + row * rotary + (channel - nope));
    }
  }
}

// A number that the compiler cannot see.
__device__ __forceinline__ int Opaque(int x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

template <bool kWhole, bool kAligned>
__device__ __forceinline__ void FinishKeys(const KeyFinishParams& p) {
  using Chunks = Layout<kWhole>;
  constexpr int kTurns = kMaxRotary / 2;  // one a lane
  __shared__ __align__(16) float2 turns[kWarps][kTurns];
  const uint32_t lane = threadIdx.x % kRowLanes, warp = threadIdx.x / kRowLanes;
  const uint32_t row = blockIdx.x * kWarps + warp;
  if (row >= static_cast<uint32_t>(p.b * p.t)) return;
  const auto t = static_cast<uint32_t>(p.t);
  const uint32_t d = Chunks::Channels(p), rotary = Chunks::Rotary(p), nope = d - rotary;
  // What the angles need is asked for first: sines are made while the key is on its way.
  const float frequency = lane < rotary / 2 ? __ldg(p.frequencies + lane) : 0.0f;
  uint32_t b = 0, j = row;
  if (t == 1) {
    b = row;
    j = 0;
  } else if (p.b > 1) {
    b = row / t;
    j = row - b * t;
  }
  const int32_t start = __ldg(p.start + b);
  const uint16_t* const x = p.x + row * uint64_t{d} + lane * kChunkChannels;
  const uint16_t* const weight_in = p.weight + lane * kChunkChannels;
  Eight y[kChunks] = {}, weight[kChunks] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t channel = (lane + c * kRowLanes) * kChunkChannels;
    if (Chunks::IsThere(channel, d)) y[c] = LoadEight<kAligned>(x + c * kRowLanes * kChunkChannels);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t channel = (lane + c * kRowLanes) * kChunkChannels;
    if (Chunks::IsThere(channel, d)) {
      weight[c] = LoadEight<kAligned>(weight_in + c * kRowLanes * kChunkChannels);
    }
  }
  const int32_t count = p.slots > 0 ? __ldg(p.count + b) : 0;
  // A loop of one round, so that nothing after it, which waits for the key, is put before.
  int left = Opaque(1);
#pragma unroll 1
  do {
    turns[warp][lane] = TurnAt(KeyPosition(start, j), frequency);
  } while (--left > 0);

  const float squares = SumByHalves(SumOfSquares(y[0]) + SumOfSquares(y[1]));
  const float scale = __frsqrt_rn(squares * p.reciprocal_d + p.eps);
  __syncwarp();
  Finished out;
  uint32_t largest[kChunks / 2];  // of two chunks, one a half
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x2 = y[c].word[i], w2 = weight[c].word[i];
      y[c].word[i] = PackBf16(Low(w2) * (Low(x2) * scale), High(w2) * (High(x2) * scale));
    }
    if (c % 2 == 0) continue;
    const uint32_t one = LargestPair(y[c - 1]), other = LargestPair(y[c]);
    largest[c / 2] = LargestOfLanes<kBlockLanes>(
        MaxMagnitudes(__byte_perm(one, other, 0x5410), __byte_perm(one, other, 0x7632)));
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t channel = (lane + c * kRowLanes) * kChunkChannels;
    out.scale[c] = Fp8ScaleByteOfBf16(largest[c / 2] >> c % 2 * 16 & 0x7FFFu);
    out.codes[c] = EncodeE4m3(y[c], InverseScaleBf16x2(out.scale[c]));
    out.rope[c] = y[c];
    if (!Chunks::AreCodes(c, channel, nope) && Chunks::IsThere(channel, d)) {
      Rotate(out.rope[c], turns[warp] + (channel - nope) / 2);
    }
  }
  Store<kWhole>(p, out, p.rows, row, lane);
  if (p.slots == 0) return;
  const int64_t slot = RingSlot(start, count, j, p.t, p.slots);
  if (slot >= 0) Store<kWhole>(p, out, p.ring, b * p.slots + slot, lane);
}

template <bool kWhole, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    KeyFinishKernel(const __grid_constant__ KeyFinishParams p) {
  WaitForPrevious();
  LetNextBegin();
  FinishKeys<kWhole, kAligned>(p);
}

// The first `keys` thread blocks finish keys, each of the others norms a token.
template <bool kCodes>
__global__ void __launch_bounds__(kThreads)
    KeyFinishNormKernel(const __grid_constant__ KeyFinishParams p,
                        const __grid_constant__ QueryNormParams norm, uint32_t keys) {
  // Weights of the linears behind this may be on their way already, which makes the memory slow.
  const int64_t ahead = int64_t{threadIdx.x} * 64;
  if (ahead < p.d) Prefetch(p.weight + ahead);
  if (ahead < norm.d) Prefetch(norm.weight + ahead);
  WaitForPrevious();
  LetNextBegin();
  if (blockIdx.x < keys) {
    FinishKeys<true, true>(p);
  } else if constexpr (kCodes) {
    NormToFp8<1, 1, kThreads, true>(norm, blockIdx.x - keys, 0);
  } else {
    NormToBf16<1, 1, kThreads, true>(norm, norm.y, blockIdx.x - keys, 0);
  }
}

// BF16 that goes not with the keys. kResident thread blocks share an SM's registers.
template <int kBlocks, int kParts, int kMaxThreads, int kResident, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, kResident)
    QueryNormKernel(const __grid_constant__ QueryNormParams norm) {
  WaitForPrevious();
  LetNextBegin();
  NormToBf16<kBlocks, kParts, kMaxThreads, kAligned>(norm, norm.y, blockIdx.x / kParts,
                                                     blockIdx.x % kParts);
}

struct LaunchQueryNorm {
  const QueryNormParams& norm;
  cudaStream_t stream;

  template <int kBlocks, int kParts, int kMaxThreads, int kResident, bool kAligned = true>
  cudaError_t Run(int blocks) const {
    const int threads = (blocks / kBlocks + 31) / 32 * 32;
    const auto grid = static_cast<unsigned>(norm.t * kParts);
    return LaunchFirst(QueryNormKernel<kBlocks, kParts, kMaxThreads, kResident, kAligned>,
                       dim3(grid), threads, 0, stream, 1, norm);
  }
};

unsigned KeyBlocks(const KeyFinishParams& params) {
  return static_cast<unsigned>((params.b * params.t + kWarps - 1) / kWarps);
}

template <bool kWhole, bool kAligned>
cudaError_t Launch(const KeyFinishParams& params, cudaStream_t stream) {
  const unsigned grid = KeyBlocks(params);
  return LaunchFirst(KeyFinishKernel<kWhole, kAligned>, dim3(grid), kThreads, 0, stream, 1, params);
}

uintptr_t Addresses(const uint16_t* x, const uint16_t* weight) {
  return reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(weight);
}

// Whole keys and a norm of which a thread has 16 channels. Many tokens are the business of the
// kernels that are made for them: a launch more is nothing to those.
bool InOneLaunch(const KeyFinishParams& p, const QueryNormParams& norm) {
  const bool whole = p.d == kRowMaxChannels && p.rotary == kMaxRotary;
  const bool few = p.b * p.t > 0 && p.b * p.t <= kManyTokens && norm.t > 0 && norm.t <= kManyTokens;
  const uintptr_t addresses = Addresses(p.x, p.weight) | Addresses(norm.x, norm.weight);
  return whole && few && p.slots <= INT32_MAX && addresses % 16 == 0 &&
         norm.d <= kThreads * kNormBlock;
}

}  // namespace

cudaError_t KeyFinishCuda(const KeyFinishParams& params, cudaStream_t stream) {
  const int64_t rows = params.b * params.t;
  if (rows == 0) return cudaSuccess;
  if (rows > INT32_MAX || params.slots > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (Addresses(params.x, params.weight) % 16 != 0)
    return Launch<false, false>(params, stream);  // a slice
  if (params.d != kRowMaxChannels || params.rotary != kMaxRotary) {
    return Launch<false, true>(params, stream);
  }
  return Launch<true, true>(params, stream);
}

cudaError_t KeyFinishNormCuda(const KeyFinishParams& params, const QueryNormParams& norm,
                              cudaStream_t stream) {
  if (!InOneLaunch(params, norm)) {
    const cudaError_t error = KeyFinishCuda(params, stream);
    if (error != cudaSuccess) return error;
    if (norm.y == nullptr) return RmsnormFp8Cuda(norm, stream);
    return ForTokens(norm.t, norm.d, Addresses(norm.x, norm.weight), LaunchQueryNorm{norm, stream});
  }
  const unsigned keys = KeyBlocks(params), grid = keys + static_cast<unsigned>(norm.t);
  const auto kernel = norm.y == nullptr ? KeyFinishNormKernel<true> : KeyFinishNormKernel<false>;
  return LaunchFirst(kernel, dim3(grid), kThreads, 0, stream, 1, params, norm, keys);
}

}  // namespace dsv4
