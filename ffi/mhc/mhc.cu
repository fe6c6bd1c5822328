// What bounds it: a few tokens are latency: 1.6 or 2.8 MB of fn to be fetched and multiplied, two
// reductions over the token, 39 normalisations of comb in a row. So a cluster of thread blocks
// shares a token: each takes a slice of the channels, with fn in registers before the streams are
// there, and writes its sums into all the others, who wait for nothing else; the branch input goes
// to one of them, which norms and stores it, while a warp of its own is busy with comb. Some more
// tokens share a cluster, and its fn. Many tokens are memory, as long as
// fn costs little: two launches, of which the first writes the streams back and sums over tiles of
// 128 channels for 32 tokens, on tensor cores; the second takes a token a thread block.
//
// A lane has 4 neighbouring channels of a tile, a warp the tile; see mhc.h for the order of sums.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/barrier.cuh"
#include "common/bf16x2.cuh"
#include "common/bits.h"
#include "common/e2m1.h"
#include "common/e4m3.h"
#include "common/halved.cuh"
#include "common/mma.cuh"
#include "common/nvfp4.h"
#include "common/ue8m0.h"
#include "mhc/mhc.h"
#include "mhc/mhc_weights.h"

namespace dsv4 {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kStreams = kMhcStreams, kChannels = kMhcLaneChannels, kLanes = kMhcLanes;
constexpr int kWarpMixes = 3;                      // of a warp
constexpr int kMixWarps = kMhcMixes / kWarpMixes;  // for all of them
constexpr int kMaxTiles = static_cast<int>(kMhcMaxDim / kMhcTile);
constexpr int kMaxWorkers = 16;                // warps, beside the one for comb
constexpr int kSumChunks = kMhcSumStride / 4;  // of 16 bytes

__device__ __forceinline__ void Unpack(uint2 pairs, float (&x)[kChannels]) {
  x[0] = __uint_as_float(pairs.x << 16);
  x[1] = __uint_as_float(pairs.x & 0xFFFF0000u);
  x[2] = __uint_as_float(pairs.y << 16);
  x[3] = __uint_as_float(pairs.y & 0xFFFF0000u);
}
__device__ __forceinline__ uint2 Pack(const float (&x)[kChannels]) {
  return make_uint2(PackBf16(x[0], x[1]), PackBf16(x[2], x[3]));
}

__device__ __forceinline__ float HalvedLanes(float x) {
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, half));
  }
  return x;
}

__device__ __forceinline__ void Prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// Of some of a thread block's warps; number 0 is that of __syncthreads.
__device__ __forceinline__ void SyncWarps(int barrier, int warps) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(warps * kLanes) : "memory");
}
__device__ __forceinline__ void ArriveWarps(int barrier, int warps) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(warps * kLanes) : "memory");
}
constexpr int kWorkersBarrier = 1, kPreBarrier = 2;

// A token's streams at four channels, packed: what is stored of them, or what a write-back makes of
// it and stores. The thread that reads is the one that writes, so that it may be in place.
struct TokenStreams {
  uint2 s[kStreams], branch;
  float4 post, rows[kStreams];

  __device__ __forceinline__ void Load(const MhcParams& p, int64_t token, int64_t channel) {
    const int d = static_cast<int>(p.d);
    const uint16_t* const from = p.streams + token * kStreams * d + channel;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) s[j] = *reinterpret_cast<const uint2*>(from + j * d);
    if (p.branch == nullptr) return;
    branch = __ldg(reinterpret_cast<const uint2*>(p.branch + token * d + channel));
    post = __ldg(reinterpret_cast<const float4*>(p.post) + token);
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      rows[j] = __ldg(reinterpret_cast<const float4*>(p.comb) + token * kStreams + j);
    }
  }

  __device__ __forceinline__ void WriteBack(const MhcParams& p, int64_t token, int64_t channel) {
    if (p.branch == nullptr) return;
    float x[kStreams][kChannels], f[kChannels];
    Unpack(branch, f);
#pragma unroll
    for (int j = 0; j < kStreams; ++j) Unpack(s[j], x[j]);
    const float posts[kStreams] = {post.x, post.y, post.z, post.w};
    const int d = static_cast<int>(p.d);
    uint16_t* const to = p.new_streams + token * kStreams * d + channel;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      float sum[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] = __fmul_rn(posts[k], f[i]);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        const float comb[kStreams] = {rows[j].x, rows[j].y, rows[j].z, rows[j].w};
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sum[i] = __fmaf_rn(comb[k], x[j][i], sum[i]);
      }
      s[k] = Pack(sum);
      *reinterpret_cast<uint2*>(to + k * d) = s[k];
    }
  }
};

__device__ __forceinline__ void LoadStreams(const MhcParams& p, int64_t token, int64_t channel,
                                            uint2 (&s)[kStreams]) {
  TokenStreams streams;
  streams.Load(p, token, channel);
  streams.WriteBack(p, token, channel);
#pragma unroll
  for (int j = 0; j < kStreams; ++j) s[j] = streams.s[j];
}

// Sum of the squares of a tile's streams.
__device__ __forceinline__ float Squares(const uint2 (&s)[kStreams]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    float x[kChannels];
    Unpack(s[j], x);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum = __fmaf_rn(x[i], x[i], sum);
  }
  return HalvedLanes(sum);
}

