"""What only the Triton kernels have: their routes by size.

Run by ``make test`` in Triton's interpreter (TRITON_INTERPRET=1), and on a GPU by ``make gpu``.
"""

import importlib
import itertools

import pytest
import torch
from helpers import BACKEND_DEVICES, check, require_backend
from layouts import Inputs, make_inputs
from torch import Tensor

import attn_ext

if "triton" not in BACKEND_DEVICES:
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
configurations = pytest.importorskip("attn_ext.triton_kernels.configurations")
rows = pytest.importorskip("attn_ext.triton_kernels.rows")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

DEVICE = BACKEND_DEVICES["triton"]
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

# More keys than a segment holds, beside sequences without keys or queries; and a few tiles of the
# interpreter's size.
LONG = {"lengths_q": (3, 0, 2, 9), "lengths_k": (70, 4, 0, 33)}
TILES = {"lengths_q": (3, 0, 2, 9), "lengths_k": (20, 4, 0, 13)}


@triton.jit
def dealt_kernel(places_ptr, count, processors):
    tl.store(places_ptr + tl.program_id(0), rows.dealt(tl.program_id(0), count, processors))


@pytest.fixture(autouse=True)
def on_device():
    require_backend("triton")
    with torch.device(DEVICE):
        yield


def check_lengths(layout: str, lengths: dict, heads: int | None = None, **options) -> None:
    check(make_inputs(layout, heads=heads, **lengths), "triton", **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("heads", [None, 2], ids=lambda heads: f"heads={heads}")
@pytest.mark.parametrize(
    "layout", ["jagged", "padded_lengths", "one_step_mask", "jagged_one_step", "nested_keys"]
)
def test_keys_in_several_segments(
    monkeypatch: pytest.MonkeyPatch, layout: str, heads: int | None, dropout_p: float
):
    monkeypatch.setattr(configurations, "SINGLE_SEGMENT", 32)
    monkeypatch.setattr(configurations, "STEP_SEGMENT", 32)
    check_lengths(layout, LONG, heads, dropout_p=dropout_p)


@pytest.mark.parametrize("processors", [1, 100], ids=["one_part", "parts"])
def test_segments_of_few_queries_are_shared_out(monkeypatch: pytest.MonkeyPatch, processors: int):
    """Few queries over many keys: several programs a tile of queries, merged."""
    from attn_ext.triton_kernels import launch_forward

    monkeypatch.setattr(configurations, "SINGLE_SEGMENT", 32)
    monkeypatch.setattr(launch_forward, "processors", lambda tensor: processors)
    check_lengths("jagged", LONG)


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("score_weight",), ("query", "value")])
@pytest.mark.parametrize("whole", [True, False], ids=["whole_sequences", "tiles"])
def test_gradients_of_a_side(monkeypatch: pytest.MonkeyPatch, whole: bool, wanted: tuple[str, ...]):
    monkeypatch.setattr(configurations, "WHOLE_SEQUENCE_PAIRS", 1 << 20 if whole else 0)
    check_lengths("padded_mask", TILES, wanted=wanted)


@pytest.mark.parametrize("layout", ["jagged", "padded_mask", "padded_lengths"])
def test_gradients_of_sides_apart(monkeypatch: pytest.MonkeyPatch, layout: str):
    monkeypatch.setattr(configurations, "WHOLE_SEQUENCE_PAIRS", 0)
    check_lengths(layout, TILES, heads=2, dropout_p=0.3)


@pytest.mark.parametrize("whole", [True, False], ids=["whole_sequences", "tiles"])
def test_tiles_of_one_sequence_take_different_routes(monkeypatch: pytest.MonkeyPatch, whole: bool):
    """One key is out of the factored range: its tile goes direct, the others do not."""
    monkeypatch.setattr(configurations, "WHOLE_SEQUENCE_PAIRS", 1 << 20 if whole else 0)
    inputs = make_inputs("jagged", features=8, lengths_q=(2, 5), lengths_k=(70, 40))
    inputs.leaves["key"][3, 1] = 12
    check(inputs, "triton")


@pytest.mark.few(interpreted=4)  # nothing is run
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs more tiles than an axis holds")
@pytest.mark.parametrize("layout", ["jagged", "padded_mask", "one_step_mask", "jagged_one_step"])
def test_only_the_first_grid_axis_grows(monkeypatch: pytest.MonkeyPatch, layout: str):
    """With sequences or tokens: the others end at 65,535."""
    from triton.runtime import interpreter

    launched: dict[str, tuple[int, ...]] = {}

    def record(self, *args, grid, **kwargs):
        launched[self.__name__] = (*grid, 1, 1)[:3]

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    grids = []
    for lengths in ((100, 9, 1, 700), (200, 90, 10, 1, 0, 2, 1400)):
        launched.clear()
        inputs = make_inputs(layout, heads=2, lengths_q=lengths, lengths_k=lengths, poison=False)
        results_of(inputs, need_weights=True)
        if "one_step" in layout:
            query, *key_side = (leaf.requires_grad_() for leaf in inputs.leaves.values())
            memory = attn_ext.AttentionMemory(*key_side, **inputs.keywords, backend="triton")
            memory.attend(query).sum().backward()
        grids.append(dict(launched))
    few, many = grids
    assert few.keys() == many.keys() and len(few) > 2
    for name, grid in few.items():
        assert grid[1:] == many[name][1:], name
        by_features = name == "sum_parts_kernel"
        assert grid[0] < many[name][0] or (by_features and grid == many[name]), name


