// A warp or half of one per key, the key in its registers from its one read to its one write. A few
// keys are latency: one round to memory for everything, a few shuffles for norm and scales; a warp
// takes one. Many are instructions as much as memory, and half of those are a warp's, whatever it
// holds: it takes two. The sums are the same: with half the lanes the first halving is within one.
// Sines and cosines go through shared memory to the eight lanes that hold rotary channels.
#include <cuda_runtime.h>

#include "common/channels.cuh"
#include "common/ue8m0.h"
#include "key_finish/key_finish.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;  // of a thread block
constexpr int kThreads = kWarps * kRowLanes;
constexpr int kBlockLanes = kKeyBlock / kChunkChannels;  // side by side

// What a lane writes of a key: chunks lane, lane + kLanes, ...
template <int kChunks>
struct Finished {
  uint2 codes[kChunks];
  uint32_t scale[kChunks];
  Eight rope[kChunks];
};

// kWhole: a key has kRowMaxChannels, so that but the last chunk of a lane none is rotary.
template <int kLanes, bool kWhole>
struct Layout {
  static constexpr int kChunks = kRowMaxChannels / kChunkChannels / kLanes;

  __device__ __forceinline__ static bool AreCodes(int c, int channel, int nope) {
    return (kWhole && c + 1 < kChunks) || channel < nope;
  }
  __device__ __forceinline__ static bool IsThere(int channel, int d) {
    return kWhole || channel < d;
  }
};

template <int kLanes, bool kWhole>
__device__ __forceinline__ void Store(const KeyFinishParams& p,
                                      const Finished<Layout<kLanes, kWhole>::kChunks>& y,
                                      const KeyStore& store, int64_t row, int lane) {
  using Chunks = Layout<kLanes, kWhole>;
  const int d = kWhole ? kRowMaxChannels : static_cast<int>(p.d);
  const int nope = d - static_cast<int>(p.rotary);
#pragma unroll
  for (int c = 0; c < Chunks::kChunks; ++c) {
    const int channel = (lane + c * kLanes) * kChunkChannels;
    if (!Chunks::IsThere(channel, d)) continue;
    if (Chunks::AreCodes(c, channel, nope)) {
      StoreVector(store.nope + row * nope + channel, y.codes[c]);
      if (lane % kBlockLanes == 0) {
        store.scale[row * (nope / kKeyBlock) + channel / kKeyBlock] =
            static_cast<uint8_t>(y.scale[c]);
      }
    } else {
      StoreEight(y.rope[c], store.rope + row * p.rotary + channel - nope);
    }
  }
}

template <int kLanes, bool kWhole, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    KeyFinishKernel(const __grid_constant__ KeyFinishParams p) {
  using Chunks = Layout<kLanes, kWhole>;
  constexpr int kChunks = Chunks::kChunks, kKeys = kThreads / kLanes;
  constexpr int kTurns = kMaxRotary / 2;
  __shared__ __align__(16) float2 turns[kKeys][kTurns];
  const int lane = threadIdx.x % kLanes, key = threadIdx.x / kLanes;
  const auto rows = static_cast<uint32_t>(p.b * p.t);
  // A warp's second key may not be there: it does what the last one does, and stores nothing.
  const uint32_t index = blockIdx.x * kKeys + key, row = min(index, rows - 1);
  if (blockIdx.x * kKeys + threadIdx.x / kRowLanes * (kRowLanes / kLanes) >= rows) return;
  const auto t = static_cast<uint32_t>(p.t);
  const uint32_t b = t == 1 ? row : row / t, j = t == 1 ? 0 : row - b * t;
  const int d = kWhole ? kRowMaxChannels : static_cast<int>(p.d);
  const int nope = d - static_cast<int>(p.rotary);
  const int32_t start = __ldg(p.start + b);
  const int32_t count = p.slots > 0 ? __ldg(p.count + b) : 0;
  const uint16_t* const x = p.x + row * int64_t{d};
  Eight y[kChunks] = {}, weight[kChunks] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int channel = (lane + c * kLanes) * kChunkChannels;
    if (!Chunks::IsThere(channel, d)) continue;
    y[c] = LoadEight<kAligned>(x + channel);
    weight[c] = LoadEight<kAligned>(p.weight + channel);
  }
#pragma unroll
  for (int i = 0; i < kTurns / kLanes; ++i) {
    const int pair = lane + i * kLanes;
    const float frequency = pair < p.rotary / 2 ? __ldg(p.frequencies + pair) : 0.0f;
    turns[key][pair] = TurnAt(KeyPosition(start, j), frequency);
  }

  const float squares = SumOfLanes<kLanes>(y);
  const float scale = __frsqrt_rn(squares * p.reciprocal_d + p.eps);
  __syncwarp();
  Finished<kChunks> out;
  uint32_t largest[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int channel = (lane + c * kLanes) * kChunkChannels;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x2 = y[c].word[i], w2 = weight[c].word[i];
      y[c].word[i] = PackBf16(Low(w2) * (Low(x2) * scale), High(w2) * (High(x2) * scale));
    }
    largest[c] = LargestOfLanes(LargestBf16(y[c]), kBlockLanes);
    out.rope[c] = y[c];
    if (!Chunks::AreCodes(c, channel, nope) && Chunks::IsThere(channel, d)) {
      Rotate(out.rope[c], turns[key] + (channel - nope) / 2);
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    out.scale[c] = Fp8ScaleByte(largest[c] << 16);
    out.codes[c] = EncodeE4m3(y[c], InverseScale(out.scale[c]));
  }
  if (index >= rows) return;
  Store<kLanes, kWhole>(p, out, p.rows, row, lane);
  if (p.slots == 0) return;
  const int64_t slot = RingSlot(start, count, j, p.t, p.slots);
  if (slot >= 0) Store<kLanes, kWhole>(p, out, p.ring, b * p.slots + slot, lane);
}

template <int kLanes, bool kWhole, bool kAligned>
cudaError_t Launch(const KeyFinishParams& params, cudaStream_t stream) {
  constexpr int kKeys = kThreads / kLanes;
  const auto grid = static_cast<unsigned>((params.b * params.t + kKeys - 1) / kKeys);
  KeyFinishKernel<kLanes, kWhole, kAligned><<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

// More keys than that are no longer latency.
constexpr int64_t kManyKeys = 1024;

}  // namespace

cudaError_t KeyFinishCuda(const KeyFinishParams& params, cudaStream_t stream) {
  const int64_t rows = params.b * params.t;
  if (rows == 0) return cudaSuccess;
  if (rows > INT32_MAX || params.slots > INT32_MAX) return cudaErrorInvalidConfiguration;
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight);
  if (addresses % 16 != 0) return Launch<32, false, false>(params, stream);  // a slice
  if (params.d != kRowMaxChannels) return Launch<32, false, true>(params, stream);
  if (rows > kManyKeys) return Launch<16, true, true>(params, stream);
  return Launch<32, true, true>(params, stream);
}

}  // namespace dsv4
