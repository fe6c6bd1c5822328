// exp, sigmoid and log1p in FP32 from sums, products and quotients alone, so that CPU and GPU agree
// on every bit where nothing is contracted.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace dsv4 {

// x = n ln 2 + rest: the first of ln 2 of few bits, so that its products are exact; adding
// kExpRound rounds to an integer.
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kExpRound = 0x1.8p23f;

// e^r of that rest.
DSV4_HOST_DEVICE inline float ExpOfRest(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * (r * r) + r) + 1.0f;
}

// e^x as e^rest and n, which is in the last bits of `shifted`.
struct PartsOfExp {
  float shifted, of_rest;

  DSV4_HOST_DEVICE explicit PartsOfExp(float x) : shifted(x * kLog2E + kExpRound) {
    const float n = shifted - kExpRound;
    of_rest = ExpOfRest((x - n * kLn2High) - n * kLn2Low);
  }
};

// Within 1 ulp. Results below 2^-126 are 0; NaN stays NaN.
DSV4_HOST_DEVICE inline float Exp(float x) {
  const PartsOfExp parts(x);
  // 2^n as a product of two, for n = 128.
  const uint32_t exponent = FloatBits(parts.shifted) - FloatBits(kExpRound);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  const float scaled = parts.of_rest * FloatFromBits((half + 127u) << 23) *
                       FloatFromBits((exponent - half + 127u) << 23);
  // Selections: a branch would keep several of these from running side by side.
  const float bounded = x > 88.72283f ? FloatFromBits(0x7F800000u) : scaled;
  return x < -87.33654f ? 0.0f : bounded;
}

// 1 / x, rounded, of x from 2^-126 to 2^126; 0 gives Inf or NaN. On a GPU it is what a division
// does there without its branch to all the rest, so that several run side by side.
DSV4_HOST_DEVICE inline float RoundedReciprocal(float x) {
#ifdef __CUDA_ARCH__
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  return __fmaf_rn(estimate, __fmaf_rn(-x, estimate, 1.0f), estimate);
#else
  return 1.0f / x;
#endif
}

// x, or the bound that it is beyond; some number for NaN.
DSV4_HOST_DEVICE inline float Bounded(float x, float low, float high) {
#ifdef __CUDA_ARCH__
  return fmaxf(fminf(x, high), low);
#else
  return x > low ? x < high ? x : high : low;
#endif
}

// 1 / (1 + e^-x); 0 where it is no normal number. -Inf gives 0, NaN some number. Exp in as few
// instructions as its bits take where the result depends on it.
DSV4_HOST_DEVICE inline float SigmoidOfNumber(float x) {
  const PartsOfExp parts(Bounded(-x, -87.0f, 88.0f));
  const float inverse =
      1.0f + FloatFromBits(FloatBits(parts.of_rest) + (FloatBits(parts.shifted) << 23));
  const float sigmoid = RoundedReciprocal(inverse);
  return inverse <= 0x1p126f ? sigmoid : 0.0f;
}

// NaN stays NaN.
DSV4_HOST_DEVICE inline float Sigmoid(float x) { return x != x ? x : SigmoidOfNumber(x); }

// log(1 + x) for 0 <= x <= 1, within 2 ulp: twice the inverse tanh of x / (2 + x).
DSV4_HOST_DEVICE inline float Log1pUnit(float x) {
  const float s = x / (2.0f + x);
  const float q = s * s;
  float p = 2.0f / 15;
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  return s * q * p + 2.0f * s;
}

}  // namespace dsv4
