// PyTorch tensors as kernels see them, and the allocation of outputs, for all backends of the
// stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "view.h"

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

inline bool is_short(const Tensor& tensor) { return tensor.element_size() == 2; }

inline bool computes_in_double(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double;
}

inline ScalarType compute_type(const Tensor& query) {
  return computes_in_double(query) ? ScalarType::Double : ScalarType::Float;
}

inline Rows view(const Tensor& tensor, int64_t batch, int64_t row, int64_t head, int64_t col) {
  Rows rows{tensor.data_ptr(), dtype_of(tensor), batch, row, head, col};
  const int64_t granule =
      rows.dtype == DType::kFloat32 ? 4 : 8;  // numbers in 16 bytes; of float64 nobody asks
  rows.vectors = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && col == 1 &&
                 batch % granule == 0 && row % granule == 0 && head % granule == 0;
  return rows;
}

// [batch, row, head, col]; the last dimension may be missing.
inline Rows rows_of(const Tensor& tensor) {
  return view(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2),
              tensor.dim() > 3 ? tensor.stride(3) : 0);
}

// [step, batch, head, col], the step being the row.
inline Rows step_rows_of(const Tensor& tensor) {
  Rows rows = rows_of(tensor);
  std::swap(rows.batch, rows.row);
  return rows;
}

// Scores by key as (batch, query, head, key), [batch, key, head], [batch, key, head, query] or,
// with first = 1, [query, batch, key, head].
inline Rows key_score_rows(const Tensor& tensor, int64_t first = 0) {
  const int64_t query = first > 0 ? tensor.stride(0) : tensor.dim() > 3 ? tensor.stride(3) : 0;
  return view(tensor, tensor.stride(first), query, tensor.stride(first + 2),
              tensor.stride(first + 1));
}

// [head, col].
inline Rows score_weight_rows(const Tensor& score_weight) {
  return view(score_weight, 0, 0, score_weight.stride(0), score_weight.stride(1));
}

// Dense weights are [B, H, max_seqlen_q, max_seqlen_k], those by key [Nk, H], of more than one
// query [Nk, H, Nq].
inline Rows weight_rows(const Tensor& weights, bool by_key) {
  return by_key ? view(weights, 0, weights.dim() > 2 ? weights.stride(2) : 0, weights.stride(1),
                       weights.stride(0))
                : view(weights, weights.stride(0), weights.stride(2), weights.stride(1),
                       weights.stride(3));
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

inline Mask mask_of(const Tensor& mask, int64_t sequences, int64_t rows) {
  STD_TORCH_CHECK(mask.size(0) == sequences && mask.size(1) == rows,
                  "attn_ext: key_padding_mask has another shape than key");
  return {static_cast<const bool*>(mask.data_ptr()), mask.stride(0), mask.stride(1)};
}

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  Dropout dropout;
  if (p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "attn_ext: dropout needs dropout_seed");
    dropout.active = true;
    dropout.seed = static_cast<const int64_t*>(seed->data_ptr());
    dropout.threshold = p * (1 << 24);
    dropout.keep_scale = p < 1 ? 1 / (1 - p) : 0;
  }
  return dropout;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                       bool zeros = false) {
  Tensor result;
  try {
    result = torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception& error) {
    std::string shape;
    for (const int64_t size : sizes) {
      shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    }
    STD_TORCH_CHECK(false, "attn_ext: no tensor of shape (", shape,
                    ") could be made, perhaps for want of memory: ", error.what());
  }
  return zeros ? torch::stable::zero_(result) : result;
}

inline Tensor nothing(const Tensor& like, ScalarType dtype) {
  return allocate(like, {0}, dtype, false);
}

}  // namespace attn_ext
