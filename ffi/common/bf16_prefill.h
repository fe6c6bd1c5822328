// Many BF16 tokens times BF16 or E4M3 weights on a Hopper GPU, both as they lie in memory
// (bf16_prefill_sm90.cu). Knows nothing of XLA.
#pragma once

#include <cuda_runtime_api.h>

#include "common/linear.h"

namespace dsv4 {

// Whether the kernel can, which the number of tokens has no say in; whether there is so much work
// that it is the fastest; linears of one x in one launch.
bool Bf16PrefillTakes(WeightForm form, const LinearParams& params);
bool Bf16PrefillPays(const LinearParams& params);
cudaError_t Bf16PrefillSm90(WeightForm form, const LinearParams* parts, int n_parts,
                            cudaStream_t stream);

}  // namespace dsv4
