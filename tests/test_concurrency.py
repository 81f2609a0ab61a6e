"""Calls from many threads, and processes that fork, spawn, are interrupted, or end meanwhile."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import process_worker
import pytest
import torch
from helpers import call, incoming_gradients, require_backend
from layouts import INPUT_NAMES, Inputs, make_inputs
from torch import Tensor

import attn_ext

CALLERS = 8
ROUNDS = 3
LENGTHS = {"lengths_q": (9, 0, 30, 17), "lengths_k": (40, 3, 0, 61)}
Results = tuple[Tensor, ...]


@pytest.fixture(params=[1, 4], ids=lambda n: f"threads={n}")
def threads(request: pytest.FixtureRequest):
    """How many threads an operation of PyTorch may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def at_once(functions: Sequence[Callable[[], Results]], rounds: int = ROUNDS) -> list[Results]:
    """Call each function in a thread of its own, all at the same time; the last results."""
    start = threading.Barrier(len(functions))
    found: list = [None] * len(functions)

    def run(n: int, function: Callable[[], Results]) -> None:
        start.wait()
        for _ in range(rounds):
            found[n] = function()

    callers = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return found


def assert_same(found: list[Results], serial: list[Results]) -> None:
    for caller, (results, expected) in enumerate(zip(found, serial, strict=True)):
        assert results is not None, f"caller {caller} failed"
        assert all(map(torch.equal, results, expected)), f"caller {caller}: other results"


def some_inputs(seed: int, layout: str = "jagged", features: int = 64) -> Inputs:
    return make_inputs(layout, features=features, value_features=48, seed=seed, **LENGTHS)


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: leaf.clone().requires_grad_() for name, leaf in inputs.leaves.items()}


def results_of(inputs: Inputs, leaves: dict[str, Tensor], seed: int, backend: str) -> Results:
    """The context, the weights and all gradients; ``seed`` draws the incoming ones."""
    context, weights = call(inputs, leaves, need_weights=True, backend=backend)
    incoming = incoming_gradients(inputs, True, seed)
    gradients = torch.autograd.grad(
        (context, weights),
        [leaves[name] for name in INPUT_NAMES],
        (incoming["context"], incoming["weights"]),
    )
    return context.detach(), weights.detach(), *gradients


def test_threads_with_inputs_of_their_own(backend: str, threads: None):
    layouts = ("padded_mask", "jagged", "nested", "padded_lengths")

    def caller(n: int) -> Callable[[], Results]:
        inputs = some_inputs(n, layouts[n % len(layouts)], features=40 + 8 * n)
        leaves = leaves_of(inputs)
        return lambda: results_of(inputs, leaves, n, backend)

    callers = [caller(n) for n in range(CALLERS)]
    serial = [function() for function in callers]
    assert_same(at_once(callers), serial)


def test_threads_with_the_same_inputs(backend: str, threads: None):
    inputs = some_inputs(0)
    leaves = leaves_of(inputs)
    callers = [
        lambda seed=seed: results_of(inputs, leaves, seed, backend) for seed in range(CALLERS)
    ]
    serial = [function() for function in callers]
    assert_same(at_once(callers), serial)


def test_threads_that_accumulate_into_the_same_leaves(backend: str, threads: None):
    """Sums of equal gradients, one addition after the other, do not depend on the order."""
    inputs = some_inputs(0)
    incoming = incoming_gradients(inputs, False)["context"]

    def caller(leaves: dict[str, Tensor]) -> Results:
        call(inputs, leaves, backend=backend)[0].backward(incoming)
        return ()

    serial, shared = leaves_of(inputs), leaves_of(inputs)
    for _ in range(CALLERS * ROUNDS):
        caller(serial)
    at_once([lambda: caller(shared)] * CALLERS)
    for name, leaf in shared.items():
        assert torch.equal(leaf.grad, serial[name].grad), name


def test_threads_that_share_a_memory(backend: str, threads: None):
    """Each makes steps of its own and differentiates them, in the key side too."""
    inputs = make_inputs("one_step_lengths", lengths_k=(70, 3, 0, 120), features=64)
    leaves = leaves_of(inputs)
    key_side = [leaves[name] for name in INPUT_NAMES[1:]]
    memory = attn_ext.AttentionMemory(*key_side, **inputs.keywords, backend=backend)

    def caller(n: int) -> Callable[[], Results]:
        queries = [
            (torch.randn_like(inputs.leaves["query"]) + n).requires_grad_() for _ in range(1 + n)
        ]

        def decode() -> Results:
            contexts = [memory.attend(query) for query in queries]
            loss = sum(context.square().sum() for context in contexts)
            return *contexts, *torch.autograd.grad(loss, [*queries, *key_side])

        return decode

    callers = [caller(n) for n in range(CALLERS)]
    serial = [function() for function in callers]
    assert_same(at_once(callers), serial)


# ---- Processes ----


def run_process(scenario: Callable[[], None]) -> subprocess.CompletedProcess:
    """Run a scenario of ``process_worker``; the time limit is there to end a process that hangs."""
    require_backend("cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": str(process_worker.THREADS)}
    command = [sys.executable, process_worker.__file__, scenario.__name__]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240)


@pytest.mark.parametrize(
    "scenario",
    [
        *([process_worker.fork, process_worker.forked_loader] if hasattr(os, "fork") else []),
        process_worker.spawn,
        process_worker.interrupts,
        process_worker.exit_during_a_long_call,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_process_of_threads(scenario: Callable[[], None]):
    process = run_process(scenario)
    assert process.returncode == 0, process.stderr


def test_exit_waits_for_threads():
    process = run_process(process_worker.exit_with_threads_at_work)
    assert (process.returncode, process.stdout) == (0, "right\n"), process.stderr


def test_exit_between_calls_of_threads():
    """No hang and no fault. Before Python 3.14, PyTorch aborts: any of its operations does, where
    a daemon thread is in it (github.com/pytorch/pytorch/issues/38228)."""
    process = run_process(process_worker.exit_between_many_calls)
    aborts = process.returncode == -signal.SIGABRT and sys.version_info < (3, 14)
    by_pytorch = aborts and "terminate called without an active exception" in process.stderr
    assert process.returncode == 0 or by_pytorch, process.stderr
