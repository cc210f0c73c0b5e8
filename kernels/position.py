"""Positional encodings and the embeddings of a transformer's first layer, each one pass over the rows.

    add_positional_encoding   y = dropout(scale * x + E[p])     E[p] a table's row, or with no table
                              E[p, 2i] = sin(p w_i), E[p, 2i+1] = cos(p w_i), w_i = 10000^(-2i/C)   (arXiv 1706.03762)
                              dx = scale * dropout(dy),  dE[p] = sum of dropout(dy) over the rows at position p
    embeddings                x = token[id] + type[t] + position[p],  xhat = (x - mean) * rstd
                              y = dropout(xhat * w + b), or dropout(x) without the norm
                              g = w * dropout(dy),  dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
                              dw = sum of dropout(dy) * xhat, db = sum of dropout(dy), each table's row the sum of its dx

How: rows are (b, s), b over the leading dims and s over the last one of the ids. Forward programs own a tile of positions.
Backward programs own positions and walk over b, so that the gradient of a table indexed by s is summed in registers on
the way; where b is cut into chunks for parallelism the fp32 partials meet in sum_partials_kernel. Rows addressed by ids are
sorted first: segment_sum_kernel adds runs of equal ids inside chunks of CHUNK, segment_join_kernel the runs that cross
chunks. Every sum has one fixed order and no atomic is used.
The sinusoidal angle is exact: a frequency is an integer F_i = 2^64 w_i / 2 pi of turns, p * F_i modulo 2^64 is the fraction of
a turn with nothing lost to rounding, and polynomials on [-pi/4, pi/4] give sin and cos to 2e-7 for every p below 2^24 (F_i is good to 2^-47 of itself).
Everything is fp32 after the load. Ids are clamped into their table: a wrong one gives wrong numbers, never a fault.
"""

import math

import torch
import triton
import triton.language as tl

from .common import row_dropout, row_dropout_scalars

# Rows (widest C, tile), first fit wins. Sized for 16-byte accesses and by AOT register counts (no spill on sm_90 under
# triton 3.6 and 3.7); no GPU has timed them, and one table serves every architecture until one has. PROGRAMS is how many
# a launch aims at where it may choose: what 132 multiprocessors hold, by those counts.
# fmt: off
ADD = [
    (32, dict(BLOCK_S=64, BLOCK_C=32, num_warps=4, PROGRAMS=4096)),
    (64, dict(BLOCK_S=32, BLOCK_C=64, num_warps=4, PROGRAMS=4096)),
    (128, dict(BLOCK_S=16, BLOCK_C=128, num_warps=4, PROGRAMS=4096)),
    (math.inf, dict(BLOCK_S=8, BLOCK_C=256, num_warps=4, PROGRAMS=4096)),  # 768 is three whole tiles of 256
]
ADD_BACKWARD = [
    (32, dict(BLOCK_S=32, BLOCK_C=32, num_warps=2, PROGRAMS=1024)),
    (64, dict(BLOCK_S=16, BLOCK_C=64, num_warps=2, PROGRAMS=1024)),
    (128, dict(BLOCK_S=8, BLOCK_C=128, num_warps=2, PROGRAMS=1024)),
    (math.inf, dict(BLOCK_S=4, BLOCK_C=256, num_warps=2, PROGRAMS=1024)),
]
NORM = [  # a row is one tile
    (64, dict(BLOCK_S=16, BLOCK_C=64, num_warps=4)),
    (128, dict(BLOCK_S=8, BLOCK_C=128, num_warps=4)),
    (256, dict(BLOCK_S=4, BLOCK_C=256, num_warps=4)),
    (512, dict(BLOCK_S=2, BLOCK_C=512, num_warps=4)),
    (1024, dict(BLOCK_S=1, BLOCK_C=1024, num_warps=4)),
    (2048, dict(BLOCK_S=1, BLOCK_C=2048, num_warps=4)),
    (4096, dict(BLOCK_S=1, BLOCK_C=4096, num_warps=8)),
]
NORM_BACKWARD = [
    (64, dict(BLOCK_B=4, BLOCK_C=64, num_warps=4, PROGRAMS=640)),
    (128, dict(BLOCK_B=4, BLOCK_C=128, num_warps=4, PROGRAMS=640)),
    (256, dict(BLOCK_B=2, BLOCK_C=256, num_warps=4, PROGRAMS=640)),
    (512, dict(BLOCK_B=1, BLOCK_C=512, num_warps=4, PROGRAMS=640)),
    (1024, dict(BLOCK_B=1, BLOCK_C=1024, num_warps=4, PROGRAMS=640)),
    (2048, dict(BLOCK_B=1, BLOCK_C=2048, num_warps=8, PROGRAMS=264)),
    (4096, dict(BLOCK_B=1, BLOCK_C=4096, num_warps=8, PROGRAMS=264)),
]
SEGMENTS = [
    (64, dict(BLOCK_C=64, num_warps=1)),
    (128, dict(BLOCK_C=128, num_warps=1)),
    (math.inf, dict(BLOCK_C=256, num_warps=1)),
]
PARTIALS = [  # by the number of partial sums
    (8, dict(BLOCK_G=8, BLOCK_R=256, num_warps=4)),
    (math.inf, dict(BLOCK_G=32, BLOCK_R=64, num_warps=4)),
]
# fmt: on
CHUNK = 16  # sorted rows that a program of segment_sum_kernel adds, one after the other


