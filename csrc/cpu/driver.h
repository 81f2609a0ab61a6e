// The five operations on plain descriptions of their tensors.
#pragma once

#include "call.h"

namespace attn_ext {

template <class T>
void run_forward(ForwardCall<T> call);

// Which gradients are computed follows from the outputs of `call` that are set; with `from_steps`,
// s and alpha are read from call.step_dscores and call.step_weights instead of being recomputed.
// dscore_weight, if set, is converted into `dscore_weight_out`.
template <class T>
void run_backward(BackwardCall<T> call, bool from_steps, const Rows& dscore_weight_out);

// exp(2 key) and the largest magnitude of each row; `sizes` are those of key, [Bk, Nk, H, D].
template <class T>
void run_prepare(const Rows& key, const std::vector<int64_t>& sizes, T* exp_key, T* key_bound);

}  // namespace attn_ext
