"""The training loop through its command line: resuming exactly, stopping, refusing."""

import json
import math
import os
import re
import signal

import pytest
import torch
from toy_data import TINY_RUN

from attn_ext import backends
from attn_ext.nmt import checkpoint, options, train, training
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.distributed import World
from attn_ext.nmt.training import Trainer


def run(tsv, out, *options):
    arguments = [] if tsv is None else ["--data", str(tsv)]
    return train.main([*arguments, "--out", str(out), *(TINY_RUN if tsv else []), *options])


def metrics(out):
    """Records by (step, kind), without the timings."""
    records = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("tokens_per_s", None)
        key = record["step"], "dev" if "dev_loss" in record else "train"
        assert key not in records
        records[key] = record
    return records


def state(out):
    content = checkpoint.load(out / "checkpoint.pt", "checkpoint")
    return content["model"] | {f"averaged {k}": v for k, v in content["averaged"].items()}


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


STEPS = ["--eval-every", "6", "--checkpoint-every", "5", "--lr", "0.02"]


@pytest.fixture(scope="module")
def uninterrupted(tsv, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert run(tsv, out, *STEPS, "--max-steps", "30", "--decoder", "rnnsearch") == 0
    return out


def test_loss_falls_and_everything_is_written(uninterrupted):
    records = metrics(uninterrupted)
    losses = [records[step, "train"]["loss"] for step in range(1, 31)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {step for step, kind in records if kind == "dev"} == {6, 12, 18, 24, 30}
    assert {"loss", "ppl", "lr", "grad_norm"} <= records[1, "train"].keys()
    assert {"dev_loss", "dev_bleu"} <= records[6, "dev"].keys()
    results = json.loads((uninterrupted / "results.json").read_text())
    assert {"trained", "untrained", "source copied"} <= results["test"].keys()
    for name in results["pictures"]:
        assert (uninterrupted / name).read_bytes().startswith(b"\x89PNG")
    assert not list(uninterrupted.glob("*.tmp"))


@pytest.mark.parametrize("stop", [7, 20], ids=["inside-an-epoch", "later"])
def test_resumed_run_repeats_the_uninterrupted_one(uninterrupted, tsv, tmp_path, stop):
    out = tmp_path / "out"
    run(tsv, out, *STEPS, "--max-steps", str(stop), "--decoder", "rnnsearch")
    run(None, out, "--resume", "--max-steps", "30", "--device", "cpu")
    assert_same_run(uninterrupted, out)


def test_kill_loses_at_most_the_steps_since_the_checkpoint(uninterrupted, nursery, tsv, tmp_path):
    out = tmp_path / "out"
    options = [*TINY_RUN, *STEPS, "--decoder", "rnnsearch", "--max-steps", 100000]
    done = nursery.run("train", "--data", tsv, "--out", out, *options, at_step={"number": 14})
    assert done.status == -signal.SIGKILL
    step = checkpoint.load(out / "checkpoint.pt", "checkpoint")["progress"]["step"]
    assert 10 <= step < 14 and max(metrics(out))[0] == 13
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9999, "loss"')  # as a kill inside a write leaves it
    run(None, out, "--resume", "--max-steps", "30", "--device", "cpu")
    assert_same_run(uninterrupted, out)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(nursery, tsv, tmp_path):
    out = tmp_path / "out"
    options = [*TINY_RUN, "--max-steps", 100000, "--checkpoint-every", 100000]
    ctrl_c = {"number": 4, "with_signal": signal.SIGINT}
    done = nursery.run("train", "--data", tsv, "--out", out, *options, at_step=ctrl_c)
    assert done.status == 130
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("interrupted after step 4") and last.endswith("--resume")
    assert "Traceback" not in done.output + done.error
    step = checkpoint.load(out / "checkpoint.pt", "checkpoint")["progress"]["step"]
    assert step == max(step for step, _ in metrics(out)) == 4


class TestRefuses:
    @pytest.fixture
    def copy(self, uninterrupted, tmp_path):
        for path in uninterrupted.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    def refuses(self, message, *arguments):
        with pytest.raises(UsageError, match=message) as error:
            run(*arguments)
        assert "\n" not in str(error.value)

    def test_to_write_over_a_run(self, uninterrupted, tsv):
        before = {path: path.read_bytes() for path in uninterrupted.iterdir()}
        self.refuses(r"holds a run already \(.*\); --resume goes on", tsv, uninterrupted)
        assert before == {path: path.read_bytes() for path in uninterrupted.iterdir()}

    def test_another_shape(self, uninterrupted):
        self.refuses("--hidden 24 does not fit", None, uninterrupted, "--resume", "--hidden", "24")

    def test_another_seed(self, uninterrupted):
        self.refuses("--seed 9 does not fit", None, uninterrupted, "--resume", "--seed", "9")

    def test_other_data(self, uninterrupted, tmp_path):
        other = tmp_path / "other.tsv"
        other.write_text("".join(f"a {w}\tb {w}\n" for w in "qwertzuiop"))
        self.refuses("data are not those", None, uninterrupted, "--resume", "--data", str(other))

    @pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
    @pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "cut"])
    def test_broken_file(self, copy, name, content):
        path = copy / name
        path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
        message = "is not a file of attn_ext" if content == b"hello" else "is cut off or damaged"
        with pytest.raises(UsageError, match=message):
            checkpoint.load(path, name.removesuffix(".pt"))

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("averaged", None),
            ("options", {"seeds": 1}),
            ("config", {"layers": 1}),
            ("progress", {"steps": 1}),
            ("identity", {"x": 1}),
            ("vocabulary", 3),
            ("optimizer", {}),
            ("model", []),
        ],
    )
    def test_checkpoint_with_other_fields(self, copy, field, change):
        content = checkpoint.load(copy / "checkpoint.pt", "checkpoint")
        if change is None:
            del content[field]
        elif isinstance(change, dict) and change:
            content[field] |= change
        else:
            content[field] = change
        checkpoint.save(copy / "checkpoint.pt", "checkpoint", content)
        self.refuses("cut off or damaged, .*--overwrite", None, copy, "--resume")

    @pytest.mark.parametrize(
        "name", ["model.pt", "metrics.jsonl", "results.json", "model-mine.pt", "tensorboard/mine"]
    )
    def test_to_write_over_what_is_left_of_a_run(self, tsv, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        self.refuses(rf"holds a run already \({name.split('/')[0]}\)", tsv, tmp_path)
        assert path.exists()

    @pytest.mark.parametrize("name", ["model.pt", "results.json"])
    def test_to_go_on_without_a_checkpoint(self, tsv, tmp_path, name):
        (tmp_path / name).touch()
        self.refuses(f"holds {name} but no checkpoint to go on from", tsv, tmp_path, "--resume")
        assert (tmp_path / name).exists()

    def test_another_vocabulary_size(self, uninterrupted):
        self.refuses(
            "--vocab-size 321 does not fit", None, uninterrupted, "--resume", "--vocab-size", "321"
        )

    def test_the_other_kind(self, copy):
        (copy / "model.pt").write_bytes((copy / "checkpoint.pt").read_bytes())
        with pytest.raises(UsageError, match="is not a model file"):
            checkpoint.load_model(copy)

    def test_parameters_of_another_shape(self, copy):
        content = checkpoint.load(copy / "model.pt", "model")
        content["config"]["hidden"] = 24
        checkpoint.save(copy / "model.pt", "model", content)
        with pytest.raises(UsageError, match=r"of another shape: .* is \(\d.*\) there, this model"):
            checkpoint.load_model(copy)

    def test_a_run_that_is_not_there(self, tmp_path):
        with pytest.raises(UsageError, match="there is no .*model.pt"):
            checkpoint.load_model(tmp_path)

    def test_an_unknown_backend(self, tsv, tmp_path):
        self.refuses("--backend: .*abacus", tsv, tmp_path, "--backend", "abacus")


def test_resume_before_the_first_checkpoint_starts_at_the_beginning(tsv, tmp_path, capsys):
    assert run(tsv, tmp_path, "--resume", "--max-steps", "1") == 0
    assert "starting at the beginning" in capsys.readouterr().err


def test_overwrite_leaves_nothing_of_the_run_before(tsv, tmp_path, monkeypatch):
    for name in ("model.pt", "results.json", "attention-9.png", ".model.pt.ab.tmp", "other.png"):
        (tmp_path / name).touch()

    def stop(*_):
        raise UsageError("stopped")

    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(UsageError, match="stopped"):
        run(tsv, tmp_path, "--overwrite")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.pt", "config.yaml", "metrics.jsonl", "other.png"}


def test_resuming_does_not_replace_a_better_model(tsv, tmp_path):
    """The evaluation after the last step keeps a model, too; it must not be forgotten."""
    run(tsv, tmp_path, *STEPS, "--max-steps", "7", "--decoder", "rnnsearch")
    model = checkpoint.load(tmp_path / "model.pt", "model")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert records[-1]["final"] and records[-1]["step"] == 7
    assert model["dev_loss"] == min(r["dev_loss"] for r in records if "dev_loss" in r)

    checkpoint.save(tmp_path / "model.pt", "model", {**model, "dev_loss": 1e-9})
    before = (tmp_path / "model.pt").read_bytes()
    run(None, tmp_path, "--resume", "--max-steps", "13", "--device", "cpu")
    assert (tmp_path / "model.pt").read_bytes() == before
    finals = [step for (step, _), record in metrics(tmp_path).items() if "final" in record]
    assert finals == [13]

    (tmp_path / "model.pt").write_bytes(before[:100])
    run(None, tmp_path, "--resume", "--device", "cpu")  # at its last step already
    assert checkpoint.load(tmp_path / "model.pt", "model")["dev_loss"] < math.inf


def test_one_evaluation_a_step(tsv, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(training, "evaluate_loss", lambda *_: calls.append(1) or 2000.0)
    run(tsv, tmp_path, *STEPS, "--max-steps", "6")
    assert len(calls) == 1
    assert math.isfinite(metrics(tmp_path)[6, "dev"]["dev_ppl"])


def test_dev_loss_that_is_not_finite(tsv, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "evaluate_loss", lambda *_: math.nan)
    with pytest.raises(UsageError, match="loss on dev is not finite at step 6; .* --lr"):
        run(tsv, tmp_path, *STEPS, "--max-steps", "6")


def test_gru_encoder(tsv, tmp_path):
    run(tsv, tmp_path, "--encoder-cell", "gru", "--encoder-layers", "2", "--max-steps", "1")
    run(None, tmp_path, "--resume", "--max-steps", "2", "--device", "cpu")
    model, _ = checkpoint.load_model(tmp_path)
    assert isinstance(model.encoder.rnn, torch.nn.GRU)


def test_early_stop(tsv, tmp_path, capsys):
    options = ["--eval-every", "1", "--patience", "2", "--lr", "1e-30", "--max-steps", "50"]
    assert run(tsv, tmp_path, *options) == 0
    assert "(no gain on dev)" in capsys.readouterr().out
    assert max(step for step, _ in metrics(tmp_path)) < 50


def test_time_limit(tsv, tmp_path, capsys):
    assert run(tsv, tmp_path, "--minutes", "1e-9", "--max-steps", "50") == 0
    assert "ended at step 1 (minutes)" in capsys.readouterr().out


@pytest.mark.skipif(
    backends.problem("cpu", torch.device("cpu")) is not None, reason="no cpu backend here"
)
@pytest.mark.parametrize("decoder", ["rnnsearch", "gnmt"])
def test_backends_give_the_same_losses(tsv, tmp_path, decoder):
    losses = {}
    for backend in ("reference", "cpu"):
        out = tmp_path / backend
        options = ["--decoder", decoder, "--backend", backend, "--max-steps", "25"]
        run(tsv, out, *options)
        losses[backend] = [metrics(out)[step, "train"]["loss"] for step in range(1, 26)]
    assert losses["cpu"] == pytest.approx(losses["reference"], abs=1e-3)


def test_umask_is_respected(uninterrupted):
    mask = os.umask(0)
    os.umask(mask)
    assert (uninterrupted / "model.pt").stat().st_mode & 0o777 == 0o666 & ~mask


def test_dev_loss_is_measured_without_dropout(model, examples, vocabulary):
    def loss():
        return training.evaluate_loss(
            model, examples, vocabulary, options.TrainOptions(), torch.device("cpu")
        )

    before = loss()
    assert model.dropout.p > 0
    model.train()
    assert loss() == before


def test_a_resumed_run_remembers_the_vocabulary_size_asked_for(tsv, tmp_path):
    out = {"out": str(tmp_path)}
    _, started = train._load_data({**out, "data": str(tsv), "vocab_size": 320}, None, World())
    _, resumed = train._load_data(out, {"identity": started}, World())
    assert resumed == started


@pytest.mark.parametrize("pair", ["ein\t{}", "{}\tein"], ids=["target", "source"])
def test_long_sentences_are_not_trained_on(tsv, tmp_path, monkeypatch, capsys, pair):
    data = tmp_path / "pairs.tsv"
    long = pair.format("zwei drei " * train.MAX_LENGTH)
    data.write_text(tsv.read_text() + f"{long}\n{long} vier\n")  # one may be held out

    def stop(*_):
        raise UsageError("stopped")

    monkeypatch.setattr(Trainer, "run", stop)
    with pytest.raises(UsageError, match="stopped"):
        run(data, tmp_path / "out")
    assert re.search(r"\([12] too long\)", capsys.readouterr().out)
