// The CPU handler's loops against the definition in FP64, with watched surroundings; states and
// pools whatever the chunks and the threads.
#include "compressor/compressor.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "common/bits.h"
#include "common/e4m3.h"
#include "common/testing.h"
#include "common/ue8m0.h"
#include "compressor/compressor_rows.h"

namespace dsv4 {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr uint8_t kOld = 0xA5;  // what pools hold before

const ParallelLoop kSerial = [](int64_t count, int64_t, const auto& body) {
  if (count > 0) body(0, count);
};

struct Shape {
  EntryForm form;
  int64_t ratio, d, rotary, slots;

  int64_t halves() const { return ratio == kOverlapRatio ? 2 : 1; }
  int64_t columns() const { return halves() * d; }
  int64_t nope() const { return d - rotary; }
  int64_t code_bytes() const {
    return form == EntryForm::kKv ? nope() : form == EntryForm::kMxfp4 ? d / 2 : d;
  }
  int64_t scales() const {
    return form == EntryForm::kKv ? nope() / 64 : form == EntryForm::kMxfp4 ? d / 32 : 1;
  }
};

void FillNormal(Guarded<float>& x, std::mt19937& random, float mean, float deviation) {
  std::normal_distribution<float> normal(mean, deviation);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = normal(random);
}

// Everything of b rows of t tokens, over NaN states.
struct Problem {
  Problem(const Shape& s, int64_t b, int64_t t, int64_t ring)
      : shape(s),
        b(b),
        t(t),
        ring(ring),
        kv(b * t * s.columns()),
        gate(b * t * s.columns()),
        ape(s.ratio * s.columns()),
        kv_state(b * ring * s.columns()),
        gate_state(b * ring * s.columns()),
        frequencies(s.rotary / 2),
        norm(s.d),
        rope(b * s.slots * s.rotary),
        code(b * s.slots * s.code_bytes()),
        scale(b * s.slots * s.scales()),
        start(b),
        count(b) {
    std::mt19937 random(3);
    FillNormal(kv, random, 0, 1);
    FillNormal(gate, random, 0, 2);
    FillNormal(ape, random, 0, 0.5f);
    for (int64_t i = 0; i < s.d; ++i) norm[i] = FloatToBf16(0.75f + 0.01f * (i % 50));
    for (int64_t i = 0; i < s.rotary / 2; ++i) frequencies[i] = std::pow(0.7f, i);
    for (Guarded<float>* x : {&kv_state, &gate_state}) {
      for (int64_t i = 0; i < x->size(); ++i) (*x)[i] = kNan;
    }
    for (Guarded<uint8_t>* x : {&code, &scale}) x->Fill(kOld);
    rope.Fill(kOld);
  }

  // Tokens first .. first + n - 1 of every row, from buffers that end there.
  void Run(int64_t first, int64_t n, const ParallelLoop& parallel = kSerial) {
    const int64_t columns = shape.columns();
    Guarded<float> part_kv(b * n * columns), part_gate(b * n * columns);
    for (int64_t i = 0; i < b; ++i) {
      std::copy_n(kv.data() + (i * t + first) * columns, n * columns,
                  part_kv.data() + i * n * columns);
      std::copy_n(gate.data() + (i * t + first) * columns, n * columns,
                  part_gate.data() + i * n * columns);
    }
    CompressorParams params{};
    params.n_jobs = 1;
    params.jobs[0] = {part_kv.data(),     part_gate.data(),  ape.data(),  norm.data(),
                      kv_state.data(),    gate_state.data(), code.data(), scale.data(),
                      rope.data(),        shape.d,           ring,        shape.slots,
                      shape.code_bytes(), shape.scales(),    shape.form};
    params.start = start.data();
    params.count = count.data();
    params.frequencies = frequencies.data();
    params.b = b;
    params.t = n;
    params.ratio = shape.ratio;
    params.rotary = shape.rotary;
    params.eps = 1e-6f;
    CompressorCpu(params, parallel);
    EXPECT_EQ(part_kv.Intact() && part_gate.Intact(), true);
  }

