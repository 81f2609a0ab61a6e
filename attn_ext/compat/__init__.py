"""Drop-in replacements for the additive attention of code bases that people run.

Each class has the constructor, the parameter names, the call and the results of the module it
replaces: ``load_state_dict`` takes over trained parameters, ``from_original`` a module with its
parameters themselves (an optimizer that holds them stays valid), and :func:`replace_attention` all
such modules of a model at once; :func:`supported` prints which there are. Keras's layer is no
PyTorch module of known size: its replacement is told ``dim``, and ``from_keras`` copies a layer.

Three things differ on purpose. Where every key is masked the context and the weights are 0, not
NaN or a mean over padding. Modules that project the same states anew in each step of a decoder do
it once here, for as long as they are given the very same tensor. And so the steps of such a
decoder, and decoders over the same states, share a graph: backward through them together, or
retain it.

Every constructor also takes ``backend``, as :func:`attn_ext.additive_attention` does.
"""

from typing import Any

from torch import nn

from ..checks import mismatch, wrong_type
from .clam import CLAMAttnNet, CLAMAttnNetGated
from .coqui import CoquiOriginalAttention
from .doctr import DocTRAttentionModule
from .espnet import ESPnetAttAdd, ESPnetAttCov, ESPnetAttLoc
from .gnmt import GNMTBahdanauAttention
from .joeynmt import JoeyNMTBahdanauAttention
from .keras import KerasAdditiveAttention
from .monai import MONAIMILAttention
from .opennmt import OpenNMTGlobalAttention
from .replacement import Replacement
from .speechbrain import SpeechBrainContentBasedAttention, SpeechBrainLocationAwareAttention
from .torchmil import TorchMILAttentionPool
from .transformers import (
    TransformersSLANetAttentionGRUCell,
    TransformersSLANeXtAttentionGRUCell,
)

__all__ = [
    "CLAMAttnNet",
    "CLAMAttnNetGated",
    "CoquiOriginalAttention",
    "DocTRAttentionModule",
    "ESPnetAttAdd",
    "ESPnetAttCov",
    "ESPnetAttLoc",
    "GNMTBahdanauAttention",
    "JoeyNMTBahdanauAttention",
    "KerasAdditiveAttention",
    "MONAIMILAttention",
    "OpenNMTGlobalAttention",
    "SpeechBrainContentBasedAttention",
    "SpeechBrainLocationAwareAttention",
    "TorchMILAttentionPool",
    "TransformersSLANeXtAttentionGRUCell",
    "TransformersSLANetAttentionGRUCell",
    "replace_attention",
    "supported",
]

_KINDS: tuple[type[Replacement], ...] = (
    OpenNMTGlobalAttention,
    GNMTBahdanauAttention,
    JoeyNMTBahdanauAttention,
    ESPnetAttAdd,
    ESPnetAttCov,
    ESPnetAttLoc,
    SpeechBrainContentBasedAttention,
    SpeechBrainLocationAwareAttention,
    CoquiOriginalAttention,
    TransformersSLANetAttentionGRUCell,
    TransformersSLANeXtAttentionGRUCell,
    DocTRAttentionModule,
    TorchMILAttentionPool,
    MONAIMILAttention,
    CLAMAttnNetGated,
    CLAMAttnNet,
)


def supported() -> None:
    """Print what :func:`replace_attention` replaces, as a table in Markdown.

    Of each class its name here, what it replaces (a full name, or how a module is known), the
    package with the version that the tests compare with, and what a module has to be.
    """
    print("| class here | replaces | package, version tested | has to have |\n|---|---|---|---|")
    kinds: tuple[Any, ...] = (*_KINDS, KerasAdditiveAttention)
    for kind in kinds:
        package = f"{kind.package} {kind.tested or '(on no index)'}"
        print(f"| `{kind.__name__}` | {kind.replaces()} | {package} | {kind.needs} |")


def replace_attention(model: nn.Module, *, backend: str | None = None) -> list[str]:
    """Replace every attention module of ``model`` that has one here, keeping its parameters.

    Modules are known by the full name of their class, or as :func:`supported` says; those that
    compute something else (OpenNMT's with ``attn_type="dot"``) stay as they are. Do this before
    ``torch.compile``, before wrapping for distributed training, and before layers are quantised,
    pruned, parametrised, given adapters or hooks. All of that is right afterwards; before, it is
    refused where it concerns an attention.

    Args:
        model: changed in place, or not at all where this raises.
        backend: as :func:`attn_ext.additive_attention`.

    Returns:
        The names of the modules replaced; all of its names where one has several.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is itself such a module, so that there is nothing to change in place,
            or an attention in it is not as its class makes it. The message has its path.
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("model", "a torch.nn.Module", model)
    planned: list[tuple[str, nn.Module]] = []
    made: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = next((kind for kind in _KINDS if kind.recognises(module)), None)
        if kind is None:
            continue
        if kind.child:
            name, module = f"{name}.{kind.child}".lstrip("."), module.get_submodule(kind.child)
        if not kind.is_additive(module):
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
