// Products with BF16 on both sides: weights decoded with their scales, exactly (tile_gemm_sm90.cu).
#pragma once

#include "common/mma.cuh"
#include "common/tile_feed.cuh"
#include "common/wgmma.cuh"

namespace dsv4 {
namespace tile {

// What a lane reads of its two rows g and g + 8 of a block: 16 bytes a piece. Four MMA steps use
// all of it (kFp8), half of it (4 bits) or two of it (kBf16).
template <WeightForm kForm>
constexpr int kPieces = kForm == WeightForm::kBf16 ? 2 : 1;

template <WeightForm kForm>
using Words = uint4[kPieces<kForm>][2];

template <WeightForm kForm>
__device__ __forceinline__ void Load(Words<kForm>& words, const char* rows, int row, int c,
                                     int piece) {
#pragma unroll
  for (int i = 0; i < kPieces<kForm>; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) words[i][r] = PieceOf(rows, row + 8 * r, piece + i, c);
  }
}

// Four MMA steps' worth: a[step][4].
template <WeightForm kForm>
__device__ __forceinline__ void Decode(uint32_t (&a)[4][4], const Words<kForm>& words,
                                       const char* scales, int row, int c, int group, int stage,
                                       uint32_t fp8_factor, uint32_t fp8_rest) {
  if constexpr (kForm == WeightForm::kFp8) {
    DecodeFp8Rows(a, words[0], fp8_factor, fp8_rest);
    return;
  }
  uint32_t byte[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint4 w = words[0][r];
    if constexpr (kFourBits<kForm>) {
      const int piece = group >> 1, half = group & 1;
      const int at =
          kForm == WeightForm::kNvfp4 ? 8 * piece + 2 * c + half : (stage & 1) * 8 + 4 * piece + c;
      byte[r] = *reinterpret_cast<const uint8_t*>(scales + (row + 8 * r) * kScaleBytes + at);
      const uint32_t factor =
          kForm == WeightForm::kNvfp4 ? E4m3Factor(byte[r]) : BothHalves(Ue8m0Factor(byte[r]));
      DecodeRow(a, r, half ? w.z : w.x, half ? w.w : w.y, factor);
    } else {
      const uint4 v = words[kPieces<kForm> - 1][r];
      a[0][r] = w.x;
      a[0][2 + r] = w.y;
      a[1][r] = w.z;
      a[1][2 + r] = w.w;
      a[2][r] = v.x;
      a[2][2 + r] = v.y;
      a[3][r] = v.z;
      a[3][2 + r] = v.w;
    }
  }
  if (kForm == WeightForm::kMxfp4 && max(byte[0], byte[1]) > 128) {
    MultiplyRest(a, BothHalves(Ue8m0Rest(byte[0])), BothHalves(Ue8m0Rest(byte[1])));
  }
}

// Whether warps multiply by themselves: for eight columns a warpgroup's MMA takes as long as for
// several times as many. The sums are the same bits.
template <int kN>
constexpr bool kByWarps = kN == 8;

// What they read of x for four MMA steps.
__device__ __forceinline__ void LoadColumns(uint32_t (&b)[4][2], uint32_t columns, int group) {
#pragma unroll
  for (int step = 0; step < 4; step += 2) {
    const uint32_t line = (4 * group + step) * 16 + threadIdx.x % 32;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[step][0]), "=r"(b[step][1]), "=r"(b[step + 1][0]), "=r"(b[step + 1][1])
                 : "r"(columns + line * 16)
                 : "memory");
  }
}

template <WeightForm kForm, bool kMany, int kN, typename A>
__device__ __forceinline__ void Multiply(const A& args, Feed<kForm, false, kMany, A>& feed,
                                         const Unit& unit) {
  using Layout = Stage<kForm, false, kMany, A>;
  constexpr int kBlocks = Layout::kBlocks;
  constexpr int kGroups = kStageInputs<kForm> / kStepInputs / 4;
  const int row = LaneRow<Layout>(), c = threadIdx.x % 4;
  float acc[kBlocks][kN / 2];  // by a warpgroup: the first product of each sets it
  uint32_t a[2][4][4];
  Words<kForm> words[kBlocks];
  Fp8ScaleBytes<kForm, Layout> scale_bytes(args, feed, unit);
  if constexpr (kByWarps<kN>) {
#pragma unroll
    for (auto& sums : acc) {
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    }
  }
  bool begun = false;
  while (feed.stage < feed.stages) {
    uint32_t factor[kBlocks] = {}, rest[kBlocks] = {};
    scale_bytes.Take(feed, [&](int block, uint32_t byte) {
      factor[block] = Fp8Factor(byte);
      rest[block] = Fp8Rest(byte);
    });
    const char* here = feed.Here();
    const uint32_t columns = SharedAddress(here) + Layout::kColumnsAt;
    const uint64_t matrices = CoreMatrices(columns, kN * 16);
    [[maybe_unused]] uint32_t b[4][2];
    if constexpr (kGroups > 1) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        Load<kForm>(words[block], here + block * Layout::kRows * kRowBytes, row, c, 0);
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        // Undecoded words are the operand itself: they change when no product reads them any more.
        if constexpr (kGroups == 1) {
          if constexpr (kBlocks == 1 && !kByWarps<kN>) WgmmaWait<0>();
          Load<kForm>(words[block], here + block * Layout::kRows * kRowBytes, row, c, 0);
        }
        // In turns, since products read the operand before.
        auto& operand = a[kBlocks > 1 ? block : group % 2];
        Decode<kForm>(operand, words[block],
                      here + Layout::kScaleAt + block * Layout::kRows * kScaleBytes, row, c, group,
                      feed.stage, factor[block], rest[block]);
        // The next piece, while the tensor cores work.
        constexpr int kPerPiece = kFourBits<kForm> ? 2 : 1;
        if (group + 1 < kGroups && (group + 1) % kPerPiece == 0) {
          Load<kForm>(words[block], here + block * Layout::kRows * kRowBytes, row, c,
                      (group + 1) / kPerPiece);
        }
        if constexpr (kByWarps<kN>) {
          if (block == 0) LoadColumns(b, columns, group);
#pragma unroll
          for (int step = 0; step < 4; ++step) MmaBf16(acc[block], operand[step], b[step]);
          // What the stage before still read is in use.
          if (group == 0 && block + 1 == kBlocks && begun) feed.ReleaseBehind(1, acc[block][0]);
          continue;
        }
        WgmmaFence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          Wgmma<kN, false>::Run(acc[block], operand[step],
                                Further(matrices, (4 * group + step) * kStepInputs * kN * 2),
                                begun || group + step > 0);
        }
        WgmmaCommit();
        WgmmaWait<1>();
        // What the stage before still read is done.
        if (group == 0 && block + 1 == kBlocks && begun) feed.Release(1);
      }
    }
    begun = true;
    feed.Next();
  }
  if constexpr (!kByWarps<kN>) {
    WgmmaWait<0>();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) SettleSums(acc[block]);
  }
  Finish<false, Layout, kN>(args, feed, acc, Weights<kForm>::kUnit, unit);
}

}  // namespace tile
}  // namespace dsv4
