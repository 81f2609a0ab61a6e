"""A trained model in use: texts go in; translations, scores and word alignments come out.

    from attn_ext import nmt

    translator = nmt.load("runs/mine")  # a training run's folder, or a model file alone
    translator.translate(["Invalid access token."])

It imports nothing of training, and no packages but torch, numpy and sentencepiece.
"""

import functools
import itertools
from typing import NamedTuple

import torch

from attn_ext.nmt import checkpoint, cli, distributed
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.corpora import normalise
from attn_ext.nmt.data import Jagged, make_batch, sorted_batches
from attn_ext.nmt.forced import target_log_probs, word_alignment
from attn_ext.nmt.search import search_n_best

BATCH_TOKENS = 4000


class Translation(NamedTuple):
    text: str
    score: float  # natural log-probability, divided by length ** alpha; both with </s>
    tokens: list  # ids of the target subwords, without </s>


class Attention(NamedTuple):
    source_pieces: list  # subwords, </s> at the end; `▁` marks the start of a word
    target_pieces: list  # likewise
    weights: torch.Tensor  # (target, source) float32 on the CPU, row t of the step that wrote t
    target: str


def load(path, device=None, backend=None):
    """The Translator of a trained model.

    Args:
        path: a training run's folder, or a file: its `model.pt`, or one that `attn_ext.nmt.export`
            or `attn_ext.nmt.average` wrote.
        device: "cpu", "cuda" or a torch.device; by default a GPU where there is one.
        backend: of `attn_ext`; by default the best available on the device.

    Raises:
        UsageError (a ValueError): there is no such file, it is damaged or something else; the
            device or the backend is not available.
    """
    device = distributed.pick_device(device)
    cli.check_backend(backend, device)
    model, vocabulary = checkpoint.load_model(path, backend, device)
    return Translator(model, vocabulary, device)


def _in_eval_mode(method):
    """Call a method with the model in eval mode and without autograd."""

    @functools.wraps(method)
    def call(self, *arguments, **keywords):
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return method(self, *arguments, **keywords)
        finally:
            self.model.train(was_training)

    return call


