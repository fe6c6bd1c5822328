#include "common/linear_cpu.h"

#include <algorithm>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/dot.h"
#include "common/swiglu.h"

namespace dsv4 {
namespace {

// Floats of decoded rows that stay in a core's cache while the tokens pass by.
constexpr int64_t kDecodedFloats = 1 << 15;
constexpr int64_t kMaxDecodedRows = 64;

void Gate(const uint16_t* up, float limit, int64_t k, float* x) {
  for (int64_t i = 0; i < k; ++i) {
    x[i] = Bf16ToFloat(FloatToBf16(ClampedSwiglu(x[i], Bf16ToFloat(up[i]), limit)));
  }
}

}  // namespace

LinearActivations::LinearActivations(const LinearParams& params, int64_t first, int64_t count)
    : params_(params),
      first_(first),
      count_(count),
      stride_(PaddedInputs(params.k)),
      values_(new float[count * params.groups * stride_]),
      scales_(new float[count * params.groups]) {}

void LinearActivations::Round(int64_t begin, int64_t end) {
  const KeepDenormals keep_denormals;
  const int64_t bytes = params_.k * (params_.x_scale != nullptr ? 1 : params_.x_float32 ? 4 : 2);
  const auto* x = static_cast<const char*>(params_.x) + first_ * params_.groups * bytes;
  for (int64_t i = begin; i < end; ++i) {
    float* values = values_.get() + i * stride_;
    if (params_.x_scale != nullptr) {
      const int64_t at = first_ * params_.groups + i;
      DecodeActivations(x + i * bytes, params_.x_scale + at * (params_.k / 128), params_.k, values);
      scales_[i] = 1.0f;
      continue;
    }
    LoadActivations(x + i * bytes, params_.x_float32, params_.k, values);
    if (params_.up != nullptr) {
      const int64_t at = first_ * params_.groups + i;
      Gate(static_cast<const uint16_t*>(params_.up) + at * params_.k, params_.limit, params_.k,
           values);
    }
    scales_[i] = RoundActivations(params_.act, values, params_.k, params_.act_scale, values);
  }
}

void LinearCpu(WeightForm form, const LinearParams& params, const LinearActivations& x,
               int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t k = params.k, stride = x.stride(), rows_a_group = params.n / params.groups;
  const int64_t most = std::clamp<int64_t>(kDecodedFloats / stride, 4, kMaxDecodedRows);
  const std::unique_ptr<float[]> decoded(new float[most * stride]);
  const std::unique_ptr<float[]> sums(new float[most * x.count()]);
  for (int64_t row = first; row < last;) {
    const int64_t group = row / rows_a_group;
    const int64_t rows = std::min({most, last - row, (group + 1) * rows_a_group - row});
    for (int64_t i = 0; i < rows; ++i) {
      DecodeWeights(form, params.weight, params.scale, k, row + i, 0, k,
                    decoded.get() + i * stride);
    }
    DotBlock(decoded.get(), stride, rows, x.values() + group * stride, params.groups * stride,
             x.count(), stride, sums.get(), rows);
    for (int64_t token = 0; token < x.count(); ++token) {
      float* y = sums.get() + token * rows;
      if (form == WeightForm::kNvfp4) {
        const float scale = x.scales()[token * params.groups + group] * *params.global_scale;
        for (int64_t i = 0; i < rows; ++i) y[i] *= scale;
      }
      const int64_t at = (x.first() + token) * params.n + row;
      if (params.y_bf16) {
        auto* out = static_cast<uint16_t*>(params.y) + at;
        for (int64_t i = 0; i < rows; ++i) out[i] = FloatToBf16(y[i]);
      } else {
        std::copy_n(y, rows, static_cast<float*>(params.y) + at);
      }
    }
    row += rows;
  }
}

}  // namespace dsv4
