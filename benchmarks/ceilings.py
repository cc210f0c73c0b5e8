"""What the memory and the tensor cores of this GPU can do, measured in the run that claims a share of it.

    read   sum += a[i]            copy   b[i] = a[i]
    write  b[i] = constant        add    c[i] = a[i] + b[i]

The kernels stream 16-byte vectors, one block of BLOCK elements a program, nothing reused. A rate is the best of ours and
torch's own op of the same traffic, so that a share of it flatters nobody.
"""

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def read_kernel(a_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(a_ptr + offs, mask=offs < n, other=0.0), 0)
    tl.store(out_ptr + tl.program_id(0), total)  # one word a program, or the loads would be removed


@triton.jit
def write_kernel(out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.full((BLOCK,), 1.0, tl.float32), mask=offs < n)


@triton.jit
def copy_kernel(a_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(a_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def add_kernel(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, a + tl.load(b_ptr + offs, mask=offs < n), mask=offs < n)


def streams(device, nbytes):
    """{name: (bytes read, bytes written, [functions that move them])} over fp32 buffers of `nbytes` each."""
    n = nbytes // 4
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    grid, partial = (triton.cdiv(n, BLOCK),), torch.empty(triton.cdiv(n, BLOCK), device=device)
    ours = {"num_warps": 8, "BLOCK": BLOCK}
    return {
        "read": (nbytes, 0, [lambda: read_kernel[grid](a, partial, n, **ours), lambda: torch.sum(a)]),
        "write": (0, nbytes, [lambda: write_kernel[grid](c, n, **ours), lambda: c.fill_(2.0)]),
        "copy": (nbytes, nbytes, [lambda: copy_kernel[grid](a, c, n, **ours), lambda: c.copy_(a)]),
        "add": (2 * nbytes, nbytes, [lambda: add_kernel[grid](a, b, c, n, **ours), lambda: torch.add(a, b, out=c)]),
    }  # fmt: skip