@triton.jit
def sinusoidal(positions, pair0, step, BLOCK_C: tl.constexpr):
    """(rows, BLOCK_C) fp32 encodings of positions (rows,) int64 for the column pairs pair0, pair0 + 1, ...

    step is 2^56 * 2 log2(10000) / C, so that log2(F_i) = 64 - log2(2 pi) - i * step * 2^-56.
    """
    rows: tl.constexpr = positions.shape[0]
    pair = (pair0 + tl.arange(0, BLOCK_C // 2)).to(tl.int64)
    top = 4420625586736734346  # 2^56 * (64 - log2(2 pi)), the exponent of pair 0
    log2_turns = tl.minimum(top - pair * step, top)  # columns past C can wrap around
    turns = tl.exp2(log2_turns.to(tl.float64) * 2.0**-56).to(tl.int64)
    phase = positions[:, None] * turns[None, :]
    quarter = (phase + (1 << 61)) >> 62  # -2 .. 1, the nearest quarter turn
    angle = (phase - (quarter << 62)).to(tl.float32) * 3.40612158008655e-19  # 2 pi / 2^64

    u = angle * angle
    sine = angle + angle * u * (-1.6666655e-1 + u * (8.3321781e-3 + u * -1.9517297e-4))
    cosine = 1.0 + u * (-0.5 + u * (4.1666647e-2 + u * (-1.3887367e-3 + u * 2.4438449e-5)))
    quarter = quarter.to(tl.int32)
    odd = (quarter & 1) != 0
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(odd, sine, cosine)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    return tl.reshape(tl.join(sin, cos), (rows, BLOCK_C))


@triton.jit
def clamped(ids, size):
    return tl.minimum(tl.maximum(ids.to(tl.int64), 0), size - 1)


@triton.jit
def encoding(table_ptr, positions, col0, mask, step, P, stride_table_p, BLOCK_C: tl.constexpr):
    """(rows, BLOCK_C) fp32: the table's rows at positions (rows,) int64, or the sinusoid where there is no table."""
    if table_ptr is None:
        e = sinusoidal(positions, col0 // 2, step, BLOCK_C)
    else:
        offs = clamped(positions, P)[:, None] * stride_table_p + col0 + tl.arange(0, BLOCK_C)[None, :]
        e = tl.load(table_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return e


@triton.jit(do_not_specialize=["offset", "step", "threshold"])
def add_positional_encoding_fwd_kernel(
    x_ptr, table_ptr, ids_ptr, y_ptr, seed_ptr, stride_x_b, stride_x_s, stride_x_c, stride_table_p,
    stride_ids_b, stride_ids_s, B, S, C, P, batch_step, offset, step, scale, threshold, rescale,
    PER_BATCH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_s = tl.cdiv(S, BLOCK_S)
    col0 = pid % tiles_c * BLOCK_C
    s = (pid // tiles_c % tiles_s).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    b_first = (pid // tiles_c // tiles_s).to(tl.int64) * batch_step
    cols = col0 + tl.arange(0, BLOCK_C)
    mask = (s[:, None] < S) & (cols[None, :] < C)
    offs_x = s[:, None] * stride_x_s + cols.to(tl.int64)[None, :] * stride_x_c
    offs_y = s[:, None] * C + cols[None, :]
    scale = tl.cast(scale, tl.float32)

    if not PER_BATCH:  # one encoding for every b
        if ids_ptr is None:
            positions = s + offset
        else:
            positions = tl.load(ids_ptr + s * stride_ids_s, mask=s < S, other=0).to(tl.int64)
        e = encoding(table_ptr, positions, col0, mask, step, P, stride_table_p, BLOCK_C)
    for b in range(b_first, tl.minimum(b_first + batch_step, B)):
        if PER_BATCH:
            offs_ids = b * stride_ids_b + s * stride_ids_s
            positions = tl.load(ids_ptr + offs_ids, mask=s < S, other=0).to(tl.int64)
            e = encoding(table_ptr, positions, col0, mask, step, P, stride_table_p, BLOCK_C)
        x = tl.load(x_ptr + b * stride_x_b + offs_x, mask=mask, other=0.0).to(tl.float32)
        y = scale * x + e
        if seed_ptr is not None:
            y = row_dropout(y, seed_ptr, b * S + s, col0, threshold, rescale)
        tl.store(y_ptr + b * S * C + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def add_positional_encoding_bwd_kernel(
    dy_ptr, dx_ptr, sums_ptr, seed_ptr, stride_dy_b, stride_dy_s, stride_dy_c, B, S, C, batch_step, scale,
    threshold, rescale, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = scale * dropout(dy), and sums[chunk, s] = dropout(dy) summed over the chunk's b; either may be absent."""
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_s = tl.cdiv(S, BLOCK_S)
    col0 = pid % tiles_c * BLOCK_C
    s = (pid // tiles_c % tiles_s).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    chunk = (pid // tiles_c // tiles_s).to(tl.int64)
    cols = col0 + tl.arange(0, BLOCK_C)
    mask = (s[:, None] < S) & (cols[None, :] < C)
    offs_dy = s[:, None] * stride_dy_s + cols.to(tl.int64)[None, :] * stride_dy_c
    offs = s[:, None] * C + cols[None, :]
    scale = tl.cast(scale, tl.float32)

    acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for b in tl.range(chunk * batch_step, tl.minimum((chunk + 1) * batch_step, B), num_stages=2):
        dy = tl.load(dy_ptr + b * stride_dy_b + offs_dy, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            dy = row_dropout(dy, seed_ptr, b * S + s, col0, threshold, rescale)
        if dx_ptr is not None:
            tl.store(dx_ptr + b * S * C + offs, (scale * dy).to(dx_ptr.dtype.element_ty), mask=mask)
        acc += dy
    if sums_ptr is not None:
        tl.store(sums_ptr + chunk * S * C + offs, acc.to(sums_ptr.dtype.element_ty), mask=mask)


@triton.jit
def embedded(
    token_ptr, type_ptr, position_ptr, ids_ptr, type_ids_ptr, position_ids_ptr, b, s, mask_m, cols, mask_c, S,
    V, T, P, stride_token_v, stride_type_t, stride_position_p, stride_type_ids_b, stride_type_ids_s,
    stride_position_ids_b, stride_position_ids_s,
):  # fmt: skip
    """x = token[id] + type[t] + position[p] (rows, BLOCK_C) fp32 at b and s, of which either is (rows,), the other () int64."""
    mask = mask_m[:, None] & mask_c[None, :]
    ids = clamped(tl.load(ids_ptr + b * S + s, mask=mask_m, other=0), V)
    x = tl.load(token_ptr + ids[:, None] * stride_token_v + cols[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    if type_ptr is not None:
        if type_ids_ptr is None:
            t = tl.zeros_like(ids)
        else:
            offs = b * stride_type_ids_b + s * stride_type_ids_s
            t = clamped(tl.load(type_ids_ptr + offs, mask=mask_m, other=0), T)
        x += tl.load(type_ptr + t[:, None] * stride_type_t + cols[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    if position_ptr is not None:
        if position_ids_ptr is None:
            p = tl.zeros_like(ids) + s
        else:
            offs = b * stride_position_ids_b + s * stride_position_ids_s
            p = tl.load(position_ids_ptr + offs, mask=mask_m, other=0)
        offs = clamped(p, P)[:, None] * stride_position_p + cols[None, :]
        x += tl.load(position_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["threshold"])
def embeddings_fwd_kernel(
    ids_ptr, type_ids_ptr, position_ids_ptr, token_ptr, type_ptr, position_ptr, w_ptr, b_ptr, y_ptr, mean_ptr,
    rstd_ptr, seed_ptr, stride_token_v, stride_type_t, stride_position_p, stride_type_ids_b,
    stride_type_ids_s, stride_position_ids_b, stride_position_ids_s, S, C, V, T, P, eps, threshold, rescale,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(C, BLOCK_C)  # 1 with the norm
    tiles_s = tl.cdiv(S, BLOCK_S)
    col0 = pid % tiles_c * BLOCK_C
    s = (pid // tiles_c % tiles_s).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    b = (pid // tiles_c // tiles_s).to(tl.int64)
    cols = col0 + tl.arange(0, BLOCK_C)
    mask = (s[:, None] < S) & (cols[None, :] < C)
    rows = b * S + s

    x = embedded(
        token_ptr, type_ptr, position_ptr, ids_ptr, type_ids_ptr, position_ids_ptr, b, s, s < S, cols, cols < C, S, V, T, P,
        stride_token_v, stride_type_t, stride_position_p,
        stride_type_ids_b, stride_type_ids_s, stride_position_ids_b, stride_position_ids_s,
    )  # fmt: skip
    if w_ptr is not None:
        mean = tl.sum(x, 1) / C
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + tl.cast(eps, tl.float32))
        tl.store(mean_ptr + rows, mean, mask=s < S)
        tl.store(rstd_ptr + rows, rstd, mask=s < S)
        x = centred * rstd[:, None] * tl.load(w_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
        if b_ptr is not None:
            x += tl.load(b_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        x = row_dropout(x, seed_ptr, rows, col0, threshold, rescale)

    tl.store(y_ptr + rows[:, None] * C + cols[None, :], x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def embeddings_bwd_kernel(
    dy_ptr, ids_ptr, type_ids_ptr, position_ids_ptr, token_ptr, type_ptr, position_ptr, w_ptr, mean_ptr,
    rstd_ptr, dx_ptr, sums_ptr, norm_sums_ptr, seed_ptr, stride_dy_b, stride_dy_s, stride_dy_c,
    stride_token_v, stride_type_t, stride_position_p, stride_type_ids_b, stride_type_ids_s,
    stride_position_ids_b, stride_position_ids_s, B, S, C, V, T, P, groups, seq_step, batch_step, threshold,
    rescale, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx through the norm; sums[chunk, s] = dx summed over the chunk's b; norm_sums[program] = its (dw, db)."""
    pid = tl.program_id(0)
    s_first = (pid % groups).to(tl.int64) * seq_step
    chunk = (pid // groups).to(tl.int64)
    b_first = chunk * batch_step
    b_end = tl.minimum(b_first + batch_step, B)
    cols = tl.arange(0, BLOCK_C)
    mask_c = cols < C
    w = tl.load(w_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)[None, :]

    dw = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for s in range(s_first, tl.minimum(s_first + seq_step, S)):
        acc = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for b0 in range(b_first, b_end, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
            rows = b * S + s
            mask = (b < b_end)[:, None] & mask_c[None, :]
            # First what needs no id: it is on its way while the ids arrive.
            offs_dy = b[:, None] * stride_dy_b + s * stride_dy_s + cols.to(tl.int64)[None, :] * stride_dy_c
            dy = tl.load(dy_ptr + offs_dy, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + rows, mask=b < b_end, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=b < b_end, other=0.0)
            x = embedded(
                token_ptr, type_ptr, position_ptr, ids_ptr, type_ids_ptr, position_ids_ptr, b, s, b < b_end, cols, mask_c,
                S, V, T, P, stride_token_v, stride_type_t, stride_position_p,
                stride_type_ids_b, stride_type_ids_s, stride_position_ids_b, stride_position_ids_s,
            )  # fmt: skip

            if seed_ptr is not None:
                dy = row_dropout(dy, seed_ptr, rows, 0, threshold, rescale)
            xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            g = dy * w
            mean_g = tl.sum(g, 1) / C
            mean_gx = tl.sum(g * xhat, 1) / C
            dx = tl.where(mask, (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None], 0.0)
            dw += dy * xhat
            db += dy
            acc += dx

            if dx_ptr is not None:
                offs = rows[:, None] * C + cols[None, :]
                tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            total = tl.sum(acc, 0).to(sums_ptr.dtype.element_ty)
            tl.store(sums_ptr + chunk * S * C + s * C + cols, total, mask=mask_c)

    offs = pid.to(tl.int64) * 2 * C + cols
    tl.store(norm_sums_ptr + offs, tl.sum(dw, 0), mask=mask_c)
    tl.store(norm_sums_ptr + offs + C, tl.sum(db, 0), mask=mask_c)


@triton.jit
def sum_partials_kernel(
    partials_ptr, out_ptr, stride_partials_g, G, R, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr
):
    """out[r] = the sum of partials[g, r] over g, in one order."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)

    acc = tl.zeros((BLOCK_G, BLOCK_R), tl.float32)
    for g0 in range(0, G, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        mask = (g[:, None] < G) & (offs_r[None, :] < R)
        acc += tl.load(
            partials_ptr + g.to(tl.int64)[:, None] * stride_partials_g + offs_r[None, :], mask=mask, other=0.0
        )

    tl.store(out_ptr + offs_r, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=offs_r < R)


@triton.jit(do_not_specialize=["skip", "threshold"])
def segment_sum_kernel(
    dx_ptr, sorted_ptr, order_ptr, out_ptr, partials_ptr, seed_ptr, stride_dx_m, stride_dx_c, M, C, V, skip,
    threshold, rescale, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[v] = the sum of dx over the rows whose id is v, for the runs inside this chunk of the sorted rows.

    The sum of a run that began in an earlier chunk goes to partials[chunk, 0], of one that goes on in the next to
    partials[chunk, 1]; segment_join_kernel adds those. Rows of id `skip` are left alone.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    chunk = (tl.program_id(0) // tiles_c).to(tl.int64)
    col0 = tl.program_id(0) % tiles_c * BLOCK_C
    cols = (col0 + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    mask = cols < C
    j_first = chunk * CHUNK
    before = tl.load(sorted_ptr + j_first - 1, mask=j_first > 0, other=-1)
    before = tl.where(j_first > 0, clamped(before, V), -1)
    j_end = tl.minimum(j_first + CHUNK, M)

    acc = tl.zeros((1, BLOCK_C), tl.float32)
    for j in tl.range(j_first, j_end, num_stages=3):
        v = clamped(tl.load(sorted_ptr + j), V)
        after = tl.load(sorted_ptr + j + 1, mask=j + 1 < M, other=-1)
        after = tl.where(j + 1 < M, clamped(after, V), -1)
        m = tl.load(order_ptr + j)
        dx = tl.load(dx_ptr + m * stride_dx_m + cols * stride_dx_c, mask=mask & (v != skip), other=0.0)
        dx = dx.to(tl.float32)
        if seed_ptr is not None:
            dx = row_dropout(dx, seed_ptr, m + tl.zeros((1,), tl.int64), col0, threshold, rescale)
        acc += dx

        if ((after != v) | (j + 1 == j_end)) & (v != skip):
            if v == before:
                tl.store(partials_ptr + chunk * 2 * C + cols, acc, mask=mask)
            elif after == v:
                tl.store(partials_ptr + chunk * 2 * C + C + cols, acc, mask=mask)
            else:
                tl.store(out_ptr + v * C + cols, acc.to(out_ptr.dtype.element_ty), mask=mask)
        acc = tl.where(after != v, 0.0, acc)


@triton.jit(do_not_specialize=["skip"])
def segment_join_kernel(
    sorted_ptr, partials_ptr, out_ptr, M, C, V, skip, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[v] for the run of v that begins in this chunk and goes on: its end here plus the beginnings that continue it."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    chunk = (tl.program_id(0) // tiles_c).to(tl.int64)
    cols = (tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask = cols < C
    next_first = (chunk + 1) * CHUNK
    v = clamped(tl.load(sorted_ptr + next_first - 1), V)  # the grid has no program for the last chunk
    goes_on = clamped(tl.load(sorted_ptr + next_first), V) == v
    before = tl.load(sorted_ptr + next_first - CHUNK - 1, mask=chunk > 0, other=-1)
    before = tl.where(chunk > 0, clamped(before, V), -1)

    if goes_on & (before != v) & (v != skip):
        acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        following = chunk + 1
        found = tl.full((), BLOCK_N, tl.int32)
        while found == BLOCK_N:
            n = following + tl.arange(0, BLOCK_N)
            ids = tl.load(sorted_ptr + n * CHUNK, mask=n * CHUNK < M, other=-1)
            same = (n * CHUNK < M) & (clamped(ids, V) == v)
            acc += tl.load(
                partials_ptr + n[:, None] * 2 * C + cols[None, :],
                mask=same[:, None] & mask[None, :],
                other=0.0,
            )
            found = tl.sum(same.to(tl.int32), 0)
            following += BLOCK_N
        total = tl.load(partials_ptr + chunk * 2 * C + C + cols, mask=mask, other=0.0) + tl.sum(acc, 0)
        tl.store(out_ptr + v * C + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


def add_positional_encoding_fwd(x, table, position_ids, seed, offset, scale, dropout_p, config=None):
    """y of x (..., S, C), table (P, C) or None, position_ids broadcastable to (..., S) or None, seed (2,) int64 or None."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    B, S, C = _batched(x).shape
    ids = _batched_ids(position_ids, x.shape[:-1])
    table = _unit_stride(table)
    tile, programs = _tile(ADD, C, config, BLOCK_S=S)
    tiles = triton.cdiv(S, tile["BLOCK_S"]) * triton.cdiv(C, tile["BLOCK_C"])
    batch_step = min(max(B * tiles // programs, 1), 16)  # b that share one encoding
    step = round(2 * math.log2(10000) / C * 2**56)
    with torch.cuda.device_of(x):
        add_positional_encoding_fwd_kernel[(tiles * triton.cdiv(B, batch_step),)](
            _batched(x), table, ids, y, seed, *_batched(x).stride(), _stride(table), _stride(ids), _stride(ids, 1),
            B, S, C, _rows(table), batch_step, offset, step, scale, *row_dropout_scalars(dropout_p),
            PER_BATCH=not _shared(ids), **tile,
        )  # fmt: skip
    return y


def add_positional_encoding_bwd(
    dy, table, position_ids, seed, offset, scale, dropout_p, x_grad, table_grad, config=None
):
    """(dx, dtable) for dy (..., S, C) and what forward took; an unwanted one is empty."""
    dx = torch.empty(dy.shape if x_grad else 0, dtype=dy.dtype, device=dy.device)
    if dy.numel() == 0:
        return dx, _zeros(table) if table_grad else dx.new_empty(0)
    ids = _batched_ids(position_ids, dy.shape[:-1])
    with torch.cuda.device_of(dy):
        wanted = dx if x_grad else None
        summed = table if table_grad else None
        dtable = _batch_sums(dy, wanted, summed, ids, seed, offset, scale, dropout_p, config)
    return dx, dx.new_empty(0) if dtable is None else dtable


def embeddings_fwd(
    input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias, seed, eps, dropout_p
):  # fmt: skip
    """(y (..., S, C), mean (M,), rstd (M,)) for ids (..., S) and tables (V, C), (T, C), (P, C); no norm, no statistics."""
    M, C = input_ids.numel(), token_table.shape[1]
    y = torch.empty(*input_ids.shape, C, dtype=token_table.dtype, device=token_table.device)
    mean, rstd = (
        torch.empty(0 if norm_weight is None else M, dtype=torch.float32, device=y.device) for _ in range(2)
    )
    if y.numel() == 0:
        return y, mean, rstd
    S = input_ids.shape[-1]
    ids, tables, strides, sizes = _lookups(
        input_ids, type_ids, position_ids, token_table, type_table, position_table
    )
    tile, _ = _tile(ADD if norm_weight is None else NORM, C, None, BLOCK_S=S)
    grid = (M // S * triton.cdiv(S, tile["BLOCK_S"]) * triton.cdiv(C, tile["BLOCK_C"]),)
    with torch.cuda.device_of(y):
        embeddings_fwd_kernel[grid](
            *ids, *tables, _unit_stride(norm_weight), _unit_stride(norm_bias), y, mean, rstd, seed,
            *strides, S, C, *sizes, eps, *row_dropout_scalars(dropout_p), **tile,
        )  # fmt: skip
    return y, mean, rstd


def embeddings_bwd(
    dy, input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias,
    mean, rstd, seed, padding_idx, dropout_p, token_grad, type_grad, position_grad, norm_grad, config=None,
):  # fmt: skip
    """(dtoken, dtype, dposition, dweight, dbias) for dy (..., S, C) and what forward took; an unwanted one is empty.

    Rows of padding_idx (-1: none) get nothing in dtoken.
    """
    wanted = (token_grad, type_grad, position_grad, norm_grad, norm_grad and norm_bias is not None)
    targets = (token_table, type_table, position_table, norm_weight, norm_bias)
    if dy.numel() == 0:
        return tuple(_zeros(t) if w else dy.new_empty(0) for t, w in zip(targets, wanted, strict=True))
    dtoken, dtype, dposition, dweight, dbias = (dy.new_empty(0) for _ in targets)
    B, S, C = _batched(dy).shape
    row_positions = _batched_ids(position_ids, input_ids.shape)
    with torch.cuda.device_of(dy):
        dx, dx_seed = dy, seed  # without the norm the tables' rows take dropout(dy) itself
        if norm_weight is None and position_grad:
            dposition = _batch_sums(dy, None, position_table, row_positions, seed, 0, 1.0, dropout_p)
        if norm_weight is not None:
            dx_seed = None
            ids, tables, strides, sizes = _lookups(
                input_ids, type_ids, position_ids, token_table, type_table, position_table
            )
            tile, programs = _tile(NORM_BACKWARD, C, config, BLOCK_B=B)
            seq_step = triton.cdiv(S, programs)
            groups = triton.cdiv(S, seq_step)
            summed = position_table if position_grad and _shared(row_positions) else None
            # A chunk's sums are S * C fp32: at B / 8 chunks a tenth of what the rows themselves are.
            chunks, batch_step = _chunks(B, min(programs // groups, B if summed is None else B // 8))
            dposition, sums = _position_sums(summed, row_positions, 0, chunks, S)
            rows_wanted = token_grad or type_grad or (position_grad and sums is None)
            dx = torch.empty(B, S, C, dtype=token_table.dtype, device=dy.device) if rows_wanted else None
            norm_sums = torch.empty(chunks * groups, 2, C, dtype=torch.float32, device=dy.device)
            embeddings_bwd_kernel[(chunks * groups,)](
                _batched(dy), *ids, *tables, _unit_stride(norm_weight), mean, rstd, dx, sums, norm_sums, seed,
                *_batched(dy).stride(), *strides, B, S, C, *sizes, groups, seq_step, batch_step,
                *row_dropout_scalars(dropout_p), **tile,
            )  # fmt: skip
            if norm_grad:
                dweight = _add_up(norm_sums.select(1, 0), torch.empty_like(norm_weight))
                dbias = (
                    dbias
                    if norm_bias is None
                    else _add_up(norm_sums.select(1, 1), torch.empty_like(norm_bias))
                )
            if sums is not None:
                _finish_positions(dposition, sums, row_positions, 0)
            elif position_grad:
                dposition = _segment_sums(_zeros(position_table), dx, row_positions)
        if token_grad:
            dtoken = _segment_sums(_zeros(token_table), dx, input_ids, dx_seed, dropout_p, padding_idx)
        if type_grad and type_ids is None:  # every row is of type 0: one position, B * S times
            dtype = _batch_sums(dx.reshape(-1, 1, C), None, type_table, None, dx_seed, 0, 1.0, dropout_p)
        elif type_grad:
            row_types = type_ids.expand(input_ids.shape)
            dtype = _segment_sums(_zeros(type_table), dx, row_types, dx_seed, dropout_p)
    return dtoken, dtype, dy.new_empty(0) if dposition is None else dposition, dweight, dbias


def _batch_sums(dy, dx, table, ids, seed, offset, scale, dropout_p, config=None):
    """Fill dx = scale * dropout(dy), if there is one, and return the gradient of the table that was added, if any."""
    B, S, C = _batched(dy).shape
    tile, programs = _tile(ADD_BACKWARD, C, config, BLOCK_S=S)
    tiles = triton.cdiv(S, tile["BLOCK_S"]) * triton.cdiv(C, tile["BLOCK_C"])
    shared = table is not None and _shared(ids)
    chunks, batch_step = _chunks(B, min(programs // tiles, B // 32 if shared else B))
    dtable, sums = _position_sums(table if shared else None, ids, offset, chunks, S)
    if dx is not None or shared:
        add_positional_encoding_bwd_kernel[(tiles * chunks,)](
            _batched(dy), dx, sums, seed, *_batched(dy).stride(), B, S, C, batch_step,
            scale, *row_dropout_scalars(dropout_p), **tile,
        )  # fmt: skip
    if shared:
        _finish_positions(dtable, sums, ids, offset)
    elif table is not None:
        dtable = _segment_sums(_zeros(table), dy, ids, seed, dropout_p)
    return dtable


def _position_sums(table, ids, offset, chunks, S):
    """The gradient of a table whose row at s is one for every b, and where a kernel leaves its sums (chunks, S, C).

    That is in the gradient itself if nothing is to be added or sorted afterwards. Rows that no position points to are
    zeroed by torch.zeros: a memset at full bandwidth, where a kernel would have to search the ids for the gaps.
    """
    if table is None:
        return None, None
    P, C = table.shape
    whole = ids is None and S == P
    dtable = torch.empty(P, C, dtype=table.dtype, device=table.device) if whole else _zeros(table)
    if ids is None and chunks == 1:
        return dtable, dtable.narrow(0, offset, S).unsqueeze(0)
    return dtable, torch.empty(chunks, S, C, dtype=torch.float32, device=table.device)


def _finish_positions(dtable, sums, ids, offset):
    """Bring the sums of _position_sums into dtable where they are not there yet."""
    chunks, S = sums.shape[:2]
    if ids is not None:
        first = sums.select(0, 0)
        rows = first if chunks == 1 else _add_up(sums.flatten(1), torch.empty_like(first))
        _segment_sums(dtable, rows, ids.select(0, 0))
    elif chunks > 1:
        _add_up(sums.flatten(1), dtable.narrow(0, offset, S))


def _add_up(partials, out):
    """out (R numbers) = the sum of partials (G, R) fp32 over G."""
    G, R = partials.shape
    tile, _ = _tile(PARTIALS, G)
    sum_partials_kernel[(triton.cdiv(R, tile["BLOCK_R"]),)](partials, out, partials.stride(0), G, R, **tile)
    return out


def _segment_sums(dtable, dx, ids, seed=None, dropout_p=0.0, skip=-1):
    """Add the rows of dx (..., C), dropped out if there is a seed, into those of dtable (zeros) that ids (...) name."""
    dx = dx.reshape(-1, dx.shape[-1])  # a view unless dims were permuted
    M, C = dx.shape
    # 32-bit keys halve the passes of the radix sort; stable, so that equal ids keep the order of their rows.
    keys, order = torch.sort(ids.reshape(-1).to(torch.int32), stable=True)
    chunks = triton.cdiv(M, CHUNK)
    partials = torch.empty(chunks, 2, C, dtype=torch.float32, device=dx.device)
    tile, _ = _tile(SEGMENTS, C)
    tiles = triton.cdiv(C, tile["BLOCK_C"])
    segment_sum_kernel[(chunks * tiles,)](
        dx, keys, order, dtable, partials, seed, *dx.stride(), M, C, dtable.shape[0], skip,
        *row_dropout_scalars(dropout_p), CHUNK=CHUNK, **tile,
    )  # fmt: skip
    if chunks > 1:
        tile["num_warps"] = 4  # 16 partial sums at once
        segment_join_kernel[((chunks - 1) * tiles,)](
            keys, partials, dtable, M, C, dtable.shape[0], skip, CHUNK=CHUNK, BLOCK_N=16, **tile
        )
    return dtable


def _lookups(input_ids, type_ids, position_ids, token_table, type_table, position_table):
    """What both embedding kernels take: ids, tables, their strides, and the tables' rows."""
    types, positions = (_batched_ids(t, input_ids.shape) for t in (type_ids, position_ids))
    tables = tuple(_unit_stride(t) for t in (token_table, type_table, position_table))
    strides = (*map(_stride, tables), *(_stride(t, dim) for t in (types, positions) for dim in (0, 1)))
    ids = input_ids.reshape(
        -1
    ).contiguous()  # a column of (B, S), S = 1, reshapes to a view that skips along memory
    return (ids, types, positions), tables, strides, tuple(map(_rows, tables))


def _tile(rows, width, config=None, **sizes):
    """(tile, PROGRAMS): `config`, else the first of rows whose limit holds width; a block over a dim of size 1 is 1."""
    tile = dict(config or next(tile for limit, tile in rows if limit >= width))
    tile.update({block: 1 for block, size in sizes.items() if size == 1})
    return tile, tile.pop("PROGRAMS", None)


def _chunks(B, wanted):
    """(chunks, batch_step): B in about `wanted` equal chunks."""
    batch_step = triton.cdiv(B, max(wanted, 1))
    return triton.cdiv(B, batch_step), batch_step


def _batched(x):
    return x.reshape(-1, *x.shape[-2:])  # a view unless the leading dims have no common stride


def _batched_ids(ids, lead):
    return None if ids is None else ids.expand(lead).reshape(-1, lead[-1])


def _shared(ids):
    """Whether every b has the same positions."""
    return ids is None or ids.shape[0] == 1 or ids.stride(0) == 0


def _unit_stride(t):
    # A transposed table is rare: one copy.
    return t if t is None or t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def _zeros(t):
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device)


def _stride(t, dim=0):
    return 0 if t is None else t.stride(dim)


def _rows(t):
    return 0 if t is None else t.shape[0]
