// Scores of a block of queries and a range of keys, each tile by the route its magnitudes allow.
#pragma once

#include "tiles.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// The key side of one head of one sequence: raw keys, and exponentials where they were prepared.
struct KeySide {
  RowSource key;
  RowSource exp_key;  // data is null without
  RowSource bound;
};

inline KeySide key_side(const Problem& problem, const Sequence& sequence, int64_t head) {
  return {key_rows(problem.key, sequence, head), key_rows(problem.exp_key, sequence, head),
          key_rows(problem.key_bound, sequence, head)};
}

// Exponentials of a few consecutive keys, and their largest magnitudes.
template <class T>
struct KeyBlock {
  Panel<T> exponentials;
  const T* bounds;
};

// Room for `rows` packed rows of `columns` features.
template <class T>
struct PanelRoom {
  T* data;
  T* bounds;
  T* copy;

  PanelRoom(int64_t rows, int64_t columns, Scratch& scratch)
      : data(scratch.take<T>(step_stride<T>(rows) * steps_of<T>(columns))),
        bounds(scratch.take<T>(rows)),
        copy(scratch.take<T>(columns)) {}
};

// Columns [begin, begin + count) of keys [first, first + keys): prepared exponentials in place if
// possible.
template <class T>
KeyBlock<T> key_block(const KeySide& side, int64_t first, int64_t keys, int64_t begin,
                      int64_t count, const PanelRoom<T>& room) {
  if (side.exp_key.data != nullptr) {
    for (int64_t n = 0; n < keys; ++n) {
      room.bounds[n] = static_cast<const T*>(side.bound.data)[side.bound.offset(first + n)];
    }
    return {panel_of<T>(side.exp_key, first, keys, begin, count, room.data, room.copy),
            room.bounds};
  }
  pack<T, PackExponentials<T>>(side.key, first, keys, begin, count, room.data, kStep<T>,
                               step_stride<T>(keys), room.bounds, room.copy);
  return {{room.data, kStep<T>, step_stride<T>(keys)}, room.bounds};
}

// exp(2 |q + k|) from which tanh counts as saturated (|q + k| = 1), and up to which as small (1/4).
constexpr double kSaturatedExponential = 7.38905610;
constexpr double kSmallExponential = 1.64872127;
// Of all |w|, the part that informative features must have for the factored form: its error is
// relative to sum |w|, that of the plain formula to sum |w tanh|.
constexpr double kInformativeShare = 0.125;

// Smallest and largest of `rows` rows, lane by lane, for half a step of features.
template <class T>
struct Extremes {
  Vec<T> smallest;
  Vec<T> largest;

  Extremes(const Panel<T>& panel, int64_t rows, int64_t p, int64_t half) {
    const StepRows<T> step = panel.at(p);
    const T* data = step.data + half;
    smallest = largest = load<T>(data);
    for (int64_t i = 1; i < rows; ++i) {
      const Vec<T> next = load<T>(data + i * step.row);
      smallest = next < smallest ? next : smallest;
      largest = next > largest ? next : largest;
    }
  }
};

// Whether enough features' tanh(q + k) can be neither nearly 0 nor nearly +-1 for a query and a key
// of two panels of exponentials: their |w|, or their number without `weights`, is more than
// `least`. If they are fewer, as where every key is minus every query up to noise, or all are
// saturated, then scores differ and gradients are so little that the absolute error of the factored
// form would show.
template <class T>
bool is_informative(const Panel<T>& queries, int64_t query_count, const Panel<T>& keys,
                    int64_t key_count, int64_t steps, const T* weights, T least) {
  Vec<T> informative{};
  for (int64_t p = 0; p < steps; ++p) {
    for (int64_t half = 0; half < kStep<T>; half += kLanes<T>) {
      const Extremes<T> a(queries, query_count, p, half);
      const Extremes<T> b(keys, key_count, p, half);
      const Vec<T> low = a.smallest * b.smallest;
      const Vec<T> high = a.largest * b.largest;
      const VecBits<T> unsaturated =
          (low <= T(kSaturatedExponential)) & (high >= T(1 / kSaturatedExponential));
      const VecBits<T> sizeable =
          (high >= T(kSmallExponential)) | (low <= T(1 / kSmallExponential));
      const Vec<T> share = weights == nullptr
                               ? splat<T>(T(1))
                               : magnitude<T>(load<T>(weights + p * kStep<T> + half));
      informative += from_bits<T>(bits_of<T>(share) & unsaturated & sizeable);
    }
    if (sum_of_lanes<T>(informative) > least) {
      return true;
    }
  }
  return false;
}

