#include <algorithm>
#include <cstring>
#include <vector>

#include "common/bits.h"
#include "common/denormals.h"
#include "common/dot.h"
#include "moe/moe.h"

namespace dsv4 {
namespace {

// Tokens are taken in chunks whose work area is about this large.
constexpr int64_t kChunkBytes = int64_t{1} << 26;
// Weights decoded at a time, in FP32: they stay in the cache while tokens pass.
constexpr int64_t kDecodedBytes = 1 << 16;
constexpr int64_t kMaxRows = 16;
constexpr int64_t kTokenTile = 32;
// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 17;

// The slots begin .. end of an expert's pairs.
struct Run {
  int64_t expert, begin, end;
};

int64_t RowsPerBlock(int64_t inputs, int64_t stacks) {
  const int64_t rows = kDecodedBytes / (4 * inputs * stacks);
  return std::min(std::max<int64_t>(rows / 4 * 4, 4), kMaxRows);
}

// Blocks of rows of the experts of `runs`, in parallel: body(run, first row, rows). All runs are
// met before the next block, so that a range of blocks holds its share of every run.
template <typename Body>
void ForRowBlocks(const std::vector<Run>& runs, int64_t rows, int64_t block, int64_t inputs,
                  int64_t slots, const ParallelLoop& parallel, const Body& body) {
  const auto n = static_cast<int64_t>(runs.size());
  if (n == 0) return;
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t work = block * inputs * (slots / n + 1);
  parallel(blocks * n, kGrainWork / work + 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals keep_denormals;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / n * block;
      body(runs[i % n], first, std::min(block, rows - first));
    }
  });
}

