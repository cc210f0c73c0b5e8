"""Cross-entropy of logits = hidden @ weight.T + bias, with the gradient of the logits, a chunk of tokens at a time.

    s = softcap * tanh(z / softcap),  lse = log(sum_n exp(s_n)),  loss = lse - s_target
    dz_n = dloss * (exp(s_n - lse) - [n = target]) * (1 - (s_n / softcap)^2);   both are 0 where target = ignore_index

The products are torch's (chunks.py). A program of the kernel owns a token's row of logits (V). It walks the row twice: once
with a running maximum and sum, once more, from cache, to overwrite every logit with its gradient. Read 2 MV, written MV,
in the logits' dtype; everything is computed in fp32, and the target's logit is read before anything is written.
Losses alone are one walk. Online maximum and sum: Milakov and Gimelshein, arXiv 1805.02867; a gradient that takes its
logits' place, chunk by chunk: Hsu et al., arXiv 2410.10989, and Wijmans et al., arXiv 2411.09009.
"""

import torch
import triton
import triton.language as tl

from .attention import tanh
from .chunks import over_chunks

# Rows (largest V, dict), from register counts: 16 fp32 values a thread. None has been timed on a GPU.
# fmt: off
ROWS = [
    (1024, dict(BLOCK_N=1024, num_warps=2)),
    (4096, dict(BLOCK_N=4096, num_warps=8)),
]
ROWS_WIDE = dict(BLOCK_N=8192, num_warps=16)
# fmt: on


@triton.jit
def capped(s, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(s / softcap) and its slope."""
    if CAPPED:
        t = tanh(s / softcap)
        return t * softcap, 1.0 - t * t
    else:
        return s, 1.0


@triton.jit
def load_logits(row_ptr, offs_n, loaded, V, softcap, CAPPED: tl.constexpr):
    """s in fp32, -inf past the last logit, and ds/dz."""
    s, slope = capped(tl.load(row_ptr + offs_n, mask=loaded, other=0.0).to(tl.float32), softcap, CAPPED)
    return tl.where(loaded & (offs_n < V), s, float("-inf")), slope


@triton.jit
def whole_vectors(offs_n, V):
    """Which columns to access: 16 share their fate, so that accesses stay 16 bytes wide; a row has that much room past V."""
    return offs_n // 16 * 16 < V


@triton.jit
def linear_cross_entropy_rows_kernel(
    logits_ptr, targets_ptr, dloss_ptr, losses_ptr,
    stride_logits_m, V, ignore_index, softcap,
    CAPPED: tl.constexpr, GRAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + m * stride_logits_m
    target = tl.load(targets_ptr + m).to(tl.int64)
    counts = target != ignore_index
    offs = tl.arange(0, BLOCK_N)

    top, denom = float("-inf"), 0.0
    for start in range(0, V, BLOCK_N):
        offs_n = start + offs
        s, _ = load_logits(row_ptr, offs_n, counts & whole_vectors(offs_n, V), V, softcap, CAPPED)
        new_top = tl.maximum(top, tl.max(s, axis=0))
        denom = denom * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top), axis=0)
        top = new_top
    # a wrong target on a GPU, which nobody has checked, must not read elsewhere
    at_target = tl.load(row_ptr + target, mask=counts & (target >= 0) & (target < V), other=0.0)
    s_target, _ = capped(at_target.to(tl.float32), softcap, CAPPED)
    loss = (top - s_target) + tl.log(denom)

    tl.store(losses_ptr + m, tl.where(counts, loss, 0.0))
    if GRAD:
        dloss = 1.0
        if dloss_ptr is not None:
            dloss = tl.load(dloss_ptr + m).to(tl.float32)
        for start in range(0, V, BLOCK_N):
            offs_n = start + offs
            inside = whole_vectors(offs_n, V)
            s, slope = load_logits(row_ptr, offs_n, counts & inside, V, softcap, CAPPED)
            dz = tl.exp(s - top) / denom - tl.where(offs_n == target, 1.0, 0.0)
            tl.store(row_ptr + offs_n, tl.where(counts, dloss * dz * slope, 0.0), mask=inside)


def linear_cross_entropy_fwd(
    hidden, weight, bias, targets, dloss, ignore_index, softcap, hidden_grad, weight_grad, bias_grad
):
    """chunks.over_chunks with the kernel above for a chunk's rows."""
    return over_chunks(
        _rows,
        hidden,
        weight,
        bias,
        targets,
        dloss,
        ignore_index,
        softcap,
        hidden_grad,
        weight_grad,
        bias_grad,
    )


def _rows(logits, targets, dloss, losses, ignore_index, softcap, grad):
    M, V = logits.shape
    config = next((config for limit, config in ROWS if V <= limit), ROWS_WIDE)
    with torch.cuda.device_of(logits):
        linear_cross_entropy_rows_kernel[(M,)](
            logits, targets, dloss, losses, logits.stride(0), V, ignore_index, softcap,
            CAPPED=softcap > 0, GRAD=grad, **config,
        )  # fmt: skip
