"""The training loop: steps, evaluation on dev, checkpoints, exact resume.

Everything random at a step is a function of (seed, step, rank), and the batches of an epoch one of
(seed, epoch), so no generator's state has to be kept and evaluating in between changes nothing.
The learning rate does not depend on where the run will stop, so a stopped run can go on as if it
had not; instead of a decay towards the end, the model that is kept is a moving average.
"""

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from attn_ext.nmt import checkpoint
from attn_ext.nmt.cli import UsageError, atomic_write, require, writing
from attn_ext.nmt.data import epoch_batches, make_batch, sorted_batches
from attn_ext.nmt.shards import InMemory

METRICS_FILE = "metrics.jsonl"
RESULT_PATTERNS = ("results.json", "attention-*.png")  # written after the training
NO_LIMIT = 1_000_000  # steps; a run with a time limit alone


@dataclass(frozen=True)
class TrainOptions:
    seed: int = 1
    batch_tokens: int = 1000
    learning_rate: float = 3e-3
    warmup: int = 200
    label_smoothing: float = 0.1
    clip: float = 1.0
    averaging: float = 0.995
    bf16: bool = False
    eval_every: int = 250
    # From here on, what a resumed run may change without changing what its steps compute.
    max_steps: int = 2400
    minutes: float = 10.0
    patience: int = 8
    checkpoint_every: int = 100

    MUTABLE = ("max_steps", "minutes", "patience", "checkpoint_every")

    def as_dict(self):
        return asdict(self)


def learning_rate(step, options):
    """Linear warm-up, then inverse square root; steps count from 1."""
    warmup = max(1, options.warmup)
    return options.learning_rate * min(step / warmup, math.sqrt(warmup / step))


def average_parameters(decay):
    """Exponential moving average that forgets the first steps sooner."""

    @torch.no_grad()
    def update(averaged, current, count):
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, weight)

    return update


def perplexity(nll):
    """Of a negative log-likelihood per token; a number at any loss, which JSON needs."""
    return math.exp(min(nll, 700.0))


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # batches of this epoch that are done
    best_dev_loss: float = math.inf
    evaluations_without_gain: int = 0


