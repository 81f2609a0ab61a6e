// One call: its tensors as the kernels see them, and how its queries are divided into waves.
#pragma once

#include <algorithm>

#include "geometry.cuh"
#include "tensors.h"

namespace attn_ext {
namespace cuda {

// Bytes of scores that are held at a time (tests make do with less), and of partial gradients of
// queries.
#ifndef ATTN_EXT_CUDA_WAVE_BYTES
#define ATTN_EXT_CUDA_WAVE_BYTES 1 << 29
#endif
constexpr int64_t kWaveBytes = ATTN_EXT_CUDA_WAVE_BYTES;
constexpr int64_t kPartialBytes = int64_t{1} << 28;

// The smallest shift with 2^shift >= count.
inline int shift_for(int64_t count) {
  int shift = 0;
  while ((int64_t{1} << shift) < count) {
    ++shift;
  }
  return shift;
}

class Call {
 public:
  // Pooling: the rows of score_weight, [H, K, D], are the queries of every sequence.
  Call(const Tensor& key, const Tensor& value, const Tensor& score_weight,
       const SequenceArguments& sequences, const Dropout& dropout, int64_t weights_layout)
      : device_(key), query_(key) {
    const int64_t batch =
        sequences.cu_seqlens_k.has_value() ? sequences.cu_seqlens_k->size(0) - 1 : key.size(0);
    describe(key, value, score_weight, dropout, weights_layout);
    problem.query = view(score_weight, 0, score_weight.stride(1), score_weight.stride(0),
                         score_weight.stride(2));
    describe_sequences(batch, score_weight.size(1), key, sequences);
    few_rows_ = true;
  }

  // With `step_major`, query is [S, B, H, D]: its rows are the steps.
  Call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
       const SequenceArguments& sequences, const Dropout& dropout, int64_t weights_layout,
       bool step_major = false)
      : device_(query), query_(query) {
    check_dtype("query", query);
    describe(key, value, score_weight, dropout, weights_layout);
    problem.query = step_major ? step_rows_of(query) : rows_of(query);
    problem.score_weight = score_weight_rows(score_weight);
    describe_sequences(query.size(step_major ? 1 : 0), query.size(step_major ? 0 : 1), key,
                       sequences);
    few_rows_ = one_step_;
  }

  cudaStream_t stream() const { return device_.stream(); }
  bool one_step() const { return one_step_; }
  // Whether rows of scores are few and long.
  bool few_rows() const { return few_rows_; }
  // Whether rows of queries, or of keys, may belong to nobody, and so must be cleared.
  bool leaves_rows() const { return leaves_rows_; }
  int64_t batch() const { return problem.sequences.count; }
  int64_t query_rows() const { return query_rows_; }
  int64_t key_rows() const { return cuda::key_rows(problem.sequences); }
  // Blocks of 2^shift keys that all sequences have at most.
  int64_t key_tiles(int shift) const { return tile_bound(key_rows(), batch(), shift); }
  int64_t longest_query() const { return problem.sequences.query.longest; }
  int64_t longest_key() const { return problem.sequences.key.longest; }
  // Bounds as the caller gave them, for the shape of weights.
  int64_t max_queries() const { return max_queries_; }
  int64_t max_keys() const { return max_keys_; }

  Tensor floats(const std::vector<int64_t>& sizes) const {
    return allocate(query_, sizes, ScalarType::Float);
  }

  // Queries whose `buffers` rows of scores are held at a time.
  int64_t wave_rows(int64_t buffers) const {
    const int64_t row = std::max<int64_t>(problem.heads * longest_key() * 4 * buffers, 1);
    return std::max<int64_t>(std::min(query_rows_, kWaveBytes / row), 1);
  }

  void begin_wave(int64_t first, int64_t rows) {
    problem.sequences.first_row = first;
    problem.sequences.last_row = std::min(first + rows, query_rows_);
  }

  Problem problem;

 private:
  void describe(const Tensor& key, const Tensor& value, const Tensor& score_weight,
                const Dropout& dropout, int64_t weights_layout) {
    check_dtype("key", key);
    check_dtype("value", value);
    check_dtype("score_weight", score_weight);
    problem.heads = key.size(2);
    problem.dim = key.size(3);
    problem.value_dim = value.size(3);
    problem.key = rows_of(key);
    problem.value = rows_of(value);
    problem.dropout = dropout;
    problem.raw_scores = weights_layout & kRaw;
    problem.is_short = !problem.raw_scores && attn_ext::is_short(query_) &&
                       attn_ext::is_short(key) && attn_ext::is_short(value) &&
                       attn_ext::is_short(score_weight);
  }

  void describe_sequences(int64_t query_batch, int64_t query_rows, const Tensor& key,
                          const SequenceArguments& arguments) {
    Sequences& sequences = problem.sequences;
    const bool jagged_queries = arguments.cu_seqlens_q.has_value();
    const bool jagged_keys = arguments.cu_seqlens_k.has_value();
    sequences.query.offsets = integers_of(arguments.cu_seqlens_q);
    sequences.key.offsets = integers_of(arguments.cu_seqlens_k);
    sequences.key_lengths = integers_of(arguments.key_lengths);
    const int64_t query_count = jagged_queries ? arguments.cu_seqlens_q->size(0) - 1 : query_batch;
    const int64_t key_count = jagged_keys ? arguments.cu_seqlens_k->size(0) - 1 : key.size(0);
    sequences.count = std::max<int64_t>(std::min(query_count, key_count), 0);
    max_queries_ = jagged_queries ? arguments.max_seqlen_q : query_rows;
    max_keys_ = jagged_keys ? arguments.max_seqlen_k : key.size(1);
    sequences.query.rows = query_rows;
    sequences.key.rows = key.size(1);
    STD_TORCH_CHECK(query_rows < INT32_MAX && key.size(1) < INT32_MAX,
                    "attn_ext: backend 'cuda' takes fewer than 2^31 rows");
    sequences.query.longest = std::min(std::max<int64_t>(max_queries_, 0), query_rows);
    sequences.key.longest = std::min(std::max<int64_t>(max_keys_, 0), key.size(1));
    query_rows_ = jagged_queries ? query_rows : sequences.count * query_rows;
    begin_wave(0, query_rows_);
    if (arguments.key_padding_mask.has_value()) {
      compact(*arguments.key_padding_mask);
    }
    one_step_ = !jagged_queries && query_rows == 1;
    leaves_rows_ = jagged_queries || jagged_keys || arguments.key_lengths.has_value() ||
                   arguments.key_padding_mask.has_value() || query_rows == 0 || key.size(1) == 0;
  }

  void compact(const Tensor& mask) {
    Sequences& sequences = problem.sequences;
    const int64_t rows = sequences.key.rows;
    const Mask view = mask_of(mask, sequences.count, rows);
    key_index_ = allocate(query_, {sequences.count * (rows + 1)}, ScalarType::Int);
    auto* index = static_cast<int32_t*>(key_index_->data_ptr());
    int32_t* count = index + sequences.count * rows;
    launch_compact_mask(view, sequences.count, rows, index, count, stream());
    sequences.key_index = index;
    sequences.key_count = count;
  }

  Device device_;
  Tensor query_;
  OptionalTensor key_index_;
  bool one_step_ = false;
  bool few_rows_ = false;
  bool leaves_rows_ = false;
  int64_t query_rows_ = 0;
  int64_t max_queries_ = 0;
  int64_t max_keys_ = 0;
};

}  // namespace cuda
}  // namespace attn_ext
