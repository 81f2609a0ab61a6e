// Keys that are scored without a query (pooling): hidden rows h = tanh(k), or with a gate tanh(k)
// sigmoid(g), and their inner products with rows of score weights, which stand for the queries.
#pragma once

#include "scores.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Which entries of the hidden rows of one head of one sequence dropout keeps: feature d takes word
// d % 4 of Philox with the counter (key position, d / 4, ~(2 head + factor), sequence).
template <class T>
class FeatureMask {
 public:
  FeatureMask(const Problem& problem, const Sequence& sequence, int64_t head, int64_t columns,
              Scratch& scratch)
      : dropout_(problem.feature_dropout), sequence_(sequence.number), head_(head) {
    if (active()) {
      factors_ = scratch.take<T>(round_up(columns, kBlock));
    }
  }

  bool active() const { return dropout_[0].active || dropout_[1].active; }

  // By what features [begin, begin + count) of the key at `position` are multiplied, begin being a
  // multiple of 4: 0, or the scale of what is kept.
  const T* factors(int64_t position, int64_t begin, int64_t count) const {
    for (int64_t c = 0; c < count; c += kBlock) {
      for (int64_t n = 0; n < kBlock; ++n) {
        factors_[c + n] = 1;
      }
      for (int factor = 0; factor < 2; ++factor) {
        if (dropout_[factor].active) {
          multiply(dropout_[factor], ~static_cast<uint32_t>(2 * head_ + factor), position,
                   begin + c, factors_ + c);
        }
      }
    }
    return factors_;
  }

 private:
  static constexpr int kGroups = 16;  // of four features, whose rounds are vectors of operations
  static constexpr int kBlock = 4 * kGroups;

  void multiply(const Dropout& dropout, uint32_t number, int64_t position, int64_t begin,
                T* factors) const {
    uint32_t c[4][kGroups];
    for (int n = 0; n < kGroups; ++n) {
      c[0][n] = static_cast<uint32_t>(position);
      c[1][n] = static_cast<uint32_t>(begin / 4 + n);
      c[2][n] = number;
      c[3][n] = static_cast<uint32_t>(sequence_);
    }
    PhiloxKey key = dropout.philox_key();
    for (int round = 0; round < 10; ++round, key = next_key(key)) {
      for (int n = 0; n < kGroups; ++n) {
        philox_round(c[0][n], c[1][n], c[2][n], c[3][n], key);
      }
    }
    const auto threshold = static_cast<uint32_t>(__builtin_ceil(dropout.threshold));
    const T scale = static_cast<T>(dropout.keep_scale);
    for (int n = 0; n < kGroups; ++n) {
      for (int word = 0; word < 4; ++word) {
        factors[4 * n + word] *= (c[word][n] >> 8) >= threshold ? scale : T(0);
      }
    }
  }

  const Dropout* dropout_;
  int64_t sequence_;
  int64_t head_;
  T* factors_ = nullptr;
};

// `count` numbers from `source`, at most a vector of them, then zeros.
template <class T>
ATTN_EXT_INLINE Vec<T> load_upto(const T* source, int64_t count) {
  return count >= kLanes<T> ? load<T>(source) : load_partial<T>(source, count);
}

// The keys and gates of one head of one sequence.
template <class T>
class HiddenSource {
 public:
  HiddenSource(const Problem& problem, const Sequence& sequence, int64_t head, int64_t columns,
               Scratch& scratch)
      : key_(key_rows(problem.key, sequence, head)),
        gate_(key_rows(problem.gate, sequence, head)),
        mask_(problem, sequence, head, columns, scratch),
        key_copy_(scratch.take<T>(columns)),
        gate_copy_(scratch.take<T>(columns)) {}

  // Calls visit(c, parts, factor) for each vector of features begin + c of key j; numbers past
  // `count` belong to nobody.
  template <class Visit>
  ATTN_EXT_INLINE void for_each_vector(int64_t j, int64_t begin, int64_t count,
                                       const Visit& visit) const {
    const T* factors = mask_.active() ? mask_.factors(key_.position(j), begin, count) : nullptr;
    const T* key = row_values<T>(key_, j, begin, count, key_copy_);
    if (gate_.data == nullptr) {
      for (int64_t c = 0; c < count; c += kLanes<T>) {
        const TanhParts<T> parts = tanh_parts<T>(load_upto<T>(key + c, count - c));
        visit(c, GatedTanh<T>{parts.tanh, parts.tanh, parts.slope, splat<T>(1), {}},
              factors == nullptr ? splat<T>(1) : load<T>(factors + c));
      }
      return;
    }
    const T* gate = row_values<T>(gate_, j, begin, count, gate_copy_);
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      visit(c, gated_tanh<T>(load_upto<T>(key + c, count - c), load_upto<T>(gate + c, count - c)),
            factors == nullptr ? splat<T>(1) : load<T>(factors + c));
    }
  }

 private:
  RowSource key_;
  RowSource gate_;  // data is null without
  FeatureMask<T> mask_;
  T* key_copy_;
  T* gate_copy_;
};

// Scores of a block of rows of score weights against ranges of keys, as AdditiveScores.
template <class T>
class HiddenScores {
 public:
  HiddenScores(const Problem& problem, const Sequence& sequence, int64_t head, int64_t query,
               int64_t queries, const ScoreWeights<T>*, Scratch& scratch)
      : dim_(problem.dim),
        queries_(queries),
        source_(problem, sequence, head, problem.dim, scratch),
        room_(kTileCols, problem.dim, scratch),
        weights_(panel_of<T>(query_rows(problem.query, sequence, head), query, queries, 0,
                             problem.dim, scratch.take<T>(queries * steps_of<T>(dim_) * kStep<T>),
                             room_.copy)) {}

  // scores[i * ld + j] = w_i . h_j for keys first + j, j < keys.
  void compute(int64_t first, int64_t keys, T* scores, int64_t ld) {
    const int64_t steps = steps_of<T>(dim_);
    const Panel<T> hidden{room_.data, steps * kStep<T>, kStep<T>};
    for (int64_t j = 0; j < keys; j += kTileCols) {
      const int64_t cols = smaller(kTileCols, keys - j);
      for (int64_t n = 0; n < cols; ++n) {
        pack_row(first + j + n, room_.data + n * hidden.row);
      }
      for (int64_t i = 0; i < queries_; i += kTileRows) {
        inner_products<T, DotProduct>(weights_.from_row(i), smaller(kTileRows, queries_ - i),
                                      hidden, cols, steps, nullptr, scores + i * ld + j, ld);
      }
    }
  }

 private:
  void pack_row(int64_t j, T* row) const {
    if (dim_ % kStep<T> != 0) {  // the last vector may be padding
      store<T>(row + steps_of<T>(dim_) * kStep<T> - kLanes<T>, Vec<T>{});
    }
    source_.for_each_vector(j, 0, dim_, [&](int64_t c, const GatedTanh<T>& parts, Vec<T> factor) {
      store<T>(row + c, parts.value * factor);
    });
  }

  int64_t dim_;
  int64_t queries_;
  HiddenSource<T> source_;
  PanelRoom<T> room_;
  Panel<T> weights_;
};

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
