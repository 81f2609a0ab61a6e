"""Launchers of the backward kernels for one query a sequence."""

import torch
import triton
from torch import Tensor

from . import configurations
from .backward import sum_parts_kernel
from .problem import (
    GRAD_QUERY,
    RAW,
    Problem,
    alignment,
    describe,
    is_constant,
    on_device,
    rows_of,
    strides_of,
    uses_ptx,
    weight_strides,
)
from .step_backward import additive_attention_step_bwd_kernel, sum_tiles_kernel


def step_gradients(
    problem: Problem,
    inputs: tuple[Tensor, ...],
    incoming: tuple,
    stats: Tensor | None,
    records: tuple[Tensor, Tensor] | None,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dscore_weight: Tensor | None,
) -> None:
    """Fill the gradients that are not None, and ``records``, the score gradients and weights.

    Without ``stats`` the score gradients come in, and weights are 0.
    """
    query, key, value, score_weight = inputs
    dcontext, dweights, weights_layout = incoming
    heads, dim = problem.heads, problem.dim
    segment, single = configurations.step_segment(problem.max_k)
    config = configurations.step_tiles(segment)
    tiles = problem.tiles("k", segment)
    if dvalue is not None and dcontext is None:
        dvalue.zero_()
        dvalue = None

    def by_tile(wanted: bool, *shape: int) -> Tensor | None:
        return query.new_zeros((tiles, heads, *shape), dtype=torch.float32) if wanted else None

    partial_dquery = dquery if single else by_tile(dquery is not None, dim)
    partial_dweight = by_tile(dscore_weight is not None, dim)
    at_once = single or stats is None
    delta = by_tile(not at_once, 2)
    if records is None and not at_once:
        records = tuple(
            query.new_empty((problem.all_rows_k, heads), dtype=torch.float32) for _ in range(2)
        )
    dscores, weights = (None, None) if records is None else records
    for first, last in [(True, True)] if at_once else [(True, False), (False, True)]:
        additive_attention_step_bwd_kernel[(tiles, heads)](
            query,
            key,
            value,
            score_weight,
            dcontext,
            dweights,
            stats,
            weights,
            dscores,
            delta,
            partial_dquery,
            dkey,
            dvalue,
            partial_dweight,
            *problem.key_side(),
            problem.seed,
            problem.batch,
            problem.rows_k,
            problem.max_k,
            triton.cdiv(problem.rows_k, segment),
            *problem.dropout(),
            query.stride(0),
            query.stride(2),
            *strides_of(key, problem.cu_k),
            *strides_of(value, problem.cu_k),
            *((dcontext.stride(0), dcontext.stride(2)) if dcontext is not None else (0, 0)),
            score_weight.stride(0),
            *_step_weight_strides(dweights, weights_layout),
            H=heads,
            D=dim,
            DV=problem.value_dim,
            SEGMENT=segment,
            BLOCK_D=config.features,
            BLOCK_DV=config.value_features,
            SINGLE=single,
            FIRST=first,
            LAST=last,
            ALIGNMENT=alignment(query, key, value, score_weight, dcontext),
            USE_PTX=uses_ptx(query),
            num_warps=config.warps,
        )
    if dquery is not None and not single:
        sum_tiles_kernel[(problem.batch, heads)](
            partial_dquery,
            dquery,
            problem.cu_k,
            problem.rows_k,
            triton.cdiv(problem.rows_k, segment),
            H=heads,
            D=dim,
            BLOCK_D=configurations.MERGE.value_features,
            SEGMENT=segment,
            num_warps=configurations.MERGE.warps,
        )
    if dscore_weight is not None:
        sum_partial(partial_dweight, dscore_weight)


def sum_partial(partial: Tensor, total: Tensor) -> None:
    """``total`` = the sum over the first axis of float32 ``partial``; both contiguous."""
    block = configurations.SUM_NUMBERS
    sum_parts_kernel[(triton.cdiv(total.numel(), block),)](
        partial,
        total,
        partial.size(0),
        SIZE=total.numel(),
        PARTS=configurations.SUM_PARTS,
        BLOCK=block,
        num_warps=1,
    )


def _step_weight_strides(dweights: Tensor | None, layout: int) -> tuple[int, int, int, int]:
    """Of a returned weight at (sequence, first key row, key, head)."""
    if dweights is None:
        return (0,) * 4
    by_sequence, by_key_row, _, by_key, by_head = weight_strides(dweights, layout)
    return by_sequence, by_key_row, by_key, by_head


def additive_attention_step_backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    exp_key: Tensor | None,
    key_bound: Tensor | None,
    stats: Tensor,
    scores: Tensor,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen_k: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    weights_layout: int,
    grad_mask: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    raw, weights_layout = divmod(weights_layout, RAW)
    weighted = key[..., :0] if raw else value
    problem = describe(
        query,
        key,
        weighted,
        None,
        cu_seqlens_k,
        key_lengths,
        key_padding_mask,
        1,
        max_seqlen_k,
        dropout_p,
        dropout_seed,
    )
    dquery = query.new_empty(query.shape if grad_mask & GRAD_QUERY else (0,))
    dscores, weights = (key.new_empty(key.shape[:3], dtype=torch.float32) for _ in range(2))
    if is_constant(problem, dweights):
        return dquery.zero_(), dscores.zero_(), weights.zero_()
    inputs = tuple(rows_of(tensor) for tensor in (query, key, weighted, score_weight))
    incoming = None if dcontext is None else rows_of(dcontext), dweights, weights_layout
    wanted = dquery if grad_mask & GRAD_QUERY else None
    with on_device(query):
        records = dscores, weights
        softmax = None if raw else stats.contiguous()
        step_gradients(problem, inputs, incoming, softmax, records, wanted, None, None, None)
    return dquery, dscores, weights
