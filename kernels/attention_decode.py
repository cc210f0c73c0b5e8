"""Attention of a few new queries over a key/value cache: append, split over the keys, combine.

Forward, per query i of a sequence whose total length (cache_lens + S_new) is L, at position p = i + L - S_q:
    s_j = scale * q_i . k_j;  s_j = c * tanh(s_j / c) with a softcap;  s_j -= slope * (p - j)
    o_i = sum_j exp(s_j) v_j / Z,   lse_i = log Z,   Z = sum_j exp(s_j) + exp(sink),   over 0 <= p - j <= window_left

How: decoding reads every cached byte once and does little else, so a program owns one (sequence, key head, share of the
keys) and packs the H / H_kv query heads times S_q queries that read those keys into one tile of at least 16 rows, the
least that the tensor cores take. It walks its share with the online softmax: with the running maximum m,
    m' = max(m, max s);  z = z * e^(m - m') + sum e^(s - m');  acc = acc * e^(m - m') + e^(s - m') v
which leaves acc and z equal to the sums taken against m'. A program writes acc, m and z (fp32, H * S_q * (D_v + 2)
words a share); a second kernel rescales the shares to one maximum and adds them in order. Shares are cut on the device
from cache_lens, so the host knows shapes only, and a captured graph serves growing lengths. One share needs no second
kernel. New keys and values are written first, by a kernel of their own.

Any index read from memory is clamped: a wrong length or page gives wrong numbers, never a fault; what lies past a
length is never loaded. Scores, softmax and sums are fp32, in units of log2 for 16-bit inputs and in natural ones for
fp32, where a rounding more would show; probabilities are rounded to the cache's dtype before they meet the values.
The scheme is Flash-Decoding's: https://pytorch.org/blog/flash-decoding/
"""

import functools

import torch
import triton
import triton.language as tl

from .attention import tanh
from .attention_host import choose_splits

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

BLOCK_T = 8  # new rows an append program copies

# Rows by architecture and element width: (padded head width, tile), ascending, the first that fits. MAX_M bounds the tile of
# packed query rows. About 64 KiB of loads in flight a program and two programs an SM; fp32 has no tensor cores when IEEE is
# asked for, and its operands spill with wider tiles. From shared-memory and register budgets; not yet timed on any GPU.
# fmt: off
TILES = {
    (80, 16): [
        (64,  dict(MAX_M=64, BLOCK_N=64, num_warps=4, num_stages=4)),
        (128, dict(MAX_M=64, BLOCK_N=32, num_warps=4, num_stages=4)),
        (256, dict(MAX_M=32, BLOCK_N=32, num_warps=4, num_stages=2)),
    ],
    (80, 32): [
        (64,  dict(MAX_M=16, BLOCK_N=64, num_warps=8, num_stages=2)),
        (128, dict(MAX_M=16, BLOCK_N=32, num_warps=8, num_stages=2)),
        (256, dict(MAX_M=16, BLOCK_N=16, num_warps=8, num_stages=2)),
    ],
    (90, 16): [
        (64,  dict(MAX_M=64, BLOCK_N=128, num_warps=4, num_stages=3)),
        (128, dict(MAX_M=64, BLOCK_N=64, num_warps=4, num_stages=3)),
        (256, dict(MAX_M=32, BLOCK_N=32, num_warps=4, num_stages=3)),
    ],
    (90, 32): [
        (64,  dict(MAX_M=16, BLOCK_N=64, num_warps=8, num_stages=2)),
        (128, dict(MAX_M=16, BLOCK_N=32, num_warps=8, num_stages=3)),
        (256, dict(MAX_M=16, BLOCK_N=16, num_warps=8, num_stages=2)),
    ],
    (100, 16): [
        (64,  dict(MAX_M=64, BLOCK_N=128, num_warps=4, num_stages=3)),
        (128, dict(MAX_M=64, BLOCK_N=64, num_warps=4, num_stages=3)),
        (256, dict(MAX_M=32, BLOCK_N=32, num_warps=4, num_stages=3)),
    ],
    (100, 32): [
        (64,  dict(MAX_M=16, BLOCK_N=64, num_warps=8, num_stages=2)),
        (128, dict(MAX_M=16, BLOCK_N=32, num_warps=8, num_stages=3)),
        (256, dict(MAX_M=16, BLOCK_N=16, num_warps=8, num_stages=3)),
    ],
    ("hip", 16): [
        (64,  dict(MAX_M=64, BLOCK_N=64, num_warps=4, num_stages=2)),
        (128, dict(MAX_M=64, BLOCK_N=32, num_warps=4, num_stages=2)),
        (256, dict(MAX_M=32, BLOCK_N=16, num_warps=4, num_stages=2)),
    ],
    ("hip", 32): [
        (64,  dict(MAX_M=16, BLOCK_N=32, num_warps=4, num_stages=2)),
        (128, dict(MAX_M=16, BLOCK_N=16, num_warps=4, num_stages=2)),
        (256, dict(MAX_M=16, BLOCK_N=16, num_warps=4, num_stages=1)),
    ],
}
# fmt: on


