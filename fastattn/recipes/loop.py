"""The training loop: any model, any batches, on one process or several.

    done = run(model, batches, Options(steps=1000), "out")

A step draws `accumulate` batches, weighs each loss by its number of targets among all of them on all ranks, so that the
gradient is that of one large batch, clips, and updates. The learning rate is lr * warm-up * cosine from 1 to min_lr. What
is random belongs to generators whose states are saved: a run taken up from a checkpoint goes on as if never interrupted.
"""

import contextlib
import copy
import dataclasses
import json
import math
import pathlib
import resource
import signal
import sys
import threading
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastattn.models.checkpoint import CheckpointError
from fastattn.models.training import configure_optimizer
from fastattn.recipes import runs
from fastattn.recipes.data import IGNORED
from fastattn.recipes.parallel import Processes, as_part_of, whole

LOST_AFTER = 5  # updates skipped in a row, when gradients are not finite, before a run gives up


@dataclasses.dataclass(frozen=True)
class Options:
    """When to stop, how to learn, what to do every so many steps (0: never)."""

    steps: int | None = None
    minutes: float | None = None  # of training; the learning rate then follows the clock
    lr: float = 1e-3
    warmup: int = 50  # steps
    min_lr: float = 0.1  # share of lr at the end
    clip: float = 1.0  # norm of the whole gradient; 0: as it is
    skip_above: float = (
        0.0  # an update whose gradient's norm is so many times its running mean is left out; 0: none is
    )
    accumulate: int = 1
    bf16: bool = False
    compile: bool = False
    eval_every: int = 0
    eval_batches: int | None = None  # of the evaluations on the way; the one at the end sees everything
    sample_every: int = 0
    save_every: int = 0
    keep: int | None = 2
    log_every: int = 10
    seed: int = 0

    def __post_init__(self):
        if self.steps is None and self.minutes is None:
            raise ValueError("training needs an end: steps, minutes, or both")
        for names, least in (
            (("steps", "accumulate", "log_every", "keep", "eval_batches"), 1),
            (
                (
                    "warmup",
                    "min_lr",
                    "clip",
                    "skip_above",
                    "eval_every",
                    "sample_every",
                    "save_every",
                    "seed",
                ),
                0,
            ),
        ):
            for name in names:
                if (value := getattr(self, name)) is not None and value < least:
                    raise ValueError(f"{name} {value}: need at least {least}")
        for name in ("minutes", "lr"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} {value}: need more than 0")


class Diverged(RuntimeError):
    """Gradients stopped being finite."""


def loss_of(model, batch):
    """{name: mean loss} of a model that takes (input_ids, targets) and gives (anything, loss)."""
    return {"loss": model(batch["input_ids"], batch["targets"])[1]}


def targets_of(batch):
    """{name: number of targets} of a batch, by which the means of `loss_of` are weighed."""
    return {"loss": int((batch["targets"] != IGNORED).sum())}


