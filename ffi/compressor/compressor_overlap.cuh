// Ratio 4: a thread has all 8 slots of its channels.
//
// A state is read by a row's first two windows alone. They lie in one cluster, which writes it when
// both have read.
// One token a row is a kernel of its own: the parts of an entry lie on several SMs, and the token's
// rows do not wait for the lengths.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "compressor/compressor_parts.cuh"

namespace dsv4 {
namespace compressor {

constexpr int kRatio = static_cast<int>(kOverlapRatio);
constexpr int kOverlapSlots = 2 * kRatio;

// Positions of the window before, in the first half of channels, then its own, in the second.
struct Slots {
  float2 z[kOverlapSlots], g[kOverlapSlots];

  // One that a row does not have: it weighs nothing.
  __device__ __forceinline__ void Drop(int s) {
    z[s] = make_float2(0.0f, 0.0f);
    g[s] = make_float2(-Infinity(), -Infinity());
  }
};

__device__ __forceinline__ void LoadSlots(const Rows& rows, uint32_t window, int d, Slots& slots) {
  const uint32_t own = window * kRatio;
  if (window > 0 && own - kRatio >= rows.start) {  // all of the chunk
    const uint32_t oldest = own - kRatio - rows.start;
    const float *gate = rows.Gate(oldest), *kv = rows.Kv(oldest);
#pragma unroll
    for (int s = 0; s < kOverlapSlots; ++s) {
      const int ahead = s * 2 * d + (s < kRatio ? 0 : d);
      slots.g[s] = LoadPairOnce(gate + ahead);
      slots.z[s] = LoadPairOnce(kv + ahead);
    }
    return;
  }
  uint32_t at = Modulo(window > 0 ? own - kRatio : 0, rows.ring);
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    if (s < kRatio && window == 0) {
      slots.Drop(s);
      continue;
    }
    const bool old = own + s < rows.start + kRatio;
    const uint32_t row = old ? at : own + s - kRatio - rows.start;
    const int column = s < kRatio ? 0 : d;
    slots.g[s] = LoadPairOnce((old ? rows.GateState(row) : rows.Gate(row)) + column);
    slots.z[s] = LoadPairOnce((old ? rows.KvState(row) : rows.Kv(row)) + column);
    if (++at == rows.ring) at = 0;
  }
}

struct Ape {
  float2 of[kOverlapSlots];
};

__device__ __forceinline__ void LoadApe(const Rows& rows, int d, Ape& ape) {
  const float* from = rows.Ape(0);
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    ape.of[s] = LoadPair(from + s % kRatio * 2 * d + (s < kRatio ? 0 : d));
  }
}

// To the gates of the chunk, those of the state have it.
__device__ __forceinline__ void AddApe(const Rows& rows, uint32_t window, const Ape& ape,
                                       Slots& slots) {
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    if (window * kRatio + s < rows.start + kRatio) continue;
    slots.g[s] = Add(slots.g[s], ape.of[s]);
  }
}

__device__ __forceinline__ float PoolChannel(const float (&z)[kOverlapSlots],
                                             const float (&g)[kOverlapSlots]) {
  float top = -Infinity();
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) top = fmaxf(top, g[s]);
  float norm[kOverlapSlots], value[kOverlapSlots];
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    norm[s] = ExpOfNegative(g[s] - top);
    value[s] = norm[s] * z[s];
  }
#pragma unroll
  for (int half = kOverlapSlots / 2; half > 0; half /= 2) {
#pragma unroll
    for (int s = 0; s < half; ++s) {
      norm[s] += norm[s + half];
      value[s] += value[s + half];
    }
  }
  // Zeros of idle lanes are part of the sum: it is never -0.
  return (value[0] + 0.0f) / norm[0];
}

__device__ __forceinline__ float2 Pool(const Slots& slots) {
  float z[kOverlapSlots], g[kOverlapSlots];
  float2 x;
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    z[s] = slots.z[s].x;
    g[s] = slots.g[s].x;
  }
  x.x = PoolChannel(z, g);
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    z[s] = slots.z[s].y;
    g[s] = slots.g[s].y;
  }
  x.y = PoolChannel(z, g);
  return RoundBf16(x);
}

