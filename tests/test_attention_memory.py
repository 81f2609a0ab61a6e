"""``attn_ext.AttentionMemory``: values and gradients of one ``additive_attention`` a step."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import (
    INPUT_NAMES,
    Inputs,
    Results,
    assert_within_budget,
    draw_keep,
    exact_tanh,
    formula,
    make_inputs,
    require_dtype,
    worst,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext import AttentionMemory

KEY_SIDE = INPUT_NAMES[1:]
STEP_LAYOUTS = (
    "one_step",
    "one_step_lengths",
    "one_step_mask",
    "jagged_one_step",
    "nested_one_step",
)
STEPS = 4


def named(name: str) -> Callable[[object], str]:
    return lambda value: f"{name}={value}"


def make_steps(layout: str, steps: int = STEPS, **options) -> tuple[Inputs, list[Tensor]]:
    """Inputs whose key side serves all steps, and a query for each step."""
    inputs = make_inputs(layout, **options)
    seeds = range(100, 100 + steps)
    return inputs, [make_inputs(layout, seed=s, **options).leaves["query"] for s in seeds]


def make_memory(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> AttentionMemory:
    arguments = inputs.arguments({**inputs.leaves, **leaves})[1:]
    return AttentionMemory(*arguments, **inputs.keywords, **keywords)


def fresh_leaves(
    inputs: Inputs, queries: Sequence[Tensor], wanted: Sequence[str] = INPUT_NAMES
) -> dict[str, Tensor]:
    """Leaves of a decoder loop: the key side, and queries "query0", "query1", ..."""
    tensors = {name: inputs.leaves[name] for name in KEY_SIDE}
    tensors |= {f"query{t}": query for t, query in enumerate(queries)}
    return {
        name: tensor.detach().requires_grad_(name.rstrip("0123456789") in wanted)
        for name, tensor in tensors.items()
    }


def queries_of(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [leaf for name, leaf in leaves.items() if name.startswith("query")]


# A step function takes (query, t, need_weights) and returns context and weights (or None).
Step = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]


def memory_steps(memory: AttentionMemory) -> Step:
    def step(query: Tensor, t: int, need_weights: bool):
        if need_weights:
            return memory.attend(query, need_weights=True)
        return memory.attend(query), None

    return step


def formula_steps(
    inputs: Inputs,
    leaves: dict[str, Tensor],
    keeps: list[Tensor] | None = None,
    dropout_p: float = 0.0,
    **how: object,
) -> Step:
    def step(query: Tensor, t: int, need_weights: bool):
        tensors = {"query": query, **{name: leaves[name] for name in KEY_SIDE}}
        keep = None if keeps is None else keeps[t]
        context, weights = formula(inputs, tensors, keep, dropout_p, **how)
        return context, weights if need_weights else None

    return step


def loss_of(t: int, context: Tensor, weights: Tensor | None) -> Tensor:
    """A loss that weighs every entry differently, and every step too."""

    def weigh(result: Tensor, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        numbers = torch.randn(result.shape, generator=generator, dtype=torch.float64, device="cpu")
        return (result * numbers.to(result)).sum()

    loss = weigh(context, t)
    return loss if weights is None else loss + weigh(weights, t + 1000)


def decode(step: Step, leaves: dict[str, Tensor], need_weights: bool) -> Results:
    """Attend with every query in turn, sum the losses, differentiate."""
    results: Results = {}
    loss = torch.zeros(())
    for t, query in enumerate(queries_of(leaves)):
        context, weights = step(query, t, need_weights)
        results[f"context{t}"] = context.detach()
        if weights is not None:
            results[f"weights{t}"] = weights.detach()
        loss = loss + loss_of(t, context, weights)
    if loss.requires_grad:  # the formulas of no sequence at all depend on nothing
        loss.backward()
    return results | gradients_of(leaves)


def gradients_of(leaves: dict[str, Tensor]) -> Results:
    return {
        f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
        for name, leaf in leaves.items()
        if leaf.requires_grad
    }


def compare(actual: Results, exact: Results, eager: Results) -> None:
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


Program = Callable[[Step, dict[str, Tensor]], Results]


def check_program(
    inputs: Inputs,
    queries: Sequence[Tensor],
    backend: str,
    program: Program,
    wanted: Sequence[str] = INPUT_NAMES,
    dropout_p: float = 0.0,
    keeps: list[Tensor] | None = None,
) -> Results:
    """Run a decoder ``program`` on a memory and by the formulas, in float64 and eager."""

    def by_formula(dtype: torch.dtype | None = None, **how: object) -> Results:
        leaves = fresh_leaves(inputs, queries, wanted)
        leaves = {
            name: leaf.detach().to(dtype or leaf.dtype).requires_grad_(leaf.requires_grad)
            for name, leaf in leaves.items()
        }
        return program(formula_steps(inputs, leaves, keeps, dropout_p, **how), leaves)

    exact = by_formula(torch.float64, tanh=exact_tanh)
    eager = worst(exact, by_formula(), by_formula(reverse=True))
    leaves = fresh_leaves(inputs, queries, wanted)
    keywords = {"dropout_p": dropout_p} if dropout_p else {}
    memory = make_memory(inputs, leaves, backend=backend, **keywords)
    actual = program(memory_steps(memory), leaves)
    compare(actual, exact, eager)
    return actual


def plain_decoding(step: Step, leaves: dict[str, Tensor]) -> Results:
    return decode(step, leaves, need_weights=False)


def decoding_with_weights(step: Step, leaves: dict[str, Tensor]) -> Results:
    return decode(step, leaves, need_weights=True)


# ---- One additive_attention a step ----


@pytest.mark.parametrize("program", [plain_decoding, decoding_with_weights])
@pytest.mark.parametrize("heads", [None, 1, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_layouts(backend: str, layout: str, heads: int | None, program: Program):
    inputs, queries = make_steps(layout, heads=heads)
    actual = check_program(inputs, queries, backend, program)
    for name in ("dkey", "dvalue"):
        nobody = ~inputs.owned("key", inputs.key_rows)
        assert (actual[name][nobody] == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_low_precision(backend: str, layout: str, dtype: torch.dtype):
    inputs, queries = make_steps(layout, steps=2, heads=2, dtype=dtype)
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_gradcheck(backend: str, layout: str):
    require_dtype(backend, torch.float64)
    options = {"features": 3, "value_features": 2, "dtype": torch.float64, "poison": False}
    inputs, queries = make_steps(layout, steps=2, lengths_k=(3, 0, 2), **options)
    leaves = fresh_leaves(inputs, queries)

    def attend(*tensors):
        tensors = dict(zip(leaves, tensors))
        memory = make_memory(inputs, tensors, backend=backend)
        contexts = [memory.attend(query, need_weights=True) for query in queries_of(tensors)]
        return tuple(result for pair in contexts for result in pair)

    assert torch.autograd.gradcheck(attend, tuple(leaves.values()))


@pytest.mark.parametrize("features", [1, 7, 17, 100], ids=named("D"))
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_features(backend: str, layout: str, features: int):
    inputs, queries = make_steps(layout, features=features, value_features=features + 2)
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("scale", [1e-6, 10.0, 30.0, 1e4], ids=named("scale"))
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_magnitudes(backend: str, layout: str, scale: float):
    """The prepared exponentials of keys out of the factored range are never used."""
    inputs, queries = make_steps(layout, features=40, scale=scale)
    check_program(inputs, queries, backend, decoding_with_weights)


def test_large_keys_beside_small_ones(backend: str):
    inputs, queries = make_steps("jagged_one_step", features=40)
    inputs.leaves["key"][::2] *= 100
    queries[1] *= 50
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("strides", ["transposed", "reversed", "sliced"])
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_strides(backend: str, layout: str, heads: int | None, strides: str):
    inputs, queries = make_steps(layout, heads=heads, strides=strides)
    assert not queries[0].is_contiguous() and not inputs.leaves["key"].is_contiguous()
    check_program(inputs, queries, backend, decoding_with_weights)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_empty_sequences(backend: str, layout: str, lengths: tuple[int, ...]):
    inputs, queries = make_steps(layout, lengths_k=lengths)
    actual = check_program(inputs, queries, backend, decoding_with_weights)
    if not any(lengths):
        for name, result in actual.items():
            assert (result == 0).all(), name


def test_all_masked(backend: str):
    mask = torch.ones(2, 5, dtype=torch.bool)
    inputs, queries = make_steps("one_step_mask", lengths_k=(5, 5), key_padding_mask=mask)
    for name, result in check_program(inputs, queries, backend, decoding_with_weights).items():
        assert (result == 0).all(), name


SUBSETS = [(), ("query",), ("key",), ("value",), ("score_weight",), ("query", "key"), KEY_SIDE]


@pytest.mark.parametrize("wanted", SUBSETS, ids=["+".join(names) or "none" for names in SUBSETS])
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_requires_grad_subsets(backend: str, layout: str, wanted: tuple[str, ...]):
    inputs, queries = make_steps(layout)
    if not wanted:
        leaves = fresh_leaves(inputs, queries, wanted)
        memory = make_memory(inputs, leaves, backend=backend)
        assert not memory.attend(queries[0]).requires_grad
        return
    check_program(inputs, queries, backend, decoding_with_weights, wanted)


@pytest.mark.parametrize("dropout_p", [0.3, 0.8], ids=named("p"))
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_dropout(backend: str, layout: str, dropout_p: float):
    """Every step drops anew; a step's gradients use the mask of its forward."""
    inputs, queries = make_steps(layout, heads=2)
    keeps = [draw_keep(inputs, dropout_p, seed) for seed in range(STEPS)]

    def program(step: Step, leaves: dict[str, Tensor]) -> Results:
        def seeded(query, t, need_weights):
            torch.manual_seed(t)
            return step(query, t, need_weights)

        return decode(seeded, leaves, need_weights=True)

    check_program(inputs, queries, backend, program, dropout_p=dropout_p, keeps=keeps)


