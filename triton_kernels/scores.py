"""Scores ``e_ij = sum_d w_d tanh(q_id + k_jd)`` of a tile of queries and keys."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import add_product, add_weighted_pair, as_float32, exp_twice, tanh_and_derivative
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

# A thread has sums of every fourth query and every fourth key of a tile, and of a pair of features
# in BLOCK_D. On both sides a tile has parts, of a half, a quarter, an eighth and an eighth of the
# groups of four, of which those are computed that add up to as many groups as there are.
GROUP = tl.constexpr(4)
SAMPLED_BLOCKS = tl.constexpr(4)  # of features, that are looked at for informative ones
# Features after which half of their score weights is taken from sums of fractions.
CENTRED_FEATURES = tl.constexpr(128)


class Pairs(NamedTuple):
    """The queries of a program, the keys of their sequence, and the score weights of their head."""

    query_ptr: tl.tensor  # row 0 of the sequence
    stride_qt: tl.tensor
    first_query: tl.tensor
    length_q: tl.tensor  # of the sequence
    key_ptr: tl.tensor  # row 0 of the sequence
    stride_kt: tl.tensor
    length: tl.tensor  # of the sequence, at least 1 where there are scores
    score_weight_ptr: tl.tensor  # [D]
    weights_fit: tl.tensor  # this and the next two: of :func:`weights_are_fit`
    weight_norm: tl.tensor
    weight_sum: tl.tensor
    stride_scores: tl.tensor  # between queries


@triton.constexpr_function
def parts_of(block):
    """The parts of a side in groups of rows: a half, a quarter, an eighth and an eighth."""
    groups = block // GROUP.value
    sizes = [groups >> bit for bit in (1, 2, 3) if groups >> bit]
    return (*sizes, groups - sum(sizes))


@triton.constexpr_function
def bit_of(block, part):
    """Of what :func:`present_parts` returns."""
    sizes = parts_of(block)
    return sizes[part] if part + 1 < len(sizes) else sum(sizes)


@triton.jit
def present_parts(rows, BLOCK: tl.constexpr):
    """Those that so many rows need: a set of bits, which for all but the last are their sizes."""
    groups = tl.minimum(tl.cdiv(rows, GROUP), BLOCK // GROUP).to(tl.int32)
    return tl.where(groups == BLOCK // GROUP, 2 * groups - 1, groups)


@triton.jit
def rows_of_parts(present, BLOCK: tl.constexpr):
    """The row of each place of a tile, [BLOCK]: the parts that are present follow each other."""
    PARTS: tl.constexpr = parts_of(BLOCK)
    row = tl.arange(0, BLOCK)
    place = row
    for i in tl.static_range(len(PARTS) - 1):
        absent = GROUP * (PARTS[i] - (present & PARTS[i]))
        row -= tl.where(place >= GROUP * sum_before(PARTS, i + 1), absent, 0)
    return row


@triton.constexpr_function
def sum_before(numbers, end):
    return sum(numbers[:end])


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
def unstacked(x):
    """Of ``x`` [A, B, N, 2] the tensors [A, B] at 0 of the last axis, and those at 1, as tuples."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    if N == 1:
        first, second = tl.split(tl.reshape(x, (A, B, 2)))
        return (first,), (second,)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (A, B, N // 2, 2, 2)), (0, 1, 2, 4, 3)))
        even_first, even_second = unstacked(even)
        odd_first, odd_second = unstacked(odd)
        first = ()
        second = ()
        for i in tl.static_range(N // 2):
            first += (even_first[i], odd_first[i])
            second += (even_second[i], odd_second[i])
        return first, second


@triton.jit
def stacked(x, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr):
    """``[A, B, COUNT]`` of the tensors number FIRST, FIRST + STEP and so on of a tuple."""
    if COUNT == 1:
        return x[FIRST][:, :, None]
    else:
        A: tl.constexpr = x[FIRST].shape[0]
        B: tl.constexpr = x[FIRST].shape[1]
        even = stacked(x, FIRST, COUNT // 2, 2 * STEP)
        odd = stacked(x, FIRST + STEP, COUNT // 2, 2 * STEP)
        return tl.reshape(tl.join(even, odd), (A, B, COUNT))


@triton.jit
def exponentials(
    rows_ptr,
    feature,
    bound,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """``exp(2x)`` of rows, and their largest magnitudes with those of ``bound`` [rows, features].

    Returns:
        of the first features of pairs, and of the second, a tuple of [part, GROUP, pairs] for each
        of the parts of the rows; and the bound.
    """
    x = load_features(rows_ptr, feature, D, PADDED, USE_PTX)
    GROUPS: tl.constexpr = x.shape[0] // GROUP
    PAIRS: tl.constexpr = x.shape[1] // 2
    PARTS: tl.constexpr = parts_of(x.shape[0])
    grouped = tl.permute(tl.reshape(exp_twice(x, REFINE), (GROUPS, GROUP, PAIRS, 2)), (1, 2, 0, 3))
    # As one tensor until every thread has what it needs, for one exchange between threads.
    x0, x1 = unstacked(grouped)
    first = ()
    second = ()
    for i in tl.static_range(len(PARTS)):
        first += (tl.permute(stacked(x0, sum_before(PARTS, i), PARTS[i], 1), (2, 0, 1)),)
        second += (tl.permute(stacked(x1, sum_before(PARTS, i), PARTS[i], 1), (2, 0, 1)),)
    return first, second, tl.maximum(bound, tl.abs(x))


@triton.jit
def factored_scores(
    pairs,
    scores_ptr,
    first_key,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAW: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Write scores by ``sum_d w_d (1 - 2 r_d)`` of BLOCK_Q queries and BLOCK_K keys.

    RAW: no sum of fractions may grow with D beyond the score, as its rounding errors do.

    Returns:
        whether magnitudes are such that the scores are right.
    """
    PADDED: tl.constexpr = D % BLOCK_D != 0
    PAIRS: tl.constexpr = BLOCK_D // 2
    QUERIES: tl.constexpr = parts_of(BLOCK_Q)
    KEYS: tl.constexpr = parts_of(BLOCK_K)
    present_q = present_parts(pairs.length_q - pairs.first_query, BLOCK_Q)
    present_k = present_parts(pairs.length - first_key, BLOCK_K)
    # Past the last row it is repeated, which there always is.
    query = pairs.first_query + rows_of_parts(present_q, BLOCK_Q)
    query_rows = pairs.query_ptr + tl.minimum(query, pairs.length_q - 1) * pairs.stride_qt
    key = first_key + rows_of_parts(present_k, BLOCK_K)
    key_rows = pairs.key_ptr + tl.minimum(key, pairs.length - 1) * pairs.stride_kt
    lane = tl.arange(0, BLOCK_D)
    sums = ()
    for i in tl.static_range(len(KEYS)):
        row = ()
        for j in tl.static_range(len(QUERIES)):
            row += (tl.zeros((KEYS[i], QUERIES[j], GROUP, GROUP, PAIRS), tl.float32),)
        sums += (row,)
    # Inputs of 16 bits err more than this form, if nothing overflows. Of others weights are added
    # lane by lane before lanes are summed, so that no partial sum is as large as sum |w|.
    GUARDED: tl.constexpr = RAW or REFINE
    SMALLEST_SUM: tl.constexpr = SMALLEST_MAGNITUDE_SUM if GUARDED else 0.0
    constant = tl.zeros((PAIRS,), tl.float32)
    query_bound = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    key_bound = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    CHUNK: tl.constexpr = CENTRED_FEATURES if RAW else max(D, 1)
    for chunk in range(0, D, CHUNK):
        for begin in range(chunk, tl.minimum(chunk + CHUNK, D), BLOCK_D):
            d = begin + lane
            a0, a1, query_bound = exponentials(
                query_rows, d, query_bound, D, PADDED, REFINE, USE_PTX
            )
            b0, b1, key_bound = exponentials(key_rows, d, key_bound, D, PADDED, REFINE, USE_PTX)
            weights = load_weights(pairs.score_weight_ptr, d, D, PADDED)
            w0, w1 = tl.split(tl.reshape(weights, (PAIRS, 2)))
            if GUARDED:
                constant += w0 + w1
            added = ()
            for i in tl.static_range(len(KEYS)):
                row = sums[i]
                if present_k & bit_of(BLOCK_K, i) != 0:
                    row = added_pairs(
                        row, present_q, a0, a1, b0[i], b1[i], w0, w1, BLOCK_Q, USE_PTX
                    )
                added += (row,)
            sums = added
        if RAW:
            centred = ()
            for i in tl.static_range(len(KEYS)):
                row = ()
                for j in tl.static_range(len(QUERIES)):
                    row += (sums[i][j] - 0.5 * constant,)
                centred += (row,)
            sums = centred
            constant = tl.zeros((PAIRS,), tl.float32)
    largest = 0.0
    for i in tl.static_range(len(KEYS)):
        k = tl.arange(0, KEYS[i])[:, None, None, None] * GROUP + tl.arange(0, GROUP)
        k += first_key + GROUP * (present_k & sum_before(KEYS, i))
        for j in tl.static_range(len(QUERIES)):
            if (present_k & bit_of(BLOCK_K, i) != 0) & (present_q & bit_of(BLOCK_Q, j) != 0):
                q = (tl.arange(0, QUERIES[j]) * GROUP)[:, None, None] + tl.arange(0, GROUP)[:, None]
                q += pairs.first_query + GROUP * (present_q & sum_before(QUERIES, j))
                if GUARDED:
                    scores = tl.sum(constant - 2.0 * sums[i][j], 4)
                else:
                    scores = pairs.weight_sum - 2.0 * tl.sum(sums[i][j], 4)
                if RAW:
                    largest = tl.maximum(largest, tl.max(tl.abs(scores)))
                tl.store(
                    scores_ptr + q * pairs.stride_scores + k,
                    scores,
                    mask=(q < pairs.length_q) & (k < pairs.length),
                )
    query_bound = tl.max(tl.max(query_bound, 1), 0)
    key_bound = tl.max(tl.max(key_bound, 1), 0)
    is_right = in_factored_range(query_bound, key_bound, SMALLEST_SUM)
    if GUARDED:
        is_right &= pairs.weights_fit
    if RAW:
        is_right &= largest >= LEAST_SCORE * pairs.weight_norm
    if REFINE:
        is_right &= are_informative(pairs, first_key, D, BLOCK_Q, BLOCK_K, BLOCK_D, USE_PTX)
    return is_right


@triton.jit
def added_pairs(
    sums, present, a0, a1, b0, b1, w0, w1, BLOCK_Q: tl.constexpr, USE_PTX: tl.constexpr
):
    """``sums`` [keys, queries, GROUP, GROUP, pairs] of one part of the keys and each part of the
    queries, a tuple, with the fractions of a block of features added."""
    added = ()
    for j in tl.static_range(len(sums)):
        part = sums[j]
        if present & bit_of(BLOCK_Q, j) != 0:
            part = add_weighted_pair(
                part,
                a0[j][None, :, :, None, :],
                a1[j][None, :, :, None, :],
                b0[:, None, None, :, :],
                b1[:, None, None, :, :],
                w0,
                w1,
                USE_PTX,
            )
        added += (part,)
    return added


@triton.jit
def direct_scores(
    pairs,
    scores_ptr,
    first_key,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Write the same scores of BLOCK_Q queries and GROUP keys, for any magnitudes."""
    query = pairs.first_query + tl.arange(0, BLOCK_Q)
    query_rows = pairs.query_ptr + tl.minimum(query, pairs.length_q - 1) * pairs.stride_qt
    key = first_key + tl.arange(0, GROUP)
    key_rows = pairs.key_ptr + tl.minimum(key, pairs.length - 1) * pairs.stride_kt
    PADDED: tl.constexpr = D % BLOCK_D != 0
    sums = tl.zeros((BLOCK_Q, GROUP, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        q = load_features(query_rows, d, D, PADDED, USE_PTX)
        k = load_features(key_rows, d, D, PADDED, USE_PTX)
        w = load_weights(pairs.score_weight_ptr, d, D, PADDED)
        tanh, _ = tanh_and_derivative(q[:, None, :] + k[None, :, :], True, USE_PTX)
        sums += w[None, None, :] * tanh
    tl.store(
        scores_ptr + (query * pairs.stride_scores)[:, None] + key[None, :],
        tl.sum(sums, 2),
        mask=(query < pairs.length_q)[:, None] & (key < pairs.length)[None, :],
    )


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
    pairs,
    first_key,
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
    STRIDE: tl.constexpr = BLOCK_D * max(1, D // (2 * SAMPLED_BLOCKS * BLOCK_D))
    PADDED: tl.constexpr = D % BLOCK_D != 0
    query = pairs.first_query + tl.arange(0, BLOCK_Q)
    query_rows = pairs.query_ptr + tl.minimum(query, pairs.length_q - 1) * pairs.stride_qt
    paired = first_key + tl.arange(0, BLOCK_Q) % BLOCK_K
    key_rows = pairs.key_ptr + tl.minimum(paired, pairs.length - 1) * pairs.stride_kt
    informative = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, D, STRIDE):
        d = begin + tl.arange(0, BLOCK_D)
        q = load_features(query_rows, d, D, PADDED, USE_PTX)
        k = load_features(key_rows, d, D, PADDED, USE_PTX)
        weight = tl.abs(load_weights(pairs.score_weight_ptr, d, D, PADDED))
        magnitude = tl.abs(q + k)
        informs = (magnitude > SMALL_MAGNITUDE) & (magnitude < SATURATED_MAGNITUDE)
        informative += tl.where(informs, weight[None, :], 0.0)
        total += weight
    return tl.sum(informative) > tl.sum(total) * (INFORMATIVE_SHARE * BLOCK_Q)


@triton.jit
def write_scores(
    pairs,
    scores_ptr,
    first_key,
    end_key,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAW: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Write scores of up to BLOCK_Q queries and keys [first_key, end_key), tile by tile.

    They go to memory to come back as one tile: ``scores_ptr`` is of query 0 and key 0. Of up to 32
    tiles those whose magnitudes do not factor follow after the others.
    """
    tiles = tl.cdiv(end_key - first_key, BLOCK_K).to(tl.int32)
    direct = 0  # a bit a tile
    # What is the same for all tiles would be kept through the loops, in registers that are needed.
    for tile in tl.range(0, tiles, disable_licm=True):
        is_right = factored_scores(
            pairs,
            scores_ptr,
            first_key + tile * BLOCK_K,
            D,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
            RAW,
            REFINE,
            USE_PTX,
        )
        direct |= tl.where(is_right, 0, 1 << tile)
    if direct != 0:
        # Without a barrier: a thread knows of this by reductions over the program's threads, each
        # of which has written its scores before.
        for tile in range(tiles):
            if (direct >> tile) & 1 != 0:
                begin = first_key + tile * BLOCK_K
                for key in range(begin, tl.minimum(begin + BLOCK_K, end_key), GROUP):
                    direct_scores(pairs, scores_ptr, key, D, BLOCK_Q, BLOCK_D // 2, USE_PTX)
