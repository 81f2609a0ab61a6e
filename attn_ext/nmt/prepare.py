"""Prepare millions of sentence pairs to train on: tokenised shards that training maps from disk.

    python -m attn_ext.nmt.prepare --out DIR FILE...
    python -m attn_ext.nmt.train --data DIR --out runs/mine

1. The input is read once; its pairs go to disk sorted by a hash (attn_ext.nmt.runs), in which order
   they are shuffled and equal ones meet.
2. What is held out is chosen by the hash of the sources' `leak_key`, so that no source of dev or
   test equals one of training but for case, numbers, punctuation and placeholders.
3. The first pairs by hash, which are a random sample, teach the subwords.
4. Range by range of the hashes, the pairs are tokenised into a shard each (attn_ext.nmt.shards).

Each block that is read and each shard is one task for a worker process, whose result is a journal's
line once its files are written. A process that is killed loses the tasks without a line.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np

from attn_ext.nmt import cli, corpora, data, runs, shards
from attn_ext.nmt.cli import UsageError, atomic_file, atomic_write, writing
from attn_ext.nmt.journal import FILE as JOURNAL_FILE
from attn_ext.nmt.journal import FOLDER as JOURNAL_FOLDER
from attn_ext.nmt.journal import Journal, locked, refuse_others
from attn_ext.nmt.vocab import Vocabulary
from attn_ext.nmt.workers import in_order

# Of the sources, as many as in data.split_pairs, but of at most so many: 2,000 pairs of dev and of
# test are enough to tell models apart.
HELD_OUT_OF = 40_000
PAIRS_AT_ONCE = 4096  # tokenised in one call
OPTIONS = {"vocab_size": 32_000, "shard_pairs": 1 << 18, "sample_pairs": 100_000, "max_length": 80}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.nmt.prepare",
        description="Turn sentence pairs into a folder of tokenised shards to train on, in one "
        "pass and in little memory, however many there are. Files may be compressed (.gz, .zst). "
        "Duplicates and lines that are no pairs are left out, counted and reported. Interrupted or "
        "killed, the same command goes on where it was. While at work the folder takes about as "
        "much space as the text besides the shards.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="source<TAB>target in each line, UTF-8")
    add("--source", nargs="+", default=[], metavar="FILE", help="one sentence a line, of which ...")
    add("--target", nargs="+", default=[], metavar="FILE", help="... as many files have the "
        "translations, line by line")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="folder to make")
    add("--dev", metavar="FILE", help="pairs to choose the model by, as FILE; with --test. Training"
        " pairs whose sources are there too are left out. Default: some 2,000 are held out for "
        "either")  # fmt: skip
    add("--test", metavar="FILE", help="pairs to test the model with")
    number = functools.partial(add, type=cli.positive_int, metavar="N")
    number("--vocab-size", help=f"most subwords (default {OPTIONS['vocab_size']})")
    number("--sample-pairs", help="pairs to learn them from; 100,000 take some 500 MB of memory "
           f"(default {OPTIONS['sample_pairs']})")  # fmt: skip
    number("--max-length", help="most subwords of a side; longer pairs are left out, of what is "
           f"held out too (default {OPTIONS['max_length']})")  # fmt: skip
    number("--shard-pairs", help="pairs of a shard, about; training has two in memory at once "
           f"(default {OPTIONS['shard_pairs']})")  # fmt: skip
    workers = len(os.sched_getaffinity(0))
    number("--workers", default=workers, help="processes; what they make does not depend on them "
           f"(default: all cores, here {workers})")  # fmt: skip
    add("--overwrite", action="store_true", help="start anew over what DIR holds; without it "
        "what is unfinished goes on")  # fmt: skip
    add("--verify", action="store_true", help="only check each byte of a folder that is prepared")
    return parser.parse_args(arguments)


def main(arguments=None):
    given = parse_arguments(arguments)
    for package in ("sentencepiece", "tqdm"):
        cli.require(package)
    folder = Path(given.out)
    if not given.out.strip():
        raise UsageError("--out is empty")
    if given.verify:
        return verify(folder)
    inputs = _inputs(given)
    chosen = {name: getattr(given, name) or default for name, default in OPTIONS.items()}
    files = [path for paths in inputs for path in paths]
    held_out = [path for path in (given.dev, given.test) if path]
    _check_not_to_write_over(folder, [*files, *held_out])
    identity = {
        "format": shards.FORMAT,
        "options": {**chosen, "inputs": inputs, "dev": given.dev, "test": given.test},
        "files": {os.path.abspath(path): _stamp(path) for path in [*files, *held_out]},
    }
    identity = json.loads(json.dumps(identity))  # as it will be read: no tuples
    given_pairs = [corpora.read_tsv(path) for path in held_out]
    with locked(folder):
        if given.overwrite:
            _remove(folder)
        elif (folder / shards.INDEX_FILE).exists():
            index = shards.read_index(folder)
            refuse_others(folder, index.get("identity"), identity, "was prepared")
            print(f"{folder} is prepared already")
            _remove_left_behind(folder)
            return _report(folder, index)
        elif not (folder / JOURNAL_FOLDER).exists() and (there := _made_before(folder)):
            raise UsageError(
                f"{folder} holds {there[0].name} already, and no preparation to go on with; "
                "--overwrite replaces it, or choose another --out"
            )
        try:
            with contextlib.closing(Journal(folder, identity)) as journal:
                index = Preparation(journal, inputs, given_pairs, chosen, given.workers).run()
        except KeyboardInterrupt:
            without = ", without --overwrite," if given.overwrite else ""
            print(f"\nthe same command{without} goes on from here", file=sys.stderr)
            raise
        _remove_left_behind(folder)
    return _report(folder, index)


def _inputs(given):
    """A tuple of paths for each input: of a TSV file, or of a source and a target file."""
    if len(given.source) != len(given.target):
        raise UsageError(
            f"--source names {len(given.source)} file(s) and --target {len(given.target)}; each "
            "source needs its target"
        )
    inputs = [(path,) for path in given.files] + list(zip(given.source, given.target))
    if not inputs:
        raise UsageError("no input: give files of source<TAB>target, or --source and --target")
    if bool(given.dev) != bool(given.test):
        raise UsageError("--dev and --test go together; give both, or neither to hold pairs out")
    return inputs


def _stamp(path):
    """By which a file is known to be the same still."""
    with corpora.reading(path):
        status = os.stat(path)
        if not os.path.isfile(path):
            raise UsageError(f"{path} is not a file: what is read has to be there when it goes on")
        with open(path, "rb"):
            return [status.st_size, status.st_mtime_ns]


# -- the folder --------------------------------------------------------------------------------


def _files(folder):
    """Those of a preparation but for its shards, the index first."""
    names = (shards.INDEX_FILE, shards.VOCABULARY_FILE, shards.DEV_FILE, shards.TEST_FILE)
    return [folder / name for name in names]


def _made_before(folder):
    """What is there under the names of what is to be made."""
    files = [path for path in _files(folder) if path.exists()]
    return [*files, *sorted(folder.glob("shard-*.npy"))]


def _check_not_to_write_over(folder, paths):
    ours = set(map(os.path.realpath, _files(folder)))
    for path in paths:
        if os.path.realpath(path) in ours:
            raise UsageError(f"{path} would be written over; choose another --out")


def _remove(folder):
    """What an earlier preparation made.

    The index goes first, for from then on there is no preparation; then the journal, for what goes
    after it must not be taken for done.
    """
    with writing(folder):
        (folder / shards.INDEX_FILE).unlink(missing_ok=True)
        (folder / JOURNAL_FOLDER / JOURNAL_FILE).unlink(missing_ok=True)
        for path in _made_before(folder):
            path.unlink(missing_ok=True)
    _remove_left_behind(folder)


def _remove_left_behind(folder):
    with writing(folder):
        if (folder / JOURNAL_FOLDER).exists():
            shutil.rmtree(folder / JOURNAL_FOLDER)
        for path in folder.glob(".*.*.tmp"):  # of a write that was killed
            path.unlink(missing_ok=True)


# -- the work ----------------------------------------------------------------------------------


class Preparation:
    """What is left to be done of a preparation.

    Args:
        journal: of what has been done.
        inputs: tuples of paths, see `runs.read_blocks`.
        held_out: [dev, test], lists of pairs; empty to hold some out of the inputs.
        options: values of OPTIONS.
        workers: processes.
    """

    def __init__(self, journal, inputs, held_out, options, workers):
        self.journal, self.inputs, self.workers = journal, inputs, workers
        self.folder, self.options, self.held_out = journal.folder, options, held_out

    def run(self):
        """Do it, and return the index."""
        self._read()
        pairs = runs.Sorted(self.journal.work, len(self.journal.of("run")))
        distinct = pairs.distinct()
        if not distinct:
            bad = self._bad_lines()
            raise UsageError(f"no pairs in the input: {_listed(bad) if bad else 'it is empty'}")
        keys = self._held_out_keys(pairs)
        number = -(-distinct // self.options["shard_pairs"])
        ranges = [(i * (1 << 64) // number, (i + 1) * (1 << 64) // number) for i in range(number)]
        model = self._learn(pairs, ranges, np.concatenate(keys))
        self._write(pairs, ranges, keys, model, distinct)
        return self._finish()

    def _read(self):
        before = list(self.journal.of("run").values())
        if self.journal.of("read"):
            return
        place = runs.Place()
        if before:
            number, offsets, line = before[-1]["place"]
            place = runs.Place(number, tuple(offsets), line)
        blocks = runs.read_blocks(self.inputs, place)
        numbers = itertools.count(len(before))
        tasks = ((self.journal.work, number, block) for number, block in zip(numbers, blocks))
        with _bar("reading", sum(run["lines"] for run in before)) as bar:
            for record in in_order(runs.make_run, tasks, self.workers):
                self.journal.append(**record)
                bar.update(record["lines"])
        self.journal.append(read=True)

    def _held_out_keys(self, pairs):
        """[keys of dev, keys of test]."""
        if self.held_out:
            return [
                np.frombuffer(b"".join(runs.hash_of_key(p.source) for p in part), ">u8").astype(
                    np.uint64
                )
                for part in self.held_out
            ]
        keys, counts = pairs.smallest_keys(HELD_OUT_OF)
        # One template may make many pairs, which are for training.
        rare = keys[counts <= data.LARGEST_GROUP * counts.mean()]
        keys = rare if len(rare) >= 3 else keys
        if len(keys) < 3:
            raise UsageError(
                f"the data hold {len(keys)} different source(s); at least 3 are needed to hold "
                "some out; or give --dev and --test"
            )
        share = max(1, round(len(keys) * data.HELD_OUT_SHARE))
        return [keys[:share], keys[share : 2 * share]]

    def _learn(self, pairs, ranges, held_out_keys):
        """The bytes of the subwords' model."""
        path = self.folder / shards.VOCABULARY_FILE
        if self.journal.of("subwords"):
            with corpora.reading(path):
                return path.read_bytes()
        print("learning subwords", file=sys.stderr)
        task = (pairs, ranges, held_out_keys, self.options["sample_pairs"])
        # In another process: what it takes of memory goes with it, and Ctrl-C does not wait for it.
        (model,) = in_order(
            learn_subwords, [(*task, self.options["vocab_size"])], min(self.workers, 2)
        )
        atomic_write(path, model)
        self.journal.append(subwords=True)
        return model

    def _write(self, pairs, ranges, keys, model, distinct):
        done = self.journal.of("shard")
        always = pairs, keys, not self.held_out, model, self.options["max_length"]
        tasks = (
            (self.folder, number, ranges[number], *always)
            for number in range(len(done), len(ranges))
        )
        before = sum(shard["distinct"] for shard in done.values())
        with _bar("tokenising", before, distinct) as bar:
            for record in in_order(make_shard, tasks, self.workers):
                self.journal.append(**record)
                bar.update(record["distinct"])

    def _finish(self):
        made = list(self.journal.of("shard").values())
        read = self.journal.of("run").values()
        own = collections.defaultdict(list)  # [which, key]: texts
        for which, key, text in itertools.chain(*(shard["held out"] for shard in made)):
            own[which, key].append(text)
        # Of several with one key the first by text, as data.split_pairs has it.
        kept = [[min(own[place]) for place in sorted(own) if place[0] == which] for which in (0, 1)]
        if self.held_out:
            kept = [[f"{pair.source}\t{pair.target}" for pair in part] for part in self.held_out]
        bad = self._bad_lines()
        counts = {
            "lines": sum(run["lines"] for run in read),
            "bad lines": sum(kind["lines"] for kind in bad.values()),
            "duplicates": sum(record["duplicates"] for record in [*read, *made]),
            "too long": sum(shard["too long"] for shard in made),
            "like dev or test": sum(shard["like dev or test"] for shard in made),
            "train": sum(shard["pairs"] for shard in made),
            **dict(zip(("dev", "test"), map(len, kept))),
        }
        if not self.held_out:  # counted as held out so far
            counts["like dev or test"] -= counts["dev"] + counts["test"]
        for part in ("train", "dev", "test"):
            if not counts[part]:
                raise UsageError(f"no pairs are left for {part}: {_listed_counts(counts, bad)}")
        files = {name: file for shard in made for name, file in shard["files"].items()}
        for name, texts in zip((shards.DEV_FILE, shards.TEST_FILE), kept):
            atomic_write(self.folder / name, "".join(f"{text}\n" for text in texts))
        for name in (shards.DEV_FILE, shards.TEST_FILE, shards.VOCABULARY_FILE):
            files[name] = _digest(self.folder / name)
        index = {
            "format": shards.FORMAT,
            "identity": self.journal.identity,
            "counts": counts,
            "bad lines": bad,
            "shards": [{name: shard[name] for name in ("pairs", "tokens")} for shard in made],
            "files": files,
        }
        atomic_write(self.folder / shards.INDEX_FILE, json.dumps(index, indent=1) + "\n")
        return index

    def _bad_lines(self):
        """{kind: {lines, the first}}"""
        bad = {}
        for run in self.journal.of("run").values():
            for kind, (lines, first) in run["bad"].items():
                path = " and ".join(self.inputs[run["place"][0]])
                kept = bad.setdefault(kind, {"lines": 0, "first": f"{path}, line {first}"})
                kept["lines"] += lines
        return bad


