// Vectors of kLanes<T> numbers, T float or double, in the width of the instruction set this is
// compiled for, and their exp, tanh and reciprocals. Included only through kernels_impl.h, inside
// its target region.
#pragma once

#include <cstdint>
#include <utility>

#include "../arithmetic.h"

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
template <class T, class From>
ATTN_EXT_INLINE Vec<T> load_partial(const From* source, int64_t count) {
  T lanes[kLanes<T>] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    lanes[lane] = static_cast<T>(source[lane]);
  }
  return load<T>(lanes);
}

// The same for any count, of which as many as fit are loaded.
template <class T, class From>
ATTN_EXT_INLINE Vec<T> load_some(const From* source, int64_t count) {
  if constexpr (sizeof(From) == sizeof(T)) {
    return count >= kLanes<T> ? load<T>(source) : load_partial<T>(source, count);
  }
  return load_partial<T>(source, smaller(count, kLanes<T>));
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

template <class T>
struct ExpConstants;

// ln2 = high + low with so few bits in `high` that n * high is exact for every n that occurs.
// `round` is 1.5 * 2^mantissa_bits: adding it leaves the nearest integer in the low bits. The
// Taylor series to `degree` is exact to 0.1 units of the last place on |x| <= ln2 / 2.
template <>
struct ExpConstants<float> {
  static constexpr float kLn2High = 355.0f / 512.0f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kRound = 12582912.0f;
  static constexpr float kLowest = -87.33654f;      // exp of it is the smallest normal number
  static constexpr float kVanishing = -103.97208f;  // exp below it rounds to 0
  static constexpr int kLift = 30;
  static constexpr float kUnlift = 0x1p-30f;
  static constexpr int kDegree = 7;
};

template <>
struct ExpConstants<double> {
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLowest = -708.396418532264;
  static constexpr double kVanishing = -745.13321910194122;
  static constexpr int kLift = 62;
  static constexpr double kUnlift = 0x1p-62;
  static constexpr int kDegree = 13;
};

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// sum_{k >= N} x^(k - N) / k!, by Horner's rule in pairs of terms: half as many operations wait for
// each other.
template <class T, int N>
ATTN_EXT_INLINE Vec<T> taylor_exp(Vec<T> x, Vec<T> square) {
  const Vec<T> pair =
      x * static_cast<T>(inverse_factorial(N + 1)) + static_cast<T>(inverse_factorial(N));
  if constexpr (N + 1 == ExpConstants<T>::kDegree) {
    return pair;
  } else {
    return taylor_exp<T, N + 2>(x, square) * square + pair;
  }
}

// exp(x) = scale (1 + fraction), with scale a power of two and |fraction| < 0.42.
template <class T>
struct ExpParts {
  Vec<T> scale;
  Vec<T> fraction;
};

// For kLowest <= x <= -kLowest, or from kVanishing if lifted: scale is then 2^lift times as large.
template <class T>
ATTN_EXT_INLINE ExpParts<T> exp_parts(Vec<T> x, int lift = 0) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = x * C::kLog2E + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> high = x - n * C::kLn2High;
  const Vec<T> rest = high - n * C::kLn2Low;
  const Vec<T> square = rest * rest;
  const VecBits<T> one = bits_of<T>(splat<T>(static_cast<T>(int64_t{1} << lift)));
  return {from_bits<T>((bits_of<T>(shifted) << VectorOf<T>::kMantissaBits) + one),
          rest + square * taylor_exp<T, 2>(rest, square)};
}

template <class T>
ATTN_EXT_INLINE Vec<T> exp_in_range(Vec<T> x) {
  const ExpParts<T> parts = exp_parts<T>(x);
  return parts.scale + parts.scale * parts.fraction;
}

// exp(x) for x <= 0 or NaN, through exp(x) 2^kLift, which is normal where exp(x) is subnormal.
template <class T>
ATTN_EXT_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> vanishing = splat<T>(C::kVanishing);
  const ExpParts<T> parts = exp_parts<T>(x < vanishing ? vanishing : x, C::kLift);
  const Vec<T> lifted = parts.scale + parts.scale * parts.fraction;
  return x < vanishing ? Vec<T>{} : lifted * C::kUnlift;
}

