// The pieces of Hopper's attention kernel: memory of a thread block, products, keys of a query.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attention/attention.h"
#include "common/barrier.cuh"
#include "common/bf16x2.cuh"
#include "common/bits.h"
#include "common/weights.cuh"
#include "common/wgmma.cuh"

namespace dsv4 {
namespace attention {

constexpr int kChannels = 512, kNope = 448, kRope = 64;
constexpr int kHeads = 64;  // of a tile: rows of an MMA
constexpr int kKeys = 64;   // of a block
constexpr int kChunk = 64;  // channels that share a scale: 128 bytes of BF16, a swizzled row
constexpr int kSteps = kChannels / kChunk / 2;
constexpr int kChunkBytes = kKeys * kChunk * 2;
constexpr int kPairBytes = 2 * kChunkBytes;  // chunks s and s + 4 of step s
constexpr int kPairs = 2 * kSteps;           // two blocks, in turn
constexpr int kTold = 8;                     // blocks that are told of, in turn
constexpr int kMaxSplits = 16;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// KeyRows in 32 bits where they do; strides in bytes.
struct Rows {
  const uint8_t* nope;
  const uint8_t* scale;
  const uint8_t* rope;
  uint32_t slots, stride_nope, stride_scale, stride_rope;
};

struct Args {
  AttentionParams p;
  Rows rows[3];  // ring, chunk, pool
  int items;     // tokens times tiles of heads
  int tiles;
  int splits;   // thread blocks of a cluster, that share the keys
  float scale;  // d^-0.5 log2(e)
};
// Of thread blocks that persist.
struct PersistentArgs : Args {
  CUtensorMap q, out;  // of o: boxes of a chunk of 64 heads
};

// How thread blocks share work.
enum class Mode {
  kAlone,  // one takes all keys of a tile of heads
  kPair,   // two tiles of heads: each decodes half of every block of keys, for both
  kSplit,  // a cluster shares out the keys of a tile
};

template <Mode kMode>
using ArgsOf = std::conditional_t<kMode == Mode::kSplit, Args, PersistentArgs>;

// Threads of a thread block, and registers of each kind of them; kParts thread blocks share the
// value channels. One warpgroup of decoders where sums need most registers; where they need few,
// two answer sooner.
template <Mode kMode, int kParts>
struct Kinds {
  static constexpr int kDecoders = kParts == 1 ? 128 : 256;
  static constexpr int kThreads = 3 * 128 + kDecoders + 128;
  static constexpr int kSumRegisters = kMode == Mode::kPair ? 168
                                       : kParts == 1        ? 160
                                       : kParts == 2        ? 112
                                                            : 88;
  static constexpr int kDecoderRegisters = kMode == Mode::kPair ? 48 : 64;
  static constexpr int kScoreRegisters = 64, kHelperRegisters = 32;
};
constexpr int kRawBytes = 20480;  // of pieces of keys under way

// What a query may see. Its keys are counted window first, then the pool.
struct Query {
  int token, batch;
  int first, window_keys;  // positions of the window
  int start;               // of the chunk
  int ring_first;          // slot of the first position
  int visible;             // entries of the pool
  int keys;
};

// Of a block: which of its keys are there, and whether others follow it.
struct Told {
  uint32_t mask[kKeys / 32];
  int token;
  bool last, final;  // of its item, of all
};

// Where the keys of a block are, and their scales.
struct Keys {
  const uint8_t* nope[kKeys];
  const uint8_t* rope[kKeys];
  uint8_t scales[kKeys][kChannels / kChunk];
  bool large[kKeys / 32];  // whether one of a warp's scales is past what one BF16 factor holds
};

struct Shared {
  char q[2 * kSteps][kChunkBytes];
  char pairs[kPairs][kPairBytes];
  uint4 weights[4][128];  // e of a block: each thread's MMA fragments
  char raw[kRawBytes];    // codes and rope under way, of each decoder's own
  float2 factor[128];     // of what was summed before, for a thread's two rows
  union {
    float2 last[128];                   // of an item's sums
    float2 parts[kHeads + kMaxSplits];  // sums of all of a cluster, sent: [rank, row of this one's]
  };
  float2 rotation[kRope / 2];
  float2 sums[kHeads];  // largest logit (times log2 e), sum of e
  float sinks[kHeads];  // times log2 e
  Told told[kTold];
  Keys keys[2];
  uint64_t found[2], scaled[2], taken[2];  // of keys
  uint64_t stored[kPairs], full[kPairs], empty[kPairs];
  uint64_t weights_full, weights_empty;
  uint64_t last_full, last_empty;
  uint64_t products_done;                // a split's, and its decoders'; a pair's of an item
  uint64_t sums_full;                    // what a cluster sent
  uint64_t queries_full, queries_empty;  // an item's, not in a split
  uint64_t out_full;                     // an item's output, where the keys of its last block were
  int out_slot;                          // the first of its pairs
};
constexpr int kSharedBytes = sizeof(Shared);
static_assert(kSharedBytes <= 232448);

// Whether a cluster's thread blocks send each other their sums, or read them: sent ones need no
// fence across the cluster, but small packets, which take longer when there are all channels.
template <Mode kMode, int kParts>
constexpr bool kSend = kMode == Mode::kSplit && kParts > 1;

// The rows whose sums a thread block of a cluster adds.
struct OwnRows {
  int first, end;
};
__device__ __forceinline__ OwnRows RowsOf(int rank, int splits) {
  return {kHeads * rank / splits, kHeads * (rank + 1) / splits};
}
__device__ __forceinline__ int OwnerOf(int row, int splits) {
  return (splits * (row + 1) - 1) / kHeads;
}

// Value channels of a thread block.
template <int kParts>
constexpr int kSumColumns = kChannels / kParts;
// Sums of all channels are left over the pairs and the weights: the pitch of their rows of FP32
// spreads the banks.
constexpr int kSumPitch = kChannels + 8;
static_assert(kHeads * kSumPitch * 4 <= kPairs * kPairBytes + 4 * 128 * 16);
static_assert(offsetof(Shared, weights) == offsetof(Shared, pairs) + kPairs * kPairBytes);

// Where the pairs of the count-th block are, and whether they are there an odd or an even time.
__device__ __forceinline__ int SlotOf(uint32_t count) { return (count & 1) * kSteps; }
__device__ __forceinline__ uint32_t PhaseOf(uint32_t count) { return count >> 1 & 1; }

// Between ordinary stores and tensor cores that read what they wrote.
__device__ __forceinline__ void FenceAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void SyncThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void SyncCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// Where no data changes hands.
__device__ __forceinline__ void SyncClusterRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// 16 or 8 bytes into another thread block of the cluster, which counts them on its barrier.
__device__ __forceinline__ void StoreThere(uint32_t to, const uint4& v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void StoreThere(uint32_t to, float2 v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(to),
      "f"(v.x), "f"(v.y), "r"(barrier)
      : "memory");
}
// Shared memory of another thread block of the cluster, which counts the bytes on its barrier.
__device__ __forceinline__ void CopyThere(uint32_t to, uint32_t from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Whether this thread is the one that a warp elects.
__device__ __forceinline__ bool Elected() {
  uint32_t elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, one;\n}"
               : "=r"(elected));
  return elected != 0;
}
// Sixteen bytes, or zeros.
__device__ __forceinline__ void CopyAsyncOrZero(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t LoadSharedByte(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ const uint8_t* LoadSharedPointer(uint32_t address) {
  uint64_t v;
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(v) : "r"(address) : "memory");
  return reinterpret_cast<const uint8_t*>(v);
}
__device__ __forceinline__ float2 LoadShared2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float4 LoadCluster4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ float2 LoadCluster2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A matrix with the 128-byte swizzle: groups of 8 rows 1024 bytes apart, whichever way it is read.
// This is the low half of its descriptor; the other is DSV4_SWIZZLED.
__device__ __forceinline__ uint32_t Matrix(uint32_t address) {
  return (address & 0x3FFFFu) >> 4 | 64u << 16;
}
constexpr uint32_t kRowStep = 32 / 16;             // 16 channels along a row
constexpr uint32_t kKeyStep = 16 * 128 / 16;       // 16 rows
constexpr uint32_t kChunkStep = kChunkBytes / 16;  // a chunk
#define DSV4_SWIZZLED "0x40000040"

// Keeps the compiler from computing what follows from x ahead of time.
__device__ __forceinline__ uint32_t Opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// d (+)= a . b^T, 64 x 64 x 16, rows of a and of b along their channels.
template <bool kFirst>
__device__ __forceinline__ void MultiplyQueryKey(float (&d)[32], uint32_t a, uint32_t b) {
  asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%32, " DSV4_SWIZZLED
               "};\nmov.b64 b, {%33, " DSV4_SWIZZLED
               "};\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" DSV4_SUMS_32
               "}, a, b, %34, 1, 1, 0, 0;\n}"
               : DSV4_OF_32(d, 0)
               : "r"(a), "r"(b), "n"(kFirst ? 0 : 1));
}

// The same for two chunks of values, a pair apart.
__device__ __forceinline__ void MultiplyWeightValues(float (&d)[32], float (&other)[32],
                                                     const uint4& a, uint32_t b) {
  asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%68, " DSV4_SWIZZLED
               "};\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" DSV4_SUMS_64
               "}, {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n}"
               : DSV4_OF_32(d, 0), DSV4_OF_32(other, 0)
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b + ((kPairBytes / 16 - 64) << 16)));
}

