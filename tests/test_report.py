"""``python -m attn_ext``, which goes into bug reports."""

import pytest
import torch

import attn_ext
from attn_ext import __main__ as report
from attn_ext import backends


@pytest.fixture(autouse=True)
def only_cpu_and_reference(monkeypatch: pytest.MonkeyPatch):
    """As on a machine without a GPU; Triton's interpreter would take long."""
    monkeypatch.setattr(backends, "_triton_problem", lambda: "triton cannot be imported")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def lines_of(capsys: pytest.CaptureFixture) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {" ".join(line.split(":")[0].split()): line for line in lines}


def test_a_missing_library_is_told_and_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_cpu_problem", "the C++ library was not built; do so")
    assert report.main() == 0
    lines = lines_of(capsys)
    assert lines["backend cpu"].endswith("missing, the C++ library was not built; do so")
    assert lines["backend triton"].endswith("missing, triton cannot be imported")
    assert "check reference" in lines and "check cpu" not in lines
    assert any(attn_ext.__version__ in line for line in lines.values())
    assert any("plain PyTorch" in line and "(reference)" in line for line in lines.values())


@pytest.mark.parametrize("planted", ["wrong", "nan", "raises"])
def test_a_backend_that_computes_something_else_fails(monkeypatch, capsys, planted):
    right = attn_ext.additive_attention

    def attend(*arguments, **options):
        if planted == "raises":
            raise RuntimeError("illegal instruction")
        context = right(*arguments, **options)
        if planted == "nan":
            return context * torch.nan
        of_query = arguments[0].sum()  # whose gradient alone is wrong
        return context + 1e-3 * (of_query - of_query.detach())

    monkeypatch.setattr(attn_ext, "additive_attention", attend)
    assert report.main() == 1
    lines = lines_of(capsys)
    assert "FAILED" in lines["check reference"]
    assert planted != "raises" or "illegal instruction" in lines["check reference"]
