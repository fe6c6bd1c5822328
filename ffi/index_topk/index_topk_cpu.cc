// A score is a sum over channels, one after the other, for every head, then over heads, one after
// the other: bits depend on the query and the key alone. Entries are scored in blocks and the best
// kept as they come, or, where few queries leave threads without work, all scores are made first.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "common/clones.h"
#include "common/denormals.h"
#include "common/dot.h"
#include "index_topk/index_topk.h"
#include "index_topk/index_topk_order.h"

namespace dsv4 {
namespace {

constexpr int64_t kBlockKeys = 64;
// Consecutive queries share the decoding of keys: up to kTileQueries, or kTileRows heads of them.
constexpr int64_t kTileQueries = 16, kTileRows = 256;
// A call of fewer queries cuts their entries into pieces, as long as all scores take no more bytes
// than this.
constexpr int64_t kFewQueries = 8, kPieceKeys = 512, kMaxScoreBytes = int64_t{1} << 26;
// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 17;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// [count, width] to [width, kBlockKeys].
DSV4_CLONES void Transpose(const float* keys, int64_t count, int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < width; ++c) out[c * kBlockKeys + i] = keys[i * width + c];
  }
}

// score[i] = sum over heads of weight * relu(dot [h, kBlockKeys]).
DSV4_CLONES void AddHeads(const float* dot, const float* weight, int64_t h, float* score) {
  float sum[kBlockKeys] = {};
  for (int64_t head = 0; head < h; ++head) {
    for (int64_t i = 0; i < kBlockKeys; ++i) {
      const float x = dot[head * kBlockKeys + i];
      sum[i] += (x < 0.0f ? 0.0f : x) * weight[head];  // NaN stays
    }
  }
  std::copy_n(sum, kBlockKeys, score);
}

// The k best of entries that come by ascending id.
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {}

  void Clear() {
    kept_.clear();
    bar_ = 0;
  }

  void Add(const float* score, int64_t count, int64_t first) {
    for (int64_t i = 0; i < count; ++i) {
      // The lower id is the larger number.
      const uint64_t id = ~static_cast<uint32_t>(first + i);
      const uint64_t entry = static_cast<uint64_t>(ScoreOrder(score[i])) << 32 | id;
      if (entry <= bar_) continue;
      kept_.push_back(entry);
      if (static_cast<int64_t>(kept_.size()) >= 2 * k_ + kBlockKeys) Cut();
    }
  }

  // Their ids, ascending, then -1.
  void Store(int32_t* idx) {
    if (static_cast<int64_t>(kept_.size()) > k_) Cut();
    const auto found = static_cast<int64_t>(kept_.size());
    for (int64_t i = 0; i < found; ++i) idx[i] = static_cast<int32_t>(~kept_[i]);
    std::sort(idx, idx + found);
    std::fill(idx + found, idx + k_, -1);
  }

 private:
  void Cut() {
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), std::greater<>());
    kept_.resize(k_);
    bar_ = kept_.back();
  }

  int64_t k_;
  uint64_t bar_ = 0;  // the worst that is kept, once there are k
  std::vector<uint64_t> kept_;
};

// Decoded queries and keys, and the scores of a block.
class Scorer {
 public:
  explicit Scorer(const IndexTopkParams& params)
      : p_(params),
        width_(PaddedInputs(p_.d)),
        rows_(kBlockKeys * width_),
        keys_(width_ * kBlockKeys),
        dot_(p_.h * kBlockKeys),
        weight_(p_.h) {}

  void LoadQuery(int64_t token, std::vector<float>& q) const {
    q.resize(p_.h * width_);
    for (int64_t head = 0; head < p_.h; ++head) {
      Decode(p_.q, p_.q_scale, token * p_.h + head, &q[head * width_]);
    }
  }

