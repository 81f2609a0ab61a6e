"""One process or the ranks that torchrun started: the same few calls for both."""

import os
from dataclasses import dataclass

import torch
from torch import distributed as dist

from attn_ext.nmt.cli import UsageError

VARIABLES = {"WORLD_SIZE": 1, "LOCAL_RANK": 0}  # of the environment, and what stands in


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, values):
        """Sum a list of numbers over the ranks."""
        if self.size == 1:
            return list(map(float, values))
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def from_main(self, function):
        """What `function` returns on the main process, the only one to call it, on every rank.

        Raises:
            UsageError: the function raised it; on every rank, so that none waits for the others.
        """
        if self.size == 1:
            return function()
        shared = [None, None]
        if self.is_main:
            try:
                shared = [function(), None]
            except UsageError as error:
                shared = [None, str(error)]
        dist.broadcast_object_list(shared, src=0, device=self.device)
        result, error = shared
        if error is not None:
            raise UsageError(error)
        return result

    def wrap(self, model):
        """The model whose backward averages gradients over the ranks, starting from rank 0's.

        The module given stays the one to read, save and average.
        """
        if self.size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(model)


def pick_device(device=None, local_rank=0):
    """The device for "cpu", "cuda" or None, which takes this rank's GPU where there is one."""
    gpus = torch.cuda.device_count()
    if device is None:
        device = "cuda" if gpus > local_rank else "cpu"
    if device == "cuda" and gpus <= local_rank:
        raise UsageError(
            f"--device cuda: this machine has {gpus} GPU(s), process {local_rank} finds none; use "
            "--device cpu or fewer processes"
        )
    return torch.device(f"cuda:{local_rank}" if device == "cuda" else device)


def join(device=None):
    """The world this process belongs to, by the variables torchrun sets.

    Args:
        device: "cpu", "cuda" or None, which takes the GPU of this rank where there is one.
    """
    try:
        size, local_rank = (int(os.environ.get(n) or d) for n, d in VARIABLES.items())
    except ValueError:
        raise UsageError(
            f"{' and '.join(VARIABLES)} have to be numbers, as torchrun sets"
        ) from None
    device = pick_device(device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, device)


def leave(world):
    """Undo `join`; nothing where there was nothing to join."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
