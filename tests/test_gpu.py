"""What only a GPU shows, for every case of `fastattn check`: CUDA graphs, streams, races, a second device."""

import hashlib
import subprocess
import sys

import pytest
import torch

from fastattn import backend, check_cases, functional

pytestmark = pytest.mark.gpu
DTYPE = torch.bfloat16
CASES = [case for case in check_cases.CASES if not case.dropout]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.function}, {case.label}")


def inputs_of(case, device, dtype=DTYPE):
    torch.manual_seed(0)
    made = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in case.make()]
    return [t.requires_grad_(case.backward and t.is_floating_point()) for t in made]


def results_of(case, inputs):
    """Outputs and gradients by the Triton kernels."""
    with backend.use_backend("triton"):
        outputs = case.call(functional, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t in inputs if t.requires_grad]
        grads = torch.autograd.grad([o.sum() for o in outputs], wanted) if wanted else ()
    return [t.detach() for t in (*outputs, *grads)]


@every_case
def test_graph_replays_what_eager_computes(case):
    inputs = inputs_of(case, "cuda")
    eager = results_of(case, inputs)  # also compiles
    with torch.cuda.stream(torch.cuda.Stream()):
        results_of(case, inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results_of(case, inputs)
        for t in captured:
            t.zero_()
        graph.replay()
    torch.cuda.synchronize()
    for replayed, once in zip(captured, eager, strict=True):
        assert torch.equal(replayed, once)


@every_case
def test_another_stream_computes_the_same(case):
    inputs = inputs_of(case, "cuda")
    on_default = results_of(case, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_stream = results_of(case, inputs)
    stream.synchronize()
    assert all(torch.equal(*pair) for pair in zip(on_default, on_stream, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_second_device_while_the_first_is_current(case):
    first, second = (results_of(case, inputs_of(case, f"cuda:{i}")) for i in (0, 1))
    assert all(t.device.index == 1 for t in second)
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(first, second, strict=True))


def digest(repeats):
    """A hash of every case's results, which must not change over `repeats` runs."""
    whole = hashlib.sha256()
    for case in CASES:
        inputs = inputs_of(case, "cuda")
        first = results_of(case, inputs)
        for _ in range(repeats):
            for again, once in zip(results_of(case, inputs), first, strict=True):
                assert torch.equal(again, once), f"{case.function}, {case.label} differs between runs"
        for t in first:
            whole.update(t.float().cpu().numpy().tobytes())
    return whole.hexdigest()


def test_a_hundred_runs_in_two_processes_are_bit_equal():
    command = [sys.executable, "-c", "import test_gpu; print(test_gpu.digest(100))"]
    folder = __file__.rpartition("/")[0]
    digests = [
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout for _ in "12"
    ]
    assert digests[0] == digests[1]
