// Attention on Hopper. A thread block holds 64 heads of one query and takes its keys by blocks of
// 64. Kinds of warps pass work on through barriers in shared memory:
//
//   Find ----> Decode ----> Publish ----> Score ----> Sum
//
// Find looks up where keys are. Decode gathers them and stores them as BF16, two chunks of 64
// channels a step, with room for two blocks; Publish makes that visible to tensor cores. Score
// multiplies keys with the queries and passes e on as MMA fragments; two warpgroups Sum half of the
// value channels each, and return chunks when their products are done (Score's are older).
//
// Many queries: thread blocks persist and take (token, tile of heads) in turn, all keys of it; two
// tiles of a token are a pair's, each of whose thread blocks decodes half of the keys for both. The
// copy engine brings queries and takes output away, which is left where the last keys were, so that
// the sums of the next item need not wait for it.
// Few: a cluster shares the keys of one, in proportion, and adds its sums through distributed
// shared memory, in the order of its ranks; value channels may be shared out too, which changes no
// bit.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "attention/attention_decoder.cuh"
#include "attention/attention_scores.cuh"
#include "attention/attention_sums.cuh"
#include "common/tensor_map.h"

namespace dsv4 {
namespace {

using namespace attention;

template <Mode kMode, int kParts>
__global__ void __launch_bounds__(Kinds<kMode, kParts>::kThreads, 1)
    AttentionSm90Kernel(const __grid_constant__ ArgsOf<kMode> args) {
  using Kind = Kinds<kMode, kParts>;
  constexpr bool kSending = kSend<kMode, kParts>;
  extern __shared__ __align__(1024) char raw[];  // the swizzle's pattern
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPairs; ++i) {
      InitBarrier(SharedAddress(shared.stored + i), Kind::kDecoders / 32);
      InitBarrier(SharedAddress(shared.full + i), 1);
      InitBarrier(SharedAddress(shared.empty + i), kMode == Mode::kPair ? 16 : 8);
    }
    InitBarrier(SharedAddress(&shared.weights_full), 128);
    InitBarrier(SharedAddress(&shared.weights_empty), 256);
    for (int i = 0; i < 2; ++i) {
      InitBarrier(SharedAddress(shared.found + i), kKeys);
      InitBarrier(SharedAddress(shared.scaled + i), kKeys);
      InitBarrier(SharedAddress(shared.taken + i), Kind::kDecoders);
    }
    InitBarrier(SharedAddress(&shared.last_full), 128 + 32);
    InitBarrier(SharedAddress(&shared.last_empty), 256);
    InitBarrier(SharedAddress(&shared.products_done),
                kMode == Mode::kPair ? 16 : 256 + Kind::kDecoders);
    InitBarrier(SharedAddress(&shared.queries_full), 1);
    InitBarrier(SharedAddress(&shared.queries_empty), 128);
    InitBarrier(SharedAddress(&shared.out_full), 256);
    InitBarrier(SharedAddress(&shared.sums_full), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (kMode == Mode::kPair) {
    SyncClusterRelaxed();
  } else {
    __syncthreads();
  }
  Place place;
  place.first = blockIdx.x;
  place.step = gridDim.x;
  if constexpr (kMode == Mode::kPair) place.rank = static_cast<int>(blockIdx.x % 2);
  if constexpr (kMode == Mode::kSplit) {
    place.rank = static_cast<int>(blockIdx.x % args.splits);
    place.part = static_cast<int>(blockIdx.x / args.splits % kParts);
    place.first = blockIdx.x / (args.splits * kParts);
    place.step = args.items;  // one item
  }
  LetNextBegin();
  WaitForPrevious();
  const int role = threadIdx.x / 128;
  if (role == 3 + Kind::kDecoders / 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Kind::kHelperRegisters));
    const int warp = threadIdx.x % 128 / 32;
    if (warp < kKeys / 32) {
      Find<kMode>(args, shared, place);
    } else if (warp == kKeys / 32) {
      Rotate<kMode>(args, shared, place);
    } else if (threadIdx.x % 32 == 0) {
      Publish<kMode>(shared, place);
    }
  } else if (role >= 3) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Kind::kDecoderRegisters));
    if (kMode == Mode::kSplit) PrefetchIds(args, place.first / args.tiles);
    Decoder<kMode, Kind::kDecoders>(shared, place).Run(shared, place);
    if (kMode == Mode::kSplit) Arrive(SharedAddress(&shared.products_done));
  } else if (role == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Kind::kScoreRegisters));
    Score<kMode, kSending>(args, shared, place);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Kind::kSumRegisters));
    Sum<kMode, kParts>(args, shared, place, role - 1);
  }
  if constexpr (kMode == Mode::kSplit) {
    // Where Sum does, when products are made.
    __syncwarp();
    if (role >= 3 || (role == 0 && !kSending)) kSending ? SyncClusterRelaxed() : SyncCluster();
  }
  if constexpr (kMode != Mode::kAlone && !kSending) {
    __syncwarp();
    // Others reach into this one's memory until here.
    if constexpr (kMode == Mode::kPair) {
      SyncCluster();
    } else {
      SyncClusterRelaxed();
    }
  }
}

