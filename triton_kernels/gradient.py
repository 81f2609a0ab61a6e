"""Gradients of queries, keys and score weights, given the gradients of scores.

The pass is the same for either side: a program keeps a tile of *rows* (of keys, say) and BLOCK_D
pairs of features in registers, goes over the *columns* (queries), and sums

    drow_jd = 4 w_d sum_i s_ij (1/4 - h^2)    dcol_id = 4 w_d sum_j s_ij (1/4 - h^2)
    dscore_weight_d = -2 sum_ij s_ij h        with h = 1 / (1 + exp(2 row_jd) exp(2 col_id)) - 1/2

What it does with one tile is in ``gradient_tile``.
"""

import triton
import triton.language as tl

from .gradient_tile import (
    TILE_ROWS,
    Gradients,
    Options,
    Scores,
    Side,
    existing,
    load_weights_times_4,
    tile_gradients,
)
from .route import SMALLEST_GRADIENT_SUM, in_factored_range
from .rows import attended_keys, find_tile, sequence_rows

SIZES = [
    "batch",
    "rows_r",
    "rows_c",
    "max_seqlen_k",
    "max_columns",
    "items",
    "zero",
    "stride_bound_place",
]
DIRECT_CHOICE = tl.constexpr(3)  # of how to take a tile of rows, after those by its size


@triton.constexpr_function
def tiles_of_choice(choice, row_tiles):
    """How many TILE_ROWS rows are taken at a time: a whole tile, 3/4, half of it; few directly."""
    return 1 if choice == DIRECT_CHOICE.value else row_tiles - choice * row_tiles // 4


@triton.jit
def column_bound(bound_ptr, stride, count, BLOCK: tl.constexpr):
    """The largest of ``count`` magnitudes."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        bound = tl.load(bound_ptr + index * stride, mask=index < count, other=0.0)
        largest = tl.maximum(largest, bound)
    return tl.max(largest, 0)


@triton.jit
def store_columns(
    column_sums_ptr,
    dcol_ptr,
    score_weight_ptr,
    columns,
    begun_columns,
    pair,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dcol = 4 w sums``, 0 for the columns after the first ``begun_columns``."""
    exists0, exists1 = existing(pair, D, HALF)
    lane = tl.arange(0, BLOCK_D)
    weight0, weight1 = load_weights_times_4(score_weight_ptr, pair, D, HALF)
    element = dcol_ptr.dtype.element_ty
    source = column_sums_ptr + lane
    target = dcol_ptr + pair
    for column in range(columns):
        begun = pair < tl.where(column < begun_columns, HALF, 0)
        sum0 = tl.load(source, mask=begun, other=0.0) * weight0
        sum1 = tl.load(source + BLOCK_D, mask=begun & exists1, other=0.0) * weight1
        tl.store(target, sum0.to(element), mask=exists0)
        tl.store(target + HALF, sum1.to(element), mask=exists1)
        source += 2 * BLOCK_D
        target += H * D


