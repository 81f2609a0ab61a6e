#include "runtime.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <new>
#include <thread>
#include <vector>

namespace attn_ext {
namespace {

constexpr size_t kAlignment = 64;  // one cache line, one AVX-512 vector
constexpr size_t kFirstBlockBytes = size_t{1} << 20;
constexpr size_t kLargestKeptBytes = size_t{1} << 25;  // a thread keeps at most 32 MiB

struct Block {
  void* memory;
  size_t bytes;
};

// A bump allocator over blocks that never move while a Scratch lives.
struct Arena {
  std::vector<Block> blocks;
  size_t used = 0;  // of the last block

  ~Arena() { clear(); }

  void clear() {
    for (const Block& block : blocks) {
      free_aligned(block.memory);
    }
    blocks.clear();
    used = 0;
  }

  void* take(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (blocks.empty() || blocks.back().bytes - used < bytes) {
      const size_t last = blocks.empty() ? kFirstBlockBytes / 2 : blocks.back().bytes;
      const size_t size = std::max(2 * last, bytes);
      blocks.reserve(blocks.size() + 1);
      blocks.push_back({allocate_aligned(size), size});
      used = 0;
    }
    void* result = static_cast<char*>(blocks.back().memory) + used;
    used += bytes;
    return result;
  }

  // Several blocks mean that the last item outgrew the first: keep only the largest, the last.
  void release() {
    while (blocks.size() > 1) {
      free_aligned(blocks.front().memory);
      blocks.erase(blocks.begin());
    }
    used = 0;
    if (!blocks.empty() && blocks.back().bytes > kLargestKeptBytes) {
      clear();
    }
  }
};

Arena& thread_arena() {
  thread_local Arena arena;
  return arena;
}

// Whether torch's threads are no use here, and from which cost on threads share the work.
#if defined(__SANITIZE_THREAD__)  // it does not see how OpenMP's threads wait for each other
std::atomic<bool> own_threads{true};
constexpr double kSmallestSharedCost = 0;
#else
std::atomic<bool> own_threads{false};
constexpr double kSmallestSharedCost = 1e5;  // about 15 microseconds; waking threads takes about 5
#endif

// A forked process has none of its parent's threads, yet OpenMP would wait for them for ever.
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { own_threads = true; });

// Calls work() at once on up to `threads` threads, this one among them.
template <class Work>
void run_on_own_threads(int64_t threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    while (static_cast<int64_t>(others.size()) < threads - 1) {
      others.emplace_back(std::cref(work));
    }
  } catch (const std::exception&) {  // no more are to be had: those there are do it all
  }
  work();
  for (std::thread& other : others) {
    other.join();
  }
}

}  // namespace

void* allocate_aligned(size_t bytes) {
  return ::operator new(std::max(bytes, kAlignment), std::align_val_t{kAlignment});
}

void free_aligned(void* memory) { ::operator delete(memory, std::align_val_t{kAlignment}); }

Scratch::~Scratch() { thread_arena().release(); }

void* Scratch::take_bytes(size_t bytes) { return thread_arena().take(bytes); }

void run_items(int64_t items, double cost, ItemFunction function, const void* context) {
  const int64_t threads = cost < kSmallestSharedCost || items < 2
                              ? 1
                              : std::min<int64_t>(items, torch::stable::get_num_threads());
  if (threads < 2) {
    for (int64_t item = 0; item < items; ++item) {
      function(context, item);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  // Relaxed: items need nothing of each other, and the threads' end makes all they wrote visible.
  const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
  const auto work = [&] {
    try {
      for (int64_t item = take(); item < items && !failed.load(std::memory_order_relaxed);
           item = take()) {
        function(context, item);
      }
    } catch (...) {
      if (!failed.exchange(true, std::memory_order_relaxed)) {
        error = std::current_exception();
      }
    }
  };
  if (own_threads) {
    run_on_own_threads(threads, work);
  } else {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

}  // namespace attn_ext
