// What the CUDA backend has beside ../tensors.h: the device and stream that a call runs on, and
// views of scores. Only the stable ABI is used.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../tensors.h"
#include "kernels.h"

namespace attn_ext {
namespace cuda {

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

inline void check_dtype(const char* name, const OptionalTensor& tensor) {
  STD_TORCH_CHECK(!tensor.has_value() || tensor->scalar_type() != ScalarType::Double,
                  "attn_ext: ", name,
                  ": backend 'cuda' expects float32, float16 or bfloat16, got float64; use "
                  "backend='reference'");
}

inline Weights weights_of(const Tensor& tensor, bool by_key) {
  return {weight_rows(tensor, by_key), by_key};
}

// Scores by key: from dimension `first` on [batch, key, head].
inline Scores scores_by_key(const Tensor& tensor, int64_t first, int64_t query_stride) {
  Scores scores;
  scores.data = static_cast<float*>(tensor.data_ptr());
  scores.by_key = true;
  scores.query = query_stride;
  scores.batch = tensor.size(first) > 1 ? tensor.stride(first) : 0;  // jagged keys have one for all
  scores.key = tensor.stride(first + 1);
  scores.begin = scores.key;
  scores.head = tensor.stride(first + 2);
  return scores;
}

// Scores of several, [.., query, head, key], the rows of all queries one after the other.
inline Scores dense_scores(const Tensor& tensor) {
  Scores scores;
  scores.data = static_cast<float*>(tensor.data_ptr());
  scores.query = tensor.stride(1);
  scores.head = tensor.stride(2);
  scores.key = 1;
  return scores;
}

// Scores of one query a sequence, [batch, key, head], or of steps, [step, batch, key, head].
inline Scores key_scores(const Tensor& tensor) {
  const int64_t first = tensor.dim() - 3;
  return scores_by_key(tensor, first, first == 1 ? tensor.stride(0) : 0);
}

// Scores of pooling, [batch, key, head, branch].
inline Scores branch_scores(const Tensor& tensor) {
  return scores_by_key(tensor, 0, tensor.stride(3));
}

// Weights that are raw scores.
inline Scores raw_scores(const Tensor& weights, bool by_key) {
  const Rows rows = weight_rows(weights, by_key);
  Scores scores;
  scores.data = static_cast<float*>(rows.data);
  scores.by_key = true;
  scores.batch = rows.batch;
  scores.query = rows.row;
  scores.key = rows.col;
  scores.begin = by_key ? rows.col : 0;
  scores.head = rows.head;
  return scores;
}

inline void clear(const Tensor& tensor, cudaStream_t stream) {
  clear(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()), stream);
}

}  // namespace cuda
}  // namespace attn_ext
