"""What ``make`` installs: pinned, with hashes, all that is needed and nothing else; no network."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements")
utils = pytest.importorskip("packaging.utils")

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("locked.txt", "locked-torch.txt", "locked-cuda.txt", "locked-triton.txt", "torch-cpu.txt")
FOR_CUDA, FOR_CPU = LOCKS[:3], (LOCKS[0], *LOCKS[3:])
EXTRAS = ("nmt", "test", "bench")
# What somebody may have beside: peers that are timed, and what exported graphs are run by.
NOT_INSTALLED = {"cudnn", "onnx", "onnxruntime"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "requirements").exists(), reason="the tests of an installed package have no locks"
)


def lines_of(*names):
    """(requirement, hashes) of each line of files in requirements/."""
    for name in names:
        text = (ROOT / "requirements" / name).read_text().replace("\\\n", "")
        for line in re.findall(r"^[^#\n]+", text, re.MULTILINE):
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            yield packaging.Requirement(requirement), hashes


def applies(requirement, extras=("",), here=()):
    """Whether a requirement holds with one of the extras, here or in another environment."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**dict(here), "extra": e}) for e in extras)


def pins(*names, here=()):
    """The version that locks hold of each package; of none two."""
    chosen = [pin for pin, _ in lines_of(*names) if applies(pin, here=here)]
    versions = {utils.canonicalize_name(pin.name): pin.specifier for pin in chosen}
    assert len(versions) == len(chosen)
    return {name: str(specifier).removeprefix("==") for name, specifier in versions.items()}


def asked_for(here=()):
    """What pyproject.toml and the lists beside the locks name."""
    lists = [requirement for requirement, _ in lines_of("tools.txt", "torch.txt")]
    needs = map(packaging.Requirement, importlib.metadata.requires("attn_ext"))
    ours = [r for r in needs if applies(r, ("", *EXTRAS), here) and r.name != "attn_ext"]
    return lists + ours


@pytest.mark.parametrize("name", LOCKS)
def test_locks_hold_one_version_and_its_hashes(name):
    found = list(lines_of(name))
    assert found
    for requirement, hashes in found:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", h) for h in hashes), requirement
        assert requirement.url is None


def test_a_hash_is_of_one_package():
    owners = {}
    for requirement, hashes in lines_of(*LOCKS):
        for digest in hashes:
            assert owners.setdefault(digest, requirement.name) == requirement.name


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_locks_hold_what_is_asked_for(python, machine):
    here = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "platform_python_implementation": "CPython",
    }
    for_cuda, for_cpu = pins(*FOR_CUDA, here=here), pins(*FOR_CPU, here=here)
    for requirement in asked_for(here):
        name = utils.canonicalize_name(requirement.name)
        assert for_cuda[name] in requirement.specifier
        assert for_cpu[name] in requirement.specifier
    for requirement in [r for r, _ in lines_of("triton.txt") if applies(r, here=here)]:
        assert for_cpu["triton"] in requirement.specifier


def test_locks_hold_all_that_is_needed_and_nothing_else():
    """What the packages here need in turn: installing takes none that is not named."""
    if sys.platform != "linux":
        pytest.skip("other packages are needed on Linux")
    names = FOR_CPU if importlib.metadata.version("torch").endswith("+cpu") else FOR_CUDA
    versions = pins(*names)
    needed, left = set(), [(requirement, "the lists") for requirement in asked_for()]
    seen = set()
    while left:
        requirement, of = left.pop()
        name = utils.canonicalize_name(requirement.name)
        assert name in versions, f"{of} needs {requirement}, which is not locked"
        assert requirement.specifier.contains(versions[name], prereleases=True), (of, requirement)
        try:
            if importlib.metadata.version(name) != versions[name]:
                pytest.skip(f"{name} is not the locked version here: what that needs is not known")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here: what it needs is not known")
        needed.add(name)
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            needs = map(packaging.Requirement, importlib.metadata.requires(name) or [])
            left += [(r, name) for r in needs if applies(r, [extra])]
    assert set(versions) == needed


