// RMS norm of a token, in one order on CPU and GPU: squares of 16 channels in sequence, 32 such
// blocks by halves, those groups in sequence; the mean is the product with the rounded 1 / d.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/bits.h"

namespace dsv4 {

constexpr int kNormBlock = 16;
constexpr int64_t kNormMaxDim = 16384;  // 1024 threads take a block each

// On the CPU: y = bf(weight * (x * 1 / sqrt(mean(x^2) + eps))) of d channels, a multiple of 16.
inline void NormToken(const uint16_t* x, const uint16_t* weight, int64_t d, float reciprocal_d,
                      float eps, float* y) {
  constexpr int64_t kLanes = 32;
  const int64_t blocks = d / kNormBlock;
  float squares = 0.0f;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    float sums[kLanes] = {};
    for (int64_t lane = 0; lane < std::min(kLanes, blocks - first); ++lane) {
      for (int64_t i = 0; i < kNormBlock; ++i) {
        const float value = Bf16ToFloat(x[(first + lane) * kNormBlock + i]);
        sums[lane] += value * value;  // the square is exact
      }
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    squares += sums[0];
  }
  const float mean = squares * reciprocal_d;
  // Rounded once, as __frsqrt_rn.
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + eps)));
  for (int64_t i = 0; i < d; ++i) {
    y[i] = Bf16ToFloat(FloatToBf16(Bf16ToFloat(weight[i]) * (Bf16ToFloat(x[i]) * scale)));
  }
}

}  // namespace dsv4
