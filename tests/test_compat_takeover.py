"""Takeovers of models that something was done to, before or after: right, or refused and untouched.

What may be done to a layer is of two kinds. Before the takeover all of it is refused; after it, the
attention gives what the peer gives that the same was done to.
"""

import copy
import io
import warnings
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
)
from test_compat import stand_in
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import attn_ext
from attn_ext import compat

LAYERS = [(name, layer) for name, kind in REPLACEMENTS.items() for layer in kind.layers]
LAYER_IDS = [f"{name}-{layer}" for name, layer in LAYERS]


class LowRank(nn.Module):
    """An adapter around a layer, as LoRA's: what it adds is trained, the layer is not."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.base(features) + self.up(self.down(features))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class OwnLinear(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).clamp(max=0.1)


def set_own(model: nn.Module, name: str) -> None:
    layer = getattr(model, name)
    own = OwnLinear(layer.in_features, layer.out_features, layer.bias is not None)
    own.load_state_dict(layer.state_dict())
    setattr(model, name, own)


class Doubling(Tensor):
    """A weight with a product of its own, as the tensors of newer quantisations are."""

    @classmethod
    def __torch_function__(cls, function: Callable, types, args=(), kwargs=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs or {})
        return 2 * function(*(t if t is None else t.as_subclass(Tensor) for t in args))


def set_doubling(layer: nn.Linear) -> None:
    weight = layer.weight.detach().as_subclass(Doubling)
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def patch(layer: nn.Linear) -> None:
    layer.forward = lambda features: nn.functional.linear(features, layer.weight * 2, layer.bias)


def quantise(model: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecation
        torch.ao.quantization.quantize_dynamic(model, {name: quantised_config()}, inplace=True)


def quantised_config() -> object:
    return torch.ao.quantization.default_dynamic_qconfig


def old_norm(layer: nn.Linear, norm: Callable) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecation
        norm(layer)


# What may be done to the layer `name` of a module; each changes what the module computes, or could.
TREATMENTS: dict[str, Callable[[nn.Module, str], object]] = {
    "quantised": quantise,
    "weight_norm": lambda m, name: parametrizations.weight_norm(getattr(m, name)),
    "spectral_norm": lambda m, name: parametrizations.spectral_norm(getattr(m, name)),
    "old_weight_norm": lambda m, name: old_norm(getattr(m, name), nn.utils.weight_norm),
    "old_spectral_norm": lambda m, name: old_norm(getattr(m, name), nn.utils.spectral_norm),
    "parametrised": lambda m, name: parametrize.register_parametrization(
        getattr(m, name), "weight", Halved()
    ),
    "pruned": lambda m, name: prune.l1_unstructured(getattr(m, name), "weight", 0.5),
    "adapter": lambda m, name: setattr(m, name, LowRank(getattr(m, name))),
    "subclass": set_own,
    "forward_hook": lambda m, name: getattr(m, name).register_forward_hook(
        lambda layer, args, out: out.sin()
    ),
    "forward_pre_hook": lambda m, name: getattr(m, name).register_forward_pre_hook(
        lambda layer, args: (args[0] * 0.5,)
    ),
    "backward_hook": lambda m, name: getattr(m, name).register_full_backward_hook(
        lambda layer, into, out: tuple(None if grad is None else grad * 2 for grad in into)
    ),
    "tensor_subclass": lambda m, name: set_doubling(getattr(m, name)),
    "patched": lambda m, name: patch(getattr(m, name)),
}


def untouched(module: nn.Module) -> dict[str, object]:
    """All modules, parameters and buffers, by identity."""
    everything = [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]
    return {name: id(thing) for name, thing in everything}


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize(("name", "layer"), LAYERS, ids=LAYER_IDS)
def test_a_treated_layer_is_refused(name: str, layer: str, treatment: str):
    """With its path, and before any other attention of the model is replaced."""
    last = stand_in(name)
    TREATMENTS[treatment](last, layer)
    model = nn.ModuleDict({"first": stand_in("gnmt"), "last": nn.Sequential(last)})
    before = untouched(model)
    message = rf"^model\.last\.0\.{layer}.*: expected .*got .*replace the attention first"
    with pytest.raises(ValueError, match=message):
        compat.replace_attention(model)
    assert untouched(model) == before
    with pytest.raises(ValueError, match=rf"^module\.{layer}.*: expected"):
        REPLACEMENTS[name].from_original(last)


def shared_shape(module: nn.Module, name: str) -> None:
    layer = getattr(module, name)
    layer.weight = nn.Parameter(layer.weight[:, :-1].clone())


@pytest.mark.parametrize(
    ("change", "path", "got"),
    [
        (lambda m: m.register_forward_hook(lambda *args: None), "", "forward_hooks"),
        (lambda m: m.register_forward_pre_hook(lambda *args: None), "", "forward_pre_hooks"),
        (lambda m: m.register_state_dict_post_hook(lambda *args: None), "", "state_dict_hooks"),
        (lambda m: setattr(m, "forward", lambda *args: None), "", "its own forward"),
        (lambda m: m.compile(), "", r"one that compile\(\) was called on"),
        (lambda m: m.add_module("dropout", nn.Dropout()), "", "dropout beside them"),
        (lambda m: m.register_buffer("bias", torch.ones(2)), r"\.bias", r"shape \(2,\)"),
        (lambda m: setattr(m, "extra", nn.Parameter(torch.ones(2))), r"\.extra", r"shape \(2,\)"),
        (lambda m: delattr(m, "linear_k"), r"\.linear_k", "none"),
        (lambda m: delattr(m, "linear_att"), r"\.linear_att", "none"),
        (lambda m: shared_shape(m, "linear_q"), r"\.linear_q\.weight", r"shape \(24, 11\)"),
        (
            lambda m: setattr(m.linear_q, "bias", nn.Parameter(torch.ones(D))),
            r"\.linear_q\.bias",
            "torch.nn.parameter.Parameter",
        ),
        (
            lambda m: parametrize.register_parametrization(m, "linear_att", Halved()),
            "",
            "parametrizations beside them",
        ),
    ],
)
def test_a_treated_module_is_refused(change: Callable, path: str, got: str):
    model = nn.Sequential(stand_in("espnet"), stand_in("gnmt"))
    change(model[1])
    before = untouched(model)
    with pytest.raises(ValueError, match=rf"^model\.1{path}: expected .*got .*{got}"):
        compat.replace_attention(model)
    assert untouched(model) == before


def test_an_attribute_of_hooks_is_no_hook():
    model = nn.Sequential(stand_in("gnmt"))
    model[0].my_hooks = ["fish", "crab"]
    compat.replace_attention(model)
    assert type(model[0]) is REPLACEMENTS["gnmt"]


def tied() -> nn.Module:
    module = stand_in("opennmt")
    module.linear_query.weight = module.linear_context.weight
    return module


def shared() -> nn.Module:
    module = stand_in("gnmt")
    module.linear_k = module.linear_q
    return module


@pytest.mark.parametrize("make", [tied, shared])
def test_tied_parameters_stay_tied(make: Callable[[], nn.Module]):
    model = nn.Sequential(make())
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    compat.replace_attention(model)
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == before


@pytest.mark.parametrize(
    ("name", "attribute"),
    [(name, size) for name, kind in REPLACEMENTS.items() for size in kind.sizes],
)
def test_an_unknown_version_of_the_class_is_refused(name: str, attribute: str):
    model = nn.Sequential(stand_in("gnmt"), stand_in(name))
    delattr(model[1], attribute)
    before = untouched(model)
    with pytest.raises(ValueError, match=rf"^model\.1: expected the attributes of .*{attribute}"):
        compat.replace_attention(model)
    assert untouched(model) == before


def test_compiled_attention_is_refused():
    model = nn.Sequential(torch.compile(stand_in("gnmt")))
    with pytest.raises(ValueError, match="not compiled, got a compiled one; replace it before"):
        compat.replace_attention(model)


@pytest.mark.parametrize("name", PEERS)
def test_parameters_of_another_class_are_refused(name: str):
    """As quantisation and sharding by subclasses of tensors make of them."""

    class Packed(Tensor):
        pass

    model = nn.Sequential(stand_in(name))
    layer = getattr(model[0], REPLACEMENTS[name].layers[0])
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    with pytest.raises(
        ValueError, match=r"weight: expected a plain torch.nn.Parameter, got .*Pack"
    ):
        compat.replace_attention(model)


# ---- The other way round ----


def call(name: str, module: nn.Module, queries: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    """A batch, through ``backward``; results, and the gradients that were added."""
    leaves = [t.detach().clone().requires_grad_() for t in (queries, states)]
    context, weights = PEERS[name][0](module, *leaves)
    (context.sin().sum() + (weights * torch.arange(TK)).sum()).backward()
    return context, weights, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize(("name", "layer"), LAYERS, ids=LAYER_IDS)
def test_treated_after_the_takeover(name: str, layer: str, treatment: str):
    """Over two steps of an optimizer, as the peer that was treated alike."""
    torch.manual_seed(1)
    peer = PEERS[name][1]()
    ours = REPLACEMENTS[name].from_original(copy.deepcopy(peer))
    # Quantised layers are of float32 only, and steps of an optimizer pass them by.
    dtype, steps = (torch.float32, 1) if treatment == "quantised" else (torch.float64, 2)
    queries = torch.randn(B, TQ, PEERS[name][3][0], dtype=dtype)
    states = torch.randn(B, TK, PEERS[name][3][1], dtype=dtype)
    for module in (peer, ours):
        torch.manual_seed(2)
        TREATMENTS[treatment](module, layer)
        module.to(dtype)
    if treatment.endswith("spectral_norm"):  # which counts its calls, and ours are fewer
        peer.eval(), ours.eval()
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (peer, ours)]
    for _ in range(steps):
        expected, actual = (call(name, module, queries, states) for module in (peer, ours))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # Rounding may move one activation of a quantised layer to the next of 255 values.
        tolerance = 5e-2 if treatment == "quantised" else 1e-9
        for ours_, theirs in zip(actual, expected):
            torch.testing.assert_close(ours_, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "treat",
    [
        lambda m: prune.l1_unstructured(m, "linear_att", 0.5),
        lambda m: parametrize.register_parametrization(m, "linear_att", Halved()),
        lambda m: old_norm(m, lambda m: nn.utils.weight_norm(m, "linear_att", dim=None)),
    ],
    ids=["pruned", "parametrised", "old_weight_norm"],
)
def test_treated_vector_after_the_takeover(treat: Callable[[nn.Module], object]):
    """GNMT's score weight is a parameter of the attention itself."""
    peer = PEERS["gnmt"][1]().double()
    ours = compat.GNMTBahdanauAttention.from_original(copy.deepcopy(peer))
    queries = torch.randn(B, TQ, QUERY_DIM, dtype=torch.float64)
    states = torch.randn(B, TK, KEY_DIM, dtype=torch.float64)
    for module in (peer, ours):
        treat(module)
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (peer, ours)]
    for _ in range(2):
        results = [call("gnmt", module, queries, states) for module in (peer, ours)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for theirs, actual in zip(*results):
            torch.testing.assert_close(actual, theirs)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "adapter"])
