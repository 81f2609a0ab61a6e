// Memory of large gradients and prepared keys, kept for the next call once nobody holds the tensor
// any more.
//
// PyTorch's CPU allocator gives large tensors back to the operating system, and the next call pays
// for fresh pages: with one query over 100,000 keys they took as long as all of the arithmetic.
// Asking for huge pages is no way out: they are cheap where the kernel has free ones that the
// machine really holds, and take ten times as long where it, or the host of a virtual machine, has
// to find some first.
#pragma once

#include "tensors.h"

namespace attn_ext {

// A contiguous tensor of the sizes of `like`, in kept or new memory; `deterministic` calls want
// PyTorch to fill new memory, and get that.
Tensor allocate_large(const Tensor& like, ScalarType dtype, bool zeros, bool deterministic);

// Gives all that is kept back to the operating system.
void release_kept_memory();

}  // namespace attn_ext
