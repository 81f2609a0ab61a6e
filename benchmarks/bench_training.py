"""Time training a GNMT-sized translation model, beside the same model with eager attention.

python -m benchmarks.bench_training                                   on a GPU
python -m benchmarks.bench_training --device cpu --batches 8,16 --hidden 256 --vocab-size 4000
python -m benchmarks.bench_training --help                            other sizes, text, providers

One model is trained, by the steps of attn_ext.nmt, in bfloat16, or in float32 where the device has
none; only its decoder's attention is exchanged. The largest batch is searched for each attention;
then they take turns, round after round. Before, loss and gradients on one batch are compared with
those of the next wider type.
"""

import argparse
import copy
import gc
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from attn_ext.nmt import cli, distributed
from attn_ext.nmt.data import make_batch
from attn_ext.nmt.model import DECODERS, ModelConfig, Seq2Seq
from attn_ext.nmt.options import TrainOptions
from attn_ext.nmt.precision import bf16_problem
from attn_ext.nmt.shards import InMemory
from attn_ext.nmt.training import Trainer

from . import harness, providers, reach
from .bench_additive_attention import RESULTS, machine
from .padded_attention import PaddedAttention
from .training_text import Text, read_text

PROVIDERS = ("eager", "compile", "attn_ext")
BATCHINGS = ("drawn", "bucketed")
ONE_PASS = 1 << 40  # tokens, more than any batch has
BATCHES = 4  # that a round trains on; bucketed, so many buckets of lengths
SMALLEST, MOST = 256, 16_384  # sentences of a batch, where the search starts and ends
RESOLUTION = 16  # the largest batch is known to one part in so many
SPARED = 1 << 28  # 1 GiB of float32 that the search keeps free: later runs must not fail for it
# How cuDNN, PyTorch and attn_ext say that a size is more than they take.
REFUSED = re.compile(
    r"CUDNN_STATUS_(NOT_SUPPORTED|BAD_PARAM)|ALLOC_FAILED|out of memory"
    r"|too large|fewer than 2\^31|32.?bit ?ind|int(32)?_max|int(32_t)?>::max",
    re.IGNORECASE,
)
CHECKED = 16  # sentences of the batch on which loss and gradients are compared


def make_attentions(model: Seq2Seq, names: list[str]) -> dict[str, nn.Module]:
    """The attention of each provider, all with the parameters of the model's own."""
    own = model.decoder.attention
    made = {"attn_ext": own}
    if "eager" in names:
        made["eager"] = PaddedAttention(own, providers.attend_padded, providers.attend_step)
    if "compile" in names:
        forms = (providers.sum_product_padded, providers.sum_product_step)
        made["compile"] = PaddedAttention(own, *(torch.compile(f, dynamic=True) for f in forms))
    return {name: made[name] for name in names}


def main() -> None:
    options = parse_arguments()
    device = distributed.pick_device(options.device)
    text = read_text(options.vocab_size, options.data, options.corpus, options.synthetic)
    config = ModelConfig(
        options.vocab_size, options.decoder, options.hidden, options.hidden,
        encoder_layers=options.layers, decoder_layers=options.layers,
    )  # fmt: skip
    backend = cli.check_backend(options.backend, device)
    problem = bf16_problem(config, device, options.backend)
    dtype = "float32" if problem else "bfloat16"
    print(
        f"{text.label}; {config.decoder}, {config.encoder_layers} + {config.decoder_layers} "
        f"layers of {config.hidden}, vocabulary {config.vocab_size}; {dtype}; {device}, {backend}",
        flush=True,
    )
    if problem:
        print(f"float32 instead of bfloat16: {problem}", flush=True)
    checked = check(config, text, device, options, dtype)
    torch.manual_seed(0)
    model = Seq2Seq(config, options.backend).to(device)
    training = TrainOptions(bf16=dtype == "bfloat16", pass_tokens=ONE_PASS)
    world = distributed.World(device=device)
    train = InMemory(text.examples)
    trainer = Trainer(model, text.vocabulary, train, [], training, ".", world, None)
    bench = Bench(trainer, make_attentions(model, options.providers))
    report = {
        "machine": machine(options.device),
        "dtype": dtype,
        "text": text.label,
        "model": config.as_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "backend": backend,
        "checked": checked,
        "rows": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"training_{report['machine']['slug']}.json"
    for batching in options.batchings:
        report["rows"] += bench_batching(bench, batching, options)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--data", metavar="FILE.tsv", help="source<TAB>target, UTF-8")
    text.add_argument("--corpus", choices=("homeassistant", "libreoffice"), help="may fetch it")
    known = "random tokens, in lengths of GNMT's training text (default where no corpus is cached)"
    text.add_argument("--synthetic", action="store_true", help=known)
    parser.add_argument("--decoder", choices=sorted(DECODERS), default="gnmt")
    for name, default in (("hidden", 1024), ("layers", 4), ("vocab-size", 32_000)):
        parser.add_argument(f"--{name}", type=cli.positive_int, default=default, metavar="N")
    known = f"some of {','.join(PROVIDERS)}, with eager (default eager,attn_ext)"
    parser.add_argument("--providers", type=_some_of(PROVIDERS), help=known)
    known = f"some of {','.join(BATCHINGS)} (default both)"
    parser.add_argument("--batchings", type=_some_of(BATCHINGS), default=BATCHINGS, help=known)
    known = "sentences of a batch, eager's and attn_ext's, instead of the largest that fit"
    parser.add_argument("--batches", type=_sizes, metavar="N[,M]", help=known)
    known = "budget of the timed rounds of a batching; no fewer than 3 are run"
    parser.add_argument("--seconds", type=float, default=20.0, help=known)
    parser.add_argument("--backend", help=cli.BACKEND_HELP)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    if options.device == "cpu" and options.batches is None:
        parser.error("--batches is needed on a CPU, whose memory is not filled to find its limit")
    options.providers = options.providers or ["eager", "attn_ext"]
    if "eager" not in options.providers:
        parser.error("--providers: eager, with which the others are compared, is missing")
    return options


def _sizes(text: str) -> list[int]:
    sizes = [cli.positive_int(size) for size in text.split(",")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"expected one or two sizes, got {text!r}")
    return sizes


def _some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: expected some of {','.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def check(
    config: ModelConfig,
    text: Text,
    device: torch.device,
    options: argparse.Namespace,
    dtype: str,
) -> dict[str, dict[str, float]]:
    """Loss a token and gradient norm of each provider on one batch, and its share of the budget.

    The errors of the loss and of every parameter's gradient may be 3 times those of eager attention
    in the same type, plus a rounding: errors against float32 of bfloat16, and against float64 of
    float32. Without dropout, whose masks may differ.

    Raises:
        AssertionError: an error is larger.
    """
    torch.manual_seed(0)
    model = Seq2Seq(replace(config, dropout=0.0), options.backend).to(device)
    batch = make_batch(text.examples[:CHECKED], text.vocabulary, device)
    attentions = make_attentions(model, options.providers)
    bf16 = dtype == "bfloat16"
    model.decoder.attention = attentions["eager"]
    wider = model if bf16 else copy.deepcopy(model).double()
    exact = _differentiate(wider, batch, wider.decoder.attention, bf16=False)
    plain = _differentiate(model, batch, attentions["eager"], bf16)
    rounding, found = harness.ROUNDING[getattr(torch, dtype)], {}
    for name, attention in attentions.items():
        result = _differentiate(model, batch, attention, bf16)
        shares = {}
        for part, truth in exact.items():
            allowed = 3 * (plain[part] - truth).norm() + rounding * truth.norm()
            shares[part] = ((result[part] - truth).norm() / allowed).nan_to_num(math.inf).item()
        worst = max(shares, key=shares.get)
        loss, *gradients = (tensor.norm().item() for tensor in result.values())
        found[name] = {
            "loss": loss,
            "gradient_norm": math.hypot(*gradients),
            "share_of_error_budget": shares[worst],
        }
        print(
            f"  {name:9s} loss {loss:.4f} a token, gradient norm {math.hypot(*gradients):.4f}, "
            f"{shares[worst]:.2f} of the error budget",
            flush=True,
        )
        if not shares[worst] <= (harness.PEER_ALLOWANCE if name == "compile" else 1):
            raise AssertionError(f"{name}: {worst} errs by {shares[worst]:.1f} of what is allowed")
    return found


def _differentiate(model, batch, attention: nn.Module, bf16: bool) -> dict[str, Tensor]:
    """The loss a target token, and the gradients by the names of their parameters."""
    model.decoder.attention = attention
    names, parameters = zip(*model.named_parameters(), strict=True)
    with torch.autocast(batch.source.values.device.type, torch.bfloat16, enabled=bf16):
        loss = model(batch)[0] / len(batch.target_output.values)
    gradients = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


@dataclass
class Cell:
    """A provider at a size of batch, and what its rounds took."""

    provider: str
    size: int  # sentences
    batches: list[np.ndarray]
    tokens: int  # of the targets of all batches
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def refusal(error: RuntimeError) -> str | None:
    """The line by which a library refuses a size; None of any other error, as an illegal access."""
    return next(filter(REFUSED.search, str(error).splitlines()), None)


class Bench:
    """Steps of one trainer, with one attention or another."""

    def __init__(self, trainer: Trainer, attentions: dict[str, nn.Module]):
        self.trainer, self.attentions = trainer, attentions
        self.device = trainer.world.device
        self.dtype = "bfloat16" if trainer.options.bf16 else "float32"  # as steps compute

    def cell(self, provider: str, size: int, batching: str) -> Cell:
        """``BATCHES`` batches of ``size`` sentences: as drawn, or cut from them by length."""
        train = self.trainer.batches.train
        pool = np.arange(BATCHES * size) % len(train)
        lengths = train.lengths(0)[pool]
        if batching == "bucketed":  # as data.epoch_batches
            pool = pool[np.lexsort(lengths.T)]
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        return Cell(provider, size, batches, int(lengths[:, 1].sum()) + len(pool))

    def train(self, cell: Cell) -> None:
        """A step on each batch."""
        self.trainer.model.decoder.attention = self.attentions[cell.provider]
        for batch in cell.batches:
            self.trainer.step(self.trainer.batches.update(batch))

    def warm_up(self, cell: Cell) -> None:
        """The last batch, none is longer when bucketed, in memory that other cells gave back."""
        self._release()
        self.train(replace(cell, batches=cell.batches[-1:]))

    def problem(self, cell: Cell) -> str | None:
        """Why these batches do not train, or None if they do with memory to spare."""
        self._release()
        spared = torch.empty(SPARED if self.device.type == "cuda" else 0, device=self.device)
        found = None
        try:
            self.warm_up(cell)
            self.train(cell)
        except torch.OutOfMemoryError:
            found = "out of memory"
        except RuntimeError as error:
            found = refusal(error)
            if found is None:
                raise
        del spared
        if found is not None:
            gc.collect()  # of what was raised inside a step
        self._release()
        return found

    def time(self, cells: list[Cell], budget: float) -> None:
        """Let the cells take turns, for 3 rounds or until ``budget`` seconds are up."""
        end = time.perf_counter() + budget
        while len(cells[-1].seconds) < 3 or time.perf_counter() < end:
            for cell in cells:
                self.warm_up(cell)
                start = time.perf_counter()  # a step ends by reading its loss: nothing is queued
                self.train(cell)
                cell.seconds.append(time.perf_counter() - start)

    def peak_memory(self, cell: Cell) -> int:
        """Bytes that steps hold beyond parameters, gradients and the optimizer's state."""
        self.warm_up(cell)
        steps = SimpleNamespace(call=lambda mode: self.train(cell))
        return harness.peak_memory(steps, "both", self.device.type)

    def _release(self) -> None:
        self.trainer.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def largest_size(
    problem: Callable[[int], str | None], start: int = SMALLEST, most: int = MOST
) -> tuple[int, str]:
    """The largest size without problem, to one part in ``RESOLUTION``, and what limits it.

    Raises:
        RuntimeError: not even 1 is without.
    """
    low, high, size, limit = 0, None, start, f"not more than {most} were tried"
    while True:
        found = problem(size)
        if found is None:
            low = size
        elif size == 1:
            raise RuntimeError(f"a batch of one sentence does not train: {found}")
        else:
            high, limit = size, found
        if high is None:
            if low == most:
                return low, limit
            size = min(2 * low, most)
        elif high - low <= max(1, low // RESOLUTION):
            return low, limit
        else:
            size = (low + high) // 2


def bench_batching(bench: Bench, batching: str, options: argparse.Namespace) -> list[dict]:
    """A row a provider: its batch, memory and tokens/s there and at eager's, and ratios to it."""
    lengths = {"drawn": "as they come", "bucketed": "of similar length"}[batching]
    print(f"\n{batching}: batches of sentences {lengths}", flush=True)
    sizes, limits = {}, {}
    for name in options.providers:
        if options.batches:
            sizes[name], limits[name] = options.batches[0 if name == "eager" else -1], "as asked"
            continue
        sizes[name], limits[name] = largest_size(
            lambda size, name=name: bench.problem(bench.cell(name, size, batching))
        )
        print(f"  {name} trains on {sizes[name]:,d} sentences, no more: {limits[name]}", flush=True)
    common = sizes["eager"]
    cells = {
        (name, size): bench.cell(name, size, batching)
        for name, own in sizes.items()
        for size in sorted({common, own})
        if size <= own
    }
    bench.time(list(cells.values()), options.seconds)
    eager, rows = cells["eager", common], []
    for name, size in sizes.items():
        cell = cells[name, size]
        row = {
            "batching": batching,
            "provider": name,
            "dtype": bench.dtype,
            "batch": size,
            "limited_by": limits[name],
            "peak_bytes": bench.peak_memory(cell),
            "tokens_per_second": cell.tokens_per_second,
            "tokens_vs_eager": cell.tokens_per_second / eager.tokens_per_second,
        }
        if not options.batches:
            row["batch_vs_eager"] = size / common
        if size >= common:
            beside = cells[name, common].tokens_per_second
            row["tokens_per_second_at_eagers_batch"] = beside
            row["tokens_vs_eager_at_its_batch"] = beside / eager.tokens_per_second
        if name == "attn_ext" and options.device == "cuda":
            row["reach"] = reach.judge(reach.TRAINING, row)
        rows.append(row)
        row["cells"] = [asdict(c) for key, c in cells.items() if key[0] == name]
        for timed in row["cells"]:
            timed.pop("batches")
    print_table(rows)
    return rows


def print_table(rows: list[dict]) -> None:
    print(
        "  provider  dtype        batch  peak memory   target tokens/s: at eager's batch"
        "   at its own   limited by"
    )
    for row in rows:
        beside, ratio = row.get("tokens_per_second_at_eagers_batch"), "     "
        if beside is not None:
            ratio = f"{beside:,.0f} ({row['tokens_vs_eager_at_its_batch']:.2f}x)"
        own = f"{row['tokens_per_second']:,.0f} ({row['tokens_vs_eager']:.2f}x)"
        print(
            f"  {row['provider']:9s} {row['dtype']:8s} {row['batch']:9,d} "
            f"{row['peak_bytes'] / 1e9:9.2f} GB {ratio:>35s} {own:>20s}   {row['limited_by']}"
        )
        for verdict in row.get("reach", ()):
            print(f"    reach {verdict}")


if __name__ == "__main__":
    cli.wait_without_spinning()
    # Batches differ in their lengths: else memory that one leaves is of no use to the next. Read
    # when the GPU is first used; the newer name, PYTORCH_ALLOC_CONF, does nothing in torch 2.9.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    cli.run(main)
