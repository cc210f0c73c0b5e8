"""scaled_dot_product_attention against torch's own samples, and stock torch's service of `attention` against the reference."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import on_device, present
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db

import fastattn
from fastattn import backend, reference
from fastattn.check import check
from fastattn.functional import attention, attention_varlen, scaled_dot_product_attention
from fastattn.ops import attention as ops_attention

SDPA = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


# what torch's own tests allow these samples, whose logits reach hundreds
TORCHS_TOLERANCE = dict(atol=5e-5, rtol=5e-6)


@pytest.fixture(autouse=True)
def _on_the_device():
    with on_device():
        yield


def heads(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "bottom-right": dict(causal="bottom_right"),
    "window": dict(window=(2, 1)),
    "causal window, lengths": dict(causal=True, window=(3, None), q_lens=[5, 2], kv_lens=[7, 0]),
    "bottom-right lengths": dict(causal="bottom_right", q_lens=[5, 2], kv_lens=[7, 3]),
    "mask": dict(mask=(2, 1, 5, 7)),
    "mask and bias": dict(mask=(1, 4, 1, 7), bias=(5, 7)),
    "softcap": dict(softcap=2.0),
    "alibi": dict(alibi_slopes=(4,), causal=True),
    "alibi a batch": dict(alibi_slopes=(2, 4), bias=(2, 4, 5, 7)),
    "sinks": dict(sinks=(4,), mask=(2, 1, 5, 7)),
    "scale": dict(scale=-0.3),
}


def tensors(options):
    """Shapes and lists of an OPTIONS row as tensors."""
    made = dict(options)
    for name in ("bias", "alibi_slopes", "sinks"):
        if name in made:
            made[name] = torch.randn(made[name])
    if "mask" in made:
        made["mask"] = torch.rand(made["mask"]) > 0.4
    for name in ("q_lens", "kv_lens"):
        if name in made:
            made[name] = torch.tensor(made[name], dtype=torch.int32)
    return made


@pytest.mark.parametrize("returns", [{}, {"return_lse": True, "return_weights": True}], ids=["o", "all"])
@pytest.mark.parametrize("row", OPTIONS)
def test_stock_torch_serves_every_option(row, returns):
    options = tensors(OPTIONS[row])
    q, k, v = heads(2, 4, 5, 8), heads(2, 2, 7, 8), heads(2, 2, 7, 6)
    wanted = lambda *qkv, **named: reference.attention(*qkv, **named)[: 3 if returns else 1]  # noqa: E731
    ours = lambda *qkv, **named: attention(*qkv, **named, **returns)  # noqa: E731
    finite = [torch.randn(2, 4, 5, 6), None, torch.randn(2, 4, 5, 7)]
    assert not check(ours, wanted, (q, k, v), options=options, grad_outputs=finite[: 3 if returns else 1])


def test_rows_that_attend_to_nothing_have_gradients_of_zero():
    q, k, v = heads(1, 2, 3, 8), heads(1, 2, 4, 8), heads(1, 2, 4, 8)
    bias = torch.zeros(3, 4).index_fill(0, torch.tensor([1]), float("-inf")).requires_grad_()
    for returns in ({}, {"return_lse": True}, {"return_weights": True}):
        o = attention(q, k, v, bias=bias, **returns)
        o = o[0] if returns else o
        grads = torch.autograd.grad(o.sum(), (q, k, v, bias))
        assert not o[:, :, 1].any() and not grads[0][:, :, 1].any()
        assert all(g.isfinite().all() for g in grads)


def test_padding_never_leaks_from_stock_torch():
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    clean = attention(q, k, v, kv_lens=torch.tensor([3]))
    k[:, :, 3:], v[:, :, 3:] = float("nan"), float("inf")
    assert torch.equal(attention(q, k, v, kv_lens=torch.tensor([3])), clean)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_varlen_equals_its_sequences(name):
    cu_q, cu_k = torch.tensor([0, 3, 3, 8]), torch.tensor([0, 0, 4, 9])
    inputs = heads(8, 4, 8), heads(9, 2, 8), heads(9, 2, 8)
    ours = lambda q, k, v: attention_varlen(q, k, v, cu_q, cu_k, 5, 5, causal="bottom_right", return_lse=True)  # noqa: E731
    wanted = lambda q, k, v: reference.attention_varlen(q, k, v, cu_q, cu_k, causal="bottom_right")  # noqa: E731
    with backend.use_backend(name):
        assert not check(ours, wanted, inputs, grad_outputs=[torch.randn(8, 4, 8), None])


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_torchs_own_samples_agree(name, device):
    """All 25 of torch's samples, output and gradients, each served by the backend itself; dropout against the one stream."""
    samples = list(SDPA.sample_inputs(device, torch.float32, requires_grad=True))
    backend.calls.clear()
    for sample in samples:
        options = dict(sample.kwargs)
        inputs = (sample.input, *sample.args, options.pop("attn_mask", None))

        def ours(*inputs, **options):
            torch.manual_seed(1)
            with backend.use_backend(name):
                return scaled_dot_product_attention(*inputs, **options)

        def wanted(*inputs, **options):
            torch.manual_seed(1)
            dropped = options["dropout_p"] and name == "triton"
            return (with_the_stream if dropped else F.scaled_dot_product_attention)(*inputs, **options)

        got, expected = ours(*inputs, **options), wanted(*inputs, **options)
        torch.testing.assert_close(got, expected, **TORCHS_TOLERANCE)
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        dy = torch.randn_like(expected)
        for pair in zip(
            torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
        ):
            torch.testing.assert_close(*pair, **TORCHS_TOLERANCE)
    assert len(samples) == 25 and set(backend.calls) == {("attention", name)}


