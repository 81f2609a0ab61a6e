"""What generated code calls of warps: exchanges between lanes, and products of matrices.

mma and wgmma sum exactly in float64 before the addend.
"""

import numpy as np

from .arithmetic import f4, f8, from_bf16, i8, put, u2, u4, u8

REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip

# Fragments of m16n8k16: row and column by [lane, register, half], of C by [lane, register].
_GROUP, _QUAD = np.arange(32) >> 2, np.arange(32) & 3
_REGISTER, _HALF = np.arange(4), np.arange(2)
A_ROW = _GROUP[:, None, None] + 8 * (_REGISTER & 1)[None, :, None] + 0 * _HALF
A_COLUMN = 2 * _QUAD[:, None, None] + 8 * (_REGISTER >> 1)[None, :, None] + _HALF
B_ROW = 2 * _QUAD[:, None, None] + 8 * np.arange(2)[None, :, None] + _HALF
B_COLUMN = _GROUP[:, None, None] + 0 * B_ROW
C_ROW = _GROUP[:, None] + 8 * (_REGISTER >> 1)
C_COLUMN = 2 * _QUAD[:, None] + (_REGISTER & 1)


def shuffle_sources(mode: str, lane, b, clamp):
    """(lane that each lane reads, whether it is in range), as the PTX manual has it."""
    b, clamp = np.asarray(b).astype(i8) & 31, np.asarray(clamp).astype(i8)
    segment, limit = clamp >> 8 & 31, clamp & 31
    least, most = lane & segment, (lane & segment) | (limit & ~segment)
    if mode == "up":
        source = lane - b
        return source, source >= most
    source = {"down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
    return source, source <= most


def matrix_addresses(descriptor, columns: int, n_major: bool):
    """[16, columns] elements' addresses of the matrix B that a wgmma descriptor describes."""
    start, leading, stride = (
        int(descriptor >> u8(bit) & u8(0x3FFF)) << 4 for bit in (0, 16, 32)
    )  # fmt: skip
    if int(descriptor >> u8(62)) != 1:
        raise RuntimeError("only the 128-byte swizzle is understood")
    k, n = np.arange(16)[:, None], np.arange(columns)[None, :]
    if n_major:  # columns of one row next to each other
        place = k // 8 * stride + k % 8 * 128 + n // 64 * leading + n % 64 * 2
    else:
        place = n // 8 * stride + n % 8 * 128 + k * 2
    place = place + start
    return place ^ (place >> 7 & 7) << 4


def fragments(kind: str, registers):
    """[warp, lane, register, half] in float64."""
    bits = np.stack([r.reshape(-1, 32) for r in registers], axis=2)[..., None].view(u2)
    return as_floats(kind, bits).astype(f8)


def as_floats(kind: str, bits):
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16)


