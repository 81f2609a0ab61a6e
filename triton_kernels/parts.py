"""A tile's rows in parts, of which those are computed that there are rows for.

A thread has sums of every fourth query and every fourth key of a tile, and of one or two of the
pairs of features of a turn. On both sides a tile has parts, of a half, a quarter, an eighth and an
eighth of the groups of four rows, of which those are computed that add up to as many groups as
there are.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(4)


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
    # The smallest part of a larger tile has two groups, which make no odd number of groups.
    tl.static_assert(BLOCK <= 8 * GROUP)
    groups = tl.minimum(tl.cdiv(rows, GROUP), BLOCK // GROUP).to(tl.int32)
    return tl.where(groups == BLOCK // GROUP, 2 * groups - 1, groups)


@triton.jit
def rows_of_parts(present, BLOCK: tl.constexpr):
    """The row of each place of a tile, [BLOCK]: the parts that are present follow each other; rows
    of others are past the tile's."""
    PARTS: tl.constexpr = parts_of(BLOCK)
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
