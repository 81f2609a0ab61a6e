"""The drop-ins for speech: SpeechBrain's, ESPnet's and coqui-tts's additive attentions."""

import copy
from collections.abc import Callable

import pytest
import torch
from compat_peers import (
    IGNORED,
    KEY_DIM,
    LENGTH_LIST,
    LENGTHS,
    QUERY_DIM,
    TQ,
    B,
    assert_parity,
    results_of,
)
from compat_speech_peers import PEERS, original_of, rewritten
from helpers import assert_within_budget
from test_compat_takeover import COPIES, TREATMENTS
from torch import Tensor, nn

from attn_ext import compat

KINDS = {peer.kind: name for name, peer in reversed(PEERS.items())}  # one name of each
NAMES = [name for name in PEERS if name in KINDS.values()]


def inputs(name: str) -> tuple[Tensor, Tensor]:
    # What evaluation alone does is about places: 30, without padding.
    keys = IGNORED.size(1) if PEERS[name].training else 30
    return torch.randn(B, TQ, QUERY_DIM), torch.randn(B, keys, KEY_DIM)


def take_over(name: str, peer: nn.Module, backend: str | None = None) -> nn.Module:
    """Ours, with parameters of its own."""
    return PEERS[name].kind.from_original(copy.deepcopy(peer), backend=backend)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The rewrite and ours, in float64."""
    peer = rewritten(name).double()
    return peer, take_over(name, peer)


def loss_of(results: tuple[Tensor, Tensor]) -> Tensor:
    context, weights = results
    return context.sin().sum() + (weights * torch.arange(weights.size(-1))).sum()


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("source", ["rewritten", "original"])
@pytest.mark.parametrize("name", PEERS)
def test_peer(backend: str, monkeypatch: pytest.MonkeyPatch, name: str, source: str):
    """The steps of a decoder, each with the weights of those before, and their gradients."""
    attend, peer = PEERS[name].attend, rewritten(name)
    if source == "original":
        peer = original_of(monkeypatch, name)
    ours = take_over(name, peer, backend)
    assert list(ours.state_dict()) == list(peer.state_dict())
    queries, states = inputs(name)
    if source == "rewritten" or not peer.__dict__.get("windowing"):
        assert_parity(attend, ours, peer, queries, states)
    with torch.no_grad():  # also where the original changes in place what its backward needs
        assert_same(attend(ours, queries, states), attend(peer, queries, states))


@pytest.mark.parametrize("name", PEERS)
def test_inference_mode(name: str):
    """Inputs and masks made there, too."""
    module = take_over(name, rewritten(name))
    queries, states = inputs(name)
    expected = PEERS[name].attend(module, queries, states)
    with torch.inference_mode():
        assert_same(PEERS[name].attend(module, queries.clone(), states.clone()), expected)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("name", [n for n in PEERS if PEERS[n].training])
def test_low_precision(name: str, autocast: bool):
    """With errors as the rewrite's, which runs every operation in the dtype PyTorch chooses."""
    peer = rewritten(name)
    ours = take_over(name, peer)
    queries, states = inputs(name)

    def low(module: nn.Module, queries: Tensor, states: Tensor):
        enabled = queries.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return PEERS[name].attend(module, queries, states)

    dtype = torch.float32 if autocast else torch.bfloat16
    actual, eager = (results_of(low, m, queries, states, dtype) for m in (ours, peer))
    exact = results_of(low, peer, queries, states, torch.float64)
    for key, result in actual.items():
        assert_within_budget(key, result.to(torch.bfloat16), exact[key], eager[key])


# ---- Taking over ----


@pytest.mark.parametrize("name", PEERS)
def test_takeover_in_a_model(name: str):
    """The very parameters, under the same names and in the same order, and the options."""
    model = nn.Sequential(rewritten(name))
    before = [(n, id(p)) for n, p in model.named_parameters()]
    peer, state = model[0], copy.deepcopy(model.state_dict())
    assert compat.replace_attention(model, backend="reference") == ["0"]
    ours = model[0]
    assert type(ours) is PEERS[name].kind and ours.training == PEERS[name].training
    assert [(n, id(p)) for n, p in model.named_parameters()] == before
    assert {size: getattr(ours, size) for size in ours.sizes} == {
        size: getattr(peer, size) for size in ours.sizes
    }
    queries, states = inputs(name)
    anew = PEERS[name].kind(**PEERS[name].arguments).train(ours.training)
    anew.load_state_dict({n.removeprefix("0."): tensor for n, tensor in state.items()})
    assert_same(
        PEERS[name].attend(anew, queries, states), PEERS[name].attend(ours, queries, states)
    )


