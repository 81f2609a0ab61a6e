"""Rows for ``benchmarks.static``: the kernels as ``attn_ext.triton_kernels`` would launch them.

The launchers run on tensors of which nothing is computed, with kernels that only note how they are
called, so that block sizes, types and alignment are those of real calls.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton

from attn_ext import triton_kernels
from attn_ext.triton_kernels import configurations
from attn_ext.triton_kernels import launch as launchers
from attn_ext.triton_kernels.gradient import TILE_ROWS
from attn_ext.triton_kernels.problem import DENSE_WEIGHTS, JAGGED_WEIGHTS, RAW

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DIMS = (128, 1000, 1024)
BATCH, HEADS = 4, 1
# Keys a sequence: all scores of a query in one tile, or in several.
SHORT, LONG = 75, 300
MODULES = [
    importlib.import_module(f"{triton_kernels.__name__}.{module.name}")
    for module in pkgutil.iter_modules(triton_kernels.__path__)
]
POOL_BRANCHES = (1, 5, 8)  # the last in two groups


@dataclass(frozen=True)
class Case:
    """One kernel with everything that its machine code depends on; see ``benchmarks.static``."""

    name: str
    kernel: triton.JITFunction
    # Of arguments by name, structs as structs; of what is in these by path, see ``static.leaves``.
    signature: dict[str, object]
    constants: dict[str | tuple[int, ...], object]
    aligned: set[str | tuple[int, ...]]
    num_warps: int
    regime: str
    pass_: str
    dtype: str
    dim: int
    elements_per_iteration: int = 0
    iterations: int = 0
    num_stages: int = 3  # Triton's default
    most_registers: int | None = None  # a thread may have on NVIDIA
    routes: tuple[str, ...] = field(default=())


class Launches:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: triton.JITFunction, seen: list):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple):
        def launch(*arguments, num_warps: int, maxnreg: int | None = None, **constants):
            values = dict(zip(self.kernel.arg_names, arguments)) | constants
            self.seen.append((self.kernel, values, num_warps, maxnreg))

        return launch


@contextlib.contextmanager
def noted_launches() -> Iterator[list]:
    """The launches (kernel, arguments by name, warps, register limit) of what runs inside."""
    seen: list = []
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            kernels = [name for name in vars(module) if name.endswith("_kernel")]
            for name in kernels:
                stand_in = Launches(getattr(module, name), seen)
                stack.enter_context(mock.patch.object(module, name, stand_in))
        yield seen


def triton_type(value: object) -> str:
    """As Triton types the argument of a launch."""
    if isinstance(value, torch.Tensor):
        names = DTYPES | {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def make_case(launch: tuple, regime: str, pass_: str, dtype: str, dim: int, **rest) -> Case:
    kernel, arguments, num_warps, most_registers = launch
    fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    constants, aligned = {}, set()

    def typed(value: object, key: str | tuple[int, ...], path: tuple[int, ...]) -> object:
        """As Triton types it, noting what it is specialised for."""
        if isinstance(value, tuple) and key not in fixed:
            parts = [(*path, number) for number in range(len(value))]
            return type(value)(*map(typed, value, parts, parts))
        is_number = isinstance(value, int) and key not in general
        if key in fixed or value is None or (is_number and value == 1):
            constants[key] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (is_number and value % 16 == 0):
            aligned.add(key)
        return triton_type(value)

    signature = {
        name: typed(arguments[name], name, (number,))
        for number, name in enumerate(kernel.arg_names)
    }
    elements, iterations = elements_of(kernel.__name__, constants)
    return Case(
        name=kernel.__name__.removesuffix("_kernel").removeprefix("additive_attention_"),
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=aligned,
        num_warps=num_warps,
        most_registers=most_registers,
        regime=regime,
        pass_=pass_,
        dtype=dtype,
        dim=dim,
        elements_per_iteration=elements,
        iterations=iterations,
        **rest,
    )


def elements_of(name: str, constants: dict) -> tuple[int, int]:
    """(i, j, d) elements of an iteration of the main loop, and its iterations for one tile."""
    c = constants
    if "SHAPE" in c:
        c = c | c["SHAPE"]._asdict()
    raw = "stats_ptr" in c  # scores are returned, or their gradients come in: there is no softmax
    if "bwd_scores" in name:  # from scores that there are
        return 0, 0
    if "grad" in name:  # one column against all rows; the columns are as many as a sequence has
        return c["ROW_TILES"] * TILE_ROWS.value * 2 * c["BLOCK_D"], 0
    if "bwd_weights" in name:  # of pooling, which computes no hidden rows
        return 0, 0
    if "fwd" in name or "bwd" in name:
        if "keys" in name:
            return c["SEGMENT"] * c["BLOCK_D"], triton.cdiv(c["D"], c["BLOCK_D"])
        elements = c["QUERIES"] * c["KEYS"] * c["FEATURES"]
        return elements, 0 if raw else triton.cdiv(c["D"], c["FEATURES"])
    return 0, 0


def launches_of(
    dtype: torch.dtype, dim: int, length_q: int, length_k: int, scores: bool = False
) -> tuple[list, list, list]:
    """Launches of forward, backward and, for one query a sequence, the memory's backward.

    With ``scores``, of those of ``additive_scores``, which has no memory.
    """
    query = torch.empty(1, BATCH * length_q, HEADS, dim, dtype=dtype)
    cu_q = torch.arange(BATCH + 1) * length_q
    if length_q == 1:
        query, cu_q = query.view(BATCH, 1, HEADS, dim), None
    key = torch.empty(1, BATCH * length_k, HEADS, dim, dtype=dtype)
    cu_k = torch.arange(BATCH + 1) * length_k
    score_weight = torch.empty(HEADS, dim)
    value, dcontext, dweights, weights_layout = key, query, None, 0
    if scores:
        value, dcontext = key[..., :0], None
        dense = length_q > 1
        weights_layout = RAW + (DENSE_WEIGHTS if dense else JAGGED_WEIGHTS)
        shape = (BATCH, HEADS, length_q, length_k) if dense else (BATCH * length_k, HEADS)
        dweights = torch.empty(shape)
    inputs = (query, key, value, score_weight)
    layout = (cu_q, cu_k, None, None, length_q, length_k)
    stats = query.new_empty((*query.shape[:3], 2), dtype=torch.float32)
    # Forward keeps the scores, unless they are what is asked for.
    kept_shape = (*query.shape[:3], length_k) if length_q > 1 else key.shape[:3]
    kept = stats, stats.new_empty((0,) if scores else kept_shape)
    with noted_launches() as forward:
        launchers.additive_attention_forward(
            *inputs, None, None, *layout, 0.0, None, weights_layout, not scores, False
        )
    with noted_launches() as backward:
        launchers.additive_attention_backward(
            dcontext, dweights, *inputs, *kept, *layout, 0.0, None, weights_layout, 15, False
        )
    memory: list = []
    if length_q == 1 and not scores:
        steps = torch.empty(length_k, BATCH, HEADS, dim, dtype=dtype)
        by_key = torch.empty(length_k, 1, BATCH * length_k, HEADS)
        keys = (key, key, score_weight, None, None, cu_k, None, None, length_k)
        with noted_launches() as memory:
            launchers.additive_attention_memory_backward(
                steps, by_key, by_key, steps, *keys, 14, False
            )
    return forward, backward, memory


def pool_launches(dtype: torch.dtype, dim: int, branches: int) -> list:
    """Launches of forward and backward of gated pooling, of bags of several tiles."""
    key = torch.empty(1, BATCH * LONG, HEADS, dim, dtype=dtype)
    inputs = (key, key, torch.empty(HEADS, branches, dim), key)
    layout = (torch.arange(BATCH + 1) * LONG, None, None, LONG)
    dcontext = torch.empty(BATCH, branches, HEADS, dim, dtype=dtype)
    stats = torch.empty(BATCH, branches, HEADS, 2)
    scores = torch.empty(*key.shape[:3], branches)
    options = (0.0, 0.0, 0.0, None, 0)
    with noted_launches() as launches:
        launchers.additive_pool_forward(*inputs, *layout, *options, True, False)
        launchers.additive_pool_backward(
            dcontext, None, *inputs, stats, scores, *layout, *options, 30, False
        )
    return launches


def static_cases() -> Iterator[Case]:
    """Every kernel, for each row of the table of configurations, dtype and some feature counts."""
    for dtype, name in DTYPES.items():
        for dim in DIMS:
            for regime, length_q, length_k in (
                ("all", SHORT, SHORT),
                ("long", LONG, LONG),
                ("step", 1, SHORT),
                ("step", 1, LONG),
            ):
                yield from _cases_of(dtype, name, dim, regime, length_q, length_k)
            for branches in POOL_BRANCHES:
                for launch in pool_launches(dtype, dim, branches):
                    yield make_case(launch, "pool", f"K = {branches}", name, dim)


def _cases_of(
    dtype: torch.dtype, name: str, dim: int, regime: str, length_q: int, length_k: int
) -> Iterator[Case]:
    forward, backward, memory = launches_of(dtype, dim, length_q, length_k)
    for launch in forward:
        pass_ = "forward" if "fwd" in launch[0].__name__ else "forward merge"
        yield make_case(launch, regime, pass_, name, dim)
    for number, launch in enumerate(backward):
        yield make_case(launch, regime, f"backward {number + 1}", name, dim)
    if length_k == SHORT:
        for number, launch in enumerate(memory):
            yield make_case(launch, "memory", f"backward {number + 1}", name, dim)
    forward, backward, _ = launches_of(dtype, dim, length_q, length_k, scores=True)
    for launch in forward:
        yield make_case(launch, regime, "scores", name, dim)
    # What follows is the gradient pass of attention.
    yield make_case(backward[0], regime, "scores backward", name, dim)


assert configurations.segment(SHORT) >= SHORT and configurations.segment(LONG) < LONG
