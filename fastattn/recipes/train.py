"""Training from nothing: a GPT on next tokens. What `fastattn train` runs.

done = train(Settings(model="gpt", size="tiny", minutes=3, out="out"))
"""

import dataclasses
import hashlib
import math
import warnings

import torch

from fastattn.models import checkpoint
from fastattn.models.gpt import GPT, GPTConfig
from fastattn.models.gpt import SIZES as GPT_SIZES
from fastattn.recipes import data, loop, parallel, runs, tokens

SIZES = {"gpt": GPT_SIZES}
FIXED = ("model", "size", "data", "tokenizer", "vocab", "block", "dropout", "held_out", "seed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. None takes what suits the model: `block` its positions, `lr` 0.02 / sqrt(width), `warmup` a twentieth."""

    model: str = "gpt"
    out: str = "out"
    size: str = "tiny"
    data: str | None = None  # Python's own documentation
    tokenizer: str = "bytes"
    vocab: int | None = None  # learn a byte-level BPE of that many ids from the data
    block: int | None = None
    batch: int = 16  # samples a step and process, before `accumulate`
    steps: int | None = None
    minutes: float | None = None
    lr: float | None = None
    warmup: int | None = None
    min_lr: float = 0.1
    weight_decay: float = 0.1
    dropout: float = 0.0
    clip: float = 1.0
    skip_above: float = 0.0
    accumulate: int = 1
    bf16: bool = False
    compile: bool = False
    held_out: float = 0.05
    eval_every: int = 250
    eval_batches: int = 20
    sample_every: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    overfit: bool = False  # the first batch over and over
    seed: int = 0


def resumed(settings, given, fixed=FIXED):
    """The settings of the run in settings.out with those named in `given` laid over them, none of which may be `fixed`."""
    if not runs.checkpoints(settings.out):
        raise ValueError(f"--out {settings.out}: there is no run to go on with; leave out --resume")
    folder = runs.newest(settings.out)
    stored = runs.read_training(folder)[0].get("run", {})
    known = {f.name for f in dataclasses.fields(settings)}
    before = type(settings)(**{name: value for name, value in stored.items() if name in known})
    for name in fixed:
        wanted = getattr(settings, name)
        if name in given and wanted != getattr(before, name):
            raise ValueError(
                f"--{name} {wanted}: the run in {settings.out} was started with {getattr(before, name)}; "
                "leave it out, or begin a new run with another --out"
            )
    return dataclasses.replace(before, **{name: getattr(settings, name) for name in {"out", *given}})


def train(settings, device=None, resume=False, kind="ddp"):
    """Run it on `device`; resume: from the newest checkpoint in settings.out. Returns what loop.run does."""
    with parallel.processes(torch.device(device or "cpu"), kind) as processes:
        return prepare(settings, processes, resume)()


def prepare(settings, processes, resume=False):
    """Everything that can be wrong with a run is found here, before anything is written; what comes back starts it."""
    import safetensors.torch  # noqa: F401  its lack is better known now than at the first checkpoint

    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module .* returned a view"
    )  # no model here adds in place
    if settings.model not in SIZES:
        raise ValueError(f"model {settings.model!r}: need one of {', '.join(SIZES)}")
    if settings.size not in SIZES[settings.model]:
        raise ValueError(f"--size {settings.size}: need one of {', '.join(SIZES[settings.model])}")
    if not resume and runs.checkpoints(settings.out):
        raise ValueError(
            f"--out {settings.out}: holds a run already; --resume goes on with it, another --out begins anew"
        )
    folder = runs.newest(settings.out) if resume else None
    options = _options(settings)
    if resume:
        _unfinished(settings, folder)
    texts, held_out = data.split(data.documents(settings.data), settings.held_out, settings.seed)
    torch.manual_seed(settings.seed)  # the same weights on every rank
    if resume:
        model = _read_gpt(folder)
        tokenizer = tokens.beside(folder, model.config.vocab_size)
    else:
        tokenizer = _tokenizer(settings, texts)
        model = _gpt(settings, tokenizer)
    length = settings.block or model.config.n_positions
    blocks = data.Blocks(texts, tokenizer, length)
    fingerprint = hashlib.sha256(blocks.tokens.tobytes()).hexdigest()
    if resume and runs.read_training(folder)[0]["run"].get("fingerprint") != fingerprint:
        raise ValueError(
            f"--data {settings.data or '(default)'}: is not the text that {folder} was trained on"
        )
    shared = dict(seed=settings.seed, rank=processes.rank, world=processes.world)
    batches = data.Batches(blocks, settings.batch, only_first=settings.overfit, **shared)
    validation, metrics = None, None
    if held_out:
        try:
            kept = data.Blocks(held_out, tokenizer, length)
        except data.DataError as e:
            raise data.DataError(f"--held-out {settings.held_out}: {e}; 0 trains without validation") from e
        validation = data.Batches(kept, settings.batch, **shared)
        ratio = len(kept.tokens) / sum(len(text.encode()) for text in held_out) / math.log(2)
        metrics = lambda found: {"bits_per_byte": found["loss"] * ratio}  # noqa: E731

    def sample(model):
        ids = torch.tensor([tokenizer.encode("The ")], device=processes.device)
        generator = torch.Generator(processes.device).manual_seed(settings.seed)
        room = min(200, model.config.n_positions - ids.shape[1])
        made = model.generate(ids, room, temperature=0.8, top_k=40, generator=generator)
        return tokenizer.decode(made[0].tolist())

    def save(model, folder):
        checkpoint.write(folder, dataclasses.asdict(model.config), model.state_dict())
        tokenizer.save(folder)

    return lambda: loop.run(
        model.to(processes.device),
        batches,
        options,
        settings.out,
        processes=processes,
        optimizer=lambda model, lr: loop.adamw(model, lr, settings.weight_decay),
        validation=validation,
        metrics=metrics,
        sample=sample,
        save=save,
        resume=folder,
        header=dataclasses.asdict(settings) | {"fingerprint": fingerprint},
    )


