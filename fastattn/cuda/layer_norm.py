"""The norms' launchers in CUDA C++: csrc/layer_norm.cu. Same names, arguments and results as kernels/layer_norm.py."""

import torch

from fastattn import cuda


def layer_norm_why_not(x, weight, bias, dtype, residual=None):
    """Beyond `cuda.why_not`: whatever stands beside x has its dtype or float32, weight and bias the same of the two."""
    alike = weight is None or bias is None or weight.dtype == bias.dtype
    if alike and cuda.plain(x, residual, weight, bias):
        return cuda.device_why_not(x)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"weight has dtype {weight.dtype} and bias {bias.dtype}, which must be one"
    for what, t in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != torch.float32 and t.dtype != x.dtype:
            return f"{what}'s dtype {t.dtype} is neither torch.float32 nor x's {x.dtype}"
    if not x.is_floating_point():
        return f"x's dtype {x.dtype} is not float16, bfloat16 or float32"
    return cuda.why_not(x, residual, weight, bias)


def layer_norm_fwd(x, weight, bias, eps, rms, keep_statistics, dtype):
    """(y, statistics) of x (..., N); y contiguous in dtype; statistics fp32: every row's rstd, then, unless rms, every mean.

    What is not kept is (0,).
    """
    y, _, statistics = _forward(x, None, weight, bias, None, eps, 0.0, rms, False, keep_statistics, dtype)
    return y, statistics


def add_layer_norm_fwd(
    x, residual, weight, bias, seed, eps, dropout_p, rms, keep_sum, keep_statistics, dtype
):
    """(y, r, statistics) with r = residual + dropout(x) in residual's dtype, (0,) unless keep_sum; y in dtype."""
    return _forward(x, residual, weight, bias, seed, eps, dropout_p, rms, keep_sum, keep_statistics, dtype)


def _forward(x, residual, weight, bias, seed, eps, dropout_p, rms, keep_sum, keep_statistics, dtype):
    # empty_like takes a fifth of the time of empty with a shape of several dims
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    r = None
    if residual is not None:
        r = (
            torch.empty_like(residual, memory_format=torch.contiguous_format)
            if keep_sum
            else residual.new_empty(0)
        )
    M = x.shape[:-1].numel() if keep_statistics else 0
    statistics = torch.empty(M if rms else 2 * M, dtype=torch.float32, device=x.device)
    _C = cuda.module(x)
    x, residual = _readable(_C, x), _readable(_C, residual)
    if weight is not None:
        weight = weight.contiguous()  # one row
    if bias is not None:
        bias = bias.contiguous()
    _C.layer_norm_fwd(
        x, residual, weight, bias, y, r if keep_sum else None, statistics if keep_statistics else None, seed, eps, dropout_p, rms
    )  # fmt: skip
    return y, r, statistics


def layer_norm_usual(_C, x, normalized_shape, weight, bias):
    """The number of rows if this is the usual call, for which the next two functions are written; 0 means nothing.

    That is: plain contiguous tensors of the shapes that layer_norm wants, weight and bias of one dtype, x's or float32.
    """
    if x.is_neg() or (weight is not None and weight.is_neg()) or (bias is not None and bias.is_neg()):
        return 0
    return _C.layer_norm_usual(x, normalized_shape, weight, bias)


def residual_usual(residual, x):
    """Whether a residual is like the x of a usual call, or of float32 beside it."""
    return (
        type(residual) is torch.Tensor
        and residual.dtype in (x.dtype, torch.float32)
        and residual.shape == x.shape
        and residual.is_contiguous()
        and not residual.is_neg()
        and residual.device == x.device
    )


def layer_norm_infer(_C, x, weight, bias, eps, rms):
    """y alone, of a usual call."""
    y = torch.empty_like(x)
    _C.layer_norm_fwd(x, None, weight, bias, y, None, None, None, eps, 0.0, rms)
    return y


def layer_norm_train(_C, x, weight, bias, eps, rms, M):
    """layer_norm_fwd of a usual call with M rows."""
    y = torch.empty_like(x)
    statistics = torch.empty(M if rms else 2 * M, dtype=torch.float32, device=x.device)
    _C.layer_norm_fwd(x, None, weight, bias, y, None, statistics, None, eps, 0.0, rms)
    return y, statistics


def layer_norm_bwd(dy, x, weight, statistics, weight_grad, bias_grad, rms):
    """(dx, dweight, dbias): dx contiguous in x's dtype, the others in weight's (fp32 without one), (0,) if not wanted."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *_backward(dy, None, x, weight, statistics, None, 0.0, dx, None, weight_grad, bias_grad, rms)


def add_layer_norm_bwd(dy, dr, r, weight, statistics, seed, dropout_p, weight_grad, bias_grad, rms, dtype):
    """(dx in dtype, dresidual in r's, dweight, dbias); dr is what came for r itself, or None.

    dx is (0,) where it would be dresidual over again: no dropout, one dtype.
    """
    dresidual = torch.empty_like(r, memory_format=torch.contiguous_format)
    same = seed is None and dtype == r.dtype
    dx = r.new_empty(0) if same else torch.empty_like(r, dtype=dtype, memory_format=torch.contiguous_format)
    return dx, dresidual, *_backward(
        dy, dr, r, weight, statistics, seed, dropout_p, None if same else dx, dresidual, weight_grad, bias_grad, rms
    )  # fmt: skip


def _backward(dy, dr, r, weight, statistics, seed, dropout_p, dx, dresidual, weight_grad, bias_grad, rms):
    """Fills dx and dresidual where given; returns dweight and dbias."""
    N = r.shape[-1]
    weight_grad = weight_grad and weight is not None
    dtype = torch.float32 if weight is None else weight.dtype
    dweight = torch.empty(N if weight_grad else 0, dtype=dtype, device=r.device)
    dbias = torch.empty(N if bias_grad else 0, dtype=dtype, device=r.device)
    if r.numel() == 0:
        return dweight.zero_(), dbias.zero_()
    M = r.numel() // N
    _C = cuda.module(r)
    dy, dr, r = _readable(_C, dy), _readable(_C, dr), _readable(_C, r)
    # One partial row a multiprocessor, for each sum over rows; then two sums of each row, for rows too long to be held.
    partial_rows = min(M, cuda.sm_count(r.device))
    workspace = torch.empty(
        (weight_grad + bias_grad) * partial_rows * N + 2 * M, dtype=torch.float32, device=r.device
    )
    _C.layer_norm_bwd(
        dy, dr, r, weight if weight is None else weight.contiguous(), statistics, seed, dx, dresidual,
        dweight if weight_grad else None, dbias if bias_grad else None, workspace, partial_rows, dropout_p, rms,
    )  # fmt: skip
    return dweight, dbias


def _readable(_C, t):
    """t, or a copy where its rows are more than two strides apart: too many divisions a row."""
    return t if t is None or t.dim() < 4 or _C.rows_fit(t) else t.contiguous()
