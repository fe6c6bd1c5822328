// Ragged rows into rings and pools, in place.
#pragma once

#include <cstdint>

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

// One array of the store. Rows of several arrays (codes, scales, rotary part) share their slots.
struct CacheWritePart {
  uint8_t* cache;       // [b, s, row_bytes]
  const uint8_t* rows;  // [b, t, row_bytes]
  int64_t row_bytes;
};

constexpr int kMaxCacheWriteParts = 8;

// cache[i, slots[i, j]] = rows[i, j]; a slot outside [0, s) drops its row.
struct CacheWriteParams {
  CacheWritePart parts[kMaxCacheWriteParts];
  int n_parts;
  const int32_t* slots;  // [b, t]; distinct within a sequence where in range
  int64_t b, s, t;
};

// Writes rows first <= i * t + j < last; disjoint ranges may run at the same time.
void CacheWriteCpu(const CacheWriteParams& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t CacheWriteCuda(const CacheWriteParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
