// What the CPU handler and the plain kernel share: the order of scores, and how many entries a
// query sees. Counts are data that nobody has checked.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "index_topk/index_topk.h"

namespace dsv4 {

// Compares as scores do: NaN below -inf, -0 like 0.
DSV4_HOST_DEVICE inline uint32_t ScoreOrder(float score) {
  const uint32_t bits = FloatBits(score), magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0;
  if (magnitude == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Entries that the query `token` (of all batch rows) may see.
DSV4_HOST_DEVICE inline int64_t VisibleEntries(const IndexTopkParams& p, int64_t token) {
  const int64_t n = p.n_visible[token];
  return n < 0 ? 0 : n < p.slots ? n : p.slots;
}

// Whether the choice of a query needs scores: else it is every entry it sees.
DSV4_HOST_DEVICE inline bool NeedsScores(const IndexTopkParams& p, int64_t token) {
  return p.scores != nullptr || VisibleEntries(p, token) > p.topk;
}

}  // namespace dsv4
