// Keys that are scored without a query (pooling): hidden rows h = tanh(k), or with a gate tanh(k)
// sigmoid(g), and their inner products with rows of score weights, which stand for the queries.
// From s = alpha (dalpha - delta) of branch i and key j,
//   dh_j = sum_i s_ij w_i,  dkey = dh sigmoid(g) (1 - tanh(k)^2),
//   dgate = dh tanh(k) sigmoid(g) (1 - sigmoid(g)),  dscore_weight_i = sum_j s_ij h_j.
#pragma once

#include "scores.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// NaN stays NaN.
template <class T>
ATTN_EXT_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  const Vec<T> below = high < x ? splat<T>(high) : x;
  return low > below ? splat<T>(low) : below;
}

// Twice the number from which tanh is 1 to the last place, and the number from which sigmoid is.
constexpr double kSaturatedTwice[2] = {20, 40};  // of float, of double
constexpr double kSaturatedGate[2] = {30, 40};

// tanh(x) and tanh(x) sigmoid(g), the values of hidden rows, from A = exp(2x) and G = exp(g):
// (A - 1) / (A + 1) and (A - 1) G / ((A + 1) (G + 1)), which one division serves. A - 1 is computed
// with a small relative error, and G is lifted, as in exp_nonpositive, where it would be subnormal.
template <class T>
struct TanhRatio {
  Vec<T> difference;
  Vec<T> sum;

  explicit ATTN_EXT_INLINE TanhRatio(Vec<T> x) {
    constexpr T largest = static_cast<T>(kSaturatedTwice[sizeof(T) / 8]);
    const ExpParts<T> parts = exp_parts<T>(clamp<T>(2 * x, -largest, largest));
    const Vec<T> tail = parts.scale * parts.fraction;
    difference = (parts.scale - 1) + tail;
    sum = (parts.scale + 1) + tail;
  }
};

template <class T>
ATTN_EXT_INLINE Vec<T> hidden_value(Vec<T> x) {
  const TanhRatio<T> ratio(x);
  return ratio.difference / ratio.sum;
}

template <class T>
ATTN_EXT_INLINE Vec<T> hidden_value(Vec<T> x, Vec<T> g) {
  using C = ExpConstants<T>;
  const TanhRatio<T> ratio(x);
  constexpr T largest = static_cast<T>(kSaturatedGate[sizeof(T) / 8]);
  // At the lower end the result is less than half of the smallest number.
  const ExpParts<T> parts = exp_parts<T>(clamp<T>(g, C::kVanishing - 1, largest), C::kLift);
  const Vec<T> lifted = parts.scale + parts.scale * parts.fraction;
  return ratio.difference * lifted / (ratio.sum * (lifted + 1 / C::kUnlift));
}

// A hidden value, tanh(x) or tanh(x) sigmoid(g), and what its derivatives are made of.
template <class T>
struct HiddenParts {
  Vec<T> value;
  Vec<T> tanh;
  Vec<T> slope;  // 1 - tanh^2
  Vec<T> sigmoid;
  Vec<T> sigmoid_slope;  // sigmoid (1 - sigmoid)
};

template <class T>
ATTN_EXT_INLINE HiddenParts<T> hidden_parts(Vec<T> x) {
  const TanhParts<T> parts = tanh_parts<T>(x);
  return {parts.tanh, parts.tanh, parts.slope, splat<T>(1), Vec<T>{}};
}

// With z = exp(-2|x|) and y = exp(-|g|), of which slopes keep their relative accuracy however small
// they are, tanh|x| = (1 - z) / (1 + z), sigmoid(|g|) = 1 / (1 + y) and sigmoid(-|g|) = y / (1 +
// y).
template <class T>
ATTN_EXT_INLINE HiddenParts<T> hidden_parts(Vec<T> x, Vec<T> g) {
  const Vec<T> lowest = splat<T>(ExpConstants<T>::kLowest);
  const Vec<T> twice = -2 * magnitude<T>(x);
  const ExpParts<T> parts = exp_parts<T>(twice < lowest ? lowest : twice);
  const Vec<T> tail = parts.scale * parts.fraction;
  const Vec<T> z = parts.scale + tail;
  const Vec<T> y = exp_nonpositive<T>(-magnitude<T>(g));
  const Vec<T> inverse = 1 / ((z + 1) * (y + 1));
  const Vec<T> difference =
      from_bits<T>(bits_of<T>((1 - parts.scale) - tail) | (bits_of<T>(x) & kSignBit<T>));
  const Vec<T> power = g < 0 ? y : splat<T>(1);
  const Vec<T> q = inverse * (y + 1);
  const Vec<T> r = inverse * (z + 1);
  const Vec<T> slope = 4 * (z * q) * q;
  // As 1 - tanh^2, 1 - sigmoid counts as 0 where it is in double precision.
  const VecBits<T> closed = (g > 0) & (y < T(kVanishingSlope));
  return {difference * inverse * power, difference * q,
          slope < T(kVanishingSlope) ? Vec<T>{} : slope, power * r, closed ? Vec<T>{} : y * r * r};
}

