"""Ways to compute a workload: attn_ext's backends, and what a user would write without them."""

from collections.abc import Callable

import torch
from torch import Tensor

import attn_ext
from attn_ext import backends

from .workloads import Inputs, Workload

PADDED = ("eager", "compile")
PEERS = (*PADDED, "cudnn")
OLDEST_CUDNN = 92800  # the first with mha_gat_v2

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

    def all_at_once() -> Tensor:
        rows = padded(inputs.padded_query, *keys).flatten(0, 1)
        places = inputs.query_places
        return rows if places is None else rows.index_select(0, places)

    return all_at_once


def edges(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Every query's keys as a graph in compressed columns: offsets and row numbers, int32.

    Keys ``indices[offsets[i] : offsets[i + 1]]`` are those of query ``i``.
    """
    queries, keys = inputs.cu_seqlens_q.diff(), inputs.cu_seqlens_k.diff()
    degrees = keys.repeat_interleave(queries)
    offsets = torch.nn.functional.pad(degrees.cumsum(0), (1, 0))
    shift = inputs.cu_seqlens_k[:-1].repeat_interleave(queries) - offsets[:-1]
    numbers = torch.arange(int(offsets[-1]), device=offsets.device)
    return offsets.int(), (numbers + shift.repeat_interleave(degrees)).int()


def _run_cudnn(inputs: Inputs) -> Run:
    """GATv2 attention: the scores of a graph's edges, and sums of its source nodes, the keys."""
    from cudnn.gnn import CscGraph, mha_gat_v2

    graph = CscGraph(*edges(inputs), num_src_nodes=len(inputs.key))
    nodes = (inputs.key, inputs.query)
    return lambda: mha_gat_v2(graph, nodes, inputs.score_weight, activation="tanh")


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

    if not workload.one_query:
        options["cu_seqlens_q"] = inputs.cu_seqlens_q
        options["max_seqlen_q"] = max(workload.query_lengths)

    def all_at_once() -> Tensor:
        return attn_ext.additive_attention(inputs.query, *keys, **options)

    return loop if workload.steps else all_at_once


def make_run(provider: str, workload: Workload, inputs: Inputs) -> Run:
    """The forward of ``provider`` on these inputs.

    Args:
        provider: one of :data:`PEERS` ("cudnn" for tied workloads only), or an attn_ext backend
            ("cpu", "triton", "cuda").
        workload: what the inputs were made for.
        inputs: from :func:`benchmarks.workloads.make_inputs`.
    """
    if provider == "eager":
        return _run_peer(workload, inputs, attend_padded, attend_step)
    if provider == "compile":
        compiled = (torch.compile(f, dynamic=False) for f in (sum_product_padded, sum_product_step))
        return _run_peer(workload, inputs, *compiled)
    if provider == "cudnn":
        return _run_cudnn(inputs)
    return _run_attn_ext(workload, inputs, provider)


def leaves(provider: str, inputs: Inputs) -> list[Tensor]:
    """The tensors whose gradients a provider computes."""
    prefix = "padded_" if provider in PADDED else ""
    names = [f"{prefix}{name}" for name in ("query", "key", "value")]
    tensors = (getattr(inputs, name) for name in (*names, "score_weight"))
    return list(dict.fromkeys(tensors))  # a value that is the key has no gradient of its own


def problem(provider: str, device: str) -> str | None:
    """Why a provider does not run on ``device``, or None if it does."""
    if provider in PADDED:
        return None
    if provider == "triton" and device == "cpu":
        return "Triton's interpreter is no way to measure it"
    if provider != "cudnn":
        return backends.problem(provider, torch.device(device))
    if device != "cuda":
        return "it computes on CUDA tensors"
    try:
        import cudnn
        from cudnn.gnn import mha_gat_v2  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install nvidia-cudnn-frontend"
    try:
        version = cudnn.backend_version()
    except RuntimeError as error:  # it found no cuDNN to load
        return str(error)
    if version < OLDEST_CUDNN:
        return f"cuDNN {cudnn.backend_version_string()} is older than 9.28"
    return None


def available(device: str) -> list[str]:
    """Providers that run on ``device``, the baselines first, then attn_ext's in order of choice."""
    names = (*PEERS, "triton", "cuda", "cpu")
    return [name for name in names if problem(name, device) is None]
