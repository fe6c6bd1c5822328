// Ratios but 4: a thread block takes 64 or 32 channels of a window, a warp of it a slot lane, so
// that 512 KB of HCA's window are read by 8 or 16 SMs, as a cluster. Gates come first: all
// exponentials are done while the values arrive, in shared memory.
//
// 64 channels are a tile: thread blocks exchange its sum of squares, and nothing else. Of few rows
// it is the exponentials that take long: then 32 channels, and of each two thread blocks one has
// both's tile.
//
// A window's thread block also writes its own positions to the state, unless the row's first window
// reads older ones there: then that one's thread block writes all, having read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "compressor/compressor_parts.cuh"

namespace dsv4 {
namespace compressor {

constexpr int kWholeThreads = kSlotLanes * kLanes;
constexpr int kSlotsPerThread = kCompressorMaxRatio / kSlotLanes;
constexpr int kModelTiles = kModelWidth / kSumChannels;

struct WholeParams {
  CompressorParams p;
  Width width[kMaxCompressorJobs];
  uint32_t windows;  // of a batch row
  int cluster;       // thread blocks
};

// A thread's channels of a slot.
template <int kOwn>
struct Own {
  float at[kOwn];
};

template <int kOwn>
__device__ __forceinline__ Own<kOwn> LoadOwn(const float* from) {
  if constexpr (kOwn == 1) {
    return {LoadOne(from)};
  } else {
    const float2 x = LoadPairOnce(from);
    return {x.x, x.y};
  }
}
template <int kOwn>
__device__ __forceinline__ Own<kOwn> SharedOwn(const float* from) {
  if constexpr (kOwn == 1) {
    return {*from};
  } else {
    const float2 x = LoadShared(from);
    return {x.x, x.y};
  }
}
template <int kOwn>
__device__ __forceinline__ void StoreOwn(float* to, const Own<kOwn>& x) {
  if constexpr (kOwn == 1) {
    *to = x.at[0];
  } else {
    StorePair(to, make_float2(x.at[0], x.at[1]));
  }
}
template <int kOwn>
__device__ __forceinline__ void StoreSharedOwn(float* to, const Own<kOwn>& x) {
#pragma unroll
  for (int c = 0; c < kOwn; ++c) to[c] = x.at[c];
}
template <int kOwn>
__device__ __forceinline__ void CopyOwn(float* to, const float* from) {
  if constexpr (kOwn == 1) {
    CopyWord(reinterpret_cast<int32_t*>(to), reinterpret_cast<const int32_t*>(from));
  } else {
    CopyPair(to, from);
  }
}
template <int kOwn>
__device__ __forceinline__ Own<kOwn> Add(const Own<kOwn>& a, const Own<kOwn>& b) {
  Own<kOwn> sum;
#pragma unroll
  for (int c = 0; c < kOwn; ++c) sum.at[c] = a.at[c] + b.at[c];
  return sum;
}

// Floats as integers of the same order, for atomicMax.
__device__ __forceinline__ int OrderOf(float x) {
  const int bits = __float_as_int(x);
  return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}
__device__ __forceinline__ float FloatOf(int order) {
  return __int_as_float(order >= 0 ? order : order ^ 0x7FFFFFFF);
}

// The sum of all slot lanes, by halves.
template <int kOwn, int kWidth, int kCount = kSlotLanes>
__device__ __forceinline__ Own<kOwn> SumLanes(const float (&lanes)[kSlotLanes][kWidth], int column,
                                              int first = 0, int step = 1) {
  if constexpr (kCount == 1) {
    return SharedOwn<kOwn>(&lanes[first][column]);
  } else {
    return Add(SumLanes<kOwn, kWidth, kCount / 2>(lanes, column, first, 2 * step),
               SumLanes<kOwn, kWidth, kCount / 2>(lanes, column, first + step, 2 * step));
  }
}

// Positions from + kSlotLanes * i, of those that are kept and below `to`, to the state.
template <int kOwn>
__device__ __forceinline__ void CopyToState(const Rows& rows, uint32_t ratio, uint32_t from,
                                            uint32_t to) {
  constexpr int kAtOnce = 2;
  const uint32_t kept = rows.Kept();
  if (from < kept) from += (kept - from + kSlotLanes - 1) / kSlotLanes * kSlotLanes;
#pragma unroll 1
  for (uint32_t at = from; at < to; at += kAtOnce * kSlotLanes) {
    Own<kOwn> z[kAtOnce], g[kAtOnce], ape[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t now = at + i * kSlotLanes;
      if (now >= to) continue;
      z[i] = LoadOwn<kOwn>(rows.Kv(now - rows.start));
      g[i] = LoadOwn<kOwn>(rows.Gate(now - rows.start));
      ape[i] = LoadOwn<kOwn>(rows.Ape(now % ratio));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t now = at + i * kSlotLanes;
      if (now >= to) continue;
      StoreOwn(rows.KvState(Modulo(now, rows.ring)), z[i]);
      StoreOwn(rows.GateState(Modulo(now, rows.ring)), Add(g[i], ape[i]));
    }
  }
}

// A thread's slots of a window: slot_lane + kSlotLanes * i.
template <bool kModel>  // a window has kCompressorMaxRatio slots, side by side in the ring
struct WholeSlots {
  uint32_t slot_lane, ratio, own, start, ring, in_ring;  // own: the window's first position

