"""The `fastattn` command: info, check, bench, report; train, finetune, eval, generate, chat, embed. Everything it runs is importable; this file only prints."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import platform
import sys
import warnings
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastattn
from fastattn import backend, check_cases
from fastattn.models.checkpoint import replacing
from fastattn.recipes import embed as embedding
from fastattn.recipes import evaluate as evaluating
from fastattn.recipes import finetune as finetuning
from fastattn.recipes import generate as generating
from fastattn.recipes import pretrained
from fastattn.recipes.chat import Conversation
from fastattn.recipes.loop import Diverged
from fastattn.recipes.parallel import processes
from fastattn.recipes.train import Settings, prepare, resumed

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=fastattn.__doc__
)
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu; by default a GPU where torch sees one.")]
Op = Annotated[list[str] | None, typer.Option(help="Only these; may be given several times.")]
Out = Annotated[pathlib.Path, typer.Option(help="Folder of the results.")]


def _console(width=180):
    # Into a file or a pipe a table would be cut at 80 columns.
    return Console(width=None if sys.stdout.isatty() else width)


def _device(name):
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise typer.BadParameter(f"--device {name}: need cuda, cuda:1, ... or cpu") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {name}: torch {torch.__version__} sees no such device")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@app.command()
def info():
    """Versions, GPUs, what each backend can do here and why not."""
    console = _console()
    console.print(
        f"fastattn {fastattn.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    console.print(f"triton: {_triton()}")
    console.print(f"CUDA extension: {_extension()}")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for index in gpus:
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        console.print(
            f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
        )
    if not gpus:
        console.print(
            "GPU: none that torch sees. CPU tensors take stock torch; Triton serves them through its interpreter on request."
        )
    device = _device("")
    explained = check_cases.explained(device)
    console.print(_support(explained))
    refusals = {}
    for function, (_, sentences) in explained.items():
        for name, sentence in sentences.items():
            if sentence.startswith("refused, ") and not _unwritten(sentence):
                refusals.setdefault((name, sentence.removeprefix("refused, ")), []).append(function)
    for (name, sentence), functions in refusals.items():
        console.print(
            f"On {device}, {name} refuses {', '.join(functions)}: {sentence}", markup=False, highlight=False
        )
    for index in gpus:
        device = torch.device("cuda", index)
        seen = backend.verdict(device)
        console.print(
            f"Verdict of `fastattn check` on GPU {index}: "
            + (
                "; ".join(f"{name}: {', '.join(ops)}" for name, ops in seen.items())
                if seen
                else "none yet; run it once"
            )
        )


def _triton():
    if not backend.triton_found():
        return "not found (pip install triton)"
    import triton

    return triton.__version__


def _extension():
    found = importlib.util.find_spec("fastattn._C")
    if found is None:
        return "not built (nvcc and pybind11 were missing at install, or FASTATTN_CUDA=0)"
    from fastattn import _C

    return f"{found.origin}, built for {getattr(_C, 'archs', 'unknown architectures')}"


def _unwritten(sentence):
    return sentence.endswith("implementation yet")


def _support(explained):
    """Which function each backend has, and on which GPUs it has been seen right."""
    table = Table(title="Functions and backends", title_justify="left")
    for heading in ("function", "cuda", "triton", "torch"):
        table.add_column(heading)
    for function, (op, sentences) in explained.items():
        cells = []
        for name in ("cuda", "triton"):
            cards = ", ".join(
                f"{major}.{minor}" for major, minor in sorted(backend.PROVEN.get((name, op), ()))
            )
            seen = f"seen right on compute capability {cards}" if cards else "never run on a GPU"
            cells.append("–" if _unwritten(sentences[name]) else seen)
        table.add_row(function, *cells, "stock torch")
    return table


@app.command()
def check(device: Device = "", op: Op = None):
    """Numerics of every op on every backend in every dtype, forward and backward, against float64."""
    warnings.simplefilter("ignore", backend.FallbackWarning)
    console, where = _console(), _device(device)
    known = list(dict.fromkeys(case.function for case in check_cases.CASES))
    if unknown := [name for name in op or () if name not in known]:
        raise typer.BadParameter(f"--op {unknown[0]}: need one of {', '.join(known)}")
    results, skipped = check_cases.check_all(
        where,
        op or None,
        lambda found, total: track(found, "checking", total=total, console=console, transient=True),
    )
    table = Table(
        title=f"fastattn check on {where}: forward and backward within the rule", title_justify="left"
    )
    columns = list(dict.fromkeys((r.backend, r.dtype) for r in results))
    for heading in ("function", "case", *(f"{name}\n{dtype}" for name, dtype in columns)):
        table.add_column(heading)
    for function, label in dict.fromkeys((r.function, r.label) for r in results):
        states = {
            (r.backend, r.dtype): r.state for r in results if (r.function, r.label) == (function, label)
        }
        table.add_row(function, label, *(PAINTED[states[column]] for column in columns))
    console.print(table)
    wrong = [r for r in results if r.state == "wrong"]
    for sentence in dict.fromkeys(
        f"{r.backend} {r.state} {r.function}: {r.sentence}" for r in results if r.sentence
    ):
        console.print(f"- {sentence}", markup=False, highlight=False)
    for sentence in skipped:
        console.print(sentence)
    if where.type == "cpu":
        console.print("Triton ran in its interpreter: numerics only, no GPU was involved.")
    elif op:
        console.print("No verdict is written: that takes a run of all functions.")
    else:
        path, ops = check_cases.record(where, results)
        console.print(f"Verdict written to {path}: {ops}. Ops listed there are now the default on this card.")
    console.print(f"{len(wrong)} wrong of {len(results)}.", style="bold red" if wrong else "bold green")
    raise typer.Exit(bool(wrong))


PAINTED = {
    "right": "[green]right[/]",
    "wrong": "[bold red]WRONG[/]",
    "refused": "[yellow]refused[/]",
    "uncompared": "[dim]–[/]",
}


@app.command()
def bench(
    device: Device = "",
    op: Op = None,
    host: Annotated[
        bool, typer.Option("--host", help="Only what Python costs before a kernel starts.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller shapes.")] = False,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="Norms, softmax and positions alone, at many shapes and in every dtype."
        ),
    ] = False,
    out: Out = pathlib.Path("bench-out"),
    data: Annotated[pathlib.Path | None, typer.Option(help="Text to train the GPT on.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds after which no further op is started.")] = None,
):
    """Each op and a GPT's training against eager PyTorch: checked, then timed; a table, CSV, JSON and plots."""
    from fastattn.benchmarks import run

    warnings.simplefilter("ignore", backend.FallbackWarning)
    if unknown := [name for name in op or () if name not in run.EVERYTHING]:
        raise typer.BadParameter(f"--op {unknown[0]}: need one of {', '.join(run.EVERYTHING)}")
    if data is not None and not data.is_file():
        raise typer.BadParameter(f"--data {data}: no such file")
    chosen = ["host"] if host else op or (run.OPS if sweep else run.EVERYTHING)
    # a GPU's rows have more columns
    failures = run.run(_console(270), _device(device), chosen, quick, out, data, limit, sweep)
    raise typer.Exit(bool(failures))