class Chunk {
 public:
  Chunk(const MoeParams& params, int64_t first, int64_t last) : p_(params), first_(first) {
    const int64_t pairs = (last - first) * p_.k;
    slot_.assign(pairs, -1);
    std::vector<int64_t> next(p_.experts + 1, 0);
    const auto expert = [&](int64_t pair) -> int64_t {
      const int64_t token = first_ + pair / p_.k;
      const int64_t e = p_.expert_idx[first_ * p_.k + pair] - p_.first_expert;
      return p_.valid[token] != 0 && e >= 0 && e < p_.experts ? e : -1;
    };
    for (int64_t pair = 0; pair < pairs; ++pair) {
      if (const int64_t e = expert(pair); e >= 0) ++next[e + 1];
    }
    for (int64_t e = 0; e < p_.experts; ++e) {
      next[e + 1] += next[e];
      if (next[e + 1] > next[e]) runs_.push_back({e, next[e], next[e + 1]});
    }
    slots_ = next[p_.experts];
    weight_.resize(slots_);
    expert_.resize(slots_);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      if (const int64_t e = expert(pair); e >= 0) {
        slot_[pair] = next[e]++;
        weight_[slot_[pair]] = p_.expert_weight[first_ * p_.k + pair];
        expert_[slot_[pair]] = e;
      }
    }
    x_.resize(slots_ * p_.d);
    x_scale_.resize(slots_);
    h_.resize(slots_ * p_.inter);
    h_scale_.resize(slots_);
    y_.resize(slots_ * p_.d);
  }

  // Every token once, then to the slots of its other picks, unless their experts have scales.
  void RoundX(int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      int64_t done = -1;
      for (int64_t i = 0; i < p_.k; ++i) {
        const int64_t slot = slot_[token * p_.k + i];
        if (slot < 0) continue;
        float* x = &x_[slot * p_.d];
        if (done < 0 || p_.up_act_scale != nullptr) {
          LoadActivations(p_.x + (first_ + token) * p_.d, false, p_.d, x);
          x_scale_[slot] = RoundActivations(p_.act, x, p_.d, ActScale(p_.up_act_scale, slot), x);
          done = slot;
        } else {
          std::memcpy(x, &x_[done * p_.d], p_.d * sizeof(float));
          x_scale_[slot] = x_scale_[done];
        }
      }
    }
  }

  // h of the slots of a run, channels first .. first + rows.
  void Up(const Run& run, int64_t first, int64_t rows) {
    std::vector<float> wide(2 * rows * p_.d), product(kTokenTile * 2 * rows);
    Decode(p_.w1, run.expert, p_.inter, p_.d, first, rows, wide.data());
    Decode(p_.w3, run.expert, p_.inter, p_.d, first, rows, wide.data() + rows * p_.d);
    const float gate_scale = GlobalScale(p_.w1, run.expert);
    const float up_scale = GlobalScale(p_.w3, run.expert);
    for (int64_t slot = run.begin; slot < run.end; slot += kTokenTile) {
      const int64_t some = std::min(kTokenTile, run.end - slot);
      DotBlock(wide.data(), p_.d, 2 * rows, &x_[slot * p_.d], p_.d, some, p_.d, product.data(),
               2 * rows);
      for (int64_t j = 0; j < some; ++j) {
        const float* gate = product.data() + j * 2 * rows;
        const float scale = x_scale_[slot + j], weight = weight_[slot + j];
        float* h = &h_[(slot + j) * p_.inter + first];
        for (int64_t i = 0; i < rows; ++i) {
          const float g = Rounded(gate[i] * gate_scale * scale);
          const float u = Rounded(gate[rows + i] * up_scale * scale);
          h[i] = Rounded(weight * ClampedSwiglu(g, u, p_.limit));
        }
      }
    }
  }

  void RoundH(int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      float* h = &h_[slot * p_.inter];
      h_scale_[slot] = RoundActivations(p_.act, h, p_.inter, ActScale(p_.down_act_scale, slot), h);
    }
  }

  // y of the slots of a run, channels first .. first + rows.
  void Down(const Run& run, int64_t first, int64_t rows) {
    std::vector<float> wide(rows * p_.inter), product(kTokenTile * rows);
    Decode(p_.w2, run.expert, p_.d, p_.inter, first, rows, wide.data());
    const float down_scale = GlobalScale(p_.w2, run.expert);
    for (int64_t slot = run.begin; slot < run.end; slot += kTokenTile) {
      const int64_t some = std::min(kTokenTile, run.end - slot);
      DotBlock(wide.data(), p_.inter, rows, &h_[slot * p_.inter], p_.inter, some, p_.inter,
               product.data(), rows);
      for (int64_t j = 0; j < some; ++j) {
        uint16_t* y = &y_[(slot + j) * p_.d + first];
        for (int64_t i = 0; i < rows; ++i) {
          y[i] = FloatToBf16(product[j * rows + i] * down_scale * h_scale_[slot + j]);
        }
      }
    }
  }

  void Combine(int64_t begin, int64_t end) const {
    std::vector<float> total(p_.d);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = (first_ + token) * p_.d;
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t i = 0; i < p_.k; ++i) {
        const int64_t slot = slot_[token * p_.k + i];
        if (slot >= 0) Add(&y_[slot * p_.d], total);
      }
      if (p_.shared != nullptr) Add(p_.shared + row, total);
      if (p_.y_bf16) {
        std::transform(total.begin(), total.end(), static_cast<uint16_t*>(p_.y) + row,
                       [](float value) { return FloatToBf16(value); });
      } else {
        std::copy(total.begin(), total.end(), static_cast<float*>(p_.y) + row);
      }
    }
  }

  const std::vector<Run>& runs() const { return runs_; }
  int64_t slots() const { return slots_; }

 private:
  static float Rounded(float x) { return Bf16ToFloat(FloatToBf16(x)); }

  static void Add(const uint16_t* from, std::vector<float>& to) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += Bf16ToFloat(from[i]);
  }

  static float GlobalScale(const ExpertWeights& w, int64_t expert) {
    return w.global_scale != nullptr ? w.global_scale[expert] : 1.0f;
  }

  const float* ActScale(const float* scales, int64_t slot) const {
    return scales != nullptr ? scales + expert_[slot] : nullptr;
  }

  // `count` rows of an expert's weight [rows, inputs].
  void Decode(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t inputs, int64_t first,
              int64_t count, float* out) const {
    for (int64_t row = 0; row < count; ++row) {
      DecodeWeights(p_.form, w.weight, w.scale, inputs, expert * rows + first + row, 0, inputs,
                    out + row * inputs);
    }
  }

  const MoeParams& p_;
  int64_t first_, slots_;
  std::vector<Run> runs_;
  std::vector<int64_t> slot_;    // of every pair, -1 for one that adds nothing
  std::vector<int64_t> expert_;  // of every slot
  std::vector<float> weight_, x_scale_, h_scale_;
  std::vector<float> x_, h_;  // [slots, d], [slots, inter]
  std::vector<uint16_t> y_;   // [slots, d] BF16
};

}  // namespace

void MoeCpu(const MoeParams& params, const ParallelLoop& parallel) {
  const int64_t d = params.d, inter = params.inter;
  const int64_t bytes = params.k * (6 * d + 4 * inter + 32);
  const int64_t chunk_tokens = std::max<int64_t>(kChunkBytes / bytes, kTokenTile);
  for (int64_t first = 0; first < params.t; first += chunk_tokens) {
    const int64_t tokens = std::min(chunk_tokens, params.t - first);
    Chunk chunk(params, first, first + tokens);
    const int64_t slots = chunk.slots();
    const auto rows = [&](int64_t count, int64_t width, const auto& body) {
      parallel(count, kGrainWork / (16 * width) + 1, [&](int64_t begin, int64_t end) {
        const KeepDenormals keep_denormals;
        body(begin, end);
      });
    };
    rows(tokens, d, [&](int64_t begin, int64_t end) { chunk.RoundX(begin, end); });
    ForRowBlocks(chunk.runs(), inter, RowsPerBlock(d, 2), 2 * d, slots, parallel,
                 [&](const Run& run, int64_t row, int64_t count) { chunk.Up(run, row, count); });
    rows(slots, inter, [&](int64_t begin, int64_t end) { chunk.RoundH(begin, end); });
    ForRowBlocks(chunk.runs(), d, RowsPerBlock(inter, 1), inter, slots, parallel,
                 [&](const Run& run, int64_t row, int64_t count) { chunk.Down(run, row, count); });
    rows(tokens, d, [&](int64_t begin, int64_t end) { chunk.Combine(begin, end); });
  }
}

}  // namespace dsv4
