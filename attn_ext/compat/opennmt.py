"""OpenNMT-py's "mlp" attention."""

import contextlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import mismatch
from ..functional import additive_attention
from .plain import attend_by_calls, readable_weight
from .replacement import Replacement


class OpenNMTGlobalAttention(Replacement):
    """``onmt.modules.GlobalAttention(dim, attn_type="mlp")`` of OpenNMT-py 3.

    Parameters: ``linear_context``, ``linear_query``, ``v``, ``linear_out``.
    """

    original = "onmt.modules.global_attention.GlobalAttention"
    package = "OpenNMT-py"
    tested = "3.5.1"
    needs = 'attn_type="mlp", attn_func="softmax", no coverage'
    sizes: ClassVar[tuple[str, ...]] = ("dim", "attn_type", "attn_func")
    layers: ClassVar[tuple[str, ...]] = ("linear_context", "linear_query", "v", "linear_out")
    dim: int
    attn_type: str
    attn_func: str
    linear_context: nn.Linear
    linear_query: nn.Linear
    v: nn.Linear
    linear_out: nn.Linear

    def __init__(
        self,
        dim: int,
        coverage: bool = False,
        attn_type: str = "mlp",
        attn_func: str = "softmax",
        *,
        backend: str | None = None,
    ):
        super().__init__()
        if attn_type != "mlp":
            raise mismatch("attn_type", "'mlp', additive attention", repr(attn_type))
        if attn_func != "softmax":
            raise mismatch("attn_func", "'softmax'", repr(attn_func))
        if coverage:
            raise mismatch("coverage", "False", "True")
        self.dim, self.attn_type, self.attn_func = dim, attn_type, attn_func
        self.backend = backend
        self.linear_context = nn.Linear(dim, dim, bias=False)
        self.linear_query = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(dim * 2, dim)

    @classmethod
    def is_additive(cls, module: Any) -> bool:
        if hasattr(module, "linear_cover") or getattr(module, "attn_type", "mlp") != "mlp":
            return False
        return getattr(module, "attn_func", "softmax") == "softmax"

    @classmethod
    def from_original(
        cls, module: Any, *, backend: str | None = None, path: str = "module"
    ) -> "OpenNMTGlobalAttention":
        if not cls.is_additive(module):  # the constructor names the argument that says so
            with contextlib.suppress(AttributeError):  # of another version, which is told below
                cls(**cls._arguments(module))
        return super().from_original(module, backend=backend, path=path)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {**super()._arguments(module), "coverage": hasattr(module, "linear_cover")}

    def forward(
        self,
        src: Tensor,
        enc_out: Tensor,
        src_len: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend and project the context beside the query.

        Args:
            src: queries ``(B, Tq, dim)``, or ``(B, dim)``.
            enc_out: ``(B, Tk, dim)``.
            src_len: ``(B,)`` lengths of the sources.
            coverage: must be None.

        Returns:
            ``(B, Tq, dim)`` and the weights ``(B, Tq, Tk)``, without Tq for one query.
        """
        if coverage is not None:
            raise mismatch("coverage", "None", "a tensor")
        query, key = self.linear_query(src), self.linear_context(enc_out)
        score_weight = readable_weight(self.v)
        if score_weight is None:
            context, weights = attend_by_calls(self.v, query, key, enc_out, key_lengths=src_len)
        else:
            context, weights = additive_attention(
                query,
                key,
                enc_out,
                score_weight.squeeze(0),
                key_lengths=src_len,
                need_weights=True,
                backend=self.backend,
            )
        return self.linear_out(torch.cat([context, src], -1)), weights
