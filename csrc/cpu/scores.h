// Scores of a block of queries and a range of keys: rows are gathered from tensors into panels, and
// each tile of them takes the route that its magnitudes allow.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// What pack() does to each vector: features as they are, padded by 0.
template <class T>
struct PackValues {
  static ATTN_EXT_INLINE Vec<T> map(Vec<T> x) { return x; }
};

// exp(2x), padded by 1. Outside the factored range the result is not used, only kept finite.
template <class T>
struct PackExponentials {
  static ATTN_EXT_INLINE Vec<T> map(Vec<T> x) {
    // Opaque to GCC, which else compares and blends where one instruction takes the smaller.
    const Vec<T> largest = rounded<T>(splat<T>(FactoredRange<T>::kLargest));
    const Vec<T> smallest = rounded<T>(-largest);
    const Vec<T> below = x < largest ? x : largest;
    return exp_in_range<T>(2 * (below > smallest ? below : smallest));
  }
};

// Largest magnitude of a row. NaN counts as larger than anything, as its bits are.
template <class T>
struct LargestMagnitude {
  VecBits<T> bits{};

  ATTN_EXT_INLINE void include(Vec<T> x) {
    const VecBits<T> next = bits_of<T>(x) & ~kSignBit<T>;
    bits = next > bits ? next : bits;
  }

  ATTN_EXT_INLINE T value() const { return fold_lanes<T, LargerBits<T>>(from_bits<T>(bits)); }
};

// Packs columns [begin, begin + count) of rows [first, first + rows) and their largest magnitudes.
// Each step is followed by its products with `weights`, if there are some.
template <class T, class Map, bool kWeighs = false>
void pack(const RowSource& source, int64_t first, int64_t rows, int64_t begin, int64_t count,
          T* target, int64_t row_stride, int64_t step_stride, T* bounds, T* copy,
          const T* weights) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < rows; ++i) {
    const T* values = row_values<T>(source, first + i, begin, count, copy);
    T* row = target + i * row_stride;
    LargestMagnitude<T> bound;
    // Rows of a block of features are far apart, so the hardware does not foresee the next.
    const T* next = values == copy || i + 2 >= rows
                        ? values
                        : row_values<T>(source, first + i + 2, begin, count, copy);
    for (int64_t c = 0; c < count; c += kStep<T>) {
      __builtin_prefetch(next + c);
      __builtin_prefetch(next + c + lanes);
      const Vec<T> x0 = load_some<T>(values + c, count - c);
      const Vec<T> x1 = load_some<T>(values + c + lanes, count - c - lanes);
      bound.include(x0);
      bound.include(x1);
      const Vec<T> y0 = Map::map(x0);
      const Vec<T> y1 = Map::map(x1);
      store<T>(row, y0);
      store<T>(row + lanes, y1);
      if constexpr (kWeighs) {
        store<T>(row + 2 * lanes, y0 * load<T>(weights + c));
        store<T>(row + 3 * lanes, y1 * load<T>(weights + c + lanes));
      }
      row += step_stride;
    }
    if (bounds != nullptr) {
      bounds[i] = bound.value();
    }
  }
}

// Room for `rows` packed rows of `columns` features, and the weights that they are multiplied by,
// if any: each step holds two vectors and then their products with the weights.
template <class T>
struct PanelRoom {
  const T* weights;
  int64_t width;  // of a step
  T* data;
  T* bounds;
  T* copy;

  PanelRoom(int64_t rows, int64_t columns, Scratch& scratch, const T* weights = nullptr)
      : weights(weights),
        width((weights == nullptr ? 1 : 2) * kStep<T>),
        data(scratch.take<T>(step_stride<T>(rows, width) * steps_of<T>(columns))),
        bounds(scratch.take<T>(rows)),
        copy(scratch.take<T>(columns)) {}
};

