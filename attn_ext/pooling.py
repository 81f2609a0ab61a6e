"""Attention pooling: keys that are scored without a query, by the rows of the score weights.

Internally keys, gates and values are as :mod:`attn_ext.layout` has them, and score weights are
``[H, K, D]``: K branches over the hidden rows of each head, which take the place of its queries.
Pooling has one head, scores of keys with heads have one branch.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from . import autograd, backends, layout, reference
from .checks import (
    check_flag,
    check_floating,
    check_probability,
    check_tensor,
    exports_to_onnx,
    mismatch,
    resolve_deterministic,
    shape_of,
)
from .layout import KeySide
from .nested import values_like

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        gate: Tensor | None
        cu_seqlens_k: Tensor | None
        max_seqlen_k: int | None
        key_padding_mask: Tensor | None
        key_lengths: Tensor | None
        feature_dropout_p: float | tuple[float, float]
        dropout_p: float
        deterministic: bool | None
        backend: str | None


class PoolSide(NamedTuple):
    """Checked keys, gates and score weights, and how to shape the results."""

    keys: KeySide  # whose own score_weight means nothing here
    gate: Tensor | None  # [Bk, Nk, H, D]
    score_weight: Tensor  # [H, K, D]
    has_branches: bool

    def weights_layout(self) -> int:  # a property of it PyTorch 2.10 cannot compile
        """``[B, H, K, Tk]``, or of jagged keys ``[total_k, H, K]``."""
        jagged = self.keys.cu_seqlens_k is not None
        return layout.JAGGED_WEIGHTS if jagged else layout.DENSE_WEIGHTS

    def restore_context(self, context: Tensor) -> Tensor:
        """Shape an internal context ``[B, K, H, Dv]`` as the caller's layout has it."""
        return self._squeeze(context, 1, 2)

    def restore_weights(self, weights: Tensor) -> Tensor:
        """The same of weights."""
        return self._squeeze(weights, 2, 1)

    def _squeeze(self, result: Tensor, branches: int, heads: int) -> Tensor:
        absent = {branches: not self.has_branches, heads: not self.keys.has_heads}
        for axis in (2, 1):  # one at a time, as in QuerySide.restore_context
            result = result.squeeze(axis) if absent[axis] else result
        return result


def check_pool_side(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    gate: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    scores_only: bool = False,
) -> PoolSide:
    """Check what is pooled. With ``scores_only`` there is no value, and heads are allowed."""
    check_tensor("key", key)
    check_floating("score_weight", score_weight)
    if score_weight.dim() not in (1, 2):
        raise mismatch("score_weight", "shape (D,) or (K, D)", shape_of(score_weight))
    has_branches = score_weight.dim() == 2
    if has_branches and scores_only and key.dim() == (4 if cu_seqlens_k is None else 3):
        has_branches = False
    row = score_weight
    if has_branches:
        features = score_weight.size(1)
        if key.dim() > 0 and key.size(-1) != features:
            expected = f"shape (K, {key.size(-1)}), with the features of key"
            raise mismatch("score_weight", expected, shape_of(score_weight))
        row = score_weight.new_empty(features)  # what all of its rows look like
    keys = layout.check_key_side(
        key,
        value,
        row,
        cu_seqlens_k,
        max_seqlen_k,
        key_padding_mask,
        key_lengths,
        scores_only=scores_only,
    )
    if gate is not None:
        gate = _check_gate(gate, key, keys)
    if not has_branches:
        score_weight = score_weight.unsqueeze(-2)
    if not keys.has_heads:
        score_weight = score_weight.unsqueeze(0)
    return PoolSide(keys, gate, score_weight, has_branches)


def _check_gate(gate: Tensor, key: Tensor, keys: KeySide) -> Tensor:
    """The gate in the internal form."""
    rows = keys.checked("gate", values_like("gate", gate, key))
    of_key = key.values() if key.is_nested else key
    if rows.shape != of_key.shape:
        raise mismatch("gate", f"shape {shape_of(of_key)}, as key", shape_of(rows))
    if keys.cu_seqlens_k is not None:
        rows = rows.unsqueeze(0)
    return rows if keys.has_heads else rows.unsqueeze(2)


def check_feature_dropout(
    name: str, probability: float | tuple[float, float], gated: bool
) -> tuple[float, float]:
    """The probabilities to drop a feature of the tanh and of the gate."""
    if not isinstance(probability, (tuple, list)):
        return check_probability(name, probability), 0.0
    if len(probability) != 2 or not gated:
        expected = "a probability or a pair (p_tanh, p_gate)" if gated else "one probability"
        expected += "" if gated else " without a gate"
        raise mismatch(name, expected, str(probability))
    of_tanh, of_gate = probability
    return check_probability(name, of_tanh), check_probability(name, of_gate)


# For type checkers: what is returned depends on need_weights.
@overload
def additive_pool(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    need_weights: Literal[False] = False,
    **options: "Unpack[_Options]",
) -> Tensor: ...


@overload
def additive_pool(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    need_weights: Literal[True],
    **options: "Unpack[_Options]",
) -> tuple[Tensor, Tensor]: ...


@overload
def additive_pool(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    need_weights: bool,
    **options: "Unpack[_Options]",
) -> Tensor | tuple[Tensor, Tensor]: ...


