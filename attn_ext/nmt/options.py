"""What a run is told about its steps, and the learning rate of each."""

import math
from dataclasses import asdict, dataclass

NO_LIMIT = 1_000_000  # steps; a run with a time limit alone


@dataclass(frozen=True)
class TrainOptions:
    seed: int = 1
    batch_tokens: int = 1000  # of an update: of all processes, and of all passes of each
    pass_tokens: int = 25_000  # of one forward and backward pass of a process
    buckets: bool = True
    optimizer: str = "adam"
    learning_rate: float = 3e-3
    schedule: str = "inverse-sqrt"
    warmup: int = 200
    decay_steps: int = 0  # for the schedules that end
    label_smoothing: float = 0.1
    clip: float = 1.0
    averaging: float = 0.995
    bf16: bool = False
    fp16: bool = False
    parallel: str = "ddp"
    recompute: bool = False
    compile: bool = False
    eval_every: int = 250
    # From here on, what a resumed run may change without changing what its steps compute.
    max_steps: int = 3000
    minutes: float = 12.0
    patience: int = 8
    checkpoint_every: int = 100
    keep: int = 0
    tensorboard: bool = False

    MUTABLE = ("max_steps", "minutes", "patience", "checkpoint_every", "keep", "tensorboard")

    def as_dict(self):
        return asdict(self)


def _inverse_sqrt(step, warmup, _):
    return math.sqrt(warmup / step)


def _constant(*_):
    return 1.0


def _linear(step, warmup, end):
    return 1 - _share_done(step, warmup, end)


def _cosine(step, warmup, end):
    return (1 + math.cos(math.pi * _share_done(step, warmup, end))) / 2


def _share_done(step, warmup, end):
    """Of the way from the end of the warm-up to `end`, which may be before it."""
    return min(1.0, (step - warmup) / max(1, end - warmup))


def _gnmt(step, _, end):
    """Halved four times at equal distances in the last third."""
    return 0.5 ** min(4, max(0, math.ceil((step - 2 * end / 3) / (end / 12))))


# The factor of the highest rate at a step after the warm-up, of (step, warmup, decay_steps).
SCHEDULES = {
    "inverse-sqrt": _inverse_sqrt,
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "gnmt": _gnmt,
}
FALLING_TO_0 = ("linear", "cosine")
ENDING = (*FALLING_TO_0, "gnmt")  # need decay_steps


def learning_rate(step, options):
    """The rate of a step, which count from 1: linear warm-up, then the schedule.

    inverse-sqrt: of the steps (Vaswani et al. 2017); linear and cosine: down to 0 at `decay_steps`;
    gnmt: constant for two thirds of `decay_steps`, then halved four times at equal distances
    (Luong et al. 2017 and, with other numbers, Wu et al. 2016).
    """
    warmup = max(1, options.warmup)
    if step <= warmup:
        return options.learning_rate * step / warmup
    return options.learning_rate * SCHEDULES[options.schedule](step, warmup, options.decay_steps)
