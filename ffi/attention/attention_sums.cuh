// Weighted sums of values of Hopper's attention kernel: kept, written, added in a cluster.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/attention_sm90.cuh"

namespace dsv4 {
namespace attention {

__device__ __forceinline__ uint32_t Rotated(uint32_t pair, float2 by) {
  const float a = __uint_as_float(pair << 16), b = __uint_as_float(pair & 0xFFFF0000u);
  return PackBf16(__fsub_rn(__fmul_rn(a, by.x), __fmul_rn(b, by.y)),
                  __fadd_rn(__fmul_rn(a, by.y), __fmul_rn(b, by.x)));
}

// Four blocks of 8 x 8 numbers, of which a thread holds two side by side; lane i has the address of
// a row of 16 bytes of block i / 8.
__device__ __forceinline__ void StoreBlocks(uint32_t at, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// Leaves a warpgroup's rows, rounded, where it had its values from: swizzled, a chunk where a chunk
// was.
__device__ __forceinline__ void Write(const Args& args, const Shared& shared, int half,
                                      uint32_t slot, const float (&o)[kSteps][32], float2 factor) {
  const int lane = threadIdx.x % 32, c = lane % 4;
  const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  const uint32_t to = SharedAddress(shared.pairs) + slot * kPairBytes + half * kChunkBytes +
                      row * 128 + ((lane / 16 ^ lane % 8) << 4);
  const auto store = [&](int step, auto rotate) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float2 by[2];
      if constexpr (rotate.value) {
#pragma unroll
        for (int i = 0; i < 2; ++i) by[i] = shared.rotation[8 * m + 4 * i + c];
      }
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* v = &o[step][8 * m + 2 * i];
        const float f = i % 2 == 0 ? factor.x : factor.y;
        pairs[i] = PackBf16(__fmul_rn(v[0], f), __fmul_rn(v[1], f));
        if constexpr (rotate.value) pairs[i] = Rotated(pairs[i], by[i / 2]);
      }
      StoreBlocks((to ^ 32 * m) + step * kPairBytes, pairs);
    }
  };
#pragma unroll
  for (int step = 0; step < kSteps - 1; ++step) store(step, std::false_type());
  if (half == 1 && args.p.frequencies != nullptr) {
    store(kSteps - 1, std::true_type());
  } else {
    store(kSteps - 1, std::false_type());
  }
}

// Leaves a warpgroup's sums as rows of FP32 where the keys were.
__device__ __forceinline__ void Leave(Shared& shared, int half, const float (&o)[kSteps][32]) {
  const int c = threadIdx.x % 4, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  float* const sums = reinterpret_cast<float*>(shared.pairs);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* to = sums + (row + 8 * r) * kSumPitch + half * (kChannels / 2);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        *reinterpret_cast<float2*>(to + i * kChunk + 8 * m + 2 * c) =
            make_float2(o[i][4 * m + 2 * r], o[i][4 * m + 2 * r + 1]);
      }
    }
  }
}

// Adds the sums of a cluster's thread blocks, for this one's share of the rows: a warp a row.
__device__ __forceinline__ void Combine(const Args& args, Shared& shared, const Place& place,
                                        int token, int tile) {
  constexpr int kWarps = 8, kAtOnce = 3;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;  // of Sum's
  const int splits = args.splits;
  const int heads = min(static_cast<int>(args.p.h) - tile * kHeads, kHeads);
  const OwnRows rows = RowsOf(place.rank, splits);
  const int end = min(rows.end, heads);
  const uint32_t sums = SharedAddress(shared.pairs), parts = SharedAddress(shared.sums);
  // Ranks are counted from this one on: each starts at another, for one thread block's memory alone
  // would serve them all.
  const auto rank_of = [&](int i) {
    const int rank = place.rank + i;
    return rank < splits ? rank : rank - splits;
  };
  const uint32_t busy = (1u << splits) - 1;
#pragma unroll 1
  for (int row = rows.first + warp; row < end; row += kWarps) {
    const int head = tile * kHeads + row;
    // Lane r weighs rank r.
    float2 part = make_float2(-INFINITY, 0.0f);
    if (lane < splits) part = LoadCluster2(AddressIn(parts + row * 8, lane));
    float4 total[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) total[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const uint32_t from = sums + row * kSumPitch * 4 + lane * 16;
    float4 v[kAtOnce][4];
    int ranks[kAtOnce];
    uint32_t left = busy;
    const auto ask = [&] {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        // When none is left, one again, that weighs nothing.
        const int rank = rank_of(__ffs(left != 0 ? left : busy) - 1);
        ranks[i] = left != 0 ? rank : kMaxSplits;
        left &= left - 1;
        const uint32_t there = AddressIn(from, rank);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[i][k] = LoadCluster4(there + 512 * k);
      }
    };
    float largest = part.x;
#pragma unroll
    for (int i = 8; i > 0; i /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, i));
    }
    largest = __shfl_sync(0xFFFFFFFFu, largest, 0);
    const float weight = lane < splits ? Exp2(__fsub_rn(part.x, largest)) : 0.0f;
    float sum = Exp2(__fsub_rn(shared.sinks[row], largest));
