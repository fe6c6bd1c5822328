// Many BF16 tokens times BF16 or E4M3 weights on Hopper, both as they lie in memory.
//
// Weights are the rows of the MMA (M), tokens its columns (N), so that a tile of many tokens is
// read from shared memory once for 64 rows. BF16 weights are read there as well; of E4M3 each
// warpgroup decodes the next stage in registers while the tensor cores work on this one. A cluster
// of two thread blocks keeps to its SMs and takes pair after pair of tiles: other rows, the same
// tokens, of which each fetches half for both. Sums are in order of the inputs, whatever the width
// of a tile.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/barrier.cuh"
#include "common/bf16_prefill.h"
#include "common/bf16x2.cuh"
#include "common/tensor_map.h"
#include "common/weights.cuh"
#include "common/wgmma.cuh"

namespace dsv4 {
namespace {

constexpr int kRows = 128;      // of a tile, 64 a warpgroup
constexpr int kInputs = 64;     // of a stage
constexpr int kXLine = 128;     // bytes of a token in a stage
constexpr int kOutLine = 128;   // bytes of a token in a buffer of sums
constexpr int kWarpgroups = 2;  // that multiply
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kCluster = 2;
constexpr int kReleases = kCluster * kWarpgroups * 4;  // of a stage: every warp's
constexpr int kMostShared = 226 << 10, kMostStages = 8;
constexpr int kBandTokens = 2048;  // side by side, so that neighbours find x and weights in the L2
constexpr int kFewTokens = 64;     // that the tile kernel serves as fast
constexpr int kTilesThatPay = 8;   // against thread blocks that share the inputs

struct Part {
  CUtensorMap weight, y;
  const uint8_t* scale;  // kFp8: [ceil(n / 128), k / 128]
  int n, rows;           // of all groups, of one
  int first_tile;        // of a group's tiles of rows, counted over all parts
  bool y_bf16;
};

struct Args {
  CUtensorMap x;  // [t, groups * k]
  Part parts[kMaxLinearParts];
  int n_parts, row_tiles;  // of a group, all parts
  int t, k, groups;
};

__host__ __device__ inline int TilePairs(const Args& args, int tokens) {
  return args.groups * ((args.t + tokens - 1) / tokens) * ((args.row_tiles + 1) / 2);
}

// Shared memory: stages, then of each warpgroup two buffers for sums on their way out.
template <bool kFp8, int kTokens>
struct Stage {
  static constexpr int kWeightLine = kInputs * (kFp8 ? 1 : 2);
  static constexpr int kXBytes = kTokens * kXLine;
  static constexpr int kBytes = kXBytes + kRows * kWeightLine;
  static constexpr int kOutLines = kFp8 && kTokens == 256 ? 32 : 64;  // of a buffer
  static constexpr int kOutBytes = kOutLines * kOutLine;
  static constexpr int kAllOutBytes = kWarpgroups * 2 * kOutBytes;
  static constexpr int kCount = std::min(kMostStages, (kMostShared - 1024 - kAllOutBytes) / kBytes);
  static constexpr int kSharedBytes = kCount * kBytes + kAllOutBytes + 1024;
};

// The ring: where a stage lies, and when it turns round.
template <typename Layout>
struct Ring {
  uint32_t shared, full, empty;
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ uint32_t X() const { return shared + slot * Layout::kBytes; }
  __device__ __forceinline__ uint32_t Weight() const { return X() + Layout::kXBytes; }
  __device__ __forceinline__ uint32_t Full() const { return full + 8 * slot; }
  __device__ __forceinline__ uint32_t Empty() const { return empty + 8 * slot; }
  __device__ __forceinline__ void Next() {
    if (++slot == Layout::kCount) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// A tile: pair `index` of all, of which the thread block has one. Bands of tokens, in each of them
// pairs of row tiles one after another; groups one after another.
struct Place {
  int group, token, part, row;  // the first of the tile, the row inside of its group

  template <int kTokens>
  __device__ __forceinline__ static Place Of(const Args& args, int index, int rank) {
    const int token_tiles = (args.t + kTokens - 1) / kTokens;
    const int pairs = (args.row_tiles + 1) / 2;
    constexpr int kBand = kBandTokens / kTokens;
    Place place;
    place.group = index / (token_tiles * pairs);
    int at = index - place.group * token_tiles * pairs;
    const int band = at / (kBand * pairs);
    const int width = min(kBand, token_tiles - band * kBand);
    at -= band * kBand * pairs;
    place.token = (band * kBand + at % width) * kTokens;
    const int tile = at / width * 2 + rank;  // the last of an odd number has no partner
    place.part = 0;
    while (place.part + 1 < args.n_parts && tile >= args.parts[place.part + 1].first_tile) {
      ++place.part;
    }
    place.row = (tile - args.parts[place.part].first_tile) * kRows;
    return place;
  }
};

// Warps may come in parts: one lane of the copying warp is late.
__device__ __forceinline__ void SyncCluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// All copies of a thread block, by one thread.
template <typename Layout, int kTokens>
__device__ void FillAll(const Args& args, Ring<Layout> ring, int first, int step, int tiles,
                        int rank) {
  constexpr int kShare = kTokens / kCluster;
  const int stages = args.k / kInputs;
  int copied = 0;
  for (int index = first; index < tiles; index += step) {
    const Place place = Place::Of<kTokens>(args, index, rank);
    const Part& part = args.parts[place.part];
    const int x_at = place.group * stages * kXLine, token = place.token + rank * kShare;
    const int row = place.group * part.rows + place.row;
    for (int i = 0; i < stages; ++i, ++copied, ring.Next()) {
      if (copied >= Layout::kCount) Wait(ring.Empty(), ring.phase ^ 1);
      ArriveExpecting(ring.Full(), Layout::kBytes);
      CopyTile(ring.Weight(), &part.weight, i * Layout::kWeightLine, row, ring.Full());
      CopyTileToAll(ring.X() + rank * kShare * kXLine, &args.x, x_at + i * kXLine, token,
                    ring.Full(), (1 << kCluster) - 1);
    }
  }
}

// Once the warp's products of the stage are done: free for all that fill it.
template <typename Layout>
__device__ __forceinline__ void Release(const Ring<Layout>& ring, int slot) {
  const int lane = threadIdx.x % 32;
  if (lane < kCluster) ArriveIn(ring.empty + 8 * slot, lane);
}

template <typename Layout, int kTokens>
__device__ __forceinline__ void MultiplyBf16(const Args& args, Ring<Layout>& ring,
                                             float (&sum)[kTokens / 2]) {
  const int stages = args.k / kInputs;
  const uint32_t mine = threadIdx.x / 128 * 64 * Layout::kWeightLine;
  int before = 0;
  for (int i = 0; i < stages; ++i) {
    Wait(ring.Full(), ring.phase);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kInputs / 16; ++step) {
      Wgmma<kTokens, false>::Run(sum, SwizzledRows(ring.Weight() + mine + step * 32),
                                 SwizzledRows(ring.X() + step * 32), i + step > 0);
    }
    WgmmaCommit();
    WgmmaWait<1>();
    if (i > 0) Release(ring, before);
    before = ring.slot;
    ring.Next();
  }
  WgmmaWait<0>();
  Release(ring, before);
}

// A lane's share of 64 inputs of its rows g and g + 8: the operands of four MMAs.
using Operands = uint32_t[kInputs / 16][4];

__device__ __forceinline__ uint32_t LoadPair(uint32_t address) {
  uint16_t codes;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(codes) : "r"(address));
  return codes;
}

// Pairs of E4M3 codes. The copy engine has swapped a row's pieces of 16 bytes by bits 1 and 2 of
// its number.
__device__ __forceinline__ void LoadCodes(Operands& codes, uint32_t weight) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const uint32_t line = weight + (threadIdx.x / 32 * 16 + g) * kInputs + 2 * c;
  const uint32_t swap = (g >> 1 & 3) << 4;
#pragma unroll
  for (int step = 0; step < kInputs / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[step][i] = LoadPair(line + (step << 4 ^ swap) + i % 2 * 8 * kInputs + i / 2 * 8);
    }
  }
}

