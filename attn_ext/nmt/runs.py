"""Pairs of any number, sorted on disk by a hash of their text: an external merge sort.

The input is read once, block by block. The pairs of a block, sorted and each once, are a *run*, two
files: the pairs' text, and a record for each pair. What all runs hold in a range of hashes is then
every copy of the pairs with these hashes, so duplicates can be dropped range by range; and since
hashes know no order, pairs sorted by them are shuffled, and a range of them is a random sample.
"""

import codecs
import contextlib
import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attn_ext.nmt import corpora
from attn_ext.nmt.cli import UsageError, atomic_file
from attn_ext.nmt.data import leak_key

BLOCK_BYTES = 1 << 23  # of the (first) text: some 60,000 lines, and ten times that in memory
LONGEST_LINE = 1 << 23  # bytes: what is longer is no text, and would have to fit into memory
# `key` is the hash of the source's leak_key, `end` where the pair ends in the text.
RECORD = np.dtype([("hash", "<u8"), ("key", "<u8"), ("end", "<i8")])
HASH_BYTES = 8
COUNTED_EXACTLY = 1 << 21  # pairs; of more a part is counted

NOT_UTF8 = "not UTF-8"
NO_PAIR = "not source<TAB>target"
EMPTY_SIDE = "an empty side"
EMPTY_LINE = "an empty line"


class Place(NamedTuple):
    """How far the inputs have been read."""

    number: int = 0  # of the input
    offsets: tuple = ()  # bytes read of each of its files, decompressed
    line: int = 0  # lines read of it

    def after(self, texts, lines):
        offsets = self.offsets or (0,) * len(texts)
        offsets = tuple(offset + len(text) for offset, text in zip(offsets, texts))
        return Place(self.number, offsets, self.line + lines)


class Block(NamedTuple):
    """Some lines of an input: of a TSV file one text, of two files as many lines of each."""

    texts: tuple
    first_line: int  # from 1
    lines: int
    after: Place


def read_blocks(inputs, place):
    """Blocks of all inputs from a place on.

    Args:
        inputs: tuples of paths, of a TSV file or of a source and a target file.
        place: where to go on.

    Raises:
        UsageError: a file cannot be read, or two have different numbers of lines.
    """
    for number in range(place.number, len(inputs)):
        if number > place.number:
            place = Place(number)
        yield from _blocks_of(inputs[number], place)


def _blocks_of(paths, place):
    with contextlib.ExitStack() as stack:
        files = []
        for path, offset in itertools.zip_longest(paths, place.offsets, fillvalue=0):
            with corpora.reading(path):
                files.append(stack.enter_context(corpora.open_text(path)))
                files[-1].seek(offset)
        while True:
            with corpora.reading(paths[0]):
                text = files[0].read(BLOCK_BYTES)
                text += _line(files[0], paths[0])
            lines = text.count(b"\n") + (text[-1:] not in (b"", b"\n"))
            texts = [text]
            if len(paths) > 1:
                with corpora.reading(paths[1]):
                    other = [_line(files[1], paths[1]) for _ in range(lines or 1)]
                other = list(filter(None, other))
                if len(other) != lines:
                    longer = paths[len(other) > lines]
                    raise UsageError(
                        f"{paths[0]} and {paths[1]} have different numbers of lines: {longer} has "
                        f"more than {place.line + min(lines, len(other))}"
                    )
                texts.append(b"".join(other))
            if not lines:
                return
            first_line = place.line + 1
            place = place.after(texts, lines)
            yield Block(tuple(texts), first_line, lines, place)


def _line(file, path):
    line = file.readline(LONGEST_LINE)
    if len(line) == LONGEST_LINE:
        raise UsageError(f"{path} has a line of more than {LONGEST_LINE} bytes: is it text?")
    return line


