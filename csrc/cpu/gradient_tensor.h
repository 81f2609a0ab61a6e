// The allocation of gradients, which may be large.
#pragma once

#include "../tensors.h"
#include "kept_memory.h"

// Of PyTorch's stable ABI from 2.11 on, null in 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace attn_ext {

// allocate() in memory that an earlier gradient has left, unless `deterministic` calls want PyTorch
// to fill new memory, of which this is none.
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
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      memory.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void* context) { keep_memory({data, reinterpret_cast<size_t>(context)}); },
      reinterpret_cast<void*>(memory.bytes)));
  Tensor result(handle);
  return zeros ? torch::stable::zero_(result) : result;
}

}  // namespace attn_ext
