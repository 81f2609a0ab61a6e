"""What the options of a training change: its rate, its precision, its memory, what it leaves."""

import dataclasses
import functools
import json
import math

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_data import TINY_RUN

from attn_ext.nmt import checkpoint, evaluation, train
from attn_ext.nmt.arguments import parse_arguments
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.distributed import World
from attn_ext.nmt.options import TrainOptions, learning_rate
from attn_ext.nmt.shards import InMemory
from attn_ext.nmt.training import Trainer


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """What comes after the training takes longer than these do."""
    monkeypatch.setattr(evaluation, "report", lambda *_, **__: None)


def run(tsv, out, *options):
    return train.main(["--data", str(tsv), "--out", str(out), *TINY_RUN, *options])


def losses(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


# -- learning rates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("inverse-sqrt", {1: 0.25, 4: 1, 16: 0.5, 64: 0.25}),
        ("constant", {1: 0.25, 4: 1, 200: 1}),
        ("linear", {2: 0.5, 4: 1, 64: 0.5, 124: 0, 200: 0}),
        ("cosine", {2: 0.5, 4: 1, 44: 0.75, 64: 0.5, 124: 0, 200: 0}),
    ],
)
def test_learning_rate(schedule, factors):
    options = TrainOptions(learning_rate=2.0, schedule=schedule, warmup=4, decay_steps=124)
    rates = {step: learning_rate(step, options) for step in factors}
    assert rates == pytest.approx({step: 2 * factor for step, factor in factors.items()}, abs=1e-12)


def test_learning_rate_of_gnmt():
    """Constant for two thirds, then halved four times, at equal distances, to a sixteenth."""
    options = TrainOptions(learning_rate=1.0, schedule="gnmt", warmup=0, decay_steps=120)
    rates = [learning_rate(step, options) for step in range(1, 200)]
    assert rates == [1.0] * 80 + [0.5] * 10 + [0.25] * 10 + [0.125] * 10 + [0.0625] * 89


@pytest.mark.parametrize("end", [50, 51, 100])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_after_a_warm_up_beyond_the_end_the_rate_is_0(schedule, end):
    options = TrainOptions(learning_rate=1.0, schedule=schedule, warmup=100, decay_steps=end)
    rates = [learning_rate(step, options) for step in (50, 100, 101, 200)]
    assert rates == pytest.approx([0.5, 1, 0, 0])


