"""bfloat16 where a device has it; where it has none, one line, and float32 by default."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from toy_data import TINY_RUN

from attn_ext.nmt import checkpoint, cli, corpora, data, train, translate
from attn_ext.nmt.distributed import World
from attn_ext.nmt.model import DECODERS, ENCODER_CELLS, ModelConfig, Seq2Seq
from attn_ext.nmt.precision import bf16_problem

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KINDS = [(decoder, cell) for decoder in sorted(DECODERS) for cell in sorted(ENCODER_CELLS)]
LACKING = "this device has no such numbers"


@pytest.fixture
def no_bf16(monkeypatch):
    """A machine that has no bfloat16, whatever this one has."""
    monkeypatch.setattr(train, "bf16_problem", lambda config, device, backend: LACKING)


@pytest.fixture
def no_data(monkeypatch):
    """Reading or fetching any is an error of another kind than the user's."""

    def read(*_):
        raise AssertionError("data were read")

    monkeypatch.setattr(corpora, "read_tsv", read)
    monkeypatch.setattr(corpora, "load", read)


def refusal(capsys, *arguments):
    """The one line by which a training is refused."""
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: train.main(list(map(str, arguments))))
    printed = capsys.readouterr()
    assert error.value.code == 2 and not printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(("decoder", "cell"), KINDS)
def test_the_answer_is_what_training_finds(decoder, cell):
    """In batches of sentences as long as each other, alone, and of other lengths."""
    config = ModelConfig(20, decoder, 12, 10, cell, encoder_layers=2, decoder_layers=2)
    model = Seq2Seq(config)
    fails = False
    for lengths in ([5], [4, 4, 4], [6, 2]):
        examples = [([3] * length, [4] * length) for length in lengths]
        batch = data.make_batch(examples, SimpleNamespace(bos=1, eos=2))
        try:
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = model(batch)
            loss.backward()
        except RuntimeError:
            fails = True
    problem = bf16_problem(config, CPU)
    assert (problem is not None) == fails
    if problem:
        assert f"decoder {decoder} with encoder cell {cell} in bfloat16 on this CPU" in problem
        assert "\n" not in problem


def test_asking_draws_no_random_number():
    before = torch.get_rng_state()
    bf16_problem(ModelConfig(20), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gpu_that_only_emulates_it_has_none(monkeypatch):
    def supported(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert bf16_problem(ModelConfig(20), GPU) == "this GPU has no bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert bf16_problem(ModelConfig(20), GPU) is None


@pytest.mark.parametrize(
    ("device", "problem", "expected"),
    [(GPU, None, True), (GPU, LACKING, False), (CPU, None, False)],
)
def test_default_is_to_use_it_on_gpus_that_have_it(monkeypatch, device, problem, expected):
    monkeypatch.setattr(train, "bf16_problem", lambda *_: problem)
    options = train._train_options({"out": "o"}, None, World(device=device))
    assert options.bf16 is expected


@pytest.mark.parametrize("there", [[], ["--overwrite"]], ids=["new", "overwrite"])
def test_asked_for_in_vain(no_bf16, no_data, tmp_path, capsys, there):
    """Before data are read and a folder is made, or anything in it is touched."""
    out = tmp_path / "some" / "out"
    if there:
        out.mkdir(parents=True)
        (out / ".model.pt.ab.tmp").touch()
    before = sorted(tmp_path.rglob("*"))
    line = refusal(capsys, "--out", out, "--device", "cpu", "--bf16", *there)
    assert line == f"error: --bf16: {LACKING}; leave --bf16 out to train in float32\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_this_machine_is_asked(no_data, tmp_path, capsys):
    """On the command line, for the kind of model that is to be trained."""
    for decoder, cell in KINDS:
        problem = bf16_problem(ModelConfig(20, decoder, encoder_cell=cell), CPU)
        arguments = ["--out", tmp_path / "out", "--device", "cpu", "--bf16"]
        arguments += ["--decoder", decoder, "--encoder-cell", cell]
        if problem:
            assert refusal(capsys, *arguments).startswith(f"error: --bf16: {problem}; ")
        else:
            with pytest.raises(AssertionError, match="data were read"):
                train.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def trained(tsv, tmp_path_factory):
    """A run in bfloat16, of the kind of model for which CPUs need no instructions of their own."""
    kind = ["--decoder", "rnnsearch", "--encoder-cell", "gru"]
    if problem := bf16_problem(ModelConfig(20, "rnnsearch", encoder_cell="gru"), CPU):
        pytest.skip(problem)
    out = tmp_path_factory.mktemp("run") / "out"
    options = [*TINY_RUN, *kind, "--bf16", "--max-steps", "2"]
    assert train.main(["--data", str(tsv), "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize("more", [[], ["--bf16"], ["--no-bf16"]], ids=["as-it-was", "yes", "no"])
def test_a_run_begun_elsewhere_is_not_resumed(no_bf16, no_data, trained, capsys, more):
    """Not in float32 either, which would be another run."""
    before = {path: path.read_bytes() for path in trained.iterdir()}
    line = refusal(capsys, "--out", trained, "--resume", "--device", "cpu", *more)
    begun = f"error: the run in {trained} was begun in bfloat16, and {LACKING}; "
    assert line.startswith(begun) and "--overwrite or another --out" in line
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


def test_a_run_begun_in_float16_elsewhere_is_not_resumed(no_data, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fp16_problem", lambda *_: LACKING)
    content = checkpoint.load(trained / "checkpoint.pt", "checkpoint")
    content["options"] |= {"bf16": False, "fp16": True}
    checkpoint.save(tmp_path / "checkpoint.pt", "checkpoint", content)
    with pytest.raises(cli.UsageError, match=f"was begun in float16, and {LACKING}; "):
        train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])


def test_a_run_begun_in_float32_is_resumed(no_bf16, no_data, trained, tmp_path):
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = checkpoint.load(tmp_path / "checkpoint.pt", "checkpoint")
    content["options"]["bf16"] = False
    checkpoint.save(tmp_path / "checkpoint.pt", "checkpoint", content)
    with pytest.raises(AssertionError, match="data were read"):
        train.main(["--out", str(tmp_path), "--resume", "--device", "cpu"])


def test_its_model_translates_everywhere(no_bf16, trained, monkeypatch, capfdbinary):
    content = checkpoint.load(trained / "checkpoint.pt", "checkpoint")
    assert content["options"]["bf16"] is True
    assert {value.dtype for value in content["model"].values()} == {torch.float32}
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("rot grün\n".encode())))
    translate.main(["--model", str(trained), "--device", "cpu"])
    assert capfdbinary.readouterr().out.endswith(b"\n")
