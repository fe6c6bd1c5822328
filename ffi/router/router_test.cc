// The CPU handler's loop against the definition in double.
#include "router/router.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "common/bits.h"
#include "common/exp.h"
#include "common/testing.h"

namespace dsv4 {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Distance from `exact` in ulps of the FP32 numbers there; normal results only.
double Ulps(float got, double exact) {
  return std::fabs(got - exact) / std::ldexp(1.0, std::ilogb(exact) - 23);
}

double Score(double z) {
  return std::sqrt(z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z)));
}

struct Problem {
  Problem(int64_t t, int64_t experts, int64_t k)
      : t(t), experts(experts), k(k), logits(t * experts), bias(experts), given(t * k) {}

  // Bits of ids and weights over bytes that are `poison` before, of the given ranges.
  std::vector<uint32_t> Run(bool is_given, uint8_t poison, const std::vector<int64_t>& ends) const {
    Guarded<int32_t> idx(t * k);
    Guarded<float> weight(t * k);
    idx.Fill(poison);
    weight.Fill(poison);
    RouterParams params{};
    params.logits = logits.data();
    params.bias = is_given ? nullptr : bias.data();
    params.given_idx = is_given ? given.data() : nullptr;
    if (table != nullptr) {
      params.given_idx = table->given.data();
      params.tokens = tokens->data();
      params.rows = table->t;
    }
    params.expert_idx = idx.data();
    params.expert_weight = weight.data();
    params.t = t;
    params.experts = experts;
    params.k = k;
    params.scale = scale;
    for (size_t i = 0; i + 1 < ends.size(); ++i) RouterCpu(params, ends[i], ends[i + 1]);
    EXPECT_EQ(idx.Intact() && weight.Intact(), true);
    EXPECT_EQ(logits.Intact() && bias.Intact() && given.Intact(), true);
    std::vector<uint32_t> outputs;
    for (int64_t i = 0; i < t * k; ++i) outputs.push_back(static_cast<uint32_t>(idx[i]));
    for (int64_t i = 0; i < t * k; ++i) outputs.push_back(FloatBits(weight[i]));
    return outputs;
  }

  std::vector<uint32_t> Run(bool is_given = false) const {
    const std::vector<uint32_t> outputs = Run(is_given, 0x5A, {0, t});
    EXPECT_EQ(Run(is_given, 0xA5, {0, t}), outputs, "unwritten bytes");
    return outputs;
  }

  int64_t t, experts, k;
  float scale = 1.5f;
  Guarded<float> logits, bias;
  Guarded<int32_t> given;
  const Problem* table = nullptr;  // its ids are the table, if any, with these tokens
  const Guarded<int32_t>* tokens = nullptr;
};

int32_t Idx(const std::vector<uint32_t>& outputs, int64_t at) {
  return static_cast<int32_t>(outputs[at]);
}
float Weight(const Problem& problem, const std::vector<uint32_t>& outputs, int64_t at) {
  return FloatFromBits(outputs[problem.t * problem.k + at]);
}

Problem Random(int64_t t, int64_t experts, int64_t k) {
  Problem problem(t, experts, k);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < t * experts; ++i) problem.logits[i] = 4 * normal(random);
  for (int64_t i = 0; i < experts; ++i) problem.bias[i] = normal(random);
  for (int64_t token = 0; token < t; ++token) {
    std::vector<int32_t> ids(experts);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random);
    std::copy_n(ids.begin(), k, problem.given.data() + token * k);
  }
  return problem;
}

// Ids exactly, weights within 5 ulps: two of a score, one of each rounding behind it.
void ExpectDefinition(const Problem& problem, bool is_given) {
  const std::vector<uint32_t> got = problem.Run(is_given);
  const int64_t experts = problem.experts, k = problem.k;
  for (int64_t token = 0; token < problem.t; ++token) {
    const float* logits = problem.logits.data() + token * experts;
    std::vector<int32_t> ids(experts);
    std::iota(ids.begin(), ids.end(), 0);
    if (is_given) {
      ids.assign(problem.given.data() + token * k, problem.given.data() + (token + 1) * k);
    } else {
      // By what FP32 makes of the sum, which random scores do not bring near a tie.
      std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
        return Score(logits[a]) + problem.bias[a] > Score(logits[b]) + problem.bias[b];
      });
      ids.resize(k);
    }
    std::sort(ids.begin(), ids.end());
    double total = 0;
    for (int32_t id : ids) total += Score(logits[id]);
    for (int64_t i = 0; i < k; ++i) {
      EXPECT_EQ(Idx(got, token * k + i), ids[i], "token", token, "pick", i);
      const double weight = Score(logits[ids[i]]) / total * problem.scale;
      const double ulps = Ulps(Weight(problem, got, token * k + i), weight);
      EXPECT_EQ(ulps <= 5, true, "token", token, "pick", i, "ulps", ulps);
    }
  }
}

