"""The torch.library ops: opcheck, fake kernels, corrupt offsets, instruction sets, peak memory."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import call, check, incoming_gradients, require_backend
from layouts import LAYOUTS, ONE_STEP_LAYOUTS, Inputs, make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from yardstick import differentiate

import attn_ext
from attn_ext import AttentionMemory, backends, ops

TESTS = Path(__file__).parent
STEP_LAYOUTS = [name for name in ONE_STEP_LAYOUTS if "nested" not in name]
OP_LAYOUTS = [name for name in LAYOUTS if "nested" not in name]
OP_LAYOUTS += ["jagged_keys", "jagged_query_mask"]


@pytest.fixture(autouse=True)
def cpu_backend():
    require_backend("cpu")


def test_built_library_loads():
    """A library that is there but does not load is a failure, not a missing backend."""
    built = list(Path(attn_ext.__file__).parent.glob("_C*.so"))
    assert not built or backends.problem("cpu", torch.device("cpu")) is None


# ---- opcheck ----


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every call of an attn_ext op."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "attn_ext":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def recorded_calls(inputs: Inputs, dropout_p: float) -> list[tuple]:
    """The calls of ops, with their real arguments, of a forward and backward pass."""
    with Recorder() as recorder:
        differentiate(
            lambda leaves: call(
                inputs, leaves, backend="cpu", need_weights=True, dropout_p=dropout_p
            ),
            inputs.leaves,
            incoming_gradients(inputs, need_weights=True),
        )
    return recorder.calls


def recorded_memory_calls(inputs: Inputs, dropout_p: float) -> list[tuple]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    query, key, value, score_weight = leaves.values()
    with Recorder() as recorder:
        memory = AttentionMemory(
            key, value, score_weight, backend="cpu", dropout_p=dropout_p, **inputs.keywords
        )
        steps = [memory.attend(query, need_weights=True) for _ in range(2)]
        sum(
            context.square().sum() + weights.square().sum() for context, weights in steps
        ).backward()
    return recorder.calls


def run_opcheck(op: torch._ops.OpOverload, arguments: tuple, requires_grad: bool) -> None:
    """All of opcheck's tests; gradients are checked for the op that has a derivative."""
    arguments = tuple(
        argument.detach().requires_grad_(requires_grad and argument.is_floating_point())
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    )
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(("heads", "dropout_p"), [(None, 0.3), (2, 0.0)], ids=["dropout", "heads"])
@pytest.mark.parametrize("layout", OP_LAYOUTS)
def test_opcheck(layout: str, heads: int | None, dropout_p: float):
    # opcheck compares results by torch.testing.assert_close, to which NaN differs from NaN.
    inputs = make_inputs(layout, heads=heads, poison=False)
    seen = set()
    for op, arguments in recorded_calls(inputs, dropout_p):
        seen.add(op)
        run_opcheck(op, arguments, requires_grad=op is ops.forward)
    assert seen == {ops.forward, ops.backward}


