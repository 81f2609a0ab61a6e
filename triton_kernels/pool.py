"""Pooling: launchers of the kernels of ``key_tiles`` for keys that are scored without a query.

Keys, gates and values are read once, but for more than POOL_BRANCHES branches.
"""

import math

import torch
from torch import Tensor

from . import configurations
from .key_tiles import Plan, Shape
from .keys_backward import Gradients, Incoming, Records, backward_over_keys
from .keys_forward import forward_over_keys
from .problem import (
    DENSE_WEIGHTS,
    GRAD_KEY,
    JAGGED_WEIGHTS,
    RAW,
    Problem,
    as_rows,
    describe,
    is_constant,
    new_gradients,
    on_device,
)
from .weights import fill_weights


def pool_plan(problem: Problem, tiles: configurations.Tiles = configurations.POOL) -> Plan:
    segment, branches = configurations.pool_segment(problem.max_k), problem.rows_q
    shape = Shape(
        problem.heads,
        branches,
        problem.dim,
        problem.value_dim,
        segment,
        segment,
        configurations.pool_group(branches),
        tiles.features,
        tiles.value_features,
        problem.max_k <= segment,
        problem.uses_ptx,
    )
    return Plan(shape, None, tiles.warps, {})


def additive_pool_forward(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    gate: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen_k: int,
    tanh_dropout_p: float,
    gate_dropout_p: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    weights_layout: int,
    keep_scores: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # An unknown bound needs no reading: nothing but SINGLE depends on it.
    bounds = score_weight.size(1), min(max_seqlen_k, key.size(1))
    layout = None, cu_seqlens_k, key_lengths, key_padding_mask, *bounds, dropout_p, dropout_seed
    features = tanh_dropout_p, gate_dropout_p
    problem = describe(None, key, value, score_weight, *layout, gate, features)
    raw, weights_layout = divmod(weights_layout, RAW)
    batch, branches, heads = problem.batch, problem.rows_q, problem.heads
    context = value.new_empty((batch, branches, heads, problem.value_dim))
    stats = key.new_empty((batch, branches, heads, 2), dtype=torch.float32)
    is_empty = problem.all_rows_k == 0 or stats.numel() == 0
    if raw or is_empty:
        context.zero_()
        stats.zero_()
    scores = none = stats.new_empty((0,))
    if raw or keep_scores or weights_layout:
        scores = stats.new_empty((*key.shape[:3], branches))
    weights = value.new_zeros(
        {
            0: (0,),
            DENSE_WEIGHTS: (batch, heads, branches, problem.rows_k),
            JAGGED_WEIGHTS: (problem.rows_k, heads, branches),
        }[weights_layout if not raw else 0]
    )
    if raw:
        scores.fill_(-math.inf)
    if not is_empty:
        with on_device(key):
            softmax = (None, None) if raw else (context, stats)
            wanted = scores if scores.numel() else None
            forward_over_keys(problem, *softmax, wanted, pool_plan(problem))
            if weights.numel():
                fill_weights(problem, scores, None, stats, weights)
    if raw:
        weights = scores.permute(0, 2, 3, 1).contiguous()
        if weights_layout == JAGGED_WEIGHTS:
            weights = scores.squeeze(0)
    return context, weights, stats, scores if keep_scores else none


def additive_pool_backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    gate: Tensor | None,
    stats: Tensor,
    scores: Tensor,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen_k: int,
    tanh_dropout_p: float,
    gate_dropout_p: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    weights_layout: int,
    grad_mask: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # An unknown bound needs no reading: nothing but SINGLE depends on it.
    bounds = score_weight.size(1), min(max_seqlen_k, key.size(1))
    layout = None, cu_seqlens_k, key_lengths, key_padding_mask, *bounds, dropout_p, dropout_seed
    features = tanh_dropout_p, gate_dropout_p
    problem = describe(None, key, value, score_weight, *layout, gate, features)
    tensors = key, value, score_weight, key if gate is None else gate
    gradients, wanted = new_gradients(tensors, grad_mask // GRAD_KEY)
    if is_constant(problem, dweights) or stats.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    raw, weights_layout = divmod(weights_layout, RAW)
    if dweights is not None:  # as [.., H, K]
        by_key = weights_layout == JAGGED_WEIGHTS
        dweights = (dweights if by_key else dweights.permute(0, 3, 1, 2)).contiguous()
    dkey, dvalue, dscore_weight, dgate = wanted
    plans = pool_plan(problem), pool_plan(problem, configurations.POOL_GRADIENT)
    with on_device(key):
        softmax = None, None
        if not raw:
            if scores.numel() == 0:
                scores = stats.new_empty((*key.shape[:3], problem.rows_q))
                forward_over_keys(problem, None, None, scores, plans[0])
            softmax = stats.contiguous(), scores.contiguous()
        backward_over_keys(
            problem,
            Incoming(None if raw else as_rows(dcontext), dweights, *softmax),
            None,
            Records(None, None, None),
            Gradients(None, dkey, dgate, dvalue, dscore_weight),
            plans,
        )
    return gradients
