// The kernels for every size and GPU: right, not fast. As many queries at a time as scratch has
// room for the scores of. A thread block scores kKeys entries of one query: keys decoded in shared
// memory, a key to a lane, heads shared among warps, whose sums are added in their order. Then a
// thread block chooses: it finds the order of the k-th best score byte by byte, from counts, and
// takes what is above it and, of what is equal, the lowest ids, writing places by prefix sums.
// index_topk_sm90.cu is the fast one.
#include <cuda_runtime.h>

#include "common/bits.h"
#include "common/cuda.h"
#include "common/e4m3.h"
#include "common/weights.cuh"
#include "index_topk/index_topk.h"
#include "index_topk/index_topk_order.h"

namespace dsv4 {
namespace {

constexpr int kKeys = 32;  // of a thread block, one a lane
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBins = 256;
constexpr int kChooseThreads = 1024;
constexpr int64_t kMostRows = 65535;  // of a grid's second axis

static_assert(kBins <= kChooseThreads);

// Queries first .. first + gridDim.y - 1 and their scores: row i of `scores` is that of query
// first + i.
struct Chunk {
  int64_t first;
  float* scores;  // [rows, slots]
};

// Shared memory in floats: keys [kKeys, d + 1], a query's head per warp [d], sums [kWarps, kKeys].
size_t SharedBytes(int64_t d) {
  return sizeof(float) * (kKeys * (d + 1) + kWarps * d + kWarps * kKeys);
}

// Channel c of row `row`.
__device__ __forceinline__ float Value(const IndexTopkParams& p, const uint8_t* code,
                                       const uint8_t* scale, int64_t row, int64_t c) {
  if (p.form == IndexForm::kFp8) {
    return DecodeE4m3(code[row * p.d + c]) * DecodeUe8m0(scale[row]);
  }
  const uint32_t nibble = code[(row * p.d + c) / 2] >> c % 2 * 4 & 15;
  const float magnitude = E2m1Magnitude(nibble);
  return (nibble & 8 ? -magnitude : magnitude) * DecodeUe8m0(scale[(row * p.d + c) / 32]);
}

__global__ void __launch_bounds__(kThreads)
    IndexScoresKernel(const __grid_constant__ IndexTopkParams p, const Chunk chunk) {
  extern __shared__ float shared[];
  const int64_t token = chunk.first + blockIdx.y, b = token / p.t, d = p.d;
  const int64_t visible = VisibleEntries(p, token), at = int64_t{blockIdx.x} * kKeys;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* scores = chunk.scores + blockIdx.y * p.slots;
  if (at >= visible || !NeedsScores(p, token)) {
    if (p.scores != nullptr && warp == 0 && at + lane < p.slots) {
      scores[at + lane] = FloatFromBits(0xFF800000u);
    }
    return;
  }
  float* keys = shared;
  float* q = shared + kKeys * (d + 1) + warp * d;
  float* sums = shared + kKeys * (d + 1) + kWarps * d;
  for (int i = warp; i < kKeys; i += kWarps) {
    const int64_t row = b * p.slots + at + i;
    for (int64_t c = lane; c < d; c += 32) {
      keys[i * (d + 1) + c] = at + i < visible ? Value(p, p.key, p.key_scale, row, c) : 0.0f;
    }
  }
  __syncthreads();
  float sum = 0;
  for (int64_t head = warp; head < p.h; head += kWarps) {
    const int64_t row = token * p.h + head;
    __syncwarp();
    for (int64_t c = lane; c < d; c += 32) q[c] = Value(p, p.q, p.q_scale, row, c);
    __syncwarp();
    float dot = 0;
    for (int64_t c = 0; c < d; ++c) dot += q[c] * keys[lane * (d + 1) + c];
    sum += (dot < 0.0f ? 0.0f : dot) * IndexWeight(p, IndexWeightBits(p, row));  // NaN stays
  }
  sums[warp * kKeys + lane] = sum;
  __syncthreads();
  if (warp != 0 || at + lane >= p.slots) return;
  float score = sums[lane];
  for (int w = 1; w < kWarps; ++w) score += sums[w * kKeys + lane];
  if (at + lane < visible) {
    scores[at + lane] = score;
  } else if (p.scores != nullptr) {
    scores[at + lane] = FloatFromBits(0xFF800000u);
  }
}

// Inclusive sums over the threads of a block, in their order, and of all of them.
struct Scanned {
  uint32_t mine, all;
};

__device__ Scanned Scan(uint32_t x) {
  __shared__ uint32_t totals[kChooseThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, x, lanes);
    if (lane >= lanes) x += before;
  }
  __syncthreads();  // totals of the scan before have been read
  if (lane == 31) totals[warp] = x;
  __syncthreads();
  uint32_t all = 0, before = 0;
  for (int w = 0; w < kChooseThreads / 32; ++w) {
    before += w < warp ? totals[w] : 0;
    all += totals[w];
  }
  return {x + before, all};
}

// The order of the k-th best of n > k scores, and how many of the k are equal to it.
struct Bar {
  uint32_t order;
  int64_t equal;
};

__device__ Bar FindBar(const float* scores, int64_t n, int64_t k) {
  __shared__ uint32_t bins[kBins];
  __shared__ uint32_t found, left;
  uint32_t order = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();  // bins and results of the byte before have been read
    if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kChooseThreads) {
      const uint32_t each = ScoreOrder(scores[i]);
      // The bytes above are those of the bar.
      if (((each ^ order) >> shift) < kBins) atomicAdd(&bins[each >> shift & (kBins - 1)], 1u);
    }
    __syncthreads();
    // Sums from the largest byte down; the bar's is where they reach k.
    const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
    const uint32_t count = bin >= 0 ? bins[bin] : 0;
    const uint32_t above = Scan(count).mine - count;
    if (above < k && above + count >= k) {
      found = static_cast<uint32_t>(bin);
      left = above;
    }
    __syncthreads();
    order |= found << shift;
    k -= left;
  }
  return {order, k};
}

