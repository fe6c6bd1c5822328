// A thread block per token, a thread per block of 16 channels, the token in registers from its one
// read to its one write. Thread blocks stay for several tokens: the weight
// is read once, and the next token is on its way while this one is quantised.
//
// What bounds it: one token is latency (two loads, two reductions over the thread block); many
// tokens are memory, as long as the arithmetic stays under some 20 instructions a channel. Hence
// the E2M1 code by three saturating subtractions instead of seven comparisons.
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/bits.h"
#include "common/nvfp4.h"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kWords = kNvfp4Block / 2;  // a block of 16 BF16 channels as 32-bit words
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr uint32_t kMagnitudes = 0x7FFF7FFFu;  // of a pair of BF16

// The two BF16 of a word, exactly.
__device__ __forceinline__ float Low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float High(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}

// Nearest-even BF16 pair; NaN becomes 0x7FFF here (any NaN will do: only magnitudes are compared).
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Larger of the magnitudes in either half; as unsigned integers NaN is above all.
__device__ __forceinline__ uint32_t MaxPair(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

__device__ __forceinline__ void Load(uint32_t (&words)[kWords], const uint16_t* from) {
  const uint4* vectors = reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    const uint4 v = __ldg(vectors + i);
    words[4 * i] = v.x;
    words[4 * i + 1] = v.y;
    words[4 * i + 2] = v.z;
    words[4 * i + 3] = v.w;
  }
}

// Codes (sign apart) of the 8 values in 4 words, for a step whose reciprocal is a normal
// number. The quotient is that of IEEE division: product with the rounded reciprocal, then one
// correction by the exact remainder. Halved, it is cut into the three ranges of equal spacing of
// E2M1 (0..2 in steps of .5, 2..4 of 1, 4..6 of 2), each rounded by adding it to 2^23.
__device__ __forceinline__ uint32_t EncodeMagnitudes(const uint32_t* words, float double_step,
                                                     float half_reciprocal) {
  constexpr float kRound = 8388608.0f;  // 2^23: the sum's last bit is 1, ties go to even
  uint32_t packed = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const uint32_t pair = words[i / 2] & kMagnitudes;
    const float a = i % 2 ? High(pair) : Low(pair);
    const float estimate = __fmul_rn(a, half_reciprocal);
    const float remainder = __fmaf_rn(-estimate, double_step, a);
    const float half = __fmaf_rn(remainder, half_reciprocal, estimate);
    float sum = __fmaf_rn(__saturatef(half), 4.0f, kRound);
    sum = __fmaf_rn(__saturatef(__fadd_rn(half, -1.0f)), 2.0f, sum);
    sum = __fadd_rn(sum, __saturatef(__fadd_rn(half, -2.0f)));
    packed = packed * 16 + __float_as_uint(sum);
  }
  // Every sum brought the bits of 2^23 along.
  return packed - __float_as_uint(kRound) * 0x11111111u;
}

// Sign bits of the 8 values in 4 words, at bit 3 of their nibbles.
__device__ __forceinline__ uint32_t Signs(const uint32_t* words) {
  const uint32_t low = __byte_perm(words[0], words[1], 0x7351);   // bytes 1, 5 | 3, 7
  const uint32_t high = __byte_perm(words[2], words[3], 0x7351);
  const uint32_t even = __byte_perm(low, high, 0x5410);
  const uint32_t odd = __byte_perm(low, high, 0x7632);
  return (even & 0x80808080u) >> 4 | (odd & 0x80808080u);
}

// Any scale, any value: the definition, one IEEE division an element.
__device__ __noinline__ uint32_t EncodeByDivision(uint32_t word0, uint32_t word1, uint32_t word2,
                                                  uint32_t word3, float step) {
  uint32_t packed = 0;
  for (uint32_t word : {word3, word2, word1, word0}) {
    packed = packed * 256 + EncodeE2m1(__fdiv_rn(High(word), step)) * 16 +
             EncodeE2m1(__fdiv_rn(Low(word), step));
  }
  return packed;
}

__device__ __forceinline__ uint8_t EncodeE4m3Native(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}


