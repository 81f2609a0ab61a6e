"""What the replacements share: taking over a module, and its parameters, of the original class."""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..memory import AttentionMemory

T = TypeVar("T", bound="Replacement")


class Replacement(nn.Module):
    """What the replacements share: how to take over a module of the original class."""

    original: ClassVar[str]  # full name of the class replaced
    sizes: ClassVar[tuple[str, ...]] = ()  # constructor arguments that the original keeps

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        """The constructor arguments that made ``module``."""
        return {name: getattr(module, name) for name in cls.sizes}

    @classmethod
    def from_original(cls: type[T], module: nn.Module, *, backend: str | None = None) -> T:
        """The replacement of ``module``, with the very same parameters, and in the same mode.

        Raises:
            ValueError: ``module`` computes something else than additive attention.
        """
        ours = cls(**cls._arguments(module), backend=backend)
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(ours.get_submodule(owner), leaf, parameter)
        return ours.train(module.training)


class Stepwise(Replacement):
    """A replacement that attends once a step, and prepares its keys at the first."""

    def __init__(self, backend: str | None):
        super().__init__()
        self.backend = backend
        self._memory: AttentionMemory | None = None
        self._made_for: tuple = ()

    def _forget(self) -> None:
        self._memory, self._made_for = None, ()

    def _recall(self, *made_for: object) -> AttentionMemory | None:
        """The memory, if it was made for the same objects, and to be differentiated as now."""
        made_for = (torch.is_grad_enabled(), *made_for)
        same = len(made_for) == len(self._made_for) and all(
            ours is theirs or (not isinstance(ours, Tensor) and ours == theirs)
            for ours, theirs in zip(made_for, self._made_for)
        )
        if not same:
            self._memory, self._made_for = None, made_for
        return self._memory