def test_dropout_differs_between_steps(backend: str):
    inputs, queries = make_steps("one_step", lengths_k=(40,) * 4)
    memory = make_memory(inputs, {}, backend=backend, dropout_p=0.5)
    first, second = (memory.attend(queries[0], need_weights=True)[1] == 0 for _ in range(2))
    assert 0.3 < (first == second).double().mean() < 0.7


# ---- Decoder programs ----


def input_feeding(step: Step, leaves: dict[str, Tensor]) -> Results:
    """Each query depends on the context before it, as in RNNsearch."""
    loss, results = torch.zeros(()), {}
    feed = None
    for t, query in enumerate(queries_of(leaves)):
        query = query if feed is None else query + feed.mean(-1, keepdim=True)
        context, weights = step(query, t, True)
        feed = torch.tanh(context) + weights.sum() * 0.1
        loss = loss + loss_of(t, context, weights)
        results[f"context{t}"] = context.detach()
    loss.backward()
    return results | gradients_of(leaves)


def weights_alone(step: Step, leaves: dict[str, Tensor]) -> Results:
    """As a coverage or alignment loss: no gradient of any context arrives."""
    total = sum(step(query, t, True)[1] for t, query in enumerate(queries_of(leaves)))
    total.square().sum().backward()
    return gradients_of(leaves)


