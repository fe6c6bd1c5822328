// The exact set of the largest of a query's scores, ascending ids. sm_90 and later.
//
// A cluster of one or more thread blocks holds all scores of a query in registers, as ScoreOrder
// has them (NaN: 1, no entry: 0): each warp a stretch of consecutive ids. The order of the k-th
// best is found 11, 11 and 10 bits at a time from counts in shared memory, and soon enough when a
// bin is taken whole. Then every warp counts what it has of the set and of its ties, learns what
// warps before it have, and writes.
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
constexpr int kMaxCluster = 16;

struct SelectArgs {
  IndexTopkParams p;
  const uint32_t* order;  // [tokens, slots]
  int64_t first_token, rows;
  int cluster;
  bool bounded;  // count only what may be chosen; one thread block a query
};

// The score of an order.
DSV4_HOST_DEVICE inline float ScoreOf(uint32_t order) {
  if (order <= 1) return FloatFromBits(0x7FC00000u);
  return FloatFromBits(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

struct Found {
  uint32_t bin, left, count;  // where the k-th best is, which of the bin's it is, how many it has
};

struct SelectShared {
  alignas(16) uint32_t bins[4][kBins];  // of three parts of an order, and of the largest of groups
  uint32_t totals[32];                  // of warps
  uint32_t chosen[32];                  // of a warp's scores: certain ones, and ties above 16 bits
  uint32_t all_chosen;                  // of the thread block's
  Found found;
};

__device__ __forceinline__ void SyncAll(int cluster) {
  if (cluster > 1) {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
  } else {
    __syncthreads();
  }
}

__device__ __forceinline__ uint32_t LoadFrom(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void LoadFrom(uint32_t address, uint32_t (&values)[2]) {
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
               : "=r"(values[0]), "=r"(values[1])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void LoadFrom(uint32_t address, uint32_t (&values)[4]) {
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(address)
               : "memory");
}

// One more in the bin at `bins` + 4 `bin` where `counts`.
__device__ __forceinline__ void Count(uint32_t bins, uint32_t bin, bool counts) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p red.shared::cta.add.u32 [%0], 1;\n}" ::"r"(
          bins + 4 * bin),
      "r"(static_cast<uint32_t>(counts))
      : "memory");
}

// Of counts that all of the cluster have made: the bin that holds the k-th from the top.
template <int kThreads>
__device__ __forceinline__ Found FindBin(SelectShared& shared, const uint32_t* bins, uint32_t k,
                                         int cluster) {
  constexpr int kMine = kBins / kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lowest = kBins - kMine * (static_cast<int>(threadIdx.x) + 1);
  SyncAll(cluster);
  uint32_t count[kMine], sum = 0;
  if (cluster == 1) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) count[i] = bins[lowest + i];
  } else {
#pragma unroll
    for (int i = 0; i < kMine; ++i) count[i] = 0;
    constexpr int kAtOnce = 4;
    for (int rank = 0; rank < cluster; rank += kAtOnce) {
      uint32_t theirs[kAtOnce][kMine];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        // Past the last one, the last again; it does not count.
        const uint32_t there = SharedAddress(bins + lowest);
        LoadFrom(AddressIn(there, min(rank + r, cluster - 1)), theirs[r]);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) count[i] += rank + r < cluster ? theirs[r][i] : 0;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) sum += count[i];
  uint32_t above = sum;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t lower = __shfl_up_sync(~0u, above, lanes);
    if (lane >= lanes) above += lower;
  }
  if (lane == 31) shared.totals[warp] = above;
  __syncthreads();
  const uint32_t others =
      lane < warp ? shared.totals[lane] : 0;  // kThreads / 32 warps: fewer than lanes or as many
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

template <int kThreads, int kVectors>
__device__ __forceinline__ Bar FindBar(SelectShared& shared, const uint4 (&order)[kVectors],
                                       uint32_t k, const SelectArgs& args) {
  uint32_t least = 0;
  if (args.bounded) {
    // The k-th best of the largest of kBins groups: no score below it can be chosen.
    constexpr int kGroups = kBins / kThreads, kEach = kVectors / kGroups;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = g * kEach; i < (g + 1) * kEach; ++i) {
        largest = max(max(largest, max(order[i].x, order[i].y)), max(order[i].z, order[i].w));
      }
      Count(SharedAddress(shared.bins[3]), largest >> 21, true);
    }
    least = FindBin<kThreads>(shared, shared.bins[3], k, 1).bin << 21;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t each[4] = {order[i].x, order[i].y, order[i].z, order[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Count(SharedAddress(shared.bins[0]), each[j] >> 21, each[j] >= least);
    }
  }
  Found found = FindBin<kThreads>(shared, shared.bins[0], k, args.cluster);
  uint32_t prefix = found.bin;
