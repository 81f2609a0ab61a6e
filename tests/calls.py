"""Whole calls drawn by Hypothesis: what they are made of, and the tensors they stand for.

A :class:`Call` holds plain numbers and names only, so that its JSON reproduces it anywhere. All
numbers are drawn from ranges within +-99: Hypothesis sometimes draws larger ones from the constants
of whatever modules are loaded, and a seed would then stand for other calls as code changes.
"""

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import hypothesis
import torch
from hypothesis import strategies as st
from layouts import (
    INPUT_NAMES,
    JAGGED_KEY_LAYOUTS,
    JAGGED_QUERY_LAYOUTS,
    LAYOUTS,
    ONE_STEP_LAYOUTS,
    Inputs,
    make_inputs,
    with_strides,
)
from torch import Tensor

from attn_ext.backends import IN_DOUBLE

STRIDES = ("contiguous", "transposed", "reversed", "sliced")
# Triples (i, j, d) of a call and its heads, for the time of the eager formulas in float64.
LARGEST_CALL = 200_000
LARGEST_INTERPRETED = 2_000


@dataclass(frozen=True)
class Call:
    """One call of ``additive_attention`` and of its backward pass."""

    layout: str
    lengths_q: tuple[int, ...]  # of each sequence; padded layouts pad to the longest
    lengths_k: tuple[int, ...]
    heads: int | None
    features: int
    value_features: int
    dtypes: tuple[str, str, str]  # of query and key, of value, of score_weight
    strides: tuple[str, str, str]  # of query, key and value
    incoming: str  # strides of the incoming gradients, or "expanded": one number everywhere
    index_dtype: str
    tail_rows: int
    magnitudes: tuple[int, int, int, int]  # of INPUT_NAMES, in tenths of a power of ten
    ignored: int  # percentage of keys that a mask ignores
    dropout: int  # percentage
    need_weights: bool
    wanted: tuple[str, ...]  # inputs that require gradients
    deterministic: bool | None
    bounds: str  # max_seqlen_q and max_seqlen_k: absent, exact or larger
    seed: int  # of the numbers in the tensors

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Call":
        values = json.loads(text)
        frozen = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return Call(**{field.name: frozen[field.name] for field in fields(Call)})


# ---- Drawing ----

BATCHES = st.sampled_from((0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 7))
SHORT = st.one_of(st.sampled_from((0, 1, 2)), st.integers(0, 9), st.integers(0, 40))
VERY_SHORT = st.sampled_from((0, 1, 2, 3, 5, 9))
LONG = st.sampled_from((64, 65, 97, 127, 128, 129, 200, 257, 300, 511, 1000))
FEW_FEATURES = st.one_of(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from((31, 32, 33, 47, 61, 64, 65, 67, 70))
)
MANY_FEATURES = st.sampled_from((97, 127, 128, 129, 200, 257, 384, 511, 640))
SINGLE = ("float32",) * 3
DTYPES = st.sampled_from(
    (
        *(SINGLE, SINGLE, SINGLE, SINGLE),
        *(("float16",) * 3, ("bfloat16",) * 3),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float16", "float16", "float32"),
        ("float32", "float16", "bfloat16"),
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float16"),
    )
)
DOUBLE = ("float64",) * 3


def _one_in(n: int) -> st.SearchStrategy[bool]:
    return st.sampled_from((False,) * (n - 1) + (True,))


def _counts(few: st.SearchStrategy, many: st.SearchStrategy) -> st.SearchStrategy[int]:
    return _one_in(12).flatmap(lambda is_many: many if is_many else few)


