"""torch.library definitions: schemas, fake kernels, and the way to the backends.

The CPU kernels are registered by the C++ library (``csrc/registration.cpp``); on CUDA tensors the
``backend`` argument chooses. Arguments are in the internal form of :mod:`attn_ext.layout`; nothing
is checked here.
"""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import backends
from .layout import RAW

_KEY_ROWS = "Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? key_padding_mask"
_KEY_LAYOUT = f"{_KEY_ROWS}, SymInt max_seqlen_k"
_LAYOUT = f"Tensor? cu_seqlens_q, {_KEY_ROWS}, SymInt max_seqlen_q, SymInt max_seqlen_k"
_DROPOUT = "float dropout_p, Tensor? dropout_seed"
_POOL_DROPOUT = f"float tanh_dropout_p, float gate_dropout_p, {_DROPOUT}"
_CHOICE = "bool deterministic, str backend"
_KEYS = "Tensor key, Tensor value, Tensor score_weight"
_PREPARED = "Tensor? exp_key, Tensor? key_bound"  # None: the backend prepares nothing
_KEPT = "Tensor stats, Tensor scores"  # what forward leaves for backward
_FORWARD = f"int weights_layout, bool keep_scores, {_CHOICE}"
_RESULTS = "Tensor context, Tensor weights, Tensor stats, Tensor scores"
_INCOMING = "Tensor? dcontext, Tensor? dweights"
_BACKWARD = f"int weights_layout, int grad_mask, {_CHOICE}"
_KEY_GRADS = "Tensor dkey, Tensor dvalue, Tensor dscore_weight"

_SCHEMAS = {
    "additive_attention_forward": f"(Tensor query, {_KEYS}, {_PREPARED}, {_LAYOUT}, {_DROPOUT}, "
    f"{_FORWARD}) -> ({_RESULTS})",
    "additive_attention_backward": f"({_INCOMING}, Tensor query, {_KEYS}, {_KEPT}, {_LAYOUT}, "
    f"{_DROPOUT}, {_BACKWARD}) -> (Tensor dquery, {_KEY_GRADS})",
    "additive_attention_prepare": "(Tensor key) -> (Tensor exp_key, Tensor key_bound)",  # CPU
    "additive_attention_step_backward": f"({_INCOMING}, Tensor query, {_KEYS}, {_PREPARED}, "
    f"{_KEPT}, {_KEY_LAYOUT}, {_DROPOUT}, {_BACKWARD}) "
    "-> (Tensor dquery, Tensor dscores, Tensor weights)",
    "additive_attention_memory_backward": "(Tensor query, Tensor dscores, Tensor weights, "
    f"Tensor dcontext, {_KEYS}, {_PREPARED}, {_KEY_LAYOUT}, int grad_mask, {_CHOICE}) "
    f"-> ({_KEY_GRADS})",
    "additive_pool_forward": f"({_KEYS}, Tensor? gate, {_KEY_LAYOUT}, {_POOL_DROPOUT}, "
    f"{_FORWARD}) -> ({_RESULTS})",
    "additive_pool_backward": f"({_INCOMING}, {_KEYS}, Tensor? gate, {_KEPT}, {_KEY_LAYOUT}, "
    f"{_POOL_DROPOUT}, {_BACKWARD}) -> ({_KEY_GRADS}, Tensor dgate)",
}
_CPU_ONLY = ("additive_attention_prepare",)  # which "triton" and "cuda" do not have

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"attn_ext::{_name}", _schema)
    if _name not in _CPU_ONLY:
        torch.library.define(f"attn_ext_cuda::{_name}", _schema)

forward: OpOverload = torch.ops.attn_ext.additive_attention_forward.default
backward: OpOverload = torch.ops.attn_ext.additive_attention_backward.default
prepare: OpOverload = torch.ops.attn_ext.additive_attention_prepare.default
step_backward: OpOverload = torch.ops.attn_ext.additive_attention_step_backward.default
memory_backward: OpOverload = torch.ops.attn_ext.additive_attention_memory_backward.default
pool_forward: OpOverload = torch.ops.attn_ext.additive_pool_forward.default
pool_backward: OpOverload = torch.ops.attn_ext.additive_pool_backward.default

GRADS = {"query": 1, "key": 2, "value": 4, "score_weight": 8, "gate": 16}  # bits of grad_mask


