"""Fake tensors: shapes, strides and dtypes of the fake kernels are those of the real ones."""

import pytest
import torch
from helpers import call
from layouts import INPUT_NAMES, LAYOUTS, ONE_STEP_LAYOUTS, Inputs, make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import attn_ext
from attn_ext import AttentionMemory

STEP_LAYOUTS = [name for name in ONE_STEP_LAYOUTS if "nested" not in name]
OP_LAYOUTS = [name for name in LAYOUTS if "nested" not in name]


def metadata(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def results_and_gradients(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> list[Tensor]:
    context, weights = call(inputs, leaves, **keywords)
    results = [context] if weights is None else [context, weights]
    loss = sum(result.float().sum() for result in results)
    return [*results, *torch.autograd.grad(loss, list(leaves.values()))]


def with_bounds(inputs: Inputs) -> Inputs:
    """With the bounds of offsets, which the host would have to read otherwise."""
    names = [n.replace("cu_seqlens", "max_seqlen") for n in inputs.keywords if "cu_seqlens" in n]
    return inputs.with_keywords(**{name: getattr(inputs, name) for name in names})


def as_fake(mode: FakeTensorMode, inputs: Inputs) -> Inputs:
    fake = {
        name: mode.from_tensor(value) if isinstance(value, Tensor) else value
        for name, value in vars(inputs).items()
    }
    for group in ("leaves", "keywords"):
        fake[group] = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in getattr(inputs, group).items()
        }
    return Inputs(**fake)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["context", "weights"])
@pytest.mark.parametrize("heads", [None, 2], ids=lambda heads: f"heads={heads}")
@pytest.mark.parametrize("layout", OP_LAYOUTS)
def test_fake_tensors_are_like_the_real(
    kernel_backend: str, layout: str, heads: int | None, need_weights: bool, strides: str
):
    inputs = with_bounds(make_inputs(layout, heads=heads, strides=strides))
    keywords = {"backend": kernel_backend, "need_weights": need_weights}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    real = results_and_gradients(inputs, leaves, **keywords)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_inputs = as_fake(mode, inputs)
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in fake_inputs.leaves.items()}
        fake = results_and_gradients(fake_inputs, leaves, **keywords)
    names = ["context", *(["weights"] if need_weights else []), *(f"d{n}" for n in INPUT_NAMES)]
    for name, ours, theirs in zip(names, fake, real, strict=True):
        assert isinstance(ours, FakeTensor)
        assert metadata(ours) == metadata(theirs), name


@pytest.mark.parametrize("heads", [None, 2], ids=lambda heads: f"heads={heads}")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "nested" in name])
def test_fake_nested_tensors(kernel_backend: str, layout: str, heads: int | None):
    inputs = with_bounds(make_inputs(layout, heads=heads))
    real = inputs.arguments({name: leaf.detach() for name, leaf in inputs.leaves.items()})
    sizes = ShapeEnv()  # nested tensors have symbols for sizes
    with FakeTensorMode(allow_non_fake_inputs=False, shape_env=sizes, static_shapes=True) as mode:
        tensors = [mode.from_tensor(tensor).requires_grad_() for tensor in real]
        keywords = as_fake(mode, inputs).keywords
        context, weights = attn_ext.additive_attention(
            *tensors, **keywords, need_weights=True, backend=kernel_backend
        )
        loss = (context.values() if context.is_nested else context).sum() + weights.sum()
        gradients = torch.autograd.grad(loss, tensors)
    assert context.is_nested == (inputs.offsets_q is not None)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert gradient.is_nested == tensor.is_nested and gradient.shape == tensor.shape


def decode(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Results and gradients of two steps."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    query, *key_side = leaves.values()
    memory = AttentionMemory(*key_side, **inputs.keywords, backend=backend)
    (context, weights), (second, _) = (memory.attend(query, need_weights=True) for _ in range(2))
    gradients = torch.autograd.grad(context.sum() + weights.sum() + second.sum(), leaves.values())
    return {"context": context, "weights": weights} | dict(zip(INPUT_NAMES, gradients))


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_memory_of_fake_tensors(kernel_backend: str, layout: str, strides: str):
    inputs = with_bounds(make_inputs(layout, heads=2, strides=strides))
    real = decode(inputs, kernel_backend)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = decode(as_fake(mode, inputs), kernel_backend)
    for name, ours in fake.items():
        assert isinstance(ours, FakeTensor)
        assert metadata(ours) == metadata(real[name]), name
