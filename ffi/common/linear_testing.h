// What the tests of the four linears share: problems with random operands, the definition in double
// (model.md 4.5, 9.2), and the checks that hold for every form of weights.
#pragma once

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
#include <utility>
#include <vector>

#include "common/bits.h"
#include "common/linear.h"
#include "common/linear_cpu.h"
#include "common/swiglu.h"
#include "common/testing.h"

namespace dsv4 {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// ---- The definition.

// Nearest multiple of `unit`, ties to the even multiple.
inline double RoundTo(double x, double unit) { return std::nearbyint(x / unit) * unit; }

// Nearest value with `bits` significant bits and exponents from `min_exponent` on.
inline double RoundSignificant(double x, int bits, int min_exponent) {
  if (x == 0 || !std::isfinite(x)) return x;
  return RoundTo(x, std::ldexp(1.0, std::max(std::ilogb(x), min_exponent) - bits + 1));
}

inline double RoundE4m3Definition(double x) {
  return RoundSignificant(std::fmin(std::fmax(x, -448), 448), 4, -6);
}

inline double RoundE2m1Definition(double x) {
  return RoundSignificant(std::fmin(std::fmax(x, -6), 6), 2, 0);
}

inline double E2m1Definition(int code) {
  const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code < 8 ? values[code] : -values[code - 8];
}

inline double E4m3Definition(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double a =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x7F) == 0x7F ? kNan : code & 0x80 ? -a : a;
}

inline double Ue8m0Definition(int code) { return code == 255 ? kNan : std::ldexp(1.0, code - 127); }

// Finite values of one token, rounded as the product reads them.
inline std::vector<double> ActivationsDefinition(ActForm act, const std::vector<double>& x,
                                                 const float* act_scale) {
  const auto largest = [&](size_t first, size_t count) {
    double a = 0;
    for (size_t i = first; i < std::min(first + count, x.size()); ++i) {
      a = std::max(a, std::fabs(x[i]));
    }
    return static_cast<float>(a);
  };
  std::vector<double> values;
  const float token = largest(0, x.size());
  const float global = act_scale != nullptr ? *act_scale : token == 0 ? 1 : token * (1.0f / 2688);
  for (size_t i = 0; i < x.size(); ++i) {
    if (act == ActForm::kBf16) {
      values.push_back(RoundSignificant(x[i], 8, -126));
    } else if (act == ActForm::kFp8) {
      const float a = std::max(largest(i / 128 * 128, 128), 1e-4f) * (1.0f / 448);
      const double scale = std::exp2(std::ceil(std::log2(static_cast<double>(a))));
      values.push_back(RoundE4m3Definition(x[i] / scale) * scale);
    } else {
      const float a = largest(i / 16 * 16, 16);
      float ratio = a / (6.0f * global);
      ratio = std::min(std::max(ratio, 0x1p-9f), 448.0f);
      const double scale = a == 0 ? 1 : RoundE4m3Definition(ratio);
      const float step = static_cast<float>(scale) * global;
      values.push_back(RoundE2m1Definition(static_cast<float>(x[i]) / step) * scale * global);
    }
  }
  return values;
}

// ---- Problems.

using LinearCpuFn = void(const LinearParams&, const LinearActivations&, int64_t, int64_t);

// Runs tasks on threads of its own.
class TestPool {
 public:
  explicit TestPool(int64_t threads) : count_(threads) {}
  ~TestPool() {
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return count_; }
  void Schedule(std::function<void()> task) { threads_.emplace_back(std::move(task)); }

 private:
  int64_t count_;
  std::vector<std::thread> threads_;
};

struct LinearShape {
  int64_t t, groups, n, k;
};

