#include "blocks.h"

#include <algorithm>
#include <iterator>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "runtime.h"

namespace attn_ext {

#if defined(__linux__) && defined(MADV_FREE)

namespace {

#if defined(__SANITIZE_ADDRESS__)  // it would not see that a kept block is read
constexpr size_t kMostKept = 0;
#else
constexpr size_t kMostKept = size_t{1} << 30;  // bytes
#endif
constexpr size_t kGranularity = size_t{2} << 20;  // bytes: batches of about a size share blocks

class Cache {
 public:
  // A kept block for `bytes`, or one without data. The latest first: its memory is the likeliest to
  // be there still.
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      return {nullptr, 0};
    }
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const Block& block) {
      return block.bytes >= bytes && block.bytes / 2 <= bytes;
    });
    if (found == blocks_.rend()) {
      return {nullptr, 0};
    }
    const Block block = *found;
    blocks_.erase(std::next(found).base());
    bytes_ -= block.bytes;
    return block;
  }

  // Whether it keeps the block; the oldest make room for it.
  bool keep(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kMostKept || madvise(block.data, block.bytes, MADV_FREE) != 0) {
      return false;
    }
    blocks_.push_back(block);
    bytes_ += block.bytes;
    shrink(kMostKept);
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
      bytes_ -= blocks_.front().bytes;
      munmap(blocks_.front().data, blocks_.front().bytes);
      blocks_.erase(blocks_.begin());
    }
  }

  // Never waited for: in a forked child it stays locked for ever if another thread of the parent
  // held it. Without it, calls get and give back memory as if nothing were kept.
  std::mutex mutex_;
  std::vector<Block> blocks_;  // the latest last
  size_t bytes_ = 0;
};

// Never destroyed: tensors are freed until the process ends.
Cache& cache() {
  static Cache& instance = *new Cache;
  return instance;
}

}  // namespace

Block take_block(size_t bytes) {
  const Block kept = cache().take(bytes);
  if (kept.data != nullptr) {
    return kept;
  }
  const size_t size = (bytes + kGranularity - 1) / kGranularity * kGranularity;
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return {data, size};
}

void keep_block(Block block) noexcept {
  if (!cache().keep(block)) {
    munmap(block.data, block.bytes);
  }
}

void release_blocks() noexcept { cache().clear(); }

#else  // nothing is kept

Block take_block(size_t bytes) { return {allocate_aligned(bytes), bytes}; }

void keep_block(Block block) noexcept { free_aligned(block.data); }

void release_blocks() noexcept {}

#endif

}  // namespace attn_ext