def make_run(folder, number, block):
    """Write the run of a block.

    Returns:
        What the journal holds of it; "bad" is {kind: [lines, number of the first]}.
    """
    keys, copies, bad = {}, 0, {}
    for line, fields in enumerate(_fields(block), start=block.first_line):
        if fields is None:
            kind = NOT_UTF8
        elif len(fields) != 2:
            kind = NO_PAIR if fields[0].strip() or len(fields) > 2 else EMPTY_LINE
        else:
            source, target = map(corpora.normalise, fields)
            if source and target:
                text = f"{source}\t{target}".encode()
                entry = _hash(text) + text
                copies += entry in keys
                keys[entry] = hash_of_key(source)
                continue
            kind = EMPTY_SIDE
        bad.setdefault(kind, [0, line])[0] += 1
    entries = sorted(keys)
    records = np.empty(len(entries), RECORD)
    # Bytes are sorted as numbers are whose first byte is the highest.
    records["hash"] = np.frombuffer(b"".join(entry[:HASH_BYTES] for entry in entries), ">u8")
    records["key"] = np.frombuffer(b"".join(map(keys.get, entries)), ">u8")
    records["end"] = np.fromiter(map(len, entries), np.int64, len(entries)).cumsum()
    records_file, text_file = _files(folder, number)
    with atomic_file(records_file) as file:
        np.save(file, records)
    with atomic_file(text_file) as file:
        file.write(b"".join(entries))
    return {
        "run": number,
        "place": block.after,
        "lines": block.lines,
        "duplicates": copies,
        "bad": bad,
    }


def hash_of_key(source):
    """The bytes of the hash of a source's leak_key."""
    return _hash(leak_key(source).encode())


def _hash(content):
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def _fields(block):
    """For each line its fields; None where it is not UTF-8."""
    sides = [_lines(text, block.first_line == 1) for text in block.texts]
    if len(sides) == 2:
        return ((a, b) if a is not None and b is not None else None for a, b in zip(*sides))
    return (None if line is None else line.split("\t") for line in sides[0])


def _lines(content, at_start):
    if at_start:
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError:
        lines = [_decoded(line) for line in content.split(b"\n")]
    return lines if lines[-1] != "" else lines[:-1]


def _decoded(line):
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _files(folder, number):
    return Path(folder, f"run-{number:05}.npy"), Path(folder, f"run-{number:05}.txt")


# -- all runs together -------------------------------------------------------------------------


class Sorted:
    """The pairs of all runs by their hashes.

    Args:
        folder: of the runs.
        runs: how many there are, from number 0 on.
    """

    def __init__(self, folder, runs):
        self.folder, self.runs = Path(folder), runs

    def between(self, low, high):
        """The pairs with hashes from `low` to below `high`, each once, in the order of hashes.

        Returns:
            (texts, bytes of source<TAB>target; keys, (pairs,) uint64; how many copies were dropped)
        """
        keys, copies = {}, 0
        for number in range(self.runs):
            records = self._records(number)
            first, last = (self._position(records, bound) for bound in (low, high))
            if first == last:
                continue
            start = int(records["end"][first - 1]) if first else 0
            ends = records["end"][first:last] - start
            with open(_files(self.folder, number)[1], "rb") as file:
                file.seek(start)
                text = file.read(int(ends[-1]))
            ends = [0, *ends.tolist()]
            entries = [text[a:b] for a, b in itertools.pairwise(ends)]
            before = len(keys)
            keys.update(zip(entries, records["key"][first:last].tolist()))
            copies += len(entries) - (len(keys) - before)
        entries = sorted(keys)
        values = np.fromiter(map(keys.get, entries), np.uint64, len(entries))
        return [entry[HASH_BYTES:] for entry in entries], values, copies

    def distinct(self):
        """About how many different pairs there are; of many, a part is counted."""
        total = sum(len(self._records(number)) for number in range(self.runs))
        parts = 1 + total // COUNTED_EXACTLY
        hashes = [np.empty(0, np.uint64)]
        for number in range(self.runs):
            records = self._records(number)
            # Copied, or as many files would be open as there are runs.
            hashes.append(records["hash"][: self._position(records, (1 << 64) // parts)].copy())
        return len(np.unique(np.concatenate(hashes))) * parts

    def smallest_keys(self, count):
        """The smallest keys (count,), sorted, and how many pairs of the runs have each of them."""
        smallest = np.empty(0, np.uint64)
        for number in range(self.runs):
            keys = np.unique(self._records(number)["key"])[:count]
            smallest = np.union1d(smallest, keys)[:count]
        pairs = np.zeros(len(smallest), np.int64)
        for number in range(self.runs):
            keys, counts = np.unique(self._records(number)["key"], return_counts=True)
            _, ours, theirs = np.intersect1d(
                smallest, keys, assume_unique=True, return_indices=True
            )
            pairs[ours] += counts[theirs]
        return smallest, pairs

    def _records(self, number):
        return np.load(_files(self.folder, number)[0], mmap_mode="r")

    def _position(self, records, bound):
        """How many records have hashes below a bound, which is at most 2 ** 64."""
        if bound >= 1 << 64:
            return len(records)
        return int(records["hash"].searchsorted(np.uint64(bound)))
