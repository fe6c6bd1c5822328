// What becomes of a product of the tile kernels: scales, activation, rounding, where it goes.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/swiglu.h"
#include "common/tile_gemm.h"

namespace dsv4 {

struct Output {
  const float* global_scale[2];
  const float* column_scale;
  const float* column_weight;
  void* y;
  int64_t rows, groups, tokens;
  float limit;
  int width;
  Store store;
  bool y_bf16, one_global_scale;

  Output() = default;
  explicit Output(const TileGemm& gemm)
      : global_scale{gemm.global_scale[0], gemm.global_scale[1]},
        column_scale(gemm.column_scale),
        column_weight(gemm.column_weight),
        y(gemm.y),
        rows(gemm.rows),
        groups(gemm.groups),
        tokens(gemm.tokens),
        limit(gemm.limit),
        width(gemm.width),
        store(gemm.store),
        y_bf16(gemm.y_bf16),
        one_global_scale(gemm.one_global_scale) {}
};

// The tile of an index; false where there is none.
__device__ __forceinline__ bool FindTile(const Output& out, const Tile* tiles,
                                         const int32_t* tile_count, unsigned index, Tile& tile) {
  if (tiles != nullptr) {
    if (static_cast<int64_t>(index) >= *tile_count) return false;
    tile = tiles[index];
    return true;
  }
  const unsigned groups = static_cast<unsigned>(out.groups), token_tile = index / groups;
  const int64_t left = out.tokens - int64_t{token_tile} * out.width;
  tile.group = static_cast<int32_t>(index - token_tile * groups);
  tile.width = out.width;
  tile.first = static_cast<int32_t>(index * out.width);
  tile.count = static_cast<int32_t>(left < out.width ? left : out.width);
  return true;
}

// FP32 scales of a group's two products.
struct Scales {
  float global[2] = {1.0f, 1.0f};

  __device__ __forceinline__ Scales(const Output& out, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (out.global_scale[half] != nullptr) {
        global[half] = __ldg(out.global_scale[half] + (out.one_global_scale ? 0 : group));
      }
    }
  }
};

// What a column of a tile is multiplied by: its scale, and behind a SwiGLU its weight.
struct ColumnFactors {
  float scale = 1.0f, weight = 1.0f;

  ColumnFactors() = default;
  __device__ __forceinline__ ColumnFactors(const Output& out, const Tile& tile, int column) {
    if (out.column_scale != nullptr) scale = out.column_scale[tile.first + column];
    if (out.store == Store::kSwiglu) weight = out.column_weight[tile.first + column];
  }
  // Those that a lane has.
  __device__ __forceinline__ ColumnFactors From(int lane) const {
    ColumnFactors factors;
    factors.scale = __shfl_sync(0xFFFFFFFFu, scale, lane);
    factors.weight = __shfl_sync(0xFFFFFFFFu, weight, lane);
    return factors;
  }
};

__device__ __forceinline__ float RoundBf16(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

// ClampedSwiglu by the GPU's own powers of two and reciprocals, a fifth of the instructions: within
// 2^-20 of it for gates from -16 on, 2^-18 below. What it makes becomes BF16, which keeps 2^-9.
__device__ __forceinline__ float ExpertSwiglu(float gate, float up, float limit) {
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  float power, sigmoid;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(g, -kLog2E)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(__fadd_rn(1.0f, power)));
  return __fmul_rn(__fmul_rn(g, sigmoid), u);
}

__device__ __forceinline__ float Swiglu(float gate, float up, float limit, float weight) {
  return __fmul_rn(weight, ExpertSwiglu(RoundBf16(gate), RoundBf16(up), limit));
}

__device__ __forceinline__ float2 Swiglu(float2 gate, float2 up, float limit, float weight) {
  const float2 g = __bfloat1622float2(__floats2bfloat162_rn(gate.x, gate.y));
  const float2 u = __bfloat1622float2(__floats2bfloat162_rn(up.x, up.y));
  return {__fmul_rn(weight, ExpertSwiglu(g.x, u.x, limit)),
          __fmul_rn(weight, ExpertSwiglu(g.y, u.y, limit))};
}

// Two rows of a column from an even `row` on, as far as there are.
__device__ __forceinline__ void StoreTwo(const Output& out, void* to, float2 value, bool bf16,
                                         int64_t at, int64_t row) {
  if (row >= out.rows) return;
  const bool both = row + 1 < out.rows;
  if (bf16) {
    __nv_bfloat16* const y = static_cast<__nv_bfloat16*>(to) + at;
    if (both && at % 2 == 0) {
      *reinterpret_cast<__nv_bfloat162*>(y) = __floats2bfloat162_rn(value.x, value.y);
    } else {
      y[0] = __float2bfloat16_rn(value.x);
      if (both) y[1] = __float2bfloat16_rn(value.y);
    }
  } else {
    float* const y = static_cast<float*>(to) + at;
    y[0] = value.x;
    if (both) y[1] = value.y;
  }
}

// Where a tile's columns go, row 0 of each: y[first + column * step].
struct Lines {
  int64_t first, step;

  __device__ __forceinline__ Lines(const Output& out, const Tile& tile, unsigned tile_index)
      : first(tile.first * out.rows), step(out.rows) {
    if (out.store != Store::kTokens) return;
    const uint32_t groups = static_cast<uint32_t>(out.groups);
    const int64_t token = tile_index / groups * int64_t{out.width};
    first = (token * groups + tile.group) * out.rows;
    step = groups * out.rows;
  }
};

}  // namespace dsv4