// Room for one tile of scores.
template <class T>
struct ScoreRoom {
  PanelRoom<T> key;
  PanelRoom<T> exact_query;
  PanelRoom<T> exact_key;

  ScoreRoom(int64_t dim, Scratch& scratch)
      : key(kTileCols, dim, scratch),
        exact_query(kTileRows, dim, scratch),
        exact_key(kTileCols, dim, scratch) {}
};

// Scores of at most kTileRows queries and kTileCols keys from the numbers themselves.
template <class T>
void unfactored_scores(const QueryBlock<T>& queries, int64_t i, int64_t rows, const RowSource& key,
                       int64_t j, int64_t cols, int64_t dim, const T* weights, bool small, T* out,
                       int64_t out_row, const ScoreRoom<T>& room) {
  const Panel<T> a = panel_of<T>(queries.source, queries.first + i, rows, 0, dim,
                                 room.exact_query.data, room.exact_query.copy);
  const Panel<T> b = panel_of<T>(key, j, cols, 0, dim, room.exact_key.data, room.exact_key.copy);
  const auto products = small ? inner_products<T, SmallScore> : inner_products<T, ExactScore>;
  products(a, rows, b, cols, steps_of<T>(dim), weights, out, out_row);
}

// scores[i * ld + j] = sum_d w_d tanh(q_id + k_jd) for every query of the block and keys first + j,
// j < keys.
template <class T>
void score_block(const QueryBlock<T>& queries, const KeySide& side, int64_t first, int64_t keys,
                 int64_t dim, const T* weights, T* scores, int64_t ld, const ScoreRoom<T>& room) {
  const int64_t steps = steps_of<T>(dim);
  Vec<T> weight_squares{};
  Vec<T> weight_sum{};
  for (int64_t c = 0; c < dim; c += kLanes<T>) {
    const Vec<T> weight = load<T>(weights + c);
    weight_squares += weight * weight;
    weight_sum += magnitude<T>(weight);
  }
  const T least = sum_of_lanes<T>(weight_sum) * T(kInformativeShare);
  const bool weights_fit =
      sum_of_lanes<T>(weight_squares) <= T(kLargestWeightNorm * kLargestWeightNorm);
  for (int64_t j = 0; j < keys; j += kTileCols) {
    const int64_t cols = smaller(kTileCols, keys - j);
    const KeyBlock<T> block = key_block<T>(side, first + j, cols, 0, dim, room.key);
    const T key_bound = largest_bound(block.bounds, cols);
    const bool factors =
        weights_fit && is_informative<T>(queries.exponentials, queries.count, block.exponentials,
                                         cols, steps, weights, least);
    for (int64_t i = 0; i < queries.count; i += kTileRows) {
      const int64_t rows = smaller(kTileRows, queries.count - i);
      T* out = scores + i * ld + j;
      const T query_bound = largest_bound(queries.bounds + i, rows);
      if (factors && in_factored_range(query_bound, key_bound)) {
        inner_products<T, FactoredScore>(queries.exponentials.from_row(i), rows, block.exponentials,
                                         cols, steps, weights, out, ld);
      } else {
        const bool small = query_bound + key_bound <= T(kSmallTanhLimit);
        unfactored_scores<T>(queries, i, rows, side.key, first + j, cols, dim, weights, small, out,
                             ld, room);
      }
    }
  }
}

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
    const Panel<T> b = panel_of<T>(right, first + j, tile, 0, dim, room.data, room.copy);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      inner_products<T, DotProduct>(a.from_row(i), smaller(kTileRows, rows - i), b, tile, steps,
                                    nullptr, out + i * ld + j, ld);
    }
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