def results_of(inputs: Inputs, **options) -> list[Tensor]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    result = attn_ext.additive_attention(
        *inputs.arguments(leaves), **inputs.keywords, backend="triton", **options
    )
    context = result[0] if isinstance(result, tuple) else result
    context.backward(torch.ones_like(context))
    return [context.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step"])
def test_every_call_gives_the_same_bits(layout: str):
    """Nothing is added by atomics: results repeat whatever ``deterministic`` says."""
    inputs = make_inputs(layout, poison=False, tail_rows=0)
    first = results_of(inputs)
    for deterministic in (False, True):
        again = results_of(inputs, deterministic=deterministic)
        assert all(torch.equal(one, other) for one, other in zip(first, again))


def test_no_length_is_read_where_bounds_are_given(monkeypatch: pytest.MonkeyPatch):
    def read(*_):
        raise AssertionError("a value was read on the host")

    inputs = make_inputs("jagged", poison=False)
    bounds = {"max_seqlen_q": max(inputs.max_seqlen_q, 1), "max_seqlen_k": inputs.max_seqlen_k}
    from attn_ext.triton_kernels import problem

    monkeypatch.setattr(problem, "read_longest", read)
    results_of(inputs, **bounds)
    rows = {"max_seqlen_q": inputs.leaves["query"].size(0), "max_seqlen_k": 1000}
    results_of(inputs, **rows)  # as loose as they come, but given


def test_corrupt_offsets_stay_inside(monkeypatch: pytest.MonkeyPatch):
    """With unchecked values, as on a GPU: a wrong address would end the interpreter's process."""
    from attn_ext import checks

    monkeypatch.setattr(checks, "can_read_values", lambda tensor: False)
    monkeypatch.setattr(attn_ext.layout, "can_read_values", lambda tensor: False)
    rows, features = 12, 6
    names = ("query", "key", "value")
    guarded = {name: torch.full((rows + 64, features), torch.nan) for name in names}
    views = {name: whole[32 : 32 + rows] for name, whole in guarded.items()}
    for view in views.values():
        view.copy_(torch.randn(view.shape))
        view.requires_grad_()
    for offsets in ([0, 5, 3, 12], [-4, 2, 30, 12], [0, 2**40, 1, -(2**40)], [9, 9, 9, 9]):
        cu = torch.tensor(offsets)
        for bounds in ({"max_seqlen_q": 3, "max_seqlen_k": 3}, {}):
            context = attn_ext.additive_attention(
                *views.values(),
                torch.randn(features, requires_grad=True),
                cu_seqlens_q=cu,
                cu_seqlens_k=cu,
                backend="triton",
                **bounds,
            )
            context.sum().backward()
            assert context.shape == (rows, features)
    for whole in guarded.values():
        around = torch.cat([whole.detach()[:32], whole.detach()[32 + rows :]])
        assert around.isnan().all()


def test_the_longest_sequence_is_read_where_no_bound_is_given(monkeypatch: pytest.MonkeyPatch):
    """On a GPU, where the host has not seen the offsets: tiles and workspaces follow its length."""
    from attn_ext.triton_kernels import problem

    bounds = []
    monkeypatch.setattr(attn_ext.layout, "can_read_values", lambda tensor: False)
    monkeypatch.setattr(attn_ext.checks, "can_read_values", lambda tensor: False)
    describe = problem.describe

    def note(*arguments):
        described = describe(*arguments)
        bounds.append((described.max_q, described.max_k))
        return described

    for launchers in ("launch_forward", "launch_backward"):
        module = importlib.import_module(f"attn_ext.triton_kernels.{launchers}")
        monkeypatch.setattr(module, "describe", note)
    results_of(make_inputs("jagged", poison=False, **TILES))
    assert bounds == [(9, 20), (9, 20)]


def test_a_workspace_of_all_pairs_of_rows_is_refused(monkeypatch: pytest.MonkeyPatch):
    """While a CUDA graph is captured no length can be read: small calls go on as if one sequence
    had all rows, others say which argument spares them the memory.
    """
    from attn_ext.triton_kernels import problem

    def read(*_):
        raise AssertionError("a value was read on the host")

    inputs = make_inputs("jagged", poison=False, **TILES)
    bounds = {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
    monkeypatch.setattr(attn_ext.layout, "can_read_values", lambda tensor: False)
    monkeypatch.setattr(attn_ext.checks, "can_read_values", lambda tensor: False)
    monkeypatch.setattr(problem, "_is_capturing", lambda tensor: True)
    monkeypatch.setattr(problem, "read_longest", read)
    check(inputs, "triton", need_weights=False)
    monkeypatch.setattr(problem, "MOST_UNREAD_BYTES", 1000)
    with pytest.raises(ValueError, match="max_seqlen_k: expected the longest sequences.*captured"):
        results_of(inputs)
    results_of(inputs, **bounds)


@pytest.mark.parametrize("query", [(1, 2, 8), (1, 8)], ids=["several", "one_step"])
def test_backward_mapped_over_one_forward(query: tuple[int, ...]):
    """``jacrev`` maps backward alone: all of its calls share the scores that one forward kept."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    shapes = query, (1, 3, 8), (1, 3, 2), (8,)
    inputs = [torch.randn(shape, generator=draw) for shape in shapes]

    def jacobians(backend: str) -> tuple[Tensor, ...]:
        def attend(*tensors: Tensor) -> Tensor:
            return attn_ext.additive_attention(*tensors, backend=backend)

        return torch.func.jacrev(attend, argnums=(0, 1, 2, 3))(*inputs)

    torch.testing.assert_close(jacobians("triton"), jacobians("reference"), rtol=1e-4, atol=1e-5)


def test_large_numbers_among_the_second_features_of_pairs():
    """Features d and d + 1 are a pair; the magnitudes of both choose the route."""
    inputs = make_inputs("padded", features=40)
    inputs.leaves["query"][..., 31] *= 60
    check(inputs, "triton")


@pytest.mark.parametrize("layout", ["padded", "one_step", "jagged_one_step"])
def test_scores_launch_no_softmax(monkeypatch: pytest.MonkeyPatch, layout: str):
    """Nor merge parts of one; a step's go where they are returned from."""
    static_cases = pytest.importorskip("benchmarks.static_cases")
    monkeypatch.setattr(configurations, "SINGLE_SEGMENT", 32)
    inputs = make_inputs(layout, lengths_q=(3, 3), lengths_k=(70, 70))
    query, key, _, score_weight = inputs.arguments(inputs.leaves)
    with static_cases.noted_launches() as launches:
        attn_ext.additive_scores(query, key, score_weight, backend="triton", **inputs.keywords)
    kernels = {launch[0].__name__: launch[1] for launch in launches}
    assert len(launches) == (2 if layout == "padded" else 1), list(kernels)
    assert all(arguments["stats_ptr"] is None for arguments in kernels.values())


def test_what_a_call_launches():
    """Backward takes the scores that forward kept, and its values' gradients go with others."""
    static_cases = pytest.importorskip("benchmarks.static_cases")
    inputs = make_inputs("jagged", features=64, poison=False, lengths_q=(3, 5), lengths_k=(4, 2))
    with static_cases.noted_launches() as launches:
        results_of(inputs)
    kernels = [launch[0].__name__.removeprefix("additive_attention_") for launch in launches]
    forward = ["order_kernel", "fwd_kernel"]
    assert kernels == [*forward, "bwd_scores_kernel", "grad_kernel", "sum_parts_kernel"]


@pytest.mark.parametrize("tile", [16, 0], ids=["tiles", "sequences"])
def test_the_largest_tiles_come_first(tile: int):
    lengths_q, lengths_k = (3, 40, 0, 17, 5), (10, 5, 7, 30, 0)
    offsets = [
        torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (lengths_q, lengths_k)
    ]
    all_rows, room, batch = sum(lengths_q) + 2, 12, len(lengths_q)  # two rows belong to nobody
    order = torch.full((2 * room + 1,), -1, dtype=torch.int32)
    scalars = (batch + 1, room, batch, all_rows, sum(lengths_k), 40, 30)
    key_side = rows.KeySide(offsets[1], None, None)
    kernel = rows.order_kernel[(batch + 1,)]
    kernel(order, offsets[0], key_side, *scalars, TILE=tile, BLOCK=4, num_warps=1)
    work = {
        (b, n): (min(q, tile) if tile else q) * k
        for b, (q, k) in enumerate(zip((*lengths_q, 2), (*lengths_k, 0)))
        for n in range(-(-q // tile) if tile else 1)
    }
    found = [tuple(pair) for pair in order[: 2 * len(work)].view(-1, 2).tolist()]
    assert order[-1] == len(work) == len(set(found)) and set(found) == set(work)
    amounts = [work[pair] for pair in found]
    assert amounts == sorted(amounts, reverse=True)


def test_work_is_dealt_to_all_alike():
    """To and fro; those who get one more have the smallest of the first turn."""
    expected = {
        (1, 3): [0, 1, 2],
        (4, 3): [2, 1, 0],
        (4, 8): [0, 1, 2, 3, 7, 6, 5, 4],
        (4, 9): [3, 0, 1, 2, 4, 7, 6, 5, 8],
        (4, 14): [2, 3, 0, 1, 5, 4, 7, 6, 10, 11, 8, 9, 13, 12],
    }
    for (processors, count), places in expected.items():
        found = torch.empty(count, dtype=torch.int32)
        dealt_kernel[(count,)](found, count, processors)
        assert found.tolist() == places