// Of the last positions every `step`th four, from the `which`th on: their loads go out together.
__device__ __forceinline__ void WriteOverlapState(const Rows& rows, int d, uint32_t which,
                                                  uint32_t step) {
#pragma unroll 1
  for (uint32_t at = rows.Kept() + which * kRatio; at < rows.end; at += step * kRatio) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 z[kRatio], g[kRatio], ape[kRatio];
#pragma unroll
      for (int i = 0; i < kRatio; ++i) {
        if (at + i >= rows.end) continue;
        z[i] = LoadPair(rows.Kv(at + i - rows.start) + half * d);
        g[i] = LoadPair(rows.Gate(at + i - rows.start) + half * d);
        ape[i] = LoadConstant(rows.Ape((at + i) % kRatio) + half * d);
      }
#pragma unroll
      for (int i = 0; i < kRatio; ++i) {
        if (at + i >= rows.end) continue;
        const uint32_t to = Modulo(at + i, rows.ring);
        StorePair(rows.KvState(to) + half * d, z[i]);
        StorePair(rows.GateState(to) + half * d, Add(g[i], ape[i]));
      }
    }
  }
}

constexpr int kOverlapThreads = 256;
constexpr int kOverlapWarps = kOverlapThreads / kLanes;
constexpr int kOverlapCluster = 2;
constexpr int kOverlapBlocks = 3;  // of a multiprocessor

struct OverlapParams {
  CompressorParams p;
  Width width[kMaxCompressorJobs];
  uint32_t items;  // of a batch row: a window each; even
  uint32_t first_job_blocks;
};

__host__ __device__ inline int TilesOf(int64_t d) {
  return (static_cast<int>(d) + kSumChannels - 1) / kSumChannels;
}

struct OverlapShared {
  float tile_sum[kOverlapWarps];
  float2 exchange[kOverlapWarps][kLanes];
  uint32_t largest[kOverlapWarps];
};

// While the lengths are on their way: a line each of the chunk's four rows that are about an
// item's.
__device__ __forceinline__ void PrefetchItem(const CompressorParams& p, const CompressorJob& job,
                                             int d, uint32_t b, uint32_t item, int thread) {
  constexpr int kLine = 32;  // floats
  const int lines = 2 * d / kLine, row = thread / lines, ahead = thread % lines * kLine;
  const int64_t at = int64_t{item} * kRatio + row % kRatio;
  if (at < p.t) Prefetch((row < kRatio ? job.gate : job.kv) + (b * p.t + at) * (2 * d) + ahead);
}

// A thread block's items of a job that is d wide.
__device__ __forceinline__ void RunOverlap(const OverlapParams& params, int which, int d,
                                           OverlapShared& shared) {
  const CompressorParams& p = params.p;
  const CompressorJob& job = p.jobs[which];
  const int warps = TilesOf(d), per_block = kOverlapWarps / warps;
  const uint32_t block = blockIdx.x - (which ? params.first_job_blocks : 0);
  const int team_of = threadIdx.x / kLanes / warps;
  const uint32_t index = block * per_block + team_of;
  if (team_of >= per_block || index >= static_cast<uint32_t>(p.b) * params.items) return;
  const auto row_of = [&](uint32_t at) { return p.b == 1 ? 0 : at / params.items; };
  const uint32_t b = row_of(index), item = index - b * params.items;
  const int base = team_of * warps;  // warp
  const int first = (threadIdx.x - base * kLanes) * kChannels;
  const bool mine = d % kSumChannels == 0 || first < d;
  const Lengths lengths = LengthsOf(p, b);
  if (d % kSumChannels == 0) PrefetchItem(p, job, d, b, item, first / kChannels);
  Rows rows(p, job, b, 2 * d, mine ? first : 0);
  Ape ape;
  LoadApe(rows, d, ape);
  const Constants constants = ConstantsOf(p, job, d, rows.channel);
  rows.Take(lengths, p.t);

  const uint32_t oldest = rows.start / kRatio, window = oldest + item;
  const uint32_t closed = min(static_cast<int64_t>(rows.end / kRatio), job.slots);
  const bool closes = window < closed;
  // So say all of the cluster: a row's first items are in it.
  const uint32_t cluster_items = kOverlapCluster * per_block;
  uint32_t cluster_first = block / kOverlapCluster * cluster_items;
  cluster_first -= row_of(cluster_first) * params.items;
  const bool meets = cluster_first == 0 || cluster_first + cluster_items > params.items;
  float2 x;
  SinCos turn = {};
  if (closes) {
    Slots slots;
    LoadSlots(rows, window, d, slots);
    turn = TurnOf(constants, window * kRatio);
    AddApe(rows, window, ape, slots);
    x = Pool(slots);
    if (!mine) x = make_float2(0.0f, 0.0f);
    const float sum = TileSquares(x);
    if (threadIdx.x % kLanes == 1) shared.tile_sum[base + first / kSumChannels] = sum;
    Meet(team_of + 1, warps * kLanes);
  }
  if (meets) ArriveAtCluster();  // what this one reads of a state is read
  if (closes) {
    const float mean = RowSquares(shared.tile_sum + base, warps) * params.width[which].mean;
    const float2 y = NormAndRope(constants.Norm(), turn, constants.rotary, mean, p.eps, x);
    const int64_t entry = b * job.slots + window;
    if (job.form == EntryForm::kKv) {
      StoreKey(p, job, entry, first, mine, y);
    } else {
      const Team team = {warps, team_of + 1, shared.exchange + base, shared.largest + base};
      StoreIndexKey(job, d, params.width[which].hadamard, entry, first, mine, y, team);
    }
  }
  if (!meets) return;
  WaitForCluster();
  if (!mine || item >= kOverlapCluster) return;
  // Half of it each, or all if the other has a window and this one has not.
  const bool alone = closed == oldest + 1;
  if (!alone || !closes) WriteOverlapState(rows, d, alone ? 0 : item, alone ? 1 : 2);
}

