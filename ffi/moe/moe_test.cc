// The CPU handler against the definition token by token, with sums in double; decoding and rounding
// of operands are those of common/dot.h, which has its own tests.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/bits.h"
#include "common/dot.h"
#include "common/testing.h"
#include "moe/moe.h"

namespace dsv4 {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Kind {
  WeightForm form;
  ActForm act;
  const char* name;
};

const std::vector<Kind> kKinds = {
    {WeightForm::kMxfp4, ActForm::kFp8, "mxfp4_w4a8"},
    {WeightForm::kMxfp4, ActForm::kBf16, "mxfp4_w4a16"},
    {WeightForm::kNvfp4, ActForm::kNvfp4, "nvfp4_w4a4"},
    {WeightForm::kNvfp4, ActForm::kFp8, "nvfp4_w4a8"},
    {WeightForm::kNvfp4, ActForm::kBf16, "nvfp4_w4a16"},
};

// All in one, in one thread.
void Whole(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 0) body(0, count);
}

// One by one, the last first.
void Backwards(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = count - 1; i >= 0; --i) body(i, i + 1);
}

// On three threads at once.
void Threads(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] { body(count * i / 3, count * (i + 1) / 3); });
  }
  for (std::thread& thread : threads) thread.join();
}

// One stack of weights in random codes and moderate scales.
struct Stack {
  Stack(WeightForm form, int64_t experts, int64_t rows, int64_t inputs, uint32_t seed)
      : weight(experts * rows * inputs / 2),
        scale(experts * rows * inputs / (form == WeightForm::kMxfp4 ? 32 : 16)),
        global_scale(experts) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<uint8_t>(random());
    for (int64_t i = 0; i < scale.size(); ++i) {
      scale[i] = static_cast<uint8_t>(form == WeightForm::kMxfp4 ? 122 + random() % 4  // 2^-5..
                                                                 : 0x20 + random() % 24);
    }
    for (int64_t e = 0; e < experts; ++e) {
      global_scale[e] = 0.1f + 0.01f * static_cast<float>(random() % 16);
    }
    is_nvfp4 = form == WeightForm::kNvfp4;
  }

  // From expert `first` on.
  ExpertWeights Weights(int64_t first = 0) const {
    const int64_t all = global_scale.size();
    return {weight.data() + weight.size() / all * first, scale.data() + scale.size() / all * first,
            is_nvfp4 ? global_scale.data() + first : nullptr};
  }

  bool is_nvfp4;
  Guarded<uint8_t> weight, scale;
  Guarded<float> global_scale;
};

