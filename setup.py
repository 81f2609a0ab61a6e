"""Build of the C++ and CUDA libraries; everything static stands in pyproject.toml.

Environment variables:
    ATTN_EXT_BUILD_CPU   unset: build the C++ CPU backend where a C++17 compiler works, else say so
                         and install without it. 1: a missing compiler is an error. 0: never build
                         it (then torch need not be installed while building). Sources that do not
                         compile are an error in any case.
    ATTN_EXT_BUILD_CUDA  the same for the CUDA backend, which needs a CUDA build of torch and an
                         nvcc of its CUDA version that works with the C++ compiler. Unset, it is
                         built only beside the CPU backend; with a torch without CUDA there is
                         nothing to build or to say.
    ATTN_EXT_BUILD_FLAGS further options of the compiler and the linker of the CPU library, after
                         all others, as `make sanitize` has them
    CXX                  the compiler, instead of the first of c++, g++, clang++ that works; nvcc
                         takes it too
    CC                   nvcc's own C++ compiler, as for all of torch's extensions
    CUDA_HOME            where the CUDA toolkit is, as for all of torch's extensions
    TORCH_CUDA_ARCH_LIST GPUs to build for, such as "8.0;9.0+PTX"; unset: those in this machine, or
                         without any a list from Ampere on that this nvcc knows
    MAX_JOBS             how many files are compiled at a time
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
# Other commands (sdist, egg_info, dist_info) need no compiler and no torch.
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
STABLE_ABI = (2, 10)  # the libtorch whose stable ABI csrc/ is written against
OLDEST_CUDA = (12, 0)  # whose nvcc has all of C++17
OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which --no-build-isolation does not enforce
CUDA_PROBE = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
__global__ void probe(float* x, __half y, __nv_bfloat16 z) {
  *x = __half2float(y) + __bfloat162float(z);
}
"""
# GCC 12 calls the operands that its own AVX-512 intrinsics leave undefined uninitialized.
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]


def say(message: str) -> None:
    print(f"attn_ext: {message}", file=sys.stderr, flush=True)


def compiles(compiler: str) -> bool:
    """Whether `compiler` makes a shared library of a small C++17 program."""
    program = "#include <vector>\nint f() { if constexpr (true) return std::vector{1}[0]; }\n"
    command = [*shlex.split(compiler), "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-"]
    if not command or not shutil.which(command[0]):
        return False
    with tempfile.TemporaryDirectory() as folder:
        command += ["-o", os.path.join(folder, "probe.so")]
        run = subprocess.run(command, input=program, text=True, capture_output=True)
    return run.returncode == 0


def find_compiler() -> tuple[str, str]:
    """The C++ compiler ("" without one), and why there is none."""
    if sys.platform == "win32":
        return "", "the C++ backend is not built on Windows"
    chosen = os.environ.get("CXX")
    for compiler in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if compiles(compiler):
            return compiler, ""
    if chosen:
        return "", f"CXX={chosen} does not compile C++17"
    return "", "no working C++17 compiler (c++, g++, clang++) was found"


def import_cpp_extension():
    """`torch.utils.cpp_extension`, or one clear message instead of a traceback."""
    pin = (ROOT / "requirements" / "torch.txt").read_text().strip()
    remedy = (
        f"  pip install {pin} ninja setuptools\n"
        "  pip install --no-build-isolation .\n"
        "(ATTN_EXT_BUILD_CPU=0 pip install . needs no PyTorch to build, and installs without the "
        "C++ backend.)"
    )
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"attn_ext: PyTorch cannot be imported while building ({error}). pip does not fetch it "
            f"for a build, as it is several GB; install it first, then build beside it:\n{remedy}"
        )
    if torch.__version__ < STABLE_ABI:
        needed = ".".join(map(str, STABLE_ABI))
        sys.exit(f"attn_ext: PyTorch >= {needed} is needed, found {torch.__version__}:\n{remedy}")
    return cpp_extension


