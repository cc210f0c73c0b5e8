"""Layer and RMS normalisation, alone or after a residual add with dropout: public functions, torch ops, gradients, backends."""

import math
import string

import torch
import torch.nn.functional as F

from fastattn import backend, cuda, reference
from fastattn.cuda.layer_norm import (
    add_layer_norm_fwd,
    layer_norm_infer,
    layer_norm_train,
    layer_norm_usual,
    layer_norm_why_not,
    residual_usual,
)

OP = "layer_norm"
# bound at import, since fastattn.enable() puts ours there
stock_layer_norm, stock_rms_norm = F.layer_norm, F.rms_norm
WIDE = (*backend.TRITON_DTYPES, torch.float64)
WIDENED = {name: backend.autocast_devices(name) for name in ("layer_norm", "rms_norm")}


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, *, out_dtype=None):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last len(normalized_shape) dims (arXiv 1607.06450).

    x: (..., *normalized_shape), fp16, bf16 or fp32, any strides; weight, bias: normalized_shape, x's dtype or another, e.g.
    fp32 beside 16 bits. Mean and biased variance are fp32. Returns x's shape and dtype; under an autocast that widens
    torch's layer_norm (on CUDA) fp32, which out_dtype="input" declines. Raises what torch's function does.
    """
    return _norm("layer_norm", x, normalized_shape, weight, bias, eps, out_dtype)


def rms_norm(x, normalized_shape, weight=None, eps=None, *, out_dtype=None):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last len(normalized_shape) dims (arXiv 1910.07467).

    eps: by default, as in torch, the machine epsilon of the dtype computed in (fp32 for 16-bit x). All else as in layer_norm.
    """
    return _norm("rms_norm", x, normalized_shape, weight, None, eps, out_dtype)


def add_layer_norm(x, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0, prenorm=False,
                   out_dtype=None):  # fmt: skip
    """r = residual + dropout(x), y = layer_norm(r): returns y, or (y, r) with prenorm, where r is the next block's residual.

    x, residual: (..., *normalized_shape); residual, and with it r, may be fp32 beside a 16-bit x. y has x's dtype (autocast
    and out_dtype as in layer_norm). dropout_p in [0, 1] is rounded to a multiple of 2^-16; the mask is drawn from torch's
    generator, redrawn in backward and never stored. Raises ValueError or RuntimeError naming the argument.
    """
    return _add_norm(
        "layer_norm", x, residual, normalized_shape, weight, bias, eps, dropout_p, prenorm, out_dtype
    )


def add_rms_norm(x, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0, prenorm=False,
                 out_dtype=None):  # fmt: skip
    """r = residual + dropout(x), y = rms_norm(r): returns y, or (y, r) with prenorm. All else as in add_layer_norm."""
    return _add_norm(
        "rms_norm", x, residual, normalized_shape, weight, None, eps, dropout_p, prenorm, out_dtype
    )


def _norm(name, x, normalized_shape, weight, bias, eps, out_dtype):
    if not isinstance(x, torch.Tensor):
        backend.need_tensors(name, x=x)
    if out_dtype is None and backend.certain("cuda", name, x) and (_C := cuda.ready(x)):
        if M := layer_norm_usual(_C, x, normalized_shape, weight, bias):
            # What the steps below would come to, in a third of their time.
            backend.calls[name, "cuda"] += 1
            rms, eps = name == "rms_norm", _default_eps(name, eps, x) if eps is None else eps
            if backend.needs_grad(x, weight, bias):
                return _UsualNorm.apply(x, weight, bias, (eps, rms, x.dtype, "cuda"), _C, M)
            return layer_norm_infer(_C, x, weight, bias, eps, rms)
    if x.is_nested:
        backend.leave_to_torch(name, "nested tensors take torch's own kernels", x)
        return _stock(name, x, normalized_shape, weight, bias, eps, x.dtype)
    normalized_shape = _checked(name, x, normalized_shape, weight, bias, out_dtype)
    if backend.in_parts(x):
        call = lambda x, weight, bias: _norm(name, x, normalized_shape, weight, bias, eps, out_dtype)  # noqa: E731
        y = _on_parts(call, (x,), normalized_shape, (weight, bias))
        if y is not NotImplemented:
            return y
    dtype = x.dtype if out_dtype else backend.autocast_dtype(WIDENED[name], x)
    N = math.prod(normalized_shape)
    chosen = backend.choose(name, WHY_NOT[name], x, weight, bias, dtype, N=N, inductor_fuses=True)
    if chosen == "torch":
        return _stock(name, x, normalized_shape, weight, bias, eps, dtype)
    rms, eps = name == "rms_norm", _default_eps(name, eps, x)
    rows, weight, bias = _flattened(normalized_shape, x, weight, bias)
    if torch.compiler.is_compiling():
        rows, weight, bias = backend.distinct(rows, weight, bias)
    if backend.needs_grad(x, weight, bias):
        y = _Norm.apply(rows, weight, bias, (eps, rms, dtype, chosen))
    else:
        y = backend.run("layer_norm_fwd", chosen, OP, rows, weight, bias, eps, rms, False, dtype)[0]
    return y if len(normalized_shape) == 1 else y.view(x.shape)


