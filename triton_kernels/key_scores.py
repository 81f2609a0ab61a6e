"""Scores of a tile's keys, ``e_kj = sum_d w_kd h_jd``, and their hidden rows ``h``.

With a query ``h_jd = tanh(q_d + k_jd)``. Without one, in pooling, ``h_jd = tanh(k_jd)``, times
``sigmoid(g_jd)`` if there is a gate, with some entries of either factor dropped out.
"""

import triton
import triton.language as tl

from .arithmetic import LN_2, LOG2_E, add_product, reciprocal, tanh_and_derivative
from .key_tiles import STAGES, load_row, load_tile, rows_at, rows_of
from .route import (
    INFORMATIVE_SHARE,
    LARGEST_WEIGHT_NORM,
    LEAST_SCORE,
    SATURATED_MAGNITUDE,
    SMALL_MAGNITUDE,
    VANISHING_SLOPE,
)


@triton.jit
def kept_features(dropout, tile, begin, FACTOR: tl.constexpr, BLOCK_D: tl.constexpr):
    """What features from ``begin`` on are multiplied by, [SEGMENT, BLOCK_D], or 1 for all.

    As ``reference.feature_keep_mask``: the four words of a counter are of four features.
    """
    if dropout is None:
        return 1.0
    else:
        group = begin // 4 + tl.arange(0, BLOCK_D // 4)
        key, group = tl.broadcast(tile.position.to(tl.int32)[:, None], group[None, :])
        number = group * 0 - 1 - (2 * tile.head + FACTOR).to(tl.int32)
        sequence = group * 0 + tile.sequence
        a, b, c, d = tl.philox(tl.load(dropout.seed_ptr), key, group, number, sequence)
        word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        keep = (word >> 8).to(tl.int32) >= tl.cast(dropout.threshold, tl.int32)
        return tl.where(keep, dropout.scale, 0.0)


@triton.jit
def arguments_of_tanh(inputs, query, tile, d, D: tl.constexpr):
    """``q_d + k_jd``, or ``k_jd``, [SEGMENT, features]; ``query`` is the sequence of the query."""
    x = load_tile(rows_of(inputs.key, tile, D), tile.attended, d, D)
    if inputs.query is not None:
        x += load_row(rows_at(inputs.query, query, 0, tile.head, D), d, D)[None, :]
    return x


@triton.jit
def hidden_and_slopes(inputs, query, tile, begin, SHAPE: tl.constexpr):
    """``h``, ``dh / dk`` and ``dh / dg`` of features from ``begin`` on, [SEGMENT, BLOCK_D] each;
    without a gate the last is nothing.
    """
    D: tl.constexpr = SHAPE.D
    d = begin + tl.arange(0, SHAPE.BLOCK_D)
    x = arguments_of_tanh(inputs, query, tile, d, D)
    tanh, slope = tanh_and_derivative(x, True, SHAPE.USE_PTX)
    if inputs.query is not None:
        return tanh, slope, slope
    else:
        kept = kept_features(inputs.tanh_dropout, tile, begin, 0, SHAPE.BLOCK_D)
        tanh *= kept
        slope = tl.where(slope < VANISHING_SLOPE, 0.0, slope) * kept
        if inputs.gate is None:
            return tanh, slope, slope
        else:
            gate = load_tile(rows_of(inputs.gate, tile, D), tile.attended, d, D)
            size = tl.abs(gate)
            decay = tl.exp(-size)  # may be subnormal, while PTX's exp2 flushes to 0
            decay += decay * tl.fma(size * LOG2_E, LN_2, -size)  # for its exponent's rounding
            larger = reciprocal(1.0 + decay, SHAPE.USE_PTX)  # sigmoid(|g|)
            smaller = decay * larger  # sigmoid(-|g|)
            kept = kept_features(inputs.gate_dropout, tile, begin, 1, SHAPE.BLOCK_D)
            sigmoid = tl.where(gate < 0, smaller, larger) * kept
            return tanh * sigmoid, slope * sigmoid, tanh * (smaller * larger * kept)


