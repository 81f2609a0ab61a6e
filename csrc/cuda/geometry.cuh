// From a block's number to the rows it works on. Offsets are clamped into the tensors, whatever
// they hold.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace attn_ext::cuda {

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

// The number of the first row of sequence n.
__device__ inline int64_t row_offset(const Side& side, int64_t n) {
  if (side.offsets.data == nullptr) {
    return n * side.rows;
  }
  return smaller(larger<int64_t>(side.offsets.at(n), 0), side.rows);
}

__device__ inline int row_count(const Side& side, int64_t n, int64_t begin) {
  const int64_t count = side.offsets.data == nullptr ? side.rows : row_offset(side, n + 1) - begin;
  return static_cast<int>(larger<int64_t>(smaller(count, side.longest), 0));
}

// The queries and keys of one sequence that a block works on.
struct Span {
  int64_t number;       // in the batch
  int64_t query_batch;  // row query_begin + i of batch entry query_batch is query i
  int64_t query_begin;
  int64_t flat_row;     // row of query 0 among those of the wave
  int64_t first_query;  // number of query 0 in its sequence
  int query_count;
  bool has_last_query;  // of its sequence
  int key_count;        // that take part
  int64_t key_batch;
  int64_t key_begin;
  const int32_t* key_index;

  // Position of key j in its sequence.
  __device__ int64_t position(int64_t j) const { return key_index != nullptr ? key_index[j] : j; }
};

__device__ inline Span span_of(const Sequences& sequences, int64_t n) {
  const bool jagged_queries = sequences.query.offsets.data != nullptr;
  const bool jagged_keys = sequences.key.offsets.data != nullptr;
  Span span{};
  span.number = n;
  const int64_t begin = row_offset(sequences.query, n);
  const int64_t end = begin + row_count(sequences.query, n, begin);
  const int64_t first = smaller(larger(begin, sequences.first_row), end);
  span.first_query = first - begin;
  span.query_count = static_cast<int>(larger<int64_t>(smaller(end, sequences.last_row) - first, 0));
  span.has_last_query = first + span.query_count == end;
  span.flat_row = first - sequences.first_row;
  span.query_batch = jagged_queries ? 0 : n;
  span.query_begin = jagged_queries ? first : span.first_query;
  const int64_t key_begin = row_offset(sequences.key, n);
  span.key_count = row_count(sequences.key, n, key_begin);
  span.key_batch = jagged_keys ? 0 : n;
  span.key_begin = jagged_keys ? key_begin : 0;
  if (sequences.key_lengths.data != nullptr) {
    span.key_count = static_cast<int>(
        smaller<int64_t>(larger<int64_t>(sequences.key_lengths.at(n), 0), span.key_count));
  } else if (sequences.key_count != nullptr) {
    span.key_count = sequences.key_count[n];
    span.key_index = sequences.key_index + n * sequences.key.rows;
  }
  return span;
}

constexpr int64_t kNowhere = int64_t{1} << 40;  // past the rows of any sequence

// The rows of all sequences that are worked on: all keys, or the queries of the wave.
struct Range {
  int64_t begin;
  int64_t end;
};

__host__ __device__ inline Range worked_on(const Sequences& sequences, bool by_key) {
  const bool jagged = sequences.key.offsets.data != nullptr;
  return by_key ? Range{0, (jagged ? 1 : sequences.count) * sequences.key.rows}
                : Range{sequences.first_row, sequences.last_row};
}

// A tile is 2^shift consecutive rows of one sequence, or what is left of them. The host does not
// know how long sequences are, so it starts a block for every number that a tile could have, and
// the block finds out which it is. Blocks whose number belongs to no tile end at once. The tiles of
// sequence n are numbered from
//   (rows before it >> shift) + n
// on: each sequence before it has at most one tile that is not full, so no two have the same
// numbers. Or where there is an order, each sequence in it has as many as the longest could.
struct Tile {
  int64_t sequence;
  int64_t first;  // row of the sequence
};

__host__ __device__ inline int64_t most_tiles(const Side& side, int shift) {
  return side.longest > 0 ? ((side.longest - 1) >> shift) + 1 : 1;
}

