"""The one place that checks arguments and turns every public layout into one internal form.

Internally queries are ``[Bq, Nq, H, D]``, keys ``[Bk, Nk, H, D]``, values ``[Bk, Nk, H, Dv]`` and
score weights ``[H, D]``. A jagged side has ``Bq`` (``Bk``) = 1 and offsets; a padded side has a row
per sequence. Below this file nothing is validated again.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE_WEIGHTS, JAGGED_WEIGHTS = 1, 2  # 0: no weights are returned
COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class KeySide:
    """Checked keys and values of a batch, in the internal form."""

    key: Tensor  # [Bk, Nk, H, D]
    value: Tensor  # [Bk, Nk, H, Dv]
    score_weight: Tensor  # [H, D]
    cu_seqlens: Tensor | None  # [B + 1]
    lengths: Tensor | None  # [B]
    padding_mask: Tensor | None  # [B, Nk], True = ignore
    max_seqlen: int
    batch_size: int
    has_heads: bool
    is_nested: bool

    @property
    def dims(self) -> str:
        """The trailing axes of a query, as an error message names them."""
        return "H, D" if self.has_heads else "D"


@dataclass(frozen=True, slots=True)
class QuerySide:
    """Checked queries of a batch, in the internal form, and how to shape the results."""

    query: Tensor  # [Bq, Nq, H, D]
    cu_seqlens: Tensor | None  # [B + 1]
    max_seqlen: int
    is_one_step: bool
    has_heads: bool
    nested: Tensor | None  # the nested tensor whose offsets the context takes over

    def restore_context(self, context: Tensor) -> Tensor:
        """Shape an internal context ``[Bq, Nq, H, Dv]`` as the caller's layout has it."""
        if not self.has_heads:
            context = context.squeeze(2)
        if self.cu_seqlens is not None:
            context = context.squeeze(0)
        elif self.is_one_step:
            context = context.squeeze(1)
        return context if self.nested is None else _nested_like(context, self.nested)

    def restore_weights(self, weights: Tensor, layout: int) -> Tensor:
        """Shape internal weights, ``[B, H, Tq, Tk]`` or ``[total_k, H]``, as the caller's."""
        if layout == JAGGED_WEIGHTS:
            return weights if self.has_heads else weights.squeeze(1)
        if self.is_one_step:
            weights = weights.squeeze(2)
        return weights if self.has_heads else weights.squeeze(1)


def check_key_side(
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    need_max: bool = True,
) -> KeySide:
    """Check keys, values and score weights; ``need_max=False`` takes any bound for the maximum."""
    _check_floating("key", key)
    _check_floating("value", value)
    _check_floating("score_weight", score_weight)
    key, value = _autocast(key), _autocast(value)
    if score_weight.dim() not in (1, 2):
        raise _mismatch("score_weight", "shape (D,) or (H, D)", _shape(score_weight))
    has_heads = score_weight.dim() == 2
    is_nested = key.is_nested
    if value.is_nested != is_nested:
        expected = "a nested tensor, as key is" if is_nested else "a dense tensor, as key is"
        raise _mismatch("value", expected, "a nested tensor" if value.is_nested else "a dense one")
    if is_nested:
        if cu_seqlens_k is not None:
            expected = "None for a nested key, which has its own"
            raise _mismatch("cu_seqlens_k", expected, "offsets")
        _same_offsets(key, value)
        max_seqlen_k = _nested_max(key) if max_seqlen_k is None else max_seqlen_k
        cu_seqlens_k, key, value = _offsets("key", key), key.values(), _values("value", value)
    is_jagged = cu_seqlens_k is not None

    dims = "H, D" if has_heads else "D"
    layout = f"(total_k, {dims})" if is_jagged else f"(B, Tk, {dims})"
    reason = "with" if is_jagged else "without"
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != len(layout.split(",")):
            expected = layout if name == "key" else layout.replace("D)", "Dv)")
            raise _mismatch(name, f"shape {expected} {reason} cu_seqlens_k", _shape(tensor))
    if value.shape[:-1] != key.shape[:-1]:
        expected = f"shape {_shape(key)} as key in all but the last axis"
        raise _mismatch("value", expected, _shape(value))
    if score_weight.shape != key.shape[-score_weight.dim() :]:
        expected = f"shape {tuple(key.shape[-score_weight.dim() :])} to match key {_shape(key)}"
        raise _mismatch("score_weight", expected, _shape(score_weight))
    for name, tensor in (("value", value), ("score_weight", score_weight)):
        _check_device(name, tensor, "key", key.device)
        if (tensor.dtype == torch.float64) != (key.dtype == torch.float64):
            expected = f"a dtype to go with key's {key.dtype} (float64 does not mix with others)"
            raise TypeError(_text(name, expected, str(tensor.dtype)))

    if is_jagged:
        if key_padding_mask is not None or key_lengths is not None:
            name = "key_lengths" if key_padding_mask is None else "key_padding_mask"
            expected = "None with jagged keys, whose offsets give lengths"
            raise _mismatch(name, expected, "a tensor")
        longest = _check_offsets("cu_seqlens_k", cu_seqlens_k, "key", key)
        batch_size = cu_seqlens_k.size(0) - 1
        bound = _check_bound("max_seqlen_k", max_seqlen_k, longest)
        if bound is None:
            bound = _bound_of_unread(cu_seqlens_k, key.size(0), need_max)
        key, value = key.unsqueeze(0), value.unsqueeze(0)
    else:
        batch_size, bound = key.size(0), key.size(1)
        _check_padding(key_padding_mask, key_lengths, max_seqlen_k, key)
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
        is_nested,
    )