def cpu_extension(cpp_extension, sources: list[Path]):
    """attn_ext/_C.abi3.so: the operators' CPU kernels, loaded by torch.ops.load_library."""
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.hpp")]
    major, minor = STABLE_ABI
    further = shlex.split(os.environ.get("ATTN_EXT_BUILD_FLAGS", ""))
    return cpp_extension.CppExtension(
        "attn_ext._C",
        sorted(path.relative_to(ROOT).as_posix() for path in sources),
        depends=sorted(path.relative_to(ROOT).as_posix() for path in headers),
        include_dirs=[str(ROOT / "csrc")],  # ninja runs elsewhere
        py_limited_api=True,  # torch adds -DPy_LIMITED_API
        extra_compile_args={
            "cxx": [
                "-O3",
                "-g0",
                "-std=c++17",
                "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}",
                *WARNINGS,
                # Our warnings, not those of torch's headers.
                *(f"-isystem{path}" for path in cpp_extension.include_paths()),
                *further,
            ]
        },
        extra_link_args=further,
    )


def nvcc_version(cuda_home: str) -> tuple[int, int] | None:
    """The version of the nvcc there, or None if it does not run."""
    try:
        run = subprocess.run(
            [os.path.join(cuda_home, "bin", "nvcc"), "--version"], text=True, capture_output=True
        )
    except OSError:
        return None
    match = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return (int(match[1]), int(match[2])) if match and run.returncode == 0 else None


def host_compiler(compiler: str) -> list[str]:
    """The options that make nvcc use `compiler`, none where torch hands it $CC."""
    words = shlex.split(compiler)
    return [f"-ccbin={words[0]}"] if len(words) == 1 and not os.environ.get("CC") else []


def nvcc_obstacle(cpp_extension, compiler: str) -> str | None:
    """Why nvcc and `compiler` do not make a library together, or None if they do."""
    check = getattr(cpp_extension, "_check_cuda_version", None)  # the build itself calls it
    try:
        name = shlex.split(compiler)[0]
        _, version = cpp_extension.get_compiler_abi_compatibility_and_version(name)
        if check is not None:
            check(name, version)
    except Exception as error:
        return f"PyTorch does not take this compiler for CUDA: {error}"
    chosen = os.environ.get("CC")
    options = [f"-ccbin={chosen}"] if chosen else host_compiler(compiler)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(CUDA_PROBE)
        command = [
            *(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"), *options),
            *("-std=c++17", "-shared", "-cudart=static", "-Xcompiler=-fPIC"),
            *(str(source), "-o", str(source.with_suffix(".so"))),
        ]
        run = subprocess.run(command, text=True, capture_output=True)
        if run.returncode == 0:  # and what the C++ compiler itself is handed
            host = source.with_suffix(".cpp")
            host.write_text("#include <cuda_runtime.h>\n")
            paths = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
            command = [*shlex.split(compiler), "-fsyntax-only", *paths, str(host)]
            run = subprocess.run(command, text=True, capture_output=True)
    if run.returncode == 0:
        return None
    lines = (run.stderr + run.stdout).strip().splitlines() or [f"exit status {run.returncode}"]
    reason = next((line for line in lines if "error" in line.lower()), lines[0])
    return f"{' '.join(command[:2])} does not compile a small program ({reason.strip()})"


def cuda_obstacle(cpp_extension, compiler: str) -> str | None:
    """Why the CUDA library cannot be built here with `compiler`, or None if it can."""
    import torch

    if sys.platform == "win32":
        return "the CUDA backend is not built on Windows yet"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA"
    if not cpp_extension.CUDA_HOME:
        return "no CUDA toolkit was found (CUDA_HOME names one)"
    version = nvcc_version(cpp_extension.CUDA_HOME)
    if version is None:
        return f"{cpp_extension.CUDA_HOME}/bin/nvcc does not run"
    found = ".".join(map(str, version))
    if version < OLDEST_CUDA:
        return f"nvcc {found} is older than {'.'.join(map(str, OLDEST_CUDA))}"
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"nvcc {found} is of another CUDA than PyTorch's {torch.version.cuda}"
    obstacle = nvcc_obstacle(cpp_extension, compiler)
    if obstacle is not None:
        return obstacle
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        newest = "9.0;10.0;12.0+PTX" if version >= (12, 8) else "9.0+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"8.0;{newest}"
    return None


def cuda_extension(cpp_extension, compiler: str):
    """attn_ext/_C_cuda.abi3.so: the operators' CUDA kernels, loaded where torch has CUDA."""
    major, minor = STABLE_ABI
    folder = ROOT / "csrc" / "cuda"
    headers = [*(ROOT / "csrc").glob("*.h"), *folder.glob("*.h"), *folder.glob("*.cuh")]
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"
    extension = cpp_extension.CUDAExtension(
        "attn_ext._C_cuda",
        sorted(
            path.relative_to(ROOT).as_posix()
            for path in (*folder.glob("*.cu"), *folder.glob("*.cpp"))
        ),
        depends=sorted(path.relative_to(ROOT).as_posix() for path in headers),
        py_limited_api=True,
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-DUSE_CUDA", target],
            "nvcc": [
                *("-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", target),
                *host_compiler(compiler),
            ],
        },
    )
    # CUDA's runtime joins the library, as nvcc has it by default and the probe did.
    others = [name for name in extension.libraries if name != "cudart"]
    extension.libraries = [*others, "cudart_static", "rt", "dl", "pthread"]
    return extension


