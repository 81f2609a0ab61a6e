"""A tile's rows in parts, of which those are computed that there are rows for.

A thread has sums of every fourth query and every fourth key of a tile, and of one or two of the
pairs of features of a turn. On both sides a tile has parts, of a half, a quarter, an eighth and an
eighth of the groups of four rows, of which those are computed that add up to as many groups as
there are.
"""

import triton
import triton.language as tl

from .arithmetic import add_weighted_pair

GROUP = tl.constexpr(4)


@triton.constexpr_function
def part_sizes(block):
    """The parts of a side in groups of rows: a half, a quarter, an eighth and an eighth."""
    groups = block // GROUP.value
    sizes = [groups >> bit for bit in (1, 2, 3) if groups >> bit]
    return (*sizes, groups - sum(sizes))


@triton.constexpr_function
def bit_of(block, part):
    """The bit of a part in the set that :func:`present_parts` returns."""
    sizes = part_sizes(block)
    return sizes[part] if part + 1 < len(sizes) else sum(sizes)


@triton.jit
def present_parts(rows, BLOCK: tl.constexpr):
    """Those that so many rows need: a set of bits, which for all but the last are their sizes."""
    # The smallest part of a larger tile has two groups, which make no odd number of groups.
    tl.static_assert(BLOCK <= 8 * GROUP)
    groups = tl.minimum(tl.cdiv(rows, GROUP), BLOCK // GROUP).to(tl.int32)
    return tl.where(groups == BLOCK // GROUP, 2 * groups - 1, groups)


@triton.jit
def rows_of_parts(present, BLOCK: tl.constexpr):
    """The row of each place of a tile, [BLOCK]: the parts that are present follow each other; rows
    of others are past the tile's."""
    PARTS: tl.constexpr = part_sizes(BLOCK)
    place = tl.arange(0, BLOCK)
    row = place
    for i in tl.static_range(len(PARTS)):
        absent = tl.where(present & bit_of(BLOCK, i) == 0, BLOCK, 0)
        row += tl.where(place >= GROUP * sum_before(PARTS, i), absent, 0)
        absent = tl.where(absent == 0, 0, BLOCK + GROUP * PARTS[i])
        row -= tl.where(place >= GROUP * sum_before(PARTS, i + 1), absent, 0)
    return row


@triton.jit
def joined(parts, FIRST: tl.constexpr):
    """``[A, groups, B]`` of the parts [A, part, B] from number FIRST on."""
    if FIRST == len(parts) - 1:
        return parts[FIRST]
    else:
        x = tl.join(parts[FIRST], joined(parts, FIRST + 1))
        return tl.reshape(tl.permute(x, (0, 3, 1, 2)), (x.shape[0], 2 * x.shape[1], x.shape[2]))


@triton.constexpr_function
def sum_before(numbers, end):
    return sum(numbers[:end])


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
def beside_others(part, ARE_KEYS: tl.constexpr):
    """A part [GROUP, PAIRS, groups] of a side as [key groups, query groups, GROUP, GROUP, PAIRS],
    1 where of the other side."""
    PAIRS: tl.constexpr = part.shape[1]
    if ARE_KEYS:
        return tl.permute(tl.reshape(part, (1, 1, GROUP, PAIRS, part.shape[2])), (4, 0, 1, 2, 3))
    else:
        return tl.permute(tl.reshape(part, (1, GROUP, 1, PAIRS, part.shape[2])), (0, 4, 1, 2, 3))


@triton.jit
def operands_of(sums, a, b, w):
    """What :func:`added_features` adds to each of ``sums``, in its shape: for each turn a tuple of
    the operands of :func:`arithmetic.add_weighted_pair`.

    ``a``, ``b``, ``w``: of :func:`scores.exponentials` of queries and of keys, and of
    :func:`scores.weights_of_pairs`.
    """
    operands = ()
    for i in tl.static_range(len(sums)):
        row = ()
        for j in tl.static_range(len(sums[i])):
            turns = ()
            for turn in tl.static_range(len(w[0])):
                numbers = ()
                for second in tl.static_range(2):
                    query = a[second][turn * len(sums[i]) + j]
                    key = b[second][turn * len(sums) + i]
                    numbers += (tl.broadcast(query, sums[i][j])[0],)
                    numbers += (tl.broadcast(key, sums[i][j])[0],)
                    numbers += (tl.broadcast(w[second][turn], sums[i][j])[0],)
                turns += (numbers,)
            row += (turns,)
        operands += (row,)
    return operands


@triton.jit
def added_features(sums, present_q, present_k, operands, FULL: tl.constexpr, SHAPE: tl.constexpr):
    """``sums`` of each part of the keys and each part of the queries, tuples of tuples of [keys,
    queries, GROUP, GROUP, PAIRS], with the fractions of a block of features added.

    FULL: all parts are present.
    """
    added = ()
    for i in tl.static_range(len(sums)):
        row = sums[i]
        if FULL or present_k & bit_of(SHAPE.KEYS, i) != 0:
            new_row = ()
            for j in tl.static_range(len(row)):
                part = row[j]
                if FULL or present_q & bit_of(SHAPE.QUERIES, j) != 0:
                    for turn in tl.static_range(len(operands[i][j])):
                        a0, b0, w0, a1, b1, w1 = operands[i][j][turn]
                        part = add_weighted_pair(part, a0, a1, b0, b1, w0, w1, SHAPE.USE_PTX)
                new_row += (part,)
            row = new_row
        added += (row,)
    return added


@triton.jit
def subtracted(sums, what):
    """``sums - what`` of all parts."""
    out = ()
    for i in tl.static_range(len(sums)):
        row = ()
        for j in tl.static_range(len(sums[i])):
            row += (sums[i][j] - what,)
        out += (row,)
    return out


@triton.jit
def tile_scores(sums, present_q, present_k, constant, weight_sum, SHAPE: tl.constexpr):
    """``constant - 2 sums`` summed over pairs, [QUERIES, KEYS]; without one, ``weight_sum`` less
    that of twice the sums."""
    QUERIES: tl.constexpr = part_sizes(SHAPE.QUERIES)
    KEYS: tl.constexpr = part_sizes(SHAPE.KEYS)
    scores = ()
    for i in tl.static_range(len(KEYS)):
        row = ()
        for j in tl.static_range(len(QUERIES)):
            part = tl.zeros((KEYS[i], QUERIES[j], GROUP, GROUP), tl.float32)
            is_present = present_k & bit_of(SHAPE.KEYS, i) != 0
            if is_present & (present_q & bit_of(SHAPE.QUERIES, j) != 0):
                if constant is None:
                    part = weight_sum - 2.0 * tl.sum(sums[i][j], 4)
                else:
                    part = tl.sum(constant - 2.0 * sums[i][j], 4)
            row += (tl.reshape(part, (KEYS[i], QUERIES[j], GROUP * GROUP)),)
        scores += (tl.reshape(joined(row, 0), (1, KEYS[i], SHAPE.QUERIES * GROUP)),)
    groups: tl.constexpr = SHAPE.KEYS // GROUP, SHAPE.QUERIES // GROUP, GROUP, GROUP
    scores = tl.permute(tl.reshape(joined(scores, 0), groups), (1, 2, 0, 3))
    return tl.reshape(scores, (SHAPE.QUERIES, SHAPE.KEYS))
