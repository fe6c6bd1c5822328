// The CPU handler against the definition in double, and its choices against a full sort of the
// scores that it reports.
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
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "common/bits.h"
#include "common/e4m3.h"
#include "common/testing.h"
#include "index_topk/index_topk.h"
#include "index_topk/index_topk_order.h"

namespace dsv4 {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
// Of sum_h |weight| sum_c |q| |key|: a sum of 128 terms, then of 64, in FP32.
constexpr double kError = 2e-6;

using Body = std::function<void(int64_t, int64_t)>;

// All in one, in one thread.
void Whole(int64_t count, int64_t, const Body& body) {
  if (count > 0) body(0, count);
}

// One by one, the last first.
void Backwards(int64_t count, int64_t, const Body& body) {
  for (int64_t i = count - 1; i >= 0; --i) body(i, i + 1);
}

// On three threads at once.
void Threads(int64_t count, int64_t, const Body& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] { body(count * i / 3, count * (i + 1) / 3); });
  }
  for (std::thread& thread : threads) thread.join();
}

double E2m1(uint32_t code) {
  constexpr double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -kValues[code & 7] : kValues[code & 7];
}

struct Problem {
  Problem(IndexForm form, int64_t b, int64_t t, int64_t h, int64_t d, int64_t slots, int64_t topk)
      : form(form),
        b(b),
        t(t),
        h(h),
        d(d),
        slots(slots),
        topk(topk),
        q(b * t * h * Bytes()),
        q_scale(b * t * h * Scales()),
        key(b * slots * Bytes()),
        key_scale(b * slots * Scales()),
        weight(b * t * h),
        n_visible(b * t) {
    std::mt19937 random(7);
    for (Guarded<uint8_t>* codes : {&q, &key}) {
      for (int64_t i = 0; i < codes->size(); ++i) {
        const auto byte = static_cast<uint8_t>(random());
        (*codes)[i] = form == IndexForm::kFp8 ? (byte & 0x80) | (byte & 0x7F) % 0x70 : byte;
      }
    }
    for (Guarded<uint8_t>* scales : {&q_scale, &key_scale}) {
      for (int64_t i = 0; i < scales->size(); ++i) {
        (*scales)[i] = static_cast<uint8_t>(120 + random() % 5);
      }
    }
    for (int64_t i = 0; i < weight.size(); ++i) {
      weight[i] = static_cast<float>(random() % 2001) * 1e-3f - 0.5f;
    }
    for (int64_t i = 0; i < n_visible.size(); ++i) {
      n_visible[i] = static_cast<int32_t>(random() % (slots + 1));
    }
    if (b * t > 0) n_visible[b * t - 1] = static_cast<int32_t>(slots);
  }

  int64_t Bytes() const { return form == IndexForm::kFp8 ? d : d / 2; }
  int64_t Scales() const { return form == IndexForm::kFp8 ? 1 : d / 32; }

  std::vector<double> Row(const Guarded<uint8_t>& codes, const Guarded<uint8_t>& scales,
                          int64_t row) const {
    std::vector<double> values(d);
    for (int64_t c = 0; c < d; ++c) {
      const int64_t at = row * d + c;
      const double value = form == IndexForm::kFp8 ? static_cast<double>(DecodeE4m3(codes[at]))
                                                   : E2m1(codes[at / 2] >> at % 2 * 4 & 15);
      const uint8_t scale = scales[form == IndexForm::kFp8 ? row : at / 32];
      values[c] = scale == 255 ? std::nan("") : std::ldexp(value, scale - 127);
    }
    return values;
  }

  IndexTopkParams Params() const {
    IndexTopkParams params{};
    params.form = form;
    params.q = q.data();
    params.q_scale = q_scale.data();
    params.weight = weight.data();
    if (narrow_weight != nullptr) params.weight = narrow_weight;
    params.bf16_weight = narrow_weight != nullptr;
    params.weight_scale = weight_scale;
    params.key = key.data();
    params.key_scale = key_scale.data();
    params.n_visible = n_visible.data();
    params.b = b;
    params.t = t;
    params.h = h;
    params.d = d;
    params.slots = slots;
    params.topk = topk;
    return params;
  }

