"""What a run leaves behind: the table on the screen, CSV, JSON, a plot, and one HTML page with all of it."""

import base64
import collections
import csv
import datetime
import html
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess

import torch
from rich.table import Table

import fastattn
from fastattn.benchmarks import timing
from fastattn.benchmarks.measure import COLUMNS

TORCH_AGAINST_TORCH = "On a CPU fastattn runs stock torch, so these times are torch against torch: there is no speed-up to report."
PEERS = ("liger-kernel", "quack-kernels", "nvidia-cudnn-frontend", "xformers", "flash-attn", "transformers")
ON_GPU = (
    "µs: median with a cold L2, 20 % and 80 % quantiles behind it; sustained: one second back to back; graph: a call inside "
    "a CUDA graph over rotating inputs; host: the CPU's time per call. predicted: of memory-bound ops t0 + bytes / the rate "
    "measured in this run for the same mix of reads and writes, of attention what benchmarks/model.py says of the tile. ceiling: "
    "share of that rate (matmul: of the measured bf16 product), which below 1 GiB of traffic also pays t0. err: largest error "
    "against float64, eager's own behind it."
)


def environment(device):
    """Everything one needs to know to repeat the run."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "fastattn": fastattn.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", *PEERS)},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "device": str(device),
    }
    if timing.is_gpu(device):
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA of torch": torch.version.cuda or torch.version.hip,
            "cuDNN": str(torch.backends.cudnn.version()),
            "driver": _smi("driver_version"),
            "SM clock now, SM and memory clock at most, power limit": _smi(
                "clocks.sm,clocks.max.sm,clocks.max.mem,power.limit"
            ),
        }
    return found


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit():
    here = pathlib.Path(__file__).resolve().parent
    return _answer(["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"])


def _smi(fields):
    return _answer(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]).split("\n")[0]


def _answer(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "n/a"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "n/a"


def _number(value, digits=3):
    """Three digits that read well in a column: 0.0123, 1.23, 123, 12,345."""
    if value is None:
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.{digits}g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def cells(row, on_gpu):
    """(heading) of each column of the table; the note takes the times' place where there are none."""
    spread = "" if row["median_us"] is None else f"{_number(row['p20_us'])}–{_number(row['p80_us'])}"
    rate = (
        f"{_number(row['tflop_s'])} TF/s"
        if row["tflop_s"]
        else row["tb_s"] and f"{_number(row['tb_s'] * 1e3)} GB/s"
    )
    share = row["matmul_share"] or row["ceiling_share"]
    error = "" if row["error"] is None else f"{row['error']:.1e} ({row['eager_error']:.1e})"
    yield from (("op", row["op"]), ("shape", row["shape"]), ("dtype", row["dtype"]), ("pass", row["pass"]))
    yield from (("provider", row["provider"]), ("µs", _number(row["median_us"])), ("20–80 %", spread))
    if on_gpu:
        yield from (
            (name, _number(row[f"{name}_us"])) for name in ("sustained", "graph", "host", "predicted")
        )
    if row["tokens_s"]:
        rate = f"{row['tokens_s']:,.0f} tok/s" + (f", MFU {row['mfu']:.0%}" if row["mfu"] else "")
    yield "rate", rate or ""
    if on_gpu:
        yield "ceiling", f"{share:.0%}" if share else ""
        yield "× eager", f"{row['speedup']:.2f}" if row["speedup"] else ""
        yield "peak MB", _number(row["peak_mb"])
        yield "MHz / W", f"{row['sm_mhz']:.0f} / {row['power_w']:.0f}" if row["sm_mhz"] else "n/a"
    yield "err (eager's)", error
    yield "note", row["note"]


def table(rows, on_gpu):
    """The rich table of all rows, losing ones and failures included."""
    result = Table(caption=ON_GPU if on_gpu else TORCH_AGAINST_TORCH, header_style="bold")
    before = None
    for row in rows:
        line = list(cells(row, on_gpu))
        if before is None:
            for heading, _ in line:
                right = heading not in ("op", "shape", "dtype", "pass", "provider", "note")
                result.add_column(heading, justify="right" if right else "left", overflow="fold")
        elif (row["op"], row["shape"], row["pass"]) != before:
            result.add_section()
        before = row["op"], row["shape"], row["pass"]
        result.add_row(*(text for _, text in line), style="red" if row["failed"] else None)
    return result


