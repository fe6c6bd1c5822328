// A thread block per token, the token in registers from its one read to its one write.
//
// What bounds it: a few tokens are latency (one round to memory, two reductions over the thread
// block), so a thread takes one block of 16 channels. Many tokens are memory, as long as the
// arithmetic stays near 20 instructions a channel, so a thread takes two blocks and shares between
// them what it does once per token; and E2M1 codes come two at a time from three comparisons of
// BF16 with thresholds made once per block, instead of a division each. All results are the same
// bits as the CPU handler's, which divides.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/bits.h"
#include "common/nvfp4.cuh"
#include "common/rmsnorm.cuh"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kWords = kNvfp4Block / 2;  // a block of 16 BF16 channels as 32-bit words
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// A thread block per token, kBlocks blocks of 16 channels per thread. With several there is no
// tail: the token has kBlocks * blockDim.x of them. kResident thread blocks share an SM's
// registers.
//
// kParts thread blocks may share a token: each does both reductions over all of it, which takes no
// word between them, and quantises its part of the warps.
template <int kBlocks, int kParts, int kMaxThreads, int kResident, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, kResident)
    RmsnormNvfp4Kernel(const __grid_constant__ RmsnormNvfp4Params params) {
  __shared__ uint32_t warp_max[kMaxThreads / 32];
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  const uint32_t lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const uint32_t blocks = static_cast<uint32_t>(params.d) / kNvfp4Block;
  const uint64_t token = blockIdx.x / kParts;
  const uint32_t part = blockIdx.x % kParts;
  NormedToken<kBlocks> y;
  ReadToken<kBlocks, kMaxThreads, kAligned>(params.x + token * blocks * kNvfp4Block, params.weight,
                                            blocks, params.reciprocal_d, params.eps, y);

  uint32_t words[kBlocks][kWords];
  uint32_t block_max[kBlocks];
  uint32_t token_max = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    NormBlock<kBlocks, kAligned>(params.weight, b, y);
    uint32_t pair_max = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {  // as Encode takes them
      const int e = i % 4 + i / 4 * 8;
      words[b][i] = PackBf16(y.values[b][e], y.values[b][e + 4]);
      pair_max = MaxMagnitudes(pair_max, words[b][i]);
    }
    block_max[b] = LargerOf(pair_max);
    token_max = max(token_max, block_max[b]);
  }

  float global;
  if (params.global_scale == nullptr) {
    token_max = __reduce_max_sync(kAllLanes, token_max);
    if (warps > 1) {
      if (lane == 0) warp_max[warp] = token_max;
      __syncthreads();
      token_max = __reduce_max_sync(kAllLanes, lane < warps ? warp_max[lane] : 0u);
    }
    global = TokenGlobalScale(Bf16ToFloat(static_cast<uint16_t>(token_max)));
  } else {
    global = StaticGlobalScale(__ldg(params.global_scale));
  }
  if (kParts > 1 && warp * kParts / warps != part) return;
  if (thread == 0) params.token_scale[token] = global;
  const Nvfp4Encoder encoder(global);
  uint8_t* const scales_out = params.block_scale + token * blocks;
  uint2* const codes_out = reinterpret_cast<uint2*>(params.code) + token * blocks;

#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const uint32_t block = thread + b * threads;
    if (kBlocks == 1 && block >= blocks) return;
    codes_out[block] = encoder.Encode(words[b], block_max[b], scales_out[block]);
  }
}

struct Launch {
  const RmsnormNvfp4Params& params;
  cudaStream_t stream;

  template <int kBlocks, int kParts, int kMaxThreads, int kResident, bool kAligned = true>
  cudaError_t Run(int blocks) const {
    const int threads = (blocks / kBlocks + 31) / 32 * 32;
    const auto grid = static_cast<unsigned>(params.t * kParts);
    RmsnormNvfp4Kernel<kBlocks, kParts, kMaxThreads, kResident, kAligned>
        <<<grid, threads, 0, stream>>>(params);
    return cudaGetLastError();
  }
};

}  // namespace

cudaError_t RmsnormNvfp4Cuda(const RmsnormNvfp4Params& params, cudaStream_t stream) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight);
  return ForTokens(params.t, params.d, addresses, Launch{params, stream});
}

}  // namespace dsv4
