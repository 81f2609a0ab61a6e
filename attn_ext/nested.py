"""Jagged nested tensors: their values and offsets on the way in, and made anew on the way out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import can_read_values, check_tensor, mismatch


class Nest(NamedTuple):
    """The offsets of a nested tensor, and its longest row where that is known on the host."""

    offsets: Tensor
    max_seqlen: int | None


def unwrap(name: str, tensor: Tensor) -> tuple[Tensor, Nest | None]:
    """A nested tensor's values and offsets; any other tensor as it is."""
    check_tensor(name, tensor)
    if not tensor.is_nested:
        return tensor, None
    if tensor.layout != torch.jagged:
        raise mismatch(name, "a nested tensor of layout=torch.jagged", f"layout {tensor.layout}")
    nested: Any = tensor  # of a class that PyTorch does not make public
    if nested._ragged_idx != 1:
        raise mismatch(name, "a nested tensor ragged in axis 1", f"axis {nested._ragged_idx}")
    if nested.lengths() is not None:
        expected = "a nested tensor without holes (rebuild it with torch.nested.nested_tensor)"
        raise mismatch(name, expected, "one with lengths() set")
    return nested.values(), Nest(nested.offsets(), nested._maybe_max_seqlen)


def without_nesting(name: str, tensor: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """A tensor with a row a key; of a nested one the values."""
    values, nest = unwrap(name, tensor)
    if nest is not None:
        if cu_seqlens_k is None:
            raise mismatch(name, "a dense tensor, as key is", "a nested one")
        _check_same_offsets(name, cu_seqlens_k, nest.offsets)
    return values


def values_like(name: str, tensor: Tensor, key: Tensor) -> Tensor:
    """The values of a tensor that must be nested as key is."""
    return unwrap_like(name, tensor, unwrap("key", key)[1])


def unwrap_like(name: str, tensor: Tensor, nest: Nest | None) -> Tensor:
    values, own = unwrap(name, tensor)
    if (own is None) != (nest is None):
        expected, got = ("dense", "nested") if nest is None else ("nested", "dense")
        raise mismatch(name, f"a {expected} tensor, as key is", f"a {got} one")
    if own is not None and nest is not None:
        _check_same_offsets(name, nest.offsets, own.offsets)
    return values


def _check_same_offsets(name: str, ours: Tensor, theirs: Tensor) -> None:
    same = ours is theirs or ours.shape == theirs.shape
    if same and ours is not theirs and can_read_values(ours):
        same = torch.equal(ours, theirs)
    if not same:
        raise mismatch(name, "a nested tensor with key's offsets", "other offsets")


def nested_like(values: Tensor, like: Any) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        values,
        offsets=like.offsets(),
        min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )
