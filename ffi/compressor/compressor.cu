// What bounds it: a few tokens are latency (lengths, then every slot at once, one or two
// reductions, the stores), many tokens are memory: each row of kv and gate is read once, by the one
// window that wants it. A thread takes 4 channels.
//
// Ratio 4: 8 slots, all in one thread, so that a warp is 128 channels and index keys need no more;
// both jobs of a layer are one launch. Other ratios: 16 threads share the slots of 4 channels, and
// a thread block takes 64 channels, so that 512 KB of HCA's window are read by 8 SMs; they exchange
// their sums of squares, and nothing else, through the cluster.
//
// A state is read and written by the thread block of a row's first window alone, all of it before
// the first store: no later window has a slot in a ring.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/barrier.cuh"
#include "common/bits.h"
#include "common/e2m1.h"
#include "common/e4m3.h"
#include "common/exp.h"
#include "common/halved.cuh"
#include "compressor/compressor.h"
#include "compressor/compressor_rows.h"

namespace dsv4 {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kChannels = kChannelsPerLane;             // of a thread
constexpr int kTileThreads = kSumChannels / kChannels;  // side by side in half a warp
constexpr int kMaxTiles = kCompressorMaxWidth / kSumChannels;

__device__ __forceinline__ float Infinity() { return __uint_as_float(0x7F800000u); }

// Four channels of a row. Not through the read-only cache: a state is written later on.
__device__ __forceinline__ void LoadRow(float (&x)[kChannels], const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  x[0] = v.x;
  x[1] = v.y;
  x[2] = v.z;
  x[3] = v.w;
}
__device__ __forceinline__ void StoreRow(const float (&x)[kChannels], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void LoadConstant(float (&x)[kChannels], const float* from) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(from));
  x[0] = v.x;
  x[1] = v.y;
  x[2] = v.z;
  x[3] = v.w;
}

// Rows of one batch row of a job, from `channel` on.
struct Rows {
  const CompressorParams& p;
  const CompressorJob& job;
  int64_t b;
  Appended row;
  int64_t columns;

  __device__ Rows(const CompressorParams& params, const CompressorJob& of, int64_t batch)
      : p(params),
        job(of),
        b(batch),
        row(AppendedOf(params, batch)),
        columns(Overlaps(params) ? 2 * of.d : of.d) {}

  __device__ __forceinline__ bool Closes(int64_t window) const {
    return (window + 1) * p.ratio <= row.end;
  }

  __device__ __forceinline__ uint32_t SlotOf(int64_t at) const {
    // Below 2^32: lengths are int32.
    return static_cast<uint32_t>(at) % static_cast<uint32_t>(job.ring);
  }

  // Position first + offset >= 0: what is stored of it, or what the chunk has. `slot` is that of
  // `first`, and the offset less than a ring.
  __device__ __forceinline__ void Load(int64_t first, uint32_t slot, int offset, int64_t channel,
                                       float (&z)[kChannels], float (&g)[kChannels]) const {
    const bool old = first + offset < row.start;
    const int64_t ahead = static_cast<int64_t>(slot) + offset;
    const int64_t in_ring = b * job.ring + (ahead < job.ring ? ahead : ahead - job.ring);
    const int64_t in_chunk = b * p.t + first + offset - row.start;
    const int64_t from = (old ? in_ring : in_chunk) * columns + channel;
    LoadRow(z, (old ? job.kv_state : job.kv) + from);
    LoadRow(g, (old ? job.gate_state : job.gate) + from);
  }

