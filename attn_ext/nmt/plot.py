"""Draw where a trained model looks while it translates a sentence.

python -m attn_ext.nmt.plot --model DIR --source "Turn on the light." --out light.png
"""

import argparse

from attn_ext.nmt import checkpoint, cli, distributed, heatmap
from attn_ext.nmt.corpora import normalise


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.nmt.plot",
        description="Translate a sentence and write its attention weights as a PNG heat map: "
        "source tokens left to right, target tokens top to bottom.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a training run's folder")
    parser.add_argument("--source", required=True, metavar="TEXT", help="the sentence")
    parser.add_argument("--target", metavar="TEXT", help="align this instead of the translation")
    parser.add_argument("--out", required=True, metavar="X.png", help="the picture to write")
    parser.add_argument("--beam", type=cli.positive_int, default=5, metavar="K",
                        help="hypotheses kept in the search (default 5)")  # fmt: skip
    parser.add_argument("--backend", metavar="B", help=cli.BACKEND_HELP)
    parser.add_argument("--device", choices=("cpu", "cuda"), help=cli.DEVICE_HELP)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    source = normalise(cli.utf8_argument("--source", options.source))
    target = cli.utf8_argument("--target", options.target)
    target = None if target is None else normalise(target)
    if not source:
        raise cli.UsageError("--source is empty")
    device = distributed.pick_device(options.device)
    cli.check_backend(options.backend, device)
    model, vocabulary = checkpoint.load_model(options.model, options.backend, device)
    *picture, target = heatmap.align(model, vocabulary, source, target, options.beam, device)
    heatmap.draw(options.out, *picture, title=f"{source}\n{target}")
    print(target)


if __name__ == "__main__":
    cli.run(main)
