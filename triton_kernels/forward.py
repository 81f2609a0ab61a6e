"""Forward for several queries a sequence."""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import exp_once, kept_weights, weighted_sum
from .rows import (
    SIZES,
    Dropout,
    are_attended,
    attended_keys,
    dealt,
    find_tile,
    first_row,
    mask_from,
    sequence_rows,
)
from .scores import Pairs, weights_are_fit, write_scores

OWN_SIZES = ["parts", "keys_a_segment", "room", "processors", "stride_scores"]
PROGRAMS = tl.constexpr(2)  # of this kernel that a multiprocessor has at a time, by registers


class Segment(NamedTuple):
    """Keys of a program whose scores are in memory; key 0 is the first of them."""

    scores: tl.tensor  # where each query's score of key 0 is, [QUERIES]
    sums: tl.tensor  # where its sum of values is, [QUERIES]
    query: tl.tensor  # [QUERIES]
    query_valid: tl.tensor  # [QUERIES]
    first: tl.tensor  # which key of the sequence is key 0
    keys: tl.tensor  # how many
    mask_ptr: tl.tensor | None  # of key 0
    value_ptr: tl.tensor  # the row of key 0
    stride_vt: tl.tensor
    dropout: Dropout | None
    sequence: tl.tensor
    head: tl.tensor


@triton.jit
def load_scores(segment, begin, COLUMNS: tl.constexpr):
    """Scores [QUERIES, COLUMNS] of keys from ``begin`` on, the keys and which of them count."""
    key = begin + tl.arange(0, COLUMNS)
    attended = are_attended(segment.mask_ptr, key, segment.keys)
    scores = tl.load(
        segment.scores[:, None] + key[None, :],
        mask=segment.query_valid[:, None] & attended[None, :],
        other=-float("inf"),
    )
    return scores, key, attended


@triton.jit
def add_segment(segment, largest, total, is_first, SHAPE: tl.constexpr):
    """Add a segment of keys to the softmax and the weighted sum of queries.

    Args:
        segment: :class:`Segment`.
        largest, total: of the scores before, and of their exponentials, [QUERIES].
        is_first: whether nothing has been summed before.

    Returns:
        ``largest`` and ``total``.
    """
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    DV: tl.constexpr = SHAPE.DV
    before = largest
    for begin in range(0, segment.keys, COLUMNS):
        scores, _, _ = load_scores(segment, begin, COLUMNS)
        largest_here = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(largest_here == -float("inf"), 0.0, largest_here)
        total *= tl.exp(largest - shift)
        total += tl.sum(exp_once(scores - shift[:, None], SHAPE.USE_PTX), 1)
        largest = largest_here
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    shrink = tl.exp(before - shift)
    scale = 1.0 / tl.where(total == 0.0, 1.0, total) if SHAPE.SINGLE else 1.0
    places = tl.arange(0, COLUMNS).to(tl.int64) * segment.stride_vt
    for begin_d in range(0, DV, SHAPE.VALUES):
        d = begin_d + tl.arange(0, SHAPE.VALUES)
        target = segment.sums[:, None] + d[None, :]
        mask = segment.query_valid[:, None] & (d[None, :] < DV)
        sums = tl.zeros((SHAPE.QUERIES, SHAPE.VALUES), tl.float32)
        if not SHAPE.SINGLE:
            if not is_first:
                sums = tl.load(target, mask=mask, other=0.0) * shrink[:, None]
        for begin in tl.range(0, segment.keys, COLUMNS, num_stages=1):
            scores, key, attended = load_scores(segment, begin, COLUMNS)
            weights = exp_once(scores - shift[:, None], SHAPE.USE_PTX)
            if SHAPE.SINGLE:
                weights *= scale[:, None]
            weights *= kept_weights(
                segment.dropout,
                segment.sequence,
                segment.head,
                segment.query[:, None],
                (segment.first + key)[None, :],
            )
            rows = segment.value_ptr + tl.cast(begin, tl.int64) * segment.stride_vt
            value = tl.load(
                rows + places[:, None] + d[None, :],
                mask=attended[:, None] & (d[None, :] < DV),
                other=0.0,
            )
            sums = weighted_sum(weights, value, sums)
        tl.store(target, sums.to(segment.sums.dtype.element_ty), mask=mask)
    return largest, total


