"""Keras's additive attention, for PyTorch code."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import layout
from ..checks import check_count, check_probability, check_tensor, mismatch, shape_of
from ..functional import additive_attention
from .plain import masked_softmax


class KerasAdditiveAttention(nn.Module):
    """``keras.layers.AdditiveAttention``, called with ``[query, value, key]``.

    Args:
        dim: features of queries and keys, which Keras finds out in its first call.
        use_scale: whether there is a learned score weight ``scale`` ``(dim,)``; else it is ones.
        dropout: probability to drop an attention weight in training.
        backend: as :func:`attn_ext.additive_attention`.
    """

    # As a Replacement has them, for the table of supported(); the layer itself is no nn.Module.
    package = "keras"
    tested = "3.15.1"
    needs = "`from_keras`, as it is no `nn.Module`"
    scale: nn.Parameter | None
    dim: int
    dropout: float

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

    @staticmethod
    def replaces() -> str:
        return "`keras.layers.AdditiveAttention`"

    @classmethod
    def from_keras(cls, layer: Any, *, backend: str | None = None) -> "KerasAdditiveAttention":
        """A replacement of a built Keras layer, on whatever Keras runs, with a copy of its scale.

        Raises:
            ValueError: ``layer`` is of another class, which may compute something else, or has not
                been built or has no scale, so that its size is unknown.
        """
        kind = type(layer)
        if kind.__name__ != "AdditiveAttention" or "keras" not in kind.__module__.split(".")[0]:
            got = f"{kind.__module__}.{kind.__qualname__}"
            raise mismatch("layer", "a keras.layers.AdditiveAttention itself", got)
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
        inputs: Sequence[Any],
        mask: Sequence[Any] | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            inputs: query ``(..., Tq, dim)``, value ``(..., Tv, Dv)`` and, unless it is value, key
                ``(..., Tv, dim)``: tensors, or NumPy arrays. The axes before, one of the batch as
                a rule, may be any that broadcast.
            mask: of queries ``(..., Tq)`` and of values ``(..., Tv)``, of any dtype, not 0 = real,
                each or both None.
            training: whether to drop weights; None follows the mode of the module.
            return_attention_scores: also return the weights ``(..., Tq, Tv)``.
            use_causal_mask: whether query i sees the keys up to i only. Computed as Keras does, by
                operations that store ``B * Tq * Tv * dim`` values, whatever the backend.

        Returns:
            The context ``(..., Tq, Dv)``, 0 for masked queries, or ``(context, weights)``.
        """
        if len(inputs) not in (2, 3):
            raise mismatch("inputs", "[query, value] or [query, value, key]", str(len(inputs)))
        query, value, key = self._batches(inputs)
        query_mask, value_mask = _masks(mask, query, value)
        lead = query.shape[:-2]
        batch = math.prod(lead)  # which -1 would not tell of empty tensors
        query, value, key = (rows.reshape(batch, *rows.shape[-2:]) for rows in (query, value, key))
        result = self._attend(
            query,
            key,
            value,
            None if value_mask is None else ~value_mask.reshape(value.shape[:2]),
            self.dropout if (self.training if training is None else training) else 0.0,
            bool(return_attention_scores),
            use_causal_mask,
        )
        context, *weights = result if isinstance(result, tuple) else (result,)
        context = context.reshape(*lead, *context.shape[1:])
        if query_mask is not None:
            context = context.where(query_mask.unsqueeze(-1), 0)
        return (context, weights[0].reshape(*lead, *weights[0].shape[1:])) if weights else context

    def _batches(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Query, value and key as tensors, with the same axes before their last two."""
        like = torch.empty(0) if self.scale is None else self.scale
        named = dict(zip(("query", "value", "key"), inputs))
        tensors = {}
        for name, given in named.items():
            tensor = given
            if not isinstance(given, Tensor) and hasattr(given, "__array__"):
                tensor = torch.as_tensor(given, dtype=like.dtype, device=like.device)
            check_tensor(name, tensor)
            if tensor.dim() < 2:
                raise mismatch(name, "shape (..., T, features)", shape_of(tensor))
            tensors[name] = tensor
        tensors.setdefault("key", tensors["value"])
        shapes = [tensor.shape[:-2] for tensor in tensors.values()]
        try:
            lead = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            got = ", ".join(f"{name} {shape_of(tensor)}" for name, tensor in tensors.items())
            expected = "axes before the last two that broadcast"
            raise mismatch("inputs", expected, got) from None
        return [tensor.expand(*lead, *tensor.shape[-2:]) for tensor in tensors.values()]

    def _attend(
        self,
        query: Tensor,  # [B, Tq, dim]
        key: Tensor,  # [B, Tv, dim]
        value: Tensor,  # [B, Tv, Dv]
        ignored: Tensor | None,  # [B, Tv]
        dropout_p: float,
        need_weights: bool,
        causal: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        scale = query.new_ones(self.dim) if self.scale is None else self.scale
        if causal:
            context, weights = _attend_causally(query, key, value, scale, ignored, dropout_p)
            return (context, weights) if need_weights else context
        return additive_attention(
            query,
            key,
            value,
            scale,
            key_padding_mask=ignored,
            dropout_p=dropout_p,
            need_weights=need_weights,
            backend=self.backend,
        )


def _attend_causally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    ignored: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Context ``[B, Tq, Dv]`` and weights ``[B, Tq, Tv]``; query i sees the keys up to i."""
    # The checks of a call without the mask.
    keys = layout.check_key_side(key, value, scale, None, None, ignored, None)
    layout.check_query_side(query, keys)
    places = (torch.arange(rows.size(1), device=key.device) for rows in (query, key))
    later = next(places)[:, None] < next(places)  # [Tq, Tv]
    if ignored is not None:
        key, value = (rows.masked_fill(ignored.unsqueeze(-1), 0) for rows in (key, value))
        later = later | ignored.unsqueeze(1)
    scores = (torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) * scale).sum(-1)
    weights = masked_softmax(scores, later)
    weights = nn.functional.dropout(weights, dropout_p).to(value.dtype)
    return weights @ value, weights


def _masks(
    mask: Sequence[Any] | None, query: Tensor, value: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of queries and of values, bool, as large as those."""
    if mask is None:
        return None, None
    if isinstance(mask, Tensor) or len(mask) not in (2, 3):  # Keras ignores a mask of keys
        got = "a tensor" if isinstance(mask, Tensor) else f"{len(mask)} masks"
        raise mismatch("mask", "[of queries, of values]", got)
    return _mask(mask[0], query), _mask(mask[1], value)


def _mask(mask: Any, rows: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) and hasattr(mask, "__array__"):
        mask = torch.as_tensor(mask)
    check_tensor("mask", mask)
    try:
        expanded = mask.expand(rows.shape[:-1])
    except RuntimeError:
        raise mismatch("mask", f"shape {tuple(rows.shape[:-1])}", shape_of(mask)) from None
    if mask.dim() != rows.dim() - 1:  # axes that Keras would not align
        raise mismatch("mask", f"shape {tuple(rows.shape[:-1])}", shape_of(mask))
    return expanded.to(rows.device) != 0
