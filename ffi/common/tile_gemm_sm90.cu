// A thread block multiplies 64 to 256 rows of weights by one tile of columns.
//
// Weights are the rows of the MMA (M), tokens its columns (N), so that a few tokens waste nothing.
// A warp keeps a ring of stages full: 128 bytes of every row by the tensor copy engine, scales, and
// the tile's x, already laid out, or of few tokens as other warps lay it out. One to three
// warpgroups decode weights in registers, some while the tensor cores work on others; E4M3 ones
// times E4M3 are read where they lie. Where weights have few rows, a cluster of thread blocks
// shares their inputs, and adds its sums in the end. Sums are in order of the inputs whatever the
// tile's width, so that a column is the same bits in any tile.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/tensor_map.h"
#include "common/tile_bf16.cuh"
#include "common/tile_fp8.cuh"
#include "common/tile_gemm.h"
#include "common/tile_many.cuh"
#include "common/tile_raw.cuh"

namespace dsv4 {
namespace {

using namespace tile;

template <bool kMany>
constexpr int kThreads = kMany ? 3 * 128 : 2 * 128 + 32;
// Of an SM: as many as have registers.
template <bool kFp8Mma, bool kMany>
constexpr int kThreadBlocks = kMany     ? 1
                              : kFp8Mma ? 3
                                        : 2;

// Calls multiply(columns) of a tile of many.
template <typename F>
__device__ __forceinline__ void WithColumns(int width, const F& multiply) {
  if (width <= 64) {
    multiply(std::integral_constant<int, 64>());
  } else if (width <= 80) {
    multiply(std::integral_constant<int, 80>());
  } else if (width <= 96) {
    multiply(std::integral_constant<int, 96>());
  } else if (width <= 112) {
    multiply(std::integral_constant<int, 112>());
  } else {
    multiply(std::integral_constant<int, 128>());
  }
}

// The same of a ManyWidth.
template <typename F>
__device__ __forceinline__ void WithManyColumns(int width, const F& multiply) {
  if (width == 88) {
    multiply(std::integral_constant<int, 88>());
  } else if (width == 104) {
    multiply(std::integral_constant<int, 104>());
  } else {
    WithColumns(width, multiply);
  }
}

template <WeightForm kForm, bool kFp8Mma, bool kMany, typename A>
__global__ void __launch_bounds__(kThreads<kMany>, kThreadBlocks<kFp8Mma, kMany>)
    TileGemmKernel(const __grid_constant__ A args) {
  constexpr int kMultiplying = Stage<kForm, kFp8Mma, kMany, A>::kMultiplying;
  extern __shared__ char raw[];
  __shared__ uint64_t barriers[2 * kMaxSlots];  // full, then empty
  __shared__ uint2 tables[kTables];
  Unit unit = {{}, blockIdx.y, blockIdx.x >> args.cluster_log, 0};
  args.FindPart(unit);
  // The table of tiles is older than the kernel just ahead, or that kernel's.
  if (args.tiles != nullptr && args.new_tiles) WaitForPrevious();
  if (!FindTile(args.OutputOf(unit), args.tiles, args.tile_count, unit.index, unit.tile)) return;
  char* const shared = raw + (1024 - (SharedAddress(raw) & 1023)) % 1024;  // the swizzle's pattern
  if (kFp8Mma && threadIdx.x < kTables) tables[threadIdx.x] = Magnitudes(threadIdx.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxSlots; ++i) {
      InitBarrier(SharedAddress(barriers + i), 1);
      InitBarrier(SharedAddress(barriers + kMaxSlots + i), kMultiplying);
    }
    FenceBarrierInit();
  }
  __syncthreads();

  Feed<kForm, kFp8Mma, kMany, A> feed(args, unit, shared, SharedAddress(barriers));
  // Of many, the copying warp is one of a warpgroup that hands its registers to the others.
  if (threadIdx.x >= kMultiplying) {
    if constexpr (kMany) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    }
    if (threadIdx.x == kMultiplying) feed.FillAll();
    return;
  }
  if constexpr (kMany) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  } else {
    // Let the next begin only when the table of tiles is done: it may read it at once.
    WaitForPrevious();
  }
  LetNextBegin();
  const auto multiply = [&](auto columns) {
    constexpr int kN = decltype(columns)::value;
    if constexpr (kFp8Mma) {
      MultiplyFp8<kForm, kMany, kN>(args, feed, tables, unit);
    } else {
      Multiply<kForm, kMany, kN>(args, feed, unit);
    }
  };
  const int width = unit.tile.width;
  if constexpr (kMany) {
    WithColumns(width, multiply);
  } else {
    if (width <= 8) {
      multiply(std::integral_constant<int, 8>());
    } else if (width <= 16) {
      multiply(std::integral_constant<int, 16>());
    } else {
      multiply(std::integral_constant<int, 32>());
    }
  }
}

