"""What only a GPU shows, for every case of `fastattn check`: CUDA graphs, streams, races, a second device, the sanitizers."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastattn import backend, check_cases, cuda, functional

pytestmark = pytest.mark.gpu
DTYPE = torch.bfloat16
BACKENDS = ("triton", "cuda")
CASES = [case for case in check_cases.CASES if not case.dropout]
FOLDER = os.path.dirname(__file__)


def every_case(test):
    test = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.function}, {case.label}")(test)
    return pytest.mark.parametrize("name", BACKENDS)(test)


def inputs_of(case, device, dtype=DTYPE):
    torch.manual_seed(0)
    made = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in case.make()]
    return [t.requires_grad_(case.backward and t.is_floating_point()) for t in made]


def results_of(case, inputs, name):
    """Outputs and gradients on backend `name`, which may refuse the case: NotImplementedError."""
    with backend.use_backend(name):
        outputs = case.call(functional, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t in inputs if t.requires_grad]
        grads = torch.autograd.grad([o.sum() for o in outputs], wanted) if wanted else ()
    return [t.detach() for t in (*outputs, *grads)]


def skipping_what_is_refused(test):
    @functools.wraps(test)
    def run(case, name):
        try:
            test(case, name)
        except NotImplementedError as e:
            pytest.skip(str(e))

    return run


@every_case
@skipping_what_is_refused
def test_graph_replays_what_eager_computes(case, name):
    inputs = inputs_of(case, "cuda")
    eager = results_of(case, inputs, name)  # also compiles
    with torch.cuda.stream(torch.cuda.Stream()):
        results_of(case, inputs, name)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results_of(case, inputs, name)
        for t in captured:
            t.zero_()
        graph.replay()
    torch.cuda.synchronize()
    for replayed, once in zip(captured, eager, strict=True):
        assert torch.equal(replayed, once)


@every_case
@skipping_what_is_refused
def test_another_stream_computes_the_same(case, name):
    inputs = inputs_of(case, "cuda")
    on_default = results_of(case, inputs, name)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_stream = results_of(case, inputs, name)
    stream.synchronize()
    assert all(torch.equal(*pair) for pair in zip(on_default, on_stream, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
@skipping_what_is_refused
def test_second_device_while_the_first_is_current(case, name):
    first, second = (results_of(case, inputs_of(case, f"cuda:{i}"), name) for i in (0, 1))
    assert all(t.device.index == 1 for t in second)
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(first, second, strict=True))


def digest(name, repeats, device="cuda"):
    """(cases served, a hash of their results), which must not change over `repeats` runs."""
    served, whole = 0, hashlib.sha256()
    for case in CASES:
        inputs = inputs_of(case, device)
        try:
            first = results_of(case, inputs, name)
        except NotImplementedError:
            continue
        served += 1
        for _ in range(repeats):
            for again, once in zip(results_of(case, inputs, name), first, strict=True):
                assert torch.equal(again, once), f"{case.function}, {case.label} differs between runs"
        for t in first:
            whole.update(t.float().cpu().numpy().tobytes())
    return served, whole.hexdigest()


def in_a_process(call, *before):
    command = [*before, sys.executable, "-c", f"import test_gpu; print(test_gpu.{call})"]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_hundred_runs_in_two_processes_are_bit_equal(name):
    if name == "cuda" and cuda.unavailable():
        pytest.skip(cuda.unavailable())
    first, second = (in_a_process(f"digest({name!r}, 100)") for _ in "12")
    assert first.returncode == 0 and first.stdout == second.stdout, first.stderr + second.stderr
    assert not first.stdout.startswith("(0,")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_has_nothing_to_say(tool):
    """Of the CUDA kernels; initcheck wants memory as torch leaves it, so that nothing is filled here."""
    if cuda.unavailable() or not shutil.which("compute-sanitizer"):
        pytest.skip(cuda.unavailable() or "compute-sanitizer is not installed")
    done = in_a_process("digest('cuda', 1)", "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout + done.stderr
    assert "\n(0," not in done.stdout
