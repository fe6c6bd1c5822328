// Linear with MXFP4 weights: E2M1, UE8M0 per 32 inputs (model.md 4.6 lin4). The kernel is
// Mxfp4LinearCuda of common/linear.h.
#pragma once

#include <cstdint>

#include "common/linear.h"

namespace dsv4 {

class LinearActivations;

// Rows first <= i < last of the weight, for the tokens of x.
void Mxfp4LinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                    int64_t last);

}  // namespace dsv4