  // The chunk's gates are without `ape` as yet; `phase` is at % ratio. Apart from Load, so that no
  // load waits for the one before.
  __device__ __forceinline__ void AddApe(int64_t at, int64_t phase, int64_t channel,
                                         float (&g)[kChannels]) const {
    if (at < row.start) return;
    float ape[kChannels];
    LoadConstant(ape, job.ape + phase * columns + channel);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) g[k] += ape[k];
  }

  // Positions FirstKept + first, + step, ... to the states, a few at a time: their loads go out
  // together.
  __device__ __forceinline__ void WriteState(int64_t channel, int first, int step) const {
    constexpr int kAtOnce = 4;
    for (int64_t at = FirstKept(row, job.ring) + first; at < row.end; at += kAtOnce * step) {
      float z[kAtOnce][kChannels], g[kAtOnce][kChannels], ape[kAtOnce][kChannels];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t now = at + i * step;
        if (now >= row.end) continue;
        const int64_t from = (b * p.t + now - row.start) * columns + channel;
        const uint32_t phase = static_cast<uint32_t>(now) % static_cast<uint32_t>(p.ratio);
        LoadRow(z[i], job.kv + from);
        LoadRow(g[i], job.gate + from);
        LoadConstant(ape[i], job.ape + phase * columns + channel);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t now = at + i * step;
        if (now >= row.end) continue;
#pragma unroll
        for (int k = 0; k < kChannels; ++k) g[i][k] += ape[i][k];
        const int64_t to = (b * job.ring + SlotOf(now)) * columns + channel;
        StoreRow(z[i], job.kv_state + to);
        StoreRow(g[i], job.gate_state + to);
      }
    }
  }
};

// Sum of squares of 64 channels, in every one of 16 threads.
__device__ __forceinline__ float TileSquares(const float (&x)[kChannels]) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) sum += x[k] * x[k];
#pragma unroll
  for (int half = kTileThreads / 2; half > 0; half /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, half);
  }
  return sum;
}

// The largest magnitude's bits among groups of `threads`, a power of two up to 32.
__device__ __forceinline__ uint32_t LargestBits(const float (&y)[kChannels], int threads) {
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) largest = max(largest, __float_as_uint(y[k]) & 0x7FFFFFFFu);
  for (int half = threads / 2; half > 0; half /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, half));
  }
  return largest;
}

// The norm's weights of channels first .. first + 3: asked for long before they are needed.
struct NormWeights {
  uint16_t bits[kChannels];

  __device__ __forceinline__ NormWeights(const CompressorJob& job, int first) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) bits[k] = first < job.d ? __ldg(job.norm + first + k) : 0;
  }
};

__device__ __forceinline__ void Prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ __forceinline__ float RoundBf16(float x) { return Bf16ToFloat(FloatToBf16(x)); }

// Norm and rotation of channels first .. first + 3, from the row's sum of squares.
__device__ __forceinline__ void NormAndRope(const CompressorParams& p, const CompressorJob& job,
                                            const NormWeights& weights, int64_t window, int first,
                                            float squares, float (&x)[kChannels]) {
  const float mean = squares * (1.0f / static_cast<float>(job.d));
  const float scale = __frsqrt_rn(mean + p.eps);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    x[k] = RoundBf16(Bf16ToFloat(weights.bits[k]) * (x[k] * scale));
  }
  const int nope = static_cast<int>(job.d - p.rotary);
#pragma unroll
  for (int k = 0; k < kChannels; k += 2) {
    if (first + k < nope) continue;
    float sin, cos;
    sincosf(static_cast<float>(window * p.ratio) * __ldg(p.frequencies + (first + k - nope) / 2),
            &sin, &cos);
    const float even = x[k], odd = x[k + 1];
    x[k] = RoundBf16(even * cos - odd * sin);
    x[k + 1] = RoundBf16(even * sin + odd * cos);
  }
}

__device__ __forceinline__ uint32_t EncodeFour(const float (&y)[kChannels], float inverse) {
  uint32_t codes = 0;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) codes |= uint32_t{EncodeE4m3(y[k] * inverse)} << 8 * k;
  return codes;
}

