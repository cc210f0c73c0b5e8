"""One new query a sequence over a long cache: the cache is read once, so the share of the read rate is what counts."""

import torch
import torch.nn.functional as F

from fastattn import functional, reference
from fastattn.benchmarks.suite import Case, Work, package, sdpa_backends


def cases(device, quick):
    if device.type == "cpu":
        yield decode(2, 4, 2, 256, 32, torch.float32)
        return
    sizes = (
        [(8, 32, 8, 8192)]
        if quick
        else [(1, 32, 8, 8192), (8, 32, 8, 8192), (32, 32, 8, 16384), (64, 32, 32, 4096)]
    )
    for B, H, H_kv, S in sizes:
        yield decode(B, H, H_kv, S, 128, torch.bfloat16)
        yield decode(B, H, H_kv, S, 128, torch.bfloat16, page_size=64)


def decode(B, H, H_kv, S, D, dtype, page_size=None):
    def make(device):
        q = torch.randn(B, H, 1, D, device=device, dtype=dtype)
        lens = torch.full((B,), S, device=device, dtype=torch.int32)
        if page_size is None:
            return q, *(torch.randn(B, H_kv, S, D, device=device, dtype=dtype) for _ in range(2)), lens
        n = S // page_size
        pages = (torch.randn(B * n, page_size, H_kv, D, device=device, dtype=dtype) for _ in range(2))
        return q, *pages, lens, torch.randperm(B * n, device=device).view(B, n).int()

    def gathered(cache, table):
        return cache if table is None else cache[table.long()].flatten(1, 2).transpose(1, 2)

    def stock(q, k, v, lens, table=None):  # the cache is full, so no mask is needed
        return F.scaled_dot_product_attention(q, gathered(k, table), gathered(v, table), enable_gqa=H != H_kv)

    def of(function):
        return lambda q, k, v, lens, table=None: function(q, k, v, lens, block_table=table)

    peers = {} if page_size else sdpa_backends(stock)
    if flash := package("flash_attn"):
        peers["flash-attn"] = lambda q, k, v, lens, table=None: flash.flash_attn_with_kvcache(
            q.transpose(1, 2), *(t if table is not None else t.transpose(1, 2) for t in (k, v)), cache_seqlens=lens,
            block_table=table, causal=True,
        ).transpose(1, 2)  # fmt: skip
    cache, new = 2 * B * H_kv * S * D * dtype.itemsize, B * H * D * dtype.itemsize
    return Case(
        op="attention_decode",
        shape=f"B {B}, H {H}/{H_kv}, S {S}, D {D}" + (f", pages of {page_size}" if page_size else ""),
        dtype=dtype,
        elements=B * H * D,
        N=S,
        make=make,
        providers={"eager": stock, "fastattn": of(functional.attention_decode), **peers},
        reference=lambda *inputs: of(reference.attention_decode)(*inputs)[0],
        forward=Work(read=cache + new, write=new),
    )
