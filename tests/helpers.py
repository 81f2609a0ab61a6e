"""What all tests share: the backends of this machine, calls of them, and the error budget.

Every comparison goes through :func:`assert_within_budget`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from layouts import INPUT_NAMES, Inputs, draw_keep, randn
from torch import Tensor
from yardstick import Results, compute_dtype, differentiate, formula, yardsticks

import attn_ext
from attn_ext import backends

# Backends and the device their tensors are on. Under Triton's interpreter, which has to be chosen
# before a kernel is imported, its backend is tested alone, on CPU tensors.
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKEND_DEVICES = {"triton": "cpu"}
elif torch.cuda.is_available():
    BACKEND_DEVICES = {"cpu": "cpu", "reference": "cpu", "triton": "cuda", "cuda": "cuda"}
else:
    BACKEND_DEVICES = {"cpu": "cpu", "reference": "cpu"}


def require_backend(name: str) -> str:
    """The name, or a visible skip where the backend is missing or not what is tested."""
    if name not in BACKEND_DEVICES:
        pytest.skip(f"backend {name} is not among those that this process tests")
    problem = backends.problem(name, torch.device(BACKEND_DEVICES[name]))
    if problem is not None:
        pytest.skip(f"backend {name}: {problem}")
    return name


def require_dtype(backend: str, dtype: torch.dtype) -> None:
    """A visible skip where the backend does not compute in ``dtype``."""
    if dtype == torch.float64 and backend not in backends.IN_DOUBLE:
        pytest.skip(f"backend {backend} does not compute in float64")


# The error budget: section 3 of the contract, and the only tolerances of the suite.
FORWARD_FACTOR = 2
GRADIENT_FACTOR = 3

# What is allowed beyond the multiple of eager's error, as a part of the result's scale. The
# contract gives 1e-6 for float32. Lower precisions compute in float32 and add one rounding of the
# result: half a unit in its last place. For float64 it is 1e-6 in the ratio of the precisions.
SCALE_EPSILON = {
    torch.float64: 1e-6 * 2.0**-29,
    torch.float32: 1e-6,
    torch.float16: 1e-6 + 2.0**-11,
    torch.bfloat16: 1e-6 + 2.0**-8,
}


def error_budget(
    name: str, dtype: torch.dtype, eager_error: float | Tensor, scale: float | Tensor
) -> float | Tensor:
    """The largest error allowed to a result of ``dtype``; gradients are called ``d...``."""
    factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
    if dtype == torch.float64:
        factor += 1  # the yardstick itself errs as eager does
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return factor * eager_error + SCALE_EPSILON[dtype] * scale + subnormal


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Compare with the float64 ``exact``, allowing a multiple of the error that ``eager`` makes.

    Args:
        name: what is compared; gradients are called ``d...``.
        actual: the result to judge.
        exact: the float64 yardstick.
        eager: what hand-written PyTorch gives in the dtype of the inputs.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    actual_error = (actual.double() - exact).abs()
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} values are not finite"
    eager_error = (eager.double() - exact).abs().max()
    scale = exact.abs().max()
    budget = error_budget(name, actual.dtype, eager_error, scale)
    assert actual_error.max() <= budget, (
        f"{name}: error {actual_error.max():.3e} exceeds {budget:.3e} (eager: {eager_error:.3e}, "
        f"scale {scale:.3e}) in shape {tuple(actual.shape)} at flat index {actual_error.argmax()}"
    )


def incoming_gradients(inputs: Inputs, need_weights: bool, seed: int = 1) -> dict[str, Tensor]:
    """Random incoming gradients, in value's dtype, of the context and the weights."""
    generator = torch.Generator("cpu").manual_seed(seed)
    results = formula(inputs, inputs.leaves)[: 2 if need_weights else 1]
    return {
        name: randn(tuple(result.shape), generator).to(result)
        for name, result in zip(("context", "weights"), results)
    }


def call(inputs: Inputs, leaves: dict[str, Tensor], **keywords: object):
    """``attn_ext.additive_attention`` as ``(context, weights or None)``, nested ones as values."""
    result = attn_ext.additive_attention(*inputs.arguments(leaves), **inputs.keywords, **keywords)
    context, weights = result if isinstance(result, tuple) else (result, None)
    assert context.is_nested == (inputs.offsets_q is not None)
    return context.values() if context.is_nested else context, weights


# How many calculations with random roundings tell whether eager's error was small by luck: more,
# look after look, while a result exceeds the budget. Of thousands of random calls some err as only
# one calculation in fifty does.
LOOKS = (0, 16, 64)


