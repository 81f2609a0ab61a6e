"""What the suite's small shapes do not reach: several tiles, splits and waves of the CUDA kernels.

Run by ``tests/test_cuda_emulation.py`` under the plugin ``emulated_cuda``.
"""

import ctypes
import os
from contextlib import contextmanager
from dataclasses import replace

import emulated_cuda
import pytest
import torch
from helpers import assert_within_budget, call, check, check_scores, incoming_gradients
from layouts import INPUT_NAMES, LENGTHS_K, Inputs, make_inputs
from test_pool import check as check_pool
from test_pool import check_scores as check_pool_scores
from test_pool import make_bags
from yardstick import Results, differentiate

import attn_ext

LONG_Q = (70, 0, 33, 1, 49)  # past one tile of 32, and of 48, queries
LONG_K = (130, 5, 40, 0, 65)


@contextmanager
def environment(**variables: str):
    """Environment variables that the emulation reads at every launch."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def large_inputs(layout: str, **options) -> Inputs:
    sizes = {"lengths_q": LONG_Q, "lengths_k": LONG_K, "features": 200, "value_features": 136}
    return make_inputs(layout, **{**sizes, **options})


# 1: blocks go through many tiles. 64: as many blocks as there are tiles, partial gradients merged.
@pytest.mark.parametrize("processors", ["1", "64"])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("layout", ["padded_mask", "jagged", "nested_keys"])
def test_several_tiles(layout: str, heads: int | None, processors: str):
    with environment(ATTN_EXT_EMULATED_PROCESSORS=processors):
        check(large_inputs(layout, heads=heads), "cuda", dropout_p=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("strides", ["contiguous", "sliced"])
@pytest.mark.parametrize("layout", ["padded_lengths", "jagged", "jagged_one_step"])
def test_several_tiles_of_low_precision(layout: str, strides: str, dtype: torch.dtype):
    lengths_k = (130, 70, 0) if "one_step" in layout else LONG_K
    check(large_inputs(layout, lengths_k=lengths_k, dtype=dtype, strides=strides), "cuda")


@pytest.mark.parametrize("processors", ["1", "64"])
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_long_steps(layout: str, processors: str):
    """Past the keys of a block, which splits over blocks are merged from."""
    inputs = make_inputs(
        layout, lengths_k=(700, 3, 0, 300), features=24, value_features=72, heads=2
    )
    with environment(ATTN_EXT_EMULATED_PROCESSORS=processors):
        check(inputs, "cuda", dropout_p=0.3)


@pytest.mark.parametrize("processors", ["1", "64"])
@pytest.mark.parametrize("layout", ["padded_mask", "jagged", "nested_keys", "jagged_one_step"])
def test_scores_of_several_tiles(layout: str, processors: str):
    lengths_k = (130, 70, 0) if "one_step" in layout else LONG_K
    with environment(ATTN_EXT_EMULATED_PROCESSORS=processors):
        check_scores(large_inputs(layout, lengths_k=lengths_k, heads=2), "cuda")


@pytest.mark.parametrize("layout", ["padded_mask", "one_step_mask", "jagged_one_step"])
def test_gradients_of_scores_need_not_sum_to_0(layout: str):
    """As those of a softmax do, which dquery relies on where every tanh is small."""
    inputs = make_inputs(layout, features=24, scale=1e-3)
    query, key, _, weight = inputs.leaves.values()

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in (query, key, weight)]
        scores = attn_ext.additive_scores(*leaves, backend=backend, **inputs.keywords)
        scores.masked_fill(scores == -torch.inf, 0).sum().backward()
        return [leaf.grad for leaf in leaves]

    runs = (
        run("cuda", torch.float32),
        run("reference", torch.float64),
        run("reference", query.dtype),
    )
    for name, *results in zip(("dquery", "dkey", "dscore_weight"), *runs):
        assert_within_budget(name, *results)


@pytest.mark.parametrize("step", ["padded", "masked", "jagged"])
def test_gradients_that_a_step_of_scores_leaves(step: str):
    """Those that come in, in the places of the keys, and 0 for keys that are not attended to."""
    mask = torch.rand(3, 150) < (0.4 if step == "masked" else 0)
    mask[1] = step == "masked"
    key = torch.randn(3, 150, 2, 24)
    layout = None, None, mask if step == "masked" else None
    dscores = torch.randn(3, 2, 1, 150)
    expected = dscores[:, :, 0].transpose(1, 2).masked_fill(mask[:, :, None], 0)
    dscores = dscores.masked_fill(mask[:, None, None], torch.nan)
    if step == "jagged":
        key = key.reshape(1, 450, 2, 24)
        layout = torch.tensor([0, 150, 150, 440]), None, None
        dscores = torch.randn(450, 2)
        expected = dscores[None].clone()
        expected[:, 440:] = 0
        dscores[440:] = torch.nan
    query, value = torch.randn(3, 1, 2, 24), key[..., :5]
    inputs = query, key, value, torch.randn(2, 24)
    rest = *layout, 290, 0.0, None, 4 + (2 if step == "jagged" else 1), 15, False, "cuda"
    _, left, weights = torch.ops.attn_ext_cuda.additive_attention_step_backward(
        None, dscores, *inputs, None, None, torch.empty(0, 0, 0, 2), torch.empty(0), *rest
    )
    assert torch.equal(left, expected) and not weights.any()


@pytest.mark.parametrize("processors", ["1", "64"])
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_pool_of_several_tiles(layout: str, processors: str):
    """Past the keys of a block, the features of a warp, the branches that are summed at once."""
    sizes = {"lengths_k": (700, 3, 0, 300), "features": 300, "value_features": 72}
    bags = make_bags(layout, branches=6, **sizes)
    with environment(ATTN_EXT_EMULATED_PROCESSORS=processors):
        check_pool(replace(bags, feature_dropout=(0.2, 0.3), dropout=0.3), "cuda")
        check_pool_scores(bags, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("features", [1, 64, 257])
def test_features_of_a_pool(features: int, dtype: torch.dtype):
    check_pool(make_bags(branches=2, features=features, dtype=dtype), "cuda")


def test_pool_of_heads_with_branches():
    """Which vmap makes of its calls: each head is as a call of its own."""
    leaves = (*torch.randn(3, 3, 2, 70, 9).unbind(0), torch.randn(3, 2, 9))

    def gradients(key, gate, value, weight):
        def loss(key, gate, value, weight):
            context, weights = attn_ext.additive_pool(
                key, value, weight, gate=gate, need_weights=True, backend="cuda"
            )
            return context.cos().sum() + weights.square().sum()

        return torch.func.grad_and_value(loss, (0, 1, 2, 3))(key, gate, value, weight)

    each, losses = zip(*(gradients(*call) for call in zip(*leaves, strict=True)))
    found, loss = torch.vmap(gradients)(*leaves)
    torch.testing.assert_close(loss, torch.stack(losses))
    torch.testing.assert_close(found, tuple(torch.stack(column) for column in zip(*each)))


@pytest.mark.parametrize("scale", [1e-3, 12.0], ids=["small", "large"])
@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step"])
def test_several_tiles_of_the_exact_route(layout: str, scale: float):
    lengths_k = (130, 70, 0) if "one_step" in layout else LONG_K
    inputs = large_inputs(layout, lengths_k=lengths_k, scale=scale)
    with environment(ATTN_EXT_EMULATED_PROCESSORS="64"):
        check(inputs, "cuda")


def test_mixed_routes():
    """One sequence small, one out of range, one between, and rows of all three kinds in one."""
    inputs = large_inputs("jagged")
    for name, lengths in (("query", LONG_Q), ("key", LONG_K)):
        rows = inputs.leaves[name].split([*lengths, 2])
        rows[0][::3] *= 20
        rows[0][1::3] *= 1e-3
        rows[2].mul_(1e-3)
        rows[4].mul_(20)
    check(inputs, "cuda")


@pytest.mark.parametrize("features, value_features", [(1, 1), (63, 65), (2, 300), (65, 2100)])
def test_feature_counts(features: int, value_features: int):
    sizes = {"features": features, "value_features": value_features}
    check(make_inputs("jagged", **sizes), "cuda")
    check(make_inputs("one_step_lengths", lengths_k=LENGTHS_K, **sizes), "cuda")


def results_of(inputs: Inputs, function=call) -> Results:
    torch.manual_seed(3)
    keywords = {"backend": "cuda", "need_weights": True, "dropout_p": 0.1}
    return differentiate(
        lambda leaves: function(inputs, leaves, **keywords),
        inputs.leaves,
        incoming_gradients(inputs, True),
    )


@pytest.mark.parametrize("layout", ["padded_mask", "jagged", "jagged_one_step"])
def test_order_of_threads_changes_no_bit(layout: str):
    """What differs when a block's threads run in the opposite order is a race."""
    lengths_k = (130, 70, 0) if "one_step" in layout else LONG_K
    inputs = large_inputs(layout, lengths_k=lengths_k, heads=2)
    with environment(ATTN_EXT_EMULATED_PROCESSORS="64"):
        forwards = results_of(inputs)
        with environment(ATTN_EXT_EMULATED_ORDER="reversed"):
            backwards = results_of(inputs)
    for name, result in forwards.items():
        assert torch.equal(result, backwards[name]), name


