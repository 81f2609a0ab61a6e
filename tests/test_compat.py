"""``attn_ext.compat``: with the peers' parameters, the peers' results and gradients.

The peers are the originals where they are installed (without what they depend on, which the
attention does not need), and always the same modules rewritten from their papers.
"""

import copy
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Results, assert_within_budget
from torch import Tensor, nn

from attn_ext import additive_attention, compat
from attn_ext.compat import keras as keras_attention

os.environ.setdefault("KERAS_BACKEND", "torch")

B, TQ, TK, D = 3, 5, 7, 24
QUERY_DIM, KEY_DIM = 12, 18
LENGTH_LIST = [7, 3, 1]
LENGTHS = torch.tensor(LENGTH_LIST)
IGNORED = torch.arange(TK) >= LENGTHS[:, None]


# ---- The peers, rewritten ----


class MlpGlobalAttention(nn.Module):
    """Luong et al. 2015's concat score, v . tanh(W_a query + U_a memory), and its output layer."""

    def __init__(self):
        super().__init__()
        self.dim, self.attn_type, self.attn_func = D, "mlp", "softmax"
        self.linear_context = nn.Linear(D, D, bias=False)
        self.linear_query = nn.Linear(D, D, bias=True)
        self.v = nn.Linear(D, 1, bias=False)
        self.linear_out = nn.Linear(2 * D, D)

    def forward(self, src: Tensor, enc_out: Tensor, src_len: Tensor):
        queries = src if src.dim() == 3 else src.unsqueeze(1)
        hidden = self.linear_query(queries).unsqueeze(2) + self.linear_context(enc_out).unsqueeze(1)
        align = self.v(torch.tanh(hidden)).squeeze(-1)  # [B, Tq, Tk]
        ignored = torch.arange(enc_out.size(1)) >= src_len[:, None]
        weights = align.masked_fill(ignored.unsqueeze(1), -torch.inf).softmax(-1)
        output = self.linear_out(torch.cat([torch.bmm(weights, enc_out), queries], -1))
        return (output, weights) if src.dim() == 3 else (output.squeeze(1), weights.squeeze(1))


class ProjectedKeysAttention(nn.Module):
    """Bahdanau et al. 2015, A.1.2, for a decoder that hands over the keys before its steps."""

    def __init__(self):
        super().__init__()
        self.key_layer = nn.Linear(KEY_DIM, D, bias=False)
        self.query_layer = nn.Linear(QUERY_DIM, D, bias=False)
        self.energy_layer = nn.Linear(D, 1, bias=False)

    def compute_proj_keys(self, keys: Tensor) -> None:
        self.keys = self.key_layer(keys)

    def forward(self, query: Tensor, mask: Tensor, values: Tensor):
        scores = self.energy_layer(torch.tanh(self.query_layer(query) + self.keys)).squeeze(2)
        weights = scores.unsqueeze(1).masked_fill(mask == 0, -torch.inf).softmax(-1)
        return weights @ values, weights


class StepwiseAdditive(nn.Module):
    """e = g . tanh(M enc + N dec), sharpened before the softmax, and summed over the encoder."""

    def __init__(self):
        super().__init__()
        self.eprojs, self.dunits, self.att_dim, self.han_mode = KEY_DIM, QUERY_DIM, D, False
        self.mlp_enc = nn.Linear(KEY_DIM, D)
        self.mlp_dec = nn.Linear(QUERY_DIM, D, bias=False)
        self.gvec = nn.Linear(D, 1)
        self.reset()

    def reset(self) -> None:
        self.prepared = None

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling: float = 2.0):
        if self.prepared is None:  # once an utterance
            self.prepared = self.mlp_enc(enc_hs_pad)
        if dec_z is None:
            dec_z = enc_hs_pad.new_zeros(len(enc_hs_pad), QUERY_DIM)
        scores = self.gvec(torch.tanh(self.prepared + self.mlp_dec(dec_z).unsqueeze(1))).squeeze(2)
        ignored = torch.arange(enc_hs_pad.size(1)) >= torch.tensor(enc_hs_len)[:, None]
        weights = (scaling * scores.masked_fill(ignored, -torch.inf)).softmax(1)
        return (enc_hs_pad * weights.unsqueeze(-1)).sum(1), weights


