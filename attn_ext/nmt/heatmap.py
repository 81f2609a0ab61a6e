"""Attention pictures: which source tokens each target token was written from."""

import contextlib
import io
import re
import textwrap
import unicodedata
import warnings

from attn_ext.nmt.cli import atomic_write, require

LARGEST_SIDE = 40.0  # inches; a picture of 5200 pixels
MOST_LABELS = 60  # along a side
TITLE_CHARACTER, TITLE_LINE = 0.075, 0.15  # inches, at 9 points


def draw(path, attention, title=None):
    """Write a PNG heat map, source tokens left to right, target tokens top to bottom.

    Args:
        path: of the picture; its folder is made where it is missing.
        attention: of `Translator.attention`.
        title: text below the picture, wrapped to its width.
    """
    source_pieces, target_pieces = attention.source_pieces, attention.target_pieces
    figure_module = require("matplotlib.figure")
    columns, rows = len(source_pieces), len(target_pieces)
    width = min(2.6 + 0.36 * columns, LARGEST_SIDE)
    height = min(2.0 + 0.30 * rows, LARGEST_SIDE)
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(attention.weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    every = -(-columns // MOST_LABELS)
    axes.set_xticks(
        range(0, columns, every), labels(source_pieces)[::every], rotation=90, parse_math=False
    )
    every = -(-rows // MOST_LABELS)
    axes.set_yticks(range(0, rows, every), labels(target_pieces)[::every], parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    if max(columns, rows) <= MOST_LABELS:
        axes.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if title:
        characters = max(18, int((width - 1.6) / TITLE_CHARACTER))
        lines = [
            part
            for line in _printable(title).split("\n")
            for part in textwrap.wrap(line, characters)
        ]
        figure.set_figheight(min(height + TITLE_LINE * max(0, len(lines) - 2), LARGEST_SIDE))
        axes.set_xlabel("\n".join(lines), parse_math=False, fontsize=9, loc="left")
    figure.colorbar(image, ax=axes, label="attention weight", pad=0.02)
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; the picture is still of use.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(content, format="png", dpi=130)
    atomic_write(path, content.getvalue())


def labels(pieces):
    """Words as a person writes them, one label a piece.

    A piece that goes on inside a word starts with a dot. The bytes of a character are labelled with
    the character at the first of them and with nothing at the others.
    """
    texts, position = [], 0
    while position < len(pieces):
        character, size = _character(pieces[position : position + 4])
        texts.append(_label(_printable(character or pieces[position])))
        texts += [""] * (size - 1)
        position += size
    return texts


def _character(pieces):
    """The character that the first pieces spell in bytes, or None, and how many pieces it takes."""
    matches = [re.fullmatch(r"<0x([0-9A-F]{2})>", piece) for piece in pieces]
    for size in range(1, len(pieces) + 1):
        if not all(matches[:size]):
            break
        with contextlib.suppress(UnicodeDecodeError):
            return bytes(int(match[1], 16) for match in matches[:size]).decode(), size
    return None, 1


def _label(piece):
    if piece == "▁":
        return "␣"
    if piece.startswith("▁"):
        return piece[1:]
    if piece in ("<s>", "</s>") or all(unicodedata.category(c)[0] in "PS" for c in piece):
        return piece
    return f"·{piece}"


def _printable(text):
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
