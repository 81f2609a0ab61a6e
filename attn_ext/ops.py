"""torch.library definitions: schemas, fake kernels, and the way to the backends.

The CPU kernels are registered by the C++ library (``csrc/registration.cpp``); on CUDA tensors the
``backend`` argument chooses. Arguments are in the internal form of :mod:`attn_ext.layout`; nothing
is checked here.
"""

import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import backends
from .layout import RAW

_KEY_LAYOUT = "Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? key_padding_mask"
_LAYOUT = f"Tensor? cu_seqlens_q, {_KEY_LAYOUT}, SymInt max_seqlen_q, SymInt max_seqlen_k"
_DROPOUT = "float dropout_p, Tensor? dropout_seed"
_CHOICE = "bool deterministic, str backend"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor score_weight"
_PREPARED = "Tensor? exp_key, Tensor? key_bound"  # None: the backend prepares nothing
_KEPT = "Tensor stats, Tensor scores"  # what forward leaves for backward
_GRADS = "Tensor? dcontext, Tensor? dweights"
_POOLED = "Tensor key, Tensor value, Tensor score_weight, Tensor? gate"
_POOL_LAYOUT = f"{_KEY_LAYOUT}, SymInt max_seqlen_k"
_POOL_DROPOUT = f"float tanh_dropout_p, float gate_dropout_p, {_DROPOUT}"

_SCHEMAS = {
    "additive_attention_forward": f"({_INPUTS}, Tensor? exp_key, Tensor? key_bound, {_LAYOUT}, "
    f"{_DROPOUT}, int weights_layout, bool keep_scores, {_CHOICE}) "
    "-> (Tensor context, Tensor weights, Tensor stats, Tensor scores)",
    "additive_attention_backward": f"({_GRADS}, {_INPUTS}, {_KEPT}, {_LAYOUT}, {_DROPOUT}, "
    f"int weights_layout, int grad_mask, {_CHOICE}) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dscore_weight)",
    "additive_attention_prepare": "(Tensor key) -> (Tensor exp_key, Tensor key_bound)",  # CPU
    "additive_attention_step_backward": f"({_GRADS}, {_INPUTS}, {_PREPARED}, {_KEPT}, "
    f"{_KEY_LAYOUT}, SymInt max_seqlen_k, {_DROPOUT}, int weights_layout, int grad_mask, "
    f"{_CHOICE}) -> (Tensor dquery, Tensor dscores, Tensor weights)",
    "additive_attention_memory_backward": "(Tensor query, Tensor dscores, Tensor weights, "
    "Tensor dcontext, Tensor key, Tensor value, Tensor score_weight, "
    f"{_PREPARED}, {_KEY_LAYOUT}, SymInt max_seqlen_k, int grad_mask, {_CHOICE}) "
    "-> (Tensor dkey, Tensor dvalue, Tensor dscore_weight)",
    "additive_pool_forward": f"({_POOLED}, {_POOL_LAYOUT}, {_POOL_DROPOUT}, int weights_layout, "
    f"bool keep_scores, {_CHOICE}) "
    "-> (Tensor context, Tensor weights, Tensor stats, Tensor scores)",
    "additive_pool_backward": f"({_GRADS}, {_POOLED}, {_KEPT}, {_POOL_LAYOUT}, {_POOL_DROPOUT}, "
    f"int weights_layout, int grad_mask, {_CHOICE}) "
    "-> (Tensor dkey, Tensor dvalue, Tensor dscore_weight, Tensor dgate)",
}
_CPU_ONLY = ("additive_attention_prepare",)  # which "triton" and "cuda" do not have

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"attn_ext::{_name}", _schema)
    if _name not in _CPU_ONLY:  # "cuda" hears of no choice
        torch.library.define(f"attn_ext_cuda::{_name}", _schema.replace(", str backend", ""))

forward: OpOverload = torch.ops.attn_ext.additive_attention_forward.default
backward: OpOverload = torch.ops.attn_ext.additive_attention_backward.default
prepare: OpOverload = torch.ops.attn_ext.additive_attention_prepare.default
step_backward: OpOverload = torch.ops.attn_ext.additive_attention_step_backward.default
memory_backward: OpOverload = torch.ops.attn_ext.additive_attention_memory_backward.default
pool_forward: OpOverload = torch.ops.attn_ext.additive_pool_forward.default
pool_backward: OpOverload = torch.ops.attn_ext.additive_pool_backward.default


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_k: int,
    backend: str,
) -> bool:
    """Whether a forward whose gradient may be asked for keeps its scores for backward.

    They take at most half of the memory of the inputs; larger ones backward computes again. Where
    each sequence has one query, a number a key, they are kept on the CPU: accelerators wait for the
    keys, and compute as they come.
    """
    if backend == "reference" or torch.jit.is_tracing():  # a trace's sizes are no numbers
        return False
    if cu_seqlens_q is None:
        if _is_known_true(query.size(1) == 1):
            return backend == "cpu"
        if not _is_known_true(query.size(1) != 1):  # the shape of what is kept would not be either
            return False
    places, rows, heads, _ = query.shape
    scores = places * rows * heads * max_seqlen_k * compute_dtype(query.dtype).itemsize
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in (query, key, value))
    return _is_known_true(2 * scores <= inputs)


