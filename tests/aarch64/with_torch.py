"""A smoke test of the op with PyTorch for aarch64, emulated by qemu.

    python tests/aarch64/with_torch.py attn_ext-....whl

Debian's Python for arm64 is unpacked into build/aarch64, not installed; pip puts PyTorch's wheel
for aarch64 beside it, and the library is cross-compiled with that wheel's headers. It takes 5
minutes and 1 GB.
"""

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aarch64.kernels import COMPILER, EMULATOR, ROOT, missing

# The last PyTorch whose wheel for aarch64 has no part for CUDA, and the one whose stable ABI the
# library is built for. Python is Debian 12's.
PYTHON, TORCH = "3.11", "2.10"
NEEDED = ("typing_extensions", "filelock", "sympy", "networkx", "jinja2", "markupsafe", "mpmath")
NEEDED += ("fsspec", "numpy<2.5")

APT = """APT::Architecture "arm64";
APT::Architectures "arm64";
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
"""

SMOKE = """
import torch, attn_ext
torch.manual_seed(0)
# Some roundings of the largest value. float64 is compared with what errs as much.
bounds = {torch.float64: 2e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
for dtype, bound in bounds.items():
    shapes = (3, 5, 33), (3, 17, 33), (3, 17, 9), (33,)
    leaves = [torch.randn(shape).to(dtype) for shape in shapes]
    found = []
    for backend, computed_in in (("cpu", dtype), ("reference", torch.float64)):
        inputs = [leaf.to(computed_in, copy=True).requires_grad_() for leaf in leaves]
        lengths = torch.tensor([17, 0, 4])
        context = attn_ext.additive_attention(*inputs, key_lengths=lengths, backend=backend)
        context.square().sum().backward()
        found.append([context.detach().double(), *(tensor.grad.double() for tensor in inputs)])
    for ours, exact in zip(*found):
        error = ((ours - exact).abs().max() / exact.abs().max()).item()
        assert error < bound, f"{dtype}: error {error:.1e} of the largest value"
print(torch.__version__)
"""


def run(*command: object, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run([*map(str, command)], env=environment, text=True, capture_output=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        first = next((line for line in lines if "rror: " in line), lines[-1])
        raise RuntimeError(f"{Path(str(command[0])).name}: {first.strip()}")
    return done.stdout.strip()


def unpack_python(folder: Path) -> Path:
    """Debian's, by an apt that has folders of its own: this machine's packages stay as they are."""
    for name in ("state/lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state" / "status").touch()
    (folder / "apt.conf").write_text(APT.format(folder=folder))
    apt = {"APT_CONFIG": str(folder / "apt.conf")}
    run("apt-get", "update", "-qq", **apt)
    options = ("-qq", "-y", "--download-only", "--no-install-recommends")
    run("apt-get", "install", *options, f"python{PYTHON}", "libstdc++6", "libgomp1", **apt)
    for package in sorted(folder.glob("cache/archives/*.deb")):
        run("dpkg-deb", "-x", package, folder / "root")
    return folder / "root"


def install(folder: Path, wheel: Path) -> Path:
    """PyTorch, and attn_ext's wheel with a library for aarch64 in place of its own."""
    site = folder / "site"
    tags = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
    options = ["--only-binary=:all:", "--no-deps", "--upgrade", f"--python-version={PYTHON}"]
    options += [f"--platform={tag}" for tag in tags]
    pip = (sys.executable, "-m", "pip", "install", "-q", "--target", site)
    run(*pip, *options, f"torch=={TORCH}.*", *NEEDED)
    run(sys.executable, "-m", "zipfile", "-e", wheel, site)
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030a0000"]
    major, minor = map(int, TORCH.split("."))
    flags += [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"]
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem{site / 'torch' / 'include'}"]
    objects = []
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
        objects.append(folder / f"{source.stem}.with_torch.o")
        run(COMPILER, *flags, "-c", source, "-o", objects[-1])
    libraries = [f"-L{site / 'torch' / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    # Those need others in turn, which the emulated system has and this one has not.
    libraries += ["-Wl,--unresolved-symbols=ignore-all"]
    run(COMPILER, "-shared", *objects, *libraries, "-o", site / "attn_ext" / "_C.abi3.so")
    return site


def emulated(folder: Path, wheel: Path) -> str:
    """What became of it, in a line."""
    absent = missing(COMPILER, EMULATOR, "apt-get", "dpkg-deb")
    if absent:
        return absent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        root, site = unpack_python(folder.resolve()), install(folder.resolve(), wheel)
    except RuntimeError as error:
        return f"failed to install: {error}"
    python = root / "usr" / "bin" / f"python{PYTHON}"
    # Nothing of this machine's own Python may be found.
    isolated = {"PYTHONPATH": str(site), "PYTHONHOME": str(root / "usr"), "PYTHONSAFEPATH": "1"}
    try:
        version = run(EMULATOR, python, "-c", SMOKE, QEMU_LD_PREFIX=str(root), **isolated)
    except RuntimeError as error:
        return f"failed: {error}"
    return f"passed with PyTorch {version}, 4 dtypes, forward and backward"


if __name__ == "__main__":
    text = emulated(ROOT / "build" / "aarch64", Path(sys.argv[1]))
    print(text)
    sys.exit(text.startswith("failed"))
