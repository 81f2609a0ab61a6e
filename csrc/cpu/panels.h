// Operands of the tile kernels: rows gathered from strided tensors of any dtype into panels of
// padded rows.
#pragma once

#include "convert.h"
#include "runtime.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// One step of features of rows i = 0, 1, ...: kStep numbers at data + i * row.
template <class T>
struct StepRows {
  const T* data;
  int64_t row;
};

// Rows of the compute type whose length is padded to whole steps: step p of row i stands at
// data + i * row + p * step. Where rows lie in a tensor, only whole steps are read there, and the
// rest is a packed copy, the `tail`.
template <class T>
struct Panel {
  const T* data;
  int64_t row;
  int64_t step;
  int64_t whole_steps = INT64_MAX;
  const T* tail = nullptr;  // rows are kStep apart

  ATTN_EXT_INLINE Panel from_row(int64_t i) const {
    return {data + i * row, row, step, whole_steps, tail + i * kStep<T>};
  }

  ATTN_EXT_INLINE StepRows<T> at(int64_t p) const {
    return p < whole_steps ? StepRows<T>{data + p * step, row} : StepRows<T>{tail, kStep<T>};
  }
};

template <class T>
ATTN_EXT_INLINE int64_t steps_of(int64_t columns) {
  return (columns + kStep<T> - 1) / kStep<T>;
}

// From one step to the next of `rows` packed rows of `width` numbers a step: an odd number of cache
// lines, as the steps of a row, written one after the other, would else compete for few cache sets.
template <class T>
ATTN_EXT_INLINE int64_t step_stride(int64_t rows, int64_t width = kStep<T>) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((rows * width + line - 1) / line | 1) * line;
}

// Rows j = 0, 1, ... of one head of one sequence, in a tensor.
struct RowSource {
  const void* data;
  DType dtype;
  int64_t base;
  int64_t row;
  int64_t col;
  int64_t first;         // position of row 0
  const int64_t* index;  // or the position of every row

  ATTN_EXT_INLINE int64_t position(int64_t j) const { return index ? index[j] : first + j; }
  ATTN_EXT_INLINE int64_t offset(int64_t j) const { return base + position(j) * row; }
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

inline RowSource query_rows(const Rows& view, const Sequence& sequence, int64_t head) {
  const int64_t base = sequence.query_batch * view.batch + sequence.query_begin * view.row;
  return {view.data, view.dtype, base + head * view.head, view.row, view.col, 0, nullptr};
}

inline RowSource key_rows(const Rows& view, const Sequence& sequence, int64_t head) {
  const int64_t base = sequence.key_batch * view.batch + sequence.key_begin * view.row;
  return {view.data, view.dtype,         base + head * view.head, view.row,
          view.col,  sequence.first_key, sequence.key_index};
}

// Columns [begin, begin + count) of row j: in place if they lie there in the compute type, else in
// `copy`.
template <class T>
ATTN_EXT_INLINE const T* row_values(const RowSource& source, int64_t j, int64_t begin,
                                    int64_t count, T* copy) {
  const int64_t offset = source.offset(j) + begin * source.col;
  if (source.dtype == kDTypeOf<T> && source.col == 1) {
    return static_cast<const T*>(source.data) + offset;
  }
  read_row<T>(source.data, source.dtype, offset, source.col, count, copy);
  return copy;
}

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
// Each step is followed by its products with `weights`, if given.
template <class T, class Map>
void pack(const RowSource& source, int64_t first, int64_t rows, int64_t begin, int64_t count,
          T* target, int64_t row_stride, int64_t step_stride, T* bounds, T* copy,
          const T* weights = nullptr) {
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
      const Vec<T> x0 =
          c + lanes <= count ? load<T>(values + c) : load_partial<T>(values + c, count - c);
      const Vec<T> x1 = c + 2 * lanes <= count
                            ? load<T>(values + c + lanes)
                            : load_partial<T>(values + c + lanes, count - c - lanes);
      bound.include(x0);
      bound.include(x1);
      const Vec<T> y0 = Map::map(x0);
      const Vec<T> y1 = Map::map(x1);
      store<T>(row, y0);
      store<T>(row + lanes, y1);
      if (weights != nullptr) {
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

// Columns [begin, begin + count) of rows [first, first + rows), step after step.
template <class T, class Map>
Panel<T> packed_panel(const RowSource& source, int64_t first, int64_t rows, int64_t begin,
                      int64_t count, const PanelRoom<T>& room) {
  const Panel<T> panel{room.data, kStep<T>, step_stride<T>(rows)};
  pack<T, Map>(source, first, rows, begin, count, room.data, panel.row, panel.step, room.bounds,
               room.copy);
  return panel;
}

// Whether the rows can serve as a panel where they are.
template <class T>
ATTN_EXT_INLINE bool lies_in_panel(const RowSource& source) {
  return source.dtype == kDTypeOf<T> && source.col == 1 && source.index == nullptr;
}

// Where rows from `first` on can be summed in place: numbers of the compute type in whole steps.
// Null where they cannot.
template <class T>
ATTN_EXT_INLINE T* rows_in_place(const RowSource& target, int64_t first, int64_t columns) {
  return lies_in_panel<T>(target) && columns % kStep<T> == 0
             ? static_cast<T*>(const_cast<void*>(target.data)) + target.offset(first)
             : nullptr;
}

// Columns [begin, begin + count) of rows [first, first + rows) as a panel: in place if possible,
// else packed one row after the other into `target`.
template <class T>
Panel<T> panel_of(const RowSource& source, int64_t first, int64_t rows, int64_t begin,
                  int64_t count, T* target, T* copy) {
  if (lies_in_panel<T>(source)) {
    const T* data = static_cast<const T*>(source.data) + source.offset(first) + begin;
    const int64_t rest = count % kStep<T>;
    if (rest != 0) {
      pack<T, PackValues<T>>(source, first, rows, begin + count - rest, rest, target, kStep<T>,
                             kStep<T>, nullptr, copy);
    }
    return {data, source.row, kStep<T>, count / kStep<T>, target};
  }
  const int64_t row_stride = steps_of<T>(count) * kStep<T>;
  pack<T, PackValues<T>>(source, first, rows, begin, count, target, row_stride, kStep<T>, nullptr,
                         copy);
  return {target, row_stride, kStep<T>};
}

// A block of queries with their exponentials (step after step, so that reading a step of all rows
// is reading consecutive memory) and the source to read them again from for the exact route.
template <class T>
struct QueryBlock {
  Panel<T> exponentials;
  const T* bounds;
  RowSource source;
  int64_t first;
  int64_t count;
};

// With `weights`, each step holds the exponentials' two vectors and then their products with the
// weights.
template <class T>
QueryBlock<T> pack_queries(const RowSource& source, int64_t first, int64_t rows, int64_t begin,
                           int64_t count, const T* weights, Scratch& scratch) {
  const int64_t steps = steps_of<T>(count);
  const int64_t width = (weights == nullptr ? 1 : 2) * kStep<T>;
  const int64_t stride = step_stride<T>(rows, width);
  T* data = scratch.take<T>(steps * stride);
  T* bounds = scratch.take<T>(rows);
  T* copy = scratch.take<T>(count);
  pack<T, PackExponentials<T>>(source, first, rows, begin, count, data, width, stride, bounds, copy,
                               weights);
  return {{data, width, stride}, bounds, source, first, rows};
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

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
