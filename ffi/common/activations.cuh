// Activations on the GPU: quantised, decoded to the exact BF16 values, and laid out for the MMA
// steps of a weight format (common/weights.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/bf16x2.cuh"
#include "common/bits.h"
#include "common/linear.h"
#include "common/nvfp4.cuh"
#include "common/swiglu.h"
#include "common/weights.cuh"

namespace dsv4 {

constexpr int kChunk = 8;  // inputs a lane takes at a time
constexpr int kBatch = 4;  // chunks of a lane on their way at a time

// Largest magnitude among `kLanes` neighbouring lanes, as bits: NaN above all.
template <int kLanes>
__device__ __forceinline__ uint32_t MaxOfLanes(uint32_t bits) {
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
    bits = max(bits, __shfl_xor_sync(0xFFFFFFFFu, bits, half));
  }
  return bits;
}

__device__ __forceinline__ uint32_t MagnitudeOf(const float (&v)[kChunk]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) bits = max(bits, __float_as_uint(v[i]) & 0x7FFFFFFFu);
  return bits;
}

struct Chunk {
  float v[kChunk];
};

// Inputs of any dtype at any address, zeros from `count` on. A call: inline, its code would keep
// the usual path's from lying together in the instruction cache.
static __device__ __noinline__ Chunk LoadPart(const void* x, bool x_float32, int64_t count) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    chunk.v[i] = 0.0f;
    if (i < count) {
      chunk.v[i] = x_float32 ? __ldg(static_cast<const float*>(x) + i)
                             : Bf16ToFloat(__ldg(static_cast<const uint16_t*>(x) + i));
    }
  }
  return chunk;
}

__device__ __forceinline__ void UnpackChunk(const uint4& words, float (&v)[kChunk]) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    v[2 * j] = Low(w[j]);
    v[2 * j + 1] = High(w[j]);
  }
}

// Chunks of `count[i]` inputs, all on their way together; zeros beyond. `whole`: BF16 at multiples
// of 16 bytes, and every count a multiple of eight or less than one.
template <int kChunks>
__device__ __forceinline__ void LoadChunks(const char* const (&x)[kChunks],
                                           const int64_t (&count)[kChunks], bool x_float32,
                                           bool whole, float (&v)[kChunks][kChunk]) {
  if (!whole) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const Chunk part = LoadPart(x[i], x_float32, count[i]);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[i][j] = part.v[j];
    }
    return;
  }
  uint4 words[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    words[i] = make_uint4(0, 0, 0, 0);
    if (count[i] > 0) words[i] = __ldg(reinterpret_cast<const uint4*>(x[i]));
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) UnpackChunk(words[i], v[i]);
}

// Chunks of a row from `at`, and from every `stride` on.
__device__ __forceinline__ void LoadBatch(const void* row, bool x_float32, int64_t at,
                                          int64_t stride, int64_t k, float (&v)[kBatch][kChunk]) {
  const char* x[kBatch];
  int64_t count[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int64_t from = at + i * stride;
    x[i] = static_cast<const char*>(row) + from * (x_float32 ? 4 : 2);
    count[i] = k - from;
  }
  const bool whole = !x_float32 && k % kChunk == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  LoadChunks(x, count, x_float32, whole, v);
}

// A chunk's clamped SwiGLU, rounded to BF16; `v` is the gate.
__device__ __forceinline__ void GateChunk(float (&v)[kChunk], const float (&up)[kChunk],
                                          float limit) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    v[i] = __bfloat162float(__float2bfloat16_rn(ClampedSwiglu(v[i], up[i], limit)));
  }
}

// A row as it lies: chunks on their way together, the first of a batch; then each is finished.
struct PlainRow {
  const void* x;
  bool x_float32;

  using Batch = float[kBatch][kChunk];
  __device__ __forceinline__ void Load(int64_t at, int64_t stride, int64_t k, Batch& batch) const {
    LoadBatch(x, x_float32, at, stride, k, batch);
  }
  __device__ __forceinline__ void Finish(Batch&, int) const {}
};

// One that is the clamped SwiGLU of two in BF16.
struct GatedRow {
  const void *gate, *up;
  float limit;

  using Batch = float[2 * kBatch][kChunk];
  __device__ __forceinline__ void Load(int64_t at, int64_t stride, int64_t k, Batch& batch) const {
    const char* x[2 * kBatch];
    int64_t count[2 * kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t from = at + i * stride;
      x[i] = static_cast<const char*>(gate) + from * 2;
      x[kBatch + i] = static_cast<const char*>(up) + from * 2;
      count[i] = count[kBatch + i] = k - from;
    }
    const bool whole =
        k % kChunk == 0 &&
        (reinterpret_cast<uintptr_t>(gate) | reinterpret_cast<uintptr_t>(up)) % 16 == 0;
    LoadChunks(x, count, false, whole, batch);
  }
  __device__ __forceinline__ void Finish(Batch& batch, int i) const {
    GateChunk(batch[i], batch[kBatch + i], limit);
  }
};