// The keys and gates of one head of one sequence.
template <class T>
class HiddenSource {
 public:
  HiddenSource(const Problem& problem, const Sequence& sequence, int64_t head, int64_t columns,
               Scratch& scratch)
      : key_(key_rows(problem.key, sequence, head)),
        gate_(key_rows(problem.gate, sequence, head)),
        dropout_(problem.feature_dropout),
        sequence_(sequence.number),
        head_(head),
        key_copy_(scratch.take<T>(round_up(columns, kLanes<T>))),
        gate_copy_(scratch.take<T>(round_up(columns, kLanes<T>))) {}

  // Calls visit(c, k) or, where there is a gate, visit(c, k, g) with each vector of features begin
  // + c of key j, the last one padded by 0.
  template <class Visit>
  ATTN_EXT_INLINE void for_each_vector(int64_t j, int64_t begin, int64_t count,
                                       const Visit& visit) const {
    const T* key = whole_vectors(key_, j, begin, count, key_copy_);
    if (gate_.data == nullptr) {
      for (int64_t c = 0; c < count; c += kLanes<T>) {
        visit(c, load<T>(key + c));
      }
      return;
    }
    const T* gate = whole_vectors(gate_, j, begin, count, gate_copy_);
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      visit(c, load<T>(key + c), load<T>(gate + c));
    }
  }

  // Drops features of a hidden row of key j, or of its gradient, that begin with `begin`, a
  // multiple of 4: feature d takes word d % 4 of Philox with the counter (key position, d / 4, ~(2
  // head + factor), sequence).
  void drop(int64_t j, int64_t begin, int64_t count, T* row) const {
    for (int factor = 0; factor < 2; ++factor) {
      for (int64_t c = 0; dropout_[factor].active && c < count; c += kBlock) {
        const uint32_t number = ~static_cast<uint32_t>(2 * head_ + factor);
        drop_block(dropout_[factor], number, key_.position(j), begin + c,
                   smaller(kBlock, count - c), row + c);
      }
    }
  }

 private:
  static constexpr int kBlock = 4 * kPhiloxGroup;

  void drop_block(const Dropout& dropout, uint32_t number, int64_t position, int64_t begin,
                  int64_t count, T* row) const {
    uint32_t words[4][kPhiloxGroup];
    for (int n = 0; n < kPhiloxGroup; ++n) {
      words[0][n] = static_cast<uint32_t>(position);
      words[1][n] = static_cast<uint32_t>(begin / 4 + n);
      words[2][n] = number;
      words[3][n] = static_cast<uint32_t>(sequence_);
    }
    make_philox_words(words, dropout.philox_key());
    const T scale = static_cast<T>(dropout.keep_scale);
    const uint32_t least = least_bits(dropout);
    T factors[kBlock];
    for (int n = 0; n < kPhiloxGroup; ++n) {
      for (int word = 0; word < 4; ++word) {
        factors[4 * n + word] = keeps_word(words[word][n], least) ? scale : T(0);
      }
    }
    int64_t n = 0;
    for (; n + kLanes<T> <= count; n += kLanes<T>) {
      const Vec<T> factor = load<T>(factors + n);
      store<T>(row + n, factor == 0 ? Vec<T>{} : load<T>(row + n) * factor);
    }
    for (; n < count; ++n) {
      row[n] = factors[n] == T(0) ? T(0) : row[n] * factors[n];
    }
  }

  static const T* whole_vectors(const RowSource& source, int64_t j, int64_t begin, int64_t count,
                                T* copy) {
    const T* row = row_values<T>(source, j, begin, count, copy);
    if (count % kLanes<T> == 0) {
      return row;
    }
    for (int64_t c = 0; row != copy && c < count; ++c) {
      copy[c] = row[c];
    }
    for (int64_t c = count; c < round_up(count, kLanes<T>); ++c) {
      copy[c] = 0;
    }
    return copy;
  }

  RowSource key_;
  RowSource gate_;          // data is null without
  const Dropout* dropout_;  // of tanh and of the gate
  int64_t sequence_;
  int64_t head_;
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
                             problem.dim, PanelRoom<T>(queries, problem.dim, scratch))) {}

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
    source_.for_each_vector(
        j, 0, dim_, [&](int64_t c, auto... x) { store<T>(row + c, hidden_value<T>(x...)); });
    source_.drop(j, 0, dim_, row);
  }

  int64_t dim_;
  int64_t queries_;
  HiddenSource<T> source_;
  PanelRoom<T> room_;
  Panel<T> weights_;
};

