"""The build and what it leaves behind; nothing here reaches the network."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import attn_ext
import attn_ext.triton_kernels
from attn_ext import backends

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(attn_ext.__file__).parent / "_C.abi3.so"


def test_version_is_the_distribution_s():
    assert attn_ext.__version__ == importlib.metadata.version("attn_ext")


def test_triton_kernels_is_a_subpackage():
    assert attn_ext.triton_kernels.__name__ == "attn_ext.triton_kernels"
    assert attn_ext.triton_kernels.__file__


def test_triton_is_required_on_linux_only():
    requirements = importlib.metadata.requires("attn_ext")
    (triton,) = [line for line in requirements if line.startswith("triton")]
    assert "Linux" in triton


def test_library_serves_every_python_and_torch():
    if not LIBRARY.exists():
        pytest.skip("installed without the C++ backend")
    assert [path.name for path in LIBRARY.parent.glob("_C.*")] == ["_C.abi3.so"]
    if not shutil.which("nm"):
        pytest.skip("no nm")
    nm = ["nm", "--dynamic", "--undefined-only", str(LIBRARY)]
    listing = subprocess.run(nm, check=True, text=True, capture_output=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert any("torch" in name for name in names)
    # Mangled at::, c10:: and torch:: names, and CPython's, change between releases.
    unstable = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch", "Py", "_Py")
    assert not [name for name in names if name.startswith(unstable)]


DOCUMENTS = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "mkdocs.yml",
)


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads, so that nothing lands in the working tree."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests of an installed package have no setup.py")
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("attn_ext", "csrc", "docs", "requirements", "triton_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in (*DOCUMENTS, "MANIFEST.in", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    return tree


CHOICES = ("CC", "CXX", "ATTN_EXT_BUILD_CPU", "ATTN_EXT_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST")


def run_setup(tree, *arguments, **environment):
    """`python setup.py *arguments` with no compiler to be found unless `environment` has one."""
    empty = tree.parent / "empty"
    empty.mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k not in CHOICES}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**inherited, "PATH": str(empty), **environment},
        text=True,
        capture_output=True,
        timeout=300,
    )


def said(run):
    return [line for line in run.stderr.splitlines() if line.startswith("attn_ext:")]


def without_torch(tree):
    """An import path on which torch is not installed."""
    torch = tree.parent / "path" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    return str(torch.parent)


def test_without_a_compiler_the_install_goes_on_and_says_so_once(tree):
    run = run_setup(tree, "-q", "bdist_wheel")
    assert run.returncode == 0, run.stderr
    (line,) = said(run)
    assert "compiler" in line and '"reference"' in line
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name == f"attn_ext-{attn_ext.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "attn_ext/triton_kernels/__init__.py" in names
    assert "attn_ext/functional.py" in names
    assert not [name for name in names if name.startswith(("triton_kernels", "tests", "csrc"))]


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"ATTN_EXT_BUILD_CPU": "1"}, "ATTN_EXT_BUILD_CPU=1"),
        ({"ATTN_EXT_BUILD_CPU": "1", "CXX": "no-such-compiler"}, "CXX=no-such-compiler"),
        ({"ATTN_EXT_BUILD_CPU": "yes"}, "'yes'"),
        ({"ATTN_EXT_BUILD_CUDA": "yes"}, "'yes'"),
    ],
    ids=["no-compiler", "bad-cxx", "bad-wish", "bad-cuda-wish"],
)
def test_a_wish_that_cannot_be_met_is_one_line(tree, environment, reason):
    run = run_setup(tree, "build_ext", **environment)
    assert run.returncode == 1
    (line,) = said(run)
    assert reason in line
    assert "Traceback" not in run.stderr


def test_a_build_without_torch_says_what_to_install(tree):
    compiler = shutil.which("true")  # finds nothing wrong with the probe
    run = run_setup(tree, "build_ext", CXX=compiler, PYTHONPATH=without_torch(tree))
    assert run.returncode == 1
    assert len(said(run)) == 1
    pin = (ROOT / "requirements" / "torch.txt").read_text().strip()
    assert f"pip install {pin}" in run.stderr
    assert "pip install --no-build-isolation ." in run.stderr
    assert "Traceback" not in run.stderr


def test_sources_that_do_not_compile_are_an_error(tree):
    compiler = tree.parent / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *"-x c++ -"*) exit 0;; esac\nexit 1\n')
    compiler.chmod(0o755)
    run = run_setup(tree, "build_ext", CXX=str(compiler), PATH=os.environ["PATH"])
    assert run.returncode == 1
    (line,) = said(run)
    assert "ATTN_EXT_BUILD_CPU=0" in line
    assert "Traceback" not in run.stderr


FAKE_TORCH = """
class Version(str):
    __lt__ = lambda self, other: False
