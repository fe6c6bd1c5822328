// Many tokens times E4M3 weights on Hopper: both sides straight from shared memory.
//
// Tokens are the rows of the MMA (M): two scales a lane and 128 inputs, where weights as rows would
// need one per column. A thread block keeps to one SM and takes tile after tile of 128 tokens and
// 128 weight rows; one thread fills a ring of stages of 128 inputs, each warpgroup multiplies 64
// tokens. With more than 128 tokens two thread blocks form a cluster: each fetches half of the
// weights they share. Sums are in order of the inputs, whatever the number of tokens.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/activations.cuh"
#include "common/barrier.cuh"
#include "common/bits.h"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "fp8_linear/fp8_linear.h"

namespace dsv4 {
namespace {

constexpr int kTokens = 128, kRows = 128;  // of a tile
constexpr int kInputs = 128;               // of a stage: a scale of x, and of the weights
constexpr int kWarpgroups = 2;             // that multiply
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kTileBytes = 128 * kInputs;  // of x, and of the weights
constexpr int kStages = 6;
constexpr int kScaleBytes = kTokens * 4;
constexpr int kSharedBytes = kStages * (2 * kTileBytes + kScaleBytes) + 1024;
constexpr int kFewTokens = 32;     // that the tile kernel serves by one tile
constexpr int kTilesThatPay = 32;  // against thread blocks that share the inputs
constexpr int kManyRows = 2048;    // that pay too, if tiles are short or have all their tokens
constexpr int kFewInputs = 4096;   // of a short one
constexpr int kTokenTiles = 16;    // side by side, so that neighbours find x and weights in the L2

// One weight of several for the same x.
struct Part {
  CUtensorMap weight;
  const uint8_t* scale;  // [ceil(n / 128), k / 128]
  void* y;
  int n, first_tile;  // of rows, counted over all parts
  bool y_bf16;
};

struct Args {
  Part parts[kMaxLinearParts];
  CUtensorMap x;
  const float* x_scale;  // [k / 128, padded tokens]
  int64_t padded;        // tokens
  int n_parts, row_tiles;
  int t, k;
};

// x as E4M3 [t, k], and its scales: eight tokens a thread block, a warp each, which takes every
// gridDim.y-th chunk.
constexpr int kPrepareTokens = 8, kWarpInputs = 32 * kChunk;
constexpr int kPrepareBlocks = 512;  // thread blocks that hide what a chunk takes

struct QuantizeArgs {
  LinearParams params;
  uint8_t* codes;
  float* scales;  // [k / 128, padded]
  int64_t padded;
};

template <bool kGated>
__global__ void __launch_bounds__(32 * kPrepareTokens)
    QuantizeKernel(const __grid_constant__ QuantizeArgs args) {
  const LinearParams& params = args.params;
  WaitForPrevious();
  LetNextBegin();
  const int64_t token = int64_t{blockIdx.x} * kPrepareTokens + threadIdx.x / 32;
  if (token >= params.t) return;
  const int lane = threadIdx.x % 32;
  std::conditional_t<kGated, GatedRow, PlainRow> x;
  if constexpr (kGated) {
    const int64_t at = token * params.k;
    x = {static_cast<const uint16_t*>(params.x) + at, static_cast<const uint16_t*>(params.up) + at,
         params.limit};
  } else {
    const int64_t bytes = params.k * (params.x_float32 ? 4 : 2);
    x = {static_cast<const char*>(params.x) + token * bytes, params.x_float32};
  }
  const int64_t base = int64_t{blockIdx.y} * kWarpInputs, stride = gridDim.y * kWarpInputs;
  typename decltype(x)::Batch batch;
  x.Load(base + lane * kChunk, stride, params.k, batch);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (base + i * stride >= params.k) break;
    const int64_t at = base + i * stride + lane * kChunk;
    x.Finish(batch, i);
    const Fp8Chunk chunk = EncodeFp8(batch[i]);
    if (at >= params.k) continue;
    *reinterpret_cast<uint2*>(args.codes + token * params.k + at) = chunk.codes;
    if (lane % 16 == 0) args.scales[at / kInputs * args.padded + token] = chunk.scale;
  }
}

// Of x that comes as codes, which serve as they lie: the scales, a thread for some of a token's.
constexpr int kScaleThreads = 128, kThreadScales = 8;

__global__ void __launch_bounds__(kScaleThreads)
    ScaleKernel(const __grid_constant__ QuantizeArgs args) {
  const LinearParams& params = args.params;
  WaitForPrevious();
  LetNextBegin();
  const int64_t token = int64_t{blockIdx.x} * kScaleThreads + threadIdx.x;
  if (token >= params.t) return;
  const int64_t blocks = params.k / kInputs, first = int64_t{blockIdx.y} * kThreadScales;
#pragma unroll
  for (int i = 0; i < kThreadScales; ++i) {
    const int64_t at = first + i;
    if (at >= blocks) break;
    args.scales[at * args.padded + token] =
        DecodeUe8m0(__ldg(params.x_scale + token * blocks + at));
  }
}

// Tile `index` of all, of one weight or several: bands of kTokenTiles tiles of tokens, weights one
// after another in each.
template <bool kSeveral>
struct Place {
  int token, row;  // the tile's first; tokens in units of a cluster's thread blocks
  int part;

