#include "kept_memory.h"

#include <algorithm>
#include <iterator>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Of PyTorch's stable ABI from 2.11 on, null in 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace attn_ext {

#if defined(MADV_FREE) && !defined(__SANITIZE_ADDRESS__)  // which would miss reads of kept memory

namespace {

// Bytes of the smallest tensor. malloc keeps smaller ones; of four with 7 MB it gave two back.
constexpr size_t kSmallestKept = size_t{4} << 20;
constexpr size_t kMostKept = size_t{1} << 30;  // bytes
// Sizes are rounded up to this many bytes, so that batches of nearly equal size fit into the same.
constexpr size_t kGranularity = size_t{2} << 20;

struct Memory {
  void* data;  // null: there is none
  size_t bytes;
};

void unmap(Memory memory) { munmap(memory.data, memory.bytes); }

class Cache {
 public:
  Cache() { kept_.reserve(kMostKept / kSmallestKept + 1); }

  // Kept memory that is large enough and not twice as large. The latest first: the kernel takes
  // pages that were kept long before others.
  Memory take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      return {nullptr, 0};
    }
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(), [&](const Memory& memory) {
      return memory.bytes >= bytes && memory.bytes / 2 <= bytes;
    });
    if (found == kept_.rend()) {
      return {nullptr, 0};
    }
    const Memory memory = *found;
    kept_.erase(std::next(found).base());
    bytes_ -= memory.bytes;
    return memory;
  }

  // Whether it keeps the memory. What was kept first makes room for it.
  bool keep(Memory memory) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || memory.bytes > kMostKept || madvise(memory.data, memory.bytes, MADV_FREE) != 0) {
      return false;
    }
    shrink(kMostKept - memory.bytes);
    kept_.push_back(memory);
    bytes_ += memory.bytes;
    return true;
  }

  void clear() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock) {
      shrink(0);
    }
  }

 private:
  void shrink(size_t most) {
    while (bytes_ > most) {
      bytes_ -= kept_.front().bytes;
      unmap(kept_.front());
      kept_.erase(kept_.begin());
    }
  }

  // Never waited for: a forked child would wait for ever if another thread of its parent held the
  // lock. Who does not get it takes and gives back memory as if nothing were kept.
  std::mutex mutex_;
  std::vector<Memory> kept_;  // the latest last
  size_t bytes_ = 0;
};

// Never destroyed: tensors are freed until the process ends.
Cache& cache() {
  static Cache& instance = *new Cache;
  return instance;
}

Memory map(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? Memory{nullptr, 0} : Memory{data, bytes};
}

// At least `bytes` of undefined content, kept or new; none if the system has none left.
Memory take_memory(size_t bytes) {
  Memory memory = cache().take(bytes);
  if (memory.data == nullptr) {
    const size_t size = (bytes + kGranularity - 1) / kGranularity * kGranularity;
    memory = map(size);
    if (memory.data == nullptr) {  // what is kept may be what is missing
      cache().clear();
      memory = map(size);
    }
  }
  return memory;
}

// Keeps memory for a later call, which may be of another thread. Until then the kernel may use its
// pages for something else.
void keep_memory(void* data, void* bytes) {
  const Memory memory{data, reinterpret_cast<size_t>(bytes)};
  if (!cache().keep(memory)) {
    unmap(memory);
  }
}

}  // namespace

Tensor allocate_large(const Tensor& like, ScalarType dtype, bool zeros, bool deterministic) {
  const std::vector<int64_t> sizes = sizes_of(like);
  std::vector<int64_t> strides(sizes.size());
  int64_t numbers = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = numbers;
    numbers *= sizes[axis];
  }
  const size_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  const size_t bytes = static_cast<size_t>(numbers) * size;
  const bool may_be_kept = torch_from_blob != nullptr && !deterministic && bytes >= kSmallestKept;
  const Memory memory = may_be_kept ? take_memory(bytes) : Memory{nullptr, 0};
  if (memory.data == nullptr) {
    return allocate(like, sizes, dtype, zeros);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      torch_from_blob(memory.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                      0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                      nullptr, 0, keep_memory, reinterpret_cast<void*>(memory.bytes)));
  Tensor result(handle);
  return zeros ? torch::stable::zero_(result) : result;
}

void release_kept_memory() { cache().clear(); }

#else

Tensor allocate_large(const Tensor& like, ScalarType dtype, bool zeros, bool) {
  return allocate(like, sizes_of(like), dtype, zeros);
}

void release_kept_memory() {}

#endif

}  // namespace attn_ext
