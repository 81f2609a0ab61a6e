// Where a block works, loads and stores of rows in any dtype, and reductions over a warp: what only
// device code can do, while geometry.cuh is the host's too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "geometry.cuh"

namespace attn_ext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Features that are loaded at once: 16 bytes of a 16-bit type, twice 16 of float.
constexpr int kGranule = 8;

// Where a block works: its sequence, and the rows of its tile. One thread finds it for all, and as
// it is in shared memory it takes no registers.
struct Place {
  Span span;
  int first;
  int count;
};

__device__ inline void find_place(const Sequences& sequences, bool by_key, int shift,
                                  Place& place) {
  if (threadIdx.x == 0) {
    const Tile tile = find_tile(sequences, by_key, shift, blockIdx.x);
    place.span = span_of(sequences, tile.sequence);
    const int64_t rows = by_key ? place.span.key_count : place.span.query_count;
    const int64_t first = smaller(tile.first, rows);
    place.first = static_cast<int>(first);
    place.count = static_cast<int>(smaller(int64_t{1} << shift, rows - first));
  }
  __syncthreads();
}

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void put(float* target, float value) { *target = value; }
__device__ __forceinline__ void put(__half* target, float value) {
  *target = __float2half_rn(value);
}
__device__ __forceinline__ void put(__nv_bfloat16* target, float value) {
  *target = __float2bfloat16_rn(value);
}

__device__ inline float load(const Rows& rows, int64_t offset) {
  switch (rows.dtype) {
    case DType::kFloat16:
      return as_float(static_cast<const __half*>(rows.data)[offset]);
    case DType::kBFloat16:
      return as_float(static_cast<const __nv_bfloat16*>(rows.data)[offset]);
    default:
      return static_cast<const float*>(rows.data)[offset];
  }
}

__device__ inline void store(const Rows& rows, int64_t offset, float value) {
  switch (rows.dtype) {
    case DType::kFloat16:
      return put(static_cast<__half*>(rows.data) + offset, value);
    case DType::kBFloat16:
      return put(static_cast<__nv_bfloat16*>(rows.data) + offset, value);
    default:
      return put(static_cast<float*>(rows.data) + offset, value);
  }
}

// The raw bytes of a granule.
struct Granule {
  uint4 low;
  uint4 high;  // only of float
};

__device__ __forceinline__ void unpack(DType dtype, const Granule& raw, float (&values)[kGranule]) {
  const unsigned words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                             raw.high.x, raw.high.y, raw.high.z, raw.high.w};
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int n = 0; n < kGranule; ++n) {
      values[n] = __uint_as_float(words[n]);
    }
    return;
  }
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int n = 0; n < kGranule; n += 2) {
      values[n] = __uint_as_float(words[n / 2] << 16);
      values[n + 1] = __uint_as_float(words[n / 2] & 0xffff0000u);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kGranule; ++n) {
    const unsigned bits = words[n / 2] >> (n % 2 * 16);
    values[n] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

__device__ __forceinline__ Granule load_raw(const Rows& rows, int64_t offset) {
  Granule raw{};
  if (rows.dtype == DType::kFloat32) {
    const auto* source =
        reinterpret_cast<const uint4*>(static_cast<const float*>(rows.data) + offset);
    raw.low = __ldg(source);
    raw.high = __ldg(source + 1);
  } else {
    raw.low = __ldg(
        reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(rows.data) + offset));
  }
  return raw;
}

__device__ inline bool is_whole(const Rows& rows, int64_t col, int64_t dim) {
  return rows.vectors && col + kGranule <= dim;
}

// Columns [col, col + kGranule) of the rows at `offsets`, 0 from `dim` on. All loads are under way
// before the first is used.
template <int kRows>
__device__ __forceinline__ void load_granules(const Rows& rows, const int64_t (&offsets)[kRows],
                                              int64_t col, int64_t dim,
                                              float (&values)[kRows][kGranule]) {
  if (is_whole(rows, col, dim)) {
    Granule raw[kRows];
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      raw[n] = load_raw(rows, offsets[n] + col);
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      unpack(rows.dtype, raw[n], values[n]);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
#pragma unroll
    for (int f = 0; f < kGranule; ++f) {
      values[n][f] = col + f < dim ? load(rows, offsets[n] + col + f) : 0.0f;
    }
  }
}

