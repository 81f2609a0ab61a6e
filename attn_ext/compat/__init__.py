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
from torch.nn.utils import parametrize

from ..checks import mismatch
from .coqui import CoquiOriginalAttention
from .espnet import ESPnetAttAdd, ESPnetAttCov, ESPnetAttLoc
from .gnmt import GNMTBahdanauAttention
from .joeynmt import JoeyNMTBahdanauAttention
from .keras import KerasAdditiveAttention
from .opennmt import OpenNMTGlobalAttention
from .replacement import Replacement
from .speechbrain import SpeechBrainContentBasedAttention, SpeechBrainLocationAwareAttention

__all__ = [
    "CoquiOriginalAttention",
    "ESPnetAttAdd",
    "ESPnetAttCov",
    "ESPnetAttLoc",
    "GNMTBahdanauAttention",
    "JoeyNMTBahdanauAttention",
    "KerasAdditiveAttention",
    "OpenNMTGlobalAttention",
    "SpeechBrainContentBasedAttention",
    "SpeechBrainLocationAwareAttention",
    "replace_attention",
]

_KINDS = (
    OpenNMTGlobalAttention,
    GNMTBahdanauAttention,
    JoeyNMTBahdanauAttention,
    ESPnetAttAdd,
    ESPnetAttCov,
    ESPnetAttLoc,
    SpeechBrainContentBasedAttention,
    SpeechBrainLocationAwareAttention,
    CoquiOriginalAttention,
)
_REPLACEMENTS: dict[str, type[Replacement]] = {kind.original: kind for kind in _KINDS}


def replace_attention(model: nn.Module, *, backend: str | None = None) -> list[str]:
    """Replace every attention module of ``model`` that has one here, keeping its parameters.

    Modules are known by the full name of their class; those that compute something else (OpenNMT's
    with ``attn_type="dot"``) stay as they are. Do this before ``torch.compile``, before wrapping
    for distributed training, and before layers are quantised, pruned, parametrised, given adapters
    or hooks. All of that is right afterwards; before, it is refused where it concerns an attention.

    Args:
        model: changed in place, or not at all where this raises.
        backend: as :func:`attn_ext.additive_attention`.

    Returns:
        The names of the modules replaced; all of its names where one has several.

    Raises:
        ValueError: ``model`` is itself such a module, so that there is nothing to change in place,
            or an attention in it is not as its class makes it. The message has its path.
    """
    planned: list[tuple[str, nn.Module]] = []
    made: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = _REPLACEMENTS.get(_class_name(module))
        if kind is None or not kind.is_additive(module):
            continue
        if not name:
            got = f"the attention itself; use {kind.__name__}.from_original(model)"
            raise mismatch("model", "a module that contains attention modules", got)
        if name.rpartition(".")[2] == "_orig_mod":
            got = "a compiled one; replace it before torch.compile"
            raise mismatch(f"model.{name}", "an attention module that is not compiled", got)
        if id(module) not in made:
            made[id(module)] = kind.from_original(module, backend=backend, path=f"model.{name}")
        planned.append((name, made[id(module)]))
    for name, ours in planned:
        model.set_submodule(name, ours)
    return [name for name, _ in planned]


def _class_name(module: nn.Module) -> str:
    """The full name of a module's class, also where a parametrisation has made another of it."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = parametrize.type_before_parametrizations(module)
    return f"{kind.__module__}.{kind.__qualname__}"
