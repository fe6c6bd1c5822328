// Products of queries and keys, and their softmax, of Hopper's attention kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/attention_sm90.cuh"
#include "common/rope.h"

namespace dsv4 {
namespace attention {

// Asks for q of an item.
__device__ __forceinline__ void AskQueries(const Args& args, Shared& shared, int item) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int tile = item % args.tiles;
  const int heads = static_cast<int>(args.p.h) - tile * kHeads;
  const uint16_t* const from = args.p.q + item / args.tiles * args.p.stride_q +
                               static_cast<int64_t>(tile) * kHeads * kChannels;
  // A lane copies 16 bytes of each half of a row.
  const uint32_t chunk = SharedAddress(shared.q) + lane / 8 * kChunkBytes;
#pragma unroll 4
  for (int row = warp; row < kHeads; row += 4) {
    const uint32_t to = chunk + row * 128 + ((lane % 8 ^ (row & 7)) << 4);
    const uint16_t* at = from + (row < heads ? row * kChannels + 8 * lane : 0);
    CopyAsyncOrZero(to, at, row < heads ? 16 : 0);
    CopyAsyncOrZero(to + kSteps * kChunkBytes, at + kChannels / 2, row < heads ? 16 : 0);
  }
  CommitCopies();
}

// Brings q of an item to come near.
__device__ __forceinline__ void PrefetchQueries(const Args& args, int item) {
  if (item >= args.items) return;
  const int tile = item % args.tiles;
  const int heads = min(static_cast<int>(args.p.h) - tile * kHeads, kHeads);
  const uint16_t* q = args.p.q + item / args.tiles * args.p.stride_q +
                      static_cast<int64_t>(tile) * kHeads * kChannels;
  for (int line = threadIdx.x % 32; line < heads * 8; line += 32) Prefetch(q + line * 64);
}

// Cosines and sines of the rotation back, of all items, from one warp, which also asks for the next
// queries. The reduction in FP64 serves every position, and needs no call, which would cost the
// kernel registers.
__device__ __forceinline__ void Rotate(const Args& args, Shared& shared, const Place& place) {
  const int i = threadIdx.x % 32;
  uint32_t phase = 0;
#pragma unroll 1
  for (int item = place.first; item < args.items; item += place.step, phase ^= 1) {
    float sine = 0.0f, cosine = 1.0f;
    if (args.p.frequencies != nullptr) {
      const float position = static_cast<float>(__ldg(args.p.positions + item / args.tiles));
      const float angle = __fmul_rn(position, __ldg(args.p.frequencies + i));
      const SinCos turn = SinCosOf(angle);
      sine = turn.sin;
      cosine = turn.cos;
    }
    Wait(SharedAddress(&shared.last_empty), phase ^ 1);
    shared.rotation[i] = make_float2(cosine, -sine);
    PrefetchQueries(args, item + place.step);
    Arrive(SharedAddress(&shared.last_full));
  }
}

template <Mode kMode>
struct Scores {
  const Args& args;
  Shared& shared;
  uint32_t base;       // its address
  uint32_t begun = 0;  // blocks
  uint32_t sent = 0;   // of them
  uint32_t phase = 0;  // of the items' last factors
  // What is subtracted is the largest logit of an item's first block and then follows loosely: e is
  // at most 2^8, and sums must hardly ever be multiplied.
  float slack, largest[2], sum[2];

  // The products of a block with q, begun.
  __device__ __forceinline__ void Begin(float (&s)[32]) {
    const uint32_t q = Opaque(Matrix(base + offsetof(Shared, q)));
    const uint32_t slot = SlotOf(begun), parity = PhaseOf(begun);
    const uint32_t pairs = Matrix(base + offsetof(Shared, pairs)) + slot * (2 * kChunkStep);
    const uint32_t full = base + offsetof(Shared, full) + 8 * slot;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Wait(full + 8 * step, parity);
      WgmmaFence();
      const uint32_t keys = pairs + step * (2 * kChunkStep);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint32_t a = q + (step + kSteps * half) * kChunkStep + k * kRowStep;
          const uint32_t b = keys + half * kChunkStep + k * kRowStep;
          if (step == 0 && half == 0 && k == 0) {
            MultiplyQueryKey<true>(s, a, b);
          } else {
            MultiplyQueryKey<false>(s, a, b);
          }
        }
      }
    }
    WgmmaCommit();
    ++begun;
  }

  // Sends what Sum multiplies: e of a block, and what sums until now must be multiplied by, whose
  // sign tells that the block is an item's last.
  __device__ __forceinline__ void Send(const uint4 (&e)[4], float2 factor, bool last) {
    const int thread = threadIdx.x % 128;
    Wait(base + offsetof(Shared, weights_empty), (sent & 1) ^ 1);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      StoreShared(base + offsetof(Shared, weights) + k * sizeof(shared.weights[0]) + thread * 16,
                  e[k]);
    }
    shared.factor[thread] = make_float2(last ? -factor.x : factor.x, factor.y);
    Arrive(base + offsetof(Shared, weights_full));
    ++sent;
  }
  // And what an item's sums must be multiplied by in the end.
  __device__ __forceinline__ void SendLast(float2 factor) {
    Wait(base + offsetof(Shared, last_empty), phase ^ 1);
    if (kMode != Mode::kSplit) shared.last[threadIdx.x % 128] = factor;
    Arrive(base + offsetof(Shared, last_full));
    phase ^= 1;
  }

  __device__ __forceinline__ void Softmax(float (&s)[32], bool last) {
    const uint32_t* masks = shared.told[sent % kTold].mask;
    const uint64_t mask = masks[0] | static_cast<uint64_t>(masks[1]) << 32;
    if (mask != ~uint64_t{0}) {
      const uint64_t mine = mask >> 2 * (threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if ((mine >> (i / 4 * 8 + i % 2) & 1) == 0) s[i] = -INFINITY;
      }
    }
    // Both rows side by side, and no long chains: one warp is all that a scheduler has of these.
    float top[2][4], factor[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* v = &s[8 * i + 2 * r];
        top[r][i] = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[4], v[5]));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r][0] = fmaxf(fmaxf(top[r][0], top[r][1]), fmaxf(top[r][2], top[r][3]));
    }
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r][1] = __shfl_xor_sync(0xFFFFFFFFu, top[r][0], lanes);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r][0] = fmaxf(top[r][0], top[r][1]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r][0] = __fmul_rn(top[r][0], args.scale);
      if (!(top[r][0] > __fadd_rn(largest[r], slack))) top[r][0] = largest[r];
      // Before an item's first block there is nothing to be multiplied.
      factor[r] = slack > 0.0f ? Exp2(__fsub_rn(largest[r], top[r][0])) : 1.0f;
      largest[r] = top[r][0];
      float part[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& e = s[4 * i + 2 * r + k];
          e = Exp2(__fmaf_rn(e, args.scale, -top[r][0]));
          part[k] = __fadd_rn(part[k], e);
        }
      }
      sum[r] = __fmaf_rn(sum[r], factor[r], __fadd_rn(part[0], part[1]));
    }
    slack = 8.0f;
    uint4 e[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      e[k] = make_uint4(PackBf16(s[8 * k], s[8 * k + 1]), PackBf16(s[8 * k + 2], s[8 * k + 3]),
                        PackBf16(s[8 * k + 4], s[8 * k + 5]), PackBf16(s[8 * k + 6], s[8 * k + 7]));
    }
    Send(e, make_float2(factor[0], factor[1]), last);
  }
};

