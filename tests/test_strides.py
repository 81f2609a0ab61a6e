"""Strides: of incoming gradients, of key and value apart, of everything."""

import pytest
import torch
from helpers import check, incoming_gradients
from layouts import INPUT_NAMES, LAYOUTS, make_inputs, with_strides
from parameters import MAIN_LAYOUTS, dtype_id, named
from torch import Tensor

pytestmark = pytest.mark.every_isa


def expanded(gradient: Tensor) -> Tensor:
    """As ``sum()`` gives it: stride 0 everywhere."""
    return gradient.new_ones(()).expand(gradient.shape)


def sliced_of_wide(gradient: Tensor) -> Tensor:
    """As ``torch.cat`` gives it: a slice of wider rows, the rest NaN."""
    wide = gradient.new_full((*gradient.shape[:-1], gradient.size(-1) + 5), torch.nan)
    return wide[..., 3:-2].copy_(gradient)


INCOMING = {
    "expanded": expanded,
    "expanded_rows": lambda gradient: gradient[:1].expand(gradient.shape),
    "transposed": lambda gradient: with_strides(gradient, "transposed"),
    "reversed": lambda gradient: with_strides(gradient, "reversed"),
    "sliced": lambda gradient: with_strides(gradient, "sliced"),
    "cat": sliced_of_wide,
}


@pytest.mark.parametrize("kind", INCOMING)
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_strides_of_incoming_gradients(backend: str, layout: str, heads: int | None, kind: str):
    inputs = make_inputs(layout, heads=heads)
    incoming = incoming_gradients(inputs, need_weights=True)
    incoming = {name: INCOMING[kind](gradient) for name, gradient in incoming.items()}
    check(inputs, backend, incoming=incoming)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step"])
def test_incoming_gradients_at_places_of_nobody_are_ignored(backend: str, layout: str):
    inputs = make_inputs(layout)
    incoming = incoming_gradients(inputs, need_weights=True)
    owned = inputs.owned("query", inputs.query_rows)
    incoming["context"][~owned] = torch.nan
    if inputs.weights_are_jagged:
        incoming["weights"][~inputs.owned("key", inputs.key_rows)] = torch.nan
    check(inputs, backend, incoming=incoming)


@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_key_and_value_with_different_strides(backend: str, layout: str):
    inputs = make_inputs(layout, heads=2)
    key, value = inputs.leaves["key"], inputs.leaves["value"]
    inputs = inputs.with_leaves(
        key=with_strides(key, "sliced"), value=with_strides(value, "reversed")
    )
    check(inputs, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("heads", [None, 3], ids=named("heads"))
@pytest.mark.parametrize("strides", ["transposed", "reversed", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend: str, layout: str, strides: str, heads: int | None, dtype: torch.dtype):
    inputs = make_inputs(layout, heads=heads, strides=strides, dtype=dtype)
    check(inputs, backend)


@pytest.mark.parametrize("layout", ["one_step", "padded"])
def test_rows_of_8_features_at_odd_places(backend: str, layout: str):
    """As many features as are loaded at once, in rows that are 13 numbers apart."""
    inputs = make_inputs(layout, features=8, value_features=8)
    names = ("query", "key", "value")
    inputs = inputs.with_leaves(**{name: sliced_of_wide(inputs.leaves[name]) for name in names})
    given = incoming_gradients(inputs, need_weights=False)
    incoming = {name: sliced_of_wide(g) for name, g in given.items()}
    check(inputs, backend, incoming=incoming)


@pytest.mark.parametrize("name", INPUT_NAMES)
def test_expanded_input(backend: str, name: str):
    """Stride 0 over the batch (over heads, for the score weight)."""
    inputs = make_inputs("padded", heads=2, poison=False)
    leaf = inputs.leaves[name]
    inputs = inputs.with_leaves(**{name: leaf[:1].expand(leaf.shape)})
    check(inputs, backend)