  // All of it, row i beginning at starts[i].
  void RunWhole(const std::vector<int32_t>& starts, const std::vector<int32_t>& counts,
                const ParallelLoop& parallel = kSerial) {
    std::copy(starts.begin(), starts.end(), start.data());
    std::copy(counts.begin(), counts.end(), count.data());
    Run(0, t, parallel);
  }

  // Rows that begin at 0, piece by piece.
  void RunPieces(const std::vector<int64_t>& ends) {
    int64_t first = 0;
    for (const int64_t end : ends) {
      for (int64_t i = 0; i < b; ++i) {
        start[i] = static_cast<int32_t>(first);
        count[i] = static_cast<int32_t>(end - first);
      }
      Run(first, end - first);
      first = end;
    }
  }

  void ExpectIntact(int64_t note) const {
    EXPECT_EQ(kv_state.Intact() && gate_state.Intact(), true, "states", note);
    EXPECT_EQ(code.Intact() && scale.Intact() && rope.Intact(), true, "pool", note);
    EXPECT_EQ(ape.Intact() && norm.Intact() && frequencies.Intact(), true, "constants", note);
  }

  Shape shape;
  int64_t b, t, ring;
  Guarded<float> kv, gate, ape, kv_state, gate_state, frequencies;
  Guarded<uint16_t> norm, rope;
  Guarded<uint8_t> code, scale;
  Guarded<int32_t> start, count;
};

std::vector<uint32_t> Bits(const Guarded<float>& x) {
  std::vector<uint32_t> bits;
  for (const float value : x.Values()) bits.push_back(FloatBits(value));
  return bits;
}

void ExpectSame(const Problem& a, const Problem& b, int64_t note) {
  EXPECT_EQ(Bits(a.kv_state), Bits(b.kv_state), "kv_state", note);
  EXPECT_EQ(Bits(a.gate_state), Bits(b.gate_state), "gate_state", note);
  EXPECT_EQ(a.code.Values(), b.code.Values(), "code", note);
  EXPECT_EQ(a.scale.Values(), b.scale.Values(), "scale", note);
  EXPECT_EQ(a.rope.Values(), b.rope.Values(), "rope", note);
  a.ExpectIntact(note);
}

// Entry w of row i, whose token 0 is at position 0, in FP64 and before storage.
std::vector<double> Definition(const Problem& p, int64_t i, int64_t window) {
  const Shape& s = p.shape;
  std::vector<double> y(s.d);
  double squares = 0;
  for (int64_t channel = 0; channel < s.d; ++channel) {
    std::vector<double> z, g;
    for (int64_t at = (window + 1 - s.halves()) * s.ratio; at < (window + 1) * s.ratio; ++at) {
      if (at < 0) continue;
      const int64_t column = at >= window * s.ratio && s.halves() == 2 ? s.d + channel : channel;
      z.push_back(p.kv[(i * p.t + at) * s.columns() + column]);
      g.push_back(p.gate[(i * p.t + at) * s.columns() + column] +
                  p.ape[at % s.ratio * s.columns() + column]);
    }
    const double top = *std::max_element(g.begin(), g.end());
    double norm = 0, value = 0;
    for (size_t j = 0; j < z.size(); ++j) {
      norm += std::exp(g[j] - top);
      value += std::exp(g[j] - top) * z[j];
    }
    y[channel] = value / norm;
    squares += y[channel] * y[channel];
  }
  const double scale = 1 / std::sqrt(squares / s.d + 1e-6);
  for (int64_t c = 0; c < s.d; ++c) y[c] *= scale * Bf16ToFloat(p.norm[c]);
  for (int64_t c = 0; c < s.rotary; c += 2) {
    const double angle = static_cast<float>(window * s.ratio) * p.frequencies[c / 2];
    double* pair = &y[s.nope() + c];
    const double even = pair[0], odd = pair[1];
    pair[0] = even * std::cos(angle) - odd * std::sin(angle);
    pair[1] = even * std::sin(angle) + odd * std::cos(angle);
  }
  if (s.form == EntryForm::kKv) return y;
  for (int64_t half = 1; half < s.d; half *= 2) {
    for (int64_t c = 0; c < s.d; ++c) {
      if (c & half) continue;
      const double low = y[c], high = y[c + half];
      y[c] = low + high;
      y[c + half] = low - high;
    }
  }
  for (double& x : y) x /= std::sqrt(static_cast<double>(s.d));
  return y;
}

double Decoded(const Problem& p, int64_t entry, int64_t c) {
  const Shape& s = p.shape;
  const auto power = [&](int64_t block) {
    return std::ldexp(1.0, p.scale[entry * s.scales() + block] - 127);
  };
  if (s.form == EntryForm::kMxfp4) {
    const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const int code = p.code[entry * s.d / 2 + c / 2] >> 4 * (c % 2) & 0xF;
    return (code & 8 ? -1 : 1) * values[code & 7] * power(c / 32);
  }
  if (s.form == EntryForm::kKv && c >= s.nope()) {
    return Bf16ToFloat(p.rope[entry * s.rotary + c - s.nope()]);
  }
  return DecodeE4m3(p.code[entry * s.code_bytes() + c]) *
         power(s.form == EntryForm::kKv ? c / 64 : 0);
}

// Half a step of a code, besides the roundings to BF16.
double Allowed(const Problem& p, int64_t entry, int64_t c, double exact) {
  const Shape& s = p.shape;
  const double bf16 = 0x1p-6 * std::abs(exact) + 0x1p-6;
  if (s.form == EntryForm::kKv && c >= s.nope()) return bf16;
  if (s.form != EntryForm::kMxfp4) return 0x1p-4 * std::abs(exact) + bf16;
  return std::ldexp(1.0, p.scale[entry * s.scales() + c / 32] - 127) + bf16;
}

void ExpectDefinition(const Problem& p, const std::vector<int32_t>& counts) {
  for (int64_t i = 0; i < p.b; ++i) {
    for (int64_t w = 0; w < p.shape.slots; ++w) {
      const int64_t entry = i * p.shape.slots + w;
      if ((w + 1) * p.shape.ratio > counts[i]) {
        for (int64_t c = 0; c < p.shape.code_bytes(); ++c) {
          EXPECT_EQ(p.code[entry * p.shape.code_bytes() + c], kOld, i, w, c);
        }
        for (int64_t c = 0; c < p.shape.scales(); ++c) {
          EXPECT_EQ(p.scale[entry * p.shape.scales() + c], kOld, i, w, c);
        }
        continue;
      }
      const std::vector<double> y = Definition(p, i, w);
      for (int64_t c = 0; c < p.shape.d; ++c) {
        const double error = std::abs(Decoded(p, entry, c) - y[c]);
        EXPECT_EQ(error <= Allowed(p, entry, c, y[c]), true, "row", i, "window", w, "channel", c,
                  Decoded(p, entry, c), y[c]);
      }
    }
    for (int64_t at = std::max<int64_t>(0, counts[i] - p.ring); at < counts[i]; ++at) {
      for (int64_t c = 0; c < p.shape.columns(); ++c) {
        const int64_t from = (i * p.t + at) * p.shape.columns() + c;
        const int64_t to = (i * p.ring + at % p.ring) * p.shape.columns() + c;
        EXPECT_EQ(p.kv_state[to], p.kv[from], i, at, c);
        const float gate = p.gate[from] + p.ape[at % p.shape.ratio * p.shape.columns() + c];
        EXPECT_EQ(p.gate_state[to], gate, i, at, c);
      }
    }
  }
}

const Shape kShapes[] = {
    {EntryForm::kKv, 4, 512, 64, 6},    {EntryForm::kKv, 128, 512, 64, 3},
    {EntryForm::kMxfp4, 4, 128, 64, 6}, {EntryForm::kFp8, 4, 128, 64, 6},
    {EntryForm::kKv, 4, 96, 32, 6},     {EntryForm::kKv, 24, 64, 64, 3},
    {EntryForm::kMxfp4, 4, 32, 6, 6},   {EntryForm::kKv, 1, 132, 4, 9},
};

int64_t Ring(const Shape& s, int64_t spare) { return s.halves() * s.ratio + spare; }

TEST(EveryShape) {
  for (const Shape& shape : kShapes) {
    const auto t = static_cast<int32_t>(shape.ratio * 5 / 2 + 1);
    const auto ratio = static_cast<int32_t>(shape.ratio);
    for (int64_t spare : {0, 3}) {
      Problem problem(shape, 4, t, Ring(shape, spare));
      const std::vector<int32_t> counts = {t, 0, ratio, ratio - 1};
      problem.RunWhole({0, 0, 0, 0}, counts);
      ExpectDefinition(problem, counts);
      problem.ExpectIntact(spare);
    }
  }
}

TEST(AnyPiecesGiveTheSameBits) {
  for (const Shape& shape : kShapes) {
    const int64_t m = shape.ratio, t = 3 * m + 1;
    Problem whole(shape, 2, t, Ring(shape, 1));
    whole.RunPieces({t});
    std::vector<int64_t> ones(t);
    for (int64_t i = 0; i < t; ++i) ones[i] = i + 1;
    int64_t note = 0;
    for (const std::vector<int64_t>& ends :
         {ones, std::vector<int64_t>{m, t}, {m + 1, 2 * m + 1, t}, {1, t}, {2 * m, 2 * m, t}}) {
      Problem pieces(shape, 2, t, Ring(shape, 1));
      pieces.RunPieces(ends);
      ExpectSame(pieces, whole, note++);
    }
  }
}

// Ranges in any order, each on its own.
TEST(AnyThreadsGiveTheSameBits) {
  const ParallelLoop backwards = [](int64_t count, int64_t, const auto& body) {
    for (int64_t i = count; i > 0; --i) body(i - 1, i);
  };
  for (const Shape& shape : kShapes) {
    const auto t = static_cast<int32_t>(3 * shape.ratio);
    Problem one(shape, 3, t, Ring(shape, 0)), other(shape, 3, t, Ring(shape, 0));
    for (Problem* problem : {&one, &other}) {
      for (Guarded<float>* state : {&problem->kv_state, &problem->gate_state}) state->Fill(0);
    }
    one.RunWhole({2, 0, 5}, {t, t - 1, 3});
    other.RunWhole({2, 0, 5}, {t, t - 1, 3}, backwards);
    ExpectSame(one, other, shape.d);
  }
}

// Lengths are data: nothing is written outside, and by a row that takes nothing nothing at all.
TEST(WildLengths) {
  constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();
  constexpr int32_t kHighest = std::numeric_limits<int32_t>::max();
  for (const Shape& shape : kShapes) {
    const auto t = static_cast<int32_t>(2 * shape.ratio + 1);
    const Problem before(shape, 1, t, Ring(shape, 0));
    for (const auto& [start, count] : {std::pair(-1, t), std::pair(kLowest, t), std::pair(3, -1),
                                       std::pair(3, kLowest), std::pair(kHighest, 0)}) {
      Problem problem(shape, 1, t, Ring(shape, 0));
      problem.RunWhole({start}, {count});
      ExpectSame(problem, before, start);
    }
    for (const auto& [start, count] : {std::pair(kHighest, kHighest), std::pair(kHighest - 5, t)}) {
      Problem problem(shape, 1, t, Ring(shape, 0));
      problem.RunWhole({start}, {count});
      EXPECT_EQ(problem.code.Values(), before.code.Values(), start);
      EXPECT_EQ(problem.scale.Values(), before.scale.Values(), start);
      problem.ExpectIntact(start);
    }
  }
}

TEST(ScalesOfBlocks) {
  EXPECT_EQ(Fp8ScaleByte(FloatBits(0.0f)), 127u - 22);
  EXPECT_EQ(Fp8ScaleByte(FloatBits(448.0f)), 127u);
  EXPECT_EQ(Fp8ScaleByte(FloatBits(std::nextafter(448.0f, 500.0f))), 128u);
  EXPECT_EQ(Fp8ScaleByte(FloatBits(kFloat32Max)), Fp8ScaleByte(0x7F800000u));
  EXPECT_EQ(Fp8ScaleByte(FloatBits(kNan) & 0x7FFFFFFFu), 255u);
  EXPECT_EQ(Mxfp4ScaleByte(FloatBits(0.0f)), 1u);
  for (int e = -120; e < 120; ++e) {
    const float six = std::ldexp(6.0f, e);
    EXPECT_EQ(Mxfp4ScaleByte(FloatBits(six)), static_cast<uint32_t>(e + 127), e);
    EXPECT_EQ(Mxfp4ScaleByte(FloatBits(std::nextafter(six, kFloat32Max))),
              static_cast<uint32_t>(e + 128), e);
    EXPECT_EQ(InverseScale(static_cast<uint32_t>(e + 127)), std::ldexp(1.0f, -e), e);
  }
}

// Offsets are 64 bits wide (acceptance row A23), in address space that holds no memory.
TEST(OffsetsBeyond32Bits) {
  const Shape shape = {EntryForm::kKv, 4, 512, 64, int64_t{1} << 24};
  constexpr int64_t kRows = 3, kTokens = (int64_t{1} << 21) + 8;
  const int64_t chunk = kRows * kTokens * shape.columns() * 4;
  const int64_t entries = kRows * shape.slots;
  const AddressSpace kv(chunk), gate(chunk), code(entries * 448), scale(entries * 7),
      rope(entries * 128);
  if (!kv.ok() || !gate.ok() || !code.ok() || !scale.ok() || !rope.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 90 GB" << std::endl;
    return;
  }
  std::vector<float> ape(4 * 1024), state(kRows * 8 * 1024), gates(kRows * 8 * 1024);
  std::vector<uint16_t> norm(512, 0x3F80);
  std::vector<float> frequencies(32);
  // The last row takes four tokens; those before none.
  const int32_t start[] = {0, 0, (1 << 26) - 4}, count[] = {0, 0, 4};
  CompressorParams params{};
  params.n_jobs = 1;
  params.jobs[0] = {kv.data<float>(),
                    gate.data<float>(),
                    ape.data(),
                    norm.data(),
                    state.data(),
                    gates.data(),
                    code.data<uint8_t>(),
                    scale.data<uint8_t>(),
                    rope.data<uint16_t>(),
                    512,
                    8,
                    shape.slots,
                    448,
                    7,
                    EntryForm::kKv};
  params.start = start;
  params.count = count;
  params.frequencies = frequencies.data();
  params.b = kRows;
  params.t = kTokens;
  params.ratio = 4;
  params.rotary = 64;
  params.eps = 1e-6f;
  float* token = kv.data<float>() + 2 * kTokens * 1024;
  std::fill_n(token, 4 * 1024, 1.0f);
  std::fill_n(state.data() + 2 * 8 * 1024, 8 * 1024, 1.0f);
  CompressorCpu(params, kSerial);
  const int64_t entry = 3 * shape.slots - 1;
  EXPECT_EQ(DecodeE4m3(code.data<uint8_t>()[entry * 448 + 447]) *
                std::ldexp(1.0f, scale.data<uint8_t>()[entry * 7 + 6] - 127),
            1.0f);
  EXPECT_EQ(rope.data<uint16_t>()[entry * 64], 0x3F80);
  EXPECT_EQ(code.data<uint8_t>()[(entry - 1) * 448], 0);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
