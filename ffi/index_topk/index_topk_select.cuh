// The exact set of the largest of a query's scores, ascending ids. sm_90 and later.
//
// A thread block chooses for a query among orders (ScoreOrder; NaN: 1, no entry: 0). Of a long row
// it first looks at the largest orders of groups of entries, which the scores came with: what is
// below the k-th best of them cannot be in the set, so it reads only groups that reach it, and
// keeps of those what does. Rows that are short, or too short for such a bound, are kept whole; of
// what does not fit, the row itself serves. Each warp has a stretch of ascending ids. The order of
// the k-th best is found from counts of 11, 11 and 10 bits in shared memory, soon enough when a bin
// is taken whole. Then every warp counts what it has of the set and of its ties, learns what warps
// before it have, and writes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/barrier.cuh"
#include "common/bits.h"
#include "index_topk/index_topk_order.h"

namespace dsv4 {
namespace index_topk {

constexpr int kBins = 2048;
constexpr int kMaxTopk = 2048;
constexpr int kShortRow = 8192;  // these are kept whole

struct SelectArgs {
  IndexTopkParams p;
  const uint32_t* order;    // [rows, slots]; nullptr: no query needs scores
  const uint32_t* largest;  // [rows, IndexTopkGroups(slots)] orders of groups, or nullptr
  int64_t first_token;
};

// The score of an order.
DSV4_HOST_DEVICE inline float ScoreOf(uint32_t order) {
  if (order <= 1) return FloatFromBits(0x7FC00000u);
  return FloatFromBits(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

template <int kThreads_, int kVectors_, int kRoom_, int kListed_, int kBlocks_, bool kShort_>
struct Selecting {
  static constexpr int kThreads = kThreads_, kWarps = kThreads / 32;
  static constexpr int kVectors = kVectors_;  // of four groups, a thread's
  static constexpr int kGroups = 4 * kThreads * kVectors;
  static constexpr int kRoom = kRoom_;             // entries that a warp can keep
  static constexpr int kRow = 2 * kWarps * kRoom;  // entries that are kept whole, at most
  static constexpr int kListed = kListed_;         // groups that reach the bound, at most
  static constexpr int kBlocks = kBlocks_;         // of a multiprocessor
  static constexpr bool kShort = kShort_;          // short rows have a bound of their own
};

struct Found {
  uint32_t bin, left, count;  // where the k-th best is, which of the bin's it is, how many it has
};

template <int kThreads_>
struct Counts {
  static constexpr int kThreads = kThreads_, kWarps = kThreads / 32;
  alignas(16) uint32_t bins[kBins];
  uint32_t totals[32];  // of warps
  uint32_t chosen[32];  // of a warp's entries: certain ones, and ties above 16 bits
  Found found;
};

template <typename Size>
struct SelectShared : Counts<Size::kThreads> {
  union {
    struct {
      alignas(16) uint32_t order[Size::kWarps][Size::kRoom];
      int32_t id[Size::kWarps][Size::kRoom];
      uint16_t listed[Size::kListed];
    } kept;
    uint32_t row[Size::kRow / 8 * 9];  // 36 words for 32 entries: spreads the banks
  };
};

// What a warp chooses from, ascending ids.
struct Entries {
  const uint32_t* order;
  const int32_t* id;  // nullptr: first, first + 1, ..
  int first, count;
  int spread;  // kSpread if as `row` is, or 0

  static constexpr int kSpread = ~3;
  __device__ __forceinline__ const uint4* At(int at) const {
    return reinterpret_cast<const uint4*>(order + at + (at >> 3 & spread));
  }
};

// What is no entry has order 0, below all that are, of which there are enough.
__device__ __forceinline__ void DropBeyond(uint4& order, int at, int n) {
  if (at + 4 <= n) return;
  if (at >= n) order.x = 0;
  if (at + 1 >= n) order.y = 0;
  if (at + 2 >= n) order.z = 0;
  if (at + 3 >= n) order.w = 0;
}

// A warp's entries, four a lane at a time, in their order.
template <typename Use>
__device__ __forceinline__ void ForEach(const Entries& entries, const Use& use) {
  constexpr int kAtOnce = 2;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < entries.count; first += kAtOnce * 128) {
    uint4 order[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * 128 + lane * 4;
      order[i] = make_uint4(0, 0, 0, 0);
      if (at < entries.count) order[i] = *entries.At(at);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * 128;
      if (at >= entries.count) break;
      DropBeyond(order[i], at + lane * 4, entries.count);
      use(at + lane * 4, order[i]);
    }
  }
}

// The same of registers: entries from `begin` on, 128 consecutive ones a vector.
template <int kVectors>
struct Held {
  uint4 order[kVectors];
  int begin;
};

template <int kVectors, typename Use>
__device__ __forceinline__ void ForEach(const Held<kVectors>& held, const Use& use) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) use(0, held.order[i]);
}

// One more in the bin at `bins` + 4 `bin` where `counts`.
__device__ __forceinline__ void Count(uint32_t bins, uint32_t bin, bool counts) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p red.shared::cta.add.u32 [%0], 1;\n}" ::"r"(
          bins + 4 * bin),
      "r"(static_cast<uint32_t>(counts))
      : "memory");
}

