"""Pictures of benchmark results."""

from pathlib import Path

MODE_LABELS = {"forward": "fwd", "backward": "bwd", "both": "fwd + bwd"}
PEER_COLOURS = {"vs_eager": "tab:blue", "vs_compile": "tab:orange", "vs_cudnn": "tab:green"}


def draw_ratios(rows: list[dict], title: str, path: Path) -> None:
    """Bars: how many times faster than each peer, a group a workload, mode and thread count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = [row for row in rows if any(peer in row for peer in PEER_COLOURS)]
    if not ours:
        return
    figure, axes = pyplot.subplots(
        figsize=(8, max(2.5, 0.5 + 0.42 * len(ours))), layout="constrained"
    )
    drawn = [peer for peer in PEER_COLOURS if any(peer in row for row in ours)]
    height = 0.8 / len(drawn)
    for number, peer in enumerate(drawn):
        offset = (number - (len(drawn) - 1) / 2) * height
        places = [place + offset for place, row in enumerate(ours) if peer in row]
        ratios = [row[peer] for row in ours if peer in row]
        label, colour = f"{peer[3:]} time / ours", PEER_COLOURS[peer]
        bars = axes.barh(places, ratios, height=0.95 * height, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f×", padding=3, fontsize=8)
    labels = [
        f"{row['workload']}, {MODE_LABELS[row['mode']]}"
        f", {row['threads']} thr" + (f" ({row['provider']})" if row["provider"] != "cpu" else "")
        for row in ours
    ]
    axes.set_yticks(range(len(ours)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0.8, 2 * max(row[peer] for row in ours for peer in drawn if peer in row))
    axes.set_xlabel("times faster (log scale)")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_scaling(sweeps: dict[str, list[dict]], title: str, path: Path) -> None:
    """Lines: time against keys in all at a fixed batch, and against batch at fixed keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    titles = {"tokens": "keys in all (16 sequences)", "batch": "sequences (8,000 keys in all)"}
    for panel, (axis, points) in zip(panels, sweeps.items(), strict=True):
        for mode in dict.fromkeys(point["mode"] for point in points):
            line = [point for point in points if point["mode"] == mode]
            x = [point["keys"] if axis == "tokens" else point["x"] for point in line]
            panel.plot(
                x, [point["median"] * 1e3 for point in line], marker="o", label=MODE_LABELS[mode]
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(titles[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, 32 queries a sequence, D = Dv = 256")
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
