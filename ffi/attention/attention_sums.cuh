// Weighted sums of values of Hopper's attention kernel: kept, written, added in a cluster.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/attention_sm90.cuh"

namespace dsv4 {
namespace attention {

// Rounded to BF16, then rotated.
__device__ __forceinline__ uint32_t Rotated(float even, float odd, float2 by) {
  const uint32_t pair = PackBf16(even, odd);
  const float a = __uint_as_float(pair << 16), b = __uint_as_float(pair & 0xFFFF0000u);
  return PackBf16(__fsub_rn(__fmul_rn(a, by.x), __fmul_rn(b, by.y)),
                  __fadd_rn(__fmul_rn(a, by.y), __fmul_rn(b, by.x)));
}

// Writes a warpgroup's rows, rounded; channels of a chunk of the nope are even ones, then odd ones.
__device__ __forceinline__ void Write(const Args& args, const Shared& shared, int64_t token,
                                      int tile, int half, const float (&o)[kSteps][32],
                                      float2 factor) {
  const int c = threadIdx.x % 4, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const bool rotate = args.p.frequencies != nullptr;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int head = tile * kHeads + row + 8 * r;
    if (head >= args.p.h) continue;
    const float f = r == 0 ? factor.x : factor.y;
    uint16_t* to = args.p.o + token * args.p.stride_o + static_cast<int64_t>(head) * kChannels +
                   half * (kChannels / 2);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool rope = half == 1 && step == kSteps - 1;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = __fmul_rn(o[step][8 * m + 2 * r + i % 2 + i / 2 * 4], f);
        uint16_t* at = to + step * kChunk + 16 * m;
        if (!rope) {
          *reinterpret_cast<uint2*>(at + 4 * c) =
              make_uint2(PackBf16(v[0], v[2]), PackBf16(v[1], v[3]));
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            *reinterpret_cast<uint32_t*>(at + 8 * i + 2 * c) =
                rotate ? Rotated(v[2 * i], v[2 * i + 1], shared.rotation[8 * m + 4 * i + c])
                       : PackBf16(v[2 * i], v[2 * i + 1]);
          }
        }
      }
    }
  }
}

// Leaves a warpgroup's sums as rows of FP32 where the keys were.
template <int kParts>
__device__ __forceinline__ void Leave(Shared& shared, int half,
                                      const float (&o)[kSteps / kParts][32], int first_step) {
  const int c = threadIdx.x % 4, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  float* const sums = reinterpret_cast<float*>(shared.pairs);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* to = sums + (row + 8 * r) * kSumPitch<kParts> + half * (kSumColumns<kParts> / 2);
#pragma unroll
    for (int i = 0; i < kSteps / kParts; ++i) {
      const bool rope = half == 1 && first_step + i == kSteps - 1;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* v = &o[i][8 * m + 2 * r];
        float* at = to + i * kChunk + 16 * m;
        if (!rope) {
          *reinterpret_cast<float4*>(at + 4 * c) = make_float4(v[0], v[4], v[1], v[5]);
        } else {
          *reinterpret_cast<float2*>(at + 2 * c) = make_float2(v[0], v[1]);
          *reinterpret_cast<float2*>(at + 8 + 2 * c) = make_float2(v[4], v[5]);
        }
      }
    }
  }
}

