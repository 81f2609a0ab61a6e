"""One rank of test_distributed: trains each decoder for a few steps and leaves its parameters.

Argument: folder. Run by torchrun, and by the test itself as the only process.
"""

import sys
from pathlib import Path

import torch
from toy_data import synthetic_pairs

from attn_ext.nmt import distributed
from attn_ext.nmt.model import DECODERS, ModelConfig, Seq2Seq
from attn_ext.nmt.options import TrainOptions
from attn_ext.nmt.shards import InMemory
from attn_ext.nmt.training import Trainer
from attn_ext.nmt.vocab import Vocabulary

STEPS = 8


def train(folder, decoder, world):
    pairs = synthetic_pairs(60)
    vocabulary = Vocabulary.train([text for pair in pairs for text in pair], 320)
    examples = [tuple(map(vocabulary.encode, pair)) for pair in pairs]
    torch.manual_seed(world.rank)  # other parameters on each rank: wrapping must make them equal
    config = ModelConfig(
        len(vocabulary), decoder, embedding=8, hidden=8, decoder_layers=2, dropout=0.0
    )
    model = Seq2Seq(config)
    options = TrainOptions(batch_tokens=90, max_steps=STEPS, eval_every=4, warmup=2)
    run = folder / f"{decoder}-{world.size}"
    trainer = Trainer(
        model, vocabulary, InMemory(examples[:50]), examples[50:], options, run, world, {}
    )
    assert trainer.run() == "max-steps"
    torch.save(model.state_dict(), run / f"rank{world.rank}.pt")
    return model.state_dict()


def main(folder):
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    for decoder in sorted(DECODERS):
        train(folder, decoder, world)
    distributed.leave(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
