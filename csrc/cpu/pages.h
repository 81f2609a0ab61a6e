// Large outputs are written once, right after they are allocated, and with 4 KiB pages the faults
// cost more than the arithmetic of one query a sequence does. The advice stays with the addresses:
// what the allocator puts there later gets huge pages too, as with glibc.malloc.hugetlb=1.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace attn_ext {

// Asks for huge pages under [data, data + bytes) where it is large; advice, so failure is no error.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{2} << 20;
  constexpr size_t kLeast = 4 * kHugePage;
  if (bytes >= kLeast) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace attn_ext