def with_the_stream(q, k, v, attn_mask, *, dropout_p, is_causal):
    """The reference with the seed that the next draw gives."""
    assert attn_mask is None
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    four = [t.expand(*batch, *t.shape[-2:]).reshape(-1, batch[-1], *t.shape[-2:]) for t in (q, k, v)]
    seed = torch.randint(0, 2**63 - 1, (2,))
    o = reference.attention(*four, causal=is_causal, dropout_p=dropout_p, seed=seed)[0]
    return o.reshape(*batch, *o.shape[-2:])


def test_bad_arguments_meet_torchs_own_answer():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 7)
    for bad in ((q, q, q, torch.ones(5, 5)), (q, k, k), (q, q, q.double()), (q[0, 0, 0], q, q)):
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(*bad)
        with pytest.raises(RuntimeError):
            scaled_dot_product_attention(*bad)
        with backend.use_backend("triton"), pytest.raises(NotImplementedError):
            scaled_dot_product_attention(*bad)
    both = dict(attn_mask=torch.ones(3, 3), is_causal=True)
    wanted = F.scaled_dot_product_attention(q, q, q, **both)
    assert torch.equal(scaled_dot_product_attention(q, q, q, **both), wanted)


def test_explain_names_the_reason():
    q = torch.randn(1, 2, 3, 300)
    assert "head dims up to 256" in fastattn.explain(attention, q, q, q)


def test_autocast_runs_in_the_autocast_dtype():
    q = torch.randn(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, q, q).dtype == scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16


def test_composite_is_differentiable_twice_in_float64():
    q, k, v = (
        torch.randn(1, H, S, 4, dtype=torch.double, requires_grad=True) for H, S in ((2, 3), (1, 4), (1, 4))
    )
    bias = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.double, requires_grad=True)

    def function(q, k, v, bias, sinks):
        return attention(q, k, v, bias=bias, sinks=sinks, causal="bottom_right", softcap=2.0, return_lse=True)

    assert gradcheck(function, (q, k, v, bias, sinks)) and gradgradcheck(function, (q, k, v, bias, sinks))


