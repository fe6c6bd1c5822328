// The CPU handler against the definition query by query, in double; decoding of stored values is
// that of common/, which has its own tests.
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
#include <thread>
#include <vector>

#include "attention/attention.h"
#include "common/bits.h"
#include "common/e4m3.h"
#include "common/testing.h"

namespace dsv4 {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
constexpr int32_t kMax = std::numeric_limits<int32_t>::max();

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

struct Sizes {
  int64_t h = 3, nope = 128, rope = 32, window = 100;
  int64_t d() const { return nope + rope; }
};

// Rows of [b, slots], with room between them; NaN bytes until they are set.
struct Store {
  Store(int64_t b, int64_t slots, const Sizes& sizes)
      : slots(slots),
        sizes(sizes),
        nope(b * slots * StrideNope()),
        scale(b * slots * StrideScale()),
        rope(b * slots * StrideRope()) {
    nope.Fill(0xFF);
    scale.Fill(0xFF);
    rope.Fill(0xFF);
  }

  // A key that is a function of its seed alone.
  void Set(int64_t row, uint32_t seed) {
    std::mt19937 random(seed);
    for (int64_t c = 0; c < sizes.nope; ++c) {
      nope[row * StrideNope() + c] = static_cast<uint8_t>(random() % 2 << 7 | random() % 0x70);
    }
    for (int64_t c = 0; c < sizes.nope / 64; ++c) {
      scale[row * StrideScale() + c] = static_cast<uint8_t>(118 + random() % 3);
    }
    for (int64_t c = 0; c < sizes.rope; ++c) {
      rope[row * StrideRope() + c] = FloatToBf16(static_cast<float>(random() % 2001) * 1e-3f - 1);
    }
  }

  std::vector<double> Key(int64_t row) const {
    std::vector<double> key(sizes.d());
    for (int64_t c = 0; c < sizes.nope; ++c) {
      key[c] = std::ldexp(static_cast<double>(DecodeE4m3(nope[row * StrideNope() + c])),
                          scale[row * StrideScale() + c / 64] - 127);
    }
    for (int64_t c = 0; c < sizes.rope; ++c) {
      key[sizes.nope + c] = Bf16ToFloat(rope[row * StrideRope() + c]);
    }
    return key;
  }

  KeyRows Rows() const {
    return {nope.data(),  scale.data(),  rope.data(), slots,
            StrideNope(), StrideScale(), StrideRope()};
  }

  bool Intact() const { return nope.Intact() && scale.Intact() && rope.Intact(); }

  int64_t StrideNope() const { return sizes.nope + 5; }
  int64_t StrideScale() const { return sizes.nope / 64 + 1; }
  int64_t StrideRope() const { return sizes.rope + 3; }

