// The kernels for portable.
#include <utility>

#include "call.h"

#define ATTN_EXT_ISA portable
#define ATTN_EXT_ISA_AVX512 0
#define ATTN_EXT_VECTOR_BYTES 16

#include "kernels_impl.h"
