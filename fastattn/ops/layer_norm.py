"""Layer normalisation: the public function, its torch ops, its gradient, and which backends can serve it."""

import math

import torch
import torch.nn.functional as F

from fastattn import backend, cuda

OP = "layer_norm"


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last len(normalized_shape) dims (arXiv 1607.06450).

    x: (..., *normalized_shape), fp16, bf16 or fp32; weight, bias: normalized_shape, x's dtype or fp32. Mean and biased
    variance are fp32. Returns x's shape and dtype. Raises as torch.nn.functional.layer_norm does.
    """
    normalized_shape = _checked(x, normalized_shape, weight, bias)
    chosen = backend.choose(OP, WHY_NOT, x, weight, bias, inductor_fuses=True)
    if chosen == "torch":
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    rows = x.reshape(-1, math.prod(normalized_shape))
    if backend.needs_grad(x, weight, bias):
        return _LayerNorm.apply(rows, weight, bias, eps, chosen).view(x.shape)
    return backend.run("layer_norm_fwd", chosen, OP, rows, weight, bias, eps)[0].view(x.shape)


def _checked(x, normalized_shape, weight, bias):
    normalized_shape = tuple(normalized_shape)
    if not normalized_shape or tuple(x.shape[-len(normalized_shape) :]) != normalized_shape:
        raise RuntimeError(
            f"layer_norm: normalized_shape {normalized_shape} must be x's last dims; x is {tuple(x.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != normalized_shape:
            raise RuntimeError(
                f"layer_norm: {name} is {tuple(t.shape)}, must be normalized_shape {normalized_shape}"
            )
    return normalized_shape


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, chosen):
        y, mean, rstd = backend.run("layer_norm_fwd", chosen, OP, x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if backend.wants_double_backward():
            composite = lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, ctx.eps)  # noqa: E731
            return *backend.composite_backward(composite, (x, weight, bias), (dy,)), None, None
        # Triton serves every forward: the saved statistics have one meaning in all backends.
        grads = backend.run(
            "layer_norm_bwd", "triton", OP, dy, x, weight, mean, rstd, ctx.needs_input_grad[2]
        )
        return (
            *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)),
            None,
            None,
        )


backend.define(
    OP,
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    lambda x, weight, bias, eps, backend: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *x.new_empty((2, x.shape[0]), dtype=torch.float32),
    ),
)
backend.define(
    OP,
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool bias_grad, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda dy, x, weight, mean, rstd, bias_grad, backend: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(x.shape[-1:] if bias_grad else 0, dtype=x.dtype if weight is None else weight.dtype),
    ),
)

WHY_NOT = {"cuda": cuda.layer_norm_why_not, "triton": backend.triton_why_not}
