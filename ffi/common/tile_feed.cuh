// Stages of the tile kernel on Hopper: what lies in one, who fills it, who lets go of it.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "common/barrier.cuh"
#include "common/tile_gemm.h"
#include "common/tile_store.cuh"
#include "common/weights.cuh"

namespace dsv4 {
namespace tile {

constexpr int kRowBytes = 128;   // of every row in a stage: two pieces
constexpr int kScaleBytes = 16;  // of every row in a stage: the least the copy engine moves
constexpr int kBlockRows = 64;   // rows of an MMA
constexpr int kStepInputs = 16;
constexpr int kSumPitch = kBlockRows + 4;  // floats of a column of sums: other banks for the next
constexpr int kMaxSlots = 8;
// Stages that a thread block that lays out x has on their way at a time, however many slots are
// free. They keep the memory busy; behind more, whatever other kernels ask for would queue.
constexpr int kOnTheirWay = 2;

template <WeightForm kForm>
constexpr bool kFourBits = kForm == WeightForm::kMxfp4 || kForm == WeightForm::kNvfp4;
template <WeightForm kForm>
constexpr int kStageInputs = 2 * Weights<kForm>::kPieceInputs;

// A tile is two halves of rows. Of few columns, where latency and the memory are what counts, a
// half is an MMA block of 64 rows; one warpgroup has both, or two have one each. Of many (kMany) a
// half is twice as long, and two warpgroups have a block of each half. One more warp fills the
// stages. In a slim tile a warpgroup's one MMA block has rows of both halves: few rows, where
// thread blocks are so few that some SMs would have twice as many as others; of many columns see
// tile_many.cuh.
template <WeightForm kForm, bool kFp8Mma, bool kMany, typename A>
struct Stage {
  static constexpr bool kIsMany = kMany, kSlim = A::kSlim;
  static constexpr int kWarpgroups = A::kWarpgroups;
  static constexpr int kMultiplying = 128 * kWarpgroups;                   // threads
  static constexpr int kBlocks = kSlim ? 1 : kMany ? 2 : 2 / kWarpgroups;  // of a warpgroup
  // Rows of a half of the tile: half of an MMA block a warpgroup, two blocks, or one.
  static constexpr int kRows = (kSlim ? kWarpgroups : kMany ? 4 : 2) * (kBlockRows / 2);
  static constexpr int kScaleAt = 2 * kRows * kRowBytes;
  static constexpr int kColumnsAt = kScaleAt + (kFourBits<kForm> ? 2 * kRows * kScaleBytes : 0);
  // x of a stage; E4M3 comes with a scale per column and 128 inputs.
  __host__ __device__ static constexpr int ColumnBytes(int width) {
    return kFp8Mma ? kStageInputs<kForm> / 128 * width * (128 + 4)
                   : kStageInputs<kForm> * width * 2;
  }
  __host__ __device__ static constexpr int Bytes(int width) {
    return (kColumnsAt + ColumnBytes(width) + 1023) / 1024 * 1024;
  }
  // Sums of all rows, as they are when the stages are drained (Finish).
  static constexpr int SumBytes(int width) {
    return 2 * kRows / kBlockRows * width * kSumPitch * 4;
  }
};

// What a thread block works on: a tile times a block of rows.
struct Unit {
  Tile tile;
  unsigned index, block;  // of the tile, of rows
  unsigned weight;        // of several, whose rows
  // RawArgs:
  const float* x_scale = nullptr;  // NVFP4 activations: of the tile's columns
  struct Meeting* meeting = nullptr;
};

// One weight of several for the same x.
struct Part {
  CUtensorMap weight, scale;
  const uint8_t* fp8_scale;
  unsigned first_block;  // of rows, counted over all parts
  Output out;
};

// Without kSeveral what belongs to the only one is found at fixed places.
template <bool kSeveral>
struct Parts {
  // Of a pair (kSwiglu) the second has the other half's weights.
  Part parts[kSeveral ? kMaxLinearParts : 2];
  int n_parts;
  int cluster_log;   // log2 of the thread blocks that share the inputs
  int slots;         // stages in shared memory
  uint32_t nothing;  // 0, which the compiler does not know
  int64_t inputs, scale_columns;

