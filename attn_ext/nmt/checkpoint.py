"""Files of a run: `model.pt` to translate with, `checkpoint.pt` to go on training from.

Both are written whole or not at all, hold only tensors and plain values, and are read with
`weights_only=True`, so that a file from elsewhere can run no code. They end with a digest of what
stands before it: torch.load looks at no checksum, and would go on with bits that have flipped.
"""

import dataclasses
import hashlib
import math
import os
import warnings
from pathlib import Path

import torch

from attn_ext.nmt.cli import UsageError, atomic_file
from attn_ext.nmt.distributed import sharded_like
from attn_ext.nmt.model import ModelConfig, Seq2Seq
from attn_ext.nmt.vocab import Vocabulary

MODEL_FILE = "model.pt"
CHECKPOINT_FILE = "checkpoint.pt"
FORMAT = 3
_DIGEST = hashlib.sha256
_MODEL_FIELDS = {"config", "model", "vocabulary"}
FIELDS = {
    "model": _MODEL_FIELDS,
    "checkpoint": _MODEL_FIELDS
    | {"optimizer", "averaged", "scaler", "progress", "options", "identity"},
}


def save(path, kind, content):
    """Write a file that `load` reads with the same `kind`, "model" or "checkpoint"."""
    with atomic_file(path) as file:
        try:
            torch.save({"format": FORMAT, "kind": kind, **content}, file)
        except RuntimeError as error:  # what torch makes of a write that fails or is interrupted
            raise error.__context__ or error from None
        file.write(_digest_of(file, file.tell()))


def _digest_of(file, size):
    """The digest of the first `size` bytes of a file, which is then read up to there."""
    file.seek(0)
    digest = _DIGEST()
    while block := file.read(min(size, 1 << 20)):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def load(path, kind):
    """The content of a file that `save` wrote.

    Raises:
        UsageError: missing, cut off, something else, or of another version.
    """
    try:
        with open(path, "rb") as file:
            content = _load(file, path)
    except FileNotFoundError:
        raise UsageError(f"there is no {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UsageError(f"{path} is not a {kind} file of attn_ext.nmt")
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{path} has format {content.get('format')}; this version reads format {FORMAT}"
        )
    if not content.keys() >= FIELDS[kind]:
        raise damaged(path)
    return content


def _load(file, path):
    """What torch.load makes of an open file, once its digest has been found right."""
    digest = _digest_of(file, max(0, os.fstat(file.fileno()).st_size - _DIGEST().digest_size))
    if digest != file.read():
        file.seek(0)
        if file.read(2) in (b"", b"PK"):  # what torch.save writes is a zip archive
            raise damaged(path)
        raise UsageError(f"{path} is not a file of attn_ext.nmt")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it all
            # The digest is no obstacle: a zip archive is found from the end of the file, whatever
            # follows it.
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever its parsers do
        raise UsageError(f"{path} is not a file of attn_ext.nmt") from None


def damaged(path):
    """The error for a file whose content is not what `save` writes."""
    reason = "is cut off or damaged, or of an older version"
    return UsageError(f"{path} {reason}; training with --overwrite starts anew")


def rebuild(cls, values, path):
    """A dataclass from its values in a file.

    Raises:
        UsageError: the values are not those of the dataclass' fields.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or values.keys() != names:
        raise damaged(path)
    return cls(**values)


def rebuild_vocabulary(content, path):
    """The Vocabulary in a file's content."""
    try:
        return Vocabulary(content["vocabulary"].numpy().tobytes())
    except (UsageError, AttributeError, RuntimeError, TypeError):
        raise damaged(path) from None


def save_model(path, model, vocabulary, dev_loss=math.inf):
    """Write what translating needs, and the loss by which a later model has to be better."""
    save(path, "model", {**model_content(model, vocabulary), "dev_loss": dev_loss})


def kept_dev_loss(path):
    """The dev loss of the model in a file; infinite where there is none that can be read."""
    try:
        return float(load(path, "model").get("dev_loss", math.inf))
    except (UsageError, TypeError, ValueError):
        return math.inf


def model_content(model, vocabulary):
    """What model files and checkpoints share: sizes, parameters, subwords."""
    return {
        "config": model.config.as_dict(),
        "model": model.state_dict(),
        "vocabulary": torch.frombuffer(bytearray(vocabulary.model_bytes), dtype=torch.uint8),
    }


def load_model(folder, backend=None, device="cpu"):
    """The model and vocabulary of a training run's folder, or of a model file itself.

    Returns:
        (Seq2Seq in eval mode, Vocabulary)
    """
    path = Path(folder)
    path = path if path.is_file() else path / MODEL_FILE
    content = load(path, "model")
    vocabulary = rebuild_vocabulary(content, path)
    config = rebuild(ModelConfig, content["config"], path)
    if config.vocab_size != len(vocabulary):
        raise damaged(path)
    try:
        model = Seq2Seq(config, backend)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise damaged(path) from None
    load_parameters(model, content["model"], path)
    return model.to(device).eval(), vocabulary


def load_parameters(model, parameters, path):
    """Take over parameters, or say in one line where their shapes differ from the model's."""
    own = model.state_dict()
    if not isinstance(parameters, dict) or not all(map(torch.is_tensor, parameters.values())):
        raise damaged(path)
    for name in sorted(own.keys() | parameters.keys(), key=str):
        expected = tuple(own[name].shape) if name in own else "nothing"
        got = tuple(parameters[name].shape) if name in parameters else "nothing"
        if expected != got:
            raise UsageError(
                f"{path} is of another shape: {name} is {got} there, this model wants {expected}"
            )
    model.load_state_dict({k: sharded_like(value, own[k]) for k, value in parameters.items()})
