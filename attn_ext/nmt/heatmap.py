"""Attention pictures: which source tokens each target token was written from."""

import io
import warnings

import torch

from attn_ext.nmt.cli import atomic_write, require
from attn_ext.nmt.data import make_batch
from attn_ext.nmt.search import translate


@torch.inference_mode()
def align(model, vocabulary, source, target=None, beam=1, device="cpu"):
    """Attention between a source text and its translation (or a given target text).

    Returns:
        (source pieces, target pieces, weights (target, source) on the CPU, target text), both sides
        with their end mark.
    """
    source_ids = vocabulary.encode(source)
    if target is None:
        ((target, _, target_ids),) = translate(model, vocabulary, [source], beam, device=device)
    else:
        target_ids = vocabulary.encode(target)
    batch = make_batch([(source_ids, target_ids)], vocabulary, device)
    (weights,) = model.eval().alignments(batch)
    return (
        vocabulary.pieces(batch.source.values),
        vocabulary.pieces(batch.target_output.values),
        weights.float().cpu(),
        target,
    )


def draw(path, source_pieces, target_pieces, weights, title=None):
    """Write a PNG heat map, source tokens left to right, target tokens top to bottom."""
    figure_module = require("matplotlib.figure")
    columns, rows = len(source_pieces), len(target_pieces)
    figure = figure_module.Figure(
        figsize=(2.6 + 0.36 * columns, 2.0 + 0.30 * rows), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(columns), _labels(source_pieces), rotation=90, parse_math=False)
    axes.set_yticks(range(rows), _labels(target_pieces), parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if title:
        axes.set_xlabel(_printable(title), parse_math=False, fontsize=9, loc="left")
    figure.colorbar(image, ax=axes, label="attention weight", pad=0.02)
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; the picture is still of use.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(content, format="png", dpi=130)
    atomic_write(path, content.getvalue())


def _labels(pieces):
    """Words as a person writes them; a piece that goes on inside a word starts with a dot."""
    return [_label(_printable(piece)) for piece in pieces]


def _label(piece):
    if piece in ("<s>", "</s>", "▁"):
        return piece
    return piece[1:] if piece.startswith("▁") else f"·{piece}"


def _printable(text):
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