class NormedAttention(nn.Module):
    """score = g v/|v| . tanh(W_q q + W_k k + b), as GNMT's implementations write it out."""

    def __init__(self, normalize: bool = True, batch_first: bool = True):
        super().__init__()
        self.num_units, self.normalize, self.batch_first = D, normalize, batch_first
        self.linear_q = nn.Linear(QUERY_DIM, D, bias=False)
        self.linear_k = nn.Linear(KEY_DIM, D, bias=False)
        self.linear_att = nn.Parameter(torch.randn(D) * 0.5)
        if normalize:
            self.normalize_scalar = nn.Parameter(torch.randn(1))
            self.normalize_bias = nn.Parameter(torch.randn(D))

    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        self.ignored = torch.arange(context.size(int(self.batch_first))) >= context_len[:, None]

    def forward(self, query: Tensor, keys: Tensor):
        if not self.batch_first:
            keys = keys.transpose(0, 1)
        steps = query.unsqueeze(1) if query.dim() == 2 else query
        if not self.batch_first and query.dim() == 3:
            steps = query.transpose(0, 1)
        hidden = self.linear_q(steps).unsqueeze(2) + self.linear_k(keys).unsqueeze(1)
        vector = self.linear_att
        if self.normalize:
            hidden = hidden + self.normalize_bias
            vector = vector / vector.norm() * self.normalize_scalar
        scores = torch.tanh(hidden).matmul(vector).masked_fill(self.ignored.unsqueeze(1), -65504)
        weights = scores.softmax(-1)
        context = torch.bmm(weights, keys)
        if query.dim() == 2:
            return context.squeeze(1), weights.squeeze(1)
        if not self.batch_first:
            return context.transpose(0, 1), weights.transpose(0, 1)
        return context, weights


# ---- The peers themselves ----


def original(monkeypatch: pytest.MonkeyPatch, full_name: str) -> type[nn.Module]:
    """A class of an installed package, none of whose ``__init__.py`` is run; or a visible skip."""
    module_name, _, class_name = full_name.rpartition(".")
    spec = importlib.util.find_spec(module_name.partition(".")[0])
    if spec is None:
        pytest.skip(f"{module_name} is not installed")
    root = Path(spec.submodule_search_locations[0])
    for init in [root / "__init__.py", *root.rglob("__init__.py")]:
        parts = (root.name, *init.parent.relative_to(root).parts)
        package = types.ModuleType(".".join(parts))
        package.__path__ = [str(init.parent)]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    return getattr(importlib.import_module(module_name), class_name)


Call = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def opennmt(module: nn.Module, queries: Tensor, states: Tensor):
    return module(queries, states, LENGTHS.to(states.device))


def joeynmt(module: nn.Module, queries: Tensor, states: Tensor):
    module.compute_proj_keys(states)
    mask = ~IGNORED.unsqueeze(1).to(states.device)
    steps = [module(query, mask, states) for query in queries.split(1, 1)]
    return tuple(torch.cat(column, 1) for column in zip(*steps))


def espnet(module: nn.Module, queries: Tensor, states: Tensor):
    module.reset()
    weights, steps = None, []
    for t in range(queries.size(1) + 1):
        query = queries[:, t - 1] if t else None
        context, weights = module(states, LENGTH_LIST, query, weights)
        steps.append((context, weights))
    return tuple(torch.stack(column, 1) for column in zip(*steps))


def gnmt(module: nn.Module, queries: Tensor, states: Tensor):
    module.set_mask(LENGTHS.to(states.device), states)
    return module(queries, states)


# name: how it is called, the rewrite, the original and its arguments, query and key features
PEERS = {
    "opennmt": (opennmt, MlpGlobalAttention, {"dim": D, "attn_type": "mlp"}, (D, D)),
    "joeynmt": (
        joeynmt,
        ProjectedKeysAttention,
        {"hidden_size": D, "key_size": KEY_DIM, "query_size": QUERY_DIM},
        (QUERY_DIM, KEY_DIM),
    ),
    "espnet": (
        espnet,
        StepwiseAdditive,
        {"eprojs": KEY_DIM, "dunits": QUERY_DIM, "att_dim": D},
        (QUERY_DIM, KEY_DIM),
    ),
    "gnmt": (
        gnmt,
        NormedAttention,
        {
            "query_size": QUERY_DIM,
            "key_size": KEY_DIM,
            "num_units": D,
            "normalize": True,
            "batch_first": True,
        },
        (QUERY_DIM, KEY_DIM),
    ),
}
REPLACEMENTS = {
    "opennmt": compat.OpenNMTGlobalAttention,
    "joeynmt": compat.JoeyNMTBahdanauAttention,
    "espnet": compat.ESPnetAttAdd,
    "gnmt": compat.GNMTBahdanauAttention,
}


