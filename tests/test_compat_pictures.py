"""Replacements for pictures: the peers' results and gradients, and takeovers right or refused."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from compat_peers import KEY_DIM, TK, TQ, B, D, assert_parity
from compat_pictures import (
    PICTURES,
    BagModel,
    BagPool,
    GatedScores,
    original_of,
)
from test_compat_takeover import TREATMENTS, through_file, untouched
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attn_ext import compat

# All layers that hold parameters, by their paths, with the treatments that one can give them.
LAYERS = [
    (name, layer)
    for name, peer in PICTURES.items()
    if name != "slanext"  # as slanet in all but the name
    for layer, child in peer.make(**peer.arguments).named_modules()
    if isinstance(child, (nn.Linear, nn.Conv2d, nn.GRUCell))
]
LINEAR_ONLY = ("quantised", "subclass", "adapter", "tensor_subclass", "patched")


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    query_dim, key_dim = PICTURES[name].features
    return torch.randn(B, TQ, query_dim, dtype=dtype), torch.randn(B, TK, key_dim, dtype=dtype)


@pytest.mark.parametrize("source", ["rewritten", "original"])
@pytest.mark.parametrize("name", PICTURES)
def test_peer(backend: str, monkeypatch: pytest.MonkeyPatch, name: str, source: str):
    peer = PICTURES[name]
    if source == "rewritten":
        theirs = peer.make()
    elif name.startswith("clam"):
        pytest.skip("CLAM's classes are on no index")
    else:
        theirs = original_of(monkeypatch, name)(**peer.arguments)
    ours = peer.kind(**peer.arguments, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    assert_parity(peer.attend, ours, theirs, *inputs_of(name))


# ---- Takeovers ----


def model_of(name: str, **changes: object) -> nn.Module:
    return nn.Sequential(PICTURES["slanet"].make(), nn.Sequential(PICTURES[name].make(**changes)))


@pytest.mark.parametrize("name", PICTURES)
def test_replace_attention(name: str):
    """With the very parameters, and each layer in the mode that it had."""
    model = model_of(name, **{"dropout": True} if name.startswith("clam") else {})
    model[1].eval()
    for layer in model[1].modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    before = {n: id(p) for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    assert compat.replace_attention(model, backend="reference") == ["0", "1.0"]
    assert type(model[1][0]) is PICTURES[name].kind and model[1][0].backend == "reference"
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert compat.replace_attention(model) == []


def test_replace_attention_of_monai():
    """By its model, in which only a Sequential is replaced."""
    peer = type("MILModel", (BagModel,), {"__module__": "monai.networks.nets.milmodel"})
    rows = torch.randn(B, TK, KEY_DIM)
    for model, names in ((peer(), ["attention"]), (nn.Sequential(peer()), ["0.attention"])):
        inner = model if hasattr(model, "attention") else model[0]
        expected, keys = inner.calc_head(rows), model.state_dict().keys()
        assert compat.replace_attention(model) == names
        assert isinstance(inner.attention, compat.MONAIMILAttention)
        assert isinstance(inner.attention, nn.Sequential) and model.state_dict().keys() == keys
        torch.testing.assert_close(inner.calc_head(rows), expected)
        assert compat.replace_attention(model) == []
        torch.testing.assert_close(inner.attention[:2](rows), inner.attention[0](rows).tanh())
    model = peer()
    model.attention = nn.Sequential()
    assert compat.replace_attention(model) == []
    model = peer()
    model.attention = torch.compile(model.attention)
    with pytest.raises(
        ValueError, match=r"^model\.attention: expected .*Sequential, got .*Optimized"
    ):
        compat.replace_attention(model)


def treat(module: nn.Module, layer: str, treatment: str) -> None:
    owner, _, leaf = layer.rpartition(".")
    TREATMENTS[treatment](module.get_submodule(owner), leaf)


def fits(name: str, layer: str, treatment: str) -> bool:
    """Whether a layer of that class can be treated so."""
    module = PICTURES[name].make().get_submodule(layer)
    if isinstance(module, nn.GRUCell):
        return treatment.endswith("hook")
    return isinstance(module, nn.Linear) or treatment not in LINEAR_ONLY


# All treatments of layers whose weights are read; of those that are called, what a call may miss.
READ = ("score", "attention_projector", "fc2", "module.2", "attention_c")
CALLED = ("forward_hook", "forward_pre_hook", "backward_hook", "parametrised", "pruned")
TREATED = [
    (name, layer, treatment)
    for name, layer in LAYERS
    for treatment in (TREATMENTS if layer in READ else CALLED)
    if fits(name, layer, treatment)
]


@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.parametrize("treatment", ["forward_hook", "adapter"])
def test_a_treated_layer_is_refused(name: str, layer: str, treatment: str):
    model = model_of(name)
    if not fits(name, layer, treatment):
        treatment = "backward_hook"
    treat(model[1][0], layer, treatment)
    before = untouched(model)
    with pytest.raises(ValueError, match=rf"^model\.1\.0\.{re.escape(layer)}.*: expected .*got"):
        compat.replace_attention(model)
    assert untouched(model) == before


@pytest.mark.parametrize(("name", "layer", "treatment"), TREATED)
def test_treated_after_the_takeover(name: str, layer: str, treatment: str):
    """Over two steps of an optimizer, as the peer that was treated alike."""
    torch.manual_seed(1)
    peer = PICTURES[name]
    theirs = peer.make()
    ours = peer.kind.from_original(copy.deepcopy(theirs))
    dtype, steps = (torch.float32, 1) if treatment == "quantised" else (torch.float64, 2)
    given = inputs_of(name, dtype)
    for module in (theirs, ours):
        torch.manual_seed(2)
        treat(module, layer, treatment)
        module.to(dtype)
        if treatment.endswith("spectral_norm"):  # which counts its calls, and ours are fewer
            module.eval()
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (theirs, ours)]
    for _ in range(steps):
        expected, actual = (call(name, module, given) for module in (theirs, ours))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tolerance = 5e-2 if treatment == "quantised" else 1e-9
        for found, wanted in zip(actual, expected):
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def call(name: str, module: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """A batch, through ``backward``; results, and the gradients of what was given."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    context, weights = PICTURES[name].attend(module, *leaves)
    (context.sin().sum() + (weights * torch.arange(TK)).sum()).backward()
    return context, weights, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "path", "change"),
    [
        ("torchmil_gated", "act_layer", lambda m: hook(m.act_layer)),
        ("torchmil_gated", "act_gated", lambda m: hook(m.act_gated)),
        ("torchmil_gated", "fc1", lambda m: hook(m.fc1)),
        ("torchmil", "act_layer", lambda m: setattr(m, "act_layer", nn.ReLU())),
        ("torchmil", "fc1.module", lambda m: setattr(m.fc1, "module", nn.LazyLinear(D))),
        ("clam", "module", lambda m: hook(m.module)),
        ("clam", "module.1", lambda m: hook(m.module[1])),
        ("clam_gated", "attention_a.2", lambda m: hook(m.attention_a[2])),
        ("clam_gated", "attention_b.1", lambda m: hook(m.attention_b[1])),
        ("clam_gated", "attention_b.2", lambda m: setattr(m.attention_b[2], "p", 0.5)),
        ("doctr", "feat_conv", lambda m: setattr(m.feat_conv, "dilation", (2, 2))),
        ("doctr", "feat_conv", lambda m: setattr(m.feat_conv, "padding_mode", "circular")),
    ],
)
def test_other_layers_are_refused(name: str, path: str, change: Callable[[nn.Module], object]):
    """Also those without parameters, and settings that are none of the constructor's."""
    model = model_of(name, **{"dropout": True} if name.startswith("clam") else {})
    change(model[1][0])
    before = untouched(model)
    with pytest.raises(ValueError, match=rf"^model\.1\.0\.{re.escape(path)}: expected .*got"):
        compat.replace_attention(model)
    assert untouched(model) == before


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda layer, args, out: out.sin())


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("torchmil_gated", "act_layer"),
        ("torchmil_gated", "act_gated"),
        ("clam", "module"),
        ("clam", "module.1"),
        ("clam_gated", "attention_a"),
        ("clam_gated", "attention_a.1"),
        ("clam_gated", "attention_b.2"),
    ],
)
def test_layers_hooked_after_the_takeover(name: str, path: str):
    peer = PICTURES[name]
    theirs = peer.make(**{"dropout": True} if name.startswith("clam") else {}).eval()
    ours = peer.kind.from_original(copy.deepcopy(theirs))
    for module in (theirs, ours):
        hook(module.get_submodule(path))
    given = inputs_of(name)
    for found, wanted in zip(call(name, ours, given), call(name, theirs, given)):
        torch.testing.assert_close(found, wanted)