// fn of a warp's mixes at a lane's channels; zeros where there are fewer mixes.
struct Weights {
  float4 of[kWarpMixes][kStreams];

  // fn has less than 2^31 elements.
  __device__ __forceinline__ static const float* At(const MhcParams& p, int first, int channel) {
    return p.fn + (first * kStreams * static_cast<int>(p.d) + channel);
  }

  __device__ __forceinline__ void Load(const MhcParams& p, int first, int channel) {
    const float* at = At(p, first, channel);
#pragma unroll
    for (int m = 0; m < kWarpMixes; ++m) {
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        of[m][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + m < p.mixes) of[m][j] = __ldg(reinterpret_cast<const float4*>(at));
        at += static_cast<int>(p.d);
      }
    }
  }

  // 128 bytes of each row, into the L2.
  __device__ __forceinline__ static void PrefetchLines(const MhcParams& p, int first, int channel) {
    const int rows = min(kWarpMixes, p.mixes - first) * kStreams;
    const float* at = At(p, first, channel);
    for (int row = 0; row < rows; ++row) {
      Prefetch(at);
      at += static_cast<int>(p.d);
    }
  }
};

// A lane's part of a tile's sums of a warp's mixes, of one token.
__device__ __forceinline__ void MixLane(const Weights& weights, const uint2* streams, int lane,
                                        float (&sums)[kWarpMixes]) {
#pragma unroll
  for (int m = 0; m < kWarpMixes; ++m) sums[m] = 0.0f;
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    float x[kChannels];
    Unpack(streams[j * kLanes + lane], x);
#pragma unroll
    for (int m = 0; m < kWarpMixes; ++m) {
      const float4 w = weights.of[m][j];
      sums[m] = __fmaf_rn(x[0], w.x, sums[m]);
      sums[m] = __fmaf_rn(x[1], w.y, sums[m]);
      sums[m] = __fmaf_rn(x[2], w.z, sums[m]);
      sums[m] = __fmaf_rn(x[3], w.w, sums[m]);
    }
  }
}

// The sums of `count` mixes for some tokens: streams [token][stream][lane] every `stream_stride`
// words, sums every `sum_stride`. Two tokens share what is left of the halving after its first
// step, each in half a warp.
__device__ __forceinline__ void Mix(const Weights& weights, const uint2* streams, int stream_stride,
                                    int tokens, int lane, int count, float* to,
                                    int64_t sum_stride) {
  const bool upper = lane >= kLanes / 2;
  int g = 0;
  for (; g + 1 < tokens; g += 2) {
    float first[kWarpMixes], second[kWarpMixes];
    MixLane(weights, streams + g * stream_stride, lane, first);
    MixLane(weights, streams + (g + 1) * stream_stride, lane, second);
#pragma unroll
    for (int m = 0; m < kWarpMixes; ++m) {
      const float theirs = upper ? first[m] : second[m];
      float sum = upper ? second[m] : first[m];
      sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, theirs, kLanes / 2));
#pragma unroll
      for (int half = kLanes / 4; half > 0; half /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, half));
      }
      if (lane % (kLanes / 2) == m && m < count) to[(g + upper) * sum_stride + m] = sum;
    }
  }
  if (g == tokens) return;
  float sums[kWarpMixes];
  MixLane(weights, streams + g * stream_stride, lane, sums);
#pragma unroll
  for (int m = 0; m < kWarpMixes; ++m) {
    sums[m] = HalvedLanes(sums[m]);
    if (lane == m && m < count) to[g * sum_stride + m] = sums[m];
  }
}

// A lane's mix, its scale and shift: asked for long before they are needed.
struct LaneMix {
  float scale = 0.0f, base = 0.0f;

  __device__ __forceinline__ LaneMix(const MhcParams& p, int lane) {
    if (lane < p.mixes) {
      scale = __ldg(p.scale + MhcScaleIndex(lane));
      base = __ldg(p.base + lane);
    }
  }

  // Of a token's tile sums: lane i < 4 has pre_i, the next post, the others logits of comb.
  __device__ __forceinline__ float Weight(const MhcParams& p, const float* sums, int tiles,
                                          int lane) const {
    const float* const of_lane = sums + (lane < p.mixes ? lane : kMhcSquares);
    float total = 0.0f;
    for (int first = 0; first < tiles; first += kMhcTileGroup) {
      total = __fadd_rn(total, Halved<kMhcTileGroup>([&](int i) {
                          return first + i < tiles ? of_lane[(first + i) * kMhcSumStride] : 0.0f;
                        }));
    }
    const float squares = __shfl_sync(kAllLanes, total, kMhcSquares);
    const float mean = __fmul_rn(squares, p.reciprocal_flat);
    const float norm = __frsqrt_rn(__fadd_rn(mean, p.rms_eps));
    return MhcWeight(lane, __fmul_rn(total, norm), scale, base, p.hc_eps);
  }
};

__device__ __forceinline__ void StorePost(const MhcParams& p, int64_t token, float weight,
                                          int lane) {
  if (lane >= kStreams && lane < 2 * kStreams) {
    p.next_post[token * kStreams + lane - kStreams] = weight;
  }
}