  // Whose block of rows, counted over all parts, a thread block's is.
  __device__ __forceinline__ void FindPart(Unit& unit) const {
    if constexpr (kSeveral) {
      while (static_cast<int>(unit.weight) + 1 < n_parts &&
             unit.block >= parts[unit.weight + 1].first_block) {
        ++unit.weight;
      }
      unit.block -= parts[unit.weight].first_block;
    }
  }
  __device__ __forceinline__ const Part& PartOf(const Unit& unit) const {
    return parts[kSeveral ? unit.weight : 0];
  }
  __device__ __forceinline__ const Output& OutputOf(const Unit& unit) const {
    return PartOf(unit).out;
  }
  __device__ __forceinline__ void* YOf(const Unit& unit) const { return OutputOf(unit).y; }
  __device__ __forceinline__ const uint8_t* Fp8ScaleOf(const Unit& unit) const {
    return PartOf(unit).fp8_scale;
  }
  // Of a half's weights; a pair has two.
  __device__ __forceinline__ const Part& PartOf(const Unit& unit, int half) const {
    const bool pair = parts[0].out.store == Store::kSwiglu;
    return half > 0 && pair ? parts[1] : PartOf(unit);
  }
  __device__ __forceinline__ const CUtensorMap* WeightOf(const Unit& unit, int half) const {
    return &PartOf(unit, half).weight;
  }
  __device__ __forceinline__ const CUtensorMap* WeightScaleOf(const Unit& unit, int half) const {
    return &PartOf(unit, half).scale;
  }
};

template <bool kSeveral>
struct Args : Parts<kSeveral> {
  static constexpr bool kCopiesX = true, kSlim = false;
  static constexpr int kWarpgroups = 2;

  const void* x;
  const Tile* tiles;
  const int32_t* tile_count;
  bool new_tiles;

  __device__ __forceinline__ ColumnFactors FactorsOf(const Unit& unit, int column) const {
    return ColumnFactors(this->OutputOf(unit), unit.tile, column);
  }
};

// Of many columns and weights that are decoded (tile_many.cuh): three warpgroups' worth of slim
// tiles, which a thread block takes one after another.
struct ManyArgs : Args<false> {
  static constexpr bool kSlim = true;
  static constexpr int kWarpgroups = 3;

  unsigned row_blocks, max_tiles;
};

// Of a kernel that lays out x itself (tile_raw.cuh): of few tokens.
struct RawArgs : Parts<true> {
  static constexpr bool kCopiesX = false, kSlim = false;
  static constexpr int kWarpgroups = 1;

  const void* x;           // BF16 [tokens, groups, inputs], or E4M3 codes
  const uint8_t* x_scale;  // of codes: UE8M0 [tokens, groups, inputs / 128]
  const void* up;          // beside x that is its gate: the same
  ActForm act;
  const float* act_scale;
  Picks picks;         // each a tile
  bool weights_first;  // they may be read before what the kernel ahead writes

