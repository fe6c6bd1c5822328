// Routed experts in five launches: sort and lay out x, w1 and w3 with the SwiGLU, lay out h, w2,
// sum. Of a few picks three: each is a tile, whose x and h the products lay out themselves.
//
// Pairs of (token, pick) are sorted by expert into slots; an expert's run is cut into tiles for the
// tile kernel (common/tile_gemm_sm90.cu). Every thread block of the first launch counts the experts
// itself, which needs no word between them. Which slot of a run a pair gets may depend on the order
// of atomics; no result does, since a column is the same bits anywhere in a tile.
#include <cuda_bf16.h>

#include <algorithm>

#include "common/activations.cuh"
#include "common/barrier.cuh"
#include "common/tile_gemm.h"
#include "moe/moe.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kTeam = 16, kTeams = kThreads / kTeam;  // of many slots: lanes that lay out a row
constexpr int kMaxExperts = 1024;
constexpr int kFewPairs = 2048;  // that every thread block may go through
constexpr int kRankThreads = 1024, kRankBlocks = 64;
constexpr int kRankBatch = 8;  // pairs of a thread on their way at a time
constexpr int kPickBatch = 4;  // the same, of few
constexpr int kScan = 8;       // experts a lane looks through at a time

struct SlotPlace {
  int32_t tile_first;
  int32_t width;  // 0: padding
};

// What lies in the scratch buffer.
struct Work {
  int32_t* counts;  // tiles, slots
  Tile* tiles;
  SlotPlace* places;   // [slots]; of few pairs [pairs]
  int32_t* pair_slot;  // [pairs], -1: no part
  int32_t* slot_pair;  // [slots], of many pairs
  float* x_scale;      // [slots]
  float* h_scale;      // [slots]
  float* weight;       // [slots]
  char* x;             // tiles of x
  uint16_t* h;         // [slots, inter]
  char* h_tiles;       // tiles of h
  uint16_t* y;         // [slots, d]
};

struct Args {
  MoeParams params;
  Work work;
  int64_t padded_d, padded_inter;
  int min_width, max_width;
  bool many_widths;  // tiles have a ManyWidth
  bool fp8_mma[2];   // of the two products
  bool raw;          // a pair is a slot, without tables
  Picks picks;
};

__device__ __forceinline__ int Width(const Args& args, int count) {
  return max(args.many_widths ? ManyWidth(count) : TileWidth(count), args.min_width);
}

// An expert's run: tiles of about as many pairs each, since a narrow one takes nearly as long as a
// wide one. All but the last are full.
struct Run {
  int count, tiles, width, last_width;

  __device__ __forceinline__ Run(const Args& args, int pairs)
      : count(pairs),
        tiles((pairs + args.max_width - 1) / args.max_width),
        width(0),
        last_width(0) {
    if (count == 0) return;
    width = Width(args, (count + tiles - 1) / tiles);
    last_width = Width(args, count - Full());
  }
  __device__ __forceinline__ int Full() const { return (tiles - 1) * width; }
  __device__ __forceinline__ int Slots() const { return count == 0 ? 0 : Full() + last_width; }
  // Of the tile that the run's pair `rank` is in, if the run begins with slot `base`.
  __device__ __forceinline__ SlotPlace PlaceOf(int base, int rank) const {
    const int tile = rank / width;
    return {base + tile * width, tile < tiles - 1 ? width : last_width};
  }
  __device__ __forceinline__ Tile TileOf(int expert, int base, int tile) const {
    const bool last = tile == tiles - 1;
    return {expert, base + tile * width, last ? last_width : width, last ? count - Full() : width};
  }
};

// Both 4-bit forms take x in the same order.
constexpr WeightForm kLineForm = WeightForm::kNvfp4;

// A row into its column, by a team. `global`: the row's FP32 scale, 1 unless NVFP4.
template <int kLanes>
__device__ __forceinline__ void LayOut(const Args& args, const uint16_t* row, int64_t k,
                                       int64_t padded, bool fp8_mma, int width, int column,
                                       char* tile, float global) {
  if (fp8_mma) {
    StoreFp8Row<kLineForm, kLanes>(PlainRow{row, false}, k, padded, width, column,
                                   reinterpret_cast<uint8_t*>(tile), 0, 1);
    return;
  }
  StoreRow<kLineForm, kLanes>(PlainRow{row, false}, k, padded, args.params.act, global, width,
                              column, reinterpret_cast<uint16_t*>(tile), 0, 1);
}

