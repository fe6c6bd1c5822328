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

DSV4_HOST_DEVICE inline float Fma(float x, float y, float z) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(x, y, z);
#else
  return __builtin_fmaf(x, y, z);
#endif
}

// comb [j, k] from e to the logits: a softmax over k, then columns and rows in turn, columns last.
// All sums are at least `eps`, which is 0 or a normal number. The next sums are asked of the
// products before these are rounded, as the factors arrive: what is waited for is short.
DSV4_HOST_DEVICE inline void Balance(float (&c)[16], int iters, float eps) {
  float column[4], row[4];
  for (int j = 0; j < 4; ++j) {
    float* const of_row = c + 4 * j;
    row[j] = RoundedReciprocal(SumOfFour(of_row[0], of_row[1], of_row[2], of_row[3]));
    for (int k = 0; k < 4; ++k) of_row[k] = Fma(of_row[k], row[j], eps);
  }
  for (int k = 0; k < 4; ++k) {
    column[k] = RoundedReciprocal(SumOfFour(c[k], c[4 + k], c[8 + k], c[12 + k]) + eps);
  }
  for (int i = 1; i < iters; ++i) {
    for (int j = 0; j < 4; ++j) {
      float sum = eps;
      for (int k = 0; k < 4; ++k) sum = Fma(c[4 * j + k], column[k], sum);
      for (int k = 0; k < 4; ++k) c[4 * j + k] *= column[k];
      row[j] = RoundedReciprocal(sum);
    }
    for (int k = 0; k < 4; ++k) {
      float sum = eps;
      for (int j = 0; j < 4; ++j) sum = Fma(c[4 * j + k], row[j], sum);
      for (int j = 0; j < 4; ++j) c[4 * j + k] *= row[j];
      column[k] = RoundedReciprocal(sum);
    }
  }
  for (int i = 0; i < 16; ++i) c[i] *= column[i % 4];
}

// The same from the logits.
DSV4_HOST_DEVICE inline void Sinkhorn(float (&c)[16], int iters, float eps) {
  for (int j = 0; j < 4; ++j) {
    float* const row = c + 4 * j;
    float top = row[0];
    for (int k = 1; k < 4; ++k) top = row[k] > top ? row[k] : top;
    for (int k = 0; k < 4; ++k) row[k] = Exp(row[k] - top);
  }
  Balance(c, iters, eps);
}

}  // namespace dsv4
