// RMS norm whose BF16 result goes straight to NVFP4 (model.md 2.3, 9.2).
#pragma once

#include <cstdint>

#include "common/rmsnorm.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

// y = bf(weight * (x * 1 / sqrt(mean(x^2) + eps))); code, block_scale, token_scale = nvfp4(y).
//
// The CPU handler and the kernel add in the order of common/rmsnorm.h, so that their outputs are
// equal bit for bit.
struct RmsnormNvfp4Params {
  const uint16_t* x;          // [t, d] BF16
  const uint16_t* weight;     // [d] BF16
  const float* global_scale;  // [1], or nullptr: of each token's largest magnitude
  uint8_t* code;              // [t, d / 2], element 0 in the low nibble
  uint8_t* block_scale;       // [t, d / 16] E4M3
  float* token_scale;         // [t]
  int64_t t, d;               // d a multiple of 16, at most kNormMaxDim
  float eps;
  float reciprocal_d;  // 1 / d, rounded
};

// Tokens first <= i < last.
void RmsnormNvfp4Cpu(const RmsnormNvfp4Params& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t RmsnormNvfp4Cuda(const RmsnormNvfp4Params& params, cudaStream_t stream);
#endif

}  // namespace dsv4