  __device__ __forceinline__ ColumnFactors FactorsOf(const Unit& unit, int column) const {
    ColumnFactors factors(this->OutputOf(unit), unit.tile, column);
    if (unit.x_scale != nullptr) factors.scale = unit.x_scale[column];
    return factors;
  }
};

// Of thread blocks that have an SM to themselves, where one warpgroup would leave it waiting.
struct AloneArgs : RawArgs {
  static constexpr int kWarpgroups = 2;
};

struct SlimArgs : RawArgs {
  static constexpr bool kSlim = true;
};

template <typename A>
__device__ __forceinline__ int ClusterRank(const A& args) {
  return static_cast<int>(blockIdx.x & ((1u << args.cluster_log) - 1));
}

// Copies of a stage, issued by one thread: weights of the halves, their scales, and x, which alone
// the kernel ahead lays out.
enum class Filling { kFirst, kSecond, kScales, kColumns };

template <WeightForm kForm, bool kFp8Mma, bool kMany, typename A>
__device__ __forceinline__ void Fill(const A& args, const Unit& unit, int stage, uint32_t to,
                                     uint32_t barrier, Filling what) {
  using Layout = Stage<kForm, kFp8Mma, kMany, A>;
  const Tile& tile = unit.tile;
  const Output& out = args.OutputOf(unit);
  const uint32_t column_bytes = A::kCopiesX ? Layout::ColumnBytes(tile.width) : 0;
  if (what == Filling::kColumns) {
    if constexpr (A::kCopiesX) {
      const char* x =
          static_cast<const char*>(args.x) + tile.first * dsv4::ColumnBytes(kFp8Mma, args.inputs);
      CopyBytes(to + Layout::kColumnsAt, x + static_cast<int64_t>(stage) * column_bytes,
                column_bytes, barrier);
    }
    return;
  }
  // First row of the halves among all rows of their weights.
  const bool pair = out.store == Store::kSwiglu;
  const int row = static_cast<int>(tile.group * out.rows) +
                  static_cast<int>(unit.block) * (pair ? 1 : 2) * Layout::kRows;
  const int second = row + (pair ? 0 : Layout::kRows);
  const auto copy_weights = [&](uint32_t into, int half, int first_row) {
    const CUtensorMap* const weights = args.WeightOf(unit, half);
    if constexpr (A::kCopiesX) {
      CopyTile(into, weights, stage * kRowBytes, first_row, barrier);
    } else {
      CopyTileOnce(into, weights, stage * kRowBytes, first_row, barrier);
    }
  };
  if (what == Filling::kFirst) {
    constexpr int kScales = kFourBits<kForm> ? 2 * Layout::kRows * kScaleBytes : 0;
    ArriveExpecting(barrier, 2 * Layout::kRows * kRowBytes + kScales + column_bytes);
    copy_weights(to, 0, row);
  } else if (what == Filling::kSecond) {
    copy_weights(to + Layout::kRows * kRowBytes, 1, second);
  } else if (kFourBits<kForm>) {
    const int column = kForm == WeightForm::kNvfp4 ? stage * 16 : stage / 2 * 16;
    CopyTile(to + Layout::kScaleAt, args.WeightScaleOf(unit, 0), column, row, barrier);
    CopyTile(to + Layout::kScaleAt + Layout::kRows * kScaleBytes, args.WeightScaleOf(unit, 1),
             column, second, barrier);
  }
}

// The stages of a thread block, in order: every one, or those that are its share of a cluster's.
template <WeightForm kForm, bool kFp8Mma, bool kMany, typename A>
struct Feed {
  const A& args;
  const Unit& unit;
  char* shared;
  // Barriers of its slots: of x that is laid out here `full` tells, and `landed` of the weights.
  uint32_t full, empty, landed;
  int stage_bytes, first, stages;
  int stage;  // now
  int slot = 0;
  uint32_t phase = 0;