def _add_norm(norm, x, residual, normalized_shape, weight, bias, eps, dropout_p, prenorm, out_dtype):
    name = f"add_{norm}"
    if not (isinstance(x, torch.Tensor) and isinstance(residual, torch.Tensor)):
        backend.need_tensors(name, x=x, residual=residual)
    if (
        out_dtype is None
        and 0.0 <= dropout_p <= 1.0
        and backend.certain("cuda", name, x)
        and (_C := cuda.ready(x))
    ):
        if layer_norm_usual(_C, x, normalized_shape, weight, bias) and residual_usual(residual, x):
            backend.calls[name, "cuda"] += 1
            rms, eps = norm == "rms_norm", _default_eps(norm, eps, x)
            seed = backend.draw_seed(x) if dropout_p else None
            args = (x, residual, weight, bias, seed, eps, float(dropout_p), rms)
            if backend.needs_grad(x, residual, weight, bias):
                y, r = _UsualAddNorm.apply(*args, x.dtype, "cuda")
            else:
                y, r, _ = add_layer_norm_fwd(*args, prenorm, False, x.dtype)
            return (y, r) if prenorm else y
    normalized_shape = _checked(name, x, normalized_shape, weight, bias, out_dtype)
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"{name}: residual is {tuple(residual.shape)} on {residual.device}, must be like x, {tuple(x.shape)} on {x.device}"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p is {dropout_p}, must lie in [0, 1]")
    if backend.in_parts(x) and not dropout_p:  # torch draws the mask of a DTensor by the place in the whole

        def call(x, residual, weight, bias):
            return _add_norm(norm, x, residual, normalized_shape, weight, bias, eps, 0.0, prenorm, out_dtype)

        found = _on_parts(call, (x, residual), normalized_shape, (weight, bias), outputs=1 + prenorm)
        if found is not NotImplemented:
            return found
    dtype = x.dtype if out_dtype else backend.autocast_dtype(WIDENED[norm], x)
    N = math.prod(normalized_shape)
    chosen = backend.choose(name, WHY_NOT[name], x, weight, bias, dtype, residual, N=N)
    if chosen == "torch":
        r = (residual + F.dropout(x, dropout_p)).to(residual.dtype)
        y = _stock(norm, r, normalized_shape, weight, bias, eps, dtype)
        return (y, r) if prenorm else y
    seed = backend.draw_seed(x) if dropout_p else None
    rms, eps = norm == "rms_norm", _default_eps(norm, eps, residual)
    rows, residual_rows, weight, bias = _flattened(normalized_shape, x, residual, weight, bias)
    if torch.compiler.is_compiling():
        rows, residual_rows, weight, bias = backend.distinct(rows, residual_rows, weight, bias)
    args = (rows, residual_rows, weight, bias, seed, eps, float(dropout_p), rms)
    if backend.needs_grad(x, residual, weight, bias):
        y, r = _AddNorm.apply(*args, dtype, chosen)
    else:
        y, r = backend.run("add_layer_norm_fwd", chosen, OP, *args, prenorm, False, dtype)[:2]
    return (y.view(x.shape), r.view(x.shape)) if prenorm else y.view(x.shape)


def _on_parts(call, rows, normalized_shape, parameters, outputs=1):
    """DTensors are split along any dims but the normalised ones."""
    dims = string.ascii_letters[: rows[0].dim()]
    leading = dims[: len(dims) - len(normalized_shape)]
    names = [dims] * len(rows) + [dims[len(leading) :]] * len(parameters)
    return backend.on_parts(call, (*rows, *parameters), names, leading, [dims] * outputs)


