"""Files of a run: `model.pt` to translate with, `checkpoint.pt` to go on training from.

Both are written whole or not at all, hold only tensors and plain values, and are read with
`weights_only=True`, so that a file from elsewhere can run no code.
"""

import torch

from attn_ext.nmt.cli import UsageError, atomic_file
from attn_ext.nmt.model import ModelConfig, Seq2Seq
from attn_ext.nmt.vocab import Vocabulary

FORMAT = 1
MODEL_FILE = "model.pt"
CHECKPOINT_FILE = "checkpoint.pt"


def save(path, kind, content):
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, "kind": kind, **content}, file)


def load(path, kind):
    """The content of a file that `save` wrote.

    Raises:
        UsageError: missing, cut off, something else, or of another version.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UsageError(f"there is no {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        with file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parsers do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is not a file of attn_ext.nmt: {reason[:120]}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UsageError(f"{path} is not a {kind} file of attn_ext.nmt")
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{path} has format {content.get('format')}; this version reads format {FORMAT}"
        )
    return content


def save_model(path, model, vocabulary):
    save(path, "model", model_content(model, vocabulary))


def model_content(model, vocabulary):
    return {
        "config": model.config.as_dict(),
        "model": model.state_dict(),
        "vocabulary": torch.frombuffer(bytearray(vocabulary.model_bytes), dtype=torch.uint8),
    }


def load_model(folder, backend=None, device="cpu"):
    """The model and vocabulary of a training run's folder.

    Returns:
        (Seq2Seq in eval mode, Vocabulary)
    """
    path = f"{folder}/{MODEL_FILE}"
    content = load(path, "model")
    try:
        vocabulary = Vocabulary(content["vocabulary"].numpy().tobytes())
        model = Seq2Seq(ModelConfig(**content["config"]), backend)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path} does not describe a model: {error}") from None
    load_parameters(model, content["model"], path)
    return model.to(device).eval(), vocabulary


def load_parameters(model, parameters, path):
    """Take over parameters, or say in one line where their shapes differ from the model's."""
    own = model.state_dict()
    for name in sorted(own.keys() | parameters.keys()):
        expected = tuple(own[name].shape) if name in own else "nothing"
        got = tuple(parameters[name].shape) if name in parameters else "nothing"
        if expected != got:
            raise UsageError(
                f"{path} is of another shape: {name} is {got} there, this model wants {expected}"
            )
    model.load_state_dict(parameters)
