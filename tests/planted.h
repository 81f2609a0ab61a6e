// Whether the defect of this name is planted: see tests/planted.py. It was asked for by an
// environment variable, so that one build holds them all.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__CUDACC__)  // a GPU has no environment
#define ATTN_EXT_PLANTED(name) false
#else
#define ATTN_EXT_PLANTED(name)                                         \
  ([] {                                                                \
    static const char* const chosen = std::getenv("ATTN_EXT_PLANTED"); \
    static const bool planted = chosen && !std::strcmp(chosen, name);  \
    return planted;                                                    \
  }())
#endif
