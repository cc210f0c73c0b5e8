"""Decoding's launcher in CUDA C++: csrc/attention_decode.cu. Same name, arguments and results as kernels/attention_decode.py."""

import torch

from fastattn import backend, cuda
from fastattn.cuda.attention import operands_why_not, readable
from fastattn.kernels.attention_host import choose_splits

KEYS = {64: 128, 128: 64, 192: 64, 256: 64}  # of a tile, by the padded head width


def attention_decode_why_not(q, k_cache, v_cache, *rest):
    """Beyond `cuda.why_not`: 16-bit tensors, no gradient, head dims and caches in pieces of 16 bytes."""
    if backend.needs_grad(q, k_cache, v_cache, *rest):
        return "an input requires grad and decoding has no backward kernel; call it under torch.no_grad(), or use attention"
    if reason := operands_why_not(q, v_cache, "v_cache"):
        return reason
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        *strides, last = cache.stride()
        # Dynamo does not trace the offset; what is compiled is refused by the launch itself
        offset = 0 if torch.compiler.is_compiling() else cache.storage_offset()
        if cache.numel() and (last != 1 or any(s % 8 for s in strides) or offset % 8):
            return (
                f"{name} has strides {cache.stride()} from element {offset}, and a cache is read in place: "
                "it needs rows of unit stride that start on 16 bytes"
            )
    return cuda.why_not(q, k_cache, v_cache, *rest)


def attention_decode_fwd(
    q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks,
    window_left, window_right, softcap, scale, num_splits, allow_tf32,
):  # fmt: skip
    """(o (B, H, S_q, D_v), a view of (B, S_q, H, D_v); lse (B, H, S_q) fp32), after the append of k_new and v_new."""
    q, k_new, v_new = (t if t is None else readable(t) for t in (q, k_new, v_new))
    alibi_slopes = alibi_slopes if alibi_slopes is None else alibi_slopes.float()
    sinks = sinks if sinks is None else sinks.contiguous()  # a number a head
    return _launch(
        cuda.module(q), q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks, window_left, softcap, scale,
        num_splits,
    )  # fmt: skip


def attention_decode_usual(_C, q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, scale):
    """attention_decode_fwd of a call without rules beside its lengths; None where the launch refuses it.

    What attention_decode_why_not and attention_decode_fwd ask of such tensors C asks once more, in a fraction of the time.
    """
    if (
        q.dim() != 4
        or k_cache.dim() != 4
        or v_cache.dim() != 4
        or not 0 < max(q.shape[3], v_cache.shape[3]) <= 256
    ):
        return None
    if any(t is not None and t.is_neg() for t in (q, k_cache, v_cache, k_new, v_new)):
        return None
    try:
        return _launch(
            _C, q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, None, None, -1, 0.0, scale, 0
        )
    except (TypeError, ValueError):
        return None


def _launch(
    _C, q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks, window_left, softcap, scale, num_splits
):  # fmt: skip
    B, H, S_q, D = q.shape
    D_v = v_cache.shape[3]
    o = torch.empty(B, S_q, H, D_v, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, S_q, dtype=torch.float32, device=q.device)
    if not num_splits:
        capacity = k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[1]
        H_kv = k_cache.shape[1 if block_table is None else 2]
        width = next(width for width in KEYS if max(D, D_v) <= width)
        keys = capacity if window_left < 0 else min(capacity, window_left + S_q)
        blocks = B * H_kv * -(-(H // H_kv * S_q) // 16) if H_kv else 0
        num_splits = choose_splits(blocks, -(-keys // KEYS[width]), cuda.sm_count(q.device))
    parts = statistics = None
    if num_splits > 1:
        parts = torch.empty(B, H, S_q, num_splits, D_v, dtype=torch.float32, device=q.device)
        statistics = torch.empty(2, B, H, S_q, num_splits, dtype=torch.float32, device=q.device)
    _C.attention_decode(
        q, k_cache, v_cache, o, lse, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks, parts, statistics,
        num_splits, window_left, softcap, scale,
    )  # fmt: skip
    return o, lse
