"""``attn_ext.additive_attention`` on every backend against the float64 yardstick."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from helpers import (
    INPUT_NAMES,
    JAGGED_KEY_LAYOUTS,
    JAGGED_QUERY_LAYOUTS,
    LAYOUTS,
    LENGTHS_K,
    LENGTHS_Q,
    Inputs,
    assert_within_budget,
    call,
    check,
    compare,
    differentiate,
    incoming_gradients,
    make_inputs,
    offsets_of,
    require_dtype,
    with_strides,
    yardsticks,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext import backends

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# One layout for each way of stating lengths, and each shape of the returned weights.
MAIN_LAYOUTS = ("padded_mask", "one_step_lengths", "jagged", "jagged_one_step")


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named(name: str) -> Callable[[object], str]:
    return lambda value: f"{name}={value}"


# ---- Layouts, dtypes, shapes ----


@pytest.mark.parametrize("need_weights", [False, True], ids=["context", "weights"])
@pytest.mark.parametrize("heads", [None, 1, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, heads: int | None, need_weights: bool):
    inputs = make_inputs(layout, heads=heads)
    check(inputs, backend, need_weights=need_weights)


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


@pytest.mark.parametrize("features", [(16, 8), (64, 64)], ids=["D=16-Dv=8", "D=64-Dv=64"])
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


@pytest.mark.parametrize("value_features", [1, 7, 16, 17, 64, 100, 1000], ids=named("Dv"))
@pytest.mark.parametrize("layout", ["jagged", "one_step_mask"])
def test_value_features(backend: str, layout: str, value_features: int):
    check(make_inputs(layout, value_features=value_features), backend)


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("features", [1, 7, 16, 17, 64, 100, 1000], ids=named("D"))
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


# ---- Strides ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("heads", [None, 3], ids=named("heads"))
@pytest.mark.parametrize("strides", ["transposed", "reversed", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend: str, layout: str, strides: str, heads: int | None, dtype: torch.dtype):
    inputs = make_inputs(layout, heads=heads, strides=strides, dtype=dtype)
    check(inputs, backend)


@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_key_and_value_with_different_strides(backend: str, layout: str):
    inputs = make_inputs(layout, heads=2)
    key, value = inputs.leaves["key"], inputs.leaves["value"]
    inputs = inputs.with_leaves(
        key=with_strides(key, "sliced"), value=with_strides(value, "reversed")
    )
    check(inputs, backend)


@pytest.mark.parametrize("name", INPUT_NAMES)
def test_expanded_input(backend: str, name: str):
    """Stride 0 over the batch (over heads, for the score weight)."""
    inputs = make_inputs("padded", heads=2, poison=False)
    leaf = inputs.leaves[name]
    inputs = inputs.with_leaves(**{name: leaf[:1].expand(leaf.shape)})
    check(inputs, backend)


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_through_weights_alone(backend: str, layout: str):
    inputs = make_inputs(layout, heads=2)
    incoming = {"weights": incoming_gradients(inputs, need_weights=True)["weights"]}
    wanted = ("query", "key", "score_weight")
    check(inputs, backend, incoming=incoming, wanted=wanted)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step"])
def test_incoming_gradients_at_places_of_nobody_are_ignored(backend: str, layout: str):
    inputs = make_inputs(layout)
    incoming = incoming_gradients(inputs, need_weights=True)
    owned = inputs.owned("query", inputs.query_rows)
    incoming["context"][~owned] = torch.nan
    if inputs.weights_are_jagged:
        incoming["weights"][~inputs.owned("key", inputs.key_rows)] = torch.nan
    check(inputs, backend, incoming=incoming)


# ---- Masks and lengths ----

BATCH, KEYS = 4, 11
MASKS = {
    "nothing": torch.zeros(BATCH, KEYS, dtype=torch.bool),
    "everything": torch.ones(BATCH, KEYS, dtype=torch.bool),
    "first": torch.arange(KEYS).expand(BATCH, KEYS) == 0,
    "last": torch.arange(KEYS).expand(BATCH, KEYS) == KEYS - 1,
    "all_but_first": torch.arange(KEYS).expand(BATCH, KEYS) > 0,
    "all_but_last": torch.arange(KEYS).expand(BATCH, KEYS) < KEYS - 1,
    "every_second": torch.arange(BATCH * KEYS).view(BATCH, KEYS) % 2 == 0,
    "holes": torch.arange(BATCH * KEYS).view(BATCH, KEYS) % 5 < 2,
    "one_sequence": (torch.arange(BATCH) == 2)[:, None].expand(BATCH, KEYS),
}


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("layout", ["padded_mask", "one_step_mask"])
def test_masks(backend: str, layout: str, pattern: str):
    inputs = make_inputs(
        layout,
        lengths_q=(3,) * BATCH,
        lengths_k=(KEYS,) * BATCH,
        key_padding_mask=MASKS[pattern],
    )
    check(inputs, backend)


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_mask_strides(backend: str, strides: str):
    inputs = make_inputs("padded_mask")
    mask = inputs.keywords["key_padding_mask"]
    if strides == "sliced":
        mask = mask.repeat_interleave(2, 0).repeat_interleave(3, 1)[1::2, 2::3]
    else:
        mask = with_strides(mask, strides)
    assert not mask.is_contiguous()
    check(inputs.with_keywords(key_padding_mask=mask), backend)


def as_jagged(inputs: Inputs, leaves: dict[str, Tensor], nested: bool, backend: str):
    """The same call as a padded one with lengths, made with offsets or nested tensors."""
    valid = inputs.owned("key", inputs.key_rows)
    key, value = leaves["key"][valid], leaves["value"][valid]
    cu_k = offsets_of(inputs.keywords["key_lengths"].tolist()).to(key.device)
    step, query = inputs.is_one_step, leaves["query"]
    cu_q = offsets_of([inputs.max_seqlen_q] * len(inputs.query_rows)).to(key.device)
    keywords = {"need_weights": True, "backend": backend}
    if nested:
        nest = torch.nested.nested_tensor_from_jagged
        query = query if step else nest(query.flatten(0, 1), cu_q)
        key, value = nest(key, cu_k), nest(value, cu_k)
    else:
        keywords["cu_seqlens_k"] = cu_k
        if not step:
            query, keywords["cu_seqlens_q"] = query.flatten(0, 1), cu_q
    score_weight = leaves["score_weight"]
    context, weights = attn_ext.additive_attention(query, key, value, score_weight, **keywords)
    context = context.values() if context.is_nested else context
    if step:
        dense = weights.new_zeros(valid.shape + weights.shape[1:])
        dense[valid] = weights
        return context, dense.movedim(1, -1)
    return context.view(*leaves["query"].shape[:-1], -1), weights


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["padded_lengths", "one_step_lengths"])
def test_lengths_mask_offsets_and_nested_agree(backend: str, layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads, lengths_q=(5,) * 4, lengths_k=(7, 4, 0, 13))
    mask = ~inputs.owned("key", inputs.key_rows)
    masked = Inputs(**{**vars(inputs), "keywords": {"key_padding_mask": mask}})
    incoming = incoming_gradients(inputs, need_weights=True)
    exact, eager = yardsticks(inputs, incoming)
    keywords = {"need_weights": True, "backend": backend}
    for attend in (
        lambda leaves: call(inputs, leaves, **keywords),
        lambda leaves: call(masked, leaves, **keywords),
        lambda leaves: as_jagged(inputs, leaves, False, backend),
        lambda leaves: as_jagged(inputs, leaves, True, backend),
    ):
        compare(inputs, differentiate(attend, inputs.leaves, incoming), exact, eager)


# ---- Gradients of subsets ----

SUBSETS = [subset for n in range(5) for subset in itertools.combinations(INPUT_NAMES, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids=["+".join(names) or "none" for names in SUBSETS])
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_requires_grad_subsets(backend: str, layout: str, wanted: tuple[str, ...]):
    inputs = make_inputs(layout, heads=2)
    results = check(inputs, backend, wanted=wanted)
    assert set(results) == {"context", "weights", *(f"d{name}" for name in wanted)}


@pytest.mark.parametrize("wanted", SUBSETS, ids=["+".join(names) or "none" for names in SUBSETS])
def test_context_requires_grad_only_if_an_input_does(backend: str, wanted: tuple[str, ...]):
    inputs = make_inputs("jagged")
    leaves = {n: leaf.clone().requires_grad_(n in wanted) for n, leaf in inputs.leaves.items()}
    assert call(inputs, leaves, backend=backend)[0].requires_grad == bool(wanted)
    with torch.no_grad():
        assert not call(inputs, leaves, backend=backend)[0].requires_grad


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


# ---- Cases that broke others (section 9 of the contract) ----

HARD_LENGTHS = {
    "keys_without_queries": ((0, 3, 0), (5, 2, 7)),
    "queries_without_keys": ((4, 3, 5), (0, 2, 0)),
    "no_queries_at_all": ((0, 0), (5, 3)),
    "no_keys_at_all": ((5, 3), (0, 0)),
    "nothing_at_all": ((0, 0), (0, 0)),
    "ones_and_empty": ((1, 0, 1, 0), (1, 1, 0, 0)),
    "one_long": ((1, 300, 2), (2, 1, 400)),
}


@pytest.mark.parametrize("case", HARD_LENGTHS)
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_and_uneven_sequences(backend: str, layout: str, heads: int | None, case: str):
    lengths_q, lengths_k = HARD_LENGTHS[case]
    inputs = make_inputs(layout, heads=heads, lengths_q=lengths_q, lengths_k=lengths_k)
    check(inputs, backend)


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "nested" not in name])
def test_empty_batch(backend: str, layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads, lengths_q=(), lengths_k=())
    results = check(inputs, backend)
    assert (results["dscore_weight"] == 0).all()


@pytest.mark.parametrize("tk", [0, 3], ids=named("Tk"))
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
def test_empty_batch_of_padded_steps(backend: str, heads: int | None, tk: int):
    head_axis = () if heads is None else (heads,)
    query = torch.randn(0, *head_axis, 4, requires_grad=True)
    key = torch.randn(0, tk, *head_axis, 4, requires_grad=True)
    value = torch.randn(0, tk, *head_axis, 5)
    score_weight = torch.randn(*head_axis, 4, requires_grad=True)
    context, weights = attn_ext.additive_attention(
        query, key, value, score_weight, need_weights=True, backend=backend
    )
    assert context.shape == (0, *head_axis, 5) and weights.shape == (0, *head_axis, tk)
    (context.sum() + weights.sum()).backward()
    assert (score_weight.grad == 0).all()


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


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_dtypes(backend: str, layout: str, index_dtype: torch.dtype):
    check(make_inputs(layout, index_dtype=index_dtype), backend)


@pytest.mark.parametrize("key_dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_index_dtypes_of_queries_and_keys_may_differ(backend: str, key_dtype: torch.dtype):
    inputs = make_inputs("jagged")
    query_dtype = torch.int64 if key_dtype == torch.int32 else torch.int32
    inputs = inputs.with_keywords(
        cu_seqlens_q=inputs.keywords["cu_seqlens_q"].to(query_dtype),
        cu_seqlens_k=inputs.keywords["cu_seqlens_k"].to(key_dtype),
    )
    check(inputs, backend)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step", "padded_lengths"])
def test_strided_offsets_and_lengths(backend: str, layout: str):
    inputs = make_inputs(layout)
    strided = {
        name: torch.stack([index, -index], -1)[:, 0] for name, index in inputs.keywords.items()
    }
    check(inputs.with_keywords(**strided), backend)


@pytest.mark.parametrize("tail_rows", [0, 1, 50], ids=named("tail"))
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step", "nested_query"])
def test_rows_past_the_last_offset(backend: str, layout: str, heads: int | None, tail_rows: int):
    check(make_inputs(layout, heads=heads, tail_rows=tail_rows), backend)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "larger"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_seqlen(backend: str, layout: str, exact: bool):
    """A bound; returned dense weights of jagged sequences are as wide as it."""
    inputs = make_inputs(layout, heads=2)
    bounds = inputs.max_seqlen_q + (0 if exact else 3), inputs.max_seqlen_k + (0 if exact else 9)
    inputs = inputs.with_keywords(max_seqlen_q=bounds[0], max_seqlen_k=bounds[1])
    inputs = Inputs(
        **{
            **vars(inputs),
            "max_seqlen_q": bounds[0] if layout in JAGGED_QUERY_LAYOUTS else inputs.max_seqlen_q,
            "max_seqlen_k": bounds[1] if layout in JAGGED_KEY_LAYOUTS else inputs.max_seqlen_k,
        }
    )
    check(inputs, backend)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["padded_lengths", "padded_mask", "one_step_mask", "jagged"])
def test_what_ignored_keys_hold_never_matters(
    backend: str, layout: str, dtype: torch.dtype, poison: float
):
    inputs = make_inputs(layout, heads=2, dtype=dtype)
    ignored = ~inputs.owned("key", inputs.key_rows)
    for name in ("key", "value"):
        inputs.leaves[name][ignored] = poison
    check(inputs, backend)


@pytest.mark.parametrize("layout", ["padded_mask", "one_step_mask"])
def test_all_keys_masked(backend: str, layout: str):
    mask = torch.ones(3, 7, dtype=torch.bool)
    inputs = make_inputs(layout, lengths_q=(2,) * 3, lengths_k=(7,) * 3, key_padding_mask=mask)
    for name, result in check(inputs, backend).items():
        assert (result == 0).all(), name


@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_very_negative_scores(backend: str, layout: str):
    """Real scores near -10^4 beside ignored keys: a finite sentinel would let the latter win.

    Rounding of such scores is worth 1e-4 of a weight, so the comparison is over many sequences:
    among few, eager's errors may all happen to be small.
    """
    inputs = make_inputs(layout, features=8, lengths_q=LENGTHS_Q * 16, lengths_k=LENGTHS_K * 16)
    positive = {
        "query": inputs.leaves["query"].abs() + 1,
        "key": inputs.leaves["key"].abs() * 0.1,
        "score_weight": -1000 * torch.ones_like(inputs.leaves["score_weight"]),
    }
    check(inputs.with_leaves(**positive), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize(
    "scale", [1e-6, 1e-3, 1.0, 5.0, 10.0, 30.0, 100.0, 1e4], ids=named("scale")
)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_magnitudes(backend: str, layout: str, scale: float, dtype: torch.dtype):
    inputs = make_inputs(
        layout,
        heads=2,
        lengths_q=(9, 0, 16, 5),
        lengths_k=(17, 3, 0, 31),
        features=40,
        scale=scale,
        dtype=dtype,
    )
    check(inputs, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4], ids=named("scale"))
@pytest.mark.parametrize("layout", ["padded_lengths", "jagged_one_step"])
def test_magnitudes_in_low_precision(backend: str, layout: str, scale: float, dtype: torch.dtype):
    inputs = make_inputs(layout, features=40, scale=scale, dtype=dtype)
    check(inputs, backend)


@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_few_large_features_among_small_ones(backend: str, layout: str):
    """Magnitudes on both sides of the guard within one row, one tile and one batch."""
    inputs = make_inputs(layout, features=70)
    query, key = inputs.leaves["query"], inputs.leaves["key"]
    query[::2, ..., 3] *= 1e3
    query[..., 64] *= 20
    key[1::3, ..., 3] *= 1e4
    key[..., 65] *= 25
    check(inputs, backend)


@pytest.mark.parametrize(
    ("query_number", "key_number"),
    [
        (14, -11),
        (-11, 14),
        (14, -14.5),
        (44, -43),
        (88, -88.5),
        (1e4, -1e4),
        (9999, -9998),
        (50, 50),
    ],
)
@pytest.mark.parametrize("step", [False, True], ids=["all_steps", "one_step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_large_queries_and_keys_that_cancel(
    backend: str,
    dtype: torch.dtype,
    step: bool,
    query_number: float,
    key_number: float,
):
    """q = 14 with k = -11 is tanh 3: neither exponential may be clipped on the way."""
    inputs = make_inputs(
        "one_step" if step else "padded",
        lengths_q=(3, 2),
        lengths_k=(6, 6),
        scale=0.1,
        dtype=dtype,
        poison=False,
    )
    inputs.leaves["query"] += query_number
    inputs.leaves["key"] += key_number
    check(inputs, backend)


@pytest.mark.parametrize("saturation", [3, 5, 8])
def test_saturated_features_beside_an_informative_one(backend: str, saturation: float):
    """One feature decides, and the slopes of the others are a small part of 1."""
    inputs = make_inputs("padded", lengths_q=(8,), lengths_k=(50,), features=64, scale=0.1)
    for name, informative in (("query", 0.0), ("key", 0.5)):
        leaf = inputs.leaves[name]
        leaf += saturation if name == "query" else 0
        leaf[..., 0] = informative
    inputs.leaves["score_weight"] *= 20
    check(inputs, backend)


@pytest.mark.parametrize("weight", [10, 500])
def test_cancelling_features_beside_an_informative_one(backend: str, weight: float):
    """All that tells the keys apart are tanh values near 0; one feature adds a constant."""
    inputs = make_inputs("padded", lengths_q=(8,), lengths_k=(50,), features=64, scale=0.01)
    inputs.leaves["query"] += 1
    inputs.leaves["key"] -= 1
    for name in ("query", "key"):
        inputs.leaves[name][..., 0] = 0.5
    inputs.leaves["score_weight"] *= weight
    check(inputs, backend)


@pytest.mark.parametrize("distance", [1, 4, 8, 16])
def test_product_of_large_factors_stays_finite(backend: str, distance: int):
    """Two features that share a reciprocal, at the end of the range."""
    inputs = make_inputs("padded", lengths_q=(3,), lengths_k=(6,), features=32)
    for name in ("query", "key"):
        inputs.leaves[name][..., 0] = inputs.leaves[name][..., distance] = 9.3
    inputs.leaves["score_weight"][..., [0, distance]] = 16
    check(inputs, backend)


def test_weights_sum_to_one_or_zero(backend: str):
    require_dtype(backend, torch.float64)
    inputs = make_inputs("jagged", heads=2, dtype=torch.float64)
    _, weights = call(inputs, inputs.leaves, backend=backend, need_weights=True)
    sums = weights.sum(-1)  # [B, H, max Tq]
    expected = torch.zeros_like(sums)
    for b, (queries, columns) in enumerate(zip(inputs.query_rows, inputs.columns)):
        expected[b, :, : queries[0].stop - queries[0].start] = float(len(columns) > 0)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-13)


# ---- Dropout ----


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


@pytest.mark.parametrize("axis", range(3))
def test_dropout_is_independent_along_every_axis(backend: str, axis: int):
    """Neighbours along an axis are dropped together as often as chance has it."""
    _, weights = dropped_share(backend, 0.5, seed=1)
    dropped = (weights == 0).double()
    size = dropped.size(axis)
    pairs = dropped.narrow(axis, 0, size - 1) * dropped.narrow(axis, 1, size - 1)
    assert abs(pairs.mean().item() - 0.25) < 5 * (0.25 * 0.75 / pairs.numel()) ** 0.5


def test_dropout_differs_between_calls_and_repeats_under_a_seed(backend: str):
    _, first = dropped_share(backend, 0.5, seed=5)
    _, again = dropped_share(backend, 0.5, seed=5)
    _, other = dropped_share(backend, 0.5, seed=6)
    assert torch.equal(first, again)
    assert 0.4 < ((first == 0) == (other == 0)).double().mean() < 0.6
    torch.manual_seed(5)
    inputs = make_inputs("jagged", lengths_q=(20, 20), lengths_k=(20, 20))
    one, two = (call(inputs, inputs.leaves, backend=backend, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(one, two)


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


# ---- Autocast ----


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


@pytest.mark.parametrize("layout", ["jagged", "nested", "jagged_one_step"])
def test_generous_bounds(backend: str, layout: str):
    """Bounds far above the lengths cost neither time nor memory."""
    inputs = make_inputs(layout)
    expected, _ = call(inputs, inputs.leaves, backend=backend)
    bounds = {"max_seqlen_k": 10**8}
    if layout != "jagged_one_step":
        bounds["max_seqlen_q"] = 10**8
    actual, _ = call(inputs.with_keywords(**bounds), inputs.leaves, backend=backend)
    assert torch.equal(actual, expected)


def test_bound_of_masked_keys(backend: str):
    """With a mask the longest sequence is not read off the shape."""
    inputs = make_inputs("padded_mask")
    actual, _ = call(inputs.with_keywords(max_seqlen_k=1), inputs.leaves, backend=backend)
    assert torch.equal(actual, call(inputs, inputs.leaves, backend=backend)[0])


def test_autocast_leaves_float64_alone(backend: str):
    require_dtype(backend, torch.float64)
    inputs = make_inputs("jagged", dtype=torch.float64)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        context, _ = call(inputs, inputs.leaves, backend=backend)
    assert torch.equal(context, call(inputs, inputs.leaves, backend=backend)[0])


# ---- Determinism and threads ----


@pytest.mark.parametrize("features", [16, 100], ids=named("D"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_thread_count_changes_no_bit(kernel_backend: str, layout: str, features: int):
    inputs = make_inputs(
        layout,
        heads=2,
        lengths_q=(30, 0, 2, 9),
        lengths_k=(40, 3, 0, 50),
        features=features,
        value_features=20,
    )
    incoming = incoming_gradients(inputs, need_weights=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            results.append(
                differentiate(
                    lambda leaves: call(
                        inputs, leaves, backend=kernel_backend, need_weights=True, dropout_p=0.2
                    ),
                    inputs.leaves,
                    incoming,
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


@pytest.mark.parametrize("deterministic", [None, False, True], ids=str)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_deterministic_argument(backend: str, layout: str, deterministic: bool | None):
    inputs = make_inputs(layout).with_keywords(deterministic=deterministic)
    first, second = check(inputs, backend), check(inputs, backend)
    if deterministic is not False:
        for name, result in first.items():
            assert torch.equal(result, second[name]), name


# ---- Choice of a backend ----


def test_default_backend_is_the_best_available(kernel_backend: str):
    """Not the interpreted or emulated one that may be tested, on tensors of the CPU."""
    best = "triton" if torch.get_default_device().type == "cuda" else "cpu"
    problem = backends.problem(best, torch.get_default_device())
    if problem is not None:
        pytest.skip(problem)
    inputs = make_inputs("jagged")
    default, _ = call(inputs, inputs.leaves)
    assert torch.equal(default, call(inputs, inputs.leaves, backend=best)[0])
