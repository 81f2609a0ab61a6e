// Work distribution and scratch memory of the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attn_ext {

// Calls function(context, item) for each item, on torch's threads unless `cost` (in
// query-key-feature triples) is too small to share. Threads take items as they become free; what an
// item computes must not depend on the thread. The first exception of an item is rethrown here.
using ItemFunction = void (*)(const void* context, int64_t item);
void run_items(int64_t items, double cost, ItemFunction function, const void* context);

template <class Function>
void for_each_item(int64_t items, double cost, const Function& function) {
  run_items(
      items, cost,
      [](const void* context, int64_t item) { (*static_cast<const Function*>(context))(item); },
      &function);
}

void* allocate_aligned(size_t bytes);
void free_aligned(void* memory);

// Aligned memory that lives as long as the object. Contents start undefined.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) { fit(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free_aligned(data_); }
  T* get() const { return data_; }

  // Makes room for `count`; what was held before is lost where it was too small.
  void fit(int64_t count) {
    if (count > count_) {
      free_aligned(data_);
      data_ = nullptr;  // nothing is held if there is no memory
      count_ = 0;
      data_ = static_cast<T*>(allocate_aligned(static_cast<size_t>(count) * sizeof(T)));
      count_ = count;
    }
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Scratch of one item, from memory its thread keeps for the next item. At most one lives at a time
// on a thread; what take() returns is aligned to a cache line and lasts as long as the object.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);
};

}  // namespace attn_ext
