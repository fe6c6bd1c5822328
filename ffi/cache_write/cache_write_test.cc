// The CPU handler's loop against the definition, byte by byte, with watched surroundings.
#include "cache_write/cache_write.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "common/testing.h"

namespace dsv4 {
namespace {

// Parts of random bytes. A part's arrays start `offset` bytes away from an aligned address, the
// rows one further: caches and rows that XLA cuts out of larger buffers need not be aligned alike.
struct Problem {
  Problem(int64_t b, int64_t s, int64_t t, const std::vector<int64_t>& row_bytes, int64_t offset)
      : slots(b * t) {
    std::mt19937 random(7);
    for (size_t p = 0; p < row_bytes.size(); ++p) {
      caches.emplace_back(b * s * row_bytes[p], offset);
      rows.emplace_back(b * t * row_bytes[p], offset == 0 ? 0 : offset + 1);
      for (int64_t i = 0; i < caches[p].size(); ++i) caches[p][i] = static_cast<uint8_t>(random());
      for (int64_t i = 0; i < rows[p].size(); ++i) rows[p][i] = static_cast<uint8_t>(random());
    }
    // Distinct slots, every third row dropped.
    const std::vector<int64_t> dropped = {
        -1, s, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max(), -s, s + 1};
    std::vector<int32_t> order(std::max(s, t));
    for (int64_t i = 0; i < b; ++i) {
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      for (int64_t j = 0; j < t; ++j) {
        const int64_t row = i * t + j;
        slots[row] =
            row % 3 == 2 ? static_cast<int32_t>(dropped[row / 3 % dropped.size()]) : order[j];
      }
    }
    params.n_parts = static_cast<int>(row_bytes.size());
    for (int p = 0; p < params.n_parts; ++p) {
      params.parts[p] = {caches[p].data(), rows[p].data(), row_bytes[p]};
    }
    params.slots = slots.data();
    params.b = b;
    params.s = s;
    params.t = t;
  }

  int64_t n_rows() const { return params.b * params.t; }

