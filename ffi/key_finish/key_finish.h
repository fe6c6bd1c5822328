// What a key goes through between its projection and where attention reads it (model.md 3.2, 4.4).
#pragma once

#include <cstdint>

#include "common/channels.h"
#include "common/host_device.h"
#include "rmsnorm_fp8/rmsnorm_fp8.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

constexpr int kKeyBlock = 64;  // channels under one scale

// Keys as they are stored: [rows, nope] E4M3, [rows, nope / 64] UE8M0, [rows, rotary] BF16.
struct KeyStore {
  uint8_t* nope;
  uint8_t* scale;
  uint16_t* rope;
};

// Row b appends positions start[b] .. start[b] + count[b] - 1; count is held to 0 .. t.
//   y = bf(weight * (x * 1 / sqrt(mean(x^2) + eps))), its last `rotary` channels turned by the
//   row's position start[b] + j, the others E4M3 codes under a power of two per 64
// goes to row j of `rows` (padding too) and, if it is appended and one of the last `ring` positions
// of its row, to slot position % ring of `ring`; nothing else of that is touched. The CPU handler
// and the kernel add in the order of common/channels.h, so that their results are equal bit for
// bit; the mean is the product with the rounded 1 / d.
struct KeyFinishParams {
  const uint16_t* x;         // [b, t, d] BF16
  const uint16_t* weight;    // [d] BF16
  const int32_t* start;      // [b]
  const int32_t* count;      // [b]; nullptr without a ring
  const float* frequencies;  // [rotary / 2]
  KeyStore rows;             // [b, t, ...]
  KeyStore ring;             // [b, slots, ...]
  int64_t b, t, d, rotary;   // d - rotary a multiple of 64
  int64_t slots;             // of the ring; 0: there is none
  float eps;
  float reciprocal_d;  // 1 / d, rounded
};

// A norm of queries beside the keys.
struct QueryNormParams : RmsnormFp8Params {
  uint16_t* y;  // [t, d] BF16 in place of code and scale, or nullptr
};

// As JAX adds int32.
DSV4_HOST_DEVICE inline int32_t KeyPosition(int32_t start, int64_t j) {
  return static_cast<int32_t>(static_cast<uint32_t>(start) + static_cast<uint32_t>(j));
}

// The slot of a row's j-th token in its ring, -1 for none. Lengths are data that nobody has
// checked.
DSV4_HOST_DEVICE inline int64_t RingSlot(int32_t start, int32_t count, int64_t j, int64_t t,
                                         int64_t slots) {
  const int64_t taken = count < t ? count : t;
  if (start < 0 || j >= taken || j < taken - slots) return -1;
  // Below 2^32: lengths are int32.
  return static_cast<uint32_t>(start + j) % static_cast<uint32_t>(slots);
}

// Rows first <= i * t + j < last; disjoint ranges may run at the same time.
void KeyFinishCpu(const KeyFinishParams& params, int64_t first, int64_t last);
// Tokens first <= i < last.
void QueryNormCpu(const QueryNormParams& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t KeyFinishCuda(const KeyFinishParams& params, cudaStream_t stream);

// And a norm that does not depend on the keys: one launch for few tokens.
cudaError_t KeyFinishNormCuda(const KeyFinishParams& params, const QueryNormParams& norm,
                              cudaStream_t stream);
#endif

}  // namespace dsv4
