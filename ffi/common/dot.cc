#include "common/dot.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/bits.h"
#include "common/clones.h"
#include "common/e4m3.h"
#include "common/nvfp4.h"

namespace dsv4 {
namespace {

constexpr int64_t kFp8Block = 128;
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kWholeRow = int64_t{1} << 32;
constexpr int64_t kMxfp4Block = 32;
constexpr float kFp8AmaxFloor = 1e-4f;
constexpr uint32_t kSign = 0x80000000u;

// The values of the two codes of every byte, the low nibble's first.
struct E2m1Pairs {
  constexpr E2m1Pairs() {
    constexpr float kValues[] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                 -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    for (int byte = 0; byte < 256; ++byte) {
      pair[byte][0] = kValues[byte & 15];
      pair[byte][1] = kValues[byte >> 4];
    }
  }
  float pair[256][2] = {};
};

constexpr E2m1Pairs kE2m1Pairs;

// DecodeE4m3 of every code.
struct E4m3Values {
  constexpr E4m3Values() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      float a = kE4m3MinSubnormal * static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa);
      for (int i = 1; i < exponent; ++i) a *= 2.0f;
      if ((code & 0x7F) == 0x7F) a = std::numeric_limits<float>::quiet_NaN();
      value[code] = code & 0x80 ? -a : a;
    }
  }
  float value[256] = {};
};

constexpr E4m3Values kE4m3Values;

// 2^(code - 127): code 0 is subnormal, 255 is NaN.
float DecodeUe8m0(uint8_t code) {
  if (code == 0) return 0x1p-127f;
  return FloatFromBits(code == 255 ? 0x7FC00000u : static_cast<uint32_t>(code) << 23);
}

typedef uint32_t Words __attribute__((vector_size(4 * kDotLanes)));
typedef float Lanes __attribute__((vector_size(4 * kDotLanes)));

// DecodeE4m3 of sixteen codes: the codes as FP32 numbers, of which subnormal ones take the leading
// 1 away again.
inline __attribute__((always_inline)) void DecodeE4m3Lanes(const uint8_t* code, float factor,
                                                           float* out) {
  uint32_t words[kDotLanes];
  for (int64_t i = 0; i < kDotLanes; ++i) words[i] = code[i];
  Words word;
  std::memcpy(&word, words, sizeof(word));
  const Words magnitude = word & 0x7Fu;
  const Words subnormal = (Words)(magnitude < 8u), nan = (Words)(magnitude == 0x7Fu);
  const Words bits = (magnitude << 20) + (120u << 23) + (subnormal & (1u << 23));
  const Words one = subnormal & FloatBits(0x1p-6f);
  const Lanes value = (Lanes)bits - (Lanes)one;
  const Words all = (Words)value | (nan & 0x7FC00000u) | ((word & 0x80u) << 24);
  const Lanes scaled = (Lanes)all * factor;
  std::memcpy(out, &scaled, sizeof(scaled));
}

inline uint32_t Magnitude(float x) { return FloatBits(x) & ~kSign; }

// The nearest E4M3 value of a magnitude, as EncodeE4m3 rounds it. NaN becomes 448.
inline float RoundE4m3(uint32_t magnitude) {
  const uint32_t word = std::min(magnitude, FloatBits(kE4m3Max));
  const uint32_t normal = (word + 0x7FFFFu + ((word >> 20) & 1u)) & ~0xFFFFFu;
  const float subnormal = (FloatFromBits(word) + 0x1p14f) - 0x1p14f;  // a multiple of 2^-9
  return word < FloatBits(0x1p-6f) ? subnormal : FloatFromBits(normal);
}

// The nearest E2M1 value of a magnitude, as EncodeE2m1 rounds it: of a multiple of 1/2 below 2, of
// 1 below 4, of 2 above. NaN becomes 6.
inline float RoundE2m1(uint32_t magnitude) {
  const uint32_t word = std::min(magnitude, FloatBits(kE2m1Max));
  const uint32_t shift = word < FloatBits(2.0f)   ? FloatBits(0x1p22f)
                         : word < FloatBits(4.0f) ? FloatBits(0x1p23f)
                                                  : FloatBits(0x1p24f);
  return (FloatFromBits(word) + FloatFromBits(shift)) - FloatFromBits(shift);
}