  __device__ Feed(const A& a, const Unit& u, char* memory, uint32_t barriers)
      : args(a),
        unit(u),
        shared(memory),
        full(barriers),
        empty(barriers + 8 * kMaxSlots),
        landed(A::kCopiesX ? full : barriers + 16 * kMaxSlots) {
    stage_bytes = Stage<kForm, kFp8Mma, kMany, A>::Bytes(args.OutputOf(unit).width);
    first = stage = FirstOf(ClusterRank(args));
    stages = first + StagesOf(ClusterRank(args));
  }
  // Of the thread blocks of a cluster.
  __device__ __forceinline__ int FirstOf(int rank) const {
    return static_cast<int>(args.inputs / kStageInputs<kForm>) * rank >> args.cluster_log;
  }
  __device__ __forceinline__ int StagesOf(int rank) const {
    return FirstOf(rank + 1) - FirstOf(rank);
  }
  __device__ __forceinline__ void Copy(int of, int into, Filling what) const {
    Fill<kForm, kFp8Mma, kMany>(args, unit, of, SharedAddress(shared) + into * stage_bytes,
                                landed + 8 * into, what);
  }
  // All copies, by one thread. x comes from the kernel ahead: weights need not wait for it.
  __device__ __forceinline__ void FillAll() {
    for (int i = 0; i < args.slots && first + i < stages; ++i) {
      Copy(first + i, i, Filling::kFirst);
      Copy(first + i, i, Filling::kSecond);
      Copy(first + i, i, Filling::kScales);
    }
    WaitForPrevious();
    for (int i = 0; i < args.slots && first + i < stages; ++i) {
      Copy(first + i, i, Filling::kColumns);
    }
    FillRest(args.slots);
  }
  // Those behind some that are on their way.
  __device__ __forceinline__ void FillRest(int filled) {
    for (; stage < stages; Next()) {
      if (stage < first + filled) continue;
      AwaitEmpty();
#pragma unroll
      for (int what = 0; what < 4; ++what) Copy(stage, slot, static_cast<Filling>(what));
    }
  }
  // Of the next tile.
  __device__ __forceinline__ void Restart() { stage = first; }
  // All of the weights alone, a stage when one that was on its way before it has landed.
  __device__ __forceinline__ void FillWeights() {
    Feed older = *this;
    const int on_their_way = min(kOnTheirWay, args.slots);
    for (; stage < stages; Next()) {
      AwaitEmpty();
      if (stage - first >= on_their_way) {
        Wait(landed + 8 * older.slot, older.phase);
        older.Next();
      }
#pragma unroll
      for (int what = 0; what < 3; ++what) Copy(stage, slot, static_cast<Filling>(what));
    }
  }
  // The slot's stage before this one is read no more; at once where there was none.
  __device__ __forceinline__ void AwaitEmpty() const { Wait(empty + 8 * slot, phase ^ 1); }
  __device__ __forceinline__ const char* Here() const {
    Wait(full + 8 * slot, phase);
    if constexpr (!A::kCopiesX) Wait(landed + 8 * slot, phase);
    return shared + slot * stage_bytes;
  }
  __device__ __forceinline__ void Next() {
    ++stage;
    if (++slot == args.slots) {
      slot = 0;
      phase ^= 1;
    }
  }
  // A stage `back` before this one is read no more.
  __device__ __forceinline__ void Release(int back) const {
    const int old = slot < back ? slot - back + args.slots : slot - back;
    Arrive(empty + 8 * old);
  }
  // This stage, or one `back` before it, is read no more once `last` is there, which depends on all
  // that was read of it. Without waiting for it, an arrival can overtake a load, and the next copy
  // with it.
  __device__ __forceinline__ void ReleaseBehind(float last) const { ReleaseBehind(0, last); }
  __device__ __forceinline__ void ReleaseBehind(int back, float last) const {
    const int old = slot < back ? slot - back + args.slots : slot - back;
    Arrive(empty + 8 * old + (__float_as_uint(last) & args.nothing));
  }
};

// MMA row g of eight is row (g >> 1 | (g & 1) << 2): rows that a quarter of a warp reads together
// differ in the swizzle's high bit, so that they share no bank.
__device__ __forceinline__ int RowOf(int g) { return g >> 1 | (g & 1) << 2; }

// A lane's first row of a stage; the other is 8 on.
template <typename Layout>
__device__ __forceinline__ int LaneRow() {
  const int warp = threadIdx.x / 32, row = RowOf(threadIdx.x % 32 / 4);
  if constexpr (!Layout::kSlim) return 16 * warp + row;
  return warp / 2 * Layout::kRows + warp % 2 * 16 + row;
}

__device__ __forceinline__ const uint4& PieceOf(const char* rows, int row, int piece, int c) {
  return *reinterpret_cast<const uint4*>(rows + row * kRowBytes +
                                         (((4 * piece + c) ^ (row & 7)) << 4));
}

// Scales of the 128 rows that a warpgroup's MMA block is part of: half a tile never leaves them.
template <typename Layout, typename A>
__device__ __forceinline__ const uint8_t* Fp8ScaleRow(const A& args, const Unit& unit, int block) {
  const Output& out = args.OutputOf(unit);
  const int half = Layout::kBlocks > 1 ? block : threadIdx.x / 128;
  const int64_t row = (2 * int64_t{unit.block} + half) * Layout::kRows;
  const int64_t at = (unit.tile.group * out.rows + row) / 128;
  const int64_t last = (out.groups * out.rows - 1) / 128;
  return args.Fp8ScaleOf(unit) + (at < last ? at : last) * args.scale_columns;
}

// Of FP8 weights, one of a stage for each MMA block, read when the stage before begins.
template <WeightForm kForm, typename Layout>
struct Fp8ScaleBytes {
  const uint8_t* rows[Layout::kBlocks];
  uint32_t next[Layout::kBlocks] = {};

