// The kernel for every size and GPU: right, not fast. A thread block takes one token and a few
// heads, a warp each; it decodes kKeys keys into shared memory, twice: for the largest score, then,
// with that as the base of every exponent, for denominator and value sum. Keys come in their order
// (window by position, then entries by place; skipped places count as keys that weigh nothing).
// attention_sm90.cu is the fast one.
#include <cuda_runtime.h>

#include "attention/attention.h"
#include "attention/attention_keys.h"
#include "common/bits.h"
#include "common/cuda.h"
#include "common/e4m3.h"
#include "common/exp.h"
#include "common/rope.h"
#include "common/weights.cuh"

namespace dsv4 {
namespace {

constexpr int kHeads = 4;  // warps of a thread block
constexpr int kKeys = 16;  // keys in shared memory at a time
constexpr int kThreads = 32 * kHeads;

// Shared memory: keys [kKeys, d] BF16, q and value [kHeads, d] FP32 each.
size_t SharedBytes(int64_t d) { return d * (2 * kKeys + 8 * kHeads); }

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

__device__ __forceinline__ uint16_t KeyChannel(const AttentionParams& p, const KeyRow& key,
                                               int64_t c) {
  const KeyRows& rows = *key.rows;
  if (c >= p.nope) return rows.rope[key.row * rows.stride_rope + c - p.nope];
  const float scale = DecodeUe8m0(rows.scale[key.row * rows.stride_scale + c / 64]);
  return FloatToBf16(DecodeE4m3(rows.nope[key.row * rows.stride_nope + c]) * scale);
}

// The keys of a query by number: its window, then the places of its entries.
struct QueryKeys {
  const AttentionParams& p;
  int64_t b, token;
  WindowKeys window;
  int64_t count;

  __device__ QueryKeys(const AttentionParams& params, int64_t token)
      : p(params),
        b(token / params.t),
        token(token),
        window(VisibleWindow(params, b, params.positions[token])),
        count(window.count + EntryPlaces(params, token)) {}

  __device__ bool Row(int64_t i, KeyRow& row) const {
    if (i >= window.count) return EntryRow(p, b, token, i - window.count, row);
    row = WindowRow(p, b, window.first + i);
    return true;
  }
};

// The score of one key, by a warp.
__device__ __forceinline__ float Score(const float* q, const uint16_t* key, int64_t d,
                                       float scale) {
  float dot = 0;
  for (int64_t c = threadIdx.x % 32; c < d; c += 32) dot += q[c] * Bf16ToFloat(key[c]);
  return WarpSum(dot) * scale;
}

// A warp's sums over keys of shared memory, those of the mask.
__device__ void AddKeys(const uint16_t* keys, uint32_t mask, int64_t d, float scale, float base,
                        const float* q, float* norm, float* value) {
  float e[kKeys];
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    e[u] = 0;
    if (!(mask >> u & 1)) continue;
    const float exact = Exp(Score(q, keys + u * d, d, scale) - base);
    *norm += exact;
    e[u] = Bf16ToFloat(FloatToBf16(exact));
  }
  for (int64_t c = threadIdx.x % 32; c < d; c += 32) {
    float sum = value[c];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      if (mask >> u & 1) sum += e[u] * Bf16ToFloat(keys[u * d + c]);
    }
    value[c] = sum;
  }
}

// o of one head, rotated back; a pair of channels at a time.
__device__ void Store(const AttentionParams& p, int64_t token, int64_t head, const float* value,
                      float norm) {
  const float divisor = norm == 0.0f ? 1.0f : norm;
  const int64_t d = p.nope + p.rope;
  uint16_t* o = p.o + token * p.stride_o + head * d;
  for (int64_t c = 2 * (threadIdx.x % 32); c < d; c += 64) {
    const uint16_t even = FloatToBf16(value[c] / divisor);
    const uint16_t odd = FloatToBf16(value[c + 1] / divisor);
    o[c] = even;
    o[c + 1] = odd;
    if (c < p.nope || p.frequencies == nullptr) continue;
    const SinCos turn = SinCosAt(p.positions[token], p.frequencies[(c - p.nope) / 2]);
    const Pair back = Turned(Bf16ToFloat(even), Bf16ToFloat(odd), {-turn.sin, turn.cos});
    o[c] = FloatToBf16(back.even);
    o[c + 1] = FloatToBf16(back.odd);
  }
}

