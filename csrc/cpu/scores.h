// Scores of a block of queries and a range of keys, each tile by the route its magnitudes allow,
// and rows of them: maximum, exponentials, sums, and their scatter into tensors indexed by key.
#pragma once

#include "call.h"
#include "tiles.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Keys of one head of one sequence and, a few rows at a time, their exponentials.
template <class T>
class KeyExponentials {
 public:
  KeyExponentials(const Problem& problem, const Sequence& sequence, int64_t head, int64_t rows,
                  int64_t columns, Scratch& scratch)
      : key(key_rows(problem.key, sequence, head)),
        prepared_(key_rows(problem.exp_key, sequence, head)),
        bound_(key_rows(problem.key_bound, sequence, head)),
        room_(rows, columns, scratch) {}

  // Of columns [begin, begin + count) of keys [first, first + keys): prepared ones in place if
  // possible.
  Panel<T> take(int64_t first, int64_t keys, int64_t begin, int64_t count) {
    Panel<T> panel;
    if (prepared_.data != nullptr) {
      for (int64_t n = 0; n < keys; ++n) {
        room_.bounds[n] = static_cast<const T*>(bound_.data)[bound_.offset(first + n)];
      }
      panel = panel_of<T>(prepared_, first, keys, begin, count, room_.data, room_.copy);
    } else {
      panel = packed_panel<T, PackExponentials<T>>(key, first, keys, begin, count, room_);
    }
    largest = largest_bound(room_.bounds, keys);
    return panel;
  }

  const RowSource key;
  T largest = 0;  // magnitude in the rows taken last

 private:
  const RowSource prepared_;  // data is null without
  const RowSource bound_;
  const PanelRoom<T> room_;
};

// Smallest and largest of `rows` rows, lane by lane, for half a step of features.
template <class T>
struct Extremes {
  Vec<T> smallest;
  Vec<T> largest;

  static Extremes of(const Panel<T>& panel, int64_t rows, int64_t p, int64_t half) {
    const StepRows<T> step = panel.at(p);
    const T* data = step.data + half;
    Extremes result{load<T>(data), load<T>(data)};
    for (int64_t i = 1; i < rows; ++i) {
      const Vec<T> next = load<T>(data + i * step.row);
      result.smallest = next < result.smallest ? next : result.smallest;
      result.largest = next > result.largest ? next : result.largest;
    }
    return result;
  }
};

// Tells whether the features that can be informative (see can_inform) for one of a block's queries
// and one of some keys have more than `least` of all |w|, or of their number without `weights`.
template <class T>
class Informative {
 public:
  Informative(const QueryBlock<T>& queries, int64_t steps, const T* weights, T least,
              Scratch& scratch)
      : queries_(queries),
        steps_(steps),
        weights_(weights),
        least_(least),
        extremes_(scratch.take<Extremes<T>>(2 * steps)) {}

  bool operator()(const Panel<T>& keys, int64_t key_count) {
    constexpr int64_t kStepsOfLook = 4;
    Vec<T> informative{};
    for (int64_t p = 0; p < steps_; ++p) {
      for (int half = 0; half < 2; ++half) {
        const Extremes<T> a = query_extremes(p, half);
        const Extremes<T> b = Extremes<T>::of(keys, key_count, p, half * kLanes<T>);
        const Vec<T> low = a.smallest * b.smallest;
        const Vec<T> high = a.largest * b.largest;
        const VecBits<T> unsaturated =
            (low <= T(kSaturatedProduct)) & (high >= T(1 / kSaturatedProduct));
        const VecBits<T> sizeable = (high >= T(kSmallProduct)) | (low <= T(1 / kSmallProduct));
        const Vec<T> share =
            weights_ == nullptr ? splat<T>(T(1))
                                : magnitude<T>(load<T>(weights_ + p * kStep<T> + half * kLanes<T>));
        informative += from_bits<T>(bits_of<T>(share) & unsaturated & sizeable);
      }
      if ((p % kStepsOfLook == 0 || p == steps_ - 1) && sum_of_lanes<T>(informative) > least_) {
        return true;
      }
    }
    return false;
  }

 private:
  // Computed once for all keys that the queries meet, as far as features are looked at.
  Extremes<T> query_extremes(int64_t p, int half) {
    const int64_t n = 2 * p + half;
    for (; known_ <= n; ++known_) {
      extremes_[known_] = Extremes<T>::of(queries_.exponentials, queries_.count, known_ / 2,
                                          known_ % 2 * kLanes<T>);
    }
    return extremes_[n];
  }

