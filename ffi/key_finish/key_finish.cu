// A warp per key, the key in its registers from its one read to its one write. A few keys are
// latency: one round to memory for everything, five shuffles for the norm, three for the scales.
// Many are instructions as much as memory: a lane makes one sine and cosine of the key's 32 and
// leaves it in shared memory for the eight lanes that hold rotary channels.
#include <cuda_runtime.h>

#include "common/channels.cuh"
#include "common/ue8m0.h"
#include "key_finish/key_finish.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;  // of a thread block
constexpr int kThreads = kWarps * kRowLanes;
constexpr int kBlockLanes = kKeyBlock / kChunkChannels;  // side by side

// What a lane writes of a key.
struct Finished {
  uint2 codes[kRowChunks];
  uint32_t scale[kRowChunks];
  Eight rope[kRowChunks];
};

template <bool kWhole>
__device__ __forceinline__ void Store(const KeyFinishParams& p, const Finished& y,
                                      const KeyStore& store, int64_t row, int lane) {
  const int nope = static_cast<int>(p.d - p.rotary);
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int channel = (lane + c * kRowLanes) * kChunkChannels;
    if (!kWhole && channel >= p.d) continue;
    if ((kWhole && c == 0) || channel < nope) {
      *reinterpret_cast<uint2*>(store.nope + row * nope + channel) = y.codes[c];
      if (lane % kBlockLanes == 0) {
        store.scale[row * (nope / kKeyBlock) + channel / kKeyBlock] =
            static_cast<uint8_t>(y.scale[c]);
      }
    } else {
      StoreEight(y.rope[c], store.rope + row * p.rotary + channel - nope);
    }
  }
}

// kWhole: a key has kRowMaxChannels.
template <bool kWhole, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    KeyFinishKernel(const __grid_constant__ KeyFinishParams p) {
  __shared__ __align__(16) float2 turns[kWarps][kMaxRotary / 2];
  const int lane = threadIdx.x % kRowLanes, warp = threadIdx.x / kRowLanes;
  const uint32_t row = blockIdx.x * kWarps + warp;
  if (row >= static_cast<uint64_t>(p.b * p.t)) return;
  const auto t = static_cast<uint32_t>(p.t);
  const uint32_t b = t == 1 ? row : row / t, j = t == 1 ? 0 : row - b * t;
  const int d = kWhole ? kRowMaxChannels : static_cast<int>(p.d);
  const int nope = d - static_cast<int>(p.rotary);
  const int32_t start = __ldg(p.start + b);
  const int32_t count = p.slots > 0 ? __ldg(p.count + b) : 0;
  const uint16_t* const x = p.x + row * int64_t{d};
  Eight y[kRowChunks] = {}, weight[kRowChunks] = {};
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int channel = (lane + c * kRowLanes) * kChunkChannels;
    if (!kWhole && channel >= d) continue;
    y[c] = LoadEight<kAligned>(x + channel);
    weight[c] = LoadEight<kAligned>(p.weight + channel);
  }
  const float frequency = lane < p.rotary / 2 ? __ldg(p.frequencies + lane) : 0.0f;
  turns[warp][lane] = TurnAt(KeyPosition(start, j), frequency);

  const float squares = SumOfLanes(SumOfSquares(y[0]) + SumOfSquares(y[1]));
  const float scale = __frsqrt_rn(squares * p.reciprocal_d + p.eps);
  __syncwarp();
  Finished out;
  uint32_t largest[kRowChunks];
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    const int channel = (lane + c * kRowLanes) * kChunkChannels;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x2 = y[c].word[i], w2 = weight[c].word[i];
      y[c].word[i] = PackBf16(Low(w2) * (Low(x2) * scale), High(w2) * (High(x2) * scale));
    }
    largest[c] = LargestOfLanes(LargestBf16(y[c]), kBlockLanes);
    out.rope[c] = y[c];
    // Of a whole key the first half has no rotary channels.
    if ((!kWhole || c > 0) && channel >= nope && channel < d) {
      Rotate(out.rope[c], turns[warp] + (channel - nope) / 2);
    }
  }
#pragma unroll
  for (int c = 0; c < kRowChunks; ++c) {
    out.scale[c] = Fp8ScaleByte(largest[c] << 16);
    out.codes[c] = EncodeE4m3(y[c], InverseScale(out.scale[c]));
  }
  Store<kWhole>(p, out, p.rows, row, lane);
  if (p.slots == 0) return;
  const int64_t slot = RingSlot(start, count, j, p.t, p.slots);
  if (slot >= 0) Store<kWhole>(p, out, p.ring, b * p.slots + slot, lane);
}

}  // namespace

cudaError_t KeyFinishCuda(const KeyFinishParams& params, cudaStream_t stream) {
  const int64_t rows = params.b * params.t;
  if (rows == 0) return cudaSuccess;
  if (rows > INT32_MAX || params.slots > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight);
  if (addresses % 16 != 0) {  // a slice
    KeyFinishKernel<false, false><<<grid, kThreads, 0, stream>>>(params);
  } else if (params.d == kRowMaxChannels) {
    KeyFinishKernel<true, true><<<grid, kThreads, 0, stream>>>(params);
  } else {
    KeyFinishKernel<false, true><<<grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace dsv4
