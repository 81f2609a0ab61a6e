"""Align the words of given translations by a trained model's attention.

python -m attn_ext.nmt.align --model DIR < pairs.tsv > alignments.txt
"""

from attn_ext.nmt import cli, commands


def parse_arguments(arguments=None):
    parser = commands.make_parser(
        "align",
        "Read source<TAB>target lines; write word alignments in Pharaoh format, a line each: "
        "`i-j` for each target word j and the source word i that the model attended to most when "
        "it wrote j. Words are what white space separates, counted from 0.",
    )
    commands.add_batch_tokens(parser, "tokens")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    commands.check_streams()
    translator = commands.load(options)
    for pairs in commands.chunks(commands.input_pairs()):
        alignments = translator.align(pairs, options.batch_tokens)
        commands.write_lines(" ".join(f"{i}-{j}" for i, j in links) for links in alignments)


if __name__ == "__main__":
    cli.wait_without_spinning()
    cli.run(main)
