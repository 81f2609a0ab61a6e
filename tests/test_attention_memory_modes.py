"""``attn_ext.AttentionMemory`` under the modes of autograd, in threads, and when it is freed."""

import gc
import threading
import weakref

import pytest
import torch
from decoders import (
    KEY_SIDE,
    STEP_LAYOUTS,
    Step,
    check_program,
    compare,
    decoding_with_weights,
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
from helpers import assert_within_budget
from torch import Tensor
from yardstick import Results


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
