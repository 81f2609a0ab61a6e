"""Training and using an RNN translation model on top of `attn_ext`'s public API.

    python -m attn_ext.nmt.prepare --out DIR FILE...
    python -m attn_ext.nmt.train --out DIR
    python -m attn_ext.nmt.translate --model DIR < in.txt > out.txt
    python -m attn_ext.nmt.score --model DIR < pairs.tsv > scores.txt
    python -m attn_ext.nmt.align --model DIR < pairs.tsv > alignments.txt
    python -m attn_ext.nmt.plot --model DIR --source "..." --out x.png
    python -m attn_ext.nmt.average --out avg.pt DIR/model-*.pt
    python -m attn_ext.nmt.export --model DIR --out model.pt

In Python, `attn_ext.nmt.load(path)` gives a trained model as a `Translator`.

A reader of training goes train -> training -> {batches, data, model, checkpoint, evaluation}, of
data prepare -> runs, then shards, of use translate -> translator -> {search, forced} -> model;
nothing here is imported by the rest of the package.
"""

from .translator import Attention, Translation, Translator, load

__all__ = ["Attention", "Translation", "Translator", "load"]
