"""The benchmark harness: what is wrong gets a sentence and no time, files are written, and the GPU's path runs on a stand-in."""

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import time
import types
import unittest.mock

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from fastattn import backend, cli, cuda, functional
from fastattn.benchmarks import (
    bench_gpt,
    bench_layer_norm,
    ceilings,
    host_path,
    measure,
    report,
    run,
    suite,
    tables,
    timing,
    top_kernels,
    tune,
    warm,
)
from fastattn.benchmarks.suite import Work

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _memory_as_it_comes():
    torch.use_deterministic_algorithms(False)  # timings with filled memory would mean nothing


def bench(tmp_path, *args):
    return CliRunner().invoke(cli.app, ["bench", "--device", "cpu", "--quick", "--out", str(tmp_path), *args])


def written(folder):
    with open(folder / "results.csv", newline="") as f:
        return list(csv.DictReader(f))


def a_case():
    return bench_layer_norm.layer_norm(32, 32, torch.float32)


def test_bench_writes_table_csv_json_and_plot(tmp_path):
    done = bench(tmp_path, "--op", "layer_norm")
    assert done.exit_code == 0, done.output
    assert "layer_norm" in done.output and "torch against torch" in done.output
    assert "× eager" not in done.output  # no speed-up column on a CPU
    rows = written(tmp_path)
    assert {row["provider"] for row in rows} == {"eager", "fastattn"}
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert all(float(row["median_us"]) > 0 and row["speedup"] == "" for row in rows)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    page = CliRunner().invoke(cli.app, ["report", "--out", str(tmp_path)])
    assert page.exit_code == 0, page.output
    text = (tmp_path / "report.html").read_text()
    assert "M 256, N 768" in text and "data:image/png;base64" in text


def test_a_wrong_result_has_no_time_and_fails_the_run(tmp_path, monkeypatch):
    right = bench_layer_norm.functional.layer_norm
    monkeypatch.setattr(bench_layer_norm.functional, "layer_norm", lambda *args: right(*args) * 1.001)
    done = bench(tmp_path, "--op", "layer_norm")
    assert done.exit_code == 1
    assert "2 x torch's own" in done.output.replace("\n", " ") and "failed" in done.output
    for row in written(tmp_path):
        assert bool(row["median_us"]) == (row["provider"] == "eager" or row["op"] != "layer_norm")


def test_a_wrong_gradient_alone_is_caught():
    class Halved(torch.autograd.Function):
        forward = staticmethod(lambda ctx, y: y.clone())
        backward = staticmethod(lambda ctx, dy: dy / 2)

    case = a_case()
    wrong = lambda *inputs: Halved.apply(case.providers["eager"](*inputs))  # noqa: E731
    case = dataclasses.replace(case, providers=case.providers | {"fastattn": wrong})
    rows = [row for row in measure.measure(case, CPU, {}, 0.01) if row["provider"] == "fastattn"]
    assert all(row["failed"] and row["median_us"] is None for row in rows)
    assert "gradient 0" in rows[1]["note"] and "other pass" in rows[0]["note"]


def test_unknown_op_and_missing_data_are_named(tmp_path):
    assert "softmx" in bench(tmp_path, "--op", "softmx").output
    assert "nowhere.txt" in bench(tmp_path, "--data", "nowhere.txt").output
    assert "need cuda" in CliRunner().invoke(cli.app, ["bench", "--device", "gpu7"]).output


def test_a_time_limit_leaves_cases_out_and_says_so(tmp_path):
    done = bench(tmp_path, "--op", "layer_norm", "--limit", "0")
    assert done.exit_code == 0, done.output
    assert "Left out for time" in done.output and written(tmp_path) == []


