// What the CPU handlers of linears, experts, attention and indexer are made of: stored values
// decoded to FP32, activations rounded as the product wants them, and sums of products in one fixed
// order, whatever the instruction set.
//
// Callers hold a KeepDenormals: weights of UE8M0 byte 0 and their products are subnormal numbers.
#pragma once

#include <cstdint>

#include "common/linear.h"

namespace dsv4 {

// Rows that take part in DotBlock are this many values long, or a multiple; zeros fill them up.
constexpr int64_t kDotLanes = 16;

inline int64_t PaddedInputs(int64_t k) { return (k + kDotLanes - 1) / kDotLanes * kDotLanes; }

// Values of elements first .. first + count of one row of a weight [n, k], times its scales but not
// the global one, all exact in BF16; `first` is a multiple of 128. `scale` as in LinearParams; of a
// stack of weights pass the one's `weight` and `scale`. Zeros follow up to PaddedInputs(count).
void DecodeWeights(WeightForm form, const void* weight, const uint8_t* scale, int64_t k,
                   int64_t row, int64_t first, int64_t count, float* out);

// Values of E4M3 codes of a cache with a UE8M0 scale per 64; exact in BF16.
void DecodeKeyCodes(const uint8_t* code, const uint8_t* scale, int64_t count, float* out);

// Values of E4M3 codes with one UE8M0 scale; exact in BF16.
void DecodeTokenCodes(const uint8_t* code, uint8_t scale, int64_t count, float* out);

// x[0 .. k) as FP32, BF16 or FP32 before.
void LoadActivations(const void* x, bool x_float32, int64_t k, float* out);

// x[0 .. k) of E4M3 codes with a UE8M0 scale per 128; exact in BF16. k is a multiple of 128.
void DecodeActivations(const void* code, const uint8_t* scale, int64_t k, float* out);

// One token's x as the product reads it: the values decoded again, exact in BF16, without the
// token's global scale, which is returned (1 but for kNvfp4). `act_scale`: the static one, or
// nullptr. `out` may be `x`; zeros follow up to PaddedInputs(k). k is a multiple of 16 for kNvfp4.
float RoundActivations(ActForm act, const float* x, int64_t k, const float* act_scale, float* out);

// out[j * out_stride + i] = sum over k of rows[i * row_stride + .] * tokens[j * token_stride + .].
//
// Sixteen partial sums, elements l, l + 16, l + 32, ... in sequence in sum l; then by halves: sums
// 0-7 plus 8-15, and so on. A result depends on its two operands only. k: a multiple of 16.
void DotBlock(const float* rows, int64_t row_stride, int64_t row_count, const float* tokens,
              int64_t token_stride, int64_t token_count, int64_t k, float* out, int64_t out_stride);

// out[j * out_stride + i] = sum over r of weight[j * weight_stride + r] * rows[r * row_stride + i],
// one after the other. k: a multiple of 16.
void WeightedSums(const float* weight, int64_t weight_stride, int64_t token_count,
                  const float* rows, int64_t row_stride, int64_t row_count, int64_t k, float* out,
                  int64_t out_stride);

}  // namespace dsv4
