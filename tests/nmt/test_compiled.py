"""The whole model compiled, as one graph that serves other offsets and totals of tokens."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from attn_ext.nmt.data import Batch, Jagged
from attn_ext.nmt.model import DECODERS, ModelConfig, Seq2Seq

VOCABULARY = 30
# The longest are alike: a decoder with a step a token is as long as the longest target.
LENGTHS = [((3, 5, 2), (4, 2, 3)), ((5, 5, 1), (4, 4, 4)), ((2, 5, 4), (1, 4, 2))]


@pytest.fixture(autouse=True)
def compiler():
    """Modules with RNNs in them are compiled only if one says so."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def make_model(decoder, cell="lstm", dropout=0.0):
    sizes = {"embedding": 8, "hidden": 8, "encoder_layers": 2, "decoder_layers": 2}
    config = ModelConfig(VOCABULARY, decoder, encoder_cell=cell, dropout=dropout, **sizes)
    return Seq2Seq(config).double()


def make_batch(source_lengths, target_lengths):
    def tokens(lengths):
        return Jagged.of(torch.randint(VOCABULARY, (sum(lengths),)), lengths)

    return Batch(tokens(source_lengths), tokens(target_lengths), tokens(target_lengths))


@pytest.mark.parametrize(("decoder", "cell"), list(zip(sorted(DECODERS), ("gru", "lstm"))))
def test_training_as_one_graph(decoder, cell):
    model = make_model(decoder, cell)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in LENGTHS:
        batch = make_batch(*lengths)
        losses = compiled(batch)[0], model(batch)[0]
        ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
        torch.testing.assert_close(losses[0], losses[1])
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


def test_rnn_drops_the_same_in_backward():
    """The gradient is that of the function, with the RNN's dropout, that forward computed."""
    model = make_model("gnmt", dropout=0.5)
    batch = make_batch(*LENGTHS[0])
    compiled = torch.compile(model.logits, fullgraph=True, backend="aot_eager")

    def loss():
        torch.manual_seed(7)
        return compiled(batch).square().sum()

    rnn = list(model.encoder.rnn.parameters())
    gradients = torch.autograd.grad(loss(), rnn)
    assert loss() == loss()
    step, direction = 1e-5, [torch.randn_like(weight) for weight in rnn]
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            for weight, move in zip(rnn, direction, strict=True):
                weight += sign * step * move
            values.append(loss())
    slope = (values[0] - values[1]) / (2 * step)
    expected = sum((gradient * move).sum() for gradient, move in zip(gradients, direction))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)
