// Forward: scores, softmax and the weighted sum of values.
#pragma once

#include "hidden.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Keys whose scores are held at once, [queries, kKeyChunk].
constexpr int64_t kKeyChunk = 512;

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

// -infinity stands for "nothing yet"; a row of -infinities keeps its sum of 0, hence its NaN.
template <class T>
ATTN_EXT_INLINE T shift_of(T largest) {
  return largest == -__builtin_inf() ? T(0) : largest;
}

// Calls visit(j, keeps) for keys first + j, j < count: whether dropout keeps the query's weight.
template <class Visit>
ATTN_EXT_INLINE void for_each_weight(const Dropout& dropout, const Sequence& sequence, int64_t head,
                                     int64_t query, int64_t first, int64_t count,
                                     const Visit& visit) {
  const uint32_t least = least_bits(dropout);
  for (int64_t begin = 0; begin < count; begin += kPhiloxGroup) {
    const int64_t group = smaller(kPhiloxGroup, count - begin);
    uint32_t words[4][kPhiloxGroup] = {};
    for (int64_t n = 0; n < group; ++n) {
      const int64_t j = first + begin + n;
      const int64_t position = sequence.key_index ? sequence.key_index[j] : sequence.first_key + j;
      words[0][n] = static_cast<uint32_t>(position);
      words[1][n] = static_cast<uint32_t>(query);
      words[2][n] = static_cast<uint32_t>(head);
      words[3][n] = static_cast<uint32_t>(sequence.number);
    }
    make_philox_words(words, dropout.philox_key());
    for (int64_t n = 0; n < group; ++n) {
      visit(begin + n, keeps_word(words[0][n], least));
    }
  }
}

// Drops weights of keys first + j, j < count.
template <class T>
void drop_row(const Dropout& dropout, const Sequence& sequence, int64_t head, int64_t query,
              int64_t first, int64_t count, T* row) {
  if (dropout.active) {
    const T scale = static_cast<T>(dropout.keep_scale);
    for_each_weight(dropout, sequence, head, query, first, count,
                    [&](int64_t j, bool keeps) { row[j] = keeps ? row[j] * scale : T(0); });
  }
}

// sums = scalars x rows first + k, k < inner, of `source`, or added to what they hold. One result
// reads each row once, where it lies. Many read packed rows, whose steps do not compete for the
// same cache sets.
template <class T>
void weigh_rows(Scalars<T> scalars, int64_t results, const RowSource& source, int64_t first,
                int64_t inner, int64_t dim, Sums<T>& sums, const PanelRoom<T>& room) {
  const bool in_place = results == 1 && lies_in_panel<T>(source);
  const auto gather = in_place ? panel_of<T> : packed_panel<T, PackValues<T>>;
  for (int64_t k = 0; k < inner; k += kValueTile) {
    const int64_t rows = smaller(kValueTile, inner - k);
    outer_products<T>({scalars.data + k * scalars.col, scalars.row, scalars.col}, results,
                      gather(source, first + k, rows, 0, dim, room), rows, steps_of<T>(dim), sums);
    sums.adds = true;
  }
}

// Statistics and context of one query, the context from its sum of values, scaled by `scale`.
template <class T>
void write_context(const ForwardCall<T>& call, const Sequence& sequence, int64_t head,
                   int64_t query, T largest, T total, T scale, T* sum) {
  const Problem& problem = *call.problem;
  const RowSource stats = query_rows(call.stats, sequence, head);
  T* stat = stats.at<T>(query);
  stat[0] = largest;
  stat[1] = total;
  if (scale != T(1)) {
    scale_row(sum, steps_of<T>(problem.value_dim) * kStep<T>, scale);
  }
  const RowSource context = query_rows(call.context, sequence, head);
  write_columns<T>(context, query, 0, problem.value_dim, sum);
}

