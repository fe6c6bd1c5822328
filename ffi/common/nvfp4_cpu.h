// NVFP4 of a token on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/nvfp4.h"

namespace dsv4 {

// `y` [d] holds BF16 numbers; `static_scale` [1] or nullptr.
inline void EncodeNvfp4Token(const float* y, int64_t d, const float* static_scale, uint8_t* code,
                             uint8_t* block_scale, float* token_scale) {
  uint32_t amax_bits = 0;  // magnitudes compare as integers, NaN above all
  for (int64_t i = 0; i < d; ++i) amax_bits = std::max(amax_bits, FloatBits(y[i]) & 0x7FFFFFFFu);
  const float global =
      static_scale ? StaticGlobalScale(*static_scale) : TokenGlobalScale(FloatFromBits(amax_bits));
  *token_scale = global;
  const float six_global = kE2m1Max * global;
  for (int64_t block = 0; block < d / kNvfp4Block; ++block) {
    const float* values = y + block * kNvfp4Block;
    uint32_t block_bits = 0;
    for (int i = 0; i < kNvfp4Block; ++i) {
      block_bits = std::max(block_bits, FloatBits(values[i]) & 0x7FFFFFFFu);
    }
    block_scale[block] = EncodeE4m3(UnroundedBlockScale(FloatFromBits(block_bits), six_global));
    const float step = DecodeE4m3(block_scale[block]) * global;
    // The sign of a NaN quotient is nobody's promise.
    const auto encode = [step](float y) { return EncodeE2m1(std::copysign(y / step, y)); };
    for (int i = 0; i < kNvfp4Block; i += 2) {
      code[(block * kNvfp4Block + i) / 2] =
          static_cast<uint8_t>(encode(values[i]) | encode(values[i + 1]) << 4);
    }
  }
}

}  // namespace dsv4
