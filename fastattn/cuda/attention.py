"""Attention's launchers in CUDA C++: csrc/attention.cu. Same names, arguments and results as kernels/attention.py."""

import math

import torch

from fastattn import backend, cuda


def attention_why_not(q, k, v, extras, return_weights):
    """Beyond `cuda.why_not`: 16-bit tensors, head dims in pieces of 16 bytes, no gradient yet."""
    alibi_slopes, sinks = extras[2:4]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype} is not float16 or bfloat16, which the tensor cores multiply"
    D, D_v = q.shape[-1], v.shape[-1]
    if max(D, D_v) > 256 or D % 8 or D_v % 8 or not D or not D_v:
        return f"head dims that are multiples of 8 up to 256 are served, q has {D} and v has {D_v}"
    if backend.needs_grad(q, k, v, extras[0], alibi_slopes, sinks):
        return "something requires grad, and there is no backward in CUDA C++ yet"
    if return_weights:
        return "return_weights is not written in CUDA C++ yet"
    return cuda.why_not(q, k, v, *extras)


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


def readable(t):
    """t, or a copy where rows do not start on 16 bytes, which is what one instruction moves."""
    aligned = t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in t.stride()[:-1])
    return t if aligned else t.clone(memory_format=torch.contiguous_format)