// The same of many tiles a thread block (tile_many.cuh).
constexpr int kManyThreads = 128 * ManyArgs::kWarpgroups + 128;

__global__ void __launch_bounds__(kManyThreads, 1)
    ManyGemmKernel(const __grid_constant__ ManyArgs args) {
  constexpr int kMultiplying = ManyLayout::kMultiplying;
  extern __shared__ char raw[];
  __shared__ uint64_t barriers[2 * kMaxSlots];  // full, then empty
  __shared__ uint2 table_of[kManyTables];
  // The swizzle's pattern. Addresses with a zero that the compiler does not know are not looked up
  // anew for every stage.
  char* const shared = raw + (1024 - (SharedAddress(raw) & 1023)) % 1024 + args.nothing;
  const uint2* const tables = table_of + args.nothing;
  if (threadIdx.x < kManyTables) table_of[threadIdx.x] = ManyTable(threadIdx.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxSlots; ++i) {
      InitBarrier(SharedAddress(barriers + i), 1);
      InitBarrier(SharedAddress(barriers + kMaxSlots + i), kMultiplying);
    }
    FenceBarrierInit();
  }
  if (args.tiles != nullptr && args.new_tiles) WaitForPrevious();  // see TileGemmKernel
  __syncthreads();

  Unit unit = {};
  ManyUnits units;
  ManyFeed feed(args, unit, shared, SharedAddress(barriers) + args.nothing);
  if (threadIdx.x >= kMultiplying) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x != kMultiplying) return;
    if (!units.Next(args, unit)) return;
    feed.FillAll();
    while (units.Next(args, unit)) {
      feed.Restart();
      feed.FillRest(0);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  LetNextBegin();
  ManyPlaces& places =
      reinterpret_cast<ManyPlaces*>(shared + args.slots * feed.stage_bytes)[threadIdx.x / 32];
  const ManyLane lane;
  const auto multiply = [&](auto columns) {
    constexpr int kN = decltype(columns)::value;
    float sum[kN / 2] = {};
    MultiplyMany<kN>(feed, tables, lane, sum);
    StoreMany<kN>(args, unit, sum, places);
  };
  WaitForPrevious();  // for weights of columns
  for (; units.Next(args, unit); feed.Restart()) {
    FetchWeights(args.OutputOf(unit), unit.tile, places);
    WithManyColumns(unit.tile.width, multiply);
  }
}

// The same for few tokens whose x three more warps lay out.
template <typename A>
constexpr int kRawThreads = 128 * A::kWarpgroups + 32 + 32 * kRawWarps;
template <typename A>
constexpr int kRawBlocks = A::kWarpgroups == 1 ? 3 : 2;