def check_query_side(
    query: Tensor,
    keys: KeySide,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    need_max: bool = True,
) -> QuerySide:
    """Check queries against an already checked key side."""
    _check_floating("query", query)
    query = _autocast(query)
    nested = query if query.is_nested else None
    if nested is not None:
        if cu_seqlens_q is not None:
            expected = "None for a nested query, which has its own"
            raise _mismatch("cu_seqlens_q", expected, "offsets")
        max_seqlen_q = _nested_max(query) if max_seqlen_q is None else max_seqlen_q
        cu_seqlens_q, query = _offsets("query", query), query.values()

    dims, keys_jagged = keys.dims, keys.cu_seqlens is not None
    step_rank = 1 + len(dims.split(","))
    is_jagged = cu_seqlens_q is not None
    if is_jagged:
        if not keys_jagged:
            name, got = ("cu_seqlens_q", "offsets") if nested is None else ("query", "a nested one")
            expected = "padded queries with padded keys (jagged and padded layouts do not mix)"
            raise _mismatch(name, expected, got)
        allowed = {step_rank: f"(total_q, {dims})"}
    elif keys_jagged and not keys.is_nested:
        allowed = {step_rank: f"(B, {dims})"}  # a padded block of queries has its own offsets
    else:
        allowed = {step_rank: f"(B, {dims})", step_rank + 1: f"(B, Tq, {dims})"}
    if query.dim() not in allowed:
        context = "with cu_seqlens_q" if is_jagged else "without cu_seqlens_q"
        context += f" and {'jagged' if keys_jagged else 'padded'} keys"
        expected = f"shape {' or '.join(allowed.values())} {context}"
        raise _mismatch("query", expected, _shape(query))
    tail = tuple(keys.key.shape[2 if keys.has_heads else 3 :])
    if tuple(query.shape[1 - step_rank :]) != tail:
        expected = f"last axes {tail} ({dims}) as key has them"
        raise _mismatch("query", expected, f"shape {_shape(query)}")
    _check_device("query", query, "key", keys.key.device)
    if query.dtype != keys.key.dtype:
        raise TypeError(_text("query", f"dtype {keys.key.dtype}, as key", str(query.dtype)))

    if is_jagged:
        longest = _check_offsets("cu_seqlens_q", cu_seqlens_q, "query", query)
        bound = _check_bound("max_seqlen_q", max_seqlen_q, longest)
        if bound is None:
            bound = _bound_of_unread(cu_seqlens_q, query.size(0), need_max)
    batch = cu_seqlens_q.size(0) - 1 if is_jagged else query.size(0)
    if batch != keys.batch_size:
        name = "cu_seqlens_q" if is_jagged and nested is None else "query"
        raise _mismatch(name, f"{keys.batch_size} sequences, as the keys have", f"{batch}")
    is_one_step = not is_jagged and query.dim() == step_rank
    if is_jagged:
        query = query.unsqueeze(0)
    elif is_one_step:
        query = query.unsqueeze(1)
    if not keys.has_heads:
        query = query.unsqueeze(2)
    if not is_jagged:
        bound = query.size(1)
        _check_bound("max_seqlen_q", max_seqlen_q, bound)
    return QuerySide(query, cu_seqlens_q, bound, is_one_step, keys.has_heads, nested)


