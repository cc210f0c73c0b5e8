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


# Whole tiles of every kernel of the width, several on each side; grouped heads.
B, H, H_KV, S = 1, 2, 1, 256
CACHED, CAPACITY, SPLITS = 192, 256, 2


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def measured(module):
    kernels = module.traffic()
    moved = 32 * sum(t["sectors_read"] + t["sectors_written"] for t in kernels.values())
    return {"moved": moved, "kernels": kernels}


def attention(module, D, causal):
    """Each kernel of the backward is charged for its own reading: o, do and lse for delta, all but o for dk and dv and for dq."""
    q, k, v = rows(B, H, S, D), rows(B, H_KV, S, D), rows(B, H_KV, S, D)
    o = FF.attention(q, k, v, causal=causal)
    statistics = B * H * S
    forward = measured(module) | {"least": size(q, k, v, o) + 4 * statistics}
    do = torch.randn(o.shape).bfloat16()
    grads = torch.autograd.grad(o, (q, k, v), do)
    delta, products = size(o, do) + 12 * statistics, size(q, k, v, do) + 8 * statistics
    least = delta + 2 * products + size(*grads)
    return {"forward": forward, "backward": measured(module) | {"least": least}}


def decode(module, D, paged):
    """A cache that is filled in part; the results of its splits are written and read once."""
    q, new = torch.randn(B, H, 1, D).bfloat16(), torch.randn(2, B, H_KV, 1, D).bfloat16()
    cache = torch.randn(2, B, H_KV, CAPACITY, D).bfloat16()
    table = None
    if paged:
        cache = (
            cache.view(2, B, H_KV, CAPACITY // 32, 32, D).transpose(2, 3).transpose(3, 4)[:, 0].contiguous()
        )
        table = torch.randperm(CAPACITY // 32, dtype=torch.int32)[None]
    lens = torch.full((B,), CACHED - 1, dtype=torch.int32)
    o = FF.attention_decode(q, *cache, lens, block_table=table, k_new=new[0], v_new=new[1], num_splits=SPLITS)
    appended = 2 * size(new)
    splits = 2 * SPLITS * 4 * B * H * (D + 2)
    least = size(q, o) + 4 * B * H + appended + 2 * 2 * B * H_KV * CACHED * D + splits
    return {"forward": measured(module) | {"least": least}}


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
    with fastattn.use_backend("cuda"):
        for D in (64, 128):
            found[f"attention, D = {D}"] = attention(module, D, False)
            for paged in (False, True):
                found[f"attention_decode, D = {D}{', pages' * paged}"] = decode(module, D, paged)
        found["attention, D = 64, causal"] = attention(module, 64, True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
