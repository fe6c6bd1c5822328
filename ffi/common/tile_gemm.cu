// The tile product for shapes, addresses and devices that the Hopper kernel does not take: right,
// not fast. A warp per row, eight columns at a time; sums per lane, then over the lanes by halves.
#include <cuda_bf16.h>

#include <algorithm>
#include <type_traits>

#include "common/activations.cuh"
#include "common/barrier.cuh"
#include "common/bf16_prefill.h"
#include "common/bits.h"
#include "common/cuda.h"
#include "common/e4m3.h"
#include "common/tile_gemm.h"
#include "common/tile_store.cuh"
#include "common/weights.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;
constexpr int kColumns = 8;
constexpr int kPrepareThreads = 256;
constexpr int kTeams = 8192;        // that lay out x, if there is so much
constexpr int kFullGrid = 128;      // thread blocks that keep the memory busy
constexpr int kRoundedTokens = 3;   // that every thread block may round for itself,
constexpr int kNvfp4Tokens = 6;     // and of NVFP4, for which a kernel ahead takes longer
constexpr int kWideBlocks = 66;     // of 256 rows and a tile, that keep half of the chip busy
constexpr int kNarrowBlocks = 200;  // of 128 rows and a narrow tile, that run at once

struct Args {
  const uint8_t* weight[2];
  const uint8_t* scale[2];
  const void* x;
  const Tile* tiles;
  const int32_t* tile_count;
  int64_t inputs, padded, scale_columns;
  Output out;
};

template <WeightForm kForm>
__device__ float Decoded(const Args& args, int half, int64_t row, int64_t k) {
  const int64_t at = row * args.inputs + k;
  if constexpr (kForm == WeightForm::kBf16) {
    return Bf16ToFloat(reinterpret_cast<const uint16_t*>(args.weight[half])[at]);
  } else if constexpr (kForm == WeightForm::kFp8) {
    return RoundBf16(
        __fmul_rn(DecodeE4m3(args.weight[half][at]),
                  DecodeUe8m0(args.scale[half][row / 128 * args.scale_columns + k / 128])));
  } else {
    const uint32_t code = args.weight[half][at / 2] >> at % 2 * 4 & 0xFu;
    const float magnitude = E2m1Magnitude(code);
    const float value = code & 8u ? -magnitude : magnitude;
    const float scale = kForm == WeightForm::kNvfp4
                            ? DecodeE4m3(args.scale[half][row * (args.inputs / 16) + k / 16])
                            : DecodeUe8m0(args.scale[half][row * (args.inputs / 32) + k / 32]);
    return __fmul_rn(value, scale);
  }
}

template <WeightForm kForm>
__device__ void Products(const Args& args, int half, const Tile& tile, int64_t row, int first,
                         float (&sums)[kColumns]) {
  const uint16_t* x = static_cast<const uint16_t*>(args.x) + tile.first * args.padded;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[i] = 0.0f;
  for (int64_t k = threadIdx.x % 32; k < args.inputs; k += 32) {
    const float w = Decoded<kForm>(args, half, row, k);
    constexpr int kInputs = Weights<kForm>::kPieceInputs;
    const Position where = Weights<kForm>::StepOf(static_cast<int>(k % kInputs));
    const int64_t step = k / kInputs * Weights<kForm>::kSteps + where.step;
    const int64_t line = (2 * step + where.at / 8) * tile.width;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (first + i < tile.count) {
        const float value = Bf16ToFloat(x[(line + first + i) * 8 + where.at % 8]);
        sums[i] = __fmaf_rn(w, value, sums[i]);  // the product is exact
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(0xFFFFFFFFu, sums[i], lanes));
    }
  }
}

