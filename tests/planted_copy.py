"""A copy of the checkout to plant defects in, and a Python that imports it: for tests/planted.py.

C++ is built once: there each defect is a branch that an environment variable takes at run time.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from planted_defects import CPU, CUDA, DEFECTS, Defect

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "planted" / "tree"
VENV = ROOT / "build" / "planted" / "venv"
PYTHON = VENV / "bin" / "python"
SWITCH = "ATTN_EXT_PLANTED"  # the environment variable, and the macro of planted.h
COMPILED = {defect.name for defect in (*CPU, *CUDA)}

Variables = tuple[tuple[str, str], ...]  # of the environment


def start(command: list[str], variables: Variables, timeout: float | None = None):
    """Run a command in the copy; ended with all that it started when it takes too long."""
    # Nothing may be read from bytecode: two texts of one second and size would be taken for one.
    fixed = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MAKEFLAGS": ""}
    environment = {**os.environ, **fixed, **dict(variables)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        command, cwd=TREE, env=environment, start_new_session=True, errors="replace", **pipes
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return subprocess.CompletedProcess(command, None, output)


def switched(defect: Defect) -> str:
    """Both texts of a C++ defect, to be chosen between at run time."""
    condition = f'{SWITCH}("{defect.name}")'
    if defect.old.endswith(";"):
        return f"if ({condition}) {{ {defect.new} }} else {{ {defect.old} }}"
    return f"({condition} ? ({defect.new}) : ({defect.old}))"


def planted(text: str, defect: Defect, new: str) -> str:
    count = text.count(defect.old)
    if count != 1:
        sys.exit(f"{defect.name}: its text occurs {count} times in {defect.file}, not once")
    return text.replace(defect.old, new)


def update(target: Path, content: bytes) -> None:
    """Write a file only if it changes, so that nothing is built again for it."""
    if not target.exists() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def prepare(defects: list[Defect]) -> None:
    """Bring the copy up to date; each of the defects can be planted in it."""
    copy_tree()
    for defect in defects:
        if defect.name not in COMPILED:
            planted((TREE / defect.file).read_text(), defect, "")
    make_python()
    print("building the copy", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = start(command, (("ATTN_EXT_BUILD_CPU", "1"), ("ATTN_EXT_BUILD_CUDA", "0")))
    if run.returncode:
        sys.exit(run.stdout[-4000:])


def copy_tree() -> None:
    """The checkout as it is, committed or not, with every C++ defect behind its switch."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    files = {name for name in names.split("\0") if name and (ROOT / name).is_file()}
    for name in sorted(files):
        content = (ROOT / name).read_bytes()
        compiled = [d for d in DEFECTS if d.file == name and d.name in COMPILED]
        if compiled:
            text = content.decode()
            for defect in compiled:
                text = planted(text, defect, switched(defect))
            content = f'#include "{TREE / "tests" / "planted.h"}"\n{text}'.encode()
        update(TREE / name, content)
        shutil.copymode(ROOT / name, TREE / name)
    kept = {TREE / name for name in files}
    for path in TREE.rglob("*.*"):  # what the checkout no longer has
        built = "build" in path.relative_to(TREE).parts
        if path.suffix in (".py", ".h", ".cpp", ".cu") and path not in kept and not built:
            path.unlink()
    link = TREE / "attn_ext" / "triton_kernels"  # setup.py puts it there in an installation
    if not link.exists():
        link.symlink_to("../triton_kernels")


def make_python() -> None:
    """An environment with the packages of this one, in which attn_ext is the copy."""
    if not PYTHON.exists():
        venv = [sys.executable, "-m", "venv", "--without-pip", str(VENV)]
        subprocess.run(venv, check=True)
    # Lines of a .pth file are searched, but their own .pth files, as of editable installs, not run.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = VENV / "lib" / version / "site-packages"
    (site / "planted.pth").write_text(f"{TREE}\n{sysconfig.get_path('purelib')}\n")
    with contextlib.suppress(FileExistsError):  # packages that tests compare with
        (VENV / "peers").symlink_to(Path(sys.prefix, "peers"))
    for program in Path(sysconfig.get_path("scripts")).iterdir():  # ninja and others
        with contextlib.suppress(FileExistsError):
            (PYTHON.parent / program.name).symlink_to(program)
    code = "import attn_ext, attn_ext.triton_kernels as t; print(attn_ext.__file__, t.__file__)"
    found = start([str(PYTHON), "-c", code], ()).stdout.split()
    expected = [TREE / "attn_ext/__init__.py", TREE / "attn_ext/triton_kernels/__init__.py"]
    if found != list(map(str, expected)):
        sys.exit(f"not the copy would be tested, but {found}")