def tokens_in(batch):
    """Of one rank; padding is none."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int((mask != 0).sum())


def evaluate(model, batches, processes, losses=loss_of, targets=targets_of, limit=None, bf16=False):
    """{name: mean loss over the targets} of batches.once(limit) on all ranks, without dropout."""
    total, count = {}, {}
    training = model.training
    model.eval()
    device = processes.device
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for batch, counts in batches.once(limit):
                found = losses(model, _to(batch, device))
                for name, n in targets(batch).items():
                    n = n if counts else 0
                    total[name] = total.get(name, 0.0) + (found[name].item() * n if n else 0.0)
                    count[name] = count.get(name, 0) + n
    finally:
        model.train(training)
    names = list(total)
    summed = processes.sum(*total.values(), *count.values())
    return {name: summed[i] / max(summed[len(names) + i], 1) for i, name in enumerate(names)}


def run(
    model,
    batches,
    options,
    out,
    *,
    processes=None,
    optimizer=configure_optimizer,
    losses=loss_of,
    targets=targets_of,
    validation=None,
    metrics=None,
    measured=None,
    sample=None,
    mfu=None,
    save=None,
    resume=None,
    header=None,
):
    """Train `model` in place and leave checkpoints and log.jsonl in the folder `out`.

    processes: of recipes.parallel; the one process if None. optimizer(model, lr) makes it, after the model is spread.
    losses(model, batch), targets(batch): as `loss_of` and `targets_of`. validation: Batches for eval_every;
    measured(batch): as targets(batch), where validation has means to take of more than the losses;
    metrics({name: mean}): a dict of what else to report of them. sample(model): text to show. mfu(tokens per second): the
    share of the device's peak, or None.
    save(model, folder) writes the model; its save_pretrained by default. resume: a checkpoint folder of this run, from
    which the caller has loaded the model. header: for the log.
    Returns {"step", "loss", "stopped", "checkpoint", "validation"}.
    """
    processes = processes or Processes(next(model.parameters()).device)
    return _Run(
        model, batches, options, pathlib.Path(out), processes, optimizer, losses, targets,
        validation, metrics, measured or targets, sample, mfu, save, header,
    ).run(resume)  # fmt: skip


class _Run:
    def __init__(
        self, model, batches, options, out, processes, optimizer, losses, targets,
        validation, metrics, measured, sample, mfu, save, header,
    ):  # fmt: skip
        self.batches, self.options, self.out, self.processes = batches, options, out, processes
        self.losses, self.targets, self.validation = losses, targets, validation
        self.metrics, self.measured, self.header = metrics, measured, header or {}
        self.sample, self.mfu = sample, mfu
        self.save_model = save or (lambda model, folder: model.save_pretrained(folder))
        self.plain = model
        # what a model spread over ranks is put together in, to be saved as any other
        self.skeleton = copy.deepcopy(model).to("meta") if processes.in_parts else None
        self.spread = processes.spread(model)
        self.called = torch.compile(self.spread) if options.compile else self.spread
        self.optimizer = optimizer(model, options.lr)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.step = self.tokens = 0
        self.elapsed = 0.0  # seconds of training
        self.usual_norm = None  # running mean
        self.skipped = 0  # in a row
        self.saved = self.loss = None
        self.stop_signal = None

    def run(self, resume):
        torch.manual_seed(self.options.seed + self.processes.rank)
        if resume is not None:
            self._restore(resume)
        log = None
        if self.processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
            after = self.step if resume is not None else None
            log = runs.begin_log(self.out, {"run": self.header, "step": self.step, **self._where()}, after)
        self.teller = _Teller(log, self.processes.first, self.options)
        try:
            with self._signals(), self.teller:
                stopped = self._train()
                found = self._evaluate(None) if self.validation is not None and stopped == "done" else None
                self._save()
            return {
                "step": self.step,
                "loss": self.loss,
                "stopped": stopped,
                "checkpoint": self.saved,
                "validation": found,
            }
        finally:
            if log:
                log.close()

    def _where(self):
        device = self.processes.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"torch": torch.__version__, "device": name, "processes": self.processes.world}

    def _train(self):
        o = self.options
        self.spread.train()
        began = time.perf_counter() - self.elapsed
        while True:
            signalled, now = self.processes.largest(self.stop_signal or 0, time.perf_counter() - began)
            self.elapsed = now
            progress = max(self.step / o.steps if o.steps else 0, now / 60 / o.minutes if o.minutes else 0)
            if signalled:
                return signal.Signals(int(signalled)).name
            if progress >= 1:
                return "done"
            self._step(progress)
            due = lambda every: every and self.step % every == 0  # noqa: E731
            if self.validation is not None and due(o.eval_every) and self.step != o.steps:
                self._evaluate(o.eval_batches)
            if self.sample is not None and due(o.sample_every):
                self.teller.note({"step": self.step, "sample": self.sample(self.plain)})
            if due(o.save_every):
                self.elapsed = time.perf_counter() - began
                self._save()

    def _step(self, progress):
        o, device, began = self.options, self.processes.device, time.perf_counter()
        lr = learning_rate(o, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = [next(self.batches) for _ in range(o.accumulate)]
        counts = [self.targets(part) for part in parts]
        names = list(counts[0])
        totals = self.processes.sum(*(sum(c[name] for c in counts) for name in names))
        totals = {name: max(total, 1) for name, total in zip(names, totals, strict=True)}
        tokens = sum(map(tokens_in, parts)) * self.processes.world
        means = dict.fromkeys(names, 0.0)
        self.optimizer.zero_grad()
        for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
            with self.processes.gradients(self.spread, exchanged=i == len(parts) - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=o.bf16):
                    found = self.losses(self.called, _to(part, device))
                weighed = {name: found[name] * (count[name] / totals[name]) for name in names}
                # DDP and fully_shard take the mean over the ranks, the weights are shares of the sum
                (sum(weighed.values()) * self.processes.world).backward()
            for name in names:
                means[name] += weighed[name].detach()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, o.clip or math.inf)).item()
        updated = self._sound(norm)
        if updated:
            self.optimizer.step()
        means = dict(zip(names, self.processes.sum(*means.values()), strict=True))
        self.loss = sum(means.values())
        self.step += 1
        self.tokens += tokens
        seconds = time.perf_counter() - began
        record = {"step": self.step, "loss": self.loss}
        record |= means if len(names) > 1 else {}
        record |= {"lr": lr, "norm": norm, "ms": 1e3 * seconds, "tokens_per_s": tokens / seconds}
        record |= {"mfu": self.mfu(tokens / seconds) if self.mfu else None}
        record |= {"mib": peak_mib(device), "tokens": self.tokens}
        record |= {} if updated else {"skipped": True}
        self.teller.step(record, progress)

    def _sound(self, norm):
        """Whether to update: the gradient is finite, and not far above what is usual where skip_above asks for that."""
        if not math.isfinite(norm):
            self.skipped += 1
            if self.skipped == LOST_AFTER:
                raise Diverged(
                    f"step {self.step + 1}: the gradient is not finite for the {LOST_AFTER}th time in a row; "
                    "take a smaller learning rate, a longer warm-up, or resume from an earlier checkpoint"
                )
            return False
        self.skipped = 0
        usual, limit = self.usual_norm, self.options.skip_above
        outlier = bool(limit and usual is not None and self.step >= 20 and norm > limit * usual)
        if not outlier:
            self.usual_norm = norm if usual is None else 0.95 * usual + 0.05 * norm
        return not outlier

    def _evaluate(self, limit):
        found = evaluate(
            self.called, self.validation, self.processes, self.losses, self.measured, limit, self.options.bf16
        )
        found |= self.metrics(found) if self.metrics else {}
        self.teller.note({"step": self.step, "validation": found})
        return found

    def _save(self):
        """All ranks put the tensors together, the first writes them."""
        if self.saved is not None and self.saved == self.out / f"step-{self.step:07d}":
            return
        model, tensors = self._whole_model(), {}
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer/{self.names[id(p)]}/{key}"] = whole(value)
        for name, get in self._generators().items():
            for rank, state in enumerate(self.processes.gathered(get())):
                tensors[f"generator/{name}/{rank}"] = state
        stood = (
            self.step,
            self.tokens,
            self.batches.position,
            self.elapsed,
            self.usual_norm,
            self.loss,
            self.header,
        )
        if self.processes.first:
            with runs.new_checkpoint(self.out, self.step, self.options.keep) as folder:
                self.save_model(model, folder)
                runs.write_training(folder, dict(zip(runs.STOOD, stood, strict=True)), tensors)
        if self.skeleton is not None:
            self.skeleton.to("meta")
        self.processes.sum(0)  # the others wait for the first: what is returned or read next is in place
        self.saved = self.out / f"step-{self.step:07d}"
        self.teller.note({"step": self.step, "checkpoint": str(self.saved)})

    def _whole_model(self):
        if self.skeleton is None:
            return self.plain
        state = {name: whole(t) for name, t in self.plain.state_dict().items()}
        self.skeleton.load_state_dict(state, assign=True)
        return self.skeleton

    def _generators(self):
        found = {"cpu": torch.get_rng_state}
        if self.processes.device.type == "cuda":
            found["cuda"] = lambda: torch.cuda.get_rng_state(self.processes.device)
        return found

    def _restore(self, folder):
        numbers, tensors = runs.read_training(folder)
        state, problems = {}, []
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            prefix = f"optimizer/{self.names[id(p)]}/"
            found = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            if any(t.dim() and t.shape != p.shape for t in found.values()) or (numbers["step"] and not found):
                problems.append(self.names[id(p)])
            state[i] = {key: as_part_of(t, p.detach()) if t.dim() else t for key, t in found.items()}
        if problems:
            raise CheckpointError(
                f"{folder / runs.TENSORS}: holds no optimizer state that fits {', '.join(problems[:6])}"
            )
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        rank = self.processes.rank
        if (name := f"generator/cpu/{rank}") in tensors:
            torch.set_rng_state(tensors[name])
        if self.processes.device.type == "cuda" and (name := f"generator/cuda/{rank}") in tensors:
            torch.cuda.set_rng_state(tensors[name], self.processes.device)
        self.step, self.tokens, self.elapsed = numbers["step"], numbers["tokens"], numbers["elapsed"]
        self.usual_norm, self.loss = numbers["usual_norm"], numbers["loss"]
        self.batches.position = numbers["position"]
        self.saved = folder

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame):
            if self.stop_signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self.stop_signal = number

        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def learning_rate(options, step, progress):
    """Linear warm-up times a cosine from 1 at the beginning of the run to min_lr at its end."""
    warm = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return options.lr * warm * (options.min_lr + (1 - options.min_lr) * cosine)


def peak_mib(device):
    """The most memory so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def _to(batch, device):
    return {name: t.to(device, non_blocking=True) for name, t in batch.items()}