  __device__ __forceinline__ Place(const Args& args, int index, int token_tiles) {
    const int in_band = kTokenTiles * args.row_tiles, band = index / in_band;
    const int width = min(kTokenTiles, token_tiles - band * kTokenTiles);
    const int at = index - band * in_band, tile = at / width;
    token = (band * kTokenTiles + at % width) * kTokens;
    part = 0;
    row = tile * kRows;
    if constexpr (kSeveral) {
      while (part + 1 < args.n_parts && tile >= args.parts[part + 1].first_tile) ++part;
      row -= args.parts[part].first_tile * kRows;
    }
  }
};

// Warps may come in parts: one lane of the copying warp is late.
__device__ __forceinline__ void SyncCluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The ring: where a stage lies, and when it turns round.
struct Ring {
  uint32_t shared, full, empty;
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ uint32_t X() const { return shared + slot * 2 * kTileBytes; }
  __device__ __forceinline__ uint32_t Weight() const { return X() + kTileBytes; }
  __device__ __forceinline__ uint32_t Scale() const {
    return shared + kStages * 2 * kTileBytes + slot * kScaleBytes;
  }
  __device__ __forceinline__ uint32_t Full() const { return full + 8 * slot; }
  __device__ __forceinline__ uint32_t Empty() const { return empty + 8 * slot; }
  __device__ __forceinline__ void Next() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

template <int kCluster, bool kSeveral>
__device__ __forceinline__ void CopyWeight(const Args& args, const Ring& ring, int input,
                                           const Place<kSeveral>& place, int rank) {
  const CUtensorMap* const weight = &args.parts[place.part].weight;
  ArriveExpecting(ring.Full(), 2 * kTileBytes + kScaleBytes);
  if constexpr (kCluster == 1) {
    CopyTile(ring.Weight(), weight, input, place.row, ring.Full());
  } else {
    constexpr int kShare = kRows / kCluster;
    CopyTileToAll(ring.Weight() + rank * kShare * kInputs, weight, input, place.row + rank * kShare,
                  ring.Full(), (1 << kCluster) - 1);
  }
}

__device__ __forceinline__ void CopyX(const Args& args, const Ring& ring, int input, int token) {
  CopyTile(ring.X(), &args.x, input, token, ring.Full());
  CopyBytes(ring.Scale(), args.x_scale + input / kInputs * args.padded + token, kScaleBytes,
            ring.Full());
}

// All copies of a thread block, by one thread. Weights do not wait for the kernel that rounds x.
template <int kCluster, bool kSeveral>
__device__ void FillAll(const Args& args, Ring ring, int first, int step, int tiles,
                        int token_tiles, int rank) {
  const int stages = args.k / kInputs;
  const int ahead = first < tiles ? min(kStages, stages) : 0;
  {
    const Place<kSeveral> place(args, first, token_tiles);
    Ring early = ring;
    for (int i = 0; i < ahead; ++i, early.Next()) {
      CopyWeight<kCluster>(args, early, i * kInputs, place, rank);
    }
  }
  WaitForPrevious();
  int copied = 0;
  for (int index = first; index < tiles; index += step) {
    const Place<kSeveral> place(args, index, token_tiles);
    const int token = place.token * kCluster + rank * kTokens;
    for (int i = 0; i < stages; ++i, ++copied, ring.Next()) {
      if (copied >= kStages) Wait(ring.Empty(), ring.phase ^ 1);
      if (copied >= ahead) CopyWeight<kCluster>(args, ring, i * kInputs, place, rank);
      CopyX(args, ring, i * kInputs, token);
    }
  }
}

__device__ __forceinline__ float LoadShared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

// A lane's sums: rows g and g + 8 of the warp's 16, columns 8 j + 2 c and the next.
__device__ __forceinline__ void StoreSums(const Part& part, int tokens, const float (&sum)[64],
                                          int token, int row) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int line = token + 8 * r;
    const int64_t at = int64_t{line} * part.n + row;
#pragma unroll
    for (int j = 0; j < kRows / 8; j += 4) {
      if (part.y_bf16) {  // four lanes trade pairs for whole blocks of eight
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pairs[i] = PackBf16(sum[4 * (j + i) + 2 * r], sum[4 * (j + i) + 2 * r + 1]);
        }
        Transpose<0>(pairs, c);
        const int column = 8 * (j + c);
        if (line < tokens && row + column < part.n) {
          *reinterpret_cast<uint4*>(static_cast<uint16_t*>(part.y) + at + column) =
              make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * (j + i) + 2 * c;
          if (line < tokens && row + column < part.n) {
            *reinterpret_cast<float2*>(static_cast<float*>(part.y) + at + column) =
                make_float2(sum[4 * (j + i) + 2 * r], sum[4 * (j + i) + 2 * r + 1]);
          }
        }
      }
    }
  }
}

