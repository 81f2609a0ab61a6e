"""Global and shared memory of an executed launch, and what is checked of their accesses."""

import collections

import numpy as np

from .races import RaceWatch, Threads, Who

# Each allocation owns 2^36 addresses, so that one outside its bytes lies in no other.
REGION = 36
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xFF  # NaN in every float format, -1 in integers


class Report:
    """Findings, counted by kind and place in the source."""

    def __init__(self):
        self.found: collections.Counter = collections.Counter()
        self.examples: dict[tuple[str, str], str] = {}

    def clear(self) -> None:
        self.found.clear()
        self.examples.clear()

    def add(self, kind: str, site: str, count: int, example: str = "") -> None:
        self.found[kind, site] += int(count)
        self.examples.setdefault((kind, site), example)

    def add_lost(self, values: np.ndarray, kept: np.ndarray, site: str) -> None:
        """Stored [threads, count], and what was there afterwards.

        Copies of one value are stored by several threads, which is fine. So are those of float32
        that is not a number: hardware has one, here its bits depend on the order of operands.
        """
        lost = values != kept
        if lost.any() and values.itemsize == 4:
            lost &= ~(np.isnan(values.view(np.float32)) & np.isnan(kept.view(np.float32)))
        if lost.any():
            row = np.flatnonzero(lost.any(1))[0]
            example = f"{values[row]} and {kept[row]}"
            self.add("RACE: different values written at once", site, lost.any(1).sum(), example)

    def lines(self) -> list:
        return [
            f"{kind}: {site} x{n} {self.examples[kind, site]}"
            for (kind, site), n in sorted(self.found.items())
        ]


class Allocation:
    """One tensor's storage; ``fresh``: its bytes count as unwritten until a kernel writes them."""

    def __init__(self, base: int, data: np.ndarray, name: str, fresh: bool):
        self.base, self.data, self.name, self.size = base, data, name, data.size
        self.written = np.zeros(data.size, bool) if fresh else None
        self.views: dict[int, np.ndarray] = {}
        self.watch: RaceWatch | None = None  # of the launch that runs

    def view(self, size: int) -> np.ndarray:
        if size not in self.views:
            whole = self.size // size * size
            self.views[size] = self.data[:whole].view(UNSIGNED[size])
        return self.views[size]


