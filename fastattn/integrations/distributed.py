"""Attention over sequences that several processes hold together: ring and Ulysses, forward and backward.

Every process of a group of W has a part of each sequence, q (B, H, S / W, D), k and v (B, H_kv, S / W, D), and gets its
part of the output. `order` says which part. "contiguous": rank r has the r-th of W. "head_tail": rank r has the r-th of
2 W and the r-th from the end, so that causal attention is equal work for all. `shard` cuts, `unshard` puts together and
`positions` says where the rows of a part stand, for position embeddings.

ring_attention passes keys and values around; nobody ever holds more than two parts of them, and parts of the output are
merged by their log-sum-exp: o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i) (arXiv 2310.01889). Its backward
goes round again with the final o and lse, from which every part's probabilities follow. ulysses_attention exchanges
instead, so that each process has whole sequences for H / W heads, and exchanges back (arXiv 2309.14509).
"""

import math

import torch
import torch.distributed as dist

from fastattn import backend, functional
from fastattn.ops import attention as op

ORDERS = ("contiguous", "head_tail")


def ring_attention(q, k, v, *, causal=False, scale=None, softcap=0.0, group=None, order="contiguous"):
    """attention(q, k, v) of this rank's rows over every rank's keys; see the module for shapes, order and method.

    Each rank sends its keys and values W - 1 times to the next while it computes. causal: False or True; scale and softcap
    as in functional.attention. Parts have one size everywhere, an even one for "head_tail". Other options, dropout among
    them, need more than a part and are ulysses_attention's. Raises ValueError naming the argument.
    """
    rank, W = _member(group)
    _check_parts("ring_attention", q, k, v, order)
    if causal not in (False, True):
        raise ValueError(f"ring_attention: causal is {causal!r}, must be False or True")
    q, k, v, _, _ = op._autocast(q, k, v, None, None)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _Ring.apply(q, k, v, bool(causal), scale, float(softcap), group, order)


def ulysses_attention(q, k, v, *, alibi_slopes=None, sinks=None, group=None, order="contiguous", **options):
    """attention(q, k, v, **options) with heads in place of sequence split between two exchanges; see the module.

    H and H_kv must be multiples of W. alibi_slopes and sinks (H,) are whole, alike on all ranks, and get whole gradients
    only once those are summed over the ranks. options are functional.attention's causal, window, softcap, scale and dropout_p
    (drawn by each rank from its own generator). Raises ValueError or TypeError naming the argument.
    """
    rank, W = _member(group)
    _check_parts("ulysses_attention", q, k, v, order)
    for name, t in (("q", q), ("k", k)):
        if t.shape[1] % W:
            raise ValueError(
                f"ulysses_attention: {name} has {t.shape[1]} heads, which must be a multiple of the {W} ranks; ring_attention has no such limit"
            )
    if unknown := options.keys() - {"causal", "window", "softcap", "scale", "dropout_p"}:
        raise TypeError(f"ulysses_attention: {', '.join(sorted(unknown))} cannot be split between ranks")
    mine = slice(rank * q.shape[1] // W, (rank + 1) * q.shape[1] // W)
    per_head = [t if t is None else t[..., mine] for t in (alibi_slopes, sinks)]
    q, k, v = (_heads_for_rows(t, group, order) for t in (q, k, v))
    o = functional.attention(q, k, v, alibi_slopes=per_head[0], sinks=per_head[1], **options)
    return _rows_for_heads(o, group, order)


def shard(t, dim, *, group=None, order="contiguous"):
    """This rank's part of t along dim, whose size is a multiple of W, for "head_tail" of 2 W."""
    rank, W = _member(group)
    parts = _parts(W, order)
    if t.shape[dim] % parts:
        raise ValueError(f"shard: {t.shape[dim]} rows in dim {dim} do not make {parts} equal parts")
    pieces = t.chunk(parts, dim)
    return torch.cat([pieces[i] for i in _held(rank, W, order)], dim)


def unshard(t, dim, *, group=None, order="contiguous"):
    """The whole of which each rank has `shard`'s part t; gradients are not carried back."""
    _, W = _member(group)
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(W)]
    dist.all_gather(parts, t.detach().contiguous(), group=group)
    return _in_order(torch.cat(parts, dim), dim, W, order)


