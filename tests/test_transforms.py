"""torch.func: grad, vjp, vmap and jacobians on the op, the memory and the module; what is refused.

Every transform of ours is compared with the same transform of the reference, which is PyTorch's.
"""

import functools
import operator
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import call, require_backend
from layouts import INPUT_NAMES, LAYOUTS, Inputs, make_inputs
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import attn_ext
from attn_ext import ops

CALLS = 3
Loss = Callable[..., Tensor]


@pytest.fixture
def kernel_backend() -> str:
    """One with kernels that compute in float64."""
    return require_backend("cpu")


def loss_of(inputs: Inputs, backend: str, **keywords: object) -> Loss:
    """A scalar function of (query, key, value, score_weight) in a layout."""

    def loss(*tensors: Tensor) -> Tensor:
        leaves = dict(zip(INPUT_NAMES, tensors))
        context, weights = call(inputs, leaves, backend=backend, need_weights=True, **keywords)
        return context.square().sum() + weights.square().sum()

    return loss


def memory_loss(inputs: Inputs, backend: str) -> Loss:
    """Two steps over one memory."""

    def loss(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor) -> Tensor:
        memory = attn_ext.AttentionMemory(
            key, value, score_weight, backend=backend, **inputs.keywords
        )
        context, weights = memory.attend(query, need_weights=True)
        return (
            context.square().sum() + (weights * memory.attend(-query, need_weights=True)[1]).sum()
        )

    return loss


def assert_same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def double_inputs(layout: str, heads: int | None = None) -> Inputs:
    return make_inputs(layout, heads=heads, dtype=torch.float64, poison=False)


def stacked(inputs: Inputs) -> list[Tensor]:
    """``CALLS`` different sets of the four tensors, stacked."""
    sets = [
        make_inputs(inputs.layout, dtype=torch.float64, poison=False, seed=seed)
        for seed in range(CALLS)
    ]
    return [torch.stack([each.leaves[name] for each in sets]) for name in INPUT_NAMES]


@pytest.mark.parametrize("heads", [None, 2], ids=lambda heads: f"heads={heads}")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "nested" not in name])
def test_grad(kernel_backend: str, layout: str, heads: int | None):
    inputs = double_inputs(layout, heads)
    gradients = functools.partial(grad, argnums=(0, 1, 2, 3))
    actual = gradients(loss_of(inputs, kernel_backend))(*inputs.leaves.values())
    assert_same(actual, gradients(loss_of(inputs, "reference"))(*inputs.leaves.values()))


def test_grad_beside_backward(kernel_backend: str):
    """The gradient within a function that is itself differentiated, where it is a constant."""
    inputs = double_inputs("padded")
    query, *others = inputs.leaves.values()

    def outer(backend: str) -> Tensor:
        loss = loss_of(inputs, backend)
        return grad(lambda x: loss(x, *others) + (x * grad(loss)(query, *others)).sum())(query)

    assert_same(outer(kernel_backend), outer("reference"))


MAPPED = {
    "all": (0, 0, 0, 0),
    "query": (0, None, None, None),
    "all_but_score_weight": (0, 0, 0, None),
    "score_weight": (None, None, None, 0),
}


