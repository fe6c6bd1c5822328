// Keys of Hopper's attention kernel: looked up, gathered, decoded to BF16 in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention/attention_sm90.cuh"

namespace dsv4 {
namespace attention {

// Where keys that are none are read.
static __device__ uint4 zero_key[kNope / 16];

// Sixteen codes decoded: the even channels, and the odd ones.
struct Decoded {
  uint4 even, odd;
};

__device__ __forceinline__ Decoded Decode(const uint4& raw, uint32_t factor) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t even[4], odd[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pairs[2];
    DecodeE4m3(words[i], pairs);
    even[i] = MulBf16x2(pairs[0], factor);
    odd[i] = MulBf16x2(pairs[1], factor);
  }
  return {make_uint4(even[0], even[1], even[2], even[3]),
          make_uint4(odd[0], odd[1], odd[2], odd[3])};
}

__device__ __forceinline__ uint4 Times(const uint4& v, uint32_t factor) {
  return make_uint4(MulBf16x2(v.x, factor), MulBf16x2(v.y, factor), MulBf16x2(v.z, factor),
                    MulBf16x2(v.w, factor));
}

// Asks for a token's list before it is known which part is whose.
__device__ __forceinline__ void PrefetchIds(const Args& args, int token) {
  const int i = threadIdx.x % 128 * 32;
  if (args.p.topk_idx != nullptr && i < args.p.topk) {
    Prefetch(args.p.topk_idx + token * args.p.topk + i);
  }
}

// The blocks of all items of a thread block, one after the other.
template <Mode kMode>
struct Cursor {
  const Args& args;
  const Place& place;
  int item;
  Query query;
  int block, last;
  bool done = false;

  __device__ Cursor(const Args& a, const Place& p) : args(a), place(p) {
    item = place.first;
    Open();
  }
  __device__ __forceinline__ void Open() {
    for (; item < args.items; item += place.step) {
      query = QueryOf(args, item / args.tiles);
      const Blocks blocks = BlocksOf<kMode>(args, query, place.rank);
      block = blocks.first;
      last = blocks.last;
      if (block < last) return;
    }
    done = true;
  }
  __device__ __forceinline__ void Next() {
    if (++block < last) return;
    item += place.step;
    Open();
  }
};

constexpr int kAhead = 1;  // steps from asking for codes to decoding them

// A warp decodes 8 keys of a block and the 8 that are 32 on: a thread a quarter (16 channels) of
// every chunk of two. Of a pair, each thread block decodes one of these, and copies it to the
// other. A block ahead, two lanes look up each key.
template <Mode kMode>
struct Decoder {
  static constexpr int kMine = kMode == Mode::kPair ? 1 : 2;  // keys of a thread
  static constexpr int kBuffers = kAhead == 1 ? 2 : 4;

  const Args& args;
  Shared& shared;
  const int first;  // of the thread's keys: 0, or 32 of the pair's second
  Cursor<kMode> next;
  bool scaled = false;      // the key looked up is one of this thread block's
  uint32_t shift = 0;       // of its scales in their words
  bool large_next = false;  // a scale of the block looked up takes two factors
  const uint8_t* nope[kMine];
  uint4 raw[kBuffers][2 * kMine];  // of steps in turn
  uint4 rope[2];                   // of a pair's: the last step's upper chunk
  uint32_t there = 0;              // from an address to the same in the pair's other thread block

  __device__ Decoder(const Args& a, Shared& s, const Place& place)
      : args(a), shared(s), first(kMode == Mode::kPair ? 32 * place.rank : 0), next(a, place) {}
  __device__ static __forceinline__ int Warp() { return threadIdx.x % 128 / 32; }
  __device__ static __forceinline__ int Lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ int Row() const { return first + 8 * Warp() + Lane() / 4; }
  // Of the key that a lane looks up.
  __device__ static __forceinline__ int Looked() {
    return 8 * Warp() + Lane() % 8 + (Lane() & 8) * 4;
  }

