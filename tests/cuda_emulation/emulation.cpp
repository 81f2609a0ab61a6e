// Runs blocks of threads as fibers, and stands in for what a CUDA build of PyTorch has.
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

uint3 thread;
uint3 block;
uint3 grid;
cudaError_t last_error = cudaSuccess;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarp = 32;

// Threads wait until all that have not ended are there.
struct Barrier {
  unsigned live = 0;
  unsigned arrived = 0;
  unsigned generation = 0;

  void open_if_full() {
    if (live == arrived && arrived > 0) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Warp {
  Barrier barrier;
  // Two, in turn: when all lanes have come to an exchange, they have read what the last but one
  // left.
  uint32_t lanes[2][kWarp] = {};
};

struct Fiber {
  uint3 place;
  jmp_buf state;
  bool started = false;
  bool ended = false;
  std::vector<char> stack;
};

struct Block {
  const Body* body = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  unsigned long progress = 0;  // barriers opened and threads ended
};

// A variable that the blocks of a kernel share.
struct SharedVariable {
  void* kernel;
  void* data;
  size_t bytes;
};

Block now;
std::vector<SharedVariable> shared_variables;

void wait_at(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  barrier.open_if_full();
  now.progress += barrier.generation != generation;
  Fiber* fiber = now.current;
  while (barrier.generation == generation) {
    if (_setjmp(fiber->state) == 0) {
      _longjmp(now.scheduler, 1);
    }
  }
}

Warp& warp_of(const Fiber& fiber) { return now.warps[fiber.place.x / kWarp]; }

void leave(Barrier& barrier) {
  --barrier.live;
  barrier.open_if_full();
}

// A fiber runs one thread after the other.
void enter() {
  for (;;) {
    now.body->call(now.body->kernel, now.body->parameters);
    Fiber* fiber = now.current;
    fiber->ended = true;
    ++now.progress;
    leave(now.barrier);
    leave(warp_of(*fiber).barrier);
    if (_setjmp(fiber->state) == 0) {
      _longjmp(now.scheduler, 1);
    }
  }
}

void start(Fiber& fiber) {
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

void resume(Fiber& fiber) {
  now.current = &fiber;
  thread = fiber.place;
  if (_setjmp(now.scheduler) == 0) {
    if (fiber.started) {
      _longjmp(fiber.state, 1);
    }
    start(fiber);
  }
}

void run_block(unsigned threads) {
  const char* order = std::getenv("ATTN_EXT_EMULATED_ORDER");
  const bool reversed = order != nullptr && order[0] == 'r';
  for (const SharedVariable& variable : shared_variables) {
    if (variable.kernel == now.body->kernel) {
      std::memset(variable.data, 0xff, variable.bytes);
    }
  }
  now.barrier = Barrier{threads, 0, 0};
  now.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  while (now.fibers.size() < threads) {
    now.fibers.push_back(new Fiber);
    now.fibers.back()->stack.resize(kStackBytes);
  }
  for (unsigned n = 0; n < threads; ++n) {
    Fiber& fiber = *now.fibers[n];
    fiber.place = {n, 0, 0};
    fiber.ended = false;
    ++now.warps[n / kWarp].barrier.live;
  }
  unsigned ended = 0;
  while (ended < threads) {
    const unsigned long before = now.progress;
    ended = 0;
    for (unsigned n = 0; n < threads; ++n) {
      Fiber& fiber = *now.fibers[reversed ? threads - 1 - n : n];
      if (!fiber.ended) {
        resume(fiber);
      }
      ended += fiber.ended;
    }
    if (now.progress == before && ended < threads) {
      std::fprintf(stderr, "emulated block: threads wait at different barriers\n");
      std::abort();
    }
  }
}

}  // namespace

void run(const Body& body, dim3 size, dim3 threads) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  now.body = &body;
  grid = {size.x, size.y, size.z};
  for (unsigned z = 0; z < size.z; ++z) {
    for (unsigned y = 0; y < size.y; ++y) {
      for (unsigned x = 0; x < size.x; ++x) {
        block = {x, y, z};
        run_block(threads.x);
      }
    }
  }
}

void barrier() { wait_at(now.barrier); }

unsigned lane() { return thread.x % kWarp; }

void exchange(uint32_t bits, uint32_t (&lanes)[kWarp]) {
  Warp& warp = warp_of(*now.current);
  uint32_t* const shared = warp.lanes[warp.barrier.generation % 2];
  shared[lane()] = bits;
  wait_at(warp.barrier);
  std::memcpy(lanes, shared, sizeof(lanes));
}

bool fails() { return std::getenv("ATTN_EXT_EMULATED_FAILURE") != nullptr; }

}  // namespace emulation

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* processors = std::getenv("ATTN_EXT_EMULATED_PROCESSORS");
  *value = processors != nullptr ? std::atoi(processors) : 1;
  return cudaSuccess;
}

extern "C" {
// Tells of a variable in shared memory, which C++ has no way to find.
__attribute__((visibility("default"))) void emulated_shared(void* kernel, void* data,
                                                            size_t bytes) {
  emulation::shared_variables.push_back({kernel, data, bytes});
}

__attribute__((visibility("default"))) int emulated_last_error() { return emulation::last_error; }

struct CUDAGuardOpaque;
int32_t aoti_torch_create_cuda_guard(int32_t, CUDAGuardOpaque** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_cuda_guard(CUDAGuardOpaque*) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
