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
    are_attended,
    existing,
    exponentials,
    load_lines,
    load_rows,
    load_weights_times_4,
    store_pairs,
    tile_gradients,
    use_groups,
)
from .route import (
    INFORMATIVE_SHARE,
    SATURATED_MAGNITUDE,
    SMALL_MAGNITUDE,
    SMALLEST_GRADIENT_SUM,
    in_factored_range,
)
from .rows import attended_keys, dealt, find_tile, sequence_rows

SIZES = [
    "batch",
    "rows_r",
    "rows_c",
    "max_seqlen_k",
    "max_columns",
    "items",
    "processors",
    "zero",
]
LINES = tl.constexpr(8)  # rows that are looked at together where they are only looked at


@triton.jit
def largest_magnitude(
    side, pair, D: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, USE_PTX: tl.constexpr
):
    """Of these pairs of features in what is attended of a side."""
    largest = tl.zeros((LINES, BLOCK_D), tl.float32)
    for first in range(0, side.attended, LINES):
        x0, x1 = load_lines(side, first + tl.arange(0, LINES), pair, D, HALF, BLOCK_D, USE_PTX)
        largest = tl.maximum(largest, tl.maximum(tl.abs(x0), tl.abs(x1)))
    return tl.max(tl.max(largest, 1), 0)


