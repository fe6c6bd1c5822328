// Many columns times MXFP4 weights, with E4M3 on both sides. Decoding takes more than two warps of
// a scheduler can hide from each other, so three warpgroups multiply. A lane has the same row of
// both halves of the tile: of a pair, the gate and what it gates. So the end of a tile is a matter
// of registers, no warp waits for another there, and a thread block goes on to its next tile, whose
// first stages are there already.
#pragma once

#include "common/tile_fp8.cuh"

namespace dsv4 {
namespace tile {

using ManyFeed = Feed<WeightForm::kMxfp4, true, true, ManyArgs>;
using ManyLayout = Stage<WeightForm::kMxfp4, true, true, ManyArgs>;

// A thread block's units, a block of rows of a tile each.
struct ManyUnits {
  unsigned first = 0, turn = blockIdx.x;

  // Each time those of the next tile's: else some would have all the wide tiles.
  __device__ __forceinline__ bool Next(const ManyArgs& args, Unit& unit) {
    const unsigned at = first + turn;
    unit.index = at / args.row_blocks;
    unit.block = at - unit.index * args.row_blocks;
    first += gridDim.x;
    turn = (turn + args.row_blocks) % gridDim.x;
    if (unit.index >= args.max_tiles) return false;
    return FindTile(args.OutputOf(unit), args.tiles, args.tile_count, unit.index, unit.tile);
  }
};

// A warp's first row of each half; a lane's is RowOf on.
__device__ __forceinline__ int ManyRow() { return static_cast<int>(threadIdx.x) / 32 * 8; }

// A row's scale would be one more multiplication for each element of a sum. Weights are E5M2
// instead, with their scale in them, where all scales that a warp has of 128 inputs are from 2^-14
// to 1: E4M3 relative to the largest of them is exact then, too, so that the bits are those of few
// columns. A product with other scales is as in tile_fp8.cuh.
constexpr uint32_t kLargestByte = 127, kExactTables = 15;

// Magnitudes(down) 2^-6, which are E5M2, too: the upper half of FP16.
__device__ __forceinline__ uint2 MagnitudesE5m2(int down) {
  const uint2 e4m3 = Magnitudes(down);
  const uint32_t word[2] = {e4m3.x, e4m3.y};
  uint32_t e5m2[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t halves = HalvesOfE4m3(word[i] >> 16 * j);
      asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair[j]) : "r"(halves), "r"(0x24002400u));  // 2^-6
    }
    e5m2[i] = __byte_perm(pair[0], pair[1], 0x7531);
  }
  return make_uint2(e5m2[0], e5m2[1]);
}

// Whether all of the warp's are as they are; else out.scale is the rows'.
__device__ __forceinline__ bool LoadAsTheyAre(Fp8Operand<WeightForm::kMxfp4>& out, const char* rows,
                                              const char* scales, int row, int c, int block,
                                              int stage, const uint2* tables) {
  uint32_t byte[2], down[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    byte[r] = ScaleByte(scales, row + ManyLayout::kRows * r, c, block, stage);
    down[r] = kLargestByte - byte[r];
  }
  const bool as_they_are = __all_sync(0xFFFFFFFFu, max(down[0], down[1]) < kExactTables);
  if (!as_they_are) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t top = LargestOfRow(byte[r]);
      down[r] = TableBelow(top, byte[r]);
      out.scale[r] = DecodeUe8m0(top);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint4 w = PieceOf(rows, row + ManyLayout::kRows * r, block, c);
    LookUpWords(out, r, w, 0, 3, tables[down[r]]);
  }
  return as_they_are;
}

// Scales of a lane's columns.
template <int kN>
struct ManyScales {
  float2 of[kN / 8];

  __device__ __forceinline__ explicit ManyScales(const float* scales) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      of[j] = *reinterpret_cast<const float2*>(scales + 8 * j + threadIdx.x % 4 * 2);
    }
  }
};

