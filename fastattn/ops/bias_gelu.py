"""Bias and GELU, the activation of a transformer's MLP: public function, torch ops, gradient, backends."""

import string

import torch
import torch.nn.functional as F

from fastattn import backend

OP = "bias_gelu"


def bias_gelu(x, bias=None, approximate="none"):
    """y = gelu(x + bias): h * Phi(h), or with approximate="tanh" h * (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2.

    x: (..., N), fp16, bf16 or fp32, any strides; bias: (N,), x's dtype or another, e.g. fp32 beside 16 bits. h = x + bias
    is fp32 and stays in registers: what is saved for backward is x. Returns x's shape and dtype; x and bias get gradients,
    the bias's in a fixed order of summation. Raises ValueError or TypeError naming the argument. GELU: arXiv 1606.08415;
    "tanh" is GPT-2's, "none" BERT's.

    >>> bias_gelu(torch.tensor([[-1.0, 2.0]]), torch.tensor([1.0, 0.0]))
    tensor([[0.0000, 1.9545]])
    """
    backend.need_tensors("bias_gelu", x=x)
    backend.need_tensors_or_none("bias_gelu", bias=bias)
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"bias_gelu: x must be floating (..., N); it is {x.dtype} {tuple(x.shape)}")
    if bias is not None:
        if bias.shape != x.shape[-1:] or bias.device != x.device:
            raise ValueError(
                f"bias_gelu: bias is {tuple(bias.shape)} on {bias.device}, must be ({x.shape[-1]},) on {x.device}, like x's rows"
            )
        if not bias.is_floating_point():
            raise TypeError(f"bias_gelu: bias is {bias.dtype}, must be floating")
    if approximate not in ("none", "tanh"):
        raise ValueError(f'bias_gelu: approximate is {approximate!r}, must be "none" or "tanh"')
    if backend.in_parts(x):
        dims = string.ascii_letters[: x.dim()]
        call = lambda x, bias: bias_gelu(x, bias, approximate)  # noqa: E731
        y = backend.on_parts(call, (x, bias), (dims, dims[-1]), dims, (dims,))
        if y is not NotImplemented:
            return y
    tanh = approximate == "tanh"
    chosen = backend.choose(OP, WHY_NOT, x, bias, inductor_fuses=True)
    if chosen == "torch":
        return _stock(x, bias, tanh)
    if backend.needs_grad(x, bias):
        return _BiasGelu.apply(x, bias, tanh, chosen)
    return backend.run("bias_gelu_fwd", chosen, OP, x, bias, tanh)


def _stock(x, bias, tanh):
    h = x if bias is None else x + bias
    return F.gelu(h, approximate="tanh" if tanh else "none").to(x.dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh, chosen):
        ctx.save_for_backward(x, bias)
        ctx.tanh, ctx.chosen = tanh, chosen
        return backend.run("bias_gelu_fwd", chosen, OP, x, bias, tanh)

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        x_grad, bias_grad = ctx.needs_input_grad[:2]
        if backend.wants_double_backward():
            return *backend.composite_backward(lambda *t: _stock(*t, ctx.tanh), (x, bias), (dy,)), None, None
        dx, dbias = backend.run("bias_gelu_bwd", ctx.chosen, OP, dy, x, bias, ctx.tanh, bias_grad)
        return dx if x_grad else None, dbias if bias_grad else None, None, None


def _bwd_fake(dy, x, bias, tanh, bias_grad, backend):
    wanted = bias_grad and bias is not None
    return x.new_empty(x.shape), bias.new_empty(bias.shape) if wanted else x.new_empty(0)


backend.define(
    OP,
    "bias_gelu_fwd(Tensor x, Tensor? bias, bool tanh, str backend) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)
backend.define(
    OP,
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool bias_grad, str backend) -> (Tensor, Tensor)",
    _bwd_fake,
)

WHY_NOT = {"triton": backend.triton_why_not}
