// RMS norm of a token by a thread block: what the kernels that quantise its result share. The token
// stays in registers, kBlocks blocks of 16 channels a thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/bf16x2.cuh"
#include "common/bits.h"
#include "common/rmsnorm.h"

namespace dsv4 {

constexpr int kNormWords = kNormBlock / 2;  // a block as 32-bit words
constexpr unsigned kNormLanes = 0xFFFFFFFFu;

// A block; kAligned: to 16 bytes.
template <bool kAligned>
__device__ __forceinline__ void LoadBlock(uint32_t (&words)[kNormWords], const uint16_t* from) {
  if constexpr (kAligned) {
    const uint4* vectors = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < kNormWords / 4; ++i) {
      const uint4 v = __ldg(vectors + i);
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {
      words[i] = __ldg(from + 2 * i) | static_cast<uint32_t>(__ldg(from + 2 * i + 1)) << 16;
    }
  }
}

// A token's blocks thread, thread + threads, ... and what they are multiplied by.
template <int kBlocks>
struct NormedToken {
  float values[kBlocks][kNormBlock];  // as they came, exactly
  uint32_t weight[kNormWords];        // of the one block, if it is one
  float scale;
};

// With several blocks a thread there is no tail: the token has kBlocks * blockDim.x of them. Every
// thread of the block calls it. Sums run in the order of rmsnorm.h.
template <int kBlocks, int kMaxThreads, bool kAligned>
__device__ __forceinline__ void ReadToken(const uint16_t* x, const uint16_t* weight,
                                          uint32_t blocks, float reciprocal_d, float eps,
                                          NormedToken<kBlocks>& token) {
  __shared__ float4 group_sum[kBlocks * kMaxThreads / 32 / 4 + 1];  // of 32 blocks each
  float* const sums_out = reinterpret_cast<float*>(group_sum);
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  const uint32_t lane = thread % 32, warp = thread / 32, warps = threads / 32;

  uint32_t words[kBlocks][kNormWords] = {};
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const uint32_t block = thread + b * threads;
    if (kBlocks > 1 || block < blocks) LoadBlock<kAligned>(words[b], x + block * kNormBlock);
  }
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) token.weight[i] = 0;
  if (kBlocks == 1 && thread < blocks) {
    LoadBlock<kAligned>(token.weight, weight + thread * kNormBlock);
  }
  if (thread < 4) sums_out[kBlocks * warps + thread] = 0.0f;  // up to a whole float4

  float sums[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    sums[b] = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {  // the squares are exact
      float* const values = token.values[b];
      values[2 * i] = Low(words[b][i]);
      values[2 * i + 1] = High(words[b][i]);
      sums[b] = __fmaf_rn(values[2 * i], values[2 * i], sums[b]);
      sums[b] = __fmaf_rn(values[2 * i + 1], values[2 * i + 1], sums[b]);
    }
  }
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      sums[b] = __fadd_rn(sums[b], __shfl_xor_sync(kNormLanes, sums[b], half));
    }
  }
  float sum = sums[0];
  if (kBlocks > 1 || warps > 1) {
    if (lane == 0) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) sums_out[warp + b * warps] = sums[b];
    }
    __syncthreads();
    sum = 0.0f;
#pragma unroll 4
    for (uint32_t i = 0; i * 4 < kBlocks * warps; ++i) {  // in sequence
      const float4 four = group_sum[i];
      sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, four.x), four.y), four.z), four.w);
    }
  }
  token.scale = __frsqrt_rn(__fadd_rn(__fmul_rn(sum, reciprocal_d), eps));
}

// The values of block b become weight * (x * scale), unrounded.
template <int kBlocks, bool kAligned>
__device__ __forceinline__ void NormBlock(const uint16_t* weight, int b,
                                          NormedToken<kBlocks>& token) {
  if (kBlocks > 1) {
    LoadBlock<kAligned>(token.weight, weight + (threadIdx.x + b * blockDim.x) * kNormBlock);
  }
  float* const values = token.values[b];
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) {
    values[2 * i] = __fmul_rn(Low(token.weight[i]), __fmul_rn(values[2 * i], token.scale));
    values[2 * i + 1] = __fmul_rn(High(token.weight[i]), __fmul_rn(values[2 * i + 1], token.scale));
  }
}

// Fewer tokens leave SMs idle: four of them take one.
constexpr int64_t kFewTokens = 16;
// More tokens keep all SMs busy: what counts is instructions, not latency.
constexpr int64_t kManyTokens = 256;

// Calls launch.Run<kBlocks, kParts, kMaxThreads, kResident, kAligned>(blocks of a token) as suits t
// tokens of d channels; `addresses` are those of the token and the weight, or-ed.
template <typename Launch>
cudaError_t ForTokens(int64_t t, int64_t d, uintptr_t addresses, const Launch& launch) {
  if (t == 0) return cudaSuccess;
  if (t > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int blocks = static_cast<int>(d / kNormBlock);
  if (addresses % 16 != 0) return launch.template Run<1, 1, 1024, 1, false>(blocks);  // a slice
  if (t > kManyTokens && blocks % 64 == 0) {
    if (blocks <= 256) return launch.template Run<2, 1, 128, 9>(blocks);
    if (blocks <= 512) return launch.template Run<2, 1, 256, 4>(blocks);
    return launch.template Run<2, 1, 512, 2>(blocks);
  }
  if (t <= kFewTokens && blocks >= 128) {
    if (blocks <= 256) return launch.template Run<1, 4, 256, 4>(blocks);
    if (blocks <= 512) return launch.template Run<1, 4, 512, 2>(blocks);
  }
  if (blocks <= 256) return launch.template Run<1, 1, 256, 4>(blocks);
  if (blocks <= 512) return launch.template Run<1, 1, 512, 2>(blocks);
  return launch.template Run<1, 1, 1024, 1>(blocks);
}

}  // namespace dsv4
