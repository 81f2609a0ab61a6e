"""Memories for real decoders: several queries a sequence, scores, and a choice of sequences."""

import copy
import pickle

import pytest
import torch
from helpers import assert_within_budget, check, check_scores
from layouts import Inputs, make_inputs, offsets_of
from parameters import named
from torch import Tensor

import attn_ext
from attn_ext import AttentionMemory, ops

# Padded queries (B, n, D) over keys of every layout.
SEVERAL = ("padded", "padded_lengths", "padded_mask", "nested_keys")


def attend_several(inputs: Inputs, leaves: dict[str, Tensor], need_weights: bool, **options):
    query, key, value, weight = inputs.arguments(leaves)
    memory = AttentionMemory(key, value, weight, **inputs.keywords, **options)
    result = memory.attend(query, need_weights=need_weights)
    return result if need_weights else (result, None)


@pytest.mark.every_isa
@pytest.mark.parametrize("heads", [None, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", SEVERAL)
def test_several_queries_a_sequence(backend: str, layout: str, heads: int | None):
    inputs = make_inputs(layout, lengths_q=(4,) * 6, heads=heads)
    check(inputs, backend, function=attend_several)
    check_scores(inputs, backend, function=scores_of_memory)


def scores_of_memory(query: Tensor, key: Tensor, weight: Tensor, **options) -> Tensor:
    """The keys are the values too, whose gradient must be 0."""
    return AttentionMemory(key, key, weight, **options).scores(query)


@pytest.mark.every_isa
@pytest.mark.parametrize("heads", [None, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", ["one_step_lengths", "one_step_mask", "jagged_one_step"])
def test_scores_of_steps(backend: str, layout: str, heads: int | None):
    check_scores(make_inputs(layout, heads=heads), backend, function=scores_of_memory)


def test_scores_beside_contexts(backend: str):
    """The batched pass adds up steps of both kinds; dropout touches no score."""
    inputs = make_inputs("jagged_one_step", poison=False)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: leaf.to(dtype, copy=True) for name, leaf in inputs.leaves.items()}
        query, key, value, weight = (leaf.requires_grad_() for leaf in leaves.values())
        memory = AttentionMemory(key, value, weight, backend=backend, **inputs.keywords)
        dropping = AttentionMemory(
            key, value, weight, backend=backend, dropout_p=0.9, **inputs.keywords
        )
        scores = memory.scores(query).sin().sum() + dropping.scores(query + 1).cos().sum()
        (scores + memory.attend(2 * query).square().sum()).backward()
        return {f"d{name}": leaf.grad for name, leaf in leaves.items()}

    exact, eager = run("reference", torch.float64), run("reference", torch.float32)
    for name, gradient in run(backend, torch.float32).items():
        assert_within_budget(name, gradient, exact[name], eager[name])


INDICES = {"any": [4, 0, 0, 2, 5], "run": [1, 2, 3, 4], "none": [], "all": list(range(6))}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("layout", ["one_step_lengths", "one_step_mask", "jagged_one_step"])
def test_select(backend: str, layout: str, index: list[int], monkeypatch: pytest.MonkeyPatch):
    """As a memory of copies of those sequences, with gradients to the first one's keys."""
    inputs = make_inputs(layout, heads=2, poison=False)
    chosen = torch.tensor(index, dtype=torch.int64)

    def run(select: bool, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: leaf.to(dtype, copy=True) for name, leaf in inputs.leaves.items()}
        query, key, value, weight = (leaf.requires_grad_() for leaf in leaves.values())
        memory = AttentionMemory(key, value, weight, backend=backend, **inputs.keywords)
        monkeypatch.setattr(ops, "prepare", None)  # nothing is prepared again
        contexts = [memory.attend(query)]
        if select:
            some = memory.select(chosen)
            contexts += [some.attend(query[chosen]), some.attend(2 * query[chosen])]
            several = query[chosen].unsqueeze(1)
            scores = some.scores(several) if layout != "jagged_one_step" else contexts[0]
        else:
            contexts += [memory.attend(query)[chosen], memory.attend(2 * query)[chosen]]
            scores = contexts[0]
            if layout != "jagged_one_step":
                scores = memory.scores(query)[chosen].unsqueeze(2)
        monkeypatch.undo()
        parts = [context.square().sum() for context in contexts]
        parts.append(scores.masked_fill(scores == -torch.inf, 0).sin().sum())
        sum(parts).backward()
        results = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
        return {**results, "first": contexts[1].detach(), "second": contexts[2].detach()}

    exact = run(False, "reference", torch.float64)
    eager = run(False, "reference", torch.float32)
    for name, result in run(True, backend, torch.float32).items():
        assert_within_budget(name, result, exact[name], eager[name])


@pytest.mark.parametrize("index", [[1], [2, 0], []], ids=str)
def test_weights_are_as_wide_as_the_longest_chosen_sequence(backend: str, index: list[int]):
    """And those of the whole memory as wide as the bound that was given."""
    key, weight, lengths = torch.randn(60, 8), torch.randn(8), (5, 50, 5)
    options = {"cu_seqlens_k": offsets_of(lengths), "backend": backend}
    chosen = torch.tensor(index, dtype=torch.int64)
    some = AttentionMemory(key, key, weight, **options).select(chosen)
    longest = max((lengths[i] for i in index), default=0)
    assert some.scores(torch.randn(len(index), 2, 8)).shape == (len(index), 2, longest)
    bound = AttentionMemory(key, key, weight, max_seqlen_k=70, **options)
    assert bound.scores(torch.randn(3, 2, 8)).shape == (3, 2, 70)


def test_consecutive_sequences_are_not_copied():
    key, offsets = torch.randn(9, 4), offsets_of((3, 4, 2))
    memory = AttentionMemory(key, key, torch.ones(4), cu_seqlens_k=offsets, backend="cpu")
    some = memory.select(torch.tensor([1, 2]))
    assert some._keys.key.data_ptr() == key[3:].data_ptr()
    padded = torch.randn(3, 5, 4)
    some = AttentionMemory(padded, padded, torch.ones(4), backend="cpu").select(torch.arange(1, 3))
    assert some._keys.key.data_ptr() == padded[1:].data_ptr()


def test_select_of_a_memory_without_gradients(backend: str):
    """A beam of sequences of its own, decoded with a choice of a choice."""
    key, query, weight = torch.randn(4, 6, 8), torch.randn(3, 8), torch.randn(8)
    key.requires_grad_()
    with torch.no_grad():
        memory = AttentionMemory(key, key, weight, backend=backend)
        memory = memory.select(torch.tensor([3, 1, 3, 0])).select(torch.tensor([2, 1, 1]))
    context = memory.attend(query)
    assert not context.requires_grad
    rows = key.detach()[[3, 1, 1]]
    expected = attn_ext.additive_attention(query, rows, rows, weight, backend=backend)
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("num_heads", [1, 2], ids=named("heads"))
def test_memory_of_a_module(num_heads: int):
    """Queries are projected for scores and beams too, and after a choice of sequences."""
    module = attn_ext.AdditiveAttention(5, 6, 8, num_heads=num_heads)
    key, query, index = torch.randn(4, 7, 6), torch.randn(3, 2, 5), torch.tensor([2, 0, 2])
    some = module.memory(key).select(index)
    expected = module(query, key[index], need_weights=True)
    torch.testing.assert_close(some.attend(query, need_weights=True), expected)
    torch.testing.assert_close(some.attend(query[:, 0]), module(query[:, 0], key[index]))
    torch.testing.assert_close(some.scores(query).softmax(-1), expected[1])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1], "index: expected a torch.Tensor"),
        (torch.tensor([0.0]), "index: expected dtype int32 or int64"),
        (torch.tensor([True, False]), "index: expected dtype int32 or int64"),
        (torch.tensor([[0]]), r"index: expected shape \(B',\)"),
        (torch.tensor([0, 2]), "index: expected numbers of sequences, from 0 to 1, got 2"),
        (torch.tensor([-1]), "index: expected numbers of sequences, from 0 to 1, got -1"),
    ],
    ids=["list", "float", "bool", "matrix", "large", "negative"],
)
def test_wrong_index(index: object, message: str):
    memory = AttentionMemory(torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4))
    with pytest.raises((TypeError, ValueError), match=message):
        memory.select(index)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(duplicate):
    memory = AttentionMemory(torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4))
    with pytest.raises(TypeError, match="can be neither copied nor pickled"):
        duplicate(memory)