class _Teller:
    """What a run says: a line in the log for every step; on rank 0 a line to read every log_every, a bar on a terminal."""

    def __init__(self, log, speaks, options):
        self.log, self.speaks, self.options = log, speaks, options
        self.console = Console(highlight=False)
        self.bar = None

    def __enter__(self):
        if self.speaks and self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.task = self.bar.add_task("", total=1.0)
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def step(self, record, progress):
        if not self.speaks:
            return
        self._write(record)
        if self.bar:
            self.bar.update(self.task, completed=progress)
        if record["step"] % self.options.log_every == 0 or record["step"] == 1 or "skipped" in record:
            mfu = f"{record['mfu']:.1%}" if record.get("mfu") is not None else "n/a"
            self._say(
                f"step {record['step']:6d}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
                f"norm {record['norm']:.2f}  {record['ms']:.0f} ms  {record['tokens_per_s']:,.0f} tokens/s  "
                f"MFU {mfu}  {record['mib']:,.0f} MiB" + ("  skipped" if "skipped" in record else "")
            )

    def note(self, record):
        if not self.speaks:
            return
        self._write(record)
        for what in ("validation", "checkpoint", "sample"):
            if what in record:
                value = record[what]
                if isinstance(value, dict):
                    value = ", ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in value.items())
                self._say(f"step {record['step']:6d}  {what}: {value}")

    def _write(self, record):
        self.log.write(json.dumps(record) + "\n")

    def _say(self, line):
        self.console.print(line, markup=False, soft_wrap=True)