def _checked(name, x, normalized_shape, weight, bias, out_dtype):
    """normalized_shape as a tuple, under the conditions of torch's functions and in their words."""
    backend.need_tensors_or_none(name, weight=weight, bias=bias)
    if isinstance(normalized_shape, (torch.Tensor, int)):
        raise TypeError(
            f"{name}: normalized_shape is a {type(normalized_shape).__name__}, must be a tuple of ints"
        )
    normalized_shape = tuple(normalized_shape)
    for n in normalized_shape:
        if isinstance(n, (bool, float, str)):
            raise TypeError(f"{name}: normalized_shape is {normalized_shape}, must be a tuple of ints")
    if not normalized_shape:
        raise RuntimeError(f"{name}: Expected normalized_shape to be at least 1-dimensional, but it is ()")
    if x.shape[-len(normalized_shape) :] != normalized_shape:
        if name.endswith("rms_norm") and x.dim() < len(normalized_shape):
            raise ValueError(
                f"{name}: Input tensor must have at least {len(normalized_shape)} dimensions, but got {x.dim()}"
            )
        raise RuntimeError(
            f"{name}: Given normalized_shape={normalized_shape}, which must be x's last dims; x is {tuple(x.shape)}"
        )
    for what, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != normalized_shape:
            raise RuntimeError(
                f"{name}: Expected {what} to be of same shape as normalized_shape {normalized_shape}; it is {tuple(t.shape)}"
            )
    if out_dtype not in (None, "input"):
        raise ValueError(f'{name}: out_dtype is {out_dtype!r}, must be None (as torch) or "input"')
    return normalized_shape


def _default_eps(name, eps, x):
    if eps is None and name == "layer_norm":
        raise TypeError("layer_norm: eps is None, must be a float")
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else float(eps)


def _flattened(normalized_shape, *tensors):
    """The normalised dims as one. Only where those do not lie one after another in memory is this a copy."""
    dims = len(normalized_shape)
    return tensors if dims == 1 else [t if t is None else t.flatten(t.dim() - dims) for t in tensors]


def _stock(name, x, normalized_shape, weight, bias, eps, dtype):
    """torch's own function; where floating dtypes differ, which it need not take, in the widest of them."""
    given = [t for t in (x, weight, bias) if t is not None]
    if any(t.dtype != x.dtype for t in given) and all(t.dtype in WIDE for t in given):
        widest = torch.promote_types(given[-1].dtype, torch.promote_types(x.dtype, given[1].dtype))
        x, weight, bias = (t if t is None else t.to(widest) for t in (x, weight, bias))
    if name == "rms_norm":
        return stock_rms_norm(x, normalized_shape, weight, eps).to(dtype)
    return stock_layer_norm(x, normalized_shape, weight, bias, eps).to(dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, options):
        eps, rms, dtype, chosen = options
        y, statistics = backend.run("layer_norm_fwd", chosen, OP, x, weight, bias, eps, rms, True, dtype)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, weight, bias, statistics), (eps, rms, dtype, chosen) = ctx.saved_tensors, ctx.options
        if backend.wants_double_backward():
            grads = backend.composite_backward(_composite(eps, rms, dtype), (x, weight, bias), (dy,))
        else:
            grads = backend.run(
                "layer_norm_bwd", chosen, OP, dy, x, weight, statistics, *ctx.needs_input_grad[1:3], rms
            )
            grads = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
        return *grads, None


class _UsualNorm(torch.autograd.function._SingleLevelFunction):
    """_Norm of the usual call. Its base class is Function without what serves torch.func, which `certain` has ruled out: 2 us."""

    @staticmethod
    def forward(ctx, x, weight, bias, options, _C, M):
        y, statistics = layer_norm_train(_C, x, weight, bias, options[0], options[1], M)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_Norm.backward(ctx, dy), None, None