__global__ void __launch_bounds__(kOverlapThreads, kOverlapBlocks)
    OverlapKernel(const __grid_constant__ OverlapParams params) {
  __shared__ OverlapShared shared;
  WaitForPrevious();
  LetNextBegin();
  const int which = blockIdx.x >= params.first_job_blocks ? 1 : 0;
  const int d = static_cast<int>(params.p.jobs[which].d);
  if (d == kModelWidth) {
    RunOverlap(params, which, kModelWidth, shared);
  } else if (d == kModelIndexWidth) {
    RunOverlap(params, which, kModelIndexWidth, shared);
  } else {
    RunOverlap(params, which, d, shared);
  }
}

constexpr int kPartChannels = 128;  // an index key is one part
constexpr int kTokenThreads = kPartChannels / kChannels;
constexpr int64_t kFewRows = 8;  // whose rings come to the L2 although few windows close

struct TokenParams {
  CompressorParams p;
  Width width[kMaxCompressorJobs];
  uint32_t first_job_blocks;
  int log_cluster;  // thread blocks; a job's entries lie in it as often as they fit
};

__host__ __device__ inline int PartsOf(int64_t d) {
  return (static_cast<int>(d) + kPartChannels - 1) / kPartChannels;
}

// A tile's channels in `rows` rows, a warp, into the L2.
__device__ __forceinline__ void PrefetchTile(const float* rows, int columns, int count,
                                             int channels) {
  constexpr int kLine = 32, kLines = kSumChannels / kLine;  // floats
  const int lane = threadIdx.x % kLanes, ahead = lane % kLines * kLine;
  if (ahead >= channels) return;
  for (int i = lane / kLines; i < count; i += kLanes / kLines) {
    Prefetch(rows + i * columns + ahead);
  }
}

struct TokenShared {
  float tile_sum[kMaxTiles];
  float2 exchange[kTokenThreads / kLanes][kLanes];
  uint32_t largest[kTokenThreads / kLanes];
  Lengths lengths;
  alignas(8) uint64_t sums_barrier;
};

