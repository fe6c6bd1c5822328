// What the compressor's kernels share: two channels a thread, so that a warp is a tile of 64: one
// sum of squares, and one scale of a key.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/barrier.cuh"
#include "common/bf16x2.cuh"
#include "common/bits.h"
#include "common/e2m1.h"
#include "common/e4m3.cuh"
#include "common/exp.h"
#include "common/rope.h"
#include "common/ue8m0.h"
#include "compressor/compressor.h"
#include "compressor/compressor_rows.h"

namespace dsv4 {
namespace compressor {

// The model's widths are known to the compiler.
constexpr int kModelWidth = 512, kModelIndexWidth = 128;

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kLanes = 32;
constexpr int kChannels = 2;  // of a thread
constexpr int kMaxTiles = kCompressorMaxWidth / kSumChannels;
static_assert(kSumChannels == kLanes * kChannels, "a warp has a tile");
static_assert(kChannelsPerLane == 2 * kChannels, "two lanes have four squares");

__device__ __forceinline__ float Infinity() { return __uint_as_float(0x7F800000u); }

// Not through the read-only cache: a state is written later on. Loads of two branches stay two, of
// which only one's addresses take registers.
__device__ __forceinline__ float2 LoadPair(const float* from) {
  float2 x;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
  return x;
}
// Of a row that is read once: `ape` stays in the L1.
__device__ __forceinline__ float2 LoadPairOnce(const float* from) {
  float2 x;
  asm volatile("ld.global.L1::no_allocate.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ float LoadOne(const float* from) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ float2 LoadShared(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}
__device__ __forceinline__ float2 LoadConstant(const float* from) {
  return __ldg(reinterpret_cast<const float2*>(from));
}
__device__ __forceinline__ void StorePair(float* to, float2 x) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void StoreShared(float* to, float2 x) {
  *reinterpret_cast<float2*>(to) = x;
}
__device__ __forceinline__ float2 Add(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
// The larger; NaN of either.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}
// The product; 0 below 2^-126.
__device__ __forceinline__ float MulFlushed(float a, float b) {
  float product;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}
// Bytes into shared memory, there after WaitForCopies for the thread that asked.
__device__ __forceinline__ void CopyPair(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void CopyWord(int32_t* to, const int32_t* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
// Those so far are a group; and all groups but the last are there.
__device__ __forceinline__ void EndGroup() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void WaitForAllButLast() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
}
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// A load of a constant or a length that is asked for here, not where it is used.
__device__ __forceinline__ uint16_t LoadNow(const uint16_t* from) {
  uint16_t x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ int32_t LoadNow(const int32_t* from) {
  int32_t x;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ float LoadNow(const float* from) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}
// A barrier of some of a thread block's warps. What was a loop of a warp ahead of it, or a branch,
// its lanes may have left apart.
__device__ __forceinline__ void Meet(int barrier, int threads) {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The bits of Exp(x) for x <= 0 or NaN, for two thirds of the instructions.
__device__ __forceinline__ float ExpOfNegative(float x) {
  const float held = MaxOrNan(x, -88.0f);  // n = -127, whose power is 0
  const float shifted = held * kLog2E + kExpRound;
  const float n = shifted - kExpRound;
  const float r = __fmaf_rn(-n, kLn2High, held) - n * kLn2Low;  // that product is exact
  const float y = ExpOfRest(r);
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3F800000u);
  return MulFlushed(y, power);
}

__device__ __forceinline__ float2 RoundBf16(float2 x) {
  const uint32_t pair = PackBf16(x.x, x.y);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// What the host knows of a job's width.
struct Width {
  float mean;      // 1 / d
  float hadamard;  // 1 / sqrt(d)
};

struct Lengths {
  int32_t start, count;
};

__device__ __forceinline__ Lengths LengthsOf(const CompressorParams& p, uint32_t b) {
  return {LoadNow(p.start + b), LoadNow(p.count + b)};
}

// The same of a whole thread block, in shared memory: there nothing can be made of them, and wait
// for them, ahead of loads that are asked for before WaitForLengths.
__device__ __forceinline__ void AskForLengths(const CompressorParams& p, uint32_t b,
                                              Lengths& lengths) {
  if (threadIdx.x == 0) CopyWord(&lengths.start, p.start + b);
  if (threadIdx.x == 1) CopyWord(&lengths.count, p.count + b);
}
__device__ __forceinline__ void WaitForLengths() {
  WaitForCopies();
  __syncthreads();
}

// One batch row of a job, from a channel on. Positions are below 2^32: lengths are int32.
struct Rows {
  const CompressorJob& job;
  int channel;
  uint32_t columns, start, end, ring;
  int64_t in_chunk, in_ring;  // floats ahead of the row's

  __device__ __forceinline__ Rows(const CompressorParams& p, const CompressorJob& of, uint32_t b,
                                  int of_row, int from)
      : job(of), channel(from), columns(of_row) {
    ring = static_cast<uint32_t>(job.ring);
    in_chunk = b * p.t * columns + channel;
    in_ring = b * job.ring * columns + channel;
  }

  // Apart, so that what does not need them is asked for before they are there.
  __device__ __forceinline__ void Take(const Lengths& lengths, int64_t t) {
    const Appended row = AppendedOf(lengths.start, lengths.count, t);
    start = static_cast<uint32_t>(row.start);
    end = static_cast<uint32_t>(row.end);
  }

  __device__ __forceinline__ int64_t Floats(uint32_t rows) const {
    return static_cast<int64_t>(uint64_t{rows} * columns);
  }
  __device__ __forceinline__ const float* Kv(uint32_t row) const {
    return job.kv + (in_chunk + Floats(row));
  }
  __device__ __forceinline__ const float* Gate(uint32_t row) const {
    return job.gate + (in_chunk + Floats(row));
  }
  __device__ __forceinline__ float* KvState(uint32_t slot) const {
    return job.kv_state + (in_ring + Floats(slot));
  }
  __device__ __forceinline__ float* GateState(uint32_t slot) const {
    return job.gate_state + (in_ring + Floats(slot));
  }
  __device__ __forceinline__ const float* Ape(uint32_t phase) const {
    return job.ape + (Floats(phase) + channel);
  }
  // The first position that the state keeps.
  __device__ __forceinline__ uint32_t Kept() const {
    return end - start > ring ? end - ring : start;
  }
};

// at % n. Rings are mostly a power of two.
__device__ __forceinline__ uint32_t Modulo(uint32_t at, uint32_t n) {
  return (n & (n - 1)) == 0 ? at & (n - 1) : at % n;
}

// Channels first and first + 1: what waits for nothing of theirs.
struct Constants {
  uint16_t norm[kChannels];
  float frequency;
  bool rotary;

  __device__ __forceinline__ float2 Norm() const {
    return make_float2(Bf16ToFloat(norm[0]), Bf16ToFloat(norm[1]));
  }
};

// `first` is a channel there is.
__device__ __forceinline__ Constants ConstantsOf(const CompressorParams& p,
                                                 const CompressorJob& job, int d, int first) {
  const int nope = d - static_cast<int>(p.rotary);
  Constants constants = {{}, 0.0f, first >= nope};
  if (constants.rotary) constants.frequency = LoadNow(p.frequencies + (first - nope) / 2);
  constants.norm[0] = LoadNow(job.norm + first);
  constants.norm[1] = LoadNow(job.norm + first + 1);
  return constants;
}

__device__ __forceinline__ SinCos TurnOf(bool rotary, float frequency, uint32_t position) {
  if (!rotary) return {0.0f, 1.0f};
  return SinCosAt(static_cast<int32_t>(position), frequency);
}
// What is made here, and not where it is used.
__device__ __forceinline__ SinCos Here(SinCos turn) {
  asm volatile("" : "+f"(turn.sin), "+f"(turn.cos));
  return turn;
}
__device__ __forceinline__ SinCos TurnOf(const Constants& constants, uint32_t position) {
  return TurnOf(constants.rotary, constants.frequency, position);
}

// Sum of squares of a warp's 64 channels, in its odd lanes.
__device__ __forceinline__ float TileSquares(float2 x) {
  const float even = x.x * x.x, odd = x.y * x.y;
  float sum = __shfl_xor_sync(kAllLanes, even + odd, 1) + even + odd;
#pragma unroll
  for (int half = kLanes / 2; half > 1; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
  return sum;
}

// Of the row, in sequence.
__device__ __forceinline__ float RowSquares(const float* tile_sum, int tiles) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kMaxTiles; ++i) {
    if (i < tiles) sum += tile_sum[i];
  }
  return sum;
}

__device__ __forceinline__ uint32_t LargerBits(float2 y) {
  return max(__float_as_uint(y.x) & 0x7FFFFFFFu, __float_as_uint(y.y) & 0x7FFFFFFFu);
}

// y of two channels, from the row's sum of squares.
__device__ __forceinline__ float2 NormAndRope(float2 norm, SinCos turn, bool rotary, float mean,
                                              float eps, float2 x) {
  const float scale = __frsqrt_rn(mean + eps);
  const float2 y = RoundBf16(make_float2(norm.x * (x.x * scale), norm.y * (x.y * scale)));
  if (!rotary) return y;
  const Pair turned = Turned(y.x, y.y, turn);
  return RoundBf16(make_float2(turned.even, turned.odd));
}

// Channels first and first + 1 of a key.
__device__ __forceinline__ void StoreKey(const CompressorParams& p, const CompressorJob& job,
                                         int64_t entry, int first, bool mine, float2 y) {
  const int nope = static_cast<int>(job.code_bytes);
  if (first / kSumChannels * kSumChannels < nope) {  // so say all of the warp
    const uint32_t byte = Fp8ScaleByte(__reduce_max_sync(kAllLanes, LargerBits(y)));
    const float inverse = InverseScale(byte);
    *reinterpret_cast<uint16_t*>(job.code + entry * nope + first) =
        EncodeE4m3Pair(y.x * inverse, y.y * inverse);
    if (first % kSumChannels == 0) {
      job.scale[entry * job.scales + first / kSumChannels] = static_cast<uint8_t>(byte);
    }
    return;
  }
  if (!mine) return;
  *reinterpret_cast<uint32_t*>(job.rope + entry * p.rotary + first - nope) =
      FloatToBf16(y.x) | uint32_t{FloatToBf16(y.y)} << 16;
}

// Warps side by side that have an entry, and where they meet.
struct Team {
  int warps, barrier;
  float2 (*exchange)[kLanes];  // of a warp, its neighbour's below
  uint32_t* largest;           // of each

  __device__ __forceinline__ void Sync() const { Meet(barrier, warps * kLanes); }
};

// Channels first and first + 1 of an index key, which one or two warps have.
__device__ __forceinline__ void StoreIndexKey(const CompressorJob& job, int d, float hadamard,
                                              int64_t entry, int first, bool mine, float2 y,
                                              const Team& team) {
  const int lane = threadIdx.x % kLanes, warp = first / kSumChannels;
  y = make_float2(y.x + y.y, y.x - y.y);
#pragma unroll
  for (int half = 1; half < kLanes; half *= 2) {
    if (half * kChannels >= d) break;
    const float2 other =
        make_float2(__shfl_xor_sync(kAllLanes, y.x, half), __shfl_xor_sync(kAllLanes, y.y, half));
    const bool upper = lane & half;
    y.x = upper ? other.x - y.x : y.x + other.x;
    y.y = upper ? other.y - y.y : y.y + other.y;
  }
  if (team.warps > 1) {
    team.exchange[warp][lane] = y;
    team.Sync();
    const float2 other = team.exchange[warp ^ 1][lane];
    y.x = warp ? other.x - y.x : y.x + other.x;
    y.y = warp ? other.y - y.y : y.y + other.y;
  }
  y = RoundBf16(make_float2(y.x * hadamard, y.y * hadamard));
  uint32_t largest = mine ? LargerBits(y) : 0;
  if (job.form == EntryForm::kFp8) {
    largest = __reduce_max_sync(kAllLanes, largest);
    if (team.warps > 1) {
      if (lane == 0) team.largest[warp] = largest;
      team.Sync();
      largest = max(largest, team.largest[warp ^ 1]);
    }
    if (!mine) return;
    const uint32_t byte = Fp8ScaleByte(largest);
    const float inverse = InverseScale(byte);
    *reinterpret_cast<uint16_t*>(job.code + entry * job.code_bytes + first) =
        EncodeE4m3Pair(y.x * inverse, y.y * inverse);
    if (first == 0) job.scale[entry] = static_cast<uint8_t>(byte);
    return;
  }
  constexpr int kBlock = 32;
#pragma unroll
  for (int half = kBlock / kChannels / 2; half > 0; half /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, half));
  }
  if (!mine) return;
  const uint32_t byte = Mxfp4ScaleByte(largest);
  const float inverse = InverseScale(byte);
  job.code[entry * job.code_bytes + first / 2] =
      static_cast<uint8_t>(EncodeE2m1(y.x * inverse) | EncodeE2m1(y.y * inverse) << 4);
  if (first % kBlock == 0) {
    job.scale[entry * job.scales + first / kBlock] = static_cast<uint8_t>(byte);
  }
}

// A barrier that other thread blocks of the cluster count on; all of this one meet before
// ExpectFloats.
__device__ __forceinline__ void MakeBarrier(uint32_t barrier) {
  if (threadIdx.x != 0) return;
  InitBarrier(barrier, 1);
  FenceBarrierInit();
}
// How many floats it counts, and the sign that it is there. All threads.
__device__ __forceinline__ void ExpectFloats(uint32_t barrier, int floats) {
  if (threadIdx.x == 0) ArriveExpecting(barrier, floats * sizeof(float));
  __syncwarp();
  ArriveAtCluster();
}

}  // namespace compressor
}  // namespace dsv4
