// XLA's CPU threads treat subnormal numbers as zero; kernels do not.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dsv4 {

// Subnormal operands and results count while this lives.
class KeepDenormals {
 public:
#if defined(__x86_64__)
  KeepDenormals() : saved_(_mm_getcsr()) {
    _mm_setcsr(saved_ & ~0x8040u);
  }  // flush, denormals-are-zero
  ~KeepDenormals() { _mm_setcsr(saved_); }
#else
  KeepDenormals() = default;
#endif
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#endif
};

}  // namespace dsv4
