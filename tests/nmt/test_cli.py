"""The command lines: what a person sees."""

import contextlib
import errno
import importlib
import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from toy_data import TINY_RUN, synthetic_pairs

from attn_ext.nmt import (
    align,
    average,
    checkpoint,
    cli,
    commands,
    evaluation,
    export,
    plot,
    score,
    train,
    translate,
)


@pytest.fixture(scope="module")
def training(tsv, tmp_path_factory):
    """The folder of a run, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train.main(["--data", str(tsv), "--out", str(out), *TINY_RUN, "--max-steps", "3"])
    return out, output.getvalue()


@pytest.fixture
def trained(training):
    return training[0]


def status(main, arguments):
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: main(arguments))
    return error.value.code


class Input:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_end_of_training_shows_the_result(training):
    out, output = training
    for text in ("BLEU", "chrF", "untrained", "source copied", "reference ", "attention-1.png"):
        assert text in output
    assert f"python -m attn_ext.nmt.translate --model {out} < in.txt > out.txt" in output


@pytest.mark.parametrize("beam", ["1", "3"])
def test_translate(trained, beam, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdin", Input("rot grün\n\n  haus \n".encode()))
    assert status(translate.main, ["--model", str(trained), "--beam", beam]) in (None, 0)
    lines = capfdbinary.readouterr().out.split(b"\n")
    assert len(lines) == 4 and lines[1] == b"" and lines[3] == b""


def test_n_best_lists(trained, tmp_path, monkeypatch, capfd):
    """In Moses' format, and the speed on standard error."""
    model, vocabulary = checkpoint.load_model(trained)
    with torch.no_grad():
        model.output_bias[vocabulary.eos] += 5  # after three steps of training few sentences end
    checkpoint.save_model(tmp_path / "x.pt", model, vocabulary)
    monkeypatch.setattr(sys, "stdin", Input("rot\n\nhaus tür\n".encode()))
    arguments = ["--model", str(tmp_path / "x.pt"), "--beam", "3", "--n-best", "2"]
    assert status(translate.main, arguments) in (None, 0)
    output, error = capfd.readouterr()
    lines = [line.split(" ||| ") for line in output.splitlines()]
    assert [number for number, _, _ in lines] == ["0", "0", "1", "2", "2"]
    assert lines[2] == ["1", "", "0.000000"]
    assert 0 > float(lines[0][2]) > float(lines[1][2]) and 0 > float(lines[3][2])
    assert re.fullmatch(r"3 sentences in .* s: .* sentences/s, \d+ target tokens/s\n", error)


