"""Nested tensors go in and come out as PyTorch's own operations have them, compiled or not."""

from collections.abc import Callable

import pytest
import torch
from helpers import require_backend
from layouts import INPUT_NAMES, Inputs, make_inputs
from torch import Tensor

import attn_ext


@pytest.fixture(params=["eager", "compiled"])
def attend(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    require_backend("cpu")
    if request.param == "eager":
        return attn_ext.additive_attention
    torch._dynamo.reset()
    return torch.compile(attn_ext.additive_attention, fullgraph=True, backend="aot_eager")


def nested_inputs() -> Inputs:
    return make_inputs("nested", lengths_q=(3, 2, 5), lengths_k=(4, 6, 2), value_features=16)


def test_the_context_has_the_offsets_of_the_query(attend: Callable[..., Tensor]):
    """So that it can be added to the query, say, for which PyTorch wants the same object."""
    inputs = nested_inputs()
    query, *others = inputs.arguments(inputs.leaves)
    context = attend(query, *others)
    assert context.layout == torch.jagged and context.offsets() is query.offsets()
    assert context._maybe_max_seqlen == 5  # known, so that nobody has to look
    joined = query + context
    assert torch.equal(joined.values(), query.values() + context.values())


def test_gradients_are_nested(attend: Callable[..., Tensor]):
    """Of nested leaves, and equal to those of their rows."""
    inputs = nested_inputs()
    arguments = [tensor.detach().requires_grad_() for tensor in inputs.arguments(inputs.leaves)]
    gradients = torch.autograd.grad(attend(*arguments).values().square().sum(), arguments)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves.items()}
    rows = attn_ext.additive_attention(*inputs.arguments(leaves)).values()
    expected = torch.autograd.grad(rows.square().sum(), [leaves[name] for name in INPUT_NAMES])
    for gradient, argument, of_rows in zip(gradients, arguments, expected, strict=True):
        assert gradient.is_nested == argument.is_nested
        if gradient.is_nested:
            assert gradient.offsets() is argument.offsets()
            gradient = gradient.values()
        torch.testing.assert_close(gradient, of_rows)
