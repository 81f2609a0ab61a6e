"""A folder that one process at a time makes, and a journal of what of it has been done."""

import contextlib
import fcntl
import itertools
import json
import os
import time

from attn_ext.nmt import corpora
from attn_ext.nmt.cli import UsageError, atomic_write, writing

FOLDER, FILE, LOCK_FILE = "unfinished", "journal.jsonl", ".lock"
LOCK_SECONDS = 10


@contextlib.contextmanager
def locked(folder):
    """Make the folder and keep other processes out of it."""
    with contextlib.ExitStack() as held:
        with writing(folder):
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"--out {folder} is a file; a folder is wanted")
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(folder / LOCK_FILE, "ab"))
        # Workers have the lock, too: those of a process that was killed end a moment after it.
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(f"another process is preparing {folder}") from None
                time.sleep(0.05)
            except OSError as error:
                raise UsageError(f"cannot lock {lock.name}: {error.strerror}") from None
        yield


def refuse_others(folder, before, now, what):
    """An error if a folder is not of this command line and these files."""
    if before == now:
        return
    changed = "in another way"
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        for name, value in before["options"].items():
            if value != now["options"][name]:
                option = {"inputs": "input"}.get(name, "--" + name.replace("_", "-"))
                changed = f"with another {option}: {_shown(value)}, not "
                changed += _shown(now["options"][name])
                break
        else:
            for path, stamp in before["files"].items():
                if stamp != now["files"][path]:
                    changed = f"before {path} was changed"
    raise UsageError(f"{folder} {what} {changed}; --overwrite starts anew, or choose another --out")


def _shown(value):
    return " ".join(itertools.chain(*value)) if isinstance(value, list) else str(value)


class Journal:
    """What has been done, a line of JSON each; a line that a kill cut off does not count.

    Args:
        folder: of the preparation.
        identity: plain values; a journal of others is refused.
    """

    def __init__(self, folder, identity):
        self.folder, self.identity = folder, identity
        self.work = folder / FOLDER
        path = self.work / FILE
        lines = []
        with contextlib.suppress(FileNotFoundError), corpora.reading(path):
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
        try:
            records = [json.loads(line) for line in lines if line.endswith(b"\n")]
        except ValueError:
            raise UsageError(f"{path} is damaged; --overwrite starts anew") from None
        if records:
            refuse_others(folder, records[0], identity, "was begun")
        self.records = records[1:]
        with writing(path):
            self.work.mkdir(exist_ok=True)
        atomic_write(path, "".join(json.dumps(r) + "\n" for r in [identity, *self.records]))
        with writing(path):
            self._file = open(path, "ab")

    def append(self, **record):
        self.records.append(record)
        with writing(self._file.name):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self):
        self._file.close()

    def of(self, kind):
        """The records of a kind, by the number that they have under its name."""
        return {record[kind]: record for record in self.records if kind in record}
