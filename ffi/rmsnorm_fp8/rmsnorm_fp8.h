// RMS norm whose BF16 result goes straight to FP8 (model.md 2.3, 4.5).
#pragma once

#include <cstdint>

#include "common/rmsnorm.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

constexpr int kActBlock = 128;  // channels under one scale

// y = bf(weight * (x * 1 / sqrt(mean(x^2) + eps))); code, scale = q8(y) in blocks of 128, of which
// the last may be shorter.
//
// The CPU handler and the kernel add in the order of common/rmsnorm.h, so that their outputs are
// equal bit for bit.
struct RmsnormFp8Params {
  const uint16_t* x;       // [t, d] BF16
  const uint16_t* weight;  // [d] BF16
  uint8_t* code;           // [t, d] E4M3
  uint8_t* scale;          // [t, ceil(d / 128)] UE8M0
  int64_t t, d;            // d a multiple of 16, at most kNormMaxDim
  float eps;
  float reciprocal_d;  // 1 / d, rounded
};

// Tokens first <= i < last.
void RmsnormFp8Cpu(const RmsnormFp8Params& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t RmsnormFp8Cuda(const RmsnormFp8Params& params, cudaStream_t stream);
#endif

}  // namespace dsv4
