"""Write any number of synthetic sentence pairs, made of the public corpora: English, tab, German.

    python -m benchmarks.make_pairs 5000000 --out pairs.tsv

A pair is two or three pairs of the corpora, one after another in both languages, with the numbers
and placeholders that both sides share exchanged for others. So lengths and words are real, nearly
all pairs are different, and equal arguments write equal bytes. For tests of size, not of quality.
"""

import argparse
import gzip
import random
import re
import sys

from tqdm import tqdm

from attn_ext.nmt import cli, corpora

CLAUSES = (2, 2, 3)  # pairs that a pair is made of: there are too few for many different ones of 1
LONGEST = 200  # characters of a pair of the corpora; pages have a few of thousands
SHARED = re.compile(r"\{[a-z_]+\}|\b\d+\b")  # a placeholder or a number
NAMES = "name host device entity area user file path value count time error state zone".split()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.make_pairs", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("count", type=cli.positive_int, metavar="N", help="pairs to write")
    parser.add_argument("--out", metavar="FILE", help="a .tsv or .tsv.gz; default standard output")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (default 1)")
    options = parser.parse_args(arguments)
    pairs = [
        (pair.source, pair.target)
        for name in ("homeassistant", "libreoffice")
        for pair in corpora.load(name)
        if pair.source and pair.target and max(map(len, pair[:2])) <= LONGEST
    ]
    pairs = list(dict.fromkeys(pairs))
    generator = random.Random(options.seed)
    with _writer(options.out) as file:
        for _ in tqdm(range(options.count), unit="pair", unit_scale=True):
            clauses = generator.choices(pairs, k=generator.choice(CLAUSES))
            source, target = map(" ".join, zip(*(_varied(*pair, generator) for pair in clauses)))
            file.write(f"{source}\t{target}\n".encode())


def _varied(source, target, generator):
    """The pair with what both sides share exchanged for something else of its kind."""
    found = SHARED.findall(source)
    if not found:
        return source, target
    others = {}
    for word in found:
        if word in target:
            name = "{" + generator.choice(NAMES) + "}"
            others[word] = name if word[0] == "{" else str(generator.randrange(1, 10_000))

    def exchange(match):
        return others.get(match[0], match[0])

    return SHARED.sub(exchange, source), SHARED.sub(exchange, target)


def _writer(path):
    if path is None:
        return open(sys.stdout.fileno(), "wb", closefd=False)
    if path.endswith(".gz"):
        return gzip.GzipFile(path, "wb", compresslevel=6, mtime=0)
    return open(path, "wb")


if __name__ == "__main__":
    cli.run(main)