// Columns [begin, begin + count) of rows [first, first + rows), step after step, so that reading a
// step of all rows is reading consecutive memory.
template <class T, class Map>
Panel<T> packed_panel(const RowSource& source, int64_t first, int64_t rows, int64_t begin,
                      int64_t count, const PanelRoom<T>& room) {
  const Panel<T> panel{room.data, room.width, step_stride<T>(rows, room.width)};
  const auto fill = room.weights == nullptr ? pack<T, Map> : pack<T, Map, true>;
  fill(source, first, rows, begin, count, room.data, panel.row, panel.step, room.bounds, room.copy,
       room.weights);
  return panel;
}

// Whether the rows can serve as a panel where they are.
template <class T>
ATTN_EXT_INLINE bool lies_in_panel(const RowSource& source) {
  return source.has_vectors<T>() && source.index == nullptr;
}

// Where rows from `first` on can be summed in place: numbers of the compute type in whole steps.
// Null where they cannot.
template <class T>
ATTN_EXT_INLINE T* rows_in_place(const RowSource& target, int64_t first, int64_t columns) {
  return lies_in_panel<T>(target) && columns % kStep<T> == 0 ? target.at<T>(first) : nullptr;
}

// The same columns in place if possible, else packed one row after the other.
template <class T>
Panel<T> panel_of(const RowSource& source, int64_t first, int64_t rows, int64_t begin,
                  int64_t count, const PanelRoom<T>& room) {
  const bool in_place = lies_in_panel<T>(source);
  const int64_t rest = in_place ? count % kStep<T> : count;
  const int64_t row = steps_of<T>(rest) * kStep<T>;
  if (rest != 0) {
    pack<T, PackValues<T>>(source, first, rows, begin + count - rest, rest, room.data, row,
                           kStep<T>, nullptr, room.copy, nullptr);
  }
  return in_place ? Panel<T>{source.at<T>(first, begin), source.row, kStep<T>, count / kStep<T>,
                             room.data}
                  : Panel<T>{room.data, row, kStep<T>};
}

// The largest of `count` magnitudes, NaN if one is NaN.
template <class T>
ATTN_EXT_INLINE T largest_bound(const T* bounds, int64_t count) {
  T largest = 0;
  for (int64_t n = 0; n < count; ++n) {
    largest = bounds[n] <= largest ? largest : bounds[n];
    if (bounds[n] != bounds[n]) {
      return bounds[n];
    }
  }
  return largest;
}

// Rows of one head of one sequence, some at a time: their exponentials, and for the exact route the
// numbers themselves.
template <class T>
class RowBlock {
 public:
  // Of columns [begin, begin + columns) of up to `most` rows, exponentials with `weights` as
  // PanelRoom says.
  RowBlock(const RowSource& source, int64_t most, int64_t begin, int64_t columns, Scratch& scratch,
           const T* weights = nullptr)
      : source_(source),
        begin_(begin),
        columns_(columns),
        room_(most, columns, scratch, weights),
        numbers_room_(most, columns, scratch) {}

  // Of keys, whose exponentials and magnitudes may be prepared.
  RowBlock(const Problem& problem, const Sequence& sequence, int64_t head, int64_t most,
           int64_t begin, int64_t columns, Scratch& scratch)
      : RowBlock(key_rows(problem.key, sequence, head), most, begin, columns, scratch) {
    prepared_ = key_rows(problem.exp_key, sequence, head);
    prepared_bounds_ = key_rows(problem.key_bound, sequence, head);
  }

  void take(int64_t first, int64_t rows) {
    first_ = first;
    count = rows;
    has_numbers_ = false;
    if (prepared_.data != nullptr) {
      for (int64_t n = 0; n < rows; ++n) {
        room_.bounds[n] = *prepared_bounds_.at<T>(first + n);
      }
      exponentials = panel_of<T>(prepared_, first, rows, begin_, columns_, room_);
    } else {
      exponentials =
          packed_panel<T, PackExponentials<T>>(source_, first, rows, begin_, columns_, room_);
    }
  }

  // The largest magnitude in rows [i, i + rows) of those taken.
  T bound(int64_t i, int64_t rows) const { return largest_bound(room_.bounds + i, rows); }

