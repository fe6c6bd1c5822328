// Codes of queries and keys as E4M3, for FP8 tensor cores. An MXFP4 row of 128 takes one scale:
// that of its largest group; values of a group d powers of two below it become value * 2^(6 - d),
// which E4M3 holds exactly to d = 14.
//
// A lane c of four holds the channels of a row that share a scale, 32 c to 32 c + 31, as eight
// words of four codes. MMA step s takes words 2 s and 2 s + 1 as its bytes 4 c .. and 16 + 4 c ..:
// which channel lies where is free as long as keys and queries agree.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/e4m3.h"
#include "common/host_device.h"

namespace dsv4 {
namespace index_topk {

constexpr int kDepths = 32;       // tables of codes, one for each d
constexpr int kUnitExponent = 6;  // of the largest group

// E4M3 of +0, .5, 1, 1.5 | 2, 3, 4, 6, times 2^(6 - d): word `half` of the table.
DSV4_HOST_DEVICE inline uint32_t CodeTable(int d, int half) {
  const float unit = FloatFromBits(static_cast<uint32_t>(127 + kUnitExponent - d) << 23);
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const float low = 0.5f * static_cast<float>(i);
    const float high = static_cast<float>(i < 2 ? 2 + i : 2 * i);
    word |= static_cast<uint32_t>(EncodeE4m3((half ? high : low) * unit)) << 8 * i;
  }
  return word;
}

// Bytes of high:low, by the lower four nibbles of the selector, each below 8.
DSV4_HOST_DEVICE inline uint32_t PickBytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  uint32_t word;  // __byte_perm would mask the selector
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(selector));
  return word;
#else
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i & 7;
    const uint32_t byte = (pick < 4 ? low >> 8 * pick : high >> 8 * (pick - 4)) & 0xFF;
    word |= byte << 8 * i;
  }
  return word;
#endif
}

// Eight E2M1 codes, lowest first, as two words of E4M3.
DSV4_HOST_DEVICE inline void CodesOf(uint32_t word, uint32_t table_low, uint32_t table_high,
                                     uint32_t& first, uint32_t& second) {
  const uint32_t magnitudes = word & 0x77777777u;
  first = PickBytes(table_low, table_high, magnitudes);
  second = PickBytes(table_low, table_high, magnitudes >> 16);
  // The top bits of the bytes of both words are the eight signs.
  const uint32_t shifted = word << 4;
  first |= PickBytes(shifted, word, 0x5140) & 0x80808080u;
  second |= PickBytes(shifted, word, 0x7362) & 0x80808080u;
}

// The exponent byte that counts towards the row's largest: a group of zeros has none.
DSV4_HOST_DEVICE inline uint32_t GroupExponent(uint32_t codes_or, uint32_t byte) {
  return (codes_or & 0x77777777u) != 0 || byte == 255 ? byte : 0;
}

// Where word j of lane c of row `row` lies in a swizzled tile of 128-byte rows.
DSV4_HOST_DEVICE inline uint32_t SwizzledAt(int row, int c, int j) {
  return static_cast<uint32_t>(row * 128 + ((j ^ (row & 7)) << 4) + 4 * c);
}

}  // namespace index_topk
}  // namespace dsv4