DTYPES_AND_STRIDES = pytest.mark.parametrize(
    ("dtype", "strides"),
    [
        (torch.float64, "contiguous"),
        (torch.float16, "transposed"),
        (torch.bfloat16, "reversed"),
        (torch.float32, "sliced"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


@DTYPES_AND_STRIDES
@pytest.mark.parametrize("layout", ["padded_mask", "jagged", "jagged_one_step"])
def test_opcheck_of_dtypes_and_strides(layout: str, dtype: torch.dtype, strides: str):
    inputs = make_inputs(layout, heads=2, dtype=dtype, strides=strides, poison=False)
    for op, arguments in recorded_calls(inputs, 0.0):
        query = arguments[0 if op is ops.forward else 2]
        assert query.is_contiguous() == (strides == "contiguous")
        run_opcheck(op, arguments, requires_grad=op is ops.forward)


@DTYPES_AND_STRIDES
def test_opcheck_of_memory_ops_of_dtypes_and_strides(dtype: torch.dtype, strides: str):
    inputs = make_inputs("one_step_lengths", heads=2, dtype=dtype, strides=strides, poison=False)
    calls = dict(recorded_memory_calls(inputs, 0.0))
    assert calls.keys() == {ops.forward, ops.prepare, ops.step_backward, ops.memory_backward}
    for op, arguments in calls.items():
        run_opcheck(op, arguments, requires_grad=False)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_opcheck_of_memory_ops(layout: str, dropout_p: float):
    inputs = make_inputs(layout, heads=2, poison=False)
    seen = set()
    for op, arguments in recorded_memory_calls(inputs, dropout_p):
        if op not in seen:
            run_opcheck(op, arguments, requires_grad=False)
        seen.add(op)
    assert seen == {ops.forward, ops.prepare, ops.step_backward, ops.memory_backward}


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_fakes_of_memory_ops(layout: str):
    for op, recorded in recorded_memory_calls(make_inputs(layout, heads=2), 0.3):
        arguments = [a.detach() if isinstance(a, Tensor) else a for a in recorded]
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for ours, theirs in zip(fake, real, strict=True):
            assert ours.dtype == theirs.dtype, op
            assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride()), op


# ---- Values that nobody checked ----

HUGE = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
CORRUPT = {
    "past_the_end": lambda huge: [0, 4, 90],
    "far_past_the_end": lambda huge: [0, 4, huge],
    "negative": lambda huge: [-5, -3, -1],
    "lowest": lambda huge: [-huge - 1, -huge - 1, 7],
    "decreasing": lambda huge: [7, 3, 0],
    "overflowing": lambda huge: [-huge - 1, huge, -huge - 1],
    "overlapping": lambda huge: [0, 7, 2],
    "not_from_zero": lambda huge: [3, 5, 7],
}


def guarded(rows: Tensor) -> Tensor:
    """The same rows with NaN in 100 rows on either side of them."""
    buffer = rows.new_full((len(rows) + 200, *rows.shape[1:]), torch.nan)
    buffer[100:-100] = rows
    return buffer[100:-100]


def forward_and_backward(tensors: tuple, layout: tuple, tail: tuple) -> list[Tensor]:
    """Results of forward and gradients, with and without scores that forward keeps."""
    results = []
    for keeps in (False, True):
        forward = ops.forward(*tensors, None, None, *layout, *tail, keeps, True, "cpu")
        context, weights, *kept = forward
        incoming = torch.ones_like(context), torch.ones_like(weights)
        gradients = ops.backward(*incoming, *tensors, *kept, *layout, *tail, 15, True, "cpu")
        results += [context, weights, kept[0], *gradients]
    return results


@pytest.mark.parametrize("index_dtype", HUGE, ids=str)
@pytest.mark.parametrize("corrupt", CORRUPT)
@pytest.mark.parametrize("bound", [0, 4, 7, 1000], ids=lambda bound: f"max_seqlen={bound}")
def test_corrupt_offsets_stay_inside_the_tensors(
    corrupt: str, index_dtype: torch.dtype, bound: int
):
    """What a tensor on an accelerator may hold: nothing around the rows is read."""
    offsets = torch.tensor(CORRUPT[corrupt](HUGE[index_dtype]), dtype=index_dtype)
    query, key = (guarded(torch.randn(7, 2, 16)).unsqueeze(0) for _ in range(2))
    value = guarded(torch.randn(7, 2, 5)).unsqueeze(0)
    inputs = (query, key, value, torch.randn(2, 16))
    tail = (0.0, None, 1)
    layouts = (
        (inputs, (offsets, offsets, None, None, bound, bound)),
        ((query[0, :2, None], *inputs[1:]), (None, offsets, None, None, 1, bound)),
    )
    for tensors, layout in layouts:
        for result in forward_and_backward(tensors, layout, tail):
            assert result.isfinite().all()


@pytest.mark.parametrize("index_dtype", HUGE, ids=str)
def test_corrupt_lengths_stay_inside_the_tensors(index_dtype: torch.dtype):
    huge = HUGE[index_dtype]
    lengths = torch.tensor([9, huge, -1, -huge - 1], dtype=index_dtype)
    query, key = (guarded(torch.randn(4, 5, 2, 16)) for _ in range(2))
    tensors = (query, key, guarded(torch.randn(4, 5, 2, 6)), torch.randn(2, 16))
    layout, tail = (None, None, lengths, None, 5, 5), (0.0, None, 1)
    context, *others = forward_and_backward(tensors, layout, tail)
    for result in (context, *others):
        assert result.isfinite().all()
    assert (context[2:] == 0).all() and (context[:2] != 0).any()


# ---- Instruction sets ----

CHOOSE_ISA = """
import os, torch, attn_ext
try:
    torch.ops.attn_ext.cpu_isa()
except RuntimeError as error:
    print(error)
os.environ["ATTN_EXT_CPU_ISA"] = "portable"  # a refused choice is made again
print(torch.ops.attn_ext.cpu_isa())
"""


def run_python(program: str, **environment: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_instruction_set_of_the_environment():
    refusal, isa = run_python(CHOOSE_ISA, ATTN_EXT_CPU_ISA="sse9").splitlines()
    expected = "ATTN_EXT_CPU_ISA=sse9 names no instruction set of this machine; available: "
    assert refusal == expected + torch.ops.attn_ext.cpu_isas()
    assert isa == "portable"


# ---- Memory ----

PEAK_MEMORY = """
import resource, torch, attn_ext
torch.set_num_threads(1)

def run(batch, length, features, step):
    shape = (batch, length, features)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    score_weight = torch.randn(features, requires_grad=True)
    if step:
        memory = attn_ext.AttentionMemory(key, value, score_weight, backend="cpu")
        contexts = [memory.attend(query[:, t]) for t in range(length)]
        torch.stack(contexts, 1).sum().backward()
    else:
        attn_ext.additive_attention(query, key, value, score_weight, backend="cpu").sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

step = {step}
run(2, 8, 64, step)
before = peak()
run(4, 256, 1024, step)
print(peak() - before)
"""


@pytest.mark.parametrize("step", [False, True], ids=["all_steps", "memory"])
def test_peak_memory(step: bool):
    """Nothing of size Tq * Tk * D exists: 1 GiB here, where tensors and gradients are 4 MiB each.

    The memory keeps a step's scores and weights until backward, and stacks them for its one pass:
    of size Tq * Tk and Tq * D.
    """
    peak = int(run_python(PEAK_MEMORY.format(step=step)))
    cube = 4 * 256 * 256 * 1024 * 4
    assert peak < cube / 8, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.5.1", "triton 3.5.1 is older than 3.6; pip install 'triton>=3.6'"),
        ("3.6.0", None),
        ("3.10.0", None),
        ("4.0.0+git1234", None),
    ],
)
def test_versions_of_triton(monkeypatch: pytest.MonkeyPatch, version: str, problem: str | None):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert backends._triton_problem.__wrapped__() == problem


@pytest.mark.parametrize(
    ("sizes", "backend", "keeps"),
    [
        (((2, 8), (2, 4), 5, 3), "cpu", True),  # 2 * 8 * 4 scores of 104 numbers
        (((2, 8), (2, 7), 5, 3), "cpu", False),
        (((2, 1), (2, 99), 1, 1), "cpu", True),  # one query: a score a key
        (((2, 8), (2, 4), 5, 3), "triton", True),
        (((2, 1), (2, 99), 1, 1), "triton", True),
        (((2, 1), (2, 99), 1, 1), "cuda", True),
        (((2, 8), (2, 4), 5, 3), "cuda", True),
    ],
)
def test_scores_are_kept_where_they_are_small(sizes: tuple, backend: str, keeps: bool):
    rows_q, rows_k, features, value_features = sizes
    query, key, value = (
        torch.empty(*rows, 1, columns)
        for rows, columns in ((rows_q, features), (rows_k, features), (rows_k, value_features))
    )
    assert ops.keeps_scores(query, key, value, None, rows_k[1], backend) == keeps


@pytest.mark.parametrize("queries", [1, 3])
def test_backward_takes_the_scores_that_forward_kept(queries: int):
    """Others in their place change what it gives."""
    inputs = (torch.randn(2, queries, 2, 8), *torch.randn(2, 2, 5, 2, 8), torch.randn(2, 8))
    layout, tail = (None, None, None, None, queries, 5), (0.0, None, 0)
    forward = ops.forward(*inputs, None, None, *layout, *tail, True, True, "cpu")
    context, _, stats, scores = forward
    assert scores.shape == ((2, 5, 2) if queries == 1 else (2, queries, 2, 5))

    def gradients(scores: Tensor) -> tuple[Tensor, ...]:
        return ops.backward(context, None, *inputs, stats, scores, *layout, *tail, 15, True, "cpu")

    for kept, again in zip(gradients(scores), gradients(scores.new_empty(0)), strict=True):
        torch.testing.assert_close(kept, again)
    for kept, other in zip(gradients(scores), gradients(scores - 1), strict=True):
        assert not torch.equal(kept, other)


@pytest.mark.parametrize("keeps_scores", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "features"),
    [((20, 0, 3), (1500, 2, 700), 64), ((300, 2), (1500, 3), 4)],
    ids=["ranges_of_keys", "blocks_of_queries"],
)
def test_long_sequences_with_dropout(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    features: int,
    keeps_scores: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    """Their parts are merged, and each has its own part of the mask: backward has other ones."""
    monkeypatch.setattr(ops, "keeps_scores", lambda *_: keeps_scores)
    lengths = {"lengths_q": lengths_q, "lengths_k": lengths_k}
    inputs = make_inputs("jagged", features=features, dtype=torch.float64, poison=False, **lengths)
    incoming = incoming_gradients(inputs, need_weights=True)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        keywords = {"backend": backend, "need_weights": True, "dropout_p": 0.3}
        attend = functools.partial(call, inputs, **keywords)
        results.append(differentiate(attend, inputs.leaves, incoming))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step"])
def test_rows_of_nobody_where_every_sequence_has_rows(layout: str):
    """They alone ask for zeros then, of the context and of the gradients."""
    check(make_inputs(layout, lengths_q=(3, 2), lengths_k=(4, 5)), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest(dtype: torch.dtype):
    """As PyTorch rounds: the mean of two numbers of few bits, which float32 holds exactly."""
    zeros, values = torch.zeros(1, 2, 4, dtype=dtype), torch.randn(1, 2, 1000).to(dtype)
    context = attn_ext.additive_attention(zeros, zeros, values, zeros[0, 0], backend="cpu")
    expected = values.float().mean(1).to(dtype)
    assert torch.equal(context, expected[:, None].expand_as(context))
