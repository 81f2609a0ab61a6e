"""Splitting pairs without leaks, and batches of jagged token sequences by token budget."""

import hashlib
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from attn_ext.nmt.cli import UsageError

HELD_OUT_SHARE = 0.05  # of the groups, for dev and for test each
LARGEST_GROUP = 5  # times the mean size; a larger group is not held out


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
    seen = {_leak_key(source) for source, _ in train}
    for groups, kept in ((dev_groups, dev), (test_groups, test)):
        for pair in pairs:
            key = _leak_key(pair.source)
            if pair.group in groups and key not in seen:
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


def _leak_key(source):
    text = re.sub(r"\{[^{}]*\}", " \0 ", source.casefold())
    text = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text)
    return " ".join(re.sub(r"\d+", "0", text).split())


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
        values = torch.tensor([item for sequence in sequences for item in sequence])
        return cls.of(values.long().to(device), [len(sequence) for sequence in sequences])

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
    """Examples are (source ids, target ids), without the special tokens."""
    return Batch(
        Jagged.from_lists([source + [vocabulary.eos] for source, _ in examples], device),
        Jagged.from_lists([[vocabulary.bos] + target for _, target in examples], device),
        Jagged.from_lists([target + [vocabulary.eos] for _, target in examples], device),
    )


def example_tokens(example):
    """What an example counts towards the token budget: its longer side and the end mark."""
    return max(map(len, example)) + 1


def cut_batches(order, examples, batch_tokens, min_sentences=1):
    """Cut indices into consecutive batches of at most `batch_tokens`, and of enough sentences.

    Every batch has at least `min_sentences` (one for each rank), even over the budget.
    """
    batches, batch, tokens = [], [], 0
    for index in order:
        size = example_tokens(examples[index])
        if len(batch) >= min_sentences and tokens + size > batch_tokens:
            batches.append(batch)
            batch, tokens = [], 0
        batch.append(index)
        tokens += size
    if batches and len(batch) < min_sentences:
        batches[-1].extend(batch)
    elif batch:
        batches.append(batch)
    return batches


def epoch_batches(examples, batch_tokens, seed, epoch, min_sentences=1, pool=4096):
    """The batches of an epoch, a function of (seed, epoch) alone: lists of example indices.

    Within pools of shuffled examples, those of similar length go together.
    """
    generator = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    generator.shuffle(order)
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(
            order[start : start + pool],
            key=lambda index: (len(examples[index][1]), len(examples[index][0])),
        )
        batches += cut_batches(by_length, examples, batch_tokens, min_sentences)
    if len(batches) > 1 and len(batches[-1]) < min_sentences:  # a last pool of very few
        last = batches.pop()
        batches[-1] = batches[-1] + last
    generator.shuffle(batches)
    return batches


def sorted_batches(examples, batch_tokens):
    """Batches of similar source length, for evaluation and translation."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    return cut_batches(order, examples, batch_tokens)