// Sends what a thread left of its two rows to the thread blocks of the cluster that own them.
__device__ __forceinline__ void SendParts(const Args& args, Shared& shared, const Place& place,
                                          int first) {
#pragma unroll 1
  for (int row = first; row <= first + 8; row += 8) {
    const int owner = OwnerOf(row, args.splits);
    const OwnRows rows = RowsOf(owner, args.splits);
    const int at = place.rank * (rows.end - rows.first) + row - rows.first;
    StoreThere(AddressIn(SharedAddress(shared.parts) + 8 * at, owner), shared.sums[row],
               AddressIn(SharedAddress(&shared.sums_full), owner));
  }
}

template <Mode kMode, bool kSending>
__device__ __forceinline__ void Score(const Args& args, Shared& shared, const Place& place) {
  Scores<kMode> scores{args, shared, SharedAddress(&shared)};
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // and 8 on
  int item = place.first;
  float sink[2];
  const auto head_of = [&](int r) { return item % args.tiles * kHeads + row + 8 * r; };
  const auto begin_item = [&] {
    scores.slack = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = head_of(r);
      sink[r] = head < args.p.h ? __fmul_rn(__ldg(args.p.sink + head), kLog2E) : 0.0f;
      // Its e is finite.
      scores.largest[r] = fmaxf(__fsub_rn(sink[r], 60.0f), -1e30f);
      scores.sum[r] = 0.0f;
    }
  };
  const auto end_item = [&] {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = scores.sum[r];
      sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 1));
      sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 2));
      if constexpr (kMode == Mode::kSplit) {
        if (threadIdx.x % 4 == 0) {
          shared.sums[row + 8 * r] = make_float2(scores.largest[r], sum);
          shared.sinks[row + 8 * r] = sink[r];
        }
        factor[r] = 1.0f;
      } else {
        sum = __fadd_rn(sum, Exp2(__fsub_rn(sink[r], scores.largest[r])));
        factor[r] = sum > 0.0f ? __fdividef(1.0f, sum) : sum == 0.0f ? 0.0f : sum;
        const int head = head_of(r);
        if (args.p.lse != nullptr && threadIdx.x % 4 == 0 && head < args.p.h) {
          args.p.lse[static_cast<int64_t>(item / args.tiles) * args.p.h + head] =
              __fmul_rn(__fadd_rn(scores.largest[r], log2f(sum)), kLn2);
        }
      }
    }
    scores.SendLast(make_float2(factor[0], factor[1]));
  };
  const auto take_queries = [&] {
    WaitForCopies<0>();
    FenceAsync();
    SyncThreads(1, 128);
  };
  AskQueries(args, shared, item);
  begin_item();
  take_queries();
  float s[32];
  scores.Begin(s);
  for (;;) {
    WgmmaWait<0>();
    const bool last = shared.told[scores.sent % kTold].last;
    const bool final = kMode == Mode::kSplit || item + place.step >= args.items;
    if (last && !final) {
      // q is read no more: the next item's takes its place.
      SyncThreads(2, 128);
      AskQueries(args, shared, item + place.step);
    }
    scores.Softmax(s, last);
    if (last && final) break;
    if (last) take_queries();
    scores.Begin(s);
    // The next item's products are under way while one is done with.
    if (last) {
      end_item();
      item += place.step;
      begin_item();
    }
  }
  end_item();
  if constexpr (kSending) {
    __syncwarp();
    SyncClusterRelaxed();  // where Sum and the decoders do, before sums are sent
    if (threadIdx.x % 4 == 0) SendParts(args, shared, place, row);
  }
}

}  // namespace attention
}  // namespace dsv4
