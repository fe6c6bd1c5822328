// What the CPU handler and the kernels share: which positions a batch row appends, where a slot's
// row is, which power of two a block is stored with. Lengths are data that nobody has checked; what
// is here never leads outside of a buffer.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "compressor/compressor.h"

namespace dsv4 {

constexpr int kSlotLanes = 16;        // sums over slots
constexpr int kSumChannels = 64;      // of one sum of squares, and of a block of keys
constexpr int kChannelsPerLane = 4;   // of one
constexpr int64_t kOverlapRatio = 4;  // two halves of channels

// Positions start .. end - 1 are appended.
struct Appended {
  int64_t start, end;
};

DSV4_HOST_DEVICE inline Appended AppendedOf(int64_t start, int64_t count, int64_t t) {
  const int64_t taken = start < 0 || count < 0 ? 0 : count < t ? count : t;
  return {start < 0 ? 0 : start, (start < 0 ? 0 : start) + taken};
}
DSV4_HOST_DEVICE inline Appended AppendedOf(const CompressorParams& p, int64_t b) {
  return AppendedOf(p.start[b], p.count[b], p.t);
}

DSV4_HOST_DEVICE inline bool Overlaps(const CompressorParams& p) {
  return p.ratio == kOverlapRatio;
}

// The first appended position that the state keeps.
DSV4_HOST_DEVICE inline int64_t FirstKept(const Appended& row, int64_t ring) {
  return row.end - row.start > ring ? row.end - ring : row.start;
}

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
