"""What a run leaves behind: the table on the screen, CSV, JSON, a plot, and one HTML page with all of it."""

import base64
import csv
import datetime
import html
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import torch
from rich.table import Table

import fastattn
from fastattn.benchmarks import timing
from fastattn.benchmarks.measure import COLUMNS

TORCH_AGAINST_TORCH = "On a CPU fastattn runs stock torch, so these times are torch against torch: there is no speed-up to report."
ON_GPU = (
    "µs: median with a cold L2, 20 % and 80 % quantiles behind it; sustained: one second back to back; graph: a call inside "
    "a CUDA graph over rotating inputs; host: the CPU's time per call. ceiling: share of the memory rate measured in this "
    "run for the same mix of reads and writes (matmul: of the measured bf16 product). err: largest error against "
    "float64, eager's own behind it. A share below 1 GiB of traffic also pays the fixed cost of a launch: see the fits."
)


def environment(device):
    """Everything one needs to know to repeat the run."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "fastattn": fastattn.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{
            name: _version(name)
            for name in ("triton", "liger-kernel", "quack-kernels", "xformers", "flash-attn")
        },
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
            "driver": _driver(),
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


def _driver():
    return _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]


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
        yield from ((name, _number(row[f"{name}_us"])) for name in ("sustained", "graph", "host"))
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


def fits(rows):
    """{(op, pass, provider): (t0 in µs, TB/s)} of T = t0 + bytes / rate over the memory-bound sizes of one op."""
    groups = {}
    for row in rows:
        if row["tb_s"] and not row["tflop_s"]:
            moved = row["tb_s"] * row["median_us"]  # in MB
            groups.setdefault((row["op"], row["pass"], row["provider"]), []).append((moved, row["median_us"]))
    found = {}
    for key, points in groups.items():
        n, mean_x, mean_y = len(points), *(sum(axis) / len(points) for axis in zip(*points, strict=True))
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        if n >= 3 and spread:
            slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
            if slope > 0:
                found[key] = mean_y - slope * mean_x, 1 / slope
    return found


def save(results, folder):
    """results.json, results.csv and the plots into `folder`; the names of what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    with open(folder / "results.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(results["rows"])
    return ["results.json", "results.csv", *plots(results, folder)]


def plots(results, folder):
    """speed.png and gpt.png; nothing, and a sentence, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("No plots: matplotlib is not installed (pip install 'fastattn[bench]').")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    timed = [row for row in results["rows"] if row["median_us"]]
    if timed:
        providers = list(dict.fromkeys(row["provider"] for row in timed))
        groups = list(dict.fromkeys((row["op"], row["shape"], row["pass"]) for row in timed))
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
        axes.set_title(f"fastattn {results['environment']['fastattn']} on {results['environment']['device']}")
        axes.legend()
        figure.savefig(folder / "speed.png", dpi=110)
        plt.close(figure)
        written.append("speed.png")
    if results.get("gpt"):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for name, losses in results["gpt"]["losses"].items():
            axes.plot(losses, label=name, linestyle="-" if name == "eager" else "--")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a byte")
        axes.set_title(f"GPT on {results['gpt']['text']}")
        axes.legend()
        figure.savefig(folder / "gpt.png", dpi=110)
        plt.close(figure)
        written.append("gpt.png")
    return written


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
    for name in ("speed", "gpt"):
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
