"""What the replacements share: taking over a module, and its parameters, of the original class."""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..checks import mismatch
from ..memory import AttentionMemory
from .plain import check_plain, check_same_parameters

T = TypeVar("T", bound="Replacement")


class Replacement(nn.Module):
    """What the replacements share: how to take over a module of the original class."""

    original: ClassVar[str]  # full name of the class replaced
    sizes: ClassVar[tuple[str, ...]] = ()  # constructor arguments that the original keeps
    layers: ClassVar[tuple[str, ...]]  # the children of the original, each an nn.Linear

    @classmethod
    def is_additive(cls, module: Any) -> bool:
        """Whether ``module``, of the original class, computes what this one does."""
        return True

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        """The constructor arguments that made ``module``."""
        return {name: getattr(module, name) for name in cls.sizes}

    @classmethod
    def from_original(
        cls: type[T], module: nn.Module, *, backend: str | None = None, path: str = "module"
    ) -> T:
        """The replacement of ``module``, with the very same parameters, and in the same mode.

        Args:
            module: of the original class; it stays as it is.
            backend: as :func:`attn_ext.additive_attention`.
            path: what messages call ``module``.

        Raises:
            ValueError: ``module`` computes something else than additive attention, or it is not
                what its class makes: a layer of it is quantised, pruned, parametrised, wrapped,
                hooked or patched. The message names that layer.
        """
        check_plain(path, module, cls.layers)
        try:
            arguments = cls._arguments(module)
        except AttributeError as error:  # a version of the class that is not known here
            raise mismatch(path, f"the attributes of {cls.original}", str(error)) from error
        ours = cls(**arguments, backend=backend)
        check_same_parameters(path, module, ours)
        for name, parameter in module.named_parameters(remove_duplicate=False):  # some may be tied
            owner, _, leaf = name.rpartition(".")
            setattr(ours.get_submodule(owner), leaf, parameter)
        return ours.train(module.training)


class Stepwise(Replacement):
    """A replacement that attends once a step, and prepares its keys at the first.

    What it keeps from step to step belongs to a batch: copies and pickles of the module, which may
    be taken between steps, are without it.
    """

    kept: ClassVar[tuple[str, ...]] = ()  # attributes of a batch

    def __init__(self, backend: str | None):
        super().__init__()
        self.backend = backend
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        nothing = {"_memory": None, "_made_for": (), "_versions": ()}
        return {**self.__dict__, **dict.fromkeys(self.kept), **nothing}

    def _forget(self) -> None:
        self._memory: AttentionMemory | None = None
        self._made_for: tuple = ()
        self._versions: tuple[int | bytes | None, ...] = ()

    def _recall(self, made_for: tuple, watched: tuple[Tensor, ...]) -> AttentionMemory | None:
        """The memory of the step before, if it serves this one, too.

        It does if it was made for the same objects, to be differentiated as now, and if none of
        the ``watched`` tensors changed in place. Where that cannot be known, it does not.
        """
        made_for = (torch.is_grad_enabled(), *made_for)
        versions = tuple(map(_version_of, watched))
        same = (
            None not in versions
            and versions == self._versions
            and len(made_for) == len(self._made_for)
            and all(
                ours is theirs or (not isinstance(ours, Tensor) and ours == theirs)
                for ours, theirs in zip(made_for, self._made_for)
            )
        )
        if not same:
            self._memory, self._made_for, self._versions = None, made_for, versions
        return self._memory


def _version_of(tensor: Tensor) -> int | bytes | None:
    """What changes whenever a tensor changes in place, or None where nothing tells of that.

    Changes of inference tensors are not counted, so that on the CPU it is their content; reading
    that from an accelerator would wait for it. Nor can the counter be read while compiling, and a
    trace has to hold all that a step does.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if not tensor.is_inference():
        return tensor._version
    if tensor.is_cpu:
        return tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return None