class Translator:
    """Translates, scores and aligns texts, in batches of similar length.

    Runs of white space count as one space; nothing else is done to a text before it is split into
    subwords. What else is in a batch changes results by no more than rounding.

    Args:
        model: a Seq2Seq on `device`.
        vocabulary: the Vocabulary that it was trained with.
        device: where the batches are put.
    """

    def __init__(self, model, vocabulary, device="cpu"):
        self.model = model
        self.vocabulary = vocabulary
        self.device = device

    @_in_eval_mode
    def translate(self, texts, beam=5, alpha=0.6, n_best=None, batch_tokens=BATCH_TOKENS):
        """Translate texts; an empty text stays empty.

        Args:
            texts: of one sentence each.
            beam: hypotheses kept in the search; 1 is greedy.
            alpha: exponent of the length by which a hypothesis' log-probability is divided.
            n_best: how many translations of each text, at most `beam`; None gives the best alone.
            batch_tokens: source tokens times beam in a batch, which bounds the memory.

        Returns:
            For each text a string. With `n_best`, for each text a list of Translation, best first:
            fewer than `n_best` where fewer hypotheses ended, but always one. They differ in their
            subwords; the texts of two can be equal.

        Raises:
            TypeError: `texts` is a single string.
            UsageError (a ValueError): `n_best` is not from 1 to `beam`.
        """
        if n_best is None:
            found = self.translate(texts, beam, alpha, 1, batch_tokens)
            return [best.text for (best,) in found]
        if not 1 <= n_best <= beam:
            raise UsageError(f"n_best: expected 1 to the beam, which is {beam}, got {n_best}")
        vocabulary = self.vocabulary
        encoded = [vocabulary.encode(text) for text in _texts(texts)]
        found = [[Translation("", 0.0, [])] for _ in encoded]
        for indices in sorted_batches([(ids, []) for ids in encoded], batch_tokens // beam):
            indices = [index for index in indices if encoded[index]]
            sources = [encoded[index] + [vocabulary.eos] for index in indices]
            source = Jagged.from_lists(sources, self.device)
            marks = vocabulary.bos, vocabulary.eos
            results = search_n_best(self.model, source, *marks, n_best, beam, alpha)
            for index, hypotheses in zip(indices, results, strict=True):
                found[index] = [
                    Translation(normalise(vocabulary.decode(tokens)), score, tokens)
                    for tokens, score in hypotheses
                ]
        return found

    @_in_eval_mode
    def score(self, pairs, batch_tokens=BATCH_TOKENS):
        """The log-probability of each target, given its source.

        Args:
            pairs: (source, target) texts. Of an empty one there is `</s>` alone.
            batch_tokens: tokens in a batch, counting the longer side of each pair.

        Returns:
            For each pair a float: the sum of the natural logarithms of the probabilities of the
            target's subwords and of its `</s>`, not divided by the length.

        Raises:
            TypeError: `pairs` has something else than pairs of strings.
        """
        examples = [tuple(map(self.vocabulary.encode, pair)) for pair in _pairs(pairs)]
        scores = [0.0] * len(examples)
        for indices, batch in self._batches(examples, batch_tokens):
            log_probs = batch.target_output.like(target_log_probs(self.model, batch).cpu())
            for index, of_target in zip(indices, log_probs.split(), strict=True):
                scores[index] = of_target.sum(dtype=torch.float64).item()
        return scores

    @_in_eval_mode
    def align(self, pairs, batch_tokens=BATCH_TOKENS):
        """The source word that each target word was written from, by the attention.

        Words are what white space separates. The rule is that of `forced.word_alignment`.

        Args:
            pairs: (source, target) texts.
            batch_tokens: tokens in a batch, counting the longer side of each pair.

        Returns:
            For each pair a sorted list of (source word, target word), counted from 0; each target
            word is in one of them, and none where the source is empty.

        Raises:
            TypeError: `pairs` has something else than pairs of strings.
        """
        # Subwords do not reach over white space, so that words can be encoded one by one.
        words = [
            [[self.vocabulary.encode(word) for word in side.split()] for side in pair]
            for pair in _pairs(pairs)
        ]
        examples = [tuple(list(itertools.chain(*side)) for side in pair) for pair in words]
        links = [[] for _ in examples]
        for indices, batch in self._batches(examples, batch_tokens):
            for index, weights in zip(indices, self.model.alignments(batch), strict=True):
                sizes = [list(map(len, side)) for side in words[index]]
                links[index] = word_alignment(weights.float().cpu(), *sizes)
        return links

    @_in_eval_mode
    def attention(self, source, target=None, beam=5):
        """The attention between a source text and a target text, or else its translation.

        Returns:
            Attention
        """
        (source,) = _texts([source])
        if target is None:
            ((best,),) = self.translate([source], beam, n_best=1)
            target, target_ids = best.text, best.tokens
        else:
            (target,) = _texts([target])
            target_ids = self.vocabulary.encode(target)
        example = (self.vocabulary.encode(source), target_ids)
        batch = make_batch([example], self.vocabulary, self.device)
        (weights,) = self.model.alignments(batch)
        return Attention(
            self.vocabulary.pieces(batch.source.values),
            self.vocabulary.pieces(batch.target_output.values),
            weights.float().cpu(),
            target,
        )

    def _batches(self, examples, batch_tokens):
        """Indices of examples of similar length, and the batch that they are."""
        for indices in sorted_batches(examples, batch_tokens):
            chosen = [examples[index] for index in indices]
            yield indices, make_batch(chosen, self.vocabulary, self.device)


def _texts(texts):
    """Texts with single spaces."""
    if isinstance(texts, str):  # its characters would be taken for texts
        raise TypeError(f"texts: expected a list of strings, got the string {texts!r:.60}")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts: expected a list of strings, got one with {text!r:.60}")
    return list(map(normalise, texts))


def _pairs(pairs):
    """Pairs of texts with single spaces."""
    pairs = list(pairs)
    for pair in pairs:
        is_pair = isinstance(pair, (tuple, list)) and [*map(type, pair)] == [str, str]
        if not is_pair:
            raise TypeError(f"pairs: expected (source, target) strings, got {pair!r:.60} in it")
    return [tuple(map(normalise, pair)) for pair in pairs]
