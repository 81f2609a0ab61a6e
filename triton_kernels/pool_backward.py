"""Backward of pooling; the counterpart of ``pool``.

The first kernel reads values and leaves score gradients but for their sums ``delta`` over a
sequence, the second reads keys and gates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configurations
from .hidden import (
    SIZES,
    Dropout,
    add_products,
    describe_pool,
    feature_dropout,
    first_branch,
    gate_rows,
    hidden_and_slopes,
    kept_weights,
    key_tile,
    rows_of_tile,
    strides_of_gate,
    zeros_of_branches,
)
from .launch_step import sum_partial
from .pool import launch_forward
from .problem import (
    GRAD_GATE,
    GRAD_KEY,
    GRAD_SCORE_WEIGHT,
    GRAD_VALUE,
    JAGGED_WEIGHTS,
    RAW,
    Problem,
    alignment,
    is_constant,
    on_device,
    rows_of,
    strides_of,
    uses_ptx,
)
from .step import STAGES, load_row, load_tile
from .step_backward import sum_parts, tile_range


@triton.jit(do_not_specialize=SIZES)
def additive_pool_bwd_weights_kernel(
    value_ptr,  # [places, rows_k, H, DV]
    dcontext_ptr,  # [batch, K, H, DV], or None
    dweights_ptr,  # [all rows, H, K], or None
    stats_ptr,  # [batch, K, H, 2]
    scores_ptr,  # [all rows, H, K]
    weights_ptr,  # the same
    gradients_ptr,  # the same
    delta_ptr,  # [tiles, K, H, 2]
    cu_k_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    seed_ptr,
    batch,
    rows_k,
    max_seqlen_k,
    threshold,
    dropout_scale,
    stride_vb,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    DV: tl.constexpr,
    SEGMENT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Weights ``w_kj`` before dropout and ``g_kj = (dcontext_k . value_j + dweights_kj) (dropout's
    scale)``; in ``delta`` the tile's sums of ``w_kj g_kj`` and of ``w_kj`` over j.
    """
    tile = key_tile(
        cu_k_ptr, key_lengths_ptr, padding_mask_ptr, batch, rows_k, max_seqlen_k, SEGMENT
    )
    if tile.sequence >= batch:
        return
    branch = first_branch(GROUP, K)
    target = tile.sequence.to(tl.int64) * (K * H) + tile.head
    part = tl.program_id(0).to(tl.int64) * (K * H) + tile.head
    gradients = zeros_of_branches(GROUP, SEGMENT)
    if dcontext_ptr is not None:
        values = rows_of_tile(value_ptr, tile, stride_vb, stride_vt, stride_vh, ALIGNMENT)
        dcontexts_ptr = dcontext_ptr + target * DV
        for begin in tl.range(0, DV, BLOCK_DV, num_stages=STAGES):
            d = begin + tl.arange(0, BLOCK_DV)
            value = load_tile(values, tile.attended, d, DV)
            gradients = add_products(
                gradients, value, dcontexts_ptr, H * DV, branch, d, GROUP, K, DV, ALIGNMENT
            )
    for i in tl.static_range(GROUP):
        k = branch + i
        if k < K:
            entry = (tile.row * H + tile.head) * K + k
            stats_row = stats_ptr + (target + k * H) * 2
            largest = tl.load(stats_row)
            total = tl.load(stats_row + 1)
            score = tl.load(scores_ptr + entry, mask=tile.attended, other=-float("inf"))
            weight = tl.exp(score - tl.where(largest == -float("inf"), 0.0, largest))
            weight = weight / tl.where(total == 0.0, 1.0, total)
            gradient = gradients[i]
            if dweights_ptr is not None:
                dweight = tl.load(dweights_ptr + entry, mask=tile.attended, other=0.0)
                gradient += dweight.to(tl.float32)
            if seed_ptr is not None:
                gradient *= kept_weights(seed_ptr, threshold, dropout_scale, tile, k)
            tl.store(weights_ptr + entry, weight, mask=tile.attended)
            tl.store(gradients_ptr + entry, gradient, mask=tile.attended)
            tl.store(delta_ptr + (part + k * H) * 2, tl.sum(weight * gradient, 0))
            tl.store(delta_ptr + (part + k * H) * 2 + 1, tl.sum(weight, 0))


