"""Nothing but the data commands reaches the network, and nothing runs code that it was given."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_data import TINY_RUN

import attn_ext
import attn_ext.triton_kernels

PACKAGES = [Path(package.__file__).parent for package in (attn_ext, attn_ext.triton_kernels)]

# Python tells its audit hooks of whatever would leave this process.
GUARD = """
import sys

def guard(event, arguments):
    if event.startswith(("socket.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
                         "urllib.", "subprocess.")) and not allowed(event, arguments):
        sys.stderr.write(f"GUARD {event} {arguments!r}\\n")
        sys.stderr.flush()
        import os
        os._exit(99)

def allowed(event, arguments):
    # matplotlib asks for the fonts of this machine, once for each user.
    return event == "subprocess.Popen" and arguments[1][:1] == ["fc-list"]

sys.addaudithook(guard)
"""
IMPORTS = """
import importlib, pkgutil
import attn_ext, attn_ext.triton_kernels
for package in (attn_ext, attn_ext.triton_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith("attn_ext._C"):  # torch loads those
            importlib.import_module(module.name)
            print(module.name)
"""
RUN = """
import io, json
from attn_ext.nmt import plot, train, translate
tsv, out, options = json.loads(sys.argv[1])
train.main(["--data", tsv, "--out", out, "--max-steps", "2", *options])
sys.stdin = io.TextIOWrapper(io.BytesIO(b"rot\\n"))
translate.main(["--model", out])
plot.main(["--model", out, "--source", "rot", "--out", out + "/x.png"])
print("done")
"""


def guarded(code, *arguments):
    command = [sys.executable, "-c", GUARD + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 9)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "from attn_ext.nmt import corpora; corpora.load('homeassistant')",
    ],
)
def test_the_guard_would_tell(code, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path))
    done = guarded(code)
    assert done.returncode == 99 and "GUARD" in done.stderr


@pytest.fixture(scope="module")
def whole_run(tsv, tmp_path_factory):
    """All modules imported, a model trained and used, in one process: how it ended, its folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    return guarded(IMPORTS + RUN, json.dumps([str(tsv), str(out), TINY_RUN])), out


def test_imports(whole_run):
    done, _ = whole_run
    assert done.returncode == 0, done.stderr
    files = {path for package in PACKAGES for path in package.rglob("*.py")}
    assert len(files) > 40
    modules = {name.rpartition(".")[2] for name in done.stdout.split()}
    assert {path.stem for path in files} - {"__init__"} <= modules


def test_training_translating_and_drawing(whole_run):
    done, out = whole_run
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n") and (out / "x.png").exists()
    assert len(list(out.glob("attention-*.png"))) > 1  # other tests draw but one


# -- what the sources may not call -------------------------------------------------------------

MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
DOWNLOADS = {"ftplib", "http", "requests", "socket", "subprocess", "urllib", "urllib3"}
FUNCTIONS = {"eval", "exec", "compile", "__import__"}


def faults(source):
    """What a module does that could run code from a file, or reach out; line numbers and words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [module] if module else [alias.name for alias in node.names]
            for name in names:
                if name.partition(".")[0] in MODULES | DOWNLOADS:
                    yield node.lineno, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FUNCTIONS or called in ("os.system", "os.popen"):
            yield node.lineno, called
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle"
        if keywords.get("shell", "False") != "False":
            yield node.lineno, "shell"
        if called.startswith("torch.hub."):
            yield node.lineno, called


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "import torch.nn, http.client",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=wish)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
        "torch.hub.load_state_dict_from_url(url)",
    ],
)
def test_faults_are_found(source):
    assert list(faults(source))


def test_sources_run_nothing_they_are_given():
    files = [path for package in PACKAGES for path in package.rglob("*.py")]
    assert len(files) > 40
    found = {(path.name, *fault[1:]) for path in files for fault in faults(path.read_text())}
    assert found == {("corpora.py", "import subprocess")}  # the data commands
    assert not list(faults("model.eval(); torch.load(path, weights_only=True); re.compile(text)"))
