"""How the training benchmark searches for the largest batch, without a GPU or a model."""

import types

import pytest
import torch

from attn_ext.nmt.options import TrainOptions
from benchmarks import bench_training


@pytest.mark.parametrize("limit", [1, 5, 255, 256, 257, 1000, 4096, 20_000])
def test_search_finds_the_largest_size(limit):
    tried = []

    def problem(size):
        tried.append(size)
        return "full" if size > limit else None

    found, reason = bench_training.largest_size(problem, start=256, most=16_384)
    assert found <= limit
    assert min(limit, 16_384) - found <= found // bench_training.RESOLUTION
    assert reason == ("full" if limit < 16_384 else "not more than 16384 were tried")
    assert len(tried) == len(set(tried)) < 20


def test_search_says_why_nothing_trains():
    with pytest.raises(RuntimeError, match="one sentence does not train: full"):
        bench_training.largest_size(lambda size: "full", start=8, most=16)


def problem_of(error):
    """What the search makes of an error in a step."""

    def step(batch):
        raise error

    optimizer = types.SimpleNamespace(zero_grad=lambda set_to_none: None)
    trainer = types.SimpleNamespace(
        step=step,
        batches=types.SimpleNamespace(update=lambda rows: rows),
        optimizer=optimizer,
        world=types.SimpleNamespace(device=torch.device("cpu")),
        options=TrainOptions(),
        model=types.SimpleNamespace(decoder=types.SimpleNamespace(attention=None)),
    )
    cell = bench_training.Cell("eager", 1, [[0]], 1)
    return bench_training.Bench(trainer, {"eager": None}).problem(cell)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        RuntimeError("backend='inductor' raised:\nRuntimeError: the input tensor is too large"),
        RuntimeError("Expected canUse32BitIndexMath(input) to be true, but got false."),
        RuntimeError("attn_ext: backend 'cuda' takes fewer than 2^31 rows"),
    ],
    ids=["memory", "not-supported", "bad-param", "too-large", "index", "rows"],
)
def test_search_takes_a_refused_size_for_the_limit(error):
    assert problem_of(error) in str(error) or problem_of(error) == "out of memory"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("attn_ext: expected int32 or int64 offsets and lengths"),
    ],
    ids=["illegal", "execution", "dtype"],
)
def test_search_ends_with_any_other_error(error):
    with pytest.raises(type(error)) as raised:
        problem_of(error)
    assert raised.value is error
