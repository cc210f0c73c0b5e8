"""Softmax: the public functions, their torch ops, their gradients, and which backends can serve them."""

import math
import operator
import string

import torch

from fastattn import backend, cuda
from fastattn.cuda.softmax import softmax_usual, softmax_why_not

OP = "softmax"
# bound at import, since fastattn.enable() puts ours there
stock_softmax, stock_log_softmax = torch.softmax, torch.log_softmax
WIDENED = backend.autocast_devices("softmax.int") & backend.autocast_devices("log_softmax.int")


def softmax(x, dim=-1, dtype=None, *, out_dtype=None):
    """y = exp(x) / sum(exp(x)) over dim.

    x: any shape and strides; fp16, bf16 and fp32 reach the kernels. dtype: as torch's, x is cast to it first and y has it.
    Under an autocast that widens torch.softmax (on CUDA) y is fp32; out_dtype="input" keeps x's dtype. A row of only -inf is
    NaN, as in torch. Raises IndexError for a dim that x does not have.
    """
    return _softmax("softmax", x, dim, dtype, out_dtype, False)


def log_softmax(x, dim=-1, dtype=None, *, out_dtype=None):
    """y = x - log(sum(exp(x))) over dim; everything else as in `softmax`."""
    return _softmax("log_softmax", x, dim, dtype, out_dtype, True)


def scaled_masked_softmax(scores, mask=None, scale=1.0, causal=False, *, out_dtype=None):
    """softmax over the last dim of scale * scores, where mask and causality attend; 0 elsewhere.

    scores (..., S_q, S_k); mask: bool, True = attend, broadcast to scores' shape and never expanded in memory. causal: query
    i sees keys j <= i. A row that attends to nothing (or holds only -inf) is 0, with gradients 0. Autocast and out_dtype
    as in `softmax`. Raises ValueError or TypeError naming the argument.
    """
    backend.need_tensors("scaled_masked_softmax", scores=scores)
    backend.need_tensors_or_none("scaled_masked_softmax", mask=mask)
    if scores.dim() < 2:
        raise ValueError(
            f"scaled_masked_softmax: scores is {tuple(scores.shape)}, needs (..., S_q, S_k): two dims or more"
        )
    given, mask = mask, None if mask is None else _checked_mask(mask, scores)
    if backend.in_parts(scores):
        call = lambda scores, mask: scaled_masked_softmax(scores, mask, scale, causal, out_dtype=out_dtype)  # noqa: E731
        dims = string.ascii_letters[: scores.dim()]
        names = dims, "" if given is None else dims[scores.dim() - given.dim() :]
        y = backend.on_parts(call, (scores, given), names, dims[: -2 if causal else -1], (dims,))
        if y is not NotImplemented:
            return y
    dtype = _requested("scaled_masked_softmax", scores, None, out_dtype) or backend.autocast_dtype(
        WIDENED, scores
    )
    N = scores.shape[-1]
    chosen = backend.choose("scaled_masked_softmax", WHY_NOT, scores, mask, dtype, N=N, inductor_fuses=True)
    if chosen == "torch":
        return _torch_scaled_masked_softmax(scores, mask, scale, causal).to(dtype)
    scale, causal = float(scale), bool(causal)
    if backend.needs_grad(scores):
        return _ScaledMaskedSoftmax.apply(scores, mask, scale, causal, dtype, chosen)
    return backend.run("scaled_masked_softmax_fwd", chosen, OP, scores, mask, scale, causal, dtype)


def _softmax(name, x, dim, dtype, out_dtype, log):
    if dtype is out_dtype is None and (y := _softmax_usually(name, x, dim, log)) is not None:
        return y
    backend.need_tensors(name, x=x)
    if x.is_nested:
        backend.leave_to_torch(name, "nested tensors take torch's own kernels", x)
        return (stock_log_softmax if log else stock_softmax)(x, dim, dtype=dtype)
    if type(dim) is not int and not isinstance(dim, torch.SymInt):
        if isinstance(dim, bool) or not hasattr(dim, "__index__"):
            raise TypeError(f"{name}: dim is {dim!r}, must be an int")
        dim = operator.index(dim)  # a tensor's, numpy's
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise IndexError(f"{name}: dim is {dim}, x has {x.dim()} dims")
    if backend.in_parts(x):
        dims = string.ascii_letters[: x.dim()]
        others = dims.replace(dims[dim], "") if dims else ""
        call = lambda x: _softmax(name, x, dim, dtype, out_dtype, log)  # noqa: E731
        y = backend.on_parts(call, (x,), (dims,), others, (dims,))
        if y is not NotImplemented:
            return y
    requested = _requested(name, x, dtype, out_dtype)
    dtype = requested or backend.autocast_dtype(WIDENED, x)
    N = x.shape[dim] if x.dim() else 1
    chosen = backend.choose(name, WHY_NOT, x, None, dtype, N=N, inductor_fuses=True)
    if chosen == "torch":
        return (stock_log_softmax if log else stock_softmax)(x, dim, dtype=requested)
    if x.dim() == 0:
        return _softmax(name, x[None], 0, dtype, None, log)[0]
    if backend.needs_grad(x):
        return _Softmax.apply(x, dim, log, dtype, chosen)
    return backend.run("softmax_fwd", chosen, OP, x, dim, log, dtype)