@triton.jit(do_not_specialize=[*SIZES, "tiles"])
def additive_pool_bwd_kernel(
    key_ptr,  # [places, rows_k, H, D]
    gate_ptr,  # the same, or None
    score_weight_ptr,  # [H, K, D]
    dcontext_ptr,  # [batch, K, H, DV], or None
    weights_ptr,  # [all rows, H, K]; None: there was no softmax, and dscores are given
    dscores_ptr,  # the same, at first the gradients g
    delta_ptr,  # [tiles, K, H, 2]
    dkey_ptr,  # [all rows, H, D], or None, as may be the others
    dvalue_ptr,  # [all rows, H, DV]
    dweight_ptr,  # [tiles, H, K, D]
    dgate_ptr,  # [all rows, H, D]
    cu_k_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    seed_ptr,
    feature_seed_ptr,
    batch,
    rows_k,
    max_seqlen_k,
    tiles,
    threshold,
    dropout_scale,
    tanh_threshold,
    tanh_scale,
    gate_threshold,
    gate_scale,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_gb,
    stride_gt,
    stride_gh,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """All gradients from score gradients ``s_kj = w_kj (g_kj - delta_k)`` and dropped out weights.

    ``dvalue_j = sum_k w'_kj dcontext_k``; with ``dh_j = sum_k s_kj w_k`` (score weights), ``dkey =
    dh (dh / dk)`` and ``dgate = dh (dh / dg)``; ``dscore_weight_k = sum_j s_kj h_j`` of the tile.
    """
    tile = key_tile(
        cu_k_ptr, key_lengths_ptr, padding_mask_ptr, batch, rows_k, max_seqlen_k, SEGMENT
    )
    if tile.first >= tile.extent:
        return
    inside = tile.position < tile.extent
    sequence = tl.minimum(tile.sequence, batch - 1).to(tl.int64)  # some, for rows of nobody
    row = tile.row * H + tile.head
    if weights_ptr is not None:
        first_tile, count = tile_range(cu_k_ptr, sequence, rows_k.to(tl.int64), tiles, SEGMENT)
        for k in range(K):
            parts_ptr = delta_ptr + ((first_tile * K + k) * H + tile.head) * 2
            delta, total = sum_parts(parts_ptr, count, K * H)
            # Rounded weights need not sum to 1, but score gradients to 0.
            delta = delta / tl.where(total == 0.0, 1.0, total)
            weight = tl.load(weights_ptr + row * K + k, mask=tile.attended, other=0.0)
            gradient = tl.load(dscores_ptr + row * K + k, mask=tile.attended, other=0.0)
            tl.debug_barrier()  # all has been read before it is replaced
            tl.store(dscores_ptr + row * K + k, weight * (gradient - delta), mask=tile.attended)
            if seed_ptr is not None:
                weight *= kept_weights(seed_ptr, threshold, dropout_scale, tile, k)
                tl.store(weights_ptr + row * K + k, weight, mask=tile.attended)
        tl.debug_barrier()  # other threads of the program read what these have written
    if dvalue_ptr is not None:
        for begin in range(0, DV, BLOCK_DV):
            d = begin + tl.arange(0, BLOCK_DV)
            dvalue = tl.zeros((SEGMENT, BLOCK_DV), tl.float32)
            for k in range(K):
                weight = tl.load(weights_ptr + row * K + k, mask=tile.attended, other=0.0)
                dcontext_row = dcontext_ptr + ((sequence * K + k) * H + tile.head) * DV
                dvalue += weight[:, None] * load_row(dcontext_row, d, DV)[None, :]
            tl.store(
                dvalue_ptr + row[:, None] * DV + d[None, :],
                dvalue.to(dvalue_ptr.dtype.element_ty),
                mask=inside[:, None] & (d < DV)[None, :],
            )
    if (dkey_ptr is not None) | (dgate_ptr is not None) | (dweight_ptr is not None):
        keys = rows_of_tile(key_ptr, tile, stride_kb, stride_kt, stride_kh, ALIGNMENT)
        gates = gate_ptr
        if gate_ptr is not None:
            gates = rows_of_tile(gate_ptr, tile, stride_gb, stride_gt, stride_gh, ALIGNMENT)
        for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            hidden, by_key, by_gate = hidden_and_slopes(
                keys,
                gates,
                tile,
                Dropout(feature_seed_ptr, tanh_threshold, tanh_scale),
                Dropout(feature_seed_ptr, gate_threshold, gate_scale),
                begin,
                D,
                BLOCK_D,
                USE_PTX,
            )
            d = begin + tl.arange(0, BLOCK_D)
            dhidden = hidden * 0.0  # zeros as the keys are shared out among threads
            for k in range(K):
                dscores = tl.load(dscores_ptr + row * K + k, mask=tile.attended, other=0.0)
                weight_row = score_weight_ptr + (tile.head * K + k) * D
                dhidden += dscores[:, None] * load_row(weight_row, d, D)[None, :]
                if dweight_ptr is not None:
                    part = (tl.program_id(0) * H + tile.head) * K + k
                    dweight = tl.sum(dscores[:, None] * hidden, 0)
                    tl.store(dweight_ptr + part * D + d, dweight, mask=d < D)
            mask = inside[:, None] & (d < D)[None, :]
            target = row[:, None] * D + d[None, :]
            if dkey_ptr is not None:
                dkey = dhidden * by_key
                tl.store(dkey_ptr + target, dkey.to(dkey_ptr.dtype.element_ty), mask=mask)
            if dgate_ptr is not None:
                dgate = dhidden * by_gate
                tl.store(dgate_ptr + target, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


def _launch_weights(
    problem: Problem,
    value: Tensor,
    dcontext: Tensor | None,
    dweights: Tensor | None,
    stats: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, their gradients ``g`` and ``delta`` that the first kernel leaves."""
    heads, branches = problem.heads, problem.rows_q
    config, segment = configurations.POOL, configurations.pool_segment(problem.max_k)
    tiles, group = problem.tiles("k", segment), configurations.pool_group(branches)
    weights, gradients = torch.empty_like(scores), torch.empty_like(scores)
    delta = scores.new_empty((tiles, branches, heads, 2))
    additive_pool_bwd_weights_kernel[(tiles, heads, triton.cdiv(branches, group))](
        value,
        dcontext,
        dweights,
        stats.contiguous(),
        scores.contiguous(),
        weights,
        gradients,
        delta,
        *problem.key_side(),
        problem.seed,
        problem.batch,
        problem.rows_k,
        problem.max_k,
        *problem.dropout(),
        *strides_of(value, problem.cu_k),
        H=heads,
        K=branches,
        DV=problem.value_dim,
        SEGMENT=segment,
        GROUP=group,
        BLOCK_DV=config.value_features,
        ALIGNMENT=alignment(value),
        num_warps=config.warps,
    )
    return weights, gradients, delta


def _launch_gradients(
    problem: Problem,
    inputs: tuple,
    features: tuple,
    dcontext: Tensor | None,
    softmax: tuple,
    wanted: list[Tensor | None],
) -> None:
    """Fill the gradients that are not None, from what :func:`_launch_weights` returns."""
    key, _, score_weight, gate = inputs
    dkey, dvalue, dscore_weight, dgate = wanted
    heads, branches, dim = problem.heads, problem.rows_q, problem.dim
    config, segment = configurations.POOL_GRADIENT, configurations.pool_segment(problem.max_k)
    tiles = problem.tiles("k", segment)
    partial = None
    if dscore_weight is not None:
        partial = key.new_zeros((tiles, heads, branches, dim), dtype=torch.float32)
    seed, *thresholds = features
    additive_pool_bwd_kernel[(tiles, heads)](
        key,
        gate,
        score_weight,
        dcontext,
        *softmax,
        dkey,
        dvalue,
        partial,
        dgate,
        *problem.key_side(),
        problem.seed,
        seed,
        problem.batch,
        problem.rows_k,
        problem.max_k,
        triton.cdiv(problem.rows_k, segment),
        *problem.dropout(),
        *thresholds,
        *strides_of(key, problem.cu_k),
        *strides_of_gate(gate, problem.cu_k),
        H=heads,
        K=branches,
        D=dim,
        DV=problem.value_dim,
        SEGMENT=segment,
        BLOCK_D=config.features,
        BLOCK_DV=config.value_features,
        ALIGNMENT=alignment(key, gate),
        USE_PTX=uses_ptx(key),
        num_warps=config.warps,
    )
    if dscore_weight is not None:
        sum_partial(partial, dscore_weight)


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
    layout = (cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_k)
    problem = describe_pool(key, value, score_weight, *layout, dropout_p, dropout_seed)
    bits = (GRAD_KEY, GRAD_VALUE, GRAD_SCORE_WEIGHT, GRAD_GATE)
    inputs = (key, value, score_weight, key if gate is None else gate)
    gradients = [
        tensor.new_empty(tensor.shape if grad_mask & bit else (0,))
        for tensor, bit in zip(inputs, bits)
    ]
    if is_constant(problem, dweights) or stats.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    raw, weights_layout = divmod(weights_layout, RAW)
    if dweights is not None:  # as [.., H, K]
        by_key = weights_layout == JAGGED_WEIGHTS
        dweights = (dweights if by_key else dweights.permute(0, 3, 1, 2)).contiguous()
    if dcontext is None or raw:
        dcontext = None
        gradients[1].zero_()
        grad_mask &= ~GRAD_VALUE
    else:
        dcontext = dcontext.contiguous()
    inputs = rows_of(key), rows_of(value), score_weight.contiguous(), gate_rows(gate)
    features = feature_dropout(dropout_seed, tanh_dropout_p, gate_dropout_p)
    wanted = [grad if grad_mask & bit else None for grad, bit in zip(gradients, bits)]
    with on_device(key):
        softmax = None, dweights, None
        if not raw:
            if scores.numel() == 0:
                scores = stats.new_empty((*key.shape[:3], problem.rows_q))
                launch_forward(problem, inputs, features, None, None, scores)
            softmax = _launch_weights(problem, inputs[1], dcontext, dweights, stats, scores)
        _launch_gradients(problem, inputs, features, dcontext, softmax, wanted)
    return tuple(gradients)
