// From the sums over a token's streams to its weights; CPU handler and kernels alike.
#pragma once

#include <cstdint>

#include "common/exp.h"
#include "mhc/mhc.h"

namespace dsv4 {

constexpr int kMhcLanes = 32;                           // of a tile
constexpr int kMhcLaneChannels = kMhcTile / kMhcLanes;  // side by side
constexpr int kMhcSquares = kMhcMixes;                  // where a tile's squares are
constexpr int kMhcTileGroup = 32;                       // tiles summed by halves

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

// Of a logit that was scaled and shifted. -Inf gives 0, NaN stays.
DSV4_HOST_DEVICE inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

// What a mix turns into: pre, post, or a logit of comb. `mix` is the sum times the norm.
DSV4_HOST_DEVICE inline float MhcWeight(int index, float mix, float scale, float base,
                                        float hc_eps) {
  const float logit = mix * scale + base;
  const float sigmoid = Sigmoid(logit);
  const float post = index < 2 * kMhcStreams ? 2.0f * sigmoid : logit;
  return index < kMhcStreams ? sigmoid + hc_eps : post;
}

// Which of the scales belongs to a mix.
DSV4_HOST_DEVICE inline int MhcScaleIndex(int index) {
  return index < kMhcStreams ? 0 : index < 2 * kMhcStreams ? 1 : 2;
}

DSV4_HOST_DEVICE inline float SumOfFour(float a, float b, float c, float d) {
  return (a + b) + (c + d);
}

// comb [j, k] from its logits: a softmax over k, then columns and rows in turn, columns last. All
// sums are at least `eps`, which is 0 or a normal number.
DSV4_HOST_DEVICE inline void Sinkhorn(float (&c)[16], int iters, float eps) {
  for (int j = 0; j < 4; ++j) {
    float* const row = c + 4 * j;
    float top = row[0];
    for (int k = 1; k < 4; ++k) top = row[k] > top ? row[k] : top;
    for (int k = 0; k < 4; ++k) row[k] = Exp(row[k] - top);
    const float inverse = RoundedReciprocal(SumOfFour(row[0], row[1], row[2], row[3]));
    for (int k = 0; k < 4; ++k) row[k] = row[k] * inverse + eps;
  }
  for (int i = 0; i < iters; ++i) {
    if (i > 0) {
      for (int j = 0; j < 4; ++j) {
        float* const row = c + 4 * j;
        const float inverse = RoundedReciprocal(SumOfFour(row[0], row[1], row[2], row[3]) + eps);
        for (int k = 0; k < 4; ++k) row[k] *= inverse;
      }
    }
    for (int k = 0; k < 4; ++k) {
      const float inverse = RoundedReciprocal(SumOfFour(c[k], c[4 + k], c[8 + k], c[12 + k]) + eps);
      for (int j = 0; j < 4; ++j) c[4 * j + k] *= inverse;
    }
  }
}

}  // namespace dsv4
