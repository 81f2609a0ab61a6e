"""Executes a program over a grid, several blocks at a time, all their threads in NumPy rows.

Every thread has its next piece of code. Those furthest behind run first (least piece number), which
brings diverged threads together again where their ways meet. A thread at a barrier waits until all
living threads of its block do.
"""

import numpy as np

from . import arithmetic
from .accesses import Accesses
from .memory import GlobalMemory, Report, SharedMemory
from .operands import DTYPE, VIEW
from .parser import Unsupported
from .program import DONE, Counts, Piece, Program
from .warps import Warps

UFUNCS = (
    "add subtract multiply divide negative absolute minimum maximum fmin fmax where isnan invert "
    "equal not_equal less less_equal greater greater_equal bitwise_and bitwise_or bitwise_xor "
    "logical_and logical_or logical_xor logical_not asarray copysign"
).split()


class Deadlock(Exception):
    """Threads that cannot go on."""


class Machine:
    """One launch of a program.

    Args:
        grid, block: x, y and z.
        dynamic_shared: bytes.
        watch_races: look for races in shared memory.
        count: note sectors and transactions of accesses to memory, which takes time.
        noise: approximate instructions err as they may.
        order: a seed of the order in which blocks run, and the warps of a block from barrier to
            barrier, one after the other; None: in lockstep.
        threads_at_once: how many, in whole blocks, run together.
        uniform: report threads of a block that branch apart.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        memory: GlobalMemory,
        dynamic_shared: int,
        report: Report,
        watch_races: bool = True,
        count: bool = False,
        noise: bool = False,
        order: int | None = None,
        threads_at_once: int = 512,
        uniform: bool = False,
    ):
        self.program, self.kernel = program, program.kernel
        self.grid, self.block = grid, block
        self.parameters, self.memory, self.report = parameters, memory, report
        self.threads = block[0] * block[1] * block[2]
        if self.threads % 32:
            raise Unsupported(f"{self.threads} threads")
        static = self.kernel.shared_bytes
        if dynamic_shared and static:
            static = -(-static // 16) * 16
        self.shared_bytes = static + dynamic_shared
        self.watch, self.count, self.noise, self.uniform = watch_races, count, noise, uniform
        self.counts = Counts(len(program.pieces))
        blocks = np.arange(grid[0] * grid[1] * grid[2])
        self.random = None if order is None else np.random.default_rng(order)
        if self.random is not None:
            self.random.shuffle(blocks)
        at_once = max(1, threads_at_once // self.threads)
        self.batches = [blocks[i : i + at_once] for i in range(0, len(blocks), at_once)]

    def run(self) -> Counts:
        with np.errstate(all="ignore"):
            held = 0
            for batch in self.batches:
                if len(batch) != held:
                    self._allocate(len(batch))
                    held = len(batch)
                self._reset(batch)
                if self.random is None:
                    self._run_in_lockstep()
                else:
                    self._run_warp_by_warp()
        return self.counts

    # ---- Registers and memory of some blocks ----

    def _allocate(self, blocks: int) -> None:
        threads, counts = blocks * self.threads, self.program.codegen.counts
        self.total = threads
        self.files = {
            "16": np.empty((counts["16"], threads), np.uint16),
            "32": np.empty((counts["32"], threads), np.uint32),
            "64": np.empty((counts["64"], threads), np.uint64),
            "pred": np.empty((counts["pred"], threads), np.bool_),
        }
        self.namespace = self._functions() | {
            "P": list(self.files["pred"]),
            "K": self.program.codegen.constants,
            "TMP_F": np.empty(threads, np.float32),
        }
        for kind, letter in VIEW.items():
            if kind != "pred":
                self.namespace[letter] = list(self.files[kind[1:]].view(DTYPE[kind]))
            self.namespace[f"TRASH_{letter}"] = np.empty(threads, DTYPE[kind])
        for piece in self.program.pieces:
            piece.full = piece.masked = None

    def _functions(self) -> dict:
        """What generated code calls, by name."""
        found = {name: getattr(np, name) for name in UFUNCS}
        found |= {f"D_{name}": dtype for name, dtype in DTYPE.items()}
        accesses = Accesses(self)
        owners = (accesses, Warps(self, accesses), arithmetic.Approximate(self.noise), arithmetic)
        for owner in owners:
            names = [name for name in dir(owner) if not name.startswith("_")]
            found |= {n: getattr(owner, n) for n in names if callable(getattr(owner, n))}
        return found

    def _reset(self, batch: np.ndarray) -> None:
        for name, file in self.files.items():
            file.view(np.uint8).fill(0 if name == "pred" else 0xFF)
        blocks = len(batch)
        thread = np.tile(np.arange(self.threads), blocks)
        bx, by, _ = self.block
        gx, gy, _ = self.grid
        number = np.repeat(batch, self.threads)
        special = {
            "TIDX": thread % bx, "TIDY": thread // bx % by, "TIDZ": thread // (bx * by),
            "CTAIDX": number % gx, "CTAIDY": number // gx % gy, "CTAIDZ": number // (gx * gy),
            "LANEID": thread % 32, "WARPID": thread // 32,
        }  # fmt: skip
        for axis, b, g in zip("XYZ", self.block, self.grid):
            special[f"NTID{axis}"] = thread * 0 + b
            special[f"NCTAID{axis}"] = thread * 0 + g
        self.namespace.update({k: v.astype(np.uint32) for k, v in special.items()})
        self.namespace["WARPSZ"] = np.uint32(32)
        self.shared = SharedMemory(blocks, self.shared_bytes, self.threads, self.report, self.watch)
        local = max(16, -(-self.kernel.local_bytes // 16) * 16)
        self.local = np.full((self.total, local), 0xFF, np.uint8)
        self.pending, self.committed = [], np.zeros(self.total, np.int32)  # copies, groups of them

    # ---- Control flow ----

    def _piece(self, number: int, mask) -> Piece:
        """Run the straight code of a piece for the threads of a mask, or all."""
        piece, form = self.program.pieces[number], "full" if mask is None else "masked"
        warps = self.total // 32
        if mask is not None:
            warps = np.count_nonzero(mask.reshape(-1, 32).any(1))
        self.counts.warps[number] += warps
        if getattr(piece, form) is None:
            function = self.program.function(number, mask is not None, self.namespace)
            setattr(piece, form, function)
        getattr(piece, form)(mask)
        return piece

    def _run_in_lockstep(self) -> None:
        """All threads together, as long as they agree."""
        at, last = 0, len(self.program.pieces)
        while at < last:
            piece = self._piece(at, None)
            kind, target, pred, negated = piece.last or (None, None, None, None)
            at += 1
            if kind == "bar":
                self._pass_barrier(np.ones(self.total, bool))
            elif kind is not None:
                taken = self._taken(piece, None)
                if taken.all():
                    if kind == "trap":
                        raise Deadlock("trap")
                    at = target
                elif taken.any():
                    at = self._run_apart(np.where(taken, target, at))

    def _run_apart(self, pc, until_together: bool = True, rank=None) -> int:
        """Run threads whose next pieces ``pc`` differ until all have the same, which is returned.

        Args:
            until_together: False: until all have ended.
            rank: of each thread; those of the least that can go on run alone.
        """
        last = len(self.program.pieces)
        waiting = np.zeros(self.total, bool)
        while not (until_together and not waiting.any() and (pc == pc[0]).all()):
            ready = ~waiting & (pc < last)
            if not ready.any():
                if not waiting.any():
                    return DONE
                self._release(pc, waiting, last)
                continue
            if rank is not None:
                ready &= rank == rank[ready].min()
            at = int(pc[ready].min())
            mask = ready & (pc == at)
            piece = self._piece(at, mask)
            pc[mask] = at + 1
            if piece.last is None:
                continue
            kind, target, *_ = piece.last
            if kind == "bar":
                waiting |= mask
                continue
            taken = self._taken(piece, mask)
            if kind == "trap" and taken.any():
                raise Deadlock("trap")
            pc[taken] = target
        return int(pc[0])

    def _run_warp_by_warp(self) -> None:
        """From barrier to barrier each warp alone, in an order of chance."""
        warps = self.random.permutation(self.total // 32)
        self._run_apart(np.zeros(self.total, np.int64), False, np.repeat(warps, 32))

    def _taken(self, piece: Piece, mask):
        """Which threads of the mask branch at the end of a piece."""
        _, _, pred, negated = piece.last
        if pred is None:
            return np.ones(self.total, bool) if mask is None else mask.copy()
        held = self.namespace["P"][pred]
        taken = ~held if negated else held.copy()
        if mask is not None:
            taken &= mask
        if self.uniform:
            self._check_uniform(piece, taken, mask)
        return taken

    def _check_uniform(self, piece: Piece, taken, mask) -> None:
        taken = taken.reshape(-1, self.threads)
        others = ~taken if mask is None else mask.reshape(-1, self.threads) & ~taken
        if (mixed := taken.any(1) & others.any(1)).any():
            instr = self.kernel.code[piece.end - 1]
            site = f"{instr.where} [ptx {instr.line}]"
            self.report.add("threads of a block branch apart", site, np.count_nonzero(mixed))

    def _release(self, pc, waiting, last: int) -> None:
        """Let those blocks go on whose living threads are all at the barrier."""
        living = (pc < last).reshape(-1, self.threads)
        complete = (waiting.reshape(-1, self.threads) == living).all(1) & living.any(1)
        if not complete.any():
            raise Deadlock("threads wait at a barrier that others never reach")
        for block in np.flatnonzero(complete):
            part = slice(block * self.threads, (block + 1) * self.threads)
            places = np.unique(pc[part][waiting[part]])
            if places.size > 1:
                kind, name = "barrier reached from different places", self.kernel.name
                self.report.add(kind, name, 1, str(places))
        released = np.repeat(complete, self.threads)
        self._pass_barrier(released)
        waiting &= ~released

    def _pass_barrier(self, threads) -> None:
        self.shared.epoch[threads.reshape(-1, self.threads).any(1)] += 1
        self.shared.synced[threads.reshape(-1, 32).any(1)] += 1