__device__ __forceinline__ void Decode(Operands& a, const Operands& codes, uint32_t scale_byte) {
  const uint32_t factor = Fp8Factor(scale_byte), rest = Fp8Rest(scale_byte);
  uint32_t largest = 0;
#pragma unroll
  for (int step = 0; step < kInputs / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t apart = __byte_perm(codes[step][i], 0, 0x1404);  // each in a high byte
      const uint32_t magnitude = apart & 0x7F007F00u;
      largest = __vmaxu2(largest, magnitude);
      a[step][i] = MulBf16x2((apart & 0x80008000u) | magnitude >> 4, factor);
    }
  }
  if (rest != 0) MultiplyRest(a, rest, rest);
  if (((largest + 0x01000100u) & 0x80008000u) == 0) return;
#pragma unroll
  for (int step = 0; step < kInputs / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bad = E4m3NanBytes(codes[step][i]);
      if (bad & 0x80u) a[step][i] |= 0x7FC0u;
      if (bad & 0x8000u) a[step][i] |= 0x7FC00000u;
    }
  }
}

// Two stages, which share a scale, at a time. Codes are read two stages ahead and decoded one
// stage ahead of their products.
template <typename Layout, int kTokens>
__device__ __forceinline__ void MultiplyFp8(const Args& args, const Part& part, int row,
                                            Ring<Layout>& ring, float (&sum)[kTokens / 2]) {
  const int blocks = args.k / (2 * kInputs);
  const uint8_t* scales = part.scale + int64_t{min(row, part.n - 1) / kRows} * blocks;
  Operands a[2], codes;
  uint32_t byte = __ldg(scales);
  Ring<Layout> ahead = ring;
  const auto load = [&] {
    Wait(ahead.Full(), ahead.phase);
    LoadCodes(codes, ahead.Weight());
    ahead.Next();
  };
  load();
  Decode(a[0], codes, byte);
  load();
  int before = 0;
  for (int block = 0; block < blocks; ++block) {
    const bool more = block + 1 < blocks;
    const uint32_t next_byte = more ? __ldg(scales + block + 1) : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < kInputs / 16; ++step) {
        Wgmma<kTokens, false>::Run(sum, a[i][step], SwizzledRows(ring.X() + step * 32),
                                   block > 0 || i + step > 0);
      }
      WgmmaCommit();
      WgmmaWait<1>();  // the other operands are free
      if (block + i > 0) Release(ring, before);
      before = ring.slot;
      ring.Next();
      if (i == 1) byte = next_byte;
      if (i == 0 || more) Decode(a[1 - i], codes, byte);
      if (more) load();
    }
  }
  WgmmaWait<0>();
  Release(ring, before);
}

