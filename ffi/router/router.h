// Expert selection and weights from the router's logits (model.md 5.1).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/exp.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

constexpr int64_t kRouterMaxExperts = 1024;
constexpr int64_t kRouterMaxPicks = 32;

// score = sqrt(softplus(logits)); the k largest score + bias, ties to the lower id (NaN counts as
// the largest), or the given ids; ids in ascending order; weight = score / sum of the picks' scores
// (in that order) * scale. A given id outside the experts has weight 0 and no part in the sum.
// Given ids are those of each token, or a table of which a token has the row of its id.
struct RouterParams {
  const float* logits;       // [t, experts]
  const float* bias;         // [experts], or nullptr: ids are given
  const int32_t* given_idx;  // [t or rows, k], or nullptr
  const int32_t* tokens;     // [t], or nullptr: a row of given_idx is a token's
  int32_t* expert_idx;       // [t, k]
  float* expert_weight;      // [t, k]
  int64_t t, experts, k;
  int64_t rows;  // of given_idx with tokens, 1 .. 2^31; an id outside has the first or the last
  float scale;
};

// A token's ids.
DSV4_HOST_DEVICE inline const int32_t* GivenIdx(const RouterParams& p, int64_t token) {
  int64_t row = token;
  if (p.tokens != nullptr) {
    row = p.tokens[token];
    row = row < 0 ? 0 : row < p.rows ? row : p.rows - 1;
  }
  return p.given_idx + row * p.k;
}

// sqrt(softplus(z)) within 2 ulp; below -20 exp(z / 2), which softplus equals to FP32 there and
// which does not underflow as soon.
DSV4_HOST_DEVICE inline float RouterScore(float z) {
  if (z < -20.0f) return Exp(0.5f * z);
  const float above = z > 0.0f ? z : 0.0f;
  return sqrtf(above + Log1pUnit(Exp(z > 0.0f ? -z : z)));
}

// Larger for a better pick: by score + bias with NaN (of either sign) above all, then by the lower
// id. `id` < 2^32.
DSV4_HOST_DEVICE inline uint64_t RouterKey(float biased, int64_t id) {
  const uint32_t bits = FloatBits(biased + 0.0f);  // -0 becomes 0
  uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (biased != biased) order = 0xFFFFFFFFu;
  return static_cast<uint64_t>(order) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(id));
}

DSV4_HOST_DEVICE inline int32_t RouterKeyId(uint64_t key) {
  return static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

// Tokens first <= i < last.
void RouterCpu(const RouterParams& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t RouterCuda(const RouterParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
