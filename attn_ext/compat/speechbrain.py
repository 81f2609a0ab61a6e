"""SpeechBrain's additive attentions: content-based and location-aware."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .plain import is_plain, weigh
from .scoring import Rows, Scoring


class _SpeechBrain(Scoring):
    """What the two share: the encoder states of a batch, and the output layer."""

    package = "speechbrain"
    tested = "1.1.2"
    sizes: ClassVar[tuple[str, ...]] = ("scaling",)
    kept: ClassVar[tuple[str, ...]] = ("precomputed_enc_h", "_lengths")
    mlp_enc: nn.Linear
    mlp_dec: nn.Linear
    mlp_attn: nn.Linear
    mlp_out: nn.Linear
    softmax: nn.Softmax
    scaling: float

    @classmethod
    def _layers(cls, module: Any) -> Mapping[str, type[nn.Module] | str]:
        return {**super()._layers(module), "softmax": nn.Softmax}

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        widths = {
            "enc_dim": module.mlp_enc.in_features,
            "dec_dim": module.mlp_dec.in_features,
            "attn_dim": module.mlp_attn.in_features,
            "output_dim": module.mlp_out.out_features,
        }
        return {**super()._arguments(module), **widths}

    def reset(self) -> None:
        """Forget the encoder states and their lengths."""
        self.precomputed_enc_h: Tensor | None = None
        self._lengths: Tensor | None = None
        self._forget()

    def _begin(self, enc_states: Tensor, enc_len: Tensor) -> Tensor:
        """Project the states of a batch; returns which of them are real, ``[B, Tk]``."""
        self.precomputed_enc_h = self.mlp_enc(enc_states)
        places = torch.arange(enc_states.size(1), device=enc_states.device)
        real = places < enc_len.to(enc_states.device).unsqueeze(1)
        self._lengths = real.sum(1)  # of lengths that may be fractions, or longer than the rows
        return real

    def _finish(
        self,
        enc_states: Tensor,
        dec_states: Tensor,
        feature_layer: nn.Module | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The projected context ``[B, output_dim]``, and the weights ``[B, Tk]``."""
        assert self.precomputed_enc_h is not None
        rows = Rows(
            self.precomputed_enc_h,
            enc_states,
            self.mlp_attn,
            feature_layer,
            lengths=self._lengths,
            scaling=self.scaling,
        )
        step = self._step(rows, self.mlp_dec(dec_states), features)
        if is_plain(self.softmax, nn.Softmax):
            context, weights = step.attend()
        else:
            weights = self.softmax(step.scores())
            context = weigh(weights, enc_states)
        return self.mlp_out(context), weights


