// Scores of many (query, key) pairs by FP8 tensor cores. sm_90a alone.
//
// Keys are the rows of the MMA, from registers; the 64 heads of a query are its columns, in shared
// memory: a lane then has 16 heads of each of two keys, and their sum is its own but for two
// exchanges. All (group of queries, tile of 64 keys) pairs that are visible form one line, of which
// every thread block takes an equal stretch. One thread copies tiles of a stretch into a ring; tile
// after tile goes to the warpgroups in turn. A warpgroup turns the keys' codes into E4M3 once and
// multiplies them with each query of the group, half a tile at a time: one product is summed while
// the next is made, and both halves take the query's weights from registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/barrier.cuh"
#include "common/weights.cuh"
#include "common/wgmma.cuh"
#include "index_topk/index_topk_codes.h"
#include "index_topk/index_topk_order.h"

namespace dsv4 {
namespace index_topk {

constexpr int kHeads = 64, kChannels = 128;
constexpr int kHalfKeys = 64;  // of a product
constexpr int kTileKeys = 2 * kHalfKeys;
constexpr int kWarpgroups = 3;  // that multiply
constexpr int kConsumers = 128 * kWarpgroups;
constexpr int kThreads = kConsumers + 128;
constexpr int kQueryBytes = kHeads * kChannels;    // of E4M3
constexpr uint32_t kQueryRows = kQueryBytes >> 4;  // as a descriptor counts
constexpr uint32_t kNanOrder = 1;
constexpr int kMaxGroups = 1024;  // of a launch
constexpr int kWeightPitch = 20;  // of a lane's 16 weights: spreads the banks
constexpr int kQueryWeights = 4 * kWeightPitch;

// Queries first_token .. of whole groups; a group is kQueries tokens of one batch row, its last
// one fewer.
struct ScoreArgs {
  IndexTopkParams p;
  uint32_t* order;    // [tokens, slots]: scores as ScoreOrder has them, NaN as kNanOrder
  uint32_t* largest;  // [tokens, IndexTopkGroups(slots)]: of the orders of a group, or nullptr
  int64_t first_token, first_group;
  uint32_t tokens;
  int groups, groups_per_batch;
};

template <IndexForm kForm>
struct KeyBytes;
template <>
struct KeyBytes<IndexForm::kMxfp4> {
  static constexpr int kCodes = kChannels / 2, kScales = kChannels / 32;
};
template <>
struct KeyBytes<IndexForm::kFp8> {
  static constexpr int kCodes = kChannels, kScales = 1;
};

// Tiles under way; one warpgroup's are always the same slots.
template <IndexForm kForm, int kQueries>
constexpr int kSlots = kWarpgroups * (kForm == IndexForm::kFp8 ? 2
                                      : kQueries == 16         ? 3
                                                               : 4);

template <IndexForm kForm>
struct alignas(16) Slot {
  uint8_t codes[kTileKeys * KeyBytes<kForm>::kCodes];
  uint8_t scales[kTileKeys * KeyBytes<kForm>::kScales];
};

template <IndexForm kForm, int kQueries>
struct ScoreShared {
  uint8_t q[kQueries][kQueryBytes];  // E4M3, swizzled; 1024-byte aligned
  Slot<kForm> slots[kSlots<kForm, kQueries>];
  float weights[kQueries][kQueryWeights];  // a lane's 16 together
  uint2 tables[kDepths];
  int32_t entries[kMaxGroups];         // that any query of a group needs scores of
  int32_t first_tile[kMaxGroups + 1];  // of each group on the line of all tiles
  uint64_t full[kSlots<kForm, kQueries>], empty[kSlots<kForm, kQueries>];
};

// Of a group: its tokens.
struct Group {
  int64_t token;
  int64_t batch;
  int queries;
};

template <int kQueries>
__device__ __forceinline__ Group GroupAt(const ScoreArgs& args, int index) {
  const auto at = static_cast<uint32_t>(args.first_group) + static_cast<uint32_t>(index);
  const auto per_batch = static_cast<uint32_t>(args.groups_per_batch);
  const auto batch = at / per_batch, in_row = (at - batch * per_batch) * kQueries;
  Group group;
  group.batch = batch;
  group.token = batch * args.p.t + in_row;
  const auto left = static_cast<uint32_t>(args.p.t) - in_row;
  group.queries = static_cast<int>(left < kQueries ? left : kQueries);
  return group;
}

// The stretch of a thread block on the line of all tiles.
struct Stretch {
  int first, end;
  int group;  // that holds the first
};

template <int kQueries, typename Shared>
__device__ __forceinline__ Stretch FindStretch(const ScoreArgs& args, Shared& shared) {
  const auto first = static_cast<uint32_t>(args.first_token), t = static_cast<uint32_t>(args.p.t);
  if (kQueries > 1) {
    for (int i = static_cast<int>(threadIdx.x); i < args.groups;
         i += static_cast<int>(blockDim.x)) {
      shared.entries[i] = 0;
    }
    __syncthreads();
  }
  for (uint32_t i = threadIdx.x; i < args.tokens; i += blockDim.x) {
    const uint32_t token = first + i;
    const int entries =
        NeedsScores(args.p, token) ? static_cast<int>(VisibleEntries(args.p, token)) : 0;
    if (kQueries == 1) {
      shared.entries[i] = entries;
    } else {
      const uint32_t batch = token / t;
      const uint32_t group = batch * static_cast<uint32_t>(args.groups_per_batch) +
                             (token - batch * t) / kQueries -
                             static_cast<uint32_t>(args.first_group);
      atomicMax(&shared.entries[group], entries);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int before = 0;
    for (int i = 0; i < args.groups; i += 32) {
      int sum = i + lane < args.groups ? (shared.entries[i + lane] + kTileKeys - 1) / kTileKeys : 0;
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int lower = __shfl_up_sync(~0u, sum, lanes);
        if (lane >= lanes) sum += lower;
      }
      sum += before;
      if (i + lane < args.groups) shared.first_tile[i + lane + 1] = sum;
      before = __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) shared.first_tile[0] = 0;
  }
  __syncthreads();
  const auto tiles = static_cast<uint32_t>(shared.first_tile[args.groups]);
  Stretch stretch;  // kMaxGroups rows of kMaxSlots are 2^22 tiles
  stretch.first = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  stretch.end = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  int low = 0, high = args.groups;  // the last group that begins at or before the first tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (shared.first_tile[middle] <= stretch.first ? low : high) = middle;
  }
  stretch.group = low;
  return stretch;
}

// A lane's 32 channels of a row: 16 bytes of E2M1 or 32 of E4M3.
template <IndexForm kForm>
struct Codes {
  uint4 raw[KeyBytes<kForm>::kCodes / 64];
};

// As E4M3 words, and (on all four lanes of the row) the byte of what ScaleOf has to multiply by.
template <IndexForm kForm>
__device__ __forceinline__ uint32_t Decode(const Codes<kForm>& codes, uint32_t scale,
                                           const uint2* tables, uint32_t (&words)[8]) {
  if constexpr (kForm == IndexForm::kMxfp4) {
    const uint4& raw = codes.raw[0];
    const uint32_t exponent = GroupExponent(raw.x | raw.y | raw.z | raw.w, scale);
    uint32_t largest = max(exponent, __shfl_xor_sync(~0u, exponent, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    const uint2 table = tables[min(largest - exponent, uint32_t{kDepths - 1})];
    CodesOf(raw.x, table.x, table.y, words[0], words[1]);
    CodesOf(raw.y, table.x, table.y, words[2], words[3]);
    CodesOf(raw.z, table.x, table.y, words[4], words[5]);
    CodesOf(raw.w, table.x, table.y, words[6], words[7]);
    return largest;
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[4 * i] = codes.raw[i].x;
      words[4 * i + 1] = codes.raw[i].y;
      words[4 * i + 2] = codes.raw[i].z;
      words[4 * i + 3] = codes.raw[i].w;
    }
    return scale;
  }
}
template <IndexForm kForm>
__device__ __forceinline__ float ScaleOf(uint32_t byte) {
  return kForm == IndexForm::kMxfp4 ? __fmul_rn(DecodeUe8m0(byte), 0x1p-6f) : DecodeUe8m0(byte);
}

// The queries of a group into shared memory, by all warpgroups that multiply. Scales go into the
// weights, and the half that WeightedSum leaves.
template <IndexForm kForm, int kQueries, typename Shared>
__device__ __forceinline__ void LoadQueries(const IndexTopkParams& p, const Group& group,
                                            Shared& shared) {
  constexpr int kPieces = kHeads * 4;  // of a query: a lane's channels of a head
  constexpr int kTurns = (kPieces * kQueries + kConsumers - 1) / kConsumers;
  constexpr int kAtOnce = kTurns < 3 ? kTurns : 3;  // pieces under way
  constexpr int kLoads = sizeof(Codes<kForm>) / 16;
  const int pieces = group.queries * kPieces, c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < kPieces * kQueries;
       first += kAtOnce * kConsumers) {
    Codes<kForm> codes[kAtOnce];
    uint32_t scales[kAtOnce];
    uint32_t weights[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {  // what the last group has no query for: zeros
      const int piece = first + i * kConsumers;
      codes[i] = {};
      scales[i] = 0;
      weights[i] = 0;
      if (piece < pieces) {
        const int64_t row = group.token * kHeads + piece / 4;
        const auto* from = reinterpret_cast<const uint4*>(p.q + row * KeyBytes<kForm>::kCodes);
#pragma unroll
        for (int j = 0; j < kLoads; ++j) codes[i].raw[j] = __ldg(from + c * kLoads + j);
        scales[i] = __ldg(p.q_scale + (kForm == IndexForm::kMxfp4 ? row * 4 + c : row));
        weights[i] = IndexWeightBits(p, row);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = first + i * kConsumers;
      if (piece >= kPieces * kQueries) break;  // all of a warp
      const int query = piece / kPieces, head = piece % kPieces / 4;
      uint32_t words[8];
      const float scale = ScaleOf<kForm>(Decode(codes[i], scales[i], shared.tables, words));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        *reinterpret_cast<uint32_t*>(shared.q[query] + SwizzledAt(head, c, j)) = words[j];
      }
      if (c == 0) {
        shared.weights[query][head % 8 / 2 * kWeightPitch + head / 8 * 2 + head % 2] =
            __fmul_rn(__fmul_rn(IndexWeight(p, weights[i]), scale), 0.5f);
      }
    }
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What the compiler keeps rather than computes again.
__device__ __forceinline__ int Keep(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ void SyncConsumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

// Sums are not read before the wait ahead of this.
__device__ __forceinline__ void Settle(float (&d)[32]) {
#pragma unroll
  for (int i = 0; i < 32; i += 16) {
    asm volatile(""
                 : "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),
                   "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]),
                   "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]),
                   "+f"(d[i + 14]), "+f"(d[i + 15])::"memory");
  }
}

// What all products wait for is there.
__device__ __forceinline__ void Settle(uint32_t (&a)[4][4]) {
  asm volatile(""
               : "+r"(a[0][0]), "+r"(a[0][1]), "+r"(a[0][2]), "+r"(a[0][3]), "+r"(a[1][0]),
                 "+r"(a[1][1]), "+r"(a[1][2]), "+r"(a[1][3]), "+r"(a[2][0]), "+r"(a[2][1]),
                 "+r"(a[2][2]), "+r"(a[2][3]), "+r"(a[3][0]), "+r"(a[3][1]), "+r"(a[3][2]),
                 "+r"(a[3][3])::"memory");
}

// SwizzledRows of an address, in two halves: the upper does not depend on it.
constexpr uint32_t kRowsUpper = 1024 >> 4 | 1u << 30;
__device__ __forceinline__ uint32_t RowsLower(uint32_t address) {
  return (address & 0x3FFFFu) >> 4 | 1u << 16;
}

// `q`: RowsLower of a query.
__device__ __forceinline__ void Multiply(float (&d)[32], const uint32_t (&a)[4][4], uint32_t q) {
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kChannels / 32; ++step) {
    const uint64_t rows = uint64_t{kRowsUpper} << 32 | (q + step * (32 >> 4));
    Wgmma<64, true>::Run(d, a[step], rows, step > 0);
  }
  WgmmaCommit();
}

// 2 relu(x), NaN kept, without the half-rate pipe that compares.
__device__ __forceinline__ float TwiceRelu(float x) { return __fadd_rn(x, fabsf(x)); }

// Over a lane's 16 heads, of its two keys. Columns 8 j + 2 c and the next are those of weights 2 j
// and the next.
struct Weights {
  float4 each[4];
};
__device__ __forceinline__ Weights LoadWeights(const float* weights) {
  const auto* from = reinterpret_cast<const float4*>(weights);
  return {from[0], from[1], from[2], from[3]};
}
__device__ __forceinline__ float2 WeightedSum(const float (&d)[32], const Weights& weights) {
  float sum[2][2] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float4& w = weights.each[j];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r][0] = __fmaf_rn(w.x, TwiceRelu(d[8 * j + 2 * r]), sum[r][0]);
      sum[r][0] = __fmaf_rn(w.y, TwiceRelu(d[8 * j + 2 * r + 1]), sum[r][0]);
      sum[r][1] = __fmaf_rn(w.z, TwiceRelu(d[8 * j + 4 + 2 * r]), sum[r][1]);
      sum[r][1] = __fmaf_rn(w.w, TwiceRelu(d[8 * j + 4 + 2 * r + 1]), sum[r][1]);
    }
  }
  return make_float2(__fadd_rn(sum[0][0], sum[0][1]), __fadd_rn(sum[1][0], sum[1][1]));
}

// Lanes c and c ^ kLanes trade: who has bit kLanes of c set keeps `second`, the other `first`.
template <int kLanes>
__device__ __forceinline__ float Trade(float first, float second, int c) {
  const bool upper = (c & kLanes) != 0;
  const float other = __shfl_xor_sync(~0u, upper ? first : second, kLanes);
  return __fadd_rn(upper ? second : first, other);
}

// ScoreOrder in fewer instructions, and 1 for NaN: the choice keeps 0 for what is no entry.
__device__ __forceinline__ uint32_t FastOrder(float score) {
  const float x = __fadd_rn(score, 0.0f);  // -0 becomes 0
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
  return x != x ? kNanOrder : bits ^ (sign | 0x80000000u);
}

// The largest order of each group of keys, of all queries of a tile. A warp has two groups, one of
// each half: keys are in 16 lanes whose numbers differ in bits 0, 2, 3 and 4. Two queries' orders
// become one as lanes that differ in the next bit trade, like sums.
template <int kQueries>
struct Largest {
  static constexpr int kLevels = kQueries == 16 ? 4 : kQueries == 8 ? 3 : kQueries == 2 ? 1 : 0;
  static_assert(kQueries == 1 << kLevels);
  uint32_t held[kLevels + 1];