class Trainer:
    """Trains a model on examples, writing into a folder.

    Args:
        model: a Seq2Seq, the same on every rank.
        vocabulary: to save with the model, and to score dev with.
        train, dev: examples, (source ids, target ids) each.
        options: TrainOptions.
        folder: where model, checkpoint and metrics go.
        world: the processes that train together.
        identity: plain values that a resumed run must share, e.g. the data's fingerprint.
        dev_bleu: a function of a model, to put into the metrics; or None.
    """

    def __init__(
        self, model, vocabulary, train, dev, options, folder, world, identity, dev_bleu=None
    ):
        self.model, self.vocabulary, self.options, self.world = model, vocabulary, options, world
        self.train_examples, self.dev_examples = InMemory(train), dev
        self.folder, self.identity, self.dev_bleu = Path(folder), identity, dev_bleu
        self.parallel = world.wrap(model)
        self.optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), fused=True)
        self.averaged = AveragedModel(model, multi_avg_fn=average_parameters(options.averaging))
        self.progress = Progress()
        self._stop_signal = None
        self._metrics = None  # the open file, on the main rank
        self._kept_dev_loss = math.inf  # of the model file, which may be ahead of the checkpoint
        self._evaluated_at = None  # step

    # -- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self):
        if self.world.is_main:
            if self._metrics:  # no power cut may take a step that the checkpoint has done
                with writing(self.folder / METRICS_FILE):
                    os.fsync(self._metrics.fileno())
            checkpoint.save(
                self.folder / checkpoint.CHECKPOINT_FILE,
                "checkpoint",
                {
                    **checkpoint.model_content(self.model, self.vocabulary),
                    "optimizer": self.optimizer.state_dict(),
                    "averaged": self.averaged.state_dict(),
                    "progress": asdict(self.progress),
                    "options": self.options.as_dict(),
                    "identity": self.identity,
                },
            )

    def resume(self, content):
        """Take over a checkpoint's state and cut the metrics back to its step."""
        path = self.folder / checkpoint.CHECKPOINT_FILE
        checkpoint.load_parameters(self.model, content["model"], path)
        try:
            self.averaged.load_state_dict(content["averaged"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            raise checkpoint.damaged(path) from None
        self.progress = checkpoint.rebuild(Progress, content["progress"], path)
        if self.world.is_main:
            self._kept_dev_loss = checkpoint.kept_dev_loss(self.folder / checkpoint.MODEL_FILE)
            self._cut_metrics()
        self.world.barrier()

    def _cut_metrics(self):
        path = self.folder / METRICS_FILE
        kept = []
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by a kill
                record = json.loads(line)
                # The evaluation after the last step is no part of a run that goes on.
                if record["step"] <= self.progress.step and "final" not in record:
                    kept.append(line + "\n")
        atomic_write(path, "".join(kept))

    # -- the loop ------------------------------------------------------------------------------

    def run(self):
        """Train until a limit is reached.

        Returns:
            Why it ended: "max-steps", "minutes", "no gain on dev" or "interrupted".
        """
        tqdm = require("tqdm").tqdm
        started = time.monotonic()
        path = self.folder / METRICS_FILE
        if self.world.is_main and not self.progress.step:
            self._remove_results()
            atomic_write(path, "")
            self.save_checkpoint()
        if self.world.is_main:
            with writing(path):
                self._metrics = open(path, "a", encoding="utf-8")
        bar = tqdm(
            total=self.options.max_steps if self.options.max_steps < NO_LIMIT else None,
            initial=self.progress.step,
            unit="step",
            disable=not self.world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )
        with self._signals(), contextlib.closing(bar):
            batches = self._batches()
            while (reason := self._reason_to_stop()) is None:
                if self.progress.position == len(batches):
                    self.progress.epoch += 1
                    self.progress.position = 0
                    batches = self._batches()
                late = self.options.minutes and (
                    time.monotonic() - started > 60 * self.options.minutes
                )
                record, stop, late = self.step(batches[self.progress.position], late)
                self.progress.position += 1
                self.progress.step += 1
                self._write(record)
                text = f"loss {record['loss']:.2f}, {record['tokens_per_s']:.0f} tokens/s"
                bar.set_postfix_str(text, refresh=False)
                bar.update()
                if self.progress.step % self.options.eval_every == 0:
                    self._evaluate(bar)
                if self.progress.step % self.options.checkpoint_every == 0:
                    self.save_checkpoint()
                if stop or late:
                    reason = "interrupted" if stop else "minutes"
                    break
        self.save_checkpoint()
        if reason != "interrupted" and self._evaluated_at != self.progress.step:
            # Not counted in the checkpoint: the run may go on from there.
            dev_loss = self._keep_if_best()
            record = {"step": self.progress.step, "final": True, **_dev_record(dev_loss)}
            self._write(record)
        if self._metrics:
            self._metrics.close()
            self._metrics = None
        self.world.barrier()
        return reason

    def _remove_results(self):
        """A new run must not be taken for the one before it."""
        names = (checkpoint.CHECKPOINT_FILE, checkpoint.MODEL_FILE, *RESULT_PATTERNS)
        with writing(self.folder):
            for path in [path for name in names for path in self.folder.glob(name)]:
                path.unlink()

    def _batches(self):
        return epoch_batches(
            self.train_examples.lengths(0),
            self.options.batch_tokens,
            self.options.seed,
            self.progress.epoch,
            min_sentences=self.world.size,
        )

    def _reason_to_stop(self):
        if self.progress.step >= self.options.max_steps:
            return "max-steps"
        patience = self.options.patience
        if patience and self.progress.evaluations_without_gain >= patience:
            return "no gain on dev"
        return None

    def step(self, indices, late=False):
        """One update. Returns its record, and whether any rank was asked to stop or is late."""
        began = time.monotonic()
        options, world, step = self.options, self.world, self.progress.step + 1
        seed = random.Random(f"{options.seed}/{step}/{world.rank}").getrandbits(63)
        torch.manual_seed(seed)
        lengths = self.train_examples.lengths(0)[indices]
        tokens = int(lengths[:, 1].sum()) + len(indices)  # of all ranks
        examples = self.train_examples.examples(0, indices[world.rank :: world.size])
        batch = make_batch(examples, self.vocabulary, world.device)

        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=options.bf16):
            loss, nll = self.parallel(batch, options.label_smoothing)
        # The ranks' gradients are averaged, and each rank has its share of the tokens.
        (loss * (world.size / tokens)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        norm = norm.item()
        if not math.isfinite(norm):
            raise self._not_finite("gradient", step)
        self.optimizer.step()
        self.averaged.update_parameters(self.model)
        loss, nll, stop, late = world.sum(
            [loss.item(), nll.item(), self._stop_signal is not None, bool(late)]
        )
        record = {
            "step": step,
            "epoch": self.progress.epoch,
            "loss": loss / tokens,
            "ppl": perplexity(nll / tokens),
            "lr": learning_rate(step, options),
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_s": round(tokens / max(time.monotonic() - began, 1e-9), 1),
        }
        return record, bool(stop), bool(late)

    def _evaluate(self, bar):
        """Measure dev, keep the model if it is the best, count evaluations without gain."""
        dev_loss = self._keep_if_best()
        progress = self.progress
        gained = dev_loss < progress.best_dev_loss
        if gained:
            progress.best_dev_loss = dev_loss
            progress.evaluations_without_gain = 0
        else:
            progress.evaluations_without_gain += 1
        if self.world.is_main:
            record = {"step": progress.step, **_dev_record(dev_loss)}
            text = f"step {progress.step}: dev loss {dev_loss:.3f}"
            if self.dev_bleu is not None:
                record["dev_bleu"] = self.dev_bleu(self.averaged.module)
                text += f", dev BLEU {record['dev_bleu']:.1f} (greedy, evenly spread sentences)"
            self._write(record)
            bar.write(text + ("" if gained else " (no gain)"), file=sys.stderr)

    def _keep_if_best(self):
        """Measure dev, and save the averaged model if it is better than the one saved before."""
        dev_loss = 0.0
        if self.world.is_main:
            model = self.averaged.module
            dev_loss = evaluate_loss(
                model, self.dev_examples, self.vocabulary, self.options, self.world.device
            )
            if dev_loss < self._kept_dev_loss:
                path = self.folder / checkpoint.MODEL_FILE
                checkpoint.save_model(path, model, self.vocabulary, dev_loss)
                self._kept_dev_loss = dev_loss
        (dev_loss,) = self.world.sum([dev_loss])
        if not math.isfinite(dev_loss):
            raise self._not_finite("loss on dev", self.progress.step)
        self._evaluated_at = self.progress.step
        return dev_loss

    def _not_finite(self, what, step):
        return UsageError(
            f"the {what} is not finite at step {step}; the last checkpoint stands; try a "
            f"smaller --lr than {self.options.learning_rate:g}"
        )

    def _write(self, record):
        if self._metrics:
            with writing(self.folder / METRICS_FILE):
                self._metrics.write(json.dumps(record) + "\n")
                self._metrics.flush()

    @contextlib.contextmanager
    def _signals(self):
        """Ctrl-C and termination end the loop after the step they came in."""

        def handle(number, _):
            self._stop_signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once

        try:
            before = {number: signal.signal(number, handle)
                      for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _dev_record(dev_loss):
    return {"dev_loss": dev_loss, "dev_ppl": perplexity(dev_loss)}


@torch.no_grad()
def evaluate_loss(model, examples, vocabulary, options, device):
    """Negative log-likelihood per token, without smoothing."""
    model.eval()
    total = tokens = 0
    for indices in sorted_batches(examples, options.batch_tokens):
        batch = make_batch([examples[i] for i in indices], vocabulary, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            total += model(batch)[1].item()
        tokens += len(batch.target_output.values)
    return total / tokens
