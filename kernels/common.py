"""What several Triton kernels share: the dropout of the row ops.

    draw[m, n] >= k keeps x[m, n] * 2^16 / (2^16 - k), else 0;  k = round(p * 2^16)

draw is 16 bits of Philox4x32-7 (Salmon et al., SC 2011). One call serves the columns 8g .. 8g+7 of row m, with the key
(seed low, seed high) and the counter (g, m low, m high, offset low); column 8g + 2w + h takes half h (low first) of
word w. Nothing depends on tiles or strides, so the backward pass draws the same mask and none is stored.
"""

import triton
import triton.language as tl


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
