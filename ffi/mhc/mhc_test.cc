// The CPU handler's loop against the definition (model.md 2.2-2.4) in double.
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
#include "mhc/mhc.h"
#include "mhc/mhc_weights.h"

namespace dsv4 {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kEps = 1e-6f;
constexpr int kAll = kMhcBf16 | kMhcNvfp4 | kMhcFp8;

// ---- The definition.

double Logistic(double x) { return 1 / (1 + std::exp(-x)); }

double RoundToBf16(double x) { return Bf16ToFloat(FloatToBf16(static_cast<float>(x))); }

void NormaliseColumns(double (&c)[4][4]) {
  for (int k = 0; k < 4; ++k) {
    const double sum = c[0][k] + c[1][k] + c[2][k] + c[3][k] + kEps;
    for (int j = 0; j < 4; ++j) c[j][k] /= sum;
  }
}

void ExactSinkhorn(const double* logits, int iters, double (&c)[4][4]) {
  for (int j = 0; j < 4; ++j) {
    double sum = 0;
    for (int k = 0; k < 4; ++k) sum += c[j][k] = std::exp(logits[4 * j + k]);
    for (int k = 0; k < 4; ++k) c[j][k] = c[j][k] / sum + kEps;
  }
  NormaliseColumns(c);
  for (int i = 1; i < iters; ++i) {
    for (int j = 0; j < 4; ++j) {
      const double sum = c[j][0] + c[j][1] + c[j][2] + c[j][3] + kEps;
      for (int k = 0; k < 4; ++k) c[j][k] /= sum;
    }
    NormaliseColumns(c);
  }
}

struct Outputs {
  std::vector<uint16_t> streams, x;
  std::vector<float> post, comb, token_scale;
  std::vector<uint8_t> code4, block_scale, code8, scale8;
};

template <typename T>
void ExpectSameBytes(const std::vector<T>& got, const std::vector<T>& expected,
                     const std::string& note) {
  EXPECT_EQ(got.size(), expected.size(), note);
  if (got.empty()) return;
  EXPECT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)), 0, note);
}

void ExpectEqual(const Outputs& got, const Outputs& expected, const std::string& note) {
  ExpectSameBytes(got.streams, expected.streams, note + " streams");
  ExpectSameBytes(got.x, expected.x, note + " x");
  ExpectSameBytes(got.post, expected.post, note + " post");
  ExpectSameBytes(got.comb, expected.comb, note + " comb");
  ExpectSameBytes(got.token_scale, expected.token_scale, note + " token_scale");
  ExpectSameBytes(got.code4, expected.code4, note + " code4");
  ExpectSameBytes(got.block_scale, expected.block_scale, note + " block_scale");
  ExpectSameBytes(got.code8, expected.code8, note + " code8");
  ExpectSameBytes(got.scale8, expected.scale8, note + " scale8");
}