  template <typename A, typename F>
  __device__ __forceinline__ Fp8ScaleBytes(const A& args, const F& feed, const Unit& unit) {
    if constexpr (kForm == WeightForm::kFp8) {
#pragma unroll
      for (int block = 0; block < Layout::kBlocks; ++block) {
        rows[block] = Fp8ScaleRow<Layout>(args, unit, block);
        next[block] = __ldg(rows[block] + min(feed.stage, feed.stages - 1));
      }
    }
  }
  // Calls use(block, byte).
  template <typename F, typename Use>
  __device__ __forceinline__ void Take(const F& feed, const Use& use) {
    if constexpr (kForm == WeightForm::kFp8) {
#pragma unroll
      for (int block = 0; block < Layout::kBlocks; ++block) {
        use(block, next[block]);
        next[block] = __ldg(rows[block] + min(feed.stage + 1, feed.stages - 1));
      }
    }
  }
};

// The warps that multiply.
template <typename Layout>
__device__ __forceinline__ void SyncMultiplying() {
  asm volatile("bar.sync 1, %0;" ::"n"(Layout::kMultiplying) : "memory");
}

__device__ __forceinline__ void SyncCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// Two floats at an address of this thread block's shared memory, in another of the cluster.
__device__ __forceinline__ float2 LoadFrom(uint32_t address, int rank) {
  float2 value;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [there];\n}"
      : "=f"(value.x), "=f"(value.y)
      : "r"(address), "r"(rank));
  return value;
}

// Two rows' sums of both halves, added over the kCluster thread blocks in their order; all on their
// way together.
template <int kCluster>
__device__ __forceinline__ void AddUp(float2 (&value)[2], const float* from, int other_half) {
  float2 part[2][kCluster];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      part[half][i] = LoadFrom(SharedAddress(from + half * other_half), i);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    value[half] = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      value[half].x = __fadd_rn(value[half].x, part[half][i].x);
      value[half].y = __fadd_rn(value[half].y, part[half][i].y);
    }
  }
}

// Of the kernel of few tokens, whose thread blocks send their sums to those of the cluster that add
// them up: four columns each. They come into the slot that the receiver is the first to need no
// more, of which it tells the others.
constexpr int kOwnColumns = 4;
__device__ __forceinline__ int OwnColumns(int count, int rank) {
  return min(max(count - kOwnColumns * rank, 0), kOwnColumns);
}

struct Meeting {
  uint64_t may_send, received;  // barriers

  __device__ __forceinline__ void Init(const RawArgs& args, const Unit& unit) {
    const int own = OwnColumns(unit.tile.count, ClusterRank(args));
    InitBarrier(SharedAddress(&may_send), (unit.tile.count + kOwnColumns - 1) / kOwnColumns);
    InitBarrier(SharedAddress(&received), 1);
    if (own > 0) {
      const uint32_t bytes = 2 * kBlockRows * static_cast<uint32_t>(sizeof(float));
      ArriveExpecting(SharedAddress(&received), (own * bytes) << args.cluster_log);
    }
  }
};

// By the thread that has filled the stages: once the slot behind the last is free, which is for
// good.
template <typename F>
__device__ __forceinline__ void LetOthersSend(const RawArgs& args, const F& feed, const Unit& unit,
                                              Meeting& meeting) {
  if (OwnColumns(unit.tile.count, ClusterRank(args)) == 0) return;
  feed.AwaitEmpty();
  for (int rank = 0; rank < 1 << args.cluster_log; ++rank) {
    ArriveIn(SharedAddress(&meeting.may_send), rank);
  }
}

// Where the sums that a thread block receives are: of a column and a sender, both halves' rows.
template <typename F>
__device__ __forceinline__ float* ReceivedAt(const RawArgs& args, const F& feed, int rank,
                                             int column, int sender) {
  const int slot = feed.StagesOf(rank) % args.slots;
  float* const at = reinterpret_cast<float*>(feed.shared + slot * feed.stage_bytes);
  return at + (((column % kOwnColumns) << args.cluster_log) + sender) * 2 * kBlockRows;
}

