// The rotation of channel pairs by position * frequency (model.md 3.3), with the same bits on CPU
// and GPU: products and sums of IEEE numbers, none of them contracted.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"

namespace dsv4 {

struct SinCos {
  float sin, cos;
};

// Sine and cosine of an angle in FP32, each within 1.5e-7 of the exact one. The angle is brought to
// -pi/4 .. pi/4 in FP64, exactly but for its last bits as long as it is below 2^20 quarter turns
// (positions below 1.6 million), and within 1e-6 below 2^32. Beyond, and for NaN: NaN.
DSV4_HOST_DEVICE inline SinCos SinCosOf(float angle) {
  constexpr double kQuarters = 0.63661977236758134308;      // 2 / pi
  constexpr double kQuarter = 0x1.921fb544p+0;              // pi / 2, its first 33 bits
  constexpr double kQuarterRest = 0x1.0b4611a626331p-34;    // and what is left of it
  constexpr double kToInteger = 0x1.8p52;                   // added, leaves no fraction
  if (!((FloatBits(angle) & 0x7FFFFFFFu) < 0x4F800000u)) {  // 2^32
    return {FloatFromBits(0x7FC00000u), FloatFromBits(0x7FC00000u)};
  }
  const double wide = static_cast<double>(angle);
  const double shifted = wide * kQuarters + kToInteger;
  const double turns = shifted - kToInteger;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  const uint32_t quarter = static_cast<uint32_t>(bits);
  const float x = static_cast<float>((wide - turns * kQuarter) - turns * kQuarterRest);
  const float square = x * x;
  const float sin =
      ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f) * square * x +
      x;
  const float cos =
      ((2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f) *
          (square * square) -
      0.5f * square + 1.0f;
  const uint32_t sin_bits = FloatBits(quarter & 1 ? cos : sin) ^ (quarter & 2) << 30;
  const uint32_t cos_bits = FloatBits(quarter & 1 ? sin : cos) ^ ((quarter + 1) & 2) << 30;
  return {FloatFromBits(sin_bits), FloatFromBits(cos_bits)};
}

// The angle is the FP32 product.
DSV4_HOST_DEVICE inline SinCos SinCosAt(int32_t position, float frequency) {
  return SinCosOf(static_cast<float>(position) * frequency);
}

// (even, odd) turned by the angle, unrounded.
struct Pair {
  float even, odd;
};
DSV4_HOST_DEVICE inline Pair Turned(float even, float odd, SinCos by) {
  return {even * by.cos - odd * by.sin, even * by.sin + odd * by.cos};
}

}  // namespace dsv4
