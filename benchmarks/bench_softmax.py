"""Softmax over rows of width N, as many as make the traffic 1 GiB, and the causal softmax of attention scores."""

import functools

import torch
import torch.nn.functional as F

from fastattn import functional, reference
from fastattn.benchmarks.suite import Case, Work, compiled, package

GPU_WIDTHS = (128, 1024, 4096, 8192, 32768, 65536, 262144)


def cases(device, quick):
    if device.type == "cpu":
        rows, scores = [(1, 8), (256, 1024)] if quick else [(1, 8), (256, 1024), (64, 32768)], [(2, 4, 128)]
    else:
        rows = [
            (2**28 // N, N) for N in ((4096,) if quick else GPU_WIDTHS)
        ]  # 1 GiB of 16-bit reads and writes
        scores = [(4, 16, 2048)]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for M, N in rows:
        yield softmax(M, N, dtype)
        yield softmax(M, N, dtype, log=True)
    for B, H, S in scores:
        yield causal(B, H, S, dtype)


def rows(M, N, dtype):
    """The cases of the sweep at one shape."""
    yield softmax(M, N, dtype)
    yield softmax(M, N, dtype, log=True)
    yield masked(M, N, dtype)


def softmax(M, N, dtype, log=False):
    name = "log_softmax" if log else "softmax"
    over_rows = lambda function: functools.partial(function, dim=-1)  # noqa: E731
    stock = over_rows(getattr(F, name))
    peers = {"compile": compiled(stock)}
    if not log:
        liger, quack = package("liger_kernel.transformers.functional"), package("quack")
        peers |= {"liger": liger and liger.liger_softmax, "quack": quack and quack.softmax}
    size = M * N * dtype.itemsize
    return Case(
        op=name,
        shape=f"M {M}, N {N}",
        dtype=dtype,
        elements=M * N,
        N=N,
        make=lambda device: (torch.randn(M, N, device=device, dtype=dtype, requires_grad=True),),
        providers={"eager": stock, "fastattn": over_rows(getattr(functional, name)), **peers},
        reference=over_rows(getattr(reference, name)),
        forward=Work(read=size, write=size),
        backward=Work(read=2 * size, write=size),
    )


def causal(B, H, S, dtype):
    scale = 0.125

    def eager(scores):
        above = torch.ones(S, S, dtype=torch.bool, device=scores.device).triu(1)
        return F.softmax((scores * scale).masked_fill(above, float("-inf")), -1)

    attended = B * H * S * (S + 1) // 2 * dtype.itemsize  # what lies above the diagonal need not be read
    whole = B * H * S * S * dtype.itemsize
    return Case(
        op="scaled_masked_softmax",
        shape=f"B {B}, H {H}, S {S}, causal",
        dtype=dtype,
        elements=B * H * S * S,
        N=S,
        make=lambda device: (torch.randn(B, H, S, S, device=device, dtype=dtype, requires_grad=True),),
        providers={
            "eager": eager,
            "fastattn": lambda scores: functional.scaled_masked_softmax(scores, scale=scale, causal=True),
            "compile": compiled(eager),
        },
        reference=lambda scores: reference.scaled_masked_softmax(scores, scale=scale, causal=True),
        forward=Work(read=attended, write=whole),
        backward=Work(read=2 * attended, write=whole),
    )


def masked(M, N, dtype):
    """Scores of which a boolean mask, one for all rows, hides the last quarter."""
    scale = 0.125

    def make(device):
        attend = torch.arange(N, device=device) < max(1, N - N // 4)
        return torch.randn(M, N, device=device, dtype=dtype, requires_grad=True), attend

    def eager(scores, attend):
        return F.softmax((scores * scale).masked_fill(~attend, float("-inf")), -1)

    attended, whole = M * max(1, N - N // 4) * dtype.itemsize, M * N * dtype.itemsize
    return Case(
        op="scaled_masked_softmax",
        shape=f"M {M}, N {N}, mask",
        dtype=dtype,
        elements=M * N,
        N=N,
        make=make,
        providers={
            "eager": eager,
            "fastattn": lambda scores, attend: functional.scaled_masked_softmax(scores, attend, scale=scale),
            "compile": compiled(eager),
        },
        reference=lambda scores, attend: reference.scaled_masked_softmax(scores, attend, scale=scale),
        forward=Work(read=attended, write=whole),
        backward=Work(read=2 * attended, write=whole),
    )
