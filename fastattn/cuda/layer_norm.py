"""The norms' launchers in CUDA C++: csrc/layer_norm.cu. Same names, arguments and results as kernels/layer_norm.py."""

import torch

from fastattn import cuda


def layer_norm_why_not(x, weight, bias, dtype, residual=None):
    """Beyond `cuda.why_not`: whatever stands beside x has its dtype or float32, weight and bias the same of the two."""
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"weight has dtype {weight.dtype} and bias {bias.dtype}, which must be one"
    for what, t in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != torch.float32 and t.dtype != x.dtype:
            return f"{what}'s dtype {t.dtype} is neither torch.float32 nor x's {x.dtype}"
    if not x.is_floating_point():
        return f"x's dtype {x.dtype} is not float16, bfloat16 or float32"
    return cuda.why_not(x, residual, weight, bias)


def layer_norm_fwd(x, weight, bias, eps, rms, dtype):
    """(y, mean, rstd) of x (..., N); y contiguous in dtype, mean and rstd (M,) fp32, mean (0,) where rms."""
    y, _, mean, rstd = _forward(x, None, weight, bias, None, eps, 0.0, rms, False, dtype)
    return y, mean, rstd


def add_layer_norm_fwd(x, residual, weight, bias, seed, eps, dropout_p, rms, keep_sum, dtype):
    """(y, r, mean, rstd) with r = residual + dropout(x) in residual's dtype, (0,) unless keep_sum; y in dtype."""
    return _forward(x, residual, weight, bias, seed, eps, dropout_p, rms, keep_sum, dtype)


def _forward(x, residual, weight, bias, seed, eps, dropout_p, rms, keep_sum, dtype):
    M = x.shape[:-1].numel()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    r = torch.empty(
        x.shape if keep_sum else 0, dtype=(x if residual is None else residual).dtype, device=x.device
    )
    mean, rstd = (torch.empty(m, dtype=torch.float32, device=x.device) for m in (0 if rms else M, M))
    _C = cuda.module(x)
    x, residual = (_readable(_C, t) for t in (x, residual))
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))  # one row each
    _C.layer_norm_fwd(
        x, residual, weight, bias, y, r if keep_sum else None, None if rms else mean, rstd, seed, eps, dropout_p, rms
    )  # fmt: skip
    return y, r, mean, rstd


def layer_norm_bwd(dy, x, weight, mean, rstd, weight_grad, bias_grad, rms):
    """(dx, dweight, dbias): dx contiguous in x's dtype, the others in weight's (fp32 without one), (0,) if not wanted."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, *_backward(dy, None, x, weight, mean, rstd, None, 0.0, dx, None, weight_grad, bias_grad, rms)


def add_layer_norm_bwd(dy, dr, r, weight, mean, rstd, seed, dropout_p, weight_grad, bias_grad, rms, dtype):
    """(dx in dtype, dresidual in r's, dweight, dbias); dr is what came for r itself, or None.

    dx is (0,) where it would be dresidual over again: no dropout, one dtype.
    """
    dresidual = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    same = seed is None and dtype == r.dtype
    dx = torch.empty(0 if same else r.shape, dtype=dtype, device=r.device)
    return dx, dresidual, *_backward(
        dy, dr, r, weight, mean, rstd, seed, dropout_p, None if same else dx, dresidual, weight_grad, bias_grad, rms
    )  # fmt: skip


def _backward(dy, dr, r, weight, mean, rstd, seed, dropout_p, dx, dresidual, weight_grad, bias_grad, rms):
    """Fills dx and dresidual where given; returns dweight and dbias."""
    N, M = r.shape[-1], rstd.numel()
    weight_grad = weight_grad and weight is not None
    dtype = torch.float32 if weight is None else weight.dtype
    dweight, dbias = (
        torch.empty(N if wanted else 0, dtype=dtype, device=r.device) for wanted in (weight_grad, bias_grad)
    )
    if r.numel() == 0:
        return dweight.zero_(), dbias.zero_()
    _C = cuda.module(r)
    dy, dr, r = (_readable(_C, t) for t in (dy, dr, r))
    # One partial row a multiprocessor, for each sum over rows; then two sums of each row, for rows too long to be held.
    partial_rows = min(M, cuda.sm_count(r.device))
    workspace = torch.empty(
        (weight_grad + bias_grad) * partial_rows * N + 2 * M, dtype=torch.float32, device=r.device
    )
    _C.layer_norm_bwd(
        dy, dr, r, weight if weight is None else weight.contiguous(), None if rms else mean, rstd, seed, dx, dresidual,
        dweight if weight_grad else None, dbias if bias_grad else None, workspace, partial_rows, dropout_p, rms,
    )  # fmt: skip
    return dweight, dbias


def _readable(_C, t):
    """t, or a copy where its rows are more than two strides apart: too many divisions a row."""
    return t if t is None or t.dim() < 4 or _C.rows_fit(t) else t.contiguous()
