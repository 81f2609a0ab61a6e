"""Greedy and beam search over many sources at once, with length normalisation."""

import bisect
from typing import NamedTuple

import torch

# The part of a batch that has to go on for those that have ended to stay in it: to leave them out
# costs about as much as a step.
FEWEST_GOING = 0.75


class Hypothesis(NamedTuple):
    tokens: list  # without <s> and </s>
    score: float  # log-probability divided by length ** alpha, the length with </s>


def search(model, source, bos, eos, beam=1, alpha=0.6, max_lengths=None):
    """The best hypothesis found for each source sentence: see `search_n_best`.

    Returns:
        B Hypothesis.
    """
    found = search_n_best(model, source, bos, eos, 1, beam, alpha, max_lengths)
    return [best for (best,) in found]


@torch.inference_mode()
def search_n_best(model, source, bos, eos, n_best, beam=1, alpha=0.6, max_lengths=None):
    """The best hypotheses found for each source sentence, by beam search.

    A sentence is done when `beam` hypotheses of it have ended, or when no other can become better
    than the worst of the `n_best` best, or at its greatest length; one without `eos` is taken only
    where none has ended. A beam of 1 is greedy search.

    Args:
        model: a Seq2Seq in eval mode.
        source: Jagged tokens, B sentences, none empty.
        bos, eos: ids of the marks that begin and end a target.
        n_best: hypotheses asked for of each sentence, at most `beam`.
        beam: hypotheses kept for each sentence.
        alpha: exponent of the length by which a log-probability is divided.
        max_lengths: most target tokens of each sentence, `eos` included; by default generous.

    Returns:
        B lists of Hypothesis, best first: `n_best` each, and fewer where a sentence came to its
        greatest length before so many had ended, but always one.
    """
    sentences, device = len(source.lengths), source.values.device
    if not sentences:
        return []
    if max_lengths is None:
        max_lengths = [length * 3 // 2 + 10 for length in source.lengths.tolist()]
    states = model.encode(source)
    attend = BeamAttention(model.decoder.remember(states), beam)
    state = model.decoder.start(states, sentences * beam)
    tokens = torch.full((sentences * beam,), bos, device=device)
    going = list(range(sentences))  # a row of hypotheses each
    history = torch.empty(sentences, beam, 0, dtype=torch.long, device=device)
    # At first all hypotheses of a sentence are the same one, so only one may go on.
    scores = torch.full((sentences, beam), -torch.inf, device=device)
    scores[:, 0] = 0.0
    endings = [_Endings(n_best) for _ in range(sentences)]

    for step in range(1, max(max_lengths) + 1):
        features, state, _ = model.decoder.step(model.embed(tokens), state, attend)
        log_probs = model.project(features).float().log_softmax(-1)
        totals = (scores[..., None] + log_probs.view(len(going), beam, -1)).flatten(1)
        # Each hypothesis can end in one way, so of twice the beam at least `beam` go on.
        top, where = totals.topk(2 * beam, dim=1)
        origin = where.div(log_probs.size(-1), rounding_mode="floor")
        token = where % log_probs.size(-1)
        ends = token == eos

        for b, rank in (ends & top.isfinite())[:, :beam].nonzero().tolist():
            tokens_before = history[b, origin[b, rank]]
            endings[going[b]].add(tokens_before, top[b, rank].item() / step**alpha)
        scores, kept = top.masked_fill(ends, -torch.inf).topk(beam, dim=1)
        origin, token = origin.gather(1, kept), token.gather(1, kept)
        history = history.gather(1, origin[..., None].expand(-1, -1, step - 1))
        history = torch.cat([history, token[..., None]], -1)

        for b, best_going in enumerate(scores[:, 0].tolist()):
            ending, longest = endings[going[b]], max_lengths[going[b]]
            at_end = step >= longest
            if at_end and not ending.best:
                ending.add(history[b, 0], best_going / step**alpha)
            # The best that a hypothesis still going can reach is to lose no probability.
            bound = best_going / longest**alpha
            ending.done |= at_end or ending.count >= beam
            ending.done |= ending.all_reach(bound)
        left = [b for b, sentence in enumerate(going) if not endings[sentence].done]
        if not left:
            break
        rows = torch.arange(len(going), device=device)[:, None] * beam + origin
        if len(left) < FEWEST_GOING * len(going):
            chosen = torch.tensor(left, device=device)
            going = [going[b] for b in left]
            attend = attend.select(chosen)
            rows, token, scores, history = (t[chosen] for t in (rows, token, scores, history))
        state = model.decoder.select(state, rows.flatten())
        tokens = token.flatten()
    return [ending.best for ending in endings]


class _Endings:
    """What has ended of one sentence's hypotheses."""

    def __init__(self, n_best):
        self.n_best = n_best
        self.best = []  # Hypothesis, best first, at most n_best
        self.count = 0
        self.done = False

    def add(self, tokens, score):
        if self.done:
            return
        self.count += 1
        if len(self.best) < self.n_best or score > self.best[-1].score:
            del self.best[self.n_best - 1 :]
            # Behind those of an equal score, which ended earlier.
            bisect.insort(self.best, Hypothesis(tokens.tolist(), score), key=lambda h: -h.score)

    def all_reach(self, bound):
        """Whether as many as asked for have ended, none with a score below `bound`."""
        return len(self.best) == self.n_best and self.best[-1].score >= bound


class BeamAttention:
    """What decoders attend with: queries (rows, D) to contexts, `beam` rows a sentence.

    The hypotheses of a sentence share its keys, so that none is copied.
    """

    def __init__(self, memory, beam):
        self.memory = memory
        self.beam = beam

    def __call__(self, query):
        return self.memory.attend(query.unflatten(0, (-1, self.beam))).flatten(0, 1)

    def select(self, sentences):
        """The same for some of the sentences."""
        return BeamAttention(self.memory.select(sentences), self.beam)
