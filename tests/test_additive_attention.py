"""``attn_ext.additive_attention`` on every backend against the float64 yardstick."""

import random

import pytest
import torch
from helpers import assert_within_budget, call, check, compare, incoming_gradients, require_dtype
from layouts import INPUT_NAMES, LAYOUTS, MIXED_LAYOUTS, make_inputs
from parameters import DTYPES, MAIN_LAYOUTS, dtype_id, named
from yardstick import differentiate, yardsticks

import attn_ext
from attn_ext import backends, checks

pytestmark = pytest.mark.every_isa


@pytest.mark.parametrize("need_weights", [False, True], ids=["context", "weights"])
@pytest.mark.parametrize("heads", [None, 1, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, heads: int | None, need_weights: bool):
    inputs = make_inputs(layout, heads=heads)
    check(inputs, backend, need_weights=need_weights)


SEVERAL_TILES = {"lengths_q": (1, 0, 40, 2), "lengths_k": (2, 3, 0, 70)}


@pytest.mark.few(interpreted=2, others=4)
@pytest.mark.parametrize("need_weights", [False, True], ids=["context", "weights"])
@pytest.mark.parametrize("lengths", [{}, SEVERAL_TILES], ids=["small", "several_tiles"])
@pytest.mark.parametrize("layout", MIXED_LAYOUTS)
def test_mixed_layouts(backend: str, layout: str, lengths: dict, need_weights: bool):
    check(make_inputs(layout, heads=2, **lengths), backend, need_weights=need_weights)


@pytest.mark.parametrize("layout", MIXED_LAYOUTS)
@pytest.mark.few(interpreted=2, others=2)
def test_mixed_layouts_without_heads_or_bounds(
    backend: str, layout: str, monkeypatch: pytest.MonkeyPatch
):
    """As on a GPU, whose offsets the host does not read."""
    for module in (checks, attn_ext.layout):
        monkeypatch.setattr(module, "can_read_values", lambda tensor: False)
    check(make_inputs(layout), backend)
    check(make_inputs(layout), backend, need_weights=False)


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(backend: str, layout: str, heads: int | None):
    require_dtype(backend, torch.float64)
    inputs = make_inputs(
        layout,
        heads=heads,
        lengths_q=(2, 0, 3, 1),
        lengths_k=(3, 2, 0, 5),
        features=3,
        value_features=2,
        dtype=torch.float64,
        poison=False,
    )
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves.values()]

    def attend(*leaves):
        return call(inputs, dict(zip(INPUT_NAMES, leaves)), backend=backend, need_weights=True)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize(
    "features",
    [
        pytest.param((16, 8), id="D=16-Dv=8"),
        pytest.param((64, 64), id="D=64-Dv=64", marks=pytest.mark.large),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_dtypes(backend: str, layout: str, dtype: torch.dtype, features: tuple[int, int]):
    inputs = make_inputs(
        layout,
        heads=2,
        lengths_q=(9, 0, 17, 30),
        lengths_k=(12, 5, 0, 33),
        features=features[0],
        value_features=features[1],
        dtype=dtype,
    )
    check(inputs, backend)


MIXED_DTYPES = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float16),
    (torch.float16, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(
    ("query_dtype", "value_dtype", "score_weight_dtype"),
    MIXED_DTYPES,
    ids=["-".join(map(dtype_id, dtypes)) for dtypes in MIXED_DTYPES],
)
@pytest.mark.parametrize("layout", ["padded_lengths", "jagged_one_step"])
def test_mixed_dtypes(
    backend: str,
    layout: str,
    query_dtype: torch.dtype,
    value_dtype: torch.dtype,
    score_weight_dtype: torch.dtype,
):
    inputs = make_inputs(layout)
    dtypes = (query_dtype, query_dtype, value_dtype, score_weight_dtype)
    inputs = inputs.with_leaves(
        **{name: inputs.leaves[name].to(dtype) for name, dtype in zip(INPUT_NAMES, dtypes)}
    )
    check(inputs, backend)


FEATURES = [1, 7, 16, 17, 64, 100, pytest.param(1000, marks=pytest.mark.large)]


@pytest.mark.parametrize("value_features", FEATURES, ids=named("Dv"))
@pytest.mark.parametrize("layout", ["jagged", "one_step_mask"])
def test_value_features(backend: str, layout: str, value_features: int):
    check(make_inputs(layout, value_features=value_features), backend)


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("features", FEATURES, ids=named("D"))
@pytest.mark.parametrize("layout", ["jagged", "one_step_mask"])
def test_features(backend: str, layout: str, features: int, heads: int | None):
    check(make_inputs(layout, features=features, heads=heads), backend)


SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (7, 13), (16, 16), (17, 31), (33, 65), (127, 3), (2, 1009)]


@pytest.mark.parametrize(("tq", "tk"), SIZES, ids=[f"Tq={tq}-Tk={tk}" for tq, tk in SIZES])
@pytest.mark.parametrize("layout", ["padded", "jagged"])
def test_sizes(backend: str, layout: str, tq: int, tk: int):
    inputs = make_inputs(
        layout, lengths_q=(tq, 1), lengths_k=(tk, tk), features=19, value_features=5
    )
    check(inputs, backend)


@pytest.mark.parametrize("tk", [1, 2, 15, 16, 17, 257, 1009], ids=named("Tk"))
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_one_step_sizes(backend: str, layout: str, tk: int):
    inputs = make_inputs(layout, lengths_k=(tk, 0, tk, 1), features=33)
    check(inputs, backend)


@pytest.mark.parametrize("batch", [1, 2, 131], ids=named("B"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_sizes(backend: str, layout: str, batch: int):
    generator = random.Random(batch)
    lengths_q, lengths_k = ([generator.randrange(9) for _ in range(batch)] for _ in range(2))
    inputs = make_inputs(layout, lengths_q=lengths_q, lengths_k=lengths_k)
    check(inputs, backend)


@pytest.mark.parametrize(
    ("features", "value_features", "heads"),
    [(0, 4, None), (4, 0, None), (0, 0, 2), (4, 4, 0)],
    ids=["D=0", "Dv=0", "D=Dv=0", "H=0"],
)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_empty_features(
    backend: str, layout: str, features: int, value_features: int, heads: int | None
):
    inputs = make_inputs(layout, features=features, value_features=value_features, heads=heads)
    check(inputs, backend)


@pytest.mark.large
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_sequences(backend: str, layout: str, heads: int | None):
    lengths = {"lengths_q": (1, 300, 2), "lengths_k": (2, 1, 400)}
    check(make_inputs(layout, heads=heads, **lengths), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_key_may_be_one_tensor(backend: str, layout: str):
    inputs = make_inputs(layout, features=8, value_features=8)
    inputs = inputs.with_leaves(value=inputs.leaves["key"])
    incoming = incoming_gradients(inputs, True)

    def attend(leaves):
        shared = {**leaves, "value": leaves["key"]}
        return call(inputs, shared, backend=backend, need_weights=True)

    wanted = ("query", "key", "score_weight")
    actual = differentiate(attend, inputs.leaves, incoming, wanted)
    exact, eager = yardsticks(inputs, incoming)
    for results in (exact, eager):
        results["dkey"] += results.pop("dvalue")
    compare(inputs, actual, exact, eager)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_through_weights_alone(backend: str, layout: str):
    inputs = make_inputs(layout, heads=2)
    incoming = {"weights": incoming_gradients(inputs, need_weights=True)["weights"]}
    wanted = ("query", "key", "score_weight")
    check(inputs, backend, incoming=incoming, wanted=wanted)


def test_backward_accumulates_into_grad(backend: str):
    inputs = make_inputs("padded_lengths")
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    for _ in range(2):
        call(inputs, leaves, backend=backend)[0].sum().backward()
    incoming = {"context": torch.full_like(leaves["query"][..., :8], 2.0)}
    exact, eager = yardsticks(inputs, incoming)
    for name, leaf in leaves.items():
        assert_within_budget(f"d{name}", leaf.grad, exact[f"d{name}"], eager[f"d{name}"])


def test_second_backward_without_retain_graph_raises(backend: str):
    inputs = make_inputs("jagged")
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    loss = call(inputs, leaves, backend=backend)[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_retain_graph_repeats_the_gradients(backend: str):
    inputs = make_inputs("jagged", heads=2)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    context, weights = call(inputs, leaves, backend=backend, need_weights=True)
    loss = context.square().sum() + weights.square().sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    for name, one, other in zip(leaves, first, second):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", INPUT_NAMES)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_second_derivative_raises(kernel_backend: str, layout: str, name: str):
    inputs = make_inputs(layout)
    leaves = {n: leaf.clone().requires_grad_() for n, leaf in inputs.leaves.items()}
    context, _ = call(inputs, leaves, backend=kernel_backend)
    (gradient,) = torch.autograd.grad(context.square().sum(), leaves[name], create_graph=True)
    with pytest.raises(RuntimeError, match="not itself differentiable.*backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", INPUT_NAMES)
def test_input_modified_before_backward_raises(kernel_backend: str, name: str):
    inputs = make_inputs("padded", poison=False)
    leaves = {n: leaf.clone().requires_grad_() for n, leaf in inputs.leaves.items()}
    changing = leaves[name] * 1.0
    context, _ = call(inputs, {**leaves, name: changing}, backend=kernel_backend)
    changing.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_autocast(backend: str, layout: str, dtype: torch.dtype):
    """Under autocast float32 inputs compute, and return, what their cast copies do."""
    inputs = make_inputs(layout, heads=2)
    incoming = incoming_gradients(inputs.to(dtype), need_weights=True)

    def under_autocast(leaves):
        with torch.autocast(torch.get_default_device().type, dtype):
            return call(inputs, leaves, backend=backend, need_weights=True)

    def cast_by_hand(leaves):
        cast = {n: t if n == "score_weight" else t.to(dtype) for n, t in leaves.items()}
        return call(inputs, cast, backend=backend, need_weights=True)

    expected = differentiate(cast_by_hand, inputs.leaves, incoming)
    actual = differentiate(under_autocast, inputs.leaves, incoming)
    assert actual["context"].dtype == actual["weights"].dtype == dtype
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name
        if name.startswith("d"):
            assert result.dtype == torch.float32


def test_autocast_joins_inputs_of_different_dtypes(backend: str):
    """A float32 query from a norm and a bfloat16 key from a Linear, as autocast leaves them."""
    inputs = make_inputs("padded", poison=False)
    leaves = {**inputs.leaves, "key": inputs.leaves["key"].bfloat16()}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        context, _ = call(inputs, leaves, backend=backend)
    expected, _ = call(inputs, inputs.to(torch.bfloat16).leaves, backend=backend)
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context, expected, rtol=2.0**-7, atol=2.0**-7)


def test_forward_mode_is_refused(kernel_backend: str):
    """A tangent that the kernels would lose is an error, and not a derivative of zero."""
    inputs = make_inputs("padded")

    def attend(query):
        return call(inputs, {**inputs.leaves, "query": query}, backend=kernel_backend)[0]

    query = inputs.leaves["query"]
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.jvp(attend, (query,), (torch.ones_like(query),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        attend(torch.autograd.forward_ad.make_dual(query, torch.ones_like(query)))


@pytest.mark.parametrize("layout", ["padded", "padded_lengths", "one_step_mask"])
def test_meta_tensors(layout: str):
    inputs = make_inputs(layout, heads=2, poison=False)
    leaves = {name: leaf.to("meta") for name, leaf in inputs.leaves.items()}
    meta = {
        n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in inputs.keywords.items()
    }
    context, weights = call(inputs.with_keywords(**meta), leaves, need_weights=True)
    real = call(inputs, inputs.leaves, need_weights=True)
    assert context.is_meta and (context.shape, weights.shape) == tuple(r.shape for r in real)


def test_autocast_leaves_float64_alone(backend: str):
    require_dtype(backend, torch.float64)
    inputs = make_inputs("jagged", dtype=torch.float64)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        context, _ = call(inputs, inputs.leaves, backend=backend)
    assert torch.equal(context, call(inputs, inputs.leaves, backend=backend)[0])


def test_default_backend_is_the_best_available(kernel_backend: str):
    """Not the interpreted or emulated one that may be tested, on tensors of the CPU."""
    best = "triton" if torch.get_default_device().type == "cuda" else "cpu"
    problem = backends.problem(best, torch.get_default_device())
    if problem is not None:
        pytest.skip(problem)
    inputs = make_inputs("jagged")
    default, _ = call(inputs, inputs.leaves)
    assert torch.equal(default, call(inputs, inputs.leaves, backend=best)[0])