def test_a_sweep_covers_row_ops_and_ends_in_a_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(
        suite, "sweep", lambda device: [(1, 3, torch.float32), (4, 64, torch.float32), (2, 5, torch.float32)]
    )
    done = bench(tmp_path, "--sweep")
    assert done.exit_code == 0, done.output
    rows = written(tmp_path)
    assert {row["N"] for row in rows} == {"3", "64", "5"}
    for op in ("softmax", "scaled_masked_softmax", "layer_norm", "add_rms_norm", "embeddings, BERT"):
        assert any(row["op"] == op for row in rows) and op in done.output
    assert "geometric means" in done.output and (tmp_path / "widths.png").exists()


def test_a_sweep_goes_over_widths_rows_and_dtypes_and_begins_with_a_gib():
    shapes = suite.sweep(torch.device("cuda"))
    assert len(set(shapes)) == len(shapes)
    assert {N for _, N, _ in shapes} >= {3, 768, 4096, 262144} and {M for M, *_ in shapes} >= {1, 2**20}
    assert {dtype for *_, dtype in shapes} == set(backend.TRITON_DTYPES)
    M, N, dtype = shapes[0]
    assert 2 * M * N * dtype.itemsize == 2**30
    assert all(2 * M * N * dtype.itemsize <= 2**30 and M <= 2**20 for M, N, dtype in shapes)