// E4M3 codes of a chunk, and the scale of the 128 inputs around it.
struct Fp8Chunk {
  uint2 codes;
  float scale;
};

// q8 (model.md 4.5) of 128 inputs over 16 lanes.
__device__ __forceinline__ Fp8Chunk EncodeFp8(const float (&v)[kChunk]) {
  const uint32_t largest = MaxOfLanes<16>(MagnitudeOf(v));
  float amax = fminf(fmaxf(__uint_as_float(largest), 1e-4f), kFloat32Max);
  amax = __fmul_rn(amax, 1.0f / kE4m3Max);
  const uint32_t bits = __float_as_uint(amax);
  const uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFFu) != 0);
  const float inverse = __uint_as_float((254 - exponent) << 23);
  uint16_t codes[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk; i += 2) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(codes[i / 2])
        : "f"(__fmul_rn(v[i + 1], inverse)), "f"(__fmul_rn(v[i], inverse)));
  }
  return {make_uint2(codes[0] | static_cast<uint32_t>(codes[1]) << 16,
                     codes[2] | static_cast<uint32_t>(codes[3]) << 16),
          __uint_as_float(largest > 0x7F800000u ? 0x7FC00000u : exponent << 23)};
}

__device__ __forceinline__ void DecodeFp8(const Fp8Chunk& chunk, float (&v)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; i += 2) {
    const uint32_t word = i < 4 ? chunk.codes.x : chunk.codes.y;
    const uint32_t halves = HalvesOfE4m3(i % 4 == 0 ? word : word >> 16);
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(halves));
    v[i] = __fmul_rn(pair.x, chunk.scale);
    v[i + 1] = __fmul_rn(pair.y, chunk.scale);
  }
}

// x that comes as codes, at any address.
__device__ __forceinline__ Fp8Chunk LoadFp8(const uint8_t* code, const uint8_t* scale) {
  uint2 codes = make_uint2(0, 0);
  if (reinterpret_cast<uintptr_t>(code) % kChunk == 0) {
    codes = __ldg(reinterpret_cast<const uint2*>(code));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      (i < 4 ? codes.x : codes.y) |= uint32_t{__ldg(code + i)} << i % 4 * 8;
    }
  }
  return {codes, DecodeUe8m0(__ldg(scale))};
}

// The nearest E2M1 magnitude, ties to even: rounded where a number's last place is as large as the
// steps of E2M1 there. NaN becomes 6, as its code does (common/e2m1.h).
__device__ __forceinline__ float NearestE2m1(float magnitude) {
  const float big = magnitude < 2.0f ? 0x1.8p22f : magnitude < 4.0f ? 0x1.8p23f : 0x1.8p24f;
  return fminf(__fsub_rn(__fadd_rn(magnitude, big), big), kE2m1Max);
}

// NVFP4 (model.md 9.2) of 16 inputs over two lanes: code * block scale, without `global`.
__device__ __forceinline__ void RoundNvfp4(float (&v)[kChunk], float global) {
  const float amax = __uint_as_float(MaxOfLanes<2>(MagnitudeOf(v)));
  const float six_global = __fmul_rn(kE2m1Max, global);
  const float block = DecodeE4m3Native(EncodeE4m3Native(UnroundedBlockScale(amax, six_global)));
  const float step = __fmul_rn(block, global), inverse = RoughReciprocal(step);
  // Ties lie at quarters from 0.25 to 5: only near one does the quotient's rounding matter.
  constexpr float kIntegers = 0x1.8p23f;
  float quotient[kChunk];
  bool near = false;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    quotient[i] = __fmul_rn(fabsf(v[i]), inverse);
    const float quarters = __fmul_rn(quotient[i], 4.0f);
    const float whole = __fsub_rn(__fadd_rn(quarters, kIntegers), kIntegers);
    near |= fabsf(__fsub_rn(quarters, whole)) <= 1e-4f && quarters > 0.5f && quarters < 20.5f;
  }
  if (near) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) quotient[i] = __fdiv_rn(fabsf(v[i]), step);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    v[i] = __fmul_rn(copysignf(NearestE2m1(quotient[i]), v[i]), block);
  }
}

// Rows are the work of teams of kLanes lanes: of a whole warp, or of half a warp, so that two rows
// side by side fill the memory's sectors together. A team without a row comes along with k = 0.

