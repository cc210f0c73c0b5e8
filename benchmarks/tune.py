"""Times what could stand in the tables of the Triton kernels on the GPU at hand, and prints the rows to put there.

    python -m fastattn.benchmarks.tune softmax layer_norm position [--limit 240] [--out tune-out]

For each row of a table: the benchmark's call that takes it, once with the row shipped and once with every row near it, up to two
numbers halved or doubled (tiles and warps quartered, too). A candidate's outputs must equal those of the shipped row within rounding before its time counts. The
fastest and the shipped one are timed again, in turns. Every variant tried is in tune.json, losers and failures too. The CUDA
kernels have no such tables: what they choose by width is compiled in.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastattn.benchmarks import measure, report, timing, warm
from fastattn.benchmarks.suite import Case, gib

FACTORS = {"num_warps": (0.25, 0.5, 1, 2, 4), "TILE": (0.25, 0.5, 1, 2, 4)}
BETTER = 0.98  # of the shipped row's time, or it stays


@dataclasses.dataclass(frozen=True)
class Slot:
    """A row of a table, and what to time it by."""

    name: str
    place: Callable  # (row) -> a context in which the call takes that row
    case: Case
    direction: str
    shipped: dict
    fixed: tuple = ()
    least: int = 0  # elements of a tile, below which rows are the same as with so many

    def candidates(self):
        """The shipped row, then its neighbours."""
        keys = [key for key in self.shipped if key not in self.fixed]
        found = [self.shipped]
        for change in itertools.product(*(FACTORS.get(key, (0.5, 1, 2)) for key in keys)):
            row = self.shipped | {
                key: self.shipped[key] * factor for key, factor in zip(keys, change, strict=True)
            }
            if "num_stages" in keys:
                row["num_stages"] = (
                    self.shipped["num_stages"] + {0.5: -1, 1: 0, 2: 1}[change[keys.index("num_stages")]]
                )
            if sum(factor != 1 for factor in change) > 2:
                continue
            fits = (
                row.get("TILE", self.least) >= self.least
                and all(value == int(value) >= 1 for value in row.values())
                and row["num_warps"] <= 32
            )
            a_thread = row.get("TILE", 1024) / 32 / row["num_warps"]
            row = {key: int(value) for key, value in row.items()}
            if fits and (4 <= a_thread <= 64 or "TILE" not in row) and row not in found:
                found.append(row)
        return found


def slots(op, device):
    """The Slots of one op, by the name of its kernels' file."""
    if op not in SLOTS:
        raise typer.BadParameter(f"{op}: need one of {', '.join(SLOTS)}")
    bench, kernels = (
        importlib.import_module(f"fastattn.{place}{op}") for place in ("benchmarks.bench_", "kernels.")
    )
    size = (
        (lambda N: (4, N, torch.float32))
        if device.type == "cpu"
        else functools.partial(gib, dtype=torch.bfloat16)
    )
    return list(SLOTS[op](bench, kernels, size))


def listed(kernels, table, case_of, direction, usual=None, **more):
    """A Slot for each row (limit, dict) of a table; usual: the width where a limit is infinite."""
    for limit, row in getattr(kernels, table):
        place = lambda row: unittest.mock.patch.object(kernels, table, [(math.inf, row)])  # noqa: E731
        yield Slot(
            f"{table}, to {limit}",
            place,
            case_of(usual if limit == math.inf else limit),
            direction,
            row,
            **more,
        )


def beyond(kernels, table, looped, case, direction):
    """The row for what is beyond a table."""
    place = lambda row: unittest.mock.patch.multiple(kernels, **{table: [(0, row)], looped: row})  # noqa: E731
    yield Slot(looped, place, case, direction, getattr(kernels, looped))


def single(kernels, table, case, direction):
    place = lambda row: unittest.mock.patch.object(kernels, table, row)  # noqa: E731
    yield Slot(table, place, case, direction, getattr(kernels, table))


def keyed(kernels, key, case_of, direction, **more):
    """Of a dict of tables."""
    for limit, row in kernels.TILES[key]:
        place = lambda row: unittest.mock.patch.dict(kernels.TILES, {key: [(math.inf, row)]})  # noqa: E731
        yield Slot(f"TILES[{key}], to {limit}", place, case_of(limit), direction, row, **more)


