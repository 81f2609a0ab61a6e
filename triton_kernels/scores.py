"""Scores ``e_ij = sum_d w_d tanh(q_id + k_jd)`` of a tile of queries and keys."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import add_product, as_float32, exp_twice, tanh_and_derivative
from .parts import (
    GROUP,
    added_features,
    beside_others,
    operands_of,
    part_sizes,
    present_parts,
    rows_of_parts,
    stacked,
    subtracted,
    sum_before,
    tile_scores,
    unstacked,
)
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

VECTOR = tl.constexpr(4)  # features next to each other, which mostly one thread loads
SAMPLED_FEATURES = tl.constexpr(16)  # of a block that is looked at for informative ones
SAMPLED_BLOCKS = tl.constexpr(4)
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


class Shape(NamedTuple):
    """What machine code depends on; a constexpr of the kernel."""

    H: int
    D: int
    DV: int
    QUERIES: int  # of a tile
    KEYS: int
    FEATURES: int  # of a block, an exchange between threads
    PAIRS: int  # of features: those of a block are taken in turns of so many
    VALUES: int  # features of a block of values
    COLUMNS: int  # keys whose weights meet their values together
    SINGLE: bool  # all keys of any sequence are one segment
    KEEP_SCORES: bool
    RAW: bool  # no sum of fractions may grow with D beyond the score, as its errors do
    REFINE: bool  # inputs of 32 bits
    USE_PTX: bool


@triton.constexpr_function
def feature_block(dim, most):
    """How many features are looked at together where they are only looked at."""
    return min(triton.next_power_of_2(max(dim, 1)), most)


@triton.jit
def load_features(ptrs, feature, D, PADDED: tl.constexpr, USE_PTX: tl.constexpr):
    """``[rows, features]`` as float32; 0 from feature D on."""
    if PADDED:
        values = tl.load(ptrs, mask=feature[None, :] < D, other=0)
    else:
        values = tl.load(ptrs)
    return as_float32(values, USE_PTX)


@triton.jit
def load_weights(ptrs, feature, D, PADDED: tl.constexpr):
    """``[features]`` as float32; 0 from feature D on."""
    if PADDED:
        weights = tl.load(ptrs, mask=feature < D, other=0)
    else:
        weights = tl.load(ptrs)
    return weights.to(tl.float32)


@triton.jit
def first_features(pairs, key, feature, SHAPE: tl.constexpr):
    """Pointers to the first features of the tile's queries, of these keys and of score weights.

    Loops carry them on. For a load whose pointers are computed beside it, Triton 3.9 looks through
    all of the kernel: a sixth of the time that this one took to compile in float32.
    """
    # Past the last row it is repeated, which there always is.
    query = tl.minimum(pairs.first_query + tl.arange(0, SHAPE.QUERIES), pairs.length_q - 1)
    key = tl.minimum(key, pairs.length - 1)
    return (
        (pairs.query_ptr + query * pairs.stride_qt)[:, None] + feature[None, :],
        (pairs.key_ptr + key * pairs.stride_kt)[:, None] + feature[None, :],
        pairs.score_weight_ptr + feature,
    )


@triton.jit
def exponentials(rows_ptr, count, bound, ARE_KEYS: tl.constexpr, SHAPE: tl.constexpr):
    """``exp(2x)`` of a block of features of rows, of which there are ``count``, and their largest
    magnitudes with those of ``bound``, of VECTOR features.

    Returns:
        of the first features of pairs and of the second a tuple, of :func:`beside_others` for each
        turn and each of the parts of the rows; and the bound.
    """
    PADDED: tl.constexpr = SHAPE.D % SHAPE.FEATURES != 0
    feature = tl.arange(0, SHAPE.FEATURES)
    x = load_features(rows_ptr[:, None] + feature[None, :], feature, count, PADDED, SHAPE.USE_PTX)
    ROWS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = ROWS // GROUP
    TURNS: tl.constexpr = SHAPE.FEATURES // (2 * SHAPE.PAIRS)
    PARTS: tl.constexpr = part_sizes(ROWS)
    largest = tl.max(tl.reshape(tl.abs(x), (ROWS, SHAPE.FEATURES // VECTOR, VECTOR)), 2)
    x = tl.reshape(exp_twice(x, SHAPE.REFINE), (GROUPS, GROUP, TURNS, SHAPE.PAIRS, 2))
    x = tl.reshape(tl.permute(x, (1, 3, 2, 0, 4)), (GROUP, SHAPE.PAIRS, TURNS * GROUPS, 2))
    # As one tensor until every thread has what it needs, for one exchange between threads.
    pieces = unstacked(x)
    parts = ()
    for second in tl.static_range(2):
        of_turns = ()
        for turn in tl.static_range(TURNS):
            for i in tl.static_range(len(PARTS)):
                part = stacked(pieces[second], turn * GROUPS + sum_before(PARTS, i), PARTS[i], 1)
                of_turns += (beside_others(part, ARE_KEYS),)
        parts += (of_turns,)
    return parts, tl.maximum(bound, largest)


@triton.jit
def weights_of_pairs(weights_ptr, count, SHAPE: tl.constexpr):
    """Score weights of the first features of pairs and of the second, [1, PAIRS] for each turn."""
    PADDED: tl.constexpr = SHAPE.D % SHAPE.FEATURES != 0
    feature = tl.arange(0, SHAPE.FEATURES)
    w = load_weights(weights_ptr + feature, feature, count, PADDED)
    TURNS: tl.constexpr = SHAPE.FEATURES // (2 * SHAPE.PAIRS)
    return unstacked(tl.permute(tl.reshape(w, (1, TURNS, SHAPE.PAIRS, 2)), (0, 2, 1, 3)))


@triton.jit
def factored_scores(pairs, scores_ptr, first_key, SHAPE: tl.constexpr):
    """Write scores by ``sum_d w_d (1 - 2 r_d)`` of a tile of queries and keys.

    Returns:
        whether magnitudes are such that the scores are right.
    """
    tl.static_assert(SHAPE.FEATURES % (2 * SHAPE.PAIRS) == 0)
    tl.static_assert(not SHAPE.RAW or CENTRED_FEATURES % SHAPE.FEATURES == 0)
    QUERIES: tl.constexpr = part_sizes(SHAPE.QUERIES)
    KEYS: tl.constexpr = part_sizes(SHAPE.KEYS)
    present_q = present_parts(pairs.length_q - pairs.first_query, SHAPE.QUERIES)
    present_k = present_parts(pairs.length - first_key, SHAPE.KEYS)
    # Past the last row it is repeated, which there always is.
    query = pairs.first_query + rows_of_parts(present_q, SHAPE.QUERIES)
    query_rows = tl.minimum(query, pairs.length_q - 1) * pairs.stride_qt
    key = first_key + rows_of_parts(present_k, SHAPE.KEYS)
    key_rows = tl.minimum(key, pairs.length - 1) * pairs.stride_kt
    query_ptr, key_ptr, weights_ptr = pairs.query_ptr, pairs.key_ptr, pairs.score_weight_ptr
    sums = ()
    for i in tl.static_range(len(KEYS)):
        row = ()
        for j in tl.static_range(len(QUERIES)):
            row += (tl.zeros((KEYS[i], QUERIES[j], GROUP, GROUP, SHAPE.PAIRS), tl.float32),)
        sums += (row,)
    # Inputs of 16 bits err more than this form, if nothing overflows. Of others weights are added
    # lane by lane before lanes are summed, so that no partial sum is as large as sum |w|.
    GUARDED: tl.constexpr = SHAPE.RAW or SHAPE.REFINE
    SMALLEST_SUM: tl.constexpr = SMALLEST_MAGNITUDE_SUM if GUARDED else 0.0
    constant = tl.zeros((1, 1, 1, 1, SHAPE.PAIRS), tl.float32) if GUARDED else None
    query_bound = tl.zeros((SHAPE.QUERIES, SHAPE.FEATURES // VECTOR), tl.float32)
    key_bound = tl.zeros((SHAPE.KEYS, SHAPE.FEATURES // VECTOR), tl.float32)
    # Most tiles of long sequences are: for them parts are not asked for one by one.
    is_full = (pairs.length_q - pairs.first_query > SHAPE.QUERIES - GROUP) & (
        pairs.length - first_key > SHAPE.KEYS - GROUP
    )
    CHUNK: tl.constexpr = CENTRED_FEATURES if SHAPE.RAW else max(SHAPE.D, 1)
    for chunk in range(0, SHAPE.D, CHUNK):
        for begin in range(chunk, tl.minimum(chunk + CHUNK, SHAPE.D), SHAPE.FEATURES):
            count = SHAPE.D - begin
            rows = query_ptr + query_rows
            a, query_bound = exponentials(rows, count, query_bound, False, SHAPE)
            rows = key_ptr + key_rows
            b, key_bound = exponentials(rows, count, key_bound, True, SHAPE)
            w = weights_of_pairs(weights_ptr, count, SHAPE)
            query_ptr += SHAPE.FEATURES
            key_ptr += SHAPE.FEATURES
            weights_ptr += SHAPE.FEATURES
            if GUARDED:
                for turn in tl.static_range(len(w[0])):
                    constant += w[0][turn] + w[1][turn]
            # Once for both branches below: what each made for itself took long to compile.
            operands = operands_of(sums, a, b, w)
            if is_full:
                sums = added_features(sums, present_q, present_k, operands, True, SHAPE)
            else:
                sums = added_features(sums, present_q, present_k, operands, False, SHAPE)
        if SHAPE.RAW:
            sums = subtracted(sums, 0.5 * constant)
            constant = tl.zeros_like(constant)
    scores = tile_scores(sums, present_q, present_k, constant, pairs.weight_sum, SHAPE)
    tl.store(
        scores_ptr + (query * pairs.stride_scores)[:, None] + key[None, :],
        scores,
        mask=(query < pairs.length_q)[:, None] & (key < pairs.length)[None, :],
    )
    query_bound = tl.max(tl.max(query_bound, 1), 0)
    key_bound = tl.max(tl.max(key_bound, 1), 0)
    is_right = in_factored_range(query_bound, key_bound, SMALLEST_SUM)
    if GUARDED:
        is_right &= pairs.weights_fit
    if SHAPE.RAW:
        largest = tl.max(tl.max(tl.abs(scores), 1), 0)
        is_right &= largest >= LEAST_SCORE * pairs.weight_norm
    if SHAPE.REFINE:
        is_right &= are_informative(pairs, first_key, SHAPE)
    return is_right


@triton.jit
def direct_scores(pairs, scores_ptr, first_key, SHAPE: tl.constexpr):
    """Write the same scores of a tile's queries and GROUP keys, for any magnitudes."""
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.FEATURES // 2
    query = pairs.first_query + tl.arange(0, SHAPE.QUERIES)
    key = first_key + tl.arange(0, GROUP)
    feature = tl.arange(0, BLOCK_D)
    query_ptrs, key_ptrs, weight_ptrs = first_features(pairs, key, feature, SHAPE)
    PADDED: tl.constexpr = D % BLOCK_D != 0
    sums = tl.zeros((SHAPE.QUERIES, GROUP, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + feature
        q = load_features(query_ptrs, d, D, PADDED, SHAPE.USE_PTX)
        k = load_features(key_ptrs, d, D, PADDED, SHAPE.USE_PTX)
        w = load_weights(weight_ptrs, d, D, PADDED)
        query_ptrs += BLOCK_D
        key_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
        tanh, _ = tanh_and_derivative(q[:, None, :] + k[None, :, :], True, SHAPE.USE_PTX)
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
        d = begin + tl.arange(0, BLOCK)
        weight = load_weights(score_weight_ptr + d, d, D, D % BLOCK != 0)
        total += weight
        squares = add_product(squares, weight, weight)
    norm = tl.sqrt(tl.sum(squares))
    weight_sum = tl.sum(total)
    fit = (norm <= LARGEST_WEIGHT_NORM) & (tl.abs(weight_sum) <= norm * LARGEST_WEIGHT_SUM)
    return fit, norm, weight_sum


@triton.jit
def are_informative(pairs, first_key, SHAPE: tl.constexpr):
    """Whether enough of the score weights meet a tanh that is neither nearly 0 nor nearly 1.

    If few do, as where every key is minus every query up to noise, scores differ so little that the
    error of the factored form, a part of sum |w|, would show. Looked at is each query with
    one of the tile's keys, from ``first_key`` on, in a sample of the features.
    """
    D: tl.constexpr = SHAPE.D
    BLOCK: tl.constexpr = feature_block(D, SAMPLED_FEATURES)
    STRIDE: tl.constexpr = BLOCK * max(1, D // (2 * SAMPLED_BLOCKS * BLOCK))
    PADDED: tl.constexpr = D % BLOCK != 0
    key = first_key + tl.arange(0, SHAPE.QUERIES) % SHAPE.KEYS
    feature = tl.arange(0, BLOCK)
    query_ptrs, key_ptrs, weight_ptrs = first_features(pairs, key, feature, SHAPE)
    informative = tl.zeros((SHAPE.QUERIES, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, D, STRIDE):
        d = begin + feature
        q = load_features(query_ptrs, d, D, PADDED, SHAPE.USE_PTX)
        k = load_features(key_ptrs, d, D, PADDED, SHAPE.USE_PTX)
        weight = tl.abs(load_weights(weight_ptrs, d, D, PADDED))
        query_ptrs += STRIDE
        key_ptrs += STRIDE
        weight_ptrs += STRIDE
        magnitude = tl.abs(q + k)
        informs = (magnitude > SMALL_MAGNITUDE) & (magnitude < SATURATED_MAGNITUDE)
        informative += tl.where(informs, weight[None, :], 0.0)
        total += weight
    return tl.sum(informative) > tl.sum(total) * (INFORMATIVE_SHARE * SHAPE.QUERIES)


@triton.jit
def write_scores(pairs, scores_ptr, first_key, end_key, SHAPE: tl.constexpr):
    """Write scores of a tile's queries and keys [first_key, end_key), tile by tile.

    They go to memory to come back as one tile: ``scores_ptr`` is of query 0 and key 0. Of up to 32
    tiles those whose magnitudes do not factor follow after the others.
    """
    tiles = tl.cdiv(end_key - first_key, SHAPE.KEYS).to(tl.int32)
    direct = 0  # a bit a tile
    # What is the same for all tiles would be kept through the loops, in registers that are needed.
    for tile in tl.range(0, tiles, disable_licm=True):
        is_right = factored_scores(pairs, scores_ptr, first_key + tile * SHAPE.KEYS, SHAPE)
        direct |= tl.where(is_right, 0, 1 << tile)
    if direct != 0:
        # Without a barrier: a thread knows of this by reductions over the program's threads, each
        # of which has written its scores before.
        for tile in range(tiles):
            if (direct >> tile) & 1 != 0:
                begin = first_key + tile * SHAPE.KEYS
                for key in range(begin, tl.minimum(begin + SHAPE.KEYS, end_key), GROUP):
                    direct_scores(pairs, scores_ptr, key, SHAPE)