def _is_known_true(fact: bool | torch.SymBool) -> bool:
    """The fact; under torch.compile False too where it depends on data."""
    if isinstance(fact, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(fact)
    return fact


@torch.library.register_fake("attn_ext::additive_attention_forward")
def _forward_fake(
    query,
    key,
    value,
    score_weight,
    exp_key,
    key_bound,
    cu_seqlens_q,
    cu_seqlens_k,
    key_lengths,
    key_padding_mask,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    dropout_seed,
    weights_layout,
    keep_scores,
    deterministic,
    backend,
):
    rows, heads = query.shape[:2], query.size(2)
    batch = query.size(0) if cu_seqlens_q is None else cu_seqlens_q.size(0) - 1
    weights_shape = ((0,), (batch, heads, max_seqlen_q, max_seqlen_k), (key.size(1), heads))
    raw, weights_layout = divmod(weights_layout, RAW)
    weights_dtype = compute_dtype(key.dtype) if raw else value.dtype
    scores_shape: tuple = (0,)
    if keep_scores:
        by_key = cu_seqlens_q is None and query.size(1) == 1
        scores_shape = key.shape[:3] if by_key else (*rows, heads, max_seqlen_k)
    return (
        value.new_empty((*rows, heads, value.size(-1))),
        value.new_empty(weights_shape[weights_layout], dtype=weights_dtype),
        query.new_empty((*rows, heads, 2), dtype=compute_dtype(query.dtype)),
        query.new_empty(scores_shape, dtype=compute_dtype(query.dtype)),
    )


def _gradient(like: Tensor, wanted: int) -> Tensor:
    return like.new_empty(like.shape if wanted else (0,))


@torch.library.register_fake("attn_ext::additive_attention_backward")
def _backward_fake(dcontext, dweights, query, key, value, score_weight, *rest):
    *_, grad_mask, _, _ = rest
    inputs = (query, key, value, score_weight)
    return tuple(_gradient(tensor, grad_mask & 1 << bit) for bit, tensor in enumerate(inputs))


@torch.library.register_fake("attn_ext::additive_attention_prepare")
def _prepare_fake(key):
    dtype = compute_dtype(key.dtype)
    return key.new_empty(key.shape, dtype=dtype), key.new_empty(key.shape[:-1], dtype=dtype)


@torch.library.register_fake("attn_ext::additive_attention_step_backward")
def _step_backward_fake(dcontext, dweights, query, key, value, score_weight, *rest):
    dtype = compute_dtype(key.dtype)
    by_key = (key.new_empty(key.shape[:-1], dtype=dtype) for _ in range(2))
    *_, grad_mask, _, _ = rest
    return _gradient(query, grad_mask & 1), *by_key


@torch.library.register_fake("attn_ext::additive_attention_memory_backward")
def _memory_backward_fake(query, dscores, weights, dcontext, key, value, score_weight, *rest):
    *_, grad_mask, _, _ = rest
    inputs = (key, value, score_weight)
    return tuple(_gradient(tensor, grad_mask & 2 << bit) for bit, tensor in enumerate(inputs))


@torch.library.register_fake("attn_ext::additive_pool_forward")
def _pool_forward_fake(key, value, score_weight, gate, cu_seqlens_k, *rest):
    *_, weights_layout, keep_scores, _, _ = rest
    heads, branches, _ = score_weight.shape
    batch = key.size(0) if cu_seqlens_k is None else cu_seqlens_k.size(0) - 1
    by_key = (key.size(1), heads, branches)
    raw, weights_layout = divmod(weights_layout, RAW)
    dtype = compute_dtype(key.dtype)
    return (
        value.new_empty((batch, branches, heads, value.size(-1))),
        value.new_empty(
            ((0,), (batch, heads, branches, key.size(1)), by_key)[weights_layout],
            dtype=dtype if raw else value.dtype,
        ),
        key.new_empty((batch, branches, heads, 2), dtype=dtype),
        key.new_empty((key.size(0), *by_key) if keep_scores else (0,), dtype=dtype),
    )


@torch.library.register_fake("attn_ext::additive_pool_backward")
def _pool_backward_fake(dcontext, dweights, key, value, score_weight, gate, *rest):
    *_, grad_mask, _, _ = rest
    inputs = (key, value, score_weight, key if gate is None else gate)
    return tuple(_gradient(tensor, grad_mask & 2 << bit) for bit, tensor in enumerate(inputs))


# ---- The kernels of CUDA tensors ----


def _accelerated(name: str) -> Callable:
    """The implementation of an op that hands on to the backend its last argument names."""

    def kernel(*arguments):
        *arguments, backend = arguments
        if backend == "cuda":
            return getattr(torch.ops.attn_ext_cuda, name)(*arguments)
        launch = importlib.import_module(".triton_kernels.launch", __package__)
        return getattr(launch, name)(*arguments)

    return kernel


def _interpreted(name: str) -> Callable:
    """The same for CPU tensors under Triton's interpreter, beside the C++ library's kernel."""
    by_triton = _accelerated(name)
    has_cpu = torch._C._dispatch_has_kernel_for_dispatch_key(f"attn_ext::{name}", "CPU")
    by_cpu = torch.library.get_kernel(f"attn_ext::{name}", "CPU") if has_cpu else None

    def kernel(keyset, *arguments):
        if arguments[-1] == "triton":
            return by_triton(*arguments)
        return by_cpu.call_boxed(keyset, *arguments)

    return kernel


_library = torch.library.Library("attn_ext", "FRAGMENT")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's, that the interpreter's kernels override others
    for _name in _SCHEMAS:
        if _name not in _CPU_ONLY:
            _library.impl(_name, _accelerated(_name), "CUDA")
            if backends.triton_interprets():
                _library.impl(_name, _interpreted(_name), "CPU", with_keyset=True)