def imported_names(path):
    """The first parts of the names of modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_locks_hold_what_is_imported():
    folders = ("attn_ext", "triton_kernels", "benchmarks", "tests", "requirements")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    ours = {"attn_ext", "benchmarks", "tests", "aarch64", "ptx"}
    ours |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    imported = {name for path in [*paths, ROOT / "setup.py"] for name in imported_names(path)}
    imported -= {*ours, *sys.stdlib_module_names}
    assert imported > {"torch", "triton", "numpy", "pytest", "setuptools"}
    packages = importlib.metadata.packages_distributions()
    versions = pins(*LOCKS[:3])
    for name in imported - NOT_INSTALLED:
        found = packages.get(name, [name])
        assert any(utils.canonicalize_name(one) in versions for one in found), name


def test_make_installs_nothing_that_is_not_locked():
    makefile = (ROOT / "Makefile").read_text()
    assert "LOCKED := install -qq --require-hashes --only-binary=:all: --no-deps\n" in makefile
    calls = re.findall(r"(?:PIP\)|-m pip) (.*)", makefile)
    installs = [call for call in calls if "install" in call and "CHOSEN_TORCH" not in call]
    assert len(calls) > 8 and installs
    assert all("--no-deps" in call for call in installs)


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
*"pip "*)
    echo "$*" >>pip.log
    case "$*" in *torch-cpu.txt*) printf "$CPU_BUILD" >&2; [ -z "$CPU_BUILD" ]; exit;; esac;;
esac
"""


@pytest.fixture
def installed(tmp_path):
    """What `make .venv/.installed` said, and the calls of a pip that does nothing or fails."""
    if not shutil.which("make"):
        pytest.skip("no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    inherited.pop("TORCH", None)

    def install(*arguments, cpu_build=""):  # what pip says of it as it fails
        (tmp_path / "pip.log").write_text("")
        run = subprocess.run(
            ["make", "-s", ".venv/.installed", "PYTHON=./python", *arguments],
            cwd=tmp_path, env={**inherited, "CPU_BUILD": cpu_build},
            text=True, capture_output=True,
        )  # fmt: skip
        assert (tmp_path / ".venv" / ".installed").exists() == (run.returncode == 0)
        calls = (tmp_path / "pip.log").read_text().splitlines()
        return run, [call for call in calls if " install " in call]

    return install


def test_make_says_when_it_takes_the_build_for_cuda(installed):
    """Of some Pythons no build for CPUs is locked; the registry's takes its time."""
    reason = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    run, installs = installed(cpu_build=f"ERROR: none\n{reason}\n")
    assert run.returncode == 0 and reason in run.stderr
    assert "torch-cpu.txt" in installs[-2] and "locked-cuda.txt" in installs[-1]
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("make: pip")]
    assert "for CUDA, several GB" in line


@pytest.mark.parametrize(
    "reason",
    [
        "ERROR: Exception:\nReadTimeoutError: Read timed out.",
        "ERROR: Could not install packages due to an OSError: No space left on device",
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
    ],
    ids=["time-out", "disk", "hash"],
)
def test_make_ends_with_what_pip_says(installed, reason):
    """And does not go on to several GB of what was not asked for."""
    run, installs = installed(cpu_build=f"{reason}\n")
    assert run.returncode != 0 and reason in run.stderr
    assert "torch-cpu.txt" in installs[-1] and "several GB" not in run.stderr


def test_make_installs_the_torch_that_is_chosen(installed):
    locks = "--require-hashes --only-binary=:all: --no-deps -r requirements/"
    run, installs = installed()
    assert run.returncode == 0
    assert [call.partition(locks)[2] for call in installs] == ["locked.txt", "torch-cpu.txt"]
    run, installs = installed("TORCH=cuda")
    assert run.returncode == 0
    cuda = "locked-torch.txt -r requirements/locked-cuda.txt"
    assert [call.partition(locks)[2] for call in installs] == ["locked.txt", cuda]
    run, installs = installed("TORCH=2.12.0")
    assert run.returncode == 0
    assert installs[-1].endswith("install -q -c .venv/kept.txt torch==2.12.0")