// Whether rows have NVFP4 scales of their own.
__device__ __forceinline__ bool OwnScales(const MoeParams& params) {
  return params.act == ActForm::kNvfp4 && params.up_act_scale == nullptr;
}

__device__ __forceinline__ const uint16_t* RowOfPair(const MoeParams& params, int pair) {
  const int64_t token = static_cast<uint32_t>(pair) / static_cast<uint32_t>(params.k);
  return params.x + token * params.d;
}

// Where a slot is laid out; of width 0 if it is nobody's.
__device__ __forceinline__ SlotPlace PlaceOf(const Work& work, int slot) {
  return slot < work.counts[1] ? work.places[slot] : SlotPlace{0, 0};
}

// FP32 scale of a row of x; `largest` of its magnitudes.
__device__ __forceinline__ float UpScale(const MoeParams& params, int expert, uint32_t largest) {
  if (params.act != ActForm::kNvfp4) return 1.0f;
  return params.up_act_scale != nullptr ? StaticGlobalScale(__ldg(params.up_act_scale + expert))
                                        : TokenGlobalScale(__uint_as_float(largest));
}

__device__ __forceinline__ void NoteSlot(const Args& args, int expert, int pair, int slot,
                                         float global) {
  const MoeParams& params = args.params;
  args.work.x_scale[slot] = global;
  if (params.up_act_scale != nullptr) {
    args.work.h_scale[slot] = StaticGlobalScale(__ldg(params.down_act_scale + expert));
  }
  args.work.weight[slot] = params.expert_weight[pair];
}

// A pair's x into its slot. `largest`: of the row's magnitudes, if it has a scale of its own. A
// static scale of h is written down here, where the expert is known.
template <int kLanes>
__device__ __forceinline__ void FillSlot(const Args& args, int expert, int pair, int slot,
                                         SlotPlace place, uint32_t largest) {
  const MoeParams& params = args.params;
  const Work& work = args.work;
  const float global = UpScale(params, expert, largest);
  char* const to = work.x + place.tile_first * ColumnBytes(args.fp8_mma[0], args.padded_d);
  LayOut<kLanes>(args, RowOfPair(params, pair), place.width > 0 ? params.d : 0, args.padded_d,
                 args.fp8_mma[0], place.width, slot - place.tile_first, to, global);
  if (threadIdx.x % kLanes == 0 && place.width > 0) {
    NoteSlot(args, expert, pair, slot, global);
  }
}

// Of few pairs, rows are the work of whole thread blocks, a chunk of eight inputs a lane.
constexpr int kWarps = kThreads / 32;
constexpr int kBlockInputs = kThreads * kChunk;

// A row's chunk from input `at` on: on its way, then here.
struct RowChunk {
  const uint16_t* x;
  int64_t left;
  bool whole;
  uint4 words;

  __device__ __forceinline__ RowChunk(const uint16_t* row, int64_t at, int64_t k)
      : x(row + at),
        left(k - at),
        whole(k % kChunk == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0),
        words(make_uint4(0, 0, 0, 0)) {
    if (whole && left > 0) words = __ldg(reinterpret_cast<const uint4*>(x));
  }
  __device__ __forceinline__ void Take(float (&v)[kChunk]) const {
    UnpackChunk(words, v);
    if (whole) return;
    const Chunk part = LoadPart(x, false, left);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = part.v[i];
  }
};

// What the lane writes of it for the products, by all lanes of a warp.
__device__ __forceinline__ Fp8Line RoundedLine(float (&v)[kChunk], ActForm act, float global,
                                               bool fp8_mma) {
  const int lane = threadIdx.x % 32;
  if (fp8_mma) return Fp8LineOf<kLineForm>(EncodeFp8(v), lane);
  RoundChunk(v, act, global);
  return {LineOf<kLineForm>(v, lane), 0.0f};
}