__device__ __forceinline__ void StoreComb(const MhcParams& p, int64_t token,
                                          float (&comb)[kStreams * kStreams]) {
  Sinkhorn(comb, p.iters, p.hc_eps);
  float4* const to = reinterpret_cast<float4*>(p.next_comb) + token * kStreams;
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    to[j] = make_float4(comb[4 * j], comb[4 * j + 1], comb[4 * j + 2], comb[4 * j + 3]);
  }
}

// By a whole warp.
__device__ __forceinline__ void StorePostAndComb(const MhcParams& p, int64_t token, float weight,
                                                 int lane) {
  StorePost(p, token, weight, lane);
  float comb[kStreams * kStreams];
#pragma unroll
  for (int i = 0; i < kStreams * kStreams; ++i) {
    comb[i] = __shfl_sync(kAllLanes, weight, 2 * kStreams + i);
  }
  if (lane == 0) StoreComb(p, token, comb);
}

__device__ __forceinline__ void StorePostAndLogits(const MhcParams& p, int64_t token, float weight,
                                                   int lane) {
  StorePost(p, token, weight, lane);
  if (lane >= 2 * kStreams && lane < kMhcMixes) {
    p.next_comb[token * kStreams * kStreams + lane - 2 * kStreams] = weight;
  }
}

__device__ __forceinline__ uint2 BranchInput(const uint2 (&s)[kStreams],
                                             const float (&pre)[kStreams]) {
  float sum[kChannels];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    float x[kChannels];
    Unpack(s[j], x);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      sum[i] = j == 0 ? __fmul_rn(pre[j], x[i]) : __fmaf_rn(pre[j], x[i], sum[i]);
    }
  }
  return Pack(sum);
}

__device__ __forceinline__ uint32_t Largest(const float (&x)[kChannels]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) bits = max(bits, __float_as_uint(x[i]) & 0x7FFFFFFFu);
  return bits;
}

__device__ __forceinline__ void StoreFp8(const MhcParams& p, int64_t token, int tile, int lane,
                                         const float (&x)[kChannels]) {
  const uint32_t byte = Fp8ScaleByte(__reduce_max_sync(kAllLanes, Largest(x)));
  const float inverse = InverseScale(byte);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) codes |= uint32_t{EncodeE4m3(x[i] * inverse)} << 8 * i;
  const int64_t at = token * (p.d / kMhcTile) + tile;
  reinterpret_cast<uint32_t*>(p.code8)[at * kLanes + lane] = codes;
  if (lane == 0) p.scale8[at] = static_cast<uint8_t>(byte);
}

// The code of x / step, by its reciprocal where that cannot matter: not near a tie, all of which
// are odd multiples of a quarter.
__device__ __forceinline__ uint32_t EncodeQuotient(float x, float step, float inverse) {
  float quotient = __fmul_rn(x, inverse);
  const float quarters = __fmul_rn(quotient, 4.0f);
  if (!(fabsf(quarters - rintf(quarters)) > 1e-4f)) quotient = __fdiv_rn(x, step);
  return EncodeE2m1(copysignf(quotient, x));
}

__device__ __forceinline__ void StoreNvfp4(const MhcParams& p, int64_t token, int tile, int lane,
                                           const float (&x)[kChannels], float global) {
  constexpr int kBlockLanes = kNvfp4Block / kChannels;
  uint32_t bits = Largest(x);
#pragma unroll
  for (int half = kBlockLanes / 2; half > 0; half /= 2) {
    bits = max(bits, __shfl_xor_sync(kAllLanes, bits, half));
  }
  const float six_global = __fmul_rn(kE2m1Max, global);
  const uint8_t scale = EncodeE4m3(UnroundedBlockScale(__uint_as_float(bits), six_global));
  const float step = __fmul_rn(DecodeE4m3(scale), global), inverse = __frcp_rn(step);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) codes |= EncodeQuotient(x[i], step, inverse) << 4 * i;
  const int64_t at = (token * (p.d / kMhcTile) + tile) * kLanes + lane;
  reinterpret_cast<uint16_t*>(p.code4)[at] = static_cast<uint16_t>(codes);
  if (lane % kBlockLanes == 0) p.block_scale[at / kBlockLanes] = scale;
}

struct FinishShared {
  float tile_squares[kMaxTiles];
  uint32_t warp_max[kMaxWorkers];
};

