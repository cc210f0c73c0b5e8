"""The norms' launchers in CUDA C++: csrc/layer_norm.cu."""

import torch

from fastattn import cuda


def layer_norm_why_not(x, weight, bias, dtype, residual=None):
    """Beyond `cuda.why_not`: y in x's dtype; weight and bias of one dtype, x's or float32, and contiguous."""
    reason = cuda.why_not(x, weight, bias)
    if reason is not None:
        return reason
    if dtype != x.dtype:
        return f"the result is wanted in {dtype}, only x's own {x.dtype} is written"
    parameters = [t for t in (weight, bias) if t is not None]
    dtypes = {t.dtype for t in parameters}
    if len(dtypes) > 1 or dtypes - {x.dtype, torch.float32}:
        return f"weight and bias are {' and '.join(map(str, dtypes))}, must both be {x.dtype} or both torch.float32"
    if not all(t.is_contiguous() for t in parameters):
        return "weight and bias must be contiguous"
    return None


def layer_norm_fwd(x, weight, bias, eps, rms=False, dtype=None):
    """LayerNorm of the rows of x (..., N), of any strides -> y like x, contiguous, mean (M,), rstd (M,) in fp32.

    rms and dtype are the op's; layer_norm_why_not has refused all but False and x's dtype.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = (
        x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    )  # a copy where the leading dims do not merge
    mean, rstd = x.new_empty((2, rows.shape[0]), dtype=torch.float32).unbind()
    cuda.module(x).layer_norm_fwd(rows, weight, bias, y.view(rows.shape), mean, rstd, eps)
    return y, mean, rstd