class SpeechBrainContentBasedAttention(_SpeechBrain):
    """``speechbrain.nnet.attention.ContentBasedAttention``.

    Parameters: ``mlp_enc``, ``mlp_dec``, ``mlp_attn``, ``mlp_out``. As there, the first step after
    ``reset`` projects the encoder states and takes their lengths, and each step weighs the states
    that it is given. Formula: Bahdanau, Cho and Bengio 2015.
    """

    original = "speechbrain.nnet.attention.ContentBasedAttention"
    layers: ClassVar[tuple[str, ...]] = ("mlp_enc", "mlp_dec", "mlp_attn", "mlp_out")
    mlp_enc: nn.Linear
    mlp_dec: nn.Linear
    mlp_attn: nn.Linear
    mlp_out: nn.Linear
    softmax: nn.Softmax

    def __init__(
        self,
        enc_dim: int,
        dec_dim: int,
        attn_dim: int,
        output_dim: int,
        scaling: float = 1.0,
        *,
        backend: str | None = None,
    ):
        super().__init__(backend)
        self.mlp_enc = nn.Linear(enc_dim, attn_dim)
        self.mlp_dec = nn.Linear(dec_dim, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        self.mlp_out = nn.Linear(enc_dim, output_dim)
        self.scaling = scaling
        self.softmax = nn.Softmax(dim=-1)
        self.reset()

    def forward(
        self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend with one query a sequence.

        Args:
            enc_states: ``(B, Tk, enc_dim)``.
            enc_len: ``(B,)`` lengths, of integers or floats.
            dec_states: ``(B, dec_dim)``.

        Returns:
            The projected context ``(B, output_dim)`` and the weights ``(B, Tk)``.
        """
        if self.precomputed_enc_h is None:
            self._begin(enc_states, enc_len)
        return self._finish(enc_states, dec_states)


class SpeechBrainLocationAwareAttention(_SpeechBrain):
    """``speechbrain.nnet.attention.LocationAwareAttention``.

    Parameters: ``mlp_enc``, ``mlp_dec``, ``mlp_attn``, ``conv_loc``, ``mlp_loc``, ``mlp_out``. As
    there, ``prev_attn`` ``(B, Tk)`` has the weights of the step before, without a gradient, and may
    be set between steps, as beam search does; encoder states are taken as in
    :class:`SpeechBrainContentBasedAttention`. Formula: Chorowski et al. 2015, "Attention-Based
    Models for Speech Recognition".
    """

    original = "speechbrain.nnet.attention.LocationAwareAttention"
    layers: ClassVar[tuple[str, ...]] = ("mlp_enc", "mlp_dec", "mlp_attn", "mlp_loc", "mlp_out")
    kept: ClassVar[tuple[str, ...]] = (*_SpeechBrain.kept, "prev_attn")
    conv_loc: nn.Conv1d
    mlp_loc: nn.Linear
    mlp_enc: nn.Linear
    mlp_dec: nn.Linear
    mlp_attn: nn.Linear
    mlp_out: nn.Linear
    softmax: nn.Softmax

    def __init__(
        self,
        enc_dim: int,
        dec_dim: int,
        attn_dim: int,
        output_dim: int,
        conv_channels: int,
        kernel_size: int,
        scaling: float = 1.0,
        *,
        backend: str | None = None,
    ):
        super().__init__(backend)
        self.mlp_enc = nn.Linear(enc_dim, attn_dim)
        self.mlp_dec = nn.Linear(dec_dim, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        self.conv_loc = nn.Conv1d(
            1, conv_channels, 2 * kernel_size + 1, padding=kernel_size, bias=False
        )
        self.mlp_loc = nn.Linear(conv_channels, attn_dim)
        self.mlp_out = nn.Linear(enc_dim, output_dim)
        self.scaling = scaling
        self.softmax = nn.Softmax(dim=-1)
        self.reset()

    @classmethod
    def _layers(cls, module: Any) -> Mapping[str, type[nn.Module] | str]:
        return {**super()._layers(module), "conv_loc": nn.Conv1d}

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        more = {
            "conv_channels": module.mlp_loc.in_features,
            "kernel_size": module.conv_loc.kernel_size[0] // 2,
        }
        return {**super()._arguments(module), **more}

    def reset(self) -> None:
        """Forget the encoder states, their lengths and the weights of the step before."""
        super().reset()
        self.prev_attn: Tensor | None = None

    def forward(
        self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend with one query a sequence.

        Args:
            enc_states: ``(B, Tk, enc_dim)``.
            enc_len: ``(B,)`` lengths, of integers or floats.
            dec_states: ``(B, dec_dim)``.

        Returns:
            The projected context ``(B, output_dim)`` and the weights ``(B, Tk)``.
        """
        if self.precomputed_enc_h is None:
            real = self._begin(enc_states, enc_len)
            # Not real * share, which is NaN for sequences of length 0.
            share = 1 / enc_len.to(enc_states).unsqueeze(1)
            self.prev_attn = torch.where(real, share, 0)
        assert self.prev_attn is not None
        features = self.conv_loc(self.prev_attn.unsqueeze(1)).transpose(1, 2)
        context, weights = self._finish(enc_states, dec_states, self.mlp_loc, features)
        self.prev_attn = weights.detach()
        return context, weights
