// Two launches: the first writes the streams back and sums tiles of 128 channels for some tokens,
// so that fn is read once for them; the second takes a token a thread block, its streams out of the
// L2 if the tokens are few. Up to 8 tokens of Flash's width are one launch of clusters.
//
// What bounds it: a few tokens are latency, as many loads at once as there can be, two reductions
// over the token, 40 normalisations of comb in a row, by a warp of their own beside all else. Many
// tokens are memory, as long as instructions are few: so fn is multiplied on tensor cores.
//
// In the first launch a lane has 4 neighbouring channels of a tile, a warp the tile; see mhc.h for
// the order of sums. In the second a lane has 16 neighbouring channels.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/barrier.cuh"
#include "common/bf16x2.cuh"
#include "common/bits.h"
#include "common/e4m3.cuh"
#include "common/halved.cuh"
#include "common/mma.cuh"
#include "common/nvfp4.cuh"
#include "common/rmsnorm.cuh"
#include "common/ue8m0.h"
#include "common/vector_store.cuh"
#include "mhc/mhc.h"
#include "mhc/mhc_weights.h"

namespace dsv4 {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kStreams = kMhcStreams, kChannels = kMhcLaneChannels, kLanes = kMhcLanes;
constexpr int kWarpMixes = 3;                      // of a warp
constexpr int kMixWarps = kMhcMixes / kWarpMixes;  // for all of them

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

// The number of this warp, known to the compiler to be the same in all of its lanes.
__device__ __forceinline__ int UniformWarp() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kLanes, 0);
}

// Of some of a thread block's warps; number 0 is that of __syncthreads. A warp counts as a whole,
// so its lanes meet first: one that still writes would be counted too.
__device__ __forceinline__ void SyncWarps(int barrier, int warps) {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(warps * kLanes) : "memory");
}
constexpr int kWorkersBarrier = 1;

// What a token's write-back is weighted by: post, and the rows of comb.
struct BackWeights {
  float4 post, rows[kStreams];

  __device__ __forceinline__ void Load(const MhcParams& p, int64_t token) {
    post = __ldg(reinterpret_cast<const float4*>(p.post) + token);
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      rows[j] = __ldg(reinterpret_cast<const float4*>(p.comb) + token * kStreams + j);
    }
  }
};

// A token's streams at four channels, packed: what is stored of them, or what a write-back makes of
// it and stores. The thread that reads is the one that writes, so that it may be in place. The
// token is number `index` from `first` on: offsets from there are 32-bit numbers.
struct TokenStreams {
  uint2 s[kStreams], branch;

  __device__ __forceinline__ void Load(const MhcParams& p, int64_t first, int index, int channel) {
    const int d = static_cast<int>(p.d), at = index * d;
    const uint16_t* const from = p.streams + first * kStreams * p.d;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      s[j] = *reinterpret_cast<const uint2*>(from + (at * kStreams + j * d + channel));
    }
    if (p.branch == nullptr) return;
    branch = __ldg(reinterpret_cast<const uint2*>(p.branch + first * p.d + (at + channel)));
  }

  __device__ __forceinline__ void WriteBack(const MhcParams& p, const BackWeights& weights,
                                            int64_t first, int index, int channel) {
    float x[kStreams][kChannels], f[kChannels];
    Unpack(branch, f);
#pragma unroll
    for (int j = 0; j < kStreams; ++j) Unpack(s[j], x[j]);
    const float4 post = weights.post;
    const float posts[kStreams] = {post.x, post.y, post.z, post.w};
    const int d = static_cast<int>(p.d), at = index * d * kStreams + channel;
    uint16_t* const to = p.new_streams + first * kStreams * p.d;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      float sum[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] = __fmul_rn(posts[k], f[i]);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        const float4 row = weights.rows[j];
        const float comb[kStreams] = {row.x, row.y, row.z, row.w};
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sum[i] = __fmaf_rn(comb[k], x[j][i], sum[i]);
      }
      s[k] = Pack(sum);
      *reinterpret_cast<uint2*>(to + (at + k * d)) = s[k];
    }
  }
};

__device__ __forceinline__ TokenStreams WrittenStreams(const MhcParams& p, int64_t first, int index,
                                                       int channel) {
  TokenStreams streams;
  streams.Load(p, first, index, channel);
  if (p.branch != nullptr) {
    BackWeights weights;
    weights.Load(p, first + index);
    streams.WriteBack(p, weights, first, index, channel);
  }
  return streams;
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
};

// A lane's part of a tile's sums of a warp's mixes, of one token, and behind them maybe of the
// squares.
template <bool kSquares = false>
__device__ __forceinline__ void MixLane(const Weights& weights, const uint2* streams, int lane,
                                        float* sums) {
#pragma unroll
  for (int m = 0; m < kWarpMixes + kSquares; ++m) sums[m] = 0.0f;
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
    if constexpr (kSquares) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        sums[kWarpMixes] = __fmaf_rn(x[i], x[i], sums[kWarpMixes]);
      }
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

// A lane's sum of a group of tiles.
__device__ __forceinline__ float GroupSum(const MhcParams& p, const float* sums, int tiles,
                                          int group, int lane) {
  const float* const of_lane = sums + (lane < p.mixes ? lane : kMhcSquares);
  const int first = group * kMhcTileGroup;
  return Halved<kMhcTileGroup>(
      [&](int i) { return first + i < tiles ? of_lane[(first + i) * kMhcSumStride] : 0.0f; });
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

  // Lane i < 4 has pre_i, the next post, the others logits of comb; of the sums of all tiles, of
  // which the lane has its own.
  __device__ __forceinline__ float Weight(const MhcParams& p, float total, int lane) const {
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
  Balance(comb, p.iters, p.hc_eps);
  float4* const to = reinterpret_cast<float4*>(p.next_comb) + token * kStreams;
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    to[j] = make_float4(comb[4 * j], comb[4 * j + 1], comb[4 * j + 2], comb[4 * j + 3]);
  }
}

