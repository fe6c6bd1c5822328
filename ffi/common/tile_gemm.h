// The tile kernel: weights times tiles of tokens on Hopper's warpgroup MMA (tile_gemm_sm90.cu), for
// the linears and the experts. Knows nothing of XLA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/linear.h"

namespace dsv4 {

// Columns of one product: tokens of a call, or slots of one expert.
struct alignas(16) Tile {
  int32_t group;  // which [rows, inputs] of the weights
  int32_t
      first;  // first column, counted over all tiles; x of the tile begins at first columns' size
  int32_t width;  // columns laid out: 8, 16, 32, 64, 80, 96, 112 or 128, or as ManyWidth has them
  int32_t count;  // columns that mean something
};

constexpr int kMaxTileWidth = 128;
constexpr int kFewWidth = 32;  // of tiles whose kernel is made for latency
constexpr int kRawWidth = 8;   // of tiles whose kernel can lay out x itself

inline __host__ __device__ int TileWidth(int count) {
  return count <= 8    ? 8
         : count <= 16 ? 16
         : count <= 64 ? (count + 31) / 32 * 32
                       : (count + 15) / 16 * 16;
}

// Picks of tokens by the router, each a tile of its own: of so few tokens that experts hardly meet.
struct Picks {
  const int32_t* expert;  // [tokens * of_token], or nullptr: tiles are others
  const uint8_t* valid;   // [tokens]
  int64_t first_expert, experts;
  int32_t of_token;
  bool share_x;  // all of a token
};

#ifdef __CUDACC__
// The pick's expert among ours, or -1.
__device__ __forceinline__ int ExpertOf(const Picks& picks, uint32_t pick) {
  const int64_t expert = int64_t{__ldg(picks.expert + pick)} - picks.first_expert;
  const uint32_t token = pick / static_cast<uint32_t>(picks.of_token);
  const bool ours = __ldg(picks.valid + token) != 0 && expert >= 0 && expert < picks.experts;
  return ours ? static_cast<int>(expert) : -1;
}
#endif

// Of a product that ManyGemmTakes: finer where tiles of a prefill are.
inline __host__ __device__ int ManyWidth(int count) {
  const int eights = (count + 7) / 8 * 8;
  return eights == 88 || eights == 104 ? eights : TileWidth(count);
}

// How x comes.
enum class Input : int32_t {
  kPlain,
  kCodes,  // E4M3, with scales
  kGated,  // the gate of a clamped SwiGLU, with `up`
};

enum class Store : int32_t {
  kTokens,  // y[token, group * rows + row]; tiles are (tokens, group) in that order
  kSlots,   // y[column, row], BF16
  kSwiglu,  // y[column, row] = bf(weight * swiglu(bf(first), bf(second))), BF16
};

struct TileGemm {
  WeightForm form;
  Store store;
  const void* weight[2];  // [groups, rows, inputs]; kSwiglu: w1 and w3, else the same twice
  const uint8_t* scale[2];
  const float* global_scale[2];  // kNvfp4: [groups] or [1]
  bool one_global_scale;
  int64_t groups, rows, inputs;
  int64_t padded_inputs;  // of x: a multiple of 128
  const void* x;          // tiles of columns in MMA order: BF16, or E4M3 and scales
  bool fp8_mma;       // by E4M3 on both sides: kFp8, kMxfp4, kNvfp4 of powers of two; Hopper only
  const void* raw_x;  // kRawWidth, kTokens: BF16 [tokens, groups, inputs] in place of `x`, which
                      // the kernel then lays out itself, or nullptr. Of picks: [tokens or picks,
                      // inputs]
  const uint8_t* raw_scale;    // kFp8, where raw_x is E4M3: UE8M0 [tokens, groups, inputs / 128]
  const void* raw_up;          // kFp8, kNvfp4, where raw_x is the gate of a SwiGLU: as raw_x
  ActForm act;                 // of raw_x
  const float* act_scale;      // of raw_x, kNvfp4: [1], of picks [groups]; or nullptr: its own
  Picks picks;                 // of raw_x: tiles in place of `tiles`
  bool weights_first;          // of raw_x: the kernel just ahead does not write the weights
  const float* column_scale;   // [columns] or nullptr
  const float* column_weight;  // kSwiglu: [columns]
  float limit;                 // kSwiglu, raw_up
  void* y;
  bool y_bf16;
  int64_t tokens;     // kTokens
  int width;          // kTokens: of every tile; else the largest there may be
  const Tile* tiles;  // kSlots, kSwiglu: with their number; nullptr for kTokens
  const int32_t* tile_count;
  bool new_tiles;     // the kernel just ahead writes them
  int64_t max_tiles;  // of all groups together
  bool split;         // thread blocks share the inputs where there are few rows
};

// Thread blocks of 128 rows, and how many share the inputs of each: as many as the shape of the
// weights asks for, so that the order of sums does not depend on the tokens.
int64_t TileGemmRowBlocks(const TileGemm& gemm);
int TileGemmSplit(const TileGemm& gemm);

// Thread blocks, in clusters, of which each finds a multiprocessor of its own: those of a cluster
// are neighbours, of whom some have no use for the rest.
inline int64_t MostAlone(int cluster) { return cluster > 2 ? 112 : cluster > 1 ? 128 : 132; }

// Whether the Hopper kernel takes these shapes and addresses.
bool TileGemmTakes(const TileGemm& gemm);

// Products that differ in weight, scales of it, rows, y and its dtype alone, and agree on
// TileGemmSplit: of x that is laid out, and by the kernel that lays out raw_x.
cudaError_t TileGemmSm90(const TileGemm* gemms, int count, cudaStream_t stream);
cudaError_t RawGemmSm90(const TileGemm* gemms, int count, cudaStream_t stream);

// Whether the Hopper kernel is there, for this device, and takes the product.
bool HopperTakes(const TileGemm& gemm);

// Of more than kFewWidth columns, by the Hopper kernel: whether tiles may have a ManyWidth.
bool ManyGemmTakes(const TileGemm& gemm);

// Bytes of a column of x.
inline __host__ __device__ int64_t ColumnBytes(bool fp8_mma, int64_t padded_inputs) {
  return fp8_mma ? padded_inputs + padded_inputs / 32 : 2 * padded_inputs;
}

// By the Hopper kernel where it can be, else by one that takes anything; products as TileGemmSm90
// takes them, all or none of which it does.
cudaError_t RunTileGemms(const TileGemm* gemms, int count, cudaStream_t stream);

// Linears of one x (LinearsParams) as tiles of tokens: x into its order, then the products; of few
// tokens all in one, as far as their inputs are shared alike. Many BF16 tokens go to
// bf16_prefill.h.
cudaError_t LinearTiles(WeightForm form, const LinearParams* parts, int n_parts,
                        cudaStream_t stream);

}  // namespace dsv4