def positions(length, *, group=None, order="contiguous", device=None):
    """(length,) where this rank's rows stand in the whole sequence, `length` being the size of its part."""
    _, W = _member(group)
    return shard(torch.arange(length * W, device=device), 0, group=group, order=order)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale, softcap, group, order):
        rank, W = _member(group)
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
        kv = torch.cat((k, v), dim=-1)
        for step in range(W):
            arriving = _send_on(kv, group) if step < W - 1 else None
            if work := _work(rank, (rank - step) % W, q.shape[2], causal, order):
                rows, keys, diagonal = work
                k_i, v_i = kv[:, :, keys].split((k.shape[-1], v.shape[-1]), dim=-1)
                options = dict(causal=diagonal, scale=scale, softcap=softcap, return_lse=True)
                part = functional.attention(q[:, :, rows], k_i, v_i, **options)
                o[:, :, rows], lse[:, :, rows] = merge(o[:, :, rows], lse[:, :, rows], *part)
            kv = arriving() if arriving else kv
        o = o.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.given = causal, scale, softcap, group, order
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        causal, scale, softcap, group, order = ctx.given
        rank, W = _member(group)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        kv, arrived = torch.cat((k, v), dim=-1), None
        for step in range(W):
            arriving = _send_on(kv, group) if step < W - 1 else None
            dkv = torch.zeros_like(kv, dtype=lse.dtype)
            if work := _work(rank, (rank - step) % W, q.shape[2], causal, order):
                rows, keys, diagonal = work
                k_i, v_i = kv[:, :, keys].split((k.shape[-1], v.shape[-1]), dim=-1)
                saved = (q[:, :, rows], k_i, v_i, o[:, :, rows], lse[:, :, rows])
                dq_i, dk_i, dv_i = _part_backward(do[:, :, rows], *saved, diagonal, scale, softcap)
                dq[:, :, rows] += dq_i
                dkv[:, :, keys] = torch.cat((dk_i, dv_i), dim=-1).to(dkv.dtype)
            # The gradient of a part of the keys travels with it, and after W steps is home.
            dkv = dkv if arrived is None else dkv + arrived()
            kv, arrived = arriving() if arriving else kv, _send_on(dkv, group)
        dk, dv = arrived().to(k.dtype).split((k.shape[-1], v.shape[-1]), dim=-1)
        return dq.to(q.dtype), dk, dv, *(None,) * 5


def merge(o, lse, o_i, lse_i):
    """(o, lse) over two sets of keys from those over each; lse (B, H, S) natural, -inf where a row attended to nothing."""
    total = torch.logaddexp(lse, lse_i)
    shift = total.masked_fill(total == -math.inf, 0.0)  # -inf less -inf would be NaN
    weighted = (x * (l - shift).exp().unsqueeze(-1) for x, l in ((o, lse), (o_i, lse_i)))  # noqa: E741
    return sum(weighted), total


def _part_backward(do, q, k, v, o, lse, causal, scale, softcap):
    """dq, dk, dv of a part of the keys, where o and lse are those over all: P = exp(S - lse), dS = P (dO V^T - rowsum(dO O))."""
    extras = (None,) * 8
    with torch.enable_grad():  # the question is who has a backward
        chosen = backend.choose(op.OP, op.WHY_NOT, q.detach().requires_grad_(), k, v, extras, False)
    if chosen != "torch":
        options = op._options(q, (q.shape[2], k.shape[2]), causal, None, softcap, 0.0, scale)
        given = (*extras, None, *options, False, False)  # no seed, no gradient of bias or sinks
        return backend.run("attention_bwd", chosen, op.OP, do, None, q, k, v, o, lse.float(), *given)[:3]
    groups = q.shape[1] // k.shape[1]
    q, k, v, o, do = (t.to(lse.dtype) for t in (q, k, v, o, do))
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    q = q * scale
    s, slope = q @ k.mT, 1.0
    if softcap:
        s = torch.tanh(s / softcap)
        s, slope = softcap * s, 1 - s.square()
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -math.inf)
    p = (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * slope
    dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (ds.mT @ q, p.mT @ do))
    return ds @ k * scale, dk, dv


