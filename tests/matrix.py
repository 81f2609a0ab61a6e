"""Test the op with several Pythons and PyTorches: `make matrix`.

    python tests/matrix.py [--only 3.12:2.11] [--keep]       # --only writes no table

A wheel is built once, by the Python that runs this, and installed into one environment after the
other under build/matrix/, beside the PyTorch and Triton that pip fetches. Tests run outside of the
checkout, so that they import the installed wheel. A table goes to tests/results/matrix.md.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from aarch64 import kernels, with_torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "matrix"
COPY = FOLDER / "copy"  # of what the wheel is built from
RUN = FOLDER / "run"  # where tests run: nothing there is called attn_ext
TABLE = ROOT / "tests" / "results" / "matrix.md"

# Python and PyTorch: each of either, and the newest PyTorch with every Python.
PAIRS = (
    "3.10:2.10",
    "3.12:2.11",
    "3.13:2.12",
    "3.10:2.13",
    "3.11:2.13",
    "3.12:2.13",
    "3.13:2.13",
    "3.14:2.13",
)
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ISAS = ("avx512", "avx2", "portable")

# The interpreter of Triton 3.6 converts arrays of one element to scalars, which NumPy 2.4 refuses.
TOOLS = ("numpy<2.4", "hypothesis", "pytest>=8", "pytest-xdist")
BUILD_TOOLS = ("setuptools>=77", "ninja")
WORKERS = os.environ.get("WORKERS") or str(min(os.cpu_count() or 1, 8))


def test_files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


# With every instruction set; a set takes 2 minutes of one core.
KERNELS = test_files(
    *("additive_attention", "attention_memory", "corrupt_values", "dropout"),
    *("hard_cases", "magnitudes", "masks", "strides"),
)
# Each parameter that chooses another backend or instruction set than ATTN_EXT_CPU_ISA.
OTHERS = " and ".join(f"not {name}" for name in ("reference", *(f"cpu_{isa}" for isa in ISAS)))
# What depends on PyTorch instead: its compiler, its checks of operators, its transforms.
PYTORCH = test_files("compile", "fake_tensors", "module", "nested", "ops", "reference")
# Triton's interpreter is slow: the layouts and dtypes, of which conftest.py takes a few.
INTERPRETED = test_files("additive_attention", "attention_memory")


LACKING = "this CPU has none"


class Failure(Exception):
    """A step that should work and did not; says so in a line."""


class Row(NamedTuple):
    cells: list[str]
    failed: bool = False


def run(*command: object, **variables: str) -> subprocess.CompletedProcess:
    """Run a command beside the tests, without what this process was told about attn_ext."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ATTN_EXT_", "PYTHON", "TRITON_"))
    }
    environment.update(OMP_NUM_THREADS="1", **variables)
    return subprocess.run(
        [*map(str, command)], cwd=RUN, env=environment, text=True, capture_output=True
    )


def output(*command: object, **variables: str) -> str:
    done = run(*command, **variables)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR: ")]
        (FOLDER / "failure.log").write_text(f"{command}\n{done.stdout}\n{done.stderr}")
        raise Failure((errors or lines)[-1].removeprefix("ERROR: "))
    return done.stdout


def find_pythons() -> dict[str, str]:
    """By version, the first Python that can make environments: on PATH, installed, pyenv's."""
    pyenv = run("pyenv", "root").stdout.strip() if shutil.which("pyenv") else ""
    versions = Path(pyenv or Path.home() / ".pyenv") / "versions"
    found = {}
    for version in PYTHONS:
        name = f"python{version}"
        installed = sorted(versions.glob(f"{version}.*/bin/{name}"))
        for path in (shutil.which(name), f"/usr/bin/{name}", *installed):
            # One on PATH may be pyenv's placeholder for a version that is not chosen.
            if path and Path(path).exists():
                if run(path, "-c", "import ensurepip, venv").returncode == 0:
                    found[version] = str(path)
                    break
    return found


