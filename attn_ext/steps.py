"""How the steps of an :class:`attn_ext.AttentionMemory` are differentiated.

A step's backward gives the gradient of what is its own, the query and the features, and leaves a
record; when all steps of a ``backward()`` have run, one batched pass makes the gradients of what
they share from all records.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import autograd, ops
from .checks import operations_are_recorded
from .features import feature_weight_gradient, features_gradient, shifted_keys
from .layout import DENSE_WEIGHTS, JAGGED_WEIGHTS, RAW, KeySide
from .ops import GRADS


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
        choice: dict[str, Any],
    ):
        if keys.exp_key is None and choice["backend"] == "cpu":
            # Accelerators exponentiate keys faster than they would read prepared exponentials.
            exp_key, key_bound = ops.prepare(keys.key.detach())
            keys = keys._replace(exp_key=exp_key, key_bound=key_bound)
        self.keys = keys
        self.choice = choice
        # Not detached, so that under create_graph the backward ops refuse a second derivative.
        self.inputs = {"key": keys.key, "value": keys.value, "score_weight": keys.score_weight}
        self.feature_weight = feature_weight
        self.grad_mask = sum(GRADS[name] for name, t in self.inputs.items() if t.requires_grad)
        self._rooms: list[Tensor] = []  # for keys with features, of steps that have run
        self._versions = self._current_versions()
        # By backward pass: passes may nest (reentrant checkpointing) or run in several threads.
        self._records: weakref.WeakValueDictionary[int, _Records] = weakref.WeakValueDictionary()

    def make_token(self) -> Tensor:
        """What each step takes. It knows the steps, which must not hold it in turn."""
        return _Collect.apply(*self.inputs.values(), self.feature_weight, self)

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
        keeps_scores = (  # always where a gradient may be asked for: they are a number a key
            torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in tensors)
            and not weights_layout & RAW
        )
        options = dropout_p, seed, weights_layout, keeps_scores
        return _Attend.apply(query, token, features, self, *options)

    def _current_versions(self) -> list[int]:
        keys = self.keys
        layout = keys.cu_seqlens_k, keys.key_lengths, keys.key_padding_mask
        tensors = (*self.inputs.values(), self.feature_weight, *layout)
        tracked = (t for t in tensors if t is not None and not t.is_inference())
        return [tensor._version for tensor in tracked]

    def check_unchanged(self) -> None:
        if self._current_versions() != self._versions:
            raise RuntimeError(
                "attn_ext.AttentionMemory: key, value, score_weight, feature_weight, or the "
                "offsets, lengths or mask were modified in place after the memory was made; make a "
                "new memory"
            )

    def keys_of_step(self, features: Tensor | None) -> contextlib.AbstractContextManager[KeySide]:
        return contextlib.nullcontext(self.keys) if features is None else self._shifted(features)

    @contextlib.contextmanager
    def _shifted(self, features: Tensor) -> Iterator[KeySide]:
        """The key side of a step with features.

        On the CPU one step after the other has them in the same memory. Freed blocks of that size
        would be split by what each step keeps, and never be used again: two or three times the
        memory. In inference mode nothing is kept, and memory made there could not be written to
        outside.
        """
        key, weight = self.keys.key, self.feature_weight
        assert weight is not None  # or there were no features
        if (
            not key.is_cpu
            or torch.is_grad_enabled()  # in backward, with create_graph
            or torch.is_inference_mode_enabled()
            or operations_are_recorded()
        ):
            yield self.keys.with_key(shifted_keys(key, features, weight))
            return
        try:
            room = self._rooms.pop()  # from here on no other thread has it
        except IndexError:
            room = torch.empty_like(key, memory_format=torch.contiguous_format)
        yield self.keys.with_key(shifted_keys(key, features, weight, out=room))
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
        mask = sum(GRADS[name] for name, needed in zip(steps.inputs, wanted) if needed)
        dkey, dvalue, dscore_weight = _batched(steps, records.plain, mask)
        dfeature_weight = None
        if records.featured:
            _, more_dvalue, _ = _batched(steps, records.featured, mask & GRADS["value"])
            dvalue = _add(dvalue, more_dvalue, steps.keys.value)
            more_dkey, more_dscore_weight, dfeature_weight = records.sums
            dkey = _add(dkey, more_dkey, steps.keys.key)
            dscore_weight = _add(dscore_weight, more_dscore_weight, steps.keys.score_weight)
            dfeature_weight = dfeature_weight.view_as(steps.feature_weight)
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
        **steps.keys._asdict(),
        query=query.squeeze(2),
        dscores=dscores,
        weights=weights,
        dcontext=dcontext.squeeze(2),
        grad_mask=mask,
        **steps.choice,
    )
    pairs = zip(steps.inputs, gradients)
    return [grad if mask & GRADS[name] else None for name, grad in pairs]


def _sum(total: Tensor, more: Tensor) -> Tensor:
    """In place, unless one of them stands for a batch (is_grads_batched) and the other may not."""
    return total + more if torch._C._are_functorch_transforms_active() else total.add_(more)


def _add(ours: Tensor | None, more: Tensor | None, like: Tensor) -> Tensor | None:
    """The sum of gradients that are there, in the dtype of ``like``."""
    if more is None:
        return ours
    return (more if ours is None else _sum(more, ours)).to(like.dtype)


class _Attend(torch.autograd.Function):
    """One step: only the gradients of query and features are computed in its backward."""

    @staticmethod
    def forward(ctx, query, token, features, steps, dropout_p, seed, weights_layout, keeps_scores):
        steps.check_unchanged()
        with steps.keys_of_step(features) as keys:
            context, weights, *kept = autograd.forward(
                query=query,
                cu_seqlens_q=None,
                max_seqlen_q=1,
                **keys._asdict(),
                dropout_p=dropout_p,
                dropout_seed=seed,
                weights_layout=weights_layout,
                keep_scores=keeps_scores,
                **steps.choice,
            )
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
        given = {  # of the ops' arguments those that are the step's own
            "dcontext": dcontext,
            "dweights": dweights,
            "query": query,
            "stats": stats,
            "scores": scores,
            "dropout_p": ctx.dropout_p,
            "dropout_seed": seed,
            "weights_layout": ctx.weights_layout,
            **steps.choice,
        }
        needs_query, _, needs_features, *_ = ctx.needs_input_grad
        if features is None:
            dquery, dfeatures = _step_gradients(steps, given, needs_query, collects), None
        else:
            dquery, dfeatures = _featured_step_gradients(
                steps, given, features, needs_query, needs_features, collects
            )
        return dquery, None, dfeatures, *no_gradients[3:]


def _record(steps: Steps, given: dict[str, Any], dscores: Tensor, weights: Tensor):
    """What the batched pass needs of a step."""
    query, dcontext = given["query"], given["dcontext"]
    if dcontext is None:
        dcontext = query.new_zeros((*query.shape[:-1], steps.keys.value.size(-1)))
    return query, dscores, weights, dcontext


def _step_gradients(steps: Steps, given: dict[str, Any], needs_query: bool, collects: bool):
    """Of a step without features: dquery."""
    mask = GRADS["query"] * needs_query | (steps.grad_mask if collects else 0)
    if not mask:
        return None
    dquery, dscores, weights = autograd.step_backward(
        **given, **steps.keys._asdict(), grad_mask=mask
    )
    if collects:
        steps.records().plain.append(_record(steps, given, dscores, weights))
    return dquery if needs_query else None


def _featured_step_gradients(
    steps: Steps,
    given: dict[str, Any],
    features: Tensor,
    needs_query: bool,
    needs_features: bool,
    collects: bool,
):
    """Of a step with features: dquery and dfeatures; the gradient of its own keys gives both."""
    feature_weight = steps.feature_weight
    assert feature_weight is not None  # or there were no features
    needs_key = collects or needs_features
    needs_score_weight = collects and steps.grad_mask & GRADS["score_weight"]
    mask = GRADS["query"] * needs_query | GRADS["key"] * needs_key | needs_score_weight
    if not mask:
        return None, None
    with steps.keys_of_step(features) as keys:
        _, dscores, weights = autograd.step_backward(
            **given, **keys._asdict(), grad_mask=GRADS["key"]
        )
        jagged = keys.cu_seqlens_k is not None
        of_scores = {
            "cu_seqlens_q": None,
            "max_seqlen_q": 1,
            "dcontext": None,
            "dweights": dscores.squeeze(0) if jagged else dscores.transpose(1, 2).unsqueeze(2),
            "scores": given["scores"].new_empty(0),
            "dropout_p": 0.0,
            "dropout_seed": None,
            "weights_layout": (JAGGED_WEIGHTS if jagged else DENSE_WEIGHTS) | RAW,
        }
        dquery, dkey, _, dscore_weight = autograd.backward(
            **given | of_scores, **keys._asdict(), grad_mask=mask
        )
    if collects:
        records = steps.records()
        records.featured.append(_record(steps, given, dscores, weights))
        wide = ops.compute_dtype(dkey.dtype)
        dfeature_weight = feature_weight_gradient(dkey.to(wide), features.to(wide))
        terms = dkey, dscore_weight, dfeature_weight
        if records.sums:
            records.sums = [_sum(total, term) for total, term in zip(records.sums, terms)]
        else:
            records.sums = [term.to(wide, copy=True) for term in terms]
    dfeatures = features_gradient(dkey, features, feature_weight) if needs_features else None
    return dquery if needs_query else None, dfeatures