// Channels first .. first + 3 of a key; blocks are 16 threads.
__device__ __forceinline__ void StoreKey(const CompressorParams& p, const CompressorJob& job,
                                         int64_t entry, int first, bool mine,
                                         const float (&y)[kChannels]) {
  const uint32_t byte = Fp8ScaleByte(LargestBits(y, kTileThreads));
  const int nope = static_cast<int>(job.code_bytes);
  if (!mine) return;
  if (first < nope) {
    *reinterpret_cast<uint32_t*>(job.code + entry * nope + first) =
        EncodeFour(y, InverseScale(byte));
    if (first % kSumChannels == 0) {
      job.scale[entry * job.scales + first / kSumChannels] = static_cast<uint8_t>(byte);
    }
    return;
  }
  uint2 pairs;
  pairs.x = FloatToBf16(y[0]) | uint32_t{FloatToBf16(y[1])} << 16;
  pairs.y = FloatToBf16(y[2]) | uint32_t{FloatToBf16(y[3])} << 16;
  *reinterpret_cast<uint2*>(job.rope + entry * p.rotary + first - nope) = pairs;
}

// Channels first .. first + 3 of an index key; d / 4 threads side by side have all of it.
__device__ __forceinline__ void StoreIndexKey(const CompressorJob& job, int64_t entry, int first,
                                              bool mine, float (&y)[kChannels]) {
  const int threads = static_cast<int>(job.d) / kChannels, lane = threadIdx.x % 32;
  const float even = y[0] + y[1], odd = y[0] - y[1];
  const float even2 = y[2] + y[3], odd2 = y[2] - y[3];
  y[0] = even + even2;
  y[1] = odd + odd2;
  y[2] = even - even2;
  y[3] = odd - odd2;
  for (int half = 1; half < threads; half *= 2) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const float other = __shfl_xor_sync(kAllLanes, y[k], half);
      y[k] = lane & half ? other - y[k] : y[k] + other;
    }
  }
  const auto norm = static_cast<float>(1.0 / sqrt(static_cast<double>(job.d)));
#pragma unroll
  for (int k = 0; k < kChannels; ++k) y[k] = RoundBf16(y[k] * norm);
  if (job.form == EntryForm::kFp8) {
    const uint32_t byte = Fp8ScaleByte(LargestBits(y, threads));
    if (!mine) return;
    *reinterpret_cast<uint32_t*>(job.code + entry * job.code_bytes + first) =
        EncodeFour(y, InverseScale(byte));
    if (first == 0) job.scale[entry] = static_cast<uint8_t>(byte);
    return;
  }
  const uint32_t byte = Mxfp4ScaleByte(LargestBits(y, 32 / kChannels));
  if (!mine) return;
  const float inverse = InverseScale(byte);
  uint32_t codes = 0;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) codes |= uint32_t{EncodeE2m1(y[k] * inverse)} << 4 * k;
  *reinterpret_cast<uint16_t*>(job.code + entry * job.code_bytes + first / 2) =
      static_cast<uint16_t>(codes);
  if (first % 32 == 0) {
    job.scale[entry * job.scales + first / 32] = static_cast<uint8_t>(byte);
  }
}

constexpr int kOverlapThreads = 128;
constexpr int kOverlapSlots = 2 * static_cast<int>(kOverlapRatio);

struct OverlapParams {
  CompressorParams p;
  int64_t items;  // of a batch row: its first two windows and its states, then a window each
  int64_t first_job_blocks;
};

// Whole warps take an item of a job; a thread block has as many as fit.
__host__ __device__ inline int ItemThreads(int64_t d) {
  return static_cast<int>((d / kChannels + 31) / 32 * 32);
}
__host__ __device__ inline int ItemsPerBlock(int64_t d) { return kOverlapThreads / ItemThreads(d); }

