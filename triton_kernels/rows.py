"""Where rows are: which sequence a program works for, and which of its keys are attended.

A side (queries or keys) is padded, ``[B, N, H, D]``, or jagged with offsets, ``[1, N, H, D]``. A
sequence's rows are ``(place, start + i)`` for i < length, ``place`` being the index of the first
axis. Rows past the last offset are those of a sequence number ``batch`` that attends to nothing.
Offsets are clamped to the rows there are, so that corrupt ones never lead out of a tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Arguments of most kernels, in this order.
SIZES = ["batch", "rows_q", "rows_k", "max_seqlen_q", "max_seqlen_k"]
ORDER_BLOCK = tl.constexpr(128)  # sequences that are compared at a time where tiles are ordered

# What launchers pass and kernels take apart. Triton specialises the integers in them (1, multiples
# of 16), so those that vary from call to call, as numbers of rows do, are arguments of their own.


class Rows(NamedTuple):
    """A tensor [places, N, H, D] with features next to each other, and its strides."""

    ptr: Tensor
    by_place: int
    by_row: int
    by_head: int


class KeySide(NamedTuple):
    """Which keys sequences have, and attend to."""

    cu_ptr: Tensor | None  # [batch + 1], of jagged keys
    lengths_ptr: Tensor | None  # [batch]
    mask_ptr: Tensor | None  # [batch, rows_k] uint8, 1 where ignored


class Dropout(NamedTuple):
    """Of weights, or of features."""

    seed_ptr: Tensor  # one int64
    threshold: float  # the least 24-bit random number that is kept, ``ceil(p * 2^24)``
    scale: float  # ``1 / (1 - p)``


class Inputs(NamedTuple):
    """Of forward and backward. Without a query it is pooling, whose K are its branches."""

    query: Rows | None  # [places, rows_q, H, D]
    key: Rows  # [places, rows_k, H, D]
    gate: Rows | None  # the same, in gated pooling
    value: Rows  # [places, rows_k, H, DV]
    score_weight_ptr: Tensor  # [H, D], in pooling [H, K, D]
    cu_q_ptr: Tensor | None  # [batch + 1], of jagged queries
    key_side: KeySide
    dropout: Dropout | None  # of weights
    tanh_dropout: Dropout | None  # of the two factors of pooling's hidden rows
    gate_dropout: Dropout | None


@triton.jit
def first_row(rows, place, row, head):
    """A pointer to it, of :class:`Rows`."""
    return rows.ptr + place * rows.by_place + row * rows.by_row + head * rows.by_head


@triton.jit
def offset_of(cu_ptr, sequence, rows):
    """A clamped offset as int64."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + sequence).to(tl.int64), 0), rows)


@triton.jit
def sequence_rows(cu_ptr, sequence, batch, rows):
    """(place, start, length) of one side of a sequence, or of several; ``rows`` is the side's N."""
    exists = sequence < batch
    if cu_ptr is None:
        place = tl.where(exists, sequence, 0).to(tl.int64)
        return place, place * 0, tl.where(exists, rows, 0)
    else:
        start = offset_of(cu_ptr, tl.minimum(sequence, batch), rows)
        end = offset_of(cu_ptr, tl.minimum(sequence + 1, batch), rows)
        return start * 0, start, tl.maximum(tl.where(exists, end, rows) - start, 0)


@triton.jit
def attended_keys(key_side, sequence, batch, rows, max_seqlen):
    """The same of the keys that it may attend to; length 0 for nobody's."""
    place, start, length = sequence_rows(key_side.cu_ptr, sequence, batch, rows)
    length = tl.where(sequence < batch, tl.minimum(length, max_seqlen), 0)
    if key_side.lengths_ptr is not None:
        attended = tl.load(key_side.lengths_ptr + tl.minimum(sequence, batch - 1)).to(tl.int64)
        length = tl.minimum(length, tl.maximum(attended, 0))
    return place, start, length