@pytest.mark.parametrize(
    ("main", "pattern"), [(score.main, r"-\d+\.\d{6}"), (align.main, r"(\d+-\d+( |$))*")]
)
def test_score_and_align(main, pattern, trained, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", Input("rot grün\trot blau aus\n\trot\nhaus\t\r\n".encode()))
    assert status(main, ["--model", str(trained)]) in (None, 0)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and all(re.fullmatch(pattern, line) for line in lines)
    if main is align.main:
        assert lines[0].count("-") == 3 and lines[1:] == ["", ""]


@pytest.mark.parametrize("main", [score.main, align.main])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"rot", "expected source<TAB>target, got 1 field(s)"),
        (b"rot\tblau\taus", "expected source<TAB>target, got 3 field(s)"),
        (b"rot\t\xfcber", "not UTF-8 (byte 0xfc)"),
    ],
)
def test_lines_that_are_no_pairs(main, line, message, trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Input(b"rot\trot\n" + line + b"\n"))
    assert status(main, ["--model", str(trained)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: standard input, line 2: {message}") and error.count("\n") == 1


def test_translate_wrong_encoding(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Input(b"rot\n\xfcber\n"))
    assert status(translate.main, ["--model", str(trained)]) == 2
    assert capsys.readouterr().err.startswith("error: standard input, line 2: not UTF-8")


@pytest.mark.parametrize("target", [[], ["--target", "grün $rot$"]], ids=["search", "given"])
def test_plot(trained, tmp_path, target):
    path = tmp_path / "new folder" / "x.png"
    source = synthetic_pairs(1)[0][0]
    plot.main(["--model", str(trained), "--source", source, *target, "--out", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train.main, ["--data", "none.tsv", "--out", "o"], "cannot read none.tsv: No such file"),
        (train.main, ["--data", ".", "--out", "o"], "holds no index.json: not a folder of"),
        (train.main, ["--out", "o", "--resume", "--overwrite"], "exclude each other"),
        (train.main, ["--out", "o", "--backend", "gpu"], "--backend: "),
        (translate.main, ["--model", "none"], "there is no none/model.pt"),
        (translate.main, ["--model", "none", "--n-best", "6"], "--n-best 6 is more than --beam 5"),
        (score.main, ["--model", "none"], "there is no none/model.pt"),
        (average.main, ["--out", "x", "one"], "expected two models at least to average, got 1"),
        (export.main, ["--model", "none", "--out", "x"], "there is no none/model.pt"),
        (train.main, ["--out", " "], "--out is empty"),
        (train.main, ["--out", "x" * 300], "File name too long"),
        (plot.main, ["--model", "none", "--source", "x", "--out", "x.png"], "there is no none/"),
        (plot.main, ["--model", "none", "--source", " ", "--out", "x.png"], "--source is empty"),
    ],
)
def test_mistakes_get_one_line(main, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--out", "o", "--hidden", "0"],
        ["--out", "o", "--seed", "-1"],
        ["--out", "o", "--dropout", "1"],
        ["--out", "o", "--lr", "-1"],
        ["--out", "o", "--decoder", "transformer"],
        ["--out", "o", "--corpus", "homeassistant", "--data", "x.tsv"],
    ],
)
def test_bad_options(arguments, capsys):
    assert status(train.main, arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train.main, ["--hidden", "x"], "expected a positive whole number, got 'x'"),
        (train.main, ["--minutes", "nan"], "expected a positive number, got 'nan'"),
        (train.main, ["--minutes", "0"], "expected a positive number, got '0'"),
        (train.main, ["--seed", str(2**63)], "expected a whole number, 0 or more"),
        (translate.main, ["--alpha", "inf"], "expected a number from 0 to 10"),
        (translate.main, ["--batch", "9"], "unrecognized arguments: --batch 9"),
    ],
)
def test_numbers_out_of_range(main, arguments, message, capsys):
    place = ["--out", "o"] if main is train.main else ["--model", "m"]
    assert status(main, [*place, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_out_is_a_file(tsv, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cli.UsageError, match="is a file; a folder is wanted"):
        train.main(["--data", str(tsv), "--out", str(tmp_path / "file")])


def test_model_file_instead_of_folder(trained, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdin", Input(b"rot\n"))
    monkeypatch.setenv("WORLD_SIZE", "2")  # of no concern to a tool of one process
    assert status(translate.main, ["--model", str(trained / "model.pt")]) in (None, 0)
    assert capfdbinary.readouterr().out.endswith(b"\n")


class TestAtomicFile:
    def test_refuses_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(cli.UsageError, match="is not a regular file"):
            cli.atomic_write(tmp_path / "pipe", "text")
        assert (tmp_path / "pipe").is_fifo()

    def test_follows_a_link(self, tmp_path):
        (tmp_path / "to").mkdir()
        (tmp_path / "link").symlink_to("to/file")
        cli.atomic_write(tmp_path / "link", "text")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "to/file").read_text() == "text"

    def test_full_disk(self, tmp_path, monkeypatch):
        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        cli.atomic_write(tmp_path / "file", "before")
        monkeypatch.setattr(cli.os, "fsync", full)
        with pytest.raises(cli.UsageError, match="cannot write .*file: No space left on device"):
            checkpoint.save(tmp_path / "file", "model", {"x": torch.ones(9)})
        assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("package", ["sentencepiece", "sacrebleu", "tqdm", "matplotlib"])
def test_missing_package_names_the_extra(package, tmp_path, monkeypatch, capsys):
    def no_package(name):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return importlib.import_module(name)

    # Not in importlib itself: another package, imported here first, would keep it.
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=no_package))
    assert status(train.main, ["--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert package in error and "attn_ext[nmt]" in error and error.count("\n") == 1


@pytest.mark.parametrize("tool", [train, translate, score, align, plot, average, export])
def test_help(tool, capsys):
    assert status(tool.main, ["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {tool.__name__}")


def test_as_a_program():
    """What `python -m` does with a mistake, all the way out."""
    done = subprocess.run(
        [sys.executable, "-m", "attn_ext.nmt.translate", "--model", "none"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: there is no none/model.pt\n"


class TestWaitWithoutSpinning:
    @pytest.fixture
    def started(self, monkeypatch):
        """Command lines of new starts, on a machine of several cores."""
        started = []
        monkeypatch.setattr(cli.os, "execv", lambda path, words: started.append(words))
        monkeypatch.setattr(cli.torch, "get_num_threads", lambda: 4)
        monkeypatch.setattr(cli.os, "environ", {})
        return started

    def test_starts_again_with_the_policy(self, started):
        cli.wait_without_spinning()
        assert started == [[sys.executable, *sys.orig_argv[1:]]]
        assert cli.os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
        cli.wait_without_spinning()
        assert len(started) == 1

    @pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
    def test_leaves_a_choice_alone(self, started, name):
        cli.os.environ[name] = "2"
        cli.wait_without_spinning()
        assert not started


def test_a_byte_order_mark_is_no_part_of_the_first_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Input("\ufeffrot\n\ufeffhaus\n".encode()))
    assert list(commands.input_lines()) == ["rot\n", "\ufeffhaus\n"]


# ---- Streams that are not a terminal of UTF-8 ----


def terminal(encoding: str = "ascii") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def tool_arguments(tool, trained, tsv, tmp_path, source="grün"):
    return {
        train: ["--data", str(tsv), "--out", str(tmp_path / "o"), *TINY_RUN, "--max-steps", "1"],
        translate: ["--model", str(trained), "--beam", "1"],
        plot: ["--model", str(trained), "--source", source, "--target", "rötlich → rot"]
        + ["--out", str(tmp_path / "x.png")],
    }[tool]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
@pytest.mark.parametrize("tool", [train, translate, plot])
def test_output_is_utf8_in_any_locale(tool, encoding, trained, tsv, tmp_path, monkeypatch):
    if tool is train and encoding != "ascii":
        pytest.skip("trained once")
    streams = [terminal(encoding) for _ in "12"]
    monkeypatch.setattr(sys, "stdin", Input("rot grün\n".encode()))
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert status(tool.main, tool_arguments(tool, trained, tsv, tmp_path)) in (None, 0)
    text = streams[0].buffer.getvalue().decode()
    assert text.endswith("\n") and "Traceback" not in streams[1].buffer.getvalue().decode()
    if tool is plot:
        assert text == "rötlich → rot\n"


def test_names_that_are_no_utf8_are_written_as_they_are(monkeypatch):
    stream = terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    assert status(lambda _: print(os.fsdecode(b"gr\xfcn.png")), None) in (None, 0)
    assert stream.buffer.getvalue() == b"gr\xfcn.png\n"


@pytest.mark.parametrize("option", ["--source", "--target"])
def test_plot_of_another_encoding(option, trained, tmp_path, capsys):
    arguments = ["--source", "rot", "--target", "rot"]
    arguments[arguments.index(option) + 1] = os.fsdecode(b"gr\xfcn")
    out = tmp_path / "x.png"
    assert status(plot.main, ["--model", str(trained), *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: not UTF-8 (byte 0xfc at 3)")
    assert error.count("\n") == 1 and not out.exists()


def test_words_of_the_command_line_are_utf8_in_any_locale(monkeypatch):
    for locale in ("utf-8", "ascii", "latin-1"):
        word = "grün →".encode().decode(locale, "surrogateescape")
        monkeypatch.setattr(cli.os, "fsencode", lambda w, e=locale: w.encode(e, "surrogateescape"))
        assert cli.utf8_argument("--source", word) == "grün →"


class Broken:
    """A stream's buffer whose disk fails."""

    def __iter__(self):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))

    def isatty(self):
        return False


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"stdin": None}, "standard input is closed"),
        ({"stdin": SimpleNamespace(buffer=Broken())}, "cannot read standard input: Is a directory"),
        ({"stdout": None, "__stdout__": None}, "standard output is closed"),
    ],
    ids=["closed_in", "folder_in", "closed_out"],
)
def test_translate_without_streams(streams, message, trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Input(b"rot\n"))
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert status(translate.main, ["--model", str(trained)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("tool", [train, plot])
def test_a_closed_output_stops_nothing_else(tool, trained, tsv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert status(tool.main, tool_arguments(tool, trained, tsv, tmp_path)) in (None, 0)
    assert (tmp_path / "x.png").exists() or (tmp_path / "o" / "results.json").exists()


def full_disk():
    return open("/dev/full", "w")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(("output", "expected"), [(full_disk, 2), (closed_pipe, 141)])
@pytest.mark.parametrize("tool", [train, translate, plot, "help"])
def test_output_that_fails(tool, output, expected, trained, tsv, tmp_path, monkeypatch, capsys):
    """One line at most, and nothing that fails once more when the interpreter ends."""
    monkeypatch.setattr(sys, "stdin", Input(b"rot\n"))
    arguments = ["--help"]
    if tool != "help":
        arguments = tool_arguments(tool, trained, tsv, tmp_path)
    with output() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        main = translate.main if tool == "help" else tool.main
        assert status(main, arguments) == expected
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error
    assert lines == (["error: standard output: No space left on device"] if expected == 2 else [])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("output", [full_disk, closed_pipe])
def test_errors_that_nobody_can_read(output, monkeypatch):
    with output() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert status(translate.main, ["--model", "none"]) == 2


def test_errors_are_one_line(capsys):
    def fail(_):
        raise cli.UsageError("cannot read a\nb")

    assert status(fail, None) == 2
    assert capsys.readouterr().err == "error: cannot read a\\nb\n"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_from_the_start(closed):
    """As a shell closes them: Python then has no such streams at all."""
    command = f'"{sys.executable}" -m attn_ext.nmt.translate --model none {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    if "2>" not in closed:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_ascii_locale_as_a_program(trained, tmp_path):
    """All the way in and out, as bytes."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "attn_ext.nmt.plot", "--model", str(trained), "--source",
         "grün".encode(), "--target", "grün →".encode(), "--out", str(tmp_path / "x.png")],
        env={**os.environ, **locale}, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout.decode()) == (0, b"", "grün →\n")


def test_scores_are_those_that_the_signatures_name():
    """A short translation shares no four words with its reference: BLEU has to show it."""
    outputs, references = ["rotes haus"], ["rotes haus"]
    assert "eff:no" in evaluation.signatures()["bleu"]
    assert evaluation.bleu_chrf(outputs, references) == {"bleu": 0.0, "chrf": 100.0}
