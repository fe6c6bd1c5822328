// Sums by halves: of i and i + count / 2, then of what that left.
#pragma once

namespace dsv4 {

// The sum of of(first), of(first + step), ...: kCount of them.
template <int kCount, typename Of>
__device__ __forceinline__ float Halved(const Of& of, int first = 0, int step = 1) {
  if constexpr (kCount == 1) {
    return of(first);
  } else {
    return Halved<kCount / 2>(of, first, 2 * step) + Halved<kCount / 2>(of, first + step, 2 * step);
  }
}

}  // namespace dsv4