// Few tokens: as many as a split serves faster.
constexpr int64_t kDecodeTokens = 16;

bool Splits(const AttentionParams& params) {
  if (params.regime == Regime::kAuto) return params.b * params.t <= kDecodeTokens;
  return params.regime != Regime::kPrefill;
}

int64_t MostKeys(const AttentionParams& params) {
  return params.window + (params.topk_idx != nullptr ? params.topk : params.pool.slots);
}

// Thread blocks that share the keys: of the shape alone, so that a row's sums are. On an H200 nine
// clusters of 9 run at a time and seventeen of 6, so that eight tokens do; seven of 10 to 16.
int SplitsOf(const AttentionParams& params) {
  const int64_t blocks = std::max<int64_t>(1, (MostKeys(params) + kKeys - 1) / kKeys);
  const int64_t most = blocks > 64 ? 16 : params.h > kHeads && blocks <= 24 ? 6 : 9;
  const int64_t each = (blocks + most - 1) / most;
  return static_cast<int>((blocks + each - 1) / each);
}

// For the current device.
template <Mode kMode, int kParts>
cudaError_t Prepare() {
  const auto kernel = AttentionSm90Kernel<kMode, kParts>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess || kMode != Mode::kSplit) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Clusters of a size that run at a time.
int ClustersAtOnce(int size) {
  static std::atomic<int> known[kMaxSplits + 1];
  if (known[size] > 0) return known[size];
  int count = 0;
  if (Prepare<Mode::kSplit, 1>() != cudaSuccess ||
      MostClusters(AttentionSm90Kernel<Mode::kSplit, 1>, Kinds<Mode::kSplit, 1>::kThreads,
                   kSharedBytes, size, count) != cudaSuccess) {
    cudaGetLastError();
    count = 0;
  }
  count = std::max(count, 1);
  known[size] = count;
  return count;
}

template <Mode kMode, int kParts>
cudaError_t Launch(const ArgsOf<kMode>& args, cudaStream_t stream) {
  const cudaError_t ready = Prepare<kMode, kParts>();
  if (ready != cudaSuccess) return ready;
  const int cluster = kMode == Mode::kSplit ? args.splits : kMode == Mode::kPair ? 2 : 1;
  const int blocks = kMode == Mode::kSplit
                         ? args.items * kParts * args.splits
                         : std::min(args.items, Multiprocessors() / cluster * cluster);
  return LaunchDependent(AttentionSm90Kernel<kMode, kParts>, dim3(static_cast<unsigned>(blocks)),
                         Kinds<kMode, kParts>::kThreads, kSharedBytes, stream, args, cluster);
}