struct LinearProblem {
  LinearProblem(WeightForm form, LinearCpuFn* cpu, const LinearShape& shape, ActForm act,
                bool x_float32 = false)
      : form(form),
        cpu(cpu),
        shape(shape),
        act(act),
        x_float32(x_float32),
        x(shape.t * shape.groups * shape.k * (x_float32 ? 4 : 2), x_float32 ? 4 : 2),
        weight(WeightBytes(shape.n * shape.k), form == WeightForm::kBf16 ? 2 : 1),
        scale(ScaleBytes(shape.n, shape.k), 1) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < shape.t * shape.groups * shape.k; ++i) SetX(i, normal(random) * 3);
    for (int64_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<uint8_t>(random());
    if (form == WeightForm::kBf16) {
      for (int64_t i = 0; i < shape.n * shape.k; ++i) SetBf16(weight, i, normal(random));
    } else if (form == WeightForm::kFp8) {
      for (int64_t i = 0; i < weight.size(); ++i) weight[i] &= 0xF7;  // no NaN
    }
    const int first = form == WeightForm::kNvfp4 ? 0x28 : 117;
    for (int64_t i = 0; i < scale.size(); ++i)
      scale[i] = static_cast<uint8_t>(first + random() % 7);
  }

  int64_t WeightBytes(int64_t count) const {
    return form == WeightForm::kBf16 ? 2 * count : form == WeightForm::kFp8 ? count : count / 2;
  }
  int64_t ScaleBytes(int64_t n, int64_t k) const {
    switch (form) {
      case WeightForm::kBf16:
        return 0;
      case WeightForm::kFp8:
        return (n + 127) / 128 * ((k + 127) / 128);
      case WeightForm::kMxfp4:
        return n * k / 32;
      default:
        return n * k / 16;
    }
  }

  static void SetBf16(Guarded<uint8_t>& to, int64_t i, float value) {
    const uint16_t bits = FloatToBf16(value);
    std::memcpy(to.data() + 2 * i, &bits, 2);
  }
  static float GetBf16(const Guarded<uint8_t>& from, int64_t i) {
    uint16_t bits;
    std::memcpy(&bits, from.data() + 2 * i, 2);
    return Bf16ToFloat(bits);
  }
  void SetX(int64_t i, float value) {
    if (!x_float32) return SetBf16(x, i, value);
    std::memcpy(x.data() + 4 * i, &value, 4);
  }
  float X(int64_t i) const {
    if (!x_float32) return GetBf16(x, i);
    float value;
    std::memcpy(&value, x.data() + 4 * i, 4);
    return value;
  }

  double Weight(int64_t row, int64_t i) const {
    const int64_t at = row * shape.k + i;
    const auto nibble = [&] { return E2m1Definition(weight[at / 2] >> 4 * (at % 2) & 15); };
    switch (form) {
      case WeightForm::kBf16:
        return GetBf16(weight, at);
      case WeightForm::kFp8:
        return E4m3Definition(weight[at]) *
               Ue8m0Definition(scale[row / 128 * ((shape.k + 127) / 128) + i / 128]);
      case WeightForm::kMxfp4:
        return nibble() * Ue8m0Definition(scale[at / 32]);
      default:
        return nibble() * E4m3Definition(scale[at / 16]) * global_scale;
    }
  }

  LinearParams Params(void* y, bool y_bf16) const {
    LinearParams params{};
    params.x = x.data();
    params.weight = weight.data();
    params.scale = scale.data();
    params.global_scale = &global_scale;
    params.act_scale = has_act_scale ? &act_scale : nullptr;
    params.y = y;
    params.t = shape.t;
    params.groups = shape.groups;
    params.n = shape.n;
    params.k = shape.k;
    params.x_float32 = x_float32;
    params.y_bf16 = y_bf16;
    params.act = act;
    return params;
  }

  void ExpectIntact() const {
    EXPECT_EQ(x.Intact(), true);
    EXPECT_EQ(weight.Intact(), true);
    EXPECT_EQ(scale.Intact(), true);
  }

  // Bits of y by tokens in ranges that end at `token_ends`, rows at `row_ends`; over 0x5A.
  std::vector<uint32_t> Run(const std::vector<int64_t>& token_ends,
                            const std::vector<int64_t>& row_ends) const {
    Guarded<float> y(shape.t * shape.n);
    y.Fill(0x5A);
    const LinearParams params = Params(y.data(), false);
    for (size_t i = 0; i + 1 < token_ends.size(); ++i) {
      LinearActivations some(params, token_ends[i], token_ends[i + 1] - token_ends[i]);
      some.Round(0, some.size());
      for (size_t j = 0; j + 1 < row_ends.size(); ++j) {
        cpu(params, some, row_ends[j], row_ends[j + 1]);
      }
    }
    EXPECT_EQ(y.Intact(), true);
    ExpectIntact();
    std::vector<uint32_t> bits(y.size());
    for (int64_t i = 0; i < y.size(); ++i) bits[i] = FloatBits(y[i]);
    return bits;
  }
  std::vector<uint32_t> Run() const { return Run({0, shape.t}, {0, shape.n}); }

  // As the handler does it.
  std::vector<uint32_t> RunOn(int64_t threads) const {
    Guarded<float> y(shape.t * shape.n);
    y.Fill(0xA5);
    const LinearParams params = Params(y.data(), false);
    TestPool pool(threads);
    RunLinearCpu(pool, params, cpu);
    EXPECT_EQ(y.Intact(), true);
    std::vector<uint32_t> bits(y.size());
    for (int64_t i = 0; i < y.size(); ++i) bits[i] = FloatBits(y[i]);
    return bits;
  }

  std::vector<uint16_t> RunBf16() const {
    Guarded<uint16_t> y(shape.t * shape.n, 2);
    y.Fill(0x5A);
    const LinearParams params = Params(y.data(), true);
    TestPool pool(1);
    RunLinearCpu(pool, params, cpu);
    EXPECT_EQ(y.Intact(), true);
    return y.Values();
  }

  WeightForm form;
  LinearCpuFn* cpu;
  LinearShape shape;
  ActForm act;
  bool x_float32;
  bool has_act_scale = false;
  float act_scale = 0, global_scale = 0.0123f;
  Guarded<uint8_t> x, weight, scale;
};

