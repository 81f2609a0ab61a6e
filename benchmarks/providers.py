"""Ways to compute a workload: attn_ext's backends, and what a user would write without them."""

from collections.abc import Callable

import torch
from torch import Tensor

import attn_ext
from attn_ext import backends

from .workloads import Inputs, Workload

PEERS = ("eager", "compile")

Run = Callable[[], Tensor]  # computes the contexts of real queries, [total_q, Dv] or [steps, B, Dv]


def _weigh(scores: Tensor, value: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Masked softmax of scores ``(B, Tq, Tk)`` and the weighted sum of values."""
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask.unsqueeze(1), -torch.inf)
    return torch.bmm(scores.softmax(-1), value)


def attend_padded(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, padding_mask: Tensor | None
) -> Tensor:
    """Additive attention as code bases spell it out, ``(B, Tq, D)`` over ``(B, Tk, D)``."""
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ score_weight
    return _weigh(scores, value, padding_mask)


def attend_step(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, padding_mask: Tensor | None
) -> Tensor:
    """The same for one query a sequence, ``(B, D)``."""
    scores = torch.tanh(query.unsqueeze(1) + key) @ score_weight
    return _weigh(scores.unsqueeze(1), value, padding_mask).squeeze(1)


def sum_product_padded(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, padding_mask: Tensor | None
) -> Tensor:
    """``attend_padded`` with the score as a sum of products, which Inductor fuses with the tanh."""
    scores = (torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) * score_weight).sum(-1)
    return _weigh(scores, value, padding_mask)


def sum_product_step(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, padding_mask: Tensor | None
) -> Tensor:
    """``attend_step`` in the form that Inductor fuses best."""
    scores = (torch.tanh(query.unsqueeze(1) + key) * score_weight).sum(-1)
    return _weigh(scores.unsqueeze(1), value, padding_mask).squeeze(1)


def _run_peer(workload: Workload, inputs: Inputs, padded: Callable, step: Callable) -> Run:
    keys = (inputs.padded_key, inputs.padded_value, inputs.score_weight, inputs.padding_mask)
    if workload.steps:
        return lambda: torch.stack([step(query, *keys) for query in inputs.padded_query])
    return lambda: padded(inputs.padded_query, *keys)[inputs.query_valid]


def _run_attn_ext(workload: Workload, inputs: Inputs, backend: str) -> Run:
    keys = (inputs.key, inputs.value, inputs.score_weight)
    options = {
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "max_seqlen_k": max(workload.key_lengths),
        "backend": backend,
    }

    def loop() -> Tensor:
        memory = attn_ext.AttentionMemory(*keys, **options)
        return torch.stack([memory.attend(query) for query in inputs.query])

    def all_at_once() -> Tensor:
        return attn_ext.additive_attention(
            inputs.query,
            *keys,
            cu_seqlens_q=inputs.cu_seqlens_q,
            max_seqlen_q=max(workload.query_lengths),
            **options,
        )

    return loop if workload.steps else all_at_once


def make_run(provider: str, workload: Workload, inputs: Inputs) -> Run:
    """The forward of ``provider`` on these inputs.

    Args:
        provider: "eager", "compile", or an attn_ext backend ("cpu", "triton", "cuda").
        workload: what the inputs were made for.
        inputs: from :func:`benchmarks.workloads.make_inputs`.
    """
    if provider == "eager":
        return _run_peer(workload, inputs, attend_padded, attend_step)
    if provider == "compile":
        compiled = (torch.compile(f, dynamic=False) for f in (sum_product_padded, sum_product_step))
        return _run_peer(workload, inputs, *compiled)
    return _run_attn_ext(workload, inputs, provider)


def leaves(provider: str, inputs: Inputs) -> list[Tensor]:
    """The tensors whose gradients a provider computes."""
    prefix = "padded_" if provider in PEERS else ""
    names = [f"{prefix}{name}" for name in ("query", "key", "value")]
    return [getattr(inputs, name) for name in (*names, "score_weight")]


def available(device: str) -> list[str]:
    """Providers that run on ``device``, the baselines first."""
    ours = ("triton", "cuda", "cpu")
    usable = [name for name in ours if backends.problem(name, torch.device(device)) is None]
    return [*PEERS, *usable]