def wish_for(name: str) -> str:
    wish = os.environ.get(name, "")
    if wish not in ("", "0", "1"):
        sys.exit(f"attn_ext: {name} is 0, 1 or unset, not {wish!r}")
    return wish


def find_cpu_compiler(sources: list[Path], wish: str) -> str:
    """The compiler of the CPU library, or "" where it is not to be built."""
    if wish == "0":
        return ""
    compiler, reason = find_compiler() if sources else ("", "csrc/ holds no C++ sources")
    if not compiler:
        remedy = "a compiler (Debian: apt-get install g++) and another install give the fast one"
        if wish == "1":
            sys.exit(f"attn_ext: ATTN_EXT_BUILD_CPU=1, but {reason}")
        say(f'{reason}: installing with backend "reference" only; {remedy}.')
    return compiler


def wants_cuda(cpp_extension, compiler: str, wish: str) -> bool:
    """Whether to build the CUDA library; says why not where that may be a surprise."""
    import torch

    obstacle = cuda_obstacle(cpp_extension, compiler)
    if obstacle is None:
        return True
    if wish == "1":
        sys.exit(f"attn_ext: ATTN_EXT_BUILD_CUDA=1, but {obstacle}")
    if torch.version.cuda is not None:
        say(f'{obstacle}: installing without backend "cuda" (ATTN_EXT_BUILD_CUDA=0 says nothing).')
    return False


def build_extensions() -> dict:
    """The arguments of setup() that build what this machine can build."""
    cpu_wish, cuda_wish = wish_for("ATTN_EXT_BUILD_CPU"), wish_for("ATTN_EXT_BUILD_CUDA")
    if not BUILDING & set(sys.argv[1:]):
        return {}
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/**/*.cpp")]
    compiler = find_cpu_compiler(sources, cpu_wish)
    if not compiler and cuda_wish != "1":
        return {}
    if compiler:
        os.environ["CXX"] = compiler
    # ninja from pip is a program of this Python, whether or not its environment is activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cpp_extension = import_cpp_extension()

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                sys.exit(
                    "attn_ext: the C++ library was not built, the messages above say why "
                    f"({error}); ATTN_EXT_BUILD_CPU=0 installs without it, and "
                    "ATTN_EXT_BUILD_CUDA=0 without the CUDA backend."
                )

    modules = [cpu_extension(cpp_extension, sources)] if compiler else []
    compiler = compiler or os.environ.get("CXX") or "c++"  # as torch has it
    if cuda_wish != "0" and wants_cuda(cpp_extension, compiler, cuda_wish):
        modules.append(cuda_extension(cpp_extension, compiler))
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"attn_ext: setuptools >= {OLDEST_SETUPTOOLS} is needed, found {setuptools.__version__}:\n"
        "  pip install --upgrade setuptools"
    )
# The wheel serves every later Python; free-threaded ones have no limited API to name.
free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
setuptools.setup(
    packages=[
        *setuptools.find_packages(include=["attn_ext", "attn_ext.*"]),
        "attn_ext.triton_kernels",
    ],
    package_dir={"attn_ext.triton_kernels": "triton_kernels"},
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
    **build_extensions(),
)
