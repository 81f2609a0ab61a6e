"""The shipped reference, and the yardstick of the other tests, against cases worked out apart."""

import inspect
import math

import pytest
import torch
from helpers import assert_within_budget, call, check
from layouts import LAYOUTS, MIXED_LAYOUTS, Inputs, make_inputs
from torch import Tensor
from yardstick import formula

import attn_ext
from attn_ext import reference

MASK = 0xFFFFFFFF


def by_loops(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Context and dense weights ``[B, H, Tq, Tk]`` in Python floats, a weight at a time."""
    leaves = {name: leaf.double() for name, leaf in inputs.leaves.items()}
    if not inputs.has_heads:
        leaves = {name: leaf.unsqueeze(-2) for name, leaf in leaves.items()}
    context = torch.zeros(*leaves["query"].shape[:-1], leaves["value"].size(-1)).double()
    weights = torch.zeros(inputs.dense_weights_shape).double()
    for b, (query_row, key_row) in enumerate(zip(inputs.query_rows, inputs.key_rows)):
        queries, keys = leaves["query"][query_row].tolist(), leaves["key"][key_row].tolist()
        values = leaves["value"][key_row].tolist()
        rows = context[query_row]  # a view: rows are given by slices or one number
        for i, query in enumerate(queries):
            for h, score_weight in enumerate(leaves["score_weight"].tolist()):
                exps = [
                    math.exp(
                        sum(w * math.tanh(q + k) for w, q, k in zip(score_weight, query[h], key[h]))
                    )
                    for key in keys
                ]
                for exp, value, column in zip(exps, values, inputs.columns[b].tolist()):
                    weights[b, h, i, column] = exp / sum(exps)
                    for d, number in enumerate(value[h]):
                        rows[i, h, d] += exp / sum(exps) * number
    return (context if inputs.has_heads else context.squeeze(-2)), weights


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 as the paper of Salmon et al. (2011) defines it, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


# ---- Numbers worked out by hand ----


def hand_case() -> tuple[Tensor, ...]:
    """One query, two keys, one feature: scores 0 and ln 3, so weights 1/4 and 3/4."""
    key2, weight = math.atanh(0.5), 2 * math.log(3.0)
    shapes = {"query": (1, 1, 1), "key": (1, 2, 1), "value": (1, 2, 1), "score_weight": (1,)}
    numbers = {"query": [0.0], "key": [0.0, key2], "value": [4.0, 8.0], "score_weight": [weight]}
    return tuple(
        torch.tensor(numbers[name], dtype=torch.float64).view(shape).requires_grad_()
        for name, shape in shapes.items()
    )


def test_hand_case_forward():
    context, weights = reference.additive_attention(*hand_case(), need_weights=True)
    torch.testing.assert_close(weights.flatten().tolist(), [0.25, 0.75])
    assert context.item() == pytest.approx(4 / 4 + 8 * 3 / 4)


def test_hand_case_gradients():
    tensors = hand_case()
    dquery, dkey, dvalue, dweight = torch.autograd.grad(
        reference.additive_attention(*tensors).sum(), tensors
    )
    # dcontext/de_j = alpha_j (value_j - context): 1/4 (4 - 7) and 3/4 (8 - 7);
    # de_1/dkey_1 = w, de_2/dkey_2 = w (1 - 1/4), w = 2 ln 3; de_j/dw = tanh: 0 and 1/2.
    w = 2 * math.log(3.0)
    dkey1, dkey2 = -0.75 * w, 0.75 * w * 0.75
    assert dvalue.flatten().tolist() == pytest.approx([0.25, 0.75])
    assert dkey.flatten().tolist() == pytest.approx([dkey1, dkey2])
    assert dquery.item() == pytest.approx(dkey1 + dkey2)
    assert dweight.item() == pytest.approx(0.75 * 0.5)


def test_hand_case_masked():
    query, key, value, score_weight = (tensor.detach() for tensor in hand_case())
    mask = torch.tensor([[True, False]])
    context, weights = reference.additive_attention(
        query, key, value, score_weight, key_padding_mask=mask, need_weights=True
    )
    assert weights.flatten().tolist() == [0.0, 1.0]
    assert context.item() == 8.0


def test_hand_case_without_keys():
    query, key, value, score_weight = hand_case()
    context, weights = reference.additive_attention(
        query, key[:, :0], value[:, :0], score_weight, need_weights=True
    )
    assert weights.shape == (1, 1, 0)
    assert context.tolist() == [[[0.0]]]
    context.sum().backward()
    assert (query.grad == 0).all() and (score_weight.grad == 0).all()


# ---- Python loops ----


@pytest.mark.parametrize("heads", [None, 1, 3], ids=lambda heads: f"heads={heads}")
@pytest.mark.parametrize("layout", [*LAYOUTS, *MIXED_LAYOUTS])
def test_forward_by_loops(layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads, features=3, value_features=2, dtype=torch.float64)
    expected_context, dense = by_loops(inputs)
    for context, weights in (
        call(inputs, inputs.leaves, backend="reference", need_weights=True),
        formula(inputs, inputs.leaves),
    ):
        torch.testing.assert_close(context, expected_context, rtol=1e-12, atol=1e-12)
        if inputs.weights_are_jagged:
            for b, row in enumerate(inputs.key_rows):
                rows = weights[row] if heads else weights[row].unsqueeze(1)
                expected = dense[b, :, 0, inputs.columns[b]].T
                torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
        else:
            expected = dense.squeeze(2) if inputs.is_one_step else dense
            expected = expected if heads else expected.squeeze(1)
            torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


# ---- Gradients ----

TINY = {
    "lengths_q": (2, 0, 1),
    "lengths_k": (3, 2, 0),
    "features": 2,
    "value_features": 2,
    "dtype": torch.float64,
    "poison": False,
}


@pytest.mark.parametrize("heads", [None, 2], ids=lambda heads: f"heads={heads}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_and_gradgradcheck(layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads, **TINY)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves.values()]

    def attend(*leaves):
        named = dict(zip(inputs.leaves, leaves))
        return call(inputs, named, backend="reference", need_weights=True)

    assert torch.autograd.gradcheck(attend, leaves)
    if "nested" not in layout:  # PyTorch cannot differentiate nested values() twice
        assert torch.autograd.gradgradcheck(attend, leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_function_is_the_reference_backend(layout: str):
    inputs = make_inputs(layout, heads=2)

    def shipped(inputs, leaves, **keywords):
        result = reference.additive_attention(
            *inputs.arguments(leaves), **inputs.keywords, **keywords
        )
        return (result[0].values() if result[0].is_nested else result[0]), result[1]

    through_module = check(inputs, "reference", function=shipped)
    through_backend = check(inputs, "reference")
    for name, result in through_backend.items():
        assert torch.equal(result, through_module[name]), name


def test_signature_is_that_of_the_public_function():
    ours = inspect.signature(reference.additive_attention)
    assert ours == inspect.signature(attn_ext.additive_attention)


# ---- Dropout ----


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]):
    assert philox4x32_10(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 0x299F31D0A4093822, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_dropout_mask_is_philox(seed: int, dropout_p: float):
    shape = batch, heads, queries, keys = 3, 2, 4, 5
    mask = reference.dropout_keep_mask(torch.tensor([seed]), dropout_p, torch.Size(shape))
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                for j in range(keys):
                    words = philox4x32_10([j, i, h, b], [seed & MASK, seed >> 32 & MASK])
                    kept = (words[0] >> 8) * 2.0**-24 >= dropout_p
                    assert mask[b, h, i, j].item() == kept, (b, h, i, j)


def test_first_mask_value_at_the_known_answer():
    """The first word for zeros, 0x6627E8D5, is kept up to a probability of 0x6627E8 / 2^24."""
    at = 0x6627E8 * 2.0**-24
    seed, shape = torch.zeros(1, dtype=torch.int64), torch.Size((1, 1, 1, 1))
    assert reference.dropout_keep_mask(seed, at, shape).item()
    assert not reference.dropout_keep_mask(seed, at + 2.0**-24, shape).item()


# ---- The budget itself ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["context", "dkey"])
def test_budget_refuses_more_than_it_allows(name: str, dtype: torch.dtype):
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    eager = exact.to(dtype)
    assert_within_budget(name, eager, exact, eager)
    with pytest.raises(AssertionError, match=f"{name}: error"):
        assert_within_budget(name, (exact * 1.05).to(dtype), exact, eager)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(name, eager * torch.nan, exact, eager)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(name, eager[:2], exact, eager)


def test_no_gradient_is_nan_on_its_way():
    """Nor where no key is left: PyTorch's anomaly detection, which looks at all, has no complaint.

    Such NaN would be masked before it reached an input.
    """
    inputs = make_inputs("padded_mask", poison=False)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    with torch.autograd.set_detect_anomaly(True):
        context, weights = call(inputs, leaves, backend="reference", need_weights=True)
        (context.square().sum() + weights.square().sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