template <WeightForm kForm, bool kFp8Mma, Input kInput, typename A>
__global__ void __launch_bounds__(kRawThreads<A>, kRawBlocks<A>)
    RawGemmKernel(const __grid_constant__ A args) {
  constexpr int kMultiplying = 128 * A::kWarpgroups;
  extern __shared__ char raw[];
  __shared__ uint64_t barriers[3 * kMaxSlots];  // full, then empty, then landed
  __shared__ uint2 tables[kTables];
  __shared__ float x_scale[kRawWidth];
  __shared__ RawLargest<kMultiplying> largest;
  __shared__ Meeting meeting;
  Unit unit = {{}, blockIdx.y, blockIdx.x >> args.cluster_log, 0};
  args.FindPart(unit);
  if (args.picks.expert != nullptr) {
    unit.tile = {0, static_cast<int32_t>(unit.index), kRawWidth, 1};
  } else {
    FindTile(args.OutputOf(unit), nullptr, nullptr, unit.index, unit.tile);
  }
  if (kForm == WeightForm::kNvfp4 && args.act == ActForm::kNvfp4) unit.x_scale = x_scale;
  char* const shared = raw + (1024 - (SharedAddress(raw) & 1023)) % 1024;  // the swizzle's pattern
  if (kFp8Mma && threadIdx.x < kTables) tables[threadIdx.x] = Magnitudes(threadIdx.x);
  if (threadIdx.x == 0) {
    const int arrivals = RawArrivals(unit.tile.count, kRawAtOnce<kForm>);
    for (int i = 0; i < kMaxSlots; ++i) {
      InitBarrier(SharedAddress(barriers + i), arrivals);
      InitBarrier(SharedAddress(barriers + kMaxSlots + i), kMultiplying);
      InitBarrier(SharedAddress(barriers + 2 * kMaxSlots + i), 1);
    }
    if (args.cluster_log > 0) meeting.Init(args, unit);
    FenceBarrierInit();
  }
  // The kernel ahead is any, and may have written what is read here, weights and picks included.
  if (!args.weights_first) WaitForPrevious();
  if (args.picks.expert != nullptr) {
    unit.tile.group = ExpertOf(args.picks, unit.index);
    if (unit.tile.group < 0) return;
  }
  unit.meeting = &meeting;
  __syncthreads();
  if (args.cluster_log > 0) ArriveAtCluster();

  Feed<kForm, kFp8Mma, false, A> feed(args, unit, shared, SharedAddress(barriers));
  if (threadIdx.x >= kMultiplying) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");  // who round need few registers
    const int warp = static_cast<int>(threadIdx.x - kMultiplying) / 32 - 1;
    if (warp >= 0) {
      LayOutRaw<kForm, kFp8Mma, kInput>(args, feed, unit, warp, x_scale, largest);
    } else if (threadIdx.x == kMultiplying) {
      feed.FillWeights();
    }
    __syncwarp();
    if (args.cluster_log > 0) {
      WaitForCluster();
      if (threadIdx.x == kMultiplying) LetOthersSend(args, feed, unit, meeting);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(A::kWarpgroups == 1 ? 96 : 88));
  LetNextBegin();
  if constexpr (kForm == WeightForm::kNvfp4) {
    if (args.act == ActForm::kNvfp4 && args.act_scale == nullptr) {
      FindLargest<kInput, kMultiplying>(args, unit, largest);
    }
  }
  if constexpr (kFp8Mma) {
    MultiplyFp8<kForm, false, kRawWidth>(args, feed, tables, unit);
  } else {
    Multiply<kForm, false, kRawWidth>(args, feed, unit);
  }
}

constexpr int kThirdBytes = 74 << 10;  // three thread blocks share an SM
constexpr int kHalfBytes = 112 << 10;  // two do
constexpr int kAllBytes = 224 << 10;   // one has it
// More than two on each of 132 SMs. Clusters fit less well.
constexpr int kThreeFrom = 265, kThreeFromOfClusters = 199;
// Thread blocks that some of 132 SMs have one of and others two; slim ones are twice as many.
constexpr int kSlimFrom = 132, kSlimTo = 198;
constexpr int kSlimSlots = 4;  // of theirs: the linears beside them want some of the shared memory

// Slots of `stage` bytes for a kernel of which up to `most` thread blocks share an SM.
int SlotsOf(int stage, int64_t grid_blocks, int cluster, int most) {
  const bool three = most >= 3 && grid_blocks >= (cluster > 1 ? kThreeFromOfClusters : kThreeFrom);
  const int budget = three && 3 * stage + 1024 <= kThirdBytes ? kThirdBytes
                     : 3 * stage + 1024 <= kHalfBytes         ? kHalfBytes
                                                              : kAllBytes;
  return std::min(kMaxSlots, (budget - 1024) / stage);
}

// Thread blocks of 128 rows, or of 64 of a pair, with as many tiles as there may be.
int64_t GridBlocks(const TileGemm* gemms, int count) {
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += TileGemmRowBlocks(gemms[i]) / gemms[i].groups;
  return blocks * TileGemmSplit(gemms[0]) * gemms[0].max_tiles;
}