@st.composite
def calls(draw, in_double: bool = True, small: bool = False) -> Call:
    """Calls of every layout.

    Args:
        draw: given by Hypothesis.
        in_double: with float64 among the dtypes.
        small: what Triton's interpreter computes in about a second.
    """
    layout = draw(st.sampled_from(LAYOUTS))
    short = VERY_SHORT if small else SHORT
    batches = st.sampled_from((1, 2, 2, 3)) if small else BATCHES
    lengths_k = draw(batches.flatmap(lambda n: st.lists(short, min_size=n, max_size=n)))
    if lengths_k and not small and draw(_one_in(12)):
        lengths_k[draw(st.integers(0, len(lengths_k) - 1))] = draw(LONG)
    if layout in ONE_STEP_LAYOUTS:
        lengths_q = [1] * len(lengths_k)
    else:
        lengths_q = draw(st.lists(short, min_size=len(lengths_k), max_size=len(lengths_k)))
    longest_q, longest_k = max(lengths_q, default=0), max(lengths_k, default=0)
    if layout in ("padded", "one_step"):  # no key is ignored
        lengths_k = [longest_k] * len(lengths_k)
    heads = draw(st.sampled_from((None, None, None, 1, 2, 3)))
    padded = layout not in JAGGED_QUERY_LAYOUTS
    pairs = sum((longest_q if padded else q) * k for q, k in zip(lengths_q, lengths_k))
    largest = LARGEST_INTERPRETED if small else LARGEST_CALL
    fitting = max(1, largest // max(1, pairs * (heads or 1)))
    features = min(fitting, draw(_counts(FEW_FEATURES, MANY_FEATURES)))
    value_features = min(fitting, draw(_counts(FEW_FEATURES, MANY_FEATURES)))
    dtypes = DOUBLE if in_double and draw(_one_in(12)) else draw(DTYPES)
    # float16 ends at 65504: gradients of larger values and weights may be beyond.
    top = 10 if "float16" in dtypes else 20
    magnitudes = (
        draw(st.integers(-60, 40)),
        draw(st.integers(-60, 40)),
        draw(st.sampled_from((0, 0, 0, -30, -10, 10, top))),
        draw(st.sampled_from((0, 0, 0, -30, -10, 5, 10, top))),
    )
    wanted = draw(st.sampled_from(_SUBSETS))
    return Call(
        layout=layout,
        lengths_q=tuple(lengths_q),
        lengths_k=tuple(lengths_k),
        heads=heads,
        features=features,
        value_features=value_features,
        dtypes=dtypes,
        strides=draw(st.tuples(*(st.sampled_from(STRIDES),) * 3)),
        incoming=draw(st.sampled_from((*STRIDES, "expanded"))),
        index_dtype=draw(st.sampled_from(("int64", "int32"))),
        tail_rows=draw(st.sampled_from((0, 0, 1, 5))),
        magnitudes=magnitudes,
        ignored=draw(st.sampled_from((40, 40, 0, 5, 90, 100))),
        dropout=draw(st.sampled_from((0,) * 9 + (5, 30, 90))),
        need_weights=draw(st.booleans()),
        wanted=wanted,
        deterministic=draw(st.sampled_from((None, True, False))),
        bounds=draw(st.sampled_from(("absent", "exact", "larger"))),
        seed=draw(st.integers(0, 99)),
    )


_ALL = (INPUT_NAMES,) * 15
_SUBSETS = (
    *_ALL,
    *(tuple(n for bit, n in enumerate(INPUT_NAMES) if mask >> bit & 1) for mask in range(1, 15)),
)


def draw_calls(
    use: Callable[[Call], None],
    backend: str,
    seed: int,
    count: int,
    shrink: bool = False,
) -> None:
    """Call ``use`` with the ``count`` calls that a seed stands for.

    With ``shrink``, look for the smallest one for which ``use`` raises, and raise that.
    """
    small = os.environ.get("TRITON_INTERPRET") == "1"
    strategy = calls(in_double=backend in IN_DOUBLE, small=small)
    drawn: list[Call] = []

    def draw_part(part: int, examples: int) -> None:
        @hypothesis.seed(seed * 10_007 + part)
        @hypothesis.settings(
            max_examples=examples,
            phases=[hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrink,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def use_new(call: Call) -> None:
            if part and call == drawn[0]:  # Hypothesis always begins with the simplest
                return
            drawn.append(call)
            use(call)

        use_new()

    # Of more examples than ten at a time, five of six would be near copies of the sixth.
    for part in itertools.count():
        missing = count - len(drawn)
        if missing <= 0:
            break
        draw_part(part, min(10, missing + (part > 0)))


# ---- The tensors ----


def inputs_of(call: Call) -> Inputs:
    """The tensors of a call; those of one seed and shape are the same at every magnitude."""
    batch, longest = len(call.lengths_k), max(call.lengths_k, default=0)
    generator = torch.Generator("cpu").manual_seed(call.seed)
    uniform = torch.rand((batch, longest), generator=generator, device="cpu")
    inputs = make_inputs(
        call.layout,
        lengths_q=call.lengths_q,
        lengths_k=call.lengths_k,
        features=call.features,
        value_features=call.value_features,
        heads=call.heads,
        dtype=torch.float64,
        index_dtype=getattr(torch, call.index_dtype),
        key_padding_mask=uniform < call.ignored / 100,
        tail_rows=call.tail_rows,
        seed=call.seed,
    )
    scaled = {
        name: leaf * 10 ** (tenths / 10)
        for (name, leaf), tenths in zip(inputs.leaves.items(), call.magnitudes)
    }
    return finished(call, inputs.with_leaves(**scaled))


def finished(call: Call, inputs: Inputs) -> Inputs:
    """Give inputs the dtypes, strides, bounds and ``deterministic`` of a call."""
    leaves = inputs.leaves
    for name, dtype in zip(INPUT_NAMES, (call.dtypes[0], *call.dtypes)):
        leaf = leaves[name].to(getattr(torch, dtype))
        kinds = dict(zip(INPUT_NAMES, call.strides))
        leaves = {**leaves, name: with_strides(leaf, kinds.get(name, "contiguous"))}
    keywords = {**inputs.keywords, "deterministic": call.deterministic}
    bounds = {}
    if call.bounds != "absent":
        more = 3 if call.bounds == "larger" else 0
        longest = {"max_seqlen_q": inputs.max_seqlen_q, "max_seqlen_k": inputs.max_seqlen_k}
        keywords |= {name: length + more for name, length in longest.items()}
        jagged = {
            "max_seqlen_q": inputs.layout in JAGGED_QUERY_LAYOUTS,
            "max_seqlen_k": inputs.layout in JAGGED_KEY_LAYOUTS,
        }
        # Returned dense weights of jagged sequences are as wide as the bounds.
        bounds = {name: longest[name] + more for name in longest if jagged[name]}
    return Inputs(**{**vars(inputs), **bounds, "leaves": leaves, "keywords": keywords})


def result_shapes(inputs: Inputs, need_weights: bool) -> dict[str, tuple[int, ...]]:
    """Of the context, and of the weights if they are asked for."""
    query, key = inputs.leaves["query"].shape, inputs.leaves["key"].shape
    shapes = {"context": (*query[:-1], inputs.leaves["value"].size(-1))}
    if not need_weights:
        return shapes
    if inputs.weights_are_jagged:
        shapes["weights"] = key[:-1]
    else:
        batch, heads, longest_q, longest_k = inputs.dense_weights_shape
        queries = () if inputs.is_one_step else (longest_q,)
        shapes["weights"] = (batch, *((heads,) if inputs.has_heads else ()), *queries, longest_k)
    return shapes


def incoming_of(call: Call, inputs: Inputs) -> dict[str, Tensor]:
    """Random gradients of context and weights in value's dtype, strided as the call says."""
    generator = torch.Generator("cpu").manual_seed(call.seed + 1000)
    value = inputs.leaves["value"]
    incoming = {}
    for name, shape in result_shapes(inputs, call.need_weights).items():
        numbers = torch.randn(
            () if call.incoming == "expanded" else shape, generator=generator, device="cpu"
        ).to(value)
        if call.incoming == "expanded":
            incoming[name] = numbers.expand(shape)
        else:
            incoming[name] = with_strides(numbers, call.incoming)
    return incoming
