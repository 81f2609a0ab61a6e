"""JoeyNMT's Bahdanau attention."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import mismatch, shape_of
from ..memory import AttentionMemory
from .plain import attend_by_calls, readable_weight
from .replacement import Stepwise


class JoeyNMTBahdanauAttention(Stepwise):
    """``joeynmt.attention.BahdanauAttention``.

    Parameters: ``key_layer``, ``query_layer``, ``energy_layer``. As there, ``compute_proj_keys`` is
    called before the steps; the values and the mask are prepared at the first step that has them.
    """

    original = "joeynmt.attention.BahdanauAttention"
    package = "joeynmt"
    tested = "2.3.0"
    layers: ClassVar[tuple[str, ...]] = ("key_layer", "query_layer", "energy_layer")
    kept: ClassVar[tuple[str, ...]] = ("proj_keys", "proj_query")
    key_layer: nn.Linear
    query_layer: nn.Linear
    energy_layer: nn.Linear

    def __init__(
        self,
        hidden_size: int = 1,
        key_size: int = 1,
        query_size: int = 1,
        *,
        backend: str | None = None,
    ):
        super().__init__(backend)
        self.key_layer = nn.Linear(key_size, hidden_size, bias=False)
        self.query_layer = nn.Linear(query_size, hidden_size, bias=False)
        self.energy_layer = nn.Linear(hidden_size, 1, bias=False)
        self.proj_keys: Tensor | None = None
        self.proj_query: Tensor | None = None

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {
            "hidden_size": module.energy_layer.in_features,
            "key_size": module.key_layer.in_features,
            "query_size": module.query_layer.in_features,
        }

    def compute_proj_keys(self, keys: Tensor) -> None:
        """Project keys ``(B, Tk, key_size)`` for the steps that follow."""
        self.proj_keys = self.key_layer(keys)
        self._forget()

    def compute_proj_query(self, query: Tensor) -> None:
        """Project the query of a step; :meth:`forward` does it."""
        self.proj_query = self.query_layer(query)

    def forward(self, query: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with one query a sequence.

        Args:
            query: ``(B, 1, query_size)``.
            mask: ``(B, 1, Tk)``, not 0 = real.
            values: ``(B, Tk, Dv)``.

        Returns:
            The context ``(B, 1, Dv)`` and the weights ``(B, 1, Tk)``.
        """
        if self.proj_keys is None:
            raise RuntimeError("compute_proj_keys must be called before the first step")
        if query.dim() != 3 or query.size(1) != 1:
            raise mismatch("query", "shape (B, 1, query_size)", shape_of(query))
        projected = self.proj_query = self.query_layer(query)
        query, ignored = projected.squeeze(1), (mask == 0).squeeze(1)
        score_weight = readable_weight(self.energy_layer)
        if score_weight is None:
            context, weights = attend_by_calls(
                self.energy_layer, query, self.proj_keys, values, key_padding_mask=ignored
            )
            return context.unsqueeze(1), weights.unsqueeze(1)
        watched: tuple[Tensor, ...] = (mask, score_weight)
        counted = torch.compiler.is_compiling() or not values.is_inference()
        if counted or torch._C._is_any_autocast_enabled():
            watched += (values,)  # else the memory, which has not cast them, reads them anew
        memory = self._recall((self.proj_keys, values, mask, score_weight), watched)
        if memory is None:
            memory = self._memory = AttentionMemory(
                self.proj_keys,
                values,
                score_weight.squeeze(0),
                key_padding_mask=ignored,
                backend=self.backend,
            )
        context, weights = memory.attend(query, need_weights=True)
        return context.unsqueeze(1), weights.unsqueeze(1)
