// The keys of a query come in one order: its window by ascending position, then its entries by
// ascending place (skipped places take none). They are cut into blocks of kBlockKeys, window and
// entries each from their own first on. Keys are decoded twice, block by block: for the scores and
// their maximum, then for the sums, of which every block has its own, key by key, and which are
// added in the order of the blocks. So a query's result depends on its position and its keys alone:
// not on the chunk that it is part of, nor on who computes which block when.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_keys.h"
#include "common/bits.h"
#include "common/clones.h"
#include "common/denormals.h"
#include "common/dot.h"
#include "common/exp.h"
#include "common/rope.h"

namespace dsv4 {
namespace {

constexpr int64_t kBlockKeys = 64;
// Consecutive queries share the decoding of keys: up to kTileQueries, or kTileRows heads of them.
constexpr int64_t kTileQueries = 16, kTileRows = 64;
// A call of fewer queries cuts them into blocks, as long as their sums take no more than this.
constexpr int64_t kFewQueries = 8, kMaxSumsBytes = int64_t{1} << 26;
// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 17;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Of one query over some keys: the sum of e_u [h] and, of bf(e_u) times the key, [h, width].
struct Sums {
  Sums(int64_t h, int64_t width) : norm(h), value(h * width) {}
  std::vector<float> norm, value;
};

// Scores of one head, scaled; returns the larger of the largest and `top`.
DSV4_CLONES float Scale(float* score, int64_t count, float scale, float top) {
  for (int64_t i = 0; i < count; ++i) score[i] *= scale;
  for (int64_t i = 0; i < count; ++i) top = score[i] > top ? score[i] : top;
  return top;
}

// Scores of one head to bf(e_u), of the next multiple of 16 places; returns the sum of e_u: sixteen
// partial sums, then by halves.
DSV4_CLONES float Weigh(float* score, int64_t count, float base) {
  const int64_t places = PaddedInputs(count);
  std::fill(score + count, score + places, -kInfinity);
  float sums[kDotLanes] = {};
  for (int64_t i = 0; i < places; i += kDotLanes) {
    for (int64_t lane = 0; lane < kDotLanes; ++lane) {
      const float e = Exp(score[i + lane] - base);
      sums[lane] += e;
      score[i + lane] = Bf16ToFloat(FloatToBf16(e));
    }
  }
  for (int64_t half = kDotLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

DSV4_CLONES void Add(const float* part, int64_t count, float* total) {
  for (int64_t i = 0; i < count; ++i) total[i] += part[i];
}

DSV4_CLONES void Divided(const float* value, float norm, int64_t d, uint16_t* out) {
  for (int64_t i = 0; i < d; ++i) out[i] = FloatToBf16(value[i] / norm);
}

// cos and sin of position * frequency, the product in FP32.
class Rotation {
 public:
  explicit Rotation(const AttentionParams& params)
      : pairs_(params.frequencies != nullptr ? params.rope / 2 : 0), turns_(pairs_) {}

  void Turn(const AttentionParams& params, int32_t position) {
    for (int64_t i = 0; i < pairs_; ++i) {
      turns_[i] = SinCosAt(position, params.frequencies[i]);
    }
  }

  // Channel pairs back by that angle.
  void Back(uint16_t* o) const {
    for (int64_t i = 0; i < pairs_; ++i) {
      const SinCos back = {-turns_[i].sin, turns_[i].cos};
      const Pair pair = Turned(Bf16ToFloat(o[2 * i]), Bf16ToFloat(o[2 * i + 1]), back);
      o[2 * i] = FloatToBf16(pair.even);
      o[2 * i + 1] = FloatToBf16(pair.odd);
    }
  }

 private:
  int64_t pairs_;
  std::vector<SinCos> turns_;
};

// Queries [b, first .. first + count) whose positions are consecutive.
struct Tile {
  int64_t b, first, count;
};

class Attention {
 public:
  explicit Attention(const AttentionParams& params)
      : p_(params),
        d_(p_.nope + p_.rope),
        width_(PaddedInputs(d_)),
        scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(d_)))) {}

  std::vector<Tile> Tiles() const {
    const int64_t most = std::clamp<int64_t>(kTileRows / p_.h, 1, kTileQueries);
    std::vector<Tile> tiles;
    for (int64_t b = 0; b < p_.b; ++b) {
      for (int64_t first = 0, count; first < p_.t; first += count) {
        const int32_t* position = p_.positions + b * p_.t + first;
        for (count = 1; count < std::min(most, p_.t - first); ++count) {
          if (position[0] < 0 || int64_t{position[0]} + count != position[count]) break;
        }
        tiles.push_back({b, first, count});
      }
    }
    return tiles;
  }

