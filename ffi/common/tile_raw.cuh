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
constexpr int kRawMagnitudes = 8;  // chunks of a lane on their way that are looked through
// And that are rounded, as many as there are registers for.
template <WeightForm kForm, bool kFp8Mma>
constexpr int kRawAhead =
    kFp8Mma || kForm == WeightForm::kBf16 || kForm == WeightForm::kNvfp4 ? 4 : 2;

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

__device__ __forceinline__ void SyncRaw() {
  asm volatile("bar.sync 2, %0;" ::"n"(32 * kRawWarps) : "memory");
}

// NVFP4: the FP32 scale of the token that has the lane's number; all warps look through each token.
__device__ __forceinline__ float RawGlobalScale(const RawArgs& args, const char* x, int64_t stride,
                                                int tokens, int warp) {
  __shared__ uint32_t found[kRawWarps][kRawWidth];
  const int lane = threadIdx.x % 32;
  if (args.act_scale != nullptr) return StaticGlobalScale(__ldcg(args.act_scale));
  const int inputs = static_cast<int>(args.inputs);
  constexpr int kStride = kRawWarps * 32 * kChunk;
  for (int token = 0; token < tokens; ++token) {
    uint32_t largest = 0;
    for (int at = (warp * 32 + lane) * kChunk; at < inputs; at += kRawMagnitudes * kStride) {
      uint4 words[kRawMagnitudes];
#pragma unroll
      for (int i = 0; i < kRawMagnitudes; ++i) {
        words[i] = make_uint4(0, 0, 0, 0);
        if (at + i * kStride < inputs) {
          words[i] = LoadRaw(x + token * stride + int64_t{at + i * kStride} * 2);
        }
      }
#pragma unroll
      for (int i = 0; i < kRawMagnitudes; ++i) {
        const uint32_t w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          largest = max(largest, max(w[j] << 16 & 0x7FFF0000u, w[j] & 0x7FFF0000u));
        }
      }
    }
    largest = MaxOfLanes<32>(largest);
    if (lane == 0) found[warp][token] = largest;
  }
  SyncRaw();
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kRawWarps; ++i) largest = max(largest, found[i][lane % kRawWidth]);
  return TokenGlobalScale(__uint_as_float(largest));
}

// By the warps `warp` < kRawWarps; `x_scale`: in shared memory, of the tile's columns. Those who
// read it wait for the first stage, on which the lanes that write it arrive.
template <WeightForm kForm, bool kFp8Mma, bool kCoded>
__device__ __forceinline__ void LayOutRaw(const RawArgs& args,
                                          Feed<kForm, kFp8Mma, false, RawArgs> feed,
                                          const Unit& unit, int warp, float* x_scale) {
  using Layout = Stage<kForm, kFp8Mma, false>;
  constexpr int kLanes = kRawLanes<kForm>, kAtOnce = kRawAtOnce<kForm>;
  constexpr int kAhead = kRawAhead<kForm, kFp8Mma>;
  const Tile& tile = unit.tile;
  const int lane = threadIdx.x % 32, in = lane % kLanes * kChunk;
  const int deals = RawDeals(tile.count, kAtOnce);
  constexpr int kElement = kCoded ? 1 : 2;
  const int64_t groups = args.OutputOf(unit).groups;
  const int64_t row_bytes = args.inputs * kElement, stride = groups * row_bytes;
  const char* const x = static_cast<const char*>(args.x) + tile.group * row_bytes;
  const char* const from = x + lane / kLanes * stride + in * kElement;
  WaitForPrevious();

  // The warp's deals of a stage begin with `deal`; those to load are some ahead.
  const auto step = [&](int& deal, auto next_stage) {
    for (deal += kRawWarps; deal >= deals; deal -= deals) next_stage();
  };
  int load_stage = feed.stage, load_deal = warp;
  const auto load = [&] {
    uint4 words = make_uint4(0, 0, 0, 0);
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
  uint4 words[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) words[i] = load();

  float scale = 1.0f;  // of the token that has the lane's number
  if constexpr (kForm == WeightForm::kNvfp4) {
    if (args.act == ActForm::kNvfp4) {
      scale = RawGlobalScale(args, x, stride, tile.count, warp);
      if (warp == 0 && lane < kRawWidth) x_scale[lane] = scale;
    }
  }
  const ActForm act = kForm == WeightForm::kBf16 ? ActForm::kBf16 : args.act;
  int rounding_deal = deal;
  while (feed.stage < feed.stages) {
    std::conditional_t<kFp8Mma, Fp8Line, uint4> lines[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint4 now = words[i];
      words[i] = load();
      float v[kChunk];
      Fp8Chunk chunk;
      if constexpr (kCoded) {
        chunk = {make_uint2(now.x, now.y), DecodeUe8m0(now.z)};
      } else {
        UnpackChunk(now, v);
        if constexpr (kFp8Mma) chunk = EncodeFp8(v);
      }
      if constexpr (kFp8Mma) {
        lines[i] = Fp8LineOf<kForm>(chunk, lane);
      } else if constexpr (kCoded) {
        DecodeFp8(chunk, v);
        lines[i] = LineOf<kForm>(v, lane);
      } else {
        float global = 1.0f;
        if constexpr (kForm == WeightForm::kNvfp4) {
          global = __shfl_sync(0xFFFFFFFFu, scale, rounding_deal);
          step(rounding_deal, [] {});
        }
        RoundChunk(v, act, global);
        lines[i] = LineOf<kForm>(v, lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
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