#pragma unroll
  for (int part = 1; part < 3; ++part) {
    const int shift = part == 1 ? 10 : 0;
    const uint32_t mask = part == 1 ? 2047 : 1023;
    const int above = part == 1 ? 21 : 10;
    if (found.left == found.count) return {prefix << above, ~0u, 0};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t each[4] = {order[i].x, order[i].y, order[i].z, order[i].w};
      bool any = false;  // seldom
#pragma unroll
      for (int j = 0; j < 4; ++j) any |= each[j] >> above == prefix;
      if (!any) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Count(SharedAddress(shared.bins[part]), each[j] >> shift & mask,
              each[j] >> above == prefix);
      }
    }
    found = FindBin<kThreads>(shared, shared.bins[part], found.left, args.cluster);
    prefix = prefix << (above - shift) | found.bin;
  }
  return {prefix + 1, prefix, found.left};
}

__device__ __forceinline__ uint32_t Judge(uint32_t order, const Bar& bar) {
  return (order >= bar.certain ? 1u : 0u) + (order == bar.tie ? 1u << 16 : 0u);
}
__device__ __forceinline__ uint32_t Judge(const uint4& order, const Bar& bar) {
  return Judge(order.x, bar) + Judge(order.y, bar) + Judge(order.z, bar) + Judge(order.w, bar);
}

// The ids of the set. `first` is the warp's first.
template <int kThreads, int kVectors>
__device__ __forceinline__ void WriteIds(SelectShared& shared, const uint4 (&order)[kVectors],
                                         const Bar& bar, int first, int32_t* idx, int rank,
                                         int cluster) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) mine += Judge(order[i], bar);
  mine = __reduce_add_sync(~0u, mine);
  if (lane == 0) shared.chosen[warp] = mine;
  __syncthreads();
  const uint32_t chosen = lane < kThreads / 32 ? shared.chosen[lane] : 0;
  const uint32_t before = __reduce_add_sync(~0u, lane < warp ? chosen : 0);
  uint32_t certain = before & 0xFFFF, ties = before >> 16;
  if (cluster > 1) {
    const uint32_t all = __reduce_add_sync(~0u, chosen);
    if (threadIdx.x == 0) shared.all_chosen = all;
    SyncAll(cluster);
    const uint32_t theirs =
        lane < rank ? LoadFrom(AddressIn(SharedAddress(&shared.all_chosen), lane)) : 0;
    certain += __reduce_add_sync(~0u, theirs & 0xFFFF);
    ties += __reduce_add_sync(~0u, theirs >> 16);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t here = Judge(order[i], bar);
    if (__any_sync(~0u, here != 0)) {
      uint32_t sum = here;
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const uint32_t lower = __shfl_up_sync(~0u, sum, lanes);
        if (lane >= lanes) sum += lower;
      }
      const uint32_t all = __shfl_sync(~0u, sum, 31);
      sum -= here;
      uint32_t over = certain + (sum & 0xFFFF), same = ties + (sum >> 16);
      const uint32_t each[4] = {order[i].x, order[i].y, order[i].z, order[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool is_over = each[j] >= bar.certain, is_same = each[j] == bar.tie;
        if (is_over || (is_same && same < bar.ties)) {
          idx[over + min(same, bar.ties)] = first + i * 128 + lane * 4 + j;
        }
        over += is_over;
        same += is_same;
      }
      certain += all & 0xFFFF;
      ties += all >> 16;
    }
  }
  if (cluster > 1) SyncAll(cluster);  // others may still read all_chosen
}

// What needs no choice, by threads `at`, at + step, .. of all that have the query: scores that are
// wanted, and the ids where all entries are in the set. Whether they are.
__device__ __forceinline__ bool WriteAll(const SelectArgs& args, int64_t token, int n,
                                         const uint32_t* order, int at, int step) {
  if (args.p.scores != nullptr) {
    float* scores = args.p.scores + token * args.p.slots;
    for (int64_t i = at; i < args.p.slots; i += step) {
      scores[i] = i < n ? ScoreOf(order[i]) : FloatFromBits(0xFF800000u);
    }
  }
  const int topk = static_cast<int>(args.p.topk);
  if (n > topk) return false;
  int32_t* idx = args.p.idx + token * args.p.topk;
  for (int i = at; i < topk; i += step) idx[i] = i < n ? i : -1;
  return true;
}

