"""Additive attention in plain PyTorch: the definition of correct, and the last-resort backend."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import layout
from .checks import check_flag, check_probability, records_lengths, without_autocast
from .features import with_features
from .layout import KeySide, QuerySide

if TYPE_CHECKING:
    from .pooling import PoolSide

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
    keys = with_features(keys, features, feature_weight, queries, "reference")
    return attend(queries, keys, dropout_p, seed, need_weights)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed from the device's default generator; it stays on the device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


class _Places(NamedTuple):
    """The padded form ``[B, T]`` in which the rows of a side are computed with."""

    valid: Tensor  # which places hold rows that are there and not ignored
    numbers: Tensor | None  # the jagged row that a place takes; None: rows are padded themselves
    total: int  # rows of the side

    def take(self, rows: Tensor) -> Tensor:
        """Rows in the compute dtype, zero where not valid (whatever NaN the memory holds)."""
        if self.numbers is not None:
            if records_lengths() or self.total == 0:  # nothing to index; all is padding
                rows = torch.cat([rows, rows.new_zeros((1, 1, *rows.shape[2:]))], 1)
            rows = rows[0][self.numbers.where(self.valid, 0)]
        rows = rows.masked_fill(~self.valid[:, :, None, None], 0)
        return rows if rows.dtype == torch.float64 else rows.float()

    def give_back(self, padded: Tensor, absent: float = 0) -> Tensor:
        """Jagged rows ``[1, total, ...]`` of ``[B, T, ...]``, ``absent`` where nobody's."""
        if self.numbers is None:
            return padded
        # Padding goes to one row too many.
        rows = padded.new_full((self.total + 1, *padded.shape[2:]), absent)
        rows = rows.index_put((self.numbers.where(self.valid, self.total),), padded)
        return rows[: self.total].unsqueeze(0)


def _query_places(queries: QuerySide, keys: KeySide) -> _Places:
    return _places(queries.query, queries.cu_seqlens_q, keys.batch_size, queries.max_seqlen_q)


def _key_places(keys: KeySide) -> _Places:
    places = _places(keys.key, keys.cu_seqlens_k, keys.batch_size, keys.max_seqlen_k)
    valid = places.valid
    if keys.key_lengths is not None:
        position = torch.arange(valid.size(1), device=valid.device)
        valid = valid & (position < keys.key_lengths[:, None])
    if keys.key_padding_mask is not None:
        valid = valid & ~keys.key_padding_mask
    return places._replace(valid=valid)


def _places(rows: Tensor, cu: Tensor | None, batch: int, max_seqlen: int) -> _Places:
    total = rows.size(1)
    if cu is None:
        valid = torch.ones((batch, max_seqlen), dtype=torch.bool, device=rows.device)
        return _Places(valid, None, total)
    cu = cu.to(torch.int64).clamp(0, total)  # corrupt offsets stay inside the rows
    if records_lengths():
        longest = torch.cat([cu[1:] - cu[:-1], cu.new_zeros(1)]).max()
        # In a trace a tensor, so that the trace computes it anew from the offsets.
        max_seqlen = longest if torch.jit.is_tracing() else longest.item()  # type: ignore[assignment]
    elif max_seqlen >= total and batch > 1:  # padding to no useful bound could take any memory
        max_seqlen = int(cu.diff().max().item())
    numbers = cu[:-1, None] + torch.arange(max_seqlen, device=rows.device)
    return _Places(numbers < cu[1:, None], numbers, total)


