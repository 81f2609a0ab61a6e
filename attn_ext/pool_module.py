"""Attention pooling as a module that holds its projections."""

import torch
from torch import Tensor, nn

from .checks import check_count, check_flag, check_probability
from .layout import clear_ignored
from .module import _project
from .pooling import additive_pool, check_feature_dropout


class AdditivePool(nn.Module):
    """Attention pooling with learned projections: each bag of rows becomes one row, or K.

    ``alpha_j = softmax_j(w . (tanh(V key_j) * sigmoid(U key_j)))`` weighs the values of a bag, the
    gated attention of Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning"
    (ICML 2018); ``gated=False`` leaves the sigmoid out. What ignored rows hold, NaN too, changes no
    result and no gradient; but those past the last offset of a nested tensor reach the projections.

    Args:
        key_dim: features of a key.
        attn_dim: features of the projections.
        branches: K, the score weights that share the projections.
        gated: whether there is a gate.
        bias: whether the projections have biases.
        dropout: probability to drop an attention weight in training.
        feature_dropout: probability to drop an entry of the hidden rows in training, or the pair of
            those of tanh and gate.

    Attributes:
        key_proj, gate_proj: ``nn.Linear`` to ``attn_dim``, V and U; ``gate_proj`` is None without a
            gate.
        score_weight: ``(attn_dim,)``, or ``(branches, attn_dim)`` for more than one branch.

    Example:
        >>> import torch, attn_ext
        >>> pool = attn_ext.AdditivePool(key_dim=8, attn_dim=4)
        >>> slides, offsets = torch.randn(7, 8), torch.tensor([0, 3, 7])  # of 3 and 4 patches
        >>> context, weights = pool(slides, cu_seqlens_k=offsets, need_weights=True)
        >>> context.shape, weights.shape
        (torch.Size([2, 8]), torch.Size([7]))
    """

    dropout: float
    feature_dropout: float | tuple[float, float]
    key_proj: nn.Linear
    gate_proj: nn.Linear | None
    score_weight: nn.Parameter

    def __init__(
        self,
        key_dim: int,
        attn_dim: int,
        *,
        branches: int = 1,
        gated: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        feature_dropout: float | tuple[float, float] = 0.0,
    ):
        super().__init__()
        for name, size in (("key_dim", key_dim), ("attn_dim", attn_dim), ("branches", branches)):
            check_count(name, size, 1)
        check_flag("gated", gated)
        check_flag("bias", bias)
        self.dropout = check_probability("dropout", dropout)
        check_feature_dropout("feature_dropout", feature_dropout, gated)
        self.feature_dropout = feature_dropout
        self.key_proj = nn.Linear(key_dim, attn_dim, bias=bias)
        self.gate_proj = nn.Linear(key_dim, attn_dim, bias=bias) if gated else None
        shape = (attn_dim,) if branches == 1 else (branches, attn_dim)
        self.score_weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.key_proj.reset_parameters()
        if self.gate_proj is not None:
            self.gate_proj.reset_parameters()
        bound = self.score_weight.size(-1) ** -0.5
        nn.init.uniform_(self.score_weight, -bound, bound)

    def extra_repr(self) -> str:
        branches = 1 if self.score_weight.dim() == 1 else self.score_weight.size(0)
        dropout = f"dropout={self.dropout}, feature_dropout={self.feature_dropout}"
        return f"branches={branches}, {dropout}"

    def forward(
        self,
        key: Tensor,
        value: Tensor | None = None,
        *,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        key_padding_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        need_weights: bool = False,
        deterministic: bool | None = None,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Project the keys, also to their gates, and pool.

        Args:
            key: ``key_dim`` wide, in a layout of :func:`attn_ext.additive_pool`.
            value: as key, of any width; None takes key as it is.
            cu_seqlens_k, max_seqlen_k, key_padding_mask, key_lengths, need_weights, deterministic,
                backend: as :func:`attn_ext.additive_pool`.

        Returns:
            As :func:`attn_ext.additive_pool`, the context being as wide as value.

        Raises:
            TypeError, ValueError: as :func:`attn_ext.additive_pool`.
        """
        value = key if value is None else value
        key = clear_ignored("key", key, cu_seqlens_k, key_lengths, key_padding_mask)
        return additive_pool(
            _project("key", key, self.key_proj),
            value,
            self.score_weight,
            gate=None if self.gate_proj is None else _project("key", key, self.gate_proj),
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_k=max_seqlen_k,
            key_padding_mask=key_padding_mask,
            key_lengths=key_lengths,
            feature_dropout_p=self.feature_dropout if self.training else 0.0,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            deterministic=deterministic,
            backend=backend,
        )
