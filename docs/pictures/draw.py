"""Draw the pictures of README and documentation again: python docs/pictures/draw.py

layouts.svg    three ways to keep a batch in memory
routes.svg     errors of scores: measured here, on the CPU, in seconds, from a fixed seed
speed.svg      times and memory, from benchmarks/results/
"""

import json
from pathlib import Path

import matplotlib
import torch

import attn_ext

matplotlib.use("Agg")
from matplotlib import patches, pyplot

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parents[1] / "benchmarks" / "results"
COLOURS = ("#4c78a8", "#f58518", "#54a24b")
LENGTHS = (3, 5, 2)


def save(figure, name: str) -> None:
    figure.savefig(FOLDER / name, metadata={"Date": None})
    pyplot.close(figure)


def cell(axes, x: float, y: float, colour: str | None) -> None:
    """A row of features, of a sequence or, without a colour, of padding."""
    style = {"facecolor": colour} if colour else {"facecolor": "white", "hatch": "////"}
    axes.add_patch(patches.Rectangle((x, y), 0.92, 0.8, edgecolor="#444444", lw=0.8, **style))


def buffer_of_rows(axes, y: float) -> None:
    """All sequences one after the other."""
    x = 0
    for length, colour in zip(LENGTHS, COLOURS):
        for _ in range(length):
            cell(axes, x, y, colour)
            x += 1


def draw_layouts() -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
    for row, (length, colour) in enumerate(zip(LENGTHS, COLOURS)):
        for place in range(max(LENGTHS)):
            cell(axes, place, 7.6 - row, colour if place < length else None)
    axes.text(0, 8.6, "padded: key (3, 5, D)", fontsize=11, weight="bold")
    axes.text(5.4, 7.9, "key_lengths = [3, 5, 2], or", fontsize=10)
    axes.text(5.4, 7.3, "key_padding_mask (3, 5), True = ignore", fontsize=10)
    axes.text(5.4, 6.1, "hatched: memory without content", fontsize=10)
    axes.text(0, 4.6, "jagged: key (10, D)", fontsize=11, weight="bold")
    buffer_of_rows(axes, 3.6)
    starts = [0]
    for length in LENGTHS:
        starts.append(starts[-1] + length)
    for start in starts:
        axes.annotate(
            str(start),
            (start - 0.04, 3.55),
            (start - 0.04, 2.75),
            ha="center",
            fontsize=10,
            arrowprops={"arrowstyle": "->", "color": "#444444"},
        )
    axes.text(10.5, 2.8, "cu_seqlens_k", fontsize=10)
    axes.text(0, 1.6, "nested: the same memory as one object", fontsize=11, weight="bold")
    outline = patches.FancyBboxPatch(
        (-0.1, 0.45), 10.15, 1.0, boxstyle="round,pad=0.05", fill=False, edgecolor="#444444"
    )
    axes.add_patch(outline)
    buffer_of_rows(axes, 0.55)
    axes.text(10.5, 0.8, "offsets inside", fontsize=10)
    axes.set_xlim(-0.4, 13.4)
    axes.set_ylim(0.2, 9.2)
    axes.axis("off")
    save(figure, "layouts.svg")


def factored(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The factored form in every case, without the routes that guard it."""
    z = torch.exp(2 * query).unsqueeze(1) * torch.exp(2 * key).unsqueeze(0)
    return ((z - 1) / (z + 1)) @ weight


def plain(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(query.unsqueeze(1) + key.unsqueeze(0)) @ weight


def fused(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return attn_ext.additive_scores(query.unsqueeze(0), key.unsqueeze(0), weight)[0]


def draw_routes() -> None:
    torch.manual_seed(0)
    magnitudes = torch.logspace(-6, 4, 41).tolist()
    styles = {
        "eager: tanh of every pair": (plain, "#777777", "--"),
        "the factored form alone": (factored, COLOURS[1], "-"),
        "attn_ext, which chooses": (fused, COLOURS[0], "-"),
    }
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    drawn = [torch.randn(32, 256), torch.randn(32, 256), torch.randn(256) / 16]
    for label, (function, colour, line) in styles.items():
        errors = []
        for magnitude in magnitudes:
            inputs = [drawn[0] * magnitude, drawn[1] * magnitude, drawn[2]]
            exact = plain(*(tensor.double() for tensor in inputs))
            error = (function(*inputs) - exact).abs().max() / exact.abs().max()
            errors.append(float(error))
        axes.plot(magnitudes, errors, line, color=colour, label=label)
        lost = [magnitude for magnitude, error in zip(magnitudes, errors) if error != error]
        if lost:
            axes.axvspan(lost[0], magnitudes[-1], color=colour, alpha=0.15)
            axes.text(lost[0] * 1.2, 1e-3, "NaN", color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("magnitude of queries and keys")
    axes.set_ylabel("largest error / largest score")
    axes.set_title("float32 scores against float64: 32 queries, 32 keys, D = 256", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, "routes.svg")


def draw_speed() -> None:
    results = json.loads((RESULTS / "additive_attention_amd-epyc_float32.json").read_text())
    machine = results["machine"]
    cases = {"gnmt": "64 GNMT sentences,\nall at once", "step-decoder": "64 sentences,\n30 steps"}
    names = {"eager": "eager PyTorch", "compile": "torch.compile", "cpu": "attn_ext"}
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
    wanted = [
        ("median", 1e3, "ms", "time of forward + backward"),
        ("peak_bytes", 1e-6, "MB", "peak memory beyond the inputs"),
    ]
    for axes, (field, unit, name, title) in zip(panels, wanted):
        for number, (provider, label) in enumerate(names.items()):
            values = [
                row[field] * unit
                for case in cases
                for row in results["rows"]
                if (row["workload"], row["mode"], row["threads"], row["provider"])
                == (case, "both", 1, provider)
            ]
            places = [place + 0.27 * number for place in range(len(cases))]
            colour = ("#bbbbbb", COLOURS[1], COLOURS[0])[number]
            bars = axes.barh(places, values, 0.25, color=colour, label=label)
            axes.bar_label(bars, [f"{value:,.0f} {name}" for value in values], padding=3)
        axes.set_xscale("log")
        axes.set_xlim(8, 2e4)
        axes.set_title(title, fontsize=10)
        axes.set_yticks([place + 0.27 for place in range(len(cases))], cases.values())
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[1].legend(fontsize=8, loc="lower right")
    machine_text = (
        f"{machine['name'].split(',')[0]}, {machine['isa']}, one thread, float32, log scales"
    )
    figure.supxlabel(f"{machine_text}, torch {machine['torch']}, {machine['date']}", fontsize=9)
    save(figure, "speed.svg")


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "attn_ext"
    draw_layouts()
    draw_routes()
    draw_speed()