// Four 8 x 8 BF16 of the lanes' pairs, columns of which become lines of 16 bytes in shared memory.
__device__ __forceinline__ void StoreColumns(uint32_t at, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// The way out of a warpgroup's sums: two buffers in turn, which the copy engine empties.
struct Outlet {
  uint32_t buffers;
  int turn = 0;

  __device__ __forceinline__ static bool Copies() { return threadIdx.x % 128 == 0; }
  __device__ __forceinline__ static void SyncWarpgroup() {
    asm volatile("bar.sync %0, 128;" ::"r"(threadIdx.x / 128 + 1) : "memory");
  }
  // A buffer that has been read.
  template <int kBytes>
  __device__ __forceinline__ uint32_t Take() {
    if (Copies()) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    SyncWarpgroup();
    const uint32_t buffer = buffers + turn * kBytes;
    turn ^= 1;
    return buffer;
  }
  __device__ __forceinline__ static void Copy(const CUtensorMap* map, int row_byte, int group,
                                              int token, uint32_t from) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
            map),
        "r"(row_byte), "r"(group), "r"(token), "r"(from)
        : "memory");
  }
  __device__ __forceinline__ static void Commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
  __device__ __forceinline__ static void Finish() {
    if (Copies()) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
};

// A lane's sums: rows g and g + 8 of the warp's 16, tokens 8 j + 2 c and the next. A buffer holds
// lines of 128 bytes, the rows of a token: 64 in BF16, and in FP32 half of them behind the others.
// Their pieces of 16 bytes are swapped by the lowest three bits of the token.
template <typename Layout, int kTokens>
__device__ __forceinline__ void StoreSums(const Args& args, const Part& part, const Place& place,
                                          const float (&sum)[kTokens / 2], Outlet& outlet) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = place.row + threadIdx.x / 128 * 64;
  if (part.y_bf16) {
    constexpr int kRound = Layout::kOutLines;
    const int in_block = lane % 8, piece = 2 * warp + lane / 8 % 2;
    const uint32_t mine = (lane / 16 * 8 + in_block) * kOutLine + ((piece ^ in_block) << 4);
#pragma unroll
    for (int first = 0; first < kTokens; first += kRound) {
      if (place.token + first >= args.t) break;
      const uint32_t buffer = outlet.Take<Layout::kOutBytes>();
#pragma unroll
      for (int token = 0; token < kRound; token += 16) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = (first + token) / 2 + i / 2 * 4 + i % 2 * 2;
          pairs[i] = PackBf16(sum[at], sum[at + 1]);
        }
        StoreColumns(buffer + mine + token * kOutLine, pairs);
      }
      FenceForAsyncReads();
      Outlet::SyncWarpgroup();
      if (Outlet::Copies()) {
        Outlet::Copy(&part.y, 2 * row, place.group, place.token + first, buffer);
        Outlet::Commit();
      }
    }
  } else {
    constexpr int kRound = Layout::kOutLines / 2;
    const int g = lane / 4, c = lane % 4;
    const uint32_t half = warp / 2 * kRound * kOutLine;
#pragma unroll
    for (int first = 0; first < kTokens; first += kRound) {
      if (place.token + first >= args.t) break;
      const uint32_t buffer = outlet.Take<Layout::kOutBytes>() + half;
#pragma unroll
      for (int token = 0; token < kRound; token += 8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int in_block = 2 * c + i % 2, piece = 4 * (warp % 2) + i / 2 * 2 + g / 4;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(buffer + (token + in_block) * kOutLine +
                                                       ((piece ^ in_block) << 4) + g % 4 * 4),
                       "f"(sum[(first + token) / 2 + i])
                       : "memory");
        }
      }
      FenceForAsyncReads();
      Outlet::SyncWarpgroup();
      if (Outlet::Copies()) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Outlet::Copy(&part.y, 4 * (row + 32 * i), place.group, place.token + first,
                       buffer - half + i * kRound * kOutLine);
        }
        Outlet::Commit();
      }
    }
  }
}

