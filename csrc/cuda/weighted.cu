// Weighted sums of rows: context_i = sum_j alpha_ij value_j, and dvalue_j = sum_i alpha_ij
// dcontext_i. A block makes 32 rows of 64 columns; a thread holds 4 x 4 of them.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRowShift = 5;
constexpr int kRows = 1 << kRowShift;  // of the output
constexpr int kCols = 64;
constexpr int kInner = 32;  // rows that are summed at a time
constexpr int kSide = 4;
constexpr int kGranules = kInner * kCols / kGranule / kThreads;
static_assert(kThreads == kRows / kSide * kCols / kSide);
static_assert(kInner * kCols == kGranules * kGranule * kThreads);

struct Shared {
  float alpha[kInner][kRows + 4];  // padded so that transposed stores meet fewer bank conflicts
  float rows[kInner][kCols];
};

// A block's part: rows [first, first + count) of the output, sums over `inner` rows.
struct Part {
  const WeightedCall& call;
  const Span& span;
  int64_t head;
  int first;
  int count;
  int inner;
};

template <bool kByKey>
__device__ __forceinline__ void fill(const Part& part, int begin, int64_t col, Shared& shared) {
  const WeightedCall& call = part.call;
#pragma unroll 2
  for (int n = threadIdx.x; n < kInner * kRows; n += kThreads) {
    // Neighbours read neighbouring keys.
    const int minor = n % kInner;
    const int major = n / kInner;
    const int inner = kByKey ? major : minor;
    const int row = kByKey ? minor : major;
    float alpha = 0;
    if (begin + inner < part.inner && row < part.count) {
      const int i = kByKey ? begin + inner : part.first + row;
      const int j = kByKey ? part.first + row : begin + inner;
      alpha = call.alpha.data[score_offset(call.alpha, part.span, part.head, i, j)];
    }
    shared.alpha[inner][row] = alpha;
  }
#pragma unroll
  for (int n = 0; n < kGranules; ++n) {
    const int index = n * kThreads + threadIdx.x;
    const int inner = index / (kCols / kGranule);
    const int c = index % (kCols / kGranule) * kGranule;
    float values[kGranule] = {};
    if (begin + inner < part.inner) {
      const int64_t offset = kByKey ? query_offset(call.rows, part.span, part.head, begin + inner)
                                    : key_offset(call.rows, part.span, part.head, begin + inner);
      load_granule(call.rows, offset, col + c, call.problem.value_dim, values);
    }
#pragma unroll
    for (int f = 0; f < kGranule; ++f) {
      shared.rows[inner][c + f] = values[f];
    }
  }
}

template <bool kByKey>
__device__ inline void write(const Part& part, int64_t col, const float (&totals)[kSide][kSide]) {
  const WeightedCall& call = part.call;
  const int row = threadIdx.x / (kCols / kSide) * kSide;
  const int64_t first_col = col + threadIdx.x % (kCols / kSide) * kSide;
#pragma unroll
  for (int n = 0; n < kSide * kSide; ++n) {
    const int r = row + n / kSide;
    const int64_t c = first_col + n % kSide;
    if (r >= part.count || c >= call.problem.value_dim) {
      continue;
    }
    float total = totals[n / kSide][n % kSide];
    if constexpr (!kByKey) {
      store(call.out, query_offset(call.out, part.span, part.head, part.first + r) + c, total);
    } else {
      const int64_t sum = key_offset(call.sums, part.span, part.head, part.first + r) + c;
      if (part.span.first_query > 0) {
        total += load(call.sums, sum);
      }
      if (part.span.has_last_query) {
        store(call.out, key_offset(call.out, part.span, part.head, part.first + r) + c, total);
      } else {
        store(call.sums, sum, total);
      }
    }
  }
}

template <bool kByKey>
__global__ void __launch_bounds__(kThreads, 3) weighted_kernel(const WeightedCall call) {
  __shared__ __align__(16) Shared shared;
  const Sequences& sequences = call.problem.sequences;
  const Tile found = kByKey ? find_key_tile(sequences, kRowShift, blockIdx.x)
                            : find_query_tile(sequences, kRowShift, blockIdx.x);
  const Span span = span_of(sequences, found.sequence);
  const int rows = kByKey ? span.key_count : span.query_count;
  if (found.first >= rows || span.query_count == 0) {
    return;
  }
  const int first = static_cast<int>(found.first);
  const int row = threadIdx.x / (kCols / kSide) * kSide;
  const int c = threadIdx.x % (kCols / kSide) * kSide;
  for (int64_t head = blockIdx.z; head < call.problem.heads; head += gridDim.z) {
    const Part part{call,
                    span,
                    head,
                    first,
                    smaller(kRows, rows - first),
                    kByKey ? span.query_count : span.key_count};
    for (int64_t col = int64_t{blockIdx.y} * kCols; col < call.problem.value_dim;
         col += int64_t{gridDim.y} * kCols) {
      float totals[kSide][kSide] = {};
      for (int begin = 0; begin < part.inner; begin += kInner) {
        fill<kByKey>(part, begin, col, shared);
        __syncthreads();
        float sums[kSide][kSide] = {};
#pragma unroll 4
        for (int k = 0; k < kInner; ++k) {
          const float4 a = *reinterpret_cast<const float4*>(&shared.alpha[k][row]);
          const float4 b = *reinterpret_cast<const float4*>(&shared.rows[k][c]);
          const float left[kSide] = {a.x, a.y, a.z, a.w};
          const float right[kSide] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int n = 0; n < kSide * kSide; ++n) {
            float& sum = sums[n / kSide][n % kSide];
            sum = fmaf(left[n / kSide], right[n % kSide], sum);
          }
        }
        // Rounding errors grow with the number of terms of each of the two sums only.
#pragma unroll
        for (int n = 0; n < kSide * kSide; ++n) {
          totals[n / kSide][n % kSide] += sums[n / kSide][n % kSide];
        }
        __syncthreads();
      }
      write<kByKey>(part, col, totals);
    }
  }
}

}  // namespace

void launch_weighted(const WeightedCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.problem.sequences;
  const int64_t rows = call.by_key ? key_rows(sequences) : sequences.last_row - sequences.first_row;
  launch("weighted sums", call.by_key ? weighted_kernel<true> : weighted_kernel<false>,
         tile_bound(rows, sequences.count, kRowShift), (call.problem.value_dim + kCols - 1) / kCols,
         call.problem.heads, kThreads, call, stream);
}

}  // namespace cuda
}  // namespace attn_ext
