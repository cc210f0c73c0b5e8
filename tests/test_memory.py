"""Attention's memory: linear in S with masks and biases un-expanded, and nothing kept for backward beyond what is promised.

Every allocation of torch's CPU allocator is recorded while the public function and its backward run on the Triton
backend. The kernels themselves are stubbed (they allocate nothing; the interpreter's own copies would drown the rest), so
this counts the launchers, the autograd functions and the public functions.
"""

import pytest
import torch

from fastattn import backend, functional

triton_interpreter = pytest.importorskip("triton.runtime.interpreter")
B, H, D = 1, 2, 8  # small, so that even in fp32 q, k, v and o stay below one byte an element of S * S


@pytest.fixture(autouse=True)
def _kernels_do_nothing(monkeypatch, request):
    torch.use_deterministic_algorithms(False)  # filling memory allocates
    if request.node.get_closest_marker("gpu"):
        return
    if torch.cuda.is_available():
        pytest.skip("the CPU's allocator is watched where kernels are interpreted")
    monkeypatch.setattr(triton_interpreter.InterpretedFunction, "run", lambda self, *args, **kwargs: None)


def allocations(function):
    """(bytes of each allocation, the peak of what was live above the start)."""
    function()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    live, peak = 0, 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return [change for change in changes if change > 0], peak


def attention_step(S, dtype=torch.float16, bias_shape=None, bias_grad=False, mask_shape=None, **options):
    q, k, v = (torch.randn(B, H, S, D, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(bias_shape, dtype=dtype, requires_grad=bias_grad) if bias_shape else None
    mask = torch.rand(mask_shape) > 0.3 if mask_shape else None
    do = torch.randn(B, H, S, D, dtype=dtype)
    wanted = [q, k, v, *([bias] if bias_grad else [])]

    def step():
        with backend.use_backend("triton"):
            o = functional.attention(q, k, v, bias=bias, mask=mask, **options)
            return torch.autograd.grad(o, wanted, do)

    return step


CASES = {
    "causal": lambda S: attention_step(S, causal=True),
    "mask and bias (1, 1, S, S)": lambda S: attention_step(
        S, bias_shape=(1, 1, S, S), mask_shape=(1, 1, S, S)
    ),
    "mask (1, 1, 1, S), bias (1, H, 1, S) with gradient": lambda S: attention_step(
        S, bias_shape=(1, H, 1, S), bias_grad=True, mask_shape=(1, 1, 1, S)
    ),
    "dropout": lambda S: attention_step(S, dropout_p=0.1),
    "window, softcap": lambda S: attention_step(S, causal=True, window=(64, None), softcap=20.0),
}


def test_the_counter_sees_a_score_matrix():
    q = torch.randn(128, 8)
    assert max(allocations(lambda: torch.softmax(q @ q.T, -1))[0]) >= 128 * 128 * 4


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("S", [128, 256])
def test_nothing_of_the_size_of_the_scores_is_allocated(name, S):
    sizes, _ = allocations(CASES[name](S))
    assert sizes, "the profiler recorded no allocation"
    assert max(sizes) < S * S, (
        f"{max(sizes)} bytes at once, S * S is {S * S}"
    )  # one byte an element would be too much


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_grows_linearly(name):
    peaks = [allocations(CASES[name](S))[1] for S in (128, 256, 512, 1024)]
    assert peaks[0] > 0, "the profiler recorded no allocation"
    for small, large in zip(peaks, peaks[1:], strict=False):
        assert large <= 2.05 * small, f"{peaks} bytes at S = 128, 256, 512, 1024"


def test_the_gradient_of_a_dense_bias_is_the_only_thing_of_its_size():
    S = 128
    sizes, _ = allocations(attention_step(S, bias_shape=(1, 1, S, S), bias_grad=True))
    assert sum(size >= S * S for size in sizes) == 1


def saved(function):
    """Bytes of storage that a forward keeps for its backward, each storage once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend.use_backend("triton"):
        function()
    return sum(kept.values())


def test_attention_keeps_its_inputs_the_output_lse_and_the_seed():
    S = 128
    q, k, v = (torch.randn(B, H, S, D, requires_grad=True) for _ in range(3))
    bias, mask = torch.randn(1, 1, S, S), torch.rand(1, 1, 1, S) > 0.3
    inputs = sum(t.untyped_storage().nbytes() for t in (q, k, v, bias, mask))
    output, lse, seed = q.numel() * 4, B * H * S * 4, 16
    assert saved(lambda: functional.attention(q, k, v, bias=bias, mask=mask)) <= inputs + output + lse
    assert (
        saved(lambda: functional.attention(q, k, v, dropout_p=0.1)) <= 3 * q.numel() * 4 + output + lse + seed
    )


def test_row_ops_keep_what_is_promised():
    x, w, b = torch.randn(32, 64, requires_grad=True), torch.randn(64), torch.randn(64)
    assert saved(lambda: functional.softmax(x)) == x.numel() * 4  # y
    statistics, affine = 2 * 32 * 4, 2 * 64 * 4
    assert saved(lambda: functional.layer_norm(x, (64,), w, b)) <= x.numel() * 4 + affine + statistics
    assert saved(lambda: functional.rms_norm(x, (64,), w)) <= x.numel() * 4 + affine + statistics


@pytest.mark.gpu
def test_peak_memory_grows_linearly_on_a_gpu():
    def peak(S):
        q, k, v = (
            torch.randn(1, 8, S, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        bias, mask = torch.randn(1, 1, S, S, device="cuda"), torch.rand(1, 1, S, S, device="cuda") > 0.3
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with backend.use_backend("triton"):
            functional.attention(q, k, v, bias=bias, mask=mask).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peaks = [peak(S) for S in (1024, 2048, 4096)]
    assert all(large <= 2.1 * small for small, large in zip(peaks, peaks[1:], strict=False)), peaks
