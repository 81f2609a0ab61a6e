"""Killed, interrupted or starved of space, a run goes on later as if nothing had been."""

import json
import random
import shutil
import signal
import subprocess

import pytest
import torch
from toy_data import TINY_RUN

from attn_ext.nmt import checkpoint

STEPS = 45
OPTIONS = [*TINY_RUN, "--decoder", "rnnsearch", "--lr", "0.02", "--eval-every", "6"]
MOMENTS = 20
AHEAD = 2  # steps at most from one moment to the next, so that they do not reach the end


@pytest.fixture(scope="module")
def uninterrupted(nursery, tsv, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = nursery.run("train", "--data", tsv, "--out", out, *OPTIONS, "--max-steps", STEPS)
    assert done.status == 0, done.error
    return out


@pytest.fixture(scope="module")
def begun(nursery, tsv, tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "out"
    arguments = ["--data", tsv, "--out", out, *OPTIONS, "--max-steps", 7]
    assert nursery.run("train", *arguments).status == 0
    return out


@pytest.fixture(scope="module")
def calls(nursery, begun, tsv, tmp_path_factory):
    """How many calls a run makes that goes on for AHEAD steps, of each kind that counts."""
    folder = tmp_path_factory.mktemp("calls")
    shutil.copytree(begun, folder / "out")
    arguments = ["--data", tsv, "--out", folder / "out", "--resume", *OPTIONS, "--max-steps", STEPS]
    counted = {"path": str(folder / "calls.json"), "checkpoints": AHEAD}
    done = nursery.run("train", *arguments, "--checkpoint-every", 1, count_calls=counted)
    assert done.status == 0, done.error
    return json.loads((folder / "calls.json").read_text())


def curve(out):
    """The records in their order, without the timings."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records]


def parameters(out):
    content = checkpoint.load(out / "checkpoint.pt", "checkpoint")
    return content["model"] | {f"averaged {k}": v for k, v in content["averaged"].items()}


def assert_same_run(out, expected):
    assert curve(out) == curve(expected)
    assert [r["step"] for r in curve(out) if "loss" in r] == list(range(1, STEPS + 1))
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    ours, theirs = parameters(out), parameters(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def moments(calls, seed):
    """Numbers of calls: those at random parts of a run's."""
    generator = random.Random(seed)
    for _ in range(MOMENTS):
        after = generator.choice(list(calls))
        yield {"after": after, "number": 1 + int(generator.random() * calls[after])}


def test_killed_at_20_moments(nursery, uninterrupted, calls, tsv, tmp_path):
    out, left_behind = tmp_path / "out", 0
    arguments = ["--data", tsv, "--out", out, "--resume", *OPTIONS, "--max-steps", STEPS]
    for moment in moments(calls, seed=7):
        done = nursery.run("train", *arguments, "--checkpoint-every", 1, at_call=moment)
        assert done.status == -signal.SIGKILL, (moment, done)
        left_behind += len(list(out.glob(".*.tmp"))) if out.exists() else 0
    assert left_behind  # some came inside a write
    assert curve(out)[-1]["step"] < STEPS
    done = nursery.run("train", *arguments)
    assert done.status == 0, done.error
    assert_same_run(out, uninterrupted)


def test_interrupted_at_20_moments(nursery, uninterrupted, calls, tsv, tmp_path):
    """Ctrl-C while data are read, subwords learnt, steps made, dev measured or files written."""
    out = tmp_path / "out"
    arguments = ["--data", tsv, "--out", out, "--resume", *OPTIONS, "--max-steps", STEPS]
    for moment in moments(calls, seed=8):
        moment["with_signal"] = signal.SIGINT
        done = nursery.run("train", *arguments, "--checkpoint-every", 1, at_call=moment)
        assert done.status == 130, (moment, done)
        lines = (done.output + done.error).splitlines()
        assert [line for line in lines if line.startswith("interrupted")], (moment, done)
        assert "Traceback" not in done.error, (moment, done.error)
        assert not out.exists() or not list(out.glob(".*.tmp"))
    done = nursery.run("train", *arguments)
    assert done.status == 0, done.error
    assert_same_run(out, uninterrupted)


def test_killed_at_each_call_of_a_write(nursery, tmp_path):
    path = tmp_path / "file"
    contents, statuses = set(), []
    while 0 not in statuses:
        path.write_text("before")
        moment = {"after": "writing", "number": len(statuses) + 1}
        statuses.append(nursery.run("write", path, "after", at_call=moment).status)
        contents.add(path.read_text())
    assert len(statuses) > 10 and set(statuses) == {0, -signal.SIGKILL}
    assert contents == {"before", "after"}


def test_interrupted_at_each_third_call_of_a_write(nursery, tmp_path):
    """Of all calls, those of the standard library too: nothing half is left."""
    path, number, status = tmp_path / "file", 0, None
    while status != 0:
        number += 3
        path.write_text("before")
        moment = {"number": number, "with_signal": signal.SIGINT}
        status = nursery.run("write", path, "after", at_call=moment).status
        assert path.read_text() in ("before", "after")
        assert list(tmp_path.iterdir()) == [path], moment
    assert number > 100


def test_run_that_hangs_is_ended_and_says_where(nursery, tmp_path):
    with pytest.raises(pytest.fail.Exception) as failure:
        nursery.run("write", tmp_path / "file", "text", timeout=1, hang={})
    assert "still ran after 1 s" in str(failure.value)
    assert "before it hangs" in str(failure.value) and "in hang\n" in str(failure.value)
    assert nursery.run("write", tmp_path / "file", "text").status == 0  # others go on


class TestNoSpace:
    """The limit of a process on the size of a file stops a write where a full disk would."""

    @pytest.fixture
    def run(self, nursery, begun, tsv, tmp_path):
        """Goes on with a run of 7 steps in tmp_path / "out"; returns what the process did."""
        out = tmp_path / "out"
        shutil.copytree(begun, out)
        arguments = ["--data", tsv, "--out", out, "--resume", *OPTIONS, "--max-steps", 9]

        def go_on(**faults):
            return nursery.run("train", *arguments, "--checkpoint-every", 1, **faults)

        return go_on

    def fails(self, done, message):
        assert done.status == 2 and "Traceback" not in done.error
        last = done.error.splitlines()[-1]
        assert last.startswith("error: ") and message in last and done.error.count("error: ") == 1

    def goes_on(self, run, folder, uninterrupted):
        done = run()
        assert done.status == 0, done.error
        ours, theirs = ([r for r in curve(out) if "loss" in r] for out in (folder, uninterrupted))
        assert len(ours) == 9 and ours == theirs[:9]
        assert not list(folder.glob(".*.tmp"))

    @pytest.mark.parametrize("deadly", [False, True], ids=["error", "killed"])
    def test_checkpoint(self, run, uninterrupted, tmp_path, deadly):
        path = tmp_path / "out" / "checkpoint.pt"
        before = path.read_bytes()
        done = run(file_limit={"size": len(before) // 2, "deadly": deadly})
        if deadly:
            assert done.status == -signal.SIGXFSZ
            (half,) = path.parent.glob(".checkpoint.pt.*.tmp")
            assert half.stat().st_size == len(before) // 2
        else:
            self.fails(done, f"cannot write {path}: File too large")
            assert not list(path.parent.glob(".*.tmp"))
        assert path.read_bytes() == before
        self.goes_on(run, path.parent, uninterrupted)

    def test_losses(self, run, uninterrupted, tmp_path):
        path = tmp_path / "out" / "metrics.jsonl"
        size = path.stat().st_size
        checkpoint_before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
        self.fails(run(file_limit={"size": size + 9}), f"cannot write {path}: File too large")
        assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == checkpoint_before
        self.goes_on(run, path.parent, uninterrupted)

    def test_full_disk(self, run, uninterrupted, tmp_path):
        """The real thing: a file system of 1 MiB, filled up."""
        folder = tmp_path / "out"
        kept = folder.rename(tmp_path / "kept")
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no file system can be mounted")
        try:
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            with pytest.raises(OSError, match="No space"), open(folder / "filler", "wb") as file:
                while True:
                    file.write(bytes(4096))
            files = {path: path.read_bytes() for path in kept.iterdir()}
            self.fails(run(), "No space left on device")
            left = {path.name for path in folder.iterdir()} - {"filler"}
            assert left == {path.name for path in files}
            for name in ("checkpoint.pt", "model.pt", "results.json"):
                assert (folder / name).read_bytes() == files[kept / name]
            (folder / "filler").unlink()
            self.goes_on(run, folder, uninterrupted)
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    def test_folder_that_is_read_only(self, run, nursery, tmp_path):
        folder = tmp_path / "out"
        before = {path: path.read_bytes() for path in folder.iterdir()}
        folder.chmod(0o555)
        self.fails(run(no_privileges={}), f"cannot write {folder}: Permission denied")
        picture = ["--model", folder, "--source", "rot", "--out", folder / "x.png"]
        self.fails(nursery.run("plot", *picture, no_privileges={}), "x.png: Permission denied")
        folder.chmod(0o755)
        assert before == {path: path.read_bytes() for path in folder.iterdir()}

    def test_output(self, run, nursery, tmp_path):
        picture = ["--model", tmp_path / "out", "--source", "rot", "--out", tmp_path / "x.png"]
        done = nursery.run("plot", *picture, standard_output={"path": "/dev/full"})
        self.fails(done, "No space left on device")
