// Linear with NVFP4 weights: E2M1, E4M3 per 16 inputs, one FP32 global scale (model.md 9). The
// kernel is Nvfp4LinearCuda of common/linear.h.
#pragma once

#include <cstdint>

#include "common/linear.h"

namespace dsv4 {

class LinearActivations;

// Rows first <= i < last of the weight, for the tokens of x.
void Nvfp4LinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                    int64_t last);

}  // namespace dsv4
