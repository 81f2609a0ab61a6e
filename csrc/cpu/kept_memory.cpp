#include "kept_memory.h"

#include <algorithm>
#include <iterator>
#include <mutex>
#include <vector>

namespace attn_ext {

#if defined(MADV_FREE)

namespace {

constexpr size_t kMostKept = size_t{1} << 30;  // bytes
// Sizes are rounded up to this many bytes, so that batches of nearly equal size fit into the same.
constexpr size_t kGranularity = size_t{2} << 20;

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

}  // namespace

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

void keep_memory(Memory memory) noexcept {
  if (!cache().keep(memory)) {
    unmap(memory);
  }
}

void release_kept_memory() noexcept { cache().clear(); }

#else

Memory take_memory(size_t) { return {nullptr, 0}; }
void keep_memory(Memory) noexcept {}
void release_kept_memory() noexcept {}

#endif

}  // namespace attn_ext
