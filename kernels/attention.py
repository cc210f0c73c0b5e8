"""Attention forward and backward without ever storing the S_q x S_k matrix.

    s = softcap(scale * q k^T) + bias - slope * |distance|,  -inf where a pair is excluded;  distance = i + shift - j
    p = exp(s - lse),  lse = log(sum_j exp(s_ij) + exp(sink));  o = dropout(p) v
    delta = rowsum(do * o) - dlse;  dp = dropout(do v^T);  ds = p * (dp - delta)
    dv = dropout(p)^T do;  dq = scale * ds k;  dk = scale * ds^T q;  dbias = ds;  dsink = -sum_i exp(sink - lse_i) delta_i

Forward: a program owns BLOCK_M queries of one head and walks over the keys with an online softmax: when the running
maximum m grows, the sum l and the accumulator shrink by exp(m_old - m_new), so that acc / l is exact at the end. Backward:
p comes back from lse. One kernel owns keys and walks over queries (and over the query heads of its key head) for dk and
dv, another owns queries and walks over keys for dq: 7 products for 5, but a fixed order and no atomics. The middle of a
walk is clean, tiles wholly inside the sequences and the causal or window band that check nothing; its ends are masked.

m, l, lse and every accumulator are fp32; p and ds are rounded to the inputs' dtype for their second product. Logits of
16-bit inputs are in units of log2 (exp2 is the hardware's, and the scale folds into it), those of fp32 in natural ones,
where s - lse is exact. q, k, v are read, o and lse written and saved; bias and mask are read un-expanded.
Online softmax: Milakov and Gimelshein, arXiv 1805.02867; the backward: Dao et al., arXiv 2205.14135.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_host import bias_gradient, bias_gradient_of, sinks_gradient_of

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
FLOAT_MAX = tl.constexpr(torch.finfo(torch.float32).max)

# Tiles (largest head dim, row) by kernel and kind of call. "plain" and "rich": 16-bit inputs on sm_90 and sm_100 (227 KB of
# shared memory), without and with bias, mask, dropout, softcap or slopes, which take registers; "small": 16-bit inputs on any
# other GPU, AMD's included, within 64 KB; "fp32": the ordinary units multiply, everywhere. The largest that do not spill on
# sm_90 under triton 3.6 and 3.7, by ahead-of-time compilation; not yet measured.
# fmt: off
TILES = {
    ("fwd", "plain"): [
        (64, dict(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=3)),
        (128, dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)),
        (256, dict(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2)),
    ],
    ("fwd", "rich"): [
        (64, dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2)),
    ],
    ("fwd", "small"): [
        (64, dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=1)),
        (256, dict(BLOCK_M=64, BLOCK_N=16, num_warps=8, num_stages=1)),
    ],
    ("fwd", "fp32"): [
        (64, dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)),
        (128, dict(BLOCK_M=32, BLOCK_N=16, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)),
    ],
    ("dkdv", "plain"): [
        (64, dict(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=2)),
    ],
    ("dkdv", "rich"): [
        (64, dict(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=16, BLOCK_N=128, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=2)),
    ],
    ("dkdv", "small"): [
        (64, dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2)),
        (128, dict(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2)),
        (256, dict(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=1)),
    ],
    ("dkdv", "fp32"): [
        (64, dict(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=2)),
        (128, dict(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=1)),
    ],
    ("dq", "plain"): [
        (64, dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2)),
    ],
    ("dq", "rich"): [
        (64, dict(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2)),
    ],
    ("dq", "small"): [
        (64, dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=1)),
        (256, dict(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1)),
    ],
    ("dq", "fp32"): [
        (64, dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2)),
        (128, dict(BLOCK_M=32, BLOCK_N=16, num_warps=8, num_stages=2)),
        (256, dict(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=1)),
    ],
}
# fmt: on


DELTA_ROWS = 32  # a streaming kernel: 32 rows of up to 256 fill 4 warps


class Rows(NamedTuple):
    """A (B, H, rows, width) tensor of stride-1 width; stride_b is 0 for packed sequences."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any


class Stats(NamedTuple):
    """A (B, H, rows) fp32 tensor of stride-1 rows."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Plane(NamedTuple):
    """A (B, H, S_q, S_k) tensor, stride 0 where it is broadcast; by_row, by_key: whether queries and keys differ in it."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any
    by_row: Any
    by_key: Any


class Rules(NamedTuple):
    """All that happens between q.k and the product with v. None switches a feature off at compile time.

    Logits are kept times `unit`, log2(e) or 1, and exp(logit) = exp2(kept * rest). scale multiplies q.k and gives such a
    logit, or the argument of tanh where cap (softcap times unit) is given.
    left, right: how far a key may lie before and after its query's aligned position.
    """

    unit: Any
    rest: Any
    scale: Any
    cap: Any
    bias: Any
    mask: Any
    slopes: Any
    left: Any
    right: Any
    q_lens: Any
    kv_lens: Any
    cu_q: Any
    cu_k: Any
    seed: Any
    threshold: Any
    rescale: Any
    H: Any
    group: Any
    S_q: Any
    S_k: Any