// ---- Checks.

// y against sums in double, within the rounding of FP32 sums (1e-6 of the magnitudes added, and the
// scales); its BF16 form is the FP32 form, rounded.
inline void ExpectDefinition(const LinearProblem& problem) {
  const LinearShape& shape = problem.shape;
  const std::vector<uint32_t> bits = problem.Run();
  const float* act_scale = problem.has_act_scale ? &problem.act_scale : nullptr;
  const int64_t rows = shape.n / shape.groups;
  for (int64_t i = 0; i < shape.t * shape.groups; ++i) {
    std::vector<double> x(shape.k);
    for (int64_t j = 0; j < shape.k; ++j) x[j] = problem.X(i * shape.k + j);
    x = ActivationsDefinition(problem.act, x, act_scale);
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < shape.k; ++j) {
        const double product = x[j] * problem.Weight(i % shape.groups * rows + row, j);
        sum += product;
        size += std::fabs(product);
      }
      const float got = FloatFromBits(bits[i * rows + row]);
      if (std::fabs(got - sum) > 1e-6 * size) {
        EXPECT_EQ(got, static_cast<float>(sum), "token and group", i, "row", row, "k", shape.k);
      }
    }
  }
  const std::vector<uint16_t> narrow = problem.RunBf16();
  for (size_t i = 0; i < bits.size(); ++i) {
    EXPECT_EQ(narrow[i], FloatToBf16(FloatFromBits(bits[i])), i);
  }
}

// Tokens and rows in any ranges, on any number of threads: the same bits, and no others written.
inline void ExpectSameInAnySplit(const LinearProblem& problem) {
  const int64_t t = problem.shape.t, n = problem.shape.n;
  const std::vector<uint32_t> whole = problem.Run();
  for (int64_t at : {int64_t{1}, t / 2, t - 1}) {
    if (at < 1 || at >= t) continue;
    EXPECT_EQ(problem.Run({0, at, t}, {0, n}), whole, "tokens split at", at);
  }
  for (int64_t at : {int64_t{1}, int64_t{2}, n / 2, n - 3, n - 1}) {
    if (at < 1 || at >= n) continue;
    EXPECT_EQ(problem.Run({0, t}, {0, at, n}), whole, "rows split at", at);
    const std::vector<uint32_t> part = problem.Run({0, t}, {at, n});
    for (int64_t i = 0; i < t * n; ++i) {
      EXPECT_EQ(part[i], i % n < at ? 0x5A5A5A5Au : whole[i], "rows from", at, i);
    }
  }
  for (int64_t threads : {0, 1, 3}) EXPECT_EQ(problem.RunOn(threads), whole, "threads", threads);
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // as XLA's threads: subnormal numbers are zero
  const std::vector<uint32_t> flushing = problem.Run();
  _mm_setcsr(before);
  EXPECT_EQ(flushing, whole, "flushing");
#endif
}

// A NaN or Inf in one token reaches its own row (of its group) and no other.
inline void ExpectBadTokenAlone(const LinearProblem& problem, float bad) {
  const LinearShape& shape = problem.shape;
  const std::vector<uint32_t> clean = problem.Run();
  LinearProblem dirty = problem;
  dirty.SetX((shape.groups + shape.groups / 2) * shape.k + shape.k / 2, bad);  // token 1
  const std::vector<uint32_t> got = dirty.Run();
  const int64_t rows = shape.n / shape.groups, own = shape.groups + shape.groups / 2;
  for (int64_t i = 0; i < shape.t * shape.n; ++i) {
    if (i / rows != own) {
      EXPECT_EQ(got[i], clean[i], "beside", bad, i);
    } else if (bad != bad) {
      EXPECT_EQ(std::isnan(FloatFromBits(got[i])), true, i);
    }
  }
}

// The same bits, whatever tokens are taken at a time: all, or one.
inline void ExpectWhateverIsTaken(const LinearParams& params, LinearCpuFn* cpu, Guarded<float>& y,
                                  const std::vector<uint32_t>& expected) {
  for (int64_t count : {params.t, int64_t{1}}) {
    y.Fill(0x5A);
    for (int64_t first = 0; first < params.t; first += count) {
      LinearActivations some(params, first, count);
      some.Round(0, some.size());
      cpu(params, some, 0, params.n);
    }
    for (int64_t i = 0; i < y.size(); ++i) EXPECT_EQ(FloatBits(y[i]), expected[i], count, i);
  }
}