template <int kThreads>
__device__ __forceinline__ void ClearBins(SelectShared& shared) {
  for (int i = static_cast<int>(threadIdx.x); i < 4 * kBins / 4; i += kThreads) {
    reinterpret_cast<uint4*>(shared.bins)[i] = make_uint4(0, 0, 0, 0);
  }
}

// Entries that a warp holds: n shared out to `warps`, in whole vectors of a warp.
__device__ __forceinline__ int EntriesOfWarp(int n, int warps) {
  return ((n + warps - 1) / warps + 127) / 128 * 128;
}

// The vector at id of a row that ends at n: what is no entry has order 0, below all that are, of
// which there are enough.
__device__ __forceinline__ void DropBeyond(uint4& order, int id, int n) {
  if (id + 1 >= n) order.y = 0;
  if (id + 2 >= n) order.z = 0;
  if (id + 3 >= n) order.w = 0;
}

// A query a cluster.
template <int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads)
    IndexSelectSm90Kernel(const __grid_constant__ SelectArgs args) {
  __shared__ SelectShared shared;
  const int cluster = args.cluster, rank = static_cast<int>(blockIdx.x) % cluster;
  const int64_t row = static_cast<int64_t>(blockIdx.x) / cluster, token = args.first_token + row;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  ClearBins<kThreads>(shared);
  LetNextBegin();
  WaitForPrevious();
  const int n = static_cast<int>(VisibleEntries(args.p, token));
  const uint32_t* from = args.order + row * args.p.slots;
  if (WriteAll(args, token, n, from, rank * kThreads + thread, kThreads * cluster)) return;
  const int each = EntriesOfWarp(n, kThreads * cluster / 32);
  const int first = (rank * (kThreads / 32) + thread / 32) * each, end = min(n, first + each);
  uint4 order[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int id = first + i * 128 + lane * 4;
    order[i] = make_uint4(0, 0, 0, 0);
    if (id < end) order[i] = __ldcg(reinterpret_cast<const uint4*>(from + id));
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) DropBeyond(order[i], first + i * 128 + lane * 4, n);
  __syncthreads();  // bins are zero
  const Bar bar =
      FindBar<kThreads, kVectors>(shared, order, static_cast<uint32_t>(args.p.topk), args);
  WriteIds<kThreads, kVectors>(shared, order, bar, first, args.p.idx + token * args.p.topk, rank,
                               cluster);
}

// One query after another by each thread block; the next one's scores come meanwhile.
template <int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    IndexSelectNextSm90Kernel(const __grid_constant__ SelectArgs args) {
  extern __shared__ __align__(1024) uint8_t raw[];  // the next one's
  const auto* next = reinterpret_cast<const uint32_t*>(raw);
  __shared__ SelectShared shared;
  __shared__ uint64_t barrier;
  const uint32_t arrived = SharedAddress(&barrier);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int topk = static_cast<int>(args.p.topk);
  if (thread == 0) {
    InitBarrier(arrived, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  LetNextBegin();
  WaitForPrevious();
  __syncthreads();  // the barrier is there
  const auto fetch = [&](int64_t row) {
    if (row >= args.rows) return;
    const int n = static_cast<int>(VisibleEntries(args.p, args.first_token + row));
    if (n <= topk) return;
    const uint32_t bytes = static_cast<uint32_t>((n + 3) / 4 * 16);
    ArriveExpecting(arrived, bytes);
    CopyBytes(SharedAddress(next), args.order + row * args.p.slots, bytes, arrived);
  };
  if (thread == 0) fetch(blockIdx.x);
  uint32_t phase = 0;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t token = args.first_token + row;
    const int n = static_cast<int>(VisibleEntries(args.p, token));
    if (WriteAll(args, token, n, args.order + row * args.p.slots, thread, kThreads)) {
      if (thread == 0) fetch(row + gridDim.x);
      continue;
    }
    ClearBins<kThreads>(shared);  // read last ahead of a barrier
    const int each = EntriesOfWarp(n, kThreads / 32);
    const int first = thread / 32 * each, end = min(n, first + each);
    Wait(arrived, phase);
    phase ^= 1;
    uint4 order[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int id = first + i * 128 + lane * 4;
      order[i] = make_uint4(0, 0, 0, 0);
      if (id < end) order[i] = *reinterpret_cast<const uint4*>(next + id);
      DropBeyond(order[i], id, n);
    }
    __syncthreads();  // bins are zero, and the next one's place is free
    if (thread == 0) fetch(row + gridDim.x);
    const Bar bar = FindBar<kThreads, kVectors>(shared, order, static_cast<uint32_t>(topk), args);
    WriteIds<kThreads, kVectors>(shared, order, bar, first, args.p.idx + token * topk, 0, 1);
  }
}

}  // namespace index_topk
}  // namespace dsv4
