"""What the command lines share: one clear line for the user's mistakes, atomic files."""

import argparse
import contextlib
import errno
import importlib
import io
import math
import os
import secrets
import sys
from pathlib import Path

import torch

import attn_ext

BACKEND_HELP = "backend of attn_ext: cpu, reference, ... (default: the best available)"
BACKENDS = ("triton", "cuda", "cpu", "reference")  # as the default tries them
DEVICE_HELP = "where to compute (default: a GPU where there is one)"


class UsageError(ValueError):
    """A mistake of the user or the machine that one line explains; never a bug of ours."""


def require(module):
    """Import an optional dependency or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(
            f"the package {package!r} is needed for this and cannot be imported ({error}); "
            "install it with: pip install 'attn_ext[nmt]'"
        ) from None


def _ranged(convert, accepts, expected):
    """A type for argparse, whose message says what is expected instead of a function's name."""

    def parse(text):
        try:
            value = convert(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive_int = _ranged(int, lambda n: 1 <= n < 2**63, "a positive whole number")
natural_int = _ranged(int, lambda n: 0 <= n < 2**63, "a whole number, 0 or more")
positive_number = _ranged(float, lambda x: 0 < x < math.inf, "a positive number")
fraction = _ranged(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
exponent = _ranged(float, lambda x: 0 <= x <= 10, "a number from 0 to 10")


def check_backend(backend, device):
    """The name of the backend that will run; one clear line if the one asked for cannot."""
    query = torch.zeros(1, 1, device=device)
    for name in [backend] if backend else BACKENDS:
        try:
            attn_ext.additive_attention(query, query[None], query[None], query[0], backend=name)
            return name
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
    raise UsageError(f"--backend: {reason}")


def wait_without_spinning():
    """Start this program again with threads that sleep while they wait, unless told otherwise.

    An LSTM is thousands of short parallel regions. OpenMP's threads spin between them, which on
    cores shared with other programs was seen to cost a factor of 10; the policy is read once, when
    torch is loaded, so it has to be in the environment of a new start.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"}
    if chosen & os.environ.keys() or torch.get_num_threads() == 1:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # orig_argv[0] is what the shell was told, which need not lead to this interpreter.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(main):
    """Call `main()`; what is not our bug becomes `error: ...` and status 2, Ctrl-C status 130.

    What it writes is UTF-8 whatever the locale is.
    """
    _prepare_streams()
    try:
        try:
            status = main()
        except SystemExit as ended:  # argparse has said what there is to say
            status = ended.code
        sys.stdout.flush()  # a closed pipe must show here, not in the interpreter's exit
    except UsageError as error:
        status = _fail(str(error), 2)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130, "")
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        status = 141
    except OSError as error:
        # Of our files `writing` has told: a full disk without a name is under our output.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        place = error.filename or ("standard output" if full else None)
        reason = error.strerror or str(error)
        status = _fail(reason if place is None else f"{place}: {reason}", 2)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what is left in the buffer must not fail again when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _fail(message, status, kind="error: "):
    """Say one line, if anybody can read it, and return the status."""
    line = "\\n".join(f"{kind}{message}".splitlines())
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
    return status


def _prepare_streams():
    """Write UTF-8; where nobody opened standard output or error, write nowhere."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file opened would be it, and get what libraries print
            os.open(os.devnull, os.O_RDWR)
    for name, errors in (("stdout", "surrogateescape"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            # Names of files that are no UTF-8 are written as they are.
            stream.reconfigure(encoding="utf-8", errors=errors)


def utf8_argument(name, text):
    """A text of the command line, which is UTF-8 whatever the locale is; None stays None."""
    if text is None:
        return None
    try:
        content = os.fsencode(text)
    except UnicodeEncodeError:  # not from the command line: the locale could not have made it
        return text
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {content[error.start]:#04x} at {error.start + 1}"
        raise UsageError(f"{name}: not UTF-8 ({byte}); convert it first, e.g. with iconv") from None


@contextlib.contextmanager
def writing(path):
    """A failed write in the block becomes one clear line that names `path`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_file(path):
    """Yield a binary file that becomes `path` when the block ends, whole or not at all.

    What has been written can be read again. A link is followed; what is there and is no regular
    file (a pipe, a device) is refused.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"cannot write {path}: it is not a regular file")
    path = Path(os.path.realpath(path))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # Named before it is there, so that an interrupt at any moment leaves nothing behind.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(unfinished, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        if isinstance(error, OSError):
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
        raise
    with writing(path):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself survives a power cut
        finally:
            os.close(directory)


def atomic_write(path, content):
    """Write bytes or text to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
