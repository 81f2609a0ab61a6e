"""The order of a run's updates: an epoch is every pair once, and each can be the first."""

import dataclasses
import itertools
import json
import threading

import pytest
from toy_data import TINY_MODEL, synthetic_pairs

from attn_ext.nmt import evaluation, prepare, shards, train
from attn_ext.nmt.batches import Batches, Position, made_ahead
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.distributed import World
from attn_ext.nmt.options import TrainOptions

OPTIONS = TrainOptions(batch_tokens=300, pass_tokens=60)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    lines = (
        f"{source} {n}\t{target} {n}\n" for n, (source, target) in enumerate(synthetic_pairs(400))
    )
    (folder / "pairs.tsv").write_text("".join(lines))
    options = ["--vocab-size", "320", "--shard-pairs", "80", "--workers", "1"]
    prepare.main([str(folder / "pairs.tsv"), "--out", str(folder / "data"), *options])
    return folder / "data"


def sentences(update):
    """The sources and targets of an update of this rank, in their order."""
    for batch in update.passes:
        pairs = zip(batch.source.split(), batch.target_output.split(), strict=True)
        yield from ((source.tolist(), target.tolist()) for source, target in pairs)


def test_an_epoch_is_every_pair_once_over_all_ranks(prepared):
    data = shards.load_prepared(prepared)
    assert data.train.shards > 2
    eos = [data.vocabulary.eos]
    expected = [
        (source.tolist() + eos, target.tolist() + eos)
        for shard in range(data.train.shards)
        for source, target in data.train.examples(shard, range(len(data.train.lengths(shard))))
    ]
    seen, passes = [], []
    for rank in range(2):
        batches = Batches(data.train, data.vocabulary, OPTIONS, World(rank, 2))
        epoch = list(itertools.takewhile(lambda u: u.epoch == 0, batches.updates(Position())))
        seen += [pair for update in epoch for pair in sentences(update)]
        passes.append([len(update.passes) for update in epoch])
        assert sum(update.tokens for update in epoch) == sum(len(target) for _, target in expected)
    assert sorted(seen) == sorted(expected)
    assert passes[0] == passes[1] and max(passes[0]) > 1  # no rank waits for another's pass


def test_every_position_can_be_gone_to(prepared):
    data = shards.load_prepared(prepared)
    batches = Batches(data.train, data.vocabulary, OPTIONS, World())
    updates = list(itertools.takewhile(lambda u: u.epoch < 2, batches.updates(Position())))
    for here, following in itertools.pairwise(updates):
        found = next(batches.updates(here.after))
        assert found.after == following.after
        assert list(sentences(found)) == list(sentences(following))


def test_made_ahead_in_order_by_another_thread():
    threads = set()

    def numbers():
        for number in itertools.count():
            threads.add(threading.get_ident())
            if number == 5:
                raise UsageError("five")
            yield number

    with made_ahead(numbers()) as items:
        assert list(itertools.islice(items, 5)) == [0, 1, 2, 3, 4]
        with pytest.raises(UsageError, match="five"):
            next(items)
    assert threads.isdisjoint({threading.get_ident()})


def losses(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_over_shards_goes_on_exactly(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "report", lambda *_, **__: None)  # takes longer than the steps
    options = [*TINY_MODEL[:4], "--batch-tokens", "200", "--warmup", "5", "--decoder", "rnnsearch"]
    for name, steps in (("whole", 24), ("parts", 13)):
        out = tmp_path / name
        arguments = ["--data", str(prepared), "--out", str(out), *options, "--device", "cpu"]
        assert train.main([*arguments, "--max-steps", str(steps)]) == 0
    train.main(["--out", str(tmp_path / "parts"), "--resume", "--max-steps", "24"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_prepared_folder_has_its_own_subwords(prepared, tmp_path):
    given = {"out": str(tmp_path), "data": str(prepared), "vocab_size": 300}
    with pytest.raises(UsageError, match=r"--vocab-size 300 does not fit .* with \d+ subwords"):
        train._load_data(given, None, World())


def test_each_rank_has_a_sentence_in_each_pass(prepared):
    """One without would fail, and the others wait for it."""
    data = shards.load_prepared(prepared)
    options = dataclasses.replace(OPTIONS, batch_tokens=1)
    for rank in range(3):
        batches = Batches(data.train, data.vocabulary, options, World(rank, 3))
        for update in itertools.islice(batches.updates(Position()), 100):
            assert all(len(batch.source.lengths) for batch in update.passes)


def test_shards_smaller_than_the_number_of_processes(tmp_path, monkeypatch):
    (tmp_path / "a.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in synthetic_pairs(100)))
    options = ["--vocab-size", "320", "--shard-pairs", "2", "--workers", "1"]
    prepare.main([str(tmp_path / "a.tsv"), "--out", str(tmp_path / "data"), *options])
    train_pairs = shards.load_prepared(tmp_path / "data").train
    sizes = [len(train_pairs.lengths(shard)) for shard in range(train_pairs.shards)]
    assert min(sizes) == 0 and train_pairs.fewest == 1
    for size in (1, 2):
        world = World(0, size)
        for name in ("from_main", "together"):
            monkeypatch.setattr(World, name, lambda _, function: function())
        monkeypatch.setattr(train, "Trainer", None)  # which is next
        given = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
        error, message = (TypeError, "not callable") if size == 1 else (UsageError, "1 training")
        with pytest.raises(error, match=message):
            train._train(given, tmp_path / "out", world)
