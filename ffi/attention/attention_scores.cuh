// Products of queries and keys, and their softmax, of Hopper's attention kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/attention_sm90.cuh"
#include "common/rope.h"

namespace dsv4 {
namespace attention {

// Asks for q of an item, of a split.
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

// The same by the copy engine, when those before are read no more: from one thread.
__device__ __forceinline__ void CopyQueries(const PersistentArgs& args, Shared& shared, int item) {
  const uint32_t full = SharedAddress(&shared.queries_full);
  ArriveExpecting(full, sizeof(shared.q));
#pragma unroll 1
  for (int chunk = 0; chunk < 2 * kSteps; ++chunk) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
        "{%2, %3, %4}], [%5];" ::"r"(SharedAddress(shared.q[chunk])),
        "l"(&args.q), "r"(chunk * kChunk), "r"(item % args.tiles * kHeads), "r"(item / args.tiles),
        "r"(full)
        : "memory");
  }
}

// Brings q of an item to come near: a lane a chunk.
__device__ __forceinline__ void PrefetchQueries(const PersistentArgs& args, int item) {
  const int chunk = threadIdx.x % 32;
  if (item >= args.items || chunk >= 2 * kSteps) return;
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(&args.q),
               "r"(chunk * kChunk), "r"(item % args.tiles * kHeads), "r"(item / args.tiles));
}

template <int kPending>
__device__ __forceinline__ void WaitForReads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Copies an item's output out, and passes on the pairs that it was in.
template <Mode kMode>
__device__ __forceinline__ void CopyOut(const PersistentArgs& args, const Shared& shared,
                                        const Place& place, int item) {
  const int lane = threadIdx.x % 32, slot = shared.out_slot;
  const auto copy = [&](int step, int half) {
    const uint32_t from =
        SharedAddress(shared.pairs) + (slot + step) * kPairBytes + half * kChunkBytes;
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
            &args.out),
        "r"((step + half * kSteps) * kChunk), "r"(item % args.tiles * kHeads),
        "r"(item / args.tiles), "r"(from)
        : "memory");
  };
  if (lane == 0) {
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      copy(step, 0);
      copy(step, 1);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  const auto pass_on = [&](int step) {
    __syncwarp();
    if (lane >= 8) return;  // for each of Sum's warps
    const uint32_t empty = SharedAddress(shared.empty + slot + step);
    Arrive(empty);
    if constexpr (kMode == Mode::kPair) ArriveIn(empty, place.rank ^ 1);
  };
  static_assert(kSteps == 4);
  WaitForReads<3>();  // of lane 0
  pass_on(0);
  WaitForReads<2>();
  pass_on(1);
  WaitForReads<1>();
  pass_on(2);
  WaitForReads<0>();
  pass_on(3);
}

// Cosines and sines of the rotation back, of all items, from one warp, which also asks for queries
// and copies output. The reduction in FP64 serves every position, and needs no call, which
// would cost the kernel registers.
template <Mode kMode>
__device__ __forceinline__ void Rotate(const ArgsOf<kMode>& args, Shared& shared,
                                       const Place& place) {
  const int i = threadIdx.x % 32;
  uint32_t phase = 0;
  if constexpr (kMode != Mode::kSplit) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&args.out) : "memory");
    if (i == 0) CopyQueries(args, shared, place.first);
  }
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
    if constexpr (kMode != Mode::kSplit) PrefetchQueries(args, item + place.step);
    Arrive(SharedAddress(&shared.last_full));
    if constexpr (kMode != Mode::kSplit) {
      if (item + place.step < args.items) {
        Wait(SharedAddress(&shared.queries_empty), phase);
        if (i == 0) CopyQueries(args, shared, item + place.step);
        __syncwarp();
      }
      Wait(SharedAddress(&shared.out_full), phase);
      CopyOut<kMode>(args, shared, place, item);
    }
  }
  if (kMode != Mode::kSplit) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
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
__device__ __forceinline__ void Score(const ArgsOf<kMode>& args, Shared& shared,
                                      const Place& place) {
  Scores<kMode> scores{args, shared, SharedAddress(&shared)};
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // and 8 on
  float sink[2];
  int tile = place.first % args.tiles;
  const int tile_step = place.step % args.tiles;
  const auto head_of = [&](int r) { return tile * kHeads + row + 8 * r; };
  const auto load_sinks = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sink[r] = head_of(r) < args.p.h ? __fmul_rn(__ldg(args.p.sink + head_of(r)), kLog2E) : 0.0f;
    }
  };
  const auto begin_item = [&] {
    scores.slack = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Its e is finite.
      scores.largest[r] = fmaxf(__fsub_rn(sink[r], 60.0f), -1e30f);
      scores.sum[r] = 0.0f;
    }
  };
  const auto end_item = [&](const Told& told) {
    float factor[2], sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = scores.sum[r];
      sum[r] = __fadd_rn(sum[r], __shfl_xor_sync(0xFFFFFFFFu, sum[r], 1));
      sum[r] = __fadd_rn(sum[r], __shfl_xor_sync(0xFFFFFFFFu, sum[r], 2));
      if constexpr (kMode == Mode::kSplit) {
        if (threadIdx.x % 4 == 0) {
          shared.sums[row + 8 * r] = make_float2(scores.largest[r], sum[r]);
          shared.sinks[row + 8 * r] = sink[r];
        }
        factor[r] = 1.0f;
      } else {
        sum[r] = __fadd_rn(sum[r], Exp2(__fsub_rn(sink[r], scores.largest[r])));
        factor[r] = sum[r] > 0.0f ? __fdividef(1.0f, sum[r]) : sum[r] == 0.0f ? 0.0f : sum[r];
      }
    }
    scores.SendLast(make_float2(factor[0], factor[1]));
    if constexpr (kMode != Mode::kSplit) {
      if (args.p.lse == nullptr || threadIdx.x % 4 != 0) return;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (head_of(r) < args.p.h) {
          args.p.lse[told.token * args.p.h + head_of(r)] =
              __fmul_rn(__fadd_rn(scores.largest[r], log2f(sum[r])), kLn2);
        }
      }
    }
  };
  const auto take_queries = [&] {
    if constexpr (kMode == Mode::kSplit) {
      WaitForCopies<0>();
      FenceAsync();
      SyncThreads(1, 128);
    } else {
      Wait(scores.base + offsetof(Shared, queries_full), scores.phase);
    }
  };
  if constexpr (kMode == Mode::kSplit) AskQueries(args, shared, place.first);
  load_sinks();
  begin_item();
  take_queries();
  float s[32];
  scores.Begin(s);
  for (;;) {
    WgmmaWait<0>();
    const Told& told = shared.told[scores.sent % kTold];
    const bool last = told.last, final = kMode == Mode::kSplit ? last : told.final;
    // q is read no more: the next item's takes its place.
    if (last && !final) Arrive(scores.base + offsetof(Shared, queries_empty));
    scores.Softmax(s, last);
    if (final) break;
    if constexpr (kMode != Mode::kSplit) {
      if (last) {
        end_item(told);
        if (tile_step != 0) {
          tile += tile_step;
          tile = tile >= args.tiles ? tile - args.tiles : tile;
          load_sinks();
        }
        begin_item();
        take_queries();
      }
    }
    scores.Begin(s);
  }
  end_item(shared.told[(scores.sent - 1) % kTold]);
  if constexpr (kSending) {
    __syncwarp();
    SyncClusterRelaxed();  // where Sum and the decoders do, before sums are sent
    if (threadIdx.x % 4 == 0) SendParts(args, shared, place, row);
  }
}

}  // namespace attention
}  // namespace dsv4