// Sums of x over lanes up to this one.
__device__ __forceinline__ uint32_t SumOfLanes(uint32_t x, int lane) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t lower = __shfl_up_sync(~0u, x, lanes);
    if (lane >= lanes) x += lower;
  }
  return x;
}

// Of counts that all threads have made: the bin that holds the k-th from the top. Bins are zero
// then.
template <int kThreads>
__device__ __forceinline__ Found FindBin(Counts<kThreads>& shared, uint32_t k) {
  constexpr int kMine = kBins / kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lowest = kBins - kMine * (static_cast<int>(threadIdx.x) + 1);
  __syncthreads();
  uint32_t count[kMine], sum = 0;
#pragma unroll
  for (int i = 0; i < kMine; i += 2) {
    auto* const two = reinterpret_cast<uint2*>(shared.bins + lowest + i);
    count[i] = two->x;
    count[i + 1] = two->y;
    *two = make_uint2(0, 0);
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) sum += count[i];
  uint32_t above = SumOfLanes(sum, lane);
  if (lane == 31) shared.totals[warp] = above;
  __syncthreads();
  const uint32_t others = lane < warp ? shared.totals[lane] : 0;
  above += __reduce_add_sync(~0u, others) - sum;
  if (above < k && k <= above + sum) {  // one thread's
#pragma unroll
    for (int i = kMine - 1; i >= 0; --i) {
      if (above < k && k <= above + count[i]) {
        shared.found = {static_cast<uint32_t>(lowest + i), k - above, count[i]};
      }
      above += count[i];
    }
  }
  __syncthreads();
  return shared.found;
}

// Scores of at least `certain` are in the set, and of those of `tie` the `ties` with lowest ids.
struct Bar {
  uint32_t certain, tie, ties;
};

// Counts bits `shift` .. of entries whose bits from `above` are `prefix`.
template <int kShift, int kAbove, int kThreads, typename Entries>
__device__ __forceinline__ Found FindPart(Counts<kThreads>& shared, const Entries& entries,
                                          uint32_t prefix, uint32_t k) {
  const uint32_t bins = SharedAddress(shared.bins);
  ForEach(entries, [&](int, const uint4& order) {
    const uint32_t each[4] = {order.x, order.y, order.z, order.w};
    bool any = false;  // seldom
#pragma unroll
    for (int j = 0; j < 4; ++j) any |= each[j] >> kAbove == prefix;
    if (!any) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Count(bins, each[j] >> kShift & ((1u << (kAbove - kShift)) - 1),
            each[j] >> kAbove == prefix && each[j] > 0);
    }
  });
  return FindBin(shared, k);
}

// The order of the k-th best. Nothing is below `least`, a multiple of 1,024; the k-th best is not
// far above it, as a rule, if it is not 0.
template <int kThreads, typename Entries>
__device__ __forceinline__ Bar FindBar(Counts<kThreads>& shared, const Entries& entries, uint32_t k,
                                       uint32_t least) {
  const uint32_t bins = SharedAddress(shared.bins);
  Found found = {kBins - 1, 0, 0};
  uint32_t prefix = 0;
  if (least > 0) {
    ForEach(entries, [&](int, const uint4& order) {
      const uint32_t each[4] = {order.x, order.y, order.z, order.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Count(bins, min((each[j] - least) >> 10, uint32_t{kBins - 1}), each[j] > 0);
      }
    });
    found = FindBin(shared, k);
    prefix = (least >> 10) + found.bin;
  }
  if (found.bin == kBins - 1) {  // anything from there
    ForEach(entries, [&](int, const uint4& order) {
      const uint32_t each[4] = {order.x, order.y, order.z, order.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) Count(bins, each[j] >> 21, true);
    });
    found = FindBin(shared, k);
    prefix = found.bin;
    if (found.left == found.count) return {max(prefix << 21, 1u), ~0u, 0};
    found = FindPart<10, 21>(shared, entries, prefix, found.left);
    prefix = prefix << 11 | found.bin;
  }
  if (found.left == found.count) return {max(prefix << 10, 1u), ~0u, 0};
  found = FindPart<0, 10>(shared, entries, prefix, found.left);
  prefix = prefix << 10 | found.bin;
  return {prefix + 1, prefix, found.left};
}