  int64_t slots;
  Sizes sizes;
  Guarded<uint8_t> nope, scale;
  Guarded<uint16_t> rope;
};

uint32_t SeedOf(int64_t b, int64_t position) { return static_cast<uint32_t>(position * 8 + b + 1); }

constexpr uint32_t kQuerySeed = 0x40000000, kEntrySeed = 0x80000000;

// Queries at positions start[b] .. + t - 1. Keys of positions before start are in the ring, those
// of the queries in the chunk, or all in the ring.
struct Problem {
  Problem(std::vector<int32_t> starts, int64_t t, int64_t pool_slots = 0, int64_t topk = 0,
          bool in_chunk = true, Sizes sizes = {})
      : b(static_cast<int64_t>(starts.size())),
        t(t),
        topk(topk),
        in_chunk(in_chunk),
        sizes(sizes),
        start(b),
        positions(b * t),
        n_visible(b * t),
        idx(b * t * topk),
        q(b * t * StrideQ()),
        sink(sizes.h),
        frequencies(sizes.rope / 2),
        ring(b, sizes.window + t + 3, sizes),
        chunk(b, in_chunk ? t : 0, sizes),
        pool(b, pool_slots, sizes) {
    q.Fill(0xFF);
    std::mt19937 random(7);
    for (int64_t row = 0; row < b; ++row) {
      start[row] = starts[row];
      for (int64_t u = 0; u < starts[row] + t; ++u) {
        if (u < starts[row] || !in_chunk) {
          if (u + ring.slots >= starts[row] + t)
            ring.Set(row * ring.slots + u % ring.slots, SeedOf(row, u));
        } else {
          chunk.Set(row * t + u - starts[row], SeedOf(row, u));
        }
      }
      for (int64_t w = 0; w < pool_slots; ++w) {
        pool.Set(row * pool_slots + w, kEntrySeed + SeedOf(row, w));
      }
      for (int64_t j = 0; j < t; ++j) {
        const int64_t token = row * t + j;
        positions[token] = static_cast<int32_t>(starts[row] + j);
        SetQuery(token, kQuerySeed + SeedOf(row, starts[row] + j));
        n_visible[token] =
            static_cast<int32_t>(std::min<int64_t>((starts[row] + j + 1) / 4, pool_slots));
        std::mt19937 chosen(kQuerySeed + SeedOf(row, starts[row] + j));
        for (int64_t i = 0; i < topk; ++i) {
          idx[token * topk + i] = static_cast<int32_t>(chosen() % (pool_slots + 20)) - 10;
        }
      }
    }
    for (int64_t head = 0; head < sizes.h; ++head) {
      sink[head] = static_cast<float>(random() % 200) * 0.01f - 1;
    }
    for (int64_t i = 0; i < sizes.rope / 2; ++i) {
      frequencies[i] =
          std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(sizes.rope));
    }
  }

  void SetQuery(int64_t token, uint32_t seed) {
    std::mt19937 random(seed);
    for (int64_t c = 0; c < sizes.h * sizes.d(); ++c) {
      q[token * StrideQ() + c] =
          FloatToBf16((static_cast<float>(random() % 4001) * 1e-3f - 2) * gain);
    }
  }

  AttentionParams Params() const {
    AttentionParams params{};
    params.q = q.data();
    params.ring = ring.Rows();
    params.chunk = in_chunk ? chunk.Rows() : KeyRows{};
    params.pool = pool.slots > 0 ? pool.Rows() : KeyRows{};
    params.positions = positions.data();
    params.start = in_chunk ? start.data() : nullptr;
    params.n_visible = pool.slots > 0 ? n_visible.data() : nullptr;
    params.topk_idx = topk > 0 ? idx.data() : nullptr;
    params.sink = sink.data();
    params.frequencies = rotated ? frequencies.data() : nullptr;
    params.b = b;
    params.t = t;
    params.h = sizes.h;
    params.nope = sizes.nope;
    params.rope = sizes.rope;
    params.window = sizes.window;
    params.topk = topk;
    params.stride_q = StrideQ();
    params.stride_o = StrideO();
    return params;
  }

  struct Result {
    std::vector<uint16_t> o;  // [b, t, h, d]
    std::vector<float> lse;   // [b, t, h]
    bool operator==(const Result& other) const {
      const auto same = [](float x, float y) { return FloatBits(x) == FloatBits(y); };
      return o == other.o &&
             std::equal(lse.begin(), lse.end(), other.lse.begin(), other.lse.end(), same);
    }
  };

