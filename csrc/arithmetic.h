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

// The factored form writes tanh(q + k) = 1 - 2r with r = 1 / (1 + A B), A = exp(2q), B = exp(2k),
// and takes one reciprocal for two features. x0 x1 = (1 + A0 B0)(1 + A1 B1) must stay finite and
// normal, so each exponent 2 log2(e) |q| stays below a quarter of the type's exponent range: 31 of
// 127, 255 of 1023.
template <class T>
struct FactoredRange;

template <>
struct FactoredRange<float> {
  static constexpr float kLargest = 10.743781f;  // 31 ln(2) / 2, rounded down
};

template <>
struct FactoredRange<double> {
  static constexpr double kLargest = 88.37626;  // 255 ln(2) / 2, rounded down
};

// Below this sum of magnitudes a tile's tanh values are all small, and the factored form, whose
// error is absolute (about one unit of the type's epsilon in tanh), would lose relative accuracy in
// dscore_weight = sum s tanh. Such a tile takes the exact route.
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
