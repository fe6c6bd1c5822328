// What a query goes through between its projection and attention (model.md 3.1, 3.3).
#pragma once

#include <cstdint>

#include "common/channels.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

// Every head by itself:
//   y = bf(x * 1 / sqrt(mean(x^2) + eps)), its last `rotary` channels turned by positions[token].
// With bf16_steps the squares, their mean, its sum with eps and the root are rounded to BF16 as
// well. The CPU handler and the kernel add in the order of common/channels.h, so that their results
// are equal bit for bit; the mean is the product with the rounded 1 / d.
struct QueryFinishParams {
  const uint16_t* x;         // [t, h, d] BF16
  const int32_t* positions;  // [t]
  const float* frequencies;  // [rotary / 2]
  uint16_t* y;               // [t, h, d] BF16
  int64_t t, h, d, rotary;   // d, rotary multiples of 8, up to kRowMaxChannels and kMaxRotary
  float eps;
  float reciprocal_d;  // 1 / d, rounded
  bool bf16_steps;
};

// Tokens first <= i < last.
void QueryFinishCpu(const QueryFinishParams& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t QueryFinishCuda(const QueryFinishParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
