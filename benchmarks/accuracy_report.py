"""The table and the plot of benchmarks.accuracy."""

from pathlib import Path

FORWARD = ("context", "weights")
GRADIENTS = ("dquery", "dkey", "dvalue", "dscore_weight")
DTYPES = ("float32", "float16", "bfloat16", "float64")
SMALLEST = {
    "float32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
    "float64": 2.0**-1022,
}
STYLES = {"cpu": "-", "reference": "-.", "triton": "--", "cuda": ":"}
NOT_PROVIDERS = ("magnitude", "dtype", "features", "keys", "scale", "budget", "eager")


def rounded(row: dict) -> dict:
    """The row with three significant digits."""
    return {
        name: {key: float(f"{number:.3g}") for key, number in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in row.items()
    }


def providers(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name not in NOT_PROVIDERS))


def shares(rows: list[dict], provider: str, results: tuple[str, ...]) -> list[float]:
    """Error over budget of each row and result."""
    return [
        row[provider][name] / row["budget"][name]
        for row in rows
        if provider in row
        for name in results
    ]


def relative(rows: list[dict], provider: str, results: tuple[str, ...]) -> list[float]:
    """Error over the result's scale, of results that their dtype has normal numbers for."""
    return [
        row[provider][name] / row["scale"][name]
        for row in rows
        if provider in row
        for name in results
        if row["scale"][name] >= SMALLEST[row["dtype"]]
    ]


def table(rows: list[dict], machine: dict[str, str]) -> str:
    """Markdown: the largest errors by dtype and provider, and by magnitude."""
    lines = ["# Errors against float64", ""]
    lines += [", ".join(f"{name}: {value}" for name, value in machine.items()) + ".", ""]
    sizes = [sorted({row[name] for row in rows}) for name in ("magnitude", "features", "keys")]
    lines += [
        f"Magnitudes of queries and keys {sizes[0]}, features {sizes[1]}, keys {sizes[2]}: "
        f"{len(rows)} points. Made by `python -m benchmarks.accuracy`.",
        "",
        "The largest error as a part of the budget (1 is all of it), over all points, and how many "
        "points a provider computed:",
        "",
        "| dtype | provider | points | context | weights | " + " | ".join(GRADIENTS) + " |",
        "|---|---|---|" + "---|" * 6,
    ]
    for dtype in DTYPES:
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for provider in providers(rows):
            count = sum(provider in row for row in of_dtype)
            if count:
                cells = [
                    f"{max(shares(of_dtype, provider, (name,))):.2f}"
                    for name in FORWARD + GRADIENTS
                ]
                lines.append(f"| {dtype} | {provider} | {count} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Median and largest error over the result's scale, of results that are not subnormal, by "
        "magnitude. Eager's is the largest of two orders of summation and, below 2^20 elements, of "
        "six calculations whose results are rounded at random:",
        "",
        "| dtype | provider | " + " | ".join(f"{magnitude:g}" for magnitude in sizes[0]) + " |",
        "|---|---|" + "---|" * len(sizes[0]),
    ]
    for dtype in DTYPES:
        for provider in ("eager", *providers(rows)):
            cells = []
            for magnitude in sizes[0]:
                here = [r for r in rows if (r["dtype"], r["magnitude"]) == (dtype, magnitude)]
                found = sorted(relative(here, provider, FORWARD + GRADIENTS))
                cells.append(f"{found[len(found) // 2]:.0e}, {found[-1]:.0e}" if found else "")
            if any(cells):
                lines.append(f"| {dtype} | {provider} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], machine: dict[str, str], path: Path) -> None:
    """Panels by dtype, forward above gradients: error over scale against magnitude."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    magnitudes = sorted({row["magnitude"] for row in rows})
    figure, panels = pyplot.subplots(
        2, len(dtypes), figsize=(3.6 * len(dtypes), 7), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, dtype in enumerate(dtypes):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for panel, results in zip(panels[:, column], (FORWARD, GRADIENTS), strict=True):
            _draw_panel(panel, of_dtype, results, magnitudes)
        panels[0, column].set_title(dtype)
        panels[1, column].set_xlabel("magnitude of queries and keys")
    panels[0, 0].set_ylabel("context and weights:\nlargest error / scale")
    panels[1, 0].set_ylabel("gradients:\nlargest error / scale")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    place = machine["processor"] if machine["gpu"] == "none" else machine["gpu"]
    figure.suptitle(
        f"Errors against float64 over all features and keys ({place}, {machine['date']})",
        fontsize=11,
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw_panel(panel, rows: list[dict], results: tuple[str, ...], magnitudes: list[float]) -> None:
    def line(provider: str, choose) -> tuple[list[float], list[float]]:
        points = []
        for magnitude in magnitudes:
            here = [row for row in rows if row["magnitude"] == magnitude]
            found = [error for error in relative(here, provider, results) if error > 0]
            if found:
                points.append((magnitude, choose(found)))
        return [x for x, _ in points], [y for _, y in points]

    x, low = line("eager", min)
    panel.fill_between(
        x, low, line("eager", max)[1], color="0.85", label="eager, smallest to largest"
    )
    panel.plot(*line("budget", max), color="black", linewidth=1.5, label="budget, largest")
    for number, provider in enumerate(providers(rows)):
        style = STYLES[provider.partition(",")[0]]
        panel.plot(
            *line(provider, max),
            style,
            color=f"C{number}",
            marker=".",
            linewidth=1.2,
            label=provider,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