@pytest.mark.parametrize("keeps_scores", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("layout", ["padded_lengths", "jagged", "jagged_one_step"])
def test_vmap(
    kernel_backend: str,
    layout: str,
    mapped: str,
    keeps_scores: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(ops, "keeps_scores", lambda *_: keeps_scores)
    inputs = double_inputs(layout)
    if layout == "jagged":
        inputs = inputs.with_keywords(max_seqlen_q=5, max_seqlen_k=13)
    in_dims = MAPPED[mapped]
    tensors = [tensor if dim == 0 else tensor[0] for tensor, dim in zip(stacked(inputs), in_dims)]

    def run(backend: str):
        each = torch.func.grad_and_value(loss_of(inputs, backend), argnums=(0, 1, 2, 3))
        return vmap(each, in_dims)(*tensors)

    assert_same(run(kernel_backend), run("reference"))


def test_gradient_of_vmap(kernel_backend: str):
    inputs = double_inputs("one_step_mask")
    tensors = stacked(inputs)

    def run(backend: str):
        mapped = vmap(loss_of(inputs, backend))
        return grad(lambda *tensors: mapped(*tensors).sum(), argnums=(0, 1, 2, 3))(*tensors)

    assert_same(run(kernel_backend), run("reference"))


def test_nested_and_empty_vmaps(kernel_backend: str):
    """Maps within maps, over axes other than the first, and over nothing."""
    queries, score_weight = torch.randn(CALLS, 2, 3, 4, 8).double(), torch.randn(8).double()
    query, key = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 5, 8, 4).double()

    def run(backend: str):
        def attend(query: Tensor, key: Tensor) -> Tensor:
            return attn_ext.additive_attention(query, key, key, score_weight, backend=backend)

        return (
            vmap(vmap(attend))(queries, -queries),
            vmap(attend, in_dims=(2, 3), out_dims=1)(query, key),
            vmap(grad(lambda q: attend(q, q).sum()))(queries[:0, 0]),
        )

    assert_same(run(kernel_backend), run("reference"))


def test_vmap_over_what_ends_sequences(kernel_backend: str):
    """Lengths, masks and offsets may differ between the calls, too."""
    query, key, value, score_weight = double_inputs("padded").leaves.values()
    lengths = torch.randint(0, key.size(1) + 1, (CALLS, key.size(0)))
    ignored = torch.rand(CALLS, *key.shape[:2]) < 0.5
    cuts = torch.tensor([[0, 2, 5, 12], [0, 1, 1, 13], [0, 4, 8, 12]])

    def run(backend: str):
        def by(name: str, index: Tensor, tensors: tuple[Tensor, ...], **keywords: object):
            attend = functools.partial(attn_ext.additive_attention, *tensors, **keywords)
            return vmap(lambda i: attend(**{name: i}, need_weights=True, backend=backend))(index)

        padded, rows = (query, key, value, score_weight), (query[:3, 0], key[0], value[0])
        return (
            by("key_lengths", lengths, padded),
            by("key_padding_mask", ignored, padded),
            by("cu_seqlens_k", cuts, (*rows, score_weight), max_seqlen_k=12),
        )

    assert_same(run(kernel_backend), run("reference"))


@pytest.mark.parametrize("name", ["key_lengths", "key_padding_mask", "cu_seqlens_k", "dropout_p"])
def test_vmap_over_no_calls_that_are_made_one_by_one(kernel_backend: str, name: str):
    query, key, value, score_weight = double_inputs("padded").leaves.values()
    index = {
        "key_lengths": torch.zeros(0, key.size(0), dtype=torch.int64),
        "key_padding_mask": torch.zeros(0, *key.shape[:2], dtype=torch.bool),
        "cu_seqlens_k": torch.zeros(0, 4, dtype=torch.int64),
    }
    options = {"need_weights": True}
    if name == "cu_seqlens_k":
        query, key, value = query[:3, 0], key[0], value[0]
        options["max_seqlen_k"] = len(key) - 1  # a bound that the reference can do without offsets

    def run(backend: str):
        def loss(query: Tensor, *index: Tensor) -> Tensor:
            keywords = options | dict(zip([name], index))
            if name == "dropout_p" and backend != "reference":  # torch cannot index an empty map
                keywords["dropout_p"] = 0.5
            context, weights = attn_ext.additive_attention(
                query, key, value, score_weight, backend=backend, **keywords
            )
            return context.sum() + weights.square().sum()

        each = torch.func.grad_and_value(loss)
        queries = query.new_zeros(0, *query.shape)
        mapped = (queries, index[name]) if name in index else (queries,)
        return vmap(each, randomness="different")(*mapped)

    assert_same(run(kernel_backend), run("reference"))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(kernel_backend: str, randomness: str):
    inputs = double_inputs("padded")

    def run(backend: str):
        torch.manual_seed(5)
        mapped = vmap(loss_of(inputs, backend, dropout_p=0.5), randomness=randomness)
        return mapped(*(tensor[:1].expand_as(tensor) for tensor in stacked(inputs)))

    losses = run(kernel_backend)
    assert (losses[0] == losses[1]) == (randomness == "same")
    assert_same(losses, run("reference"))


def test_jacobian(kernel_backend: str):
    """jacrev maps the backward op over the rows of the identity."""
    inputs = double_inputs("one_step")

    def run(backend: str):
        def context(*tensors: Tensor) -> Tensor:
            return call(inputs, dict(zip(INPUT_NAMES, tensors)), backend=backend)[0]

        return jacrev(context, argnums=(0, 1, 2, 3))(*inputs.leaves.values())

    assert_same(run(kernel_backend), run("reference"))


@pytest.mark.parametrize("memory", [False, True], ids=["op", "memory"])
def test_batch_of_incoming_gradients(kernel_backend: str, memory: bool):
    inputs = double_inputs("one_step_lengths", heads=2)
    make_loss = memory_loss if memory else loss_of

    def run(backend: str):
        leaves = [leaf.clone().requires_grad_() for leaf in inputs.leaves.values()]
        loss = make_loss(inputs, backend)(*leaves)
        return torch.autograd.grad(
            loss, leaves, torch.tensor([1.0, -2.0, 0.5]).double(), is_grads_batched=True
        )

    assert_same(run(kernel_backend), run("reference"))


@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_memory(kernel_backend: str, layout: str):
    inputs = double_inputs(layout)

    def run(backend: str):
        gradients = grad(memory_loss(inputs, backend), argnums=(0, 1, 2, 3))
        return gradients(*inputs.leaves.values()), vmap(gradients)(*stacked(inputs))

    assert_same(run(kernel_backend), run("reference"))


def test_gradients_per_sample_of_a_module(kernel_backend: str):
    module = attn_ext.AdditiveAttention(5, 6, 8, num_heads=2, bias=True, normalize=True).double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    query, key = torch.randn(CALLS, 4, 5).double(), torch.randn(CALLS, 7, 6).double()

    def run(backend: str):
        def loss(parameters: dict[str, Tensor], query: Tensor, key: Tensor) -> Tensor:
            arguments = query.unsqueeze(0), key.unsqueeze(0)
            context = functional_call(module, parameters, arguments, {"backend": backend})
            return context.square().sum()

        return vmap(grad(loss), (None, 0, 0))(parameters, query, key)

    assert_same(run(kernel_backend), run("reference"))


PRIVATE_NAMES = """
    _functorch.utils.enable_single_level_autograd_function
    _C._AutoDispatchBelowAutograd _C._any_requires_grad _C._are_functorch_transforms_active
    _C._current_graph_task_id _C._will_engine_execute_node _C._is_any_autocast_enabled
    _C._dispatch_has_kernel_for_dispatch_key _C._functorch.is_functorch_wrapped_tensor
    _C._ForceDispatchKeyGuard _C._after_autograd_keyset
    autograd.Variable._execution_engine.queue_callback
    _C._dispatch_tls_local_include_set _C._dispatch_tls_local_exclude_set
    _ops.OpOverload _foreach_lerp_ _dynamo.config.allow_rnn
    autograd.forward_ad._current_level autograd.forward_ad._set_fwd_grad_enabled
    _C._autograd._top_saved_tensors_default_hooks
    _C._len_torch_dispatch_stack _ops._len_torch_dispatch_stack_pre_dispatch
"""


@pytest.mark.parametrize("name", PRIVATE_NAMES.split())
def test_private_names_of_torch_are_there(name: str):
    """What the package uses without a promise: a torch that renames it fails here, by that name."""
    owner, _, leaf = name.rpartition(".")
    assert hasattr(operator.attrgetter(owner)(torch) if owner else torch, leaf)


def test_private_names_are_all_listed():
    sources = "".join(path.read_text() for path in Path(attn_ext.__file__).parent.rglob("*.py"))
    used = set(re.findall(r"\btorch\.((?:\w+\.)*?_\w[\w.]*)", sources))
    listed = PRIVATE_NAMES.split()
    assert not {name for name in used if not any(each.startswith(name) for each in listed)}


# ---- What is refused ----


def second_derivative(loss: Loss, inputs: Inputs) -> None:
    tensors = tuple(inputs.leaves.values())
    grad(lambda *tensors: grad(loss)(*tensors).sum())(*tensors)


def vjp_of_gradient(loss: Loss, inputs: Inputs) -> None:
    gradient, pull_back = vjp(grad(loss, argnums=3), *inputs.leaves.values())
    pull_back(gradient)


@pytest.mark.parametrize("transform", [second_derivative, vjp_of_gradient])
@pytest.mark.parametrize("make_loss", [loss_of, memory_loss], ids=["op", "memory"])
def test_second_derivative_is_refused(kernel_backend: str, make_loss: Callable, transform):
    inputs = double_inputs("one_step")
    with pytest.raises(RuntimeError, match="use backend='reference' where you need a second"):
        transform(make_loss(inputs, kernel_backend), inputs)
    transform(make_loss(inputs, "reference"), inputs)


def forward_over_reverse(loss: Loss, inputs: Inputs) -> None:
    tensors = tuple(inputs.leaves.values())
    jvp(grad(loss), tensors, tensors)


def forward_mode(loss: Loss, inputs: Inputs) -> None:
    tensors = tuple(inputs.leaves.values())
    jvp(loss, tensors, tensors)


def dual_tensors(loss: Loss, inputs: Inputs) -> None:
    query, *others = inputs.leaves.values()
    with torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(query, query), *others)