// d += a . b, 64 x 64 x 16: b's rows are keys, along their channels.
__device__ __forceinline__ void MultiplyWeightValue(float (&d)[32], const uint4& a, uint32_t b) {
  asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%36, " DSV4_SWIZZLED
               "};\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" DSV4_SUMS_32
               "}, {%32, %33, %34, %35}, b, 1, 1, 1, 1;\n}"
               : DSV4_OF_32(d, 0)
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b));
}

__device__ __forceinline__ Query QueryOf(const Args& args, int token) {
  const AttentionParams& p = args.p;
  Query query;
  query.token = token;
  query.batch = token / static_cast<int>(p.t);
  const int position = __ldg(p.positions + token);
  query.start = p.start != nullptr ? __ldg(p.start + query.batch) : INT32_MAX;
  const int visible = p.n_visible != nullptr ? __ldg(p.n_visible + token) : 0;
  query.visible = max(0, min(visible, static_cast<int>(p.pool.slots)));
  query.window_keys = position < 0 ? 0 : min(static_cast<int>(p.window) - 1, position) + 1;
  query.first = position - query.window_keys + 1;
  query.ring_first =
      args.rows[0].slots > 0 ? query.first % static_cast<int>(args.rows[0].slots) : 0;
  const int listed = p.topk_idx != nullptr ? static_cast<int>(p.topk) : query.visible;
  query.keys = query.window_keys + (query.visible > 0 ? listed : 0);
  return query;
}

