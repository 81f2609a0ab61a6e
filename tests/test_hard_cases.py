"""The cases that broke other implementations, each forward and backward on every backend.

In the order of the tests here, and where the others are:

- sequences without keys, sequences without queries, no sequence at all
- more of anything than an axis of a CUDA grid holds, 65,535
- bounds of 1 beside empty sequences, rows past the last offset, bounds too large or too small
- int32 and int64 offsets, more elements than 2^31
- incoming gradients of any strides, key and value of different ones, nothing contiguous:
  test_strides.py
- all keys masked; very negative scores beside masked ones; masked scores whose exp overflows
- a device that is not the current one, a CUDA graph replayed: test_gpu.py
- other offsets in the same buffers
- gradients of every subset of the inputs
- masks of dropout that depend on a seed and a position and nothing else: test_dropout.py
- results that repeat bit for bit
- nested tensors with holes, or ragged in another axis
- strides of the fake kernels: test_fake_tensors.py
- new memory that holds NaN, as it does in all tests
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import BACKEND_DEVICES, assert_within_budget, call, check, incoming_gradients
from layouts import (
    INPUT_NAMES,
    JAGGED_KEY_LAYOUTS,
    JAGGED_QUERY_LAYOUTS,
    LAYOUTS,
    LENGTHS_K,
    LENGTHS_Q,
    MIXED_LAYOUTS,
    Inputs,
    make_inputs,
    offsets_of,
)
from parameters import MAIN_LAYOUTS, dtype_id, named
from torch import Tensor
from yardstick import differentiate

import attn_ext
from attn_ext import AttentionMemory, checks, ops

pytestmark = pytest.mark.every_isa

INTERPRETED = BACKEND_DEVICES.get("triton") == "cpu"
EMULATED = BACKEND_DEVICES.get("cuda") == "cpu"
# Triton's launches are looked at by test_only_the_first_grid_axis_grows instead.
takes_minutes_without_a_gpu = pytest.mark.skipif(
    INTERPRETED or EMULATED, reason="takes minutes, interpreted or emulated"
)


def check_lengths(
    backend: str, layout: str, heads: int | None, lengths: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    check(make_inputs(layout, heads=heads, lengths_q=lengths[0], lengths_k=lengths[1]), backend)


QUERIES_WITHOUT_KEYS = {
    "some": ((4, 3, 5), (0, 2, 0)),
    "all": ((5, 3), (0, 0)),
    "one_long": ((1, 30, 2), (0, 1, 40)),
}


@pytest.mark.parametrize("case", QUERIES_WITHOUT_KEYS)
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_length_keys_with_queries(backend: str, layout: str, heads: int | None, case: str):
    check_lengths(backend, layout, heads, QUERIES_WITHOUT_KEYS[case])


KEYS_WITHOUT_QUERIES = {
    "some": ((0, 3, 0), (5, 2, 7)),
    "all": ((0, 0), (5, 3)),
    "both_empty": ((0, 0), (0, 0)),
}


@pytest.mark.parametrize("case", KEYS_WITHOUT_QUERIES)
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_length_queries_with_keys(backend: str, layout: str, heads: int | None, case: str):
    check_lengths(backend, layout, heads, KEYS_WITHOUT_QUERIES[case])


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "nested" not in name])
def test_empty_batch(backend: str, layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads, lengths_q=(), lengths_k=())
    results = check(inputs, backend)
    assert (results["dscore_weight"] == 0).all()


@pytest.mark.parametrize("tk", [0, 3], ids=named("Tk"))
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
def test_empty_batch_of_padded_steps(backend: str, heads: int | None, tk: int):
    head_axis = () if heads is None else (heads,)
    query = torch.randn(0, *head_axis, 4, requires_grad=True)
    key = torch.randn(0, tk, *head_axis, 4, requires_grad=True)
    value = torch.randn(0, tk, *head_axis, 5)
    score_weight = torch.randn(*head_axis, 4, requires_grad=True)
    context, weights = attn_ext.additive_attention(
        query, key, value, score_weight, need_weights=True, backend=backend
    )
    assert context.shape == (0, *head_axis, 5) and weights.shape == (0, *head_axis, tk)
    (context.sum() + weights.sum()).backward()
    assert (score_weight.grad == 0).all()


MANY = 70_000  # more than 65,535, at which an axis of a CUDA grid ends


def batched_formula(leaves: dict[str, Tensor], real_keys: Tensor) -> tuple[Tensor, None]:
    """Padded attention over ``real_keys`` [B, Tk], as fast as 70,000 sequences want it."""
    query, key, value, score_weight = (leaves[name] for name in INPUT_NAMES)
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ score_weight  # [B, Tq, Tk]
    ignored = ~real_keys.unsqueeze(1)
    weights = scores.masked_fill(ignored, -1e30).softmax(-1).masked_fill(ignored, 0)
    return torch.bmm(weights, value), None


def check_many(
    backend: str, real_queries: Tensor, real_keys: Tensor, layout: str = "jagged"
) -> None:
    """Compare padded leaves' results and gradients; ``real_*`` [B, T] are prefixes of each row."""
    shapes = (*real_queries.shape, 4), (*real_keys.shape, 4), (*real_keys.shape, 3), (4,)
    leaves = {name: torch.randn(shape) for name, shape in zip(INPUT_NAMES, shapes)}
    incoming = {"context": torch.randn(*real_queries.shape, 3) * real_queries.unsqueeze(-1)}

    def attend(leaves: dict[str, Tensor]) -> tuple[Tensor, None]:
        query, key, value, score_weight = (leaves[name] for name in INPUT_NAMES)
        keywords = {"key_lengths": real_keys.sum(1)}
        if layout != "padded_lengths":
            key, value = key[real_keys], value[real_keys]
            keywords = {"cu_seqlens_k": offsets_of(real_keys.sum(1))}
        if layout == "jagged":
            query = query[real_queries]
            keywords["cu_seqlens_q"] = offsets_of(real_queries.sum(1))
        elif layout == "jagged_one_step":
            query = query.squeeze(1)
        context = attn_ext.additive_attention(
            query, key, value, score_weight, backend=backend, **keywords
        )
        if layout == "jagged":
            context = context.new_zeros(incoming["context"].shape).index_put(
                (real_queries,), context
            )
        return context.view_as(incoming["context"]), None

    actual = differentiate(attend, leaves, incoming)
    exact, eager = (
        differentiate(
            lambda leaves: batched_formula(leaves, real_keys),
            {name: leaf.to(dtype) for name, leaf in leaves.items()},
            incoming,
        )
        for dtype in (torch.float64, torch.float32)
    )
    for results in (actual, exact, eager):
        results["context"] = results["context"] * real_queries.unsqueeze(-1)
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