def copy_sources() -> Path:
    """A copy of what a wheel is built from: a build folder of the checkout may hold older files."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("attn_ext", "csrc", "requirements", "triton_kernels"):
        shutil.copytree(ROOT / name, COPY / name, ignore=ignored)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, COPY)
    return COPY


BUILD = {"ATTN_EXT_BUILD_CPU": "1", "ATTN_EXT_BUILD_CUDA": "0"}


def build_wheel(tree: Path, **variables: str) -> Path:
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    output(*command, "-w", FOLDER, tree, **BUILD, **variables)
    return next(FOLDER.glob("*.whl"))


def stand_in_for_cuda(libraries: Path) -> None:
    """Give PyTorch's build for CUDA, in `libraries`, what it is linked with, in next to no space.

    NVIDIA's libraries are several GB, and tests on CPU tensors call none of their functions. But
    all must be there and define every symbol that PyTorch names, in the version it names.
    """
    own = sorted(libraries.glob("*.so"))
    needed = re.findall(
        r"\[(lib(?:cu|nccl|nv).+)\]", output("readelf", "--dynamic", "--wide", *own)
    )
    installed = {path.name for path in libraries.parents[1].glob("nvidia/*/lib/*")}
    # The driver's library is on machines with a GPU, and not needed before one is used.
    missing = set(needed) - installed - {"libcuda.so.1"} - {path.name for path in own}
    undefined = output("nm", "--dynamic", "--undefined-only", *own)
    symbols = set(re.findall(r" U ((?:cu|nccl|nv)\w+)(?:@(\S+))?", undefined))
    versions: dict[str, list[str]] = {}
    for name, version in sorted(symbols):
        versions.setdefault(version, []).append(name)
    source, script = libraries / "stand_in.c", libraries / "stand_in.map"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name, _ in sorted(symbols)))
    script.write_text(
        "".join(f"{key} {{ {'; '.join(names)}; }};\n" for key, names in versions.items() if key)
    )
    compiler = ("cc", "-w", "-shared", f"-Wl,--version-script={script}", source)
    for name in sorted(missing):
        output(*compiler, f"-Wl,-soname,{name}", "-o", libraries / name)


def install(python: str, torch: str, archive: Path, folder: Path) -> Path:
    """An environment with PyTorch, Triton, the tools of the tests and a wheel or an archive of the
    sources, which is built there: its Python."""
    output(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    pip = (own, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    # What pip would install is asked for first, so that NVIDIA's libraries can be left out.
    plan = output(*pip, "--dry-run", "--report", "-", f"torch=={torch}.*", *TOOLS)
    wanted = {
        item["metadata"]["name"].lower(): item["metadata"]["version"]
        for item in json.loads(plan)["install"]
    }
    # The two that PyTorch calls even when it looks for a GPU and finds none are small.
    small = ("nvidia-cuda-runtime", "nvidia-cuda-cupti")
    large = {name for name in wanted if name.startswith(("nvidia-", "cuda-"))}
    large -= {name for name in large if name.startswith(small)}
    chosen = [f"{name}=={version}" for name, version in wanted.items() if name not in large]
    output(*pip, "--no-deps", *chosen)
    if "triton" not in wanted:  # the build for CPUs does not bring it
        output(*pip, "--no-deps", "-r", COPY / "requirements" / "triton.txt")
    if large:
        libraries = next(folder.glob("lib/python*/site-packages/torch/lib"))
        kept = {path.name for path in libraries.iterdir()}
        try:
            stand_in_for_cuda(libraries)
            output(own, "-c", "import torch; torch.ones(2) + 1")
        except (Failure, OSError) as error:  # no compiler, or symbols of another kind
            print(f"no stand-ins ({error}): NVIDIA's libraries are installed", flush=True)
            for path in libraries.iterdir():
                if path.name not in kept:
                    path.unlink()
            output(*pip, "--no-deps", *(f"{name}=={wanted[name]}" for name in sorted(large)))
    if archive.suffix != ".whl":
        output(*pip, *BUILD_TOOLS)
    output(*pip, "--no-deps", "--no-build-isolation", archive, **BUILD)
    return own


IDENTITY = """
import attn_ext, torch, triton
assert "site-packages" in attn_ext.__file__, f"not what was installed: {attn_ext.__file__}"
print(torch.__version__, triton.__version__, torch.ops.attn_ext.cpu_isas())
"""


def run_tests(log: Path, python: Path, *arguments: str, **variables: str) -> Row:
    """One cell: pytest's counts, without warnings and time; its whole output goes to `log`."""
    options = ("-q", "-n", WORKERS, "--dist", "worksteal", "-p", "no:cacheprovider")
    # What torch.compile and Triton keep goes with the environment.
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(python.parents[1] / "inductor")}
    done = run(python, "-m", "pytest", *options, *arguments, **caches, **variables)
    with log.open("a") as file:
        file.write(f"{variables} {arguments}\n{done.stdout}{done.stderr}\n")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)\b", last)
    text = ", ".join(counts) if counts else f"pytest ended with status {done.returncode}"
    names = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)
    if names:
        text += f": {', '.join(names[:3])}{' ...' if names[3:] else ''}"
    return Row([text], done.returncode != 0)


