"""Modules that are what their class makes, and layers that something wraps.

A replacement takes over parameters, so it has to know that the parameters are all there is: no
quantised, pruned or parametrised layer, no adapter around one, no hook, no method put on an
instance. After the takeover all of these may come, as one may do them to any module: then the
layers are called instead of read.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import layout
from ..checks import mismatch

_WAY_OUT = (
    "replace the attention first and quantise, prune, parametrise, wrap or hook its layers after "
    "that, or undo it (merge adapters, remove_parametrizations, prune.remove, ...) before replacing"
)


def check_plain(path: str, module: nn.Module, layers: Mapping[str, type[nn.Module] | str]) -> None:
    """Check that a module has the layers ``layers``, of just these classes, and no hooks.

    Args:
        path: what messages call ``module``.
        module: what is looked at, with all layers inside of it.
        layers: their classes, or the full names of these, by their paths inside of ``module``.

    Raises:
        ValueError: with the path of what is not so, the reason and the way out.
    """
    _check_untouched(path, module)
    found = dict(module.named_modules(remove_duplicate=False))
    del found[""]
    for name, kind in layers.items():
        child = found.pop(name, None)
        expected = kind if isinstance(kind, str) else class_name(kind)
        if child is None or class_name(type(child)) != expected:
            got = "none" if child is None else class_name(type(child))
            public = f"torch.nn.{kind.__name__}" if isinstance(kind, type) else kind
            raise _refusal(f"{path}.{name}", f"a plain {public}", got)
        _check_untouched(f"{path}.{name}", child)
    others = [name for name in found if name.rpartition(".")[0] not in found]
    if others:
        expected = f"no other layers than {', '.join(layers)}"
        raise _refusal(path, expected, f"{', '.join(others)} beside them")


def check_same_settings(
    path: str, theirs: nn.Module, ours: nn.Module, layers: Mapping[str, object]
) -> None:
    """Check that the layers of two modules print the same settings, as strides and probabilities.

    Raises:
        ValueError: with the path of what is not so, the reason and the way out.
    """
    for name in layers:
        found, wanted = (module.get_submodule(name).extra_repr() for module in (theirs, ours))
        if found != wanted:
            raise _refusal(f"{path}.{name}", f"the settings ({wanted})", f"({found})")


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


def class_name(kind: type) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def original_class_name(module: nn.Module) -> str:
    """That of a module's class, also where a parametrisation has made another of it."""
    if parametrize.is_parametrized(module):
        return class_name(parametrize.type_before_parametrizations(module))
    return class_name(type(module))


def _text_of(tensor: Tensor) -> str:
    return f"a {class_name(type(tensor))} of shape {tuple(tensor.shape)}"


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


def is_plain(layer: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether a call of ``layer`` does what its class does; parametrised weights are allowed."""
    kind = type(layer)
    if kind is not expected and parametrize.is_parametrized(layer):
        kind = parametrize.type_before_parametrizations(layer)
    if kind is not expected or "forward" in layer.__dict__:
        return False
    if layer._forward_pre_hooks or layer._forward_hooks:
        return False
    return not (layer._backward_pre_hooks or layer._backward_hooks)


def readable_weight(layer: nn.Module, expected: type[nn.Module] = nn.Linear) -> Tensor | None:
    """The weight of a layer that scores; None if only a call tells what it computes.

    A parametrised weight can be read: its layer's forward does nothing else.

    Args:
        layer: of one output or several, ``[K, D]``, or of another shape where it is no Linear.
        expected: the class that it has where nothing was done to it.
    """
    if not is_plain(layer, expected):
        return None
    weight: Tensor = layer.weight  # type: ignore[assignment]
    # A tensor of another class, as quantisation makes, may have a product of its own.
    if type(weight) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
        return None
    return weight


def readable(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, as :func:`readable_weight`.

    The layer may be alone in an ``nn.Sequential``.
    """
    while is_plain(layer, nn.Sequential) and len(layer._modules) == 1:
        (layer,) = layer.children()
    weight = readable_weight(layer)
    return None if weight is None else (weight, layer.bias)  # type: ignore[return-value]


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
    warn_of_calls(layer)
    scores, ignored = _scores_and_ignored(
        layer, query, key, value, key_padding_mask, key_lengths, scaling
    )
    value = value.masked_fill(ignored.unsqueeze(-1), 0)  # padding may hold anything, NaN too
    weights = masked_softmax(scores, ignored.unsqueeze(1)).to(value.dtype)
    context = weights @ value
    return (context, weights) if query.dim() == 3 else (context.squeeze(1), weights.squeeze(1))


def scores_by_calls(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The scores ``(B, Tq, Tk)`` of :func:`attend_by_calls`, -inf for ignored keys.

    They are without Tq for one query, and at least float32.
    """
    warn_of_calls(layer)
    scores, ignored = _scores_and_ignored(
        layer, query, key, key, key_padding_mask, key_lengths, scaling
    )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(ignored.unsqueeze(1), -torch.inf)
    return scores if query.dim() == 3 else scores.squeeze(1)


def _scores_and_ignored(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Scores ``[B, Tq, Tk]``, anything for ignored keys, and which those are, ``[B, Tk]``."""
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
    key = key.masked_fill(ignored.unsqueeze(-1), 0)
    scores = scaling * layer(torch.tanh(steps.unsqueeze(2) + key.unsqueeze(1))).squeeze(-1)
    return scores, ignored


def masked_softmax(scores: Tensor, ignored: Tensor) -> Tensor:
    """The softmax of scores ``(..., Tk)``, 0 where ignored; all 0 where everything is."""
    nothing_left = ignored.all(-1, keepdim=True)  # such a softmax would be NaN
    weights = scores.masked_fill(ignored & ~nothing_left, -torch.inf).softmax(-1)
    return weights.masked_fill(ignored, 0)


def weigh(weights: Tensor, value: Tensor) -> Tensor:
    """The context ``(B, Dv)`` of weights ``(B, Tk)``; where one is 0 the value may be NaN."""
    value = value.masked_fill((weights == 0).unsqueeze(-1), 0)
    return (weights.to(value.dtype).unsqueeze(1) @ value).squeeze(1)


def warn_of_calls(layer: nn.Module) -> None:
    """Say once, of each class of layer, that scores are computed by calling one."""
    if not torch.compiler.is_compiling():
        _warn_once(class_name(type(layer)))


@functools.cache
def _warn_once(kind: str) -> None:
    message = (
        f"attn_ext is slow here, and stores B * Tq * Tk * D values: a {kind} that is quantised, "
        "wrapped or hooked computes the scores, and has to be called for every query and key"
    )
    # The first caller outside of this package, PyTorch as a rule.
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("attn_ext."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
