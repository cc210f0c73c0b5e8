"""What the results in benchmarks/results/ say, where people read it:

    python -m fastattn.benchmarks.tables readme                 # rewrites the README's tables between their marks
    python -m fastattn.benchmarks.tables rows RESULTS.json ...  # rows for backend.ROWS: who is fastest, by op, dtype and size
    python -m fastattn.benchmarks.tables proven verdict.json 9.0 RESULTS.json     # entries for backend.PROVEN

A results file is what `fastattn bench` wrote, results.json, moved into benchmarks/results/ under a name of its own.
"""

import importlib.util
import json
import math
import pathlib
import statistics
from typing import Annotated

import typer

from fastattn import backend

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent / "README.md"
app = typer.Typer(add_completion=False, help=__doc__)

# What stands in the README: op and the beginning of its shape. Each is there with whatever it came to.
SHOWN = (
    ("softmax", "M 65536, N 4096"),
    ("layer_norm", "M 65536, N 4096"),
    ("rms_norm", "M 65536, N 4096"),
    ("add_layer_norm", "M 65536, N 4096"),
    ("layer_norm", "M 8192, N 768"),
    ("bias_gelu", "M 87381, N 3072"),
    ("embeddings, BERT", "B 32, S 512, C 768"),
    ("attention", "B 2, H 16, S 8192, D 128, causal"),
    ("attention", "B 16, H 16, S 1024, D 128, causal"),
    ("attention_decode", "B 32, H 32/8, S 16384, D 128"),
    ("linear_cross_entropy and gradients", ""),
    ("bert", ""),
    ("generate", ""),
    ("transformers", ""),
)
NOTHING = "No results of a GPU are here yet: `make bench` makes some on your machine, lost rows included."

UNSEEN = "No op of either backend has been seen right on a GPU yet."
TRITON_ONLY = [
    op for op in ("bias_gelu", "linear_cross_entropy") if not importlib.util.find_spec(f"fastattn.cuda.{op}")
]


