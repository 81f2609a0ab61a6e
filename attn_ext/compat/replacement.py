"""What the replacements share: taking over a module, and its parameters, of the original class."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..checks import mismatch, operations_are_recorded, runs_eagerly
from ..memory import AttentionMemory
from .plain import check_plain, check_same_parameters, check_same_settings, original_class_name

T = TypeVar("T", bound="Replacement")


class Replacement(nn.Module):
    """What the replacements share: how to take over a module of the original class."""

    original: ClassVar[str]  # full name of the class replaced
    package: ClassVar[str] = ""  # where that is, as its registry calls it
    tested: ClassVar[str] = ""  # the version of it that the tests compare with
    needs: ClassVar[str] = ""  # what a module has to be to be replaced, beyond being plain
    child: ClassVar[str] = ""  # what of such a module is replaced, if not all of it
    sizes: ClassVar[tuple[str, ...]] = ()  # constructor arguments that the original keeps
    layers: ClassVar[tuple[str, ...]]  # the children of the original that are nn.Linear

    @classmethod
    def replaces(cls) -> str:
        """What is replaced, for the table of :func:`attn_ext.compat.supported`."""
        return f"`{cls.original}`"

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether ``module`` is of the original class."""
        return original_class_name(module) == cls.original

    @classmethod
    def is_additive(cls, module: Any) -> bool:
        """Whether ``module``, of the original class, computes what this one does."""
        return True

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        """The constructor arguments that made ``module``."""
        return {name: getattr(module, name) for name in cls.sizes}

    @classmethod
    def _layers(cls, module: Any) -> Mapping[str, type[nn.Module] | str]:
        """All layers of ``module`` by their paths inside of it, with their classes."""
        return dict.fromkeys(cls.layers, nn.Linear)

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
        layers = cls._layers(module)
        check_plain(path, module, layers)
        try:
            arguments = cls._arguments(module)
        except AttributeError as error:  # a version of the class that is not known here
            raise mismatch(path, f"the attributes of {cls.original}", str(error)) from error
        ours = cls(**arguments, backend=backend)
        check_same_parameters(path, module, ours)
        check_same_settings(path, module, ours, layers)
        for name, parameter in module.named_parameters(remove_duplicate=False):  # some may be tied
            owner, _, leaf = name.rpartition(".")
            setattr(ours.get_submodule(owner), leaf, parameter)
        ours.train(module.training)
        for name in layers:  # dropout may be on in evaluation, or off in training
            ours.get_submodule(name).training = module.get_submodule(name).training
        return ours


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
        made_for = (*made_for, *_modes(made_for))
        versions = tuple(map(_version_of, watched))
        same = (
            None not in versions
            and versions == self._versions
            and _are_same(made_for, self._made_for)
        )
        if not same:
            self._memory, self._made_for, self._versions = None, made_for, versions
        return self._memory


class _Kept(NamedTuple):
    """A memory, and what it was made of; one object, so that threads never see half of it."""

    made_for: tuple
    versions: tuple[int | bytes | None, ...]
    memory: AttentionMemory
    spent: list[bool]  # not empty once a backward pass has run through the projected keys


class Hoisting(Replacement):
    """A replacement of a module that projects its states in every step, and keeps none.

    Steps that follow each other with the very same tensor of states project it once, and share an
    :class:`attn_ext.AttentionMemory`. It serves as long as nothing in it changed, in place either
    (but for changes in place of a ``.data``, which PyTorch does not count), and until a backward
    pass has run through it, and is kept till there are other states. Steps that share it have one
    projection in their graphs: another backward pass through them takes ``retain_graph``. Copies
    and pickles of the module are without it.
    """

    def __init__(self, backend: str | None):
        super().__init__()
        self.backend = backend
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _remember(
        self, states: Tensor, weights: tuple[Tensor, ...] | None, make: Callable[[], tuple]
    ) -> AttentionMemory:
        """The memory of ``states``.

        Args:
            states: what the step is given.
            weights: all parameters that the memory depends on; None where it depends on more, so
                that each step has to make its own.
            make: gives key, value and score_weight of the memory.
        """
        if weights is None or not runs_eagerly():
            return AttentionMemory(*make(), backend=self.backend)
        tensors = (states, *weights)
        made_for = (
            *tensors,
            *_modes(tensors),
            *map(_address_of, tensors),  # another one once ``tensor.data`` was assigned
            _pack_hook(),  # what a checkpoint runs is its own, and again what it recomputes
            torch.are_deterministic_algorithms_enabled(),
            self.backend,
        )
        versions = tuple(map(_version_of, tensors))
        kept = self._kept
        if (
            kept is not None
            and not kept.spent
            and None not in versions
            and versions == kept.versions
            and _are_same(made_for, kept.made_for)
        ):
            return kept.memory
        key, value, score_weight = make()
        memory = AttentionMemory(key, value, score_weight, backend=self.backend)
        spent: list[bool] = []
        if key.requires_grad:
            key.register_hook(lambda _: spent.append(True))
        self._kept = _Kept(made_for, versions, memory, spent)
        return memory


def _are_same(ours: tuple, theirs: tuple) -> bool:
    """Whether two tuples hold the same tensors, not only equal ones, and equal other things."""
    return len(ours) == len(theirs) and all(
        a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(ours, theirs)
    )


def _modes(made_for: tuple) -> tuple:
    """What a memory of tensors depends on beside them: what is differentiated, and autocast."""
    tensors = [thing for thing in made_for if isinstance(thing, Tensor)]
    device = tensors[0].device.type
    return (
        torch.is_grad_enabled(),
        *(tensor.requires_grad for tensor in tensors),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
    )


def _pack_hook() -> weakref.ref | None:
    """What tensors that are saved for a backward pass go through, a function of the checkpoint."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else weakref.ref(hooks[0])


def _address_of(tensor: Tensor) -> int | None:
    """Where the elements of a plain tensor are; others may have none of their own."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else None


def is_counted(tensor: Tensor) -> bool:
    """Whether PyTorch counts how often a tensor changes in place, or a graph is compiled."""
    return torch.compiler.is_compiling() or not tensor.is_inference()


def _version_of(tensor: Tensor) -> int | bytes | None:
    """What changes whenever a tensor changes in place, or None where nothing tells of that.

    Changes of inference tensors are not counted, so that on the CPU it is their content; reading
    that from an accelerator would wait for it. Nor can the counter be read while compiling, and a
    trace or a CUDA graph has to hold all that a step does.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or operations_are_recorded():
        return None
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if not tensor.is_inference():
        return tensor._version
    if tensor.is_cpu:
        return tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return None
