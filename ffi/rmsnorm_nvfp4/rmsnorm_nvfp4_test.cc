// The CPU handler's loop against the definition, which is written out here once more, in double.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/bits.h"
#include "common/e4m3.h"
#include "common/testing.h"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kEps = 1e-6f;
constexpr int64_t kBlock = 16;
#if defined(__x86_64__)
constexpr unsigned kFlushSubnormal = 0x8040;  // of results and of operands, in MXCSR
#endif

// ---- The definition (model.md 9.2), the norm in double.

// Nearest multiple of `unit`, ties to the even multiple.
double RoundTo(double x, double unit) { return std::nearbyint(x / unit) * unit; }

// Nearest value with `bits` significant bits and exponents from `min_exponent` on.
double RoundSignificant(double x, int bits, int min_exponent) {
  if (x == 0 || !std::isfinite(x)) return x;
  return RoundTo(x, std::ldexp(1.0, std::max(std::ilogb(x), min_exponent) - bits + 1));
}

double RoundToBf16(double x) {
  const double rounded = RoundSignificant(x, 8, -126);
  return std::fabs(rounded) > 0x1.FEp127 ? std::copysign(kInf, x) : rounded;
}

uint8_t E2m1Code(float x) {
  if (std::isnan(x)) return 7;
  const double a = std::min<double>(std::fabs(x), 6);
  const double value = RoundTo(a, a < 2 ? 0.5 : a < 4 ? 1 : 2);
  const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const auto code = std::find(std::begin(values), std::end(values), value) - std::begin(values);
  return static_cast<uint8_t>(std::signbit(x) ? 8 + code : code);
}

struct Block {
  uint8_t code[kBlock];  // one element each
  float scale;
};

struct Token {
  float scale;
  std::vector<Block> blocks;
  // Whether no value of a block, or the token's largest, is so near to a rounding boundary of BF16
  // that an FP32 norm may end up on its other side.
  std::vector<bool> sure;
  bool sure_scale;
};

// Bounds the relative error of the norm in FP32: 16 + 5 + 32 roundings in the longest chain of the
// sum, half of which the square root takes away, and some ten more, of 2^-24 each.
constexpr double kNormError = 0x1p-18;

bool SureOfRounding(double y) {
  if (!std::isfinite(y)) return true;
  const double slack = std::fabs(y) * kNormError + 0x1p-148;  // and of a subnormal product
  return RoundToBf16(y - slack) == RoundToBf16(y + slack);
}

double Largest(const double* values, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(values[i])) return kNan;
    largest = std::max(largest, std::fabs(values[i]));
  }
  return largest;
}

Token Quantised(const std::vector<float>& x, const std::vector<float>& weight, float eps,
                const float* static_scale) {
  const int64_t d = static_cast<int64_t>(x.size());
  double sum = 0;
  for (float value : x) sum += static_cast<double>(value) * value;
  const double norm = 1 / std::sqrt(sum / static_cast<double>(d) + eps);
  std::vector<double> exact(d), y(d);
  std::vector<bool> sure(d);
  for (int64_t i = 0; i < d; ++i) {
    exact[i] = weight[i] * (x[i] * norm);
    y[i] = RoundToBf16(exact[i]);
    sure[i] = SureOfRounding(exact[i]);
  }
  Token token;
  const float largest = static_cast<float>(Largest(y.data(), d));
  const float finite = largest > kFloat32Max ? kFloat32Max : largest;  // NaN stays
  token.sure_scale = true;
  if (static_scale != nullptr) {
    token.scale = *static_scale;
    if (token.scale < 0x1p-100f) token.scale = 0x1p-100f;
    if (token.scale > 0x1p100f) token.scale = 0x1p100f;
  } else if (largest == 0) {
    token.scale = 1;
  } else {
    token.scale = finite * (1.0f / 2688.0f);
    if (token.scale < 0x1p-100f) token.scale = 0x1p-100f;
    token.sure_scale = SureOfRounding(Largest(exact.data(), d));
  }
  for (int64_t first = 0; first < d; first += kBlock) {
    const float amax = static_cast<float>(Largest(&y[first], kBlock));
    double ratio = 1;
    if (amax != 0) {
      ratio = (amax > kFloat32Max ? kFloat32Max : amax) / (6.0f * token.scale);
      if (ratio < 0x1p-9) ratio = 0x1p-9;
      if (ratio > 448) ratio = 448;
    }
    Block block;
    block.scale = static_cast<float>(RoundSignificant(ratio, 4, -6));
    const float step = block.scale * token.scale;
    bool sure_block = token.sure_scale;
    for (int64_t i = 0; i < kBlock; ++i) {
      block.code[i] = E2m1Code(static_cast<float>(y[first + i]) / step);
      sure_block = sure_block && sure[first + i];
    }
    token.blocks.push_back(block);
    token.sure.push_back(sure_block);
  }
  return token;
}

