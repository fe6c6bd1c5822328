#include "common/linear_cpu.h"
#include "mxfp4_linear/mxfp4_linear.h"

namespace dsv4 {

void Mxfp4LinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                    int64_t last) {
  LinearCpu(WeightForm::kMxfp4, params, x, first, last);
}

}  // namespace dsv4
