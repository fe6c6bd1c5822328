// Weights from shared memory to tensor-core fragments: exact BF16 values, scales included.
//
// A warp reads a row of weights in pieces of 64 bytes (kPieceInputs inputs), lane c of four the
// 16 bytes at 16 c, and feeds them to MMA steps of 16 inputs. Which input lands at which position
// of a step is free as long as both operands agree, so it is chosen for cheap decoding: `StepOf` is
// the map, and x is laid out by it.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/bf16x2.cuh"
#include "common/linear.h"

namespace dsv4 {

constexpr int kPieceBytes = 64;

template <WeightForm kForm>
struct Weights;

struct Position {
  int step;  // MMA step inside the piece
  int at;    // 0..15: lane c holds positions 2c, 2c + 1, 2c + 8, 2c + 9
};

__device__ __forceinline__ uint32_t BothHalves(uint32_t low) { return __byte_perm(low, 0, 0x1010); }

// Eight E2M1 codes as four pairs of BF16 (codes i and i + 4), times 2^-126: sign and the three
// magnitude bits land on BF16's sign and on the lowest exponent and highest mantissa bits, 0.5 as a
// subnormal number. A product by two powers of two puts a code at both places, and runs beside the
// logical operations.
__device__ __forceinline__ void DecodeE2m1(uint32_t word, uint32_t (&pairs)[4]) {
  constexpr uint32_t kEven = 0x000F000Fu, kOdd = kEven << 4;  // codes 0 and 4, 1 and 5
  constexpr uint32_t kBoth = 1u << 12 | 1u << 6, kPlaces = 0x81C081C0u;
  const uint32_t last = word >> 8;
  pairs[0] = (word & kEven) * kBoth & kPlaces;
  pairs[1] = (word & kOdd) * (kBoth >> 4) & kPlaces;
  pairs[2] = (last & kEven) * kBoth & kPlaces;
  pairs[3] = (last & kOdd) * (kBoth >> 4) & kPlaces;
}

// 2^(byte - 127) * 2^126 as BF16 where that is a number (bytes to 128); larger scales take the rest
// in a second factor.
__device__ __forceinline__ uint32_t Ue8m0Factor(uint32_t byte) {
  const uint32_t exponent = byte + 126;  // of 2^(byte - 1), biased
  return exponent > 254 ? 0x7F00u : exponent << 7;
}
__device__ __forceinline__ uint32_t Ue8m0Rest(uint32_t byte) {  // 2^(byte - 128) or 1; NaN for 255
  if (byte == 255) return 0x7FC0u;
  return byte > 128 ? (byte - 1) << 7 : 0x3F80u;
}

// Two E4M3 codes as FP16.
__device__ __forceinline__ uint32_t HalvesOfE4m3(uint32_t bytes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(bytes)));
  return halves;
}

// s * 2^117 as a BF16 pair of an E4M3 byte; NaN stays NaN.
__device__ __forceinline__ uint32_t E4m3Factor(uint32_t byte) {
  const float scale = __half2float(__ushort_as_half(static_cast<uint16_t>(HalvesOfE4m3(byte))));
  return __byte_perm(__float_as_uint(__fmul_rn(scale, 0x1p117f)), 0, 0x3232);
}

// 2^(byte - 127); byte 255 is NaN.
__device__ __forceinline__ float DecodeUe8m0(uint32_t byte) {
  return __uint_as_float(byte == 0 ? 0x00400000u : byte == 255 ? 0x7FC00000u : byte << 23);
}

// Of an E2M1 code without its sign.
__device__ __forceinline__ float E2m1Magnitude(uint32_t code) {
  return __fmul_rn(__uint_as_float((code & 7u) << 22), 0x1p126f);
}

template <>
struct Weights<WeightForm::kBf16> {
  static constexpr int kPieceInputs = 32, kSteps = 2;
  static constexpr float kUnit = 1.0f;
  __device__ static Position StepOf(int k) {
    const int word = k % 8 / 2;
    return {word >> 1, 8 * (word & 1) + 2 * (k / 8) + k % 2};
  }
};

template <>
struct Weights<WeightForm::kFp8> {
  static constexpr int kPieceInputs = 64, kSteps = 4;
  static constexpr float kUnit = 1.0f;
  __device__ static Position StepOf(int k) {
    const int byte = k % 4;
    return {k % 16 / 4, 8 * (byte & 1) + 2 * (k / 16) + (byte >> 1)};
  }
};

