// Products with E4M3 on both sides: per 128 inputs one of its own, whose scales (the weights', a
// column's) go in when it is added in FP32, since the tensor cores keep 14 bits of an E4M3 sum.
// 4-bit weights become E4M3 with their scale (NVFP4's: powers of two) relative to the largest of
// the row's 128 inputs: exactly, as long as it is within 2^-14 of it; below, rounded. MXFP4 ones of
// many columns: E5M2, of the same values.
#pragma once

#include "common/tile_feed.cuh"
#include "common/wgmma.cuh"

namespace dsv4 {
namespace tile {

// Weights of an MMA block: of 4 bits in registers, of 8 where they lie.
template <WeightForm kForm>
struct Fp8Operand {
  uint32_t a[4][4];
  float scale[2];  // of rows g and g + 8
};
template <>
struct Fp8Operand<WeightForm::kFp8> {
  uint64_t a[4];
  float scale[1];
};

// E4M3 of the magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6 times 2^(6 - down), nearest even.
__device__ __forceinline__ uint2 Magnitudes(int down) {
  const float unit = __uint_as_float(static_cast<uint32_t>(127 + 6 - down) << 23);
  const float value[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  uint32_t half[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(codes)
        : "f"(value[2 * i + 1] * unit), "f"(value[2 * i] * unit));
    half[i] = codes;
  }
  return make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
}
constexpr int kTables = 24;  // beyond, everything is zero

// Eight E2M1 codes by table: codes 0..3 and 4..7.
__device__ __forceinline__ void LookUp(uint32_t word, uint32_t low, uint32_t high, uint32_t& first,
                                       uint32_t& second) {
  const uint32_t select = word & 0x77777777u, shifted = word << 4;
  uint32_t lower, upper;  // magnitudes; __byte_perm would mask the selectors again
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(lower) : "r"(low), "r"(high), "r"(select));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(upper) : "r"(low), "r"(high), "r"(select >> 16));
  // The top bits of the bytes of both words are the eight signs.
  first = lower | (__byte_perm(shifted, word, 0x5140) & 0x80808080u);
  second = upper | (__byte_perm(shifted, word, 0x7362) & 0x80808080u);
}

// log2 + 7 of two E4M3 bytes that are powers of two; of zero, so little that its table is all
// zeros.
__device__ __forceinline__ void ExponentsOfE4m3(uint32_t bytes, int& first, int& second) {
  const uint32_t halves = HalvesOfE4m3(bytes);
  const int low = static_cast<int>(halves >> 10 & 31u), high = static_cast<int>(halves >> 26 & 31u);
  first = low == 0 ? -kTables : low - 8;
  second = high == 0 ? -kTables : high - 8;
}

// MXFP4's scale of a row's 32 inputs, and the largest of the four lanes that have its 128.
__device__ __forceinline__ uint32_t ScaleByte(const char* scales, int row, int c, int block,
                                              int stage) {
  return *reinterpret_cast<const uint8_t*>(scales + row * kScaleBytes + (stage & 1) * 8 +
                                           4 * block + c);
}
__device__ __forceinline__ uint32_t LargestOfRow(uint32_t byte) {
  const uint32_t top = max(byte, __shfl_xor_sync(0xFFFFFFFFu, byte, 1));
  return max(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
}

// Which table a scale takes relative to that.
__device__ __forceinline__ uint32_t TableBelow(uint32_t top, uint32_t byte) {
  return min(top - byte, static_cast<uint32_t>(kTables - 1));
}

// Words `first` to `last` of row g (+ 8 if `r`) by a table.
template <WeightForm kForm>
__device__ __forceinline__ void LookUpWords(Fp8Operand<kForm>& out, int r, uint4 w, int first,
                                            int last, uint2 table) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = first; i <= last; ++i) {
    LookUp(words[i], table.x, table.y, out.a[i][r], out.a[i][2 + r]);
  }
}

