"""Pin what `make venv` installs, with the hash of every file of each release: `make lock`.

uv (on PATH, or UV=...) resolves the three lists here and what pyproject.toml names, for every
Python and machine at once. Pins that are there stay until `make lock ARGS=--upgrade`, or
`ARGS='--upgrade-package numpy'`. Installing needs pip alone, and the files name no registry.

    locked.txt         everything but
    locked-torch.txt   PyTorch's build in the registry, for CUDA: `make TORCH=cuda`;
    locked-cuda.txt    what that needs besides, several GB, triton among it;
    locked-triton.txt  triton for the build for CPUs, torch-cpu.txt, which does not bring it;
    locked-docs.txt    what `make docs` needs, in an environment of its own;
    locked-release.txt what `make dist` and `make types` need, in another;
    locked-peers.txt   the packages that attn_ext.compat's tests compare with, peers.txt.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def resolve(pinned, *sources):
    """The lock of `sources` in uv's format, one text a package; `pinned` are files to stay near."""
    output = FOLDER / "locked.tmp"
    try:
        output.write_text("".join(path.read_text() for path in pinned if path.exists()))
        command = [os.environ.get("UV", "uv"), "pip", "compile", "--quiet", "--universal"]
        command += ["--python-version=3.10", "--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--only-binary=:all:"]
        subprocess.run([*command, f"-o{output}", *sys.argv[1:], *sources], check=True)
        return re.findall(r"^[a-z](?:.*\\\n)*.*\n", output.read_text(), re.MULTILINE)
    finally:
        output.unlink(missing_ok=True)


def without(package, other):
    """A package without the hashes that another file has, and each hash once."""
    known = re.findall("sha256:[0-9a-f]{64}", other.read_text())
    first, *lines = package.rstrip().split(" \\\n")
    hashes = dict.fromkeys(line.strip() for line in lines)
    kept = [line for line in hashes if line.removeprefix("--hash=") not in known]
    return " \\\n    ".join([first, *kept]) + "\n"


def write(name, packages):
    (FOLDER / name).write_text("# Written by `make lock`.\n" + "".join(packages))


def main():
    names = ("locked.txt", "locked-torch.txt", "locked-cuda.txt")
    files = {name: [] for name in names}
    pinned = [FOLDER / name for name in names]
    sources = [FOLDER.parent / "pyproject.toml", "--all-extras"]
    for package in resolve(pinned, *sources, FOLDER / "tools.txt", FOLDER / "torch.txt"):
        if package.startswith("torch=="):
            files["locked-torch.txt"].append(without(package, FOLDER / "torch-cpu.txt"))
        elif package.startswith(("cuda-", "nvidia-", "triton==")):
            files["locked-cuda.txt"].append(package)
        else:
            files["locked.txt"].append(package)
    for name, packages in files.items():
        write(name, packages)
    for name in ("triton", "docs", "release"):
        lock = FOLDER / f"locked-{name}.txt"
        write(lock.name, resolve([lock], FOLDER / f"{name}.txt"))
    peers = FOLDER / "locked-peers.txt"
    write(peers.name, resolve([peers], "--no-deps", FOLDER / "peers.txt"))


main()