class Warps:
    """Of one machine; arguments as those of :class:`~.accesses.Accesses`."""

    def __init__(self, machine, accesses):
        self.machine, self.total, self.counted = machine, machine.total, accesses.counted
        self.lane = np.arange(machine.total) % 32
        self.first_lane = np.arange(machine.total) - self.lane

    def synchronise(self, m) -> None:
        """Lanes see what others of their warp wrote before."""
        synced = self.machine.now.synced
        synced[slice(None) if m is None else m.reshape(-1, 32).any(1)] += 1

    def shuffle(self, mode: str, target, flag, value, b, clamp, members, m, site: str) -> None:
        self.synchronise(m)
        source, inside = shuffle_sources(mode, self.lane, b, clamp)
        source = self.first_lane + np.where(inside, source, self.lane)
        if m is not None:
            members = np.broadcast_to(members, self.total).astype(u8)
            wanted = (members >> self.lane.astype(u8) & u8(1)).reshape(-1, 32) == 1
            whole = m.reshape(-1, 32)
            missing = whole.any(1)[:, None] & wanted & ~whole
            if missing.any():
                count = missing.any(1).sum()
                self.machine.report.add("shfl without all its members", site, count)
        put(target, np.broadcast_to(value, self.total)[source], m)
        if flag is not None:
            put(flag, inside, m)

    def vote(self, mode: str, target, held, m) -> None:
        self.synchronise(m)
        rows = (held if m is None else held & m).reshape(-1, 32)
        if mode == "ballot":
            bits = (rows.astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4)
            put(target, np.repeat(bits, 32), m)
        elif mode == "any":
            put(target, np.repeat(rows.any(1), 32), m)
        elif mode == "all":
            rows = rows if m is None else rows | ~m.reshape(-1, 32)
            put(target, np.repeat(rows.all(1), 32), m)
        else:
            raise RuntimeError(f"vote.{mode}")

    def active_mask(self, target, m) -> None:
        self.vote("ballot", target, np.ones(self.total, bool), m)

    def redux(self, mode: str, target, value, m) -> None:
        self.synchronise(m)
        self._whole_warps(m)
        result = REDUCTIONS[mode].reduce(value.reshape(-1, 32), axis=1)
        put(target, np.repeat(result, 32), m)

    def _whole_warps(self, m):
        """The numbers of the warps in m, of which none may be there in part."""
        if m is None:
            return np.arange(self.total // 32)
        rows = m.reshape(-1, 32)
        if (rows.any(1) != rows.all(1)).any():
            raise RuntimeError("an instruction of whole warps in a part of one")
        return np.flatnonzero(rows.all(1))

    # ---- Matrices ----

    def _matrix_rows(self, addresses, warps, count: int, what: str):
        """Thread and address of each of 8 rows of each matrix."""
        threads = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        rows = addresses[threads]
        if self.counted is not None:
            transactions = self.machine.shared.transactions(rows, threads, 16)
            self.counted[f"shared {what}: requests"] += warps.size
            self.counted[f"shared {what}: bytes"] += rows.size * 16
            self.counted[f"shared {what}: transactions"] += transactions
            self.counted[f"shared {what}: at least"] += warps.size * count
        return threads, rows

    def load_matrix(self, targets, addresses, count: int, transposed: bool, m, site: str) -> None:
        self.synchronise(m)
        warps = self._whole_warps(m)
        if not warps.size:
            return
        threads, rows = self._matrix_rows(addresses, warps, count, "loads")
        data = self.machine.shared.load(rows, threads, 2, 8, site).reshape(-1, count, 8, 8)
        if transposed:
            data = data.swapaxes(2, 3)
        pairs = np.ascontiguousarray(data).reshape(-1, count, 32, 2).view(u4)[..., 0]
        for n, target in enumerate(targets):
            target.reshape(-1, 32)[warps] = pairs[:, n]

    def store_matrix(self, addresses, values, count: int, transposed: bool, m, site: str) -> None:
        self.synchronise(m)
        warps = self._whole_warps(m)
        if not warps.size:
            return
        threads, rows = self._matrix_rows(addresses, warps, count, "stores")
        pairs = np.stack([v.reshape(-1, 32)[warps] for v in values], axis=1)
        data = np.ascontiguousarray(pairs)[..., None].view(u2).reshape(-1, count, 8, 8)
        if transposed:
            data = data.swapaxes(2, 3)
        data = np.ascontiguousarray(data).reshape(-1, 8)
        self.machine.shared.store(rows, threads, data, site)

    def mma(self, kind: str, targets, a, b, c, m) -> None:
        """m16n8k16, or with half as many registers of a and b m16n8k8."""
        self.synchronise(m)
        self._whole_warps(m)
        left = np.zeros((self.total // 32, 16, 16))
        right = np.zeros((self.total // 32, 16, 8))
        left[:, A_ROW[:, : len(a)], A_COLUMN[:, : len(a)]] = fragments(kind, a)
        right[:, B_ROW[:, : len(b)], B_COLUMN[:, : len(b)]] = fragments(kind, b)
        product = (left @ right)[:, C_ROW, C_COLUMN]  # [warp, lane, 4]
        for n, (target, addend) in enumerate(zip(targets, c)):
            value = product[:, :, n].reshape(-1) + np.broadcast_to(addend, self.total)
            put(target, value.astype(f4), m)

    def wgmma(
        self, columns: int, kind: str, targets, a, descriptors, adds, sign, n_major, m, site
    ) -> None:
        """``targets = sign a @ b`` (+ targets if ``adds``), at once, whatever waits for it.

        Args:
            a: registers of [64, 16] of four warps.
            descriptors: of b [16, columns] in shared memory.
        """
        active = np.ones(self.total, bool) if m is None else m
        groups = active.reshape(-1, 128)
        if (groups.any(1) != groups.all(1)).any():
            raise RuntimeError("wgmma in a part of a warp group")
        left = np.zeros((self.total // 32, 16, 16))
        left[:, A_ROW, A_COLUMN] = fragments(kind, a)
        for warp in np.flatnonzero(active[::32]).tolist():
            first = warp * 32
            places = matrix_addresses(descriptors[first], columns, n_major).reshape(-1)
            threads = np.full(places.size, first)
            bits = self.machine.shared.load(places, threads, 2, 1, site).reshape(16, columns)
            if self.counted is not None:
                self.counted["wgmma shared bytes"] += 2 * places.size
            product = left[warp] @ as_floats(kind, bits).astype(f8) * sign
            keep = adds[first] if isinstance(adds, np.ndarray) else adds
            part = slice(first, first + 32)
            for number, target in enumerate(targets):
                column = number // 4 * 8 + C_COLUMN[:, number % 4]
                value = product[C_ROW[:, number % 4], column]
                target[part] = (value + (target[part].astype(f8) if keep else 0)).astype(f4)
