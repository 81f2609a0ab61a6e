// Choice of the instruction set.
#pragma once

#include "call.h"

namespace attn_ext {

// Name of the kernels in use: "avx512", "avx2" or "portable".
const char* cpu_isa();

#if defined(__x86_64__)
const Kernels<float>& avx512_kernels_float();
const Kernels<double>& avx512_kernels_double();
const Kernels<float>& avx2_kernels_float();
const Kernels<double>& avx2_kernels_double();
#endif
const Kernels<float>& portable_kernels_float();
const Kernels<double>& portable_kernels_double();

}  // namespace attn_ext