def _options(settings):
    width = SIZES[settings.model][settings.size]["n_embd"]
    shared = {f.name for f in dataclasses.fields(loop.Options)}
    options = {name: value for name, value in dataclasses.asdict(settings).items() if name in shared}
    if settings.lr is None:
        options["lr"] = 0.02 / math.sqrt(width)
    if settings.warmup is None:
        options["warmup"] = max(1, settings.steps // 20) if settings.steps else 50
    return loop.Options(**options)


def _unfinished(settings, folder):
    stood = runs.read_training(folder)[0]
    steps, minutes = settings.steps or math.inf, settings.minutes or math.inf
    if stood["step"] >= steps or stood["elapsed"] >= 60 * minutes:
        raise ValueError(
            f"--out {settings.out}: its run is at its end, step {stood['step']} after "
            f"{stood['elapsed'] / 60:.1f} minutes; ask for more --steps or --minutes"
        )


def _tokenizer(settings, texts):
    if settings.vocab is None:
        return tokens.load(settings.tokenizer)
    if settings.tokenizer != "bytes":
        raise ValueError("--vocab learns a tokenizer and --tokenizer names one: give one of them")
    return tokens.train_bpe(texts, settings.vocab)


def _gpt(settings, tokenizer):
    size = dict(GPT_SIZES[settings.size])
    if settings.block:
        size["n_positions"] = settings.block
    # rows beyond the tokenizer's are never a target; multiples of 64 make the head's products faster on a GPU
    size["vocab_size"] = (
        tokenizer.vocab_size if tokenizer.vocab_size < 1024 else -(-tokenizer.vocab_size // 64) * 64
    )
    return GPT(GPTConfig(dropout=settings.dropout, **size))


def _read_gpt(folder):
    config, state = checkpoint.read(folder)
    model = GPT(GPTConfig(**config))
    checkpoint.load_into(model, state)
    return model
