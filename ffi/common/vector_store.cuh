// Stores of 8 and 16 bytes in one instruction: an assignment may be taken apart into words.
#pragma once

#include <cuda_runtime.h>

namespace dsv4 {

__device__ __forceinline__ void StoreVector(void* to, uint2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y));
}
__device__ __forceinline__ void StoreVector(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w));
}

}  // namespace dsv4