struct Key {
  bool valid = false;
  const uint8_t* nope;
  const uint8_t* scale;
  const uint8_t* rope;
};

__device__ __forceinline__ Key KeyOf(const Args& args, const Query& query, int u, int entry) {
  Key key;
  const bool in_window = u < query.window_keys, in_chunk = query.first + u >= query.start;
  const Rows& rows = args.rows[!in_window ? 2 : in_chunk ? 1 : 0];
  const int slots = static_cast<int>(rows.slots);
  int slot = query.ring_first + u;
  slot = slot >= slots ? slot - slots : slot;  // a ring holds a window
  slot = !in_window ? entry : in_chunk ? query.first + u - query.start : slot;
  key.valid = u < query.keys && slot >= 0 && slot < (in_window ? slots : query.visible);
  const uint32_t at = static_cast<uint32_t>(query.batch * slots + slot);
  key.nope = rows.nope + static_cast<uint64_t>(at) * rows.stride_nope;
  key.scale = rows.scale + static_cast<uint64_t>(at) * rows.stride_scale;
  key.rope = rows.rope + static_cast<uint64_t>(at) * rows.stride_rope;
  return key;
}

// The blocks of keys of a thread block.
struct Blocks {
  int first, last;
};

// At least one: a block without keys adds nothing.
template <Mode kMode>
__device__ __forceinline__ Blocks BlocksOf(const Args& args, const Query& query, int rank) {
  const int all = (query.keys + kKeys - 1) / kKeys;
  if constexpr (kMode != Mode::kSplit) return {0, max(all, 1)};
  const Blocks blocks = {all * rank / args.splits, all * (rank + 1) / args.splits};
  if (blocks.first == blocks.last) return {all, all + 1};
  return blocks;
}

struct Place {
  int rank = 0, part = 0;  // in the cluster, of the value channels
  int first, step;         // items
};

}  // namespace attention
}  // namespace dsv4
