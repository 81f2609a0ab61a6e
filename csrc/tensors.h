// PyTorch tensors as the CPU backend sees them, and the allocation of its outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <utility>
#include <vector>

#include "cpu/geometry.h"
#include "cpu/kept_memory.h"
#include "cpu/problem.h"

// Of PyTorch's stable ABI from 2.11 on, null in 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace attn_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "attn_ext: expected a float32, float16, bfloat16 or float64 tensor");
  }
}

inline bool computes_in_double(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double;
}

inline ScalarType compute_type(const Tensor& query) {
  return computes_in_double(query) ? ScalarType::Double : ScalarType::Float;
}

// [batch, row, head, col]; the last dimension may be missing.
inline Rows rows_of(const Tensor& tensor) {
  Rows rows;
  rows.data = tensor.data_ptr();
  rows.dtype = dtype_of(tensor);
  rows.batch = tensor.stride(0);
  rows.row = tensor.stride(1);
  rows.head = tensor.stride(2);
  rows.col = tensor.dim() > 3 ? tensor.stride(3) : 0;
  return rows;
}

// [step, batch, head, col], the step being the row.
inline Rows step_rows_of(const Tensor& tensor) {
  Rows rows = rows_of(tensor);
  std::swap(rows.batch, rows.row);
  return rows;
}

// [step, batch, row, head], the step being the column.
inline Rows step_score_rows_of(const Tensor& tensor) {
  Rows rows;
  rows.data = tensor.data_ptr();
  rows.dtype = dtype_of(tensor);
  rows.col = tensor.stride(0);
  rows.batch = tensor.stride(1);
  rows.row = tensor.stride(2);
  rows.head = tensor.stride(3);
  return rows;
}

inline Rows score_weight_rows(const Tensor& score_weight) {
  Rows rows;
  rows.data = score_weight.data_ptr();
  rows.dtype = dtype_of(score_weight);
  rows.head = score_weight.stride(0);
  rows.col = score_weight.stride(1);
  return rows;
}

// Dense weights are [B, H, max_seqlen_q, max_seqlen_k], those by key [Nk, H].
inline Rows weight_rows(const Tensor& weights, bool by_key) {
  Rows rows;
  rows.data = weights.data_ptr();
  rows.dtype = dtype_of(weights);
  rows.batch = by_key ? 0 : weights.stride(0);
  rows.head = weights.stride(1);
  rows.row = by_key ? 0 : weights.stride(2);
  rows.col = by_key ? weights.stride(0) : weights.stride(3);
  return rows;
}

inline Integers integers_of(const OptionalTensor& tensor) {
  Integers result;
  if (tensor.has_value()) {
    result.data = tensor->data_ptr();
    result.wide = tensor->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(result.wide || tensor->scalar_type() == ScalarType::Int,
                    "attn_ext: expected int32 or int64 offsets and lengths");
    result.size = tensor->size(0);
    result.stride = tensor->stride(0);
  }
  return result;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                       bool zeros) {
  Tensor result = torch::stable::new_empty(like, sizes, dtype);
  return zeros ? torch::stable::zero_(result) : result;
}

// The same for gradients, which may be large: in memory that an earlier one has left, unless
// `deterministic` calls want PyTorch to fill new memory, of which this is none.
inline Tensor allocate_gradient(const Tensor& like, ScalarType dtype, bool zeros,
                                bool deterministic) {
  const std::vector<int64_t> sizes = sizes_of(like);
  std::vector<int64_t> strides(sizes.size());
  int64_t numbers = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = numbers;
    numbers *= sizes[axis];
  }
  const size_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  const size_t bytes = static_cast<size_t>(numbers) * size;
  const bool may_be_kept = kKeepsMemory && torch_from_blob != nullptr && !deterministic;
  const Memory memory =
      may_be_kept && bytes >= kSmallestKept ? take_memory(bytes) : Memory{nullptr, 0};
  if (memory.data == nullptr) {
    return allocate(like, sizes, dtype, zeros);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      memory.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void* context) { keep_memory({data, reinterpret_cast<size_t>(context)}); },
      reinterpret_cast<void*>(memory.bytes)));
  Tensor result(handle);
  return zeros ? torch::stable::zero_(result) : result;
}

inline Tensor nothing(const Tensor& like, ScalarType dtype) {
  return allocate(like, {0}, dtype, false);
}

inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.back() = last;
  return sizes;
}

}  // namespace attn_ext