// Promote with scales that are here.
template <int kN, bool kOfRow>
__device__ __forceinline__ void AddMany(float* sum, const float (&part)[kN / 2],
                                        const Fp8Operand<WeightForm::kMxfp4>& operand,
                                        const ManyScales<kN>& scales) {
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const float scale = i % 2 ? scales.of[i / 4].y : scales.of[i / 4].x;
    const float by = kOfRow ? __fmul_rn(scale, operand.scale[i / 2 % 2]) : scale;
    sum[i] = __fmaf_rn(part[i], by, sum[i]);
  }
}

template <int kN>
__device__ __forceinline__ void MultiplyMany(ManyFeed& feed, const uint2* tables,
                                             float (&sum)[kN / 2]) {
  constexpr WeightForm kForm = WeightForm::kMxfp4;
  // As registers allow, columns in how many turns, and their scales before the product, which else
  // would end with a wait for them.
  constexpr int kTurns = kN > 112 ? 2 : 1, kPartN = kN / kTurns;
  constexpr bool kAhead = kPartN <= 80;
  const int row = ManyRow() + RowOf(threadIdx.x % 32 / 4), c = threadIdx.x % 4;
  while (feed.stage < feed.stages) {
    const char* const here = feed.Here();
    const char* const x = here + ManyLayout::kColumnsAt;
    const uint64_t matrices = CoreMatrices(SharedAddress(x), kN * 16);
    const float* const column_scales = reinterpret_cast<const float*>(x + kStageInputs<kForm> * kN);
    float last = 0.0f;
#pragma unroll
    for (int k = 0; k < kStageInputs<kForm> / 128; ++k) {
      Fp8Operand<kForm> operand;
      const bool as_they_are =
          LoadAsTheyAre(operand, here, here + ManyLayout::kScaleAt, row, c, k, feed.stage, tables);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const float* const of_turn = column_scales + k * kN + turn * kPartN;
        float* const to = sum + turn * (kPartN / 2);
        float part[kPartN / 2];
        const auto multiply = [&] {
          WgmmaFence();
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            WgmmaE5m2<kPartN>::Run(part, operand.a[step],
                                   Further(matrices, (4 * k + step) * 32 * kN + turn * kPartN * 16),
                                   step > 0);
          }
          WgmmaCommit();
          WgmmaWait<0>();
        };
        if constexpr (kAhead) {
          const ManyScales<kPartN> scales(of_turn);
          multiply();
          if (as_they_are) {
            AddMany<kPartN, false>(to, part, operand, scales);
          } else {
            AddMany<kPartN, true>(to, part, operand, scales);
          }
          last = scales.of[kPartN / 8 - 1].y;
        } else {
          multiply();
          last = as_they_are ? Promote<kForm, kPartN, false>(to, part, operand, of_turn, c)
                             : Promote<kForm, kPartN>(to, part, operand, of_turn, c);
        }
      }
    }
    feed.ReleaseBehind(last);
    feed.Next();
  }
}

// Of 8 rows and 8 columns a lane has two columns of row lane / 4, by RowOf: then two rows of column
// lane / 4, from FirstOfRows on.
__device__ __forceinline__ uint32_t RowsOf(uint32_t columns) {
  uint32_t rows;  // RowOf(2 c) and RowOf(2 c + 1), c = lane % 4
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(rows) : "r"(columns));
  const uint32_t others = __shfl_xor_sync(0xFFFFFFFFu, rows, 1);
  return __byte_perm(rows, others, threadIdx.x % 2 ? 0x3276 : 0x5410);
}
__device__ __forceinline__ int FirstOfRows() {
  const int c = threadIdx.x % 4;
  return c % 2 ? c + 3 : c;
}

