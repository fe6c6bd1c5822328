// Codes as the tensor cores get them: every E2M1 code at every depth, and where they lie.
#include "index_topk/index_topk_codes.h"

#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include "common/e4m3.h"
#include "common/testing.h"

namespace dsv4 {
namespace index_topk {
namespace {

float E2m1Value(uint32_t code) {
  constexpr float kMagnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return code & 8 ? -kMagnitudes[code & 7] : kMagnitudes[code & 7];
}

TEST(CodesAreExactToDepth14) {
  for (int d = 0; d < kDepths; ++d) {
    const uint32_t low = CodeTable(d, 0), high = CodeTable(d, 1);
    for (uint32_t code = 0; code < 16; ++code) {
      for (int at = 0; at < 8; ++at) {
        const uint32_t others = 0xA5C3F19Eu & ~(15u << 4 * at), word = others | code << 4 * at;
        uint32_t halves[2];
        CodesOf(word, low, high, halves[0], halves[1]);
        for (int i = 0; i < 8; ++i) {
          const uint32_t each = word >> 4 * i & 15;
          const float got = DecodeE4m3(static_cast<uint8_t>(halves[i / 4] >> 8 * (i % 4)));
          const float exact = std::ldexp(E2m1Value(each), kUnitExponent - d);
          EXPECT_EQ(std::fabs(got - exact) <= (d <= 14 ? 0.0f : 0x1p-10f), true, d, each, i);
          EXPECT_EQ(std::signbit(got), (each & 8) != 0, d, each, i);
        }
      }
    }
  }
}

TEST(ZerosHaveNoExponent) {
  EXPECT_EQ(GroupExponent(0x88888888u, 200), 0u);
  EXPECT_EQ(GroupExponent(0x88888888u, 255), 255u);  // NaN stays
  EXPECT_EQ(GroupExponent(0x00010000u, 200), 200u);
}

// Of a row, words 2 s and 2 s + 1 of lane c are bytes 4 c and 16 + 4 c of MMA step s; 16-byte
// pieces of eight rows are swizzled.
TEST(WordsLieWhereStepsReadThem) {
  std::set<uint32_t> places;
  for (int row = 0; row < 64; ++row) {
    for (int c = 0; c < 4; ++c) {
      for (int j = 0; j < 8; ++j) {
        const int byte = j / 2 * 32 + j % 2 * 16 + 4 * c;
        const int place = row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16;
        EXPECT_EQ(SwizzledAt(row, c, j), static_cast<uint32_t>(place), row, c, j);
        places.insert(SwizzledAt(row, c, j));
      }
    }
  }
  EXPECT_EQ(places.size(), size_t{64 * 32});
}

}  // namespace
}  // namespace index_topk
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
