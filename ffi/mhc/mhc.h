// Manifold hyper-connections: the write-back of a branch into the residual streams, the next read
// of them, the norm and the quantisation behind it, in one step (model.md 2.2-2.4, 4.5, 9.2).
#pragma once

#include <cstdint>

#include "common/linear.h"

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

constexpr int kMhcStreams = 4;
constexpr int kMhcMixes = 24;     // 4 of pre, 4 of post, 16 of comb
constexpr int kMhcHeadMixes = 4;  // pre alone: the collapse in front of the head
constexpr int kMhcTile = 128;     // channels of a partial sum
constexpr int64_t kMhcMaxDim = 16384;
constexpr int kMhcSumStride = 28;  // of a tile's partial sums: the mixes, at 24 the squares

// Forms of the read's result, as bits.
constexpr int kMhcBf16 = 1, kMhcNvfp4 = 2, kMhcFp8 = 4;

// Write-back, if there is a branch:  S_k = bf(post_k f + sum_j comb[j, k] S_j).
// Read, if there is fn, of the rounded S:
//   mix = (fn . flat) * 1 / sqrt(mean(flat^2) + rms_eps)
//   pre = sigmoid(mix[0..3] scale[0] + base) + hc_eps;  y = bf(sum_j pre_j S_j)
//   x = bf(norm * (y * 1 / sqrt(mean(y^2) + rms_eps))), as it is and quantised
//   post = 2 sigmoid(mix[4..7] scale[1] + base);  comb = sinkhorn(mix[8..23] scale[2] + base)
//
// The CPU handler and, in the regimes kDecode and kExact, the kernels do the same operations in the
// same order, whatever the number of tokens, so that their outputs are equal bit for bit (but for
// the payload of a NaN). In the regime kPrefill a tile's mixes are sums of exact products on tensor
// cores, of eight times 64 channels of a stream, in FP32 in an order of theirs; all else is the
// same, and a token still depends on no other. kAuto: kDecode for up to 8 tokens.
// - A sum over streams is a chain of fused multiply-adds, streams ascending, begun by a product.
// - A sum over the flat streams (a mix, the squares) is a chain of 16 fused multiply-adds from zero
//   over 4 neighbouring channels, stream by stream; 32 such lanes by halves (lane i and i + 16,
//   ...) are a tile; 32 tiles by halves; those groups in sequence. The norm of y: see rmsnorm.h.
// - A mean is the product with the rounded reciprocal of the count. Sums of four of comb: see
//   mhc_weights.h. The exponential is that of common/exp.h.
struct MhcParams {
  const uint16_t* streams;    // [t, 4, d] BF16
  const uint16_t* branch;     // [t, d] BF16, or nullptr: no write-back
  const float* post;          // [t, 4]
  const float* comb;          // [t, 4, 4]
  uint16_t* new_streams;      // [t, 4, d] BF16, maybe `streams`; with a branch
  const float* fn;            // [mixes, 4 d], or nullptr: no read
  const float* base;          // [mixes]
  const float* scale;         // [3], or [1] where mixes = 4
  const uint16_t* norm;       // [d] BF16
  const float* global_scale;  // [1], or nullptr: of each token's largest magnitude
  float* next_post;           // [t, 4]; where mixes = 24
  float* next_comb;           // [t, 4, 4]
  uint16_t* x;                // [t, d] BF16, or nullptr
  uint8_t* code4;             // [t, d / 2] E2M1, element 0 in the low nibble, or nullptr
  uint8_t* block_scale;       // [t, d / 16] E4M3
  float* token_scale;         // [t]
  uint8_t* code8;             // [t, d] E4M3, or nullptr
  uint8_t* scale8;            // [t, d / 128] UE8M0
  float* scratch;             // MhcScratchBytes, on the GPU, with fn
  int64_t t, d;               // d a multiple of 128, at most kMhcMaxDim
  int mixes, iters;
  Regime regime;  // of the kernels
  float hc_eps, rms_eps;
  float reciprocal_d, reciprocal_flat;  // 1 / d and 1 / (4 d), rounded
};

// Every tile's partial sums.
inline int64_t MhcScratchBytes(int64_t t, int64_t d) {
  return t * (d / kMhcTile) * kMhcSumStride * static_cast<int64_t>(sizeof(float));
}

// Tokens first <= i < last.
void MhcCpu(const MhcParams& params, int64_t first, int64_t last);

#ifdef DSV4_CUDA
cudaError_t MhcCuda(const MhcParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
