"""The shapes people run, by name, and the inputs for them."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

# Sentence lengths of GNMT training, source and target alike: (tokens, share of sentences).
GNMT_LENGTHS = (
    ((10, 15), 0.11),
    ((15, 20), 0.10),
    ((20, 25), 0.35),
    ((30, 35), 0.25),
    ((45, 50), 0.14),
    ((55, 60), 0.05),
)


@dataclass(frozen=True)
class Workload:
    """One attention problem: lengths a sequence, features, and how queries arrive.

    ``steps`` > 0 is a decoder loop of that many steps with one query a sequence each (keys are
    prepared once); 0 means that all of a sequence's queries attend in one call. ``cold`` inputs are
    read from memory, not from a cache that the call before left them in. ``level`` names a workload
    of equal lengths and as many tokens to compare with. ``tied`` values are the keys.
    """

    name: str
    key_lengths: tuple[int, ...]
    query_lengths: tuple[int, ...]
    dim: int
    value_dim: int
    steps: int = 0
    cold: bool = False
    level: str = ""
    tied: bool = False

    @property
    def one_query(self) -> bool:
        """Whether each sequence has one query in a call."""
        return bool(self.steps) or max(self.query_lengths) == 1

    def bytes_moved(self, mode: str, itemsize: int) -> int:
        """Bytes that a call (not a loop) reads and writes if it touches each number once."""
        queries, keys = sum(self.query_lengths), sum(self.key_lengths)
        inputs = queries * self.dim + keys * (self.dim + (0 if self.tied else self.value_dim))
        forward = inputs + queries * self.value_dim
        backward = forward + inputs
        numbers = {"forward": forward, "backward": backward, "both": forward + backward}
        return numbers[mode] * itemsize

    @property
    def pairs(self) -> int:
        """Query-key pairs over the whole call or loop."""
        if self.steps:
            return self.steps * sum(self.key_lengths)
        return sum(q * k for q, k in zip(self.query_lengths, self.key_lengths, strict=True))

    @property
    def description(self) -> str:
        batch, longest = len(self.key_lengths), max(self.key_lengths)
        mean = sum(self.key_lengths) / batch
        queries = f"{self.steps} steps" if self.steps else f"Tq max {max(self.query_lengths)}"
        keys = f"Tk {longest}" if mean == longest else f"Tk mean {mean:.0f} max {longest}"
        return f"B={batch} {keys} {queries} D={self.dim} Dv={self.value_dim}"


@dataclass
class Inputs:
    """One problem, jagged, and padded where that is asked for; float leaves require gradients."""

    query: Tensor  # [total_q, D], or [steps, B, D] for a decoder loop
    key: Tensor  # [total_k, D]
    value: Tensor  # [total_k, Dv]
    score_weight: Tensor  # [D]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @cached_property
    def query_valid(self) -> Tensor:
        """``[B, Tq]``, which places of padded queries are real."""
        return _valid(self.cu_seqlens_q.diff())

    @cached_property
    def key_valid(self) -> Tensor:
        """``[B, Tk]``, which places of padded keys are real."""
        return _valid(self.cu_seqlens_k.diff())

    @cached_property
    def padding_mask(self) -> Tensor | None:
        """``[B, Tk]``, True = ignore; None when all lengths are equal."""
        return None if bool(self.key_valid.all()) else ~self.key_valid

    @cached_property
    def padded_query(self) -> Tensor:
        """``[B, Tq, D]``, or ``[steps, B, D]`` for a decoder loop."""
        if self.query.dim() == 3:
            return self.query.detach().clone().requires_grad_()
        return _pad(self.query, self.query_valid)

    @cached_property
    def padded_key(self) -> Tensor:
        """``[B, Tk, D]``."""
        return _pad(self.key, self.key_valid)

    @cached_property
    def padded_value(self) -> Tensor:
        """``[B, Tk, Dv]``."""
        return self.padded_key if self.value is self.key else _pad(self.value, self.key_valid)

    @cached_property
    def query_places(self) -> Tensor | None:
        """``[total_q]``, where the queries stand among padded ones; None when none is padding."""
        valid = self.query_valid.flatten()
        return None if bool(valid.all()) else valid.nonzero().squeeze(1)

    @property
    def bytes(self) -> int:
        """Of query, key and value."""
        return sum(tensor.nbytes for tensor in {self.query, self.key, self.value})

    def copy(self) -> "Inputs":
        """The same numbers elsewhere in memory."""
        copied = {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in ((field.name, getattr(self, field.name)) for field in fields(self))
        }
        if self.value is self.key:
            copied["value"] = copied["key"]
        return Inputs(**copied)


def mixture(batch: int, seed: int) -> tuple[int, ...]:
    """``batch`` lengths drawn without bucketing from GNMT's mixture."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([share for _, share in GNMT_LENGTHS])
    drawn = torch.multinomial(shares, batch, replacement=True, generator=generator)
    bounds = [GNMT_LENGTHS[index][0] for index in drawn.tolist()]
    return tuple(int(torch.randint(low, high + 1, (), generator=generator)) for low, high in bounds)