@triton.jit
def find_tile(cu_ptr, tile, batch, rows, TILE: tl.constexpr):
    """(sequence, first row in it) of a tile of ``TILE`` rows of one sequence.

    Jagged sequence b owns the tiles from ``cu[b] // TILE + b`` on: as many as it needs or one
    more, known without a sum over the lengths of those before it.
    """
    if cu_ptr is None:
        tiles = tl.cdiv(rows, TILE).to(tl.int32)
        return tile // tiles, (tile % tiles).to(tl.int64) * TILE
    else:
        low = tile * 0
        high = low + batch + 1
        while high - low > 1:
            middle = (low + high) // 2
            if offset_of(cu_ptr, middle, rows) // TILE + middle <= tile:
                low = middle
            else:
                high = middle
        first = offset_of(cu_ptr, low, rows) // TILE + low
        return low, tl.maximum((tile - first) * TILE, 0)  # corrupt offsets may go back


@triton.jit
def dealt(number, count, processors):
    """The place in a descending order of ``count`` for multiprocessor ``number % processors``.

    They take turns from the first to the last and back, so that each gets about as much. Those that
    take one more in the last turn take the smallest of the first.
    """
    turn = number // processors
    place = number - turn * processors
    more = count % processors
    if (turn + 1) * processors > count:
        place = more - 1 - place
    else:
        place = (place - more + processors) % processors
        place = tl.where(turn % 2 == 0, place, processors - 1 - place)
    return turn * processors + place


@triton.jit
def work_of(sequence, cu_q_ptr, key_side, sizes, TILE: tl.constexpr):
    """How many tiles of TILE queries sequences have (TILE = 0: each is one), and the pairs of the
    largest of them."""
    batch, rows_q, rows_k, max_seqlen_k = sizes
    queries = sequence_rows(cu_q_ptr, sequence, batch, rows_q)[2]
    keys = attended_keys(key_side, sequence, batch, rows_k, max_seqlen_k)[2]
    if TILE == 0:
        return tl.where(sequence <= batch, 1, 0), queries * keys
    else:
        return tl.cdiv(queries, TILE).to(tl.int32), tl.minimum(queries, TILE) * keys


@triton.jit
def write_order(
    order_ptr,
    sequence,
    sequences,
    room,
    cu_q_ptr,
    key_side,
    sizes,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the tiles of a sequence where they stand among those of all, the largest first.

    ``sizes``: batch, the rows of queries and of keys (int64), the most keys of a sequence.

    ``order`` is [room, 2] and a number: of each tile its sequence, and which of its tiles it is;
    and how many tiles there are.
    """
    own_tiles, own_work = work_of(sequence, cu_q_ptr, key_side, sizes, TILE)
    before = 0
    total = 0
    for begin in range(0, sequences, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        tiles, work = work_of(other, cu_q_ptr, key_side, sizes, TILE)
        tiles = tl.where(other < sequences, tiles, 0)
        precedes = (work > own_work) | ((work == own_work) & (other < sequence))
        before += tl.sum(tl.where(precedes, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    for begin in range(0, own_tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        place = before + tile
        # Corrupt offsets may lead past the room, and past 32 bits to before it.
        inside = (tile < own_tiles) & (place >= 0) & (place < room)
        tl.store(order_ptr + 2 * place, sequence + tile * 0, mask=inside)
        tl.store(order_ptr + 2 * place + 1, tile, mask=inside)
    if sequence == 0:
        tl.store(order_ptr + 2 * room, tl.minimum(total, room))


@triton.jit(do_not_specialize=["sequences", "room", *SIZES])
def order_kernel(
    order_ptr,
    cu_q_ptr,
    key_side,  # :class:`KeySide`
    sequences,
    room,
    batch,
    rows_q,
    rows_k,
    max_seqlen_q,
    max_seqlen_k,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """:func:`write_order` for a sequence a program."""
    sizes = batch, rows_q.to(tl.int64), rows_k.to(tl.int64), max_seqlen_k
    sequence = tl.program_id(0)
    write_order(order_ptr, sequence, sequences, room, cu_q_ptr, key_side, sizes, TILE, BLOCK)


@triton.jit
def mask_from(key_side, key):
    """The mask, if any, from this key of all on."""
    if key_side.mask_ptr is None:
        return None
    else:
        return key_side.mask_ptr + key


@triton.jit
def are_attended(mask_ptr, position, length):
    """Which key positions count: within the length and not masked."""
    attended = position < length
    if mask_ptr is not None:
        attended &= tl.load(mask_ptr + position, mask=attended, other=1) == 0
    return attended
