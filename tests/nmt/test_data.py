import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_data import synthetic_pairs

from attn_ext.nmt import data
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.corpora import Pair


def component_pairs():
    names = ["".join(letters) for letters in itertools.product("klmn", repeat=3)]
    own = [
        Pair(f"string {string} of {name}", f"Text {string} von {name}", name)
        for name in names
        for string in "abcdefgh"
    ]
    shared = [Pair("Name", "Name", name) for name in names]
    templated = [Pair(f"Zone {i} OPEN", f"Zone {i} offen", name) for i, name in enumerate(names)]
    return own + shared + templated


class TestSplit:
    def test_groups_stay_together(self):
        split = data.split_pairs(component_pairs())
        groups = [{pair.group for pair in part} for part in split]
        assert all(groups)
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]

    def test_nothing_held_out_was_trained_on(self):
        split = data.split_pairs(component_pairs())
        train, dev, test = ({pair.source for pair in part} for part in split)
        assert "Name" in train
        assert not (dev | test) & train and not dev & test
        assert not any(source.startswith("Zone") for source in dev | test)

    def test_large_groups_are_for_training(self):
        pairs = component_pairs()
        split = data.split_pairs(pairs)
        large = {split.dev[0].group, split.test[0].group}
        pairs += [Pair("extra " * i, "x", name) for name in large for i in range(1, 99)]
        split = data.split_pairs(pairs)
        assert not {pair.group for pair in split.dev + split.test} & large

    def test_exact_duplicates_are_dropped(self):
        split = data.split_pairs(component_pairs())
        for part in split:
            assert len({pair[:2] for pair in part}) == len(part)

    def test_does_not_depend_on_order(self):
        pairs = component_pairs()
        first, second = data.split_pairs(pairs), data.split_pairs(pairs[::-1])
        for a, b in zip(first, second, strict=True):
            assert {pair[:2] for pair in a} == {pair[:2] for pair in b}

    def test_too_few_groups(self):
        with pytest.raises(UsageError, match="2 different group"):
            data.split_pairs([Pair("a", "b", "a"), Pair("c", "d", "c")])

    def test_nothing_left_to_hold_out(self):
        pairs = [Pair("Name", "Name", group) for group in "abcdef"]
        with pytest.raises(UsageError, match="no pairs are left for dev"):
            data.split_pairs(pairs)


class TestBatches:
    LENGTHS = np.array([(i * 7 % 13 + 1, i * 5 % 17 + 1) for i in range(200)])

    def holds_each_once(self, batches):
        return sorted(int(i) for batch in batches for i in batch) == list(range(200))

    @pytest.mark.parametrize("bucketed", [True, False])
    def test_an_epoch_has_every_pair_once_and_keeps_the_budget(self, bucketed):
        batches = data.epoch_batches(self.LENGTHS, 60, seed=3, epoch=0, pool=64, bucketed=bucketed)
        assert self.holds_each_once(batches)
        for batch in batches:
            assert (self.LENGTHS[batch].max(1) + 1).sum() <= 60

    def test_a_function_of_seed_epoch_and_shard(self):
        def batches(*place):
            return [batch.tolist() for batch in data.epoch_batches(self.LENGTHS, 60, *place)]

        assert batches(3, 1, 0) == batches(3, 1, 0)
        others = [batches(3, 2, 0), batches(4, 1, 0), batches(3, 1, 1)]
        assert batches(3, 1, 0) not in others

    def test_the_order_is_the_one_of_every_version(self):
        """A run that another version of numpy resumes must not repeat pairs and miss others."""
        assert data.shard_order(8, seed=1, epoch=0) == [2, 4, 7, 5, 0, 6, 3, 1]
        assert data.shard_order(8, seed=1, epoch=1) != data.shard_order(8, seed=1, epoch=0)

    @pytest.mark.parametrize("ranks", [1, 2, 3, 7])
    def test_every_rank_gets_a_sentence(self, ranks):
        batches = data.epoch_batches(self.LENGTHS, 20, 0, 0, min_sentences=ranks, pool=50)
        assert min(map(len, batches)) >= ranks
        assert self.holds_each_once(batches)

    def test_large_batches_are_of_similar_lengths_too(self):
        lengths = np.tile(self.LENGTHS, (500, 1))
        batches = data.epoch_batches(lengths, 100_000, 0, 0)
        assert 5 < len(batches) < 20
        spans = [np.ptp(lengths[batch, 1]) for batch in batches]
        assert np.mean(spans) < 4  # of 16
        mixed = data.epoch_batches(lengths, 100_000, 0, 0, bucketed=False)
        assert min(np.ptp(lengths[batch, 1]) for batch in mixed) == 16

    def test_sentence_longer_than_the_budget(self):
        batches = data.cut_batches([2, 0, 1], [2, 2, 100], 10)
        assert [batch.tolist() for batch in batches] == [[2], [0, 1]]

    def test_nothing(self):
        assert data.epoch_batches(np.empty((0, 2)), 60, 0, 0) == []
        assert data.sorted_batches([], 60) == []