def test_espnet_of_later_versions():
    """Which have the same classes elsewhere."""
    model = nn.Sequential(rewritten("espnet_location"), rewritten("espnet_coverage"))
    for module in model:
        kind = type(module)
        kind.__module__ = kind.__module__.replace("espnet.", "espnet2.legacy.")
    assert compat.replace_attention(model) == ["0", "1"]


def treat(module: nn.Module, layer: str, treatment: str) -> None:
    owner, _, leaf = layer.rpartition(".")
    TREATMENTS[treatment](module.get_submodule(owner), leaf)


# Content-based attention's are the same code as location-aware attention's.
TREATED = [*NAMES[1:], "coqui_agent"]
LAYERS = [(name, layer) for name in TREATED for layer in PEERS[name].layers]


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_hooked_layer_is_refused(name: str, layer: str):
    model = nn.Sequential(rewritten(name))
    treat(model[0], layer, "forward_hook")
    with pytest.raises(ValueError, match=rf"^model\.0\.{layer}: expected .*got forward_hooks"):
        compat.replace_attention(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "speechbrain_location",
            lambda m: setattr(m.conv_loc, "padding", (1,)),
            r"\.conv_loc: .*padding",
        ),
        ("espnet_location", lambda m: setattr(m.loc_conv, "stride", (1, 2)), r"\.loc_conv: "),
        ("speechbrain_content", lambda m: setattr(m.softmax, "dim", 1), r"\.softmax: .*dim=1"),
        (
            "coqui",
            lambda m: setattr(m, "v", nn.Linear(24, 1)),
            r"\.v: expected a plain TTS\..*\.Linear, got torch\.nn\.modules\.linear\.Linear",
        ),
        ("coqui", lambda m: delattr(m, "norm"), r": expected the attributes of .*norm"),
        ("coqui", lambda m: delattr(m, "location_layer"), r"\.location_layer\.\w.* got none"),
    ],
)
def test_another_module_is_refused(name: str, change: Callable, message: str):
    model = nn.Sequential(rewritten(name))
    change(model[0])
    with pytest.raises(ValueError, match=rf"^model\.0{message}"):
        compat.replace_attention(model)


def treatments_of(name: str, layer: str) -> list[str]:
    module = PEERS[name].make().get_submodule(layer)
    more = ["weight_norm"] if hasattr(module, "weight") else []
    return ["forward_hook", *more, *(["adapter"] if type(module) is nn.Linear else [])]


