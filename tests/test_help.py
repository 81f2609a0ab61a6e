"""What a user reads: help texts that name every argument and whose examples run; typed."""

import doctest
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

import attn_ext
from attn_ext import compat, functional

DOCUMENTED = [
    attn_ext.additive_attention,
    attn_ext.AdditiveAttention,
    attn_ext.AdditiveAttention.forward,
    attn_ext.AdditiveAttention.memory,
    attn_ext.AttentionMemory,
    attn_ext.AttentionMemory.attend,
    compat.replace_attention,
]


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda function: function.__qualname__)
def test_help_names_every_argument(function: Callable):
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert name == "self" or name in text.partition("Args:")[2], name


def test_example_of_help_runs():
    results = doctest.testmod(functional)
    assert results.attempted >= 8 and results.failed == 0


def test_types_are_there_for_type_checkers():
    assert (Path(attn_ext.__file__).parent / "py.typed").exists()
