"""Time additive attention on the shapes people run, beside what users would pick instead.

python -m benchmarks.bench_additive_attention            the table of the README
python -m benchmarks.bench_additive_attention --help     other workloads, dtypes, threads
"""

import argparse
import json
import os
import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from . import harness, plots, providers
from .workloads import WORKLOADS, Workload, uniform

RESULTS = Path(__file__).parent / "results"
TABLE = ("equal", "gnmt", "step-decoder", "one-long", "skewed")
EAGER_ONLY = ("one-long", "mil")  # one query: nothing that a compiler could fuse across queries
RIVALS = (*providers.PEERS, "level")  # whose times are divided by a row's
DTYPES = ("float32", "bfloat16", "float16")
TOKENS = (1_000, 2_000, 4_000, 8_000, 16_000)  # keys in all, for the scaling plot
BATCHES = (4, 16, 64, 256)


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    rows, peaks = [], {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        peaks[threads] = harness.measured_peaks(options.device)
        print(f"{threads} threads:", ", ".join(f"{k} {v:.3g}" for k, v in peaks[threads].items()))
        for name in options.workloads:
            rows += bench_workload(WORKLOADS[name], threads, options)
    report = {
        "machine": machine(options.device),
        "peaks_by_threads": peaks,
        "dtype": options.dtype,
        "rows": rows,
    }
    if options.more:
        report["dtypes"] = bench_dtypes(options)
        report["scaling"] = bench_scaling(options)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"additive_attention_{report['machine']['slug']}_{options.dtype}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    title = f"attn_ext.additive_attention, {options.dtype}, {report['machine']['name']}"
    plots.draw_ratios(rows, title, stem.with_suffix(".png"))
    print(f"\nwrote {stem.with_suffix('.json')} and {stem.with_suffix('.png')}")
    if options.more:
        path = stem.with_name(stem.name + "_scaling.png")
        plots.draw_scaling(report["scaling"], title, path)
        print(f"wrote {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    known = f"all, or some of {','.join(WORKLOADS)} (default {','.join(TABLE)})"
    parser.add_argument("--workloads", type=_names(WORKLOADS), default=list(TABLE), help=known)
    known = f"some of {','.join(harness.MODES)} (default forward,both)"
    parser.add_argument(
        "--modes", type=_names(harness.MODES), default=["forward", "both"], help=known
    )
    known = f"some of {','.join(providers.PEERS)},triton,cuda,cpu (default: what runs here)"
    parser.add_argument("--providers", type=lambda text: text.split(","), help=known)
    parser.add_argument("--threads", type=_counts, help="e.g. 1,2 (default: one and all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="budget a workload and mode")
    parser.add_argument(
        "--more", action="store_true", help="also compare dtypes, and time against tokens and batch"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    usable = providers.available(options.device)
    options.providers = options.providers or usable
    for name in options.providers:
        if name not in usable:
            parser.error(f"--providers: {name} is not available here; have {', '.join(usable)}")
    ours = [name for name in options.providers if name not in providers.PEERS]
    if not ours:
        parser.error(f"--providers: none of attn_ext's is among {', '.join(options.providers)}")
    options.ours = ours[-1]
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


def bench_workload(workload: Workload, threads: int, options: argparse.Namespace) -> list[dict]:
    """Rows of one workload: a time a provider and mode, with ratios to those of the peers."""
    torch.compiler.reset()
    dtype = getattr(torch, options.dtype)
    if workload.name == "skewed":  # padded, it would need 1,001 x 50,000 rows
        cases = {
            name: harness.make_cases(WORKLOADS[name], [options.ours], dtype, options.device)[
                options.ours
            ]
            for name in ("level", "skewed")
        }
    else:
        skipped = ("compile",) if workload.name in EAGER_ONLY else ()
        names = [name for name in options.providers if name not in skipped]
        cases = harness.make_cases(workload, names, dtype, options.device)
    rows = []
    for mode in options.modes:
        timings = harness.time_cases(cases, mode, options.seconds)
        print(f"\n{workload.name}: {workload.description}; {mode}, {threads} threads")
        for name, timing in timings.items():
            memory = harness.peak_memory(cases[name], mode, options.device)
            ratios = {
                f"vs_{peer}": timings[peer].median / timing.median
                for peer in RIVALS
                if peer in timings and name not in RIVALS
            }
            rate = workload.pairs * workload.dim / timing.median
            row = {
                "workload": workload.name,
                "shape": WORKLOADS.get(name, workload).description,
                "mode": mode,
                "threads": threads,
                "provider": name,
                **asdict(timing),
                "elements_per_second": rate,
                "peak_bytes": memory,
                **ratios,
            }
            rows.append(row)
            print(format_row(row), flush=True)
    return rows


def format_row(row: dict) -> str:
    ratios = "".join(
        f"  {row[f'vs_{peer}']:5.2f}x {peer}" for peer in RIVALS if f"vs_{peer}" in row
    )
    return (
        f"  {row['provider']:10s} {row['median'] * 1e3:9.2f} ms "
        f"[{row['low'] * 1e3:.2f} .. {row['high'] * 1e3:.2f}, n={row['rounds']}] "
        f"{row['elements_per_second'] / 1e9:6.2f} G elements/s "
        f"{row['peak_bytes'] / 1e6:8.1f} MB{ratios}"
    )


def bench_dtypes(options: argparse.Namespace) -> list[dict]:
    """Time of the best provider in each dtype, on the same numbers."""
    provider, rows = options.ours, []
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


def bench_scaling(options: argparse.Namespace) -> dict[str, list[dict]]:
    """Time of the best provider against tokens at a fixed batch, and against batch."""
    provider = options.ours
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
    isa = torch.backends.cpu.get_cpu_capability()
    suffix = "" if device == "cuda" else f", {os.cpu_count()} cores"
    return {
        "name": name + suffix,
        "slug": "".join(c if c.isalnum() else "-" for c in name.lower()),
        "isa": isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