template <int kBlocks, typename F>
__device__ __forceinline__ void SendSums(const RawArgs& args, const F& feed,
                                         const float (&acc)[kBlocks][kRawWidth / 2],
                                         const Unit& unit, int in_block, Meeting& meeting) {
  WaitForCluster();
  Wait(SharedAddress(&meeting.may_send), 0);
  const int c = threadIdx.x % 4, rank = ClusterRank(args);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const int column = 2 * c + odd, to = column / kOwnColumns;
    if (column >= unit.tile.count) continue;
    const float* const at = ReceivedAt(args, feed, to, column, rank) + in_block;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int half = kBlocks > 1 ? block : threadIdx.x / 128;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        StoreIn(at + half * kBlockRows + 8 * r, SharedAddress(&meeting.received), to,
                acc[block][2 * r + odd]);
      }
    }
  }
}

// Adds up what came of a column, in the order of the senders.
template <typename F>
__device__ __forceinline__ void AddReceived(const RawArgs& args, const F& feed, int column,
                                            float2 (&value)[2]) {
  const float* const from =
      ReceivedAt(args, feed, ClusterRank(args), column, 0) + 2 * (threadIdx.x % 32);
  value[0] = value[1] = make_float2(0.0f, 0.0f);
#pragma unroll 4
  for (int sender = 0; sender < 1 << args.cluster_log; ++sender) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 part = *reinterpret_cast<const float2*>(from + (2 * sender + half) * kBlockRows);
      value[half].x = __fadd_rn(value[half].x, part.x);
      value[half].y = __fadd_rn(value[half].y, part.y);
    }
  }
}

// Sums to where they belong. Through shared memory, column by column, so that rows lie side by
// side. In order: a lane's rows are g and g + 8, not those of LaneRow.
template <bool kInOrder, typename Layout, int kN, typename A, typename F>
__device__ __forceinline__ void Finish(const A& args, const F& feed,
                                       float (&acc)[Layout::kBlocks][kN / 2], float unit_scale,
                                       const Unit& unit) {
  constexpr bool kMany = Layout::kIsMany;
  constexpr int kRows = Layout::kRows;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int c = lane % 4, in_block = 16 * warp + (kInOrder ? lane / 4 : RowOf(lane / 4));
  const int cluster = 1 << args.cluster_log, rank = ClusterRank(args);
  WaitForPrevious();  // long past: scales of columns come from there
  const Tile& tile = unit.tile;
  const Output& out = args.OutputOf(unit);
  const Scales scales(out, tile.group);
  const Lines lines(out, tile, unit.index);
  const bool pair = out.store == Store::kSwiglu;
  void* const y = args.YOf(unit);
  // Of few columns a warp stores what both warpgroups have of some; of many each stores its own.
  constexpr int kSide = kMany ? 1 : Layout::kWarpgroups;
  constexpr int kWarps = 4 * kSide;  // that share the columns
  const int side = warpgroup / kSide, of_side = threadIdx.x / 32 % kWarps;
  // Rows of a half that they have, two of them a lane.
  constexpr int kSideRows = A::kSlim ? kBlockRows / 2 : kBlockRows, kLanes = kSideRows / 2;
  constexpr int kColumns = 32 / kLanes;
  const int lane_row = lane % kLanes * 2, lane_column = lane / kLanes;
  const int64_t row = int64_t{unit.block} * kRows * (pair ? 1 : 2) + side * kSideRows + lane_row;
  const auto finish = [&](auto& values, const auto& factors) {
    constexpr int kValues = std::extent_v<std::remove_reference_t<decltype(values)>>;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float by = __fmul_rn(unit_scale, __fmul_rn(scales.global[half], factors[i].scale));
        values[i][half].x = __fmul_rn(values[i][half].x, by);
        values[i][half].y = __fmul_rn(values[i][half].y, by);
      }
    }
    if (!pair) return;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i][0] = Swiglu(values[i][0], values[i][1], out.limit, factors[i].weight);
    }
  };
  const auto store = [&](const float2(&value)[2], int column) {
    const int64_t at = lines.first + column * lines.step + row;
    StoreTwo(out, y, value[0], pair || out.y_bf16, at, row);
    if (!pair) StoreTwo(out, y, value[1], out.y_bf16, at + kRows, row + kRows);
  };
  if constexpr (!A::kCopiesX && !A::kSlim) {
    if (cluster > 1) {
      Meeting& meeting = *unit.meeting;
      SendSums(args, feed, acc, unit, in_block, meeting);
      if (of_side >= OwnColumns(tile.count, rank)) return;
      const int column = kOwnColumns * rank + of_side;
      const ColumnFactors factors[1] = {args.FactorsOf(unit, column)};
      Wait(SharedAddress(&meeting.received), 0);
      float2 values[1][2];
      AddReceived(args, feed, of_side, values[0]);
      finish(values, factors);
      store(values[0], column);
      return;
    }
  }
  // A warp's columns. Of each a lane has the factors: reading them where they are used would be a
  // wait for every column.
  const bool shared_columns = A::kCopiesX && cluster > 1;
  const int first = shared_columns ? kWarps * rank + of_side : of_side;
  const int step = shared_columns ? kWarps * cluster : kWarps;
  ColumnFactors mine;
  if (first + lane * step < tile.count) mine = args.FactorsOf(unit, first + lane * step);
  SyncMultiplying<Layout>();  // the stages are drained
  float* const sums =
      reinterpret_cast<float*>(feed.shared) + side * (A::kSlim ? 1 : 2) * kN * kSumPitch;
