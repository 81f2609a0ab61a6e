"""Errors against float64 over a grid of magnitudes, dtypes, features and keys.

    python -m benchmarks.accuracy                  # all of it: a table and a plot in results/
    python -m benchmarks.accuracy --thin 9         # of magnitudes and sizes every ninth, all dtypes

The budget is that of the tests (tests/helpers.py), whose tests/test_numerics.py holds a part of the
same grid to it.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

import helpers  # noqa: E402 - the tests' budget, inputs and formulas
from layouts import Inputs, make_inputs  # noqa: E402
from yardstick import Results, differentiate, formula, worst, yardsticks  # noqa: E402

from attn_ext import backends  # noqa: E402

from . import accuracy_report  # noqa: E402

MAGNITUDES = (1e-6, 1e-4, 1e-2, 1.0, 10.0, 100.0, 1e4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FEATURES = (1, 7, 64, 1000, 4096)
KEYS = (1, 3, 100, 20_000)
VALUE_FEATURES = 8
RESULTS = ("context", "weights", "dquery", "dkey", "dvalue", "dscore_weight")
# Elements (query, key, feature) that are computed at once.
CHUNK = 1 << 20
# From so many on one query has elements enough, in the inputs and in the sums.
LARGE = 1 << 20
# What Triton's interpreter and the emulated CUDA threads are given, of magnitudes every second.
EMULATED_ELEMENTS = 10_000


@dataclass(frozen=True)
class Point:
    magnitude: float
    dtype: torch.dtype
    features: int
    keys: int

    @property
    def elements(self) -> int:
        return self.features * self.keys

    @property
    def queries(self) -> int:
        return 1 if self.elements >= LARGE else 3


def grid() -> list[Point]:
    return [
        Point(magnitude, dtype, features, keys)
        for features in FEATURES
        for keys in KEYS
        for magnitude in MAGNITUDES
        for dtype in DTYPES
    ]


def thinned(points: list[Point], thin: int) -> list[Point]:
    """Those of every ``thin``-th combination of magnitude and size, in all their dtypes."""
    combinations = list(dict.fromkeys(replace(point, dtype=DTYPES[0]) for point in points))
    kept = set(combinations[::thin])
    return [point for point in points if replace(point, dtype=DTYPES[0]) in kept]


def inputs_of(point: Point) -> Inputs:
    """Random inputs; float64 gets those of float32, and bfloat16 those of float16."""
    seed = MAGNITUDES.index(point.magnitude) * len(FEATURES) + FEATURES.index(point.features)
    inputs = make_inputs(
        "padded",
        lengths_q=[point.queries],
        lengths_k=[point.keys],
        features=point.features,
        value_features=VALUE_FEATURES,
        scale=point.magnitude,
        dtype=torch.float32,
        seed=seed * len(KEYS) + KEYS.index(point.keys),
    )
    if point.dtype.itemsize == 2:  # numbers of 8 bits that both types have
        inputs = inputs.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16)
    return inputs.to(point.dtype)


def incoming_of(inputs: Inputs) -> Results:
    """Random gradients of context and weights, which every dtype has."""
    device = inputs.leaves["query"].device
    generator = torch.Generator("cpu").manual_seed(1)
    shapes = {
        "context": (1, inputs.max_seqlen_q, VALUE_FEATURES),
        "weights": (1, inputs.max_seqlen_q, inputs.max_seqlen_k),
    }
    return {
        name: torch.randn(shape, generator=generator, device="cpu").bfloat16().to(device)
        for name, shape in shapes.items()
    }


def exactly(inputs: Inputs, incoming: Results) -> Results:
    """The results in float64 by the formulas of the paper, about CHUNK elements at a time."""
    query, key, value = (inputs.leaves[name][0].double() for name in ("query", "key", "value"))
    weight = inputs.leaves["score_weight"].double()
    dcontext, dweights = (incoming[name][0].double() for name in ("context", "weights"))
    rows = max(1, CHUNK // query.numel())

    def chunks() -> Iterator[Tensor]:  # of q + k: [Tq, rows, D]
        return (query[:, None] + part for part in key.split(rows))

    scores = torch.cat([x.tanh() @ weight for x in chunks()], 1)
    alpha = scores.softmax(1)
    dalpha = dcontext @ value.T + dweights
    s = alpha * (dalpha - (alpha * dalpha).sum(1, keepdim=True))
    dquery, dweight, dkey = torch.zeros_like(query), torch.zeros_like(weight), []
    for x, part in zip(chunks(), s.split(rows, 1)):
        through = part[..., None] / x.cosh().square()
        dquery += through.sum(1)
        dkey.append(through.sum(0))
        dweight += torch.einsum("qk,qkd->d", part, x.tanh())
    results = {
        "context": alpha @ value,
        "weights": alpha,
        "dquery": weight * dquery,
        "dkey": weight * torch.cat(dkey),
        "dvalue": alpha.T @ dcontext,
    }
    batched = {name: result[None] for name, result in results.items()}
    return {**batched, "dscore_weight": dweight}


def eagerly(inputs: Inputs, incoming: Results, reverse: bool = False) -> Results:
    return differentiate(
        lambda leaves: formula(inputs, leaves, reverse=reverse), inputs.leaves, incoming
    )


def by_backend(inputs: Inputs, incoming: Results, backend: str) -> Results:
    return differentiate(
        lambda leaves: helpers.call(inputs, leaves, backend=backend, need_weights=True),
        inputs.leaves,
        incoming,
    )


class Yardstick:
    """Exact results and eager's errors, both kept for the next point if it has the same inputs."""

    def __init__(self) -> None:
        self._exact: tuple[Point, Results] | None = None
        self._float32: tuple[Point, Results] | None = None

    def at(self, point: Point, inputs: Inputs, incoming: Results) -> tuple[Results, Results]:
        """Exact results, and results with the largest error that eager PyTorch has in two orders
        of summation or, in small calls, whose errors may happen to be small, with random roundings.
        """
        if point.elements < LARGE:
            return yardsticks(inputs, incoming, samples=6)
        exact = self._exact_at(point, inputs, incoming)
        orders = (False, True) if point.dtype.itemsize > 2 else (False,)
        largest = worst(exact, *(eagerly(inputs, incoming, order) for order in orders))
        if point.dtype == torch.float32:
            self._float32 = point, largest
        elif point.dtype == torch.float64:
            # Its own error is largely the yardstick's: see yardsticks.
            single = replace(point, dtype=torch.float32)
            if self._float32 is None or self._float32[0] != single:
                self.at(single, inputs.to(torch.float32), incoming)
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            seen = self._float32[1]
            largest = {
                name: exact[name]
                + (error - exact[name]).maximum(ratio * (seen[name] - exact[name]))
                for name, error in largest.items()
            }
        return exact, largest

    def _exact_at(self, point: Point, inputs: Inputs, incoming: Results):
        same_inputs = torch.float16 if point.dtype.itemsize == 2 else torch.float32
        of_inputs = replace(point, dtype=same_inputs)
        if self._exact is None or self._exact[0] != of_inputs:
            self._exact = of_inputs, exactly(inputs, incoming)
        return self._exact[1]


