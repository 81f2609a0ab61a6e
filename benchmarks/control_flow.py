"""Basic blocks, dominators and natural loops of one function of SASS (see ``benchmarks.sass``)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.sass import Instruction


@dataclass(frozen=True)
class Block:
    """A basic block: instructions ``start`` to ``stop`` (exclusive) and where it goes on."""

    start: int
    stop: int
    successors: tuple[int, ...]  # indices of blocks


@dataclass
class Loop:
    """A natural loop: its header and every block that comes back to it without leaving.

    Blocks are given by index. Lists of instructions go to ``benchmarks.sass.Counts.of``.
    """

    flow: "ControlFlow" = field(repr=False)
    header: int
    latches: set[int]  # the blocks that jump back
    body: set[int]  # with the blocks of inner loops
    parent: "Loop | None" = field(default=None, repr=False)
    children: list["Loop"] = field(default_factory=list, repr=False)

    @property
    def address(self) -> int:
        return self.flow.instructions[self.flow.blocks[self.header].start].address

    @property
    def depth(self) -> int:
        """1 for an outermost loop."""
        return 1 if self.parent is None else self.parent.depth + 1

    @property
    def own(self) -> set[int]:
        """Blocks that are in no inner loop."""
        return self.body.difference(*(child.body for child in self.children))

    @property
    def conditional(self) -> set[int]:
        """Blocks that an iteration may pass by: those that do not dominate every latch."""
        return self.body - set.intersection(*(self.flow.dominators[b] for b in self.latches))

    def total(self) -> list["Instruction"]:
        """Every own instruction once, whichever way an iteration goes."""
        return self.flow.instructions_of(self.own)

    def straight(
        self, is_cold: Callable[[Sequence["Instruction"]], bool] | None = None
    ) -> list["Instruction"]:
        """What one iteration issues on the heaviest way from header to latch without cold blocks.

        Inner loops count nothing, but the way leads through them. A block is cold where an
        iteration may pass it by (see ``conditional``) and ``is_cold``, by default
        :func:`is_slow_path`, says so of its instructions.
        """
        is_cold = is_cold or is_slow_path
        cold = {b for b in self.conditional if is_cold(self.flow.instructions_of([b]))}
        return self.flow.instructions_of(self._heaviest_way(cold) & self.own)

    def _heaviest_way(self, avoid: set[int]) -> set[int]:
        blocks, own = self.flow.blocks, self.own
        order = [b for b in self.flow.order if b in self.body and b not in avoid]
        position = {b: i for i, b in enumerate(order)}
        weight = {b: blocks[b].stop - blocks[b].start if b in own else 0 for b in order}
        heaviest = {self.header: weight[self.header]}
        before: dict[int, int] = {}
        for b in order:
            if b not in heaviest:
                continue  # reached through avoided blocks only
            for s in blocks[b].successors:
                if position.get(s, -1) <= position[b]:
                    continue  # leaves the loop, is avoided, or goes back
                if heaviest.get(s, -1) < heaviest[b] + weight[s]:
                    heaviest[s], before[s] = heaviest[b] + weight[s], b
        ends = [b for b in self.latches if b in heaviest]
        b = max(ends, key=heaviest.__getitem__, default=None)
        way = set()
        while b is not None:
            way.add(b)
            b = before.get(b)
        return way


def is_slow_path(instructions: Sequence["Instruction"]) -> bool:
    """Whether a block that may be passed by looks like one that rarely runs.

    It calls a subroutine (the slow path of a division), holds MUFU.TANH (a guarded route), or
    gathers a warp whose lanes have parted (WARPSYNC.COLLECTIVE).
    """
    return any(
        i.name in ("MUFU.TANH", "CALL") or i.opcode.startswith("WARPSYNC.COLLECTIVE")
        for i in instructions
    )


class ControlFlow:
    """Where the instructions of one function may go.

    Subroutines that ptxas appends to the function are no part of it: only what is reached from its
    start by jumps. Jumps to an address in a register (a ``switch``) are not followed.
    """

    def __init__(self, instructions: Sequence["Instruction"]) -> None:
        self.instructions = instructions
        self.blocks = _basic_blocks(instructions)

    def instructions_of(self, blocks: Iterable[int]) -> list["Instruction"]:
        ranges = (self.blocks[b] for b in sorted(blocks))
        return [i for block in ranges for i in self.instructions[block.start : block.stop]]

    @cached_property
    def order(self) -> list[int]:
        """Reachable blocks in reverse postorder: each after its predecessors, but for loops."""
        postorder, seen, stack = [], {0}, [(0, iter(self.blocks[0].successors))]
        while stack:
            b, successors = stack[-1]
            for s in successors:
                if s not in seen:
                    seen.add(s)
                    stack.append((s, iter(self.blocks[s].successors)))
                    break
            else:
                postorder.append(b)
                stack.pop()
        return postorder[::-1]

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        result: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for s in self.blocks[b].successors:
                result[s].append(b)
        return result

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """For each reachable block those that every way to it passes, itself included."""
        result = {b: set(self.order) for b in self.order}
        result[0] = {0}
        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                found = {b} | set.intersection(*(result[p] for p in self.predecessors[b]))
                changed |= found != result[b]
                result[b] = found
        return result

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops by address, linked to the loops around them; a shared header makes one."""
        latches: dict[int, set[int]] = {}
        for b in self.order:
            for s in self.blocks[b].successors:
                if s in self.dominators[b]:
                    latches.setdefault(s, set()).add(b)
        loops = []
        for header, ends in sorted(latches.items()):
            body, todo = {header}, list(ends)
            while todo:
                b = todo.pop()
                if b not in body:
                    body.add(b)
                    todo += self.predecessors[b]
            loops.append(Loop(self, header, ends, body))
        for loop in loops:
            around = [o for o in loops if o is not loop and loop.header in o.body]
            around = [o for o in around if loop.body < o.body]
            if around:
                loop.parent = min(around, key=lambda o: len(o.body))
                loop.parent.children.append(loop)
        return loops


