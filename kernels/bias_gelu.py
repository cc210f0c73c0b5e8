"""Bias and GELU of rows in one pass, forward and backward.

    h = x + bias
    erf:   y = h * Phi(h),     Phi(h) = (1 + erf(h / sqrt(2))) / 2,               dy/dh = Phi + h * exp(-h^2 / 2) / sqrt(2 pi)
    tanh:  y = h * s(u),       u = 2 sqrt(2 / pi) (h + 0.044715 h^3),             dy/dh = s + h * s (1 - s) * du/dh
    dx = dy * dy/dh,           dbias = sum_m dx

with s(u) = 1 / (1 + exp(-u)), since (1 + tanh(u / 2)) / 2 = s(u). Both come from their tail, so that nothing is 1 - 1 where h
is negative, and take one exponential, which the gradient needs too: 1 - s(|u|) = e / (1 + e) with e = exp(-|u|), and
1 - Phi(|h|) = t P(t) exp(-h^2 / 2) with t = 1 / (1 + 0.304 |h|) and P of degree 7, fitted to a relative error of 1e-7 up to
|h| = 14.

Tensors are (M, N), the last dim the bias's. A program owns BLOCK_N columns, forward of one block of rows, backward of a run of
blocks: it sums its share of dbias in registers and writes one fp32 row of partial sums, which a second kernel adds in a
fixed order. Forward moves 2 MN, backward 3 MN: x is saved, h is not. Everything is computed in fp32.
GELU: Hendrycks and Gimpel, arXiv 1606.08415.
"""

import torch
import triton
import triton.language as tl

from .common import blocks_of, multiprocessors, row_offsets, rows_of, sum_partials

# TILE elements a program takes at a time: BLOCK_N columns, less where N is narrower, of TILE // BLOCK_N rows. 512 divides the
# inner widths of most models. None has been timed on a GPU, and one row serves every architecture until one has.
FORWARD = dict(TILE=2048, BLOCK_N=512, num_warps=4)
BACKWARD = dict(TILE=2048, BLOCK_N=512, num_warps=4, PROGRAMS=6)  # PROGRAMS on each multiprocessor
PARTIAL_SUM = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4)


@triton.jit
def gate(h, TANH: tl.constexpr):
    """(g, slope) of h in fp32: y = h * g, dy/dh = g + h * slope.

    A reciprocal is a squared rsqrt: as exact, and a quarter of all instructions less than a division.
    """
    if TANH:
        square = tl.minimum(h * h, 400.0)  # past it g is 0 or 1, and an infinity would meet the 0
        e = tl.exp2(tl.abs(h) * -(2.3022081981 + 0.1029432396 * square))  # exp(-|u|)
        r = tl.rsqrt(1.0 + e)
        r *= r
        tail = e * r
        slope = tail * r * (1.5957691216 + 0.2140644488 * square)
    else:
        bell = tl.exp2(h * h * -0.7213475204)  # exp(-h^2 / 2)
        t = tl.rsqrt(1.0 + 0.304 * tl.abs(h))
        t *= t
        p = 0.18998143 + t * (-0.15398274 + t * 0.036533855)
        p = 0.10272419 + t * (0.12253328 + t * (-0.041151252 + t * p))
        tail = bell * t * (0.12123769 + t * (0.12212353 + t * p))
        slope = 0.3989422804 * bell
    return tl.where(h < 0.0, tail, 1.0 - tail), slope


@triton.jit
def load_sum(x_rows, bias_ptr, offs_n, mask, stride_x_n, N):
    """x + bias at columns offs_n (BLOCK_N,) in fp32, finite outside the mask."""
    h = tl.load(x_rows + offs_n.to(tl.int64)[None, :] * stride_x_n, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit(do_not_specialize=["M"])
def bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr,
    x_inner, stride_x_outer, stride_x_inner, stride_x_n,
    M, N,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles_n, lanes = blocks_of(N, BLOCK_N), tl.arange(0, BLOCK_N)
    offs_n = (pid % tiles_n).to((lanes + N).dtype) * BLOCK_N + lanes  # as wide as N
    rows = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < M)[:, None] & (offs_n < N)[None, :]

    x_rows = x_ptr + row_offsets(rows, x_inner, stride_x_outer, stride_x_inner)
    h = load_sum(x_rows, bias_ptr, offs_n, mask, stride_x_n, N)

    g, _ = gate(h, TANH)

    tl.store(y_ptr + (rows * N)[:, None] + offs_n[None, :], h * g, mask=mask)


