// RMS norm of a token to FP8, or BF16, by a thread block: device code of rmsnorm_fp8 and of
// key_finish, which has it as a second job.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/e4m3.cuh"
#include "common/rmsnorm.cuh"
#include "common/ue8m0.h"
#include "common/vector_store.cuh"
#include "rmsnorm_fp8/rmsnorm_fp8.h"

namespace dsv4 {

constexpr int kScaleThreads = kActBlock / kNormBlock;  // side by side

// A block as BF16 and its scale, by kScaleThreads neighbours.
struct Quantised {
  uint4 codes;
  uint32_t scale;
};

__device__ __forceinline__ Quantised Quantise(const float (&values)[kNormBlock]) {
  uint32_t words[kNormWords];
  uint32_t pair_max = 0;
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) {
    words[i] = PackBf16(values[2 * i], values[2 * i + 1]);
    pair_max = MaxMagnitudes(pair_max, words[i]);
  }
#pragma unroll
  for (int half = 1; half < kScaleThreads; half *= 2) {
    pair_max = MaxMagnitudes(pair_max, __shfl_xor_sync(kNormLanes, pair_max, half));
  }
  Quantised y;
  y.scale = Fp8ScaleByteOfBf16(LargerOf(pair_max));
  const uint32_t inverse = InverseScaleBf16x2(y.scale);
  uint32_t codes[kNormWords / 2];
#pragma unroll
  for (int i = 0; i < kNormWords / 2; ++i) {
    uint32_t pair[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // exact but where the code is 0
      const uint32_t scaled = MulBf16x2(words[2 * i + k], inverse);
      pair[k] = EncodeE4m3Pair(Low(scaled), High(scaled));
    }
    codes[i] = pair[0] | pair[1] << 16;
  }
  y.codes = make_uint4(codes[0], codes[1], codes[2], codes[3]);
  return y;
}

// Every thread of the block calls it. kParts thread blocks may share a token: each sums all of it,
// which takes no word between them, and stores its part of the warps: store(values, block of the
// token, whether there is such a block).
template <int kBlocks, int kParts, int kMaxThreads, bool kAligned, typename Store>
__device__ __forceinline__ void NormTo(const RmsnormFp8Params& params, uint64_t token,
                                       uint32_t part, const Store& store) {
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  const uint32_t blocks = static_cast<uint32_t>(params.d) / kNormBlock;
  NormedToken<kBlocks> y;
  ReadToken<kBlocks, kMaxThreads, kAligned>(params.x + token * blocks * kNormBlock, params.weight,
                                            blocks, params.reciprocal_d, params.eps, y);
  if (kParts > 1 && thread / 32 * kParts / (threads / 32) != part) return;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    NormBlock<kBlocks, kAligned>(params.weight, b, y);
    const uint32_t block = thread + b * threads;
    store(y.values[b], block, kBlocks > 1 || block < blocks);
  }
}

template <int kBlocks, int kParts, int kMaxThreads, bool kAligned>
__device__ __forceinline__ void NormToFp8(const RmsnormFp8Params& params, uint64_t token,
                                          uint32_t part) {
  const uint32_t blocks = static_cast<uint32_t>(params.d) / kNormBlock;
  const uint32_t scales = (blocks + kScaleThreads - 1) / kScaleThreads;
  const auto store = [&](const float (&values)[kNormBlock], uint32_t block, bool there) {
    const Quantised block_out = Quantise(values);
    if (!there) return;
    StoreVector(params.code + (token * blocks + block) * kNormBlock, block_out.codes);
    if (block % kScaleThreads == 0) {
      params.scale[token * scales + block / kScaleThreads] = static_cast<uint8_t>(block_out.scale);
    }
  };
  NormTo<kBlocks, kParts, kMaxThreads, kAligned>(params, token, part, store);
}

// The same as BF16.
template <int kBlocks, int kParts, int kMaxThreads, bool kAligned>
__device__ __forceinline__ void NormToBf16(const RmsnormFp8Params& params, uint16_t* to,
                                           uint64_t token, uint32_t part) {
  const uint32_t blocks = static_cast<uint32_t>(params.d) / kNormBlock;
  const auto store = [&](const float (&values)[kNormBlock], uint32_t block, bool there) {
    if (!there) return;
    uint16_t* const y = to + (token * blocks + block) * kNormBlock;
#pragma unroll
    for (int i = 0; i < kNormBlock; i += 8) {
      const float* const v = values + i;
      StoreVector(y + i, make_uint4(PackBf16(v[0], v[1]), PackBf16(v[2], v[3]),
                                    PackBf16(v[4], v[5]), PackBf16(v[6], v[7])));
    }
  };
  NormTo<kBlocks, kParts, kMaxThreads, kAligned>(params, token, part, store);
}

}  // namespace dsv4
