// float16 of the emulated CUDA, by the processor's F16C instructions.
#pragma once

#include <immintrin.h>

struct __half {
  unsigned short bits;
};
inline float __half2float(__half value) { return _cvtsh_ss(value.bits); }
inline __half __float2half_rn(float value) {
  return {static_cast<unsigned short>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