  const QueryBlock<T>& queries_;
  const int64_t steps_;
  const T* const weights_;
  const T least_;
  Extremes<T>* const extremes_;
  int64_t known_ = 0;
};

// Scores of a block of queries [query, query + count) against ranges of their keys.
template <class T>
class AdditiveScores {
 public:
  AdditiveScores(const Problem& problem, const Sequence& sequence, int64_t head, int64_t query,
                 int64_t count, const ScoreWeights<T>* weights, Scratch& scratch)
      : problem_(problem),
        weights_(weights[head]),
        queries_(pack_queries<T>(query_rows(problem.query, sequence, head), query, count, 0,
                                 problem.dim, weights_.data, scratch)),
        keys_(problem, sequence, head, kTileCols, problem.dim, scratch),
        exact_query_(kTileRows, problem.dim, scratch),
        exact_key_(kTileCols, problem.dim, scratch),
        informative_(queries_, steps_of<T>(problem.dim), weights_.data, weights_.least_informative,
                     scratch) {}

  // scores[i * ld + j] = sum_d w_d tanh(q_id + k_jd) for every query of the block and keys first +
  // j, j < keys.
  void compute(int64_t first, int64_t keys, T* scores, int64_t ld) {
    const int64_t dim = problem_.dim;
    const auto factored =
        divides_quickly() ? inner_products<T, DividedScore> : inner_products<T, FactoredScore>;
    for (int64_t j = 0; j < keys; j += kTileCols) {
      const int64_t cols = smaller(kTileCols, keys - j);
      const Panel<T> panel = keys_.take(first + j, cols, 0, dim);
      const bool informs = weights_.fit && (problem_.is_short || informative_(panel, cols));
      for (int64_t i = 0; i < queries_.count; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, queries_.count - i);
        T* out = scores + i * ld + j;
        const T query_bound = largest_bound(queries_.bounds + i, rows);
        if (informs && in_factored_range(query_bound, keys_.largest, kSmallestMagnitudeSum)) {
          factored(queries_.exponentials.from_row(i), rows, panel, cols, steps_of<T>(dim),
                   weights_.data, out, ld);
        } else {
          compute_unfactored(i, rows, first + j, cols,
                             query_bound + keys_.largest <= T(kSmallTanhLimit), out, ld);
        }
      }
    }
  }

 private:
  // A tile from the numbers themselves.
  void compute_unfactored(int64_t i, int64_t rows, int64_t key, int64_t cols, bool small, T* out,
                          int64_t ld) const {
    const int64_t dim = problem_.dim;
    const Panel<T> a = panel_of<T>(queries_.source, queries_.first + i, rows, 0, dim,
                                   exact_query_.data, exact_query_.copy);
    const Panel<T> b = panel_of<T>(keys_.key, key, cols, 0, dim, exact_key_.data, exact_key_.copy);
    const auto products = small ? inner_products<T, SmallScore> : inner_products<T, ExactScore>;
    products(a, rows, b, cols, steps_of<T>(dim), weights_.data, out, ld);
  }

  const Problem& problem_;
  const ScoreWeights<T>& weights_;
  const QueryBlock<T> queries_;
  KeyExponentials<T> keys_;
  const PanelRoom<T> exact_query_;
  const PanelRoom<T> exact_key_;
  Informative<T> informative_;
};

// Products of the query-side rows [i0, i0 + rows) of `left` with rows first + j, j < cols, of
// `right`: out[i * ld + j].
template <class T>
void dot_block(const RowSource& left, int64_t i0, int64_t rows, const RowSource& right,
               int64_t first, int64_t cols, int64_t dim, T* out, int64_t ld, Scratch& scratch) {
  const int64_t steps = steps_of<T>(dim);
  const bool copy_left = !lies_in_panel<T>(left);
  T* left_room = scratch.take<T>(rows * (copy_left ? steps : 1) * kStep<T>);
  const PanelRoom<T> room(kTileCols, dim, scratch);
  const Panel<T> a = panel_of<T>(left, i0, rows, 0, dim, left_room, room.copy);
  for (int64_t j = 0; j < cols; j += kTileCols) {
    const int64_t tile = smaller(kTileCols, cols - j);
    prefetch_rows(right, first + j + tile, smaller(kTileCols, cols - j - tile), dim);
    const Panel<T> b = panel_of<T>(right, first + j, tile, 0, dim, room.data, room.copy);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      inner_products<T, DotProduct>(a.from_row(i), smaller(kTileRows, rows - i), b, tile, steps,
                                    nullptr, out + i * ld + j, ld);
    }
  }
}