__device__ __forceinline__ void StoreRowLine(const Fp8Line& line, int64_t at, bool fp8_mma,
                                             const SlotPlace& place, int column, char* tile) {
  constexpr int kStage = kFp8Stage<kLineForm>;
  const int lane = threadIdx.x % 32;
  if (fp8_mma) {
    uint8_t* const stage =
        reinterpret_cast<uint8_t*>(tile) + at / kStage * kStage / 32 * 33 * place.width;
    StoreFp8Line<kLineForm>(line, stage, static_cast<int>(at % kStage), place.width, column, lane);
  } else {
    reinterpret_cast<uint4*>(tile)[LineAt<kLineForm>(at, lane) * place.width + column] = line.codes;
  }
}

// Largest magnitude of a row, by all warps.
__device__ __forceinline__ uint32_t BlockMagnitude(const uint16_t* row, int64_t k) {
  __shared__ uint32_t warp_max[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t largest = RowMagnitude<32>(PlainRow{row, false}, k, warp, kWarps);
  if (threadIdx.x % 32 == 0) warp_max[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) largest = max(largest, warp_max[i]);
  return largest;
}

// Few pairs: a thread block per part of a token's x, which goes to all of its picks. Each counts
// the experts of all pairs, so that it can tell the slots of its own.
__global__ void __launch_bounds__(kThreads, 4) SortFewKernel(const __grid_constant__ Args args) {
  const MoeParams& params = args.params;
  const Work& work = args.work;
  __shared__ int count[kMaxExperts];
  __shared__ int2 run[kMaxExperts];  // slots, tiles
  __shared__ alignas(16) int16_t expert_of[kFewPairs];
  __shared__ SlotPlace places[kWarps];
  __shared__ int2 found[kWarps];  // slots of picks, and their experts; -1: no part
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int token = blockIdx.x, k = static_cast<int>(params.k);
  const int experts = static_cast<int>(params.experts);
  const int pairs = static_cast<int>(params.t * params.k);
  const bool first_part = blockIdx.y == 0;
  const uint16_t* const row = params.x + token * params.d;
  const int64_t at = int64_t{blockIdx.y} * kBlockInputs + thread * kChunk;
  WaitForPrevious();
  LetNextBegin();
  const RowChunk chunk(row, at, params.d);
  for (int e = thread; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  for (int first = thread; first < pairs; first += kThreads * kPickBatch) {
    int expert[kPickBatch];
#pragma unroll
    for (int i = 0; i < kPickBatch; ++i) {  // without branches: all on their way
      expert[i] = ExpertOf(args.picks, min(first + i * kThreads, pairs - 1));
    }
#pragma unroll
    for (int i = 0; i < kPickBatch; ++i) {
      const int pair = first + i * kThreads;
      if (pair >= pairs) break;
      expert_of[pair] = static_cast<int16_t>(expert[i]);
      if (expert[i] >= 0) atomicAdd(&count[expert[i]], 1);
    }
  }
  const uint32_t largest = OwnScales(params) ? BlockMagnitude(row, params.d) : 0;
  __syncthreads();
  for (int e = thread; e < experts; e += kThreads) {
    const Run of_expert(args, count[e]);
    run[e] = make_int2(of_expert.Slots(), of_expert.tiles);
  }
  __syncthreads();
  // Slots and tiles of the experts before `expert`.
  const auto before = [&](int expert) {
    int2 sum = make_int2(0, 0);
    for (int first = 0; first < expert; first += 32 * kScan) {
#pragma unroll
      for (int i = 0; i < kScan; ++i) {
        const int e = first + i * 32 + lane;
        if (e >= expert) continue;
        sum.x += run[e].x;
        sum.y += run[e].y;
      }
    }
    return make_int2(__reduce_add_sync(0xFFFFFFFFu, sum.x), __reduce_add_sync(0xFFFFFFFFu, sum.y));
  };
  if (token == 0 && first_part && warp == 0) {
    const int2 all = before(experts);
    if (lane == 0) work.counts[0] = all.y;
  }
  const bool fixed = params.up_act_scale != nullptr;
  float x[kChunk];
  chunk.Take(x);
  Fp8Line line = {};
  if (!fixed) line = RoundedLine(x, params.act, UpScale(params, 0, largest), args.fp8_mma[0]);
  for (int first = 0; first < k; first += kWarps) {  // picks, a warp each
    if (first > 0) __syncthreads();
    if (first + warp < k) {
      const int pair = token * k + first + warp, expert = expert_of[pair];
      int slot = -1;
      SlotPlace place = {0, 0};
      if (expert >= 0) {
        const int2 base = before(expert);
        int rank = 0;  // among the expert's pairs; eight at once
        for (int i = 8 * lane; i < pair; i += 8 * 32) {
          const uint4 eight = *reinterpret_cast<const uint4*>(expert_of + i);
          const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int other = static_cast<int16_t>(words[j / 2] >> j % 2 * 16);
            rank += i + j < pair && other == expert;
          }
        }
        rank = __reduce_add_sync(0xFFFFFFFFu, rank);
        const Run mine(args, count[expert]);
        slot = base.x + rank;
        place = mine.PlaceOf(base.x, rank);
        if (first_part && rank == 0) {
          for (int i = lane; i < mine.tiles; i += 32) {
            work.tiles[base.y + i] = mine.TileOf(expert, base.x, i);
          }
        }
      }
      if (lane == 0) {
        found[warp] = make_int2(slot, expert);
        places[warp] = place;
        if (first_part) {
          work.pair_slot[pair] = slot;
          work.places[pair] = place;
          if (slot >= 0) NoteSlot(args, expert, pair, slot, UpScale(params, expert, largest));
        }
      }
    }
    __syncthreads();
    for (int i = 0; i < min(kWarps, k - first); ++i) {
      const int slot = found[i].x;
      if (slot < 0) continue;
      if (fixed) {
        float own[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) own[j] = x[j];
        line = RoundedLine(own, params.act, UpScale(params, found[i].y, largest), args.fp8_mma[0]);
      }
      if (at >= args.padded_d) continue;
      const SlotPlace place = places[i];
      StoreRowLine(line, at, args.fp8_mma[0], place, slot - place.tile_first,
                   work.x + place.tile_first * ColumnBytes(args.fp8_mma[0], args.padded_d));
    }
  }
}

// Many pairs: a thread block counts all of them and finds slots for its own.
__global__ void __launch_bounds__(kRankThreads) RankKernel(const __grid_constant__ Args args) {
  __shared__ int total[kMaxExperts], rank[kMaxExperts];  // of all pairs, of those before the next
  __shared__ int slot_base[kMaxExperts], tile_base[kMaxExperts];
  LetNextBegin();
  const Work& work = args.work;
  const int experts = static_cast<int>(args.params.experts),
            pairs = static_cast<int>(args.params.t * args.params.k);
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int run = (pairs + blocks - 1) / blocks, begin = block * run, end = min(begin + run, pairs);
  for (int e = thread; e < experts; e += kRankThreads) total[e] = rank[e] = 0;
  __syncthreads();
  for (int first = thread; first < pairs; first += kRankThreads * kRankBatch) {
    int expert[kRankBatch];
#pragma unroll
    for (int i = 0; i < kRankBatch; ++i) {
      const int pair = first + i * kRankThreads;
      expert[i] = pair < pairs ? ExpertOf(args.picks, pair) : -1;
    }
#pragma unroll
    for (int i = 0; i < kRankBatch; ++i) {
      if (expert[i] < 0) continue;
      atomicAdd(&total[expert[i]], 1);
      if (first + i * kRankThreads < begin) atomicAdd(&rank[expert[i]], 1);
    }
  }
  __syncthreads();
  if (warp == 0) {  // runs of the experts, 32 at a time
    int slots = 0, tiles = 0;
    for (int first = 0; first < experts; first += 32) {
      const int e = first + lane, c = e < experts ? total[e] : 0;
      const Run own(args, c);
      const int own_slots = own.Slots(), own_tiles = own.tiles;
      int slot_sum = own_slots, tile_sum = own_tiles;
      for (int d = 1; d < 32; d *= 2) {
        const int a = __shfl_up_sync(0xFFFFFFFFu, slot_sum, d);
        const int b = __shfl_up_sync(0xFFFFFFFFu, tile_sum, d);
        if (lane >= d) {
          slot_sum += a;
          tile_sum += b;
        }
      }
      if (e < experts) {
        slot_base[e] = slots + slot_sum - own_slots;
        tile_base[e] = tiles + tile_sum - own_tiles;
      }
      slots += __shfl_sync(0xFFFFFFFFu, slot_sum, 31);
      tiles += __shfl_sync(0xFFFFFFFFu, tile_sum, 31);
    }
    if (lane == 0 && block == 0) {
      work.counts[0] = tiles;
      work.counts[1] = slots;
    }
  }
  __syncthreads();
  constexpr int kWarps = kRankThreads / 32;
  for (int e = block * kWarps + warp; e < experts; e += blocks * kWarps) {
    const Run own(args, total[e]);
    for (int i = lane; i < own.tiles; i += 32) {
      work.tiles[tile_base[e] + i] = own.TileOf(e, slot_base[e], i);
    }
    for (int i = own.count + lane; i < own.Slots(); i += 32) {
      work.places[slot_base[e] + i] = {0, 0};
    }
  }
  for (int pair = begin + thread; pair < end; pair += kRankThreads) {
    const int e = ExpertOf(args.picks, pair);
    int slot = -1;
    if (e >= 0) {
      const int at = atomicAdd(&rank[e], 1);
      slot = slot_base[e] + at;
      work.places[slot] = Run(args, total[e]).PlaceOf(slot_base[e], at);
      work.slot_pair[slot] = pair;
    }
    work.pair_slot[pair] = slot;
  }
}

// x of a slot per team: columns that lie side by side are written at about the same time.
__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ Args args) {
  const int slot = blockIdx.x * kTeams + threadIdx.x / kTeam;
  WaitForPrevious();
  LetNextBegin();
  const SlotPlace place = PlaceOf(args.work, slot);
  if (!__any_sync(0xFFFFFFFFu, place.width > 0)) return;
  const int pair = place.width > 0 ? args.work.slot_pair[slot] : 0;
  const int expert = place.width > 0 ? ExpertOf(args.picks, pair) : 0;
  uint32_t largest = 0;
  if (OwnScales(args.params)) {
    largest = RowMagnitude<kTeam>(PlainRow{RowOfPair(args.params, pair), false}, args.params.d);
  }
  FillSlot<kTeam>(args, expert, pair, slot, place, largest);
}

