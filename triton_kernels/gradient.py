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
    Item,
    Options,
    Side,
    existing,
    load_lines,
    load_weights_times_4,
    store_pairs,
    tile_gradients,
)
from .route import INFORMATIVE_SHARE, SATURATED_MAGNITUDE, SMALL_MAGNITUDE
from .rows import (
    SIZES,
    are_attended,
    attended_keys,
    dealt,
    find_tile,
    first_row,
    mask_from,
    sequence_rows,
)

LINES = tl.constexpr(8)  # rows that are looked at together where they are only looked at


@triton.jit
def largest_magnitude(side, pair, options):
    """Of these pairs of features in what is attended of a side."""
    largest = tl.zeros((LINES, options.BLOCK_D), tl.float32)
    for first in range(0, side.attended, LINES):
        x0, x1 = load_lines(side, first + tl.arange(0, LINES), pair, options)
        largest = tl.maximum(largest, tl.maximum(tl.abs(x0), tl.abs(x1)))
    return tl.max(tl.max(largest, 1), 0)


@triton.jit
def are_informative(item, first_row, end_row, pair, options):
    """Whether enough of the score weights meet a tanh that is neither nearly 0 nor nearly 1, as
    ``scores.are_informative`` asks: each row of [first_row, end_row) is looked at with one column.
    """
    weights = load_weights_times_4(item.score_weight_ptr, pair, options)
    informative = tl.zeros((LINES, options.BLOCK_D), tl.float32)
    total = tl.zeros((LINES, options.BLOCK_D), tl.float32)
    for first in range(first_row, end_row, LINES):
        row = first + tl.arange(0, LINES)
        col = row % tl.maximum(item.cols.attended, 1)
        both = are_attended(item.rows.mask_ptr, row, item.rows.attended)
        both &= are_attended(item.cols.mask_ptr, col, item.cols.attended)
        x = load_lines(item.rows, row, pair, options)
        y = load_lines(item.cols, col, pair, options)
        for half in tl.static_range(2):
            weight = tl.where(both[:, None], tl.abs(weights[half])[None, :], 0.0)
            magnitude = tl.abs(x[half] + y[half])
            informs = (magnitude > SMALL_MAGNITUDE) & (magnitude < SATURATED_MAGNITUDE)
            informative += tl.where(informs, weight, 0.0)
            total += weight
    share = tl.sum(tl.sum(informative, 1), 0)
    return share >= tl.sum(tl.sum(total, 1), 0) * INFORMATIVE_SHARE


@triton.jit
def store_zeros(ptr, begin, end, pair, options):
    """Gradients of the rows [begin, end) of a sequence that nothing depends on."""
    zeros = tl.zeros((TILE_ROWS, options.BLOCK_D), tl.float32)
    for first in range(begin, end, TILE_ROWS):
        row = first + tl.arange(0, TILE_ROWS)
        target = ptr + row[:, None].to(tl.int64) * (options.H * options.D) + pair[None, :]
        store_pairs(target, zeros, zeros, row < end, pair, options)


@triton.jit
def side_of(inputs, sequence, head, sizes, ARE_KEYS: tl.constexpr):
    """A sequence's :class:`Side`, its first row among all, and how many rows it has.

    ``sizes``: batch, the rows of queries and of keys, and the most of either in a sequence.
    """
    batch, rows_q, rows_k, max_q, max_k = sizes
    mask_ptr = None
    if ARE_KEYS:
        side = inputs.key
        place, start, extent = sequence_rows(inputs.key_side.cu_ptr, sequence, batch, rows_k)
        _, _, attended = attended_keys(inputs.key_side, sequence, batch, rows_k, max_k)
        number = place * rows_k + start
        mask_ptr = mask_from(inputs.key_side, place * rows_k)
    else:
        side = inputs.query
        place, start, extent = sequence_rows(inputs.cu_q_ptr, sequence, batch, rows_q)
        attended = tl.minimum(extent, max_q)
        number = place * rows_q + start
    ptr = first_row(side, place, start, head)
    return Side(ptr, side.by_row, mask_ptr, attended.to(tl.int32)), number, extent


