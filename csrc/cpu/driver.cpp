// Runs the items of a plan phase by phase, on threads that keep their scratch memory.
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <new>
#include <thread>

#include "call.h"

namespace attn_ext {
namespace {

constexpr std::align_val_t kAlignment{64};  // one cache line, one AVX-512 vector
constexpr size_t kFirstBlockBytes = size_t{1} << 20;
constexpr size_t kLargestKeptBytes = size_t{1} << 25;  // a thread keeps at most 32 MiB
constexpr int64_t kPrepareRows = 64;                   // rows of an item of run_prepare
constexpr double kExpCost = 4;  // of an exponential read from and written to memory, in triples

struct Block {
  char* memory;
  size_t bytes;
};

// A thread's bump allocator over blocks that never move while a Scratch lives.
struct Arena {
  std::vector<Block> blocks;
  size_t block = 0;  // that memory is taken from
  size_t used = 0;   // of it

  ~Arena() { keep_last(0); }

  void keep_last(size_t count) {
    for (; blocks.size() > count; blocks.erase(blocks.begin())) {
      ::operator delete(blocks.front().memory, kAlignment);
    }
  }

  void* take(size_t bytes) {
    constexpr size_t alignment = static_cast<size_t>(kAlignment);
    bytes = (bytes + alignment - 1) / alignment * alignment;
    for (; block < blocks.size() && blocks[block].bytes - used < bytes; ++block) {
      used = 0;
    }
    if (block == blocks.size()) {
      const size_t last = blocks.empty() ? kFirstBlockBytes / 2 : blocks.back().bytes;
      const size_t size = std::max(2 * last, bytes);
      blocks.reserve(blocks.size() + 1);
      blocks.push_back({static_cast<char*>(::operator new(size, kAlignment)), size});
    }
    used += bytes;
    return blocks[block].memory + used - bytes;
  }

