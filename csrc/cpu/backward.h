// Backward up to the gradient phase: alpha and s = alpha (dalpha - delta) of a unit, and dvalue.
#pragma once

#include "forward.h"
#include "gradient.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// The buffers of one score item: rows of alpha and of dalpha, later s, for its keys. Where dropout
// drops a weight, the sign of its alpha is set.
template <class T>
struct ScoreRows {
  const BackwardCall<T>& call;
  const UnitBlock& range;
  const Unit& unit;
  const Sequence& sequence;

  ScoreRows(const BackwardCall<T>& call, const UnitBlock& range)
      : call(call),
        range(range),
        unit(call.wave->units[range.unit]),
        sequence(call.problem->sequences[unit.sequence]) {}

  // Rows of query i of the block.
  T* alpha(int64_t i) const { return call.alpha + offset(i); }
  T* dscores(int64_t i) const { return call.dscores + offset(i); }
  Delta<T>& delta(int64_t i, int64_t chunk) const {
    return call.deltas[unit.deltas + (range.query + i) * unit.chunks + chunk];
  }

  int64_t offset(int64_t i) const { return unit.scores + (range.query + i) * unit.ld + range.key; }
  // Number of query i in its sequence.
  int64_t query(int64_t i) const { return unit.query + range.query + i; }
  RowSource along(const Rows& view, PairLayout layout, int64_t i) const {
    return pair_row(view, layout, sequence, unit.head, query(i));
  }
};

// sum |alpha| values and sum |alpha|, in blocks: rounding errors then hardly grow with the keys.
// Those of delta are left in sum s, which must not be more than dquery where every tanh is small.
template <class T>
Delta<T> weigh(const T* alpha, const T* values, int64_t count) {
  constexpr int64_t kBlock = 64 * kLanes<T>;
  Vec<T> weighted{};
  Vec<T> total{};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(begin + kBlock, count);
    Vec<T> block_weighted{};
    Vec<T> block_total{};
    int64_t j = begin;
    for (; j + kLanes<T> <= end; j += kLanes<T>) {
      const Vec<T> weight = magnitude<T>(load<T>(alpha + j));
      block_weighted += weight * load<T>(values + j);
      block_total += weight;
    }
    const Vec<T> last = magnitude<T>(load_partial<T>(alpha + j, end - j));
    weighted += block_weighted + last * load_partial<T>(values + j, end - j);
    total += block_total + last;
  }
  return {sum_of_lanes<T>(weighted), sum_of_lanes<T>(total)};
}

// Adds the gradient of returned weights to dalpha of one row, and marks dropped weights; the row's
// share of delta = sum alpha dalpha.
template <class T>
Delta<T> row_delta(const ScoreRows<T>& rows, int64_t i, T* dweights) {
  const BackwardCall<T>& call = rows.call;
  const Problem& problem = *call.problem;
  const int64_t count = rows.range.key_count;
  const int64_t query = rows.query(i);
  T* alpha = rows.alpha(i);
  T* dalpha = rows.dscores(i);
  if (call.dweights.data != nullptr) {
    read_along_keys<T>(rows.along(call.dweights, problem.weights_layout, i), rows.range.key, count,
                       dweights);
    for (int64_t j = 0; j < count; ++j) {
      dalpha[j] += dweights[j];
    }
  }
  if (problem.dropout.active) {
    const T scale = static_cast<T>(problem.dropout.keep_scale);
    for_each_weight(problem.dropout, rows.sequence, rows.unit.head, query, rows.range.key, count,
                    [&](int64_t j, bool keeps) {
                      dalpha[j] = keeps ? dalpha[j] * scale : T(0);
                      alpha[j] = keeps ? alpha[j] : -alpha[j];
                    });
  }
  return weigh(alpha, dalpha, count);
}

// What a step of a memory leaves of one row: s and alpha.
template <class T>
void write_step_row(const ScoreRows<T>& rows, int64_t i) {
  const BackwardCall<T>& call = rows.call;
  if (call.step_dscores.data != nullptr) {
    write_along_keys<T>(rows.along(call.step_dscores, PairLayout::kByKey, i), rows.range.key,
                        rows.range.key_count, rows.dscores(i));
    write_along_keys<T>(rows.along(call.step_weights, PairLayout::kByKey, i), rows.range.key,
                        rows.range.key_count, rows.alpha(i));
  }
}