  Result Run(const ParallelLoop& loop = Whole, uint8_t poison = 0x5A) const {
    AttentionParams params = Params();
    Guarded<uint16_t> o(b * t * StrideO());
    Guarded<float> lse(b * t * sizes.h);
    o.Fill(poison);
    lse.Fill(poison);
    params.o = o.data();
    params.lse = lse.data();
    AttentionCpu(params, loop);
    EXPECT_EQ(o.Intact() && lse.Intact() && q.Intact() && ring.Intact() && chunk.Intact() &&
                  pool.Intact() && idx.Intact() && positions.Intact() && n_visible.Intact(),
              true);
    Result result;
    uint16_t untouched;
    std::memset(&untouched, poison, sizeof(untouched));
    for (int64_t token = 0; token < b * t; ++token) {
      const uint16_t* row = o.data() + token * StrideO();
      result.o.insert(result.o.end(), row, row + sizes.h * sizes.d());
      for (int64_t c = sizes.h * sizes.d(); c < StrideO(); ++c) EXPECT_EQ(row[c], untouched, token);
    }
    result.lse = lse.Values();
    return result;
  }

  // Every element is written.
  Result Clean() const {
    const Result result = Run(Whole, 0x5A);
    EXPECT_EQ(Run(Whole, 0xA5) == result, true, "unwritten bytes");
    return result;
  }

  int64_t StrideQ() const { return sizes.h * sizes.d() + 7; }
  int64_t StrideO() const { return sizes.h * sizes.d() + 4; }

  int64_t b, t, topk;
  bool in_chunk, rotated = true;
  Sizes sizes;
  float gain = 1;
  Guarded<int32_t> start, positions, n_visible, idx;
  Guarded<uint16_t> q;
  Guarded<float> sink, frequencies;
  Store ring, chunk, pool;
};

// The keys that a query sees, one after the other.
std::vector<std::vector<double>> KeysOf(const Problem& problem, int64_t token) {
  std::vector<std::vector<double>> keys;
  const int64_t row = token / problem.t, position = problem.positions[token];
  for (int64_t u = std::max<int64_t>(position - problem.sizes.window + 1, 0); u <= position; ++u) {
    Store one(1, 1, problem.sizes);
    one.Set(0, SeedOf(row, u));
    keys.push_back(one.Key(0));
  }
  const int64_t visible = std::clamp<int64_t>(problem.n_visible[token], 0, problem.pool.slots);
  for (int64_t i = 0; i < (problem.topk > 0 ? problem.topk : visible); ++i) {
    const int64_t entry = problem.topk > 0 ? problem.idx[token * problem.topk + i] : i;
    if (entry >= 0 && entry < visible) {
      keys.push_back(problem.pool.Key(row * problem.pool.slots + entry));
    }
  }
  return keys;
}

void ExpectDefinition(const Problem& problem, const char* what) {
  const Problem::Result got = problem.Clean();
  const Sizes& sizes = problem.sizes;
  const int64_t d = sizes.d();
  double worst = 0, worst_lse = 0;
  for (int64_t token = 0; token < problem.b * problem.t; ++token) {
    const auto keys = KeysOf(problem, token);
    for (int64_t head = 0; head < sizes.h; ++head) {
      std::vector<double> score;
      double top = problem.sink[head];
      for (const auto& key : keys) {
        double dot = 0;
        for (int64_t c = 0; c < d; ++c) {
          dot += key[c] * Bf16ToFloat(problem.q[token * problem.StrideQ() + head * d + c]);
        }
        score.push_back(dot / std::sqrt(static_cast<double>(d)));
        top = std::max(top, score.back());
      }
      double norm = std::exp(problem.sink[head] - top), largest = 0;
      std::vector<double> o(d);
      for (size_t u = 0; u < keys.size(); ++u) {
        const double e = std::exp(score[u] - top);
        norm += e;
        for (int64_t c = 0; c < d; ++c) {
          o[c] += e * keys[u][c];
          largest = std::max(largest, std::fabs(keys[u][c]));
        }
      }
      for (double& value : o) value /= norm;
      if (problem.rotated) {
        for (int64_t i = 0; i < sizes.rope / 2; ++i) {
          const double angle =
              static_cast<float>(problem.positions[token]) * problem.frequencies[i];
          double& even = o[sizes.nope + 2 * i];
          double& odd = o[sizes.nope + 2 * i + 1];
          const double a = even, b = odd;
          even = a * std::cos(angle) + b * std::sin(angle);
          odd = b * std::cos(angle) - a * std::sin(angle);
        }
      }
      for (int64_t c = 0; c < d; ++c) {
        const float value = Bf16ToFloat(got.o[(token * sizes.h + head) * d + c]);
        // Probabilities keep 2^-9 of themselves, and the result is rounded twice.
        worst =
            std::max(worst, std::fabs(value - o[c]) - std::fabs(o[c]) * 0x1p-7 - largest * 0x1p-9);
      }
      const double lse = top + std::log(norm);
      worst_lse = std::max(worst_lse, std::fabs(got.lse[token * sizes.h + head] - lse) /
                                          std::max(1.0, std::fabs(lse)));
    }
  }
  EXPECT_EQ(worst <= 0, true, what, worst);
  EXPECT_EQ(worst_lse <= 1e-5, true, what, worst_lse);
}

