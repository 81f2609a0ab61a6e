"""What a user reads: help texts that name every argument and whose examples run; typed."""

import doctest
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import attn_ext
from attn_ext import compat, functional, pool_module, pooling

DOCUMENTED = [
    attn_ext.additive_attention,
    attn_ext.additive_pool,
    attn_ext.AdditivePool,
    attn_ext.AdditivePool.forward,
    attn_ext.AdditiveAttention,
    attn_ext.AdditiveAttention.forward,
    attn_ext.AdditiveAttention.memory,
    attn_ext.AttentionMemory,
    attn_ext.AttentionMemory.attend,
    compat.replace_attention,
]


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda function: function.__qualname__)
def test_help_names_every_argument(function: Callable):
    arguments = re.search(r"^Args:\n((?: .*\n|\n)+)", inspect.getdoc(function) + "\n", re.M)[1]
    # Entries are indented by four: "name: text", or "name, name,\n        name: text".
    entries = re.findall(r"^ {4}(\w+(?:,\s+\w+)*):", arguments, re.M)
    named = [name for entry in entries for name in re.split(r",\s+", entry)]
    taken = [name for name in inspect.signature(function).parameters if name != "self"]
    assert sorted(named) == sorted(taken)


@pytest.mark.parametrize("module", [functional, pooling, pool_module], ids=lambda m: m.__name__)
def test_examples_of_help_run(module: ModuleType):
    results = doctest.testmod(module)
    assert results.attempted >= 5 and results.failed == 0


def test_types_are_there_for_type_checkers():
    assert (Path(attn_ext.__file__).parent / "py.typed").exists()