def test_what_computes_something_else_stays():
    """And is refused where it is named."""
    relu = PICTURES["torchmil"].make(act="relu")
    gated = PICTURES["clam_gated"].make()
    gated.attention_a[1] = nn.ReLU()
    model = nn.Sequential(relu, gated, BagPool(KEY_DIM, D))  # the last is of no known class
    before = untouched(model)
    assert compat.replace_attention(model) == [] and untouched(model) == before
    with pytest.raises(ValueError, match=r"^module\.act: expected 'tanh'.*got 'relu'"):
        compat.TorchMILAttentionPool.from_original(relu)
    with pytest.raises(ValueError, match="^module: expected a module like CLAM's Attn_Net_Gated"):
        compat.CLAMAttnNetGated.from_original(gated)
    with pytest.raises(ValueError, match=r"^module: expected MILModel\.attention"):
        compat.MONAIMILAttention.from_original(relu)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: GatedScores.forward(self, x)[0],
        lambda self, x: (GatedScores.forward(self, x)[0].softmax(0), x),
        lambda self, x: (GatedScores.forward(self, x)[0] / D**0.5, x),
        lambda self, x: (GatedScores.forward(self, x)[0], x.relu()),
        lambda self, x, mask: GatedScores.forward(self, x),
        lambda self, x: (GatedScores.forward(self, x)[0].relu(), x),
        lambda self, x: (GatedScores.forward(self, x)[0].clamp(-10, 10), x),
        lambda self, x: GatedScores.forward(self, x + self.training * torch.randn_like(x)),
    ],
    ids=[
        "scores_alone",
        "softmax",
        "scaled",
        "other_rows",
        "other_arguments",
        "positive_scores",
        "bounded_scores",
        "noise_in_training",
    ],
)
def test_copies_of_clam_with_another_formula_are_refused(forward: Callable):
    """A class of the name and the layers alone may compute anything."""
    kind = type("Attn_Net_Gated", (GatedScores,), {"forward": forward})
    model = nn.Sequential(PICTURES["slanet"].make(), kind(KEY_DIM, D))
    nn.init.constant_(model[1].attention_c.bias, 3)  # all scores of a few rows may be positive
    before = untouched(model)
    with pytest.raises(ValueError, match=r"^model\.1: expected the results of CLAM's"):
        compat.replace_attention(model)
    assert untouched(model) == before


