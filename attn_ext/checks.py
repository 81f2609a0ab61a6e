"""Checks of single arguments. Every message names the argument, what was expected and what came."""

import contextlib
import numbers
import operator
import os
import warnings

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_REAL_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


# In a trace sizes are tensors, and PyTorch warns of each check of one, which it cannot record. It
# silences those of its own checks in the same way.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"attn_ext\.")


def mismatch(name: str, expected: str, got: str) -> ValueError:
    """A ValueError in the wording that all messages share."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def wrong_type(name: str, expected: str, got: object) -> TypeError:
    """A TypeError that tells what type ``got`` is of, or which dtype it is."""
    if not isinstance(got, torch.dtype):
        got = f"{type(got).__module__}.{type(got).__qualname__}".removeprefix("builtins.")
    return TypeError(f"{name}: expected {expected}, got {got}")


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise wrong_type(name, "a torch.Tensor", tensor)


def check_strided(name: str, tensor: Tensor) -> None:
    """Neither sparse nor nested."""
    check_tensor(name, tensor)
    if tensor.is_nested:
        raise mismatch(name, "a strided tensor", "a nested one")
    if tensor.layout != torch.strided:
        raise mismatch(name, "a strided tensor", f"layout {tensor.layout}")


def check_floating(name: str, tensor: Tensor) -> None:
    """A dense tensor of one of the dtypes that are computed with."""
    check_strided(name, tensor)
    if tensor.dtype not in DTYPES:
        raise wrong_type(name, "dtype float32, float16, bfloat16 or float64", tensor.dtype)


def check_index(name: str, tensor: Tensor, device: torch.device) -> None:
    """Offsets or lengths."""
    check_strided(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise wrong_type(name, "dtype int32 or int64", tensor.dtype)
    check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise mismatch(name, f"device {device}, as key", str(tensor.device))


def check_beside_key(name: str, tensor: Tensor, key: Tensor) -> None:
    """Floating, where key is, and float64 only if key is: other dtypes mix."""
    check_floating(name, tensor)
    check_device(name, tensor, key.device)
    if (tensor.dtype == torch.float64) != (key.dtype == torch.float64):
        expected = f"a dtype that goes with key's {key.dtype} (float64 does not mix)"
        raise wrong_type(name, expected, tensor.dtype)


def check_probability(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, "a float", value)
    if not 0.0 <= value <= 1.0:
        raise mismatch(name, "a probability between 0 and 1", str(value))
    return float(value)


def check_count(name: str, value: int, least: int = 0) -> int:
    """An integer of at least ``least``; NumPy's and symbolic ones too."""
    if isinstance(value, (bool, Tensor)):
        raise wrong_type(name, "an int", value)
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise wrong_type(name, "an int", value) from None
    if value < least:
        raise mismatch(name, f"at least {least}", str(value))
    return value


def check_flag(name: str, flag: bool | None, optional: bool = False) -> None:
    """A bool, or None where that has a meaning."""
    if not isinstance(flag, bool) and not (optional and flag is None):
        raise wrong_type(name, "a bool or None" if optional else "a bool", flag)


def resolve_deterministic(deterministic: bool | None) -> bool:
    """The ``deterministic`` argument, or the global setting that None stands for."""
    check_flag("deterministic", deterministic, optional=True)
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def can_read_values(tensor: Tensor) -> bool:
    """Whether the host may look at a tensor's values: real, and not on an accelerator.

    ``ATTN_EXT_CHECK=1`` also allows the synchronisation that reading from an accelerator costs.
    In a trace of ``torch.jit`` what was read of the example would be a constant ever after.
    """
    if (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or type(tensor) not in _REAL_TENSORS
        or tensor.is_meta
    ):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.is_cpu or os.environ.get("ATTN_EXT_CHECK") == "1"


def runs_eagerly() -> bool:
    """Whether Python may keep account of calls, for their backward pass.

    A compiled graph cannot follow a list or a callback of Python's, nor can a trace or torch.func.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def operations_are_recorded() -> bool:
    """Whether a dispatch mode sees each operation, as those of fake tensors and ``make_fx`` do.

    What is made then may be fake, and what was made before would be a constant of the record: it
    must not be kept from call to call.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
    )


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Operations in the dtypes of their tensors."""
    if device_type == "meta":  # which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def exports_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is recording, which knows ordinary operations only."""
    recording = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return recording and torch.onnx.is_in_onnx_export()


def records_lengths() -> bool:
    """Whether a graph is being recorded in which a length read on the host would be a constant."""
    return torch.jit.is_tracing() or exports_to_onnx()


def check_offsets(name: str, cu: Tensor, rows_name: str, rows: Tensor) -> int | None:
    """Check offsets into rows; the longest sequence, or None where values are not read."""
    check_index(name, cu, rows.device)
    if cu.dim() != 1 or cu.size(0) < 1:
        raise mismatch(name, "shape (B + 1,)", shape_of(cu))
    if not can_read_values(cu):
        return None
    offsets = cu.tolist()
    if offsets[0] != 0:
        raise mismatch(name, "offsets that start at 0", f"{name}[0] = {offsets[0]}")
    lengths = list(map(operator.sub, offsets[1:], offsets))
    if lengths and min(lengths) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        got = f"{name}[{at}] = {offsets[at]} before {name}[{at + 1}] = {offsets[at + 1]}"
        raise mismatch(name, "offsets that never decrease", got)
    if offsets[-1] > rows.size(0):
        expected = f"offsets of at most {rows.size(0)}, the rows of {rows_name}"
        raise mismatch(name, expected, f"{name}[-1] = {offsets[-1]}")
    return max(lengths, default=0)


def check_bound(name: str, bound: int | None, longest: int | None) -> int | None:
    """Check a ``max_seqlen`` against the longest sequence; either may be unknown."""
    if bound is None:
        return longest
    bound = check_count(name, bound)
    if longest is not None and bound < longest:
        raise mismatch(name, f"at least {longest}, the longest sequence", str(bound))
    return bound


def check_padding(
    mask: Tensor | None, lengths: Tensor | None, max_seqlen: int | None, key: Tensor
) -> None:
    """What may say which of padded keys ``(B, Tk, ...)`` are real."""
    batch, rows = key.size(0), key.size(1)
    if mask is not None and lengths is not None:
        raise mismatch("key_padding_mask, key_lengths", "at most one of them", "both")
    longest: int | None = rows
    if mask is not None:
        longest = None
        check_strided("key_padding_mask", mask)
        if mask.dtype != torch.bool:
            raise wrong_type("key_padding_mask", "dtype bool, True = ignore", mask.dtype)
        if tuple(mask.shape) != (batch, rows):
            raise mismatch("key_padding_mask", f"shape ({batch}, {rows}) = (B, Tk)", shape_of(mask))
        check_device("key_padding_mask", mask, key.device)
    if lengths is not None:
        longest = None
        check_index("key_lengths", lengths, key.device)
        if tuple(lengths.shape) != (batch,):
            raise mismatch("key_lengths", f"shape ({batch},) = (B,)", shape_of(lengths))
        if can_read_values(lengths) and batch:
            shortest, longest = (int(extreme) for extreme in lengths.aminmax())
            if shortest < 0 or longest > rows:
                got = f"a length of {shortest if shortest < 0 else longest}"
                raise mismatch("key_lengths", f"lengths between 0 and Tk = {rows}", got)
    check_bound("max_seqlen_k", max_seqlen, longest)