template <WeightForm kForm>
__global__ void __launch_bounds__(32 * kWarps) AnyGemmKernel(const __grid_constant__ Args args) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  Tile tile;
  if (row >= args.out.rows) return;
  if (!FindTile(args.out, args.tiles, args.tile_count, blockIdx.y, tile)) return;
  const Scales scales(args.out, tile.group);
  const Lines lines(args.out, tile, blockIdx.y);
  const bool pair = args.out.store == Store::kSwiglu;
  const int64_t weight_row = tile.group * args.out.rows + row;
  Output one = args.out;  // a row, not two
  one.rows = row + 1;
  for (int first = 0; first < tile.count; first += kColumns) {
    float sums[2][kColumns];
    Products<kForm>(args, 0, tile, weight_row, first, sums[0]);
    if (pair) Products<kForm>(args, 1, tile, weight_row, first, sums[1]);
    if (threadIdx.x % 32 != 0) continue;
    for (int i = first; i < first + kColumns && i < tile.count; ++i) {
      const ColumnFactors factors(args.out, tile, i);
      float value = __fmul_rn(sums[0][i - first], __fmul_rn(scales.global[0], factors.scale));
      if (pair) {
        const float up = __fmul_rn(sums[1][i - first], __fmul_rn(scales.global[1], factors.scale));
        value = Swiglu(value, up, args.out.limit, factors.weight);
      }
      StoreTwo(one, one.y, {value, value}, args.out.y_bf16, lines.first + i * lines.step + row,
               row);
    }
  }
}

// Lanes that lay out a token's x: half a warp, a whole one where it first looks for the largest.
template <ActForm kAct>
constexpr int kTeam = kAct == ActForm::kNvfp4 ? 32 : 16;
template <ActForm kAct>
constexpr int kPrepareTokens = kPrepareThreads / kTeam<kAct>;

// FP32 scale of the warp's row, of `rows` of a thread block; of one or two, all warps look through
// each.
template <typename RowAt>
__device__ __forceinline__ float ScaleOfRow(const LinearParams& params, const RowAt& row_at,
                                            unsigned rows) {
  constexpr unsigned kWarps = kPrepareThreads / 32, kFewRows = 2;
  const unsigned warp = threadIdx.x / 32;
  if (params.act_scale != nullptr) return StaticGlobalScale(__ldg(params.act_scale));
  uint32_t largest = 0;
  if (rows <= kFewRows) {
    __shared__ uint32_t found[kFewRows][kWarps];
    for (unsigned i = 0; i < rows; ++i) {
      largest = RowMagnitude<32>(row_at(i), params.k, static_cast<int>(warp), kWarps);
      if (threadIdx.x % 32 == 0) found[i][warp] = largest;
    }
    __syncthreads();
    largest = MaxOfLanes<kWarps>(found[warp < rows ? warp : 0][threadIdx.x % kWarps]);
  } else if (warp < rows) {
    largest = RowMagnitude<32>(row_at(warp), params.k);
  }
  return TokenGlobalScale(__uint_as_float(largest));
}

struct PrepareArgs {
  LinearParams params;
  unsigned width, parts;  // of a tile; of a row, which teams share
  int64_t padded;
  char* out;
  float* column_scale;
};