@pytest.mark.parametrize("branches", [1, 6])
def test_order_of_threads_changes_no_bit_of_a_pool(branches: int):
    key, gate = torch.randn(2, 1, 400, 1, 300).unbind(0)
    inputs = key, key[..., :20], torch.randn(1, branches, 300), gate
    layout = torch.tensor([0, 300, 300, 390]), None, None, 300
    rest = *layout, 0.1, 0.2, 0.3, torch.tensor([5]), 2
    ops = torch.ops.attn_ext_cuda

    def run(keep_scores: bool) -> list[torch.Tensor]:
        context, weights, *kept = ops.additive_pool_forward(
            *inputs, *rest, keep_scores, False, "cuda"
        )
        before = [tensor.clone() for tensor in kept]
        gradients = ops.additive_pool_backward(
            context, weights, *inputs, *kept, *rest, 30, False, "cuda"
        )
        assert all(map(torch.equal, kept, before)), "backward writes to what forward left"
        return [context, weights, kept[0], *gradients]

    with environment(ATTN_EXT_EMULATED_PROCESSORS="64"):
        forwards = run(True)
        with environment(ATTN_EXT_EMULATED_ORDER="reversed"):
            backwards = run(False)
    assert all(map(torch.equal, forwards, backwards))


def memory_call(inputs: Inputs, leaves, steps: int):
    query, key, value, score_weight = (leaves[name] for name in INPUT_NAMES)
    memory = attn_ext.AttentionMemory(key, value, score_weight, **inputs.keywords, backend="cuda")
    return torch.stack([memory.attend(query * (1 + step / steps)) for step in range(steps)])