// e to the lane's logit of comb, less the largest of its row, which is in the lanes around.
__device__ __forceinline__ float Exponential(float logit) {
  float top = logit;
#pragma unroll
  for (int half = 1; half < kStreams; half *= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, half));
  }
  return Exp(logit - top);
}

// The next write-back's weights, of what LaneMix has made.
__device__ __forceinline__ void FinishMixes(const MhcParams& p, int64_t token, float weight,
                                            int lane) {
  StorePost(p, token, weight, lane);
  const float exponential = Exponential(weight);
  float comb[kStreams * kStreams];
#pragma unroll
  for (int i = 0; i < kStreams * kStreams; ++i) {
    comb[i] = __shfl_sync(kAllLanes, exponential, 2 * kStreams + i);
  }
  if (lane == 0) StoreComb(p, token, comb);
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
  const auto tile = static_cast<int>(item % params.tiles);
  WrittenStreams(params.p, token, 0, tile * kMhcTile + threadIdx.x % kLanes * kChannels);
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
constexpr int kMaxSumsTokens = 32;  // of a thread block

struct SumsParams {
  MhcParams p;
  int tiles, per_group;  // tokens of a thread block, for one tile
  bool weights_first;    // fn may be read before what the kernel ahead writes
};

__global__ void __launch_bounds__(kSumsThreads, 2)
    SumsKernel(const __grid_constant__ SumsParams params) {
  extern __shared__ uint2 streams[];  // [token][stream][lane]
  const MhcParams& p = params.p;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int tile = static_cast<int>(blockIdx.x % params.tiles);
  const int first_token = static_cast<int>(blockIdx.x / params.tiles) * params.per_group;
  const int count = min(params.per_group, static_cast<int>(p.t) - first_token);
  const int64_t first = first_token;
  const int channel = tile * kMhcTile + lane * kChannels;
  if (!params.weights_first) WaitForPrevious();
  Weights weights;
  weights.Load(p, warp * kWarpMixes, channel);
  WaitForPrevious();
  LetNextBegin();
  float* const sums = p.scratch + (first * params.tiles + tile) * kMhcSumStride;
  const int64_t stride = int64_t{params.tiles} * kMhcSumStride;
  for (int g = warp; g < count; g += kMixWarps) {
    const TokenStreams token = WrittenStreams(p, first, g, channel);
#pragma unroll
    for (int j = 0; j < kStreams; ++j) streams[(g * kStreams + j) * kLanes + lane] = token.s[j];
    const float squares = Squares(token.s);
    if (lane == 0) sums[g * stride + kMhcSquares] = squares;
  }
  __syncthreads();
  const int mixes = p.mixes - warp * kWarpMixes;
  if (mixes <= 0) return;
  Mix(weights, streams, kStreams * kLanes, count, lane, mixes, sums + warp * kWarpMixes, stride);
}

// ---- The same sums on tensor cores. fn is the sum of three BF16 numbers, so that every product is
// exact; a warp takes 64 channels of a stream for all tokens.

constexpr int kMmaColumnTiles = kMhcMixes / 8;
constexpr int kMmaSteps = kMhcTile / 2 / 16;
// Two tokens, 8 apart, lie as the rows of a product take them; four more: what two pairs of tokens
// have of the same channels lies in banks of its own.
constexpr int kMmaPairWords = kStreams * kLanes + 4;
static_assert(kMixWarps == 2 * kStreams);

template <int kTokens>
struct MmaShared {
  union {
    uint4 streams[kTokens / 2][kMmaPairWords];  // [stream][lane]
    float parts[kMixWarps][kTokens][kMhcMixes];
  };
  BackWeights weights[kTokens];
};

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

// All of a thread's loads are asked for at once.
template <int kTokens>
__global__ void __launch_bounds__(kSumsThreads, 2)
    MmaSumsKernel(const __grid_constant__ SumsParams params) {
  constexpr int kRowTiles = kTokens / 16;
  constexpr int kWarpTokens = kTokens / kMixWarps;
  extern __shared__ __align__(16) uint8_t dynamic[];
  auto& shared = *reinterpret_cast<MmaShared<kTokens>*>(dynamic);
  WaitForPrevious();
  LetNextBegin();
  const MhcParams& p = params.p;
  const int warp = UniformWarp(), lane = threadIdx.x % kLanes;
  const int group = lane / 4, column = lane % 4;
  const int tile = static_cast<int>(blockIdx.x % params.tiles);
  const int first_token = static_cast<int>(blockIdx.x / params.tiles) * kTokens;
  const int count = min(kTokens, static_cast<int>(p.t) - first_token);
  const int64_t first = first_token;
  const int channel = tile * kMhcTile + lane * kChannels;
  float* const sums = p.scratch + (first * params.tiles + tile) * kMhcSumStride;
  const int stride = params.tiles * kMhcSumStride;
  // A warp's tokens are warp, warp + 8, ...
  TokenStreams tokens[kWarpTokens] = {};
#pragma unroll
  for (int i = 0; i < kWarpTokens; ++i) {
    const int token = warp + i * kMixWarps;
    if (token < count) tokens[i].Load(p, first, token, channel);
  }
  const int stream = warp / 2, half = warp % 2;
  const float* const fn = p.fn + (int64_t{group} * kStreams + stream) * p.d +
                          (tile * kMhcTile + half * (kMhcTile / 2) + column * kChannels);
  const int64_t column_tile = int64_t{8} * kStreams * p.d;
  float4 of_fn[kMmaSteps][kMmaColumnTiles];
#pragma unroll
  for (int step = 0; step < kMmaSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kMmaColumnTiles; ++n) {
      of_fn[step][n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (8 * n + group >= p.mixes) continue;
      of_fn[step][n] = __ldg(reinterpret_cast<const float4*>(fn + n * column_tile) + step * 4);
    }
  }
  if (p.branch != nullptr) {
    if (threadIdx.x < count) shared.weights[threadIdx.x].Load(p, first + threadIdx.x);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kWarpTokens; ++i) {
    TokenStreams& streams = tokens[i];
    const int token = warp + i * kMixWarps;
    if (token < count) {
      if (p.branch != nullptr) {
        streams.WriteBack(p, shared.weights[token], first, token, channel);
      }
      const float squares = Squares(streams.s);
      if (lane == 0) sums[token * stride + kMhcSquares] = squares;
    }
    if (i % 2 == 0) continue;
    uint4* const to = shared.streams[i / 2 * 8 + warp] + lane;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      const uint2 upper = tokens[i - 1].s[j], lower = streams.s[j];
      to[j * kLanes] = make_uint4(upper.x, lower.x, upper.y, lower.y);
    }
  }
  __syncthreads();

  float acc[kRowTiles][kMmaColumnTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kMmaSteps; ++step) {
    const int chunk = half * (kLanes / 2) + step * 4 + column;  // of four channels
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const uint4 words = shared.streams[8 * m + group][stream * kLanes + chunk];
      a[m][0] = words.x;
      a[m][1] = words.y;
      a[m][2] = words.z;
      a[m][3] = words.w;
    }
#pragma unroll
    for (int n = 0; n < kMmaColumnTiles; ++n) {
      uint32_t part[3][2];
      Split(of_fn[step][n], part);
#pragma unroll
      for (int i = 2; i >= 0; --i) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) MmaBf16(acc[m][n], a[m], part[i]);
      }
    }
  }
  __syncthreads();  // the streams were read
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kMmaColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* const to = &shared.parts[warp][16 * m + group + 8 * i][8 * n + 2 * column];
        *reinterpret_cast<float2*>(to) = make_float2(acc[m][n][2 * i], acc[m][n][2 * i + 1]);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * kMhcMixes; i += kSumsThreads) {
    const int token = i / kMhcMixes, mix = i % kMhcMixes;
    if (mix >= p.mixes) continue;
    float sum = shared.parts[0][token][mix];
#pragma unroll
    for (int w = 1; w < kMixWarps; ++w) sum = __fadd_rn(sum, shared.parts[w][token][mix]);
    sums[token * stride + mix] = sum;
  }
}