// Norm and forms of a token whose branch input is y [tiles][lane], in shared memory; by `workers`
// warps, of which each wrote the tiles that it takes here, or has waited for them.
__device__ __forceinline__ void Finish(const MhcParams& p, float static_scale, int64_t token,
                                       uint2* y, FinishShared& shared, int warp, int workers,
                                       int lane) {
  const int tiles = static_cast<int>(p.d / kMhcTile);
  for (int tile = warp; tile < tiles; tile += workers) {
    float x[kChannels], sum = 0.0f;
    Unpack(y[tile * kLanes + lane], x);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum = __fmaf_rn(x[i], x[i], sum);
    sum = HalvedLanes(sum);
    if (lane == 0) shared.tile_squares[tile] = sum;
  }
  const uint2* const weights = reinterpret_cast<const uint2*>(p.norm) + lane;
  uint2 next_weight = warp < tiles ? __ldg(weights + warp * kLanes) : make_uint2(0, 0);
  SyncWarps(kWorkersBarrier, workers);
  float squares = 0.0f;
  for (int first = 0; first < tiles; first += kMhcTileGroup) {
    const float sum = first + lane < tiles ? shared.tile_squares[first + lane] : 0.0f;
    squares = __fadd_rn(squares, HalvedLanes(sum));
  }
  const float mean = __fmul_rn(squares, p.reciprocal_d);
  const float norm = __frsqrt_rn(__fadd_rn(mean, p.rms_eps));
  uint32_t largest = 0;
  for (int tile = warp; tile < tiles; tile += workers) {
    float x[kChannels], weight[kChannels];
    Unpack(y[tile * kLanes + lane], x);
    Unpack(next_weight, weight);
    if (tile + workers < tiles) next_weight = __ldg(weights + (tile + workers) * kLanes);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = __fmul_rn(weight[i], __fmul_rn(x[i], norm));
    const uint2 pairs = Pack(x);
    if (p.x != nullptr) {
      reinterpret_cast<uint2*>(p.x)[(token * tiles + tile) * kLanes + lane] = pairs;
    }
    y[tile * kLanes + lane] = pairs;
    Unpack(pairs, x);
    largest = max(largest, Largest(x));
    if (p.code8 != nullptr) StoreFp8(p, token, tile, lane, x);
  }
  if (p.code4 == nullptr) return;
  float global = static_scale;
  if (p.global_scale == nullptr) {
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane == 0) shared.warp_max[warp] = largest;
    SyncWarps(kWorkersBarrier, workers);
    largest = __reduce_max_sync(kAllLanes, lane < workers ? shared.warp_max[lane] : 0u);
    global = TokenGlobalScale(__uint_as_float(largest));
  }
  if (warp == 0 && lane == 0) p.token_scale[token] = global;
  for (int tile = warp; tile < tiles; tile += workers) {
    float x[kChannels];
    Unpack(y[tile * kLanes + lane], x);
    StoreNvfp4(p, token, tile, lane, x, global);
  }
}

__device__ __forceinline__ float StaticScale(const MhcParams& p) {
  return p.global_scale == nullptr ? 0.0f : StaticGlobalScale(__ldg(p.global_scale));
}

// ---- Write-back alone: a warp a tile of a token.

constexpr int kWriteThreads = 256;

struct WriteParams {
  MhcParams p;
  uint32_t tiles;
};

__global__ void __launch_bounds__(kWriteThreads)
    WriteKernel(const __grid_constant__ WriteParams params) {
  const uint64_t item = (uint64_t{blockIdx.x} * kWriteThreads + threadIdx.x) / kLanes;
  const int64_t token = static_cast<int64_t>(item / params.tiles);
  if (token >= params.p.t) return;
  uint2 s[kStreams];
  LoadStreams(params.p, token, item % params.tiles * kMhcTile + threadIdx.x % kLanes * kChannels,
              s);
}

cudaError_t LaunchWrite(const MhcParams& p, cudaStream_t stream) {
  const WriteParams params{p, static_cast<uint32_t>(p.d / kMhcTile)};
  constexpr int64_t kWarps = kWriteThreads / kLanes;
  const int64_t blocks = (p.t * params.tiles + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  WriteKernel<<<static_cast<unsigned>(blocks), kWriteThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

// ---- Many tokens: sums of tiles, then a thread block a token.

constexpr int kSumsThreads = kMixWarps * kLanes;

struct SumsParams {
  MhcParams p;
  int tiles, per_group;  // tokens of a thread block, for one tile
};

__global__ void __launch_bounds__(kSumsThreads, 2)
    SumsKernel(const __grid_constant__ SumsParams params) {
  extern __shared__ uint2 streams[];  // [token][stream][lane]
  LetNextBegin();
  const MhcParams& p = params.p;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int tile = static_cast<int>(blockIdx.x % params.tiles);
  const int64_t first = int64_t{blockIdx.x / params.tiles} * params.per_group;
  const int count = static_cast<int>(min(int64_t{params.per_group}, p.t - first));
  const int channel = tile * kMhcTile + lane * kChannels;
  Weights weights;
  weights.Load(p, warp * kWarpMixes, channel);
  float* const sums = p.scratch + (first * params.tiles + tile) * kMhcSumStride;
  const int64_t stride = int64_t{params.tiles} * kMhcSumStride;
  for (int g = warp; g < count; g += kMixWarps) {
    uint2 s[kStreams];
    LoadStreams(p, first + g, channel, s);
#pragma unroll
    for (int j = 0; j < kStreams; ++j) streams[(g * kStreams + j) * kLanes + lane] = s[j];
    const float squares = Squares(s);
    if (lane == 0) sums[g * stride + kMhcSquares] = squares;
  }
  __syncthreads();
  const int mixes = p.mixes - warp * kWarpMixes;
  if (mixes <= 0) return;
  Mix(weights, streams, kStreams * kLanes, count, lane, mixes, sums + warp * kWarpMixes, stride);
}

// ---- The same sums on tensor cores. fn is the sum of three BF16 numbers, so that every product is
// exact; a warp takes 64 channels of a stream for all tokens.

constexpr int kMmaTokens = 32;
constexpr int kMmaRowTiles = kMmaTokens / 16, kMmaColumnTiles = kMhcMixes / 8;
constexpr int kMmaSteps = kMhcTile / 2 / 16;
// The same channels of eight tokens lie in banks of their own.
constexpr int kMmaTokenWords = kStreams * kLanes + 4;
constexpr int kMmaBytes = kMmaTokens * kMmaTokenWords * static_cast<int>(sizeof(uint2));
static_assert(kMixWarps * kMmaTokens * kMhcMixes * sizeof(float) <= kMmaBytes);
static_assert(kMixWarps == 2 * kStreams);

// x = part[0] + part[1] + part[2].
__device__ __forceinline__ void Split(float4 x, uint32_t (&part)[3][2]) {
  float rest[kChannels] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const uint2 pairs = Pack(rest);
    part[i][0] = pairs.x;
    part[i][1] = pairs.y;
    float rounded[kChannels];
    Unpack(pairs, rounded);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) rest[k] = __fadd_rn(rest[k], -rounded[k]);
  }
}