TEST(AgainstDefinition) {
  ExpectDefinition(Problem({0}, 1), "the first token");
  ExpectDefinition(Problem({0, 37}, 3), "few queries");
  ExpectDefinition(Problem({250, 0}, 33), "tiles of queries");
  ExpectDefinition(Problem({250, 99, 5}, 2, 0, 0, false), "all in the ring");
  ExpectDefinition(Problem({700, 3, 511}, 5, 192), "every entry");
  ExpectDefinition(Problem({700, 250}, 2, 150, 71), "chosen entries");
  ExpectDefinition(Problem({700, 250}, 40, 150, 71), "chosen entries, tiles");
  ExpectDefinition(Problem({300}, 20, 64, 0, true, {70, 64, 6, 17}), "more heads than a tile");
  ExpectDefinition(Problem({300}, 3, 64, 9, true, {1, 448, 64, 128}), "one head");
  ExpectDefinition(Problem({}, 3, 64), "no batch");
  ExpectDefinition(Problem({5, 9}, 0, 64), "no tokens");
}

TEST(WithoutRotation) {
  Problem problem({250, 0}, 9, 64);
  const auto turned = problem.Clean();
  problem.rotated = false;
  ExpectDefinition(problem, "not rotated");
  const Sizes& sizes = problem.sizes;
  const auto straight = problem.Clean();
  for (int64_t row = 0; row < 18 * sizes.h; ++row) {
    for (int64_t c = 0; c < sizes.nope; ++c) {
      EXPECT_EQ(turned.o[row * sizes.d() + c], straight.o[row * sizes.d() + c], row, c);
    }
  }
  EXPECT_EQ(turned.lse, straight.lse);
}

TEST(LargeScores) {
  for (float gain : {0.0f, 40.0f, 400.0f}) {
    for (float sink : {-20.0f, 0.0f, 20.0f}) {
      Problem problem({300}, 9, 64);
      problem.gain = gain;
      for (int64_t token = 0; token < 9; ++token) problem.SetQuery(token, token);
      for (int64_t head = 0; head < problem.sizes.h; ++head) problem.sink[head] = sink;
      ExpectDefinition(problem, "large scores");
    }
  }
}

TEST(AnySplitGivesTheSameBytes) {
  for (const Problem& problem :
       {Problem({700, 250}, 40, 150), Problem({700, 250}, 40, 150, 71), Problem({700}, 3, 150)}) {
    const auto whole = problem.Clean();
    EXPECT_EQ(problem.Run(Backwards) == whole, true, "backwards");
    EXPECT_EQ(problem.Run(Threads) == whole, true, "threads");
  }
}