// Adds the sums of a cluster's thread blocks, for this one's share of the rows: a warp a row.
template <int kParts>
__device__ __forceinline__ void Combine(const Args& args, Shared& shared, const Place& place,
                                        const Query& query, int token, int tile) {
  constexpr int kWarps = 8, kAtOnce = kParts == 1 ? 3 : kParts == 2 ? 5 : 9;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;  // of Sum's
  const int splits = args.splits;
  const int heads = min(static_cast<int>(args.p.h) - tile * kHeads, kHeads);
  const int end = min(kHeads * (place.rank + 1) / splits, heads);
  const uint32_t sums = SharedAddress(shared.pairs), parts = SharedAddress(shared.sums);
  // Ranks that have keys, counted from this one on: each starts at another, for one thread block's
  // memory alone would serve them all.
  const auto rank_of = [&](int i) {
    const int rank = place.rank + i;
    return rank < splits ? rank : rank - splits;
  };
  const Blocks theirs = BlocksOf<Mode::kSplit>(args, query, rank_of(min(lane, splits - 1)));
  const uint32_t busy = __ballot_sync(0xFFFFFFFFu, lane < splits && theirs.first < theirs.last);
#pragma unroll 1
  for (int row = kHeads * place.rank / splits + warp; row < end; row += kWarps) {
    const int head = tile * kHeads + row;
    // Lane r weighs rank r.
    float2 part = make_float2(-INFINITY, 0.0f);
    if (lane < splits) part = LoadCluster2(AddressIn(parts + row * 8, lane));
    float4 total[4 / kParts];
#pragma unroll
    for (int k = 0; k < 4 / kParts; ++k) total[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const uint32_t from = sums + row * kSumPitch<kParts> * 4 + lane * 16;
    float4 v[kAtOnce][4 / kParts];
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
        for (int k = 0; k < 4 / kParts; ++k) v[i][k] = LoadCluster4(there + 512 * k);
      }
    };
    // Where registers hold them, sums are on their way before their weights are known.
    if (kParts > 1 && busy != 0) ask();
    float largest = part.x;
#pragma unroll
    for (int i = 8; i > 0; i /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, i));
    }
    largest = __shfl_sync(0xFFFFFFFFu, largest, 0);
    const float weight = lane < splits ? Exp2(__fsub_rn(part.x, largest)) : 0.0f;
    float sum = Exp2(__fsub_rn(shared.sinks[row], largest));
    bool asked = kParts > 1;
#pragma unroll 1
    for (bool more = busy != 0; more; asked = false) {
      if (!asked) ask();
      more = left != 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float w = __shfl_sync(0xFFFFFFFFu, weight, ranks[i]);
        sum = __fmaf_rn(w, __shfl_sync(0xFFFFFFFFu, part.y, ranks[i]), sum);
#pragma unroll
        for (int k = 0; k < 4 / kParts; ++k) {
          total[k].x = __fmaf_rn(w, v[i][k].x, total[k].x);
          total[k].y = __fmaf_rn(w, v[i][k].y, total[k].y);
          total[k].z = __fmaf_rn(w, v[i][k].z, total[k].z);
          total[k].w = __fmaf_rn(w, v[i][k].w, total[k].w);
        }
      }
    }
    const float f = sum > 0.0f ? __fdividef(1.0f, sum) : sum == 0.0f ? 0.0f : sum;
    constexpr int kHalf = kSumColumns<kParts> / 2;
#pragma unroll
    for (int k = 0; k < 4 / kParts; ++k) {
      const int column = 4 * lane + 128 * k;
      const int channel = column / kHalf * (kChannels / 2) + place.part * kHalf + column % kHalf;
      const float a = __fmul_rn(total[k].x, f), b = __fmul_rn(total[k].y, f);
      const float c = __fmul_rn(total[k].z, f), d = __fmul_rn(total[k].w, f);
      uint2 pairs = make_uint2(PackBf16(a, b), PackBf16(c, d));
      if (args.p.frequencies != nullptr && channel >= kNope) {
        const float2* by = shared.rotation + (channel - kNope) / 2;
        pairs = make_uint2(Rotated(a, b, by[0]), Rotated(c, d, by[1]));
      }
      *reinterpret_cast<uint2*>(args.p.o + token * args.p.stride_o +
                                static_cast<int64_t>(head) * kChannels + channel) = pairs;
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
  if (threadIdx.x % 32 != 0) return;
  Arrive(empty);
  if constexpr (kMode == Mode::kPair) ArriveIn(empty, place.rank ^ 1);
}

