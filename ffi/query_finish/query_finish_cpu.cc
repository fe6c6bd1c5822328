#include <cmath>
#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/rope.h"
#include "query_finish/query_finish.h"

namespace dsv4 {
namespace {

float Rounded(float x) { return Bf16ToFloat(FloatToBf16(x)); }

// Rounded once, as __frsqrt_rn.
float InverseRoot(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

// What a head is multiplied by.
float Scale(const QueryFinishParams& p, const float* x) {
  if (!p.bf16_steps) {
    const float squares = SumOfSquares(p.d, [x](int64_t i) { return x[i] * x[i]; });
    return InverseRoot(squares * p.reciprocal_d + p.eps);
  }
  const float squares = SumOfSquares(p.d, [x](int64_t i) { return Rounded(x[i] * x[i]); });
  return Rounded(InverseRoot(Rounded(Rounded(squares * p.reciprocal_d) + p.eps)));
}

}  // namespace

void QueryFinishCpu(const QueryFinishParams& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t d = params.d, nope = d - params.rotary;
  std::vector<float> x(d);
  std::vector<SinCos> turns(params.rotary / 2);
  for (int64_t token = first; token < last; ++token) {
    for (int64_t i = 0; i < params.rotary / 2; ++i) {
      turns[i] = SinCosAt(params.positions[token], params.frequencies[i]);
    }
    for (int64_t row = token * params.h; row < (token + 1) * params.h; ++row) {
      for (int64_t i = 0; i < d; ++i) x[i] = Bf16ToFloat(params.x[row * d + i]);
      const float scale = Scale(params, x.data());
      uint16_t* y = params.y + row * d;
      for (int64_t i = 0; i < d; ++i) y[i] = FloatToBf16(x[i] * scale);
      for (int64_t i = 0; i < params.rotary / 2; ++i) {
        uint16_t* pair = y + nope + 2 * i;
        const Pair turned = Turned(Bf16ToFloat(pair[0]), Bf16ToFloat(pair[1]), turns[i]);
        pair[0] = FloatToBf16(turned.even);
        pair[1] = FloatToBf16(turned.odd);
      }
    }
  }
}

}  // namespace dsv4
