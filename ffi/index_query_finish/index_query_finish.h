// What an indexer query goes through between its projection and the scores (model.md 3.5, 4.5).
#pragma once

#include <cstdint>

#include "common/channels.h"
#include "query_finish/query_finish.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

enum class IndexQueryForm : int32_t {
  kMxfp4 = 1,  // E2M1 with a power of two per 32 channels
  kFp8 = 2,    // E4M3 with one power of two
};

// Every head by itself:
//   y = bf(H bf(turned x) / sqrt(d)), the last `rotary` channels turned by positions[token],
//   H the Hadamard matrix in Sylvester order by butterflies of neighbours first
// as codes under powers of two. The order of additions is that of the butterflies, so that the CPU
// handler, the kernel and the formula in jax.numpy have the same bits but for the rotation's.
struct IndexQueryFinishParams {
  const uint16_t* x;         // [t, h, d] BF16
  const int32_t* positions;  // [t]
  const float* frequencies;  // [rotary / 2]
  uint8_t* code;             // [t, h, d / 2] or [t, h, d]
  uint8_t* scale;            // [t, h, d / 32] or [t, h, 1]
  int64_t t, h, d, rotary;   // d 32, 64 or 128; rotary a multiple of 8
  float norm;                // 1 / sqrt(d), rounded
  IndexQueryForm form;
};

constexpr int64_t kIndexQueryMaxWidth = 128;
constexpr int kIndexQueryBlock = 32;  // channels under one scale of kMxfp4

// Tokens first <= i < last.
void IndexQueryFinishCpu(const IndexQueryFinishParams& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t IndexQueryFinishCuda(const IndexQueryFinishParams& params, cudaStream_t stream);

// And QueryFinishCuda of the same tokens: one launch for few of them.
cudaError_t BothQueriesCuda(const IndexQueryFinishParams& params, const QueryFinishParams& heads,
                            cudaStream_t stream);
#endif

}  // namespace dsv4
