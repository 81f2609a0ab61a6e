"""One process or the ranks that torchrun started: the same few calls for both."""

import os
from dataclasses import dataclass

import torch
from torch import distributed as dist

from attn_ext.nmt.cli import UsageError


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

    def wrap(self, model):
        """The model whose backward averages gradients over the ranks."""
        if self.size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(model)


def join(device=None):
    """The world this process belongs to, by the variables torchrun sets.

    Args:
        device: "cpu", "cuda" or None, which takes the GPU of this rank where there is one.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = "cuda" if torch.cuda.device_count() > local_rank else "cpu"
    if device == "cuda":
        if torch.cuda.device_count() <= local_rank:
            raise UsageError(
                f"--device cuda: this machine has {torch.cuda.device_count()} GPU(s), process "
                f"{local_rank} finds none; use --device cpu or fewer processes"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    device = torch.device(device)
    if size == 1:
        return World(device=device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, device)


def leave(world):
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