// Weights of one half, and the scales that are copied with them.
template <WeightForm kForm>
bool MapWeights(CUtensorMap& weight_map, CUtensorMap& scale_map, const void* weight,
                const uint8_t* scale, int64_t rows, int64_t inputs, int box_rows) {
  const int64_t row_bytes = inputs / Weights<kForm>::kPieceInputs * kPieceBytes;
  if (!MakeMap(weight_map, weight, rows, row_bytes, kRowBytes, box_rows,
               CU_TENSOR_MAP_SWIZZLE_128B)) {
    return false;
  }
  if constexpr (!kFourBits<kForm>) return true;
  const int64_t per_row = inputs / (kForm == WeightForm::kNvfp4 ? 16 : 32);
  return MakeMap(scale_map, scale, rows, per_row, kScaleBytes, box_rows,
                 CU_TENSOR_MAP_SWIZZLE_NONE);
}

// What the products and their kernel's thread blocks, of `rows` in each half, are; how many of them
// share nothing.
template <WeightForm kForm, bool kSeveral>
bool FillParts(Parts<kSeveral>& args, const TileGemm* gemms, int count, int rows, int64_t& blocks) {
  const TileGemm& gemm = gemms[0];
  const bool pair = gemm.store == Store::kSwiglu;
  const int64_t block_rows = rows * (pair ? 1 : 2);
  args.n_parts = count;
  args.inputs = gemm.inputs;
  args.scale_columns = (gemm.inputs + 127) / 128;
  blocks = 0;
  for (int i = 0; i < count; ++i) {
    const TileGemm& one = gemms[i];
    Part& part = args.parts[i];
    part.fp8_scale = one.scale[0];
    part.first_block = static_cast<unsigned>(blocks);
    part.out = Output(one);
    if (!MapWeights<kForm>(part.weight, part.scale, one.weight[0], one.scale[0],
                           one.groups * one.rows, one.inputs, rows)) {
      return false;
    }
    blocks += (one.rows + block_rows - 1) / block_rows;
  }
  while (1 << args.cluster_log < TileGemmSplit(gemm)) ++args.cluster_log;
  Part& other = args.parts[1];
  return !pair || MapWeights<kForm>(other.weight, other.scale, gemm.weight[1], gemm.scale[1],
                                    gemm.groups * gemm.rows, gemm.inputs, rows);
}

template <WeightForm kForm, bool kFp8Mma, bool kMany, typename A>
cudaError_t Launch(const TileGemm* gemms, int count, cudaStream_t stream) {
  using Layout = Stage<kForm, kFp8Mma, kMany, A>;
  static_assert(sizeof(A) <= 4096);
  const TileGemm& gemm = gemms[0];
  A args = {};
  int64_t blocks;
  if (!FillParts<kForm>(args, gemms, count, Layout::kRows, blocks)) return cudaErrorInvalidValue;
  args.x = gemm.x;
  args.tiles = gemm.tiles;
  args.tile_count = gemm.tile_count;
  args.new_tiles = gemm.new_tiles;
  const int cluster = 1 << args.cluster_log;
  const int64_t grid_blocks = blocks * cluster * gemm.max_tiles;
  const int stage = Layout::Bytes(gemm.width);
  // Where there is an SM for each thread block none should join another, as it would where the
  // kernel ahead still fills some SMs.
  const bool alone = kMany || grid_blocks <= MostAlone(cluster);
  args.slots = alone ? std::min(kMaxSlots, (kAllBytes - 1024) / stage)
                     : SlotsOf(stage, grid_blocks, cluster, kThreadBlocks<kFp8Mma, kMany>);
  const int bytes = std::max(args.slots * stage, Layout::SumBytes(gemm.width)) + 1024;
  const auto kernel = TileGemmKernel<kForm, kFp8Mma, kMany, A>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(blocks * cluster), static_cast<unsigned>(gemm.max_tiles));
  return LaunchDependent(kernel, grid, kThreads<kMany>, bytes, stream, args, cluster);
}