@takes_minutes_without_a_gpu
@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step", "padded_lengths"])
def test_more_sequences_than_a_grid_axis_holds(backend: str, layout: str):
    longest = torch.tensor([[1 if layout == "jagged_one_step" else 2, 2]])
    lengths = torch.randint(0, 3, (MANY, 2)).minimum(longest)
    real_queries, real_keys = (
        torch.arange(longest[0, side]) < lengths[:, side, None] for side in range(2)
    )
    if layout == "jagged_one_step":
        real_queries = torch.ones_like(real_queries)
    check_many(backend, real_queries, real_keys, layout)


@takes_minutes_without_a_gpu
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_more_tiles_of_one_sequence_than_a_grid_axis_holds(backend: str, side: str):
    rows = MANY * (64 if BACKEND_DEVICES[backend] == "cuda" else 1)  # tiles have at most 64 rows
    few, many = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, rows, dtype=torch.bool)
    check_many(backend, *((many, few) if side == "queries" else (few, many)))


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_seqlen_1_mixed_with_empty(backend: str, layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads, lengths_q=(1, 0, 1, 0), lengths_k=(1, 1, 0, 0))
    check(inputs, backend)
    check(inputs.with_keywords(max_seqlen_q=1, max_seqlen_k=1), backend)


@pytest.mark.parametrize("tail_rows", [0, 1, 50], ids=named("tail"))
@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step", "nested_query"])
def test_rows_past_the_last_offset(backend: str, layout: str, heads: int | None, tail_rows: int):
    check(make_inputs(layout, heads=heads, tail_rows=tail_rows), backend)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "larger"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *MIXED_LAYOUTS])
