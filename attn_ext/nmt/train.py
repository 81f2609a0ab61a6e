"""Train a translation model, English to German by default, and show how good it is.

    python -m attn_ext.nmt.train --out DIR

Runs unchanged under `torchrun --nproc_per_node=N -m attn_ext.nmt.train ...`.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import torch

from attn_ext.nmt import checkpoint, cli, corpora, data, distributed, evaluation
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.model import DECODERS, ModelConfig, Seq2Seq
from attn_ext.nmt.training import METRICS_FILE, Trainer, TrainOptions
from attn_ext.nmt.vocab import Vocabulary

VOCAB_SIZE = 4000
MODEL_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
MODEL_DEFAULTS["vocab_size"] = VOCAB_SIZE
TRAIN_DEFAULTS = TrainOptions().as_dict()
DEV_BLEU_SENTENCES = 300
NO_LIMIT = 1_000_000  # steps
MAX_LENGTH = 80  # subwords of a training sentence; the few longer ones cost more than they teach


def parse_arguments(arguments=None):
    """Options that are not given are absent from the result, so that --resume can tell."""
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.nmt.train",
        description="Train an RNN translation model with attn_ext's additive attention; then print "
        "BLEU, chrF and samples on held-out data, and draw attention pictures.",
        argument_default=argparse.SUPPRESS,
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
    add("--hidden", type=whole, metavar="N", help="features of an LSTM state, each direction")
    add("--encoder-layers", type=whole, metavar="N", help="bidirectional layers")
    add("--decoder-layers", type=whole, metavar="N", help="layers; gnmt has one more by default")
    add("--dropout", type=cli.fraction, metavar="P", help="on embeddings and layer outputs")


def _add_training_options(add):
    whole, count, fraction = cli.positive_int, cli.natural_int, cli.fraction
    add("--max-steps", type=count, metavar="N", help="updates to make; no limit with --minutes")
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="stop training after this time, evaluation comes on top; 0 or --max-steps: no limit",
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
    _check_folder(folder, given)
    world = distributed.join(given.get("device"))
    try:
        return _train(given, folder, world)
    finally:
        distributed.leave(world)


def _check_folder(folder, given):
    """Refuse to write over a run by accident."""
    path = folder / checkpoint.CHECKPOINT_FILE
    if "resume" in given and "overwrite" in given:
        raise UsageError("--resume and --overwrite exclude each other")
    if path.exists() and not given.keys() & {"resume", "overwrite"}:
        raise UsageError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite starts anew, "
            f"or choose another --out"
        )


def _train(given, folder, world):
    backend, resuming = given.get("backend"), "resume" in given
    cli.check_backend(backend, world.device)
    saved = None
    if resuming and (folder / checkpoint.CHECKPOINT_FILE).exists():
        saved = checkpoint.load(folder / checkpoint.CHECKPOINT_FILE, "checkpoint")
    elif resuming and world.is_main:
        print(f"{folder} holds no checkpoint yet: starting at the beginning", file=sys.stderr)

    split, identity = _load_data(given, saved, world)
    vocabulary = _vocabulary(given, saved, split)
    encoded = data.Split(*(_encode(vocabulary, part) for part in split))
    train = [e for e in encoded.train if max(map(len, e)) <= MAX_LENGTH]
    if not train:
        raise UsageError(f"no training pair has at most {MAX_LENGTH} subwords a side")
    options = _train_options(given, saved, world)
    config = _model_config(given, saved, len(vocabulary))
    torch.manual_seed(options.seed)
    model = Seq2Seq(config, backend).to(world.device)
    if world.is_main:
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{len(train)} training pairs ({len(split.train) - len(train)} too long), "
            f"{len(split.dev)} dev, {len(split.test)} test; {len(vocabulary)} subwords; "
            f"{config.decoder}, {parameters / 1e6:.1f} M parameters; {world.size} process(es) on "
            f"{world.device.type}, backend {backend or 'best available'}"
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
        print(f"interrupted after step {step}; to go on: {_command(given)} --resume")
        return 130
    print(f"training ended at step {step} ({reason}); losses in {folder / METRICS_FILE}")
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
    place = {"corpus": given.get("corpus"), "data": given.get("data")}
    if saved is not None and not any(place.values()):
        place = {key: saved["identity"][key] for key in place}
    elif not any(place.values()):
        place["corpus"] = "homeassistant"
    for main_turn in (True, False):  # the main process fetches, the others find it in the cache
        if world.is_main == main_turn:
            if place["data"]:
                pairs = corpora.read_tsv(place["data"])
            else:
                pairs = corpora.load(place["corpus"])
        world.barrier()
    split = data.split_pairs(pairs)
    identity = {**place, "fingerprint": data.fingerprint(split), "processes": world.size}
    if saved is not None:
        before = saved["identity"]
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
        vocabulary = Vocabulary(saved["vocabulary"].numpy().tobytes())
        if "vocab_size" in given and given["vocab_size"] < len(vocabulary):
            _refuse(given, "vocab_size", len(vocabulary))
        return vocabulary
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
    if saved is None:
        chosen.setdefault(
            "bf16", world.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )  # fmt: skip
        return TrainOptions(**chosen)
    for name, value in chosen.items():
        if name not in TrainOptions.MUTABLE and value != saved["options"][name]:
            _refuse(given, name, saved["options"][name])
    return TrainOptions(**{**saved["options"], **chosen})


def _model_config(given, saved, vocab_size):
    chosen = {name: given[name] for name in MODEL_DEFAULTS if name in given}
    if saved is None:
        if chosen.get("decoder", ModelConfig.decoder) == "gnmt":
            chosen.setdefault("decoder_layers", 2)  # the first only asks; another has to answer
        return ModelConfig(**{**chosen, "vocab_size": vocab_size})
    for name, value in chosen.items():
        if name != "vocab_size" and value != saved["config"][name]:
            _refuse(given, name, saved["config"][name])
    return ModelConfig(**saved["config"])


def _refuse(given, name, before):
    option = "--" + name.replace("_", "-")
    raise UsageError(
        f"{option} {given[name]} does not fit the run in {given['out']}, which has {before}; "
        f"leave {option} out, or choose another --out"
    )


def _command(given):
    """The command line without --resume and --overwrite, as a person would repeat it."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    return shlex.join(["python", "-m", "attn_ext.nmt.train", *words])


if __name__ == "__main__":
    cli.wait_without_spinning()
    cli.run(main)
