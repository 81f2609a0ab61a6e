"""Guard zones: tensors amid memory that no call may read or write.

All bytes of a zone are the same. What is written to it is found by ``check``; what is read from it
makes the results of two calls differ, whose zones hold NAN_BYTES and OTHER_BYTES.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ZONE = 1 << 16  # bytes on either side: a thousand rows of the small tensors of tests
NAN_BYTES = 0xFF  # floating point numbers of every width read as NaN, integers as -1
OTHER_BYTES = 0x3F  # float32 and bfloat16 numbers near 0.75, large integers
aten = torch.ops.aten


class _Guarded:
    """A tensor and its memory, zones included."""

    def __init__(self, like: Tensor, zone: int):
        last = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride()))
        inner = (last + 1) * like.element_size() if like.numel() else 0
        self.zone = zone
        self.bytes = torch.full((2 * ZONE + inner,), zone, dtype=torch.uint8, device=like.device)
        numbers = self.bytes[ZONE : ZONE + inner].view(like.dtype)
        self.tensor = numbers.as_strided(like.shape, like.stride())

    def zones_are_whole(self) -> bool:
        around = self.bytes[:ZONE], self.bytes[-ZONE:]
        return all(bool((side == self.zone).all()) for side in around)


class Guards:
    """Makes guarded copies of inputs, which must stay as they were."""

    def __init__(self, zone: int = NAN_BYTES):
        self._zone = zone
        self._made: list[tuple[_Guarded, Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, strides and ``requires_grad`` amid guard zones."""
        guarded = _Guarded(tensor, self._zone)
        guarded.tensor.copy_(tensor.detach())
        self._made.append((guarded, guarded.bytes.clone()))
        return guarded.tensor.requires_grad_(tensor.requires_grad)

    def check(self) -> None:
        for guarded, before in self._made:
            assert torch.equal(guarded.bytes, before), "a call wrote to its inputs or beside them"


class GuardedMemory(TorchDispatchMode):
    """Puts guard zones around all that ops and their launchers allocate, the C++ ones too.

    New memory holds zeros, so that results do not depend on ``zone``. ``check`` after the calls.
    """

    def __init__(self, zone: int = NAN_BYTES):
        super().__init__()
        self._zone = zone
        self._made: list[_Guarded] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace in ("attn_ext", "attn_ext_cuda"):  # what they allocate comes here too
            device = next(a.device.type for a in args if isinstance(a, Tensor))
            key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
            with self:
                return function.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        result = function(*args, **kwargs)
        new = (aten.new_empty.default, aten.empty.memory_format, aten.new_zeros.default)
        if function not in new:
            return result
        guarded = _Guarded(result, self._zone)
        guarded.tensor.zero_()
        self._made.append(guarded)
        return guarded.tensor

    def check(self) -> int:
        """How many allocations there were; the zones of each must be whole."""
        for guarded in self._made:
            shape = tuple(guarded.tensor.shape)
            assert guarded.zones_are_whole(), f"a call wrote beside what it allocated, {shape}"
        return len(self._made)