template <int kMaxThreads, int kMinThreadBlocks>
__global__ void __launch_bounds__(kMaxThreads, kMinThreadBlocks)
    RmsnormNvfp4Kernel(const __grid_constant__ RmsnormNvfp4Params params) {
  __shared__ float warp_sum[32];
  __shared__ uint32_t warp_max[32];
  const int64_t block = threadIdx.x;
  const int64_t blocks = params.d / kNvfp4Block;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float reciprocal = __frcp_rn(static_cast<float>(params.d));
  const bool first_lane = threadIdx.x % 32 == 0;
  const bool in_token = block < blocks;  // not so in the last warp's tail

  uint32_t weight[kWords] = {}, next[kWords] = {};
  int64_t token = blockIdx.x;
  const uint16_t* x = params.x + block * kNvfp4Block;
  if (in_token) {
    Load(next, x + token * params.d);
    Load(weight, params.weight + block * kNvfp4Block);
  }

  for (; token < params.t; token += gridDim.x) {
    uint32_t words[kWords];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = next[i];
      sum = __fmaf_rn(Low(words[i]), Low(words[i]), sum);  // the square is exact
      sum = __fmaf_rn(High(words[i]), High(words[i]), sum);
    }
    if (in_token && token + gridDim.x < params.t) Load(next, x + (token + gridDim.x) * params.d);
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, half));
    }
    if (first_lane) warp_sum[warp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum = __fadd_rn(sum, warp_sum[i]);
    const float mean = __fmul_rn(sum, reciprocal);
    const float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, params.eps)));

    uint32_t pair_max = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float low = __fmul_rn(Low(weight[i]), __fmul_rn(Low(words[i]), scale));
      const float high = __fmul_rn(High(weight[i]), __fmul_rn(High(words[i]), scale));
      words[i] = PackBf16(low, high);
      pair_max = MaxPair(pair_max, words[i] & kMagnitudes);
    }
    const uint32_t block_max = max(pair_max & 0xFFFFu, pair_max >> 16);

    float global;
    if (params.global_scale == nullptr) {
      uint32_t token_max = __reduce_max_sync(kAllLanes, block_max);
      if (first_lane) warp_max[warp] = token_max;
      __syncthreads();
      for (int i = 0; i < warps; ++i) token_max = max(token_max, warp_max[i]);
      global = TokenGlobalScale(Bf16ToFloat(static_cast<uint16_t>(token_max)));
    } else {
      global = __ldg(params.global_scale);
      __syncthreads();  // the next token may write warp_sum, as after the reduction above
    }
    if (threadIdx.x == 0) params.token_scale[token] = global;
    if (!in_token) continue;

    const float amax = Bf16ToFloat(static_cast<uint16_t>(block_max));
    const uint8_t block_scale =
        EncodeE4m3Native(UnroundedBlockScale(amax, __fmul_rn(kE2m1Max, global)));
    params.block_scale[token * blocks + block] = block_scale;
    const float step = __fmul_rn(DecodeE4m3(block_scale), global);
    uint2 code;
    // With such steps the remainders are exact and nothing overflows; all else (with Inf and NaN the
    // comparisons fail) takes the slow way.
    if (step >= 0x1p-100f && step <= 0x1p100f && amax <= 0x1p100f * step) {
      const float double_step = 2.0f * step, half_reciprocal = 0.5f * __frcp_rn(step);
      code.x = EncodeMagnitudes(words, double_step, half_reciprocal) | Signs(words);
      code.y = EncodeMagnitudes(words + 4, double_step, half_reciprocal) | Signs(words + 4);
    } else {
      code.x = EncodeByDivision(words[0], words[1], words[2], words[3], step);
      code.y = EncodeByDivision(words[4], words[5], words[6], words[7], step);
    }
    *reinterpret_cast<uint2*>(params.code + (token * params.d + block * kNvfp4Block) / 2) = code;
  }
}

int MultiprocessorCount() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

template <int kMaxThreads, int kMinThreadBlocks>
cudaError_t Launch(const RmsnormNvfp4Params& params, int threads, cudaStream_t stream) {
  // As many thread blocks as the bound on registers lets an SM hold.
  const int64_t resident =
      static_cast<int64_t>(MultiprocessorCount()) * (kMinThreadBlocks * kMaxThreads / threads);
  const auto grid = static_cast<unsigned>(std::min(params.t, resident));
  RmsnormNvfp4Kernel<kMaxThreads, kMinThreadBlocks><<<grid, threads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t RmsnormNvfp4Cuda(const RmsnormNvfp4Params& params, cudaStream_t stream) {
  if (params.t == 0) return cudaSuccess;
  const int threads = static_cast<int>((params.d / kNvfp4Block + 31) / 32 * 32);
  if (threads <= 256) return Launch<256, 4>(params, threads, stream);
  if (threads <= 512) return Launch<512, 2>(params, threads, stream);
  return Launch<1024, 1>(params, threads, stream);
}

}  // namespace dsv4
