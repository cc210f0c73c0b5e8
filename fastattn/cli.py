"""The `fastattn` command: info | check | bench | report | train. Everything it runs is importable; this file only prints."""

import contextlib
import dataclasses
import importlib.util
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
from fastattn.recipes.loop import Diverged
from fastattn.recipes.parallel import processes
from fastattn.recipes.train import Settings, prepare, resumed

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=fastattn.__doc__
)
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu; by default a GPU where torch sees one.")]
Op = Annotated[list[str] | None, typer.Option(help="Only these; may be given several times.")]
Out = Annotated[pathlib.Path, typer.Option(help="Folder of the results.")]


def _console():
    # Into a file or a pipe a table would be cut at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 180)


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
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller shapes.")] = False,
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
    failures = run.run(_console(), _device(device), op or run.EVERYTHING, quick, out, data, limit)
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
    model: Annotated[str, typer.Argument(help="gpt: next tokens.")],
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
    dropout: Annotated[float, typer.Option(help="Of embeddings, attention and branches.")] = Settings.dropout,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 leaves it.")] = Settings.clip,
    skip_above: Annotated[
        float,
        typer.Option(help="Leave out updates whose gradient's norm is so many times the usual; 0 takes all."),
    ] = Settings.skip_above,
    accumulate: Annotated[int, typer.Option(help="Batches an update.")] = Settings.accumulate,
    bf16: Annotated[bool, typer.Option("--bf16", help="bf16 autocast over fp32 weights.")] = Settings.bf16,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = Settings.compile,
    held_out: Annotated[float, typer.Option(help="Share of the text to validate on.")] = Settings.held_out,
    eval_every: Annotated[
        int, typer.Option(help="Steps between validations; 0: at the end only.")
    ] = Settings.eval_every,
    eval_batches: Annotated[
        int, typer.Option(help="Batches of those; the last one takes all.")
    ] = Settings.eval_batches,
    sample_every: Annotated[
        int, typer.Option(help="Steps between samples of text; 0: none.")
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
    names = [f.name for f in dataclasses.fields(Settings)]
    given = [name for name in names if context.get_parameter_source(name).name == "COMMANDLINE"]
    settings = Settings(**{name: context.params[name] for name in names})
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
