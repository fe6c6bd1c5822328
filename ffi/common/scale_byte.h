// Power-of-two scales of E4M3 and E2M1 blocks (model.md 4.5), as the bytes of UE8M0.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace dsv4 {

// The biased exponent of the smallest power of two >= max(amax, floor) * reciprocal, from the bits
// of amax; NaN gives 255.
DSV4_HOST_DEVICE inline uint32_t ScaleByte(uint32_t amax_bits, float floor, float reciprocal) {
  const float amax = FloatFromBits(amax_bits);
  if (amax != amax) return 255;
  const float held = amax > floor ? amax : floor;
  const uint32_t bits = FloatBits((held < kFloat32Max ? held : kFloat32Max) * reciprocal);
  return (bits >> 23) + ((bits & 0x7FFFFFu) != 0);
}

// 2^(127 - byte), for the bytes that ScaleByte gives.
DSV4_HOST_DEVICE inline float InverseScale(uint32_t byte) {
  return FloatFromBits(byte == 255 ? 0x7FC00000u : (254u - byte) << 23);
}

DSV4_HOST_DEVICE inline uint32_t Fp8ScaleByte(uint32_t amax_bits) {
  return ScaleByte(amax_bits, 1e-4f, 1.0f / 448.0f);
}
DSV4_HOST_DEVICE inline uint32_t Mxfp4ScaleByte(uint32_t amax_bits) {
  return ScaleByte(amax_bits, 6.0f * 0x1p-126f, 1.0f / 6.0f);
}

}  // namespace dsv4
