"""Launchers of the backward kernels."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import configurations
from .backward import additive_attention_bwd_scores_kernel
from .gradient import TILE_ROWS, additive_attention_grad_kernel
from .launch_forward import score_pairs
from .problem import (
    GRAD_KEY,
    RAW,
    Problem,
    as_rows,
    check_workspace,
    describe,
    is_constant,
    new_gradients,
    on_device,
    processors,
)
from .step import step_gradients
from .sums import sum_parts


@dataclass(frozen=True)
class PairTensor:
    """Numbers of (query, key) pairs: scores and weights of float32, or score gradients.

    They are [all queries, H, columns], in score gradients up to whole tiles of keys, 0 past a
    sequence's last; or without columns [longest sequence, all keys, H]. ``order`` is of
    :func:`rows.write_order`.
    """

    data: Tensor
    columns: int | None
    order: Tensor | None = None

    def strides(self, problem: Problem) -> tuple[int, int, int, int, int]:
        """Of a sequence's first query row, its first key row, a query, a key and a head."""
        heads, columns = problem.heads, self.columns
        if columns is None:
            return 0, heads, problem.all_rows_k * heads, heads, 1
        return heads * columns, 0, heads * columns, 1, columns


def additive_attention_backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    stats: Tensor,
    scores: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    weights_layout: int,
    grad_mask: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw, weights_layout = divmod(weights_layout, RAW)
    weighted = key[..., :0] if raw else value
    layout = cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k
    problem = describe(query, key, weighted, score_weight, *layout, dropout_p, dropout_seed)
    tensors = query, key, value, score_weight
    gradients, wanted = new_gradients(tensors, grad_mask)
    if is_constant(problem, dweights) or problem.all_rows_q == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    dquery, dkey, dvalue, dscore_weight = wanted
    incoming = dcontext, dweights, weights_layout
    softmax = None if raw else stats.contiguous()
    with on_device(query):
        if problem.is_one_step:
            kept = None if raw else (stats, scores)
            step_gradients(problem, incoming, kept, (None, None), wanted)
            return gradients
        wants_scores = any(gradient is not None for gradient in (dquery, dkey, dscore_weight))
        if dvalue is not None and dcontext is None:
            dvalue.zero_()
            dvalue = None
        pairs = None
        if not raw:
            if scores.numel() == 0:
                scores = score_pairs(problem)
            # vmap hands over one call's scores for all, by a stride of 0.
            pairs = PairTensor(scores.contiguous(), scores.size(-1))
        dscores = _score_gradients(problem, incoming, softmax, pairs, dvalue, wants_scores)
        if wants_scores and is_whole(problem):
            _gradient_pass(problem, dscores, True, True, dkey, dquery, dscore_weight)
        elif wants_scores:
            if dkey is not None or dscore_weight is not None:
                _gradient_pass(problem, dscores, True, False, dkey, None, dscore_weight)
            if dquery is not None:
                _gradient_pass(problem, dscores, False, False, dquery, None, None)
    return gradients


# ---- Several queries a sequence ----


def _score_gradients(
    problem: Problem,
    incoming: tuple,
    stats: Tensor | None,
    scores: PairTensor | None,
    dvalue: Tensor | None,
    wants_scores: bool,
) -> PairTensor | None:
    """Fill ``dvalue``, if any; return the gradients of scores, if wanted.

    Without ``stats`` those come in as gradients of weights, and ``scores`` are the weights.
    """
    query, value = problem.inputs.query.ptr, problem.inputs.value.ptr
    dcontext, dweights, _ = incoming
    if dweights is not None:
        dweights = dweights.contiguous()
    heads = problem.heads
    tiles = configurations.pair_tiles(value.dtype)
    columns = triton.cdiv(problem.max_k, tiles.keys) * tiles.keys  # whole tiles of keys
    dproducts, dscores, order = None, None, None
    if wants_scores:
        check_workspace(problem, problem.all_rows_q * heads * columns)
        # The gradient pass over queries alone reads some rows past a sequence's last and drops
        # their results: to mask them would spill. What nobody writes there is 0.
        more_rows = 0 if is_whole(problem) else TILE_ROWS.value
        new = value.new_zeros if more_rows else value.new_empty
        dproducts = new((problem.all_rows_q + more_rows, heads, columns), dtype=torch.float32)
        # Behind a softmax eager code rounds them too; those of returned scores are of float32.
        is_narrow = stats is not None and query.dtype == torch.bfloat16
        dscores = dproducts.view(torch.bfloat16) if is_narrow else dproducts
        if problem.is_ordered() and is_whole(problem):
            order = value.new_empty((2 * problem.sequences() + 1,), dtype=torch.int32)
    query_tiles = problem.tiles("q", tiles.queries) if wants_scores else 0
    key_tiles = problem.tiles("k", tiles.keys) if dvalue is not None else 0
    segment, single = configurations.query_segment(problem.max_q)
    additive_attention_bwd_scores_kernel[(query_tiles + key_tiles, heads)](
        problem.inputs,
        as_rows(dcontext, problem.cu_q),
        dweights,
        stats,
        None if scores is None else scores.data,
        dproducts,
        dscores,
        dvalue,
        order,
        *problem.sizes,
        query_tiles,
        problem.sequences(),
        None if scores is None else scores.columns,
        *((None, None) if dweights is None else dweights.shape[2:]),
        columns,
        H=heads,
        DV=problem.value_dim,
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        BLOCK_DV=tiles.value_features,
        SEGMENT_Q=segment,
        SINGLE_Q=single,
        num_warps=tiles.warps,
    )
    if dscores is None:
        return None
    return PairTensor(dscores, dscores.size(-1), order)


