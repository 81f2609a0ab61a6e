"""Peers' attention modules with their weights copied over: results and gradients agree.

Keras's own layer runs on its PyTorch backend. The others are the modules that PyTorch code bases
spell out, rewritten from their papers.
"""

import os
from collections.abc import Callable

import pytest
import torch
from helpers import assert_within_budget
from torch import Tensor, nn

import attn_ext
from attn_ext import AdditiveAttention

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras does not run on PyTorch here", allow_module_level=True)

B, TQ, TK, D, DV = 3, 5, 7, 24, 10
QUERY_DIM, KEY_DIM = 12, 18
LENGTHS = torch.tensor([7, 3, 1])

Attend = Callable[..., tuple[Tensor, Tensor]]


def gradients(attend: Attend, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of ``attend(**tensors)`` in a dtype, and the gradients of all tensors."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    context, weights = attend(**leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator).to(dtype)).sum()
        for result in (context, weights)
    )
    found = torch.autograd.grad(loss, list(leaves.values()))
    results = {"context": context.detach(), "weights": weights.detach()}
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, found)}


def assert_parity(ours: Attend, peer: Attend, tensors: dict[str, Tensor]) -> None:
    """Our float32 against the peer's float64, by the error of the peer's float32."""
    actual = gradients(ours, tensors, torch.float32)
    exact = gradients(peer, tensors, torch.float64)
    eager = gradients(peer, tensors, torch.float32)
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


# ---- Keras AdditiveAttention ----


@pytest.mark.parametrize("use_scale", [True, False], ids=["scale", "no_scale"])
@pytest.mark.parametrize("masked", [False, True], ids=["all_keys", "lengths"])
def test_keras(backend: str, masked: bool, use_scale: bool):
    tensors = {"query": random(B, TQ, D), "key": random(B, TK, D), "value": random(B, TK, DV)}
    if use_scale:
        tensors["score_weight"] = random(D, scale=D**-0.5)
    valid = torch.arange(TK) < LENGTHS[:, None]

    def peer(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor | None = None):
        dtype = str(query.dtype).removeprefix("torch.")
        layer = keras.layers.AdditiveAttention(use_scale=use_scale, dtype=dtype)
        layer.build([query.shape, value.shape, key.shape])
        if use_scale:
            layer.scale._value = score_weight  # its torch parameter, so that gradients reach ours
        mask = [None, valid] if masked else None
        return layer([query, value, key], mask=mask, return_attention_scores=True)

    def ours(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor | None = None):
        return attn_ext.additive_attention(
            query,
            key,
            value,
            torch.ones(D) if score_weight is None else score_weight,
            key_lengths=LENGTHS if masked else None,
            need_weights=True,
            backend=backend,
        )

    assert_parity(ours, peer, tensors)


# ---- OpenNMT's "mlp" attention, fed all steps at once ----


class MlpGlobalAttention(nn.Module):
    """Luong et al. 2015's concat score: v . tanh(W_a query + U_a memory), biased on the query."""

    def __init__(self):
        super().__init__()
        self.linear_context = nn.Linear(KEY_DIM, D, bias=False)
        self.linear_query = nn.Linear(QUERY_DIM, D, bias=True)
        self.v = nn.Linear(D, 1, bias=False)

    def forward(self, source: Tensor, memory_bank: Tensor, memory_lengths: Tensor):
        wq = self.linear_query(source).unsqueeze(2)
        uh = self.linear_context(memory_bank).unsqueeze(1)
        align = self.v(torch.tanh(wq + uh)).squeeze(-1)  # [B, Tq, Tk]
        mask = torch.arange(memory_bank.size(1)) < memory_lengths[:, None]
        align = align.masked_fill(~mask.unsqueeze(1), -float("inf"))
        align_vectors = align.softmax(-1)
        return torch.bmm(align_vectors, memory_bank), align_vectors


def test_mlp_global_attention(backend: str):
    theirs = MlpGlobalAttention()
    module = AdditiveAttention(QUERY_DIM, KEY_DIM, D, bias=True)
    tensors = {"source": random(B, TQ, QUERY_DIM), "memory_bank": random(B, TK, KEY_DIM)}
    tensors |= {name.replace(".", "__"): p for name, p in theirs.named_parameters()}

    def peer(source: Tensor, memory_bank: Tensor, **parameters: Tensor):
        parameters = {name.replace("__", "."): p for name, p in parameters.items()}
        return torch.func.functional_call(theirs, parameters, (source, memory_bank, LENGTHS))

    def ours(source: Tensor, memory_bank: Tensor, **parameters: Tensor):
        copied = {
            "query_proj.weight": parameters["linear_query__weight"],
            "query_proj.bias": parameters["linear_query__bias"],
            "key_proj.weight": parameters["linear_context__weight"],
            "key_proj.bias": torch.zeros(D),
            "score_weight": parameters["v__weight"].squeeze(0),
        }
        keywords = {"key_lengths": LENGTHS, "need_weights": True, "backend": backend}
        return torch.func.functional_call(module, copied, (source, memory_bank), keywords)

    assert_parity(ours, peer, tensors)


