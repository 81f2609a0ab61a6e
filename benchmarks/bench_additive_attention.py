"""Time additive attention on the shapes people run, beside what users would pick instead.

python -m benchmarks.bench_additive_attention            the table of the README
python -m benchmarks.bench_additive_attention --help     other workloads, dtypes, threads
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from . import harness, plots, providers, reach
from .floors import floor
from .workloads import WORKLOADS, Workload, mixture, uniform

RESULTS = Path(__file__).parent / "results"
TABLES = {
    "cpu": ("equal", "gnmt", "step-decoder", "one-long", "bags", "long-source", "skewed"),
    "cuda": (
        *("at-once", "gnmt-384", "step", "one-long-512", "skewed-512", "step-decoder", "graph"),
    ),
}
MODES = {"cpu": ("forward", "both"), "cuda": harness.MODES}
DEFAULT_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# One query: nothing that a compiler could fuse across queries.
EAGER_ONLY = ("one-long", "one-long-512", "bags", "mil")
# Whose calls, on a CUDA device, are also replayed as a CUDA graph: else the host would be timed.
CAPTURED = ("step", "one-long-512", "skewed-512", "step-decoder")
RIVALS = ("eager", "compile", "cudnn", "eager+graph", "compile+graph", "level")  # of ratios
DTYPES = ("float32", "bfloat16", "float16")
TOKENS = (1_000, 2_000, 4_000, 8_000, 16_000)  # keys in all, for the scaling plot
BATCHES = (4, 16, 64, 256)
DIMS = (128, 256, 512, 1000, 1024, 2048)


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    for name in providers.PEERS:
        reason = providers.problem(name, options.device)
        if reason is not None:
            print(f"{name}: not available: {reason}")
    report = {"machine": machine(options.device), "dtype": options.dtype}
    rows, peaks, failures = [], {}, []
    for threads in options.threads:
        torch.set_num_threads(threads)
        peaks[threads] = harness.measured_peaks(options.device)
        print(f"{threads} threads:", ", ".join(f"{k} {v:.3g}" for k, v in peaks[threads].items()))
        for name in options.workloads:
            try:
                rows += bench_workload(WORKLOADS[name], threads, peaks[threads], options)
            except Exception as error:  # Triton's too: the other workloads still count
                failures.append(f"{name}, {threads} threads: {type(error).__name__}: {error}")
                print(f"\nFAILED {failures[-1]}", flush=True)
    report |= {"peaks_by_threads": peaks, "rows": rows, "failures": failures}
    if options.more:
        report["dtypes"] = bench_dtypes(options)
        report["dims"] = bench_dims(peaks[options.threads[-1]], options)
        report["scaling"] = bench_scaling(options)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"additive_attention_{report['machine']['slug']}_{options.dtype}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {stem.with_suffix('.json')}")
    try:
        draw(report, stem)
    except ImportError as error:
        print(f"nothing drawn: {error}")
    if failures:
        raise SystemExit("failed: " + "; ".join(failures))


def draw(report: dict, stem: Path) -> None:
    title = f"attn_ext.additive_attention, {report['dtype']}, {report['machine']['name']}"
    plots.draw_ratios(report["rows"], title, stem.with_suffix(".png"))
    print(f"wrote {stem.with_suffix('.png')}")
    if "scaling" in report:
        path = stem.with_name(stem.name + "_scaling.png")
        plots.draw_scaling(report["scaling"], title, path)
        print(f"wrote {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    known = "default float32 on a CPU, bfloat16 on a GPU"
    parser.add_argument("--dtype", choices=DTYPES, help=known)
    known = f"all, or some of {','.join(WORKLOADS)} (default: the table of the device)"
    parser.add_argument("--workloads", type=_names(WORKLOADS), help=known)
    known = f"some of {','.join(harness.MODES)} (default: forward,both; all on a GPU)"
    parser.add_argument("--modes", type=_names(harness.MODES), help=known)
    known = f"some of {','.join(providers.PEERS)},triton,cuda,cpu (default: what runs here)"
    parser.add_argument("--providers", type=lambda text: text.split(","), help=known)
    parser.add_argument("--threads", type=_counts, help="e.g. 1,2 (default: one and all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="budget a workload and mode")
    parser.add_argument(
        "--more",
        action="store_true",
        help="also other dtypes and D, and time against tokens and batch",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    options.dtype = options.dtype or DEFAULT_DTYPES[options.device]
    options.workloads = options.workloads or TABLES[options.device]
    options.modes = options.modes or MODES[options.device]
    usable = providers.available(options.device)
    options.providers = options.providers or usable
    for name in options.providers:
        if name not in usable:
            parser.error(f"--providers: {name} is not available here; have {', '.join(usable)}")
    options.ours = [name for name in options.providers if name not in providers.PEERS]
    if not options.ours:
        parser.error(f"--providers: none of attn_ext's is among {', '.join(options.providers)}")
    if options.threads is None:
        options.threads = sorted({1, torch.get_num_threads()}) if options.device == "cpu" else [1]
    return options


def _counts(text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected counts such as 1,2") from None


def _names(known):
    def parse(text: str) -> list[str]:
        names = text.split(",") if text != "all" else list(known)
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: expected some of {', '.join(known)}")
        return names

    return parse


def make_cases(workload: Workload, options: argparse.Namespace) -> dict[str, harness.Case]:
    """A case a provider that takes part; with a level rival also one a provider of that."""
    names = list(options.providers)
    if workload.level:  # padded, it would need 1,001 x 50,000 rows
        names = list(options.ours)
    if workload.name in EAGER_ONLY:
        names = [name for name in names if name != "compile"]
    if not workload.tied:  # a graph's sums are of the nodes that it scores
        names = [name for name in names if name != "cudnn"]
    if workload.name in CAPTURED and options.device == "cuda":
        names += [name + harness.CAPTURED for name in names if name != "cudnn"]
    dtype = getattr(torch, options.dtype)
    cases = harness.make_cases(workload, names, dtype, options.device)
    if workload.level:
        level = harness.make_cases(WORKLOADS[workload.level], names, dtype, options.device)
        cases |= {f"{name} level": case for name, case in level.items()}
    return cases


def bench_workload(
    workload: Workload, threads: int, peaks: dict[str, float], options: argparse.Namespace
) -> list[dict]:
    """Rows of one workload: a time a provider and mode, with ratios to those of the peers."""
    torch.compiler.reset()
    cases = make_cases(workload, options)
    rows = []
    for mode in options.modes:
        timings = harness.time_cases(cases, mode, options.seconds)
        print(f"\n{workload.name}: {workload.description}; {mode}, {threads} threads")
        for name, timing in timings.items():
            case = cases[name]
            shape = WORKLOADS[workload.level] if name.endswith(" level") else workload
            row = {
                "workload": workload.name,
                "shape": shape.description,
                "mode": mode,
                "threads": threads,
                "provider": name,
                "captured": case.is_captured,
                **asdict(timing),
                "elements_per_second": shape.pairs * shape.dim / timing.median,
                "share_of_error_budget": case.error,
                **memory_figures(case, mode, options.device),
            }
            if shape.one_query and not shape.steps:
                moved = shape.bytes_moved(mode, case.doutput.itemsize)
                row["share_of_copy"] = moved / timing.median / peaks["copied_bytes_per_second"]
            at_best = floor(shape, mode, case.doutput.itemsize, peaks)
            if at_best is not None:
                row |= {"share_of_floor": at_best.seconds / timing.median}
                row |= {"bound_by": at_best.bound_by}
            if not case.is_peer and shape is workload:
                row |= ratios(name, timings)
                row["reach"] = reach.verdicts(row, options.device, options.dtype)
            rows.append(row)
            print(format_row(row), flush=True)
    return rows


def ratios(name: str, timings: dict[str, harness.Timing]) -> dict[str, float]:
    """Times of the rivals over that of case ``name``, and the same of processor time."""
    found = {}
    for rival in RIVALS:
        other = timings.get(f"{name} level" if rival == "level" else rival)
        if other is not None:
            found[f"vs_{rival}"] = other.median / timings[name].median
            found[f"slowest_round_vs_{rival}"] = other.median / timings[name].high
            found[f"processor_vs_{rival}"] = other.processor / timings[name].processor
    return found


def memory_figures(case: harness.Case, mode: str, device: str) -> dict[str, float]:
    """A call's peak beyond its inputs, and inputs and peak over inputs, outputs and gradients."""
    peak = harness.peak_memory(case, mode, device)
    inputs, output = case.input_bytes, case.doutput.nbytes
    before = inputs + (output if mode == "backward" else 0)
    needed = inputs + output + (0 if mode == "forward" else inputs)
    return {"peak_bytes": peak, "memory_ratio": (before + peak) / needed}


