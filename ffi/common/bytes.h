// Sizes of stored rows. `size_bytes()` of the FFI API counts two bytes for one of float4 and is not
// used anywhere (a test looks).
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace dsv4 {

// Bytes of `count` consecutive elements; two 4-bit elements share a byte. -1 for a dtype that no
// cache holds.
inline int64_t PackedBytes(xla::ffi::DataType dtype, int64_t count) {
  switch (dtype) {
    case xla::ffi::DataType::F32:
      return 4 * count;
    case xla::ffi::DataType::BF16:
      return 2 * count;
    case xla::ffi::DataType::F8E4M3FN:
    case xla::ffi::DataType::F8E8M0FNU:
      return count;
    case xla::ffi::DataType::F4E2M1FN:
      return (count + 1) / 2;
    default:
      return -1;
  }
}

// Whether `ptr` and everything `bytes` apart from it can be read in units of `width`.
inline bool IsAligned(const void* ptr, int64_t bytes, int64_t width) {
  return reinterpret_cast<uintptr_t>(ptr) % width == 0 && bytes % width == 0;
}

}  // namespace dsv4
