"""``attn_ext.additive_scores``: scores before the softmax, on every backend."""

import functools

import pytest
import torch
from helpers import BACKEND_DEVICES, assert_within_budget, check_scores, require_backend
from layouts import LAYOUTS, MIXED_LAYOUTS, ONE_STEP_LAYOUTS, make_inputs, offsets_of
from parameters import DTYPES, dtype_id, named
from torch import Tensor

import attn_ext
from attn_ext import additive_scores


@pytest.mark.every_isa
@pytest.mark.parametrize("heads", [None, 3], ids=named("heads"))
@pytest.mark.parametrize("layout", [*LAYOUTS, *MIXED_LAYOUTS])
def test_layouts(backend: str, layout: str, heads: int | None):
    """The same shapes as weights have; keys that are ignored or not there score -inf."""
    check_scores(make_inputs(layout, heads=heads), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ["padded_mask", "jagged_one_step"])
def test_dtypes(backend: str, layout: str, dtype: torch.dtype):
    """Scores of 16-bit floats are float32, and as exact."""
    check_scores(make_inputs(layout, dtype=dtype, features=40), backend)


@pytest.mark.every_isa
@pytest.mark.parametrize("scale", [1e-4, 0.1, 30.0, 1e4], ids=named("scale"))
@pytest.mark.parametrize("layout", ["padded_lengths", "one_step_mask"])
def test_magnitudes(backend: str, layout: str, scale: float):
    check_scores(make_inputs(layout, features=70, scale=scale), backend)


@pytest.mark.parametrize("scale", [0.1, 0.3], ids=named("scale"))
@pytest.mark.parametrize("layout", ["padded", "one_step"])
def test_small_scores_of_many_features(backend: str, layout: str, scale: float):
    """A softmax would forgive the factored form's absolute error; who gets the scores does not."""
    lengths = {"lengths_q": (2, 2), "lengths_k": (9, 9)}
    check_scores(make_inputs(layout, features=1000, scale=scale, poison=False, **lengths), backend)


@pytest.mark.every_isa
def test_gradients_that_nearly_sum_to_0(backend: str):
    """Behind a softmax they sum to 0, and what is left is rounding; here it is what was meant."""
    inputs = make_inputs("padded", lengths_q=(5, 5), lengths_k=(40, 40), features=33, scale=1e-3)
    incoming = torch.randn(2, 5, 40)
    incoming += 1e-4 * incoming.abs().mean(-1, keepdim=True) - incoming.mean(-1, keepdim=True)
    check_scores(inputs, backend, incoming=incoming)


@pytest.mark.parametrize("layout", ["padded", "one_step_mask", "jagged", "jagged_one_step"])
def test_long_keys(backend: str, layout: str):
    """Which attention shares out among programs or workers, and joins again."""
    lengths_q = (2, 1) if layout in ("padded", "jagged") else (1, 1)
    if layout == "padded":
        lengths_q = (2, 2)
    interpreted = BACKEND_DEVICES[backend] == "cpu" and backend == "triton"
    lengths_k = (150 if interpreted else 1500, 3)  # segments are of 64
    inputs = make_inputs(layout, lengths_q=lengths_q, lengths_k=lengths_k, features=8)
    check_scores(inputs, backend)


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ONE_STEP_LAYOUTS)
def test_keys_alone(backend: str, layout: str, heads: int | None):
    check_scores(make_inputs(layout, heads=heads), backend, alone=True)


@pytest.mark.parametrize("jagged", [False, True], ids=["padded", "jagged"])
def test_several_scores_of_the_same_keys(backend: str, jagged: bool):
    """Score weights (K, D) beside keys that have no axis of heads."""
    keywords: dict[str, Tensor] = {}
    key, weight = torch.randn(2, 9, 20), torch.randn(4, 20)
    if jagged:
        key, keywords = key.flatten(0, 1), {"cu_seqlens_k": offsets_of((5, 0, 13))}

    def run(backend: str, key: Tensor, weight: Tensor, apart: bool) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (key, weight)]
        score = functools.partial(additive_scores, None, leaves[0], backend=backend, **keywords)
        if apart:
            scores = torch.stack([score(row) for row in leaves[1]], 1)
        else:
            scores = score(leaves[1])
        scores.cos().sum().backward()
        return [scores.detach(), *(leaf.grad for leaf in leaves)]

    exact = run("reference", key.double(), weight.double(), apart=True)
    eager = run("reference", key, weight, apart=True)
    actual = run(backend, key, weight, apart=False)
    for name, *results in zip(("scores", "dkey", "dscore_weight"), actual, exact, eager):
        assert_within_budget(name, *results)