struct Problem {
  Problem(Kind kind, int64_t t, int64_t k, int64_t experts, int64_t d, int64_t inter)
      : kind(kind),
        t(t),
        k(k),
        experts(experts),
        d(d),
        inter(inter),
        x(t * d),
        shared(t * d),
        idx(t * k),
        weight(t * k),
        valid(t),
        up_act_scale(experts),
        down_act_scale(experts),
        w1(kind.form, experts, inter, d, 1),
        w2(kind.form, experts, d, inter, 2),
        w3(kind.form, experts, inter, d, 3) {
    for (int64_t e = 0; e < experts; ++e) {
      up_act_scale[e] = 0.0011f * static_cast<float>(1 + e % 7);
      down_act_scale[e] = 0.0023f / static_cast<float>(1 + e % 5);
    }
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < t * d; ++i) x[i] = FloatToBf16(normal(random));
    for (int64_t i = 0; i < t * d; ++i) shared[i] = FloatToBf16(normal(random));
    for (int64_t token = 0; token < t; ++token) {
      valid[token] = 1;
      for (int64_t i = 0; i < k; ++i) {
        idx[token * k + i] = static_cast<int32_t>(random() % experts);
        weight[token * k + i] = 0.1f + 0.01f * static_cast<float>(random() % 100);
      }
      std::sort(idx.data() + token * k, idx.data() + (token + 1) * k);
    }
  }

  MoeParams Params() const {
    MoeParams params{};
    params.x = x.data();
    params.expert_idx = idx.data();
    params.expert_weight = weight.data();
    params.valid = valid.data();
    params.shared = has_shared ? shared.data() : nullptr;
    params.up_act_scale = has_act_scales ? up_act_scale.data() : nullptr;
    params.down_act_scale = has_act_scales ? down_act_scale.data() : nullptr;
    params.w1 = w1.Weights();
    params.w2 = w2.Weights();
    params.w3 = w3.Weights();
    params.t = t;
    params.k = k;
    params.experts = experts;
    params.d = d;
    params.inter = inter;
    params.limit = limit;
    params.first_expert = first_expert;
    params.y_bf16 = y_bf16;
    params.form = kind.form;
    params.act = kind.act;
    return params;
  }

  // Bits of y, of BF16 too.
  std::vector<uint32_t> Run(MoeParams params, const ParallelLoop& loop, uint8_t poison) const {
    Guarded<float> wide(y_bf16 ? 0 : t * d);
    Guarded<uint16_t> narrow(y_bf16 ? t * d : 0);
    wide.Fill(poison);
    narrow.Fill(poison);
    params.y = y_bf16 ? static_cast<void*>(narrow.data()) : wide.data();
    MoeCpu(params, loop);
    EXPECT_EQ(wide.Intact() && narrow.Intact(), true);
    for (const Stack* stack : {&w1, &w2, &w3}) {
      EXPECT_EQ(stack->weight.Intact() && stack->scale.Intact() && stack->global_scale.Intact(),
                true);
    }
    EXPECT_EQ(up_act_scale.Intact() && down_act_scale.Intact(), true);
    EXPECT_EQ(x.Intact() && shared.Intact() && idx.Intact() && weight.Intact() && valid.Intact(),
              true);
    std::vector<uint32_t> bits(t * d);
    for (int64_t i = 0; i < t * d; ++i) bits[i] = y_bf16 ? narrow[i] : FloatBits(wide[i]);
    return bits;
  }

  std::vector<uint32_t> Run() const {
    const std::vector<uint32_t> bits = Run(Params(), Whole, 0x5A);
    EXPECT_EQ(Run(Params(), Whole, 0xA5), bits, kind.name, "unwritten bytes");
    return bits;
  }

  // The same problem of some of its tokens.
  Problem Part(int64_t first, int64_t last) const {
    Problem part(kind, last - first, k, experts, d, inter);
    const auto copy = [&](const auto& from, auto& to, int64_t width) {
      std::copy_n(from.data() + first * width, (last - first) * width, to.data());
    };
    copy(x, part.x, d);
    copy(shared, part.shared, d);
    copy(idx, part.idx, k);
    copy(weight, part.weight, k);
    copy(valid, part.valid, 1);
    part.has_shared = has_shared;
    part.has_act_scales = has_act_scales;
    for (int64_t e = 0; e < experts; ++e) {
      part.up_act_scale[e] = up_act_scale[e];
      part.down_act_scale[e] = down_act_scale[e];
    }
    part.y_bf16 = y_bf16;
    part.first_expert = first_expert;
    return part;
  }

  Kind kind;
  int64_t t, k, experts, d, inter;
  int64_t first_expert = 0;
  float limit = 10;
  bool has_shared = false, has_act_scales = false, y_bf16 = false;
  Guarded<uint16_t> x, shared;
  Guarded<int32_t> idx;
  Guarded<float> weight;
  Guarded<uint8_t> valid;
  Guarded<float> up_act_scale, down_act_scale;
  Stack w1, w2, w3;
};

float Rounded(double x) { return Bf16ToFloat(FloatToBf16(static_cast<float>(x))); }

// scale * W[expert] . act(x), the sums in double.
std::vector<double> Product(const Problem& problem, const Stack& stack, int64_t expert,
                            int64_t rows, const std::vector<float>& x,
                            const Guarded<float>& act_scale) {
  const auto inputs = static_cast<int64_t>(x.size());
  std::vector<float> act(PaddedInputs(inputs)), row(PaddedInputs(inputs));
  const float token_scale =
      RoundActivations(problem.kind.act, x.data(), inputs,
                       problem.has_act_scales ? act_scale.data() + expert : nullptr, act.data());
  const double scale = stack.is_nvfp4 ? stack.global_scale[expert] : 1.0;
  std::vector<double> y(rows);
  for (int64_t r = 0; r < rows; ++r) {
    DecodeWeights(problem.kind.form, stack.weight.data(), stack.scale.data(), inputs,
                  expert * rows + r, 0, inputs, row.data());
    double sum = 0;
    for (int64_t i = 0; i < inputs; ++i) sum += static_cast<double>(row[i]) * act[i];
    y[r] = sum * scale * token_scale;
  }
  return y;
}

