// Rows of scores: maximum, exponentials, sums, and their scatter into tensors indexed by key.
#pragma once

#include "scores.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

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
