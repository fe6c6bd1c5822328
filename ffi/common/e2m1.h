// E2M1: sign, 2 exponent bits, 1 mantissa bit; values 0, .5, 1, 1.5, 2, 3, 4, 6 (model.md 4.5).
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace dsv4 {

constexpr float kE2m1Max = 6.0f;

// Nearest even, saturating; the sign of zero is kept. NaN has no code and becomes +-6: its scale
// carries it.
DSV4_HOST_DEVICE inline uint8_t EncodeE2m1(float x) {
  const uint32_t bits = FloatBits(x);
  const float a = FloatFromBits(bits & 0x7FFFFFFFu);
  const uint8_t code = a != a ? 7
                              : (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) +
                                    (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return static_cast<uint8_t>(code | (bits >> 31) << 3);
}

}  // namespace dsv4