@app.command()
def report(out: Out = pathlib.Path("bench-out")):
    """One self-contained HTML page from what `fastattn bench` wrote."""
    from fastattn.benchmarks.report import html_page

    if not (out / "results.json").is_file():
        raise typer.BadParameter(f"{out} has no results.json: run `fastattn bench --out {out}` first")
    _console().print(f"Written: {html_page(out)}")


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="gpt: next tokens. bert: covered tokens and next sentences.")],
    out: Annotated[str, typer.Option(help="Folder of the run: log.jsonl and checkpoints.")] = Settings.out,
    size: Annotated[
        str, typer.Option(help="One of the model's sizes: tiny, gpt2, gpt2-medium, ...")
    ] = Settings.size,
    data: Annotated[
        str | None,
        typer.Option(
            help="A UTF-8 file, or a folder of .txt, .md and .rst; else Python's own documentation."
        ),
    ] = Settings.data,
    tokenizer: Annotated[
        str, typer.Option(help="bytes, a tokenizer.json, or a folder with one.")
    ] = Settings.tokenizer,
    vocab: Annotated[
        int | None, typer.Option(help="Learn a byte-level BPE of so many ids from the data.")
    ] = Settings.vocab,
    block: Annotated[
        int | None, typer.Option(help="Tokens a sample; by default all the model's positions.")
    ] = Settings.block,
    batch: Annotated[
        int, typer.Option(help="Samples a step and process, before --accumulate.")
    ] = Settings.batch,
    steps: Annotated[int | None, typer.Option(help="Updates after which to stop.")] = Settings.steps,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes after which to stop; 3 if --steps is not given either.")
    ] = Settings.minutes,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; by default 0.02 / sqrt(width).")
    ] = Settings.lr,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of warm-up; by default a twentieth of --steps, or 50.")
    ] = Settings.warmup,
    min_lr: Annotated[
        float, typer.Option(help="Where the cosine ends, as a share of --lr.")
    ] = Settings.min_lr,
    weight_decay: Annotated[
        float, typer.Option(help="Of matrices; biases and norms have none.")
    ] = Settings.weight_decay,
    dropout: Annotated[
        float | None, typer.Option(help="Of embeddings, attention, branches; by default 0, bert 0.1.")
    ] = Settings.dropout,
    whole_words: Annotated[
        bool, typer.Option("--whole-words", help="bert: cover all tokens of a word together.")
    ] = Settings.whole_words,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 leaves it.")] = Settings.clip,
    skip_above: Annotated[
        float,
        typer.Option(help="Leave out updates whose gradient's norm is so many times the usual; 0 takes all."),
    ] = Settings.skip_above,
    accumulate: Annotated[int, typer.Option(help="Batches an update.")] = Settings.accumulate,
    bf16: Annotated[bool, typer.Option("--bf16", help="bf16 autocast over fp32 weights.")] = Settings.bf16,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = Settings.compile,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="gpt: recompute blocks in backward, which takes less memory.")
    ] = Settings.recompute,
    held_out: Annotated[float, typer.Option(help="Share of the text to validate on.")] = Settings.held_out,
    eval_every: Annotated[
        int, typer.Option(help="Steps between validations; 0: at the end only.")
    ] = Settings.eval_every,
    eval_batches: Annotated[
        int, typer.Option(help="Batches of those; the last one takes all.")
    ] = Settings.eval_batches,
    sample_every: Annotated[
        int, typer.Option(help="gpt: steps between samples of text; 0: none.")
    ] = Settings.sample_every,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: at the end only.")
    ] = Settings.save_every,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = Settings.keep,
    log_every: Annotated[
        int, typer.Option(help="Steps between lines; the log has every step.")
    ] = Settings.log_every,
    overfit: Annotated[
        bool, typer.Option("--overfit", help="The first batch over and over.")
    ] = Settings.overfit,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.")] = Settings.seed,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from --out's last checkpoint; flags given again override its own."
        ),
    ] = False,
    parallel: Annotated[str, typer.Option(help="Under torchrun: ddp or fsdp.")] = "ddp",
    device: Device = "",
):
    """Train a model from nothing.

    SIGTERM and Ctrl-C end it with a checkpoint. On several GPUs: torchrun --nproc-per-node N -m fastattn.cli train ...
    """
    settings, given = _settings(Settings, context)
    if steps is None and minutes is None:
        settings = dataclasses.replace(settings, minutes=3.0)
    with contextlib.ExitStack() as until_the_end:
        with _in_a_line(ValueError, OSError, ImportError):
            us = until_the_end.enter_context(processes(_device(device), parallel))
            settings = resumed(settings, given) if resume else settings
            start = prepare(settings, us, resume)
        with _in_a_line(Diverged):
            done = start()
    if us.first and done["stopped"] != "done":
        _console().print(f"Stopped by {done['stopped']} at step {done['step']}; --resume goes on.")


