"""Layer and RMS normalisation in Triton and in CUDA, alone and after the residual add: values, gradients, layouts, contracts."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import on_device

from fastattn import backend, cuda, reference, use_backend
from fastattn.check import check
from fastattn.functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.ops import layer_norm as op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Several rows a program up to N = 2048, then one; N = 9000 loops in backward, 17000 in forward too, three blocks of it.
SHAPES = [(300, 1), (600, 3), (530, 5), (70, 127), (37, 768), (7, 1025), (5, 5000), (3, 9000), (2, 17000)]


@pytest.fixture(autouse=True)
def _on_the_device():
    with on_device():
        yield


def forced(function, name):
    @functools.wraps(function)
    def run(*args, **options):
        with use_backend(name):
            return function(*args, **options)

    return run


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def norm_cases(rms, N, eps):
    """(ours, the reference) of (x, weight, bias) or (x, weight)."""
    ours, wanted = (rms_norm, reference.rms_norm) if rms else (layer_norm, reference.layer_norm)
    return tuple(lambda x, *affine, f=f: f(x, (N,), *affine, eps=eps) for f in (ours, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("M, N", SHAPES)
def test_values_and_gradients(M, N, rms, dtype, fused):
    ours, wanted = norm_cases(rms, N, 1e-5 if N > 5 else 0.1)
    parameters = torch.float32 if N in (127, 5000) else dtype
    inputs = (leaf(M, N, dtype=dtype), *(leaf(N, dtype=parameters) for _ in range(1 if rms else 2)))
    assert not check(forced(ours, fused), wanted, inputs, baseline=forced(ours, "torch"))


@pytest.mark.parametrize("N", [64, 17000])
def test_a_large_common_offset(N, fused):
    ours, wanted = norm_cases(False, N, 1e-5)
    x = (torch.randn(5, N) + 3000).requires_grad_()
    assert not check(forced(ours, fused), wanted, (x, leaf(N), leaf(N)), baseline=forced(ours, "torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0, -1024.0])
@pytest.mark.parametrize("N", [24, 17000])
def test_constant_rows_are_the_bias_at_berts_eps(N, value, dtype, fused):
    bias = leaf(N, dtype=dtype)
    y = forced(layer_norm, fused)(
        torch.full((3, N), value, dtype=dtype), (N,), leaf(N, dtype=dtype), bias, 1e-12
    )
    torch.testing.assert_close(y, bias.expand(3, N))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_default_eps_is_torchs(rms, fused):
    for dtype in DTYPES:
        x = (torch.randn(4, 8) * 1e-4).to(dtype)
        function, stock = (rms_norm, F.rms_norm) if rms else (layer_norm, F.layer_norm)
        torch.testing.assert_close(forced(function, fused)(x, (8,)), stock(x, (8,)))


def add_case(fused, rms, N, dropout_p, prenorm):
    """(ours, the reference) of (x, residual, weight[, bias]), both with the same dropout."""
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (2,))

    def ours(x, residual, *affine):
        torch.manual_seed(5)
        function = add_rms_norm if rms else add_layer_norm
        return function(x, residual, (N,), *affine, eps=1e-5, dropout_p=dropout_p, prenorm=prenorm)

    def wanted(x, residual, *affine):
        function = reference.add_rms_norm if rms else reference.add_layer_norm
        y, r = function(x, residual, (N,), *affine, eps=1e-5, dropout_p=dropout_p, seed=seed)
        return (y.to(x.dtype), r.to(residual.dtype)) if prenorm else y.to(x.dtype)

    return forced(ours, fused), wanted


@pytest.mark.parametrize("dtype, wide", [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in DTYPES[1:])],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("M, N, rms, prenorm, dropout_p", [(70, 100, False, True, 0.0), (70, 100, False, True, 0.3),
                                                           (7, 1025, True, False, 0.3), (2, 9000, False, True, 0.3),
                                                           (1, 17000, False, False, 0.0), (1, 17000, True, True, 0.3)])  # fmt: skip
def test_add_norm(M, N, rms, prenorm, dropout_p, dtype, wide, fused):
    """x of dtype; the residual and the parameters of dtype or wider."""
    affine = [leaf(N, dtype=wide) for _ in range(1 if rms else 2)]
    ours, wanted = add_case(fused, rms, N, dropout_p, prenorm)
    assert not check(ours, wanted, (leaf(M, N, dtype=dtype), leaf(M, N, dtype=wide), *affine))


@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["y only", "r only"])
def test_add_norm_when_one_output_is_used(outputs, fused):
    ours, wanted = add_case(fused, False, 96, 0.2, True)
    inputs = (leaf(9, 96), leaf(9, 96), leaf(96), leaf(96))
    grads = [torch.randn(9, 96) if i in outputs else None for i in range(2)]
    assert not check(ours, wanted, inputs[:2] if outputs == (1,) else inputs, grad_outputs=grads)


@pytest.mark.parametrize("N, dtype", [(100, torch.float32), (104, torch.bfloat16), (101, torch.float16),
                                      (17000, torch.float32)])  # fmt: skip
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_specified_stream(N, dtype, p, fused):
    torch.manual_seed(11)
    seed = torch.randint(0, 2**63 - 1, (2,))
    torch.manual_seed(11)
    x = torch.ones(3, N, dtype=dtype, requires_grad=True)
    _, r = forced(add_layer_norm, fused)(x, torch.zeros(3, N).to(dtype), (N,), dropout_p=p, prenorm=True)
    mask = reference.dropout_mask(seed, (3, N), p).to(dtype)
    assert torch.equal(r, mask)
    assert torch.equal(torch.autograd.grad(r.sum(), x)[0], mask)


@pytest.mark.parametrize("N", [40, 41, 1032])
def test_the_norm_is_of_the_sum_as_returned(N, fused):
    """What backward reads of r is what the statistics are of."""
    x, residual, weight, bias = (torch.randn(shape).bfloat16() for shape in ((9, N), (9, N), (N,), (N,)))
    y, r = forced(add_layer_norm, fused)(x, residual, (N,), weight, bias, dropout_p=0.3, prenorm=True)
    assert torch.equal(y, forced(layer_norm, fused)(r, (N,), weight, bias))


def test_saved_for_backward(fused):
    x, residual, weight, bias = (
        leaf(6, 64, dtype=torch.bfloat16),
        leaf(6, 64),
        *(leaf(64, dtype=torch.bfloat16) for _ in range(2)),
    )
    for function, args, sizes in (
        (layer_norm, (x, (64,), weight, bias), [12, 64, 64, 384]),
        (
            functools.partial(add_layer_norm, dropout_p=0.1),
            (x, residual, (64,), weight, bias),
            [2, 12, 64, 64, 384],
        ),
        (functools.partial(add_rms_norm, prenorm=True), (x, residual, (64,), weight), [6, 64, 384]),
    ):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            forced(function, fused)(*args)
        assert sorted(t.numel() for t in saved) == sizes


LAYOUTS = {
    "transposed": lambda: torch.randn(40, 3, 24).transpose(0, 1),
    "rows apart": lambda: torch.randn(3, 40, 100)[:, :, 16:40],
    "heads of a packed projection": lambda: torch.randn(3, 40, 6 * 24).unflatten(-1, (6, 24))[:, :, 2:4],
    "three uneven leading dims": lambda: torch.randn(3, 5, 4, 2, 24).permute(2, 0, 3, 1, 4)[:, :, :, ::2],
    "last dim strided": lambda: torch.randn(3, 24, 40).transpose(1, 2),
    "expanded": lambda: torch.randn(3, 1, 24).expand(3, 40, 24),
    "one value": lambda: torch.randn(1).expand(3, 40, 24),
    "unaligned": lambda: torch.randn(3 * 40 * 24 + 1)[1:].view(3, 40, 24),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout, fused):
    x, weight, bias = LAYOUTS[layout](), torch.randn(48)[::2], torch.randn(1).expand(24)
    dy, residual = LAYOUTS[layout](), LAYOUTS[layout]()
    results = []
    for strided in (True, False):
        inputs = [t if strided else t.contiguous() for t in (x, residual, weight, bias)]
        inputs = [t.detach().requires_grad_() for t in inputs]
        gradient = dy if strided else dy.contiguous()
        y = forced(layer_norm, fused)(inputs[0], (24,), *inputs[2:])
        z, r = forced(add_layer_norm, fused)(*inputs[:2], (24,), *inputs[2:], prenorm=True)
        results.append([y, z, r, *torch.autograd.grad((y, z, r), inputs, (gradient,) * 3)])
    same = (
        dict(rtol=0, atol=0) if fused == "triton" else {}
    )  # in CUDA, single columns add up in another order
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **same)


def test_a_gradient_without_memory(fused):
    x, weight, bias = leaf(9, 24), leaf(24), leaf(24)
    forced(layer_norm, fused)(x, (24,), weight, bias).sum().backward()
    ours = x.grad, weight.grad, bias.grad
    wanted = torch.autograd.grad(F.layer_norm(x, (24,), weight, bias).sum(), (x, weight, bias))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 4, 5), (4, 5)])
def test_several_normalised_dims(shape, fused):
    dims = shape[-2:]
    inputs = (leaf(*shape), leaf(*dims), leaf(*dims))
    assert not check(
        forced(lambda *a: layer_norm(a[0], dims, *a[1:]), fused),
        lambda *a: reference.layer_norm(a[0], dims, *a[1:]),
        inputs,
    )
    torch.manual_seed(3)
    y = forced(add_rms_norm, fused)(inputs[0], inputs[0], dims, inputs[1], dropout_p=0.5)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (2,))
    eps = torch.finfo(torch.float32).eps
    wanted, _ = reference.add_rms_norm(inputs[0], inputs[0], dims, inputs[1], eps, dropout_p=0.5, seed=seed)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("parameters", ["none", "weight", "bias", "frozen weight", "frozen x"])
@pytest.mark.parametrize("N", [24, 17000])
def test_optional_parameters(parameters, N, fused):
    x, weight, bias = leaf(3, N), leaf(N), leaf(N)
    x = x.detach() if parameters == "frozen x" else x
    weight = {"none": None, "bias": None, "frozen weight": weight.detach()}.get(parameters, weight)
    bias = None if parameters in ("none", "weight") else bias
    assert not check(forced(lambda *a: layer_norm(a[0], (N,), *a[1:]), fused),
                     lambda *a: reference.layer_norm(a[0], (N,), *a[1:]), (x, weight, bias))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_empty(shape, fused):
    N = shape[-1]
    x, weight, bias = leaf(*shape), leaf(N), leaf(N)
    for y in (
        forced(layer_norm, fused)(x, (N,), weight, bias),
        forced(add_layer_norm, fused)(x, x, (N,), weight, bias, dropout_p=0.1),
    ):
        assert y.shape == x.shape
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
        assert dx.shape == x.shape and not dweight.any() and not dbias.any()


def test_deterministic(fused):
    x, weight, bias = leaf(60, 300, dtype=torch.bfloat16), leaf(300), leaf(300)
    dy = torch.randn(60, 300).bfloat16()
    runs = [
        torch.autograd.grad(forced(layer_norm, fused)(x, (300,), weight, bias), (x, weight, bias), dy)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Each kernel of csrc/layer_norm.cu by the first row length that takes it, 16 bytes at a time and one column at a time, and
# rows enough that the persistent blocks of the emulation's 4 multiprocessors go round their ring.
CUDA_CASES = [(1100, 8), (70, 264), (40, 1032), (20, 2056), (6, 3080), (12, 8200), (5, 16392), (2, 33000), (5, 7), (40, 101),
              (3, 257), (3, 2049), (2, 8193)]  # fmt: skip


@pytest.mark.skipif(cuda.not_emulated() is not None, reason="needs the emulated build")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M, N", CUDA_CASES)
def test_every_cuda_kernel_gives_the_same_bits_in_every_order(M, N, dtype):
    """Blocks and threads start, stop and see their copies arrive as they like."""
    inputs = leaf(M, N, dtype=dtype), *(leaf(*shape) for shape in ((M, N), (N,), (N,)))
    ours, wanted = add_case("cuda", False, N, 0.3, True)
    assert not check(ours, wanted, inputs)

    emulation, grads = cuda.extension("_C_emulated"), (torch.randn(M, N).to(dtype), torch.randn(M, N))
    results = []
    for order in ("fifo", "reverse", "pct"):
        emulation.schedule(emulation.orders[order], M + N)
        try:
            outputs = ours(*inputs)
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
        finally:
            emulation.schedule(emulation.orders["fifo"])
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True)), order


@pytest.mark.parametrize("N", [40, 41, 1032, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_row(N, dtype, fused):
    x = torch.randn(6, N).to(dtype)
    x[1, N // 2], x[3, 0], x[4] = torch.nan, torch.inf, torch.finfo(dtype).max
    good = [0, 2, 5]
    for function, affine in ((layer_norm, 2), (rms_norm, 1)):
        inputs = x.clone().requires_grad_(), *(leaf(N, dtype=dtype) for _ in range(affine))
        y = forced(function, fused)(inputs[0], (N,), *inputs[1:], eps=1e-5)
        alone = forced(function, fused)(inputs[0][good], (N,), *inputs[1:], eps=1e-5)
        assert torch.equal(y[good], alone) and y[[1, 3]].isnan().any(1).all()
        dy = torch.randn(6, N).to(dtype)
        dx, dx_alone = (torch.autograd.grad(o, inputs[0], g)[0] for o, g in ((y, dy), (alone, dy[good])))
        assert torch.equal(dx[good], dx_alone[good])


@pytest.mark.skipif(cuda.not_emulated() is not None, reason="needs the emulated build")
def test_frozen_parameters_have_no_partial_sums():
    emulation, x = cuda.extension("_C_emulated"), leaf(9, 64)
    weight, bias = torch.randn(64), leaf(64)
    kernel = "layer_norm_bwd_partials_kernel"
    ran = [emulation.launches().get(kernel, 0)]
    for b in (bias.detach(), bias):
        forced(layer_norm, "cuda")(x, (64,), weight, b).sum().backward()
        ran.append(emulation.launches().get(kernel, 0))
    assert ran[1] == ran[0] and ran[2] == ran[1] + 1


def test_inputs_are_left_alone(fused):
    inputs = leaf(9, 24), leaf(9, 24), leaf(24), leaf(24)
    before, dy = [t.detach().clone() for t in inputs], torch.randn(9, 24)
    y, r = forced(add_layer_norm, fused)(*inputs[:2], (24,), *inputs[2:], prenorm=True)
    torch.autograd.grad((y, r), inputs, (dy, dy))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_the_launchers_behind_torch_ops(fused):
    x, weight, bias = torch.randn(5, 24), torch.randn(24), torch.randn(24)
    ops = torch.ops.fastattn
    y, statistics = ops.layer_norm_fwd(x, weight, bias, 1e-5, False, True, torch.float32, fused)
    seed = torch.tensor([1, 2])
    for name, args in {
        "layer_norm_fwd": (x, weight, None, 1e-5, True, True, torch.float32),
        "layer_norm_bwd": (y, x, weight, statistics, True, True, False),
        "add_layer_norm_fwd": (x.half(), x, weight, bias, seed, 1e-5, 0.5, False, True, True, torch.float16),
        "add_layer_norm_bwd": (y, None, x, weight, statistics, seed, 0.5, True, False, False, torch.float16),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, (*args, fused))


@pytest.mark.parametrize("function", [layer_norm, functools.partial(add_layer_norm, dropout_p=0.2)],
                         ids=["layer_norm", "add_layer_norm"])  # fmt: skip
def test_compiles_to_one_graph(function, fused):
    def block(x, weight, bias):
        rows = (x,) if function is layer_norm else (x, x)
        return function(*rows, (24,), weight, weight).sin() * bias

    inputs = leaf(5, 24), leaf(24), leaf(24)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run in (block, compiled):
        torch.manual_seed(0)
        with use_backend(fused):
            y = run(*inputs)
        results.append((y, *torch.autograd.grad(y.sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def stock_launchers(name, chosen, op_name, *args):
    """The launchers in stock ops, so that float64 reaches the autograd functions."""
    if name == "layer_norm_fwd":
        x, weight, bias, eps, rms, _, dtype = args
        return op._stock("rms_norm" if rms else "layer_norm", x, x.shape[-1:], weight, bias, eps, dtype), x
    if name == "add_layer_norm_fwd":
        x, residual, weight, bias, seed, eps, dropout_p, rms, _, _, dtype = args
        r = residual + x * op._mask(seed, dropout_p, x)
        return op._stock("rms_norm" if rms else "layer_norm", r, r.shape[-1:], weight, bias, eps, dtype), r, x
    dy, dr, r, weight, _, seed, dropout_p, _, _, rms, dtype = args
    with torch.enable_grad():
        r, weight = r.detach().requires_grad_(), weight.detach().requires_grad_()
        y = op._stock("rms_norm" if rms else "layer_norm", r, r.shape[-1:], weight, None, 1e-5, dtype)
    dresidual, dweight = torch.autograd.grad(y, (r, weight), dy)
    dresidual = dresidual if dr is None else dresidual + dr
    return dresidual * op._mask(seed, dropout_p, r), dresidual, dweight, dy.sum(0)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_double_backward(rms, monkeypatch):
    monkeypatch.setattr(backend, "run", stock_launchers)
    double = functools.partial(leaf, dtype=torch.float64)
    x, residual, weight, bias = double(3, 5), double(3, 5), double(5), None if rms else double(5)
    seed = torch.tensor([3, 4])
    norm = lambda *a: op._Norm.apply(*a, (1e-5, rms, torch.float64, "triton"))  # noqa: E731
    add = lambda *a: op._AddNorm.apply(*a, seed, 1e-5, 0.4, rms, torch.float64, "triton")  # noqa: E731
    assert torch.autograd.gradgradcheck(norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(add, (x, residual, weight, bias))


def test_autocast_is_torchs():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("triton", "torch"):
            assert forced(layer_norm, name)(x, (8,), weight).dtype == F.layer_norm(x, (8,), weight).dtype
    assert op.WIDENED == {"layer_norm": {"cuda"}, "rms_norm": {"cuda"}}


def test_what_autocast_widens_and_out_dtype_declines(monkeypatch, fused):
    x, weight, bias = leaf(9, 24, dtype=torch.bfloat16), leaf(24), leaf(24)
    monkeypatch.setitem(op.WIDENED, "layer_norm", frozenset({"cpu"}))
    with torch.autocast("cpu", dtype=torch.bfloat16), use_backend(fused):
        assert layer_norm(x, (24,), weight, bias, out_dtype="input").dtype == torch.bfloat16
        assert add_layer_norm(x, x, (24,), weight, bias).dtype == torch.float32
        y = layer_norm(x, (24,), weight, bias)
    torch.testing.assert_close(y, forced(layer_norm, fused)(x.float(), (24,), weight, bias))
    dy = torch.randn(9, 24)
    ours, wanted = (
        torch.autograd.grad(f, (x, weight), dy)
        for f in (y, forced(layer_norm, fused)(x.float(), (24,), weight, bias))
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals_name_their_reason(fused):
    x = torch.randn(2, 8)
    for call, reason in (
        (lambda: layer_norm(x.double(), (8,)), "float64"),
        (lambda: layer_norm(x, (8,), torch.ones(8).half(), torch.ones(8)), "float16 and bias torch.float32"),
        (lambda: rms_norm(x.long(), (8,)), "int64"),
        (lambda: add_layer_norm(x, x.double(), (8,)), "residual's dtype torch.float64"),
        (lambda: layer_norm(x.to_sparse(), (8,)), "sparse"),
        (lambda: torch.func.vmap(lambda t: layer_norm(t, (8,)))(x), "torch.func"),
    ):
        with use_backend(fused), pytest.raises(NotImplementedError, match=reason):
            call()


def test_stock_torch_serves_what_others_refuse():
    x = torch.randn(2, 8)
    for dtypes in ((torch.float64, torch.float32, torch.float32), (torch.float32, torch.float16, torch.bfloat16),
                   (torch.bfloat16, torch.float32, torch.float32)):  # fmt: skip
        x, weight, bias = (
            torch.randn(s).to(dtype) for s, dtype in zip(((2, 8), (8,), (8,)), dtypes, strict=True)
        )
        y = layer_norm(x, (8,), weight, bias)
        assert y.dtype == x.dtype
        torch.testing.assert_close(
            y, reference.layer_norm(*(t.double() for t in (x,)), (8,), weight, bias).to(y.dtype)
        )


def test_wrong_arguments():
    x, weight = torch.randn(2, 8), torch.randn(8)
    for call, error, message in (
        (
            lambda: layer_norm(x, (4,)),
            RuntimeError,
            r"normalized_shape=\(4,\), which must be x's last dims; x is \(2, 8\)",
        ),
        (lambda: layer_norm(x, ()), RuntimeError, "normalized_shape"),
        (lambda: rms_norm(x, (8,), weight[:4]), RuntimeError, r"weight to be of same .*; it is \(4,\)"),
        (
            lambda: layer_norm(x, (8,), weight, weight[None]),
            RuntimeError,
            r"Expected bias to be of same .*; it is \(1, 8\)",
        ),
        (lambda: add_layer_norm(x, x[:1], (8,)), ValueError, r"residual is \(1, 8\)"),
        (lambda: add_rms_norm(x, x, (8,), dropout_p=1.5), ValueError, "dropout_p is 1.5"),
        (lambda: layer_norm(x, (8,), out_dtype="fp32"), ValueError, "out_dtype is 'fp32'"),
    ):
        with pytest.raises(error, match=message):
            call()


@hypothesis.settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    N=st.integers(1, 40),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_strides(sizes, N, order, step, dtype, fused):
    torch.manual_seed(N)
    dims = list(range(len(sizes) + 1))
    order.shuffle(dims)
    shape = [*sizes, N]
    memory = torch.randn([shape[d] * (step if d == dims[-1] else 1) for d in dims]).to(dtype)
    x = memory.permute(
        sorted(dims, key=dims.index) if not dims else [dims.index(d) for d in range(len(dims))]
    )
    x = (
        x[tuple(slice(None, None, step if d == dims[-1] else 1) for d in range(len(dims)))]
        .detach()
        .requires_grad_()
    )
    weight, bias, dy = leaf(N), leaf(N), torch.randn(N).to(dtype).expand(shape)
    ours, wanted = norm_cases(False, N, 0.1)
    assert not check(
        forced(ours, fused), wanted, (x, weight, bias), baseline=forced(ours, "torch"), grad_outputs=(dy,)
    )