// Turns the scores of one query, waiting in call.scores, into weights.
template <class T>
void finish_weights(const ForwardCall<T>& call, const Sequence& sequence, int64_t head,
                    int64_t query, T largest, T total, T* row) {
  const Problem& problem = *call.problem;
  const RowSource scores = pair_row(call.scores, problem.scores_layout, sequence, head, query);
  const RowSource weights = pair_row(call.weights, problem.weights_layout, sequence, head, query);
  for (int64_t j = 0; j < sequence.key_count; j += kKeyChunk) {
    const int64_t count = smaller(kKeyChunk, sequence.key_count - j);
    const int64_t ld = round_up(count, kLanes<T>);
    read_along_keys<T>(scores, j, count, row);
    pad_row<T>(row, count, ld, 0);
    exponentiate_row<T>(row, ld, shift_of(largest), 1 / total);
    drop_row<T>(problem.dropout, sequence, head, query, j, count, row);
    write_along_keys<T>(weights, j, count, row);
  }
}

// Running softmax of a block of queries: largest score, sum of exponentials, weighted sum of
// values.
template <class T>
struct ForwardBlock {
  const ForwardCall<T>& call;
  const ForwardItem& item;
  const Sequence& sequence;
  T* largest;
  T* total;
  Sums<T> sums;  // hold nothing yet until the first keys are weighed
  int64_t ld;
  T* scores;

  ForwardBlock(const ForwardCall<T>& call, const ForwardItem& item, Scratch& scratch)
      : call(call),
        item(item),
        sequence(call.problem->sequences[item.sequence]),
        largest(scratch.take<T>(item.query_count)),
        total(scratch.take<T>(item.query_count)),
        sums(room_for_sums(call, item, scratch)),
        ld(round_up(smaller(item.key_count, kKeyChunk), kLanes<T>)),
        scores(scratch.take<T>(item.query_count * ld)) {
    pad_row<T>(largest, 0, item.query_count, static_cast<T>(-__builtin_inf()));
    pad_row<T>(total, 0, item.query_count, 0);
  }

  // Among the partial sums, in the context itself, or in scratch.
  static Sums<T> room_for_sums(const ForwardCall<T>& call, const ForwardItem& item,
                               Scratch& scratch) {
    const Problem& problem = *call.problem;
    const int64_t partial_row = padded_columns(problem.value_dim);
    if (item.partial >= 0) {
      return {call.partial_sums + item.partial * partial_row, partial_row, false};
    }
    const RowSource context = query_rows(call.context, problem.sequences[item.sequence], item.head);
    if (T* rows = rows_in_place<T>(context, item.query, problem.value_dim)) {
      return {rows, context.row, false};
    }
    const int64_t row = steps_of<T>(problem.value_dim) * kStep<T>;
    return {scratch.take<T>(item.query_count * row), row, false};
  }

  // Whether all keys' scores are at hand, so that they can become weights before they meet values.
  bool one_chunk() const {
    return item.key_count == sequence.key_count && item.key_count <= kKeyChunk;
  }

  // Turns a row of new scores into exponentials and rescales what was summed before.
  void include(int64_t i, T* row, int64_t count) {
    const T chunk = largest_of_row(row, count);
    const T next = chunk > largest[i] ? chunk : largest[i];
    const T shift = shift_of(next);
    if (next > largest[i]) {
      const T scale = exp_nonpositive_scalar<T>(largest[i] - shift);
      total[i] *= scale;
      if (sums.adds) {
        const int64_t columns = steps_of<T>(call.problem->value_dim) * kStep<T>;
        scale_row(sums.data + i * sums.row, columns, scale);
      }
      largest[i] = next;
    }
    total[i] += exponentiate_row(row, count, shift, T(1));
  }

  // Softmax of the block's scores for `count` keys from `first`.
  void normalise(int64_t first, int64_t count) {
    const int64_t padded = round_up(count, kLanes<T>);
    for (int64_t i = 0; i < item.query_count; ++i) {
      T* row = scores + i * ld;
      const int64_t query = item.query + i;
      if (call.keeps_scores || (call.weights.data != nullptr && !one_chunk())) {
        write_along_keys<T>(
            pair_row(call.scores, call.problem->scores_layout, sequence, item.head, query), first,
            count, row);
      }
      pad_row<T>(row, count, padded, static_cast<T>(-__builtin_inf()));
      include(i, row, padded);
      if (one_chunk()) {
        scale_row(row, padded, 1 / total[i]);
      }
      drop_row<T>(call.problem->dropout, sequence, item.head, query, first, count, row);
    }
  }