// Fills scores[count .. ld) so that whole vectors can be processed.
template <class T>
ATTN_EXT_INLINE void pad_row(T* row, int64_t count, int64_t ld, T value) {
  for (int64_t j = count; j < ld; ++j) {
    row[j] = value;
  }
}

template <class T>
T largest_of_row(const T* row, int64_t ld) {
  Vec<T> largest = load<T>(row);
  for (int64_t j = kLanes<T>; j < ld; j += kLanes<T>) {
    const Vec<T> next = load<T>(row + j);
    largest = next > largest ? next : largest;
  }
  return fold_lanes<T, LargerLane<T>>(largest);
}

// row = exp(row - shift) * scale; returns the sum.
template <class T>
T exponentiate_row(T* row, int64_t ld, T shift, T scale) {
  Vec<T> sum{};
  for (int64_t j = 0; j < ld; j += kLanes<T>) {
    const Vec<T> value = exp_nonpositive<T>(load<T>(row + j) - shift) * scale;
    store<T>(row + j, value);
    sum += value;
  }
  return sum_of_lanes<T>(sum);
}

template <class T>
ATTN_EXT_INLINE void scale_row(T* row, int64_t count, T scale) {
  for (int64_t n = 0; n < count; n += kLanes<T>) {
    store<T>(row + n, load<T>(row + n) * scale);
  }
}

// -infinity stands for "nothing yet"; a row of -infinities keeps its sum of 0, hence its NaN.
template <class T>
ATTN_EXT_INLINE T shift_of(T largest) {
  return largest == -__builtin_inf() ? T(0) : largest;
}

// Where one query's row of an [.., key] tensor (weights, their gradient) starts; key j adds
// position(j) * row.
inline RowSource weight_row(const Rows& view, const Problem& problem, const Sequence& sequence,
                            int64_t head, int64_t query) {
  const int64_t base = sequence.number * view.batch + query * view.row + head * view.head +
                       (problem.weights_by_key ? sequence.key_begin * view.col : 0);
  return {view.data, view.dtype, base, view.col, 1, sequence.first_key, sequence.key_index};
}

// The same of scores, which forward keeps for backward or until it knows their softmax.
inline RowSource score_row(const Rows& view, const Problem& problem, const Sequence& sequence,
                           int64_t head, int64_t query) {
  if (problem.scores_by_key) {
    RowSource rows = key_rows(view, sequence, head);
    rows.base += query * view.col;
    return rows;
  }
  const RowSource rows = query_rows(view, sequence, head);
  return {view.data, view.dtype,         rows.offset(query), view.col,
          1,         sequence.first_key, sequence.key_index};
}

// Elements [first, first + count) along the keys of `target`.
template <class T>
void write_along_keys(const RowSource& target, int64_t first, int64_t count, const T* values) {
  void* data = const_cast<void*>(target.data);
  if (target.index == nullptr) {
    write_row<T>(data, target.dtype, target.offset(first), target.row, count, values);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    write_row<T>(data, target.dtype, target.offset(first + j), 1, 1, values + j);
  }
}

template <class T>
void read_along_keys(const RowSource& source, int64_t first, int64_t count, T* values) {
  if (source.index == nullptr) {
    read_row<T>(source.data, source.dtype, source.offset(first), source.row, count, values);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    read_row<T>(source.data, source.dtype, source.offset(first + j), 1, 1, values + j);
  }
}

// Which of keys [first, first + count) dropout keeps for one query.
inline void dropout_mask(const Dropout& dropout, const Sequence& sequence, const RowSource& key,
                         int64_t head, int64_t query, int64_t first, int64_t count,
                         uint8_t* keeps) {
  for (int64_t j = 0; j < count; ++j) {
    keeps[j] = dropout.keeps(key.position(first + j), query, head, sequence.number);
  }
}

template <class T>
void drop_row(T* row, const uint8_t* keeps, int64_t count, T keep_scale) {
  for (int64_t j = 0; j < count; ++j) {
    row[j] = keeps[j] ? row[j] * keep_scale : T(0);
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
