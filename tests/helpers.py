"""What all tests share: inputs by layout, the float64 yardstick, and the error budget.

The yardstick is written from the formulas of the paper, one sequence at a time and independently
of ``attn_ext``. Every comparison goes through :func:`assert_within_budget`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import attn_ext
from attn_ext import backends
from attn_ext.reference import draw_seed, dropout_keep_mask

# Backends and the device their tensors are on. Under Triton's interpreter, which has to be chosen
# before a kernel is imported, its backend is tested alone, on CPU tensors.
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKEND_DEVICES = {"triton": "cpu"}
elif torch.cuda.is_available():
    BACKEND_DEVICES = {"cpu": "cpu", "reference": "cpu", "triton": "cuda", "cuda": "cuda"}
else:
    BACKEND_DEVICES = {"cpu": "cpu", "reference": "cpu"}

INPUT_NAMES = ("query", "key", "value", "score_weight")

LAYOUTS = (
    "padded",
    "padded_lengths",
    "padded_mask",
    "one_step",
    "one_step_lengths",
    "one_step_mask",
    "jagged",
    "jagged_one_step",
    "nested",
    "nested_one_step",
    "nested_keys",  # padded queries (B, Tq, D) over nested keys
    "nested_query",  # nested queries over jagged keys and their offsets
    "nested_keys_jagged_query",
)
ONE_STEP_LAYOUTS = tuple(name for name in LAYOUTS if "one_step" in name)
JAGGED_KEY_LAYOUTS = tuple(name for name in LAYOUTS if "jagged" in name or "nested" in name)
JAGGED_QUERY_LAYOUTS = ("jagged", "nested", "nested_query", "nested_keys_jagged_query")

# Sequence lengths in which every kind of sequence occurs: plain, without queries, without keys,
# with neither, and of length 1.
LENGTHS_Q = (3, 0, 2, 0, 5, 1)
LENGTHS_K = (7, 4, 0, 0, 13, 1)


def require_backend(name: str) -> str:
    """The name, or a visible skip where the backend is missing."""
    problem = backends.problem(name, torch.device(BACKEND_DEVICES[name]))
    if problem is not None:
        pytest.skip(f"backend {name}: {problem}")
    return name


def require_dtype(backend: str, dtype: torch.dtype) -> None:
    """A visible skip where the backend does not compute in ``dtype``."""
    if dtype == torch.float64 and backend not in backends.IN_DOUBLE:
        pytest.skip(f"backend {backend} does not compute in float64")


# ---- The error budget: section 3 of the contract, and the only tolerances of the suite. ----

FORWARD_FACTOR = 2
GRADIENT_FACTOR = 3
# What is allowed beyond the multiple of eager's error, as a part of the result's scale. The
# contract gives 1e-6 for float32. Lower precisions compute in float32 and add one rounding of the
# result: half a unit in its last place. For float64 it is 1e-6 in the ratio of the precisions.
SCALE_EPSILON = {
    torch.float64: 1e-6 * 2.0**-29,
    torch.float32: 1e-6,
    torch.float16: 1e-6 + 2.0**-11,
    torch.bfloat16: 1e-6 + 2.0**-8,
}


def error_budget(
    name: str, dtype: torch.dtype, eager_error: float | Tensor, scale: float | Tensor
) -> float | Tensor:
    """The largest error allowed to a result of ``dtype``; gradients are called ``d...``."""
    factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
    if dtype == torch.float64:
        factor += 1  # the yardstick itself errs as eager does
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return factor * eager_error + SCALE_EPSILON[dtype] * scale + subnormal


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Compare with the float64 ``exact``, allowing a multiple of the error that ``eager`` makes.

    Args:
        name: what is compared; gradients are called ``d...``.
        actual: the result to judge.
        exact: the float64 yardstick.
        eager: what hand-written PyTorch gives in the dtype of the inputs.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    actual_error = (actual.double() - exact).abs()
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} values are not finite"
    eager_error = (eager.double() - exact).abs().max()
    scale = exact.abs().max()
    budget = error_budget(name, actual.dtype, eager_error, scale)
    assert actual_error.max() <= budget, (
        f"{name}: error {actual_error.max():.3e} exceeds {budget:.3e} (eager: {eager_error:.3e}, "
        f"scale {scale:.3e}) in shape {tuple(actual.shape)} at flat index {actual_error.argmax()}"
    )


# ---- Inputs ----


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, and which of their rows belong to which sequence."""

    layout: str
    leaves: dict[str, Tensor]  # by INPUT_NAMES; nested ones as their values
    keywords: dict[str, object]
    query_rows: list[tuple]  # for each sequence, the index of its queries
    key_rows: list[tuple]  # for each sequence, the index of its keys that are not ignored
    columns: list[Tensor]  # positions of those keys in their sequence
    max_seqlen_q: int
    max_seqlen_k: int
    offsets_q: Tensor | None = None  # of nested queries
    offsets_k: Tensor | None = None  # of nested keys

    @property
    def has_heads(self) -> bool:
        return self.leaves["score_weight"].dim() == 2

    @property
    def num_heads(self) -> int:
        return self.leaves["score_weight"].size(0) if self.has_heads else 1

    @property
    def is_one_step(self) -> bool:
        return self.layout in ONE_STEP_LAYOUTS

    @property
    def weights_are_jagged(self) -> bool:
        return self.layout in ("jagged_one_step", "nested_one_step")

    @property
    def dense_weights_shape(self) -> tuple[int, int, int, int]:
        return len(self.query_rows), self.num_heads, self.max_seqlen_q, self.max_seqlen_k

    def owned(self, name: str, rows: list[tuple]) -> Tensor:
        """Which places of an input, without its head and feature axes, ``rows`` cover."""
        leaf = self.leaves[name]
        return _owned(leaf.shape[: leaf.dim() - (2 if self.has_heads else 1)], rows)

    def with_leaves(self, **leaves: Tensor) -> "Inputs":
        return replace(self, leaves={**self.leaves, **leaves})

    def with_keywords(self, **keywords: object) -> "Inputs":
        return replace(self, keywords={**self.keywords, **keywords})

    def to(self, dtype: torch.dtype) -> "Inputs":
        return replace(self, leaves={name: leaf.to(dtype) for name, leaf in self.leaves.items()})

    def arguments(self, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The tensors of the call, made nested where the layout is."""
        query, key, value, score_weight = (leaves[name] for name in INPUT_NAMES)
        if self.offsets_q is not None:
            query = nest(query, self.offsets_q)
        if self.offsets_k is not None:
            key, value = nest(key, self.offsets_k), nest(value, self.offsets_k)
        return query, key, value, score_weight


def nest(values: Tensor, offsets: Tensor) -> Tensor:
    """A jagged nested tensor over ``values``."""
    lengths = offsets.diff().tolist()
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, min_seqlen=shortest, max_seqlen=longest
    )


def offsets_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Offsets ``(B + 1,)`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@dataclass(frozen=True)
class _Side:
    """Where the rows of queries, or of keys, of every sequence are."""

    places: tuple[int, ...]  # the axes before heads and features
    rows: list[tuple]
    columns: list[Tensor]
    max_seqlen: int
    keywords: dict[str, Tensor]
    offsets: Tensor | None = None  # of a nested tensor


def _query_side(
    layout: str, lengths: Sequence[int], batch: int, index_dtype: torch.dtype, tail_rows: int
) -> _Side:
    if layout in ONE_STEP_LAYOUTS:
        rows: list[tuple] = [(slice(b, b + 1),) for b in range(batch)]
        return _Side((batch,), rows, [], 1, {})
    assert len(lengths) == batch
    if layout in JAGGED_QUERY_LAYOUTS:
        nested = layout in ("nested", "nested_query")
        return _jagged_side("cu_seqlens_q", lengths, index_dtype, tail_rows, nested)
    longest = max(lengths, default=0)
    return _Side((batch, longest), [(b,) for b in range(batch)], [], longest, {})


def _key_side(
    layout: str,
    lengths: Sequence[int],
    index_dtype: torch.dtype,
    tail_rows: int,
    key_padding_mask: Tensor | None,
    generator: torch.Generator,
) -> _Side:
    if layout in JAGGED_KEY_LAYOUTS:
        nested = "nested" in layout and layout != "nested_query"
        return _jagged_side("cu_seqlens_k", lengths, index_dtype, tail_rows, nested)
    places = len(lengths), max(lengths, default=0)
    ignored = torch.zeros(places, dtype=torch.bool)
    keywords = {}
    if "lengths" in layout:
        keywords["key_lengths"] = torch.tensor(lengths, dtype=index_dtype)
        ignored = torch.arange(places[1]) >= keywords["key_lengths"][:, None]
    elif "mask" in layout:
        ignored = key_padding_mask
        if ignored is None:
            ignored = torch.rand(places, generator=generator) < 0.4
            ignored[1::3] = True  # whole sequences too
        keywords["key_padding_mask"] = ignored
    columns = [(~row).nonzero()[:, 0].cpu() for row in ignored]
    return _Side(places, list(enumerate(columns)), columns, places[1], keywords)


def _jagged_side(
    name: str, lengths: Sequence[int], index_dtype: torch.dtype, tail_rows: int, nested: bool
) -> _Side:
    offsets = offsets_of(lengths, index_dtype)
    bounds = offsets.tolist()
    return _Side(
        (sum(lengths) + (0 if nested else tail_rows),),
        [(slice(start, end),) for start, end in zip(bounds, bounds[1:])],
        [torch.arange(length) for length in lengths],
        max(lengths, default=0),
        {} if nested else {name: offsets},
        offsets if nested else None,
    )


def make_inputs(
    layout: str,
    *,
    lengths_q: Sequence[int] = LENGTHS_Q,
    lengths_k: Sequence[int] = LENGTHS_K,
    features: int = 16,
    value_features: int = 8,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    index_dtype: torch.dtype = torch.int64,
    key_padding_mask: Tensor | None = None,
    tail_rows: int = 2,
    strides: str = "contiguous",
    poison: bool = True,
    seed: int = 0,
) -> Inputs:
    """Random inputs of a layout, on the default device, which is that of the backend tested.

    Args:
        layout: one of LAYOUTS.
        lengths_q, lengths_k: of each sequence; padded layouts pad to the longest.
        features, value_features: D and Dv.
        heads: None for no head axis.
        dtype: of all four tensors.
        scale: magnitude of queries and keys.
        index_dtype: of offsets and lengths.
        key_padding_mask: for ``*_mask`` layouts, instead of a random one.
        tail_rows: rows past the last offset of jagged layouts.
        strides: how the tensors lie in memory, see :func:`with_strides`.
        poison: fill what belongs to nobody with NaN.
        seed: of the random numbers.
    """
    device = torch.get_default_device()
    head_axis = () if heads is None else (heads,)
    with torch.device("cpu"):  # the same numbers on every device
        generator = torch.Generator().manual_seed(seed)
        queries = _query_side(layout, lengths_q, len(lengths_k), index_dtype, tail_rows)
        keys = _key_side(layout, lengths_k, index_dtype, tail_rows, key_padding_mask, generator)
        shapes = {
            "query": (*queries.places, *head_axis, features),
            "key": (*keys.places, *head_axis, features),
            "value": (*keys.places, *head_axis, value_features),
            "score_weight": (*head_axis, features),
        }
        leaves = {name: _randn(shape, generator) for name, shape in shapes.items()}
        leaves["query"] *= scale
        leaves["key"] *= scale
        leaves["score_weight"] *= 2 * max(features, 1) ** -0.5
        if poison:
            leaves["query"][~_owned(queries.places, queries.rows)] = torch.nan
            for name in ("key", "value"):
                leaves[name][~_owned(keys.places, keys.rows)] = torch.nan
    return Inputs(
        layout,
        {name: with_strides(leaf.to(device, dtype), strides) for name, leaf in leaves.items()},
        {name: index.to(device) for name, index in (queries.keywords | keys.keywords).items()},
        queries.rows,
        keys.rows,
        keys.columns,
        queries.max_seqlen,
        keys.max_seqlen,
        None if queries.offsets is None else queries.offsets.to(device),
        None if keys.offsets is None else keys.offsets.to(device),
    )


def with_strides(tensor: Tensor, kind: str) -> Tensor:
    """The same values otherwise laid out in memory: contiguous, transposed, reversed or sliced."""
    if kind == "contiguous":
        return tensor.contiguous()
    if kind == "transposed":  # the last two axes
        if tensor.dim() < 2:
            return tensor
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "reversed":  # the first axis is the densest
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    assert kind == "sliced"  # every second element of every axis, NaN between
    buffer = tensor.new_full([2 * size + 1 for size in tensor.shape], torch.nan)
    view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _owned(places: tuple[int, ...], rows: list[tuple]) -> Tensor:
    """Which places belong to a sequence and are not ignored."""
    owned = torch.zeros(places, dtype=torch.bool, device="cpu")
    for index in rows:
        owned[index] = True
    return owned


# ---- The yardstick ----


class _ExactTanh(torch.autograd.Function):
    """tanh whose derivative, 1 / cosh^2, stays exact where 1 - tanh^2 cancels."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x.cosh().square()


exact_tanh = _ExactTanh.apply


class RandomRounding:
    """Arithmetic in which every result is rounded, up or down at random.

    To float32 up by as large a chance as it lies near to the number above (stochastic rounding, a
    Monte Carlo arithmetic as of Parker 1997): so one calculation stands for all that round,
    whatever the luck of the numbers at hand, and what float32 holds exactly stays exact. Gradients
    are rounded likewise. As with any rounding, results of an operation that are about equal err
    alike. Numbers are kept in float64.

    In float64 itself, what is lost cannot be told from the result: it is moved to a neighbour as
    often as gives the same mean error, unless it is short enough to be exact.

    Calculations take turns in what hand-written code may choose: whether gradients are summed
    over queries or keys first, and whether tanh has the slope 1 - tanh^2, which is exactly 0 where
    tanh rounds to 1, or 1 / cosh^2.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        self.queries_first = seed % 2 == 0
        self.slope_of_tanh = seed % 4 < 2
        self.dtype = dtype
        self.operation = seed << 20

    def vary(self, x: Tensor) -> Tensor:
        self.operation += 1
        bits = x.contiguous().view(torch.int64) >> 29  # those that float32 has
        bits = bits + self.operation * 0x5851F42D4C957F2D % 2**63
        for _ in range(2):  # mixes them: the high ones then depend on all
            bits = (bits ^ (bits >> 29)) * 0x369DEA0F31A53F85
        chance = (bits >> 33).double() / 2**31  # from -1/2 to 1/2
        exponent = x.frexp().exponent
        if self.dtype == torch.float32:
            last_place = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-125) - 24)
            moved = (x + chance * last_place).float().double()
        else:
            # Rounding moves it where |1.2 chance| > 1/2, a time in six: the variance is 1/6 too.
            moved = x + 1.2 * chance * torch.ldexp(torch.ones_like(x), exponent - 53)
        return torch.where(x.float().double() == x, x, moved)

    def __call__(self, x: Tensor) -> Tensor:
        return _Varied.apply(x, self)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        """By pairs, sums of pairs and so on, each of which is rounded."""
        while x.size(axis) > 1:
            even = x.size(axis) // 2 * 2
            pairs, last = x.split([even, x.size(axis) - even], axis)
            x = torch.cat([self(pairs.unflatten(axis, (-1, 2)).sum(axis + 1)), last], axis)
        return x.sum(axis)

    def tanh(self, x: Tensor) -> Tensor:
        return _VariedTanh.apply(x, self)

    def expand(self, x: Tensor, queries: int, keys: int) -> Tensor:
        """``[queries, keys, ...]``; its gradient is summed over either of them first."""
        if self.queries_first:
            return self.input(self.input(x).expand(keys, *x.shape)).expand(queries, keys, *x.shape)
        by_query = self.input(self.input(x).expand(queries, *x.shape))
        return by_query.unsqueeze(1).expand(queries, keys, *x.shape)

    def input(self, x: Tensor) -> Tensor:
        """The same numbers, of which only gradients are rounded."""
        return _VariedGradient.apply(x, self)

    def softmax(self, x: Tensor) -> Tensor:
        """Over axis 1, which may be empty."""
        powers = (x - x.detach().amax(1, keepdim=True)).exp() if x.size(1) else x
        return self(self(powers) / self.sum(self(powers), 1).unsqueeze(1))


class _Varied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounding: RandomRounding) -> Tensor:
        ctx.rounding = rounding
        return rounding.vary(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.rounding.vary(gradient), None


class _VariedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounding: RandomRounding) -> Tensor:
        ctx.rounding = rounding
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.rounding.vary(gradient), None


class _VariedTanh(torch.autograd.Function):
    """Whose derivative is, in half of the calculations, 1 - tanh^2 of the rounded tanh."""

    @staticmethod
    def forward(ctx, x: Tensor, rounding: RandomRounding) -> Tensor:
        ctx.rounding = rounding
        result = rounding.vary(x.tanh())
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, result = ctx.saved_tensors
        rounding = ctx.rounding
        if rounding.slope_of_tanh:
            slope = 1 - rounding.vary(result * result)
        else:
            slope = 1 / x.cosh().square()
        return rounding.vary(gradient * rounding.vary(slope)), None


def formula(
    inputs: Inputs,
    leaves: dict[str, Tensor],
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    tanh: Callable[[Tensor], Tensor] = torch.tanh,
    reverse: bool = False,
    rounding: RandomRounding | None = None,
) -> tuple[Tensor, Tensor]:
    """Additive attention by the formulas of the paper, a sequence at a time, in leaves' dtype.

    Args:
        inputs: the layout.
        leaves: the tensors by INPUT_NAMES.
        keep: which attention weights ``[B, H, Tq, Tk]`` dropout keeps.
        dropout_p: the probability that they were dropped with.
        tanh: the function itself.
        reverse: sum over queries, keys and features in the opposite order.
        rounding: applied to every result; leaves are in float64.

    Returns:
        context and weights as the public function shapes them (nested ones as their values).
    """
    query, key, value, score_weight = (leaves[name] for name in INPUT_NAMES)
    if not inputs.has_heads:
        query, key, value = (t.unsqueeze(-2) for t in (query, key, value))
        score_weight = score_weight.unsqueeze(0)
    if reverse:
        query, key, score_weight = query.flip(-1), key.flip(-1), score_weight.flip(-1)
    context = value.new_zeros(*query.shape[:-1], value.size(-1))
    dense = value.new_zeros(inputs.dense_weights_shape)
    jagged = value.new_zeros(key.shape[:-1])
    for b, (query_row, key_row) in enumerate(zip(inputs.query_rows, inputs.key_rows)):
        queries, keys, values = query[query_row], key[key_row], value[key_row]
        if reverse:
            queries, keys, values = queries.flip(0), keys.flip(0), values.flip(0)
        if rounding is None:
            hidden = tanh(queries[:, None] + keys[None])  # [Tq, Tk, H, D]
            scores = (hidden * score_weight).sum(-1)
            alpha = scores.softmax(1).to(value.dtype)  # [Tq, Tk, H]
        else:
            hidden = rounding.tanh(rounding(queries[:, None] + keys[None]))
            weight = rounding.expand(score_weight, *hidden.shape[:2])
            scores = rounding.sum(rounding(hidden * weight), 3)
            alpha = rounding.softmax(scores)
        if keep is not None:
            kept = keep[b, :, : len(queries), inputs.columns[b]]  # [H, Tq, Tk]
            kept = kept.permute(1, 2, 0)
            alpha = alpha * (kept.flip(0, 1) if reverse else kept) / (1 - dropout_p)
        if rounding is None:
            contexts = torch.einsum("qkh,khv->qhv", alpha, values)
        else:
            contexts = rounding.sum(rounding(alpha.unsqueeze(-1) * values), 1)
        if reverse:
            contexts, alpha = contexts.flip(0), alpha.flip(0, 1)
        context[query_row] = contexts
        if inputs.weights_are_jagged:
            jagged[key_row] = alpha[0]
        else:
            dense[b, :, : len(queries), inputs.columns[b]] = alpha.permute(2, 0, 1)
    if inputs.weights_are_jagged:
        weights = jagged if inputs.has_heads else jagged.squeeze(-1)
    else:
        weights = dense.squeeze(2) if inputs.is_one_step else dense
        weights = weights if inputs.has_heads else weights.squeeze(1)
    return context if inputs.has_heads else context.squeeze(-2), weights


def draw_keep(inputs: Inputs, dropout_p: float, seed: int) -> Tensor:
    """Which weights a call right after ``torch.manual_seed(seed)`` keeps; leaves it seeded so."""
    device = inputs.leaves["query"].device
    torch.manual_seed(seed)
    keep = dropout_keep_mask(draw_seed(device), dropout_p, torch.Size(inputs.dense_weights_shape))
    torch.manual_seed(seed)
    return keep


# ---- Calling and comparing ----

Results = dict[str, Tensor]  # "context", "weights", and gradients "dquery" ...


def differentiate(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]],
    leaves: dict[str, Tensor],
    incoming: dict[str, Tensor],
    wanted: Sequence[str] = INPUT_NAMES,
) -> Results:
    """Call ``function`` on fresh leaves and collect its results and the ``wanted`` gradients."""
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    context, weights = function(leaves)
    results = {"context": context} if weights is None else {"context": context, "weights": weights}
    roots = [name for name in incoming if results[name].requires_grad]
    torch.autograd.backward(
        [results[name] for name in roots],
        [incoming[name].to(results[name].dtype) for name in roots],
    )
    for name in wanted:
        results[f"d{name}"] = leaves[name].grad
    return {name: None if result is None else result.detach() for name, result in results.items()}


def incoming_gradients(inputs: Inputs, need_weights: bool, seed: int = 1) -> dict[str, Tensor]:
    """Random incoming gradients, in value's dtype, of the context and the weights."""
    generator = torch.Generator("cpu").manual_seed(seed)
    results = formula(inputs, inputs.leaves)[: 2 if need_weights else 1]
    return {
        name: _randn(tuple(result.shape), generator).to(result)
        for name, result in zip(("context", "weights"), results)
    }


def call(inputs: Inputs, leaves: dict[str, Tensor], **keywords: object):
    """``attn_ext.additive_attention`` as ``(context, weights or None)``, nested ones as values."""
    result = attn_ext.additive_attention(*inputs.arguments(leaves), **inputs.keywords, **keywords)
    context, weights = result if isinstance(result, tuple) else (result, None)
    assert context.is_nested == (inputs.offsets_q is not None)
    return context.values() if context.is_nested else context, weights


# How many calculations with random roundings tell whether eager's error was small by luck: more,
# look after look, while a result exceeds the budget. Of thousands of random calls some err as only
# one calculation in fifty does.
LOOKS = (0, 16, 64)


def worst(exact: Results, *others: Results) -> Results:
    """The exact results off by the largest error, at every element, that ``others`` have."""
    errors = ([(other[name].double() - exact[name]).abs() for other in others] for name in exact)
    return {name: exact[name] + torch.stack(error).amax(0) for name, error in zip(exact, errors)}


def yardsticks(
    inputs: Inputs,
    incoming: dict[str, Tensor],
    wanted: Sequence[str] = INPUT_NAMES,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    samples: int = 0,
) -> tuple[Results, Results]:
    """Results in float64, and as wrong as hand-written PyTorch makes them in the inputs' dtypes.

    Rounding errors are random, and one element's may happen to be small. So eager code is run in
    two orders of summation, and the second results returned have at every element the larger error.

    That is enough where many elements share about the same error, not in a call of one or two
    elements, or whose results nearly cancel: sums of a few short numbers are exact, and what is
    added to itself and taken away again is too. ``samples`` then adds the errors of so many
    calculations whose every result is rounded at random (see :class:`RandomRounding`), to float32,
    as nobody expects more of low precision, or to float64.
    """

    def by_formula(
        leaves: dict[str, Tensor],
        incoming: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        **how,
    ) -> Results:
        leaves = {name: leaf.to(dtype or leaf.dtype) for name, leaf in leaves.items()}
        results = differentiate(
            lambda leaves: formula(inputs, leaves, keep, dropout_p, **how),
            leaves,
            incoming,
            wanted,
        )
        for name in wanted:  # what no result depends on
            if results[f"d{name}"] is None:
                results[f"d{name}"] = torch.zeros_like(leaves[name])
        return {name: result.double() for name, result in results.items()}

    def errors(leaves: dict[str, Tensor], incoming: dict[str, Tensor]) -> tuple[Results, Results]:
        exact = by_formula(leaves, incoming, torch.float64, tanh=exact_tanh)
        eager = by_formula(leaves, incoming), by_formula(leaves, incoming, reverse=True)
        largest = {name: result - exact[name] for name, result in worst(exact, *eager).items()}
        if leaves["query"].dtype == torch.float64:
            # Most of eager's error is the yardstick's own, and not seen. In float32 it is.
            seen = errors({name: leaf.float() for name, leaf in leaves.items()}, incoming)[1]
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            largest = {name: error.maximum(ratio * seen[name]) for name, error in largest.items()}
        return exact, largest

    exact, largest = errors(inputs.leaves, incoming)
    computed_in = torch.promote_types(inputs.leaves["query"].dtype, torch.float32)
    for sample in range(samples):
        rounding = RandomRounding(sample, computed_in)
        rounded = by_formula(inputs.leaves, incoming, torch.float64, rounding=rounding)
        for name, result in rounded.items():
            largest[name] = largest[name].maximum((result - exact[name]).abs())
    return exact, {name: result + largest[name] for name, result in exact.items()}


def check(
    inputs: Inputs,
    backend: str,
    *,
    need_weights: bool = True,
    wanted: Sequence[str] = INPUT_NAMES,
    incoming: dict[str, Tensor] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    function: Callable[..., tuple[Tensor, Tensor | None]] = call,
) -> Results:
    """Compare results and gradients with the float64 yardstick; return them.

    Args:
        inputs: what to call with.
        backend: its name.
        need_weights: ask for weights, and differentiate through them too.
        wanted: inputs that require gradients.
        incoming: gradients of context (and weights); None draws them.
        dropout_p: drop with this probability, the seed being set to ``seed``.
        seed: for dropout.
        function: called as :func:`call`.
    """
    require_dtype(backend, inputs.leaves["query"].dtype)
    if incoming is None:
        incoming = incoming_gradients(inputs, need_weights)
    keywords = {"backend": backend, "need_weights": need_weights}
    keep = None
    if dropout_p:
        keep = draw_keep(inputs, dropout_p, seed)
        keywords["dropout_p"] = dropout_p
    actual = differentiate(
        lambda leaves: function(inputs, leaves, **keywords), inputs.leaves, incoming, wanted
    )
    for samples in LOOKS:
        measures = yardsticks(inputs, incoming, wanted, keep, dropout_p, samples)
        try:
            compare(inputs, actual, *measures)
        except AssertionError:  # eager may have been right by luck
            if samples == LOOKS[-1]:
                raise
        else:
            break
    return actual


def compare(inputs: Inputs, actual: Results, exact: Results, eager: Results) -> None:
    """Hold every result to the budget, and what belongs to nobody to exact zeros."""
    for name, result in actual.items():
        assert result is not None, f"{name}: no gradient arrived"
        expected_dtype = inputs.leaves[name[1:] if name[1:] in INPUT_NAMES else "value"].dtype
        assert result.dtype == expected_dtype, f"{name}: {result.dtype}, not {expected_dtype}"
        assert_within_budget(name, result, exact[name], eager[name])
    live = [len(columns) > 0 for columns in inputs.columns]
    queries = inputs.owned("query", [row for row, lives in zip(inputs.query_rows, live) if lives])
    keys = inputs.owned("key", inputs.key_rows)
    for name, owned in (
        ("context", queries),
        ("dquery", queries),
        ("dkey", keys),
        ("dvalue", keys),
    ):
        if name in actual:
            assert (actual[name][~owned] == 0).all(), f"{name}: rows of nobody are not exactly 0"
    if "weights" in actual:
        outside = actual["weights"][exact["weights"] == 0]
        assert (outside == 0).all(), "weights: not exactly 0 where nothing is attended"
