"""What the training benchmark trains on: real text, or random tokens in real lengths."""

import random
from types import SimpleNamespace
from typing import NamedTuple

import torch

from attn_ext.nmt import cli, corpora
from attn_ext.nmt.train import MAX_LENGTH
from attn_ext.nmt.vocab import Vocabulary

from .workloads import mixture

SYNTHETIC = 20_000  # sentences, of which larger batches hold some twice


class Text(NamedTuple):
    """Sentence pairs as token ids, and what to call them."""

    examples: list[tuple[list[int], list[int]]]
    vocabulary: Vocabulary | SimpleNamespace  # of either, training reads `bos` and `eos`
    label: str


def read_text(
    vocab_size: int, data: str | None = None, corpus: str | None = None, synthetic: bool = False
) -> Text:
    """The text asked for; else a corpus that is cached; else random tokens of GNMT's lengths.

    Args:
        vocab_size: subwords, at most.
        data: a file of pairs; ``corpus``: the name of one, which may be fetched;
        synthetic: random tokens in any case.

    Raises:
        attn_ext.nmt.cli.UsageError: what was asked for cannot be had.
    """
    if data or corpus:
        pairs = corpora.read_tsv(data) if data else corpora.load(corpus)
        return _encode(pairs, data or corpus, vocab_size)
    if not synthetic:
        cached = corpora.cache_dir() / corpora.HOMEASSISTANT_WHEEL
        try:
            if cached.exists():
                pairs = corpora.read_homeassistant_wheel(cached)
                return _encode(pairs, "homeassistant", vocab_size)
            reason = f"no {cached}"
        except cli.UsageError as error:  # a package is missing
            reason = str(error)
        print(f"no text at hand ({reason}): random tokens stand in for it", flush=True)
    lengths = mixture(SYNTHETIC, 1)
    generator = torch.Generator().manual_seed(0)
    first_word = 3  # after unknown, start and end
    tokens = torch.randint(first_word, vocab_size, (2 * sum(lengths),), generator=generator)
    sentences = [piece.tolist() for piece in tokens.split([n for n in lengths for _ in range(2)])]
    # Both sides are equally long, as lengths of pairs go together.
    examples = list(zip(sentences[::2], sentences[1::2], strict=True))
    return Text(examples, SimpleNamespace(bos=1, eos=2), "synthetic text, real lengths (GNMT's)")


def _encode(pairs: list[corpora.Pair], name: str, vocab_size: int) -> Text:
    vocabulary = Vocabulary.train((text for pair in pairs for text in pair[:2]), vocab_size)
    examples = [(vocabulary.encode(pair.source), vocabulary.encode(pair.target)) for pair in pairs]
    examples = [example for example in examples if max(map(len, example)) <= MAX_LENGTH]
    random.Random(0).shuffle(examples)
    return Text(examples, vocabulary, f"{name}: {len(pairs)} pairs, {len(vocabulary)} subwords")