def results(folder=HERE / "results"):
    """{file name: its results} of those measured on a GPU, the newest last."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    of_gpu = {name: result for name, result in found.items() if result.get("on_gpu")}
    return dict(sorted(of_gpu.items(), key=lambda item: item[1]["environment"]["date"]))


def speed(found):
    """The README's table of speeds, from the newest file that has the case."""
    if not found:
        return NOTHING
    lines = [
        "| case | torch | torch.compile | best other | `triton` | `cuda` | as dispatched | share | file |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for op, shape in SHOWN:
        cases = {}
        for name, result in found.items():
            for row in result["rows"]:
                if row["op"] == op and row["shape"].startswith(shape) and row["dtype"] == "bfloat16":
                    cases.setdefault((row["shape"], row["pass"]), {}).setdefault(name, {})[
                        row["provider"]
                    ] = row
        for (of_shape, direction), by_file in cases.items():
            name, rows = list(by_file.items())[-1]
            lines.append(speed_line(f"{op}, {of_shape}, {direction}", rows, name))
    return "\n".join([*lines, "", *(told(name, result) for name, result in found.items())])


def speed_line(case, rows, name):
    named = ("eager", "compile", "fastattn triton", "fastattn cuda", "fastattn")
    others = [row for provider, row in rows.items() if provider not in named and row["median_us"]]
    best = min(others, key=lambda row: row["median_us"], default=None)
    ours = [rows[p] for p in named[2:] if p in rows and rows[p]["median_us"]]
    fastest = min(ours, key=lambda row: row["median_us"], default=None)
    share = fastest and (fastest["matmul_share"] or fastest["ceiling_share"])
    cells = [case, *(cell(rows.get(p)) for p in named[:2])]
    cells.append(f"{cell(best)} ({best['provider']})" if best else "")
    cells += [
        *(cell(rows.get(p)) for p in named[2:]),
        f"{share:.0%}" if share else "",
        f"[{name}](benchmarks/results/{name})",
    ]
    return f"| {' | '.join(cells)} |"


def cell(row):
    if row is None:
        return ""
    if not row["median_us"]:
        return "wrong" if row["failed"] else "no"
    if row["tokens_s"]:
        return f"{row['tokens_s']:,.0f} tokens/s" + (f", {row['peak_mb']:,.0f} MB" if row["peak_mb"] else "")
    return f"{row['median_us']:,.1f} µs"


def told(name, result):
    """Where a file's numbers come from, and how the GPT's training went there."""
    e = result["environment"]
    line = f"- {name}: {e['device']}, {e['date']}, commit {e['commit']}, torch {e['torch']}, triton {e['triton']}."
    if gpt := result.get("gpt"):
        runs = (
            f"{who} {speed:,.0f} tokens/s"
            + (f", {gpt['peak_mb'][who]:,.0f} MB" if gpt["peak_mb"] else "")
            + (f", MFU {gpt['mfu'][who]:.0%}" if gpt["mfu"] else "")
            for who, speed in gpt["tokens_per_s"].items()
        )
        line += f" GPT training, {gpt['model']}: {'; '.join(runs)}."
    return line


def support(proven):
    """The README's table of what has been seen right where, from backend.PROVEN."""
    if not proven:
        return UNSEEN
    lines = ["| op | `cuda` | `triton` |", "|---|---|---|"]
    for op in (*backend.ROW_OPS, "attention", "attention_decode", "bias_gelu", "linear_cross_entropy"):
        cuda = "–" if op in TRITON_ONLY else seen(proven.get(("cuda", op), {}))
        lines.append(f"| {op} | {cuda} | {seen(proven.get(('triton', op), {}))} |")
    return "\n".join(lines)


def seen(cards):
    cells = (
        f"{major}.{minor} ([seen](benchmarks/results/{name}))"
        for (major, minor), name in sorted(cards.items())
    )
    return "right on " + ", ".join(cells) if cards else "never on a GPU"


def rewritten(text, tables):
    """The text with each table {name: markdown} between <!-- name --> and <!-- /name -->."""
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            raise ValueError(f"the README has no <!-- {name} --> ... <!-- /{name} -->")
        text = before + begin + table + "\n" + end + after
    return text


def readme_text():
    return rewritten(README.read_text(), {"speed": speed(results()), "support": support(backend.PROVEN)})


# The op that backend.ROWS knows, by the beginning of the benchmark's name.
DISPATCHED = {"add_positional_encoding": "position", "embeddings": "position"}


def dispatch(rows, measured):
    """[(a line for backend.ROWS, its evidence)]: who is fastest by op, dtype, N and size, forward and backward together.

    An eager call takes its device's or its host's time, whichever is longer; backends are compared by the geometric mean of
    their ratios to stock torch, and one that has no time is asked last. Widths that agree share rows; a size that was not
    measured goes with the next larger one that was, and what is larger or wider than all with the last.
    """
    eager = {key(row): waited(row) for row in rows if row["provider"] == "eager"}
    calls = {}  # {(op, dtype): {N: {elements: {backend: [ratios]}}}}
    for row in rows:
        who = {"eager": "torch"}.get(row["provider"], row["provider"].removeprefix("fastattn "))
        if row["N"] and who in backend.ORDER and waited(row) and eager.get(key(row)):
            op = DISPATCHED.get(row["op"].partition(",")[0], row["op"])
            sizes = calls.setdefault((op, row["dtype"]), {}).setdefault(row["N"], {})
            ratios = sizes.setdefault(row["elements"], {}).setdefault(who, [])
            ratios.append(waited(row) / eager[key(row)])
    lines = []
    for (op, dtype), widths in calls.items():
        groups = []  # [[first N, last N, [[largest size, order, evidence]]]]
        for N, sizes in sorted(widths.items()):
            runs = []
            for elements, ratios in sorted(sizes.items()):
                order, evidence = ranked(ratios)
                if not runs or runs[-1][1] != order:
                    runs.append([elements, order, []])
                runs[-1][0] = elements
                runs[-1][2].append(f"{elements // N} x {N}: {evidence}")
            if groups and [run[1] for run in groups[-1][2]] == [run[1] for run in runs]:
                groups[-1][1] = N
                for run, more in zip(groups[-1][2], runs, strict=True):
                    run[:] = max(run[0], more[0]), run[1], run[2] + more[2]
            else:
                groups.append([N, N, runs])
        begin = 0
        for _, last, runs in groups:
            low, end = 0, 2**62 if last == groups[-1][1] else last
            for largest, order, evidence in runs:
                top = 2**62 if largest == runs[-1][0] else largest
                row = f'Row(("{op}",), (torch.{dtype},), ({low}, {top}), ({begin}, {end}), {order}, "{measured}"),'
                lines.append((row, "; ".join(evidence)))
                low = top + 1
            begin = end + 1
    return lines


def key(row):
    return row["op"], row["shape"], row["dtype"], row["pass"]


def waited(row):
    return row["median_us"] and max(row["median_us"], row["host_us"] or 0.0)


def ranked(ratios):
    """(backends from the fastest to the slowest, what was measured)."""
    means = {who: statistics.geometric_mean(values) for who, values in ratios.items()}
    order = tuple(sorted(backend.ORDER, key=lambda who: means.get(who, math.inf)))
    return order, ", ".join(f"{who} {means[who]:.2f}" for who in order if who in means)


@app.command()
def readme():
    """Rewrite the README's tables."""
    README.write_text(readme_text())


@app.command()
def proven(verdict: pathlib.Path, capability: str, file: str):
    """Print backend.PROVEN's entries for what `fastattn check` saw right: its verdict.json, e.g. 9.0, and the results file to name."""
    card = tuple(map(int, capability.split(".")))
    for by_backend in json.loads(verdict.read_text()).values():
        for name, ops in by_backend.items():
            for op in ops:
                print(f'    ("{name}", "{op}"): {{{card}: "{file}"}},')


@app.command()
def rows(files: Annotated[list[pathlib.Path], typer.Argument(help="results.json files of one GPU.")]):
    """Print rows for backend.ROWS, the evidence above each: times over stock torch's. They go before the guesses there."""
    for file in files:
        for line, evidence in dispatch(json.loads(file.read_text())["rows"], file.name):
            print(f"    # {evidence}\n    {line.replace(str(2**62), '2**62')}")


if __name__ == "__main__":
    app()