// Two columns of a row, BF16.
__device__ __forceinline__ uint32_t SwigluOf(uint2 halves, float limit, float2 weight) {
  return PackBf16(__fmul_rn(weight.x, ExpertSwiglu(Low(halves.x), Low(halves.y), limit)),
                  __fmul_rn(weight.y, ExpertSwiglu(High(halves.x), High(halves.y), limit)));
}

// Eight columns at a time, in a loop: code for all of them would not stay in the instruction cache.
// So BF16 sums go through a lane's places in shared memory, 32 apart, some columns' at once.
constexpr int kManyPlaces = 12;  // of a lane
constexpr int kManyPlaceBytes = ManyLayout::kMultiplying * kManyPlaces * 8;

// As they are: FP32, or rows that are no pairs.
template <int kN>
__device__ __forceinline__ void StoreElements(const Output& out, const Tile& tile,
                                              const Lines& lines, void* y, int64_t row,
                                              const float (&sum)[kN / 2]) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int64_t column = i / 4 * 8 + 2 * c + i % 2;
    const int64_t here = row + i / 2 % 2 * ManyLayout::kRows + RowOf(threadIdx.x % 32 / 4);
    if (here >= out.rows || column >= tile.count) continue;
    const int64_t at = lines.first + column * lines.step + here;
    if (out.y_bf16) {
      static_cast<__nv_bfloat16*>(y)[at] = __float2bfloat16_rn(sum[i]);
    } else {
      static_cast<float*>(y)[at] = sum[i];
    }
  }
}

template <int kN>
__device__ __forceinline__ void StoreMany(const ManyArgs& args, const Unit& unit,
                                          const float (&sum)[kN / 2], uint2* places) {
  constexpr int kColumns = kN / 8, kAtOnce = kColumns > kManyPlaces ? 8 : kColumns;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const Tile& tile = unit.tile;
  const Output& out = args.OutputOf(unit);
  const Lines lines(out, tile, unit.index);
  const bool pair = out.store == Store::kSwiglu;
  const int64_t row = int64_t{unit.block} * ManyLayout::kRows * (pair ? 1 : 2) + ManyRow();
  if (!pair && (!out.y_bf16 || out.rows % 2 != 0)) {
    StoreElements<kN>(out, tile, lines, args.YOf(unit), row, sum);
    return;
  }
  const int64_t here = row + FirstOfRows();
  char* to = static_cast<char*>(args.YOf(unit)) + 2 * (lines.first + g * lines.step + here);
  const bool stores[2] = {here < out.rows, !pair && here + ManyLayout::kRows < out.rows};
#pragma unroll
  for (int first = 0; first < kColumns; first += kAtOnce) {
    const int most = kColumns - first < kAtOnce ? kColumns - first : kAtOnce;
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const float* const four = sum + 4 * (first + i);
      places[i * 32] = make_uint2(PackBf16(four[0], four[1]), PackBf16(four[2], four[3]));
    }
    const int left = (tile.count - 8 * first + 7) / 8;
#pragma unroll 2
    for (int i = 0; i < min(most, left); ++i) {
      uint2 halves = places[i * 32];
      const int column = 8 * (first + i);
      if (pair) {
        float2 weight = make_float2(0.0f, 0.0f);
        const float* const weights = out.column_weight + tile.first + column + 2 * c;
        if (column + 2 * c < tile.count) weight.x = weights[0];
        if (column + 2 * c + 1 < tile.count) weight.y = weights[1];
        halves.x = SwigluOf(halves, out.limit, weight);
      }
      const bool there = column + g < tile.count;
      halves.x = RowsOf(halves.x);
      if (there && stores[0]) *reinterpret_cast<uint32_t*>(to) = halves.x;
      if (!pair) {
        halves.y = RowsOf(halves.y);
        if (there && stores[1]) {
          *reinterpret_cast<uint32_t*>(to + 2 * ManyLayout::kRows) = halves.y;
        }
      }
      to += 16 * lines.step;
    }
  }
}

}  // namespace tile
}  // namespace dsv4
