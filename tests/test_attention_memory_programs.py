"""``attn_ext.AttentionMemory`` in all kinds of decoders: what they feed, differentiate, repeat."""

import pytest
import torch
from decoders import (
    KEY_SIDE,
    Program,
    Step,
    check_program,
    compare,
    formula_steps,
    fresh_leaves,
    gradients_of,
    loss_of,
    make_memory,
    make_steps,
    memory_steps,
    named,
    queries_of,
)
from layouts import make_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from yardstick import Results

pytestmark = pytest.mark.every_isa


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
