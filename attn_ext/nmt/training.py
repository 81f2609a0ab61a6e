"""The training loop: steps, evaluation on dev, checkpoints, exact resume.

Everything random at a step is a function of (seed, step, rank), and the batches of an epoch one of
(seed, epoch), so no generator's state has to be kept and evaluating in between changes nothing.
The learning rate does not depend on where the run will stop, so a stopped run can go on as if it
had not; instead of a decay towards the end, the model that is kept is a moving average.
"""

import contextlib
import copy
import ctypes
import math
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from attn_ext.nmt import checkpoint
from attn_ext.nmt.batches import Batches, Position, made_ahead
from attn_ext.nmt.cli import UsageError, require, writing
from attn_ext.nmt.data import make_batch, sorted_batches
from attn_ext.nmt.distributed import accumulating, sharded_like, whole
from attn_ext.nmt.metrics import EVENTS_FOLDER, Metrics
from attn_ext.nmt.options import NO_LIMIT, learning_rate

RESULT_PATTERNS = ("results.json", "attention-*.png", "model-*.pt", EVENTS_FOLDER)


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


def make_optimizer(name, parameters):
    """The optimizer of the option of that name; each step sets its learning rate."""
    if name == "lamb":  # You et al. 2020: for large batches
        return require("pytorch_optimizer").Lamb(parameters)
    return torch.optim.Adam(parameters, betas=(0.9, 0.98), fused=True)


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    epoch: int = 0
    shard: int = 0  # shards of this epoch that are done
    position: int = 0  # batches of the next shard that are done
    skipped: int = 0  # steps without an update, since a gradient was too large for float16
    best_dev_loss: float = math.inf
    evaluations_without_gain: int = 0


