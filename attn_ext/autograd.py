"""How the ops are differentiated: once, by ``backward()`` and by ``torch.func.grad`` and ``vjp``.

:func:`forward`, :func:`backward`, :func:`step_backward`, :func:`memory_backward`,
:func:`pool_forward` and :func:`pool_backward` are the ops of the same names in
:mod:`attn_ext.ops`, called the shortest way, with their arguments by name; what more is given is
left out.
"""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload

from . import batching, ops
from .layout import RAW

INPUTS = 4  # differentiable arguments, which lead the others of the forward ops


def _with_gradient(
    op: OpOverload, gradient_op: OpOverload, gradient: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """A forward op with its gradient, which is an op that takes arguments of the same names."""
    names = ops.argument_names(op)
    kept = [a for a in gradient_op._schema.arguments if a.name in (*names, "stats", "scores")]
    tensors = [argument.name for argument in kept if "Tensor" in str(argument.type)]
    others = [argument.name for argument in kept if argument.name not in tensors]
    get_tensors, get_others = itemgetter(*tensors), itemgetter(*others)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            named = dict(zip(names, arguments))
            named["keep_scores"] = _keeps_scores(op, named)
            output = _recorded_further_out(op, tuple(named.values()))
            _, _, named["stats"], named["scores"] = output
            ctx.save_for_backward(*get_tensors(named))
            ctx.others = get_others(named)
            ctx.mark_non_differentiable(*output[2:])
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx, dcontext, dweights, dstats, dscores):
            no_gradients = (None,) * len(names)
            if dcontext is None and dweights is None:
                return no_gradients
            wanted = ctx.needs_input_grad[:INPUTS]
            named = dict(zip((*tensors, *others), (*ctx.saved_tensors, *ctx.others)))
            named["dcontext"] = dcontext
            named["dweights"] = dweights if named["weights_layout"] else None
            mask = sum(ops.GRADS[name] for name, needed in zip(names, wanted) if needed)
            gradients = gradient(**named, grad_mask=mask)
            chosen = (grad if needed else None for grad, needed in zip(gradients, wanted))
            return (*chosen, *no_gradients[INPUTS:])

    return Recorded


def _keeps_scores(op: OpOverload, named: dict[str, Any]) -> bool:
    """Whether a forward keeps its scores for backward. Those of pooling are K numbers a key."""
    if named["weights_layout"] & RAW:
        return False
    if op is ops.pool_forward:
        return True
    inputs = named["query"], named["key"], named["value"]
    layout = named["cu_seqlens_q"], named["max_seqlen_k"]
    return ops.keeps_scores(*inputs, *layout, named["backend"])


class _Gradient(torch.autograd.Function):
    """An op that computes gradients, which have no derivative of their own."""

    @staticmethod
    def forward(ctx, op, *arguments):
        return _recorded_further_out(op, arguments)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "attn_ext: the gradient of additive attention is not itself differentiable on this "
            "backend; use backend='reference' where you need a second derivative"
        )


def _below_autograd(op: OpOverload, arguments: tuple):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _recorded_further_out(op: OpOverload, arguments: tuple):
    """The op below autograd, but not below the torch.func transforms around this one.

    A Function's forward runs without recording, which would otherwise hold for those too.
    """
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd(op, arguments)
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(op, arguments)


def _record(function: type[torch.autograd.Function], *arguments):
    """``function.apply``, also for the level that a torch.func transform differentiates.

    There Function.apply asks for a rule of torch.func's own. None is needed at the Autograd key,
    where the transform has already made its level the one whose gradients are recorded.
    """
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if not torch._C._are_functorch_transforms_active():
        return apply(*arguments)
    with enable_single_level_autograd_function():
        return apply(*arguments)


def _refuse_tangents(arguments: tuple) -> None:
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "attn_ext: additive attention has no forward-mode derivative on this backend; use "
            "torch.func.vjp or grad instead, or backend='reference' where you need jvp"
        )


# torch.library.register_autograd would do, but it reads the schema in every call, 90 microseconds,
# and torch.func cannot differentiate what it registers.
_library = torch.library.Library("attn_ext", "FRAGMENT")


def _register(
    op: OpOverload, gradient: tuple[OpOverload, Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """Register what an op is at the Autograd key; returns the shortest way to call it.

    ``gradient``: of a forward op, the op of its gradient and how that is called.
    """
    names = ops.argument_names(op)
    if gradient is not None:
        inputs, record = INPUTS, functools.partial(_record, _with_gradient(op, *gradient))
    else:
        inputs, record = len(names), functools.partial(_record, _Gradient, op)

    def kernel(*arguments):
        if torch.autograd.forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[:inputs]):
            return record(*arguments)
        return _below_autograd(op, arguments)

    get_arguments = itemgetter(*names)

    def call(**named):
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # what is recorded then is the op, with its gradient
            or torch._C._are_functorch_transforms_active()
        ):
            return op(*(named[name] for name in names))
        return kernel(*get_arguments(named))  # the dispatcher would take 5 microseconds to do that

    _library.impl(op, kernel, "Autograd")
    return call


backward: Callable[..., Any] = _register(ops.backward)
forward: Callable[..., Any] = _register(ops.forward, (ops.backward, backward))
step_backward: Callable[..., Any] = _register(ops.step_backward)
memory_backward: Callable[..., Any] = _register(ops.memory_backward)
pool_backward: Callable[..., Any] = _register(ops.pool_backward)
pool_forward: Callable[..., Any] = _register(ops.pool_forward, (ops.pool_backward, pool_backward))

for _op in batching.HEAD_AXES:
    torch.library.register_vmap(_op._name, functools.partial(batching.batched, _op))
