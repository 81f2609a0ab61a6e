"""Tasks for worker processes that end with the process that started them, however that ends."""

import collections
import ctypes
import itertools
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from attn_ext.nmt.cli import UsageError

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def in_order(function, tasks, workers):
    """`function(*task)` of each task, in their order; with one worker by this process itself.

    Of the tasks, which may be large, only one more than the workers is there at a time.
    """
    if workers == 1:
        yield from itertools.starmap(function, tasks)
        return
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _begin_worker, (os.getpid(),)
    )
    waiting = collections.deque()
    try:
        for task in tasks:
            waiting.append(executor.submit(function, *task))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UsageError(
            "a worker process was ended from outside, for want of memory perhaps; the same "
            "command, without --overwrite, goes on from here, with fewer --workers if need be"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin_worker(parent):
    """Ctrl-C is for the parent, and when it is gone, however that was, so are its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before
        os._exit(1)
