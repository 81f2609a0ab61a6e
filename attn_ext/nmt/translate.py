"""Translate lines from standard input with a trained model.

python -m attn_ext.nmt.translate --model DIR < in.txt > out.txt
"""

import argparse
import itertools
import sys

from attn_ext.nmt import checkpoint, cli, distributed
from attn_ext.nmt.corpora import normalise
from attn_ext.nmt.search import translate

LINES_AT_ONCE = 1000


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.nmt.translate",
        description="Translate standard input, one sentence a line, to standard output.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a training run's folder")
    parser.add_argument("--beam", type=cli.positive_int, default=5, metavar="K",
                        help="hypotheses kept in the search; 1 is greedy (default 5)")  # fmt: skip
    parser.add_argument("--alpha", type=cli.exponent, default=0.6,
                        help="exponent of the length normalisation (default 0.6)")  # fmt: skip
    parser.add_argument("--batch-tokens", type=cli.positive_int, default=4000, metavar="N",
                        help="source tokens times beam in a batch (default 4000)")  # fmt: skip
    parser.add_argument("--backend", metavar="B", help=cli.BACKEND_HELP)
    parser.add_argument("--device", choices=("cpu", "cuda"), help=cli.DEVICE_HELP)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    if sys.stdin is None:
        raise cli.UsageError("standard input is closed; give the lines to translate")
    if sys.__stdout__ is None:
        raise cli.UsageError("standard output is closed, so the translations could go nowhere")
    device = distributed.pick_device(options.device)
    cli.check_backend(options.backend, device)
    model, vocabulary = checkpoint.load_model(options.model, options.backend, device)
    lines = _input_lines()
    at_once = 1 if sys.stdin.buffer.isatty() else LINES_AT_ONCE  # a person waits for each answer
    while chunk := list(itertools.islice(lines, at_once)):
        results = translate(
            model, vocabulary, chunk, options.beam, options.alpha, options.batch_tokens, device
        )
        for text, _, _ in results:
            sys.stdout.buffer.write(normalise(text).encode() + b"\n")
        sys.stdout.buffer.flush()


def _input_lines():
    for number, line in enumerate(_raw_lines(), start=1):
        try:
            yield normalise(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise cli.UsageError(
                f"standard input, line {number}: not UTF-8 (byte "
                f"{error.object[error.start]:#04x}); convert it first, e.g. with iconv"
            ) from None


def _raw_lines():
    try:
        yield from sys.stdin.buffer
    except OSError as error:  # a folder, a disk that fails
        raise cli.UsageError(f"cannot read standard input: {error.strerror or error}") from None


if __name__ == "__main__":
    cli.wait_without_spinning()
    cli.run(main)
