// x of few tokens from where the caller has it into the stages: warps beside the copying one read,
// round (unless it comes as codes) and lay it out as the kernel of its own does for many tokens
// (activations.cuh), so that a linear is one launch. Columns without a token keep whatever lies
// there: no other reads them.
#pragma once

#include <type_traits>

#include "common/activations.cuh"
#include "common/tile_feed.cuh"

namespace dsv4 {
namespace tile {

constexpr int kRawWarps = 3;
// Chunks of a lane on their way, as many as there are registers for; a gated one is two.
template <WeightForm kForm, bool kFp8Mma, Input kInput>
constexpr int kRawAhead = kInput != Input::kGated && (kFp8Mma || kForm == WeightForm::kBf16 ||
                                                      kForm == WeightForm::kNvfp4)
                              ? 4
                              : 2;

// Of these, chunks that are rounded side by side: for NVFP4 that is code enough for one.
template <WeightForm kForm, bool kFp8Mma, Input kInput>
constexpr int kRawTogether = kForm == WeightForm::kNvfp4 ? 1 : kRawAhead<kForm, kFp8Mma, kInput>;

// Lanes that take a token's inputs of a stage, and tokens that a warp takes at once.
template <WeightForm kForm>
constexpr int kRawLanes = kStageInputs<kForm> / kChunk;
template <WeightForm kForm>
constexpr int kRawAtOnce = 32 / kRawLanes<kForm>;

// What a warp does at once: some tokens of a stage. They are dealt out to the warps in turn, so a
// warp goes through the stages in order, and what it waits for never waits for it.
__host__ __device__ constexpr int RawDeals(int tokens, int at_once) {
  return (tokens + at_once - 1) / at_once;
}
// Arrivals on a stage's barrier: of every lane, each of which writes, for every deal.
__host__ __device__ constexpr int RawArrivals(int tokens, int at_once) {
  return 32 * RawDeals(tokens, at_once);
}

// Past the L1: another kernel may have written it while this one was there.
__device__ __forceinline__ uint4 LoadRaw(const char* x) {
  return __ldcg(reinterpret_cast<const uint4*>(x));
}

struct RawPair {
  uint4 gate, up;
};

// The tile's first column of what lies as x does; others follow at `stride` bytes.
struct RawRows {
  const char* first;
  int64_t stride;

