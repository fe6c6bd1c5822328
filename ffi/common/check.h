// Checks of operands in a handler. Every message names the op, the operand, the rule and the value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

#define DSV4_RETURN_IF_ERROR(expression)                          \
  do {                                                            \
    if (auto error = (expression); error.failure()) return error; \
  } while (false)

namespace dsv4 {

namespace ffi = xla::ffi;

using Dims = ffi::AnyBuffer::Dimensions;

// Version of the contract between `dsv4_jax.ops` and these handlers: operands, results, attributes
// and their meaning. An executable from a compilation cache carries the one it was made for.
constexpr int32_t kAbi = 4;

inline ffi::Error InvalidArgument(const std::string& op, const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "dsv4." + op + ": " + message);
}

inline std::string ToString(Dims dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline const char* DtypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case ffi::DataType::F8E8M0FNU:
      return "float8_e8m0fnu";
    case ffi::DataType::F4E2M1FN:
      return "float4_e2m1fn";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::U8:
      return "uint8";
    default:
      return "another dtype";
  }
}

inline ffi::Error CheckAbi(const std::string& op, int32_t abi) {
  if (abi == kAbi) return ffi::Error::Success();
  return InvalidArgument(op, "abi must be " + std::to_string(kAbi) + " (this library's), got " +
                                 std::to_string(abi) +
                                 ": the executable comes from another version of dsv4_jax; clear "
                                 "the compilation cache");
}

inline ffi::Error CheckDtype(const std::string& op, const std::string& operand, ffi::DataType dtype,
                             std::initializer_list<ffi::DataType> accepted) {
  if (std::find(accepted.begin(), accepted.end(), dtype) != accepted.end()) {
    return ffi::Error::Success();
  }
  std::string names;
  for (ffi::DataType each : accepted) {
    names += (names.empty() ? "" : " or ") + std::string(DtypeName(each));
  }
  return InvalidArgument(op, operand + " must be " + names + ", got " + DtypeName(dtype) + " (" +
                                 std::to_string(static_cast<int>(dtype)) + ")");
}

inline ffi::Error CheckShape(const std::string& op, const std::string& operand, Dims dims,
                             std::initializer_list<int64_t> expected) {
  if (std::equal(dims.begin(), dims.end(), expected.begin(), expected.end())) {
    return ffi::Error::Success();
  }
  return InvalidArgument(op, operand + " must be " +
                                 ToString(Dims(expected.begin(), expected.size())) + ", got " +
                                 ToString(dims));
}

}  // namespace dsv4