struct Problem {
  Problem(int64_t t, int64_t d, int mixes = kMhcMixes)
      : t(t),
        d(d),
        mixes(mixes),
        streams(4 * t * d),
        branch(t * d),
        norm(d),
        post(4 * t),
        comb(16 * t),
        fn(mixes * 4 * d),
        base(mixes),
        scale(mixes == kMhcMixes ? 3 : 1) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](auto& values, float mean, float size) {
      for (int64_t i = 0; i < values.size(); ++i) values[i] = mean + size * normal(random);
    };
    const auto fill16 = [&](auto& values, float mean, float size) {
      for (int64_t i = 0; i < values.size(); ++i) {
        values[i] = FloatToBf16(mean + size * normal(random));
      }
    };
    fill16(streams, 0, 1);
    fill16(branch, 0, 1);
    fill16(norm, 1, 0.2f);
    fill(post, 1, 0.3f);
    fill(comb, 0.25f, 0.2f);
    fill(fn, 0, 1 / std::sqrt(static_cast<float>(d)));
    fill(base, 0, 1);
    fill(scale, 1, 0.1f);
  }

  // Outputs of the given ranges, one after the other, over bytes that are `poison` before.
  Outputs Run(uint8_t poison, const std::vector<int64_t>& ends, bool in_place = false) const {
    const bool branch_read = mixes == kMhcMixes;
    Guarded<uint16_t> new_streams(write ? 4 * t * d : 0), x(forms & kMhcBf16 ? t * d : 0);
    Guarded<float> next_post(branch_read ? 4 * t : 0), next_comb(branch_read ? 16 * t : 0);
    const int64_t four = forms & kMhcNvfp4 ? t * d : 0, eight = forms & kMhcFp8 ? t * d : 0;
    Guarded<uint8_t> code4(four / 2), block_scale(four / 16), code8(eight), scale8(eight / 128);
    Guarded<float> token_scale(four ? t : 0);
    new_streams.Fill(poison);
    x.Fill(poison);
    next_post.Fill(poison);
    next_comb.Fill(poison);
    code4.Fill(poison);
    block_scale.Fill(poison);
    token_scale.Fill(poison);
    code8.Fill(poison);
    scale8.Fill(poison);
    MhcParams p{};
    p.streams = streams.data();
    if (write) {
      if (in_place) {
        std::memcpy(new_streams.data(), streams.data(), 2 * streams.size());
        p.streams = new_streams.data();
      }
      p.branch = branch.data();
      p.post = post.data();
      p.comb = comb.data();
      p.new_streams = new_streams.data();
    }
    p.fn = read ? fn.data() : nullptr;
    p.base = base.data();
    p.scale = scale.data();
    p.norm = norm.data();
    p.global_scale = has_static_scale ? &static_scale : nullptr;
    p.next_post = next_post.data();
    p.next_comb = next_comb.data();
    if (forms & kMhcBf16) p.x = x.data();
    if (four) p.code4 = code4.data();
    p.block_scale = block_scale.data();
    p.token_scale = token_scale.data();
    if (eight) p.code8 = code8.data();
    p.scale8 = scale8.data();
    p.t = t;
    p.d = d;
    p.mixes = mixes;
    p.iters = iters;
    p.hc_eps = p.rms_eps = kEps;
    p.reciprocal_d = 1.0f / static_cast<float>(d);
    p.reciprocal_flat = 1.0f / static_cast<float>(4 * d);
    for (size_t i = 0; i + 1 < ends.size(); ++i) MhcCpu(p, ends[i], ends[i + 1]);
    for (bool intact : {new_streams.Intact(), x.Intact(), next_post.Intact(), next_comb.Intact(),
                        code4.Intact(), block_scale.Intact(), token_scale.Intact(), code8.Intact(),
                        scale8.Intact(), streams.Intact(), fn.Intact(), branch.Intact()}) {
      EXPECT_EQ(intact, true);
    }
    return {new_streams.Values(), x.Values(),           next_post.Values(),
            next_comb.Values(),   token_scale.Values(), code4.Values(),
            block_scale.Values(), code8.Values(),       scale8.Values()};
  }

  // Every byte is written if what was there before makes no difference.
  Outputs Run() const {
    const Outputs outputs = Run(0x5A, {0, t});
    ExpectEqual(Run(0xA5, {0, t}), outputs, "unwritten bytes:");
    return outputs;
  }

  int64_t t, d;
  int mixes, iters = 20, forms = kAll;
  bool write = true, read = true, has_static_scale = false;
  float static_scale = 0.0023f;
  Guarded<uint16_t> streams, branch, norm;
  Guarded<float> post, comb, fn, base, scale;
};

