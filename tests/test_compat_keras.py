"""``attn_ext.compat.KerasAdditiveAttention`` beside Keras' own layer, where Keras is installed."""

import os
from collections.abc import Callable

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
        ([[True]], TypeError, "a torch.Tensor, got list"),
        (torch.ones(B, 2), ValueError, rf"shape \({B}, .*got \({B}, 2\)"),
        (torch.ones(shape[1]), ValueError, rf"shape \({B}, .*got \({shape[1]},\)"),
        (torch.ones(B, 1, shape[1]), ValueError, rf"shape \({B}, .*got \({B}, 1, "),
    ):
        mask = [None, None]
        mask[place] = wrong
        with pytest.raises(kind, match=f"^mask: expected {expected}"):
            layer(tensors, mask=mask)
    for wrong, got in (([None], "1 masks"), (torch.ones(shape), "a tensor")):
        with pytest.raises(ValueError, match=f"^mask: expected .*got {got}"):
            layer(tensors, mask=wrong)


def keras_layer(dtype: str = "float64") -> tuple[object, compat.KerasAdditiveAttention]:
    """Keras's layer, with which the calls below are compared, and ours of it."""
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras does not run on PyTorch here")
    layer = keras.layers.AdditiveAttention(dtype=dtype)
    layer.build([(B, TQ, D), (B, TK, D)])
    return layer, compat.KerasAdditiveAttention.from_keras(layer)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


QUERY_MASK = torch.arange(TQ) < torch.tensor([5, 1, 2])[:, None]
CALLS: dict[str, Callable[[], dict]] = {
    "training": lambda: {"training": True},
    "not_training": lambda: {"training": False},
    "causal": lambda: {"use_causal_mask": True},
    "causal_masked": lambda: {"use_causal_mask": True, "mask": [QUERY_MASK, ~IGNORED]},
    "causal_more_keys": lambda: (
        {"inputs": [randn(B, TK, D), randn(B, TQ, D)]} | {"use_causal_mask": True}
    ),
    "int_masks": lambda: {"mask": [QUERY_MASK.int(), (~IGNORED).long()]},
    "float_masks": lambda: {"mask": [QUERY_MASK.float(), (~IGNORED).double() * 0.5]},
    "masks_and_one_of_keys": lambda: {"mask": [QUERY_MASK, ~IGNORED, IGNORED]},
    "numpy_masks": lambda: {"mask": [QUERY_MASK.numpy(), (~IGNORED).numpy()]},
    "numpy_inputs": lambda: {"inputs": [randn(B, TQ, D).numpy(), randn(B, TK, D).numpy()]},
    "two_axes": lambda: {"inputs": [randn(TQ, D), randn(TK, D)]},
    "four_axes": lambda: {"inputs": [randn(2, B, TQ, D), randn(2, B, TK, D), randn(2, B, TK, D)]},
    "four_axes_causal": lambda: (
        {"inputs": [randn(2, B, TQ, D), randn(2, B, TK, D)]}
        | {"use_causal_mask": True, "mask": [None, torch.rand(2, B, TK) < 0.7]}
    ),
    "four_axes_query_mask": lambda: (
        {"inputs": [randn(2, B, TQ, D), randn(2, B, TK, D)]}
        | {"mask": [torch.rand(2, B, TQ) < 0.7, None]}
    ),
    "one_query_batch": lambda: {"inputs": [randn(1, TQ, D), randn(B, TK, D), randn(B, TK, D)]},
    "one_value_batch": lambda: {"inputs": [randn(B, TQ, D), randn(1, TK, D), randn(B, TK, D)]},
}


@pytest.mark.parametrize("name", CALLS)
def test_keras_takes_the_same_calls(name: str):
    keras, ours = keras_layer()
    keywords = {"inputs": [randn(B, TQ, D), randn(B, TK, 10), randn(B, TK, D)]} | CALLS[name]()
    if "causal" in name and "mask" in keywords and keywords["mask"][1] is not None:
        keywords["mask"][1][..., 0] = True  # without any key theirs is a mean over padding
    results = (layer(return_attention_scores=True, **keywords) for layer in (ours.train(), keras))
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        # Keras's matmul rounds its results to float32.
        torch.testing.assert_close(actual.float(), expected.as_subclass(Tensor).float())


def test_keras_masks_of_four_axes(backend: str):
    """Each axis before the last two is one of the batch: theirs aligns such a mask otherwise."""
    layer = compat.KerasAdditiveAttention(D, backend=backend)
    query, value, mask = torch.randn(2, B, TQ, D), torch.randn(2, B, TK, D), torch.rand(2, B, TK)
    mask = mask < 0.7
    context = layer([query, value], mask=[None, mask])
    for i in range(2):
        assert torch.equal(context[i], layer([query[i], value[i]], mask=[None, mask[i]]))


@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_keras_training_decides_on_dropout(training: bool | None, mode: bool, causal: bool):
    layer = compat.KerasAdditiveAttention(D, dropout=0.5).train(mode)
    inputs = [torch.randn(B, TQ, D), torch.randn(B, TK, D)]
    keywords = {"return_attention_scores": True, "use_causal_mask": causal}
    _, weights = layer(inputs, training=training, **keywords)
    _, whole = layer(inputs, training=False, **keywords)
    assert torch.equal(weights, whole) != (mode if training is None else training)


def test_keras_causal_gradients_and_nothing_to_see():
    """As those of the calls on the keys that each query sees; of no keys, 0."""
    layer = compat.KerasAdditiveAttention(D).double()
    query, value = randn(B, TQ, D).requires_grad_(), randn(B, TK, D).requires_grad_()
    seen = ~IGNORED.clone()
    seen[0, 0] = False
    context, weights = layer([query, value], [None, seen], None, True, True)
    assert (context[0, 0] == 0).all() and (weights[0, 0] == 0).all()
    alone = [
        layer([query[:, i : i + 1], value[:, : i + 1]], mask=[None, seen[:, : i + 1]])
        for i in range(TQ)
    ]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(context, expected)
    gradients = (
        torch.autograd.grad(result.sin().sum(), [query, value, layer.scale])
        for result in (context, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ([torch.zeros(B, TQ, D), [[1.0]]], "value"),
        ([torch.zeros(D), torch.zeros(B, TK, D)], "query"),
        ([torch.zeros(B, TQ, D), torch.zeros(B + 1, TK, D)], "inputs"),
        ([torch.zeros(B, TQ, D), torch.zeros(B, TK, D + 1)], "score_weight"),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_keras_inputs_are_checked(inputs: list, name: str, causal: bool):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        compat.KerasAdditiveAttention(D)(inputs, use_causal_mask=causal)


def test_from_keras_takes_its_class_only():
    keras = pytest.importorskip("keras")

    class Own(keras.layers.AdditiveAttention):
        pass

    for layer in (Own(), keras.layers.Attention(use_scale=True), torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="^layer: expected a keras.layers.AdditiveAttention"):
            compat.KerasAdditiveAttention.from_keras(layer)


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
