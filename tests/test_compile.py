"""torch.compile, export and ahead-of-time compilation: whole graphs, few of them, the same numbers.

A graph break is an error under ``fullgraph=True``; how often something was compiled is counted.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import assert_within_budget, incoming_gradients, require_backend
from layouts import LAYOUTS, Inputs, draw_keep, make_inputs, offsets_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from yardstick import differentiate, yardsticks

import attn_ext
from attn_ext import AdditiveAttention
from attn_ext.nmt.data import Jagged
from attn_ext.nmt.rnn import run_rnn

QUERY_DIM, KEY_DIM, ATTN_DIM = 6, 10, 12
# The same longest sequences and number of sequences, but other offsets and total tokens.
LENGTHS_Q = ((3, 2, 6, 4), (6, 6, 2, 3), (2, 6, 2, 2))
LENGTHS_K = ((7, 4, 13, 3), (2, 13, 13, 5), (13, 2, 2, 2))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    require_backend("cpu")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bounded(inputs: Inputs) -> Inputs:
    """With the bounds of offsets that must not be read."""
    names = [n.replace("cu_seqlens", "max_seqlen") for n in inputs.keywords if "cu_seq" in n]
    return inputs.with_keywords(**{name: getattr(inputs, name) for name in names})


def check_compiled(
    compiled: Callable, inputs: Inputs, need_weights: bool = True, **keywords: object
) -> None:
    """Forward and backward of ``compiled``, the public function, are within the budget."""

    def attend(leaves: dict[str, Tensor]):
        tensors, options = inputs.arguments(leaves), {**inputs.keywords, **keywords}
        result = compiled(*tensors, **options, need_weights=need_weights, backend="cpu")
        context, weights = result if need_weights else (result, None)
        return context.values() if context.is_nested else context, weights

    dropout_p = keywords.get("dropout_p", 0.0)
    keep = draw_keep(inputs, dropout_p, seed=3) if dropout_p else None
    incoming = incoming_gradients(inputs, need_weights)
    actual = differentiate(attend, inputs.leaves, incoming)
    exact, eager = yardsticks(inputs, incoming, keep=keep, dropout_p=dropout_p)
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


@pytest.mark.parametrize(
    ("layout", "dynamic"),
    [(layout, None) for layout in (*LAYOUTS, "jagged_keys", "jagged_query_mask")]
    + [(layout, True) for layout in ("padded_mask", "jagged", "nested")],
)
def test_op(layout: str, dynamic: bool | None):
    """Other offsets and totals compile at most once more: the sizes that varied become symbols."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        attn_ext.additive_attention, fullgraph=True, backend=counter, dynamic=dynamic
    )
    # With symbols from the start, torch 2.13 loses track of where the number of sequences of a
    # nested tensor came from once a result has that size, as weights have.
    need_weights = "nested" not in layout or not dynamic
    for lengths_q, lengths_k in zip(LENGTHS_Q, LENGTHS_K):
        # No two sizes are equal, which would make them one symbol.
        inputs = make_inputs(layout, lengths_q=lengths_q, lengths_k=lengths_k, features=24)
        check_compiled(compiled, bounded(inputs), need_weights)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dropout_p", [0.0, 0.4], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("layout", ["padded_mask", "jagged"])
def test_inductor(layout: str, dropout_p: float):
    compiled = torch.compile(attn_ext.additive_attention, fullgraph=True)
    inputs = bounded(make_inputs(layout, heads=2))
    with torch._inductor.config.patch(fallback_random=True):  # eager's random numbers
        check_compiled(compiled, inputs, dropout_p=dropout_p)


FIRST_CALLS = """
import attn_ext, torch
from torch._dynamo.testing import CompileCounterWithBackend

counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(attn_ext.additive_attention, fullgraph=True, backend=counter)
query, key, score_weight = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.randn(8)
compiled(query, key, key, score_weight)
compiled(query, key, key, score_weight)
attn_ext.additive_attention(query, key, key, score_weight)
compiled(query, key, key, score_weight)
print("compiled", counter.frame_count)
"""