// Keys first .. first + kKeys - 1 of a query into shared memory; which of them there are.
__device__ uint32_t LoadKeys(const QueryKeys& query, int64_t first, int64_t d, uint16_t* keys) {
  __shared__ KeyRow rows[kKeys];
  __shared__ uint32_t mask;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the keys before have been read
  if (warp == 0) {
    const bool any =
        lane < kKeys && first + lane < query.count && query.Row(first + lane, rows[lane % kKeys]);
    const uint32_t found = __ballot_sync(~0u, any);
    if (lane == 0) mask = found;
  }
  __syncthreads();
  const uint32_t present = mask;
  for (int u = warp; u < kKeys; u += kHeads) {
    if (!(present >> u & 1)) continue;
    for (int64_t c = lane; c < d; c += 32) keys[u * d + c] = KeyChannel(query.p, rows[u], c);
  }
  __syncthreads();
  return present;
}

__global__ void __launch_bounds__(kThreads)
    AttentionKernel(const __grid_constant__ AttentionParams p, float scale) {
  extern __shared__ __align__(16) uint8_t shared[];
  const int64_t d = p.nope + p.rope, groups = (p.h + kHeads - 1) / kHeads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* q = reinterpret_cast<float*>(shared) + warp * d;
  float* value = q + kHeads * d;
  uint16_t* keys = reinterpret_cast<uint16_t*>(shared + 8 * kHeads * d);
  for (int64_t item = blockIdx.x; item < p.b * p.t * groups; item += gridDim.x) {
    const int64_t token = item / groups, head = item % groups * kHeads + warp;
    const bool mine = head < p.h;
    const QueryKeys query(p, token);
    float top = mine ? p.sink[head] : 0.0f, norm = 0;
    for (int64_t c = lane; mine && c < d; c += 32) {
      q[c] = Bf16ToFloat(p.q[token * p.stride_q + head * d + c]);
      value[c] = 0;
    }
    __syncwarp();
    for (int64_t first = 0; first < query.count; first += kKeys) {
      const uint32_t present = LoadKeys(query, first, d, keys);
      for (int u = 0; mine && u < kKeys; ++u) {
        if (!(present >> u & 1)) continue;
        const float score = Score(q, keys + u * d, d, scale);
        top = score > top ? score : top;
      }
    }
    for (int64_t first = 0; first < query.count; first += kKeys) {
      const uint32_t present = LoadKeys(query, first, d, keys);
      if (mine) AddKeys(keys, present, d, scale, ExponentBase(top), q, &norm, value);
    }
    __syncwarp();
    if (mine) {
      norm += Exp(p.sink[head] - ExponentBase(top));
      Store(p, token, head, value, norm);
      if (p.lse != nullptr && lane == 0) p.lse[token * p.h + head] = ExponentBase(top) + logf(norm);
    }
    __syncwarp();
  }
}

constexpr int64_t kMostBlocks = 1 << 20;

}  // namespace

cudaError_t AttentionCuda(const AttentionParams& params, cudaStream_t stream) {
#ifdef DSV4_SM90
  // Its weights are rounded relative to the largest score so far, not of all.
  const bool exact = params.regime == Regime::kExact;
  if (!exact && AttentionSm90Takes(params) && OnHopper()) return AttentionSm90(params, stream);
#endif
  const int64_t d = params.nope + params.rope;
  const int64_t items = params.b * params.t * ((params.h + kHeads - 1) / kHeads);
  if (items == 0) return cudaSuccess;
  const size_t bytes = SharedBytes(d);
  const cudaError_t error = cudaFuncSetAttribute(
      AttentionKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const auto scale = static_cast<float>(1.0 / sqrt(static_cast<double>(d)));
  const auto blocks = static_cast<unsigned>(AtMost(items, kMostBlocks));
  AttentionKernel<<<blocks, kThreads, bytes, stream>>>(params, scale);
  return cudaGetLastError();
}

}  // namespace dsv4
