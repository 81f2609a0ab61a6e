"""The error budget over a grid of magnitudes, dtypes, features and keys, and where it is hardest.

`python -m benchmarks.accuracy` measures the whole grid; here every STRIDE-th point is, or all with
ATTN_EXT_TEST_ALL=1.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    BACKEND_DEVICES,
    LOOKS,
    assert_within_budget,
    call,
    check,
    incoming_gradients,
    require_dtype,
)
from layouts import make_inputs
from yardstick import yardsticks

from benchmarks import accuracy

pytestmark = pytest.mark.every_isa

EVERYTHING = os.environ.get("ATTN_EXT_TEST_ALL") == "1"
# Prime to the numbers of magnitudes and of dtypes, so that every pair of them is tested.
STRIDE = 11
# From here on a point takes seconds: STRIDE times as few.
EXPENSIVE = 1 << 21
# The interpreter and emulated threads compute small points; see benchmarks.accuracy.
EMULATED = BACKEND_DEVICES.get("triton") == "cpu" or BACKEND_DEVICES.get("cuda") == "cpu"


def selected(points: list[accuracy.Point]) -> list[accuracy.Point]:
    """An even selection: from each size other pairs of a magnitude and a dtype."""
    if EVERYTHING:
        return points
    cheap = [point for point in points if point.elements < EXPENSIVE]
    expensive = [point for point in points if point.elements >= EXPENSIVE]
    return cheap[::STRIDE] + expensive[:: STRIDE * STRIDE]


def points_of_grid() -> Iterator:
    for point in selected(accuracy.grid()):
        dtype = str(point.dtype).removeprefix("torch.")
        name = f"{point.magnitude:g}-{dtype}-D={point.features}-Tk={point.keys}"
        is_huge = point.elements > 32 * EXPENSIVE  # takes 20 seconds
        yield pytest.param(point, id=name, marks=pytest.mark.nightly if is_huge else ())


@pytest.fixture(scope="module")
def yardstick() -> accuracy.Yardstick:
    return accuracy.Yardstick()


@pytest.mark.parametrize("point", list(points_of_grid()))
def test_grid(backend: str, point: accuracy.Point, yardstick: accuracy.Yardstick):
    require_dtype(backend, point.dtype)
    if EMULATED and point.elements > accuracy.EMULATED_ELEMENTS:
        pytest.skip("too large for kernels that are interpreted or emulated")
    inputs = accuracy.inputs_of(point)
    incoming = accuracy.incoming_of(inputs)
    exact, eager = yardstick.at(point, inputs, incoming)
    actual = accuracy.by_backend(inputs, incoming, backend)
    for name in accuracy.RESULTS:
        assert_within_budget(name, actual[name], exact[name], eager[name])


@pytest.mark.parametrize("keys", [2, 3, 13], ids="Tk={}".format)
@pytest.mark.parametrize("features", [32, 7], ids="D={}".format)
def test_what_all_keys_share_leaves_dquery(kernel_backend: str, features: int, keys: int):
    """Tiny queries and keys beside a feature that adds a constant to every score.

    Their slopes are all 1, so dquery is what is left of the sum of score gradients, which is 0.
    """
    for seed in range(8):
        inputs = make_inputs(
            "padded", lengths_q=[2], lengths_k=[keys], features=features, scale=1e-5, seed=seed
        )
        inputs.leaves["query"][..., 0] = 50
        inputs.leaves["key"][..., 0] = 1
        inputs.leaves["score_weight"][0] = 25
        incoming = incoming_gradients(inputs, need_weights=True)
        dquery = accuracy.by_backend(inputs, incoming, kernel_backend)["dquery"]
        # Only the CPU backend takes from the score gradients what rounding left of their sum.
        samples = 0 if kernel_backend == "cpu" else LOOKS[-1]
        exact, eager = yardsticks(inputs, incoming, samples=samples)
        assert_within_budget("dquery", dquery, exact["dquery"], eager["dquery"])


@pytest.mark.parametrize("scale_k", [1e-4, 1e-2, 0.1, 1])
@pytest.mark.parametrize("scale_q", [0.1, 1])
def test_gradients_that_nearly_cancel(kernel_backend: str, scale_q: float, scale_k: float):
    """Slopes hardly differ between keys: errors of theirs are all that is left."""
    inputs = make_inputs("padded", lengths_q=[5] * 3, lengths_k=[2, 3, 13], features=32)
    inputs.leaves["query"] *= scale_q
    inputs.leaves["key"] *= scale_k
    check(inputs, kernel_backend)


@pytest.mark.parametrize("gap", [60, 88, 95, 101])
def test_weights_down_to_the_smallest_number(gap: int, backend: str):
    """A key whose weight is exp(-gap), a subnormal float32 from 87.4 on, the only other's being 1.

    GPUs and what compiles for them take subnormals for 0, in eager PyTorch's exp too.
    """
    if backend not in ("cpu", "reference"):
        pytest.skip(f"backend {backend} takes subnormal numbers for 0")
    inputs = make_inputs("padded", lengths_q=[1], lengths_k=[2], features=1)
    inputs.leaves["query"][:] = 0
    inputs.leaves["key"][:] = torch.tensor([10.0, -10.0])[None, :, None]
    inputs.leaves["score_weight"][:] = gap / 2
    weights = call(inputs, inputs.leaves, backend=backend, need_weights=True)[1]
    exact, eager = yardsticks(inputs, incoming_gradients(inputs, need_weights=True))
    for key in range(2):  # each to its own scale
        results = (of["weights"][..., key] for of in ({"weights": weights}, exact, eager))
        assert_within_budget(f"weight {key}", *results)
