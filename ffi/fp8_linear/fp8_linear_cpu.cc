#include "common/linear_cpu.h"
#include "fp8_linear/fp8_linear.h"

namespace dsv4 {

void Fp8LinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                  int64_t last) {
  LinearCpu(WeightForm::kFp8, params, x, first, last);
}

}  // namespace dsv4