// x [tokens, groups, inputs] into tiles of `width` tokens.
template <WeightForm kForm, ActForm kAct, bool kFp8Mma, Input kInput>
__global__ void __launch_bounds__(kPrepareThreads)
    PrepareKernel(const __grid_constant__ PrepareArgs args) {
  const LinearParams& params = args.params;
  const unsigned width = args.width, parts = args.parts;
  const int64_t padded = args.padded;
  WaitForPrevious();
  LetNextBegin();
  // A team per row, or per part of one: tokens of a group, whose columns lie side by side.
  const unsigned block = blockIdx.x / parts, groups = static_cast<unsigned>(params.groups);
  const int part = static_cast<int>(blockIdx.x - block * parts);
  const unsigned tokens = block / groups, group = block - tokens * groups;
  const unsigned in_block = threadIdx.x / kTeam<kAct>;
  const unsigned first_token = tokens * kPrepareTokens<kAct>, token = first_token + in_block;
  const int64_t k = token < params.t ? params.k : 0;
  constexpr bool kCoded = kInput == Input::kCodes;
  const int64_t row_bytes = params.k * (kCoded ? 1 : params.x_float32 ? 4 : 2);
  const int64_t stride = groups * row_bytes;
  const char* const first_row =
      static_cast<const char*>(params.x) + first_token * stride + group * row_bytes;
  const auto row_at = [&](unsigned token_in_block) {
    const char* const row = first_row + token_in_block * stride;
    if constexpr (kInput == Input::kGated) {
      const char* const up = static_cast<const char*>(params.up);
      return GatedRow{row, up + (row - static_cast<const char*>(params.x)), params.limit};
    } else {
      return PlainRow{row, params.x_float32};
    }
  };
  float global = 1.0f;
  if constexpr (kAct == ActForm::kNvfp4) {
    const int64_t left = params.t - first_token;
    global =
        ScaleOfRow(params, row_at, static_cast<unsigned>(min(left, int64_t{kPrepareTokens<kAct>})));
  }
  if (!__any_sync(0xFFFFFFFFu, k > 0)) return;
  const unsigned token_tile = token / width;
  const int column = static_cast<int>(token - token_tile * width);
  const int64_t first = (int64_t{token_tile} * groups + group) * width;
  if (kAct == ActForm::kNvfp4 && part == 0 && threadIdx.x % kTeam<kAct> == 0 && k > 0) {
    args.column_scale[first + column] = global;
  }
  char* const tile = args.out + first * ColumnBytes(kFp8Mma, padded);
  if constexpr (kCoded) {
    const int64_t at = (int64_t{token} * groups + group) * (padded / 128);
    const char* const row = first_row + in_block * stride;
    StoreCodes<kForm, kFp8Mma, kTeam<kAct>>(reinterpret_cast<const uint8_t*>(row),
                                            params.x_scale + at, k > 0, padded, width, column, tile,
                                            part, parts);
  } else if constexpr (kFp8Mma) {
    StoreFp8Row<kForm, kTeam<kAct>>(row_at(in_block), k, padded, width, column,
                                    reinterpret_cast<uint8_t*>(tile), part, parts);
  } else {
    StoreRow<kForm, kTeam<kAct>>(row_at(in_block), k, padded, kAct, global, width, column,
                                 reinterpret_cast<uint16_t*>(tile), part, parts);
  }
}

template <WeightForm kForm, ActForm kAct, bool kFp8Mma, Input kInput = Input::kPlain>
cudaError_t Prepare(const LinearParams& params, int width, int64_t padded, char* out,
                    float* column_scale, cudaStream_t stream) {
  // Chunks of a lane; of a few tokens several, so that the products find most of the chip free.
  const int at_once = kInput != Input::kGated && params.t <= kRawWidth ? kBatch : 1;
  const int64_t most = std::max<int64_t>(1, padded / (at_once * kTeam<kAct> * kChunk));
  const int64_t parts = std::clamp<int64_t>(kTeams / (params.t * params.groups), 1, most);
  const int64_t blocks =
      (params.t + kPrepareTokens<kAct> - 1) / kPrepareTokens<kAct> * params.groups * parts;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  PrepareArgs args = {};
  args.params = params;
  args.width = static_cast<unsigned>(width);
  args.parts = static_cast<unsigned>(parts);
  args.padded = padded;
  args.out = out;
  args.column_scale = column_scale;
  return LaunchDependent(PrepareKernel<kForm, kAct, kFp8Mma, kInput>,
                         dim3(static_cast<unsigned>(blocks)), kPrepareThreads, 0, stream, args);
}

template <WeightForm kForm>
cudaError_t PrepareForm(const LinearParams& params, int width, int64_t padded, bool fp8_mma,
                        char* out, float* column_scale, cudaStream_t stream) {
  const auto run = [&](auto prepare) {
    return prepare(params, width, padded, out, column_scale, stream);
  };
  if constexpr (kForm == WeightForm::kNvfp4) {
    if (params.up != nullptr) {
      return run(Prepare<kForm, ActForm::kNvfp4, false, Input::kGated>);
    }
    if (params.act == ActForm::kNvfp4) return run(Prepare<kForm, ActForm::kNvfp4, false>);
  }
  if constexpr (kForm == WeightForm::kFp8) {
    if (params.x_scale != nullptr) {
      return fp8_mma ? run(Prepare<kForm, ActForm::kFp8, true, Input::kCodes>)
                     : run(Prepare<kForm, ActForm::kFp8, false, Input::kCodes>);
    }
    if (params.up != nullptr) {
      return fp8_mma ? run(Prepare<kForm, ActForm::kFp8, true, Input::kGated>)
                     : run(Prepare<kForm, ActForm::kFp8, false, Input::kGated>);
    }
  }
  if constexpr (kForm != WeightForm::kBf16) {
    if (fp8_mma) return run(Prepare<kForm, ActForm::kFp8, true>);
    if (params.act == ActForm::kFp8) return run(Prepare<kForm, ActForm::kFp8, false>);
  }
  return run(Prepare<kForm, ActForm::kBf16, false>);
}