class _AddNorm(torch.autograd.Function):
    """Saves r, its statistics and the seed: neither x, nor the residual, nor the mask."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, eps, dropout_p, rms, dtype, chosen):
        y, r, statistics = backend.run(
            "add_layer_norm_fwd", chosen, OP, x, residual, weight, bias, seed, eps, dropout_p, rms, True, True, dtype
        )  # fmt: skip
        ctx.save_for_backward(r, weight, bias, statistics, seed)
        ctx.options = eps, dropout_p, rms, dtype, x.dtype, chosen
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx, dy, dr):
        r, weight, bias, statistics, seed = ctx.saved_tensors
        eps, dropout_p, rms, dtype, x_dtype, chosen = ctx.options
        nothing = (None,) * 6
        if dy is None and dr is None:
            return (None,) * 10
        dy = torch.zeros_like(r, dtype=dtype) if dy is None else dy
        if backend.wants_double_backward():
            found = backend.composite_backward(_composite(eps, rms, dtype), (r, weight, bias), (dy,))
            total = found[0] if dr is None else found[0] + dr
            dx = total if seed is None else total * _mask(seed, dropout_p, total)
            return dx.to(x_dtype), total, *found[1:], *nothing
        dx, dresidual, dweight, dbias = backend.run(
            "add_layer_norm_bwd", chosen, OP, dy, dr, r, weight, statistics, seed, dropout_p,
            *ctx.needs_input_grad[2:4], rms, x_dtype,
        )  # fmt: skip
        dx = dresidual if seed is None and x_dtype == r.dtype else dx
        grads = (dx, dresidual, dweight, dbias)
        return *(
            g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)
        ), *nothing


class _UsualAddNorm(torch.autograd.function._SingleLevelFunction):
    """_AddNorm of the usual call, as _UsualNorm."""

    forward, backward = _AddNorm.forward, _AddNorm.backward


def _composite(eps, rms, dtype):
    """The norm of rows in stock ops, for gradients that are themselves differentiated."""
    name = "rms_norm" if rms else "layer_norm"
    return lambda x, weight, bias: _stock(name, x, x.shape[-1:], weight, bias, eps, dtype)


def _mask(seed, dropout_p, t):
    mask = reference.dropout_mask(seed, (t.numel() // t.shape[-1], t.shape[-1]), dropout_p)
    return mask.to(t).view(t.shape)


def _fwd_fake(x, weight, bias, eps, rms, keep_statistics, dtype, backend):
    kept = math.prod(x.shape[:-1]) * (1 if rms else 2) if keep_statistics else 0
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(kept, dtype=torch.float32)


def _add_fwd_fake(
    x, residual, weight, bias, seed, eps, dropout_p, rms, keep_sum, keep_statistics, dtype, backend
):
    y, statistics = _fwd_fake(x, weight, bias, eps, rms, keep_statistics, dtype, backend)
    return y, residual.new_empty(x.shape if keep_sum else 0), statistics


def _bwd_fake(dy, x, weight, statistics, weight_grad, bias_grad, rms, backend):
    N, dtype = x.shape[-1], torch.float32 if weight is None else weight.dtype
    dweight = x.new_empty(N if weight_grad and weight is not None else 0, dtype=dtype)
    return x.new_empty(x.shape), dweight, x.new_empty(N if bias_grad else 0, dtype=dtype)


def _add_bwd_fake(
    dy, dr, r, weight, statistics, seed, dropout_p, weight_grad, bias_grad, rms, dtype, backend
):
    same = seed is None and dtype == r.dtype
    dx = r.new_empty(0 if same else r.shape, dtype=dtype)
    return dx, *_bwd_fake(dy, r, weight, statistics, weight_grad, bias_grad, rms, backend)


backend.define(
    OP,
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, bool keep_statistics, ScalarType dtype,"
    " str backend) -> (Tensor, Tensor)",
    _fwd_fake,
)
backend.define(
    OP,
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, bool weight_grad, bool bias_grad, bool rms,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
backend.define(
    OP,
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, float dropout_p,"
    " bool rms, bool keep_sum, bool keep_statistics, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor)",
    _add_fwd_fake,
)
backend.define(
    OP,
    "add_layer_norm_bwd(Tensor dy, Tensor? dr, Tensor r, Tensor? weight, Tensor statistics, Tensor? seed,"
    " float dropout_p, bool weight_grad, bool bias_grad, bool rms, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_bwd_fake,
)


def _triton_why_not(x, weight, bias, dtype, residual=None):
    for what, t in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in backend.TRITON_DTYPES:
            return f"{what}'s dtype {t.dtype} is not float16, bfloat16 or float32"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"weight has dtype {weight.dtype} and bias {bias.dtype}, which must be one"
    return backend.last_block_why_not(x) or backend.triton_why_not(x, residual, weight, bias)


WHY_NOT = {
    name: {"cuda": layer_norm_why_not, "triton": _triton_why_not}
    for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
}
