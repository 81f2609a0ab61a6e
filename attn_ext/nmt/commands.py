"""What the commands that use a trained model share: options, the model, lines in and out."""

import argparse
import itertools
import sys

from attn_ext.nmt import cli, translator

LINES_AT_ONCE = 1000


def make_parser(name, description):
    """An argument parser with the options that say which model computes where."""
    parser = argparse.ArgumentParser(
        prog=f"python -m attn_ext.nmt.{name}", description=description, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR",
                        help="a training run's folder, or a model file")  # fmt: skip
    parser.add_argument("--backend", metavar="B", help=cli.BACKEND_HELP)
    parser.add_argument("--device", choices=("cpu", "cuda"), help=cli.DEVICE_HELP)
    return parser


def add_batch_tokens(parser, what):
    default = translator.BATCH_TOKENS
    parser.add_argument("--batch-tokens", type=cli.positive_int, default=default, metavar="N",
                        help=f"{what} in a batch (default {default})")  # fmt: skip


def load(options):
    """The Translator that the options of `make_parser` name."""
    return translator.load(options.model, options.device, options.backend)


def check_streams():
    """Standard input and output are open: else nothing can come, or what is computed be kept."""
    if sys.stdin is None:
        raise cli.UsageError("standard input is closed; give the lines to read")
    if sys.__stdout__ is None:
        raise cli.UsageError("standard output is closed, so the results could go nowhere")


def write_lines(lines):
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())
    sys.stdout.buffer.flush()


def chunks(items):
    """Lists of what is computed at once; of one item where a person waits for each answer."""
    items = iter(items)
    at_once = 1 if sys.stdin.buffer.isatty() else LINES_AT_ONCE
    while chunk := list(itertools.islice(items, at_once)):
        yield chunk


def input_lines():
    """The lines of standard input, as texts."""
    for number, line in enumerate(_raw_lines(), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise cli.UsageError(
                f"standard input, line {number}: not UTF-8 (byte "
                f"{error.object[error.start]:#04x}); convert it first, e.g. with iconv"
            ) from None


def input_pairs():
    """The (source, target) texts of standard input, a line each, a tab between them."""
    for number, line in enumerate(input_lines(), start=1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise cli.UsageError(
                f"standard input, line {number}: expected source<TAB>target, got {len(fields)} "
                "field(s)"
            )
        yield tuple(fields)


def _raw_lines():
    try:
        yield from sys.stdin.buffer
    except OSError as error:  # a folder, a disk that fails
        raise cli.UsageError(f"cannot read standard input: {error.strerror or error}") from None