inline float WithSign(float magnitude, float sign) {
  return FloatFromBits(FloatBits(magnitude) | (FloatBits(sign) & kSign));
}

inline uint32_t LargestMagnitude(const float* x, int64_t count) {
  uint32_t largest = 0;  // magnitudes compare as integers, NaN above all
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, Magnitude(x[i]));
  return largest;
}

void RoundBf16(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Bf16ToFloat(FloatToBf16(x[i]));
}

// pow2ceil(max(amax, 1e-4) / 448) by the rounded reciprocal; NaN for NaN.
float Fp8Scale(uint32_t amax_bits) {
  const float amax = FloatFromBits(amax_bits);
  if (amax != amax) return amax;
  const float clamped = std::min(std::max(amax, kFp8AmaxFloor), kFloat32Max);
  const uint32_t bits = FloatBits(clamped * static_cast<float>(1.0 / 448.0));
  return FloatFromBits((bits + 0x7FFFFFu) & 0x7F800000u);
}

DSV4_CLONES void RoundFp8(const float* x, int64_t k, float* out) {
  for (int64_t first = 0; first < k; first += kFp8Block) {
    const int64_t count = std::min(kFp8Block, k - first);
    const float scale = Fp8Scale(LargestMagnitude(x + first, count));
    for (int64_t i = first; i < first + count; ++i) {
      const float value = x[i];
      out[i] = WithSign(RoundE4m3(Magnitude(value / scale)), value) * scale;
    }
  }
}

DSV4_CLONES float RoundNvfp4(const float* x, int64_t k, const float* act_scale, float* out) {
  const float global = act_scale != nullptr
                           ? StaticGlobalScale(*act_scale)
                           : TokenGlobalScale(FloatFromBits(LargestMagnitude(x, k)));
  const float six_global = kE2m1Max * global;
  for (int64_t first = 0; first < k; first += kNvfp4Block) {
    const float amax = FloatFromBits(LargestMagnitude(x + first, kNvfp4Block));
    const float scale = DecodeE4m3(EncodeE4m3(UnroundedBlockScale(amax, six_global)));
    const float step = scale * global;
    for (int64_t i = first; i < first + kNvfp4Block; ++i) {
      const float value = x[i];
      out[i] = WithSign(RoundE2m1(Magnitude(value / step)), value) * scale;
    }
  }
  return global;
}

DSV4_CLONES void DecodeBf16(const uint16_t* weight, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Bf16ToFloat(weight[i]);
}

// A scale per kBlock codes.
template <int64_t kBlock>
inline __attribute__((always_inline)) void DecodeE4m3Blocks(const uint8_t* code,
                                                            const uint8_t* scale, int64_t count,
                                                            float* out) {
  for (int64_t first = 0; first < count; first += kBlock, ++scale) {
    const int64_t last = std::min(count, first + kBlock);
    const float factor = DecodeUe8m0(*scale);
    int64_t i = first;
    for (; i + kDotLanes <= last; i += kDotLanes) DecodeE4m3Lanes(code + i, factor, out + i);
    for (; i < last; ++i) out[i] = kE4m3Values.value[code[i]] * factor;
    // 2^-9 times such a scale is less than the smallest BF16.
    if (*scale < 3) RoundBf16(out + first, last - first, out + first);
  }
}

DSV4_CLONES void DecodeFp8(const uint8_t* weight, const uint8_t* scale, int64_t count, float* out) {
  DecodeE4m3Blocks<kFp8Block>(weight, scale, count, out);
}

// Codes first, then the scale of every kBlock: a load of what narrower stores just wrote waits.
template <int64_t kBlock, typename Scale>
inline void DecodeE2m1(const uint8_t* weight, int64_t count, const Scale& scale, float* out) {
  for (int64_t i = 0; i < count / 2; ++i) {
    std::memcpy(out + 2 * i, kE2m1Pairs.pair[weight[i]], sizeof(kE2m1Pairs.pair[0]));
  }
  for (int64_t block = 0; block < count / kBlock; ++block) {
    const float factor = scale(block);
    for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += kDotLanes) {
      Lanes values;
      std::memcpy(&values, out + i, sizeof(values));
      values *= factor;
      std::memcpy(out + i, &values, sizeof(values));
    }
  }
}