def test_masks_of_everything_and_nan_in_padding(name: str, wrapped: bool):
    """By calls as by kernels: 0 where every key is masked, whatever padding holds."""
    if name == "gnmt":
        pytest.skip("its score weight is no layer")
    attend, _, arguments, (query_dim, key_dim) = PEERS[name]
    module = REPLACEMENTS[name](**arguments)
    queries, states = torch.randn(B, 1, query_dim), torch.randn(B, TK, key_dim)
    if wrapped:
        TREATMENTS["adapter"](module, {"opennmt": "v", "joeynmt": "energy_layer"}.get(name, "gvec"))
    states[IGNORED] = torch.nan
    context, weights = attend(module, queries, states)
    assert context.isfinite().all() and (weights * IGNORED.unsqueeze(1) == 0).all()
    if name == "joeynmt":
        context, weights = module(queries, torch.zeros(B, 1, TK), states)
        assert (context == 0).all() and (weights == 0).all()


# ---- What is kept between steps ----


def one_step(name: str, module: nn.Module, query: Tensor, states: Tensor, mask: Tensor):
    """The attention with one query, of whatever was prepared before where there is that."""
    if name == "joeynmt":
        if module.proj_keys is None:
            module.compute_proj_keys(states)
        return module(query, mask, states)
    if name == "espnet":
        return module(states, LENGTH_LIST, query[:, 0], None)
    if name == "gnmt":
        module.mask = mask[:, 0] == 0
    return module(query, states)


