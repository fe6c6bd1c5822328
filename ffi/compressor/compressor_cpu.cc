#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/bits.h"
#include "common/clones.h"
#include "common/denormals.h"
#include "common/e2m1.h"
#include "common/e4m3.h"
#include "common/exp.h"
#include "common/rope.h"
#include "common/ue8m0.h"
#include "compressor/compressor.h"
#include "compressor/compressor_rows.h"

namespace dsv4 {
namespace {

// Exponentials and products that are worth a thread.
constexpr int64_t kGrainWork = 1 << 14;

DSV4_CLONES void Add(const float* a, const float* b, int64_t d, float* sum) {
  for (int64_t i = 0; i < d; ++i) sum[i] = a[i] + b[i];
}

DSV4_CLONES void Raise(const float* gate, int64_t d, float* top) {
  for (int64_t i = 0; i < d; ++i) top[i] = gate[i] > top[i] ? gate[i] : top[i];
}

DSV4_CLONES void AddSlot(const float* gate, const float* kv, const float* top, int64_t d,
                         float* norm, float* value) {
  for (int64_t i = 0; i < d; ++i) {
    const float e = Exp(gate[i] - top[i]);
    norm[i] += e;
    value[i] += e * kv[i];
  }
}

DSV4_CLONES void Divide(const float* value, const float* norm, int64_t d, float* out) {
  for (int64_t i = 0; i < d; ++i) out[i] = Bf16ToFloat(FloatToBf16(value[i] / norm[i]));
}

float SumOfSquares(const float* x, int64_t d) {
  float sum = 0;
  for (int64_t tile = 0; tile < d; tile += kSumChannels) {
    float lanes[kSlotLanes] = {};
    for (int64_t i = tile; i < std::min(d, tile + kSumChannels); ++i) {
      lanes[(i - tile) / kChannelsPerLane] += x[i] * x[i];
    }
    for (int half = kSlotLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    sum += lanes[0];
  }
  return sum;
}

uint32_t LargestBits(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, FloatBits(x[i]) & 0x7FFFFFFFu);
  return largest;
}

// One job's windows and states.
class Worker {
 public:
  Worker(const CompressorParams& params, const CompressorJob& job)
      : p_(params),
        job_(job),
        columns_(Overlaps(p_) ? 2 * job.d : job.d),
        gate_(Slots() * job.d),
        top_(job.d),
        norm_(kSlotLanes * job.d),
        value_(kSlotLanes * job.d),
        y_(job.d) {}

  void Emit(int64_t b, int64_t window) {
    if (window >= job_.slots) return;
    Pool(b, window);
    Normalise();
    Rotate(static_cast<int32_t>(window * p_.ratio));
    Store(b * job_.slots + window);
  }

  void WriteState(int64_t b) const {
    const Appended row = AppendedOf(p_, b);
    for (int64_t p = FirstKept(row, job_.ring); p < row.end; ++p) {
      const int64_t from = (b * p_.t + p - row.start) * columns_;
      const int64_t to = (b * job_.ring + p % job_.ring) * columns_;
      std::copy_n(job_.kv + from, columns_, job_.kv_state + to);
      Add(job_.gate + from, job_.ape + p % p_.ratio * columns_, columns_, job_.gate_state + to);
    }
  }

 private:
  int64_t Slots() const { return Overlaps(p_) ? 2 * p_.ratio : p_.ratio; }

  // x, in y_.
  void Pool(int64_t b, int64_t window) {
    const Appended row = AppendedOf(p_, b);
    const int64_t d = job_.d, n = Slots(), first = (window + 1) * p_.ratio - n;
    std::fill(top_.begin(), top_.end(), -std::numeric_limits<float>::infinity());
    std::fill(norm_.begin(), norm_.end(), 0.0f);
    std::fill(value_.begin(), value_.end(), 0.0f);
    std::vector<const float*> kv(n);
    for (int64_t s = 0; s < n; ++s) {
      const int64_t p = first + s, column = Overlaps(p_) && s >= p_.ratio ? d : 0;
      if (p < 0) continue;
      float* gate = &gate_[s * d];
      if (p < row.start) {
        const int64_t at = (b * job_.ring + p % job_.ring) * columns_ + column;
        kv[s] = job_.kv_state + at;
        std::copy_n(job_.gate_state + at, d, gate);
      } else {
        const int64_t at = (b * p_.t + p - row.start) * columns_ + column;
        kv[s] = job_.kv + at;
        Add(job_.gate + at, job_.ape + p % p_.ratio * columns_ + column, d, gate);
      }
      Raise(gate, d, top_.data());
    }
    for (int64_t s = 0; s < n; ++s) {
      if (kv[s] == nullptr) continue;
      const int64_t lane = s % kSlotLanes * d;
      AddSlot(&gate_[s * d], kv[s], top_.data(), d, &norm_[lane], &value_[lane]);
    }
    for (int64_t half = kSlotLanes / 2; half > 0; half /= 2) {
      Add(norm_.data(), &norm_[half * d], half * d, norm_.data());
      Add(value_.data(), &value_[half * d], half * d, value_.data());
    }
    Divide(value_.data(), norm_.data(), d, y_.data());
  }

