"""The examples run, learn and draw, and what they compare with is the same model."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "beside")
# Of what an example prints with --fast: the loss of the first steps and of the last ones, and a
# result, of which after so few steps no more can be said than that it is a share of something.
LOSSES = {
    "attention_pooling": r"attention pooling: loss (\S+) -> (\S+),",
    "dates": r"step 1: loss (\S+)\n.*step 20: loss (\S+)\n",
    "pointer_network": r"step 1: loss (\S+)\n.*step 20: loss (\S+)\n",
    "speech_recogniser": r"step 1: loss (\S+)\n.*step 10: loss (\S+)\n",
}
RESULTS = {
    "attention_pooling": (r"AUC (\S+) on", 1),
    "dates": (r"(\d+) of 100 right", 100),
    "pointer_network": (r"training\): (\S+)% of hulls exactly", 100),
    "speech_recogniser": (r"token error rate .*: (\S+)% of", 200),  # insertions count too
}


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path, monkeypatch, capsys):
    if name == "attention_pooling":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    picture = tmp_path / "picture.png"
    # As the command line does, but in this process, which has loaded torch.
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](["--fast", "--out", str(picture)])
    output = capsys.readouterr().out

    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5_000
    first, last = map(float, re.search(LOSSES[name], output, re.S).groups())
    assert last < 0.95 * first
    pattern, most = RESULTS[name]
    assert 0 <= float(re.search(pattern, output)[1]) <= most
    # That both attentions gave the same loss, and that finite, was checked before they were timed.
    steps = re.findall(r"a training step with (.+): (\S+) ms, (\S+) MB\n", output)
    assert [attention for attention, _, _ in steps] == ["attn_ext", "plain PyTorch"]
    assert all(float(milliseconds) > 0 for _, milliseconds, _ in steps)