def weights_of_some_steps(step: Step, leaves: dict[str, Tensor]) -> Results:
    loss = torch.zeros(())
    for t, query in enumerate(queries_of(leaves)):
        loss = loss + loss_of(t, *step(query, t, t % 2 == 0))
    loss.backward()
    return gradients_of(leaves)


def retain_graph_twice(step: Step, leaves: dict[str, Tensor]) -> Results:
    loss = sum(loss_of(t, *step(q, t, True)) for t, q in enumerate(queries_of(leaves)))
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    return gradients_of(leaves)


def truncated_backpropagation(step: Step, leaves: dict[str, Tensor]) -> Results:
    """A backward every two steps, the state detached between them."""
    losses, feed = [], None
    for t, query in enumerate(queries_of(leaves)):
        query = query if feed is None else query + feed.mean(-1, keepdim=True)
        context, weights = step(query, t, True)
        losses.append(loss_of(t, context, weights))
        feed = context
        if t % 2:
            sum(losses).backward(retain_graph=True)
            losses, feed = [], context.detach()
    return gradients_of(leaves)


def backward_of_each_step(step: Step, leaves: dict[str, Tensor]) -> Results:
    losses = [loss_of(t, *step(q, t, True)) for t, q in enumerate(queries_of(leaves))]
    for loss in reversed(losses[1:]):
        loss.backward(retain_graph=True)
    losses[0].backward()
    return gradients_of(leaves)


