// Windows of tokens pooled into one entry each, as they close (model.md 3.5, 4.2).
#pragma once

#include <cstdint>

#include "common/parallel.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

// How an entry is stored (model.md 4.4): `code`, `scale` and, for keys, `rope`.
enum class EntryForm : int32_t {
  kKv = 1,     // E4M3 with a power of two per 64 channels, then `rotary` channels in BF16
  kMxfp4 = 2,  // Hadamard transform, then E2M1 with a power of two per 32
  kFp8 = 3,    // Hadamard transform, then E4M3 with one power of two
};

// One compressor of a layer. c = 2 for ratio 4, else 1. `gate` is without `ape`, its state with.
struct CompressorJob {
  const float* kv;       // [b, t, c * d]
  const float* gate;     // [b, t, c * d]
  const float* ape;      // [ratio, c * d]
  const uint16_t* norm;  // [d] BF16
  float* kv_state;       // [b, ring, c * d], position p in row p % ring; read, then written
  float* gate_state;     // [b, ring, c * d]
  uint8_t* code;         // [b, slots, code_bytes]
  uint8_t* scale;        // [b, slots, scales]
  uint16_t* rope;        // [b, slots, rotary] BF16, for kKv
  int64_t d, ring, slots, code_bytes, scales;
  EntryForm form;
};

constexpr int kMaxCompressorJobs = 2;

// Batch row b appends positions start[b] .. start[b] + count[b] - 1; count is held to 0 .. t, and a
// negative start appends nothing. Window w holds positions w * ratio .. w * ratio + ratio - 1 and
// closes when the last of them is appended. Its slots are those positions (ratio 4: their second
// halves of channels, and before them the first halves of window w - 1's, which window 0 has not).
//   x = bf(sum_s exp(g_s - max g) z_s / sum_s exp(g_s - max g))
//   y = bf(norm * (x * 1 / sqrt(mean(x^2) + eps))), rotary channels turned by w * ratio
// y goes to entry w of the pool, if there is one, as `form` says; then the last positions to the
// states.
//
// The CPU handler and the kernel add in the same order: slot s belongs to lane s % 16, a lane adds
// its slots in sequence, lanes are added by halves. Squares: four channels in sequence, 16 such by
// halves, those groups of 64 in sequence.
struct CompressorParams {
  CompressorJob jobs[kMaxCompressorJobs];
  int n_jobs;
  const int32_t* start;      // [b]
  const int32_t* count;      // [b]
  const float* frequencies;  // [rotary / 2]
  int64_t b, t, ratio, rotary;
  float eps;
};

constexpr int64_t kCompressorMaxRatio = 128;
constexpr int64_t kCompressorMaxWidth = 512;       // of keys
constexpr int64_t kCompressorMaxIndexWidth = 128;  // a power of two, at least 32

void CompressorCpu(const CompressorParams& params, const ParallelLoop& parallel);

#ifdef DSV4_CUDA
cudaError_t CompressorCuda(const CompressorParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