def summary(rows):
    """The rich table of a sweep: a line an op, pass, dtype and provider over all its shapes, calls that wait for the host apart."""
    groups = {}
    for row in rows:
        groups.setdefault((row["op"], row["pass"], row["dtype"], row["provider"]), []).append(row)
    result = Table(
        title="By op: geometric means over the shapes. Share: of the ceiling, at 256 MB moved and more",
        header_style="bold",
        title_justify="left",
    )
    for heading in ("op", "pass", "dtype", "provider"):
        result.add_column(heading)
    for heading in (
        "shapes",
        "no time",
        "× eager",
        "share, N to 32k",
        "share, beyond",
        "worst share",
        "wrong",
    ):
        result.add_column(heading, justify="right")
    for key, of_key in groups.items():
        timed = [row for row in of_key if row["median_us"]]
        large = [row for row in timed if row["ceiling_share"] and row["tb_s"] * row["median_us"] >= 256]
        shares = [
            [row["ceiling_share"] for row in large if (row["N"] <= 2**15) == short] for short in (True, False)
        ]
        result.add_row(
            *key, str(len(timed)), str(len(of_key) - len(timed)), _mean([row["speedup"] for row in timed], "{:.2f}"),
            *(_mean(each, "{:.0%}") for each in shares), f"{min(sum(shares, [])):.0%}" if large else "",
            str(sum(row["failed"] for row in of_key)),
        )  # fmt: skip
    return result


def _mean(values, form):
    values = [v for v in values if v]
    return form.format(statistics.geometric_mean(values)) if values else ""


def notes(rows):
    """{a provider and what kept it from being timed: at how many rows}."""
    return collections.Counter(
        f"{row['op']}, {row['provider']}: {row['note']}" for row in rows if row["note"]
    )


def fits(rows):
    """{(op, pass, provider): (t0 in µs, TB/s)} of T = t0 + bytes / rate over the memory-bound sizes of one op."""
    groups = {}
    for row in rows:
        if row["tb_s"] and not row["tflop_s"]:
            moved = row["tb_s"] * row["median_us"]  # in MB
            groups.setdefault((row["op"], row["pass"], row["provider"]), []).append((moved, row["median_us"]))
    found = {key: timing.fit(points) for key, points in groups.items()}
    return {key: line for key, line in found.items() if line}


def save(results, folder):
    """results.json, results.csv and the plots into `folder`; the names of what was written."""
    return [*write(results, folder), *plots(results, folder)]


