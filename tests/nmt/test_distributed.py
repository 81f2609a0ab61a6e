import json
from pathlib import Path

import ddp_worker
import pytest
import torch

from attn_ext.nmt import checkpoint
from attn_ext.nmt.distributed import World
from attn_ext.nmt.model import DECODERS

TWO_PROCESSES = ("--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def two_processes(nursery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    done = nursery.run("torchrun", *TWO_PROCESSES, ddp_worker.__file__, folder)
    assert done.status == 0, done.error
    return folder


def of_steps(run: Path, name: str):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


@pytest.mark.parametrize("name", list(ddp_worker.RUNS))
@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_two_processes_agree_with_each_other_and_with_one(two_processes, tmp_path, decoder, name):
    """Whether the update is one pass or several, and each process has all parameters or a part."""
    run = two_processes / f"{decoder}-{name}"
    first, second = (torch.load(run / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = ddp_worker.train(tmp_path, decoder, World())
    assert first["parameters"].keys() == second["parameters"].keys() == alone.keys()
    for parameter, expected in alone.items():
        ours = first["parameters"][parameter]
        assert torch.equal(ours, second["parameters"][parameter]), parameter
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    # Tokens are weighed across the ranks: losses and gradients are those of the whole batch.
    for kind, tolerance in (("loss", 1e-4), ("dev_loss", 1e-4), ("grad_norm", 1e-3)):
        expected = of_steps(tmp_path, kind)
        assert of_steps(run, kind) == pytest.approx(expected, rel=tolerance)
    translating, _ = checkpoint.load_model(run)  # with what one process needs
    averaged = checkpoint.load(run / "checkpoint.pt", "checkpoint")["averaged"]
    for parameter, value in translating.state_dict().items():
        assert torch.equal(value, averaged[f"module.{parameter}"]), parameter


def test_passes_are_reduced_once(two_processes):
    """Gradients go over the network once an update, however many passes it has."""
    counts = {
        name: torch.load(two_processes / f"gnmt-{name}" / "rank0.pt", weights_only=True)
        for name in ("ddp", "ddp-passes")
    }
    assert counts["ddp-passes"]["reductions"] == counts["ddp"]["reductions"] >= ddp_worker.STEPS


def test_a_sharded_run_goes_on_exactly(two_processes):
    losses = [of_steps(two_processes / name, "loss") for name in ("resumed", "gnmt-fsdp-passes")]
    assert losses[0] == losses[1]


def test_what_is_wrong_on_one_process_is_known_to_all(two_processes):
    assert [(two_processes / f"told-{rank}").read_text() for rank in (0, 1)] == [
        "only process 1 has it"
    ] * 2


def test_a_mistake_is_told_once(nursery, tmp_path):
    data, out = tmp_path / "pairs.tsv", tmp_path / "out"
    data.write_text("a\tb\nc\n")
    train = ["-m", "attn_ext.nmt.train", "--data", data, "--out", out, "--device", "cpu"]
    done = nursery.run("torchrun", *TWO_PROCESSES, *train)
    assert done.status
    assert done.error.count("error: ") == 1
    assert "line 2: expected source<TAB>target" in done.error
    assert not out.exists()