def results_of(
    attend: Call, module: nn.Module, queries: Tensor, states: Tensor, dtype: torch.dtype
) -> Results:
    """Results, and the gradients of inputs and parameters, in a dtype."""
    module = module.to(dtype)
    leaves = {"queries": queries, "states": states}
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    context, weights = attend(module, *leaves.values())
    leaves |= dict(module.named_parameters())
    generator = torch.Generator("cpu").manual_seed(1)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator, device="cpu").to(result)).sum()
        for result in (context, weights)
    )
    found = torch.autograd.grad(loss, list(leaves.values()))
    results = {"context": context.detach(), "weights": weights.detach()}
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, found)}


def assert_parity(
    attend: Call, ours: nn.Module, peer: nn.Module, queries: Tensor, states: Tensor
) -> None:
    """Our float32 against the peer's float64, by the error of the peer's float32.

    That is the largest on a few inputs alike: a parameter of one element may be right by luck.
    """
    actual = results_of(attend, ours, queries, states, torch.float32)
    largest: Results = {}
    for factor in (1.003, 1.002, 1.001, 1.0):
        inputs = queries * factor, states * factor
        eager = results_of(attend, copy.deepcopy(peer), *inputs, torch.float32)
        exact = results_of(attend, copy.deepcopy(peer), *inputs, torch.float64)
        for name, result in eager.items():
            error = (result.double() - exact[name]).abs()
            largest[name] = error.maximum(largest.get(name, error))
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], exact[name] + largest[name])


@pytest.mark.parametrize("one_step", [False, True], ids=["steps", "one_step"])
@pytest.mark.parametrize(
    ("name", "source"),
    [(name, "rewritten") for name in PEERS]
    + [(name, "original") for name in PEERS if name != "gnmt"],  # which is on no index
)
def test_peer(
    backend: str, monkeypatch: pytest.MonkeyPatch, name: str, source: str, one_step: bool
):
    attend, rewritten, arguments, (query_dim, key_dim) = PEERS[name]
    kind = REPLACEMENTS[name]
    if source == "rewritten":
        peer = rewritten()
    else:
        peer = original(monkeypatch, kind.original)(**arguments)
    ours = kind(**arguments, backend=backend)
    ours.load_state_dict(peer.state_dict())
    queries, states = torch.randn(B, TQ, query_dim), torch.randn(B, TK, key_dim)
    if one_step:
        queries = queries[:, 0] if name in ("opennmt", "gnmt") else queries[:, :1]
    assert_parity(attend, ours, peer, queries, states)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
def test_gnmt_time_first(backend: str, normalize: bool):
    peer = NormedAttention(normalize, batch_first=False)
    ours = compat.GNMTBahdanauAttention.from_original(peer, backend=backend)
    queries, states = torch.randn(TQ, B, QUERY_DIM), torch.randn(TK, B, KEY_DIM)
    assert_parity(gnmt, ours, copy.deepcopy(peer), queries, states)
    assert_parity(gnmt, ours, copy.deepcopy(peer), queries[0], states)


def test_espnet_options(backend: str):
    """Another sharpness from one step to the next, and new states in every step."""
    peer = StepwiseAdditive()
    ours = compat.ESPnetAttAdd.from_original(peer, backend=backend)
    states, query = torch.randn(B, TK, KEY_DIM), torch.randn(B, QUERY_DIM)
    lengths = LENGTH_LIST
    for scaling in (2.0, 0.5):
        expected = peer(states, lengths, query, None, scaling)
        torch.testing.assert_close(ours(states, lengths, query, None, scaling), expected)
    ours(torch.zeros_like(states), lengths, query)
    torch.testing.assert_close(ours(-states, lengths, query, None, 0.5), expected)
    ours.han_mode = True
    peer.reset()
    torch.testing.assert_close(ours(-states, lengths, query), peer(-states, lengths, query, None))


@pytest.mark.parametrize("name", ["joeynmt", "espnet"])
def test_steps_without_and_with_gradients(backend: str, name: str):
    """A step under no_grad leaves no memory behind that has no gradients."""
    attend, rewritten, arguments, (query_dim, key_dim) = PEERS[name]
    ours = REPLACEMENTS[name](**arguments, backend=backend)
    queries, states = torch.randn(B, TQ, query_dim), torch.randn(B, TK, key_dim)

    def mixed(module: nn.Module, queries: Tensor, states: Tensor):
        if name == "joeynmt":
            module.compute_proj_keys(states)
            arguments = queries[:, :1], ~IGNORED.unsqueeze(1).to(states.device), states
        else:
            module.reset()
            arguments = states, LENGTH_LIST, queries[:, 0], None
        with torch.no_grad():
            module(*arguments)
        return module(*arguments)

    peer = rewritten()
    ours.load_state_dict(peer.state_dict())
    if name == "espnet":  # the rewrite would keep what it prepared without gradients
        peer = copy.deepcopy(ours)
        peer.backend = "reference"
    assert_parity(mixed, ours, peer, queries, states)


