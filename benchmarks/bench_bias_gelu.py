"""Bias and GELU: the inner widths of real models' MLPs, and as many rows as make the traffic 1 GiB."""

import functools

import torch
import torch.nn.functional as F

from fastattn import functional, reference
from fastattn.benchmarks.suite import Case, Work, compiled

GPU_WIDTHS = (1536, 3072, 4096, 6400, 16384)


def shapes(device, quick):
    """(M, N) of each case."""
    if device.type == "cpu":
        return [(256, 768)] if quick else [(256, 768), (2048, 3072)]
    one_gib = [(2**28 // N, N) for N in ((3072,) if quick else GPU_WIDTHS)]  # of 16-bit reads and writes
    return [(8192, 3072), *one_gib]


def cases(device, quick):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for M, N in shapes(device, quick):
        for approximate in ("none", "tanh"):
            yield bias_gelu(M, N, dtype, approximate)


def bias_gelu(M, N, dtype, approximate):
    def make(device):
        sizes = (M, N), (N,)
        return tuple(torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes)

    def eager(x, bias):
        return F.gelu(x + bias, approximate=approximate)

    size, x = dtype.itemsize, M * N
    return Case(
        op="bias_gelu",
        shape=f"M {M}, N {N}, {'erf' if approximate == 'none' else approximate}",
        dtype=dtype,
        make=make,
        providers={
            "eager": eager,
            "fastattn": functools.partial(functional.bias_gelu, approximate=approximate),
            "compile": compiled(eager),
        },
        reference=functools.partial(reference.bias_gelu, approximate=approximate),
        forward=Work(read=(x + N) * size, write=x * size),
        backward=Work(read=(2 * x + N) * size, write=(x + N) * size),
    )
