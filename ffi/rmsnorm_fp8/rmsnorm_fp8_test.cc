// The CPU handler's loop against the definition in double, with watched surroundings.
#include "rmsnorm_fp8/rmsnorm_fp8.h"

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

int64_t Blocks(int64_t d) { return (d + kActBlock - 1) / kActBlock; }

struct Problem {
  Problem(int64_t t, int64_t d, int64_t offset = 0)
      : x(t * d, offset), weight(d, offset), code(t * d, offset), scale(t * Blocks(d)) {
    std::mt19937 random(static_cast<unsigned>(d + t));
    for (int64_t i = 0; i < x.size(); ++i) {
      const float size = std::ldexp(1.0f, static_cast<int>(i / d % 41) - 20);
      x[i] = FloatToBf16((static_cast<float>(random() % 4001) * 1e-3f - 2) * size);
    }
    for (int64_t i = 0; i < d; ++i) {
      weight[i] = FloatToBf16(0.5f + static_cast<float>(random() % 1000) * 1e-3f);
    }
    params = {x.data(),    weight.data(),
              code.data(), scale.data(),
              t,           d,
              kEps,        1.0f / static_cast<float>(d)};
    code.Fill(0xA5);
    scale.Fill(0xA5);
  }

  void Run() { RmsnormFp8Cpu(params, 0, params.t); }

  Guarded<uint16_t> x, weight;
  Guarded<uint8_t> code, scale;
  RmsnormFp8Params params;
};

void Expect(const Problem& problem) {
  const RmsnormFp8Params& p = problem.params;
  int64_t turned = 0;
  for (int64_t token = 0; token < p.t; ++token) {
    std::vector<double> y(p.d);
    double squares = 0;
    for (int64_t i = 0; i < p.d; ++i) {
      y[i] = Bf16ToFloat(problem.x[token * p.d + i]);
      squares += y[i] * y[i];
    }
    const double norm = 1 / std::sqrt(squares / static_cast<double>(p.d) + p.eps);
    for (int64_t i = 0; i < p.d; ++i) {
      const double exact = Bf16ToFloat(problem.weight[i]) * y[i] * norm;
      y[i] = Bf16ToFloat(FloatToBf16(static_cast<float>(exact)));
    }
    for (int64_t block = 0; block < Blocks(p.d); ++block) {
      const int64_t begin = block * kActBlock, end = std::min(begin + kActBlock, p.d);
      double largest = 1e-4;
      for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(y[i]));
      const int exponent = static_cast<int>(std::ceil(std::log2(largest / 448)));
      turned += problem.scale[token * Blocks(p.d) + block] != exponent + 127;
      for (int64_t i = begin; i < end; ++i) {
        const auto scaled = static_cast<float>(std::ldexp(y[i], -exponent));
        turned += problem.code[token * p.d + i] != EncodeE4m3(scaled);
      }
    }
  }
  EXPECT_EQ(turned * 1000 <= p.t * p.d, true, turned, "of", p.t * p.d);
  EXPECT_EQ(problem.code.Intact() && problem.scale.Intact(), true);
  EXPECT_EQ(problem.x.Intact() && problem.weight.Intact(), true);
}

TEST(EverySize) {
  for (int64_t d : {16, 48, 128, 144, 512, 528, 1024, 1536, 7168, 16384}) {
    Problem problem(5, d, d % 256 == 0 ? 0 : 2);
    problem.Run();
    Expect(problem);
  }
}

TEST(TokensDoNotMeet) {
  Problem whole(5, 1536), parts(5, 1536);
  whole.Run();
  for (int64_t token : {3, 1, 4, 0, 2}) RmsnormFp8Cpu(parts.params, token, token + 1);
  EXPECT_EQ(parts.code.Values(), whole.code.Values());
  EXPECT_EQ(parts.scale.Values(), whole.scale.Values());
}

TEST(BadValuesStayInTheirToken) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem clean(3, 512), problem(3, 512);
    problem.x[512 + 200] = FloatToBf16(bad);
    clean.Run();
    problem.Run();
    EXPECT_EQ(problem.scale[4 + 1], 255, "the block of channel 200");
    EXPECT_EQ(problem.code[512 + 200], 0x7F);
    for (int64_t i = 0; i < problem.code.size(); ++i) {
      if (i / 512 != 1) EXPECT_EQ(problem.code[i], clean.code[i], i);
    }
  }
}

TEST(ZerosHaveCodesZeroAndTheLeastScale) {
  Problem problem(1, 512);
  std::memset(problem.x.data(), 0, 1024);
  problem.Run();
  for (int64_t i = 0; i < 512; ++i) EXPECT_EQ(problem.code[i] & 0x7F, 0, i);
  for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(problem.scale[i], 127 - 22, i);
}

TEST(NoTokens) {
  Problem none(0, 512);
  none.Run();
}

// Offsets of more than 2^31 elements.
TEST(FarTokens) {
  constexpr int64_t kTokens = (int64_t{1} << 31) / 16384 + 2;
  const AddressSpace x(kTokens * 16384 * 2), code(kTokens * 16384), scale(kTokens * 128);
  if (!x.ok() || !code.ok() || !scale.ok()) return;
  Problem near(1, 16384);
  RmsnormFp8Params far = near.params;
  far.t = kTokens;
  far.x = x.data<uint16_t>();
  far.code = code.data<uint8_t>();
  far.scale = scale.data<uint8_t>();
  std::memcpy(x.data<uint16_t>() + (kTokens - 1) * 16384, near.x.data(), 16384 * 2);
  near.Run();
  RmsnormFp8Cpu(far, kTokens - 1, kTokens);
  EXPECT_EQ(std::memcmp(far.code + (kTokens - 1) * 16384, near.code.data(), 16384), 0);
  EXPECT_EQ(std::memcmp(far.scale + (kTokens - 1) * 128, near.scale.data(), 128), 0);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
