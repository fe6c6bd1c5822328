#include <algorithm>
#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/e2m1.h"
#include "common/e4m3.h"
#include "common/rope.h"
#include "common/ue8m0.h"
#include "index_query_finish/index_query_finish.h"

namespace dsv4 {
namespace {

float Rounded(float x) { return Bf16ToFloat(FloatToBf16(x)); }

uint32_t LargestBits(const float* x, int64_t count) {
  uint32_t largest = 0;  // magnitudes compare as integers, NaN above all
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, FloatBits(x[i]) & 0x7FFFFFFFu);
  return largest;
}

void Transform(float* y, int64_t d) {
  for (int64_t half = 1; half < d; half *= 2) {
    for (int64_t i = 0; i < d; ++i) {
      if (i & half) continue;
      const float low = y[i], high = y[i + half];
      y[i] = low + high;
      y[i + half] = low - high;
    }
  }
}

void StoreMxfp4(const float* y, int64_t d, uint8_t* code, uint8_t* scale) {
  for (int64_t first = 0; first < d; first += kIndexQueryBlock) {
    const uint32_t byte = Mxfp4ScaleByte(LargestBits(y + first, kIndexQueryBlock));
    const float inverse = InverseScale(byte);
    scale[first / kIndexQueryBlock] = static_cast<uint8_t>(byte);
    for (int64_t i = first; i < first + kIndexQueryBlock; i += 2) {
      code[i / 2] =
          static_cast<uint8_t>(EncodeE2m1(y[i] * inverse) | EncodeE2m1(y[i + 1] * inverse) << 4);
    }
  }
}

void StoreFp8(const float* y, int64_t d, uint8_t* code, uint8_t* scale) {
  const uint32_t byte = Fp8ScaleByte(LargestBits(y, d));
  const float inverse = InverseScale(byte);
  *scale = static_cast<uint8_t>(byte);
  for (int64_t i = 0; i < d; ++i) code[i] = EncodeE4m3(y[i] * inverse);
}

}  // namespace

void IndexQueryFinishCpu(const IndexQueryFinishParams& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t d = params.d, nope = d - params.rotary;
  std::vector<float> y(d);
  std::vector<SinCos> turns(params.rotary / 2);
  for (int64_t token = first; token < last; ++token) {
    for (int64_t i = 0; i < params.rotary / 2; ++i) {
      turns[i] = SinCosAt(params.positions[token], params.frequencies[i]);
    }
    for (int64_t row = token * params.h; row < (token + 1) * params.h; ++row) {
      for (int64_t i = 0; i < d; ++i) y[i] = Bf16ToFloat(params.x[row * d + i]);
      for (int64_t i = 0; i < params.rotary / 2; ++i) {
        float* pair = &y[nope + 2 * i];
        const Pair turned = Turned(pair[0], pair[1], turns[i]);
        pair[0] = Rounded(turned.even);
        pair[1] = Rounded(turned.odd);
      }
      Transform(y.data(), d);
      for (float& value : y) value = Rounded(value * params.norm);
      if (params.form == IndexQueryForm::kFp8) {
        StoreFp8(y.data(), d, params.code + row * d, params.scale + row);
      } else {
        StoreMxfp4(y.data(), d, params.code + row * d / 2,
                   params.scale + row * d / kIndexQueryBlock);
      }
    }
  }
}

}  // namespace dsv4