class Place(NamedTuple):
    """What the rules say of one (batch b, head h): rows and keys it owns in the outputs, where its sequences start, how
    much of them counts, alignment, ALiBi slope, its planes of bias and mask."""

    b: Any
    h: Any
    rows: Any
    keys: Any
    start_q: Any
    start_k: Any
    q_len: Any
    kv_len: Any
    shift: Any
    slope: Any
    bias_ptr: Any
    mask_ptr: Any


@triton.jit
def sequence(lens_ptr, cu_ptr, b, size):
    """First row, rows owned and rows that count of sequence b in a dim of `size`; wrong values never point outside.

    Padded sequences own their padding, which the outputs fill; packed ones do not own their neighbours.
    """
    start, owned = 0, size
    if cu_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), size)
        owned = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), start), size) - start
    length = owned
    if lens_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lens_ptr + b), 0), size)
    return start, owned, length


@triton.jit
def place(rules, bh, BOTTOM_RIGHT: tl.constexpr):
    b, h = tl.cast(bh // rules.H, tl.int64), tl.cast(bh % rules.H, tl.int64)
    start_q, rows, q_len = sequence(rules.q_lens, rules.cu_q, b, rules.S_q)
    start_k, keys, kv_len = sequence(rules.kv_lens, rules.cu_k, b, rules.S_k)
    shift = 0
    if BOTTOM_RIGHT:
        shift = kv_len - q_len
    slope = 0.0
    if rules.slopes is not None:
        slope = tl.load(rules.slopes.ptr + b * rules.slopes.stride_b + h * rules.slopes.stride_h) * rules.unit
    bias_ptr, mask_ptr = 0, 0
    if rules.bias is not None:
        bias_ptr = rules.bias.ptr + b * rules.bias.stride_b + h * rules.bias.stride_h
    if rules.mask is not None:
        mask_ptr = rules.mask.ptr + b * rules.mask.stride_b + h * rules.mask.stride_h
    return b, h, Place(b, h, rows, keys, start_q, start_k, q_len, kv_len, shift, slope, bias_ptr, mask_ptr)


@triton.jit
def span(first, last, owned, length, shift, back, ahead, BLOCK: tl.constexpr):
    """Bounds of a walk over positions x < length for the owned positions t in [first, last): masked, clean, masked tiles.

    A pair needs t + shift - back <= x <= t + shift + ahead (None: open). Of the four bounds, the second and third enclose
    the tiles in which every pair is allowed. A range that reaches past `owned` has none.
    """
    lo, clean_lo = 0, 0
    hi = tl.where(first < owned, length, 0)
    clean_hi = tl.where(last <= owned, length // BLOCK * BLOCK, 0)
    last = tl.minimum(last, owned)
    if ahead is not None:
        hi = tl.minimum(hi, tl.maximum(last + shift + ahead, 0))
        clean_hi = tl.minimum(clean_hi, tl.maximum(first + shift + ahead + 1, 0) // BLOCK * BLOCK)
    if back is not None:
        lo = tl.maximum(first + shift - back, 0) // BLOCK * BLOCK
        clean_lo = tl.minimum(tl.cdiv(tl.maximum(last - 1 + shift - back, 0), BLOCK) * BLOCK, hi)
    return lo, clean_lo, tl.maximum(clean_lo, clean_hi), hi


@triton.jit
def tile(
    ptr, stride, m0, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, MASKED: tl.constexpr
):
    """Rows m0 .. m0 + ROWS of a (rows, WIDTH) matrix; zeros past WIDTH and, where MASKED, from row `end` on."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_W)[None, :]
    ptrs = ptr + tl.cast(m0, tl.int64) * stride + (rows.to(tl.int64) * stride + columns)
    if MASKED:
        x = tl.load(ptrs, mask=(m0 + rows < end) & (columns < WIDTH), other=0.0)
    elif WIDTH < BLOCK_W:
        x = tl.load(ptrs, mask=columns < WIDTH, other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def store_tile(ptr, stride, m0, end, x, WIDTH: tl.constexpr):
    rows = tl.arange(0, x.shape[0])[:, None]
    columns = tl.arange(0, x.shape[1])[None, :]
    ptrs = ptr + tl.cast(m0, tl.int64) * stride + (rows.to(tl.int64) * stride + columns)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(m0 + rows < end) & (columns < WIDTH))


@triton.jit
def head(rows, b, h, start):
    """Pointer to row `start` of one head."""
    return rows.ptr + b * rows.stride_b + h * rows.stride_h + tl.cast(start, tl.int64) * rows.stride_m


@triton.jit
def stats_head(stats, b, h, start):
    return stats.ptr + b * stats.stride_b + h * stats.stride_h + start


@triton.jit
def load_lse(ptr, m, q_len, rules):
    """lse in the logits' unit; +inf where nothing is attended or no row is, which makes exp(s - lse) zero."""
    lse = tl.load(ptr + m, mask=m < q_len, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), tl.maximum(lse * rules.unit, -FLOAT_MAX))


@triton.jit
def plane_tile(ptr, plane, m, n, at, MASKED: tl.constexpr):
    """A bias's or mask's values at rows m and keys n, read once where they are broadcast; 0 outside where MASKED."""
    if plane.by_row and plane.by_key:
        ptrs = ptr + (m.to(tl.int64) * plane.stride_m + n.to(tl.int64) * plane.stride_n)
        inside = (m < at.q_len) & (n < at.kv_len)
    elif plane.by_row:
        ptrs, inside = ptr + m.to(tl.int64) * plane.stride_m, m < at.q_len
    elif plane.by_key:
        ptrs, inside = ptr + n.to(tl.int64) * plane.stride_n, n < at.kv_len
    else:
        ptrs, inside = ptr, True
    return tl.load(ptrs, mask=inside, other=0) if MASKED else tl.load(ptrs)


@triton.jit
def store_plane(plane, b, h, m0, n0, rules, x):
    m = (m0 + tl.arange(0, x.shape[0]))[:, None]
    n = (n0 + tl.arange(0, x.shape[1]))[None, :]
    ptr = plane.ptr + tl.cast(b, tl.int64) * plane.stride_b + tl.cast(h, tl.int64) * plane.stride_h
    ptrs = ptr + (m.to(tl.int64) * plane.stride_m + n.to(tl.int64) * plane.stride_n)
    tl.store(ptrs, x.to(plane.ptr.dtype.element_ty), mask=(m < rules.S_q) & (n < rules.S_k))


@triton.jit
def tanh(x):
    """libdevice's is not for every backend. Near 0, where 1 - e^-2x would cancel, an odd polynomial (3 ulp at most)."""
    z = x * x
    small = x + x * z * (-0.3333331 + z * (0.13330476 + z * (-0.053387105 + z * 0.01798873)))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def logits(s, m, n, scale, rules, at, MASKED: tl.constexpr):
    """Logits, times rules.unit, of s = q.k at rows m and keys n, -inf where excluded; and d logit / d (scaled s).

    m is (M, 1) and n (1, N), or (1, M) and (N, 1) for a transposed tile. Only MASKED tiles may reach outside the
    sequences or the band.
    """
    s = s * scale
    slope = 1.0
    if rules.cap is not None:
        t = tanh(s)
        slope = 1.0 - t * t
        s = t * rules.cap
    if rules.bias is not None:
        bias = plane_tile(at.bias_ptr, rules.bias, m, n, at, MASKED).to(tl.float32)
        # Only a true -inf excludes: finfo.min * log2(e) must not overflow into one.
        s += tl.where(bias == float("-inf"), bias, tl.maximum(bias * rules.unit, -FLOAT_MAX))
    distance = m + at.shift - n
    if rules.slopes is not None:
        s -= at.slope * tl.abs(distance).to(tl.float32)
    if rules.mask is not None:
        s = tl.where(plane_tile(at.mask_ptr, rules.mask, m, n, at, MASKED) != 0, s, float("-inf"))
    if MASKED:
        keep = (m < at.q_len) & (n < at.kv_len)
        if rules.left is not None:
            keep = keep & (distance <= rules.left)
        if rules.right is not None:
            keep = keep & (distance >= -rules.right)
        s = tl.where(keep, s, float("-inf"))
    return s, slope


@triton.jit
def kept(rules, at, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout's (BLOCK_M, BLOCK_N) keep mask from row m0 and key n0 (multiples of 16): 8 bits of Philox4x32-7 an element.

    One call serves rows {r, r+1, r+8, r+9} x keys {c, c+1, c+8, c+9} of a 16 x 16 square: word 2*(row & 1) + (key & 1),
    byte 2*(row bit 3) + (key bit 3). The words are computed on the grid of groups and unfolded by reshapes.
    """
    seed, offset = tl.load(rules.seed), tl.load(rules.seed + 1)
    # Every counter word is 32 bits wide: a single 64-bit one switches tl.philox to Philox4x64.
    zero = tl.zeros((BLOCK_M // 4, BLOCK_N // 4), tl.uint32)
    row_group = zero + (m0 // 4 + tl.arange(0, BLOCK_M // 4)).to(tl.uint32)[:, None]
    key_group = zero + (n0 // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    bh = zero + (at.b * rules.H + at.h).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, bh, row_group, key_group, zero + offset.to(tl.uint32), n_rounds=7)

    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # (.., key bit 0, row bit 0)
    halves = tl.join(words, words >> 8)  # (.., key bit 3)
    draw = tl.join(halves, halves >> 16) & 0xFF  # (.., row bit 3)
    keep = draw.to(tl.int32) >= rules.threshold
    keep = tl.reshape(keep, (BLOCK_M // 16, 4, BLOCK_N // 16, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(keep, (0, 7, 1, 5, 2, 6, 3, 4)), (BLOCK_M, BLOCK_N))


@triton.jit
def attention_fwd_tiles(
    acc, l_i, m, q, k_ptr, stride_k, v_ptr, stride_v, m0, lo, hi, scale, factor, rules, at,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys lo .. hi go into the online softmax (acc, l_i, m); its logits are factor * logits(scale)."""
    BLOCK_M: tl.constexpr = q.shape[0]
    offs_m = m0 + tl.arange(0, BLOCK_M)
    for n0 in range(lo, hi, BLOCK_N):
        n0 = tl.multiple_of(n0, BLOCK_N)
        k = tile(k_ptr, stride_k, n0, at.kv_len, BLOCK_N, D, q.shape[1], MASKED)
        v = tile(v_ptr, stride_v, n0, at.kv_len, BLOCK_N, DV, acc.shape[1], MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, _ = logits(s, offs_m[:, None], (n0 + tl.arange(0, BLOCK_N))[None, :], scale, rules, at, MASKED)

        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        # while nothing is attended, -inf - -inf would be NaN
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s * factor - m_used[:, None]) * rules.rest)
        alpha = tl.exp2((m - m_used) * rules.rest)
        l_i = l_i * alpha + tl.sum(p, 1)
        m = m_new
        if rules.seed is not None:
            p = tl.where(kept(rules, at, m0, n0, BLOCK_M, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l_i, m


@triton.jit
def attention_fwd_kernel(
    q, k, v, o, lse, sinks_ptr, rules, max_seqlen_q,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A head's last queries first: under a causal mask they have the most keys, and the light tiles fill the tail.
    tiles = tl.cdiv(max_seqlen_q, BLOCK_M)
    b, h, at = place(rules, tl.program_id(0) // tiles, BOTTOM_RIGHT)
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    if m0 >= at.rows:
        return
    k_ptr = head(k, b, h // rules.group, at.start_k)
    v_ptr = head(v, b, h // rules.group, at.start_k)
    q_tile = tile(head(q, b, h, at.start_q), q.stride_m, m0, at.q_len, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks_ptr is not None:  # a logit without a value
        sink = tl.load(sinks_ptr + h).to(tl.float32) * rules.unit
        m = tl.full((BLOCK_M,), 0.0, tl.float32) + sink
        l_i += tl.where(sink == float("-inf"), 0.0, 1.0)

    # Without bias, softcap and slopes the scale folds into exp2's argument: one fused multiply-add an element.
    scale, factor = rules.scale, 1.0
    if FOLD:
        scale, factor = 1.0, rules.scale
    walk = span(m0, m0 + BLOCK_M, at.q_len, at.kv_len, at.shift, rules.left, rules.right, BLOCK_N)
    for part in tl.static_range(3):
        acc, l_i, m = attention_fwd_tiles(
            acc, l_i, m, q_tile, k_ptr, k.stride_m, v_ptr, v.stride_m, m0, walk[part], walk[part + 1],
            scale, factor, rules, at, D, DV, BLOCK_N, PRECISION, part != 1)  # fmt: skip

    offs_m = m0 + tl.arange(0, BLOCK_M)
    attended = (l_i > 0) & (offs_m < at.q_len)
    l_i = tl.where(attended, l_i, 1.0)
    acc = tl.where(attended[:, None], acc * (rules.rescale / l_i)[:, None], 0.0)
    store_tile(head(o, b, h, at.start_q), o.stride_m, m0, at.rows, acc, DV)
    lse_m = tl.where(attended, m * (1.0 / rules.unit) + tl.log2(l_i) * LN2, float("-inf"))
    tl.store(stats_head(lse, b, h, at.start_q) + offs_m, lse_m, mask=offs_m < at.rows)


@triton.jit
def attention_bwd_delta_kernel(
    do, o, lse, dlse, delta, sinks_ptr, dsinks_ptr, rules, max_seqlen_q,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * o) - dlse, and this tile's share of dsink = -sum exp(sink - lse) delta."""
    tiles = tl.cdiv(max_seqlen_q, BLOCK_M)
    b, h, at = place(rules, tl.program_id(0) // tiles, False)
    m0 = tl.program_id(0) % tiles * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)

    do_tile = tile(head(do, b, h, at.start_q), do.stride_m, m0, at.q_len, BLOCK_M, DV, BLOCK_DV, True)
    o_tile = tile(head(o, b, h, at.start_q), o.stride_m, m0, at.q_len, BLOCK_M, DV, BLOCK_DV, True)
    delta_m = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if dlse is not None:
        delta_m -= tl.load(stats_head(dlse, b, h, at.start_q) + offs_m, mask=offs_m < at.q_len, other=0.0)

    tl.store(stats_head(delta, b, h, at.start_q) + offs_m, delta_m, mask=offs_m < at.q_len)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * rules.unit
        p = tl.exp2(
            (sink - load_lse(stats_head(lse, b, h, at.start_q), offs_m, at.q_len, rules)) * rules.rest
        )
        tl.store(dsinks_ptr + tl.program_id(0), -tl.sum(p * delta_m, 0))


@triton.jit
def attention_bwd_dkdv_tiles(
    dk, dv, sums, k, v, q_ptr, stride_q, do_ptr, stride_do, lse_ptr, delta_ptr, dbias, n0, lo, hi, rules, at,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries lo .. hi go into dk, dv and, for a bias of one row, the sums of ds over queries.

    The tiles are transposed (keys, queries), so that p and ds are left operands as they are, in registers.
    """
    BLOCK_N: tl.constexpr = k.shape[0]
    offs_n = n0 + tl.arange(0, BLOCK_N)
    for m0 in range(lo, hi, BLOCK_M):
        m0 = tl.multiple_of(m0, BLOCK_M)
        offs_m = m0 + tl.arange(0, BLOCK_M)
        q = tile(q_ptr, stride_q, m0, at.q_len, BLOCK_M, D, k.shape[1], MASKED)
        do = tile(do_ptr, stride_do, m0, at.q_len, BLOCK_M, DV, v.shape[1], MASKED)
        lse = load_lse(lse_ptr, offs_m, at.q_len, rules)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < at.q_len, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s, slope = logits(s, offs_m[None, :], offs_n[:, None], rules.scale, rules, at, MASKED)
        p = tl.exp2((s - lse[None, :]) * rules.rest)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if rules.seed is not None:
            keep = tl.trans(kept(rules, at, m0, n0, BLOCK_M, BLOCK_N))
            dv = tl.dot(tl.where(keep, p, 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.where(keep, dp * rules.rescale, 0.0)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if MASKED:
            ds = tl.where(s == float("-inf"), 0.0, ds)
        if dbias is not None:
            sums += tl.sum(ds, 1)
        dk = tl.dot((ds * slope).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, sums


@triton.jit
def attention_bwd_dkdv_kernel(
    do, q, k, v, lse, delta, dk, dv, dbias, rules, softmax_scale, max_seqlen_k,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, over every query of every head that shares them; dbias (B, H, S_k) or None."""
    tiles = tl.cdiv(max_seqlen_k, BLOCK_N)
    n0 = tl.program_id(0) % tiles * BLOCK_N
    bh = tl.program_id(0) // tiles * rules.group
    b, h, at = place(rules, bh, BOTTOM_RIGHT)
    if n0 >= at.keys:
        return
    h_kv = h // rules.group
    k_tile = tile(head(k, b, h_kv, at.start_k), k.stride_m, n0, at.kv_len, BLOCK_N, D, BLOCK_D, True)
    v_tile = tile(head(v, b, h_kv, at.start_k), v.stride_m, n0, at.kv_len, BLOCK_N, DV, BLOCK_DV, True)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    for g in range(rules.group):
        b, h, at = place(rules, bh + g, BOTTOM_RIGHT)
        q_ptr, do_ptr = head(q, b, h, at.start_q), head(do, b, h, at.start_q)
        lse_ptr, delta_ptr = stats_head(lse, b, h, at.start_q), stats_head(delta, b, h, at.start_q)
        sums = tl.zeros((BLOCK_N,), tl.float32)
        walk = span(n0, n0 + BLOCK_N, at.kv_len, at.q_len, -at.shift, rules.right, rules.left, BLOCK_M)
        for part in tl.static_range(3):
            dk_acc, dv_acc, sums = attention_bwd_dkdv_tiles(
                dk_acc, dv_acc, sums, k_tile, v_tile, q_ptr, q.stride_m, do_ptr, do.stride_m, lse_ptr, delta_ptr,
                dbias, n0, walk[part], walk[part + 1], rules, at, D, DV, BLOCK_M, PRECISION, part != 1)  # fmt: skip
        if dbias is not None:
            offs_n = n0 + tl.arange(0, BLOCK_N)
            tl.store(stats_head(dbias, b, h, at.start_k) + offs_n, sums, mask=offs_n < at.keys)

    store_tile(head(dk, b, h_kv, at.start_k), dk.stride_m, n0, at.keys, dk_acc * softmax_scale, D)
    store_tile(head(dv, b, h_kv, at.start_k), dv.stride_m, n0, at.keys, dv_acc * rules.rescale, DV)


@triton.jit
def attention_bwd_ds(
    q, do, lse, delta, k, v, m0, n0, rules, at, PRECISION: tl.constexpr, MASKED: tl.constexpr
):
    """ds, the gradient of the tile's logits, and the factor to that of the scaled q.k."""
    offs_m = m0 + tl.arange(0, q.shape[0])
    offs_n = n0 + tl.arange(0, k.shape[0])
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, slope = logits(s, offs_m[:, None], offs_n[None, :], rules.scale, rules, at, MASKED)
    p = tl.exp2((s - lse[:, None]) * rules.rest)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if rules.seed is not None:
        dp = tl.where(kept(rules, at, m0, n0, q.shape[0], k.shape[0]), dp * rules.rescale, 0.0)
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return ds, slope


@triton.jit
def attention_bwd_dq_tiles(
    dq, sums, q, do, lse, delta, k_ptr, stride_k, v_ptr, stride_v, dbias, dbias_rows, m0, lo, hi, rules, at,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys lo .. hi go into dq; ds itself is stored in dbias and summed over keys, where wanted."""
    for n0 in range(lo, hi, BLOCK_N):
        n0 = tl.multiple_of(n0, BLOCK_N)
        k = tile(k_ptr, stride_k, n0, at.kv_len, BLOCK_N, D, q.shape[1], MASKED)
        v = tile(v_ptr, stride_v, n0, at.kv_len, BLOCK_N, DV, do.shape[1], MASKED)
        ds, slope = attention_bwd_ds(q, do, lse, delta, k, v, m0, n0, rules, at, PRECISION, MASKED)
        if dbias is not None:
            store_plane(dbias, at.b, at.h, m0, n0, rules, ds)
        if dbias_rows is not None:
            sums += tl.sum(ds, 1)
        dq = tl.dot((ds * slope).to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, sums


@triton.jit
def attention_bwd_dq_kernel(
    do, q, k, v, lse, delta, dq, dbias, dbias_rows, rules, softmax_scale, max_seqlen_q,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, in the forward's order; dbias (B, H, S_q, S_k) or None, dbias_rows (B, H, S_q) or None."""
    tiles = tl.cdiv(max_seqlen_q, BLOCK_M)
    b, h, at = place(rules, tl.program_id(0) // tiles, BOTTOM_RIGHT)
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    if m0 >= at.rows:
        return
    offs_m = m0 + tl.arange(0, BLOCK_M)
    k_ptr = head(k, b, h // rules.group, at.start_k)
    v_ptr = head(v, b, h // rules.group, at.start_k)
    q_tile = tile(head(q, b, h, at.start_q), q.stride_m, m0, at.q_len, BLOCK_M, D, BLOCK_D, True)
    do_tile = tile(head(do, b, h, at.start_q), do.stride_m, m0, at.q_len, BLOCK_M, DV, BLOCK_DV, True)
    lse_m = load_lse(stats_head(lse, b, h, at.start_q), offs_m, at.q_len, rules)
    delta_m = tl.load(stats_head(delta, b, h, at.start_q) + offs_m, mask=offs_m < at.q_len, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)

    walk = span(m0, m0 + BLOCK_M, at.q_len, at.kv_len, at.shift, rules.left, rules.right, BLOCK_N)
    for part in tl.static_range(3):
        acc, sums = attention_bwd_dq_tiles(
            acc, sums, q_tile, do_tile, lse_m, delta_m, k_ptr, k.stride_m, v_ptr, v.stride_m, dbias, dbias_rows,
            m0, walk[part], walk[part + 1], rules, at, D, DV, BLOCK_N, PRECISION, part != 1)  # fmt: skip

    store_tile(head(dq, b, h, at.start_q), dq.stride_m, m0, at.rows, acc * softmax_scale, D)
    if dbias is not None:  # what the walk skipped
        nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for n0 in range(0, walk[0], BLOCK_N):
            store_plane(dbias, b, h, m0, n0, rules, nothing)
        for n0 in range(tl.maximum(tl.cdiv(walk[3], BLOCK_N) * BLOCK_N, walk[0]), rules.S_k, BLOCK_N):
            store_plane(dbias, b, h, m0, n0, rules, nothing)
    if dbias_rows is not None:
        tl.store(stats_head(dbias_rows, b, h, at.start_q) + offs_m, sums, mask=offs_m < at.rows)


@triton.jit
def attention_bwd_dbias_kernel(
    do, q, k, v, lse, delta, dbias, rules, kept_h, loops_b, loops_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a bias that is broadcast over batch or heads: ds recomputed for each and summed in order."""
    tiles_m, tiles_n = tl.cdiv(rules.S_q, BLOCK_M), tl.cdiv(rules.S_k, BLOCK_N)
    m0 = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    plane = tl.program_id(0) // (tiles_n * tiles_m)
    first_b, first_h = plane // kept_h, plane % kept_h
    offs_m = m0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for i in range(loops_b * loops_h):
        b, h, at = place(rules, (first_b + i // loops_h) * rules.H + first_h + i % loops_h, BOTTOM_RIGHT)
        walk = span(m0, m0 + BLOCK_M, at.q_len, at.kv_len, at.shift, rules.left, rules.right, BLOCK_N)
        if (n0 >= walk[0]) & (n0 < walk[3]):
            q_tile = tile(head(q, b, h, at.start_q), q.stride_m, m0, at.q_len, BLOCK_M, D, BLOCK_D, True)
            do_tile = tile(head(do, b, h, at.start_q), do.stride_m, m0, at.q_len, BLOCK_M, DV, BLOCK_DV, True)
            lse_m = load_lse(stats_head(lse, b, h, at.start_q), offs_m, at.q_len, rules)
            delta_m = tl.load(stats_head(delta, b, h, at.start_q) + offs_m, mask=offs_m < at.q_len, other=0.0)
            k_ptr = head(k, b, h // rules.group, at.start_k)
            v_ptr = head(v, b, h // rules.group, at.start_k)
            k_tile = tile(k_ptr, k.stride_m, n0, at.kv_len, BLOCK_N, D, BLOCK_D, True)
            v_tile = tile(v_ptr, v.stride_m, n0, at.kv_len, BLOCK_N, DV, BLOCK_DV, True)
            ds, slope = attention_bwd_ds(
                q_tile, do_tile, lse_m, delta_m, k_tile, v_tile, m0, n0, rules, at, PRECISION, True
            )
            acc += ds

    store_plane(dbias, first_b, first_h, m0, n0, rules, acc)


@triton.jit
def attention_weights_kernel(
    q, k, lse, weights, rules,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = exp(s - lse) itself, for looking at."""
    tiles = tl.cdiv(rules.S_q, BLOCK_M)
    b, h, at = place(rules, tl.program_id(0) // tiles, BOTTOM_RIGHT)
    m0 = tl.program_id(0) % tiles * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    q_tile = tile(head(q, b, h, at.start_q), q.stride_m, m0, at.q_len, BLOCK_M, D, BLOCK_D, True)
    lse_m = load_lse(stats_head(lse, b, h, at.start_q), offs_m, at.q_len, rules)
    k_ptr = head(k, b, h // rules.group, at.start_k)

    for n0 in range(0, rules.S_k, BLOCK_N):
        n0 = tl.multiple_of(n0, BLOCK_N)
        k_tile = tile(k_ptr, k.stride_m, n0, at.kv_len, BLOCK_N, D, BLOCK_D, True)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        offs_n = n0 + tl.arange(0, BLOCK_N)
        s, _ = logits(s, offs_m[:, None], offs_n[None, :], rules.scale, rules, at, True)
        store_plane(weights, b, h, m0, n0, rules, tl.exp2((s - lse_m[:, None]) * rules.rest))


def attention_fwd(
    q, k, v, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed,
    max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, dropout_p, scale, allow_tf32, config=None,
):  # fmt: skip
    """(o, lse) of q (B, H, S_q, D), k (B, H_kv, S_k, D), v (B, H_kv, S_k, D_v), each with a stride-1 last dim.

    o is a transposed view of (B, S_q, H, D_v), lse fp32 (B, H, S_q) in natural log. With cu_seqlens (int32, B + 1) the
    tensors are packed, q (T_q, H, D), k (T_k, H_kv, D), v (T_k, H_kv, D_v), o (T_q, H, D_v), lse (H, T_q), and the
    max_seqlens size the grid. causal: 0 no, 1 top-left, 2 bottom-right; a window of -1 is open; bias and mask (True =
    attend) are (B, H, S_q, S_k) views of stride 0 where broadcast; seed, for dropout_p > 0, is int64 (2,).
    """
    rules = make_rules(q, k, bias, mask, alibi_slopes, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed,
                       causal, window_left, window_right, softcap, dropout_p, scale)  # fmt: skip
    B, H, DV = batches(q, cu_seqlens_q), q.shape[1], v.shape[-1]
    if cu_seqlens_q is None:
        max_seqlen_q = q.shape[2]
        o = q.new_empty(B, max_seqlen_q, H, DV).transpose(1, 2)
        lse = q.new_empty(B, H, max_seqlen_q, dtype=torch.float32)
    else:  # rows past the last sequence are nobody's
        o = q.new_zeros(q.shape[0], H, DV)
        lse = q.new_full((H, q.shape[0]), -math.inf, dtype=torch.float32)
    row = config or tile_row("fwd", q, v, rules)
    grid = B * rules.H * triton.cdiv(max_seqlen_q, row["BLOCK_M"])
    if grid:
        with on_device(q):
            attention_fwd_kernel[(grid,)](
                rows(q), rows(k), rows(v), rows(o), stats(lse), sinks, rules, max_seqlen_q,
                FOLD=scale > 0 and q.dtype != torch.float32 and bias is None and alibi_slopes is None and softcap == 0.0,
                **constants(q, v, causal, allow_tf32), **row,
            )  # fmt: skip
    return o, lse


def attention_bwd(
    do, dlse, q, k, v, o, lse, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed,
    max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, dropout_p, scale, allow_tf32,
    bias_grad, sinks_grad, config=None,
):  # fmt: skip
    """(dq, dk, dv, dbias, dsinks) for do like o and dlse like lse or None; the other arguments are attention_fwd's.

    dbias has the bias' dtype and its shape before broadcasting, dsinks is like sinks; one not wanted comes back as (0,).
    config: {"dkdv": tile, "dq": tile}.
    """
    rules = make_rules(q, k, bias, mask, alibi_slopes, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed,
                       causal, window_left, window_right, softcap, dropout_p, scale)  # fmt: skip
    B, H = batches(q, cu_seqlens_q), rules.H
    if cu_seqlens_q is None:
        max_seqlen_q, max_seqlen_k = q.shape[2], k.shape[2]
    do = do if do.stride(-1) == 1 else do.contiguous()  # an expanded one, as of o.sum()
    dlse = dlse if dlse is None or dlse.stride(-1) == 1 else dlse.contiguous()
    config = config or {name: tile_row(name, q, v, rules) for name in ("dkdv", "dq")}
    static = constants(q, v, causal, allow_tf32)
    # rows past the last packed sequence are nobody's
    new = torch.empty_like if cu_seqlens_q is None else torch.zeros_like
    dq, dk, dv, delta = new(q), new(k), new(v), torch.empty_like(lse)
    pattern, dbias, sums = bias_gradient(bias) if bias_grad else (None, q.new_empty(0), None)

    with on_device(q):
        tiles = triton.cdiv(max_seqlen_q, DELTA_ROWS)
        # what does not touch delta would only make it compile again
        bare = rules._replace(scale=0.0, cap=None, bias=None, mask=None, slopes=None, left=None, right=None, seed=None,
                              threshold=None, kv_lens=None, cu_k=None, S_k=0)  # fmt: skip
        dsinks = q.new_empty(B, H, tiles, dtype=torch.float32) if sinks_grad else None
        if B * H * tiles:
            attention_bwd_delta_kernel[(B * H * tiles,)](
                rows(do), rows(o), stats(lse), stats(dlse), stats(delta), sinks if sinks_grad else None, dsinks,
                bare, max_seqlen_q, static["DV"], static["BLOCK_DV"], DELTA_ROWS,
            )  # fmt: skip
        saved = rows(do), rows(q), rows(k), rows(v), stats(lse), stats(delta)
        grid = B * (H // rules.group) * triton.cdiv(max_seqlen_k, config["dkdv"]["BLOCK_N"])
        if grid:
            attention_bwd_dkdv_kernel[(grid,)](
                *saved, rows(dk), rows(dv), stats(sums) if pattern == "cols" else None, rules, scale, max_seqlen_k,
                **static, **config["dkdv"],
            )  # fmt: skip
        grid = B * H * triton.cdiv(max_seqlen_q, config["dq"]["BLOCK_M"])
        if grid:
            attention_bwd_dq_kernel[(grid,)](
                *saved, rows(dq), plane(dbias) if pattern == "plane" else None,
                stats(sums) if pattern == "rows" else None, rules, scale, max_seqlen_q, **static, **config["dq"],
            )  # fmt: skip
        if pattern == "loop":
            kept_b, kept_h = dbias.shape[:2]
            row = config["dq"]
            grid = (
                triton.cdiv(rules.S_q, row["BLOCK_M"])
                * triton.cdiv(rules.S_k, row["BLOCK_N"])
                * kept_b
                * kept_h
            )
            if grid:
                attention_bwd_dbias_kernel[(grid,)](
                    *saved, plane(dbias), rules, kept_h, B // kept_b, H // kept_h, **static, **row
                )

    dbias = dbias if sums is None else bias_gradient_of(sums, pattern, bias)
    dsinks = sinks_gradient_of(dsinks, sinks) if sinks_grad else q.new_empty(0)
    return dq, dk, dv, dbias, dsinks


def attention_weights(
    q, k, lse, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed,
    max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, dropout_p, scale, allow_tf32, config=None,
):  # fmt: skip
    """The probabilities (B, H, S_q, S_k) before dropout, in q's dtype, of an attention_fwd with these arguments."""
    rules = make_rules(q, k, bias, mask, alibi_slopes, q_lens, kv_lens, None, None, None,
                       causal, window_left, window_right, softcap, 0.0, scale)  # fmt: skip
    weights = q.new_empty(*q.shape[:3], k.shape[2])
    row = config or tile_row("fwd", q, q, rules)
    grid = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], row["BLOCK_M"])
    static = constants(q, q, causal, allow_tf32)
    if grid and k.shape[2]:
        with on_device(q):
            attention_weights_kernel[(grid,)](
                rows(q), rows(k), stats(lse), plane(weights), rules, static["D"], static["BLOCK_D"],
                BOTTOM_RIGHT=static["BOTTOM_RIGHT"], PRECISION=static["PRECISION"], **row,
            )  # fmt: skip
    return weights


def make_rules(
    q, k, bias, mask, slopes, q_lens, kv_lens, cu_q, cu_k, seed, causal, left, right, softcap, dropout_p, scale,
):  # fmt: skip
    """The Rules of a call; causal becomes a band that ends at the query."""
    B = batches(q, cu_q)
    H, positions = q.shape[1], 2 if cu_q is None else 0
    S_q, S_k = q.shape[positions], k.shape[positions]
    right = 0 if causal and right != 0 else right
    left, right = (None if reach < 0 else min(reach, S_q + S_k) for reach in (left, right))
    unit = 1.0 if q.dtype == torch.float32 else LOG2E.value
    threshold = round(dropout_p * 2**8)
    dropped = dropout_p > 0
    return Rules(
        unit=tl.constexpr(unit),
        rest=tl.constexpr(LOG2E.value / unit),
        scale=scale / softcap if softcap else scale * unit,
        cap=softcap * unit if softcap else None,
        bias=None if bias is None else plane(bias),
        mask=None if mask is None else plane(mask),
        slopes=None if slopes is None else Stats(slopes, *slopes.expand(B, H).stride()),
        left=left,
        right=right,
        q_lens=q_lens,
        kv_lens=kv_lens,
        cu_q=cu_q,
        cu_k=cu_k,
        seed=seed if dropped else None,
        threshold=threshold if dropped else None,
        rescale=(2**8 / (2**8 - threshold) if threshold < 2**8 else 0.0) if dropped else 1.0,
        H=H,
        group=H // k.shape[1] if H else 1,
        S_q=S_q,
        S_k=S_k,
    )


def constants(q, v, causal, allow_tf32):
    D, DV = q.shape[-1], v.shape[-1]
    # tl.dot wants 16 of each dim and powers of two
    blocks = dict(BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_DV=max(16, triton.next_power_of_2(DV)))
    return dict(D=D, DV=DV, **blocks, BOTTOM_RIGHT=causal == 2, PRECISION="tf32" if allow_tf32 else "ieee")


def tile_row(kernel, q, v, rules):
    """The first row that fits the wider head dim."""
    width = max(q.shape[-1], v.shape[-1])
    return next(row for limit, row in TILES[kernel, tile_kind(q, rules)] if width <= limit)


def tile_kind(q, rules):
    if q.dtype == torch.float32:
        return "fp32"
    # the interpreter takes Hopper's
    if q.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(q.device)[0] not in (9, 10)):
        return "small"
    parts = (rules.bias, rules.mask, rules.seed, rules.cap, rules.slopes)
    return "plain" if all(part is None for part in parts) else "rich"


def batches(q, cu_seqlens_q):
    return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1


def rows(x):
    """Rows of (B, H, S, D), or of packed (T, H, D)."""
    return Rows(x, *x.stride()[:3]) if x.dim() == 4 else Rows(x, 0, x.stride(1), x.stride(0))


def stats(x):
    """Stats of (B, H, S), or of packed (H, T)."""
    if x is None:
        return None
    return Stats(x, *x.stride()[:2]) if x.dim() == 3 else Stats(x, 0, x.stride(0))


def plane(x):
    return Plane(x, *x.stride(), *(tl.constexpr(x.stride(d) != 0 and x.shape[d] > 1) for d in (2, 3)))


def on_device(x):
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