def format_row(row: dict) -> str:
    versus = "".join(
        f"  {row[f'vs_{rival}']:.2f}x {rival} ({row[f'processor_vs_{rival}']:.2f}x processor, "
        f"slowest round {row[f'slowest_round_vs_{rival}']:.2f}x)"
        for rival in RIVALS
        if f"vs_{rival}" in row
    )
    share = f"  {row['share_of_copy']:.0%} of copy" if "share_of_copy" in row else ""
    if "share_of_floor" in row:
        share += f"  {row['share_of_floor']:.0%} of what {row['bound_by']} allows"
    verdicts = "".join(f"\n    reach {verdict}" for verdict in row.get("reach", ()))
    return (
        f"  {row['provider']:14s} {row['median'] * 1e3:9.3f} ms "
        f"[{row['low'] * 1e3:.3f} .. {row['high'] * 1e3:.3f}, n={row['rounds']}; "
        f"processor {row['processor'] * 1e3:.3f}, system {row['system'] * 1e3:.3f}, "
        f"{row['faults']:.0f} page faults] "
        f"{row['elements_per_second'] / 1e9:6.2f} G elements/s "
        f"{row['peak_bytes'] / 1e6:8.1f} MB (x{row['memory_ratio']:.2f})  "
        f"error {row['share_of_error_budget']:.2f} of budget{share}{versus}{verdicts}"
    )


