"""Average the parameters of several models of one run.

python -m attn_ext.nmt.average --out avg.pt runs/mine/model-*.pt
"""

import argparse

from attn_ext.nmt import checkpoint, cli
from attn_ext.nmt.cli import UsageError


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.nmt.average",
        description="Write a model whose parameters are the arithmetic mean of those of several "
        "models of one run, such as its last ones (train --keep).",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the model file to write")
    parser.add_argument("models", nargs="+", metavar="MODEL",
                        help="model files or folders of runs, two at least")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    if len(options.models) < 2:
        raise UsageError(f"expected two models at least to average, got {len(options.models)}")
    model, vocabulary = average(options.models)
    checkpoint.save_model(options.out, model, vocabulary)
    print(f"{options.out}: the mean of {len(options.models)} models")


def average(paths):
    """The mean of models, computed in float64.

    Args:
        paths: of model files or runs' folders, one at least.

    Returns:
        (Seq2Seq in eval mode on the CPU, Vocabulary)

    Raises:
        UsageError: one cannot be read, or has another configuration or vocabulary than the first.
    """
    model, vocabulary = checkpoint.load_model(paths[0])
    sums = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for path in paths[1:]:
        other, other_vocabulary = checkpoint.load_model(path)
        if other.config != model.config:
            raise UsageError(
                f"{path} cannot be averaged with {paths[0]}: it is a model of {other.config}, the "
                f"first is one of {model.config}"
            )
        if other_vocabulary.model_bytes != vocabulary.model_bytes:
            raise UsageError(
                f"{path} cannot be averaged with {paths[0]}: their vocabularies differ; models of "
                "one run have the same"
            )
        for name, tensor in other.state_dict().items():
            sums[name] += tensor
    model.load_state_dict({name: total / len(paths) for name, total in sums.items()})
    return model, vocabulary


if __name__ == "__main__":
    cli.run(main)
