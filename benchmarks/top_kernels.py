"""Which kernels a call spends its time in:

    python -m fastattn.benchmarks.top_kernels layer_norm "M 8192" --provider "fastattn triton" --direction backward
    python -m fastattn.benchmarks.top_kernels gpt --provider compile         # a training step of the GPT

The first case of the benchmark file whose shape contains the words is run 10 times under torch's profiler.
"""

import importlib
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from fastattn.benchmarks import bench_gpt, measure, timing


def main(
    op: Annotated[
        str, typer.Argument(help="A benchmark's name, as fastattn bench takes it: layer_norm, bert, gpt, ...")
    ],
    shape: Annotated[str, typer.Argument(help="Part of the case's op and shape.")] = "",
    provider: Annotated[
        str, typer.Option(help="eager, compile, fastattn triton, fastattn cuda, ...")
    ] = "fastattn triton",
    direction: Annotated[str, typer.Option(help="forward or backward.")] = "forward",
    rows: int = 25,
):
    """Print the kernels of one benchmark by the time they take, and what the host does meanwhile."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    call, name = step(device, provider) if op == "gpt" else of_case(op, shape, provider, direction, device)
    for _ in range(3):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if timing.is_gpu(device) else [])]
    with profile(activities=activities) as found:
        for _ in range(10):
            call()
        if timing.is_gpu(device):
            torch.cuda.synchronize()
    print(f"{name}, {provider}, on {device}: 10 calls")
    averages = found.key_averages()
    if timing.is_gpu(device):
        print(averages.table(sort_by="self_device_time_total", row_limit=rows, max_name_column_width=90))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60))


def of_case(op, shape, provider, direction, device):
    """(a function of nothing that does the pass, what it is)."""
    cases = importlib.import_module(f"fastattn.benchmarks.bench_{op}").cases(device, False)
    case = next((c for c in cases if shape in f"{c.op}, {c.shape}"), None)
    if case is None:
        raise typer.BadParameter(f"no case of {op} has {shape!r} in its shape")
    inputs = case.inputs(device)
    known = measure.providers(case, device)
    if provider not in known:
        raise typer.BadParameter(f"--provider {provider}: need one of {', '.join(known)}")
    function, forced = known[provider]
    return measure.one_pass(
        function, forced, inputs, direction, True
    ), f"{case.op}, {case.shape}, {direction}"


def step(device, provider):
    plan = bench_gpt.plan(device, False)
    known = bench_gpt.runners(plan, device)
    if provider not in known:
        raise typer.BadParameter(f"--provider {provider}: need one of {', '.join(known)}")
    text, _ = bench_gpt.read_text(None)
    ids, targets = (t.to(device) for t in bench_gpt.batch_of(text, plan.batch, plan.config.n_positions, 0))
    return lambda: known[provider].step(ids, targets), "GPT training"


if __name__ == "__main__":
    typer.run(main)
