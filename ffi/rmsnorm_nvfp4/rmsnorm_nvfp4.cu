// A thread block per token, the token in registers from its one read to its one write.
//
// What bounds it: a few tokens are latency (one round to memory, two reductions over the thread
// block), so a thread takes one block of 16 channels. Many tokens are memory, as long as the
// arithmetic stays near 20 instructions a channel, so a thread takes two blocks and shares between
// them what it does once per token; and E2M1 codes come two at a time from three comparisons of
// BF16 with thresholds made once per block, instead of a division each. All results are the same
// bits as the CPU handler's, which divides.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/bits.h"
#include "common/nvfp4.h"
#include "common/rmsnorm.cuh"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kWords = kNvfp4Block / 2;  // a block of 16 BF16 channels as 32-bit words
constexpr uint32_t kInfBf16 = 0x7F80u;   // larger magnitudes are NaN
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// About 1 / x; what is built on it corrects by an exact remainder.
__device__ __forceinline__ float Reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// The largest BF16 magnitudes with codes 0..6, in both halves of a word each.
struct Thresholds {
  uint32_t last[7];
};

// x * y + z, rounded towards zero to BF16, in both halves.
__device__ __forceinline__ uint32_t TruncatedPair(float x, float y, float z) {
  return __byte_perm(__float_as_uint(__fmaf_rz(x, y, z)), 0, 0x3232);
}

// The code of a magnitude is the number of ties of E2M1 that the IEEE quotient magnitude / step is
// beyond, or on where a tie goes up. FP32 numbers next to a tie t begin half a unit h in its last
// place away from it, so that this asks whether magnitude > step * (t + h), or step * (t - h): a
// product of too many bits to be a BF16 number itself. Truncated, it compares the same.
__device__ __forceinline__ Thresholds StepThresholds(float step) {
  const float unit = 0x1p-26f * step;
  Thresholds t;
  t.last[0] = TruncatedPair(step, 0.25f, unit);
  t.last[1] = TruncatedPair(step, 0.75f, -2.0f * unit);
  t.last[2] = TruncatedPair(step, 1.25f, 4.0f * unit);
  t.last[3] = TruncatedPair(step, 1.75f, -4.0f * unit);
  t.last[4] = TruncatedPair(step, 2.5f, 8.0f * unit);
  t.last[5] = TruncatedPair(step, 3.5f, -8.0f * unit);
  t.last[6] = TruncatedPair(step, 5.0f, 16.0f * unit);
  return t;
}

// All ones in the halves where |a| > b.
__device__ __forceinline__ uint32_t GreaterMask(uint32_t a, uint32_t b) {
  return __hgt2_mask(__habs2(reinterpret_cast<const __nv_bfloat162&>(a)),
                     reinterpret_cast<const __nv_bfloat162&>(b));
}

__device__ __forceinline__ uint32_t Select(uint32_t mask, uint32_t yes, uint32_t no) {
  return (mask & yes) | (~mask & no);
}

// A number that the compiler cannot see, so that a product with it stays a multiplication: those
// run beside the logical operations, which are what there is too much of here.
__device__ __forceinline__ uint32_t Opaque(uint32_t x) {
  asm("mov.u32 %0, %0;" : "+r"(x));
  return x;
}

// Codes of 8 values, the e-th and the (e + 4)-th in word e: a search among the thresholds, two
// values at a time.
__device__ __forceinline__ uint32_t Encode(const uint32_t* words, const Thresholds& t, uint32_t two,
                                           uint32_t sixteen) {
  uint32_t negative = 0, signs = 0;
#pragma unroll
  for (int e = 3; e >= 0; --e) {
    const uint32_t bit2 = GreaterMask(words[e], t.last[3]);
    const uint32_t bit1 = GreaterMask(words[e], Select(bit2, t.last[5], t.last[1]));
    const uint32_t bit0 = GreaterMask(words[e], Select(bit2, Select(bit1, t.last[6], t.last[4]),
                                                       Select(bit1, t.last[2], t.last[0])));
    negative = negative * sixteen + ((bit2 * two + bit1) * two + bit0);
    signs |= words[e] >> (12 - 4 * e) & 0x00080008u << 4 * e;
  }
  // A mask of ones is -1. Negated, the low half is right and the high half lacks a borrow by it.
  const uint32_t codes = 0u - negative;
  return codes + (codes << 16) | signs;
}

// UnroundedBlockScale (common/nvfp4.h), with the quotient of IEEE division by one correction. NaN
// is left to the caller.
__device__ __forceinline__ float BlockScale(float amax, float six_global, float reciprocal) {
  const float clamped = fminf(amax, kFloat32Max);
  // Beyond 448 only "beyond" counts; the bound keeps infinities out of the remainder.
  const float estimate = fminf(__fmul_rn(clamped, reciprocal), 512.0f);
  const float remainder = __fmaf_rn(-estimate, six_global, clamped);
  const float scale = __fmaf_rn(remainder, reciprocal, estimate);
  return amax == 0.0f ? 1.0f : fminf(fmaxf(scale, kE4m3MinSubnormal), kE4m3Max);
}

__device__ __forceinline__ uint8_t EncodeE4m3Native(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float DecodeE4m3Native(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

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
    block_max[b] = max(pair_max & 0x7FFFu, pair_max >> 16 & 0x7FFFu);
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
  const float six_global = __fmul_rn(kE2m1Max, global);
  const float six_reciprocal = Reciprocal(six_global);
  uint8_t* const scales_out = params.block_scale + token * blocks;
  uint2* const codes_out = reinterpret_cast<uint2*>(params.code) + token * blocks;
  const uint32_t two = Opaque(2), sixteen = Opaque(16);

#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const uint32_t block = thread + b * threads;
    if (kBlocks == 1 && block >= blocks) return;
    const float amax = Bf16ToFloat(static_cast<uint16_t>(block_max[b]));
    const bool nan = block_max[b] > kInfBf16 || (global != global && block_max[b] != 0);
    const uint8_t number = EncodeE4m3Native(BlockScale(amax, six_global, six_reciprocal));
    const uint8_t block_scale = nan ? 0x7F : number;
    scales_out[block] = block_scale;
    const float step = __fmul_rn(DecodeE4m3Native(block_scale), global);
    const Thresholds t = StepThresholds(step);
    const uint32_t largest = step != step ? 0x77777777u : 0u;  // no comparison with NaN is true
    uint2 code;
    code.x = Encode(words[b], t, two, sixteen) | largest;
    code.y = Encode(words[b] + 4, t, two, sixteen) | largest;
    codes_out[block] = code;
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