template <bool kFp8, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    Bf16PrefillKernel(const __grid_constant__ Args args) {
  using Layout = Stage<kFp8, kTokens>;
  extern __shared__ char raw[];
  __shared__ uint64_t barriers[2 * Layout::kCount];  // full, then empty
  const int rank = static_cast<int>(blockIdx.x) % kCluster;
  Ring<Layout> ring;
  ring.shared = (SharedAddress(raw) + 1023) / 1024 * 1024;  // the swizzle's pattern
  ring.full = SharedAddress(barriers);
  ring.empty = ring.full + 8 * Layout::kCount;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::kCount; ++i) {
      InitBarrier(ring.full + 8 * i, 1);
      InitBarrier(ring.empty + 8 * i, kReleases);
    }
    FenceBarrierInit();
  }
  SyncCluster();
  const int tiles = TilePairs(args, kTokens);
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int step = static_cast<int>(gridDim.x) / kCluster;
  WaitForPrevious();
  LetNextBegin();
  // The copying warp is one of a warpgroup that hands its registers to the others.
  if (threadIdx.x >= 128 * kWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 128 * kWarpgroups) {
      FillAll<Layout, kTokens>(args, ring, first, step, tiles, rank);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Outlet outlet;
    outlet.buffers =
        ring.shared + Layout::kCount * Layout::kBytes + threadIdx.x / 128 * 2 * Layout::kOutBytes;
    for (int index = first; index < tiles; index += step) {
      const Place place = Place::Of<kTokens>(args, index, rank);
      const Part& part = args.parts[place.part];
      float sum[kTokens / 2];  // the first product sets it
      if constexpr (kFp8) {
        MultiplyFp8<Layout, kTokens>(args, part, place.group * part.rows + place.row, ring, sum);
      } else {
        MultiplyBf16<Layout, kTokens>(args, ring, sum);
      }
      StoreSums<Layout, kTokens>(args, part, place, sum, outlet);
    }
    Outlet::Finish();
  }
  SyncCluster();  // the other may still arrive here
}

// Results [tokens, groups, row_bytes], written in boxes of one group.
bool MapRows(CUtensorMap& map, void* y, int64_t tokens, int64_t groups, int64_t row_bytes,
             int box_tokens) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(groups),
                               static_cast<cuuint64_t>(tokens)};
  const cuuint64_t pitch[2] = {sizes[0], sizes[0] * sizes[1]};
  const cuuint32_t box[3] = {kOutLine, 1, static_cast<cuuint32_t>(box_tokens)};
  const cuuint32_t steps[3] = {1, 1, 1};
  return TensorMapEncoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, y, sizes, pitch, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_NONE,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <bool kFp8, int kTokens>
