"""``attn_ext.additive_pool`` and gated scores of keys alone, on every backend."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import BACKEND_DEVICES, assert_within_budget, require_backend
from layouts import ONE_STEP_LAYOUTS, Inputs, make_inputs, nest
from parameters import DTYPES, dtype_id, named
from test_ops import Recorder, run_opcheck
from torch import Tensor
from yardstick import compute_dtype, exact_tanh, worst

from attn_ext import additive_pool, additive_scores, ops
from attn_ext.reference import draw_seed, dropout_keep_mask, feature_keep_mask

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Bags:
    """One call: its tensors, and which of their rows are in which bag."""

    of: Inputs  # key, value, score_weight and where their rows are, as for one query a sequence
    leaves: dict[str, Tensor]  # key, value, score_weight and, where there is one, gate
    feature_dropout: tuple[float, float] = (0.0, 0.0)
    dropout: float = 0.0

    @property
    def keywords(self) -> dict[str, object]:
        return self.of.keywords

    def arguments(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the call, made nested where the layout is."""
        if self.of.offsets_k is None:
            return leaves
        return {
            name: leaf if name == "score_weight" else nest(leaf, self.of.offsets_k)
            for name, leaf in leaves.items()
        }


def make_bags(
    layout: str = "jagged_one_step",
    *,
    branches: int | None = None,
    gated: bool = True,
    gate_scale: float | None = None,
    gate_shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Bags:
    """Random bags. Rows of nobody are NaN in all tensors; there are empty bags."""
    of = make_inputs(layout, scale=scale, dtype=dtype, **options)
    leaves = {name: of.leaves[name] for name in ("key", "value", "score_weight")}
    if branches is not None:
        rows = torch.randn(branches, leaves["key"].size(-1)) * leaves["key"].size(-1) ** -0.5
        leaves["score_weight"] = rows.to(dtype)
    if gated:
        gate = torch.randn(leaves["key"].shape) * (scale if gate_scale is None else gate_scale)
        gate = (gate + gate_shift).to(dtype)
        leaves["gate"] = gate.masked_fill(leaves["key"].isnan(), torch.nan)
    return Bags(of, leaves)


class ExactSigmoid(torch.autograd.Function):
    """Whose slope stays exact where 1 - sigmoid cancels."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sigmoid()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid() * (-x).sigmoid()


def formula(
    bags: Bags,
    leaves: dict[str, Tensor],
    exact: bool = False,
    reverse: bool = False,
    raw: bool = False,
) -> Results:
    """Pooling by the formulas of the paper, a bag at a time; masks from the seed of the call."""
    if raw:
        leaves = {name: leaf.to(compute_dtype(leaf.dtype)) for name, leaf in leaves.items()}
    tanh, sigmoid = (exact_tanh, ExactSigmoid.apply) if exact else (torch.tanh, torch.sigmoid)
    key, value, rows = leaves["key"], leaves["value"], leaves["score_weight"]
    if reverse:
        key, rows = key.flip(-1), rows.flip(-1)
    has_branches = rows.dim() == 2
    rows = rows if has_branches else rows.unsqueeze(0)
    batch, places = len(bags.of.key_rows), bags.of.max_seqlen_k
    seed = draw_seed(key.device) if bags.dropout or any(bags.feature_dropout) else None
    context = value.new_zeros(batch, len(rows), value.size(-1))
    dense = value.new_full((batch, len(rows), places), -torch.inf if raw else 0)
    by_key = value.new_full((*key.shape[:-1], len(rows)), -torch.inf if raw else 0)
    for b, row in enumerate(bags.of.key_rows):
        columns = bags.of.columns[b]
        hidden = tanh(key[row])
        if "gate" in leaves:
            gate = leaves["gate"][row]
            hidden = hidden * sigmoid(gate.flip(-1) if reverse else gate)
        for factor, p in enumerate(bags.feature_dropout):
            if p:
                shape = torch.Size((batch, places, 1, key.size(-1)))
                keep = feature_keep_mask(seed, p, shape, factor)[b, columns, 0]
                hidden = hidden * (keep.flip(-1) if reverse else keep) / (1 - p)
        scores = (hidden.unsqueeze(1) * rows).sum(-1)  # [Tk, K]
        alpha = scores if raw else scores.softmax(0).to(value.dtype)
        if bags.dropout:
            shape = torch.Size((batch, 1, len(rows), places))
            keep = dropout_keep_mask(seed, bags.dropout, shape)[b, 0, :, columns].T
            alpha = alpha * keep / (1 - bags.dropout)
        order = -1 if reverse else 1
        summed = range(len(columns))[::order]
        context[b] = alpha[summed].T @ value[row][summed]
        dense[b, :, columns] = alpha.T
        by_key[row] = alpha
    weights = by_key if bags.of.weights_are_jagged else dense
    if not has_branches:
        context = context.squeeze(1)
        weights = weights.squeeze(-1 if bags.of.weights_are_jagged else 1)
    return {"weights": weights} if raw else {"context": context, "weights": weights}


def run(
    function: Callable[[dict[str, Tensor]], Results],
    leaves: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Results:
    """Results and gradients, what comes in being cosines of positions; -inf has no gradient."""
    torch.manual_seed(5)
    leaves = {n: t.detach().to(dtype or t.dtype, copy=True) for n, t in leaves.items()}
    results = function({name: leaf.requires_grad_() for name, leaf in leaves.items()})
    roots, incoming = [], []
    for shift, result in enumerate(results.values()):
        cosines = torch.arange(result.numel(), dtype=torch.float64).add(shift).cos()
        roots.append(result)
        incoming.append(cosines.view(result.shape).to(result.dtype))
    torch.autograd.backward(roots, incoming)
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    found = {name: result.detach() for name, result in results.items()}
    return {name: t.masked_fill(t == -torch.inf, 0) for name, t in (found | gradients).items()}


def check(bags: Bags, backend: str) -> Results:
    """Compare results and gradients of :func:`additive_pool` with the float64 yardstick."""

    def pool(leaves: dict[str, Tensor]) -> Results:
        context, weights = additive_pool(
            **bags.arguments(leaves),
            feature_dropout_p=bags.feature_dropout if "gate" in leaves else bags.feature_dropout[0],
            dropout_p=bags.dropout,
            need_weights=True,
            backend=backend,
            **bags.keywords,
        )
        return {"context": context, "weights": weights}

    return compare(bags, pool, raw=False)


def check_scores(bags: Bags, backend: str) -> None:
    """The same of scores."""

    def scores(leaves: dict[str, Tensor]) -> Results:
        arguments = bags.arguments(leaves)
        del arguments["value"]
        found = additive_scores(
            None,
            **arguments,
            feature_dropout_p=bags.feature_dropout if "gate" in leaves else bags.feature_dropout[0],
            backend=backend,
            **bags.keywords,
        )
        assert torch.equal(found == -torch.inf, absent), "-inf elsewhere than for absent keys"
        return {"weights": found}

    absent = formula(bags, bags.leaves, raw=True)["weights"] == -torch.inf
    compare(bags, scores, raw=True)


def compare(bags: Bags, function: Callable[[dict[str, Tensor]], Results], raw: bool) -> Results:
    by_formula = functools.partial(formula, bags, raw=raw)
    actual = run(function, bags.leaves)
    exact = run(functools.partial(by_formula, exact=True), bags.leaves, torch.float64)
    eager = (
        run(by_formula, bags.leaves),
        run(functools.partial(by_formula, reverse=True), bags.leaves),
    )
    largest = worst(exact, *eager)
    owned = bags.of.owned("key", bags.of.key_rows)
    for name, result in actual.items():
        dtype = bags.leaves["key"].dtype
        assert result.dtype == (compute_dtype(dtype) if raw and name == "weights" else dtype), name
        assert_within_budget(name, result, exact[name], largest[name])
        if name in ("dkey", "dvalue", "dgate"):
            assert (result[~owned] == 0).all(), f"{name}: rows of nobody are not exactly 0"
        if name in ("context", "weights"):
            assert (result[exact[name] == 0] == 0).all(), f"{name}: not exactly 0 of empty bags"
    return actual


GATED = pytest.mark.parametrize("gated", [False, True], ids=named("gated"))
BRANCHES = pytest.mark.parametrize("branches", [None, 1, 3], ids=named("branches"))


@pytest.mark.every_isa
@GATED
@BRANCHES
@pytest.mark.parametrize("layout", ONE_STEP_LAYOUTS)
def test_layouts(backend: str, layout: str, branches: int | None, gated: bool):
    """Results, gradients, zeros of empty bags, and NaN in padding that nobody notices."""
    check(make_bags(layout, branches=branches, gated=gated, features=20), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("strides", ["contiguous", "sliced"])
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_dtypes_and_strides(backend: str, layout: str, strides: str, dtype: torch.dtype):
    check(make_bags(layout, branches=2, dtype=dtype, features=37, strides=strides), backend)


@pytest.mark.every_isa
def test_features_beyond_the_last_are_0(backend: str):
    """Whatever an earlier call left in the memory that rows are padded in."""
    additive_scores(None, torch.full((1, 8, 96), torch.nan), torch.ones(3, 96), backend=backend)
    check(make_bags(features=33, branches=3), backend)


@pytest.mark.every_isa
@GATED
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 30.0, 1e4], ids=named("scale"))
def test_magnitudes(backend: str, scale: float, gated: bool):
    check(make_bags(scale=scale, gated=gated, features=70), backend)
    check_scores(make_bags(scale=scale, gated=gated, features=70), backend)


@pytest.mark.every_isa
@pytest.mark.parametrize("gate_shift", [-1e4, -100.0, -90.0, -20.0, 30.0, 1e4], ids=named("gate"))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3], ids=named("scale"))
def test_closed_and_open_gates(backend: str, scale: float, gate_shift: float):
    """Hidden rows down to subnormal ones, and gates of which the plain exponential overflows."""
    bags = make_bags(scale=scale, gate_scale=1.0, gate_shift=gate_shift, features=70)
    check(bags, backend)
    check_scores(bags, backend)


@pytest.mark.every_isa
@GATED
def test_saturated_keys_get_no_gradient(backend: str, gated: bool):
    """Of which 1 - tanh^2 is 0 even in double precision: neither do all of them together."""
    key = torch.full((2, 5, 16), 25.0, requires_grad=True)
    gate = torch.randn(2, 5, 16) if gated else None
    weight = torch.randn(16)
    additive_pool(key, torch.randn(2, 5, 3), weight, gate=gate, backend=backend).sum().backward()
    assert not key.grad.any()


@pytest.mark.every_isa
@pytest.mark.parametrize("branches", [None, 5], ids=named("branches"))
@pytest.mark.parametrize("layout", ["one_step_lengths", "jagged_one_step"])
def test_long_bags(backend: str, layout: str, branches: int | None):
    """Which are shared out among workers, joined again, and more than one wave of backward."""
    interpreted = BACKEND_DEVICES[backend] == "cpu" and backend == "triton"
    lengths = (150, 0, 70, 1) if interpreted else (3000, 0, 700, 1)  # segments are of 64
    check(make_bags(layout, branches=branches, lengths_k=lengths, features=130), backend)


@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_many_branches(backend: str, layout: str):
    """More than a program has at a time, and not a multiple of it; with dropout, by branch."""
    bags = make_bags(layout, branches=11, features=20, lengths_k=(7, 0))
    check(replace(bags, dropout=0.3), backend)


@pytest.mark.large
@pytest.mark.parametrize("backend", ["cpu"])
def test_a_bag_of_100_000(backend: str):
    require_backend(backend)
    check(make_bags(lengths_k=(100_000, 2), features=8), backend)


@pytest.mark.every_isa
@pytest.mark.parametrize("features", [256, 250], ids=["lines", "parts_of_lines"])
def test_gradients_larger_than_caches(features: int):
    """Those written past the caches are those of each bag alone, which are not."""
    require_backend("cpu")
    # Of both bags 4.5 million numbers of keys and values, kSmallestStreamed being 4.2 million.
    rows, weight = 4_500, torch.randn(features) / 16
    leaves = [torch.randn(2 * rows, features, requires_grad=True) for _ in "kvg"]

    def gradients(leaves: list[Tensor], offsets: list[int]) -> tuple[Tensor, ...]:
        key, value, gate = leaves
        cu_seqlens_k = torch.tensor(offsets)
        context = additive_pool(
            key, value, weight, gate=gate, cu_seqlens_k=cu_seqlens_k, backend="cpu"
        )
        return torch.autograd.grad(context.square().sum(), leaves)

    together = gradients(leaves, [0, rows, 2 * rows])
    for bag in range(2):
        of_bag = slice(bag * rows, (bag + 1) * rows)
        alone = gradients([leaf[of_bag] for leaf in leaves], [0, rows])
        for ours, expected in zip(together, alone):
            assert torch.equal(ours[of_bag], expected)


@pytest.mark.every_isa
@BRANCHES
@pytest.mark.parametrize("layout", ONE_STEP_LAYOUTS)
def test_gated_scores(backend: str, layout: str, branches: int | None):
    check_scores(make_bags(layout, branches=branches, features=20), backend)


def test_gated_scores_of_heads(backend: str):
    """Keys and gates with an axis of heads: as one call a head."""
    key, gate, weight = torch.randn(2, 2, 5, 3, 20).unbind(0) + (torch.randn(3, 20),)
    scores = additive_scores(None, key, weight, gate=gate, backend=backend)
    each = [
        additive_scores(None, key[:, :, h], weight[h], gate=gate[:, :, h], backend=backend)
        for h in range(3)
    ]
    torch.testing.assert_close(scores, torch.stack(each, 1))


@pytest.mark.every_isa
@pytest.mark.parametrize(
    ("feature_dropout", "dropout"),
    [((0.3, 0.0), 0.0), ((0.0, 0.4), 0.0), ((0.2, 0.5), 0.3)],
    ids=["hidden", "gate", "all_three"],
)
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_dropout(backend: str, layout: str, feature_dropout: tuple[float, float], dropout: float):
    """For the masks that the seed stands for, on every backend the same."""
    bags = make_bags(layout, branches=2, features=22)
    check(replace(bags, feature_dropout=feature_dropout, dropout=dropout), backend)


@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_dropout_of_scores(backend: str, layout: str, gated: bool):
    """The same masks, without a softmax."""
    bags = make_bags(layout, branches=2, features=22, gated=gated)
    check_scores(replace(bags, feature_dropout=(0.3, 0.4 * gated)), backend)


def test_dropout_of_all_features(backend: str):
    """Scores are 0 then, as of weights that are."""
    bags = make_bags()
    pool = functools.partial(additive_pool, **bags.leaves, backend=backend, **bags.keywords)
    expected = pool(score_weight=torch.zeros(16))
    torch.testing.assert_close(pool(feature_dropout_p=1.0), expected)


def test_one_probability_is_that_of_the_product():
    """A mask on tanh * sigmoid is one on the tanh; without a gate there is nothing else."""
    key, value, weight = torch.randn(2, 9, 16), torch.randn(2, 9, 3), torch.randn(16)
    for gate in (None, torch.randn(2, 9, 16)):
        torch.manual_seed(3)
        found = additive_pool(key, value, weight, gate=gate, feature_dropout_p=0.4)
        torch.manual_seed(3)
        keep = feature_keep_mask(draw_seed(key.device), 0.4, torch.Size((2, 9, 1, 16)))
        hidden = key.tanh() * (1 if gate is None else gate.sigmoid()) * keep.squeeze(2) / 0.6
        expected = torch.einsum("bk,bkv->bv", (hidden @ weight).softmax(-1), value)
        torch.testing.assert_close(found, expected)


def test_masks_of_features_are_random_and_their_own():
    """As many as the probability says, independent along axes, of each other and of weights'."""
    seed, shape = torch.tensor([2**40 + 5]), torch.Size((3, 40, 1, 64))
    of_tanh, of_gate = (feature_keep_mask(seed, 0.5, shape, factor) for factor in (0, 1))
    of_weights = dropout_keep_mask(seed, 0.5, torch.Size((3, 1, 64, 40))).permute(0, 3, 1, 2)
    pairs = [(of_tanh, of_gate), (of_tanh, of_weights), (of_gate, of_weights)]
    pairs += [(of_tanh, of_tanh.roll(1, axis)) for axis in (0, 1, 3)]
    for one, other in pairs:
        share = (one == other).double().mean()
        assert abs(share - 0.5) < 5 * 0.5 * shape.numel() ** -0.5
    assert abs(of_tanh.double().mean() - 0.5) < 5 * 0.5 * shape.numel() ** -0.5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["one_step_mask", "jagged_one_step"])
