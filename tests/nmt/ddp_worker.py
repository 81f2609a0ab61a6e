"""One rank of test_distributed: trains small models for a few steps and leaves what came of it.

Argument: folder. Run by torchrun, and by the test itself as the only process.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from toy_data import synthetic_pairs

from attn_ext.nmt import checkpoint, distributed
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.model import DECODERS, ModelConfig, Seq2Seq
from attn_ext.nmt.options import TrainOptions
from attn_ext.nmt.shards import InMemory
from attn_ext.nmt.training import Trainer
from attn_ext.nmt.vocab import Vocabulary

STEPS = 8
PASSES = 4  # of an update of two processes, where they accumulate
OPTIONS = TrainOptions(batch_tokens=90, max_steps=STEPS, eval_every=4, warmup=2)
# One after another: the last goes on from where the one before it stopped.
RUNS = {
    "ddp": OPTIONS,
    "ddp-passes": dataclasses.replace(OPTIONS, pass_tokens=90 // 2 // PASSES),
    "fsdp-passes": dataclasses.replace(OPTIONS, pass_tokens=90 // 2 // PASSES, parallel="fsdp"),
}


def make_trainer(folder, decoder, world, options):
    pairs = synthetic_pairs(60)
    vocabulary = Vocabulary.train([text for pair in pairs for text in pair], 320)
    examples = [tuple(map(vocabulary.encode, pair)) for pair in pairs]
    torch.manual_seed(world.rank)  # other parameters on each rank: wrapping must make them equal
    config = ModelConfig(
        len(vocabulary), decoder, embedding=8, hidden=8, decoder_layers=2, dropout=0.0
    )
    model = Seq2Seq(config)
    data = InMemory(examples[:50]), examples[50:]
    return Trainer(model, vocabulary, *data, options, folder, world, {})


def train(folder, decoder, world, options=OPTIONS):
    """The parameters after STEPS steps."""
    trainer = make_trainer(folder, decoder, world, options)
    reductions = count_reductions(trainer.parallel)
    assert trainer.run() == "max-steps"
    parameters = distributed.whole(trainer.model.state_dict())
    if world.size > 1:
        content = {"parameters": parameters, "reductions": len(reductions)}
        torch.save(content, folder / f"rank{world.rank}.pt")
    return parameters


def count_reductions(parallel):
    """A list that grows by one whenever gradients are reduced over the ranks by DDP."""
    seen = []
    if isinstance(parallel, torch.nn.parallel.DistributedDataParallel):

        def counted(state, bucket):
            seen.append(bucket.index())
            return allreduce_hook(state, bucket)

        parallel.register_comm_hook(None, counted)
    return seen


def stop_and_go_on(folder, decoder, world, options):
    """Half of the steps, and the others by another trainer from the checkpoint."""
    half = dataclasses.replace(options, max_steps=STEPS // 2)
    make_trainer(folder, decoder, world, half).run()
    trainer = make_trainer(folder, decoder, world, options)
    trainer.resume(checkpoint.load(folder / "checkpoint.pt", "checkpoint"))
    trainer.run()


def fail_on(rank, world):
    if world.rank == rank:
        raise UsageError(f"only process {rank} has it")


def main(folder):
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    for decoder in sorted(DECODERS):
        for name, options in RUNS.items():
            train(folder / f"{decoder}-{name}", decoder, world, options)
    try:
        world.together(lambda: fail_on(1, world))
    except UsageError as error:
        (folder / f"told-{world.rank}").write_text(str(error))
    stop_and_go_on(folder / "resumed", "gnmt", world, RUNS["fsdp-passes"])
    distributed.leave(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