def test_max_seqlen(backend: str, layout: str, exact: bool):
    """A bound; returned dense weights of jagged sequences are as wide as it."""
    inputs = make_inputs(layout, heads=2)
    bounds = inputs.max_seqlen_q + (0 if exact else 3), inputs.max_seqlen_k + (0 if exact else 9)
    inputs = inputs.with_keywords(max_seqlen_q=bounds[0], max_seqlen_k=bounds[1])
    inputs = Inputs(
        **{
            **vars(inputs),
            "max_seqlen_q": bounds[0] if layout in JAGGED_QUERY_LAYOUTS else inputs.max_seqlen_q,
            "max_seqlen_k": bounds[1] if layout in JAGGED_KEY_LAYOUTS else inputs.max_seqlen_k,
        }
    )
    check(inputs, backend)


@pytest.mark.parametrize("layout", ["jagged", "nested", "jagged_one_step"])
def test_generous_bounds(backend: str, layout: str):
    """Bounds far above the lengths cost neither time nor memory."""
    inputs = make_inputs(layout)
    expected, _ = call(inputs, inputs.leaves, backend=backend)
    bounds = {"max_seqlen_k": 10**8}
    if layout != "jagged_one_step":
        bounds["max_seqlen_q"] = 10**8
    actual, _ = call(inputs.with_keywords(**bounds), inputs.leaves, backend=backend)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step", "nested", "padded"])
def test_understated_max_seqlen(monkeypatch: pytest.MonkeyPatch, backend: str, layout: str):
    monkeypatch.setenv("ATTN_EXT_CHECK", "1")
    inputs = make_inputs(layout)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        longest = getattr(inputs, name)
        understated = inputs.with_keywords(**{name: longest - 1})
        with pytest.raises(
            ValueError, match=f"^{name}: expected at least {longest}.*got {longest - 1}"
        ):
            call(understated, inputs.leaves, backend=backend)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step"])
def test_understated_max_seqlen_that_nobody_checks(
    monkeypatch: pytest.MonkeyPatch, kernel_backend: str, layout: str
):
    """Results may be wrong, but never of other rows or of what belongs to nobody, which is NaN.

    Guard zones around all tensors: test_corrupt_values.py.
    """
    for module in (checks, attn_ext.layout):
        monkeypatch.setattr(module, "can_read_values", lambda tensor: False)
    inputs = make_inputs(layout, tail_rows=30)
    bounds = {"max_seqlen_k": 3}
    if layout == "jagged":
        bounds["max_seqlen_q"] = 2
    inputs = inputs.with_keywords(**bounds)
    results = differentiate(
        lambda leaves: call(inputs, leaves, backend=kernel_backend),
        inputs.leaves,
        {"context": torch.ones(len(inputs.leaves["query"]), 8)},
    )
    for name, result in results.items():
        assert result.isfinite().all(), name


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_dtypes(backend: str, layout: str, index_dtype: torch.dtype):
    check(make_inputs(layout, index_dtype=index_dtype), backend)