class Trainer:
    """Trains a model on examples, writing into a folder.

    Args:
        model: a Seq2Seq, the same on every rank.
        vocabulary: to save with the model, and to score dev with.
        train: pairs of token ids in shards, see `attn_ext.nmt.shards`.
        dev: examples, (source ids, target ids) each.
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
        self.dev_examples, self.dev_bleu = dev, dev_bleu
        self.folder, self.identity = Path(folder), identity
        self.batches = Batches(train, vocabulary, options, world)
        self.averaged = AveragedModel(model, multi_avg_fn=average_parameters(options.averaging))
        self._sharded = options.parallel == "fsdp" and world.size > 1
        if self._sharded:
            self._in_one_piece = copy.deepcopy(model) if world.is_main else None  # to evaluate
            world.shard(self.averaged.module)
        model.recompute = options.recompute
        if options.compile:
            torch._dynamo.config.allow_rnn = True  # as one op, see attn_ext.nmt.rnn
            self.parallel = world.wrap(torch.compile(model), options.parallel)
        else:
            self.parallel = world.wrap(model, options.parallel)
        self.optimizer = make_optimizer(options.optimizer, model.parameters())
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.fp16)
        self.progress = Progress()
        self._stop_signal = None
        self._metrics = None  # on the main rank, while it runs
        self._kept_dev_loss = math.inf  # of the model file, which may be ahead of the checkpoint
        self._evaluated_at = None  # step

    # -- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self):
        states = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self._sharded:
            states = whole(states)
        if self.world.is_main:
            if self._metrics:  # no power cut may take a step that the checkpoint has done
                self._metrics.sync()
            checkpoint.save(
                self.folder / checkpoint.CHECKPOINT_FILE,
                "checkpoint",
                {
                    **checkpoint.model_content(self.model, self.vocabulary),
                    **states,
                    "scaler": self.scaler.state_dict(),
                    "progress": asdict(self.progress),
                    "options": self.options.as_dict(),
                    "identity": self.identity,
                },
            )
        _give_back_memory()

    def resume(self, content):
        """Take over a checkpoint's state; the metrics are cut back to its step by `run`."""
        path = self.folder / checkpoint.CHECKPOINT_FILE
        checkpoint.load_parameters(self.model, content["model"], path)
        parameters = list(self.model.parameters())
        try:
            own = self.averaged.state_dict()
            averaged = {k: sharded_like(v, own.get(k)) for k, v in content["averaged"].items()}
            self.averaged.load_state_dict(averaged)
            optimizer = dict(content["optimizer"])
            optimizer["state"] = {
                number: {k: sharded_like(v, parameters[number]) for k, v in state.items()}
                for number, state in optimizer["state"].items()
            }
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(content["scaler"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError):
            raise checkpoint.damaged(path) from None
        self.progress = checkpoint.rebuild(Progress, content["progress"], path)
        if self.world.is_main:
            self._kept_dev_loss = checkpoint.kept_dev_loss(self.folder / checkpoint.MODEL_FILE)
        self.world.barrier()

    # -- the loop ------------------------------------------------------------------------------

    def run(self):
        """Train until a limit is reached.

        Returns:
            Why it ended: "max-steps", "minutes", "no gain on dev" or "interrupted".
        """
        tqdm = require("tqdm").tqdm
        started = time.monotonic()
        if self.world.is_main:
            if not self.progress.step:
                self._remove_results()
            self._metrics = Metrics(self.folder, self.progress.step, self.options.tensorboard)
        if not self.progress.step:
            self.save_checkpoint()
        bar = tqdm(
            total=self.options.max_steps if self.options.max_steps < NO_LIMIT else None,
            initial=self.progress.step,
            unit="step",
            disable=not self.world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )
        at = Position(self.progress.epoch, self.progress.shard, self.progress.position)
        updates = made_ahead(self.batches.updates(at))
        with self._signals(), contextlib.closing(bar), updates as updates:
            while (reason := self._reason_to_stop()) is None:
                late = self.options.minutes and (
                    time.monotonic() - started > 60 * self.options.minutes
                )
                update = next(updates)
                record, stop, late = self.step(update, late)
                at = update.after
                self.progress.epoch, self.progress.shard, self.progress.position = at
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
            dev_loss = self._keep_if_best(self._averaged_model())
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
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _reason_to_stop(self):
        if self.progress.step >= self.options.max_steps:
            return "max-steps"
        patience = self.options.patience
        if patience and self.progress.evaluations_without_gain >= patience:
            return "no gain on dev"
        return None

    def step(self, update, late=False):
        """One update. Returns its record, and whether any rank was asked to stop or is late."""
        began = time.monotonic()
        options, world, step = self.options, self.world, self.progress.step + 1
        seed = random.Random(f"{options.seed}/{step}/{world.rank}").getrandbits(63)
        torch.manual_seed(seed)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        self.optimizer.zero_grad(set_to_none=True)
        losses, nlls = [], []
        for batch in update.passes:
            with accumulating(self.parallel, last=batch is update.passes[-1]):
                with _autocast(options, world.device):
                    loss, nll = self.parallel(batch, options.label_smoothing)
                # The ranks' gradients are averaged, and each rank has its share of the tokens.
                self.scaler.scale(loss * (world.size / update.tokens)).backward()
            losses.append(loss.detach())
            nlls.append(nll)
        updated = self._update_parameters(step)
        tokens = update.tokens
        loss, nll, stop, late = world.sum(
            [sum(losses).item(), sum(nlls).item(), self._stop_signal is not None, bool(late)]
        )
        record = {
            "step": step,
            "epoch": update.epoch,
            "loss": loss / tokens,
            "ppl": perplexity(nll / tokens),
            "lr": learning_rate(step, options),
            **updated,
            "tokens": tokens,
            "tokens_per_s": round(tokens / max(time.monotonic() - began, 1e-9), 1),
        }
        return record, bool(stop), bool(late)

    def _update_parameters(self, step):
        """Clip the gradient and take a step, or in float16 none where it has overflowed.

        Returns:
            What to put on record.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        norm = whole(norm).item()
        finite = math.isfinite(norm)
        if not finite and (not self.options.fp16 or self.scaler.get_scale() < 1):
            raise self._not_finite("gradient", step)
        self.scaler.step(self.optimizer)
        self.scaler.update()  # halves the scale after an overflow
        record = {"grad_norm": norm} if finite else {}
        if finite:
            self.averaged.update_parameters(self.model)
        if self.options.fp16:
            self.progress.skipped += not finite
            record |= {"skipped": self.progress.skipped, "loss_scale": self.scaler.get_scale()}
        return record

    def _averaged_model(self):
        """The averaged model, to evaluate and save on the main process; all ranks call this."""
        if not self._sharded:
            return self.averaged.module
        parameters = whole(self.averaged.module.state_dict())
        if self.world.is_main:
            self._in_one_piece.load_state_dict(parameters)
        return self._in_one_piece

    def _evaluate(self, bar):
        """Measure dev, keep the model if it is the best, count evaluations without gain."""
        model = self._averaged_model()
        dev_loss = self._keep_if_best(model)
        progress = self.progress
        gained = dev_loss < progress.best_dev_loss
        if gained:
            progress.best_dev_loss = dev_loss
            progress.evaluations_without_gain = 0
        else:
            progress.evaluations_without_gain += 1
        if self.world.is_main:
            self._keep_last(model, dev_loss)
            record = {"step": progress.step, **_dev_record(dev_loss)}
            text = f"step {progress.step}: dev loss {dev_loss:.3f}"
            if self.dev_bleu is not None:
                record["dev_bleu"] = self.dev_bleu(model)
                text += f", dev BLEU {record['dev_bleu']:.1f} (greedy, evenly spread sentences)"
            self._write(record)
            bar.write(text + ("" if gained else " (no gain)"), file=sys.stderr)

    def _keep_if_best(self, model):
        """Measure dev, and save the averaged model if it is better than the one saved before."""
        dev_loss = 0.0
        if self.world.is_main:
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

    def _keep_last(self, model, dev_loss):
        """Leave the models of the last evaluations, as many as asked for, to average."""
        if not self.options.keep:
            return
        path = self.folder / f"model-{self.progress.step}.pt"
        checkpoint.save_model(path, model, self.vocabulary, dev_loss)
        steps = {
            int(match[1]): path
            for path in self.folder.glob("model-*.pt")
            if (match := re.fullmatch(r"model-(\d+)\.pt", path.name))
        }
        with writing(self.folder):
            for step in sorted(steps)[: -self.options.keep]:
                steps[step].unlink(missing_ok=True)

    def _not_finite(self, what, step):
        return UsageError(
            f"the {what} is not finite at step {step}; the last checkpoint stands; try a "
            f"smaller --lr than {self.options.learning_rate:g}"
        )

    def _write(self, record):
        if self._metrics:
            self._metrics.write(record)

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


def _give_back_memory():
    """Return what the C library keeps of freed tensors to the system, where it is glibc.

    Batches differ in size, so what it keeps fits the next ones badly: of a model of 3 million
    parameters it grew to 1.3 GB within 8,000 steps.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _autocast(options, device):
    dtype = torch.float16 if options.fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=options.fp16 or options.bf16)


@torch.no_grad()
def evaluate_loss(model, examples, vocabulary, options, device):
    """Negative log-likelihood per token, without smoothing."""
    model.eval()
    total = tokens = 0
    for indices in sorted_batches(examples, min(options.batch_tokens, options.pass_tokens)):
        batch = make_batch([examples[i] for i in indices], vocabulary, device)
        with _autocast(options, device):
            total += model(batch)[1].item()
        tokens += len(batch.target_output.values)
    return total / tokens
