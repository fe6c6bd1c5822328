// The CPU handler's loop against the definition in double, with watched surroundings.
#include "query_finish/query_finish.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/bits.h"
#include "common/testing.h"

namespace dsv4 {
namespace {

constexpr float kEps = 1e-6f;
// The norm's sum and root in FP32, sines and products: relative to the larger channel of a pair.
constexpr double kError = 0x1p-19;

struct Problem {
  Problem(int64_t t, int64_t h, int64_t d, int64_t rotary, bool steps, int64_t offset = 0)
      : x(t * h * d, offset), positions(t), frequencies(rotary / 2), y(t * h * d, offset) {
    std::mt19937 random(static_cast<unsigned>(d + t));
    for (int64_t i = 0; i < x.size(); ++i) {
      const float scale = std::ldexp(1.0f, static_cast<int>(i / d % 9) - 4);
      x[i] = FloatToBf16((static_cast<float>(random() % 4001) * 1e-3f - 2) * scale);
    }
    const int32_t kept[] = {0, 1, 127, 1048575, 65536};
    for (int64_t i = 0; i < t; ++i) positions[i] = kept[i % 5];
    for (int64_t i = 0; i < rotary / 2; ++i) {
      frequencies[i] = std::pow(10000.0f, -2.0f * static_cast<float>(i) / 64.0f);
    }
    params = {x.data(),
              positions.data(),
              frequencies.data(),
              y.data(),
              t,
              h,
              d,
              rotary,
              kEps,
              1.0f / static_cast<float>(d),
              steps};
    y.Fill(0xA5);
  }

  Guarded<uint16_t> x;
  Guarded<int32_t> positions;
  Guarded<float> frequencies;
  Guarded<uint16_t> y;
  QueryFinishParams params;
};

double ToBf16(double x) { return Bf16ToFloat(FloatToBf16(static_cast<float>(x))); }

// One head in double; the steps rounded if asked for.
std::vector<double> Exact(const Problem& problem, int64_t row) {
  const QueryFinishParams& p = problem.params;
  std::vector<double> y(p.d);
  double squares = 0;
  for (int64_t i = 0; i < p.d; ++i) {
    y[i] = Bf16ToFloat(problem.x[row * p.d + i]);
    squares += p.bf16_steps ? ToBf16(y[i] * y[i]) : y[i] * y[i];
  }
  double scale = 1 / std::sqrt(squares / static_cast<double>(p.d) + p.eps);
  if (p.bf16_steps) {
    const double mean = ToBf16(ToBf16(squares / static_cast<double>(p.d)) + p.eps);
    scale = ToBf16(1 / std::sqrt(mean));
  }
  for (double& value : y) value = ToBf16(value * scale);
  for (int64_t i = 0; i < p.rotary / 2; ++i) {
    const double angle = static_cast<float>(problem.positions[row / p.h]) * problem.frequencies[i];
    double* pair = &y[p.d - p.rotary + 2 * i];
    const double even = pair[0], odd = pair[1];
    pair[0] = even * std::cos(angle) - odd * std::sin(angle);
    pair[1] = even * std::sin(angle) + odd * std::cos(angle);
  }
  return y;
}

void RunAndExpect(Problem& problem) {
  const QueryFinishParams& p = problem.params;
  QueryFinishCpu(p, 0, p.t);
  int64_t turned = 0;
  for (int64_t row = 0; row < p.t * p.h; ++row) {
    const std::vector<double> exact = Exact(problem, row);
    for (int64_t i = 0; i < p.d; ++i) {
      const double got = Bf16ToFloat(problem.y[row * p.d + i]);
      const double other = i < p.d - p.rotary ? exact[i] : exact[i ^ 1];
      const double size = std::max(std::fabs(exact[i]), std::fabs(other));
      // Half a unit of BF16 more; a rounding tie that falls the other way is one unit.
      const double error = std::fabs(got - exact[i]);
      turned += error > std::fabs(exact[i]) * 0x1p-8 + size * kError;
    }
  }
  EXPECT_EQ(turned * 1000 <= p.t * p.h * p.d, true, turned, "of", p.t * p.h * p.d);
  EXPECT_EQ(problem.y.Intact() && problem.x.Intact(), true);
  EXPECT_EQ(problem.positions.Intact() && problem.frequencies.Intact(), true);
}

TEST(EverySize) {
  for (bool steps : {false, true}) {
    for (int64_t d : {8, 64, 96, 256, 264, 512}) {
      for (int64_t rotary : {0, 8, 64}) {
        if (rotary > d) continue;
        Problem problem(7, 3, d, rotary, steps);
        RunAndExpect(problem);
      }
    }
  }
}

TEST(Slices) {
  Problem aligned(3, 2, 512, 64, true), shifted(3, 2, 512, 64, true, 2);
  RunAndExpect(aligned);
  RunAndExpect(shifted);
  EXPECT_EQ(aligned.y.Values(), shifted.y.Values());
}

// A token has the bits that it has alone.
TEST(TokensDoNotMeet) {
  Problem whole(5, 4, 512, 64, false), parts(5, 4, 512, 64, false);
  QueryFinishCpu(whole.params, 0, 5);
  for (int64_t token : {3, 1, 4, 0, 2}) QueryFinishCpu(parts.params, token, token + 1);
  EXPECT_EQ(parts.y.Values(), whole.y.Values());
}

TEST(BadValuesStayInTheirHead) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem clean(2, 3, 512, 64, true), problem(2, 3, 512, 64, true);
    problem.x[512 + 7] = FloatToBf16(bad);  // head 1 of token 0
    QueryFinishCpu(clean.params, 0, 2);
    QueryFinishCpu(problem.params, 0, 2);
    bool nan = false;
    for (int64_t i = 0; i < problem.y.size(); ++i) {
      if (i / 512 == 1) {
        nan = nan || std::isnan(Bf16ToFloat(problem.y[i]));
      } else {
        EXPECT_EQ(problem.y[i], clean.y[i], i);
      }
    }
    EXPECT_EQ(nan, true);
  }
}

TEST(ZerosStayZeros) {
  Problem problem(1, 1, 512, 64, true);
  std::memset(problem.x.data(), 0, 1024);
  QueryFinishCpu(problem.params, 0, 1);
  for (int64_t i = 0; i < 512; ++i) EXPECT_EQ(problem.y[i] & 0x7FFF, 0, i);
}

TEST(NoTokensAndNoHeads) {
  Problem none(0, 4, 512, 64, true), headless(3, 0, 512, 64, true);
  QueryFinishCpu(none.params, 0, 0);
  QueryFinishCpu(headless.params, 0, 3);
}

// Offsets of more than 2^31 elements.
TEST(FarTokens) {
  constexpr int64_t kTokens = (int64_t{1} << 31) / (128 * 512) + 2;
  const AddressSpace x(kTokens * 128 * 512 * 2), y(kTokens * 128 * 512 * 2);
  if (!x.ok() || !y.ok()) return;
  Problem near(1, 128, 512, 64, true);
  std::vector<int32_t> positions(kTokens);
  QueryFinishParams far = near.params;
  far.t = kTokens;
  far.x = x.data<uint16_t>();
  far.y = y.data<uint16_t>();
  far.positions = positions.data();
  const int64_t at = (kTokens - 1) * 128 * 512;
  std::memcpy(x.data<uint16_t>() + at, near.x.data(), 128 * 512 * 2);
  QueryFinishCpu(near.params, 0, 1);
  QueryFinishCpu(far, kTokens - 1, kTokens);
  EXPECT_EQ(std::memcmp(y.data<uint16_t>() + at, near.y.data(), 128 * 512 * 2), 0);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