@triton.jit
def total_length(lens_ptr, b, S_new, capacity):
    """Filled positions of sequence b after the append, within [0, capacity] whatever cache_lens holds."""
    filled = tl.maximum(tl.load(lens_ptr + b).to(tl.int64), 0)
    return tl.minimum(filled + S_new, capacity).to(tl.int32)


@triton.jit
def locate(table_ptr, n, offs, mask, num_pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page and slot of the keys at positions n + offs, n a multiple of BLOCK_N; a contiguous cache is one page."""
    if PAGE_SIZE == 0:
        page = 0
        slot = n + offs
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table_ptr + n // PAGE_SIZE).to(tl.int64)
        slot = n % PAGE_SIZE + offs
    else:
        page = tl.load(table_ptr + (n + offs) // PAGE_SIZE, mask=mask, other=0).to(tl.int64)
        slot = (n + offs) % PAGE_SIZE
    if PAGE_SIZE != 0:
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
    return page, slot.to(tl.int64)


# Sizes that change from call to call are not specialised on: being 1 or a multiple of 16 must not compile a kernel anew.
@triton.jit(do_not_specialize=["S_new", "capacity", "num_pages", "page_size"])
def attention_decode_append_kernel(
    new_ptr, lens_ptr, table_ptr, cache_ptr,
    stride_new_b, stride_new_h, stride_new_t, stride_table_b,
    stride_cache_b, stride_cache_page, stride_cache_h, stride_cache_n,
    H_kv, S_new, capacity, num_pages, page_size,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies BLOCK_T new rows of one (sequence, head) to their positions; what has no valid place is dropped."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(S_new, BLOCK_T)
    b, h = pid // blocks // H_kv, pid // blocks % H_kv
    offs_t = pid % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    filled = tl.load(lens_ptr + b).to(tl.int64)
    at = filled + offs_t
    mask_t = (offs_t < S_new) & (filled >= 0) & (at < capacity)
    if table_ptr is None:
        rows = b * stride_cache_b + at * stride_cache_n
    else:
        page = tl.load(table_ptr + b * stride_table_b + at // page_size, mask=mask_t, other=0).to(tl.int64)
        mask_t &= (page >= 0) & (page < num_pages)
        rows = page * stride_cache_page + at % page_size * stride_cache_n

    new_ptrs = (
        new_ptr + b * stride_new_b + h * stride_new_h + offs_t[:, None] * stride_new_t + offs_d[None, :]
    )
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    new = tl.load(new_ptrs, mask=mask)

    tl.store(cache_ptr + h * stride_cache_h + rows[:, None] + offs_d[None, :], new, mask=mask)


@triton.jit(do_not_specialize=["S_new", "capacity", "num_pages", "num_splits", "window_left"])
def attention_decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lens_ptr, table_ptr, slopes_ptr, sinks_ptr, o_ptr, lse_ptr, m_ptr, z_ptr,
    stride_q_b, stride_q_h, stride_q_t,
    stride_k_b, stride_k_page, stride_k_h, stride_k_n,
    stride_v_b, stride_v_page, stride_v_h, stride_v_n,
    stride_table_b, stride_slopes_b, stride_slopes_h, stride_sinks_h,
    stride_o_b, stride_o_h, stride_o_t, stride_o_split,
    H, H_kv, S_q, S_new, capacity, num_pages, num_splits, window_left, softcap, scale,
    D: tl.constexpr, D_V: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One (sequence, key head, share of the keys, tile of packed query rows); row m is query m // G of head m % G."""
    group = H // H_kv
    tiles_m = tl.cdiv(group * S_q, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    pid_m = (pid % tiles_m).to(tl.int32)
    split = (pid // tiles_m % num_splits).to(tl.int32)
    b = pid // tiles_m // num_splits // H_kv
    h_kv = pid // tiles_m // num_splits % H_kv
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = offs_m < group * S_q
    i = (offs_m // group).to(tl.int64)
    h = h_kv * group + offs_m % group

    kv_len = total_length(lens_ptr, b, S_new, capacity)
    shift = kv_len - S_q
    position = offs_m // group + shift
    last_m = tl.minimum(pid_m * BLOCK_M + BLOCK_M, group * S_q) - 1
    end = last_m // group + shift + 1
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(pid_m * BLOCK_M // group + shift - window_left, 0) // BLOCK_N * BLOCK_N
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N), num_splits) * BLOCK_N
        start += split * share
        end = tl.minimum(end, start + share)

    q_ptrs = q_ptr + b * stride_q_b + (h * stride_q_h + i * stride_q_t)[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
    k_ptr += b * stride_k_b + h_kv * stride_k_h
    v_ptr += b * stride_v_b + h_kv * stride_v_h
    if PAGE_SIZE != 0:
        table_ptr += b * stride_table_b
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    if HAS_ALIBI:
        slopes_ptrs = slopes_ptr + b * stride_slopes_b + h * stride_slopes_h
        slope = tl.load(slopes_ptrs, mask=mask_m, other=0.0).to(tl.float32) * UNIT
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)

    for n in range(start, end, BLOCK_N):
        mask_n = n + offs_n < end
        page, slot = locate(table_ptr, n, offs_n, mask_n, num_pages, PAGE_SIZE, BLOCK_N)
        k_ptrs = k_ptr + (page * stride_k_page + slot * stride_k_n)[:, None] + offs_d[None, :]
        k = tl.load(k_ptrs, mask=mask_n[:, None] & (offs_d < D)[None, :], other=0.0)
        v_ptrs = v_ptr + (page * stride_v_page + slot * stride_v_n)[:, None] + offs_dv[None, :]
        v = tl.load(v_ptrs, mask=mask_n[:, None] & (offs_dv < D_V)[None, :], other=0.0)

        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = s * scale
        if HAS_SOFTCAP:
            s = tanh(s) * softcap
        distance = position[:, None] - (n + offs_n)[None, :]
        if HAS_ALIBI:
            s -= slope[:, None] * distance.to(tl.float32)  # excluded below where negative
        keep = mask_n[None, :] & (distance >= 0)
        if HAS_WINDOW:
            keep &= distance <= window_left
        s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - m_safe[:, None]) * REST)
        alpha = tl.exp2((m - m_safe) * REST)
        z = z * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    row = (b * H + h) * S_q + i
    o_ptrs = o_ptr + b * stride_o_b + (h * stride_o_h + i * stride_o_t)[:, None] + offs_dv[None, :]
    mask_o = mask_m[:, None] & (offs_dv < D_V)[None, :]
    if SPLIT:
        tl.store(m_ptr + row * num_splits + split, m, mask=mask_m)
        tl.store(z_ptr + row * num_splits + split, z, mask=mask_m)
        # The combine kernel does not read the rows of a share that saw no key, so they are not written.
        tl.store(o_ptrs + split * stride_o_split, acc, mask=mask_o & (z > 0.0)[:, None])
    else:
        sink = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + h * stride_sinks_h, mask=mask_m, other=0.0).to(tl.float32) * UNIT
        m_all = tl.maximum(m, sink)
        m_safe = tl.where(m_all == float("-inf"), 0.0, m_all)
        w = tl.exp2((m - m_safe) * REST)
        total = z * w + tl.exp2((sink - m_safe) * REST)
        total = tl.where(
            total == 0.0, 1.0, total
        )  # no key and no sink: 0 / 1, and log2(1) beside an m of -inf
        o = acc * (w / total)[:, None]
        tl.store(lse_ptr + row, m_all * (1.0 / UNIT) + tl.log2(total) * LN2, mask=mask_m)
        tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=mask_o)