# ---- What is kept between steps ----

HOISTING = ("slanet", "doctr")


def step(module: nn.Module, query: Tensor, states: Tensor) -> Tensor:
    """One of a decoder, of either class that keeps its projected states."""
    if isinstance(states, Tensor) and states.dim() == 4:
        return module(states, query)
    return module(query, states, torch.eye(5, dtype=query.dtype)[: len(states)])[0]


def decoder_inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries, and states as the module is given them in every step."""
    queries, states = inputs_of(name, dtype)
    if name == "doctr":
        states = states.transpose(1, 2).unflatten(2, (TK, 1)).contiguous()
    return queries, states


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    theirs = PICTURES[name].make().to(dtype)
    return PICTURES[name].kind.from_original(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("name", HOISTING)
def test_states_are_projected_once(name: str, monkeypatch: pytest.MonkeyPatch):
    """Until there are others, or a backward pass has freed what the projection saved."""
    ours, theirs = pair(name, torch.float64)
    queries, states = decoder_inputs(name, torch.float64)
    states.requires_grad_()
    projection = ours.feat_conv if name == "doctr" else ours.input_to_hidden
    calls = []

    forward = type(projection).forward

    def counted(layer: nn.Module, rows: Tensor) -> Tensor:
        calls.append(layer)
        return forward(layer, rows)

    monkeypatch.setattr(type(projection), "forward", counted)
    for turn in (1, 2):  # of which the second adds to the gradients of the first
        for module in (ours, theirs):
            sum(step(module, query, states).cos().sum() for query in queries.unbind(1)).backward()
            states.grad, module.states_grad = None, states.grad
        torch.testing.assert_close(ours.states_grad, theirs.states_grad)
        for found, wanted in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(found.grad, wanted.grad)
        assert calls.count(projection) == turn
    with torch.no_grad():
        step(ours, queries[:, 0], states)
        step(ours, queries[:, 1], states)
        assert calls.count(projection) == 3
        step(ours, queries[:, 1], states.clone())
    assert calls.count(projection) == 4


@pytest.mark.parametrize("name", HOISTING)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", ["states", "projection", "score", "autocast", "frozen", "data"])
def test_changes_between_steps_are_noticed(name: str, mode: Callable, change: str):
    """Of all that a step reads."""
    ours, theirs = pair(name)
    with mode():
        queries, states = decoder_inputs(name)
        for turn in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast" and turn == 1):
                found, expected = (step(m, queries[:, 0], states) for m in (ours, theirs))
            close = {"rtol": 0.05, "atol": 0.05} if turn == 1 and change == "autocast" else {}
            torch.testing.assert_close(found, expected, **close)
            assert found.requires_grad == expected.requires_grad
            with torch.no_grad():
                for module in (ours, theirs):
                    layers = list(module.children())
                    if change in ("projection", "score"):
                        layers[0 if change == "projection" else 2].weight.mul_(-2)
                    if change == "data":
                        layers[0].weight.data = torch.tensor((-2 * layers[0].weight).tolist())
                    if change == "frozen":
                        module.requires_grad_(turn == 1)
                if change == "states":
                    states.mul_(-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_file], ids=["deepcopy", "save"])
@pytest.mark.parametrize("name", PICTURES)
def test_copies_after_a_forward(name: str, copied: Callable[[nn.Module], nn.Module]):
    peer, given = PICTURES[name], inputs_of(name)
    ours = peer.kind(**peer.arguments)
    expected = peer.attend(ours, *given)
    other = copied(ours)
    assert all(map(torch.equal, peer.attend(other, *given), expected))
    assert getattr(copied(ours), "_kept", None) is None


@pytest.mark.parametrize("name", HOISTING)
def test_a_decoder_in_a_checkpoint(name: str):
    """Which runs its steps again, inside of the backward pass."""
    ours, theirs = pair(name, torch.float64)
    queries, states = decoder_inputs(name, torch.float64)
    states.requires_grad_()
    gradients = []
    for module in (ours, theirs):

        def decode(states: Tensor, module: nn.Module = module) -> Tensor:
            return sum(step(module, query, states).cos().sum() for query in queries.unbind(1))

        loss = torch.utils.checkpoint.checkpoint(decode, states, use_reentrant=False)
        gradients.append(torch.autograd.grad(loss, [states, *module.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", HOISTING)
def test_each_step_in_a_checkpoint(name: str, use_reentrant: bool):
    """Of which none may use what another has projected: it would not recompute that."""
    ours, theirs = pair(name, torch.float64)
    queries, states = decoder_inputs(name, torch.float64)
    states.requires_grad_()
    gradients = []
    for module in (ours, theirs):
        results = [
            torch.utils.checkpoint.checkpoint(
                step, module, query, states, use_reentrant=use_reentrant
            )
            for query in queries.unbind(1)
        ]
        sum(result.cos().sum() for result in results).backward()
        gradients.append([states.grad, *(p.grad for p in module.parameters())])
        states.grad = None
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", HOISTING)
def test_steps_that_are_recorded(name: str):
    """Fake tensors stay inside, and nothing made before is a constant of the record."""
    ours, theirs = pair(name)
    queries, states = decoder_inputs(name)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            step(ours, queries[:, 0], states)
        found = step(ours, queries[:, 0], states)
        assert type(found) is Tensor
        torch.testing.assert_close(found, step(theirs, queries[:, 0], states))
        graph = make_fx(lambda query, states: step(ours, query, states))(queries[:, 0], states)
        others = torch.randn_like(states)
        torch.testing.assert_close(
            graph(queries[:, 0], others), step(theirs, queries[:, 0], others)
        )


def test_steps_of_other_states_meanwhile(monkeypatch: pytest.MonkeyPatch):
    """As of another thread: while one projects its states, the other makes all of a step."""
    ours, theirs = pair("slanet")
    queries, states = inputs_of("slanet")
    others = torch.randn(B, TK, KEY_DIM)
    forward = nn.Linear.forward

    def interrupted(layer: nn.Module, rows: Tensor) -> Tensor:
        if rows is states:
            monkeypatch.setattr(nn.Linear, "forward", forward)
            step(ours, queries[:, 0], others)
        return forward(layer, rows)

    monkeypatch.setattr(nn.Linear, "forward", interrupted)
    for t, given in enumerate((states, others, states)):
        found = step(ours, queries[:, t], given)
        torch.testing.assert_close(found, step(theirs, queries[:, t], given))


class Decoder(nn.Module):
    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        return torch.stack([step(self.cell, query, states) for query in queries.unbind(1)])


def test_graphs_of_steps():
    """A trace is right at other lengths; compiled steps are one graph."""
    ours, theirs = map(Decoder, pair("slanet"))
    queries, states = inputs_of("slanet")
    ours(queries, states)  # of which nothing may get into the trace
    traced = torch.jit.trace(ours, (queries, states))
    longer = torch.randn(B, 2 * TK, KEY_DIM)
    torch.testing.assert_close(traced(queries, longer), theirs(queries, longer))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(queries[:, :2], states), theirs(queries[:, :2], states))


# ---- Masks and dropout ----


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["read", "called"])
def test_masks_of_everything_and_nan_in_padding(gated: bool, wrapped: bool):
    pool = compat.TorchMILAttentionPool(KEY_DIM, D, gated=gated)
    if wrapped:
        TREATMENTS["adapter"](pool, "fc2")
    bags, mask = torch.randn(2, TK, KEY_DIM), torch.ones(2, TK)
    mask[0], mask[1, 3:] = 0, 0
    expected = pool(bags[1:, :3])
    bags[mask == 0] = torch.nan
    for pooled in (pool(bags, mask), pool(bags, mask, return_att=True)[0]):
        assert (pooled[0] == 0).all()
        torch.testing.assert_close(pooled[1:], expected)


@pytest.mark.parametrize("kind", [compat.CLAMAttnNet, compat.CLAMAttnNetGated])
def test_dropout_of_clam(kind: type[nn.Module]):
    """A feature is left with the probability of the module; in evaluation all are."""
    net = kind(1, 1, dropout=True)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 0)
            nn.init.constant_(layer.bias, 50)  # of which tanh and sigmoid are 1
    last = net.module[-1] if kind is compat.CLAMAttnNet else net.attention_c
    nn.init.constant_(last.weight, 1), nn.init.constant_(last.bias, 3)
    rows = torch.randn(20_000, 1)
    left = 0.75 if kind is compat.CLAMAttnNet else 0.75**2
    scores = net(rows)[0] - 3
    torch.testing.assert_close(scores.unique(), torch.tensor([0, 1 / left]))
    assert abs((scores != 0).float().mean() - left) < 0.02
    assert (net.eval()(rows)[0] == 4).all()


def test_torchmil_finds_its_features_itself():
    pool = compat.TorchMILAttentionPool(att_dim=D, gated=True)
    assert pool(torch.randn(2, TK, KEY_DIM)).shape == (2, KEY_DIM)
    assert pool.fc_gated.module.weight.shape == (D, KEY_DIM)