  struct Result {
    std::vector<int32_t> idx;  // [b, t, topk]
    std::vector<float> scores;
    bool operator==(const Result& other) const {
      return idx == other.idx && scores.size() == other.scores.size() &&
             std::equal(scores.begin(), scores.end(), other.scores.begin(),
                        [](float x, float y) { return FloatBits(x) == FloatBits(y); });
    }
  };

  Result Run(const ParallelLoop& parallel, bool with_scores = true) const {
    Guarded<int32_t> idx(b * t * topk);
    Guarded<float> scores(with_scores ? b * t * slots : 0);
    idx.Fill(0xB5);
    scores.Fill(0xB5);
    IndexTopkParams params = Params();
    params.idx = idx.data();
    params.scores = with_scores ? scores.data() : nullptr;
    IndexTopkCpu(params, parallel);
    EXPECT_EQ(idx.Intact() && scores.Intact(), true, "bounds of the results");
    EXPECT_EQ(q.Intact() && q_scale.Intact() && key.Intact() && key_scale.Intact(), true, "inputs");
    return {idx.Values(), scores.Values()};
  }

  int64_t Visible(int64_t token) const { return std::clamp<int64_t>(n_visible[token], 0, slots); }

  // What a full sort of the scores says.
  std::vector<int32_t> Sorted(const std::vector<float>& scores) const {
    std::vector<int32_t> want(b * t * topk, -1);
    for (int64_t token = 0; token < b * t; ++token) {
      const float* row = scores.data() + token * slots;
      std::vector<int32_t> ids(Visible(token));
      std::iota(ids.begin(), ids.end(), 0);
      std::stable_sort(ids.begin(), ids.end(), [row](int32_t x, int32_t y) {
        if (std::isnan(row[x]) || std::isnan(row[y])) return !std::isnan(row[x]);
        return row[x] > row[y];
      });
      ids.resize(std::min<int64_t>(topk, Visible(token)));
      std::sort(ids.begin(), ids.end());
      std::copy(ids.begin(), ids.end(), want.begin() + token * topk);
    }
    return want;
  }

  // Scores, choices, and the same bits however the work is cut, with scores or without.
  Result Check(const char* what) const {
    const Result got = Run(Whole);
    for (int64_t token = 0; token < b * t; ++token) {
      for (int64_t w = 0; w < slots; ++w) {
        const float score = got.scores[token * slots + w];
        if (w >= Visible(token)) {
          EXPECT_EQ(score, -kInf, what, token, w);
          continue;
        }
        const std::vector<double> k = Row(key, key_scale, token / t * slots + w);
        double want = 0, size = 0;
        for (int64_t head = 0; head < h; ++head) {
          const std::vector<double> each = Row(q, q_scale, token * h + head);
          double dot = 0, norm = 0;
          for (int64_t c = 0; c < d; ++c) {
            dot += each[c] * k[c];
            norm += std::abs(each[c] * k[c]);
          }
          want += static_cast<double>(weight[token * h + head]) * std::max(dot, 0.0);
          size += std::abs(static_cast<double>(weight[token * h + head])) * norm;
        }
        EXPECT_EQ(std::abs(score - want) <= kError * size, true, what, token, w, score, want);
      }
    }
    CheckChoices(got, what);
    return got;
  }

  void CheckChoices(const Result& got, const char* what) const {
    EXPECT_EQ(got.idx, Sorted(got.scores), what);
    EXPECT_EQ(Run(Backwards) == got, true, what, "one by one");
    EXPECT_EQ(Run(Threads) == got, true, what, "three threads");
    EXPECT_EQ(Run(Whole, false).idx, got.idx, what, "without scores");
    EXPECT_EQ(Run(Threads, false).idx, got.idx, what, "without scores, three threads");
  }

