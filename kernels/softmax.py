"""Softmax and log-softmax over any dim, and softmax of scaled, masked scores, forward and backward.

    y = exp(s - m) / denom,  m = max(s), denom = sum(exp(s - m)),   dx = y * (dy - sum(dy * y))
    y = s - m - log(denom),                                         dx = dy - exp(y) * sum(dy)
    scaled and masked: s = scale * x where attended, else -inf,     dx = scale * (as above); a row with nothing attended is 0

The softmax dim is N; all other dims merge into at most three, (A, B, M), by the strides of all tensors together, so no
layout is copied. A program owns BLOCK_M neighbours along M at one (a, b). Where N is contiguous they are whole rows that
lie one after another; where it is not, M is the dim along which memory is contiguous, and the same tile reads across it.

The tile stays in registers: x is read once and y written once (backward: y and dy read once). Longer rows are walked twice,
the first time with a running maximum m' and sum denom', which a block with maximum b turns into
    m = max(m', b),  denom = denom' * exp(m' - m) + sum(exp(s - m)),
the second time backwards, from what is still in cache. Everything is computed in fp32.
Online maximum and sum: Milakov and Gimelshein, arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl

from .common import blocks_of

# Rows (largest N, dict): TILE elements a program, so TILE // next_power_of_2(N) rows of it. The rows come from register
# counts (32 values a thread forward, 2 x 16 backward) and a warp a row up to N = 1024; none has been timed on a GPU, and
# one table serves every architecture until one has.
# fmt: off
FORWARD = [
    (256, dict(TILE=4096, num_warps=4)),
    (1024, dict(TILE=1024, num_warps=1)),
    (2048, dict(TILE=2048, num_warps=2)),
    (4096, dict(TILE=4096, num_warps=4)),
    (8192, dict(TILE=8192, num_warps=8)),
    (16384, dict(TILE=16384, num_warps=16)),
    (32768, dict(TILE=32768, num_warps=16)),
]
FORWARD_LOOPED = dict(TILE=8192, num_warps=16)
BACKWARD = [
    (256, dict(TILE=4096, num_warps=8)),
    (512, dict(TILE=512, num_warps=1)),
    (1024, dict(TILE=1024, num_warps=2)),
    (2048, dict(TILE=2048, num_warps=4)),
    (4096, dict(TILE=4096, num_warps=8)),
    (8192, dict(TILE=8192, num_warps=16)),
    (16384, dict(TILE=16384, num_warps=16)),
]
BACKWARD_LOOPED = dict(TILE=8192, num_warps=16)
# dim other than the contiguous one: BLOCK_M from 16 (32 bytes of a 16-bit dtype, a sector) to 64 neighbours.
ACROSS = dict(TILE=8192, num_warps=8)
# fmt: on


@triton.jit
def tile_rows(B, M, BLOCK_M: tl.constexpr):
    """This program's a, b and its BLOCK_M places along M, all int64."""
    blocks = blocks_of(M, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    outer = pid // blocks
    return outer // B, outer % B, pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def tile_offsets(a, b, offs_m, offs_n, stride_a, stride_b, stride_m, stride_n):
    return (
        a * stride_a + b * stride_b + (offs_m * stride_m)[:, None] + (offs_n.to(tl.int64) * stride_n)[None, :]
    )


@triton.jit
def causal(valid, offs_m, offs_n):
    """Which to load and which to attend: 16 columns share their fate in loads, so that these stay 16 bytes wide."""
    offs_m, offs_n = offs_m[:, None], offs_n[None, :]
    return valid & (offs_n // 16 * 16 <= offs_m), valid & (offs_n <= offs_m)


@triton.jit
def load_scores(x_ptr, mask_ptr, x_offs, mask_offs, offs_m, offs_n, valid, scale, dtype: tl.constexpr,
                MASKED: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """s in fp32, from x rounded to the output's dtype as torch does; -inf where nothing is attended or there is nothing."""
    loaded = valid
    if CAUSAL:
        loaded, valid = causal(valid, offs_m, offs_n)
    s = tl.load(x_ptr + x_offs, mask=loaded, other=0.0).to(dtype).to(tl.float32)
    if MASKED:
        s *= scale
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + mask_offs, mask=loaded, other=0) != 0)
    return tl.where(valid, s, float("-inf"))


@triton.jit
def normalised(s, m, denom, LOG: tl.constexpr):
    if LOG:
        return s - m[:, None] - tl.log(denom)[:, None]
    else:
        return tl.exp(s - m[:, None]) / denom[:, None]


@triton.jit
def softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr,
    stride_x_a, stride_x_b, stride_x_m, stride_x_n,
    stride_mask_a, stride_mask_b, stride_mask_m, stride_mask_n,
    stride_y_a, stride_y_b, stride_y_m, stride_y_n,
    B, M, N, scale,
    LOG: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    LOOPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    a, b, offs_m = tile_rows(B, M, BLOCK_M)
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    if not LOOPED:
        offs_n = tl.arange(0, BLOCK_N)
        valid = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        x_offs = tile_offsets(a, b, offs_m, offs_n, stride_x_a, stride_x_b, stride_x_m, stride_x_n)
        mask_offs = tile_offsets(
            a, b, offs_m, offs_n, stride_mask_a, stride_mask_b, stride_mask_m, stride_mask_n
        )
        y_offs = tile_offsets(a, b, offs_m, offs_n, stride_y_a, stride_y_b, stride_y_m, stride_y_n)
        s = load_scores(
            x_ptr, mask_ptr, x_offs, mask_offs, offs_m, offs_n, valid, scale, dtype, MASKED, CAUSAL
        )

        m = tl.max(s, axis=1)
        if MASKED:
            m = tl.where(m == float("-inf"), 0.0, m)
        if LOG:
            y = normalised(s, m, tl.sum(tl.exp(s - m[:, None]), axis=1), LOG)
        else:
            e = tl.exp(s - m[:, None])
            denom = tl.sum(e, axis=1)
            if MASKED:
                denom = tl.where(denom == 0.0, 1.0, denom)
            y = e / denom[:, None]

        tl.store(y_ptr + y_offs, y, mask=valid)
    else:
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        denom = tl.zeros((BLOCK_M,), tl.float32)
        last = N
        if CAUSAL:  # no program of the first walk looks past its last row's diagonal
            last = tl.minimum(N, tl.max(offs_m, axis=0) + 1)
        for start in range(0, last, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            valid = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            x_offs = tile_offsets(a, b, offs_m, offs_n, stride_x_a, stride_x_b, stride_x_m, stride_x_n)
            mask_offs = tile_offsets(
                a, b, offs_m, offs_n, stride_mask_a, stride_mask_b, stride_mask_m, stride_mask_n
            )
            s = load_scores(
                x_ptr, mask_ptr, x_offs, mask_offs, offs_m, offs_n, valid, scale, dtype, MASKED, CAUSAL
            )
            m_new = tl.maximum(m, tl.max(s, axis=1))
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing but -inf so far: denom stays 0
            denom = denom * tl.exp(m - finite) + tl.sum(tl.exp(s - finite[:, None]), axis=1)
            m = m_new

        if MASKED:
            m = tl.where(m == float("-inf"), 0.0, m)
            denom = tl.where(denom == 0.0, 1.0, denom)
        for i in range(tl.cdiv(N, BLOCK_N)):
            offs_n = (tl.cdiv(N, BLOCK_N) - 1 - i) * BLOCK_N + tl.arange(0, BLOCK_N)
            valid = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            x_offs = tile_offsets(a, b, offs_m, offs_n, stride_x_a, stride_x_b, stride_x_m, stride_x_n)
            mask_offs = tile_offsets(
                a, b, offs_m, offs_n, stride_mask_a, stride_mask_b, stride_mask_m, stride_mask_n
            )
            y_offs = tile_offsets(a, b, offs_m, offs_n, stride_y_a, stride_y_b, stride_y_m, stride_y_n)
            s = load_scores(
                x_ptr, mask_ptr, x_offs, mask_offs, offs_m, offs_n, valid, scale, dtype, MASKED, CAUSAL
            )
            tl.store(y_ptr + y_offs, normalised(s, m, denom, LOG), mask=valid)


@triton.jit
def load_gradient(dy_ptr, y_ptr, dy_offs, y_offs, offs_m, offs_n, valid, CAUSAL: tl.constexpr):
    """dy and y in fp32, 0 where nothing is attended or there is nothing."""
    loaded = valid
    if CAUSAL:
        loaded, valid = causal(valid, offs_m, offs_n)
    dy = tl.load(dy_ptr + dy_offs, mask=loaded, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + y_offs, mask=loaded, other=0.0).to(tl.float32)
    if CAUSAL:  # y is 0 there, but dy need not be finite
        dy = tl.where(valid, dy, 0.0)
    return dy, y


@triton.jit
def score_gradient(dy, y, total, scale, LOG: tl.constexpr):
    if LOG:
        return dy - tl.exp(y) * total[:, None]
    else:
        return scale * y * (dy - total[:, None])


@triton.jit
def softmax_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr,
    stride_dy_a, stride_dy_b, stride_dy_m, stride_dy_n,
    stride_y_a, stride_y_b, stride_y_m, stride_y_n,
    B, M, N, scale,
    LOG: tl.constexpr, CAUSAL: tl.constexpr, LOOPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    a, b, offs_m = tile_rows(B, M, BLOCK_M)

    if not LOOPED:
        offs_n = tl.arange(0, BLOCK_N)
        valid = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        dy_offs = tile_offsets(a, b, offs_m, offs_n, stride_dy_a, stride_dy_b, stride_dy_m, stride_dy_n)
        y_offs = tile_offsets(a, b, offs_m, offs_n, stride_y_a, stride_y_b, stride_y_m, stride_y_n)
        dy, y = load_gradient(dy_ptr, y_ptr, dy_offs, y_offs, offs_m, offs_n, valid, CAUSAL)

        total = tl.sum(dy if LOG else dy * y, axis=1)
        tl.store(dx_ptr + y_offs, score_gradient(dy, y, total, scale, LOG), mask=valid)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        last = N
        if CAUSAL:
            last = tl.minimum(N, tl.max(offs_m, axis=0) + 1)
        for start in range(0, last, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            valid = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            dy_offs = tile_offsets(a, b, offs_m, offs_n, stride_dy_a, stride_dy_b, stride_dy_m, stride_dy_n)
            y_offs = tile_offsets(a, b, offs_m, offs_n, stride_y_a, stride_y_b, stride_y_m, stride_y_n)
            dy, y = load_gradient(dy_ptr, y_ptr, dy_offs, y_offs, offs_m, offs_n, valid, CAUSAL)
            acc += dy if LOG else dy * y
        total = tl.sum(acc, axis=1)
        for i in range(tl.cdiv(N, BLOCK_N)):
            offs_n = (tl.cdiv(N, BLOCK_N) - 1 - i) * BLOCK_N + tl.arange(0, BLOCK_N)
            valid = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            dy_offs = tile_offsets(a, b, offs_m, offs_n, stride_dy_a, stride_dy_b, stride_dy_m, stride_dy_n)
            y_offs = tile_offsets(a, b, offs_m, offs_n, stride_y_a, stride_y_b, stride_y_m, stride_y_n)
            dy, y = load_gradient(dy_ptr, y_ptr, dy_offs, y_offs, offs_m, offs_n, valid, CAUSAL)
            tl.store(dx_ptr + y_offs, score_gradient(dy, y, total, scale, LOG), mask=valid)


def merged_dims(shape, dim, strides, keep_last=False):
    """All dims but `dim`, merged where every tensor's strides allow: ((A, B, M), one (a, b, m, n) a tensor), or None if more
    than three are left. keep_last: the last dim stays by itself (causal needs the query's index).
    """
    merged = []  # (size, strides of the tensors), outermost first
    for d, size in enumerate(shape):
        along = tuple(s[d] for s in strides)
        if d == dim or size == 1:
            continue
        alone = keep_last and d == len(shape) - 2
        if merged and not alone and merged[-1][1] == tuple(size * s for s in along):
            merged[-1] = (merged[-1][0] * size, along)
        else:
            merged.append((size, along))
    if keep_last and shape[-2] == 1:
        merged.append((1, (0,) * len(strides)))
    if len(merged) > 3:
        return None
    merged = [(1, (0,) * len(strides))] * (3 - len(merged)) + merged
    along_n = [s[dim] if shape[dim] > 1 else 1 for s in strides]
    return [size for size, _ in merged], [
        (*(s[t] for _, s in merged), along_n[t]) for t in range(len(strides))
    ]


def tile(table, looped, M, N, across):
    """Kernel options LOOPED, BLOCK_M, BLOCK_N and num_warps for M rows of N; across: N is not the contiguous dim."""
    config = dict(ACROSS if across else next((config for limit, config in table if N <= limit), looped))
    elements, block_n = config.pop("TILE"), triton.next_power_of_2(N)
    most = triton.next_power_of_2(M)
    if across:
        block_m = min(most, max(16, min(64, elements // block_n)))
        block_n = min(block_n, elements // block_m)
    else:
        block_m = min(most, max(1, elements // block_n))
        block_n = block_n if N <= table[-1][0] else elements
    return dict(config, LOOPED=block_n < N, BLOCK_M=block_m, BLOCK_N=block_n)


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


def _forward(x, mask, dim, scale, log, masked, causal, dtype):
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    strides = [t.stride() for t in (x, y if mask is None else mask, y)]
    layout = merged_dims(x.shape, dim, strides, causal)
    if layout is None:  # more uneven dims than a kernel takes: copies of the inputs, which merge like y
        x, mask = x.contiguous(), mask if mask is None else mask.contiguous()
        layout = merged_dims(x.shape, dim, [y.stride()] * 3, causal)
    (A, B, M), (along_x, along_mask, along_y) = layout
    N = x.shape[dim]
    options = tile(FORWARD, FORWARD_LOOPED, M, N, across=along_y[3] != 1)
    with torch.cuda.device_of(x):
        softmax_fwd_kernel[(A * B * triton.cdiv(M, options["BLOCK_M"]),)](
            x, mask if mask is None else mask.view(torch.uint8), y, *along_x, *along_mask, *along_y, B, M, N, scale,
            LOG=log, MASKED=masked, CAUSAL=causal, **options,
        )  # fmt: skip
    return y


def _backward(dy, y, dim, scale, log, causal, dtype):
    dx = torch.empty(y.shape, dtype=dtype, device=y.device)
    if dx.numel() == 0:
        return dx
    y = y.contiguous()  # as forward left it, unless something else was saved in its place
    layout = merged_dims(y.shape, dim, [dy.stride(), y.stride()], causal)
    if layout is None:  # more uneven dims than a kernel takes
        dy = dy.contiguous()
        layout = merged_dims(y.shape, dim, [y.stride()] * 2, causal)
    (A, B, M), (along_dy, along_y) = layout
    N = y.shape[dim]
    options = tile(BACKWARD, BACKWARD_LOOPED, M, N, across=along_y[3] != 1)
    with torch.cuda.device_of(y):
        softmax_bwd_kernel[(A * B * triton.cdiv(M, options["BLOCK_M"]),)](
            dy, y, dx, *along_dy, *along_y, B, M, N, scale, LOG=log, CAUSAL=causal, **options
        )
    return dx