Task = finetuning.Settings  # the defaults below are its


@app.command()
def finetune(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="classify, tokens, qa or instruct.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint's folder, or bert or gpt for a fresh one; by default bert, for instruct gpt."
        ),
    ] = Task.model,
    out: Annotated[
        str, typer.Option(help="Folder of the run: log.jsonl, checkpoints, scores.json.")
    ] = Task.out,
    size: Annotated[str, typer.Option(help="Of a fresh model: tiny, gpt2, bert-base, ...")] = Task.size,
    data: Annotated[
        str | None, typer.Option(help="Examples, .jsonl or .csv; else some that are made up here.")
    ] = Task.data,
    valid: Annotated[
        str | None, typer.Option(help="Examples to score on; else a tenth of --data, held out.")
    ] = Task.valid,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="bytes, a tokenizer.json, or a folder with one; else the checkpoint's, and for a fresh model one "
            "learned from the data."
        ),
    ] = Task.tokenizer,
    vocab: Annotated[int, typer.Option(help="Ids of that one.")] = Task.vocab,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of an example, beyond which it is cut, or qa: read in windows.")
    ] = Task.max_length,
    overlap: Annotated[
        int, typer.Option(help="qa: tokens of the context that two windows share.")
    ] = Task.overlap,
    pack: Annotated[bool, typer.Option("--pack", help="instruct: batches without padding.")] = Task.pack,
    batch: Annotated[
        int, typer.Option(help="Examples a step and process, before --accumulate.")
    ] = Task.batch,
    epochs: Annotated[
        float | None, typer.Option(help="Times through the data; by default 3, for a fresh model 6.")
    ] = Task.epochs,
    steps: Annotated[int | None, typer.Option(help="Updates after which to stop, instead.")] = Task.steps,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate; by default 0.002 / sqrt(width), for a fresh model ten times that."),
    ] = Task.lr,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of warm-up; by default a tenth of all.")
    ] = Task.warmup,
    weight_decay: Annotated[
        float, typer.Option(help="Of matrices; biases and norms have none.")
    ] = Task.weight_decay,
    dropout: Annotated[float, typer.Option(help="Of a fresh model; others have their own.")] = Task.dropout,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 leaves it.")] = Task.clip,
    accumulate: Annotated[int, typer.Option(help="Batches an update.")] = Task.accumulate,
    bf16: Annotated[bool, typer.Option("--bf16", help="bf16 autocast over fp32 weights.")] = Task.bf16,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = Task.compile,
    eval_every: Annotated[
        int, typer.Option(help="Steps between validations; 0: at the end only.")
    ] = Task.eval_every,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: at the end only.")
    ] = Task.save_every,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = Task.keep,
    log_every: Annotated[
        int, typer.Option(help="Steps between lines; the log has every step.")
    ] = Task.log_every,
    seed: Annotated[int, typer.Option(help="Of new weights, order and dropout.")] = Task.seed,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from --out's last checkpoint; flags given again override its own."
        ),
    ] = False,
    parallel: Annotated[str, typer.Option(help="Under torchrun: ddp or fsdp.")] = "ddp",
    device: Device = "",
):
    """Fine-tune a model on a task, and score it on examples held out.

    Columns of the data: classify: text (text_b), label. tokens: tokens, tags, lists of one length. qa: question, context,
    answer (answer_start). instruct: prompt, answer, or messages = [{role, content}, ...]; the loss is the answers' alone.
    """
    settings, given = _settings(Task, context)
    with contextlib.ExitStack() as until_the_end:
        with _in_a_line(ValueError, OSError, ImportError):
            us = until_the_end.enter_context(processes(_device(device), parallel))
            settings = resumed(settings, given, finetuning.FIXED) if resume else settings
            start = finetuning.prepare(settings, us, resume)
        with _in_a_line(Diverged):
            done = start()
        if not us.first:
            return
    if "scores" not in done:
        _console().print(f"Stopped by {done['stopped']} at step {done['step']}; --resume goes on.")
        return
    table = Table(title=f"{task}: {done['examples']} examples held out", title_justify="left")
    for heading in ("score", "model", "baseline"):
        table.add_column(heading)
    for name, value in done["scores"].items():
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{done['trivial'][name]:.4f}")
    _console().print(table)


