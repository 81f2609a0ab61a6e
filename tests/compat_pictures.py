"""Peers of ``attn_ext.compat`` for pictures: text recognition, and bags of parts of pictures.

As in compat_peers: rewritten from their papers, and the originals where they are installed.
"""

import collections
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from compat_peers import IGNORED, KEY_DIM, QUERY_DIM, TK, D, find_installed, original
from torch import Tensor, nn

from attn_ext import compat
from attn_ext.compat.replacement import Replacement

CHARACTERS, HEIGHT, WIDTH = 5, 7, 1  # TK places
N_CLASSES = 3


class TableCell(nn.Module):
    """A GRU that reads Bahdanau et al. 2015's context of its state beside the token before."""

    def __init__(self, input_size: int, hidden_size: int, num_embeddings: int):
        super().__init__()
        self.input_to_hidden = nn.Linear(input_size, hidden_size, bias=False)
        self.hidden_to_hidden = nn.Linear(hidden_size, hidden_size)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.rnn = nn.GRUCell(input_size + num_embeddings, hidden_size)

    def forward(self, prev_hidden: Tensor, batch_hidden: Tensor, char_onehots: Tensor, **_):
        query = self.hidden_to_hidden(prev_hidden).unsqueeze(1)
        hidden = torch.tanh(self.input_to_hidden(batch_hidden) + query)
        weights = self.score(hidden).transpose(1, 2).softmax(-1)  # [B, 1, Tk]
        context = (weights @ batch_hidden).squeeze(1)
        return self.rnn(torch.cat((context, char_onehots), -1), prev_hidden), weights


class PlacesAttention(nn.Module):
    """Li et al. 2019, equation 1: each place is scored with its neighbours, then all are summed."""

    def __init__(self, feat_chans: int, state_chans: int, attention_units: int):
        super().__init__()
        self.feat_conv = nn.Conv2d(feat_chans, attention_units, kernel_size=3, padding=1)
        self.state_conv = nn.Conv2d(state_chans, attention_units, kernel_size=1, bias=False)
        self.attention_projector = nn.Conv2d(attention_units, 1, kernel_size=1, bias=False)

    def forward(self, features: Tensor, hidden_state: Tensor) -> Tensor:
        state = self.state_conv(hidden_state[..., None, None])
        scores = self.attention_projector(torch.tanh(self.feat_conv(features) + state))
        weights = scores.flatten(1).softmax(-1)
        return torch.einsum("np,ncp->nc", weights, features.flatten(2))


class LazyLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.module = nn.Linear(in_features, out_features)

    def forward(self, rows: Tensor) -> Tensor:
        return self.module(rows)


LazyLinear.__module__ = "torchmil.nn.utils"


class BagPool(nn.Module):
    """Ilse et al. 2018, equations 8 and 9."""

    def __init__(self, in_dim: int, att_dim: int, act: str = "tanh", gated: bool = False):
        super().__init__()
        self.in_dim, self.att_dim, self.act, self.gated = in_dim, att_dim, act, gated
        self.fc1, self.fc2 = LazyLinear(in_dim, att_dim), nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated, self.act_gated = LazyLinear(in_dim, att_dim), nn.Sigmoid()
        self.act_layer = {"tanh": nn.Tanh, "relu": nn.ReLU}[act]()

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False):
        hidden = self.act_layer(self.fc1(X))
        if self.gated:
            hidden = hidden * self.act_gated(self.fc_gated(X))
        scores = self.fc2(hidden).squeeze(-1)
        masked = scores if mask is None else scores.masked_fill(mask == 0, -torch.inf)
        pooled = torch.einsum("bk,bkd->bd", masked.softmax(-1), X)
        return (pooled, scores) if return_att else pooled


class GatedScores(nn.Module):
    """Ilse et al. 2018, equation 9, before its softmax; the rows are handed on (Lu et al. 2021)."""

    def __init__(self, L: int = 1024, D: int = 256, dropout: bool = False, n_classes: int = 1):
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(L, D), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(L, D), nn.Sigmoid())
        if dropout:
            self.attention_a.append(nn.Dropout(0.25))
            self.attention_b.append(nn.Dropout(0.25))
        self.attention_c = nn.Linear(D, n_classes)

    def forward(self, x: Tensor):
        return self.attention_c(self.attention_a(x) * self.attention_b(x)), x


class PlainScores(nn.Module):
    """Equation 8, likewise."""

    def __init__(self, L: int = 1024, D: int = 256, dropout: bool = False, n_classes: int = 1):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(L, D), nn.Tanh())
        if dropout:
            self.module.append(nn.Dropout(0.25))
        self.module.append(nn.Linear(D, n_classes))

    def forward(self, x: Tensor):
        return self.module(x), x


class BagModel(nn.Module):
    """A model whose head weighs the rows of a bag by Ilse et al. 2018, equation 8."""

    def __init__(self, features: int = KEY_DIM):
        super().__init__()
        self.mil_mode = "att"
        self.attention = nn.Sequential(nn.Linear(features, D), nn.Tanh(), nn.Linear(D, 1))

    def calc_head(self, x: Tensor) -> Tensor:
        return (x * self.attention(x).softmax(1)).sum(1)


