"""Wrong calls: valid ones, what is changed in them, and the error that must come of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

B, TQ, TK, D, DV, H = 2, 3, 4, 5, 6, 2
HUGE, HUGE32 = 2**63 - 1, 2**31 - 1


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def floats(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def doubles(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def quantized(*shape: int) -> Tensor:
    return torch.quantize_per_tensor(zeros(*shape), 0.1, 0, torch.quint8)


def nested(*lengths: int, features: int = D, ragged_axis: int = 1) -> Tensor:
    rows = torch.randn(sum(lengths), features)
    tensor = torch.nested.nested_tensor_from_jagged(rows, ints(0, *lengths).cumsum(0))
    return tensor if ragged_axis == 1 else tensor.transpose(1, 2)


def nested_with_holes() -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        torch.randn(7, D), ints(0, 3, 7), lengths=ints(2, 3)
    )


def strided_nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, D), torch.randn(4, D)], layout=torch.strided)


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


def step() -> dict[str, object]:
    return {**padded(), "query": torch.randn(B, D)}


def jagged_step() -> dict[str, object]:
    return {
        "query": torch.randn(B, D),
        "key": torch.randn(7, D),
        "value": torch.randn(7, DV),
        "score_weight": torch.randn(D),
        "cu_seqlens_k": ints(0, 3, 7),
    }


def jagged() -> dict[str, object]:
    return {**jagged_step(), "query": torch.randn(6, D), "cu_seqlens_q": ints(0, 2, 6)}


def njt() -> dict[str, object]:
    key = nested(3, 4)
    value = torch.nested.nested_tensor_from_jagged(torch.randn(7, DV), key.offsets())
    score_weight = torch.randn(D)
    return {"query": nested(2, 4), "key": key, "value": value, "score_weight": score_weight}


@dataclass(frozen=True)
class Wrong:
    """A row of the tables below."""

    valid: Callable[[], dict[str, object]]
    changes: dict[str, object] = field(repr=False)
    error: type[Exception]
    expected: str  # a part of what the message says was expected
    got: str  # a part of what it says came
    argument: str = ""  # the one it names, if that is not the first changed

    @property
    def named(self) -> str:
        return self.argument or next(iter(self.changes))

    @property
    def id(self) -> str:
        return f"{self.valid.__name__}-{'+'.join(self.changes)}-{self.got}"


def rows(*table: tuple) -> list[Wrong]:
    return [Wrong(*row) for row in table]


T, V = TypeError, ValueError
BOTH_PADDINGS = {"key_padding_mask": zeros(B, TK).bool(), "key_lengths": ints(4, 2)}

# Of additive_attention and AttentionMemory.
KEY_SIDE_CALLS = rows(
    (padded, {"key": None}, T, "a torch.Tensor", "NoneType"),
    (padded, {"key": [[1.0]]}, T, "a torch.Tensor", "list"),
    (padded, {"value": 3.0}, T, "a torch.Tensor", "float"),
    (padded, {"score_weight": "w"}, T, "a torch.Tensor", "str"),
    (padded, {"key": zeros(B, TK, D).long()}, T, "float32", "int64"),
    (padded, {"key": zeros(B, TK, D).cfloat()}, T, "float", "complex64"),
    (padded, {"value": zeros(B, TK, DV).bool()}, T, "float", "bool"),
    (padded, {"score_weight": zeros(D).int()}, T, "float", "int32"),
    (padded, {"value": zeros(B, TK, DV).double()}, T, "32", "float64"),
    (padded, {"score_weight": zeros(D).double()}, T, "float32", "float64"),
    (
        padded,
        {"query": doubles(B, TQ, D), "key": doubles(B, TK, D)},
        T,
        "float64",
        "float32",
        "value",
    ),
    (padded, {"key": zeros(B, TK, D).to_sparse()}, V, "strided", "coo"),
    (padded, {"value": zeros(B, TK, DV).to_sparse()}, V, "strided", "coo"),
    (padded, {"key": zeros(TK, D)}, V, "(B, Tk, D)", "(4, 5)"),
    (padded, {"key": zeros(B, TK, 1, D)}, V, "(B, Tk, D)", "(2, 4, 1, 5)"),
    (padded, {"value": zeros(TK, DV)}, V, "(B, Tk, Dv)", "(4, 6)"),
    (padded, {"value": zeros(B, 3, DV)}, V, "(2, 4, 5)", "(2, 3, 6)"),
    (padded, {"value": zeros(1, TK, DV)}, V, "(2, 4, 5)", "(1, 4, 6)"),
    (padded, {"score_weight": zeros(4)}, V, "(5,)", "(4,)"),
    (padded, {"score_weight": zeros()}, V, "(D,)", "()"),
    (padded, {"score_weight": zeros(1, 1, D)}, V, "(D,) or (H, D)", "(1, 1, 5)"),
    (padded, {"score_weight": zeros(H, D)}, V, "(B, Tk, H, D)", "(2, 4, 5)", "key"),
    (heads, {"score_weight": zeros(3, D)}, V, "(2, 5)", "(3, 5)"),
    (heads, {"score_weight": zeros(D)}, V, "(B, Tk, D)", "(2, 4, 2, 5)", "key"),
    (heads, {"value": zeros(B, TK, 3, DV)}, V, "(2, 4, 2, 5)", "(2, 4, 3, 6)"),
    (jagged_step, {"key": zeros(B, TK, D)}, V, "(total_k, D)", "(2, 4,"),
    (jagged_step, {"value": zeros(6, DV)}, V, "(7, 5)", "(6, 6)"),
    (padded, {"value": zeros(B, TK, DV).to("meta")}, V, "device cpu", "meta"),
    (padded, {"score_weight": zeros(D).to("meta")}, V, "device cpu", "meta"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, 7).to("meta")}, V, "device cpu", "meta"),
    (padded, BOTH_PADDINGS, V, "at most one", "both", "key_padding_mask, key_lengths"),
    (padded, {"key_padding_mask": [[True]]}, T, "a torch.Tensor", "list"),
    (padded, {"key_padding_mask": zeros(B, TK)}, T, "bool, True = ignore", "float32"),
    (padded, {"key_padding_mask": zeros(B, TK).byte()}, T, "bool", "uint8"),
    (padded, {"key_padding_mask": zeros(B, TQ).bool()}, V, "(2, 4)", "(2, 3)"),
    (padded, {"key_padding_mask": zeros(B, TQ, TK).bool()}, V, "(2, 4)", "(2, 3, 4)"),
    (padded, {"key_padding_mask": zeros(B, TK).to("meta").bool()}, V, "device cpu", "meta"),
    (padded, {"key_lengths": [4, 2]}, T, "a torch.Tensor", "list"),
    (padded, {"key_lengths": floats(4, torch.nan)}, T, "int32 or int64", "float32"),
    (padded, {"key_lengths": ints(4, 2).short()}, T, "int32 or int64", "int16"),
    (padded, {"key_lengths": ints(4, 2, 1)}, V, "(2,)", "(3,)"),
    (padded, {"key_lengths": ints(4, 5)}, V, "Tk = 4", "5"),
    (padded, {"key_lengths": ints(-1, 4)}, V, "between 0", "-1"),
    (padded, {"key_lengths": ints(HUGE, 4)}, V, "Tk = 4", str(HUGE)),
    (jagged_step, {"key_lengths": ints(3, 4)}, V, "None with jagged keys", "Tensor"),
    (jagged_step, {"key_padding_mask": zeros(B, TK).bool()}, V, "None with jagged keys", "Tensor"),
    (jagged_step, {"cu_seqlens_k": [0, 3, 7]}, T, "Tensor", "list"),
    (jagged_step, {"cu_seqlens_k": floats(0, torch.nan, 7)}, T, "int32 or int64", "float32"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, 7).short()}, T, "int32 or int64", "int16"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, 7).view(3, 1)}, V, "(B + 1,)", "(3, 1)"),
    (jagged_step, {"cu_seqlens_k": ints()}, V, "(B + 1,)", "(0,)"),
    (jagged_step, {"cu_seqlens_k": ints(1, 3, 7)}, V, "start at 0", "cu_seqlens_k[0] = 1"),
    (
        jagged_step,
        {"cu_seqlens_k": ints(0, 5, 3)},
        V,
        "never decrease",
        "[1] = 5 before cu_seqlens_k[2] = 3",
    ),
    (jagged_step, {"cu_seqlens_k": ints(0, -3, 7)}, V, "never decrease", "-3"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, 8)}, V, "at most 7, the rows of key", "8"),
    (
        jagged_step,
        {"cu_seqlens_k": ints(0, HUGE32, -HUGE32).int()},
        V,
        "never decrease",
        str(-HUGE32),
    ),
    (
        jagged_step,
        {"cu_seqlens_k": ints(0, HUGE, -2, 7), "query": zeros(3, D)},
        V,
        "never decrease",
        "-2",
    ),
    (jagged_step, {"max_seqlen_k": 3}, V, "at least 4, the longest", "3"),
    (jagged_step, {"max_seqlen_k": -1}, V, "at least 0", "-1"),
    (jagged_step, {"max_seqlen_k": 4.0}, T, "an int", "float"),
    (jagged_step, {"max_seqlen_k": True}, T, "an int", "bool"),
    (jagged_step, {"max_seqlen_k": torch.tensor(4)}, T, "an int", "Tensor"),
    (padded, {"max_seqlen_k": 3}, V, "at least 4", "3"),
    (padded, {"max_seqlen_k": 3, "key_lengths": ints(4, 0)}, V, "at least 4", "3"),
    (njt, {"value": zeros(7, DV)}, V, "a nested tensor", "dense"),
    (njt, {"key": zeros(7, D)}, V, "a dense tensor", "nested", "value"),
    (njt, {"value": nested(4, 3)}, V, "key's offsets", "other offsets"),
    (njt, {"value": nested(3, 3, 1)}, V, "key's offsets", "other offsets"),
    (njt, {"key": nested_with_holes()}, V, "without holes", "lengths() set"),
    (njt, {"value": nested_with_holes()}, V, "without holes", "lengths()"),
    (njt, {"key": nested(3, 4, ragged_axis=2)}, V, "ragged in axis 1", "axis 2"),
    (njt, {"key": strided_nested()}, V, "torch.jagged", "torch.strided"),
    (njt, {"cu_seqlens_k": ints(0, 3, 7)}, V, "None for a nested key", "offsets"),
    (njt, {"key_lengths": ints(3, 4)}, V, "None with jagged keys", "Tensor"),
    (njt, {"max_seqlen_k": 3}, V, "at least 4", "3"),
    (njt, {"score_weight": zeros(H, D)}, V, "(total_k, H, D)", "(7, 5)", "key"),
    (padded, {"dropout_p": -0.1}, V, "between 0 and 1", "-0.1"),
    (padded, {"dropout_p": 1.5}, V, "between 0 and 1", "1.5"),
    (padded, {"dropout_p": torch.nan}, V, "between 0 and 1", "nan"),
    (padded, {"dropout_p": "0.1"}, T, "a float", "str"),
    (padded, {"dropout_p": True}, T, "a float", "bool"),
    (padded, {"dropout_p": None}, T, "a float", "NoneType"),
    (padded, {"deterministic": 1}, T, "a bool or None", "int"),
    # Types that are not tensors, for every argument
    (padded, {"key": np.zeros((B, TK, D))}, T, "a torch.Tensor", "numpy.ndarray"),
    (padded, {"value": None}, T, "a torch.Tensor", "NoneType"),
    (padded, {"value": np.zeros((B, TK, DV))}, T, "a torch.Tensor", "numpy.ndarray"),
    (padded, {"score_weight": None}, T, "a torch.Tensor", "NoneType"),
    (padded, {"score_weight": 1}, T, "a torch.Tensor", "int"),
    (padded, {"key_padding_mask": np.zeros((B, TK), bool)}, T, "a torch.Tensor", "numpy.ndarray"),
    (padded, {"key_padding_mask": True}, T, "a torch.Tensor", "bool"),
    (padded, {"key_lengths": 4}, T, "a torch.Tensor", "int"),
    (padded, {"key_lengths": np.array([4, 2])}, T, "a torch.Tensor", "numpy.ndarray"),
    (jagged_step, {"cu_seqlens_k": np.array([0, 3, 7])}, T, "a torch.Tensor", "numpy.ndarray"),
    (jagged_step, {"cu_seqlens_k": 7}, T, "a torch.Tensor", "int"),
    (jagged_step, {"cu_seqlens_k": "0,3,7"}, T, "a torch.Tensor", "str"),
    (jagged_step, {"max_seqlen_k": "4"}, T, "an int", "str"),
    (jagged_step, {"max_seqlen_k": [4]}, T, "an int", "list"),
    (jagged_step, {"max_seqlen_k": torch.nan}, T, "an int", "float"),
    (padded, {"dropout_p": [0.1]}, T, "a float", "list"),
    (padded, {"dropout_p": torch.tensor(0.1)}, T, "a float", "torch.Tensor"),
    (padded, {"dropout_p": 0.1j}, T, "a float", "complex"),
    (padded, {"deterministic": "yes"}, T, "a bool or None", "str"),
    (padded, {"deterministic": torch.tensor(True)}, T, "a bool or None", "torch.Tensor"),
    # More dtypes, layouts and devices
    (padded, {"score_weight": zeros(D).cfloat()}, T, "float32", "complex64"),
    (padded, {"value": zeros(B, TK, DV).to(torch.float8_e4m3fn)}, T, "float32", "float8_e4m3fn"),
    (padded, {"value": quantized(B, TK, DV)}, T, "float32", "quint8"),
    (padded, {"score_weight": zeros(D).to_sparse()}, V, "a strided tensor", "sparse_coo"),
    (padded, {"score_weight": nested(3, 4)}, V, "a strided tensor", "a nested one"),
    (padded, {"key": zeros(B, TK, D).to("meta")}, V, "device meta, as key", "cpu", "value"),
    (padded, {"key_padding_mask": zeros(B, TK).bool().to_sparse()}, V, "strided", "sparse_coo"),
    (padded, {"key_padding_mask": nested(TK, 3).bool()}, V, "a strided tensor", "a nested one"),
    (padded, {"key_lengths": ints(4, 2).to_sparse()}, V, "a strided tensor", "sparse_coo"),
    (padded, {"key_lengths": ints(4, 2).bool()}, T, "int32 or int64", "bool"),
    (padded, {"key_lengths": ints(4, 2).to("meta")}, V, "device cpu", "meta"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, 7).to_sparse()}, V, "a strided tensor", "sparse_coo"),
    (jagged_step, {"cu_seqlens_k": nested(3, 4).long()}, V, "a strided tensor", "a nested one"),
    (jagged_step, {"cu_seqlens_k": strided_nested().long()}, V, "strided tensor", "a nested one"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, 7).byte()}, T, "int32 or int64", "uint8"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, 7).cfloat()}, T, "int32 or int64", "complex64"),
    # More shapes
    (padded, {"key": zeros(0)}, V, "(B, Tk, D)", "(0,)"),
    (padded, {"value": zeros()}, V, "(B, Tk, Dv)", "()"),
    (padded, {"key_padding_mask": zeros(1, TK).bool()}, V, "(2, 4)", "(1, 4)"),
    (padded, {"key_padding_mask": zeros(TK, B).bool()}, V, "(2, 4)", "(4, 2)"),
    (padded, {"key_padding_mask": zeros().bool()}, V, "(2, 4)", "()"),
    (padded, {"key_lengths": ints(4, 2).view(2, 1)}, V, "(2,)", "(2, 1)"),
    (padded, {"key_lengths": ints()}, V, "(2,)", "(0,)"),
    (padded, {"key_lengths": torch.tensor(4)}, V, "(2,)", "()"),
    (jagged_step, {"cu_seqlens_k": torch.tensor(7)}, V, "(B + 1,)", "()"),
    (padded, {"cu_seqlens_k": ints(0, 3, 4)}, V, "(total_k, D)", "(2, 4, 5)", "key"),
    (jagged_step, {"cu_seqlens_k": None}, V, "(B, Tk, D) without cu_seqlens_k", "(7, 5)", "key"),
    # More values
    (padded, {"key_lengths": ints(4, -HUGE)}, V, "between 0 and Tk = 4", str(-HUGE)),
    (padded, {"key_lengths": ints(HUGE32, 4).int()}, V, "between 0 and Tk = 4", str(HUGE32)),
    (jagged_step, {"cu_seqlens_k": ints(-3, 0, 7)}, V, "start at 0", "cu_seqlens_k[0] = -3"),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, HUGE32).int()}, V, "at most 7", str(HUGE32)),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, HUGE)}, V, "at most 7", str(HUGE)),
    (jagged_step, {"cu_seqlens_k": ints(0, 3, -HUGE)}, V, "never decrease", str(-HUGE)),
    (jagged_step, {"cu_seqlens_k": ints(0, 7, 3), "max_seqlen_k": 7}, V, "never decrease", "= 3"),
    (padded, {"max_seqlen_k": -1}, V, "at least 0", "-1"),
    (padded, {"max_seqlen_k": np.int64(3)}, V, "at least 4", "3"),
    (padded, {"dropout_p": torch.inf}, V, "between 0 and 1", "inf"),
    (padded, {"dropout_p": np.float32(2)}, V, "between 0 and 1", "2.0"),
)

BACKEND_CALLS = rows(
    (padded, {"backend": "gpu"}, V, "triton, cuda, cpu, reference", "'gpu'"),
    (padded, {"backend": "CPU"}, V, "cpu", "'CPU'"),
    (padded, {"backend": ""}, V, "cpu", "''"),
    (padded, {"backend": 3}, T, "a str or None", "int"),
    (padded, {"backend": torch.device("cpu")}, T, "a str", "device"),
    (padded, {"backend": "Triton"}, V, "one of triton, cuda, cpu, reference", "'Triton'"),
    (padded, {"backend": "cpu "}, V, "one of triton, cuda, cpu, reference", "'cpu '"),
    (padded, {"backend": b"cpu"}, T, "a str or None", "bytes"),
    (padded, {"backend": ["cpu"]}, T, "a str or None", "list"),
    (padded, {"backend": True}, T, "a str or None", "bool"),
)

# Of additive_attention alone.
QUERY_CALLS = rows(
    (padded, {"query": None}, T, "a torch.Tensor", "NoneType"),
    (padded, {"query": zeros(B, TQ, D).int()}, T, "float", "int32"),
    (padded, {"query": zeros(B, TQ, D).half()}, T, "float32", "float16"),
    (padded, {"query": zeros(B, TQ, D).double()}, T, "float32", "float64"),
    (padded, {"query": zeros(B, TQ, D).to_sparse()}, V, "strided", "coo"),
    (padded, {"query": zeros(B, TQ, D).to("meta")}, V, "cpu", "meta"),
    (padded, {"query": zeros(D)}, V, "(B, D) or (B, Tq, D)", "(5,)"),
    (padded, {"query": zeros(B, TQ, 1, D)}, V, "(B, D) or (B, Tq, D)", "(2, 3, 1, 5)"),
    (padded, {"query": zeros(B, TQ, 4)}, V, "(5,)", "(2, 3, 4)"),
    (padded, {"query": zeros(3, TQ, D)}, V, "2 sequences", "3"),
    (step, {"query": zeros(3, D)}, V, "2 sequences", "3"),
    (step, {"query": zeros(1, D)}, V, "2 sequences", "1"),
    (heads, {"query": zeros(B, TQ, 3, D)}, V, "(2, 5)", "(2, 3, 3, 5)"),
    (heads, {"query": zeros(B, D)}, V, "(B, H, D) or (B, Tq", "(2, 5)"),
    (jagged_step, {"query": zeros(B, TQ, 1, D)}, V, "(B, Tq, D) without cu", "(2, 3, 1, 5)"),
    (jagged_step, {"query": zeros(6, D)}, V, "2 sequences", "6"),
    (jagged, {"query": zeros(B, TQ, D)}, V, "(total_q, D)", "(2, 3, 5)"),
    (padded, {"query": zeros(3, D), "cu_seqlens_q": ints(0, 2)}, V, "2 seq", "1", "cu_seqlens_q"),
    (padded, {"query": zeros(B, TQ, D), "cu_seqlens_q": ints(0, 2, 3)}, V, "(total_q, D)", "(2, 3"),
    (jagged, {"cu_seqlens_q": (0, 2, 6)}, T, "Tensor", "tuple"),
    (jagged, {"cu_seqlens_q": floats(0, 2, 6)}, T, "int32 or int64", "float32"),
    (jagged, {"cu_seqlens_q": ints(0, 2, 4, 6)}, V, "2 sequences", "3"),
    (jagged, {"cu_seqlens_q": ints(0)}, V, "2 sequences", "0"),
    (jagged, {"cu_seqlens_q": ints(2, 2, 6)}, V, "start at 0", "= 2"),
    (jagged, {"cu_seqlens_q": ints(0, 4, 2)}, V, "decrease", "= 4"),
    (jagged, {"cu_seqlens_q": ints(0, 2, 7)}, V, "at most 6, the rows of query", "7"),
    (jagged, {"cu_seqlens_q": ints(0, 2, 6).to("meta")}, V, "device cpu", "meta"),
    (jagged, {"max_seqlen_q": 3}, V, "at least 4", "3"),
    (jagged, {"max_seqlen_q": "4"}, T, "an int", "str"),
    (padded, {"max_seqlen_q": 2}, V, "at least 3", "2"),
    (njt, {"query": nested_with_holes()}, V, "without holes", "lengths()"),
    (njt, {"query": nested(2, 4, ragged_axis=2)}, V, "ragged in axis 1", "axis 2"),
    (njt, {"query": nested(2, 2, 2)}, V, "2 sequences", "3"),
    (njt, {"query": nested(2, 4, features=4)}, V, "(5,)", "(6, 4)"),
    (njt, {"cu_seqlens_q": ints(0, 2, 6)}, V, "None for a nested query", "offsets"),
    (padded, {"query": nested(2, 4, 1)}, V, "2 sequences", "3"),
    (padded, {"need_weights": 1}, T, "a bool", "int"),
    (padded, {"need_weights": None}, T, "a bool", "NoneType"),
    (padded, {"query": [[1.0]]}, T, "a torch.Tensor", "list"),
    (padded, {"query": np.zeros((B, TQ, D))}, T, "a torch.Tensor", "numpy.ndarray"),
    (padded, {"query": zeros(B, TQ, D).cfloat()}, T, "float32", "complex64"),
    (padded, {"query": strided_nested()}, V, "torch.jagged", "torch.strided"),
    (padded, {"query": zeros(0)}, V, "(B, D) or (B, Tq, D)", "(0,)"),
    (heads, {"query": zeros(B, TQ, D)}, V, "(2, 5)", "(2, 3, 5)"),
    (njt, {"query": zeros(6, D)}, V, "2 sequences", "6"),
    (jagged, {"query": nested(2, 4)}, V, "None for a nested query", "offsets", "cu_seqlens_q"),
    (jagged, {"cu_seqlens_q": np.array([0, 2, 6])}, T, "a torch.Tensor", "numpy.ndarray"),
    (jagged, {"cu_seqlens_q": 6}, T, "a torch.Tensor", "int"),
    (jagged, {"cu_seqlens_q": None}, V, "2 sequences", "6", "query"),
    (jagged, {"cu_seqlens_q": floats(0, torch.nan, 6)}, T, "int32 or int64", "float32"),
    (jagged, {"cu_seqlens_q": ints(0, 2, 6).bool()}, T, "int32 or int64", "bool"),
    (jagged, {"cu_seqlens_q": ints(0, 2, 6).to_sparse()}, V, "a strided tensor", "sparse_coo"),
    (jagged, {"cu_seqlens_q": ints(0, 2, 6).view(1, 3)}, V, "(B + 1,)", "(1, 3)"),
    (jagged, {"cu_seqlens_q": ints()}, V, "(B + 1,)", "(0,)"),
    (jagged, {"cu_seqlens_q": torch.tensor(6)}, V, "(B + 1,)", "()"),
    (jagged, {"cu_seqlens_q": ints(-2, 2, 6)}, V, "start at 0", "= -2"),
    (jagged, {"cu_seqlens_q": ints(0, -2, 6)}, V, "never decrease", "= -2"),
    (jagged, {"cu_seqlens_q": ints(0, 2, HUGE32).int()}, V, "at most 6", str(HUGE32)),
    (jagged, {"cu_seqlens_q": ints(0, HUGE, -HUGE)}, V, "never decrease", str(-HUGE)),
    (jagged, {"max_seqlen_q": -1}, V, "at least 0", "-1"),
    (jagged, {"max_seqlen_q": 4.0}, T, "an int", "float"),
    (jagged, {"max_seqlen_q": True}, T, "an int", "bool"),
    (jagged, {"max_seqlen_q": torch.tensor(4)}, T, "an int", "torch.Tensor"),
    (njt, {"max_seqlen_q": 3}, V, "at least 4", "3"),
    (padded, {"need_weights": "True"}, T, "a bool", "str"),
    (padded, {"need_weights": torch.tensor(True)}, T, "a bool", "torch.Tensor"),
    (padded, {"need_weights": np.True_}, T, "a bool", "numpy.bool"),
)

# Of AttentionMemory.attend.
ATTEND_CALLS = rows(
    (step, {"query": None}, T, "a torch.Tensor", "NoneType"),
    (step, {"query": zeros(B, D).half()}, T, "float32", "float16"),
    (step, {"query": zeros(B, D).long()}, T, "float32", "int64"),
    (step, {"query": zeros(B, 4)}, V, "(5,)", "(2, 4)"),
    (step, {"query": zeros(3, D)}, V, "2 sequences", "3"),
    (step, {"query": zeros(D)}, V, "(B, D)", "(5,)"),
    (step, {"query": zeros(B, 1, 1, D)}, V, "(B, D) or (B, Tq, D)", "(2, 1, 1, 5)"),
    (heads, {"query": zeros(B, D)}, V, "(B, H, D)", "(2, 5)"),
    (heads, {"query": zeros(B, 1, 1, H, D)}, V, "(B, H, D)", "(2, 1, 1, 2"),
    (jagged_step, {"query": zeros(B, 1, 1, D)}, V, "(B, D)", "(2, 1, 1, 5)"),
    (jagged_step, {"query": zeros(6, D)}, V, "2 sequences", "6"),
    (njt, {"query": zeros(B, 1, 1, D)}, V, "(B, D)", "(2, 1, 1, 5)"),
    (njt, {"query": nested(1, 1)}, V, "(B, D)", "a nested tensor"),
    (step, {"query": zeros(B, D).to("meta")}, V, "cpu", "meta"),
    (step, {"need_weights": 1}, T, "a bool", "int"),
    (step, {"query": np.zeros((B, D))}, T, "a torch.Tensor", "numpy.ndarray"),
    (step, {"query": zeros(B, D).cfloat()}, T, "float32", "complex64"),
    (step, {"query": zeros(B, D).to_sparse()}, V, "a strided tensor", "sparse_coo"),
    (step, {"query": zeros(B, D).double()}, T, "float32", "float64"),
    (step, {"need_weights": None}, T, "a bool", "NoneType"),
)