// Streams within a BF16 step, weights within 1e-5, x within a step of y and one of its own, the
// formats within half a step of x.
void ExpectDefinition(const Problem& problem) {
  const Outputs got = problem.Run();
  const int64_t d = problem.d;
  for (int64_t t = 0; t < problem.t; ++t) {
    std::vector<double> s(4 * d);
    for (int64_t i = 0; i < 4 * d; ++i) s[i] = Bf16ToFloat(problem.streams[t * 4 * d + i]);
    if (problem.write) {
      for (int k = 0; k < 4; ++k) {
        for (int64_t c = 0; c < d; ++c) {
          const double f = Bf16ToFloat(problem.branch[t * d + c]);
          double sum = problem.post[4 * t + k] * f, size = std::fabs(sum);
          for (int j = 0; j < 4; ++j) {
            const double term =
                problem.comb[16 * t + 4 * j + k] *
                static_cast<double>(Bf16ToFloat(problem.streams[(4 * t + j) * d + c]));
            sum += term;
            size += std::fabs(term);
          }
          s[k * d + c] = Bf16ToFloat(got.streams[(4 * t + k) * d + c]);
          const double slack = std::fabs(sum) * 0x1p-8 + size * 0x1p-22;
          EXPECT_EQ(std::fabs(s[k * d + c] - sum) <= slack, true, "token", t, "stream", k, "at", c);
        }
      }
    }
    if (!problem.read) continue;
    double squares = 0;
    for (double x : s) squares += x * x;
    const double r = 1 / std::sqrt(squares / static_cast<double>(4 * d) + kEps);
    double logits[kMhcMixes];
    for (int m = 0; m < problem.mixes; ++m) {
      double sum = 0;
      for (int64_t i = 0; i < 4 * d; ++i) sum += s[i] * problem.fn[m * 4 * d + i];
      logits[m] = sum * r * problem.scale[MhcScaleIndex(m)] + problem.base[m];
    }
    if (problem.mixes == kMhcMixes) {
      double comb[4][4];
      ExactSinkhorn(logits + 8, problem.iters, comb);
      for (int i = 0; i < 16; ++i) {
        const double apart = std::fabs(got.comb[16 * t + i] - comb[i / 4][i % 4]);
        EXPECT_EQ(apart < 1e-5, true, apart, "token", t, "comb", i);
      }
      for (int j = 0; j < 4; ++j) {
        const double apart = std::fabs(got.post[4 * t + j] - 2 * Logistic(logits[4 + j]));
        EXPECT_EQ(apart < 1e-5, true, apart, "token", t, "post", j);
      }
    }
    std::vector<double> y(d);
    double mean = 0;
    for (int64_t c = 0; c < d; ++c) {
      for (int j = 0; j < 4; ++j) y[c] += (Logistic(logits[j]) + kEps) * s[j * d + c];
      y[c] = RoundToBf16(y[c]);
      mean += y[c] * y[c] / static_cast<double>(d);
    }
    const double norm = 1 / std::sqrt(mean + kEps);
    for (int64_t c = 0; c < d; ++c) {
      const double want = Bf16ToFloat(problem.norm[c]) * (y[c] * norm);
      const double x = Bf16ToFloat(got.x[t * d + c]);
      const double slack = std::fabs(want) * 0x1p-7 + 1e-5;
      EXPECT_EQ(std::fabs(x - want) <= slack, true, x, want, "token", t, "x", c);
      const int64_t at = t * d + c;
      const double scale8 = std::ldexp(1.0, got.scale8[at / 128] - 127);
      const double eight = DecodeE4m3(got.code8[at]) * scale8;
      const double half8 = std::fabs(x) * 0x1p-4 + scale8 * 0x1p-10;
      EXPECT_EQ(std::fabs(eight - x) <= half8, true, eight, x, "token", t, "fp8", c);
      constexpr double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      const double step = static_cast<double>(DecodeE4m3(got.block_scale[at / 16])) *
                          static_cast<double>(got.token_scale[t]);
      const int nibble = got.code4[at / 2] >> (at % 2 * 4) & 0xF;
      const double four = (nibble & 8 ? -1 : 1) * kValues[nibble & 7] * step;
      // A scale that was rounded down saturates.
      const double half4 = std::max({0.25 * step, std::fabs(x) / 4.9, std::fabs(x) - 6 * step});
      EXPECT_EQ(std::fabs(four - x) <= half4 * 1.0001, true, four, x, "token", t, "nvfp4", c);
    }
  }
}

