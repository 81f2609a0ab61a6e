"""Queries, keys and score weights of every magnitude, and features that cancel or saturate."""

import pytest
import torch
from helpers import check
from layouts import make_inputs
from parameters import MAIN_LAYOUTS, dtype_id, named

pytestmark = pytest.mark.every_isa


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize(
    "scale", [1e-6, 1e-3, 1.0, 5.0, 10.0, 30.0, 100.0, 1e4], ids=named("scale")
)
@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_magnitudes(backend: str, layout: str, scale: float, dtype: torch.dtype):
    inputs = make_inputs(
        layout,
        heads=2,
        lengths_q=(9, 0, 16, 5),
        lengths_k=(17, 3, 0, 31),
        features=40,
        scale=scale,
        dtype=dtype,
    )
    check(inputs, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4], ids=named("scale"))
@pytest.mark.parametrize("layout", ["padded_lengths", "jagged_one_step"])
def test_magnitudes_in_low_precision(backend: str, layout: str, scale: float, dtype: torch.dtype):
    inputs = make_inputs(layout, features=40, scale=scale, dtype=dtype)
    check(inputs, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_gradients_of_next_to_nothing(backend: str, dtype: torch.dtype):
    """Of score weights they are sums of tanh, which the factored form has to about 1e-7."""
    sizes = {"lengths_q": (7,), "lengths_k": (9,), "features": 20}
    check(make_inputs("padded", scale=1e-6, dtype=dtype, **sizes), backend)


@pytest.mark.parametrize("scale", [0.1, 1.0], ids=named("scale"))
@pytest.mark.parametrize("features", [64, 256], ids=named("D"))
@pytest.mark.parametrize("layout", ["padded", "one_step"])
def test_score_weights_of_one_sign(backend: str, layout: str, features: int, scale: float):
    """As Keras's layer has them without `use_scale`: sums of w are large beside the scores."""
    sizes = {"lengths_q": (8 if layout == "padded" else 1,), "lengths_k": (16,)}
    inputs = make_inputs(layout, features=features, scale=scale, poison=False, **sizes)
    check(inputs.with_leaves(score_weight=torch.ones(features)), backend)


def test_score_weights_of_one_sign_and_uneven_size(backend: str):
    """Few are large, and a sample of the features may miss them; the others still add up."""
    sizes = {"lengths_q": (2,), "lengths_k": (16,)}
    inputs = make_inputs("padded", features=1024, scale=1.0, poison=False, **sizes)
    weight = inputs.leaves["score_weight"]
    uneven = weight.abs() ** 3
    check(inputs.with_leaves(score_weight=8 * uneven / uneven.norm()), backend)


@pytest.mark.parametrize(
    ("dtype", "scale", "size"),
    [(torch.float16, 3e-4, 1e3), (torch.bfloat16, 3e-4, 5e3), (torch.bfloat16, 2.4, 1e25)],
    ids=["float16", "bfloat16", "huge"],
)
def test_large_score_weights_in_low_precision(
    backend: str, dtype: torch.dtype, scale: float, size: float
):
    """What float32 keeps of their scores, results of 16 bits show too."""
    inputs = make_inputs(
        "padded", lengths_q=(8,), lengths_k=(16,), features=256, scale=scale, dtype=dtype
    )
    weight = inputs.leaves["score_weight"]
    check(inputs.with_leaves(score_weight=(weight.float().abs() * size).to(dtype)), backend)


@pytest.mark.parametrize("size", [20.0, 60.0, 1e3, 1e5], ids=named("norm"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_large_score_weights_beside_an_outlier(backend: str, size: float, dtype: torch.dtype):
    """One key is large, all others have next to no tanh, whose errors the weights make visible."""
    if backend != "cpu":
        pytest.skip(
            "kernels for GPUs still choose by the largest row: dscore_weight is over budget"
        )
    sizes = {"lengths_q": (8,), "lengths_k": (32,), "features": 128}
    inputs = make_inputs("padded", scale=1.0, poison=False, dtype=dtype, **sizes)
    leaves = inputs.leaves
    query, key, weight = leaves["query"] / size, leaves["key"] / size, leaves["score_weight"]
    key[:, 0] = -0.9 * weight.sign()
    check(
        inputs.with_leaves(query=query, key=key, score_weight=weight / weight.norm() * size),
        backend,
    )


@pytest.mark.parametrize("layout", MAIN_LAYOUTS)
def test_few_large_features_among_small_ones(backend: str, layout: str):
    """Magnitudes on both sides of the guard within one row, one tile and one batch."""
    inputs = make_inputs(layout, features=70)
    query, key = inputs.leaves["query"], inputs.leaves["key"]
    query[::2, ..., 3] *= 1e3
    query[..., 64] *= 20
    key[1::3, ..., 3] *= 1e4
    key[..., 65] *= 25
    check(inputs, backend)


@pytest.mark.parametrize(
    ("query_number", "key_number"),
    [
        (14, -11),
        (-11, 14),
        (14, -14.5),
        (44, -43),
        (88, -88.5),
        (1e4, -1e4),
        (9999, -9998),
        (50, 50),
    ],
)
@pytest.mark.parametrize("step", [False, True], ids=["all_steps", "one_step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_large_queries_and_keys_that_cancel(
    backend: str,
    dtype: torch.dtype,
    step: bool,
    query_number: float,
    key_number: float,
):
    """q = 14 with k = -11 is tanh 3: neither exponential may be clipped on the way."""
    inputs = make_inputs(
        "one_step" if step else "padded",
        lengths_q=(3, 2),
        lengths_k=(6, 6),
        scale=0.1,
        dtype=dtype,
        poison=False,
    )
    inputs.leaves["query"] += query_number
    inputs.leaves["key"] += key_number
    check(inputs, backend)


@pytest.mark.parametrize("saturation", [3, 5, 8])
def test_saturated_features_beside_an_informative_one(backend: str, saturation: float):
    """One feature decides, and the slopes of the others are a small part of 1."""
    inputs = make_inputs("padded", lengths_q=(8,), lengths_k=(50,), features=64, scale=0.1)
    for name, informative in (("query", 0.0), ("key", 0.5)):
        leaf = inputs.leaves[name]
        leaf += saturation if name == "query" else 0
        leaf[..., 0] = informative
    inputs.leaves["score_weight"] *= 20
    check(inputs, backend)


@pytest.mark.parametrize("weight", [10, 500])
def test_cancelling_features_beside_an_informative_one(backend: str, weight: float):
    """All that tells the keys apart are tanh values near 0; one feature adds a constant."""
    inputs = make_inputs("padded", lengths_q=(8,), lengths_k=(50,), features=64, scale=0.01)
    inputs.leaves["query"] += 1
    inputs.leaves["key"] -= 1
    for name in ("query", "key"):
        inputs.leaves[name][..., 0] = 0.5
    inputs.leaves["score_weight"] *= weight
    check(inputs, backend)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("scale", "weight"), [(0.1, 1e3), (0.05, 3e3), (0.02, 3e3)])
def test_weights_of_nearly_one_where_every_tanh_is_small(
    backend: str, scale: float, weight: float, seed: int
):
    """The score gradient of such a weight is rounded to 0: those of a query have a sum then."""
    inputs = make_inputs(
        "padded", lengths_q=[5] * 2, lengths_k=[7] * 2, features=33, scale=scale, seed=seed
    )
    inputs.leaves["score_weight"] *= weight
    check(inputs, backend)


def test_gradients_near_the_largest_number(backend: str):
    """Finite where the results are, though score weights are large."""
    inputs = make_inputs("padded", lengths_q=[3], lengths_k=[4], features=32)
    for name in ("query", "key"):
        inputs.leaves[name][..., :16] = 20
    inputs.leaves["score_weight"][:] = 1e-6
    inputs.leaves["score_weight"][:16] = 1e7
    incoming = {"context": torch.full((1, 3, 8), 1e31, device=inputs.leaves["value"].device)}
    check(inputs, backend, need_weights=False, incoming=incoming)


@pytest.mark.parametrize("distance", [1, 4, 8, 16])
def test_product_of_large_factors_stays_finite(backend: str, distance: int):
    """Two features that share a reciprocal, at the end of the range."""
    inputs = make_inputs("padded", lengths_q=(3,), lengths_k=(6,), features=32)
    for name in ("query", "key"):
        inputs.leaves[name][..., 0] = inputs.leaves[name][..., distance] = 9.3
    inputs.leaves["score_weight"][..., [0, distance]] = 16
    check(inputs, backend)


@pytest.mark.parametrize("keys", [31, 32, 200])
@pytest.mark.parametrize("weight", [1, 10])
def test_lone_queries_that_are_minus_their_keys(backend: str, weight: int, keys: int):
    """Scores hardly differ: what a tile holds past its last key may not hide that."""
    inputs = make_inputs(
        "jagged_one_step", lengths_q=(1, 1), lengths_k=(keys, 3), features=256, poison=False
    )
    query = inputs.leaves["query"].sign()
    sequence = torch.tensor([0] * keys + [1] * (len(inputs.leaves["key"]) - keys))
    key = 1e-3 * inputs.leaves["key"] - query[sequence.to(query.device)]
    score_weight = weight * inputs.leaves["score_weight"]
    check(inputs.with_leaves(query=query, key=key, score_weight=score_weight), backend)
