"""Offsets, lengths and bounds that nobody checked, as those on a GPU: nothing outside is touched.

Results of such calls may be wrong. What is proven for them, here for a few hundred random
corruptions of forward and backward passes, of all steps at once, of one step and of a memory:

- Nothing outside the inputs is read: results do not depend on what the memory around them holds.
- Nothing outside results and workspaces is read or written: guard zones surround all that ops and
  launchers allocate through PyTorch, as they do the inputs (see guards.py).

The scratch memory of the C++ backend is its own: ``make sanitize`` guards that.
"""

import random
from collections.abc import Callable

import pytest
import torch
from guards import NAN_BYTES, OTHER_BYTES, GuardedMemory, Guards
from layouts import INPUT_NAMES
from torch import Tensor

import attn_ext
from attn_ext import AttentionMemory, checks, layout

# Where there is no GPU, nothing else shows that its kernels touch nothing outside their tensors.
pytestmark = [pytest.mark.every_isa, pytest.mark.few(interpreted=4, others=60)]

ROWS, BATCH = 12, 4
HIGHEST = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
CASES = range(120)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch):
    """Values of tensors on the CPU are read no more than those on a GPU."""
    for module in (checks, layout):
        monkeypatch.setattr(module, "can_read_values", lambda tensor: False)


def corrupt(numbers: random.Random, valid: list[int], highest: int) -> list[int]:
    """What may stand in place of valid offsets or lengths."""
    count = len(valid)
    kinds: list[Callable[[], list[int]]] = [
        lambda: [-number for number in valid],
        lambda: [number - numbers.randrange(40) for number in valid],
        lambda: valid[::-1],
        lambda: numbers.sample(valid, count),
        lambda: [numbers.randrange(ROWS + 1) for _ in valid],  # overlapping, decreasing
        lambda: [number * numbers.choice((3, 100, 10**6)) % highest for number in valid],
        lambda: [ROWS + numbers.randrange(-2, 50) for _ in valid],
        lambda: [numbers.choice((highest, -highest - 1, 0, ROWS)) for _ in valid],
        lambda: [numbers.randint(-highest - 1, highest) for _ in valid],
        lambda: [numbers.choice((number, highest - number, -number)) for number in valid],
    ]
    return numbers.choice(kinds)()


def corrupt_offsets(numbers: random.Random) -> Tensor:
    dtype = numbers.choice(list(HIGHEST))
    valid = sorted([0, ROWS, *(numbers.randrange(ROWS + 1) for _ in range(BATCH - 1))])
    return torch.tensor(corrupt(numbers, valid, HIGHEST[dtype]), dtype=dtype)


def corrupt_lengths(numbers: random.Random) -> Tensor:
    dtype = numbers.choice(list(HIGHEST))
    valid = [numbers.randrange(ROWS + 1) for _ in range(BATCH)]
    return torch.tensor(corrupt(numbers, valid, HIGHEST[dtype]), dtype=dtype)


def random_tensors(numbers: random.Random, places_q: tuple, places_k: tuple) -> dict[str, Tensor]:
    heads = numbers.choice(((), (2,)))
    dim, value_dim = numbers.choice((1, 16, 21)), numbers.choice((1, 8, 19))
    dtype = numbers.choice((torch.float32, torch.float32, torch.bfloat16))
    shapes = (
        (*places_q, *heads, dim),
        (*places_k, *heads, dim),
        (*places_k, *heads, value_dim),
        (*heads, dim),
    )
    wanted = [numbers.random() < 0.9 for _ in shapes]
    return {
        name: (torch.randn(shape) * 0.5).to(dtype).requires_grad_(needed)
        for name, shape, needed in zip(INPUT_NAMES, shapes, wanted)
    }


def check_inside(tensors: dict, keywords: dict, attend: Callable[..., list[Tensor]]) -> None:
    """``attend``, forward and backward, stays inside guarded copies of its arguments."""
    found = [run_amid(zone, tensors, keywords, attend) for zone in (NAN_BYTES, OTHER_BYTES)]
    if next(iter(tensors.values())).is_cuda:
        return  # programs that share rows by accident write them in any order
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), "read from a zone"