def check(
    inputs: Inputs,
    backend: str,
    *,
    need_weights: bool = True,
    wanted: Sequence[str] = INPUT_NAMES,
    incoming: dict[str, Tensor] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    function: Callable[..., tuple[Tensor, Tensor | None]] = call,
) -> Results:
    """Compare results and gradients with the float64 yardstick; return them.

    Args:
        inputs: what to call with.
        backend: its name.
        need_weights: ask for weights, and differentiate through them too.
        wanted: inputs that require gradients.
        incoming: gradients of context (and weights); None draws them.
        dropout_p: drop with this probability, the seed being set to ``seed``.
        seed: for dropout.
        function: called as :func:`call`.
    """
    require_dtype(backend, inputs.leaves["query"].dtype)
    if incoming is None:
        incoming = incoming_gradients(inputs, need_weights)
    keywords = {"backend": backend, "need_weights": need_weights}
    keep = None
    if dropout_p:
        keep = draw_keep(inputs, dropout_p, seed)
        keywords["dropout_p"] = dropout_p
    actual = differentiate(
        lambda leaves: function(inputs, leaves, **keywords), inputs.leaves, incoming, wanted
    )
    judge(inputs, actual, incoming, wanted, keep, dropout_p)
    return actual


def check_scores(
    inputs: Inputs,
    backend: str,
    *,
    alone: bool = False,
    incoming: Tensor | None = None,
    function: Callable[..., Tensor] = attn_ext.additive_scores,
) -> None:
    """Compare scores and their gradients with the float64 yardstick.

    Args:
        inputs: what to call with.
        backend: its name.
        alone: call without a query, as if it were 0.
        incoming: gradient of the scores; None draws it.
        function: called as ``attn_ext.additive_scores``.
    """
    require_dtype(backend, inputs.leaves["query"].dtype)
    inputs = replace(inputs, scores_alone=True)
    if alone:
        inputs = inputs.with_leaves(query=torch.zeros_like(inputs.leaves["query"]))
    ones = inputs.with_leaves(score_weight=torch.zeros_like(inputs.leaves["score_weight"]))
    present = formula(replace(ones, scores_alone=False), ones.leaves)[1] != 0

    def call_scores(leaves: dict[str, Tensor]) -> tuple[None, Tensor]:
        query, key, _, score_weight = inputs.arguments(leaves)
        scores = function(
            None if alone else query, key, score_weight, backend=backend, **inputs.keywords
        )
        assert torch.equal(scores == -torch.inf, ~present), "-inf elsewhere than for absent keys"
        # What comes in for absent ones must not matter.
        scores.register_hook(lambda gradient: gradient.masked_fill(~present, torch.nan))
        return None, scores.masked_fill(~present, 0)

    wanted = ("key", "score_weight") if alone else ("query", "key", "score_weight")
    scores = formula(inputs, inputs.leaves)[1]
    if incoming is None:
        incoming = randn(scores.shape, torch.Generator("cpu").manual_seed(1)).to(scores)
    gradients = {"weights": incoming}
    actual = differentiate(call_scores, inputs.leaves, gradients, wanted)
    judge(inputs, {n: actual[n] for n in actual if n != "context"}, gradients, wanted)


def judge(
    inputs: Inputs,
    actual: Results,
    incoming: dict[str, Tensor],
    wanted: Sequence[str],
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Compare with the yardsticks, which look closer while a result exceeds the budget."""
    for samples in LOOKS:
        measures = yardsticks(inputs, incoming, wanted, keep, dropout_p, samples)
        try:
            compare(inputs, actual, *measures)
        except AssertionError:  # eager may have been right by luck
            if samples == LOOKS[-1]:
                raise
        else:
            break


def compare(inputs: Inputs, actual: Results, exact: Results, eager: Results) -> None:
    """Hold every result to the budget, and what belongs to nobody to exact zeros."""
    for name, result in actual.items():
        assert result is not None, f"{name}: no gradient arrived"
        expected_dtype = inputs.leaves[name[1:] if name[1:] in INPUT_NAMES else "value"].dtype
        if inputs.scores_alone and name == "weights":
            expected_dtype = compute_dtype(expected_dtype)
        assert result.dtype == expected_dtype, f"{name}: {result.dtype}, not {expected_dtype}"
        assert_within_budget(name, result, exact[name], eager[name])
    live = [len(columns) > 0 for columns in inputs.columns]
    queries = inputs.owned("query", [row for row, lives in zip(inputs.query_rows, live) if lives])
    keys = inputs.owned("key", inputs.key_rows)
    for name, owned in (
        ("context", queries),
        ("dquery", queries),
        ("dkey", keys),
        ("dvalue", keys),
    ):
        if name in actual:
            assert (actual[name][~owned] == 0).all(), f"{name}: rows of nobody are not exactly 0"
    if "weights" in actual:
        outside = actual["weights"][exact["weights"] == 0]
        assert (outside == 0).all(), "weights: not exactly 0 where nothing is attended"
