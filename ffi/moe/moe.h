// Routed experts: clamped SwiGLU of every token's picks, summed in ascending expert order
// (model.md 5.2, 5.3).
#pragma once

#include <cstdint>

#include "common/linear.h"
#include "common/parallel.h"
#include "common/swiglu.h"

namespace dsv4 {

// One stack of expert weights [experts, rows, inputs] with its scales.
struct ExpertWeights {
  const uint8_t* weight;
  const uint8_t* scale;       // kMxfp4 [e, rows, inputs/32], kNvfp4 [e, rows, inputs/16]
  const float* global_scale;  // kNvfp4: [e]
};

// For every token and pick i with expert e in first_expert .. first_expert + experts:
//   gate, up = bf(w1_e act(x)), bf(w3_e act(x));  h = bf(weight_i * silu(min(gate, limit)) *
//   clip(up, -limit, limit));  y_i = bf(w2_e act(h))
// where act may use static scales of the expert.
// y = sum of y_i in the order of the picks, in FP32, + shared; rounded if y is BF16. Picks outside
// the range, and tokens that are not valid, add nothing.
struct MoeParams {
  const uint16_t* x;           // [t, d] BF16
  const int32_t* expert_idx;   // [t, k] ascending per token
  const float* expert_weight;  // [t, k]
  const uint8_t* valid;        // [t] 0 or 1
  const uint16_t* shared;      // [t, d] BF16, or nullptr
  // Static global scales of NVFP4 activations: of what enters w1 and w3, and w2. Both or neither.
  const float* up_act_scale;    // [e], or nullptr: of each token's largest
  const float* down_act_scale;  // [e], or nullptr
  ExpertWeights w1, w3;         // rows = inter, inputs = d
  ExpertWeights w2;             // rows = d, inputs = inter
  void* y;                      // [t, d] FP32 or BF16
  void* scratch;                // CUDA: at least MoeScratchBytes
  int64_t t, k, experts, d, inter;
  int64_t first_expert;
  float limit;
  bool y_bf16;
  WeightForm form;  // kMxfp4 or kNvfp4
  ActForm act;
  Regime regime;
  bool power_of_two;  // kNvfp4: every block scale is a power of two (or zero), none negative
};

// Slots of sorted (token, pick) pairs: every expert's run is padded by less than 64.
inline int64_t MoeMaxSlots(int64_t pairs, int64_t experts) {
  return pairs + 63 * (experts < pairs ? experts : pairs);
}

// Device bytes of a call besides its operands: per slot x and h in the kernels' order (inputs
// padded to 128), h, y and tables; per pair its slot.
inline int64_t MoeScratchBytes(int64_t t, int64_t k, int64_t experts, int64_t d, int64_t inter) {
  const int64_t padded_d = (d + 127) / 128 * 128, padded_inter = (inter + 127) / 128 * 128;
  return MoeMaxSlots(t * k, experts) * (2 * (padded_d + padded_inter + d + inter) + 32) +
         4 * t * k + 4096;
}

void MoeCpu(const MoeParams& params, const ParallelLoop& parallel);

#ifdef DSV4_CUDA
cudaError_t MoeCuda(const MoeParams& params, cudaStream_t stream);
#endif

}  // namespace dsv4
