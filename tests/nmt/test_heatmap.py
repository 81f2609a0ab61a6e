"""Attention pictures: what stands at their sides, and their size."""

import struct

import torch

from attn_ext.nmt import heatmap
from attn_ext.nmt.translator import Attention


def test_labels():
    pieces = [
        "▁rot",
        "es",
        ".",
        "▁",
        "<0xE2>",
        "<0x82>",
        "<0xAC>",
        "<0x78>",
        "▁(",
        "<0xC3>",
        "</s>",
    ]
    assert heatmap.labels(pieces) == [
        "rot", "·es", ".", "␣", "€", "", "", "·x", "(", "·<0xC3>", "</s>"
    ]  # fmt: skip


def test_long_sentences_make_no_huge_picture(tmp_path, monkeypatch):
    assert heatmap.LARGEST_SIDE <= 40
    monkeypatch.setattr(heatmap, "LARGEST_SIDE", 10.0)  # the largest takes seconds to draw
    pieces = ["▁wort"] * 700
    path = tmp_path / "x.png"
    attention = Attention(pieces, pieces, torch.rand(700, 700), "wort " * 700)
    heatmap.draw(path, attention, title=attention.target)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert max(width, height) <= heatmap.LARGEST_SIDE * 130
