"""The head of a language model and its loss: alone, and with the gradients of its input and its weight.

Gradients are a case of their own rather than a backward pass: ours computes them in forward, from logits that it then
forgets, and its backward only scales them, so that neither pass by itself compares with torch's.
"""

import torch
import torch.nn.functional as F

from fastattn import functional, reference
from fastattn.benchmarks.suite import Case, Work, compiled, package


def cases(device, quick):
    if device.type == "cpu":
        shapes, dtype = [(512, 64, 256)] if quick else [(512, 64, 256), (256, 128, 50257)], torch.float32
    else:
        # GPT-2 small at 16 x 1024 tokens, its largest sister, and BERT's head on 15 % of 32 x 512 tokens
        shapes = [(16384, 768, 50257), (8192, 1600, 50257), (2458, 768, 30522)]
        shapes, dtype = shapes[:1] if quick else shapes, torch.bfloat16
    for M, C, V in shapes:
        yield loss(M, C, V, dtype)
        yield gradients(M, C, V, dtype)


def eager(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def make(M, C, V, dtype):
    def tensors(device):
        hidden = torch.randn(M, C, device=device, dtype=dtype)
        weight = torch.randn(V, C, device=device) * C**-0.5
        return hidden, weight.to(dtype), torch.randint(V, (M,), device=device)

    return tensors


def providers():
    liger = package("liger_kernel.transformers.functional")
    return {
        "eager": eager,
        "fastattn": functional.linear_cross_entropy,
        "compile": compiled(eager),
        "liger": liger and liger.liger_fused_linear_cross_entropy,
    }


def loss(M, C, V, dtype):
    return Case(
        op="linear_cross_entropy",
        shape=f"M {M}, C {C}, V {V}",
        dtype=dtype,
        make=make(M, C, V, dtype),
        providers=providers(),
        reference=reference.linear_cross_entropy,
        forward=Work(read=(M + V) * C * dtype.itemsize + 8 * M, write=4, flops=2 * M * V * C),
    )


def gradients(M, C, V, dtype):
    def with_gradients(function):
        def call(hidden, weight, targets):
            with torch.enable_grad():
                hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
                total = function(hidden, weight, targets)
                return total.detach(), *torch.autograd.grad(total, (hidden, weight))

        return call

    size = dtype.itemsize
    return Case(
        op="linear_cross_entropy and gradients",
        shape=f"M {M}, C {C}, V {V}",
        dtype=dtype,
        make=make(M, C, V, dtype),
        providers={name: function and with_gradients(function) for name, function in providers().items()},
        reference=with_gradients(reference.linear_cross_entropy),
        forward=Work(read=(M + V) * C * size + 8 * M, write=(M + V) * C * size, flops=6 * M * V * C),
    )
