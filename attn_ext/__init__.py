"""Fused additive (Bahdanau) attention for PyTorch over jagged or padded encoder states."""

from importlib.metadata import version

from . import reference
from .functional import additive_attention, additive_scores
from .memory import AttentionMemory
from .module import AdditiveAttention
from .pool_module import AdditivePool
from .pooling import additive_pool

__all__ = [
    "AdditiveAttention",
    "AdditivePool",
    "AttentionMemory",
    "additive_attention",
    "additive_pool",
    "additive_scores",
    "reference",
]
__version__ = version("attn_ext")
