"""Rules of ``torch.func.vmap`` for the ops: what is mapped over becomes more heads.

Heads attend independently, each with its own queries, keys, values and score weights, so in every
layout ``V`` calls over the same sequences are one call with ``V * H`` heads. Calls that differ in
their sequences, or that drop weights at random, are made one after the other.
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import ops

# The head axis of each leading argument that has one, and of each result.
HEAD_AXES: dict[OpOverload, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # query, key, value, score_weight, exp_key, key_bound -> context, weights, stats, scores
    ops.forward: ((2, 2, 2, 0, 2, 2), (2, 1, 2, 2)),
    # dcontext, dweights, query, key, value, score_weight, stats, scores -> their gradients
    ops.backward: ((2, 1, 2, 2, 2, 0, 2, 2), (2, 2, 2, 0)),
    # key -> exp_key, key_bound
    ops.prepare: ((2,), (2, 2)),
    # dcontext, dweights, query, key, value, score_weight, exp_key, key_bound, stats,
    # scores -> dquery, dscores, weights
    ops.step_backward: ((2, 1, 2, 2, 2, 0, 2, 2, 2, 2), (2, 2, 2)),
    # query, dscores, weights, dcontext, key, value, score_weight, exp_key, key_bound
    # -> dkey, dvalue, dscore_weight
    ops.memory_backward: ((2, 3, 3, 2, 2, 2, 0, 2, 2), (2, 2, 0)),
    # key, value, score_weight, gate -> context, weights, stats, scores
    ops.pool_forward: ((2, 2, 0, 2), (2, 1, 2, 2)),
    # dcontext, dweights, key, value, score_weight, gate, stats, scores -> dkey, dvalue,
    # dscore_weight, dgate
    ops.pool_backward: ((2, 1, 2, 2, 0, 2, 2, 2), (2, 2, 0, 2)),
}
_DROPOUT_SEED = {
    op: next((i for i, arg in enumerate(op._schema.arguments) if arg.name == "dropout_seed"), None)
    for op in HEAD_AXES
}


def _fold(tensor: Tensor | None, mapped: int | None, calls: int, axis: int) -> Tensor | None:
    """A tensor of one call, or of all, with the calls folded into its head axis."""
    if tensor is None or (mapped is None and tensor.dim() == 1):  # no scores were kept
        return tensor
    if mapped is None:
        tensor = tensor.unsqueeze(axis)
        tensor = tensor.expand(*tensor.shape[:axis], calls, *tensor.shape[axis + 1 :])
    else:
        tensor = tensor.movedim(mapped, axis)
    return tensor.flatten(axis, axis + 1)


def _heads(arguments: tuple, in_dims: tuple, axes: tuple[int, ...]) -> int:
    """The heads of one call."""
    for tensor, mapped, axis in zip(arguments, in_dims, axes):
        if tensor is not None:
            return tensor.size(axis if mapped is None or mapped > axis else axis + 1)
    raise AssertionError("every op has a tensor with heads")


def _unfold(result: Tensor, calls: int, heads: int, axis: int) -> tuple[Tensor, int | None]:
    """A result of all calls and where they are; what was not asked for is the same for all."""
    if result.dim() == 1:  # empty
        return result, None
    return result.unflatten(axis, (calls, heads)), axis


def batched(
    op: OpOverload, info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The rule of ``op``, as :func:`torch.library.register_vmap` takes it."""
    argument_axes, result_axes = HEAD_AXES[op]
    calls, with_heads = info.batch_size, len(argument_axes)
    seed = _DROPOUT_SEED[op]
    drops = seed is not None and arguments[seed] is not None
    if drops or any(dim is not None for dim in in_dims[with_heads:]):
        return _one_by_one(op, calls, in_dims, arguments)
    folded = (
        _fold(tensor, mapped, calls, axis)
        for tensor, mapped, axis in zip(arguments, in_dims, argument_axes)
    )
    results = op(*folded, *arguments[with_heads:])
    heads = _heads(arguments, in_dims, argument_axes)
    unfolded = (_unfold(result, calls, heads, axis) for result, axis in zip(results, result_axes))
    tensors, places = zip(*unfolded)
    return tensors, places


def _one_by_one(op: OpOverload, calls: int, in_dims: tuple, arguments: tuple):
    each = (
        op(*(_of_call(argument, mapped, call) for argument, mapped in zip(arguments, in_dims)))
        for call in range(max(calls, 1))  # where there are none, one tells the shapes of results
    )
    results = tuple(torch.stack(column)[:calls] for column in zip(*each))
    return results, (0,) * len(results)


def _of_call(argument, mapped: int | None, call: int):
    """The argument of one call; zeros, which offsets and lengths may be too, if there are none."""
    if mapped is None:
        return argument
    if argument.size(mapped) == 0:
        return argument.new_zeros([*argument.shape[:mapped], *argument.shape[mapped + 1 :]])
    return argument.select(mapped, call)