  // Entries first .. first + count - 1 of a batch row.
  void LoadKeys(int64_t b, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Decode(p_.key, p_.key_scale, b * p_.slots + first + i, &rows_[i * width_]);
    }
    std::fill(rows_.begin() + count * width_, rows_.end(), 0.0f);
    Transpose(rows_.data(), kBlockKeys, width_, keys_.data());
  }

  // Of the keys that are loaded: kBlockKeys scores.
  void Score(const std::vector<float>& q, int64_t token, float* score) {
    WeightedSums(q.data(), width_, p_.h, keys_.data(), kBlockKeys, width_, kBlockKeys, dot_.data(),
                 kBlockKeys);
    for (int64_t head = 0; head < p_.h; ++head) {
      weight_[head] = IndexWeight(p_, IndexWeightBits(p_, token * p_.h + head));
    }
    AddHeads(dot_.data(), weight_.data(), p_.h, score);
  }

 private:
  void Decode(const uint8_t* code, const uint8_t* scale, int64_t row, float* out) const {
    if (p_.form == IndexForm::kMxfp4) {
      DecodeWeights(WeightForm::kMxfp4, code, scale, p_.d, row, 0, p_.d, out);
    } else {
      DecodeTokenCodes(code + row * p_.d, scale[row], p_.d, out);
      std::fill(out + p_.d, out + width_, 0.0f);
    }
  }

  const IndexTopkParams& p_;
  const int64_t width_;
  std::vector<float> rows_, keys_, dot_, weight_;
};

int32_t* ChoiceOf(const IndexTopkParams& p, int64_t token) { return p.idx + token * p.topk; }

void StoreEvery(const IndexTopkParams& p, int64_t token) {
  const int64_t n = std::min(VisibleEntries(p, token), p.topk);
  int32_t* idx = ChoiceOf(p, token);
  for (int64_t i = 0; i < p.topk; ++i) idx[i] = i < n ? static_cast<int32_t>(i) : -1;
}

// Queries [b, first .. first + count).
struct Tile {
  int64_t b, first, count;
};

std::vector<Tile> Tiles(const IndexTopkParams& p) {
  const int64_t most = std::clamp<int64_t>(kTileRows / std::max<int64_t>(p.h, 1), 1, kTileQueries);
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < p.b; ++b) {
    for (int64_t first = 0; first < p.t; first += most) {
      tiles.push_back({b, first, std::min(most, p.t - first)});
    }
  }
  return tiles;
}

// Computes tiles, one after the other.
class TileWorker {
 public:
  explicit TileWorker(const IndexTopkParams& params) : p_(params), scorer_(params) {}

  void Run(const Tile& tile) {
    while (static_cast<int64_t>(queries_.size()) < tile.count) queries_.emplace_back(p_.topk);
    const int64_t token = tile.b * p_.t + tile.first;
    int64_t most = 0;
    for (int64_t i = 0; i < tile.count; ++i) {
      Query& query = queries_[i];
      query.best.Clear();
      query.visible = NeedsScores(p_, token + i) ? VisibleEntries(p_, token + i) : 0;
      most = std::max(most, query.visible);
      if (query.visible > 0) scorer_.LoadQuery(token + i, query.q);
    }
    for (int64_t at = 0; at < most; at += kBlockKeys) {
      scorer_.LoadKeys(tile.b, at, std::min(kBlockKeys, most - at));
      for (int64_t i = 0; i < tile.count; ++i) Take(queries_[i], token + i, at);
    }
    for (int64_t i = 0; i < tile.count; ++i) Finish(queries_[i], token + i);
  }

 private:
  struct Query {
    explicit Query(int64_t k) : best(k) {}
    std::vector<float> q;
    Best best;
    int64_t visible;
  };

  // The block of entries from `at` on.
  void Take(Query& query, int64_t token, int64_t at) {
    const int64_t count = std::min(kBlockKeys, query.visible - at);
    if (count <= 0) return;
    float score[kBlockKeys];
    scorer_.Score(query.q, token, score);
    if (p_.scores != nullptr) std::copy_n(score, count, p_.scores + token * p_.slots + at);
    if (p_.topk > 0) query.best.Add(score, count, at);
  }