TEST(ExpWithinAnUlp) {
  double worst = 0;
  for (int64_t i = 0; i <= 4'000'000; ++i) {
    const auto x = static_cast<float>(-87.336 + (88.7228 + 87.336) * static_cast<double>(i) / 4e6);
    worst = std::max(worst, Ulps(Exp(x), std::exp(static_cast<double>(x))));
  }
  std::cerr << "exp: " << worst << " ulp" << std::endl;
  EXPECT_EQ(worst <= 1, true, worst);
  EXPECT_EQ(Exp(0.0f), 1.0f);
  EXPECT_EQ(Exp(-0.0f), 1.0f);
  for (float x : {-87.34f, -104.0f, -1e10f, -kFloat32Max, -kInf}) {
    EXPECT_EQ(FloatBits(Exp(x)), 0u, x);
  }
  for (float x : {88.73f, 1e10f, kFloat32Max, kInf}) EXPECT_EQ(Exp(x), kInf, x);
  EXPECT_EQ(std::isnan(Exp(kNan)) && std::isnan(Exp(-kNan)), true);
}

TEST(ScoreWithinTwoUlps) {
  double worst = 0;
  for (uint32_t bits = 0; bits < 0x7F800000u; bits += 997) {
    for (float z : {FloatFromBits(bits), -FloatFromBits(bits)}) {
      if (z < -174.0f) continue;  // below 2^-126
      worst = std::max(worst, Ulps(RouterScore(z), Score(z)));
    }
  }
  std::cerr << "score: " << worst << " ulp" << std::endl;
  EXPECT_EQ(worst <= 2, true, worst);
  for (float z : {-175.0f, -1e4f, -kFloat32Max, -kInf}) {
    EXPECT_EQ(FloatBits(RouterScore(z)), 0u, z);
  }
  EXPECT_EQ(RouterScore(kInf), kInf);
  EXPECT_EQ(std::isnan(RouterScore(kNan)) && std::isnan(RouterScore(-kNan)), true);
}

TEST(AnySize) {
  for (bool is_given : {false, true}) {
    ExpectDefinition(Random(9, 256, 6), is_given);
    ExpectDefinition(Random(9, 384, 6), is_given);
    ExpectDefinition(Random(9, 1, 1), is_given);
    ExpectDefinition(Random(9, 5, 5), is_given);
    ExpectDefinition(Random(9, 33, 32), is_given);
    ExpectDefinition(Random(3, 1024, 32), is_given);  // the most
    ExpectDefinition(Random(1, 7, 2), is_given);
    ExpectDefinition(Random(0, 7, 2), is_given);
  }
}

TEST(TiesGoToTheLowerId) {
  Problem problem(1, 40, 6);
  for (int64_t e = 0; e < 40; ++e) problem.bias[e] = static_cast<float>(e % 4);
  const std::vector<uint32_t> got = problem.Run();
  for (int64_t i = 0; i < 6; ++i) {
    EXPECT_EQ(Idx(got, i), 4 * static_cast<int32_t>(i) + 3);
    EXPECT_EQ(Weight(problem, got, i), 0.25f);
  }
}

// -0 equals 0 and a bias can turn the sign of nothing else.
TEST(KeysOrderAsNumbers) {
  const std::vector<float> order = {-kInf, -kFloat32Max, -1,   -0x1p-149f, 0, 0x1p-149f,
                                    1,     kFloat32Max,  kInf, kNan};
  for (size_t i = 0; i < order.size(); ++i) {
    for (size_t j = 0; j < order.size(); ++j) {
      EXPECT_EQ(RouterKey(order[i], 3) < RouterKey(order[j], 3), i < j, i, j);
      EXPECT_EQ(RouterKey(order[i], 3) > RouterKey(order[j], 4), i >= j, i, j);
    }
    EXPECT_EQ(RouterKeyId(RouterKey(order[i], 1023)), 1023);
  }
  EXPECT_EQ(RouterKey(-0.0f, 3), RouterKey(0.0f, 3));
  EXPECT_EQ(RouterKey(-kNan, 3), RouterKey(kNan, 3));
}