template <WeightForm kForm>
cudaError_t LaunchAny(const TileGemm& gemm, cudaStream_t stream) {
  Args args = {};
  for (int half = 0; half < 2; ++half) {
    args.weight[half] = static_cast<const uint8_t*>(gemm.weight[half]);
    args.scale[half] = gemm.scale[half];
  }
  args.x = gemm.x;
  args.tiles = gemm.tiles;
  args.tile_count = gemm.tile_count;
  args.inputs = gemm.inputs;
  args.padded = gemm.padded_inputs;
  args.scale_columns = (gemm.inputs + 127) / 128;
  args.out = Output(gemm);
  if (gemm.max_tiles > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>((gemm.rows + kWarps - 1) / kWarps),
                  static_cast<unsigned>(gemm.max_tiles));
  AnyGemmKernel<kForm><<<grid, 32 * kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int64_t TileGemmRowBlocks(const TileGemm& gemm) {
  const int rows = gemm.store == Store::kSwiglu ? 64 : 128;
  return (gemm.rows + rows - 1) / rows * gemm.groups;
}

int TileGemmSplit(const TileGemm& gemm) {
  const int piece = gemm.form == WeightForm::kBf16  ? Weights<WeightForm::kBf16>::kPieceInputs
                    : gemm.form == WeightForm::kFp8 ? Weights<WeightForm::kFp8>::kPieceInputs
                                                    : FourBits::kPieceInputs;
  const int64_t stages = gemm.inputs / (2 * piece), blocks = TileGemmRowBlocks(gemm);
  int parts = 1;
  while (gemm.split && parts < 8 && blocks * parts < kFullGrid && stages >= 4 * parts) parts *= 2;
  return parts;
}

bool HopperTakes(const TileGemm& gemm) {
#ifdef DSV4_SM90
  return TileGemmTakes(gemm) && OnHopper();
#else
  static_cast<void>(gemm);
  return false;
#endif
}

bool ManyGemmTakes(const TileGemm& gemm) {
  return gemm.form == WeightForm::kMxfp4 && gemm.fp8_mma && gemm.global_scale[0] == nullptr &&
         gemm.column_scale == nullptr && TileGemmSplit(gemm) == 1;
}

cudaError_t RunTileGemms(const TileGemm* gemms, int count, cudaStream_t stream) {
#ifdef DSV4_SM90
  if (HopperTakes(gemms[0])) return TileGemmSm90(gemms, count, stream);
#endif
  if (gemms[0].fp8_mma) return cudaErrorInvalidValue;
  const auto launch = [](const TileGemm& gemm, cudaStream_t into) {
    switch (gemm.form) {
      case WeightForm::kBf16:
        return LaunchAny<WeightForm::kBf16>(gemm, into);
      case WeightForm::kFp8:
        return LaunchAny<WeightForm::kFp8>(gemm, into);
      case WeightForm::kMxfp4:
        return LaunchAny<WeightForm::kMxfp4>(gemm, into);
      case WeightForm::kNvfp4:
        return LaunchAny<WeightForm::kNvfp4>(gemm, into);
    }
    return cudaErrorInvalidValue;
  };
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < count && error == cudaSuccess; ++i) error = launch(gemms[i], stream);
  return error;
}

