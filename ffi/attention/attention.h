// Attention over keys in storage format, one softmax with a sink per head (model.md 3.4).
#pragma once

#include <cstdint>

#include "common/linear.h"
#include "common/parallel.h"

namespace dsv4 {

// Keys (= values) of every batch row, as stored (model.md 4.4): `nope` channels in E4M3 with a
// power of two per 64, `rope` channels in BF16. Strides count elements from one slot to the next; a
// batch row begins `slots` strides after the one before.
struct KeyRows {
  const uint8_t* nope;   // [b, slots, nope] E4M3
  const uint8_t* scale;  // [b, slots, nope / 64] UE8M0
  const uint16_t* rope;  // [b, slots, rope] BF16
  int64_t slots;         // 0: there are none, and the pointers may be nullptr
  int64_t stride_nope, stride_scale, stride_rope;
};

// The query of batch row b at position p = positions[b, j] sees
//   - positions max(0, p - window + 1) .. p: those from start[b] on in `chunk` (row position -
//     start[b]), older ones in `ring` (row position % ring.slots);
//   - of `pool`, entries 0 .. n_visible - 1: all of them, or those named by topk_idx (others, and
//     ids outside 0 .. n_visible - 1, are skipped).
//   a_u = d^-0.5 q . key_u;  e_u = exp(a_u - M), M the largest a_u or the sink
//   o = sum_u bf(e_u) key_u / (sum_u e_u + exp(sink - M));  lse = M + log(the denominator)
// and, with frequencies, the rope channels of o are rounded to BF16 and rotated back by p. A query
// at a negative position has no key of the window. No key at all: o = 0, lse = sink.
struct AttentionParams {
  const uint16_t* q;  // [b, t, h, nope + rope] BF16
  KeyRows ring, chunk, pool;
  const int32_t* positions;  // [b, t]
  const int32_t* start;      // [b]; nullptr: everything is in the ring
  const int32_t* n_visible;  // [b, t]; nullptr without pool
  const int32_t* topk_idx;   // [b, t, topk], or nullptr
  const float* sink;         // [h]
  const float* frequencies;  // [rope / 2] of the inverse rotation, or nullptr: none
  uint16_t* o;               // [b, t, h, nope + rope] BF16
  float* lse;                // [b, t, h], or nullptr
  int64_t b, t, h, nope, rope, window, topk;
  int64_t stride_q, stride_o;  // elements from one token to the next
  Regime regime;
};

// The most channels of a key.
constexpr int64_t kAttentionMaxWidth = 2048;

void AttentionCpu(const AttentionParams& params, const ParallelLoop& parallel);

#ifdef DSV4_CUDA
cudaError_t AttentionCuda(const AttentionParams& params, cudaStream_t stream);

// attention_sm90.cu: whether it serves such a call, and the call.
bool AttentionSm90Takes(const AttentionParams& params);
cudaError_t AttentionSm90(const AttentionParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