  // Frees what was taken since. Several blocks mean that the last one alone will do next time.
  void release(size_t to_block, size_t to_used) {
    block = to_block;
    used = to_used;
    if (block == 0 && used == 0) {
      keep_last(!blocks.empty() && blocks.back().bytes <= kLargestKeptBytes);
    }
  }
};

thread_local Arena arena;

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

// Calls function(item) for each item, on torch's threads unless `cost` (in query-key-feature
// triples) is too small to share. Threads take items as they become free; what an item computes
// must not depend on the thread. The first exception of an item is rethrown here.
void for_each_item(int64_t items, double cost, const std::function<void(int64_t)>& function) {
  const int64_t threads = cost < kSmallestSharedCost || items < 2
                              ? 1
                              : std::min<int64_t>(items, torch::stable::get_num_threads());
  if (threads < 2) {
    for (int64_t item = 0; item < items; ++item) {
      function(item);
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
        function(item);
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

// Runs function(call, item) for each item.
template <class Call, class Item>
void run_phase(const Call& call, const std::vector<Item>& items, double cost,
               void (*function)(const Call&, const Item&)) {
  for_each_item(static_cast<int64_t>(items.size()), cost,
                [&](int64_t n) { function(call, items[n]); });
}

// The score weights of all heads. Of pooling there are none: its rows are the queries.
template <class T>
const ScoreWeights<T>* read_score_weights(const Problem& problem, Scratch& scratch) {
  auto* heads = scratch.take<ScoreWeights<T>>(problem.heads);
  for (int64_t head = 0; !problem.keys_alone && head < problem.heads; ++head) {
    T* row = scratch.take<T>(padded_columns(problem.dim));
    heads[head] = kernels<T>().read_weights(problem.score_weight, head, problem.dim, row);
  }
  return heads;
}

template <class T>
void forward(const ForwardArguments& arguments) {
  const Problem& problem = *arguments.problem;
  const Kernels<T>& kernel = kernels<T>();
  const ForwardPlan plan = plan_forward(problem);
  Scratch scratch;
  const ForwardCall<T> call{arguments, read_score_weights<T>(problem, scratch),
                            scratch.take<T>(plan.partial_rows * padded_columns(problem.value_dim)),
                            scratch.take<T>(plan.partial_rows * 2)};
  run_phase(call, plan.items, plan.cost, kernel.forward_item);
  if (!problem.raw_scores) {
    run_phase(call, plan.merges, plan.cost, kernel.forward_merge);
  }
}

template <class T>
void run_wave(const BackwardCall<T>& call) {
  const Kernels<T>& kernel = kernels<T>();
  const Wave& wave = *call.wave;
  // A number read costs about what a triple of scores does.
  run_phase(call, wave.score_items, call.from_steps ? 2.0 * wave.scores : wave.score_cost,
            kernel.score_item);
  if (!call.from_steps && !call.problem->raw_scores) {
    run_phase(call, wave.split_items, wave.score_cost, kernel.finish_scores);
  }
  const int64_t values = call.needs_weights ? static_cast<int64_t>(wave.value_items.size()) : 0;
  const bool has_gradients = call.dquery.data != nullptr || call.dkey.data != nullptr ||
                             call.dgate.data != nullptr || call.dscore_weight.data != nullptr;
  const int64_t gradients = has_gradients ? static_cast<int64_t>(wave.gradient_items.size()) : 0;
  for_each_item(gradients + values, wave.gradient_cost, [&](int64_t n) {
    if (n < gradients) {
      kernel.gradient_item(call, wave.gradient_items[n]);
    } else {
      kernel.value_item(call, wave.value_items[n - gradients]);
    }
  });
  if (call.dquery.data != nullptr) {
    run_phase(call, wave.query_merges, wave.gradient_cost, kernel.query_merge);
  }
}

template <class T>
void backward(const BackwardArguments& arguments) {
  const Problem& problem = *arguments.problem;
  const int64_t row = problem.weight_rows * problem.dim;  // of dscore_weight, a head
  const bool wants_weight = arguments.dscore_weight.data != nullptr;
  Scratch scratch;
  std::vector<double> dscore_weight(wants_weight ? problem.heads * row : 0);
  BackwardCall<T> call{arguments};
  call.score_weights = read_score_weights<T>(problem, scratch);
  const std::vector<Unit> units = plan_units(problem);
  for (size_t next = 0; next < units.size();) {
    const Wave wave = plan_wave(problem, units, next);
    const int64_t weight_rows = static_cast<int64_t>(wave.weight_heads.size());
    Scratch buffers;
    call.wave = &wave;
    call.alpha = buffers.take<T>(wave.scores);
    call.dscores = buffers.take<T>(wave.scores);
    call.deltas = buffers.take<Delta<T>>(wave.deltas);
    if (call.dquery.data != nullptr) {
      call.partial_dquery = buffers.take<T>(wave.partial_rows * padded_columns(problem.dim));
    }
    if (wants_weight) {
      call.partial_dweight = buffers.take<double>(weight_rows * row);
    }
    run_wave(call);
    for (int64_t n = 0; wants_weight && n < weight_rows; ++n) {
      double* total = dscore_weight.data() + wave.weight_heads[n] * row;
      for (int64_t c = 0; c < row; ++c) {
        total[c] += call.partial_dweight[n * row + c];
      }
    }
  }
  if (wants_weight) {
    kernels<T>().write_weights(dscore_weight.data(), problem.heads * row, call.dscore_weight);
  }
}

template <class T>
void prepare(const Rows& key, const std::vector<int64_t>& sizes, T* exp_key, T* key_bound) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t rows = sizes[1];
  const int64_t heads = sizes[2];
  const int64_t dim = sizes[3];
  const int64_t total = sizes[0] * rows;
  const int64_t items = (total + kPrepareRows - 1) / kPrepareRows;
  for_each_item(items, kExpCost * static_cast<double>(total * heads * dim), [&](int64_t item) {
    const int64_t end = std::min(total, (item + 1) * kPrepareRows);
    for (int64_t n = item * kPrepareRows; n < end; ++n) {
      kernel.prepare_rows(key, n / rows, n % rows, heads, dim, exp_key + n * heads * dim,
                          key_bound + n * heads);
    }
  });
}

}  // namespace

Scratch::Scratch() : block_(arena.block), used_(arena.used) {}

Scratch::~Scratch() { arena.release(block_, used_); }

void* Scratch::take_bytes(size_t bytes) { return arena.take(bytes); }

void run_forward(const ForwardArguments& arguments) {
  arguments.problem->computes_in_double() ? forward<double>(arguments) : forward<float>(arguments);
}

void run_backward(const BackwardArguments& arguments) {
  arguments.problem->computes_in_double() ? backward<double>(arguments)
                                          : backward<float>(arguments);
}

void run_prepare(const Rows& key, const std::vector<int64_t>& sizes, void* exp_key,
                 void* key_bound) {
  if (key.dtype == DType::kFloat64) {
    prepare(key, sizes, static_cast<double*>(exp_key), static_cast<double*>(key_bound));
  } else {
    prepare(key, sizes, static_cast<float*>(exp_key), static_cast<float*>(key_bound));
  }
}

}  // namespace attn_ext