// ---- From the sums to the forms: a token a thread block, 16 channels a lane.

constexpr int kMaxWorkers = 16;  // warps, beside those for weights and comb: one a group of tiles
constexpr int kMaxTileGroups = static_cast<int>(kMhcMaxDim / (kMhcTile * kMhcTileGroup));
constexpr int kGroup = kLanes * kNormBlock;  // channels of a warp
constexpr int kMaxGroups = static_cast<int>(kMhcMaxDim / kGroup);
constexpr int kMaxPasses = kMaxGroups / kMaxWorkers;
// Of kPasses.
constexpr int FinishThreads(int passes) {
  return (kMaxWorkers + passes * kMaxTileGroups / kMaxPasses) * kLanes;
}

struct FinishParams {
  MhcParams p;
  int tiles, groups, workers;  // groups of tiles
};

struct BlockStreams {
  uint32_t s[kStreams][kNormWords];

  __device__ __forceinline__ void Load(const uint16_t* from, int64_t stride) {
#pragma unroll
    for (int j = 0; j < kStreams; ++j) LoadWritten(from + j * stride, s[j]);
  }
  // Not by __ldg: the kernel before may still be at it when this one begins.
  __device__ __forceinline__ static void LoadWritten(const uint16_t* from,
                                                     uint32_t (&words)[kNormWords]) {
#pragma unroll
    for (int i = 0; i < kNormWords; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from + 2 * i);
      words[i] = four.x;
      words[i + 1] = four.y;
      words[i + 2] = four.z;
      words[i + 3] = four.w;
    }
  }

  __device__ __forceinline__ void Collapse(const float (&pre)[kStreams],
                                           uint32_t (&y)[kNormWords]) const {
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {
      float low = __fmul_rn(pre[0], Low(s[0][i])), high = __fmul_rn(pre[0], High(s[0][i]));
#pragma unroll
      for (int j = 1; j < kStreams; ++j) {
        low = __fmaf_rn(pre[j], Low(s[j][i]), low);
        high = __fmaf_rn(pre[j], High(s[j][i]), high);
      }
      y[i] = PackBf16(low, high);
    }
  }
};

__device__ __forceinline__ uint32_t Largest(const uint32_t (&words)[kNormWords]) {
  uint32_t pair = 0;
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) pair = MaxMagnitudes(pair, words[i]);
  return LargerOf(pair);
}