// x of a window, four channels.
__device__ __forceinline__ void PoolOverlap(const Rows& rows, int64_t window, int first,
                                            float (&x)[kChannels]) {
  float z[kOverlapSlots][kChannels], g[kOverlapSlots][kChannels];
  const int64_t before = (window - 1) * kOverlapRatio;
  constexpr int kHalf = kOverlapSlots / 2;
  // Window 0 has no slots before; it loads its own in their place.
  const int64_t oldest = window == 0 ? 0 : before;
  const uint32_t oldest_slot = rows.SlotOf(oldest);
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    const int offset = window == 0 ? s % kHalf : s;
    rows.Load(oldest, oldest_slot, offset, s < kHalf ? first : rows.job.d + first, z[s], g[s]);
  }
  __syncwarp(__activemask());  // all loads go out before one is waited for
#pragma unroll
  for (int s = 0; s < kOverlapSlots; ++s) {
    if (s < kHalf && window == 0) continue;
    rows.AddApe(before + s, s % kHalf, s < kHalf ? first : rows.job.d + first, g[s]);
  }
  const int absent = window == 0 ? kHalf : 0;  // slots
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    float top = -Infinity();
#pragma unroll
    for (int s = 0; s < kOverlapSlots; ++s) {
      if (s >= absent) top = g[s][k] > top ? g[s][k] : top;
    }
    float norm[kOverlapSlots], value[kOverlapSlots];
#pragma unroll
    for (int s = 0; s < kOverlapSlots; ++s) {
      norm[s] = s >= absent ? Exp(g[s][k] - top) : 0.0f;
      value[s] = s >= absent ? norm[s] * z[s][k] : 0.0f;
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
    x[k] = RoundBf16((value[0] + 0.0f) / norm[0]);
  }
}

__global__ void __launch_bounds__(kOverlapThreads, 3)
    OverlapKernel(const __grid_constant__ OverlapParams params) {
  __shared__ float tile_sum[kOverlapThreads / kTileThreads];
  const CompressorParams& p = params.p;
  const bool second = blockIdx.x >= params.first_job_blocks;
  const CompressorJob& job = p.jobs[second ? 1 : 0];
  const int threads = ItemThreads(job.d), per_block = ItemsPerBlock(job.d);
  const int local = threadIdx.x / threads, lane = threadIdx.x % threads;
  const int64_t block = blockIdx.x - (second ? params.first_job_blocks : 0);
  const int64_t index = block * per_block + local;
  const bool there = local < per_block && index < p.b * params.items;
  const int64_t b = there ? index / params.items : 0, item = there ? index % params.items : 0;
  const int first = lane * kChannels;
  const bool mine = there && first < job.d;
  const NormWeights weights(job, first);
  if (mine && p.t == 1) {  // while the lengths are on their way
    for (int64_t row = 0; row < kOverlapRatio; ++row) {
      Prefetch(job.ape + row * 2 * job.d + first);
      Prefetch(job.ape + (2 * row + 1) * job.d + first);
    }
    Prefetch(job.kv + b * 2 * job.d + first);
    Prefetch(job.kv + (b * 2 + 1) * job.d + first);
    Prefetch(job.gate + b * 2 * job.d + first);
    Prefetch(job.gate + (b * 2 + 1) * job.d + first);
  }
  const Rows rows(p, job, b);
  const int64_t oldest = rows.row.start / kOverlapRatio;

  for (int round = 0; round < 2; ++round) {
    const int64_t window = oldest + (item == 0 ? round : item + 1);
    const bool closes = there && (item == 0 || round == 0) && rows.Closes(window);
    if (!__syncthreads_or(closes)) break;  // a later window closes only if this one does
    float x[kChannels] = {};
    if (closes && mine) PoolOverlap(rows, window, first, x);
    const float sum = TileSquares(x);
    if (threadIdx.x % kTileThreads == 0) tile_sum[threadIdx.x / kTileThreads] = sum;
    __syncthreads();
    const bool stored = closes && mine && window < job.slots;
    float squares = 0;
    for (int tile = 0; tile < (job.d + kSumChannels - 1) / kSumChannels; ++tile) {
      squares +=
          tile_sum[min(local * threads / kTileThreads + tile, kOverlapThreads / kTileThreads - 1)];
    }
    if (stored) NormAndRope(p, job, weights, window, first, squares, x);
    const int64_t entry = b * job.slots + window;
    if (job.form == EntryForm::kKv) {
      StoreKey(p, job, entry, first, stored, x);
    } else {
      StoreIndexKey(job, entry, first, stored, x);
    }
  }
  // Its own columns were read by this very thread.
  if (mine && item == 0) {
    rows.WriteState(first, 0, 1);
    rows.WriteState(job.d + first, 0, 1);
  }
}

