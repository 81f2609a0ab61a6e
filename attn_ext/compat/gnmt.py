"""The attention of NVIDIA's GNMT."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import additive_attention
from .replacement import Replacement


class GNMTBahdanauAttention(Replacement):
    """``BahdanauAttention`` of NVIDIA's GNMT, plain or normalised.

    Parameters: ``linear_q``, ``linear_k``, ``linear_att`` and, normalised, ``normalize_scalar`` and
    ``normalize_bias``.
    """

    original = "seq2seq.models.attention.BahdanauAttention"
    package = "NVIDIA's DeepLearningExamples"
    sizes: ClassVar[tuple[str, ...]] = ("num_units", "normalize", "batch_first")
    layers: ClassVar[tuple[str, ...]] = ("linear_q", "linear_k")
    normalize_scalar: nn.Parameter | None
    normalize_bias: nn.Parameter | None
    num_units: int
    normalize: bool
    batch_first: bool
    linear_q: nn.Linear
    linear_k: nn.Linear
    linear_att: nn.Parameter

    def __init__(
        self,
        query_size: int,
        key_size: int,
        num_units: int,
        normalize: bool = False,
        batch_first: bool = False,
        init_weight: float = 0.1,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.num_units, self.normalize, self.batch_first = num_units, normalize, batch_first
        self.backend = backend
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.empty(num_units))
        for weight in (self.linear_q.weight, self.linear_k.weight, self.linear_att):
            nn.init.uniform_(weight, -init_weight, init_weight)
        scalar = nn.Parameter(torch.full((1,), num_units**-0.5)) if normalize else None
        self.register_parameter("normalize_scalar", scalar)
        bias = nn.Parameter(torch.zeros(num_units)) if normalize else None
        self.register_parameter("normalize_bias", bias)
        self.mask: Tensor | None = None

    @classmethod
    def from_original(
        cls, module: Any, *, backend: str | None = None, path: str = "module"
    ) -> "GNMTBahdanauAttention":
        ours = super().from_original(module, backend=backend, path=path)
        ours.mask = getattr(module, "mask", None)
        return ours

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        widths = {"query_size": module.linear_q, "key_size": module.linear_k}
        widths = {name: linear.in_features for name, linear in widths.items()}
        return {**super()._arguments(module), **widths}

    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        """Set ``self.mask`` ``(B, Tk)``, True = ignore, from lengths ``(B,)`` of ``context``."""
        rows = context.size(1 if self.batch_first else 0)
        self.mask = torch.arange(rows, device=context.device) >= context_len.unsqueeze(1)

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: ``(B, Tq, query_size)`` if ``batch_first``, else ``(Tq, B, query_size)``; or
                ``(B, query_size)``.
            keys: ``(B, Tk, key_size)`` or ``(Tk, B, key_size)``; also the values.

        Returns:
            The context as query with ``key_size`` features, and the weights ``(B, Tq, Tk)`` or
            ``(Tq, B, Tk)``, without Tq for one query.
        """
        transposes = not self.batch_first and query.dim() == 3
        if not self.batch_first:
            keys = keys.transpose(0, 1)
        if transposes:
            query = query.transpose(0, 1)
        projected, score_weight = self.linear_q(query), self.linear_att
        if self.normalize_scalar is not None:
            projected = projected + self.normalize_bias
            score_weight = score_weight / score_weight.norm() * self.normalize_scalar
        context, weights = additive_attention(
            projected,
            self.linear_k(keys),
            keys,
            score_weight,
            key_padding_mask=self.mask,
            need_weights=True,
            backend=self.backend,
        )
        if transposes:
            context, weights = context.transpose(0, 1), weights.transpose(0, 1)
        return context, weights
