"""Train a translation model, English to German by default, and show how good it is.

    python -m attn_ext.nmt.train --out DIR

Runs unchanged under `torchrun --nproc_per_node=N -m attn_ext.nmt.train ...`.
"""

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

from attn_ext.nmt import checkpoint, cli, corpora, data, distributed, evaluation, shards
from attn_ext.nmt.arguments import (
    CONFIG_FILE,
    MODEL_DEFAULTS,
    TRAIN_DEFAULTS,
    VOCAB_SIZE,
    parse_arguments,
    save_config,
)
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.metrics import METRICS_FILE
from attn_ext.nmt.model import ModelConfig, Seq2Seq
from attn_ext.nmt.options import ENDING, FALLING_TO_0, NO_LIMIT, TrainOptions
from attn_ext.nmt.precision import bf16_problem, fp16_problem
from attn_ext.nmt.training import EVENTS_FOLDER, RESULT_PATTERNS, Trainer
from attn_ext.nmt.vocab import Vocabulary

DEV_BLEU_SENTENCES = 300
IDENTITY = {"corpus", "data", "fingerprint", "processes", "vocab_size"}  # of a checkpoint
MAX_LENGTH = 80  # subwords of a training sentence; the few longer ones cost more than they teach
PACKAGES = ("sentencepiece", "sacrebleu", "tqdm", "matplotlib", "yaml")
OPTIONAL_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "lamb": "pytorch_optimizer"}


def main(arguments=None):
    given = parse_arguments(arguments)
    folder = Path(given["out"])
    for package in PACKAGES:
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
    split: data.Split  # `train` is empty where the data lie in shards
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
        vocabulary = _vocabulary(saved, split, identity, path)
        config = _model_config(given, saved, len(vocabulary))
        if saved is None:
            chosen = {**config.as_dict(), **options.as_dict(), **identity}
            save_config(folder / CONFIG_FILE, _to_repeat(given, chosen))
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
        # Results, too, which a new run removes: who knows what they are the results of.
        patterns = (*files, *RESULT_PATTERNS)
        there = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
        if there and not given.keys() & {"resume", "overwrite"}:
            raise UsageError(
                f"{folder} holds a run already ({', '.join(there)}); --resume goes on with it, "
                "--overwrite starts anew, or choose another --out"
            )
        # A run that was ended before its first checkpoint leaves these two at most.
        finished = [name for name in there if name not in (METRICS_FILE, EVENTS_FOLDER)]
        if "resume" in given and files[0] not in there and finished:
            raise UsageError(
                f"{folder} holds {', '.join(finished)} but no checkpoint to go on from; "
                "--overwrite starts anew, or choose another --out"
            )
        for name in (*files, CONFIG_FILE, *RESULT_PATTERNS):
            for path in folder.glob(f".{name}.*.tmp"):  # left by a kill inside a write
                path.unlink(missing_ok=True)
    return created


def _train(given, folder, world):
    saved, split, identity, vocabulary, options, config = world.from_main(
        lambda: _prepare(given, folder, world)
    )
    backend = given.get("backend")
    dev = _encode(vocabulary, split.dev)
    train, too_long = world.together(lambda: _training_pairs(vocabulary, split, identity))
    if train.fewest < world.size:
        of = f"of at most {MAX_LENGTH} subwords a side" if split.train else "of the smallest shard"
        raise UsageError(
            f"{train.fewest} training pair(s) {of} are too few for {world.size} process(es)"
        )
    torch.manual_seed(options.seed)
    model = Seq2Seq(config, backend).to(world.device)
    if world.is_main:
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{len(train)} training pairs ({too_long} too long), "
            f"{len(split.dev)} dev, {len(split.test)} test; {len(vocabulary)} subwords; "
            f"{config.decoder}, {parameters:,} parameters; {world.size} process(es) on "
            f"{world.device.type}, backend {cli.check_backend(backend, world.device)}",
            flush=True,
        )

    dev_bleu = evaluation.greedy_bleu(
        vocabulary, evaluation.spread(split.dev, DEV_BLEU_SENTENCES), world.device
    )
    trainer = Trainer(model, vocabulary, train, dev, options, folder, world, identity, dev_bleu)
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
    """(Split, what a resumed run must share); pairs in shards stay where they are."""
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
    if place["data"] and os.path.isdir(place["data"]):
        prepared = shards.load_prepared(place["data"])
        split = data.Split([], prepared.dev, prepared.test)
        fingerprint, vocab_size = prepared.fingerprint, len(prepared.vocabulary)
        if given.get("vocab_size", vocab_size) != vocab_size:
            raise UsageError(
                f"--vocab-size {given['vocab_size']} does not fit {place['data']}, which has been "
                f"prepared with {vocab_size} subwords; leave --vocab-size out"
            )
    else:
        if place["data"]:
            pairs = corpora.read_tsv(given.get("data") or place["data"])
        else:
            pairs = corpora.load(place["corpus"])
        split = data.split_pairs(pairs)
        fingerprint, vocab_size = data.fingerprint(split), given.get("vocab_size", VOCAB_SIZE)
    identity = {
        **place,
        "fingerprint": fingerprint,
        "processes": world.size,
        "vocab_size": vocab_size,  # that was asked for
    }
    if before is not None:
        _check_identity(given, before, identity)
    return split, identity


def _vocabulary(saved, split, identity, path):
    if saved is not None:
        return checkpoint.rebuild_vocabulary(saved, path)
    if not split.train:
        return shards.load_prepared(identity["data"]).vocabulary
    texts = (text for pair in split.train for text in (pair.source, pair.target))
    return Vocabulary.train(texts, identity["vocab_size"])


