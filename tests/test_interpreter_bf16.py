"""The bf16 repair of the interpreter, operation by operation, against torch's own bf16 arithmetic."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, out_ptr, n: tl.constexpr, OP: tl.constexpr):
    offs = tl.arange(0, n)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "constant":
        z = x * 0.3 + 1.7
    elif OP == "where":
        z = tl.where(x > y, x, -y)
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "cumsum":
        z = tl.cumsum(x, 0)
    elif OP == "int":
        z = (x * 8).to(tl.int32).to(tl.bfloat16)
    else:
        z = tl.exp(x.to(tl.float32)).to(tl.bfloat16)
    tl.store(out_ptr + offs, z)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, n)), 0))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


WANTED = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "constant": lambda x, y: x * torch.tensor(0.3).bfloat16() + torch.tensor(1.7).bfloat16(),
    "where": lambda x, y: torch.where(x > y, x, -y),
    "abs": lambda x, y: x.abs(),
    "cumsum": lambda x, y: x.float().cumsum(0).bfloat16(),
    "int": lambda x, y: (x * 8).int().bfloat16(),
    "exp": lambda x, y: x.float().exp().bfloat16(),
}


@pytest.mark.parametrize("op", WANTED)
def test_elementwise(op):
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty_like(x)
    elementwise_kernel[(1,)](x, y, out, 64, op)
    assert torch.equal(out, WANTED[op](x, y))


def test_sum():
    x = torch.randn(64).bfloat16()
    out = torch.empty(1, dtype=torch.bfloat16)
    sum_kernel[(1,)](x, out, 64)
    torch.testing.assert_close(out[0], x.float().sum().bfloat16(), rtol=2**-8, atol=0)


def test_dot_accumulates_in_fp32():
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