def learn_subwords(pairs, ranges, held_out_keys, sample_pairs, size):
    """The bytes of a subword model, learnt from the first training pairs by hash."""

    def sample():
        left = sample_pairs
        for low, high in ranges:
            texts, keys, _ = pairs.between(low, high)
            chosen = np.flatnonzero(~np.isin(keys, held_out_keys))[:left]
            for row in chosen:
                yield from texts[row].decode().split("\t")
            left -= len(chosen)
            if not left:
                return

    return Vocabulary.train(sample(), size).model_bytes


def make_shard(folder, number, bounds, pairs, held_out_keys, listed, model, max_length):
    """Write the shard of a range of hashes; `listed`: say which pairs are held out of it, too.

    Returns:
        What the journal holds of it: counts, the pairs held out, sizes and digests of the files.
    """
    vocabulary = _vocabulary(model)
    texts, keys, copies = pairs.between(*bounds)
    in_parts = [np.isin(keys, part) for part in held_out_keys]
    held_out = np.logical_or(*in_parts)
    all_lengths, all_tokens, fits = [], [], []
    dtype = np.uint16 if len(vocabulary) <= 1 << 16 else np.uint32
    for start in range(0, len(texts), PAIRS_AT_ONCE):
        part = texts[start : start + PAIRS_AT_ONCE]
        sides = [side for text in part for side in text.decode().split("\t")]
        ids = vocabulary.encode_all(sides)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids)).reshape(-1, 2)
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype, lengths.sum())
        fitting = lengths.max(1) <= max_length
        kept = fitting & ~held_out[start : start + len(part)]
        all_lengths.append(lengths[kept])
        all_tokens.append(tokens[np.repeat(kept, lengths.sum(1))])
        fits.append(fitting)
    fits = np.concatenate([np.empty(0, bool), *fits])
    lengths = np.concatenate([np.empty((0, 2), np.int64), *all_lengths])
    tokens = np.concatenate([np.empty(0, dtype), *all_tokens])
    files = {}
    narrow = np.uint16 if max_length < 1 << 16 else np.uint32
    for name, array in zip(shards.shard_files(number), (lengths.astype(narrow), tokens)):
        with atomic_file(folder / name) as file:
            np.save(file, array)
        files[name] = _digest(folder / name)
    return {
        "shard": number,
        "pairs": len(lengths),
        "tokens": len(tokens),
        "distinct": len(texts),
        "duplicates": copies,
        "too long": int((~fits).sum()),
        "like dev or test": int((fits & held_out).sum()),
        "held out": [
            (which, int(keys[row]), texts[row].decode())
            for which, rows in enumerate(in_parts)
            for row in np.flatnonzero(rows & fits & listed).tolist()
        ],
        "files": files,
    }


