// The CPU handler's loop against the definition in double, with watched surroundings.
#include "index_query_finish/index_query_finish.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/bits.h"
#include "common/e2m1.h"
#include "common/e4m3.h"
#include "common/testing.h"

namespace dsv4 {
namespace {

using Form = IndexQueryForm;

struct Problem {
  Problem(int64_t t, int64_t h, int64_t d, int64_t rotary, Form form, int64_t offset = 0)
      : x(t * h * d, offset),
        positions(t),
        frequencies(rotary / 2),
        code(t * h * CodeBytes(d, form), offset),
        scale(t * h * Blocks(d, form)) {
    std::mt19937 random(static_cast<unsigned>(d + t));
    for (int64_t i = 0; i < x.size(); ++i) {
      x[i] = FloatToBf16(static_cast<float>(random() % 4001) * 1e-3f - 2);
    }
    const int32_t kept[] = {0, 1, 127, 1048575, 65536};
    for (int64_t i = 0; i < t; ++i) positions[i] = kept[i % 5];
    for (int64_t i = 0; i < rotary / 2; ++i) {
      frequencies[i] = std::pow(160000.0f, -2.0f * static_cast<float>(i) / 64.0f);
    }
    params = {x.data(),
              positions.data(),
              frequencies.data(),
              code.data(),
              scale.data(),
              t,
              h,
              d,
              rotary,
              static_cast<float>(1 / std::sqrt(static_cast<double>(d))),
              form};
    code.Fill(0xA5);
    scale.Fill(0xA5);
  }
  static int64_t CodeBytes(int64_t d, Form form) { return form == Form::kFp8 ? d : d / 2; }
  static int64_t Blocks(int64_t d, Form form) { return form == Form::kFp8 ? 1 : d / 32; }

  void Run() { IndexQueryFinishCpu(params, 0, params.t); }

  Guarded<uint16_t> x;
  Guarded<int32_t> positions;
  Guarded<float> frequencies;
  Guarded<uint8_t> code, scale;
  IndexQueryFinishParams params;
};

double ToBf16(double x) { return Bf16ToFloat(FloatToBf16(static_cast<float>(x))); }

void Expect(const Problem& problem) {
  const IndexQueryFinishParams& p = problem.params;
  const bool fp8 = p.form == Form::kFp8;
  const int64_t blocks = Problem::Blocks(p.d, p.form), block = p.d / blocks;
  int64_t turned = 0;
  for (int64_t row = 0; row < p.t * p.h; ++row) {
    std::vector<double> x(p.d), y(p.d);
    for (int64_t i = 0; i < p.d; ++i) x[i] = Bf16ToFloat(problem.x[row * p.d + i]);
    for (int64_t i = 0; i < p.rotary / 2; ++i) {
      const double angle =
          static_cast<float>(problem.positions[row / p.h]) * problem.frequencies[i];
      double* pair = &x[p.d - p.rotary + 2 * i];
      const double even = pair[0], odd = pair[1];
      pair[0] = ToBf16(even * std::cos(angle) - odd * std::sin(angle));
      pair[1] = ToBf16(even * std::sin(angle) + odd * std::cos(angle));
    }
    for (int64_t i = 0; i < p.d; ++i) {
      for (int64_t k = 0; k < p.d; ++k) y[i] += __builtin_parityll(i & k) ? -x[k] : x[k];
      y[i] = ToBf16(y[i] / std::sqrt(static_cast<double>(p.d)));
    }
    for (int64_t at = 0; at < blocks; ++at) {
      double largest = fp8 ? 1e-4 : 0x1p-126;
      for (int64_t i = 0; i < block; ++i) largest = std::max(largest, std::fabs(y[at * block + i]));
      const int exponent = static_cast<int>(std::ceil(std::log2(largest / (fp8 ? 448 : 6))));
      turned += problem.scale[row * blocks + at] != exponent + 127;
      for (int64_t i = at * block; i < (at + 1) * block; ++i) {
        const auto scaled = static_cast<float>(std::ldexp(y[i], -exponent));
        const uint8_t byte = problem.code[fp8 ? row * p.d + i : (row * p.d + i) / 2];
        turned += fp8 ? byte != EncodeE4m3(scaled) : (byte >> i % 2 * 4 & 15) != EncodeE2m1(scaled);
      }
    }
  }
  EXPECT_EQ(turned * 1000 <= p.t * p.h * p.d, true, turned, "of", p.t * p.h * p.d);
  EXPECT_EQ(problem.code.Intact() && problem.scale.Intact() && problem.x.Intact(), true);
}

TEST(EverySize) {
  for (Form form : {Form::kMxfp4, Form::kFp8}) {
    for (int64_t d : {32, 64, 128}) {
      for (int64_t rotary : {0, 8, 32, 64}) {
        if (rotary > d) continue;
        Problem problem(5, 7, d, rotary, form, rotary == 8 ? 2 : 0);
        problem.Run();
        Expect(problem);
      }
    }
  }
}

TEST(TokensDoNotMeet) {
  Problem whole(5, 4, 128, 64, Form::kMxfp4), parts(5, 4, 128, 64, Form::kMxfp4);
  whole.Run();
  for (int64_t token : {3, 1, 4, 0, 2}) IndexQueryFinishCpu(parts.params, token, token + 1);
  EXPECT_EQ(parts.code.Values(), whole.code.Values());
  EXPECT_EQ(parts.scale.Values(), whole.scale.Values());
}

TEST(BadValuesStayInTheirHead) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (Form form : {Form::kMxfp4, Form::kFp8}) {
      Problem clean(2, 3, 128, 64, form), problem(2, 3, 128, 64, form);
      const int64_t blocks = Problem::Blocks(128, form), bytes = Problem::CodeBytes(128, form);
      problem.x[128 + 77] = FloatToBf16(bad);  // head 1 of token 0
      clean.Run();
      problem.Run();
      const bool nan = std::isnan(bad);
      for (int64_t i = 0; i < blocks; ++i) {
        if (nan) EXPECT_EQ(problem.scale[blocks + i], 255, i);
      }
      for (int64_t i = 0; i < problem.code.size(); ++i) {
        if (i / bytes != 1) EXPECT_EQ(problem.code[i], clean.code[i], i);
      }
    }
  }
}