#pragma unroll 1
    for (bool more = busy != 0; more;) {
      ask();
      more = left != 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float w = __shfl_sync(0xFFFFFFFFu, weight, ranks[i]);
        sum = __fmaf_rn(w, __shfl_sync(0xFFFFFFFFu, part.y, ranks[i]), sum);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          total[k].x = __fmaf_rn(w, v[i][k].x, total[k].x);
          total[k].y = __fmaf_rn(w, v[i][k].y, total[k].y);
          total[k].z = __fmaf_rn(w, v[i][k].z, total[k].z);
          total[k].w = __fmaf_rn(w, v[i][k].w, total[k].w);
        }
      }
    }
    const float f = sum > 0.0f ? __fdividef(1.0f, sum) : sum == 0.0f ? 0.0f : sum;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int channel = 4 * lane + 128 * k;
      const float a = __fmul_rn(total[k].x, f), b = __fmul_rn(total[k].y, f);
      const float c = __fmul_rn(total[k].z, f), d = __fmul_rn(total[k].w, f);
      uint2 pairs = make_uint2(PackBf16(a, b), PackBf16(c, d));
      if (args.p.frequencies != nullptr && channel >= kNope) {
        const float2* by = shared.rotation + (channel - kNope) / 2;
        pairs = make_uint2(Rotated(pairs.x, by[0]), Rotated(pairs.y, by[1]));
      }
      *reinterpret_cast<uint2*>(args.p.o + token * args.p.stride_o +
                                static_cast<int64_t>(head) * kChannels + channel) = pairs;
    }
    if (args.p.lse != nullptr && lane == 0) {
      args.p.lse[static_cast<int64_t>(token) * args.p.h + head] =
          __fmul_rn(__fadd_rn(largest, log2f(sum)), kLn2);
    }
  }
}

// Sends a warpgroup's sums to the thread blocks that own their rows, from the beginning of their
// memory: [rank, row, column], of 16 columns the 8 that a lane holds in two places side by side.
template <int kParts>
__device__ __forceinline__ void SendSums(const Args& args, Shared& shared, const Place& place,
                                         int half, const float (&o)[kSteps / kParts][32]) {
  // No address that takes a register while products are made.
  const int splits = static_cast<int>(Opaque(args.splits));
  const int c = threadIdx.x % 4, first = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + 8 * r, owner = OwnerOf(row, splits);
    const OwnRows rows = RowsOf(owner, splits);
    const int at = place.rank * (rows.end - rows.first) + row - rows.first;
    const uint32_t to = AddressIn(SharedAddress(&shared), owner) +
                        (at * kSumColumns<kParts> + half * (kSumColumns<kParts> / 2) + 4 * c) * 4;
    const uint32_t barrier = AddressIn(SharedAddress(&shared.sums_full), owner);
#pragma unroll
    for (int i = 0; i < kSteps / kParts; ++i) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* v = &o[i][8 * m + 2 * r];
        StoreThere(to + (i * kChunk + 16 * m) * 4,
                   make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[4]),
                              __float_as_uint(v[5])),
                   barrier);
      }
    }
  }
}

// Adds what SendSums sent: a warp a row.
template <int kParts>
__device__ __forceinline__ void CombineSent(const Args& args, Shared& shared, const Place& place,
                                            int token, int tile) {
  constexpr int kWarps = 8, kColumns = kSumColumns<kParts>, kHalf = kColumns / 2;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;  // of Sum's
  const int splits = static_cast<int>(Opaque(args.splits));
  const OwnRows rows = RowsOf(place.rank, splits);
  const int count = rows.end - rows.first;
  const uint32_t full = SharedAddress(&shared.sums_full);
  if (threadIdx.x == 128) {
    ArriveExpecting(full, count * splits * (8 + kColumns * 4));
  }
  const int end = min(rows.end, static_cast<int>(args.p.h) - tile * kHeads);
  Wait(full, 0);
#pragma unroll 1
  for (int row = rows.first + warp; row < end; row += kWarps) {
    const int head = tile * kHeads + row;
    // Lane r weighs rank r.
    float2 part = make_float2(-INFINITY, 0.0f);
    if (lane < splits) part = shared.parts[lane * count + row - rows.first];
    float largest = part.x;
#pragma unroll
    for (int i = 8; i > 0; i /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, i));
    }
    largest = __shfl_sync(0xFFFFFFFFu, largest, 0);
    const float weight = lane < splits ? Exp2(__fsub_rn(part.x, largest)) : 0.0f;
    float sum = Exp2(__fsub_rn(shared.sinks[row], largest));
    float4 total[4 / kParts];