def uniform(batch: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    """``batch`` lengths drawn uniformly from ``[low, high]``."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(low, high + 1, (batch,), generator=generator).tolist())


def _loop(name: str, keys: tuple[int, ...], steps: int, dim: int, value_dim: int) -> Workload:
    return Workload(name, keys, (1,) * len(keys), dim, value_dim, steps)


SKEWED = (8,) * 1000 + (50_000,)
LEVEL = (58,) * 943 + (57,) * 58  # as many sequences, and as many keys in all, as SKEWED
ONES = (1,) * len(SKEWED)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("equal", (32,) * 8, (32,) * 8, 512, 512),
        Workload("gnmt", mixture(64, 1), mixture(64, 2), 1024, 1024),
        _loop("step-decoder", mixture(64, 3), 30, 512, 512),
        Workload("one-long", (100_000,), (1,), 256, 512),
        Workload("bags", uniform(8, 500, 20_000, 8), (1,) * 8, 256, 512),
        Workload("long-source", (4_000,) * 4, (64,) * 4, 256, 512),
        Workload("skewed", SKEWED, ONES, 256, 256, level="level"),
        Workload("level", LEVEL, ONES, 256, 256),
        Workload("at-once", (75,) * 384, (75,) * 384, 1024, 1024),
        Workload("gnmt-384", mixture(384, 1), mixture(384, 2), 1024, 1024),
        Workload("step", mixture(384, 3), (1,) * 384, 1024, 1024, cold=True),
        Workload("one-long-512", (100_000,), (1,), 512, 512, cold=True),
        Workload("skewed-512", SKEWED, ONES, 512, 512, cold=True, level="level-512"),
        Workload("level-512", LEVEL, ONES, 512, 512, cold=True),
        Workload("graph", mixture(384, 1), mixture(384, 2), 1024, 1024, tied=True),
        _loop("rnnsearch", uniform(80, 40, 60, 4), 50, 1000, 2000),
        _loop("tacotron2", uniform(64, 100, 190, 5), 50, 128, 512),
        _loop("listen-attend-spell", uniform(16, 200, 500, 6), 20, 1024, 512),
        _loop("pointer-generator", (400,) * 16, 50, 512, 512),
        _loop("pointer-network", uniform(512, 20, 100, 7), 20, 128, 128),
        Workload("mil", (10_000,), (1,), 512, 1024),
    )
}


def make_inputs(
    workload: Workload, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Draw the inputs of a workload, the same numbers for every layout."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device, dtype)

    batch = len(workload.key_lengths)
    key_lengths = torch.tensor(workload.key_lengths, device=device)
    query_lengths = torch.tensor(workload.query_lengths, device=device)
    total_k = sum(workload.key_lengths)
    query_shape = (workload.steps, batch) if workload.steps else (sum(workload.query_lengths),)
    key = draw(total_k, workload.dim).requires_grad_()
    return Inputs(
        draw(*query_shape, workload.dim).requires_grad_(),
        key,
        key if workload.tied else draw(total_k, workload.value_dim).requires_grad_(),
        draw(workload.dim, scale=workload.dim**-0.5).requires_grad_(),
        _offsets(query_lengths),
        _offsets(key_lengths),
    )


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _valid(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def _pad(rows: Tensor, valid: Tensor) -> Tensor:
    padded = rows.new_zeros((*valid.shape, rows.size(-1)))
    padded[valid] = rows.detach()
    return padded.requires_grad_()
