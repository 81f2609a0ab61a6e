import itertools

import pytest
import torch

from attn_ext.nmt import data
from attn_ext.nmt.model import DECODERS, ModelConfig, Seq2Seq
from attn_ext.nmt.search import search, search_n_best
from attn_ext.nmt.translator import Translator

BOS, EOS = 1, 2


def teacher_forced_log_probs(model, source, prefix):
    """Log-probabilities after each token of a prefix, by the training path."""
    target = data.Jagged.from_lists([[BOS, *prefix]])
    with torch.no_grad():
        logits = model.logits(data.Batch(data.Jagged.from_lists([source]), target, target))
    return logits.log_softmax(-1)


def greedy(model, source, limit):
    tokens = []
    while len(tokens) < limit:
        token = int(teacher_forced_log_probs(model, source, tokens)[-1].argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens


def test_beam_of_one_is_greedy(model, examples, vocabulary):
    sources = [source + [EOS] for source, _ in examples[:8]]
    limits = [12] * 8
    found = search(model, data.Jagged.from_lists(sources), BOS, EOS, 1, max_lengths=limits)
    for source, hypothesis in zip(sources, found, strict=True):
        assert hypothesis.tokens == greedy(model, source, 12)


@pytest.fixture(params=sorted(DECODERS))
def toy(request):
    """Five tokens, of which two are <s> and </s>, and sharp random choices."""
    torch.manual_seed(1)
    model = Seq2Seq(ModelConfig(5, request.param, embedding=6, hidden=5, decoder_layers=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_wide_beam_finds_what_brute_force_finds(toy, alpha):
    limit, sources = 4, [[3, 4, 0, 2], [4, 2], [0, 3, 2]]
    found = search(toy, data.Jagged.from_lists(sources), BOS, EOS, 5**limit, alpha, [limit] * 3)
    for source, hypothesis in zip(sources, found, strict=True):
        best_score, best = -torch.inf, None
        for length in range(limit):
            for tokens in itertools.product([0, 1, 3, 4], repeat=length):
                log_probs = teacher_forced_log_probs(toy, source, tokens)
                rows = log_probs[range(length + 1), [*tokens, EOS]]
                score = rows.sum().item() / (length + 1) ** alpha
                if score > best_score:
                    best_score, best = score, list(tokens)
        assert hypothesis.tokens == best
        assert hypothesis.score == pytest.approx(best_score, abs=1e-4)


@pytest.mark.parametrize("beam", [2, 4])
def test_beam_does_not_depend_on_the_batch_and_beats_greedy(toy, beam):
    sources = [[3, 4, 0, 2], [4, 2], [0, 3, 0, 0, 3, 2], [4, 4, 2]]
    limits = [6] * len(sources)
    together = search(toy, data.Jagged.from_lists(sources), BOS, EOS, beam, 0.0, limits)
    for source, hypothesis in zip(sources, together, strict=True):
        (alone,) = search(toy, data.Jagged.from_lists([source]), BOS, EOS, beam, 0.0, [6])
        assert hypothesis.tokens == alone.tokens
        assert hypothesis.score == pytest.approx(alone.score, abs=1e-4)


def test_without_an_end_the_longest_is_given(toy):
    with torch.no_grad():
        toy.output_bias[EOS] = -1e4
    for beam in (1, 3):
        (found,) = search(toy, data.Jagged.from_lists([[3, 2]]), BOS, EOS, beam, 0.6, [5])
        assert len(found.tokens) == 5 and EOS not in found.tokens


def test_no_sentences(toy):
    assert search(toy, data.Jagged.from_lists([]), BOS, EOS) == []


@pytest.mark.parametrize("beam", [1, 3])
def test_translate_keeps_order_and_empty_lines(model, vocabulary, beam):
    translator = Translator(model, vocabulary)
    texts = ["rot", "", "licht an", "eins zwei drei vier haus tür", ""]
    together = translator.translate(texts, beam, batch_tokens=12)
    assert together[1] == ""
    assert together == [translator.translate([text], beam)[0] for text in texts]


class NoMemory:
    def select(self, sentences):
        return self


class Chain:
    """A model whose next token follows from the last one alone, by a table of logits."""

    def __init__(self, table):
        self.log_probs, self.decoder = table.log_softmax(-1), self

    def encode(self, source):
        return source

    def remember(self, states):
        return NoMemory()

    def start(self, states, rows):
        return None

    def step(self, tokens, state, attend):
        return tokens, state, None

    def select(self, state, rows):
        return state

    def embed(self, tokens):
        return tokens

    def project(self, tokens):
        return self.log_probs[tokens]


def plain_beam_search(log_probs, beam, alpha, limit):
    """The search of one sentence, which ends at `limit` or when `beam` hypotheses have ended.

    Returns:
        (score, tokens) of all that have ended, best first.
    """
    going, ended = [(0.0, [BOS])], []
    for length in range(1, limit + 1):
        longer = [
            (total + log_prob, [*tokens, token])
            for total, tokens in going
            for token, log_prob in enumerate(log_probs[tokens[-1]].tolist())
        ]
        longer.sort(reverse=True)
        ends = [(total, tokens[1:-1]) for total, tokens in longer[:beam] if tokens[-1] == EOS]
        ended += [(total / length**alpha, tokens) for total, tokens in ends]
        going = [one for one in longer if one[1][-1] != EOS][:beam]
        if len(ended) >= beam:
            break
    return sorted(ended, reverse=True) or [(going[0][0] / limit**alpha, going[0][1][1:])]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beam", [1, 2, 3])
def test_search_ends_early_only_where_nothing_better_can_come(beam, alpha):
    """And `beam` hypotheses go on, however many end, of this sentence or of others."""
    limits = [3, 6, 9]
    sources = data.Jagged.from_lists([[EOS]] * len(limits))
    for seed, n_best in itertools.product(range(30), {1, 2, beam} - {beam + 1}):
        chain = Chain(2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))
        found = search_n_best(chain, sources, BOS, EOS, n_best, beam, alpha, limits)
        for limit, best in zip(limits, found, strict=True):
            expected = plain_beam_search(chain.log_probs, beam, alpha, limit)[:n_best]
            assert [one.tokens for one in best] == [tokens for _, tokens in expected]
            scores = [score for score, _ in expected]
            assert [one.score for one in best] == pytest.approx(scores, abs=1e-4)
