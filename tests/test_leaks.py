"""Thousands of calls, many of which fail, leave no memory behind, and need no garbage collector."""

import gc
import itertools
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from helpers import call
from layouts import INPUT_NAMES, Inputs, make_inputs
from torch import Tensor

import attn_ext

CALLS = 10_000
LOOPS = 1_000
STEPS = 5
LAYOUTS = ("padded_mask", "jagged", "nested", "jagged_one_step")
# The smallest tensors of the calls, the softmax statistics, would take 6 MiB if they stayed.
LENGTHS = {"lengths_q": (40, 0, 30), "lengths_k": (20, 3, 17)}
ALLOWED_GROWTH = 4 << 20  # bytes, for fragments and the like


class Refusal(Exception):
    """What goes wrong in the middle of a backward pass here."""


def refuse(gradient: Tensor) -> None:
    raise Refusal


def bytes_in_use() -> int:
    """Memory of this process, and of its GPU's tensors."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return pages * resource.getpagesize() + on_gpu


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def assert_leaves_nothing(times: int, function: Callable[[int], None]) -> None:
    """Call ``function(n)`` that often; the first fifth is warm-up."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the process's memory from /proc")
    warm_up = times // 5
    with without_collector():
        for n in range(warm_up):
            function(n)
        tensors, before = live_tensors(), bytes_in_use()
        for n in range(warm_up, times):
            function(n)
        growth = bytes_in_use() - before
        assert live_tensors() == tensors
    assert growth < ALLOWED_GROWTH, f"{growth / 2**20:.1f} MiB more in use"


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: leaf.clone().requires_grad_() for name, leaf in inputs.leaves.items()}


# ---- What a program may do with the result of a call; each takes the inputs and the leaves. ----


def differentiate(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> None:
    context, weights = call(inputs, leaves, need_weights=True, **keywords)
    (context.sum() + weights.sum()).backward()
    for leaf in leaves.values():
        leaf.grad = None


def differentiate_twice(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> None:
    loss = call(inputs, leaves, **keywords)[0].sum()
    for retain_graph in (True, False):
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=retain_graph)
    with suppress(RuntimeError):  # the graph is gone
        loss.backward()


def differentiate_the_gradient(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> None:
    loss = call(inputs, leaves, **keywords)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, leaves["query"], create_graph=True)
    with suppress(RuntimeError):  # no second derivative
        gradient.sum().backward()


def drop_the_result(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> None:
    call(inputs, leaves, dropout_p=0.5, **keywords)


def be_refused_before(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> None:
    context = call(inputs, leaves, **keywords)[0]
    context.register_hook(refuse)
    with suppress(Refusal):
        context.sum().backward()


def be_refused_after(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> None:
    query = leaves["query"] * 1
    query.register_hook(refuse)
    with suppress(Refusal):
        call(inputs, {**leaves, "query": query}, **keywords)[0].sum().backward()
    for leaf in leaves.values():
        leaf.grad = None


def call_wrongly(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> None:
    with suppress(ValueError):
        call(inputs, {**leaves, "score_weight": leaves["score_weight"][:-1]}, **keywords)


USES = (
    *(differentiate, differentiate_twice, differentiate_the_gradient, drop_the_result),
    *(be_refused_before, be_refused_after, call_wrongly),
)


def test_calls(kernel_backend: str):
    inputs = [make_inputs(layout, features=24, value_features=24, **LENGTHS) for layout in LAYOUTS]
    leaves = [leaves_of(each) for each in inputs]
    pairs = list(itertools.product(range(len(inputs)), USES))

    def use(n: int) -> None:
        which, function = pairs[n % len(pairs)]
        function(inputs[which], leaves[which], backend=kernel_backend)

    assert_leaves_nothing(CALLS, use)


# ---- Decoder loops ----


class Decoder:
    """A loop over a memory of its own or a given one."""

    def __init__(self, backend: str):
        self.inputs = make_inputs("jagged_one_step", features=64, value_features=64, **LENGTHS)
        self.leaves = leaves_of(self.inputs)
        self.backend = backend

    def memory(self) -> attn_ext.AttentionMemory:
        key_side = (self.leaves[name] * 1 for name in INPUT_NAMES[1:])
        return attn_ext.AttentionMemory(*key_side, **self.inputs.keywords, backend=self.backend)

    def steps(self, memory: attn_ext.AttentionMemory) -> tuple[list[Tensor], list[Tensor]]:
        queries = [self.leaves["query"] * (1 + t) for t in range(STEPS)]
        return queries, [memory.attend(query) for query in queries]

    def forget(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def learn(self) -> None:
        sum(context.sum() for context in self.steps(self.memory())[1]).backward()

    def learn_of_some_steps(self) -> None:
        sum(context.sum() for context in self.steps(self.memory())[1][::2]).backward()

    def learn_step_by_step(self) -> None:
        for context in self.steps(self.memory())[1]:
            context.sum().backward(retain_graph=True)

    def learn_nothing(self) -> None:
        self.steps(self.memory())

    def attend_wrongly(self) -> None:
        memory = self.memory()
        with suppress(ValueError):
            memory.attend(self.leaves["query"][:, :-1])

    def be_refused(self) -> None:
        self.be_refused_by(self.memory())

    def be_refused_by(self, memory: attn_ext.AttentionMemory) -> None:
        """The last steps have left their gradients with the memory, the first ones never will."""
        queries, contexts = self.steps(memory)
        queries[STEPS // 2].register_hook(refuse)
        with suppress(Refusal):
            sum(context.sum() for context in contexts).backward()


def test_decoder_loops(kernel_backend: str):
    decoder = Decoder(kernel_backend)
    uses = (
        *(decoder.learn, decoder.learn_of_some_steps, decoder.learn_step_by_step),
        *(decoder.learn_nothing, decoder.attend_wrongly, decoder.be_refused),
    )

    def use(n: int) -> None:
        uses[n % len(uses)]()
        decoder.forget()

    assert_leaves_nothing(LOOPS, use)


def test_failed_backward_passes_leave_nothing_with_their_memory(kernel_backend: str):
    decoder = Decoder(kernel_backend)
    memory = decoder.memory()

    def use(n: int) -> None:
        decoder.be_refused_by(memory)
        decoder.forget()

    assert_leaves_nothing(LOOPS, use)