@functools.cache
def argument_names(op: OpOverload) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments)


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
    each sequence has one query they are a number a key and always kept.
    """
    if backend == "reference" or torch.jit.is_tracing():  # a trace's sizes are no numbers
        return False
    if cu_seqlens_q is None:
        if _is_known_true(query.size(1) == 1):
            return True
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


def _fake(op: OpOverload) -> Callable:
    """Register the fake kernel of an op, which takes those of its arguments that it names."""

    def register(fake: Callable) -> Callable:
        places = [argument_names(op).index(name) for name in inspect.signature(fake).parameters]

        def kernel(*arguments):
            return fake(*(arguments[place] for place in places))

        return torch.library.register_fake(op._name, kernel)

    return register


@_fake(forward)
def _forward_fake(
    query, key, value, cu_seqlens_q, max_seqlen_q, max_seqlen_k, weights_layout, keep_scores
):
    rows, heads = query.shape[:2], query.size(2)
    batch = query.size(0) if cu_seqlens_q is None else cu_seqlens_q.size(0) - 1
    weights_shape = ((0,), (batch, heads, max_seqlen_q, max_seqlen_k), (key.size(1), heads))
    raw, weights_layout = divmod(weights_layout, RAW)
    dtype = compute_dtype(key.dtype)
    scores_shape: tuple = (0,)
    if keep_scores:
        by_key = cu_seqlens_q is None and query.size(1) == 1
        scores_shape = key.shape[:3] if by_key else (*rows, heads, max_seqlen_k)
    return (
        value.new_empty((*rows, heads, value.size(-1))),
        value.new_empty(weights_shape[weights_layout], dtype=dtype if raw else value.dtype),
        query.new_empty((*rows, heads, 2), dtype=dtype),
        query.new_empty(scores_shape, dtype=dtype),
    )


def _gradients(grad_mask: int, **inputs: Tensor) -> tuple[Tensor, ...]:
    """One of each input; empty where none is asked for."""
    return tuple(
        tensor.new_empty(tensor.shape if grad_mask & GRADS[name] else (0,))
        for name, tensor in inputs.items()
    )


@_fake(backward)
def _backward_fake(query, key, value, score_weight, grad_mask):
    return _gradients(grad_mask, query=query, key=key, value=value, score_weight=score_weight)


@_fake(prepare)
def _prepare_fake(key):
    dtype = compute_dtype(key.dtype)
    return key.new_empty(key.shape, dtype=dtype), key.new_empty(key.shape[:-1], dtype=dtype)


@_fake(step_backward)
def _step_backward_fake(query, key, grad_mask):
    dtype = compute_dtype(key.dtype)
    by_key = (key.new_empty(key.shape[:-1], dtype=dtype) for _ in range(2))
    return *_gradients(grad_mask, query=query), *by_key


@_fake(memory_backward)
def _memory_backward_fake(key, value, score_weight, grad_mask):
    return _gradients(grad_mask, key=key, value=value, score_weight=score_weight)


@_fake(pool_forward)
def _pool_forward_fake(key, value, score_weight, cu_seqlens_k, weights_layout, keep_scores):
    heads, branches, _ = score_weight.shape
    batch = key.size(0) if cu_seqlens_k is None else cu_seqlens_k.size(0) - 1
    by_key = (key.size(1), heads, branches)
    weights_shape = ((0,), (batch, heads, branches, key.size(1)), by_key)
    raw, weights_layout = divmod(weights_layout, RAW)
    dtype = compute_dtype(key.dtype)
    return (
        value.new_empty((batch, branches, heads, value.size(-1))),
        value.new_empty(weights_shape[weights_layout], dtype=dtype if raw else value.dtype),
        key.new_empty((batch, branches, heads, 2), dtype=dtype),
        key.new_empty((key.size(0), *by_key) if keep_scores else (0,), dtype=dtype),
    )


@_fake(pool_backward)
def _pool_backward_fake(key, value, score_weight, gate, grad_mask):
    gate = key if gate is None else gate
    return _gradients(grad_mask, key=key, value=value, score_weight=score_weight, gate=gate)


# ---- The kernels of CUDA tensors ----


def _accelerated(name: str) -> Callable:
    """The implementation of an op that hands on to the backend its last argument names."""

    def kernel(*arguments):
        if arguments[-1] == "cuda":
            return getattr(torch.ops.attn_ext_cuda, name)(*arguments)
        launch = importlib.import_module(".triton_kernels.launch", __package__)
        return getattr(launch, name)(*arguments[:-1])

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