bool Fits(const KeyRows& rows, int64_t b) {
  if (rows.slots == 0) return true;
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(rows.nope) | reinterpret_cast<uintptr_t>(rows.rope);
  const int64_t widest = std::max({rows.stride_nope, rows.stride_scale, 2 * rows.stride_rope});
  return addresses % 16 == 0 && rows.stride_nope % 16 == 0 && rows.stride_rope % 8 == 0 &&
         widest <= INT32_MAX && rows.slots <= INT32_MAX / 2 && b * rows.slots <= INT32_MAX;
}

// Of q or o: [tokens, heads, channels].
bool MakeHeadsMap(CUtensorMap& map, const void* data, const AttentionParams& params,
                  int64_t stride) {
  const cuuint64_t sizes[3] = {kChannels, static_cast<cuuint64_t>(params.h),
                               static_cast<cuuint64_t>(params.b * params.t)};
  const cuuint64_t pitches[2] = {kChannels * 2, static_cast<cuuint64_t>(stride * 2)};
  const cuuint32_t box[3] = {kChunk, kHeads, 1}, steps[3] = {1, 1, 1};
  return TensorMapEncoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data),
                            sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                            CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

Rows Compact(const KeyRows& rows) {
  return {rows.nope,
          rows.scale,
          reinterpret_cast<const uint8_t*>(rows.rope),
          static_cast<uint32_t>(rows.slots),
          static_cast<uint32_t>(rows.stride_nope),
          static_cast<uint32_t>(rows.stride_scale),
          static_cast<uint32_t>(2 * rows.stride_rope)};
}

}  // namespace

bool AttentionSm90Takes(const AttentionParams& params) {
  const int64_t tokens = params.b * params.t, tiles = (params.h + kHeads - 1) / kHeads;
  const int64_t most = INT32_MAX / 64;
  return params.nope == kNope && params.rope == kRope && params.h >= 1 &&
         Fits(params.ring, params.b) && Fits(params.chunk, params.b) &&
         Fits(params.pool, params.b) &&
         (params.ring.slots == 0 || params.ring.slots + 1 >= params.window) &&
         reinterpret_cast<uintptr_t>(params.q) % 16 == 0 && params.stride_q % kChannels == 0 &&
         reinterpret_cast<uintptr_t>(params.o) % 16 == 0 && params.stride_o % kChannels == 0 &&
         TensorMapEncoder() != nullptr && tokens * tiles <= most &&
         params.window <= INT32_MAX / 2 && params.topk <= INT32_MAX / 2;
}

cudaError_t AttentionSm90(const AttentionParams& params, cudaStream_t stream) {
  if (params.b * params.t == 0) return cudaSuccess;
  PersistentArgs args = {};
  args.p = params;
  args.rows[0] = Compact(params.ring);
  args.rows[1] = Compact(params.chunk);
  args.rows[2] = Compact(params.pool);
  args.tiles = static_cast<int>((params.h + kHeads - 1) / kHeads);
  args.items = static_cast<int>(params.b * params.t) * args.tiles;
  args.scale = static_cast<float>(1.4426950408889634 / 22.627416997969522);
  args.splits = Splits(params) ? SplitsOf(params) : 1;
  if (args.splits == 1) {
    if (!MakeHeadsMap(args.q, params.q, params, params.stride_q) ||
        !MakeHeadsMap(args.out, params.o, params, params.stride_o)) {
      return cudaErrorInvalidValue;
    }
    return args.tiles % 2 == 0 ? Launch<Mode::kPair, 1>(args, stream)
                               : Launch<Mode::kAlone, 1>(args, stream);
  }
  const int at_once = ClustersAtOnce(args.splits);
  if (args.items * 4 <= at_once) return Launch<Mode::kSplit, 4>(args, stream);
  if (args.items * 2 <= at_once) return Launch<Mode::kSplit, 2>(args, stream);
  return Launch<Mode::kSplit, 1>(args, stream);
}

}  // namespace dsv4
