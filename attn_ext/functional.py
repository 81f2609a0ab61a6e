"""The public function: checks, the internal form, and the choice of a backend."""

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from . import autograd, backends, layout, pooling, reference
from .checks import (
    check_flag,
    check_probability,
    exports_to_onnx,
    mismatch,
    resolve_deterministic,
)
from .features import attend_with_term, with_features
from .layout import KeySide, QuerySide

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        cu_seqlens_q: Tensor | None
        cu_seqlens_k: Tensor | None
        max_seqlen_q: int | None
        max_seqlen_k: int | None
        key_padding_mask: Tensor | None
        key_lengths: Tensor | None
        features: Tensor | None
        feature_weight: Tensor | None
        dropout_p: float
        deterministic: bool | None
        backend: str | None


# For type checkers: what is returned depends on need_weights.
@overload
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    need_weights: Literal[False] = False,
    **options: "Unpack[_Options]",
) -> Tensor: ...


@overload
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    need_weights: Literal[True],
    **options: "Unpack[_Options]",
) -> tuple[Tensor, Tensor]: ...


@overload
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    need_weights: bool,
    **options: "Unpack[_Options]",
) -> Tensor | tuple[Tensor, Tensor]: ...


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with additive scores: ``softmax_j(w . tanh(q_i + k_j))`` weighs the values.

    The additive ("Bahdanau") attention of Bahdanau, Cho and Bengio, "Neural Machine Translation by
    Jointly Learning to Align and Translate" (ICLR 2015), with queries and keys already projected:
    ``e_ij = sum_d w_d tanh(q_id + k_jd)``, ``alpha_ij = softmax_j(e_ij)`` over the keys of the
    query's own sequence, ``context_i = sum_j alpha_ij value_j``. Nothing of size Tq * Tk * D is
    stored, forward or backward.

    Args:
        query: ``(B, Tq, D)``; one query a sequence ``(B, D)``; jagged ``(total_q, D)``; or a jagged
            nested tensor. float32, float16, bfloat16 or float64.
        key: ``(B, Tk, D)``, jagged ``(total_k, D)`` or nested, whatever query is; query's dtype.
        value: as key with ``Dv`` features; float64 goes only with float64.
        score_weight: ``(D,)``, or ``(H, D)`` for H heads: then every other tensor has an H axis
            before its last.
        cu_seqlens_q: ``(B + 1,)`` int32 or int64 offsets of jagged queries, in rows, starting at
            0. Rows past the last offset belong to no sequence.
        cu_seqlens_k: the same for keys and values.
        max_seqlen_q: the rows of the longest query sequence, or more. Given, nothing synchronises
            with an accelerator.
        max_seqlen_k: the same for keys.
        key_padding_mask: ``(B, Tk)`` bool, True = ignore that key (padded keys).
        key_lengths: ``(B,)`` int32 or int64, the valid prefix of each row of keys (padded keys).
        features: ``(B, Tk, F)`` or, beside jagged keys, ``(total_k, F)``; key's dtype. One more
            term of each score, ``w . tanh(q + k_j + f_j U)``, as of location-sensitive attention
            and coverage; only with one query a sequence.
        feature_weight: U, ``(F, D)``, with heads ``(F, H, D)``.
        dropout_p: probability to drop an attention weight; kept ones are scaled by
            ``1 / (1 - dropout_p)``.
        need_weights: also return the attention weights (after dropout).
        deterministic: repeat results bit for bit; None follows
            ``torch.are_deterministic_algorithms_enabled()``.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best available.

    Returns:
        The context, in value's dtype: ``(B, Tq, Dv)``, ``(B, Dv)``, ``(total_q, Dv)``, or nested
        as query is. With ``need_weights``, ``(context, weights)``, weights in the same dtype and
        ``(B, Tq, Tk)``, ``(B, Tk)`` for one query a sequence, and ``(total_k,)`` for one query a
        jagged sequence of keys. Otherwise the axis of a jagged side is as long as its longest
        sequence (``max_seqlen_*`` where given), with zeros outside. Heads add an axis before Tq, or
        ``(B, H, Tk)`` and ``(total_k, H)``. A sequence without keys gets context and weights 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, layout or value, or an unavailable backend. The message
            names the argument, what was expected and what came. Values on an accelerator are
            checked under ``ATTN_EXT_CHECK=1`` only.
        RuntimeError: a second derivative, or forward mode, on another backend than "reference".

    Differentiable once in query, key, value, score_weight, features and feature_weight, through
    context and weights; on the "reference" backend any number of times. ``torch.func.grad``,
    ``vjp`` and ``vmap`` work. ``torch.jit.trace`` and ``torch.onnx.export`` are right at other
    lengths; they may record the ordinary operations of the "reference" backend, whatever the
    backend.

    Example:
        >>> import torch, attn_ext
        >>> states, query = torch.randn(7, 4), torch.randn(2, 4)
        >>> score_weight = torch.randn(4, requires_grad=True)
        >>> context, weights = attn_ext.additive_attention(  # two sources, of 3 and 4 states
        ...     query, states, states, score_weight,
        ...     cu_seqlens_k=torch.tensor([0, 3, 7]), need_weights=True,
        ... )
        >>> context.shape, weights.shape
        (torch.Size([2, 4]), torch.Size([7]))
        >>> scores = torch.tanh(query[0] + states[:3]) @ score_weight
        >>> torch.allclose(weights[:3], scores.softmax(0), atol=1e-6)
        True
        >>> torch.allclose(context[0], weights[:3] @ states[:3], atol=1e-6)
        True
        >>> context.sum().backward()
        >>> score_weight.grad.shape
        torch.Size([4])
    """
    check_flag("need_weights", need_weights)
    keys = layout.check_key_side(
        key,
        value,
        score_weight,
        cu_seqlens_k,
        max_seqlen_k,
        key_padding_mask,
        key_lengths,
        need_weights,
    )
    queries = layout.check_query_side(query, keys, cu_seqlens_q, max_seqlen_q, need_weights)
    dropout_p = check_probability("dropout_p", dropout_p)
    deterministic = resolve_deterministic(deterministic)
    backend = backends.choose(backend, queries.query.device, queries.query.dtype)
    keys = with_features(keys, features, feature_weight, queries, backend)
    return attend(queries, keys, dropout_p, need_weights, deterministic, backend)


def additive_scores(
    query: Tensor | None,
    key: Tensor,
    score_weight: Tensor,
    *,
    gate: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    feature_dropout_p: float | tuple[float, float] = 0.0,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score without attending: ``e_ij = w . tanh(q_i + k_j)``, for one's own normaliser.

    The scores of :func:`additive_attention`, before its softmax: for pointer networks, whose
    log-probabilities are ``scores.log_softmax(-1)`` (Vinyals, Fortunato and Jaitly, "Pointer
    Networks", NeurIPS 2015), sigmoid or monotonic attention, a temperature. Nothing of size
    Tq * Tk * D is stored, forward or backward.

    Args:
        query: as in :func:`additive_attention`. None: scores of the keys alone,
            ``e_j = w . tanh(k_j)``, shaped as for one query a sequence; those of
            :func:`attn_ext.additive_pool`.
        key: as in :func:`additive_attention`.
        score_weight: ``(D,)``, or ``(H, D)`` for H heads. Without a query ``(K, D)`` also gives K
            scores of each of the keys ``(B, Tk, D)``, ``(total_k, D)`` or nested.
        gate: only without a query: as key, ``e_j = w . (tanh(k_j) * sigmoid(gate_j))``.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_padding_mask, key_lengths,
            features, feature_weight, deterministic, backend: as in :func:`additive_attention`.
        feature_dropout_p: only without a query: as in :func:`attn_ext.additive_pool`.

    Returns:
        float32 (float64 for float64) of the shape of :func:`additive_attention`'s weights, or of
        :func:`attn_ext.additive_pool`'s for K scores a key. Keys that are ignored or not there
        have the score -inf, through which no gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`additive_attention`.

    Differentiable once in all tensors; on the "reference" backend any number of times.

    Example:
        >>> import torch, attn_ext
        >>> points, query = torch.randn(2, 5, 4), torch.randn(2, 4)
        >>> lengths, target = torch.tensor([5, 3]), torch.tensor([4, 0])
        >>> scores = attn_ext.additive_scores(query, points, torch.ones(4), key_lengths=lengths)
        >>> scores.shape, scores[1, 3:]
        (torch.Size([2, 5]), tensor([-inf, -inf]))
        >>> loss = torch.nn.functional.cross_entropy(scores, target)
    """
    if query is None:
        for name, given in (
            ("cu_seqlens_q", cu_seqlens_q),
            ("max_seqlen_q", max_seqlen_q),
            ("features", features),
            ("feature_weight", feature_weight),
        ):
            if given is not None:
                raise mismatch(name, "None without a query", type(given).__name__)
        keys_alone = (cu_seqlens_k, max_seqlen_k, key_padding_mask, key_lengths)
        side = pooling.check_pool_side(key, key, score_weight, gate, *keys_alone, scores_only=True)
        feature_dropout = pooling.check_feature_dropout(
            "feature_dropout_p", feature_dropout_p, gate is not None
        )
        deterministic = resolve_deterministic(deterministic)
        backend = backends.choose(backend, side.keys.key.device, side.keys.key.dtype)
        return pooling.scores(side, feature_dropout, deterministic, backend)
    if gate is not None:
        raise mismatch("gate", "None with a query", type(gate).__name__)
    if feature_dropout_p not in (0.0, (0.0, 0.0)):
        raise mismatch("feature_dropout_p", "0.0 with a query", str(feature_dropout_p))
    keys = layout.check_key_side(
        key,
        key,
        score_weight,
        cu_seqlens_k,
        max_seqlen_k,
        key_padding_mask,
        key_lengths,
        need_max=True,
        scores_only=True,
    )
    queries = layout.check_query_side(query, keys, cu_seqlens_q, max_seqlen_q, need_max=True)
    deterministic = resolve_deterministic(deterministic)
    backend = backends.choose(backend, queries.query.device, queries.query.dtype)
    keys = with_features(keys, features, feature_weight, queries, backend)
    return score(queries, keys, deterministic, backend)