def steps_outside_the_loss(step: Step, leaves: dict[str, Tensor]) -> Results:
    losses = [loss_of(t, *step(q, t, True)) for t, q in enumerate(queries_of(leaves))]
    (losses[0] + losses[2]).backward()
    return gradients_of(leaves)


def one_step_used_twice(step: Step, leaves: dict[str, Tensor]) -> Results:
    context, weights = step(leaves["query0"], 0, True)
    (loss_of(0, context, weights) + loss_of(1, context.square(), weights.exp())).backward()
    return gradients_of(leaves)


def one_query_for_all_steps(step: Step, leaves: dict[str, Tensor]) -> Results:
    query = leaves["query0"]
    sum(loss_of(t, *step(query, t, True)) for t in range(3)).backward()
    return gradients_of(leaves)


def queries_first_then_everything(step: Step, leaves: dict[str, Tensor]) -> Results:
    """A pass that ends before the memory leaves nothing behind for the next."""
    queries = queries_of(leaves)
    loss = sum(loss_of(t, *step(q, t, True)) for t, q in enumerate(queries))
    only_queries = torch.autograd.grad(loss, queries, retain_graph=True)
    loss.backward()
    results = {f"donly_query{t}": gradient for t, gradient in enumerate(only_queries)}
    return results | gradients_of(leaves)


def keys_alone(step: Step, leaves: dict[str, Tensor]) -> Results:
    loss = sum(loss_of(t, *step(q, t, True)) for t, q in enumerate(queries_of(leaves)))
    names = ("key", "value", "score_weight")
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    return {f"d{name}": gradient for name, gradient in zip(names, gradients)}


def failed_backward_then_another(step: Step, leaves: dict[str, Tensor]) -> Results:
    """An exception in the middle of a backward pass leaves nothing behind for the next."""
    contexts = [step(query, t, False)[0] for t, query in enumerate(queries_of(leaves))]
    loss = sum(loss_of(t, context, None) for t, context in enumerate(contexts))

    def fail(gradient: Tensor):
        raise ArithmeticError("on purpose")

    handle = contexts[0].register_hook(fail)
    with pytest.raises(ArithmeticError, match="on purpose"):
        loss.backward(retain_graph=True)
    handle.remove()
    for leaf in leaves.values():
        leaf.grad = None
    loss.backward()
    return gradients_of(leaves)


def stacked_contexts(step: Step, leaves: dict[str, Tensor]) -> Results:
    """Incoming gradients that are slices of one stacked tensor, and of stride 0."""
    contexts = [step(query, t, False)[0] for t, query in enumerate(queries_of(leaves))]
    stacked = torch.stack(contexts[:-1], dim=-1)
    (loss_of(0, stacked, None) + contexts[-1].sum()).backward()
    return gradients_of(leaves)


