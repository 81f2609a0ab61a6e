"""Softmaxes over the keys of a sequence, K for each head: those of one query, or of pooling.

These kernels (``key_scores``, ``keys_forward``, ``keys_backward``) are bound by memory, so keys and
values are read as few times as can be. A program takes a tile of TILE keys of one sequence and
head. With SINGLE that is all keys of any sequence, and results are final; else other kernels add
the tiles' parts. Numbers of a tile's keys are [SEGMENT]; those of several of the K are a tuple.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import kept_weights
from .rows import are_attended, attended_keys, find_tile, mask_from, sequence_rows

SIZES = ["batch", "rows_k", "max_seqlen_k"]
# Tiles of keys and values are on their way while the one before is worked on.
STAGES = tl.constexpr(3)


class Shape(NamedTuple):
    """What machine code depends on; a constexpr of the kernels."""

    H: int
    K: int
    D: int
    DV: int
    TILE: int  # keys from the first of a tile to that of the next
    SEGMENT: int  # keys of a tile: as many, or fewer if those are the sequence's last
    GROUP: int  # of the K, how many a program computes
    BLOCK_D: int
    BLOCK_DV: int
    SINGLE: bool
    USE_PTX: bool


class Plan(NamedTuple):
    """How kernels are launched."""

    shape: Shape
    half: Shape | None  # for tiles of no more than half as many keys
    warps: int
    registers: dict[str, int]  # options of the launch


class Keys(NamedTuple):
    """The keys of a program: those of ``sequence`` from its ``first`` of this tile on."""

    sequence: tl.tensor
    head: tl.tensor
    place: tl.tensor
    start: tl.tensor  # of the sequence, in its place
    first: tl.tensor
    present: tl.tensor  # how many keys the sequence has,
    length: tl.tensor  # and up to which it may attend


class KeyTile(NamedTuple):
    """The same, key by key."""

    sequence: tl.tensor
    head: tl.tensor
    place: tl.tensor
    position: tl.tensor  # [SEGMENT], in the sequence
    key: tl.tensor  # [SEGMENT], in the place
    row: tl.tensor  # [SEGMENT], of [all rows, H]
    present: tl.tensor  # [SEGMENT], whether there is one
    attended: tl.tensor  # [SEGMENT]


@triton.jit
def program_keys(key_side, batch, rows_k, max_seqlen_k, TILE: tl.constexpr):
    """The program's :class:`Keys`."""
    rows_k = rows_k.to(tl.int64)
    sequence, first = find_tile(key_side.cu_ptr, tl.program_id(0), batch, rows_k, TILE)
    place, start, present = sequence_rows(key_side.cu_ptr, sequence, batch, rows_k)
    _, _, length = attended_keys(key_side, sequence, batch, rows_k, max_seqlen_k)
    return Keys(sequence, tl.program_id(1).to(tl.int64), place, start, first, present, length)


@triton.jit
def key_tile(keys, key_side, rows_k, SHAPE: tl.constexpr):
    """The first SEGMENT of them, as :class:`KeyTile`."""
    rows_k = rows_k.to(tl.int64)
    position = keys.first + tl.arange(0, SHAPE.SEGMENT)
    key = keys.start + position
    row = (keys.place * rows_k + key) * SHAPE.H + keys.head
    present = position < keys.present
    attended = are_attended(mask_from(key_side, keys.place * rows_k), position, keys.length)
    return KeyTile(keys.sequence, keys.head, keys.place, position, key, row, present, attended)


@triton.jit
def first_branch(SHAPE: tl.constexpr):
    """Of the GROUP of a program; known to the compiler where that is all."""
    if SHAPE.GROUP < SHAPE.K:
        return tl.program_id(2) * SHAPE.GROUP
    else:
        return 0


@triton.jit
def aligned(stride, DIM: tl.constexpr):
    """The stride of rows of DIM features.

    Triton only sees whether 16 divides a stride. Of a multiple of 8 features all strides are
    multiples of 8 (``problem.as_rows``); this says so in a form that the compiler understands.
    """
    if DIM % 8 == 0:
        return stride // 8 * 8
    else:
        return stride


@triton.jit
def rows_at(rows, place, row, head, DIM: tl.constexpr):
    """Pointers to rows of :class:`rows.Rows`."""
    start = rows.ptr + place * aligned(rows.by_place, DIM) + head * aligned(rows.by_head, DIM)
    return start + row * aligned(rows.by_row, DIM)


@triton.jit
def rows_of(rows, tile, DIM: tl.constexpr):
    """Pointers to the rows of a tile's keys, [SEGMENT]."""
    return rows_at(rows, tile.place, tile.key, tile.head, DIM)


@triton.jit
def load_tile(row_ptrs, attended, d, DIM: tl.constexpr):
    """``[rows, features]`` as float32; 0 where not attended, whatever is there."""
    mask = attended[:, None] & (d < DIM)[None, :]
    return tl.load(row_ptrs[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_row(row_ptr, d, DIM: tl.constexpr):
    """``[features]`` as float32."""
    return tl.load(row_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, tile, d, numbers, DIM: tl.constexpr):
    """Numbers [rows, features] to a contiguous tensor, in its dtype."""
    target = ptr + tile.row[:, None] * DIM + d[None, :]
    mask = tile.present[:, None] & (d < DIM)[None, :]
    tl.store(target, numbers.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def kept_keys(dropout, tile, branch):
    """What :class:`rows.Dropout` multiplies weights by, [SEGMENT], or 1 for all."""
    position = tile.position
    return kept_weights(dropout, tile.sequence, tile.head, position * 0 + branch, position)
