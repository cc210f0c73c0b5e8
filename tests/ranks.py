"""Started twice by test_distributed.py: checks that need two processes, each a function here, its outcome printed by rank 0."""

import os
import sys
import traceback

import torch
import torch.distributed as dist

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import fastattn
from fastattn import backend, check, functional, reference
from fastattn.integrations import distributed

W = 2
CHECKS = {}


def case(**cases):
    def add(function):
        for name, arguments in cases.items() or [("", ())]:
            CHECKS[f"{function.__name__} {name}".strip()] = (function, arguments)
        return function

    return add


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def operands(H=4, H_kv=2, S=16, D=8, D_v=8, dtype=torch.float32):
    shapes = ((2, H, S, D), (2, H_kv, S, D), (2, H_kv, S, D_v), (2, H, S, D_v))
    return [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def over_the_ranks(function, q, k, v, do, order, **options):
    """The whole output and gradients from parts on the two ranks."""
    parts = [distributed.shard(t, 2, order=order).requires_grad_() for t in (q, k, v)]
    o = function(*parts, order=order, **options)
    o.backward(distributed.shard(do, 2, order=order))
    return [distributed.unshard(t, 2, order=order) for t in (o, *(p.grad for p in parts))]


def alone(q, k, v, do, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    o = reference.attention(*leaves, **options)[0]
    o.backward(do.to(dtype))
    return [o, *(t.grad for t in leaves)]


def same(q, k, v, do, function, order, **options):
    got = over_the_ranks(function, q, k, v, do, order, **options)
    base, exact = (alone(q, k, v, do, dtype, **options) for dtype in (q.dtype, torch.float64))
    names = ("o", "dq", "dk", "dv")
    problems = [check.compare(n, *three) for n, *three in zip(names, got, base, exact, strict=True)]
    assert not any(problems), problems


ATTENTION = {
    f"{kind} {order}{' causal' * causal}": (kind, order, causal)
    for kind in ("ring_attention", "ulysses_attention")
    for order in distributed.ORDERS
    for causal in (False, True)
}


@case(**ATTENTION)
def attends(kind, order, causal):
    same(*operands(), getattr(distributed, kind), order, causal=causal)


@case(ring=("ring_attention",), ulysses=("ulysses_attention",))
def softcap_scale_and_two_head_dims(kind):
    same(*operands(D_v=12), getattr(distributed, kind), "head_tail", causal=True, softcap=2.0, scale=0.7)


@case(contiguous=("contiguous",), head_tail=("head_tail",))
def ulysses_with_window_and_sinks(order):
    q, k, v, do = operands()
    sinks = drawn(4, seed=9)
    options = dict(causal=True, window=(5, 0), sinks=sinks)
    same(q, k, v, do, distributed.ulysses_attention, order, **options)


@case(ring=("ring_attention",), ulysses=("ulysses_attention",))
def on_the_kernels(kind):
    before = backend.calls["attention", "triton"]
    with fastattn.use_backend("triton"):
        same(*operands(), getattr(distributed, kind), "head_tail", causal=True)
    assert backend.calls["attention", "triton"] > before


@case(ring=("ring_attention",), ulysses=("ulysses_attention",))
def in_16_bits(kind):
    same(*operands(dtype=torch.bfloat16), getattr(distributed, kind), "head_tail", causal=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name, (function, arguments) in CHECKS.items():
        try:
            function(*arguments)
            outcome = "ok"
        except Exception:
            outcome = traceback.format_exc()
        outcomes = [None] * W
        dist.all_gather_object(outcomes, outcome)
        if dist.get_rank() == 0:
            wrong = "\n".join(o for o in outcomes if o != "ok")
            print(f"{name}: {'FAILED ' + wrong if wrong else 'ok'}", flush=True)
    dist.destroy_process_group()
