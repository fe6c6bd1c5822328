// E4M3 "fn": bias 7, no infinity, largest value 448, 0x7F and 0xFF are NaN (model.md 4.5).
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace dsv4 {

constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3MinSubnormal = 0x1p-9f;

// Nearest even, saturating; NaN becomes 0x7F.
DSV4_HOST_DEVICE inline uint8_t EncodeE4m3(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t sign = bits >> 31 << 7;
  const float a = FloatFromBits(bits & 0x7FFFFFFFu);
  if (a != a) return 0x7F;
  if (a >= kE4m3Max) return static_cast<uint8_t>(sign | 0x7E);
  if (a < 0x1p-6f) {  // subnormal codes count steps of 2^-9; adding 2^14 rounds to such a step
    return static_cast<uint8_t>(sign | (FloatBits(a + 0x1p14f) & 0xF));
  }
  const uint32_t word = bits & 0x7FFFFFFFu;
  const uint32_t rounded = (word + 0x7FFFFu + ((word >> 20) & 1u)) >> 20;
  return static_cast<uint8_t>(sign | (rounded - ((127 - 7) << 3)));
}

DSV4_HOST_DEVICE inline float DecodeE4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7F;
  if (magnitude == 0x7F) return FloatFromBits(0x7FC00000u);
  const float a = magnitude < 8 ? static_cast<float>(magnitude) * kE4m3MinSubnormal
                                : FloatFromBits((magnitude + ((127 - 7) << 3)) << 20);
  return code & 0x80 ? -a : a;
}

}  // namespace dsv4
