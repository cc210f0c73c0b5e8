"""The run behind `fastattn bench`: every op, the host path, the GPT; then the table and the files.

On a GPU several processes first run every case once: what they compile stays on disk, and one process would compile for longer than
it measures. Results are written after every case, so that a run that is killed leaves what it had.
"""

import importlib
import io
import pathlib
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastattn import backend
from fastattn.benchmarks import bench_gpt, host_path, report, suite, timing, warm
from fastattn.benchmarks.measure import measure

FILES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("bench_*.py"))
OPS = tuple(stem.removeprefix("bench_") for stem in FILES if stem != "bench_gpt")
EVERYTHING = (*OPS, "host", "gpt")


def cases_of(chosen, device, quick, sweep):
    """The cases of the chosen ops' files; with `sweep` those of row ops over suite.sweep's shapes, all ops at one after the other."""
    modules = [importlib.import_module(f"fastattn.benchmarks.bench_{op}") for op in OPS if op in chosen]
    if not sweep:
        return [case for module in modules for case in module.cases(device, quick)]
    swept = [module for module in modules if hasattr(module, "rows")]
    return [case for shape in suite.sweep(device) for module in swept for case in module.rows(*shape)]


def run(console, device, chosen=EVERYTHING, quick=False, out="bench-out", data=None, limit=None, sweep=False):
    """Measure what is `chosen` on `device`, print it and write it into folder `out`; the number of failures.

    limit: seconds after which no further op is started, so that the table comes out in time. sweep: see cases_of.
    """
    began = time.perf_counter()
    if timing.is_gpu(device):
        torch.cuda.set_device(device)
    out = pathlib.Path(out)
    environment = report.environment(device)
    console.print(_pairs("fastattn bench", environment))
    results = {
        "environment": environment,
        "on_gpu": timing.is_gpu(device),
        "ceilings": {},
        "rows": [],
        "said": {},
    }
    cases = cases_of(chosen, device, quick, sweep)
    if timing.is_gpu(device) and cases:
        results["ceilings"] = timing.ceilings(device) if backend.triton_found() else {}
        console.print(_pairs("Measured just now: TB/s, t0, TFLOP/s", results["ceilings"]))
        console.print(warm.compile_all(device, chosen, quick, sweep, (limit or 900) / 4))
    seconds = (
        (0.08 if sweep else 0.3 if quick else 1.0) if timing.is_gpu(device) else (0.05 if quick else 0.2)
    )
    with _progress(console) as progress:
        task = progress.add_task("ops", total=len(cases))
        for left, case in zip(range(len(cases), 0, -1), cases, strict=True):
            if limit is not None and time.perf_counter() - began > limit:
                said = f"Left out for time: {left} of {len(cases)} cases, from {case.op}, {case.shape} on."
                console.print(said)
                results["said"]["Left out"] = said
                break
            progress.update(task, description=f"{case.op}, {case.shape}")
            try:
                results["rows"] += measure(case, device, results["ceilings"], seconds)
                if timing.is_gpu(device):
                    torch.cuda.synchronize()
            except Exception as e:
                # After a kernel's fault nothing more runs on the device: what was measured before is told.
                if not timing.is_gpu(device):
                    raise
                said = f"Broken off at {case.op}, {case.shape}, {left - 1} cases before the end: {e}"
                console.print(said, markup=False, style="bold red")
                results["said"]["Broken off"] = said
                chosen = ()
                break
            progress.advance(task)
            if timing.is_gpu(device):
                torch.cuda.empty_cache()
                torch.compiler.reset()  # Dynamo refuses one piece of code after eight shapes
                report.write(results, out)
    failures = sum(row["failed"] for row in results["rows"]) + ("Broken off" in results["said"])
    if "host" in chosen:
        results["host_path"] = host_path.host_paths(0.1 if quick else 0.3, device)
    if "gpt" in chosen:
        with _progress(console) as progress:
            results["gpt"], wrong = bench_gpt.run(device, quick, data, progress)
        failures += len(wrong)

    if results["rows"]:
        rows = results["rows"]
        for sentence, times in report.notes(rows).items() if sweep else ():
            console.print(f"{times} x {sentence}", markup=False, highlight=False)
        console.print(report.summary(rows) if sweep else report.table(rows, timing.is_gpu(device)))
        for (op, direction, provider), (t0, rate) in report.fits(rows).items():
            if timing.is_gpu(device):
                console.print(f"{op} {direction}, {provider}: T = {t0:.1f} µs + bytes / {rate:.2f} TB/s")
    if "host" in chosen:
        table = _host_table(results["host_path"], device)
        console.print(table)
        results["said"]["Host path"] = _text(table)
    if "gpt" in chosen:
        said = bench_gpt.tell(results["gpt"], wrong)
        console.print(said, markup=False, highlight=False)
        results["said"]["GPT training"] = said
    written = report.save(results, out)
    console.print(
        f"Written to {out}/: {', '.join(written)}. `fastattn report --out {out}` makes one HTML page of them."
    )
    if failures:
        console.print(f"{failures} failed: wrong results have no times.", style="bold red")
    return failures


def _progress(console):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _pairs(title, pairs):
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in pairs.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def _host_table(rows, device):
    how = "launches included" if timing.is_gpu(device) else "kernels stubbed (see benchmarks/host_path.py)"
    table = Table(title=f"Host path, µs a call, {how}", title_justify="left")
    names = ("backend", "op", "way")
    for heading in (*names, "torch", "fastattn", "× torch"):
        table.add_column(heading, justify="left" if heading in names else "right")
    for row in rows:
        numbers = f"{row['torch']:.1f}", f"{row['fastattn']:.1f}", f"{row['ratio']:.2f}"
        table.add_row(row["backend"], row["op"], row["of"], *numbers)
    return table


def _text(renderable):
    """What rich would print, without colours."""
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(renderable)
    return console.file.getvalue()
