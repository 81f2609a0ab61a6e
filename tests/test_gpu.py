"""What only a GPU shows: real sizes, CUDA graphs, streams; that nothing waits for the device."""

from collections.abc import Iterator

import pytest
import torch
from helpers import check, require_backend
from layouts import make_inputs
from torch import Tensor

import attn_ext
from attn_ext import AttentionMemory, compat

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that PyTorch can use", allow_module_level=True)

DIM, BOUND = 96, 40


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with torch.device("cuda"):
        yield require_backend(request.param)


def random_batch(lengths_q: list[int], lengths_k: list[int], rows: int) -> dict[str, Tensor]:
    """Static buffers of a jagged batch: ``rows`` rows a side, however many belong to sequences."""
    return {
        "query": torch.randn(rows, DIM, requires_grad=True),
        "key": torch.randn(rows, DIM, requires_grad=True),
        "value": torch.randn(rows, DIM, requires_grad=True),
        "score_weight": torch.randn(DIM, requires_grad=True),
        "cu_seqlens_q": offsets(lengths_q),
        "cu_seqlens_k": offsets(lengths_k),
    }


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def attend(batch: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Context and all gradients of a call that may not wait for the device."""
    batch = dict(batch)
    inputs = [batch.pop(name) for name in ("query", "key", "value", "score_weight")]
    context = attn_ext.additive_attention(
        *inputs, **batch, max_seqlen_q=BOUND, max_seqlen_k=BOUND, backend=backend
    )
    return [context.detach(), *torch.autograd.grad(context.square().sum(), inputs)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["jagged", "padded_mask", "one_step", "jagged_one_step"])
def test_real_sizes(backend: str, layout: str, dtype: torch.dtype):
    lengths = {"lengths_q": (75, 0, 28, 12), "lengths_k": (60, 75, 0, 33)}
    inputs = make_inputs(layout, features=1024, value_features=1000, dtype=dtype, **lengths)
    check(inputs, backend)


@pytest.mark.parametrize("length", [1000, 20_000])
def test_one_query_over_many_keys(backend: str, length: int):
    check(make_inputs("jagged_one_step", features=512, lengths_k=(length, 0, 8)), backend)


def test_long_sequences_on_both_sides(backend: str):
    check(make_inputs("jagged", features=64, lengths_q=(300, 2), lengths_k=(700, 3)), backend)


def test_more_sequences_than_a_grid_axis_holds(backend: str):
    batch = 70_000
    key = torch.randn(2 * batch, 8)
    query = torch.randn(batch, 8)
    cu = torch.arange(batch + 1) * 2
    keywords = {"cu_seqlens_k": cu, "max_seqlen_k": 2}
    weight = torch.randn(8)
    actual = attn_ext.additive_attention(query, key, key, weight, backend=backend, **keywords)
    expected = attn_ext.reference.additive_attention(query, key, key, weight, **keywords)
    assert_close([actual], [expected])


def test_more_elements_than_32_bits_count(backend: str):
    """The last sequence lies beyond 2^31 elements of key and value."""
    rows, last = (2**31 >> 10) + 64, 32
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GB of free GPU memory")
    key = torch.zeros(rows, 1024, dtype=torch.bfloat16)
    key[-last:].normal_()
    query = torch.randn(2, 1024, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, dtype=torch.bfloat16) * 0.1
    cu = torch.tensor([0, rows - last, rows])
    context = attn_ext.additive_attention(
        query, key, key, weight, cu_seqlens_k=cu, max_seqlen_k=rows, backend=backend
    )
    exact = attn_ext.reference.additive_attention(
        query[1:].float(), key[None, -last:].float(), key[None, -last:].float(), weight.float()
    )
    torch.testing.assert_close(context[1:].float(), exact, rtol=2e-2, atol=2e-2)
    context.sum().backward()
    assert query.grad.isfinite().all()


def test_nothing_waits_for_the_device(backend: str):
    batch = random_batch([3, 0, 40], [7, 2, 33], rows=50)
    step = torch.randn(3, DIM, requires_grad=True)
    attend(batch, backend)  # compiles, and fills the allocator's cache
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(batch, backend)
        memory = AttentionMemory(
            batch["key"],
            batch["value"],
            batch["score_weight"],
            cu_seqlens_k=batch["cu_seqlens_k"],
            max_seqlen_k=BOUND,
            dropout_p=0.1,
            backend=backend,
        )
        sum(memory.attend(step).sum() for _ in range(2)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replayed_with_other_offsets(backend: str):
    """Offsets and inputs change in place between replays; rows past the last offset get 0."""
    batch = random_batch([3, 0, 40], [7, 2, 33], rows=60)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(batch, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = attend(batch, backend)
    for lengths_q, lengths_k in (([3, 0, 40], [7, 2, 33]), ([20, 20, 20], [0, 40, 1])):
        with torch.no_grad():
            batch["cu_seqlens_q"].copy_(offsets(lengths_q))
            batch["cu_seqlens_k"].copy_(offsets(lengths_k))
            batch["query"].normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert_close(results, attend(batch, "reference"))
        assert (results[0][sum(lengths_q) :] == 0).all()


def test_graph_of_a_replaced_step(backend: str):
    """What a step before the graph has projected is not what replays attend to."""
    cell = compat.TransformersSLANetAttentionGRUCell(DIM, DIM, 4, backend=backend)
    hidden, states, token = torch.randn(2, DIM), torch.randn(2, BOUND, DIM), torch.randn(2, 4)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            cell(hidden, states, token)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = cell(hidden, states, token)
        states.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert_close(list(results), list(cell(hidden, states, token)))


def test_another_stream(backend: str):
    """Work is queued where the caller works: nothing of it runs before what was queued earlier."""
    batch = random_batch([30, 10], [40, 20], rows=60)
    expected = attend(batch, "reference")
    values = batch["query"].detach().clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with torch.no_grad():
            batch["query"].fill_(torch.nan)
            torch.cuda._sleep(20_000_000)
            batch["query"].copy_(values)
        results = attend(batch, backend)
    stream.synchronize()
    assert_close(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(backend: str):
    batch = random_batch([3, 5], [7, 2], rows=10)
    expected = attend(batch, backend)
    elsewhere = {name: tensor.detach().to("cuda:1") for name, tensor in batch.items()}
    for name in ("query", "key", "value", "score_weight"):
        elsewhere[name].requires_grad_()
    found = attend(elsewhere, backend)
    assert_close([tensor.to("cuda:0") for tensor in found], expected)


def test_backends_agree_on_dropout():
    require_backend("cuda")
    with torch.device("cuda"):
        inputs = make_inputs("jagged", heads=2)
        found = [check(inputs, backend, dropout_p=0.4) for backend in ("triton", "cuda")]
    dropped = [results["weights"] == 0 for results in found]
    assert torch.equal(*dropped)
