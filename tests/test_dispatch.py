"""Which backend is asked first: the rows of backend.ROWS, and that every op they are for asks them."""

import pathlib

import pytest
import torch

from fastattn import backend
from fastattn import functional as FF

BIG = 2**22 + 1
RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", backend.ROW_OPS)
def test_small_calls_and_long_rows_go_to_cuda(op, dtype):
    for elements, N, first in (
        (64, 64, "cuda"),
        (2**22, 1024, "cuda"),
        (BIG, 1024, "triton"),
        (2**30, 2**15, "triton"),
        (2**30, 2**15 + 1, "cuda"),
    ):
        order = backend.preferred(op, dtype, elements, N)
        assert order[0] == first and sorted(order) == sorted(backend.ORDER)


@pytest.mark.parametrize(
    "B, H, S, D, first",
    [(1, 12, 512, 64, "cuda"), (1, 12, 1024, 64, "cuda"), (8, 12, 128, 64, "cuda"), (32, 12, 128, 64, "cuda"),
     (1, 12, 2048, 64, "triton"), (8, 12, 512, 64, "triton"), (64, 12, 128, 64, "triton"), (1, 16, 16384, 128, "triton")],
)  # fmt: skip
def test_small_and_short_attention_goes_to_cuda(B, H, S, D, first):
    order = backend.preferred("attention", torch.bfloat16, B * H * S * D, S)
    assert order[0] == first and sorted(order) == sorted(backend.ORDER)


def test_decoding_goes_to_cuda():
    for elements, capacity in ((768, 64), (2**20, 2**17)):
        assert backend.preferred("attention_decode", torch.float16, elements, capacity)[0] == "cuda"


def test_other_ops_keep_the_order():
    assert backend.preferred("linear_cross_entropy", torch.float16, 8, 8) == backend.ORDER


def test_torch_by_a_measured_row_is_no_fallback(recwarn):
    chosen, reason = backend._first_willing("softmax", {}, (torch.zeros(2, 3),), ("torch", "triton", "cuda"))
    assert chosen == "torch" and "measured" in reason and not recwarn
    assert backend._first_willing("softmax", {}, (torch.zeros(2, 3),), backend.ORDER)[0] == "torch"
    assert "no cuda implementation" in str(recwarn.pop(backend.FallbackWarning).message)


def test_rows_name_their_measurement():
    for row in backend.ROWS:
        assert set(row.ops) <= {*backend.ROW_OPS, "attention", "attention_decode"}
        assert sorted(row.order) == sorted(backend.ORDER)
        assert row.measured is None or (RESULTS / row.measured).exists()


CALLS = {
    "layer_norm": lambda x: FF.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: FF.rms_norm(x, x.shape[-1:]),
    "add_layer_norm": lambda x: FF.add_layer_norm(x, x, x.shape[-1:]),
    "softmax": lambda x: FF.softmax(x),
    "log_softmax": lambda x: FF.log_softmax(x),
    "scaled_masked_softmax": lambda x: FF.scaled_masked_softmax(x),
    "position": lambda x: FF.add_positional_encoding(x),
}


@pytest.mark.parametrize("op", CALLS)
def test_every_row_op_asks(op, monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "preferred", lambda *key: asked.append(key) or backend.ORDER)
    monkeypatch.setattr(backend, "_preferred", backend.preferred)
    x = torch.randn(6, 24)
    backend.explain(CALLS[op], x)
    assert asked == [(op, torch.float32, 144, 24)]


def test_attention_asks(monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "preferred", lambda *key: asked.append(key) or backend.ORDER)
    monkeypatch.setattr(backend, "_preferred", backend.preferred)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    backend.explain(FF.attention, q, k, k)
    backend.explain(FF.scaled_dot_product_attention, q, k, k, enable_gqa=True)
    packed, cu = torch.randn(6, 4, 8), torch.tensor([0, 2, 6])
    backend.explain(FF.attention_varlen, packed, packed, packed, cu, cu, 4, 5)
    backend.explain(FF.attention_decode, q, k, k, torch.tensor([3, 5]))
    pages, table = torch.randn(7, 4, 2, 8), torch.zeros(2, 3, dtype=torch.int64)
    backend.explain(FF.attention_decode, q, pages, pages, torch.tensor([3, 5]), block_table=table)
    assert asked == [
        ("attention", torch.float32, 192, 5),
        ("attention", torch.float32, 192, 5),
        ("attention", torch.float32, 192, 5),
        ("attention_decode", torch.float32, 192, 5),
        ("attention_decode", torch.float32, 192, 12),
    ]


def test_explain_says_who_is_asked_first():
    short, long = torch.zeros(1, 2, 16, 64), torch.zeros(1, 2, 2048, 64)
    for q, first in ((short, "cuda"), (long, "triton")):
        lines = backend.explain(FF.attention, q, q, q).splitlines()
        assert lines[1].startswith(f"attention, {first}: ")
