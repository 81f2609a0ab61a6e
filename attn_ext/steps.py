"""How the steps of an :class:`attn_ext.AttentionMemory` are differentiated.

A step's backward gives the gradient of what is its own, the query and the features, and leaves a
record; when all steps of a ``backward()`` have run, one batched pass makes the gradients of what
they share from all records.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from . import autograd, ops
from .checks import operations_are_recorded
from .features import shifted_keys
from .layout import DENSE_WEIGHTS, JAGGED_WEIGHTS, RAW, KeySide, Prepared

GRAD_QUERY, GRAD_KEY, GRAD_VALUE, GRAD_SCORE_WEIGHT = 1, 2, 4, 8  # bits of the ops' grad_mask


class _Records:
    """What the steps of one backward pass leave."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        # (query, dscores, weights, dcontext) of each step without features, and of those with.
        self.plain: list[tuple[Tensor, ...]] = []
        self.featured: list[tuple[Tensor, ...]] = []
        # Gradients of key, score_weight and feature_weight so far, from steps with features, whose
        # keys were not those of the others.
        self.sums: list[Tensor] = []


class Steps:
    """The prepared key side, and what the steps of a backward pass leave for the batched pass."""

    def __init__(
        self,
        keys: KeySide,
        feature_weight: Tensor | None,  # [F, H, D]
        choice: tuple[bool, str],
        prepared: Prepared | None,
    ):
        self.keys = keys
        self.choice = choice
        # Not detached, so that under create_graph the backward ops refuse a second derivative.
        self.inputs: tuple[Tensor, Tensor, Tensor] = (keys.key, keys.value, keys.score_weight)
        self.feature_weight = feature_weight
        wanted = (t.requires_grad << bit for bit, t in enumerate(self.inputs, start=1))
        self.grad_mask: int = sum(wanted)
        if prepared is None:
            # Accelerators exponentiate keys faster than they would read prepared exponentials.
            prepared = ops.prepare(keys.key.detach()) if choice[1] == "cpu" else (None, None)
        self.prepared = prepared
        self.key_layout: tuple[Tensor | None, Tensor | None, Tensor | None] = (
            keys.cu_seqlens,
            keys.lengths,
            keys.padding_mask,
        )
        self._rooms: list[Tensor] = []  # for keys with features, of steps that have run
        self._versions = self._current_versions()
        # By backward pass: passes may nest (reentrant checkpointing) or run in several threads.
        self._records: weakref.WeakValueDictionary[int, _Records] = weakref.WeakValueDictionary()

    def make_token(self) -> Tensor:
        """What each step takes. It knows the steps, which must not hold it in turn."""
        return _Collect.apply(*self.inputs, self.feature_weight, self)

    def attend(
        self,
        token: Tensor,
        query: Tensor,
        features: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
        weights_layout: int,
    ) -> tuple[Tensor, Tensor]:
        """Context and weights of one query a sequence, in the internal form."""
        tensors = (query, token) if features is None else (query, token, features)
        keeps_scores = (
            torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in tensors)
            and not weights_layout & RAW
            and ops.keeps_scores(
                query, self.keys.key, self.keys.value, None, self.keys.max_seqlen, self.choice[1]
            )
        )
        options = dropout_p, seed, weights_layout, keeps_scores
        return _Attend.apply(query, token, features, self, *options)

    def _current_versions(self) -> list[int]:
        tensors = (*self.inputs, self.feature_weight, *self.key_layout)
        tracked = (t for t in tensors if t is not None and not t.is_inference())
        return [tensor._version for tensor in tracked]

    def check_unchanged(self) -> None:
        if self._current_versions() != self._versions:
            raise RuntimeError(
                "attn_ext.AttentionMemory: key, value, score_weight, feature_weight, or the "
                "offsets, lengths or mask were modified in place after the memory was made; make a "
                "new memory"
            )

    @contextlib.contextmanager
    def shifted_keys(self, features: Tensor) -> Iterator[Tensor]:
        """The keys of a step with features.

        On the CPU one step after the other has them in the same memory. Freed blocks of that size
        would be split by what each step keeps, and never be used again: two or three times the
        memory. In inference mode nothing is kept, and memory made there could not be written to
        outside.
        """
        key, weight = self.inputs[0], self.feature_weight
        assert weight is not None  # or there were no features
        if (
            not key.is_cpu
            or torch.is_grad_enabled()  # in backward, with create_graph
            or torch.is_inference_mode_enabled()
            or operations_are_recorded()
        ):
            yield shifted_keys(key, features, weight)
            return
        try:
            room = self._rooms.pop()  # from here on no other thread has it
        except IndexError:
            room = torch.empty_like(key, memory_format=torch.contiguous_format)
        yield shifted_keys(key, features, weight, out=room)
        self._rooms.append(room)

    def records(self) -> _Records:
        """Those of this backward pass."""
        task = torch._C._current_graph_task_id()
        records = self._records.get(task)
        if records is None:
            records = self._records[task] = _Records()
            # The pass owns them: it lets go of its callbacks when it ends, by an error too.
            torch.autograd.Variable._execution_engine.queue_callback(records.clear)
        return records

    def take(self) -> _Records | None:
        """The same to the batched pass, if there are any; they are gone then."""
        return self._records.pop(torch._C._current_graph_task_id(), None)