// x as a gate: what its clamped SwiGLU in BF16 gives.
inline void ExpectGated(WeightForm form, LinearCpuFn* cpu, ActForm act, const LinearShape& shape) {
  const int64_t size = shape.t * shape.groups * shape.k;
  const float limit = 4;
  LinearProblem gate(form, cpu, shape, act), x = gate;
  Guarded<uint16_t> up(size);
  for (int64_t i = 0; i < size; ++i) {
    up[i] = FloatToBf16(static_cast<float>(i * 37 % 101 - 50) / 8);
    x.SetX(i, ClampedSwiglu(gate.X(i), Bf16ToFloat(up[i]), limit));
  }
  const std::vector<uint32_t> expected = x.Run();
  Guarded<float> y(shape.t * shape.n);
  LinearParams params = gate.Params(y.data(), false);
  params.up = up.data();
  params.limit = limit;
  ExpectWhateverIsTaken(params, cpu, y, expected);
  EXPECT_EQ(y.Intact() && up.Intact(), true);
}

// Offsets are 64 bits wide (acceptance row A23), in address space that holds no memory: the last
// rows of a weight, and the last token, more than 2^33 elements away.
inline void ExpectFarOffsets(WeightForm form, LinearCpuFn* cpu, ActForm act) {
  constexpr int64_t kInputs = 4096, kFar = (int64_t{1} << 33) / kInputs;
  const LinearProblem problem(form, cpu, {1, 1, 128, kInputs}, act);
  const std::vector<uint32_t> expected = problem.Run();
  const auto bits = [](const float* y) {
    std::vector<uint32_t> values(128);
    std::memcpy(values.data(), y, sizeof(uint32_t) * 128);
    return values;
  };
  {
    const int64_t n = kFar + 128, weights = problem.WeightBytes(n * kInputs);
    const AddressSpace weight(weights), scale(problem.ScaleBytes(n, kInputs) + 1);
    const AddressSpace y(4 * n);
    if (!weight.ok() || !scale.ok() || !y.ok()) {
      std::cerr << "ExpectFarOffsets: skipped, no address space" << std::endl;
      return;
    }
    std::memcpy(weight.data<uint8_t>() + weights - problem.weight.size(), problem.weight.data(),
                problem.weight.size());
    std::memcpy(scale.data<uint8_t>() + problem.ScaleBytes(n, kInputs) - problem.scale.size(),
                problem.scale.data(), problem.scale.size());
    LinearParams params = problem.Params(y.data<void>(), false);
    params.weight = weight.data<void>();
    params.scale = scale.data<uint8_t>();
    params.n = n;
    LinearActivations x(params, 0, 1);
    x.Round(0, 1);
    cpu(params, x, kFar, n);
    EXPECT_EQ(bits(y.data<float>() + kFar), expected, "rows far away");
  }
  {
    const AddressSpace x((kFar + 1) * problem.x.size()), y((kFar + 1) * 128 * 4);
    if (!x.ok() || !y.ok()) return;
    std::memcpy(x.data<uint8_t>() + kFar * problem.x.size(), problem.x.data(), problem.x.size());
    LinearParams params = problem.Params(y.data<void>(), false);
    params.x = x.data<void>();
    params.t = kFar + 1;
    LinearActivations last(params, kFar, 1);
    last.Round(0, 1);
    cpu(params, last, 0, 128);
    EXPECT_EQ(bits(y.data<float>() + kFar * 128), expected, "a token far away");
  }
}

// Everything above, over shapes; `more` are those that this form alone has.
inline void ExpectLinear(WeightForm form, LinearCpuFn* cpu, const std::vector<ActForm>& acts,
                         const std::vector<LinearShape>& more) {
  std::vector<LinearShape> shapes = {
      {1, 1, 1, 32}, {2, 1, 5, 96}, {9, 1, 70, 160}, {3, 2, 130, 128}, {5, 3, 9, 64},
  };
  shapes.insert(shapes.end(), more.begin(), more.end());
  for (ActForm act : acts) {
    for (const LinearShape& shape : shapes) {
      ExpectDefinition(LinearProblem(form, cpu, shape, act));
      if (form != WeightForm::kBf16) ExpectDefinition(LinearProblem(form, cpu, shape, act, true));
    }
    for (const LinearShape& shape : {LinearShape{150, 1, 70, 160}, LinearShape{5, 3, 18, 96}}) {
      const LinearProblem problem(form, cpu, shape, act);
      ExpectSameInAnySplit(problem);
      for (float bad : {kNan, kInf, -kInf}) ExpectBadTokenAlone(problem, bad);
    }
    EXPECT_EQ(LinearProblem(form, cpu, {0, 1, 8, 32}, act).RunOn(2).size(), size_t{0});
  }
}

}  // namespace dsv4
