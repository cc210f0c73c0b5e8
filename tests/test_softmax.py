"""Softmax, log-softmax and the scaled, masked one in Triton and CUDA C++: values, gradients, layouts, contracts."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from conftest import on_device

from fastattn import backend, reference, use_backend
from fastattn.check import check
from fastattn.functional import log_softmax, scaled_masked_softmax, softmax
from fastattn.ops import softmax as op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def leaf(*shape, dtype=torch.float32, std=1.0):
    return (std * torch.randn(shape)).to(dtype).requires_grad_()


# (shape, dim): several rows a program up to N = 256 (1024 forward), then one; 17000 loops in backward, 33000 in forward too;
# across the contiguous dim the tile is 64 x 128 and loops beyond.
ROWS = [((600, 1), -1), ((70, 3), 1), ((70, 127), -1), ((9, 768), -1), ((3, 1025), -1), ((2, 5000), -1),
        ((2, 17000), -1), ((2, 34000), -1)]  # fmt: skip
ACROSS = [
    ((3, 5, 7, 2), 0),
    ((3, 5, 7, 2), 1),
    ((3, 5, 7, 2), 2),
    ((40, 150), 0),
    ((2, 300, 70), 1),
    ((1100, 20), 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("shape, dim", ROWS + ACROSS, ids=str)
def test_values_and_gradients(fused, shape, dim, log, dtype):
    ours, wanted = (log_softmax, reference.log_softmax) if log else (softmax, reference.softmax)
    assert not check(forced(ours, fused), wanted, (leaf(*shape, dtype=dtype, std=3.0),), options={"dim": dim})


# Around every change of variant, and what lies between two 16-byte vectors.
@pytest.mark.parametrize("N", [1, 7, 8, 9, 31, 32, 33, 127, 129, 512, 513, 1024, 3072, 3073, 8193, 33000])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("fused", ["cuda"], indirect=True)
def test_any_row_length_anywhere(fused, N, offset):
    mask = torch.rand(3 * N + offset)[offset:].view(3, N) > 0.3
    for dtype in DTYPES if N < 3000 else DTYPES[2:]:
        x = (3 * torch.randn(3 * N + offset)).to(dtype)[offset:].view(3, N)
        x.requires_grad_()
        for ours, wanted, options in (
            (softmax, reference.softmax, {}),
            (log_softmax, reference.log_softmax, {}),
            (scaled_masked_softmax, reference.scaled_masked_softmax, {"mask": mask, "scale": 0.8}),
        ):
            assert not check(forced(ours, fused), wanted, (x,), options=options)


@pytest.mark.parametrize("N", [131, 1031, 9001])
@pytest.mark.parametrize("fused", ["cuda"], indirect=True)
def test_the_maximum_may_be_anywhere(fused, N):
    """exp of it overflows where a thread does not know of it."""
    places = [*range(9), N // 2, *range(N - 9, N)]
    x = torch.randn(len(places), N)
    rows = torch.arange(len(places))
    x[rows, places] = 200.0
    assert torch.equal(forced(softmax, fused)(x)[rows, places], torch.ones(len(places)))
    assert not forced(log_softmax, fused)(x)[rows, places].any()


@pytest.mark.parametrize("N", [300, 1030])
@pytest.mark.parametrize("fused", ["cuda"], indirect=True)
def test_causal_rows_end_at_the_diagonal(fused, N):
    scores = torch.randn(N, N).bfloat16()
    mask = torch.rand(N) > 0.3
    for options in ({"causal": True}, {"causal": True, "mask": mask}):
        inputs = (scores[-40:].clone().requires_grad_(),) if N > 1000 else (scores.requires_grad_(),)
        assert not check(
            forced(scaled_masked_softmax, fused), reference.scaled_masked_softmax, inputs, options=options
        )


@pytest.mark.parametrize("std", [8.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_large_logits(fused, std, offset):
    x = (std * torch.randn(5, 200) + offset).requires_grad_()
    for ours, wanted in ((softmax, reference.softmax), (log_softmax, reference.log_softmax)):
        assert not check(forced(ours, fused), wanted, (x,))


MASKS = {"none": None, "keys": (2, 1, 1, 70), "queries": (9, 1), "a batch": (2, 1, 9, 70), "a head": (3, 1, 70),
         "every score": (2, 3, 9, 70), "one for all": (1,)}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_masked_softmax(fused, mask, causal):
    options = {"scale": -0.7, "causal": causal, "mask": None}
    if MASKS[mask]:
        options["mask"] = torch.rand(MASKS[mask]) > 0.4
    assert not check(
        forced(scaled_masked_softmax, fused),
        reference.scaled_masked_softmax,
        (leaf(2, 3, 9, 70),),
        options=options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", ["triton", "cuda", "torch"], indirect=True)
@pytest.mark.parametrize("shape", [(2, 70, 130), (3, 33000)], ids=str)
def test_scaled_masked_softmax_rows_with_nothing_attended(shape, fused, dtype):
    mask = torch.rand(shape) > 0.5
    mask[..., 1, :] = False
    scores = leaf(*shape, dtype=dtype, std=4.0)
    options = {"scale": 0.3, "causal": len(shape) == 3, "mask": mask}
    ours = forced(scaled_masked_softmax, fused)
    assert not check(ours, reference.scaled_masked_softmax, (scores,), options=options)
    y = ours(scores, **options)
    gradient = torch.autograd.grad(y.sum(), scores)[0]
    assert not y[..., 1, :].any() and not gradient[..., 1, :].any()


@pytest.mark.parametrize("N", [40, 33000])
def test_what_is_excluded_never_leaks(fused, N):
    scores, dy = torch.randn(2, 4, N), torch.randn(2, 4, N)
    wanted = reference.scaled_masked_softmax(scores, causal=True)
    above = torch.ones(4, N, dtype=torch.bool).triu(1)
    leaky = scores.masked_fill(above, math.nan).requires_grad_()
    y = forced(scaled_masked_softmax, fused)(leaky, causal=True)
    dscores = torch.autograd.grad(y, leaky, dy.masked_fill(above, math.inf))[0]
    torch.testing.assert_close(y, wanted)
    assert dscores.isfinite().all() and not dscores.masked_select(above).any()


@pytest.mark.parametrize("N", [5, 33000])
def test_infinities_are_torchs(fused, N):
    x = torch.randn(5, N)
    x[0] = -math.inf
    x[1, : N - 1] = -math.inf
    x[2, 1], x[3, 2] = math.inf, math.nan
    for ours, stock in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        torch.testing.assert_close(forced(ours, fused)(x), stock(x, -1), equal_nan=True)
    scores = forced(scaled_masked_softmax, fused)(x)
    assert not scores[0].any() and scores[1, -1] == 1


LAYOUTS = {
    "transposed": lambda: torch.randn(40, 3, 24).transpose(0, 1),
    "channels last": lambda: torch.randn(2, 5, 3, 4).permute(0, 3, 1, 2),
    "rows apart": lambda: torch.randn(3, 40, 100)[:, :, 16:40],
    "four uneven dims": lambda: torch.randn(3, 5, 4, 2, 8).permute(2, 0, 3, 1, 4)[:, :, ::2, ::2],
    "expanded": lambda: torch.randn(3, 1, 24).expand(3, 40, 24),
    "one value": lambda: torch.randn(1).expand(3, 40, 24),
    "unaligned": lambda: torch.randn(3 * 40 * 24 + 1)[1:].view(3, 40, 24),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(fused, layout):
    x, dy = LAYOUTS[layout](), LAYOUTS[layout]()
    mask = torch.rand(x.shape[::-1]).permute(*range(x.dim())[::-1]) > 0.3
    functions = [functools.partial(softmax, dim=dim) for dim in range(x.dim())]
    functions.append(functools.partial(scaled_masked_softmax, mask=mask, causal=True))
    for function in functions:
        results = []
        for given, gradient in ((x, dy), (x.contiguous(), dy.contiguous())):
            given = given.detach().requires_grad_()
            y = forced(function, fused)(given)
            assert y.is_contiguous()
            results.append((y, torch.autograd.grad(y, given, gradient)[0]))
        for a, b in zip(*results, strict=True):  # another layout may sum in another order
            torch.testing.assert_close(a, b)


def test_a_gradient_without_memory(fused):
    x = leaf(3, 24)
    for ours, stock in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        gradients = [torch.autograd.grad(f(x, 0)[1].sum(), x)[0] for f in (forced(ours, fused), stock)]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(
            *(torch.autograd.grad(f(x, 1).sum(), x)[0] for f in (forced(ours, fused), stock))
        )


@pytest.mark.parametrize("shape, dim", [((0, 8), 1), ((8, 0), 1), ((8, 0), 0), ((), 0), ((), -1), ((1,), 0)])
def test_empty_and_scalar(fused, shape, dim):
    x = leaf(*shape)
    for ours, stock in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        y = forced(ours, fused)(x, dim)
        torch.testing.assert_close(y, stock(x, dim))
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    if x.dim() == 2:
        assert forced(scaled_masked_softmax, fused)(x).shape == x.shape


@pytest.mark.parametrize("from_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to_dtype", DTYPES, ids=str)
def test_dtype_is_torchs(fused, from_dtype, to_dtype):
    x = leaf(9, 40, dtype=from_dtype, std=4.0)
    for ours, stock in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        assert forced(ours, fused)(x, -1, to_dtype).dtype == to_dtype
        in_dtype = functools.partial(stock, dim=-1, dtype=to_dtype)
        wanted = functools.partial(stock, dim=-1)
        assert not check(lambda t, f=ours: forced(f, fused)(t, -1, to_dtype), wanted, (x,), baseline=in_dtype)


@pytest.mark.parametrize("dim", [0, 1])
def test_x_is_rounded_to_the_dtype_of_the_result_first(fused, dim):
    x = 256 + torch.arange(24.0).view(4, 6)  # bfloat16 has every second of them
    for ours, stock in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        torch.testing.assert_close(
            forced(ours, fused)(x, dim, torch.bfloat16), stock(x, dim, dtype=torch.bfloat16)
        )


def test_the_launchers_behind_torch_ops(fused):
    x, mask, ops = torch.randn(2, 5, 24), (torch.rand(5, 24) > 0.5).expand(2, 5, 24), torch.ops.fastattn
    y = torch.softmax(x, 1)
    for name, args in {
        "softmax_fwd": (x, 1, True, torch.float16),
        "softmax_bwd": (x, y, 1, False, torch.float16),
        "scaled_masked_softmax_fwd": (x, mask, 0.5, True, torch.float32),
        "scaled_masked_softmax_bwd": (x, y, 0.5, True, torch.float32),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, (*args, fused))


@pytest.mark.parametrize("function", [softmax, functools.partial(scaled_masked_softmax, causal=True, scale=0.5)],
                         ids=["softmax", "scaled_masked_softmax"])  # fmt: skip
@pytest.mark.parametrize("fused", ["triton", "cuda", None], ids=["triton", "cuda", "default"], indirect=True)
def test_compiles_to_one_graph(function, fused):
    x = leaf(5, 24)
    compiled = torch.compile(lambda t: function(t).sin(), fullgraph=True, backend="aot_eager")
    with use_backend(fused):
        results = [(y, torch.autograd.grad(y.sum(), x)[0]) for y in (function(x).sin(), compiled(x))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def stock_launchers(name, chosen, op_name, *args):
    """The launchers in stock ops, so that float64 reaches the autograd functions."""
    if name == "softmax_fwd":
        x, dim, log, dtype = args
        return (torch.log_softmax if log else torch.softmax)(x, dim, dtype=dtype)
    if name == "scaled_masked_softmax_fwd":
        scores, mask, scale, causal, _ = args
        return op._torch_scaled_masked_softmax(scores, mask, scale, causal)
    dy, y, *options = args
    if name == "softmax_bwd" and options[1]:
        return dy - y.exp() * dy.sum(options[0], keepdim=True)
    dim, factor = (options[0], 1.0) if name == "softmax_bwd" else (-1, options[0])
    return factor * op._composite_backward(dy, y, dim)


def test_double_backward(monkeypatch):
    monkeypatch.setattr(backend, "run", stock_launchers)
    x, mask = leaf(3, 5, dtype=torch.float64), torch.rand(3, 5) > 0.3
    for log in (False, True):
        assert torch.autograd.gradgradcheck(
            lambda t, log=log: op._Softmax.apply(t, 0, log, t.dtype, "triton"), x
        )
    masked = lambda t: op._ScaledMaskedSoftmax.apply(t, mask, 0.7, True, t.dtype, "triton")  # noqa: E731
    assert torch.autograd.gradgradcheck(masked, x)


def test_autocast_is_torchs(fused, monkeypatch):
    x = torch.randn(3, 8).bfloat16()
    assert op.WIDENED == {"cuda"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in (fused, "torch"):
            assert forced(softmax, name)(x).dtype == torch.softmax(x, -1).dtype
        monkeypatch.setattr(op, "WIDENED", frozenset({"cpu"}))
        for function in (softmax, log_softmax, scaled_masked_softmax):
            assert forced(function, fused)(x).dtype == torch.float32
            assert forced(function, fused)(x, out_dtype="input").dtype == torch.bfloat16


def test_refusals_name_their_reason(fused):
    x = torch.randn(2, 8)
    for call, reason in (
        (lambda: softmax(x.double()), "input dtype torch.float64"),
        (lambda: log_softmax(x, dtype=torch.float64), "result dtype torch.float64"),
        (lambda: softmax(x.long(), dtype=torch.float32), "input dtype torch.int64"),
        (lambda: scaled_masked_softmax(x.double()), "float64"),
    ):
        with use_backend(fused), pytest.raises(NotImplementedError, match=reason):
            call()
    assert softmax(x.long(), dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(softmax(x.double()), torch.softmax(x.double(), -1))


def test_wrong_arguments():
    x = torch.randn(2, 8)
    for call, error, message in (
        (lambda: softmax(x, 2), IndexError, "dim is 2, x has 2 dims"),
        (lambda: log_softmax(x, -3), IndexError, "dim is -3"),
        (lambda: softmax(x, out_dtype="fp32"), ValueError, "out_dtype is 'fp32'"),
        (lambda: scaled_masked_softmax(x[0]), ValueError, r"scores is \(8,\)"),
        (
            lambda: scaled_masked_softmax(x, torch.zeros(2, 8)),
            TypeError,
            "mask has dtype torch.float32, must be bool",
        ),
        (
            lambda: scaled_masked_softmax(x, torch.ones(3, 8).bool()),
            ValueError,
            r"mask is \(3, 8\), must broadcast",
        ),
        (
            lambda: scaled_masked_softmax(x, torch.ones(2, 8, device="meta").bool()),
            ValueError,
            "mask is on meta",
        ),
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
    sizes=st.lists(st.integers(3, 9), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    steps=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    dtype=st.sampled_from(DTYPES),
    log=st.booleans(),
)
def test_any_shape_and_strides(fused, sizes, order, steps, dtype, log):
    """x is a strided view of memory whose dims lie in any order."""
    dims = list(range(len(sizes)))
    order.shuffle(dims)
    memory = torch.randn([sizes[d] * steps[d] for d in dims]).to(dtype)
    x = memory.permute([dims.index(d) for d in range(len(dims))])[
        tuple(slice(None, None, steps[d]) for d in range(len(dims)))
    ]
    ours, wanted = (log_softmax, reference.log_softmax) if log else (softmax, reference.softmax)
    x = x.detach().requires_grad_()
    assert not check(forced(ours, fused), wanted, (x,), options={"dim": dims[0]})