@pytest.mark.parametrize("name", PEERS)
def test_inference_mode(backend: str, name: str):
    """Inputs and masks made there, too."""
    attend, _, arguments, (query_dim, key_dim) = PEERS[name]
    module = REPLACEMENTS[name](**arguments, backend=backend)
    queries, states = torch.randn(B, TQ, query_dim), torch.randn(B, TK, key_dim)
    expected = [result.detach() for result in attend(module, queries, states)]
    with torch.inference_mode():
        actual = attend(module, queries.clone(), states.clone())
    torch.testing.assert_close(list(actual), expected)


@pytest.mark.parametrize("name", PEERS)
def test_compiled(name: str):
    attend, _, arguments, (query_dim, key_dim) = PEERS[name]
    module = REPLACEMENTS[name](**arguments)
    queries, states = torch.randn(B, TQ, query_dim), torch.randn(B, TK, key_dim)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    actual, expected = (run(module, queries, states) for run in (compiled, attend))
    torch.testing.assert_close(actual, expected)


# ---- Taking over ----


@pytest.mark.parametrize("name", PEERS)
def test_from_original_takes_the_parameters_themselves(name: str):
    peer = PEERS[name][1]().eval()
    ours = REPLACEMENTS[name].from_original(peer)
    theirs = dict(peer.named_parameters())
    assert not ours.training
    assert {n: id(p) for n, p in ours.named_parameters()} == {n: id(p) for n, p in theirs.items()}
    assert ours.state_dict().keys() == peer.state_dict().keys()


def stand_in(name: str) -> nn.Module:
    """A rewrite whose class goes by the name of the original."""
    module, _, class_name = REPLACEMENTS[name].original.rpartition(".")
    return type(class_name, (PEERS[name][1],), {"__module__": module})()


def test_replace_attention():
    other = stand_in("opennmt")
    other.attn_type = "dot"
    decoder = nn.ModuleDict({name: stand_in(name) for name in PEERS})
    model = nn.Sequential(nn.Linear(2, 2), decoder, other)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert compat.replace_attention(model, backend="reference") == [f"1.{name}" for name in PEERS]
    for name, kind in REPLACEMENTS.items():
        assert isinstance(model[1][name], kind) and model[1][name].backend == "reference"
    assert model[2] is other
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_replace_attention_under_all_its_names():
    """A module, and a layer around one, that a model refers to twice."""
    shared, layer = stand_in("gnmt"), nn.Sequential(stand_in("espnet"))
    model = nn.ModuleDict({"a": shared, "b": layer, "c": nn.ModuleList([shared]), "d": layer})
    assert compat.replace_attention(model) == ["a", "b.0", "c.0", "d.0"]
    assert isinstance(model["a"], compat.GNMTBahdanauAttention) and model["a"] is model["c"][0]
    assert isinstance(layer[0], compat.ESPnetAttAdd) and model["b"] is layer is model["d"]


@pytest.mark.parametrize("name", PEERS)
def test_replace_attention_of_the_attention_itself_is_refused(name: str):
    expected = rf"^model: expected .*use {REPLACEMENTS[name].__name__}\.from_original"
    with pytest.raises(ValueError, match=expected):
        compat.replace_attention(stand_in(name))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: compat.OpenNMTGlobalAttention(D, attn_type="dot"), "attn_type"),
        (lambda: compat.OpenNMTGlobalAttention(D, attn_func="sparsemax"), "attn_func"),
        (lambda: compat.OpenNMTGlobalAttention(D, coverage=True), "coverage"),
        (lambda: compat.KerasAdditiveAttention(D)([torch.zeros(1, 1, D)]), "inputs"),
        (
            lambda: compat.KerasAdditiveAttention(D)(
                [torch.zeros(1, 1, D)] * 2, use_causal_mask=True
            ),
            "use_causal_mask",
        ),
        (
            lambda: compat.OpenNMTGlobalAttention(D)(
                torch.zeros(1, D), torch.zeros(1, 1, D), coverage=torch.zeros(1, 1)
            ),
            "coverage",
        ),
    ],
)
def test_what_has_no_replacement_is_refused(make: Callable[[], object], argument: str):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        make()


def test_joeynmt_needs_its_keys():
    module = compat.JoeyNMTBahdanauAttention(D, D, D)
    with pytest.raises(RuntimeError, match="compute_proj_keys must be called"):
        module(torch.zeros(1, 1, D), torch.ones(1, 1, 1), torch.zeros(1, 1, D))