// A stage's product of its own, since the tensor cores keep 14 bits of an E4M3 sum; scales go in
// when it is added.
struct Product {
  float part[64];
  float scale[2];  // of rows g and g + 8
  uint32_t empty;  // barrier of the stage
};

__device__ __forceinline__ void Begin(Product& product, const Ring& ring, uint32_t scale_byte) {
  const int in_tile = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const float weight_scale = DecodeUe8m0(scale_byte);
  product.empty = ring.Empty();
  Wait(ring.Full(), ring.phase);
  const uint32_t x = ring.X() + threadIdx.x / 128 * 64 * kInputs, weight = ring.Weight();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    product.scale[r] = __fmul_rn(LoadShared(ring.Scale() + (in_tile + 8 * r) * 4), weight_scale);
  }
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kInputs / 32; ++step) {
    Wgmma<128, true>::Run(product.part, SwizzledRows(x + step * 32),
                          SwizzledRows(weight + step * 32), step > 0);
  }
  WgmmaCommit();
}

// Of a stage: every thread's, since each read scales, and of the other thread block every warp's,
// since weights are copied into both.
template <int kCluster>
constexpr int kReleases = 128 * kWarpgroups + (kCluster - 1) * 4 * kWarpgroups;

// Once its MMAs are done: the stage is free for all that fill it, and the sums grow.
template <int kCluster>
__device__ __forceinline__ void End(const Product& product, int other, float (&sum)[64]) {
  Arrive(product.empty);
  if (kCluster > 1 && threadIdx.x % 32 == 0) ArriveIn(product.empty, other);
#pragma unroll
  for (int j = 0; j < 64; ++j)
    sum[j] = __fmaf_rn(product.part[j], product.scale[j % 4 / 2], sum[j]);
}

// One tile by a warpgroup, two stages at a time: one is added while the tensor cores do the other.
template <int kCluster, bool kSeveral>
__device__ __forceinline__ void MultiplyTile(const Args& args, Ring& ring, int token,
                                             const Place<kSeveral>& place, int other) {
  const Part& part = args.parts[place.part];
  const int stages = args.k / kInputs;
  const uint8_t* scales = part.scale + place.row / kRows * stages;
  float sum[64] = {};
  Product first, second;
  for (int i = 0; i + 1 < stages; i += 2, scales += 2) {
    const uint32_t bytes[2] = {__ldg(scales), __ldg(scales + 1)};
    Begin(first, ring, bytes[0]);
    ring.Next();
    Begin(second, ring, bytes[1]);
    ring.Next();
    WgmmaWait<1>();
    End<kCluster>(first, other, sum);
    WgmmaWait<0>();
    End<kCluster>(second, other, sum);
  }
  if (stages % 2 > 0) {
    Begin(first, ring, __ldg(scales));
    ring.Next();
    WgmmaWait<0>();
    End<kCluster>(first, other, sum);
  }
  const int lane = threadIdx.x % 32;
  StoreSums(part, args.t, sum, token + threadIdx.x / 32 * 16 + lane / 4, place.row);
}

template <int kCluster, bool kSeveral>
__global__ void __launch_bounds__(kThreads, 1) Fp8PrefillKernel(const __grid_constant__ Args args) {
  extern __shared__ char raw[];
  __shared__ uint64_t barriers[2 * kStages];  // full, then empty
  const int rank = static_cast<int>(blockIdx.x) % kCluster;
  Ring ring;
  ring.shared = (SharedAddress(raw) + 1023) / 1024 * 1024;  // the swizzle's pattern
  ring.full = SharedAddress(barriers);
  ring.empty = ring.full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(ring.full + 8 * i, 1);
      InitBarrier(ring.empty + 8 * i, kReleases<kCluster>);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (kCluster > 1) {
    SyncCluster();
  } else {
    __syncthreads();
  }
  // A cluster takes kCluster tiles of tokens together.
  constexpr int kTogether = kCluster * kTokens;
  const int token_tiles = (args.t + kTogether - 1) / kTogether;
  const int tiles = token_tiles * args.row_tiles;
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int step = static_cast<int>(gridDim.x) / kCluster;
  // The copying warp is one of a warpgroup that hands its registers to the others.
  if (threadIdx.x >= 128 * kWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 128 * kWarpgroups) {
      FillAll<kCluster, kSeveral>(args, ring, first, step, tiles, token_tiles, rank);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    for (int index = first; index < tiles; index += step) {
      const Place<kSeveral> place(args, index, token_tiles);
      MultiplyTile<kCluster>(args, ring, place.token * kCluster + rank * kTokens, place, rank ^ 1);
    }
  }
  if constexpr (kCluster > 1) SyncCluster();  // the other may still arrive here
}