void ExpectDefinition(const Problem& problem) {
  const std::vector<uint32_t> got = problem.Run();
  double error = 0, size = 0;
  for (int64_t token = 0; token < problem.t; ++token) {
    std::vector<double> total(problem.d);
    std::vector<float> x(problem.d);
    for (int64_t c = 0; c < problem.d; ++c) x[c] = Bf16ToFloat(problem.x[token * problem.d + c]);
    for (int64_t i = 0; i < problem.k; ++i) {
      const int64_t e = problem.idx[token * problem.k + i] - problem.first_expert;
      if (problem.valid[token] == 0 || e < 0 || e >= problem.experts) continue;
      const std::vector<double> gate =
          Product(problem, problem.w1, e, problem.inter, x, problem.up_act_scale);
      const std::vector<double> up =
          Product(problem, problem.w3, e, problem.inter, x, problem.up_act_scale);
      std::vector<float> h(problem.inter);
      for (int64_t c = 0; c < problem.inter; ++c) {
        const double g = std::min<double>(Rounded(gate[c]), problem.limit);
        const double u = std::clamp<double>(Rounded(up[c]), -problem.limit, problem.limit);
        h[c] = Rounded(problem.weight[token * problem.k + i] * (g / (1 + std::exp(-g)) * u));
      }
      const std::vector<double> y =
          Product(problem, problem.w2, e, problem.d, h, problem.down_act_scale);
      for (int64_t c = 0; c < problem.d; ++c) total[c] += Rounded(y[c]);
    }
    for (int64_t c = 0; c < problem.d; ++c) {
      const int64_t at = token * problem.d + c;
      if (problem.has_shared) total[c] += Bf16ToFloat(problem.shared[at]);
      const float value =
          problem.y_bf16 ? Bf16ToFloat(static_cast<uint16_t>(got[at])) : FloatFromBits(got[at]);
      const double want = problem.y_bf16 ? Rounded(total[c]) : total[c];
      error += (value - want) * (value - want);
      size += want * want;
    }
  }
  // Values that FP32 and double round to different sides of a tie: up to 1e-5 measured. Without a
  // rounding point it is 1e-3 and more.
  error = size > 0 ? std::sqrt(error / size) : error;
  EXPECT_EQ(error <= 1e-4, true, problem.kind.name, error);
}

TEST(SwigluAgainstDouble) {
  for (int i = -4000; i <= 4000; ++i) {
    const float gate = 0.01f * static_cast<float>(i), up = 0.37f * gate - 1;
    const double g = std::min<double>(gate, 10), u = std::clamp<double>(up, -10, 10);
    const double want = g / (1 + std::exp(-g)) * u;
    EXPECT_EQ(std::fabs(ClampedSwiglu(gate, up, 10) - want) <= 5e-7 * std::fabs(want), true, gate);
  }
  EXPECT_EQ(ClampedSwiglu(kInf, kInf, 10), ClampedSwiglu(10, 10, 10));
  EXPECT_EQ(ClampedSwiglu(kInf, -kInf, 10), ClampedSwiglu(10, -10, 10));
  EXPECT_EQ(std::isnan(ClampedSwiglu(kNan, 1, 10)), true);
  EXPECT_EQ(std::isnan(ClampedSwiglu(1, kNan, 10)), true);
  EXPECT_EQ(ClampedSwiglu(-200, 1, 10), 0.0f);
  // A sigmoid that is no normal number is 0.
  EXPECT_EQ(ClampedSwiglu(-87.5f, 1, 10), 0.0f);
  EXPECT_EQ(ClampedSwiglu(-87.25f, 1, 10) < 0.0f, true);
  EXPECT_EQ(std::isnan(ClampedSwiglu(-kInf, 1, 10)), true);
}

