// Products of queries and keys, and their softmax, of Hopper's attention kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/attention_sm90.cuh"

namespace dsv4 {
namespace attention {

// Where a thread of Score holds 16 channels of every fourth row of q.
__device__ __forceinline__ uint32_t QueryPlace(const Shared& shared, int row) {
  const int lane = threadIdx.x % 32, chunk = lane / 4, j = lane % 4;
  return SharedAddress(shared.q) + chunk * kChunkBytes + row * 128 + ((2 * j ^ (row & 7)) << 4);
}

// Asks for q of an item.
__device__ __forceinline__ void AskQueries(const Args& args, Shared& shared, int item) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int tile = item % args.tiles;
  const int heads = static_cast<int>(args.p.h) - tile * kHeads;
  const uint16_t* const from = args.p.q + item / args.tiles * args.p.stride_q +
                               static_cast<int64_t>(tile) * kHeads * kChannels;
#pragma unroll 4
  for (int row = warp; row < kHeads; row += 4) {
    const uint32_t to = QueryPlace(shared, row);
    const uint16_t* at = from + (row < heads ? row * kChannels + 16 * lane : 0);
    CopyAsyncOrZero(to, at, row < heads);
    CopyAsyncOrZero(to ^ 16, at + 8, row < heads);
  }
  CommitCopies();
}

// Orders 16 channels of the nope as decoded keys are: the even ones, then the odd ones.
__device__ __forceinline__ void ArrangeQueries(Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  WaitForCopies<0>();
  if (lane / 4 < kNope / kChunk) {
    constexpr int kAtOnce = 4;  // rows on their way at a time
#pragma unroll 1
    for (int first = warp; first < kHeads; first += 4 * kAtOnce) {
      uint4 a[kAtOnce], b[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t at = QueryPlace(shared, first + 4 * i);
        a[i] = LoadShared(at);
        b[i] = LoadShared(at ^ 16);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t at = QueryPlace(shared, first + 4 * i);
        StoreShared(
            at,
            make_uint4(__byte_perm(a[i].x, a[i].y, 0x5410), __byte_perm(a[i].z, a[i].w, 0x5410),
                       __byte_perm(b[i].x, b[i].y, 0x5410), __byte_perm(b[i].z, b[i].w, 0x5410)));
        StoreShared(
            at ^ 16,
            make_uint4(__byte_perm(a[i].x, a[i].y, 0x7632), __byte_perm(a[i].z, a[i].w, 0x7632),
                       __byte_perm(b[i].x, b[i].y, 0x7632), __byte_perm(b[i].z, b[i].w, 0x7632)));
      }
    }
  }
  FenceAsync();
  SyncThreads(1, 128);
}

// Brings q of an item to come near.
__device__ __forceinline__ void PrefetchQueries(const Args& args, int item) {
  if (item >= args.items) return;
  const int tile = item % args.tiles;
  const int heads = min(static_cast<int>(args.p.h) - tile * kHeads, kHeads);
  const uint16_t* q = args.p.q + item / args.tiles * args.p.stride_q + tile * kHeads * kChannels;
  for (int line = threadIdx.x % 128; line < heads * 8; line += 128) Prefetch(q + line * 64);
}

// Cosine and sine of the rotation back, for the threads of one warp. The reduction to one turn in
// FP64 serves every position, and needs no call, which would cost the kernel registers.
__device__ __forceinline__ void Rotation(const Args& args, float2* to, int token) {
  const int i = threadIdx.x % 32;
  const float angle = __fmul_rn(static_cast<float>(args.p.positions[token]), args.p.frequencies[i]);
  const double turns = static_cast<double>(angle) * 0.15915494309189533577;
  float sine, cosine;
  sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sine, &cosine);
  to[i] = make_float2(cosine, -sine);
}

constexpr int kFenceSteps = 1;  // that share a fence, which costs some 250 cycles

template <Mode kMode>
struct Scores {
  const Args& args;
  Shared& shared;
  uint32_t base;       // its address
  Turn turn;           // of the pairs
  uint32_t phase = 0;  // of the weights
  float largest[2], sum[2];

