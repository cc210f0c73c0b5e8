"""What the CUDA extension reads of a tensor, and what it refuses. Reading needs no GPU; launching does."""

import subprocess
import sys
import types

import pytest
import torch

import fastattn
from fastattn import cuda
from fastattn import functional as FF
from fastattn.cuda.layer_norm import layer_norm_fwd, layer_norm_why_not

_C = cuda.extension()
pytestmark = pytest.mark.skipif(isinstance(_C, str), reason=str(_C))


def forward(x, weight, bias):
    return layer_norm_fwd(x, weight, bias, 1e-5, False, True, x.dtype)


BASE = torch.arange(24.0).view(4, 6)
VIEWS = {
    "plain": BASE,
    "offset": BASE[1:, 2:],
    "transposed": BASE.t(),
    "expanded": BASE[:1].expand(3, 6),
    "every second": BASE[:, ::2],
    "scalar": torch.tensor(1.0),
    "parameter": torch.nn.Parameter(BASE),
    "needs grad": BASE.clone().requires_grad_() * 2,
}


@pytest.mark.parametrize("name", VIEWS)
def test_reads_views(name):
    t = VIEWS[name]
    read = _C.describe(t)
    assert read["shape"] == tuple(t.shape) and read["strides"] == t.stride()
    assert read["data_ptr"] == t.data_ptr() and read["device"] == str(t.device)
    assert read["contiguous"] == t.is_contiguous()


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"]
)
def test_reads_dtypes(dtype):
    assert _C.describe(torch.zeros(2, dtype=getattr(torch, dtype)))["dtype"] == dtype


def test_reads_empty():
    read = _C.describe(torch.empty(0, 3))
    assert read["shape"] == (0, 3) and read["contiguous"]


class Subclass(torch.Tensor):
    pass


def fake():
    with torch._subclasses.FakeTensorMode() as mode:
        return mode.from_tensor(BASE)