constexpr int kWholeThreads = kSlotLanes * kTileThreads;
constexpr int kSlotsPerThread = kCompressorMaxRatio / kSlotLanes;

struct WholeParams {
  CompressorParams p;
  int64_t windows;  // of a batch row
  int tiles;        // thread blocks of a cluster
};

// Four channels' sums of all slot lanes, by halves.
__device__ __forceinline__ void SumLanes(const float (&lanes)[kSlotLanes][kSumChannels], int column,
                                         float (&sum)[kChannels]) {
  float part[kSlotLanes][kChannels];
#pragma unroll
  for (int s = 0; s < kSlotLanes; ++s) LoadRow(part[s], &lanes[s][column]);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    sum[k] = Halved<kSlotLanes>([&](int s) { return part[s][k]; });
  }
}

__global__ void __launch_bounds__(kWholeThreads, 2)
    WholeKernel(const __grid_constant__ WholeParams params) {
  __shared__ __align__(16) float warp_top[kWholeThreads / 32][kSumChannels];
  __shared__ __align__(16) float norm[kSlotLanes][kSumChannels], value[kSlotLanes][kSumChannels];
  __shared__ float tile_sum[kMaxTiles];
  __shared__ __align__(8) uint64_t sums_barrier;
  const CompressorParams& p = params.p;
  const CompressorJob& job = p.jobs[blockIdx.y];
  const int tile = blockIdx.x % params.tiles, slot_lane = threadIdx.x / kTileThreads;
  const int64_t index = blockIdx.x / params.tiles;
  const int64_t b = index / params.windows, item = index % params.windows;
  const int column = threadIdx.x % kTileThreads * kChannels, first = tile * kSumChannels + column;
  const bool mine = first < job.d;
  const Rows rows(p, job, b);
  const int64_t window = rows.row.start / p.ratio + item;

  if (rows.Closes(window) && window < job.slots) {  // so say all of the cluster
    const uint32_t barrier = SharedAddress(&sums_barrier);
    if (threadIdx.x == 0) {
      InitBarrier(barrier, 1);
      FenceBarrierInit();
      ArriveExpecting(barrier, params.tiles * sizeof(float));
    }
    __syncwarp();
    ArriveAtCluster();
    float z[kSlotsPerThread][kChannels], g[kSlotsPerThread][kChannels];
    float top[kChannels];
    const int64_t oldest = window * p.ratio;
    const uint32_t oldest_slot = rows.SlotOf(oldest);
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      const int slot = slot_lane + i * kSlotLanes;
      if (mine && slot < p.ratio) rows.Load(oldest, oldest_slot, slot, first, z[i], g[i]);
    }
    const NormWeights weights(job, first);
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      const int slot = slot_lane + i * kSlotLanes;
      if (mine && slot < p.ratio) rows.AddApe(oldest + slot, slot, first, g[i]);
    }
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      top[k] = -Infinity();
#pragma unroll
      for (int i = 0; i < kSlotsPerThread; ++i) {
        const bool present = mine && slot_lane + i * kSlotLanes < p.ratio;
        if (present) top[k] = g[i][k] > top[k] ? g[i][k] : top[k];
      }
      const float other = __shfl_xor_sync(kAllLanes, top[k], kTileThreads);
      top[k] = other > top[k] ? other : top[k];
    }
    if (threadIdx.x % 32 < kTileThreads) StoreRow(top, &warp_top[threadIdx.x / 32][column]);
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWholeThreads / 32; ++warp) {
      float other[kChannels];
      LoadRow(other, &warp_top[warp][column]);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) top[k] = other[k] > top[k] ? other[k] : top[k];
    }
    float norms[kChannels] = {}, values[kChannels] = {};
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
      const bool present = mine && slot_lane + i * kSlotLanes < p.ratio;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const float e = present ? Exp(g[i][k] - top[k]) : 0.0f;
        norms[k] += e;
        values[k] += present ? e * z[i][k] : 0.0f;
      }
    }
    StoreRow(norms, &norm[slot_lane][column]);
    StoreRow(values, &value[slot_lane][column]);
    __syncthreads();
    float x[kChannels] = {};
    if (threadIdx.x < 32) {  // its second half does what the first does
      SumLanes(norm, column, norms);
      SumLanes(value, column, values);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) x[k] = mine ? RoundBf16(values[k] / norms[k]) : 0.0f;
    }
    WaitForCluster();  // all of its thread blocks have begun, and made their barriers
    if (threadIdx.x < 32) {
      const float sum = TileSquares(x);
      float squares = sum;
      if (params.tiles > 1) {
        if (threadIdx.x < params.tiles) StoreIn(&tile_sum[tile], barrier, threadIdx.x, sum);
        Wait(barrier, 0);
        squares = 0;
        for (int i = 0; i < (job.d + kSumChannels - 1) / kSumChannels; ++i) squares += tile_sum[i];
      }
      const bool stored = mine && threadIdx.x < kTileThreads;
      if (stored) NormAndRope(p, job, weights, window, first, squares, x);
      StoreKey(p, job, b * job.slots + window, first, stored, x);
    }
  }
  // This thread block's slots of the ring were read before the first of its barriers.
  if (mine && item == 0) rows.WriteState(first, slot_lane, kSlotLanes);
}