// E4M3 codes of a block that shares a scale with 7 others in the lanes around; `at`: which block.
__device__ __forceinline__ void StoreFp8(const MhcParams& p, int64_t at, bool valid,
                                         uint32_t largest, const uint32_t (&words)[kNormWords]) {
  constexpr int kScaleLanes = kMhcTile / kNormBlock;
#pragma unroll
  for (int half = 1; half < kScaleLanes; half *= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, half));
  }
  if (!valid) return;
  const uint32_t byte = Fp8ScaleByte(largest << 16);
  const float inverse = InverseScale(byte);
  uint32_t codes[kNormWords / 2];
#pragma unroll
  for (int i = 0; i < kNormWords / 2; ++i) {
    uint32_t pair[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t word = words[2 * i + k];
      pair[k] = EncodeE4m3Pair(__fmul_rn(Low(word), inverse), __fmul_rn(High(word), inverse));
    }
    codes[i] = pair[0] | pair[1] << 16;
  }
  StoreVector(p.code8 + at * kNormBlock, make_uint4(codes[0], codes[1], codes[2], codes[3]));
  if (at % kScaleLanes == 0) p.scale8[at / kScaleLanes] = static_cast<uint8_t>(byte);
}

// E2M1 codes of a block and its scale; `at`: which block.
__device__ __forceinline__ void StoreNvfp4(const MhcParams& p, int64_t at,
                                           const Nvfp4Encoder& encoder, uint32_t largest,
                                           const uint32_t (&block)[kNormWords]) {
  uint32_t words[kNormWords];  // as Encode takes them
#pragma unroll
  for (int i = 0; i < kNormWords; i += 4) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t first = block[i + k], fourth_after = block[i + k + 2];
      words[i + 2 * k] = __byte_perm(first, fourth_after, 0x5410);
      words[i + 2 * k + 1] = __byte_perm(first, fourth_after, 0x7632);
    }
  }
  StoreVector(p.code4 + at * (kNvfp4Block / 2), encoder.Encode(words, largest, p.block_scale[at]));
}

// kPasses: groups of 512 channels that a warp takes.
template <int kPasses>
__global__ void __launch_bounds__(FinishThreads(kPasses), 3 - kPasses)
    FinishKernel(const __grid_constant__ FinishParams params) {
  __shared__ float4 group_squares[kMaxGroups / 4 + 1];
  __shared__ uint32_t warp_max[kMaxWorkers];
  __shared__ float pre_of[kStreams];
  __shared__ float group_sums[kMaxTileGroups][kLanes];
  const MhcParams& p = params.p;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int workers = params.workers;
  float* const squares_of = reinterpret_cast<float*>(group_squares);
  // Backwards: the last tokens' streams are still in the L2.
  const int token = static_cast<int>(p.t) - 1 - static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(p.d) / kNormBlock, group = warp - workers;
  const auto block_of = [&](int pass) { return (warp + pass * workers) * kLanes + lane; };
  const auto weights_of = [&](int pass, uint32_t (&words)[kNormWords]) {
    if (block_of(pass) < blocks) LoadBlock<true>(words, p.norm + block_of(pass) * kNormBlock);
  };
  const uint16_t* const streams =
      (p.branch == nullptr ? p.streams : p.new_streams) + int64_t{token} * kStreams * p.d;
  uint32_t norm_weight[kNormWords] = {};
  BlockStreams of_block = {};
  float static_scale = 0.0f, total = 0.0f, weight = 0.0f;
  const LaneMix mix(p, group >= 0 ? lane : kLanes);
  if (group >= 0) {
    LetNextBegin();
    WaitForPrevious();
    const float* const sums = p.scratch + int64_t{token} * params.tiles * kMhcSumStride;
    total = __fadd_rn(0.0f, GroupSum(p, sums, params.tiles, group, lane));
    if (params.groups > 1) group_sums[group][lane] = total;
  } else {
    weights_of(0, norm_weight);
    if (p.global_scale != nullptr) static_scale = StaticGlobalScale(__ldg(p.global_scale));
    LetNextBegin();
    WaitForPrevious();
    if (block_of(0) < blocks) of_block.Load(streams + block_of(0) * kNormBlock, p.d);
  }
  // Of all warps, though it is the groups' alone that have to meet: behind a barrier of some,
  // racecheck does not see the next one.
  if (params.groups > 1) __syncthreads();
  if (group == 0) {
    for (int i = 1; i < params.groups; ++i) total = __fadd_rn(total, group_sums[i][lane]);
    weight = mix.Weight(p, total, lane);
    if (lane < kStreams) pre_of[lane] = weight;
  }
  __syncthreads();
  if (group >= 0) {
    if (group == 0 && p.mixes == kMhcMixes) FinishMixes(p, token, weight, lane);
    return;
  }
  const float pre[kStreams] = {pre_of[0], pre_of[1], pre_of[2], pre_of[3]};
  uint32_t y[kPasses][kNormWords];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (pass > 0) {
      of_block = {};
      if (block_of(pass) < blocks) of_block.Load(streams + block_of(pass) * kNormBlock, p.d);
    }
    of_block.Collapse(pre, y[pass]);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {
      squares = __fmaf_rn(Low(y[pass][i]), Low(y[pass][i]), squares);
      squares = __fmaf_rn(High(y[pass][i]), High(y[pass][i]), squares);
    }
    squares = HalvedLanes(squares);
    if (lane == 0) squares_of[warp + pass * workers] = squares;
  }
  if (threadIdx.x < 4) squares_of[kPasses * workers + threadIdx.x] = 0.0f;  // to a whole float4
  SyncWarps(kWorkersBarrier, workers);
  float squares = 0.0f;