TEST(AnyFormat) {
  for (const Kind& kind : kKinds) {
    ExpectDefinition(Problem(kind, 21, 3, 5, 96, 64));
    ExpectDefinition(Problem(kind, 5, 2, 3, 160, 288));  // a last block of 32 of FP8's 128
    ExpectDefinition(Problem(kind, 1, 2, 4, 256, 128));
    ExpectDefinition(Problem(kind, 70, 2, 2, 32, 32));  // several tiles of tokens
    ExpectDefinition(Problem(kind, 0, 2, 2, 32, 32));
    if (kind.form == WeightForm::kNvfp4) ExpectDefinition(Problem(kind, 9, 2, 3, 80, 16));
  }
}

TEST(SharedAndRounding) {
  for (const Kind& kind : kKinds) {
    Problem problem(kind, 21, 3, 5, 96, 64);
    const std::vector<uint32_t> routed = problem.Run();
    problem.has_shared = true;
    const std::vector<uint32_t> both = problem.Run();
    problem.y_bf16 = true;
    ExpectDefinition(problem);
    const std::vector<uint32_t> rounded = problem.Run();
    for (size_t i = 0; i < both.size(); ++i) {
      const float sum = FloatFromBits(routed[i]) + Bf16ToFloat(problem.shared[i]);
      EXPECT_EQ(both[i], FloatBits(sum), kind.name, i);
      EXPECT_EQ(rounded[i], FloatToBf16(sum), kind.name, i);
    }
  }
}

// An expert's scales are those of the tokens that go to it, whatever else these go to.
TEST(StaticScales) {
  const Kind kind = kKinds[2];
  Problem problem(kind, 40, 3, 5, 96, 64);
  const std::vector<uint32_t> own = problem.Run();
  problem.has_act_scales = true;
  ExpectDefinition(problem);
  const std::vector<uint32_t> whole = problem.Run();
  for (int64_t token = 0; token < 40; ++token) {
    const auto at = static_cast<std::ptrdiff_t>(token * 96);
    EXPECT_EQ(std::equal(own.begin() + at, own.begin() + at + 96, whole.begin() + at), false);
    const std::vector<uint32_t> want(whole.begin() + at, whole.begin() + at + 96);
    EXPECT_EQ(problem.Part(token, token + 1).Run(), want, token);
  }
  EXPECT_EQ(problem.Run(problem.Params(), Threads, 0x5A), whole, "threads");
  for (float scale : {0.0f, -1.0f, 1e-45f}) {  // as kMinGlobalScale
    problem.up_act_scale[3] = problem.down_act_scale[1] = 0x1p-100f;
    const std::vector<uint32_t> clamped = problem.Run();
    problem.up_act_scale[3] = problem.down_act_scale[1] = scale;
    EXPECT_EQ(problem.Run(), clamped, scale);
  }
}

TEST(NanUnderStaticScales) {
  Problem problem(kKinds[2], 21, 3, 5, 96, 64);
  problem.has_act_scales = true;
  for (int64_t i = 0; i < 96; ++i) problem.x[7 * 96 + i] = 0;
  const std::vector<uint32_t> clean = problem.Run();
  for (int64_t i = 0; i < 96; ++i) EXPECT_EQ(clean[7 * 96 + i], 0u, i);
  problem.x[4 * 96 + 17] = FloatToBf16(kNan);
  problem.weight[9 * 3 + 1] = kNan;
  const std::vector<uint32_t> got = problem.Run();
  for (int64_t i = 0; i < 21 * 96; ++i) {
    if (i / 96 == 4 || i / 96 == 9) {
      EXPECT_EQ(std::isnan(FloatFromBits(got[i])), true, i);
    } else {
      EXPECT_EQ(got[i], clean[i], i);
    }
  }
}

TEST(AnySplitGivesTheSameBytes) {
  for (const Kind& kind : kKinds) {
    const Problem problem(kind, 40, 3, 5, 160, 64);
    const std::vector<uint32_t> whole = problem.Run();
    EXPECT_EQ(problem.Run(problem.Params(), Backwards, 0x5A), whole, kind.name, "backwards");
    EXPECT_EQ(problem.Run(problem.Params(), Threads, 0x5A), whole, kind.name, "threads");
  }
}

