"""What a call is made of, as the launchers hand it to kernels."""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .configurations import MOST_ORDERED, Tiles
from .rows import Dropout, Inputs, KeySide, Rows

GRAD_QUERY, GRAD_KEY = 1, 2  # of a mask of gradients; those of others follow
DENSE_WEIGHTS, JAGGED_WEIGHTS = 1, 2
# For scores, where a bound on lengths was neither given nor read: more is an error with a remedy.
MOST_UNREAD_BYTES = 1 << 30
RAW = 4  # added to these: scores instead of weights; values and softmax are not used


class Problem(NamedTuple):
    """A call's sizes, and what its kernels take."""

    batch: int
    heads: int
    dim: int
    value_dim: int
    rows_q: int
    rows_k: int
    max_q: int
    max_k: int
    cu_q: Tensor | None
    cu_k: Tensor | None
    inputs: Inputs
    is_unread: bool  # whether a longest sequence counts as all rows, because none was given or read

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Those that vary from call to call, as kernels take them."""
        return self.batch, self.rows_q, self.rows_k, self.max_q, self.max_k

    @property
    def is_one_step(self) -> bool:
        return self.cu_q is None and self.rows_q == 1

    @property
    def all_rows_q(self) -> int:
        return self.rows_q * (self.batch if self.cu_q is None else 1)

    @property
    def all_rows_k(self) -> int:
        return self.rows_k * (self.batch if self.cu_k is None else 1)

    @property
    def has_no_keys(self) -> bool:
        return self.all_rows_k == 0 or self.batch == 0

    @property
    def uses_ptx(self) -> bool:
        """Inline assembly is for NVIDIA; AMD and the interpreter take plain Triton."""
        is_gpu = self.inputs.key.ptr.is_cuda and not triton.knobs.runtime.interpret
        return is_gpu and torch.version.hip is None

    def sequences(self) -> int:
        """With that of the rows that belong to nobody."""
        return self.batch + (self.cu_q is not None or self.cu_k is not None)

    def is_ordered(self) -> bool:
        """Whether sequences differ, and are few enough to compare each with all."""
        lengths = self.inputs.key_side.lengths_ptr
        differ = not (self.cu_q is None and self.cu_k is None and lengths is None)
        return differ and self.sequences() <= MOST_ORDERED

    def tiles(self, side: str, rows: int) -> int:
        """How many tiles of so many rows a side has at most; see ``rows.find_tile``."""
        cu, count = (self.cu_q, self.rows_q) if side == "q" else (self.cu_k, self.rows_k)
        if cu is None:
            return self.batch * triton.cdiv(count, rows)
        return count // rows + self.batch + 1


def describe(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    feature_dropout: tuple[float, float] = (0.0, 0.0),
) -> Problem:
    """In pooling branches, of which there are ``max_q``, take the place of a sequence's queries."""
    rows_q, rows_k = max_q if query is None else query.size(1), key.size(1)
    cu_q = None if cu_q is None else cu_q.contiguous()
    cu_k = None if cu_k is None else cu_k.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    inputs = Inputs(
        as_rows(query, cu_q),
        as_rows(key, cu_k),
        as_rows(gate, cu_k),
        as_rows(value, cu_k),
        score_weight.contiguous(),
        cu_q,
        KeySide(cu_k, lengths, mask),
        dropout_of(dropout_p, seed),
        dropout_of(feature_dropout[0], seed),
        dropout_of(feature_dropout[1], seed),
    )
    return Problem(
        key.size(0) if cu_k is None else cu_k.size(0) - 1,
        key.size(2),
        key.size(3),
        value.size(3),
        rows_q,
        rows_k,
        rows_q if cu_q is None else _bound(max_q, cu_q, rows_q),
        rows_k if cu_k is None else _bound(max_k, cu_k, rows_k),
        cu_q,
        cu_k,
        inputs,
        _is_unread(max_q, cu_q, rows_q) or _is_unread(max_k, cu_k, rows_k),
    )


def _bound(given: int, cu: Tensor, rows: int) -> int:
    """``max_seqlen``; where none was given (see ``layout``), the longest sequence."""
    if given != rows + 1 or cu.size(0) <= 2 or _is_capturing(cu):
        return min(given, rows)
    return min(max(read_longest(cu), 0), rows)


def _is_unread(given: int, cu: Tensor | None, rows: int) -> bool:
    return cu is not None and given == rows + 1 and cu.size(0) > 2 and _is_capturing(cu)


def check_workspace(problem: Problem, count: int) -> None:
    """Raise ValueError where ``count`` float32 numbers are many only for want of a bound."""
    if problem.is_unread and 4 * count > MOST_UNREAD_BYTES:
        raise ValueError(
            "max_seqlen_q, max_seqlen_k: expected the longest sequences, which cannot be read "
            f"while a CUDA graph is captured, got None, by which backward needs "
            f"{4 * count / 2**30:.1f} GiB for scores of all {problem.all_rows_q} queries and all "
            f"{problem.all_rows_k} keys"
        )


def read_longest(cu: Tensor) -> int:
    """The longest sequence's length; waits for the device."""
    return cu.diff().max().item()


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def register_limit(tiles: Tiles) -> dict[str, int]:
    """The option of a launch; only NVIDIA's compiler has it."""
    return {} if torch.version.hip or not tiles.registers else {"maxnreg": tiles.registers}


def processors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def dropout_of(p: float, seed: Tensor | None) -> Dropout | None:
    if p == 0:
        return None
    return Dropout(seed, float(math.ceil(p * 2**24)), 1 / (1 - p) if p < 1 else 0.0)


def as_rows(tensor: Tensor | None, cu: Tensor | None = None) -> Rows | None:
    """As kernels take them, copied where features are apart or rows start at odd places.

    Jagged rows are all at place 0: their stride, which would vary with the number of tokens, and so
    call for other machine code, does not matter.
    """
    if tensor is None:
        return None
    by_place, by_row, by_head, by_feature = tensor.stride()
    dim = tensor.size(3)
    is_odd = dim % 8 == 0 and (by_place | by_row | by_head) % 8 != 0
    if is_odd or (by_feature != 1 and dim > 1):
        tensor = tensor.contiguous()
        by_place, by_row, by_head, _ = tensor.stride()
    return Rows(tensor, by_place if cu is None else 0, by_row, by_head)


def new_gradients(
    tensors: tuple[Tensor, ...], grad_mask: int
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """What an op returns, empty where no gradient is asked for, and None there. The first tensor's
    bit is 1."""
    gradients, wanted = [], []
    for bit, tensor in enumerate(tensors):
        is_wanted = grad_mask & 1 << bit
        gradients.append(tensor.new_empty(tensor.shape if is_wanted else (0,)))
        wanted.append(gradients[-1] if is_wanted else None)
    return tuple(gradients), wanted


def is_constant(problem: Problem, dweights: Tensor | None) -> bool:
    """Whether no result whose gradient came in depends on any input."""
    return problem.has_no_keys or (problem.value_dim == 0 and dweights is None)
