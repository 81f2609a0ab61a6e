"""The bars of the kernels' machine code, and what is predicted from it; no GPU is needed."""

import fcntl
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from attn_ext.triton_kernels import launch_backward  # noqa: E402
from benchmarks import dynamic, predict, sass, static, static_cases  # noqa: E402
from benchmarks.floors import Floor, floor  # noqa: E402
from benchmarks.workloads import Workload  # noqa: E402

ROOT = Path(__file__).parents[1]


def figures(pass_: str, slots: float, *routes: str) -> static.Figures:
    element = sass.PerElement(slots, mufu=0.5, reciprocals=0.5, fp32=3.0)
    common = ("kernel", "all", pass_, "bf16", 1024, "sm_90", 4, 128, 0, 0, True, routes)
    return static.Figures(*common, element=element, ceiling=element.ceiling(90))


def test_passes_of_the_backward_are_added_by_route():
    """Alternatives are not added to each other, and of variants of a pass the heaviest counts."""
    rows = [
        figures("forward", 4),
        figures("backward scores", 4),
        figures("backward scores", 5),
        figures("backward whole", 3, "short"),
        figures("backward query", 2, "long"),
        figures("backward key", 2.5, "long"),
    ]
    sums = {row.routes: row for row in static.backward_sums(rows)}
    assert {routes: row.element.slots for routes, row in sums.items()} == {
        ("short",): 8,
        ("long",): 9.5,
    }
    assert (sums[("short",)].element.mufu, sums[("long",)].element.mufu) == (1.0, 1.5)
    # One after the other: clocks an element add up.
    assert sums[("short",)].ceiling == pytest.approx(1 / (5 / 128 + 1 / 32))
    (only,) = static.backward_sums(rows[:3])
    assert (only.routes, only.element.slots) == ((), 5)


# ---- The kernels: one run of the command, whatever TRITON_INTERPRET says here. Two minutes of
# compiling for what is about speed alone, so nightly. ----


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """What the command finds for sm_90, bfloat16, 1024 features.

    It takes minutes, so of pytest-xdist's workers the first to come runs it, for all.
    """
    folder = tmp_path_factory.getbasetemp()
    result = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "static.json"
    command = [sys.executable, "-m", "benchmarks.static", "--quick", "--json", result]
    command += ["--dtype", "bf16", "--dim", "1024"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with open(result.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            subprocess.run(
                command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
            )
    return json.loads(result.read_text())["rows"]


@pytest.mark.nightly
def test_the_yardstick_is_what_torch_compile_emits(rows):
    """libdevice.tanh takes 20.75 slots there; versions of ptxas differ by a tenth."""
    (tanh,) = (row for row in rows if row["kernel"] == "libdevice.tanh")
    assert tanh["element"]["slots"] == pytest.approx(20.75, rel=0.1)
    assert (tanh["element"]["mufu"], tanh["element"]["reciprocals"]) == (2, 1)
    assert tanh["spills"] == 0


@pytest.fixture
def kernels(rows) -> list[dict]:
    """Without the yardstick."""
    return [row for row in rows if row["kernel"] != static.YARDSTICK]


@pytest.mark.nightly
def test_nothing_spills_where_the_time_goes(kernels):
    """Forward, which takes all the registers there are, may between loops."""
    assert kernels
    assert [row for row in kernels if row["loop_spills"]] == []
    assert {row["kernel"] for row in kernels if row["spills"]} <= {"fwd"}
    assert max(row["spills"] for row in kernels) < 300


@pytest.mark.nightly
def test_every_main_loop_is_found(kernels):
    """A kernel whose row states elements has a loop that takes reciprocals for them."""
    cases = [case for case in kernels if case["per_element"]]
    assert cases
    assert [case["kernel"] for case in cases if case["element"] is None] == []


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("pass_", "slots", "mufu"), [("forward", 4.5, 0.6), ("backward", 8.5, 0.6)]
)
def test_all_at_once_kernels_issue_little(kernels, pass_, slots, mufu):
    """The backward is the sum over its passes. tanh itself takes 20.75 slots and 2 MUFU."""
    found = [row for row in kernels if (row["regime"], row["pass_"]) == ("all", pass_)]
    found = [row for row in found if row["per_element"]]
    assert found
    for row in found:
        assert row["element"]["slots"] <= slots, row
        assert row["element"]["mufu"] <= mufu, row


@pytest.mark.nightly
@pytest.mark.parametrize("regime", ["all", "long", "step"])
def test_scores_cost_no_more_than_in_attention(kernels, regime):
    def slots(pass_: str) -> list[float]:
        rows = [row for row in kernels if (row["regime"], row["pass_"]) == (regime, pass_)]
        return [row["element"]["slots"] for row in rows if row["element"]]

    assert slots("scores")
    assert max(slots("scores")) <= 1.01 * max(slots("forward"))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("regime", "pointers"),
    [("step", ("key_ptr", "value_ptr")), ("pool", ("key_ptr", "gate_ptr", "value_ptr"))],
)
def test_kernels_bound_by_memory_load_rows_16_bytes_at_a_time(kernels, regime, pointers):
    found = [row for row in kernels if row["regime"] == regime]
    found = [row for row in found if regime == "pool" or row["pass_"] in ("forward", "scores")]
    loads = [
        (row["kernel"], pointer, set(row["load_widths"][pointer]))
        for row in found
        for pointer in pointers
        if pointer in row["load_widths"]
    ]
    assert {pointer for _, pointer, _ in loads} == set(pointers)
    assert [load for load in loads if load[2] != {"16"}] == []