// A query has the same bits in a chunk of any length, from the ring alone, and beside any other.
TEST(AQueryIsTheSameInAnyCall) {
  for (int64_t topk : {0, 71}) {
    const Problem problem({130, 700}, 40, 150, topk);
    const auto whole = problem.Clean();
    const int64_t row = problem.sizes.h * problem.sizes.d();
    for (int64_t size : {1, 2, 7, 33}) {
      for (int32_t first = 0; first + size <= 40; first += 13) {
        for (bool in_chunk : {true, false}) {
          const Problem part({130 + first, 700 + first}, size, 150, topk, in_chunk);
          const auto got = part.Clean();
          for (int64_t b = 0; b < 2; ++b) {
            const auto begin = whole.o.begin() + (b * 40 + first) * row;
            const auto mine = got.o.begin() + b * size * row;
            EXPECT_EQ(std::equal(mine, mine + size * row, begin), true, topk, size, first,
                      in_chunk);
            EXPECT_EQ(
                std::memcmp(&got.lse[b * size * part.sizes.h],
                            &whole.lse[(b * 40 + first) * part.sizes.h], size * part.sizes.h * 4),
                0, topk, size, first, in_chunk);
          }
        }
      }
    }
  }
}

// B3. Wild ids are skipped; one given twice counts twice.
TEST(AnyIndex) {
  for (const std::vector<int32_t>& ids : std::vector<std::vector<int32_t>>{
           {-1, -1, -1, -1}, {-1, 3, -1, 5}, {kMin, 3, kMax, 150}, {3, 3, 3, 5}, {9, 5, 0, 7}}) {
    for (int64_t t : {2, 12}) {
      Problem problem({700, 600}, t, 150, 4);
      for (int64_t i = 0; i < problem.idx.size(); ++i) problem.idx[i] = ids[i % 4];
      ExpectDefinition(problem, "ids");
    }
  }
}

TEST(AnyCount) {
  for (int32_t n : {kMin, -1, 0, 1, 63, 64, 65, 149, 150, 151, kMax}) {
    for (int64_t t : {2, 12}) {
      Problem problem({700, 600}, t, 150);
      for (int64_t i = 0; i < problem.n_visible.size(); ++i) problem.n_visible[i] = n;
      ExpectDefinition(problem, "counts");
    }
  }
}

// B4. Zeros, and the sink as the log-sum-exp.
TEST(NoKeyAtAll) {
  for (int64_t t : {2, 12}) {
    Problem problem({30, 20}, t, 64, 5);
    for (int64_t i = 0; i < 2 * t; ++i) {
      problem.positions[i] = i % 2 == 0 ? -1 : kMin;
      problem.n_visible[i] = 0;
    }
    problem.sink[0] = -kInf;
    const auto got = problem.Clean();
    for (uint16_t value : got.o) EXPECT_EQ(value & 0x7FFF, 0);
    for (size_t i = 0; i < got.lse.size(); ++i) EXPECT_EQ(got.lse[i], problem.sink[i % 3]);
  }
}

// Positions of which nobody holds a key, in any order: no address is made of them.
TEST(AnyPosition) {
  Problem problem({30, 20}, 9, 64, 5);
  const std::vector<int32_t> wild = {kMax, 12, kMin, kMax - 1, 13, 500, 501, 31, -1};
  for (int64_t i = 0; i < 18; ++i) problem.positions[i] = wild[i % 9];
  problem.Clean();
  for (int32_t start : {kMin, -5, kMax}) {
    problem.start[0] = problem.start[1] = start;
    problem.Clean();
  }
  AttentionParams params = problem.Params();
  Guarded<uint16_t> o(18 * problem.StrideO());
  params.o = o.data();
  params.ring = params.chunk = params.pool = KeyRows{};
  AttentionCpu(params, Whole);
  params.start = nullptr;
  AttentionCpu(params, Whole);
  for (int64_t i = 0; i < 18 * problem.StrideO(); ++i) {
    if (i % problem.StrideO() < problem.sizes.h * problem.sizes.d()) EXPECT_EQ(o[i] & 0x7FFF, 0, i);
  }
}

