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
