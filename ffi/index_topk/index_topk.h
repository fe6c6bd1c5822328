// Lightning indexer: scores of compressed entries and the exact set of the best (model.md 3.5).
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "common/parallel.h"

#ifdef DSV4_CUDA
#include <cuda_runtime.h>
#endif

namespace dsv4 {

// How queries and keys are stored.
enum class IndexForm {
  kMxfp4,  // E2M1, two a byte, with a UE8M0 scale per 32
  kFp8,    // E4M3 with one UE8M0 scale
};

// Of the query (i, j), entry w < n_visible[i, j] of row i scores
//   score_w = sum_h round(weight[i, j, h] weight_scale) relu(q[i, j, h] . key[i, w])
// and idx gets the ids of the min(topk, n_visible) largest scores, ascending, then -1. Equal
// scores: the lower id first. -0 equals 0; NaN is below every number, above it -inf is a number.
// The scaled weights are rounded to what weights are.
struct IndexTopkParams {
  IndexForm form;
  const uint8_t* q;          // [b, t, h, d] codes
  const uint8_t* q_scale;    // [b, t, h, d / 32 or 1]
  const void* weight;        // [b, t, h] BF16 or FP32
  const uint8_t* key;        // [b, slots, d] codes
  const uint8_t* key_scale;  // [b, slots, d / 32 or 1]
  const int32_t* n_visible;  // [b, t]
  int32_t* idx;              // [b, t, topk]
  float* scores;  // [b, t, slots], or nullptr: the scores are not wanted (-inf: not visible)
  void* scratch;  // CUDA: scratch_bytes of it, of any contents
  int64_t scratch_bytes;
  int64_t b, t, h, d, slots, topk;
  float weight_scale;
  bool bf16_weight;
};

// The bits of a head's weight, and the weight that they are of: apart, so that a kernel may ask for
// many before it waits for one.
DSV4_HOST_DEVICE inline uint32_t IndexWeightBits(const IndexTopkParams& p, int64_t row) {
  return p.bf16_weight ? uint32_t{static_cast<const uint16_t*>(p.weight)[row]}
                       : static_cast<const uint32_t*>(p.weight)[row];
}
DSV4_HOST_DEVICE inline float IndexWeight(const IndexTopkParams& p, uint32_t bits) {
  if (!p.bf16_weight) return FloatFromBits(bits) * p.weight_scale;
  return Bf16ToFloat(FloatToBf16(Bf16ToFloat(static_cast<uint16_t>(bits)) * p.weight_scale));
}

// The most channels of a key.
constexpr int64_t kIndexTopkMaxWidth = 1024;

// The largest score of each group of entries helps to choose. Groups of a row are whole vectors of
// four.
constexpr int kIndexTopkGroup = 16;
DSV4_HOST_DEVICE constexpr int64_t IndexTopkGroups(int64_t slots) {
  return (slots + 4 * kIndexTopkGroup - 1) / (4 * kIndexTopkGroup) * 4;
}

// Device bytes of a call: scores of all queries and the largest of their groups, or of as many
// queries as fit this budget; at least of one.
constexpr int64_t kIndexTopkScratchBudget = int64_t{68} << 20;
inline int64_t IndexTopkRowBytes(int64_t slots) { return 4 * (slots + IndexTopkGroups(slots)); }
inline int64_t IndexTopkScratchBytes(int64_t queries, int64_t slots) {
  const int64_t row = IndexTopkRowBytes(slots);
  if (queries == 0 || row == 0) return 0;
  const int64_t rows = kIndexTopkScratchBudget / row;
  return row * (rows < 1 ? 1 : rows < queries ? rows : queries);
}

void IndexTopkCpu(const IndexTopkParams& params, const ParallelLoop& parallel);

#ifdef DSV4_CUDA
cudaError_t IndexTopkCuda(const IndexTopkParams& params, cudaStream_t stream);

// index_topk_sm90.cu: whether it serves such a call, how much scratch it wants at most, the call.
bool IndexTopkSm90Takes(const IndexTopkParams& params);
int64_t IndexTopkSm90ScratchBytes(const IndexTopkParams& params);
cudaError_t IndexTopkSm90(const IndexTopkParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