  // The query `token` in a call of its own.
  Problem Alone(int64_t token) const {
    Problem one(form, 1, 1, h, d, slots, topk);
    const int64_t row = token / t;
    std::memcpy(one.q.data(), &q[token * h * Bytes()], h * Bytes());
    std::memcpy(one.q_scale.data(), &q_scale[token * h * Scales()], h * Scales());
    std::memcpy(one.key.data(), &key[row * slots * Bytes()], slots * Bytes());
    std::memcpy(one.key_scale.data(), &key_scale[row * slots * Scales()], slots * Scales());
    std::copy_n(&weight[token * h], h, one.weight.data());
    one.n_visible[0] = n_visible[token];
    return one;
  }

  // Of one head: entry w scores weight * value(w) exactly, value being 2^(exponent) * {0 .. 6}.
  void SetKey(int64_t w, uint8_t code, uint8_t scale) {
    for (int64_t row = 0; row < b; ++row) {
      std::memset(&key[(row * slots + w) * Bytes()], 0, Bytes());
      key[(row * slots + w) * Bytes()] = code;
      key_scale[(row * slots + w) * Scales()] = scale;
    }
  }

  IndexForm form;
  int64_t b, t, h, d, slots, topk;
  Guarded<uint8_t> q, q_scale, key, key_scale;
  Guarded<float> weight;
  const uint16_t* narrow_weight = nullptr;  // in its place, if any
  float weight_scale = 1.0f;
  Guarded<int32_t> n_visible;
};

// Weights that are scaled, rounded to BF16 if they are that, give the bits of those themselves.
TEST(ScaledWeights) {
  constexpr float kScale = 0.011f;
  Problem problem(IndexForm::kMxfp4, 2, 2, 3, 32, 300, 20),
      scaled(IndexForm::kMxfp4, 2, 2, 3, 32, 300, 20);
  for (int64_t i = 0; i < scaled.weight.size(); ++i) scaled.weight[i] *= kScale;
  problem.weight_scale = kScale;
  EXPECT_EQ(problem.Run(Whole) == scaled.Run(Whole), true, "FP32");
  Guarded<uint16_t> narrow(problem.weight.size());
  problem.narrow_weight = narrow.data();
  for (int64_t i = 0; i < scaled.weight.size(); ++i) {
    narrow[i] = FloatToBf16(problem.weight[i]);
    const float product = Bf16ToFloat(narrow[i]) * kScale;
    scaled.weight[i] = Bf16ToFloat(FloatToBf16(product));
  }
  EXPECT_EQ(problem.Run(Whole) == scaled.Run(Threads), true, "BF16");
}

// Queries of one head that read channel 0 alone, as it is.
Problem Simple(int64_t b, int64_t t, int64_t slots, int64_t topk) {
  Problem problem(IndexForm::kMxfp4, b, t, 1, 32, slots, topk);
  problem.q.Fill(0);
  for (int64_t i = 0; i < b * t; ++i) {
    problem.q[i * 16] = 2;  // 1.0
    problem.q_scale[i] = 127;
    problem.weight[i] = 1.0f;
    problem.n_visible[i] = static_cast<int32_t>(slots);
  }
  return problem;
}

TEST(Order) {
  const float ascending[] = {kNan,   -kInf, -kFloat32Max, -1.0f,       -1e-40f, 0.0f,
                             1e-40f, 1.0f,  2.0f,         kFloat32Max, kInf};
  for (size_t i = 0; i + 1 < std::size(ascending); ++i) {
    EXPECT_EQ(ScoreOrder(ascending[i]) < ScoreOrder(ascending[i + 1]), true, i);
  }
  EXPECT_EQ(ScoreOrder(-0.0f), ScoreOrder(0.0f));
  EXPECT_EQ(ScoreOrder(-kNan), ScoreOrder(kNan));
}

TEST(AgainstDefinition) {
  for (IndexForm form : {IndexForm::kMxfp4, IndexForm::kFp8}) {
    for (int64_t t : {1, 3, 20}) {
      for (int64_t h : {1, 4, 64}) {
        Problem(form, 2, t, h, 128, 150, 40).Check("heads");
      }
    }
    for (int64_t d : {32, 96}) Problem(form, 3, 5, 3, d, 200, 64).Check("channels");
  }
  Problem(IndexForm::kFp8, 2, 3, 2, 37, 70, 9).Check("an odd number of channels");
}