def checkpointed_step(use_reentrant: bool) -> Program:
    """A step recomputed in backward; reentrant, its backward is a pass inside the pass."""

    def program(step: Step, leaves: dict[str, Tensor]) -> Results:
        loss = torch.zeros(())
        for t, query in enumerate(queries_of(leaves)):
            if t == 1:
                context, weights = checkpoint(step, query, t, True, use_reentrant=use_reentrant)
            else:
                context, weights = step(query, t, True)
            loss = loss + loss_of(t, context, weights)
        loss.backward()
        return gradients_of(leaves)

    return program


PROGRAMS = {
    "input_feeding": input_feeding,
    "weights_alone": weights_alone,
    "weights_of_some_steps": weights_of_some_steps,
    "retain_graph_twice": retain_graph_twice,
    "truncated_backpropagation": truncated_backpropagation,
    "backward_of_each_step": backward_of_each_step,
    "steps_outside_the_loss": steps_outside_the_loss,
    "one_step_used_twice": one_step_used_twice,
    "one_query_for_all_steps": one_query_for_all_steps,
    "queries_first_then_everything": queries_first_then_everything,
    "keys_alone": keys_alone,
    "failed_backward_then_another": failed_backward_then_another,
    "stacked_contexts": stacked_contexts,
    "checkpointed_step": checkpointed_step(use_reentrant=False),
    "reentrant_checkpointed_step": checkpointed_step(use_reentrant=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step", "nested_one_step"])
def test_programs(backend: str, layout: str, heads: int | None, name: str):
    if layout == "nested_one_step" and name == "reentrant_checkpointed_step":
        layout = "jagged_one_step"  # the inner pass would free the graph that made them nested
    inputs, queries = make_steps(layout, heads=heads)
    check_program(inputs, queries, backend, PROGRAMS[name])


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_with_keys_of_an_encoder(backend: str, program: Program):
    """Keys that are not leaves: their gradients flow on into what made them."""
    inputs, queries = make_steps("one_step_lengths", poison=False)

    def encode(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        # Linear, so that nothing of the encoder is freed before a second backward pass.
        return leaves | {"key": leaves["key"].flip(1) + 0.1, "value": -leaves["value"].roll(1, 1)}

    def by_formula(dtype: torch.dtype) -> Results:
        leaves = fresh_leaves(inputs, queries)
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        return program(formula_steps(inputs, encode(leaves)), leaves)

    leaves = fresh_leaves(inputs, queries)
    memory = make_memory(inputs, encode(leaves), backend=backend)
    actual = program(memory_steps(memory), leaves)
    compare(actual, by_formula(torch.float64), by_formula(torch.float32))


def test_several_memories_alive(backend: str):
    """Two memories over shared score weights, their steps interleaved, one loss."""
    inputs, queries = make_steps("one_step_lengths")
    others = make_inputs("one_step_mask", seed=9)

    def program(steps: tuple[Step, Step], leaves: dict[str, Tensor]) -> Results:
        loss, results = torch.zeros(()), {}
        for t, query in enumerate(queries_of(leaves)):
            for memory, step in enumerate(steps):
                context, weights = step(query, t, True)
                loss = loss + loss_of(t + 10 * memory, context, weights)
                results[f"context{memory}{t}"] = context.detach()
        loss.backward()
        return results | gradients_of(leaves)

    def all_leaves(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tensors = {**inputs.leaves, "other_key": others.leaves["key"]}
        tensors |= {"other_value": others.leaves["value"]}
        tensors |= {f"query{t}": query for t, query in enumerate(queries)}
        tensors.pop("query")
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
        second = {**leaves, "key": leaves["other_key"], "value": leaves["other_value"]}
        return leaves, second

    def by_formula(dtype: torch.dtype) -> Results:
        leaves, second = all_leaves(dtype)
        return program((formula_steps(inputs, leaves), formula_steps(others, second)), leaves)

    leaves, second = all_leaves(torch.float32)
    first_memory = make_memory(inputs, {n: leaves[n] for n in KEY_SIDE}, backend=backend)
    second_memory = make_memory(others, {n: second[n] for n in KEY_SIDE}, backend=backend)
    actual = program((memory_steps(first_memory), memory_steps(second_memory)), leaves)
    compare(actual, by_formula(torch.float64), by_formula(torch.float32))


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_equals_additive_attention(backend: str, layout: str):
    inputs, queries = make_steps(layout, heads=2, poison=False)
    memory = make_memory(inputs, {}, backend=backend)
    eager = formula_steps(inputs, inputs.leaves)
    for t, query in enumerate(queries):
        _, key, value, score_weight = inputs.arguments(inputs.leaves)
        expected = attn_ext.additive_attention(
            query, key, value, score_weight, need_weights=True, backend=backend, **inputs.keywords
        )
        results = zip(memory.attend(query, need_weights=True), expected, eager(query, t, True))
        for actual, other, by_hand in results:
            assert_within_budget("result", actual, other.double(), by_hand)


@pytest.mark.parametrize("max_seqlen_k", [13, 20], ids=["exact", "larger"])
def test_max_seqlen(backend: str, max_seqlen_k: int):
    inputs, queries = make_steps("jagged_one_step")
    inputs = inputs.with_keywords(max_seqlen_k=max_seqlen_k)
    check_program(inputs, queries, backend, decoding_with_weights)


# ---- Modes of autograd ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(backend: str, mode: type):
    inputs, queries = make_steps("jagged_one_step")
    leaves = fresh_leaves(inputs, queries)
    with mode():
        memory = make_memory(inputs, leaves, backend=backend)
        results = [memory.attend(query) for query in queries]
    eager = formula_steps(inputs, inputs.leaves)
    doubles = {name: leaf.double() for name, leaf in inputs.leaves.items()}
    exact = formula_steps(inputs, doubles)
    for t, (query, context) in enumerate(zip(queries, results)):
        assert not context.requires_grad
        assert_within_budget(
            "context", context, exact(query.double(), t, False)[0], eager(query, t, False)[0]
        )


def test_step_without_autograd_among_others(backend: str):
    """A step under no_grad, as in sampling, takes no part in the gradients."""
    inputs, queries = make_steps("one_step_lengths")

    def program(step: Step, leaves: dict[str, Tensor]) -> Results:
        first = loss_of(0, *step(leaves["query0"], 0, True))
        with torch.no_grad():
            context, _ = step(leaves["query1"], 1, True)
        assert not context.requires_grad
        (first + loss_of(2, *step(leaves["query2"], 2, True))).backward()
        return gradients_of(leaves)

    check_program(inputs, queries, backend, program)


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_memory_made_without_autograd_gives_gradients_to_queries_only(
    backend: str, layout: str, heads: int | None
):
    """On every backend, and also where the tensors are in the internal form as they come."""
    inputs, queries = make_steps(layout, heads=heads)
    leaves = fresh_leaves(inputs, queries)
    with torch.no_grad():
        memory = make_memory(inputs, leaves, backend=backend)
    loss_of(0, *memory.attend(leaves["query0"], need_weights=True)).backward()
    assert all(leaves[name].grad is None for name in KEY_SIDE)
    others = fresh_leaves(inputs, queries, ("query",))
    memory = make_memory(inputs, others, backend=backend)
    loss_of(0, *memory.attend(others["query0"], need_weights=True)).backward()
    torch.testing.assert_close(leaves["query0"].grad, others["query0"].grad)


def test_second_backward_without_retain_graph_raises(backend: str):
    inputs, queries = make_steps("one_step")
    leaves = fresh_leaves(inputs, queries)
    memory = make_memory(inputs, leaves, backend=backend)
    loss = memory.attend(leaves["query0"]).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["query0", *KEY_SIDE])
def test_second_derivative_raises(kernel_backend: str, name: str):
    inputs, queries = make_steps("one_step_lengths")
    leaves = fresh_leaves(inputs, queries)
    memory = make_memory(inputs, leaves, backend=kernel_backend)
    loss = memory.attend(leaves["query0"]).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaves[name], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("wanted", [*[(name,) for name in KEY_SIDE], KEY_SIDE], ids="+".join)
def test_second_derivative_to_the_key_side_alone_raises(
    kernel_backend: str, wanted: tuple[str, ...]
):
    """As of a gradient penalty on queries: part of a loss that depends on the keys otherwise too.

    The query itself is a constant of that loss.
    """
    inputs, queries = make_steps("one_step_lengths")
    leaves = fresh_leaves(inputs, queries)
    memory = make_memory(inputs, leaves, backend=kernel_backend)
    context = memory.attend(leaves["query0"])
    (dquery,) = torch.autograd.grad(context.sum(), leaves["query0"], create_graph=True)
    penalized = context.sum() + 10 * dquery.square().sum()
    with pytest.raises(RuntimeError, match="backend='reference' where you need a second"):
        torch.autograd.grad(penalized, [leaves[name] for name in wanted])


@pytest.mark.parametrize("name", KEY_SIDE)
def test_second_derivative_raises_without_a_query_gradient(kernel_backend: str, name: str):
    inputs, queries = make_steps("one_step_lengths")
    leaves = {n: inputs.leaves[n].clone() for n in KEY_SIDE}
    leaves[name].requires_grad_()
    memory = make_memory(inputs, leaves, backend=kernel_backend)
    loss = memory.attend(queries[0]).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaves[name], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        gradient.square().sum().backward()


def test_autocast_on_one_side_only(backend: str):
    """A memory made outside autocast takes queries inside it, and the other way round."""
    inputs, queries = make_steps("one_step_lengths")
    leaves = {n: inputs.leaves[n] for n in KEY_SIDE}
    autocast = torch.autocast(torch.get_default_device().type, torch.bfloat16)
    outside = make_memory(inputs, leaves, backend=backend)
    expected = outside.attend(queries[0])
    with autocast:
        inside = make_memory(inputs, leaves, backend=backend)
        assert torch.equal(
            outside.attend(queries[0].bfloat16().float()).float(),
            outside.attend(queries[0].bfloat16()),
        )
        assert torch.equal(outside.attend(queries[0]), expected)
        cast = inside.attend(queries[0])
    assert cast.dtype == torch.bfloat16
    assert torch.equal(inside.attend(queries[0]), cast)


@pytest.mark.parametrize("name", KEY_SIDE)
def test_modification_in_place_before_a_step_raises(kernel_backend: str, name: str):
    inputs, queries = make_steps("one_step_lengths")
    leaves = {n: inputs.leaves[n].clone() for n in KEY_SIDE}
    memory = make_memory(inputs, leaves, backend=kernel_backend)
    memory.attend(queries[0])
    leaves[name].add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        memory.attend(queries[1])


@pytest.mark.parametrize("name", [*KEY_SIDE, "key_lengths"])
def test_modification_in_place_before_backward_raises(kernel_backend: str, name: str):
    inputs, queries = make_steps("one_step_lengths")
    leaves = fresh_leaves(inputs, queries)
    changing = {n: leaves[n] * 1 for n in KEY_SIDE}
    memory = make_memory(inputs, changing, backend=kernel_backend)
    loss = memory.attend(leaves["query0"]).sum()
    (changing | inputs.keywords)[name].sub_(1)
    with pytest.raises(RuntimeError, match="modified in place|modified by an inplace operation"):
        loss.backward()


def test_query_modified_in_place_before_backward_raises(kernel_backend: str):
    inputs, queries = make_steps("one_step_lengths")
    leaves = fresh_leaves(inputs, queries)
    query = leaves["query0"] * 1
    memory = make_memory(inputs, leaves, backend=kernel_backend)
    loss = memory.attend(query).sum()
    query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- Autocast, threads, lifetime ----


@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_autocast(backend: str, layout: str):
    """Under autocast a memory computes and returns what its cast inputs do."""
    inputs, queries = make_steps(layout, poison=False)
    dtype = torch.bfloat16

    def by_formula(compute: torch.dtype) -> Results:
        leaves = fresh_leaves(inputs, queries)
        cast = {name: leaf.to(dtype).to(compute) for name, leaf in leaves.items()}
        cast["score_weight"] = leaves["score_weight"].to(compute)
        step = formula_steps(inputs, cast)
        losses, results = [], {}
        for t, query in enumerate(queries_of(cast)):
            context, weights = step(query, t, True)
            results |= {f"context{t}": context.detach(), f"weights{t}": weights.detach()}
            losses.append(loss_of(t, context, weights))
        sum(losses).backward()
        return results | gradients_of(leaves)

    leaves = fresh_leaves(inputs, queries)
    with torch.autocast(torch.get_default_device().type, dtype):
        memory = make_memory(inputs, leaves, backend=backend)
        steps = [memory.attend(query, need_weights=True) for query in queries_of(leaves)]
    actual = {}
    for t, (context, weights) in enumerate(steps):
        assert context.dtype == weights.dtype == dtype
        actual |= {f"context{t}": context.detach(), f"weights{t}": weights.detach()}
    sum(loss_of(t, *results) for t, results in enumerate(steps)).backward()
    for name, gradient in gradients_of(leaves).items():
        assert gradient.dtype == torch.float32
        actual[name] = gradient.to(dtype)  # as exact as what was computed in it
    compare(actual, by_formula(torch.float64), by_formula(dtype))


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_thread_count_changes_no_bit(kernel_backend: str, layout: str, heads: int | None):
    inputs, queries = make_steps(layout, heads=heads, lengths_k=(100, 3, 0, 70), features=50)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = fresh_leaves(inputs, queries)
            memory = make_memory(inputs, leaves, backend=kernel_backend)
            results.append(decoding_with_weights(memory_steps(memory), leaves))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_freed_when_it_goes_out_of_scope(backend: str, backward: bool):
    """No reference cycle: the keys of a batch must not wait for the garbage collector."""
    inputs, queries = make_steps("one_step")
    leaves = fresh_leaves(inputs, queries)
    gc.collect()
    gc.disable()
    try:
        key = leaves["key"] * 1
        alive = weakref.ref(key)
        memory = make_memory(inputs, {**leaves, "key": key}, backend=backend)
        loss = sum(memory.attend(query).sum() for query in queries_of(leaves))
        if backward:
            loss.backward()
        del key, memory, loss
        assert alive() is None
    finally:
        gc.enable()


def test_backward_passes_in_two_threads(kernel_backend: str):
    """Backward passes that run at once through one memory do not mix their steps."""
    inputs, queries = make_steps("one_step_lengths", steps=40)
    leaves = fresh_leaves(inputs, queries)
    memory = make_memory(inputs, leaves, backend=kernel_backend)
    contexts = [memory.attend(query) for query in queries_of(leaves)]
    losses = [
        sum(loss_of(t, context, None) for t, context in enumerate(contexts) if t % 2 == part)
        for part in range(2)
    ]
    wanted = [leaves[name] for name in KEY_SIDE]
    expected = [torch.autograd.grad(loss, wanted, retain_graph=True) for loss in losses]
    found: list = [None, None]

    def run(part: int) -> None:
        for _ in range(5):
            found[part] = torch.autograd.grad(losses[part], wanted, retain_graph=True)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in range(2):
        for name, gradient, reference in zip(KEY_SIDE, found[part], expected[part]):
            assert torch.equal(gradient, reference), name