cudaError_t Launch(Args& args, const LinearParams* parts, cudaStream_t stream) {
  using Layout = Stage<kFp8, kTokens>;
  const LinearParams& params = parts[0];
  if (!MakeMap(args.x, params.x, params.t, 2 * params.groups * params.k, kXLine, kTokens / kCluster,
               CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  for (int p = 0; p < args.n_parts; ++p) {
    if (!MakeMap(args.parts[p].weight, parts[p].weight, parts[p].n, params.k * (kFp8 ? 1 : 2),
                 Layout::kWeightLine, kRows,
                 kFp8 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B)) {
      return cudaErrorInvalidValue;
    }
    const int size = args.parts[p].y_bf16 ? 2 : 4;
    if (!MapRows(args.parts[p].y, parts[p].y, params.t, params.groups, size * args.parts[p].rows,
                 Layout::kOutLines * 2 / size)) {
      return cudaErrorInvalidValue;
    }
  }
  const auto kernel = Bf16PrefillKernel<kFp8, kTokens>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Layout::kSharedBytes);
  if (error != cudaSuccess) return error;
  int clusters = 0;
  error = MostClusters(kernel, kThreads, Layout::kSharedBytes, kCluster, clusters);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(std::min(TilePairs(args, kTokens), clusters) * kCluster));
  return LaunchDependent(kernel, grid, kThreads, Layout::kSharedBytes, stream, args, kCluster);
}

template <bool kFp8>
cudaError_t LaunchForm(Args& args, const LinearParams* parts, cudaStream_t stream) {
  // The width that takes the least time: so many rounds of all SMs, each of a cost as measured.
  constexpr int kCosts[] = {kFp8 ? 36 : 20, kFp8 ? 42 : 27, 48};
  int best = 0, least = INT32_MAX;
  for (int i = 0; i < 3; ++i) {
    const int clusters = Multiprocessors() / kCluster;
    const int cost = (TilePairs(args, 64 << i) + clusters - 1) / clusters * kCosts[i];
    if (cost <= least) best = 64 << i, least = cost;
  }
  switch (best) {
    case 64:
      return Launch<kFp8, 64>(args, parts, stream);
    case 128:
      return Launch<kFp8, 128>(args, parts, stream);
    default:
      return Launch<kFp8, 256>(args, parts, stream);
  }
}

}  // namespace

bool Bf16PrefillTakes(WeightForm form, const LinearParams& params) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool fp8 = form == WeightForm::kFp8;
  const int64_t rows = params.n / params.groups;
  return (fp8 || form == WeightForm::kBf16) && params.act == ActForm::kBf16 && !params.x_float32 &&
         params.k % (fp8 ? 2 * kInputs : kInputs) == 0 && rows % 8 == 0 &&
         (!fp8 || params.groups == 1 || rows % kRows == 0) &&
         std::max({params.n + kRows, 2 * params.groups * params.k, params.t + kBandTokens,
                   (params.t / 64 + 1) * (params.n / kRows + 1 + params.groups)}) <= INT32_MAX &&
         aligned(params.x) && aligned(params.weight) && aligned(params.y) &&
         TensorMapEncoder() != nullptr;
}

bool Bf16PrefillPays(const LinearParams& params) {
  return params.t > kFewTokens &&
         (params.n + kRows - 1) / kRows * params.t >= kTilesThatPay * kRows;
}

cudaError_t Bf16PrefillSm90(WeightForm form, const LinearParams* parts, int n_parts,
                            cudaStream_t stream) {
  static_assert(sizeof(Args) <= 4096);
  Args args = {};
  args.n_parts = n_parts;
  args.t = static_cast<int>(parts[0].t);
  args.k = static_cast<int>(parts[0].k);
  args.groups = static_cast<int>(parts[0].groups);
  for (int p = 0; p < n_parts; ++p) {
    Part& part = args.parts[p];
    part.scale = parts[p].scale;
    part.y_bf16 = parts[p].y_bf16;
    part.n = static_cast<int>(parts[p].n);
    part.rows = part.n / args.groups;
    part.first_tile = args.row_tiles;
    args.row_tiles += (part.rows + kRows - 1) / kRows;
  }
  return form == WeightForm::kFp8 ? LaunchForm<true>(args, parts, stream)
                                  : LaunchForm<false>(args, parts, stream);
}

}  // namespace dsv4
