#include "common/linear_cpu.h"
#include "dense_linear/dense_linear.h"

namespace dsv4 {

void DenseLinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                    int64_t last) {
  LinearCpu(WeightForm::kBf16, params, x, first, last);
}

}  // namespace dsv4
