// Linear with FP8 weights: E4M3, UE8M0 per 128x128 tile (model.md 4.6). The kernel is
// Fp8LinearCuda of common/linear.h.
#pragma once

#include <cstdint>

#include "common/linear.h"

namespace dsv4 {

class LinearActivations;

// Rows first <= i < last of the weight, for the tokens of x.
void Fp8LinearCpu(const LinearParams& params, const LinearActivations& x, int64_t first,
                  int64_t last);

#ifdef DSV4_CUDA
// Prefill on FP8 tensor cores of a Hopper GPU: whether the kernel can, and whether there is so much
// work that it is the fastest; linears of one x, which is quantised once.
bool Fp8PrefillTakes(const LinearParams& params);
bool Fp8PrefillPays(const LinearParams& params);
cudaError_t Fp8PrefillSm90(const LinearParams* parts, int n_parts, cudaStream_t stream);
#endif

}  // namespace dsv4