@triton.jit
def are_informative(
    rows,
    cols,
    first_row,
    end_row,
    score_weight_ptr,
    pair,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Whether enough of the score weights meet a tanh that is neither nearly 0 nor nearly 1, as
    ``scores.are_informative`` asks: each row of [first_row, end_row) is looked at with one column.
    """
    weight0, weight1 = load_weights_times_4(score_weight_ptr, pair, D, HALF)
    informative = tl.zeros((LINES, BLOCK_D), tl.float32)
    total = tl.zeros((LINES, BLOCK_D), tl.float32)
    for first in range(first_row, end_row, LINES):
        row = first + tl.arange(0, LINES)
        col = row % tl.maximum(cols.attended, 1)
        both = are_attended(rows, row) & are_attended(cols, col)
        x = load_lines(rows, row, pair, D, HALF, BLOCK_D, USE_PTX)
        y = load_lines(cols, col, pair, D, HALF, BLOCK_D, USE_PTX)
        for half in tl.static_range(2):
            weight = tl.abs(weight0 if half == 0 else weight1)[None, :]
            weight = tl.where(both[:, None], weight, 0.0)
            magnitude = tl.abs(x[half] + y[half])
            informs = (magnitude > SMALL_MAGNITUDE) & (magnitude < SATURATED_MAGNITUDE)
            informative += tl.where(informs, weight, 0.0)
            total += weight
    share = tl.sum(tl.sum(informative, 1), 0)
    return share >= tl.sum(tl.sum(total, 1), 0) * INFORMATIVE_SHARE


@triton.jit
def store_zeros(
    ptr,
    begin,
    end,
    pair,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the rows [begin, end) of a sequence that nothing depends on."""
    zeros = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
    for first in range(begin, end, TILE_ROWS):
        row = first + tl.arange(0, TILE_ROWS)
        target = ptr + row[:, None].to(tl.int64) * (H * D) + pair[None, :]
        store_pairs(target, zeros, zeros, row < end, pair, D, HALF)


@triton.jit(do_not_specialize=SIZES)
def additive_attention_grad_kernel(
    row_ptr,
    col_ptr,
    score_weight_ptr,
    dscores_ptr,
    drow_ptr,
    dcol_ptr,
    column_sums_ptr,
    dweight_ptr,
    order_ptr,
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
    processors,
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

    An item of work is a head, BLOCK_D pairs of features, and a tile of rows or all of a sequence,
    of the sequences in ``order``, of :func:`rows.write_order`, if it is given.
    ``column_sums`` is [programs, max_columns, 2 BLOCK_D] float32; ``dweight`` [tiles or sequences,
    H, D] float32 are partial sums. The gradient of a score is at (first row and column of the
    sequence, row, column, head), each with its stride. With CONTIGUOUS_SCORES those of keys lie
    next to each other, and are 0 past the last one up to whole tiles of keys. Past the last row
    they are not read with MASK_SCORES, and else may be any number for up to three rows.
    """
    rows_r = rows_r.to(tl.int64)
    rows_c = rows_c.to(tl.int64)
    BLOCK_ROWS: tl.constexpr = ROW_TILES * TILE_ROWS
    CHUNKS: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    lane = tl.arange(0, BLOCK_D)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(items - tl.program_id(0), programs)):
        item = tl.program_id(0) + turn * programs
        if order_ptr is not None:
            item = dealt(item, items, processors)
        # Of unknown alignment, features are not vectorised: each thread keeps to its own.
        pair = (item % CHUNKS) * BLOCK_D + (lane + zero)
        looked_at = (item % CHUNKS) * BLOCK_D + lane
        head = (item // CHUNKS % H).to(tl.int64)
        unit = item // (CHUNKS * H)
        if WHOLE_SEQUENCES:
            sequence = unit
            if order_ptr is not None:
                if unit < batch:  # what belongs to nobody comes last
                    # With corrupt offsets some places are not written.
                    sequence = tl.load(order_ptr + 2 * unit)
                    sequence = tl.minimum(tl.maximum(sequence, 0), batch)
            begin_row = rows_r * 0
        else:
            sequence, begin_row = find_tile(cu_row_ptr, unit, batch, rows_r, BLOCK_ROWS)
        row_place, row_start, extent = sequence_rows(cu_row_ptr, sequence, batch, rows_r)
        col_place, col_start, all_columns = sequence_rows(cu_col_ptr, sequence, batch, rows_c)
        row_mask_ptr = None
        col_mask_ptr = None
        if ROWS_ARE_KEYS:
            length = attended_keys(
                cu_row_ptr, key_lengths_ptr, sequence, batch, rows_r, max_seqlen_k
            )[2]
            columns = tl.where(length > 0, tl.minimum(all_columns, max_columns), 0)
            length = tl.where(columns > 0, length, 0)
            if padding_mask_ptr is not None:
                row_mask_ptr = padding_mask_ptr + row_place * rows_r
        else:
            columns = attended_keys(
                cu_col_ptr, key_lengths_ptr, sequence, batch, rows_c, max_seqlen_k
            )[2]
            length = tl.where(columns > 0, extent, 0)
            if padding_mask_ptr is not None:
                col_mask_ptr = padding_mask_ptr + col_place * rows_c
        end_row = length
        if not WHOLE_SEQUENCES:
            extent = tl.minimum(extent, begin_row + BLOCK_ROWS)
            end_row = tl.maximum(tl.minimum(length, extent), begin_row)

        weight_row = score_weight_ptr + head * stride_wh
        first_row_number = row_place * rows_r + row_start
        drow_item = None
        if drow_ptr is not None:
            drow_item = drow_ptr + (first_row_number * H + head) * D
        dcol_item = None
        sums_ptr = None
        if dcol_ptr is not None:
            dcol_item = dcol_ptr + ((col_place * rows_c + col_start) * H + head) * D
            sums_ptr = column_sums_ptr
            sums_ptr += tl.program_id(0).to(tl.int64) * max_columns * (2 * BLOCK_D)
        rows = Side(
            row_ptr + row_place * stride_rb + row_start * stride_rt + head * stride_rh,
            stride_rt,
            row_mask_ptr,
            length.to(tl.int32),
        )
        cols = Side(
            col_ptr + col_place * stride_cb + col_start * stride_ct + head * stride_ch,
            stride_ct,
            col_mask_ptr,
            columns.to(tl.int32),
        )
        dscores = Scores(
            dscores_ptr
            + first_row_number * stride_score_row_start
            + (col_place * rows_c + col_start) * stride_score_col_start
            + head * stride_score_head,
            stride_score_row,
            stride_score_col,
        )
        bound_of_columns = largest_magnitude(cols, looked_at, D, HALF, BLOCK_D, USE_PTX)
        dweight0 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        dweight1 = tl.zeros((TILE_ROWS, BLOCK_D), tl.float32)
        # In as few turns as the registers allow, of about as many rows each.
        begin_row = begin_row.to(tl.int32)
        end_row = end_row.to(tl.int32)
        row_turns = tl.cdiv(end_row - begin_row, BLOCK_ROWS)
        step = tl.cdiv(tl.cdiv(end_row - begin_row, tl.maximum(row_turns, 1)), TILE_ROWS)
        step = step * TILE_ROWS
        for row_turn in range(row_turns):
            first_row = begin_row + row_turn * step
            turn_end = tl.minimum(first_row + step, end_row)
            tiles = tl.cdiv(turn_end - first_row, TILE_ROWS)
            group_rows, used = use_groups(first_row, tiles, ROW_TILES)
            rows0, rows1, bound_of_rows = load_rows(
                rows, group_rows, used, pair, ROW_TILES, BLOCK_D, D, HALF, USE_PTX
            )
            factored = in_factored_range(bound_of_rows, bound_of_columns, SMALLEST_GRADIENT_SUM)
            if REFINE:  # inputs of 16 bits err more than this form
                factored &= are_informative(
                    rows,
                    cols,
                    first_row,
                    turn_end,
                    weight_row,
                    looked_at,
                    D,
                    HALF,
                    BLOCK_D,
                    USE_PTX,
                )
            if factored:
                more0, more1 = tile_gradients(
                    exponentials(rows0, used, REFINE),
                    exponentials(rows1, used, REFINE),
                    group_rows,
                    used,
                    end_row,
                    extent,
                    cols,
                    dscores,
                    weight_row,
                    Gradients(
                        drow_item,
                        dcol_item,
                        sums_ptr,
                        row_turn == 0,
                        turn_end == end_row,
                        row_turns == 1,
                    ),
                    pair,
                    Options(
                        H,
                        D,
                        HALF,
                        BLOCK_D,
                        CONTIGUOUS_SCORES,
                        MASK_SCORES,
                        dweight_ptr is not None,
                        False,
                        REFINE,
                        USE_PTX,
                    ),
                )
                dweight0 += more0
                dweight1 += more1
            else:  # a few rows at a time, as this takes more registers
                for tile in range(tiles):
                    row = first_row + tile * TILE_ROWS
                    one_row, one_used = use_groups(row, 1, 1)
                    few0, few1, _ = load_rows(
                        rows, one_row, one_used, pair, 1, BLOCK_D, D, HALF, USE_PTX
                    )
                    more0, more1 = tile_gradients(
                        few0,
                        few1,
                        one_row,
                        one_used,
                        end_row,
                        extent,
                        cols,
                        dscores,
                        weight_row,
                        Gradients(
                            drow_item,
                            dcol_item,
                            sums_ptr,
                            row == begin_row,
                            row + TILE_ROWS >= end_row,
                            (row == begin_row) & (row + TILE_ROWS >= end_row),
                        ),
                        pair,
                        Options(
                            H,
                            D,
                            HALF,
                            BLOCK_D,
                            CONTIGUOUS_SCORES,
                            MASK_SCORES,
                            dweight_ptr is not None,
                            True,
                            REFINE,
                            USE_PTX,
                        ),
                    )
                    dweight0 += more0
                    dweight1 += more1
            tl.debug_barrier()  # column sums may be another thread's in the next tile
        if drow_ptr is not None:
            done = tl.cdiv(end_row, TILE_ROWS) * TILE_ROWS  # of tiles that were written whole
            store_zeros(drow_item, done, extent, pair, H, D, HALF, BLOCK_D)
        if dcol_ptr is not None:
            store_zeros(dcol_item, columns, all_columns, pair, H, D, HALF, BLOCK_D)
        if dweight_ptr is not None:
            target = dweight_ptr + (unit.to(tl.int64) * H + head) * D + pair
            exists0, exists1 = existing(pair, D, HALF)
            tl.store(target, -2.0 * tl.sum(dweight0, 0), mask=exists0)
            tl.store(target + HALF, -2.0 * tl.sum(dweight1, 0), mask=exists1)