def is_whole(problem: Problem) -> bool:
    """Whether one pass gives the gradients of all of a sequence."""
    return problem.max_q * problem.max_k <= configurations.WHOLE_SEQUENCE_PAIRS


def _gradient_pass(
    problem: Problem,
    dscores: PairTensor,
    rows_are_keys: bool,
    whole_sequences: bool,
    drow: Tensor | None,
    dcol: Tensor | None,
    dscore_weight: Tensor | None,
) -> None:
    """One launch of the gradient kernel; ``drow`` is of keys or queries, ``dcol`` of the others."""
    query = problem.inputs.query.ptr
    heads = problem.heads
    half = triton.cdiv(problem.dim, 2)  # pairs of features, d with d + half
    pairs = configurations.gradient_pairs(half)
    warps = pairs // 32
    row_tiles = configurations.GRADIENT_ROW_TILES
    if whole_sequences:
        units = problem.sequences()
    else:
        units = problem.tiles("k" if rows_are_keys else "q", row_tiles * TILE_ROWS.value)
    items = units * heads * triton.cdiv(half, pairs)
    programs = items
    sums = None
    if dcol is not None:
        # Each program reuses its sums, which stay in the cache: as many as run at a time.
        programs = min(items, 8 // warps * processors(query))
        columns = problem.max_q if rows_are_keys else problem.max_k
        sums = query.new_empty((programs, columns, 2 * pairs), dtype=torch.float32)
    partial = None
    if dscore_weight is not None:
        partial = query.new_empty((units, heads, problem.dim), dtype=torch.float32)
    additive_attention_grad_kernel[(programs,)](
        problem.inputs,
        dscores.data,
        *dscores.strides(problem),
        drow,
        dcol,
        sums,
        partial,
        dscores.order if whole_sequences else None,
        *problem.sizes,
        items,
        processors(query),
        0,
        H=heads,
        D=problem.dim,
        HALF=half,
        BLOCK_D=pairs,
        ROW_TILES=row_tiles,
        ROWS_ARE_KEYS=rows_are_keys,
        WHOLE_SEQUENCES=whole_sequences,
        CONTIGUOUS_SCORES=rows_are_keys and dscores.columns is not None,
        MASK_SCORES=rows_are_keys and dscores.columns is None,
        USE_PTX=problem.uses_ptx,
        num_warps=warps,
    )
    if partial is not None:
        sum_parts(partial, dscore_weight, 1, partial.size(0))


# ---- All steps of a memory ----


def additive_attention_memory_backward(
    query: Tensor,
    dscores: Tensor,
    weights: Tensor,
    dcontext: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    exp_key: Tensor | None,
    key_bound: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen_k: int,
    grad_mask: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of a sequence are the queries of one pass: step i of sequence b is row (i, b)."""
    steps = query.size(0)
    by_sequence = query.transpose(0, 1)  # [B, steps, H, D]
    layout = None, cu_seqlens_k, key_lengths, key_padding_mask, steps, max_seqlen_k
    tensors = key, value, score_weight
    problem = describe(by_sequence, *tensors, *layout)
    gradients, (dkey, dvalue, dscore_weight) = new_gradients(tensors, grad_mask // GRAD_KEY)
    if problem.has_no_keys:
        return tuple(gradient.zero_() for gradient in gradients)
    weights, dscores = (PairTensor(t.contiguous(), None) for t in (weights, dscores))
    incoming = dcontext.transpose(0, 1), None, 0
    with on_device(query):
        if dvalue is not None:
            _score_gradients(problem, incoming, None, weights, dvalue, False)
        if dkey is not None or dscore_weight is not None:
            _gradient_pass(problem, dscores, True, False, dkey, None, dscore_weight)
    return gradients
