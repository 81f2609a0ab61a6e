"""Additive attention in plain PyTorch: the definition of correct, and the last-resort backend."""

import contextlib

import torch
from torch import Tensor

from . import layout
from .checks import check_flag, check_probability, records_lengths
from .features import with_features
from .layout import KeySide, QuerySide

__all__ = ["additive_attention", "dropout_keep_mask"]


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
    """Compute :func:`attn_ext.additive_attention` with ordinary differentiable PyTorch operations.

    Arguments, layouts, results and errors are those of :func:`attn_ext.additive_attention`. It
    stores ``B * Tq * Tk * D`` values and may be differentiated any number of times.
    ``deterministic`` and ``backend`` change nothing: it is what it is.
    """
    check_flag("need_weights", need_weights)
    check_flag("deterministic", deterministic, optional=True)
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
    seed = draw_seed(query.device) if dropout_p > 0 else None
    with with_features(keys, features, feature_weight, queries, "reference") as keys:
        return attend(queries, keys, dropout_p, seed, need_weights)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed from the device's default generator; it stays on the device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def attend(
    queries: QuerySide, keys: KeySide, dropout_p: float, seed: Tensor | None, need_weights: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Pad whatever the layout is, compute by the formulas of the paper, and undo the padding."""
    query_rows, query_valid = _query_rows(queries, keys)
    key_rows, key_valid = _key_rows(keys)
    query = _take(queries.query, query_rows, query_valid)  # [B, Tq, H, D]
    key = _take(keys.key, key_rows, key_valid)  # [B, Tk, H, D]
    value = _take(keys.value, key_rows, key_valid)  # [B, Tk, H, Dv]
    with _without_autocast(query.device.type):
        context, weights = _attend_padded(
            query, key, value, keys.score_weight, key_valid, dropout_p, seed
        )
    context = context.to(keys.value.dtype)
    if query_rows is not None:
        context = _scatter(context, query_rows, query_valid, queries.query.size(1))
    context = queries.restore_context(context)
    if not need_weights:
        return context
    weights = weights.to(keys.value.dtype)
    return context, _restore_weights(weights, queries, keys, 0)


def scores(queries: QuerySide, keys: KeySide) -> Tensor:
    """The scores of :func:`attn_ext.additive_scores`, padded for the while as in attention."""
    query = _take(queries.query, *_query_rows(queries, keys))
    key_rows, key_valid = _key_rows(keys)
    with _without_autocast(query.device.type):
        padded = _scores_padded(query, _take(keys.key, key_rows, key_valid), keys.score_weight)
    padded = padded.masked_fill(~key_valid[:, None, None, :], -torch.inf)
    return _restore_weights(padded, queries, keys, -torch.inf)


def _query_rows(queries: QuerySide, keys: KeySide) -> tuple[Tensor | None, Tensor]:
    """As :func:`_rows` gives them."""
    return _rows(queries.query, queries.cu_seqlens, keys.batch_size, queries.max_seqlen)


def _key_rows(keys: KeySide) -> tuple[Tensor | None, Tensor]:
    """The same; ignored keys are not real."""
    key_rows, key_valid = _rows(keys.key, keys.cu_seqlens, keys.batch_size, keys.max_seqlen)
    if keys.lengths is not None:
        position = torch.arange(key_valid.size(1), device=key_valid.device)
        key_valid = key_valid & (position < keys.lengths[:, None])
    if keys.padding_mask is not None:
        key_valid = key_valid & ~keys.padding_mask
    return key_rows, key_valid


def _restore_weights(weights: Tensor, queries: QuerySide, keys: KeySide, absent: float) -> Tensor:
    """Padded ``[B, H, Tq, Tk]`` in the caller's layout, with ``absent`` where nobody attends."""
    _, query_valid = _query_rows(queries, keys)
    weights = weights.masked_fill(~query_valid[:, None, :, None], absent)
    weights_layout = layout.weights_layout(queries, keys)
    key_rows, key_valid = _key_rows(keys)
    if key_rows is not None and weights_layout == layout.JAGGED_WEIGHTS:
        by_key = weights.squeeze(2).transpose(1, 2)  # [B, Tk, H]
        weights = _scatter(by_key, key_rows, key_valid, keys.key.size(1), absent).squeeze(0)
    elif not records_lengths():  # the shape is the bounds', perhaps more than the longest rows
        more = (queries.max_seqlen - weights.size(2), keys.max_seqlen - weights.size(3))
        weights = torch.nn.functional.pad(weights, (0, more[1], 0, more[0]), value=absent)
    return queries.restore_weights(weights, weights_layout)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if device_type == "meta":  # which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    key_valid: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``e_ij = w . tanh(q_i + k_j)``, ``alpha = softmax_j(e)``, ``c_i = sum_j alpha_ij h_j``."""
    scores = _scores_padded(query, key, score_weight)
    ignored = ~key_valid[:, None, None, :]  # [B, 1, 1, Tk]
    nothing_left = ignored.all(-1, keepdim=True)  # such a softmax would be NaN
    weights = scores.masked_fill(ignored & ~nothing_left, -torch.inf).softmax(-1)
    weights = weights.masked_fill(ignored, 0)
    if seed is not None:
        keep = dropout_keep_mask(seed, dropout_p, weights.shape)
        weights = weights * keep / (1 - dropout_p) if dropout_p < 1 else weights * 0
    return torch.einsum("bhqk,bkhv->bqhv", weights, value), weights


