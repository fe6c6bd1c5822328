#include "common/linear_cpu.h"
#include "nvfp4_linear/nvfp4_linear.h"

namespace dsv4 {

void Nvfp4LinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                    int64_t last) {
  LinearCpu(WeightForm::kNvfp4, params, x, first, last);
}

}  // namespace dsv4
