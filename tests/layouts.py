"""The layouts of the public API, and random inputs of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_ext.reference import draw_seed, dropout_keep_mask

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
# Of which one side is padded and the other jagged.
MIXED_LAYOUTS = (
    "jagged_keys",
    "jagged_query_lengths",
    "jagged_query_mask",
    "nested_query_lengths",
)
ONE_STEP_LAYOUTS = tuple(name for name in LAYOUTS if "one_step" in name)
JAGGED_KEY_LAYOUTS = (
    *(name for name in LAYOUTS if "jagged" in name or "nested" in name),
    "jagged_keys",
)
JAGGED_QUERY_LAYOUTS = (
    *("jagged", "nested", "nested_query", "nested_keys_jagged_query"),
    *MIXED_LAYOUTS[1:],
)

# Sequence lengths in which every kind of sequence occurs: plain, without queries, without keys,
# with neither, and of length 1.
LENGTHS_Q = (3, 0, 2, 0, 5, 1)
LENGTHS_K = (7, 4, 0, 0, 13, 1)


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
    scores_alone: bool = False  # the call is of additive_scores, which are its "weights"

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
        nested = layout == "nested" or layout.startswith("nested_query")
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
        layout: one of LAYOUTS or MIXED_LAYOUTS.
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
        leaves = {name: randn(shape, generator) for name, shape in shapes.items()}
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


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _owned(places: tuple[int, ...], rows: list[tuple]) -> Tensor:
    """Which places belong to a sequence and are not ignored."""
    owned = torch.zeros(places, dtype=torch.bool, device="cpu")
    for index in rows:
        owned[index] = True
    return owned


def draw_keep(inputs: Inputs, dropout_p: float, seed: int) -> Tensor:
    """Which weights a call right after ``torch.manual_seed(seed)`` keeps; leaves it seeded so."""
    device = inputs.leaves["query"].device
    torch.manual_seed(seed)
    keep = dropout_keep_mask(draw_seed(device), dropout_p, torch.Size(inputs.dense_weights_shape))
    torch.manual_seed(seed)
    return keep