int64_t Tiles(const LinearParams& params) {
  return (params.t + kTokens - 1) / kTokens * ((params.n + kRows - 1) / kRows);
}

template <int kCluster, bool kSeveral>
cudaError_t Launch(const Args& args, cudaStream_t stream) {
  const auto kernel = Fp8PrefillKernel<kCluster, kSeveral>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t together = kCluster * kTokens;
  const int64_t tiles = (args.t + together - 1) / together * args.row_tiles;
  int clusters = 0;  // that run at once: SMs that have no partner may be left over
  error = MostClusters(kernel, kThreads, kSharedBytes, kCluster, clusters);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tiles, clusters) * kCluster));
  return LaunchDependent(kernel, grid, kThreads, kSharedBytes, stream, args, kCluster);
}

}  // namespace

bool Fp8PrefillTakes(const LinearParams& params) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return params.groups == 1 && params.k % kInputs == 0 && params.n % 8 == 0 &&
         std::max({params.n, params.k, params.t + 2 * kTokens, Tiles(params)}) <= INT32_MAX &&
         aligned(params.weight) && aligned(params.y) && aligned(params.scratch) &&
         (params.x_scale == nullptr || aligned(params.x)) && TensorMapEncoder() != nullptr;
}

bool Fp8PrefillPays(const LinearParams& params) {
  if (params.t <= kFewTokens) return false;
  const bool large = params.n >= kManyRows && (params.k <= kFewInputs || params.t >= kTokens);
  return large || Tiles(params) * std::min<int64_t>(params.t, kTokens) >= kTilesThatPay * kTokens;
}

cudaError_t Fp8PrefillSm90(const LinearParams* parts, int n_parts, cudaStream_t stream) {
  static_assert(sizeof(Args) <= 4096);
  const LinearParams& params = parts[0];
  Args args = {};
  args.t = static_cast<int>(params.t);
  args.k = static_cast<int>(params.k);
  const bool many = params.t > kTokens;
  const int64_t together = many ? 2 * kTokens : kTokens;
  args.padded = (params.t + together - 1) / together * together;
  uint8_t* const scratch = static_cast<uint8_t*>(params.scratch);
  float* const scales = reinterpret_cast<float*>(scratch + (params.t * params.k + 15) / 16 * 16);
  args.x_scale = scales;
  const bool coded = params.x_scale != nullptr;
  const void* const codes = coded ? params.x : scratch;
  if (!MakeMap(args.x, codes, params.t, params.k, kInputs, kTokens, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  const auto count = [](int64_t whole, int64_t part) {
    return static_cast<unsigned>((whole + part - 1) / part);
  };
  const QuantizeArgs quantize = {params, scratch, scales, args.padded};
  cudaError_t error;
  if (coded) {
    const dim3 grid(count(params.t, kScaleThreads),
                    count(params.k, int64_t{kThreadScales} * kInputs));
    error = LaunchDependent(ScaleKernel, grid, kScaleThreads, 0, stream, quantize);
  } else {
    const unsigned tokens = count(params.t, kPrepareTokens);
    const dim3 grid(tokens,
                    std::clamp(kPrepareBlocks / tokens, count(params.k, kBatch * kWarpInputs),
                               count(params.k, kWarpInputs)));
    const auto kernel = params.up != nullptr ? QuantizeKernel<true> : QuantizeKernel<false>;
    error = LaunchDependent(kernel, grid, 32 * kPrepareTokens, 0, stream, quantize);
  }
  if (error != cudaSuccess) return error;
  args.n_parts = n_parts;
  for (int p = 0; p < n_parts; ++p) {
    const LinearParams& from = parts[p];
    Part& part = args.parts[p];
    part.scale = from.scale;
    part.y = from.y;
    part.y_bf16 = from.y_bf16;
    part.n = static_cast<int>(from.n);
    part.first_tile = args.row_tiles;
    args.row_tiles += (part.n + kRows - 1) / kRows;
    if (!MakeMap(part.weight, from.weight, from.n, from.k, kInputs, many ? kRows / 2 : kRows,
                 CU_TENSOR_MAP_SWIZZLE_128B)) {
      return cudaErrorInvalidValue;
    }
  }
  if (n_parts > 1) return many ? Launch<2, true>(args, stream) : Launch<1, true>(args, stream);
  return many ? Launch<2, false>(args, stream) : Launch<1, false>(args, stream);
}

}  // namespace dsv4
