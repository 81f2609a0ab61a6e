"""Build what is released and try it in new environments: `make dist`.

dist/ gets an archive of the sources and, built from it, a wheel for manylinux_2_28 and every
Python from 3.10 on (abi3). Each is installed beside another Python and PyTorch, as tests/matrix.py
does, under build/matrix/, and the tests of the op run outside of the checkout. auditwheel is taken
from PATH.
"""

import os
import shutil
import sys
import tarfile
from pathlib import Path

import matrix

PLATFORM = f"manylinux_2_28_{os.uname().machine}"
LEFT_OUT = (".git", ".venv*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
# PyTorch's own libraries, which importing it loads; a copy of them would be another PyTorch.
OF_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
# Archive of the sources, wheel.
PAIRS = (("3.10", "2.10"), ("3.13", "2.12"))
TESTS = matrix.test_files(
    *("additive_attention", "attention_memory", "features", "hard_cases", "masks", "pool"),
    *("report", "scores"),
)


def build_sources(folder: Path) -> Path:
    """An archive of a copy of the checkout: what a build left there does not belong into it."""
    shutil.copytree(matrix.ROOT, matrix.COPY, ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = ("setup.py", "-q", "sdist", "--dist-dir", folder)
    matrix.output("env", "-C", matrix.COPY, sys.executable, *command)
    return next(folder.glob("*.tar.gz"))


def build_wheel(sources: Path, folder: Path) -> Path:
    """A wheel of what is in the archive, with the tag that auditwheel finds it to deserve."""
    with tarfile.open(sources) as archive:
        archive.extractall(matrix.FOLDER / "unpacked", filter="data")
    (tree,) = (matrix.FOLDER / "unpacked").iterdir()
    old_glibc = f"-include {tree / 'csrc' / 'glibc_2_28.h'}"
    wheel = matrix.build_wheel(tree, ATTN_EXT_BUILD_FLAGS=old_glibc)
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    command = ("auditwheel", "repair", "--only-plat", "--plat", PLATFORM, *excluded)
    matrix.output(*command, "--wheel-dir", folder, wheel)
    (repaired,) = folder.glob("*.whl")
    if not repaired.name.endswith(f"-cp310-abi3-{PLATFORM}.whl"):
        raise matrix.Failure(f"{repaired.name} has other tags than cp310-abi3-{PLATFORM}")
    return repaired


def try_out(archive: Path, python: str, torch: str, pythons: dict[str, str]) -> bool:
    """Install an archive and run the tests; says how that went."""
    if python not in pythons:
        print(f"{archive.name}: Python {python} was not found", flush=True)
        return False
    folder = matrix.FOLDER / f"python{python}-torch{torch}"
    try:
        own = matrix.install(pythons[python], torch, archive, folder)
    except matrix.Failure as failure:
        log = matrix.FOLDER / "failure.log"
        print(f"{archive.name}, Python {python}, torch {torch}: {failure} ({log})", flush=True)
        return False
    identity = matrix.output(own, "-c", matrix.IDENTITY).strip()
    row = matrix.run_tests(matrix.FOLDER / f"{folder.name}.log", own, "-k", matrix.OTHERS, *TESTS)
    report = matrix.run(own, "-m", "attn_ext")
    results = f"{row.cells[0]}\n{report.stdout}{report.stderr}"
    print(f"{archive.name}, Python {python}, {identity}: {results}", flush=True)
    shutil.rmtree(folder)
    return not row.failed and report.returncode == 0


def main() -> None:
    shutil.rmtree(matrix.FOLDER, ignore_errors=True)
    matrix.RUN.mkdir(parents=True)
    folder = matrix.ROOT / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sources = build_sources(folder)
    wheel = build_wheel(sources, folder)
    print(f"{sources.name} {wheel.name}", flush=True)
    # The tests of the archive, which thereby are found to be whole.
    tests = matrix.FOLDER / "unpacked" / sources.name.removesuffix(".tar.gz")
    shutil.copytree(tests / "tests", matrix.RUN / "tests")
    shutil.copy(tests / "pyproject.toml", matrix.RUN)
    pythons = matrix.find_pythons()
    archives = zip((sources, wheel), PAIRS)
    good = [try_out(archive, *pair, pythons) for archive, pair in archives]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
