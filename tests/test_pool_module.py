"""``attn_ext.AdditivePool``: projections, dropout, what padding holds, wrong calls."""

import pytest
import torch
from layouts import nest
from parameters import named

from attn_ext import AdditivePool, additive_pool


@pytest.mark.parametrize("branches", [1, 3], ids=named("branches"))
@pytest.mark.parametrize("gated", [False, True], ids=named("gated"))
def test_module(gated: bool, branches: int):
    """Its projections and the function; values default to keys as they are; nested keys too."""
    pool = AdditivePool(6, 4, branches=branches, gated=gated)
    key, value, offsets = torch.randn(7, 6), torch.randn(7, 5), torch.tensor([0, 3, 3, 7])
    hidden = pool.key_proj(key).tanh()
    if gated:
        hidden = hidden * pool.gate_proj(key).sigmoid()
    scores = hidden @ pool.score_weight.view(branches, 4).T  # [7, K]
    for values in (key, value):
        context, weights = pool(
            key, None if values is key else values, cu_seqlens_k=offsets, need_weights=True
        )
        bags = [s.softmax(0).T @ v for s, v in zip(scores.split([3, 4]), values.split([3, 4]))]
        expected = torch.stack([bags[0], torch.zeros_like(bags[0]), bags[1]])
        torch.testing.assert_close(context, expected if branches > 1 else expected.squeeze(1))
        assert weights.shape == ((7, 3) if branches > 1 else (7,))
    torch.testing.assert_close(pool(nest(key, offsets)), pool(key, cu_seqlens_k=offsets))
    context.sum().backward()
    assert all(p.grad.isfinite().all() for p in pool.parameters())
    names = {"key_proj.weight", "key_proj.bias", "score_weight"}
    names |= {"gate_proj.weight", "gate_proj.bias"} if gated else set()
    assert {name for name, _ in pool.named_parameters()} == names
    assert AdditivePool(6, 4, bias=False).gate_proj.bias is None
    twin = AdditivePool(6, 4, branches=branches, gated=gated)
    twin.load_state_dict(pool.state_dict())
    torch.testing.assert_close(twin(key.unsqueeze(0)), pool(key.unsqueeze(0)))


@pytest.mark.parametrize("layout", ["lengths", "jagged"])
def test_what_padding_holds_reaches_no_parameter(layout: str):
    pool, key = AdditivePool(3, 4), torch.randn(2, 5, 3)
    options = {"key_lengths": torch.tensor([5, 3])}
    if layout == "jagged":
        key, options = key.flatten(0, 1), {"cu_seqlens_k": torch.tensor([0, 5, 8])}
    ignored = torch.zeros(key.shape[:-1], dtype=torch.bool)
    ignored[(1, slice(3, None)) if layout == "lengths" else slice(8, None)] = True
    results = []
    for filler in (torch.nan, 0.0):
        pool.zero_grad()
        filled = key.masked_fill(ignored.unsqueeze(-1), filler).requires_grad_()
        context = pool(filled, **options)
        context.square().sum().backward()
        results.append([context.detach(), filled.grad, *(p.grad for p in pool.parameters())])
    for poisoned, clean in zip(*results):
        assert torch.equal(poisoned, clean)


def test_module_drops_in_training_only():
    pool, key = AdditivePool(6, 4, dropout=0.5, feature_dropout=(0.2, 0.3)), torch.randn(1, 9, 6)
    _, weights = pool(key, need_weights=True)
    assert (weights == 0).any()
    torch.manual_seed(2)
    found = pool(key)
    torch.manual_seed(2)
    gate = pool.gate_proj(key)
    options = {"gate": gate, "dropout_p": 0.5, "feature_dropout_p": (0.2, 0.3)}
    expected = additive_pool(pool.key_proj(key), key, pool.score_weight, **options)
    torch.testing.assert_close(found, expected)
    assert torch.equal(pool.eval()(key), pool(key))
    assert "branches=1, dropout=0.5, feature_dropout=(0.2, 0.3)" in repr(pool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": 0}, "branches: expected at least 1"),
        ({"attn_dim": 2.5}, "attn_dim: expected an int"),
        ({"gated": None}, "gated: expected a bool"),
        ({"dropout": 2.0}, "dropout: expected a probability"),
        ({"feature_dropout": (0.1, 0.1), "gated": False}, "feature_dropout: expected one prob"),
    ],
)
def test_wrong_modules(arguments: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        AdditivePool(**{"key_dim": 3, "attn_dim": 2, **arguments})


def test_wrong_calls_of_the_module():
    pool = AdditivePool(6, 4)
    with pytest.raises(ValueError, match="key: expected 6 features in its last axis"):
        pool(torch.randn(1, 2, 5))
    with pytest.raises(TypeError, match="key: expected a torch.Tensor"):
        pool(None)
