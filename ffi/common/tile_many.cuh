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
// instead, with their scale in them, where all scales that a warpgroup has of a stage are from
// 2^-14 to 1: E4M3 relative to the largest of 128 inputs is exact then, too, so that the bits are
// those of few columns. A stage with other scales is as in tile_fp8.cuh.
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

// Those of a scale's byte.
constexpr int kManyTables = kLargestByte + 1;
__device__ __forceinline__ uint2 ManyTable(uint32_t byte) {
  return MagnitudesE5m2(static_cast<int>(min(kLargestByte - byte, uint32_t{kTables - 1})));
}

// Keeps the compiler from computing x anew where it is used.
__device__ __forceinline__ int Kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Of matrices the half that is not known beforehand.
__device__ __forceinline__ uint64_t Kept(uint64_t matrices) {
  return matrices >> 32 << 32 | static_cast<uint32_t>(Kept(static_cast<int>(matrices)));
}

// Where in a stage a lane finds its part.
struct ManyLane {
  int weights;  // of its first row, for the first product; for the second the other 64 bytes
  int scales;   // of its first row
  int c;        // of its columns, among the four lanes of a row

  __device__ __forceinline__ ManyLane() {
    const int row = ManyRow() + RowOf(threadIdx.x % 32 / 4), c = threadIdx.x % 4;
    weights = Kept(row * kRowBytes + ((c ^ (row & 7)) << 4));
    scales = Kept(ManyLayout::kScaleAt + row * kScaleBytes + c);
    this->c = Kept(c);
  }
};

// Scales of a lane's two rows for the two products of a stage.
struct ManyBytes {
  uint32_t of[2][2];  // [product, row]

  __device__ __forceinline__ explicit ManyBytes(const char* scales) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const char* const at = scales + r * (ManyLayout::kRows * kScaleBytes) + 4 * k;
        of[k][r] = *reinterpret_cast<const uint8_t*>(at);
      }
    }
  }
  // Whether all of the warpgroup's can be in the weights: its warps multiply together.
  __device__ __forceinline__ bool Exact() const {
    const uint32_t most = max(max(kLargestByte - of[0][0], kLargestByte - of[0][1]),
                              max(kLargestByte - of[1][0], kLargestByte - of[1][1]));
    uint32_t all;
    asm volatile(
        "{\n.reg .pred mine, all;\nsetp.lt.u32 mine, %1, %2;\n"
        "bar.red.and.pred all, %3, 128, mine;\nselp.u32 %0, 1, 0, all;\n}"
        : "=r"(all)
        : "r"(most), "n"(kExactTables), "r"(1 + threadIdx.x / 128)
        : "memory");
    return all != 0;
  }
};

// Columns of the first product of 128 inputs, as registers allow; the others are a second one's.
template <int kN>
constexpr int kManyAtOnce = kN > 112 ? 64 : kN;

template <int kN>
__device__ __forceinline__ void MultiplyMany(ManyFeed& feed, const uint2* tables,
                                             const ManyLane& lane, float (&sum)[kN / 2]) {
  constexpr WeightForm kForm = WeightForm::kMxfp4;
  static_assert(kStageInputs<kForm> == 256);
  while (feed.stage < feed.stages) {
    const char* const here = feed.Here();
    const ManyBytes bytes(here + lane.scales + (feed.stage & 1) * 8);
    const bool exact = bytes.Exact();
    const char* const x = here + ManyLayout::kColumnsAt;
    const uint64_t matrices = Kept(CoreMatrices(SharedAddress(x), kN * 16));
    const auto column_scales = reinterpret_cast<const float*>(x + kStageInputs<kForm> * kN);
    float last = 0.0f;
    const auto multiply = [&](auto exactly) {
      constexpr bool kOfRow = !decltype(exactly)::value;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        Fp8Operand<kForm> operand;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t byte = bytes.of[k][r];
          if constexpr (kOfRow) {
            const uint32_t top = LargestOfRow(byte);
            operand.scale[r] = DecodeUe8m0(top);
            byte = kLargestByte - TableBelow(top, byte);
          }
          const char* const weights =
              here + (lane.weights ^ 64 * k) + r * (ManyLayout::kRows * kRowBytes);
          LookUpWords(operand, r, *reinterpret_cast<const uint4*>(weights), 0, 3, tables[byte]);
        }
        const auto part_of = [&](auto from, auto columns) {
          constexpr int kFirst = decltype(from)::value, kPartN = decltype(columns)::value;
          float part[kPartN / 2];
          WgmmaFence();
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            WgmmaE5m2<kPartN>::Run(part, operand.a[step],
                                   Further(matrices, (4 * k + step) * 32 * kN + kFirst * 16),
                                   step > 0);
          }
          WgmmaCommit();
          WgmmaWait<0>();
          last = Promote<kForm, kPartN, true, kOfRow>(sum + kFirst / 2, part, operand.scale,
                                                      column_scales + k * kN + kFirst, lane.c);
        };
        constexpr int kPart = kManyAtOnce<kN>;
        part_of(std::integral_constant<int, 0>(), std::integral_constant<int, kPart>());
        if constexpr (kPart < kN) {
          part_of(std::integral_constant<int, kPart>(), std::integral_constant<int, kN - kPart>());
        }
      }
    };
    if (exact) {
      multiply(std::true_type());
    } else {
      multiply(std::false_type());
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
// So BF16 sums go through a warp's places in shared memory, some columns' at once.
constexpr int kManyPlaces = 12;
struct ManyPlaces {  // of a warp
  uint2 sums[kManyPlaces][32];
  float weights[kMaxTileWidth];  // of its tile's columns
};
constexpr int kManyPlaceBytes = ManyLayout::kMultiplying / 32 * sizeof(ManyPlaces);

// Weights of a pair's columns, on their way while the tile is multiplied; zeros beyond the last.
__device__ __forceinline__ void FetchWeights(const Output& out, const Tile& tile,
                                             ManyPlaces& places) {
  if (out.store != Store::kSwiglu) return;
#pragma unroll
  for (int i = 0; i < kMaxTileWidth; i += 32) {
    const int column = i + threadIdx.x % 32;
    const bool there = column < tile.count;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                     SharedAddress(places.weights + column)),
                 "l"(out.column_weight + tile.first + (there ? column : 0)), "r"(there ? 4 : 0)
                 : "memory");
  }
}
__device__ __forceinline__ void AwaitWeights() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

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
                                          const float (&sum)[kN / 2], ManyPlaces& places) {
  constexpr int kColumns = kN / 8, kAtOnce = kColumns > kManyPlaces ? 8 : kColumns;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
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
  AwaitWeights();
  const bool stores[2] = {here < out.rows, !pair && here + ManyLayout::kRows < out.rows};
#pragma unroll
  for (int first = 0; first < kColumns; first += kAtOnce) {
    const int most = kColumns - first < kAtOnce ? kColumns - first : kAtOnce;
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const float* const four = sum + 4 * (first + i);
      places.sums[i][lane] = make_uint2(PackBf16(four[0], four[1]), PackBf16(four[2], four[3]));
    }
    const int left = (tile.count - 8 * first + 7) / 8;
#pragma unroll 2
    for (int i = 0; i < min(most, left); ++i) {
      uint2 halves = places.sums[i][lane];
      const int column = 8 * (first + i);
      if (pair) {
        const auto weight = *reinterpret_cast<const float2*>(places.weights + column + 2 * c);
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
