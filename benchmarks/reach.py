"""What each row of the table is to reach, and whether it does."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """A bound on one figure of a row; ``captured``: of rows that replay their calls as a graph."""

    figure: str
    bound: float
    at_most: bool = False
    captured: bool = False

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.figure} {sign} {self.bound:g}"

    def is_met(self, row: dict) -> bool:
        found = row[self.figure]
        return found <= self.bound if self.at_most else found >= self.bound


def _peers(compile: float = 0.0, eager: float = 0.0, captured: bool = False) -> tuple[Reach, ...]:
    bounds = {"vs_eager": eager, "vs_compile": compile}
    return tuple(Reach(key, bound, captured=captured) for key, bound in bounds.items() if bound)


SKEW = Reach("vs_level", 1 / 1.2)
TABLE = {
    ("cpu", "float32"): {
        ("equal", "forward"): _peers(compile=10),
        ("equal", "both"): _peers(compile=8),
        ("gnmt", "forward"): _peers(compile=20),
        ("gnmt", "both"): _peers(compile=15),
        ("step-decoder", "forward"): _peers(compile=3, eager=6),
        ("step-decoder", "both"): _peers(compile=3, eager=6),
        ("one-long", "forward"): _peers(eager=4),
        ("one-long", "both"): (*_peers(eager=4), Reach("slowest_round_vs_eager", 1)),
        ("skewed", "forward"): (SKEW,),
        ("skewed", "both"): (SKEW,),
    },
    ("cuda", "bfloat16"): {
        ("at-once", "forward"): (*_peers(compile=5), Reach("median", 0.45e-3, at_most=True)),
        ("at-once", "both"): (*_peers(compile=5), Reach("memory_ratio", 1.2, at_most=True)),
        ("gnmt-384", "forward"): _peers(compile=10),
        ("gnmt-384", "both"): _peers(compile=10),
        ("step", "forward"): (Reach("share_of_copy", 0.85, captured=True),),
        ("step", "backward"): (Reach("share_of_copy", 0.75, captured=True),),
        ("one-long-512", "forward"): (Reach("share_of_copy", 0.7, captured=True),),
        ("skewed-512", "forward"): (Reach("share_of_copy", 0.7, captured=True), SKEW),
        ("skewed-512", "both"): (SKEW,),
        ("step-decoder", "both"): _peers(compile=3, eager=5, captured=True),
        ("graph", "forward"): (Reach("vs_cudnn", 3),),
        ("graph", "both"): (Reach("vs_cudnn", 3),),
    },
}
# Of training a GNMT-sized model, each attention at its largest batch.
TRAINING = (Reach("tokens_vs_eager", 1.3), Reach("batch_vs_eager", 2))


def verdicts(row: dict, device: str, dtype: str) -> list[str]:
    """What :func:`judge` finds on a row of the table."""
    bounds = TABLE.get((device, dtype), {}).get((row["workload"], row["mode"]), ())
    return judge([reach for reach in bounds if row["captured"] or not reach.captured], row)


def judge(bounds: Sequence[Reach], row: dict) -> list[str]:
    """For each bound on the row: its text, and "met", or "SHORT" with the figure found.

    A figure that is not there, as where a rival did not run, is "not measured".
    """
    found = []
    for reach in bounds:
        if reach.figure not in row:
            verdict = "not measured"
        else:
            verdict = "met" if reach.is_met(row) else f"SHORT, {row[reach.figure]:.3g}"
        found.append(f"{reach}: {verdict}")
    return found
