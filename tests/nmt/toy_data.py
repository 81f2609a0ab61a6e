"""Synthetic pairs to train on in seconds."""

import random

WORDS = "ein zwei drei vier rot grün blau haus tür licht lampe an aus".split()
TINY_MODEL = ["--embedding", "16", "--hidden", "16", "--vocab-size", "320"]
TINY_RUN = [*TINY_MODEL, "--batch-tokens", "120", "--warmup", "5", "--device", "cpu"]


def synthetic_pairs(count, seed=0):
    """Source: words; target: the same words backwards, so that there is something to align."""
    generator = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = generator.choices(WORDS, k=generator.randint(1, 7))
        pairs.append((" ".join(words), " ".join(reversed(words))))
    return pairs