__version__ = Version("2.99")
class version:
    cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: False)
"""
FAKE_CPP_EXTENSION = """
import os
from setuptools import Extension
from setuptools.command.build_ext import build_ext
CUDA_HOME = {home!r}
def include_paths(device_type="cpu"):
    return [os.path.join(CUDA_HOME, "include")] if device_type == "cuda" else []
def get_compiler_abi_compatibility_and_version(compiler):
    return True, "12.2"
def _check_cuda_version(name, version):
    if os.environ.get("TOO_NEW"):
        raise RuntimeError(f"{{name}} {{version}} is greater than CUDA's maximum")
def CppExtension(name, sources, extra_compile_args, **keywords):
    return Extension(name, sources, **keywords)
CUDAExtension = CppExtension
class BuildExtension(build_ext):
    def build_extensions(self):
        names = sorted(extension.name for extension in self.extensions)
        print("BUILT", *names, os.environ.get("TORCH_CUDA_ARCH_LIST"))
"""


@pytest.fixture
def fake_torch(tree):
    """Makes an import path with a torch of some CUDA, that finds some nvcc and builds nothing."""

    def make(cuda, nvcc, home=None):
        if nvcc is not None:
            home = tree.parent / "cuda"
            (home / "bin").mkdir(parents=True)
            program = home / "bin" / "nvcc"
            program.write_text(
                "#!/bin/sh\n"
                f"if [ $1 = --version ]; then echo 'tools, release {nvcc}, V{nvcc}.1'; exit; fi\n"
                "[ -z $NO_HEADERS ] && exit\n"
                "echo 'In probe.cu:'; echo 'fatal error: no file'; exit 1\n"
            )
            program.chmod(0o755)
        utils = tree.parent / "path" / "torch" / "utils"
        utils.mkdir(parents=True)
        (utils.parent / "__init__.py").write_text(FAKE_TORCH.format(cuda=cuda))
        (utils / "__init__.py").touch()
        fake = FAKE_CPP_EXTENSION.format(home=home and str(home))
        (utils / "cpp_extension.py").write_text(fake)
        return str(utils.parents[1])

    return make


BOTH = "BUILT attn_ext._C attn_ext._C_cuda"


@pytest.mark.parametrize(
    "cuda, nvcc, environment, built, reason",
    [
        ("13.0", "13.0", {}, f"{BOTH} 8.0;9.0;10.0;12.0+PTX", None),
        ("12.4", "12.4", {}, f"{BOTH} 8.0;9.0+PTX", None),
        ("13.0", "13.0", {"TORCH_CUDA_ARCH_LIST": "9.0"}, f"{BOTH} 9.0", None),
        ("13.0", "13.0", {"ATTN_EXT_BUILD_CUDA": "0"}, "BUILT attn_ext._C None", None),
        (
            "13.0",
            "13.0",
            {"ATTN_EXT_BUILD_CPU": "0", "ATTN_EXT_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.6"},
            "BUILT attn_ext._C_cuda 8.6",
            None,
        ),
        ("13.0", "13.0", {"NO_HEADERS": "1"}, "BUILT attn_ext._C None", "(fatal error: no file)"),
        ("13.0", "13.0", {"TOO_NEW": "1"}, "BUILT attn_ext._C None", "12.2 is greater than"),
        (
            "13.0",
            "13.0",
            {"NO_HEADERS": "1", "ATTN_EXT_BUILD_CUDA": "1"},
            None,
            "ATTN_EXT_BUILD_CUDA=1, but",
        ),
        ("13.0", None, {}, "BUILT attn_ext._C None", "no CUDA toolkit"),
        ("13.0", "11.8", {}, "BUILT attn_ext._C None", "nvcc 11.8 is older than 12.0"),
        ("13.0", "12.8", {}, "BUILT attn_ext._C None", "nvcc 12.8 is of another CUDA"),
        (None, None, {}, "BUILT attn_ext._C None", None),
        (None, None, {"ATTN_EXT_BUILD_CUDA": "1"}, None, "without CUDA"),
        (
            "13.0",
            "11.8",
            {"ATTN_EXT_BUILD_CUDA": "1"},
            None,
            "ATTN_EXT_BUILD_CUDA=1, but nvcc 11.8",
        ),
    ],
    ids=[
        *("new-nvcc", "old-nvcc", "chosen-archs", "unwanted", "alone"),
        *("no-headers", "too-new-compiler", "wished-no-headers", "no-nvcc", "too-old"),
        *("other-cuda", "torch-without", "wished-without", "wished-too-old"),
    ],
)
def test_the_cuda_library_is_built_where_it_can_be(
    tree, fake_torch, cuda, nvcc, environment, built, reason
):
    compiler = shutil.which("true")  # finds nothing wrong with the probe
    path = fake_torch(cuda, nvcc)
    run = run_setup(tree, "-q", "build_ext", CXX=compiler, PYTHONPATH=path, **environment)
    assert "Traceback" not in run.stderr, run.stderr
    assert (run.returncode == 0) == (built is not None), run.stderr
    assert built is None or built in run.stdout.splitlines()
    assert len(said(run)) == (reason is not None)
    assert reason is None or reason in said(run)[0]


def test_nvcc_s_probe_is_one_that_a_real_nvcc_passes(tree, fake_torch):
    nvcc, compiler = shutil.which("nvcc"), shutil.which("c++")
    if not nvcc or not compiler:
        pytest.skip("nvcc or a C++ compiler is not installed")
    homes = [Path(nvcc).parents[1], Path("/usr/local/cuda")]
    home = next((h for h in homes if (h / "include" / "cuda_runtime.h").exists()), None)
    if home is None:
        pytest.skip(f"{homes[0]} is no whole CUDA toolkit")
    said_by_nvcc = subprocess.run([nvcc, "--version"], check=True, text=True, capture_output=True)
    cuda = re.search(r"release ([\d.]+)", said_by_nvcc.stdout)[1]
    environment = {"PATH": os.environ["PATH"], "ATTN_EXT_BUILD_CUDA": "1"}
    environment["PYTHONPATH"] = fake_torch(cuda, None, home=home)
    run = run_setup(tree, "-q", "build_ext", CXX=compiler, **environment)
    assert run.returncode == 0, run.stderr
    assert BOTH in run.stdout and not said(run)
    shutil.rmtree(tree.parent / "path")

    # An nvcc in a folder of programs finds its headers, which the C++ compiler then does not.
    home = tree.parent / "usr"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    (home / "bin" / "nvcc").chmod(0o755)
    environment["PYTHONPATH"] = fake_torch(cuda, None, home=home)
    run = run_setup(tree, "-q", "build_ext", CXX=compiler, **environment)
    assert run.returncode == 1
    assert "cuda_runtime.h" in said(run)[0]


def test_a_source_archive_carries_all_sources_and_needs_no_torch(tree):
    run = run_setup(tree, "-q", "sdist", PYTHONPATH=without_torch(tree))
    assert run.returncode == 0, run.stderr
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as files:
        names = {Path(name).relative_to(Path(name).parts[0]) for name in files.getnames()}
    for folder in ("csrc", "docs", "requirements", "triton_kernels"):
        for path in (tree / folder).rglob("*"):
            assert path.relative_to(tree) in names
    assert {Path(name) for name in DOCUMENTS} <= names


def test_the_changes_of_this_version_are_told(tree):
    assert f"\n## {attn_ext.__version__}" in (tree / "CHANGELOG.md").read_text()


def test_a_cuda_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    find_problem = backends._cuda_problem.__wrapped__  # without its cache
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in find_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    assert "was not built" in find_problem() and "ATTN_EXT_BUILD_CUDA=1" in find_problem()
    (tmp_path / "_C_cuda.abi3.so").write_bytes(b"not a library")
    assert "does not load" in find_problem() and "ATTN_EXT_BUILD_CUDA=1" in find_problem()


def test_a_gpu_without_its_backends_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: "triton cannot be imported")
    monkeypatch.setattr(backends, "_cuda_problem", lambda: "_C_cuda.abi3.so does not load")
    monkeypatch.setattr(backends, "_best_of", {})
    backends._warn_of_reference.cache_clear()
    gpu = torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in float64 it is no surprise
        assert backends.choose(None, gpu, torch.float64) == "reference"
    with pytest.warns(RuntimeWarning, match=r"slow here: triton cannot .*; .* does not load$"):
        assert backends.choose(None, gpu, torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, gpu, torch.float32) == "reference"
    backends._warn_of_reference.cache_clear()