__device__ __forceinline__ uint32_t Judge(uint32_t order, const Bar& bar) {
  return (order >= bar.certain ? 1u : 0u) + (order == bar.tie ? 1u << 16 : 0u);
}
__device__ __forceinline__ uint32_t Judge(const uint4& order, const Bar& bar) {
  return Judge(order.x, bar) + Judge(order.y, bar) + Judge(order.z, bar) + Judge(order.w, bar);
}

// Of a count of each warp: the sums of warps before this one, and of all.
struct Before {
  uint32_t mine, all;
};

template <int kThreads>
__device__ __forceinline__ Before CountBefore(Counts<kThreads>& shared, uint32_t count) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) shared.chosen[warp] = count;
  __syncthreads();
  const uint32_t chosen = lane < kThreads / 32 ? shared.chosen[lane] : 0;
  return {__reduce_add_sync(~0u, lane < warp ? chosen : 0), __reduce_add_sync(~0u, chosen)};
}

// The ids of the set, a lane's stretch of a warp's.
template <int kThreads>
__device__ __forceinline__ void WriteIds(Counts<kThreads>& shared, const Entries& entries,
                                         const Bar& bar, int32_t* idx) {
  const int lane = threadIdx.x % 32, each = (entries.count + 127) / 128 * 4;
  const int begin = lane * each, end = min(begin + each, entries.count);
  const auto vector_at = [&](int at) {
    uint4 order = *entries.At(at);
    DropBeyond(order, at, entries.count);
    return order;
  };
  uint32_t mine = 0;
#pragma unroll 4
  for (int at = begin; at < end; at += 4) mine += Judge(vector_at(at), bar);
  const uint32_t sum = SumOfLanes(mine, lane), all = __shfl_sync(~0u, sum, 31);
  // More ties than can be wanted are as good as those.
  const uint32_t before =
      CountBefore(shared, (all & 0xFFFF) | min(all >> 16, uint32_t{kMaxTopk}) << 16).mine;
  uint32_t over = (before & 0xFFFF) + ((sum - mine) & 0xFFFF);
  uint32_t same = (before >> 16) + ((sum - mine) >> 16);
#pragma unroll 2
  for (int at = begin; at < end; at += 4) {
    const uint4 order = vector_at(at);
    const uint32_t each_order[4] = {order.x, order.y, order.z, order.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool is_over = each_order[j] >= bar.certain, is_same = each_order[j] == bar.tie;
      if (is_over || (is_same && same < bar.ties)) {
        idx[over + min(same, bar.ties)] =
            entries.id == nullptr ? entries.first + at + j : entries.id[at + j];
      }
      over += is_over;
      same += is_same;
    }
  }
}

template <int kThreads, int kVectors>
__device__ __forceinline__ void WriteIds(Counts<kThreads>& shared, const Held<kVectors>& held,
                                         const Bar& bar, int32_t* idx) {
  const int lane = threadIdx.x % 32;
  uint32_t here[kVectors], sum[kVectors], mine = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    here[i] = Judge(held.order[i], bar);
    sum[i] = SumOfLanes(here[i], lane);
    mine += __shfl_sync(~0u, sum[i], 31);
  }
  uint32_t before = CountBefore(shared, mine).mine;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    uint32_t over = (before + sum[i] - here[i]) & 0xFFFF, same = before + sum[i] - here[i] >> 16;
    const uint32_t four[4] = {held.order[i].x, held.order[i].y, held.order[i].z, held.order[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool is_over = four[j] >= bar.certain, is_same = four[j] == bar.tie;
      if (is_over || (is_same && same < bar.ties)) {
        idx[over + min(same, bar.ties)] = held.begin + i * 128 + lane * 4 + j;
      }
      over += is_over;
      same += is_same;
    }
    before += __shfl_sync(~0u, sum[i], 31);
  }
}

