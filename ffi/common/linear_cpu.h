// The CPU half of the linears: activations rounded once, then rows of the weight against them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "common/linear.h"
#include "common/parallel.h"

namespace dsv4 {

// Tokens first .. first + count of a call as every row of the weight reads them.
class LinearActivations {
 public:
  LinearActivations(const LinearParams& params, int64_t first, int64_t count);

  // One of a token's x for each group; Round() must see all.
  int64_t size() const { return count_ * params_.groups; }
  void Round(int64_t begin, int64_t end);

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t stride() const { return stride_; }  // from one of size() to the next
  const float* values() const { return values_.get(); }
  const float* scales() const { return scales_.get(); }

 private:
  const LinearParams& params_;
  int64_t first_, count_, stride_;
  std::unique_ptr<float[]> values_, scales_;
};

// Rows first <= i < last of the weight, for these tokens.
void LinearCpu(WeightForm form, const LinearParams& params, const LinearActivations& x,
               int64_t first, int64_t last);

constexpr int64_t kLinearTokens = 128;     // a call's tokens are taken so many at a time
constexpr int64_t kLinearRows = 16;        // of the weight, the least that a thread takes
constexpr int64_t kLinearGrain = 1 << 16;  // and elements of it, for one token

// The whole call. `cpu(params, x, first, last)` does rows of it, as LinearCpu.
template <typename Pool, typename Cpu>
void RunLinearCpu(Pool& pool, const LinearParams& params, const Cpu& cpu) {
  for (int64_t first = 0; first < params.t; first += kLinearTokens) {
    LinearActivations x(params, first, std::min(kLinearTokens, params.t - first));
    ParallelFor(pool, x.size(), kLinearGrain / params.k + 1,
                [&](int64_t begin, int64_t end) { x.Round(begin, end); });
    const int64_t blocks = (params.n + kLinearRows - 1) / kLinearRows;
    const int64_t work = kLinearRows * params.k * (1 + x.count() / 8);
    ParallelFor(pool, blocks, kLinearGrain / work + 1, [&](int64_t begin, int64_t end) {
      cpu(params, x, begin * kLinearRows, std::min(end * kLinearRows, params.n));
    });
  }
}

}  // namespace dsv4
