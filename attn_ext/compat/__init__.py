"""Drop-in replacements for the additive attention of code bases that people run.

Each class has the constructor, the parameter names, the call and the results of the module it
replaces: ``load_state_dict`` takes over trained parameters, ``from_original`` a module with its
parameters themselves (an optimizer that holds them goes on), and :func:`replace_attention` all
such modules of a model at once. Keras's layer is no PyTorch module of known size: its replacement
is told ``dim``, and ``from_keras`` copies a layer. One thing is other, and meant to be: where every
key is masked the context and the weights are 0, not NaN or a mean over padding.

Every constructor also takes ``backend``, as :func:`attn_ext.additive_attention` does.
"""

from torch import nn

from ..checks import mismatch
from .espnet import ESPnetAttAdd
from .gnmt import GNMTBahdanauAttention
from .joeynmt import JoeyNMTBahdanauAttention
from .keras import KerasAdditiveAttention
from .opennmt import OpenNMTGlobalAttention
from .replacement import Replacement

__all__ = [
    "ESPnetAttAdd",
    "GNMTBahdanauAttention",
    "JoeyNMTBahdanauAttention",
    "KerasAdditiveAttention",
    "OpenNMTGlobalAttention",
    "replace_attention",
]

_KINDS = (OpenNMTGlobalAttention, GNMTBahdanauAttention, JoeyNMTBahdanauAttention, ESPnetAttAdd)
_REPLACEMENTS: dict[str, type[Replacement]] = {kind.original: kind for kind in _KINDS}


def replace_attention(model: nn.Module, *, backend: str | None = None) -> list[str]:
    """Replace every attention module of ``model`` that has one here, keeping its parameters.

    Modules are known by the full name of their class; those that compute something else (OpenNMT's
    with ``attn_type="dot"``) stay as they are. Do this before ``torch.compile`` and before wrapping
    for distributed training.

    Args:
        model: changed in place.
        backend: as :func:`attn_ext.additive_attention`.

    Returns:
        The names of the modules replaced; all of its names where one has several.

    Raises:
        ValueError: ``model`` is itself such a module, so that there is nothing to change in place.
    """
    replaced, made = [], {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind = _REPLACEMENTS.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if kind is None:
            continue
        if id(module) not in made:
            made[id(module)] = _replacement(kind, module, backend)
        ours = made[id(module)]
        if ours is None:
            continue
        if not name:
            got = f"the attention itself; use {kind.__name__}.from_original(model)"
            raise mismatch("model", "a module that contains attention modules", got)
        model.set_submodule(name, ours)
        replaced.append(name)
    return replaced


def _replacement(
    kind: type[Replacement], module: nn.Module, backend: str | None
) -> Replacement | None:
    """The replacement of ``module``, or None if it computes something else."""
    try:
        return kind.from_original(module, backend=backend)
    except ValueError:
        return None
