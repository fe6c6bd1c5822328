#include <algorithm>
#include <cmath>
#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/nvfp4.h"
#include "common/rmsnorm.h"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
void RmsnormNvfp4Cpu(const RmsnormNvfp4Params& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t d = params.d;
  std::vector<float> y(d);
  for (int64_t token = first; token < last; ++token) {
    NormToken(params.x + token * d, params.weight, d, params.reciprocal_d, params.eps, y.data());
    uint32_t amax_bits = 0;  // magnitudes compare as integers, NaN above all
    for (float value : y) amax_bits = std::max(amax_bits, FloatBits(value) & 0x7FFFFFFFu);
    const float global = params.global_scale ? StaticGlobalScale(*params.global_scale)
                                             : TokenGlobalScale(FloatFromBits(amax_bits));
    params.token_scale[token] = global;
    const float six_global = kE2m1Max * global;
    for (int64_t block = 0; block < d / kNvfp4Block; ++block) {
      const float* values = y.data() + block * kNvfp4Block;
      uint32_t block_bits = 0;
      for (int i = 0; i < kNvfp4Block; ++i) {
        block_bits = std::max(block_bits, FloatBits(values[i]) & 0x7FFFFFFFu);
      }
      const uint8_t block_scale =
          EncodeE4m3(UnroundedBlockScale(FloatFromBits(block_bits), six_global));
      params.block_scale[token * (d / kNvfp4Block) + block] = block_scale;
      const float step = DecodeE4m3(block_scale) * global;
      // The sign of a NaN quotient is nobody's promise.
      const auto encode = [step](float y) { return EncodeE2m1(std::copysign(y / step, y)); };
      uint8_t* code = params.code + (token * d + block * kNvfp4Block) / 2;
      for (int i = 0; i < kNvfp4Block; i += 2) {
        code[i / 2] = static_cast<uint8_t>(encode(values[i]) | encode(values[i + 1]) << 4);
      }
    }
  }
}

}  // namespace dsv4
