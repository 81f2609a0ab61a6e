"""Translate lines from standard input with a trained model.

python -m attn_ext.nmt.translate --model DIR < in.txt > out.txt
"""

import sys
import time

from attn_ext.nmt import cli, commands


def parse_arguments(arguments=None):
    parser = commands.make_parser(
        "translate", "Translate standard input, one sentence a line, to standard output."
    )
    parser.add_argument("--beam", type=cli.positive_int, default=5, metavar="K",
                        help="hypotheses kept in the search; 1 is greedy (default 5)")  # fmt: skip
    parser.add_argument("--alpha", type=cli.exponent, default=0.6,
                        help="exponent of the length normalisation (default 0.6)")  # fmt: skip
    parser.add_argument("--n-best", type=cli.positive_int, metavar="N",
                        help="write the N best, at most K, of each line as `line ||| text ||| "
                        "score`: lines count from 0; the score is the natural log-probability "
                        "divided by the length to the power of alpha")  # fmt: skip
    commands.add_batch_tokens(parser, "source tokens times beam")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    commands.check_streams()
    if (options.n_best or 1) > options.beam:
        raise cli.UsageError(
            f"--n-best {options.n_best} is more than --beam {options.beam}, of which it is a part"
        )
    translator = commands.load(options)
    lines = tokens = seconds = 0
    for texts in commands.chunks(commands.input_lines()):
        started = time.perf_counter()
        found = translator.translate(
            texts, options.beam, options.alpha, options.n_best or 1, options.batch_tokens
        )
        seconds += time.perf_counter() - started
        if options.n_best:
            commands.write_lines(
                f"{number} ||| {one.text} ||| {one.score:.6f}"
                for number, best in enumerate(found, start=lines)
                for one in best
            )
        else:
            commands.write_lines(best[0].text for best in found)
        lines += len(texts)
        tokens += sum(len(best[0].tokens) + 1 for best in found)  # </s>, too
    if lines:
        print(
            f"{lines} sentences in {seconds:.1f} s: {lines / seconds:.1f} sentences/s, "
            f"{tokens / seconds:.0f} target tokens/s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.wait_without_spinning()
    cli.run(main)
