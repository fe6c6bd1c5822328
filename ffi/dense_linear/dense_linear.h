// Linears with BF16 weights and activations (compressor projections, head, router). The kernel is
// DenseLinearCuda of common/linear.h.
#pragma once

#include <cstdint>

#include "common/linear.h"

namespace dsv4 {

class LinearActivations;

// Rows first <= i < last of one weight, for the tokens of x.
void DenseLinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                    int64_t last);

}  // namespace dsv4