__device__ __forceinline__ void RunToken(const TokenParams& params, int which, int d,
                                         TokenShared& shared) {
  const CompressorParams& p = params.p;
  const CompressorJob& job = p.jobs[which];
  const int parts = PartsOf(d), lane = threadIdx.x % kLanes;
  const uint32_t block = blockIdx.x - (which ? params.first_job_blocks : 0);
  const uint32_t cluster = block >> params.log_cluster;
  const uint32_t rank = block - (cluster << params.log_cluster);
  const uint32_t per_cluster = (1u << params.log_cluster) / parts, of_cluster = rank / parts;
  const uint32_t b = cluster * per_cluster + of_cluster;
  if (of_cluster >= per_cluster || b >= p.b) return;
  const int part = static_cast<int>(rank - of_cluster * parts);
  const int first = part * kPartChannels + threadIdx.x * kChannels;
  const int tile = first / kSumChannels;
  const bool mine = d % kPartChannels == 0 || first < d;
  AskForLengths(p, b, shared.lengths);
  Rows rows(p, job, b, 2 * d, mine ? first : 0);
  const float2 z[2] = {LoadPair(rows.Kv(0)), LoadPair(rows.Kv(0) + d)};
  float2 g[2] = {LoadPair(rows.Gate(0)), LoadPair(rows.Gate(0) + d)};
  const Constants constants = ConstantsOf(p, job, d, rows.channel);
  // While the lengths are on their way. Of few rows also what a window that closes has in the ring.
  const int back = tile * kSumChannels - rows.channel, channels = d - tile * kSumChannels;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    PrefetchTile(rows.Ape(0) + back + half * d, 2 * d, kRatio, channels);
    if (p.b > kFewRows) continue;
    PrefetchTile(rows.KvState(0) + back + half * d, 2 * d, kOverlapSlots, channels);
    PrefetchTile(rows.GateState(0) + back + half * d, 2 * d, kOverlapSlots, channels);
  }
  const uint32_t barrier = SharedAddress(&shared.sums_barrier);
  if (parts > 1) MakeBarrier(barrier);
  WaitForLengths();
  rows.Take(shared.lengths, p.t);
  if (rows.end == rows.start) return;
  const uint32_t window = rows.start / kRatio, phase = rows.start % kRatio;
  const float* ape = rows.Ape(phase);
  const float2 ape_of[2] = {LoadConstant(ape), LoadConstant(ape + d)};
  const bool closes = phase == kRatio - 1 && window < job.slots;
  const uint32_t to = Modulo(rows.start, rows.ring);
  Slots slots;
  SinCos turn = {};
  if (closes) {
#pragma unroll
    for (int s = 0; s < kOverlapSlots - 1; ++s) {
      if (s < kRatio && window == 0) {
        slots.Drop(s);
        continue;
      }
      const uint32_t behind = kOverlapSlots - 1 - s;
      const uint32_t at = to >= behind ? to - behind : to + rows.ring - behind;
      const int column = s < kRatio ? 0 : d;
      slots.g[s] = LoadPairOnce(rows.GateState(at) + column);
      slots.z[s] = LoadPairOnce(rows.KvState(at) + column);
    }
    if (parts > 1) ExpectFloats(barrier, TilesOf(d));
    turn = TurnOf(constants, window * kRatio);
  }
  // None of the slots that are read.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    g[half] = Add(g[half], ape_of[half]);
    if (!mine) continue;
    StorePair(rows.KvState(to) + half * d, z[half]);
    StorePair(rows.GateState(to) + half * d, g[half]);
  }
  if (!closes) return;
  slots.z[kOverlapSlots - 1] = z[1];
  slots.g[kOverlapSlots - 1] = g[1];
  float2 x = Pool(slots);
  if (!mine) x = make_float2(0.0f, 0.0f);
  const float sum = TileSquares(x);
  const Team team = {min(TilesOf(d), kTokenThreads / kLanes), 1, shared.exchange, shared.largest};
  if (parts > 1) {
    WaitForCluster();  // all of its thread blocks have begun, and made their barriers
    if (lane % 2 == 1 && lane / 2 < parts && tile < TilesOf(d)) {
      StoreIn(&shared.tile_sum[tile], barrier, static_cast<int>(of_cluster) * parts + lane / 2,
              sum);
    }
    Wait(barrier, 0);
  } else {
    if (lane == 1) shared.tile_sum[tile] = sum;
    __syncthreads();
  }
  if (tile >= TilesOf(d)) return;
  const float mean = RowSquares(shared.tile_sum, TilesOf(d)) * params.width[which].mean;
  const float2 y = NormAndRope(constants.Norm(), turn, constants.rotary, mean, p.eps, x);
  const int64_t entry = b * job.slots + window;
  if (job.form == EntryForm::kKv) {
    StoreKey(p, job, entry, first, mine, y);
  } else {
    StoreIndexKey(job, d, params.width[which].hadamard, entry, first, mine, y, team);
  }
}

// Ratio 4, one token a row at most.
__global__ void __launch_bounds__(kTokenThreads)
    OverlapTokenKernel(const __grid_constant__ TokenParams params) {
  __shared__ TokenShared shared;
  WaitForPrevious();
  LetNextBegin();
  const int which = blockIdx.x >= params.first_job_blocks ? 1 : 0;
  const int d = static_cast<int>(params.p.jobs[which].d);
  if (d == kModelWidth) {
    RunToken(params, which, kModelWidth, shared);
  } else if (d == kModelIndexWidth) {
    RunToken(params, which, kModelIndexWidth, shared);
  } else {
    RunToken(params, which, d, shared);
  }
}

}  // namespace compressor
}  // namespace dsv4
