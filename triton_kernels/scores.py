"""Scores ``e_ij = sum_d w_d tanh(q_id + k_jd)`` of a tile of queries and keys."""

import triton
import triton.language as tl

from .arithmetic import add_product, as_float32, exp_twice, tanh_and_derivative, weighted_pair
from .route import (
    INFORMATIVE_SHARE,
    LARGEST_WEIGHT_NORM,
    LARGEST_WEIGHT_SUM,
    LEAST_SCORE,
    SATURATED_MAGNITUDE,
    SMALL_MAGNITUDE,
    SMALLEST_MAGNITUDE_SUM,
    in_factored_range,
)

SAMPLED_BLOCKS = tl.constexpr(4)  # of features, that are looked at for informative ones
# Pairs of features after which half of their score weights is taken from sums of fractions.
CENTRED_PAIRS = tl.constexpr(64)


@triton.constexpr_function
def half_in_blocks(dim, block):
    """The half of pairs (d, d + half): that of ``dim``, in whole blocks."""
    return (dim + 2 * block - 1) // (2 * block) * block


@triton.constexpr_function
def centred_pairs(half, block):
    """``CENTRED_PAIRS``, or somewhat fewer if then all loops over blocks of them are equal."""
    blocks, most = half // block, CENTRED_PAIRS.value // block
    equal = [count for count in range(max(1, most // 2), most + 1) if blocks % count == 0]
    return block * max(equal, default=most)


@triton.constexpr_function
def feature_block(dim, most):
    """How many features are looked at together where they are only looked at."""
    return min(triton.next_power_of_2(max(dim, 1)), most)


@triton.jit
def load_features(rows_ptr, feature, D: tl.constexpr, PADDED: tl.constexpr, USE_PTX: tl.constexpr):
    """``[rows, features]`` as float32; 0 beyond feature D."""
    if PADDED:
        values = tl.load(rows_ptr[:, None] + feature[None, :], mask=feature[None, :] < D, other=0)
    else:
        values = tl.load(rows_ptr[:, None] + feature[None, :])
    return as_float32(values, USE_PTX)


@triton.jit
def load_weights(score_weight_ptr, feature, D: tl.constexpr, PADDED: tl.constexpr):
    """``[features]`` as float32; 0 beyond feature D."""
    if PADDED:
        weights = tl.load(score_weight_ptr + feature, mask=feature < D, other=0)
    else:
        weights = tl.load(score_weight_ptr + feature)
    return weights.to(tl.float32)


@triton.jit
def factored_scores(
    query_rows,
    key_rows,
    score_weight_ptr,
    weight_sum,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAW: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Scores by ``sum_d w_d (1 - 2 r_d)``, and the largest magnitudes of queries and of keys.

    Args:
        query_rows: pointers to rows, [BLOCK_Q].
        key_rows: pointers to rows, [BLOCK_K].
        score_weight_ptr: the head's [D].
        weight_sum: of the score weights.
        RAW: no sum of fractions may grow with D beyond the score, as its rounding errors do.

    Returns:
        scores [BLOCK_Q, BLOCK_K] and two numbers.
    """
    HALF: tl.constexpr = half_in_blocks(D, BLOCK_D)
    PADDED: tl.constexpr = 2 * HALF != D
    lane = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_Q, BLOCK_K, BLOCK_D), tl.float32)
    # Added lane by lane before lanes are summed, so that no partial sum is as large as sum |w|;
    # inputs of 16 bits err more than that.
    LANES: tl.constexpr = RAW or REFINE
    constant = tl.zeros((BLOCK_D,), tl.float32)
    query_bound = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    key_bound = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    CHUNK: tl.constexpr = centred_pairs(HALF, BLOCK_D) if RAW else max(HALF, 1)
    for chunk in range(0, HALF, CHUNK):
        pairs = CHUNK if HALF % CHUNK == 0 else tl.minimum(HALF - chunk, CHUNK)
        for begin in tl.range(0, pairs, BLOCK_D, loop_unroll_factor=2):
            d0 = chunk + begin + lane
            d1 = d0 + HALF
            q0 = load_features(query_rows, d0, D, PADDED, USE_PTX)
            q1 = load_features(query_rows, d1, D, PADDED, USE_PTX)
            k0 = load_features(key_rows, d0, D, PADDED, USE_PTX)
            k1 = load_features(key_rows, d1, D, PADDED, USE_PTX)
            query_bound = tl.maximum(query_bound, tl.maximum(tl.abs(q0), tl.abs(q1)))
            key_bound = tl.maximum(key_bound, tl.maximum(tl.abs(k0), tl.abs(k1)))
            w0 = load_weights(score_weight_ptr, d0, D, PADDED)
            w1 = load_weights(score_weight_ptr, d1, D, PADDED)
            if LANES:
                constant += w0 + w1
            sums += weighted_pair(
                exp_twice(q0, REFINE)[:, None, :],
                exp_twice(q1, REFINE)[:, None, :],
                exp_twice(k0, REFINE)[None, :, :],
                exp_twice(k1, REFINE)[None, :, :],
                w0[None, None, :],
                w1[None, None, :],
                USE_PTX,
            )
        if RAW:
            sums -= 0.5 * constant[None, None, :]
            constant = tl.zeros((BLOCK_D,), tl.float32)
    if LANES:
        scores = tl.sum(constant[None, None, :] - 2.0 * sums, 2)
    else:
        scores = weight_sum - 2.0 * tl.sum(sums, 2)
    return scores, tl.max(tl.max(query_bound, 1), 0), tl.max(tl.max(key_bound, 1), 0)


@triton.jit
def direct_scores(
    query_rows,
    key_rows,
    score_weight_ptr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """The same scores ``[BLOCK_Q, BLOCK_K]`` for any magnitudes."""
    lane = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_Q, BLOCK_K, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + lane
        q = load_features(query_rows, d, D, D % BLOCK_D != 0, USE_PTX)
        k = load_features(key_rows, d, D, D % BLOCK_D != 0, USE_PTX)
        w = load_weights(score_weight_ptr, d, D, D % BLOCK_D != 0)
        tanh, _ = tanh_and_derivative(q[:, None, :] + k[None, :, :], True, USE_PTX)
        sums += w[None, None, :] * tanh
    return tl.sum(sums, 2)


@triton.jit
def weights_are_fit(score_weight_ptr, D: tl.constexpr):
    """Whether scores may be factored for all that the head's score weights say: they are neither
    too large nor so much of one sign that sums of fractions exceed the scores by far. And the root
    of sum w^2, and sum w."""
    BLOCK: tl.constexpr = feature_block(D, 1024)  # a few a thread
    total = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, D, BLOCK):
        weight = load_weights(score_weight_ptr, begin + tl.arange(0, BLOCK), D, D % BLOCK != 0)
        total += weight
        squares = add_product(squares, weight, weight)
    norm = tl.sqrt(tl.sum(squares))
    weight_sum = tl.sum(total)
    fit = (norm <= LARGEST_WEIGHT_NORM) & (tl.abs(weight_sum) <= norm * LARGEST_WEIGHT_SUM)
    return fit, norm, weight_sum


@triton.jit
def are_informative(
    query_rows,
    key_ptr,
    stride_kt,
    first_key,
    length,
    score_weight_ptr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Whether enough of the score weights meet a tanh that is neither nearly 0 nor nearly 1.

    If few do, as where every key is minus every query up to noise, scores differ so little that the
    error of the factored form, a part of sum |w|, would show. Looked at is each query with
    one of the keys [first_key, first_key + BLOCK_K), in a sample of the features.
    """
    HALF: tl.constexpr = half_in_blocks(D, BLOCK_D)
    PADDED: tl.constexpr = 2 * HALF != D
    STRIDE: tl.constexpr = BLOCK_D * max(1, HALF // (SAMPLED_BLOCKS * BLOCK_D))
    paired = first_key + tl.arange(0, BLOCK_Q) % BLOCK_K
    key_rows = key_ptr + tl.minimum(paired, length - 1) * stride_kt
    informative = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, HALF, STRIDE):
        for half in tl.static_range(2):
            d = begin + half * HALF + tl.arange(0, BLOCK_D)
            q = load_features(query_rows, d, D, PADDED, USE_PTX)
            k = load_features(key_rows, d, D, PADDED, USE_PTX)
            weight = tl.abs(load_weights(score_weight_ptr, d, D, PADDED))
            magnitude = tl.abs(q + k)
            informs = (magnitude > SMALL_MAGNITUDE) & (magnitude < SATURATED_MAGNITUDE)
            informative += tl.where(informs, weight[None, :], 0.0)
            total += weight
    return tl.sum(informative) > tl.sum(total) * (INFORMATIVE_SHARE * BLOCK_Q)


@triton.jit
def score_tile(
    query_ptr,
    stride_qt,
    first_query,
    length_q,
    key_ptr,
    stride_kt,
    first_key,
    length,
    score_weight_ptr,
    weights_fit,
    weight_norm,
    weight_sum,
    scores_ptr,
    stride_scores,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIRECT: tl.constexpr,
    RAW: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Write the scores of BLOCK_Q queries and BLOCK_K keys, unless the tile needs the other route.

    Arguments are those of :func:`write_scores`, with ``scores_ptr`` of query 0 and ``first_key``;
    ``weights_fit``, ``weight_norm`` and ``weight_sum`` are of :func:`weights_are_fit`.

    Returns:
        whether they are written. They always are if DIRECT, else if magnitudes factor.
    """
    # Past the last row it is repeated, which there always is.
    query = first_query + tl.arange(0, BLOCK_Q)
    query_rows = query_ptr + tl.minimum(query, length_q - 1) * stride_qt
    key = first_key + tl.arange(0, BLOCK_K)
    key_rows = key_ptr + tl.minimum(key, length - 1) * stride_kt
    if DIRECT:
        is_right = weights_fit | True
        scores = direct_scores(
            query_rows, key_rows, score_weight_ptr, D, BLOCK_Q, BLOCK_K, BLOCK_D, USE_PTX
        )
    else:
        scores, query_bound, key_bound = factored_scores(
            query_rows,
            key_rows,
            score_weight_ptr,
            weight_sum,
            D,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
            RAW,
            REFINE,
            USE_PTX,
        )
        is_right = in_factored_range(query_bound, key_bound, SMALLEST_MAGNITUDE_SUM) & weights_fit
        if RAW:
            largest = tl.max(tl.max(tl.abs(scores), 1), 0)
            is_right &= largest >= LEAST_SCORE * weight_norm
        if REFINE:  # inputs of 16 bits err more than this form
            is_right &= are_informative(
                query_rows,
                key_ptr,
                stride_kt,
                first_key,
                length,
                score_weight_ptr,
                D,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
                USE_PTX,
            )
    written = tl.where(is_right, length_q, 0)  # queries
    tl.store(
        scores_ptr + (query * stride_scores)[:, None] + tl.arange(0, BLOCK_K)[None, :],
        scores,
        mask=(query < written)[:, None] & (key < length)[None, :],
    )
    return is_right


@triton.jit
def write_scores(
    query_ptr,
    stride_qt,
    first_query,
    length_q,
    key_ptr,
    stride_kt,
    first_key,
    end_key,
    length,
    score_weight_ptr,
    scores_ptr,
    stride_scores,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAW: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Write scores of up to BLOCK_Q queries and keys [first_key, end_key), tile by tile.

    They go to memory to come back as one tile. The queries, and the last keys, may fit a tile of
    half the width. Of up to 32 tiles those that do not factor follow after the others.

    Args:
        query_ptr, key_ptr: row 0 of the sequence.
        first_query, length_q: this program's first query; the sequence's queries.
        length: the sequence's keys, at least 1.
        scores_ptr: where the score of query 0 and ``first_key`` goes; a query's are
            ``stride_scores`` apart.
        RAW: scores are returned; only their differences matter to a softmax.
    """
    weights_fit, weight_norm, weight_sum = weights_are_fit(score_weight_ptr, D)
    tiles = tl.cdiv(end_key - first_key, BLOCK_K).to(tl.int32)
    direct = 0  # a bit a tile
    for half_q in tl.static_range(2):
        if (length_q - first_query <= BLOCK_Q // 2) == half_q:
            for tile in range(tiles):
                begin = first_key + tile * BLOCK_K
                for half_k in tl.static_range(2):
                    if (end_key - begin <= BLOCK_K // 2) == half_k:
                        is_right = score_tile(
                            query_ptr,
                            stride_qt,
                            first_query,
                            length_q,
                            key_ptr,
                            stride_kt,
                            begin,
                            length,
                            score_weight_ptr,
                            weights_fit,
                            weight_norm,
                            weight_sum,
                            scores_ptr + tile * BLOCK_K,
                            stride_scores,
                            D,
                            BLOCK_Q >> half_q,
                            BLOCK_K >> half_k,
                            BLOCK_D << (half_q + half_k),
                            False,
                            RAW,
                            REFINE,
                            USE_PTX,
                        )
                        direct |= tl.where(is_right, 0, 1 << tile)
    if direct != 0:
        for tile in range(tiles):
            if (direct >> tile) & 1 != 0:
                score_tile(
                    query_ptr,
                    stride_qt,
                    first_query,
                    length_q,
                    key_ptr,
                    stride_kt,
                    first_key + tile * BLOCK_K,
                    length,
                    score_weight_ptr,
                    weights_fit,
                    weight_norm,
                    weight_sum,
                    scores_ptr + tile * BLOCK_K,
                    stride_scores,
                    D,
                    BLOCK_Q,
                    BLOCK_K,
                    BLOCK_D,
                    True,
                    RAW,
                    REFINE,
                    USE_PTX,
                )
