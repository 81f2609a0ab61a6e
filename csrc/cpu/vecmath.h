// exp, tanh and reciprocals of vectors.
#pragma once

#include "../arithmetic.h"
#include "vec.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

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

// NaN stays NaN.
template <class T>
ATTN_EXT_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  const Vec<T> below = high < x ? splat<T>(high) : x;
  return low > below ? splat<T>(low) : below;
}

// Twice the number from which tanh is 1 to the last place, and the number from which sigmoid is.
constexpr double kSaturatedTwice[2] = {20, 40};  // of float, of double
constexpr double kSaturatedGate[2] = {30, 40};

// tanh(x) and tanh(x) sigmoid(g), the values of hidden rows, from A = exp(2x) and G = exp(g):
// (A - 1) / (A + 1) and (A - 1) G / ((A + 1) (G + 1)), which one division serves. A - 1 is computed
// with a small relative error, and G is lifted, as in exp_nonpositive, where it would be subnormal.
template <class T>
struct TanhRatio {
  Vec<T> difference;
  Vec<T> sum;

  explicit ATTN_EXT_INLINE TanhRatio(Vec<T> x) {
    constexpr T largest = static_cast<T>(kSaturatedTwice[sizeof(T) / 8]);
    const ExpParts<T> parts = exp_parts<T>(clamp<T>(2 * x, -largest, largest));
    const Vec<T> tail = parts.scale * parts.fraction;
    difference = (parts.scale - 1) + tail;
    sum = (parts.scale + 1) + tail;
  }
};

template <class T>
ATTN_EXT_INLINE Vec<T> hidden_value(Vec<T> x) {
  const TanhRatio<T> ratio(x);
  return ratio.difference / ratio.sum;
}

template <class T>
ATTN_EXT_INLINE Vec<T> hidden_value(Vec<T> x, Vec<T> g) {
  using C = ExpConstants<T>;
  const TanhRatio<T> ratio(x);
  constexpr T largest = static_cast<T>(kSaturatedGate[sizeof(T) / 8]);
  // At the lower end the result is less than half of the smallest number.
  const ExpParts<T> parts = exp_parts<T>(clamp<T>(g, C::kVanishing - 1, largest), C::kLift);
  const Vec<T> lifted = parts.scale + parts.scale * parts.fraction;
  return ratio.difference * lifted / (ratio.sum * (lifted + 1 / C::kUnlift));
}

// A hidden value, tanh(x) or tanh(x) sigmoid(g), and what its derivatives are made of.
template <class T>
struct HiddenParts {
  Vec<T> value;
  Vec<T> tanh;
  Vec<T> slope;  // 1 - tanh^2
  Vec<T> sigmoid;
  Vec<T> sigmoid_slope;  // sigmoid (1 - sigmoid)
};

template <class T>
ATTN_EXT_INLINE HiddenParts<T> hidden_parts(Vec<T> x) {
  const TanhParts<T> parts = tanh_parts<T>(x);
  return {parts.tanh, parts.tanh, parts.slope, splat<T>(1), Vec<T>{}};
}

// With z = exp(-2|x|) and y = exp(-|g|), of which slopes keep their relative accuracy however small
// they are, tanh|x| = (1 - z) / (1 + z), sigmoid(|g|) = 1 / (1 + y) and sigmoid(-|g|) = y / (1 +
// y).
template <class T>
ATTN_EXT_INLINE HiddenParts<T> hidden_parts(Vec<T> x, Vec<T> g) {
  const Vec<T> lowest = splat<T>(ExpConstants<T>::kLowest);
  const Vec<T> twice = -2 * magnitude<T>(x);
  const ExpParts<T> parts = exp_parts<T>(twice < lowest ? lowest : twice);
  const Vec<T> tail = parts.scale * parts.fraction;
  const Vec<T> z = parts.scale + tail;
  const Vec<T> y = exp_nonpositive<T>(-magnitude<T>(g));
  const Vec<T> inverse = 1 / ((z + 1) * (y + 1));
  const Vec<T> difference =
      from_bits<T>(bits_of<T>((1 - parts.scale) - tail) | (bits_of<T>(x) & kSignBit<T>));
  const Vec<T> power = g < 0 ? y : splat<T>(1);
  const Vec<T> q = inverse * (y + 1);
  const Vec<T> r = inverse * (z + 1);
  const Vec<T> slope = 4 * (z * q) * q;
  // As 1 - tanh^2, 1 - sigmoid counts as 0 where it is in double precision.
  const VecBits<T> closed = (g > 0) & (y < T(kVanishingSlope));
  return {difference * inverse * power, difference * q,
          slope < T(kVanishingSlope) ? Vec<T>{} : slope, power * r, closed ? Vec<T>{} : y * r * r};
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
