"""Decoder loops over ``attn_ext.AttentionMemory`` and by the formulas, and their comparison."""

from collections.abc import Callable, Sequence

import torch
from helpers import assert_within_budget
from layouts import INPUT_NAMES, Inputs, make_inputs
from torch import Tensor
from yardstick import Results, exact_tanh, formula, worst

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
