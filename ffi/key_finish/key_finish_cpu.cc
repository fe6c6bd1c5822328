#include <algorithm>
#include <cmath>
#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/e4m3.h"
#include "common/rope.h"
#include "common/ue8m0.h"
#include "key_finish/key_finish.h"

namespace dsv4 {
namespace {

// One key into row `row` of a store.
void Store(const KeyFinishParams& p, const float* y, const KeyStore& store, int64_t row) {
  const int64_t nope = p.d - p.rotary;
  for (int64_t first = 0; first < nope; first += kKeyBlock) {
    uint32_t largest = 0;  // magnitudes compare as integers, NaN above all
    for (int64_t i = first; i < first + kKeyBlock; ++i) {
      largest = std::max(largest, FloatBits(y[i]) & 0x7FFFFFFFu);
    }
    const uint32_t byte = Fp8ScaleByte(largest);
    const float inverse = InverseScale(byte);
    store.scale[(row * nope + first) / kKeyBlock] = static_cast<uint8_t>(byte);
    for (int64_t i = first; i < first + kKeyBlock; ++i) {
      store.nope[row * nope + i] = EncodeE4m3(y[i] * inverse);
    }
  }
  for (int64_t i = 0; i < p.rotary; ++i) store.rope[row * p.rotary + i] = FloatToBf16(y[nope + i]);
}

}  // namespace

void QueryNormCpu(const QueryNormParams& params, int64_t first, int64_t last) {
  if (params.y == nullptr) {
    RmsnormFp8Cpu(params, first, last);
    return;
  }
  const KeepDenormals keep_denormals;
  const int64_t d = params.d;
  std::vector<float> y(d);
  for (int64_t token = first; token < last; ++token) {
    NormToken(params.x + token * d, params.weight, d, params.reciprocal_d, params.eps, y.data());
    for (int64_t i = 0; i < d; ++i) params.y[token * d + i] = FloatToBf16(y[i]);
  }
}

void KeyFinishCpu(const KeyFinishParams& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t d = params.d, nope = d - params.rotary;
  std::vector<float> y(d);
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / params.t, j = row % params.t;
    for (int64_t i = 0; i < d; ++i) y[i] = Bf16ToFloat(params.x[row * d + i]);
    const float squares = SumOfSquares(d, [&y](int64_t i) { return y[i] * y[i]; });
    const float mean = squares * params.reciprocal_d;
    // Rounded once, as __frsqrt_rn.
    const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + params.eps)));
    for (int64_t i = 0; i < d; ++i) {
      y[i] = Bf16ToFloat(FloatToBf16(Bf16ToFloat(params.weight[i]) * (y[i] * scale)));
    }
    const int32_t position = KeyPosition(params.start[b], j);
    for (int64_t i = 0; i < params.rotary / 2; ++i) {
      float* pair = &y[nope + 2 * i];
      const Pair turned = Turned(pair[0], pair[1], SinCosAt(position, params.frequencies[i]));
      pair[0] = turned.even;
      pair[1] = turned.odd;
    }
    Store(params, y.data(), params.rows, row);
    if (params.slots == 0) continue;
    const int64_t slot = RingSlot(params.start[b], params.count[b], j, params.t, params.slots);
    if (slot >= 0) Store(params, y.data(), params.ring, b * params.slots + slot);
  }
}

}  // namespace dsv4