__global__ void __launch_bounds__(kSumsThreads, 2)
    MmaSumsKernel(const __grid_constant__ SumsParams params) {
  extern __shared__ uint2 streams[];  // [token][stream][lane], a token every kMmaTokenWords
  LetNextBegin();
  const MhcParams& p = params.p;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int group = lane / 4, column = lane % 4;
  const int tile = static_cast<int>(blockIdx.x % params.tiles);
  const int64_t first = int64_t{blockIdx.x / params.tiles} * kMmaTokens;
  const int count = static_cast<int>(min(int64_t{kMmaTokens}, p.t - first));
  const int64_t channel = int64_t{tile} * kMhcTile + lane * kChannels;
  float* const sums = p.scratch + (first * params.tiles + tile) * kMhcSumStride;
  const int64_t stride = int64_t{params.tiles} * kMhcSumStride;
  // fn is needed later on, for the first time by whoever is first.
  constexpr int kLines = kMhcTile * sizeof(float) / 128;
  for (int i = threadIdx.x; i < p.mixes * kStreams * kLines; i += kSumsThreads) {
    Prefetch(p.fn + (i / kLines * static_cast<int>(p.d) + tile * kMhcTile + i % kLines * 32));
  }
  constexpr int kAtOnce = 2;
  for (int g = warp; g < count; g += kAtOnce * kMixWarps) {
    TokenStreams tokens[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      // A token that is not there is the last one once more, which nobody sees.
      tokens[i].Load(p, first + min(g + i * kMixWarps, count - 1), channel);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = g + i * kMixWarps;
      if (token >= count) break;
      tokens[i].WriteBack(p, first + token, channel);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        streams[token * kMmaTokenWords + j * kLanes + lane] = tokens[i].s[j];
      }
      const float squares = Squares(tokens[i].s);
      if (lane == 0) sums[token * stride + kMhcSquares] = squares;
    }
  }
  __syncthreads();

  const int stream = warp / 2, half = warp % 2;
  float acc[kMmaRowTiles][kMmaColumnTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kMmaSteps; ++step) {
    const int chunk = half * (kLanes / 2) + step * 4 + column;  // of four channels
    uint32_t a[kMmaRowTiles][4];
#pragma unroll
    for (int m = 0; m < kMmaRowTiles; ++m) {
      const uint2* const row =
          streams + (16 * m + group) * kMmaTokenWords + stream * kLanes + chunk;
      const uint2 upper = row[0], lower = row[8 * kMmaTokenWords];
      a[m][0] = upper.x;
      a[m][1] = lower.x;
      a[m][2] = upper.y;
      a[m][3] = lower.y;
    }
#pragma unroll
    for (int n = 0; n < kMmaColumnTiles; ++n) {
      const int mix = 8 * n + group;
      float4 fn = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (mix < p.mixes) {
        fn = __ldg(reinterpret_cast<const float4*>(p.fn + (int64_t{mix} * kStreams + stream) * p.d +
                                                   int64_t{tile} * kMhcTile + chunk * kChannels));
      }
      uint32_t part[3][2];
      Split(fn, part);
#pragma unroll
      for (int i = 2; i >= 0; --i) {
#pragma unroll
        for (int m = 0; m < kMmaRowTiles; ++m) MmaBf16(acc[m][n], a[m], part[i]);
      }
    }
  }
  __syncthreads();                                         // the streams were read
  float* const parts = reinterpret_cast<float*>(streams);  // [warp][token][mix]
#pragma unroll
  for (int m = 0; m < kMmaRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kMmaColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 16 * m + group + i / 2 * 8;
        parts[(warp * kMmaTokens + token) * kMhcMixes + 8 * n + 2 * column + i % 2] = acc[m][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * kMhcMixes; i += kSumsThreads) {
    const int token = i / kMhcMixes, mix = i % kMhcMixes;
    if (mix >= p.mixes) continue;
    float sum = parts[i];
#pragma unroll
    for (int w = 1; w < kMixWarps; ++w) {
      sum = __fadd_rn(sum, parts[w * kMmaTokens * kMhcMixes + i]);
    }
    sums[token * stride + mix] = sum;
  }
}

constexpr int kFinishThreads = (kMaxWorkers + 1) * kLanes;

struct FinishParams {
  MhcParams p;
  int tiles, workers;
  bool logits;  // instead of comb, for CombKernel
};