template <WeightForm kForm>
__device__ __forceinline__ void LoadOperand(Fp8Operand<kForm>& out, const char* rows,
                                            const char* scales, int row, int c, int block,
                                            int stage, const uint2* tables) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r;
    const uint4 w = PieceOf(rows, at, block, c);
    const char* scale = scales + at * kScaleBytes;
    if constexpr (kForm == WeightForm::kNvfp4) {  // two scales, each a power of two
      const uint32_t bytes = *reinterpret_cast<const uint16_t*>(scale + 8 * block + 2 * c);
      int exponents[2];
      ExponentsOfE4m3(bytes, exponents[0], exponents[1]);
      int top = max(exponents[0], exponents[1]);
      top = max(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      top = max(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 table = tables[min(top - exponents[half], kTables - 1)];
        LookUpWords(out, r, w, 2 * half, 2 * half + 1, table);
      }
      out.scale[r] = top < -2 ? 0.0f : __uint_as_float(static_cast<uint32_t>(127 - 13 + top) << 23);
    } else {
      const uint32_t byte = ScaleByte(scales, at, c, block, stage);
      const uint32_t top = LargestOfRow(byte);
      LookUpWords(out, r, w, 0, 3, tables[TableBelow(top, byte)]);
      out.scale[r] = __fmul_rn(DecodeUe8m0(top), 0x1p-6f);
    }
  }
}

// Scales of the lane's columns of sixteen from 16 i on: 2 c, 2 c + 1, 2 c + 8 and 2 c + 9, as far
// as there are so many. kFours: as ScalePlace has them.
template <int kN, bool kFours>
__device__ __forceinline__ float4 ScalesOf(const float* column_scale, int i, int c) {
  const float* const at = column_scale + 16 * i;
  const bool all = 16 * i + 8 < kN;
  if (kFours && all) return *reinterpret_cast<const float4*>(at + 4 * c);
  const float2 first = *reinterpret_cast<const float2*>(at + 2 * c);
  float2 second = first;
  if (all) second = *reinterpret_cast<const float2*>(at + 8 + 2 * c);
  return make_float4(first.x, first.y, second.x, second.y);
}

// sum += part * row scale (if kOfRow) * column scale; all rows have one scale with kFp8. Returns
// the last column scale that it read.
template <WeightForm kForm, int kN, bool kFours, bool kOfRow = true>
__device__ __forceinline__ float Promote(float* sum, const float (&part)[kN / 2],
                                         const float* row_scale, const float* column_scale, int c) {
  float last = 0.0f;
#pragma unroll
  for (int i = 0; i < (kN + 15) / 16; ++i) {
    const float4 four = ScalesOf<kN, kFours>(column_scale, i, c);
    const float of_column[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 8 * i; j < 8 * i + 8 && j < kN / 2; ++j) {
      last = of_column[j / 4 % 2 * 2 + j % 2];
      float by = last;
      if constexpr (kOfRow) {
        by = __fmul_rn(last, row_scale[kForm == WeightForm::kFp8 ? 0 : j / 2 % 2]);
      }
      sum[j] = __fmaf_rn(part[j], by, sum[j]);
    }
  }
  return last;
}

// Whether the tensor cores are at one product while the one before is added up and the next one's
// weights are decoded. More columns, or NVFP4's scales, leave no registers for that.
template <WeightForm kForm, bool kMany, int kN>
constexpr bool kInTurns = kForm == WeightForm::kMxfp4 && !kMany && kN == 8;

template <WeightForm kForm, int kN, typename A>
__device__ __forceinline__ void MultiplyInTurns(const A& args, Feed<kForm, true, false, A>& feed,
                                                const uint2* tables, const Unit& unit) {
  using Layout = Stage<kForm, true, false, A>;
  constexpr int kBlocks = Layout::kBlocks, kProducts = kStageInputs<kForm> / 128 * kBlocks;
  static_assert(kProducts % 2 == 0);  // of a stage: so it is known whose turn one is
  const int row = LaneRow<Layout>(), c = threadIdx.x % 4;
  float sum[kBlocks][kN / 2] = {}, part[2][kN / 2];
  Fp8Operand<kForm> operand[2];
  const auto load = [&](const char* here, int i) {
    const int at = i % kBlocks * Layout::kRows;
    LoadOperand<kForm>(operand[i % 2], here + at * kRowBytes,
                       here + Layout::kScaleAt + at * kScaleBytes, row, c, i / kBlocks, feed.stage,
                       tables);
  };
  const auto multiply = [&](const char* here, int i) {
    const uint32_t columns = SharedAddress(here) + Layout::kColumnsAt;
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      Wgmma<kN, true>::Run(part[i % 2], operand[i % 2].a[step],
                           CoreMatrices(columns + (4 * (i / kBlocks) + step) * 32 * kN, kN * 16),
                           step > 0);
    }
    WgmmaCommit();
  };
  const auto add = [&](const char* here, int i) {
    const float* const column_scales =
        reinterpret_cast<const float*>(here + Layout::kColumnsAt + kStageInputs<kForm> * kN);
    return Promote<kForm, kN, false>(sum[i % kBlocks], part[i % 2], operand[i % 2].scale,
                                     column_scales + i / kBlocks * kN, c);
  };
  if (feed.stage < feed.stages) {
    const char* here = feed.Here();
    load(here, 0);
    multiply(here, 0);
    while (true) {
#pragma unroll
      for (int i = 1; i < kProducts; ++i) {
        load(here, i);
        WgmmaWait<0>();
        multiply(here, i);
        add(here, i - 1);
      }
      feed.Next();
      if (feed.stage >= feed.stages) break;
      const char* const before = here;
      here = feed.Here();
      load(here, 0);
      WgmmaWait<0>();
      multiply(here, 0);
      feed.ReleaseBehind(1, add(before, kProducts - 1));
    }
    WgmmaWait<0>();
    add(here, kProducts - 1);
  }
  Finish<false, Layout, kN>(args, feed, sum, 1.0f, unit);
}