  // Asks for the ids of the next block's keys.
  __device__ __forceinline__ void Find() {
    if (next.done || args.p.topk_idx == nullptr) return;
    const int u = next.block * kKeys + Looked(), i = u - next.query.window_keys;
    if (i >= 0 && u < next.query.keys && Lane() < 16) {
      CopyAsync<4>(SharedAddress(&shared.ids[Looked()]),
                   args.p.topk_idx + next.query.token * args.p.topk + i);
    }
  }
  // Leaves where the key is, and asks for all its bytes.
  __device__ __forceinline__ void LookUp(uint32_t count) {
    WaitForCopies<0>();
    __syncwarp();
    const int u = next.block * kKeys + Looked();
    const Key key =
        KeyOf(args, next.query, u,
              args.p.topk_idx != nullptr ? shared.ids[Looked()] : u - next.query.window_keys);
    const bool upper = Lane() >= 16;
    const uint32_t seen = __ballot_sync(0xFFFFFFFFu, key.valid);
    if (Lane() == 0) {
      shared.mask[count % kMasks][Warp()] = static_cast<uint8_t>(seen);
      shared.mask[count % kMasks][4 + Warp()] = static_cast<uint8_t>(seen >> 8);
    }
    Entry& to = shared.entries[count % 2][Looked()];
    const uint8_t* const none = reinterpret_cast<const uint8_t*>(zero_key);
    if (!upper) {
      to.nope = key.valid ? key.nope : none;
    } else {
      to.rope = key.valid ? key.rope : none;
    }
    scaled = key.valid && (kMode != Mode::kPair || (Looked() & 32) == first);
    if (scaled) {
      // Seven bytes anywhere, by words.
      shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(key.scale)) & 3;
      const uint8_t* const words = key.scale - shift;
      const uint32_t bytes = SharedAddress(to.bytes);
      if (!upper) {
        CopyAsyncPart(bytes, words, 4);
        CopyAsyncPart(bytes + 4, words + 4, min(4, static_cast<int>(shift) + 3));
      } else {
        CopyAsyncPart(bytes + 8, words + (shift > 1 ? 8 : 0), max(0, static_cast<int>(shift) - 1));
      }
      Prefetch(upper ? key.rope : key.nope);
      Prefetch(upper ? key.rope + 2 * kRope - 1 : key.nope + 128);
      Prefetch(key.nope + (upper ? kNope - 1 : 256));
    }
    CommitCopies();
  }
  // Its scales have come.
  __device__ __forceinline__ void LeaveScales(uint32_t count) {
    WaitForCopies<0>();
    __syncwarp();
    const int upper = Lane() >= 16;
    Entry& to = shared.entries[count % 2][Looked()];
    uint32_t four = __funnelshift_r(to.bytes[upper], to.bytes[upper + 1], 8 * shift);
    four = !scaled ? 0 : upper ? four & 0xFFFFFFu : four;
    uint32_t factor[4], most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte = four >> 8 * i & 0xFF;
      factor[i] = min(byte + 120, 254u) << 7;
      most = max(most, byte);
    }
    large_next = __any_sync(0xFFFFFFFFu, most > 134);
    reinterpret_cast<uint2*>(&to.factor)[upper] =
        make_uint2(factor[0] | factor[1] << 16, factor[2] | factor[3] << 16);
    __syncwarp();
    to.bytes[upper] = four;
    __syncwarp();
  }
  __device__ __forceinline__ const Entry& Of(uint32_t count, int i) const {
    return shared.entries[count % 2][Row() + 32 * i];
  }
  __device__ __forceinline__ void Load(uint32_t count, int step, uint4 (&to)[2 * kMine]) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (step == 0) nope[i] = Of(count, i).nope + 16 * (Lane() % 4);
      to[i] = __ldg(reinterpret_cast<const uint4*>(nope[i] + step * kChunk));
      if (step < kSteps - 1) {
        to[kMine + i] = __ldg(reinterpret_cast<const uint4*>(nope[i] + (step + kSteps) * kChunk));
      } else if (kMode == Mode::kPair) {
        const uint8_t* from = Of(count, i).rope + 16 * (Lane() % 4);
        rope[0] = __ldg(reinterpret_cast<const uint4*>(from));
        rope[1] = __ldg(reinterpret_cast<const uint4*>(from + 64));
      }
    }
  }
  __device__ __forceinline__ void Put(uint32_t at, const uint4& v, uint32_t full) const {
    StoreShared(at, v);
    if constexpr (kMode == Mode::kPair) StoreThere(at + there, v, full + there);
  }
  // The rope needs no decoding.
  __device__ __forceinline__ void PutRope(uint32_t count, uint32_t to, uint32_t full) const {
    const int j = Lane() % 4, row = Row();
    const uint32_t at = to + kChunkBytes + row * 128 + ((j ^ (row & 7)) << 4);
    if constexpr (kMode == Mode::kPair) {
      Put(at, rope[0], full);
      Put(at ^ 64, rope[1], full);
    } else {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const uint8_t* from = Of(count, i).rope + 16 * j;
        CopyAsync<16>(at + i * 32 * 128, from);
        CopyAsync<16>((at ^ 64) + i * 32 * 128, from + 64);
      }
    }
  }
  __device__ __forceinline__ void Store(uint32_t count, int step, uint32_t to, uint32_t full,
                                        const uint4 (&factor)[kMine],
                                        const uint4 (&from)[2 * kMine], bool large) const {
    const int row = Row();
    const uint32_t within = row * 128 + ((2 * (Lane() % 4) ^ (row & 7)) << 4);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = step + kSteps * half;
        if (chunk == kNope / kChunk) continue;
        const uint32_t pair = chunk / 2 == 0   ? factor[i].x
                              : chunk / 2 == 1 ? factor[i].y
                              : chunk / 2 == 2 ? factor[i].z
                                               : factor[i].w;
        Decoded v =
            Decode(from[kMine * half + i], __byte_perm(pair, 0, chunk % 2 == 0 ? 0x1010 : 0x3232));
        if (large) {  // a scale past what one BF16 factor holds
          const uint32_t rest = Fp8Rest(Of(count, i).bytes[chunk / 4] >> 8 * (chunk % 4) & 0xFF);
          if (rest != 0) v = {Times(v.even, rest), Times(v.odd, rest)};
        }
        const uint32_t at = to + half * kChunkBytes + i * 32 * 128 + within;
        Put(at, v.even, full);
        Put(at ^ 16, v.odd, full);
      }
    }
  }
  // A warp's share of a pair of chunks is there.
  __device__ __forceinline__ void Publish(uint32_t full) const {
    __syncwarp();
    if (Lane() != 0) return;
    if constexpr (kMode == Mode::kPair) {
      ArriveExpecting(full, 2 * 8 * 128);  // as much comes from the other
    } else {
      Arrive(full);
    }
  }

  __device__ __forceinline__ void Run() {
    if (next.done) return;
    const uint32_t base = SharedAddress(&shared), pairs = base + offsetof(Shared, pairs);
    const uint32_t full = base + offsetof(Shared, full), empty = base + offsetof(Shared, empty);
    if constexpr (kMode == Mode::kPair) there = AddressIn(base, first == 0 ? 1 : 0) - base;
    Find();
    CommitCopies();
    LookUp(0);
    __syncwarp();
#pragma unroll
    for (int step = 0; step < kAhead; ++step) Load(0, step, raw[step]);
    LeaveScales(0);
    next.Next();
    Find();
    CommitCopies();
    Turn turn;
    bool more = true;
    for (uint32_t count = 0; more; ++count) {
      const bool large = large_next;
      more = !next.done;
      uint4 factor[kMine];
#pragma unroll
      for (int i = 0; i < kMine; ++i) factor[i] = Of(count, i).factor;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t to = pairs + turn.slot * kPairBytes, done = full + 8 * turn.slot;
        Wait(empty + 8 * turn.slot, turn.phase ^ 1);
        constexpr int kLast = kSteps - 1;
        const int ahead = step + kAhead;
        if (step == kLast) {
          if (more) LeaveScales(count + 1);
          PutRope(count, to, done);
          CommitCopies();
        }
        if (ahead < kSteps) {
          Load(count, ahead, raw[ahead % kBuffers]);
        } else if (more) {
          Load(count + 1, ahead - kSteps, raw[ahead % kBuffers]);
        }
        if (step == kLast) {
          if (more) {
            next.Next();
            Find();
          }
          CommitCopies();
        }
        Store(count, step, to, done, factor, raw[step % kBuffers], large);
        if (step == kLast) WaitForCopies<1>();  // the ids may be under way
        Publish(done);
        turn.Next();
        if (step == kLast - 1 - kAhead && more) LookUp(count + 1);
      }
    }
  }
};

}  // namespace attention
}  // namespace dsv4
