"""Attention for decoders that attend once a step, with the key side prepared once."""

import contextlib
import weakref
from typing import Literal, overload

import torch
from torch import Tensor

from . import autograd, backends, layout, ops, reference
from .checks import check_flag, check_probability, mismatch
from .features import added_to_keys, check_feature_weight, check_features
from .functional import attend, resolve_deterministic, score
from .layout import RAW, KeySide, Prepared, QuerySide


class AttentionMemory:
    """Keys and values that a decoder attends to step by step, prepared once.

    Each :meth:`attend` gives the values and gradients of one :func:`attn_ext.additive_attention`,
    each :meth:`scores` those of one :func:`attn_ext.additive_scores`. What the steps share is done
    once: the exponentials of the keys in forward and, in backward, the gradients of key, value and
    score_weight, which one batched pass computes for all the steps with one query a sequence of a
    ``backward()`` call; such a step alone gives its query's gradient.

    Args:
        key: ``(B, Tk, D)``, jagged ``(total_k, D)``, or nested; with heads an H axis before D.
        value: as key with ``Dv`` features.
        score_weight: ``(D,)`` or ``(H, D)``.
        cu_seqlens_k: ``(B + 1,)`` offsets of jagged keys.
        max_seqlen_k: the longest key sequence or more.
        key_padding_mask: ``(B, Tk)`` bool, True = ignore (padded keys).
        key_lengths: ``(B,)`` valid prefixes (padded keys).
        feature_weight: ``(F, D)``, with heads ``(F, H, D)``, of the features that steps may add.
        dropout_p: probability to drop an attention weight, drawn anew each step.
        deterministic: repeat results bit for bit; None follows PyTorch's global setting.
        backend: as :func:`attn_ext.additive_attention`.

    Raises:
        TypeError, ValueError: as :func:`attn_ext.additive_attention`.

    Differentiable once in query, features, key, value, score_weight and feature_weight; made under
    ``torch.no_grad``, in the first two alone. The others must not change in place between the first
    step and the backward pass. A memory belongs to one forward pass: it can be neither copied nor
    pickled.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        score_weight: Tensor,
        *,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        key_padding_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        feature_weight: Tensor | None = None,
        dropout_p: float = 0.0,
        deterministic: bool | None = None,
        backend: str | None = None,
    ):
        keys = layout.check_key_side(
            key, value, score_weight, cu_seqlens_k, max_seqlen_k, key_padding_mask, key_lengths
        )
        if feature_weight is not None:
            feature_weight = check_feature_weight(feature_weight, keys)
        # A trace serves both modes.
        if not (torch.is_grad_enabled() or torch.jit.is_tracing()):
            keys = keys.detached()
            feature_weight = None if feature_weight is None else feature_weight.detach()
        self._feature_weight = feature_weight
        self._dropout_p = check_probability("dropout_p", dropout_p)
        deterministic = resolve_deterministic(deterministic)
        self._choice = deterministic, backends.choose(backend, keys.key.device, keys.key.dtype)
        self._prepare(keys)

    def _prepare(self, keys: KeySide, prepared: Prepared | None = None) -> None:
        self._keys = keys
        self._steps: _Steps | None = None
        if self._choice[1] != "reference" and _can_collect():
            self._steps = _Steps(keys, self._choice, prepared)
            self._token = _Collect.apply(keys.key, keys.value, keys.score_weight, self._steps)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "attn_ext.AttentionMemory can be neither copied nor pickled, as it belongs to one "
            "forward pass; make another of the same key, value and score_weight"
        )

    @overload
    def attend(
        self, query: Tensor, *, features: Tensor | None = None, need_weights: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def attend(
        self, query: Tensor, *, features: Tensor | None = None, need_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def attend(
        self, query: Tensor, *, features: Tensor | None = None, need_weights: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def attend(
        self, query: Tensor, *, features: Tensor | None = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend with one query a sequence, or with n, such as a beam or a chunk of steps.

        Args:
            query: ``(B, D)`` or ``(B, n, D)``, with heads ``(B, H, D)`` or ``(B, n, H, D)``; key's
                dtype.
            features: ``(B, Tk, F)`` or, beside jagged keys, ``(total_k, F)``: one more term of each
                score, ``w . tanh(q + k_j + f_j U)`` with U the memory's ``feature_weight``; only
                with one query a sequence. Keys are not prepared for such steps.
            need_weights: also return the attention weights.

        Returns:
            context ``(B, Dv)`` or ``(B, n, Dv)``, and with ``need_weights`` the weights. For one
            query a sequence these are ``(B, Tk)`` beside padded keys and ``(total_k,)`` beside
            jagged ones; for n, ``(B, n, Tk)`` or ``(B, n, max Tk)`` with zeros outside. Heads add
            axes as in :func:`attn_ext.additive_attention`.

        Raises:
            TypeError, ValueError: as :func:`attn_ext.additive_attention`.
        """
        check_flag("need_weights", need_weights)
        queries = self._check_query(query)
        if features is not None:
            with self._with_features(features, queries) as keys:
                return attend(queries, keys, self._dropout_p, need_weights, *self._choice)
        if self._collects(queries):
            weights_layout = layout.weights_layout(queries, self._keys) if need_weights else 0
            context, weights = self._step(queries, self._dropout_p, weights_layout)
            context = queries.restore_context(context)
            if not need_weights:
                return context
            return context, queries.restore_weights(weights, weights_layout)
        keys = self._keys.with_exact_bound() if need_weights else self._keys
        return attend(queries, keys, self._dropout_p, need_weights, *self._choice, self._prepared())

    def scores(self, query: Tensor, *, features: Tensor | None = None) -> Tensor:
        """Score without attending, as :func:`attn_ext.additive_scores`.

        Args:
            query, features: as in :meth:`attend`.

        Returns:
            The scores, shaped as the weights of :meth:`attend`; -inf for keys that are ignored or
            not there.

        Raises:
            TypeError, ValueError: as :func:`attn_ext.additive_attention`.
        """
        queries = self._check_query(query)
        if features is not None:
            with self._with_features(features, queries) as keys:
                return score(queries, keys, *self._choice)
        if self._collects(queries):
            weights_layout = layout.weights_layout(queries, self._keys)
            _, scores = self._step(queries, 0.0, weights_layout | RAW)
            return queries.restore_weights(scores, weights_layout)
        keys = self._keys.with_exact_bound()
        return score(queries, keys, *self._choice, self._prepared())

    def select(self, index: Tensor) -> "AttentionMemory":
        """A memory of some of the sequences, in any order, left out or repeated.

        For decoders whose sentences end one by one, or whose beams are sequences of their own.
        Nothing is prepared again: keys, values and what was prepared are taken over, without a copy
        where the sequences are consecutive and ``index`` is on the CPU. Gradients go to key, value
        and score_weight of this memory. On an accelerator jagged keys cost a synchronisation.

        Args:
            index: ``(B',)`` int32 or int64, numbers of sequences.

        Raises:
            TypeError, ValueError: ``index`` is of another type, shape or device, or names a
                sequence that is not there.
        """
        keys, prepared = self._keys.select(index, self._prepared())
        selected = object.__new__(type(self))
        selected.__dict__.update(self.__dict__)
        selected._prepare(keys, None if self._steps is None else prepared)
        return selected

    def _check_query(self, query: Tensor) -> QuerySide:
        queries = layout.check_query_side(query, self._keys)
        if query.is_nested:
            row = layout.row_text(self._keys.has_heads)
            raise mismatch("query", f"shape (B, {row}) or (B, n, {row})", "a nested tensor")
        return queries

    def _with_features(
        self, features: Tensor, queries: QuerySide
    ) -> contextlib.AbstractContextManager[KeySide]:
        if self._feature_weight is None:
            got = "features of a memory without any"
            raise mismatch("feature_weight", "a tensor, where the memory is made", got)
        features = check_features(features, self._feature_weight, self._keys, queries)
        return added_to_keys(self._keys, features, self._feature_weight, self._choice[1])

    def _collects(self, queries: QuerySide) -> bool:
        """Whether a step leaves the gradients of the key side to the batched pass."""
        return queries.is_one_step and self._steps is not None and _can_collect()

    def _prepared(self) -> Prepared:
        if self._steps is None:
            return None, None
        self._steps.check_unchanged()
        return self._steps.prepared

    def _step(
        self, queries: QuerySide, dropout_p: float, weights_layout: int
    ) -> tuple[Tensor, Tensor]:
        """Context and weights of one query a sequence, in the internal form."""
        seed = None
        if dropout_p > 0:
            seed = reference.draw_seed(queries.query.device)
        query, keys = queries.query, self._keys
        differentiable = query.requires_grad or self._token.requires_grad
        keeps_scores = (
            differentiable
            and torch.is_grad_enabled()
            and not weights_layout & RAW
            and ops.keeps_scores(
                query, keys.key, keys.value, None, keys.max_seqlen, self._choice[1]
            )
        )
        return _Attend.apply(
            query, self._token, self._steps, dropout_p, seed, weights_layout, keeps_scores
        )