  std::vector<Guarded<uint8_t>> caches, rows;
  Guarded<int32_t> slots;
  CacheWriteParams params{};
};

std::vector<std::vector<uint8_t>> Bytes(const Problem& problem) {
  std::vector<std::vector<uint8_t>> bytes;
  for (const auto& cache : problem.caches) bytes.push_back(cache.Values());
  return bytes;
}

// What the caches should hold after rows first <= i * t + j < last: the definition, byte by byte.
std::vector<std::vector<uint8_t>> Expected(const Problem& problem, int64_t first, int64_t last) {
  std::vector<std::vector<uint8_t>> caches = Bytes(problem);
  const CacheWriteParams& params = problem.params;
  for (int p = 0; p < params.n_parts; ++p) {
    const int64_t width = params.parts[p].row_bytes;
    for (int64_t i = 0; i < params.b; ++i) {
      for (int64_t j = 0; j < params.t; ++j) {
        const int64_t row = i * params.t + j, slot = problem.slots[row];
        if (row < first || row >= last || slot < 0 || slot >= params.s) continue;
        for (int64_t k = 0; k < width; ++k) {
          caches[p][(i * params.s + slot) * width + k] = problem.rows[p][row * width + k];
        }
      }
    }
  }
  return caches;
}

void ExpectCaches(const Problem& problem, const std::vector<std::vector<uint8_t>>& expected,
                  int64_t note) {
  for (size_t p = 0; p < expected.size(); ++p) {
    EXPECT_EQ(problem.caches[p].Values(), expected[p], "part", p, "note", note);
    EXPECT_EQ(problem.caches[p].Intact(), true, "part", p, "note", note);
    EXPECT_EQ(problem.rows[p].Intact(), true, "part", p, "note", note);
  }
  EXPECT_EQ(problem.slots.Intact(), true, note);
}

void WriteAndExpect(int64_t b, int64_t s, int64_t t, const std::vector<int64_t>& row_bytes,
                    int64_t offset) {
  Problem problem(b, s, t, row_bytes, offset);
  const auto expected = Expected(problem, 0, problem.n_rows());
  std::vector<std::vector<uint8_t>> rows;
  for (const auto& part : problem.rows) rows.push_back(part.Values());
  CacheWriteCpu(problem.params, 0, problem.n_rows());
  ExpectCaches(problem, expected, offset);
  for (size_t p = 0; p < rows.size(); ++p) EXPECT_EQ(problem.rows[p].Values(), rows[p], p);
}

TEST(EveryRowSize) {
  for (int64_t row_bytes : {1, 7, 64, 448}) {
    for (int64_t offset : {0, 1, 3}) WriteAndExpect(3, 11, 5, {row_bytes}, offset);
  }
}

TEST(EveryShape) {
  WriteAndExpect(1, 1, 1, {7}, 1);       // one row of one slot
  WriteAndExpect(1, 128, 128, {64}, 0);  // a whole ring
  WriteAndExpect(5, 4, 1, {448}, 1);     // decode
  WriteAndExpect(2, 3, 9, {7}, 1);       // more rows than slots: some slots are beyond the cache
  WriteAndExpect(2, 0, 4, {7}, 1);       // no slot
  WriteAndExpect(0, 4, 4, {7}, 1);       // no sequence
  WriteAndExpect(2, 4, 0, {7}, 1);       // no row
}

TEST(SeveralParts) {
  WriteAndExpect(2, 9, 6, {448, 7, 128}, 1);
  WriteAndExpect(2, 9, 6, {1, 2, 3, 4, 5, 6, 7, 8}, 1);
  EXPECT_EQ(kMaxCacheWriteParts, 8);
}

TEST(DroppedRowsLeaveEveryByte) {
  const int32_t lowest = std::numeric_limits<int32_t>::min();
  const int32_t highest = std::numeric_limits<int32_t>::max();
  for (int32_t slot : {-1, 11, lowest, highest, -11, 12}) {
    Problem problem(3, 11, 5, {7, 64}, 1);
    std::fill_n(problem.slots.data(), problem.slots.size(), slot);
    const auto before = Bytes(problem);
    CacheWriteCpu(problem.params, 0, problem.n_rows());
    ExpectCaches(problem, before, slot);
  }
}

// A range writes its own rows and no other, so that ranges in any order give the whole.
TEST(AnySplitGivesTheSameBytes) {
  const int64_t rows = Problem(3, 11, 5, {7, 64}, 1).n_rows();
  for (int64_t first = 0; first <= rows; ++first) {
    for (int64_t last = first; last <= rows; ++last) {
      Problem problem(3, 11, 5, {7, 64}, 1);
      const auto all = Expected(problem, 0, rows);
      const auto part = Expected(problem, first, last);
      CacheWriteCpu(problem.params, first, last);
      ExpectCaches(problem, part, first);
      CacheWriteCpu(problem.params, last, rows);
      CacheWriteCpu(problem.params, 0, first);
      ExpectCaches(problem, all, first);
    }
  }
}

// XLA need not give an empty array an address.
TEST(RowsOfNoBytes) {
  const int32_t slots[] = {1, -1, 0, 1};
  CacheWriteParams params{};
  params.n_parts = 1;
  params.slots = slots;
  params.b = params.s = params.t = 2;
  CacheWriteCpu(params, 0, 4);
}

// Offsets are 64 bits wide (acceptance row A23), in address space that holds no memory.
TEST(OffsetsBeyond32Bits) {
  constexpr int64_t kFar = (int64_t{1} << 32) + 12345;
  const AddressSpace far_cache(2 * kFar), far_rows(kFar + 64), far_slots(4 * (kFar + 64));
  if (!far_cache.ok() || !far_rows.ok() || !far_slots.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 30 GB" << std::endl;
    return;
  }
  // Elements counted beyond 32 bits: the last row, for the last slot but ten of the second
  // sequence.
  uint8_t* cache = far_cache.data<uint8_t>();
  uint8_t* rows = far_rows.data<uint8_t>();
  CacheWriteParams params{};
  params.slots = far_slots.data<int32_t>();
  params.n_parts = 1;
  params.parts[0] = {cache, rows, 1};
  params.b = 2;
  params.s = (int64_t{1} << 31) + 10;
  params.t = kFar / 2;
  int64_t row = 2 * params.t - 1;
  far_slots.data<int32_t>()[row] = std::numeric_limits<int32_t>::max();
  rows[row] = 0x5A;
  const int64_t wrapped = static_cast<uint32_t>(row);
  far_slots.data<int32_t>()[wrapped] = 5;
  rows[wrapped] = 0xA5;
  CacheWriteCpu(params, row, row + 1);
  EXPECT_EQ(cache[5], 0);
  const int64_t target = params.s + std::numeric_limits<int32_t>::max();
  EXPECT_EQ(cache[target], 0x5A);
  EXPECT_EQ(cache[static_cast<uint32_t>(target)], 0);

  // Short numbers whose products with the row size are beyond 32 bits.
  constexpr int64_t kWidth = 448;
  params.parts[0].row_bytes = kWidth;
  params.b = 1;
  params.s = kFar / kWidth;
  params.t = kFar / kWidth;
  row = params.t - 1;
  far_slots.data<int32_t>()[row] = static_cast<int32_t>(params.s - 1);
  std::memset(rows + row * kWidth, 0xA5, kWidth);
  CacheWriteCpu(params, row, row + 1);
  const uint8_t* written = cache + (params.s - 1) * kWidth;
  EXPECT_EQ(std::vector<uint8_t>(written, written + kWidth), std::vector<uint8_t>(kWidth, 0xA5));
  EXPECT_EQ(written[-1], 0);
  EXPECT_EQ(written[kWidth], 0);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
