"""The metrics of a run: a line of JSON a record, and TensorBoard's events where asked for."""

import contextlib
import json
import os

from attn_ext.nmt.cli import UsageError, atomic_write, require, writing

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class Metrics:
    """Takes records (dictionaries with a "step") from the main process.

    Args:
        folder: of the run.
        step: the last that has been done; what stands in the file after it is dropped.
        tensorboard: also write TensorBoard's events, into a folder of that name.
    """

    def __init__(self, folder, step, tensorboard=False):
        self._path = folder / METRICS_FILE
        atomic_write(self._path, "".join(_lines_up_to(self._path, step)) if step else "")
        self._events = None
        if tensorboard:
            writer = require("torch.utils.tensorboard").SummaryWriter
            with writing(folder / EVENTS_FOLDER):
                # A viewer forgets what an interrupted run had written beyond its checkpoint.
                self._events = writer(folder / EVENTS_FOLDER, purge_step=step + 1)
        with writing(self._path):
            self._file = open(self._path, "a", encoding="utf-8")

    def write(self, record):
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._events is not None:
            group = "dev" if "dev_loss" in record else "train"
            with writing(self._path.parent / EVENTS_FOLDER):
                for name in record.keys() - {"step", "final"}:
                    tag = f"{group}/{name.removeprefix('dev_')}"
                    self._events.add_scalar(tag, record[name], record["step"])

    def sync(self):
        """No power cut may take what has been written before this."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self):
        self._file.close()
        if self._events is not None:
            self._events.close()


def _lines_up_to(path, step):
    """The lines of a metrics file that belong to a run that goes on after `step`."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by a kill
            record = json.loads(line)
            # The evaluation after the last step is no part of a run that goes on.
            if record["step"] <= step and "final" not in record:
                yield line + "\n"
