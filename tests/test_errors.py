"""Wrong calls: each raises, naming the argument, what was expected and what was got."""

import re
from collections.abc import Callable

import pytest
import torch
from guards import Guards
from helpers import BACKEND_DEVICES, require_backend
from torch import Tensor
from wrong_calls import (
    ATTEND_CALLS,
    BACKEND_CALLS,
    KEY_SIDE_CALLS,
    QUERY_CALLS,
    Wrong,
    heads,
    jagged,
    jagged_step,
    njt,
    padded,
    rows,
    step,
)

import attn_ext
from attn_ext import AdditiveAttention, AttentionMemory, backends, reference

ALL_CALLS = [*KEY_SIDE_CALLS, *QUERY_CALLS, *BACKEND_CALLS]


def each(calls: list[Wrong]) -> pytest.MarkDecorator:
    ids = [f"{number}-{wrong.id}" for number, wrong in enumerate(calls)]
    return pytest.mark.parametrize("wrong", calls, ids=ids)


def expect(wrong: Wrong, function: Callable, arguments: dict[str, object]) -> None:
    """The error that names the argument, and nothing written to any argument or beside it."""
    guards = Guards()
    arguments = {name: guarded(guards, value) for name, value in arguments.items()}
    pattern = rf"^{wrong.named}: expected .*{re.escape(wrong.expected)}"
    pattern += rf".*, got .*{re.escape(wrong.got)}"
    with pytest.raises(wrong.error, match=pattern) as raised:
        function(**arguments)
    assert type(raised.value) is wrong.error and "\n" not in str(raised.value)
    guards.check()


def guarded(guards: Guards, value: object) -> object:
    """A guarded copy of a plain tensor; anything else as it is."""
    if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.is_nested:
        return value
    return guards.copy(value) if value.layout == torch.strided else value


@pytest.mark.parametrize("valid", [padded, heads, step, jagged_step, jagged, njt])
def test_unchanged_calls_are_valid(backend: str, valid: Callable[[], dict[str, object]]):
    on_device = {name: tensor.to(BACKEND_DEVICES[backend]) for name, tensor in valid().items()}
    attn_ext.additive_attention(**on_device, backend=backend)
    reference.additive_attention(**valid())


@each(ALL_CALLS)
def test_additive_attention(wrong: Wrong):
    expect(wrong, attn_ext.additive_attention, {**wrong.valid(), **wrong.changes})


@each([wrong for wrong in KEY_SIDE_CALLS + QUERY_CALLS if wrong.named != "deterministic"])
def test_reference(wrong: Wrong):
    """Which ignores ``deterministic``, as its docstring says."""
    expect(wrong, reference.additive_attention, {**wrong.valid(), **wrong.changes})


@each([*KEY_SIDE_CALLS, *BACKEND_CALLS])
def test_attention_memory(wrong: Wrong):
    arguments = {**wrong.valid(), **wrong.changes}
    for name in ("query", "cu_seqlens_q"):
        arguments.pop(name, None)
    expect(wrong, AttentionMemory, arguments)


@each(ATTEND_CALLS)
def test_attend(backend: str, wrong: Wrong):
    device = BACKEND_DEVICES[backend]
    arguments = {name: tensor.to(device) for name, tensor in wrong.valid().items()}
    query = wrong.changes.get("query", arguments.pop("query"))
    if isinstance(query, Tensor) and not query.is_meta:
        query = query.to(device)
    memory = AttentionMemory(**arguments, backend=backend)
    expect(wrong, memory.attend, {**wrong.changes, "query": query})


