// The keys that a mask leaves, so that no other kernel meets one; and the device itself.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct MaskCall {
  Mask mask;
  int64_t rows;
  int32_t* key_index;
  int32_t* key_count;
};

// Positions of the keys that the mask leaves, a sequence a block, a slice of its row a thread.
__global__ void __launch_bounds__(kThreads) compact_mask_kernel(const MaskCall call) {
  __shared__ int counts[kThreads];
  const bool* row = call.mask.data + int64_t{blockIdx.x} * call.mask.batch;
  int32_t* index = call.key_index + int64_t{blockIdx.x} * call.rows;
  const int64_t slice = (call.rows + kThreads - 1) / kThreads;
  const int64_t begin = smaller(threadIdx.x * slice, call.rows);
  const int64_t end = smaller(begin + slice, call.rows);
  int count = 0;
  for (int64_t j = begin; j < end; ++j) {
    count += row[j * call.mask.row] ? 0 : 1;
  }
  counts[threadIdx.x] = count;
  __syncthreads();
  int next = 0;
  for (unsigned thread = 0; thread < threadIdx.x; ++thread) {
    next += counts[thread];
  }
  if (threadIdx.x == kThreads - 1) {
    call.key_count[blockIdx.x] = next + count;
  }
  for (int64_t j = begin; j < end; ++j) {
    if (!row[j * call.mask.row]) {
      index[next++] = static_cast<int32_t>(j);
    }
  }
}

}  // namespace

void launch_compact_mask(const Mask& mask, const Sequences& sequences, cudaStream_t stream) {
  launch("mask", compact_mask_kernel, sequences.count, 1, 1, kThreads,
         MaskCall{mask, sequences.key.rows, sequences.key_index, sequences.key_count}, stream);
}

int64_t processors() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

}  // namespace cuda
}  // namespace attn_ext