#pragma unroll 4
  for (int i = 0; i * 4 < kPasses * workers; ++i) {  // in sequence
    const float4 four = group_squares[i];
    squares = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(squares, four.x), four.y), four.z), four.w);
  }
  const float norm = __frsqrt_rn(__fadd_rn(__fmul_rn(squares, p.reciprocal_d), p.rms_eps));
  uint32_t largest[kPasses], token_largest = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (pass > 0) weights_of(pass, norm_weight);
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {
      const uint32_t pair = y[pass][i], weight = norm_weight[i];
      y[pass][i] = PackBf16(__fmul_rn(Low(weight), __fmul_rn(Low(pair), norm)),
                            __fmul_rn(High(weight), __fmul_rn(High(pair), norm)));
    }
    const uint32_t (&words)[kNormWords] = y[pass];
    const bool valid = block_of(pass) < blocks;
    const int64_t at = int64_t{token} * blocks + block_of(pass);
    largest[pass] = valid ? Largest(words) : 0;
    token_largest = max(token_largest, largest[pass]);
    if (p.x != nullptr && valid) {
      uint16_t* const to = p.x + at * kNormBlock;
      StoreVector(to, make_uint4(words[0], words[1], words[2], words[3]));
      StoreVector(to + 8, make_uint4(words[4], words[5], words[6], words[7]));
    }
    if (p.code8 != nullptr) StoreFp8(p, at, valid, largest[pass], words);
  }
  if (p.code4 == nullptr) return;
  float global = static_scale;
  if (p.global_scale == nullptr) {
    token_largest = __reduce_max_sync(kAllLanes, token_largest);
    if (lane == 0) warp_max[warp] = token_largest;
    SyncWarps(kWorkersBarrier, workers);
    token_largest = __reduce_max_sync(kAllLanes, lane < workers ? warp_max[lane] : 0u);
    global = TokenGlobalScale(__uint_as_float(token_largest << 16));
  }
  if (threadIdx.x == 0) p.token_scale[token] = global;
  const Nvfp4Encoder encoder(global);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (block_of(pass) >= blocks) return;
    StoreNvfp4(p, int64_t{token} * blocks + block_of(pass), encoder, largest[pass], y[pass]);
  }
}

// ---- Few tokens of kFewDim channels in one launch: a cluster takes one or two, a thread block of
// it two tiles, whose part of fn is in registers before the kernel ahead has ended. Sums of tiles,
// then the norm's, then the largest magnitudes are traded through shared memory, so that streams
// are read once. A lane has the same 4 channels of a tile from beginning to end.

constexpr int kFewBlocks = 16;  // of a cluster
constexpr int kFewTiles = 2;    // of a thread block, half of the token apart: their sums are added
constexpr int kFewAllTiles = kFewBlocks * kFewTiles;
constexpr int kFewDim = kFewAllTiles * kMhcTile;
constexpr int kFewThreads = kMixWarps * kLanes;
constexpr int kFewGroups = kFewDim / kGroup;
constexpr int kBlockLanes = kNormBlock / kChannels;  // that have a block of 16 channels
constexpr int kTileBlocks = kMhcTile / kNormBlock;
constexpr int kGroupPitch = kLanes + 4;   // floats: the groups lie in banks of their own
constexpr int kFewSums = kWarpMixes + 1;  // of a warp: its mixes, and the squares
static_assert(kFewAllTiles == kMhcTileGroup && kMixWarps == kFewTiles * kStreams);

struct FewParams {
  MhcParams p;
  bool weights_first;  // fn, base, scale, norm and global_scale: as in SumsParams
};

// Written by all thread blocks of the cluster, but for `streams`.
template <int kTokens>
struct FewShared {
  float4 sums[kTokens][kFewBlocks][kMixWarps];       // kFewSums
  float squares[kTokens][kFewGroups * kGroupPitch];  // of y's blocks
  uint32_t largest[kTokens][kFewAllTiles];
  uint2 streams[kTokens][kFewTiles][kStreams * kLanes];
  uint64_t sums_barrier, squares_barrier, largest_barrier;
};

// Stream k of a token at four channels, as TokenStreams has it, yet not stored.
__device__ __forceinline__ uint2 OneStream(const MhcParams& p, int64_t token, int k, int channel) {
  const uint16_t* const from = p.streams + token * kStreams * kFewDim + channel;
  if (p.branch == nullptr) return *reinterpret_cast<const uint2*>(from + k * kFewDim);
  uint2 streams[kStreams];
  float comb[kStreams], sum[kChannels];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    streams[j] = *reinterpret_cast<const uint2*>(from + j * kFewDim);
    comb[j] = __ldg(p.comb + (token * kStreams + j) * kStreams + k);
  }
  const float post = __ldg(p.post + token * kStreams + k);
  Unpack(__ldg(reinterpret_cast<const uint2*>(p.branch + token * kFewDim + channel)), sum);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum[i] = __fmul_rn(post, sum[i]);
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    float x[kChannels];
    Unpack(streams[j], x);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum[i] = __fmaf_rn(comb[j], x[i], sum[i]);
  }
  return Pack(sum);
}

