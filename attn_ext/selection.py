"""Some of the sequences of a key side, for memories that sentences leave one by one."""

from typing import Any

import torch
from torch import Tensor

from .checks import can_read_values, check_index, check_tensor, mismatch, shape_of
from .layout import KeySide


def select_sequences(keys: KeySide, index: Tensor) -> KeySide:
    """The sequences ``index`` ``(B',)`` of a key side, in that order.

    Keys are copied unless those sequences are known, on the host, to lie side by side.
    """
    _check_sequences(index, keys)
    run = _run_of(index)
    cu, longest = keys.cu_seqlens_k, keys.max_seqlen_k
    if cu is None:
        axis, rows = 0, index if run is None else run
    elif run is None:
        axis, (rows, cu, longest) = 1, _rows_of_sequences(cu, index, keys.key.size(1))
    else:
        bounds = cu[run.start : run.stop + 1]
        axis, rows = 1, slice(int(bounds[0]), int(bounds[-1]))
        cu, longest = bounds - bounds[0], int(bounds.diff().max())

    def taken(tensor: Tensor | None, axis: int = axis) -> Any:
        if tensor is None:
            return None
        if isinstance(rows, slice):
            return tensor.narrow(axis, rows.start, rows.stop - rows.start)
        return tensor.index_select(axis, rows)

    return keys._replace(
        key=taken(keys.key),
        value=taken(keys.value),
        cu_seqlens_k=cu,
        key_lengths=taken(keys.key_lengths),
        key_padding_mask=taken(keys.key_padding_mask),
        max_seqlen_k=longest,
        batch_size=index.size(0),
        exp_key=taken(keys.exp_key),
        key_bound=taken(keys.key_bound),
    )


def _check_sequences(index: Tensor, keys: KeySide) -> None:
    """Numbers of sequences."""
    check_tensor("index", index)
    check_index("index", index, keys.key.device)
    if index.dim() != 1:
        raise mismatch("index", "shape (B',)", shape_of(index))
    if can_read_values(index) and index.numel():
        smallest, largest = (int(extreme) for extreme in index.aminmax())
        if smallest < 0 or largest >= keys.batch_size:
            expected = f"numbers of sequences, from 0 to {keys.batch_size - 1}"
            raise mismatch("index", expected, str(smallest if smallest < 0 else largest))


def _run_of(index: Tensor) -> slice | None:
    """Which consecutive sequences an index means, if it does and the host may know."""
    if not can_read_values(index) or index.numel() == 0:
        return None
    first = int(index[0])
    run = slice(first, first + index.numel())
    return run if index.tolist() == list(range(run.start, run.stop)) else None


def _rows_of_sequences(cu: Tensor, index: Tensor, total: int) -> tuple[Tensor, Tensor, int]:
    """Numbers of the jagged rows of some sequences, the offsets of what they make up, the longest.

    On an accelerator it synchronises once.
    """
    bounds = cu.clamp(0, total)  # corrupt offsets stay inside the rows
    lengths = bounds.diff().clamp(min=0).index_select(0, index)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(cu.dtype)
    longest = lengths.amax() if index.size(0) else offsets[-1]
    count, longest = torch.stack((offsets[-1], longest.to(cu.dtype))).tolist()
    shifts = bounds.index_select(0, index) - offsets[:-1]
    numbers = torch.arange(count, device=cu.device, dtype=cu.dtype)
    return numbers + shifts.repeat_interleave(lengths, output_size=count), offsets, longest