// h [slots, inter] into tiles, a slot per team.
__global__ void __launch_bounds__(kThreads) LayOutKernel(const __grid_constant__ Args args) {
  const Work& work = args.work;
  LetNextBegin();  // its table of tiles is older
  WaitForPrevious();
  const int slot = blockIdx.x * kTeams + threadIdx.x / kTeam;
  const SlotPlace place = PlaceOf(work, slot);
  if (!__any_sync(0xFFFFFFFFu, place.width > 0)) return;
  const int64_t inter = place.width > 0 ? args.params.inter : 0;
  const uint16_t* row = work.h + slot * args.params.inter;
  float global = 1.0f;
  if (OwnScales(args.params)) {
    global = TokenGlobalScale(__uint_as_float(RowMagnitude<kTeam>(PlainRow{row, false}, inter)));
    if (threadIdx.x % kTeam == 0 && place.width > 0) work.h_scale[slot] = global;
  } else if (args.params.act == ActForm::kNvfp4 && place.width > 0) {
    global = work.h_scale[slot];  // static, by NoteSlot
  }
  char* const to =
      work.h_tiles + place.tile_first * ColumnBytes(args.fp8_mma[1], args.padded_inter);
  LayOut<kTeam>(args, row, inter, args.padded_inter, args.fp8_mma[1], place.width,
                slot - place.tile_first, to, global);
}

