// Keys of Hopper's attention kernel: looked up, gathered, decoded to BF16 in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/attention_sm90.cuh"

namespace dsv4 {
namespace attention {

// Four E4M3 codes as two pairs of BF16 in their order, times 2^-120; NaN is not told apart.
__device__ __forceinline__ void DecodeInOrder(uint32_t word, uint32_t (&pairs)[2]) {
  const uint32_t high = (word & 0x80808080u) | (word >> 4 & 0x07070707u);
  const uint32_t low = word << 4 & 0xF0F0F0F0u;
  pairs[0] = __byte_perm(low, high, 0x5140);
  pairs[1] = __byte_perm(low, high, 0x7362);
}

// Sixteen codes decoded: the first eight, and the others.
struct Decoded {
  uint4 first, second;
};

__device__ __forceinline__ uint4 DecodeEight(uint32_t a, uint32_t b, uint32_t factor) {
  uint32_t pairs[2][2];
  DecodeInOrder(a, pairs[0]);
  DecodeInOrder(b, pairs[1]);
  return make_uint4(MulBf16x2(pairs[0][0], factor), MulBf16x2(pairs[0][1], factor),
                    MulBf16x2(pairs[1][0], factor), MulBf16x2(pairs[1][1], factor));
}

__device__ __forceinline__ uint4 Times(const uint4& v, uint32_t factor) {
  return make_uint4(MulBf16x2(v.x, factor), MulBf16x2(v.y, factor), MulBf16x2(v.z, factor),
                    MulBf16x2(v.w, factor));
}

// Asks for a token's list before it is known which part is whose.
__device__ __forceinline__ void PrefetchIds(const Args& args, int token) {
  const int i = (threadIdx.x - 3 * 128) * 32;  // a line
  if (args.p.topk_idx != nullptr && i < args.p.topk) {
    Prefetch(args.p.topk_idx + static_cast<int64_t>(token) * args.p.topk + i);
  }
}

// Leaves out the places of a list from the first on at which none is an entry, if that many are
// visible: lists are as long as the longest, and blocks that weigh nothing are not worth their
// products. A warp asks for all at once.
__device__ __forceinline__ void LeaveOutEmptyPlaces(const Args& args, Query& query) {
  const int topk = static_cast<int>(args.p.topk);
  if (args.p.topk_idx == nullptr || query.visible == 0 || query.visible >= topk) return;
  const int32_t* const list = args.p.topk_idx + static_cast<int64_t>(query.token) * topk;
  bool any = false;
#pragma unroll 4
  for (int i = query.visible + static_cast<int>(threadIdx.x % 32); i < topk; i += 32) {
    any |= static_cast<uint32_t>(__ldg(list + i)) < static_cast<uint32_t>(query.visible);
  }
  if (!__any_sync(0xFFFFFFFFu, any)) query.keys = query.window_keys + query.visible;
}

// Two warps look up where the keys are, of all blocks of all items of a thread block, a lane a key,
// and ask that they come near.
template <Mode kMode>
__device__ __forceinline__ void Find(const Args& args, Shared& shared, const Place& place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, key = 32 * warp + lane;
  const bool mine = kMode != Mode::kPair || warp == place.rank;  // decoded here
  const bool listed = args.p.topk_idx != nullptr;
  // Tokens of a long chunk see much the same keys, which are near then.
  const bool far = kMode == Mode::kSplit || args.p.t < 32;
  uint32_t count = 0;
#pragma unroll 1
  for (int item = place.first; item < args.items; item += place.step) {
    Query query = QueryOf(args, item / args.tiles);
    if (!far) LeaveOutEmptyPlaces(args, query);
    const Blocks blocks = BlocksOf<kMode>(args, query, place.rank);
    const int64_t list = static_cast<int64_t>(query.token) * args.p.topk - query.window_keys;
    const auto ask_id = [&](int u) {
      return listed && u >= query.window_keys && u < query.keys ? __ldg(args.p.topk_idx + list + u)
                                                                : u - query.window_keys;
    };
    int id = ask_id(blocks.first * kKeys + key);
#pragma unroll 1
    for (int block = blocks.first; block < blocks.last; ++block, ++count) {
      const int u = block * kKeys + key;
      const Key at = KeyOf(args, query, u, id);
      const bool ask = at.valid && mine;
      id = ask_id(u + kKeys);
      uint32_t scales[2] = {0, 0}, most = 0;
      if (ask && far) {
#pragma unroll
        for (int line = 0; line < kNope; line += 128) Prefetch(at.nope + line);
        Prefetch(at.nope + kNope - 1);
        Prefetch(at.rope);
        Prefetch(at.rope + 2 * kRope - 1);
      }
      uint32_t bytes[kNope / kChunk];
#pragma unroll
      for (int i = 0; i < kNope / kChunk; ++i) bytes[i] = ask ? __ldg(at.scale + i) : 0;
      const uint32_t seen = __ballot_sync(0xFFFFFFFFu, at.valid);
      Keys& keys = shared.keys[count % 2];
      Wait(SharedAddress(shared.taken + count % 2), PhaseOf(count) ^ 1);
      if (mine) {
        keys.nope[key] = ask ? at.nope : nullptr;
        keys.rope[key] = at.rope;
      }
      Told& told = shared.told[count % kTold];
      if (lane == 0) told.mask[warp] = seen;
      if (key == 0) {
        told.token = query.token;
        told.last = block + 1 == blocks.last;
        told.final = told.last && item + place.step >= args.items;
      }
      Arrive(SharedAddress(shared.found + count % 2));
#pragma unroll
      for (int i = 0; i < kNope / kChunk; ++i) {
        scales[i / 4] |= bytes[i] << i % 4 * 8;
        most = max(most, bytes[i]);
      }
      const bool large = __any_sync(0xFFFFFFFFu, most > 134);
      *reinterpret_cast<uint2*>(keys.scales[key]) = make_uint2(scales[0], scales[1]);
      if (lane == 0) keys.large[warp] = large;
      Arrive(SharedAddress(shared.scaled + count % 2));
    }
  }
}

// One thread tells of decoded keys, by pairs of chunks: what decoders stored becomes visible to
// tensor cores and, in a pair of thread blocks, is copied to the other.
template <Mode kMode>
__device__ __forceinline__ void Publish(Shared& shared, const Place& place) {
  constexpr uint32_t kHalf = kChunkBytes / 2;
  const uint32_t base = SharedAddress(&shared);
  const uint32_t there = kMode == Mode::kPair ? AddressIn(base, place.rank ^ 1) - base : 0;
  bool more = true;
#pragma unroll 1
  for (uint32_t count = 0; more; ++count) {
#pragma unroll 1
    for (uint32_t slot = SlotOf(count); slot < SlotOf(count) + kSteps; ++slot) {
      Wait(base + offsetof(Shared, stored) + 8 * slot, PhaseOf(count));
      if (slot == SlotOf(count)) more = !shared.told[count % kTold].final;
      FenceAsync();
      const uint32_t full = base + offsetof(Shared, full) + 8 * slot;
      if constexpr (kMode != Mode::kPair) {
        Arrive(full);
        continue;
      }
      ArriveExpecting(full, 2 * kHalf);  // as much comes from the other
      const uint32_t from = base + offsetof(Shared, pairs) + slot * kPairBytes + place.rank * kHalf;
      CopyThere(from + there, from, kHalf, full + there);
      CopyThere(from + kChunkBytes + there, from + kChunkBytes, kHalf, full + there);
    }
  }
}

// Four lanes decode a key of a block, or two that are 32 apart: each a quarter (16 channels) of
// every chunk. Of a pair of thread blocks, each decodes half of the keys.
//
// What a lane decodes it copied itself, as pieces of 16 bytes, into shared memory of its own: so it
// waits for its own copies alone, and holds none in registers. Pieces are asked for two steps ahead
// or, in a pair, a block.
template <Mode kMode, int kDecoders>
struct Decoder {
  static constexpr int kMine = 4 * (kMode == Mode::kPair ? kKeys / 2 : kKeys) / kDecoders;
  static constexpr int kAhead = kMode == Mode::kPair ? kSteps : 2;

