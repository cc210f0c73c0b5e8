"""The loop of linear_cross_entropy over chunks of tokens, which its Triton kernel and stock torch share.

    z = hidden @ weight.T + bias,   dhidden = dz @ weight,   dweight = dz.T @ hidden,   dbias = sum_m dz

A chunk's logits are one product in hidden's dtype. `rows` turns them into losses and, in place, into their gradient dz,
which two more products take at once: nothing of (M, V) exists. One buffer serves all chunks; its rows are padded to 64
bytes, so that an odd vocabulary costs neither the products nor the kernel their aligned accesses.
"""

import torch

SMALLEST_CHUNK = 2**22  # bytes of logits below which launches would cost more than the products


def chunk_rows(V, C, itemsize):
    """Tokens a chunk: so many that its logits take as many bytes as the fp32 gradient of the weight, which exists anyway."""
    rows = max(4 * C // itemsize, SMALLEST_CHUNK // (V * itemsize), 1)
    return rows // 128 * 128 or rows  # whole tiles of a product


@torch.no_grad()  # out= refuses inputs that require grad, which the torch op may be given
def over_chunks(
    rows, hidden, weight, bias, targets, dloss, ignore_index, softcap, hidden_grad, weight_grad, bias_grad
):
    """losses (M,), and dhidden (M, C), dweight (V, C), dbias (V,) where asked for, else (0,).

    hidden (M, C), weight (V, C), bias (V,), targets (M,), dloss (M,), each row's factor of the gradients, or None for 1.
    rows(logits, targets, dloss, losses, ignore_index, softcap, grad) handles one chunk. Losses, dweight and dbias are fp32
    (float64 for such inputs), dhidden is like hidden.
    """
    (M, C), V, dtype = hidden.shape, weight.shape[0], hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    losses = hidden.new_empty(M, dtype=wide)
    dhidden = hidden.new_empty((M, C) if hidden_grad else 0)
    dweight = hidden.new_zeros((V, C) if weight_grad else 0, dtype=wide)
    dbias = hidden.new_zeros(V if bias_grad else 0, dtype=wide)
    step, grad = min(chunk_rows(V, C, dtype.itemsize), max(M, 1)), hidden_grad or weight_grad or bias_grad
    aligned = 64 // dtype.itemsize
    buffer = hidden.new_empty(step, (V + aligned - 1) // aligned * aligned)
    if hidden.is_cpu:
        buffer[:, V:] = 0  # oneDNN's bf16 product with AMX reads beyond the row's end, and 0 times NaN is NaN
    for start in range(0, M, step):
        h = hidden[start : start + step]
        z = buffer[: h.shape[0], :V]
        if bias is None:
            torch.mm(h, weight.t(), out=z)
        else:
            torch.addmm(bias, h, weight.t(), out=z)
        chunk = slice(start, start + step)
        rows(
            z,
            targets[chunk],
            None if dloss is None else dloss[chunk],
            losses[chunk],
            ignore_index,
            softcap,
            grad,
        )
        if hidden_grad:
            torch.mm(z, weight, out=dhidden[chunk])
        if weight_grad and dtype == wide:
            dweight.addmm_(z.t(), h)
        elif weight_grad:
            # A 16-bit product of this chunk, summed in fp32; a sixteenth of a float16 one, which thousands of tokens with
            # one target could make overflow.
            part = 16 if dtype == torch.float16 else 1
            dweight.add_(torch.mm(z.t(), h / part), alpha=part)
        if bias_grad:
            dbias += z.sum(0, dtype=wide)
    return losses, dhidden, dweight, dbias