def test_double_backward_of_a_kernel():
    q, k, v = heads(1, 2, 5, 16), heads(1, 2, 6, 16), heads(1, 2, 6, 16)

    def second(function):
        (first,) = torch.autograd.grad(function(q, k, v, is_causal=True).sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (q, k, v))

    with backend.use_backend("triton"):
        ours = second(scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = second(F.scaled_dot_product_attention)
    for pair in zip(ours, theirs, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    sizes=st.tuples(
        st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(2, 40), st.integers(2, 40)
    ),
    order=st.permutations(range(3)),
    step=st.integers(1, 2),
    causal=st.sampled_from((False, "top_left", "bottom_right")),
    window=st.sampled_from((None, (3, 2))),
)
def test_any_shape_and_strides(sizes, order, step, causal, window):
    """q, k and v are views of memory whose leading dims lie in any order, every step-th row of it."""
    B, H_kv, group, S_q, S_k = sizes

    def view(H, S):
        shape = (B, H, S * step)
        memory = torch.randn(*(shape[i] for i in order), 16)
        return memory.permute(*(order.index(i) for i in range(3)), 3)[:, :, ::step].detach().requires_grad_()

    inputs = view(H_kv * group, S_q), view(H_kv, S_k), view(H_kv, S_k)
    options = dict(causal=causal, window=window)
    with backend.use_backend("triton"):
        ours = attention(*inputs, **options)
        grads = torch.autograd.grad(ours.sum(), inputs)
    wanted = reference.attention(*inputs, **options)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    for pair in zip(grads, torch.autograd.grad(wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def _views(device, case):
    """q, k, v of a call, strided as a packed projection leaves them, and its options."""
    B, H, H_kv, S_q, S_k, D, D_v, options = case
    q = torch.randn(B, S_q, 3, H, D, device=device).bfloat16()[:, :, 1].transpose(1, 2)
    k, v = (torch.randn(B, S_k, H_kv, width, device=device).bfloat16().transpose(1, 2) for width in (D, D_v))
    return [t.requires_grad_() for t in (q, k, v)], options


@pytest.mark.parametrize(
    "case",
    [(2, 2, 2, 9, 9, 16, 16, {}), (1, 2, 2, 7, 40, 8, 24, dict(is_causal=True)),
     (1, 4, 2, 5, 5, 64, 64, dict(enable_gqa=True, scale=-0.3))],
    ids=str,
)  # fmt: skip
def test_short_way_of_usual_calls_gives_the_same_bits(case, device, monkeypatch):
    """And the same gradients, twice differentiated too; what it cannot serve goes on to the way of any call."""
    present("cuda")
    inputs, options = _views(device, case)
    do = torch.randn(*inputs[0].shape[:3], case[6], device=device).bfloat16()
    served = []
    usually = ops_attention._attend_usually
    monkeypatch.setattr(ops_attention, "_attend_usually", lambda *a: served.append(usually(*a)) or served[-1])

    def results():
        with backend.use_backend("cuda"):
            with torch.no_grad():
                alone = scaled_dot_product_attention(*inputs, **options)
            o = scaled_dot_product_attention(*inputs, **options)
            first = torch.autograd.grad(o, inputs, do, retain_graph=True)
            again = torch.autograd.grad(o, inputs, do, create_graph=True)
            second = torch.autograd.grad(sum(t.float().square().sum() for t in again), inputs)
        return [alone, o, *first, *second]

    short = results()
    assert all(o is not None for o in served)
    monkeypatch.setattr(ops_attention, "_attend_usually", lambda *a: None)
    for a, b in zip(short, results(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_short_way_leaves_the_rest_alone(device, monkeypatch):
    present("cuda")
    q, k, v = (torch.randn(1, 2, 6, 24, device=device).bfloat16() for _ in range(3))
    unaligned = torch.randn(1, 2, 6, 26, device=device).bfloat16()[..., 1:25]
    with backend.use_backend("cuda"):
        assert ops_attention._attend_usually(q, k, v, False, None) is not None
        for other in ((unaligned, k, v), (q, k.transpose(2, 3).contiguous().transpose(2, 3), v), (q, k, v[:, :1]),
                      (q.float(), k.float(), v.float()), (q[0], k[0], v[0]), (q, k[..., :8], v), (q, k, v.half()),
                      (q[:, :0], k, v), (q[..., :0], k[..., :0], v), (q, k, v[..., :0])):  # fmt: skip
            assert ops_attention._attend_usually(*other, False, None) is None
        assert ops_attention._attend_usually(q, k, v, "bottom_right", None) is None
        assert (
            ops_attention._attend_usually(q, k[:, :1], v[:, :1], False, None, False) is None
        )  # without enable_gqa
        expected = F.scaled_dot_product_attention(unaligned.float(), k.float(), v.float())
        torch.testing.assert_close(attention(unaligned, k, v).float(), expected, atol=2e-2, rtol=2e-2)
        with pytest.raises(ValueError, match="v has 5 positions, k has 6"):
            attention(q, k, v[:, :, :5])
    with backend.use_backend("torch"):
        assert ops_attention._attend_usually(q, k, v, False, None) is None