@triton.jit(do_not_specialize=[*SIZES, *OWN_SIZES])
def additive_attention_fwd_kernel(
    inputs,  # :class:`rows.Inputs`
    context_ptr,
    stats_ptr,
    partial_ptr,
    scores_ptr,
    order_ptr,
    batch,
    rows_q,
    rows_k,
    max_seqlen_q,
    max_seqlen_k,
    parts,
    keys_a_segment,
    room,
    processors,
    stride_scores,
    SHAPE: tl.constexpr,
):
    """``context_i = sum_j softmax_j(e_ij) value_j`` for QUERIES of a sequence and a head.

    Keys are taken in segments: all scores of one, then its softmax, then its weighted sum. With
    ``SINGLE`` a sequence's keys are one segment, and results final. Else program (tile, head, part)
    takes each ``parts``-th segment, and leaves for ``sums.merge_parts`` its sum ``partial``
    [rows, parts, H, DV] and its (max, sum) in ``stats`` [rows, parts, H, 2].
    The tiles are in ``order``, of :func:`rows.write_order`, if it is given.
    Scores pass through ``scores`` [rows, (parts,) H, stride_scores], all of them with KEEP_SCORES;
    without ``stats`` nothing else is computed. RAW: of the scores more than differences matters.
    """
    rows_q = rows_q.to(tl.int64)
    rows_k = rows_k.to(tl.int64)
    H: tl.constexpr = SHAPE.H
    cu_q_ptr = inputs.cu_q_ptr
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    if order_ptr is None:
        sequence, first_query = find_tile(cu_q_ptr, tl.program_id(0), batch, rows_q, SHAPE.QUERIES)
    else:
        tiles = tl.load(order_ptr + 2 * room)
        if tl.program_id(0) >= tiles:
            return
        tile = tl.program_id(0)
        # Where more tiles follow, the next one is for whoever is done first.
        if tiles * H * parts <= PROGRAMS * processors:
            tile = dealt(tile, tiles, processors)
        sequence = tl.load(order_ptr + 2 * tile)
        first_query = tl.load(order_ptr + 2 * tile + 1).to(tl.int64) * SHAPE.QUERIES
    place, start, length_q = sequence_rows(cu_q_ptr, sequence, batch, rows_q)
    if first_query >= length_q:
        return
    key_place, key_start, length = attended_keys(
        inputs.key_side, sequence, batch, rows_k, max_seqlen_k
    )
    query = first_query + tl.arange(0, SHAPE.QUERIES)
    query_valid = query < length_q
    row = place * rows_q + start
    part_row = ((row + query) * parts + part) * H + head
    if SHAPE.KEEP_SCORES:
        scores_item = scores_ptr + (row * H + head) * stride_scores
        stride_query = H * stride_scores
    else:
        scores_item = scores_ptr + ((row * parts + part) * H + head) * stride_scores
        stride_query = parts * H * stride_scores
    value_item = first_row(inputs.value, key_place, key_start, head)
    score_weights = inputs.score_weight_ptr + head * SHAPE.D
    pairs = Pairs(
        first_row(inputs.query, place, start, head),
        inputs.query.by_row,
        first_query,
        length_q,
        first_row(inputs.key, key_place, key_start, head),
        inputs.key.by_row,
        length,
        score_weights,
        *weights_are_fit(score_weights, SHAPE.D),
        stride_query,
    )

    sums_rows = None
    if stats_ptr is not None:
        sums_rows = (context_ptr if SHAPE.SINGLE else partial_ptr) + part_row * SHAPE.DV
    largest = tl.full((SHAPE.QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((SHAPE.QUERIES,), tl.float32)
    # Without any key there still is a result to write: 0, by one empty segment.
    segments = tl.maximum(tl.cdiv(length, keys_a_segment), 1)
    if SHAPE.SINGLE:  # known, so that there is no loop
        segments = 1
        part = 0
        parts = 1
    # As in write_scores, nothing is kept from one segment to the next.
    for segment in tl.range(part, segments, parts, disable_licm=True):
        first = segment * keys_a_segment
        end = tl.minimum(first + keys_a_segment, length)
        scores = scores_item if SHAPE.KEEP_SCORES else scores_item - first  # of query 0 and key 0
        write_scores(pairs, scores, first, end, SHAPE)
        if stats_ptr is not None:
            tl.debug_barrier()  # other threads of the program read what these have written
            largest, total = add_segment(
                Segment(
                    scores + first + query * pairs.stride_scores,
                    sums_rows,
                    query,
                    query_valid,
                    first,
                    (end - first).to(tl.int32),
                    mask_from(inputs.key_side, key_place * rows_k + first),
                    value_item + first * inputs.value.by_row,
                    inputs.value.by_row,
                    inputs.dropout,
                    sequence,
                    head,
                ),
                largest,
                total,
                segment == part,
                SHAPE,
            )
            if not SHAPE.SINGLE:
                # The next one overwrites the scores and reads the sums. Triton would place a
                # barrier for its shared memory about here, but knows of no other memory.
                tl.debug_barrier()
    if stats_ptr is not None:
        tl.store(stats_ptr + part_row * 2, largest, mask=query_valid)
        tl.store(stats_ptr + part_row * 2 + 1, total, mask=query_valid)