def _softmax_usually(name, x, dim, log):
    """The result for a contiguous x of a kernel's dtype, in a third of the time of the steps that any call takes; None means nothing."""
    if type(x) is not torch.Tensor or type(dim) is not int or x.is_nested:
        return None
    dims = x.dim()
    if not -dims <= dim < dims or not backend.certain("cuda", name, x, x.shape[dim]):
        return None
    if x.dtype not in backend.TRITON_DTYPES:
        return None
    if not x.is_contiguous() or x.is_neg() or not (_C := cuda.ready(x)):
        return None
    backend.calls[name, "cuda"] += 1
    if backend.needs_grad(x):
        return _UsualSoftmax.apply(x, dim, log, x.dtype, "cuda", _C)
    return softmax_usual(_C, x, dim, log)


def _requested(name, x, dtype, out_dtype):
    """The result's dtype as the caller wants it, None to leave it to autocast."""
    if out_dtype not in (None, "input"):
        raise ValueError(f'{name}: out_dtype is {out_dtype!r}, must be None (as torch) or "input"')
    return x.dtype if dtype is None and out_dtype == "input" else dtype


def _checked_mask(mask, scores):
    """mask as a view of scores' shape."""
    name = "scaled_masked_softmax"
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name}: mask has dtype {mask.dtype}, must be bool (True = attend); add a float bias to scores"
        )
    if mask.device != scores.device:
        raise ValueError(f"{name}: mask is on {mask.device}, scores on {scores.device}; move one")
    try:
        return mask.expand(scores.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: mask is {tuple(mask.shape)}, must broadcast to scores' {tuple(scores.shape)}"
        ) from None


def _torch_scaled_masked_softmax(scores, mask, scale, causal):
    s = scores * scale
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        mask = below if mask is None else mask & below
    s = s if mask is None else s.masked_fill(~mask, -math.inf)
    if not s.shape[-1]:
        return stock_softmax(s, -1)
    # the softmax of -inf alone would be NaN, and so would its gradient
    empty = s.detach().amax(-1, keepdim=True) == -math.inf
    return stock_softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, log, dtype, chosen):
        y = backend.run("softmax_fwd", chosen, OP, x, dim, log, dtype)
        ctx.save_for_backward(y)
        ctx.options = dim, log, x.dtype, chosen
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,), (dim, log, dtype, chosen) = ctx.saved_tensors, ctx.options
        if backend.wants_double_backward():
            dx = dy - y.exp() * dy.sum(dim, keepdim=True) if log else _composite_backward(dy, y, dim)
            return dx.to(dtype), None, None, None, None
        return backend.run("softmax_bwd", chosen, OP, dy, y, dim, log, dtype), None, None, None, None


class _UsualSoftmax(torch.autograd.function._SingleLevelFunction):
    """_Softmax of the usual call. Its base class is Function without what serves torch.func, which `certain` has ruled out: 2 us."""

    @staticmethod
    def forward(ctx, x, dim, log, dtype, chosen, _C):
        y = softmax_usual(_C, x, dim, log)
        ctx.save_for_backward(y)
        ctx.options = dim, log, dtype, chosen
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_Softmax.backward(ctx, dy), None


class _ScaledMaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, mask, scale, causal, dtype, chosen):
        y = backend.run("scaled_masked_softmax_fwd", chosen, OP, scores, mask, scale, causal, dtype)
        ctx.save_for_backward(y)
        ctx.options = scale, causal, scores.dtype, chosen
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,), (scale, causal, dtype, chosen) = ctx.saved_tensors, ctx.options
        if backend.wants_double_backward():
            dscores = (scale * _composite_backward(dy, y, -1)).to(dtype)
        else:
            dscores = backend.run("scaled_masked_softmax_bwd", chosen, OP, dy, y, scale, causal, dtype)
        return dscores, None, None, None, None, None


def _composite_backward(dy, y, dim):
    """The gradient in stock ops, differentiable in dy and, through the saved y, in the input."""
    return y * (dy - (dy * y).sum(dim, keepdim=True))


def _fwd_fake(x, *options):
    return x.new_empty(x.shape, dtype=options[-2])


def _bwd_fake(dy, y, *options):
    return y.new_empty(y.shape, dtype=options[-2])


backend.define(
    OP, "softmax_fwd(Tensor x, int dim, bool log, ScalarType dtype, str backend) -> Tensor", _fwd_fake
)
backend.define(
    OP,
    "softmax_bwd(Tensor dy, Tensor y, int dim, bool log, ScalarType dtype, str backend) -> Tensor",
    _bwd_fake,
)
backend.define(
    OP,
    "scaled_masked_softmax_fwd(Tensor scores, Tensor? mask, float scale, bool causal, ScalarType dtype, str backend)"
    " -> Tensor",
    _fwd_fake,
)
backend.define(
    OP,
    "scaled_masked_softmax_bwd(Tensor dy, Tensor y, float scale, bool causal, ScalarType dtype, str backend) -> Tensor",
    _bwd_fake,
)


def _triton_why_not(x, mask, dtype):
    for what, t in (("input", x.dtype), ("result", dtype)):
        if t not in backend.TRITON_DTYPES:
            return f"{what} dtype {t} is not float16, bfloat16 or float32"
    return backend.last_block_why_not(x) or backend.triton_why_not(x, mask)


WHY_NOT = {"cuda": softmax_why_not, "triton": _triton_why_not}
