"""Graphs that are recorded with one batch and run with others: ``torch.jit.trace`` and ONNX.

What the host reads of the example, lengths above all, must be no constant of the graph.
"""

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from compat_peers import PEERS, REPLACEMENTS
from helpers import require_dtype
from torch import Tensor, nn

import attn_ext
from attn_ext import additive_attention

# torch.jit.trace and what it calls are deprecated, which is not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def doubles(request: pytest.FixtureRequest) -> Iterator[None]:
    if "backend" in request.fixturenames:
        require_dtype(request.getfixturevalue("backend"), torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


D, DV = 8, 6
EXAMPLE = ([3, 4], [2, 3])  # lengths of keys and of queries
OTHERS = [([5, 9, 1], [1, 7, 2]), ([2], [4]), ([1, 1, 0, 1], [0, 0, 1, 0])]
OPTIONS = {
    "one_step": (),
    "padded": (),
    "lengths": ("key_lengths",),
    "mask": ("key_padding_mask",),
    "jagged": ("cu_seqlens_k", "cu_seqlens_q"),
    "jagged_step": ("cu_seqlens_k",),
    "jagged_keys": ("cu_seqlens_k",),
    "jagged_query": ("cu_seqlens_q",),
}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def inputs(layout: str, heads: int, keys: list[int], queries: list[int]) -> tuple[Tensor, ...]:
    """Query, key, value, score weight, and the tensors that OPTIONS names."""
    row = (heads,) if heads > 1 else ()
    batch, longest = len(keys), max(keys)
    # Jagged rows that belong to no sequence, too.
    key_rows = (sum(keys) + 1,) if "cu_seqlens_k" in OPTIONS[layout] else (batch, longest)
    query_rows: tuple[int, ...] = (batch, max(queries))
    if "step" in layout:
        query_rows = (batch,)
    elif "cu_seqlens_q" in OPTIONS[layout]:
        query_rows = (sum(queries) + 2,)
    options: dict[str, tuple[Tensor, ...]] = {
        "lengths": (torch.tensor(keys),),
        "mask": (torch.arange(longest) >= torch.tensor(keys)[:, None],),
        "jagged": (offsets(keys), offsets(queries)),
        "jagged_step": (offsets(keys),),
        "jagged_keys": (offsets(keys),),
        "jagged_query": (offsets(queries),),
    }
    return (
        torch.randn(*query_rows, *row, D),
        torch.randn(*key_rows, *row, D),
        torch.randn(*key_rows, *row, DV),
        torch.randn(*row, D),
        *options.get(layout, ()),
    )


def caller(layout: str, backend: str | None, weights: bool) -> Callable:
    def call(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, *options: Tensor):
        keywords = dict(zip(OPTIONS[layout], options))
        return additive_attention(
            query, key, value, score_weight, need_weights=weights, backend=backend, **keywords
        )

    return call


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(actual: Tensor | tuple, expected: Tensor | tuple) -> None:
    """Of float64: what a trace adds is other rounding at most."""
    for ours, theirs in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("heads", "weights"), [(1, False), (2, True)], ids=["context", "heads_and_weights"]
)
@pytest.mark.parametrize("layout", OPTIONS)
def test_trace_at_other_lengths(layout: str, heads: int, weights: bool, backend: str):
    """Saved and loaded, and with gradients."""
    call = caller(layout, backend, weights)
    traced = torch.jit.trace(call, inputs(layout, heads, *EXAMPLE))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for lengths in OTHERS:
        arguments = inputs(layout, heads, *lengths)
        expected = caller(layout, None, weights)(*arguments)
        assert_same(traced(*arguments), expected)
        assert_same(loaded(*arguments), expected)
        leaves = [t.requires_grad_() for t in arguments[:4]]
        gradients = (
            torch.autograd.grad(as_tuple(run(*arguments))[0].sin().sum(), leaves)
            for run in (loaded, call)
        )
        assert_same(*gradients)