@pytest.mark.parametrize("key_dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_index_dtypes_of_queries_and_keys_may_differ(backend: str, key_dtype: torch.dtype):
    inputs = make_inputs("jagged")
    query_dtype = torch.int64 if key_dtype == torch.int32 else torch.int32
    inputs = inputs.with_keywords(
        cu_seqlens_q=inputs.keywords["cu_seqlens_q"].to(query_dtype),
        cu_seqlens_k=inputs.keywords["cu_seqlens_k"].to(key_dtype),
    )
    check(inputs, backend)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step", "padded_lengths"])
def test_strided_offsets_and_lengths(backend: str, layout: str):
    inputs = make_inputs(layout)
    strided = {
        name: torch.stack([index, -index], -1)[:, 0] for name, index in inputs.keywords.items()
    }
    check(inputs.with_keywords(**strided), backend)


STRIDE = 2**30  # elements; the third row lies 2^31 elements away


def far_apart(tensor: Tensor, folder: Path) -> Tensor:
    """The same values, the first axis having the stride STRIDE, in memory that costs nothing."""
    size = (len(tensor) - 1) * STRIDE + tensor[0].numel()
    if tensor.is_cuda:
        memory = torch.empty(size, dtype=tensor.dtype)
    else:
        file = folder / "sparse"
        memory = torch.from_file(str(file), shared=True, size=size, dtype=tensor.dtype)
        file.unlink()
    return memory.as_strided(tensor.shape, (STRIDE, *tensor[0].contiguous().stride())).copy_(tensor)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step", "padded_lengths", "one_step_mask"])
def test_more_than_2_to_the_31_elements(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backend: str,
    layout: str,
    index_dtype: torch.dtype,
):
    """Query, key, value and incoming gradients each reach beyond 2^31 elements in a sequence."""
    if INTERPRETED:  # it copies the memory of all arguments onto itself after every launch
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    if BACKEND_DEVICES[backend] == "cuda" and torch.cuda.mem_get_info()[0] < 60 * STRIDE:
        pytest.skip("less than 60 GiB of free GPU memory")
    inputs = make_inputs(
        layout,
        lengths_q=(1, 3, 1),
        lengths_k=(3, 1, 1),
        features=4,
        value_features=3,
        dtype=torch.bfloat16,
        tail_rows=0,
        poison=False,
        index_dtype=index_dtype,
    )
    far = {name: far_apart(inputs.leaves[name], tmp_path) for name in INPUT_NAMES[:3]}
    incoming = incoming_gradients(inputs, need_weights=True)
    incoming = {name: far_apart(gradient, tmp_path) for name, gradient in incoming.items()}
    check(inputs.with_leaves(**far), backend, incoming=incoming)


@pytest.mark.parametrize("layout", ["padded_mask", "one_step_mask"])
def test_all_keys_masked(backend: str, layout: str):
    mask = torch.ones(3, 7, dtype=torch.bool)
    inputs = make_inputs(layout, lengths_q=(2,) * 3, lengths_k=(7,) * 3, key_padding_mask=mask)
    for name, result in check(inputs, backend).items():
        assert (result == 0).all(), name


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.large if name == "padded_mask" else [])
        for name in MAIN_LAYOUTS
    ],
)
def test_very_negative_scores(backend: str, layout: str):
    """Real scores near -10^4 beside ignored keys: a finite sentinel would let the latter win.

    Rounding of such scores is worth 1e-4 of a weight, so the comparison is over many sequences:
    among few, eager's errors may all happen to be small.
    """
    inputs = make_inputs(layout, features=8, lengths_q=LENGTHS_Q * 16, lengths_k=LENGTHS_K * 16)
    positive = {
        "query": inputs.leaves["query"].abs() + 1,
        "key": inputs.leaves["key"].abs() * 0.1,
        "score_weight": -1000 * torch.ones_like(inputs.leaves["score_weight"]),
    }
    check(inputs.with_leaves(**positive), backend)


@pytest.mark.parametrize(
    "layout", ["padded_mask", "padded_lengths", "one_step_mask", "one_step_lengths"]
)
def test_exp_overflow_outside_the_mask(backend: str, layout: str):
    """Ignored scores lie 2,000 above real ones: their exp is infinite, and infinity times 0 NaN."""
    inputs = make_inputs(layout, heads=2, poison=False)
    ignored = ~inputs.owned("key", inputs.key_rows)
    inputs.leaves["query"] *= 0.1
    inputs.leaves["key"] -= 8
    inputs.leaves["key"][ignored] += 16
    inputs.leaves["score_weight"].fill_(1000 / 16)
    inputs.leaves["value"][ignored] = 3e38  # so do sums over it
    check(inputs, backend)


@pytest.mark.parametrize("layout", ["jagged", "jagged_one_step"])
def test_other_offsets_in_the_same_buffers(backend: str, layout: str):
    """As a CUDA graph has them: nothing is remembered of what a buffer held before."""
    buffers: dict[str, Tensor] = {}
    for lengths_q, lengths_k in (((3, 0, 9), (7, 2, 1)), ((4, 5, 1), (0, 9, 6)), ((0,) * 3,) * 2):
        tails = {"tail_rows": 20 - sum(lengths_q)}, {"tail_rows": 20 - sum(lengths_k)}
        inputs = make_inputs(layout, lengths_q=lengths_q, lengths_k=lengths_k, **tails[1])
        if layout == "jagged":
            query = make_inputs(layout, lengths_q=lengths_q, lengths_k=lengths_k, **tails[0])
            inputs = inputs.with_leaves(query=query.leaves["query"])
        for name, offsets in inputs.keywords.items():
            buffers.setdefault(name, torch.empty_like(offsets)).copy_(offsets)
        check(inputs.with_keywords(**buffers), backend)


