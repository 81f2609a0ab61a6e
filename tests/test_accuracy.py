"""``python -m benchmarks.accuracy``: which points it takes, and what it says of the machine."""

import argparse
from pathlib import Path

import pytest

from benchmarks import accuracy


@pytest.mark.parametrize("thin", [1, 2, 3, 4, 8, 9, 16])
def test_thinned_grid_keeps_all_dtypes_and_magnitudes(thin: int):
    whole = accuracy.grid()
    points = accuracy.thinned(whole, accuracy.thinning(str(thin)))
    combinations = len(whole) // len(accuracy.DTYPES)
    assert len(points) == len(accuracy.DTYPES) * -(-combinations // thin)
    by_inputs: dict[tuple, list] = {}
    for point in points:
        place = point.magnitude, point.features, point.keys
        by_inputs.setdefault(place, []).append(point.dtype)
    assert all(dtypes == list(accuracy.DTYPES) for dtypes in by_inputs.values())
    assert {magnitude for magnitude, _, _ in by_inputs} == set(accuracy.MAGNITUDES)


@pytest.mark.parametrize("text", ["0", "-1", "7", "14", "two"])
def test_thinning_that_would_leave_one_magnitude_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a positive number that 7 does"):
        accuracy.thinning(text)


def test_machine_without_proc(monkeypatch: pytest.MonkeyPatch):
    """As on macOS."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(Path, "read_text", lambda path: pytest.fail(f"{path} was read"))
    assert accuracy.machine()["processor"]