def test_trace_takes_no_bound_from_its_example(backend: str):
    """The caller's, of the example's lengths, is one as well; for weights' axes it is refused."""

    def bounded(query: Tensor, key: Tensor, cu: Tensor, need_weights: bool = False):
        cus = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
        weight = torch.ones(D)
        return additive_attention(
            query, key, key, weight, need_weights=need_weights, backend=backend, **cus
        )

    example = torch.randn(7, D), torch.randn(7, D), offsets([3, 4])
    traced = torch.jit.trace(bounded, example)
    query, key, cu = torch.randn(15, D), torch.randn(15, D), offsets([5, 9, 1])
    expected = additive_attention(query, key, key, torch.ones(D), cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert_same(traced(query, key, cu), expected)
    with pytest.raises(ValueError, match="^max_seqlen_k: expected None for weights in a trace"):
        torch.jit.trace(lambda *tensors: bounded(*tensors, need_weights=True), example)


def test_trace_draws_dropout_anew(backend: str):
    def call(query: Tensor, key: Tensor):
        return additive_attention(query, key, key, torch.ones(D), dropout_p=0.5, backend=backend)

    traced = torch.jit.trace(call, (torch.randn(2, D), torch.randn(2, 5, D)), check_trace=False)
    query, key = torch.randn(3, D), torch.randn(3, 9, D)
    torch.manual_seed(1)
    first, second = traced(query, key), traced(query, key)
    torch.manual_seed(1)
    assert_same(first, call(query, key))
    assert_same(second, call(query, key))
    assert not torch.equal(first, second)


class Steps(nn.Module):
    """A decoder of two steps over a memory."""

    def __init__(self, **options: bool | int):
        super().__init__()
        self.attention = attn_ext.AdditiveAttention(D, D, 16, **options)

    def forward(self, query: Tensor, key: Tensor, cu: Tensor | None = None):
        memory = self.attention.memory(key, cu_seqlens_k=cu)
        context, weights = memory.attend(query, need_weights=True)
        return memory.attend(query + context), weights


def step_inputs(jagged: bool, lengths: list[int]) -> tuple[Tensor, ...]:
    query = torch.randn(len(lengths), D)
    if jagged:
        return query, torch.randn(sum(lengths), D), offsets(lengths)
    return query, torch.randn(len(lengths), max(lengths), D)


head_options = pytest.mark.parametrize(
    "options", [{}, {"num_heads": 2, "normalize": True, "bias": True}], ids=["plain", "heads"]
)


@head_options
@pytest.mark.parametrize("jagged", [False, True], ids=["padded", "jagged"])
def test_trace_of_memories(jagged: bool, options: dict):
    module = Steps(**options)
    traced = torch.jit.trace(module, step_inputs(jagged, EXAMPLE[0]))
    for lengths, _ in OTHERS:
        arguments = step_inputs(jagged, lengths)
        assert_same(traced(*arguments), module(*arguments))


@pytest.mark.parametrize("name", ["opennmt", "joeynmt"])
def test_trace_of_drop_ins(name: str):
    """Of those that take tensors only."""
    module = REPLACEMENTS[name](**PEERS[name][2])
    query_dim, key_dim = PEERS[name][3]

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, query: Tensor, states: Tensor, lengths: Tensor):
            if name == "opennmt":
                return self.attention(query, states, lengths)
            self.attention.compute_proj_keys(states)
            mask = torch.arange(states.size(1)) < lengths[:, None]
            return self.attention(query, mask.unsqueeze(1), states)

    def example(lengths: list[int]):
        rows = (len(lengths), max(lengths), key_dim)
        return torch.randn(len(lengths), 1, query_dim), torch.randn(rows), torch.tensor(lengths)

    call = Call()
    traced = torch.jit.trace(call, example(EXAMPLE[0]))
    for lengths, _ in OTHERS:
        arguments = example(lengths)
        assert_same(traced(*arguments), call(*arguments))


# ---- ONNX ----


class Layout(nn.Module):
    """A call in one of the padded layouts, or with jagged keys."""

    def __init__(self, layout: str, **options: bool | int):
        super().__init__()
        self.attention = attn_ext.AdditiveAttention(D, D, 16, **options)
        self.option = OPTIONS[layout]

    def forward(self, query: Tensor, key: Tensor, option: Tensor | None = None):
        keywords = {} if option is None else {self.option[0]: option}
        return self.attention(query, key, need_weights=True, **keywords)


def exported_case(layout: str, options: dict) -> tuple[nn.Module, Callable]:
    """A module, and a function of lengths that makes its inputs."""
    if layout.startswith("memory"):
        jagged = layout == "memory_jagged"
        return Steps(**options).eval(), lambda keys, _: step_inputs(jagged, keys)

    def make(keys: list[int], queries: list[int]):
        query, key, _, _, *rest = inputs(layout, 1, keys, queries)
        return query, key, *rest

    return Layout(layout, **options).eval(), make


exported = pytest.mark.parametrize(
    "layout", ["padded", "lengths", "mask", "jagged_step", "memory", "memory_jagged"]
)


def dynamic_axes(arguments: tuple[Tensor, ...]) -> tuple[dict, ...]:
    """All but the features'."""
    return tuple(
        dict.fromkeys(range(t.dim() - t.is_floating_point()), torch.export.Dim.DYNAMIC)
        for t in arguments
    )


@pytest.mark.parametrize("layout", ["mask", "jagged_step", "memory_jagged"])
def test_what_onnx_is_given(monkeypatch: pytest.MonkeyPatch, layout: str):
    """Ordinary operations, right at other lengths: without the packages that write the file."""
    module, make = exported_case(layout, {"num_heads": 2, "normalize": True})
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    example = make([3, 4, 2], [2, 3, 5])
    axes = dynamic_axes(example)
    program = torch.export.export(module, example, strict=False, dynamic_shapes=axes)
    assert not any("attn_ext" in str(node.target) for node in program.graph.nodes)
    monkeypatch.undo()
    for lengths in (other for other in OTHERS if len(other[0]) > 1):  # export sets 1 apart
        arguments = make(*lengths)
        assert_same(program.module()(*arguments), module(*arguments))


@exported
@head_options
@pytest.mark.parametrize("dynamo", [True, False], ids=["export", "trace"])
@pytest.mark.filterwarnings("ignore")  # of the exporters
def test_onnx_at_other_lengths(tmp_path, layout: str, options: dict, dynamo: bool):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    module, make = exported_case(layout, options)
    example, path = make([3, 4, 2], [2, 3, 5]), tmp_path / "model.onnx"
    axes = dynamic_axes(example)
    if dynamo:
        torch.onnx.export(module, example, dynamic_shapes=axes).save(path)
    else:
        names = [f"input{i}" for i in range(len(example))]
        numbered = {n: {axis: f"{n}_{axis}" for axis in a} for n, a in zip(names, axes)}
        torch.onnx.export(
            module, example, path, dynamo=False, input_names=names, dynamic_axes=numbered
        )
    session = onnxruntime.InferenceSession(path)
    for lengths in OTHERS:
        arguments = make(*lengths)
        named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), arguments)}
        with torch.no_grad():
            expected = module(*arguments)
        assert_same(tuple(map(torch.from_numpy, session.run(None, named))), expected)