def weights_layout(queries: QuerySide, keys: KeySide) -> int:
    """The internal layout of returned weights: jagged only for one step over jagged keys."""
    jagged = queries.is_one_step and keys.cu_seqlens is not None
    return JAGGED_WEIGHTS if jagged else DENSE_WEIGHTS


def check_dropout(dropout_p: float) -> float:
    """Check a dropout probability."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(_text("dropout_p", "a float", type(dropout_p).__name__))
    if not 0.0 <= dropout_p <= 1.0:
        raise _mismatch("dropout_p", "a probability between 0 and 1", str(dropout_p))
    return float(dropout_p)


def check_flag(name: str, flag: bool | None, optional: bool = False) -> None:
    """Check that a switch is a bool (or None, where None has a meaning)."""
    if not isinstance(flag, bool) and not (optional and flag is None):
        expected = "a bool or None" if optional else "a bool"
        raise TypeError(_text(name, expected, type(flag).__name__))


def can_read_values(tensor: Tensor) -> bool:
    """Whether the host may look at a tensor's values: real, and not on an accelerator.

    ``ATTN_EXT_CHECK=1`` also allows the synchronisation that reading from an accelerator costs.
    """
    if torch.compiler.is_compiling() or type(tensor) not in _REAL_TENSORS:
        return False
    return tensor.device.type == "cpu" or os.environ.get("ATTN_EXT_CHECK") == "1"


_REAL_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_text(name, "a torch.Tensor", type(tensor).__name__))
    if tensor.dtype not in COMPUTE_DTYPES:
        expected = "dtype float32, float16, bfloat16 or float64"
        raise TypeError(_text(name, expected, str(tensor.dtype)))
    if tensor.layout not in (torch.strided, torch.jagged):
        raise _mismatch(name, "a strided or jagged nested tensor", f"layout {tensor.layout}")
    if tensor.is_nested and tensor.layout != torch.jagged:
        raise _mismatch(name, "a nested tensor of layout=torch.jagged", f"layout {tensor.layout}")


def _autocast(tensor: Tensor) -> Tensor:
    """Cast as ``torch.autocast`` asks; float64 is left alone, as PyTorch's own operations do."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _check_index(name: str, tensor: Tensor, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_text(name, "a torch.Tensor", type(tensor).__name__))
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(_text(name, "dtype int32 or int64", str(tensor.dtype)))
    _check_device(name, tensor, "key", device)


def _check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise _mismatch(name, f"device {device}, as {other}", str(tensor.device))


def _check_offsets(name: str, cu: Tensor, rows_name: str, rows: Tensor) -> int | None:
    """Check offsets and return the longest sequence, or None where values are not read."""
    _check_index(name, cu, rows.device)
    if cu.dim() != 1 or cu.size(0) < 1:
        raise _mismatch(name, "shape (B + 1,)", _shape(cu))
    if not can_read_values(cu):
        return None
    first = cu[0].item()
    if first != 0:
        raise _mismatch(name, "offsets that start at 0", f"{name}[0] = {first}")
    if cu.size(0) == 1:
        return 0
    decreases = cu[1:] < cu[:-1]  # not by differences, which corrupt offsets could overflow
    if decreases.any():
        at = int(decreases.nonzero()[0])
        got = f"{name}[{at}] = {cu[at].item()} before {name}[{at + 1}] = {cu[at + 1].item()}"
        raise _mismatch(name, "offsets that never decrease", got)
    last = cu[-1].item()
    if last > rows.size(0):
        expected = f"offsets of at most {rows.size(0)}, the rows of {rows_name}"
        raise _mismatch(name, expected, f"{name}[-1] = {last}")
    return int(cu.diff().max())