def _can_collect() -> bool:
    """Whether steps may leave their gradients to one batched pass.

    A compiled graph cannot follow the Python list that collects them, nor can a trace or
    torch.func; there, and on the reference backend, each step computes all its gradients itself.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class _Records(list):
    """What the steps of one backward pass leave: (query, dscores, weights, dcontext) of each."""


class _Steps:
    """The prepared key side, and what the steps of a backward pass leave for the batched pass."""

    def __init__(self, keys: KeySide, choice: tuple[bool, str], prepared: Prepared | None):
        self.keys = keys
        self.choice = choice
        # Not detached, so that under create_graph the backward ops refuse a second derivative.
        self.inputs = (keys.key, keys.value, keys.score_weight)
        self.grad_mask = sum(t.requires_grad << bit for bit, t in enumerate(self.inputs, start=1))
        if prepared is None:
            # Accelerators exponentiate keys faster than they would read prepared exponentials.
            prepared = ops.prepare(keys.key.detach()) if choice[1] == "cpu" else (None, None)
        self.prepared = prepared
        self.key_layout = (keys.cu_seqlens, keys.lengths, keys.padding_mask)
        self._versions = self._current_versions()
        # By backward pass: passes may nest (reentrant checkpointing) or run in several threads.
        self._records: weakref.WeakValueDictionary[int, _Records] = weakref.WeakValueDictionary()

    def _current_versions(self) -> list[int]:
        tensors = (*self.inputs, *self.key_layout)
        tracked = (t for t in tensors if t is not None and not t.is_inference())
        return [tensor._version for tensor in tracked]

    def check_unchanged(self) -> None:
        if self._current_versions() != self._versions:
            raise RuntimeError(
                "attn_ext.AttentionMemory: key, value, score_weight, or the offsets, lengths or "
                "mask were modified in place after the memory was made; make a new memory"
            )

    def leave(self, *record: Tensor) -> None:
        """Keep a step's (query, dscores, weights, dcontext) for this backward pass."""
        task = torch._C._current_graph_task_id()
        records = self._records.get(task)
        if records is None:
            records = self._records[task] = _Records()
            # The pass owns them: it lets go of its callbacks when it ends, by an error too.
            torch.autograd.Variable._execution_engine.queue_callback(records.clear)
        records.append(record)

    def take(self) -> list[Tensor] | None:
        """All records of this backward pass, stacked over steps, or None if there are none."""
        records = self._records.pop(torch._C._current_graph_task_id(), None)
        if records is None:
            return None
        return [torch.stack(column) for column in zip(*records, strict=True)]