def test_every_case_is_run_once_to_compile_it(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(warm, "run_once", lambda case, device: seen.append((case.op, case.shape)))
    what = {"device": "cpu", "chosen": ["softmax"], "quick": True, "sweep": True}
    for share in range(3):
        warm.main(json.dumps(what), share, 3)
    device = what.pop("device")
    assert sorted(seen) == sorted(
        (case.op, case.shape) for case in run.cases_of(device=torch.device(device), **what)
    )
    calls = []
    case = a_case()
    case = dataclasses.replace(
        case, providers={"eager": case.providers["eager"], "fastattn": lambda *a: calls.append(a)}
    )
    monkeypatch.undo()
    warm.run_once(case, CPU)
    assert len(calls) == 2  # forward, and forward for backward, whose failure is not told here


def test_processes_that_compile_are_waited_for_counted_and_stopped(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert "failed" not in warm.in_processes(["this"], 60)
    assert "1 failed" in warm.in_processes(["no_such_module"], 60)
    assert "1 were stopped" in warm.in_processes(["http.server", "--bind", "127.0.0.1"], 0)


def test_a_mix_of_reads_and_writes_lies_between_the_measured_ceilings():
    measured = {"read": 5.0, "add": 4.0, "copy": 3.0, "write": 2.0}
    for work, rate in (
        ((1, 0), 5.0),
        ((2, 1), 4.0),
        ((1, 1), 3.0),
        ((0, 1), 2.0),
        ((3, 1), 4.25),
        ((1, 3), 2.5),
    ):
        assert timing.mix_rate(measured, Work(*work)) == pytest.approx(rate)


def test_the_fit_tells_fixed_cost_from_bandwidth():
    rows = []
    for megabytes in (1.0, 10.0, 100.0):
        microseconds = 3.0 + megabytes / 4.0
        rows.append({"op": "o", "pass": "forward", "provider": "p", "tflop_s": None, "median_us": microseconds, "tb_s": megabytes / microseconds})  # fmt: skip
    assert report.fits(rows)["o", "forward", "p"] == (pytest.approx(3.0), pytest.approx(4.0))


def test_host_path_is_measured_against_torch(monkeypatch):
    rows = host_path.host_paths(seconds=0.05)
    assert {row["of"] for row in rows} == set(host_path.COLUMNS)
    assert all(row["torch"] > 0 and row["fastattn"] > 0 for row in rows)


@pytest.fixture
def nothing_followed(monkeypatch):
    """The GPT's training without the half minute of Triton's interpreter behind it."""
    nothing = {
        "losses": {"triton": [2.0, 1.0], "eager alone": [2.0, 1.0]},
        "wrong": [],
        "calls": {},
        "parameters": 0,
    }
    monkeypatch.setattr(bench_gpt, "_followed", lambda *args: nothing)


def test_gpt_learns_from_a_file_and_writes(tmp_path, nothing_followed):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    done = bench(tmp_path, "--op", "gpt", "--data", str(tmp_path / "text.txt"))
    assert done.exit_code == 0, done.output
    for expected in (
        "text.txt, 2,250 bytes",
        "apart from eager's",
        "torch against torch",
        "Text the model writes",
    ):
        assert expected in done.output
    losses = json.loads((tmp_path / "results.json").read_text())["gpt"]["losses"]
    assert losses["fastattn"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["eager"][-1] < 0.8 * losses["eager"][0]
    assert (tmp_path / "gpt.png").exists()


def test_a_gpt_that_learns_something_else_fails_the_run(tmp_path, monkeypatch, nothing_followed):
    right = functional.attention
    off = lambda *args, **options: right(*args, **options) * (1.0 if backend._forced else 1.5)  # noqa: E731
    monkeypatch.setattr(functional, "attention", off)
    done = bench(tmp_path, "--op", "gpt")
    assert done.exit_code == 1
    assert "apart from eager's, allowed" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these steps in the benchmark itself")
def test_gpt_through_the_interpreter_follows_eager():
    steps = []
    followed = bench_gpt._followed(CPU, 2, lambda: steps.append(1))
    assert followed["wrong"] == [] and len(followed["losses"]["triton"]) == 2 and steps
    assert followed["calls"]["attention on triton"] == 4 and not any(
        "on torch" in name for name in followed["calls"]
    )


@pytest.fixture
def stand_in_gpu(monkeypatch):
    """torch.cuda's timing interface on the CPU's clock, so that the GPU's code path runs where there is none."""

    class Event:
        def __init__(self, enable_timing=False):
            pass

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return max((other.at - self.at) * 1e3, 1e-3)

    class Stream:
        def wait_stream(self, other):
            pass

    properties = types.SimpleNamespace(L2_cache_size=1 << 12, multi_processor_count=132, uuid="none", name="stand-in", major=9, minor=0)  # fmt: skip
    fakes = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1_000_000,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda device: (9, 0),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda, "not_emulated", lambda: "no extension where nothing is real")
    monkeypatch.setattr(cuda, "ready", lambda t: None)
    monkeypatch.setattr(timing, "is_gpu", lambda device: True)
    monkeypatch.setattr(timing, "L2_FLUSH_BYTES", 1 << 12)
    monkeypatch.setattr(timing, "GRAPH_CALLS", 3)
    host_time = timing.host_time
    monkeypatch.setattr(timing, "host_time", lambda call, repeats=2: host_time(call, 2))
    answer = types.SimpleNamespace(communicate=lambda timeout: ("1755, 650.5\n", ""))
    monkeypatch.setattr(timing, "ask_nvidia_smi", lambda: answer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is timed by `make bench`")
def test_every_step_of_the_gpu_protocol_runs(stand_in_gpu):
    case = dataclasses.replace(a_case(), forward=Work(100, 100), backward=Work(300, 100, flops=1000))
    case.providers.pop("compile")
    measured = timing.ceilings(CPU, nbytes=1 << 15, side=64)
    assert set(measured) == {
        "read",
        "write",
        "copy",
        "add",
        "t0_us",
        "matmul",
        "matmul_sm_mhz",
        "matmul_power_w",
    }
    rows = measure.measure(case, CPU, measured, seconds=0.01)
    by = {(row["provider"], row["pass"]): row for row in rows}
    assert (
        "refuses" in by["fastattn cuda", "forward"]["note"] and not by["fastattn cuda", "forward"]["failed"]
    )
    for provider in ("eager", "fastattn triton"):
        for direction in ("forward", "backward"):
            row = by[provider, direction]
            assert row["note"] == "" and all(
                row[f"{name}_us"] > 0 for name in ("median", "sustained", "graph", "host")
            )
            assert (
                row["speedup"] > 0
                and row["peak_mb"] == 1.0
                and (row["sm_mhz"], row["power_w"]) == (1755, 650.5)
            )
        assert by[provider, "forward"]["ceiling_share"] > 0
        assert by[provider, "backward"]["matmul_share"] > 0 and by[provider, "backward"]["cycle_share"] > 0
    assert "× eager" in [heading for heading, _ in report.cells(rows[0], on_gpu=True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is timed by `make bench`")
def test_a_fault_leaves_what_was_measured_before_it(stand_in_gpu, monkeypatch, tmp_path):
    measured = []

    def measure_two(case, *_):
        measured.append(case)
        if len(measured) == 3:
            raise RuntimeError("an illegal memory access")
        return [measured_row(case.op, "eager", 5.0)]

    for name, fake in (
        ("measure", measure_two),
        ("warm", types.SimpleNamespace(compile_all=lambda *_: "compiled")),
    ):
        monkeypatch.setattr(run, name, fake)
    for name in ("set_device", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(timing, "ceilings", lambda device: {})
    monkeypatch.setattr(report, "environment", lambda device: {"fastattn": "0", "device": "none"})
    console = Console(file=io.StringIO(), width=200)
    assert run.run(console, CPU, ["softmax"], True, tmp_path, sweep=True) == 1
    assert len(written(tmp_path)) == 2
    assert "Broken off at" in console.file.getvalue() and "illegal memory" in console.file.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is timed by `make bench`")
def test_the_host_is_hidden_behind_flushes_but_for_models(stand_in_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "host_time", lambda call, repeats: asked.append(1) or 1e6)
    slept = lambda: time.sleep(0.001)  # noqa: E731
    monkeypatch.setattr(timing, "one_event", lambda call: 1e5)
    assert len(timing.gpu_times({"a": slept}, 0.0, CPU, hide_host=False)["a"]) == 5 and not asked
    assert len(timing.gpu_times({"a": slept}, 0.0, CPU)["a"]) == 5 and asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_the_ceilings_kernels_move_what_they_say():
    a, b = torch.randn(2, 10000)
    grid = (2,)
    for kernel, inputs, expected in (
        (ceilings.copy_kernel, (a,), a),
        (ceilings.add_kernel, (a, b), a + b),
        (ceilings.write_kernel, (), torch.ones_like(a)),
    ):
        out = torch.empty_like(a)
        kernel[grid](*inputs, out, a.numel(), BLOCK=8192)
        torch.testing.assert_close(out, expected)
    sums = torch.empty(2)
    ceilings.read_kernel[grid](a, sums, a.numel(), BLOCK=8192)
    torch.testing.assert_close(sums.sum(), a.sum(), atol=1e-3, rtol=1e-4)


def test_every_chosen_op_has_a_benchmark_file():
    assert set(run.EVERYTHING) == {*run.OPS, "host", "gpt"}


TUNED = ("softmax", "layer_norm", "position", "bias_gelu", "attention")


@pytest.mark.parametrize("op", TUNED)
def test_tune_finds_the_tables_and_legal_neighbours(op):
    slots = tune.slots(op, CPU)
    assert len({slot.name for slot in slots}) == len(slots) > 1
    for slot in slots:
        first, *others = slot.candidates()
        assert first == slot.shipped and others and first not in others
        for row in others:
            assert row.keys() == first.keys() and 1 <= row["num_warps"] <= 32
            assert all(row[key] == first[key] for key in slot.fixed)


def test_tune_ranks_rows_and_names_wrong_ones(monkeypatch):
    used = {}

    def times_two(x, *_):
        if used["TILE"] == 3:
            raise ValueError("out of shared memory")
        return x * 2.0 + (0.1 if used["TILE"] == 4 else 0.0)

    case = dataclasses.replace(a_case(), providers={"fastattn": times_two})
    slot = tune.Slot(
        "FORWARD, to 8",
        lambda row: unittest.mock.patch.dict(used, row),
        case,
        "forward",
        {"TILE": 1, "num_warps": 1},
    )
    rows = [slot.shipped, *({"TILE": tile, "num_warps": 1} for tile in (2, 3, 4))]
    monkeypatch.setattr(tune.Slot, "candidates", lambda self: rows)
    fake = lambda calls, *_: {name: [4.0 - call.args[0]["TILE"]] for name, call in calls.items()}  # noqa: E731
    monkeypatch.setattr(tune.timing, "gpu_times", fake)
    best, shipped, *wrong = tune.tuned("softmax", slot, CPU)
    assert (best["row"], best["us"], best["shipped"]) == (rows[1], 2.0, False)
    assert (shipped["row"], shipped["us"], shipped["shipped"]) == (rows[0], 3.0, True)
    assert [row["us"] for row in wrong] == [None, None]
    assert "out of shared memory" in wrong[0]["note"] and "wrong by" in wrong[1]["note"]
    found = [best, shipped, *wrong]
    assert list(tune.proposals(found)) == [
        "kernels/softmax.py FORWARD, to 8: dict(TILE=2, num_warps=1)  # 2.0 us, was 3.0 us, dict(TILE=1, num_warps=1)"
    ]
    assert "keep dict(TILE=1" in next(tune.proposals([best | {"us": 2.99}, shipped]))
    assert tune.table(found).row_count == 4


def measured_row(op, provider, us, **more):
    row = dict.fromkeys(measure.COLUMNS) | {
        "op": op,
        "shape": "M 65536, N 4096",
        "dtype": "bfloat16",
        "pass": "forward",
        "provider": provider,
    }
    return (
        row
        | {"note": "", "failed": False, "median_us": us, "host_us": 2.0, "N": 4096, "elements": 2**28}
        | more
    )


def results_of(rows, **more):
    environment = {
        "device": "a card",
        "date": "2000-01-01 00:00 UTC",
        "commit": "0",
        "torch": "0",
        "triton": "0",
    }
    return {"environment": environment, "on_gpu": True, "rows": rows} | more


def test_the_readme_says_what_the_results_say():
    assert tables.README.read_text() == tables.readme_text(), "python -m fastattn.benchmarks.tables readme"


def test_the_tables_are_made_of_results(tmp_path):
    assert tables.speed(tables.results(tmp_path)) == tables.NOTHING
    rows = [
        measured_row("softmax", "eager", 400.0),
        measured_row("softmax", "compile", 350.0),
        measured_row("softmax", "liger", 330.0),
        measured_row("softmax", "quack", 320.0),
        measured_row("softmax", "fastattn triton", 310.0, ceiling_share=0.91),
        measured_row("softmax", "fastattn cuda", None, failed=True, note="wrong"),
    ]
    gpt = {
        "model": "a GPT",
        "tokens_per_s": {"eager": 1000.0},
        "peak_mb": {"eager": 10.0},
        "mfu": {"eager": 0.4},
    }
    (tmp_path / "a.json").write_text(json.dumps(results_of(rows, gpt=gpt)))
    (tmp_path / "cpu.json").write_text(json.dumps(results_of(rows) | {"on_gpu": False}))
    said = tables.speed(tables.results(tmp_path))
    line = "| softmax, M 65536, N 4096, forward | 400.0 µs | 350.0 µs | 320.0 µs (quack) | 310.0 µs | wrong |  | 91% | [a.json](benchmarks/results/a.json) |"
    assert line in said and "cpu.json" not in said
    assert "eager 1,000 tokens/s, 10 MB, MFU 40%" in said and "a card" in said
    rows = [
        measured_row("bert", "eager", 100.0, tokens_s=12345.6, peak_mb=2000.0),
        measured_row("bert", "fastattn", 50.0, tokens_s=24691.2),
    ]
    (tmp_path / "a.json").write_text(json.dumps(results_of(rows)))
    said = tables.speed(tables.results(tmp_path))
    assert "| 12,346 tokens/s, 2,000 MB |" in said and "| 24,691 tokens/s |" in said and "softmax" not in said
    proven = tables.support({("triton", "softmax"): {(9, 0): "a.json"}})
    assert "| softmax | never on a GPU | right on 9.0 ([seen](benchmarks/results/a.json)) |" in proven
    assert "| bias_gelu | – | never on a GPU |" in proven and tables.support({}) == tables.UNSEEN
    text = "x\n<!-- speed -->\nold\n<!-- /speed -->\ny"
    assert tables.rewritten(text, {"speed": "new"}) == "x\n<!-- speed -->\nnew\n<!-- /speed -->\ny"
    with pytest.raises(ValueError, match="no <!-- support"):
        tables.rewritten(text, {"support": ""})


def test_dispatch_rows_follow_the_winner():
    rows = []
    for M, N, us in (  # torch, triton, cuda; the host takes 2 us, Triton's 15
        (8, 64, (5.0, 3.0, 4.0)),
        (2**20, 64, (500.0, 300.0, 400.0)),
        (8, 128, (5.0, 3.0, 4.0)),
        (2**18, 128, (500.0, 300.0, 400.0)),
        (2**10, 2**16, (500.0, 700.0, None)),
    ):
        for who, taken in zip(("eager", "fastattn triton", "fastattn cuda"), us, strict=True):
            more = {
                "shape": f"M {M}, N {N}",
                "N": N,
                "elements": M * N,
                "host_us": 15.0 if "triton" in who else 2.0,
            }
            rows.append(measured_row("softmax", who, taken, **more))
    lines = tables.dispatch(rows, "a.json")
    Row, dtypes = backend.Row, (torch.bfloat16,)
    found = [eval(line.rstrip(","), {"Row": Row, "torch": torch}) for line, _ in lines]
    top = 2**62
    assert found == [
        Row(("softmax",), dtypes, (0, 1024), (0, 128), ("cuda", "torch", "triton"), "a.json"),
        Row(("softmax",), dtypes, (1025, top), (0, 128), ("triton", "cuda", "torch"), "a.json"),
        Row(("softmax",), dtypes, (0, top), (129, top), ("torch", "triton", "cuda"), "a.json"),
    ]
    assert (
        lines[1][1]
        == "1048576 x 64: triton 0.60, cuda 0.80, torch 1.00; 262144 x 128: triton 0.60, cuda 0.80, torch 1.00"
    )
    embeddings = [
        measured_row(op, who, us)
        for op in ("embeddings, BERT", "add_positional_encoding, learned")
        for who, us in (("eager", 9.0), ("fastattn cuda", 6.0))
    ]
    assert (
        "cuda 0.67" in tables.dispatch(embeddings, "a.json")[0][1]
        and '("position",)' in tables.dispatch(embeddings, "a.json")[0][0]
    )


def test_the_kernels_of_a_case_are_listed(capsys, monkeypatch):
    right = bench_layer_norm.cases
    monkeypatch.setattr(bench_layer_norm, "cases", lambda device, quick: right(CPU, True))
    top_kernels.main("layer_norm", "M 1", provider="eager", direction="backward", rows=5)
    said = capsys.readouterr().out
    assert "layer_norm, M 1, N 8, backward, eager" in said and "aten::" in said
    for wrong in ({"shape": "M 7"}, {"provider": "flash"}):
        with pytest.raises(typer.BadParameter, match=next(iter(wrong.values()))):
            top_kernels.main("layer_norm", **({"provider": "eager"} | wrong))


@pytest.mark.parametrize("file", ["bert", "generate", "transformers"])
def test_models_say_their_tokens(file):
    pytest.importorskip("transformers")
    (case, *_) = importlib.import_module(f"fastattn.benchmarks.bench_{file}").cases(CPU, True)
    rows = measure.measure(case, CPU, {}, 0.01)
    assert [row["note"] for row in rows] == ["", ""]
    for row in rows:
        assert row["tokens_s"] == pytest.approx(case.tokens / row["median_us"] * 1e6)
        assert "tok/s" in dict(report.cells(row, on_gpu=False))["rate"]
    assert (
        dict(
            report.cells(
                rows[0] | {"median_us": None, "tokens_s": None, "tflop_s": None, "tb_s": None}, False
            )
        )["rate"]
        == ""
    )