// ---- Tests.

TEST(AnyWidth) {
  ExpectDefinition(Problem(5, 128));
  ExpectDefinition(Problem(3, 384));
  ExpectDefinition(Problem(2, 4096));
  ExpectDefinition(Problem(1, 4224));  // a second group of one tile
  ExpectDefinition(Problem(1, 16384));
}

TEST(Parts) {
  for (int mixes : {kMhcMixes, kMhcHeadMixes}) {
    Problem problem(3, 256, mixes);
    ExpectDefinition(problem);
    problem.write = false;
    ExpectDefinition(problem);
  }
  Problem problem(3, 256);
  problem.read = false;
  problem.forms = 0;
  problem.mixes = 0;
  ExpectDefinition(problem);
}

TEST(StaticScale) {
  Problem problem(3, 256);
  problem.has_static_scale = true;
  ExpectDefinition(problem);
  EXPECT_EQ(problem.Run().token_scale, std::vector<float>(3, problem.static_scale));
}

TEST(FewIterations) {
  for (int iters : {1, 2, 3}) {
    Problem problem(3, 128);
    problem.iters = iters;
    ExpectDefinition(problem);
  }
}

TEST(NoToken) { ExpectDefinition(Problem(0, 128)); }

TEST(InPlace) {
  const Problem problem(3, 384);
  ExpectEqual(problem.Run(0x5A, {0, 3}, true), problem.Run(), "in place:");
}

TEST(FormsDoNotMatterToEachOther) {
  Problem problem(3, 256);
  const Outputs all = problem.Run();
  problem.forms = kMhcNvfp4;
  const Outputs four = problem.Run();
  ExpectSameBytes(four.code4, all.code4, "code4");
  ExpectSameBytes(four.comb, all.comb, "comb");
  problem.forms = kMhcFp8;
  ExpectSameBytes(problem.Run().code8, all.code8, "code8");
}

TEST(SinkhornOfExtremes) {
  for (float size : {0.0f, 1.0f, 80.0f, 1e30f}) {
    float c[16];
    for (int i = 0; i < 16; ++i) c[i] = size * static_cast<float>(i * 7 % 16 - 8) / 8;
    Sinkhorn(c, 20, kEps);
    for (int k = 0; k < 4; ++k) {
      const float sum = c[k] + c[4 + k] + c[8 + k] + c[12 + k];
      EXPECT_EQ(std::fabs(sum - 1) < 1e-4f, true, sum, "size", size);
    }
  }
  float c[16] = {};
  c[5] = kNan;
  Sinkhorn(c, 20, kEps);
  for (float x : c) EXPECT_EQ(std::isnan(x), true);
}

// Outputs of every token but one.
TEST(BadTokensStayAlone) {
  constexpr int64_t kDim = 256;
  const Outputs clean = Problem(3, kDim).Run();
  for (float bad : {kNan, kInf, -kInf, 3e38f}) {
    Problem problem(3, kDim);
    problem.streams[4 * kDim + 100] = FloatToBf16(bad);
    Outputs got = problem.Run();
    const auto replace = [](auto& to, const auto& from) {
      const auto width = static_cast<int64_t>(to.size()) / 3;
      std::copy_n(from.begin() + width, width, to.begin() + width);
    };
    replace(got.streams, clean.streams);
    replace(got.x, clean.x);
    replace(got.post, clean.post);
    replace(got.comb, clean.comb);
    replace(got.token_scale, clean.token_scale);
    replace(got.code4, clean.code4);
    replace(got.block_scale, clean.block_scale);
    replace(got.code8, clean.code8);
    replace(got.scale8, clean.scale8);
    ExpectEqual(got, clean, "beside the bad one:");
  }
}

