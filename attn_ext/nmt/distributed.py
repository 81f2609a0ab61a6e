"""One process or the ranks that torchrun started: the same few calls for both."""

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

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

    def together(self, function):
        """What `function`, which every process calls, returns on this one.

        Raises:
            UsageError: the function raised it on one of them; every one gets its message, so that
                the main process tells it and none waits for one that has ended.
        """
        result = error = None
        try:
            result = function()
        except UsageError as raised:
            error = str(raised)
        errors = [error]
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
        for error in filter(None, errors):
            raise UsageError(error)
        return result

    def wrap(self, model, parallel="ddp"):
        """The model whose backward averages gradients over the ranks, starting from rank 0's.

        The module given stays the one to read, save and average.

        Args:
            parallel: "ddp", where each rank has all parameters; or "fsdp", where each keeps a part
                of them, and the module's own become DTensors.
        """
        if self.size == 1:
            return model
        if parallel == "ddp":
            return torch.nn.parallel.DistributedDataParallel(model)
        self.shard(model)
        return model

    def shard(self, model):
        """Leave each rank a part of the parameters of a Seq2Seq (FSDP2)."""
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in (model.encoder, model.decoder, model):
            fully_shard(module, mesh=mesh)


@contextlib.contextmanager
def accumulating(parallel, last):
    """For the passes of an update: gradients are summed, and averaged over the ranks in the last.

    Args:
        parallel: what `World.wrap` returned.
        last: whether the pass in the block is the last of the update.
    """
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(last)
    elif not last and isinstance(parallel, torch.nn.parallel.DistributedDataParallel):
        with parallel.no_sync():
            yield
        return
    yield


def whole(tree):
    """The same with every sharded tensor in one piece, for all ranks to call together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {name: whole(value) for name, value in tree.items()}
    return tree


def sharded_like(value, model):
    """A tensor in one piece, as a sharded tensor `model` of its shape is; others as they are."""
    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    # Every rank has read the same value.
    value = value.to(model.device)
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


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
