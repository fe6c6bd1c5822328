// A warp per token: scores, picks by k rounds of a maximum, ids in order, weights. Of few tokens
// the scores are a thread block's work.
#include <cuda_runtime.h>

#include "common/barrier.cuh"
#include "router/router.h"

namespace dsv4 {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kWarps = 4;
constexpr int kFewThreads = 256;
constexpr int64_t kFewTokens = 256;  // about two thread blocks an SM
constexpr int kPerLane = kRouterMaxExperts / 32;

// kCount experts of a lane: ids lane, lane + 32, ...
template <int kCount, bool kFew>
__global__ void __launch_bounds__(kFew ? kFewThreads : 32 * kWarps)
    RouterKernel(const __grid_constant__ RouterParams p) {
  // What the memory is slow to bring while others' weights are on their way.
  const int64_t ahead = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 32;
  if (p.bias != nullptr && ahead < p.experts) Prefetch(p.bias + ahead);
  // The experts, who can do nothing before this has ended, must not take the SMs from what runs
  // beside: they begin when the product has ended.
  WaitForPrevious();
  LetNextBegin();
  const int lane = threadIdx.x % 32;
  const int64_t token = kFew ? blockIdx.x : int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (token >= p.t) return;
  const float* logits = p.logits + token * p.experts;
  const int experts = static_cast<int>(p.experts), k = static_cast<int>(p.k);
  const auto key_of = [&](int expert) {
    return expert < experts ? RouterKey(RouterScore(logits[expert]) + p.bias[expert], expert) : 0;
  };
  __shared__ uint64_t keys[kFew ? 32 * kCount : 1];
  if constexpr (kFew) {
    if (p.given_idx == nullptr) {
      for (int e = threadIdx.x; e < 32 * kCount; e += kFewThreads) keys[e] = key_of(e);
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
  }
  int picked = INT32_MAX;  // lane i: the i-th pick
  if (p.given_idx != nullptr) {
    if (lane < k) picked = GivenIdx(p, token)[lane];
  } else {
    uint64_t key[kCount];  // 0: none, or taken
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int expert = lane + 32 * i;
      key[i] = kFew ? keys[expert] : key_of(expert);
    }
    for (int round = 0; round < k; ++round) {
      uint64_t best = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) best = max(best, key[i]);
      const uint32_t high = __reduce_max_sync(kAll, static_cast<uint32_t>(best >> 32));
      const bool tied = static_cast<uint32_t>(best >> 32) == high;
      const uint32_t low = __reduce_max_sync(kAll, tied ? static_cast<uint32_t>(best) : 0u);
      best = static_cast<uint64_t>(high) << 32 | low;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (key[i] == best) key[i] = 0;
      }
      if (lane == round) picked = RouterKeyId(best);
    }
  }
  // Ascending: each pick's place is the number of smaller ones, and of equal ones before it.
  int place = 0;
  for (int i = 0; i < k; ++i) {
    const int other = __shfl_sync(kAll, picked, i);
    place += other < picked || (other == picked && i < lane);
  }
  int sorted = INT32_MAX;
  for (int i = 0; i < k; ++i) {
    const int at = __shfl_sync(kAll, place, i), id = __shfl_sync(kAll, picked, i);
    if (at == lane) sorted = id;
  }
  const bool inside = lane < k && sorted >= 0 && sorted < experts;
  const float score = inside ? RouterScore(logits[sorted]) : 0.0f;
  float total = __shfl_sync(kAll, score, 0);
  for (int i = 1; i < k; ++i) total = __fadd_rn(total, __shfl_sync(kAll, score, i));
  if (lane < k) {
    p.expert_idx[token * k + lane] = sorted;
    p.expert_weight[token * k + lane] = __fmul_rn(__fdiv_rn(score, total), p.scale);
  }
}

template <int kCount>
cudaError_t Launch(const RouterParams& params, cudaStream_t stream) {
  if (params.t <= kFewTokens) {
    return LaunchDependent(RouterKernel<kCount, true>, dim3(static_cast<unsigned>(params.t)),
                           kFewThreads, 0, stream, params);
  }
  return LaunchDependent(RouterKernel<kCount, false>,
                         dim3(static_cast<unsigned>((params.t + kWarps - 1) / kWarps)), 32 * kWarps,
                         0, stream, params);
}

}  // namespace

cudaError_t RouterCuda(const RouterParams& params, cudaStream_t stream) {
  if (params.t == 0) return cudaSuccess;
  if (params.experts <= 256) return Launch<8>(params, stream);
  if (params.experts <= 384) return Launch<12>(params, stream);
  return Launch<kPerLane>(params, stream);
}

}  // namespace dsv4
