"""Score given translations with a trained model.

python -m attn_ext.nmt.score --model DIR < pairs.tsv > scores.txt
"""

from attn_ext.nmt import cli, commands


def parse_arguments(arguments=None):
    parser = commands.make_parser(
        "score",
        "Read source<TAB>target lines; write the natural log-probability of each target given its "
        "source, end of sentence included, a line each. The number that translate --n-best writes "
        "is this one divided by the length to the power of alpha.",
    )
    commands.add_batch_tokens(parser, "tokens")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    commands.check_streams()
    translator = commands.load(options)
    for pairs in commands.chunks(commands.input_pairs()):
        scores = translator.score(pairs, options.batch_tokens)
        commands.write_lines(f"{score:.6f}" for score in scores)


if __name__ == "__main__":
    cli.wait_without_spinning()
    cli.run(main)