// Keys whose share of dscore_weight is summed in the compute type before it joins a sum in double.
constexpr int64_t kHiddenTile = 16;

// The features [col, col + cols) of one unit, which has all branches, against tiles of its keys.
template <class T>
class HiddenGradient {
 public:
  HiddenGradient(const BackwardCall<T>& call, const GradientItem& item, const Unit& unit,
                 double* dweight, Scratch& scratch)
      : call_(call),
        item_(item),
        unit_(unit),
        sequence_(call.problem->sequences[unit.sequence]),
        steps_(steps_of<T>(item.cols)),
        source_(*call.problem, sequence_, unit.head, item.cols, scratch),
        weights_(panel_of<T>(query_rows(call.problem->query, sequence_, unit.head), 0,
                             unit.query_count, item.col, item.cols,
                             PanelRoom<T>(unit.query_count, item.cols, scratch))),
        hidden_(scratch.take<T>(kHiddenTile * columns())),
        dhidden_(scratch.take<T>(kHiddenTile * columns())),
        dkey_(scratch.take<T>(columns())),
        dgate_(scratch.take<T>(columns())),
        dweight_(scratch.take<T>(unit.query_count * columns())),
        dweight_total_(dweight) {
    pad_row<T>(hidden_, 0, kHiddenTile * columns(), 0);
  }

  void run(int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; j += kHiddenTile) {
      run_tile(first + j, smaller(kHiddenTile, count - j));
    }
    if (call_.streams) {
      finish_streams();
    }
  }

 private:
  int64_t columns() const { return steps_ * kStep<T>; }

  void run_tile(int64_t first, int64_t keys) {
    const T* s = call_.dscores + unit_.scores + first;
    const bool wants_rows = call_.dkey.data != nullptr || call_.dgate.data != nullptr;
    if (wants_rows) {
      outer_products<T>({s, 1, unit_.ld}, keys, weights_, unit_.query_count, steps_,
                        {dhidden_, columns(), false});
    }
    for (int64_t j = 0; j < keys; ++j) {
      T* hidden = hidden_ + j * columns();
      T* dhidden = dhidden_ + j * columns();
      if (wants_rows) {
        source_.drop(first + j, item_.col, item_.cols, dhidden);
      }
      source_.for_each_vector(first + j, item_.col, item_.cols, [&](int64_t c, auto... x) {
        const HiddenParts<T> parts = hidden_parts<T>(x...);
        store<T>(hidden + c, parts.value);
        if (wants_rows) {
          const Vec<T> dh = load<T>(dhidden + c);
          store<T>(dkey_ + c, dh * parts.sigmoid * parts.slope);
          store<T>(dgate_ + c, dh * parts.tanh * parts.sigmoid_slope);
        }
      });
      source_.drop(first + j, item_.col, item_.cols, hidden);
      write(call_.dkey, first + j, dkey_);
      write(call_.dgate, first + j, dgate_);
    }
    if (dweight_total_ != nullptr) {
      add_weights(s, keys);
    }
  }

  void write(const Rows& gradient, int64_t j, const T* row) const {
    if (gradient.data != nullptr) {
      write_columns<T>(key_rows(gradient, sequence_, unit_.head), j, item_.col, item_.cols, row,
                       call_.streams);
    }
  }

  void add_weights(const T* s, int64_t keys) {
    const int64_t branches = unit_.query_count;
    outer_products<T>({s, unit_.ld, 1}, branches, {hidden_, columns(), kStep<T>}, keys, steps_,
                      {dweight_, columns(), false});
    for (int64_t i = 0; i < branches; ++i) {
      double* total = dweight_total_ + i * call_.problem->dim;
      for (int64_t c = 0; c < item_.cols; ++c) {
        total[c] += static_cast<double>(dweight_[i * columns() + c]);
      }
    }
  }

  const BackwardCall<T>& call_;
  const GradientItem& item_;
  const Unit& unit_;
  const Sequence& sequence_;
  const int64_t steps_;
  const HiddenSource<T> source_;
  const Panel<T> weights_;
  T* const hidden_;   // [kHiddenTile, columns]
  T* const dhidden_;  // the same
  T* const dkey_;     // [columns]
  T* const dgate_;
  T* const dweight_;  // [branches, columns]
  double* const dweight_total_;
};

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