  // What there is of `count` keys from `first`, scores or weights, as weights.
  void write_rows(int64_t first, int64_t count) {
    for (int64_t i = 0; i < item.query_count; ++i) {
      write_along_keys<T>(
          pair_row(call.weights, call.problem->weights_layout, sequence, item.head, item.query + i),
          first, count, scores + i * ld);
    }
  }

  void write_results(Scratch& scratch) {
    const bool finishes = item.partial < 0 && call.weights.data != nullptr;
    T* chunk = scratch.take<T>(kKeyChunk);
    if (finishes && one_chunk()) {
      write_rows(0, item.key_count);
    }
    for (int64_t i = 0; i < item.query_count; ++i) {
      if (finishes && !one_chunk()) {
        finish_weights<T>(call, sequence, item.head, item.query + i, largest[i], total[i], chunk);
      }
      if (item.partial >= 0) {
        T* stat = call.partial_stats + 2 * (item.partial + i);
        stat[0] = largest[i];
        stat[1] = total[i];
      } else {
        write_context<T>(call, sequence, item.head, item.query + i, largest[i], total[i],
                         one_chunk() ? T(1) : 1 / total[i], sums.data + i * sums.row);
      }
    }
  }
};

// By either rule of scores, AdditiveScores or HiddenScores.
template <class T, class Scores>
void forward_item_by(const ForwardCall<T>& call, const ForwardItem& item) {
  Scratch scratch;
  const Problem& problem = *call.problem;
  const Sequence& sequence = problem.sequences[item.sequence];
  Scores scores(problem, sequence, item.head, item.query, item.query_count, call.score_weights,
                scratch);
  const RowSource value = key_rows(problem.value, sequence, item.head);
  ForwardBlock<T> block(call, item, scratch);
  const PanelRoom<T> value_room(smaller(kValueTile, item.key_count), problem.value_dim, scratch);
  for (int64_t j = 0; j < item.key_count; j += kKeyChunk) {
    const int64_t first = item.key + j;
    const int64_t count = smaller(kKeyChunk, item.key_count - j);
    scores.compute(first, count, block.scores, block.ld);
    if (problem.raw_scores) {
      block.write_rows(first, count);
      continue;
    }
    block.normalise(first, count);
    weigh_rows<T>({block.scores, block.ld, 1}, item.query_count, value, first, count,
                  problem.value_dim, block.sums, value_room);
  }
  if (!problem.raw_scores) {
    block.write_results(scratch);
  }
}

template <class T>
void forward_item(const ForwardCall<T>& call, const ForwardItem& item) {
  const auto run = call.problem->keys_alone ? forward_item_by<T, HiddenScores<T>>
                                            : forward_item_by<T, AdditiveScores<T>>;
  run(call, item);
}

// Joins the partial softmaxes of one block of queries in the order of their keys.
template <class T>
void forward_merge(const ForwardCall<T>& call, const ForwardMerge& merge) {
  Scratch scratch;
  const Problem& problem = *call.problem;
  const ForwardItem& item = merge.whole;
  const Sequence& sequence = problem.sequences[item.sequence];
  const int64_t columns = steps_of<T>(problem.value_dim) * kStep<T>;
  T* sums = scratch.take<T>(columns);
  T* row = scratch.take<T>(kKeyChunk);
  for (int64_t i = 0; i < item.query_count; ++i) {
    T largest = static_cast<T>(-__builtin_inf());
    for (int64_t n = 0; n < merge.splits; ++n) {
      const T next = call.partial_stats[2 * (item.partial + n * item.query_count + i)];
      largest = next > largest ? next : largest;
    }
    T total = 0;
    for (int64_t n = 0; n < merge.splits; ++n) {
      const int64_t partial = item.partial + n * item.query_count + i;
      const T* stats = call.partial_stats + 2 * partial;
      const T scale = exp_nonpositive_scalar<T>(stats[0] - shift_of(largest));
      total += scale * stats[1];
      outer_stream<T, 1>(
          {&scale, 0, 0},
          {call.partial_sums + partial * padded_columns(problem.value_dim), columns, kStep<T>},
          steps_of<T>(problem.value_dim), {sums, 0, n > 0});
    }
    const int64_t query = item.query + i;
    if (call.weights.data != nullptr) {
      finish_weights<T>(call, sequence, item.head, query, largest, total, row);
    }
    write_context<T>(call, sequence, item.head, query, largest, total, 1 / total, sums);
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