def test_first_call_of_a_process_compiles_once():
    """Choosing a backend, which is remembered, changes nothing that the graph depends on."""
    command = [sys.executable, "-c", FIRST_CALLS]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "compiled 1\n", found.stderr


def make_module(**options: object) -> AdditiveAttention:
    return AdditiveAttention(
        QUERY_DIM, KEY_DIM, ATTN_DIM, num_heads=2, bias=True, normalize=True, **options
    )


def assert_equal_training(
    compiled: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    module: nn.Module,
) -> None:
    """The same result and the same gradients of floating-point inputs and parameters."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad] + list(module.parameters())
    runs = []
    for function in (compiled, eager):
        result = function(*leaves)
        runs.append((result, *torch.autograd.grad(result.float().square().sum(), wanted)))
    for ours, theirs in zip(*runs):
        torch.testing.assert_close(ours, theirs)


def test_module():
    module = make_module()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length_q, length_k in ((4, 6), (3, 9), (5, 2)):
        inputs = torch.randn(3, length_q, QUERY_DIM), torch.randn(3, length_k, KEY_DIM)
        assert_equal_training(compiled, module, inputs, module)
    assert counter.frame_count <= 2


def test_decoder_loop_over_a_memory():
    module = make_module()

    def decode(query: Tensor, key: Tensor, cu_seqlens: Tensor) -> Tensor:
        memory = module.memory(key, cu_seqlens_k=cu_seqlens, max_seqlen_k=13)
        steps = []
        for _ in range(3):
            context, weights = memory.attend(query, need_weights=True)
            query = torch.tanh(query + context[:, :QUERY_DIM])
            steps.append(query * weights.square().sum())
        return torch.stack(steps)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode, fullgraph=True, backend=counter)
    for lengths in LENGTHS_K:
        inputs = torch.randn(4, QUERY_DIM), torch.randn(sum(lengths), KEY_DIM), offsets_of(lengths)
        assert_equal_training(compiled, decode, inputs, module)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no_dropout", "dropout"])
def test_rnn_draws_one_seed_and_only_for_dropout(dropout: float, monkeypatch: pytest.MonkeyPatch):
    """The op that stands for a packed RNN leaves the generators of other devices alone."""
    rnn = nn.LSTM(3, 4, num_layers=2, dropout=dropout)
    sequences = Jagged.of(torch.randn(6, 3, requires_grad=True), [4, 2])

    def run(values: Tensor) -> Tensor:
        return run_rnn(rnn, sequences.like(values)).values

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        compiled(sequences.values)
        torch.manual_seed(3)
        if dropout:
            torch.randint(2**62, (1,))
        expected = torch.get_rng_state()
        torch.manual_seed(3)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "manual_seed", None)  # which seeds every device
            compiled(sequences.values).sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


def test_compiled_step_over_a_memory_made_outside():
    module = make_module()

    def step(memory: attn_ext.AttentionMemory, query: Tensor) -> Tensor:
        return torch.tanh(query + memory.attend(query)[:, :QUERY_DIM])

    def decode_with(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def decode(query: Tensor, key: Tensor, cu_seqlens: Tensor) -> Tensor:
            memory = module.memory(key, cu_seqlens_k=cu_seqlens, max_seqlen_k=13)
            for _ in range(3):
                query = step(memory, query)
            return query

        return decode

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for lengths in LENGTHS_K:
        inputs = torch.randn(4, QUERY_DIM), torch.randn(sum(lengths), KEY_DIM), offsets_of(lengths)
        assert_equal_training(decode_with(compiled), decode_with(step), inputs, module)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast(inside: bool, dtype: torch.dtype):
    """Autocast around and within what is compiled; float64 is left alone."""
    module = make_module().to(dtype)

    def within(query: Tensor, key: Tensor) -> Tensor:
        # PyTorch's Linear casts float64 too, so the op is given it uncast.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            key, query = module.key_proj(key), module.query_proj(query)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled()):
            return attn_ext.additive_attention(query, key, key, module.score_weight.flatten())

    compiled = torch.compile(within, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(3, 4, QUERY_DIM, dtype=dtype), torch.randn(3, 6, KEY_DIM, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        results = compiled(*inputs), within(*inputs)
    expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
    assert results[0].dtype == results[1].dtype == expected
    assert torch.equal(*results)


def test_gradient_transform():
    """torch.func.grad within what is compiled."""
    query, key, score_weight = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.randn(8)

    def gradient(query: Tensor, key: Tensor, score_weight: Tensor) -> tuple[Tensor, ...]:
        def loss(*tensors: Tensor) -> Tensor:
            return attn_ext.additive_attention(*tensors[:2], key, tensors[2]).square().sum()

        return torch.func.grad(loss, (0, 1, 2))(query, key, score_weight)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    inputs = query, key, score_weight
    torch.testing.assert_close(compiled(*inputs), gradient(*inputs))


def test_checkpoint_with_dropout():
    """Recomputed within a compiled graph, the call drops the same weights."""
    inputs = make_inputs("padded_lengths", heads=2)

    def checkpointed(*tensors: Tensor, **keywords: object):
        return torch.utils.checkpoint.checkpoint(
            attn_ext.additive_attention, *tensors, **keywords, use_reentrant=False
        )

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    check_compiled(compiled, inputs, dropout_p=0.4)


# ---- Ahead of time ----


class Model(nn.Module):
    """Attention between layers of other kinds."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(KEY_DIM, KEY_DIM)
        self.attention = make_module()

    def forward(self, query: Tensor, states: Tensor, lengths: Tensor):
        states = torch.tanh(self.encoder(states))
        return self.attention(query, states, key_lengths=lengths, need_weights=True)


