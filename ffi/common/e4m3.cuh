// E4M3 by the conversion that GPUs have, with the bits of e4m3.h.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace dsv4 {

// Two codes, the first in the low byte; saturating, NaN becomes 0x7F.
__device__ __forceinline__ uint32_t EncodeE4m3Pair(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace dsv4