// s of a unit's rows for one range of keys, once their deltas are complete; alpha becomes the
// weight that multiplies the values.
template <class T>
void finish_scores(const BackwardCall<T>& call, const UnitBlock& range) {
  const ScoreRows<T> rows(call, range);
  const Unit& unit = rows.unit;
  const Dropout& dropout = call.problem->dropout;
  const T keep_scale = static_cast<T>(dropout.keep_scale);
  for (int64_t i = 0; i < range.query_count; ++i) {
    Delta<double> sums{0, 0};
    for (int64_t chunk = 0; chunk < unit.chunks; ++chunk) {
      sums.weighted += static_cast<double>(rows.delta(i, chunk).weighted);
      sums.total += static_cast<double>(rows.delta(i, chunk).total);
    }
    const T delta = static_cast<T>(sums.weighted / sums.total);
    T* alpha = rows.alpha(i);
    T* s = rows.dscores(i);
    for (int64_t j = 0; j < range.key_count; ++j) {
      s[j] -= delta;
    }
    // What rounding left of sum s: nearly all of s where one weight is nearly 1. Less than double
    // precision could tell from 0 is left as it is.
    T rest = 0;
    if (unit.chunks == 1) {
      const Delta<T> left = weigh(alpha, s, range.key_count);
      const T correction = left.weighted / left.total;
      const T visible = T(0x1p-50) * (delta < 0 ? -delta : delta);
      const bool is_finite = correction - correction == T(0);
      rest = is_finite && (correction > visible || correction < -visible) ? correction : T(0);
    }
    for (int64_t j = 0; j < range.key_count; ++j) {
      s[j] = (alpha[j] < 0 ? -alpha[j] : alpha[j]) * (s[j] - rest);
    }
    if (dropout.active) {
      for (int64_t j = 0; j < range.key_count; ++j) {
        alpha[j] = __builtin_signbit(alpha[j]) ? T(0) : alpha[j] * keep_scale;
      }
    }
    write_step_row<T>(rows, i);
  }
}

// Scores of a unit for a range of keys, as forward computed them.
template <class T, class Scores>
void compute_scores(const ScoreRows<T>& rows, Scratch& scratch) {
  const BackwardCall<T>& call = rows.call;
  const UnitBlock& range = rows.range;
  const Problem& problem = *call.problem;
  Scores scores(problem, rows.sequence, rows.unit.head, rows.query(0), range.query_count,
                call.score_weights, scratch);
  scores.compute(range.key, range.key_count, rows.alpha(0), rows.unit.ld);
}

// s and alpha of a unit for a range of keys where they come in as such: of raw scores, which weigh
// no value, or in a memory's backward, [step, Nk, H], the step being the query.
template <class T>
void load_score_gradients(const ScoreRows<T>& rows) {
  const BackwardCall<T>& call = rows.call;
  const UnitBlock& range = rows.range;
  for (int64_t i = 0; i < range.query_count; ++i) {
    const RowSource dscores = call.from_steps
                                  ? rows.along(call.step_dscores, PairLayout::kByKey, i)
                                  : rows.along(call.dweights, call.problem->weights_layout, i);
    read_along_keys<T>(dscores, range.key, range.key_count, rows.dscores(i));
    if (call.from_steps) {
      read_along_keys<T>(rows.along(call.step_weights, PairLayout::kByKey, i), range.key,
                         range.key_count, rows.alpha(i));
    } else {
      pad_row<T>(rows.alpha(i), 0, range.key_count, 0);
      write_step_row<T>(rows, i);
    }
  }
}

