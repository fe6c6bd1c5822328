#include <algorithm>
#include <cmath>
#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/nvfp4_cpu.h"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
namespace {

constexpr int64_t kLanes = 32;

// In the kernel's order.
float SumOfSquares(const uint16_t* x, int64_t d) {
  const int64_t blocks = d / kNvfp4Block;
  float total = 0.0f;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    float sums[kLanes] = {};
    for (int64_t lane = 0; lane < std::min(kLanes, blocks - first); ++lane) {
      for (int64_t i = 0; i < kNvfp4Block; ++i) {
        const float value = Bf16ToFloat(x[(first + lane) * kNvfp4Block + i]);
        sums[lane] += value * value;  // the square is exact
      }
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    total += sums[0];
  }
  return total;
}

}  // namespace

void RmsnormNvfp4Cpu(const RmsnormNvfp4Params& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t d = params.d;
  std::vector<float> y(d);
  for (int64_t token = first; token < last; ++token) {
    const uint16_t* x = params.x + token * d;
    const float mean = SumOfSquares(x, d) * params.reciprocal_d;
    // Rounded once, as __frsqrt_rn.
    const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + params.eps)));
    for (int64_t i = 0; i < d; ++i) {
      const float normed = Bf16ToFloat(x[i]) * scale;
      y[i] = Bf16ToFloat(FloatToBf16(Bf16ToFloat(params.weight[i]) * normed));
    }
    const int64_t blocks = d / kNvfp4Block;
    EncodeNvfp4Token(y.data(), d, params.global_scale, params.code + token * d / 2,
                     params.block_scale + token * blocks, params.token_scale + token);
  }
}

}  // namespace dsv4