@pytest.mark.parametrize("transform", [forward_mode, forward_over_reverse, dual_tensors])
@pytest.mark.parametrize("make_loss", [loss_of, memory_loss], ids=["op", "memory"])
def test_forward_mode_is_refused(kernel_backend: str, make_loss: Callable, transform: Callable):
    inputs = double_inputs("one_step")
    with pytest.raises(RuntimeError, match="use torch.func.vjp or grad instead, or backend='ref"):
        transform(make_loss(inputs, kernel_backend), inputs)
    transform(make_loss(inputs, "reference"), inputs)


def test_tangents_of_incoming_gradients_are_refused(kernel_backend: str):
    inputs = double_inputs("padded")
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves.items()}
    context, _ = call(inputs, leaves, backend=kernel_backend)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        incoming = torch.autograd.forward_ad.make_dual(torch.ones_like(context), context.detach())
        torch.autograd.grad(context, list(leaves.values()), incoming)


def test_dual_level_without_tangents(kernel_backend: str):
    inputs = double_inputs("padded")
    expected, _ = call(inputs, inputs.leaves, backend=kernel_backend)
    with torch.autograd.forward_ad.dual_level():
        actual, _ = call(inputs, inputs.leaves, backend=kernel_backend)
    assert torch.equal(actual, expected)


def test_vmap_over_the_axis_before_the_heads(kernel_backend: str):
    """Where the calls go themselves when they become more heads."""
    inputs = double_inputs("padded_lengths", heads=2)
    *rows, score_weight = inputs.leaves.values()
    rows = [torch.stack([tensor, -tensor, tensor / 2], 2) for tensor in rows]

    def run(backend: str):
        return vmap(loss_of(inputs, backend), (2, 2, 2, None))(*rows, score_weight)

    assert_same(run(kernel_backend), run("reference"))
