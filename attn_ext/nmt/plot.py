"""Draw where a trained model looks while it translates a sentence.

python -m attn_ext.nmt.plot --model DIR --source "Turn on the light." --out light.png
"""

from attn_ext.nmt import cli, commands, heatmap
from attn_ext.nmt.corpora import normalise


def parse_arguments(arguments=None):
    parser = commands.make_parser(
        "plot",
        "Translate a sentence and write its attention weights as a PNG heat map: source tokens "
        "left to right, target tokens top to bottom.",
    )
    parser.add_argument("--source", required=True, metavar="TEXT", help="the sentence")
    parser.add_argument("--target", metavar="TEXT", help="align this instead of the translation")
    parser.add_argument("--out", required=True, metavar="X.png", help="the picture to write")
    parser.add_argument("--beam", type=cli.positive_int, default=5, metavar="K",
                        help="hypotheses kept in the search (default 5)")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    source = normalise(cli.utf8_argument("--source", options.source))
    target = cli.utf8_argument("--target", options.target)
    if not source:
        raise cli.UsageError("--source is empty")
    attention = commands.load(options).attention(source, target, options.beam)
    heatmap.draw(options.out, attention, title=f"{source}\n{attention.target}")
    print(attention.target)


if __name__ == "__main__":
    cli.run(main)