REFUSED = {
    "subclass": (lambda: BASE.as_subclass(Subclass), "is a Subclass"),
    "fake": (fake, "is a FakeTensor"),
    "none": (lambda: None, "is a NoneType"),
    "list": (lambda: [1.0], "is a list"),
    "meta": (lambda: BASE.to("meta"), "no memory"),
    "sparse": (lambda: BASE.to_sparse(), "no memory"),
    "functional": (lambda: torch._to_functional_tensor(BASE), "no memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        _C.describe(make())


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_refuses_functorch(transform):
    def f(t):
        with pytest.raises(TypeError, match="no memory"):
            _C.describe(t)
        return t.sum()

    if transform == "jvp":
        torch.func.jvp(f, (BASE,), (BASE,))
    else:
        getattr(torch.func, transform)(f)(BASE)


@pytest.mark.skipif(cuda.not_emulated() is not None, reason="needs the emulated build")
def test_plain_agrees_with_the_sentences():
    """The quick answer is yes only where the long one finds nothing to say."""
    plain = cuda.module(BASE).plain
    assert plain(BASE, None, torch.nn.Parameter(BASE), torch.zeros(2, dtype=torch.int64))
    assert plain(BASE.half(), BASE, BASE.half())
    assert not plain(BASE, BASE.half()) and not plain(BASE.half(), BASE.bfloat16()) and not plain(BASE.int())
    others = [make() for make, _ in REFUSED.values()] + [BASE.double(), BASE.to(torch.complex64)]
    for other in others:
        assert other is None or not plain(BASE, other)
    negative = torch.ones(3, dtype=torch.complex64).conj().imag
    assert not cuda.plain(BASE, negative) and cuda.plain(BASE, BASE[0])


def test_names_the_wrong_argument():
    def launch(x):
        _C.layer_norm_fwd(x, None, None, None, torch.empty_like(BASE), None, None, None, 1e-5, 0.0, False)

    with pytest.raises(
        ValueError, match=r"x is float32 \(4, 6\) with strides \(6, 1\) on cpu, must be on a CUDA device"
    ):
        launch(BASE)
    with pytest.raises(TypeError, match="x is a NoneType"):
        launch(None)


@pytest.mark.skipif(cuda.not_emulated() is not None, reason="needs the emulated build")
def test_names_what_does_not_fit_beside_x():
    good = dict(
        residual=None,
        weight=None,
        bias=None,
        y=torch.empty_like(BASE),
        r=None,
        statistics=None,
        seed=None,
    )
    for name, bad, message in (
        ("y", None, "y is a NoneType"),
        ("y", torch.empty(4, 5), r"y is float32 \(4, 5\) with strides \(5, 1\) on cpu, must be 24 contiguous elements"),
        ("y", torch.empty(6, 4).t(), "must be 24 contiguous"),
        ("weight", torch.ones(5), "weight is .* must be 6 contiguous"),
        ("weight", torch.ones(6).half(), "weight is float16 .* must be of x's dtype or float32"),
        ("residual", torch.ones(3, 6), "residual is .* must be 4 rows of N = 6"),
        ("statistics", torch.ones(8).half(), "statistics is float16 .* must be of dtype float32"),
        ("seed", torch.ones(2), r"seed is float32 .* must be int64 \(2,\)"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            cuda.module(BASE).layer_norm_fwd(BASE, *{**good, name: bad}.values(), 1e-5, 0.0, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    assert cuda.unavailable() in ("no NVIDIA driver on this machine", "torch sees no GPU")
    with pytest.raises(RuntimeError, match="no GPU that this build can use: cudaError"):
        _C.prepare(0)
    fastattn.warmup()
    assert cuda.unavailable() in fastattn.explain(FF.layer_norm, BASE.to("meta"), (6,))


def test_answers_are_constants_under_compile():
    @torch.compile(backend="eager", fullgraph=True)
    def f(x):
        return x if cuda.unavailable() is None else 2 * x

    assert torch.equal(f(BASE), BASE if cuda.unavailable() is None else 2 * BASE)


def test_import_calls_no_cuda():
    """A CUDA context would break a later fork; without a driver the first call would fail."""
    # fastattn itself imports torch, so the extension is loaded by its file alone.
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('fastattn._C', sys.argv[1]);"
        "spec.loader.exec_module(u.module_from_spec(spec));"
        "print('torch' in sys.modules, 'libcuda.so' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code, _C.__file__], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_launcher_allocates_what_the_extension_fills(monkeypatch):
    def fill(x, residual, weight, bias, y, r, statistics, seed, eps, dropout_p, rms):
        assert all(t is None for t in (residual, weight, bias, r, seed)) and (eps, dropout_p) == (1e-5, 0.0)
        assert y.is_contiguous() and statistics.is_contiguous()
        y.copy_(torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps))
        rstd, mean = statistics.view(2, -1)
        mean.copy_(x.mean(1))
        rstd.copy_(((x - x.mean(1, keepdim=True)).square().mean(1) + eps).rsqrt())

    monkeypatch.setattr(cuda, "module", lambda t: types.SimpleNamespace(layer_norm_fwd=fill))
    for x in (BASE.half(), BASE.t(), BASE[:0], BASE[:1].expand(3, 6)):
        y, statistics = forward(x, None, None)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert statistics.shape == (2 * len(x),) and statistics.dtype == torch.float32


def test_layer_norm_refuses_in_a_sentence(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "not_emulated", lambda: None)
    monkeypatch.setattr(cuda, "plain", lambda *_: False)
    assert "runs on NVIDIA GPUs" in layer_norm_why_not(BASE.to("meta"), None, None, BASE.dtype)
    assert "torch.float64" in layer_norm_why_not(BASE.double(), None, None, torch.float64)
    monkeypatch.setattr(cuda, "why_not", lambda *tensors: None)
    half, ones = BASE.half(), torch.ones(6)
    assert layer_norm_why_not(half, ones, ones, half.dtype) is None
    assert layer_norm_why_not(half, ones.half(), None, torch.float32, BASE) is None
    assert "must be one" in layer_norm_why_not(half, ones, ones.half(), half.dtype)
    assert "weight's dtype torch.float16 is neither" in layer_norm_why_not(
        BASE, ones.half(), None, BASE.dtype
    )
    assert "residual's dtype torch.bfloat16" in layer_norm_why_not(
        half, None, None, half.dtype, half.bfloat16()
    )


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("N", [1, 5, 64, 256, 264, 1000, 1024, 1032, 4096, 8192, 8200, 50001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layer_norm_fwd(N, dtype):
    x = torch.randn(7, N, device="cuda", dtype=dtype) * 3 + 1
    weight, bias = torch.randn(2, N, device="cuda")
    y, statistics = forward(x, weight, bias)
    rstd, mean = statistics.view(2, -1)
    exact = torch.nn.functional.layer_norm(x.double(), (N,), weight.double(), bias.double())
    torch.testing.assert_close(
        y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        rstd.double(), (x.double().var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-4, atol=0
    )


@gpu
def test_layer_norm_fwd_reads_any_strides():
    big = torch.randn(9, 80, device="cuda")
    for x in (
        big[:, 1:65],
        big[::2, :64],
        big.t()[:, :8],
        big[:1, :64].expand(5, 64),
        big[:, :1].expand(9, 64),
    ):
        y, _ = forward(x, None, None)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, x.shape[-1:]))


@gpu
def test_runs_on_the_current_stream():
    x, stream = torch.randn(512, 4096, device="cuda"), torch.cuda.Stream()
    expected = torch.nn.functional.layer_norm(x + 1, (4096,))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        y, _ = forward(x + 1, None, None)
    stream.synchronize()
    torch.testing.assert_close(y, expected)


@gpu
def test_inside_a_graph():
    x, out = torch.randn(16, 64, device="cuda"), {}
    fastattn.warmup()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out["y"] = forward(x, None, None)[0]
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out["y"], torch.nn.functional.layer_norm(x, (64,)))


@gpu
def test_first_launch_inside_a_graph_names_the_remedy():
    code = """
import torch
from fastattn.cuda.layer_norm import layer_norm_fwd
x = torch.randn(16, 64, device="cuda")
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    try:
        layer_norm_fwd(x, None, None, 1e-5, False, True, x.dtype)
    except RuntimeError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fastattn.warmup()" in done.stdout, done.stderr


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    x = torch.randn(4, 64, device="cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(forward(x, None, None)[0], torch.nn.functional.layer_norm(x, (64,)))
    assert torch.cuda.current_device() == 0
