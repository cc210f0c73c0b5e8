"""Hopper's own attention forward (csrc/attention_sm90.cu) in the emulation: right in every order, and why it leaves a call."""

import attention_cases
import pytest
import torch
from emulated_cases import ORDERS, Expectation, wrong

import fastattn
from fastattn import cuda
from fastattn.functional import attention

pytestmark = pytest.mark.skipif(cuda.not_emulated() is not None, reason=str(cuda.not_emulated()))
CASES = {case.label: case for case in attention_cases.of_sm90()}


def launches():
    counts = cuda.extension("_C_emulated").launches()
    return sum(n for name, n in counts.items() if name.startswith("attention_sm90_fwd_kernel"))


@pytest.mark.parametrize("label", CASES)
def test_every_order_gives_the_same_right_bits(label):
    dtype = (torch.float16, torch.bfloat16)[list(CASES).index(label) % 2]
    before = launches()
    assert (
        wrong(Expectation(CASES[label], dtype), list(ORDERS.values()), backward=CASES[label].backward) is None
    )
    assert launches() == before + len(ORDERS)


@pytest.fixture
def on_sm90():
    module = cuda.extension("_C_emulated")
    module.pretend(9)
    yield module
    module.pretend(8)


def asked(module, q, k, v, *, slopes=None, sinks=None, lens=None, causal=0, left=-1, softcap=0.0, scale=1.0):
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    return module.attention_sm90_why_not(
        q, k, v, o, lse, None, None, slopes, sinks, None, lens, None, None, None, q.shape[2], causal, left, -1, softcap, 0.0, scale
    )  # fmt: skip


def test_says_why_not(on_sm90):
    q, k, v = (torch.zeros(2, 2, 8, 64, dtype=torch.float16) for _ in range(3))
    assert asked(on_sm90, q, k, v) is None
    assert asked(on_sm90, q, k, v, causal=2) is None
    for given, said in (
        (dict(softcap=3.0), "softcap"),
        (dict(scale=-1.0), "scale"),
        (dict(slopes=torch.ones(2)), "ALiBi"),
        (dict(sinks=torch.ones(2)), "sinks"),
        (dict(left=3), "window"),
        (dict(lens=torch.tensor([3, 4], dtype=torch.int32)), "lengths"),
    ):
        assert said in asked(on_sm90, q, k, v, **given)
    wide = [t.expand(2, 2, 8, 64).repeat(1, 1, 1, 4) for t in (q, k, v)]
    assert "64 and 128" in asked(on_sm90, *wide)
    assert "size 0" in asked(on_sm90, q, k[:, :, :0], v[:, :, :0])
    assert "stride of 0" in asked(on_sm90, q, k[:, :1].expand_as(k), v)
    assert asked(on_sm90, q[:1], k[:1].as_strided((1, 2, 8, 64), (0, 512, 64, 1)), v[:1]) is None
    on_sm90.pretend(8)
    assert "9.0 alone" in asked(on_sm90, q, k, v)


def test_what_it_leaves_another_kernel_serves(on_sm90):
    q, k, v = (torch.randn(1, 2, 40, 64).half() for _ in range(3))
    before = launches()
    with fastattn.use_backend("cuda"):
        o = attention(q, k[:, :1].expand_as(k), v, window=(8, 8))
    assert launches() == before and torch.isfinite(o).all()