DSV4_CLONES void DecodeMxfp4(const uint8_t* weight, const uint8_t* scale, int64_t count,
                             float* out) {
  DecodeE2m1<kMxfp4Block>(
      weight, count, [scale](int64_t block) { return DecodeUe8m0(scale[block]); }, out);
}

DSV4_CLONES void DecodeNvfp4(const uint8_t* weight, const uint8_t* scale, int64_t count,
                             float* out) {
  DecodeE2m1<kNvfp4Block>(
      weight, count, [scale](int64_t block) { return kE4m3Values.value[scale[block]]; }, out);
}

// kRows x kTokens results at once: every operand that is loaded serves several of them.
template <int kRows, int kTokens>
inline __attribute__((always_inline)) void DotTile(const float* rows, int64_t row_stride,
                                                   const float* tokens, int64_t token_stride,
                                                   int64_t k, float* out, int64_t out_stride) {
  Lanes sums[kRows][kTokens] = {};
  for (int64_t i = 0; i < k; i += kDotLanes) {
    Lanes row[kRows];
    for (int r = 0; r < kRows; ++r) std::memcpy(&row[r], rows + r * row_stride + i, sizeof(Lanes));
    for (int t = 0; t < kTokens; ++t) {
      Lanes token;
      std::memcpy(&token, tokens + t * token_stride + i, sizeof(Lanes));
      for (int r = 0; r < kRows; ++r) sums[r][t] += row[r] * token;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      float lanes[kDotLanes];
      std::memcpy(lanes, &sums[r][t], sizeof(Lanes));
      for (int64_t half = kDotLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      out[t * out_stride + r] = lanes[0];
    }
  }
}

constexpr int64_t kTileRows = 4;
constexpr int64_t kTileTokens = 4;

template <int kRows>
inline __attribute__((always_inline)) void DotRows(const float* rows, int64_t row_stride,
                                                   const float* tokens, int64_t token_stride,
                                                   int64_t token_count, int64_t k, float* out,
                                                   int64_t out_stride) {
  if (token_count == kTileTokens) {
    return DotTile<kRows, kTileTokens>(rows, row_stride, tokens, token_stride, k, out, out_stride);
  }
  for (int64_t t = 0; t < token_count; ++t) {
    DotTile<kRows, 1>(rows, row_stride, tokens + t * token_stride, token_stride, k,
                      out + t * out_stride, out_stride);
  }
}

// kTokens x kWide results of sixteen channels at once.
template <int kTokens, int kWide>
inline __attribute__((always_inline)) void SumTile(const float* weight, int64_t weight_stride,
                                                   const float* rows, int64_t row_stride,
                                                   int64_t row_count, float* out,
                                                   int64_t out_stride) {
  Lanes sums[kTokens][kWide] = {};
  for (int64_t r = 0; r < row_count; ++r) {
    Lanes row[kWide];
    for (int w = 0; w < kWide; ++w) {
      std::memcpy(&row[w], rows + r * row_stride + w * kDotLanes, sizeof(Lanes));
    }
    for (int t = 0; t < kTokens; ++t) {
      const float factor = weight[t * weight_stride + r];
      for (int w = 0; w < kWide; ++w) sums[t][w] += row[w] * factor;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    std::memcpy(out + t * out_stride, sums[t], sizeof(sums[t]));
  }
}

template <int kTokens, int kWide>
inline __attribute__((always_inline)) void SumTiles(const float* weight, int64_t weight_stride,
                                                    const float* rows, int64_t row_stride,
                                                    int64_t row_count, int64_t k, float* out,
                                                    int64_t out_stride) {
  int64_t i = 0;
  for (; i + kWide * kDotLanes <= k; i += kWide * kDotLanes) {
    SumTile<kTokens, kWide>(weight, weight_stride, rows + i, row_stride, row_count, out + i,
                            out_stride);
  }
  for (; i < k; i += kDotLanes) {
    SumTile<kTokens, 1>(weight, weight_stride, rows + i, row_stride, row_count, out + i,
                        out_stride);
  }
}

}  // namespace

void DecodeWeights(WeightForm form, const void* weight, const uint8_t* scale, int64_t k,
                   int64_t row, int64_t first, int64_t count, float* out) {
  const auto* bytes = static_cast<const uint8_t*>(weight);
  switch (form) {
    case WeightForm::kBf16:
      DecodeBf16(static_cast<const uint16_t*>(weight) + row * k + first, count, out);
      break;
    case WeightForm::kFp8: {
      const int64_t tiles = (k + kFp8Block - 1) / kFp8Block;
      DecodeFp8(bytes + row * k + first, scale + row / kFp8Block * tiles + first / kFp8Block, count,
                out);
      break;
    }
    case WeightForm::kMxfp4:
      DecodeMxfp4(bytes + (row * k + first) / 2, scale + (row * k + first) / kMxfp4Block, count,
                  out);
      break;
    case WeightForm::kNvfp4:
      DecodeNvfp4(bytes + (row * k + first) / 2, scale + (row * k + first) / kNvfp4Block, count,
                  out);
      break;
  }
  std::fill(out + count, out + PaddedInputs(count), 0.0f);
}

void LoadActivations(const void* x, bool x_float32, int64_t k, float* out) {
  if (x_float32) {
    std::memcpy(out, x, k * sizeof(float));
  } else {
    DecodeBf16(static_cast<const uint16_t*>(x), k, out);
  }
}

void DecodeActivations(const void* code, const uint8_t* scale, int64_t k, float* out) {
  DecodeFp8(static_cast<const uint8_t*>(code), scale, k, out);
}

float RoundActivations(ActForm act, const float* x, int64_t k, const float* act_scale, float* out) {
  float token_scale = 1.0f;
  switch (act) {
    case ActForm::kBf16:
      RoundBf16(x, k, out);
      break;
    case ActForm::kFp8:
      RoundFp8(x, k, out);
      break;
    case ActForm::kNvfp4:
      token_scale = RoundNvfp4(x, k, act_scale, out);
      break;
  }
  std::fill(out + k, out + PaddedInputs(k), 0.0f);
  return token_scale;
}

DSV4_CLONES void DecodeKeyCodes(const uint8_t* code, const uint8_t* scale, int64_t count,
                                float* out) {
  DecodeE4m3Blocks<kKeyBlock>(code, scale, count, out);
}

DSV4_CLONES void DecodeTokenCodes(const uint8_t* code, uint8_t scale, int64_t count, float* out) {
  DecodeE4m3Blocks<kWholeRow>(code, &scale, count, out);
}

DSV4_CLONES void DotBlock(const float* rows, int64_t row_stride, int64_t row_count,
                          const float* tokens, int64_t token_stride, int64_t token_count, int64_t k,
                          float* out, int64_t out_stride) {
  for (int64_t t = 0; t < token_count; t += kTileTokens) {
    const int64_t some = std::min(kTileTokens, token_count - t);
    const float* at = tokens + t * token_stride;
    int64_t r = 0;
    for (; r + kTileRows <= row_count; r += kTileRows) {
      DotRows<kTileRows>(rows + r * row_stride, row_stride, at, token_stride, some, k,
                         out + t * out_stride + r, out_stride);
    }
    for (; r < row_count; ++r) {
      DotRows<1>(rows + r * row_stride, row_stride, at, token_stride, some, k,
                 out + t * out_stride + r, out_stride);
    }
  }
}

DSV4_CLONES void WeightedSums(const float* weight, int64_t weight_stride, int64_t token_count,
                              const float* rows, int64_t row_stride, int64_t row_count, int64_t k,
                              float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + kTileTokens <= token_count; t += kTileTokens) {
    SumTiles<kTileTokens, 2>(weight + t * weight_stride, weight_stride, rows, row_stride, row_count,
                             k, out + t * out_stride, out_stride);
  }
  for (; t < token_count; ++t) {
    SumTiles<1, 8>(weight + t * weight_stride, weight_stride, rows, row_stride, row_count, k,
                   out + t * out_stride, out_stride);
  }
}

}  // namespace dsv4