def attend(
    queries: QuerySide, keys: KeySide, dropout_p: float, seed: Tensor | None, need_weights: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Pad whatever the layout is, compute by the formulas of the paper, and undo the padding."""
    of_queries, of_keys = _query_places(queries, keys), _key_places(keys)
    query = of_queries.take(queries.query)  # [B, Tq, H, D]
    key = of_keys.take(keys.key)  # [B, Tk, H, D]
    value = of_keys.take(keys.value)  # [B, Tk, H, Dv]
    with without_autocast(query.device.type):
        padded_scores = _scores_padded(query, key, keys.score_weight)
        context, weights = _weigh(padded_scores, value, of_keys.valid, dropout_p, seed)
    context = queries.restore_context(of_queries.give_back(context.to(keys.value.dtype)))
    if not need_weights:
        return context
    weights = weights.to(keys.value.dtype)
    return context, _restore_weights(weights, queries, keys, of_queries, of_keys, 0)


def scores(queries: QuerySide, keys: KeySide) -> Tensor:
    """The scores of :func:`attn_ext.additive_scores`, padded for the while as in attention."""
    of_queries, of_keys = _query_places(queries, keys), _key_places(keys)
    query, key = of_queries.take(queries.query), of_keys.take(keys.key)
    with without_autocast(query.device.type):
        padded = _scores_padded(query, key, keys.score_weight)
    padded = padded.masked_fill(_ignored(of_keys.valid), -torch.inf)
    return _restore_weights(padded, queries, keys, of_queries, of_keys, -torch.inf)


def pool(
    side: "PoolSide", feature_dropout: tuple[float, float], dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Context and weights of :func:`attn_ext.additive_pool`, in the internal form."""
    keys, of_keys = side.keys, _key_places(side.keys)
    value = of_keys.take(keys.value)
    with without_autocast(value.device.type):
        padded_scores = _branch_scores(side, of_keys, feature_dropout, seed)
        context, weights = _weigh(padded_scores, value, of_keys.valid, dropout_p, seed)
    weights = _restore_branches(weights, keys, of_keys, 0)
    return context.to(keys.value.dtype), weights.to(keys.value.dtype)


def pool_scores(
    side: "PoolSide", feature_dropout: tuple[float, float], seed: Tensor | None
) -> Tensor:
    """The scores of keys alone of :func:`attn_ext.additive_scores`, in the internal form."""
    of_keys = _key_places(side.keys)
    with without_autocast(side.keys.key.device.type):
        padded = _branch_scores(side, of_keys, feature_dropout, seed)
    padded = padded.masked_fill(_ignored(of_keys.valid), -torch.inf)
    return _restore_branches(padded, side.keys, of_keys, -torch.inf)


def _branch_scores(
    side: "PoolSide",
    of_keys: _Places,
    feature_dropout: tuple[float, float],
    seed: Tensor | None,
) -> Tensor:
    """``e_kj = w_k . h_j``, [B, H, K, Tk], of hidden rows ``h_j = tanh(k_j) * sigmoid(g_j)``."""
    hidden = torch.tanh(of_keys.take(side.keys.key))  # [B, Tk, H, D]
    if side.gate is not None:
        hidden = hidden * torch.sigmoid(of_keys.take(side.gate))
    for factor, dropped in enumerate(feature_dropout):
        if seed is not None and dropped > 0:
            keep = feature_keep_mask(seed, dropped, hidden.shape, factor)
            hidden = hidden * keep / (1 - dropped) if dropped < 1 else hidden * 0
    by_branch = [(hidden * row.to(hidden.dtype)).sum(-1) for row in side.score_weight.unbind(1)]
    if not by_branch:
        return hidden.new_zeros((hidden.size(0), hidden.size(2), 0, hidden.size(1)))
    return torch.stack(by_branch, -1).permute(0, 2, 3, 1)


def _restore_weights(
    weights: Tensor,
    queries: QuerySide,
    keys: KeySide,
    of_queries: _Places,
    of_keys: _Places,
    absent: float,
) -> Tensor:
    """Padded ``[B, H, Tq, Tk]`` in the caller's layout, with ``absent`` where nobody attends."""
    weights = weights.masked_fill(~of_queries.valid[:, None, :, None], absent)
    weights_layout = layout.weights_layout(queries, keys)
    if weights_layout == layout.JAGGED_WEIGHTS:
        weights = _by_key(weights, of_keys, absent).squeeze(2)
    else:
        weights = _pad_to(weights, keys, absent, queries.max_seqlen_q)
    return queries.restore_weights(weights, weights_layout)


def _restore_branches(weights: Tensor, keys: KeySide, of_keys: _Places, absent: float) -> Tensor:
    """Padded ``[B, H, K, Tk]`` as the pool ops have it."""
    if of_keys.numbers is None:
        return _pad_to(weights, keys, absent)
    return _by_key(weights, of_keys, absent)


def _by_key(weights: Tensor, of_keys: _Places, absent: float) -> Tensor:
    """Padded ``[B, H, Tq, Tk]`` of jagged keys as ``[total_k, H, Tq]``."""
    return of_keys.give_back(weights.permute(0, 3, 1, 2), absent).squeeze(0)


def _ignored(valid: Tensor) -> Tensor:
    """Of scores ``[B, H, Tq, Tk]``."""
    return ~valid[:, None, None, :]


def _pad_to(
    weights: Tensor, keys: KeySide, absent: float, max_queries: int | None = None
) -> Tensor:
    """With the bounds' shape, which may be more than the longest rows'."""
    if records_lengths():
        return weights
    queries = weights.size(2) if max_queries is None else max_queries
    more = (queries - weights.size(2), keys.max_seqlen_k - weights.size(3))
    return torch.nn.functional.pad(weights, (0, more[1], 0, more[0]), value=absent)


def _weigh(
    scores: Tensor, value: Tensor, key_valid: Tensor, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``alpha = softmax_j(e)`` of scores ``[B, H, Tq, Tk]``, ``c_i = sum_j alpha_ij h_j``."""
    ignored = _ignored(key_valid)
    nothing_left = ignored.all(-1, keepdim=True)  # such a softmax would be NaN
    weights = scores.masked_fill(ignored & ~nothing_left, -torch.inf).softmax(-1)
    weights = weights.masked_fill(ignored, 0)
    if seed is not None and dropout_p > 0:
        keep = dropout_keep_mask(seed, dropout_p, weights.shape)
        weights = weights * keep / (1 - dropout_p) if dropout_p < 1 else weights * 0
    return torch.einsum("bhqk,bkhv->bqhv", weights, value), weights


def _scores_padded(query: Tensor, key: Tensor, score_weight: Tensor) -> Tensor:
    """``e_ij = w . tanh(q_i + k_j)``, [B, H, Tq, Tk]."""
    hidden = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1))  # [B, Tq, Tk, H, D]
    # A sum of products: one long dot product, as einsum would make of it, rounds worse.
    return (hidden * score_weight.to(hidden.dtype)).sum(-1).permute(0, 3, 1, 2)


def dropout_keep_mask(seed: Tensor, dropout_p: float, shape: torch.Size) -> Tensor:
    """Which attention weights ``[B, H, Tq, Tk]`` survive dropout, the same on every backend.

    A weight is kept where the first word of :func:`_philox` with the counter (key position, query
    position, head, sequence), of it the first 24 bits as a fraction, is at least ``dropout_p``. In
    pooling the branch is the query position.
    """
    batch, head, query, key = _axes_of(shape, seed)
    counter = [axis.expand(shape) for axis in (key, query, head, batch)]
    return _kept(_philox(counter, seed)[0], dropout_p)


def feature_keep_mask(seed: Tensor, dropout_p: float, shape: torch.Size, factor: int = 0) -> Tensor:
    """Which entries of the hidden rows ``[B, Tk, H, D]`` survive, the same on every backend.

    Feature ``d`` takes word ``d % 4`` of :func:`_philox` with the counter (key position,
    ``d // 4``, ``2^32 - 1 - (2 head + factor)``, sequence), the factor being 0 for the tanh and 1
    for the gate. Attention weights of the same seed have lower numbers of heads, so never the same
    counter.
    """
    groups = torch.Size((*shape[:-1], -(-shape[-1] // 4)))
    batch, key, head, group = _axes_of(groups, seed)
    numbers = (key, group, 0xFFFFFFFF - (2 * head + factor), batch)
    words = _philox([number.expand(groups) for number in numbers], seed)
    return _kept(torch.stack(words, -1), dropout_p).flatten(-2)[..., : shape[-1]]


def _axes_of(shape: torch.Size, seed: Tensor) -> list[Tensor]:
    """The positions along each axis, to be broadcast against the others."""
    return [
        torch.arange(size, device=seed.device).view([-1 if axis == i else 1 for axis in range(4)])
        for i, size in enumerate(shape)
    ]


def _kept(word: Tensor, dropout_p: float) -> Tensor:
    """Compared as integers, as the kernels do: in float32 ``dropout_p`` may be less than it is."""
    return word >> 8 >= math.ceil(dropout_p * 2**24)


def _philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """The four words of Philox-4x32-10 with the int64 ``seed[0]`` as key.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    word = 0xFFFFFFFF
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
    return counter
