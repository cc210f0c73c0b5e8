"""Attention over sequences that several processes hold together: ring and Ulysses, forward and backward.

Every process of a group of W has a part of each sequence, q (B, H, S / W, D), k and v (B, H_kv, S / W, D), and gets its
part of the output. `order` says which part. "contiguous": rank r has the r-th of W. "head_tail": rank r has the r-th of
2 W and the r-th from the end, so that causal attention is equal work for all. `shard` cuts, `unshard` puts together and
`positions` says where the rows of a part stand, for position embeddings.

ring_attention passes keys and values around; nobody ever holds more than two parts of them, and parts of the output are
merged by their log-sum-exp: o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i) (arXiv 2310.01889), a sink being
a first lse whose o is 0. Its backward goes round again with the final o and lse, from which every part's probabilities
follow. A window is cut into the rectangles of rows and keys which it leaves something of. ulysses_attention exchanges
instead, so that each process has whole sequences for H / W heads, and exchanges back (arXiv 2309.14509).
"""

import dataclasses
import math

import torch
import torch.distributed as dist

from fastattn import backend, functional, reference
from fastattn.ops import attention as op

ORDERS = ("contiguous", "head_tail")


def ring_attention(q, k, v, *, causal=False, window=None, softcap=0.0, alibi_slopes=None, sinks=None, q_lens=None, kv_lens=None,
                   dropout_p=0.0, scale=None, group=None, order="contiguous"):  # fmt: skip
    """attention(q, k, v) of this rank's rows over every rank's keys; see the module for shapes, order and method.

    Each rank sends its keys and values W - 1 times to the next while it computes; parts that causality or the window leave
    nothing of are not computed. causal: False or True. All else as in functional.attention and alike on all ranks: window,
    lengths and distances are the whole sequence's, q_lens and kv_lens (B,) of sequences padded at the end, alibi_slopes (H,)
    or (B, H), which get no gradient. Gradients of sinks (H,) are whole only once summed over the ranks. Parts have one size
    everywhere, an even one for "head_tail".

    dropout_p must be 0: the kernels' mask goes by a pair's place in the tensors they are given, which here is not its place
    in the sequence. bias and masks are (S, S), which nobody holds. Raises ValueError, TypeError or IndexError naming the
    argument.
    """
    rank, W = _member(group)
    _check_parts("ring_attention", q, k, v, order)
    if causal not in (False, True):
        raise ValueError(f"ring_attention: causal is {causal!r}, must be False or True")
    if dropout_p:
        raise ValueError(
            f"ring_attention: dropout_p is {dropout_p}, must be 0: the kernels draw a mask by a pair's place in what they are "
            "given, not in the sequence; ulysses_attention has whole sequences and drops out"
        )
    op._check_extras(q, q.shape[0], q.shape[1], None, None, alibi_slopes, sinks, None, None)
    if backend.needs_grad(alibi_slopes):
        raise ValueError(
            "ring_attention: alibi_slopes requires grad, which is not computed; pass alibi_slopes.detach()"
        )
    S = q.shape[2] * W
    for name, lens in (("q_lens", q_lens), ("kv_lens", kv_lens)):
        if lens is None:
            continue
        op._check_integers(name, lens, (q.shape[0],), q.device)
        if backend.readable(lens) and lens.numel() and not 0 <= lens.min() <= lens.max() <= S:
            raise IndexError(
                f"ring_attention: {name} is {lens.tolist()}, must lie in 0 .. {S}, the whole sequence"
            )
    q, k, v, _, _ = op._autocast(q, k, v, None, None)
    q = q if q.stride(-1) == 1 else q.contiguous()
    left, right = op._options(q, q.shape[2:], causal, window, softcap, 0.0, scale)[3:5]
    rules = _Rules(
        bool(causal), left, right, q.shape[-1] ** -0.5 if scale is None else float(scale), float(softcap), group, order,
        alibi_slopes, q_lens, kv_lens,
    )  # fmt: skip
    return _Ring.apply(q, k, v, sinks, rules)


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


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What a ring's parts have in common. left, right: the window, -1 for open."""

    causal: bool
    left: int
    right: int
    scale: float
    softcap: float
    group: object
    order: str
    slopes: torch.Tensor | None
    q_lens: torch.Tensor | None
    kv_lens: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class _Rectangle:
    """Rows and keys of two parts, and where they stand: row i is row `row` + i of the sequence, key j is key `key` + j."""

    rows: slice
    keys: slice
    causal: bool
    window: tuple | None
    row: int = 0
    key: int = 0


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, rules):
        rank, W = _member(rules.group)
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
        if sinks is not None:  # a logit without a value: where the sums over keys begin
            lse[:] = sinks.to(wide)[:, None]
        kv = torch.cat((k, v), dim=-1)
        for step in range(W):
            arriving = _send_on(kv, rules.group) if step < W - 1 else None
            for r in _work(rank, (rank - step) % W, W, q.shape[2], rules):
                k_i, v_i = kv[:, :, r.keys].split((k.shape[-1], v.shape[-1]), dim=-1)
                q_i = q[:, :, r.rows]
                options, shift = _options(r, q_i, k_i, rules)
                o_i, lse_i = functional.attention(q_i, k_i, v_i, **options, return_lse=True)
                merged = merge(o[:, :, r.rows], lse[:, :, r.rows], o_i, lse_i + shift)
                o[:, :, r.rows], lse[:, :, r.rows] = merged
            kv = arriving() if arriving else kv
        o = o.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, sinks, o, lse)
        ctx.rules = rules
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, sinks, o, lse = ctx.saved_tensors
        rules = ctx.rules
        rank, W = _member(rules.group)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        kv, arrived = torch.cat((k, v), dim=-1), None
        for step in range(W):
            arriving = _send_on(kv, rules.group) if step < W - 1 else None
            dkv = torch.zeros_like(kv, dtype=lse.dtype)
            for r in _work(rank, (rank - step) % W, W, q.shape[2], rules):
                k_i, v_i = kv[:, :, r.keys].split((k.shape[-1], v.shape[-1]), dim=-1)
                q_i = q[:, :, r.rows]
                options, shift = _options(r, q_i, k_i, rules)
                saved = (q_i, k_i, v_i, o[:, :, r.rows], lse[:, :, r.rows] - shift)
                dq_i, dk_i, dv_i = _part_backward(do[:, :, r.rows], *saved, **options)
                dq[:, :, r.rows] += dq_i
                dkv[:, :, r.keys] += torch.cat((dk_i, dv_i), dim=-1)
            # The gradient of a part of the keys travels with it, and after W steps is home.
            dkv = dkv if arrived is None else dkv + arrived()
            kv, arrived = arriving() if arriving else kv, _send_on(dkv, rules.group)
        dk, dv = arrived().to(k.dtype).split((k.shape[-1], v.shape[-1]), dim=-1)
        dsinks = None
        if ctx.needs_input_grad[3]:
            share = (sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -math.inf, math.inf)).exp()
            dsinks = -(share * (do.to(lse.dtype) * o).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk, dv, dsinks, None


def merge(o, lse, o_i, lse_i):
    """(o, lse) over two sets of keys from those over each; lse (B, H, S) natural, -inf where a row attended to nothing."""
    total = torch.logaddexp(lse, lse_i)
    shift = total.masked_fill(total == -math.inf, 0.0)  # -inf less -inf would be NaN
    weighted = (x * (l - shift).exp().unsqueeze(-1) for x, l in ((o, lse), (o_i, lse_i)))  # noqa: E741
    return sum(weighted), total


def _part_backward(
    do, q, k, v, o, lse, *, scale, softcap, causal, window, bias, alibi_slopes, q_lens, kv_lens
):
    """dq, dk, dv of a part of the keys, where o and lse are those over all: P = exp(S - lse), dS = P (dO V^T - rowsum(dO O))."""
    extras = (bias, None, alibi_slopes, None, q_lens, kv_lens, None, None)
    with torch.enable_grad():  # the question is who has a backward
        chosen = backend.choose(op.OP, op.WHY_NOT, q.detach().requires_grad_(), k, v, extras, False)
    if chosen != "torch":
        options = op._options(q, (q.shape[2], k.shape[2]), causal, window, softcap, 0.0, scale)
        given = (
            *op._spread(q, k, bias, None),
            *extras[2:],
            None,
            *options,
            False,
            False,
        )  # no seed, no gradient of bias or sinks
        return backend.run("attention_bwd", chosen, op.OP, do, None, q, k, v, o, lse.float(), *given)[:3]
    groups = q.shape[1] // k.shape[1]
    keep, distance, past_q, past_k = reference.allowed_pairs(
        q.shape[0], q.shape[2], k.shape[2], causal, window, q_lens, kv_lens, q.device
    )
    q, k, v, o, do = (t.to(lse.dtype) for t in (q, k, v, o, do))
    k, v = (t.masked_fill(past_k, 0.0).repeat_interleave(groups, dim=1) for t in (k, v))
    q, o, do = (t.masked_fill(past_q, 0.0) for t in (q * scale, o, do))
    s, slope = q @ k.mT, 1.0
    if softcap:
        s = torch.tanh(s / softcap)
        s, slope = softcap * s, 1 - s.square()
    if bias is not None:
        s = s + bias
    if alibi_slopes is not None:
        s = s - alibi_slopes.reshape(-1, q.shape[1], 1, 1) * distance.abs()
    s = s.masked_fill(~keep, -math.inf)
    p = (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * slope
    dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (ds.mT @ q, p.mT @ do))
    return ds @ k * scale, dk, dv


def _options(r, q, k, rules):
    """What attention needs to compute a rectangle, and what to add to its lse.

    Of -slope |distance| the rectangle's own rows and keys know the part along the diagonal only. Elsewhere all keys stand on
    one side of all rows, and a distance is that of the row to the nearest key, which shifts a row's logits and so its lse,
    and that from there on, which is a bias of the keys.
    """
    options = dict(causal=r.causal, window=r.window, scale=rules.scale, softcap=rules.softcap)
    options |= dict(bias=None, alibi_slopes=None, q_lens=None, kv_lens=None)
    for name, lens, first, size in (
        ("q_lens", rules.q_lens, r.row, q.shape[2]),
        ("kv_lens", rules.kv_lens, r.key, k.shape[2]),
    ):
        if lens is not None:
            options[name] = (lens - first).clamp(0, size).to(torch.int32)
    if rules.slopes is None:
        return options, 0.0
    slopes = rules.slopes.to(torch.promote_types(q.dtype, torch.float32))
    if r.row == r.key:
        return options | dict(alibi_slopes=slopes), 0.0
    slopes = slopes.reshape(-1, q.shape[1], 1)
    rows, keys = (first + torch.arange(t.shape[2], device=t.device) for first, t in ((r.row, q), (r.key, k)))
    nearest = keys[-1 if r.row > r.key else 0]
    options["bias"] = (-slopes * (keys - nearest).abs())[:, :, None]
    return options, -slopes * (rows - nearest).abs()


def _work(rank, source, W, S, rules):
    """The rectangles of rank's S rows and source's S keys in which something is to be computed."""
    if rules.left == rules.right == -1 and all(
        t is None for t in (rules.slopes, rules.q_lens, rules.kv_lens)
    ):
        found = _causal_work(rank, source, S, rules.causal, rules.order)
        return [] if found is None else [found]
    length = S * W // _parts(W, rules.order)
    rows, keys = (
        [(i * length, p * length) for i, p in enumerate(_held(r, W, rules.order))] for r in (rank, source)
    )
    found = [_cut(*at_row, *at_key, length, rules) for at_row in rows for at_key in keys]
    return [r for r in found if r is not None]


def _cut(i, row, j, key, n, rules):
    """What the window and causality leave of n rows, from place i of their part and `row` of the sequence, and n keys likewise.

    Row r sees the keys r - left .. r + right. Cutting off the keys before the first row's and the rows before the first key's
    leaves a window of (left - ahead, right + ahead) that is never negative, which is what attention takes; ahead = row - key.
    """
    left, right = (math.inf if w == -1 else w for w in (rules.left, rules.right))
    right = 0 if rules.causal else right
    ahead = row - key
    first_key, first_row = max(0, ahead - left), max(0, -ahead - right)
    rows, keys = min(n, n + left - ahead) - first_row, min(n, n + right + ahead) - first_key
    if rows <= 0 or keys <= 0:
        return None
    ahead += first_row - first_key
    causal = rules.causal and ahead == 0
    window = (
        left - ahead if left < ahead + rows - 1 else None,
        right + ahead if not causal and right < keys - 1 - ahead else None,
    )
    i, j = i + first_row, j + first_key
    window = None if window == (None, None) else window
    return _Rectangle(
        slice(i, i + rows), slice(j, j + keys), causal, window, row + first_row, key + first_key
    )


def _causal_work(rank, source, S, causal, order):
    """The one rectangle of two parts where only causality matters, or None.

    In "head_tail" order the first half of a lower rank's keys stands before all of ours, its second half after them; the
    keys of a higher rank stand between our halves. A rank's own rows ascend, so that their mask is the usual one.
    """
    everything = slice(0, S)
    if not causal or source == rank:
        return _Rectangle(everything, everything, causal, None)
    if order == "head_tail" and source < rank:
        return _Rectangle(everything, slice(0, S // 2), False, None)
    if order == "head_tail":
        return _Rectangle(slice(S // 2, S), everything, False, None)
    return _Rectangle(everything, everything, False, None) if source < rank else None


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
