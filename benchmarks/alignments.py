"""How often a model's attention aligns words that a translation copies, by several rules.

    python -m benchmarks.alignments --model runs/homeassistant --corpus homeassistant

Nobody has aligned these corpora by hand. But of a word (a name, a placeholder) that occurs once in
a sentence and once in its translation it is known what it was written from.
"""

import argparse
from collections import Counter

import torch

from attn_ext import nmt
from attn_ext.nmt import corpora, data
from attn_ext.nmt.forced import word_alignment


def copied_words(source, target):
    """Links (source word, target word) that are sure, but for punctuation around the words."""
    source, target = ([word.strip(".,:;!?\"'()") for word in text.split()]
                      for text in (source, target))  # fmt: skip
    once = [word for word, count in Counter(source).items() if count == 1 and len(word) > 1]
    return {(source.index(word), target.index(word)) for word in once if target.count(word) == 1}


def any_subwords(weights, source_sizes, target_sizes):
    """All words of which any two subwords are linked, as Zenkel et al. 2019 do."""
    source_word, target_word = (
        [word for word, size in enumerate(sizes) for _ in range(size)]
        for sizes in (source_sizes, target_sizes)
    )
    best = weights[:-1, :-1].argmax(1).tolist()
    return [(source_word[i], j) for i, j in zip(best, target_word, strict=True)]


RULES = {
    "the step that writes a word": word_alignment,
    "the step after it": lambda weights, *sizes: word_alignment(
        torch.cat([weights[1:], weights[-1:]]), *sizes
    ),
    "any subwords": any_subwords,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--corpus", choices=("homeassistant", "libreoffice"), required=True)
    options = parser.parse_args()
    translator = nmt.load(options.model)
    split = data.split_pairs(corpora.load(options.corpus))
    pairs = [(pair.source, pair.target) for pair in split.test + split.dev]
    pairs = [pair for pair in pairs if len(pair[0].split()) > 1 and copied_words(*pair)]
    right, links, known = Counter(), Counter(), 0
    for source, target in pairs:
        weights = translator.attention(source, target).weights
        sizes = [[len(translator.vocabulary.encode(word)) for word in side.split()]
                 for side in (source, target)]  # fmt: skip
        copied = copied_words(source, target)
        known += len(copied)
        for name, rule in RULES.items():
            found = {(i, j) for i, j in rule(weights, *sizes) if j in {j for _, j in copied}}
            right[name] += len(found & copied)
            links[name] += len(found)
    print(f"{known} copied words in {len(pairs)} held-out pairs of {options.corpus}")
    for name in RULES:
        print(f"{name:28} finds {right[name] / known:6.1%}, and of its links there "
              f"{right[name] / links[name]:6.1%} are right")  # fmt: skip


if __name__ == "__main__":
    main()