// NaN is picked first, the lower id of two, and is NaN's of its token alone.
TEST(NanIsTheLargest) {
  for (float nan : {kNan, -kNan}) {
    Problem problem = Random(3, 40, 4);
    const std::vector<uint32_t> clean = problem.Run();
    problem.logits[40 + 7] = nan;
    problem.logits[40 + 30] = nan;
    problem.logits[40 + 20] = kInf;
    const std::vector<uint32_t> got = problem.Run();
    const std::vector<int32_t> picks = {Idx(got, 4), Idx(got, 5), Idx(got, 6), Idx(got, 7)};
    for (int32_t id : {7, 20, 30}) {
      EXPECT_EQ(std::count(picks.begin(), picks.end(), id), 1, id);
    }
    for (int64_t i = 4; i < 8; ++i) EXPECT_EQ(std::isnan(Weight(problem, got, i)), true, i);
    for (int64_t i : {0, 1, 2, 3, 8, 9, 10, 11}) {
      EXPECT_EQ(got[i], clean[i], i);
      EXPECT_EQ(got[12 + i], clean[12 + i], i);
    }
    problem.bias[39] = nan;
    for (int64_t token : {0, 2}) EXPECT_EQ(Idx(problem.Run(), 4 * token + 3), 39, token);
  }
}

// B13: no weight, no part in the sum, no read outside the row (the guards are watched).
TEST(GivenIdsOutside) {
  Problem problem = Random(1, 8, 5);
  const int32_t given[] = {std::numeric_limits<int32_t>::max(), 3, -1, 3, 8};
  std::copy_n(given, 5, problem.given.data());
  problem.given[2] = std::numeric_limits<int32_t>::min();
  const std::vector<uint32_t> got = problem.Run(true);
  const std::vector<int32_t> sorted = {std::numeric_limits<int32_t>::min(), 3, 3, 8,
                                       std::numeric_limits<int32_t>::max()};
  for (int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(Idx(got, i), sorted[i], i);
    EXPECT_EQ(Weight(problem, got, i), sorted[i] == 3 ? 0.75f : 0.0f, i);
  }
}

// A token's ids are a row of a table; ids of tokens outside of it are held to it.
TEST(RowsOfATable) {
  const Problem table = Random(5, 33, 4);
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  const int32_t tokens[] = {4, 0, 5, -1, 2, 2, kLeast, std::numeric_limits<int32_t>::max()};
  const int64_t rows[] = {4, 0, 4, 0, 2, 2, 0, 4};
  Problem problem = Random(8, 33, 4);
  for (int64_t i = 0; i < 8; ++i) {
    std::copy_n(table.given.data() + rows[i] * 4, 4, problem.given.data() + i * 4);
  }
  const std::vector<uint32_t> want = problem.Run(true);
  Guarded<int32_t> ids(8);
  std::copy_n(tokens, 8, ids.data());
  problem.tokens = &ids;
  problem.table = &table;
  EXPECT_EQ(problem.Run(true), want);
  EXPECT_EQ(ids.Intact() && table.given.Intact(), true);
}

TEST(AnySplitGivesTheSameBytes) {
  const Problem problem = Random(7, 33, 4);
  for (bool is_given : {false, true}) {
    const std::vector<uint32_t> whole = problem.Run(is_given);
    for (int64_t first = 0; first <= 7; ++first) {
      EXPECT_EQ(problem.Run(is_given, 0x5A, {0, first, 7}), whole, first);
      const std::vector<uint32_t> part = problem.Run(is_given, 0x5A, {first, 7});
      for (int64_t i = 0; i < first * 4; ++i) EXPECT_EQ(part[i], 0x5A5A5A5Au, first, i);
    }
  }
}

// Offsets are 64 bits wide (acceptance row A23), in address space that holds no memory.
TEST(OffsetsBeyond32Bits) {
  constexpr int64_t kExperts = 256, kPicks = 6;
  constexpr int64_t kTokens = (int64_t{1} << 32) / kExperts + 5, kLast = kTokens - 1;
  const AddressSpace logits(4 * kTokens * kExperts), idx(4 * kTokens * kPicks);
  const AddressSpace weight(4 * kTokens * kPicks);
  if (!logits.ok() || !idx.ok() || !weight.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 18 GB" << std::endl;
    return;
  }
  const Problem problem = Random(1, kExperts, kPicks);
  std::memcpy(logits.data<float>() + kLast * kExperts, problem.logits.data(), 4 * kExperts);
  RouterParams params{};
  params.logits = logits.data<float>();
  params.bias = problem.bias.data();
  params.expert_idx = idx.data<int32_t>();
  params.expert_weight = weight.data<float>();
  params.t = kTokens;
  params.experts = kExperts;
  params.k = kPicks;
  params.scale = problem.scale;
  RouterCpu(params, kLast, kTokens);
  const std::vector<uint32_t> want = problem.Run();
  for (int64_t i = 0; i < kPicks; ++i) {
    EXPECT_EQ(params.expert_idx[kLast * kPicks + i], Idx(want, i), i);
    EXPECT_EQ(params.expert_weight[kLast * kPicks + i], Weight(problem, want, i), i);
  }
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