Checkpoint = Annotated[str, typer.Argument(help="A checkpoint's folder, or a run's.")]
ItsTokenizer = Annotated[
    str | None,
    typer.Option(help="bytes, a tokenizer.json, or a folder with one; by default the checkpoint's."),
]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens to read at a time; by default what the model can.")
]


@app.command("eval")
def evaluate(
    model: Checkpoint,
    task: Annotated[
        str | None,
        typer.Option(
            help="lm, classify, tokens, qa or instruct; by default what the checkpoint was trained for."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="lm: text, as for `train`. Else examples, .jsonl or .csv, with the columns of `finetune`."
        ),
    ] = None,
    tokenizer: ItsTokenizer = None,
    max_length: MaxLength = None,
    json_out: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Also write the scores here.")
    ] = None,
    device: Device = "",
):
    """Perplexity and bits per byte of text; accuracy, F1, exact match of examples."""
    with _in_a_line(ValueError, OSError, ImportError):
        found = evaluating.evaluate(model, task, data, tokenizer, _device(device), max_length)
        if json_out is not None:
            with replacing(json_out) as file:
                file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{model}: {found.pop('task')}", title_justify="left")
    for heading in ("score", "value"):
        table.add_column(heading)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else f"{value:,}")
    _console().print(table)


@app.command()
def embed(
    model: Checkpoint,
    sentences: Annotated[
        list[str] | None, typer.Argument(help="By default lines of --file, or of standard input.")
    ] = None,
    file: Annotated[pathlib.Path | None, typer.Option(help="A sentence a line.")] = None,
    query: Annotated[
        str | None, typer.Option(help="Rank the sentences by their likeness to this one instead.")
    ] = None,
    top: Annotated[int | None, typer.Option(help="So many of the likest only.")] = None,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help=".npy, (N, C) float32, or .jsonl; else JSON lines are printed."),
    ] = None,
    tokenizer: ItsTokenizer = None,
    max_length: MaxLength = None,
    device: Device = "",
):
    """Vectors of sentences, by a BERT such as MiniLM, or sentences ranked against a query.

    A vector is the mean of the tokens' last hidden states, of length 1, so that a dot product is a cosine.
    """
    with _in_a_line(ValueError, OSError, ImportError):
        if out is not None and (query is not None or out.suffix not in embedding.WRITERS):
            raise ValueError(f"--out {out}: need .npy or .jsonl, and no --query, whose ranks are printed")
        if sentences and file is not None:
            raise ValueError("give sentences or --file, not both")
        if not sentences:
            text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
            sentences = [line for line in text.splitlines() if line.strip()]
        if not sentences:
            raise ValueError("no sentences: give some, or --file, or lines on standard input")
        reader, its_tokenizer, longest = embedding.opened(model, tokenizer)
        using = (reader.to(_device(device)), its_tokenizer)
        length = min(max_length or longest, longest)
        if query is not None:
            for cosine, i in embedding.rank(*using, query, sentences, length)[:top]:
                typer.echo(f"{cosine:7.4f}  {sentences[i]}")
        else:
            vectors = embedding.embed(*using, sentences, length).numpy()
            if out is None:
                for line in embedding.lines(sentences, vectors):
                    typer.echo(line)
            else:
                embedding.WRITERS[out.suffix](out, sentences, vectors)


