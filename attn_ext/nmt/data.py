"""Splitting pairs without leaks, and batches of jagged token sequences by token budget."""

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from attn_ext.nmt.cli import UsageError

HELD_OUT_SHARE = 0.05  # of the groups, for dev and for test each
LARGEST_GROUP = 5  # times the mean size; a larger group is not held out
POOL_BATCHES = 16  # sorted together: enough for a batch to be of similar lengths
LEAST_POOL = 4096  # pairs


class Split(NamedTuple):
    train: list
    dev: list
    test: list


def split_pairs(pairs):
    """Split by group, drop duplicates, and drop from dev and test what train has seen.

    The group decides by a hash of its name, so the split does not depend on the order of the data.
    Large groups are for training: a single one would be most of what is held out. A held-out source
    is a leak if it equals a training source up to case, numbers, punctuation and the names of
    placeholders ("Zone 1", "zone 2:"; "{name} is on", "{entity} is on").
    """
    pairs = list(dict.fromkeys(pair for pair in pairs if pair.source and pair.target))
    sizes = Counter(pair.group for pair in pairs)
    if len(sizes) < 3:
        raise UsageError(
            f"the data hold {len(sizes)} different group(s) of pairs; at least 3 are needed to "
            "hold some out for development and test"
        )
    largest = LARGEST_GROUP * len(pairs) / len(sizes)
    small = [group for group, size in sizes.items() if size <= largest]
    groups = sorted(small if len(small) >= 3 else sizes, key=_stable_hash)
    share = max(1, round(len(groups) * HELD_OUT_SHARE))
    dev_groups, test_groups = set(groups[:share]), set(groups[share : 2 * share])
    train, dev, test = {}, {}, {}
    for pair in pairs:
        if pair.group not in dev_groups and pair.group not in test_groups:
            train.setdefault((pair.source, pair.target), pair)
    seen = {leak_key(source) for source, _ in train}
    for groups, kept in ((dev_groups, dev), (test_groups, test)):
        for pair in pairs:
            if pair.group in groups and (key := leak_key(pair.source)) not in seen:
                # Of several with one key the first by text, in whatever order the data come.
                kept[key] = min(pair, kept.get(key, pair))
        seen |= kept.keys()
    split = Split(*(list(part.values()) for part in (train, dev, test)))
    for name, part in zip(Split._fields, split, strict=True):
        if not part:
            raise UsageError(
                f"no pairs are left for {name}: after dropping duplicates the data hold "
                f"{len(split.train)} train, {len(split.dev)} dev and {len(split.test)} test pairs"
            )
    return split


def fingerprint(split):
    """A digest of the split, by which a resumed run knows its data."""
    digest = hashlib.sha256()
    for part in split:
        for pair in part:
            digest.update("\0".join(pair).encode())
    return digest.hexdigest()


def _stable_hash(text):
    return hashlib.sha256(text.encode()).digest()


def leak_key(source):
    """What sources have in common of which none may be held out if another is trained on."""
    text = source.casefold()
    if "{" in text:
        text = _PLACEHOLDER.sub(" \0 ", text)
    return " ".join(_NUMBER.sub("0", text.translate(_WITHOUT_PUNCTUATION)).split())


class _WithoutPunctuation(dict):
    """For str.translate: spaces for punctuation, found out about once for each character."""

    def __missing__(self, character):
        is_punctuation = unicodedata.category(chr(character)).startswith("P")
        self[character] = " " if is_punctuation else character
        return self[character]


_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_NUMBER = re.compile(r"\d+")
_WITHOUT_PUNCTUATION = _WithoutPunctuation()


@dataclass
class Jagged:
    """Sequences of different lengths laid end to end: values (total, ...), offsets (B+1,)."""

    values: torch.Tensor
    lengths: torch.Tensor  # (B,) int64, always on the CPU: the LSTMs' packing wants it there
    cu_seqlens: torch.Tensor  # (B+1,) int32, on the device of the values
    max_seqlen: int

    @classmethod
    def of(cls, values, lengths):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        max_seqlen = int(lengths.max()) if len(lengths) else 0
        return cls(values, lengths, cu_seqlens.to(values.device), max_seqlen)

    @classmethod
    def from_lists(cls, sequences, device="cpu"):
        """Sequences of ids: lists or arrays of integers, none of them or all may be empty."""
        values, lengths = _laid_end_to_end(sequences)
        return cls.of(torch.from_numpy(values).to(device), lengths)

    def like(self, values):
        """The same offsets over other rows."""
        return Jagged(values, self.lengths, self.cu_seqlens, self.max_seqlen)

    def split(self):
        return self.values.split(self.lengths.tolist())


class Batch(NamedTuple):
    source: Jagged  # tokens, </s> at the end
    target_input: Jagged  # <s> and the tokens
    target_output: Jagged  # the tokens and </s>


