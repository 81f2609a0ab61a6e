// The two functions of PyTorch that csrc/cpu calls, on two threads of our own: with this folder
// first among the include paths, the CPU kernels are built without PyTorch.
#pragma once

#include <cstdint>
#include <thread>

namespace torch::stable {

inline uint32_t get_num_threads() { return 2; }

// csrc/cpu asks for one range a thread, and no range may throw.
template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const Function& function) {
  const int64_t middle = begin + (end - begin) / 2;
  std::thread other([&] { function(middle, end); });
  function(begin, middle);
  other.join();
}

}  // namespace torch::stable