  // One block of one query. Those of the window come first.
  struct Block {
    int64_t token;
    bool entries;
    int64_t at;  // its first key or place
  };

  std::vector<Block> Blocks() const {
    std::vector<Block> blocks;
    for (int64_t token = 0; token < p_.b * p_.t; ++token) {
      const int64_t near = Window(token / p_.t, token).count, far = EntryPlaces(p_, token);
      for (int64_t at = 0; at < near; at += kBlockKeys) blocks.push_back({token, false, at});
      for (int64_t at = 0; at < far; at += kBlockKeys) blocks.push_back({token, true, at});
    }
    return blocks;
  }

  // o and lse of a query: `top` [h] is the largest score or the sink.
  void Finish(int64_t token, const float* top, const Sums& sums) const {
    Rotation rotation(p_);
    rotation.Turn(p_, p_.positions[token]);
    for (int64_t head = 0; head < p_.h; ++head) {
      uint16_t* o = p_.o + token * p_.stride_o + head * d_;
      const float norm = sums.norm[head] + Exp(p_.sink[head] - ExponentBase(top[head]));
      Divided(&sums.value[head * width_], norm == 0.0f ? 1.0f : norm, d_, o);
      rotation.Back(o + p_.nope);
      if (p_.lse != nullptr) p_.lse[token * p_.h + head] = ExponentBase(top[head]) + std::log(norm);
    }
  }

  WindowKeys Window(int64_t b, int64_t token) const {
    return VisibleWindow(p_, b, p_.positions[token]);
  }

  void LoadQuery(int64_t token, float* out) const {
    for (int64_t head = 0; head < p_.h; ++head) {
      LoadActivations(p_.q + token * p_.stride_q + head * d_, false, d_, out + head * width_);
      std::fill(out + head * width_ + d_, out + (head + 1) * width_, 0.0f);
    }
  }

  void LoadKey(const KeyRow& key, float* out) const {
    const KeyRows& rows = *key.rows;
    DecodeKeyCodes(rows.nope + key.row * rows.stride_nope, rows.scale + key.row * rows.stride_scale,
                   p_.nope, out);
    LoadActivations(rows.rope + key.row * rows.stride_rope, false, p_.rope, out + p_.nope);
    std::fill(out + d_, out + width_, 0.0f);
  }

  void LoadWindow(int64_t b, const WindowKeys& window, float* out) const {
    for (int64_t i = 0; i < window.count; ++i) {
      LoadKey(WindowRow(p_, b, window.first + i), out + i * width_);
    }
  }

  // The keys of a block; returns how many there are.
  int64_t LoadBlock(const Block& block, float* out) const {
    const int64_t b = block.token / p_.t;
    if (block.entries) return LoadEntries(b, block.token, block.at, out);
    const WindowKeys window = Window(b, block.token);
    const int64_t count = std::min(kBlockKeys, window.count - block.at);
    LoadWindow(b, {window.first + block.at, count}, out);
    return count;
  }

  // Of the places from `place` on, the block's; returns how many have an entry.
  int64_t LoadEntries(int64_t b, int64_t token, int64_t place, float* out) const {
    const int64_t end = std::min(place + kBlockKeys, EntryPlaces(p_, token));
    int64_t count = 0;
    for (KeyRow row; place < end; ++place) {
      if (EntryRow(p_, b, token, place, row)) LoadKey(row, out + count++ * width_);
    }
    return count;
  }

  // Scores [h, kBlockKeys] of a block; raises `top` [h].
  void Score(const float* q, const float* keys, int64_t count, float* score, float* top) const {
    DotBlock(keys, width_, count, q, width_, p_.h, width_, score, kBlockKeys);
    for (int64_t head = 0; head < p_.h; ++head) {
      top[head] = Scale(score + head * kBlockKeys, count, scale_, top[head]);
    }
  }

  // Sums of a block, from its scores, which become bf(e_u).
  void Sum(const float* keys, int64_t count, const float* top, float* score, Sums& sums) const {
    for (int64_t head = 0; head < p_.h; ++head) {
      sums.norm[head] = Weigh(score + head * kBlockKeys, count, ExponentBase(top[head]));
    }
    WeightedSums(score, kBlockKeys, p_.h, keys, width_, count, width_, sums.value.data(), width_);
  }

  const AttentionParams& params() const { return p_; }
  int64_t h() const { return p_.h; }
  int64_t width() const { return width_; }  // of a decoded key, with zeros behind