// What needs no choice: scores that are wanted, and the ids where all entries are in the set.
// Whether they are.
template <int kThreads>
__device__ __forceinline__ bool WriteAll(const SelectArgs& args, int64_t token, int n,
                                         const uint32_t* order) {
  if (args.p.scores != nullptr) {
    float* scores = args.p.scores + token * args.p.slots;
    for (int64_t i = threadIdx.x; i < args.p.slots; i += kThreads) {
      scores[i] = i < n ? ScoreOf(order[i]) : FloatFromBits(0xFF800000u);
    }
  }
  const int topk = static_cast<int>(args.p.topk);
  if (n > topk) return false;
  int32_t* idx = args.p.idx + token * args.p.topk;
  for (int i = static_cast<int>(threadIdx.x); i < topk; i += kThreads) idx[i] = i < n ? i : -1;
  return true;
}

// What a warp has of `count` things: shared out in whole vectors of a warp.
__device__ __forceinline__ int ShareOfWarp(int count, int warps) {
  return ((count + warps - 1) / warps + 127) / 128 * 128;
}

__device__ __forceinline__ uint32_t CountFrom(const uint4& order, uint32_t bar) {
  return (order.x >= bar ? 1u : 0u) + (order.y >= bar ? 1u : 0u) + (order.z >= bar ? 1u : 0u) +
         (order.w >= bar ? 1u : 0u);
}

// A lower bound of the k-th best, a multiple of 1,024: what at least k groups reach.
template <int kThreads, int kVectors>
__device__ __forceinline__ uint32_t FindLeast(Counts<kThreads>& shared,
                                              const uint4 (&largest)[kVectors], int vectors,
                                              uint32_t k) {
  const uint32_t bins = SharedAddress(shared.bins);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i >= vectors) break;
    const uint32_t four[4] = {largest[i].x, largest[i].y, largest[i].z, largest[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) Count(bins, four[j] >> 21, four[j] > 0);
  }
  Found found = FindBin(shared, k);
  const uint32_t bin = found.bin;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i >= vectors) break;
    const uint32_t four[4] = {largest[i].x, largest[i].y, largest[i].z, largest[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Count(bins, four[j] >> 10 & 2047, four[j] >> 21 == bin && four[j] > 0);
    }
  }
  found = FindBin(shared, found.left);
  return (bin << 11 | found.bin) << 10;
}

// How many groups of a row may have some of the set, and a lower bound of what they have of it, a
// multiple of 1,024.
struct Listed {
  int groups;
  uint32_t least;
};

// Lists them, if there is room. `whole` groups are visible entirely, another one in part if `part`:
// its largest may be of what is not visible, so it is always listed.
template <typename Size>
__device__ __forceinline__ Listed ListGroups(SelectShared<Size>& shared, const uint32_t* from,
                                             int whole, bool part, uint32_t k) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int each = ShareOfWarp(whole + part, Size::kWarps), begin = warp * each;
  uint4 largest[Size::kVectors];
#pragma unroll
  for (int i = 0; i < Size::kVectors; ++i) {
    if (i * 128 >= each) break;
    const int at = begin + i * 128 + lane * 4;
    largest[i] = make_uint4(0, 0, 0, 0);
    if (at < whole) largest[i] = __ldcg(reinterpret_cast<const uint4*>(from + at));
  }
#pragma unroll
  for (int i = 0; i < Size::kVectors; ++i) {
    if (i * 128 >= each) break;
    DropBeyond(largest[i], begin + i * 128 + lane * 4, whole);
  }
  const uint32_t least = FindLeast(shared, largest, each / 128, k), bar = max(least, 1u);
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < Size::kVectors; ++i) {
    if (i * 128 >= each) break;
    const int at = whole - (begin + i * 128 + lane * 4);
    if (part && at == 0) largest[i].x = ~0u;
    if (part && at == 1) largest[i].y = ~0u;
    if (part && at == 2) largest[i].z = ~0u;
    if (part && at == 3) largest[i].w = ~0u;
    mine += CountFrom(largest[i], bar);
  }
  const Before before = CountBefore(shared, __reduce_add_sync(~0u, mine));
  if (before.all > Size::kListed) return {static_cast<int>(before.all), least};
  uint32_t to = before.mine;
#pragma unroll
  for (int i = 0; i < Size::kVectors; ++i) {
    if (i * 128 >= each) break;
    const uint32_t four[4] = {largest[i].x, largest[i].y, largest[i].z, largest[i].w};
    const uint32_t here = CountFrom(largest[i], bar), sum = SumOfLanes(here, lane);
    uint32_t at = to + sum - here;
    to += __shfl_sync(~0u, sum, 31);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (four[j] >= bar) {
        shared.kept.listed[at++] = static_cast<uint16_t>(begin + i * 128 + lane * 4 + j);
      }
    }
  }
  __syncthreads();
  return {static_cast<int>(before.all), least};
}