  __device__ __forceinline__ RawRows(const RawArgs& args, const Unit& unit, const void* x,
                                     int element) {
    const Tile& tile = unit.tile;
    const int64_t groups = args.OutputOf(unit).groups, row_bytes = args.inputs * element;
    // Which: of the tokens' group, or of a pick.
    const int64_t row = args.picks.expert == nullptr ? tile.group
                        : args.picks.share_x         ? unit.index / args.picks.of_token
                                                     : unit.index;
    first = static_cast<const char*>(x) + row * row_bytes;
    stride = groups * row_bytes;
  }
};

// NVFP4 activations that have a scale of their own: the largest magnitude of each of the tile's
// columns, looked for by the warps that multiply, which would only wait for x.
template <int kMultiplying>
struct RawLargest {
  uint32_t of_warp[kRawWidth][kMultiplying / 32];
};

// A chunk of the SwiGLU.
__device__ __forceinline__ uint4 Gated(const uint4& gate, const uint4& up, float limit) {
  float v[kChunk], u[kChunk];
  UnpackChunk(gate, v);
  UnpackChunk(up, u);
  GateChunk(v, u, limit);
  return make_uint4(PackBf16(v[0], v[1]), PackBf16(v[2], v[3]), PackBf16(v[4], v[5]),
                    PackBf16(v[6], v[7]));
}

constexpr int kRawFound = 2;  // named barrier: they are there

template <Input kInput, int kMultiplying>
__device__ __forceinline__ void FindLargest(const RawArgs& args, const Unit& unit,
                                            RawLargest<kMultiplying>& largest) {
  constexpr bool kGated = kInput == Input::kGated;
  constexpr int kAtOnce = kGated ? 2 : 8;  // chunks of a lane on their way
  WaitForPrevious();
  const RawRows rows(args, unit, args.x, 2), ups(args, unit, args.up, 2);
  for (int column = 0; column < unit.tile.count; ++column) {
    const char* const row = rows.first + column * rows.stride;
    [[maybe_unused]] const char* const up = ups.first + column * ups.stride;
    uint32_t most = 0;  // of a pair
    for (int64_t at = threadIdx.x * kChunk; at < args.inputs;
         at += kAtOnce * kMultiplying * kChunk) {
      uint4 words[kAtOnce], up_words[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t here = at + i * kMultiplying * kChunk;
        words[i] = up_words[i] = make_uint4(0, 0, 0, 0);
        if (here >= args.inputs) continue;
        words[i] = LoadRaw(row + here * 2);
        if constexpr (kGated) up_words[i] = LoadRaw(up + here * 2);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        uint4 w = words[i];
        if constexpr (kGated) w = Gated(w, up_words[i], args.OutputOf(unit).limit);
        most = MaxMagnitudes(most, MaxMagnitudes(MaxMagnitudes(w.x, w.y), MaxMagnitudes(w.z, w.w)));
      }
    }
    const uint32_t bits = __reduce_max_sync(0xFFFFFFFFu, LargerOf(most));
    if (threadIdx.x % 32 == 0) largest.of_warp[column][threadIdx.x / 32] = bits << 16;
  }
  asm volatile("bar.arrive %0, %1;" ::"n"(kRawFound), "n"(kMultiplying + 32 * kRawWarps)
               : "memory");
}

// The NVFP4 scale of column `lane`, by the warps that lay out x.
template <int kMultiplying>
__device__ __forceinline__ float RawScale(const RawArgs& args, const Unit& unit, int lane,
                                          const RawLargest<kMultiplying>& largest) {
  if (args.act_scale != nullptr) {
    const int64_t group = args.picks.expert == nullptr ? 0 : unit.tile.group;
    return StaticGlobalScale(__ldcg(args.act_scale + group));
  }
  asm volatile("bar.sync %0, %1;" ::"n"(kRawFound), "n"(kMultiplying + 32 * kRawWarps) : "memory");
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kMultiplying / 32; ++i) {
    bits = max(bits, largest.of_warp[lane % kRawWidth][i]);
  }
  return TokenGlobalScale(__uint_as_float(bits));
}

// By the warps `warp` < kRawWarps; `x_scale`: in shared memory, of the tile's columns. Those who
// read it wait for the first stage, on which the lanes that write it arrive.
template <WeightForm kForm, bool kFp8Mma, Input kInput, typename A, int kMultiplying>
__device__ __forceinline__ void LayOutRaw(const A& args, Feed<kForm, kFp8Mma, false, A> feed,
                                          const Unit& unit, int warp, float* x_scale,
                                          const RawLargest<kMultiplying>& largest) {
  using Layout = Stage<kForm, kFp8Mma, false, A>;
  constexpr int kLanes = kRawLanes<kForm>, kAtOnce = kRawAtOnce<kForm>;
  constexpr int kAhead = kRawAhead<kForm, kFp8Mma, kInput>;
  constexpr int kTogether = kRawTogether<kForm, kFp8Mma, kInput>;
  constexpr bool kCoded = kInput == Input::kCodes, kGated = kInput == Input::kGated;
  const Tile& tile = unit.tile;
  const int lane = threadIdx.x % 32, in = lane % kLanes * kChunk;
  const int deals = RawDeals(tile.count, kAtOnce);
  constexpr int kElement = kCoded ? 1 : 2;
  const int64_t groups = args.OutputOf(unit).groups;
  const RawRows rows(args, unit, args.x, kElement);
  const int64_t stride = rows.stride;
  const char* const from = rows.first + lane / kLanes * stride + in * kElement;
  WaitForPrevious();

  // The warp's deals of a stage begin with `deal`; those to load are some ahead.
  const auto step = [&](int& deal, auto next_stage) {
    for (deal += kRawWarps; deal >= deals; deal -= deals) next_stage();
  };
  int load_stage = feed.stage, load_deal = warp;
  const auto load = [&] {
    std::conditional_t<kGated, RawPair, uint4> words = {};
    const int token = load_deal * kAtOnce + lane / kLanes;
    if (load_stage < feed.stages && token < tile.count) {
      const char* const at = from + load_deal * kAtOnce * stride +
                             int64_t{load_stage} * kStageInputs<kForm> * kElement;
      if constexpr (kCoded) {
        static_assert(kStageInputs<kForm> == 128);
        const uint2 codes = __ldcg(reinterpret_cast<const uint2*>(at));
        const int64_t row = token * groups + tile.group;
        words.x = codes.x;
        words.y = codes.y;
        words.z = __ldcg(args.x_scale + row * args.scale_columns + load_stage);
      } else if constexpr (kGated) {
        const int64_t offset = at - static_cast<const char*>(args.x);
        words = {LoadRaw(at), LoadRaw(static_cast<const char*>(args.up) + offset)};
      } else {
        words = LoadRaw(at);
      }
    }
    step(load_deal, [&] { ++load_stage; });
    return words;
  };
  int deal = warp;
  for (; deal >= deals; deal -= deals) feed.Next();
  for (; load_deal >= deals; load_deal -= deals) ++load_stage;
  decltype(load()) words[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) words[i] = load();

  float scale = 1.0f;  // of column `lane`
  if constexpr (kForm == WeightForm::kNvfp4) {
    if (args.act == ActForm::kNvfp4) {
      scale = RawScale(args, unit, lane, largest);
      if (warp == 0 && lane < kRawWidth) x_scale[lane] = scale;
    }
  }
  const ActForm act = kForm == WeightForm::kBf16 ? ActForm::kBf16 : args.act;
  while (feed.stage < feed.stages) {
    std::conditional_t<kFp8Mma, Fp8Line, uint4> lines[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const auto now = words[i];
#pragma unroll
      for (int j = i; j < kAhead; j += kTogether) {
        words[j] = j + kTogether < kAhead ? words[j + kTogether] : load();
      }
      float v[kChunk];
      Fp8Chunk chunk;
      if constexpr (kCoded) {
        chunk = {make_uint2(now.x, now.y), DecodeUe8m0(now.z)};
      } else {
        if constexpr (kGated) {
          float up[kChunk];
          UnpackChunk(now.gate, v);
          UnpackChunk(now.up, up);
          GateChunk(v, up, args.OutputOf(unit).limit);
        } else {
          UnpackChunk(now, v);
        }
        if constexpr (kFp8Mma) chunk = EncodeFp8(v);
      }
      if constexpr (kFp8Mma) {
        lines[i] = Fp8LineOf<kForm>(chunk, lane);
      } else if constexpr (kCoded) {
        DecodeFp8(chunk, v);
        lines[i] = LineOf<kForm>(v, lane);
      } else {
        float of_column = 1.0f;
        if constexpr (kForm == WeightForm::kNvfp4) {
          static_assert(kAtOnce == 1 && kTogether == 1);  // a deal is a column
          of_column = __shfl_sync(0xFFFFFFFFu, scale, deal);
        }
        RoundChunk(v, act, of_column);
        lines[i] = LineOf<kForm>(v, lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (feed.stage >= feed.stages) break;
      feed.AwaitEmpty();
      char* const columns = feed.shared + feed.slot * feed.stage_bytes + Layout::kColumnsAt;
      const int column = deal * kAtOnce + lane / kLanes;
      if (column < tile.count) {
        if constexpr (kFp8Mma) {
          StoreFp8Line<kForm>(lines[i], reinterpret_cast<uint8_t*>(columns), in, kRawWidth, column,
                              lane);
        } else {
          reinterpret_cast<uint4*>(columns)[LineAt<kForm>(in, lane) * kRawWidth + column] =
              lines[i];
        }
      }
      FenceForAsyncReads();
      Arrive(feed.full + 8 * feed.slot);
      step(deal, [&] { feed.Next(); });
    }
  }
}

}  // namespace tile
}  // namespace dsv4