  // Kept, rather than found out again.
  uint32_t raw;            // where its pieces are
  uint32_t entry;          // of its key, in Shared::keys[0]
  uint32_t quarter;        // where its part of a piece of a key begins
  uint32_t within, units;  // where in a pair of chunks what it decodes goes, and its part of rope
  // Of the block asked for; of a key that is not there, none is copied but zeros.
  const uint8_t* nope[kMine];
  uint32_t bytes[kMine];
  const uint32_t base;  // of Shared

  __device__ Decoder(Shared& shared, const Place& place) : base(SharedAddress(&shared)) {
    const int thread = threadIdx.x - 3 * 128, quad = thread % 4;
    const int key = (kMode == Mode::kPair ? 32 * place.rank : 0) + thread / 4;
    raw = Opaque(SharedAddress(shared.raw) + 16 * thread);
    entry = Opaque(SharedAddress(&shared.keys[0]) + 8 * key);
    quarter = Opaque(16 * quad);
    within = Opaque(key * 128 + ((2 * quad ^ (key & 7)) << 4));
    units = Opaque(kChunkBytes + key * 128 + ((quad ^ (key & 7)) << 4));
  }

  __device__ __forceinline__ uint32_t EntryOf(uint32_t count) const {
    return entry + (count & 1) * static_cast<uint32_t>(sizeof(Keys));
  }
  // Turns to the keys of the count-th block, to ask for their pieces.
  __device__ __forceinline__ void Turn(uint32_t count) {
    Wait(base + offsetof(Shared, found) + 8 * (count & 1), PhaseOf(count));
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      nope[i] = LoadSharedPointer(EntryOf(count) + offsetof(Keys, nope) + 8 * 32 * i);
      bytes[i] = nope[i] != nullptr ? 16 : 0;
      nope[i] += quarter;
    }
  }
  // Places of pieces: in a pair, each has its own. Else steps 0 and 2 share some, 1 and 3 some; the
  // last step's lower chunks, asked for with step 1, have their own.
  __device__ static __forceinline__ int LowerOf(int step, int i) {
    return kAhead == kSteps     ? 2 * step
           : step == kSteps - 1 ? 4 * kMine + i
                                : step % 2 * 2 * kMine + 2 * i;
  }
  __device__ static __forceinline__ int UpperOf(int step, int i) {
    return kAhead == kSteps ? 2 * step + 1
                            : step % 2 * 2 * kMine + 2 * i + (step == kSteps - 1 ? 0 : 1);
  }
  // Of the second half of rope.
  __device__ static __forceinline__ int RopeOf(int i) {
    return kAhead == kSteps ? 2 * kSteps : UpperOf(kSteps - 1, i) + 1;
  }
  static_assert((kAhead == kSteps ? 2 * kSteps + 1 : 5 * kMine) * kDecoders * 16 <= kRawBytes);
  __device__ __forceinline__ uint32_t At(int place) const { return raw + place * kDecoders * 16; }
  // Asks for the pieces of a step.
  __device__ __forceinline__ void AskStep(uint32_t count, int step) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const auto ask = [&](int place, int chunk) {
        CopyAsyncOrZero(At(place), nope[i] + chunk * kChunk, bytes[i]);
      };
      if (step < kSteps - 1) {
        ask(LowerOf(step, i), step);
        ask(UpperOf(step, i), kSteps + step);
        if (kAhead != kSteps && step == 1) ask(LowerOf(kSteps - 1, i), kSteps - 1);
      } else {
        if (kAhead == kSteps) ask(LowerOf(step, i), step);
        const uint8_t* from =
            LoadSharedPointer(EntryOf(count) + offsetof(Keys, rope) + 8 * 32 * i) + quarter;
        CopyAsyncOrZero(At(UpperOf(step, i)), from, bytes[i]);
        CopyAsyncOrZero(At(RopeOf(i)), from + kRope, bytes[i]);
      }
    }
  }
  // Sixteen codes of a chunk. kLarge: the scale may be past what one BF16 factor holds.
  template <bool kLarge>
  __device__ __forceinline__ void PutDecoded(uint32_t at, const uint4& codes,
                                             uint32_t scale) const {
    // Both halves 2^120 times the scale: its exponent, and what that of codes lacks.
    const uint32_t factor =
        kLarge ? min(scale + 120, 254u) * 0x00800080u : scale * 0x00800080u + 0x3C003C00u;
    Decoded v = {DecodeEight(codes.x, codes.y, factor), DecodeEight(codes.z, codes.w, factor)};
    if constexpr (kLarge) {
      const uint32_t rest = Fp8Rest(scale);
      if (rest != 0) v = {Times(v.first, rest), Times(v.second, rest)};
    }
    StoreShared(at, v.first);
    StoreShared(at ^ 16, v.second);
  }
  template <bool kLarge>
  __device__ __forceinline__ void Step(uint32_t count, int step) const {
    constexpr uint32_t kApart = 32 * 128;  // keys of a lane
    const uint32_t slot = SlotOf(count) + step;
    const uint32_t scales = EntryOf(count) + offsetof(Keys, scales) + step;
    const uint32_t pair = base + offsetof(Shared, pairs) + slot * kPairBytes;
    const bool rope = step == kSteps - 1;
    uint32_t scale[kMine][2];
    uint4 codes[kMine][2];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      scale[i][0] = LoadSharedByte(scales + 8 * 32 * i);
      if (!rope) scale[i][1] = LoadSharedByte(scales + 8 * 32 * i + kSteps);
      codes[i][0] = LoadShared(At(LowerOf(step, i)));
      codes[i][1] = LoadShared(At(UpperOf(step, i)));
    }
    Wait(base + offsetof(Shared, empty) + 8 * slot, PhaseOf(count) ^ 1);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      PutDecoded<kLarge>(pair + within + i * kApart, codes[i][0], scale[i][0]);
      if (!rope) {
        PutDecoded<kLarge>(pair + within + i * kApart + kChunkBytes, codes[i][1], scale[i][1]);
      } else {  // nothing to be decoded
        const uint32_t at = pair + units + i * kApart;
        StoreShared(at, codes[i][1]);
        StoreShared(at ^ 64, LoadShared(At(RopeOf(i))));
      }
    }
  }

  __device__ __forceinline__ void Run(const Shared& shared, const Place& place) {
    Turn(0);
    // What is under way when a first block begins.
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      AskStep(0, step);
      CommitCopies();
    }
    bool more = true;
#pragma unroll 1
    for (uint32_t count = 0; more; ++count) {
      Wait(base + offsetof(Shared, scaled) + 8 * (count & 1), PhaseOf(count));
      const Keys& mine = shared.keys[count % 2];
      const bool large = kMode == Mode::kPair ? mine.large[place.rank]
                         : kMine == 2         ? mine.large[0] || mine.large[1]
                                              : mine.large[(threadIdx.x - 3 * 128) / 128];
      more = !shared.told[count % kTold].final;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t slot = SlotOf(count) + step;
        WaitForCopies<kAhead - 1>();
        __syncwarp();
        if (large) {
          Step<true>(count, step);
        } else {
          Step<false>(count, step);
        }
        __syncwarp();
        if (Elected()) Arrive(base + offsetof(Shared, stored) + 8 * slot);
        // Into the places that this step has left.
        const int ahead = step + kAhead;
        if (ahead < kSteps || more) {
          if (ahead == kSteps) Turn(count + 1);
          AskStep(count + ahead / kSteps, ahead % kSteps);
        }
        CommitCopies();
      }
      Arrive(base + offsetof(Shared, taken) + 8 * (count & 1));
    }
  }
};

}  // namespace attention
}  // namespace dsv4