# ---- How each is called, with queries (B, Tq, features) and states (B, Tk, features) ----


def table(module: nn.Module, queries: Tensor, states: Tensor):
    """Tokens of one picture; then of another, whose states are others."""
    tokens = torch.eye(CHARACTERS).to(queries)[: len(states)]
    steps = [module(query, states, tokens) for query in queries.unbind(1)]
    steps += [module(query, states * 2, tokens) for query in queries.unbind(1)]
    hidden, weights = zip(*steps)
    return torch.stack(hidden, 1), torch.cat(weights, 1)


def places(module: nn.Module, queries: Tensor, states: Tensor):
    features = states.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
    glimpses = torch.stack([module(features, query) for query in queries.unbind(1)], 1)
    return glimpses, glimpses.new_zeros(TK)


def bag_of(queries: Tensor, states: Tensor) -> Tensor:
    """Both are rows of the bags, so that both have a gradient."""
    return torch.cat((queries, states), 1)


def bags(module: nn.Module, queries: Tensor, states: Tensor):
    bag = bag_of(queries, states)
    mask = 1 - bag_of(torch.zeros_like(queries[..., 0]), IGNORED.to(states))
    pooled = module(bag, mask) + module(bag).sin()
    again, scores = module(bag, mask, return_att=True)
    return pooled + again.sin(), scores[:, -TK:]


def scores(module: nn.Module, queries: Tensor, states: Tensor):
    bag = bag_of(queries, states)
    found, rows = module(bag[0])
    assert rows.shape == bag[0].shape
    weights = found.t().softmax(-1)  # [K, rows]
    return weights @ rows, module(bag)[0].mT[..., -TK:]


class Peer(NamedTuple):
    """What is compared."""

    kind: type[Replacement]
    attend: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    rewritten: type[nn.Module]
    arguments: dict[str, object]
    features: tuple[int, int] = (KEY_DIM, KEY_DIM)  # of queries and states

    def make(self, **changes: object) -> nn.Module:
        """A rewrite whose class goes by the name of the original."""
        module, _, name = self.kind.original.rpartition(".")
        kind = type(name, (self.rewritten,), {"__module__": module or "somewhere.models"})
        return kind(**self.arguments | changes)


_CELL = {"input_size": KEY_DIM, "hidden_size": D, "num_embeddings": CHARACTERS}
_CONVOLUTIONS = {"feat_chans": KEY_DIM, "state_chans": QUERY_DIM, "attention_units": D}
_POOL = {"in_dim": KEY_DIM, "att_dim": D}
_SCORES = {"L": KEY_DIM, "D": D, "n_classes": N_CLASSES}
PICTURES = {
    "slanet": Peer(
        compat.TransformersSLANetAttentionGRUCell, table, TableCell, _CELL, (D, KEY_DIM)
    ),
    "slanext": Peer(
        compat.TransformersSLANeXtAttentionGRUCell, table, TableCell, _CELL, (D, KEY_DIM)
    ),
    "doctr": Peer(
        compat.DocTRAttentionModule, places, PlacesAttention, _CONVOLUTIONS, (QUERY_DIM, KEY_DIM)
    ),
    "torchmil": Peer(compat.TorchMILAttentionPool, bags, BagPool, _POOL),
    "torchmil_gated": Peer(compat.TorchMILAttentionPool, bags, BagPool, {**_POOL, "gated": True}),
    "clam": Peer(compat.CLAMAttnNet, scores, PlainScores, _SCORES),
    "clam_gated": Peer(compat.CLAMAttnNetGated, scores, GatedScores, _SCORES),
}


# ---- The peers themselves ----

DOCTR_STAND_INS: dict[str, dict[str, object]] = {
    "torchvision": {},
    "torchvision.models": {},
    "torchvision.models._utils": {"IntermediateLayerGetter": None},
    "doctr.datasets": {"VOCABS": collections.defaultdict(str), "encode_sequences": None},
    "doctr.models.classification": {"resnet31": None},
    "doctr.models.utils": {
        "_bf16_to_float32": lambda logits: logits,
        "load_pretrained_params": None,
    },
}


def of_transformers(monkeypatch: pytest.MonkeyPatch, full_name: str) -> type:
    """A class of transformers, which runs with what it depends on; or a visible skip."""
    find_installed(monkeypatch)
    module_name, _, class_name = full_name.rpartition(".")
    module = pytest.importorskip(module_name, exc_type=ImportError)
    return getattr(module, class_name)


def original_of(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[..., nn.Module]:
    """The class that ``PICTURES[name]`` replaces; or a visible skip."""
    full_name = PICTURES[name].kind.original
    if name.startswith("sla"):
        return of_transformers(monkeypatch, full_name)
    return original(monkeypatch, full_name, DOCTR_STAND_INS if name == "doctr" else None)