TEST(EverySize) {
  for (int64_t slots : {1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513}) {
    for (int64_t topk : {1, 16, 64}) {
      for (int64_t t : {1, 9}) {
        Problem(IndexForm::kMxfp4, 1, t, 2, 32, slots, topk).Check("size");
      }
    }
  }
}

TEST(Nothing) {
  for (int64_t t : {0, 2, 12}) {
    Problem(IndexForm::kMxfp4, 2, t, 2, 32, 0, 5).Check("no entries");
    Problem(IndexForm::kMxfp4, 2, t, 2, 32, 70, 0).Check("no choice");
    Problem(IndexForm::kFp8, 2, t, 0, 32, 70, 5).Check("no heads");
  }
  Problem(IndexForm::kMxfp4, 0, 3, 2, 32, 70, 5).Check("no rows");
}

TEST(AnyCount) {
  for (int32_t n : {kMin, -1, 0, 1, 39, 40, 41, 149, 150, 151, kMax}) {
    for (int64_t t : {2, 12}) {
      Problem problem(IndexForm::kMxfp4, 2, t, 2, 32, 150, 40);
      for (int64_t i = 0; i < 2 * t; ++i) problem.n_visible[i] = n;
      problem.Check("counts");
    }
  }
}

// In a chunk, a batch or alone: the same bits.
TEST(EachQueryIsAlone) {
  for (IndexForm form : {IndexForm::kMxfp4, IndexForm::kFp8}) {
    const Problem problem(form, 3, 11, 4, 128, 700, 100);
    const Problem::Result all = problem.Run(Whole);
    for (int64_t token = 0; token < 33; ++token) {
      const Problem::Result one = problem.Alone(token).Run(Threads);
      const Problem::Result same{
          {all.idx.begin() + token * 100, all.idx.begin() + (token + 1) * 100},
          {all.scores.begin() + token * 700, all.scores.begin() + (token + 1) * 700}};
      EXPECT_EQ(one == same, true, token);
    }
  }
}

// Equal scores, runs of equal ones at the boundary, both directions, one that stands out.
TEST(Ties) {
  const struct {
    const char* what;
    std::function<uint8_t(int64_t)> scale;
  } orders[] = {
      {"all equal", [](int64_t) { return 127; }},
      {"ascending", [](int64_t w) { return 1 + w * 250 / 3000; }},
      {"descending", [](int64_t w) { return 251 - w * 250 / 3000; }},
      {"two of each", [](int64_t w) { return 1 + w % 1500 * 250 / 1500; }},
      {"one above", [](int64_t w) { return w == 2999 ? 128 : 127; }},
      {"one below", [](int64_t w) { return w == 0 ? 126 : 127; }},
  };
  for (const auto& order : orders) {
    for (int64_t t : {1, 10}) {
      for (int64_t topk : {1, 100, 2048, 2999, 3000}) {
        Problem problem = Simple(1, t, 3000, topk);
        for (int64_t w = 0; w < 3000; ++w) problem.SetKey(w, 2, order.scale(w));
        problem.CheckChoices(problem.Run(Whole), order.what);
      }
    }
  }
}

TEST(NanInfinityAndZeros) {
  for (int64_t t : {1, 10}) {
    for (float sign : {1.0f, -1.0f}) {
      Problem problem = Simple(2, t, 300, 120);
      std::mt19937 random(3);
      for (int64_t w = 0; w < 300; ++w) {
        const uint8_t scales[] = {255, 127, 254, 128};
        const uint8_t codes[] = {2, 0, 7, 8, 10};  // 1, 0, 6, -0, -1
        problem.SetKey(w, codes[random() % 5], scales[random() % 4]);
      }
      for (int64_t i = 0; i < 2 * t; ++i) problem.weight[i] = sign * 4;  // 6 * 2^127 * 4: infinite
      const Problem::Result got = problem.Run(Whole);
      const auto count = [&](auto what) {
        return std::count_if(got.scores.begin(), got.scores.end(), what) > 0;
      };
      EXPECT_EQ(count([](float x) { return std::isnan(x); }), true);
      EXPECT_EQ(count([sign](float x) { return x == sign * kInf; }), true);
      EXPECT_EQ(count([](float x) { return x == 0.0f; }), true);
      problem.CheckChoices(got, "wild");
    }
  }
}

