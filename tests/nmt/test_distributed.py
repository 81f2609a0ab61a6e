import json
import os
import subprocess
import sys
from pathlib import Path

import ddp_worker
import pytest
import torch

from attn_ext.nmt.distributed import World
from attn_ext.nmt.model import DECODERS


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ddp_worker.__file__, str(folder)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def losses(run: Path):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_two_processes_agree_with_each_other_and_with_one(two_processes, tmp_path, decoder):
    run = two_processes / f"{decoder}-2"
    first, second = (torch.load(run / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = ddp_worker.train(tmp_path, decoder, World())
    assert first.keys() == second.keys() == alone.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-4)
    # Tokens are weighed across the ranks, so the losses are those of the whole batch.
    assert losses(run) == pytest.approx(losses(tmp_path / f"{decoder}-1"), rel=1e-4)


def test_a_mistake_is_told_once(tmp_path):
    data = tmp_path / "pairs.tsv"
    data.write_text("a\tb\nc\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "attn_ext.nmt.train", "--data", str(data), "--out", str(tmp_path / "out"),
         "--device", "cpu"],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode
    assert done.stderr.count("error: ") == 1
    assert "line 2: expected source<TAB>target" in done.stderr
    assert not (tmp_path / "out").exists()
