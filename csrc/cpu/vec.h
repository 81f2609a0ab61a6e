// Vectors of kLanes<T> numbers, T float or double, in the width of the instruction set this is
// compiled for. Included only through kernels_impl.h, inside its target region.
#pragma once

#include <cstdint>
#include <utility>

#define ATTN_EXT_INLINE inline __attribute__((always_inline))
#define ATTN_EXT_INLINE_LAMBDA __attribute__((always_inline))

namespace attn_ext {
namespace ATTN_EXT_ISA {

constexpr int kVectorBytes = ATTN_EXT_VECTOR_BYTES;

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  using Integer = int32_t;
  static constexpr int kMantissaBits = 23;
};

template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  using Integer = int64_t;
  static constexpr int kMantissaBits = 52;
};

template <class T>
using Vec = typename VectorOf<T>::Type;

template <class T>
using VecBits = typename VectorOf<T>::Bits;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Features are processed in steps of two vectors, which share one reciprocal.
template <class T>
constexpr int kStep = 2 * kLanes<T>;

ATTN_EXT_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

ATTN_EXT_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
ATTN_EXT_INLINE Vec<T> load(const T* source) {
  Vec<T> result;
  __builtin_memcpy(&result, source, sizeof(result));
  return result;
}

template <class T>
ATTN_EXT_INLINE void store(T* target, Vec<T> value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

// The first `count` numbers, then zeros.
template <class T>
ATTN_EXT_INLINE Vec<T> load_partial(const T* source, int64_t count) {
  T lanes[kLanes<T>] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    lanes[lane] = source[lane];
  }
  return load<T>(lanes);
}

// x - 0 is x for every x, so this is a broadcast.
template <class T>
ATTN_EXT_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// x, computed once: the compiler would else multiply a product anew in every sum that takes it, as
// a fused multiply-add, while the adders that most machines have beside those idle.
template <class T>
ATTN_EXT_INLINE Vec<T> rounded(Vec<T> x) {
#if ATTN_EXT_VECTOR_BYTES > 16 && defined(__x86_64__)
  asm("" : "+v"(x));
#endif
  return x;
}

template <class T>
ATTN_EXT_INLINE VecBits<T> bits_of(Vec<T> value) {
  VecBits<T> result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

template <class T>
ATTN_EXT_INLINE Vec<T> from_bits(VecBits<T> value) {
  Vec<T> result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

template <class T>
constexpr typename VectorOf<T>::Integer kSignBit =
    static_cast<typename VectorOf<T>::Integer>(uint64_t{1} << (8 * sizeof(T) - 1));

template <class T>
ATTN_EXT_INLINE Vec<T> magnitude(Vec<T> value) {
  return from_bits<T>(bits_of<T>(value) & ~kSignBit<T>);
}

// A permutation of the lanes of two vectors: lane I of the result is lane Index[I] of (a, b).
template <class T, int... Index>
ATTN_EXT_INLINE Vec<T> permute(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index...);
#else
  return __builtin_shuffle(a, b, VecBits<T>{Index...});
#endif
}

// Halves two vectors of partial sums into one: lanes without the bit `Stride` sum a, lanes with it
// sum b.
template <class T, int Stride, int... Lane>
ATTN_EXT_INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b, std::integer_sequence<int, Lane...>) {
  return permute<T, ((Lane & Stride) ? kLanes<T> + Lane : Lane)...>(a, b) +
         permute<T, ((Lane & Stride) ? kLanes<T> + (Lane ^ Stride) : (Lane ^ Stride))...>(a, b);
}

// Sums the lanes of each of `Count` vectors (a power of two): vector n's sum ends in every lane
// whose low bits are n; where Count exceeds the lanes, in lane n % kLanes of vector n / kLanes.
template <class T, int Count, int Stride = 1>
ATTN_EXT_INLINE void sum_lanes(Vec<T>* vectors) {
  if constexpr (Stride < kLanes<T>) {
    using Lanes = std::make_integer_sequence<int, kLanes<T>>;
    if constexpr (Count > 1) {
#pragma GCC unroll 16
      for (int n = 0; n < Count / 2; ++n) {
        vectors[n] = add_neighbours<T, Stride>(vectors[2 * n], vectors[2 * n + 1], Lanes{});
      }
    } else {
      vectors[0] = add_neighbours<T, Stride>(vectors[0], vectors[0], Lanes{});
    }
    sum_lanes<T, (Count > 1 ? Count / 2 : 1), 2 * Stride>(vectors);
  }
}

template <class T>
ATTN_EXT_INLINE T sum_of_lanes(Vec<T> vector) {
  sum_lanes<T, 1>(&vector);
  return vector[0];
}

// The lanes of a vector exchanged with those whose number differs in the bit `Stride`.
template <class T, int Stride, int... Lane>
ATTN_EXT_INLINE Vec<T> exchange(Vec<T> vector, std::integer_sequence<int, Lane...>) {
  return permute<T, (Lane ^ Stride)...>(vector, vector);
}

// Folds all lanes into lane 0 by Operation::apply.
template <class T, class Operation, int Stride = kLanes<T> / 2>
ATTN_EXT_INLINE T fold_lanes(Vec<T> vector) {
  if constexpr (Stride == 0) {
    return vector[0];
  } else {
    const Vec<T> other = exchange<T, Stride>(vector, std::make_integer_sequence<int, kLanes<T>>{});
    return fold_lanes<T, Operation, Stride / 2>(Operation::apply(vector, other));
  }
}

// The larger number; of a number and a NaN, the number.
template <class T>
struct LargerLane {
  static ATTN_EXT_INLINE Vec<T> apply(Vec<T> a, Vec<T> b) { return b > a || a != a ? b : a; }
};

// The larger of the numbers' bits: among magnitudes, NaN is the largest.
template <class T>
struct LargerBits {
  static ATTN_EXT_INLINE Vec<T> apply(Vec<T> a, Vec<T> b) {
    return bits_of<T>(b) > bits_of<T>(a) ? b : a;
  }
};

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
