"""How fast a workload could run at best: what it must move and compute, over the device's rates."""

from dataclasses import dataclass

from .workloads import Workload

# Special-function operations that an element (i, j, d) takes where two of them share a reciprocal,
# and exponentials cost nothing as many elements share one. Backward has the scores, and computes
# the tanh for the gradients.
OPERATIONS = {"forward": 0.5, "backward": 0.5, "both": 1.0}
OPERATIONS_A_CLOCK = 16  # of a multiprocessor of NVIDIA's, from sm_75 to sm_100


@dataclass(frozen=True)
class Floor:
    """Seconds of a call that no version runs much faster than, and what they go by."""

    seconds: float
    bound_by: str  # "memory" or "arithmetic"


def floor(workload: Workload, mode: str, itemsize: int, peaks: dict[str, float]) -> Floor | None:
    """The floor of a call; None for decoder loops, and where the device's rates are not known.

    Args:
        workload: what is computed.
        mode: "forward", "backward" or "both".
        itemsize: bytes a number.
        peaks: "copied_bytes_per_second", and on a GPU "special_functions_per_second".
    """
    if workload.steps or "special_functions_per_second" not in peaks:
        return None
    moved = workload.bytes_moved(mode, itemsize) / peaks["copied_bytes_per_second"]
    operations = OPERATIONS[mode] * workload.pairs * workload.dim
    computed = operations / peaks["special_functions_per_second"]
    return Floor(max(moved, computed), "memory" if moved >= computed else "arithmetic")
