// NVFP4 of activations: E2M1 codes, one E4M3 scale per 16, one FP32 scale per token (model.md 9.2).
// Scales multiply: value = code * block_scale * global_scale.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/e2m1.h"
#include "common/e4m3.h"

namespace dsv4 {

constexpr int kNvfp4Block = 16;

// Smallest global scale: 1 / (6 * 448 * 2^-100) and the steps it leads to stay normal FP32 numbers.
constexpr float kMinGlobalScale = 0x1p-100f;
constexpr float kMaxGlobalScale = 0x1p100f;  // of a static scale

// Global scale of a token with the largest magnitude `amax`; 1 for an all-zero token, NaN for NaN.
// By the rounded reciprocal of 6 * 448, as XLA divides by a constant.
DSV4_HOST_DEVICE inline float TokenGlobalScale(float amax) {
  if (amax != amax) return FloatFromBits(0x7FC00000u);
  if (amax == 0.0f) return 1.0f;
  const float clamped = amax < kFloat32Max ? amax : kFloat32Max;
  const float scale = clamped * (1.0f / (kE2m1Max * kE4m3Max));
  return scale > kMinGlobalScale ? scale : kMinGlobalScale;
}

// A static scale as the codes and `token_scale` use it: kept where every step is a normal number.
DSV4_HOST_DEVICE inline float StaticGlobalScale(float scale) {
  if (scale < kMinGlobalScale) return kMinGlobalScale;
  return scale > kMaxGlobalScale ? kMaxGlobalScale : scale;
}

// What E4M3 then rounds to the block's scale; 1 for an all-zero block. `six_global` = 6 *
// global_scale.
DSV4_HOST_DEVICE inline float UnroundedBlockScale(float amax, float six_global) {
  if (amax == 0.0f) return 1.0f;
  const float clamped = amax > kFloat32Max ? kFloat32Max : amax;
  const float scale = clamped / six_global;
  if (scale < kE4m3MinSubnormal) return kE4m3MinSubnormal;
  return scale > kE4m3Max ? kE4m3Max : scale;
}

}  // namespace dsv4
