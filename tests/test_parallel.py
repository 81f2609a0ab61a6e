"""Two processes that train the module by DDP and FSDP2 learn what one does alone."""

import os
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import torch
from helpers import require_backend


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which they left what they learnt."""
    require_backend("cpu")
    folder = tmp_path_factory.mktemp("parallel")
    ranks = [
        subprocess.Popen(
            [sys.executable, parallel_worker.__file__, str(folder), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(parallel_worker.RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)
    return folder


@pytest.mark.parametrize("method", parallel_worker.WRAPPERS)
def test_training_equals_that_of_one_process(two_processes: Path, method: str):
    start = dict(parallel_worker.Model().named_parameters())
    alone = parallel_worker.train(lambda model: model, rank=0, ranks=1)
    learnt = torch.load(two_processes / f"{method}.pt")
    assert learnt.keys() == alone.keys() == start.keys()
    for name, parameter in learnt.items():
        torch.testing.assert_close(parameter, alone[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(parameter, start[name].double()), name