bool FitsGrid(int64_t blocks) { return blocks <= INT32_MAX; }

cudaError_t LaunchOverlap(const CompressorParams& params, cudaStream_t stream) {
  OverlapParams kernel{};
  kernel.p = params;
  kernel.items = std::max<int64_t>((params.t + kOverlapRatio - 1) / kOverlapRatio - 1, 1);
  int64_t blocks = 0;
  for (int j = 0; j < params.n_jobs; ++j) {
    const int64_t per_block = ItemsPerBlock(params.jobs[j].d);
    blocks += (params.b * kernel.items + per_block - 1) / per_block;
    if (j == 0) kernel.first_job_blocks = blocks;
  }
  if (!FitsGrid(blocks)) return cudaErrorInvalidConfiguration;
  OverlapKernel<<<static_cast<unsigned>(blocks), kOverlapThreads, 0, stream>>>(kernel);
  return cudaGetLastError();
}

cudaError_t LaunchWhole(const CompressorParams& params, cudaStream_t stream) {
  WholeParams kernel{};
  kernel.p = params;
  kernel.windows = (params.t + params.ratio - 1) / params.ratio;
  kernel.tiles = 1;
  for (int j = 0; j < params.n_jobs; ++j) {
    const int64_t tiles = (params.jobs[j].d + kSumChannels - 1) / kSumChannels;
    kernel.tiles = std::max(kernel.tiles, static_cast<int>(tiles));
  }
  const int64_t blocks = params.b * kernel.windows * kernel.tiles;
  if (!FitsGrid(blocks)) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute cluster = ClusterOf(kernel.tiles);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(params.n_jobs));
  config.blockDim = dim3(kWholeThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, WholeKernel, kernel);
}

}  // namespace

cudaError_t CompressorCuda(const CompressorParams& params, cudaStream_t stream) {
  if (params.b == 0 || params.t == 0) return cudaSuccess;
  return Overlaps(params) ? LaunchOverlap(params, stream) : LaunchWhole(params, stream);
}

}  // namespace dsv4
