"""Layer norm and its relatives: rows of width N, as many as make the traffic 1 GiB, and the shapes of real models."""

import functools

import torch
import torch.nn.functional as F

from fastattn import functional, reference
from fastattn.benchmarks import cudnn_norms
from fastattn.benchmarks.suite import Case, Work, compiled, package

GPU_WIDTHS = (128, 768, 1024, 4096, 8192, 32768, 65536, 262144)


def shapes(device, quick):
    """(M, N) of each case."""
    if device.type == "cpu":
        return [(1, 8), (256, 768)] if quick else [(1, 8), (256, 768), (2048, 1024)]
    one_gib = [(2**28 // N, N) for N in ((4096,) if quick else GPU_WIDTHS)]  # of 16-bit reads and writes
    return [(8192, 768), *one_gib]


def cases(device, quick):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for M, N in shapes(device, quick):
        yield layer_norm(M, N, dtype)
        yield rms_norm(M, N, dtype)
        yield add_layer_norm(M, N, dtype)
        if device.type == "cuda":
            yield add_rms_norm(M, N, dtype)


def rows(M, N, dtype):
    """The cases of the sweep at one shape."""
    for op in (layer_norm, rms_norm, add_layer_norm, add_rms_norm):
        yield op(M, N, dtype)


def tensors(M, N, dtype, wide, narrow):
    """make(device): `wide` tensors (M, N), then `narrow` ones (N,), all wanting gradients."""

    def make(device):
        sizes = [(M, N)] * wide + [(N,)] * narrow
        return tuple(torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes)

    return make


def layer_norm(M, N, dtype):
    def over_rows(function):
        return lambda x, weight, bias: function(x, (N,), weight, bias)

    liger, quack = package("liger_kernel.transformers.functional"), package("quack.rmsnorm")
    size, x = dtype.itemsize, M * N
    return Case(
        op="layer_norm",
        shape=f"M {M}, N {N}",
        dtype=dtype,
        elements=x,
        N=N,
        make=tensors(M, N, dtype, 1, 2),
        providers={
            "eager": over_rows(F.layer_norm),
            "fastattn": over_rows(functional.layer_norm),
            "compile": compiled(over_rows(F.layer_norm)),
            "liger": liger and functools.partial(liger.liger_layer_norm, eps=1e-5),
            "quack": quack and functools.partial(quack_layer_norm, quack),
            "cudnn": cudnn_norms.layer_norm if package("cudnn") else None,
        },
        reference=over_rows(reference.layer_norm),
        forward=Work(read=(x + 2 * N) * size, write=x * size),
        backward=Work(read=(2 * x + N) * size, write=(x + 2 * N) * size),
    )


def rms_norm(M, N, dtype):
    def over_rows(function):
        return lambda x, weight: function(x, (N,), weight, 1e-6)

    liger, quack = package("liger_kernel.transformers.functional"), package("quack")
    size, x = dtype.itemsize, M * N
    return Case(
        op="rms_norm",
        shape=f"M {M}, N {N}",
        dtype=dtype,
        elements=x,
        N=N,
        make=tensors(M, N, dtype, 1, 1),
        providers={
            "eager": over_rows(F.rms_norm),
            "fastattn": over_rows(functional.rms_norm),
            "compile": compiled(over_rows(F.rms_norm)),
            "liger": liger and functools.partial(liger.liger_rms_norm, eps=1e-6),
            "quack": quack and functools.partial(quack.rmsnorm, eps=1e-6),
            "cudnn": cudnn_norms.rms_norm if package("cudnn") else None,
        },
        reference=over_rows(reference.rms_norm),
        forward=Work(read=(x + N) * size, write=x * size),
        backward=Work(read=(2 * x + N) * size, write=(x + N) * size),
    )


def add_layer_norm(M, N, dtype):
    """The residual stream of a pre-norm block: both the sum and its norm are handed on."""

    def eager(x, residual, weight, bias):
        r = residual + x
        return F.layer_norm(r, (N,), weight, bias), r

    size, x = dtype.itemsize, M * N
    return Case(
        op="add_layer_norm",
        shape=f"M {M}, N {N}",
        dtype=dtype,
        elements=x,
        N=N,
        make=tensors(M, N, dtype, 2, 2),
        providers={
            "eager": eager,
            "fastattn": lambda x, r, w, b: functional.add_layer_norm(x, r, (N,), w, b, prenorm=True),
            "compile": compiled(eager),
        },
        reference=lambda x, r, w, b: reference.add_layer_norm(x, r, (N,), w, b),
        forward=Work(read=(2 * x + 2 * N) * size, write=2 * x * size),
        backward=Work(read=(3 * x + N) * size, write=(x + 2 * N) * size),
    )


def add_rms_norm(M, N, dtype):
    """As add_layer_norm, of the RMS."""

    def eager(x, residual, weight):
        r = residual + x
        return F.rms_norm(r, (N,), weight, 1e-6), r

    liger, quack = package("liger_kernel.transformers.functional"), package("quack")
    size, x = dtype.itemsize, M * N
    return Case(
        op="add_rms_norm",
        shape=f"M {M}, N {N}",
        dtype=dtype,
        elements=x,
        N=N,
        make=tensors(M, N, dtype, 2, 1),
        providers={
            "eager": eager,
            "fastattn": lambda x, r, w: functional.add_rms_norm(x, r, (N,), w, 1e-6, prenorm=True),
            "compile": compiled(eager),
            "liger": liger and functools.partial(liger.liger_fused_add_rms_norm, eps=1e-6),
            "quack": quack and (lambda x, r, w: quack.rmsnorm(x, w, residual=r, eps=1e-6, prenorm=True)),
        },
        reference=lambda x, r, w: reference.add_rms_norm(x, r, (N,), w, 1e-6),
        forward=Work(read=(2 * x + N) * size, write=2 * x * size),
        backward=Work(read=(3 * x + N) * size, write=(x + N) * size),
    )


def quack_layer_norm(quack, x, weight, bias):
    """quack has the two passes, with weights in fp32, and leaves autograd to its callers."""

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            y, rstd, mean = quack.layernorm_fwd(x, weight.float(), bias.float(), 1e-5, True, True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, rstd, mean = ctx.saved_tensors
            dx, dw, db = quack.layernorm_bwd(x, weight.float(), dy, rstd, mean)
            return dx, dw.to(weight.dtype), db.to(weight.dtype)

    return LayerNorm.apply(x, weight, bias)
