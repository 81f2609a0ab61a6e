"""A trained model in use: n-best lists, scores and word alignments of texts."""

import itertools
import random
import subprocess
import sys

import pytest
import torch

from attn_ext import nmt
from attn_ext.nmt import checkpoint, data, forced
from attn_ext.nmt.model import ModelConfig, Seq2Seq
from attn_ext.nmt.search import search_n_best
from attn_ext.nmt.translator import Translator
from attn_ext.nmt.vocab import Vocabulary

WORDS = "ba dufi go lamuno pi ra sute vo".split()  # of one to three subwords, see `reverser`
SYLLABLES = [word[i : i + 2] for word in WORDS for i in range(0, len(word), 2)]


def reversed_pairs(count, generator):
    """Different words, and the same backwards: target word j is source word n - 1 - j."""
    sources = [generator.sample(WORDS, generator.randint(2, 4)) for _ in range(count)]
    return [(" ".join(words), " ".join(reversed(words))) for words in sources]


@pytest.fixture(scope="module")
def reverser():
    """A Translator trained for seconds to say words backwards."""
    generator = random.Random(0)
    texts = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 2))) for _ in range(800)]
    vocabulary = Vocabulary.train([" ".join(texts)], 300)
    assert {len(vocabulary.encode(word)) for word in WORDS} == {1, 2, 3}
    torch.manual_seed(0)
    config = ModelConfig(len(vocabulary), embedding=32, hidden=32, dropout=0.0)
    translator = Translator(Seq2Seq(config), vocabulary)
    optimizer = torch.optim.Adam(translator.model.parameters(), lr=0.01)
    for _ in range(110):
        pairs = reversed_pairs(32, generator)
        examples = [tuple(map(vocabulary.encode, pair)) for pair in pairs]
        batch = data.make_batch(examples, vocabulary)
        optimizer.zero_grad()
        (translator.model(batch)[0] / len(batch.target_output.values)).backward()
        torch.nn.utils.clip_grad_norm_(translator.model.parameters(), 1.0)
        optimizer.step()
    return translator


@pytest.fixture
def pairs():
    return reversed_pairs(60, random.Random(1))


def test_alignments_of_reversed_words(reverser, pairs):
    """Of words of several subwords, too; by another step's attention few of them would be right."""
    links = reverser.align(pairs)
    right = total = 0
    for (_, target), found in zip(pairs, links, strict=True):
        words = len(target.split())
        assert sorted(j for _, j in found) == list(range(words)) and found == sorted(found)
        right += sum(i == words - 1 - j for i, j in found)
        total += words
    assert right / total > 0.9


def test_word_alignment_by_hand():
    weights = torch.tensor([
        [0.40, 0.30, 0.30, 0.0, 0.0],  # most to one subword of word 0, but more to both of word 1
        [0.10, 0.05, 0.00, 0.25, 0.6],  # most to </s>, which is no word
        [0.00, 0.00, 0.90, 0.1, 0.0],  # the second subword of the word before, and decides
        [0.90, 0.00, 0.00, 0.1, 0.0],  # </s>
    ])  # fmt: skip
    sizes = [1, 2, 0, 1]  # the third word has no subwords
    assert forced.word_alignment(weights, sizes, [1, 0, 2]) == [(1, 0), (1, 2)]
    assert forced.word_alignment(weights[[0, 1, 3]], sizes, [1, 1]) == [(1, 0), (3, 1)]
    assert forced.word_alignment(weights[-1:], sizes, []) == []
    assert forced.word_alignment(weights[:, -1:], [], [1, 2]) == []