@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_memory_of_many_steps(layout: str):
    """More steps than the gradient kernel takes queries at a time, against separate calls."""
    inputs = make_inputs(layout, lengths_k=(40, 0, 17), features=72, value_features=8, heads=2)
    steps = 60

    def separate(leaves):
        scaled = ({**leaves, "query": leaves["query"] * (1 + n / steps)} for n in range(steps))
        return torch.stack([call(inputs, each, backend="cpu")[0] for each in scaled]), None

    incoming = {"context": torch.randn(steps, *inputs.leaves["query"].shape[:-1], 8)}
    collected = differentiate(
        lambda leaves: (memory_call(inputs, leaves, steps), None), inputs.leaves, incoming
    )
    expected = differentiate(separate, inputs.leaves, incoming)
    for name, result in collected.items():
        torch.testing.assert_close(result, expected[name], rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "offsets",
    [(0, 9, 4, 20), (0, -5, 10**9, 20), (3, 3, 100, 7), (12, 13, 15, 20), (10**9, 0, 5, 20)],
    ids=["falling", "wild", "beyond", "late", "later"],
)
@pytest.mark.parametrize("side", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("count", [20, 200], ids=["in_order", "as_they_come"])
def test_corrupt_offsets_stay_inside_the_tensors(count: int, side: str, offsets: tuple[int, ...]):
    """Nobody reads them first on a GPU. What lies around the tensors is NaN, so seen if read."""
    good = torch.tensor([0, 7, 9, 20])
    layout = {"cu_seqlens_q": good, "cu_seqlens_k": good, side: torch.tensor(offsets)}
    rows = (layout["cu_seqlens_q"], layout["cu_seqlens_k"], None, None, 20, 20, 0.0, None, 1)
    guard = 1000
    room = torch.full((count + 2 * guard, 1, 24), torch.nan)
    query = room[guard : guard + count][None].normal_()
    inputs = query, query, query, torch.ones(1, 24)
    ops = torch.ops.attn_ext_cuda
    context, weights, *kept = ops.additive_attention_forward(
        *inputs, None, None, *rows, False, False, "cuda"
    )
    assert context.isfinite().all() and weights.isfinite().all()
    gradients = ops.additive_attention_backward(
        context, weights, *inputs, *kept, *rows, 15, False, "cuda"
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert room[:guard].isnan().all() and room[guard + count :].isnan().all()


@pytest.mark.parametrize(
    "offsets", [(0, 90, 40, 200), (0, -5, 10**9, 200), (3, 3, 100, 7), (10**9, 0, 5, 200)]
)
@pytest.mark.parametrize("keep_scores", [False, True])
def test_corrupt_offsets_of_a_pool(keep_scores: bool, offsets: tuple[int, ...]):
    """As above; the scores are those of forward, or computed again."""
    guard = 1000
    room = torch.full((200 + 2 * guard, 1, 24), torch.nan)
    key = room[guard : guard + 200][None].normal_()
    inputs = key, key, torch.ones(1, 5, 24), key
    rest = torch.tensor(offsets), None, None, 200, 0.1, 0.2, 0.3, torch.tensor([5]), 2
    ops = torch.ops.attn_ext_cuda
    context, weights, stats, scores = ops.additive_pool_forward(
        *inputs, *rest, keep_scores, False, "cuda"
    )
    assert context.isfinite().all() and weights.isfinite().all()
    assert scores.numel() == 1000 * keep_scores
    dcontext = torch.randn_like(context)
    gradients = ops.additive_pool_backward(
        dcontext, weights, *inputs, stats, scores, *rest, 30, False, "cuda"
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert room[:guard].isnan().all() and room[guard + 200 :].isnan().all()


@pytest.mark.parametrize("one_step", [False, True], ids=["rows", "one_step"])
def test_rows_without_any_sequence_belong_to_nobody(one_step: bool):
    """Offsets of a batch of none; results and gradients of the rows beside it are 0."""
    offsets = torch.tensor([0, 64])[:1]  # what lies behind must not be read as offsets
    query = torch.randn(0 if one_step else 1, 1 if one_step else 64, 1, 8)
    key = torch.randn(1, 64, 1, 8)
    inputs = query, key, torch.randn_like(key), torch.ones(1, 8)
    rows = (None if one_step else offsets, offsets, None, None, 1 if one_step else 64, 64)
    dropout = 0.0, None, 2 if one_step else 1
    ops = torch.ops.attn_ext_cuda
    forward = ops.additive_attention_forward(
        *inputs, None, None, *rows, *dropout, False, False, "cuda"
    )
    context, weights, *kept = forward
    gradients = ops.additive_attention_backward(
        torch.randn_like(context), weights, *inputs, *kept, *rows, *dropout, 15, False, "cuda"
    )
    for result, like in zip(gradients, inputs, strict=True):
        assert result.shape == like.shape
    assert not any(result.any() for result in (*forward, *gradients))


def test_a_failed_launch_is_reported_once():
    """CUDA remembers an error until it is asked: the next call must not take it for its own."""
    inputs = make_inputs("padded")
    with environment(ATTN_EXT_EMULATED_FAILURE="1"):
        with pytest.raises(RuntimeError, match="scores: invalid configuration"):
            call(inputs, inputs.leaves, backend="cuda")
    assert ctypes.CDLL(str(emulated_cuda.build())).emulated_last_error() == 0
    call(inputs, inputs.leaves, backend="cuda")


@pytest.mark.parametrize("layout", ["padded_mask", "one_step_mask"])
def test_mask_of_more_keys_than_threads(layout: str):
    """Each thread of a block lists a slice of the keys, here two."""
    inputs = make_inputs(layout, lengths_q=(2, 1), lengths_k=(500, 512), features=4)
    check(inputs, "cuda")