  __device__ __forceinline__ WholeSlots(const Rows& rows, uint32_t position, uint32_t lane,
                                        uint32_t slots)
      : slot_lane(lane), ratio(slots), own(position), start(rows.start), ring(rows.ring) {
    in_ring = Modulo(own, ring);
  }

  __device__ __forceinline__ uint32_t Slot(int i) const { return slot_lane + i * kSlotLanes; }
  __device__ __forceinline__ bool There(int i) const { return kModel || Slot(i) < ratio; }
  __device__ __forceinline__ bool AllNew() const { return own >= start; }
  __device__ __forceinline__ bool New(int i) const { return There(i) && own + Slot(i) >= start; }
  __device__ __forceinline__ bool AnyNew() const {
    return own + Slot(kSlotsPerThread - 1) >= start;
  }
  __device__ __forceinline__ uint32_t InRing(int i) const {
    const uint32_t at = in_ring + Slot(i);
    return kModel || at < ring ? at : at - ring;
  }

  template <typename Float>
  __device__ __forceinline__ Float* InState(Float* state, uint32_t columns, int i) const {
    if (kModel) return state + uint64_t{in_ring + slot_lane} * columns + i * kSlotLanes * columns;
    return state + uint64_t{InRing(i)} * columns;
  }

  // use(i, from) for each: of the chunk's rows, or the ring's.
  template <typename Use>
  __device__ __forceinline__ void ForEach(const float* chunk, const float* state, uint32_t columns,
                                          const Use& use) const {
    const float* fresh = chunk + (int64_t{own} - start + slot_lane) * columns;
    const float* old = state + uint64_t{in_ring + slot_lane} * columns;
    if (AllNew() || (kModel && !AnyNew())) {
      const float* from = AllNew() ? fresh : old;
#pragma unroll
      for (int i = 0; i < kSlotsPerThread; ++i) {
        if (There(i)) use(i, from + i * kSlotLanes * columns);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (!There(i)) continue;
      if (kModel) {
        use(i, (New(i) ? fresh : old) + i * kSlotLanes * columns);
      } else {
        use(i, New(i) ? fresh + i * kSlotLanes * columns : InState(state, columns, i));
      }
    }
  }
};

template <int kOwn>
struct WholeShared {
  alignas(16) float z[kSlotsPerThread][kSlotLanes][kLanes * kOwn];
  union {  // the sums when nothing of ape is read any more
    alignas(16) float ape[kSlotsPerThread][kSlotLanes][kLanes * kOwn];
    struct {
      alignas(16) float norm[kSlotLanes][kLanes * kOwn], value[kSlotLanes][kLanes * kOwn];
    };
  };
  alignas(16) float x[kOwn == 1 ? kModelWidth : 1];
  float2 norm_of[kLanes];
  float frequency[kLanes];
  int order[kOwn][kLanes];  // of the largest gates
  float tile_sum[kMaxTiles];
  Lengths lengths;
  alignas(8) uint64_t sums_barrier;
};

// kModel: the ratio and the width are the model's. kOwn: channels a thread has, 1 only if kModel.
template <bool kModel, int kOwn>
__global__ void __launch_bounds__(kWholeThreads, kModel&& kOwn == 2 ? 3 : 2)
    WholeKernel(const __grid_constant__ WholeParams params) {
  static_assert(kOwn == kChannels || (kModel && kOwn == 1), "");
  extern __shared__ __align__(16) char shared_bytes[];
  auto& shared = *reinterpret_cast<WholeShared<kOwn>*>(shared_bytes);
  const CompressorParams& p = params.p;
  const CompressorJob& job = p.jobs[blockIdx.y];
  const int lane = threadIdx.x % kLanes, slot_lane = threadIdx.x / kLanes;
  const int d = kModel ? kModelWidth : static_cast<int>(job.d), column = lane * kOwn;
  const int cluster = kModel ? kModelWidth / (kLanes * kOwn) : params.cluster;
  const uint32_t ratio = kModel ? kCompressorMaxRatio : static_cast<uint32_t>(p.ratio);
  const uint32_t index = blockIdx.x / cluster, rank = blockIdx.x - index * cluster;
  const uint32_t b = params.windows == 1 ? index : index / params.windows;
  const uint32_t item = index - b * params.windows;
  const int first = static_cast<int>(rank) * kLanes * kOwn + column;
  const int tile = kOwn == 1 ? rank / 2 : rank;
  const int pair = tile * kSumChannels + lane * kChannels;  // of what is stored
  const bool mine = kModel || first < d;
  WaitForPrevious();
  LetNextBegin();
  AskForLengths(p, b, shared.lengths);
  Rows rows(p, job, b, d, mine ? first : 0);
  Constants constants = {};
  if (slot_lane == 0) constants = ConstantsOf(p, job, d, mine ? pair : 0);
  // While the lengths are on their way: about the rows that it will read. Gates of a long chunk are
  // not to wait for values.
  constexpr int kLine = 32;  // floats
  static_assert(kWholeThreads == 4 * kCompressorMaxRatio, "a line each");
  const uint32_t ahead_row = threadIdx.x / 4, ahead = item * ratio + ahead_row;
  const uint32_t ahead_channel = (first - column) + threadIdx.x % 2 * kLine;
  const bool of_gate = threadIdx.x % 4 >= 2;
  if ((kModel || (ahead_row < ratio && ahead_channel < d)) && ahead < p.t &&
      (kOwn == 2 || threadIdx.x % 2 == 0) && (of_gate || p.t < ratio)) {
    Prefetch((of_gate ? job.gate : job.kv) + (b * p.t + ahead) * d + ahead_channel);
  }
  const uint32_t barrier = SharedAddress(&shared.sums_barrier);
  if (cluster > 1) MakeBarrier(barrier);
  if (slot_lane == 0) {
    shared.norm_of[lane] = constants.Norm();
    shared.frequency[lane] = constants.frequency;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) shared.order[c][lane] = OrderOf(-Infinity());
  }
  WaitForLengths();
  rows.Take(shared.lengths, p.t);
  const uint32_t oldest = rows.start / ratio, window = oldest + item;
  const uint32_t own = window * ratio, next = own + ratio;
  if (own >= rows.end) return;
  // So say all of the row's thread blocks. If so, the state's other writes are the first's.
  const bool read = rows.start > oldest * ratio && (oldest + 1) * ratio <= rows.end;
  const bool writes = item == 0 || !read;

