"""What several Triton kernels share: rows of any strides, second-stage sums, and the dropout of the row ops.

    draw[m, n] >= k keeps x[m, n] * 2^16 / (2^16 - k), else 0;  k = round(p * 2^16)

draw is 16 bits of Philox4x32-7 (Salmon et al., SC 2011). One call serves the columns 8g .. 8g+7 of row m, with the key
(seed low, seed high) and the counter (g, m low, m high, offset low); column 8g + 2w + h takes half h (low first) of
word w. Nothing depends on tiles or strides, so the backward pass draws the same mask and none is stored.
"""

import torch
import triton
import triton.language as tl


def rows_of(x):
    """x (..., N) with where its row m starts, m // inner * stride_outer + m % inner * stride_inner, and its column stride.

    Returns (x, (inner, stride_outer, stride_inner, stride_n)). Leading dims that lie evenly merge into one.
    """
    N = x.shape[-1]
    if x.is_contiguous():
        return x, (1, N, 0, 1)
    uneven = []  # (size, stride), innermost first
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if uneven and stride == uneven[-1][0] * uneven[-1][1]:
            uneven[-1] = (size * uneven[-1][0], uneven[-1][1])
        elif size > 1:
            uneven.append((size, stride))
    stride_n = x.stride(-1) if N > 1 else 1
    if (
        len(uneven) > 2
    ):  # three leading dims and more, none of which merge: too many divisions a row, so a copy
        return x.contiguous(), (1, N, 0, 1)
    if len(uneven) == 2:
        return x, (uneven[0][0], uneven[1][1], uneven[0][1], stride_n)
    return x, (1, uneven[0][1] if uneven else 0, 0, stride_n)


def multiprocessors(x):
    """How many programs fill the device once; a few where the interpreter runs."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


@triton.jit
def blocks_of(N, BLOCK: tl.constexpr):
    """ceil(N / BLOCK) for N >= 1, where tl.cdiv's N + BLOCK - 1 could pass 2^31 although N does not."""
    return (N - 1) // BLOCK + 1


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Where rows (int64) start in a tensor of two leading dims; one of evenly spaced rows has inner = 1."""
    return (rows // inner * stride_outer + rows % inner * stride_inner)[:, None]


@triton.jit
def sum_partials(partial_ptr, out_ptr, offs_n, G, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The G rows of fp32 partial sums (G, N) at columns offs_n, added in a fixed order and cast to out_ptr's dtype."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, G, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < G)[:, None] & (offs_n < N)[None, :]
        acc += tl.load(partial_ptr + (rows * N)[:, None] + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_n, tl.sum(acc, axis=0), mask=offs_n < N)


def row_dropout_scalars(p):
    """(k, rescale) that row_dropout takes for a probability p in [0, 1]; p = 1 keeps nothing."""
    k = round(p * 2**16)
    return k, 2**16 / (2**16 - k) if k < 2**16 else 0.0


@triton.jit
def row_dropout(x, seed_ptr, rows, col0, threshold, rescale):
    """x (BLOCK_M, BLOCK_N) fp32 at rows (BLOCK_M,) int64 and columns col0, col0 + 1, ..., dropped and rescaled.

    seed_ptr holds two int64, seed and offset. col0 is a multiple of 8, BLOCK_N a power of two >= 8.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    seed, offset = tl.load(seed_ptr), tl.load(seed_ptr + 1)
    # Every counter word is 32 bits wide: a single 64-bit one switches tl.philox to Philox4x64.
    zero = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.uint32)
    group = zero + (col0 // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
    row_low = zero + rows.to(tl.uint32)[:, None]
    row_high = zero + (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, group, row_low, row_high, zero + offset.to(tl.uint32), n_rounds=7)

    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, groups, 2, 2): [.., i, j] is word 2i + j
    draw = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_N))
    return tl.where(draw.to(tl.int32) >= threshold, x * rescale, 0.0)
