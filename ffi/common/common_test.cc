// All of common/ in one program: number formats, scales, sizes, the loop over a pool, messages.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/bits.h"
#include "common/bytes.h"
#include "common/check.h"
#include "common/cuda.h"
#include "common/denormals.h"
#include "common/e2m1.h"
#include "common/e4m3.h"
#include "common/handler.h"
#include "common/nvfp4.h"
#include "common/parallel.h"
#include "common/rope.h"
#include "common/testing.h"
#include "common/ue8m0.h"

namespace dsv4 {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The non-negative values of a format, by code.
const std::vector<float> kE2m1Values = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

std::vector<float> E4m3Values() {
  std::vector<float> values;
  for (int code = 0; code < 0x7F; ++code) {
    const int exponent = code / 8, mantissa = code % 8;
    values.push_back(exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10));
  }
  return values;
}

// Code of the value nearest to `a` >= 0, of two equally near ones the even code.
uint8_t Nearest(const std::vector<float>& values, double a) {
  const double clamped = std::fmin(a, values.back());
  size_t best = 0;
  for (size_t code = 1; code < values.size(); ++code) {
    const double distance = std::fabs(values[code] - clamped);
    const double shortest = std::fabs(values[best] - clamped);
    if (distance < shortest || (distance == shortest && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best);
}

TEST(E2m1RoundTrip) {
  for (int code = 0; code < 16; ++code) {
    const float value = std::copysign(kE2m1Values[code % 8], code < 8 ? 1.0f : -1.0f);
    EXPECT_EQ(EncodeE2m1(value), code);
  }
}

TEST(E2m1Ties) {
  const std::vector<std::pair<float, float>> ties = {
      {0.25f, 0.0f}, {0.75f, 1.0f}, {1.25f, 1.0f}, {1.75f, 2.0f},
      {2.5f, 2.0f},  {3.5f, 4.0f},  {5.0f, 4.0f},
  };
  for (size_t i = 0; i < ties.size(); ++i) {
    const auto [tie, value] = ties[i];
    EXPECT_EQ(kE2m1Values[EncodeE2m1(tie)], value, tie);
    EXPECT_EQ(EncodeE2m1(-tie), EncodeE2m1(tie) + 8, tie);
    EXPECT_EQ(EncodeE2m1(std::nextafter(tie, 0.0f)), i, tie);
    EXPECT_EQ(EncodeE2m1(std::nextafter(tie, 6.0f)), i + 1, tie);
    EXPECT_EQ(EncodeE2m1(-std::nextafter(tie, 0.0f)), i + 8, tie);
    EXPECT_EQ(EncodeE2m1(-std::nextafter(tie, 6.0f)), i + 9, tie);
  }
}

TEST(E2m1Extremes) {
  for (float x : {6.0f, std::nextafter(6.0f, kInf), 8.0f, kFloat32Max, kInf, kNan}) {
    EXPECT_EQ(EncodeE2m1(x), 0x7, x);
    EXPECT_EQ(EncodeE2m1(-x), 0xF, x);
  }
  EXPECT_EQ(EncodeE2m1(0.0f), 0x0);
  EXPECT_EQ(EncodeE2m1(-0.0f), 0x8);
  EXPECT_EQ(EncodeE2m1(-std::numeric_limits<float>::denorm_min()), 0x8);
}

TEST(E4m3DecodesEveryCode) {
  const std::vector<float> values = E4m3Values();
  EXPECT_EQ(values.back(), kE4m3Max);
  EXPECT_EQ(values[1], kE4m3MinSubnormal);
  for (int code = 0; code < 0x7F; ++code) {
    EXPECT_EQ(FloatBits(DecodeE4m3(code)), FloatBits(values[code]), code);
    EXPECT_EQ(FloatBits(DecodeE4m3(code + 0x80)), FloatBits(-values[code]), code);
  }
  EXPECT_EQ(std::isnan(DecodeE4m3(0x7F)), true);
  EXPECT_EQ(std::isnan(DecodeE4m3(0xFF)), true);
}

TEST(E4m3RoundTrip) {
  for (int code = 0; code < 0x7F; ++code) {
    EXPECT_EQ(EncodeE4m3(E4m3Values()[code]), code);
    EXPECT_EQ(EncodeE4m3(-E4m3Values()[code]), code + 0x80);
  }
}

TEST(E4m3Ties) {
  const std::vector<float> values = E4m3Values();
  for (int code = 0; code + 1 < 0x7F; ++code) {
    const float tie = (values[code] + values[code + 1]) / 2;  // exact
    EXPECT_EQ(EncodeE4m3(tie), code + code % 2, tie);
    EXPECT_EQ(EncodeE4m3(std::nextafter(tie, 0.0f)), code, tie);
    EXPECT_EQ(EncodeE4m3(std::nextafter(tie, kInf)), code + 1, tie);
    EXPECT_EQ(EncodeE4m3(-tie), code + code % 2 + 0x80, tie);
    EXPECT_EQ(EncodeE4m3(-std::nextafter(tie, 0.0f)), code + 0x80, tie);
    EXPECT_EQ(EncodeE4m3(-std::nextafter(tie, kInf)), code + 1 + 0x80, tie);
  }
}

TEST(E4m3Extremes) {
  // 464 would be the tie with the value after 448, were there one.
  for (float x : {448.0f, std::nextafter(448.0f, kInf), 464.0f, 480.0f, kFloat32Max, kInf}) {
    EXPECT_EQ(EncodeE4m3(x), 0x7E, x);
    EXPECT_EQ(EncodeE4m3(-x), 0xFE, x);
  }
  EXPECT_EQ(EncodeE4m3(kNan), 0x7F);
  EXPECT_EQ(EncodeE4m3(-kNan), 0x7F);
  EXPECT_EQ(EncodeE4m3(-0.0f), 0x80);
  EXPECT_EQ(EncodeE4m3(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(FormatsOverAllBf16) {
  const std::vector<float> e4m3_values = E4m3Values();
  for (uint32_t bits = 0; bits <= 0x7F80; ++bits) {
    const float x = Bf16ToFloat(static_cast<uint16_t>(bits));
    EXPECT_EQ(EncodeE2m1(x), Nearest(kE2m1Values, x), x);
    EXPECT_EQ(EncodeE2m1(-x), Nearest(kE2m1Values, x) + 0x8, x);
    EXPECT_EQ(EncodeE4m3(x), Nearest(e4m3_values, x), x);
    EXPECT_EQ(EncodeE4m3(-x), Nearest(e4m3_values, x) + 0x80, x);
  }
}

TEST(PowerOfTwoScalesOfAllBf16) {
  for (uint32_t bits = 0; bits <= 0x7FFF; ++bits) {
    EXPECT_EQ(Fp8ScaleByteOfBf16(bits), Fp8ScaleByte(bits << 16), bits);
    EXPECT_EQ(Mxfp4ScaleByteOfBf16(bits), Mxfp4ScaleByte(bits << 16), bits);
    for (const uint32_t byte : {Fp8ScaleByteOfBf16(bits), Mxfp4ScaleByteOfBf16(bits)}) {
      const uint32_t inverse = FloatBits(InverseScale(byte)) >> 16;
      EXPECT_EQ(InverseScaleBf16x2(byte), inverse << 16 | inverse, byte);
    }
  }
}

TEST(Bf16Values) {
  EXPECT_EQ(Bf16ToFloat(0x3F80), 1.0f);
  EXPECT_EQ(Bf16ToFloat(0xC049), -3.140625f);
  EXPECT_EQ(Bf16ToFloat(0x0001), 0x1p-133f);
  EXPECT_EQ(Bf16ToFloat(0x7F7F), 0x1.FEp127f);
  EXPECT_EQ(FloatBits(Bf16ToFloat(0x8000)), 0x80000000u);
  EXPECT_EQ(Bf16ToFloat(0xFF80), -kInf);
}

TEST(Bf16Rounding) {
  for (uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t magnitude = 0; magnitude < 0x7F80; ++magnitude) {  // the last neighbour is Inf
      const uint32_t code = sign | magnitude;
      const uint32_t bits = code << 16;
      EXPECT_EQ(FloatToBf16(FloatFromBits(bits)), code);
      EXPECT_EQ(FloatToBf16(FloatFromBits(bits + 0x7FFF)), code);
      EXPECT_EQ(FloatToBf16(FloatFromBits(bits + 0x8000)), code + code % 2);
      EXPECT_EQ(FloatToBf16(FloatFromBits(bits + 0x8001)), code + 1);
    }
  }
  EXPECT_EQ(FloatToBf16(1.0f / 3.0f), 0x3EAB);
  EXPECT_EQ(FloatToBf16(kFloat32Max), 0x7F80);
  EXPECT_EQ(FloatToBf16(-kFloat32Max), 0xFF80);
  EXPECT_EQ(FloatToBf16(kInf), 0x7F80);
  EXPECT_EQ(FloatToBf16(-kInf), 0xFF80);
  // Quiet, signalling, and one that rounding up would turn into -0.
  for (uint32_t nan : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0xFF800001u, 0xFFFFFFFFu}) {
    EXPECT_EQ(FloatToBf16(FloatFromBits(nan)), 0x7FC0, nan);
  }
}

TEST(TokenGlobalScales) {
  EXPECT_EQ(TokenGlobalScale(0.0f), 1.0f);
  EXPECT_EQ(FloatBits(TokenGlobalScale(kNan)), 0x7FC00000u);
  EXPECT_EQ(FloatBits(TokenGlobalScale(-kNan)), 0x7FC00000u);
  // 0x1.8618618p-12 is 1 / 2688 in FP32; its products in double are exact before they are rounded.
  for (float amax : {1.0f, 2688.0f, 3.0f, 0x1p-80f, kFloat32Max}) {
    EXPECT_EQ(TokenGlobalScale(amax), static_cast<float>(amax * 0x1.861862p-12), amax);
  }
  EXPECT_EQ(TokenGlobalScale(kInf), TokenGlobalScale(kFloat32Max));
  for (float amax : {std::numeric_limits<float>::denorm_min(), 0x1p-126f, 0x1.4p-89f}) {
    EXPECT_EQ(TokenGlobalScale(amax), 0x1p-100f, amax);
  }
  EXPECT_EQ(TokenGlobalScale(0x1.6p-89f) > 0x1p-100f, true);
}

TEST(StaticGlobalScales) {
  for (float scale : {0x1p-100f, 1e-3f, 1.0f, 0x1p100f}) {
    EXPECT_EQ(StaticGlobalScale(scale), scale);
  }
  for (float scale : {0x1.FFFFFEp-101f, 0x1p-140f, 0.0f, -0.0f, -1.0f, -kInf}) {
    EXPECT_EQ(StaticGlobalScale(scale), 0x1p-100f, scale);
  }
  EXPECT_EQ(StaticGlobalScale(0x1.000002p100f), 0x1p100f);
  EXPECT_EQ(StaticGlobalScale(kInf), 0x1p100f);
  EXPECT_EQ(std::isnan(StaticGlobalScale(kNan)), true);
}

TEST(UnroundedBlockScales) {
  EXPECT_EQ(UnroundedBlockScale(12.0f, 6.0f), 2.0f);
  EXPECT_EQ(UnroundedBlockScale(1.0f, 6.0f), 1.0f / 6.0f);
  for (float six_global : {6.0f, 0.0f, kInf, kNan}) {
    EXPECT_EQ(UnroundedBlockScale(0.0f, six_global), 1.0f, six_global);
    EXPECT_EQ(std::isnan(UnroundedBlockScale(kNan, six_global)), true, six_global);
  }
  EXPECT_EQ(std::isnan(UnroundedBlockScale(1.0f, kNan)), true);
  // Both clamps, at and beyond.
  EXPECT_EQ(UnroundedBlockScale(448.0f, 1.0f), 448.0f);
  EXPECT_EQ(UnroundedBlockScale(449.0f, 1.0f), 448.0f);
  EXPECT_EQ(UnroundedBlockScale(kInf, 1.0f), 448.0f);
  EXPECT_EQ(UnroundedBlockScale(1.0f, 0.0f), 448.0f);
  EXPECT_EQ(UnroundedBlockScale(0x1p-9f, 1.0f), 0x1p-9f);
  EXPECT_EQ(UnroundedBlockScale(0x1.8p-9f, 1.0f), 0x1.8p-9f);
  EXPECT_EQ(UnroundedBlockScale(0x1p-10f, 1.0f), 0x1p-9f);
  EXPECT_EQ(UnroundedBlockScale(std::numeric_limits<float>::denorm_min(), 6.0f), 0x1p-9f);
  EXPECT_EQ(UnroundedBlockScale(1.0f, kInf), 0x1p-9f);
  // An infinite block counts as the largest finite one, for the quotient as for the token.
  EXPECT_EQ(UnroundedBlockScale(kInf, kFloat32Max / 2), 2.0f);
}

// The largest block of a token gets the largest scale, and the code of its amax is 6.
TEST(LargestBlockOfAToken) {
  for (float amax : {0x1p-80f, 1.0f, 3.140625f, 0x1.FEp127f}) {
    const float global = TokenGlobalScale(amax);
    const uint8_t scale = EncodeE4m3(UnroundedBlockScale(amax, 6.0f * global));
    EXPECT_EQ(DecodeE4m3(scale), 448.0f, amax);
    EXPECT_EQ(EncodeE2m1(amax / (448.0f * global)), 7, amax);
  }
}

TEST(PackedBytesOfEveryDtype) {
  using ffi::DataType;
  for (int64_t count : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{7}, (int64_t{1} << 33) + 1}) {
    EXPECT_EQ(PackedBytes(DataType::F32, count), 4 * count);
    EXPECT_EQ(PackedBytes(DataType::BF16, count), 2 * count);
    EXPECT_EQ(PackedBytes(DataType::F8E4M3FN, count), count);
    EXPECT_EQ(PackedBytes(DataType::F8E8M0FNU, count), count);
  }
  EXPECT_EQ(PackedBytes(DataType::F4E2M1FN, 0), 0);
  EXPECT_EQ(PackedBytes(DataType::F4E2M1FN, 1), 1);
  EXPECT_EQ(PackedBytes(DataType::F4E2M1FN, 2), 1);
  EXPECT_EQ(PackedBytes(DataType::F4E2M1FN, 7), 4);
  EXPECT_EQ(PackedBytes(DataType::F4E2M1FN, (int64_t{1} << 33) + 1), (int64_t{1} << 32) + 1);
  for (DataType dtype : {DataType::INVALID, DataType::PRED, DataType::S4, DataType::U8,
                         DataType::S32, DataType::F16, DataType::F64, DataType::F8E5M2}) {
    EXPECT_EQ(PackedBytes(dtype, 4), -1, static_cast<int>(dtype));
  }
}

TEST(Alignment) {
  alignas(64) static const char base[64] = {};
  EXPECT_EQ(IsAligned(base, 448, 16), true);
  EXPECT_EQ(IsAligned(base + 16, 0, 16), true);
  EXPECT_EQ(IsAligned(base + 1, 448, 16), false);
  EXPECT_EQ(IsAligned(base + 8, 448, 16), false);
  EXPECT_EQ(IsAligned(base + 8, 448, 8), true);
  EXPECT_EQ(IsAligned(base, 8, 16), false);
  EXPECT_EQ(IsAligned(base + 1, 7, 1), true);
  EXPECT_EQ(IsAligned(nullptr, 0, 16), true);
}

#if defined(__x86_64__)
TEST(SubnormalNumbersAreKept) {
  volatile float smallest_normal = 0x1p-126f, half = 0.5f, product;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // as XLA's threads: operands and results are flushed to zero
  product = smallest_normal * half;
  const float flushed = product;
  {
    const KeepDenormals keep_denormals;
    product = smallest_normal * half;
  }
  const float kept = product;
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_EQ(FloatBits(flushed), 0u);
  EXPECT_EQ(FloatBits(kept), FloatBits(0x1p-127f));
  EXPECT_EQ(after & 0x8040, 0x8040u);
}
#endif

// What ParallelFor asks of a pool, as in ffi::ThreadPool: Schedule takes a task it can own.
class Pool {
 public:
  explicit Pool(int64_t threads) : threads_(threads) {}
  virtual ~Pool() = default;
  int64_t num_threads() const { return threads_; }
  void Schedule(std::function<void()> task) { Take(std::move(task)); }

 protected:
  virtual void Take(std::function<void()> task) = 0;

 private:
  int64_t threads_;
};

// Runs a task where it is scheduled, as ffi::ThreadPool does when XLA has no pool.
class InlinePool : public Pool {
 public:
  using Pool::Pool;

 private:
  void Take(std::function<void()> task) override { task(); }
};

// All its threads are busy until RunLate().
class BusyPool : public Pool {
 public:
  using Pool::Pool;
  void RunLate() {
    for (auto& task : tasks_) task();
  }
  size_t size() const { return tasks_.size(); }

 private:
  void Take(std::function<void()> task) override { tasks_.push_back(std::move(task)); }
  std::vector<std::function<void()>> tasks_;
};

class RealPool : public Pool {
 public:
  using Pool::Pool;
  ~RealPool() override {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void Take(std::function<void()> task) override { threads_.emplace_back(std::move(task)); }
  std::vector<std::thread> threads_;
};

struct Range {
  int64_t begin, end;
};

// The ranges that `fn` was called with, in order.
std::vector<Range> RangesOf(Pool& pool, int64_t count, int64_t grain) {
  std::vector<Range> ranges;
  std::mutex mutex;
  ParallelFor(pool, count, grain, [&](int64_t begin, int64_t end) {
    const std::lock_guard<std::mutex> lock(mutex);
    ranges.push_back({begin, end});
  });
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

void ExpectCovered(Pool& pool, int64_t count, int64_t grain) {
  const std::vector<Range> ranges = RangesOf(pool, count, grain);
  int64_t next = 0;
  for (const Range& range : ranges) {
    EXPECT_EQ(range.begin, next, count, grain);
    EXPECT_EQ(range.end > range.begin, true, count, grain);
    EXPECT_EQ(ranges.size() == 1 || range.end - range.begin >= grain, true, count, grain);
    next = range.end;
  }
  EXPECT_EQ(next, count, grain);
  const int64_t most = std::min(pool.num_threads() + 1, count / std::max(grain, int64_t{1}));
  const int64_t expected = count == 0 ? 0 : std::max(most, int64_t{1});
  EXPECT_EQ(static_cast<int64_t>(ranges.size()), expected, count, grain);
}

void ExpectCovered(Pool& pool) {
  for (int64_t count : {0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000}) {
    for (int64_t grain : {-1, 0, 1, 2, 3, 8, 64, 1001}) ExpectCovered(pool, count, grain);
  }
  ExpectCovered(pool, int64_t{1} << 42, int64_t{1} << 18);
}

TEST(ParallelForCoversEveryIndexOnce) {
  for (int64_t threads : {0, 1, 2, 3, 16}) {
    InlinePool runs_at_once(threads);
    ExpectCovered(runs_at_once);
    BusyPool never_runs(threads);
    ExpectCovered(never_runs);
    RealPool real(threads);
    for (int64_t count : {0, 1, 2, 9, 65}) ExpectCovered(real, count, 1);
    ExpectCovered(real, 1000, 64);
  }
}

TEST(ParallelForSchedulesNothingForOneRange) {
  BusyPool pool(4);
  ParallelFor(pool, 7, 8, [](int64_t, int64_t) {});
  ParallelFor(pool, 15, 8, [](int64_t, int64_t) {});
  ParallelFor(pool, 0, 1, [](int64_t, int64_t) {});
  EXPECT_EQ(pool.size(), size_t{0});
  ParallelFor(pool, 16, 8, [](int64_t, int64_t) {});
  EXPECT_EQ(pool.size(), size_t{1});
}

// Tasks that XLA runs after the handler returned must not touch what the handler had.
TEST(ParallelForIsOverWhenItReturns) {
  BusyPool pool(3);
  int64_t covered = 0;
  {
    // On the heap, so that the address sanitizer sees a late task reading it.
    auto fn = std::make_unique<std::function<void(int64_t, int64_t)>>(
        [&covered](int64_t begin, int64_t end) { covered += end - begin; });
    ParallelFor(pool, 100, 1, *fn);
  }
  EXPECT_EQ(covered, 100);
  EXPECT_EQ(pool.size(), size_t{3});
  pool.RunLate();
  EXPECT_EQ(covered, 100);
}

// The caller waits for a range that another thread has begun, and sees what it wrote there.
TEST(ParallelForWaitsForEveryRange) {
  RealPool pool(1);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> other_began{false};
  std::vector<int64_t> squares(1000, -1);
  ParallelFor(pool, 1000, 500, [&](int64_t begin, int64_t end) {
    if (std::this_thread::get_id() == caller) {
      while (!other_began) std::this_thread::yield();
    } else {
      other_began = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    for (int64_t i = begin; i < end; ++i) squares[i] = i * i;
  });
  for (int64_t i = 0; i < 1000; ++i) EXPECT_EQ(squares[i], i * i, i);
}

void ExpectInvalid(const ffi::Error& error, const std::string& message) {
  EXPECT_EQ(error.failure(), true);
  EXPECT_EQ(error.errc() == ffi::ErrorCode::kInvalidArgument, true);
  EXPECT_EQ(error.message(), message);
}

std::string Shape(const std::vector<int64_t>& dims) { return ToString(Dims(dims)); }

TEST(ShapesAsText) {
  EXPECT_EQ(Shape({}), "[]");
  EXPECT_EQ(Shape({3}), "[3]");
  EXPECT_EQ(Shape({2, 0, int64_t{1} << 33}), "[2, 0, 8589934592]");
}

TEST(CheckDtypeMessages) {
  using ffi::DataType;
  EXPECT_EQ(CheckDtype("op", "x", DataType::F32, {DataType::BF16, DataType::F32}).success(), true);
  ExpectInvalid(CheckDtype("op", "x", DataType::S32, {DataType::BF16}),
                "dsv4.op: x must be bfloat16, got int32 (4)");
  ExpectInvalid(CheckDtype("op", "scale", DataType::F64,
                           {DataType::F8E4M3FN, DataType::F8E8M0FNU, DataType::F4E2M1FN}),
                "dsv4.op: scale must be float8_e4m3fn or float8_e8m0fnu or float4_e2m1fn, got "
                "another dtype (12)");
  ExpectInvalid(CheckDtype("op", "x", DataType::U8, {DataType::F32}),
                "dsv4.op: x must be float32, got uint8 (6)");
}

TEST(CheckShapeMessages) {
  const std::vector<int64_t> dims = {2, 3};
  const std::vector<int64_t> scalar;
  EXPECT_EQ(CheckShape("op", "x", dims, {2, 3}).success(), true);
  EXPECT_EQ(CheckShape("op", "x", scalar, {}).success(), true);
  ExpectInvalid(CheckShape("op", "x", dims, {2, 4}), "dsv4.op: x must be [2, 4], got [2, 3]");
  ExpectInvalid(CheckShape("op", "x", dims, {2}), "dsv4.op: x must be [2], got [2, 3]");
  ExpectInvalid(CheckShape("op", "x", dims, {2, 3, 1}), "dsv4.op: x must be [2, 3, 1], got [2, 3]");
  ExpectInvalid(CheckShape("op", "x", scalar, {1}), "dsv4.op: x must be [1], got []");
}

TEST(CheckAbiMessage) {
  EXPECT_EQ(CheckAbi("op", kAbi).success(), true);
  ExpectInvalid(CheckAbi("op", kAbi + 6),
                "dsv4.op: abi must be " + std::to_string(kAbi) + " (this library's), got " +
                    std::to_string(kAbi + 6) +
                    ": the executable comes from another version of dsv4_jax; clear the "
                    "compilation cache");
}

TEST(ReturnIfError) {
  int evaluated = 0;
  const auto handler = [&](bool fails) {
    DSV4_RETURN_IF_ERROR((++evaluated, fails ? InvalidArgument("op", "x") : ffi::Error::Success()));
    return InvalidArgument("op", "the end");
  };
  EXPECT_EQ(handler(true).message(), "dsv4.op: x");
  EXPECT_EQ(handler(false).message(), "dsv4.op: the end");
  EXPECT_EQ(evaluated, 2);
}

TEST(DriverOlderThanRuntime) {
  EXPECT_EQ(OldDriverMessage(12040, 13000),
            "the NVIDIA driver supports CUDA 12.4, the library was built with CUDA 13.0: update "
            "the driver");
}

TEST(LaunchStatusAsError) {
  EXPECT_EQ(ToError("op", {}).success(), true);
  const ffi::Error internal = ToError("op", {LaunchError::kInternal, "CUDA error"});
  EXPECT_EQ(internal.errc() == ffi::ErrorCode::kInternal, true);
  EXPECT_EQ(internal.message(), "dsv4.op: CUDA error");
  const ffi::Error none = ToError("op", NotBuiltForCuda());
  EXPECT_EQ(none.errc() == ffi::ErrorCode::kUnimplemented, true);
  EXPECT_EQ(none.message().find("dsv4.op: this build of dsv4_jax has no CUDA code"), size_t{0});
}

#ifndef DSV4_CUDA
TEST(BuildWithoutCuda) {
  EXPECT_EQ(std::string(CudaArchs()), "");
  EXPECT_EQ(CudaRuntimeVersion(), 0);
  EXPECT_EQ(CudaDriverVersion(), 0);
}
#endif

// Every position a model has at a few frequencies, then angles of every size.
TEST(SinesAndCosines) {
  double worst = 0, worst_far = 0;
  const auto error = [](float angle) {
    const SinCos got = SinCosOf(angle);
    return std::max(std::fabs(got.sin - std::sin(static_cast<double>(angle))),
                    std::fabs(got.cos - std::cos(static_cast<double>(angle))));
  };
  for (int32_t position = 0; position < 1 << 20; ++position) {
    for (float frequency : {1.0f, 0.7498942f, 3.6355385e-3f}) {
      worst = std::max(worst, error(static_cast<float>(position) * frequency));
    }
  }
  EXPECT_EQ(worst <= 1.5e-7, true, worst);
  for (uint32_t bits = 0; bits < FloatBits(0x1p32f); bits += 997) {
    const float angle = FloatFromBits(bits);
    double& largest = angle < 0x1p20f ? worst : worst_far;
    largest = std::max({largest, error(angle), error(-angle)});
  }
  EXPECT_EQ(worst <= 1.5e-7, true, worst);
  EXPECT_EQ(worst_far <= 1e-6, true, worst_far);
  // Small and negative angles keep their signs, and an angle that is no number or too large is NaN.
  EXPECT_EQ(FloatBits(SinCosOf(0.0f).sin), 0u);
  EXPECT_EQ(SinCosOf(1e-20f).sin, 1e-20f);
  EXPECT_EQ(SinCosOf(-1e-20f).sin, -1e-20f);
  EXPECT_EQ(SinCosOf(0.0f).cos, 1.0f);
  for (float bad : {0x1p32f, -0x1p40f, std::numeric_limits<float>::infinity(),
                    std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_EQ(std::isnan(SinCosOf(bad).sin) && std::isnan(SinCosOf(bad).cos), true, bad);
  }
  // The most negative position is an angle like others.
  EXPECT_EQ(std::isnan(SinCosAt(std::numeric_limits<int32_t>::min(), 1.0f).sin), false);
}

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
