"""One of two processes that train a model by DDP or FSDP2; the first saves what it learnt.

Arguments: folder, rank. The processes meet in a file of the folder.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import attn_ext

RANKS = 2
QUERY_DIM, KEY_DIM, ATTN_DIM = 6, 8, 12
BATCH, STEPS = 4, 3
Batch = tuple[Tensor, Tensor, Tensor]


class Model(nn.Module):
    """Both ways to use the module: all steps in one call, and one by one over a memory."""

    def __init__(self):
        super().__init__()
        self.ahead = attn_ext.AdditiveAttention(
            QUERY_DIM, KEY_DIM, ATTN_DIM, num_heads=2, bias=True, normalize=True
        )
        self.stepwise = attn_ext.AdditiveAttention(KEY_DIM, KEY_DIM, ATTN_DIM)

    def forward(self, query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
        memory = self.stepwise.memory(key, key_lengths=lengths)
        steps = self.ahead(query, key, key_lengths=lengths).unbind(1)
        return torch.stack([memory.attend(step) for step in steps])


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        (
            random(BATCH, 3, QUERY_DIM),
            random(BATCH, 5, KEY_DIM),
            torch.randint(1, 6, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(wrap: Callable[[nn.Module], nn.Module], rank: int, ranks: int) -> dict[str, Tensor]:
    """The parameters after some steps, each rank seeing its part of every batch."""
    torch.manual_seed(0)
    model = wrap(Model().double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in make_batches():
        optimizer.zero_grad()
        model(*(tensor.chunk(ranks)[rank] for tensor in batch)).square().mean().backward()
        optimizer.step()
    return {
        name.removeprefix("module."): parameter.full_tensor()
        if isinstance(parameter, DTensor)
        else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.ahead, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": shard}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    for name, wrap in WRAPPERS.items():
        learnt = train(wrap, rank, RANKS)
        if rank == 0:
            torch.save(learnt, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
