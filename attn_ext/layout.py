"""The one place that checks calls and turns every public layout into one internal form.

Internally queries are ``[Bq, Nq, H, D]``, keys ``[Bk, Nk, H, D]``, values ``[Bk, Nk, H, Dv]`` and
score weights ``[H, D]``. A jagged side has ``Bq`` (``Bk``) = 1 and offsets; a padded side has a row
per sequence. Below this file nothing is validated again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    can_read_values,
    check_beside_key,
    check_bound,
    check_device,
    check_floating,
    check_offsets,
    check_padding,
    check_tensor,
    mismatch,
    records_lengths,
    shape_of,
    wrong_type,
)
from .nested import Nest, nested_like, unwrap, unwrap_like

DENSE_WEIGHTS, JAGGED_WEIGHTS = 1, 2  # 0: no weights are returned
RAW = 4  # added to these: scores instead, as they are before the softmax


class KeySide(NamedTuple):
    """Checked keys and values of a batch, in the internal form: arguments of the ops, and more."""

    key: Tensor  # [Bk, Nk, H, D]
    value: Tensor  # [Bk, Nk, H, Dv]
    score_weight: Tensor  # [H, D]
    cu_seqlens_k: Tensor | None  # [B + 1]
    key_lengths: Tensor | None  # [B]
    key_padding_mask: Tensor | None  # [B, Nk], True = ignore
    max_seqlen_k: int
    batch_size: int
    has_heads: bool
    autocast: bool  # whether key and value were cast
    exp_key: Tensor | None = None  # what a backend prepared of the keys, for a memory's steps
    key_bound: Tensor | None = None
    features: Tensor | None = None  # [Bk, Nk, F]: key + features @ feature_weight is attended to
    feature_weight: Tensor | None = None  # [F, H, D]

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """Another tensor of the call, in the dtype of key, to which autocast takes it."""
        check_floating(name, tensor)
        check_device(name, tensor, self.key.device)
        dtype = self.key.dtype
        # Either side may be made under autocast and the other not.
        if torch.float64 not in (tensor.dtype, dtype):
            if self.autocast or _autocast_dtype(tensor) is not None:
                tensor = tensor.to(dtype)
        if tensor.dtype != dtype:
            raise wrong_type(name, f"dtype {dtype}, as key", tensor.dtype)
        return tensor

    def with_key(self, key: Tensor) -> "KeySide":
        """With other keys, of which nothing is prepared."""
        return self._replace(
            key=key, exp_key=None, key_bound=None, features=None, feature_weight=None
        )

    def ignored(self) -> Tensor | None:
        """Which rows ``[Bk, Nk]`` of keys nobody attends to; None where there are none for sure."""
        layout = self.cu_seqlens_k, self.key_lengths, self.key_padding_mask
        ignored = _ignored(self.key.size(1), self.key.device, *layout)
        if ignored is not None and self.cu_seqlens_k is not None:
            return ignored.unsqueeze(0)
        return ignored

    def with_exact_bound(self) -> "KeySide":
        """With the longest sequence where no bound is known, for dense weights of jagged keys."""
        unknown = self.max_seqlen_k == self.key.size(1) + 1  # see _bound_of_unread
        if self.cu_seqlens_k is None or records_lengths() or not unknown:
            return self
        bound = _bound_of_unread(self.cu_seqlens_k, self.key.size(1), need_exact=True)
        return self._replace(max_seqlen_k=bound)

    def detached(self) -> "KeySide":
        """The same as constants, to which no gradient flows."""
        key, value, score_weight = (tensor.detach() for tensor in self[:3])
        return self._replace(key=key, value=value, score_weight=score_weight)


class QuerySide(NamedTuple):
    """Checked queries of a batch, in the internal form, and how to shape the results."""

    query: Tensor  # [Bq, Nq, H, D]
    cu_seqlens_q: Tensor | None  # [B + 1]
    max_seqlen_q: int
    is_one_step: bool
    has_heads: bool
    nested: Tensor | None  # the nested tensor whose offsets the context takes over

    def restore(
        self, context: Tensor, weights: Tensor, weights_layout: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The context, and weights if there are any, as the caller's layout has them."""
        context = self.restore_context(context)
        if weights_layout == 0:
            return context
        return context, self.restore_weights(weights, weights_layout)

    def restore_context(self, context: Tensor) -> Tensor:
        """Shape an internal context ``[Bq, Nq, H, Dv]`` as the caller's layout has it."""
        axes = () if self.has_heads else (2,)
        if self.cu_seqlens_q is not None:
            axes = (0, *axes)
        elif self.is_one_step:
            axes = (1, *axes)
        if axes and torch.jit.is_tracing():  # ONNX's exporter of traces squeezes one axis at a time
            for axis in reversed(axes):
                context = context.squeeze(axis)
        elif axes:
            context = context.squeeze(axes)  # at once: every view costs a microsecond
        return context if self.nested is None else nested_like(context, self.nested)

    def restore_weights(self, weights: Tensor, layout: int) -> Tensor:
        """Shape internal weights, ``[B, H, Tq, Tk]`` or ``[total_k, H]``, as the caller's."""
        if layout == JAGGED_WEIGHTS:
            return weights if self.has_heads else weights.squeeze(1)
        if self.is_one_step:
            weights = weights.squeeze(2)
        return weights if self.has_heads else weights.squeeze(1)


