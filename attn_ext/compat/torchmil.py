"""torchmil's attention pooling."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import mismatch
from ..pooling import additive_pool
from .bags import scores_of_rows
from .plain import is_plain, masked_softmax, readable_weight, warn_of_calls
from .replacement import Replacement


class _Projection(nn.Module):
    """``torchmil.nn.utils.LazyLinear``: a linear layer one name further in."""

    def __init__(self, in_features: int | None, out_features: int):
        super().__init__()
        self.module: nn.Module = (
            nn.LazyLinear(out_features)
            if in_features is None
            else nn.Linear(in_features, out_features)
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.module(rows)


class TorchMILAttentionPool(Replacement):
    """``torchmil.nn.attention.attention_pool.AttentionPool``, gated or not, with ``act="tanh"``.

    Of Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning" (ICML 2018).
    Parameters: ``fc1``, ``fc2`` and, gated, ``fc_gated``. The values of a bag are its rows.
    """

    original = "torchmil.nn.attention.attention_pool.AttentionPool"
    package = "torchmil"
    tested = "1.0.2"
    needs = 'act="tanh"'
    sizes: ClassVar[tuple[str, ...]] = ("att_dim", "act", "gated")
    layers: ClassVar[tuple[str, ...]] = ("fc2",)
    in_dim: int | None
    att_dim: int
    act: str
    gated: bool
    fc1: _Projection
    fc2: nn.Linear
    fc_gated: _Projection
    act_gated: nn.Sigmoid
    act_layer: nn.Tanh

    def __init__(
        self,
        in_dim: int | None = None,
        att_dim: int = 128,
        act: str = "tanh",
        gated: bool = False,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        if act != "tanh":
            raise mismatch("act", "'tanh', additive attention", repr(act))
        self.in_dim, self.att_dim, self.act, self.gated = in_dim, att_dim, act, gated
        self.backend = backend
        self.fc1 = _Projection(in_dim, att_dim)
        self.fc2 = nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated = _Projection(in_dim, att_dim)
            self.act_gated = nn.Sigmoid()
        self.act_layer = nn.Tanh()

    @classmethod
    def is_additive(cls, module: Any) -> bool:
        return getattr(module, "act", "tanh") == "tanh"

    @classmethod
    def _layers(cls, module: Any) -> dict[str, type[nn.Module] | str]:
        layers: dict[str, type[nn.Module] | str] = {**super()._layers(module), "act_layer": nn.Tanh}
        gated = {"act_gated": nn.Sigmoid} if getattr(module, "gated", False) else {}
        for name in ("fc1", "fc_gated") if gated else ("fc1",):
            layers |= {name: "torchmil.nn.utils.LazyLinear", f"{name}.module": nn.Linear}
        return layers | gated

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {**super()._arguments(module), "in_dim": module.fc1.module.in_features}

    @classmethod
    def from_original(
        cls, module: Any, *, backend: str | None = None, path: str = "module"
    ) -> "TorchMILAttentionPool":
        if not cls.is_additive(module):
            raise mismatch(f"{path}.act", "'tanh', additive attention", repr(module.act))
        return super().from_original(module, backend=backend, path=path)

    def forward(
        self, X: Tensor, mask: Tensor | None = None, return_att: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool each bag.

        Args:
            X: ``(B, Tk, in_dim)``.
            mask: ``(B, Tk)``, 0 = ignore.
            return_att: also return the scores.

        Returns:
            ``(B, in_dim)``, and with ``return_att`` the scores ``(B, Tk)``, before the softmax and
            without regard to the mask.
        """
        key = self.fc1(X)
        gate = self.fc_gated(X) if self.gated else None
        ignored = None if mask is None else mask == 0
        score_weight = readable_weight(self.fc2)
        if not is_plain(self.act_layer, nn.Tanh):
            score_weight = None
        if self.gated and not is_plain(self.act_gated, nn.Sigmoid):
            score_weight = None
        if score_weight is not None and not return_att:
            return additive_pool(
                key,
                X,
                score_weight.squeeze(0),
                gate=gate,
                key_padding_mask=ignored,
                backend=self.backend,
            )
        if score_weight is not None:
            scores = scores_of_rows(key, score_weight, gate=gate, backend=self.backend)
            scores = scores.squeeze(-1)
        else:
            warn_of_calls(self)
            hidden = self.act_layer(key)
            scores = self.fc2(hidden if gate is None else hidden * self.act_gated(gate)).squeeze(-1)
        rows = X
        if ignored is None:
            weights = scores.softmax(-1)
        else:
            weights = masked_softmax(scores, ignored)
            rows = X.masked_fill(ignored.unsqueeze(-1), 0)  # which may hold anything, NaN too
        pooled = torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
        return (pooled, scores) if return_att else pooled
