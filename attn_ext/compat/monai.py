"""The attention of MONAI's multiple-instance learning."""

from collections import OrderedDict
from typing import Any, ClassVar

from torch import Tensor, nn

from ..checks import mismatch
from .bags import scores_of_rows
from .plain import is_plain, original_class_name, readable_weight, warn_of_calls
from .replacement import Replacement


class MONAIMILAttention(Replacement, nn.Sequential):
    """The ``attention`` of ``monai.networks.nets.milmodel.MILModel``, with any mode that has one.

    Of Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning" (ICML 2018). It
    is what the original is, a ``Sequential`` of a linear layer, a Tanh and a linear layer that
    scores, but for the hidden rows that it does not store; the model itself weighs and sums.
    """

    original = "monai.networks.nets.milmodel.MILModel"
    package = "monai"
    tested = "1.6.1"
    needs = 'mil_mode="att", "att_trans" or "att_trans_pyramid"'
    child = "attention"
    layers: ClassVar[tuple[str, ...]] = ("0", "2")

    def __init__(self, in_features: int, hidden: int = 2048, *, backend: str | None = None):
        super().__init__(nn.Linear(in_features, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.backend = backend

    @classmethod
    def replaces(cls) -> str:
        return f"`attention` of `{cls.original}`"

    @classmethod
    def is_additive(cls, module: Any) -> bool:
        """Whether it was not replaced before, nor is empty, as of modes without attention."""
        is_empty = type(module) is nn.Sequential and len(module) == 0
        return not is_empty and not isinstance(module, cls)

    @classmethod
    def _layers(cls, module: Any) -> dict[str, type[nn.Module] | str]:
        return {"0": nn.Linear, "1": nn.Tanh, "2": nn.Linear}

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {"in_features": module[0].in_features, "hidden": module[0].out_features}

    @classmethod
    def from_original(
        cls, module: nn.Module, *, backend: str | None = None, path: str = "module"
    ) -> "MONAIMILAttention":
        if type(module) is not nn.Sequential:
            got = original_class_name(module)
            raise mismatch(path, "MILModel.attention, a torch.nn.Sequential", got)
        return super().from_original(module, backend=backend, path=path)

    def __getitem__(self, index: Any) -> Any:
        """A layer, or some in a Sequential, as of the original."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, rows: Tensor) -> Tensor:
        """Score rows ``(..., in_features)``: ``(..., 1)``."""
        layer: Any = self[-1]
        score_weight = readable_weight(layer)
        if score_weight is None or len(self) != 3 or not is_plain(self[1], nn.Tanh):
            warn_of_calls(self)
            return super().forward(rows)
        return scores_of_rows(self[0](rows), score_weight, layer.bias, backend=self.backend)