def test_pair(python: str, torch: str, pythons: dict[str, str], wheel: Path, keep: bool) -> Row:
    """A row of the table."""
    if python not in pythons:
        return Row([python, torch, f"Python {python} was not found", *[""] * 5])
    folder, log = FOLDER / f"python{python}-torch{torch}", FOLDER / f"{python}-{torch}.log"
    log.unlink(missing_ok=True)
    try:
        own = install(pythons[python], torch, wheel, folder)
        torch_version, triton, *isas = output(own, "-c", IDENTITY).replace(",", "").split()
        cells = []
        for isa in ISAS:
            if isa in isas:
                row = run_tests(log, own, "-k", OTHERS, *KERNELS, ATTN_EXT_CPU_ISA=isa)
            else:
                row = Row([LACKING])
            cells.append(row)
        cells.append(run_tests(log, own, *PYTORCH))
        few = ("-k", "test_layouts or test_dtypes")
        cells.append(run_tests(log, own, *few, *INTERPRETED, TRITON_INTERPRET="1"))
        texts = [cell.cells[0] for cell in cells]
        return Row([python, torch_version, triton, *texts], any(cell.failed for cell in cells))
    except Failure as error:
        if f"No matching distribution found for torch=={torch}" in str(error):
            return Row([python, torch, f"no PyTorch {torch} for Python {python}", *[""] * 5])
        return Row([python, torch, f"FAILED to install: {error}", *[""] * 5], True)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def test_aarch64(wheel: Path) -> list[Row]:
    """The kernels called from C++, here and on an emulated aarch64; there the op as well."""
    folder = FOLDER / "aarch64"
    rows = [
        ["C++ alone, here", "none", "none", *kernels.native(folder, ISAS)],
        ["C++ alone, aarch64", "none", "none", "", "", kernels.emulated(folder)],
        ["aarch64", with_torch.TORCH, "none", "", "", with_torch.emulated(folder, wheel)],
    ]
    return [Row([*cells, "", ""], "failed" in "".join(cells)) for cells in rows]


def machine() -> str:
    """The CPU's name and the parts of it that matter here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16") if f" {flag}" in text]
    return f"{name[1] if name else platform.machine()} ({' '.join(flags) or 'no AVX2'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="PYTHON:TORCH", help="such as 3.12:2.11")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    RUN.mkdir(parents=True)
    pythons = find_pythons()
    found = ", ".join(version for version in PYTHONS if version in pythons)
    absent = ", ".join(version for version in PYTHONS if version not in pythons)
    found += f" (not {absent})" if absent else ""
    print(f"Pythons found: {found}", flush=True)
    wheel = build_wheel(copy_sources())
    shutil.copytree(ROOT / "tests", RUN / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", RUN)  # pytest's options
    head = ["Python", "PyTorch", "Triton", *ISAS, "in PyTorch", "Triton's interpreter"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print("\n".join(lines), flush=True)
    failed = False

    def add(row: Row) -> None:
        nonlocal failed
        failed |= row.failed
        lines.append("| " + " | ".join(row.cells) + " |")
        print(lines[-1], flush=True)

    for pair in options.only or PAIRS:
        add(test_pair(*pair.split(":"), pythons, wheel, options.keep))
    if not options.only:
        for row in test_aarch64(wheel):
            add(row)
        TABLE.write_text(
            f"# The op with other Pythons, PyTorches and machines\n\n"
            f"Written by `make matrix` on {datetime.date.today()}, on {machine()}.\n"
            f"Pythons found: {found}.\n"
            f"One wheel, {wheel.name}, built with Python {platform.python_version()} and "
            f"PyTorch {metadata.version('torch')}.\n"
            "Cells are pytest's counts; tests/matrix.py says which tests.\n\n"
            + "\n".join(lines)
            + "\n"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
