#include <algorithm>
#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/e4m3.h"
#include "common/ue8m0.h"
#include "rmsnorm_fp8/rmsnorm_fp8.h"

namespace dsv4 {

void RmsnormFp8Cpu(const RmsnormFp8Params& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t d = params.d, blocks = (d + kActBlock - 1) / kActBlock;
  std::vector<float> y(d);
  for (int64_t token = first; token < last; ++token) {
    NormToken(params.x + token * d, params.weight, d, params.reciprocal_d, params.eps, y.data());
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kActBlock, end = std::min(begin + kActBlock, d);
      uint32_t largest = 0;  // magnitudes compare as integers, NaN above all
      for (int64_t i = begin; i < end; ++i) {
        largest = std::max(largest, FloatBits(y[i]) & 0x7FFFFFFFu);
      }
      const uint32_t byte = Fp8ScaleByte(largest);
      const float inverse = InverseScale(byte);
      params.scale[token * blocks + block] = static_cast<uint8_t>(byte);
      for (int64_t i = begin; i < end; ++i) params.code[token * d + i] = EncodeE4m3(y[i] * inverse);
    }
  }
}

}  // namespace dsv4