__host__ __device__ inline int64_t tile_count(const Sequences& sequences, bool by_key, int shift) {
  if (sequences.order != nullptr) {
    return sequences.count * most_tiles(by_key ? sequences.key : sequences.query, shift);
  }
  const Range rows = worked_on(sequences, by_key);
  return sequences.count > 0 ? ((rows.end - rows.begin) >> shift) + sequences.count : 0;
}

__device__ inline int64_t first_tile(const Sequences& sequences, bool by_key, int64_t n,
                                     int shift) {
  const Range rows = worked_on(sequences, by_key);
  const int64_t row = row_offset(by_key ? sequences.key : sequences.query, n);
  return ((smaller(larger(row, rows.begin), rows.end) - rows.begin) >> shift) + n;
}

__device__ inline Tile find_tile(const Sequences& sequences, bool by_key, int shift,
                                 int64_t number) {
  if (sequences.order != nullptr) {
    const int64_t tiles = most_tiles(by_key ? sequences.key : sequences.query, shift);
    return {sequences.order[number / tiles], number % tiles << shift};
  }
  int64_t low = 0;
  int64_t high = sequences.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_tile(sequences, by_key, middle, shift) <= number) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t tile = number - first_tile(sequences, by_key, low, shift);
  return {low, tile >= 0 ? tile << shift : kNowhere};  // offsets may not start at 0
}

// Offsets of one head's rows of a sequence, by number.
struct RowOffsets {
  int64_t first;
  int64_t step;
  const int32_t* index;  // positions of the keys that a mask leaves, else null

  __device__ int64_t operator[](int n) const {
    // Numbers and strides are not negative: without signs the product takes fewer instructions.
    const auto row = static_cast<uint32_t>(index != nullptr ? index[n] : n);
    return first + static_cast<int64_t>(row * static_cast<uint64_t>(step));
  }
};

__device__ inline RowOffsets query_offsets(const Rows& rows, const Span& span, int64_t head) {
  return {span.query_batch * rows.batch + span.query_begin * rows.row + head * rows.head, rows.row,
          nullptr};
}

__device__ inline RowOffsets key_offsets(const Rows& rows, const Span& span, int64_t head) {
  return {span.key_batch * rows.batch + span.key_begin * rows.row + head * rows.head, rows.row,
          span.key_index};
}

__device__ inline int64_t query_offset(const Rows& rows, const Span& span, int64_t head, int i) {
  return query_offsets(rows, span, head)[i];
}

__device__ inline int64_t key_offset(const Rows& rows, const Span& span, int64_t head, int j) {
  return key_offsets(rows, span, head)[j];
}

// Offsets of the scores, or of the weights, of query i, by key.
__device__ inline RowOffsets score_offsets(const Scores& scores, const Span& span, int64_t head,
                                           int64_t i) {
  const Rows& rows = scores.rows;
  const int64_t row = scores.by_key ? span.number * rows.batch + span.key_begin * scores.begin +
                                          (span.first_query + i) * rows.row
                                    : (span.flat_row + i) * rows.row;
  return {head * rows.head + row, rows.col, scores.by_key ? span.key_index : nullptr};
}

// The scores of query i, in float32.
struct ScoreRow {
  float* data;
  RowOffsets offsets;

  __device__ float& operator[](int j) const { return data[offsets[j]]; }
};

__device__ inline ScoreRow score_row(const Scores& scores, const Span& span, int64_t head,
                                     int64_t i) {
  const RowOffsets offsets = score_offsets(scores, span, head, i);
  return {static_cast<float*>(scores.rows.data) + offsets.first, {0, offsets.step, offsets.index}};
}

// The factor that dropout gives the weight of query i and key j.
__device__ inline float dropout_factor(const Dropout& dropout, const Span& span, int64_t head,
                                       int64_t i, int64_t j) {
  if (!dropout.active) {
    return 1;
  }
  const bool kept = dropout.keeps(span.position(j), span.first_query + i, head, span.number);
  return kept ? static_cast<float>(dropout.keep_scale) : 0.0f;
}

}  // namespace attn_ext::cuda