namespace {

// Whether the kernel for many BF16 tokens serves the linear's regime "prefill".
bool IsPrefillByBf16(WeightForm form, const LinearParams& params) {
#ifdef DSV4_SM90
  return Bf16PrefillTakes(form, params) && OnHopper();
#else
  static_cast<void>(form), static_cast<void>(params);
  return false;
#endif
}

bool IsPrefill(WeightForm form, const LinearParams& params) {
  if (params.regime != Regime::kAuto) return params.regime == Regime::kPrefill;
#ifdef DSV4_SM90
  if (IsPrefillByBf16(form, params)) return Bf16PrefillPays(params);
#endif
  // The inputs are shared where wide tiles would not keep the chip busy: what a token gets depends
  // on that, not on the width of tiles. Narrow ones serve few tokens, and the smallest weights.
  const int64_t wide_blocks =
      (params.n + 255) / 256 * ((params.t + kMaxTileWidth - 1) / kMaxTileWidth);
  return params.t > kFewWidth && wide_blocks >= kWideBlocks;
}

// The product of a linear; the width of its tiles and where its x is come later.
TileGemm GemmOf(WeightForm form, const LinearParams& params) {
  const bool prefill = IsPrefill(form, params);
  TileGemm gemm = {};
  gemm.form = form;
  gemm.store = Store::kTokens;
  gemm.groups = params.groups;
  gemm.rows = params.n / params.groups;
  gemm.inputs = params.k;
  gemm.split = !prefill;
  gemm.weight[0] = gemm.weight[1] = params.weight;
  gemm.scale[0] = gemm.scale[1] = params.scale;
  gemm.global_scale[0] = gemm.global_scale[1] = params.global_scale;
  gemm.one_global_scale = true;
  gemm.padded_inputs = (params.k + 127) / 128 * 128;
  gemm.tokens = params.t;
  const bool fp8 = form == WeightForm::kFp8 || form == WeightForm::kMxfp4;
  gemm.fp8_mma =
      fp8 && params.act == ActForm::kFp8 && params.regime != Regime::kExact && HopperTakes(gemm);
  gemm.act = params.act;
  gemm.act_scale = params.act_scale;
  gemm.y = params.y;
  gemm.y_bf16 = params.y_bf16;
  return gemm;
}

// Tiles as wide as are fastest for all products of one x together.
void SetWidths(TileGemm* gemms, int count) {
  constexpr int64_t kHalfWidth = kFewWidth + 32;
  const int64_t tokens = gemms[0].tokens;
  int64_t narrow_blocks = 0, half_blocks = 0;
  int cluster = 1;
  for (int i = 0; i < count; ++i) {
    const TileGemm& gemm = gemms[i];
    if (!gemm.split) continue;
    const int split = TileGemmSplit(gemm);
    narrow_blocks += TileGemmRowBlocks(gemm) * split * ((tokens + kFewWidth - 1) / kFewWidth);
    half_blocks +=
        (gemm.rows + 255) / 256 * gemm.groups * split * ((tokens + kHalfWidth - 1) / kHalfWidth);
    cluster = std::max(cluster, split);
  }
  const int64_t wide = half_blocks <= MostAlone(cluster) ? kHalfWidth : kMaxTileWidth;
  for (int i = 0; i < count; ++i) {
    TileGemm& gemm = gemms[i];
    const bool narrow = gemm.split && (tokens <= kFewWidth || narrow_blocks <= kNarrowBlocks);
    const int64_t most = narrow ? kFewWidth : gemm.split ? wide : kMaxTileWidth;
    gemm.width = TileWidth(static_cast<int>(std::min(tokens, most)));
    if (!narrow) gemm.width = std::max<int>(gemm.width, kHalfWidth);
    gemm.max_tiles = (tokens + gemm.width - 1) / gemm.width * gemm.groups;
  }
}

// Whether the kernel of few tokens lays out x itself; else one of its own does, into scratch.
bool TakesRaw(const LinearParams& params, const TileGemm& gemm) {
  const bool rounded = params.act != ActForm::kBf16 && params.x_scale == nullptr;
  const int most = params.act == ActForm::kNvfp4 ? kNvfp4Tokens
                   : rounded                     ? kRoundedTokens
                                                 : kRawWidth;
  return gemm.width == kRawWidth && !params.x_float32 &&
         (reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.up)) % 16 ==
             0 &&
         params.t <= most && HopperTakes(gemm);
}

// x into scratch, as the products of this width read it.
cudaError_t PrepareX(const LinearParams& params, const TileGemm& gemm, char* x, float* scales,
                     cudaStream_t stream) {
  const auto prepare = [&](auto form) {
    return PrepareForm<decltype(form)::value>(params, gemm.width, gemm.padded_inputs, gemm.fp8_mma,
                                              x, scales, stream);
  };
  switch (gemm.form) {
    case WeightForm::kBf16:
      return prepare(std::integral_constant<WeightForm, WeightForm::kBf16>());
    case WeightForm::kFp8:
      return prepare(std::integral_constant<WeightForm, WeightForm::kFp8>());
    default:  // 4 bits are laid out alike
      return prepare(std::integral_constant<WeightForm, WeightForm::kNvfp4>());
  }
}