#pragma unroll
    for (int k = 0; k < 4 / kParts; ++k) total[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const uint32_t from = SharedAddress(&shared) + (row - rows.first) * (kColumns * 4) + lane * 16;
    // In the order of Combine.
#pragma unroll 3
    for (int i = 0; i < splits; ++i) {
      const int rank = place.rank + i < splits ? place.rank + i : place.rank + i - splits;
      const float w = __shfl_sync(0xFFFFFFFFu, weight, rank);
      sum = __fmaf_rn(w, __shfl_sync(0xFFFFFFFFu, part.y, rank), sum);
#pragma unroll
      for (int k = 0; k < 4 / kParts; ++k) {
        const uint4 v = LoadShared(from + rank * count * (kColumns * 4) + 512 * k);
        total[k].x = __fmaf_rn(w, __uint_as_float(v.x), total[k].x);
        total[k].y = __fmaf_rn(w, __uint_as_float(v.y), total[k].y);
        total[k].z = __fmaf_rn(w, __uint_as_float(v.z), total[k].z);
        total[k].w = __fmaf_rn(w, __uint_as_float(v.w), total[k].w);
      }
    }
    const float f = sum > 0.0f ? __fdividef(1.0f, sum) : sum == 0.0f ? 0.0f : sum;
#pragma unroll
    for (int k = 0; k < 4 / kParts; ++k) {
      // Two pairs, of the channels from one on and from eight on.
      const int column = (lane + 32 * k) / 4 * 16 + lane % 4 * 2;
      const int channel = column / kHalf * (kChannels / 2) + place.part * kHalf + column % kHalf;
      uint16_t* to =
          args.p.o + token * args.p.stride_o + static_cast<int64_t>(head) * kChannels + channel;
      const float v[4] = {total[k].x, total[k].y, total[k].z, total[k].w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float a = __fmul_rn(v[2 * i], f), b = __fmul_rn(v[2 * i + 1], f);
        const bool rotate = args.p.frequencies != nullptr && channel >= kNope;
        const uint32_t pair = PackBf16(a, b);
        *reinterpret_cast<uint32_t*>(to + 8 * i) =
            rotate ? Rotated(pair, shared.rotation[(channel - kNope) / 2 + 4 * i]) : pair;
      }
    }
    if (args.p.lse != nullptr && place.part == 0 && lane == 0) {
      args.p.lse[static_cast<int64_t>(token) * args.p.h + head] =
          __fmul_rn(__fadd_rn(largest, log2f(sum)), kLn2);
    }
  }
}

// A pair of chunks may be written again: in both thread blocks, if a pair shares it.
template <Mode kMode>
__device__ __forceinline__ void PassOn(uint32_t empty, const Place& place) {
  __syncwarp();
  if (!Elected()) return;
  Arrive(empty);
  if constexpr (kMode == Mode::kPair) ArriveIn(empty, place.rank ^ 1);
}

// half: of the channels. Both run the same instructions, for a thread block has many.
template <Mode kMode, int kParts>
__device__ __forceinline__ void Sum(const Args& args, Shared& shared, const Place& place,
                                    int half) {
  constexpr int kMine = kSteps / kParts;
  const int first_step = place.part * kMine;
  const uint32_t base = SharedAddress(&shared);
  const uint32_t values = Matrix(base + offsetof(Shared, pairs) + half * kChunkBytes);
  const uint32_t mine = Opaque(threadIdx.x % 128 * 16);
  uint32_t count = 0;  // blocks; the highest bit: whether an odd number of items is done with
  float o[kMine][32];
#pragma unroll 1
  for (;;) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int k = 0; k < 32; ++k) o[i][k] = 0.0f;
    }
