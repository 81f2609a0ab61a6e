"""Train a translation model, English to German by default, and show how good it is.

    python -m attn_ext.nmt.train --out DIR

Runs unchanged under `torchrun --nproc_per_node=N -m attn_ext.nmt.train ...`.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from attn_ext.nmt import checkpoint, cli, corpora, data, distributed, evaluation
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.model import DECODERS, ENCODER_CELLS, ModelConfig, Seq2Seq
from attn_ext.nmt.precision import bf16_problem
from attn_ext.nmt.training import METRICS_FILE, NO_LIMIT, RESULT_PATTERNS, Trainer, TrainOptions
from attn_ext.nmt.vocab import Vocabulary

VOCAB_SIZE = 4000
MODEL_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
MODEL_DEFAULTS["vocab_size"] = VOCAB_SIZE
TRAIN_DEFAULTS = TrainOptions().as_dict()
DEV_BLEU_SENTENCES = 300
IDENTITY = {"corpus", "data", "fingerprint", "processes", "vocab_size"}  # of a checkpoint
MAX_LENGTH = 80  # subwords of a training sentence; the few longer ones cost more than they teach


def parse_arguments(arguments=None):
    """Options that are not given are absent from the result, so that --resume can tell."""
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.nmt.train",
        description="Train an RNN translation model with attn_ext's additive attention; then print "
        "BLEU, chrF and samples on held-out data, and draw attention pictures.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_data_options(parser.add_argument_group("data and output"))
    _add_model_options(_adder(parser.add_argument_group("model"), MODEL_DEFAULTS))
    _add_training_options(_adder(parser.add_argument_group("training"), TRAIN_DEFAULTS))
    add = _adder(parser.add_argument_group("running"), {"beam": 5})
    add("--beam", type=cli.positive_int, metavar="K", help="hypotheses in the final evaluation")
    add("--backend", metavar="B", help=cli.BACKEND_HELP)
    add("--device", choices=("cpu", "cuda"), help=cli.DEVICE_HELP)
    return vars(parser.parse_args(arguments))


def _add_data_options(group):
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--corpus",
        choices=("homeassistant", "libreoffice"),
        help="public en-de corpus, fetched on first use (default homeassistant)",
    )
    source.add_argument("--data", metavar="FILE.tsv", help="own pairs: source<TAB>target, UTF-8")
    group.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    group.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in DIR, exactly"
    )
    group.add_argument("--overwrite", action="store_true", help="start anew over a run in DIR")


def _add_model_options(add):
    whole = cli.positive_int
    add(
        "--decoder",
        choices=sorted(DECODERS),
        help="rnnsearch: input feeding, one attention a step; gnmt: the first layer's outputs "
        "query all steps at once",
    )
    add("--vocab-size", type=whole, metavar="N", help="most subwords")
    add("--embedding", type=whole, metavar="N", help="features of an embedding")
    add("--hidden", type=whole, metavar="N", help="features of a recurrent state, each direction")
    add("--encoder-cell", choices=sorted(ENCODER_CELLS), help="recurrent cell of the encoder")
    add("--encoder-layers", type=whole, metavar="N", help="bidirectional layers")
    add("--decoder-layers", type=whole, metavar="N", help="layers; gnmt has one more by default")
    add("--dropout", type=cli.fraction, metavar="P", help="on embeddings and layer outputs")


def _add_training_options(add):
    whole, count, fraction = cli.positive_int, cli.natural_int, cli.fraction
    add("--max-steps", type=count, metavar="N", help="updates to make; no limit with --minutes")
    add(
        "--minutes",
        type=cli.positive_number,
        metavar="M",
        help="stop training after this time, evaluation comes on top; --max-steps alone: no limit",
    )
    add("--seed", type=count, metavar="S", help="of everything random")
    add("--batch-tokens", type=whole, metavar="N", help="tokens of a batch, over all processes")
    add("--learning-rate", "--lr", type=cli.positive_number, metavar="X", help="the highest")
    add("--warmup", type=count, metavar="N", help="steps to the highest rate")
    add("--label-smoothing", type=fraction, metavar="P", help="weight of the uniform target")
    add("--clip", type=cli.positive_number, metavar="X", help="greatest norm of the gradient")
    add("--averaging", type=fraction, metavar="P", help="decay of the parameters' average")
    add("--eval-every", type=whole, metavar="N", help="steps between evaluations on dev")
    add(
        "--patience",
        type=count,
        metavar="N",
        help="stop after N evaluations without gain; 0: never",
    )
    add("--checkpoint-every", type=whole, metavar="N", help="steps between checkpoints")
    add(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16; the default is to do so on GPUs that have it",
    )


def _adder(group, defaults):
    """An add_argument that shows the default, without setting it."""

    def add(name, *names, help, **keywords):
        default = defaults.get(name.removeprefix("--").replace("-", "_"))
        shown = "" if default is None or default is False else f" (default {default})"
        group.add_argument(name, *names, help=help + shown, **keywords)

    return add


def main(arguments=None):
    given = parse_arguments(arguments)
    folder = Path(given["out"])
    for package in ("sentencepiece", "sacrebleu", "tqdm", "matplotlib"):
        cli.require(package)  # now, not at the end of the training
    world = distributed.join(given.get("device"))
    try:
        return _train(given, folder, world)
    except UsageError:
        if world.is_main:
            raise
        return 0  # the main process says it: a failure here could have torchrun end it first
    finally:
        distributed.leave(world)


class Setting(NamedTuple):
    """What is decided before the first step, the same on every rank."""

    saved: dict | None  # the checkpoint to go on from
    split: data.Split
    identity: dict
    vocabulary: Vocabulary
    options: TrainOptions
    config: ModelConfig


def _prepare(given, folder, world):
    """Check everything that the user chose, in the order of what it costs."""
    cli.check_backend(given.get("backend"), world.device)
    if "resume" not in given:
        _train_options(
            given, None, world
        )  # a refusal, of --bf16 say, comes before a folder is made
    created = _take_folder(folder, given)
    try:
        path, saved = folder / checkpoint.CHECKPOINT_FILE, None
        if "resume" in given:
            if path.exists():
                saved = checkpoint.load(path, "checkpoint")
            else:
                print(
                    f"{folder} holds no checkpoint yet: starting at the beginning", file=sys.stderr
                )
        options = _train_options(given, saved, world)
        split, identity = _load_data(given, saved, world)
        vocabulary = _vocabulary(given, saved, split)
        config = _model_config(given, saved, len(vocabulary))
    except UsageError:
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return Setting(saved, split, identity, vocabulary, options, config)


def _take_folder(folder, given):
    """Make the folder of the run, or refuse to write over another run by accident.

    Returns:
        Whether it is new.
    """
    if not given["out"].strip():
        raise UsageError("--out is empty")
    if "resume" in given and "overwrite" in given:
        raise UsageError("--resume and --overwrite exclude each other")
    with cli.writing(folder):
        created = not folder.exists()
        if not created and not folder.is_dir():
            raise UsageError(f"--out {folder} is a file; a folder is wanted")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # it can be written to
        files = (checkpoint.CHECKPOINT_FILE, checkpoint.MODEL_FILE, METRICS_FILE)
        there = [name for name in files if (folder / name).exists()]
        if there and not given.keys() & {"resume", "overwrite"}:
            raise UsageError(
                f"{folder} holds a run already ({', '.join(there)}); --resume goes on with it, "
                "--overwrite starts anew, or choose another --out"
            )
        if "resume" in given and files[0] not in there and files[1] in there:
            raise UsageError(
                f"{folder} holds a model but no checkpoint to go on from; --overwrite starts anew, "
                "or choose another --out"
            )
        for name in (*files, *RESULT_PATTERNS):
            for path in folder.glob(f".{name}.*.tmp"):  # left by a kill inside a write
                path.unlink(missing_ok=True)
    return created


def _train(given, folder, world):
    saved, split, identity, vocabulary, options, config = world.from_main(
        lambda: _prepare(given, folder, world)
    )
    backend = given.get("backend")
    encoded = data.Split(*(_encode(vocabulary, part) for part in split))
    train = [e for e in encoded.train if max(map(len, e)) <= MAX_LENGTH]
    if len(train) < world.size:
        raise UsageError(
            f"{len(train)} training pair(s) of at most {MAX_LENGTH} subwords a side are too few "
            f"for {world.size} process(es)"
        )
    torch.manual_seed(options.seed)
    model = Seq2Seq(config, backend).to(world.device)
    if world.is_main:
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{len(train)} training pairs ({len(split.train) - len(train)} too long), "
            f"{len(split.dev)} dev, {len(split.test)} test; {len(vocabulary)} subwords; "
            f"{config.decoder}, {parameters:,} parameters; {world.size} process(es) on "
            f"{world.device.type}, backend {cli.check_backend(backend, world.device)}",
            flush=True,
        )

    dev_bleu = evaluation.greedy_bleu(
        vocabulary, evaluation.spread(split.dev, DEV_BLEU_SENTENCES), world.device
    )
    trainer = Trainer(
        model, vocabulary, train, encoded.dev, options, folder, world, identity, dev_bleu
    )
    if saved is not None:
        trainer.resume(saved)
    reason = trainer.run()
    if not world.is_main:
        return 0
    step = trainer.progress.step
    if reason == "interrupted":
        print(f"interrupted after step {step}; to go on: {_command(folder, world)}")
        return 130
    print(
        f"training ended at step {step} ({reason}); losses in {folder / METRICS_FILE}", flush=True
    )
    model, vocabulary = checkpoint.load_model(folder, backend, world.device)
    evaluation.report(
        model, vocabulary, split, folder,
        beam=given.get("beam", 5), seed=options.seed, backend=backend, device=world.device,
    )  # fmt: skip
    print(
        "\nTranslate with:\n  python -m attn_ext.nmt.translate "
        f"--model {shlex.quote(str(folder))} < in.txt > out.txt"
    )
    return 0


def _load_data(given, saved, world):
    """The split, and what a resumed run must share: fingerprint of the data, processes."""
    before = None if saved is None else saved["identity"]
    path = Path(given["out"]) / checkpoint.CHECKPOINT_FILE
    if saved is not None and (not isinstance(before, dict) or before.keys() != IDENTITY):
        raise checkpoint.damaged(path)
    place = {"corpus": given.get("corpus"), "data": given.get("data")}
    if place["data"] is not None:
        place["data"] = os.path.abspath(place["data"])  # to be found from another folder, too
    if before is not None and not any(place.values()):
        place = {key: before[key] for key in place}
    elif not any(place.values()):
        place["corpus"] = "homeassistant"
    if place["data"]:
        pairs = corpora.read_tsv(given.get("data") or place["data"])
    else:
        pairs = corpora.load(place["corpus"])
    split = data.split_pairs(pairs)
    identity = {
        **place,
        "fingerprint": data.fingerprint(split),
        "processes": world.size,
        "vocab_size": given.get("vocab_size", VOCAB_SIZE),  # that was asked for
    }
    if before is not None:
        if given.get("vocab_size", before["vocab_size"]) != before["vocab_size"]:
            _refuse(given, "vocab_size", before["vocab_size"])
        identity["vocab_size"] = before["vocab_size"]
        if before["fingerprint"] != identity["fingerprint"]:
            raise UsageError(
                f"the data are not those that the run in {given['out']} was trained on "
                f"({before['data'] or before['corpus']}); give the same, or another --out"
            )
        if before["processes"] != world.size:
            raise UsageError(
                f"the run in {given['out']} was trained by {before['processes']} process(es), "
                f"which the batches depend on; got {world.size}"
            )
    return split, identity


def _vocabulary(given, saved, split):
    if saved is not None:
        return checkpoint.rebuild_vocabulary(saved, Path(given["out"]) / checkpoint.CHECKPOINT_FILE)
    texts = (text for pair in split.train for text in (pair.source, pair.target))
    return Vocabulary.train(texts, given.get("vocab_size", VOCAB_SIZE))


def _encode(vocabulary, pairs):
    return [(vocabulary.encode(pair.source), vocabulary.encode(pair.target)) for pair in pairs]


def _train_options(given, saved, world):
    chosen = {name: given[name] for name in TRAIN_DEFAULTS if name in given}
    if "max_steps" in chosen:
        chosen.setdefault("minutes", 0.0)
    elif "minutes" in chosen:
        chosen["max_steps"] = NO_LIMIT
    config = _model_config(given, saved, VOCAB_SIZE)  # of which sizes do not matter here
    problem = functools.partial(bf16_problem, config, world.device, given.get("backend"))
    if saved is None:
        if given.get("bf16") and (reason := problem()):
            raise UsageError(f"--bf16: {reason}; leave --bf16 out to train in float32")
        chosen.setdefault("bf16", world.device.type == "cuda" and problem() is None)
        return TrainOptions(**chosen)
    before = checkpoint.rebuild(
        TrainOptions, saved["options"], Path(given["out"]) / checkpoint.CHECKPOINT_FILE
    )
    if before.bf16 and (reason := problem()):
        raise UsageError(
            f"the run in {given['out']} was begun in bfloat16, and {reason}; resume it on a "
            "machine that can, as in float32 it would be another run, or train anew with "
            "--overwrite or another --out"
        )
    for name, value in chosen.items():
        if name not in TrainOptions.MUTABLE and value != getattr(before, name):
            _refuse(given, name, getattr(before, name))
    return dataclasses.replace(before, **chosen)


def _model_config(given, saved, vocab_size):
    chosen = {name: given[name] for name in MODEL_DEFAULTS if name in given}
    if saved is None:
        if chosen.get("decoder", ModelConfig.decoder) == "gnmt":
            chosen.setdefault("decoder_layers", 2)  # the first only asks; another has to answer
        return ModelConfig(**{**chosen, "vocab_size": vocab_size})
    before = checkpoint.rebuild(
        ModelConfig, saved["config"], Path(given["out"]) / checkpoint.CHECKPOINT_FILE
    )
    for name, value in chosen.items():
        if name != "vocab_size" and value != getattr(before, name):
            _refuse(given, name, getattr(before, name))
    return before


def _refuse(given, name, before):
    option = "--" + name.replace("_", "-")
    raise UsageError(
        f"{option} {given[name]} does not fit the run in {given['out']}, which has {before}; "
        f"leave {option} out, or choose another --out"
    )


def _command(folder, world):
    """The command line that goes on with the run."""
    several = ["torchrun", f"--nproc_per_node={world.size}"]
    start = several if world.size > 1 else ["python"]
    return shlex.join([*start, "-m", "attn_ext.nmt.train", "--out", str(folder), "--resume"])


if __name__ == "__main__":
    cli.wait_without_spinning()
    cli.run(main)
