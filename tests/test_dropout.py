"""Dropout of attention weights: what is dropped, how often, and what it does to results."""

import pytest
import torch
from helpers import call, check, incoming_gradients
from layouts import INPUT_NAMES, LAYOUTS, make_inputs
from parameters import DTYPES, MAIN_LAYOUTS, dtype_id, named
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from yardstick import differentiate

import attn_ext

pytestmark = pytest.mark.every_isa


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.3, 0.9], ids=named("p"))
@pytest.mark.parametrize("heads", [None, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_dropout(
    backend: str,
    layout: str,
    heads: int | None,
    dropout_p: float,
    dtype: torch.dtype,
):
    """Results and gradients for the mask that the seed stands for, on every backend the same."""
    inputs = make_inputs(layout, heads=heads, dtype=dtype)
    check(inputs, backend, dropout_p=dropout_p, seed=7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_in_every_layout(backend: str, layout: str):
    check(make_inputs(layout, heads=2), backend, dropout_p=0.4, seed=3)


@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_dropout_of_everything(backend: str, layout: str):
    inputs = make_inputs(layout)
    incoming = incoming_gradients(inputs, need_weights=True)
    results = differentiate(
        lambda leaves: call(inputs, leaves, backend=backend, need_weights=True, dropout_p=1.0),
        inputs.leaves,
        incoming,
    )
    for name, result in results.items():
        assert (result == 0).all(), name


def test_the_reference_decides_as_kernels_do(monkeypatch):
    """By the least 24-bit number that is kept; float32(0.7) 2^24 is 11744051, 0.7 2^24 more."""
    words = torch.tensor([11744051, 11744052]) << 8
    monkeypatch.setattr(attn_ext.reference, "_philox", lambda *_: [words.view(1, 1, 1, 2)])
    keep = attn_ext.reference.dropout_keep_mask(torch.zeros(1), 0.7, torch.Size((1, 1, 1, 2)))
    assert keep.flatten().tolist() == [False, True]


def dropped_share(backend: str, dropout_p: float, seed: int) -> tuple[Tensor, Tensor]:
    """Context and weights of 40,000 equal weights."""
    torch.manual_seed(seed)
    zeros = torch.zeros(4, 100, 1)
    return attn_ext.additive_attention(
        zeros,
        zeros,
        zeros + 1,
        torch.zeros(1),
        dropout_p=dropout_p,
        need_weights=True,
        backend=backend,
    )


@pytest.mark.large
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.8], ids=named("p"))
def test_dropout_statistics(backend: str, dropout_p: float):
    context, weights = dropped_share(backend, dropout_p, seed=0)
    share = (weights == 0).double().mean().item()
    deviation = (dropout_p * (1 - dropout_p) / weights.numel()) ** 0.5
    assert abs(share - dropout_p) < 5 * deviation
    kept = weights[weights != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 0.01 / (1 - dropout_p)))
    # The expectation is that of no dropout: every context is 1 on average.
    assert abs(context.double().mean().item() - 1) < 5 * deviation / (1 - dropout_p)


@pytest.mark.large
@pytest.mark.parametrize("axis", range(3))
def test_dropout_is_independent_along_every_axis(backend: str, axis: int):
    """Neighbours along an axis are dropped together as often as chance has it."""
    _, weights = dropped_share(backend, 0.5, seed=1)
    dropped = (weights == 0).double()
    size = dropped.size(axis)
    pairs = dropped.narrow(axis, 0, size - 1) * dropped.narrow(axis, 1, size - 1)
    assert abs(pairs.mean().item() - 0.25) < 5 * (0.25 * 0.75 / pairs.numel()) ** 0.5


def test_dropout_zero_draws_no_random_numbers(backend: str):
    inputs = make_inputs("padded")
    state = torch.get_rng_state()
    call(inputs, inputs.leaves, backend=backend, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_does_not_depend_on_the_layout_or_padding(backend: str):
    """A counter is a position in the sequence: the same weights drop, padded and jagged."""
    padded = make_inputs("padded_lengths", lengths_q=(6,) * 3, lengths_k=(9, 4, 17))
    flat = {
        "query": padded.leaves["query"].flatten(0, 1),
        "key": torch.cat([padded.leaves["key"][row] for row in padded.key_rows]),
        "value": torch.cat([padded.leaves["value"][row] for row in padded.key_rows]),
    }
    jagged = make_inputs("jagged", lengths_q=(6,) * 3, lengths_k=(9, 4, 17), tail_rows=0)
    jagged = jagged.with_leaves(**flat)
    masks = []
    for inputs in (padded, jagged):
        torch.manual_seed(11)
        _, weights = call(inputs, inputs.leaves, backend=backend, need_weights=True, dropout_p=0.5)
        masks.append(weights == 0)
    assert torch.equal(*masks)


@pytest.mark.large
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
def test_dropout_does_not_depend_on_tile_sizes(backend: str, heads: int | None):
    """The mask is that of a seed and a position, in sequences of many tiles too."""
    for features in (4, 130):  # tiles depend on it
        inputs = make_inputs(
            "jagged", heads=heads, lengths_q=(70, 0, 3), lengths_k=(90, 2, 40), features=features
        )
        check(inputs, backend, dropout_p=0.5, seed=17)


@pytest.mark.large
def test_dropout_differs_between_calls_and_repeats_under_a_seed(backend: str):
    inputs = make_inputs("padded", lengths_q=(100,) * 4, lengths_k=(100,) * 4)

    def dropped() -> Tensor:
        keywords = {"need_weights": True, "dropout_p": 0.5, "backend": backend}
        return call(inputs, inputs.leaves, **keywords)[1] == 0

    torch.manual_seed(5)
    first, next_call = dropped(), dropped()
    torch.manual_seed(5)
    again = dropped()
    torch.manual_seed(6)
    other_seed = dropped()
    assert torch.equal(first, again)
    for other in (next_call, other_seed):
        assert 0.4 < (first == other).double().mean() < 0.6


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_dropout_repeats_under_checkpoint(backend: str, layout: str, use_reentrant: bool):
    """Recomputed in backward, the call drops the same weights."""
    inputs = make_inputs(layout, heads=2)

    def checkpointed(inputs, leaves, **keywords):
        def run(*tensors):
            return call(inputs, dict(zip(INPUT_NAMES, tensors)), **keywords)

        return checkpoint(run, *leaves.values(), use_reentrant=use_reentrant)

    check(inputs, backend, dropout_p=0.5, seed=13, function=checkpointed)
