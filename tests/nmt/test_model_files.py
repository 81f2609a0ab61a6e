"""Model files made of others: averages and exports."""

import math

import pytest
import torch
from toy_data import synthetic_pairs

from attn_ext import nmt
from attn_ext.nmt import average, checkpoint, cli, export
from attn_ext.nmt.model import ModelConfig, Seq2Seq
from attn_ext.nmt.vocab import Vocabulary


def save(path, vocabulary, seed=0, **sizes):
    torch.manual_seed(seed)
    model = Seq2Seq(ModelConfig(len(vocabulary), **{"embedding": 12, "hidden": 10, **sizes}))
    checkpoint.save_model(path, model, vocabulary, dev_loss=1.5)
    return model.state_dict()


def test_average_is_the_mean(tmp_path, vocabulary, capsys):
    paths = [tmp_path / f"model-{step}.pt" for step in (10, 20, 30)]
    models = [save(path, vocabulary, seed) for seed, path in enumerate(paths)]
    average.main(["--out", str(tmp_path / "new" / "mean.pt"), *map(str, paths)])
    assert "the mean of 3 models" in capsys.readouterr().out
    mean = checkpoint.load_model(tmp_path / "new" / "mean.pt")[0].state_dict()
    for name, tensor in mean.items():
        expected = torch.stack([model[name].double() for model in models]).mean(0).float()
        assert torch.equal(tensor, expected), name


def test_only_models_of_one_run_are_averaged(tmp_path, vocabulary):
    save(tmp_path / "one.pt", vocabulary)
    save(tmp_path / "wider.pt", vocabulary, hidden=11)
    texts = [text.swapcase() for pair in synthetic_pairs(150) for text in pair]
    other = Vocabulary.train(texts, 320)
    assert len(other) == len(vocabulary)
    save(tmp_path / "other.pt", other)
    for name, message in {"wider.pt": "hidden=11", "other.pt": "their vocabularies differ"}.items():
        models = [str(tmp_path / "one.pt"), str(tmp_path / name)]
        with pytest.raises(cli.UsageError, match=f"{name} cannot be averaged .*{message}"):
            average.main(["--out", str(tmp_path / "out.pt"), *models])
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("half", [False, True])
def test_export_is_all_that_is_needed(tmp_path, vocabulary, half):
    """And in float16 half the size, with parameters that are float32 again when they are used."""
    (tmp_path / "run").mkdir()
    parameters = save(tmp_path / "run" / "model.pt", vocabulary, embedding=64, hidden=64)
    out = tmp_path / "out.pt"
    export.main(["--model", str(tmp_path / "run"), "--out", str(out), *["--half"] * half])
    translator = nmt.load(out, "cpu")
    for name, tensor in translator.model.state_dict().items():
        stored = parameters[name].half().float() if half else parameters[name]
        assert torch.equal(tensor, stored) and tensor.dtype == torch.float32, name
    assert translator.vocabulary.model_bytes == vocabulary.model_bytes
    number = sum(tensor.numel() for tensor in parameters.values())
    assert (out.stat().st_size < 3 * number) == half
    assert checkpoint.kept_dev_loss(out) == math.inf  # not the run's own model any more


def test_export_refuses_what_float16_cannot_hold(tmp_path, vocabulary):
    torch.manual_seed(0)
    model = Seq2Seq(ModelConfig(len(vocabulary), embedding=12, hidden=10))
    with torch.no_grad():
        model.output_bias[3] = -1e5
    checkpoint.save_model(tmp_path / "model.pt", model, vocabulary)
    arguments = ["--model", str(tmp_path), "--out", str(tmp_path / "out.pt"), "--half"]
    with pytest.raises(cli.UsageError, match="--half: a parameter of 100000 is too large"):
        export.main(arguments)
    assert not (tmp_path / "out.pt").exists()