  void Finish(Query& query, int64_t token) const {
    if (p_.scores != nullptr) {
      float* scores = p_.scores + token * p_.slots;
      std::fill(scores + query.visible, scores + p_.slots, -kInfinity);
    }
    if (p_.topk == 0) return;
    if (!NeedsScores(p_, token)) return StoreEvery(p_, token);
    query.best.Store(ChoiceOf(p_, token));
  }

  const IndexTopkParams& p_;
  Scorer scorer_;
  std::vector<Query> queries_;
};

// Few queries: pieces of their entries are shared among threads.
class PieceRun {
 public:
  explicit PieceRun(const IndexTopkParams& params) : p_(params) {
    int64_t total = 0;
    for (int64_t token = 0; token < p_.b * p_.t; ++token) {
      const int64_t n = NeedsScores(p_, token) ? VisibleEntries(p_, token) : 0;
      for (int64_t at = 0; at < n; at += kPieceKeys) pieces_.push_back({token, at});
      first_.push_back(total);
      total += n;
    }
    score_.resize(total);
  }

  void Run(const ParallelLoop& parallel) {
    const int64_t work = std::max<int64_t>(p_.h, 1) * PaddedInputs(p_.d) * kPieceKeys;
    const int64_t grain = kGrainWork / work + 1;
    parallel(pieces_.size(), grain, [&](int64_t begin, int64_t end) { Score(begin, end); });
    parallel(p_.b * p_.t, 1, [&](int64_t begin, int64_t end) {
      Best best(p_.topk);
      for (int64_t token = begin; token < end; ++token) Choose(token, best);
    });
  }

 private:
  struct Piece {
    int64_t token, at;
  };

  void Score(int64_t begin, int64_t end) {
    const KeepDenormals keep_denormals;
    Scorer scorer(p_);
    std::vector<float> q;
    float score[kBlockKeys];
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces_[i];
      const int64_t token = piece.token, visible = VisibleEntries(p_, token);
      if (i == begin || pieces_[i - 1].token != token) scorer.LoadQuery(token, q);
      const int64_t last = std::min(piece.at + kPieceKeys, visible);
      for (int64_t at = piece.at; at < last; at += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, last - at);
        scorer.LoadKeys(token / p_.t, at, count);
        scorer.Score(q, token, score);
        std::copy_n(score, count, &score_[first_[token] + at]);
      }
    }
  }

  void Choose(int64_t token, Best& best) const {
    const int64_t n = VisibleEntries(p_, token);
    const float* found = score_.data() + first_[token];
    if (p_.scores != nullptr) {
      float* scores = p_.scores + token * p_.slots;
      std::copy_n(found, n, scores);
      std::fill(scores + n, scores + p_.slots, -kInfinity);
    }
    if (p_.topk == 0) return;
    if (!NeedsScores(p_, token)) return StoreEvery(p_, token);
    best.Clear();
    best.Add(found, n, 0);
    best.Store(ChoiceOf(p_, token));
  }

  const IndexTopkParams& p_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> first_;  // score of every query
  std::vector<float> score_;
};

}  // namespace

void IndexTopkCpu(const IndexTopkParams& params, const ParallelLoop& parallel) {
  const int64_t queries = params.b * params.t;
  if (queries == 0) return;
  const int64_t bytes = queries * params.slots * static_cast<int64_t>(sizeof(float));
  if (queries < kFewQueries && bytes <= kMaxScoreBytes) return PieceRun(params).Run(parallel);
  const std::vector<Tile> tiles = Tiles(params);
  parallel(tiles.size(), 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals keep_denormals;
    TileWorker worker(params);
    for (int64_t i = begin; i < end; ++i) worker.Run(tiles[i]);
  });
}

}  // namespace dsv4