#pragma unroll
  for (int block = 0; block < Layout::kBlocks; ++block) {
    const int half = Layout::kBlocks > 1 ? block : A::kSlim ? 0 : warpgroup;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int column = i / 4 * 8 + 2 * c + i % 2;
      sums[(half * kN + column) * kSumPitch + in_block + i % 4 / 2 * 8] = acc[block][i];
    }
  }
  constexpr int kOtherHalf = A::kSlim ? kSideRows : kN * kSumPitch;
  // The lane's column of those that a warp takes at a time.
  const auto column_at = [&](int i) { return first + (i * kColumns + lane_column) * step; };
  const auto sums_at = [&](int i) {
    return sums + min(column_at(i), tile.count - 1) * kSumPitch + lane_row;
  };
  if (A::kCopiesX && cluster > 1) {
    SyncCluster();
#pragma unroll 2
    for (int i = 0; first + i * kColumns * step < tile.count; ++i) {
      float2 values[1][2];
      const float* const from = sums_at(i);
      if (cluster == 8) {
        AddUp<8>(values[0], from, kOtherHalf);
      } else if (cluster == 4) {
        AddUp<4>(values[0], from, kOtherHalf);
      } else {
        AddUp<2>(values[0], from, kOtherHalf);
      }
      const ColumnFactors factors[1] = {mine.From(i * kColumns + lane_column)};
      finish(values, factors);
      if (column_at(i) < tile.count) store(values[0], column_at(i));
    }
    ArriveAtCluster();  // its shared memory is read until here
    WaitForCluster();
  } else {
    SyncMultiplying<Layout>();
    constexpr int kTogether = kMany ? 2 : 1;                                // side by side
    const bool words = kMany && (pair || out.y_bf16) && out.rows % 2 == 0;  // rows lie as pairs
    for (int i = 0; first + i * kColumns * step < tile.count; i += kTogether) {
      float2 values[kTogether][2];
      ColumnFactors factors[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const float* const from = sums_at(i + j);
        values[j][0] = *reinterpret_cast<const float2*>(from);
        values[j][1] = *reinterpret_cast<const float2*>(from + kOtherHalf);
        factors[j] = mine.From((i + j) * kColumns + lane_column);
      }
      finish(values, factors);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int column = column_at(i + j);
        if (column >= tile.count) continue;
        if (words) {
          __nv_bfloat162* const to =
              static_cast<__nv_bfloat162*>(y) + (lines.first + column * lines.step + row) / 2;
          if (row < out.rows) *to = __float22bfloat162_rn(values[j][0]);
          if (!pair && row + kRows < out.rows) {
            to[kRows / 2] = __float22bfloat162_rn(values[j][1]);
          }
        } else {
          store(values[j], column);
        }
      }
    }
  }
}

}  // namespace tile
}  // namespace dsv4
