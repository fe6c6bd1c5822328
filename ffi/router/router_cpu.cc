#include <algorithm>
#include <functional>

#include "common/denormals.h"
#include "router/router.h"

namespace dsv4 {

void RouterCpu(const RouterParams& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  const int64_t experts = params.experts, k = params.k;
  float score[kRouterMaxExperts];
  uint64_t key[kRouterMaxExperts];
  for (int64_t token = first; token < last; ++token) {
    const float* logits = params.logits + token * experts;
    int32_t* idx = params.expert_idx + token * k;
    float* weight = params.expert_weight + token * k;
    if (params.bias) {
      for (int64_t e = 0; e < experts; ++e) {
        score[e] = RouterScore(logits[e]);
        key[e] = RouterKey(score[e] + params.bias[e], e);
      }
      std::partial_sort(key, key + k, key + experts, std::greater<uint64_t>());
      for (int64_t i = 0; i < k; ++i) idx[i] = RouterKeyId(key[i]);
    } else {
      std::copy_n(GivenIdx(params, token), k, idx);
    }
    std::sort(idx, idx + k);
    float total = 0.0f;
    for (int64_t i = 0; i < k; ++i) {
      const bool inside = idx[i] >= 0 && idx[i] < experts;
      weight[i] = !inside ? 0.0f : params.bias ? score[idx[i]] : RouterScore(logits[idx[i]]);
      total = i == 0 ? weight[i] : total + weight[i];
    }
    for (int64_t i = 0; i < k; ++i) weight[i] = weight[i] / total * params.scale;
  }
}

}  // namespace dsv4
