"""From files of pairs to shards: nothing lost, nothing twice, the same bytes whatever happens."""

import gzip
import json
import random
import re
import resource
import shutil
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from toy_data import synthetic_pairs

from attn_ext.nmt import cli, corpora, data, journal, prepare, runs, shards, workers
from attn_ext.nmt.cli import UsageError

SMALL = ["--vocab-size", "300", "--shard-pairs", "100", "--sample-pairs", "150"]
MARKS = ".!?"


def varied_pairs(count, seed=0):
    """Some are equal, and some equal but for their end."""
    generator = random.Random(seed)
    return [(s + generator.choice(MARKS), t) for s, t in synthetic_pairs(count, seed)]


def text_of(pairs, side=None):
    fields = pairs if side is None else [(pair[side],) for pair in pairs]
    return "".join("\t".join(row) + "\n" for row in fields).encode()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(out, *arguments):
    assert prepare.main([*map(str, arguments), "--out", str(out), *SMALL, "--workers", "1"]) == 0
    return shards.load_prepared(out)


def trained_on(prepared):
    """The pairs of ids of all shards."""
    return [
        (tuple(source.tolist()), tuple(target.tolist()))
        for shard in range(prepared.train.shards)
        for source, target in prepared.train.examples(
            shard, range(len(prepared.train.lengths(shard)))
        )
    ]


def held_out(prepared):
    return [pair[:2] for pair in prepared.dev + prepared.test]