  void Normalise() {
    const int64_t d = job_.d;
    const float mean = SumOfSquares(y_.data(), d) * (1.0f / static_cast<float>(d));
    // Rounded once, as __frsqrt_rn.
    const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + p_.eps)));
    for (int64_t i = 0; i < d; ++i) {
      y_[i] = Bf16ToFloat(FloatToBf16(Bf16ToFloat(job_.norm[i]) * (y_[i] * scale)));
    }
  }

  void Rotate(int32_t position) {
    float* x = &y_[job_.d - p_.rotary];
    for (int64_t i = 0; i < p_.rotary / 2; ++i) {
      const Pair pair = Turned(x[2 * i], x[2 * i + 1], SinCosAt(position, p_.frequencies[i]));
      x[2 * i] = Bf16ToFloat(FloatToBf16(pair.even));
      x[2 * i + 1] = Bf16ToFloat(FloatToBf16(pair.odd));
    }
  }

  void Transform() {
    const int64_t d = job_.d;
    for (int64_t half = 1; half < d; half *= 2) {
      for (int64_t i = 0; i < d; ++i) {
        if (i & half) continue;
        const float low = y_[i], high = y_[i + half];
        y_[i] = low + high;
        y_[i + half] = low - high;
      }
    }
    const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
    for (float& y : y_) y = Bf16ToFloat(FloatToBf16(y * scale));
  }

  void Store(int64_t entry) {
    uint8_t* code = job_.code + entry * job_.code_bytes;
    uint8_t* scale = job_.scale + entry * job_.scales;
    if (job_.form == EntryForm::kKv) {
      const int64_t nope = job_.d - p_.rotary;
      StoreFp8(nope, kSumChannels, code, scale);
      uint16_t* rope = job_.rope + entry * p_.rotary;
      for (int64_t i = 0; i < p_.rotary; ++i) rope[i] = FloatToBf16(y_[nope + i]);
      return;
    }
    Transform();
    if (job_.form == EntryForm::kFp8) return StoreFp8(job_.d, job_.d, code, scale);
    constexpr int64_t kBlock = 32;
    for (int64_t first = 0; first < job_.d; first += kBlock) {
      const uint32_t byte = Mxfp4ScaleByte(LargestBits(&y_[first], kBlock));
      const float inverse = InverseScale(byte);
      scale[first / kBlock] = static_cast<uint8_t>(byte);
      for (int64_t i = first; i < first + kBlock; i += 2) {
        code[i / 2] = static_cast<uint8_t>(EncodeE2m1(y_[i] * inverse) |
                                           EncodeE2m1(y_[i + 1] * inverse) << 4);
      }
    }
  }

  void StoreFp8(int64_t count, int64_t block, uint8_t* code, uint8_t* scale) const {
    for (int64_t first = 0; first < count; first += block) {
      const uint32_t byte = Fp8ScaleByte(LargestBits(&y_[first], block));
      const float inverse = InverseScale(byte);
      scale[first / block] = static_cast<uint8_t>(byte);
      for (int64_t i = first; i < first + block; ++i) code[i] = EncodeE4m3(y_[i] * inverse);
    }
  }

  const CompressorParams& p_;
  const CompressorJob& job_;
  int64_t columns_;  // of a row
  std::vector<float> gate_, top_, norm_, value_, y_;
};

struct Window {
  int64_t b, window;
};

}  // namespace

void CompressorCpu(const CompressorParams& params, const ParallelLoop& parallel) {
  std::vector<Window> windows;
  for (int64_t b = 0; b < params.b; ++b) {
    const Appended row = AppendedOf(params, b);
    for (int64_t w = row.start / params.ratio; w < row.end / params.ratio; ++w) {
      windows.push_back({b, w});
    }
  }
  for (int i = 0; i < params.n_jobs; ++i) {
    const CompressorJob& job = params.jobs[i];
    parallel(windows.size(), kGrainWork / (job.d * params.ratio) + 1,
             [&](int64_t begin, int64_t end) {
               const KeepDenormals keep_denormals;
               Worker worker(params, job);
               for (int64_t j = begin; j < end; ++j) worker.Emit(windows[j].b, windows[j].window);
             });
    // Every window has read what it needs of the states.
    parallel(params.b, kGrainWork / (job.d * job.ring) + 1, [&](int64_t begin, int64_t end) {
      const KeepDenormals keep_denormals;
      const Worker worker(params, job);
      for (int64_t b = begin; b < end; ++b) worker.WriteState(b);
    });
  }
}

}  // namespace dsv4