template <class T>
ATTN_EXT_INLINE T exp_nonpositive_scalar(T x) {
  return exp_nonpositive<T>(splat<T>(x))[0];
}

#if ATTN_EXT_ISA_AVX512
// GCC 12 warns about the unmasked form of the intrinsic.
constexpr __mmask16 kAllLanes = 0xFFFF;
#endif

// numerator / x for normal x.
template <class T>
ATTN_EXT_INLINE Vec<T> quotient(Vec<T> numerator, Vec<T> x) {
#if ATTN_EXT_ISA_AVX512
  if constexpr (sizeof(T) == 4) {
    // 14 bits from the instruction, 28 after one Newton step; a division takes three times as long.
    const Vec<T> guess = (Vec<T>)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
    return numerator * (guess + guess * (1 - x * guess));
  }
#endif
  return numerator / x;
}

// tanh(x) and slope = 1 - tanh(x)^2.
template <class T>
struct TanhParts {
  Vec<T> tanh;
  Vec<T> slope;
};

// (1 - tanh(x)^2) / 4 = p (1 - p) from the smaller of p = 1 / (1 + exp(+-2x)). Errors of p hardly
// show where slopes are largest and those of many keys cancel: at p = 1/2 not to first order.
template <class T>
ATTN_EXT_INLINE Vec<T> quarter_slope(Vec<T> p) {
  return p - p * p;
}

// Up to where tanh is taken from small_tanh.
constexpr double kSmallTanhLimit = 0.55;

// tanh(x) for |x| <= kSmallTanhLimit in single precision.
template <class T>
ATTN_EXT_INLINE Vec<T> small_tanh(Vec<T> x) {
  const Vec<T> square = x * x;
  Vec<T> series = square * T(kSmallTanh[4]) + T(kSmallTanh[3]);
  for (int n = 2; n >= 0; --n) {
    series = square * series + T(kSmallTanh[n]);
  }
  return x + x * square * series;
}

// With z = exp(-2|x|) and p = z / (1 + z), tanh|x| = 1 - 2p, whose error is less than a unit of the
// last place for all but small x, and 1 - tanh^2 = 4 p (1 - p). Of small x double precision takes
// tanh|x| = (1 - z) / (1 + z), where 1 - z is computed with a small relative error.
template <class T>
ATTN_EXT_INLINE TanhParts<T> tanh_parts(Vec<T> x) {
  const Vec<T> lowest = splat<T>(ExpConstants<T>::kLowest);
  const Vec<T> size = magnitude<T>(x);
  const Vec<T> twice = -2 * size;
  const ExpParts<T> parts = exp_parts<T>(twice < lowest ? lowest : twice);
  const Vec<T> tail = parts.scale * parts.fraction;
  const Vec<T> z = parts.scale + tail;
  const Vec<T> inverse = 1 / (z + 1);
  const Vec<T> p = z * inverse;
  const VecBits<T> sign = bits_of<T>(x) & kSignBit<T>;
  const Vec<T> large = from_bits<T>(bits_of<T>(1 - 2 * p) | sign);
  Vec<T> small;
  if constexpr (sizeof(T) == 4) {
    small = small_tanh<T>(x);
  } else {
    small = from_bits<T>(bits_of<T>(((1 - parts.scale) - tail) * inverse) | sign);
  }
  const Vec<T> slope = 4 * quarter_slope<T>(p);
  return {size < T(kSmallTanhLimit) ? small : large, slope < T(kVanishingSlope) ? Vec<T>{} : slope};
}

// The same for |x| <= kSmallTanhLimit, with fewer operations in single precision.
template <class T>
ATTN_EXT_INLINE TanhParts<T> small_tanh_parts(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    const Vec<T> tanh = small_tanh<T>(x);
    return {tanh, 1 - tanh * tanh};
  }
  return tanh_parts<T>(x);
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
