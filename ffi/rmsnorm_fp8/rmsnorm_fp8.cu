// A thread block per token, the token in registers from its one read to its one write; one
// reduction over the thread block, and one over the 8 threads of a scale.
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/rmsnorm.cuh"
#include "common/ue8m0.h"
#include "common/vector_store.cuh"
#include "rmsnorm_fp8/rmsnorm_fp8.h"

namespace dsv4 {
namespace {

constexpr int kScaleThreads = kActBlock / kNormBlock;  // side by side

// kParts thread blocks may share a token: each sums all of it, which takes no word between them,
// and quantises its part of the warps. kResident thread blocks share an SM's registers.
template <int kBlocks, int kParts, int kMaxThreads, int kResident, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, kResident)
    RmsnormFp8Kernel(const __grid_constant__ RmsnormFp8Params params) {
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  const uint32_t blocks = static_cast<uint32_t>(params.d) / kNormBlock;
  const uint64_t token = blockIdx.x / kParts;
  NormedToken<kBlocks> y;
  ReadToken<kBlocks, kMaxThreads, kAligned>(params.x + token * blocks * kNormBlock, params.weight,
                                            blocks, params.reciprocal_d, params.eps, y);
  if (kParts > 1 && thread / 32 * kParts / (threads / 32) != blockIdx.x % kParts) return;
  const uint32_t scales = (blocks + kScaleThreads - 1) / kScaleThreads;

#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    NormBlock<kBlocks, kAligned>(params.weight, b, y);
    uint32_t words[kNormWords];
    uint32_t pair_max = 0;
#pragma unroll
    for (int i = 0; i < kNormWords; ++i) {
      words[i] = PackBf16(y.values[b][2 * i], y.values[b][2 * i + 1]);
      pair_max = MaxMagnitudes(pair_max, words[i]);
    }
    uint32_t largest = max(pair_max & 0x7FFFu, pair_max >> 16 & 0x7FFFu);
#pragma unroll
    for (int half = 1; half < kScaleThreads; half *= 2) {
      largest = max(largest, __shfl_xor_sync(kNormLanes, largest, half));
    }
    const uint32_t byte = Fp8ScaleByte(largest << 16);
    const float inverse = InverseScale(byte);
    const uint32_t block = thread + b * threads;
    if (kBlocks == 1 && block >= blocks) return;
    uint32_t codes[kNormWords / 2];
#pragma unroll
    for (int i = 0; i < kNormWords / 2; ++i) {
      uint32_t pair[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t word = words[2 * i + k];
        pair[k] = __nv_cvt_float2_to_fp8x2(make_float2(Low(word) * inverse, High(word) * inverse),
                                           __NV_SATFINITE, __NV_E4M3);
      }
      codes[i] = pair[0] | pair[1] << 16;
    }
    StoreVector(params.code + (token * blocks + block) * kNormBlock,
                make_uint4(codes[0], codes[1], codes[2], codes[3]));
    if (block % kScaleThreads == 0) {
      params.scale[token * scales + block / kScaleThreads] = static_cast<uint8_t>(byte);
    }
  }
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
  return ForTokens(params.t, params.d, addresses, Launch{params, stream});
}

}  // namespace dsv4
