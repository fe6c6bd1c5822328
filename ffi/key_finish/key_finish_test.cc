// The CPU handler's loop against the definition in double, with watched surroundings.
#include "key_finish/key_finish.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/bits.h"
#include "common/e4m3.h"
#include "common/testing.h"

namespace dsv4 {
namespace {

constexpr float kEps = 1e-6f;
constexpr uint8_t kPoison = 0xA5;

struct Store {
  Store(int64_t rows, int64_t nope, int64_t rotary, int64_t offset = 0)
      : codes(rows * nope, offset), scale(rows * (nope / kKeyBlock)), rope(rows * rotary) {
    codes.Fill(kPoison);
    scale.Fill(kPoison);
    rope.Fill(kPoison);
  }
  KeyStore Pointers() { return {codes.data(), scale.data(), rope.data()}; }
  bool Intact() const { return codes.Intact() && scale.Intact() && rope.Intact(); }

  Guarded<uint8_t> codes, scale;
  Guarded<uint16_t> rope;
};

struct Problem {
  Problem(int64_t b, int64_t t, int64_t slots, int64_t d = 512, int64_t rotary = 64,
          int64_t offset = 0)
      : x(b * t * d, offset),
        weight(d, offset),
        start(b),
        count(b),
        frequencies(rotary / 2),
        rows(b * t, d - rotary, rotary, offset),
        ring(b * slots, d - rotary, rotary, offset) {
    std::mt19937 random(static_cast<unsigned>(d + t));
    for (int64_t i = 0; i < x.size(); ++i) {
      x[i] = FloatToBf16(static_cast<float>(random() % 4001) * 1e-3f - 2);
    }
    for (int64_t i = 0; i < d; ++i) {
      const float one = 0.5f + static_cast<float>(random() % 1000) * 1e-3f;
      weight[i] = FloatToBf16(i % 64 < 3 ? one * 1e-3f : one);
    }
    for (int64_t i = 0; i < b; ++i) {
      start[i] = static_cast<int32_t>(i * 37 % 200);
      count[i] = static_cast<int32_t>(t);
    }
    for (int64_t i = 0; i < rotary / 2; ++i) {
      frequencies[i] = std::pow(10000.0f, -2.0f * static_cast<float>(i) / 64.0f);
    }
    params.x = x.data();
    params.weight = weight.data();
    params.start = start.data();
    params.count = count.data();
    params.frequencies = frequencies.data();
    params.rows = rows.Pointers();
    params.ring = ring.Pointers();
    params.b = b;
    params.t = t;
    params.d = d;
    params.rotary = rotary;
    params.slots = slots;
    params.eps = kEps;
    params.reciprocal_d = 1.0f / static_cast<float>(d);
  }

  void Run() { KeyFinishCpu(params, 0, params.b * params.t); }