class _Collect(torch.autograd.Function):
    """Gives the token that every step takes, so that its backward runs after all of theirs."""

    @staticmethod
    def forward(ctx, key, value, score_weight, feature_weight, steps):
        ctx.steps = steps
        return key.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        steps, wanted = ctx.steps, ctx.needs_input_grad[:3]
        records = steps.take()
        if records is None:
            return (None,) * 5
        steps.check_unchanged()
        mask = sum(needed << bit for bit, needed in enumerate((False, *wanted)))
        dkey, dvalue, dscore_weight = _batched(steps, records.plain, mask)
        dfeature_weight = None
        if records.featured:
            _, more_dvalue, _ = _batched(steps, records.featured, mask & GRAD_VALUE)
            dvalue = _add(dvalue, more_dvalue, steps.inputs[1])
            more_dkey, more_dscore_weight, dfeature_weight = records.sums
            dkey = _add(dkey, more_dkey, steps.inputs[0])
            dscore_weight = _add(dscore_weight, more_dscore_weight, steps.inputs[2])
            dfeature_weight = dfeature_weight.to(steps.feature_weight.dtype)
        gradients = (dkey, dvalue, dscore_weight, dfeature_weight)
        needs = ctx.needs_input_grad[:4]
        return *(grad if needed else None for grad, needed in zip(gradients, needs)), None


def _batched(steps: Steps, records: list[tuple[Tensor, ...]], mask: int):
    """Gradients of key, value and score_weight, those in the mask, from all steps at once."""
    if not records or not mask:
        return None, None, None
    query, dscores, weights, dcontext = (torch.stack(column) for column in zip(*records))
    gradients = autograd.memory_backward(
        query.squeeze(2),
        dscores,
        weights,
        dcontext.squeeze(2),
        *steps.inputs,
        *steps.prepared,
        *steps.key_layout,
        steps.keys.max_seqlen,
        mask,
        *steps.choice,
    )
    return [grad if mask & 2 << bit else None for bit, grad in enumerate(gradients)]


def _add(ours: Tensor | None, more: Tensor | None, like: Tensor) -> Tensor | None:
    """The sum of gradients that are there, in the dtype of ``like``."""
    if more is None:
        return ours
    return (more if ours is None else more.add_(ours)).to(like.dtype)


class _Attend(torch.autograd.Function):
    """One step: only the gradients of query and features are computed in its backward."""

    @staticmethod
    def forward(ctx, query, token, features, steps, dropout_p, seed, weights_layout, keeps_scores):
        steps.check_unchanged()
        options = dropout_p, seed, weights_layout, keeps_scores
        if features is None:
            results = _forward(steps, query, steps.inputs[0], steps.prepared, options)
        else:
            with steps.shifted_keys(features) as key:
                results = _forward(steps, query, key, (None, None), options)
        context, weights, *kept = results
        ctx.steps, ctx.dropout_p, ctx.weights_layout = steps, dropout_p, weights_layout
        # The keys of a step with features are made again, which takes no memory till then.
        ctx.save_for_backward(query, features, *kept, seed)
        ctx.set_materialize_grads(False)
        return context, weights

    @staticmethod
    def backward(ctx, dcontext, dweights):
        steps = ctx.steps
        collector = ctx.next_functions[1][0]  # None where no gradient of the key side is needed
        collects = collector is not None and torch._C._will_engine_execute_node(collector)
        no_gradients = (None,) * 8
        if (dcontext is None and dweights is None) or not (collects or any(ctx.needs_input_grad)):
            return no_gradients
        steps.check_unchanged()
        query, features, stats, scores, seed = ctx.saved_tensors
        if features is None:
            differentiate = _step_gradients
        else:
            differentiate = _featured_step_gradients
        dquery, dfeatures = differentiate(
            ctx, collects, dcontext, dweights, query, features, stats, scores, seed
        )
        return dquery, None, dfeatures, *no_gradients[3:]