// The same of few pairs, a thread block per part of one's row.
__global__ void __launch_bounds__(kThreads, 5) LayOutFewKernel(const __grid_constant__ Args args) {
  const MoeParams& params = args.params;
  const Work& work = args.work;
  // The kernel ahead has waited for the one that wrote these.
  const int pair = blockIdx.x, slot = __ldcg(work.pair_slot + pair);
  const int2 where = __ldcg(reinterpret_cast<const int2*>(work.places + pair));
  LetNextBegin();  // its table of tiles is older
  WaitForPrevious();
  if (slot < 0) return;
  const SlotPlace place = {where.x, where.y};
  const uint16_t* const row = work.h + slot * params.inter;
  const int64_t at = int64_t{blockIdx.y} * kBlockInputs + threadIdx.x * kChunk;
  const RowChunk chunk(row, at, params.inter);
  float h[kChunk];
  chunk.Take(h);
  float global = 1.0f;
  if (OwnScales(params)) {
    global = TokenGlobalScale(__uint_as_float(BlockMagnitude(row, params.inter)));
    if (blockIdx.y == 0 && threadIdx.x == 0) work.h_scale[slot] = global;
  } else if (params.act == ActForm::kNvfp4) {
    global = work.h_scale[slot];  // static, by NoteSlot
  }
  const Fp8Line line = RoundedLine(h, params.act, global, args.fp8_mma[1]);
  if (at >= args.padded_inter) return;
  StoreRowLine(line, at, args.fp8_mma[1], place, slot - place.tile_first,
               work.h_tiles + place.tile_first * ColumnBytes(args.fp8_mma[1], args.padded_inter));
}

