"""Attention for decoders that attend step by step, with the key side prepared once."""

from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from . import backends, layout, reference
from .checks import (
    check_flag,
    check_probability,
    mismatch,
    resolve_deterministic,
    runs_eagerly,
)
from .features import check_feature_weight, check_features, with_term
from .functional import attend, score
from .layout import RAW, KeySide, QuerySide
from .selection import select_sequences
from .steps import Steps


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
    ``torch.no_grad``, in the first two alone. The others must not change in place from when the
    memory is made to the backward pass. A memory belongs to one forward pass: it can be neither
    copied nor pickled.
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
        self._choice: dict[str, Any] = {
            "deterministic": resolve_deterministic(deterministic),
            "backend": backends.choose(backend, keys.key.device, keys.key.dtype),
        }
        self._prepare(keys)

    def _prepare(self, keys: KeySide) -> None:
        self._steps: Steps | None = None
        if self._choice["backend"] != "reference" and runs_eagerly():
            self._steps = Steps(keys, self._feature_weight, self._choice)
            self._token = self._steps.make_token()
            keys = self._steps.keys
        self._keys = keys

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
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
        features = self._check_features(features, queries)
        if self._collects(queries):
            weights_layout = layout.weights_layout(queries, self._keys) if need_weights else 0
            context, weights = self._step(queries, features, self._dropout_p, weights_layout)
            return queries.restore(context, weights, weights_layout)
        keys = self._keys_of_call(features, need_weights)
        return attend(queries, keys, self._dropout_p, need_weights, **self._choice)

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
        features = self._check_features(features, queries)
        if self._collects(queries):
            weights_layout = layout.weights_layout(queries, self._keys)
            _, scores = self._step(queries, features, 0.0, weights_layout | RAW)
            return queries.restore_weights(scores, weights_layout)
        return score(queries, self._keys_of_call(features, True), **self._choice)

    def select(self, index: Tensor) -> "AttentionMemory":
        """A memory of some of the sequences, in any order, left out or repeated.

        For decoders whose sentences end one by one, or whose beams are sequences of their own.
        Nothing is prepared again: keys, values and what was prepared are taken over, without a copy
        where the sequences are consecutive and ``index`` is on the CPU. Gradients go to what this
        memory was made of. On an accelerator jagged keys cost a synchronisation.

        Args:
            index: ``(B',)`` int32 or int64, numbers of sequences.

        Raises:
            TypeError, ValueError: ``index`` is of another type, shape or device, or names a
                sequence that is not there.
        """
        selected = object.__new__(type(self))
        selected.__dict__.update(self.__dict__)
        selected._prepare(select_sequences(self._checked_keys(), index))
        return selected

    def _check_query(self, query: Tensor) -> QuerySide:
        queries = layout.check_query_side(query, self._keys)
        if query.is_nested:
            row = layout.row_text(self._keys.has_heads)
            raise mismatch("query", f"shape (B, {row}) or (B, n, {row})", "a nested tensor")
        return queries

    def _check_features(self, features: Tensor | None, queries: QuerySide) -> Tensor | None:
        if features is None:
            return None
        if self._feature_weight is None:
            got = "features of a memory without any"
            raise mismatch("feature_weight", "a tensor, where the memory is made", got)
        return check_features(features, self._feature_weight, self._keys, queries)

    def _collects(self, queries: QuerySide) -> bool:
        """Whether a step leaves the gradients of the key side to the batched pass."""
        return queries.is_one_step and self._steps is not None and runs_eagerly()

    def _checked_keys(self) -> KeySide:
        """The key side, whose tensors must be what they were when it was prepared."""
        if self._steps is None:
            return self._keys
        if not runs_eagerly():  # a graph has no use for what was prepared outside of it
            return self._keys.with_key(self._keys.key)
        self._steps.check_unchanged()
        return self._keys

    def _keys_of_call(self, features: Tensor | None, need_weights: bool) -> KeySide:
        """The key side of a step that computes all its gradients itself."""
        keys = self._checked_keys()
        keys = keys.with_exact_bound() if need_weights else keys
        if features is None or self._feature_weight is None:
            return keys
        return with_term(keys, features, self._feature_weight, self._choice["backend"])

    def _step(
        self, queries: QuerySide, features: Tensor | None, dropout_p: float, weights_layout: int
    ) -> tuple[Tensor, Tensor]:
        assert self._steps is not None
        seed = reference.draw_seed(queries.query.device) if dropout_p > 0 else None
        return self._steps.attend(
            self._token, queries.query, features, dropout_p, seed, weights_layout
        )