TEST(ATokenIsTheSameInAnyCall) {
  for (const Kind& kind : kKinds) {
    const Problem problem(kind, 40, 3, 5, 96, 64);
    const std::vector<uint32_t> whole = problem.Run();
    for (int64_t size : {1, 2, 3, 5, 33}) {
      for (int64_t first = 0; first + size <= 40; first += 7) {
        const std::vector<uint32_t> want(whole.begin() + first * 96,
                                         whole.begin() + (first + size) * 96);
        EXPECT_EQ(problem.Part(first, first + size).Run(), want, kind.name, first, size);
      }
    }
  }
}

// More tokens than a chunk of the work area holds.
TEST(ManyTokens) {
  const Problem problem(kKinds[2], 200'000, 2, 3, 16, 16);
  const std::vector<uint32_t> whole = problem.Run(problem.Params(), Whole, 0x5A);
  const int64_t size = 3000;
  for (int64_t first : {int64_t{0}, int64_t{100'000}, int64_t{174'000}, problem.t - size}) {
    const std::vector<uint32_t> want(whole.begin() + first * 16,
                                     whole.begin() + (first + size) * 16);
    EXPECT_EQ(problem.Part(first, first + size).Run(), want, first);
  }
}

// B13.
TEST(AnyRouting) {
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  const std::vector<std::vector<int32_t>> routings = {
      {2, 2, 2}, {0, 2, 4}, {-1, 2, 4}, {1, 2, 5}, {1, 2, kMax}, {kMin, kMin, kMin}, {0, 0, 4}};
  for (const std::vector<int32_t>& routing : routings) {
    Problem problem(kKinds[0], 21, 3, 5, 96, 64);
    for (int64_t i = 0; i < 63; ++i) problem.idx[i] = routing[i % 3];
    ExpectDefinition(problem);
    if (routing[0] == kMin) EXPECT_EQ(problem.Run(), std::vector<uint32_t>(21 * 96));
    problem.first_expert = kMax - 5;  // and kMin - first_expert is no int32
    EXPECT_EQ(problem.Run(), std::vector<uint32_t>(21 * 96));
  }
}

// Halves of the experts: a token whose picks are in one half has the bits of the whole.
TEST(FirstExpert) {
  for (const Kind& kind : kKinds) {
    Problem problem(kind, 30, 3, 6, 96, 64);
    for (int64_t i = 0; i < 30 * 3; ++i) {
      const int64_t token = i / 3;
      if (token % 3 < 2) problem.idx[i] = static_cast<int32_t>(problem.idx[i] % 3 + token % 3 * 3);
      if (i % 3 == 2) std::sort(problem.idx.data() + i - 2, problem.idx.data() + i + 1);
    }
    const std::vector<uint32_t> whole = problem.Run();
    std::vector<uint32_t> halves[2];
    for (int64_t half : {0, 1}) {
      MoeParams params = problem.Params();
      params.experts = 3;
      params.first_expert = 3 * half;
      params.w1 = problem.w1.Weights(3 * half);
      params.w2 = problem.w2.Weights(3 * half);
      params.w3 = problem.w3.Weights(3 * half);
      halves[half] = problem.Run(params, Whole, 0x5A);
    }
    for (int64_t i = 0; i < 30 * 96; ++i) {
      const float sum = FloatFromBits(halves[0][i]) + FloatFromBits(halves[1][i]);
      const float want = FloatFromBits(whole[i]);
      if (i / 96 % 3 < 2) {
        EXPECT_EQ(FloatBits(sum), whole[i], kind.name, i);
      } else {  // three terms in two orders
        EXPECT_EQ(std::fabs(sum - want) <= 1e-5f * (1 + std::fabs(want)), true, kind.name, i);
      }
    }
  }
}

TEST(PaddingTouchesNothing) {
  for (const Kind& kind : kKinds) {
    Problem problem(kind, 21, 3, 5, 96, 64);
    for (int64_t token = 0; token < 21; token += 2) problem.valid[token] = 0;
    ExpectDefinition(problem);
    const std::vector<uint32_t> clean = problem.Run();
    for (int64_t token = 0; token < 21; token += 2) {
      problem.x[token * 96 + 5] = FloatToBf16(kNan);
      problem.idx[token * 3] = 77;
      problem.weight[token * 3 + 1] = kInf;
    }
    EXPECT_EQ(problem.Run(), clean, kind.name);
    for (int64_t i = 0; i < 96; ++i) EXPECT_EQ(clean[i], 0u, i);
  }
}

TEST(NanStaysInItsToken) {
  for (const Kind& kind : kKinds) {
    Problem problem(kind, 21, 3, 5, 96, 64);
    const std::vector<uint32_t> clean = problem.Run();
    problem.x[4 * 96 + 17] = FloatToBf16(kNan);
    problem.weight[9 * 3 + 1] = kNan;
    const std::vector<uint32_t> got = problem.Run();
    for (int64_t i = 0; i < 21 * 96; ++i) {
      if (i / 96 == 4 || i / 96 == 9) {
        EXPECT_EQ(std::isnan(FloatFromBits(got[i])), true, kind.name, i);
      } else {
        EXPECT_EQ(got[i], clean[i], kind.name, i);
      }
    }
  }
}

#if defined(__x86_64__)
// XLA's threads flush subnormal numbers to zero; results must not depend on it.
TEST(SubnormalNumbersCount) {
  constexpr unsigned kFlush = 0x8040;  // of results and of operands, in MXCSR
  Problem problem(kKinds[1], 5, 2, 3, 32, 32);
  for (int64_t i = 0; i < problem.w2.scale.size(); ++i) problem.w2.scale[i] = 0;  // 2^-127
  const std::vector<uint32_t> expected = problem.Run();
  EXPECT_EQ(std::count(expected.begin(), expected.end(), 0u) < 100, true);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlush);
  const std::vector<uint32_t> got = problem.Run();
  const std::vector<uint32_t> cut = problem.Run(problem.Params(), Backwards, 0x5A);
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_EQ(got, expected, "flushing");
  EXPECT_EQ(cut, expected, "flushing, one by one");
  EXPECT_EQ(after & kFlush, kFlush);  // the caller's mode is back
}
#endif

