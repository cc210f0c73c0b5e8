"""Layer norm and its relatives: rows of width N, as many as make the traffic 1 GiB, and the shapes of real models."""

import functools

import torch
import torch.nn.functional as F

from fastattn import functional, reference
from fastattn.benchmarks.suite import Case, Work, compiled, package

GPU_WIDTHS = (128, 768, 1024, 4096, 8192, 32768, 65536, 262144)


def shapes(device, quick):
    """(M, N) of each case."""
    if device.type == "cpu":
        return [(1, 8), (256, 768)] if quick else [(1, 8), (256, 768), (2048, 1024)]
    one_gib = [(2**28 // N, N) for N in ((4096,) if quick else GPU_WIDTHS)]  # of 16-bit reads and writes
    return [(8192, 768), *one_gib]


def cases(device, quick):
    for M, N in shapes(device, quick):
        yield layer_norm(M, N, torch.float32 if device.type == "cpu" else torch.bfloat16)


def layer_norm(M, N, dtype):
    def make(device):
        x = torch.randn(M, N, device=device, dtype=dtype)
        weight, bias = (torch.randn(N, device=device, dtype=dtype) for _ in range(2))
        return tuple(t.requires_grad_() for t in (x, weight, bias))

    def over_rows(function):
        return lambda x, weight, bias: function(x, (N,), weight, bias)

    liger = package("liger_kernel.transformers.functional")
    size, x = dtype.itemsize, M * N
    return Case(
        op="layer_norm",
        shape=f"M {M}, N {N}",
        dtype=dtype,
        make=make,
        providers={
            "eager": over_rows(F.layer_norm),
            "fastattn": over_rows(functional.layer_norm),
            "compile": compiled(over_rows(F.layer_norm)),
            "liger": liger and functools.partial(liger.liger_layer_norm, eps=1e-5),
        },
        reference=over_rows(reference.layer_norm),
        forward=Work(read=(x + 2 * N) * size, write=x * size),
        backward=Work(read=(2 * x + N) * size, write=(x + 2 * N) * size),
    )
