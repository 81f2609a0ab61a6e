"""``attn_ext.AttentionMemory``: values and gradients of one ``additive_attention`` a step."""

import pytest
import torch
from decoders import (
    KEY_SIDE,
    STEP_LAYOUTS,
    STEPS,
    Program,
    Step,
    check_program,
    decode,
    decoding_with_weights,
    formula_steps,
    fresh_leaves,
    make_memory,
    make_steps,
    named,
    plain_decoding,
    queries_of,
)
from helpers import assert_within_budget, require_dtype
from layouts import draw_keep
from torch import Tensor
from yardstick import Results

import attn_ext

pytestmark = pytest.mark.every_isa


@pytest.mark.parametrize("program", [plain_decoding, decoding_with_weights])
@pytest.mark.parametrize("heads", [None, 1, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_layouts(backend: str, layout: str, heads: int | None, program: Program):
    inputs, queries = make_steps(layout, heads=heads)
    actual = check_program(inputs, queries, backend, program)
    for name in ("dkey", "dvalue"):
        nobody = ~inputs.owned("key", inputs.key_rows)
        assert (actual[name][nobody] == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_low_precision(backend: str, layout: str, dtype: torch.dtype):
    inputs, queries = make_steps(layout, steps=2, heads=2, dtype=dtype)
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_gradcheck(backend: str, layout: str):
    require_dtype(backend, torch.float64)
    options = {"features": 3, "value_features": 2, "dtype": torch.float64, "poison": False}
    inputs, queries = make_steps(layout, steps=2, lengths_k=(3, 0, 2), **options)
    leaves = fresh_leaves(inputs, queries)

    def attend(*tensors):
        tensors = dict(zip(leaves, tensors))
        memory = make_memory(inputs, tensors, backend=backend)
        contexts = [memory.attend(query, need_weights=True) for query in queries_of(tensors)]
        return tuple(result for pair in contexts for result in pair)

    assert torch.autograd.gradcheck(attend, tuple(leaves.values()))


@pytest.mark.parametrize("features", [1, 7, 17, 100], ids=named("D"))
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_features(backend: str, layout: str, features: int):
    inputs, queries = make_steps(layout, features=features, value_features=features + 2)
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("scale", [1e-6, 10.0, 30.0, 1e4], ids=named("scale"))
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_magnitudes(backend: str, layout: str, scale: float):
    """The prepared exponentials of keys out of the factored range are never used."""
    inputs, queries = make_steps(layout, features=40, scale=scale)
    check_program(inputs, queries, backend, decoding_with_weights)


def test_large_keys_beside_small_ones(backend: str):
    inputs, queries = make_steps("jagged_one_step", features=40)
    inputs.leaves["key"][::2] *= 100
    queries[1] *= 50
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("strides", ["transposed", "reversed", "sliced"])
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_strides(backend: str, layout: str, heads: int | None, strides: str):
    inputs, queries = make_steps(layout, heads=heads, strides=strides)
    assert not queries[0].is_contiguous() and not inputs.leaves["key"].is_contiguous()
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_empty_sequences(backend: str, layout: str, lengths: tuple[int, ...]):
    inputs, queries = make_steps(layout, lengths_k=lengths)
    actual = check_program(inputs, queries, backend, decoding_with_weights)
    if not any(lengths):
        for name, result in actual.items():
            assert (result == 0).all(), name


def test_all_masked(backend: str):
    mask = torch.ones(2, 5, dtype=torch.bool)
    inputs, queries = make_steps("one_step_mask", lengths_k=(5, 5), key_padding_mask=mask)
    for name, result in check_program(inputs, queries, backend, decoding_with_weights).items():
        assert (result == 0).all(), name


SUBSETS = [(), ("query",), ("key",), ("value",), ("score_weight",), ("query", "key"), KEY_SIDE]


@pytest.mark.parametrize("wanted", SUBSETS, ids=["+".join(names) or "none" for names in SUBSETS])
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_requires_grad_subsets(backend: str, layout: str, wanted: tuple[str, ...]):
    inputs, queries = make_steps(layout)
    if not wanted:
        leaves = fresh_leaves(inputs, queries, wanted)
        memory = make_memory(inputs, leaves, backend=backend)
        assert not memory.attend(queries[0]).requires_grad
        return
    check_program(inputs, queries, backend, decoding_with_weights, wanted)


@pytest.mark.parametrize("dropout_p", [0.3, 0.8], ids=named("p"))
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_dropout(backend: str, layout: str, dropout_p: float):
    """Every step drops anew; a step's gradients use the mask of its forward."""
    inputs, queries = make_steps(layout, heads=2)
    keeps = [draw_keep(inputs, dropout_p, seed) for seed in range(STEPS)]

    def program(step: Step, leaves: dict[str, Tensor]) -> Results:
        def seeded(query, t, need_weights):
            torch.manual_seed(t)
            return step(query, t, need_weights)

        return decode(seeded, leaves, need_weights=True)

    check_program(inputs, queries, backend, program, dropout_p=dropout_p, keeps=keeps)


def test_dropout_differs_between_steps(backend: str):
    inputs, queries = make_steps("one_step", lengths_k=(40,) * 4)
    memory = make_memory(inputs, {}, backend=backend, dropout_p=0.5)
    first, second = (memory.attend(queries[0], need_weights=True)[1] == 0 for _ in range(2))
    assert 0.3 < (first == second).double().mean() < 0.7


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_equals_additive_attention(backend: str, layout: str):
    inputs, queries = make_steps(layout, heads=2, poison=False)
    memory = make_memory(inputs, {}, backend=backend)
    eager = formula_steps(inputs, inputs.leaves)
    for t, query in enumerate(queries):
        _, key, value, score_weight = inputs.arguments(inputs.leaves)
        expected = attn_ext.additive_attention(
            query, key, value, score_weight, need_weights=True, backend=backend, **inputs.keywords
        )
        results = zip(memory.attend(query, need_weights=True), expected, eager(query, t, True))
        for actual, other, by_hand in results:
            assert_within_budget("result", actual, other.double(), by_hand)


@pytest.mark.parametrize("max_seqlen_k", [13, 20], ids=["exact", "larger"])
def test_max_seqlen(backend: str, max_seqlen_k: int):
    inputs, queries = make_steps("jagged_one_step")
    inputs = inputs.with_keywords(max_seqlen_k=max_seqlen_k)
    check_program(inputs, queries, backend, decoding_with_weights)


def test_a_step_of_large_queries_among_small_ones(backend: str):
    """All steps of a sequence are one pass, whose route the largest of its queries chooses."""
    inputs, queries = make_steps("jagged_one_step", features=40)
    queries[1] *= 50
    check_program(inputs, queries, backend, decoding_with_weights)
