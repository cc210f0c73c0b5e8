"""What only a GPU shows, for every case of `fastattn check`: CUDA graphs, streams, races, a second device, the sanitizers."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys

import emulated_launches
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
    torch.cuda.synchronize()
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


def digest(name, repeats, share=slice(None)):
    """(cases served, a hash of their results), which must not change over `repeats` more runs."""
    served, whole = 0, hashlib.sha256()
    for case in CASES[share]:
        inputs = inputs_of(case, "cuda")
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


def start(call, *before, **environment):
    """A process that prints what test_gpu.<call> gives."""
    command = [*before, sys.executable, "-c", f"import test_gpu; print(test_gpu.{call})"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=FOLDER, env=os.environ | environment, **pipes)


def output_of(process, seconds):
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"did not end in {seconds} s: {process.communicate()[0][-3000:]}")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_hundred_runs_in_two_processes_are_bit_equal(name):
    if name == "cuda" and cuda.unavailable():
        pytest.skip(cuda.unavailable())
    processes = [start(f"digest({name!r}, 100)") for _ in "12"]
    first, second = (re.findall(r"^\(\d+, '\w+'\)$", output_of(p, 180), re.M) for p in processes)
    assert len(first) == 1 and first == second and not first[0].startswith("(0,"), (first, second)


SHARES = 4  # of the cases for each tool, so that all tools and shares run at once on 16 cores


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_has_nothing_to_say(tool, share):
    """Of the CUDA kernels. Each tensor is an allocation of its own, and none is filled here: what torch's allocator keeps
    would hide what lies outside one or was never written.
    """
    if cuda.unavailable() or not shutil.which("compute-sanitizer"):
        pytest.skip(cuda.unavailable() or "compute-sanitizer is not installed")
    call = f"digest('cuda', 0, slice({share}, None, {SHARES}))"
    process = start(call, "compute-sanitizer", "--tool", tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = output_of(process, 180)
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert not complaints(said), "\n".join(complaints(said))
    assert re.search(r"SUMMARY: \d+ ", said) and re.search(r"^\([1-9]\d*, ", said, re.M), said[-3000:]


def complaints(said):
    """What a tool of compute-sanitizer says of kernels of ours, and all of it where it names no kernel."""
    if re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", said):
        return []
    lines = [line for line in said.splitlines() if line.startswith("=========")]
    ours = [line for line in lines if any(name in line for name in emulated_launches.kernels())]
    return ours if ours or any("_kernel" in line for line in lines) else lines