  Guarded<uint16_t> x, weight;
  Guarded<int32_t> start, count;
  Guarded<float> frequencies;
  Store rows, ring;
  KeyFinishParams params{};
};

double ToBf16(double x) { return Bf16ToFloat(FloatToBf16(static_cast<float>(x))); }

// Values that differ from the definition in double by more than a code's or BF16's rounding.
void ExpectRows(const Problem& problem) {
  const KeyFinishParams& p = problem.params;
  const int64_t nope = p.d - p.rotary, blocks = nope / kKeyBlock;
  int64_t turned = 0;
  for (int64_t row = 0; row < p.b * p.t; ++row) {
    std::vector<double> y(p.d);
    double squares = 0;
    for (int64_t i = 0; i < p.d; ++i) {
      y[i] = Bf16ToFloat(problem.x[row * p.d + i]);
      squares += y[i] * y[i];
    }
    const double scale = 1 / std::sqrt(squares / static_cast<double>(p.d) + p.eps);
    for (int64_t i = 0; i < p.d; ++i) y[i] = ToBf16(Bf16ToFloat(problem.weight[i]) * y[i] * scale);
    const int64_t position = problem.start[row / p.t] + row % p.t;
    for (int64_t i = 0; i < p.rotary / 2; ++i) {
      const double angle = static_cast<float>(position) * problem.frequencies[i];
      const double even = y[nope + 2 * i], odd = y[nope + 2 * i + 1];
      const double want[] = {even * std::cos(angle) - odd * std::sin(angle),
                             even * std::sin(angle) + odd * std::cos(angle)};
      for (int64_t k = 0; k < 2; ++k) {
        const double got = Bf16ToFloat(problem.rows.rope[row * p.rotary + 2 * i + k]);
        turned += std::fabs(got - want[k]) > std::fabs(want[k]) * 0x1p-8 + 1e-5;
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      double largest = 1e-4;
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        largest = std::max(largest, std::fabs(y[block * kKeyBlock + i]));
      }
      const int exponent = static_cast<int>(std::ceil(std::log2(largest / 448)));
      turned += problem.rows.scale[row * blocks + block] != exponent + 127;
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        const uint8_t code = problem.rows.codes[row * nope + block * kKeyBlock + i];
        const float scaled = static_cast<float>(std::ldexp(y[block * kKeyBlock + i], -exponent));
        turned += code != EncodeE4m3(scaled);
      }
    }
  }
  EXPECT_EQ(turned * 1000 <= p.b * p.t * p.d, true, turned, "of", p.b * p.t * p.d);
}

// The ring has the rows that it should have, and the poison elsewhere.
void ExpectRing(const Problem& problem) {
  const KeyFinishParams& p = problem.params;
  const int64_t nope = p.d - p.rotary, blocks = nope / kKeyBlock;
  for (int64_t b = 0; b < p.b; ++b) {
    std::vector<int64_t> holds(p.slots, -1);
    const int64_t taken = std::clamp<int64_t>(problem.count[b], 0, p.t);
    for (int64_t j = 0; j < taken && problem.start[b] >= 0; ++j) {
      holds[(int64_t{problem.start[b]} + j) % p.slots] = b * p.t + j;  // later ones over earlier
    }
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      const int64_t row = holds[slot], at = b * p.slots + slot;
      for (int64_t i = 0; i < nope; ++i) {
        EXPECT_EQ(problem.ring.codes[at * nope + i],
                  row < 0 ? kPoison : problem.rows.codes[row * nope + i], b, slot, i);
      }
      for (int64_t i = 0; i < blocks; ++i) {
        EXPECT_EQ(problem.ring.scale[at * blocks + i],
                  row < 0 ? kPoison : problem.rows.scale[row * blocks + i], b, slot, i);
      }
      for (int64_t i = 0; i < p.rotary; ++i) {
        EXPECT_EQ(problem.ring.rope[at * p.rotary + i],
                  row < 0 ? kPoison * 257 : problem.rows.rope[row * p.rotary + i], b, slot, i);
      }
    }
  }
  EXPECT_EQ(problem.rows.Intact() && problem.ring.Intact(), true);
  EXPECT_EQ(problem.x.Intact() && problem.weight.Intact() && problem.frequencies.Intact(), true);
  EXPECT_EQ(problem.start.Intact() && problem.count.Intact(), true);
}

TEST(EverySize) {
  for (int64_t offset : {0, 2}) {
    for (int64_t nope : {64, 192, 448}) {
      for (int64_t rotary : {8, 32, 64}) {
        Problem problem(2, 5, 8, nope + rotary, rotary, offset);
        problem.Run();
        ExpectRows(problem);
        ExpectRing(problem);
      }
    }
  }
}

TEST(RingsOfEveryLength) {
  for (int64_t slots : {1, 3, 128, 131}) {
    for (int64_t t : {1, 3, 128, 300}) {
      Problem problem(3, t, slots);
      problem.Run();
      ExpectRing(problem);
    }
  }
}

TEST(RaggedRowsAndWildLengths) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  Problem problem(8, 7, 5);
  const int32_t start[] = {0, 3, 126, kMost, -1, std::numeric_limits<int32_t>::min(), 4, kMost - 3};
  const int32_t count[] = {0, 3, 7, 2, 7, 7, -5, kMost};
  std::copy_n(start, 8, problem.start.data());
  std::copy_n(count, 8, problem.count.data());
  problem.Run();
  ExpectRing(problem);
}