bool SameX(const TileGemm& first, const TileGemm& second) {
  return first.width == second.width && first.fp8_mma == second.fp8_mma;
}

// Those that share a launch with the first, of products of one x: moved to the front, and their
// number. A thread block's share of the inputs is the same in all.
int TakeTogether(TileGemm* gemms, int count) {
  const TileGemm first = gemms[0];
  const auto together = [&](const TileGemm& gemm) {
    return SameX(gemm, first) && TileGemmSplit(gemm) == TileGemmSplit(first) &&
           HopperTakes(gemm) == HopperTakes(first);
  };
  return static_cast<int>(std::stable_partition(gemms, gemms + count, together) - gemms);
}

}  // namespace

cudaError_t LinearTiles(WeightForm form, const LinearParams* parts, int n_parts,
                        cudaStream_t stream) {
  LinearParams many[kMaxLinearParts];  // of the kernel for many tokens
  LinearParams few[kMaxLinearParts];
  int n_many = 0, n_few = 0;
  for (int p = 0; p < n_parts; ++p) {
    const bool of_many = IsPrefill(form, parts[p]) && IsPrefillByBf16(form, parts[p]);
    (of_many ? many[n_many++] : few[n_few++]) = parts[p];
  }
#ifdef DSV4_SM90
  if (n_many > 0) {
    const cudaError_t error = Bf16PrefillSm90(form, many, n_many, stream);
    if (error != cudaSuccess) return error;
  }
#endif
  if (n_few == 0) return cudaSuccess;
  TileGemm all[kMaxLinearParts];
  bool weights_first = true;
  for (int p = 0; p < n_few; ++p) {
    const LinearParams& part = few[p];
    all[p] = GemmOf(form, part);
    weights_first = weights_first && IsSettled(part.weight) &&
                    (part.scale == nullptr || IsSettled(part.scale)) &&
                    (part.global_scale == nullptr || IsSettled(part.global_scale));
  }
  SetWidths(all, n_few);
  [[maybe_unused]] TileGemm raw[kMaxLinearParts];  // that lay out x themselves: on Hopper
  TileGemm gemms[kMaxLinearParts];
  int n_raw = 0, n_gemms = 0;
  for (int p = 0; p < n_few; ++p) {
    TileGemm& gemm = all[p];
    if (TakesRaw(few[p], gemm)) {
      gemm.raw_x = few[p].x;
      gemm.raw_scale = few[p].x_scale;
      gemm.raw_up = few[p].up;
      gemm.limit = few[p].limit;
      raw[n_raw++] = gemm;
    } else {
      gemms[n_gemms++] = gemm;
    }
  }
#ifdef DSV4_SM90
  for (int at = 0, taken; at < n_raw; at += taken) {
    taken = TakeTogether(raw + at, n_raw - at);
    raw[at].weights_first = weights_first || at > 0;
    const cudaError_t error = RawGemmSm90(raw + at, taken, stream);
    if (error != cudaSuccess) return error;
  }
#endif
  char* const x = static_cast<char*>(parts[0].scratch);
  for (int at = 0, taken; at < n_gemms; at += taken) {
    TileGemm* const now = gemms + at;
    taken = TakeTogether(now, n_gemms - at);
    const int64_t columns = now->max_tiles * now->width;
    float* const scales =
        reinterpret_cast<float*>(x + columns * ColumnBytes(now->fp8_mma, now->padded_inputs));
    if (at == 0 || !SameX(*now, now[-1])) {
      const cudaError_t error = PrepareX(parts[0], *now, x, scales, stream);
      if (error != cudaSuccess) return error;
    }
    for (int i = 0; i < taken; ++i) {
      now[i].x = x;
      now[i].column_scale = now[i].act == ActForm::kNvfp4 ? scales : nullptr;
    }
    const cudaError_t error = RunTileGemms(now, taken, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dsv4
