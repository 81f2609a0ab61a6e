"""Drop-in replacements for the additive attention of code bases that people run.

Each class has the constructor, the parameter names, the call and the results of the module it
replaces: ``load_state_dict`` takes over trained parameters, ``from_original`` a module with its
parameters themselves (an optimizer that holds them goes on), and :func:`replace_attention` all
such modules of a model at once. One thing is other, and meant to be: where every key is masked the
context and the weights are 0, not NaN or a mean over padding.

Every constructor also takes ``backend``, as :func:`attn_ext.additive_attention` does.
"""

from torch import nn

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
        The names of the modules replaced.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        kind = _REPLACEMENTS.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if kind is None or not name:
            continue
        try:
            ours = kind.from_original(module, backend=backend)
        except ValueError:
            continue
        model.set_submodule(name, ours)
        replaced.append(name)
    return replaced
