// Linears with BF16 weights and activations (compressor projections, head, router).
#pragma once

#include <cstdint>

#include "common/linear.h"

namespace dsv4 {

class LinearActivations;

constexpr int kMaxDenseLinearParts = 8;

// One x times several weights: the parts differ in weight, y and n alone, and none is empty.
struct DenseLinearParams {
  LinearParams parts[kMaxDenseLinearParts];
  int n_parts;
};

// Rows first <= i < last of one weight, for the tokens of x.
void DenseLinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                    int64_t last);

#ifdef DSV4_CUDA
cudaError_t DenseLinearCuda(const DenseLinearParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