def _scores_padded(query: Tensor, key: Tensor, score_weight: Tensor) -> Tensor:
    """``e_ij = w . tanh(q_i + k_j)``, [B, H, Tq, Tk]."""
    hidden = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1))  # [B, Tq, Tk, H, D]
    # A sum of products: one long dot product, as einsum would make of it, rounds worse.
    return (hidden * score_weight.to(hidden.dtype)).sum(-1).permute(0, 3, 1, 2)


def _rows(
    rows: Tensor, cu: Tensor | None, batch: int, max_seqlen: int
) -> tuple[Tensor | None, Tensor]:
    """Row numbers ``[B, T]`` of a padded view of jagged rows, and which of its places are real."""
    if cu is None:
        return None, torch.ones((batch, max_seqlen), dtype=torch.bool, device=rows.device)
    total = rows.size(1)
    cu = cu.to(torch.int64).clamp(0, total)  # corrupt offsets stay inside the rows
    if records_lengths():
        longest = torch.cat([cu[1:] - cu[:-1], cu.new_zeros(1)]).max()
        # In a trace a tensor, so that the trace computes it anew from the offsets.
        max_seqlen = longest if torch.jit.is_tracing() else longest.item()  # type: ignore[assignment]
    elif max_seqlen >= total and batch > 1:  # padding to no useful bound could take any memory
        max_seqlen = int(cu.diff().max().item())
    numbers = cu[:-1, None] + torch.arange(max_seqlen, device=rows.device)
    return numbers, numbers < cu[1:, None]


def _take(rows: Tensor, numbers: Tensor | None, valid: Tensor) -> Tensor:
    """Padded rows in the compute dtype, zero where not real (whatever NaN the memory holds)."""
    if numbers is not None:
        if records_lengths() or rows.size(1) == 0:  # nothing to index; all is padding
            rows = torch.cat([rows, rows.new_zeros((1, 1, *rows.shape[2:]))], 1)
        rows = rows[0][numbers.where(valid, 0)]
    rows = rows.masked_fill(~valid[:, :, None, None], 0)
    return rows if rows.dtype == torch.float64 else rows.float()


def _scatter(
    padded: Tensor, numbers: Tensor, valid: Tensor, total: int, absent: float = 0
) -> Tensor:
    """Jagged rows ``[1, total, ...]`` from padded ones ``[B, T, ...]``, ``absent`` if nobody's."""
    # Padding goes to one row too many.
    rows = padded.new_full((total + 1, *padded.shape[2:]), absent)
    return rows.index_put((numbers.where(valid, total),), padded)[:total].unsqueeze(0)


def dropout_keep_mask(seed: Tensor, dropout_p: float, shape: torch.Size) -> Tensor:
    """Which attention weights ``[B, H, Tq, Tk]`` survive dropout, the same on every backend.

    Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the
    counter (key position, query position, head, sequence) and the int64 ``seed[0]`` as key; a
    weight is kept where the first output word, as a fraction of 2^32, is at least ``dropout_p``.
    """
    word = 0xFFFFFFFF
    batch, head, query, key = (
        torch.arange(size, device=seed.device).view([-1 if axis == i else 1 for axis in range(4)])
        for i, size in enumerate(shape)
    )
    counter = [axis.expand(shape) for axis in (key, query, head, batch)]
    round_keys = [seed[0] & word, (seed[0] >> 32) & word]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # exact modulo 2^64
        counter = [
            (second >> 32) & word ^ counter[1] ^ round_keys[0],
            second & word,
            (first >> 32) & word ^ counter[3] ^ round_keys[1],
            first & word,
        ]
        round_keys = [(round_keys[0] + 0x9E3779B9) & word, (round_keys[1] + 0xBB67AE85) & word]
    uniform = (counter[0] >> 8).to(torch.float32) * 2.0**-24
    return uniform >= dropout_p