__global__ void __launch_bounds__(kFinishThreads, 2)
    FinishKernel(const __grid_constant__ FinishParams params) {
  extern __shared__ uint2 y[];  // [tile][lane]
  __shared__ FinishShared shared;
  __shared__ float pre_of[kStreams];
  const MhcParams& p = params.p;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int tiles = params.tiles, workers = params.workers;
  // Backwards: the last tokens' streams are still in the L2.
  const int64_t token = p.t - 1 - static_cast<int64_t>(blockIdx.x);
  const float static_scale = StaticScale(p);
  const LaneMix mix(p, lane);
  if (lane < 2) {
    for (int tile = warp; tile < tiles; tile += workers + 1) {
      Prefetch(p.norm + tile * kMhcTile + lane * (kMhcTile / 2));
    }
  }
  LetNextBegin();
  WaitForPrevious();
  if (warp == workers) {
    const float* const sums = p.scratch + token * tiles * kMhcSumStride;
    const float weight = mix.Weight(p, sums, tiles, lane);
    if (lane < kStreams) pre_of[lane] = weight;
    ArriveWarps(kPreBarrier, workers + 1);
    if (p.mixes == kMhcMixes) {
      if (params.logits) {
        StorePostAndLogits(p, token, weight, lane);
      } else {
        StorePostAndComb(p, token, weight, lane);
      }
    }
    return;
  }
  const uint16_t* const streams = p.branch == nullptr ? p.streams : p.new_streams;
  const uint2* const from = reinterpret_cast<const uint2*>(streams + token * kStreams * p.d) + lane;
  const int64_t stride = p.d / kChannels;
  uint2 s[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) s[j] = from[j * stride + warp * kLanes];
  SyncWarps(kPreBarrier, workers + 1);
  const float pre[kStreams] = {pre_of[0], pre_of[1], pre_of[2], pre_of[3]};
  for (int tile = warp; tile < tiles; tile += workers) {
    y[tile * kLanes + lane] = BranchInput(s, pre);
    if (tile + workers >= tiles) break;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) s[j] = from[j * stride + (tile + workers) * kLanes];
  }
  Finish(p, static_scale, token, y, shared, warp, workers, lane);
}

// comb in place of its logits, a thread a token.
constexpr int kCombThreads = 64;

struct CombParams {
  MhcParams p;
};

__global__ void __launch_bounds__(kCombThreads)
    CombKernel(const __grid_constant__ CombParams params) {
  const MhcParams& p = params.p;
  WaitForPrevious();
  const int64_t token = int64_t{blockIdx.x} * kCombThreads + threadIdx.x;
  if (token >= p.t) return;
  const float4* const from = reinterpret_cast<const float4*>(p.next_comb) + token * kStreams;
  float comb[kStreams * kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    const float4 row = from[j];
    comb[4 * j] = row.x;
    comb[4 * j + 1] = row.y;
    comb[4 * j + 2] = row.z;
    comb[4 * j + 3] = row.w;
  }
  StoreComb(p, token, comb);
}

constexpr int kSumsTokens = 32;       // of a thread block
constexpr int64_t kManyCombs = 1024;  // so many tokens are worth a launch for their combs

struct TwoLaunches {
  bool mma;
  int per_group = kSumsTokens;  // without
  int64_t many_combs = kManyCombs;
  int64_t chunk = INT32_MAX;  // tokens, one chunk after the other: their streams stay in the L2
};

// Tokens first .. first + count - 1.
MhcParams SliceOf(const MhcParams& p, int64_t first, int64_t count) {
  MhcParams slice = p;
  const auto move = [first](auto& pointer, int64_t per_token) {
    if (pointer != nullptr) pointer += first * per_token;
  };
  const int64_t d = p.d;
  move(slice.streams, kStreams * d);
  move(slice.branch, d);
  move(slice.post, kStreams);
  move(slice.comb, kStreams * kStreams);
  move(slice.new_streams, kStreams * d);
  move(slice.next_post, kStreams);
  move(slice.next_comb, kStreams * kStreams);
  move(slice.x, d);
  move(slice.code4, d / 2);
  move(slice.block_scale, d / kNvfp4Block);
  move(slice.token_scale, 1);
  move(slice.code8, d);
  move(slice.scale8, d / kMhcTile);
  slice.t = count;
  return slice;
}

cudaError_t LaunchChunk(const MhcParams& p, cudaStream_t stream, const TwoLaunches& how) {
  const int tiles = static_cast<int>(p.d / kMhcTile);
  const int per_group = how.mma ? kMmaTokens : how.per_group;
  const int64_t blocks = (p.t + per_group - 1) / per_group * tiles;
  if (blocks > INT32_MAX || p.t > INT32_MAX) return cudaErrorInvalidConfiguration;
  const SumsParams sums{p, tiles, per_group};
  if (how.mma) {
    MmaSumsKernel<<<static_cast<unsigned>(blocks), kSumsThreads, kMmaBytes, stream>>>(sums);
  } else {
    const int bytes = per_group * kStreams * kLanes * static_cast<int>(sizeof(uint2));
    SumsKernel<<<static_cast<unsigned>(blocks), kSumsThreads, bytes, stream>>>(sums);
  }
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const bool logits = p.mixes == kMhcMixes && p.t >= how.many_combs;
  const FinishParams finish{p, tiles, std::min(kMaxWorkers, (tiles + 1) / 2), logits};
  error =
      LaunchDependent(FinishKernel, dim3(static_cast<unsigned>(p.t)), (finish.workers + 1) * kLanes,
                      tiles * kLanes * static_cast<int>(sizeof(uint2)), stream, finish);
  if (error != cudaSuccess || !logits) return error;
  const auto combs = static_cast<unsigned>((p.t + kCombThreads - 1) / kCombThreads);
  return LaunchDependent(CombKernel, dim3(combs), kCombThreads, 0, stream, CombParams{p});
}

