"""Steps whose scores may have a term of where earlier ones attended, and layers that are called.

Location-sensitive attention (Chorowski et al. 2015, "Attention-Based Models for Speech
Recognition") adds a projection of convolved earlier weights to each key, coverage (See, Liu and
Manning 2017, "Get To The Point") one of their sum: ``e_j = w . tanh(q + k_j + U f_j + b)``.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..memory import AttentionMemory
from .plain import attend_by_calls, readable, scores_by_calls
from .replacement import Stepwise, is_counted


class Rows(NamedTuple):
    """What a step attends to, and the layers that score it."""

    keys: Tensor  # [B, Tk, D]
    values: Tensor  # [B, Tk, Dv]
    score_layer: nn.Module  # from D to 1
    feature_layer: nn.Module | None = None  # from F to D
    mask: Tensor | None = None  # [B, Tk], 0 = ignore
    lengths: Tensor | None = None  # [B], instead of a mask; nobody changes them in place
    scaling: float = 1.0  # of scores
    kept: bool = False  # whether steps attend to the first one's values until they are forgotten

    def ignored(self) -> Tensor | None:
        """``[B, Tk]``, True = ignore, of a mask."""
        return None if self.mask is None else self.mask == 0


class Step(NamedTuple):
    """One query a sequence, and what scores it: a memory or, where layers are called, rows."""

    memory: AttentionMemory | None
    rows: Rows
    query: Tensor  # [B, D]
    features: Tensor | None  # [B, Tk, F]
    score_bias: Tensor | None

    def attend(self) -> tuple[Tensor, Tensor]:
        """The context ``[B, Dv]`` and the weights ``[B, Tk]``."""
        if self.memory is not None:
            return self.memory.attend(self.query, features=self.features, need_weights=True)
        rows = self.rows
        return attend_by_calls(
            rows.score_layer,
            self.query,
            rows.keys,
            rows.values,
            key_padding_mask=rows.ignored(),
            key_lengths=rows.lengths,
            scaling=rows.scaling,
        )

    def scores(self, biased: bool = False) -> Tensor:
        """The scores ``[B, Tk]``, -inf for ignored keys; float32 or float64.

        A softmax undoes the scorer's bias, whose gradient, 0, would be made of rounding errors:
        only what is no softmax asks for it.
        """
        rows = self.rows
        if self.memory is None:  # then it is in them
            return scores_by_calls(
                rows.score_layer,
                self.query,
                rows.keys,
                key_padding_mask=rows.ignored(),
                key_lengths=rows.lengths,
                scaling=rows.scaling,
            )
        scores = self.memory.scores(self.query, features=self.features)
        if not biased or self.score_bias is None:
            return scores
        return scores + rows.scaling * self.score_bias


class Scoring(Stepwise):
    """A stepwise replacement whose layers make the scores, whatever is done to those layers.

    Steps over the same rows share a memory as long as the layers can be read.
    """

    def _step(self, rows: Rows, query: Tensor, features: Tensor | None = None) -> Step:
        """A step of queries ``[B, D]`` and, with a ``feature_layer``, features ``[B, Tk, F]``."""
        scoring = readable(rows.score_layer)
        feature_weight = None
        if features is not None and rows.feature_layer is not None:
            term = None if scoring is None else readable(rows.feature_layer)
            if term is None:
                rows = rows._replace(keys=rows.keys + rows.feature_layer(features))
                features = None
            else:
                feature_weight, bias = term
                query = query if bias is None else query + bias
        if scoring is None:
            return Step(None, rows, query, None, None)
        memory = self._memory_of(rows, *scoring, feature_weight)
        return Step(memory, rows, query, features, scoring[1])

    def _memory_of(
        self,
        rows: Rows,
        score_weight: Tensor,  # [1, D]
        score_bias: Tensor | None,
        feature_weight: Tensor | None,  # [D, F]
    ) -> AttentionMemory:
        """The memory of the step before, or another one where it does not serve this."""
        keys, values = rows.keys, rows.values
        watched = [t for t in (rows.mask, score_weight, feature_weight) if t is not None]
        # Changes of inference tensors are not counted, and comparing large ones takes long. Their
        # keys are taken as they were; values are read anew by each step, unless autocast copied
        # them.
        watched += [t for t in (keys, values) if is_counted(t)]
        if torch._C._is_any_autocast_enabled() and not is_counted(values) and not rows.kept:
            watched.append(values)
        made_for = (keys, values, rows.mask, rows.lengths, score_weight, feature_weight)
        options = (rows.scaling, self.backend, torch.are_deterministic_algorithms_enabled())
        memory = self._recall((*made_for, *options), tuple(watched))
        if memory is None:
            vector = rows.scaling * score_weight.squeeze(0)
            if score_bias is not None:
                # It changes no weight. DistributedDataParallel wants all to have a gradient.
                vector = vector + 0 * score_bias
            memory = self._memory = AttentionMemory(
                keys,
                values,
                vector,
                key_padding_mask=rows.ignored(),
                key_lengths=rows.lengths,
                feature_weight=None if feature_weight is None else feature_weight.t(),
                backend=self.backend,
            )
        return memory
