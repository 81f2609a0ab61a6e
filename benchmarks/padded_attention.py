"""Additive attention as one would write it by hand, for decoders that run over jagged rows."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn


class PaddedAttention(nn.Module):
    """The parameters of an AdditiveAttention, applied in plain PyTorch to padded sequences.

    Stands in for it in a decoder of attn_ext.nmt, over whose jagged rows it is called. Keys are
    projected once a sequence, before they are padded to the longest of the batch.

    Args:
        attention: whose parameters it shares, in their order.
        all_at_once: as :func:`providers.attend_padded`.
        one_query: as :func:`providers.attend_step`.
    """

    def __init__(self, attention: nn.Module, all_at_once: Callable, one_query: Callable):
        super().__init__()
        self.query_proj, self.key_proj = attention.query_proj, attention.key_proj
        self.score_weight = attention.score_weight
        self.all_at_once, self.one_query = all_at_once, one_query

    def forward(
        self, query, key, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        need_weights, backend,
    ) -> Tensor:  # fmt: skip
        places = _places(cu_seqlens_q, max_seqlen_q, len(query))
        queries = _pad(self.query_proj(query), places, len(cu_seqlens_q) - 1, max_seqlen_q)
        keys = self._key_side(key, cu_seqlens_k, max_seqlen_k)
        return self.all_at_once(queries, *keys).flatten(0, 1).index_select(0, places)

    def memory(self, key, *, cu_seqlens_k, max_seqlen_k, backend) -> SimpleNamespace:
        keys = self._key_side(key, cu_seqlens_k, max_seqlen_k)
        return SimpleNamespace(attend=lambda query: self.one_query(self.query_proj(query), *keys))

    def _key_side(self, key: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, ...]:
        """Padded keys and values, score weight, and the mask of what is padding."""
        batch, places = len(offsets) - 1, _places(offsets, longest, len(key))
        padded = (_pad(rows, places, batch, longest) for rows in (self.key_proj(key), key))
        mask = torch.arange(longest, device=key.device) >= offsets.diff()[:, None]
        return *padded, self.score_weight, mask


def _places(offsets: Tensor, longest: int, total: int) -> Tensor:
    """``[total]``, where jagged rows stand among the ``B * longest`` padded ones."""
    sequences = torch.arange(len(offsets) - 1, device=offsets.device)
    sequence = sequences.repeat_interleave(offsets.diff(), output_size=total)
    rows = torch.arange(total, device=offsets.device)
    return rows - offsets[sequence] + sequence * longest


def _pad(rows: Tensor, places: Tensor, batch: int, longest: int) -> Tensor:
    padded = rows.new_zeros(batch * longest, rows.size(-1)).index_copy(0, places, rows)
    return padded.unflatten(0, (batch, longest))