// ---- Problems.

struct Outputs {
  std::vector<uint8_t> code, block_scale;
  std::vector<uint32_t> token_scale;  // bits: NaN equals itself
};

void ExpectEqual(const Outputs& got, const Outputs& expected, const std::string& note) {
  EXPECT_EQ(got.code, expected.code, note);
  EXPECT_EQ(got.block_scale, expected.block_scale, note);
  EXPECT_EQ(got.token_scale, expected.token_scale, note);
}

struct Problem {
  Problem(int64_t t, int64_t d) : t(t), d(d), x(t * d), weight(d) {}

  void SetX(int64_t token, int64_t i, float value) { x[token * d + i] = FloatToBf16(value); }
  void SetWeight(int64_t i, float value) { weight[i] = FloatToBf16(value); }

  // Outputs of the given ranges, one after the other, over bytes that are `poison` before.
  Outputs Run(uint8_t poison, const std::vector<int64_t>& ends) const {
    Guarded<uint8_t> code(t * d / 2), block_scale(t * d / kBlock);
    Guarded<float> token_scale(t);
    code.Fill(poison);
    block_scale.Fill(poison);
    token_scale.Fill(poison);
    RmsnormNvfp4Params params{};
    params.x = x.data();
    params.weight = weight.data();
    params.global_scale = has_static_scale ? &static_scale : nullptr;
    params.code = code.data();
    params.block_scale = block_scale.data();
    params.token_scale = token_scale.data();
    params.t = t;
    params.d = d;
    params.reciprocal_d = 1.0f / static_cast<float>(d);
    params.eps = eps;
    for (size_t i = 0; i + 1 < ends.size(); ++i) RmsnormNvfp4Cpu(params, ends[i], ends[i + 1]);
    EXPECT_EQ(code.Intact(), true);
    EXPECT_EQ(block_scale.Intact(), true);
    EXPECT_EQ(token_scale.Intact(), true);
    EXPECT_EQ(x.Intact(), true);
    EXPECT_EQ(weight.Intact(), true);
    Outputs outputs{code.Values(), block_scale.Values(), std::vector<uint32_t>(t)};
    for (int64_t i = 0; i < t; ++i) outputs.token_scale[i] = FloatBits(token_scale[i]);
    return outputs;
  }

  // Every byte is written if what was there before makes no difference.
  Outputs Run() const {
    const Outputs outputs = Run(0x5A, {0, t});
    ExpectEqual(Run(0xA5, {0, t}), outputs, "unwritten bytes");
    return outputs;
  }

  int64_t t, d;
  float eps = kEps;
  bool has_static_scale = false;
  float static_scale = 0;
  Guarded<uint16_t> x, weight;
};

// Compares with the definition wherever FP32 must give it; at least `sure` of the blocks.
void ExpectDefinition(const Problem& problem, double sure = 0.9) {
  const Outputs got = problem.Run();
  const int64_t d = problem.d, blocks = d / kBlock;
  std::vector<float> weight(d), x(d);
  for (int64_t i = 0; i < d; ++i) weight[i] = Bf16ToFloat(problem.weight[i]);
  int64_t compared = 0;
  for (int64_t t = 0; t < problem.t; ++t) {
    for (int64_t i = 0; i < d; ++i) x[i] = Bf16ToFloat(problem.x[t * d + i]);
    const Token token = Quantised(x, weight, problem.eps,
                                  problem.has_static_scale ? &problem.static_scale : nullptr);
    if (token.sure_scale) {
      const float scale = FloatFromBits(got.token_scale[t]);
      EXPECT_EQ(std::isnan(scale), std::isnan(token.scale), "token", t);
      if (!std::isnan(token.scale)) EXPECT_EQ(scale, token.scale, "token", t);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      if (!token.sure[b]) continue;
      ++compared;
      const Block& block = token.blocks[b];
      const uint8_t scale = got.block_scale[t * blocks + b];
      if (std::isnan(block.scale)) {
        EXPECT_EQ(scale, 0x7F, "token", t, "block", b);
      } else {
        EXPECT_EQ(DecodeE4m3(scale), block.scale, "token", t, "block", b);
      }
      for (int64_t i = 0; i < kBlock; ++i) {
        const uint8_t pair = got.code[(t * d + b * kBlock + i) / 2];
        const int code = i % 2 == 0 ? pair & 0xF : pair >> 4;
        if (std::isnan(block.scale * token.scale)) {
          EXPECT_EQ(code & 7, 7, "token", t, "block", b, "element", i);  // +-6
        } else {
          EXPECT_EQ(code, block.code[i], "token", t, "block", b, "element", i);
        }
      }
    }
  }
  EXPECT_EQ(static_cast<double>(compared) >= sure * static_cast<double>(problem.t * blocks), true,
            compared, "blocks compared");
}

