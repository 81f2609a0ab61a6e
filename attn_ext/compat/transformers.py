"""The decoder cells of transformers' table recognition."""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .plain import attend_by_calls, is_plain, readable_weight
from .replacement import Hoisting


class TransformersSLANetAttentionGRUCell(Hoisting):
    """``transformers.models.slanet.modeling_slanet.SLANetAttentionGRUCell``.

    Parameters: ``input_to_hidden``, ``hidden_to_hidden``, ``score``, ``rnn``. The states are
    projected once an image, not once a token: as long as each step is given the same tensor, which
    the model does in float32 (of lower precision it makes a new copy a step, to be projected anew).
    A model that is asked for its attentions returns them; if one was asked before, transformers has
    put hooks on the cell, which is then not replaced but refused.
    """

    original = "transformers.models.slanet.modeling_slanet.SLANetAttentionGRUCell"
    package = "transformers"
    tested = "5.24.0"
    layers: ClassVar[tuple[str, ...]] = ("input_to_hidden", "hidden_to_hidden", "score")
    input_to_hidden: nn.Linear
    hidden_to_hidden: nn.Linear
    score: nn.Linear
    rnn: nn.GRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_embeddings: int,
        *,
        backend: str | None = None,
    ):
        super().__init__(backend)
        self.input_to_hidden = nn.Linear(input_size, hidden_size, bias=False)
        self.hidden_to_hidden = nn.Linear(hidden_size, hidden_size)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.rnn = nn.GRUCell(input_size + num_embeddings, hidden_size)

    @classmethod
    def _layers(cls, module: Any) -> dict[str, type[nn.Module] | str]:
        return {**super()._layers(module), "rnn": nn.GRUCell}

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        projection = module.input_to_hidden
        return {
            "input_size": projection.in_features,
            "hidden_size": projection.out_features,
            "num_embeddings": module.rnn.input_size - projection.in_features,
        }

    @classmethod
    def from_original(
        cls, module: nn.Module, *, backend: str | None = None, path: str = "module"
    ) -> "TransformersSLANetAttentionGRUCell":
        ours = super().from_original(module, backend=backend, path=path)
        _record_attentions_of(cls, type(module))
        return ours

    def forward(
        self, prev_hidden: Tensor, batch_hidden: Tensor, char_onehots: Tensor, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """One step of the decoder.

        Args:
            prev_hidden: ``(B, hidden_size)``.
            batch_hidden: ``(B, Tk, input_size)``, the states of the image.
            char_onehots: ``(B, num_embeddings)``, the token before.
            kwargs: not used.

        Returns:
            The hidden state ``(B, hidden_size)`` and the attention weights ``(B, 1, Tk)``.
        """
        query = self.hidden_to_hidden(prev_hidden)
        score_weight = readable_weight(self.score)
        if score_weight is None:
            key = self.input_to_hidden(batch_hidden)
            context, weights = attend_by_calls(self.score, query, key, batch_hidden)
        else:
            projection = self.input_to_hidden
            known = type(projection) is nn.Linear and is_plain(projection, nn.Linear)
            memory = self._remember(
                batch_hidden,
                (*projection.parameters(), score_weight) if known else None,
                lambda: (projection(batch_hidden), batch_hidden, score_weight.squeeze(0)),
            )
            context, weights = memory.attend(query, need_weights=True)
        hidden = self.rnn(torch.cat([context, char_onehots], 1), prev_hidden)
        return hidden, weights.unsqueeze(1)


class TransformersSLANeXtAttentionGRUCell(TransformersSLANetAttentionGRUCell):
    """``transformers.models.slanext.modeling_slanext.SLANeXtAttentionGRUCell``.

    Parameters, call and results are those of :class:`TransformersSLANetAttentionGRUCell`.
    """

    original = "transformers.models.slanext.modeling_slanext.SLANeXtAttentionGRUCell"


def _record_attentions_of(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    """Have models that return the attentions of the class ``theirs`` return those of ``ours``, too.

    transformers collects them by hooks on the modules of the classes that a model's class names.
    """
    module = sys.modules.get(theirs.__module__)
    for model in [] if module is None else list(vars(module).values()):
        recorded: dict = getattr(model, "_can_record_outputs", None) or {}
        for name, kind in recorded.items():
            if kind is theirs:
                recorded[name] = [theirs, ours]
            elif isinstance(kind, list) and theirs in kind and ours not in kind:
                kind.append(ours)
