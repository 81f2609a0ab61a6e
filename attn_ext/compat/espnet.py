"""ESPnet's additive attentions: plain, location-aware, and with coverage."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_count, mismatch, shape_of
from .plain import masked_softmax, original_class_name, weigh
from .scoring import Rows, Scoring


class _ESPnet(Scoring):
    """What the attentions of ESPnet share: the encoder states of the first step, their projection.

    As there, those are used until ``reset``, and with ``han_mode`` every step is a first one.
    """

    package = "espnet"
    tested = "202511"
    sizes: ClassVar[tuple[str, ...]] = ("eprojs", "dunits", "att_dim", "han_mode")
    kept: ClassVar[tuple[str, ...]] = ("enc_h", "pre_compute_enc_h", "_lengths")
    gvec: nn.Linear
    mlp_enc: nn.Linear
    mlp_dec: nn.Linear
    eprojs: int
    dunits: int
    att_dim: int
    han_mode: bool

    def __init__(self, eprojs: int, dunits: int, att_dim: int, han_mode: bool, backend: str | None):
        super().__init__(backend)
        self.mlp_enc = nn.Linear(eprojs, att_dim)
        self.mlp_dec = nn.Linear(dunits, att_dim, bias=False)
        self.eprojs, self.dunits, self.att_dim, self.han_mode = eprojs, dunits, att_dim, han_mode
        self.reset()

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        # Version 202611 moved the module, as it is.
        name = original_class_name(module)
        return name.replace("espnet2.legacy.", "espnet.", 1) == cls.original

    def reset(self) -> None:
        """Forget the encoder states."""
        self.enc_h: Tensor | None = None
        self.pre_compute_enc_h: Tensor | None = None  # as the original calls its projected keys
        self._recorded = False  # whether for gradients
        self._lengths: Tensor | None = None
        self._forget()

    def _rows(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Sequence[int] | Tensor,
        scaling: float,
        feature_layer: nn.Module | None = None,
    ) -> Rows:
        """What a step attends to: what it is given, if it is a first one."""
        if self.enc_h is None or self.han_mode:
            self.reset()
            self.enc_h = enc_hs_pad
            # A copy: the caller's may change.
            self._lengths = torch.as_tensor(enc_hs_len, device=enc_hs_pad.device).clone()
        # Projected once, and once more where steps with gradients follow others.
        recorded = torch.is_grad_enabled()
        if self.pre_compute_enc_h is None or recorded != self._recorded:
            self.pre_compute_enc_h, self._recorded = self.mlp_enc(self.enc_h), recorded
        return Rows(
            self.pre_compute_enc_h,
            self.enc_h,
            self.gvec,
            feature_layer,
            lengths=self._lengths,
            scaling=scaling,
            kept=True,
        )

    def _query(self, enc_hs_pad: Tensor, dec_z: Tensor | None) -> Tensor:
        if dec_z is None:
            dec_z = enc_hs_pad.new_zeros(len(enc_hs_pad), self.dunits)
        return self.mlp_dec(dec_z.view(-1, self.dunits))

    def _uniform(self, rows: Rows) -> Tensor:
        """The same weight for each real key, where no step came before: ``[B, Tk]``."""
        assert rows.lengths is not None
        lengths = rows.lengths.unsqueeze(1)
        real = torch.arange(rows.values.size(1), device=lengths.device) < lengths
        return real.to(rows.values.dtype) / lengths.clamp(min=1)


class ESPnetAttAdd(_ESPnet):
    """``espnet.nets.pytorch_backend.rnn.attentions.AttAdd``.

    Parameters: ``mlp_enc``, ``mlp_dec``, ``gvec``. As there, what the first step is given is used
    until ``reset``, and with ``han_mode`` every step is a first one. The bias of ``gvec`` changes
    no weight; its gradient is exactly 0.
    """

    original = "espnet.nets.pytorch_backend.rnn.attentions.AttAdd"
    layers: ClassVar[tuple[str, ...]] = ("mlp_enc", "mlp_dec", "gvec")
    gvec: nn.Linear

    def __init__(
        self,
        eprojs: int,
        dunits: int,
        att_dim: int,
        han_mode: bool = False,
        *,
        backend: str | None = None,
    ):
        super().__init__(eprojs, dunits, att_dim, han_mode, backend)
        self.gvec = nn.Linear(att_dim, 1)

    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Sequence[int] | Tensor,
        dec_z: Tensor | None,
        att_prev: object = None,
        scaling: float = 2.0,
    ) -> tuple[Tensor, Tensor]:
        """Attend with one query a sequence.

        Args:
            enc_hs_pad: ``(B, Tk, eprojs)``.
            enc_hs_len: ``(B,)`` lengths.
            dec_z: ``(B, dunits)``, or None for zeros.
            att_prev: not used.
            scaling: what scores are multiplied with.

        Returns:
            The context ``(B, eprojs)`` and the weights ``(B, Tk)``.
        """
        rows = self._rows(enc_hs_pad, enc_hs_len, scaling)
        return self._step(rows, self._query(enc_hs_pad, dec_z)).attend()


class ESPnetAttLoc(_ESPnet):
    """``espnet.nets.pytorch_backend.rnn.attentions.AttLoc``: location-aware attention.

    Parameters: ``mlp_enc``, ``mlp_dec``, ``mlp_att``, ``loc_conv``, ``gvec``. Encoder states are
    kept as in :class:`ESPnetAttAdd`. Formula: Chorowski et al. 2015, "Attention-Based Models for
    Speech Recognition".
    """

    original = "espnet.nets.pytorch_backend.rnn.attentions.AttLoc"
    layers: ClassVar[tuple[str, ...]] = ("mlp_enc", "mlp_dec", "mlp_att", "gvec")
    mlp_att: nn.Linear
    loc_conv: nn.Conv2d
    gvec: nn.Linear

    def __init__(
        self,
        eprojs: int,
        dunits: int,
        att_dim: int,
        aconv_chans: int,
        aconv_filts: int,
        han_mode: bool = False,
        *,
        backend: str | None = None,
    ):
        super().__init__(eprojs, dunits, att_dim, han_mode, backend)
        self.mlp_att = nn.Linear(aconv_chans, att_dim, bias=False)
        kernel_size, padding = (1, 2 * aconv_filts + 1), (0, aconv_filts)
        self.loc_conv = nn.Conv2d(1, aconv_chans, kernel_size, padding=padding, bias=False)
        self.gvec = nn.Linear(att_dim, 1)

    @classmethod
    def _layers(cls, module: Any) -> Mapping[str, type[nn.Module] | str]:
        return {**super()._layers(module), "loc_conv": nn.Conv2d}

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        more = {
            "aconv_chans": module.mlp_att.in_features,
            "aconv_filts": module.loc_conv.kernel_size[1] // 2,
        }
        return {**super()._arguments(module), **more}

    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Sequence[int] | Tensor,
        dec_z: Tensor | None,
        att_prev: Tensor | None,
        scaling: float = 2.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> tuple[Tensor, Tensor]:
        """Attend with one query a sequence.

        Args:
            enc_hs_pad: ``(B, Tk, eprojs)``.
            enc_hs_len: ``(B,)`` lengths.
            dec_z: ``(B, dunits)``, or None for zeros.
            att_prev: ``(B, Tk)``, weights of the step before or a sum of some; None for uniform.
            scaling: what scores are multiplied with.
            last_attended_idx: given, only the keys from ``backward_window`` before it to
                ``forward_window`` after it, that one not included, are attended to; B must be 1.
            backward_window, forward_window: see ``last_attended_idx``.

        Returns:
            The context ``(B, eprojs)`` and the weights ``(B, Tk)``.
        """
        rows = self._rows(enc_hs_pad, enc_hs_len, scaling, self.mlp_att)
        if att_prev is None:
            att_prev = self._uniform(rows)
        features = self.loc_conv(att_prev[:, None, None]).squeeze(2).transpose(1, 2)
        step = self._step(rows, self._query(enc_hs_pad, dec_z), features)
        if last_attended_idx is None:
            return step.attend()
        scores = step.scores()
        if len(scores) != 1:
            expected = "one sequence where last_attended_idx is given"
            raise mismatch("enc_hs_pad", expected, f"shape {shape_of(enc_hs_pad)}")
        last = check_count("last_attended_idx", last_attended_idx)
        end = last + check_count("forward_window", forward_window)
        places = torch.arange(scores.size(1), device=scores.device)
        outside = (places < last - backward_window) | (places >= end)
        weights = masked_softmax(scores, outside | scores.isneginf()).to(rows.values.dtype)
        return weigh(weights, rows.values), weights


class ESPnetAttCov(_ESPnet):
    """``espnet.nets.pytorch_backend.rnn.attentions.AttCov``: attention with coverage.

    Parameters: ``mlp_enc``, ``mlp_dec``, ``wvec``, ``gvec``. Encoder states are kept as in
    :class:`ESPnetAttAdd`. Formula: See, Liu and Manning 2017, "Get To The Point".

    ESPnet's ``att_to_numpy``, which its ``calculate_all_attentions`` uses, asks for the class of
    the original, and does not know the lists of this one.
    """

    original = "espnet.nets.pytorch_backend.rnn.attentions.AttCov"
    layers: ClassVar[tuple[str, ...]] = ("mlp_enc", "mlp_dec", "wvec", "gvec")
    wvec: nn.Linear
    gvec: nn.Linear

    def __init__(
        self,
        eprojs: int,
        dunits: int,
        att_dim: int,
        han_mode: bool = False,
        *,
        backend: str | None = None,
    ):
        super().__init__(eprojs, dunits, att_dim, han_mode, backend)
        self.wvec = nn.Linear(1, att_dim)
        self.gvec = nn.Linear(att_dim, 1)

    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Sequence[int] | Tensor,
        dec_z: Tensor | None,
        att_prev_list: list[Tensor] | None,
        scaling: float = 2.0,
    ) -> tuple[Tensor, list[Tensor]]:
        """Attend with one query a sequence.

        Args:
            enc_hs_pad: ``(B, Tk, eprojs)``.
            enc_hs_len: ``(B,)`` lengths.
            dec_z: ``(B, dunits)``, or None for zeros.
            att_prev_list: the weights ``(B, Tk)`` of all steps before; None for uniform ones.
            scaling: what scores are multiplied with.

        Returns:
            The context ``(B, eprojs)`` and ``att_prev_list``, to which the weights ``(B, Tk)`` were
            appended in place.
        """
        rows = self._rows(enc_hs_pad, enc_hs_len, scaling, self.wvec)
        if att_prev_list is None:
            att_prev_list = [self._uniform(rows)]
        coverage = torch.stack(att_prev_list).sum(0)
        query = self._query(enc_hs_pad, dec_z)
        context, weights = self._step(rows, query, coverage.unsqueeze(-1)).attend()
        att_prev_list += [weights]
        return context, att_prev_list
