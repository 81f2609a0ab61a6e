"""Parameters that several test files share, and how their ids read."""

from collections.abc import Callable

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# One layout for each way of stating lengths, and each shape of the returned weights.
MAIN_LAYOUTS = ("padded_mask", "one_step_lengths", "jagged", "jagged_one_step")


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named(name: str) -> Callable[[object], str]:
    return lambda value: f"{name}={value}"
