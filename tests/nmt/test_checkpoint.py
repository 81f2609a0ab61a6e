"""Model files and checkpoints, as they are written and read."""

import hashlib
import io
import tracemalloc

import pytest
import torch

from attn_ext.nmt import checkpoint

PARAMETERS = {"a": torch.randn(1 << 20), "b": torch.randn(1 << 20, dtype=torch.float64)}  # 12 MiB
CONTENT = {"config": {}, "model": PARAMETERS, "vocabulary": torch.arange(3)}


def assert_same(content):
    assert content["config"] == {} and content["vocabulary"].tolist() == [0, 1, 2]
    assert content["model"].keys() == PARAMETERS.keys()
    assert all(torch.equal(content["model"][name], PARAMETERS[name]) for name in PARAMETERS)


def test_format_3_is_an_archive_and_its_sha256(tmp_path):
    """Read as it was before it was streamed, and written so that it can be."""
    assert checkpoint.FORMAT == 3
    archive = io.BytesIO()
    torch.save({"format": 3, "kind": "model", **CONTENT}, archive)
    digest = hashlib.sha256(archive.getvalue()).digest()
    (tmp_path / "before.pt").write_bytes(archive.getvalue() + digest)
    assert_same(checkpoint.load(tmp_path / "before.pt", "model"))

    checkpoint.save(tmp_path / "now.pt", "model", CONTENT)
    written = (tmp_path / "now.pt").read_bytes()
    assert hashlib.sha256(written[:-32]).digest() == written[-32:]
    content = torch.load(io.BytesIO(written[:-32]), weights_only=True)
    assert (content.pop("format"), content.pop("kind")) == (3, "model")
    assert_same(content)


def peak_of(function, *arguments):
    """The most memory that Python holds during a call besides tensors, in bytes."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_copy_of_a_file_is_held(tmp_path):
    path = tmp_path / "model.pt"
    assert peak_of(checkpoint.save, path, "model", CONTENT) < path.stat().st_size / 4
    assert peak_of(checkpoint.load, path, "model") < path.stat().st_size / 4


class FailingFile:
    """A file whose n-th write fails, and all after it."""

    def __init__(self, file, reason, n):
        self.file, self.reason, self.left = file, reason, n

    def write(self, block):
        self.left -= 1
        if self.left <= 0:
            raise self.reason
        return self.file.write(block)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("underlying stream"), "underlying stream"),
        (KeyboardInterrupt(), None),
        (MemoryError(), None),
        (RuntimeError("a tensor cannot be copied"), None),
    ],
    ids=["disk", "stream", "interrupt", "memory", "tensor"],
)
def test_write_that_fails_says_why(tmp_path, monkeypatch, reason, line, n):
    """And not what torch makes of it."""
    path, save = tmp_path / "model.pt", torch.save
    monkeypatch.setattr(
        torch, "save", lambda content, file: save(content, FailingFile(file, reason, n))
    )
    with pytest.raises(checkpoint.UsageError if line else type(reason)) as error:
        checkpoint.save(path, "model", CONTENT)
    if line:
        assert str(error.value) == f"cannot write {path}: {line}"
    else:
        assert error.value is reason
    assert not list(tmp_path.iterdir())


def test_file_of_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        checkpoint.save(path, "model", CONTENT)
    with pytest.raises(checkpoint.UsageError) as error:
        checkpoint.load(path, "model")
    assert str(error.value) == f"{path} has format 4; this version reads format 3"
