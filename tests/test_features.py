"""One more term of scores, ``f_j U``: in attention, scores and memories, on every backend."""

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_within_budget
from layouts import Inputs, make_inputs, nest, randn
from parameters import dtype_id, named
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_ext import AttentionMemory, additive_attention, additive_scores, features, steps

LAYOUTS = ("one_step", "one_step_lengths", "one_step_mask", "jagged_one_step", "nested_one_step")
F = 5


def compare(
    inputs: Inputs, backend: str, program: Callable[..., list[Tensor]], nested: bool = False
) -> None:
    """Results and gradients of ``program`` beside the reference's, and in float64.

    ``program(leaves, backend, keywords)`` with ``features`` and ``feature_weight`` among leaves.
    """
    dtype = inputs.leaves["query"].dtype
    heads = () if not inputs.has_heads else (inputs.num_heads,)
    generator = torch.Generator("cpu").manual_seed(7)
    rows = inputs.owned("key", inputs.key_rows)
    more = {
        "features": randn((*rows.shape, F), generator).to(rows.device, dtype),
        "feature_weight": randn((F, *heads, 16), generator).to(rows.device, dtype),
    }
    poisoned = more["features"].masked_fill(~rows.unsqueeze(-1), torch.nan)

    def run(backend: str, dtype: torch.dtype, ignored: Tensor) -> dict[str, Tensor]:
        leaves = {**inputs.leaves, **more, "features": ignored}
        leaves = {name: leaf.detach().to(dtype, copy=True) for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        results = program(leaves, backend, inputs.keywords)
        weights = (torch.linspace(1, 2, r.numel(), dtype=r.dtype, device=r.device) for r in results)
        sum((r.flatten() * w).sum() for r, w in zip(results, weights)).backward()
        gradients = {f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        return gradients | {f"result {n}": r.detach() for n, r in enumerate(results)}

    actual = run(backend, dtype, poisoned)
    exact = run("reference", torch.float64, more["features"])
    eager = run("reference", dtype, more["features"])
    assert {"dquery", "dkey", "dfeatures", "dfeature_weight"} <= actual.keys() == exact.keys()
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])
    assert (actual["dfeatures"][~rows] == 0).all()


