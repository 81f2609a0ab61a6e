"""One query a sequence: launchers of the kernels of ``key_tiles``."""

import torch
from torch import Tensor

from . import configurations
from .key_tiles import Plan, Shape
from .keys_backward import Gradients, Incoming, Records, backward_over_keys
from .keys_forward import forward_over_keys
from .problem import (
    GRAD_QUERY,
    JAGGED_WEIGHTS,
    RAW,
    Problem,
    as_rows,
    describe,
    is_constant,
    on_device,
    register_limit,
)


def step_plan(problem: Problem, raw: bool) -> Plan:
    """``raw``: for scores alone. A HALF has as many numbers a thread."""
    segment, single = configurations.step_segment(problem.max_k)
    tiles = configurations.step_tiles(segment, raw)
    sizes = problem.heads, 1, problem.dim, problem.value_dim, segment
    rest = single, problem.uses_ptx
    whole, half = (
        Shape(*sizes, segment // n, 1, n * tiles.features, n * tiles.value_features, *rest)
        for n in (1, 2)
    )
    return Plan(whole, half, tiles.warps, register_limit(tiles))


def step_forward(
    problem: Problem,
    context: Tensor | None,
    stats: Tensor | None,
    scores: Tensor | None,
) -> None:
    """Fill context and stats, if any, and scores [all rows, H], if any."""
    plan = step_plan(problem, stats is None)
    forward_over_keys(problem, context, stats, scores, plan)


def step_gradients(
    problem: Problem,
    incoming: tuple,
    softmax: tuple[Tensor, Tensor] | None,
    kept: tuple[Tensor | None, Tensor | None],
    gradients: tuple[Tensor | None, ...],
) -> None:
    """Fill the gradients that are not None, and ``kept``.

    Args:
        incoming: the gradients of context and weights, if any, and the weights' layout.
        softmax: stats and scores; None: the gradients of weights are those of scores.
        kept: where score gradients and weights (0 without softmax) go, or None.
        gradients: of query, key, value and score_weight.
    """
    dcontext, dweights, layout = incoming
    dquery, dkey, dvalue, dscore_weight = gradients
    columns = None
    if dweights is not None:
        dweights = dweights.contiguous()
        columns = None if layout == JAGGED_WEIGHTS else dweights.size(3)
    stats = scores = None
    if softmax is not None:
        stats, scores = softmax
        if scores.numel() == 0:
            scores = stats.new_empty((problem.all_rows_k, problem.heads))
            step_forward(problem, None, None, scores)
        # vmap hands over one call's numbers for all, by a stride of 0.
        stats, scores = stats.contiguous(), scores.contiguous()
    dscores, weights = kept
    plan = step_plan(problem, raw=False)
    backward_over_keys(
        problem,
        Incoming(as_rows(dcontext), dweights, stats, scores),
        columns,
        Records(weights, dscores, None),
        Gradients(dquery, dkey, None, dvalue, dscore_weight),
        (plan, plan),
    )


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
    layout = None, cu_seqlens_k, key_lengths, key_padding_mask, 1, max_seqlen_k
    problem = describe(query, key, weighted, score_weight, *layout, dropout_p, dropout_seed)
    dquery = query.new_empty(query.shape if grad_mask & GRAD_QUERY else (0,))
    kept = tuple(key.new_empty(key.shape[:3], dtype=torch.float32) for _ in range(2))
    if is_constant(problem, dweights):
        return dquery.zero_(), *(tensor.zero_() for tensor in kept)
    incoming = dcontext, dweights, weights_layout
    softmax = None if raw else (stats, scores)
    wanted = dquery if grad_mask & GRAD_QUERY else None, None, None, None
    with on_device(query):
        step_gradients(problem, incoming, softmax, kept, wanted)
    return dquery, *kept
