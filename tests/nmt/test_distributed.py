import json
from pathlib import Path

import ddp_worker
import pytest
import torch

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


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_two_processes_agree_with_each_other_and_with_one(two_processes, tmp_path, decoder):
    run = two_processes / f"{decoder}-2"
    first, second = (torch.load(run / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = ddp_worker.train(tmp_path, decoder, World())
    assert first.keys() == second.keys() == alone.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-4)
    # Tokens are weighed across the ranks: losses and gradients are those of the whole batch.
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        expected = of_steps(tmp_path / f"{decoder}-1", name)
        assert of_steps(run, name) == pytest.approx(expected, rel=tolerance)


def test_a_mistake_is_told_once(nursery, tmp_path):
    data, out = tmp_path / "pairs.tsv", tmp_path / "out"
    data.write_text("a\tb\nc\n")
    train = ["-m", "attn_ext.nmt.train", "--data", data, "--out", out, "--device", "cpu"]
    done = nursery.run("torchrun", *TWO_PROCESSES, *train)
    assert done.status
    assert done.error.count("error: ") == 1
    assert "line 2: expected source<TAB>target" in done.error
    assert not out.exists()
