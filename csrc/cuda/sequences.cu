// What is found out about sequences before other kernels: the keys that a mask leaves, so that none
// of them meets one, and the order of their work; and the device itself.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 256;

// Positions of the keys that the mask leaves, a sequence a block, a slice of its row a thread.
__global__ void __launch_bounds__(kThreads) compact_mask_kernel(const Sequences sequences) {
  __shared__ int counts[kThreads];
  const bool* row = sequences.mask.data + int64_t{blockIdx.x} * sequences.mask.batch;
  int32_t* index = sequences.key_index + int64_t{blockIdx.x} * sequences.key.rows;
  const int64_t slice = (sequences.key.rows + kThreads - 1) / kThreads;
  const int64_t begin = smaller(threadIdx.x * slice, sequences.key.rows);
  const int64_t end = smaller(begin + slice, sequences.key.rows);
  int count = 0;
  for (int64_t j = begin; j < end; ++j) {
    count += row[j * sequences.mask.row] ? 0 : 1;
  }
  counts[threadIdx.x] = count;
  __syncthreads();
  int next = 0;
  for (unsigned thread = 0; thread < threadIdx.x; ++thread) {
    next += counts[thread];
  }
  if (threadIdx.x == kThreads - 1) {
    sequences.key_count[blockIdx.x] = next + count;
  }
  for (int64_t j = begin; j < end; ++j) {
    if (!row[j * sequences.mask.row]) {
      index[next++] = static_cast<int32_t>(j);
    }
  }
}

__device__ inline int64_t pairs_of(const Sequences& sequences, int64_t n) {
  const Span span = span_of(sequences, n);
  return int64_t{span.query_count} * span.key_count;
}

// The place of a sequence in the order, which is how many others have more pairs, a sequence a
// block.
__global__ void __launch_bounds__(kThreads) order_kernel(const Sequences sequences) {
  __shared__ float room[kRoom<kThreads>];
  const int64_t own = blockIdx.x;
  const int64_t pairs = pairs_of(sequences, own);
  float before = 0;
  for (int64_t n = threadIdx.x; n < sequences.count; n += kThreads) {
    const int64_t others = pairs_of(sequences, n);
    before += others > pairs || (others == pairs && n < own) ? 1 : 0;
  }
  before = reduce<Sum, kThreads>(before, room);
  if (threadIdx.x == 0) {
    sequences.order[static_cast<int>(before)] = static_cast<int32_t>(own);
  }
}

}  // namespace

void launch_order(const Sequences& sequences, cudaStream_t stream) {
  launch("order", order_kernel, sequences.count, 1, 1, kThreads, sequences, stream);
}

void launch_compact_mask(const Sequences& sequences, cudaStream_t stream) {
  launch("mask", compact_mask_kernel, sequences.count, 1, 1, kThreads, sequences, stream);
}

int64_t processors() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

}  // namespace attn_ext::cuda
