// What the CPU handler and the kernels share: which positions a batch row appends, where a slot's
// row is, which power of two a block is stored with. Lengths are data that nobody has checked; what
// is here never leads outside of a buffer.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "common/scale_byte.h"
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

DSV4_HOST_DEVICE inline Appended AppendedOf(const CompressorParams& p, int64_t b) {
  const int64_t start = p.start[b], count = p.count[b];
  const int64_t taken = start < 0 || count < 0 ? 0 : count < p.t ? count : p.t;
  return {start < 0 ? 0 : start, (start < 0 ? 0 : start) + taken};
}

DSV4_HOST_DEVICE inline bool Overlaps(const CompressorParams& p) {
  return p.ratio == kOverlapRatio;
}

// The first appended position that the state keeps.
DSV4_HOST_DEVICE inline int64_t FirstKept(const Appended& row, int64_t ring) {
  return row.end - row.start > ring ? row.end - ring : row.start;
}

}  // namespace dsv4
