// Ratios but 4: a thread block takes 64 channels of a window, a warp of it a slot lane, so that 512
// KB of HCA's window are read by 8 SMs; they exchange their sums of squares, and nothing else,
// through the cluster. Gates come first: all exponentials are done while the values arrive.
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

struct WholeParams {
  CompressorParams p;
  Width width[kMaxCompressorJobs];
  uint32_t windows;  // of a batch row
  int tiles;         // thread blocks of a cluster
};

// Floats as integers of the same order, for atomicMax.
__device__ __forceinline__ int OrderOf(float x) {
  const int bits = __float_as_int(x);
  return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}
__device__ __forceinline__ float FloatOf(int order) {
  return __int_as_float(order >= 0 ? order : order ^ 0x7FFFFFFF);
}

// The sum of of(first) .. of(first + kCount - 1), by halves.
template <int kCount, typename Of>
__device__ __forceinline__ float Halved(const Of& of, int first = 0, int step = 1) {
  if constexpr (kCount == 1) {
    return of(first);
  } else {
    return Halved<kCount / 2>(of, first, 2 * step) + Halved<kCount / 2>(of, first + step, 2 * step);
  }
}

// Two channels' sums of all slot lanes, by halves.
__device__ __forceinline__ float2 SumLanes(const float (&lanes)[kSlotLanes][kSumChannels],
                                           int column) {
  float2 part[kSlotLanes];
#pragma unroll
  for (int s = 0; s < kSlotLanes; ++s) part[s] = LoadShared(&lanes[s][column]);
  return make_float2(Halved<kSlotLanes>([&](int s) { return part[s].x; }),
                     Halved<kSlotLanes>([&](int s) { return part[s].y; }));
}

// Positions from + kSlotLanes * i, of those that are kept and below `to`, to the state.
__device__ __forceinline__ void CopyToState(const Rows& rows, uint32_t ratio, uint32_t from,
                                            uint32_t to) {
  constexpr int kAtOnce = 4;
  const uint32_t kept = rows.Kept();
  if (from < kept) from += (kept - from + kSlotLanes - 1) / kSlotLanes * kSlotLanes;
#pragma unroll 1
  for (uint32_t at = from; at < to; at += kAtOnce * kSlotLanes) {
    float2 z[kAtOnce], g[kAtOnce], ape[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t now = at + i * kSlotLanes;
      if (now >= to) continue;
      z[i] = LoadPair(rows.Kv(now - rows.start));
      g[i] = LoadPair(rows.Gate(now - rows.start));
      ape[i] = LoadConstant(rows.Ape(now % ratio));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t now = at + i * kSlotLanes;
      if (now >= to) continue;
      StorePair(rows.KvState(Modulo(now, rows.ring)), z[i]);
      StorePair(rows.GateState(Modulo(now, rows.ring)), Add(g[i], ape[i]));
    }
  }
}

// A thread's slots of a window: slot_lane + kSlotLanes * i.
template <bool kAll>  // a window has kCompressorMaxRatio slots
struct WholeSlots {
  uint32_t slot_lane, ratio, own, start, ring, in_ring;  // own: the window's first position

  __device__ __forceinline__ WholeSlots(const Rows& rows, uint32_t position, uint32_t lane,
                                        uint32_t slots)
      : slot_lane(lane), ratio(slots), own(position), start(rows.start), ring(rows.ring) {
    in_ring = Modulo(own, ring);
  }

  __device__ __forceinline__ uint32_t Slot(int i) const { return slot_lane + i * kSlotLanes; }
  __device__ __forceinline__ bool There(int i) const { return kAll || Slot(i) < ratio; }
  __device__ __forceinline__ bool New(int i) const { return There(i) && own + Slot(i) >= start; }
  __device__ __forceinline__ uint32_t InRing(int i) const {
    const uint32_t at = in_ring + Slot(i);
    return at < ring ? at : at - ring;
  }

