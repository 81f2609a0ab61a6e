"""Block sizes and warps: one table, chosen by regime, feature counts and dtype; nothing is tuned at
call time. Of how many queries a call has, only the score tiles depend (:func:`score_tiles`).

Reasons are counts from machine code for sm_90 (``python -m benchmarks.static``), not measurements.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel, with its warps."""

    warps: int
    queries: int = 0
    keys: int = 0
    features: int = 0
    pairs: int = 0  # of features, of which a block of more is taken in turns
    value_features: int = 0
    registers: int = 0  # the most a thread may have on NVIDIA; 0: as the compiler likes


# A score tile is [queries, keys, pairs of features] in registers, 64 sums a thread: more queries
# and keys mean fewer exponentials. What a sequence lacks of it is left out by fours. A block of
# features passes through shared memory, with barriers; what a thread needs of it is in registers
# too, so that two programs run on a multiprocessor. Held to 168 registers three would, but then the
# assembler has each thread wait for one reciprocal at a time. Wide blocks of value features: the
# weights are computed anew for each.
SCORES = Tiles(warps=4, queries=32, keys=32, features=32, pairs=8, value_features=256)
# Of half as many queries where there are too few of those tiles to give each multiprocessor
# several: one that takes twice the mean time would have all wait.
SCORES_FEW = replace(SCORES, queries=16, features=64, pairs=16, value_features=512)
# Keys whose weights meet their values together. Products of float32 are written out, a multiply-add
# each: half as many compile in nine tenths of the time, and 75 keys take 80 columns, not 96.
SCORE_COLUMNS, SCORE_COLUMNS_FLOAT32 = 32, 16
# Of the gradients of scores, and of values: matrix products. Those of float32 go through
# multiply-adds and need the registers themselves.
PAIRS = Tiles(warps=4, queries=32, keys=32, value_features=64)
PAIRS_FLOAT32 = Tiles(warps=4, queries=32, keys=32, value_features=32)
# Partial sums that are added: so many loads are on their way at a time.
SUM_PARTS, SUM_NUMBERS = 32, 64
# Returned weights are written once; any tile will do.
WEIGHTS = Tiles(warps=4, queries=16, keys=64)
# 32 rows of keys stay in registers as 8 tensors of 4 rows, at 255 registers without a spill; with
# 16 rows the loads of a column would be shared by half as many products.
GRADIENT_ROW_TILES = 8
# A warp reads a row of bfloat16 keys in 16-byte loads, 8 threads a row.
STEP = Tiles(warps=4, features=64, value_features=64)
# Twice the keys take twice the threads, or the backward spills.
STEP_128_KEYS = Tiles(warps=8, features=64, value_features=64)
POOL = Tiles(warps=4, features=64, value_features=64)
# 32 numbers a thread, of each of hidden rows, two slopes and a gradient, would spill.
POOL_GRADIENT = Tiles(warps=4, features=32, value_features=32)
MERGE = Tiles(warps=4, value_features=256)

SINGLE_SEGMENT = 128  # the most keys whose weights are not rescaled, or are one tile
STEP_SEGMENT = 64  # keys a program, where sequences are longer
POOL_SEGMENT = 64  # keys a program in pooling
POOL_BRANCHES = 5  # the most whose weights of a tile a program has in registers without a spill
# Up to so many (query, key) pairs a program computes all gradients of a sequence (7.6 issue slots
# an element). Of longer ones those of queries and of keys are computed apart (13.3), tile by tile,
# for no program to be busy long after the others.
WHOLE_SEQUENCE_PAIRS = 1 << 14
# Up to so many sequences are put in order of their work; of more, any order will do.
MOST_ORDERED = 1024


def score_tiles(
    rows: int, processors: int, dim: int, value_dim: int, value_dtype: torch.dtype
) -> Tiles:
    """For so many queries, of all heads."""
    tiles = SCORES if rows >= 2 * SCORES.queries * processors else SCORES_FEW
    if -dim % tiles.features > dim // 8:  # too much would be computed for features that are not
        tiles = replace(tiles, features=tiles.features // 2)
    # 512 of float32 would take more shared memory than two programs have on most GPUs.
    widest = 256 if value_dtype == torch.float32 else tiles.value_features
    there_are = max(16, 1 << (value_dim - 1).bit_length())
    return replace(tiles, value_features=min(tiles.value_features, widest, there_are))


def score_columns(dtype: torch.dtype) -> int:
    return SCORE_COLUMNS_FLOAT32 if dtype == torch.float32 else SCORE_COLUMNS


def pair_tiles(dtype: torch.dtype) -> Tiles:
    return PAIRS_FLOAT32 if dtype == torch.float32 else PAIRS


def gradient_pairs(half: int) -> int:
    """Pairs of features a program: one a thread, in as few warps as hold ``half`` of them."""
    return next((pairs for pairs in (32, 64) if half <= pairs), 128)


def segment(max_seqlen_k: int) -> int:
    """Keys whose scores are one tile: a power of two from 32 on."""
    return min(SINGLE_SEGMENT, max(32, 1 << (max_seqlen_k - 1).bit_length()))


def query_segment(max_seqlen_q: int) -> tuple[int, bool]:
    """Queries whose weights are one tile of value gradients, and whether that is all of any
    sequence; if not, they are loaded again for each block of features."""
    single = max_seqlen_q <= SINGLE_SEGMENT
    return segment(max_seqlen_q) if single else PAIRS.queries, single


def step_segment(max_seqlen_k: int) -> tuple[int, bool]:
    """Keys a program where sequences have one query, and whether that is all keys of any."""
    single = max_seqlen_k <= SINGLE_SEGMENT
    return segment(max_seqlen_k) if single else STEP_SEGMENT, single


def pool_segment(max_seqlen_k: int) -> int:
    """The same of pooling; it is all keys where no sequence is longer."""
    return min(POOL_SEGMENT, segment(max_seqlen_k))


def pool_group(branches: int) -> int:
    """Branches a program, about as many in each; every group of them reads keys or values anew."""
    return -(-branches // -(-branches // POOL_BRANCHES))


def step_tiles(segment: int, raw: bool = False) -> Tiles:
    """``raw``: for scores alone, for which the compiler, left to itself, would spill."""
    tiles = STEP_128_KEYS if segment >= 128 else STEP
    return replace(tiles, registers=255) if raw else tiles