def encoded(prepared, pairs):
    return [tuple(tuple(prepared.vocabulary.encode(side)) for side in pair) for pair in pairs]


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(runs, "BLOCK_BYTES", 3000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The pairs of three inputs, and their arguments: plain, gzip, and Zstandard beside plain.

    The last line of the first is none.
    """
    folder = tmp_path_factory.mktemp("files")
    parts = [varied_pairs(250, seed) for seed in range(3)]
    (folder / "a.tsv").write_bytes(b"\xef\xbb\xbf" + text_of(parts[0]) + b"no tab\n")
    with gzip.open(folder / "b.tsv.gz", "wb") as file:
        file.write(text_of(parts[1]))
    with corpora.zstd().open(folder / "c.src.zst", "wb") as file:
        file.write(text_of(parts[2], 0))
    (folder / "c.tgt").write_bytes(text_of(parts[2], 1)[:-1])  # the last line has no end
    names = [folder / "a.tsv", folder / "b.tsv.gz", "--source", folder / "c.src.zst"]
    return sum(parts, []), [*names, "--target", folder / "c.tgt"]


@pytest.fixture(scope="module")
def prepared(files, tmp_path_factory):
    """A folder prepared by two processes."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "BLOCK_BYTES", 3000)
        arguments = [*map(str, files[1]), "--out", str(out), *SMALL, "--workers", "2"]
        assert prepare.main(arguments) == 0
    return out


def test_every_pair_is_there_once(files, prepared):
    pairs, found = set(files[0]), shards.load_prepared(prepared)
    rows = trained_on(found)
    assert len(rows) == len(set(rows)) == len(found.train) == found.counts["train"]
    kept = held_out(found)
    left_out = found.counts["like dev or test"]
    assert len(kept) == len(set(kept)) and set(kept) <= pairs
    expected = set(encoded(found, pairs - set(kept)))
    assert set(rows) <= expected and len(expected) - len(rows) == left_out
    assert found.counts["duplicates"] == len(files[0]) - len(pairs)
    assert found.counts["lines"] == len(files[0]) + 1 and found.counts["bad lines"] == 1
    (bad,) = json.loads((prepared / "index.json").read_text())["bad lines"].values()
    assert bad["first"].endswith("a.tsv, line 251")


def test_no_source_is_held_out_that_was_trained_on(files, prepared):
    found = shards.load_prepared(prepared)
    of_key = {}
    for pair in files[0]:
        of_key.setdefault(data.leak_key(pair[0]), []).append(pair)
    keys = [data.leak_key(pair.source) for pair in found.dev + found.test]
    assert len(keys) == len(set(keys)) and min(len(found.dev), len(found.test)) > 5
    assert all(pair[:2] == min(of_key[key]) for pair, key in zip(found.dev + found.test, keys))
    rows = set(trained_on(found))
    like = [pair for key in keys for pair in of_key[key]]
    assert len(set(like)) > len(keys)  # there are some to leave out
    assert not rows & set(encoded(found, like))


def test_the_same_bytes_whatever_the_number_of_processes(files, prepared, tmp_path, blocks):
    run(tmp_path, *files[1])
    assert contents(tmp_path) == contents(prepared)
    assert len(list(tmp_path.glob("shard-*.npy"))) > 8


def test_shards_are_random_parts(prepared):
    """Not of the files one after another; and an epoch visits all of them."""
    found = shards.load_prepared(prepared).train
    sizes = [len(found.lengths(shard)) for shard in range(found.shards)]
    assert max(sizes) < 1.5 * min(sizes)
    means = [found.lengths(shard).mean() for shard in range(found.shards)]
    assert max(means) < 1.25 * min(means)


class TestResumes:
    def arguments(self, files, out, workers):
        return [*files[1], "--out", out, *SMALL, "--workers", workers]

    BLOCKS = {"module": "runs", "name": "BLOCK_BYTES", "value": 3000}

    def test_killed_at_many_moments(self, nursery, files, prepared, tmp_path):
        """At any call, later and later, and in between inside a write."""
        number, statuses, left = 200, [], 0
        while 0 not in statuses:
            moment = {"number": number}
            if len(statuses) % 2:
                moment = {"number": 10 + 2 * len(statuses), "after": "writing"}
                number = number * 2
            arguments = self.arguments(files, tmp_path, 1)
            done = nursery.run("prepare", *arguments, constant=self.BLOCKS, at_call=moment)
            assert done.status in (0, -signal.SIGKILL), (moment, done)
            statuses.append(done.status)
            left += len(list(tmp_path.glob("**/.*.tmp")))
        assert len(statuses) > 10 and left
        assert contents(tmp_path) == contents(prepared)

    def test_killed_at_each_step_with_workers(self, nursery, files, prepared, tmp_path):
        statuses = []
        while 0 not in statuses:
            arguments = self.arguments(files, tmp_path, 2)
            fault = {"constant": self.BLOCKS, "at_record": {"number": 2}}  # one is written down
            done = nursery.run("prepare", *arguments, **fault)
            assert done.status in (0, -signal.SIGKILL), done
            statuses.append(done.status)
        assert len(statuses) > 15
        assert contents(tmp_path) == contents(prepared)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_ctrl_c(self, nursery, files, prepared, tmp_path, processes):
        arguments = self.arguments(files, tmp_path, processes)
        for number in (3, 12):
            fault = {"number": number, "with_signal": signal.SIGINT}
            done = nursery.run("prepare", *arguments, constant=self.BLOCKS, at_record=fault)
            assert done.status == 130 and "Traceback" not in done.error
            assert done.error.endswith("\nthe same command goes on from here\ninterrupted\n")
            with pytest.raises(UsageError, match="not finished"):
                shards.load_prepared(tmp_path)
        done = nursery.run("prepare", *arguments, constant=self.BLOCKS)
        assert done.status == 0 and contents(tmp_path) == contents(prepared)

    def test_ctrl_c_of_a_command_that_would_start_anew(self, nursery, files, tmp_path):
        arguments = [*self.arguments(files, tmp_path, 1), "--overwrite"]
        fault = {"number": 3, "with_signal": signal.SIGINT}
        done = nursery.run("prepare", *arguments, constant=self.BLOCKS, at_record=fault)
        assert "\nthe same command, without --overwrite, goes on from here\n" in done.error

    def test_starting_anew_ended_while_it_removes(
        self, files, prepared, tmp_path, monkeypatch, blocks
    ):
        """What has been removed is not taken for done."""
        arguments = list(map(str, self.arguments(files, tmp_path, 1)))
        unlink = Path.unlink

        def unlink_a_shard_and_die(path, **keywords):
            unlink(path, **keywords)
            assert not path.name.startswith("shard"), "the end"

        for place, name, last in (
            (prepare.Preparation, "_finish", lambda _: pytest.fail("the end")),
            (Path, "unlink", unlink_a_shard_and_die),
        ):
            with monkeypatch.context() as patch, pytest.raises(BaseException, match="the end"):
                patch.setattr(place, name, last)
                prepare.main([*arguments, "--overwrite"])
        assert prepare.main(arguments) == 0 and contents(tmp_path) == contents(prepared)

    def test_a_worker_that_dies(self, nursery, files, tmp_path):
        arguments = self.arguments(files, tmp_path, 2)
        done = nursery.run("prepare", *arguments, file_limit={"size": 2000, "deadly": True})
        assert done.status == 2 and done.error.splitlines()[-1].startswith(
            "error: a worker process was ended from outside"
        )


class TestRefuses:
    @pytest.fixture
    def folder(self, prepared, tmp_path):
        shutil.copytree(prepared, tmp_path / "out")
        return tmp_path / "out"

    def refuses(self, message, *arguments):
        with pytest.raises(UsageError, match=message) as error:
            prepare.main([*map(str, arguments), "--workers", "1"])
        assert "\n" not in str(error.value)

    def test_another_command_line(self, files, folder):
        before = contents(folder)
        arguments = [*files[1], "--out", folder, *SMALL]
        self.refuses("--max-length: 80, not 70; --overwrite", *arguments, "--max-length", 70)
        self.refuses("was prepared with another input: .*a.tsv", *arguments[1:])
        assert contents(folder) == before
        assert prepare.main([*map(str, arguments)]) == 0  # done already
        assert contents(folder) == before

    def test_a_file_that_has_changed(self, tmp_path, nursery):
        path = tmp_path / "a.tsv"
        path.write_bytes(text_of(varied_pairs(100)))
        arguments = ["--out", tmp_path / "out", *SMALL, path]
        done = nursery.run("prepare", *arguments, "--workers", 1, at_record={"number": 2})
        assert done.status == -signal.SIGKILL
        path.write_bytes(text_of(varied_pairs(101)))
        self.refuses("was begun before .*a.tsv was changed; --overwrite", *arguments)
        assert run(tmp_path / "out", path, "--overwrite").counts["lines"] == 101

    @pytest.mark.parametrize("more", [[], ["--overwrite"]])
    def test_to_write_over_what_it_reads(self, tmp_path, more):
        names = {name: tmp_path / f"{name}.tsv" for name in ("train", "dev", "test")}
        for path in names.values():
            path.write_bytes(text_of(varied_pairs(20)))
        before = contents(tmp_path)
        options = ["--dev", names["dev"], "--test", names["test"], "--out", tmp_path]
        self.refuses("dev.tsv would be written over; choose", names["train"], *options, *more)
        assert contents(tmp_path) == before

    def test_to_write_over_what_it_did_not_make(self, tmp_path):
        for name in ("train.tsv", "dev.tsv"):
            (tmp_path / name).write_bytes(text_of(varied_pairs(20)))
        before = contents(tmp_path)
        self.refuses("holds dev.tsv already", tmp_path / "train.tsv", "--out", tmp_path)
        assert contents(tmp_path).items() >= before.items()

    def test_no_inputs(self, tmp_path):
        out = ["--out", tmp_path / "out"]
        self.refuses("no input", *out)
        self.refuses(r"--source names 1 file\(s\) and --target 2", *out, "--source", "a",
                     "--target", "b", "c")  # fmt: skip
        self.refuses("cannot read x.tsv: No such file", *out, "x.tsv")
        self.refuses("is not a file", *out, tmp_path)
        assert not (tmp_path / "out").exists()

    def test_different_numbers_of_lines(self, tmp_path, blocks):
        pairs, out = varied_pairs(300), ["--out", tmp_path / "out", "--overwrite"]
        (tmp_path / "a").write_bytes(text_of(pairs, 0))
        cases = {"a has more than 290": pairs[:290], "b has more than 300": [*pairs, ("x", "y")]}
        for shown, others in cases.items():
            (tmp_path / "b").write_bytes(text_of(others, 1))
            message = f"have different numbers of lines: .*{shown}$"
            self.refuses(message, *out, "--source", tmp_path / "a", "--target", tmp_path / "b")

    def test_files_that_are_cut_off(self, tmp_path):
        path = tmp_path / "a.tsv.gz"
        content = gzip.compress(text_of(varied_pairs(300)))
        path.write_bytes(content[: len(content) // 2])
        self.refuses("a.tsv.gz is cut off", "--out", tmp_path / "out", path)
        path.write_bytes(b"no gzip")
        self.refuses("is no gzip file", "--out", tmp_path / "out", "--overwrite", path)

    def test_nothing_to_hold_out(self, tmp_path):
        path = tmp_path / "a.tsv"
        path.write_text("a 1\tb\na 2\tb\n\n")
        self.refuses(r"hold 1 different source\(s\)", "--out", tmp_path, path)
        path.write_text("no tab\n")
        self.refuses(
            r"no pairs in the input: 1 not source<TAB>target \(first: .*a.tsv, line 1\)",
            "--out", tmp_path, "--overwrite", path,
        )  # fmt: skip


def test_bad_lines_are_counted(tmp_path, blocks, capsys):
    lines = text_of(varied_pairs(300)).splitlines()
    bad = {20: b"no tab", 30: b"", 40: b"two\ttabs\there", 250: b"\xfcber\tx", 260: b"x\t  ",
           270: b"\xff", 280: b" "}  # fmt: skip
    for line, content in sorted(bad.items()):
        lines.insert(line - 1, content)
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\r\n".join(lines))
    found = run(tmp_path / "out", path)
    kinds = json.loads((tmp_path / "out/index.json").read_text())["bad lines"]
    counts = {kind: (of["lines"], int(of["first"].split()[-1])) for kind, of in kinds.items()}
    assert counts == {
        "not source<TAB>target": (2, 20),
        "an empty line": (2, 30),
        "not UTF-8": (2, 250),
        "an empty side": (1, 260),
    }
    left_out = ("bad lines", "duplicates", "too long", "like dev or test", "train", "dev", "test")
    assert found.counts["bad lines"] == 7
    assert found.counts["lines"] == 307 == sum(found.counts[name] for name in left_out)
    assert re.search(r"2 not UTF-8 \(first: .*a.tsv, line 250\)", capsys.readouterr().out)


def test_too_long(tmp_path):
    pairs = varied_pairs(200)
    long = [(f"lang {word} " * 50, "x") for word in ("ein", "zwei", "drei")]
    (tmp_path / "a.tsv").write_bytes(text_of(pairs + long))
    found = run(tmp_path / "out", tmp_path / "a.tsv", "--max-length", 60)
    assert found.counts["too long"] == 3
    lengths = [found.train.lengths(shard) for shard in range(found.train.shards)]
    assert max(part.max() for part in lengths) <= 60
    assert all(len(pair.source) < 200 for pair in found.dev + found.test)


def test_given_dev_and_test(tmp_path):
    pairs = varied_pairs(300)
    for name, part in (("dev", pairs[:9]), ("test", pairs[9:20])):
        (tmp_path / name).write_bytes(text_of(part))
    (tmp_path / "a.tsv").write_bytes(text_of(pairs))
    arguments = ["--dev", tmp_path / "dev", "--test", tmp_path / "test", tmp_path / "a.tsv"]
    found = run(tmp_path / "out", *arguments)
    assert held_out(found) == pairs[:20]
    keys = {data.leak_key(source) for source, _ in pairs[:20]}
    expected = {pair for pair in pairs if data.leak_key(pair[0]) not in keys}
    assert set(trained_on(found)) == set(encoded(found, expected))
    assert found.counts["like dev or test"] == len(set(pairs)) - len(expected)


def test_a_template_of_many_pairs_is_not_held_out(tmp_path):
    pairs = varied_pairs(60)
    first = min(runs.hash_of_key(source) for source, _ in pairs)
    names = (f"Zone {'x' * size}" for size in range(10_000))
    name = next(name for name in names if runs.hash_of_key(f"{name} 1") < first)  # by its hash
    pairs += [(f"{name} {n}", str(n)) for n in range(300)]
    (tmp_path / "a.tsv").write_bytes(text_of(pairs))
    found = run(tmp_path / "out", tmp_path / "a.tsv")
    assert not any("Zone" in pair.source for pair in found.dev + found.test)
    assert found.counts["train"] > 300


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "BLOCK_BYTES", 20_000)
    pairs = varied_pairs(4000)
    (tmp_path / "dev").write_bytes(text_of(pairs[:5]))
    options = ["--dev", tmp_path / "dev", "--test", tmp_path / "dev"]
    peaks = []
    for count in (100, 1000, 4000):  # the first imports what there is to import
        path = tmp_path / f"{count}.tsv"
        path.write_bytes(text_of(pairs[:count]))
        tracemalloc.start()
        run(tmp_path / f"out{count}", path, *options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1], peaks


def test_more_runs_than_files_can_be_open(tmp_path):
    count, (soft, hard) = 100, resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(count):
        text = f"a {number}\tb\nb {number}\tc\n".encode()
        runs.make_run(tmp_path, number, runs.Block((text,), 1, 2, runs.Place()))
    pairs = runs.Sorted(tmp_path, count)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count // 2, hard))
        assert pairs.distinct() == len(pairs.between(0, 1 << 64)[0]) == 2 * count
        assert np.array_equal(pairs.smallest_keys(10)[1], [count, count])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_only_a_few_tasks_wait(tmp_path):
    """Their blocks would fill the memory if files were read faster than they are worked on."""
    begun = []

    def tasks():
        for number in range(20):
            begun.append(number)
            yield (number,)

    for done, result in enumerate(workers.in_order(_same, tasks(), 2)):
        assert result == done
        assert len(begun) <= done + 4


def _same(number):
    return number


def test_verify(prepared, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "out")
    assert prepare.main(["--out", str(tmp_path / "out"), "--verify"]) == 0
    path = tmp_path / "out/shard-00001.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert shards.load_prepared(tmp_path / "out")  # which looks at sizes alone
    with pytest.raises(UsageError, match="shard-00001.tokens.npy is damaged"):
        prepare.main(["--out", str(tmp_path / "out"), "--verify"])


def test_one_process_a_folder(tmp_path, monkeypatch):
    (tmp_path / "a.tsv").write_bytes(text_of(varied_pairs(50)))
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.1)
    with journal.locked(tmp_path), pytest.raises(UsageError, match="another process is preparing"):
        run(tmp_path, tmp_path / "a.tsv")


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: prepare.main(["--help"]))
    assert error.value.code == 0 and "left out, counted" in capsys.readouterr().out
