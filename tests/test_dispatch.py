"""Which backend is asked first: the rows of backend.ROWS, and that every row op asks them."""

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


def test_other_ops_keep_the_order():
    assert backend.preferred("attention", torch.float16, 8, 8) == backend.ORDER


def test_rows_name_their_measurement():
    for row in backend.ROWS:
        assert set(row.ops) <= set(backend.ROW_OPS) and sorted(row.order) == sorted(backend.ORDER)
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