def _jump_kinds(instructions: Sequence["Instruction"]) -> dict[int, tuple[list[int], bool]]:
    """For the index of each instruction that ends a block: addresses it may jump to, falls on."""
    at = {i.address: n for n, i in enumerate(instructions)}
    barriers: dict[str, int] = {}  # convergence barrier -> where its threads meet
    ends = {}
    for n, i in enumerate(instructions):
        kind = i.opcode.split(".")[0]
        if kind == "BSSY" and i.target is not None:
            barriers[i.operands.split(",")[0]] = i.target
        elif kind in ("BRA", "JMP"):
            ends[n] = ([i.target], i.conditional)
        elif kind == "BSYNC" and (barrier := i.operands.split(",")[-1].strip()) in barriers:
            ends[n] = ([barriers[barrier]], i.conditional)
        elif kind in ("EXIT", "RET", "BRX", "JMX"):
            ends[n] = ([], bool(i.predicate))
        elif kind == "CALL":
            # ptxas also writes a far jump as CALL.REL.NOINC: such code never returns.
            comes_back = i.target not in at or _returns(instructions, at, at[i.target])
            ends[n] = ([], True) if comes_back else ([i.target], i.conditional)
    return {n: ([t for t in targets if t in at], falls) for n, (targets, falls) in ends.items()}


def _returns(instructions: Sequence["Instruction"], at: dict[int, int], start: int) -> bool:
    """Whether code from ``start`` on may reach RET."""
    seen, todo = set(), [start]
    while todo:
        n = todo.pop()
        while n < len(instructions) and n not in seen:
            seen.add(n)
            i, kind = instructions[n], instructions[n].opcode.split(".")[0]
            if kind == "RET":
                return True
            if kind in ("BRA", "JMP", "CALL") and i.target in at:
                todo.append(at[i.target])
            if kind in ("BRA", "JMP", "EXIT") and not i.conditional:
                break
            n += 1
    return False


def _basic_blocks(instructions: Sequence["Instruction"]) -> list[Block]:
    at = {i.address: n for n, i in enumerate(instructions)}
    ends = _jump_kinds(instructions)
    starts = {0} | {n + 1 for n in ends} | {at[t] for targets, _ in ends.values() for t in targets}
    starts = sorted(n for n in starts if n < len(instructions))
    index = {n: b for b, n in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(instructions)]):
        targets, falls = ends.get(stop - 1, ([], True))
        successors = [index[at[t]] for t in targets]
        if falls and stop in index:
            successors.append(index[stop])
        blocks.append(Block(start, stop, tuple(dict.fromkeys(successors))))
    return blocks
