"""ESPnet's additive attention."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..memory import AttentionMemory
from .plain import attend_by_calls, readable_weight
from .replacement import Stepwise


class ESPnetAttAdd(Stepwise):
    """``espnet.nets.pytorch_backend.rnn.attentions.AttAdd``.

    Parameters: ``mlp_enc``, ``mlp_dec``, ``gvec``. As there, what the first step is given is used
    until ``reset``, and with ``han_mode`` every step is a first one. The bias of ``gvec`` changes
    no weight; its gradient is exactly 0.
    """

    original = "espnet.nets.pytorch_backend.rnn.attentions.AttAdd"
    sizes: ClassVar[tuple[str, ...]] = ("eprojs", "dunits", "att_dim", "han_mode")
    layers: ClassVar[tuple[str, ...]] = ("mlp_enc", "mlp_dec", "gvec")
    kept: ClassVar[tuple[str, ...]] = ("enc_h", "pre_compute_enc_h", "_lengths")
    mlp_enc: nn.Linear
    mlp_dec: nn.Linear
    gvec: nn.Linear
    eprojs: int
    dunits: int
    att_dim: int
    han_mode: bool

    def __init__(
        self,
        eprojs: int,
        dunits: int,
        att_dim: int,
        han_mode: bool = False,
        *,
        backend: str | None = None,
    ):
        super().__init__(backend)
        self.mlp_enc = nn.Linear(eprojs, att_dim)
        self.mlp_dec = nn.Linear(dunits, att_dim, bias=False)
        self.gvec = nn.Linear(att_dim, 1)
        self.eprojs, self.dunits, self.att_dim, self.han_mode = eprojs, dunits, att_dim, han_mode
        self.reset()

    def reset(self) -> None:
        """Forget the encoder states."""
        self.enc_h: Tensor | None = None
        self.pre_compute_enc_h: Tensor | None = None  # as the original calls its projected keys
        self._recorded = False  # whether for gradients
        self._lengths: Tensor | None = None
        self._forget()

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
        if self.enc_h is None or self.han_mode:
            self.reset()
            self.enc_h = enc_hs_pad
            # A copy: the caller's may change.
            self._lengths = torch.as_tensor(enc_hs_len, device=enc_hs_pad.device).clone()
        keys = self._keys()
        if dec_z is None:
            dec_z = enc_hs_pad.new_zeros(len(enc_hs_pad), self.dunits)
        query = self.mlp_dec(dec_z.view(-1, self.dunits))
        score_weight = readable_weight(self.gvec)
        if score_weight is None:
            return attend_by_calls(
                self.gvec, query, keys, self.enc_h, key_lengths=self._lengths, scaling=scaling
            )
        memory = self._recall((keys, scaling, score_weight), (score_weight,))
        if memory is None:
            memory = self._memory = AttentionMemory(
                keys,
                self.enc_h,
                # The bias has a gradient too: DistributedDataParallel wants all to have one.
                scaling * score_weight.squeeze(0) + 0 * self.gvec.bias,
                key_lengths=self._lengths,
                backend=self.backend,
            )
        return memory.attend(query, need_weights=True)

    def _keys(self) -> Tensor:
        """The projected keys, computed once; once more where steps with gradients follow others."""
        recorded = torch.is_grad_enabled()
        if self.pre_compute_enc_h is None or recorded != self._recorded:
            self.pre_compute_enc_h, self._recorded = self.mlp_enc(self.enc_h), recorded
        return self.pre_compute_enc_h
