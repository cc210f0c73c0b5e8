"""Attention at the papers' shapes (16k tokens, width 2048), then what masks, biases and dropout cost on top.

FLOP: 4 B H S_q S_k D forward (half of it causal), 2.5 times as much backward (arXiv 2407.08608, section 4).
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastattn import backend, functional, reference
from fastattn.benchmarks import model
from fastattn.benchmarks.suite import Case, Work, compiled, package, sdpa_backends

TOKENS, WIDTH = 16384, 2048


def cases(device, quick):
    if device.type == "cpu":
        sizes = [(1, 2, 64, 32)] if quick else [(1, 2, 64, 32), (2, 4, 256, 64)]
        for size in sizes:
            yield attention(*size, torch.float32, causal=True)
        yield attention(*sizes[-1], torch.float32, extra="bias")
        yield attention(*sizes[-1], torch.float32, extra="mask")
        return
    for D in (128,) if quick else (64, 128, 256):
        for S in (1024, 8192) if quick else (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (True,) if quick else (True, False):
                yield attention(TOKENS // S, WIDTH // D, S, D, torch.bfloat16, causal=causal)
    for B, extra in ((4, "mask"), (1, "bias"), (4, "dropout")):
        yield attention(B, 16, 4096, 128, torch.bfloat16, extra=extra)


def attention(B, H, S, D, dtype, causal=False, extra=None):
    """extra: "mask" (B, 1, 1, S) of padding, "bias" (1, H, S, S) with its gradient, "dropout" of 0.1, or None."""

    def make(device):
        # views of one packed projection, as a model has them
        packed = torch.randn(B, S, 3, H, D, device=device, dtype=dtype)
        inputs = [t.transpose(1, 2).requires_grad_() for t in packed.unbind(2)]
        if extra == "mask":
            lengths = torch.randint(S // 2, S + 1, (B, 1, 1, 1), device=device)
            inputs.append(torch.arange(S, device=device) < lengths)
        if extra == "bias":
            inputs.append(torch.randn(1, H, S, S, device=device, dtype=dtype, requires_grad=True))
        return tuple(inputs)

    p = 0.1 if extra == "dropout" else 0.0

    def stock(q, k, v, attn_mask=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, p, causal)

    def ours(q, k, v, attn_mask=None):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask, p, causal)

    def specification(q, k, v, attn_mask=None):
        given = {} if extra in (None, "dropout") else {extra: attn_mask}
        seed = backend.draw_seed(q) if p else None
        return reference.attention(q, k, v, causal=causal, dropout_p=p, seed=seed, **given)[0]

    item, scores = dtype.itemsize, S * S
    one = B * H * S * D * item
    side = H * scores * item if extra == "bias" else 0
    flops = 4 * B * H * scores * D // (2 if causal else 1)
    stock_by_name = sdpa_backends(stock)
    if B * H * scores * 4 >= 2**33:
        del stock_by_name[
            "sdpa math"
        ]  # keeps several matrices of this size, and all providers stay in memory together
    whole = B * H * scores * 8 < 2**31  # the reference holds several float64 tensors of this size
    return Case(
        op="attention",
        shape=f"B {B}, H {H}, S {S}, D {D}"
        + (", causal" if causal else "")
        + (f", {extra}" if extra else ""),
        dtype=dtype,
        make=make,
        providers={"eager": stock, "fastattn": ours, **stock_by_name, **_peers(S, causal, extra)},
        reference=specification,
        forward=Work(read=3 * one + side, write=one, flops=flops),
        backward=Work(read=5 * one + side, write=3 * one + side, flops=flops * 5 // 2),
        elements=B * H * S * D,
        N=S,
        predicted=predicted(D, dtype, extra),
        part=None if whole else lambda t: t[:1, :1],  # a bias has B = 1, so its gradient has no other share
        random=extra == "dropout",
    )


def predicted(D, dtype, extra):
    """What the unit model says of the Triton tile, which it knows for 16-bit inputs on Hopper."""
    if dtype.itemsize > 2 or not backend.triton_found():
        return {}
    from fastattn.kernels.attention import TILES

    tile = next(row for limit, row in TILES["fwd", "rich" if extra else "plain"] if D <= limit)
    return {"fastattn triton": model.forward_step(tile["BLOCK_M"], tile["BLOCK_N"], D).bound()[1]}


def _peers(S, causal, extra):
    """FlexAttention, and xformers and flash-attn where installed; they take no mask or bias in this form."""
    if extra:
        return {}
    flex, masks = compiled(flex_attention), {}

    def flexible(q, k, v):
        if causal and q.device not in masks:
            below = lambda b, h, m, n: m >= n  # noqa: E731
            masks[q.device] = create_block_mask(below, None, None, S, S, device=q.device)
        return flex(q, k, v, block_mask=masks.get(q.device))

    def by_sequence(function):
        """(B, H, S, D) around a function of (B, S, H, D)."""
        return lambda *qkv: function(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)

    found = {"flex": flexible}
    if xformers := package("xformers.ops"):
        bias = xformers.LowerTriangularMask() if causal else None
        found["xformers"] = by_sequence(
            lambda q, k, v: xformers.memory_efficient_attention(q, k, v, attn_bias=bias)
        )
    if flash := package("flash_attn"):
        found["flash-attn"] = by_sequence(lambda q, k, v: flash.flash_attn_func(q, k, v, causal=causal))
    return found