GPTCheckpoint = Annotated[str, typer.Argument(help="A GPT checkpoint's folder, or a run's.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Tokens to generate at most; by default 200, or what the positions leave.")
]
Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the fewest tokens that reach this probability.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw from tokens at least this probable relative to the likeliest.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Makes tokens that were there before less likely; 1 does not.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Weights and cache in bf16.")]


@app.command()
def generate(
    context: typer.Context,
    model: GPTCheckpoint,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="By default standard input, or a new text where that is a terminal."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each prompt.")] = 1,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    tokenizer: ItsTokenizer = None,
    bf16: Bf16 = False,
    device: Device = "",
):
    """Text that goes on from a prompt, printed as it comes.

    Several prompts or samples are generated together and printed when they are done, each behind a line of ---.
    """
    with _in_a_line(ValueError, OSError, ImportError):
        if samples < 1:
            raise ValueError(f"--samples {samples}: need at least 1")
        reader, its_tokenizer = _gpt(model, tokenizer, bf16, device)
        sampling = _sampling(context)
        if not prompts:
            prompts = [""] if sys.stdin.isatty() else [sys.stdin.read().removesuffix("\n")]
        asked = [(prompt, its_tokenizer.encode(prompt)) for prompt in prompts for _ in range(samples)]
        if len(asked) == 1:
            typer.echo(prompts[0], nl=False)
            for piece in generating.pieces(reader, its_tokenizer, asked[0][1], sampling):
                typer.echo(piece, nl=False)
            typer.echo()
            return
        made = generating.texts(reader, its_tokenizer, [ids for _, ids in asked], sampling)
    for (prompt, _), text in zip(asked, made, strict=True):
        typer.echo(f"---\n{prompt}{text}")


