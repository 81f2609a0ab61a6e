"""Properties of random calls, in a number that is fixed; ``make fuzz`` checks more of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import calls
import properties
import pytest
import torch
from calls import Call
from helpers import call as attend
from layouts import INPUT_NAMES, Inputs
from torch import Tensor

import attn_ext

pytestmark = pytest.mark.every_isa

TESTS = Path(__file__).parent
SEEDS = range(2)
EXAMPLES = {"triton": 5, "cuda": 50}
EXAMPLES_ON_CPU = 60


@pytest.mark.few(interpreted=1, others=1)
@pytest.mark.parametrize("seed", SEEDS)
def test_properties_hold(backend: str, seed: int):
    """All properties of all calls; a failure shows the smallest call that fails."""

    def use(call: Call) -> None:
        found = properties.examine(call, backend)
        failures = {name: result for name, result in found.items() if isinstance(result, str)}
        assert not failures, (
            f"{failures}: tests/fuzz.py --backend {backend} --call '{call.to_json()}'"
        )

    examples = EXAMPLES.get(backend, EXAMPLES_ON_CPU)
    calls.draw_calls(use, backend, seed, examples, shrink=True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="too large for it")
@pytest.mark.parametrize("line", (TESTS / "found_calls.jsonl").read_text().splitlines())
def test_calls_that_failed_once(line: str):
    """What ``make fuzz`` found on the CPU, before kernels were repaired, or the yardstick was told
    of float32's subnormal numbers, of float64's roundings, of 1 / cosh^2 or of 64 calculations.
    """
    found = properties.examine(Call.from_json(line), "cpu")
    assert not [result for result in found.values() if isinstance(result, str)], found


# ---- Each property can fail ----

PLAIN = Call(
    layout="padded_lengths",
    lengths_q=(3, 2, 3),
    lengths_k=(4, 0, 6),
    heads=2,
    features=5,
    value_features=3,
    dtypes=("float32",) * 3,
    strides=("contiguous",) * 3,
    incoming="contiguous",
    index_dtype="int64",
    tail_rows=0,
    magnitudes=(0,) * 4,
    ignored=0,
    dropout=0,
    need_weights=True,
    wanted=INPUT_NAMES,
    deterministic=True,
    bounds="absent",
    seed=0,
)
Results = tuple[Tensor, Tensor]


def inexact(inputs: Inputs, leaves: dict[str, Tensor], context: Tensor, weights: Tensor) -> Results:
    return context * 1.0001, weights


def inexact_gradient(inputs, leaves, context, weights) -> Results:
    key = leaves["key"]
    return context + 1e-4 * (key - key.detach()).nan_to_num().sum(), weights


def unnormalised(inputs, leaves, context, weights) -> Results:
    return context, weights * 1.0001


def by_place_in_the_batch(inputs, leaves, context, weights) -> Results:
    places = torch.arange(len(context)).view(-1, *[1] * (context.dim() - 1))
    return context * (1 + 1e-7 * places), weights


def by_size_of_the_batch(inputs, leaves, context, weights) -> Results:
    return context * (1 + 2e-7 * len(context)), weights


def by_layout(inputs, leaves, context, weights) -> Results:
    return context * (1.0001 if "cu_seqlens_k" in inputs.keywords else 1), weights


def by_size_of_scores(inputs, leaves, context, weights) -> Results:
    return context + 1e-4 * leaves["score_weight"].sum(), weights


def reading_ignored_keys(inputs, leaves, context, weights) -> Results:
    return context + 1e-7 * leaves["value"].nan_to_num().sum(), weights


def at_random(inputs, leaves, context, weights) -> Results:
    return context * (1 + 1e-6 * torch.rand(())), weights


BROKEN = [
    ("budget", inexact),
    ("budget", inexact_gradient),
    ("weights_sum_to_one", unnormalised),
    ("order_of_sequences", by_place_in_the_batch),
    ("split_batch", by_size_of_the_batch),
    ("padded_and_jagged", by_layout),
    ("constant_added_to_scores", by_size_of_scores),
    ("ignored_contents", reading_ignored_keys),
    ("repeated_call", at_random),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_property_can_fail(
    name: str, broken: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
):
    def call_broken(inputs: Inputs, leaves: dict[str, Tensor], **keywords) -> Results:
        return broken(inputs, leaves, *attend(inputs, leaves, **keywords))

    assert properties.examine(PLAIN, "cpu", [name]) == {name: True}
    monkeypatch.setattr(properties, "attend", call_broken)
    found = str(properties.examine(PLAIN, "cpu", [name])[name])
    assert found.startswith(("AssertionError", "OtherBits"))


def test_property_of_the_memory_can_fail(monkeypatch: pytest.MonkeyPatch):
    def attend(self, query: Tensor, attend=attn_ext.AttentionMemory.attend, **keywords):
        context, weights = attend(self, query, **keywords)
        return context * 1.0001, weights

    assert properties.examine(PLAIN, "cpu", ["memory"]) == {"memory": True}
    monkeypatch.setattr(attn_ext.AttentionMemory, "attend", attend)
    assert "AssertionError" in str(properties.examine(PLAIN, "cpu", ["memory"])["memory"])


# ---- The long run ----


def start_fuzz(state: Path, *arguments: str) -> subprocess.Popen:
    """Three chunks of a run, of few cases each."""
    code = f"import sys, fuzz; fuzz.CHUNK = {CASES_OF_CHUNK}; sys.exit(fuzz.main())"
    cases = ("--cases", str(CASES_OF_RUN), "--jobs", "1", "--state", str(state))
    return subprocess.Popen(
        [sys.executable, "-c", code, *cases, *arguments],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


CASES_OF_CHUNK, CASES_OF_RUN = 10, 25


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="run without it")
def test_long_run_goes_on_where_it_stopped(tmp_path: Path):
    """Killed after its first chunk it runs the others; once whole, there is nothing left to run."""
    process = start_fuzz(tmp_path, "--seed", "3")
    while not list(tmp_path.glob("*/chunk-*.json")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    (folder,) = tmp_path.iterdir()
    first = (folder / "chunk-00000.json").read_text()

    process = start_fuzz(tmp_path, "--summary", str(tmp_path / "summary.json"))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert re.match("seed 3, 25 cases, [12] of 3 chunks are done", output)
    assert (folder / "chunk-00000.json").read_text() == first
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["cases"], summary["seed"], summary["failures"]) == (CASES_OF_RUN, 3, [])
    assert sum(summary["cases_by_layout"].values()) == CASES_OF_RUN
    assert summary["cases_by_property"]["budget"] == CASES_OF_RUN
    assert sum(summary["cases_by_samples"].values()) == CASES_OF_RUN

    output = start_fuzz(tmp_path, "--seed", "3").communicate(timeout=300)[0]
    assert output.startswith("seed 3, 25 cases, 3 of 3 chunks are done")