// HalvedLanes of several sums at once: where two lanes are added each keeps half of the sums. A
// lane ends up with the one whose number is in its highest bits.
template <int kCount, int kHalf = kLanes / 2>
__device__ __forceinline__ float HalvedSums(float* sums, int lane) {
  if constexpr (kHalf == 0) {
    return sums[0];
  } else if constexpr (kCount == 1) {
    sums[0] = __fadd_rn(sums[0], __shfl_xor_sync(kAllLanes, sums[0], kHalf));
    return HalvedSums<1, kHalf / 2>(sums, lane);
  } else {
    constexpr int kKept = kCount / 2;
    const bool upper = (lane & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float theirs = __shfl_xor_sync(kAllLanes, upper ? sums[i] : sums[i + kKept], kHalf);
      sums[i] = __fadd_rn(upper ? sums[i + kKept] : sums[i], theirs);
    }
    return HalvedSums<kKept, kHalf / 2>(sums, lane);
  }
}

// A warp's sums of the thread block's tiles to all of the cluster.
template <int kTokens>
__device__ __forceinline__ void SendSums(const Weights (&weights)[kFewTiles],
                                         FewShared<kTokens>& shared, int rank, int warp, int lane,
                                         int count) {
  constexpr int kSums = kFewTiles * kTokens * kFewSums;
  float sums[kSums];
#pragma unroll
  for (int i = 0; i < kFewTiles; ++i) {
#pragma unroll
    for (int g = 0; g < kTokens; ++g) {  // whatever there is of a token that is none
      MixLane<true>(weights[i], shared.streams[g][i], lane, sums + (i * kTokens + g) * kFewSums);
    }
  }
  float sum = HalvedSums<kSums>(sums, lane);
  sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, kLanes / 2));  // both tiles
  const int g = lane / kFewBlocks % kTokens, to = lane % kFewBlocks;
  constexpr int kSumLanes = kLanes / kSums;
  float four[kFewSums];
#pragma unroll
  for (int m = 0; m < kFewSums; ++m) {
    four[m] = __shfl_sync(kAllLanes, sum, (g * kFewSums + m) * kSumLanes);
  }
  if (lane / kFewBlocks >= count) return;
  StoreIn(&shared.sums[g][rank][warp], SharedAddress(&shared.sums_barrier), to,
          make_float4(four[0], four[1], four[2], four[3]));
}

__device__ __forceinline__ uint2 CollapseStreams(const uint2* streams,
                                                 const float (&pre)[kStreams]) {
  float sum[kChannels], x[kChannels];
  Unpack(streams[0], x);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum[i] = __fmul_rn(pre[0], x[i]);
#pragma unroll
  for (int j = 1; j < kStreams; ++j) {
    Unpack(streams[j * kLanes], x);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum[i] = __fmaf_rn(pre[j], x[i], sum[i]);
  }
  return Pack(sum);
}

// The block to which the lane's 4 channels belong.
__device__ __forceinline__ void BlockOf(uint2 y, int lane, uint32_t (&words)[kNormWords]) {
#pragma unroll
  for (int i = 0; i < kBlockLanes; ++i) {
    const int from = lane / kBlockLanes * kBlockLanes + i;
    words[2 * i] = __shfl_sync(kAllLanes, y.x, from);
    words[2 * i + 1] = __shfl_sync(kAllLanes, y.y, from);
  }
}

// The sum of the squares of a tile's y to all of the cluster, a block apart.
template <int kTokens>
__device__ __forceinline__ void SendSquares(FewShared<kTokens>& shared, int g, int tile, uint2 y,
                                            int lane) {
  uint32_t words[kNormWords];
  BlockOf(y, lane, words);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) {
    sum = __fmaf_rn(Low(words[i]), Low(words[i]), sum);
    sum = __fmaf_rn(High(words[i]), High(words[i]), sum);
  }
  // A lane sends half of the tile's to one thread block.
  const int half = lane / kFewBlocks * (kTileBlocks / 2);
  float of[kTileBlocks / 2];
#pragma unroll
  for (int i = 0; i < kTileBlocks / 2; ++i) {
    of[i] = __shfl_sync(kAllLanes, sum, (half + i) * kBlockLanes);
  }
  const int block = tile * kTileBlocks + half;
  StoreIn(&shared.squares[g][block / kLanes * kGroupPitch + block % kLanes],
          SharedAddress(&shared.squares_barrier), lane % kFewBlocks,
          make_float4(of[0], of[1], of[2], of[3]));
}

// The same of the token: a group a lane, then the groups in sequence.
__device__ __forceinline__ float TokenSquares(const float* squares, int lane) {
  const float* const from = squares + lane % kFewGroups * kGroupPitch;
  float of[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    of[i] = four.x;
    of[i + 1] = four.y;
    of[i + 2] = four.z;
    of[i + 3] = four.w;
  }
  const float group = Halved<kLanes>([&](int i) { return of[i]; });
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kFewGroups; ++i) sum = __fadd_rn(sum, __shfl_sync(kAllLanes, group, i));
  return sum;
}

__device__ __forceinline__ uint32_t Normed(uint32_t weight, uint32_t pair, float norm) {
  return PackBf16(__fmul_rn(Low(weight), __fmul_rn(Low(pair), norm)),
                  __fmul_rn(High(weight), __fmul_rn(High(pair), norm)));
}

__device__ __forceinline__ uint32_t EncodeScaled(uint32_t pair, float inverse) {
  return EncodeE4m3Pair(__fmul_rn(Low(pair), inverse), __fmul_rn(High(pair), inverse));
}