def weights_layout(queries: QuerySide, keys: KeySide) -> int:
    """The internal layout of returned weights: jagged only for one step over jagged keys."""
    jagged = queries.is_one_step and keys.cu_seqlens_k is not None
    return JAGGED_WEIGHTS if jagged else DENSE_WEIGHTS


def check_key_side(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    need_max: bool = False,
    scores_only: bool = False,
) -> KeySide:
    """Check keys, values and score weights.

    Args:
        value: not looked at where only scores are asked for: values without features stand for it.
        need_max: the exact longest sequence is needed.
        scores_only: no values are weighed.
    """
    key, nest = unwrap("key", key)
    if scores_only:
        value = key.new_empty((*key.shape[:-1], 0))
    else:
        value = unwrap_like("value", value, nest)
    cu_seqlens_k, max_seqlen_k = _offsets("key", nest, cu_seqlens_k, max_seqlen_k)
    for name, tensor in (("key", key), ("value", value), ("score_weight", score_weight)):
        check_beside_key(name, tensor, key)
    is_jagged = cu_seqlens_k is not None
    _check_key_shapes(key, value, score_weight, is_jagged)

    if cu_seqlens_k is not None:
        for name, given in (("key_padding_mask", key_padding_mask), ("key_lengths", key_lengths)):
            if given is not None:
                expected = "None with jagged keys, whose offsets give lengths"
                raise mismatch(name, expected, type(given).__name__)
        bound = _bound("key", key, cu_seqlens_k, max_seqlen_k, need_max)
        batch_size = cu_seqlens_k.size(0) - 1
    else:
        check_padding(key_padding_mask, key_lengths, max_seqlen_k, key)
        batch_size, bound = key.size(0), key.size(1)

    autocast_dtype = _autocast_dtype(key)
    if autocast_dtype is not None:
        key, value = key.to(autocast_dtype), value.to(autocast_dtype)
    if is_jagged:
        key, value = key.unsqueeze(0), value.unsqueeze(0)
    has_heads = score_weight.dim() == 2
    if not has_heads:
        key, value, score_weight = key.unsqueeze(2), value.unsqueeze(2), score_weight.unsqueeze(0)
    return KeySide(
        key,
        value,
        score_weight,
        cu_seqlens_k,
        key_lengths,
        key_padding_mask,
        bound,
        batch_size,
        has_heads,
        autocast_dtype is not None,
    )


def check_query_side(
    query: Tensor,
    keys: KeySide,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    need_max: bool = False,
) -> QuerySide:
    """Check queries against an already checked key side."""
    values, nest = unwrap("query", query)
    cu_seqlens_q, max_seqlen_q = _offsets("query", nest, cu_seqlens_q, max_seqlen_q)
    nested, query = (None if nest is None else query), keys.checked("query", values)
    is_jagged = cu_seqlens_q is not None
    _check_query_shape(query, keys, is_jagged)

    bound: int | None = None
    batch = query.size(0)
    if cu_seqlens_q is not None:
        bound = _bound("query", query, cu_seqlens_q, max_seqlen_q, need_max)
        batch = cu_seqlens_q.size(0) - 1
    if batch != keys.batch_size:
        name = "cu_seqlens_q" if is_jagged and nested is None else "query"
        raise mismatch(name, f"{keys.batch_size} sequences, as the keys have", str(batch))
    is_one_step = not is_jagged and query.dim() == _axes(keys.has_heads) + 1
    if is_jagged:
        query = query.unsqueeze(0)
    elif is_one_step:
        query = query.unsqueeze(1)
    if not keys.has_heads:
        query = query.unsqueeze(2)
    if bound is None:
        bound = query.size(1)
        check_bound("max_seqlen_q", max_seqlen_q, bound)
    return QuerySide(query, cu_seqlens_q, bound, is_one_step, keys.has_heads, nested)