# ---- ESPnet's AttAdd, a step at a time over a prepared encoder ----


class StepwiseAdditive(nn.Module):
    """e = g . tanh(M enc + N dec), sharpened before the softmax, and summed over the encoder."""

    scaling = 2.0

    def __init__(self):
        super().__init__()
        self.mlp_enc = nn.Linear(KEY_DIM, D)
        self.mlp_dec = nn.Linear(QUERY_DIM, D, bias=False)
        self.gvec = nn.Linear(D, 1)

    def forward(self, encoded: Tensor, states: Tensor, lengths: Tensor):
        prepared = self.mlp_enc(encoded)  # once an utterance
        ignored = torch.arange(encoded.size(1)) >= lengths[:, None]
        contexts, weights = [], []
        for state in states.unbind(1):
            scores = self.gvec(torch.tanh(prepared + self.mlp_dec(state).unsqueeze(1))).squeeze(2)
            alpha = (self.scaling * scores.masked_fill(ignored, -float("inf"))).softmax(1)
            contexts.append((encoded * alpha.unsqueeze(-1)).sum(1))
            weights.append(alpha)
        return torch.stack(contexts, 1), torch.stack(weights, 1)


@pytest.mark.parametrize("jagged", [False, True], ids=["padded", "jagged"])
def test_stepwise_additive(backend: str, jagged: bool):
    theirs = StepwiseAdditive()
    tensors = {"encoded": random(B, TK, KEY_DIM), "states": random(B, TQ, QUERY_DIM)}
    tensors |= {name.replace(".", "__"): p for name, p in theirs.named_parameters()}
    # A constant added to all scores changes nothing: its gradient is rounding alone.
    bias = tensors.pop("gvec__bias").detach()
    valid = torch.arange(TK) < LENGTHS[:, None]

    def peer(encoded: Tensor, states: Tensor, **parameters: Tensor):
        parameters = {name.replace("__", "."): p for name, p in parameters.items()}
        parameters["gvec.bias"] = bias.to(encoded.dtype)
        return torch.func.functional_call(theirs, parameters, (encoded, states, LENGTHS))

    def ours(encoded: Tensor, states: Tensor, **parameters: Tensor):
        prepared = nn.functional.linear(
            encoded, parameters["mlp_enc__weight"], parameters["mlp_enc__bias"]
        )
        score_weight = theirs.scaling * parameters["gvec__weight"].squeeze(0)
        if jagged:
            offsets = nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
            memory = attn_ext.AttentionMemory(
                prepared[valid], encoded[valid], score_weight, cu_seqlens_k=offsets, backend=backend
            )
        else:
            memory = attn_ext.AttentionMemory(
                prepared, encoded, score_weight, key_lengths=LENGTHS, backend=backend
            )
        contexts, weights = [], []
        for state in states.unbind(1):
            query = nn.functional.linear(state, parameters["mlp_dec__weight"])
            context, alpha = memory.attend(query, need_weights=True)
            contexts.append(context)
            if jagged:
                alpha = torch.zeros(B, TK).masked_scatter(valid, alpha)
            weights.append(alpha)
        return torch.stack(contexts, 1), torch.stack(weights, 1)

    assert_parity(ours, peer, tensors)


# ---- GNMT's normed attention ----


def test_normed_attention(backend: str):
    """score = g v/|v| . tanh(W_q q + W_k k + b), as GNMT's implementations write it out."""
    names = {
        "query": (B, TQ, QUERY_DIM),
        "key": (B, TK, KEY_DIM),
        "linear_q": (D, QUERY_DIM),
        "linear_k": (D, KEY_DIM),
        "linear_att": (D,),
        "normalize_scalar": (),
        "normalize_bias": (D,),
    }
    tensors = {name: random(*shape, scale=0.5) for name, shape in names.items()}
    module = AdditiveAttention(QUERY_DIM, KEY_DIM, D, normalize=True)
    ignored = torch.arange(TK) >= LENGTHS[:, None]

    def peer(query, key, linear_q, linear_k, linear_att, normalize_scalar, normalize_bias):
        hidden = (query @ linear_q.T).unsqueeze(2) + (key @ linear_k.T).unsqueeze(1)
        vector = linear_att / linear_att.norm() * normalize_scalar
        scores = torch.tanh(hidden + normalize_bias).matmul(vector)
        scores = scores.masked_fill(ignored.unsqueeze(1), -float("inf"))
        return torch.bmm(scores.softmax(-1), key), scores.softmax(-1)

    def ours(query, key, linear_q, linear_k, linear_att, normalize_scalar, normalize_bias):
        copied = {
            "query_proj.weight": linear_q,
            "key_proj.weight": linear_k,
            "score_weight": linear_att,
            "g": normalize_scalar,
            "b": normalize_bias,
        }
        keywords = {"key_padding_mask": ignored, "need_weights": True, "backend": backend}
        return torch.func.functional_call(module, copied, (query, key), keywords)

    assert_parity(ours, peer, tensors)