@triton.jit
def no_sums(BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    """What :func:`add_products` adds to: a tuple of [SEGMENT], or of one [SEGMENT, BLOCK]."""
    GROUP: tl.constexpr = SHAPE.GROUP
    if GROUP == 1:
        return (tl.full((SHAPE.SEGMENT, BLOCK), 0.0, tl.float32),)
    else:
        sums = ()
        for _ in tl.static_range(GROUP):
            sums += (tl.full((SHAPE.SEGMENT,), 0.0, tl.float32),)
        return sums


@triton.jit
def add_products(
    sums, rows, vectors_ptr, stride, d, branch, DIM: tl.constexpr, SHAPE: tl.constexpr
):
    """``sums_k [j] + sum_d rows_jd v_kd`` for the GROUP branches from ``branch`` on.

    Args:
        rows: [SEGMENT, features], those of numbers d.
        vectors_ptr: of ``v`` of the first of them; others are ``stride`` apart.
    """
    GROUP: tl.constexpr = SHAPE.GROUP
    added = ()
    for i in tl.static_range(GROUP):
        sum_ = sums[i]
        if branch + i < SHAPE.K:
            vector = load_row(vectors_ptr + i * stride, d, DIM)[None, :]
            if GROUP == 1:
                sum_ += rows * vector
            elif DIM % 8 == 0:
                sum_ += tl.sum(rows * vector, 1)
            else:  # a thread may have only one of the products
                sum_ += tl.sum(add_product(tl.zeros_like(rows), rows, vector), 1)
        added += (sum_,)
    return added


@triton.jit
def row_sums(sums, SHAPE: tl.constexpr):
    """Those of :func:`add_products`, [SEGMENT] each."""
    if SHAPE.GROUP == 1:
        return (tl.sum(sums[0], 1),)
    else:
        return sums


@triton.jit
def exact_scores(inputs, query, tile, branch, SHAPE: tl.constexpr):
    """Scores of the GROUP branches from ``branch`` on, a tuple of [SEGMENT]."""
    D: tl.constexpr = SHAPE.D
    weight_rows = inputs.score_weight_ptr + (tile.head * SHAPE.K + branch) * D
    sums = no_sums(SHAPE.BLOCK_D, SHAPE)
    for begin in tl.range(0, D, SHAPE.BLOCK_D, num_stages=STAGES):
        hidden, _, _ = hidden_and_slopes(inputs, query, tile, begin, SHAPE)
        d = begin + tl.arange(0, SHAPE.BLOCK_D)
        sums = add_products(sums, hidden, weight_rows, D, d, branch, D, SHAPE)
    return row_sums(sums, SHAPE)


@triton.jit
def quick_scores(inputs, query, tile, SHAPE: tl.constexpr, RAW: tl.constexpr):
    """Scores [SEGMENT] of one query, by a tanh with an absolute error, and whether that will do.

    Where few of the score weights meet a tanh that is neither nearly 0 nor nearly 1, or weights are
    large, scores would show its error; RAW ones, which are returned, also where all are small.
    """
    D: tl.constexpr = SHAPE.D
    sums = tl.full((SHAPE.SEGMENT, SHAPE.BLOCK_D), 0.0, tl.float32)
    informative = tl.full((SHAPE.SEGMENT, SHAPE.BLOCK_D), 0.0, tl.float32)
    total = tl.full((SHAPE.BLOCK_D,), 0.0, tl.float32)
    squares = tl.full((SHAPE.BLOCK_D,), 0.0, tl.float32)
    for begin in tl.range(0, D, SHAPE.BLOCK_D, num_stages=STAGES):
        d = begin + tl.arange(0, SHAPE.BLOCK_D)
        x = arguments_of_tanh(inputs, query, tile, d, D)
        tanh, _ = tanh_and_derivative(x, False, SHAPE.USE_PTX)
        weight = load_row(inputs.score_weight_ptr + tile.head * D, d, D)
        sums += weight[None, :] * tanh
        size = tl.abs(x)
        informs = (size > SMALL_MAGNITUDE) & (size < SATURATED_MAGNITUDE)
        informative += tl.where(informs, tl.abs(weight)[None, :], 0.0)
        total += tl.abs(weight)
        squares = add_product(squares, weight, weight)
    share = tl.sum(tl.where(tile.attended, tl.sum(informative, 1), 0.0), 0)
    least = tl.sum(tile.attended.to(tl.float32), 0) * tl.sum(total, 0) * INFORMATIVE_SHARE
    square = tl.sum(squares, 0)
    will_do = (share > least) & (square <= LARGEST_WEIGHT_NORM * LARGEST_WEIGHT_NORM)
    scores = tl.sum(sums, 1)
    if RAW:
        largest = tl.max(tl.where(tile.attended, tl.abs(scores), 0.0), 0)
        will_do = will_do & (largest >= tl.sqrt(square) * LEAST_SCORE)
    return scores, will_do


@triton.jit
def scores_of_tile(inputs, tile, branch, SHAPE: tl.constexpr, RAW: tl.constexpr):
    """Scores of the GROUP branches from ``branch`` on, a tuple of [SEGMENT]."""
    query = tile.sequence.to(tl.int64)
    if inputs.query is None:
        return exact_scores(inputs, query, tile, branch, SHAPE)
    else:
        scores, will_do = quick_scores(inputs, query, tile, SHAPE, RAW)
        if not will_do:
            scores = exact_scores(inputs, query, tile, branch, SHAPE)[0]
        return (scores,)