template <int kTokens>
__global__ void __launch_bounds__(kFewThreads, 1)
    FewKernel(const __grid_constant__ FewParams params) {
  __shared__ FewShared<kTokens> shared;
  const MhcParams& p = params.p;
  const int warp = UniformWarp(), lane = threadIdx.x % kLanes;
  const int rank = static_cast<int>(blockIdx.x % kFewBlocks);
  const int64_t first = static_cast<int64_t>(blockIdx.x / kFewBlocks) * kTokens;
  const int count = min(kTokens, static_cast<int>(p.t - first));
  const auto tile_of = [&](int i) { return rank + i * kFewBlocks; };
  const auto channel_of = [&](int i) { return tile_of(i) * kMhcTile + lane * kChannels; };
  const bool trades_largest = p.code4 != nullptr && p.global_scale == nullptr;
  const uint32_t sums_barrier = SharedAddress(&shared.sums_barrier);
  const uint32_t squares_barrier = SharedAddress(&shared.squares_barrier);
  const uint32_t largest_barrier = SharedAddress(&shared.largest_barrier);
  if (threadIdx.x == 0) {
    for (uint32_t barrier : {sums_barrier, squares_barrier, largest_barrier}) {
      InitBarrier(barrier, 1);
    }
    FenceBarrierInit();
    ArriveExpecting(sums_barrier, count * sizeof(shared.sums[0]));
    ArriveExpecting(squares_barrier, count * (kFewDim / kNormBlock) * sizeof(float));
    ArriveExpecting(largest_barrier, trades_largest ? count * sizeof(shared.largest[0]) : 0);
  }
  __syncwarp();
  ArriveAtCluster();
  if (!params.weights_first) WaitForPrevious();
  Weights weights[kFewTiles];
#pragma unroll
  for (int i = 0; i < kFewTiles; ++i) weights[i].Load(p, warp * kWarpMixes, channel_of(i));
  // The first warps finish a tile of a token each, the next one of some thread block its comb.
  const bool combs = warp == kFewTiles * kTokens + rank;
  const int g = combs ? rank : warp / kFewTiles, tile = tile_of(warp % kFewTiles);
  const int channel = channel_of(warp % kFewTiles);
  const uint2 norm_weight = __ldg(reinterpret_cast<const uint2*>(p.norm + channel));
  const LaneMix mix(p, lane);
  float global = 0.0f;
  if (p.global_scale != nullptr) global = StaticGlobalScale(__ldg(p.global_scale));
  WaitForCluster();
  WaitForPrevious();
  LetNextBegin();

  const int stream = warp % kStreams, back = warp / kStreams;
  uint2 own[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (i >= count) break;
    own[i] = OneStream(p, first + i, stream, channel_of(back));
    shared.streams[i][back][stream * kLanes + lane] = own[i];
  }
  __syncthreads();
  if (p.branch != nullptr) {  // maybe in place: all of them were read
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i >= count) break;
      const int64_t row = (first + i) * kStreams + stream;
      StoreVector(p.new_streams + row * kFewDim + channel_of(back), own[i]);
    }
  }
  SendSums(weights, shared, rank, warp, lane, count);
  if (g >= count) return;
  const int64_t token = first + g;
  Wait(sums_barrier, 0);
  const int of_lane = lane < p.mixes ? lane / kWarpMixes * 4 + lane % kWarpMixes : kWarpMixes;
  const float* const sums = reinterpret_cast<const float*>(shared.sums[g]) + of_lane;
  const float total =
      __fadd_rn(0.0f, Halved<kFewBlocks>([&](int i) { return sums[i * kMixWarps * 4]; }));
  const float weight = mix.Weight(p, total, lane);
  if (combs) {
    if (p.mixes == kMhcMixes) FinishMixes(p, token, weight, lane);
    return;
  }

  float pre[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) pre[j] = __shfl_sync(kAllLanes, weight, j);
  uint2 y = CollapseStreams(shared.streams[g][warp % kFewTiles] + lane, pre);
  SendSquares(shared, g, tile, y, lane);
  Wait(squares_barrier, 0);
  const float mean = __fmul_rn(TokenSquares(shared.squares[g], lane), p.reciprocal_d);
  const float norm = __frsqrt_rn(__fadd_rn(mean, p.rms_eps));
  y = make_uint2(Normed(norm_weight.x, y.x, norm), Normed(norm_weight.y, y.y, norm));
  const int64_t at = token * kFewDim + channel;
  if (p.x != nullptr) StoreVector(p.x + at, y);
  const uint32_t largest = __reduce_max_sync(kAllLanes, LargerOf(MaxMagnitudes(y.x, y.y)));
  if (p.code8 != nullptr) {
    const uint32_t byte = Fp8ScaleByte(largest << 16);
    const float inverse = InverseScale(byte);
    *reinterpret_cast<uint32_t*>(p.code8 + at) =
        EncodeScaled(y.x, inverse) | EncodeScaled(y.y, inverse) << 16;
    if (lane == 0) p.scale8[at / kMhcTile] = static_cast<uint8_t>(byte);
  }
  if (p.code4 == nullptr) return;
  if (trades_largest) {
    if (lane < kFewBlocks) {
      StoreIn(&shared.largest[g][tile], largest_barrier, lane, __uint_as_float(largest));
    }
    Wait(largest_barrier, 0);
    const uint32_t of_token = __reduce_max_sync(kAllLanes, shared.largest[g][lane]);
    global = TokenGlobalScale(__uint_as_float(of_token << 16));
  }
  if (tile == 0 && lane == 0) p.token_scale[token] = global;
  uint32_t words[kNormWords];
  BlockOf(y, lane, words);
  if (lane % kBlockLanes != 0) return;
  StoreNvfp4(p, at / kNormBlock, Nvfp4Encoder(global), Largest(words), words);
}