cudaError_t LaunchTwo(const MhcParams& p, cudaStream_t stream, const TwoLaunches& how) {
  for (int64_t first = 0; first < p.t; first += how.chunk) {
    const MhcParams slice = SliceOf(p, first, std::min(how.chunk, p.t - first));
    const cudaError_t error = LaunchChunk(slice, stream, how);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// ---- Few tokens: a cluster for each, or for some.

constexpr int kClusterThreads = kMaxWorkers * kLanes;
constexpr int kTilesAtOnce = kMaxWorkers / kMixWarps;
constexpr int kMostClusterBytes = 200 << 10;

// Rank r has the tiles r, r + cluster, ...; `local` at most. It finishes the tokens r, r + cluster,
// ... of its group, and does the combs of those half a cluster further on.
struct ClusterParams {
  MhcParams p;
  int tiles, cluster, per_group, local;
  int shift;  // cluster = 1 << shift: divisions are long before the first load

  __host__ __device__ int Slots() const { return (per_group + cluster - 1) / cluster; }
  int Bytes() const {
    const int tokens = per_group;
    return tokens * local * kStreams * kLanes * 8 + tokens * tiles * kMhcSumStride * 4 +
           tokens * local * kMhcSumStride * 4 + Slots() * tiles * kLanes * 8;
  }
};

__global__ void __launch_bounds__(kClusterThreads, 1)
    ClusterKernel(const __grid_constant__ ClusterParams params) {
  extern __shared__ __align__(16) uint2 dynamic[];
  __shared__ FinishShared shared;
  __shared__ __align__(8) uint64_t barriers[2];
  const MhcParams& p = params.p;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int tiles = params.tiles, cluster = params.cluster, local = params.local;
  const int shift = params.shift, rank = static_cast<int>(blockIdx.x) & (cluster - 1);
  const int64_t first = int64_t{blockIdx.x >> shift} * params.per_group;
  const int count = static_cast<int>(min(int64_t{params.per_group}, p.t - first));
  const int mine = (tiles - rank + cluster - 1) >> shift;   // tiles
  const int owned = (count - rank + cluster - 1) >> shift;  // tokens
  uint2* const streams = dynamic;                           // [token][own tile][stream][lane]
  float* const sums =  // [token][tile][sum], of the whole cluster
      reinterpret_cast<float*>(streams + params.per_group * local * kStreams * kLanes);
  float* const own_sums = sums + params.per_group * tiles * kMhcSumStride;  // [token][own tile]
  uint2* const y =                                                          // [slot][tile][lane]
      reinterpret_cast<uint2*>(own_sums + params.per_group * local * kMhcSumStride);
  const uint32_t sums_barrier = SharedAddress(&barriers[0]);
  const uint32_t y_barrier = SharedAddress(&barriers[1]);
  if (threadIdx.x == 0) {
    InitBarrier(sums_barrier, 1);
    InitBarrier(y_barrier, 1);
    FenceBarrierInit();
    ArriveExpecting(sums_barrier, count * tiles * kMhcSumStride * sizeof(float));
    ArriveExpecting(y_barrier, owned * tiles * kLanes * sizeof(uint2));
  }
  __syncwarp();
  ArriveAtCluster();
  const float static_scale = StaticScale(p);
  const LaneMix mix(p, lane);

  if (owned > 0 && warp == kMaxWorkers - 1) {
    for (int64_t at = lane * 64; at < p.d; at += kLanes * 64) Prefetch(p.norm + at);
  }
  const int mixes_from = warp % kMixWarps * kWarpMixes, mixes = p.mixes - mixes_from;
  const int tile_from = warp / kMixWarps;
  const auto channel_of = [&](int own) {
    return (rank + (own << shift)) * kMhcTile + lane * kChannels;
  };
  const auto token_of = [&](int item) { return count == 1 ? 0 : item / mine; };
  // Streams first, everybody's fn would be ahead of them otherwise; fn is there when they are
  // mixed.
  const int items = count * mine;
  TokenStreams token;
  if (warp < items) token.Load(p, first + token_of(warp), channel_of(warp - token_of(warp) * mine));
  Weights weights;
  if (tile_from < mine) weights.Load(p, mixes_from, channel_of(tile_from));
  for (int own = tile_from + kTilesAtOnce; own < mine; own += kTilesAtOnce) {
    if (lane % 8 == 0) Weights::PrefetchLines(p, mixes_from, channel_of(own));
  }
  for (int item = warp; item < items; item += kMaxWorkers) {
    const int g = token_of(item), own = item - g * mine;
    if (item != warp) token.Load(p, first + g, channel_of(own));
    token.WriteBack(p, first + g, channel_of(own));
    uint2* const to = streams + (g * local + own) * kStreams * kLanes + lane;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) to[j * kLanes] = token.s[j];
    const float squares = Squares(token.s);
    if (lane == 0) own_sums[(g * local + own) * kMhcSumStride + kMhcSquares] = squares;
  }
  SyncWarps(kWorkersBarrier, kMaxWorkers);
  for (int own = tile_from; own < mine; own += kTilesAtOnce) {
    if (own != tile_from) weights.Load(p, mixes_from, channel_of(own));
    if (mixes > 0) {
      Mix(weights, streams + own * kStreams * kLanes, local * kStreams * kLanes, count, lane, mixes,
          own_sums + own * kMhcSumStride + mixes_from, local * kMhcSumStride);
    }
  }
  SyncWarps(kWorkersBarrier, kMaxWorkers);
  WaitForCluster();
  for (int i = threadIdx.x; i < items * kSumChunks * cluster; i += kMaxWorkers * kLanes) {
    const int to = i & (cluster - 1), chunk = (i >> shift) % kSumChunks;
    const int item = (i >> shift) / kSumChunks, g = token_of(item), own = item - g * mine;
    const uint4 words =
        reinterpret_cast<const uint4*>(own_sums + (g * local + own) * kMhcSumStride)[chunk];
    const int tile = rank + own * cluster;
    StoreIn(sums + (g * tiles + tile) * kMhcSumStride + 4 * chunk, sums_barrier, to, words);
  }
  Wait(sums_barrier, 0);
  float weight = 0.0f;
  for (int item = warp, of = -1; item < items; item += kMaxWorkers) {
    const int g = token_of(item), own = item - g * mine;
    if (g != of) weight = mix.Weight(p, sums + g * tiles * kMhcSumStride, tiles, lane);
    of = g;
    float pre[kStreams];
    uint2 s[kStreams];
    const uint2* const from = streams + (g * local + own) * kStreams * kLanes + lane;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      pre[j] = __shfl_sync(kAllLanes, weight, j);
      s[j] = from[j * kLanes];
    }
    const int tile = rank + own * cluster;
    StoreIn(y + ((g >> shift) * tiles + tile) * kLanes + lane, y_barrier, g & (cluster - 1),
            BranchInput(s, pre));
  }
  // Combs are the last warp's, in the middle between those who finish, if there is room.
  const int first_comb = p.mixes == kMhcMixes ? (rank + cluster / 2) & (cluster - 1) : count;
  const int finishers = first_comb < count ? kMaxWorkers - 1 : kMaxWorkers;
  if (warp == finishers) {
    for (int g = first_comb; g < count; g += cluster) {
      weight = mix.Weight(p, sums + g * tiles * kMhcSumStride, tiles, lane);
      StorePostAndComb(p, first + g, weight, lane);
    }
    return;
  }
  if (owned == 0) return;
  Wait(y_barrier, 0);
  for (int slot = 0; slot < owned; ++slot) {
    if (slot > 0) SyncWarps(kWorkersBarrier, finishers);
    Finish(p, static_scale, first + rank + slot * cluster, y + slot * tiles * kLanes, shared, warp,
           finishers, lane);
  }
}

