"""The options of `python -m attn_ext.nmt.train`, from the command line and from a YAML file."""

import argparse
import dataclasses
from pathlib import Path

from attn_ext.nmt import cli
from attn_ext.nmt.cli import UsageError, require
from attn_ext.nmt.model import DECODERS, ENCODER_CELLS, ModelConfig
from attn_ext.nmt.options import SCHEDULES, TrainOptions

CONFIG_FILE = "config.yaml"
CONFIG_HELP = (
    "options by name, e.g. `hidden: 512`; the command line goes before it; a run leaves its own as "
    f"{CONFIG_FILE}"
)
VOCAB_SIZE = 4000
MODEL_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
MODEL_DEFAULTS["vocab_size"] = VOCAB_SIZE
TRAIN_DEFAULTS = TrainOptions().as_dict()
# Of these at most one is true; the command line's replaces the file's.
EXCLUSIVE = (("corpus", "data"), ("bf16", "fp16"))
# What says how a run is started, and not what it is.
ONLY_COMMAND_LINE = ("config", "out", "resume", "overwrite", "help")


def parse_arguments(arguments=None):
    """Options that are not given are absent from the result, so that --resume can tell.

    Those of the file that --config names stand in for what the command line leaves out.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if "config" not in given:
        return given

    def refuse(message):
        raise UsageError(f"{given['config']}: {message}")

    parser.error = refuse
    of_file = vars(parser.parse_args(["--out", given["out"], *_config_arguments(parser, given)]))
    for names in EXCLUSIVE:
        if any(given.get(name) for name in names):
            for name in names:
                of_file.pop(name, None)
    return {**of_file, **given}


def _config_arguments(parser, given):
    """What the file of --config says, as arguments of the command line."""
    path = given["config"]
    yaml = require("yaml")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected lines such as `hidden: 512`, got {content!r:.60}")
    actions = {action.dest: action for action in parser._actions}
    arguments = []
    for name, value in content.items():
        action = actions.get(str(name).replace("-", "_"))
        if action is None or action.dest in ONLY_COMMAND_LINE:
            raise UsageError(f"{path}: {name} is no option of a training")
        option = action.option_strings[0]
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                raise UsageError(f"{path}: {name}: expected true or false, got {value!r}")
            no = option.replace("--", "--no-", 1)
            if value or no in action.option_strings:
                arguments.append(option if value else no)
        elif value is None or isinstance(value, (bool, dict, list)):
            raise UsageError(f"{path}: {name}: expected one value, got {value!r}")
        else:
            arguments.append(f"{option}={value}")
    return arguments


def save_config(path, given):
    """Write options as a file that --config takes."""
    content = {k: v for k, v in given.items() if k not in ONLY_COMMAND_LINE}
    cli.atomic_write(path, require("yaml").safe_dump(content, sort_keys=False, allow_unicode=True))


def _parser():
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
    return parser


def _add_data_options(group):
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--corpus",
        choices=("homeassistant", "libreoffice"),
        help="public en-de corpus, fetched on first use (default homeassistant)",
    )
    source.add_argument(
        "--data",
        metavar="FILE.tsv|DIR",
        help="own pairs: source<TAB>target, UTF-8; or a folder that attn_ext.nmt.prepare made",
    )
    group.add_argument("--config", metavar="FILE.yaml", help=CONFIG_HELP)
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
    add("--batch-tokens", type=whole, metavar="N", help="tokens of an update, over all processes")
    add(
        "--pass-tokens",
        type=whole,
        metavar="N",
        help="most tokens that a process computes at once; gradients of more are accumulated",
    )
    add(
        "--buckets",
        action=argparse.BooleanOptionalAction,
        help="sentences of similar length in a batch (default), or as they come",
    )
    add(
        "--optimizer",
        choices=("adam", "lamb"),
        help="lamb: for very large batches (You et al. 2020)",
    )
    add("--learning-rate", "--lr", type=cli.positive_number, metavar="X", help="the highest")
    add(
        "--schedule",
        choices=list(SCHEDULES),
        help="of the learning rate after the warm-up; linear and cosine fall to 0, gnmt is halved "
        "four times in the last third of --decay-steps",
    )
    add("--warmup", type=count, metavar="N", help="steps to the highest rate")
    add("--decay-steps", type=whole, metavar="N", help="where a schedule ends, or at --max-steps")
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
    add(
        "--fp16",
        action="store_true",
        help="compute in float16, with a loss scale; steps whose gradients overflow are skipped",
    )
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="several processes: each with all parameters, or with a part of them (FSDP2)",
    )
    add(
        "--recompute",
        action="store_true",
        help="compute encoder and decoder once more in backward, to save memory",
    )
    add("--compile", action="store_true", help="torch.compile the model (decoder gnmt)")
    add("--keep", type=count, metavar="N", help="leave the models of the last N evaluations, too")
    add("--tensorboard", action="store_true", help="also write TensorBoard's events into DIR")


def _adder(group, defaults):
    """An add_argument that shows the default, without setting it."""

    def add(name, *names, help, **keywords):
        default = defaults.get(name.removeprefix("--").replace("-", "_"))
        shown = "" if default is None or default is False else f" (default {default})"
        group.add_argument(name, *names, help=help + shown, **keywords)

    return add
