"""Write a trained model as one file.

python -m attn_ext.nmt.export --model DIR --out FILE
"""

import argparse
import os

import torch

from attn_ext.nmt import checkpoint, cli
from attn_ext.nmt.cli import UsageError


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m attn_ext.nmt.export",
        description="Write a trained model as one file with all that using it needs: "
        "configuration, parameters and subwords. attn_ext.nmt.load and all commands take it.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR",
                        help="a training run's folder, or a model file")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--half", action="store_true",
                        help="store parameters in float16: half the size; what loads the file "
                        "computes in float32 all the same")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    model, vocabulary = checkpoint.load_model(options.model)
    if options.half:
        largest = max(parameter.abs().max().item() for parameter in model.parameters())
        if not largest <= torch.finfo(torch.float16).max:
            raise UsageError(f"--half: a parameter of {largest:g} is too large for float16")
        model.half()
    checkpoint.save_model(options.out, model, vocabulary)
    print(f"{options.out}: {os.path.getsize(options.out):,} bytes")


if __name__ == "__main__":
    cli.run(main)
