// wgmma with B, and A unless it is in registers, in shared memory: K-major without swizzle, 8 x
// 16-byte core matrices, `step` bytes apart along K and 128 along N; or in swizzled rows. sm_90a
// alone.
#pragma once

#include <cstdint>

namespace dsv4 {

__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sums that the compiler must not touch before here.
template <int kSums>
__device__ __forceinline__ void SettleSums(float (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ uint64_t CoreMatrices(uint32_t address, uint32_t step) {
  return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | static_cast<uint64_t>(step >> 4) << 16 |
         static_cast<uint64_t>(128 >> 4) << 32;
}
// The same `bytes` further on, in as few instructions.
__device__ __forceinline__ uint64_t Further(uint64_t matrices, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(matrices) + (bytes >> 4);
  return matrices >> 32 << 32 | low;
}

// Placeholders of so many sums.
#define DSV4_SUMS_4 "%0, %1, %2, %3"
#define DSV4_SUMS_8 DSV4_SUMS_4 ", %4, %5, %6, %7"
#define DSV4_SUMS_16 DSV4_SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DSV4_SUMS_32                                                              \
  DSV4_SUMS_16                                                                    \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
  "%31"
#define DSV4_SUMS_40 DSV4_SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DSV4_SUMS_44 DSV4_SUMS_40 ", %40, %41, %42, %43"
#define DSV4_SUMS_48 DSV4_SUMS_44 ", %44, %45, %46, %47"
#define DSV4_SUMS_52 DSV4_SUMS_48 ", %48, %49, %50, %51"
#define DSV4_SUMS_56 DSV4_SUMS_52 ", %52, %53, %54, %55"
#define DSV4_SUMS_64 DSV4_SUMS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define DSV4_SUMS_128                                                              \
  DSV4_SUMS_64                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "  \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "    \
  "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, " \
  "%121, %122, %123, %124, %125, %126, %127"
// The sums themselves, from d[i] on.
#define DSV4_OF_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DSV4_OF_8(d, i) DSV4_OF_4(d, i), DSV4_OF_4(d, i + 4)
#define DSV4_OF_16(d, i) DSV4_OF_8(d, i), DSV4_OF_8(d, i + 8)
#define DSV4_OF_32(d, i) DSV4_OF_16(d, i), DSV4_OF_16(d, i + 16)
#define DSV4_OF_40(d, i) DSV4_OF_32(d, i), DSV4_OF_8(d, i + 32)
#define DSV4_OF_44(d, i) DSV4_OF_40(d, i), DSV4_OF_4(d, i + 40)
#define DSV4_OF_48(d, i) DSV4_OF_32(d, i), DSV4_OF_16(d, i + 32)
#define DSV4_OF_52(d, i) DSV4_OF_48(d, i), DSV4_OF_4(d, i + 48)
#define DSV4_OF_56(d, i) DSV4_OF_48(d, i), DSV4_OF_8(d, i + 48)
#define DSV4_OF_64(d, i) DSV4_OF_32(d, i), DSV4_OF_32(d, i + 32)
#define DSV4_OF_128(d, i) DSV4_OF_64(d, i), DSV4_OF_64(d, i + 64)

// d (+)= a . b^T for 64 rows, kN columns and 16 BF16 (32 E4M3) inputs; d = 4 registers per 8
// columns. a comes in registers, or as b does.
template <int kN, bool kFp8>
struct Wgmma;
// The same of a in E5M2 and b in E4M3.
template <int kN>
struct WgmmaE5m2;

// Of `sums` = columns / 2 registers; then their number, and the five that follow it.
#define DSV4_WGMMA(columns, sums, n1, n2, n3, n4, n5)                                           \
  template <>                                                                                   \
  struct Wgmma<columns, false> {                                                                \
    DSV4_WGMMA_RUN(sums, "m64n" #columns "k16.f32.bf16.bf16 ", ", 0", ", 0, 0", n1, n2, n3, n4, \
                   n5)                                                                          \
  };                                                                                            \
  template <>                                                                                   \
  struct Wgmma<columns, true> {                                                                 \
    DSV4_WGMMA_RUN(sums, "m64n" #columns "k32.f32.e4m3.e4m3 ", "", "", n1, n2, n3, n4, n5)      \
  };                                                                                            \
  template <>                                                                                   \
  struct WgmmaE5m2<columns> {                                                                   \
    DSV4_WGMMA_RUN(sums, "m64n" #columns "k32.f32.e5m2.e4m3 ", "", "", n1, n2, n3, n4, n5)      \
  };
#define DSV4_WGMMA_RUN(sums, shape, in_registers, in_memory, n1, n2, n3, n4, n5)                   \
  __device__ __forceinline__ static void Run(float (&d)[sums], const uint32_t (&a)[4], uint64_t b, \
                                             int accumulate) {                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5                                          \
                 ", 0;\nwgmma.mma_async.sync.aligned." shape "{" DSV4_SUMS_##sums                  \
                 "}, {%" #sums ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", p, 1, 1" in_registers   \
                 ";\n}"                                                                            \
                 : DSV4_OF_##sums(d, 0)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));           \
  }                                                                                                \
  __device__ __forceinline__ static void Run(float (&d)[sums], uint64_t a, uint64_t b,             \
                                             int accumulate) {                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                          \
                 ", 0;\nwgmma.mma_async.sync.aligned." shape "{" DSV4_SUMS_##sums                  \
                 "}, %" #sums ", %" #n1 ", p, 1, 1" in_memory ";\n}"                               \
                 : DSV4_OF_##sums(d, 0)                                                            \
                 : "l"(a), "l"(b), "r"(accumulate));                                               \
  }
DSV4_WGMMA(8, 4, 5, 6, 7, 8, 9)
DSV4_WGMMA(16, 8, 9, 10, 11, 12, 13)
DSV4_WGMMA(32, 16, 17, 18, 19, 20, 21)
DSV4_WGMMA(64, 32, 33, 34, 35, 36, 37)
DSV4_WGMMA(80, 40, 41, 42, 43, 44, 45)
DSV4_WGMMA(88, 44, 45, 46, 47, 48, 49)
DSV4_WGMMA(96, 48, 49, 50, 51, 52, 53)
DSV4_WGMMA(104, 52, 53, 54, 55, 56, 57)
DSV4_WGMMA(112, 56, 57, 58, 59, 60, 61)
DSV4_WGMMA(128, 64, 65, 66, 67, 68, 69)
DSV4_WGMMA(256, 128, 129, 130, 131, 132, 133)
#undef DSV4_WGMMA
#undef DSV4_WGMMA_RUN

// Rows of 128 bytes in shared memory, 8 of them a pattern of the 128-byte swizzle.
__device__ __forceinline__ uint64_t SwizzledRows(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}

}  // namespace dsv4