class GlobalMemory:
    """Tensors' bytes at addresses far from each other; ``any_thread``: see RaceWatch."""

    def __init__(self, report: Report, any_thread: bool = False):
        self.report, self.regions, self.any_thread = report, {}, any_thread

    def add(self, data: np.ndarray, name: str, fresh: bool = False) -> int:
        number = len(self.regions) + 1
        self.regions[number] = Allocation((number << REGION) + (1 << 20), data, name, fresh)
        return self.regions[number].base

    def _by_allocation(self, addresses: np.ndarray):
        """Yield (allocation or None, indices into addresses or None for all)."""
        regions = addresses >> np.uint64(REGION)
        if (regions == regions[0]).all():
            yield self.regions.get(int(regions[0])), None
            return
        for number in np.unique(regions).tolist():
            yield self.regions.get(number), np.flatnonzero(regions == number)

    def _parts(self, addresses: np.ndarray, size: int, site: str, what: str):
        """Yield (allocation, indices into addresses or None for all, byte offsets).

        Accesses out of bounds are reported and left out.
        """
        if (bad := addresses % np.uint64(size)).any():
            self.report.add(f"misaligned global {what}", site, np.count_nonzero(bad))
        for allocation, chosen in self._by_allocation(addresses):
            part = addresses if chosen is None else addresses[chosen]
            if allocation is None:
                example = f"wild address {int(part[0]):#x}"
                self.report.add(f"global {what} OUT OF BOUNDS", site, part.size, example)
                continue
            offsets = part.astype(np.int64) - allocation.base
            bad = (offsets < 0) | (offsets + size > allocation.size)
            if bad.any():
                worst = int(offsets[bad][0])
                example = f"byte {worst} of {allocation.size} ({allocation.name})"
                count = np.count_nonzero(bad)
                self.report.add(f"global {what} OUT OF BOUNDS", site, count, example)
                good = np.flatnonzero(~bad)
                chosen = good if chosen is None else chosen[good]
                offsets = offsets[good]
            if offsets.size:
                yield allocation, chosen, offsets

    def begin_launch(self) -> None:
        """What launches do one after the other is no race."""
        for allocation in self.regions.values():
            allocation.watch = None

    def _is_watched(self, allocation: Allocation) -> bool:
        """Races are about what kernels write: new memory, and from its first store on any."""
        return allocation.written is not None or allocation.watch is not None

    def _watch(self, allocation: Allocation, who: Who | None, stores: bool) -> RaceWatch | None:
        if who is None or not (stores or self._is_watched(allocation)):
            return None
        if allocation.watch is None:
            allocation.watch = RaceWatch(allocation.size, self.report, self.any_thread)
        return allocation.watch

    def load(
        self,
        addresses: np.ndarray,
        unit: int,
        count: int,
        site: str,
        who: Who | None = None,
        read_only: bool = False,
    ) -> np.ndarray:
        """[threads, count] units of so many bytes; POISON where there is nothing.

        ``who`` reads, if races are looked for; ``read_only``: what nobody may write meanwhile.
        """
        out = np.empty((addresses.size, count), UNSIGNED[unit])
        out.view(np.uint8).fill(POISON)
        if not addresses.size:
            return out
        for allocation, chosen, offsets in self._parts(addresses, unit * count, site, "load"):
            if allocation.written is not None:
                bytes_ = offsets[:, None] + np.arange(unit * count)
                unknown = ~allocation.written[bytes_].all(1)
                if unknown.any():
                    n = np.count_nonzero(unknown)
                    self.report.add("global load of unwritten bytes", site, n, allocation.name)
            if watch := self._watch(allocation, who, False):
                reader = who if chosen is None else Who(*(column[chosen] for column in who))
                bytes_ = offsets[:, None] + np.arange(unit * count)
                watch.note_read(bytes_, reader, site, read_only)
            index = (offsets // unit)[:, None] + np.arange(count)
            out[slice(None) if chosen is None else chosen] = allocation.view(unit)[index]
        return out

    def store(
        self, addresses: np.ndarray, values: np.ndarray, site: str, who: Who | None = None
    ) -> None:
        """``values``: [threads, count] of an unsigned type; ``who`` writes, see :meth:`load`."""
        if not addresses.size:
            return
        unit, count = values.itemsize, values.shape[1]
        for allocation, chosen, offsets in self._parts(addresses, unit * count, site, "store"):
            part = values if chosen is None else values[chosen]
            bytes_ = offsets[:, None] + np.arange(unit * count)
            watch = self._watch(allocation, who, True)
            if watch:
                writer = who if chosen is None else Who(*(column[chosen] for column in who))
                new = np.ascontiguousarray(part).view(np.uint8).reshape(bytes_.shape)
                watch.note_write(bytes_, writer, allocation.data[bytes_] == new, site)
            index = (offsets // unit)[:, None] + np.arange(count)
            allocation.view(unit)[index] = part
            if watch:
                self.report.add_lost(part, allocation.view(unit)[index], site)
            if allocation.written is not None:
                allocation.written[bytes_] = True

    def sectors(self, addresses: np.ndarray, warps: np.ndarray) -> int:
        """Distinct 32-byte sectors, warp by warp (an aligned access lies in one)."""
        keys = (addresses >> np.uint64(5)) ^ (warps.astype(np.uint64) << np.uint64(56))
        return np.unique(keys).size


class SharedMemory:
    """Shared memory of several blocks, block after block; ``watch``: for races."""

    def __init__(self, size: int, threads: Threads, report: Report, watch: bool):
        self.size = -(-max(size, 1) // 16) * 16
        self.limit, self.threads, self.report = size, threads, report
        total = threads.epoch.size * self.size
        self.data = np.full(total, POISON, np.uint8)
        self.views = {unit: self.data.view(kind) for unit, kind in UNSIGNED.items()}
        self.written = np.zeros(total, bool)
        self.watch = RaceWatch(total, report) if watch else None

    def _places(self, addresses, threads, size: int, site: str, what: str):
        """Byte positions, and which threads are inside; what is outside is reported."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            n = np.count_nonzero(addresses % size)
            self.report.add(f"misaligned shared {what}", site, n)
        bad = (addresses < 0) | (addresses + size > self.limit)
        if bad.any():
            example = f"byte {int(addresses[bad][0])} of {self.limit}"
            self.report.add(f"shared {what} OUT OF BOUNDS", site, np.count_nonzero(bad), example)
            addresses = np.where(bad, 0, addresses)
        return self.threads.place[threads] * self.size + addresses, bad

    def load(self, addresses, threads, unit: int, count: int, site: str) -> np.ndarray:
        places, bad = self._places(addresses, threads, unit * count, site, "load")
        bytes_ = places[:, None] + np.arange(unit * count)
        unknown = ~self.written[bytes_].all(1)
        if unknown.any():
            n = np.count_nonzero(unknown)
            self.report.add("shared load of unwritten bytes", site, n)
        if self.watch:
            self.watch.note_read(bytes_, self.threads.who(threads), site)
        out = self.views[unit][(places // unit)[:, None] + np.arange(count)]
        if bad.any():
            out[bad] = ~out.dtype.type(0)
        return out

    def store(self, addresses, threads, values: np.ndarray, site: str) -> None:
        unit, count = values.itemsize, values.shape[1]
        places, bad = self._places(addresses, threads, unit * count, site, "store")
        if bad.any():
            places, threads, values = places[~bad], threads[~bad], values[~bad]
        bytes_ = places[:, None] + np.arange(unit * count)
        if self.watch:
            new = np.ascontiguousarray(values).view(np.uint8).reshape(bytes_.shape)
            same = self.data[bytes_] == new
            self.watch.note_write(bytes_, self.threads.who(threads), same, site)
        index = (places // unit)[:, None] + np.arange(count)
        self.views[unit][index] = values
        self.written[bytes_] = True
        if self.watch:
            self.report.add_lost(values, self.views[unit][index], site)

    def poison(self, addresses, threads, size: int, site: str) -> None:
        """What cp.async writes later: until then nobody may look."""
        values = np.full((addresses.size, size), POISON, np.uint8)
        places, bad = self._places(addresses, threads, size, site, "cp.async")
        bytes_ = places[~bad][:, None] + np.arange(size)
        if self.watch:
            same = np.False_
            self.watch.note_write(bytes_, self.threads.who(threads[~bad]), same, site)
        self.data[bytes_] = values[~bad]
        self.written[bytes_] = False

    def transactions(self, addresses, threads, size: int) -> int:
        """Cycles of the 32 banks: lanes that share a 4-byte word share its access."""
        lanes = {16: 8, 8: 16}.get(size, 32)  # wide accesses go by parts of a warp
        words = addresses.astype(np.int64)[:, None] // 4 + np.arange(max(1, size // 4))
        group = threads // lanes
        keys = np.unique(group[:, None] * (1 << 32) + words)
        bank_of_group = (keys >> 32) * 32 + (keys & 31)
        _, counts = np.unique(bank_of_group, return_counts=True)
        groups = np.unique(bank_of_group) // 32
        most = {}
        for g, c in zip(groups.tolist(), counts.tolist()):
            most[g] = max(most.get(g, 0), c)
        return sum(most.values())
