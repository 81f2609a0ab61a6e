// Scalar arithmetic that every C++ and CUDA backend shares, so that they agree on dropout bits and
// on which magnitudes the factored form may see.
#pragma once

#include <cstdint>

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
// |q| up to kExponent they stay finite and normal for weights up to kLargestWeight.
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

constexpr double kLargestWeight = 1 << 17;

// Below this sum of magnitudes a tile's tanh values are all small, and the factored form, whose
// error is up to some units of the type's epsilon however small tanh is, would lose their relative
// accuracy: such a tile takes the exact route.
constexpr double kSmallestMagnitudeSum = 0.25;

// Whether rows with these largest magnitudes may meet in the factored form. NaN answers false.
template <class T>
ATTN_EXT_HOST_DEVICE bool in_factored_range(T query_bound, T key_bound) {
  return query_bound <= FactoredRange<T>::kLargest && key_bound <= FactoredRange<T>::kLargest &&
         query_bound + key_bound >= T(kSmallestMagnitudeSum);
}

struct PhiloxKey {
  uint32_t low;
  uint32_t high;
};

// First output word of Philox-4x32-10 (Salmon et al. 2011).
ATTN_EXT_HOST_DEVICE uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                     PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.low;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.high;
    c3 = static_cast<uint32_t>(product0);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return c0;
}

// Whether dropout keeps the weight of (key, query, head, sequence): u >= p with u = word / 2^24.
// `threshold` is p * 2^24; comparing scaled values leaves the real numbers compared unchanged.
ATTN_EXT_HOST_DEVICE bool dropout_keeps(int64_t key_position, int64_t query_position, int64_t head,
                                        int64_t sequence, PhiloxKey seed, double threshold) {
  const uint32_t word =
      philox(static_cast<uint32_t>(key_position), static_cast<uint32_t>(query_position),
             static_cast<uint32_t>(head), static_cast<uint32_t>(sequence), seed);
  return static_cast<double>(word >> 8) >= threshold;
}

}  // namespace attn_ext
