"""The attention of docTR's text recognition SAR."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .plain import is_plain, readable_weight, warn_of_calls
from .replacement import Hoisting


class DocTRAttentionModule(Hoisting):
    """``doctr.models.recognition.sar.pytorch.AttentionModule``, over the places of a feature map.

    Of Li et al., "Show, Attend and Read" (AAAI 2019): keys are a 3x3 convolution of the features,
    so that each place's has its neighbours. Parameters: ``feat_conv``, ``state_conv``,
    ``attention_projector``. The convolution is done once a picture, not once a character.
    """

    original = "doctr.models.recognition.sar.pytorch.AttentionModule"
    package = "python-doctr"
    tested = "1.1.0"
    layers: ClassVar[tuple[str, ...]] = ()
    feat_conv: nn.Conv2d
    state_conv: nn.Conv2d
    attention_projector: nn.Conv2d

    def __init__(
        self,
        feat_chans: int,
        state_chans: int,
        attention_units: int,
        *,
        backend: str | None = None,
    ):
        super().__init__(backend)
        self.feat_conv = nn.Conv2d(feat_chans, attention_units, kernel_size=3, padding=1)
        self.state_conv = nn.Conv2d(state_chans, attention_units, kernel_size=1, bias=False)
        self.attention_projector = nn.Conv2d(attention_units, 1, kernel_size=1, bias=False)

    @classmethod
    def _layers(cls, module: Any) -> dict[str, type[nn.Module] | str]:
        return dict.fromkeys(("feat_conv", "state_conv", "attention_projector"), nn.Conv2d)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        return {
            "feat_chans": module.feat_conv.in_channels,
            "state_chans": module.state_conv.in_channels,
            "attention_units": module.feat_conv.out_channels,
        }

    def forward(self, features: Tensor, hidden_state: Tensor) -> Tensor:
        """Attend with one query a picture.

        Args:
            features: ``(N, feat_chans, H, W)``.
            hidden_state: ``(N, state_chans)``.

        Returns:
            The context, docTR's glimpse, ``(N, feat_chans)``.
        """
        query = self.state_conv(hidden_state[:, :, None, None])  # [N, A, 1, 1]
        score_weight = readable_weight(self.attention_projector, nn.Conv2d)
        if score_weight is None:
            warn_of_calls(self.attention_projector)
            scores = self.attention_projector(torch.tanh(self.feat_conv(features) + query))
            weights = scores.flatten(1).softmax(-1).view_as(scores)
            return (features * weights).sum((2, 3))
        projection = self.feat_conv
        known = type(projection) is nn.Conv2d and is_plain(projection, nn.Conv2d)
        memory = self._remember(
            features,
            (*projection.parameters(), score_weight) if known else None,
            lambda: (_rows_of(projection(features)), _rows_of(features), score_weight.flatten()),
        )
        return memory.attend(query.flatten(1))


def _rows_of(channels: Tensor) -> Tensor:
    """``(N, C, H, W)`` as contiguous rows ``(N, H * W, C)``, one a place."""
    return channels.flatten(2).transpose(1, 2).contiguous()
