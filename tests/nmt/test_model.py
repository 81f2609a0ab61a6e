import pytest
import torch

from attn_ext.nmt import data
from attn_ext.nmt.rnn import run_rnn


@pytest.mark.parametrize("cell", [torch.nn.LSTM, torch.nn.GRU])
def test_run_rnn_is_the_rnn_of_each_sequence(cell):
    torch.manual_seed(0)
    rnn = cell(5, 4, num_layers=2, bidirectional=True)
    sequences = [torch.randn(length, 5) for length in (3, 7, 1, 7, 2)]
    jagged = data.Jagged.of(torch.cat(sequences), [len(s) for s in sequences])
    for got, sequence in zip(run_rnn(rnn, jagged).split(), sequences, strict=True):
        torch.testing.assert_close(got, rnn(sequence)[0])


def test_logits_do_not_depend_on_the_rest_of_the_batch(model, examples, vocabulary):
    together = data.make_batch(examples[:9], vocabulary)
    with torch.no_grad():
        rows = together.target_output.like(model.logits(together)).split()
        for row, example in zip(rows, examples[:9], strict=True):
            alone = model.logits(data.make_batch([example], vocabulary))
            torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)


def test_loss_is_label_smoothed_cross_entropy(model, batch):
    with torch.no_grad():
        logits, targets = model.logits(batch), batch.target_output.values
        loss, nll = model(batch, label_smoothing=0.1)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(nll, cross_entropy(logits, targets, reduction="sum"))
    expected = cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_in_parts_is_the_loss(model, batch, label_smoothing, monkeypatch):
    """With the gradients, and with no more logits at once than asked for."""
    sizes = []
    project = model.project
    monkeypatch.setattr(model, "project", lambda rows: sizes.append(len(rows)) or project(rows))

    def losses():
        model.zero_grad()
        sizes.clear()
        loss, nll = model(batch, label_smoothing)
        loss.backward()
        return loss.detach(), nll, [p.grad for p in model.parameters()]

    whole = losses()
    tokens = len(batch.target_output.values)
    assert sizes == [tokens]
    monkeypatch.setattr("attn_ext.nmt.model.LOGITS_AT_ONCE", 10 * model.config.vocab_size)
    parts = losses()
    assert len(sizes) > 2 and max(sizes) == 10 and sum(sizes) == 2 * tokens
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_alignments_are_distributions_over_the_own_source(model, batch):
    with torch.no_grad():
        alignments = model.alignments(batch)
    for weights, tq, tk in zip(
        alignments, batch.target_input.lengths, batch.source.lengths, strict=True
    ):
        assert weights.shape == (tq, tk)
        torch.testing.assert_close(weights.sum(1), torch.ones(tq))


def test_every_parameter_learns(model, batch):
    model.train()
    model(batch, 0.1)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("rows", [[0, 0, 1], [1, 0]])
def test_select_picks_hypotheses(model, examples, vocabulary, rows):
    """A step from selected states is the selection of a step."""
    batch = data.make_batch(examples[:1] * 2, vocabulary)
    selected = data.make_batch([examples[0]] * len(rows), vocabulary)
    with torch.no_grad():
        states, selected_states = model.encode(batch.source), model.encode(selected.source)
        attend = model.decoder.remember(states).attend
        selected_attend = model.decoder.remember(selected_states).attend
        state = model.decoder.start(states, 2)
        tokens = torch.tensor([5, 9])
        _, state, _ = model.decoder.step(model.embed(tokens), state, attend)
        expected = model.decoder.step(model.embed(tokens), state, attend)[0][rows]
        state = model.decoder.select(state, torch.tensor(rows))
        got = model.decoder.step(model.embed(tokens[rows]), state, selected_attend)[0]
    torch.testing.assert_close(got, expected)
