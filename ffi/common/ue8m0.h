// Powers of two as scales of a block (model.md 4.5): which one, and its reciprocal.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"

namespace dsv4 {

constexpr uint32_t kUe8m0Nan = 255;

// The biased exponent of the smallest power of two >= max(amax, floor) * reciprocal, from the bits
// of amax; NaN gives 255.
DSV4_HOST_DEVICE inline uint32_t ScaleByte(uint32_t amax_bits, float floor, float reciprocal) {
  const float amax = FloatFromBits(amax_bits);
  if (amax != amax) return kUe8m0Nan;
  const float held = amax > floor ? amax : floor;
  const uint32_t bits = FloatBits((held < kFloat32Max ? held : kFloat32Max) * reciprocal);
  return (bits >> 23) + ((bits & 0x7FFFFFu) != 0);
}

// 2^(127 - byte), for the bytes that ScaleByte gives.
DSV4_HOST_DEVICE inline float InverseScale(uint32_t byte) {
  return FloatFromBits(byte == kUe8m0Nan ? 0x7FC00000u : (254u - byte) << 23);
}

DSV4_HOST_DEVICE inline uint32_t Fp8ScaleByte(uint32_t amax_bits) {
  return ScaleByte(amax_bits, 1e-4f, 1.0f / 448.0f);
}
DSV4_HOST_DEVICE inline uint32_t Mxfp4ScaleByte(uint32_t amax_bits) {
  return ScaleByte(amax_bits, 6.0f * 0x1p-126f, 1.0f / 6.0f);
}

// The same of a BF16 magnitude: 448 is 1.75 * 2^8, so that from a mantissa beyond that on it takes
// the next power of two; 6 is 1.5 * 2^2.
DSV4_HOST_DEVICE inline uint32_t Fp8ScaleByteOfBf16(uint32_t magnitude) {
  const int32_t byte = static_cast<int32_t>((magnitude + 0x1F) >> 7) - 8;
  return magnitude > 0x7F80u ? kUe8m0Nan : static_cast<uint32_t>(byte > 105 ? byte : 105);
}
DSV4_HOST_DEVICE inline uint32_t Mxfp4ScaleByteOfBf16(uint32_t magnitude) {
  const int32_t byte = static_cast<int32_t>((magnitude + 0x3F) >> 7) - 2;
  return magnitude > 0x7F80u ? kUe8m0Nan : static_cast<uint32_t>(byte > 1 ? byte : 1);
}

// InverseScale as BF16, in both halves.
DSV4_HOST_DEVICE inline uint32_t InverseScaleBf16x2(uint32_t byte) {
  return byte == kUe8m0Nan ? 0x7FC07FC0u : (254u - byte) * 0x00800080u;
}

}  // namespace dsv4
