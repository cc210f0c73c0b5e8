"""Layer and RMS normalisation of rows, alone or after a residual add with dropout, forward and backward.

    r = residual + dropout(x)                      (r = x without a residual)
    y = (r - mean) * rstd * weight + bias,         mean = sum(r) / N, rstd = 1 / sqrt(sum((r - mean)^2) / N + eps)
    g = dy * weight, x_hat = (r - mean) * rstd
    dr = rstd * (g - x_hat * sum(g * x_hat) / N - sum(g) / N),   dweight = sum_m dy * x_hat,   dbias = sum_m dy

RMS drops the mean, the bias and the sum(g) term. Tensors are (M, N): the last dim is normalised, all others are rows.

Forward: a program owns a group of consecutive rows and keeps it in registers, so the variance is a second sum over the
centred values and r is read once. Rows beyond the last table row are walked twice in blocks: a running mean and squared
deviation in each lane (Welford), merged at the end, then the output, backwards from what is still in cache.
Backward: programs as many as the GPU holds walk the row groups; each keeps its share of dweight and dbias in registers
and writes one fp32 row of partial sums, which a second kernel adds in a fixed order. 3 MN moved, dy and r read once.
Beyond the table's last row the sums do not fit: one kernel for dr, one for dweight and dbias by columns, 5 MN.
Everything is computed in fp32. r is rounded to its dtype before the norm, so that backward, which reloads it, agrees.
"""

import torch
import triton
import triton.language as tl

from .common import multiprocessors, row_dropout, row_dropout_scalars, row_offsets, rows_of, sum_partials

# Rows (largest N, dict): TILE elements a program, so TILE // next_power_of_2(N) rows of it. The rows come from register
# counts (32 values a thread forward, 16 backward, four arrays of them) and a warp a row up to N = 1024; none has been
# timed on a GPU, and one table serves every architecture until one has.
# fmt: off
FORWARD = [
    (256, dict(TILE=4096, num_warps=4)),
    (1024, dict(TILE=1024, num_warps=1)),
    (2048, dict(TILE=2048, num_warps=2)),
    (4096, dict(TILE=4096, num_warps=4)),
    (8192, dict(TILE=8192, num_warps=8)),
    (16384, dict(TILE=16384, num_warps=16)),
]
FORWARD_LOOPED = dict(TILE=4096, num_warps=8)
BACKWARD = [  # PROGRAMS on each multiprocessor
    (2048, dict(TILE=2048, num_warps=4, PROGRAMS=4)),
    (4096, dict(TILE=4096, num_warps=8, PROGRAMS=2)),
    (8192, dict(TILE=8192, num_warps=16, PROGRAMS=1)),
]
BACKWARD_LOOPED = dict(TILE=8192, num_warps=16)
COLUMNS = dict(BLOCK_M=32, BLOCK_N=128, num_warps=8)
PARTIAL_SUM = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4)
# fmt: on


