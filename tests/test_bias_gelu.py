"""Bias and GELU in Triton: values, gradients, layouts, contracts."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import on_device

from fastattn import backend, reference, use_backend
from fastattn.check import check
from fastattn.functional import bias_gelu
from fastattn.kernels import bias_gelu as kernels
from fastattn.ops import bias_gelu as op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("none", "tanh")
# One program's rows are 2048 / min(512, N rounded up): three row blocks a program in backward, ragged column blocks.
SHAPES = [(1, 1), (6200, 5), (700, 33), (97, 512), (50, 513), (13, 1536)]


@pytest.fixture(autouse=True)
def _on_the_device():
    with on_device():
        yield


def forced(function, name="triton"):
    @functools.wraps(function)
    def run(*args, **options):
        with use_backend(name):
            return function(*args, **options)

    return run


def leaf(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def wrong(inputs, approximate="none", **options):
    ours = functools.partial(bias_gelu, approximate=approximate)
    wanted = functools.partial(reference.bias_gelu, approximate=approximate)
    return check(forced(ours), wanted, inputs, baseline=forced(ours, "torch"), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("M, N", SHAPES)
def test_values_and_gradients(M, N, approximate, dtype):
    parameters = torch.float32 if N in (33, 513) else dtype
    assert not wrong((leaf(M, N, dtype=dtype, scale=3), leaf(N, dtype=parameters)), approximate)


@pytest.mark.parametrize("given", ["no bias", "frozen bias", "frozen x"])
def test_what_has_no_gradient(given):
    x, bias = leaf(9, 40), leaf(40)
    bias = {"no bias": None, "frozen bias": bias.detach(), "frozen x": bias}[given]
    assert not wrong((x.detach() if given == "frozen x" else x, bias))
    with use_backend("triton"), torch.no_grad():
        assert torch.equal(bias_gelu(x, bias), forced(bias_gelu)(x.detach(), bias))


@pytest.mark.parametrize("approximate", KINDS)
def test_far_from_zero(approximate):
    """The tails as what they are, not as 1 - 1: relative to the exact value down to where fp32 ends."""
    x = torch.cat(
        [
            torch.linspace(-9 if approximate == "none" else -5, 12, 4001),
            torch.tensor([-1e30, -300.0, 300.0, 1e30]),
        ]
    )
    x = x.requires_grad_()  # fmt: skip
    y = forced(bias_gelu)(x, approximate=approximate)
    exact = x.detach().double().requires_grad_()
    wanted = reference.bias_gelu(exact, approximate=approximate)
    if approximate == "none":
        wanted = torch.where(exact < 0, exact * torch.special.erfc(-exact / 2**0.5) / 2, wanted)
    torch.testing.assert_close(y.double(), wanted, rtol=3e-5, atol=1e-37)
    dx, wanted_dx = (torch.autograd.grad(t.sum(), s)[0] for t, s in ((y, x), (wanted, exact)))
    finite = wanted_dx.isfinite()
    torch.testing.assert_close(dx[finite].double(), wanted_dx[finite], rtol=1e-4, atol=1e-7)
    assert dx.isfinite().all()


@pytest.mark.parametrize("approximate", KINDS)
def test_infinity_and_nan(approximate):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    y = forced(bias_gelu)(x, approximate=approximate)
    wanted = reference.bias_gelu(x, approximate=approximate)
    assert torch.equal(y.nan_to_num(7.0), wanted.nan_to_num(7.0)) and y[0] == float("inf")


LAYOUTS = {
    "transposed": lambda: torch.randn(40, 3, 24).transpose(0, 1),
    "rows apart": lambda: torch.randn(3, 40, 100)[:, :, 16:40],
    "three uneven leading dims": lambda: torch.randn(3, 5, 4, 2, 24).permute(2, 0, 3, 1, 4)[:, :, :, ::2],
    "last dim strided": lambda: torch.randn(3, 24, 40).transpose(1, 2),
    "expanded": lambda: torch.randn(3, 1, 24).expand(3, 40, 24),
    "one value": lambda: torch.randn(1).expand(3, 40, 24),
    "unaligned": lambda: torch.randn(3 * 40 * 24 + 1)[1:].view(3, 40, 24),
    "one row": lambda: torch.randn(24),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout):
    tensors = LAYOUTS[layout](), torch.randn(48)[::2], LAYOUTS[layout]()
    results = []
    for strided in (True, False):
        x, bias, dy = (t if strided else t.contiguous() for t in tensors)
        x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
        y = forced(bias_gelu)(x, bias)
        results.append([y, *torch.autograd.grad(y, (x, bias), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_strides(shape, order, step, dtype):
    dims = list(range(len(shape)))
    order.shuffle(dims)
    memory = torch.randn([shape[d] * step for d in dims])[(slice(None, None, step),) * len(dims)]
    x = memory.permute([dims.index(d) for d in range(len(dims))]).to(dtype)
    bias, dy = leaf(shape[-1]), torch.randn(shape[-1]).to(dtype).expand(shape)
    results = []
    for t in (x, x.contiguous()):
        t = t.detach().requires_grad_()
        y = forced(bias_gelu)(t, bias)
        results.append([y, *torch.autograd.grad(y, (t, bias), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.testing.assert_close(results[0][0], F.gelu(x.float() + bias).to(dtype))


def test_a_gradient_without_memory():
    x, bias = leaf(9, 24), leaf(24)
    forced(bias_gelu)(x, bias).sum().backward()
    wanted = torch.autograd.grad(F.gelu(x + bias).sum(), (x, bias))
    for ours, theirs in zip((x.grad, bias.grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_empty(shape):
    x, bias = leaf(*shape), leaf(shape[-1])
    y = forced(bias_gelu)(x, bias)
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert y.shape == dx.shape == shape and dbias.shape == bias.shape and not dbias.any()


def test_deterministic_and_inputs_left_alone():
    x, bias, dy = leaf(300, 600, dtype=torch.bfloat16), leaf(600), torch.randn(300, 600).bfloat16()
    before = [t.detach().clone() for t in (x, bias)]
    runs = [torch.autograd.grad(forced(bias_gelu)(x, bias), (x, bias), dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, bias), before, strict=True))


def test_saves_its_input_and_nothing_else():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forced(bias_gelu)(leaf(6, 64), leaf(64))
    assert sorted(t.numel() for t in saved) == [64, 384]


@pytest.mark.parametrize("approximate", KINDS)
def test_double_backward(approximate, monkeypatch):
    def stock(
        name, chosen, op_name, *args
    ):  # the launchers in stock ops, so that float64 reaches the Function
        return op._stock(*args)

    monkeypatch.setattr(backend, "run", stock)
    x, bias = leaf(3, 5, dtype=torch.float64), leaf(5, dtype=torch.float64)
    function = lambda *t: op._BiasGelu.apply(*t, approximate == "tanh", "triton")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (x, bias))


def test_autocast_leaves_the_dtype_to_x():
    x, bias = leaf(3, 8, dtype=torch.bfloat16), leaf(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("triton", "torch"):
            assert forced(bias_gelu, name)(x, bias).dtype == torch.bfloat16


def test_compiles_to_one_graph_and_leaves_fusing_to_inductor(monkeypatch):
    x, bias = leaf(5, 24), leaf(24)
    compiled = torch.compile(lambda x, b: bias_gelu(x, b).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bias), F.gelu(x + bias).sin())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backend.choose(op.OP, op.WHY_NOT, x, bias, inductor_fuses=True) == "torch"


def test_tiles_are_legal():
    for table in (kernels.FORWARD, kernels.BACKWARD):
        for N in (1, 2, 511, 512, 513, 65536):
            options = kernels.tile(table, N)
            assert options["BLOCK_M"] * options["BLOCK_N"] == table["TILE"]
            assert options["BLOCK_N"] & (options["BLOCK_N"] - 1) == 0


def test_refusals_and_what_stock_torch_then_serves():
    x = torch.randn(2, 8, dtype=torch.float64)
    with use_backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        bias_gelu(x)
    torch.testing.assert_close(bias_gelu(x, x[0]), F.gelu(x + x[0]))
    mixed = bias_gelu(x.bfloat16(), x[0].float())
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((torch.zeros(2, 8), torch.zeros(7)), ValueError, r"bias is \(7,\) on cpu, must be \(8,\)"),
        ((torch.zeros(2, 8), torch.zeros(1, 8)), ValueError, r"bias is \(1, 8\)"),
        ((torch.zeros(2, 8), torch.zeros(8).int()), TypeError, "bias is torch.int32"),
        ((torch.zeros(2, 8).int(),), ValueError, "x must be floating"),
        ((torch.zeros(()),), ValueError, r"x must be floating \(..., N\)"),
        ((torch.zeros(2, 8), None, "erf"), ValueError, "approximate is 'erf'"),
    ],
)
def test_wrong_arguments(args, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(*args)