  __device__ static constexpr int Lanes(int level) { return level == 0 ? 1 : 2 << level; }

  // Query `i`, one after another.
  __device__ __forceinline__ void Add(int i, uint32_t order, int lane) {
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      if ((i >> level & 1) == 0) {
        held[level] = order;
        return;
      }
      const bool upper = (lane & Lanes(level)) != 0;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? held[level] : order, Lanes(level));
      order = max(upper ? order : held[level], other);
    }
#pragma unroll
    for (int level = kLevels; level < 4; ++level) {
      order = max(order, __shfl_xor_sync(~0u, order, Lanes(level)));
    }
    held[kLevels] = order;
  }
  // After the last query: the order that a lane has, of which query, and whether others have not.
  __device__ __forceinline__ uint32_t Get() const { return held[kLevels]; }
  __device__ static __forceinline__ int QueryOf(int lane) {
    return ((lane & 1) | lane / 4 * 2) % kQueries;
  }
  __device__ static __forceinline__ bool Stores(int lane) {
    return ((lane & 1) | lane / 4 * 2) < kQueries;
  }
};

template <IndexForm kForm, int kQueries, typename Shared>
__device__ __forceinline__ void Copy(const ScoreArgs& args, Shared& shared,
                                     const Stretch& stretch) {
  constexpr int kCodes = KeyBytes<kForm>::kCodes, kScales = KeyBytes<kForm>::kScales;
  int slot = 0, position = stretch.first;
  uint32_t phase = 1;  // the ring begins empty
  for (int g = stretch.group; position < stretch.end; ++g) {
    const int64_t row = GroupAt<kQueries>(args, g).batch * args.p.slots;
    const int begin = shared.first_tile[g], end = min(shared.first_tile[g + 1], stretch.end);
#pragma unroll 1
    for (; position < end; ++position) {
      const int64_t key = int64_t{position - begin} * kTileKeys, left = args.p.slots - key;
      const int keys = left < kTileKeys ? static_cast<int>(left) : kTileKeys;
      const uint32_t full = SharedAddress(shared.full + slot);
      Wait(SharedAddress(shared.empty + slot), phase);
      ArriveExpecting(full, static_cast<uint32_t>(keys * (kCodes + kScales)));
      CopyBytes(SharedAddress(shared.slots[slot].codes), args.p.key + (row + key) * kCodes,
                static_cast<uint32_t>(keys * kCodes), full);
      CopyBytes(SharedAddress(shared.slots[slot].scales), args.p.key_scale + (row + key) * kScales,
                static_cast<uint32_t>(keys * kScales), full);
      if (++slot == kSlots<kForm, kQueries>) {
        slot = 0;
        phase ^= 1;
      }
    }
  }
}

