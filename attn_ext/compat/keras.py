"""Keras's additive attention, for PyTorch code."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    check_count,
    check_probability,
    check_tensor,
    mismatch,
    shape_of,
    wrong_type,
)
from ..functional import additive_attention


class KerasAdditiveAttention(nn.Module):
    """``keras.layers.AdditiveAttention``, called with ``[query, value, key]``.

    Args:
        dim: features of queries and keys, which Keras finds out in its first call.
        use_scale: whether there is a learned score weight ``scale`` ``(dim,)``; else it is ones.
        dropout: probability to drop an attention weight in training.
        backend: as :func:`attn_ext.additive_attention`.
    """

    scale: nn.Parameter | None

    def __init__(
        self, dim: int, use_scale: bool = True, dropout: float = 0.0, *, backend: str | None = None
    ):
        super().__init__()
        self.dim = check_count("dim", dim, 1)
        self.dropout = check_probability("dropout", dropout)
        self.backend = backend
        self.register_parameter("scale", nn.Parameter(torch.empty(dim)) if use_scale else None)
        if self.scale is not None:
            bound = (3 / dim) ** 0.5  # Glorot's, of a vector
            nn.init.uniform_(self.scale, -bound, bound)

    @classmethod
    def from_keras(cls, layer: Any, *, backend: str | None = None) -> "KerasAdditiveAttention":
        """A replacement of a built Keras layer, on whatever Keras runs, with a copy of its scale.

        Raises:
            ValueError: the layer has a scale but has not been built, so that its size is unknown.
        """
        if not layer.built:
            raise mismatch("layer", "a built layer (call it once)", "one without weights")
        if layer.scale is None:
            raise mismatch("layer", "one with use_scale=True", "one without; make it by its dim")
        scale = torch.tensor(layer.get_weights()[0])
        ours = cls(len(scale), dropout=layer.dropout, backend=backend)
        ours.scale = nn.Parameter(scale)
        return ours

    def forward(
        self,
        inputs: Sequence[Tensor],
        mask: Sequence[Tensor | None] | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            inputs: query ``(B, Tq, dim)``, value ``(B, Tv, Dv)`` and, unless it is value, key
                ``(B, Tv, dim)``.
            mask: of queries ``(B, Tq)`` and of values ``(B, Tv)``, bool, True = real, each or
                both None.
            return_attention_scores: also return the weights ``(B, Tq, Tv)``.
            use_causal_mask: must be False.

        Returns:
            The context ``(B, Tq, Dv)``, 0 for masked queries, or ``(context, weights)``.
        """
        if use_causal_mask:
            raise mismatch("use_causal_mask", "False (every query sees all keys)", "True")
        if len(inputs) not in (2, 3):
            raise mismatch("inputs", "[query, value] or [query, value, key]", str(len(inputs)))
        query, value = inputs[:2]
        key = inputs[2] if len(inputs) == 3 else value
        query_mask, value_mask = _masks(mask, query, value)
        score_weight = query.new_ones(self.dim) if self.scale is None else self.scale
        result = additive_attention(
            query,
            key,
            value,
            score_weight,
            key_padding_mask=None if value_mask is None else ~value_mask,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=bool(return_attention_scores),
            backend=self.backend,
        )
        if query_mask is None:
            return result
        kept = query_mask.unsqueeze(-1)
        if isinstance(result, tuple):
            return result[0].where(kept, 0), result[1]
        return result.where(kept, 0)


def _masks(
    mask: Sequence[Tensor | None] | None, query: Tensor, value: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of queries and of values."""
    if mask is None:
        return None, None
    if len(mask) not in (2, 3):  # Keras ignores a mask of keys
        raise mismatch("mask", "[of queries, of values]", f"{len(mask)} masks")
    for one, rows in zip(mask, (query, value)):
        if one is None:
            continue
        check_tensor("mask", one)
        if one.dtype != torch.bool:
            raise wrong_type("mask", "dtype bool, True = real", one.dtype)
        if one.shape != rows.shape[:2]:
            raise mismatch("mask", f"shape {tuple(rows.shape[:2])}", shape_of(one))
    return mask[0], mask[1]
