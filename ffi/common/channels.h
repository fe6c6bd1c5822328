// Sums over the channels of a row, in one order on CPU and GPU: a row is cut into chunks of 8
// channels, chunk i belongs to lane i % 32, a lane adds the squares of a chunk in sequence and then
// its chunks, lanes are added by halves.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace dsv4 {

constexpr int kChunkChannels = 8;
constexpr int kRowLanes = 32;
constexpr int kRowChunks = 2;  // of a lane
constexpr int64_t kRowMaxChannels = kChunkChannels * kRowLanes * kRowChunks;
constexpr int64_t kMaxRotary = 2 * kRowLanes;  // a lane makes one sine and cosine

// On the CPU: of `d` channels, a multiple of 8 up to kRowMaxChannels. `square(i)` is that of
// channel i.
template <typename Square>
float SumOfSquares(int64_t d, const Square& square) {
  float lanes[kRowLanes] = {};
  for (int64_t first = 0; first < d; first += kChunkChannels) {
    float sum = 0.0f;
    for (int64_t i = first; i < first + kChunkChannels; ++i) sum += square(i);
    lanes[first / kChunkChannels % kRowLanes] += sum;
  }
  for (int half = kRowLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace dsv4