cudaError_t LaunchMany(const TileGemm& gemm, cudaStream_t stream) {
  ManyArgs args = {};
  int64_t blocks;
  if (!FillParts<WeightForm::kMxfp4>(args, &gemm, 1, ManyLayout::kRows, blocks)) {
    return cudaErrorInvalidValue;
  }
  args.x = gemm.x;
  args.tiles = gemm.tiles;
  args.tile_count = gemm.tile_count;
  args.new_tiles = gemm.new_tiles;
  args.row_blocks = static_cast<unsigned>(blocks);
  args.max_tiles = static_cast<unsigned>(gemm.max_tiles);
  const int64_t units = blocks * gemm.max_tiles;
  if (units > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int stage = ManyLayout::Bytes(gemm.width);
  args.slots = std::min(kMaxSlots, (kAllBytes - 1024 - kManyPlaceBytes) / stage);
  const int bytes = args.slots * stage + kManyPlaceBytes + 1024;
  const cudaError_t error =
      cudaFuncSetAttribute(ManyGemmKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(units, Multiprocessors()));
  return LaunchDependent(ManyGemmKernel, dim3(grid), kManyThreads, bytes, stream, args);
}

template <WeightForm kForm, bool kFp8Mma, Input kInput, typename A>
cudaError_t LaunchRawAs(const TileGemm* gemms, int count, cudaStream_t stream) {
  using Layout = Stage<kForm, kFp8Mma, false, A>;
  static_assert(sizeof(A) <= 4096);
  const TileGemm& gemm = gemms[0];
  A args = {};
  int64_t blocks;
  if (!FillParts<kForm>(args, gemms, count, Layout::kRows, blocks)) return cudaErrorInvalidValue;
  args.x = gemm.raw_x;
  args.x_scale = gemm.raw_scale;
  args.up = gemm.raw_up;
  args.act = gemm.act;
  args.act_scale = gemm.act_scale;
  args.picks = gemm.picks;
  args.weights_first = gemm.weights_first;
  const int cluster = 1 << args.cluster_log;
  const int stage = Layout::Bytes(kRawWidth);
  // All that a thread block will read, if it has an SM to itself: then two cannot meet where the
  // kernel ahead still fills the other SMs, and little is left to wait for behind x.
  const int64_t grid_blocks = blocks * cluster * gemm.max_tiles;
  const int64_t stages = (gemm.inputs / kStageInputs<kForm> + cluster - 1) / cluster;
  const int most = A::kSlim ? kSlimSlots
                   : grid_blocks <= MostAlone(cluster)
                       ? (kAllBytes - 1024) / stage
                       : SlotsOf(stage, grid_blocks, cluster, kRawBlocks<A>);
  args.slots = static_cast<int>(std::min<int64_t>({most, kMaxSlots, stages}));
  const int bytes = std::max(args.slots * stage, Layout::SumBytes(kRawWidth)) + 1024;
  const auto kernel = RawGemmKernel<kForm, kFp8Mma, kInput, A>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(blocks * cluster), static_cast<unsigned>(gemm.max_tiles));
  // What is gated comes from the kernel ahead. One that begins early to wait for it takes room from
  // the routed experts, which run beside it and longer.
  return LaunchKernel(kInput != Input::kGated, kernel, grid, kRawThreads<A>, bytes, stream, cluster,
                      args);
}

// By where x comes from, and by how many thread blocks there would be.
template <WeightForm kForm, bool kFp8Mma>
cudaError_t LaunchRaw(const TileGemm* gemms, int count, cudaStream_t stream) {
  const TileGemm& gemm = gemms[0];
  const int64_t grid_blocks = GridBlocks(gemms, count);
  const bool alone = grid_blocks <= MostAlone(TileGemmSplit(gemm));
  if constexpr (kForm == WeightForm::kFp8) {
    if (gemm.raw_scale != nullptr) {
      return alone ? LaunchRawAs<kForm, kFp8Mma, Input::kCodes, AloneArgs>(gemms, count, stream)
                   : LaunchRawAs<kForm, kFp8Mma, Input::kCodes, RawArgs>(gemms, count, stream);
    }
  }
  if constexpr (kForm == WeightForm::kFp8 || (kForm == WeightForm::kNvfp4 && !kFp8Mma)) {
    if (gemm.raw_up != nullptr) {
      return LaunchRawAs<kForm, kFp8Mma, Input::kGated, RawArgs>(gemms, count, stream);
    }
  }
  if constexpr (kFourBits<kForm>) {
    if (gemm.picks.expert != nullptr && TileGemmSplit(gemm) == 1 && grid_blocks > kSlimFrom &&
        grid_blocks <= kSlimTo) {
      return LaunchRawAs<kForm, kFp8Mma, Input::kPlain, SlimArgs>(gemms, count, stream);
    }
  }
  return alone ? LaunchRawAs<kForm, kFp8Mma, Input::kPlain, AloneArgs>(gemms, count, stream)
               : LaunchRawAs<kForm, kFp8Mma, Input::kPlain, RawArgs>(gemms, count, stream);
}

