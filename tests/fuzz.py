"""The long run of the property tests: ``python tests/fuzz.py``, or ``make fuzz``.

Cases are drawn in chunks of 100, each from a seed of its own, and every property is checked on each
case. What a chunk found is written when it is done, so that an interrupted run goes on where it was
when it is started again; a run of other sources begins anew.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 100  # cases
PROGRESS = 10  # chunks between two lines of progress


def prepare(backend: str) -> None:
    """Make this process ready to test a backend; before the first import of what is tested."""
    import torch

    if backend == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    import helpers

    if backend == "cuda" and not torch.cuda.is_available():
        import emulated_cuda

        emulated_cuda.install()
        helpers.BACKEND_DEVICES["cuda"] = "cpu"
    elif backend == "triton":
        import conftest

        if helpers.BACKEND_DEVICES["triton"] == "cpu":
            conftest.shrink_tiles(setattr)
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    torch.use_deterministic_algorithms(True)  # which filling depends on
    torch.set_default_device(helpers.BACKEND_DEVICES[backend])


# ---- A chunk ----


def seed_of(seed: int, chunk: int) -> int:
    """The seed of a chunk; no two chunks of runs share one."""
    return seed * 1_000_003 + chunk


def run_chunk(backend: str, seed: int, chunk: int, cases: int, folder: Path) -> dict:
    """What a chunk found: counts of its cases, and its failures."""
    prepare(backend)
    import calls
    import properties

    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    failures = []
    current = folder / f"running-{chunk:05}.json"  # says what crashed a process

    def use(call) -> None:
        current.write_text(call.to_json())
        found = properties.examine(call, backend)
        counts["layout"][call.layout] += 1
        counts["dtype"]["-".join(dict.fromkeys(call.dtypes))] += 1
        counts["property"].update(name for name, result in found.items() if result is not False)
        for name, result in found.items():
            if isinstance(result, str):
                failures.append({"property": name, "error": result, "call": call.to_json()})

    properties.looks_taken.clear()
    calls.draw_calls(use, backend, seed_of(seed, chunk), cases)
    counts["samples"].update({str(n): count for n, count in properties.looks_taken.items()})
    result = {
        "chunk": chunk,
        "cases": sum(counts["layout"].values()),
        "counts": counts,
        "failures": failures,
    }
    replace_text(folder / f"chunk-{chunk:05}.json", json.dumps(result))
    current.unlink()
    return result


def replace_text(path: Path, text: str) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


# ---- A run ----


# What a result depends on: the code that is tested, what tests it, and the packages that compute
# and draw the calls.
TEST_MODULES = ("calls", "conftest", "fuzz", "helpers", "layouts", "properties", "yardstick")
SOURCES = (
    *("attn_ext/*.py", "attn_ext/*.so", "triton_kernels/*.py", "csrc/**/*.*"),
    *(f"tests/{name}.py" for name in TEST_MODULES),
    *("tests/emulated_cuda.py", "tests/cuda_emulation/*.*"),
)
PACKAGES = ("torch", "triton", "hypothesis")


def digest_of_sources() -> str:
    """Of all SOURCES, and of the versions of Python and PACKAGES."""
    digest = hashlib.sha256(repr(versions()).encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def folder_of_run(state: Path, backend: str, seed: int | None) -> tuple[int, Path]:
    """The seed and folder of the run to go on with, or of a new one."""
    sources = digest_of_sources()
    started = sorted(state.glob(f"{backend}-{sources}-*"), key=lambda path: path.stat().st_mtime)
    unfinished = [path for path in started if not (path / "finished").exists()]
    if seed is None:
        drawn = int.from_bytes(os.urandom(3), "big")
        seed = int(unfinished[-1].name.rpartition("-")[2]) if unfinished else drawn
    folder = state / f"{backend}-{sources}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return seed, folder


def finished_chunks(folder: Path, sizes: list[int]) -> dict[int, dict]:
    """Results of chunks that were run whole, and of the size that is asked for now."""
    results = (json.loads(path.read_text()) for path in folder.glob("chunk-*.json"))
    return {
        result["chunk"]: result
        for result in results
        if result["chunk"] < len(sizes) and result["cases"] == sizes[result["chunk"]]
    }


def describe(failure: dict, backend: str, seed: int, chunk: int) -> str:
    # Absolute: in whatever folder it is pasted.
    command = f"{shlex.join([sys.executable, str(Path(__file__).resolve())])} --backend {backend}"
    return (
        f"FAILED {failure['property']} (seed {seed}, chunk {chunk}): {failure['error']}\n"
        f"  {command} --call {shlex.quote(failure['call'])}\n"
        f"  minimal: {command} --seed {seed} --chunk {chunk}"
    )


def run(options: argparse.Namespace) -> int:
    seed, folder = folder_of_run(options.state, options.backend, options.seed)
    sizes = [CHUNK] * (options.cases // CHUNK) + [options.cases % CHUNK] * (
        options.cases % CHUNK > 0
    )
    results = finished_chunks(folder, sizes)
    print(f"seed {seed}, {options.cases} cases, {len(results)} of {len(sizes)} chunks are done")
    begun, failed = time.monotonic(), 0
    for chunk, result in sorted(results.items()):
        for failure in result["failures"]:
            failed += 1
            print(describe(failure, options.backend, seed, chunk))
    pending = [chunk for chunk in range(len(sizes)) if chunk not in results]
    # Not forked: threads of torch and the interpreter's environment do not survive that.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(options.jobs, context)
    try:
        futures = [
            pool.submit(run_chunk, options.backend, seed, chunk, sizes[chunk], folder)
            for chunk in pending
        ]
        for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            result = future.result()
            results[result["chunk"]] = result
            for failure in result["failures"]:
                failed += 1
                print(describe(failure, options.backend, seed, result["chunk"]), flush=True)
            if done % PROGRESS == 0 or done == len(futures):
                cases = sum(result["cases"] for result in results.values())
                seconds = time.monotonic() - begun
                print(f"{cases} cases, {failed} failures, {seconds:.0f} s", flush=True)
            if failed >= options.most_failures:
                print(f"stopped: {failed} failures (--most-failures)")
                break
    except concurrent.futures.process.BrokenProcessPool:
        print("FAILED: a process crashed, while it ran one of these calls (and again: --call)")
        for path in sorted(folder.glob("running-*.json")):
            print(f"  --call '{path.read_text()}'")
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; again with --seed {seed}, or without, to go on")
        return 130
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if len(results) == len(sizes):
        (folder / "finished").touch()
        write_summary(options, seed, folder, results, time.monotonic() - begun)
    return int(failed > 0)


def write_summary(
    options: argparse.Namespace, seed: int, folder: Path, results: dict[int, dict], seconds: float
) -> None:
    """Write what a whole run found, and where it was run."""
    import torch

    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for result in results.values():
        for kind, counted in result["counts"].items():
            counts[kind].update(counted)
    failures = [
        {"chunk": chunk, **failure}
        for chunk, result in sorted(results.items())
        for failure in result["failures"]
    ]
    summary = {
        "backend": options.backend,
        "cases": sum(result["cases"] for result in results.values()),
        "seed": seed,
        "failures": failures,
        **{f"cases_by_{kind}": dict(sorted(counted.items())) for kind, counted in counts.items()},
        "date": datetime.date.today().isoformat(),
        **versions(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "sources": folder.name.split("-")[1],
        "seconds_of_last_start": round(seconds),
    }
    text = json.dumps(summary, indent=2) + "\n"
    replace_text(options.state / f"{options.backend}.json", text)
    if options.summary:
        options.summary.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.summary, text)
    print(f"{summary['cases']} cases, {len(failures)} failures, seed {seed}")


# ---- Failures again ----


def replay(text: str, backend: str) -> int:
    """Check the properties on one call."""
    import properties
    from calls import Call

    found = properties.examine(Call.from_json(text), backend)
    for name, result in found.items():
        print(f"{name}: {'says nothing' if result is False else result}")
    return int(any(isinstance(result, str) for result in found.values()))


def minimize(backend: str, seed: int, chunk: int, cases: int) -> int:
    """Find a chunk's failures again, and the smallest call for each property that fails."""
    import calls
    import properties

    failing = set()

    def collect(call) -> None:
        found = properties.examine(call, backend)
        failing.update(name for name, result in found.items() if isinstance(result, str))

    calls.draw_calls(collect, backend, seed_of(seed, chunk), cases)
    for name in sorted(failing):
        smallest, error = smallest_failure(name, backend, seed, chunk, cases)
        print(f"{name}: {error}\n  --call '{smallest}'", flush=True)
    return int(bool(failing))