def test_log_likelihood_of_a_pointer(backend: str):
    """Finite, with the right gradient, where the weight of the target underflows to 0."""
    query, key, weight = torch.zeros(1, 1), torch.tensor([[[2.0], [-2.0], [1.9]]]), torch.ones(1)
    assert additive_scores(query, key, 150 * weight, backend=backend).softmax(-1)[0, 1] == 0

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.detach().to(dtype, copy=True) for leaf in (query, key, 150 * weight)]
        scores = additive_scores(*(leaf.requires_grad_() for leaf in leaves), backend=backend)
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor([1]))
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    runs = (
        run(backend, torch.float32),
        run("reference", torch.float64),
        run("reference", query.dtype),
    )
    for name, *results in zip(("loss", "dquery", "dkey", "dscore_weight"), *runs):
        assert_within_budget(name, *results)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["padded_mask", "jagged_one_step"])
def test_gradcheck(backend: str, layout: str):
    require_backend(backend)
    inputs = make_inputs(layout, features=5, dtype=torch.float64, poison=False)
    query, key, _, weight = (leaf.requires_grad_() for leaf in inputs.leaves.values())

    def scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        result = additive_scores(query, key, weight, backend=backend, **inputs.keywords)
        return result.masked_fill(result == -torch.inf, 0)

    assert torch.autograd.gradcheck(scores, (query, key, weight))


def test_scores_are_those_of_attention(backend: str):
    """Their softmax gives the weights."""
    inputs = make_inputs("padded_mask", features=64)
    query, key, value, weight = inputs.leaves.values()
    options = {**inputs.keywords, "backend": backend}
    _, weights = attn_ext.additive_attention(
        query, key, value, weight, need_weights=True, **options
    )
    scores = additive_scores(query, key, weight, **options)
    expected = scores.softmax(-1).nan_to_num(0)  # of sequences without keys
    torch.testing.assert_close(weights, expected)


def test_vmap_compile_and_fake_tensors():
    """The op of attention serves scores too, so one case of each tells whether all is passed on."""
    require_backend("cpu")
    query, key, weight = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 5, 6), torch.randn(6)
    score = functools.partial(additive_scores, backend="cpu")
    expected = torch.stack([score(q, k, weight) for q, k in zip(query, key)])
    torch.testing.assert_close(torch.vmap(score, (0, 0, None))(query, key, weight), expected)
    for arguments in ((query[0], key[0].bfloat16().float(), weight), (None, key[0], weight)):
        leaves = [None if a is None else a.clone().requires_grad_() for a in arguments]
        compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*leaves), score(*leaves)
        torch.testing.assert_close(found, expected)
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradients = (torch.autograd.grad(r.sum(), wanted) for r in (found, expected))
        torch.testing.assert_close(*gradients)
    low = key[0].bfloat16()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert score(None, low, weight.bfloat16()).dtype == torch.float32


def test_autocast():
    device = next(iter(BACKEND_DEVICES.values()))
    query, key, weight = (torch.randn(s, device=device) for s in ((2, 4), (2, 3, 4), (4,)))
    with torch.autocast(device, torch.bfloat16):
        scores = additive_scores(query, key, weight)
        of_keys = additive_scores(None, key, weight)
    assert scores.dtype == of_keys.dtype == torch.float32
    torch.testing.assert_close(scores, additive_scores(query, key, weight), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(2, 5)}, "query: expected last axes"),
        ({"score_weight": torch.randn(2, 4)}, "key: expected shape"),
        ({"key": [1.0]}, "key: expected a torch.Tensor"),
        ({"query": None, "max_seqlen_q": 3}, "max_seqlen_q: expected None without a query"),
        ({"query": None, "score_weight": torch.randn(2, 5)}, "score_weight: expected shape"),
        ({"key_lengths": torch.tensor([4, 1])}, "key_lengths: expected"),
        ({"backend": "gpu"}, "backend: expected"),
    ],
)
def test_wrong_calls(changes: dict, message: str):
    arguments = {
        "query": torch.randn(2, 4),
        "key": torch.randn(2, 3, 4),
        "score_weight": torch.randn(4),
        **changes,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        additive_scores(**arguments)
