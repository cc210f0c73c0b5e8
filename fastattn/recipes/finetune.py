"""Fine-tuning on a task: what `fastattn finetune` runs.

done = finetune(Settings(task="classify", model="folder of a checkpoint", data="reviews.csv", out="out"))
done["scores"], done["trivial"], done["checkpoint"]
"""

import dataclasses
import hashlib
import json
import math
import warnings

import torch

from fastattn.models.checkpoint import replacing
from fastattn.models.training import configure_optimizer
from fastattn.recipes import data, examples, loop, parallel, pretrained, runs, tokens
from fastattn.recipes.tasks import TASKS, task_for

SCORES = "scores.json"
FIXED = (
    "task",
    "model",
    "size",
    "data",
    "valid",
    "tokenizer",
    "vocab",
    "max_length",
    "overlap",
    "dropout",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. None takes what suits: a fresh model has `lr` 0.02 / sqrt(width), 6 `epochs`, no dropout; a trained one a tenth
    of that rate, 3 epochs, and its own dropout."""

    task: str = "classify"
    model: str | None = None  # a folder, or gpt or bert for a fresh one; bert, for instruct gpt
    out: str = "out"
    size: str = "tiny"  # of a fresh model
    data: str | None = None  # .jsonl or .csv; else examples that are made up
    valid: str | None = None  # the same; else a tenth of data
    tokenizer: str | None = None  # for a fresh model: else a BPE of `vocab` ids is learned from the data
    vocab: int = 1024
    max_length: int | None = None  # pieces of a sample: 384, or the model's positions if fewer
    overlap: int = 32  # qa: pieces that neighbouring windows of a context share
    pack: bool = False  # instruct: a batch without padding
    batch: int = 16
    epochs: float | None = None
    steps: int | None = None  # instead of epochs
    lr: float | None = None
    warmup: int | None = None  # a tenth of the steps
    weight_decay: float = 0.01
    dropout: float = 0.0  # of a fresh model
    clip: float = 1.0
    accumulate: int = 1
    bf16: bool = False
    compile: bool = False
    eval_every: int = 0
    save_every: int = 0
    keep: int = 1
    log_every: int = 20
    seed: int = 0


def finetune(settings, device=None, resume=False, kind="ddp"):
    """Run it on `device`; resume: from the newest checkpoint in settings.out. Returns what loop.run does, and the scores of
    the model and of tasks.trivial on what was held out."""
    with parallel.processes(torch.device(device or "cpu"), kind) as processes:
        return prepare(settings, processes, resume)()


def prepare(settings, processes, resume=False):
    """Everything that can be wrong with a run is found here, before anything is written; what comes back starts it."""
    import safetensors.torch  # noqa: F401  its lack is better known now than at the first checkpoint

    # no model here adds in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    if settings.task not in TASKS:
        raise ValueError(f"task {settings.task!r}: need one of {', '.join(TASKS)}")
    if not resume and runs.checkpoints(settings.out):
        raise ValueError(
            f"--out {settings.out}: holds a run already; --resume goes on with it, another --out begins anew"
        )
    folder = runs.newest(settings.out) if resume else None
    learned, held = _rows(settings)
    fingerprint = hashlib.sha256(json.dumps([learned, held]).encode()).hexdigest()
    if resume and runs.read_training(folder)[0]["run"].get("fingerprint") != fingerprint:
        raise ValueError(f"--data {settings.data or '(default)'}: is not what {folder} was trained on")
    labels_of = getattr(TASKS[settings.task], "labels_of", lambda rows: None)
    labels = labels_of(learned)
    if labels is not None and len(labels) < 2:
        raise data.DataError(
            f"{settings.data}: all examples have the label {labels[0]!r}, so there is nothing to learn"
        )
    torch.manual_seed(settings.seed)  # the same new weights on every rank
    is_fresh = settings.model in (None, "gpt", "bert")
    if resume:
        model, tokenizer = pretrained.started(folder, settings.task, labels)
    elif is_fresh:
        model, tokenizer = _fresh(settings, labels, learned)
    else:
        model, tokenizer = pretrained.started(settings.model, settings.task, labels, settings.tokenizer)
    room = pretrained.positions(model)
    length = min(room, 384) if settings.max_length is None else settings.max_length
    if not 0 < length <= room:
        raise ValueError(f"--max-length {length}: the model reads 1 to {room} positions")
    types = pretrained.has_types(model)
    task = task_for(settings.task, tokenizer, length, labels, types, settings.overlap, settings.pack)
    samples = task.samples(learned)
    shared = dict(collate=task.collate, seed=settings.seed, rank=processes.rank, world=processes.world)
    batches = data.Batches(samples, settings.batch, **shared)
    validation = data.Batches(task.samples(held), settings.batch, **shared)
    options = _options(settings, model, is_fresh, len(samples), processes.world)

    def start():
        done = loop.run(
            model.to(processes.device),
            batches,
            options,
            settings.out,
            processes=processes,
            optimizer=lambda model, lr: configure_optimizer(
                model, lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
            ),
            losses=task.loss,
            targets=task.targets,
            validation=validation,
            save=lambda model, folder: pretrained.save(model, folder, tokenizer),
            resume=folder,
            header=dataclasses.asdict(settings) | {"fingerprint": fingerprint},
        )
        if processes.first and done["stopped"] == "done":
            done |= _scored(settings, task, done["checkpoint"], processes.device, learned, held)
        return done

    return start


def _rows(settings):
    """(to learn from, held out)."""
    if settings.data is None:
        if settings.valid is not None:
            raise ValueError(f"--valid {settings.valid}: needs --data too")
        return examples.made(settings.task, 2000), examples.made(settings.task, 300, seed=1, held_out=True)
    rows = examples.read(settings.data, settings.task)
    if settings.valid is not None:
        return rows, examples.read(settings.valid, settings.task)
    held = max(1, len(rows) // 10)
    if len(rows) < 2:
        raise data.DataError(
            f"{settings.data}: one example cannot be learned from and held out; give --valid"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def _fresh(settings, labels, rows):
    kind = settings.model or ("gpt" if settings.task == "instruct" else "bert")
    pretrained.model_class(kind, settings.task)  # says no before a tokenizer is learned
    if settings.tokenizer is not None:
        tokenizer = tokens.load(settings.tokenizer)
    else:
        tokenizer = tokens.train_bpe(map(examples.text, rows), settings.vocab)
    length, dropout = settings.max_length, settings.dropout
    return pretrained.fresh(kind, settings.size, settings.task, tokenizer, labels, length, dropout), tokenizer


def _options(settings, model, is_fresh, samples, world):
    a_step = settings.batch * settings.accumulate * world
    epochs = settings.epochs or (6 if is_fresh else 3)
    steps = settings.steps or math.ceil(epochs * samples / a_step)
    width = model.config.n_embd if hasattr(model.config, "n_embd") else model.config.hidden_size
    given = dataclasses.asdict(settings)
    options = {f.name: given[f.name] for f in dataclasses.fields(loop.Options) if f.name in given}
    options |= {"steps": steps, "keep": settings.keep}
    if settings.lr is None:
        options["lr"] = (0.02 if is_fresh else 0.002) / math.sqrt(width)
    if settings.warmup is None:
        options["warmup"] = max(1, steps // 10)
    return loop.Options(**options)


def _scored(settings, task, checkpoint, device, learned, held):
    """Of the checkpoint as it was written, so that what is scored is what is there."""
    model, _ = pretrained.opened(checkpoint, settings.task)
    found = {
        "scores": task.scores(task.predict(model.to(device), held), held),
        "trivial": task.scores(task.trivial(learned, held), held),
        "examples": len(held),
    }
    with replacing(checkpoint.parent / SCORES) as file:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found
