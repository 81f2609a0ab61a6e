// Products of matrices on tensor cores, as exact as in float32. A number is the sum of bfloat16
// terms: one of a bfloat16, two of a float16, three of a float32 number. Products of terms that are
// less than a rounding of the whole are left out. Beside several terms, infinity and float32 that
// rounds to it as bfloat16 make NaN of what they enter.
#pragma once

#include "memory.cuh"

namespace attn_ext::cuda {

inline int terms_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 1 : dtype == DType::kFloat16 ? 2 : 3;
}

// Terms of numbers that the kernel computes, beside rows of so many terms.
template <int kTerms>
constexpr int kComputedTerms = kTerms < 2 ? 2 : kTerms;

// Terms of two neighbours, in words [.][n].
template <int kTerms, int kWords>
__device__ __forceinline__ void split(float low, float high, unsigned (&words)[kTerms][kWords],
                                      int n) {
#pragma unroll
  for (int p = 0; p < kTerms; ++p) {
    words[p][n] = bfloat16_pair(low, high);
    low -= __uint_as_float(words[p][n] << 16);
    high -= __uint_as_float(words[p][n] & 0xffff0000u);
  }
}

// Terms of columns [col, col + kGranule) of the row at `offset`, two to a word; 0 unless it exists.
template <int kTerms>
__device__ __forceinline__ void load_terms(const Rows& rows, int64_t offset, int64_t col,
                                           int64_t dim, bool exists,
                                           unsigned (&words)[kTerms][kGranule / 2]) {
  float values[kGranule] = {};
  if constexpr (kTerms == 1) {  // as they are
    if (exists && is_whole(rows, col, dim)) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(
          static_cast<const unsigned short*>(rows.data) + offset + col));
      words[0][0] = raw.x;
      words[0][1] = raw.y;
      words[0][2] = raw.z;
      words[0][3] = raw.w;
      return;
    }
  }
  if (exists) {
    load_granule(rows, offset, col, dim, values);
  }
#pragma unroll
  for (int n = 0; n < kGranule / 2; ++n) {
    split(values[2 * n], values[2 * n + 1], words, n);
  }
}

// sums += a b of a warp, [16, 8] = [16, 16] [16, 8]. A word has two neighbours, of a in a row, of b
// in a column. Lane 4 r + c has of a those from column 2 c of rows r and r + 8, then from column
// 2 c + 8 of both; of b those from rows 2 c and 2 c + 8 of column r; of the sums columns 2 c and
// 2 c + 1 of row r, then of row r + 8.
__device__ __forceinline__ void multiply(const unsigned (&a)[4], const unsigned (&b)[2],
                                         float (&sums)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)  // such products came with sm_80
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int c = 0; c < 4; ++c) {
      unsigned left[2];
      unsigned right[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        left[n] = __shfl_sync(kAllLanes, a[half * 2 + n], lane / 4 * 4 + c);
        right[n] = __shfl_sync(kAllLanes, b[half], (lane % 4 * 2 + n) * 4 + c);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const unsigned x = left[n / 2];
        const unsigned y = right[n % 2];
        sums[n] = fmaf(__uint_as_float(x << 16), __uint_as_float(y << 16), sums[n]);
        sums[n] = fmaf(__uint_as_float(x & 0xffff0000u), __uint_as_float(y & 0xffff0000u), sums[n]);
      }
    }
  }
#elif defined(EMULATED_CUDA)
  emulated_multiply(a, b, sums);
#endif
}

// The same of one half of the columns and rows: [16, 8] = [16, 8] [8, 8].
__device__ __forceinline__ void multiply(const unsigned (&a)[2], unsigned b, float (&sums)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
#else
  multiply({a[0], a[1], 0, 0}, {b, 0}, sums);
#endif
}

// The same of numbers in terms, the least first.
template <int kLeft, int kRight>
__device__ __forceinline__ void multiply_terms(const unsigned (&a)[kLeft][4],
                                               const unsigned (&b)[kRight][2], float (&sums)[4]) {
  constexpr int kMost = kLeft > kRight ? kLeft : kRight;
  float own[4] = {};
#pragma unroll
  for (int order = kMost - 1; order >= 0; --order) {
#pragma unroll
    for (int p = 0; p <= order; ++p) {
      if (p < kLeft && order - p < kRight) {
        // Tensor cores cut off what does not fit rather than round it, so that long sums come out
        // too small. Beside bfloat16 rows that is little; others add each product on their own.
        multiply(a[p], b[order - p], kRight == 1 ? sums : own);
      }
    }
  }
  if constexpr (kRight > 1) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      sums[n] += own[n];
    }
  }
}

// h^2 - 1/4 of two h in bfloat16.
__device__ __forceinline__ unsigned packed_slopes(unsigned h) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned slopes;
  asm("fma.rn.bf16x2 %0, %1, %1, %2;" : "=r"(slopes) : "r"(h), "r"(0xbe80be80u));
  return slopes;
#else
  const float low = __uint_as_float(h << 16);
  const float high = __uint_as_float(h & 0xffff0000u);
  return bfloat16_pair(fmaf(low, low, -0.25f), fmaf(high, high, -0.25f));
#endif
}

}  // namespace attn_ext::cuda
