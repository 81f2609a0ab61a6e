"""Runs of the command lines in processes of their own, to be killed, starved and interrupted.

Importing torch takes seconds and forking a process that has it none, so one process that has done
nothing but import forks a child for each run: `Nursery.run`.
"""

import ctypes
import faulthandler
import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

TIMEOUT = 300  # seconds; runs take a few, and ten times that under a sanitizer


class Done(NamedTuple):
    status: int  # of the exit; of a signal, its number below 0
    output: str  # standard output
    error: str  # standard error


class Nursery:
    """A process to fork from, on a folder that takes what the children say."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("output", "error"):
            (folder / name).touch()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the tests: sums have the same order
        )  # fmt: skip

    def run(self, tool, *arguments, timeout=TIMEOUT, **faults):
        """`python -m attn_ext.nmt.TOOL ARGUMENTS`, or another of the tools that `serve` names.

        Args:
            timeout: whole seconds after which the test fails, with what the run has said by then.
            faults: functions below and their keywords.
        """
        call = {"tool": tool, "arguments": list(map(str, arguments)), "faults": faults}
        self._process.stdin.write(json.dumps(call | {"timeout": timeout}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        output, error = ((self.folder / name).read_text() for name in ("output", "error"))
        if not answer.strip().lstrip("-").isdigit():
            pytest.fail(
                f"{tool} {call['arguments']}, {faults}: {answer.strip() or 'the nursery died'}\n"
                f"-- its output:\n{output}\n-- its errors, and where it was:\n{error}",
                pytrace=False,
            )
        return Done(int(answer), output, error)

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)


# -- faults: what a child does to itself before it runs ---------------------------------------


CALLS = ("start", "training", "writing")


def counting(after):
    """A function of a profiler's frame and event: whether they count.

    Returns do not: an interrupt that comes while a profiler sees one passes the frame's `except`.

    Args:
        after: "start", where all calls do; "training", from the first step on; or "writing", where
            only those do that make a file whole.
    """
    from attn_ext.nmt import cli, training

    writers = {cli.atomic_write.__code__, cli.atomic_file.__wrapped__.__code__}
    loop = training.Trainer.run.__code__
    begun = after != "training"

    def counts(frame, event):
        nonlocal begun
        begun = begun or frame.f_code is loop
        return begun and event != "return" and (after != "writing" or frame.f_code in writers)

    return counts


def at_call(number, after="start", with_signal=signal.SIGKILL):
    """A signal to this process at a call: the number-th from or to Python code.

    Args:
        number: from 1; before a call and after it are two, if the function is written in C.
        after: which calls count, see `counting`.
        with_signal: SIGKILL or SIGINT.
    """
    counts, left = counting(after), number

    def count(frame, event, _):
        nonlocal left
        if counts(frame, event):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), with_signal)

    sys.setprofile(count)


def count_calls(path, checkpoints):
    """Write the numbers of CALLS until so many checkpoints have been written, as JSON."""
    from attn_ext.nmt import training

    kinds = {after: counting(after) for after in CALLS}
    numbers = dict.fromkeys(CALLS, 0)
    save = training.Trainer.save_checkpoint.__code__

    def count(frame, event, _):
        nonlocal checkpoints
        for after, counts in kinds.items():
            numbers[after] += counts(frame, event)
        if frame.f_code is save and event == "return":
            checkpoints -= 1
            if checkpoints == 0:
                sys.setprofile(None)
                Path(path).write_text(json.dumps(numbers))

    sys.setprofile(count)


def file_limit(size, deadly=False):
    """No file may grow over `size` bytes: a write ends in the middle, and this process may too."""
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_privileges():
    """Root may write everywhere; without its capabilities it is a user as any."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError("capset")


def standard_output(path):
    os.dup2(os.open(path, os.O_WRONLY), 1)


def environment(**variables):
    os.environ.update(variables)


def at_step(number, with_signal=signal.SIGKILL):
    """A signal to this process as it begins a step."""
    from attn_ext.nmt import training

    step = training.Trainer.step

    def signalled(trainer, *arguments, **keywords):
        if trainer.progress.step + 1 == number:
            os.kill(os.getpid(), with_signal)
        return step(trainer, *arguments, **keywords)

    training.Trainer.step = signalled


def at_record(number, with_signal=signal.SIGKILL):
    """A signal to this process before it writes down that a part of `prepare` is done."""
    from attn_ext.nmt import prepare

    append, left = prepare.Journal.append, number

    def signalled(journal, **record):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), with_signal)
        append(journal, **record)

    prepare.Journal.append = signalled


def constant(module, name, value):
    setattr(importlib.import_module(f"attn_ext.nmt.{module}"), name, value)


def hang():
    print("before it hangs", flush=True)
    while True:
        time.sleep(1)


def die_while_fetching():
    """pip brings half a file, and this process is killed."""
    from attn_ext.nmt import corpora

    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        (folder / corpora.HOMEASSISTANT_WHEEL).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    corpora.subprocess.run = download


# -- the process ------------------------------------------------------------------------------


def few_pictures(set_attribute):
    """Draw one at the end of a training: test_offline has all of them drawn."""
    from attn_ext.nmt import evaluation

    set_attribute(evaluation, "PICTURES", 1)


def run_several(arguments):
    """torchrun, whose own processes begin anew."""
    from torch.distributed import run

    run.main(arguments)


def serve(folder):
    import matplotlib.figure  # noqa: F401
    import sacrebleu  # noqa: F401
    import sentencepiece  # noqa: F401
    import tqdm  # noqa: F401

    from attn_ext.nmt import cli, plot, prepare, train, translate

    mains = {"train": train.main, "translate": translate.main, "plot": plot.main}
    mains["prepare"] = prepare.main
    mains["write"] = lambda arguments: cli.atomic_write(*arguments)  # path, text
    mains["torchrun"] = run_several
    few_pictures(setattr)
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "output"), (2, "error")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            # As a person starts it, even where a shell had the tests in its background, whose
            # programs ignore Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            faulthandler.register(signal.SIGQUIT, chain=True)  # says where it was, and ends it
            main = functools.partial(mains[call["tool"]], call["arguments"])
            os._exit(status_of(functools.partial(cli.run, main), call["faults"]))
        print(wait_for(child, call["timeout"]), flush=True)
    os._exit(0)  # without taking torch down, which takes seconds


def wait_for(child, timeout):
    """The exit status of a child, or that it was ended after so many seconds."""
    overdue = []

    def end(*_):
        overdue.append(f"still ran after {timeout} s")
        # A second alarm is for one that does not even quit.
        os.kill(child, signal.SIGKILL if len(overdue) > 1 else signal.SIGQUIT)
        signal.alarm(5)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(timeout)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(0)
    return overdue[0] if overdue else status


def status_of(run, faults):
    """What the interpreter would exit with, but for its taking everything down first."""
    try:
        for name, keywords in faults.items():
            globals()[name](**keywords)
        run()
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.setprofile(None)
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