def _check_identity(given, before, identity):
    """Refuse to go on with other data or processes than those of the checkpoint."""
    if given.get("vocab_size", before["vocab_size"]) != before["vocab_size"]:
        _refuse(given, "vocab_size", before["vocab_size"])
    identity["vocab_size"] = before["vocab_size"]
    if before["fingerprint"] != identity["fingerprint"]:
        raise UsageError(
            f"the data are not those that the run in {given['out']} was trained on "
            f"({before['data'] or before['corpus']}); give the same, or another --out"
        )
    if before["processes"] != identity["processes"]:
        raise UsageError(
            f"the run in {given['out']} was trained by {before['processes']} process(es), "
            f"which the batches depend on; got {identity['processes']}"
        )


def _training_pairs(vocabulary, split, identity):
    """(The pairs to train on, in shards; how many were left out since they are too long)."""
    if not split.train:
        prepared = shards.load_prepared(identity["data"])
        if prepared.fingerprint != identity["fingerprint"]:
            raise UsageError(f"{identity['data']} is not the same for all processes")
        return prepared.train, prepared.counts["too long"]
    examples = _encode(vocabulary, split.train)
    fitting = [example for example in examples if max(map(len, example)) <= MAX_LENGTH]
    return shards.InMemory(fitting), len(examples) - len(fitting)


def _encode(vocabulary, pairs):
    return [(vocabulary.encode(pair.source), vocabulary.encode(pair.target)) for pair in pairs]


def _to_repeat(given, chosen):
    """The options that start the same run again: all of them, but for what says nothing."""
    kept = {k: chosen[k] for k in ("corpus", "data", *MODEL_DEFAULTS, *TRAIN_DEFAULTS)}
    kept |= {name: given[name] for name in ("beam", "backend") if name in given}
    if chosen["data"] and os.path.isdir(chosen["data"]):
        del kept["vocab_size"]  # of the prepared folder
    if kept["decay_steps"] == kept["max_steps"]:
        del kept["decay_steps"]  # so that it follows another --max-steps
    if kept["max_steps"] == NO_LIMIT:
        del kept["max_steps"]
    if kept["fp16"]:
        del kept["bf16"]
    nothing = {"corpus": None, "data": None, "minutes": 0.0, "decay_steps": 0}
    return {k: v for k, v in kept.items() if k not in nothing or v != nothing[k]}


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
        if not given.get("fp16"):
            chosen.setdefault("bf16", world.device.type == "cuda" and problem() is None)
        options = _with_decay_steps(TrainOptions(**chosen))
        _check_combination(options, config, world)
        return options
    before = checkpoint.rebuild(
        TrainOptions, saved["options"], Path(given["out"]) / checkpoint.CHECKPOINT_FILE
    )
    problems = {
        "bfloat16": before.bf16 and problem(),
        "float16": before.fp16 and fp16_problem(config, world.device),
    }
    for numbers, reason in problems.items():
        if reason:
            raise UsageError(
                f"the run in {given['out']} was begun in {numbers}, and {reason}; resume it on a "
                "machine that can, as in float32 it would be another run, or train anew with "
                "--overwrite or another --out"
            )
    for name, value in chosen.items():
        if name not in TrainOptions.MUTABLE and value != getattr(before, name):
            _refuse(given, name, getattr(before, name))
    return _not_beyond_the_end(dataclasses.replace(before, **chosen))


def _not_beyond_the_end(options):
    """Refuse steps at a rate of 0; without a number of steps, end with the schedule."""
    if options.schedule in FALLING_TO_0 and options.max_steps > options.decay_steps:
        if options.max_steps != NO_LIMIT:
            raise UsageError(
                f"--max-steps {options.max_steps} is beyond step {options.decay_steps}, where "
                f"--schedule {options.schedule} ends with a learning rate of 0 (--decay-steps)"
            )
        return dataclasses.replace(options, max_steps=options.decay_steps)
    return options


def _with_decay_steps(options):
    """Schedules that end do so at --max-steps, if nothing else is said."""
    if options.schedule not in ENDING:
        if options.decay_steps:
            raise UsageError(f"--decay-steps goes with --schedule {', '.join(ENDING)}")
    elif not options.decay_steps:
        if options.max_steps == NO_LIMIT:
            raise UsageError(
                f"--schedule {options.schedule} has to know where it ends: give --decay-steps or "
                "--max-steps"
            )
        return dataclasses.replace(options, decay_steps=options.max_steps)
    return _not_beyond_the_end(options)


def _check_combination(options, config, world):
    """Refuse options that do not go together, before anything is read or written."""
    if options.fp16:
        if options.bf16:
            raise UsageError("--bf16 and --fp16 exclude each other")
        if options.parallel == "fsdp":
            raise UsageError("--parallel fsdp computes in float32 or bfloat16, not with --fp16")
        if reason := fp16_problem(config, world.device):
            raise UsageError(f"--fp16: {reason}; leave --fp16 out to train in float32")
    if options.compile and config.decoder != "gnmt":
        raise UsageError(
            f"--compile is for --decoder gnmt; {config.decoder} makes a step a token, and would be "
            "compiled anew for every length"
        )
    if options.parallel == "fsdp" and options.compile:
        raise UsageError("--parallel fsdp does not go with --compile")
    if options.optimizer == "lamb":
        if options.parallel == "fsdp":
            raise UsageError("--parallel fsdp does not go with --optimizer lamb")
        cli.require(OPTIONAL_PACKAGES["lamb"])
    if options.tensorboard:
        cli.require(OPTIONAL_PACKAGES["tensorboard"])


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