template <int kTokens>
cudaError_t LaunchMma(const SumsParams& params, unsigned grid, cudaStream_t stream) {
  constexpr int kBytes = sizeof(MmaShared<kTokens>);
  const cudaError_t error = cudaFuncSetAttribute(
      MmaSumsKernel<kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return LaunchFirst(MmaSumsKernel<kTokens>, dim3(grid), kSumsThreads, kBytes, stream, 1, params);
}

enum class Sums { kFma, kMma };

// On tensor cores per_group is 16 or 32.
cudaError_t LaunchSums(const SumsParams& params, Sums how, cudaStream_t stream) {
  const int64_t groups = (params.p.t + params.per_group - 1) / params.per_group;
  if (groups * params.tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(groups * params.tiles);
  if (how == Sums::kMma) {
    return params.per_group == 16 ? LaunchMma<16>(params, grid, stream)
                                  : LaunchMma<32>(params, grid, stream);
  }
  const int bytes = params.per_group * kStreams * kLanes * static_cast<int>(sizeof(uint2));
  return LaunchFirst(SumsKernel, dim3(grid), kSumsThreads, bytes, stream, 1, params);
}

cudaError_t LaunchFinish(const MhcParams& p, cudaStream_t stream) {
  const auto parts = [&](int channels) {
    return static_cast<int>((p.d + channels - 1) / channels);
  };
  const FinishParams params{p, parts(kMhcTile), parts(kMhcTile * kMhcTileGroup),
                            std::min(parts(kGroup), kMaxWorkers)};
  const bool once = p.d <= kMaxWorkers * kGroup;
  const int threads = (params.workers + params.groups) * kLanes;
  return LaunchDependent(once ? FinishKernel<1> : FinishKernel<kMaxPasses>,
                         dim3(static_cast<unsigned>(p.t)), threads, 0, stream, params);
}

cudaError_t Launch(const MhcParams& p, cudaStream_t stream, Sums how, int per_group) {
  if (p.t > INT32_MAX - kMaxSumsTokens) return cudaErrorInvalidConfiguration;
  const SumsParams params{p, static_cast<int>(p.d / kMhcTile), per_group, IsSettled(p.fn)};
  const cudaError_t error = LaunchSums(params, how, stream);
  return error == cudaSuccess ? LaunchFinish(p, stream) : error;
}

template <int kTokens>
cudaError_t PrepareFew() {
  return cudaFuncSetAttribute(FewKernel<kTokens>, cudaFuncAttributeNonPortableClusterSizeAllowed,
                              1);
}

// Whether the device that is current at the first call runs such clusters.
bool FewFit() {
  static const bool fit = [] {
    int one = 0, two = 0;
    const bool asked = PrepareFew<1>() == cudaSuccess && PrepareFew<2>() == cudaSuccess &&
                       MostClusters(FewKernel<1>, kFewThreads, 0, kFewBlocks, one) == cudaSuccess &&
                       MostClusters(FewKernel<2>, kFewThreads, 0, kFewBlocks, two) == cudaSuccess;
    if (!asked) cudaGetLastError();  // so that no later call reports it
    return asked && one > 0 && two > 0;
  }();
  return fit;
}

template <int kTokens>
cudaError_t LaunchFew(const MhcParams& p, cudaStream_t stream) {
  const bool settled = IsSettled(p.fn) && IsSettled(p.base) && IsSettled(p.scale) &&
                       IsSettled(p.norm) &&
                       (p.global_scale == nullptr || IsSettled(p.global_scale));
  const cudaError_t error = PrepareFew<kTokens>();
  if (error != cudaSuccess) return error;
  const auto clusters = static_cast<unsigned>((p.t + kTokens - 1) / kTokens);
  return LaunchFirst(FewKernel<kTokens>, dim3(clusters * kFewBlocks), kFewThreads, 0, stream,
                     kFewBlocks, FewParams{p, settled});
}

// Measured on H100.
constexpr int kDecodeTokens = 8;     // in the regime kAuto
constexpr int kBlocks = 128;         // about as many as there are SMs
constexpr int kFewSumsTokens = 8;    // by FMA: up to so many, half of the tokens share fn
constexpr int kOneLaunchTokens = 8;  // the same bits, so that it is a matter of time alone
constexpr int kClusterTokens = 4;    // up to so many have a cluster each

}  // namespace

cudaError_t MhcCuda(const MhcParams& p, cudaStream_t stream) {
  if (p.t == 0) return cudaSuccess;
  if (p.fn == nullptr) return LaunchWrite(p, stream);
  const int64_t tiles = p.d / kMhcTile;
  if (p.regime == Regime::kPrefill || (p.regime == Regime::kAuto && p.t > kDecodeTokens)) {
    const int per_group = (p.t + 15) / 16 * tiles < kBlocks ? 16 : 32;
    return Launch(p, stream, Sums::kMma, per_group);
  }
  if (p.d == kFewDim && p.t <= kOneLaunchTokens && FewFit()) {
    return p.t <= kClusterTokens ? LaunchFew<1>(p, stream) : LaunchFew<2>(p, stream);
  }
  const int64_t few = std::clamp<int64_t>(p.t / 2, 1, kFewSumsTokens);
  const int64_t per_group =
      std::clamp<int64_t>((p.t * tiles + kBlocks - 1) / kBlocks, few, kMaxSumsTokens);
  return Launch(p, stream, Sums::kFma, static_cast<int>(per_group));
}

}  // namespace dsv4