def test_everything_masked_gives_zeros(backend: str):
    module = compat.GNMTBahdanauAttention(QUERY_DIM, KEY_DIM, D, backend=backend)
    module.mask = torch.ones(B, TK, dtype=torch.bool)
    context, weights = module(torch.randn(TQ, B, QUERY_DIM), torch.randn(TK, B, KEY_DIM))
    assert (context == 0).all() and (weights == 0).all()


# ---- Keras ----


@pytest.mark.parametrize("use_scale", [True, False], ids=["scale", "no_scale"])
@pytest.mark.parametrize("masks", ["none", "values", "both"])
def test_keras(backend: str, masks: str, use_scale: bool):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras does not run on PyTorch here")
    tensors = {"query": torch.randn(B, TQ, D), "key": torch.randn(B, TK, D)}
    tensors["value"] = torch.randn(B, TK, 10)
    if use_scale:
        tensors["scale"] = torch.randn(D) * D**-0.5
    query_mask = torch.arange(TQ) < torch.tensor([5, 0, 2])[:, None]
    value_mask = ~IGNORED.to(query_mask.device)
    mask = {"none": None, "values": [None, value_mask], "both": [query_mask, value_mask]}[masks]

    def run(ours: bool, dtype: torch.dtype) -> Results:
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        if ours:
            layer = compat.KerasAdditiveAttention(D, use_scale, backend=backend)
            parameters = {"scale": leaves["scale"]} if use_scale else {}
            arguments, keywords = ([query, value, key],), {"mask": mask}
            keywords["return_attention_scores"] = True
            call = torch.func.functional_call(layer, parameters, arguments, keywords)
        else:
            layer = keras.layers.AdditiveAttention(
                use_scale=use_scale, dtype=str(dtype).removeprefix("torch.")
            )
            layer.build([query.shape, value.shape, key.shape])
            if use_scale:
                layer.scale._value = leaves["scale"]  # so that gradients reach ours
            call = layer([query, value, key], mask=mask, return_attention_scores=True)
        loss = sum((result * result.detach().cos()).sum() for result in call)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results = {"context": call[0].detach(), "weights": call[1].detach()}
        return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}

    actual, exact = run(True, torch.float32), run(False, torch.float64)
    eager = run(False, torch.float32)
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


@pytest.mark.parametrize("place", [0, 1], ids=["query", "value"])
def test_keras_masks_are_checked(place: int):
    layer, shape = compat.KerasAdditiveAttention(D), (B, (TQ, TK)[place])
    tensors = [torch.randn(B, TQ, D), torch.randn(B, TK, D)]
    for wrong, kind, expected in (
        (torch.ones(shape, dtype=torch.int64), TypeError, "dtype bool, True = real, got torch.int"),
        ([[True]], TypeError, "a torch.Tensor, got list"),
        (torch.ones(B, 2, dtype=torch.bool), ValueError, rf"shape \({B}, .*got \({B}, 2\)"),
    ):
        mask = [None, None]
        mask[place] = wrong
        with pytest.raises(kind, match=f"^mask: expected {expected}"):
            layer(tensors, mask=mask)
    with pytest.raises(ValueError, match="^mask: expected .*got 1 masks"):
        layer(tensors, mask=[None])


def test_keras_asks_for_weights_only_if_told(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def attend(*tensors: Tensor, need_weights: bool, **keywords: object):
        asked.append(need_weights)
        return additive_attention(*tensors, need_weights=need_weights, **keywords)

    monkeypatch.setattr(keras_attention, "additive_attention", attend)
    layer, tensors = compat.KerasAdditiveAttention(D), [torch.randn(B, TQ, D)] * 2
    context, weights = layer(tensors, return_attention_scores=True)
    assert torch.equal(layer(tensors), context) and weights.shape == (B, TQ, TQ)
    assert asked == [True, False]


def test_from_keras():
    keras = pytest.importorskip("keras")
    layer = keras.layers.AdditiveAttention(dropout=0.25)
    with pytest.raises(ValueError, match="layer: expected a built layer"):
        compat.KerasAdditiveAttention.from_keras(layer)
    query, value = torch.randn(B, TQ, D), torch.randn(B, TK, D)
    expected = layer([query, value])
    ours = compat.KerasAdditiveAttention.from_keras(layer).eval()
    assert ours.dropout == 0.25 and list(ours.state_dict()) == ["scale"]
    torch.testing.assert_close(ours([query, value]), expected.detach().as_subclass(Tensor))
