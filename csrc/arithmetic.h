// Scalar arithmetic that every C++ and CUDA backend shares, so that they agree on dropout bits.
// What only the CUDA backend computes scalar by scalar stands here too: the host compiles it for
// tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "route.h"

namespace attn_ext {

// 2^x and 1 / x, on a GPU by the instruction, whose error is some units of the last place.
ATTN_EXT_HOST_DEVICE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#elif defined(EMULATED_CUDA)
  return emulated_exp2(x);
#else
  return std::exp2(x);
#endif
}

ATTN_EXT_HOST_DEVICE float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#elif defined(EMULATED_CUDA)
  return emulated_reciprocal(x);
#else
  return 1 / x;
#endif
}

constexpr float kTwoLog2E = 2.88539008f;
constexpr float kTwoLog2ELow = 3.85192598e-8f;  // 2 log2(e) - kTwoLog2E
constexpr float kLn2 = 0.693147181f;

// A = exp(2x). What rounding takes from the exponent, up to 1e-6 at the end of the factored range,
// is put back to first order.
ATTN_EXT_HOST_DEVICE float factored_exponential(float x) {
  const float exponent = x * kTwoLog2E;
  const float rest = std::fma(x, kTwoLog2ELow, std::fma(x, kTwoLog2E, -exponent));
  const float power = fast_exp2(exponent);
  return std::fma(power * kLn2, rest, power);
}

// sum + w0 / (1 + a0 b0) + w1 / (1 + a1 b1), with one reciprocal for two features.
ATTN_EXT_HOST_DEVICE float add_factored_pair(float sum, float w0, float w1, float a0, float a1,
                                             float b0, float b1) {
  const float x0 = std::fma(a0, b0, 1.0f);
  const float x1 = std::fma(a1, b1, 1.0f);
  return std::fma(std::fma(w0, x1, w1 * x0), fast_reciprocal(x0 * x1), sum);
}

// Below it 1 - tanh(x)^2 is 0 in double precision, so it is in pooling too.
constexpr double kVanishingSlope = 0x1p-53;

// tanh(x) and (1 - tanh(x)^2) / 4.
struct TanhSlope {
  float tanh;
  float slope;
};

// h = 1 / (1 + a b) - 1/2 of two features: tanh = -2h, and the slope is 1/4 - h^2.
ATTN_EXT_HOST_DEVICE void factored_pair(float a0, float a1, float b0, float b1, float& h0,
                                        float& h1) {
  const float x0 = std::fma(a0, b0, 1.0f);
  const float x1 = std::fma(a1, b1, 1.0f);
  const float inverse = fast_reciprocal(x0 * x1);
  h0 = std::fma(x1, inverse, -0.5f);
  h1 = std::fma(x0, inverse, -0.5f);
}

// 1 / x for x between 1 and 2, to all but half a unit of the last place.
ATTN_EXT_HOST_DEVICE float refined_reciprocal(float x) {
  const float guess = fast_reciprocal(x);
  return std::fma(guess, std::fma(-guess, x, 1.0f), guess);
}

// tanh(x) = x + x^3 (c0 + c1 x^2 + ...) for |x| <= 0.55, fitted for an error of 5e-9 of tanh.
constexpr float kSmallTanh[5] = {-0.3333332f, 0.13332598f, -0.053853363f, 0.021075668f,
                                 -0.0062794993f};

// For any x, both with a small relative error. With z = exp(-2|x|), tanh|x| = 1 - 2z / (1 + z),
// from where it exceeds 1/2; below, the polynomial.
ATTN_EXT_HOST_DEVICE TanhSlope exact_tanh(float x) {
  constexpr float kPolynomial = 0.55f;
  const float size = std::fabs(x);
  const float z = fast_exp2(-kTwoLog2E * size);
  const float part = z * refined_reciprocal(1 + z);
  const float square = x * x;
  // Device code reads the host's array in constants only.
  constexpr float c0 = kSmallTanh[0];
  constexpr float c1 = kSmallTanh[1];
  constexpr float c2 = kSmallTanh[2];
  constexpr float c3 = kSmallTanh[3];
  constexpr float c4 = kSmallTanh[4];
  float series = std::fma(square, c4, c3);
  series = std::fma(square, series, c2);
  series = std::fma(square, series, c1);
  series = std::fma(square, series, c0);
  const float small = std::fma(x * square, series, x);
  const float large = std::copysign(std::fma(-2.0f, part, 1.0f), x);
  // part (1 - part), to which errors of part = 1/2 are nothing: slopes of tiny x are all the same.
  return {size < kPolynomial ? small : large, std::fma(-part, part, part)};
}

// sigmoid(x) and sigmoid(x) (1 - sigmoid(x)), subnormal ones too: exp(-|x|) does not overflow. As
// 1 - tanh^2, 1 - sigmoid(x) counts as 0 where it is in double precision.
struct SigmoidSlope {
  float sigmoid;
  float slope;
};

ATTN_EXT_HOST_DEVICE SigmoidSlope exact_sigmoid(float x) {
  const float y = std::exp(-std::fabs(x));
  const float r = refined_reciprocal(1 + y);
  const bool saturated = x > 0 && y < static_cast<float>(kVanishingSlope);
  return {x < 0 ? y * r : r, saturated ? 0.0f : y * r * r};
}

// A softmax over some of the keys: largest score and sum of exponentials relative to it.
struct SoftmaxPart {
  float largest;
  float total;
};

// -infinity stands for "nothing yet"; a row of -infinities keeps its sum of 0, hence its NaN.
ATTN_EXT_HOST_DEVICE float softmax_base(float largest) {
  return largest == -INFINITY ? 0.0f : largest;
}

// By what sums relative to `part` are to be scaled to become relative to `largest`.
ATTN_EXT_HOST_DEVICE float softmax_scale(float part, float largest) {
  return std::exp(part - softmax_base(largest));
}

ATTN_EXT_HOST_DEVICE SoftmaxPart merge_softmax(SoftmaxPart a, SoftmaxPart b) {
  const float largest = a.largest > b.largest ? a.largest : b.largest;
  return {largest, a.total * softmax_scale(a.largest, largest) +
                       b.total * softmax_scale(b.largest, largest)};
}

struct PhiloxKey {
  uint32_t low;
  uint32_t high;
};

// One of the ten rounds of Philox-4x32-10 (Salmon et al. 2011), which make words of a counter.
ATTN_EXT_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                       PhiloxKey key) {
  const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
  const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
  c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.low;
  c1 = static_cast<uint32_t>(product1);
  c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.high;
  c3 = static_cast<uint32_t>(product0);
}

ATTN_EXT_HOST_DEVICE PhiloxKey next_key(PhiloxKey key) {
  return {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u};
}

// First output word.
ATTN_EXT_HOST_DEVICE uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                     PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, key);
    key = next_key(key);
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
