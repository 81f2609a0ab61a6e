// PyTorch tensors as the CUDA backend sees them, the allocation of its outputs and buffers, and the
// device and stream that a call runs on. Only the stable ABI is used.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"

namespace attn_ext {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false,
                      "attn_ext: backend 'cuda' expects float32, float16 or bfloat16 tensors; use "
                      "backend='reference' for float64");
  }
}

// Whether granules of 8 elements, from a multiple of 8 on, can be loaded 16 bytes at a time.
inline void find_vectors(Rows& rows, bool contiguous) {
  const int64_t granule = rows.dtype == DType::kFloat32 ? 4 : 8;  // elements in 16 bytes
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  rows.vectors = aligned && contiguous && rows.batch % granule == 0 && rows.row % granule == 0 &&
                 rows.head % granule == 0;
}

// [batch, row, head, col].
inline Rows rows_of(const Tensor& tensor) {
  Rows rows;
  rows.data = tensor.data_ptr();
  rows.dtype = dtype_of(tensor);
  rows.batch = tensor.stride(0);
  rows.row = tensor.stride(1);
  rows.head = tensor.stride(2);
  rows.col = tensor.stride(3);
  find_vectors(rows, rows.col == 1);
  return rows;
}

// [step, batch, head, col], the step being the row.
inline Rows step_rows_of(const Tensor& tensor) {
  Rows rows = rows_of(tensor);
  std::swap(rows.batch, rows.row);
  return rows;
}

// [head, col].
inline Rows score_weight_rows(const Tensor& score_weight) {
  Rows rows;
  rows.data = score_weight.data_ptr();
  rows.dtype = dtype_of(score_weight);
  rows.head = score_weight.stride(0);
  rows.col = score_weight.stride(1);
  find_vectors(rows, rows.col == 1);
  return rows;
}

inline Weights weights_of(const Tensor& tensor, bool by_key) {
  Weights weights;
  weights.by_key = by_key;
  weights.rows.data = tensor.data_ptr();
  weights.rows.dtype = dtype_of(tensor);
  weights.rows.batch = by_key ? 0 : tensor.stride(0);
  weights.rows.head = tensor.stride(1);
  weights.rows.row = by_key ? 0 : tensor.stride(2);
  weights.rows.col = by_key ? tensor.stride(0) : tensor.stride(3);
  return weights;
}

// Scores of one query a sequence, [batch, key, head], or of steps, [step, batch, key, head].
inline Scores key_scores(const Tensor& tensor) {
  const int64_t first = tensor.dim() - 3;
  Scores scores;
  scores.data = static_cast<float*>(tensor.data_ptr());
  scores.by_key = true;
  scores.query = first == 1 ? tensor.stride(0) : 0;
  scores.batch = tensor.stride(first);
  scores.key = tensor.stride(first + 1);
  scores.head = tensor.stride(first + 2);
  return scores;
}

inline Integers integers_of(const OptionalTensor& tensor) {
  Integers result;
  if (tensor.has_value()) {
    result.data = tensor->data_ptr();
    result.wide = tensor->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(result.wide || tensor->scalar_type() == ScalarType::Int,
                    "attn_ext: expected int32 or int64 offsets and lengths");
    result.stride = tensor->stride(0);
  }
  return result;
}

inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor nothing(const Tensor& like) { return allocate(like, {0}, like.scalar_type()); }

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.back() = last;
  return sizes;
}

inline void clear(const Tensor& tensor, cudaStream_t stream) {
  clear(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()), stream);
}

}  // namespace cuda
}  // namespace attn_ext
