"""Where rows are: which sequence a program works for, and which of its keys are attended.

A side (queries or keys) is padded, ``[B, N, H, D]``, or jagged with offsets, ``[1, N, H, D]``. A
sequence's rows are ``(place, start + i)`` for i < length, ``place`` being the index of the first
axis. Rows past the last offset are those of a sequence number ``batch`` that attends to nothing.
Offsets are clamped to the rows there are, so that corrupt ones never lead out of a tensor.
"""

import triton
import triton.language as tl


@triton.jit
def offset_of(cu_ptr, sequence, rows):
    """A clamped offset as int64."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + sequence).to(tl.int64), 0), rows)


@triton.jit
def sequence_rows(cu_ptr, sequence, batch, rows):
    """(place, start, length) of one side of a sequence; ``rows`` is the side's N."""
    if cu_ptr is None:
        exists = sequence < batch
        place = tl.where(exists, sequence, 0).to(tl.int64)
        return place, place * 0, tl.where(exists, rows, 0)
    else:
        start = offset_of(cu_ptr, sequence, rows)
        end = rows
        if sequence < batch:
            end = offset_of(cu_ptr, sequence + 1, rows)
        return start * 0, start, tl.maximum(end - start, 0)


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
def attended_keys(cu_ptr, lengths_ptr, sequence, batch, rows, max_seqlen):
    """(place, start, length) of the keys that a sequence may attend to; length 0 for nobody's."""
    place, start, length = sequence_rows(cu_ptr, sequence, batch, rows)
    if sequence >= batch:
        length = length * 0
    if lengths_ptr is not None:
        if sequence < batch:
            length = tl.minimum(length, tl.maximum(tl.load(lengths_ptr + sequence), 0).to(tl.int64))
    return place, start, tl.minimum(length, max_seqlen)


@triton.jit
def are_attended(mask_ptr, place, rows, position, length):
    """Which key positions count: within the length and not masked."""
    attended = position < length
    if mask_ptr is not None:
        ignored = tl.load(mask_ptr + place * rows + position, mask=attended, other=1)
        attended = attended & (ignored == 0)
    return attended