#pragma unroll 1
    for (;;) {
      Wait(base + offsetof(Shared, weights_full), count & 1);
      const uint32_t slot = SlotOf(count);
      float2 factor = LoadShared2(base + offsetof(Shared, factor) + mine / 2);
      const bool last = __float_as_uint(factor.x) >> 31 != 0;
      factor.x = fabsf(factor.x);
      if (__any_sync(0xFFFFFFFFu, factor.x != 1.0f || factor.y != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
#pragma unroll
          for (int k = 0; k < 32; ++k) {
            o[i][k] = __fmul_rn(o[i][k], k % 4 < 2 ? factor.x : factor.y);
          }
        }
      }
      // Some of the block's keys at a time: registers do not hold all its weights.
      constexpr int kAtOnce = kMode == Mode::kPair ? 2
                              : kParts == 1        ? 1
                                                   : 4,
                    kLast = 4 / kAtOnce - 1;
      constexpr int kWide = kMine == 4 ? 2 : 1;  // chunks of an MMA
#pragma unroll
      for (int part = 0; part <= kLast; ++part) {
        uint4 e[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          e[k] = LoadShared(base + offsetof(Shared, weights) +
                            (kAtOnce * part + k) * sizeof(shared.weights[0]) + mine);
        }
        WgmmaFence();
#pragma unroll
        for (int i = 0; i < kMine; i += kWide) {
          const uint32_t from = values + (slot + first_step + i) * (2 * kChunkStep);
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            const uint32_t keys = from + (kAtOnce * part + k) * kKeyStep;
            if constexpr (kWide == 2) {
              MultiplyWeightValues(o[i], o[i + 1], e[k], keys);
            } else {
              MultiplyWeightValue(o[i], e[k], keys);
            }
          }
          if (part == kLast) WgmmaCommit();
          // Not sooner: what is loaded is there when products of it have begun. An arrival can
          // overtake a load that nothing has waited for.
          if (part == kLast && i == 0) Arrive(base + offsetof(Shared, weights_empty));
        }
        if (part < kLast) {
          WgmmaCommit();
          WgmmaWait<0>();
        }
      }
      const uint32_t empty = base + offsetof(Shared, empty) + 8 * slot;
      ++count;
      // Pairs of others' channels were done with before.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (kParts > 1 && step / kMine != place.part) PassOn<kMode>(empty + 8 * step, place);
      }
      // An item's last are passed on when its output, which takes their place, has left.
      const auto pass_on = [&](int i) {
        if (kMode == Mode::kSplit || !last) PassOn<kMode>(empty + 8 * (first_step + i), place);
      };
      if constexpr (kMine > 1) {
        WgmmaWait<1>();
#pragma unroll
        for (int i = 0; i < kMine / 2; ++i) pass_on(i);
      }
      WgmmaWait<0>();
#pragma unroll
      for (int i = kMine / 2; i < kMine; ++i) pass_on(i);
      if (last) break;
    }
    const int token = place.first / args.tiles, tile = place.first % args.tiles;  // of a split
    if constexpr (kMode != Mode::kSplit) {
      // Nobody reads the last block's values any more: of this warpgroup, or what is copied to the
      // other thread block.
      if constexpr (kMode == Mode::kPair) {
        PassOn<kMode>(base + offsetof(Shared, products_done), place);
        Wait(base + offsetof(Shared, products_done), count >> 31);
      } else {
        SyncThreads(3 + half, 128);
      }
    }
    Wait(base + offsetof(Shared, last_full), count >> 31);
    count ^= 1u << 31;
    if constexpr (kSend<kMode, kParts>) {
      __syncwarp();
      SyncClusterRelaxed();  // nobody needs q and keys any more
      SendSums<kParts>(args, shared, place, half, o);
      CombineSent<kParts>(args, shared, place, token, tile);
      return;
    } else if constexpr (kMode == Mode::kSplit) {
      Arrive(base + offsetof(Shared, products_done));
      Wait(base + offsetof(Shared, products_done), 0);
      Leave(shared, half, o);
      SyncCluster();
      Combine(args, shared, place, token, tile);
      return;
    } else {
      const uint32_t slot = SlotOf(count - 1);
      const bool final = shared.told[(count - 1) % kTold].final;
      Write(args, shared, half, slot, o, LoadShared2(base + offsetof(Shared, last) + mine / 2));
      if (half == 0 && threadIdx.x % 128 == 0) shared.out_slot = slot;
      FenceAsync();
      Arrive(base + offsetof(Shared, out_full));
      Arrive(base + offsetof(Shared, last_empty));
      if (final) return;
    }
  }
}

}  // namespace attention
}  // namespace dsv4