// MMA blocks whose products are on their way together: both, while there are registers for them.
template <int kN>
constexpr int kAtOnce = kN <= 80 ? 2 : 1;

template <WeightForm kForm, bool kMany, int kN, typename A>
__device__ __forceinline__ void MultiplyAtOnce(const A& args, Feed<kForm, true, kMany, A>& feed,
                                               const uint2* tables, const Unit& unit) {
  using Layout = Stage<kForm, true, kMany, A>;
  constexpr int kProducts = kStageInputs<kForm> / 128, kBlocks = Layout::kBlocks;
  constexpr int kTogether = kAtOnce<kN> < kBlocks ? kAtOnce<kN> : kBlocks;
  constexpr bool kFours = kFourBits<kForm> && kN >= kManyColumns;
  static_assert(!A::kSlim || kForm != WeightForm::kFp8);
  const int row = LaneRow<Layout>(), c = threadIdx.x % 4;
  float sum[kBlocks][kN / 2] = {};
  Fp8ScaleBytes<kForm, Layout> scale_bytes(args, feed, unit);
  while (feed.stage < feed.stages) {
    float fp8_scale[kBlocks] = {};
    scale_bytes.Take(feed, [&](int block, uint32_t byte) { fp8_scale[block] = DecodeUe8m0(byte); });
    const char* here = feed.Here();
    const char* const x = here + Layout::kColumnsAt;
    const uint32_t columns = SharedAddress(x);
    const float* column_scales = reinterpret_cast<const float*>(x + kStageInputs<kForm> * kN);
    float last = 0.0f;
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
#pragma unroll
      for (int first = 0; first < kBlocks; first += kTogether) {
        Fp8Operand<kForm> operand[kTogether];
        float part[kTogether][kN / 2];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int block = first + i;
          const char* const rows = here + block * Layout::kRows * kRowBytes;
          if constexpr (kForm == WeightForm::kFp8) {
            const uint32_t mine = SharedAddress(rows) + threadIdx.x / 128 * kBlockRows * kRowBytes;
#pragma unroll
            for (int step = 0; step < 4; ++step) {
              operand[i].a[step] = SwizzledRows(mine + step * 32);
            }
            operand[i].scale[0] = fp8_scale[block];
          } else {
            LoadOperand<kForm>(operand[i], rows,
                               here + Layout::kScaleAt + block * Layout::kRows * kScaleBytes, row,
                               c, k, feed.stage, tables);
          }
        }
        WgmmaFence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            Wgmma<kN, true>::Run(part[i], operand[i].a[step],
                                 CoreMatrices(columns + (4 * k + step) * 32 * kN, kN * 16),
                                 step > 0);
          }
        }
        WgmmaCommit();
        WgmmaWait<0>();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          last = Promote<kForm, kN, kFours>(sum[first + i], part[i], operand[i].scale,
                                            column_scales + k * kN, c);
        }
      }
    }
    feed.ReleaseBehind(last);
    feed.Next();
  }
  Finish<kForm == WeightForm::kFp8, Layout, kN>(args, feed, sum, 1.0f, unit);
}

template <WeightForm kForm, bool kMany, int kN, typename A>
__device__ __forceinline__ void MultiplyFp8(const A& args, Feed<kForm, true, kMany, A>& feed,
                                            const uint2* tables, const Unit& unit) {
  if constexpr (kInTurns<kForm, kMany, kN>) {
    MultiplyInTurns<kForm, kN>(args, feed, tables, unit);
  } else {
    MultiplyAtOnce<kForm, kMany, kN>(args, feed, tables, unit);
  }
}

}  // namespace tile
}  // namespace dsv4