def smallest_failure(name: str, backend: str, seed: int, chunk: int, cases: int) -> tuple[str, str]:
    """The smallest call found for which a property fails, as JSON, and how."""
    import calls
    import properties

    last = []

    def use(call) -> None:
        result = properties.examine(call, backend, (name,))[name]
        if isinstance(result, str):
            last[:] = [call.to_json(), result]
            raise AssertionError(result)

    try:
        calls.draw_calls(use, backend, seed_of(seed, chunk), cases, shrink=True)
    except AssertionError:
        pass
    smallest, error = last
    return smallest, error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu", choices=("cpu", "reference", "triton", "cuda"))
    parser.add_argument("--cases", type=int, default=20_000, help="how many (default: 20000)")
    parser.add_argument(
        "--seed", type=int, help="of the run (default: the unfinished one's, or new)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: cores)"
    )
    parser.add_argument("--most-failures", type=int, default=100, help="stop there (default: 100)")
    parser.add_argument(
        "--state", type=Path, default=ROOT / "build" / "fuzz", help="of unfinished runs"
    )
    parser.add_argument("--summary", type=Path, help="JSON file to write when the run is whole")
    parser.add_argument("--call", help="check one call, given as JSON")
    parser.add_argument(
        "--chunk", type=int, help="run one chunk of --seed and minimize its failures"
    )
    options = parser.parse_args()
    if options.chunk is not None and options.seed is None:
        parser.error("--chunk needs the --seed of its run")
    if options.call:
        prepare(options.backend)
        return replay(options.call, options.backend)
    if options.chunk is not None:
        prepare(options.backend)
        return minimize(options.backend, options.seed, options.chunk, CHUNK)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
