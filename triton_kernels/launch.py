"""Launchers of the Triton kernels: one function for each op of :mod:`attn_ext.ops`.

Arguments are those of the op without ``backend``, in the internal form of :mod:`attn_ext.layout`.
No value of a tensor is read on the host, except for a bound on lengths that was not given.
"""

from .launch_backward import (
    additive_attention_backward,
    additive_attention_memory_backward,
)
from .launch_forward import additive_attention_forward
from .pool import additive_pool_backward, additive_pool_forward
from .step import additive_attention_step_backward

__all__ = [
    "additive_attention_backward",
    "additive_attention_forward",
    "additive_attention_memory_backward",
    "additive_attention_step_backward",
    "additive_pool_backward",
    "additive_pool_forward",
]
