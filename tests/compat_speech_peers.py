"""The attentions of speech packages that ``attn_ext.compat`` replaces, rewritten from their papers.

Location-aware attention: Chorowski et al. 2015; coverage: See, Liu and Manning 2017; Tacotron's
location layer: Shen et al. 2018; forward attention: Zhang, Ling and Dai 2018. What no paper has,
such as coqui's windows, follows the documentation of the package.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compat_peers import IGNORED, KEY_DIM, LENGTH_LIST, LENGTHS, QUERY_DIM, Call, D, original
from torch import Tensor, nn

from attn_ext import compat

FILTERS, HALF_WIDTH, OUTPUT_DIM = 4, 2, 10


def weigh(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores.softmax(-1)
    return torch.einsum("bk,bkv->bv", weights, values), weights


def real_rows(lengths: Any, rows: Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths, device=rows.device)
    return torch.arange(rows.size(1), device=rows.device) < lengths[:, None]


class SpeechBrain(nn.Module):
    """e_j = w . tanh(V h_j + W s + U f_j), f the convolved weights of the step before."""

    def __init__(self, location: bool, scaling: float = 1.5):
        super().__init__()
        self.mlp_enc = nn.Linear(KEY_DIM, D)
        self.mlp_dec = nn.Linear(QUERY_DIM, D)
        self.mlp_attn = nn.Linear(D, 1, bias=False)
        if location:
            width, padding = 2 * HALF_WIDTH + 1, HALF_WIDTH
            self.conv_loc = nn.Conv1d(1, FILTERS, width, padding=padding, bias=False)
            self.mlp_loc = nn.Linear(FILTERS, D)
        self.mlp_out = nn.Linear(KEY_DIM, OUTPUT_DIM)
        self.scaling, self.softmax = scaling, nn.Softmax(dim=-1)
        self.reset()

    def reset(self) -> None:
        self.precomputed_enc_h = None

    def forward(self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor):
        if self.precomputed_enc_h is None:
            self.precomputed_enc_h = self.mlp_enc(enc_states)
            self.real = real_rows(enc_len, enc_states)
            self.prev_attn = self.real / enc_len.to(enc_states).unsqueeze(1)
        hidden = self.precomputed_enc_h + self.mlp_dec(dec_states).unsqueeze(1)
        if hasattr(self, "mlp_loc"):
            hidden = hidden + self.mlp_loc(self.conv_loc(self.prev_attn.unsqueeze(1)).mT)
        scores = self.mlp_attn(hidden.tanh()).squeeze(-1).where(self.real, -torch.inf)
        weights = self.softmax(self.scaling * scores)
        self.prev_attn = weights.detach()
        return self.mlp_out(torch.einsum("bk,bkv->bv", weights, enc_states)), weights


class ESPnet(nn.Module):
    """e_j = g . tanh(M h_j + N s + U f_j), f convolved weights, or the sum of all so far."""

    def __init__(self, location: bool, han_mode: bool = False):
        super().__init__()
        self.eprojs, self.dunits, self.att_dim, self.han_mode = KEY_DIM, QUERY_DIM, D, han_mode
        self.mlp_enc = nn.Linear(KEY_DIM, D)
        self.mlp_dec = nn.Linear(QUERY_DIM, D, bias=False)
        if location:
            self.mlp_att = nn.Linear(FILTERS, D, bias=False)
            width, padding = (1, 2 * HALF_WIDTH + 1), (0, HALF_WIDTH)
            self.loc_conv = nn.Conv2d(1, FILTERS, width, padding=padding, bias=False)
        else:
            self.wvec = nn.Linear(1, D)
        self.gvec = nn.Linear(D, 1)
        self.reset()

    def reset(self) -> None:
        self.keys = None

    def forward(
        self,
        enc_hs_pad,
        enc_hs_len,
        dec_z,
        att_prev,
        scaling=2.0,
        last_attended_idx=None,
        backward_window=1,
        forward_window=3,
    ):
        if self.keys is None or self.han_mode:
            self.states, self.keys = enc_hs_pad, self.mlp_enc(enc_hs_pad)
        if dec_z is None:
            dec_z = enc_hs_pad.new_zeros(len(enc_hs_pad), QUERY_DIM)
        real = real_rows(enc_hs_len, enc_hs_pad)
        uniform = real / real.sum(1, keepdim=True).to(enc_hs_pad)
        hidden = self.keys + self.mlp_dec(dec_z).unsqueeze(1)
        if hasattr(self, "wvec"):
            earlier = [uniform] if att_prev is None else att_prev
            hidden = hidden + self.wvec(sum(earlier).unsqueeze(-1))
        else:
            rows = uniform if att_prev is None else att_prev
            hidden = hidden + self.mlp_att(self.loc_conv(rows[:, None, None]).squeeze(2).mT)
        if last_attended_idx is not None:
            places = torch.arange(real.size(1), device=real.device)
            real = real & (places >= last_attended_idx - backward_window)
            real = real & (places < last_attended_idx + forward_window)
        scores = self.gvec(hidden.tanh()).squeeze(-1).where(real, -torch.inf)
        context, weights = weigh(scaling * scores, self.states)
        if hasattr(self, "wvec"):
            earlier += [weights]
            return context, earlier
        return context, weights


class CoquiLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.linear_layer = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_layer(features)


class CoquiLocationLayer(nn.Module):
    def __init__(self):
        super().__init__()
        width = 2 * HALF_WIDTH + 1
        self.location_conv1d = nn.Conv1d(2, FILTERS, width, padding=HALF_WIDTH, bias=False)
        self.location_dense = CoquiLinear(FILTERS, D, bias=False)

    def forward(self, earlier: Tensor) -> Tensor:
        return self.location_dense(self.location_conv1d(earlier).mT)


CoquiLinear.__module__ = "TTS.tts.layers.tacotron.common_layers"
CoquiLinear.__qualname__ = "Linear"
CoquiLocationLayer.__module__ = "TTS.tts.layers.tacotron.attentions"
CoquiLocationLayer.__qualname__ = "LocationLayer"

COQUI_OPTIONS = {
    "location_attention": True,
    "windowing": False,
    "norm": "softmax",
    "forward_attn": False,
    "trans_agent": False,
    "forward_attn_mask": False,
}


class Coqui(nn.Module):
    """Tacotron: e_j = v . tanh(V h_j + W s + U f_j) + b, f of the weights before and their sum."""

    def __init__(self, **options: Any):
        super().__init__()
        self.__dict__.update({**COQUI_OPTIONS, **options})
        self.query_layer = CoquiLinear(QUERY_DIM, D, bias=False)
        self.inputs_layer = CoquiLinear(KEY_DIM, D, bias=False)
        self.v = CoquiLinear(D, 1)
        if self.trans_agent:
            self.ta = nn.Linear(QUERY_DIM + KEY_DIM, 1)
        if self.location_attention:
            self.location_layer = CoquiLocationLayer()

    def init_states(self, inputs: Tensor) -> None:
        self.attention_weights = self.attention_weights_cum = inputs.new_zeros(inputs.shape[:2])
        self.alpha = torch.full_like(self.attention_weights, 1e-7)
        self.alpha[:, 0] = 1
        self.u = torch.full_like(self.alpha[:, :1], 0.5)
        self.win_idx = -1

    def preprocess_inputs(self, inputs: Tensor) -> Tensor:
        return self.inputs_layer(inputs)

    def forward(self, query: Tensor, inputs: Tensor, processed_inputs: Tensor, mask: Tensor | None):
        hidden = self.query_layer(query).unsqueeze(1) + processed_inputs
        if self.location_attention:
            earlier = torch.stack([self.attention_weights, self.attention_weights_cum], 1)
            hidden = hidden + self.location_layer(earlier)
        scores = self.v(hidden.tanh()).squeeze(-1)
        if mask is not None:
            scores = scores.where(mask, -torch.inf)
        if self.windowing and not self.training:
            window = slice(max(0, self.win_idx - 2), self.win_idx + 6)
            outside = torch.ones_like(scores, dtype=torch.bool)
            outside[:, window] = False
            scores = scores.masked_fill(outside, -torch.inf)
            if self.win_idx == -1:
                first = torch.arange(scores.size(1), device=scores.device) == 0
                scores = torch.where(first, scores.max(), scores)
            self.win_idx = int(scores[0].argmax())
        if self.norm == "softmax":
            weights = scores.softmax(1)
        else:
            weights = scores.sigmoid() / scores.sigmoid().sum(1, keepdim=True)
        self.attention_weights_cum = self.attention_weights_cum + weights
        if self.forward_attn:
            weights = self.alpha = self.move_forward(weights)
        self.attention_weights = weights
        context = torch.einsum("bk,bkv->bv", weights, inputs)
        if self.trans_agent:
            self.u = self.ta(torch.cat([context, query], 1)).sigmoid()
        return context

    def move_forward(self, weights: Tensor) -> Tensor:
        moved = torch.cat([torch.zeros_like(self.u), self.alpha[:, :-1]], 1)
        alpha = ((1 - self.u) * self.alpha + self.u * moved + 1e-8) * weights
        if self.forward_attn_mask and not self.training:
            rows = []
            for row, place in zip(alpha, moved.argmax(1).tolist()):
                keep = torch.zeros_like(row)
                keep[place - 1 : place + 3] = 1  # with its ends as Python counts them
                before = torch.zeros_like(row)
                before[place - 2] = 0.01
                rows.append(torch.where(before > 0, before * row.max(), keep * row))
            alpha = torch.stack(rows)
        return alpha / alpha.sum(1, keepdim=True)


# ---- How they are called: steps of a decoder, each with the weights of those before ----


def stacked(steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    contexts, weights = zip(*steps)
    return torch.stack(contexts, 1), torch.stack(weights, 1)


def speechbrain(module: nn.Module, queries: Tensor, states: Tensor):
    """As a beam search does, which reorders the hypotheses of a batch."""
    module.reset()
    steps = []
    for query in queries.unbind(1):
        steps.append(module(states, LENGTHS.to(states), query))  # of floats, as theirs may be
        if hasattr(module, "mlp_loc"):
            swapped = torch.tensor([0, 2, 1], device=states.device)
            module.prev_attn = module.prev_attn.index_select(0, swapped)
    return stacked(steps)


def espnet_location(module: nn.Module, queries: Tensor, states: Tensor):
    """As text to speech does, which sums up the weights."""
    module.reset()
    earlier, steps = None, []
    for query in (None, *queries.unbind(1)):
        context, weights = module(states, LENGTH_LIST, query, earlier)
        steps.append((context, weights))
        earlier = weights if earlier is None else earlier + weights
    return stacked(steps)


def espnet_coverage(module: nn.Module, queries: Tensor, states: Tensor):
    module.reset()
    real = (~IGNORED).to(states)
    earlier = [real / real.sum(1, keepdim=True)]  # the original's own are of float32
    steps = []
    for query in queries.unbind(1):
        context, earlier = module(states, LENGTH_LIST, query, earlier)
        steps.append((context, earlier[-1]))
    assert len(earlier) == 1 + len(steps)
    return stacked(steps)


def coqui(module: nn.Module, queries: Tensor, states: Tensor, masked: bool = True):
    module.init_states(states)
    for name in ("attention_weights", "attention_weights_cum"):  # the original's are of float32
        if hasattr(module, name) and getattr(module, name) is not None:
            setattr(module, name, getattr(module, name).to(states))
    keys, steps = module.preprocess_inputs(states), []
    mask = ~IGNORED.to(states.device) if masked else None
    for query in queries.unbind(1):
        context = module(query, states, keys, mask)
        steps.append((context, module.attention_weights))
    return stacked(steps)


def coqui_unmasked(module: nn.Module, queries: Tensor, states: Tensor):
    return coqui(module, queries, states, masked=False)


class Peer(NamedTuple):
    attend: Call
    kind: type[nn.Module]
    arguments: dict[str, Any]  # of ours and the original
    make: Callable[[], nn.Module]  # the rewrite
    layers: tuple[str, ...]  # all that something may be done to
    training: bool = True


_SPEECHBRAIN = {"enc_dim": KEY_DIM, "dec_dim": QUERY_DIM, "attn_dim": D, "output_dim": OUTPUT_DIM}
_ESPNET = {"eprojs": KEY_DIM, "dunits": QUERY_DIM, "att_dim": D}


def _coqui(attend: Call = coqui, training: bool = True, **options: Any) -> Peer:
    arguments = {
        "query_dim": QUERY_DIM,
        "embedding_dim": KEY_DIM,
        "attention_dim": D,
        "attention_location_n_filters": FILTERS,
        "attention_location_kernel_size": 2 * HALF_WIDTH + 1,
        **COQUI_OPTIONS,
        **options,
    }
    layers = ("query_layer", "inputs_layer", "v", "v.linear_layer")
    if arguments["location_attention"]:
        conv, dense = "location_layer.location_conv1d", "location_layer.location_dense"
        layers += ("location_layer", conv, dense, f"{dense}.linear_layer")
    layers += ("ta",) if arguments["trans_agent"] else ()
    kind = compat.CoquiOriginalAttention
    return Peer(attend, kind, arguments, lambda: Coqui(**options), layers, training)


PEERS = {
    "speechbrain_content": Peer(
        speechbrain,
        compat.SpeechBrainContentBasedAttention,
        {**_SPEECHBRAIN, "scaling": 1.5},
        lambda: SpeechBrain(location=False),
        ("mlp_enc", "mlp_dec", "mlp_attn", "mlp_out", "softmax"),
    ),
    "speechbrain_location": Peer(
        speechbrain,
        compat.SpeechBrainLocationAwareAttention,
        {**_SPEECHBRAIN, "conv_channels": FILTERS, "kernel_size": HALF_WIDTH, "scaling": 1.5},
        lambda: SpeechBrain(location=True),
        ("mlp_enc", "mlp_dec", "mlp_attn", "conv_loc", "mlp_loc", "mlp_out", "softmax"),
    ),
    "espnet_location": Peer(
        espnet_location,
        compat.ESPnetAttLoc,
        {**_ESPNET, "aconv_chans": FILTERS, "aconv_filts": HALF_WIDTH},
        lambda: ESPnet(location=True),
        ("mlp_enc", "mlp_dec", "mlp_att", "loc_conv", "gvec"),
    ),
    "espnet_coverage": Peer(
        espnet_coverage,
        compat.ESPnetAttCov,
        _ESPNET,
        lambda: ESPnet(location=False),
        ("mlp_enc", "mlp_dec", "wvec", "gvec"),
    ),
    "coqui": _coqui(),
    "coqui_content": _coqui(location_attention=False),
    "coqui_sigmoid": _coqui(norm="sigmoid"),
    "coqui_forward": _coqui(forward_attn=True),
    "coqui_agent": _coqui(forward_attn=True, trans_agent=True, norm="sigmoid"),
    "coqui_forward_mask": _coqui(
        coqui_unmasked, training=False, forward_attn=True, forward_attn_mask=True, trans_agent=True
    ),
    "coqui_window": _coqui(coqui_unmasked, training=False, windowing=True),
}


def rewritten(name: str) -> nn.Module:
    """The rewrite, its class by the name of the original."""
    peer = PEERS[name]
    module, _, class_name = peer.kind.original.rpartition(".")
    made = peer.make().train(peer.training)
    made.__class__ = type(class_name, (type(made),), {"__module__": module})
    return made


# What the packages import beside their attention.
STAND_INS: dict[str, dict[str, object]] = {
    name: {} for name in ("scipy", "soundfile", "torchaudio", "yaml")
}


def original_of(monkeypatch: pytest.MonkeyPatch, name: str) -> nn.Module:
    """The original, where its package is installed; or a visible skip."""
    peer = PEERS[name]
    kind = original(monkeypatch, peer.kind.original, STAND_INS)
    return kind(**peer.arguments).train(peer.training)