def score(queries: QuerySide, keys: KeySide, deterministic: bool, backend: str) -> Tensor:
    """Scores with everything checked and chosen."""
    weights_layout = layout.weights_layout(queries, keys)
    if backend == "reference" or _must_be_plain(queries, keys, weights_layout, backend):
        return reference.scores(queries, keys)
    raw = weights_layout | layout.RAW
    _, scores = _call(queries, keys, 0.0, None, raw, deterministic, backend)
    return queries.restore_weights(scores, weights_layout)


def attend(
    queries: QuerySide,
    keys: KeySide,
    dropout_p: float,
    need_weights: bool,
    deterministic: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with everything checked and chosen."""
    seed = reference.draw_seed(queries.query.device) if dropout_p > 0 else None
    weights_layout = layout.weights_layout(queries, keys) if need_weights else 0
    if backend == "reference" or _must_be_plain(queries, keys, weights_layout, backend):
        return reference.attend(queries, keys, dropout_p, seed, need_weights)
    context, weights = _call(queries, keys, dropout_p, seed, weights_layout, deterministic, backend)
    return queries.restore(context, weights, weights_layout)


def _call(
    queries: QuerySide,
    keys: KeySide,
    dropout_p: float,
    seed: Tensor | None,
    weights_layout: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op's context and weights, in the internal form."""
    call = autograd.forward if keys.features is None else attend_with_term
    context, weights, *_ = call(
        **(queries._asdict() | keys._asdict()),
        dropout_p=dropout_p,
        dropout_seed=seed,
        weights_layout=weights_layout,
        keep_scores=False,  # autograd decides
        deterministic=deterministic,
        backend=backend,
    )
    return context, weights


def _must_be_plain(queries: QuerySide, keys: KeySide, weights_layout: int, backend: str) -> bool:
    """Whether a graph is being recorded in which only ordinary operations are right.

    ONNX has no others. In a trace of ``torch.jit`` the op's bounds and the axes of its dense jagged
    weights are constants; of the backends only the CPU's kernels need bounds for nothing else.
    """
    is_jagged = queries.cu_seqlens_q is not None or keys.cu_seqlens_k is not None
    dense_jagged = weights_layout == layout.DENSE_WEIGHTS and is_jagged
    traced_rightly = backend == "cpu" and not dense_jagged
    return exports_to_onnx() or (torch.jit.is_tracing() and not traced_rightly)