# ---- Providers: each computes in a forked process, whose environment it may change ----


@dataclass(frozen=True)
class Provider:
    """A backend, what it needs, and whether it emulates a GPU and so computes but small points."""

    backend: str
    environment: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    is_emulated: bool = False
    prepare: Callable[[], object] = lambda: None

    def takes(self, point: Point) -> bool:
        if point.dtype == torch.float64 and self.backend not in ("cpu", "reference"):
            return False
        return not self.is_emulated or (
            point.elements <= EMULATED_ELEMENTS and MAGNITUDES.index(point.magnitude) % 2 == 0
        )


def interpret_triton() -> None:
    backends.triton_interprets.cache_clear()


def emulate_cuda() -> None:
    import emulated_cuda

    emulated_cuda.install()


def cpuinfo() -> str:
    """What Linux says of the CPU, or nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def providers() -> dict[str, Provider]:
    found = {
        f"cpu, {isa}": Provider("cpu", (("ATTN_EXT_CPU_ISA", isa),))
        for isa in torch.ops.attn_ext.cpu_isas().split(", ")
    }
    found["reference"] = Provider("reference")
    if torch.cuda.is_available():
        for backend in ("triton", "cuda"):
            found[f"{backend}, {torch.cuda.get_device_name()}"] = Provider(backend, device="cuda")
        return found
    found["triton, interpreted"] = Provider(
        "triton", (("TRITON_INTERPRET", "1"),), is_emulated=True, prepare=interpret_triton
    )
    found["cuda, emulated"] = Provider("cuda", is_emulated=True, prepare=emulate_cuda)
    return found


def compute_forked(
    provider: Provider,
    inputs: Inputs,
    incoming: Results,
    exact: Results,
) -> dict[str, float]:
    """Largest errors of a provider, by result."""
    if provider.device != "cpu":
        return errors_of(provider, inputs, incoming, exact)
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        os.environ.update(provider.environment)
        provider.prepare()
        theirs.send(errors_of(provider, inputs, incoming, exact))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{provider}: the process that computes ended without results") from None
    finally:
        process.join()


def errors_of(
    provider: Provider,
    inputs: Inputs,
    incoming: Results,
    exact: Results,
) -> dict[str, float]:
    leaves = {name: leaf.to(provider.device) for name, leaf in inputs.leaves.items()}
    there = {name: gradient.to(provider.device) for name, gradient in incoming.items()}
    actual = by_backend(inputs.with_leaves(**leaves), there, provider.backend)
    return {name: largest_error(actual[name].cpu(), exact[name]) for name in RESULTS}


def largest_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


def measure(points: list[Point], say: Callable[[str], None]) -> list[dict]:
    """For every point: scale of each result, eager's error, the budget, and providers' errors."""
    rows = []
    yardstick = Yardstick()
    available = providers()
    for number, point in enumerate(points):
        say(f"{number + 1}/{len(points)} {point}")
        inputs = inputs_of(point)
        incoming = incoming_of(inputs)
        exact, eager = yardstick.at(point, inputs, incoming)
        scales = {name: exact[name].abs().max() for name in RESULTS}
        eager_errors = {name: largest_error(eager[name], exact[name]) for name in RESULTS}
        rows.append(
            {
                "magnitude": point.magnitude,
                "dtype": str(point.dtype).removeprefix("torch."),
                "features": point.features,
                "keys": point.keys,
                "scale": {name: scale.item() for name, scale in scales.items()},
                "budget": {
                    name: float(
                        helpers.error_budget(name, point.dtype, eager_errors[name], scales[name])
                    )
                    for name in RESULTS
                },
                "eager": eager_errors,
                **{
                    label: compute_forked(provider, inputs, incoming, exact)
                    for label, provider in available.items()
                    if provider.takes(point)
                },
            }
        )
    return rows


def machine() -> dict[str, str]:
    lines = cpuinfo().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def thinning(text: str) -> int:
    """A number for --thin; as magnitudes are the inner axis, one prime to theirs keeps them all."""
    if not text.isdecimal() or int(text) == 0 or int(text) % len(MAGNITUDES) == 0:
        expected = f"expected a positive number that {len(MAGNITUDES)} does not divide"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--thin",
        type=thinning,
        default=1,
        metavar="N",
        help="measure every N-th combination of magnitude and size, each in all dtypes "
        f"(default: 1, all; no multiple of {len(MAGNITUDES)}, which would leave one magnitude)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(thinned(grid(), arguments.thin), lambda line: print(line, flush=True))
    about = machine() | {"thinned by": str(arguments.thin)}
    name = (about["processor"] if about["gpu"] == "none" else about["gpu"]).lower()
    stem = arguments.out / f"accuracy_{name.replace(' ', '-')}"
    lines = ",\n".join(json.dumps(accuracy_report.rounded(row)) for row in rows)
    stem.with_suffix(".json").write_text(
        f'{{"machine": {json.dumps(about)},\n"points": [\n{lines}\n]}}\n'
    )
    stem.with_suffix(".md").write_text(accuracy_report.table(rows, about))
    accuracy_report.draw(rows, about, stem.with_suffix(".png"))
    print(accuracy_report.table(rows, about))


if __name__ == "__main__":
    main()