// Normal numbers; blocks of different magnitudes, so that their scales differ.
Problem Random(int64_t t, int64_t d, float magnitude = 1, float weight = 1) {
  Problem problem(t, d);
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < d; ++i) problem.SetWeight(i, weight * (1 + 0.3f * normal(random)));
  for (int64_t token = 0; token < t; ++token) {
    for (int64_t i = 0; i < d; ++i) {
      const int spread = static_cast<int>(i / kBlock % 13) - 6;
      problem.SetX(token, i, std::ldexp(magnitude * normal(random), spread));
    }
  }
  return problem;
}

// Without rounding up to y = weight * +-1: x = +-2, eps = 0.
Problem Exact(const std::vector<float>& y) {
  Problem problem(2, static_cast<int64_t>(y.size()));
  problem.eps = 0;
  for (int64_t i = 0; i < problem.d; ++i) {
    problem.SetWeight(i, y[i]);
    problem.SetX(0, i, 2);
    problem.SetX(1, i, i % 3 == 0 ? 2.0f : -2.0f);
  }
  return problem;
}

// ---- Tests.

TEST(AnyWidth) {
  ExpectDefinition(Random(40, 16));
  ExpectDefinition(Random(40, 48));   // a warp not full
  ExpectDefinition(Random(40, 528));  // 33 blocks: a second group of one
  ExpectDefinition(Random(8, 4096));
  ExpectDefinition(Random(2, 16384));  // the most
  ExpectDefinition(Random(1, 1040));   // one token
}

TEST(AnyMagnitude) {
  ExpectDefinition(Random(20, 528, 0x1p-20f));
  ExpectDefinition(Random(20, 528, 0x1p40f));
  ExpectDefinition(Random(20, 528, 1e-4f, 0x1p60f));
  ExpectDefinition(Random(20, 528, 1, 0x1p-95f));   // global scales at their lower bound
  ExpectDefinition(Random(20, 528, 0x1p-100f));     // squares that vanish
  ExpectDefinition(Random(20, 528, 1, 0x1p-128f));  // subnormal y
}

TEST(NoToken) { ExpectDefinition(Random(0, 48)); }

// All ties of E2M1, of either sign, behind scales that are powers of two.
TEST(Ties) {
  std::vector<float> y = {6, 0, 0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5, 0.5f, 1, 1.5f, 2, 3, 4};
  y.push_back(0x1p-20f);
  for (float scale : {1.0f, 0.5f, 0x1p-8f}) {  // of a second block, exact in E4M3
    std::vector<float> both = y;
    for (float value : y) both.push_back(value * scale);
    Problem problem = Exact(both);
    problem.has_static_scale = true;
    problem.static_scale = 1;
    ExpectDefinition(problem, 1);
    const Outputs outputs = problem.Run();
    const std::vector<uint8_t> codes = {0x07, 0x20, 0x42, 0x64, 0x16, 0x32, 0x54, 0x06};
    EXPECT_EQ(std::vector<uint8_t>(outputs.code.begin(), outputs.code.begin() + 8), codes);
    EXPECT_EQ(std::vector<uint8_t>(outputs.code.begin() + 8, outputs.code.begin() + 16), codes);
    EXPECT_EQ(DecodeE4m3(outputs.block_scale[0]), 1.0f);
    EXPECT_EQ(DecodeE4m3(outputs.block_scale[1]), scale);
  }
}

// The codes are those of the rounded block scale, not of the quotient it was rounded from.
TEST(RoundedBlockScale) {
  std::vector<float> y;
  for (int i = 0; i < 640; ++i) y.push_back(1 + static_cast<float>(i * 37 % 256) / 128);
  for (float static_scale : {0.0f, 1.0f, 1.0f / 3, 0.01f}) {
    Problem problem = Exact(y);
    problem.has_static_scale = static_scale != 0;
    problem.static_scale = static_scale;
    ExpectDefinition(problem, 0.99);
  }
}