@triton.jit
def load_sum(x_rows, residual_rows, seed_ptr, rows, start, offs_n, mask, stride_x_n, stride_residual_n,
             threshold, rescale):  # fmt: skip
    """r = residual + dropout(x) at columns offs_n = start + (0, 1, ...), rounded as stored, in fp32; 0 outside the mask."""
    x = tl.load(x_rows + offs_n.to(tl.int64) * stride_x_n, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        x = row_dropout(x, seed_ptr, rows, start, threshold, rescale)
    if residual_rows is not None:
        residual = tl.load(residual_rows + offs_n.to(tl.int64) * stride_residual_n, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x).to(residual.dtype).to(tl.float32)
    return x


@triton.jit
def affine(x_hat, weight_ptr, bias_ptr, start, N, BLOCK_N: tl.constexpr):
    # One-dimensional loads: a (1, BLOCK_N) one drags the whole tile into its own layout, through shared memory.
    offs_n = start + tl.arange(0, BLOCK_N)
    if weight_ptr is not None:
        x_hat *= tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        x_hat += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return x_hat


@triton.jit(do_not_specialize=["M"])
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, r_ptr, statistics_ptr, seed_ptr,
    x_inner, stride_x_outer, stride_x_inner, stride_x_n,
    residual_inner, stride_residual_outer, stride_residual_inner, stride_residual_n,
    M, N, eps, threshold, rescale,
    RMS: tl.constexpr, LOOPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    out = (rows * N)[:, None]
    x_rows = x_ptr + row_offsets(rows, x_inner, stride_x_outer, stride_x_inner)
    residual_rows = residual_ptr
    if residual_ptr is not None:
        residual_rows += row_offsets(rows, residual_inner, stride_residual_outer, stride_residual_inner)
    lanes = tl.arange(0, BLOCK_N)[None, :]

    if not LOOPED:
        mask = mask_m[:, None] & (lanes < N)
        r = load_sum(x_rows, residual_rows, seed_ptr, rows, 0, lanes, mask, stride_x_n, stride_residual_n,
                     threshold, rescale)  # fmt: skip
        if r_ptr is not None:
            tl.store(r_ptr + out + lanes, r, mask=mask)

        mean = tl.zeros((BLOCK_M,), tl.float32)
        if not RMS:
            mean = tl.sum(r, axis=1) / N
            r = tl.where(mask, r - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(r * r, axis=1) / N + eps)
        y = affine(r * rstd[:, None], weight_ptr, bias_ptr, 0, N, BLOCK_N)

        tl.store(y_ptr + out + lanes, y, mask=mask)
    else:
        # Each lane follows its own mean and sum of squared deviations; all lanes of a block have seen as many values.
        mean_lane = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        square_lane = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + lanes
            mask = mask_m[:, None] & (offs_n < N)
            r = load_sum(x_rows, residual_rows, seed_ptr, rows, start, offs_n, mask, stride_x_n,
                         stride_residual_n, threshold, rescale)  # fmt: skip
            if r_ptr is not None:
                tl.store(r_ptr + out + offs_n, r, mask=mask)
            if RMS:
                square_lane += r * r
            else:
                delta = tl.where(mask, r - mean_lane, 0.0)
                mean_lane += delta * (1.0 / (start // BLOCK_N + 1))
                square_lane += delta * (r - mean_lane)

        mean = tl.zeros((BLOCK_M,), tl.float32)
        if not RMS:
            count = ((N - lanes + BLOCK_N - 1) // BLOCK_N).to(tl.float32)
            about = (
                tl.sum(mean_lane, axis=1) / BLOCK_N
            )  # so that a large common offset does not enter the sum
            mean = about + tl.sum((mean_lane - about[:, None]) * count, axis=1) / N
            mean_lane -= mean[:, None]
            square_lane += mean_lane * mean_lane * count
        rstd = tl.rsqrt(tl.sum(square_lane, axis=1) / N + eps)

        if r_ptr is not None:
            tl.debug_barrier()  # r is reloaded, perhaps by another thread than the one that stored it
        for i in range(0, tl.cdiv(N, BLOCK_N)):
            start = (tl.cdiv(N, BLOCK_N) - 1 - i) * BLOCK_N
            offs_n = start + lanes
            mask = mask_m[:, None] & (offs_n < N)
            if r_ptr is not None:
                r = tl.load(r_ptr + out + offs_n, mask=mask, other=0.0).to(tl.float32)
            else:
                r = tl.load(x_rows + offs_n.to(tl.int64) * stride_x_n, mask=mask, other=0.0).to(tl.float32)
            y = affine((r - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, start, N, BLOCK_N)
            tl.store(y_ptr + out + offs_n, y, mask=mask)

    if statistics_ptr is not None:
        tl.store(statistics_ptr + rows, rstd, mask=mask_m)
        if not RMS:
            tl.store(statistics_ptr + M + rows, mean, mask=mask_m)


@triton.jit
def load_gradient(dy_rows, x_rows, mean, rstd, offs_n, mask, stride_dy_n, stride_x_n):
    """dy and x_hat in fp32; outside the mask dy is 0, x_hat anything finite."""
    dy = tl.load(dy_rows + offs_n.to(tl.int64) * stride_dy_n, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_rows + offs_n.to(tl.int64) * stride_x_n, mask=mask, other=0.0).to(tl.float32)
    return dy, (x - mean[:, None]) * rstd[:, None]


@triton.jit
def load_statistics(statistics_ptr, M, rows, mask_m, RMS: tl.constexpr):
    mean = tl.zeros(rows.shape, tl.float32)
    if not RMS:
        mean = tl.load(statistics_ptr + M + rows, mask=mask_m, other=0.0)
    return mean, tl.load(statistics_ptr + rows, mask=mask_m, other=0.0)


@triton.jit
def store_gradient(dx, dr_rows, dx_ptr, dresidual_ptr, seed_ptr, rows, start, offs_n, out, mask, stride_dr_n,
                   threshold, rescale):  # fmt: skip
    """The gradient of r, plus what came for r itself: to the residual as it is, to x through the dropout."""
    if dr_rows is not None:
        dx += tl.load(dr_rows + offs_n.to(tl.int64) * stride_dr_n, mask=mask, other=0.0).to(tl.float32)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + out + offs_n, dx, mask=mask)
    if dx_ptr is not None:
        if seed_ptr is not None:
            dx = row_dropout(dx, seed_ptr, rows, start, threshold, rescale)
        tl.store(dx_ptr + out + offs_n, dx, mask=mask)


@triton.jit(do_not_specialize=["M"])
def layer_norm_bwd_kernel(
    dy_ptr, dr_ptr, x_ptr, weight_ptr, statistics_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, partial_dweight_ptr, partial_dbias_ptr,
    dy_inner, stride_dy_outer, stride_dy_inner, stride_dy_n,
    dr_inner, stride_dr_outer, stride_dr_inner, stride_dr_n,
    x_inner, stride_x_outer, stride_x_inner, stride_x_n,
    M, N, threshold, rescale,
    RMS: tl.constexpr, LOOPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for start_m in range(pid * BLOCK_M, M, tl.num_programs(0).to(tl.int64) * BLOCK_M):
        rows = start_m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = rows < M
        out = (rows * N)[:, None]
        dy_rows = dy_ptr + row_offsets(rows, dy_inner, stride_dy_outer, stride_dy_inner)
        x_rows = x_ptr + row_offsets(rows, x_inner, stride_x_outer, stride_x_inner)
        dr_rows = dr_ptr
        if dr_ptr is not None:
            dr_rows += row_offsets(rows, dr_inner, stride_dr_outer, stride_dr_inner)
        mean, rstd = load_statistics(statistics_ptr, M, rows, mask_m, RMS)

        if not LOOPED:
            mask = mask_m[:, None] & (lanes < N)
            dy, x_hat = load_gradient(dy_rows, x_rows, mean, rstd, lanes, mask, stride_dy_n, stride_x_n)
            if partial_dweight_ptr is not None:
                dweight += dy * x_hat
            if partial_dbias_ptr is not None:
                dbias += dy
            g = affine(dy, weight_ptr, None, 0, N, BLOCK_N)
            dx = g - x_hat * (tl.sum(g * x_hat, axis=1) / N)[:, None]
            if not RMS:
                dx -= (tl.sum(g, axis=1) / N)[:, None]
            store_gradient(dx * rstd[:, None], dr_rows, dx_ptr, dresidual_ptr, seed_ptr, rows, 0, lanes, out,
                           mask, stride_dr_n, threshold, rescale)  # fmt: skip
        else:
            projection = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, N, BLOCK_N):
                offs_n = start + lanes
                mask = mask_m[:, None] & (offs_n < N)
                dy, x_hat = load_gradient(dy_rows, x_rows, mean, rstd, offs_n, mask, stride_dy_n, stride_x_n)
                g = affine(dy, weight_ptr, None, start, N, BLOCK_N)
                projection += g * x_hat
                total += g
            slope = tl.sum(projection, axis=1) / N
            level = tl.zeros((BLOCK_M,), tl.float32)
            if not RMS:
                level = tl.sum(total, axis=1) / N
            for i in range(0, tl.cdiv(N, BLOCK_N)):
                start = (tl.cdiv(N, BLOCK_N) - 1 - i) * BLOCK_N
                offs_n = start + lanes
                mask = mask_m[:, None] & (offs_n < N)
                dy, x_hat = load_gradient(dy_rows, x_rows, mean, rstd, offs_n, mask, stride_dy_n, stride_x_n)
                dx = affine(dy, weight_ptr, None, start, N, BLOCK_N) - x_hat * slope[:, None] - level[:, None]
                store_gradient(dx * rstd[:, None], dr_rows, dx_ptr, dresidual_ptr, seed_ptr, rows, start, offs_n,
                               out, mask, stride_dr_n, threshold, rescale)  # fmt: skip

    offs_n = tl.arange(0, BLOCK_N)
    if partial_dweight_ptr is not None:
        tl.store(partial_dweight_ptr + pid * N + offs_n, tl.sum(dweight, axis=0), mask=offs_n < N)
    if partial_dbias_ptr is not None:
        tl.store(partial_dbias_ptr + pid * N + offs_n, tl.sum(dbias, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["M"])
def layer_norm_bwd_columns_kernel(
    dy_ptr, x_ptr, statistics_ptr, dweight_ptr, dbias_ptr,
    dy_inner, stride_dy_outer, stride_dy_inner, stride_dy_n,
    x_inner, stride_x_outer, stride_x_inner, stride_x_n,
    M, N,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of BLOCK_N columns, over all rows."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for start_m in range(0, M, BLOCK_M):
        rows = start_m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = rows < M
        mean, rstd = load_statistics(statistics_ptr, M, rows, mask_m, RMS)
        dy, x_hat = load_gradient(
            dy_ptr + row_offsets(rows, dy_inner, stride_dy_outer, stride_dy_inner),
            x_ptr + row_offsets(rows, x_inner, stride_x_outer, stride_x_inner),
            mean, rstd, offs_n[None, :], mask_m[:, None] & (offs_n < N)[None, :], stride_dy_n, stride_x_n,
        )  # fmt: skip
        dweight += dy * x_hat
        dbias += dy

    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_n, tl.sum(dweight, axis=0), mask=offs_n < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_n, tl.sum(dbias, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["G"])
def layer_norm_bwd_partials_kernel(
    partial_dweight_ptr, partial_dbias_ptr, dweight_ptr, dbias_ptr, G, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The G rows of partial sums, added in a fixed order and cast."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if dweight_ptr is not None:
        sum_partials(partial_dweight_ptr, dweight_ptr, offs_n, G, N, BLOCK_M, BLOCK_N)
    if dbias_ptr is not None:
        sum_partials(partial_dbias_ptr, dbias_ptr, offs_n, G, N, BLOCK_M, BLOCK_N)


def row_groups(table, looped, N):
    """Whether N is beyond the table, then its row as kernel options: BLOCK_M, BLOCK_N, num_warps (and PROGRAMS)."""
    config = dict(next((config for limit, config in table if N <= limit), looped))
    tile, block_n = config.pop("TILE"), triton.next_power_of_2(N)
    if N > table[-1][0]:
        return dict(config, LOOPED=True, BLOCK_M=1, BLOCK_N=tile)
    block_n = max(block_n, 8)  # row_dropout draws for 8 columns at a time
    return dict(config, LOOPED=False, BLOCK_M=max(1, tile // block_n), BLOCK_N=block_n)


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
    N = x.shape[-1]
    M = x.numel() // N if N else x.shape[:-1].numel()
    options = row_groups(FORWARD, FORWARD_LOOPED, N)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    kept = (M if rms else 2 * M) if keep_statistics else 0
    statistics = torch.empty(kept, dtype=torch.float32, device=x.device)
    stored = residual is not None and (keep_sum or options["LOOPED"])
    r = torch.empty(
        x.shape if stored else 0, dtype=(x if residual is None else residual).dtype, device=x.device
    )
    x, x_layout = rows_of(x)
    residual, residual_layout = (None, x_layout) if residual is None else rows_of(residual)
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))  # one row each
    if y.numel():
        with torch.cuda.device_of(x):
            layer_norm_fwd_kernel[(triton.cdiv(M, options["BLOCK_M"]),)](
                x, residual, weight, bias, y, r if stored else None, statistics if kept else None, seed, *x_layout, *residual_layout,
                M, N, eps, *row_dropout_scalars(dropout_p), RMS=rms, **options,
            )  # fmt: skip
    return y, r if keep_sum else r.new_empty(0), statistics


def layer_norm_bwd(dy, x, weight, statistics, weight_grad, bias_grad, rms):
    """(dx, dweight, dbias): dx contiguous in x's dtype, the others in weight's (fp32 without one), (0,) if not wanted."""
    weight_grad = weight_grad and weight is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = _backward(
        dy, None, x, weight, statistics, None, 0.0, dx, None, weight_grad, bias_grad, rms
    )
    return dx, dweight, dbias


def add_layer_norm_bwd(dy, dr, r, weight, statistics, seed, dropout_p, weight_grad, bias_grad, rms, dtype):
    """(dx in dtype, dresidual in r's, dweight, dbias); dr is what came for r itself, or None.

    dx is (0,) where it would be dresidual over again: no dropout, one dtype.
    """
    weight_grad = weight_grad and weight is not None
    dresidual = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    same = seed is None and dtype == r.dtype
    dx = torch.empty(0 if same else r.shape, dtype=dtype, device=r.device)
    dweight, dbias = _backward(
        dy, dr, r, weight, statistics, seed, dropout_p, None if same else dx, dresidual, weight_grad, bias_grad, rms
    )  # fmt: skip
    return dx, dresidual, dweight, dbias


def _backward(dy, dr, x, weight, statistics, seed, dropout_p, dx, dresidual, weight_grad, bias_grad, rms):
    """Fills dx and dresidual where given; returns dweight and dbias."""
    N = x.shape[-1]
    M = x.numel() // N if N else 0
    dtype = torch.float32 if weight is None else weight.dtype
    dweight, dbias = (
        torch.empty(N if wanted else 0, dtype=dtype, device=x.device) for wanted in (weight_grad, bias_grad)
    )
    if x.numel() == 0:
        return dweight.zero_(), dbias.zero_()
    (dy, dy_layout), (x, x_layout) = rows_of(dy), rows_of(x)
    dr, dr_layout = (None, dy_layout) if dr is None else rows_of(dr)
    weight = weight if weight is None else weight.contiguous()  # one row
    options = row_groups(BACKWARD, BACKWARD_LOOPED, N)
    looped, groups = options["LOOPED"], triton.cdiv(M, options["BLOCK_M"])
    G = groups if looped else min(groups, options.pop("PROGRAMS") * multiprocessors(x))
    partials = [
        torch.empty((G, N), dtype=torch.float32, device=x.device) if wanted and not looped else None
        for wanted in (weight_grad, bias_grad)
    ]
    outputs = dweight if weight_grad else None, dbias if bias_grad else None
    with torch.cuda.device_of(x):
        layer_norm_bwd_kernel[(G,)](
            dy, dr, x, weight, statistics, seed, dx, dresidual, *partials, *dy_layout, *dr_layout, *x_layout,
            M, N, *row_dropout_scalars(dropout_p), RMS=rms, **options,
        )  # fmt: skip
        if looped and (weight_grad or bias_grad):
            layer_norm_bwd_columns_kernel[(triton.cdiv(N, COLUMNS["BLOCK_N"]),)](
                dy, x, statistics, *outputs, *dy_layout, *x_layout, M, N, RMS=rms, **COLUMNS
            )
        elif weight_grad or bias_grad:
            layer_norm_bwd_partials_kernel[(triton.cdiv(N, PARTIAL_SUM["BLOCK_N"]),)](
                *partials, *outputs, G, N, **PARTIAL_SUM
            )
    return dweight, dbias
