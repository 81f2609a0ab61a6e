"""What generated code calls of memory: loads, stores and asynchronous copies."""

import numpy as np

from .arithmetic import UNSIGNED, i8, u1, u4, u8

# The highest byte of generic addresses of shared and local memory.
WINDOWS = {"shared": 0x7E << 56, "local": 0x7D << 56}
SPACE_OF_WINDOW = {window >> 56: space for space, window in WINDOWS.items()}


class Accesses:
    """Of one machine. ``m`` is a mask of threads, or None for all; ``site`` a place in the source.

    Loads return [threads in m, count] units of so many bytes, or None where m holds nobody.
    """

    def __init__(self, machine):
        self.machine, self.memory, self.total = machine, machine.memory, machine.total
        self.counted = machine.counts.memory if machine.count else None
        self.everyone = np.arange(machine.total)
        self.warp = self.everyone // 32

    def _who(self, threads):
        """For memory to look for races."""
        return self.machine.now.who(threads) if self.machine.watch else None

    def chosen(self, m):
        return self.everyone if m is None else np.flatnonzero(m)

    def uniform(self, value):
        return np.full(self.total, value, u8)

    # ---- Parameters ----

    def param(self, offset: int, dtype):
        return np.frombuffer(self.machine.parameters, dtype, 1, offset)[0]

    def param_at(self, addresses, offset: int, dtype, m):
        size = np.dtype(dtype).itemsize
        threads = self.chosen(m)
        where = addresses[threads].astype(i8)[:, None] + offset + np.arange(size)
        whole = np.frombuffer(self.machine.parameters, u1)
        if threads.size and (where.min() < 0 or where.max() >= whole.size):
            name = self.machine.kernel.name
            self.machine.report.add("parameter load OUT OF BOUNDS", name, threads.size)
            where = np.clip(where, 0, whole.size - 1)
        out = np.zeros(self.total, dtype)
        out[threads] = np.ascontiguousarray(whole[where]).view(dtype)[:, 0]
        return out

    # ---- Counts ----

    def _note(self, space: str, addresses, threads, size: int, what: str) -> None:
        """Count requests, and the sectors or transactions that they take."""
        if self.counted is None:
            return
        kind = f"{space} {what}"
        self.counted[f"{kind}: requests"] += np.unique(self.warp[threads]).size
        if space == "local":
            return
        self.counted[f"{kind}: bytes"] += threads.size * size
        if space == "global":
            sectors = self.memory.sectors(addresses, self.warp[threads])
            self.counted[f"{kind}: sectors"] += sectors
        else:
            transactions = self.machine.shared.transactions(addresses, threads, size)
            self.counted[f"{kind}: transactions"] += transactions
            lanes = {16: 8, 8: 16}.get(size, 32)
            self.counted[f"{kind}: at least"] += np.unique(threads // lanes).size

    def _stack(self, values, unit: int, threads):
        """[threads, values] of unsigned units."""
        columns = []
        for value in values:
            value = np.asarray(value)
            bits = value.view(UNSIGNED[value.dtype.itemsize]).astype(UNSIGNED[unit])
            columns.append(np.broadcast_to(bits, self.total)[threads])
        return np.stack(columns, axis=1)

    # ---- Global, shared and local memory ----

    def load_global(self, addresses, unit: int, count: int, m, site: str, read_only=False):
        threads = self.chosen(m)
        if not threads.size:
            return None
        addresses = addresses[threads]
        self._note("global", addresses, threads, unit * count, "loads")
        return self.memory.load(addresses, unit, count, site, self._who(threads), read_only)

    def store_global(self, addresses, unit: int, values, m, site: str) -> None:
        threads = self.chosen(m)
        if threads.size:
            addresses = addresses[threads]
            self._note("global", addresses, threads, unit * len(values), "stores")
            values = self._stack(values, unit, threads)
            self.memory.store(addresses, values, site, self._who(threads))

    def load_shared(self, addresses, unit: int, count: int, m, site: str):
        threads = self.chosen(m)
        if not threads.size:
            return None
        addresses = addresses[threads]
        self._note("shared", addresses, threads, unit * count, "loads")
        return self.machine.shared.load(addresses, threads, unit, count, site)

    def store_shared(self, addresses, unit: int, values, m, site: str) -> None:
        threads = self.chosen(m)
        if threads.size:
            addresses = addresses[threads]
            self._note("shared", addresses, threads, unit * len(values), "stores")
            values = self._stack(values, unit, threads)
            self.machine.shared.store(addresses, threads, values, site)

    def load_local(self, addresses, unit: int, count: int, m, site: str):
        threads = self.chosen(m)
        if not threads.size:
            return None
        where = addresses[threads].astype(i8)[:, None] + np.arange(unit * count)
        self._note("local", None, threads, unit * count, "loads")
        return self.machine.local[threads[:, None], where].view(UNSIGNED[unit])

    def store_local(self, addresses, unit: int, values, m, site: str) -> None:
        threads = self.chosen(m)
        if not threads.size:
            return
        where = addresses[threads].astype(i8)[:, None] + np.arange(unit * len(values))
        self._note("local", None, threads, unit * len(values), "stores")
        bits = np.ascontiguousarray(self._stack(values, unit, threads)).view(u1)
        self.machine.local[threads[:, None], where] = bits.reshape(where.shape)

    # ---- Generic addresses ----

    def load_generic(self, addresses, unit: int, count: int, m, site: str):
        space = self._space_of(addresses, m)
        if space is None:
            return None
        load = getattr(self, f"load_{space}")
        return load(self.strip_window(addresses, space), unit, count, m, site)

    def store_generic(self, addresses, unit: int, values, m, site: str) -> None:
        space = self._space_of(addresses, m)
        if space is not None:
            store = getattr(self, f"store_{space}")
            store(self.strip_window(addresses, space), unit, values, m, site)

    @staticmethod
    def _space_of(addresses, m) -> str | None:
        windows = addresses >> u8(56)
        held = windows if m is None else windows[m]
        if not held.size:
            return None
        if (held != held[0]).any():
            raise RuntimeError("generic addresses of several spaces in one instruction")
        return SPACE_OF_WINDOW.get(int(held[0]), "global")

    @staticmethod
    def strip_window(addresses, space: str):
        return addresses - u8(WINDOWS[space]) if space in WINDOWS else addresses

    @staticmethod
    def add_window(addresses, space: str):
        return addresses + u8(WINDOWS[space]) if space in WINDOWS else addresses

    # ---- cp.async: nothing arrives before its group is waited for ----

    def async_copy(self, target, source, size: int, given, m, site: str) -> None:
        """Copy ``given`` bytes and fill with 0 up to ``size``."""
        threads = self.chosen(m)
        if not threads.size:
            return
        target, source = target[threads], source[threads]
        given = np.broadcast_to(given, self.total)[threads].astype(i8)
        self._note("global", source[given > 0], threads[given > 0], size, "loads")
        self._note("shared", target, threads, size, "stores")
        self.machine.shared.poison(target, threads, size, site)
        group = np.full(threads.size, -1)  # not committed yet
        self.machine.pending.append([threads, target, source, size, given, site, group])

    def async_commit(self, m) -> None:
        mask = np.ones(self.total, bool) if m is None else m
        for threads, *_, group in self.machine.pending:
            mine = mask[threads] & (group < 0)
            group[mine] = self.machine.committed[threads[mine]]
        self.machine.committed[mask] += 1

    def async_wait(self, newest: int, m) -> None:
        """Deliver all groups but for the newest so many."""
        mask = np.ones(self.total, bool) if m is None else m
        kept = []
        for record in self.machine.pending:
            threads, target, source, size, given, site, group = record
            oldest_kept = self.machine.committed[threads] - newest
            done = mask[threads] & (group >= 0) & (group < oldest_kept)
            for amount in np.unique(given[done]).tolist():
                part = done & (given == amount)
                data = np.zeros((np.count_nonzero(part), size), u1)
                if amount:
                    unit = amount if amount in (1, 2, 4, 8) else 8
                    who = self._who(threads[part])
                    loaded = self.memory.load(source[part], unit, amount // unit, site, who)
                    data[:, :amount] = loaded.view(u1)
                self.machine.shared.store(target[part], threads[part], data.view(u4), site)
            if not done.all():
                kept.append([x if i in (3, 5) else x[~done] for i, x in enumerate(record)])
        self.machine.pending = kept
