// Warp-wide matrix products.
#pragma once

#include <cstdint>

namespace dsv4 {

// sums [16, 8] += a [16, 16] b [16, 8] in FP32. Lane 4 g + c has of `a` the pairs of columns 2 c
// and 2 c + 8 of rows g (0, 2) and g + 8 (1, 3); of `b` the pairs of rows 2 c and 2 c + 8 of column
// g; of `sums` columns 2 c and 2 c + 1 of rows g (0, 1) and g + 8 (2, 3).
__device__ __forceinline__ void MmaBf16(float (&sums)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace dsv4
