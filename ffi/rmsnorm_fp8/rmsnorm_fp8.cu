// A thread block per token, the token in registers from its one read to its one write; one
// reduction over the thread block, and one over the 8 threads of a scale. Many small tokens have a
// warp each: nothing waits for other warps, and the weight is there with the token.
#include <cuda_runtime.h>

#include <algorithm>

#include "rmsnorm_fp8/rmsnorm_fp8.cuh"
#include "rmsnorm_fp8/rmsnorm_fp8.h"

namespace dsv4 {
namespace {

// kResident thread blocks share an SM's registers.
template <int kBlocks, int kParts, int kMaxThreads, int kResident, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, kResident)
    RmsnormFp8Kernel(const __grid_constant__ RmsnormFp8Params params) {
  NormToFp8<kBlocks, kParts, kMaxThreads, kAligned>(params, blockIdx.x / kParts,
                                                    blockIdx.x % kParts);
}

constexpr int kTokens = 4;  // of a thread block, where a warp has one
constexpr int kTokenThreads = 32 * kTokens;

// A token has kBlocks * 32 blocks.
template <int kBlocks, int kResident>
__global__ void __launch_bounds__(kTokenThreads, kResident)
    RmsnormFp8WarpKernel(const __grid_constant__ RmsnormFp8Params params) {
  constexpr uint32_t kChannels = kBlocks * 32 * kNormBlock;
  const uint32_t lane = threadIdx.x % 32, token = blockIdx.x * kTokens + threadIdx.x / 32;
  if (token >= params.t) return;
  const uint16_t* const x = params.x + uint64_t{token} * kChannels + lane * kNormBlock;
  const uint16_t* const weight_in = params.weight + lane * kNormBlock;
  uint32_t words[kBlocks][kNormWords], weight[kBlocks][kNormWords];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) LoadBlock<true>(words[b], x + b * 32 * kNormBlock);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) LoadBlock<true>(weight[b], weight_in + b * 32 * kNormBlock);
  float sums[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    sums[b] = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {  // the squares are exact
      sums[b] = __fmaf_rn(Low(words[b][i]), Low(words[b][i]), sums[b]);
      sums[b] = __fmaf_rn(High(words[b][i]), High(words[b][i]), sums[b]);
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
#pragma unroll
  for (int b = 1; b < kBlocks; ++b) sum = __fadd_rn(sum, sums[b]);
  const float scale = __frsqrt_rn(__fadd_rn(__fmul_rn(sum, params.reciprocal_d), params.eps));
  uint8_t* const code = params.code + uint64_t{token} * kChannels + lane * kNormBlock;
  uint8_t* const scale_out =
      params.scale + uint64_t{token} * (kChannels / kActBlock) + lane / kScaleThreads;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    float values[kNormBlock];
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {
      values[2 * i] = __fmul_rn(Low(weight[b][i]), __fmul_rn(Low(words[b][i]), scale));
      values[2 * i + 1] = __fmul_rn(High(weight[b][i]), __fmul_rn(High(words[b][i]), scale));
    }
    const Quantised y = Quantise(values);
    StoreVector(code + b * 32 * kNormBlock, y.codes);
    if (lane % kScaleThreads == 0) {
      scale_out[b * 32 / kScaleThreads] = static_cast<uint8_t>(y.scale);
    }
  }
}

template <int kBlocks, int kResident>
cudaError_t LaunchWarps(const RmsnormFp8Params& params, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((params.t + kTokens - 1) / kTokens);
  RmsnormFp8WarpKernel<kBlocks, kResident><<<grid, kTokenThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

struct Launch {
  const RmsnormFp8Params& params;
  cudaStream_t stream;

  template <int kBlocks, int kParts, int kMaxThreads, int kResident, bool kAligned = true>
  cudaError_t Run(int blocks) const {
    const int threads = (blocks / kBlocks + 31) / 32 * 32;
    const auto grid = static_cast<unsigned>(params.t * kParts);
    RmsnormFp8Kernel<kBlocks, kParts, kMaxThreads, kResident, kAligned>
        <<<grid, threads, 0, stream>>>(params);
    return cudaGetLastError();
  }
};

}  // namespace

cudaError_t RmsnormFp8Cuda(const RmsnormFp8Params& params, cudaStream_t stream) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight);
  if (addresses % 16 == 0 && params.t > kManyTokens && params.t <= INT32_MAX) {
    if (params.d == 32 * kNormBlock) return LaunchWarps<1, 12>(params, stream);
    if (params.d == 64 * kNormBlock) return LaunchWarps<2, 8>(params, stream);
  }
  return ForTokens(params.t, params.d, addresses, Launch{params, stream});
}

}  // namespace dsv4