// What of four entries reaches the bar, as the warp's kept ones `at` and on.
template <typename Size>
__device__ __forceinline__ void Put(SelectShared<Size>& shared, const uint4& order, int id,
                                    uint32_t bar, uint32_t at) {
  const int warp = threadIdx.x / 32;
  const uint32_t four[4] = {order.x, order.y, order.z, order.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (four[j] >= bar) {
      shared.kept.order[warp][at] = four[j];
      shared.kept.id[warp][at++] = id + j;
    }
  }
}

// A row of at most kShortRow entries, shared out to warps.
template <int kThreads>
__device__ __forceinline__ Held<kShortRow / 4 / kThreads> Load(const uint32_t* from, int n) {
  Held<kShortRow / 4 / kThreads> held;
  const int lane = threadIdx.x % 32, each = ShareOfWarp(n, kThreads / 32);
  held.begin = static_cast<int>(threadIdx.x) / 32 * each;
  const int end = min(n, held.begin + each);
#pragma unroll
  for (int i = 0; i < kShortRow / 4 / kThreads; ++i) {
    const int id = held.begin + i * 128 + lane * 4;
    held.order[i] = make_uint4(0, 0, 0, 0);
    if (id < end) held.order[i] = __ldcg(reinterpret_cast<const uint4*>(from + id));
  }
#pragma unroll
  for (int i = 0; i < kShortRow / 4 / kThreads; ++i) {
    DropBeyond(held.order[i], held.begin + i * 128 + lane * 4, n);
  }
  return held;
}

// Of a row of at most kShortRow entries: what is not below a bound, from the largest of vectors. As
// KeepListed does, and the bound.
template <typename Size>
__device__ __forceinline__ int KeepOfShort(SelectShared<Size>& shared, const uint32_t* from, int n,
                                           uint32_t k, uint32_t& least) {
  constexpr int kVectors = kShortRow / 4 / Size::kThreads;
  const int lane = threadIdx.x % 32;
  const Held<kVectors> held = Load<Size::kThreads>(from, n);
  uint4 largest[kVectors / 4];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint4& order = held.order[i];
    uint4& four = largest[i / 4];
    (i % 4 == 0   ? four.x
     : i % 4 == 1 ? four.y
     : i % 4 == 2 ? four.z
                  : four.w) = max(max(order.x, order.y), max(order.z, order.w));
  }
  least = FindLeast(shared, largest, kVectors / 4, k);
  const uint32_t bar = max(least, 1u);
  uint32_t here[kVectors / 4] = {}, before[kVectors / 4], all[kVectors / 4];  // a byte a vector
#pragma unroll
  for (int i = 0; i < kVectors; ++i) here[i / 4] |= CountFrom(held.order[i], bar) << i % 4 * 8;
#pragma unroll
  for (int i = 0; i < kVectors / 4; ++i) {
    before[i] = SumOfLanes(here[i], lane);
    all[i] = __shfl_sync(~0u, before[i], 31);
    before[i] -= here[i];
  }
  uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) count += all[i / 4] >> i % 4 * 8 & 0xFF;
  if (count > Size::kRoom) return static_cast<int>(count);
  count = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    Put(shared, held.order[i], held.begin + i * 128 + lane * 4, bar,
        count + (before[i / 4] >> i % 4 * 8 & 0xFF));
    count += all[i / 4] >> i % 4 * 8 & 0xFF;
  }
  __syncwarp();
  return static_cast<int>(count);
}

