"""Attention's launchers in CUDA C++: csrc/attention.cu. Same names, arguments and results as kernels/attention.py."""

import math

import torch

from fastattn import backend, cuda
from fastattn.kernels.attention_host import (
    bias_gradient,
    bias_gradient_of,
    shape_before_broadcasting,
    sinks_gradient_of,
)

HALF = (torch.float16, torch.bfloat16)
PATTERNS = (None, "plane", "loop", "cols", "rows")  # BiasGradient of csrc/launchers.h
NO_HEADS = "q has no heads and k has some, whose gradients no block would write"


def attention_why_not(q, k, v, extras, return_weights):
    """Beyond `cuda.why_not`: 16-bit tensors, head dims in pieces of 16 bytes, no gradient of slopes."""
    if reason := operands_why_not(q, v, "v"):
        return reason
    if k.shape[1] and not q.shape[1]:
        return NO_HEADS
    if backend.needs_grad(extras[2]):
        return "alibi_slopes requires grad, which only the composite computes"
    if return_weights:
        return "return_weights is not written in CUDA C++ yet"
    return cuda.why_not(q, k, v, *extras)


def operands_why_not(q, v, name):
    """What products of q (..., D) with keys and of probabilities with v (..., D_v), called `name`, need."""
    if q.dtype not in HALF:
        return f"dtype {q.dtype} is not float16 or bfloat16, which the tensor cores multiply"
    D, D_v = q.shape[-1], v.shape[-1]
    if max(D, D_v) > 256 or D % 8 or D_v % 8 or not D or not D_v:
        return f"head dims that are multiples of 8 up to 256 are served, q has {D} and {name} has {D_v}"
    return None


def attention_fwd(
    q, k, v, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed,
    max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, dropout_p, scale, allow_tf32,
):  # fmt: skip
    """(o, lse) of q, k, v in fp16 or bf16; o is a transposed view of (B, S_q, H, D_v)."""
    if cu_seqlens_q is None:
        B, H, S_q, _ = q.shape
        o = q.new_empty(B, S_q, H, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(B, H, S_q, dtype=torch.float32)
    else:  # rows past the last sequence are nobody's
        o = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
    q, k, v = (readable(t) for t in (q, k, v))
    cuda.module(q).attention_fwd(
        q, k, v, o, lse, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k,
        seed if dropout_p > 0 else None, max_seqlen_q, causal, window_left, window_right, softcap, dropout_p, scale,
    )  # fmt: skip
    return o, lse


def attention_usual(_C, q, k, v, causal, scale):
    """attention_fwd of a call without rules but causality, False or True; None where the launch refuses it.

    What attention_why_not and attention_fwd ask of such tensors is asked by C once more, which takes a fraction of the time.
    """
    if not q.dim() == v.dim() == 4 or q.is_neg() or k.is_neg() or v.is_neg():
        return None
    B, H, S_q, D = q.shape
    D_v = v.shape[3]
    if not (H and D and D_v):
        return None
    o = torch.empty(B, S_q, H, D_v, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, S_q, dtype=torch.float32, device=q.device)
    try:
        _C.attention_fwd(
            q, k, v, o, lse, None, None, None, None, None, None, None, None, None, S_q, causal, -1, -1, 0.0, 0.0, scale
        )  # fmt: skip
    except (TypeError, ValueError):
        return None
    return o, lse


def attention_bwd(
    do, dlse, q, k, v, o, lse, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed,
    max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, dropout_p, scale, allow_tf32,
    bias_grad, sinks_grad,
):  # fmt: skip
    """(dq, dk, dv, dbias, dsinks) for do like o and dlse like lse or None; dbias has the bias' shape before broadcasting, and
    one not wanted is (0,).
    """
    packed = cu_seqlens_q is not None
    B = len(cu_seqlens_q) - 1 if packed else q.shape[0]
    H, S_q = q.shape[1], q.shape[0 if packed else 2]
    module = cuda.module(q)
    # expanded ones, as of o.sum(), and slices are copied
    do = readable(do if do.stride(-1) == 1 else do.contiguous())
    dlse = dlse if dlse is None or dlse.stride(-1) == 1 else dlse.contiguous()
    q, k, v, o = (readable(t) for t in (q, k, v, o))
    # rows past the last packed sequence are nobody's
    new = torch.zeros_like if packed else torch.empty_like
    dq, dk, dv = new(q), new(k), new(v)
    tile = module.ATTENTION_STATS_ROWS
    rows = -(-S_q // tile) * tile
    heads = (H, rows + B * tile) if packed else (B, H, rows)
    stats = q.new_empty(*heads, 2, dtype=torch.float32)
    longest = min(max_seqlen_q, S_q) if packed else S_q
    dsinks = q.new_empty(B, H, -(-longest // tile), dtype=torch.float32) if sinks_grad else None
    pattern, dbias, sums = None, q.new_empty(0), None
    if bias_grad and bias.numel():
        pattern, dbias, sums = bias_gradient(bias)
    elif bias_grad:
        dbias = bias.new_zeros(shape_before_broadcasting(bias))
    whole = dbias.expand(bias.shape) if pattern in ("plane", "loop") else None
    module.attention_bwd(
        do, dlse, q, k, v, o, lse, dq, dk, dv, stats, dsinks, whole, sums, PATTERNS.index(pattern), bias, mask, alibi_slopes, sinks,
        q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed if dropout_p > 0 else None, max_seqlen_q, max_seqlen_k, causal,
        window_left, window_right, softcap, dropout_p, scale,
    )  # fmt: skip
    dbias = dbias if sums is None else bias_gradient_of(sums, pattern, bias)
    dsinks = sinks_gradient_of(dsinks, sinks) if sinks_grad else q.new_empty(0)
    return dq, dk, dv, dbias, dsinks


def readable(t):
    """t, or a copy where rows do not start on 16 bytes, which is what one instruction moves."""
    aligned = t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in t.stride()[:-1])
    return t if aligned else t.clone(memory_format=torch.contiguous_format)