TEST(NanStaysInItsQuery) {
  for (int64_t t : {3, 12}) {
    Problem problem({700, 600}, t, 64);
    const auto clean = problem.Clean();
    const int64_t d = problem.sizes.d(), row = problem.sizes.h * d;
    problem.q[problem.StrideQ() + d + 5] = FloatToBf16(kNan);  // token 1, head 1
    const auto got = problem.Clean();
    for (int64_t i = 0; i < 2 * t * row; ++i) {
      const float value = Bf16ToFloat(got.o[i]);
      if (i / d == problem.sizes.h + 1) {
        EXPECT_EQ(std::isnan(value), true, i);
      } else {
        EXPECT_EQ(got.o[i], clean.o[i], i);
      }
    }
  }
}

#if defined(__x86_64__)
// XLA's threads flush subnormal numbers to zero; results must not depend on it.
TEST(SubnormalNumbersCount) {
  constexpr unsigned kFlush = 0x8040;  // of results and of operands, in MXCSR
  for (int64_t t : {2, 12}) {
    Problem problem({0, 9}, t);
    for (Store* store : {&problem.ring, &problem.chunk}) {
      for (int64_t i = 0; i < store->scale.size(); ++i) store->scale[i] = 0;  // 2^-127
      for (int64_t i = 0; i < store->rope.size(); ++i) store->rope[i] = 3;
    }
    const auto expected = problem.Clean();
    EXPECT_EQ(std::count(expected.o.begin(), expected.o.end(), 0) < 100, true);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | kFlush);
    const auto got = problem.Clean();
    const auto cut = problem.Run(Backwards);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    EXPECT_EQ(got == expected, true, "flushing");
    EXPECT_EQ(cut == expected, true, "flushing, one by one");
    EXPECT_EQ(after & kFlush, kFlush);  // the caller's mode is back
  }
}
#endif

// Offsets are 64 bits wide (acceptance row A23): the last entries of a pool that holds no memory.
TEST(OffsetsBeyond32Bits) {
  Sizes sizes{2, 448, 64, 1};
  constexpr int64_t kSlots = 12'000'000;
  const AddressSpace nope(kSlots * 448), scale(kSlots * 7), rope(kSlots * 128);
  if (!nope.ok() || !scale.ok() || !rope.ok()) {
    std::cerr << "OffsetsBeyond32Bits: skipped, no address space of 7 GB" << std::endl;
    return;
  }
  Problem problem({700}, 2, 64, 3, true, sizes);
  for (int64_t i = 0; i < 6; ++i) problem.idx[i] = static_cast<int32_t>(61 + i % 3);
  for (int64_t i = 0; i < 2; ++i) problem.n_visible[i] = 64;
  const auto want = problem.Clean();
  for (int64_t w = 61; w < 64; ++w) {
    const int64_t to = kSlots - 64 + w;
    std::memcpy(nope.data<uint8_t>() + to * 448, &problem.pool.nope[w * problem.pool.StrideNope()],
                448);
    std::memcpy(scale.data<uint8_t>() + to * 7, &problem.pool.scale[w * problem.pool.StrideScale()],
                7);
    std::memcpy(rope.data<uint16_t>() + to * 64, &problem.pool.rope[w * problem.pool.StrideRope()],
                128);
  }
  for (int64_t i = 0; i < 6; ++i) problem.idx[i] += static_cast<int32_t>(kSlots - 64);
  for (int64_t i = 0; i < 2; ++i) problem.n_visible[i] = static_cast<int32_t>(kSlots);
  AttentionParams params = problem.Params();
  params.pool = {
      nope.data<uint8_t>(), scale.data<uint8_t>(), rope.data<uint16_t>(), kSlots, 448, 7, 64};
  Guarded<uint16_t> o(2 * problem.StrideO());
  params.o = o.data();
  AttentionCpu(params, Whole);
  for (int64_t i = 0; i < 2 * sizes.h * 512; ++i) {
    EXPECT_EQ(o[i / (sizes.h * 512) * problem.StrideO() + i % (sizes.h * 512)], want.o[i], i);
  }
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
