"""What Python costs before a kernel starts, per call: our ops against torch's own, in one process, on tiny tensors.

On a GPU the calls are whole ones, launches included, on tensors so small that the device never is what is waited for. Without one
the kernels are stubbed. Backend cuda is the emulated extension with its launches left out: Python,
the boundary and the checks in C are those of a GPU, cudaLaunchKernel (2 µs) and the look-up of the stream are not there.
Backend triton has launchers here that allocate their outputs and return, without Triton's own launch (some microseconds
more). The `host` column of a run on a GPU has all of it.
"""

import contextlib
import unittest.mock

import torch
import torch.nn.functional as F

from fastattn import backend, cuda, functional
from fastattn.benchmarks.timing import cpu_times, quantiles

# What each launcher would allocate.
STUBS = {
    "layer_norm_fwd": lambda x, *_: (torch.empty_like(x), torch.empty(2 * x.shape[0])),
    "layer_norm_bwd": lambda dy, x, w, *_: (torch.empty_like(x), torch.empty_like(w), torch.empty_like(w)),
    "softmax_fwd": lambda x, *_: torch.empty_like(x),
    "softmax_bwd": lambda dy, y, *_: torch.empty_like(y),
    "attention_fwd": lambda q, k, v, *_: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    "attention_bwd": lambda do, dlse, q, k, v, *_: (
        *(torch.empty_like(t) for t in (q, k, v)),
        *q.new_empty(2, 0),
    ),
    "attention_decode_fwd": lambda q, *_: (
        torch.empty_like(q),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    ),
}
x, w = torch.randn(4, 64), torch.randn(64)
q = torch.randn(1, 2, 8, 16).bfloat16()  # which every backend serves
lens = torch.tensor([5], dtype=torch.int32)
CALLS = {
    "layer_norm": (F.layer_norm, functional.layer_norm, (x, (64,), w, w.clone())),
    "softmax": (F.softmax, getattr(functional, "softmax", None), (x, -1)),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        functional.scaled_dot_product_attention,
        (q, q.clone(), q.clone()),
    ),
    "attention": (
        F.scaled_dot_product_attention,
        functional.attention,
        (q, q.clone(), q.clone()),
    ),
    "attention_decode": (
        lambda q, k, v, lens: F.scaled_dot_product_attention(q, k, v),
        functional.attention_decode,
        (q[:, :, :1].clone(), q.clone(), q.clone(), lens),
    ),
}
COLUMNS = ("no grad", "forward", "forward + backward")


def host_paths(seconds=0.5, device="cpu"):
    """[{backend, op, of, torch: µs, fastattn: µs, ratio}] for each backend, op and way of calling it."""
    ways = {"cuda": launches_left_out, "triton": _stub_launchers}
    if torch.device(device).type == "cuda":
        ways = dict.fromkeys(ways, lambda: contextlib.nullcontext(True))
    rows, threads = [], torch.get_num_threads()
    # lengths, whose values are looked at where they lie on the CPU
    unread = unittest.mock.patch.object(backend, "readable", lambda t: False)
    torch.set_num_threads(1)  # torch's own ops would wake a pool of them for these few numbers
    for name, stubbed in ways.items():
        for op, (stock, ours, inputs) in CALLS.items():
            inputs = tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in inputs)
            with stubbed() as possible, unread, backend.use_backend(name):
                if not (possible and _serves(ours, inputs)):
                    continue
                for of in COLUMNS[:1] if op == "attention_decode" else COLUMNS:
                    times = cpu_times(
                        {"torch": _way(stock, inputs, of), "fastattn": _way(ours, inputs, of)}, seconds
                    )
                    medians = {who: quantiles(samples)[1] for who, samples in times.items()}
                    ratio = medians["fastattn"] / medians["torch"]
                    rows.append({"backend": name, "op": op, "of": of, **medians, "ratio": ratio})
    torch.set_num_threads(threads)
    return rows


def _serves(ours, inputs):
    try:
        ours(*inputs)
    except NotImplementedError:
        return False
    return True


@contextlib.contextmanager
def launches_left_out():
    if cuda.not_emulated():
        yield False
        return
    extension = cuda.extension("_C_emulated")
    extension.leave_out_launches(True)
    try:
        yield True
    finally:
        extension.leave_out_launches(False)


@contextlib.contextmanager
def _stub_launchers():
    stubs = unittest.mock.patch.object(backend, "launcher", lambda name, *_: STUBS[name])
    with stubs, unittest.mock.patch.object(backend, "interpreting", lambda: True):
        yield True


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
