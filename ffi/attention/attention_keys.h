// What the CPU handler and the plain kernel share: which stored rows a query sees. Positions,
// lengths and indices are data that nobody has checked; what is here never leads outside of a
// buffer.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/bits.h"
#include "common/host_device.h"

namespace dsv4 {

// One row of one of the three stores.
struct KeyRow {
  const KeyRows* rows;
  int64_t row;  // of all batch rows
};

DSV4_HOST_DEVICE inline int64_t AtMost(int64_t x, int64_t y) { return x < y ? x : y; }
DSV4_HOST_DEVICE inline int64_t AtLeast(int64_t x, int64_t y) { return x > y ? x : y; }

// The first position of batch row b whose key is not in the ring.
DSV4_HOST_DEVICE inline int64_t FirstInChunk(const AttentionParams& p, int64_t b) {
  return p.start != nullptr ? p.start[b] : INT64_MAX / 2;
}

// Positions first .. first + count - 1.
struct WindowKeys {
  int64_t first, count;
};

// The window of a query at `position`, without positions whose rows nobody holds.
DSV4_HOST_DEVICE inline WindowKeys VisibleWindow(const AttentionParams& p, int64_t b,
                                                 int64_t position) {
  const int64_t start = FirstInChunk(p, b);
  const int64_t oldest = p.ring.slots > 0 ? 0 : AtLeast(start, 0);
  const int64_t first = AtLeast(position - p.window + 1, oldest);
  const int64_t last = AtMost(position, start + p.chunk.slots - 1);
  return {first, AtLeast(last - first + 1, 0)};
}

// The row of a position that VisibleWindow gave.
DSV4_HOST_DEVICE inline KeyRow WindowRow(const AttentionParams& p, int64_t b, int64_t position) {
  const int64_t start = FirstInChunk(p, b);
  if (position >= start) return {&p.chunk, b * p.chunk.slots + position - start};
  return {&p.ring, b * p.ring.slots + position % p.ring.slots};
}

// Entries of the pool that the query `token` (of all batch rows) may see.
DSV4_HOST_DEVICE inline int64_t VisibleEntries(const AttentionParams& p, int64_t token) {
  if (p.pool.slots == 0) return 0;
  return AtMost(AtLeast(p.n_visible[token], 0), p.pool.slots);
}

// Places from which a query's entries are taken: every visible one, or topk_idx.
DSV4_HOST_DEVICE inline int64_t EntryPlaces(const AttentionParams& p, int64_t token) {
  const int64_t visible = VisibleEntries(p, token);
  return p.topk_idx != nullptr && visible > 0 ? p.topk : visible;
}

// The row at a place; false for one that is to be skipped.
DSV4_HOST_DEVICE inline bool EntryRow(const AttentionParams& p, int64_t b, int64_t token,
                                      int64_t place, KeyRow& row) {
  const int64_t entry = p.topk_idx != nullptr ? p.topk_idx[token * p.topk + place] : place;
  row = {&p.pool, b * p.pool.slots + entry};
  return entry >= 0 && entry < VisibleEntries(p, token);
}

// What exponents are measured from: `top`, but nothing is infinitely far below minus infinity.
DSV4_HOST_DEVICE inline float ExponentBase(float top) {
  return top == FloatFromBits(0xFF800000u) ? 0.0f : top;
}

}  // namespace dsv4