@triton.jit(do_not_specialize=["M", "groups"])
def bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partial_dbias_ptr,
    dy_inner, stride_dy_outer, stride_dy_inner, stride_dy_n,
    x_inner, stride_x_outer, stride_x_inner, stride_x_n,
    M, N, groups,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles_n, lanes = blocks_of(N, BLOCK_N), tl.arange(0, BLOCK_N)
    offs_n = (pid % tiles_n).to((lanes + N).dtype) * BLOCK_N + lanes  # as wide as N
    group = pid // tiles_n
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for start in range(group * BLOCK_M, M, groups.to(tl.int64) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < M)[:, None] & (offs_n < N)[None, :]
        x_rows = x_ptr + row_offsets(rows, x_inner, stride_x_outer, stride_x_inner)
        dy_rows = dy_ptr + row_offsets(rows, dy_inner, stride_dy_outer, stride_dy_inner)
        h = load_sum(x_rows, bias_ptr, offs_n, mask, stride_x_n, N)
        dy = load_sum(dy_rows, None, offs_n, mask, stride_dy_n, N)

        g, slope = gate(h, TANH)
        dx = dy * (g + h * slope)
        dbias += dx

        tl.store(dx_ptr + (rows * N)[:, None] + offs_n[None, :], dx, mask=mask)

    if partial_dbias_ptr is not None:
        tl.store(partial_dbias_ptr + group * N + offs_n, tl.sum(dbias, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["G"])
def bias_gelu_bwd_partials_kernel(partial_ptr, dbias_ptr, G, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_partials(partial_ptr, dbias_ptr, offs_n, G, N, BLOCK_M, BLOCK_N)


def tile(table, N):
    """The table's row as kernel options BLOCK_M, BLOCK_N and num_warps (and PROGRAMS)."""
    config = dict(table)
    elements, block_n = config.pop("TILE"), min(config["BLOCK_N"], triton.next_power_of_2(N))
    return dict(config, BLOCK_M=elements // block_n, BLOCK_N=block_n)


def bias_gelu_fwd(x, bias, tanh):
    """y of x (..., N) and bias (N,) or None, contiguous, in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, x_layout = rows_of(x)
    bias = bias if bias is None else bias.contiguous()  # one row
    N, options = x.shape[-1], tile(FORWARD, x.shape[-1])
    M = x.numel() // N
    blocks = triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"])
    with torch.cuda.device_of(x):
        bias_gelu_fwd_kernel[(blocks,)](x, bias, y, *x_layout, M, N, TANH=tanh, **options)
    return y


def bias_gelu_bwd(dy, x, bias, tanh, bias_grad):
    """(dx contiguous in x's dtype, dbias in bias's, (0,) if not wanted)."""
    bias_grad = bias_grad and bias is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbias = torch.empty(x.shape[-1], dtype=bias.dtype, device=x.device) if bias_grad else dx.new_empty(0)
    if dx.numel() == 0:
        return dx, dbias.zero_()
    (dy, dy_layout), (x, x_layout) = rows_of(dy), rows_of(x)
    bias = bias if bias is None else bias.contiguous()  # one row
    N, options = x.shape[-1], tile(BACKWARD, x.shape[-1])
    M = x.numel() // N
    blocks, tiles_n = triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"])
    G = min(blocks, triton.cdiv(options.pop("PROGRAMS") * multiprocessors(x), tiles_n))
    partial = torch.empty((G, N), dtype=torch.float32, device=x.device) if bias_grad else None
    with torch.cuda.device_of(x):
        bias_gelu_bwd_kernel[(G * tiles_n,)](
            dy, x, bias, dx, partial, *dy_layout, *x_layout, M, N, G, TANH=tanh, **options
        )
        if bias_grad:
            bias_gelu_bwd_partials_kernel[(triton.cdiv(N, PARTIAL_SUM["BLOCK_N"]),)](
                partial, dbias, G, N, **PARTIAL_SUM
            )
    return dx, dbias
