// By which formula a tile of scores or gradients is computed: the thresholds of C++ and CUDA.
// A tile is factored if nothing below speaks against it, else it takes tanh of each sum q + k.
#pragma once

#if defined(__CUDACC__)
#define ATTN_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ATTN_EXT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace attn_ext {

// The factored form is tanh(q + k) = (z - 1) / (z + 1) with z = A B, A = exp(2q), B = exp(2k), and
// takes one reciprocal for two features: with x = z + 1,
//   w0 tanh0 + w1 tanh1 = (w0 (z0 - 1) x1 + w1 (z1 - 1) x0) / (x0 x1).
// Numerator and denominator grow as the product of four exponentials: with each exponent 2 log2(e)
// |q| up to kExponent they stay finite and normal for weights up to 2^17.
template <class T>
struct FactoredRange;

template <>
struct FactoredRange<float> {
  static constexpr int kExponent = 27;        // 4 * 27 + 17 + 1 < 127
  static constexpr float kLargest = 9.3574f;  // kExponent ln(2) / 2
};

template <>
struct FactoredRange<double> {
  static constexpr int kExponent = 250;  // 4 * 250 + 17 + 1 < 1023
  static constexpr double kLargest = 86.643;
};

// Whether rows with these largest magnitudes |q| and |k| may meet in the factored form. NaN answers
// false.
template <class T>
ATTN_EXT_HOST_DEVICE bool in_factored_range(T query_bound, T key_bound, double smallest_sum) {
  return query_bound <= FactoredRange<T>::kLargest && key_bound <= FactoredRange<T>::kLargest &&
         query_bound + key_bound >= T(smallest_sum);
}

// The root of sum w^2 up to which scores are factored wherever nothing else speaks against it.
// Errors of tanh, of some units of epsilon and other ones for each key, add up to about that times
// epsilon: of larger weights the softmax would show them, where tanh is small and the plain
// formula's errors are smaller.
constexpr double kLargestWeightNorm = 16;
// The CPU factors scores of weights up to this where that is not so: inputs are of 16 bits, or all
// rows of a tile have magnitudes |q| + |k| that add up to so much, and so much of sum |w| may meet
// a tanh of some size (see kInformativePart).
constexpr double kLargestFactoredNorm = 64;
constexpr double kSmallestSumOfLargeWeights = 0.8;
constexpr double kInformativePartOfLargeWeights = 0.5;

// The largest |sum w|, in roots of sum w^2 (weights of random signs hardly exceed it, those of one
// sign do), for which CUDA's scores are factored, sum w - 2 sum w / x: the second sum grows to half
// of the first, and so do its roundings, however small the scores are.
constexpr double kLargestWeightSum = 3.5;

// Below this sum |q| + |k| of the largest magnitudes of a tile its tanh values are all small, and
// the factored form, whose error is some units of the type's epsilon however small tanh is, would
// lose their relative accuracy.
constexpr double kSmallestMagnitudeSum = 0.25;
// The same for gradients: that of the weights is a sum of tanh itself, and may cancel.
constexpr double kSmallestGradientSum = 0.5;
// And for gradients of inputs of 16 bits, beside whose roundings the form's error is small for
// long.
constexpr double kSmallestRoughSum = 1e-4;

// exp(2 |q + k|) from which tanh counts as saturated (|q + k| = 1), and up to which as small (1/4).
constexpr double kSaturatedProduct = 7.38905610;
constexpr double kSmallProduct = 1.64872127;
// Of all |w|, the part that features between the two must have for factored scores: their error is
// relative to sum |w|, that of the plain formula to sum |w tanh|. Where they are fewer, as where
// every key is minus every query up to noise, or all are saturated, scores differ and gradients are
// so little that the error would show; not asked where all inputs are of 16 bits, whose own
// roundings are larger.
constexpr double kInformativePart = 0.125;

// Whether tanh(q + k) can be neither nearly 0 nor nearly +-1, given the extremes of exp(2(q + k)).
ATTN_EXT_HOST_DEVICE bool can_inform(float smallest, float largest) {
  return smallest <= static_cast<float>(kSaturatedProduct) &&
         largest >= static_cast<float>(1 / kSaturatedProduct) &&
         (largest >= static_cast<float>(kSmallProduct) ||
          smallest <= static_cast<float>(1 / kSmallProduct));
}

}  // namespace attn_ext