// `cluster`: a power of two.
ClusterParams ClusterOfTokens(const MhcParams& p, int cluster, int per_group) {
  ClusterParams params{p, static_cast<int>(p.d / kMhcTile), cluster, per_group, 0, 0};
  while (params.cluster > params.tiles) params.cluster /= 2;
  while (1 << params.shift < params.cluster) ++params.shift;
  params.local = (params.tiles + params.cluster - 1) / params.cluster;
  return params;
}

cudaError_t LaunchCluster(const ClusterParams& params, cudaStream_t stream) {
  const int bytes = params.Bytes();
  cudaError_t error =
      cudaFuncSetAttribute(ClusterKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  if (params.cluster > 8) {
    error = cudaFuncSetAttribute(ClusterKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  const int64_t groups = (params.p.t + params.per_group - 1) / params.per_group;
  cudaLaunchAttribute attribute = ClusterOf(params.cluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(groups * params.cluster));
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, ClusterKernel, params);
}

// As many thread blocks as an H200 has SMs, about.
constexpr int kLargeCluster = 16, kLargeClusterTokens = 8;
constexpr int kCluster = 8, kClusters = 16, kClusterTokens = 128;

}  // namespace

cudaError_t MhcCuda(const MhcParams& p, cudaStream_t stream) {
  if (p.t == 0) return cudaSuccess;
  if (p.fn == nullptr) return LaunchWrite(p, stream);
  const bool few = p.t <= kClusterTokens;
  if (p.regime == Regime::kPrefill || (p.regime == Regime::kAuto && !few)) {
    return LaunchTwo(p, stream, {true});
  }
  const bool large = p.t <= kLargeClusterTokens && p.d >= kLargeCluster * kMhcTile;
  const int per_group = static_cast<int>((p.t + kClusters - 1) / kClusters);
  if (few) {
    const ClusterParams params = ClusterOfTokens(p, large ? kLargeCluster : kCluster, per_group);
    if (params.Bytes() <= kMostClusterBytes) return LaunchCluster(params, stream);
  }
  return LaunchTwo(p, stream, {false});
}

}  // namespace dsv4