def by_width(kernels, case_of, looped):
    """FORWARD and BACKWARD, with the rows for what is beyond them, which a row of `looped` elements is."""
    for direction in ("forward", "backward"):
        table = direction.upper()
        yield from listed(kernels, table, case_of, direction)
        yield from beyond(kernels, table, f"{table}_LOOPED", case_of(looped), direction)


def softmax(bench, kernels, size):
    yield from by_width(kernels, lambda N: bench.softmax(*size(N)), 2**16)


def layer_norm(bench, kernels, size):
    case = lambda N: bench.layer_norm(*size(N))  # noqa: E731
    yield from by_width(kernels, case, 2**15)
    yield from single(kernels, "COLUMNS", case(2**15), "backward")
    yield from single(kernels, "PARTIAL_SUM", case(4096), "backward")


def position(bench, kernels, size):
    def of(op):
        def case(C):
            M, _, dtype = size(C)
            return op(max(1, M // 512), min(M, 512), C, dtype)

        return case

    yield from listed(kernels, "ADD", of(bench.learned), "forward", usual=768)
    yield from listed(kernels, "ADD_BACKWARD", of(bench.learned), "backward", usual=768)
    yield from listed(kernels, "NORM", of(bench.bert_embeddings), "forward", fixed=("BLOCK_C",))
    yield from listed(kernels, "NORM_BACKWARD", of(bench.bert_embeddings), "backward", fixed=("BLOCK_C",))
    yield from listed(kernels, "SEGMENTS", of(bench.gpt2_embeddings), "backward", usual=768)


def bias_gelu(bench, kernels, size):
    case = bench.bias_gelu(*size(3072), "tanh")
    for direction in ("forward", "backward"):
        yield from single(kernels, direction.upper(), case, direction)


def attention(bench, kernels, size):
    long = size(1)[0] > 4  # a GPU
    S, width, dtype = (8192, 2048, torch.bfloat16) if long else (32, 32, torch.float32)
    for kind, extra in (("plain", None), ("rich", "mask")) if long else (("fp32", None),):
        case = lambda D: bench.attention(2, max(1, width // D), S, D, dtype, not extra, extra)  # noqa: B023, E731
        for kernel, direction in (("fwd", "forward"), ("dkdv", "backward"), ("dq", "backward")):
            yield from keyed(kernels, (kernel, kind), case, direction)


def attention_decode(bench, kernels, size):
    case = lambda D: bench.decode(8, 32, 8, 8192, D, torch.bfloat16)  # noqa: E731
    yield from keyed(kernels, (90, 16), case, "forward", fixed=("MAX_M",))


SLOTS = {f.__name__: f for f in (softmax, layer_norm, position, bias_gelu, attention, attention_decode)}


def prepared(slot, device):
    """A function of a row: the slot's call with that row in the table, ready to be timed."""
    torch.manual_seed(0)
    inputs = slot.case.inputs(device)
    pass_ = measure.one_pass(slot.case.providers["fastattn"], "triton", inputs, slot.direction, True)

    def call(row):
        with slot.place(row):
            return pass_()

    return call


def outcomes(slot, device, time):
    """(row, microseconds or a sentence) of the shipped row, then of every candidate; `time(call)` gives microseconds."""
    call = prepared(slot, device)
    expected = _tensors(call(slot.shipped))
    for row in slot.candidates():
        try:
            wrong = max(_difference(*pair) for pair in zip(_tensors(call(row)), expected, strict=True))
            right = wrong <= 1  # no NaN
            yield (
                row,
                time(functools.partial(call, row)) if right else f"wrong by {wrong:.1e} of what rounding may",
            )
        except Exception as e:  # a tile that does not fit the card is a row of the table, not the end of it
            yield row, f"{type(e).__name__}: {e}".splitlines()[0][:80]


def _tensors(outputs):
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def _difference(got, expected):
    """Largest error as a share of what rounding in this dtype may make of the largest number."""
    allowed = 4 * torch.finfo(expected.dtype).eps * expected.float().abs().max().clamp(min=1e-30)
    return float((got.float() - expected.float()).abs().max() / allowed)


def compile_share(ops, device, share, shares):
    tasks = [(slot, row) for op in ops for slot in slots(op, device) for row in slot.candidates()]
    held, call = None, None
    for slot, row in tasks[share::shares]:
        try:
            if held is not slot:
                held, call = slot, prepared(slot, device)
            call(row)
        except Exception:  # told where it is timed
            continue


def main(
    ops: list[str],
    limit: Annotated[float, typer.Option(help="Seconds; what was not tuned by then is said.")] = 500,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of tune.json.")] = pathlib.Path("tune-out"),
):
    """Tune the tables of these ops: softmax, layer_norm, position, bias_gelu, attention, attention_decode."""
    console, began = Console(width=None if sys.stdout.isatty() else 200), time.perf_counter()
    if not torch.cuda.is_available():
        console.print("tune: torch sees no GPU; tiles are timed on the card that will run them")
        raise typer.Exit(1)
    device = torch.device("cuda", torch.cuda.current_device())
    if len(ops) > 2 and ops[-1].isdigit():  # a share of the compilation, see warm.in_processes
        return compile_share(ops[:-2], device, int(ops[-2]), int(ops[-1]))
    wanted = [(op, slot) for op in ops for slot in slots(op, device)]
    console.print(warm.in_processes(["fastattn.benchmarks.tune", *ops], limit / 2))
    results = {"environment": report.environment(device), "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    for n, (op, slot) in enumerate(track(wanted, "tuning", console=console, transient=True)):
        if time.perf_counter() - began > limit:
            console.print(f"Left out for time: {len(wanted) - n} rows, from {op} {slot.name} on.")
            break
        try:
            results["rows"] += tuned(op, slot, device)
        except Exception as e:  # the shipped row itself does not run
            console.print(f"{op} {slot.name}: {type(e).__name__}: {e}", markup=False)
        (out / "tune.json").write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()
    for line in proposals(results["rows"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(table(results["rows"]))


def tuned(op, slot, device):
    """[{op, slot, row, shipped, us or None, note}], the fastest first, the shipped row among them."""
    rough = lambda call: statistics.median(timing.gpu_times({"": call}, 0.01, device, 20)[""])  # noqa: E731
    found = list(outcomes(slot, device, rough))
    ranked = sorted((us, i) for i, (_, us) in enumerate(found) if isinstance(us, float))
    again = {i: found[i][0] for i in {0, *(i for _, i in ranked[:3])} if isinstance(found[i][1], float)}
    call = prepared(slot, device)
    finer = (
        timing.gpu_times({i: functools.partial(call, row) for i, row in again.items()}, 0.2, device)
        if again
        else {}
    )
    rows = []
    for i, (row, us) in enumerate(found):
        us = statistics.median(finer[i]) if i in finer else us
        timed = isinstance(us, float)
        what = {"op": op, "slot": slot.name, "shape": slot.case.shape, "pass": slot.direction, "row": row}
        rows.append(
            what
            | {
                "shipped": i == 0,
                "us": us if timed else None,
                "again": i in finer,
                "note": "" if timed else us,
            }
        )
    return sorted(rows, key=lambda row: (not row["again"], row["us"] or math.inf))


def by_slot(rows):
    found = {}
    for row in rows:
        found.setdefault((row["op"], row["slot"]), []).append(row)
    return found


def proposals(rows):
    """A line for each slot: the row to have there, and how it compares with the one shipped."""
    for (op, name), of_slot in by_slot(rows).items():
        shipped, best = next(row for row in of_slot if row["shipped"]), of_slot[0]
        if not best["us"]:
            yield f"kernels/{op}.py {name}: nothing ran ({shipped['note']})"
        elif shipped["us"] and best["us"] > BETTER * shipped["us"]:
            yield f"kernels/{op}.py {name}: keep {_text(shipped['row'])}  # {shipped['us']:.1f} us, best {best['us']:.1f}"
        else:
            before = f"{shipped['us']:.1f} us" if shipped["us"] else shipped["note"]
            yield f"kernels/{op}.py {name}: {_text(best['row'])}  # {best['us']:.1f} us, was {before}, {_text(shipped['row'])}"


def table(rows):
    result = Table(title="The five fastest of each, and the shipped row", title_justify="left")
    for heading in ("table", "shape", "pass", "row", "µs", "tried"):
        result.add_column(heading)
    for (op, name), of_slot in by_slot(rows).items():
        for i, row in enumerate(of_slot):
            if i < 5 or row["shipped"]:
                us = f"{row['us']:.1f}" if row["us"] else row["note"]
                shown = f"{_text(row['row'])}{', shipped' if row['shipped'] else ''}"
                result.add_row(f"{op} {name}", row["shape"], row["pass"], shown, us, str(len(of_slot)))
        result.add_section()
    return result


def _text(row):
    return f"dict({', '.join(f'{name}={value}' for name, value in row.items())})"


if __name__ == "__main__":
    typer.run(main)
