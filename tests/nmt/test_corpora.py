import gzip
import hashlib
import json
import subprocess
import zipfile

import pytest

from attn_ext.nmt import corpora
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.corpora import Pair


def make_wheel(path):
    def member(component, language):
        return f"homeassistant/components/{component}/translations/{language}.json"

    with zipfile.ZipFile(path, "w") as wheel:
        english = {"title": "Lamp", "config": {"step": {"user": {"title": "Turn\n  on"}}}, "x": "X"}
        german = {"title": "Lampe", "config": {"step": {"user": {"title": "Ein­schalten"}}}}
        wheel.writestr(member("lamp", "en"), json.dumps(english))
        wheel.writestr(member("lamp", "de"), json.dumps(german))
        wheel.writestr(member("door", "en"), json.dumps({"title": "Door"}))
        wheel.writestr(member("door", "fr"), json.dumps({"title": "Porte"}))
        wheel.writestr("homeassistant/components/lamp/strings.json", "{}")


def test_homeassistant_wheel(tmp_path):
    make_wheel(tmp_path / "a.whl")
    assert corpora.read_homeassistant_wheel(tmp_path / "a.whl") == [
        Pair("Lamp", "Lampe", "lamp"),
        Pair("Turn on", "Ein­schalten", "lamp"),
    ]


class TestFetchHomeassistant:
    @pytest.fixture
    def wheel(self, tmp_path, monkeypatch):
        make_wheel(tmp_path / "a.whl")
        content = (tmp_path / "a.whl").read_bytes()
        monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(corpora, "HOMEASSISTANT_SHA256", hashlib.sha256(content).hexdigest())
        return content

    def fake_pip(self, monkeypatch, content, calls):
        def run(command, **_):
            calls.append(command)
            folder = command[command.index("--dest") + 1]
            with open(f"{folder}/{corpora.HOMEASSISTANT_WHEEL}", "wb") as file:
                file.write(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(corpora.subprocess, "run", run)

    def test_once(self, wheel, monkeypatch):
        calls = []
        self.fake_pip(monkeypatch, wheel, calls)
        assert corpora.load("homeassistant") == corpora.load("homeassistant")
        assert len(calls) == 1 and corpora.HOMEASSISTANT in calls[0]

    def test_wrong_content_is_not_kept(self, wheel, monkeypatch, tmp_path):
        self.fake_pip(monkeypatch, wheel + b"x", [])
        with pytest.raises(UsageError, match="sha256"):
            corpora.load("homeassistant")
        assert not list((tmp_path / "cache").glob("*.whl"))

    def test_pip_fails(self, wheel, monkeypatch):
        def run(command, **_):
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")

        monkeypatch.setattr(corpora.subprocess, "run", run)
        with pytest.raises(UsageError, match="cannot fetch homeassistant.*: ERROR: no network"):
            corpora.load("homeassistant")


SWITCH = '<span class="switchinline"><span hidden="true">Mac</span>PC</span>'


def page(*paragraphs):
    return "<html><body><aside>menu</aside>" + "\n".join(paragraphs) + "</body></html>"


def test_libreoffice_tree(tmp_path):
    texts = {
        "en-US": [
            '<h1 id="hd_id1" dir="auto"><a name="x"></a>Insert\n Section</h1>',
            '<p id="par_id2">Choose <span class="emph">Insert</span> &amp; <b>go</b>.<br>Now</p>',
            '<p id="par_id3">Only English</p>',
            f'<p id="par_id4">{SWITCH}</p>',
            '<p id="par_id5"><img src="a.svg" alt="icon"></p>',
            '<p id="par_id6">print x</p>',
            '<p class="related">Without id</p>',
        ],
        "de": [
            '<h1 id="hd_id1" dir="auto">Bereich einfügen</h1>',
            '<p id="par_id2"><span class="emph">Einfügen</span> &amp; los.<br>Jetzt</p>',
            f'<p id="par_id4">{SWITCH}</p>',
            '<p id="par_id5"><img src="a.svg" alt="Symbol"></p>',
            '<p id="par_id6">print x</p>',
        ],
    }
    for language, paragraphs in texts.items():
        for name in ("text/a.html", "text/b.html"):  # the same paragraphs embedded twice
            path = tmp_path / language / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page(*paragraphs), encoding="utf-8")
    (tmp_path / "en-US/text/only.html").write_text(page('<p id="par_id9">x</p>'))
    assert corpora.read_libreoffice_tree(tmp_path) == [
        Pair("Insert Section", "Bereich einfügen", "text/a.html"),
        Pair("Choose Insert & go. Now", "Einfügen & los. Jetzt", "text/a.html"),
    ]


def test_libreoffice_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path))
    monkeypatch.setattr(corpora.shutil, "which", lambda tool: None)
    with pytest.raises(UsageError, match="needs apt-get"):
        corpora.load("libreoffice")


def test_libreoffice_apt_fails(tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package\n")

    monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path))
    monkeypatch.setattr(corpora.shutil, "which", lambda tool: "/usr/bin/" + tool)
    monkeypatch.setattr(corpora.subprocess, "run", run)
    with pytest.raises(UsageError, match="apt-get update.*Unable to locate"):
        corpora.load("libreoffice")
    assert [path.name for path in tmp_path.iterdir()] == [corpora.LOCK_FILE]


class TestTsv:
    def read(self, tmp_path, content):
        path = tmp_path / "x.tsv"
        path.write_bytes(content)
        return corpora.read_tsv(path)

    def test_reads(self, tmp_path):
        content = "\ufeffa  b\tc\r\n\nd\te\u00a0f\n".encode()
        assert self.read(tmp_path, content) == [Pair("a b", "c", "a b"), Pair("d", "e f", "d")]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a\tb\nno tab here\n", r"line 2: expected source<TAB>target, got 1 field"),
            (b"a\tb\tc\n", r"line 1: expected source<TAB>target, got 3 field"),
            (b"a\tb\n\tc\n", r"line 2: the source side is empty"),
            (b"a\t  \n", r"line 1: the target side is empty"),
            (b"a\tb\n\n\xfcber\tx\n", r"line 3: not UTF-8 \(byte 0xfc at column 1\)"),
            (b"\n", r"holds no pairs"),
        ],
        ids=["no-tab", "two-tabs", "empty-source", "empty-target", "latin-1", "nothing"],
    )
    def test_bad_lines(self, tmp_path, content, message):
        with pytest.raises(UsageError, match=message) as error:
            self.read(tmp_path, content)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("end", ["gz", "zst"])
    def test_compressed(self, tmp_path, end):
        path = tmp_path / f"x.tsv.{end}"
        compression = {"gz": gzip, "zst": corpora.zstd()}[end]
        content = compression.compress(b"a\tb\n")
        path.write_bytes(content)
        assert corpora.read_tsv(path) == [Pair("a", "b", "a")]
        path.write_bytes(content[:-2])
        with pytest.raises(UsageError, match=f"x.tsv.{end} is cut off"):
            corpora.read_tsv(path)
        for damaged in (b"not compressed", content[:10] + b"\xff" * 20):
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match=f"x.tsv.{end} is .*damaged"):
                corpora.read_tsv(path)

    def test_missing(self, tmp_path):
        with pytest.raises(UsageError, match="cannot read .*none.tsv: No such file"):
            corpora.read_tsv(tmp_path / "none.tsv")