def additive_pool(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    gate: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    feature_dropout_p: float | tuple[float, float] = 0.0,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool each bag of values by attention: ``softmax_j(w . tanh(k_j))`` weighs them.

    The attention pooling of Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance
    Learning" (ICML 2018), with keys and gates already projected: the hidden rows are
    ``h_j = tanh(k_j)``, or gated ``tanh(k_j) * sigmoid(gate_j)``, the weights
    ``softmax_j(w . h_j)`` over the keys of a bag, the context the sum of its values so weighted.
    Nothing of size Tk * D is stored for backward.

    Args:
        key: ``(B, Tk, D)``, jagged ``(total_k, D)`` or a jagged nested tensor. float32, float16,
            bfloat16 or float64.
        value: as key with ``Dv`` features; float64 goes only with float64.
        score_weight: ``(D,)``, or ``(K, D)`` for K branches that share the hidden rows.
        gate: as key, or None for no gate.
        cu_seqlens_k, max_seqlen_k, key_padding_mask, key_lengths: as in
            :func:`attn_ext.additive_attention`.
        feature_dropout_p: probability to drop an entry of the hidden rows, kept ones being scaled
            by ``1 / (1 - p)``. ``(p_tanh, p_gate)`` drops entries of both factors independently.
        dropout_p: probability to drop an attention weight, with the same scaling.
        need_weights: also return the attention weights (after dropout).
        deterministic: as in :func:`attn_ext.additive_attention`.
        backend: as in :func:`attn_ext.additive_attention`.

    Returns:
        The context ``(B, Dv)``, with branches ``(B, K, Dv)``, in value's dtype; with
        ``need_weights`` also the weights, ``(B, Tk)`` or jagged ``(total_k,)``, with branches
        ``(B, K, Tk)`` or ``(total_k, K)``. A bag without keys gets context and weights 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, layout or value, or an unavailable backend. The message
            names the argument, what was expected and what came.
        RuntimeError: a second derivative, or forward mode, on another backend than "reference".

    Differentiable once in key, value, score_weight and gate, through context and weights; on the
    "reference" backend any number of times.

    Example:
        >>> import torch, attn_ext
        >>> patches, offsets = torch.randn(7, 4), torch.tensor([0, 3, 7])  # two bags
        >>> score_weight, gate = torch.randn(4), torch.randn(7, 4)
        >>> context, weights = attn_ext.additive_pool(
        ...     patches, patches, score_weight, gate=gate, cu_seqlens_k=offsets, need_weights=True
        ... )
        >>> context.shape, weights.shape
        (torch.Size([2, 4]), torch.Size([7]))
        >>> scores = (patches[:3].tanh() * gate[:3].sigmoid()) @ score_weight
        >>> torch.allclose(weights[:3], scores.softmax(0), atol=1e-6)
        True
        >>> torch.allclose(context[0], weights[:3] @ patches[:3], atol=1e-6)
        True
    """
    check_flag("need_weights", need_weights)
    side = check_pool_side(
        key,
        value,
        score_weight,
        gate,
        cu_seqlens_k,
        max_seqlen_k,
        key_padding_mask,
        key_lengths,
    )
    feature_dropout = check_feature_dropout(
        "feature_dropout_p", feature_dropout_p, gate is not None
    )
    dropout_p = check_probability("dropout_p", dropout_p)
    deterministic = resolve_deterministic(deterministic)
    device = side.keys.key.device
    backend = backends.choose(backend, device, side.keys.key.dtype)
    drops = dropout_p > 0 or any(probability > 0 for probability in feature_dropout)
    seed = reference.draw_seed(device) if drops else None
    if _must_be_plain(backend):
        context, weights = reference.pool(side, feature_dropout, dropout_p, seed)
    else:
        weights_layout = side.weights_layout() if need_weights else 0
        context, weights = _call(
            side, feature_dropout, dropout_p, seed, weights_layout, deterministic, backend
        )
    context = side.restore_context(context)
    return (context, side.restore_weights(weights)) if need_weights else context


def scores(
    side: PoolSide, feature_dropout: tuple[float, float], deterministic: bool, backend: str
) -> Tensor:
    """The scores of keys alone of :func:`attn_ext.additive_scores`, everything being checked."""
    seed = reference.draw_seed(side.keys.key.device) if any(feature_dropout) else None
    if _must_be_plain(backend):
        return side.restore_weights(reference.pool_scores(side, feature_dropout, seed))
    weights_layout = side.weights_layout() | layout.RAW
    _, raw = _call(side, feature_dropout, 0.0, seed, weights_layout, deterministic, backend)
    return side.restore_weights(raw)


def _must_be_plain(backend: str) -> bool:
    """Whether the reference's operations compute it, as in :mod:`attn_ext.functional`."""
    recorded = torch.jit.is_tracing() and backend != "cpu"
    return backend == "reference" or recorded or exports_to_onnx()


def _call(
    side: PoolSide,
    feature_dropout: tuple[float, float],
    dropout_p: float,
    seed: Tensor | None,
    weights_layout: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op's context and weights, in the internal form."""
    of_tanh, of_gate = feature_dropout
    arguments = side.keys._asdict() | {"score_weight": side.score_weight}
    context, weights, *_ = autograd.pool_forward(
        **arguments,
        gate=side.gate,
        tanh_dropout_p=of_tanh,
        gate_dropout_p=of_gate,
        dropout_p=dropout_p,
        dropout_seed=seed,
        weights_layout=weights_layout,
        keep_scores=False,  # autograd decides
        deterministic=deterministic,
        backend=backend,
    )
    return context, weights