__device__ __forceinline__ void load_granule(const Rows& rows, int64_t offset, int64_t col,
                                             int64_t dim, float (&values)[kGranule]) {
  const int64_t offsets[1] = {offset};
  load_granules(rows, offsets, col, dim, reinterpret_cast<float (&)[1][kGranule]>(values));
}

// Adds columns [col, col + kGranule) of a row that the same kernel writes: not by __ldg, which may
// only read what no thread writes meanwhile.
__device__ __forceinline__ void add_sums(const Rows& sums, int64_t offset, int64_t col, int64_t dim,
                                         float (&values)[kGranule]) {
#pragma unroll
  for (int n = 0; n < kGranule; ++n) {
    values[n] += col + n < dim ? load(sums, offset + col + n) : 0.0f;
  }
}

// Two numbers as bfloat16, or as float16.
__device__ __forceinline__ unsigned bfloat16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
         unsigned{__bfloat16_as_ushort(__float2bfloat16_rn(high))} << 16;
#endif
}

__device__ __forceinline__ unsigned float16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return __half_as_ushort(__float2half_rn(low)) | unsigned{__half_as_ushort(__float2half_rn(high))}
                                                      << 16;
#endif
}

// Stores columns [col, col + kGranule) of the row at `offset`, as far as they are below `dim`.
__device__ __forceinline__ void store_granule(const Rows& rows, int64_t offset, int64_t col,
                                              int64_t dim, const float (&values)[kGranule]) {
  if (!is_whole(rows, col, dim)) {
#pragma unroll
    for (int n = 0; n < kGranule; ++n) {
      if (col + n < dim) {
        store(rows, offset + col + n, values[n]);
      }
    }
    return;
  }
  if (rows.dtype == DType::kFloat32) {
    auto* target = reinterpret_cast<float4*>(static_cast<float*>(rows.data) + offset + col);
    // nvcc splits assignments of vectors here into single numbers (test_cuda_build.py counts).
    __stwb(target, make_float4(values[0], values[1], values[2], values[3]));
    __stwb(target + 1, make_float4(values[4], values[5], values[6], values[7]));
    return;
  }
  unsigned words[kGranule / 2];
#pragma unroll
  for (int n = 0; n < kGranule / 2; ++n) {
    words[n] = rows.dtype == DType::kBFloat16 ? bfloat16_pair(values[2 * n], values[2 * n + 1])
                                              : float16_pair(values[2 * n], values[2 * n + 1]);
  }
  __stwb(reinterpret_cast<uint4*>(static_cast<unsigned short*>(rows.data) + offset + col),
         uint4{words[0], words[1], words[2], words[3]});
}

struct Sum {
  static __device__ float of(float a, float b) { return a + b; }
};

struct Maximum {  // NaN if one is
  static __device__ float of(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a > b || a != a ? a : b;
#endif
  }
};

// Exponentials exp(2x) in place of numbers; `bound` becomes their largest |x| if that is larger.
// Inputs of 16 bits do without `kRefined`, which makes up for the roundings of the exponents.
template <bool kRefined, int kCount>
__device__ __forceinline__ void exponentiate(float (&values)[kCount], float& bound) {
#pragma unroll
  for (int f = 0; f < kCount; ++f) {
    bound = Maximum::of(fabsf(values[f]), bound);
    values[f] = kRefined ? factored_exponential(values[f]) : fast_exp2(values[f] * kTwoLog2E);
  }
}

// Over kLanes neighbouring lanes. All of the warp take part.
template <class Reduction, int kLanes = kWarp>
__device__ __forceinline__ float reduce_warp(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = Reduction::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Over kThreads neighbouring threads: some lanes of a warp, or the whole block, which shares
// `room`.
template <int kThreads>
constexpr int kRoom = kThreads > kWarp ? kThreads / kWarp : 1;

template <class Reduction, int kThreads>
__device__ __forceinline__ float reduce(float value, float (&room)[kRoom<kThreads>]) {
  value = reduce_warp<Reduction, (kThreads < kWarp ? kThreads : kWarp)>(value);
  if constexpr (kThreads > kWarp) {
    __syncthreads();
    if (threadIdx.x % kWarp == 0) {
      room[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    value = room[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / kWarp; ++warp) {
      value = Reduction::of(value, room[warp]);
    }
  }
  return value;
}

}  // namespace attn_ext::cuda
