"""``attn_ext.compat`` on PyTorch: with the peers' parameters, the peers' results and gradients."""

import copy
from collections.abc import Callable

import pytest
import torch
from compat_peers import (
    IGNORED,
    KEY_DIM,
    LENGTH_LIST,
    PEERS,
    QUERY_DIM,
    REPLACEMENTS,
    TK,
    TQ,
    B,
    D,
    NormedAttention,
    StepwiseAdditive,
    assert_parity,
    gnmt,
    original,
)
from torch import Tensor, nn

from attn_ext import compat


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


def test_espnet_sharpness_of_each_step(backend: str):
    peer = StepwiseAdditive()
    ours = compat.ESPnetAttAdd.from_original(copy.deepcopy(peer), backend=backend)
    states, query = torch.randn(B, TK, KEY_DIM), torch.randn(B, QUERY_DIM)

    def attend(module: nn.Module, query: Tensor, states: Tensor):
        module.reset()
        module(states, LENGTH_LIST, query, None, 2.0)
        return module(states, LENGTH_LIST, query, None, 0.5)

    assert_parity(attend, ours, peer, query, states)


def test_espnet_keeps_the_states_of_the_first_step(backend: str):
    """But in hierarchical models, which have new ones in every step."""
    peer = StepwiseAdditive()
    ours = compat.ESPnetAttAdd.from_original(copy.deepcopy(peer), backend=backend)
    states, query = torch.randn(B, TK, KEY_DIM), torch.randn(B, QUERY_DIM)
    context, weights = ours(states, LENGTH_LIST, query, None)
    for others in (torch.zeros_like(states), -states):
        again = ours(others, LENGTH_LIST, query, None)
        assert torch.equal(again[0], context) and torch.equal(again[1], weights)
    ours.han_mode = True

    def attend(module: nn.Module, query: Tensor, states: Tensor):
        if not module.han_mode:
            module.reset()
        return module(-states, LENGTH_LIST, query, None)

    assert_parity(attend, ours, peer, query, states)


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
    expected = attend(module, queries, states)
    with torch.inference_mode():
        actual = attend(module, queries.clone(), states.clone())
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", PEERS)
def test_compiled(name: str):
    attend, _, arguments, (query_dim, key_dim) = PEERS[name]
    module = REPLACEMENTS[name](**arguments)
    queries, states = torch.randn(B, TQ, query_dim), torch.randn(B, TK, key_dim)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    actual, expected = (run(module, queries, states) for run in (compiled, attend))
    assert all(map(torch.equal, actual, expected))


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


def test_replace_attention_of_no_module_is_refused():
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got str$"):
        compat.replace_attention("model")


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


def test_joeynmt_notices_a_mask_that_is_filled_anew(backend: str):
    module = compat.JoeyNMTBahdanauAttention(D, KEY_DIM, QUERY_DIM, backend=backend)
    states, query = torch.randn(B, TK, KEY_DIM), torch.randn(B, 1, QUERY_DIM)
    mask = torch.ones(B, 1, TK, dtype=torch.bool)
    module.compute_proj_keys(states)
    module(query, mask, states)
    mask[:, :, 1:] = False
    _, weights = module(query, mask, states)
    assert (weights[:, :, 0] == 1).all() and (weights[:, :, 1:] == 0).all()