template <Mode kMode, int kParts, int half>
__device__ __forceinline__ void Sum(const Args& args, Shared& shared, const Place& place) {
  constexpr int kMine = kSteps / kParts;
  const int first_step = place.part * kMine;
  const uint32_t base = SharedAddress(&shared);
  const uint32_t values = Matrix(base + offsetof(Shared, pairs) + half * kChunkBytes);
  const uint32_t empty = base + offsetof(Shared, empty);
  const uint32_t weights_full = base + offsetof(Shared, weights_full);
  const uint32_t weights_empty = base + offsetof(Shared, weights_empty);
  const uint32_t mine = threadIdx.x % 128 * 16;
  const auto slot_of = [](int slot) { return slot < kPairs ? slot : slot - kPairs; };
  int slot = 0;  // of a block's first pair
  uint32_t phase = 0;
  float o[kMine][32];
  for (int item = place.first; item < args.items; item += place.step) {
    const int token = item / args.tiles;
    const int tile = item % args.tiles;
    const Query query = QueryOf(args, token);
    const Blocks blocks = BlocksOf<kMode>(args, query, place.rank);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int k = 0; k < 32; ++k) o[i][k] = 0.0f;
    }
#pragma unroll 1
    for (int block = blocks.first; block < blocks.last; ++block) {
      Wait(weights_full, phase);
      phase ^= 1;
      const float2 factor = LoadShared2(base + offsetof(Shared, factor) + mine / 2);
      if (__any_sync(0xFFFFFFFFu, factor.x != 1.0f || factor.y != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
#pragma unroll
          for (int k = 0; k < 32; ++k) {
            o[i][k] = __fmul_rn(o[i][k], k % 4 < 2 ? factor.x : factor.y);
          }
        }
      }
      // Half of the block's keys at a time: registers do not hold all its weights.
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint4 e[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          e[k] = LoadShared(base + offsetof(Shared, weights) +
                            (2 * part + k) * sizeof(shared.weights[0]) + mine);
        }
        if (part == 1) Arrive(weights_empty);
        WgmmaFence();
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const uint32_t from = values + slot_of(slot + first_step + i) * (2 * kChunkStep);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            MultiplyWeightValue(o[i], e[k], from + (2 * part + k) * kKeyStep);
          }
          if (part == 1) WgmmaCommit();
        }
        if (part == 0) {
          WgmmaCommit();
          WgmmaWait<0>();
        }
      }
      // Pairs of others' channels were done with before.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (kParts > 1 && step / kMine != place.part) {
          PassOn<kMode>(empty + 8 * slot_of(slot + step), place);
        }
      }
      const auto pass_on = [&](int i) {
        PassOn<kMode>(empty + 8 * slot_of(slot + first_step + i), place);
      };
      if constexpr (kMine == 4) {
        WgmmaWait<3>();
        pass_on(0);
        WgmmaWait<2>();
        pass_on(1);
      }
      if constexpr (kMine > 1) {
        WgmmaWait<1>();
        pass_on(kMine - 2);
      }
      WgmmaWait<0>();
      pass_on(kMine - 1);
      slot = slot_of(slot + kSteps);
    }
    Wait(weights_full, phase);
    phase ^= 1;
    if constexpr (kMode == Mode::kSplit) {
      Arrive(base + offsetof(Shared, products_done));
      Wait(base + offsetof(Shared, products_done), 0);
      if (blocks.first < blocks.last) Leave<kParts>(shared, half, o, first_step);
      SyncCluster();
      Combine<kParts>(args, shared, place, query, token, tile);
    } else {
      Write(args, shared, token, tile, half, o,
            LoadShared2(base + offsetof(Shared, factor) + mine / 2));
      Arrive(weights_empty);
    }
  }
}

}  // namespace attention
}  // namespace dsv4