  // The magnitude of that of those rows that has the smallest.
  T smallest_bound(int64_t i, int64_t rows) const {
    T smallest = room_.bounds[i];
    for (int64_t n = i + 1; n < i + rows; ++n) {
      smallest = smaller(smallest, room_.bounds[n]);
    }
    return smallest;
  }

  // The rows as they are, few of them where they lie, gathered when first asked for.
  Panel<T> numbers() {
    if (!has_numbers_) {
      const auto gather = count <= kTileRows ? panel_of<T> : packed_panel<T, PackValues<T>>;
      numbers_ = gather(source_, first_, count, begin_, columns_, numbers_room_);
      has_numbers_ = true;
    }
    return numbers_;
  }

  int64_t count = 0;
  Panel<T> exponentials{};

 private:
  const RowSource source_;
  RowSource prepared_{};  // data is null without
  RowSource prepared_bounds_{};
  const int64_t begin_;
  const int64_t columns_;
  const PanelRoom<T> room_;
  const PanelRoom<T> numbers_room_;
  int64_t first_ = 0;
  Panel<T> numbers_{};
  bool has_numbers_ = false;
};

// Smallest and largest of a block's exponentials, lane by lane, in vector n of features.
template <class T>
struct Extremes {
  Vec<T> smallest;
  Vec<T> largest;

