"""What the updates of a run compute, in their order, made ahead of the steps that need it."""

import collections
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from attn_ext.nmt.data import Batch, cut_batches, epoch_batches, make_batch, shard_order


class Position(NamedTuple):
    """Where a run stands in its data."""

    epoch: int = 0
    shards: int = 0  # of this epoch, in its order, that are done
    batches: int = 0  # of the shard after those that are done


class Update(NamedTuple):
    """What one update computes on one rank."""

    epoch: int
    passes: list[Batch]  # forward and backward passes, as many on every rank
    tokens: int  # of the targets, of all ranks
    after: Position  # where the run stands once it is done


class Batches:
    """The updates of a run on one rank.

    Args:
        train: pairs of token ids in shards (see `attn_ext.nmt.shards`).
        vocabulary: with the marks.
        options: TrainOptions.
        world: the processes that train together.
    """

    def __init__(self, train, vocabulary, options, world):
        self.train, self.vocabulary, self.options, self.world = train, vocabulary, options, world

    def updates(self, position):
        """The updates from a position on, epoch after epoch, without end."""
        options, epoch = self.options, position.epoch
        while True:
            order = shard_order(self.train.shards, options.seed, epoch)
            for number in range(position.shards, len(order)):
                shard = int(order[number])
                batches = epoch_batches(
                    self.train.lengths(shard),
                    options.batch_tokens,
                    options.seed,
                    epoch,
                    shard,
                    min_sentences=self.world.size,
                    bucketed=options.buckets,
                )
                for done in range(position.batches, len(batches)):
                    after = Position(epoch, number, done + 1)
                    yield self.update(batches[done], shard, after)
                position = Position(epoch, number + 1)
            epoch += 1
            position = Position(epoch)

    def update(self, rows, shard=0, after=Position()):  # noqa: B008
        """The update that rows of a shard make, in passes of at most `pass_tokens` a rank.

        Each pass has sentences for every rank, so that all ranks make equally many.
        """
        lengths = self.train.lengths(shard)[rows]
        ranks, most = self.world.size, self.options.pass_tokens * self.world.size
        passes = cut_batches(np.arange(len(rows)), lengths.max(1) + 1, most, ranks)
        batches = [
            make_batch(
                self.train.examples(shard, rows[part[self.world.rank :: ranks]]),
                self.vocabulary,
                self.world.device,
            )
            for part in passes
        ]
        return Update(after.epoch, batches, int(lengths[:, 1].sum()) + len(rows), after)


@contextlib.contextmanager
def made_ahead(items, most=2):
    """Yield an iterator over the same items, of which another thread makes the next ones."""
    with ThreadPoolExecutor(1) as worker:
        waiting = collections.deque(worker.submit(next, items) for _ in range(most))

        def in_order():
            while True:
                item = waiting.popleft().result()
                waiting.append(worker.submit(next, items))
                yield item

        try:
            yield in_order()
        finally:
            for future in waiting:
                future.cancel()