@functools.lru_cache(1)
def _vocabulary(model):
    return Vocabulary(model)


def _digest(path):
    with corpora.reading(path):
        return {"bytes": os.path.getsize(path), "sha256": corpora.sha256(path)}


# -- what a person sees ------------------------------------------------------------------------


def _bar(what, done, total=None):
    return cli.require("tqdm").tqdm(
        desc=what,
        initial=done,
        total=total,
        unit="pair",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
        dynamic_ncols=True,
    )


def _report(folder, index):
    counts = index["counts"]
    vocabulary = Vocabulary((folder / shards.VOCABULARY_FILE).read_bytes())
    print(
        f"{counts['train']:,} training pairs in {len(index['shards'])} shard(s), {counts['dev']:,} "
        f"dev, {counts['test']:,} test; {len(vocabulary):,} subwords\n"
        f"left out: {_listed_counts(counts, index['bad lines'])}\n"
        f"Train with: python -m attn_ext.nmt.train --data {shlex.quote(str(folder))} --out DIR"
    )
    return 0


def _listed_counts(counts, bad):
    """What was left out of the lines."""
    parts = [f"{counts[name]:,} {name}" for name in ("duplicates", "too long", "like dev or test")]
    return f"of {counts['lines']:,} lines " + ", ".join([*parts, *([_listed(bad)] if bad else [])])


def _listed(bad):
    kinds = sorted(bad.items())
    return ", ".join(f"{of['lines']:,} {kind} (first: {of['first']})" for kind, of in kinds)


def verify(folder):
    """Compare the files of a folder with their digests."""
    index = shards.read_index(folder)
    for name, file in sorted(index["files"].items()):
        if _digest(folder / name) != file:
            raise UsageError(f"{folder / name} is damaged: its digest is not the index's")
    print(f"{folder}: all {len(index['files'])} files are as they were written")
    return 0


if __name__ == "__main__":
    cli.run(main)