@pytest.mark.parametrize(
    ("name", "layer", "treatment"),
    [(name, layer, how) for name, layer in LAYERS for how in treatments_of(name, layer)],
)
def test_treated_after_the_takeover(name: str, layer: str, treatment: str):
    """Over two steps of an optimizer, as the peer that was treated alike."""
    peer, ours = pair(name)
    queries, states = (rows.double() for rows in inputs(name))
    optimizers = []
    for module in (peer, ours):
        torch.manual_seed(2)
        treat(module, layer, treatment)
        optimizers.append(torch.optim.SGD(module.double().parameters(), 0.1))
    for _ in range(2):
        expected, actual = (PEERS[name].attend(m, queries, states) for m in (peer, ours))
        assert_same(actual, expected)
        for results, optimizer in zip((expected, actual), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(results).backward()
            optimizer.step()
    assert_same(tuple(ours.parameters()), tuple(peer.parameters()))


# ---- What is kept between steps ----


def begin(name: str, module: nn.Module, states: Tensor, mask: Tensor) -> Callable:
    """A batch; returns the function that makes one step of it, with the weights before."""
    if name.startswith("coqui"):
        module.init_states(states)
        keys = module.preprocess_inputs(states)

        def step(query: Tensor):
            context = module(query, states, keys, mask)
            return context, module.attention_weights

        return step
    module.reset()
    if name.startswith("speechbrain"):
        return lambda query: module(states, mask.sum(1), query)
    earlier = None

    def step(query: Tensor):
        nonlocal earlier
        context, earlier = module(states, mask.sum(1), query, earlier)
        return context, earlier if isinstance(earlier, Tensor) else earlier[-1]

    return step


@pytest.mark.parametrize("what", ["score weight", "feature weight", "states"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "speechbrain_content"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_in_place_between_steps(name: str, mode: Callable, what: str):
    """Of what each step reads: the step after is the one of the peer, which keeps the keys only."""
    peer, ours = pair(name)
    layers = {"score weight": ("mlp_attn", "gvec", "v.linear_layer")}
    layers["feature weight"] = ("mlp_loc", "mlp_att", "wvec", "location_layer.location_dense")
    results = []
    for module in (peer, ours):
        torch.manual_seed(1)
        with mode():
            queries, states = (rows.double() for rows in inputs(name))
            step = begin(name, module, states, ~IGNORED)
            step(queries[:, 0])
            if what == "states":
                states.mul_(-2)
            else:
                names = dict(module.named_modules())
                layer = next(names[n] for n in layers[what] if n in names)
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.mul_(-2)
            results.append(step(queries[:, 1]))
    assert_same(*results)


@pytest.mark.parametrize("anew", [False, True], ids=["filled", "another"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_coqui_notices_another_mask(mode: Callable, anew: bool):
    peer, ours = pair("coqui")
    results = []
    for module in (peer, ours):
        with mode():
            torch.manual_seed(1)
            queries, states = (rows.double() for rows in inputs("coqui"))
            keys, mask = module.preprocess_inputs(states), ~IGNORED
            module.init_states(states)
            module(queries[:, 0], states, keys, mask)
            if anew:
                mask = mask & (torch.arange(mask.size(1)) == 0)
            else:
                mask[:, 1:] = False
            context = module(queries[:, 1], states, keys, mask)
            results.append((context, module.attention_weights))
    assert_same(*results)
    assert (results[1][1][:, 0] == 1).all()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("anew", [False, True], ids=["filled", "other"])
def test_speechbrain_weighs_the_states_of_each_step(anew: bool, autocast: bool):
    """By the keys of the first."""
    module = take_over("speechbrain_content", rewritten("speechbrain_content"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        queries, states = inputs("speechbrain_content")
        module(states, LENGTHS, queries[:, 0])
        states = states.clone() if anew else states
        states.mul_(-2)
        actual = module(states, LENGTHS, queries[:, 0])
        module._forget()  # what was prepared, but for the keys
        assert_same(actual, module(states, LENGTHS, queries[:, 0]))


@pytest.mark.parametrize("name", ["speechbrain_content", "espnet_location", "coqui"])
def test_a_scorer_that_is_trained_from_the_second_step_on(name: str):
    queries, states = (rows.double() for rows in inputs(name))
    gradients = []
    for module in pair(name):
        step = begin(name, module, states, torch.ones(states.shape[:2], dtype=torch.bool))
        scorer = module.get_submodule({"s": "mlp_attn", "e": "gvec", "c": "v"}[name[0]])
        scorer.requires_grad_(False)
        step(queries[:, 0])
        scorer.requires_grad_()
        loss = loss_of(step(queries[:, 1]))
        gradients.append(torch.autograd.grad(loss, next(scorer.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", PEERS)
def test_training_then_decoding_then_training(name: str):
    """Batches of several lengths, with nothing of the one before."""
    peer, ours = pair(name)
    optimizers = [torch.optim.SGD(module.parameters(), 0.5) for module in (peer, ours)]
    queries, states = (rows.double() for rows in inputs(name))
    for turn in range(4):
        with torch.set_grad_enabled(turn % 2 == 0):
            # Of the same tensors, too, and of less.
            rows = states if turn < 2 else states.roll(1, 0)
            expected, actual = (PEERS[name].attend(m, queries, rows) for m in (peer, ours))
        assert_same(actual, expected)
        if turn % 2 == 0:
            for results, optimizer in zip((expected, actual), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(results).backward()
                optimizer.step()


class TwoSteps(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name, self.attention = name, take_over(name, rewritten(name)).requires_grad_(False)

    def forward(self, query: Tensor, states: Tensor, mask: Tensor):
        step = begin(self.name, self.attention, states, mask)
        step(query)
        return step(2 * query)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "coqui_window"])
def test_a_trace_is_right_at_other_lengths(name: str):
    module = TwoSteps(name)
    query, states = inputs(name)
    traced = torch.jit.trace(module, (query[:, 0], states, states[..., 0] < 1), check_trace=False)
    query, states = torch.randn(5, QUERY_DIM), torch.randn(5, 40, KEY_DIM)
    mask = torch.arange(40) < torch.tensor([1, 40, 7, 33, 2])[:, None]
    assert_same(traced(query, states, mask), module(query, states, mask))


def test_a_trace_of_a_window_is_refused():
    arguments = (torch.randn(B, QUERY_DIM), torch.randn(B, 7, KEY_DIM), ~IGNORED)
    with pytest.raises(ValueError, match="^windowing: expected False while a graph is recorded"):
        torch.jit.trace(TwoSteps("coqui_window"), arguments)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", NAMES)
def test_copies_between_steps(name: str, mode: Callable, copied: str):
    """Have the parameters, and nothing of the batch; the module itself goes on with its batch."""
    peer, ours = pair(name)
    queries, states = (rows.double() for rows in inputs(name))
    with mode():
        expected, step = (begin(name, m, states, ~IGNORED) for m in (peer, ours))
        assert_same(step(queries[:, 0]), expected(queries[:, 0]))
        other = COPIES[copied](ours)
        assert_same(step(queries[:, 1]), expected(queries[:, 1]))
        first, again = (begin(name, m, -states, ~IGNORED) for m in (peer, other))
        assert_same(again(queries[:, 2]), first(queries[:, 2]))
    assert not any(isinstance(kept, Tensor) for kept in vars(COPIES[copied](ours)).values())


# ---- Single ones ----


@pytest.mark.parametrize("name", NAMES)
def test_everything_masked_gives_zeros(backend: str, name: str):
    """In the weights, and no NaN in a gradient, where a sequence has no keys."""
    peer = rewritten(name)
    module = take_over(name, peer, backend)
    queries, states = inputs(name)
    states.requires_grad_()
    mask = ~IGNORED.to(states.device)
    mask[1] = False
    step = begin(name, module, states, mask)
    steps = [step(query) for query in queries.unbind(1)]
    for _, weights in steps:
        assert (weights[1] == 0).all() and (weights[0].sum() - 1).abs() < 1e-5
    sum(loss_of(results) for results in steps).backward()
    for tensor in (states, *module.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    assert (states.grad[1] == 0).all()


@pytest.mark.parametrize("name", ["coqui_sigmoid", "coqui_forward"])
def test_coqui_everything_masked_gives_zeros(name: str):
    module = take_over(name, rewritten(name))
    queries, states = inputs(name)
    step = begin(name, module, states, torch.zeros_like(IGNORED))
    for query in queries.unbind(1):
        context, weights = step(query)
        assert (context == 0).all() and (weights == 0).all()


@pytest.mark.parametrize("name", ["coqui_window", "coqui_forward_mask"])
def test_coqui_looks_everywhere_in_training(name: str):
    peer, ours = (module.train() for module in pair(name))
    queries, states = (rows.double() for rows in inputs(name))
    assert_same(*(PEERS[name].attend(module, queries, states) for module in (ours, peer)))


@pytest.mark.parametrize("source", ["rewritten", "original"])
def test_coqui_at_the_ends(monkeypatch: pytest.MonkeyPatch, source: str):
    """Where the original's slices, which count from the end, cut elsewhere."""
    peer = rewritten("coqui_forward_mask")
    if source == "original":
        peer = original_of(monkeypatch, "coqui_forward_mask")
    queries, states = torch.randn(3, QUERY_DIM), torch.randn(3, 9, KEY_DIM)
    results = []
    for module in (peer, take_over("coqui_forward_mask", peer)):
        module.init_states(states)
        module.alpha = torch.eye(9)[[8, 0, 7]]
        module.alpha[0, :8] = -0.1  # no weights, but none that is cut goes unseen
        context = module(queries, states, module.preprocess_inputs(states), None)
        results.append((context, module.attention_weights))
    assert_same(*results)


def test_coqui_norm_is_checked():
    module = take_over("coqui", rewritten("coqui"))
    module.norm = "sparsemax"
    with pytest.raises(ValueError, match="^norm: expected 'softmax' or 'sigmoid', got 'sparsemax'"):
        PEERS["coqui"].attend(module, *inputs("coqui"))


def test_coqui_needs_its_states():
    module = take_over("coqui", rewritten("coqui"))
    query, states = (rows[:, :1].squeeze(1) for rows in inputs("coqui"))
    with pytest.raises(RuntimeError, match="init_states must be called before the first step"):
        module(query, states.unsqueeze(1), module.preprocess_inputs(states.unsqueeze(1)), None)


@pytest.mark.parametrize("source", ["rewritten", "original"])
def test_espnet_monotonic_constraint(backend: str, monkeypatch: pytest.MonkeyPatch, source: str):
    """Each step near where the one before attended most, of one sequence."""
    peer = rewritten("espnet_location")
    if source == "original":
        peer = original_of(monkeypatch, "espnet_location")
    ours = take_over("espnet_location", peer, backend)
    queries, states = torch.randn(1, 6, QUERY_DIM), torch.randn(1, 30, KEY_DIM)

    def decode(module: nn.Module, queries: Tensor, states: Tensor):
        module.reset()
        weights, last, steps = None, 0, []
        for window, query in enumerate(queries.unbind(1), start=1):
            context, weights = module(states, [30], query, weights, 1.0, last, window // 3, window)
            last = int(weights.argmax())
            steps.append((context, weights))
        return tuple(torch.stack(column, 1) for column in zip(*steps))

    assert_parity(decode, ours, peer, queries, states)
    ours.reset()
    for result in ours(states, [3], queries[:, 0], None, 2.0, 10):  # no key is both real and near
        assert (result == 0).all()
    for arguments, name in (
        ((states.expand(2, -1, -1), [30, 30], queries[:, 0].expand(2, -1), None, 2.0, 0), "enc_hs"),
        ((states, [30], queries[:, 0], None, 2.0, -1), "last_attended_idx"),
    ):
        ours.reset()
        with pytest.raises(ValueError, match=f"^{name}.*: expected"):
            ours(*arguments)


@pytest.mark.parametrize("name", ["espnet_location", "espnet_coverage"])
def test_espnet_hierarchical_mode(name: str):
    """New states in every step."""
    peer, ours = pair(name)
    ours.han_mode = peer.han_mode = True
    results = []
    for module in (peer, ours):
        torch.manual_seed(1)
        query, *several = (torch.randn(B, *shape).double() for shape in ((12,), (7, 18), (7, 18)))
        for states in several:
            context, weights = module(states, [7, 7, 2], query, None)
            results += [context, *([weights] if isinstance(weights, Tensor) else weights)]
    assert_same(tuple(results[len(results) // 2 :]), tuple(results[: len(results) // 2]))


def test_espnet_first_coverage(monkeypatch: pytest.MonkeyPatch):
    """Uniform weights of its own, in the list that grows."""
    peer = original_of(monkeypatch, "espnet_coverage")
    queries, states = inputs("espnet_coverage")
    results = []
    for module in (peer, take_over("espnet_coverage", peer)):
        first, earlier = module(states, LENGTH_LIST, queries[:, 0], None)
        second, later = module(states, LENGTH_LIST, queries[:, 1], earlier)
        assert later is earlier and len(later) == 3
        results.append((first, second, *later))
    assert_same(*results)


@pytest.mark.parametrize("name", ["speechbrain_content", "espnet_location", "coqui_window"])
def test_nan_in_padding(name: str):
    """Also where weights are computed apart from contexts: by a hooked softmax, or in windows."""
    module = take_over(name, rewritten(name)).eval()
    queries, states = inputs(name)
    if name == "speechbrain_content":
        module.softmax.register_forward_hook(lambda *_: None)
    mask = torch.arange(states.size(1)) < torch.tensor([4])
    states = states[:1].masked_fill(~mask.unsqueeze(-1), torch.nan)
    if name == "espnet_location":
        module.reset()
        context, _ = module(states, [4], queries[:1, 0], None, last_attended_idx=2)
    else:
        context, _ = begin(name, module, states, mask.expand(1, -1))(queries[:1, 0])
    assert context.isfinite().all()