// alpha and dalpha of a unit for a range of keys, from scores that forward kept or new ones.
template <class T>
void score_item(const BackwardCall<T>& call, const UnitBlock& range) {
  Scratch scratch;
  const Problem& problem = *call.problem;
  const ScoreRows<T> rows(call, range);
  if (call.from_steps || problem.raw_scores) {
    load_score_gradients<T>(rows);
    return;
  }
  const Unit& unit = rows.unit;
  const bool kept = call.scores.data != nullptr;
  if (!kept) {
    const auto compute = problem.keys_alone ? compute_scores<T, HiddenScores<T>>
                                            : compute_scores<T, AdditiveScores<T>>;
    compute(rows, scratch);
  }
  const RowSource stats = query_rows(call.stats, rows.sequence, unit.head);
  const int64_t padded = round_up(range.key_count, kLanes<T>);
  T* row = scratch.take<T>(padded);
  for (int64_t i = 0; i < range.query_count; ++i) {
    const T* stat = stats.at<T>(rows.query(i));
    if (kept) {
      read_along_keys<T>(rows.along(call.scores, problem.scores_layout, i), range.key,
                         range.key_count, row);
    } else {
      __builtin_memcpy(row, rows.alpha(i), range.key_count * sizeof(T));
    }
    pad_row<T>(row, range.key_count, padded, static_cast<T>(-__builtin_inf()));
    exponentiate_row<T>(row, padded, shift_of(stat[0]), 1 / stat[1]);
    __builtin_memcpy(rows.alpha(i), row, range.key_count * sizeof(T));
  }
  if (call.dcontext.data != nullptr && call.needs_scores) {
    dot_block<T>(query_rows(call.dcontext, rows.sequence, unit.head), rows.query(0),
                 range.query_count, key_rows(problem.value, rows.sequence, unit.head), range.key,
                 range.key_count, problem.value_dim, rows.dscores(0), unit.ld, scratch);
  } else {
    for (int64_t i = 0; i < range.query_count; ++i) {
      pad_row<T>(rows.dscores(i), 0, range.key_count, 0);
    }
  }
  for (int64_t i = 0; i < range.query_count; ++i) {
    rows.delta(i, range.chunk) = row_delta<T>(rows, i, row);
  }
  if (unit.chunks == 1) {
    finish_scores<T>(call, range);
  }
}

// dvalue_j = sum_i alpha_ij dcontext_i over the unit's queries, added to what earlier units left.
template <class T>
void value_item(const BackwardCall<T>& call, const UnitBlock& range) {
  Scratch scratch;
  const ScoreRows<T> rows(call, range);
  const Unit& unit = rows.unit;
  const int64_t dim = call.problem->value_dim;
  const RowSource gathered = key_rows(call.dvalue_sum, rows.sequence, unit.head);
  const RowSource result = key_rows(call.dvalue, rows.sequence, unit.head);
  const bool streams = call.streams && unit.first && unit.last;
  Sums<T> sums{rows_in_place<T>(gathered, range.key, dim), gathered.row, !unit.first};
  if (sums.data == nullptr || streams) {
    sums.row = steps_of<T>(dim) * kStep<T>;
    sums.data = scratch.take<T>(range.key_count * sums.row);
    for (int64_t j = 0; sums.adds && j < range.key_count; ++j) {
      __builtin_memcpy(sums.data + j * sums.row, gathered.at<T>(range.key + j), dim * sizeof(T));
    }
  }
  const RowSource dcontext = query_rows(call.dcontext, rows.sequence, unit.head);
  const PanelRoom<T> room(smaller(kValueTile, unit.query_count), dim, scratch);
  weigh_rows<T>({rows.alpha(0), 1, unit.ld}, range.key_count, dcontext, unit.query,
                unit.query_count, dim, sums, room);
  const RowSource target = unit.last ? result : gathered;
  for (int64_t j = 0; j < range.key_count; ++j) {
    write_columns<T>(target, range.key + j, 0, dim, sums.data + j * sums.row, streams);
  }
  if (streams) {
    finish_streams();
  }
}

// The gradient phase by either rule of scores, GradientBlock or HiddenGradient.
template <class T, class Block>
void gradient_item_by(const BackwardCall<T>& call, const GradientItem& item) {
  const int64_t dim = call.problem->dim;
  const int64_t rows = call.problem->weight_rows;
  double* total = nullptr;
  if (call.partial_dweight != nullptr) {
    total = call.partial_dweight + item.dweight_row * rows * dim + item.col;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < item.cols; ++c) {
        total[row * dim + c] = 0;
      }
    }
  }
  for (int64_t n = item.unit_begin; n < item.unit_end; ++n) {
    Scratch scratch;
    const Unit& unit = call.wave->units[n];
    Block block(call, item, unit, total, scratch);
    block.run(item.key, smaller(item.key_count, unit.key_count - item.key));
  }
}

template <class T>
void gradient_item(const BackwardCall<T>& call, const GradientItem& item) {
  const auto run = call.problem->keys_alone ? gradient_item_by<T, HiddenGradient<T>>
                                            : gradient_item_by<T, GradientBlock<T>>;
  run(call, item);
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