  // use(i, from) for each: of the chunk's rows, or the ring's.
  template <typename Use>
  __device__ __forceinline__ void ForEach(const float* chunk, const float* state, uint32_t columns,
                                          const Use& use) const {
    const bool chunks = own >= start;
    const bool rings = own + Slot(kSlotsPerThread - 1) < start && in_ring + ratio <= ring;
    if (chunks || rings) {
      const uint32_t row = slot_lane + (chunks ? own - start : in_ring);
      const float* from = (chunks ? chunk : state) + uint64_t{row} * columns;
#pragma unroll
      for (int i = 0; i < kSlotsPerThread; ++i) {
        if (There(i)) use(i, from + i * kSlotLanes * columns);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      const uint32_t row = New(i) ? own - start + Slot(i) : InRing(i);
      if (There(i)) use(i, (New(i) ? chunk : state) + uint64_t{row} * columns);
    }
  }
};

struct WholeShared {
  alignas(16) float ape[kSlotsPerThread][kSlotLanes][kSumChannels];
  float norm[kSlotLanes][kSumChannels], value[kSlotLanes][kSumChannels];
  float4 ahead[kLanes];          // norm, sine, cosine
  int order[kChannels][kLanes];  // of the largest gates
  float tile_sum[kMaxTiles];
  Lengths lengths;
  alignas(8) uint64_t sums_barrier;
};

// kModel: the ratio and the width are the model's.
template <bool kModel>
__global__ void __launch_bounds__(kWholeThreads, 2)
    WholeKernel(const __grid_constant__ WholeParams params) {
  __shared__ WholeShared shared;
  const CompressorParams& p = params.p;
  const CompressorJob& job = p.jobs[blockIdx.y];
  const int lane = threadIdx.x % kLanes, slot_lane = threadIdx.x / kLanes;
  const int d = kModel ? kModelWidth : static_cast<int>(job.d), column = lane * kChannels;
  const int tiles = kModel ? TilesOf(kModelWidth) : params.tiles;
  const uint32_t ratio = kModel ? kCompressorMaxRatio : static_cast<uint32_t>(p.ratio);
  const uint32_t index = blockIdx.x / tiles, tile = blockIdx.x - index * tiles;
  const uint32_t b = params.windows == 1 ? index : index / params.windows;
  const uint32_t item = index - b * params.windows;
  const int first = static_cast<int>(tile) * kSumChannels + column;
  const bool mine = kModel || first < d;
  AskForLengths(p, b, shared.lengths);
  Rows rows(p, job, b, d, mine ? first : 0);
  Constants constants = {};
  if (slot_lane == 0) constants = ConstantsOf(p, job, d, rows.channel);
  // While the lengths are on their way: about the rows that it will read. Gates of a long chunk are
  // not to wait for values.
  static_assert(kWholeThreads == 4 * kCompressorMaxRatio, "a line each");
  const uint32_t ahead_row = threadIdx.x / 4, ahead = item * ratio + ahead_row;
  const uint32_t ahead_channel = tile * kSumChannels + threadIdx.x % 2 * (kSumChannels / 2);
  const bool of_gate = threadIdx.x % 4 >= 2;
  if ((kModel || (ahead_row < ratio && ahead_channel < d)) && ahead < p.t &&
      (of_gate || p.t < ratio)) {
    Prefetch((of_gate ? job.gate : job.kv) + (b * p.t + ahead) * d + ahead_channel);
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
      CopyToState(rows, ratio, own + slot_lane, min(next, rows.end));
      if (read) CopyToState(rows, ratio, next + slot_lane, rows.end);
    }
    return;
  }
  const uint32_t barrier = SharedAddress(&shared.sums_barrier);
  if (slot_lane == 0) {
    shared.order[0][lane] = shared.order[1][lane] = OrderOf(-Infinity());
  }
  const WholeSlots<kModel> slots(rows, own, slot_lane, ratio);
  float2 g[kSlotsPerThread], z[kSlotsPerThread];
  slots.ForEach(rows.Gate(0), rows.GateState(0), d,
                [&](int i, const float* from) { g[i] = LoadPair(from); });
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (slots.New(i)) CopyPair(&shared.ape[i][slot_lane][column], rows.Ape(slots.Slot(i)));
  }
  if (tiles > 1) ExpectFloats(barrier, tiles);
  __syncthreads();  // all gates have been asked for; order is set
  slots.ForEach(rows.Kv(0), rows.KvState(0), d,
                [&](int i, const float* from) { z[i] = LoadPair(from); });
  if (slot_lane == 0) {
    const SinCos turn = TurnOf(constants, own);
    const float2 norm = constants.Norm();
    shared.ahead[lane] = make_float4(norm.x, norm.y, turn.sin, turn.cos);
  }
  WaitForCopies();
  float2 top = make_float2(-Infinity(), -Infinity());
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (!slots.There(i)) g[i] = make_float2(-Infinity(), -Infinity());
    if (slots.New(i)) g[i] = Add(g[i], LoadShared(&shared.ape[i][slot_lane][column]));
    top.x = fmaxf(top.x, g[i].x);
    top.y = fmaxf(top.y, g[i].y);
  }
  atomicMax(&shared.order[0][lane], OrderOf(top.x));
  atomicMax(&shared.order[1][lane], OrderOf(top.y));
  // Its own positions to the state: those that it reads there are other slots.
  const uint32_t kept = max(rows.Kept(), own);
  const bool keeps = mine && writes && own + slots.Slot(kSlotsPerThread - 1) >= kept;
  if (keeps) {
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (slots.There(i) && own + slots.Slot(i) >= kept) {
        StorePair(rows.GateState(slots.InRing(i)), g[i]);
      }
    }
  }
  __syncthreads();
  top = make_float2(FloatOf(shared.order[0][lane]), FloatOf(shared.order[1][lane]));
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    g[i].x = ExpOfNegative(g[i].x - top.x);
    g[i].y = ExpOfNegative(g[i].y - top.y);
  }
  float2 norms = make_float2(0.0f, 0.0f), values = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (!slots.There(i)) continue;
    norms = Add(norms, g[i]);
    values = Add(values, make_float2(g[i].x * z[i].x, g[i].y * z[i].y));
  }
  StoreShared(&shared.norm[slot_lane][column], norms);
  StoreShared(&shared.value[slot_lane][column], values);
  if (keeps) {
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      if (slots.There(i) && own + slots.Slot(i) >= kept) {
        StorePair(rows.KvState(slots.InRing(i)), z[i]);
      }
    }
  }
  __syncthreads();
  if (tiles > 1) WaitForCluster();  // all have begun, and made their barriers
  if (slot_lane == 0) {
    values = SumLanes(shared.value, column);
    norms = SumLanes(shared.norm, column);
    float2 x = RoundBf16(make_float2(values.x / norms.x, values.y / norms.y));
    if (!mine) x = make_float2(0.0f, 0.0f);
    const float sum = TileSquares(x);
    float squares = __shfl_sync(kAllLanes, sum, 1);
    if (tiles > 1) {
      if (lane % 2 == 1 && lane / 2 < tiles) {
        StoreIn(&shared.tile_sum[tile], barrier, lane / 2, sum);
      }
      Wait(barrier, 0);
      squares = RowSquares(shared.tile_sum, TilesOf(d));
    }
    const float mean = squares * params.width[blockIdx.y].mean;
    const float4 c = shared.ahead[lane];
    const float2 y =
        NormAndRope(make_float2(c.x, c.y), {c.z, c.w}, first >= d - p.rotary, mean, p.eps, x);
    const int64_t entry = b * job.slots + window;
    if (static_cast<int>(tile) < TilesOf(d)) StoreKey(p, job, entry, first, mine, y);
  }
  // All of this thread block have read the state.
  if (mine && writes && read) CopyToState(rows, ratio, next + slot_lane, rows.end);
}

}  // namespace compressor
}  // namespace dsv4