@triton.jit(do_not_specialize=SIZES)
def additive_attention_grad_kernel(
    row_ptr,
    col_ptr,
    score_weight_ptr,
    dscores_ptr,
    row_bound_ptr,
    col_bound_ptr,
    drow_ptr,
    dcol_ptr,
    column_sums_ptr,
    dweight_ptr,
    cu_row_ptr,
    cu_col_ptr,
    key_lengths_ptr,
    padding_mask_ptr,
    batch,
    rows_r,
    rows_c,
    max_seqlen_k,
    max_columns,
    items,
    zero,
    stride_rb,
    stride_rt,
    stride_rh,
    stride_cb,
    stride_ct,
    stride_ch,
    stride_wh,
    stride_score_row_start,
    stride_score_col_start,
    stride_score_row,
    stride_score_col,
    stride_score_head,
    stride_bound_place,
    stride_bound_col,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr,
    WHOLE_SEQUENCES: tl.constexpr,
    CONTIGUOUS_SCORES: tl.constexpr,
    MASK_SCORES: tl.constexpr,
    REFINE: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Gradients of one side, or with WHOLE_SEQUENCES and ``dcol`` of both, as in the module's text.

    An item of work is a head, BLOCK_D pairs of features, and a tile of rows or all of a sequence.
    ``column_sums`` is [programs, max_columns, 2 BLOCK_D] float32; ``dweight`` [tiles or sequences,
    H, D] float32 are partial sums. The gradient of a score is at (first row and column of the
    sequence, row, column, head), each with its stride. Past the sequence's last row it is 0 with
    CONTIGUOUS_SCORES, is not read with MASK_SCORES, and else may be any number.
    """
    rows_r = rows_r.to(tl.int64)
    rows_c = rows_c.to(tl.int64)
    BLOCK_ROWS: tl.constexpr = ROW_TILES * TILE_ROWS
    CHUNKS: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    lane = tl.arange(0, BLOCK_D)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(items - tl.program_id(0), programs)):
        item = tl.program_id(0) + turn * programs
        # Of unknown alignment, features are not vectorised: each thread keeps to its own.
        pair = (item % CHUNKS) * BLOCK_D + (lane + zero)
        head = (item // CHUNKS % H).to(tl.int64)
        unit = item // (CHUNKS * H)
        if WHOLE_SEQUENCES:
            sequence = unit
            begin_row = rows_r * 0
        else:
            sequence, begin_row = find_tile(cu_row_ptr, unit, batch, rows_r, BLOCK_ROWS)
        row_place, row_start, extent = sequence_rows(cu_row_ptr, sequence, batch, rows_r)
        col_place, col_start, columns = sequence_rows(cu_col_ptr, sequence, batch, rows_c)
        if ROWS_ARE_KEYS:
            _, _, length = attended_keys(
                cu_row_ptr, key_lengths_ptr, sequence, batch, rows_r, max_seqlen_k
            )
            keys = length
            row_mask_ptr = padding_mask_ptr
            if padding_mask_ptr is not None:
                row_mask_ptr += row_place * rows_r
            col_mask_ptr = None
        else:
            length = extent
            _, _, columns = attended_keys(
                cu_col_ptr, key_lengths_ptr, sequence, batch, rows_c, max_seqlen_k
            )
            keys = columns
            row_mask_ptr = None
            col_mask_ptr = padding_mask_ptr
            if padding_mask_ptr is not None:
                col_mask_ptr += col_place * rows_c
        # Nothing was written for a sequence without keys or without queries, bounds neither.
        if (keys == 0) | (columns == 0):
            length = length * 0
        end_row = extent
        if not WHOLE_SEQUENCES:
            end_row = tl.minimum(extent, begin_row + BLOCK_ROWS)

        weight_row = score_weight_ptr + head * stride_wh
        rows_ptr = row_ptr + row_place * stride_rb + row_start * stride_rt + head * stride_rh
        cols_ptr = col_ptr + col_place * stride_cb + col_start * stride_ct + head * stride_ch
        dscores_item = (
            dscores_ptr
            + (row_place * rows_r + row_start) * stride_score_row_start
            + (col_place * rows_c + col_start) * stride_score_col_start
            + head * stride_score_head
        )
        first_row_number = row_place * rows_r + row_start
        drow_item = drow_ptr
        if drow_ptr is not None:
            drow_item += (first_row_number * H + head) * D
        sums_ptr = column_sums_ptr
        if column_sums_ptr is not None:
            slot = tl.program_id(0).to(tl.int64)
            sums_ptr += slot * max_columns * (2 * BLOCK_D)
        all_columns = columns
        columns = tl.minimum(columns, max_columns)
        rows = Side(rows_ptr, stride_rt, row_mask_ptr)
        cols = Side(cols_ptr, stride_ct, col_mask_ptr)
        dscores = Scores(dscores_item, stride_score_row, stride_score_col)
        gradients = Gradients(drow_item, sums_ptr)
        bound_of_columns = column_bound(
            col_bound_ptr + col_place * stride_bound_place + col_start * stride_bound_col + head,
            stride_bound_col,
            tl.where(length > 0, columns, 0),
            128,
        )
        dweight0 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        dweight1 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        for first_row in range(begin_row, end_row, BLOCK_ROWS):
            tile_rows = first_row + tl.arange(0, BLOCK_ROWS)
            attended = tile_rows < length
            if row_mask_ptr is not None:
                attended &= tl.load(row_mask_ptr + tile_rows, mask=attended, other=1) == 0
            bounds = row_bound_ptr + (first_row_number + tile_rows) * H + head
            bound_of_rows = tl.max(tl.load(bounds, mask=attended, other=0.0), 0)
            columns_here = columns.to(tl.int32)
            if first_row >= length:
                columns_here = 0
            # A whole tile, 3/4 or half of one, as the rows left need; or by the direct route, which
            # is rare and takes more registers, a few rows at a time.
            end = tl.minimum(first_row + BLOCK_ROWS, end_row)
            choice = DIRECT_CHOICE
            if in_factored_range(bound_of_rows, bound_of_columns, SMALLEST_GRADIENT_SUM):
                rows_left = (end - first_row).to(tl.int32)
                choice = (rows_left <= BLOCK_ROWS * 3 // 4).to(tl.int32)
                choice += (rows_left <= BLOCK_ROWS // 2).to(tl.int32)
            for option in tl.static_range(DIRECT_CHOICE + 1):
                if choice == option:
                    few = TILE_ROWS * tiles_of_choice(option, ROW_TILES)
                    for row in range(first_row, end, few):
                        more0, more1 = tile_gradients(
                            rows,
                            cols,
                            dscores,
                            weight_row,
                            gradients,
                            row,
                            length,
                            extent,
                            columns_here,
                            pair,
                            Options(
                                H,
                                D,
                                HALF,
                                BLOCK_D,
                                tiles_of_choice(option, ROW_TILES),
                                CONTIGUOUS_SCORES,
                                MASK_SCORES,
                                dweight_ptr is not None,
                                option == DIRECT_CHOICE,
                                REFINE,
                                USE_PTX,
                            ),
                        )
                        dweight0 += more0
                        dweight1 += more1
            tl.debug_barrier()  # column sums may be another thread's in the next tile
        if dcol_ptr is not None:
            dcol_item = dcol_ptr + ((col_place * rows_c + col_start) * H + head) * D
            store_columns(
                sums_ptr,
                dcol_item,
                weight_row,
                all_columns.to(tl.int32),
                tl.where(length > 0, columns, 0).to(tl.int32),
                pair,
                H,
                D,
                HALF,
                BLOCK_D,
            )
        if dweight_ptr is not None:
            target = dweight_ptr + (unit.to(tl.int64) * H + head) * D + pair
            exists0, exists1 = existing(pair, D, HALF)
            tl.store(target, -2.0 * tl.sum(dweight0, 0), mask=exists0)
            tl.store(target + HALF, -2.0 * tl.sum(dweight1, 0), mask=exists1)