// Largest magnitude of a row, or of every `step_chunks`-th of a team's chunks of it.
template <int kLanes, typename Row>
__device__ __forceinline__ uint32_t RowMagnitude(const Row& row, int64_t k, int first = 0,
                                                 int step_chunks = 1) {
  uint32_t largest = 0;
  const int stride = step_chunks * kLanes * kChunk;
  const int64_t begin = (first * kLanes + threadIdx.x % kLanes) * kChunk;
  for (int64_t at = begin; at < k; at += kBatch * stride) {
    typename Row::Batch batch;
    row.Load(at, stride, k, batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      row.Finish(batch, i);
      largest = max(largest, MagnitudeOf(batch[i]));
    }
  }
  return MaxOfLanes<kLanes>(largest);
}

__device__ __forceinline__ void RoundChunk(float (&v)[kChunk], ActForm act, float global) {
  if (act == ActForm::kFp8) DecodeFp8(EncodeFp8(v), v);
  if (act == ActForm::kNvfp4) RoundNvfp4(v, global);
}

// The i-th of a chunk's four pairs, in the order of a lane's MMA positions.
template <WeightForm kForm>
__device__ __forceinline__ uint32_t PairOf(const float (&v)[kChunk], int i) {
  int first = 2 * i, second = first + 1;
  if (kForm == WeightForm::kFp8) first = i / 2 * 4 + i % 2, second = first + 2;
  if (kForm == WeightForm::kMxfp4 || kForm == WeightForm::kNvfp4) first = i, second = i + 4;
  return PackBf16(v[first], v[second]);
}

// A 4 x 4 transposition of words among lanes c = 0..3 that lie 2^kShift apart.
template <int kShift>
__device__ __forceinline__ void Transpose(uint32_t (&w)[4], int c) {
  const bool odd = c & 1, high = c & 2;
  const uint32_t a = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[0] : w[1], 1 << kShift);
  const uint32_t b = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[2] : w[3], 1 << kShift);
  (odd ? w[0] : w[1]) = a;
  (odd ? w[2] : w[3]) = b;
  const uint32_t d = __shfl_xor_sync(0xFFFFFFFFu, high ? w[0] : w[2], 2 << kShift);
  const uint32_t e = __shfl_xor_sync(0xFFFFFFFFu, high ? w[1] : w[3], 2 << kShift);
  (high ? w[0] : w[2]) = d;
  (high ? w[1] : w[3]) = e;
}

// A chunk is laid out by lanes that hold the same four pairs (or words of codes) of a piece's lanes
// c: they trade them for whole lines of 16 bytes.
template <WeightForm kForm>
constexpr int kLineShift = kForm == WeightForm::kBf16  ? 0
                           : kForm == WeightForm::kFp8 ? 1
                                                       : 2;