// A query with both halves of a tile: products of both are being made. kMore: begins those of the
// next query as soon as there is room. Lanes 0 and 1 of four get scores of the first half, of row
// and row + 8, 2 and 3 of the second.
template <bool kMore>
__device__ __forceinline__ float ScoreQuery(float (&first)[32], float (&second)[32],
                                            const uint32_t (&a)[2][4][4], uint32_t next,
                                            const float* weights, int c) {
  const Weights w = LoadWeights(weights);
  WgmmaWait<1>();
  Settle(first);
  const float2 x = WeightedSum(first, w);
  if constexpr (kMore) {
    Multiply(first, a[0], next);
    WgmmaWait<1>();
  } else {
    WgmmaWait<0>();
  }
  Settle(second);
  const float2 y = WeightedSum(second, w);
  if constexpr (kMore) Multiply(second, a[1], next);
  return Trade<2>(Trade<1>(x.x, x.y, c), Trade<1>(y.x, y.y, c), c);
}

template <IndexForm kForm, int kQueries, bool kLargest, typename Shared>
__device__ __forceinline__ void Score(const ScoreArgs& args, Shared& shared,
                                      const Stretch& stretch) {
  constexpr int kCodes = KeyBytes<kForm>::kCodes, kScales = KeyBytes<kForm>::kScales;
  const int lane = Keep(static_cast<int>(threadIdx.x) % 32), c = Keep(lane % 4);
  const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;  // and row + 8
  const int codes_at = Keep(row * kCodes + c * (kCodes / 4));
  const int scale_at = Keep(kForm == IndexForm::kMxfp4 ? row * 4 + c : row);
  const int stored_at = Keep(row + 8 * (c & 1) + kHalfKeys * (c / 2));
  const float* const weights = shared.weights[0] + Keep(c * kWeightPitch);
  const uint32_t q = RowsLower(SharedAddress(shared.q));
  const int group_key =
      Keep(static_cast<int>(threadIdx.x) % 128 / 32 * kIndexTopkGroup + kHalfKeys * (c / 2));
  int slot = static_cast<int>(threadIdx.x) / 128, mine = stretch.first + slot;
  uint32_t phase = 0;
  for (int g = stretch.group, position = stretch.first; position < stretch.end; ++g) {
    const int begin = shared.first_tile[g], end = min(shared.first_tile[g + 1], stretch.end);
    if (begin == shared.first_tile[g + 1]) continue;
    const Group group = GroupAt<kQueries>(args, g);
    const int entries = shared.entries[g];
    SyncConsumers();  // products of the group before are done
    LoadQueries<kForm, kQueries>(args.p, group, shared);
    SyncConsumers();
    uint32_t* const order =
        args.order + (group.token - args.first_token) * args.p.slots + stored_at;
    const int query = Largest<kQueries>::QueryOf(lane);  // whose groups' largest this lane stores
    uint32_t* const largest =
        args.largest + (group.token - args.first_token + query) * IndexTopkGroups(args.p.slots);
    const int largest_entries =
        Largest<kQueries>::Stores(lane) && query < group.queries ? entries : 0;
    position = end;
    for (; mine < end; mine += kWarpgroups) {
      const Slot<kForm>& tile = shared.slots[slot];
      Wait(SharedAddress(shared.full + slot), phase);
      uint32_t a[2][4][4];
      uint32_t scale[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[2][8];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int below = half * kHalfKeys + 8 * r;
          const auto codes =
              *reinterpret_cast<const Codes<kForm>*>(tile.codes + codes_at + below * kCodes);
          const uint32_t byte = tile.scales[scale_at + below * kScales];
          scale[half][r] = Decode(codes, byte, shared.tables, words[r]);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) a[half][i / 4][i % 4] = words[i % 2][i / 4 * 2 + i % 4 / 2];
        Settle(a[half]);
      }
      const int key = (mine - begin) * kTileKeys;
      const int queries = key + stored_at < entries ? group.queries : 0;
      const float by = ScaleOf<kForm>(c & 2 ? (c & 1 ? scale[1][1] : scale[1][0])
                                            : (c & 1 ? scale[0][1] : scale[0][0]));
      uint32_t* to = order + key;
      float first[32], second[32];
      Largest<kQueries> of_groups;
      Multiply(first, a[0], q);
      Multiply(second, a[1], q);
      // Not sooner: what is loaded is there when products of it have begun.
      __syncwarp();
      if (lane == 0) Arrive(SharedAddress(shared.empty + slot));
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const uint32_t next = q + (i + 1) * kQueryRows;
        const float* const w = weights + i * kQueryWeights;
        const float sum = i + 1 < kQueries ? ScoreQuery<true>(first, second, a, next, w, c)
                                           : ScoreQuery<false>(first, second, a, next, w, c);
        const uint32_t stored = i < queries ? FastOrder(__fmul_rn(sum, by)) : 0;
        if (i < queries) *to = stored;
        if constexpr (kLargest) of_groups.Add(i, stored, lane);
        to += args.p.slots;
      }
      if constexpr (kLargest) {
        if (key + group_key < largest_entries) {
          largest[(key + group_key) / kIndexTopkGroup] = of_groups.Get();
        }
      }
      slot += kWarpgroups;
      if (slot >= kSlots<kForm, kQueries>) {
        slot -= kSlots<kForm, kQueries>;
        phase ^= 1;
      }
    }
  }
}

template <IndexForm kForm, int kQueries, bool kLargest>
__global__ void __launch_bounds__(kThreads, 1)
    IndexScoresSm90Kernel(const __grid_constant__ ScoreArgs args) {
  using Shared = ScoreShared<kForm, kQueries>;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle's pattern
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x < (kSlots<kForm, kQueries>)) {
    InitBarrier(SharedAddress(shared.full + threadIdx.x), 1);
    InitBarrier(SharedAddress(shared.empty + threadIdx.x), 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (threadIdx.x >= kThreads - kDepths) {
    const int d = static_cast<int>(threadIdx.x) - (kThreads - kDepths);
    shared.tables[d] = make_uint2(CodeTable(d, 0), CodeTable(d, 1));
  }
  WaitForPrevious();
  LetNextBegin();                                               // which then finds counts there
  const Stretch stretch = FindStretch<kQueries>(args, shared);  // and a barrier for all
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == kConsumers) Copy<kForm, kQueries>(args, shared, stretch);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
    Score<kForm, kQueries, kLargest>(args, shared, stretch);
  }
}

}  // namespace index_topk
}  // namespace dsv4
