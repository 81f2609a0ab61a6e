"""What the examples share: their command line, and plain PyTorch's attention timed beside ours."""

import ctypes
import math
import re
import signal
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from functools import partial
from pathlib import Path

import torch

try:
    import matplotlib  # noqa: F401  # all examples draw with it
except ImportError:
    sys.exit("The package matplotlib is missing: pip install matplotlib")


def read_options(description, picture, arguments=None) -> Namespace:
    """Read ``--out PICTURE`` and ``--fast``; let Ctrl-C end the program without a traceback."""
    parser = ArgumentParser(description=description, formatter_class=RawTextHelpFormatter)
    known = f"where to write the picture (default: {picture})"
    parser.add_argument("--out", metavar="PICTURE", type=Path, default=Path(picture), help=known)
    known = "train for a few seconds, too short to learn anything, as the tests do"
    parser.add_argument("--fast", action="store_true", help=known)
    options = parser.parse_args(arguments)
    if options.out.is_dir() or not options.out.parent.is_dir():
        parser.error(f"--out: {options.out} cannot be written")  # now, not after minutes
    if arguments is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)  # steps as short as these gain nothing by more
    torch.manual_seed(0)
    return options


def compare(train_step, model, plain, batch, rounds):
    """Print what a training step takes with attn_ext and with plain PyTorch's attention.

    Args:
        train_step: ``train_step(model, optimizer, *batch)``, which returns the loss.
        model, plain: the same model but for its attention; plain gets model's parameters.
        batch: what both are trained on.
        rounds: how often both are timed. They take turns, so that what else the machine does meets
            both alike; it is this process's own time that is counted.
    """
    plain.load_state_dict(model.state_dict())
    steps = {
        name: partial(train_step, one, torch.optim.Adam(one.parameters()), *batch)
        for name, one in (("attn_ext", model), ("plain PyTorch", plain))
    }
    first, second = (step() for step in steps.values())
    if not math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-6):
        raise AssertionError(f"not the same model: loss {first} with attn_ext, {second} without")
    seconds = {name: [] for name in steps}
    for name, step in [*steps.items()] * rounds:
        start = time.process_time()
        step()
        seconds[name].append(time.process_time() - start)
    for name, step in steps.items():
        median = 1e3 * statistics.median(seconds[name])
        print(f"a training step with {name}: {median:.1f} ms, {peak_megabytes(step):.0f} MB")


def peak_megabytes(step):
    """The memory that a step needs beyond what the process holds before it, by Linux's account."""
    if sys.platform != "linux":
        return math.nan

    def most():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what the step takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the most so far becomes what is held now
    except OSError:  # not everywhere one may
        return math.nan
    held = most()
    step()
    return most() - held