// The lane's line of a rounded chunk, for products in BF16.
template <WeightForm kForm>
__device__ __forceinline__ uint4 LineOf(const float (&v)[kChunk], int lane) {
  uint32_t pairs[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) pairs[p] = PairOf<kForm>(v, p);
  Transpose<kLineShift<kForm>>(pairs, lane >> kLineShift<kForm> & 3);
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Which line of its column that is, of a chunk whose inputs begin at `at`.
template <WeightForm kForm, typename Int>
__device__ __forceinline__ Int LineAt(Int at, int lane) {
  constexpr int kShift = kLineShift<kForm>;
  const int c = lane >> kShift & 3, low = lane & ((1 << kShift) - 1);
  const Int step = at / Weights<kForm>::kPieceInputs * Weights<kForm>::kSteps + 2 * low + (c >> 1);
  return 2 * step + (c & 1);
}

// The same for products with E4M3 on both sides: 8-bit weights take inputs as they come; of 4 bits,
// lanes c = 0, 1 have the codes. And the scale of 128 inputs.
struct Fp8Line {
  uint4 codes;
  float scale;
};

template <WeightForm kForm>
__device__ __forceinline__ Fp8Line Fp8LineOf(const Fp8Chunk& chunk, int lane) {
  uint32_t words[4] = {chunk.codes.x, chunk.codes.y, 0, 0};
  if constexpr (kForm != WeightForm::kFp8) {
    // Codes 0..3 go to the lower 16 inputs of an MMA step, 4..7 to the upper.
    Transpose<kLineShift<kForm>>(words, lane >> kLineShift<kForm> & 3);
  }
  return {make_uint4(words[0], words[1], words[2], words[3]), chunk.scale};
}

// Inputs of a stage, which the columns' scales follow.
template <WeightForm kForm>
constexpr int kFp8Stage = kForm == WeightForm::kFp8 ? 128 : 256;

// Into column `column` of a stage, from its input `in` on.
template <WeightForm kForm>
__device__ __forceinline__ void StoreFp8Line(const Fp8Line& line, uint8_t* stage, int in, int width,
                                             int column, int lane) {
  if (lane % 16 == 0) {
    float* const scales = reinterpret_cast<float*>(stage + kFp8Stage<kForm> * width);
    const int place = kForm == WeightForm::kFp8 ? column : ScalePlace(width, column);
    scales[in / 128 * width + place] = line.scale;
  }
  if constexpr (kForm == WeightForm::kFp8) {
    *reinterpret_cast<uint2*>(stage + (in / 16 * width + column) * 16 + in % 16) =
        make_uint2(line.codes.x, line.codes.y);
  } else {
    const int c = lane >> kLineShift<kForm> & 3;
    if (c > 1) return;
    // 32 inputs a step: a piece of 64 bytes has 4.
    const int step = in / 128 * 4 + (lane & 3);
    *reinterpret_cast<uint4*>(stage + ((2 * step + c) * width + column) * 16) = line.codes;
  }
}

// One row: rounded, and laid out as column `column` of a tile of `width`.
template <WeightForm kForm, int kLanes, typename Row>
__device__ __forceinline__ void StoreRow(const Row& row, int64_t k, int64_t padded, ActForm act,
                                         float global, int width, int column, uint16_t* tile,
                                         int first, int step_chunks) {
  constexpr int kTeamChunk = kLanes * kChunk;
  const int lane = threadIdx.x % kLanes;
  const int stride = step_chunks * kTeamChunk;
  for (int64_t base = first * kTeamChunk; base < padded; base += kBatch * stride) {
    typename Row::Batch batch;
    row.Load(base + lane * kChunk, stride, k, batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = base + i * stride + lane * kChunk;
      if (base + i * stride >= padded) break;
      row.Finish(batch, i);
      RoundChunk(batch[i], act, global);
      const uint4 line = LineOf<kForm>(batch[i], lane);
      if (at >= padded || k == 0) continue;
      *reinterpret_cast<uint4*>(tile + (LineAt<kForm>(at, lane) * width + column) * 8) = line;
    }
  }
}

// The same as E4M3 codes, stage by stage.
template <WeightForm kForm, int kLanes, typename Row>
__device__ __forceinline__ void StoreFp8Row(const Row& row, int64_t k, int64_t padded, int width,
                                            int column, uint8_t* tile, int first, int step_chunks) {
  constexpr int kTeamChunk = kLanes * kChunk, kStage = kFp8Stage<kForm>;
  const int lane = threadIdx.x % kLanes;
  const int stride = step_chunks * kTeamChunk;
  for (int64_t base = first * kTeamChunk; base < padded; base += kBatch * stride) {
    typename Row::Batch batch;
    row.Load(base + lane * kChunk, stride, k, batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = base + i * stride + lane * kChunk;
      if (base + i * stride >= padded) break;
      row.Finish(batch, i);
      const Fp8Line line = Fp8LineOf<kForm>(EncodeFp8(batch[i]), lane);
      if (at >= padded || k == 0) continue;
      StoreFp8Line<kForm>(line, tile + at / kStage * kStage / 32 * 33 * width,
                          static_cast<int>(at % kStage), width, column, lane);
    }
  }
}

// One row of `padded` codes, a multiple of 128, with their scales: laid out as either does.
template <WeightForm kForm, bool kFp8Mma, int kLanes>
__device__ __forceinline__ void StoreCodes(const uint8_t* row, const uint8_t* scale, bool there,
                                           int64_t padded, int width, int column, char* tile,
                                           int first, int step_chunks) {
  constexpr int kTeamChunk = kLanes * kChunk, kStage = kFp8Stage<kForm>;
  static_assert(kTeamChunk == 128);
  const int lane = threadIdx.x % kLanes;
  const int stride = step_chunks * kTeamChunk;
  for (int64_t first_base = first * kTeamChunk; first_base < padded;
       first_base += kBatch * stride) {
    Fp8Chunk chunks[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t base = first_base + i * stride;
      if (there && base < padded) {
        chunks[i] = LoadFp8(row + base + lane * kChunk, scale + base / 128);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t base = first_base + i * stride, at = base + lane * kChunk;
      if (base >= padded) break;
      if constexpr (kFp8Mma) {
        const Fp8Line line = Fp8LineOf<kForm>(chunks[i], lane);
        if (!there) continue;
        uint8_t* const stage =
            reinterpret_cast<uint8_t*>(tile) + at / kStage * kStage / 32 * 33 * width;
        StoreFp8Line<kForm>(line, stage, static_cast<int>(at % kStage), width, column, lane);
      } else {
        float v[kChunk];
        DecodeFp8(chunks[i], v);
        const uint4 line = LineOf<kForm>(v, lane);
        if (!there) continue;
        reinterpret_cast<uint4*>(tile)[LineAt<kForm>(at, lane) * width + column] = line;
      }
    }
  }
}

}  // namespace dsv4
