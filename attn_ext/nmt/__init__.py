"""Training and using an RNN translation model on top of `attn_ext`'s public API.

    python -m attn_ext.nmt.prepare --out DIR FILE...
    python -m attn_ext.nmt.train --out DIR
    python -m attn_ext.nmt.translate --model DIR < in.txt > out.txt
    python -m attn_ext.nmt.plot --model DIR --source "..." --out x.png

A reader goes train -> training -> {data, model, checkpoint, evaluation} -> search, and for more
pairs than fit into memory prepare -> runs, then shards; nothing here is imported by the rest of the
package.
"""