VALUE_CALLS = [
    wrong
    for wrong in KEY_SIDE_CALLS + QUERY_CALLS
    if wrong.error is ValueError
    and wrong.named in ("cu_seqlens_q", "cu_seqlens_k", "key_lengths")
    and any(words in wrong.expected for words in ("start", "decrease", "at most", "between"))
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
@each(VALUE_CALLS)
def test_values_on_a_gpu_are_checked_if_asked(monkeypatch: pytest.MonkeyPatch, wrong: Wrong):
    arguments = {
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in {**wrong.valid(), **wrong.changes}.items()
    }
    monkeypatch.delenv("ATTN_EXT_CHECK", raising=False)
    attn_ext.additive_attention(**arguments)
    torch.cuda.synchronize()  # nothing outside the tensors was touched
    monkeypatch.setenv("ATTN_EXT_CHECK", "1")
    expect(wrong, attn_ext.additive_attention, arguments)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_float64_where_it_is_not_computed(name: str):
    if name not in BACKEND_DEVICES:
        pytest.skip(f"backend {name} is not here")
    device = BACKEND_DEVICES[require_backend(name)]
    doubles = {argument: tensor.to(device).double() for argument, tensor in padded().items()}
    with pytest.raises(ValueError, match=f"^backend: expected one of cpu, reference.*got '{name}'"):
        attn_ext.additive_attention(**doubles, backend=name)


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


SIZES = {"query_dim": 4, "key_dim": 5, "attn_dim": 8}
MODULE_CALLS = rows(
    (SIZES.copy, {"query_dim": 0}, ValueError, "at least 1", "0"),
    (SIZES.copy, {"query_dim": None}, TypeError, "an int", "NoneType"),
    (SIZES.copy, {"key_dim": 4.0}, TypeError, "an int", "float"),
    (SIZES.copy, {"key_dim": -5}, ValueError, "at least 1", "-5"),
    (SIZES.copy, {"attn_dim": 0}, ValueError, "at least 1", "0"),
    (SIZES.copy, {"attn_dim": "8"}, TypeError, "an int", "str"),
    (SIZES.copy, {"num_heads": 3}, ValueError, "a divisor of attn_dim = 8", "3"),
    (SIZES.copy, {"num_heads": 0}, ValueError, "at least 1", "0"),
    (SIZES.copy, {"num_heads": -2}, ValueError, "at least 1", "-2"),
    (SIZES.copy, {"num_heads": True}, TypeError, "an int", "bool"),
    (SIZES.copy, {"dropout": 1.5}, ValueError, "a probability between 0 and 1", "1.5"),
    (SIZES.copy, {"dropout": -1.0}, ValueError, "a probability between 0 and 1", "-1.0"),
    (SIZES.copy, {"dropout": torch.nan}, ValueError, "a probability between 0 and 1", "nan"),
    (SIZES.copy, {"dropout": "a"}, TypeError, "a float", "str"),
)


@each(MODULE_CALLS)
def test_module(wrong: Wrong):
    expect(wrong, AdditiveAttention, {**wrong.valid(), **wrong.changes})


def unprojected() -> dict[str, object]:
    return {"query": torch.randn(2, 3, 4), "key": torch.randn(2, 6, 5)}


FORWARD_CALLS = rows(
    (unprojected, {"query": None}, TypeError, "a torch.Tensor", "NoneType"),
    (unprojected, {"query": torch.randn(2, 3, 7)}, ValueError, "4 features", "(2, 3, 7)"),
    (unprojected, {"query": torch.tensor(1.0)}, ValueError, "4 features", "()"),
    (unprojected, {"query": torch.zeros(2, 3, 4).half()}, TypeError, "query_proj", "float16"),
    (unprojected, {"query": torch.zeros(2, 3, 4).int()}, TypeError, "query_proj", "int32"),
    (unprojected, {"query": torch.zeros(2, 3, 4).to("meta")}, ValueError, "device cpu", "meta"),
    (unprojected, {"query": torch.randn(3, 3, 4)}, ValueError, "2 sequences", "3"),
    (unprojected, {"key": [[1.0]]}, TypeError, "a torch.Tensor", "list"),
    (unprojected, {"key": torch.randn(2, 6, 4)}, ValueError, "5 features", "(2, 6, 4)"),
    (unprojected, {"key": torch.zeros(2, 6, 5).double()}, TypeError, "key_proj", "float64"),
    (unprojected, {"value": torch.randn(2, 6, 7)}, ValueError, "num_heads = 2 divides", "7"),
    (unprojected, {"value": torch.tensor(1.0)}, ValueError, "num_heads = 2 divides", "()"),
    (unprojected, {"value": 3.0}, TypeError, "a torch.Tensor", "float"),
    (unprojected, {"value": torch.randn(2, 5, 6)}, ValueError, "as key", "(2, 5, 2, 3)"),
    (unprojected, {"key_lengths": torch.tensor([7, 2])}, ValueError, "Tk = 6", "7"),
    (unprojected, {"need_weights": 1}, TypeError, "a bool", "int"),
)


@each(FORWARD_CALLS)
def test_forward_of_the_module(wrong: Wrong):
    module = AdditiveAttention(**SIZES, num_heads=2)
    arguments = {"value": torch.randn(2, 6, 6), **wrong.valid(), **wrong.changes}
    expect(wrong, module, arguments)
    if wrong.named not in ("query", "need_weights"):
        del arguments["query"]
        expect(wrong, module.memory, arguments)


@pytest.mark.parametrize("keyword", ["key_length", "cu_seqlens", "attn_mask", "dropout_p"])
def test_misspelt_keyword_of_the_module(keyword: str):
    module = AdditiveAttention(**SIZES)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        module(**unprojected(), **{keyword: None})
