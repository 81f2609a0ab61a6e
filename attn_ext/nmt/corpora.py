"""Sentence pairs from the three places they can come from: two public corpora and a TSV file.

Files of text may be compressed, by gzip (.gz) or Zstandard (.zst).

Each reader yields `Pair(source, target, group)`; the group (a component, a page) is what the split
keeps together, because strings within one are templated and would leak.
"""

import contextlib
import fcntl
import gzip
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from attn_ext.nmt.cli import UsageError, require

HOMEASSISTANT = "homeassistant==2026.2.3"
HOMEASSISTANT_WHEEL = "homeassistant-2026.2.3-py3-none-any.whl"
HOMEASSISTANT_SHA256 = "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c"
LIBREOFFICE_PACKAGES = ("libreoffice-help-en-us", "libreoffice-help-de")
LOCK_FILE = ".lock"  # in the cache


class Pair(NamedTuple):
    source: str
    target: str
    group: str


def normalise(text):
    """One line, single spaces."""
    return " ".join(text.split())


def cache_dir():
    """Where fetched corpora lie: $ATTN_EXT_CACHE, $XDG_CACHE_HOME/attn_ext or ~/.cache/attn_ext."""
    if os.environ.get("ATTN_EXT_CACHE"):
        return Path(os.environ["ATTN_EXT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_ext"


def load(corpus):
    """The pairs of a named corpus, en -> de, fetched on first use."""
    readers = {"homeassistant": homeassistant, "libreoffice": libreoffice}
    return readers[corpus]()


# -- Home Assistant: interface strings, one JSON tree per component and language ---------------


def homeassistant():
    return read_homeassistant_wheel(_fetch_homeassistant())


def read_homeassistant_wheel(path):
    """Join components/*/translations/{en,de}.json on component and key path."""
    member = re.compile(r"homeassistant/components/([^/]+)/translations/(en|de)\.json")
    strings = {"en": {}, "de": {}}
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if match := member.fullmatch(name):
                component, language = match.groups()
                strings[language][component] = dict(_leaves(json.loads(wheel.read(name))))
    pairs = []
    for component, english in strings["en"].items():
        german = strings["de"].get(component, {})
        for key, source in english.items():
            if key in german:
                pairs.append(Pair(normalise(source), normalise(german[key]), component))
    return pairs


def _leaves(tree, path=()):
    """(key path, string) for every string of a JSON tree."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, str):
        yield path, tree


def _fetch_homeassistant():
    wheel = cache_dir() / HOMEASSISTANT_WHEEL
    if _is_whole(wheel):
        return wheel
    with _fetching("homeassistant") as folder:
        if _is_whole(wheel):  # another process has fetched it meanwhile
            return wheel
        print(f"fetching {HOMEASSISTANT} (51 MB) into {wheel.parent}", file=sys.stderr)
        # Only data is read from the wheel, so its own Python requirement does not matter.
        _call(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--only-binary=:all:", "--python-version", "3.14", "--dest", str(folder),
             HOMEASSISTANT],
            f"cannot fetch {HOMEASSISTANT} with pip",
        )  # fmt: skip
        fetched = folder / HOMEASSISTANT_WHEEL
        if not fetched.exists():
            raise UsageError(f"pip download did not bring {HOMEASSISTANT_WHEEL}")
        digest = sha256(fetched)
        if digest != HOMEASSISTANT_SHA256:
            raise UsageError(
                f"{HOMEASSISTANT_WHEEL} has sha256 {digest}, expected {HOMEASSISTANT_SHA256}"
            )
        os.replace(fetched, wheel)
    return wheel


def _is_whole(wheel):
    return wheel.exists() and sha256(wheel) == HOMEASSISTANT_SHA256


# -- LibreOffice: help pages, paragraphs with stable ids ---------------------------------------


def libreoffice():
    return read_libreoffice_tree(_fetch_libreoffice())


def read_libreoffice_tree(root):
    """Join help/{en-US,de}/**/*.html on page and on the par_id.../hd_id... of the paragraphs."""
    english_root, german_root = Path(root) / "en-US", Path(root) / "de"
    pairs = {}
    for page in sorted(english_root.rglob("*.html")):
        name = page.relative_to(english_root)
        if not (german_root / name).exists():
            continue
        english, german = _paragraphs(page), _paragraphs(german_root / name)
        for identifier, source in english.items():
            target = german.get(identifier)
            if source and target and source != target:  # equal ones are code and formulas
                pair = Pair(source, target, str(name))
                # A paragraph embedded in several pages belongs to the first.
                pairs.setdefault((identifier, *pair[:2]), pair)
    return list(pairs.values())


def _paragraphs(path):
    parser = _ParagraphParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    return {identifier: normalise("".join(parts)) for identifier, parts in parser.texts.items()}


class _ParagraphParser(html.parser.HTMLParser):
    """Collects the text of <p|h1..h6 id="par_id|hd_id...">; variants that a page hides are skipped.

    A page holds the wording for every application and system and shows one by script, e.g.
    <span class="switchinline"><span hidden ...>; those paragraphs say several things at once.
    """

    VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "wbr"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.texts = {}
        self._identifier = None
        self._tag = None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        identifier = attributes.get("id") or ""
        if tag in ("p", "h1", "h2", "h3", "h4", "h5", "h6"):
            self._leave()
            if re.match(r"(par|hd)_id", identifier):
                self._identifier, self._tag = identifier, tag
                # An id that comes twice on a page is ambiguous after the first.
                if identifier in self.texts:
                    self._identifier = None
                else:
                    self.texts[identifier] = []
        elif self._identifier is not None:
            if "hidden" in attributes or attributes.get("class") == "switchinline":
                self.texts[self._identifier] = []
                self._identifier = None
            elif tag in self.VOID:
                self.texts[self._identifier].append(" ")

    def handle_endtag(self, tag):
        if tag == self._tag:
            self._leave()

    def handle_data(self, data):
        if self._identifier is not None:
            self.texts[self._identifier].append(data)

    def _leave(self):
        self._identifier = self._tag = None


def _fetch_libreoffice():
    root = cache_dir() / "libreoffice-help"
    if root.exists():
        return root
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise UsageError(
                f"--corpus libreoffice comes from Debian packages and needs {tool}, which is not "
                "on this machine; use --corpus homeassistant or --data FILE.tsv"
            )
    with _fetching("libreoffice") as folder:
        if root.exists():  # another process has fetched it meanwhile
            return root
        print(f"fetching {' and '.join(LIBREOFFICE_PACKAGES)} into {root}", file=sys.stderr)
        # apt checks the packages by the signed index that it has.
        _call(
            ["apt-get", "download", *LIBREOFFICE_PACKAGES],
            f"cannot fetch {' '.join(LIBREOFFICE_PACKAGES)} with apt-get (run `apt-get update` "
            "first? use --corpus homeassistant where apt is not at hand)",
            cwd=folder,
        )
        for package in folder.glob("*.deb"):
            _call(["dpkg", "-x", package.name, "tree"], f"cannot unpack {package.name}", cwd=folder)
        unpacked = folder / "tree/usr/share/libreoffice/help"
        if not (unpacked / "en-US").is_dir() or not (unpacked / "de").is_dir():
            raise UsageError("the LibreOffice help packages hold no en-US and de pages")
        unpacked.rename(root)
    return root


# -- Anybody's pairs ---------------------------------------------------------------------------


def open_text(path):
    """A binary file of what a file holds, which its name says how to decompress."""
    if str(path).endswith(".gz"):
        return gzip.open(path)
    if str(path).endswith(".zst"):
        return zstd().open(path)
    return open(path, "rb")


@contextlib.contextmanager
def reading(path):
    """Reading that fails in the block becomes one clear line that names `path`."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise UsageError(f"{path} is no gzip file, or damaged: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except EOFError:
        raise UsageError(f"{path} is cut off: its compressed data have no end") from None
    except Exception as error:
        damaged = (zlib.error, zstd().ZstdError) if str(path).endswith(".zst") else zlib.error
        if not isinstance(error, damaged):
            raise
        raise UsageError(f"{path} is damaged: {error}") from None


def zstd():
    return require("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def read_tsv(path):
    """Read source<TAB>target lines; each line is a group of its own."""
    with reading(path), open_text(path) as file:
        content = file.read()
    pairs = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}, line {number}: not UTF-8 (byte {error.object[error.start]:#04x} at "
                f"column {error.start + 1}); convert the file first, e.g. with iconv"
            ) from None
        if not text.strip() and "\t" not in text:
            continue
        fields = text.split("\t")
        if len(fields) != 2:
            raise UsageError(
                f"{path}, line {number}: expected source<TAB>target, got {len(fields)} field(s)"
            )
        source, target = map(normalise, fields)
        if not source or not target:
            side = "target" if source else "source"
            raise UsageError(f"{path}, line {number}: the {side} side is empty")
        pairs.append(Pair(source, target, source))
    if not pairs:
        raise UsageError(f"{path} holds no pairs")
    return pairs


@contextlib.contextmanager
def _fetching(name):
    """Yield a new folder of the cache to fetch into, to one process at a time; it goes afterwards.

    So do the folders that killed processes left. The lock is the kernel's and goes with its owner;
    its file stays, as nobody can know that no other process has it open.
    """
    cache = cache_dir()
    with contextlib.ExitStack() as held:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # For writing: NFS locks no other file.
            lock = held.enter_context(open(cache / LOCK_FILE, "ab"))
            _wait_for(lock)
            for left in cache.glob(f".{name}.*"):
                shutil.rmtree(left)
            folder = held.enter_context(tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}."))
        except OSError as error:
            raise UsageError(f"cannot write into {cache}: {error.strerror or error}") from None
        yield Path(folder)


def _wait_for(lock):
    """Lock an open file until it is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # EOPNOTSUPP, ENOLCK, ...: not every file system can
        raise UsageError(
            f"cannot lock {lock.name}: {error.strerror}; let ATTN_EXT_CACHE name a folder of a "
            "file system that has locks, such as a local disk"
        ) from None


def sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _call(command, message, cwd=None):
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UsageError(f"{message}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise UsageError(f"{message}: {lines[-1].strip()}")