SUBSETS = [subset for n in range(5) for subset in itertools.combinations(INPUT_NAMES, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids=["+".join(names) or "none" for names in SUBSETS])
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_requires_grad_subsets(backend: str, layout: str, wanted: tuple[str, ...]):
    inputs = make_inputs(layout, heads=2)
    results = check(inputs, backend, wanted=wanted)
    assert set(results) == {"context", "weights", *(f"d{name}" for name in wanted)}


@pytest.mark.parametrize("wanted", SUBSETS, ids=["+".join(names) or "none" for names in SUBSETS])
def test_context_requires_grad_only_if_an_input_does(backend: str, wanted: tuple[str, ...]):
    inputs = make_inputs("jagged")
    leaves = {n: leaf.clone().requires_grad_(n in wanted) for n, leaf in inputs.leaves.items()}
    assert call(inputs, leaves, backend=backend)[0].requires_grad == bool(wanted)
    with torch.no_grad():
        assert not call(inputs, leaves, backend=backend)[0].requires_grad


@pytest.mark.parametrize("keeps_scores", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_scores_kept_by_forward(
    kernel_backend: str, layout: str, keeps_scores: bool, monkeypatch: pytest.MonkeyPatch
):
    """Backward takes them from there or computes them again, however small or large they are."""
    monkeypatch.setattr(ops, "keeps_scores", lambda *_: keeps_scores)
    check(make_inputs(layout, heads=2), kernel_backend, dropout_p=0.3)


@pytest.mark.parametrize("deterministic", [None, False, True], ids=str)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_deterministic_argument(backend: str, layout: str, deterministic: bool | None):
    inputs = make_inputs(layout).with_keywords(deterministic=deterministic)
    first, second = check(inputs, backend), check(inputs, backend)
    if deterministic is not False:
        for name, result in first.items():
            assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("features", [16, 100], ids=named("D"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_thread_count_changes_no_bit(kernel_backend: str, layout: str, features: int):
    inputs = make_inputs(
        layout,
        heads=2,
        lengths_q=(30, 0, 2, 9),
        lengths_k=(40, 3, 0, 50),
        features=features,
        value_features=20,
    )
    incoming = incoming_gradients(inputs, need_weights=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            results.append(
                differentiate(
                    lambda leaves: call(
                        inputs, leaves, backend=kernel_backend, need_weights=True, dropout_p=0.2
                    ),
                    inputs.leaves,
                    incoming,
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


def with_holes(tensor: Tensor) -> Tensor:
    """A nested tensor whose sequences are shorter than the rows between their offsets."""
    lengths = (tensor.offsets().diff() - 1).clamp(min=0)
    return torch.nested.nested_tensor_from_jagged(tensor.values(), tensor.offsets(), lengths)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "without holes": with_holes,
    "ragged in axis 1": lambda tensor: tensor.transpose(1, 2),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("name", INPUT_NAMES[:3])
def test_nested_tensors_of_other_kinds_are_refused(backend: str, name: str, reason: str):
    inputs = make_inputs("nested")
    arguments = dict(zip(INPUT_NAMES, inputs.arguments(inputs.leaves)))
    arguments[name] = REFUSED[reason](arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: expected a nested tensor {reason}.*, got "):
        attn_ext.additive_attention(**arguments, backend=backend)
    del arguments["query"]
    if name != "query":
        with pytest.raises(ValueError, match=f"^{name}: expected a nested tensor {reason}.*, got "):
            AttentionMemory(**arguments, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=dtype_id)
def test_new_memory_is_not_zero(dtype: torch.dtype):
    """What all tests rely on to see a result that was never written."""
    for new in (torch.empty(1000, dtype=dtype), torch.zeros(3, dtype=dtype).new_empty(1000)):
        assert new.isnan().all() if dtype.is_floating_point else (new != 0).all()
