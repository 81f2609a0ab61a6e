"""The benchmark's own machinery, on a CPU and at tiny sizes; no time is asserted."""

import json
import sys
import types

import pytest
import torch

from benchmarks import bench_additive_attention, harness, providers
from benchmarks.reach import TABLE, verdicts
from benchmarks.workloads import WORKLOADS, Workload, make_inputs

RAGGED = Workload("tiny", (3, 1, 4), (2, 3, 1), 8, 8)
ONE_QUERY = Workload("tiny", (3, 1, 4), (1, 1, 1), 8, 6, cold=True)
LOOP = Workload("tiny", (3, 1, 4), (1, 1, 1), 8, 6, steps=2)
TIED = Workload("tiny", (3, 1, 4), (2, 3, 1), 8, 8, tied=True)


def test_edges_are_each_querys_keys():
    offsets, indices = providers.edges(make_inputs(RAGGED))
    assert offsets.tolist() == [0, 3, 6, 7, 8, 9, 13]
    assert indices.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7]


def _graph_attention(graph, nodes, score_weight, *, activation):
    """GATv2 attention in plain PyTorch: sums of source nodes, by destination."""
    assert activation == "tanh"
    sources, destinations = nodes
    offsets = graph.offsets.tolist()
    rows = []
    for query, begin, end in zip(destinations, offsets[:-1], offsets[1:], strict=True):
        keys = sources[graph.indices[begin:end].long()]
        rows.append((torch.tanh(query + keys) @ score_weight).softmax(0) @ keys)
    return torch.stack(rows)


@pytest.fixture
def graph_library(monkeypatch):
    """A stand-in for NVIDIA's package with the one function the benchmark calls."""

    class CscGraph:
        def __init__(self, offsets, indices, num_src_nodes):
            assert offsets.dtype == indices.dtype == torch.int32
            assert int(indices.max()) < num_src_nodes
            self.offsets, self.indices = offsets, indices

    package = types.ModuleType("cudnn")
    package.backend_version = lambda: 92700
    package.backend_version_string = lambda: "9.27.0"
    package.gnn = types.ModuleType("cudnn.gnn")
    package.gnn.CscGraph, package.gnn.mha_gat_v2 = CscGraph, _graph_attention
    monkeypatch.setitem(sys.modules, "cudnn", package)
    monkeypatch.setitem(sys.modules, "cudnn.gnn", package.gnn)
    return package


def test_graph_peer_computes_the_tied_problem(graph_library):
    cases = harness.make_cases(TIED, ["eager", "cudnn", "reference"], torch.float32, "cpu")
    assert list(cases) == ["eager", "cudnn", "reference"]
    assert all(case.error < harness.PEER_ALLOWANCE for case in cases.values())


def test_graph_peer_says_why_it_is_absent(graph_library, monkeypatch):
    assert "CUDA tensors" in providers.problem("cudnn", "cpu")
    assert "9.27.0 is older" in providers.problem("cudnn", "cuda")
    graph_library.backend_version = lambda: 92800
    assert providers.problem("cudnn", "cuda") is None
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert "pip install" in providers.problem("cudnn", "cuda")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("workload", [RAGGED, ONE_QUERY, LOOP, TIED], ids=lambda w: w.description)
def test_every_kind_of_case_runs_in_every_mode(workload, mode):
    names = ["eager", "reference", "reference" + harness.CAPTURED]
    cases = harness.make_cases(workload, names, torch.float32, "cpu")
    timings = harness.time_cases(cases, mode, budget=0, rounds=3)
    assert list(timings) == names
    assert all(timing.rounds == 3 and timing.processor > 0 for timing in timings.values())


def test_cold_inputs_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: make_inputs(ONE_QUERY).bytes)
    case = harness.make_cases(ONE_QUERY, ["reference"], torch.float32, "cpu")["reference"]
    assert len(case._runs) == harness.COLD_FACTOR
    outputs = [case.output(copy) for copy in range(harness.COLD_FACTOR)]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert not {leaf.data_ptr() for leaf in case._leaves[0]} & {
        leaf.data_ptr() for leaf in case._leaves[1]
    }


