"""Sums of what programs have left: a row's context from parts of its keys, and gradients."""

import triton
import triton.language as tl
from torch import Tensor

from . import configurations
from .rows import offset_of


@triton.jit
def parts_of(row, parts, cu_ptr, rows_k, TILE: tl.constexpr):
    """(first, count) of the parts of a row: ``parts`` of each, or with offsets, of a row that is a
    sequence, its tiles of keys.
    """
    if cu_ptr is None:
        return row * parts, parts
    else:
        rows_k = rows_k.to(tl.int64)
        first = offset_of(cu_ptr, row, rows_k) // TILE + row
        return first, offset_of(cu_ptr, row + 1, rows_k) // TILE + row + 1 - first


@triton.jit(do_not_specialize=["parts", "rows_k"])
def merge_parts_kernel(
    partial_ptr,  # float32 [.., H, DV]
    part_stats_ptr,  # [.., H, 2]
    context_ptr,  # [rows, H, DV]
    stats_ptr,  # [rows, H, 2]
    parts,
    cu_ptr,
    rows_k,
    H: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TILE: tl.constexpr,
):
    """``context = sum_p exp(max_p - max) partial_p / sum`` over the parts of a row and head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first, count = parts_of(row, parts, cu_ptr, rows_k, TILE)
    largest = -float("inf")
    total = 0.0
    for part in range(count):
        part_row = (first + part) * H + head
        part_largest = tl.load(part_stats_ptr + part_row * 2)
        part_total = tl.load(part_stats_ptr + part_row * 2 + 1)
        if part_total != 0.0:
            new_largest = tl.maximum(largest, part_largest)
            total = total * tl.exp(largest - new_largest)
            total += part_total * tl.exp(part_largest - new_largest)
            largest = new_largest
    tl.store(stats_ptr + (row * H + head) * 2, largest)
    tl.store(stats_ptr + (row * H + head) * 2 + 1, total)
    safe_total = tl.where(total == 0.0, 1.0, total)
    for begin in range(0, DV, BLOCK_DV):
        d = begin + tl.arange(0, BLOCK_DV)
        context = tl.zeros((BLOCK_DV,), tl.float32)
        for part in range(count):
            part_row = (first + part) * H + head
            part_total = tl.load(part_stats_ptr + part_row * 2 + 1)
            share = tl.exp(tl.load(part_stats_ptr + part_row * 2) - largest) / safe_total
            # A part without keys has written nothing.
            mask = d < tl.where(part_total != 0.0, DV, 0)
            partial = tl.load(partial_ptr + part_row * DV + d, mask=mask, other=0.0)
            context += tl.where(part_total != 0.0, share, 0.0) * partial
        target = context_ptr + (row * H + head) * DV + d
        tl.store(target, context.to(context_ptr.dtype.element_ty), mask=d < DV)


@triton.jit(do_not_specialize=["parts", "rows_k"])
def sum_parts_kernel(
    partial_ptr,  # float32 [.., SIZE]
    sum_ptr,  # [rows, SIZE]
    parts,
    cu_ptr,
    rows_k,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sum over the parts of a row; BLOCK numbers of it a program, PARTS loads at a time."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64) // BLOCKS
    place = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    first, count = parts_of(row, parts, cu_ptr, rows_k, TILE)
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    for begin in range(0, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < count)[:, None] & (place < SIZE)[None, :]
        source = partial_ptr + (first + part)[:, None] * SIZE + place[None, :]
        sums += tl.load(source, mask=mask, other=0.0)
    total = tl.sum(sums, 0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * SIZE + place, total, mask=place < SIZE)


def merge_parts(
    partial: Tensor,
    part_stats: Tensor,
    context: Tensor,
    stats: Tensor,
    parts: int,
    tiles: tuple[Tensor | None, int, int] = (None, 0, 1),
) -> None:
    """Fill context [.., H, DV] and stats [.., H, 2].

    Args:
        parts: how many a row has, next to each other.
        tiles: where the parts of a sequence are its tiles of keys: offsets, all keys, keys a tile.
    """
    heads = context.size(-2)
    cu, rows_k, tile = tiles
    merge_parts_kernel[(stats.numel() // (2 * heads), heads)](
        partial,
        part_stats,
        context,
        stats,
        parts,
        cu,
        rows_k,
        H=heads,
        DV=context.size(-1),
        BLOCK_DV=configurations.MERGE.value_features,
        TILE=tile,
        num_warps=configurations.MERGE.warps,
    )


def sum_parts(
    partial: Tensor,
    total: Tensor,
    rows: int,
    parts: int,
    tiles: tuple[Tensor | None, int, int] = (None, 0, 1),
) -> None:
    """``total`` [rows, ..] = the sums of the parts of each row; see :func:`merge_parts`."""
    size, block = total.numel() // rows, configurations.SUM_NUMBERS
    cu, rows_k, tile = tiles
    sum_parts_kernel[(rows * triton.cdiv(size, block),)](
        partial,
        total,
        parts,
        cu,
        rows_k,
        SIZE=size,
        PARTS=configurations.SUM_PARTS,
        BLOCK=block,
        TILE=tile,
        num_warps=1,
    )
