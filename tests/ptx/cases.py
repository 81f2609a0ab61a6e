"""What is executed: calls of the public API beside float64, in the error budget of the suite."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from decoders import check_program, decoding_with_weights, make_steps, plain_decoding
from helpers import check, check_scores
from layouts import make_inputs
from test_attention_memory_family import attend_several, scores_of_memory
from test_pool import check as check_pool
from test_pool import check_scores as check_pool_scores
from test_pool import make_bags

from attn_ext.triton_kernels.route import LARGEST_WEIGHT_NORM

# Lengths of three sequences; the third has more of both than a tile, the second no keys.
THREE = {"lengths_q": (4, 7, 33), "lengths_k": (5, 0, 33)}
LONG = {"lengths_q": (3, 40), "lengths_k": (300, 17)}  # past a segment of keys
WIDE = {"lengths_q": (28, 3, 40), "lengths_k": (28, 5, 22)}  # any part of a tile of 32 is absent
APART = {"lengths_q": (140, 5), "lengths_k": (130, 40)}  # gradients of the two sides apart
STEPS_LONG = {"lengths_k": (300, 0, 70)}


@dataclass(frozen=True)
class Case:
    """One call; ``run(backend, dtype)`` raises AssertionError where results are wrong."""

    run: Callable[[str, torch.dtype], object]


def attention(layout: str, **options) -> Case:
    keywords = {"need_weights": False}
    for name in ("need_weights", "dropout_p", "wanted", "function"):  # those of check()
        if name in options:
            keywords[name] = options.pop(name)

    def run(backend: str, dtype: torch.dtype) -> None:
        check(make_inputs(layout, dtype=dtype, **options), backend, **keywords)

    return Case(run)


def scores(layout: str, alone: bool = False, function=None, **options) -> Case:
    def run(backend: str, dtype: torch.dtype) -> None:
        more = {} if function is None else {"function": function}
        check_scores(make_inputs(layout, dtype=dtype, **options), backend, alone=alone, **more)

    return Case(run)


def memory(layout: str, need_weights: bool = False, steps: int = 3, **options) -> Case:
    program = decoding_with_weights if need_weights else plain_decoding

    def run(backend: str, dtype: torch.dtype) -> None:
        inputs, queries = make_steps(layout, steps, dtype=dtype, **options)
        check_program(inputs, queries, backend, program)

    return Case(run)


def with_large_tiles(case: Case) -> Case:
    """As of a call that keeps a GPU busy: tiles of many queries, and a program for all keys."""

    def run(backend: str, dtype: torch.dtype) -> None:
        from attn_ext.triton_kernels import configurations, launch_forward

        with (
            mock.patch.object(configurations, "SCORES_FEW", configurations.SCORES),
            mock.patch.object(launch_forward, "PROGRAMS_A_PROCESSOR", 0),
        ):
            case.run(backend, dtype)

    return Case(run)


def at_weight_limit(layout: str, **options) -> Case:
    """Score weights of norms around that above which scores are not factored.

    Threads that each add up the norm must not disagree on the side that it is on.
    """

    def run(backend: str, dtype: torch.dtype) -> None:
        inputs = make_inputs(layout, dtype=dtype, **options)
        weight = inputs.leaves["score_weight"].double()
        weight *= LARGEST_WEIGHT_NORM.value / weight.norm()
        for units in range(-2, 3):
            scaled = (weight * (1 + units * 2.0**-25)).to(dtype)
            check(inputs.with_leaves(score_weight=scaled), backend, need_weights=False)

    return Case(run)


def pool(layout: str, raw: bool = False, **options) -> Case:
    def run(backend: str, dtype: torch.dtype) -> None:
        dropouts = {n: options[n] for n in ("feature_dropout", "dropout") if n in options}
        rest = {n: option for n, option in options.items() if n not in dropouts}
        bags = replace(make_bags(layout, dtype=dtype, **rest), **dropouts)
        (check_pool_scores if raw else check_pool)(bags, backend)

    return Case(run)


SIZE = {"features": 32, "value_features": 24}
# What a kernel may be asked for at once: a mask, dropout, heads, returned weights, value features
# of another number and no multiple of 8.
OPTIONS = {"features": 20, "value_features": 12, "heads": 2, "need_weights": True, "dropout_p": 0.3}
CASES = {
    "options": attention("padded_mask", **THREE, **OPTIONS),
    # The second sequence has more pairs, and so comes first, and two segments of keys; the first
    # has several tiles of queries; the third has no keys. The gradients of the two sides are
    # computed apart, and several warps write values.
    "options-jagged": attention(
        "jagged",
        lengths_q=(133, 2, 9),
        lengths_k=(5, 150, 0),
        features=20,
        value_features=68,
        dropout_p=0.3,
    ),
    # The second sequence has one tile of keys more than it needs: see rows.find_tile.
    "options-step": attention("jagged_one_step", lengths_k=(62, 200, 0), **OPTIONS),
    "options-memory": memory("one_step_mask", True, lengths_k=(5, 0, 33), features=40, heads=2),
    "options-scores": scores("padded_mask", **THREE, features=20, heads=2),
    "options-pool": pool(
        "one_step_mask",
        lengths_k=(5, 70, 9),
        features=20,
        value_features=12,
        branches=3,
        feature_dropout=(0.25, 0.4),
        dropout=0.3,
    ),
    "jagged": attention("jagged", **THREE, **SIZE),
    "jagged-odd": attention("jagged", **THREE, features=19, value_features=17),
    "mask": attention("padded_mask", **THREE, features=64, value_features=48),
    "heads": attention("padded_lengths", **THREE, heads=2),
    "weights": attention("jagged", **THREE, **SIZE, need_weights=True),
    "dropout": attention("padded_mask", **THREE, heads=2, need_weights=True, dropout_p=0.3),
    "dquery": attention("padded_mask", **THREE, **SIZE, wanted=("query",)),
    "dkey": attention("jagged", **THREE, **SIZE, wanted=("key", "score_weight")),
    "large": attention("jagged", **THREE, **SIZE, scale=20.0),
    "small": attention("jagged", **THREE, **SIZE, scale=0.01),
    "long": attention("jagged", **LONG, **SIZE),
    "long-weights": attention("padded_mask", **LONG, **SIZE, need_weights=True),
    "apart": attention("jagged", **APART, **SIZE),
    "wide": with_large_tiles(attention("jagged", **WIDE, **SIZE)),
    "wide-large": with_large_tiles(attention("jagged", **WIDE, **SIZE, scale=20.0)),
    "wide-scores": with_large_tiles(scores("jagged", **WIDE, **SIZE)),
    "wide-long": with_large_tiles(attention("jagged", **LONG, **SIZE)),
    "sliced": attention("padded_mask", **THREE, **SIZE, strides="sliced", need_weights=True),
    "mixed": attention("jagged_query_mask", **THREE, **SIZE, need_weights=True),
    "step": attention("one_step_lengths", lengths_k=(5, 0, 33), features=64, value_features=48),
    "step-jagged": attention(
        "jagged_one_step", lengths_k=(5, 0, 33), features=40, heads=2, need_weights=True
    ),
    "step-128": attention("jagged_one_step", lengths_k=(100, 3, 0, 128), features=64),
    "step-long": attention("jagged_one_step", **STEPS_LONG, features=64, need_weights=True),
    "step-dropout": attention("one_step_mask", lengths_k=(5, 9, 33), features=33, dropout_p=0.4),
    "step-limit": at_weight_limit("one_step_lengths", lengths_k=(5, 0, 33), features=33),
    "limit": at_weight_limit("padded_lengths", lengths_q=(2,) * 3, lengths_k=(5, 0, 33)),
    "memory": memory("jagged_one_step", lengths_k=(5, 0, 33), features=64),
    "memory-long": memory("one_step_lengths", True, **STEPS_LONG, **SIZE),
    "memory-several": attention(
        "padded_lengths",
        lengths_q=(4,) * 3,
        lengths_k=(5, 0, 33),
        **SIZE,
        need_weights=True,
        function=attend_several,
    ),
    "memory-scores": scores(
        "padded_lengths", lengths_q=(4,) * 3, lengths_k=(5, 0, 33), function=scores_of_memory
    ),
    "scores": scores("padded_mask", **THREE, **SIZE),
    "scores-long": scores("jagged", **LONG, **SIZE, heads=2),
    "scores-step": scores("one_step_mask", lengths_k=(5, 9, 33), features=40),
    "scores-step-long": scores("jagged_one_step", **STEPS_LONG, features=40, heads=2),
    "scores-small": scores("padded_mask", **THREE, **SIZE, scale=1e-3),
    "scores-alone": scores("jagged_one_step", alone=True, lengths_k=(5, 0, 70), features=40),
    "pool": pool("jagged_one_step", lengths_k=(5, 0, 33), features=40, value_features=24),
    "pool-branches": pool("one_step_mask", lengths_k=(5, 9, 33), branches=3, gated=False),
    "pool-groups": pool("one_step_lengths", lengths_k=(5, 0, 33), branches=8, features=20),
    "pool-long": pool("jagged_one_step", **STEPS_LONG, branches=2, features=40),
    "pool-dropout": pool(
        "one_step_lengths",
        lengths_k=(5, 0, 33),
        branches=2,
        feature_dropout=(0.25, 0.4),
        dropout=0.3,
    ),
    "pool-scores": pool("jagged_one_step", raw=True, lengths_k=(5, 0, 70), branches=2),
}