def test_batch_of_arrays_and_of_lists():
    """The marks stand where they belong, beside an empty side too."""
    vocabulary = SimpleNamespace(bos=1, eos=2)
    lists = [([3, 4], [5]), ([6], []), ([], [7, 8])]
    arrays = [tuple(np.array(side, np.uint16) for side in pair) for pair in lists]
    for examples in (lists, arrays):
        batch = data.make_batch(examples, vocabulary)
        parts = [[row.tolist() for row in side.split()] for side in batch]
        assert parts[0] == [[3, 4, 2], [6, 2], [2]]
        assert parts[1] == [[1, 5], [1], [1, 7, 8]]
        assert parts[2] == [[5, 2], [2], [7, 8, 2]]
        assert all(side.values.dtype == torch.int64 for side in batch)


def test_jagged_offsets():
    jagged = data.Jagged.from_lists([[5, 6, 7], [8], [9, 10]])
    assert jagged.values.tolist() == [5, 6, 7, 8, 9, 10]
    assert jagged.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert jagged.max_seqlen == 3
    assert [part.tolist() for part in jagged.split()] == [[5, 6, 7], [8], [9, 10]]


def test_vocabulary_round_trip(vocabulary):
    for text in ("das rote Haus", "Größe: 5 µm → {name}", "漢字"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.pieces([vocabulary.bos, vocabulary.eos]) == ["<s>", "</s>"]


def test_vocabulary_repeats(vocabulary):
    texts = [text for pair in synthetic_pairs(150) for text in pair]
    assert type(vocabulary).train(texts, 320).model_bytes == vocabulary.model_bytes


def test_every_batch_has_a_sentence_for_each_process(examples):
    for ranks in (2, 3):
        batches = data.epoch_batches(
            data.lengths_of(examples[:10]), 20, seed=1, epoch=0, min_sentences=ranks, pool=3
        )
        assert min(map(len, batches)) >= ranks
        assert sorted(index for batch in batches for index in batch) == list(range(10))


def test_a_leak_is_found_through_punctuation_and_placeholders():
    keys = {data.leak_key(text) for text in ("{name} is on.", "{entity_id} is ON", "{x}: is on!")}
    assert len(keys) == 1
    assert data.leak_key("a {name}") != data.leak_key("a name")


def test_which_of_equal_held_out_sources_is_kept_does_not_depend_on_order():
    pairs = component_pairs()
    own = data.split_pairs(pairs).dev[0]
    pairs += [own._replace(source=own.source + mark, target="x" + mark) for mark in ".!"]
    splits = [set(data.split_pairs(order).dev) for order in (pairs, pairs[::-1])]
    assert splits[0] == splits[1]


def test_what_dev_holds_is_not_in_test():
    """The model is chosen by dev; a sentence of both would make test look better than it is."""
    pairs = component_pairs()
    split = data.split_pairs(pairs)
    held_out = split.dev[0].group, split.test[0].group
    pairs += [
        Pair(f"Only held out, {n}", "Nicht gelernt", group) for group in held_out for n in "12"
    ]
    split = data.split_pairs(pairs)
    holding = [[pair.source.startswith("Only held") for pair in part] for part in split]
    assert list(map(sum, holding)) == [0, 1, 0]