def clear_ignored(
    name: str,
    rows: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Zeros in the rows, ``(total, D)`` or ``(B, T, D)``, that attention will ignore.

    For a projection before it, whose weight's gradient would be 0 * NaN. Rows of another shape are
    left as they are: attention has the error message for them. So are nested tensors.
    """
    check_tensor(name, rows)
    if rows.is_nested or rows.dim() != (3 if cu_seqlens is None else 2):
        return rows
    if cu_seqlens is None:
        check_padding(padding_mask, lengths, None, rows)
    else:
        check_offsets(f"cu_seqlens_{name[0]}", cu_seqlens, name, rows)
        if can_read_values(cu_seqlens) and int(cu_seqlens[-1]) == rows.size(0):
            return rows
    ignored = _ignored(rows.size(-2), rows.device, cu_seqlens, lengths, padding_mask)
    # On CPUs where() takes two thirds of masked_fill's time.
    return rows if ignored is None else torch.where(ignored.unsqueeze(-1), 0, rows)


def _ignored(
    rows: int,
    device: torch.device,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    padding_mask: Tensor | None,
) -> Tensor | None:
    """Which rows ``[B, N]``, of a jagged side ``[N]``, are ignored; None where there are none."""
    if cu_seqlens is not None:
        return torch.arange(rows, device=device) >= cu_seqlens[-1]
    if lengths is not None:
        return torch.arange(rows, device=device) >= lengths.unsqueeze(1)
    return padding_mask


def _axes(has_heads: bool) -> int:
    """Trailing axes of a row: (D,) or (H, D)."""
    return 2 if has_heads else 1


def row_text(has_heads: bool, features: str = "D") -> str:
    """The trailing axes of a row, as messages name them."""
    return f"H, {features}" if has_heads else features


def _check_key_shapes(key: Tensor, value: Tensor, score_weight: Tensor, is_jagged: bool) -> None:
    has_heads = score_weight.dim() == 2
    if not has_heads and score_weight.dim() != 1:
        raise mismatch("score_weight", "shape (D,) or (H, D)", shape_of(score_weight))
    rank = _axes(has_heads) + (1 if is_jagged else 2)
    if not key.dim() == value.dim() == rank:
        is_key = key.dim() != rank
        name, tensor, features = ("key", key, "D") if is_key else ("value", value, "Dv")
        rows = "total_k" if is_jagged else "B, Tk"
        reason = "with cu_seqlens_k" if is_jagged else "without cu_seqlens_k"
        if has_heads:  # perhaps unknowingly, by the weight (1, D) of an nn.Linear
            reason += f" and with score_weight {shape_of(score_weight)} = (H, D)"
        expected = f"shape ({rows}, {row_text(has_heads, features)}) {reason}"
        raise mismatch(name, expected, shape_of(tensor))
    shape = key.shape
    if value.shape[:-1] != shape[:-1]:
        expected = f"shape {shape_of(key)} as key in all but the last axis"
        raise mismatch("value", expected, shape_of(value))
    row = shape[-2:] if has_heads else shape[-1:]
    if score_weight.shape != row:
        expected = f"shape {tuple(row)} to match key {shape_of(key)}"
        raise mismatch("score_weight", expected, shape_of(score_weight))


def _check_query_shape(query: Tensor, keys: KeySide, is_jagged: bool) -> None:
    axes = _axes(keys.has_heads)
    if query.dim() != axes + 1 and (is_jagged or query.dim() != axes + 2):
        row = row_text(keys.has_heads)
        shapes = f"(total_q, {row})" if is_jagged else f"(B, {row}) or (B, Tq, {row})"
        offsets = "with cu_seqlens_q" if is_jagged else "without cu_seqlens_q"
        raise mismatch("query", f"shape {shapes} {offsets}", shape_of(query))
    tail = keys.key.shape[4 - axes :]
    if query.shape[-axes:] != tail:
        expected = f"last axes {tuple(tail)} = ({row_text(keys.has_heads)}), as key"
        raise mismatch("query", expected, f"shape {shape_of(query)}")


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What ``torch.autocast`` casts to, or None; float64 is left alone, as PyTorch does."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = tensor.device.type
    if tensor.dtype == torch.float64 or device == "meta":  # which autocast does not know
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _offsets(
    name: str, nest: Nest | None, cu: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor | None, int | None]:
    """Those that were given, or those of a nested tensor."""
    if nest is None:
        return cu, max_seqlen
    if cu is not None:
        expected = f"None for a nested {name}, which has its own"
        raise mismatch(f"cu_seqlens_{name[0]}", expected, "offsets")
    return nest.offsets, nest.max_seqlen if max_seqlen is None else max_seqlen


def _bound(name: str, rows: Tensor, cu: Tensor, max_seqlen: int | None, need_exact: bool) -> int:
    """Check the offsets of jagged rows; a bound on the longest sequence.

    In a trace it is more than any length, so that the graph serves all: no kernel in it looks at
    bounds, and its weights are as large as the longest sequences that it is then given.
    """
    longest = check_offsets(f"cu_seqlens_{name[0]}", cu, name, rows)
    bound = check_bound(f"max_seqlen_{name[0]}", max_seqlen, longest)
    if not records_lengths():
        return _bound_of_unread(cu, rows.size(0), need_exact) if bound is None else bound
    if need_exact and bound is not None:
        expected = "None for weights in a trace, of which a bound would be a constant"
        raise mismatch(f"max_seqlen_{name[0]}", expected, str(bound))
    return 2**62


def _bound_of_unread(cu: Tensor, rows: int, need_exact: bool) -> int:
    """A length bound when values were not read and no ``max_seqlen`` was given.

    One more than there are rows tells kernels, which may read it, that nobody named a bound.
    """
    if need_exact and cu.size(0) > 1:
        # The one host synchronisation, for the shape of weights; corrupt offsets do not blow it up.
        longest: Any = cu.diff().max().clamp(0, rows).item()  # int() of it ends torch.export
        return longest
    return rows + 1