TEST(WithoutARing) {
  Problem with(2, 9, 128), without(2, 9, 0);
  without.params.count = nullptr;
  without.params.ring = {};
  with.Run();
  without.Run();
  EXPECT_EQ(without.rows.codes.Values(), with.rows.codes.Values());
  EXPECT_EQ(without.rows.scale.Values(), with.rows.scale.Values());
  EXPECT_EQ(without.rows.rope.Values(), with.rows.rope.Values());
}

// Row by row in any order: the same bytes.
TEST(RowsDoNotMeet) {
  Problem whole(2, 9, 4), parts(2, 9, 4);
  whole.Run();
  for (int64_t i = 0; i < 18; ++i) KeyFinishCpu(parts.params, i * 7 % 18, i * 7 % 18 + 1);
  EXPECT_EQ(parts.rows.codes.Values(), whole.rows.codes.Values());
  EXPECT_EQ(parts.ring.codes.Values(), whole.ring.codes.Values());
  EXPECT_EQ(parts.ring.scale.Values(), whole.ring.scale.Values());
  EXPECT_EQ(parts.ring.rope.Values(), whole.ring.rope.Values());
}

TEST(BadValuesStayInTheirKey) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem clean(1, 3, 8), problem(1, 3, 8);
    problem.x[512 + 100] = FloatToBf16(bad);
    clean.Run();
    problem.Run();
    EXPECT_EQ(problem.rows.scale[7 + 1], 255, "the block of channel 100");
    EXPECT_EQ(problem.rows.codes[448 + 100], 0x7F);
    for (int64_t row : {0, 2}) {
      for (int64_t i = 0; i < 448; ++i) {
        EXPECT_EQ(problem.rows.codes[row * 448 + i], clean.rows.codes[row * 448 + i], row, i);
      }
    }
  }
}

TEST(ZerosHaveCodesZeroAndTheLeastScale) {
  Problem problem(1, 1, 1);
  std::memset(problem.x.data(), 0, 1024);
  problem.Run();
  for (int64_t i = 0; i < 448; ++i) EXPECT_EQ(problem.rows.codes[i] & 0x7F, 0, i);
  for (int64_t i = 0; i < 7; ++i) EXPECT_EQ(problem.rows.scale[i], 127 - 22, i);
}

TEST(NoRows) {
  Problem none(0, 4, 8), empty(3, 0, 8);
  none.Run();
  empty.Run();
  ExpectRing(empty);
}

// Offsets of more than 2^31 elements.
TEST(FarRows) {
  constexpr int64_t kRows = (int64_t{1} << 31) / 448 + 2;
  const AddressSpace x(kRows * 1024), codes(kRows * 448), scale(kRows * 7), rope(kRows * 128);
  if (!x.ok() || !codes.ok() || !scale.ok() || !rope.ok()) return;
  Problem near(1, 1, 0);
  near.params.count = nullptr;
  KeyFinishParams far = near.params;
  far.b = 1;
  far.t = kRows;
  far.x = x.data<uint16_t>();
  far.rows = {codes.data<uint8_t>(), scale.data<uint8_t>(), rope.data<uint16_t>()};
  near.start[0] = static_cast<int32_t>(kRows - 1);
  near.Run();
  near.start[0] = 0;
  std::memcpy(x.data<uint16_t>() + (kRows - 1) * 512, near.x.data(), 1024);
  KeyFinishCpu(far, kRows - 1, kRows);
  EXPECT_EQ(std::memcmp(far.rows.nope + (kRows - 1) * 448, near.rows.codes.data(), 448), 0);
  EXPECT_EQ(std::memcmp(far.rows.scale + (kRows - 1) * 7, near.rows.scale.data(), 7), 0);
  EXPECT_EQ(std::memcmp(far.rows.rope + (kRows - 1) * 64, near.rows.rope.data(), 128), 0);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