def _forward(steps: Steps, query: Tensor, key: Tensor, prepared: Prepared, options: tuple):
    """The op, with one query a sequence."""
    return autograd.forward(
        query,
        key,
        *steps.inputs[1:],
        *prepared,
        None,
        *steps.key_layout,
        1,
        steps.keys.max_seqlen,
        *options,
        *steps.choice,
    )


def _step_backward(ctx, mask, dcontext, dweights, query, key, prepared, stats, scores, seed):
    """The op: dquery, and what is recorded, the gradients of scores and the weights."""
    steps = ctx.steps
    return autograd.step_backward(
        dcontext,
        dweights,
        query,
        key,
        *steps.inputs[1:],
        *prepared,
        stats,
        scores,
        *steps.key_layout,
        steps.keys.max_seqlen,
        ctx.dropout_p,
        seed,
        ctx.weights_layout,
        mask,
        *steps.choice,
    )


def _no_dcontext(steps: Steps, query: Tensor) -> Tensor:
    return query.new_zeros((*query.shape[:-1], steps.inputs[1].size(-1)))


def _step_gradients(ctx, collects, dcontext, dweights, query, _, stats, scores, seed):
    """Of a step without features: dquery and None."""
    steps = ctx.steps
    mask = int(ctx.needs_input_grad[0]) | (steps.grad_mask if collects else 0)
    if not mask:
        return None, None
    dquery, dscores, weights = _step_backward(
        ctx, mask, dcontext, dweights, query, steps.inputs[0], steps.prepared, stats, scores, seed
    )
    if collects:
        if dcontext is None:
            dcontext = _no_dcontext(steps, query)
        steps.records().plain.append((query, dscores, weights, dcontext))
    return dquery if ctx.needs_input_grad[0] else None, None


def _featured_step_gradients(
    ctx, collects, dcontext, dweights, query, features, stats, scores, seed
):
    """Of a step with features: dquery and dfeatures; the gradient of its own keys gives both."""
    steps = ctx.steps
    needs = GRAD_QUERY * ctx.needs_input_grad[0] | GRAD_KEY * (collects or ctx.needs_input_grad[2])
    needs |= steps.grad_mask & GRAD_SCORE_WEIGHT if collects else 0
    if not needs:
        return None, None
    with steps.shifted_keys(features) as key:
        _, dscores, weights = _step_backward(
            ctx, GRAD_KEY, dcontext, dweights, query, key, (None, None), stats, scores, seed
        )
        jagged = steps.keys.cu_seqlens is not None
        by_weights = dscores.squeeze(0) if jagged else dscores.transpose(1, 2).unsqueeze(2)
        dquery, dkey, _, dscore_weight = autograd.backward(
            None,
            by_weights,
            query,
            key,
            *steps.inputs[1:],
            stats,
            scores.new_empty(0),
            None,
            *steps.key_layout,
            1,
            steps.keys.max_seqlen,
            0.0,
            None,
            (JAGGED_WEIGHTS if jagged else DENSE_WEIGHTS) | RAW,
            needs,
            *steps.choice,
        )
    weight = steps.feature_weight.flatten(1)  # [F, H * D]
    if needs & GRAD_KEY:
        rows = dkey.flatten(0, 1).flatten(1)  # [Bk * Nk, H * D]
    if collects:
        records = steps.records()
        if dcontext is None:
            dcontext = _no_dcontext(steps, query)
        records.featured.append((query, dscores, weights, dcontext))
        if not records.sums:
            wide = ops.compute_dtype(dkey.dtype)
            shapes = dkey, steps.inputs[2], steps.feature_weight
            records.sums = [torch.zeros_like(tensor, dtype=wide) for tensor in shapes]
        sums = records.sums
        sums[0] += dkey
        if needs & GRAD_SCORE_WEIGHT:
            sums[1] += dscore_weight
        wide_rows, wide_features = rows.to(sums[2].dtype), features.to(sums[2].dtype)
        sums[2].view_as(weight).addmm_(wide_features.flatten(0, 1).t(), wide_rows)
    dfeatures = None
    if ctx.needs_input_grad[2]:
        dfeatures = (rows @ weight.to(rows.dtype).t()).view(features.shape)
    return dquery if ctx.needs_input_grad[0] else None, dfeatures
