"""Every op in plain torch: the specification that all backends are tested against, read and run in float64.

Shapes: B batch, H query heads, H_kv key heads, S_q queries, S_k keys, D head width, D_v value width; row ops see (M, N).
Nothing here is fast, and nothing of ours is imported.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

# bound at import, since fastattn.enable() puts ours there
stock_softmax, stock_log_softmax = torch.softmax, torch.log_softmax

# Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
PHILOX_ROUNDS = 7


def philox(key, counter, rounds=PHILOX_ROUNDS):
    """Four uint32 words for a key (2 uint32) and a counter (4 broadcastable uint32 arrays)."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.uint64(k) for k in key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


def dropout_mask(seed, shape, p):
    """The dropout stream of every kernel: a float64 tensor of 0 (dropped) or the rescale (kept), of `shape`.

    `seed` is an int64 tensor (2,) of seed and offset. The key is the seed's low and high word; the last counter word is
    the offset's low word.

    (B, H, S_q, S_k), attention: 8 bits an element, p rounded to k/256, an element is kept where its byte >= k. One call
    serves rows {r, r+1, r+8, r+9} x columns {c, c+1, c+8, c+9} inside a 16 x 16 square, with counter
    (b*H + h, row group, column group): four groups a square in each direction. Word = 2*(row & 1) + (column & 1),
    byte = 2*(row bit 3) + (column bit 3).

    (M, N), row ops: 16 bits an element, p rounded to k/65536. One call serves columns 8g .. 8g+7 of a row with counter
    (g, row low word, row high word); column 8g + 2w + half takes that half (low first) of word w.
    """
    seed, offset = (int(s) for s in seed)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    last = offset & 0xFFFFFFFF
    if len(shape) == 4:
        B, H, S_q, S_k = shape
        bits, bh = 8, np.arange(B * H).reshape(B, H, 1, 1)
        i, j = np.arange(S_q).reshape(-1, 1), np.arange(S_k)
        words = philox(key, (bh, i // 16 * 4 + i % 8 // 2, j // 16 * 4 + j % 8 // 2, last))
        word = np.choose(np.broadcast_to(2 * (i & 1) + (j & 1), shape), words)
        draw = word >> (8 * (2 * (i >> 3 & 1) + (j >> 3 & 1))).astype(np.uint64) & np.uint64(0xFF)
    else:
        M, N = shape
        bits, row, col = 16, np.arange(M).reshape(-1, 1), np.arange(N)
        words = philox(key, (col // 8, row & 0xFFFFFFFF, row >> 32, last))
        word = np.choose(np.broadcast_to(col % 8 // 2, (M, N)), words)
        draw = word >> (16 * (col & 1)).astype(np.uint64) & np.uint64(0xFFFF)
    k = dropout_threshold(p, bits)
    keep = torch.from_numpy(np.broadcast_to(draw >= k, shape).copy())
    return keep.double() * (2**bits / (2**bits - k) if k < 2**bits else 0.0)


def dropout_threshold(p, bits):
    """k of p ~ k / 2**bits: an element drops where its random integer is below k."""
    return round(p * 2**bits)


def attended(S_q, S_k, causal=False, window=None, q_len=None, kv_len=None, device=None):
    """(S_q, S_k) bool of the pairs that causality, window and lengths allow, and the aligned distance i + shift - j."""
    q_len, kv_len = S_q if q_len is None else int(q_len), S_k if kv_len is None else int(kv_len)
    i, j = torch.arange(S_q, device=device)[:, None], torch.arange(S_k, device=device)
    distance = i + (kv_len - q_len if causal == "bottom_right" else 0) - j
    keep = (i < q_len) & (j < kv_len)
    if causal:
        keep = keep & (distance >= 0)
    left, right = window or (None, None)
    if left is not None:
        keep = keep & (distance <= left)
    if right is not None:
        keep = keep & (distance >= -right)
    return keep, distance


def attention(q, k, v, *, bias=None, mask=None, causal=False, window=None, softcap=0.0, alibi_slopes=None, sinks=None,
              q_lens=None, kv_lens=None, dropout_p=0.0, seed=None, scale=None):  # fmt: skip
    """softmax(softcap(scale * q k^T) + bias - slope * |distance|) v over the allowed pairs -> (o, lse, weights)."""
    B, H, S_q, D = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    keep, distance, past_q, past_k = allowed_pairs(
        B, S_q, k.shape[2], causal, window, q_lens, kv_lens, q.device
    )
    k, v = k.masked_fill(past_k, 0.0), v.masked_fill(past_k, 0.0)  # NaN past a sequence's end must not leak
    s = (D**-0.5 if scale is None else scale) * (q @ k.transpose(-1, -2))
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s + bias if bias is not None else s
    s = s - alibi_slopes.to(s.dtype).reshape(-1, H, 1, 1) * distance.abs() if alibi_slopes is not None else s
    s = s.masked_fill(~(keep if mask is None else keep & mask), -math.inf)
    sink = None if sinks is None else sinks.to(s.dtype).reshape(1, H, 1, 1).masked_fill(past_q, -math.inf)
    p, lse = softmax_with_sink(s, sink)
    dropped = p * dropout_mask(seed, p.shape, dropout_p).to(p) if dropout_p else p
    return dropped @ v, lse, p


def allowed_pairs(B, S_q, S_k, causal, window, q_lens, kv_lens, device=None):
    """What causality, window and lengths allow, (B, 1, S_q, S_k) bool; the distance i + shift - j of each pair from the
    query's aligned position; and which rows (B, 1, S_q, 1) and keys (B, 1, S_k, 1) lie past their sequence's end.
    """
    q_lens, kv_lens = (
        torch.full((B,), S, device=device) if lens is None else lens
        for S, lens in ((S_q, q_lens), (S_k, kv_lens))
    )
    i, j = torch.arange(S_q, device=device)[:, None], torch.arange(S_k, device=device)
    past_q, past_k = i >= q_lens.view(B, 1, 1, 1), j[:, None] >= kv_lens.view(B, 1, 1, 1)
    shift = (kv_lens - q_lens).view(B, 1, 1, 1) if causal == "bottom_right" else 0
    distance = (i + shift - j).expand(B, 1, S_q, S_k)
    left, right = window or (None, None)
    keep = ~past_q & ~past_k.transpose(-1, -2)
    keep = keep & (distance >= 0) if causal else keep
    keep = keep & (distance <= left) if left is not None else keep
    return keep & (distance >= -right) if right is not None else keep, distance, past_q, past_k


def softmax_with_sink(s, sink=None):
    """Softmax over the last dim whose denominator also holds exp(sink); a row of only -inf gives 0 and lse = -inf."""
    sink = s.new_full((1,), -math.inf) if sink is None else sink
    logits = torch.cat([s, sink.expand(*s.shape[:-1], 1)], dim=-1)
    m = logits.detach().amax(-1, keepdim=True)
    e = torch.exp(logits - m.masked_fill(m.isneginf(), 0.0))
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (m + torch.log(total)).masked_fill(empty, -math.inf).squeeze(-1)
    return (e / total)[..., :-1], lse


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """attention of each packed sequence by itself: q (T_q, H, D), k, v (T_k, H_kv, D) -> o (T_q, H, D_v), lse (H, T_q)."""
    q_lens, kv_lens = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    padded = (_pad(q, cu_seqlens_q), _pad(k, cu_seqlens_k), _pad(v, cu_seqlens_k))
    o, lse, _ = attention(*padded, q_lens=q_lens, kv_lens=kv_lens, **options)
    valid = torch.arange(o.shape[2], device=q.device) < q_lens[:, None]
    return o.transpose(1, 2)[valid], lse.transpose(1, 2)[valid].T


def _pad(x, cu_seqlens):
    """(T, H, D) packed -> (B, H, longest, D), zeros past each sequence's end."""
    sequences = [
        x[start:end] for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)
    ]
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).transpose(1, 2)


def attention_decode(q, k_cache, v_cache, cache_lens, *, block_table=None, k_new=None, v_new=None, **options):
    """Bottom-right causal attention of q (B, H, S_q, D) over a cache of which cache_lens (B,) positions are filled.

    Contiguous caches are (B, H_kv, S, D); with block_table (B, n) they are pages (pages, page_size, H_kv, D), written
    and read in table order. k_new, v_new (B, H_kv, S_new, D) are appended to the caches in place first.
    """
    B, lens = q.shape[0], cache_lens.long()
    if k_new is not None:
        at = lens[:, None] + torch.arange(k_new.shape[2], device=q.device)  # (B, S_new) positions
        rows = torch.arange(B, device=q.device)[:, None]
        for cache, new in ((k_cache, k_new), (v_cache, v_new)):
            if block_table is None:
                cache[rows, :, at] = new.transpose(1, 2)
            else:
                cache[block_table[rows, at // cache.shape[1]].long(), at % cache.shape[1]] = new.transpose(
                    1, 2
                )
        lens = lens + k_new.shape[2]
    if block_table is not None:
        k_cache, v_cache = (c[block_table.long()].flatten(1, 2).transpose(1, 2) for c in (k_cache, v_cache))
    q_lens = torch.full((B,), q.shape[2], device=q.device)
    return attention(q, k_cache, v_cache, causal="bottom_right", q_lens=q_lens, kv_lens=lens, **options)[:2]


def softmax(x, dim=-1):
    return stock_softmax(x, dim)


def log_softmax(x, dim=-1):
    return stock_log_softmax(x, dim)


def scaled_masked_softmax(scores, mask=None, scale=1.0, causal=False):
    """softmax(scale * scores) over the attended keys of (..., S_q, S_k); a row with none is 0. Causal is top-left."""
    S_q, S_k = scores.shape[-2:]
    keep = torch.ones(S_q, S_k, dtype=torch.bool, device=scores.device)
    keep = keep.tril() if causal else keep
    keep = keep if mask is None else keep & mask
    return softmax_with_sink((scale * scores).masked_fill(~keep, -math.inf))[0]


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and biased variance over the last dims."""
    dims = tuple(range(-len(normalized_shape), 0))
    y = (x - x.mean(dims, keepdim=True)) * torch.rsqrt(x.var(dims, correction=0, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x, normalized_shape, weight=None, eps=None):
    """x / sqrt(mean(x^2) + eps) * weight; eps defaults to the machine epsilon of the input's dtype, as in torch."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(x.square().mean(tuple(range(-len(normalized_shape), 0)), keepdim=True) + eps)
    return y if weight is None else y * weight


def add_norm(norm, x, residual, normalized_shape, *affine, dropout_p=0.0, seed=None, **options):
    """r = residual + dropout(x), y = norm(r, ...) -> (y, r): what add_layer_norm and add_rms_norm compute.

    The dropout's rows are the norm's: (M, N) with N the product of normalized_shape.
    """
    N = math.prod(normalized_shape)
    mask = dropout_mask(seed, (x.numel() // N, N), dropout_p).to(x).view_as(x) if dropout_p else 1.0
    r = residual + x * mask
    return norm(r, normalized_shape, *affine, **options), r


def add_layer_norm(x, residual, normalized_shape, weight=None, bias=None, eps=1e-5, **options):
    return add_norm(layer_norm, x, residual, normalized_shape, weight, bias, eps, **options)


def add_rms_norm(x, residual, normalized_shape, weight=None, eps=None, **options):
    return add_norm(rms_norm, x, residual, normalized_shape, weight, eps, **options)


def bias_gelu(x, bias=None, approximate="none"):
    """h Phi(h) of h = x + bias, Phi the normal distribution's, or its tanh approximation (arXiv 1606.08415)."""
    h = x if bias is None else x + bias
    if approximate == "tanh":
        return h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2
    return h * torch.special.ndtr(h)


def sinusoidal(position_ids, C, dtype=torch.float64):
    """PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos(same): "Attention Is All You Need", section 3.5."""
    i = torch.arange(C, dtype=torch.float64, device=position_ids.device)
    angle = position_ids[..., None].double() * 10000.0 ** (-(i - i % 2) / C)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos()).to(dtype)


def add_positional_encoding(
    x, table=None, *, position_ids=None, offset=0, scale=1.0, dropout_p=0.0, seed=None
):
    """dropout(scale * x + table[position_ids]) for x (..., S, C); no table means the sinusoidal one."""
    S, C = x.shape[-2:]
    position_ids = torch.arange(S, device=x.device) + offset if position_ids is None else position_ids
    y = scale * x + (sinusoidal(position_ids, C, x.dtype) if table is None else table[position_ids])
    return y * dropout_mask(seed, (y.numel() // C, C), dropout_p).to(y).view_as(y) if dropout_p else y


def embeddings(input_ids, token_table, position_table=None, *, type_ids=None, type_table=None, position_ids=None,
               norm_weight=None, norm_bias=None, eps=1e-12, padding_idx=None, dropout_p=0.0, seed=None):  # fmt: skip
    """dropout(layer_norm(token_table[ids] + type_table[types] + position_table[positions])); the norm and each table but
    the tokens' only where given. Rows of padding_idx get no gradient; absent type_ids are 0, absent positions 0 .. S-1.
    """
    position_ids = (
        torch.arange(input_ids.shape[-1], device=input_ids.device) if position_ids is None else position_ids
    )
    y = F.embedding(input_ids, token_table, padding_idx)
    if type_table is not None:
        y = y + type_table[torch.zeros_like(input_ids) if type_ids is None else type_ids]
    y = y if position_table is None else y + position_table[position_ids]
    y = y if norm_weight is None else layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    C = y.shape[-1]
    return y * dropout_mask(seed, (y.numel() // C, C), dropout_p).to(y).view_as(y) if dropout_p else y


def linear_cross_entropy(
    hidden, weight, targets, *, bias=None, ignore_index=-100, reduction="mean", softcap=0.0
):
    """-log softmax(z)[target], z = softcap * tanh((hidden @ weight.T + bias) / softcap); "mean" is over the targets that
    are not ignore_index, and 0 where there is none.
    """
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = softcap * torch.tanh(z / softcap) if softcap else z
    counts = targets != ignore_index
    picked = stock_log_softmax(z, -1).gather(-1, targets.long().masked_fill(~counts, 0)[..., None])[..., 0]
    losses = -picked.masked_fill(~counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum().clamp(min=1) if reduction == "mean" else losses.sum()
