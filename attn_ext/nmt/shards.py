"""Tokenised pairs to train on: in memory, or mapped from the folder that `prepare` writes.

Both are numbered by shard and row and are read in the same way, so the trainer does not know which
it has. What `prepare` writes is one pair of .npy files a shard, which numpy alone can read:

    shard-00000.lengths.npy  (pairs, 2), subwords of source and target, without marks
    shard-00000.tokens.npy   (total,), the source and the target of each pair, one after another

and an index.json, written last.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attn_ext.nmt import corpora
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.data import lengths_of
from attn_ext.nmt.vocab import Vocabulary

FORMAT = 1
INDEX_FILE = "index.json"
VOCABULARY_FILE = "subwords.model"
DEV_FILE, TEST_FILE = "dev.tsv", "test.tsv"
OPEN_SHARDS = 2  # mapped at once: the one that is read, and the next where batches are prefetched


class InMemory:
    """Pairs of ids as one shard: what fits into memory."""

    shards = 1

    def __init__(self, examples):
        self._examples = list(examples)
        self._lengths = lengths_of(self._examples)
        self.fewest = len(self._examples)  # pairs of a shard that has any

    def __len__(self):
        return len(self._examples)

    def lengths(self, shard):
        """(pairs, 2), subwords of source and target without marks."""
        return self._lengths

    def examples(self, shard, rows):
        """(source ids, target ids) of each row."""
        return [self._examples[row] for row in rows]


class Shards:
    """The training pairs of a folder that `prepare` wrote, mapped a shard at a time.

    Args:
        folder: of `prepare --out`.

    Raises:
        UsageError: the folder is not whole, see `load_prepared`.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        index = read_index(self.folder)
        self._pairs = [shard["pairs"] for shard in index["shards"]]
        self.shards = len(self._pairs)
        self.fewest = min(filter(None, self._pairs), default=0)  # pairs of a shard that has any
        self._open = {}  # shard: _Mapped, the latest last

    def __len__(self):
        return sum(self._pairs)

    def lengths(self, shard):
        """(pairs, 2), subwords of source and target without marks."""
        return self._mapped(shard).lengths

    def examples(self, shard, rows):
        """(source ids, target ids) of each row, arrays that lie in the map."""
        _, starts, tokens = mapped = self._mapped(shard)
        rows = np.asarray(rows, np.int64)
        starts = starts[rows]
        middles = starts + mapped.lengths[rows, 0]
        ends = middles + mapped.lengths[rows, 1]
        bounds = zip(starts.tolist(), middles.tolist(), ends.tolist())
        return [(tokens[start:middle], tokens[middle:end]) for start, middle, end in bounds]

    def _mapped(self, shard):
        if shard not in self._open:
            self._open[shard] = _Mapped.of(self.folder, shard)
            if len(self._open) > OPEN_SHARDS:
                del self._open[next(iter(self._open))]
        return self._open[shard]


class _Mapped(NamedTuple):
    lengths: np.ndarray  # (pairs, 2) int64
    starts: np.ndarray  # (pairs,) int64, of each pair in the tokens
    tokens: np.ndarray  # (total,), in the map

    @classmethod
    def of(cls, folder, shard):
        lengths_file, tokens_file = (folder / name for name in shard_files(shard))
        try:
            lengths = np.load(lengths_file).astype(np.int64)
            # The plain array of the same memory: numpy slices a memmap 5 times as slowly.
            tokens = np.asarray(np.load(tokens_file, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read shard {shard} of {folder}: {error}") from None
        sizes = lengths.sum(1)
        return cls(lengths, sizes.cumsum() - sizes, tokens)


class Prepared(NamedTuple):
    train: Shards
    dev: list  # of corpora.Pair
    test: list
    vocabulary: Vocabulary
    fingerprint: str  # of all of it
    counts: dict  # of lines, pairs and what was left out


def load_prepared(folder):
    """What `prepare` wrote, without reading the shards: in a second or so, whatever their size.

    Raises:
        UsageError: a file is missing or of another size than the index says, or the folder is of
            another format.
    """
    folder = Path(folder)
    index = read_index(folder)
    train = Shards(folder)
    vocabulary = Vocabulary(_read(folder, VOCABULARY_FILE, index))
    dev, test = (_read_pairs(folder, name, index) for name in (DEV_FILE, TEST_FILE))
    digest = hashlib.sha256(json.dumps(index["files"], sort_keys=True).encode()).hexdigest()
    return Prepared(train, dev, test, vocabulary, digest, index["counts"])


def shard_files(shard):
    """Names of the lengths and of the tokens of a shard."""
    return f"shard-{shard:05}.lengths.npy", f"shard-{shard:05}.tokens.npy"


def read_index(folder):
    """index.json of a folder, once the files that it names have been found to have their sizes."""
    path = Path(folder) / INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise UsageError(
                f"{path} has format {index['format']}; this version reads format {FORMAT}"
            )
        files = {name: int(file["bytes"]) for name, file in index["files"].items()}
        shards = [int(shard["pairs"]) for shard in index["shards"]]
        needed = {VOCABULARY_FILE, DEV_FILE, TEST_FILE}
        needed.update(name for shard in range(len(shards)) for name in shard_files(shard))
        if files.keys() != needed or not isinstance(index["counts"], dict):
            raise KeyError
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no {INDEX_FILE}: not a folder of attn_ext.nmt.prepare, or not finished"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{path} is not an index of attn_ext.nmt.prepare") from None
    for name, size in files.items():
        try:
            found = (path.parent / name).stat().st_size
        except OSError as error:
            raise UsageError(f"cannot read {path.parent / name}: {error.strerror}") from None
        if found != size:
            raise UsageError(
                f"{path.parent / name} is cut off or damaged: it has {found} bytes, not {size}"
            )
    return index


def _read(folder, name, index):
    """A small file's bytes, checked by their digest."""
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {folder / name}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != index["files"][name]["sha256"]:
        raise UsageError(f"{folder / name} is cut off or damaged: its digest is another")
    return content


def _read_pairs(folder, name, index):
    _read(folder, name, index)
    return corpora.read_tsv(folder / name)
