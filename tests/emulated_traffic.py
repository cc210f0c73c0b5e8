"""What the CUDA kernels move, seen by the emulation: python tests/emulated_traffic.py EXTENSION, one built to record.

Prints JSON: {op: {"forward" or "backward": {"moved": bytes of different 32-byte sectors, "least": bytes of the tensors,
"kernels": {kernel: counts, see Traffic in csrc/emulation/engine.h}}}}.
"""

import json
import pathlib
import sys

import torch
from emulated_cases import load

import fastattn
from fastattn import functional as FF

M, N = 1024, 768  # BERT's width, in bf16


def rows(*shape):
    return torch.randn(*shape or (M, N)).bfloat16().requires_grad_()


def ids(limit):
    return torch.randint(limit, (2, M // 2))


STATISTICS = 8 * M  # mean and rstd
# inputs, call, bytes that forward saves, the inputs that backward reads besides what forward saved, whether it reads y
OPS = {
    "softmax": ((rows,), lambda x: FF.softmax(x), 0, (), True),
    "log_softmax": ((rows,), lambda x: FF.log_softmax(x), 0, (), True),
    "layer_norm": (
        (rows, lambda: rows(N), lambda: rows(N)),
        lambda x, w, b: FF.layer_norm(x, (N,), w, b),
        STATISTICS,
        (0, 1),
        False,
    ),
    "rms_norm": (
        (rows, lambda: rows(N)),
        lambda x, w: FF.rms_norm(x, (N,), w),
        STATISTICS // 2,
        (0, 1),
        False,
    ),
    "add_positional_encoding": (
        (lambda: rows(2, M // 2, N), lambda: rows(M // 2, N)),
        lambda x, table: FF.add_positional_encoding(x, table),
        0,
        (),
        False,
    ),
}


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def measured(module):
    kernels = module.traffic()
    moved = 32 * sum(t["sectors_read"] + t["sectors_written"] for t in kernels.values())
    return {"moved": moved, "kernels": kernels}


def main():
    module, found = load(pathlib.Path(sys.argv[1])), {}
    torch.manual_seed(0)
    for name, (make, call, saved, read, reads_y) in OPS.items():
        inputs = [m() for m in make]
        module.traffic()
        with fastattn.use_backend("cuda"):
            y = call(*inputs)
            forward = measured(module) | {"least": size(*inputs, y) + saved}
            dy = torch.randn(y.shape).to(y.dtype)
            grads = torch.autograd.grad(y, inputs, dy)
        least = size(dy, *grads, *(inputs[i] for i in read), *([y] if reads_y else [])) + saved
        found[name] = {"forward": forward, "backward": measured(module) | {"least": least}}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