@app.command()
def chat(
    context: typer.Context,
    model: GPTCheckpoint,
    system: Annotated[str | None, typer.Option(help="What the assistant is told before all turns.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    tokenizer: ItsTokenizer = None,
    bf16: Bf16 = False,
    device: Device = "",
):
    """Talk with a GPT that `fastattn finetune instruct` has trained: a line is a turn, from a terminal or a pipe.

    /new begins a new conversation; Ctrl-C ends an answer, Ctrl-D the conversation. The template is recipes/chat.py's.
    """
    with _in_a_line(ValueError, OSError, ImportError):
        using = _gpt(model, tokenizer, bf16, device)
        begin = lambda: Conversation(*using, _sampling(context), system)  # noqa: E731
        conversation = begin()
        for line in _turns():
            if line == "/new":
                conversation = begin()
                continue
            forgotten = conversation.forgotten
            try:
                for piece in conversation.say(line):
                    typer.echo(piece, nl=False)
            except KeyboardInterrupt:
                typer.echo(" ...", nl=False)
            typer.echo()
            if conversation.forgotten > forgotten:
                typer.echo("(the positions are used up: the oldest turns are forgotten)", err=True)


def _turns():
    """Lines that say something, as they are typed."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _gpt(path, tokenizer, bf16, device):
    model, its_tokenizer = pretrained.opened(path, "generate", tokenizer)
    return model.to(_device(device), torch.bfloat16 if bf16 else None).eval(), its_tokenizer


def _sampling(context):
    names = [f.name for f in dataclasses.fields(generating.Sampling)]
    given = {name: context.params[name] for name in names}
    return generating.Sampling(**given | {"stop": tuple(given["stop"] or ())})


def _settings(kind, context):
    """A recipe's Settings from a command's options of the same names, and which of them were given."""
    names = [f.name for f in dataclasses.fields(kind)]
    given = [name for name in names if context.get_parameter_source(name).name == "COMMANDLINE"]
    return kind(**{name: context.params[name] for name in names}), given


@contextlib.contextmanager
def _in_a_line(*kinds):
    """What the caller can put right is one line, without a traceback."""
    try:
        yield
    except kinds as e:
        raise typer.BadParameter(str(e)) from e


def main():
    app()


if __name__ == "__main__":
    main()
