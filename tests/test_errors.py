"""Wrong calls: each raises, naming the argument, what was expected and what was got."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import attn_ext
from attn_ext import AdditiveAttention, AttentionMemory, backends, reference

B, TQ, TK, D, DV, H = 2, 3, 4, 5, 6, 2


def offsets(*numbers: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def nested(*lengths: int, features: int = D, ragged_axis: int = 1) -> Tensor:
    rows = torch.randn(sum(lengths), features)
    tensor = torch.nested.nested_tensor_from_jagged(rows, offsets(0, *lengths).cumsum(0))
    return tensor if ragged_axis == 1 else tensor.transpose(1, 2)


def nested_with_holes() -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        torch.randn(7, D), offsets(0, 3, 7), lengths=torch.tensor([2, 3])
    )


def padded() -> dict[str, object]:
    return {
        "query": torch.randn(B, TQ, D),
        "key": torch.randn(B, TK, D),
        "value": torch.randn(B, TK, DV),
        "score_weight": torch.randn(D),
    }


def heads() -> dict[str, object]:
    return {
        "query": torch.randn(B, TQ, H, D),
        "key": torch.randn(B, TK, H, D),
        "value": torch.randn(B, TK, H, DV),
        "score_weight": torch.randn(H, D),
    }


def one_step() -> dict[str, object]:
    return {**padded(), "query": torch.randn(B, D)}


def jagged_one_step() -> dict[str, object]:
    return {
        "query": torch.randn(B, D),
        "key": torch.randn(7, D),
        "value": torch.randn(7, DV),
        "score_weight": torch.randn(D),
        "cu_seqlens_k": offsets(0, 3, 7),
    }


def jagged() -> dict[str, object]:
    return {**jagged_one_step(), "query": torch.randn(6, D), "cu_seqlens_q": offsets(0, 2, 6)}


def njt() -> dict[str, object]:
    key = nested(3, 4)
    value = torch.nested.nested_tensor_from_jagged(torch.randn(7, DV), key.offsets())
    score_weight = torch.randn(D)
    return {"query": nested(2, 4), "key": key, "value": value, "score_weight": score_weight}


@dataclass(frozen=True)
class Wrong:
    """A valid call, what is changed in it, and the error that must come of it."""

    valid: Callable[[], dict[str, object]]
    changes: dict[str, object] = field(repr=False)
    error: type[Exception]
    argument: str
    expected: str
    got: str

    @property
    def name(self) -> str:
        changed = "+".join(self.changes)
        return f"{self.valid.__name__}-{changed}-{self.got or self.expected}"

    @property
    def pattern(self) -> str:
        parts = (re.escape(part) for part in (self.expected, self.got))
        return rf"^{self.argument}: expected .*{'.*, got .*'.join(parts)}"


BOTH_PADDINGS = {
    "key_padding_mask": torch.zeros(B, TK, dtype=torch.bool),
    "key_lengths": torch.tensor([4, 2]),
}
HUGE = 2**63 - 1

KEY_SIDE_CALLS = [
    # Types and dtypes
    Wrong(padded, {"key": None}, TypeError, "key", "a torch.Tensor", "NoneType"),
    Wrong(padded, {"key": [[1.0]]}, TypeError, "key", "a torch.Tensor", "list"),
    Wrong(padded, {"value": 3.0}, TypeError, "value", "a torch.Tensor", "float"),
    Wrong(padded, {"score_weight": "w"}, TypeError, "score_weight", "a torch.Tensor", "str"),
    Wrong(padded, {"key": torch.zeros((B, TK, D)).long()}, TypeError, "key", "float32", "int64"),
    Wrong(
        padded, {"key": torch.zeros((B, TK, D)).cfloat()}, TypeError, "key", "float", "complex64"
    ),
    Wrong(padded, {"value": torch.zeros((B, TK, DV)).bool()}, TypeError, "value", "float", "bool"),
    Wrong(
        padded,
        {"score_weight": torch.zeros((D,)).int()},
        TypeError,
        "score_weight",
        "float",
        "int32",
    ),
    Wrong(
        padded, {"value": torch.zeros((B, TK, DV)).double()}, TypeError, "value", "32", "float64"
    ),
    Wrong(
        padded,
        {"score_weight": torch.zeros((D,)).double()},
        TypeError,
        "score_weight",
        "float32",
        "float64",
    ),
    Wrong(
        padded,
        {"query": torch.zeros((B, TQ, D)).double(), "key": torch.zeros((B, TK, D)).double()},
        TypeError,
        "value",
        "float64",
        "float32",
    ),
    Wrong(
        padded, {"key": torch.zeros((B, TK, D)).to_sparse()}, ValueError, "key", "strided", "coo"
    ),
    Wrong(
        padded,
        {"value": torch.zeros((B, TK, DV)).to_sparse()},
        ValueError,
        "value",
        "strided",
        "coo",
    ),
    # Shapes
    Wrong(padded, {"key": torch.zeros((TK, D))}, ValueError, "key", "(B, Tk, D)", "(4, 5)"),
    Wrong(
        padded, {"key": torch.zeros((B, TK, 1, D))}, ValueError, "key", "(B, Tk, D)", "(2, 4, 1, 5)"
    ),
    Wrong(padded, {"value": torch.zeros((TK, DV))}, ValueError, "value", "(B, Tk, Dv)", "(4, 6)"),
    Wrong(
        padded, {"value": torch.zeros((B, 3, DV))}, ValueError, "value", "(2, 4, 5)", "(2, 3, 6)"
    ),
    Wrong(
        padded, {"value": torch.zeros((1, TK, DV))}, ValueError, "value", "(2, 4, 5)", "(1, 4, 6)"
    ),
    Wrong(padded, {"score_weight": torch.zeros((4,))}, ValueError, "score_weight", "(5,)", "(4,)"),
    Wrong(padded, {"score_weight": torch.zeros(())}, ValueError, "score_weight", "(D,)", "()"),
    Wrong(
        padded,
        {"score_weight": torch.zeros((1, 1, D))},
        ValueError,
        "score_weight",
        "(D,) or (H, D)",
        "(1, 1, 5)",
    ),
    Wrong(
        padded,
        {"score_weight": torch.zeros((H, D))},
        ValueError,
        "key",
        "(B, Tk, H, D)",
        "(2, 4, 5)",
    ),
    Wrong(
        heads, {"score_weight": torch.zeros((3, D))}, ValueError, "score_weight", "(2, 5)", "(3, 5)"
    ),
    Wrong(
        heads, {"score_weight": torch.zeros((D,))}, ValueError, "key", "(B, Tk, D)", "(2, 4, 2, 5)"
    ),
    Wrong(
        heads,
        {"value": torch.zeros((B, TK, 3, DV))},
        ValueError,
        "value",
        "(2, 4, 2, 5)",
        "(2, 4, 3, 6)",
    ),
    Wrong(
        jagged_one_step,
        {"key": torch.zeros((B, TK, D))},
        ValueError,
        "key",
        "(total_k, D)",
        "(2, 4,",
    ),
    Wrong(
        jagged_one_step, {"value": torch.zeros((6, DV))}, ValueError, "value", "(7, 5)", "(6, 6)"
    ),
    # Devices
    Wrong(
        padded,
        {"value": torch.zeros((B, TK, DV), device="meta")},
        ValueError,
        "value",
        "device cpu",
        "meta",
    ),
    Wrong(
        padded,
        {"score_weight": torch.zeros((D,), device="meta")},
        ValueError,
        "score_weight",
        "device cpu",
        "meta",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, 3, 7).to("meta")},
        ValueError,
        "cu_seqlens_k",
        "device cpu",
        "meta",
    ),
    # Padding
    Wrong(
        padded,
        BOTH_PADDINGS,
        ValueError,
        "key_padding_mask, key_lengths",
        "at most one",
        "both",
    ),
    Wrong(
        padded,
        {"key_padding_mask": [[True]]},
        TypeError,
        "key_padding_mask",
        "a torch.Tensor",
        "list",
    ),
    Wrong(
        padded,
        {"key_padding_mask": torch.zeros((B, TK))},
        TypeError,
        "key_padding_mask",
        "bool, True = ignore",
        "float32",
    ),
    Wrong(
        padded,
        {"key_padding_mask": torch.zeros((B, TK)).byte()},
        TypeError,
        "key_padding_mask",
        "bool",
        "uint8",
    ),
    Wrong(
        padded,
        {"key_padding_mask": torch.zeros((B, TQ)).bool()},
        ValueError,
        "key_padding_mask",
        "(2, 4)",
        "(2, 3)",
    ),
    Wrong(
        padded,
        {"key_padding_mask": torch.zeros((B, TQ, TK)).bool()},
        ValueError,
        "key_padding_mask",
        "(2, 4)",
        "(2, 3, 4)",
    ),
    Wrong(
        padded,
        {"key_padding_mask": torch.zeros((B, TK), device="meta").bool()},
        ValueError,
        "key_padding_mask",
        "device cpu",
        "meta",
    ),
    Wrong(padded, {"key_lengths": [4, 2]}, TypeError, "key_lengths", "a torch.Tensor", "list"),
    Wrong(
        padded,
        {"key_lengths": torch.tensor([4.0, torch.nan])},
        TypeError,
        "key_lengths",
        "int32 or int64",
        "float32",
    ),
    Wrong(
        padded,
        {"key_lengths": torch.tensor([4, 2]).to(torch.int16)},
        TypeError,
        "key_lengths",
        "int32 or int64",
        "int16",
    ),
    Wrong(padded, {"key_lengths": offsets(4, 2, 1)}, ValueError, "key_lengths", "(2,)", "(3,)"),
    Wrong(padded, {"key_lengths": offsets(4, 5)}, ValueError, "key_lengths", "Tk = 4", "5"),
    Wrong(padded, {"key_lengths": offsets(-1, 4)}, ValueError, "key_lengths", "between 0", "-1"),
    Wrong(
        padded, {"key_lengths": offsets(HUGE, 4)}, ValueError, "key_lengths", "Tk = 4", str(HUGE)
    ),
    Wrong(
        jagged_one_step,
        {"key_lengths": offsets(3, 4)},
        ValueError,
        "key_lengths",
        "None with jagged keys",
        "",
    ),
    Wrong(
        jagged_one_step,
        {"key_padding_mask": BOTH_PADDINGS["key_padding_mask"]},
        ValueError,
        "key_padding_mask",
        "None with jagged keys",
        "",
    ),
    # Offsets
    Wrong(
        jagged_one_step, {"cu_seqlens_k": [0, 3, 7]}, TypeError, "cu_seqlens_k", "Tensor", "list"
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": torch.tensor([0.0, torch.nan, 7.0])},
        TypeError,
        "cu_seqlens_k",
        "int32 or int64",
        "float32",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, 3, 7, dtype=torch.int16)},
        TypeError,
        "cu_seqlens_k",
        "int32 or int64",
        "int16",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, 3, 7).view(3, 1)},
        ValueError,
        "cu_seqlens_k",
        "(B + 1,)",
        "(3, 1)",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets()},
        ValueError,
        "cu_seqlens_k",
        "(B + 1,)",
        "(0,)",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(1, 3, 7)},
        ValueError,
        "cu_seqlens_k",
        "start at 0",
        "cu_seqlens_k[0] = 1",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, 5, 3)},
        ValueError,
        "cu_seqlens_k",
        "never decrease",
        "cu_seqlens_k[1] = 5 before cu_seqlens_k[2] = 3",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, -3, 7)},
        ValueError,
        "cu_seqlens_k",
        "never decrease",
        "-3",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, 3, 8)},
        ValueError,
        "cu_seqlens_k",
        "at most 7, the rows of key",
        "8",
    ),
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, 2**31 - 1, -(2**31), dtype=torch.int32)},
        ValueError,
        "cu_seqlens_k",
        "never decrease",
        str(-(2**31)),
    ),
    # Differences of these offsets overflow int64, and look like lengths.
    Wrong(
        jagged_one_step,
        {"cu_seqlens_k": offsets(0, HUGE, -2, 7), "query": torch.zeros((3, D))},
        ValueError,
        "cu_seqlens_k",
        "",
        "",
    ),
    Wrong(
        jagged_one_step,
        {"max_seqlen_k": 3},
        ValueError,
        "max_seqlen_k",
        "at least 4, the longest",
        "3",
    ),
    Wrong(jagged_one_step, {"max_seqlen_k": -1}, ValueError, "max_seqlen_k", "at least 0", "-1"),
    Wrong(jagged_one_step, {"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k", "an int", "float"),
    Wrong(jagged_one_step, {"max_seqlen_k": True}, TypeError, "max_seqlen_k", "an int", "bool"),
    Wrong(
        jagged_one_step,
        {"max_seqlen_k": torch.tensor(4)},
        TypeError,
        "max_seqlen_k",
        "an int",
        "Tensor",
    ),
    Wrong(padded, {"max_seqlen_k": 3}, ValueError, "max_seqlen_k", "at least 4", "3"),
    Wrong(
        padded,
        {"max_seqlen_k": 3, "key_lengths": offsets(4, 0)},
        ValueError,
        "max_seqlen_k",
        "at least 4",
        "3",
    ),
    # Nested tensors
    Wrong(njt, {"value": torch.zeros((7, DV))}, ValueError, "value", "a nested tensor", "dense"),
    Wrong(njt, {"key": torch.zeros((7, D))}, ValueError, "value", "a dense tensor", "nested"),
    Wrong(njt, {"value": nested(4, 3)}, ValueError, "value", "key's offsets", "other offsets"),
    Wrong(njt, {"value": nested(3, 3, 1)}, ValueError, "value", "key's offsets", "other offsets"),
    Wrong(njt, {"key": nested_with_holes()}, ValueError, "key", "without holes", "lengths() set"),
    Wrong(njt, {"value": nested_with_holes()}, ValueError, "value", "without holes", "lengths()"),
    Wrong(
        njt, {"key": nested(3, 4, ragged_axis=2)}, ValueError, "key", "ragged in axis 1", "axis 2"
    ),
    Wrong(
        njt,
        {"key": torch.nested.nested_tensor([torch.randn(3, D), torch.randn(4, D)])},
        ValueError,
        "key",
        "torch.jagged",
        "torch.strided",
    ),
    Wrong(
        njt,
        {"cu_seqlens_k": offsets(0, 3, 7)},
        ValueError,
        "cu_seqlens_k",
        "None for a nested key",
        "",
    ),
    Wrong(
        njt, {"key_lengths": offsets(3, 4)}, ValueError, "key_lengths", "None with jagged keys", ""
    ),
    Wrong(njt, {"max_seqlen_k": 3}, ValueError, "max_seqlen_k", "at least 4", "3"),
    Wrong(
        njt, {"score_weight": torch.zeros((H, D))}, ValueError, "key", "(total_k, H, D)", "(7, 5)"
    ),
    # Options
    Wrong(padded, {"dropout_p": -0.1}, ValueError, "dropout_p", "between 0 and 1", "-0.1"),
    Wrong(padded, {"dropout_p": 1.5}, ValueError, "dropout_p", "between 0 and 1", "1.5"),
    Wrong(padded, {"dropout_p": torch.nan}, ValueError, "dropout_p", "between 0 and 1", "nan"),
    Wrong(padded, {"dropout_p": "0.1"}, TypeError, "dropout_p", "a float", "str"),
    Wrong(padded, {"dropout_p": True}, TypeError, "dropout_p", "a float", "bool"),
    Wrong(padded, {"dropout_p": None}, TypeError, "dropout_p", "a float", "NoneType"),
    Wrong(padded, {"deterministic": 1}, TypeError, "deterministic", "a bool or None", "int"),
]

BACKEND_CALLS = [
    Wrong(
        padded, {"backend": "gpu"}, ValueError, "backend", "triton, cuda, cpu, reference", "'gpu'"
    ),
    Wrong(padded, {"backend": "CPU"}, ValueError, "backend", "cpu", "'CPU'"),
    Wrong(padded, {"backend": ""}, ValueError, "backend", "cpu", "''"),
    Wrong(padded, {"backend": 3}, TypeError, "backend", "a str or None", "int"),
    Wrong(padded, {"backend": torch.device("cpu")}, TypeError, "backend", "a str", "device"),
]

QUERY_CALLS = [
    Wrong(padded, {"query": None}, TypeError, "query", "a torch.Tensor", "NoneType"),
    Wrong(padded, {"query": torch.zeros((B, TQ, D)).int()}, TypeError, "query", "float", "int32"),
    Wrong(
        padded, {"query": torch.zeros((B, TQ, D)).half()}, TypeError, "query", "float32", "float16"
    ),
    Wrong(
        padded,
        {"query": torch.zeros((B, TQ, D)).double()},
        TypeError,
        "query",
        "float32",
        "float64",
    ),
    Wrong(
        padded,
        {"query": torch.zeros((B, TQ, D)).to_sparse()},
        ValueError,
        "query",
        "strided",
        "coo",
    ),
    Wrong(
        padded,
        {"query": torch.zeros((B, TQ, D), device="meta")},
        ValueError,
        "query",
        "cpu",
        "meta",
    ),
    Wrong(
        padded, {"query": torch.zeros((D,))}, ValueError, "query", "(B, D) or (B, Tq, D)", "(5,)"
    ),
    Wrong(
        padded,
        {"query": torch.zeros((B, TQ, 1, D))},
        ValueError,
        "query",
        "(B, D) or (B, Tq, D)",
        "(2, 3, 1, 5)",
    ),
    Wrong(padded, {"query": torch.zeros((B, TQ, 4))}, ValueError, "query", "(5,)", "(2, 3, 4)"),
    Wrong(padded, {"query": torch.zeros((3, TQ, D))}, ValueError, "query", "2 sequences", "3"),
    Wrong(one_step, {"query": torch.zeros((3, D))}, ValueError, "query", "2 sequences", "3"),
    Wrong(one_step, {"query": torch.zeros((1, D))}, ValueError, "query", "2 sequences", "1"),
    Wrong(
        heads, {"query": torch.zeros((B, TQ, 3, D))}, ValueError, "query", "(2, 5)", "(2, 3, 3, 5)"
    ),
    Wrong(
        heads, {"query": torch.zeros((B, D))}, ValueError, "query", "(B, H, D) or (B, Tq", "(2, 5)"
    ),
    Wrong(
        jagged_one_step,
        {"query": torch.zeros((B, TQ, D))},
        ValueError,
        "query",
        "(B, D) without cu_seqlens_q",
        "(2, 3, 5)",
    ),
    Wrong(jagged_one_step, {"query": torch.zeros((6, D))}, ValueError, "query", "2 sequences", "6"),
    Wrong(
        jagged, {"query": torch.zeros((B, TQ, D))}, ValueError, "query", "(total_q, D)", "(2, 3, 5)"
    ),
    Wrong(
        padded,
        {"cu_seqlens_q": offsets(0, 2, 6), "query": torch.zeros((6, D))},
        ValueError,
        "cu_seqlens_q",
        "padded queries with padded keys",
        "offsets",
    ),
    Wrong(jagged, {"cu_seqlens_q": (0, 2, 6)}, TypeError, "cu_seqlens_q", "Tensor", "tuple"),
    Wrong(
        jagged,
        {"cu_seqlens_q": torch.tensor([0.0, 2.0, 6.0])},
        TypeError,
        "cu_seqlens_q",
        "int32 or int64",
        "float32",
    ),
    Wrong(
        jagged,
        {"cu_seqlens_q": offsets(0, 2, 4, 6)},
        ValueError,
        "cu_seqlens_q",
        "2 sequences",
        "3",
    ),
    Wrong(jagged, {"cu_seqlens_q": offsets(0)}, ValueError, "cu_seqlens_q", "2 sequences", "0"),
    Wrong(
        jagged, {"cu_seqlens_q": offsets(2, 2, 6)}, ValueError, "cu_seqlens_q", "start at 0", "= 2"
    ),
    Wrong(
        jagged, {"cu_seqlens_q": offsets(0, 4, 2)}, ValueError, "cu_seqlens_q", "decrease", "= 4"
    ),
    Wrong(
        jagged,
        {"cu_seqlens_q": offsets(0, 2, 7)},
        ValueError,
        "cu_seqlens_q",
        "at most 6, the rows of query",
        "7",
    ),
    Wrong(
        jagged,
        {"cu_seqlens_q": offsets(0, 2, 6).to("meta")},
        ValueError,
        "cu_seqlens_q",
        "device cpu",
        "meta",
    ),
    Wrong(jagged, {"max_seqlen_q": 3}, ValueError, "max_seqlen_q", "at least 4", "3"),
    Wrong(jagged, {"max_seqlen_q": "4"}, TypeError, "max_seqlen_q", "an int", "str"),
    Wrong(padded, {"max_seqlen_q": 2}, ValueError, "max_seqlen_q", "at least 3", "2"),
    Wrong(njt, {"query": nested_with_holes()}, ValueError, "query", "without holes", "lengths()"),
    Wrong(
        njt,
        {"query": nested(2, 4, ragged_axis=2)},
        ValueError,
        "query",
        "ragged in axis 1",
        "axis 2",
    ),
    Wrong(njt, {"query": nested(2, 2, 2)}, ValueError, "query", "2 sequences", "3"),
    Wrong(njt, {"query": nested(2, 4, features=4)}, ValueError, "query", "(5,)", "(6, 4)"),
    Wrong(
        njt,
        {"cu_seqlens_q": offsets(0, 2, 6)},
        ValueError,
        "cu_seqlens_q",
        "None for a nested query",
        "",
    ),
    Wrong(padded, {"query": nested(2, 4)}, ValueError, "query", "padded", "nested"),
    Wrong(padded, {"need_weights": 1}, TypeError, "need_weights", "a bool", "int"),
    Wrong(padded, {"need_weights": None}, TypeError, "need_weights", "a bool", "NoneType"),
]

ALL_CALLS = [*KEY_SIDE_CALLS, *QUERY_CALLS, *BACKEND_CALLS]


def names(calls: list[Wrong]) -> list[str]:
    return [f"{number}-{wrong.name}" for number, wrong in enumerate(calls)]


@pytest.mark.parametrize("valid", [padded, heads, one_step, jagged_one_step, jagged, njt])
def test_unchanged_calls_are_valid(backend: str, valid: Callable[[], dict[str, object]]):
    attn_ext.additive_attention(**valid(), backend=backend)
    reference.additive_attention(**valid())


@pytest.mark.parametrize("wrong", ALL_CALLS, ids=names(ALL_CALLS))
def test_additive_attention(wrong: Wrong):
    with pytest.raises(wrong.error, match=wrong.pattern):
        attn_ext.additive_attention(**{**wrong.valid(), **wrong.changes})


REFERENCE_CALLS = [*KEY_SIDE_CALLS, *QUERY_CALLS]


@pytest.mark.parametrize("wrong", REFERENCE_CALLS, ids=names(REFERENCE_CALLS))
def test_reference(wrong: Wrong):
    if "deterministic" in wrong.changes:
        return  # documented to be ignored
    with pytest.raises(wrong.error, match=wrong.pattern):
        reference.additive_attention(**{**wrong.valid(), **wrong.changes})


MEMORY_CALLS = [*KEY_SIDE_CALLS, *BACKEND_CALLS]


@pytest.mark.parametrize("wrong", MEMORY_CALLS, ids=names(MEMORY_CALLS))
def test_attention_memory(wrong: Wrong):
    arguments = {**wrong.valid(), **wrong.changes}
    for name in ("query", "cu_seqlens_q"):
        arguments.pop(name, None)
    with pytest.raises(wrong.error, match=wrong.pattern):
        AttentionMemory(**arguments)


ATTEND_CALLS = [
    Wrong(one_step, {"query": None}, TypeError, "query", "a torch.Tensor", "NoneType"),
    Wrong(
        one_step, {"query": torch.zeros((B, D)).half()}, TypeError, "query", "float32", "float16"
    ),
    Wrong(one_step, {"query": torch.zeros((B, D)).long()}, TypeError, "query", "float32", "int64"),
    Wrong(one_step, {"query": torch.zeros((B, 4))}, ValueError, "query", "(5,)", "(2, 4)"),
    Wrong(one_step, {"query": torch.zeros((3, D))}, ValueError, "query", "2 sequences", "3"),
    Wrong(one_step, {"query": torch.zeros((D,))}, ValueError, "query", "(B, D)", "(5,)"),
    Wrong(one_step, {"query": torch.zeros((B, 1, D))}, ValueError, "query", "(B, D)", "(2, 1, 5)"),
    Wrong(heads, {"query": torch.zeros((B, D))}, ValueError, "query", "(B, H, D)", "(2, 5)"),
    Wrong(
        heads, {"query": torch.zeros((B, 1, H, D))}, ValueError, "query", "(B, H, D)", "(2, 1, 2"
    ),
    Wrong(
        jagged_one_step,
        {"query": torch.zeros((B, 1, D))},
        ValueError,
        "query",
        "(B, D)",
        "(2, 1, 5)",
    ),
    Wrong(jagged_one_step, {"query": torch.zeros((6, D))}, ValueError, "query", "2 sequences", "6"),
    Wrong(njt, {"query": torch.zeros((B, 1, D))}, ValueError, "query", "(B, D)", "(2, 1, 5)"),
    Wrong(njt, {"query": nested(1, 1)}, ValueError, "query", "(B, D)", ""),
    Wrong(
        one_step, {"query": torch.zeros((B, D), device="meta")}, ValueError, "query", "cpu", "meta"
    ),
    Wrong(one_step, {"need_weights": 1}, TypeError, "need_weights", "a bool", "int"),
]


@pytest.mark.parametrize("wrong", ATTEND_CALLS, ids=names(ATTEND_CALLS))
def test_attend(backend: str, wrong: Wrong):
    arguments = wrong.valid()
    step = {"query": arguments.pop("query"), **wrong.changes}
    memory = AttentionMemory(**arguments, backend=backend)
    with pytest.raises(wrong.error, match=wrong.pattern):
        memory.attend(**step)


@pytest.mark.parametrize(
    "keyword",
    ["cu_seqlens", "key_length", "padding_mask", "dropout", "max_seqlen", "attn_mask"],
)
def test_misspelt_keyword(keyword: str):
    for function in (attn_ext.additive_attention, reference.additive_attention):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            function(**padded(), **{keyword: None})
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        AttentionMemory(**{**padded(), keyword: None})


@pytest.mark.parametrize("name", ["query", "key", "value", "score_weight"])
def test_missing_argument(name: str):
    arguments = padded()
    arguments.pop(name)
    with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{name}'"):
        attn_ext.additive_attention(**arguments)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional arguments"):
        attn_ext.additive_attention(*padded().values(), None)


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_unavailable_backend_says_why_and_what_to_do(name: str):
    reason = backends.problem(name, torch.device("cpu"))
    if reason is None:
        attn_ext.additive_attention(**padded(), backend=name)
        return
    for make in (attn_ext.additive_attention, lambda query, **rest: AttentionMemory(**rest)):
        with pytest.raises(ValueError, match=rf"^backend: '{name}' is not available: .*; .*"):
            make(**padded(), backend=name)


MODULE_CALLS = [
    ({"num_heads": 3}, r"^num_heads: expected a divisor of attn_dim = 8, got 3"),
    ({"num_heads": 0}, r"^num_heads: expected at least 1, got 0"),
    ({"num_heads": -2}, r"^num_heads: expected at least 1, got -2"),
    ({"dropout": 1.5}, r"^dropout: expected a probability between 0 and 1, got 1.5"),
    ({"dropout": -1.0}, r"^dropout: expected a probability between 0 and 1, got -1.0"),
]


@pytest.mark.parametrize(("keywords", "pattern"), MODULE_CALLS, ids=lambda value: str(value))
def test_module(keywords: dict[str, object], pattern: str):
    with pytest.raises(ValueError, match=pattern):
        AdditiveAttention(4, 4, 8, **keywords)


@pytest.mark.parametrize(
    ("arguments", "keywords", "pattern"),
    [
        ((4, 4, 0), {}, r"^attn_dim: expected at least 1, got 0"),
        ((4, 4.0, 8), {}, r"^key_dim: expected an int, got float"),
        ((4, 4, 8), {"num_heads": True}, r"^num_heads: expected an int, got bool"),
        ((4, 4, 8), {"dropout": "a"}, r"^dropout: expected a float, got str"),
        ((4, 4, 8), {"dropout": 1.5}, r"^dropout: expected a probability .*, got 1.5"),
    ],
    ids=lambda value: str(value),
)
def test_module_arguments(arguments: tuple, keywords: dict[str, object], pattern: str):
    with pytest.raises((TypeError, ValueError), match=pattern):
        AdditiveAttention(*arguments, **keywords)


def test_module_features():
    module = AdditiveAttention(4, 5, 8)
    with pytest.raises(ValueError, match=r"^query: expected 4 features in its last axis, got .*7"):
        module(torch.randn(2, 3, 7), torch.randn(2, 6, 5))
    with pytest.raises(ValueError, match=r"^key: expected 5 features in its last axis, got .*4"):
        module.memory(torch.randn(2, 6, 4))
    with pytest.raises(TypeError, match=r"^query: expected a torch.Tensor, got NoneType"):
        module(None, torch.randn(2, 6, 5))


def test_module_value_features_that_heads_do_not_divide():
    module = AdditiveAttention(4, 5, 8, num_heads=2)
    with pytest.raises(ValueError, match=r"^value: expected features that num_heads = 2 .*got 5"):
        module(torch.randn(2, 3, 4), torch.randn(2, 6, 5))