  static Extremes of(const RowBlock<T>& rows, int64_t n) {
    const StepRows<T> step = rows.exponentials.at(n / 2);
    const T* data = step.data + n % 2 * kLanes<T>;
    Extremes result{load<T>(data), load<T>(data)};
    for (int64_t i = 1; i < rows.count; ++i) {
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
  Informative(const RowBlock<T>& queries, int64_t steps, const T* weights, T least,
              Scratch& scratch)
      : queries_(queries),
        vectors_(2 * steps),
        weights_(weights),
        least_(least),
        extremes_(scratch.take<Extremes<T>>(vectors_)) {}

  bool operator()(const RowBlock<T>& keys) {
    constexpr int64_t kVectorsOfLook = 8;
    Vec<T> informative{};
    for (int64_t n = 0; n < vectors_; ++n) {
      for (; known_ <= n; ++known_) {
        extremes_[known_] = Extremes<T>::of(queries_, known_);
      }
      const Extremes<T>& a = extremes_[n];
      const Extremes<T> b = Extremes<T>::of(keys, n);
      const Vec<T> low = a.smallest * b.smallest;
      const Vec<T> high = a.largest * b.largest;
      const VecBits<T> unsaturated =
          (low <= T(kSaturatedProduct)) & (high >= T(1 / kSaturatedProduct));
      const VecBits<T> sizeable = (high >= T(kSmallProduct)) | (low <= T(1 / kSmallProduct));
      const Vec<T> share =
          weights_ == nullptr ? splat<T>(T(1)) : magnitude<T>(load<T>(weights_ + n * kLanes<T>));
      informative += from_bits<T>(bits_of<T>(share) & unsaturated & sizeable);
      if ((n % kVectorsOfLook == 1 || n == vectors_ - 1) && sum_of_lanes<T>(informative) > least_) {
        return true;
      }
    }
    return false;
  }

 private:
  const RowBlock<T>& queries_;
  const int64_t vectors_;
  const T* const weights_;
  const T least_;
  Extremes<T>* const extremes_;  // of the queries, as far as they were looked at
  int64_t known_ = 0;
};

// Scores of a block of queries [query, query + count) against ranges of their keys.
template <class T>
class AdditiveScores {
 public:
  AdditiveScores(const Problem& problem, const Sequence& sequence, int64_t head, int64_t query,
                 int64_t count, const ScoreWeights<T>* weights, Scratch& scratch)
      : is_short_(problem.is_short),
        steps_(steps_of<T>(problem.dim)),
        weights_(weights[head]),
        queries_(query_rows(problem.query, sequence, head), count, 0, problem.dim, scratch,
                 weights_.data),
        keys_(problem, sequence, head, kTileCols, 0, problem.dim, scratch),
        large_(!is_short_ && weights_.norm > kLargestWeightNorm),
        informative_(queries_, steps_, weights_.data,
                     static_cast<T>(weights_.sum *
                                    (large_ ? kInformativePartOfLargeWeights : kInformativePart)),
                     scratch) {
    queries_.take(query, count);
  }

  // scores[i * ld + j] = sum_d w_d tanh(q_id + k_jd) for every query of the block and keys first +
  // j, j < keys.
  void compute(int64_t first, int64_t keys, T* scores, int64_t ld) {
    const bool fit = weights_.norm <= kLargestFactoredNorm;
    const auto factored =
        divides_quickly() ? inner_products<T, DividedScore> : inner_products<T, FactoredScore>;
    for (int64_t j = 0; j < keys; j += kTileCols) {
      const int64_t cols = smaller(kTileCols, keys - j);
      keys_.take(first + j, cols);
      const T key_bound = keys_.bound(0, cols);
      const bool informs = fit && (is_short_ || informative_(keys_));
      for (int64_t i = 0; i < queries_.count; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, queries_.count - i);
        T* out = scores + i * ld + j;
        const T query_bound = queries_.bound(i, rows);
        const bool sizeable =
            !large_ || queries_.smallest_bound(i, rows) + keys_.smallest_bound(0, cols) >=
                           T(kSmallestSumOfLargeWeights);
        if (informs && sizeable &&
            in_factored_range(query_bound, key_bound, kSmallestMagnitudeSum)) {
          factored(queries_.exponentials.from_row(i), rows, keys_.exponentials, cols, steps_,
                   weights_.data, out, ld);
        } else {
          const auto unfactored = query_bound + key_bound <= T(kSmallTanhLimit)
                                      ? inner_products<T, SmallScore>
                                      : inner_products<T, ExactScore>;
          unfactored(queries_.numbers().from_row(i), rows, keys_.numbers(), cols, steps_,
                     weights_.data, out, ld);
        }
      }
    }
  }

 private:
  const bool is_short_;
  const int64_t steps_;
  const ScoreWeights<T>& weights_;
  RowBlock<T> queries_;
  RowBlock<T> keys_;
  const bool large_;  // weights, whose errors would show
  Informative<T> informative_;
};

// Begins to read rows [first, first + rows), which the hardware may not foresee: they are short.
ATTN_EXT_INLINE void prefetch_rows(const RowSource& source, int64_t first, int64_t rows,
                                   int64_t columns) {
  const int64_t size = bytes_of(source.dtype);
  for (int64_t j = first; source.col == 1 && j < first + rows; ++j) {
    const char* row = static_cast<const char*>(source.data) + source.offset(j) * size;
    for (int64_t n = 0; n < columns * size; n += 64) {
      __builtin_prefetch(row + n);
    }
  }
}

// Products of the query-side rows [i0, i0 + rows) of `left` with rows first + j, j < cols, of
// `right`: out[i * ld + j].
template <class T>
void dot_block(const RowSource& left, int64_t i0, int64_t rows, const RowSource& right,
               int64_t first, int64_t cols, int64_t dim, T* out, int64_t ld, Scratch& scratch) {
  const PanelRoom<T> left_room(rows, dim, scratch);
  const PanelRoom<T> right_room(kTileCols, dim, scratch);
  const Panel<T> a = panel_of<T>(left, i0, rows, 0, dim, left_room);
  for (int64_t j = 0; j < cols; j += kTileCols) {
    const int64_t tile = smaller(kTileCols, cols - j);
    prefetch_rows(right, first + j + tile, smaller(kTileCols, cols - j - tile), dim);
    const Panel<T> b = panel_of<T>(right, first + j, tile, 0, dim, right_room);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      inner_products<T, DotProduct>(a.from_row(i), smaller(kTileRows, rows - i), b, tile,
                                    steps_of<T>(dim), nullptr, out + i * ld + j, ld);
    }
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
