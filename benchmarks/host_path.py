"""What Python costs before a kernel starts, per call: our ops against torch's own, in one process, on tiny tensors.

The kernels are stubbed: a launcher here allocates its outputs and returns, so this needs no GPU. Triton's own launch (some
microseconds more) is not in these numbers; the `host` column of a run on a GPU has it.
"""

import unittest.mock

import torch
import torch.nn.functional as F

from fastattn import backend, functional
from fastattn.benchmarks.timing import cpu_times, quantiles

# What each launcher would allocate.
STUBS = {
    "layer_norm_fwd": lambda x, *_: (torch.empty_like(x), *x.new_empty((2, x.shape[0]), dtype=torch.float32)),
    "layer_norm_bwd": lambda dy, x, w, *_: (torch.empty_like(x), torch.empty_like(w), torch.empty_like(w)),
    "softmax_fwd": lambda x, *_: torch.empty_like(x),
    "softmax_bwd": lambda dy, y, *_: torch.empty_like(y),
    "attention_fwd": lambda q, k, v, *_: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    "attention_bwd": lambda do, dlse, q, k, v, *_: (
        *(torch.empty_like(t) for t in (q, k, v)),
        *q.new_empty(2, 0),
    ),
}
x, w = torch.randn(4, 64), torch.randn(64)
q = torch.randn(1, 2, 8, 16)
CALLS = {
    "layer_norm": (F.layer_norm, functional.layer_norm, (x, (64,), w, w.clone())),
    "softmax": (F.softmax, getattr(functional, "softmax", None), (x, -1)),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        functional.scaled_dot_product_attention,
        (q, q.clone(), q.clone()),
    ),
}
COLUMNS = ("no grad", "forward", "forward + backward")


def host_paths(seconds=0.5):
    """[{op, of, torch: µs, fastattn: µs, ratio}] for each op and way of calling it."""
    rows = []
    stubs = unittest.mock.patch.object(backend, "launcher", lambda name, *_: STUBS[name])
    compiled = unittest.mock.patch.object(backend, "interpreting", lambda: True)
    with stubs, compiled, backend.use_backend("triton"):
        for op, (stock, ours, inputs) in CALLS.items():
            for of in COLUMNS:
                times = cpu_times(
                    {"torch": _way(stock, inputs, of), "fastattn": _way(ours, inputs, of)}, seconds
                )
                medians = {name: quantiles(samples)[1] for name, samples in times.items()}
                rows.append({"op": op, "of": of, **medians, "ratio": medians["fastattn"] / medians["torch"]})
    return rows


def _way(function, inputs, of):
    """`function` called without a graph, with one, or with one and back through it."""
    leaves = tuple(
        t.clone().requires_grad_(of != "no grad") if isinstance(t, torch.Tensor) else t for t in inputs
    )
    wanted = [t for t in leaves if isinstance(t, torch.Tensor)]
    dy = torch.ones_like(function(*inputs))
    if of == "forward + backward":
        return lambda: torch.autograd.grad(function(*leaves), wanted, dy)
    return lambda: function(*leaves)