@pytest.mark.parametrize("change", ["mask", "values", "weight"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_joeynmt_notices_changes_in_place(change: str, mode: Callable, autocast: bool):
    """Of what each step is given or reads, between two steps over the same keys."""
    module = compat.JoeyNMTBahdanauAttention(D, KEY_DIM, QUERY_DIM)
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        query, states = torch.randn(B, 1, QUERY_DIM), torch.randn(B, TK, KEY_DIM)
        mask = torch.ones(B, 1, TK, dtype=torch.bool)
        module.compute_proj_keys(states)
        values = states.clone()
        module(query, mask, values)
        with torch.no_grad():
            if change == "mask":
                mask[:, :, 1:] = False
            elif change == "values":
                values.mul_(-2)
            else:
                module.energy_layer.weight.mul_(-2)
        actual = module(query, mask, values)
        module.compute_proj_keys(states)  # which forgets
        expected = module(query, mask, values)
    for ours, anew in zip(actual, expected):
        assert torch.equal(ours, anew)


def test_espnet_keeps_its_own_lengths():
    module = compat.ESPnetAttAdd(KEY_DIM, QUERY_DIM, D)
    query, states = torch.randn(B, QUERY_DIM), torch.randn(B, TK, KEY_DIM)
    lengths = torch.tensor(LENGTH_LIST)
    before = module(states, lengths, query, None)
    lengths.fill_(1)
    for ours, theirs in zip(module(states, lengths, query, None), before):
        assert torch.equal(ours, theirs)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "save": lambda module: through_file(module),
}


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*PEERS, "keras", "own"])
def test_copies_after_a_forward(name: str, mode: Callable, copied: str):
    """Have the parameters, and nothing of the batch; the module itself goes on with its batch."""
    query, states = torch.randn(B, 1, D), torch.randn(B, TK, D)
    mask = ~IGNORED.unsqueeze(1)
    module: nn.Module
    if name == "keras":
        module = compat.KerasAdditiveAttention(D)
    elif name == "own":
        module = attn_ext.AdditiveAttention(D, D, D)
    else:
        _, _, arguments, (query_dim, key_dim) = PEERS[name]
        module = REPLACEMENTS[name](**arguments)
        query, states = query[..., :query_dim], states[..., :key_dim]

    def attend(module: nn.Module):
        if name == "keras":
            return module([query, states], return_attention_scores=True)
        if name == "own":
            return module(query, states, need_weights=True)
        return one_step(name, module, query, states, mask)

    with mode():
        expected = attend(module)
        other = COPIES[copied](module)
        for again in (attend(module), attend(other)):
            assert all(map(torch.equal, again, expected))
    theirs = dict(module.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in other.named_parameters())