  if (next > rows.end || window >= job.slots) {
    if (mine && writes) {
      CopyToState<kOwn>(rows, ratio, own + slot_lane, min(next, rows.end));
      if (read) CopyToState<kOwn>(rows, ratio, next + slot_lane, rows.end);
    }
    return;
  }
  const WholeSlots<kModel> slots(rows, own, slot_lane, ratio);
  Own<kOwn> g[kSlotsPerThread];
  slots.ForEach(rows.Gate(0), rows.GateState(0), d,
                [&](int i, const float* from) { g[i] = LoadOwn<kOwn>(from); });
  const float* ape = rows.Ape(slot_lane);
  const auto copy_ape = [&](int i) {
    CopyOwn<kOwn>(&shared.ape[i][slot_lane][column], ape + i * kSlotLanes * d);
  };
  if (slots.AllNew()) {
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (slots.There(i)) copy_ape(i);
    }
  } else if (slots.AnyNew()) {
#pragma unroll 1
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (slots.New(i)) copy_ape(i);
    }
  }
  EndGroup();
  if (p.t >= ratio) __syncthreads();  // all gates have been asked for
  slots.ForEach(rows.Kv(0), rows.KvState(0), d, [&](int i, const float* from) {
    CopyOwn<kOwn>(&shared.z[i][slot_lane][column], from);
  });
  EndGroup();
  if (cluster > 1) ExpectFloats(barrier, kOwn == 1 ? kModelWidth : cluster);
  WaitForAllButLast();
  if (slots.AnyNew()) {
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (slots.New(i)) g[i] = Add(g[i], SharedOwn<kOwn>(&shared.ape[i][slot_lane][column]));
    }
  }
  Own<kOwn> top;