def _work(rank, source, S, causal, order):
    """(rows, keys, diagonal) of a part: which of this rank's S rows see which of source's S keys, or None.

    In "head_tail" order the first half of a lower rank's keys stands before all of ours, its second half after them; the
    keys of a higher rank stand between our halves. A rank's own rows ascend, so that their mask is the usual one.
    """
    everything = slice(0, S)
    if not causal or source == rank:
        return everything, everything, causal
    if order == "head_tail":
        return (
            (everything, slice(0, S // 2), False) if source < rank else (slice(S // 2, S), everything, False)
        )
    return (everything, everything, False) if source < rank else None


def _send_on(t, group):
    """Start sending t to the next rank; calling the result waits for, and gives, what the previous one sent."""
    rank, W = _member(group)
    t, found = t.contiguous(), torch.empty_like(t, memory_format=torch.contiguous_format)
    peers = [dist.get_global_rank(group or dist.group.WORLD, r % W) for r in (rank + 1, rank - 1)]
    pending = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, t, peers[0], group), dist.P2POp(dist.irecv, found, peers[1], group)]
    )

    def arrived(sent=t):  # which must live until it is sent
        for request in pending:
            request.wait()
        return found

    return arrived


class _AllToAll(torch.autograd.Function):
    """y[i] here is x[rank] on rank i; its own gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(y, x.contiguous(), group=group)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _AllToAll.apply(dy, ctx.group), None


def _heads_for_rows(t, group, order):
    """(B, H, S / W, D) -> (B, H / W, S, D)."""
    _, W = _member(group)
    parts = _AllToAll.apply(torch.stack(t.chunk(W, dim=1)), group)
    return _in_order(torch.cat(parts.unbind(), dim=2), 2, W, order)


def _rows_for_heads(t, group, order):
    """(B, H / W, S, D) -> (B, H, S / W, D), laid out as attention's own output."""
    _, W = _member(group)
    pieces = t.chunk(_parts(W, order), dim=2)
    parts = torch.stack([torch.cat([pieces[i] for i in _held(r, W, order)], dim=2) for r in range(W)])
    o = torch.cat(_AllToAll.apply(parts, group).unbind(), dim=1)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def _in_order(t, dim, W, order):
    """The parts of all ranks, one after another along dim, as the sequence they were cut from."""
    if order == "contiguous":
        return t
    pieces, held = t.chunk(2 * W, dim), [i for r in range(W) for i in _held(r, W, order)]
    return torch.cat([pieces[held.index(i)] for i in range(2 * W)], dim)


def _parts(W, order):
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, must be one of {', '.join(ORDERS)}")
    return W if order == "contiguous" else 2 * W


def _held(rank, W, order):
    return (rank,) if order == "contiguous" else (rank, 2 * W - 1 - rank)


def _member(group):
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised; call init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the group")
    return rank, dist.get_world_size(group)


def _check_parts(name, q, k, v, order):
    _parts(1, order)
    op._check_dense(q, k, v, None, None)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{name}: q has {q.shape[2]} rows and k {k.shape[2]}; both are one part of a sequence"
        )
    if order == "head_tail" and q.shape[2] % 2:
        raise ValueError(f'{name}: "head_tail" needs an even number of rows on each rank, q has {q.shape[2]}')