def make_batch(examples, vocabulary, device="cpu"):
    """Examples are (source ids, target ids), lists or arrays, without the special tokens."""
    source, source_lengths = _laid_end_to_end([source for source, _ in examples])
    target, target_lengths = _laid_end_to_end([target for _, target in examples])
    # Where the marks go: before the first token of a sentence, or after its last.
    source_ends = source_lengths.cumsum()
    target_ends = target_lengths.cumsum()
    target_starts = target_ends - target_lengths

    def jagged(values, lengths):
        return Jagged.of(torch.from_numpy(values).to(device), lengths + 1)

    return Batch(
        jagged(np.insert(source, source_ends, vocabulary.eos), source_lengths),
        jagged(np.insert(target, target_starts, vocabulary.bos), target_lengths),
        jagged(np.insert(target, target_ends, vocabulary.eos), target_lengths),
    )


def _laid_end_to_end(sequences):
    """(all ids (total,) int64, lengths (B,) int64)."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    if not lengths.any():  # an empty list would be an array of floats
        return np.empty(0, np.int64), lengths
    filled = [sequence for sequence in sequences if len(sequence)]
    return np.concatenate(filled, dtype=np.int64, casting="same_kind"), lengths


# -- batches: all of it a function of (seed, epoch, shard), so that no state has to be kept --------


def shard_order(shards, seed, epoch):
    """The order in which an epoch visits the shards 0 to `shards` - 1: a list."""
    return _shuffled(shards, seed, epoch).tolist()


def epoch_batches(
    lengths, batch_tokens, seed, epoch, shard=0, min_sentences=1, pool=None, bucketed=True
):
    """The batches that an epoch makes of one shard, in their order.

    Args:
        lengths: (pairs, 2), tokens of source and target without marks.
        batch_tokens: most tokens of a batch, as `token_sizes` counts them.
        min_sentences: fewest pairs of a batch (one for each rank, say), even over the budget.
        pool: pairs that are sorted together, so that a batch holds sentences of similar length; by
            default enough of them for POOL_BATCHES batches.
        bucketed: False leaves the pairs in random order, whatever their lengths.

    Returns:
        A list of arrays of rows of `lengths`; each row is in one of them.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    sizes = token_sizes(lengths)
    order = _shuffled(len(lengths), seed, epoch, shard)
    if not bucketed:
        return cut_batches(order, sizes, batch_tokens, min_sentences)
    if pool is None:
        pool = max(LEAST_POOL, POOL_BATCHES * batch_tokens * len(sizes) // max(1, sizes.sum()))
    batches = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        by_length = part[np.lexsort((lengths[part, 0], lengths[part, 1]))]
        batches += cut_batches(by_length, sizes, batch_tokens, min_sentences)
    if len(batches) > 1 and len(batches[-1]) < min_sentences:  # a last pool of very few
        last = batches.pop()
        batches[-1] = np.concatenate([batches[-1], last])
    return [batches[i] for i in _shuffled(len(batches), seed, epoch, shard, 1)]


def cut_batches(order, sizes, batch_tokens, min_sentences=1):
    """Cut indices into consecutive batches of at most `batch_tokens`, and of enough sentences.

    Args:
        order: indices into `sizes`.
        sizes: what each index counts towards the budget.
        min_sentences: fewest indices of a batch, even over the budget.

    Returns:
        A list of arrays, `order` in parts.
    """
    order = np.asarray(order, np.int64)
    until = np.asarray(sizes, np.int64)[order].cumsum()  # tokens up to and with each index
    batches, start, done = [], 0, 0
    while start < len(order):
        end = int(until.searchsorted(done + batch_tokens, "right"))
        end = min(max(end, start + min_sentences, start + 1), len(order))
        batches.append(order[start:end])
        start, done = end, until[end - 1]
    if len(batches) > 1 and len(batches[-1]) < min_sentences:
        last = batches.pop()
        batches[-1] = np.concatenate([batches[-1], last])
    return batches


def sorted_batches(examples, batch_tokens):
    """Batches of similar source length, for evaluation and translation."""
    lengths = lengths_of(examples)
    order = lengths[:, 0].argsort(kind="stable")
    return cut_batches(order, token_sizes(lengths), batch_tokens)


def token_sizes(lengths):
    """What pairs of the lengths (pairs, 2) count towards a budget: the longer side and its mark."""
    return lengths.max(1, initial=0) + 1


def lengths_of(examples):
    """(examples, 2), the tokens of each side of (source ids, target ids)."""
    flat = np.fromiter((len(side) for example in examples for side in example), np.int64)
    return flat.reshape(-1, 2)


def _shuffled(count, *seeds):
    """A random order of 0 to `count` - 1, the same with every version of numpy.

    numpy promises that for a generator's bits, not for what its `permutation` makes of them.
    """
    return np.random.PCG64(seeds).random_raw(count).argsort(kind="stable")
