"""The benchmark's own machinery, on a CPU and at tiny sizes; no time is asserted."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import attn_ext
from attn_ext.nmt import corpora
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.model import ModelConfig
from benchmarks import (
    bench_additive_attention,
    bench_training,
    harness,
    providers,
    training_text,
)
from benchmarks.padded_attention import PaddedAttention
from benchmarks.reach import TABLE, TRAINING, judge, verdicts
from benchmarks.workloads import WORKLOADS, Workload, make_inputs

MAKEFILE = Path(__file__).parents[1] / "Makefile"
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


@pytest.fixture
def tiny_command(monkeypatch, tmp_path):
    """The benchmark of the op on a tiny workload; returns its report's path."""
    monkeypatch.setitem(WORKLOADS, "tiny", ONE_QUERY)
    monkeypatch.setattr(providers, "available", lambda device: ["eager", "reference"])
    arguments = ["--device", "cpu", "--workloads", "tiny", "--seconds", "0", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(tmp_path)])
    peaks = {"multiply_adds_per_second": 1e12, "copied_bytes_per_second": 1e12}
    monkeypatch.setattr(harness, "measured_peaks", lambda device: peaks)

    def run():
        bench_additive_attention.main()
        (report,) = tmp_path.glob("*.json")
        return report

    return run


def test_command_prints_and_writes_its_table(tiny_command, capsys):
    report = tiny_command()
    assert "cudnn: not available" in capsys.readouterr().out
    rows = json.loads(report.read_text())["rows"]
    assert {(row["provider"], row["mode"]) for row in rows} == {
        (provider, mode) for provider in ("eager", "reference") for mode in ("forward", "both")
    }
    assert all(row["share_of_copy"] > 0 for row in rows)
    assert report.with_suffix(".png").exists()


