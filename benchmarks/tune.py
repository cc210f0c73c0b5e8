"""Times attention's tiles on the GPU at hand and prints the rows to put into kernels/attention.py:

    python -m fastattn.benchmarks.tune [--head-dim 128] [--seq 8192] [--causal]

Every candidate's result must equal the shipped row's within rounding before its time counts; losers are printed too.
"""

import itertools

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

CANDIDATES = {
    "fwd": dict(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)),
    "dkdv": dict(BLOCK_M=(32, 64), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)),
    "dq": dict(BLOCK_M=(64, 128), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3)),
}


def rows(kernel):
    names = CANDIDATES[kernel]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*names.values())]


def outcomes(kernel, head_dim, seq, causal, batch, heads, device, time):
    """(row, milliseconds or a sentence) of the shipped row, then of every candidate; `time(call)` gives milliseconds."""
    from fastattn.kernels import attention

    dtype = torch.bfloat16
    q, k, v, do = (torch.randn(batch, heads, seq, head_dim, device=device, dtype=dtype) for _ in range(4))
    options = (*(None,) * 8, None, seq, seq, int(causal), -1, -1, 0.0, 0.0, head_dim**-0.5, False)
    o, lse = attention.attention_fwd(q, k, v, *options)
    shipped = {name: attention.tile_row(name, q, v, _plain_rules(attention, q, k)) for name in CANDIDATES}

    def call(row):
        if kernel == "fwd":
            return attention.attention_fwd(q, k, v, *options, config=row)[0]
        config = {"dkdv": shipped["dkdv"], "dq": shipped["dq"]} | {kernel: row}
        grads = attention.attention_bwd(do, None, q, k, v, o, lse, *options, False, False, config=config)
        return torch.cat([g.flatten() for g in grads[:3]])

    expected = call(shipped[kernel]).float()
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    for row in (shipped[kernel], *rows(kernel)):
        try:
            wrong = (call(row).float() - expected).abs().max()
            yield row, f"wrong by {wrong:.1e}" if not wrong <= tolerance else time(lambda row=row: call(row))
        except Exception as e:  # a tile that does not fit the card is a row of the table, not the end of it
            yield row, f"{type(e).__name__}: {e}".splitlines()[0][:80]


def _plain_rules(attention, q, k):
    return attention.make_rules(q, k, *(None,) * 8, 0, -1, -1, 0.0, 0.0, q.shape[-1] ** -0.5)


def main(head_dim: int = 128, seq: int = 8192, causal: bool = False, batch: int = 2, heads: int = 16):
    """Tune attention's tiles for one head dim; dk/dv and dq are timed together with the rest of the backward."""
    from triton.testing import do_bench

    console = Console()
    if not torch.cuda.is_available():
        console.print("tune: torch sees no GPU; tiles are timed on the card that will run them")
        raise typer.Exit(1)
    device = torch.device("cuda")
    median = lambda call: do_bench(call, quantiles=[0.5])  # noqa: E731
    for kernel in CANDIDATES:
        found = outcomes(kernel, head_dim, seq, causal, batch, heads, device, median)
        found = list(track(found, kernel, len(rows(kernel)) + 1, console=console, transient=True))
        table = Table(
            title=f"{kernel}, D {head_dim}, S {seq}, causal {causal}, {torch.cuda.get_device_name()}"
        )
        table.add_column("row (the first is shipped)")
        table.add_column("ms")
        ranked = sorted(found[1:], key=lambda pair: pair[1] if isinstance(pair[1], float) else float("inf"))
        for row, result in (found[0], *ranked):
            arguments = ", ".join(f"{name}={value}" for name, value in row.items())
            table.add_row(f"dict({arguments})", f"{result:.3f}" if isinstance(result, float) else result)
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
