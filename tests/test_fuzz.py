"""``make fuzz``: what its command line refuses, and when an interrupted run is not gone on with."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

TESTS = Path(__file__).parent


def test_chunk_without_its_seed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--chunk", "3"])
    with pytest.raises(SystemExit, match="2"):
        fuzz.main()
    assert "--chunk needs the --seed of its run" in capsys.readouterr().err


def test_a_failure_is_run_again_from_any_folder(tmp_path):
    text = (TESTS / "found_calls.jsonl").read_text().splitlines()[0]
    failure = {"property": "budget", "error": "off", "call": text}
    command = fuzz.describe(failure, "reference", seed=1, chunk=0).splitlines()[1]
    run = subprocess.run(command, shell=True, cwd=tmp_path, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert "budget: " in run.stdout


def test_other_versions_are_another_run(monkeypatch):
    before, versions = fuzz.digest_of_sources(), fuzz.versions()
    for name in ("python", *fuzz.PACKAGES):
        others = {**versions, name: "0"}
        monkeypatch.setattr(fuzz, "versions", lambda others=others: others)
        assert fuzz.digest_of_sources() != before, name
    monkeypatch.setattr(fuzz, "versions", lambda: versions)
    assert fuzz.digest_of_sources() == before


def test_digest_covers_what_a_run_reads():
    """All of the tests' modules that one imports, and the sources that it compiles."""
    covered = {path for pattern in fuzz.SOURCES for path in fuzz.ROOT.glob(pattern)}
    code = (
        "import sys, fuzz; fuzz.prepare('triton'); import calls, properties, emulated_cuda;"
        "print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, env=environment, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    imported = {Path(name).resolve() for name in run.stdout.split()}
    of_tests = {path for path in imported if path.parent == TESTS}
    assert {path.stem for path in of_tests} > set(fuzz.TEST_MODULES)
    assert of_tests <= covered
    ours = {fuzz.ROOT / "attn_ext" / path.name for path in imported if path.match("attn_ext/*.py")}
    assert len(ours) > 8 and ours <= covered
    assert set((TESTS / "cuda_emulation").glob("*.[ch]*")) <= covered
