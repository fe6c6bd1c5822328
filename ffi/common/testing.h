// What the C++ tests need of a framework: checks that go on after a failure, buffers whose
// surroundings are watched, address space without memory behind it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iomanip>
#include <iostream>
#include <type_traits>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes)
#endif

// EXPECT_EQ(actual, expected, context...): the context is printed with a failure.
#define EXPECT_EQ(...) dsv4::Expect({__FILE__, __LINE__, #__VA_ARGS__}, __VA_ARGS__)

#define TEST(name)                                                                            \
  void name();                                                                                \
  [[maybe_unused]] const bool name##_listed = (dsv4::Tests().push_back({#name, name}), true); \
  void name()

namespace dsv4 {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

inline int failures = 0;

// A sweep over all bit patterns can fail at each; the first few say enough.
constexpr int kMaxReports = 20;

struct Place {
  const char* file;
  int line;
  const char* text;
};

template <typename T>
void Print(const char* before, const T& value) {
  std::cerr << before;
  if constexpr (std::is_integral_v<T> && sizeof(T) == 1) {
    std::cerr << static_cast<int>(value);
  } else {
    std::cerr << std::setprecision(17) << value;
  }
}

template <typename Actual, typename Expected, typename... Context>
void Expect(const Place& place, const Actual& actual, const Expected& expected,
            const Context&... context) {
  if (actual == expected) return;
  if (++failures > kMaxReports) return;
  std::cerr << place.file << ":" << place.line << ": EXPECT_EQ(" << place.text << ")";
  Print(": got ", actual);
  Print(", expected ", expected);
  (Print(", ", context), ...);
  std::cerr << std::endl;
}

template <typename T, typename... Context>
void Expect(const Place& place, const std::vector<T>& actual, const std::vector<T>& expected,
            const Context&... context) {
  Expect(place, actual.size(), expected.size(), "sizes", context...);
  for (size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    if (actual[i] == expected[i]) continue;
    return Expect(place, actual[i], expected[i], "first at index", i, context...);
  }
}

// The exit code of a test program.
inline int RunAll() {
  for (const Test& test : Tests()) {
    const int before = failures;
    test.run();
    std::cerr << (failures == before ? "ok     " : "FAILED ") << test.name << std::endl;
  }
  std::cerr << Tests().size() << " tests, " << failures << " failed checks" << std::endl;
  return Tests().empty() || failures > 0;
}

// `count` elements, `offset` bytes away from an aligned address, between guard bytes: a write there
// is seen by Intact(), and a read too where the address sanitizer runs.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count, int64_t offset = 0)
      : bytes_(count * static_cast<int64_t>(sizeof(T))),
        offset_(kGuardBytes + offset),
        storage_(offset_ + bytes_ + kGuardBytes, kGuard) {
    Poison();
  }
  Guarded(Guarded&&) = default;
  Guarded(const Guarded& other) : Guarded(other.size(), other.offset_ - kGuardBytes) {
    std::memcpy(data(), other.data(), bytes_);
  }

  int64_t size() const { return bytes_ / static_cast<int64_t>(sizeof(T)); }
  T* data() { return reinterpret_cast<T*>(storage_.data() + offset_); }
  const T* data() const { return reinterpret_cast<const T*>(storage_.data() + offset_); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  std::vector<T> Values() const { return std::vector<T>(data(), data() + size()); }
  void Fill(uint8_t byte) { std::memset(data(), byte, bytes_); }

  bool Intact() const {
    ASAN_UNPOISON_MEMORY_REGION(storage_.data(), storage_.size());
    const auto is_guard = [](uint8_t byte) { return byte == kGuard; };
    const bool intact = std::all_of(storage_.begin(), storage_.begin() + offset_, is_guard) &&
                        std::all_of(storage_.begin() + offset_ + bytes_, storage_.end(), is_guard);
    Poison();
    return intact;
  }

 private:
  static constexpr int64_t kGuardBytes = 64;
  static constexpr uint8_t kGuard = 0xB7;

  void Poison() const {
    ASAN_POISON_MEMORY_REGION(storage_.data(), offset_);
    ASAN_POISON_MEMORY_REGION(storage_.data() + offset_ + bytes_, kGuardBytes);
  }

  int64_t bytes_;
  int64_t offset_;
  std::vector<uint8_t> storage_;
};

// Zeros; memory only for the pages that are touched.
class AddressSpace {
 public:
  explicit AddressSpace(int64_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  AddressSpace(const AddressSpace&) = delete;
  ~AddressSpace() {
    if (ok()) munmap(data_, bytes_);
  }

  bool ok() const { return data_ != MAP_FAILED; }
  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  int64_t bytes_;
  void* data_;
};

}  // namespace dsv4
