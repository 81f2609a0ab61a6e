// One call as the kernels see it: its device, tensors and sequences, and how its queries are
// divided into waves. Only the stable ABI is used.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../operations.h"
#include "geometry.cuh"
#include "kernels.h"

namespace attn_ext::cuda {

// Bytes of scores that are held at a time; tests make do with less.
#ifndef ATTN_EXT_CUDA_WAVE_BYTES
#define ATTN_EXT_CUDA_WAVE_BYTES 1 << 29
#endif
constexpr int64_t kWaveBytes = ATTN_EXT_CUDA_WAVE_BYTES;

// Makes a tensor's device current, and gives the stream that its operations are on.
class Device {
 public:
  explicit Device(const Tensor& tensor) {
    const int32_t index = tensor.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    // Last, as nothing gives it back if what comes after it throws.
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &guard_));
  }
  ~Device() { aoti_torch_delete_cuda_guard(guard_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

inline void check_dtype(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::Double, "attn_ext: ", name,
                  ": backend 'cuda' expects float32, float16 or bfloat16, got float64; use "
                  "backend='reference'");
}

// The tensor, or a copy whose features lie next to each other, as kernels take them.
inline Tensor usable(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor);
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) < 2 ? tensor
                                                           : torch::stable::contiguous(tensor);
}

// Weights, or raw scores in their place.
inline Scores weight_scores(const Tensor& tensor, bool by_key) {
  const Rows rows = weight_rows(tensor, by_key);
  return {rows, true, by_key ? rows.col : 0};
}

// Scores by key: from dimension `first` on [batch, key, head], then branches; before it steps.
inline Scores key_scores(const Tensor& tensor, int64_t first = 0) {
  const int64_t queries = tensor.dim() < 4 ? 0 : tensor.stride(first > 0 ? 0 : 3);
  // Jagged keys have one batch for all sequences.
  const int64_t batch = tensor.size(first) > 1 ? tensor.stride(first) : 0;
  const int64_t key = tensor.stride(first + 1);
  return {view(tensor, batch, queries, tensor.stride(first + 2), key), true, key};
}

// Scores of several, [.., query, head, key], the rows of all queries one after the other.
inline Scores dense_scores(const Tensor& tensor) {
  return {view(tensor, 0, tensor.stride(1), tensor.stride(2), 1), false, 0};
}

// An operation under way: what it was given, what its kernels are told, and buffers of theirs.
class Call : public BackwardCall {
 public:
  explicit Call(const Inputs& given) : inputs(given), device_(given.key) {
    inputs.key = usable("key", given.key);
    inputs.query = inputs.pools ? inputs.key : usable("query", given.query);
    STD_TORCH_CHECK(inputs.query.scalar_type() == inputs.key.scalar_type(),
                    "attn_ext: query: expected key's dtype, got another");
    inputs.value = usable("value", given.value);
    inputs.score_weight = usable("score_weight", given.score_weight);
    if (given.gate.has_value()) {
      inputs.gate = usable("gate", *given.gate);
    }
    describe_operands(inputs, *this);
    few_queries = inputs.scores_by_key();
    describe_sequences();
  }

  Call(const Inputs& given, const Incoming& incoming) : Call(given) {
    if (incoming.dcontext.has_value() && !raw_scores) {
      dcontext = rows_of(hold(usable("dcontext", *incoming.dcontext)));
      has_dalpha = incoming.grad_mask & ~kGradValue;
    }
    if (incoming.dweights.has_value()) {
      check_dtype("dweights", *incoming.dweights);
      dweights = weight_scores(*incoming.dweights, inputs.by_key());
    }
    stats = rows_of(incoming.stats);
  }

  cudaStream_t stream() const { return device_.stream(); }
  // Whether rows of queries, or of keys, may belong to nobody, and so must be cleared.
  bool leaves_rows() const { return leaves_rows_; }
  int64_t query_rows() const { return query_rows_; }
  int64_t longest_key() const { return sequences.key.longest; }

  Tensor floats(const std::vector<int64_t>& sizes, bool zeros = false) const {
    return allocate(inputs.key, sizes, ScalarType::Float, zeros);
  }

  // A tensor that lasts as long as the call.
  const Tensor& hold(const Tensor& tensor) {
    held_.push_back(tensor);
    return held_.back();
  }

  template <class T>
  T* room(const std::vector<int64_t>& sizes, ScalarType dtype) {
    return static_cast<T*>(hold(allocate(inputs.key, sizes, dtype)).data_ptr());
  }

  // Queries whose `buffers` rows of scores are held at a time.
  int64_t wave_rows(int64_t buffers) const {
    const int64_t row = std::max<int64_t>(heads * longest_key() * 4 * buffers, 1);
    return std::max<int64_t>(std::min(query_rows_, kWaveBytes / row), 1);
  }

  void begin_wave(int64_t first, int64_t rows) {
    sequences.first_row = first;
    sequences.last_row = std::min(first + rows, query_rows_);
  }

  Inputs inputs;

 private:
  void describe_sequences() {
    const Inputs& arguments = inputs;
    const bool jagged_queries = arguments.cu_seqlens_q.has_value();
    const int64_t queries = inputs.query_rows();
    const int64_t keys = inputs.key.size(1);
    STD_TORCH_CHECK(queries < INT32_MAX && keys < INT32_MAX,
                    "attn_ext: backend 'cuda' takes fewer than 2^31 rows");
    sequences.count = inputs.batch();
    sequences.query = {integers_of(arguments.cu_seqlens_q), queries,
                       std::min(std::max<int64_t>(inputs.max_queries(), 0), queries)};
    sequences.key = {integers_of(arguments.cu_seqlens_k), keys,
                     std::min(std::max<int64_t>(inputs.max_keys(), 0), keys)};
    sequences.key_lengths = integers_of(arguments.key_lengths);
    query_rows_ = jagged_queries ? queries : sequences.count * queries;
    begin_wave(0, query_rows_);
    if (arguments.key_padding_mask.has_value()) {
      sequences.mask = mask_of(*arguments.key_padding_mask, sequences.count, keys);
      sequences.key_index = room<int32_t>({sequences.count * (keys + 1)}, ScalarType::Int);
      sequences.key_count = sequences.key_index + sequences.count * keys;
      launch_compact_mask(sequences, stream());
    }
    leaves_rows_ = jagged_queries || arguments.cu_seqlens_k.has_value() ||
                   arguments.key_lengths.has_value() || arguments.key_padding_mask.has_value() ||
                   queries == 0 || keys == 0;
    if (wants_order()) {
      sequences.order = room<int32_t>({sequences.count}, ScalarType::Int);
      launch_order(sequences, stream());
    }
  }

  // Whether sequences are taken in the order of their work: where their lengths may differ, and at
  // most half of the blocks have no tile, as each sequence then gets as many as the longest could
  // have.
  bool wants_order() const {
    constexpr int kShift = 5;        // of most tiles
    constexpr int64_t kMost = 1024;  // each is compared with all
    if (!leaves_rows_ || few_queries || sequences.count < 2 || sequences.count > kMost) {
      return false;
    }
    const auto few = [&](bool by_key) {
      const int64_t most = most_tiles(by_key ? sequences.key : sequences.query, kShift);
      return sequences.count * most <= 2 * tile_count(sequences, by_key, kShift);
    };
    return few(false) && few(true);
  }

  Device device_;
  std::vector<Tensor> held_;
  bool leaves_rows_ = false;
  int64_t query_rows_ = 0;
};

}  // namespace attn_ext::cuda