  // The products of a block with q, begun.
  __device__ __forceinline__ void Begin(float (&s)[32]) {
    const uint32_t q = Opaque(Matrix(base + offsetof(Shared, q)));
    const uint32_t pairs = Matrix(base + offsetof(Shared, pairs));
    const uint32_t full = base + offsetof(Shared, full);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step % kFenceSteps == 0) {
        Turn ahead = turn;
#pragma unroll
        for (int i = 0; i < kFenceSteps; ++i, ahead.Next())
          Wait(full + 8 * ahead.slot, ahead.phase);
        FenceAsync();
      }
      WgmmaFence();
      const uint32_t keys = pairs + turn.slot * (2 * kChunkStep);
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
      turn.Next();
    }
    WgmmaCommit();
  }

  // Sends what Sum multiplies: e of a block, and what sums until now must be multiplied by.
  __device__ __forceinline__ void Send(const uint4 (&e)[4], float2 factor) {
    const int thread = threadIdx.x % 128;
    Wait(base + offsetof(Shared, weights_empty), phase ^ 1);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      StoreShared(base + offsetof(Shared, weights) + k * sizeof(shared.weights[0]) + thread * 16,
                  e[k]);
    }
    shared.factor[thread] = factor;
    Arrive(base + offsetof(Shared, weights_full));
    phase ^= 1;
  }
  __device__ __forceinline__ void SendFactor(float2 factor) {
    Wait(base + offsetof(Shared, weights_empty), phase ^ 1);
    shared.factor[threadIdx.x % 128] = factor;
    if (args.p.frequencies != nullptr && threadIdx.x % 128 < 32) {
      Rotation(args, shared.rotation, token);
    }
    Arrive(base + offsetof(Shared, weights_full));
    phase ^= 1;
  }
  int token;

  __device__ __forceinline__ void Softmax(float (&s)[32], uint32_t count) {
    const uint64_t mask = *reinterpret_cast<const uint64_t*>(shared.mask[count % kMasks]);
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
      top[r][0] = fmaxf(largest[r], __fmul_rn(top[r][0], args.scale));
      factor[r] = Exp2(__fsub_rn(largest[r], top[r][0]));
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
    uint4 e[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      e[k] = make_uint4(PackBf16(s[8 * k], s[8 * k + 1]), PackBf16(s[8 * k + 2], s[8 * k + 3]),
                        PackBf16(s[8 * k + 4], s[8 * k + 5]), PackBf16(s[8 * k + 6], s[8 * k + 7]));
    }
    Send(e, make_float2(factor[0], factor[1]));
  }
};

template <Mode kMode>
__device__ __forceinline__ void Score(const Args& args, Shared& shared, const Place& place) {
  Scores<kMode> scores{args, shared, SharedAddress(&shared)};
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // and 8 on
  uint32_t count = 0;
  int asked = place.first;  // item whose q is under way
  AskQueries(args, shared, asked);
  float s[32];
  for (int item = place.first; item < args.items; item += place.step) {
    scores.token = item / args.tiles;
    const int tile = item % args.tiles, head = tile * kHeads + row;
    const Query query = QueryOf(args, scores.token);
    const Blocks blocks = BlocksOf<kMode>(args, query, place.rank);
    float sink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sink[r] = head + 8 * r < args.p.h ? __fmul_rn(__ldg(args.p.sink + head + 8 * r), kLog2E) : 0;
      scores.largest[r] = fmaxf(sink[r], -1e30f);
      scores.sum[r] = 0.0f;
    }
    int left = blocks.last - blocks.first;
    if (left > 0) {
      if (asked != item) {
        WaitForCopies<0>();
        AskQueries(args, shared, item);
      }
      ArrangeQueries(shared);
      scores.Begin(s);
      if (kMode != Mode::kSplit) PrefetchQueries(args, item + place.step);
      // q is read no more: the next item's takes its place.
      const auto ask = [&] {
        if (kMode == Mode::kSplit || item + place.step >= args.items) return;
        SyncThreads(1, 128);
        asked = item + place.step;
        AskQueries(args, shared, asked);
      };
      for (;;) {
        WgmmaWait<0>();
        if (--left == 0) ask();
        scores.Softmax(s, count++);
        if (left == 0) break;
        scores.Begin(s);
      }
    }
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
        if (args.p.lse != nullptr && threadIdx.x % 4 == 0 && head + 8 * r < args.p.h) {
          args.p.lse[static_cast<int64_t>(scores.token) * args.p.h + head + 8 * r] =
              __fmul_rn(__fadd_rn(scores.largest[r], log2f(sum)), kLn2);
        }
      }
    }
    scores.SendFactor(make_float2(factor[0], factor[1]));
  }
}

}  // namespace attention
}  // namespace dsv4