def test_wrong_results_stop_the_benchmark(monkeypatch):
    attend = providers.attend_padded
    monkeypatch.setattr(providers, "attend_padded", lambda *inputs: 2 * attend(*inputs))
    with pytest.raises(AssertionError, match="eager: output is off"):
        harness.make_cases(RAGGED, ["eager"], torch.float32, "cpu")


@pytest.mark.parametrize("mode", harness.MODES)
def test_replays_that_give_other_results_stop_the_benchmark(mode, monkeypatch):
    name = "reference" + harness.CAPTURED
    cases = harness.make_cases(RAGGED, [name], torch.float32, "cpu")
    in_turn = harness.Case._in_turn

    def stale(case, mode):
        replay, results, expected, outputs = in_turn(case, mode)
        replay()
        for result in results:
            for tensor in harness._tensors(result):
                tensor.detach().view(-1)[-1] += 1e-2 * tensor.abs().max()
        return lambda: None, results, expected, outputs

    monkeypatch.setattr(harness.Case, "_in_turn", stale)
    with pytest.raises(
        AssertionError, match=rf"^reference\+graph, {mode}: replayed, copy 0 is off"
    ):
        harness.time_cases(cases, mode, budget=0, rounds=3)


def test_bytes_moved_count_each_number_once():
    # 3 queries, 8 keys, D 8, Dv 6: query, key, value read; context written.
    forward = 4 * (3 * 8 + 8 * (8 + 6) + 3 * 6)
    gradients = 4 * (3 * 8 + 8 * (8 + 6))
    assert ONE_QUERY.bytes_moved("forward", 4) == forward
    assert ONE_QUERY.bytes_moved("backward", 4) == forward + gradients
    assert ONE_QUERY.bytes_moved("both", 4) == 2 * forward + gradients


def test_reach_names_workloads_that_exist_and_judges_rows():
    for rows in TABLE.values():
        assert {workload for workload, _ in rows} <= WORKLOADS.keys()
    row = {"workload": "at-once", "mode": "forward", "captured": False, "vs_compile": 6.0}
    row["median"] = 0.5e-3
    found = verdicts(row, "cuda", "bfloat16")
    assert found == ["vs_compile >= 5: met", "median <= 0.00045: SHORT, 0.0005"]
    row.pop("vs_compile")
    assert verdicts(row, "cuda", "bfloat16")[0] == "vs_compile >= 5: not measured"


def test_command_prints_and_writes_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WORKLOADS, "tiny", ONE_QUERY)
    monkeypatch.setattr(providers, "available", lambda device: ["eager", "reference"])
    arguments = ["--device", "cpu", "--workloads", "tiny", "--seconds", "0", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(tmp_path)])
    peaks = {"multiply_adds_per_second": 1e12, "copied_bytes_per_second": 1e12}
    monkeypatch.setattr(harness, "measured_peaks", lambda device: peaks)
    bench_additive_attention.main()
    assert "cudnn: not available" in capsys.readouterr().out
    (report,) = tmp_path.glob("*.json")
    rows = json.loads(report.read_text())["rows"]
    assert {(row["provider"], row["mode"]) for row in rows} == {
        (provider, mode) for provider in ("eager", "reference") for mode in ("forward", "both")
    }
    assert all(row["share_of_copy"] > 0 for row in rows)
    assert report.with_suffix(".png").exists()


def test_what_is_said_of_a_gpu(monkeypatch):
    """On a machine that has none, of one like it."""
    properties = types.SimpleNamespace(multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    facts = bench_additive_attention.machine("cuda")
    assert facts["slug"] == "nvidia-h100-80gb-hbm3"
    assert facts["multiprocessors"] == 132
