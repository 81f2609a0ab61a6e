// The kernel table of one instruction set. A translation unit includes this once, inside its target
// region, after every header that is not ours, with ATTN_EXT_ISA (a namespace),
// ATTN_EXT_VECTOR_BYTES and ATTN_EXT_ISA_AVX512 defined. All code is in that namespace, and the
// standard library's templates are defined before the region, so no function that other files share
// is compiled for an instruction set that the machine may lack.
#include "backward.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

template <class T>
ScoreWeights<T> read_weights(const Rows& score_weight, int64_t head, int64_t dim, T* row) {
  pad_row<T>(row, 0, padded_columns(dim), 0);
  read_row<T>(score_weight.data, score_weight.dtype, head * score_weight.head, score_weight.col,
              dim, row);
  double magnitudes = 0;
  double squares = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const double weight = static_cast<double>(row[c]);
    magnitudes += weight < 0 ? -weight : weight;
    squares += weight * weight;
  }
  return {row, magnitudes, __builtin_sqrt(squares)};
}

inline void write_weights(const double* source, int64_t count, const Rows& target) {
  write_row<double>(target.data, target.dtype, 0, 1, count, source);
}

template <class T>
void prepare_rows(const Rows& key, int64_t batch, int64_t row, int64_t heads, int64_t dim,
                  T* exp_key, T* key_bound) {
  Scratch scratch;
  const int64_t columns = steps_of<T>(dim) * kStep<T>;
  T* packed = scratch.take<T>(columns);
  T* copy = scratch.take<T>(dim);
  for (int64_t head = 0; head < heads; ++head) {
    const RowSource source{
        key.data, key.dtype, batch * key.batch + head * key.head, key.row, key.col, 0, nullptr};
    pack<T, PackExponentials<T>>(source, row, 1, 0, dim, packed, columns, kStep<T>,
                                 key_bound + head, copy, nullptr);
    if (dim > 0) {
      __builtin_memcpy(exp_key + head * dim, packed, dim * sizeof(T));
    }
  }
}

template <class T>
constexpr Kernels<T> kKernels = {
    read_weights<T>,  write_weights, forward_item<T>,  forward_merge<T>, score_item<T>,
    finish_scores<T>, value_item<T>, gradient_item<T>, query_merge<T>,   prepare_rows<T>,
};

#define ATTN_EXT_NAME_OF(isa) #isa
#define ATTN_EXT_NAME(isa) ATTN_EXT_NAME_OF(isa)

extern const Isa kIsa;
const Isa kIsa{ATTN_EXT_NAME(ATTN_EXT_ISA), kKernels<float>, kKernels<double>};

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
