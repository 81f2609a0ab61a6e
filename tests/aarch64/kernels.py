"""The CPU kernels without PyTorch, on this machine and on an emulated aarch64.

    python tests/aarch64/kernels.py

csrc/cpu is compiled together with check.cpp, which compares with plain loops; `include/` stands in
for the one header of PyTorch that it needs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def missing(*programs: str) -> str:
    """A line that says which of them are not there and how to get them, or nothing."""
    absent = [program for program in programs if not shutil.which(program)]
    packages = "apt-get install g++-aarch64-linux-gnu qemu-user"
    return f"not run, without {', '.join(absent)}: {packages}" if absent else ""


def build(compiler: str, folder: Path, *options: str, sources: Path = SOURCES) -> Path:
    """The program. Each file is compiled by itself: some may use AVX-512, others must not."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-pthread"]
    flags += [f"-I{HERE / 'include'}", f"-I{sources}", *options]
    objects = []
    for source in [*sorted(sources.glob("cpu/*.cpp")), HERE / "check.cpp"]:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([compiler, *flags, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "check"
    subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True)
    return program


def outcome(isa: str, *command: object) -> str:
    """The last line that the program prints; those before name what failed, and are printed."""
    environment = {**os.environ, "ATTN_EXT_CPU_ISA": isa}
    done = subprocess.run([*map(str, command)], env=environment, text=True, capture_output=True)
    *details, last = done.stdout.strip().splitlines() or [f"failed: status {done.returncode}"]
    print(*details, sep="\n", end="\n" if details else "", flush=True)
    if "names no instruction set of this machine" in last:
        return "this CPU has none"
    return last.removeprefix(f"{isa}: ")


def native(folder: Path, isas: Sequence[str]) -> list[str]:
    """With each instruction set of this machine."""
    try:
        program = build(os.environ.get("CXX", "c++"), folder / "native")
    except (OSError, subprocess.CalledProcessError) as error:
        return [f"failed to compile: {error}"] * len(isas)
    return [outcome(isa, program) for isa in isas]


def emulated(folder: Path) -> str:
    """With the portable kernels, the only ones that aarch64 has."""
    absent = missing(COMPILER, EMULATOR)
    if absent:
        return absent
    try:
        # Linked statically, the program needs no libraries of aarch64 on this machine.
        program = build(COMPILER, folder / "aarch64", "-static")
    except subprocess.CalledProcessError as error:
        return f"failed to compile: {error}"
    return outcome("portable", EMULATOR, program)


if __name__ == "__main__":
    folder = ROOT / "build" / "aarch64"
    here, there = native(folder, ["portable"])[0], emulated(folder)
    print(f"here: {here}\naarch64: {there}")
    sys.exit("failed" in here + there)
