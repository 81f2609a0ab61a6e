"""How the ops are differentiated: once, by ``backward()`` and by ``torch.func.grad`` and ``vjp``.

:func:`forward`, :func:`backward`, :func:`step_backward`, :func:`memory_backward`,
:func:`pool_forward` and :func:`pool_backward` are the ops of the same names in
:mod:`attn_ext.ops`, called the shortest way.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from . import batching, ops
from .layout import RAW

# Tensors that lead the forward ops' arguments, the first four differentiable.
_TENSORS, _POOL_TENSORS = 10, 7


class _Forward(torch.autograd.Function):
    """The forward op with its gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        query, key, value, score_weight, _, _, *offsets = arguments[:_TENSORS]
        *ctx.bounds, ctx.dropout_p, dropout_seed, ctx.weights_layout, _ = arguments[_TENSORS:-2]
        ctx.choice = arguments[-2:]
        keeps = not ctx.weights_layout & RAW and ops.keeps_scores(
            query, key, value, offsets[0], ctx.bounds[1], ctx.choice[1]
        )
        output = _recorded_further_out(ops.forward, (*arguments[:-3], keeps, *ctx.choice))
        ctx.save_for_backward(query, key, value, score_weight, *output[2:], dropout_seed, *offsets)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, dcontext, dweights, dstats, dscores):
        no_gradient = (None,) * 14
        if dcontext is None and dweights is None:
            return (None,) * 4 + no_gradient
        wanted = ctx.needs_input_grad[:4]
        query, key, value, score_weight, stats, scores, dropout_seed, *offsets = ctx.saved_tensors
        gradients = backward(
            dcontext,
            dweights if ctx.weights_layout else None,
            query,
            key,
            value,
            score_weight,
            stats,
            scores,
            *offsets,
            *ctx.bounds,
            ctx.dropout_p,
            dropout_seed,
            ctx.weights_layout,
            sum(needed << bit for bit, needed in enumerate(wanted)),
            *ctx.choice,
        )
        chosen = (grad if needed else None for grad, needed in zip(gradients, wanted))
        return (*chosen, *no_gradient)


class _PoolForward(torch.autograd.Function):
    """The same of pooling. Its scores, K numbers a key, are always kept."""

    @staticmethod
    def forward(ctx, *arguments):
        *ctx.options, dropout_seed, ctx.weights_layout, _ = arguments[_POOL_TENSORS:-2]
        ctx.choice = arguments[-2:]
        keeps = not ctx.weights_layout & RAW
        output = _recorded_further_out(ops.pool_forward, (*arguments[:-3], keeps, *ctx.choice))
        ctx.save_for_backward(*output[2:], dropout_seed, *arguments[:_POOL_TENSORS])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, dcontext, dweights, dstats, dscores):
        no_gradient = (None,) * 12
        if dcontext is None and dweights is None:
            return (None,) * 4 + no_gradient
        wanted = ctx.needs_input_grad[:4]
        stats, scores, dropout_seed, *tensors = ctx.saved_tensors
        gradients = pool_backward(
            dcontext,
            dweights if ctx.weights_layout else None,
            *tensors[:4],
            stats,
            scores,
            *tensors[4:],
            *ctx.options,
            dropout_seed,
            ctx.weights_layout,
            sum(needed << bit + 1 for bit, needed in enumerate(wanted)),
            *ctx.choice,
        )
        chosen = (grad if needed else None for grad, needed in zip(gradients, wanted))
        return (*chosen, *no_gradient)


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


def _below_autograd(op: torch._ops.OpOverload, arguments: tuple):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _recorded_further_out(op: torch._ops.OpOverload, arguments: tuple):
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


def _differentiable(
    op: torch._ops.OpOverload, function: type[torch.autograd.Function]
) -> Callable[..., Any]:
    """A forward op at the Autograd key."""

    def kernel(*arguments):
        if torch.autograd.forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[:4]):
            return _record(function, *arguments)
        return _below_autograd(op, arguments)

    return kernel


def _differentiated(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """An op that computes gradients at the Autograd key."""

    def kernel(*arguments):
        if torch.autograd.forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return _record(_Gradient, op, *arguments)
        return _below_autograd(op, arguments)

    return kernel


# torch.library.register_autograd would do, but it reads the schema in every call, 90 microseconds,
# and torch.func cannot differentiate what it registers.
_library = torch.library.Library("attn_ext", "FRAGMENT")


def _register(op: torch._ops.OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Register the kernel of the Autograd key; the shortest way to call it."""
    _library.impl(op, kernel, "Autograd")

    def call(*arguments):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*arguments)
        return kernel(*arguments)  # the dispatcher would take 5 microseconds to do that

    return call


forward: Callable[..., Any] = _register(ops.forward, _differentiable(ops.forward, _Forward))
backward: Callable[..., Any] = _register(ops.backward, _differentiated(ops.backward))
step_backward: Callable[..., Any] = _register(ops.step_backward, _differentiated(ops.step_backward))
memory_backward: Callable[..., Any] = _register(
    ops.memory_backward, _differentiated(ops.memory_backward)
)
pool_forward: Callable[..., Any] = _register(
    ops.pool_forward, _differentiable(ops.pool_forward, _PoolForward)
)
pool_backward: Callable[..., Any] = _register(ops.pool_backward, _differentiated(ops.pool_backward))

for _op in batching.HEAD_AXES:
    torch.library.register_vmap(_op._name, functools.partial(batching.batched, _op))
