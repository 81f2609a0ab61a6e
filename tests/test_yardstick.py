"""What the tests measure with: random roundings, and that errors of some size are seen."""

import pytest
import torch
from helpers import call as attend
from helpers import check
from layouts import make_inputs
from torch import Tensor
from yardstick import RandomRounding


def test_what_float32_holds_stays():
    held = torch.tensor([0.0, 1.0, -3.0, 2.0**-20, 1 + 2.0**-23], dtype=torch.float64)
    assert torch.equal(RandomRounding(0).vary(held), held)
    assert RandomRounding(0).tanh(torch.tensor([30.0], dtype=torch.float64)).item() == 1


def test_roundings_are_to_either_side_and_unbiased():
    exact = torch.linspace(1, 2, 100_001, dtype=torch.float64)
    parts = (RandomRounding(0).vary(exact) - exact) * 2**23  # of a unit in the last place
    assert parts.abs().max() < 1
    assert parts.mean().abs() < 0.01
    assert parts.std() == pytest.approx(6**-0.5, rel=0.02)  # of stochastic rounding
    assert not torch.equal(RandomRounding(1).vary(exact), RandomRounding(0).vary(exact))


def test_roundings_among_subnormal_numbers():
    """Where float32's last place is 2^-149, whatever the number."""
    exact = torch.linspace(2.0**-147, 2.0**-140, 10_001, dtype=torch.float64)
    rounded = RandomRounding(0).vary(exact)
    assert torch.equal(rounded.float().double(), rounded)
    assert (rounded - exact).std() == pytest.approx(6**-0.5 * 2.0**-149, rel=0.05)


def test_roundings_of_float64():
    """To a neighbour, as far on average as stochastic rounding; short numbers stay."""
    rounding = RandomRounding(0, torch.float64)
    exact = torch.linspace(1, 2, 100_001, dtype=torch.float64)[1:-1] + 1e-13
    places = (rounding.vary(exact) - exact) * 2.0**52
    assert places.unique().tolist() == [-1, 0, 1]
    assert places.mean().abs() < 0.01
    assert places.std() == pytest.approx(6**-0.5, rel=0.02)
    held = torch.tensor([0.0, 1.0, -3.0], dtype=torch.float64)
    assert torch.equal(rounding.vary(held), held)


def test_calculations_take_turns_in_the_slope_of_tanh():
    """1 - tanh^2 is 0 where tanh rounds to 1; 1 / cosh^2 is not."""
    slopes = []
    for seed in range(4):
        x = torch.tensor([15.0], dtype=torch.float64, requires_grad=True)
        RandomRounding(seed).tanh(x).backward()
        slopes.append(x.grad.item() > 0)
    assert slopes == [False, False, True, True]


def test_sums_are_sums():
    terms = torch.arange(35, dtype=torch.float64).view(5, 7)  # whole numbers are not rounded
    assert torch.equal(RandomRounding(0).sum(terms, 0), terms.sum(0))
    assert torch.equal(RandomRounding(0).sum(terms, 1), terms.sum(1))
    assert torch.equal(RandomRounding(0).sum(terms[:, :0], 1), torch.zeros(5).double())


@pytest.mark.parametrize(
    ("scale", "lengths_k", "error"), [(1.0, (7, 9), 1e-5), (1e4, (7, 9), 1e-6), (1.0, (1, 1), 1e-6)]
)
def test_errors_of_gradients_are_seen(scale: float, lengths_k: tuple[int, int], error: float):
    """Where softmax saturates, or has one key, eager's gradients are nearly or exactly 0."""
    inputs = make_inputs("padded", lengths_q=(5, 5), lengths_k=lengths_k, scale=scale, poison=False)
    check(inputs, "reference")

    def broken(inputs, leaves: dict[str, Tensor], **keywords):
        context, weights = attend(inputs, leaves, **keywords)
        query = leaves["query"]
        return context + error * (query - query.detach()).sum(), weights

    with pytest.raises(AssertionError, match="dquery"):
        check(inputs, "reference", function=broken)
