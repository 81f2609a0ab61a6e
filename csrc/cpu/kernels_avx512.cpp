// The kernels for avx512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "call.h"

#define ATTN_EXT_ISA avx512
#define ATTN_EXT_ISA_AVX512 1
#define ATTN_EXT_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
