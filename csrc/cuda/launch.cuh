// Launching a kernel that takes one struct.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace attn_ext {
namespace cuda {

constexpr int64_t kMostGridRows = 65535;   // of a grid's y and z axes; kernels loop over the rest
constexpr int64_t kMostParameters = 4096;  // bytes, on every architecture

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // or whoever asks next takes it for its own
    throw std::runtime_error(std::string("attn_ext: ") + what + ": " + cudaGetErrorString(error));
  }
}

template <class Call>
void launch(const char* name, void (*kernel)(Call), int64_t x, int64_t y, int64_t z, int threads,
            Call call, cudaStream_t stream) {
  static_assert(sizeof(Call) <= kMostParameters);
  if (x <= 0 || y <= 0 || z <= 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(x),
                  static_cast<unsigned>(y < kMostGridRows ? y : kMostGridRows),
                  static_cast<unsigned>(z < kMostGridRows ? z : kMostGridRows));
  void* parameters[] = {&call};
  check(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), parameters, 0, stream),
        name);
}

}  // namespace cuda
}  // namespace attn_ext