@pytest.mark.parametrize("length_q", [1, 9], ids=["one_step", "several"])
def test_gradients_of_returned_weights_compile_nothing_anew(length_q: int):
    """Whatever their lengths and strides: no kernel is the faster for knowing those."""
    found = []
    for length_k, expanded in ((15, False), (16, False), (33, True), (64, False)):
        shape = (static_cases.BATCH, 1, length_q, length_k)
        dweights = torch.ones(()).expand(shape) if expanded else torch.ones(shape)
        query = torch.empty(static_cases.BATCH, length_q, 1, 32)
        key = torch.empty(static_cases.BATCH, length_k, 1, 32)
        inputs = query, key, key, torch.empty(1, 32)
        stats = torch.empty(*query.shape[:3], 2)
        layout = None, None, None, None, length_q, length_k, 0.0, None, 1
        with static_cases.noted_launches() as launches:
            launch_backward.additive_attention_backward(
                query, dweights, *inputs, stats, stats, *layout, 15, False
            )
        case = static_cases.make_case(launches[0], "all", "backward", "fp32", 32)
        found.append((case.signature, case.aligned))
    assert all(kinds == found[0] for kinds in found), found


def test_a_kernel_is_looked_up_by_the_same_text_in_every_process(monkeypatch):
    """Triton's cache on disk goes by the text of what is compiled; a set's order is by chance."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted, not compiled, in this process")
    import triton

    (case,) = (case for case in static.load_cases() if case.name == static.YARDSTICK)
    texts = set()
    monkeypatch.setattr(triton, "compile", lambda source, **_: texts.add(source.hash()))
    for aligned in itertools.permutations(sorted(case.aligned)):
        static.compile_case(SimpleNamespace(**{**vars(case), "aligned": aligned}), "sm_90")
    assert len(texts) == 1


# ---- Predictions ----


def launch(slots: list[float], resident: int = 1, name: str = "fwd", **counted) -> dynamic.Launch:
    opcodes = Counter({"MUFU.RCP": counted.get("mufu", 0), "FFMA": 1000})
    memory = Counter({"global loads: sectors": counted.get("sectors", 0)})
    return dynamic.Launch(
        name, np.array(slots), opcodes, memory, resident, "dealt" if name == "fwd" else ""
    )


def test_blocks_share_a_multiprocessor():
    """A multiprocessor issues 4 slots a clock, and a place that is free takes the next block."""
    count = dynamic.PROCESSORS
    assert dynamic.makespan(np.full(2 * count, 8.0), 1) == 4
    assert dynamic.makespan(np.full(2 * count, 8.0), 2) == 4
    assert dynamic.makespan(np.array([80.0] + [8.0] * count), 1) == 20
    assert dynamic.makespan(np.array([8.0] * count + [80.0]), 1) == 22
    # Two that start together: the short one ends at 4, and the long one is alone from then on.
    two = np.concatenate([np.full(count, 80.0), np.full(count, 8.0)])
    assert dynamic.makespan(two, 2) == pytest.approx(22)


def test_batch_of_a_sample_is_dealt_by_work():
    """In turns from the first multiprocessor to the last and back; empty blocks are left out. More
    than there is room for at once come as they are, the largest first."""
    count = dynamic.PROCESSORS
    blocks = dynamic.batch_blocks(launch([8.0, 800.0, 400.0]), count)
    assert blocks.tolist() == [800.0] * count + [400.0] * count
    ramp = [float(i) for i in range(1000, 1000 + 2 * count + 1)]
    assert dynamic.batch_blocks(launch(ramp), 1).tolist() == ramp[::-1]
    ramp = ramp[: count + 1]
    dealt = dynamic.batch_blocks(launch(ramp), 1)
    assert sorted(dealt) == ramp
    assert (dealt[0], dealt[count]) == (ramp[1], ramp[0])
    unsorted = dynamic.batch_blocks(launch([400.0, 800.0], name="bwd_scores"), 2)
    assert unsorted.tolist() == [400.0, 800.0] * 2


def test_batches_are_dealt_as_kernels_deal(monkeypatch: pytest.MonkeyPatch):
    """See tests/test_triton.py."""
    monkeypatch.setattr(dynamic, "PROCESSORS", 4)
    assert dynamic.dealt(9).tolist() == [3, 0, 1, 2, 4, 7, 6, 5, 8]
    assert dynamic.dealt(8).tolist() == [0, 1, 2, 3, 7, 6, 5, 4]


def test_predictions_are_the_slowest_of_three():
    clock = 1 / (dynamic.CLOCK_GHZ * 1e9)
    count = dynamic.PROCESSORS
    assert predict.seconds(launch([4000.0]), count) == pytest.approx(1000 * clock)
    # 32 lanes of a warp at 16 a clock: 2 clocks an instruction.
    assert predict.seconds(launch([4.0], mufu=700), count) == pytest.approx(1400 * clock)
    assert predict.seconds(launch([4.0], sectors=10**6), 3) == pytest.approx(3 * 32e6 / 3e12)


def test_a_batch_is_predicted_from_a_sample_of_it(monkeypatch):
    execute = mock.create_autospec(dynamic.run, return_value=([launch([4000.0])], []))
    monkeypatch.setattr(dynamic, "run", execute)
    alike = Workload("alike", (75,) * 264, (70,) * 264, 1024, 1024)
    found = predict.executed(alike, sample=16)
    execute.assert_called_once_with("triton", (70,), (75,), 75, 1024, "sm_90", 264)
    assert found == {"forward": pytest.approx(2000 / (dynamic.CLOCK_GHZ * 1e9)), "backward": 0}


def test_floors_are_the_slower_of_memory_and_arithmetic():
    peaks = {"copied_bytes_per_second": 1e3, "special_functions_per_second": 1e3}
    pairs = Workload("tiny", (8,), (4,), 10, 10)
    # 32 pairs of 10 features at half an operation; 4 + 8 + 8 + 4 rows of 10 numbers of 2 bytes.
    assert floor(pairs, "forward", 2, peaks) == Floor(0.48, "memory")
    peaks["copied_bytes_per_second"] = 1e6
    assert floor(pairs, "forward", 2, peaks) == Floor(0.16, "arithmetic")
    assert floor(pairs, "both", 2, peaks) == Floor(0.32, "arithmetic")
    assert floor(pairs, "both", 2, {"copied_bytes_per_second": 1e6}) is None
    assert floor(Workload("loop", (8,), (1,), 10, 10, steps=3), "both", 2, peaks) is None
