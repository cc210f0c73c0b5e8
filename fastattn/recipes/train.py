"""Training from nothing: a GPT on next tokens, a BERT on covered tokens and next sentences. What `fastattn train` runs.

done = train(Settings(model="gpt", size="tiny", minutes=3, out="out"))
"""

import dataclasses
import hashlib
import math
import warnings

import torch
from torch.nn.functional import cross_entropy

from fastattn.models import bert, gpt
from fastattn.models.training import configure_optimizer
from fastattn.recipes import data, loop, masking, parallel, runs, tokens

FIXED = ("model", "size", "data", "tokenizer", "vocab", "block", "dropout", "whole_words", "held_out", "seed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. None takes what suits: `block` the model's positions, `lr` 0.02 / sqrt(width), `warmup` a twentieth of the
    steps, `dropout` 0 for a GPT and 0.1 for a BERT."""

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
    dropout: float | None = None
    whole_words: bool = False  # bert
    clip: float = 1.0
    skip_above: float = 0.0
    accumulate: int = 1
    bf16: bool = False
    compile: bool = False
    recompute: bool = False  # gpt
    held_out: float = 0.05
    eval_every: int = 250
    eval_batches: int = 20
    sample_every: int = 0  # gpt
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    overfit: bool = False  # the first batch over and over
    seed: int = 0


def resumed(settings, given, fixed=FIXED):
    """The settings of the run in settings.out with those named in `given` laid over them, none of which may be `fixed`."""
    if not runs.checkpoints(settings.out):
        raise ValueError(f"--out {settings.out}: there is no run to go on with; leave out --resume")
    stored = runs.read_training(runs.newest(settings.out))[0]["run"]
    known = {f.name for f in dataclasses.fields(settings)}
    before = type(settings)(**{name: value for name, value in stored.items() if name in known})
    for name in fixed:
        wanted = getattr(settings, name)
        if name in given and wanted != getattr(before, name):
            raise ValueError(
                f"{flag(name)} {wanted}: the run in {settings.out} was started with {getattr(before, name)}; "
                "leave it out, or begin a new run with another --out"
            )
    return dataclasses.replace(before, **{name: getattr(settings, name) for name in {"out", *given}})


def flag(name):
    return "--" + name.replace("_", "-")


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
    _possible(settings)
    if settings.model not in KINDS:
        raise ValueError(f"model {settings.model!r}: need one of {', '.join(KINDS)}")
    kind = KINDS[settings.model](settings)
    if settings.size not in kind.sizes:
        raise ValueError(f"--size {settings.size}: need one of {', '.join(kind.sizes)}")
    if not resume and runs.checkpoints(settings.out):
        raise ValueError(
            f"--out {settings.out}: holds a run already; --resume goes on with it, another --out begins anew"
        )
    folder = runs.newest(settings.out) if resume else None
    texts = data.documents(settings.data)
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if resume:
        _can_go_on(settings, folder, fingerprint)
    texts, held_out = data.split(texts, settings.held_out, settings.seed)
    torch.manual_seed(settings.seed)  # the same weights on every rank
    if resume:
        model = kind.read(folder)
        tokenizer = tokens.beside(folder, model.config.vocab_size)
    else:
        tokenizer = _tokenizer(settings, texts)
        model = kind.fresh(tokenizer)
    if settings.recompute:
        model.checkpointing = True
    options = _options(settings, kind.width(model))
    length = settings.block or kind.positions(model)
    shared = dict(seed=settings.seed, rank=processes.rank, world=processes.world)
    samples = kind.samples(texts, tokenizer, length)
    batches = kind.batches(samples, only_first=settings.overfit, **shared)
    validation = None
    if held_out:
        try:
            validation = kind.batches(kind.samples(held_out, tokenizer, length), **shared)
        except data.DataError as e:
            raise data.DataError(f"--held-out {settings.held_out}: {e}; 0 trains without validation") from e

    def save(model, folder):
        model.save_pretrained(folder)
        tokenizer.save(folder)

    return lambda: loop.run(
        model.to(processes.device),
        batches,
        options,
        settings.out,
        processes=processes,
        optimizer=lambda model, lr: configure_optimizer(
            model, lr, weight_decay=settings.weight_decay, betas=kind.betas
        ),
        losses=kind.losses,
        targets=kind.targets,
        validation=validation,
        measured=kind.measured,
        metrics=lambda found: kind.metrics(found, held_out, validation.samples),
        sample=lambda model: kind.sample(model, tokenizer, processes.device),
        mfu=lambda speed: model.mfu(speed, length, processes.world),
        save=save,
        resume=folder,
        header=dataclasses.asdict(settings) | {"fingerprint": fingerprint},
    )


class NextTokens:
    """A GPT on blocks of packed documents that do not see each other."""

    sizes, betas = gpt.SIZES, (0.9, 0.95)

    def __init__(self, settings):
        self.settings = settings

    def fresh(self, tokenizer):
        size = dict(gpt.SIZES[self.settings.size]) | {"vocab_size": _rows(tokenizer)}
        if self.settings.block:
            size["n_positions"] = self.settings.block
        ends = dict(eos_token_id=tokenizer.sep_id, pad_token_id=tokenizer.special["pad"])
        return gpt.GPT(gpt.GPTConfig(dropout=self.settings.dropout or 0.0, **ends, **size))

    def read(self, folder):
        return gpt.GPT.from_pretrained(folder)

    def width(self, model):
        return model.config.n_embd

    def positions(self, model):
        return model.config.n_positions

    def samples(self, texts, tokenizer, length):
        return data.Blocks(texts, tokenizer, length)

    def batches(self, samples, **options):
        return data.Batches(samples, self.settings.batch, data.packed, **options)

    def losses(self, model, batch):
        ids, bounds = batch["input_ids"], batch.get("cu_seqlens")
        where = {} if bounds is None else {"cu_seqlens": bounds, "longest": ids.shape[1]}
        return {"loss": model(ids, batch["targets"], **where)[1]}

    targets = measured = staticmethod(loop.targets_of)

    def metrics(self, found, texts, samples):
        """Every byte is predicted once, in blocks that begin without context."""
        per_byte = len(samples.tokens) / sum(len(text.encode()) for text in texts)
        return {"bits_per_byte": found["loss"] / math.log(2) * per_byte}

    def sample(self, model, tokenizer, device):
        ids = torch.tensor([tokenizer.encode("The ")], device=device)
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        room = min(200, model.config.n_positions - ids.shape[1])
        made = model.generate(ids, room, temperature=0.8, top_k=40, generator=generator)
        return tokenizer.decode(made[0].tolist())


class MaskedPairs:
    """A BERT on pairs of texts: covered tokens (mlm) and whether the second follows the first (nsp)."""

    sizes, betas = bert.SIZES, (0.9, 0.98)

    def __init__(self, settings):
        self.settings = settings
        if settings.sample_every:
            raise ValueError("--sample-every: a BERT writes no text; leave it out")
        if settings.recompute:
            raise ValueError("--recompute: is for gpt; leave it out")

    def fresh(self, tokenizer):
        size = dict(bert.SIZES[self.settings.size]) | {"vocab_size": _rows(tokenizer)}
        if self.settings.block:
            size["max_position_embeddings"] = self.settings.block
        p = 0.1 if self.settings.dropout is None else self.settings.dropout
        drop = dict(hidden_dropout_prob=p, attention_probs_dropout_prob=p)
        return bert.BERTForPreTraining(bert.BERTConfig(pad_token_id=tokenizer.pad_id, **drop, **size))

    def read(self, folder):
        return bert.BERTForPreTraining.from_pretrained(folder)

    def width(self, model):
        return model.config.hidden_size

    def positions(self, model):
        return model.config.max_position_embeddings

    def samples(self, texts, tokenizer, length):
        return masking.Pairs(texts, tokenizer, length, self.settings.whole_words)

    def batches(self, samples, **options):
        return data.Batches(samples, self.settings.batch, draw=samples.draw, **options)

    def losses(self, model, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        (logits_MV, logits_B2), mlm = model(**inputs, labels=batch["targets"])
        found = {"mlm": mlm, "nsp": cross_entropy(logits_B2.float(), batch["next_sentence"])}
        if not model.training:
            right = logits_MV.argmax(-1) == batch["targets"][batch["targets"] != data.IGNORED]
            follows = logits_B2.argmax(-1) == batch["next_sentence"]
            found |= {"mlm_accuracy": right.float().mean(), "nsp_accuracy": follows.float().mean()}
        return found

    def targets(self, batch):
        return {"mlm": int((batch["targets"] != data.IGNORED).sum()), "nsp": len(batch["targets"])}

    def measured(self, batch):
        counts = self.targets(batch)
        return counts | {f"{name}_accuracy": n for name, n in counts.items()}

    def metrics(self, found, texts, samples):
        return {}

    def sample(self, model, tokenizer, device):
        return None


KINDS = {"gpt": NextTokens, "bert": MaskedPairs}


def _possible(settings):
    for name, low, high in (
        ("batch", 1, math.inf), ("block", 2, math.inf), ("held_out", 0, 0.5), ("dropout", 0, 0.99),
        ("weight_decay", 0, math.inf), ("seed", 0, 2**63 - 1),
    ):  # fmt: skip
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{flag(name)} {value}: need {low} to {high}")


def _rows(tokenizer):
    """Of the token table: multiples of 64 make the head's products faster on a GPU, and nothing has the ids in excess."""
    n = tokenizer.vocab_size
    return n if n < 1024 else -(-n // 64) * 64


def _options(settings, width):
    shared = {f.name for f in dataclasses.fields(loop.Options)}
    options = {name: value for name, value in dataclasses.asdict(settings).items() if name in shared}
    if settings.lr is None:
        options["lr"] = 0.02 / math.sqrt(width)
    if settings.warmup is None:
        options["warmup"] = max(1, settings.steps // 20) if settings.steps else 50
    return loop.Options(**options)


def _can_go_on(settings, folder, fingerprint):
    stood = runs.read_training(folder)[0]
    if stood["run"].get("fingerprint") != fingerprint:
        raise ValueError(
            f"--data {settings.data or '(default)'}: is not the text that {folder} was trained on"
        )
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
