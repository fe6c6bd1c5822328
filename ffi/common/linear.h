// What the linears share: y = act(x) . (weight * scales)^T with FP32 sums (model.md 4.6, 9.3).
#pragma once

#include <cstdint>

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace dsv4 {

enum class WeightForm : int32_t {
  kBf16 = 0,
  kFp8 = 1,    // E4M3, UE8M0 per 128x128
  kMxfp4 = 2,  // E2M1, UE8M0 per 32 inputs
  kNvfp4 = 3,  // E2M1, E4M3 per 16 inputs, one FP32 global scale
};

// How an activation is rounded before the product.
enum class ActForm : int32_t {
  kBf16 = 0,   // to BF16
  kFp8 = 1,    // E4M3 with a power of two per token and 128 inputs
  kNvfp4 = 2,  // E2M1, E4M3 per 16 and one FP32 scale per token, or a static one
};

// Which kernel serves a call. A row's result is the same bits in every call of one regime.
enum class Regime : int32_t {
  kAuto = 0,     // by the number of tokens
  kDecode = 1,   // thread blocks share the inputs of few rows
  kPrefill = 2,  // a thread block sums all inputs
  kExact = 3,    // as kDecode, never on FP8 tensor cores
};

struct LinearParams {
  const void* x;              // [t, groups, k] BF16 or FP32, or E4M3 codes where x_scale is
  const uint8_t* x_scale;     // kFp8 activations that are quantised: [t, groups, k/128], or nullptr
  const void* up;             // BF16, with x in BF16 and both kFp8 or both kNvfp4: ClampedSwiglu of
                              // the two in place of x, rounded to BF16; or nullptr
  const void* weight;         // [n, k]; two 4-bit codes a byte, element 0 in the low nibble
  const uint8_t* scale;       // kFp8 [ceil(n/128), ceil(k/128)], kMxfp4 [n, k/32], kNvfp4 [n, k/16]
  const float* global_scale;  // kNvfp4: [1]
  const float* act_scale;     // kNvfp4 activations: [1] static, or nullptr: of each token's largest
  void* y;                    // [t, n] (rows of group g: g * n/groups ..), FP32 or BF16
  void* scratch;              // CUDA: at least LinearScratchBytes(t, groups, k)
  int64_t t, groups, n, k;    // n: rows of all groups; a group's x meets n / groups of them
  float limit;                // of up
  bool x_float32, y_bf16;
  ActForm act;
  Regime regime;
};

constexpr int kMaxLinearParts = 8;

// One x times several weights: the parts differ in weight, scales of it, y, its dtype and n alone,
// and none is empty.
struct LinearsParams {
  LinearParams parts[kMaxLinearParts];
  int n_parts;
};

// Device bytes a call may need besides its operands: x in the order of the kernels, and its scales.
inline int64_t LinearScratchBytes(int64_t t, int64_t groups, int64_t k) {
  const int64_t tokens = (t + 127) / 128 * 128, inputs = (k + 127) / 128 * 128;
  return tokens * groups * (inputs * 2 + 4) + 256;
}

#ifdef DSV4_CUDA
cudaError_t DenseLinearCuda(const LinearsParams& params, cudaStream_t stream);
cudaError_t Fp8LinearCuda(const LinearsParams& params, cudaStream_t stream);
cudaError_t Mxfp4LinearCuda(const LinearParams& params, cudaStream_t stream);
cudaError_t Nvfp4LinearCuda(const LinearsParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
