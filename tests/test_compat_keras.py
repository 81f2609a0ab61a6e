"""``attn_ext.compat.KerasAdditiveAttention`` beside Keras' own layer, where Keras is installed."""

import os

import pytest
import torch
from compat_peers import IGNORED, TK, TQ, B, D
from helpers import assert_within_budget
from torch import Tensor
from yardstick import Results

from attn_ext import additive_attention, compat
from attn_ext.compat import keras as keras_attention

os.environ.setdefault("KERAS_BACKEND", "torch")


@pytest.mark.parametrize("use_scale", [True, False], ids=["scale", "no_scale"])
@pytest.mark.parametrize("masks", ["none", "values", "both"])
def test_keras(backend: str, masks: str, use_scale: bool):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras does not run on PyTorch here")
    tensors = {"query": torch.randn(B, TQ, D), "key": torch.randn(B, TK, D)}
    tensors["value"] = torch.randn(B, TK, 10)
    if use_scale:
        tensors["scale"] = torch.randn(D) * D**-0.5
    query_mask = torch.arange(TQ) < torch.tensor([5, 0, 2])[:, None]
    value_mask = ~IGNORED.to(query_mask.device)
    mask = {"none": None, "values": [None, value_mask], "both": [query_mask, value_mask]}[masks]

    def run(ours: bool, dtype: torch.dtype) -> Results:
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        if ours:
            layer = compat.KerasAdditiveAttention(D, use_scale, backend=backend)
            parameters = {"scale": leaves["scale"]} if use_scale else {}
            arguments, keywords = ([query, value, key],), {"mask": mask}
            keywords["return_attention_scores"] = True
            call = torch.func.functional_call(layer, parameters, arguments, keywords)
        else:
            layer = keras.layers.AdditiveAttention(
                use_scale=use_scale, dtype=str(dtype).removeprefix("torch.")
            )
            layer.build([query.shape, value.shape, key.shape])
            if use_scale:
                layer.scale._value = leaves["scale"]  # so that gradients reach ours
            call = layer([query, value, key], mask=mask, return_attention_scores=True)
        loss = sum((result * result.detach().cos()).sum() for result in call)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results = {"context": call[0].detach(), "weights": call[1].detach()}
        return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}

    actual, exact = run(True, torch.float32), run(False, torch.float64)
    eager = run(False, torch.float32)
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


@pytest.mark.parametrize("place", [0, 1], ids=["query", "value"])
def test_keras_masks_are_checked(place: int):
    layer, shape = compat.KerasAdditiveAttention(D), (B, (TQ, TK)[place])
    tensors = [torch.randn(B, TQ, D), torch.randn(B, TK, D)]
    for wrong, kind, expected in (
        (torch.ones(shape, dtype=torch.int64), TypeError, "dtype bool, True = real, got torch.int"),
        ([[True]], TypeError, "a torch.Tensor, got list"),
        (torch.ones(B, 2, dtype=torch.bool), ValueError, rf"shape \({B}, .*got \({B}, 2\)"),
    ):
        mask = [None, None]
        mask[place] = wrong
        with pytest.raises(kind, match=f"^mask: expected {expected}"):
            layer(tensors, mask=mask)
    with pytest.raises(ValueError, match="^mask: expected .*got 1 masks"):
        layer(tensors, mask=[None])


def test_keras_asks_for_weights_only_if_told(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def attend(*tensors: Tensor, need_weights: bool, **keywords: object):
        asked.append(need_weights)
        return additive_attention(*tensors, need_weights=need_weights, **keywords)

    monkeypatch.setattr(keras_attention, "additive_attention", attend)
    layer, tensors = compat.KerasAdditiveAttention(D), [torch.randn(B, TQ, D)] * 2
    context, weights = layer(tensors, return_attention_scores=True)
    assert torch.equal(layer(tensors), context) and weights.shape == (B, TQ, TQ)
    assert asked == [True, False]


def test_from_keras():
    keras = pytest.importorskip("keras")
    layer = keras.layers.AdditiveAttention(dropout=0.25)
    with pytest.raises(ValueError, match="layer: expected a built layer"):
        compat.KerasAdditiveAttention.from_keras(layer)
    query, value = torch.randn(B, TQ, D), torch.randn(B, TK, D)
    eager = layer([query, value])
    exact = keras.layers.AdditiveAttention(dtype="float64")
    exact.build([query.shape, value.shape])
    exact.scale.assign(layer.scale.value.double())
    ours = compat.KerasAdditiveAttention.from_keras(layer).eval()
    assert ours.dropout == 0.25 and list(ours.state_dict()) == ["scale"]
    results = ours([query, value]), exact([query.double(), value.double()]), eager
    assert_within_budget("context", *(r.detach().as_subclass(Tensor) for r in results))
