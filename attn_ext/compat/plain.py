"""Modules that are what their class makes, and layers that something wraps.

A replacement takes over parameters, so it has to know that the parameters are all there is: no
quantised, pruned or parametrised layer, no adapter around one, no hook, no method put on an
instance. After the takeover all of these may come, as one may do them to any module: then the
layers are called instead of read.
"""

import functools
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import layout
from ..checks import mismatch

_WAY_OUT = (
    "replace the attention first and quantise, prune, parametrise, wrap or hook its layers after "
    "that, or undo it (merge adapters, remove_parametrizations, prune.remove, ...) before replacing"
)


def check_plain(path: str, module: nn.Module, layers: tuple[str, ...]) -> None:
    """Check that a module has the children ``layers``, all plain ``nn.Linear``, and no hooks.

    Raises:
        ValueError: with the path of what is not so, the reason and the way out.
    """
    _check_untouched(path, module)
    # named_children() leaves out what comes twice.
    children = {name: child for name, child in module._modules.items() if child is not None}
    for name in layers:
        child = children.pop(name, None)
        if type(child) is not nn.Linear:
            got = "none" if child is None else _class_of(child)
            raise _refusal(f"{path}.{name}", "a plain torch.nn.Linear", got)
        _check_untouched(f"{path}.{name}", child)
    if children:
        expected = f"no other layers than {', '.join(layers)}"
        raise _refusal(path, expected, f"{', '.join(children)} beside them")


def check_same_parameters(path: str, theirs: nn.Module, ours: nn.Module) -> None:
    """Check that two modules have parameters of the same names and shapes, and buffers likewise.

    Raises:
        ValueError: with the path of what is not so, the reason and the way out.
    """
    found, wanted = (
        dict(m.named_parameters(remove_duplicate=False)) | dict(m.named_buffers())
        for m in (theirs, ours)
    )
    for name, tensor in found.items():
        if name not in wanted:
            raise _refusal(f"{path}.{name}", "no such parameter or buffer", _text_of(tensor))
        if type(tensor) is not nn.Parameter:
            raise _refusal(f"{path}.{name}", "a plain torch.nn.Parameter", _text_of(tensor))
        if tensor.shape != wanted[name].shape:
            raise _refusal(f"{path}.{name}", _text_of(wanted[name]), _text_of(tensor))
    for name in sorted(wanted.keys() - found.keys()):
        raise _refusal(f"{path}.{name}", _text_of(wanted[name]), "none")


def _refusal(path: str, expected: str, got: str) -> ValueError:
    return mismatch(path, expected, f"{got}; nothing was replaced: {_WAY_OUT}")


def _class_of(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _text_of(tensor: Tensor) -> str:
    return f"a {_class_of(tensor)} of shape {tuple(tensor.shape)}"


def _check_untouched(path: str, module: nn.Module) -> None:
    """Without hooks, of state dicts too, and without methods of its own."""
    hooks = [
        name.strip("_")
        for name, value in vars(module).items()
        if name.startswith("_") and name.endswith("_hooks") and value
    ]
    if hooks:
        raise _refusal(path, "a module without hooks", ", ".join(hooks))
    patched = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if patched:
        raise _refusal(path, "the methods of its class", f"its own {', '.join(patched)}")
    if vars(module).get("_compiled_call_impl") is not None:
        raise _refusal(path, "a module that was not compiled", "one that compile() was called on")


# ---- After the takeover ----


def readable_weight(layer: nn.Module) -> Tensor | None:
    """The weight ``[1, D]`` of a layer of one output; None if only a call tells what it computes.

    A parametrised weight can be read: its layer's forward does nothing else.
    """
    kind = type(layer)
    if kind is not nn.Linear and parametrize.is_parametrized(layer):
        kind = parametrize.type_before_parametrizations(layer)
    if kind is not nn.Linear or "forward" in layer.__dict__:
        return None
    if layer._forward_pre_hooks or layer._forward_hooks:
        return None
    if layer._backward_pre_hooks or layer._backward_hooks:
        return None
    weight: Tensor = layer.weight  # type: ignore[assignment]
    # A tensor of another class, as quantisation makes, may have a product of its own.
    if type(weight) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
        return None
    return weight


def attend_by_calls(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attend with scores ``scaling * layer(tanh(query + key))`` by ordinary operations.

    Args:
        layer: from D features to one score, whatever it is.
        query: ``(B, Tq, D)``, or ``(B, D)`` for one query a sequence.
        key: ``(B, Tk, D)``.
        value: ``(B, Tk, Dv)``.
        key_padding_mask: ``(B, Tk)`` bool, True = ignore.
        key_lengths: ``(B,)`` valid prefixes.
        scaling: what scores are multiplied with.

    Returns:
        The context ``(B, Tq, Dv)`` and the weights ``(B, Tq, Tk)``, without Tq for one query.
    """
    _warn_of_calls(_class_of(layer))
    keys = layout.check_key_side(
        key, value, key.new_empty(key.shape[-1:]), None, None, key_padding_mask, key_lengths
    )
    is_one_step = layout.check_query_side(query, keys).is_one_step
    steps = query.unsqueeze(1) if is_one_step else query
    ignored = key.new_zeros(key.shape[:2], dtype=torch.bool)
    if key_padding_mask is not None:
        ignored = key_padding_mask
    elif key_lengths is not None:
        ignored = torch.arange(key.size(1), device=key.device) >= key_lengths[:, None]
    # Padding may hold anything, NaN too.
    key, value = (rows.masked_fill(ignored.unsqueeze(-1), 0) for rows in (key, value))
    scores = scaling * layer(torch.tanh(steps.unsqueeze(2) + key.unsqueeze(1))).squeeze(-1)
    weights = masked_softmax(scores, ignored.unsqueeze(1)).to(value.dtype)
    context = weights @ value
    return (context.squeeze(1), weights.squeeze(1)) if is_one_step else (context, weights)


def masked_softmax(scores: Tensor, ignored: Tensor) -> Tensor:
    """The softmax of scores ``(..., Tk)``, 0 where ignored; all 0 where everything is."""
    nothing_left = ignored.all(-1, keepdim=True)  # such a softmax would be NaN
    weights = scores.masked_fill(ignored & ~nothing_left, -torch.inf).softmax(-1)
    return weights.masked_fill(ignored, 0)


def _warn_of_calls(kind: str) -> None:
    if not torch.compiler.is_compiling():
        _warn_once(kind)


@functools.cache
def _warn_once(kind: str) -> None:
    message = (
        f"attn_ext is slow here, and stores B * Tq * Tk * D values: a {kind} that is quantised, "
        "wrapped or hooked computes the scores, and has to be called for every query and key"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=5)