TEST(StaticScale) {
  Problem problem = Random(20, 528);
  problem.has_static_scale = true;
  // Fitting, far too small (all saturates), far too large (all vanishes), NaN.
  for (float scale : {0.01f, 0x1p-100f, 0x1p100f, kNan}) {
    problem.static_scale = scale;
    ExpectDefinition(problem);
    EXPECT_EQ(problem.Run().token_scale, std::vector<uint32_t>(20, FloatBits(scale)), scale);
  }
  // Beyond its bounds.
  for (float scale : {0x1p101f, kInf}) {
    problem.static_scale = scale;
    ExpectDefinition(problem);
    EXPECT_EQ(problem.Run().token_scale, std::vector<uint32_t>(20, FloatBits(0x1p100f)), scale);
  }
  for (float scale : {0x1p-101f, std::numeric_limits<float>::denorm_min(), 0.0f, -1.0f}) {
    problem.static_scale = scale;
    ExpectDefinition(problem);
    EXPECT_EQ(problem.Run().token_scale, std::vector<uint32_t>(20, FloatBits(0x1p-100f)), scale);
  }
}

TEST(ZeroToken) {
  Problem problem = Random(3, 48);
  for (int64_t i = 0; i < 48; ++i) problem.SetX(1, i, i % 2 == 0 ? 0.0f : -0.0f);
  ExpectDefinition(problem);
  const Outputs outputs = problem.Run();
  EXPECT_EQ(FloatFromBits(outputs.token_scale[1]), 1.0f);
  for (int64_t b = 3; b < 6; ++b) EXPECT_EQ(outputs.block_scale[b], 0x38, b);  // 1.0
  for (int64_t i = 24; i < 48; ++i) EXPECT_EQ(outputs.code[i], 0x80, i);       // +0, -0
}

TEST(ZeroBlock) {
  Problem problem = Random(3, 48);
  for (int64_t i = 16; i < 32; ++i) problem.SetX(1, i, 0);
  ExpectDefinition(problem);
  const Outputs outputs = problem.Run();
  EXPECT_EQ(outputs.block_scale[4], 0x38);
  for (int64_t i = 32; i < 40; ++i) EXPECT_EQ(outputs.code[i], 0, i);
}

// Outputs of every token but one.
void ExpectOtherTokens(const Problem& changed, const Problem& original, int64_t token) {
  const int64_t blocks = changed.d / kBlock;
  Outputs got = changed.Run();
  const Outputs expected = original.Run();
  const auto replace = [token](auto& to, const auto& from, int64_t width) {
    std::copy_n(from.begin() + token * width, width, to.begin() + token * width);
  };
  replace(got.code, expected.code, changed.d / 2);
  replace(got.block_scale, expected.block_scale, blocks);
  replace(got.token_scale, expected.token_scale, 1);
  ExpectEqual(got, expected, "tokens beside the changed one");
}

TEST(NanToken) {
  const Problem original = Random(3, 528);
  for (float nan : {kNan, -kNan}) {
    Problem problem = Random(3, 528);
    problem.x[528 + 100] = FloatBits(nan) >> 16;
    ExpectDefinition(problem);
    ExpectOtherTokens(problem, original, 1);
    const Outputs outputs = problem.Run();
    EXPECT_EQ(outputs.token_scale[1], 0x7FC00000u);
    for (int64_t b = 33; b < 66; ++b) EXPECT_EQ(outputs.block_scale[b], 0x7F, b);
  }
}

TEST(NanWeight) {
  Problem problem = Random(3, 48);
  problem.weight[20] = 0x7FC1;
  ExpectDefinition(problem);
  const Outputs outputs = problem.Run();
  for (int64_t t = 0; t < 3; ++t) EXPECT_EQ(outputs.token_scale[t], 0x7FC00000u, t);
}

// The norm of an infinite token is zero, and Inf * 0 is NaN.
TEST(InfiniteToken) {
  const Problem original = Random(3, 528);
  for (float inf : {kInf, -kInf}) {
    Problem problem = Random(3, 528);
    problem.SetX(1, 100, inf);
    ExpectDefinition(problem);
    ExpectOtherTokens(problem, original, 1);
    const Outputs outputs = problem.Run();
    EXPECT_EQ(outputs.token_scale[1], 0x7FC00000u);
    for (int64_t b = 0; b < 33; ++b) {
      EXPECT_EQ(outputs.block_scale[33 + b], b == 100 / kBlock ? 0x7F : 0x38, b);
    }
  }
}