// Of the groups listed: what is not below the bound. How much of it the warp has; more than there
// is room for if it does not fit.
template <typename Size>
__device__ __forceinline__ int KeepListed(SelectShared<Size>& shared, const uint32_t* from, int n,
                                          const Listed& listed) {
  constexpr int kAtOnce = 4, kParts = kIndexTopkGroup / 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = listed.groups * warp / Size::kWarps;
  const int vectors = (listed.groups * (warp + 1) / Size::kWarps - begin) * kParts;
  const uint32_t bar = max(listed.least, 1u);
  const auto id_of = [&](int v) {
    return v < vectors ? shared.kept.listed[begin + v / kParts] * kIndexTopkGroup + v % kParts * 4
                       : n;
  };
  int count = 0;
#pragma unroll 1
  for (int first = 0; first < vectors && count <= Size::kRoom; first += kAtOnce * 32) {
    uint4 order[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int id = id_of(first + i * 32 + lane);
      order[i] = make_uint4(0, 0, 0, 0);
      if (id < n) order[i] = __ldcg(reinterpret_cast<const uint4*>(from + id));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * 32 >= vectors) break;
      const int id = id_of(first + i * 32 + lane);
      DropBeyond(order[i], id, n);
      const uint32_t here = CountFrom(order[i], bar), sum = SumOfLanes(here, lane);
      const uint32_t before = static_cast<uint32_t>(count) + sum - here;
      count += static_cast<int>(__shfl_sync(~0u, sum, 31));
      if (count > Size::kRoom) break;
      Put(shared, order[i], id, bar, before);
    }
  }
  __syncwarp();
  return count;
}

// Begins the choice of the query of a thread block: its entries and their orders; none if nothing
// is left to choose.
struct Row {
  int n;
  const uint32_t* order;
  int32_t* idx;
};

template <int kThreads>
__device__ __forceinline__ Row Begin(const SelectArgs& args, Counts<kThreads>& shared) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins / 4; i += kThreads) {
    reinterpret_cast<uint4*>(shared.bins)[i] = make_uint4(0, 0, 0, 0);
  }
  LetNextBegin();
  // Scores let this begin when what is ahead of them has ended: counts are there.
  if (args.order == nullptr) WaitForPrevious();
  const int64_t row = blockIdx.x, token = args.first_token + row;
  const int n = static_cast<int>(VisibleEntries(args.p, token));
  WaitForPrevious();
  const uint32_t* order = args.order + row * args.p.slots;
  const bool written = WriteAll<kThreads>(args, token, n, order);
  __syncthreads();  // bins are zero
  return {written ? 0 : n, order, args.p.idx + token * args.p.topk};
}

// Few queries of short rows: scores stay in registers.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    IndexSelectShortSm90Kernel(const __grid_constant__ SelectArgs args) {
  __shared__ Counts<kThreads> shared;
  const Row row = Begin(args, shared);
  if (row.n == 0) return;
  const auto held = Load<kThreads>(row.order, row.n);
  const Bar bar = FindBar(shared, held, static_cast<uint32_t>(args.p.topk), 0);
  WriteIds(shared, held, bar, row.idx);
}

// A query a thread block.
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads, Size::kBlocks)
    IndexSelectSm90Kernel(const __grid_constant__ SelectArgs args) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SelectShared<Size>*>(raw);
  const Row row = Begin(args, shared);
  if (row.n == 0) return;
  const int n = row.n;
  const uint32_t* const from = row.order;
  const auto k = static_cast<uint32_t>(args.p.topk);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int each = ShareOfWarp(n, Size::kWarps), first = warp * each;
  Entries entries = {from + first, nullptr, first, min(n - first, each), 0};
  uint32_t least = 0;
  // The fewer groups, the more reaches their bound.
  const auto bounds = [&](int groups) { return 8 * groups >= 9 * static_cast<int>(args.p.topk); };
  const int whole = n / kIndexTopkGroup;
  int kept = Size::kRoom + 1;
  if (args.largest != nullptr && n > kShortRow && bounds(whole)) {
    const Listed listed =
        ListGroups(shared, args.largest + blockIdx.x * IndexTopkGroups(args.p.slots), whole,
                   n % kIndexTopkGroup != 0, k);
    least = listed.least;
    if (listed.groups <= Size::kListed) kept = KeepListed(shared, from, n, listed);
  } else if constexpr (Size::kShort) {
    if (n <= kShortRow && bounds(n / 4)) kept = KeepOfShort(shared, from, n, k, least);
  }
  if (!__syncthreads_or(kept > Size::kRoom)) {
    entries = {shared.kept.order[warp], shared.kept.id[warp], 0, kept, 0};
  } else if (n <= Size::kRow) {
    least = 0;
    Entries whole_row = entries;
    whole_row.order = shared.row + first / 8 * 9;
    whole_row.spread = Entries::kSpread;
    ForEach(entries, [&](int at, const uint4& order) {
      if (at < entries.count) *const_cast<uint4*>(whole_row.At(at)) = order;
    });
    __syncwarp();
    entries = whole_row;
  } else {
    least = 0;
  }
  const Bar bar = FindBar(shared, entries, k, least);
  WriteIds(shared, entries, bar, row.idx);
}

}  // namespace index_topk
}  // namespace dsv4