def test_gradcheck(backend: str, layout: str):
    """With dropout of features; on the reference second derivatives too."""
    require_backend(backend)
    small = {"features": 5, "value_features": 2, "lengths_k": (3, 0, 2)}
    bags = make_bags(layout, branches=2, dtype=torch.float64, poison=False, **small)
    names, leaves = zip(*((n, leaf.requires_grad_()) for n, leaf in bags.leaves.items()))

    def pool(*leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        options = {"feature_dropout_p": (0.3, 0.3), "need_weights": True, "backend": backend}
        return additive_pool(**dict(zip(names, leaves)), **options, **bags.keywords)

    assert torch.autograd.gradcheck(pool, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(pool, leaves, fast_mode=True)
        return
    (gradient,) = torch.autograd.grad(pool(*leaves)[0].sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="not itself differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", ["key", "gate", "value", "score_weight"])
def test_only_gradients_asked_for(backend: str, wanted: str):
    """Each alone is what it is among all."""
    bags = make_bags(branches=2, poison=False)

    def gradient(*required: str) -> Tensor:
        leaves = {n: t.detach().requires_grad_(n in required) for n, t in bags.leaves.items()}
        additive_pool(**leaves, backend=backend, **bags.keywords).cos().sum().backward()
        return leaves[wanted].grad

    assert torch.equal(gradient(wanted), gradient(*bags.leaves))


def test_nothing_of_size_keys_times_features_is_kept():
    require_backend("cpu")
    bags = make_bags(branches=2, features=64, poison=False)
    leaves = {name: leaf.requires_grad_() for name, leaf in bags.leaves.items()}
    given = {leaf.data_ptr() for leaf in leaves.values()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given and tensor.is_floating_point():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        additive_pool(**leaves, backend="cpu", **bags.keywords)
    rows, bags_of = len(leaves["key"]), len(bags.of.key_rows)
    assert sorted(kept) == sorted([2 * rows, 2 * 2 * bags_of])  # scores, statistics


@pytest.mark.parametrize(
    ("layout", "gated"),
    [("one_step_mask", True), ("jagged_one_step", False), ("jagged_one_step", True)],
)
def test_opcheck(layout: str, gated: bool):
    require_backend("cpu")
    drops = gated
    bags = make_bags(layout, branches=2, gated=gated, poison=False)
    leaves = {name: leaf.requires_grad_() for name, leaf in bags.leaves.items()}
    options = {"need_weights": True, "dropout_p": 0.3 * drops, "feature_dropout_p": 0.3 * drops}
    with Recorder() as recorder:
        context, weights = additive_pool(**leaves, **options, backend="cpu", **bags.keywords)
        (context.square().sum() + weights.square().sum()).backward()
    assert [op for op, _ in recorder.calls] == [ops.pool_forward, ops.pool_backward]
    for op, arguments in recorder.calls:
        run_opcheck(op, arguments, requires_grad=op is ops.pool_forward)


def test_compile_vmap_and_traces():
    """vmap makes heads of its calls, or with dropout one call after the other."""
    require_backend("cpu")
    key, gate, value = torch.randn(3, 3, 2, 5, 6).unbind(0)
    weight = torch.randn(4, 6)
    pool = functools.partial(additive_pool, need_weights=True, backend="cpu")

    def gated(key: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return pool(key, key, weight, gate=gate)

    expected = [torch.stack(r) for r in zip(*(gated(k, g, weight) for k, g in zip(key, gate)))]
    torch.testing.assert_close(torch.vmap(gated, (0, 0, None))(key, gate, weight), tuple(expected))
    loss = torch.func.grad(lambda *leaves: gated(*leaves)[0].sum(), (0, 1, 2))
    gradients = [torch.stack(r) for r in zip(*(loss(k, g, weight) for k, g in zip(key, gate)))]
    mapped = torch.vmap(loss, (0, 0, None))(key, gate, weight)
    torch.testing.assert_close(mapped, tuple(gradients))
    dropping = torch.vmap(
        lambda k: pool(k, k, weight, feature_dropout_p=0.5), randomness="different"
    )
    assert dropping(key)[0].shape == (3, 2, 4, 6)

    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    leaves = [leaf.clone().requires_grad_() for leaf in (key[0], gate[0], weight)]
    results = [function(*leaves)[0] for function in (compiled, gated)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r.cos().sum(), leaves) for r in results))

    traced = torch.jit.trace(gated, (key[0], gate[0], weight))
    longer = torch.randn(2, 3, 9, 6).unbind(0)
    torch.testing.assert_close(traced(*longer, weight), gated(*longer, weight))


def test_autocast_and_determinism():
    key, gate, value, weight = (*torch.randn(3, 2, 700, 8).unbind(0), torch.randn(8))
    with torch.autocast("cpu", torch.bfloat16):
        context = additive_pool(key, value, weight, gate=gate)
        with pytest.raises(TypeError, match="gate: expected dtype torch.bfloat16"):
            additive_pool(key, value, weight, gate=gate.double())
    assert context.dtype == torch.bfloat16
    expected = additive_pool(key, value, weight, gate=gate)
    torch.testing.assert_close(context.float(), expected, rtol=0.02, atol=0.02)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(additive_pool(key, value, weight, gate=gate), expected)
    finally:
        torch.set_num_threads(threads)


def nested(*lengths: int) -> Tensor:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return nest(torch.randn(sum(lengths), 4), offsets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": [1.0]}, "key: expected a torch.Tensor"),
        ({"key": torch.randn(2, 3, 2, 4)}, r"key: expected shape \(B, Tk, D\) without"),
        ({"value": None}, "value: expected a torch.Tensor"),
        ({"value": torch.randn(2, 2, 5)}, "value: expected shape"),
        ({"value": nested(1, 2)}, "value: expected a dense tensor, as key is"),
        ({"score_weight": torch.randn(5)}, "score_weight: expected shape"),
        ({"score_weight": torch.randn(2, 5)}, r"score_weight: expected shape \(K, 4\)"),
        ({"score_weight": torch.randn(1, 2, 4)}, r"score_weight: expected shape \(D,\) or"),
        ({"score_weight": torch.randn(4).double()}, "score_weight: expected a dtype"),
        ({"gate": torch.randn(2, 3, 5)}, r"gate: expected shape \(2, 3, 4\), as key"),
        ({"gate": torch.randn(2, 3, 4).half()}, "gate: expected dtype torch.float32, as key"),
        ({"gate": torch.randn(2, 3, 4, device="meta")}, "gate: expected device cpu, as key"),
        ({"gate": nested(1, 2)}, "gate: expected a dense tensor, as key is"),
        (
            {"key": nested(3, 1), "value": nested(3, 1), "gate": nested(1, 3)},
            "gate: expected a nes",
        ),
        ({"gate": True}, "gate: expected a torch.Tensor"),
        ({"key_lengths": torch.tensor([4, 1])}, "key_lengths: expected"),
        ({"feature_dropout_p": 1.5}, "feature_dropout_p: expected a probability"),
        ({"feature_dropout_p": "a"}, "feature_dropout_p: expected a float"),
        ({"feature_dropout_p": (0.1, 0.2, 0.3)}, "feature_dropout_p: expected a prob.* or a pair"),
        ({"feature_dropout_p": (0.1, 0.2), "gate": None}, "feature_dropout_p: expected one prob"),
        ({"dropout_p": -1.0}, "dropout_p: expected a probability"),
        ({"need_weights": 1}, "need_weights: expected a bool"),
        ({"backend": "gpu"}, "backend: expected None or one of"),
    ],
)
def test_wrong_calls(changes: dict, message: str):
    arguments = {
        "key": torch.randn(2, 3, 4),
        "value": torch.randn(2, 3, 5),
        "score_weight": torch.randn(4),
        "gate": torch.randn(2, 3, 4),
        **changes,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        additive_pool(**arguments)


def test_wrong_gates_of_scores():
    query, key, gate, weight = *torch.randn(3, 2, 4).unbind(0), torch.randn(4)
    with pytest.raises(ValueError, match="gate: expected None with a query"):
        additive_scores(query, key.unsqueeze(1), weight, gate=gate.unsqueeze(1))
    with pytest.raises(ValueError, match="feature_dropout_p: expected 0.0 with a query, got 0.5"):
        additive_scores(query, key.unsqueeze(1), weight, feature_dropout_p=0.5)
    with pytest.raises(ValueError, match="feature_dropout_p: expected a probability"):
        additive_scores(None, key.unsqueeze(1), weight, feature_dropout_p=1.5)


def test_scores_that_were_not_kept_are_computed_again(backend: str):
    """By the backward op of Triton and the CPU, as of one that kept them."""
    key, gate, value = torch.randn(3, 2, 70, 1, 12).unbind(0)
    inputs = (key, value, torch.randn(1, 2, 12), gate)
    rest = (None, None, None, 70, 0.0, 0.0, 0.0, None, 0)
    context, _, stats, kept = ops.pool_forward(*inputs, *rest, True, False, backend)
    backward = functools.partial(ops.pool_backward, context.cos(), None, *inputs, stats)
    found, expected = (
        backward(scores, *rest, 30, False, backend) for scores in (kept.new_empty(0), kept)
    )
    torch.testing.assert_close(found, expected)
