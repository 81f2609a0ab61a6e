"""What a process does to itself while it attends: fork, spawn, get interrupted, exit.

Argument: the name of a scenario below. Exits with 0 if every result was the one a lone thread has.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import attn_ext

THREADS = 4
Results = tuple[Tensor, ...]


def compute(seed: int) -> Results:
    """Contexts and gradients of a call and of a decoder loop, enough work for several threads."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    query, key, value, score_weight = leaf(4, 16, 64), leaf(4, 40, 64), leaf(4, 40, 32), leaf(64)
    ahead = attn_ext.additive_attention(query, key, value, score_weight)
    memory = attn_ext.AttentionMemory(key, value, score_weight)
    steps = torch.stack([memory.attend(step) for step in query[:, :4].unbind(1)])
    loss = ahead.square().sum() + steps.square().sum()
    gradients = torch.autograd.grad(loss, (query, key, value, score_weight))
    return ahead.detach(), steps.detach(), *gradients


def is_right(seed: int, results: Results) -> bool:
    """Compare with what one thread computes, as it did before anything else happened."""
    return all(map(torch.equal, results, EXPECTED[seed]))


def wait_for(child: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed"


def fork() -> None:
    """Children of a process whose threads wait for work have none of these threads."""
    assert is_right(0, compute(0))
    for _ in range(2):
        child = os.fork()
        if child == 0:
            signal.alarm(120)  # ends it where it hangs
            os._exit(0 if is_right(1, compute(1)) and is_right(0, compute(0)) else 1)
        wait_for(child)
        assert is_right(1, compute(1))


class Computed(Dataset):
    def __len__(self) -> int:
        return len(EXPECTED)

    def __getitem__(self, seed: int) -> Results:
        return tuple(result.detach() for result in compute(seed))


def forked_loader() -> None:
    assert is_right(0, compute(0))
    loader = DataLoader(Computed(), None, num_workers=2, multiprocessing_context="fork")
    for seed, results in enumerate(loader):
        assert is_right(seed, results)


def computed_as_bytes(seed: int) -> list[bytes]:
    return [result.numpy().tobytes() for result in compute(seed)]


def spawn() -> None:
    assert is_right(0, compute(0))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for seed, results in enumerate(pool.map(computed_as_bytes, EXPECTED)):
            assert results == [result.numpy().tobytes() for result in EXPECTED[seed]]


def interrupts() -> None:
    """Ctrl-C at any moment ends the call, and the next one is right."""
    draw = random.Random(0)
    for _ in range(20):
        caught = threading.Event()

        def press(caught: threading.Event = caught) -> None:
            # Again where Python dropped it, in a destructor.
            while not caught.wait(draw.uniform(0.01, 0.1)):
                os.kill(os.getpid(), signal.SIGINT)

        keyboard = threading.Thread(target=press)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            keyboard.start()
            while True:
                compute(0)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        caught.set()
        keyboard.join()
        assert is_right(1, compute(1))


def exit_with_threads_at_work() -> None:
    """The interpreter waits for threads that are not daemons."""

    def attend() -> None:
        threading.main_thread().join()
        print("right" if all(is_right(seed, compute(seed)) for seed in EXPECTED) else "wrong")

    threading.Thread(target=attend).start()


def exit_during_a_long_call() -> None:
    """The interpreter ends, and then the process, while a call runs on several threads."""
    rows = torch.randn(12_000, 1024)
    begins = threading.Event()

    def attend() -> None:
        begins.set()
        attn_ext.additive_attention(rows[None], rows[None], rows[None], rows[0])

    threading.Thread(target=attend, daemon=True).start()
    begins.wait()
    time.sleep(0.2)  # the call takes many times as long


def exit_between_many_calls() -> None:
    """The interpreter ends while threads that it does not wait for are anywhere in their calls."""
    begun = threading.Barrier(1 + len(EXPECTED))

    def forever(seed: int) -> None:
        compute(seed)
        begun.wait()
        while True:
            compute(seed)

    for seed in EXPECTED:
        threading.Thread(target=forever, args=(seed,), daemon=True).start()
    begun.wait()


SCENARIOS: dict[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        *(fork, forked_loader, spawn, interrupts),
        *(exit_with_threads_at_work, exit_during_a_long_call, exit_between_many_calls),
    )
}
torch.set_num_threads(1)
EXPECTED = {seed: compute(seed) for seed in range(2)}
torch.set_num_threads(THREADS)

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
