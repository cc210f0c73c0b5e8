"""Softmax's launchers in CUDA C++: csrc/softmax.cu."""

import torch

from fastattn import backend, cuda


def softmax_why_not(x, mask, dtype):
    """Beyond `cuda.why_not`: the dtypes of the input and of the result."""
    for what, t in (("input", x.dtype), ("result", dtype)):
        if t not in backend.TRITON_DTYPES:
            return f"{what} dtype {t} is not float16, bfloat16 or float32"
    return cuda.why_not(x, mask)


def softmax_usual(_C, x, dim, log):
    """softmax_fwd of a contiguous x in its own dtype."""
    y = torch.empty_like(x)
    _C.softmax_fwd(x, None, y, dim % x.dim(), 1.0, log, False, False)
    return y


def softmax_fwd(x, dim, log, dtype):
    """softmax (or its logarithm) of x over dim; contiguous, in dtype, to which x is rounded first."""
    return _forward(x, None, dim % x.dim(), 1.0, log, False, False, dtype)


def softmax_bwd(dy, y, dim, log, dtype):
    """dx of softmax_fwd's y, contiguous, in dtype (x's)."""
    return _backward(dy, y, dim % y.dim(), 1.0, log, False, dtype)


def scaled_masked_softmax_fwd(scores, mask, scale, causal, dtype):
    """softmax(scale * scores) over the last dim where mask (bool, expanded to scores' shape) and causality attend."""
    return _forward(scores, mask, scores.dim() - 1, scale, False, True, causal, dtype)


def scaled_masked_softmax_bwd(dy, y, scale, causal, dtype):
    """dscores of scaled_masked_softmax_fwd's y, contiguous, in dtype (scores')."""
    return _backward(dy, y, y.dim() - 1, scale, False, causal, dtype)


def _forward(x, mask, *options_and_dtype):
    *options, dtype = options_and_dtype
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch = cuda.module(x).softmax_fwd
    if not launch(
        x, mask, y, *options
    ):  # more uneven dims than a kernel takes: copies of the inputs, which merge like y
        launch(x.contiguous(), mask if mask is None else mask.contiguous(), y, *options)
    return y


def _backward(dy, y, dim, scale, log, causal, dtype):
    dx = torch.empty(y.shape, dtype=dtype, device=y.device)
    y = y.contiguous()  # as forward left it, unless something else was saved in its place
    launch = cuda.module(y).softmax_bwd
    if not launch(dy, y, dx, dim, scale, log, causal):  # more uneven dims than a kernel takes
        launch(dy.contiguous(), y, dx, dim, scale, log, causal)
    return dx