@triton.jit(do_not_specialize=[*SIZES, "items", "processors", "zero"])
def additive_attention_grad_kernel(
    inputs,  # :class:`rows.Inputs`
    dscores_ptr,
    stride_query_start,
    stride_key_start,
    stride_query,
    stride_key,
    stride_head,
    drow_ptr,
    dcol_ptr,
    column_sums_ptr,
    dweight_ptr,
    order_ptr,
    batch,
    rows_q,
    rows_k,
    max_seqlen_q,
    max_seqlen_k,
    items,
    processors,
    zero,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr,
    WHOLE_SEQUENCES: tl.constexpr,
    CONTIGUOUS_SCORES: tl.constexpr,
    MASK_SCORES: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Gradients of one side, or with WHOLE_SEQUENCES and ``dcol`` of both, as in the module's text.

    An item of work is a head, BLOCK_D pairs of features, and a tile of rows or all of a sequence,
    of the sequences in ``order``, of :func:`rows.write_order`, if it is given.
    ``column_sums`` is [programs, longest columns, 2 BLOCK_D] float32; ``dweight`` [tiles or
    sequences, H, D] float32 are partial sums. The gradient of a score is at (first query and key of
    the sequence, query, key, head), each with its stride. With CONTIGUOUS_SCORES those of keys lie
    next to each other, and are 0 past the last one up to whole tiles of keys; those of bfloat16
    are multiplied as such. Past the last row they are not read with MASK_SCORES, and else may be
    any number for up to three rows.
    """
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    sizes = batch, rows_q, rows_k, max_seqlen_q, max_seqlen_k
    if ROWS_ARE_KEYS:
        row_ptr, tile_rows = inputs.key.ptr, rows_k
        cu_row_ptr = inputs.key_side.cu_ptr
        max_columns = max_seqlen_q
        row_start, col_start = stride_key_start, stride_query_start
        stride_row, stride_col = stride_key, stride_query
    else:
        row_ptr, tile_rows = inputs.query.ptr, rows_q
        cu_row_ptr = inputs.cu_q_ptr
        max_columns = max_seqlen_k
        row_start, col_start = stride_query_start, stride_key_start
        stride_row, stride_col = stride_query, stride_key
    BLOCK_ROWS: tl.constexpr = ROW_TILES * TILE_ROWS
    CHUNKS: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    REFINE: tl.constexpr = row_ptr.dtype.element_ty == tl.float32
    PACKED: tl.constexpr = (
        USE_PTX and CONTIGUOUS_SCORES and dscores_ptr.dtype.element_ty == tl.bfloat16
    )
    options: tl.constexpr = Options(
        H, D, HALF, BLOCK_D, CONTIGUOUS_SCORES, MASK_SCORES, False, PACKED, USE_PTX
    )
    direct_options: tl.constexpr = Options(
        H, D, HALF, BLOCK_D, CONTIGUOUS_SCORES, MASK_SCORES, True, False, USE_PTX
    )
    lane = tl.arange(0, BLOCK_D)
    programs = tl.num_programs(0)
    turns = tl.cdiv(items - tl.program_id(0), programs)
    if not WHOLE_SEQUENCES:  # known, so that there is no loop: each program has one item
        turns = 1
    for turn in range(turns):
        number = tl.program_id(0) + turn * programs
        if order_ptr is not None:
            number = dealt(number, items, processors)
        # Of unknown alignment, features are not vectorised: each thread keeps to its own.
        pair = (number % CHUNKS) * BLOCK_D + (lane + zero)
        looked_at = (number % CHUNKS) * BLOCK_D + lane
        head = (number // CHUNKS % H).to(tl.int64)
        unit = number // (CHUNKS * H)
        if WHOLE_SEQUENCES:
            sequence = unit
            if order_ptr is not None:
                if unit < batch:  # what belongs to nobody comes last
                    # With corrupt offsets some places are not written.
                    sequence = tl.load(order_ptr + 2 * unit)
                    sequence = tl.minimum(tl.maximum(sequence, 0), batch)
            begin_row = rows_q * 0
        else:
            sequence, begin_row = find_tile(cu_row_ptr, unit, batch, tile_rows, BLOCK_ROWS)
        rows, row_number, extent = side_of(inputs, sequence, head, sizes, ROWS_ARE_KEYS)
        cols, col_number, all_columns = side_of(inputs, sequence, head, sizes, not ROWS_ARE_KEYS)
        begin_row = begin_row.to(tl.int32)
        end_row = tl.where(cols.attended > 0, rows.attended, 0)
        if not WHOLE_SEQUENCES:
            extent = tl.minimum(extent, begin_row + BLOCK_ROWS)
            end_row = tl.maximum(tl.minimum(end_row, extent.to(tl.int32)), begin_row)
        item = Item(
            rows,
            cols,
            pair,
            inputs.score_weight_ptr + head * D,
            dscores_ptr + row_number * row_start + col_number * col_start + head * stride_head,
            stride_row,
            stride_col,
            None if drow_ptr is None else drow_ptr + (row_number * H + head) * D,
            None if dcol_ptr is None else dcol_ptr + (col_number * H + head) * D,
            None
            if dcol_ptr is None
            else column_sums_ptr + tl.program_id(0).to(tl.int64) * max_columns * (2 * BLOCK_D),
            dweight_ptr,
            begin_row,
            end_row,
            extent,
        )
        col_bound = largest_magnitude(cols, looked_at, options)
        dweight0 = tl.zeros((BLOCK_D,), tl.float32)
        dweight1 = tl.zeros((BLOCK_D,), tl.float32)
        # In as few turns as the registers allow, of about as many rows each.
        row_turns = tl.cdiv(end_row - begin_row, BLOCK_ROWS)
        step = tl.cdiv(tl.cdiv(end_row - begin_row, tl.maximum(row_turns, 1)), TILE_ROWS)
        step = step * TILE_ROWS
        for row_turn in range(row_turns):
            first_row = begin_row + row_turn * step
            turn_end = tl.minimum(first_row + step, end_row)
            tiles = tl.cdiv(turn_end - first_row, TILE_ROWS)
            factored = tiles > 0
            if REFINE:  # inputs of 16 bits err more than this form
                factored = are_informative(item, first_row, turn_end, looked_at, options)
            more0, more1, factored = tile_gradients(
                item, first_row, tiles, factored, col_bound, ROW_TILES, options
            )
            dweight0 += more0
            dweight1 += more1
            if not factored:  # a few rows at a time, as this takes more registers
                for tile in range(tiles):
                    row = first_row + tile * TILE_ROWS
                    more0, more1, _ = tile_gradients(
                        item, row, 1, factored, col_bound, 1, direct_options
                    )
                    dweight0 += more0
                    dweight1 += more1
        if drow_ptr is not None:
            done = tl.cdiv(end_row, TILE_ROWS) * TILE_ROWS  # of tiles that were written whole
            store_zeros(item.drow_ptr, done, extent, pair, options)
        if dcol_ptr is not None:
            done_columns = tl.where(rows.attended > 0, cols.attended, 0)
            store_zeros(item.dcol_ptr, done_columns, all_columns, pair, options)
        if dweight_ptr is not None:
            target = dweight_ptr + (unit.to(tl.int64) * H + head) * D + pair
            exists0, exists1 = existing(pair, options)
            tl.store(target, -2.0 * dweight0, mask=exists0)
            tl.store(target + HALF, -2.0 * dweight1, mask=exists1)
