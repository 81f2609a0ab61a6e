"""Races: two accesses to a byte, one of them a write, with no barrier between them."""

from typing import NamedTuple

import numpy as np

NOBODY, SEVERAL = -1, -2  # in place of a block's number
NON_COHERENT = "non-coherent read of what the launch writes"  # which PTX leaves undefined


class Who(NamedTuple):
    """Of accessing threads, [threads, 1] each."""

    block: np.ndarray
    epoch: np.ndarray  # barriers that the block has passed
    warp: np.ndarray  # in the block
    lane: np.ndarray
    synced: np.ndarray  # synchronisations of the warp


class Threads:
    """The threads of some blocks, and how often they have been synchronised."""

    def __init__(self, blocks: np.ndarray, size: int):
        thread = np.arange(len(blocks) * size)
        self.place = thread // size  # of a thread's block among these
        self.block = np.repeat(blocks, size).astype(np.int32)
        self.warp = (thread % size // 32).astype(np.int32)
        self.lane = (thread % 32).astype(np.int32)
        self.epoch = np.zeros(len(blocks), np.int32)
        self.synced = np.zeros(thread.size // 32, np.int32)

    def who(self, threads: np.ndarray) -> Who:
        columns = (
            self.block[threads],
            self.epoch[self.place[threads]],
            self.warp[threads],
            self.lane[threads],
            self.synced[threads // 32],
        )
        return Who(*(column[:, None] for column in columns))


class RaceWatch:
    """By whom each byte was written and read last in a launch, and since which barrier.

    Blocks have no barrier between them: what one writes no other may access. Which thread has what
    of a Triton tensor is its compiler's choice, at each load and store: with ``any_thread``, of
    global memory, no thread may rely on its own write before a barrier, and none may write what
    another of its warp has read, even if the two go in step.
    """

    def __init__(self, size: int, report, any_thread: bool = False):
        self.report, self.any_thread = report, any_thread
        self.write_block, self.read_block = (np.full(size, NOBODY, np.int32) for _ in range(2))
        self.write_epoch, self.write_warp, self.write_lane, self.write_sync, self.read_epoch = (
            np.empty(size, np.int32) for _ in range(5)
        )
        self.read_warps = np.zeros(size, np.uint32)  # a bit for each warp of the block
        self.read_only = np.zeros(size, bool)  # by a non-coherent load
        self.read_thread = np.empty(size, np.int32) if any_thread else None

    def _add(self, kind: str, site: str, bad: np.ndarray) -> None:
        if bad.any():
            self.report.add(kind, site, bad.any(1).sum())

    def note_read(self, bytes_: np.ndarray, who: Who, site: str, read_only: bool = False) -> None:
        """``bytes_`` [threads, bytes]: of an access by each thread."""
        writer = self.write_block[bytes_]
        if read_only:
            self.read_only[bytes_] = True
            self._add(NON_COHERENT, site, writer != NOBODY)
        if (writer != NOBODY).any():
            others = (writer != NOBODY) & (writer != who.block)
            self._add("RACE: read of another block's write", site, others)
            now = (writer == who.block) & (self.write_epoch[bytes_] == who.epoch)
            other = now & (self.write_warp[bytes_] != who.warp)
            self._add("RACE: read of another warp's write", site, other)
            if self.any_thread:
                self._add("RACE: read back without a barrier", site, now & ~other)
            unsynced = self.write_sync[bytes_] == who.synced
            unsynced &= self.write_lane[bytes_] != who.lane
            self._add("intra-warp read after write", site, unsynced & now & ~other)
        reader = self.read_block[bytes_]
        old = (reader != who.block) | (self.read_epoch[bytes_] != who.epoch)
        self.read_warps[bytes_[old]] = 0
        if self.any_thread:
            thread = np.broadcast_to(32 * who.warp + who.lane, bytes_.shape)
            several = ~old & (self.read_thread[bytes_] != thread)
            self.read_thread[bytes_] = thread
            several |= self.read_thread[bytes_] != thread
            self.read_thread[bytes_[several]] = SEVERAL
        self.read_epoch[bytes_] = who.epoch
        mine = (reader == NOBODY) | (reader == who.block)
        self.read_block[bytes_] = np.where(mine, who.block, SEVERAL)
        # Several blocks may have read it by one instruction.
        self.read_block[bytes_[self.read_block[bytes_] != who.block]] = SEVERAL
        for number in np.unique(who.warp):
            self.read_warps[bytes_[who.warp[:, 0] == number]] |= np.uint32(1 << number)

    def note_write(self, bytes_: np.ndarray, who: Who, same, site: str) -> None:
        """``same``: where bytes have the written value already, which is no race of writers."""
        self._add(NON_COHERENT, site, self.read_only[bytes_])
        writer = self.write_block[bytes_]
        if (writer != NOBODY).any():
            others = (writer != NOBODY) & (writer != who.block)
            self._add("RACE: two blocks write", site, others & ~same)
            other = (writer == who.block) & (self.write_epoch[bytes_] == who.epoch)
            other &= self.write_warp[bytes_] != who.warp
            self._add("RACE: two warps write", site, other & ~same)
        reader = self.read_block[bytes_]
        if (reader != NOBODY).any():
            others = (reader != NOBODY) & (reader != who.block)
            self._add("RACE: write to what another block reads", site, others)
            mine = np.uint32(1) << who.warp.astype(np.uint32)
            other = (reader == who.block) & (self.read_epoch[bytes_] == who.epoch)
            other &= (self.read_warps[bytes_] & ~mine) != 0
            self._add("RACE: write to what another warp reads", site, other)
            if self.any_thread:
                mine = (reader == who.block) & (self.read_epoch[bytes_] == who.epoch) & ~other
                mine &= self.read_thread[bytes_] != 32 * who.warp + who.lane
                self._add("RACE: write to what another thread reads", site, mine)
        places = self.write_block, self.write_epoch, self.write_warp, self.write_lane
        for array, value in zip((*places, self.write_sync), who):
            array[bytes_] = np.broadcast_to(value, bytes_.shape)