TEST(ZeroToken) {
  Problem problem(2, 128);
  for (int64_t i = 0; i < 4 * 128; ++i) problem.streams[i] = 0;
  for (int64_t i = 0; i < 128; ++i) problem.branch[i] = 0;
  ExpectDefinition(problem);
  const Outputs outputs = problem.Run();
  EXPECT_EQ(outputs.token_scale[0], 1.0f);
  EXPECT_EQ(outputs.scale8[0], uint8_t{127 - 22});
  for (int i = 0; i < 64; ++i) EXPECT_EQ(outputs.code4[i] & 0x77, 0, i);
}

#if defined(__x86_64__)
// XLA's threads flush subnormal numbers to zero; outputs must not depend on it.
TEST(SubnormalNumbersCount) {
  Problem problem(2, 128);
  for (int64_t i = 0; i < problem.streams.size(); ++i) {
    problem.streams[i] = static_cast<uint16_t>(problem.streams[i] & 0x807F);
    problem.branch[i % 256] = 0;
  }
  const Outputs expected = problem.Run();
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040u);
  const Outputs got = problem.Run();
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  ExpectEqual(got, expected, "flushing:");
  EXPECT_EQ(after & 0x8040u, 0x8040u);  // the caller's mode is back
}
#endif

TEST(AnySplitGivesTheSameBytes) {
  constexpr int64_t kTokens = 5;
  const Problem problem(kTokens, 256);
  const Outputs whole = problem.Run();
  for (int64_t first = 0; first <= kTokens; ++first) {
    for (int64_t last = first; last <= kTokens; ++last) {
      const std::string note = std::to_string(first) + ".." + std::to_string(last) + ":";
      ExpectEqual(problem.Run(0x5A, {0, first, last, kTokens}), whole, note);
    }
  }
}

// Offsets are 64 bits wide (acceptance row A23), in address space that holds no memory.
TEST(OffsetsBeyond32Bits) {
  constexpr int64_t kDim = 4096, kTokens = (int64_t{1} << 33) / kDim / 4 + 3, kLast = kTokens - 1;
  const AddressSpace streams(8 * kTokens * kDim), branch(2 * kTokens * kDim);
  const AddressSpace post(16 * kTokens), comb(64 * kTokens), x(2 * kTokens * kDim);
  if (!streams.ok() || !branch.ok() || !post.ok() || !comb.ok() || !x.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 26 GB" << std::endl;
    return;
  }
  Problem problem(1, kDim);
  problem.forms = kMhcBf16;
  std::memcpy(streams.data<uint16_t>() + 4 * kLast * kDim, problem.streams.data(), 8 * kDim);
  std::memcpy(branch.data<uint16_t>() + kLast * kDim, problem.branch.data(), 2 * kDim);
  std::memcpy(post.data<float>() + 4 * kLast, problem.post.data(), 16);
  std::memcpy(comb.data<float>() + 16 * kLast, problem.comb.data(), 64);
  MhcParams p{};
  p.streams = p.new_streams = streams.data<uint16_t>();
  p.branch = branch.data<uint16_t>();
  p.post = p.next_post = post.data<float>();
  p.comb = p.next_comb = comb.data<float>();
  p.fn = problem.fn.data();
  p.base = problem.base.data();
  p.scale = problem.scale.data();
  p.norm = problem.norm.data();
  p.x = x.data<uint16_t>();
  p.t = kTokens;
  p.d = kDim;
  p.mixes = kMhcMixes;
  p.iters = 20;
  p.hc_eps = p.rms_eps = kEps;
  p.reciprocal_d = 1.0f / kDim;
  p.reciprocal_flat = 1.0f / (4 * kDim);
  MhcCpu(p, kLast, kTokens);
  const Outputs want = problem.Run();
  const auto last = [](const auto* data, int64_t width) {
    return std::vector(data + kLast * width, data + kTokens * width);
  };
  ExpectSameBytes(last(p.new_streams, 4 * kDim), want.streams, "streams");
  ExpectSameBytes(last(p.next_post, 4), want.post, "post");
  ExpectSameBytes(last(p.next_comb, 16), want.comb, "comb");
  ExpectSameBytes(last(p.x, kDim), want.x, "x");
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
