"""The fastattn command: what it prints, what it writes, and when it fails."""

import importlib
import json

import pytest
import torch
from typer.testing import CliRunner

from fastattn import backend, check_cases, cli, cuda, functional

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)


def fastattn(*args):
    return CliRunner().invoke(cli.app, list(args))


def test_info_says_what_is_here_and_what_has_been_seen():
    done = fastattn("info")
    assert done.exit_code == 0, done.output
    for expected in (torch.__version__, "CUDA extension", "attention", "layer_norm", "triton"):
        assert expected in done.output
    assert "triton refuses" in done.output or torch.cuda.is_available()
    if not backend.PROVEN:
        assert "never run on a GPU" in done.output


@needs_interpreter
def test_check_fills_every_column_on_a_cpu():
    done = fastattn("check", "--device", "cpu", "--op", "layer_norm")
    assert done.exit_code == 0, done.output
    emulated = cuda.not_emulated() is None
    assert "interpreter" in done.output and f"0 wrong of {18 if emulated else 12}" in done.output
    assert emulated or "takes the emulated build" in done.output


def test_check_catches_a_planted_fault(monkeypatch):
    right = functional.rms_norm
    monkeypatch.setattr(functional, "rms_norm", lambda *args: right(*args) + 0.01)
    monkeypatch.setattr(check_cases, "run_interpreted", lambda functions: iter(()))
    done = fastattn("check", "--device", "cpu", "--op", "rms_norm")
    assert done.exit_code == 1
    assert "WRONG" in done.output and "output 0" in done.output


def test_check_names_an_unknown_function():
    done = fastattn("check", "--op", "softmx")
    assert done.exit_code != 0 and "softmx" in done.output


def test_every_public_function_is_checked():
    assert {case.function for case in check_cases.CASES} == set(functional.__all__)


def test_the_verdict_lists_ops_that_were_right_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend, "verdict_key", lambda device: "this card")
    result = lambda name, state, *called: check_cases.Result("f", "l", "float32", name, state, "", called)  # noqa: E731
    results = [
        result("triton", "right", "softmax"),
        result("triton", "right", "attention"),
        result("triton", "wrong", "attention"),
        result("cuda", "refused"),
        result("torch", "right", "position"),
    ]
    path, ops = check_cases.record(torch.device("cuda"), results)
    assert ops == {"cuda": [], "triton": ["softmax"]}
    assert json.loads(path.read_text()) == {"this card": ops}
    assert backend.verdict(torch.device("cuda")) == ops
    again = [result("triton", "right", "layer_norm"), result("triton", "wrong", "softmax")]
    assert check_cases.record(torch.device("cuda"), again)[1] == {"cuda": [], "triton": ["layer_norm"]}
    backend.verdict.cache_clear()


def test_report_without_results_says_what_to_run(tmp_path):
    done = fastattn("report", "--out", str(tmp_path))
    assert done.exit_code != 0 and "fastattn bench" in done.output


def test_the_command_runs_as_a_module():
    assert importlib.util.find_spec("fastattn.cli") and cli.main