 private:
  const AttentionParams& p_;
  int64_t d_, width_;
  float scale_;
};

void Grow(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

// Computes tiles, one after the other.
class TileWorker {
 public:
  explicit TileWorker(const Attention& attention)
      : attention_(attention),
        p_(attention.params()),
        width_(attention.width()),
        keys_(kBlockKeys * width_),
        part_(p_.h, width_) {}

  void Run(const Tile& tile) {
    tile_ = tile;
    token_ = tile.b * p_.t + tile.first;
    while (static_cast<int64_t>(queries_.size()) < tile.count) queries_.emplace_back(p_.h, width_);
    for (int64_t i = 0; i < tile.count; ++i) Begin(queries_[i], token_ + i);
    LoadBand();
    ForBlocks([this](Query& query, const float* keys, int64_t count) {
      const int64_t block = p_.h * kBlockKeys * query.blocks++;
      Grow(query.score, block + p_.h * kBlockKeys);
      attention_.Score(query.q.data(), keys, count, &query.score[block], query.top.data());
    });
    for (Query& query : queries_) query.blocks = 0;
    ForBlocks([this](Query& query, const float* keys, int64_t count) {
      const int64_t block = p_.h * kBlockKeys * query.blocks++;
      attention_.Sum(keys, count, query.top.data(), &query.score[block], part_);
      Add(part_.norm.data(), p_.h, query.sums.norm.data());
      Add(part_.value.data(), p_.h * width_, query.sums.value.data());
    });
    for (int64_t i = 0; i < tile.count; ++i) {
      attention_.Finish(token_ + i, queries_[i].top.data(), queries_[i].sums);
    }
  }

 private:
  struct Query {
    Query(int64_t h, int64_t width) : q(h * width), top(h), sums(h, width) {}
    std::vector<float> q, top;
    std::vector<float> score;  // [blocks, h, kBlockKeys]
    int64_t blocks;            // so far
    WindowKeys window;
    Sums sums;
  };

  void Begin(Query& query, int64_t token) const {
    attention_.LoadQuery(token, query.q.data());
    query.window = attention_.Window(tile_.b, token);
    query.blocks = 0;
    std::copy_n(p_.sink, p_.h, query.top.begin());
    std::fill(query.sums.norm.begin(), query.sums.norm.end(), 0.0f);
    std::fill(query.sums.value.begin(), query.sums.value.end(), 0.0f);
  }

  // The windows of a tile lie in one stretch of positions.
  void LoadBand() {
    band_first_ = std::numeric_limits<int64_t>::max();
    int64_t end = 0;
    for (int64_t i = 0; i < tile_.count; ++i) {
      const WindowKeys& window = queries_[i].window;
      if (window.count == 0) continue;
      band_first_ = std::min(band_first_, window.first);
      end = std::max(end, window.first + window.count);
    }
    if (end == 0) return;
    Grow(band_, (end - band_first_) * width_);
    attention_.LoadWindow(tile_.b, {band_first_, end - band_first_}, band_.data());
  }

  // visit(query, keys, count) for every block that has keys, those of a query in their order.
  template <typename Visit>
  void ForBlocks(const Visit& visit) {
    for (int64_t i = 0; i < tile_.count; ++i) {
      const WindowKeys& window = queries_[i].window;
      for (int64_t at = 0; at < window.count; at += kBlockKeys) {
        visit(queries_[i], &band_[(window.first + at - band_first_) * width_],
              std::min(kBlockKeys, window.count - at));
      }
    }
    if (p_.topk_idx != nullptr) {
      ForChosenEntries(visit);
    } else {
      ForEveryEntry(visit);
    }
  }

  template <typename Visit>
  void ForChosenEntries(const Visit& visit) {
    for (int64_t i = 0; i < tile_.count; ++i) {
      for (int64_t place = 0; place < EntryPlaces(p_, token_ + i); place += kBlockKeys) {
        const int64_t count = attention_.LoadEntries(tile_.b, token_ + i, place, keys_.data());
        if (count > 0) visit(queries_[i], keys_.data(), count);
      }
    }
  }

  // Entries are decoded once, for the query that sees the most of them.
  template <typename Visit>
  void ForEveryEntry(const Visit& visit) {
    int64_t most = token_;
    for (int64_t i = 1; i < tile_.count; ++i) {
      if (VisibleEntries(p_, token_ + i) > VisibleEntries(p_, most)) most = token_ + i;
    }
    for (int64_t at = 0; at < VisibleEntries(p_, most); at += kBlockKeys) {
      attention_.LoadEntries(tile_.b, most, at, keys_.data());
      for (int64_t i = 0; i < tile_.count; ++i) {
        const int64_t count = std::min(VisibleEntries(p_, token_ + i) - at, kBlockKeys);
        if (count > 0) visit(queries_[i], keys_.data(), count);
      }
    }
  }

  const Attention& attention_;
  const AttentionParams& p_;
  const int64_t width_;
  Tile tile_;
  int64_t token_, band_first_;
  std::vector<float> band_, keys_;  // [positions, width], [kBlockKeys, width]
  std::vector<Query> queries_;
  Sums part_;
};

// Few queries: their blocks are shared among threads.
class BlockRun {
 public:
  BlockRun(const Attention& attention, std::vector<Attention::Block> blocks)
      : attention_(attention),
        p_(attention.params()),
        blocks_(std::move(blocks)),
        count_(blocks_.size()),
        score_(blocks_.size() * p_.h * kBlockKeys),
        top_(blocks_.size() * p_.h, -kInfinity),
        parts_(blocks_.size(), Sums(p_.h, attention.width())) {}

  static int64_t Bytes(const Attention& attention) {
    return attention.params().h * (attention.width() + kBlockKeys + 2) * sizeof(float);
  }

  void Run(int64_t grain, const ParallelLoop& parallel) {
    const auto n = static_cast<int64_t>(blocks_.size());
    parallel(n, grain, [&](int64_t begin, int64_t end) { Score(begin, end); });
    SetTop();
    parallel(n, grain, [&](int64_t begin, int64_t end) { Sum(begin, end); });
    Finish();
  }

 private:
  float* ScoreOf(int64_t block) { return &score_[block * p_.h * kBlockKeys]; }

  void Score(int64_t begin, int64_t end) {
    const KeepDenormals keep_denormals;
    std::vector<float> q(p_.h * attention_.width()), keys(kBlockKeys * attention_.width());
    for (int64_t i = begin; i < end; ++i) {
      count_[i] = attention_.LoadBlock(blocks_[i], keys.data());
      if (count_[i] == 0) continue;
      attention_.LoadQuery(blocks_[i].token, q.data());
      attention_.Score(q.data(), keys.data(), count_[i], ScoreOf(i), &top_[i * p_.h]);
    }
  }

  // The largest of a query's blocks and the sink.
  void SetTop() {
    query_top_.resize(p_.b * p_.t * p_.h);
    for (int64_t i = 0; i < p_.b * p_.t * p_.h; ++i) query_top_[i] = p_.sink[i % p_.h];
    for (size_t i = 0; i < blocks_.size(); ++i) {
      for (int64_t head = 0; head < p_.h; ++head) {
        float& top = query_top_[blocks_[i].token * p_.h + head];
        top = top_[i * p_.h + head] > top ? top_[i * p_.h + head] : top;
      }
    }
  }

  void Sum(int64_t begin, int64_t end) {
    const KeepDenormals keep_denormals;
    std::vector<float> keys(kBlockKeys * attention_.width());
    for (int64_t i = begin; i < end; ++i) {
      if (count_[i] == 0) continue;
      attention_.LoadBlock(blocks_[i], keys.data());
      const float* top = &query_top_[blocks_[i].token * p_.h];
      attention_.Sum(keys.data(), count_[i], top, ScoreOf(i), parts_[i]);
    }
  }

  void Finish() const {
    const KeepDenormals keep_denormals;
    size_t i = 0;
    for (int64_t token = 0; token < p_.b * p_.t; ++token) {
      Sums sums(p_.h, attention_.width());
      for (; i < blocks_.size() && blocks_[i].token == token; ++i) {
        if (count_[i] == 0) continue;
        Add(parts_[i].norm.data(), p_.h, sums.norm.data());
        Add(parts_[i].value.data(), p_.h * attention_.width(), sums.value.data());
      }
      attention_.Finish(token, &query_top_[token * p_.h], sums);
    }
  }

  const Attention& attention_;
  const AttentionParams& p_;
  std::vector<Attention::Block> blocks_;
  std::vector<int64_t> count_;                  // keys of every block
  std::vector<float> score_, top_, query_top_;  // [blocks, h, kBlockKeys], [blocks, h], [b, t, h]
  std::vector<Sums> parts_;
};

}  // namespace

void AttentionCpu(const AttentionParams& params, const ParallelLoop& parallel) {
  const int64_t queries = params.b * params.t;
  if (queries == 0 || params.h == 0) return;
  const Attention attention(params);
  const int64_t work = 2 * params.h * attention.width() * kBlockKeys;  // of a block
  const int64_t grain = kGrainWork / work + 1;
  if (queries < kFewQueries) {
    std::vector<Attention::Block> blocks = attention.Blocks();
    if (static_cast<int64_t>(blocks.size()) * BlockRun::Bytes(attention) <= kMaxSumsBytes) {
      return BlockRun(attention, std::move(blocks)).Run(grain, parallel);
    }
  }
  const std::vector<Tile> tiles = attention.Tiles();
  parallel(tiles.size(), grain, [&](int64_t begin, int64_t end) {
    const KeepDenormals keep_denormals;
    TileWorker worker(attention);
    for (int64_t i = begin; i < end; ++i) worker.Run(tiles[i]);
  });
}

}  // namespace dsv4