def _check_bound(name: str, bound: int | None, longest: int | None) -> int | None:
    """Check a ``max_seqlen`` against the longest sequence; either may be unknown."""
    if bound is None:
        return longest
    if isinstance(bound, bool) or not isinstance(bound, (int, torch.SymInt)):
        raise TypeError(_text(name, "an int", type(bound).__name__))
    if bound < 0:
        raise _mismatch(name, "a length of at least 0", str(bound))
    if longest is not None and bound < longest:
        raise _mismatch(name, f"at least {longest}, the longest sequence", str(bound))
    return bound


def _bound_of_unread(cu: Tensor, rows: int, need_exact: bool) -> int:
    """A length bound when values were not read and no ``max_seqlen`` was given."""
    if need_exact and cu.size(0) > 1:
        return cu.diff().max().item()  # the one host synchronisation, for the shape of weights
    return rows


def _check_padding(
    mask: Tensor | None, lengths: Tensor | None, max_seqlen: int | None, key: Tensor
) -> None:
    batch, rows = key.size(0), key.size(1)
    if mask is not None and lengths is not None:
        raise ValueError("key_padding_mask, key_lengths: expected at most one of them, got both")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(_text("key_padding_mask", "a torch.Tensor", type(mask).__name__))
        if mask.dtype != torch.bool:
            raise TypeError(_text("key_padding_mask", "dtype bool, True = ignore", str(mask.dtype)))
        if tuple(mask.shape) != (batch, rows):
            raise _mismatch("key_padding_mask", f"shape ({batch}, {rows}) = (B, Tk)", _shape(mask))
        _check_device("key_padding_mask", mask, "key", key.device)
    longest: int | None = rows
    if lengths is not None:
        longest = None
        _check_index("key_lengths", lengths, key.device)
        if tuple(lengths.shape) != (batch,):
            raise _mismatch("key_lengths", f"shape ({batch},) = (B,)", _shape(lengths))
        if can_read_values(lengths) and batch:
            low, longest = (int(extreme) for extreme in lengths.aminmax())
            if low < 0 or longest > rows:
                got = f"a length of {low if low < 0 else longest}"
                raise _mismatch("key_lengths", f"lengths between 0 and Tk = {rows}", got)
    if max_seqlen is not None:
        _check_bound("max_seqlen_k", max_seqlen, longest)


def _offsets(name: str, nested: Tensor) -> Tensor:
    if nested._ragged_idx != 1:
        raise _mismatch(name, "a nested tensor ragged in axis 1", f"axis {nested._ragged_idx}")
    if nested.lengths() is not None:
        raise _mismatch(
            name,
            "a nested tensor without holes (rebuild it with torch.nested.nested_tensor)",
            "one with lengths() set",
        )
    return nested.offsets()


def _values(name: str, nested: Tensor) -> Tensor:
    _offsets(name, nested)
    return nested.values()


def _same_offsets(key: Tensor, value: Tensor) -> None:
    ours, theirs = _offsets("key", key), _offsets("value", value)
    if ours is theirs:
        return
    same = ours.shape == theirs.shape
    if same and can_read_values(ours):
        same = torch.equal(ours, theirs)
    if not same:
        raise _mismatch("value", "a nested tensor with key's offsets", "other offsets")


def _nested_max(nested: Tensor) -> int | None:
    """The longest row of a nested tensor where it is known without reading the device."""
    return nested._maybe_max_seqlen


def _nested_like(values: Tensor, like: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        values,
        offsets=like.offsets(),
        min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _text(name: str, expected: str, got: str) -> str:
    return f"{name}: expected {expected}, got {got}"


def _mismatch(name: str, expected: str, got: str) -> ValueError:
    return ValueError(_text(name, expected, got))
