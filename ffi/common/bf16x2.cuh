// Two BF16 in a word, the first in its low half.
#pragma once

#include <cstdint>

namespace dsv4 {

// The two BF16 of a word, exactly.
__device__ __forceinline__ float Low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float High(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// Larger magnitudes of two pairs, NaN above all; the signs are of no meaning.
__device__ __forceinline__ uint32_t MaxMagnitudes(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// The larger one of a pair of magnitudes as bits of BF16, NaN above all; signs are cut off.
__device__ __forceinline__ uint32_t LargerOf(uint32_t pair) {
  return max(pair & 0x7FFFu, pair >> 16 & 0x7FFFu);
}

// Nearest even; NaN becomes 0x7FFF.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t MulBf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// |a| * b + c, rounded once.
__device__ __forceinline__ uint32_t FmaMagnitudeBf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("{\n.reg .b32 x;\nabs.bf16x2 x, %1;\nfma.rn.bf16x2 %0, x, %2, %3;\n}"
      : "=r"(sum)
      : "r"(a), "r"(b), "r"(c));
  return sum;
}

}  // namespace dsv4