// Eight channels of the result, or as many as are left.
__device__ __forceinline__ void StoreChunk(const MoeParams& params, int64_t to, int64_t left,
                                           const float (&v)[kChunk]) {
  char* const y = static_cast<char*>(params.y) + to * (params.y_bf16 ? 2 : 4);
  if (left >= kChunk && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
    uint4* const words = reinterpret_cast<uint4*>(y);
    if (params.y_bf16) {
      uint32_t pairs[kChunk / 2];
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) pairs[i] = PackBf16(v[2 * i], v[2 * i + 1]);
      words[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
      reinterpret_cast<float4*>(words)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(words)[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= left) return;
    if (params.y_bf16) {
      reinterpret_cast<__nv_bfloat16*>(y)[i] = __float2bfloat16_rn(v[i]);
    } else {
      reinterpret_cast<float*>(y)[i] = v[i];
    }
  }
}

// Chunks of BF16 as they lie, all on their way together, zeros beyond `left` and where there is
// none. kWhole: see LoadChunks.
template <bool kWhole, int kChunks>
__device__ __forceinline__ void LoadPacked(const uint16_t* const (&from)[kChunks], int64_t left,
                                           uint4 (&words)[kChunks]) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) words[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (from[i] == nullptr) continue;
    if constexpr (kWhole) {
      words[i] = __ldg(reinterpret_cast<const uint4*>(from[i]));
    } else {
      const Chunk part = LoadPart(from[i], false, left);
      uint32_t pairs[kChunk / 2];
#pragma unroll
      for (int j = 0; j < kChunk / 2; ++j) pairs[j] = PackBf16(part.v[2 * j], part.v[2 * j + 1]);
      words[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

__device__ __forceinline__ void AddTo(float (&sum)[kChunk], const uint4& words) {
  float v[kChunk];
  UnpackChunk(words, v);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum[i] = __fadd_rn(sum[i], v[i]);
}

// Sums of every token's picks, in their order, eight channels a thread; as many picks as most
// models have are on their way together.
constexpr int kPicks = 8;

// The pair's slot, or -1.
__device__ __forceinline__ int SlotOf(const Args& args, int pair) {
  if (!args.raw) return __ldg(args.work.pair_slot + pair);
  return ExpertOf(args.picks, pair) < 0 ? -1 : pair;
}

// Packed until they are added, so that four thread blocks' loads are on their way in an SM.
template <bool kWhole>
__global__ void __launch_bounds__(kThreads, kWhole ? 4 : 1)
    CombineKernel(const __grid_constant__ Args args) {
  const MoeParams& params = args.params;
  WaitForPrevious();
  const unsigned chunks = static_cast<unsigned>((params.d + kChunk - 1) / kChunk);
  const unsigned token = blockIdx.x;
  const unsigned chunk = blockIdx.y * kThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const int64_t at = int64_t{chunk} * kChunk, left = params.d - at;
  // The shared expert's result does not wait for the slots.
  const uint16_t* const shared[1] = {
      params.shared == nullptr ? nullptr : params.shared + token * params.d + at};
  uint4 of_shared[1];
  LoadPacked<kWhole>(shared, left, of_shared);
  float sum[kChunk] = {};
  for (int first = 0; first < static_cast<int>(params.k); first += kPicks) {
    const uint16_t* from[kPicks];
#pragma unroll
    for (int i = 0; i < kPicks; ++i) {
      const int slot =
          first + i < params.k ? SlotOf(args, static_cast<int>(token * params.k + first + i)) : -1;
      from[i] = slot < 0 ? nullptr : args.work.y + slot * params.d + at;
    }
    uint4 words[kPicks];
    LoadPacked<kWhole>(from, left, words);
#pragma unroll
    for (int i = 0; i < kPicks; ++i) {
      if (from[i] != nullptr) AddTo(sum, words[i]);
    }
  }
  if (shared[0] != nullptr) AddTo(sum, of_shared[0]);
  StoreChunk(params, token * params.d + at, left, sum);
}

int64_t Padded(int64_t inputs) { return (inputs + 127) / 128 * 128; }

Work Carve(const MoeParams& params, int64_t slots) {
  char* at = static_cast<char*>(params.scratch);
  const auto take = [&at](int64_t bytes) {
    char* const here = at;
    at += (bytes + 127) / 128 * 128;
    return here;
  };
  Work work;
  work.counts = reinterpret_cast<int32_t*>(take(128));
  work.tiles = reinterpret_cast<Tile*>(take((slots / 8 + 1) * static_cast<int64_t>(sizeof(Tile))));
  work.places = reinterpret_cast<SlotPlace*>(take(slots * 8));
  work.pair_slot = reinterpret_cast<int32_t*>(take(params.t * params.k * 4));
  work.slot_pair = reinterpret_cast<int32_t*>(take(slots * 4));
  work.x_scale = reinterpret_cast<float*>(take(slots * 4));
  work.h_scale = reinterpret_cast<float*>(take(slots * 4));
  work.weight = reinterpret_cast<float*>(take(slots * 4));
  work.x = take(slots * Padded(params.d) * 2);
  work.h = reinterpret_cast<uint16_t*>(take(slots * params.inter * 2));
  work.h_tiles = take(slots * Padded(params.inter) * 2);
  work.y = reinterpret_cast<uint16_t*>(take(slots * params.d * 2));
  return work;
}

}  // namespace

cudaError_t MoeCuda(const MoeParams& params, cudaStream_t stream) {
  if (params.t == 0) return cudaSuccess;
  const int64_t pairs = params.t * params.k;
  if (params.experts > kMaxExperts || pairs > INT32_MAX / 8) return cudaErrorInvalidConfiguration;
  const int64_t active = std::min(params.experts, pairs);
  Args args = {};
  args.params = params;
  args.work = Carve(params, MoeMaxSlots(pairs, params.experts));
  args.picks = {params.expert_idx,
                params.valid,
                params.first_expert,
                params.experts,
                static_cast<int32_t>(params.k),
                true};
  args.padded_d = Padded(params.d);
  args.padded_inter = Padded(params.inter);
  // Few tokens an expert: narrow tiles, and the memory is what counts.
  const bool few = params.regime != Regime::kPrefill && pairs <= 28 * params.experts;
  args.min_width = few ? 8 : kFewWidth + 32;
  args.max_width = !few ? kMaxTileWidth : pairs <= 4 * params.experts ? 16 : kFewWidth;
  const int64_t max_tiles = std::min(pairs, active + pairs / args.max_width);

  TileGemm gemm = {};
  gemm.form = params.form;
  gemm.store = Store::kSwiglu;
  gemm.weight[0] = params.w1.weight;
  gemm.weight[1] = params.w3.weight;
  gemm.scale[0] = params.w1.scale;
  gemm.scale[1] = params.w3.scale;
  gemm.global_scale[0] = params.w1.global_scale;
  gemm.global_scale[1] = params.w3.global_scale;
  gemm.groups = params.experts;
  gemm.rows = params.inter;
  gemm.inputs = params.d;
  gemm.padded_inputs = args.padded_d;
  gemm.x = args.work.x;
  gemm.column_scale = params.act == ActForm::kNvfp4 ? args.work.x_scale : nullptr;
  gemm.column_weight = args.work.weight;
  gemm.limit = params.limit;
  gemm.y = args.work.h;
  gemm.y_bf16 = true;
  gemm.width = args.max_width;
  gemm.tiles = args.work.tiles;
  gemm.tile_count = args.work.counts;
  gemm.max_tiles = max_tiles;
  gemm.new_tiles = true;
  gemm.split = few || params.regime == Regime::kDecode || params.regime == Regime::kExact;
  TileGemm down = gemm;
  down.store = Store::kSlots;
  down.new_tiles = false;
  down.weight[0] = down.weight[1] = params.w2.weight;
  down.scale[0] = down.scale[1] = params.w2.scale;
  down.global_scale[0] = down.global_scale[1] = params.w2.global_scale;
  down.rows = params.d;
  down.inputs = params.inter;
  down.padded_inputs = args.padded_inter;
  down.x = args.work.h_tiles;
  down.column_scale = params.act == ActForm::kNvfp4 ? args.work.h_scale : nullptr;
  down.y = args.work.y;
  const bool fp8 = params.act == ActForm::kFp8 && params.regime != Regime::kExact &&
                   (params.form == WeightForm::kMxfp4 || params.power_of_two);
  gemm.fp8_mma = args.fp8_mma[0] = fp8 && HopperTakes(gemm);
  down.fp8_mma = args.fp8_mma[1] = fp8 && HopperTakes(down);
  args.many_widths = !few && ManyGemmTakes(gemm) && ManyGemmTakes(down);

  const auto combine = [&] {
    const cudaError_t error = AwaitLate(stream);  // for the shared expert's
    if (error != cudaSuccess) return error;
    const int64_t chunks = (params.d + kChunk - 1) / kChunk;
    const dim3 grid(static_cast<unsigned>(params.t),
                    static_cast<unsigned>((chunks + kThreads - 1) / kThreads));
    const bool whole =
        params.d % kChunk == 0 && reinterpret_cast<uintptr_t>(params.shared) % 16 == 0;
    return LaunchDependent(whole ? CombineKernel<true> : CombineKernel<false>, grid, kThreads, 0,
                           stream, args);
  };
#ifdef DSV4_SM90
  // That are tiles of their own: two tokens of most models, six with NVFP4 activations.
  const int raw_pairs = params.act == ActForm::kNvfp4 ? 36 : 12;
  args.raw = few && pairs <= raw_pairs && HopperTakes(gemm) && HopperTakes(down) &&
             reinterpret_cast<uintptr_t>(params.x) % 16 == 0;
  if (args.raw) {
    for (TileGemm* one : {&gemm, &down}) {
      one->width = kRawWidth;
      one->max_tiles = pairs;
      one->tiles = nullptr;
      one->picks = args.picks;
      one->act = params.act;
      one->column_scale = nullptr;  // nothing fills it: the kernel has its own
      one->column_weight = params.expert_weight;
    }
    gemm.act_scale = params.up_act_scale;
    down.act_scale = params.down_act_scale;
    gemm.raw_x = params.x;
    down.raw_x = args.work.h;
    down.picks.share_x = false;
    down.weights_first = true;
    for (const TileGemm* one : {&gemm, &down}) {
      const cudaError_t error = RawGemmSm90(one, 1, stream);
      if (error != cudaSuccess) return error;
    }
    return combine();
  }
#endif

  const int64_t slots = MoeMaxSlots(pairs, params.experts);
  const bool few_pairs = pairs <= kFewPairs;
  const auto blocks_of = [](int64_t rows, int64_t padded) {
    return dim3(static_cast<unsigned>(rows),
                static_cast<unsigned>((padded + kBlockInputs - 1) / kBlockInputs));
  };
  const auto teams_of = [](int64_t rows) {
    return dim3(static_cast<unsigned>((rows + kTeams - 1) / kTeams));
  };
  if (few_pairs) {
    const cudaError_t sorted = LaunchDependent(SortFewKernel, blocks_of(params.t, args.padded_d),
                                               kThreads, 0, stream, args);
    if (sorted != cudaSuccess) return sorted;
  } else {
    const int64_t blocks =
        std::min<int64_t>(kRankBlocks, (pairs + kRankThreads - 1) / kRankThreads);
    RankKernel<<<static_cast<unsigned>(blocks), kRankThreads, 0, stream>>>(args);
    const cudaError_t gathered =
        LaunchDependent(GatherKernel, teams_of(slots), kThreads, 0, stream, args);
    if (gathered != cudaSuccess) return gathered;
  }
  cudaError_t error = RunTileGemms(&gemm, 1, stream);
  if (error != cudaSuccess) return error;

  error = few_pairs ? LaunchDependent(LayOutFewKernel, blocks_of(pairs, args.padded_inter),
                                      kThreads, 0, stream, args)
                    : LaunchDependent(LayOutKernel, teams_of(slots), kThreads, 0, stream, args);
  if (error != cudaSuccess) return error;
  error = RunTileGemms(&down, 1, stream);
  if (error != cudaSuccess) return error;
  return combine();
}

}  // namespace dsv4
