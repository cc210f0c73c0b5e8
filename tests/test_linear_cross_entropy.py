"""A linear layer and its cross-entropy in chunks, in Triton and in stock torch: values, gradients, memory, contracts."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_device

from fastattn import backend, reference, use_backend
from fastattn.check import check
from fastattn.functional import linear_cross_entropy
from fastattn.kernels import chunks
from fastattn.kernels.linear_cross_entropy import _rows as linear_cross_entropy_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("triton", "torch")


@pytest.fixture(autouse=True)
def _on_the_device():
    with on_device():
        yield


def forced(name, **options):
    """(hidden, weight, bias, targets) -> loss on the backend `name`."""

    def run(hidden, weight, bias, targets):
        with use_backend(name):
            return linear_cross_entropy(hidden, weight, targets, bias=bias, **options)

    return run


def wanted(**options):
    def run(hidden, weight, bias, targets):
        return reference.linear_cross_entropy(hidden, weight, targets, bias=bias, **options)

    return run


def stock(softcap=0.0, ignore_index=-100, reduction="mean"):
    """F.linear and F.cross_entropy, logits and all."""

    def run(hidden, weight, bias, targets):
        z = F.linear(hidden, weight, bias)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return F.cross_entropy(z, targets.long(), ignore_index=ignore_index, reduction=reduction)

    return run


def leaf(*shape, dtype=torch.float32, std=1.0):
    return (std * torch.randn(shape)).to(dtype).requires_grad_()


def problem(M, C, V, dtype=torch.float32, bias=False, ignored=0.2, std=1.0):
    targets = torch.randint(V, (M,)).masked_fill(torch.rand(M) < ignored, -100)
    bias = leaf(V, dtype=dtype) if bias else None
    return leaf(M, C, dtype=dtype, std=std), leaf(V, C, dtype=dtype, std=C**-0.5), bias, targets


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "chunk_rows", lambda V, C, itemsize: 7)


# one token; a row in one block; one past a block; several blocks, the last one ragged (8192 a block); one target too many
SHAPES = [(1, 8, 5), (20, 24, 300), (17, 16, 1025), (9, 8, 20000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("M, C, V", SHAPES, ids=str)
def test_values_and_gradients(M, C, V, name, dtype, small_chunks):
    inputs = problem(M, C, V, dtype, ignored=0.2 if M > 1 else 0.0)
    assert not check(forced(name), wanted(), inputs, baseline=stock())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_options(softcap, reduction, name, dtype, small_chunks):
    options = dict(softcap=softcap, reduction=reduction, ignore_index=3)
    inputs = problem(20, 16, 40, dtype, bias=True, ignored=0.0, std=3.0)
    assert (inputs[3] == 3).any()
    assert not check(forced(name, **options), wanted(**options), inputs, baseline=stock(**options))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(wants, name, small_chunks):
    hidden, weight, bias, targets = problem(20, 16, 40, bias=True)
    for reduction in ("mean", "none"):
        inputs = [t.detach().requires_grad_(w) for t, w in zip((hidden, weight), wants, strict=True)]
        options = dict(reduction=reduction)
        assert not check(forced(name, **options), wanted(**options), (*inputs, bias.detach(), targets))


@pytest.mark.parametrize("name", BACKENDS)
def test_logits_far_apart(name, small_chunks):
    hidden, weight, bias, targets = problem(20, 16, 300, bias=True, std=60.0)
    assert not check(forced(name), wanted(), (hidden, weight, bias, targets))
    bias = (bias.detach() + 3000.0).requires_grad_()
    assert not check(forced(name), wanted(), (hidden, weight, bias, targets))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_no_target_counts_everything_is_zero(reduction, name):
    hidden, weight, bias, targets = problem(5, 8, 30, bias=True, ignored=1.0)
    loss = forced(name, reduction=reduction)(hidden, weight, bias, targets)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
    assert loss.shape == (targets.shape if reduction == "none" else ()) and not loss.any()
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_ignored_token_may_hold_anything(name, small_chunks):
    hidden, weight, bias, targets = problem(20, 8, 30)
    ignored = targets == -100
    assert ignored.any() and not ignored.all()
    clean = hidden.detach().masked_fill(ignored[:, None], 0.0).requires_grad_()
    dirty = hidden.detach().masked_fill(ignored[:, None], math.nan).requires_grad_()
    loss, expected = (forced(name)(h, weight.detach(), bias, targets) for h in (dirty, clean))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(o, h)[0] for o, h in ((loss, dirty), (expected, clean))))


@pytest.mark.parametrize("V", [5, 1025, 8200])
def test_padding_of_a_row_of_logits_does_not_count(V):
    """A GPU's buffer is not zeroed: whatever lies between a row's last logit and the next row's first stays out of both."""
    buffer = torch.full((4, (V + 15) // 16 * 16), math.inf)
    logits, targets = buffer[:, :V], torch.randint(V, (4,))
    logits.copy_(torch.randn(4, V))
    z = logits.clone().requires_grad_()
    expected = F.cross_entropy(z, targets, reduction="none")
    losses = torch.empty(4)
    linear_cross_entropy_rows(logits, targets, None, losses, -100, 0.0, True)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits, torch.autograd.grad(expected.sum(), z)[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_float16_neither_underflows_nor_overflows(name):
    """Gradients that are small because many tokens share them, and the sum over tokens that has one target."""
    hidden, weight, _, _ = problem(150, 8, 20, torch.float16)
    hidden = hidden.detach().add(700.0).requires_grad_()  # 150 x 700 is above 65504
    targets = torch.zeros(150, dtype=torch.int64)
    weight = (weight.detach() / 700).requires_grad_()
    inputs = (hidden, weight, None, targets)
    assert not check(forced(name), wanted(), inputs, baseline=stock())
    loss = 64 * forced(name)(*inputs)
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_of_another_dtype_and_autocast(name):
    hidden, weight, bias, targets = problem(20, 16, 40, bias=True)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = forced(name)(low, weight, bias, targets)
    grads = torch.autograd.grad(loss, (low, weight, bias))
    assert loss.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16, *[torch.float32] * 2]
    with torch.autocast("cpu", torch.bfloat16):
        cast = forced(name)(hidden, weight, bias, targets)
    torch.testing.assert_close(cast, loss)
    torch.testing.assert_close(torch.autograd.grad(cast, weight)[0], grads[1])
    assert linear_cross_entropy(hidden.double(), weight.double(), targets).dtype == torch.float64


@pytest.mark.parametrize("name", BACKENDS)
def test_leading_dims_and_strides(name, small_chunks):
    memory, weight, bias = torch.randn(16, 5, 4), torch.randn(60, 32)[::2, ::2], torch.randn(60)[::2]
    targets = torch.randint(30, (5, 4)).t()
    for reduction in ("mean", "none"):
        results = []
        for h, w, b, t in (
            (memory.permute(2, 1, 0), weight, bias, targets),
            (
                memory.permute(2, 1, 0).contiguous(),
                weight.contiguous(),
                bias.contiguous(),
                targets.contiguous(),
            ),
        ):
            h, w, b = (t.detach().requires_grad_() for t in (h, w, b))
            loss = forced(name, reduction=reduction)(h, w, b, t.int())
            assert loss.shape == (() if reduction == "mean" else (4, 5))
            results.append((loss, *torch.autograd.grad(loss.sum(), (h, w, b))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_empty(shape, name):
    hidden, weight = leaf(*shape, 8), leaf(20, 8)
    targets = torch.zeros(shape, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        loss = forced(name, reduction=reduction)(hidden, weight, None, targets)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert not loss.any() and not any(g.any() for g in grads) and grads[1].shape == weight.shape


@pytest.mark.parametrize("name", BACKENDS)
def test_twice_backward_and_two_runs_are_one(name, small_chunks):
    hidden, weight, bias, targets = problem(20, 16, 40, bias=True)
    runs = [forced(name)(hidden, weight, bias, targets) for _ in range(2)]
    first, again = (torch.autograd.grad(runs[0], (hidden, weight, bias), retain_graph=True) for _ in range(2))
    other = torch.autograd.grad(runs[1], (hidden, weight, bias))
    assert torch.equal(*runs)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, other, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_double_backward_and_transforms(reduction):
    hidden, weight, bias = (leaf(*shape, dtype=torch.float64) for shape in ((4, 3), (5, 3), (5,)))
    targets = torch.tensor([0, -100, 4, 2])
    run = lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, softcap=3.0, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(run, (hidden, weight, bias))
    if reduction != "none":
        mapped = torch.func.grad(run, argnums=1)(hidden, weight, bias)
        torch.testing.assert_close(mapped, torch.autograd.grad(run(hidden, weight, bias), weight)[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(name, reduction, small_chunks):
    hidden, weight, bias, targets = problem(20, 16, 40, bias=True)
    function = functools.partial(linear_cross_entropy, reduction=reduction)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_backend(name):
        results = []
        for f in (function, compiled):
            loss = f(hidden, weight, targets, bias=bias)
            results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def peak(function):
    """Bytes live above the start at the worst moment, by torch's CPU allocator."""
    function()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        kept = function()
    del kept
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_stored(name, reduction, monkeypatch):
    torch.use_deterministic_algorithms(False)  # filling memory allocates
    if name == "triton":  # the interpreter's own copies would drown the rest
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    C, V = 16, 4096

    def step(M, function):
        hidden, weight, _, targets = problem(M, C, V)
        return peak(
            lambda: torch.autograd.grad(function(hidden, weight, None, targets).sum(), (hidden, weight))
        )

    logits = 8192 * V * 4
    if name == "torch":
        assert step(8192, stock(reduction=reduction)) > 2 * logits
    peaks = [step(M, forced(name, reduction=reduction)) for M in (4096, 8192)]
    chunk = chunks.chunk_rows(V, C, 4) * V * 4
    assert peaks[1] < 6 * chunk < logits / 4
    # more tokens cost their own gradient and a few numbers each
    assert peaks[1] - peaks[0] < 4096 * (4 * C * 4 + 64)


def test_chunks_are_about_the_size_of_the_weights_gradient():
    for V, C, size in ((50257, 768, 2), (50257, 1600, 4), (30522, 384, 4)):
        rows = chunks.chunk_rows(V, C, size)
        assert rows % 128 == 0 and 0.8 * V * C * 4 < rows * V * size <= V * C * 4
    assert chunks.chunk_rows(256, 64, 4) * 256 * 4 == chunks.SMALLEST_CHUNK
    assert chunks.chunk_rows(10**7, 1, 4) == 1


def test_wrong_arguments():
    hidden, weight, _, targets = problem(4, 8, 10, ignored=0.0)
    run = linear_cross_entropy
    for call, error, message in (
        (lambda: run(hidden, weight[:, 1:], targets), ValueError, r"hidden is \(4, 8\) and weight \(10, 7\)"),
        (
            lambda: run(hidden, weight, targets[1:]),
            ValueError,
            r"targets is \(3,\), needs hidden's leading dims",
        ),
        (lambda: run(hidden, weight, targets, bias=weight[0]), ValueError, r"bias is \(8,\), needs \(10,\)"),
        (lambda: run(hidden, weight, targets.float()), TypeError, "targets is torch.float32"),
        (lambda: run(hidden.long(), weight, targets), TypeError, "hidden is torch.int64"),
        (lambda: run(hidden, weight.to("meta"), targets), ValueError, "weight is on meta"),
        (lambda: run(hidden, weight, targets.to("meta")), ValueError, "targets is on meta"),
        (lambda: run(hidden, weight, targets, reduction="max"), ValueError, "reduction is 'max'"),
        (lambda: run(hidden, weight, targets, softcap=-1.0), ValueError, "softcap is -1.0"),
        (lambda: run(hidden, weight, targets + 10), IndexError, "needs 0 .. 9 or ignore_index -100"),
        (lambda: run(hidden, weight, targets - 20), IndexError, "needs 0 .. 9 or ignore_index -100"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_refusals_name_their_reason():
    hidden, weight, _, targets = problem(4, 8, 10)
    with use_backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        linear_cross_entropy(hidden.double(), weight.double(), targets)
    with use_backend("cuda"), pytest.raises(NotImplementedError, match="no cuda implementation"):
        linear_cross_entropy(hidden, weight, targets)
    before = backend.calls["linear_cross_entropy", "torch"]
    linear_cross_entropy(hidden, weight, targets)
    assert backend.calls["linear_cross_entropy", "torch"] == before + 1


@pytest.mark.parametrize("wrong", [10, -1, 2**40])
def test_a_wrong_target_that_nobody_checks_reads_nothing_else(wrong, monkeypatch):
    """As on a GPU: a wrong number, no fault."""
    monkeypatch.setattr(backend, "readable", lambda t: False)
    hidden, weight, _, targets = problem(4, 8, 10, ignored=0.0)
    targets[1] = wrong
    losses = forced("triton", reduction="none")(hidden, weight, None, targets)
    right = wanted(reduction="none")(hidden, weight, None, targets.clamp(0, 9))
    torch.testing.assert_close(losses[[0, 2, 3]], right[[0, 2, 3]])


def test_the_padding_of_the_chunks_buffer_reaches_no_product():
    """It starts as NaN here; a bf16 product of 64 rows on a CPU with AMX reads it."""
    x, weight = (
        torch.randn(64, 64).bfloat16().requires_grad_(),
        torch.randn(260, 64).bfloat16().requires_grad_(),
    )
    linear_cross_entropy(x, weight, torch.randint(260, (64,))).backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()