def test_scores_are_those_of_the_search(model, examples, vocabulary, monkeypatch):
    """Of all hypotheses that ended, whatever their batch, and in parts of the logits."""
    monkeypatch.setattr(forced, "LOGITS_AT_ONCE", 5 * model.config.vocab_size)
    with torch.no_grad():
        model.output_bias[vocabulary.eos] += 3  # an untrained model hardly ends
    sources = [source for source, _ in examples[:12]]
    jagged = data.Jagged.from_lists([source + [vocabulary.eos] for source in sources])
    lists = search_n_best(model, jagged, vocabulary.bos, vocabulary.eos, 3, beam=4, alpha=0.6)
    found = [(s, one) for s, best in zip(sources, lists, strict=True) for one in best]
    assert len(found) > 30
    with torch.no_grad():
        batch = data.make_batch([(source, one.tokens) for source, one in found], vocabulary)
        log_probs = batch.target_output.like(forced.target_log_probs(model, batch)).split()
    for (_, one), of_target in zip(found, log_probs, strict=True):
        length = len(one.tokens) + 1
        assert of_target.sum().item() == pytest.approx(one.score * length**0.6, rel=1e-5)


def test_scores_of_texts(reverser, pairs):
    """In order, whatever the batches; the best translation's is the score that the search gave."""
    pairs = [*pairs, ("ba", ""), ("", "ba")]
    scores = reverser.score(pairs)
    in_small_batches = reverser.score(pairs[::-1], batch_tokens=8)[::-1]
    assert in_small_batches == pytest.approx(scores, rel=1e-5, abs=1e-5)
    assert all(score < 0 for score in scores)
    sources = [source for source, _ in pairs[:-1]]
    lists = reverser.translate(sources, beam=4, alpha=0.7, n_best=3)
    assert [best[0].text for best in lists] == reverser.translate(sources, beam=4, alpha=0.7)
    for source, best in zip(sources, lists, strict=True):
        assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)
        (score,) = reverser.score([(source, best[0].text)])
        length = len(best[0].tokens) + 1
        assert score == pytest.approx(best[0].score * length**0.7, rel=1e-4, abs=1e-5)


def test_a_text_is_no_list_of_texts(reverser):
    with pytest.raises(TypeError, match="texts: expected a list of strings, got the string 'ba'"):
        reverser.translate("ba")
    with pytest.raises(TypeError, match="pairs: expected .source, target. strings, got 'ba'"):
        reverser.align(["ba", "go"])
    with pytest.raises(ValueError, match="n_best: expected 1 to the beam, which is 2, got 3"):
        reverser.translate(["ba"], beam=2, n_best=3)


def test_the_model_is_left_in_its_mode(reverser):
    for training in (True, False):
        reverser.model.train(training)
        reverser.translate(["ba go"], beam=1)
        assert reverser.model.training == training


TRAINER = ["train", "training", "prepare", "shards", "evaluation", "heatmap"]
NOT_NEEDED = ["tqdm", "sacrebleu", "matplotlib", *(f"attn_ext.nmt.{name}" for name in TRAINER)]
USE = """
import sys
path, *not_needed = sys.argv[1:]
sys.modules.update(dict.fromkeys(not_needed))  # to import one of them is an error from here on
from attn_ext import nmt
translator = nmt.load(path, device="cpu", backend="reference")
print(*translator.translate(["ba dufi go"], beam=2))
translator.score([("ba", "ba")]), translator.align([("ba", "ba")]), translator.attention("ba")
"""


def test_one_file_loads_without_the_trainer(reverser, tmp_path):
    path = tmp_path / "alone.pt"
    checkpoint.save_model(path, reverser.model, reverser.vocabulary)
    command = [sys.executable, "-c", USE, path, *NOT_NEEDED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == reverser.translate(["ba dufi go"], beam=2)


def test_words_are_encoded_one_by_one_as_in_their_sentence(vocabulary):
    """So that what `align` reads is what the model was trained on."""
    for text in ("rot grün blau", "eins-zwei {name} 3 €", "Haustürlicht an!"):
        by_word = [vocabulary.encode(word) for word in text.split()]
        assert list(itertools.chain(*by_word)) == vocabulary.encode(text)


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="there is no .*none/model.pt"):
        nmt.load(tmp_path / "none", "cpu")
    with pytest.raises(ValueError, match="backend"):
        nmt.load(tmp_path / "none", "cpu", backend="gpu")
