// NVFP4 of 16 BF16 channels a thread: E2M1 codes come two at a time from three comparisons of BF16
// with thresholds made once per block, instead of a division each. The same bits as nvfp4_cpu.h,
// which divides.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/bits.h"
#include "common/nvfp4.h"

namespace dsv4 {

// About 1 / x; what is built on it corrects by an exact remainder.
__device__ __forceinline__ float RoughReciprocal(float x) {
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
__device__ __forceinline__ uint32_t EncodeE2m1(const uint32_t* words, const Thresholds& t,
                                               uint32_t two, uint32_t sixteen) {
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
__device__ __forceinline__ float NearBlockScale(float amax, float six_global, float reciprocal) {
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

// Of a token's blocks, by its global scale.
class Nvfp4Encoder {
 public:
  __device__ __forceinline__ explicit Nvfp4Encoder(float global) {
    global_ = global;
    six_global_ = __fmul_rn(kE2m1Max, global);
    six_reciprocal_ = RoughReciprocal(six_global_);
    two_ = Opaque(2);
    sixteen_ = Opaque(16);
  }

  // Word i has channels 8 (i / 4) + i % 4 and the fourth after it; `largest` is the largest
  // magnitude as bits of BF16, NaN above all.
  __device__ __forceinline__ uint2 Encode(const uint32_t (&words)[kNvfp4Block / 2],
                                          uint32_t largest, uint8_t& block_scale) const {
    constexpr uint32_t kInfBf16 = 0x7F80u;
    const float amax = Bf16ToFloat(static_cast<uint16_t>(largest));
    const bool nan = largest > kInfBf16 || (global_ != global_ && largest != 0);
    const uint8_t number = EncodeE4m3Native(NearBlockScale(amax, six_global_, six_reciprocal_));
    block_scale = nan ? 0x7F : number;
    const float step = __fmul_rn(DecodeE4m3Native(nan ? 0x7F : number), global_);
    const Thresholds t = StepThresholds(step);
    const uint32_t ones = step != step ? 0x77777777u : 0u;  // no comparison with NaN is true
    return make_uint2(EncodeE2m1(words, t, two_, sixteen_) | ones,
                      EncodeE2m1(words + 4, t, two_, sixteen_) | ones);
  }

 private:
  float global_, six_global_, six_reciprocal_;
  uint32_t two_, sixteen_;
};

}  // namespace dsv4
