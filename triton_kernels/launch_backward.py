"""Launchers of the backward kernels."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import configurations
from .backward import additive_attention_bwd_scores_kernel, additive_attention_dvalue_kernel
from .gradient import TILE_ROWS, additive_attention_grad_kernel
from .launch_step import step_gradients
from .problem import (
    GRAD_KEY,
    RAW,
    Problem,
    check_workspace,
    describe,
    half_of,
    is_constant,
    on_device,
    processors,
    register_limit,
    rows_of,
    strides_of,
    uses_ptx,
    weight_strides,
)


@dataclass(frozen=True)
class ScoreGradients:
    """Float32 score gradients and weights after dropout, if any, and where those of a pair are.

    ``strides`` are of (sequence's first query row, first key row, query, key, head). ``is_padded``:
    gradients past a sequence's last key are there, and 0. Bounds are the largest magnitudes of
    rows; those of queries have strides of (place, row), those of keys are [rows, H].
    """

    dscores: Tensor
    weights: Tensor | None
    strides: tuple[int, int, int, int, int]
    is_padded: bool
    query_bound: Tensor
    query_bound_strides: tuple[int, int]
    key_bound: Tensor


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
    problem = describe(
        query,
        key,
        weighted,
        cu_seqlens_q,
        cu_seqlens_k,
        key_lengths,
        key_padding_mask,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        dropout_seed,
    )
    inputs = query, key, value, score_weight
    gradients = [
        tensor.new_empty(tensor.shape) if grad_mask & 1 << bit else None
        for bit, tensor in enumerate(inputs)
    ]
    if is_constant(problem, dweights) or problem.all_rows_q == 0:
        return _or_empty([g if g is None else g.zero_() for g in gradients], inputs)
    dquery, dkey, dvalue, dscore_weight = gradients
    rows = tuple(rows_of(tensor) for tensor in (query, key, weighted, score_weight))
    incoming = None if dcontext is None else rows_of(dcontext), dweights, weights_layout
    softmax = None if raw else stats.contiguous()
    with on_device(query):
        if problem.is_one_step:
            step_gradients(problem, rows, incoming, softmax, None, *gradients)
            return _or_empty(gradients, inputs)
        found = _score_gradients(problem, rows, incoming, softmax)
        if dvalue is not None:
            _value_gradient(problem, found, incoming[0], dvalue)
        if any(gradient is not None for gradient in (dquery, dkey, dscore_weight)):
            _feature_gradients(problem, found, rows, dquery, dkey, dscore_weight)
    return _or_empty(gradients, inputs)


def _or_empty(gradients: list[Tensor | None], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ops return a tensor for every gradient, an empty one where none was asked for."""
    pairs = zip(gradients, inputs)
    return tuple(tensor.new_empty((0,)) if grad is None else grad for grad, tensor in pairs)


# ---- Several queries a sequence ----


def _score_gradients(
    problem: Problem, inputs: tuple[Tensor, ...], incoming: tuple, stats: Tensor | None
) -> ScoreGradients:
    query, key, value, score_weight = inputs
    dcontext, dweights, weights_layout = incoming
    heads = problem.heads
    tiles = configurations.SCORES
    columns = triton.cdiv(problem.max_k, tiles.keys) * tiles.keys  # whole tiles of keys
    # The gradient pass over queries alone reads a tile of rows past a sequence's last and drops
    # their results: to mask them would take a slot an element. What nobody writes there is 0.
    more_rows = 0 if is_whole(problem) else configurations.GRADIENT_ROW_TILES * TILE_ROWS.value
    check_workspace(problem, 2 * problem.all_rows_q * heads * columns)
    new = query.new_zeros if more_rows else query.new_empty
    dscores = new((problem.all_rows_q + more_rows, heads, columns), dtype=torch.float32)
    weights = None
    if stats is not None:
        weights = query.new_empty((problem.all_rows_q, heads, columns), dtype=torch.float32)
    query_bound = query.new_empty((problem.all_rows_q, heads), dtype=torch.float32)
    key_bound = query.new_empty((problem.all_rows_k, heads), dtype=torch.float32)
    additive_attention_bwd_scores_kernel[(problem.tiles("q", tiles.queries), heads)](
        query,
        key,
        value,
        score_weight,
        dcontext,
        dweights,
        stats,
        weights,
        dscores,
        query_bound,
        key_bound,
        problem.cu_q,
        *problem.key_side(),
        problem.seed,
        problem.batch,
        problem.rows_q,
        problem.rows_k,
        problem.max_q,
        problem.max_k,
        *problem.dropout(),
        *strides_of(query, problem.cu_q),
        *strides_of(key, problem.cu_k),
        *strides_of(value, problem.cu_k),
        *(strides_of(dcontext, problem.cu_q) if dcontext is not None else (0, 0, 0)),
        score_weight.stride(0),
        *(weight_strides(dweights, weights_layout) if dweights is not None else (0,) * 5),
        columns,
        H=heads,
        D=problem.dim,
        DV=problem.value_dim,
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        BLOCK_D=tiles.features,
        BLOCK_DV=tiles.value_features,
        REFINE=query.dtype == torch.float32,
        USE_PTX=uses_ptx(query),
        num_warps=tiles.warps,
        **register_limit(tiles),
    )
    strides = (heads * columns, 0, heads * columns, 1, columns)
    bound_strides = (problem.rows_q * heads, heads)
    return ScoreGradients(dscores, weights, strides, True, query_bound, bound_strides, key_bound)


def _value_gradient(
    problem: Problem, found: ScoreGradients, dcontext: Tensor | None, dvalue: Tensor
) -> None:
    if dcontext is None:
        dvalue.zero_()
        return
    tiles = configurations.dvalue_tiles(dvalue.dtype)
    grid = (
        problem.tiles("k", tiles.keys),
        problem.heads,
        triton.cdiv(problem.value_dim, tiles.value_features),
    )
    additive_attention_dvalue_kernel[grid](
        found.weights,
        dcontext,
        dvalue,
        problem.cu_q,
        problem.cu_k,
        problem.lengths,
        problem.batch,
        problem.rows_q,
        problem.rows_k,
        problem.max_k,
        *strides_of(dcontext, problem.cu_q),
        *found.strides,
        H=problem.heads,
        DV=problem.value_dim,
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        BLOCK_DV=tiles.value_features,
        num_warps=tiles.warps,
    )


def is_whole(problem: Problem) -> bool:
    """Whether one pass gives the gradients of all of a sequence."""
    return problem.max_q * problem.max_k <= configurations.WHOLE_SEQUENCE_PAIRS


def _feature_gradients(
    problem: Problem,
    found: ScoreGradients,
    inputs: tuple[Tensor, ...],
    dquery: Tensor | None,
    dkey: Tensor | None,
    dscore_weight: Tensor | None,
) -> None:
    if is_whole(problem):
        _gradient_pass(problem, found, inputs, True, True, dkey, dquery, dscore_weight)
        return
    if dkey is not None or dscore_weight is not None:
        _gradient_pass(problem, found, inputs, True, False, dkey, None, dscore_weight)
    if dquery is not None:
        _gradient_pass(problem, found, inputs, False, False, dquery, None, None)


def _gradient_pass(
    problem: Problem,
    found: ScoreGradients,
    inputs: tuple[Tensor, ...],
    rows_are_keys: bool,
    whole_sequences: bool,
    drow: Tensor | None,
    dcol: Tensor | None,
    dscore_weight: Tensor | None,
) -> None:
    """One launch of the gradient kernel; ``drow`` is of keys or queries, ``dcol`` of the others."""
    query, key, _, score_weight = inputs
    heads = problem.heads
    half = half_of(problem.dim)
    pairs = configurations.gradient_pairs(half)
    chunks = triton.cdiv(half, pairs)
    warps = pairs // 32
    row_tiles = configurations.GRADIENT_ROW_TILES
    query_start, key_start, by_query, by_key, by_head = found.strides
    query_side = query, problem.cu_q, problem.rows_q, query_start, by_query
    key_side = key, problem.cu_k, problem.rows_k, key_start, by_key
    row_side, col_side = (key_side, query_side) if rows_are_keys else (query_side, key_side)
    row, cu_row, rows_r, row_start, by_row = row_side
    col, cu_col, rows_c, col_start, by_col = col_side
    if rows_are_keys:
        row_bound, col_bound = found.key_bound, found.query_bound
        col_bound_strides = found.query_bound_strides
    else:
        row_bound, col_bound = found.query_bound, found.key_bound
        col_bound_strides = (rows_c * heads, heads)
    if whole_sequences:
        units = problem.batch + (problem.cu_q is not None or problem.cu_k is not None)
    else:
        units = problem.tiles("k" if rows_are_keys else "q", row_tiles * TILE_ROWS.value)
    items = units * heads * chunks
    programs = items
    max_columns = problem.max_q if rows_are_keys else problem.max_k
    sums = None
    if dcol is not None:
        # Each program reuses its sums, which stay in the cache: as many as run at a time.
        programs = min(items, 8 * processors(query) // warps + 1)
        sums = query.new_empty((programs, max_columns, 2 * pairs), dtype=torch.float32)
    partial = None
    if dscore_weight is not None:
        partial = query.new_empty((units, heads, problem.dim), dtype=torch.float32)
    additive_attention_grad_kernel[(programs,)](
        row,
        col,
        score_weight,
        found.dscores,
        row_bound,
        col_bound,
        drow,
        dcol,
        sums,
        partial,
        cu_row,
        cu_col,
        problem.lengths,
        problem.mask,
        problem.batch,
        rows_r,
        rows_c,
        problem.max_k,
        max_columns,
        items,
        0,
        *strides_of(row, cu_row),
        *strides_of(col, cu_col),
        score_weight.stride(0),
        row_start,
        col_start,
        by_row,
        by_col,
        by_head,
        *col_bound_strides,
        H=heads,
        D=problem.dim,
        HALF=half,
        BLOCK_D=pairs,
        ROW_TILES=row_tiles,
        ROWS_ARE_KEYS=rows_are_keys,
        WHOLE_SEQUENCES=whole_sequences,
        CONTIGUOUS_SCORES=rows_are_keys and found.is_padded,
        MASK_SCORES=rows_are_keys and not found.is_padded,
        REFINE=query.dtype == torch.float32,
        USE_PTX=uses_ptx(query),
        num_warps=warps,
    )
    if partial is not None:
        dscore_weight.copy_(partial.sum(0))


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
    steps, batch, heads = query.shape[:3]
    by_sequence = query.transpose(0, 1)  # [B, steps, H, D]
    problem = describe(
        by_sequence,
        key,
        value,
        None,
        cu_seqlens_k,
        key_lengths,
        key_padding_mask,
        steps,
        max_seqlen_k,
    )
    inputs = key, value, score_weight
    gradients = [
        tensor.new_empty(tensor.shape) if grad_mask & GRAD_KEY << bit else None
        for bit, tensor in enumerate(inputs)
    ]
    if problem.all_rows_k == 0 or problem.batch == 0:
        return _or_empty([g if g is None else g.zero_() for g in gradients], inputs)
    dkey, dvalue, dscore_weight = gradients
    rows = tuple(rows_of(tensor) for tensor in (by_sequence, *inputs))
    all_keys = problem.all_rows_k * heads
    found = ScoreGradients(
        dscores.contiguous(),
        weights.contiguous(),
        (0, heads, all_keys, heads, 1),
        False,
        _largest_magnitudes(query),  # [steps, B, H]
        (heads, batch * heads),
        _largest_magnitudes(key),
    )
    with on_device(query):
        if dvalue is not None:
            _value_gradient(problem, found, rows_of(dcontext.transpose(0, 1)), dvalue)
        if dkey is not None or dscore_weight is not None:
            _gradient_pass(problem, found, rows, True, False, dkey, None, dscore_weight)
    return _or_empty(gradients, inputs)


def _largest_magnitudes(rows: Tensor) -> Tensor:
    """Of each row, in float32."""
    if rows.size(-1) == 0:
        return rows.new_zeros(rows.shape[:-1], dtype=torch.float32)
    return torch.linalg.vector_norm(rows, torch.inf, -1, dtype=torch.float32)