__global__ void __launch_bounds__(kChooseThreads)
    IndexChooseKernel(const __grid_constant__ IndexTopkParams p, const Chunk chunk) {
  const int64_t token = chunk.first + blockIdx.x, n = VisibleEntries(p, token);
  const float* scores = chunk.scores + blockIdx.x * p.slots;
  int32_t* idx = p.idx + token * p.topk;
  const int64_t chosen = n < p.topk ? n : p.topk;
  for (int64_t i = chosen + threadIdx.x; i < p.topk; i += kChooseThreads) idx[i] = -1;
  if (n <= p.topk) {
    for (int64_t i = threadIdx.x; i < n; i += kChooseThreads) idx[i] = static_cast<int32_t>(i);
    return;
  }
  const Bar bar = FindBar(scores, n, p.topk);
  int64_t above = 0, equal = 0;  // before this stretch
  for (int64_t at = 0; at < n; at += kChooseThreads) {
    const int64_t i = at + threadIdx.x;
    const uint32_t order = i < n ? ScoreOrder(scores[i]) : 0;
    const bool over = i < n && order > bar.order, same = i < n && order == bar.order;
    const Scanned counts = Scan((over ? 1u : 0u) | (same ? 1u << 16 : 0u));
    const int64_t over_here = above + (counts.mine & 0xFFFFu) - (over ? 1 : 0);
    const int64_t same_here = equal + (counts.mine >> 16) - (same ? 1 : 0);
    if (over || (same && same_here < bar.equal)) {
      idx[over_here + (same_here < bar.equal ? same_here : bar.equal)] = static_cast<int32_t>(i);
    }
    above += counts.all & 0xFFFFu;
    equal += counts.all >> 16;
  }
}

}  // namespace

cudaError_t IndexTopkCuda(const IndexTopkParams& params, cudaStream_t stream) {
#ifdef DSV4_SM90
  if (IndexTopkSm90Takes(params) && IndexTopkSm90ScratchBytes(params) <= params.scratch_bytes &&
      OnHopper()) {
    return IndexTopkSm90(params, stream);
  }
#endif
  const int64_t queries = params.b * params.t, row = sizeof(float) * params.slots;
  if (queries == 0) return cudaSuccess;
  const size_t bytes = SharedBytes(params.d);
  const cudaError_t error = cudaFuncSetAttribute(
      IndexScoresKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const bool kept = params.scores != nullptr;
  const int64_t room = kept || row == 0 ? queries : params.scratch_bytes / row;
  const int64_t most = room < kMostRows ? room : kMostRows;
  const auto blocks = static_cast<unsigned>((params.slots + kKeys - 1) / kKeys);
  for (int64_t first = 0; first < queries; first += most) {
    const auto rows = static_cast<unsigned>(queries - first < most ? queries - first : most);
    Chunk chunk{first, static_cast<float*>(params.scratch)};
    if (kept) chunk.scores = params.scores + first * params.slots;
    if (blocks > 0) {
      IndexScoresKernel<<<dim3(blocks, rows), kThreads, bytes, stream>>>(params, chunk);
    }
    if (params.topk > 0) {
      IndexChooseKernel<<<rows, kChooseThreads, 0, stream>>>(params, chunk);
    }
  }
  return cudaGetLastError();
}

}  // namespace dsv4