// B9. What is not visible is not read.
TEST(PoisonBeyondTheVisible) {
  for (int64_t t : {1, 10}) {
    Problem problem(IndexForm::kFp8, 2, t, 2, 64, 300, 50);
    for (int64_t i = 0; i < 2 * t; ++i) problem.n_visible[i] = static_cast<int32_t>(130 + i % 70);
    const Problem::Result clean = problem.Run(Whole);
    for (int64_t row = 0; row < 2; ++row) {
      std::memset(&problem.key[(row * 300 + 200) * 64], 0xFF, 100 * 64);
      std::memset(&problem.key_scale[row * 300 + 200], 0xFF, 100);
    }
    EXPECT_EQ(problem.Run(Whole) == clean, true);
  }
}

TEST(ScratchHasABudget) {
  EXPECT_EQ(IndexTopkScratchBytes(0, 100), 0);
  EXPECT_EQ(IndexTopkScratchBytes(3, 0), 0);
  EXPECT_EQ(IndexTopkScratchBytes(3, 100), 3 * 4 * (100 + 8));
  const int64_t row = 4 * (262144 + 262144 / 16);
  EXPECT_EQ(IndexTopkScratchBytes(4096, 262144), kIndexTopkScratchBudget / row * row);
  EXPECT_EQ(IndexTopkScratchBytes(4096, 262143) <= kIndexTopkScratchBudget, true);
  EXPECT_EQ(IndexTopkScratchBytes(4096, int64_t{1} << 30), int64_t{4} * 17 << 26);
}

#if defined(__x86_64__)
// XLA's threads flush subnormal numbers to zero; results must not depend on it.
TEST(SubnormalNumbersCount) {
  constexpr unsigned kFlush = 0x8040;  // of results and of operands, in MXCSR
  for (int64_t t : {1, 10}) {
    Problem problem(IndexForm::kMxfp4, 1, t, 2, 32, 300, 50);
    problem.key_scale.Fill(0);  // 2^-127
    for (int64_t i = 0; i < problem.q_scale.size(); ++i) problem.q_scale[i] = 120;
    const Problem::Result expected = problem.Run(Whole);
    const auto zeros = std::count(expected.scores.begin(), expected.scores.end(), 0.0f);
    EXPECT_EQ(zeros < static_cast<int64_t>(expected.scores.size()) / 2, true);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | kFlush);
    const Problem::Result got = problem.Run(Whole);
    const Problem::Result cut = problem.Run(Backwards);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    EXPECT_EQ(got == expected, true, "flushing");
    EXPECT_EQ(cut == expected, true, "flushing, one by one");
    EXPECT_EQ(after & kFlush, kFlush);  // the caller's mode is back
  }
}
#endif

// Offsets are 64 bits wide (acceptance row A23): the second row of a pool that holds no memory.
TEST(OffsetsBeyond32Bits) {
  constexpr int64_t kSlots = 40'000'000, kUsed = 70;
  const AddressSpace key(2 * kSlots * 64), scale(2 * kSlots * 4);
  if (!key.ok() || !scale.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 6 GB" << std::endl;
    return;
  }
  Problem problem(IndexForm::kMxfp4, 2, 1, 2, 128, kUsed, 20);
  problem.n_visible[0] = 0;
  problem.n_visible[1] = kUsed;
  const Problem::Result want = problem.Run(Whole);
  std::memcpy(key.data<uint8_t>() + kSlots * 64, &problem.key[kUsed * 64], kUsed * 64);
  std::memcpy(scale.data<uint8_t>() + kSlots * 4, &problem.key_scale[kUsed * 4], kUsed * 4);
  IndexTopkParams params = problem.Params();
  params.key = key.data<uint8_t>();
  params.key_scale = scale.data<uint8_t>();
  params.slots = kSlots;
  Guarded<int32_t> idx(2 * 20);
  params.idx = idx.data();
  IndexTopkCpu(params, Whole);
  EXPECT_EQ(idx.Values(), want.idx);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