// y beyond BF16 is Inf; the scales are those of the largest finite number, the code is 6.
TEST(OverflowInTheNorm) {
  Problem problem = Random(20, 48, 1, 2e38f);
  ExpectDefinition(problem);
  problem.has_static_scale = true;
  problem.static_scale = 1;
  ExpectDefinition(problem);

  Problem one = Random(1, 48, 1, 0);
  for (int64_t i = 0; i < 48; ++i) one.SetX(0, i, 1);
  one.SetX(0, 0, -4);
  one.SetWeight(0, 3e38f);
  ExpectDefinition(one, 1);
  const Outputs outputs = one.Run();
  EXPECT_EQ(FloatFromBits(outputs.token_scale[0]), kFloat32Max * (1.0f / 2688.0f));
  EXPECT_EQ(DecodeE4m3(outputs.block_scale[0]), 448.0f);
  EXPECT_EQ(outputs.code[0] & 0xF, 0xF);
}

// Squares beyond FP32, where FP32 and the definition in double part: the norm is zero.
TEST(OverflowInTheSquares) {
  Problem problem = Random(2, 48);
  for (int64_t i = 0; i < 48; ++i) problem.SetX(1, i, i % 2 == 0 ? 0x1p100f : -0x1p100f);
  const Outputs outputs = problem.Run();
  EXPECT_EQ(FloatFromBits(outputs.token_scale[1]), 1.0f);
  for (int64_t i = 24; i < 48; ++i) EXPECT_EQ(outputs.code[i], 0x80, i);
}

#if defined(__x86_64__)
// XLA's threads flush subnormal numbers to zero; outputs must not depend on it.
TEST(SubnormalNumbersCount) {
  const Problem problem = Random(2, 48, 1, 0x1p-128f);
  ExpectDefinition(problem);
  const Outputs expected = problem.Run();
  EXPECT_EQ(expected.token_scale[0], FloatBits(0x1p-100f));  // 1 if all were zero
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlushSubnormal);
  const Outputs got = problem.Run();
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  ExpectEqual(got, expected, "flushing");
  EXPECT_EQ(after & kFlushSubnormal, kFlushSubnormal);  // the caller's mode is back
}
#endif

TEST(AnySplitGivesTheSameBytes) {
  constexpr int64_t kTokens = 7;
  const Problem problem = Random(kTokens, 528);
  const Outputs whole = problem.Run();
  for (int64_t first = 0; first <= kTokens; ++first) {
    for (int64_t last = first; last <= kTokens; ++last) {
      const std::string note = std::to_string(first) + ".." + std::to_string(last);
      ExpectEqual(problem.Run(0x5A, {0, first, last, kTokens}), whole, note);
      // A range alone leaves the rest as it was.
      Outputs part = problem.Run(0x5A, {first, last});
      const auto untouched = [&](const auto& values, int64_t width, auto poison) {
        for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
          const bool own = i >= first * width && i < last * width;
          if (!own) EXPECT_EQ(values[i], poison, note, i);
        }
      };
      untouched(part.code, 528 / 2, uint8_t{0x5A});
      untouched(part.block_scale, 528 / kBlock, uint8_t{0x5A});
      untouched(part.token_scale, 1, 0x5A5A5A5Au);
    }
  }
}

// Offsets are 64 bits wide (acceptance row A23), in address space that holds no memory.
TEST(OffsetsBeyond32Bits) {
  constexpr int64_t kDim = 4096, kTokens = (int64_t{1} << 33) / kDim + 5, kLast = kTokens - 1;
  const AddressSpace x(2 * kTokens * kDim), code(kTokens * kDim / 2), scales(kTokens * kDim / 16);
  const AddressSpace token_scale(4 * kTokens);
  if (!x.ok() || !code.ok() || !scales.ok() || !token_scale.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 23 GB" << std::endl;
    return;
  }
  const Problem problem = Random(1, kDim);
  std::memcpy(x.data<uint16_t>() + kLast * kDim, problem.x.data(), 2 * kDim);
  RmsnormNvfp4Params params{};
  params.x = x.data<uint16_t>();
  params.weight = problem.weight.data();
  params.code = code.data<uint8_t>();
  params.block_scale = scales.data<uint8_t>();
  params.token_scale = token_scale.data<float>();
  params.t = kTokens;
  params.d = kDim;
  params.reciprocal_d = 1.0f / kDim;
  params.eps = kEps;
  RmsnormNvfp4Cpu(params, kLast, kTokens);
  const auto last = [](const uint8_t* data, int64_t width) {
    return std::vector<uint8_t>(data + kLast * width, data + kTokens * width);
  };
  const Outputs outputs{last(params.code, kDim / 2),
                        last(params.block_scale, kDim / kBlock),
                        {FloatBits(params.token_scale[kLast])}};
  ExpectEqual(outputs, problem.Run(), "at the far end");
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