class _Collect(torch.autograd.Function):
    """Gives the token that every step takes, so that its backward runs after all of theirs."""

    @staticmethod
    def forward(ctx, key, value, score_weight, steps):
        ctx.steps = steps
        return key.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        steps, wanted = ctx.steps, ctx.needs_input_grad[:3]
        columns = steps.take()
        if columns is None:
            return None, None, None, None
        steps.check_unchanged()
        query, dscores, weights, dcontext = columns
        gradients = autograd.memory_backward(
            query.squeeze(2),
            dscores,
            weights,
            dcontext.squeeze(2),
            *steps.inputs,
            *steps.prepared,
            *steps.key_layout,
            steps.keys.max_seqlen,
            sum(needed << bit for bit, needed in enumerate((False, *wanted))),
            *steps.choice,
        )
        chosen = (grad if needed else None for grad, needed in zip(gradients, wanted, strict=True))
        return (*chosen, None)


class _Attend(torch.autograd.Function):
    """One step: only the query's gradient is computed in its backward."""

    @staticmethod
    def forward(ctx, query, token, steps, dropout_p, seed, weights_layout, keeps_scores):
        steps.check_unchanged()
        keys = steps.keys
        context, weights, *kept = autograd.forward(
            query,
            *steps.inputs,
            *steps.prepared,
            None,
            *steps.key_layout,
            1,
            keys.max_seqlen,
            dropout_p,
            seed,
            weights_layout,
            keeps_scores,
            *steps.choice,
        )
        ctx.steps, ctx.dropout_p, ctx.weights_layout = steps, dropout_p, weights_layout
        ctx.save_for_backward(query, *kept, seed)
        ctx.set_materialize_grads(False)
        return context, weights

    @staticmethod
    def backward(ctx, dcontext, dweights):
        steps = ctx.steps
        grad_mask = int(ctx.needs_input_grad[0])
        collector = ctx.next_functions[1][0]  # None where no gradient of the key side is needed
        collects = collector is not None and torch._C._will_engine_execute_node(collector)
        if collects:
            grad_mask |= steps.grad_mask
        if (dcontext is None and dweights is None) or not grad_mask:
            return (None,) * 7
        steps.check_unchanged()
        query, stats, scores, seed = ctx.saved_tensors
        dquery, dscores, weights = autograd.step_backward(
            dcontext,
            dweights,
            query,
            *steps.inputs,
            *steps.prepared,
            stats,
            scores,
            *steps.key_layout,
            steps.keys.max_seqlen,
            ctx.dropout_p,
            seed,
            ctx.weights_layout,
            grad_mask,
            *steps.choice,
        )
        if collects:
            if dcontext is None:
                dcontext = query.new_zeros((*query.shape[:-1], steps.inputs[1].size(-1)))
            steps.leave(query, dscores, weights, dcontext)
        return dquery if ctx.needs_input_grad[0] else None, *(None,) * 6
