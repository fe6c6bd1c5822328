#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/bits.h"
#include "common/clones.h"
#include "common/denormals.h"
#include "common/e4m3.h"
#include "common/nvfp4_cpu.h"
#include "common/rmsnorm.h"
#include "common/ue8m0.h"
#include "mhc/mhc.h"
#include "mhc/mhc_weights.h"

namespace dsv4 {
namespace {

// Rounded once, as __frsqrt_rn.
float ReciprocalRoot(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}

float Halved(float* values, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

// `of_tile(tile)` of all of them.
template <typename OfTile>
float SumOfTiles(int64_t tiles, const OfTile& of_tile) {
  float total = 0.0f;
  for (int64_t first = 0; first < tiles; first += kMhcTileGroup) {
    float group[kMhcTileGroup] = {};
    for (int64_t i = 0; i < std::min<int64_t>(kMhcTileGroup, tiles - first); ++i) {
      group[i] = of_tile(first + i);
    }
    total += Halved(group, kMhcTileGroup);
  }
  return total;
}

// The mixes' partial sums of one tile, and that of the squares; `s` [4, d].
DSV4_CLONES void TileSums(const float* s, const float* fn, int64_t d, int64_t tile, int mixes,
                          float* sums) {
  float x[kMhcStreams][kMhcLaneChannels][kMhcLanes];
  const int64_t first = tile * kMhcTile;
  for (int j = 0; j < kMhcStreams; ++j) {
    for (int lane = 0; lane < kMhcLanes; ++lane) {
      for (int i = 0; i < kMhcLaneChannels; ++i) {
        x[j][i][lane] = s[j * d + first + lane * kMhcLaneChannels + i];
      }
    }
  }
  for (int mix = 0; mix <= mixes; ++mix) {
    float lanes[kMhcLanes] = {};
    for (int j = 0; j < kMhcStreams; ++j) {
      for (int i = 0; i < kMhcLaneChannels; ++i) {
        const float* values = x[j][i];
        if (mix == mixes) {
          for (int lane = 0; lane < kMhcLanes; ++lane) lanes[lane] += values[lane] * values[lane];
          continue;
        }
        const float* weights = fn + (mix * kMhcStreams + j) * d + first + i;
        for (int lane = 0; lane < kMhcLanes; ++lane) {
          lanes[lane] = __builtin_fmaf(values[lane], weights[lane * kMhcLaneChannels], lanes[lane]);
        }
      }
    }
    sums[mix == mixes ? kMhcSquares : mix] = Halved(lanes, kMhcLanes);
  }
}

// sum_j weight[j * stride] * s[j], begun by `start` if there is one; BF16, as FP32.
DSV4_CLONES void Combine(const float* s, int64_t d, const float* weight, int stride,
                         const float* start, float start_weight, float* out) {
  for (int64_t i = 0; i < d; ++i) {
    float sum = start ? start_weight * start[i] : weight[0] * s[i];
    for (int j = start ? 0 : 1; j < kMhcStreams; ++j) {
      sum = __builtin_fmaf(weight[j * stride], s[j * d + i], sum);
    }
    out[i] = Bf16ToFloat(FloatToBf16(sum));
  }
}

void Widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = Bf16ToFloat(from[i]);
}

void Narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = FloatToBf16(from[i]);
}

class Worker {
 public:
  explicit Worker(const MhcParams& params)
      : p_(params),
        d_(params.d),
        tiles_(params.d / kMhcTile),
        streams_(kMhcStreams * d_),
        next_(params.branch ? kMhcStreams * d_ : 0),
        y_(d_),
        sums_(params.fn ? tiles_ * kMhcSumStride : 0),
        input_(params.fn ? d_ : 0) {}

  void Token(int64_t token) {
    Widen(p_.streams + token * kMhcStreams * d_, kMhcStreams * d_, streams_.data());
    if (p_.branch) WriteBack(token);
    if (p_.fn) Read(token);
  }

 private:
  void WriteBack(int64_t token) {
    Widen(p_.branch + token * d_, d_, y_.data());
    for (int k = 0; k < kMhcStreams; ++k) {
      Combine(streams_.data(), d_, p_.comb + token * 16 + k, kMhcStreams, y_.data(),
              p_.post[token * kMhcStreams + k], &next_[k * d_]);
    }
    Narrow(next_.data(), kMhcStreams * d_, p_.new_streams + token * kMhcStreams * d_);
    streams_.swap(next_);
  }

  float Total(int sum) const {
    return SumOfTiles(tiles_, [&](int64_t tile) { return sums_[tile * kMhcSumStride + sum]; });
  }

  void Read(int64_t token) {
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      TileSums(streams_.data(), p_.fn, d_, tile, p_.mixes, &sums_[tile * kMhcSumStride]);
    }
    const float norm = ReciprocalRoot(Total(kMhcSquares) * p_.reciprocal_flat + p_.rms_eps);
    float weights[kMhcMixes];
    for (int mix = 0; mix < p_.mixes; ++mix) {
      weights[mix] =
          MhcWeight(mix, Total(mix) * norm, p_.scale[MhcScaleIndex(mix)], p_.base[mix], p_.hc_eps);
    }
    if (p_.mixes == kMhcMixes) {
      std::memcpy(p_.next_post + token * 4, weights + 4, 4 * sizeof(float));
      float comb[16];
      std::memcpy(comb, weights + 8, sizeof(comb));
      Sinkhorn(comb, p_.iters, p_.hc_eps);
      std::memcpy(p_.next_comb + token * 16, comb, sizeof(comb));
    }
    Combine(streams_.data(), d_, weights, 1, nullptr, 0, y_.data());
    Narrow(y_.data(), d_, input_.data());
    NormToken(input_.data(), p_.norm, d_, p_.reciprocal_d, p_.rms_eps, y_.data());
    Store(token);
  }

  void Store(int64_t token) const {
    if (p_.x) Narrow(y_.data(), d_, p_.x + token * d_);
    if (p_.code4) {
      EncodeNvfp4Token(y_.data(), d_, p_.global_scale, p_.code4 + token * d_ / 2,
                       p_.block_scale + token * (d_ / kNvfp4Block), p_.token_scale + token);
    }
    if (p_.code8 == nullptr) return;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const float* y = &y_[tile * kMhcTile];
      uint32_t bits = 0;
      for (int i = 0; i < kMhcTile; ++i) bits = std::max(bits, FloatBits(y[i]) & 0x7FFFFFFFu);
      const uint32_t byte = Fp8ScaleByte(bits);
      const float inverse = InverseScale(byte);
      p_.scale8[token * tiles_ + tile] = static_cast<uint8_t>(byte);
      uint8_t* code = p_.code8 + token * d_ + tile * kMhcTile;
      for (int i = 0; i < kMhcTile; ++i) code[i] = EncodeE4m3(y[i] * inverse);
    }
  }

  const MhcParams& p_;
  const int64_t d_, tiles_;
  std::vector<float> streams_, next_, y_, sums_;
  std::vector<uint16_t> input_;
};

}  // namespace

void MhcCpu(const MhcParams& params, int64_t first, int64_t last) {
  const KeepDenormals keep_denormals;
  Worker worker(params);
  for (int64_t token = first; token < last; ++token) worker.Token(token);
}

}  // namespace dsv4