def write(results, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    with open(folder / "results.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(results["rows"])
    return ["results.json", "results.csv"]


def plots(results, folder):
    """speed.png, widths.png and gpt.png as far as there is something to draw; nothing, and a sentence, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("No plots: matplotlib is not installed (pip install 'fastattn[bench]').")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    timed = [row for row in results["rows"] if row["median_us"]]
    groups = list(dict.fromkeys((row["op"], row["shape"], row["pass"]) for row in timed))
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    title = f"fastattn {results['environment']['fastattn']} on {results['environment']['device']}"
    if 0 < len(groups) <= 80:  # beyond, bars cannot be told apart
        figure, axes = plt.subplots(
            figsize=(9, 1.5 + 0.22 * len(groups) * len(providers)), layout="constrained"
        )
        height = 0.8 / len(providers)
        for i, provider in enumerate(providers):
            mine = {
                (r["op"], r["shape"], r["pass"]): r["median_us"] for r in timed if r["provider"] == provider
            }
            at = [(j + i * height, mine[group]) for j, group in enumerate(groups) if group in mine]
            axes.barh([y for y, _ in at], [t for _, t in at], height, label=provider)
        axes.set_yticks(
            [j + 0.4 - height / 2 for j in range(len(groups))], [", ".join(group) for group in groups]
        )
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("µs, median (less is better)")
        axes.set_title(title)
        axes.legend()
        written.append(_saved(plt, figure, folder / "speed.png"))
    if panels := by_width(timed):
        figure, grid = plt.subplots(
            len(panels), 2, figsize=(12, 3.2 * len(panels)), squeeze=False, layout="constrained"
        )
        for line, (op, of_op) in zip(grid, panels.items(), strict=True):
            for axes, direction in zip(line, ("forward", "backward"), strict=True):
                for provider, points in of_op.get(direction, {}).items():
                    axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=provider)
                axes.set_xscale("log", base=2)
                axes.set_title(f"{op}, {direction}")
                axes.set_xlabel("N")
                axes.set_ylabel("TB/s")
                axes.set_ylim(0)
            line[0].legend(fontsize="small")
        figure.suptitle(title)
        written.append(_saved(plt, figure, folder / "widths.png"))
    if results.get("gpt"):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for name, losses in results["gpt"]["losses"].items():
            axes.plot(losses, label=name, linestyle="-" if name == "eager" else "--")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a byte")
        axes.set_title(f"GPT on {results['gpt']['text']}")
        axes.legend()
        written.append(_saved(plt, figure, folder / "gpt.png"))
    return written


def _saved(plt, figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name


def by_width(rows):
    """{op: {pass: {provider: [(N, TB/s)]}}} of the first dtype's memory-bound rows, the largest call at each N; ops of three N and more."""
    rows = [row for row in rows if row["N"] and not row["tflop_s"] and row["dtype"] == rows[0]["dtype"]]
    best = {}
    for row in sorted(rows, key=lambda row: row["elements"]):
        best[row["op"], row["pass"], row["provider"], row["N"]] = row["tb_s"]
    found = {}
    for (op, direction, provider, N), rate in sorted(best.items(), key=lambda item: item[0][3]):
        found.setdefault(op, {}).setdefault(direction, {}).setdefault(provider, []).append((N, rate))
    return {
        op: of_op for op, of_op in found.items() if len({n for *_, n in (k for k in best if k[0] == op)}) >= 3
    }


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;font-size:13px}td,th{padding:.15em .6em;text-align:right;border-bottom:1px solid #ddd}
td.text,th.text{text-align:left}tr.failed{color:#b00}pre{background:#f4f4f4;padding:1em;white-space:pre-wrap}
img{max-width:100%}"""


def html_page(folder):
    """Write report.html, self-contained, from the results in `folder`; its path."""
    results = json.loads((folder / "results.json").read_text())
    on_gpu = results["on_gpu"]
    parts = ["<h1>fastattn benchmark</h1>", _html_pairs(results["environment"])]
    if results["ceilings"]:
        parts += ["<h2>Measured ceilings</h2>", _html_pairs(results["ceilings"])]
    for name in ("speed", "widths", "gpt"):
        if (folder / f"{name}.png").exists():
            data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    lines = [list(cells(row, on_gpu)) for row in results["rows"]]
    if lines:
        is_text = {"op", "shape", "dtype", "pass", "provider", "note"}

        def mark(tag, name, value):
            return f"<{tag}{' class=text' if name in is_text else ''}>{html.escape(value)}</{tag}>"

        parts += [f"<p>{html.escape(ON_GPU if on_gpu else TORCH_AGAINST_TORCH)}</p>", "<table>"]
        parts.append("<tr>" + "".join(mark("th", name, name) for name, _ in lines[0]) + "</tr>")
        for row, line in zip(results["rows"], lines, strict=True):
            failed = " class=failed" if row["failed"] else ""
            parts.append(f"<tr{failed}>" + "".join(mark("td", *cell) for cell in line) + "</tr>")
        parts.append("</table>")
    for title, said in results["said"].items():
        parts += [f"<h2>{html.escape(title)}</h2>", f"<pre>{html.escape(said)}</pre>"]
    page = (
        f"<!doctype html><meta charset=utf-8><title>fastattn benchmark</title><style>{STYLE}</style>"
        + "\n".join(parts)
    )
    (folder / "report.html").write_text(page)
    return folder / "report.html"


def _html_pairs(pairs):
    rows = "".join(
        f"<tr><th class=text>{html.escape(k)}</th><td class=text>{html.escape(str(v))}</td></tr>"
        for k, v in pairs.items()
    )
    return f"<table>{rows}</table>"