struct FourBits {
  static constexpr int kPieceInputs = 128, kSteps = 8;
  __device__ static Position StepOf(int k) {
    const int code = k % 8, pair = code % 4;
    return {2 * (k % 32 / 8) + (pair >> 1), 8 * (pair & 1) + 2 * (k / 32) + code / 4};
  }
};
template <>
struct Weights<WeightForm::kMxfp4> : FourBits {
  static constexpr float kUnit = 1.0f;
};
template <>
struct Weights<WeightForm::kNvfp4> : FourBits {
  static constexpr float kUnit = 0x1p9f;  // decoded weights carry 2^-9
};

// Four E4M3 codes as two pairs of BF16 (codes 0, 2 and 1, 3), times 2^-120; NaN is not told apart.
__device__ __forceinline__ void DecodeE4m3(uint32_t word, uint32_t (&pairs)[2]) {
  constexpr uint32_t kSign = 0x80008000u, kMagnitude = 0x07F007F0u;
  pairs[0] = (word << 8 & kSign) | (word << 4 & kMagnitude);
  pairs[1] = (word & kSign) | (word >> 4 & kMagnitude);
}
__device__ __forceinline__ uint32_t E4m3NanBytes(uint32_t word) {
  return ((word & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u;
}

// 2^120 * 2^(byte - 127) as BF16 pair, and what is left of it where that is no number (0: nothing).
__device__ __forceinline__ uint32_t Fp8Factor(uint32_t byte) {
  const uint32_t exponent = byte + 120;
  return BothHalves(exponent > 254 ? 0x7F00u : exponent << 7);
}
__device__ __forceinline__ uint32_t Fp8Rest(uint32_t byte) {
  if (byte == 255) return 0x7FC07FC0u;
  return byte > 134 ? BothHalves((byte - 7) << 7) : 0u;
}

// Row r (of a lane's two) of four MMA steps: 16 E2M1 codes of one scale.
__device__ __forceinline__ void DecodeRow(uint32_t (&a)[4][4], int r, uint32_t low, uint32_t high,
                                          uint32_t factor) {
  uint32_t pairs[2][4];
  DecodeE2m1(low, pairs[0]);
  DecodeE2m1(high, pairs[1]);
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i / 2][2 * (i % 2) + r] = MulBf16x2(pairs[i / 4][i % 4], factor);
}

// The rest of two rows' scales that a BF16 factor cannot hold: seldom, and long enough to stay a
// branch.
__device__ __forceinline__ void MultiplyRest(uint32_t (&a)[4][4], uint32_t first, uint32_t second) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] = MulBf16x2(a[i][j], j % 2 ? second : first);
  }
}

// Both rows of 16 E4M3 codes each.
__device__ __forceinline__ void DecodeFp8Rows(uint32_t (&a)[4][4], const uint4 (&rows)[2],
                                              uint32_t factor, uint32_t rest) {
  const uint32_t words[2][4] = {{rows[0].x, rows[0].y, rows[0].z, rows[0].w},
                                {rows[1].x, rows[1].y, rows[1].z, rows[1].w}};
  uint32_t nan = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pairs[2];
      DecodeE4m3(words[r][i], pairs);
      nan |= E4m3NanBytes(words[r][i]);
      a[i][r] = MulBf16x2(pairs[0], factor);
      a[i][2 + r] = MulBf16x2(pairs[1], factor);
    }
  }
  if (rest != 0) MultiplyRest(a, rest, rest);
  if (nan != 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bad = E4m3NanBytes(words[r][i]);
        if (bad & 0x80u) a[i][r] |= 0x7FC0u;
        if (bad & 0x800000u) a[i][r] |= 0x7FC00000u;
        if (bad & 0x8000u) a[i][2 + r] |= 0x7FC0u;
        if (bad & 0x80000000u) a[i][2 + r] |= 0x7FC00000u;
      }
    }
  }
}

// Where a column's scale is among those of its tile, of 4-bit weights times E4M3: of many columns,
// the four of each sixteen that a lane has lie side by side.
constexpr int kManyColumns = 64;
__device__ __forceinline__ int ScalePlace(int width, int column) {
  if (width < kManyColumns || (column | 15) >= width) return column;
  return (column & ~15) | (column >> 1 & 3) << 2 | (column >> 3 & 1) << 1 | (column & 1);
}

}  // namespace dsv4
