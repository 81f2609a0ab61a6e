"""``attn_ext.AdditivePool``."""

import pytest
import torch
from layouts import offsets_of

import attn_ext
from attn_ext import AdditivePool


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_is_its_formula(gated: bool, branches: int):
    pool = AdditivePool(6, 8, branches=branches, gated=gated)
    key, lengths = torch.randn(2, 5, 6), torch.tensor([5, 3])
    context, weights = pool(key, key_lengths=lengths, need_weights=True)
    hidden = pool.key_proj(key).tanh()
    if gated:
        hidden = hidden * pool.gate_proj(key).sigmoid()
    scores = (hidden @ pool.score_weight.view(branches, 8).T).transpose(1, 2)  # [B, K, Tk]
    absent = torch.arange(5) >= lengths[:, None]
    expected = scores.masked_fill(absent[:, None], -torch.inf).softmax(-1)
    pooled = expected @ key
    if branches == 1:
        expected, pooled = expected.squeeze(1), pooled.squeeze(1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(context, pooled)
    jagged = pool(key[~absent], torch.ones(8, 2), cu_seqlens_k=offsets_of((5, 3)))
    torch.testing.assert_close(jagged, torch.ones_like(jagged))


def test_state_is_what_its_options_say():
    names = set(AdditivePool(3, 4).state_dict())
    linears = {f"{part}_proj.{name}" for part in ("key", "gate") for name in ("weight", "bias")}
    assert names == {"score_weight", *linears}
    plain = AdditivePool(3, 4, gated=False, bias=False, branches=2).state_dict()
    assert {name: tuple(t.shape) for name, t in plain.items()} == {
        "key_proj.weight": (4, 3),
        "score_weight": (2, 4),
    }


@pytest.mark.parametrize("layout", ["lengths", "jagged"])
def test_what_padding_holds_reaches_no_parameter(layout: str):
    pool, key = AdditivePool(3, 4), torch.randn(2, 5, 3)
    options = {"key_lengths": torch.tensor([5, 3])}
    if layout == "jagged":
        key, options = key.flatten(0, 1), {"cu_seqlens_k": offsets_of((5, 3))}
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


def test_dropout_in_training_alone():
    pool = AdditivePool(3, 4, dropout=0.5, feature_dropout=(0.5, 0.5)).eval()
    key = torch.randn(1, 50, 3)
    still = pool(key)
    assert torch.equal(still, pool(key))
    pool.train()
    assert not torch.equal(pool(key), pool(key))
    torch.manual_seed(3)
    context = pool(key)
    torch.manual_seed(3)
    expected = attn_ext.additive_pool(
        pool.key_proj(key),
        key,
        pool.score_weight,
        gate=pool.gate_proj(key),
        feature_dropout_p=(0.5, 0.5),
        dropout_p=0.5,
    )
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_dim": 0}, "attn_dim: expected at least 1, got 0"),
        ({"branches": 0}, "branches: expected at least 1, got 0"),
        ({"gated": 1}, "gated: expected a bool"),
        ({"dropout": 2}, "dropout: expected a probability"),
        ({"feature_dropout": (0.1, 0.2), "gated": False}, "feature_dropout: expected one prob"),
    ],
)
def test_wrong_options(options: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        AdditivePool(**{"key_dim": 3, "attn_dim": 4, **options})


def test_wrong_key():
    with pytest.raises(ValueError, match="key: expected 3 features in its last axis"):
        AdditivePool(3, 4)(torch.randn(2, 5, 4))