TEST(ZerosHaveCodesZeroAndTheLeastScale) {
  for (Form form : {Form::kMxfp4, Form::kFp8}) {
    Problem problem(1, 1, 128, 64, form);
    std::memset(problem.x.data(), 0, 256);
    problem.Run();
    const bool fp8 = form == Form::kFp8;
    for (int64_t i = 0; i < problem.code.size(); ++i) {
      EXPECT_EQ(problem.code[i] & (fp8 ? 0x7F : 0x77), 0, i);
    }
    EXPECT_EQ(problem.scale[0], fp8 ? 127 - 22 : 1);
  }
}

TEST(NoTokensAndNoHeads) {
  Problem none(0, 4, 128, 64, Form::kMxfp4), headless(3, 0, 128, 64, Form::kFp8);
  none.Run();
  headless.Run();
}

// Offsets of more than 2^31 elements.
TEST(FarTokens) {
  constexpr int64_t kTokens = (int64_t{1} << 31) / (64 * 128) + 2;
  const AddressSpace x(kTokens * 64 * 256), code(kTokens * 64 * 64), scale(kTokens * 64 * 4);
  if (!x.ok() || !code.ok() || !scale.ok()) return;
  Problem near(1, 64, 128, 64, Form::kMxfp4);
  std::vector<int32_t> positions(kTokens);
  IndexQueryFinishParams far = near.params;
  far.t = kTokens;
  far.x = x.data<uint16_t>();
  far.code = code.data<uint8_t>();
  far.scale = scale.data<uint8_t>();
  far.positions = positions.data();
  std::memcpy(x.data<uint16_t>() + (kTokens - 1) * 64 * 128, near.x.data(), 64 * 256);
  near.Run();
  IndexQueryFinishCpu(far, kTokens - 1, kTokens);
  EXPECT_EQ(std::memcmp(far.code + (kTokens - 1) * 64 * 64, near.code.data(), 64 * 64), 0);
  EXPECT_EQ(std::memcmp(far.scale + (kTokens - 1) * 64 * 4, near.scale.data(), 64 * 4), 0);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