@pytest.fixture(scope="module")
def model() -> Model:
    require_backend("cpu")
    return Model().eval()


def model_inputs(batch: int, length_q: int, length_k: int) -> tuple[Tensor, ...]:
    lengths = torch.randint(0, length_k + 1, (batch,))
    return torch.randn(batch, length_q, QUERY_DIM), torch.randn(batch, length_k, KEY_DIM), lengths


def export(model: Model) -> torch.export.ExportedProgram:
    batch, length_q, length_k = (Dim(name, max=99) for name in ("batch", "length_q", "length_k"))
    shapes = {0: batch, 1: length_q}, {0: batch, 1: length_k}, {0: batch}
    return torch.export.export(model, model_inputs(3, 4, 6), dynamic_shapes=shapes)


def test_export(model: Model, tmp_path):
    """Saved and loaded, a program with the op in it runs at sizes it was not traced with."""
    program = export(model)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert any("additive_attention_forward" in str(node.target) for node in program.graph.nodes)
    for sizes in ((3, 4, 6), (2, 1, 9)):
        inputs = model_inputs(*sizes)
        torch.testing.assert_close(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("steps", [None, 2], ids=["one_step", "several"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_jagged_weights(steps: int | None, strict: bool):
    """A bound on the longest sequence is a number that the program itself computes."""

    class Weights(nn.Module):
        def forward(self, query: Tensor, key: Tensor, offsets: Tensor):
            weight = torch.ones(key.size(1))
            return attn_ext.additive_attention(
                query, key, key, weight, cu_seqlens_k=offsets, need_weights=True
            )

    query = torch.randn(2, 4) if steps is None else torch.randn(2, steps, 4)
    inputs = query, torch.randn(7, 4), torch.tensor([0, 3, 7])
    program = torch.export.export(Weights(), inputs, strict=strict).module()
    offsets = torch.tensor([0, 5, 7])
    torch.testing.assert_close(program(*inputs[:2], offsets), Weights()(*inputs[:2], offsets))


@pytest.mark.nightly  # half a minute of a C++ compiler; what is exported is the same above
def test_ahead_of_time(model: Model, tmp_path):
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(export(model), package_path=package)
    loaded = torch._inductor.aoti_load_package(package)
    for sizes in ((3, 4, 6), (2, 1, 9)):
        inputs = model_inputs(*sizes)
        torch.testing.assert_close(tuple(loaded(*inputs)), model(*inputs))