template <WeightForm kForm, bool kFp8Mma, bool kSeveral>
cudaError_t LaunchWidth(const TileGemm* gemms, int count, cudaStream_t stream) {
  if (gemms[0].width <= kFewWidth) {
    return Launch<kForm, kFp8Mma, false, Args<kSeveral>>(gemms, count, stream);
  }
  if constexpr (kForm == WeightForm::kMxfp4 && kFp8Mma) {
    if (ManyGemmTakes(gemms[0])) return LaunchMany(gemms[0], stream);
  }
  return Launch<kForm, kFp8Mma, true, Args<kSeveral>>(gemms, count, stream);
}

// Experts are 4 bits and one product, linears of 4 bits never several with E4M3 on both sides.
template <WeightForm kForm, bool kFp8Mma>
cudaError_t LaunchForm(const TileGemm* gemms, int count, cudaStream_t stream) {
  constexpr bool kAlways = !kFourBits<kForm>;
  if constexpr (kForm == WeightForm::kNvfp4 && !kFp8Mma) {
    if (count > 1) return LaunchWidth<kForm, kFp8Mma, true>(gemms, count, stream);
  }
  if (count > 1 && !kAlways) return cudaErrorInvalidValue;
  return LaunchWidth<kForm, kFp8Mma, kAlways>(gemms, count, stream);
}

}  // namespace

bool TileGemmTakes(const TileGemm& gemm) {
  const bool four_bits = gemm.form == WeightForm::kMxfp4 || gemm.form == WeightForm::kNvfp4;
  const int64_t inputs = four_bits ? 256 : 128;  // whole stages, and x without padding
  uintptr_t addresses = 0;
  for (int half = 0; half < 2; ++half) {
    addresses |= reinterpret_cast<uintptr_t>(gemm.weight[half]);
    if (four_bits) addresses |= reinterpret_cast<uintptr_t>(gemm.scale[half]);
  }
  if (addresses % 16 != 0 || gemm.inputs % inputs != 0 || gemm.max_tiles > 65535) return false;
  if (gemm.form == WeightForm::kMxfp4 && gemm.inputs % 512 != 0) return false;
  if (gemm.form == WeightForm::kFp8 && gemm.groups > 1 && gemm.rows % 128 != 0) return false;
  if (gemm.groups * gemm.rows > INT32_MAX || gemm.inputs > INT32_MAX) return false;
  return TensorMapEncoder() != nullptr;
}

cudaError_t TileGemmSm90(const TileGemm* gemms, int count, cudaStream_t stream) {
  const bool fp8_mma = gemms[0].fp8_mma;
  switch (gemms[0].form) {
    case WeightForm::kBf16:
      return LaunchForm<WeightForm::kBf16, false>(gemms, count, stream);
    case WeightForm::kFp8:
      return fp8_mma ? LaunchForm<WeightForm::kFp8, true>(gemms, count, stream)
                     : LaunchForm<WeightForm::kFp8, false>(gemms, count, stream);
    case WeightForm::kMxfp4:
      return fp8_mma ? LaunchForm<WeightForm::kMxfp4, true>(gemms, count, stream)
                     : LaunchForm<WeightForm::kMxfp4, false>(gemms, count, stream);
    case WeightForm::kNvfp4:
      return fp8_mma ? LaunchForm<WeightForm::kNvfp4, true>(gemms, count, stream)
                     : LaunchForm<WeightForm::kNvfp4, false>(gemms, count, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t RawGemmSm90(const TileGemm* gemms, int count, cudaStream_t stream) {
  const bool fp8_mma = gemms[0].fp8_mma;
  switch (gemms[0].form) {
    case WeightForm::kBf16:
      return LaunchRaw<WeightForm::kBf16, false>(gemms, count, stream);
    case WeightForm::kFp8:
      return fp8_mma ? LaunchRaw<WeightForm::kFp8, true>(gemms, count, stream)
                     : LaunchRaw<WeightForm::kFp8, false>(gemms, count, stream);
    case WeightForm::kMxfp4:
      return fp8_mma ? LaunchRaw<WeightForm::kMxfp4, true>(gemms, count, stream)
                     : LaunchRaw<WeightForm::kMxfp4, false>(gemms, count, stream);
    case WeightForm::kNvfp4:
      return fp8_mma ? LaunchRaw<WeightForm::kNvfp4, true>(gemms, count, stream)
                     : LaunchRaw<WeightForm::kNvfp4, false>(gemms, count, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
