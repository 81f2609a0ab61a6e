"""Forced decoding: what a model makes of targets that are given."""

import torch

from attn_ext.nmt.model import LOGITS_AT_ONCE


def target_log_probs(model, batch):
    """Log-probability of each target token, given its source and the target tokens before it.

    Args:
        model: a Seq2Seq in eval mode.
        batch: of `data.make_batch`.

    Returns:
        (total target tokens,) float32, natural logarithms, in the order of `batch.target_output`.
    """
    states = model.encode(batch.source)
    embedded = batch.target_input.like(model.embed(batch.target_input.values))
    features, _ = model.decoder(embedded, states)
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = zip(features.split(rows), batch.target_output.values.split(rows), strict=True)
    log_probs = [
        model.project(part).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        for part, targets in parts
    ]
    return torch.cat(log_probs)


def word_alignment(weights, source_sizes, target_sizes):
    """Links from the attention weights of a sentence: each target word to one source word.

    A target word is linked to the source word that it attends to most, the rule by which Luong et
    al. 2015 (section 5.5) measure attention. What a word attends to another is summed over the
    subwords of both (Clark et al. 2019, but for a factor that chooses the same). `</s>` is no word:
    what is attended to it counts for nothing.

    The step read is the one that writes the subword. Chen et al. 2020 show that in Transformers the
    next step, whose input the subword is, aligns better; with one attention, whose context goes
    into the same step's output, it aligns worse.

    Args:
        weights: (target subwords + 1, source subwords + 1), `</s>` last on both sides.
        source_sizes, target_sizes: subwords of each word.

    Returns:
        Sorted list of (source word, target word), counted from 0. A word without subwords has no
        link.
    """
    source_word = _words_of(source_sizes)
    target_word = _words_of(target_sizes)
    by_word = torch.zeros(len(target_sizes), len(source_sizes))
    by_word.index_put_(
        (target_word[:, None], source_word[None]), weights[:-1, :-1], accumulate=True
    )
    if not by_word.numel():
        return []
    best = by_word.argmax(1).tolist()
    return sorted((best[word], word) for word, size in enumerate(target_sizes) if size)


def _words_of(sizes):
    """The word that each subword belongs to."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