def run_amid(
    zone: int, tensors: dict, keywords: dict, attend: Callable[..., list[Tensor]]
) -> list[Tensor]:
    """Results and gradients amid guard zones, which must be whole afterwards."""
    guards, memory = Guards(zone), GuardedMemory(zone)
    tensors, keywords = (
        {n: guards.copy(v) if isinstance(v, Tensor) else v for n, v in group.items()}
        for group in (tensors, keywords)
    )
    torch.manual_seed(0)  # of dropout
    with memory:
        results = attend(tensors, keywords)
        roots = [result for result in results if result.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    assert memory.check() > 0
    guards.check()
    results += [tensor.grad for tensor in tensors.values() if tensor.grad is not None]
    return [result.detach().contiguous() for result in results]


def random_bound(numbers: random.Random, need_weights: bool) -> int | None:
    """Understated, exact, too large, or none; weights are as wide as the bound."""
    return numbers.choice((None, 0, 1, 3, ROWS, 40 if need_weights else 2**40))


def attend_at_once(backend: str) -> Callable[..., list[Tensor]]:
    def attend(tensors: dict[str, Tensor], keywords: dict[str, object]) -> list[Tensor]:
        result = attn_ext.additive_attention(**tensors, **keywords, backend=backend)
        return list(result) if isinstance(result, tuple) else [result]

    return attend


def attend_in_steps(backend: str) -> Callable[..., list[Tensor]]:
    def attend(tensors: dict[str, Tensor], keywords: dict[str, object]) -> list[Tensor]:
        key_side = [tensors[name] for name in INPUT_NAMES[1:]]
        memory = AttentionMemory(*key_side, **keywords, backend=backend)
        steps = [memory.attend(tensors["query"], need_weights=weights) for weights in (True, False)]
        return [*steps[0], steps[1]]

    return attend


@pytest.mark.parametrize("case", CASES)
def test_offsets_of_both_sides(kernel_backend: str, case: int):
    numbers = random.Random(case)
    need_weights = numbers.random() < 0.5
    keywords = {
        "cu_seqlens_q": corrupt_offsets(numbers),
        "cu_seqlens_k": corrupt_offsets(numbers),
        "max_seqlen_q": random_bound(numbers, need_weights),
        "max_seqlen_k": random_bound(numbers, need_weights),
        "need_weights": need_weights,
        "dropout_p": numbers.choice((0.0, 0.0, 0.3)),
    }
    tensors = random_tensors(numbers, (ROWS,), (ROWS,))
    check_inside(tensors, keywords, attend_at_once(kernel_backend))


@pytest.mark.parametrize("case", CASES)
def test_offsets_of_keys_alone(kernel_backend: str, case: int):
    """One query a sequence, or several, whose weights are as wide as the bound."""
    numbers = random.Random(case)
    queries = (BATCH, 3) if case % 3 == 0 else (BATCH,)
    need_weights = numbers.random() < 0.5
    keywords = {
        "cu_seqlens_k": corrupt_offsets(numbers),
        "max_seqlen_k": random_bound(numbers, need_weights and len(queries) == 2),
        "need_weights": need_weights,
        "dropout_p": numbers.choice((0.0, 0.0, 0.3)),
    }
    tensors = random_tensors(numbers, queries, (ROWS,))
    check_inside(tensors, keywords, attend_at_once(kernel_backend))


@pytest.mark.parametrize("case", CASES)
def test_offsets_of_a_memory(kernel_backend: str, case: int):
    numbers = random.Random(case)
    keywords = {
        "cu_seqlens_k": corrupt_offsets(numbers),
        "max_seqlen_k": random_bound(numbers, False),
        "dropout_p": numbers.choice((0.0, 0.0, 0.3)),
    }
    tensors = random_tensors(numbers, (BATCH,), (ROWS,))
    check_inside(tensors, keywords, attend_in_steps(kernel_backend))


@pytest.mark.parametrize("kind", ["all_steps", "one_step", "memory", "jagged_queries"])
@pytest.mark.parametrize("case", range(40))
def test_key_lengths(kernel_backend: str, case: int, kind: str):
    numbers = random.Random(case)
    keywords: dict[str, object] = {
        "key_lengths": corrupt_lengths(numbers),
        "max_seqlen_k": numbers.choice((None, 0, 1, ROWS, 2**40)),
    }
    attend = (attend_in_steps if kind == "memory" else attend_at_once)(kernel_backend)
    if kind != "memory":
        keywords["need_weights"] = numbers.random() < 0.5
    queries = (BATCH, 3) if kind == "all_steps" else (BATCH,)
    if kind == "jagged_queries":
        keywords["cu_seqlens_q"], queries = corrupt_offsets(numbers), (ROWS,)
        keywords["max_seqlen_q"] = random_bound(numbers, bool(keywords["need_weights"]))
    tensors = random_tensors(numbers, queries, (BATCH, ROWS))
    check_inside(tensors, keywords, attend)


@pytest.mark.parametrize("offsets", [[150, 150, 200], [190, 0, 100], [70, 200, 80]], ids=str)
def test_offsets_that_start_late(kernel_backend: str, offsets: list[int]):
    """By tiles and more after the first row: no tile of a sequence may come before its first."""
    shapes = dict(zip(INPUT_NAMES, ((8, 5), (200, 5), (200, 3), (5,))))
    tensors = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    keywords = {
        "cu_seqlens_q": torch.tensor([0, 4, 8]),
        "cu_seqlens_k": torch.tensor(offsets),
        "max_seqlen_q": 4,
        "max_seqlen_k": 60,
        "need_weights": True,
    }
    check_inside(tensors, keywords, attend_at_once(kernel_backend))