def test_command_without_matplotlib_writes_its_table(tiny_command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = tiny_command()
    assert "nothing drawn: import of matplotlib" in capsys.readouterr().out
    assert json.loads(report.read_text())["rows"] and not report.with_suffix(".png").exists()


def test_command_goes_on_after_a_workload_that_fails(tiny_command, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(WORKLOADS, "broken", RAGGED)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--workloads", "broken,tiny"])
    bench_workload = bench_additive_attention.bench_workload

    def fail(workload, *rest):
        if workload is RAGGED:
            raise KeyError("of a compiler")
        return bench_workload(workload, *rest)

    monkeypatch.setattr(bench_additive_attention, "bench_workload", fail)
    with pytest.raises(SystemExit, match="failed: broken, 1 threads: KeyError: 'of a compiler'"):
        tiny_command()
    (report,) = tmp_path.glob("*.json")
    assert {row["workload"] for row in json.loads(report.read_text())["rows"]} == {"tiny"}


def test_what_is_said_of_a_gpu(monkeypatch):
    """On a machine that has none, of one like it."""
    properties = types.SimpleNamespace(multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    facts = bench_additive_attention.machine("cuda")
    assert facts["slug"] == "nvidia-h100-80gb-hbm3"
    assert facts["multiprocessors"] == 132


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hand_written_attention_computes_the_modules(dtype):
    own = attn_ext.AdditiveAttention(5, 6, 8).to(dtype)
    query, key = (torch.randn(rows, dim, dtype=dtype) for rows, dim in ((6, 5), (8, 6)))
    padded = PaddedAttention(own, providers.attend_padded, providers.attend_step)
    assert [name for name, _ in padded.named_parameters()] == [
        name for name, _ in own.named_parameters()
    ]
    offsets_q, offsets_k = torch.tensor([0, 2, 5, 6]), torch.tensor([0, 3, 4, 8])
    offsets = {"cu_seqlens_q": offsets_q, "cu_seqlens_k": offsets_k}
    bounds = {"max_seqlen_q": 3, "max_seqlen_k": 4}
    tolerances = {"rtol": 0, "atol": 20 * harness.ROUNDING[dtype] * key.abs().max().item()}
    rest = {"need_weights": False, "backend": None}
    found = padded(query, key, **offsets, **bounds, **rest)
    torch.testing.assert_close(found, own(query, key, **offsets, **bounds), **tolerances)
    keys = {"cu_seqlens_k": offsets_k, "max_seqlen_k": 4}
    steps = [module.memory(key, backend=None, **keys).attend(query[:3]) for module in (padded, own)]
    torch.testing.assert_close(*steps, **tolerances)


TINY_MODEL = ["--hidden", "8", "--layers", "2", "--vocab-size", "300", "--seconds", "0"]


def train(monkeypatch, *arguments):
    """The command on a CPU with a tiny model; those arguments first."""
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", *TINY_MODEL, *arguments])
    bench_training.main()


@pytest.mark.parametrize(
    ("decoder", "has_bf16"), [("gnmt", None), ("rnnsearch", None), ("gnmt", False)]
)
def test_training_prints_and_writes_its_table(decoder, has_bf16, monkeypatch, tmp_path, capsys):
    """In bfloat16 where this machine has it, and in float32 where it, or one made so, has not."""
    if has_bf16 is False:
        monkeypatch.setattr(bench_training, "bf16_problem", lambda *_: "none on this machine")
    config = ModelConfig(300, decoder)
    problem = bench_training.bf16_problem(config, torch.device("cpu"), None)
    dtype = "float32" if problem else "bfloat16"
    trained_in, step = set(), bench_training.Trainer.step
    monkeypatch.setattr(
        bench_training.Trainer,
        "step",
        lambda trainer, batch: trained_in.add(trainer.options.bf16) or step(trainer, batch),
    )
    out = ["--out", str(tmp_path / "results"), "--decoder", decoder]
    path = tmp_path / "pairs.tsv"
    words = ["eins", "zwei", "drei"]
    path.write_text("".join(f"{' '.join(words[: n % 3 + 1])} {n}\tone {n}\n" for n in range(60)))
    train(monkeypatch, "--data", str(path), "--batches", "2,3", *out)
    (written,) = (tmp_path / "results").glob("training_*.json")
    report = json.loads(written.read_text())
    assert report["text"].startswith(str(path)) and report["model"]["decoder"] == decoder
    assert report["dtype"] == dtype and trained_in == {dtype == "bfloat16"}
    assert report["checked"].keys() == {"eager", "attn_ext"}
    assert all(found["share_of_error_budget"] <= 1 for found in report["checked"].values())
    rows = {(row["batching"], row["provider"]): row for row in report["rows"]}
    assert {key: row["batch"] for key, row in rows.items()} == {
        (batching, provider): batch
        for batching in ("drawn", "bucketed")
        for provider, batch in (("eager", 2), ("attn_ext", 3))
    }
    printed = capsys.readouterr().out
    assert f"vocabulary 300; {dtype}; cpu" in printed.splitlines()[0]
    assert (f"float32 instead of bfloat16: {problem}\n" in printed) == (problem is not None)
    for row in rows.values():
        assert row["dtype"] == dtype
        assert re.search(rf"{row['provider']} +{dtype} +{row['batch']} ", printed)
        assert f"{row['tokens_per_second']:,.0f} ({row['tokens_vs_eager']:.2f}x)" in printed
        assert all(len(cell["seconds"]) >= 3 and cell["tokens"] for cell in row["cells"])
        assert "batch_vs_eager" not in row and "reach" not in row
    assert [cell["size"] for cell in rows["drawn", "attn_ext"]["cells"]] == [2, 3]


def test_training_searches_for_batches_where_none_are_given(monkeypatch, tmp_path, capsys):
    """On a machine without a GPU, whose memory is as large as is said here."""
    limits = {"eager": 2, "attn_ext": 5}
    problem = bench_training.Bench.problem

    def full(bench, cell):
        return problem(bench, cell) or ("full" if cell.size > limits[cell.provider] else None)

    monkeypatch.setattr(bench_training.Bench, "problem", full)
    monkeypatch.setattr(training_text, "mixture", lambda count, seed: (2, 3, 4))
    arguments = ["--batches", "1", "--synthetic", "--batchings", "drawn", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", *TINY_MODEL, *arguments])
    options = bench_training.parse_arguments()
    options.batches = None
    monkeypatch.setattr(bench_training, "parse_arguments", lambda: options)
    monkeypatch.setattr(bench_training, "SMALLEST", 2)
    bench_training.main()
    (written,) = tmp_path.glob("training_*.json")
    eager, own = json.loads(written.read_text())["rows"]
    assert (eager["batch"], own["batch"]) == (2, 5)
    assert own["batch_vs_eager"] == 2.5 and own["limited_by"] == "full"
    assert "synthetic text, real lengths" in capsys.readouterr().out
    own["tokens_vs_eager"] = 1.2
    assert judge(TRAINING, own) == [
        "tokens_vs_eager >= 1.3: SHORT, 1.2",
        "batch_vs_eager >= 2: met",
    ]


def test_training_text_without_a_corpus_is_synthetic_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path))
    text = training_text.read_text(300)
    assert text.label == "synthetic text, real lengths (GNMT's)"
    assert "no text at hand (no " + str(tmp_path) in capsys.readouterr().out
    lengths = [len(source) for source, _ in text.examples]
    assert lengths == [len(target) for _, target in text.examples]
    assert min(lengths) == 10 and max(lengths) == 60
    ids = {token for example in text.examples[:500] for side in example for token in side}
    assert min(ids) == 3 and max(ids) == 299
    with pytest.raises(UsageError, match="cannot read"):
        training_text.read_text(300, data=str(tmp_path / "missing.tsv"))


def test_training_text_with_a_corpus_but_no_subwords_is_synthetic(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path))
    (tmp_path / corpora.HOMEASSISTANT_WHEEL).touch()
    pairs = [corpora.Pair(f"word {n}", f"Wort {n}", str(n)) for n in range(50)]
    monkeypatch.setattr(corpora, "read_homeassistant_wheel", lambda path: pairs)
    assert training_text.read_text(300).label.startswith("homeassistant: ")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert training_text.read_text(300).label.startswith("synthetic text")
    assert "package 'sentencepiece' is needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("provider", "problem"),
    [("attend_padded", None), ("sum_product_padded", None), ("sum_product_padded", "no bf16")],
    ids=["eager-bfloat16", "compile-bfloat16", "compile-float32"],
)
def test_training_with_a_wrong_attention_stops(provider, problem, monkeypatch, tmp_path):
    """Found in bfloat16 on any machine: the batch that is checked has sentences of all lengths."""
    monkeypatch.setattr(bench_training, "bf16_problem", lambda *_: problem)
    attend = getattr(providers, provider)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(providers, provider, lambda *inputs: -attend(*inputs))
    arguments = ["--synthetic", "--batches", "1", "--providers", "eager,compile,attn_ext"]
    with pytest.raises(AssertionError, match="errs by .* of what is allowed"):
        train(monkeypatch, *arguments, "--out", str(tmp_path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--batches is needed on a CPU"),
        (["--batches", "1,2,3"], "expected one or two sizes"),
        (["--batches", "0"], "expected a positive whole number"),
        (["--batches", "1", "--providers", "attn_ext"], "eager, with which"),
        (["--batches", "1", "--providers", "eager,flash"], "flash: expected some of"),
        (["--batches", "1", "--data", "a.tsv", "--synthetic"], "not allowed with"),
    ],
)
def test_training_refuses_wrong_arguments(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        train(monkeypatch, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_sanitizers_of_make_gpu_have_tests_to_run():
    """Their expression is one that pytest takes, and selects some tests."""
    (arguments,) = re.findall(r'pytest -q -m gpu (tests/.*?-k ".*?")', MAKEFILE.read_text(), re.S)
    arguments = shlex.split(arguments.replace("\\\n", " "))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    done = subprocess.run(command, cwd=MAKEFILE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    selected = [line for line in done.stdout.splitlines() if "::" in line]
    for layout in ("jagged", "padded_mask", "one_step"):
        assert any(f"-{layout}-heads=3" in line for line in selected)
    assert all("heads=3" in line for line in selected)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("failing", ["worksteal", "bench_additive", "training", "memcheck", ""])
def test_make_gpu_runs_every_part_and_fails_if_one_does(failing, tmp_path, monkeypatch):
    fake = '#!/bin/sh\necho "$*" >>log\n! echo "$*" | grep -q "$FAILING"\n'
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(fake)
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    monkeypatch.setenv("FAILING", failing or "nothing")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = ["make", "-f", str(MAKEFILE), "gpu", "PYTHON=python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (not failing), done.stderr
    log = (tmp_path / "log").read_text()
    parts = ("worksteal", "bench_additive", "bench_training", "memcheck", "racecheck", "initcheck")
    assert all(part in log for part in parts)