#pragma unroll
  for (int c = 0; c < kOwn; ++c) top.at[c] = -Infinity();
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if (!slots.There(i)) g[i].at[c] = -Infinity();
      top.at[c] = fmaxf(top.at[c], g[i].at[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kOwn; ++c) atomicMax(&shared.order[c][lane], OrderOf(top.at[c]));
  // Its own positions to the state: those that it reads there are other slots.
  const uint32_t kept = max(rows.Kept(), own);
  const bool keeps = mine && writes && own + slots.Slot(kSlotsPerThread - 1) >= kept;
  if (keeps) {
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (slots.There(i) && own + slots.Slot(i) >= kept) {
        StoreOwn(slots.InState(rows.GateState(0), d, i), g[i]);
      }
    }
  }
  __syncthreads();
  Own<kOwn> norms = {}, values = {};
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    top.at[c] = FloatOf(shared.order[c][lane]);
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      g[i].at[c] = ExpOfNegative(g[i].at[c] - top.at[c]);
    }
  }
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (slots.There(i)) norms = Add(norms, g[i]);
  }
  StoreSharedOwn(&shared.norm[slot_lane][column], norms);  // so all exponentials are ahead of this
  WaitForCopies();
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (!slots.There(i)) continue;
    const Own<kOwn> z = SharedOwn<kOwn>(&shared.z[i][slot_lane][column]);
    Own<kOwn> product;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) product.at[c] = g[i].at[c] * z.at[c];
    values = Add(values, product);
  }
  StoreSharedOwn(&shared.value[slot_lane][column], values);
  if (keeps) {
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (slots.There(i) && own + slots.Slot(i) >= kept) {
        StoreOwn(slots.InState(rows.KvState(0), d, i),
                 SharedOwn<kOwn>(&shared.z[i][slot_lane][column]));
      }
    }
  }
  __syncthreads();
  if (cluster > 1) WaitForCluster();  // all have begun, and made their barriers
  const bool stores = kOwn == 2 || rank % 2 == 0, rotary = pair >= d - p.rotary;
  if (slot_lane == 0) {
    values = SumLanes<kOwn>(shared.value, column);
    norms = SumLanes<kOwn>(shared.norm, column);
    float2 x;
    float squares;
    SinCos turn = {};  // while the others' are on their way
    if constexpr (kOwn == 1) {
      const float one = RoundBf16(make_float2(values.at[0] / norms.at[0], 0.0f)).x;
#pragma unroll
      for (int i = 0; i < kModelTiles; ++i) StoreIn(&shared.x[first], barrier, 2 * i, one);
      if (stores) {
        turn = Here(TurnOf(rotary, shared.frequency[lane], own));
        Wait(barrier, 0);
        float sums[kModelTiles];
#pragma unroll
        for (int i = 0; i < kModelTiles; ++i) {
          sums[i] = TileSquares(LoadShared(&shared.x[i * kSumChannels + lane * kChannels]));
        }
        squares = __shfl_sync(kAllLanes, RowSquares(sums, kModelTiles), 1);
        x = LoadShared(&shared.x[pair]);
      }
    } else {
      x = RoundBf16(make_float2(values.at[0] / norms.at[0], values.at[1] / norms.at[1]));
      if (!mine) x = make_float2(0.0f, 0.0f);
      const float sum = TileSquares(x);
      squares = __shfl_sync(kAllLanes, sum, 1);
      if (cluster > 1 && lane % 2 == 1 && lane / 2 < cluster) {
        StoreIn(&shared.tile_sum[tile], barrier, lane / 2, sum);
      }
      turn = Here(TurnOf(rotary, shared.frequency[lane], own));
      if (cluster > 1) {
        Wait(barrier, 0);
        squares = RowSquares(shared.tile_sum, TilesOf(d));
      }
    }
    if (stores && tile < TilesOf(d)) {
      const float mean = squares * params.width[blockIdx.y].mean;
      const float2 y = NormAndRope(shared.norm_of[lane], turn, rotary, mean, p.eps, x);
      StoreKey(p, job, b * job.slots + window, pair, mine, y);
    }
  }
  // All of this thread block have read the state.
  if (mine && writes && read) CopyToState<kOwn>(rows, ratio, next + slot_lane, rows.end);
}

}  // namespace compressor
}  // namespace dsv4