@triton.jit(do_not_specialize=["num_splits"])
def attention_decode_combine_kernel(
    part_ptr, m_ptr, z_ptr, sinks_ptr, o_ptr, lse_ptr,
    stride_sinks_h, stride_o_b, stride_o_h, stride_o_t,
    H, S_q, num_splits,
    D_V: tl.constexpr, HAS_SINKS: tl.constexpr, UNIT: tl.constexpr, REST: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One query row: its shares rescaled to their common maximum and added, CHUNK at a time in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    i, h, b = row % S_q, row // S_q % H, row // S_q // H
    offs_split = tl.arange(0, BLOCK_SPLITS)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_dv = offs_dv < D_V

    m = tl.load(m_ptr + row * num_splits + offs_split, mask=offs_split < num_splits, other=float("-inf"))
    z = tl.load(z_ptr + row * num_splits + offs_split, mask=offs_split < num_splits, other=0.0)
    m_all = tl.max(m, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + h * stride_sinks_h).to(tl.float32) * UNIT
        m_all = tl.maximum(m_all, sink)
    m_safe = tl.where(m_all == float("-inf"), 0.0, m_all)
    total = tl.sum(z * tl.exp2((m - m_safe) * REST), 0)
    if HAS_SINKS:
        total += tl.exp2((sink - m_safe) * REST)

    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for first in range(0, num_splits, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        m_chunk = tl.load(m_ptr + row * num_splits + offs, mask=offs < num_splits, other=float("-inf"))
        part_ptrs = part_ptr + (row * num_splits + offs)[:, None] * D_V + offs_dv[None, :]
        part = tl.load(part_ptrs, mask=(m_chunk > float("-inf"))[:, None] & mask_dv[None, :], other=0.0)
        acc += tl.sum(part * tl.exp2((m_chunk - m_safe) * REST)[:, None], 0)

    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + row, m_all * (1.0 / UNIT) + tl.log2(total) * LN2)
    o_ptrs = o_ptr + b * stride_o_b + h * stride_o_h + i * stride_o_t + offs_dv
    tl.store(o_ptrs, (acc / total).to(o_ptr.dtype.element_ty), mask=mask_dv)


def attention_decode_fwd(q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks,
                         window_left, window_right, softcap, scale, num_splits, allow_tf32):  # fmt: skip
    """(o (B, H, S_q, D_v), lse (B, H, S_q) fp32, natural log) of q (B, H, S_q, D) over a cache, appended to in place first.

    k_cache, v_cache: (B, H_kv, S, D | D_v), or (pages, page_size, H_kv, D | D_v) with block_table (B, n), int32 or int64;
    cache_lens (B,), int32 or int64, counts the positions filled before k_new, v_new (B, H_kv, S_new, D | D_v) or None.
    alibi_slopes (H,) or (B, H), sinks (H,), or None. window_left -1 is open; window_right never binds, as no query sees a
    later key, and is here for the order of arguments that attention_fwd has. num_splits 0 chooses. The last dim has stride 1,
    except in alibi_slopes and sinks.
    """
    B, H, S_q, D = q.shape
    paged = block_table is not None
    D_v = v_cache.shape[3]
    pages, page_size, H_kv = (
        (k_cache.shape[0], k_cache.shape[1], k_cache.shape[2]) if paged else (0, 0, k_cache.shape[1])
    )
    capacity = (block_table.shape[1] * page_size if pages else 0) if paged else k_cache.shape[2]
    S_new = 0 if k_new is None else k_new.shape[2]
    o = torch.empty(B, S_q, H, D_v, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, S_q, dtype=torch.float32, device=q.device)
    BLOCK_D, BLOCK_DV = (max(16, triton.next_power_of_2(d)) for d in (D, D_v))

    # (batch, page, head, position) strides; one of batch and page does not exist.
    strides = [
        (0, c.stride(0), c.stride(2), c.stride(1)) if paged else (c.stride(0), 0, c.stride(1), c.stride(2))
        for c in (k_cache, v_cache)
    ]
    stride_table_b = block_table.stride(0) if paged else 0
    with torch.cuda.device_of(q):
        if S_new and B:
            for new, cache, stride, d in ((k_new, k_cache, strides[0], D), (v_new, v_cache, strides[1], D_v)):
                attention_decode_append_kernel[(B * H_kv * triton.cdiv(S_new, BLOCK_T),)](
                    new, cache_lens, block_table, cache, *new.stride()[:3], stride_table_b, *stride,
                    H_kv, S_new, capacity, pages, page_size,
                    d, BLOCK_T, max(16, triton.next_power_of_2(d)), num_warps=4,
                )  # fmt: skip
        if lse.numel() == 0:
            return o, lse

        tile = tile_row(q.device, q.element_size(), max(D, D_v))
        if paged:  # the page number is a load of its own: the pipeline shares its stages between the two
            tile["num_stages"] = 2 * tile["num_stages"] - 1
        rows = H // H_kv * S_q
        BLOCK_M = max(16, min(tile.pop("MAX_M"), triton.next_power_of_2(rows)))
        programs = B * H_kv * triton.cdiv(rows, BLOCK_M)
        if num_splits == 0:
            keys = capacity if window_left < 0 else min(capacity, window_left + S_q)
            num_splits = choose_splits(programs, triton.cdiv(keys, tile["BLOCK_N"]), processors(q.device))
        split = num_splits > 1
        unit = 1.0 if q.dtype == torch.float32 else LOG2E.value  # of the logits, see the top of the file
        # A share's O goes beside the other shares of its row, which is how the combine kernel reads them.
        part = torch.empty(B, H, S_q, num_splits, D_v, dtype=torch.float32, device=q.device) if split else o
        statistics = (2, B, H, S_q, num_splits)
        m, z = torch.empty(statistics, dtype=torch.float32, device=q.device) if split else (None, None)
        slopes_strides = (0, 0) if alibi_slopes is None else (0, *alibi_slopes.stride())[-2:]
        stride_sinks_h = 0 if sinks is None else sinks.stride(0)
        attention_decode_fwd_kernel[(programs * num_splits,)](
            q, k_cache, v_cache, cache_lens, block_table, alibi_slopes, sinks, part, lse, m, z,
            *q.stride()[:3], *strides[0], *strides[1], stride_table_b, *slopes_strides, stride_sinks_h,
            *part.stride()[:3], part.stride(3) if split else 0,
            H, H_kv, S_q, S_new, capacity, pages, num_splits, window_left,
            softcap * unit, scale / softcap if softcap else scale * unit,
            D, D_v, page_size, window_left >= 0, softcap > 0.0, alibi_slopes is not None, sinks is not None, split,
            "tf32" if allow_tf32 else "ieee", unit, LOG2E.value / unit, BLOCK_M, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, **tile,
        )  # fmt: skip
        if split:
            BLOCK_SPLITS = triton.next_power_of_2(num_splits)
            attention_decode_combine_kernel[(B * H * S_q,)](
                part, m, z, sinks, o, lse, stride_sinks_h, *o.stride()[:3], H, S_q, num_splits,
                D_v, sinks is not None, unit, LOG2E.value / unit, BLOCK_SPLITS, min(16, BLOCK_SPLITS), BLOCK_DV, num_warps=4,
            )  # fmt: skip
    return o, lse


def tile_row(device, element_size, head_dim):
    """A copy of the first row of TILES that holds head_dim, for this device's architecture."""
    rows = TILES[architecture(device), 8 * element_size]
    return dict(next(row for limit, row in rows if head_dim <= limit))


@functools.cache
def architecture(device):
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        return "hip"
    # 12.x has the shared memory of 8.6, not of 10.0
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


@functools.cache
def processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