def bench_dtypes(options: argparse.Namespace) -> list[dict]:
    """Time of the best provider in each dtype, on the same numbers."""
    provider, rows = options.ours[0], []
    for name in options.workloads:
        cases = {
            dtype: harness.make_cases(
                WORKLOADS[name], [provider], getattr(torch, dtype), options.device
            )[provider]
            for dtype in DTYPES
        }
        for mode in options.modes:
            timings = harness.time_cases(cases, mode, options.seconds / 2)
            for dtype, timing in timings.items():
                ratio = timing.median / timings["float32"].median
                row = {"workload": name, "mode": mode, "dtype": dtype, "provider": provider}
                rows.append({**row, **asdict(timing), "time_vs_float32": ratio})
            ratios = ", ".join(f"{row['dtype']} {row['time_vs_float32']:.2f}x" for row in rows[-3:])
            print(f"{name}, {mode}: time in units of float32's: {ratios}", flush=True)
    return rows


def bench_dims(peaks: dict[str, float], options: argparse.Namespace) -> list[dict]:
    """Rates of attn_ext's providers for each feature size, all at once and in one step."""
    rows, dtype = [], getattr(torch, options.dtype)
    for dim in DIMS:
        keys = mixture(64, 1)
        for name, queries in (("all at once", mixture(64, 2)), ("step", (1,) * len(keys))):
            workload = Workload(name, keys, queries, dim, dim, cold=name == "step")
            suffix = harness.CAPTURED if options.device == "cuda" else ""
            names = [provider + suffix for provider in options.ours]
            cases = harness.make_cases(workload, names, dtype, options.device)
            for mode in options.modes:
                for provider, timing in harness.time_cases(
                    cases, mode, options.seconds / 5
                ).items():
                    rate = workload.pairs * dim / timing.median
                    row = {"workload": name, "dim": dim, "mode": mode, "provider": provider}
                    row |= {**asdict(timing), "elements_per_second": rate}
                    text = f"{rate / 1e9:.2f} G elements/s"
                    if workload.one_query:
                        moved = workload.bytes_moved(mode, dtype.itemsize) / timing.median
                        row["share_of_copy"] = moved / peaks["copied_bytes_per_second"]
                        text += f", {row['share_of_copy']:.0%} of copy"
                    rows.append(row)
                    print(f"D={dim} {name}, {mode}, {provider}: {text}", flush=True)
    return rows


def bench_scaling(options: argparse.Namespace) -> dict[str, list[dict]]:
    """Time of the best provider against tokens at a fixed batch, and against batch."""
    provider = options.ours[0]
    sweeps = {
        "tokens": [("16 sequences", count, 16, count // 16) for count in TOKENS],
        "batch": [("8,000 keys in all", batch, batch, 8_000 // batch) for batch in BATCHES],
    }
    results = {}
    for axis, points in sweeps.items():
        results[axis] = []
        for label, x, batch, length in points:
            keys = uniform(batch, length // 2, length + length // 2, seed=x)
            workload = Workload(f"{axis}-{x}", keys, (32,) * batch, 256, 256)
            dtype = getattr(torch, options.dtype)
            cases = harness.make_cases(workload, [provider], dtype, options.device)
            for mode in options.modes:
                timing = harness.time_cases(cases, mode, options.seconds / 5)[provider]
                point = {"x": x, "keys": sum(keys), "label": label, "mode": mode}
                results[axis].append({**point, "provider": provider, **asdict(timing)})
    return results


def machine(device: str) -> dict[str, str | int]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    suffix = "" if device == "cuda" else f", {os.cpu_count()} cores"
    return {
        "name": name + suffix,
        "slug": "".join(c if c.isalnum() else "-" for c in name.lower()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        **(_cuda_facts() if device == "cuda" else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _cuda_facts() -> dict[str, str | int]:
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem"]
    if shutil.which(command[0]):
        found = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True)
        facts["driver, clocks now, most, memory"] = found.stdout.strip()
    return facts


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
