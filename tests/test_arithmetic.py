"""The arithmetic that the C++ and CUDA kernels share, against float64."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ULP = 2.0**-23
LARGEST = 9.3574  # FactoredRange<float>::kLargest

SOURCE = """
#include <cstring>
#include "arithmetic.h"
#define ATTN_EXT_ISA portable
#define ATTN_EXT_VECTOR_BYTES 16
#define ATTN_EXT_ISA_AVX512 0
#include "cpu/vec.h"
using namespace attn_ext;
template <class T, class Function>
void each_vector(const T* x, T* tanh, T* slope, long n, Function parts_of) {
  constexpr int lanes = portable::kLanes<T>;
  for (long i = 0; i + lanes <= n; i += lanes) {
    const auto parts = parts_of(portable::load<T>(x + i));
    portable::store<T>(tanh + i, parts.tanh);
    portable::store<T>(slope + i, parts.slope);
  }
}
extern "C" {
void cpu_tanh_and_slope(const float* x, float* tanh, float* slope, long n) {
  each_vector(x, tanh, slope, n, portable::tanh_parts<float>);
}
void cpu_tanh_and_slope_double(const double* x, double* tanh, double* slope, long n) {
  each_vector(x, tanh, slope, n, portable::tanh_parts<double>);
}
void cpu_small_tanh_and_slope(const float* x, float* tanh, float* slope, long n) {
  each_vector(x, tanh, slope, n, portable::small_tanh_parts<float>);
}
void exponentials(const float* x, float* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = factored_exponential(x[i]);
}
void tanh_and_slope(const float* x, float* tanh, float* slope, long n) {
  for (long i = 0; i < n; ++i) {
    const TanhSlope result = exact_tanh(x[i]);
    tanh[i] = result.tanh;
    slope[i] = result.slope;
  }
}
void sigmoid_and_slope(const float* x, float* sigmoid, float* slope, long n) {
  for (long i = 0; i < n; ++i) {
    const SigmoidSlope result = exact_sigmoid(x[i]);
    sigmoid[i] = result.sigmoid;
    slope[i] = result.slope;
  }
}
// Scores of pairs of features by the factored form, and tanh and slope of the first feature.
void factored(const float* q, const float* k, const float* w, float* score, float* tanh,
              float* slope, long n) {
  for (long i = 0; i < n; i += 2) {
    const float a0 = factored_exponential(q[i]), a1 = factored_exponential(q[i + 1]);
    const float b0 = factored_exponential(k[i]), b1 = factored_exponential(k[i + 1]);
    score[i / 2] = add_factored_pair(w[i] + w[i + 1], -2 * w[i], -2 * w[i + 1], a0, a1, b0, b1);
    float h0, h1;
    factored_pair(a0, a1, b0, b1, h0, h1);
    tanh[i / 2] = -2 * h0;
    slope[i / 2] = 4 * std::fma(-h0, h0, 0.25f);
  }
}
int in_range(float q, float k) { return in_factored_range(q, k, kSmallestMagnitudeSum); }
int informs(float smallest, float largest) { return can_inform(smallest, largest); }
void thresholds(double* out) {
  const double all[] = {kLargestWeightNorm, kLargestWeightSum, kSmallestMagnitudeSum,
                        kSmallestGradientSum, std::log(kSmallProduct) / 2,
                        std::log(kSaturatedProduct) / 2};
  std::memcpy(out, all, sizeof(all));
}
unsigned first_word(const unsigned* counter, const unsigned* key) {
  return philox(counter[0], counter[1], counter[2], counter[3], {key[0], key[1]});
}
void merge(const float* parts, long n, float* whole) {
  SoftmaxPart result{-INFINITY, 0};
  for (long i = 0; i < n; ++i) result = merge_softmax(result, {parts[2 * i], parts[2 * i + 1]});
  whole[0] = result.largest;
  whole[1] = result.total;
}
}
"""


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not (ROOT / "csrc").exists():
        pytest.skip("the tests of an installed package have no csrc/")
    folder = tmp_path_factory.mktemp("arithmetic")
    source, library = folder / "arithmetic.cpp", folder / "arithmetic.so"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(library))
    library.in_range.argtypes = library.informs.argtypes = [ctypes.c_float, ctypes.c_float]
    library.first_word.restype = ctypes.c_uint
    return library


def call(function, *tensors: Tensor, size: int) -> None:
    function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), ctypes.c_long(size))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).abs() / exact.abs()).max().item()


def test_exponentials_keep_their_relative_accuracy_over_the_range(arithmetic):
    x = torch.linspace(-LARGEST, LARGEST, 100_001)
    out = torch.empty_like(x)
    call(arithmetic.exponentials, x, out, size=x.numel())
    assert relative_error(out, (2 * x.double()).exp()) < 1.5 * ULP


def test_exact_tanh_and_slope_keep_their_relative_accuracy(arithmetic):
    size = torch.cat([torch.logspace(-30, 1.6, 100_000), torch.linspace(0.2, 0.6, 100_000)])
    x = torch.cat([size, -size])
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    call(arithmetic.tanh_and_slope, x, tanh, slope, size=x.numel())
    assert relative_error(tanh, x.double().tanh()) < 2.5 * ULP
    # exp(-2|x|) inherits the rounding of its exponent: |x| units.
    exact = 0.25 / x.double().cosh().square()
    error = (slope.double() - exact).abs() / exact / (1 + x.double().abs())
    assert error.max() < 3 * ULP


@pytest.mark.parametrize("name", ["cpu_tanh_and_slope", "cpu_small_tanh_and_slope"])
def test_tanh_of_vectors_errs_as_little_as_that_of_a_library(arithmetic, name: str):
    """Scores of large weights that nearly cancel show the error of every tanh."""
    size = torch.cat([torch.logspace(-30, -1, 50_000), torch.linspace(0.1, 0.55, 50_000)])
    if name == "cpu_tanh_and_slope":
        size = torch.cat([size, torch.linspace(0.55, 12, 100_000)])
    x = torch.cat([size, -size])
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    call(getattr(arithmetic, name), x, tanh, slope, size=x.numel())
    exact = x.double().tanh()
    last_place = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 24)
    places = (tanh.double() - exact) / last_place
    assert places.abs().max() < 1.6
    assert places.std() < 0.35  # of any correctly rounded function: 0.29
    exact = 1 / x.double().cosh().square()
    error = (slope.double() - exact).abs() / exact / (1 + x.double().abs())
    assert error.max() < 3 * ULP


def test_tanh_of_vectors_in_double_precision(arithmetic):
    double = torch.float64
    powers = torch.logspace(-300, 0, 50_000, dtype=double)
    size = torch.cat([powers, torch.linspace(0.1, 18, 50_000, dtype=double)])
    x = torch.cat([size, -size])
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    call(arithmetic.cpu_tanh_and_slope_double, x, tanh, slope, size=x.numel())
    assert relative_error(tanh, x.tanh()) < 4 * 2.0**-52
    error = (slope - 1 / x.cosh().square()).abs() * x.cosh().square() / (1 + x.abs())
    assert error.max() < 3 * 2.0**-52


def test_slopes_of_tiny_numbers_are_all_the_same(arithmetic):
    """As sum_j s_ij = 0, a slope that all keys share leaves dquery; its rounding errors do not."""
    x = torch.logspace(-30, -4, 10_000)
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    call(arithmetic.tanh_and_slope, x, tanh, slope, size=x.numel())
    assert (slope == 0.25).all()


@pytest.mark.parametrize("x, tanh", [(1e4, 1.0), (-1e4, -1.0), (math.inf, 1.0), (0.0, 0.0)])
def test_exact_tanh_at_the_ends(arithmetic, x: float, tanh: float):
    values = torch.tensor([x])
    out, slope = torch.empty(1), torch.empty(1)
    call(arithmetic.tanh_and_slope, values, out, slope, size=1)
    assert out.item() == tanh
    assert slope.item() == (0.25 if x == 0 else 0.0)


def test_sigmoid_and_slope_keep_their_relative_accuracy(arithmetic):
    """Down to subnormal numbers, of which the last place is as large as that of the smallest."""
    size = torch.cat([torch.logspace(-30, 2, 100_000), torch.linspace(0, 110, 100_000)])
    x = torch.cat([size, -size, torch.tensor([-1e4, 1e4])])
    results = torch.empty_like(x), torch.empty_like(x)
    call(arithmetic.sigmoid_and_slope, x, *results, size=x.numel())
    exact = x.double().sigmoid()
    for result, value in zip(results, (exact, exact * (-x.double()).sigmoid())):
        vanishing = torch.where(x > 0, 2.0**-53, 2.0**-149)
        assert ((result - value).abs() <= 4 * ULP * value + vanishing).all()


def factored(arithmetic, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    results = tuple(torch.empty(q.numel() // 2) for _ in range(3))
    call(arithmetic.factored, q, k, w, *results, size=q.numel())
    return results


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 9.3])
def test_factored_form_against_float64(arithmetic, scale: float):
    generator = torch.Generator().manual_seed(0)
    q, k, w = (torch.rand(200_000, generator=generator) * 2 - 1 for _ in range(3))
    q, k = q * scale, k * scale
    score, tanh, slope = factored(arithmetic, q, k, w)
    exact = (q.double() + k.double()).tanh()
    terms = (w * exact).view(-1, 2)
    weights = w.abs().double().view(-1, 2).sum(1)
    assert ((score - terms.sum(1)).abs() / weights).max() < 5 * ULP
    assert (tanh - exact[::2]).abs().max() < 3 * ULP
    # 4 r (1 - r), with an error of up to 2 units in r.
    assert (slope - (1 - exact[::2].square())).abs().max() < 8 * ULP


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_factored_form_is_finite_at_the_ends_of_its_range(arithmetic, signs):
    """Both features of a pair as large as they may be, and the largest weights."""
    q = torch.tensor([LARGEST - 1e-4, LARGEST - 1e-4]) * signs[0]
    k = torch.tensor([LARGEST - 1e-4, LARGEST - 1e-4]) * signs[1]
    w = torch.tensor([2.0**16, 2.0**16])
    score, tanh, slope = factored(arithmetic, q, k, w)
    exact = (q.double() + k.double()).tanh()
    assert abs(score.item() - (w * exact).sum().item()) <= 5 * ULP * 2.0**17
    assert abs(tanh.item() - exact[0].item()) <= 3 * ULP
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    "q, k, inside",
    [
        (1.0, 1.0, True),
        (9.35, 9.35, True),
        (9.36, 1.0, False),
        (1.0, 9.36, False),
        (0.1, 0.1, False),
        (0.2, 0.05, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, 1.0, False),
    ],
)
def test_guard(arithmetic, q: float, k: float, inside: bool):
    assert bool(arithmetic.in_range(q, k)) == inside


def test_triton_has_the_same_thresholds(arithmetic):
    pytest.importorskip("triton")
    from attn_ext.triton_kernels import route

    thresholds = torch.empty(6, dtype=torch.float64)
    arithmetic.thresholds(ctypes.c_void_p(thresholds.data_ptr()))
    assert thresholds.tolist() == pytest.approx(
        [
            route.LARGEST_WEIGHT_NORM.value,
            route.LARGEST_WEIGHT_SUM.value,
            route.SMALLEST_MAGNITUDE_SUM.value,
            route.SMALLEST_GRADIENT_SUM.value,
            route.SMALL_MAGNITUDE.value,
            route.SATURATED_MAGNITUDE.value,
        ],
        rel=1e-5,
    )


@pytest.mark.parametrize(
    "low, high, informs",
    [(-0.5, 0.5, True), (2.0, 3.0, False), (-3.0, -2.0, False), (-0.1, 0.1, False), (0, 2, True)],
)
def test_informative_features(arithmetic, low: float, high: float, informs: bool):
    """``low`` and ``high`` are of q + k: nearly 0, or nearly +-1 in tanh, tells nothing."""
    assert bool(arithmetic.informs(math.exp(2 * low), math.exp(2 * high))) == informs


@pytest.mark.parametrize(
    "counter, key, word",
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            0xD16CFE09,
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(arithmetic, counter, key, word: int):
    """The known answers that come with Random123, the authors' library."""
    words = (ctypes.c_uint * 4)(*counter), (ctypes.c_uint * 2)(*key)
    assert arithmetic.first_word(*words) == word


def test_merged_softmax_is_that_of_the_whole(arithmetic):
    scores = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 20
    scores[3] = -math.inf  # a part of which nothing is left
    largest = scores.amax(1)
    totals = (scores - largest.clamp(min=-1e30)[:, None]).exp().sum(1)
    parts, whole = torch.stack([largest, totals], 1).contiguous(), torch.empty(2)
    arithmetic.merge(
        ctypes.c_void_p(parts.data_ptr()), ctypes.c_long(7), ctypes.c_void_p(whole.data_ptr())
    )
    exact = (scores.double() - scores.double().max()).exp().sum()
    assert whole[0] == scores.max()
    assert abs(whole[1].item() - exact.item()) < 1e-6 * exact.item()