def test_a_schedule_ends_at_the_last_step_if_nothing_else_is_said():
    given = {"out": "o", "schedule": "linear", "max_steps": 70}
    assert train._train_options(given, None, World()).decay_steps == 70
    given = {"out": "o", "schedule": "linear", "decay_steps": 70, "minutes": 3.0}
    assert train._train_options(given, None, World()).max_steps == 70
    for wrong, message in (
        ({"schedule": "linear", "minutes": 3.0}, "give --decay-steps or --max-steps"),
        ({"decay_steps": 70}, "goes with --schedule linear, cosine, gnmt"),
        (
            {"schedule": "cosine", "decay_steps": 70, "max_steps": 71},
            "--max-steps 71 is beyond step 70, where --schedule cosine ends",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            train._train_options({"out": "o", **wrong}, None, World())


# -- the steps --------------------------------------------------------------------------------


def steps(model, vocabulary, examples, folder, count=3, **options):
    """Losses and parameters of a few steps over the same batch."""
    options = TrainOptions(batch_tokens=500, warmup=1, **options)
    trainer = Trainer(model, vocabulary, InMemory(examples), examples, options, folder, World(), {})
    update = trainer.batches.update(torch.arange(len(examples)).numpy())
    return [trainer.step(update)[0] for _ in range(count)], model.state_dict(), len(update.passes)


@pytest.fixture
def plainly(model, vocabulary, examples, tmp_path):
    """The model, untouched, and what becomes of it without any option."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each pass draws for itself
    model.encoder.rnn.dropout = 0.0
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    records, parameters, _ = steps(model, vocabulary, examples, tmp_path)
    parameters = {name: value.clone() for name, value in parameters.items()}
    model.load_state_dict(untouched)
    return model, records, parameters


@pytest.mark.parametrize(
    "options", [{"pass_tokens": 40}, {"recompute": True}], ids=["passes", "recompute"]
)
def test_what_saves_memory_changes_no_step(plainly, vocabulary, examples, tmp_path, options):
    model, records, parameters = plainly
    others, theirs, passes = steps(model, vocabulary, examples, tmp_path, **options)
    assert (passes > 4) == ("pass_tokens" in options)
    for record, other in zip(records, others, strict=True):
        assert other["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert other["tokens"] == record["tokens"]
    for name, expected in parameters.items():
        torch.testing.assert_close(theirs[name], expected, rtol=1e-3, atol=1e-4)


def test_recomputing_draws_the_same_dropout(model, vocabulary, examples, tmp_path):
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    norms = []
    for recompute in (False, True):
        model.load_state_dict(untouched)
        records, *_ = steps(model, vocabulary, examples, tmp_path, recompute=recompute)
        norms.append([record["grad_norm"] for record in records])
    assert norms[0] == norms[1]


def test_recomputed_states_are_not_kept(model, vocabulary, examples, tmp_path):
    """Most of what a step keeps for backward is what encoder and decoder compute."""

    def kept(**options):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            steps(model, vocabulary, examples, tmp_path, count=1, **options)
        return size

    assert kept(recompute=True) < 0.5 * kept()


def test_lamb_learns_and_goes_on_exactly(tsv, tmp_path):
    options = ["--optimizer", "lamb", "--lr", "0.05", "--decoder", "rnnsearch"]
    run(tsv, tmp_path / "whole", *options, "--max-steps", "20")
    whole = losses(tmp_path / "whole")
    assert sum(whole[-5:]) < 0.9 * sum(whole[:5])
    run(tsv, tmp_path / "parts", *options, "--max-steps", "9")
    train.main(
        ["--out", str(tmp_path / "parts"), "--resume", "--max-steps", "20", "--device", "cpu"]
    )
    assert losses(tmp_path / "parts") == whole


def test_an_overflow_in_float16_skips_the_step(model, vocabulary, examples, tmp_path, monkeypatch):
    """The scale is halved, no parameter changes, and the next step is taken."""
    options = TrainOptions(batch_tokens=500, warmup=1, fp16=True)
    trainer = Trainer(
        model, vocabulary, InMemory(examples), examples, options, tmp_path, World(), {}
    )
    # Only the scaling is looked at: not every CPU computes in float16.
    monkeypatch.setattr("attn_ext.nmt.training._autocast", lambda *_: torch.enable_grad())
    update = trainer.batches.update(torch.arange(20).numpy())
    scale = trainer.scaler.get_scale()
    parameter = model.output_bias
    overflow = parameter.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in trainer.averaged.state_dict().items()}
    record, *_ = trainer.step(update)
    assert record["skipped"] == 1 and record["loss_scale"] == scale / 2
    assert "grad_norm" not in record
    for name, value in trainer.averaged.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(parameter, before["module.output_bias"])
    overflow.remove()
    record, *_ = trainer.step(update)
    assert record["skipped"] == 1 and math.isfinite(record["grad_norm"])
    assert not torch.equal(parameter, before["module.output_bias"])
    # The norm on record and what is clipped are those of the gradient, not of the scaled one.
    plain = dataclasses.replace(options, fp16=False)
    alone = Trainer(model, vocabulary, InMemory(examples), examples, plain, tmp_path, World(), {})
    torch.manual_seed(0)
    assert record["grad_norm"] == pytest.approx(alone.step(update)[0]["grad_norm"], rel=0.5)


def test_compiled_steps(tsv, tmp_path, monkeypatch):
    # What compilers make of the graph takes them a minute, and is test_compiled's.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = ["--decoder", "gnmt", "--dropout", "0", "--max-steps", "3"]
    run(tsv, tmp_path / "eager", *options)
    run(tsv, tmp_path / "compiled", *options, "--compile")
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert compiled == pytest.approx(eager, rel=1e-4) and len(eager) == 3
    checkpoint.load_model(tmp_path / "compiled")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
        (["--parallel", "fsdp", "--fp16"], "--parallel fsdp computes in float32 or bfloat16"),
        (["--parallel", "fsdp", "--compile", "--decoder", "gnmt"], "does not go with --compile"),
        (["--parallel", "fsdp", "--optimizer", "lamb"], "does not go with --optimizer lamb"),
        (["--compile", "--decoder", "rnnsearch"], "--compile is for --decoder gnmt"),
    ],
)
def test_what_does_not_go_together(tsv, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(train, "bf16_problem", lambda *_: None)
    with pytest.raises(UsageError, match=message):
        run(tsv, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


# -- files ------------------------------------------------------------------------------------


def test_a_config_file_repeats_a_run(tsv, tmp_path):
    options = ["--decoder", "rnnsearch", "--lr", "0.02", "--schedule", "cosine", "--no-buckets"]
    run(tsv, tmp_path / "first", *options, "--max-steps", "6")
    config = tmp_path / "first" / "config.yaml"
    train.main(["--config", str(config), "--out", str(tmp_path / "again")])
    assert losses(tmp_path / "again") == losses(tmp_path / "first")
    saved = [
        yaml.safe_load((tmp_path / name / "config.yaml").open()) for name in ("first", "again")
    ]
    assert (
        saved[0] == saved[1] and saved[0]["schedule"] == "cosine" and saved[0]["vocab_size"] == 320
    )
    given = parse_arguments(["--config", str(config), "--out", "o", "--max-steps", "9"])
    assert train._train_options(given, None, World()).decay_steps == 9  # again the last step


def test_the_command_line_goes_before_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "hidden: 512\nlearning-rate: 1e-3\ncorpus: libreoffice\nbf16: true\nfp16: false\n"
    )
    given = parse_arguments(
        ["--config", str(path), "--out", "o", "--hidden", "64", "--data", "x.tsv", "--fp16"]
    )
    expected = {"hidden": 64, "learning_rate": 1e-3, "data": "x.tsv", "fp16": True}
    assert given == expected | {"out": "o", "config": str(path)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hiden: 3", "hiden is no option of a training"),
        ("resume: true", "resume is no option of a training"),
        ("hidden: [3, 4]", r"hidden: expected one value, got \[3, 4\]"),
        ("bf16: 3", "bf16: expected true or false, got 3"),
        ("hidden: -3", "--hidden: expected a positive whole number, got '-3'"),
        ("hidden", "expected lines such as `hidden: 512`, got 'hidden'"),
        ("hidden: {", "is not YAML: "),
    ],
)
def test_a_config_file_that_is_wrong(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        parse_arguments(["--config", str(path), "--out", "o"])
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_tensorboard_and_the_last_models(tsv, tmp_path, monkeypatch):
    """Events as in the metrics, of an interrupted run too; and the models of two evaluations."""
    more = ["--tensorboard", "--keep", "2", "--eval-every", "3", "--checkpoint-every", "4"]
    step = Trainer.step

    def fail_after_seven(trainer, *arguments):
        if trainer.progress.step == 7:
            raise UsageError("stopped")
        return step(trainer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="stopped"):
        patch.setattr(Trainer, "step", fail_after_seven)
        run(tsv, tmp_path, *more, "--max-steps", "12", "--decoder", "rnnsearch")
    train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    for tag, name in (
        ("train/loss", "loss"),
        ("train/grad_norm", "grad_norm"),
        ("dev/bleu", "dev_bleu"),
    ):
        scalars = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = [(r["step"], pytest.approx(r[name])) for r in records if name in r]
        assert scalars == expected
    assert {path.name for path in tmp_path.glob("model-*.pt")} == {"model-9.pt", "model-12.pt"}
    model, _ = checkpoint.load_model(tmp_path / "model-9.pt")
    assert model.config.decoder == "rnnsearch"
