"""Runs ``backend="triton"`` on CPU tensors: each launch is compiled, and its PTX executed.

with triton_execution(session := TritonSession("sm_90")):
    attn_ext.additive_attention(..., backend="triton")
print(session.report.lines())
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

# Compiled, not interpreted: to be settled before a kernel is imported.
os.environ["TRITON_INTERPRET"] = "0"

from benchmarks import static, static_cases

from .backend import on_cpu_tensors
from .machine import Machine
from .memory import GlobalMemory, Report
from .parser import parse
from .program import Program

SCALARS = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's whole storage as uint8."""
    storage = tensor.detach().untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


class TritonSession:
    """Compiles and executes launches; holds memory, findings and counts.

    Args:
        target: "sm_80" or "sm_90".
        processors: of the GPU that launchers plan for.
        options: of :class:`~.machine.Machine`.
    """

    def __init__(self, target: str = "sm_90", processors: int = 132, **options):
        self.target, self.processors, self.options = target, processors, options
        self.report = Report()
        self.programs: dict[str, Program] = {}  # by their PTX
        self.transform = lambda kernel, ptx: ptx  # damages PTX, in tests of the executor
        self.launches: list[tuple] = []  # (case, grid, program, counts, compiled)
        self.forget()

    def forget(self) -> None:
        """Between calls: where tensors are."""
        self.memory = GlobalMemory(self.report, any_thread=True)
        self.bases: dict[int, int] = {}  # address of a storage -> address in the executor
        self.fresh: set[int] = set()  # storages whose bytes only kernels write
        self.kept: list[torch.Tensor] = []  # so that no other tensor gets their place

    def note_fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """Outputs and workspaces: NaN, and unwritten."""
        if tensor.untyped_storage().nbytes():
            bytes_of(tensor).fill(0xFF)
            self.fresh.add(tensor.untyped_storage().data_ptr())
            self.kept.append(tensor)
        return tensor

    def address(self, tensor: torch.Tensor, name: str) -> int:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if storage.nbytes() == 0:
            return 0
        if place not in self.bases:
            self.kept.append(tensor)
            self.bases[place] = self.memory.add(bytes_of(tensor), name, place in self.fresh)
        return self.bases[place] + tensor.storage_offset() * tensor.element_size()

    def launch(self, kernel, grid, arguments: dict, num_warps: int, maxnreg: int | None) -> None:
        note = (kernel, arguments, num_warps, maxnreg)
        case = static_cases.make_case(note, "all", "", "", 0)
        values = {
            leaf.path: self.address(leaf.value, f"{leaf.name} of {case.name}")
            if isinstance(leaf.value, torch.Tensor)
            else leaf.value
            for leaf in static.leaves({name: arguments[name] for name in case.signature})
        }
        names = list(case.signature)
        aligned = {
            key
            for key in case.aligned
            if values[(names.index(key),) if isinstance(key, str) else key] % 16 == 0
        }
        case = dataclasses.replace(case, aligned=aligned)
        compiled = static.compile_case(case, self.target)
        ptx = self.transform(case.name, compiled.asm["ptx"])
        if ptx not in self.programs:
            self.programs[ptx] = Program(parse(ptx))
        program = self.programs[ptx]
        threads = 32 * num_warps
        assert program.kernel.threads in (None, (threads, 1, 1)), program.kernel.threads
        grid = tuple(grid) + (1,) * (3 - len(grid))
        machine = Machine(
            program,
            grid,
            (threads, 1, 1),
            self._parameters(case, program, values),
            self.memory,
            compiled.metadata.shared,
            self.report,
            uniform=True,  # all branches of Triton are those of a whole program
            **self.options,
        )
        self.launches.append((case, grid, program, machine.run(), compiled))

    @staticmethod
    def _parameters(case, program: Program, values: dict) -> bytes:
        """Parameter space; Triton adds scratch memory that these kernels do not use."""
        data = bytearray(program.kernel.param_bytes)
        given = [leaf for leaf in static.leaves(case.signature) if leaf.value != "constexpr"]
        for leaf, (offset, size) in zip(given, program.kernel.params.values()):
            scalar = SCALARS.get(leaf.value, np.uint64)  # else a pointer
            part = scalar(values[leaf.path]).tobytes()
            assert len(part) == size, (leaf, size)
            data[offset : offset + size] = part
        return bytes(data)


class _Kernel:
    """Stands in for a Triton kernel."""

    def __init__(self, kernel, session: TritonSession):
        self.kernel, self.session = kernel, session

    def __getitem__(self, grid: tuple):
        def launch(*arguments, num_warps: int, maxnreg: int | None = None, **constants):
            values = dict(zip(self.kernel.arg_names, arguments)) | constants
            self.session.launch(self.kernel, grid, values, num_warps, maxnreg)

        return launch


@contextlib.contextmanager
def triton_execution(session: TritonSession) -> Iterator[TritonSession]:
    """Backend "triton" on CPU tensors, by the session."""

    def noted(new):
        return lambda *args, **kwargs: session.note_fresh(new(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        stack.enter_context(on_cpu_tensors("triton"))
        for owner, name in (torch.Tensor, "new_empty"), (torch, "empty_like"):
            new = noted(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, new))
        for module in static_cases.MODULES:
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                kernel = _Kernel(getattr(module, name), session)
                stack.enter_context(mock.patch.object(module, name, kernel))
            facts = {
                "uses_ptx": lambda tensor: True,
                "processors": lambda tensor: session.processors,
            }
            for name in facts.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, facts[name]))
        yield session