def inputs_of(leaves: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Keywords of a call, nested where the layout is."""
    query, key, value, weight = inputs.arguments(leaves)
    term = leaves["features"]
    if inputs.offsets_k is not None:
        term = nest(term, inputs.offsets_k)
    more = {"features": term, "feature_weight": leaves["feature_weight"]}
    return {"query": query, "key": key, "value": value, "score_weight": weight, **more}


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_and_scores(backend: str, layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads)

    def program(leaves, backend, keywords):
        tensors = inputs_of(leaves, inputs)
        call = functools.partial(additive_attention, **tensors, **keywords, backend=backend)
        context, weights = call(need_weights=True)
        del tensors["value"]
        scores = additive_scores(**tensors, **keywords, backend=backend)
        if context.is_nested:
            context = context.values()
        return [context, weights, scores.masked_fill(scores == -torch.inf, 0)]

    compare(inputs, backend, program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_low_precision(backend: str, dtype: torch.dtype):
    inputs = make_inputs("one_step_lengths", dtype=dtype)

    def program(leaves, backend, keywords):
        return [additive_attention(**inputs_of(leaves, inputs), **keywords, backend=backend)]

    compare(inputs, backend, program)


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_memory(backend: str, layout: str, heads: int | None):
    """A decoder whose features follow from earlier weights, and a step without any."""
    inputs = make_inputs(layout, heads=heads)

    def program(leaves, backend, keywords):
        tensors = inputs_of(leaves, inputs)
        query, term = tensors.pop("query"), tensors.pop("features")
        memory = AttentionMemory(**tensors, **keywords, backend=backend)
        context, weights = memory.attend(query, features=term, need_weights=True)
        if heads is not None:
            weights = weights.mean(1)
        moved = term + weights.unsqueeze(-1)
        scores = memory.scores(2 * query, features=moved)
        plain = memory.attend(query)
        return [context, weights, scores.masked_fill(scores == -torch.inf, 0), plain]

    compare(inputs, backend, program)


@pytest.mark.parametrize("module", [steps, features], ids=["memory", "attention"])
def test_sums_are_made_again_for_backward(module, monkeypatch: pytest.MonkeyPatch):
    """Nothing as large as the keys is kept for each of many steps."""
    calls = []
    shifted = module.shifted_keys
    monkeypatch.setattr(
        module, "shifted_keys", lambda *a, **k: calls.append(None) or shifted(*a, **k)
    )
    key = torch.randn(2, 50, 16, requires_grad=True)
    inputs, weight = (key, key, torch.randn(16)), torch.randn(3, 16)
    if module is steps:
        attend = AttentionMemory(*inputs, feature_weight=weight).attend
    else:

        def attend(query, features):
            return additive_attention(query, *inputs, features=features, feature_weight=weight)

    contexts = [attend(torch.randn(2, 16), features=torch.randn(2, 50, 3)) for _ in "123"]
    assert len(calls) == 3
    sum(contexts).sum().backward()
    assert len(calls) == 6


def test_steps_share_memory_for_their_keys_one_after_the_other():
    """Not two that run at a time in two threads."""
    key, weight = torch.randn(2, 5, 4), torch.randn(3, 4)
    memory = AttentionMemory(key, key, torch.randn(4), feature_weight=weight, backend="cpu")
    terms = [torch.randn(2, 5, 3) for _ in "123"]
    with torch.no_grad(), memory._steps.keys_of_step(terms[0]) as first:
        with memory._steps.keys_of_step(terms[1]) as second:
            torch.testing.assert_close(first.key.squeeze(2), key + terms[0] @ weight)
            torch.testing.assert_close(second.key.squeeze(2), key + terms[1] @ weight)
        with memory._steps.keys_of_step(terms[2]) as third:
            assert third.key.data_ptr() == second.key.data_ptr()
            torch.testing.assert_close(third.key.squeeze(2), key + terms[2] @ weight)


def test_autocast_inside_of_which_a_memory_was_not_made():
    key, terms = torch.randn(2, 5, 4), torch.randn(2, 5, 3).bfloat16()
    memory = AttentionMemory(key, key, torch.randn(4), feature_weight=torch.randn(3, 4))
    expected = memory.attend(key[:, 0], features=terms.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memory.attend(key[:, 0], features=terms), expected)


@pytest.mark.parametrize("in_memory", [False, True], ids=["call", "memory"])
def test_backward_inside_autocast(in_memory: bool):
    """Products with the feature weight stay in the dtype of their tensors, as the kernels do."""

    def gradients(enabled: bool) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        shapes = (2, 4), (2, 5, 4), (2, 5, 3), (3, 4)
        leaves = [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]
        query, key, features, feature_weight = leaves
        inputs, given = (key, key, torch.ones(4)), {"feature_weight": feature_weight}
        if in_memory:
            context = AttentionMemory(*inputs, **given).attend(query, features=features)
        else:
            context = additive_attention(query, *inputs, features=features, **given)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(context.square().sum(), leaves)

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize(
    "name",
    ["query", "key", "value", "score_weight", "features", "feature_weight", "key_lengths"],
)
@pytest.mark.parametrize("in_memory", [False, True], ids=["call", "memory"])
def test_modified_before_backward_is_an_error(name: str, in_memory: bool):
    """Also where autograd itself keeps none of them, as nothing but the query needs a gradient."""
    tensors = {"key": torch.randn(2, 5, 4), "value": torch.randn(2, 5, 3)}
    tensors |= {"score_weight": torch.ones(4), "feature_weight": torch.randn(3, 4)}
    if name == "key_lengths":  # beside which a copy of the features is kept
        tensors[name] = torch.tensor([3, 4])
    source = torch.randn(2, 4, requires_grad=True)
    query, features = source * 1, torch.randn(2, 5, 3)
    if in_memory:
        context = AttentionMemory(**tensors).attend(query, features=features)
    else:
        context = additive_attention(query, features=features, **tensors)
    {"query": query, "features": features, **tensors}[name].detach().sub_(1)
    with pytest.raises(RuntimeError, match="modified"):
        context.sum().backward()


def test_what_is_kept_passes_the_hooks_of_the_caller():
    """Those of checkpoint() and save_on_cpu(); the keys with the term in them are not kept."""
    query, key, weight = torch.randn(2, 4, requires_grad=True), torch.randn(2, 50, 4), torch.ones(4)
    parts = {"features": torch.randn(2, 50, 3), "feature_weight": torch.randn(3, 4)}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        additive_attention(query, key, key, weight, backend="cpu", **parts)
    given = {t.data_ptr() for t in (query, key, weight, *parts.values())}
    assert given <= set(kept)
    assert sum(pointer not in given for pointer in kept) == 2  # statistics and scores


@pytest.mark.parametrize("in_memory", [False, True], ids=["call", "memory"])
def test_batch_of_incoming_gradients(in_memory: bool):
    key, query = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    features, feature_weight = torch.randn(2, 5, 3, requires_grad=True), torch.randn(3, 4)
    feature_weight.requires_grad_()
    arguments, given = (key, key, torch.ones(4)), {"feature_weight": feature_weight}
    if in_memory:
        context = AttentionMemory(*arguments, **given).attend(query, features=features)
    else:
        context = additive_attention(query, *arguments, features=features, **given)
    leaves, incoming = (query, key, features, feature_weight), torch.randn(3, *context.shape)
    batch = torch.autograd.grad(context, leaves, incoming, True, is_grads_batched=True)
    each = (torch.autograd.grad(context, leaves, one, retain_graph=True) for one in incoming)
    torch.testing.assert_close(batch, tuple(torch.stack(column) for column in zip(*each)))


def test_inference_mode(backend: str):
    with torch.inference_mode():
        query, key = torch.randn(2, 4), torch.randn(2, 5, 4)
        parts = {"features": torch.randn(2, 5, 3), "feature_weight": torch.randn(3, 4)}
        inputs = key, key, torch.randn(4)
        context = additive_attention(query, *inputs, backend=backend, **parts)
        weight = parts.pop("feature_weight")
        memory = AttentionMemory(*inputs, feature_weight=weight, backend=backend)
        torch.testing.assert_close(memory.attend(query, **parts), context)


def test_compile():
    query, key, term, weight = (
        torch.randn(shape, requires_grad=True) for shape in ((2, 4), (2, 5, 4), (2, 5, 3), (3, 4))
    )

    def attend(query, key, term, weight):
        options = {"features": term, "feature_weight": weight}
        return additive_attention(query, key, key, key.new_ones(4), **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [f(query, key, term, weight) for f in (attend, compiled)]
    torch.testing.assert_close(*results)
    leaves = [query, key, term, weight]
    torch.testing.assert_close(*(torch.autograd.grad(r.sum(), leaves) for r in results))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_weight": None}, "feature_weight: expected a tensor beside features, got None"),
        ({"features": None}, "features: expected a tensor beside feature_weight, got None"),
        ({"query": torch.randn(2, 3, 4)}, r"features: expected None unless query is \(B, D\)"),
        ({"features": torch.randn(2, 5, 2)}, r"features: expected shape \(2, 5, 3\) = \(B, Tk, F"),
        ({"features": torch.randn(2, 5, 3).double()}, "features: expected dtype torch.float32"),
        ({"features": [1.0]}, "features: expected a torch.Tensor"),
        ({"feature_weight": torch.randn(3, 5)}, r"feature_weight: expected shape \(F, D\)"),
        ({"feature_weight": torch.randn(3, 4).double()}, "feature_weight: expected a dtype"),
        ({"feature_weight": torch.randn(3, 4, device="meta")}, "feature_weight: expected device"),
    ],
)
def test_wrong_calls(changes: dict, message: str):
    arguments = {
        "query": torch.randn(2, 4),
        "key": torch.randn(2, 5, 4),
        "score_weight": torch.randn(4),
        "features": torch.randn(2, 5, 3),
        "feature_weight": torch.randn(3, 4),
        **changes,
    }
    for function in (
        additive_scores,
        functools.partial(additive_attention, value=torch.ones(2, 5, 1)),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            function(**arguments)


def test_features_of_a_memory_without_a_weight():
    memory = AttentionMemory(torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(4))
    with pytest.raises(ValueError, match="feature_weight: expected a tensor, where the memory is"):
        memory.attend(torch.randn(2, 4), features=torch.randn(2, 5, 3))


@pytest.mark.parametrize("first", [torch.inference_mode, FakeTensorMode])
def test_steps_after_one_in_another_mode(first: Callable):
    """Nothing that such a step made is used by those after it."""
    shapes = ((2, 5, 4), (2, 5, 4), (4,), (3, 4))
    key, value, score_weight, feature_weight = map(torch.randn, shapes)
    query, rows = torch.randn(2, 4), torch.randn(2, 5, 3)
    memory = AttentionMemory(key, value, score_weight, feature_weight=feature_weight)
    expected = additive_attention(
        query, key, value, score_weight, features=rows, feature_weight=feature_weight
    )
    options = {"allow_non_fake_inputs": True} if first is FakeTensorMode else {}
    with first(**options):
        memory.attend(query, features=rows)
    for _ in range(2):
        found = memory.attend(query, features=rows)
        assert type(found) is Tensor
        torch.testing.assert_close(found, expected)