// Offsets are 64 bits wide (acceptance row A23): the last of many experts, in address space that
// holds no memory.
TEST(OffsetsBeyond32Bits) {
  constexpr int64_t kDim = 2048, kExperts = 2100;
  constexpr int64_t kBytes = kDim * kDim / 2, kScales = kDim * kDim / 32;
  const AddressSpace w1(kExperts * kBytes), w2(kExperts * kBytes), w3(kExperts * kBytes);
  const AddressSpace s1(kExperts * kScales), s2(kExperts * kScales), s3(kExperts * kScales);
  if (!w1.ok() || !w2.ok() || !w3.ok() || !s1.ok() || !s2.ok() || !s3.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 15 GB" << std::endl;
    return;
  }
  const Problem problem(kKinds[0], 2, 1, 1, kDim, kDim);
  const std::vector<uint32_t> want = problem.Run();
  const auto last = [](const AddressSpace& weight, const AddressSpace& scale, const Stack& from) {
    std::memcpy(weight.data<uint8_t>() + (kExperts - 1) * kBytes, from.weight.data(), kBytes);
    std::memcpy(scale.data<uint8_t>() + (kExperts - 1) * kScales, from.scale.data(), kScales);
    return ExpertWeights{weight.data<uint8_t>(), scale.data<uint8_t>(), nullptr};
  };
  const std::vector<int32_t> idx(2, kExperts - 1);
  MoeParams params = problem.Params();
  params.experts = kExperts;
  params.expert_idx = idx.data();
  params.w1 = last(w1, s1, problem.w1);
  params.w2 = last(w2, s2, problem.w2);
  params.w3 = last(w3, s3, problem.w3);
  EXPECT_EQ(problem.Run(params, Whole, 0x5A), want, "at the far end");
}

TEST(ScratchCoversEverySlot) {
  EXPECT_EQ(MoeMaxSlots(6, 256), int64_t{6 + 63 * 6});
  EXPECT_EQ(MoeMaxSlots(4096 * 6, 256), int64_t{4096 * 6 + 63 * 256});
  EXPECT_EQ(MoeMaxSlots(0, 256), int64_t{0});
  EXPECT_EQ(MoeScratchBytes(0, 6, 256, 4096, 2048), int64_t{4096});
  EXPECT_EQ(MoeScratchBytes(int64_t{1} << 24, 8, 384, 7168, 3072) > (int64_t{1} << 40), true);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
