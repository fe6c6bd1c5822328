#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/nvfp4_cpu.h"
#include "common/rmsnorm.h"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
void RmsnormNvfp4Cpu(const RmsnormNvfp4Params& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t d = params.d;
  std::vector<float> y(d);
  for (int64_t token = first; token < last; ++token) {
    NormToken(params.x + token * d, params.weight, d, params.reciprocal_d, params.eps, y.data());
    const int64_t blocks = d / kNvfp4Block;
    EncodeNvfp4Token(y.data(), d, params.global_scale, params.code + token * d / 2,
                     params.block_scale + token * blocks, params.token_scale + token);
  }
}

}  // namespace dsv4
