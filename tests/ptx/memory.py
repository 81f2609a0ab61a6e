"""Global and shared memory of an executed launch, and what is checked of their accesses."""

import collections

import numpy as np

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
        self.views = {}

    def view(self, size: int) -> np.ndarray:
        if size not in self.views:
            whole = self.size // size * size
            self.views[size] = self.data[:whole].view(UNSIGNED[size])
        return self.views[size]


class GlobalMemory:
    """Tensors' bytes at addresses of their own, far from each other."""

    def __init__(self, report: Report):
        self.report, self.regions = report, {}

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

    def load(self, addresses: np.ndarray, unit: int, count: int, site: str) -> np.ndarray:
        """[threads, count] units of so many bytes; POISON where there is nothing."""
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
            index = (offsets // unit)[:, None] + np.arange(count)
            out[slice(None) if chosen is None else chosen] = allocation.view(unit)[index]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, site: str) -> None:
        """``values``: [threads, count] of an unsigned type."""
        if not addresses.size:
            return
        unit, count = values.itemsize, values.shape[1]
        for allocation, chosen, offsets in self._parts(addresses, unit * count, site, "store"):
            index = (offsets // unit)[:, None] + np.arange(count)
            allocation.view(unit)[index] = values if chosen is None else values[chosen]
            if allocation.written is not None:
                allocation.written[offsets[:, None] + np.arange(unit * count)] = True

    def sectors(self, addresses: np.ndarray, warps: np.ndarray) -> int:
        """Distinct 32-byte sectors, warp by warp (an aligned access lies in one)."""
        keys = (addresses >> np.uint64(5)) ^ (warps.astype(np.uint64) << np.uint64(56))
        return np.unique(keys).size


class SharedMemory:
    """Shared memory of several blocks, block after block.

    Watching for races: each byte knows since which barrier (epoch) and by whom it was written and
    read. Between two barriers no byte may be written by one warp and read or written by another.
    """

    def __init__(self, blocks: int, size: int, threads: int, report: Report, watch: bool):
        self.size = -(-max(size, 1) // 16) * 16
        self.limit, self.report, self.watch = size, report, watch
        self.data = np.full(blocks * self.size, POISON, np.uint8)
        self.views = {unit: self.data.view(kind) for unit, kind in UNSIGNED.items()}
        total = blocks * self.size
        self.written = np.zeros(total, bool)
        self.epoch = np.zeros(blocks, np.int32)  # barriers passed
        thread = np.arange(blocks * threads)
        self.block_of = thread // threads
        self.warp_of = (thread % threads // 32).astype(np.int32)
        self.lane_of = (thread % 32).astype(np.int32)
        self.synced = np.zeros(-(-thread.size // 32), np.int32)  # a warp's own synchronisations
        if watch:
            self.write_epoch = np.full(total, -1, np.int32)
            self.write_warp = np.full(total, -1, np.int32)
            self.write_lane = np.full(total, -1, np.int32)
            self.write_sync = np.full(total, -1, np.int32)
            self.read_epoch = np.full(total, -1, np.int32)
            self.read_warps = np.zeros(total, np.uint32)

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
        return self.block_of[threads] * self.size + addresses, bad

    def load(self, addresses, threads, unit: int, count: int, site: str) -> np.ndarray:
        places, bad = self._places(addresses, threads, unit * count, site, "load")
        bytes_ = places[:, None] + np.arange(unit * count)
        unknown = ~self.written[bytes_].all(1)
        if unknown.any():
            n = np.count_nonzero(unknown)
            self.report.add("shared load of unwritten bytes", site, n)
        if self.watch:
            self._note_read(bytes_, threads, site)
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
            self._note_write(bytes_, threads, new, site)
        self.views[unit][(places // unit)[:, None] + np.arange(count)] = values
        self.written[bytes_] = True
        if self.watch and (lost := self.data[bytes_] != new).any():
            # Copies of one value are stored by several threads, which is fine.
            self.report.add("RACE: different values written at once", site, lost.any(1).sum())

    def poison(self, addresses, threads, size: int, site: str) -> None:
        """What cp.async writes later: until then nobody may look."""
        values = np.full((addresses.size, size), POISON, np.uint8)
        places, bad = self._places(addresses, threads, size, site, "cp.async")
        bytes_ = places[~bad][:, None] + np.arange(size)
        if self.watch:
            self._note_write(bytes_, threads[~bad], None, site)
        self.data[bytes_] = values[~bad]
        self.written[bytes_] = False

    # ---- Races: two warps at one byte between two barriers, one of them writing ----

    def _note_read(self, bytes_, threads, site: str) -> None:
        epoch = self.epoch[self.block_of[threads]][:, None]
        warp, lane = self.warp_of[threads][:, None], self.lane_of[threads][:, None]
        fresh = self.write_epoch[bytes_] == epoch
        if fresh.any():
            other = fresh & (self.write_warp[bytes_] != warp)
            if other.any():
                self.report.add("RACE: read of another warp's write", site, other.any(1).sum())
            synced = self.synced[threads // 32][:, None]
            unsynced = (self.write_sync[bytes_] == synced) & (self.write_lane[bytes_] != lane)
            unsynced &= fresh & ~other
            if unsynced.any():
                self.report.add("intra-warp read after write", site, unsynced.any(1).sum())
        old = self.read_epoch[bytes_] != epoch
        self.read_warps[bytes_[old]] = 0
        self.read_epoch[bytes_] = epoch
        for number in np.unique(warp):
            self.read_warps[bytes_[warp[:, 0] == number]] |= np.uint32(1 << number)

    def _note_write(self, bytes_, threads, new, site: str) -> None:
        epoch = self.epoch[self.block_of[threads]][:, None]
        warp, lane = self.warp_of[threads][:, None], self.lane_of[threads][:, None]
        same = False if new is None else self.data[bytes_] == new
        other = (self.write_epoch[bytes_] == epoch) & (self.write_warp[bytes_] != warp)
        if other.any():
            kind = "RACE: two warps write" if (other & ~same).any() else "two warps write the same"
            self.report.add(kind, site, other.any(1).sum())
        mine = np.uint32(1) << warp.astype(np.uint32)
        read = (self.read_epoch[bytes_] == epoch) & ((self.read_warps[bytes_] & ~mine) != 0)
        if read.any():
            self.report.add("RACE: write to what another warp reads", site, read.any(1).sum())
        shape = bytes_.shape
        self.write_epoch[bytes_] = np.broadcast_to(epoch, shape)
        self.write_warp[bytes_] = np.broadcast_to(warp, shape)
        self.write_lane[bytes_] = np.broadcast_to(lane, shape)
        self.write_sync[bytes_] = np.broadcast_to(self.synced[threads // 32][:, None], shape)

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
