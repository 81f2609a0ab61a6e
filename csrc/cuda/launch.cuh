// Launching a kernel that takes one struct.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "geometry.cuh"
#include "kernels.h"

namespace attn_ext::cuda {

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

// Into how many blocks the work of one tile is divided, of at most so many pieces: as far as that
// fills the device. Short sequences leave most of their tiles empty, so what counts is how many the
// rows fill.
inline int64_t blocks_of_tile(int64_t full_tiles, int64_t heads, int64_t pieces) {
  const int64_t blocks = std::max<int64_t>(full_tiles, 1) * std::max<int64_t>(heads, 1);
  return std::clamp<int64_t>(2 * processors() / blocks, 1, std::max<int64_t>(pieces, 1));
}

// Launches a kernel whose blocks have 2^shift queries and go through tiles of as many keys.
template <class Call>
void launch_pairs(const char* name, void (*kernel)(Call), int shift, int threads, const Call& call,
                  cudaStream_t stream) {
  const Sequences& sequences = call.sequences;
  const int64_t rows = sequences.last_row - sequences.first_row;
  launch(name, kernel, tile_count(sequences, false, shift),
         blocks_of_tile(rows >> shift, call.heads, ((sequences.key.longest - 1) >> shift) + 1),
         call.heads, threads, call, stream);
}

}  // namespace attn_ext::cuda
