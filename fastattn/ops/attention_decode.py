"""Decoding: attention of a few new queries over a key/value cache. The public function, its torch op, who can serve it."""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from fastattn import backend, cuda
from fastattn.cuda.attention import HALF
from fastattn.cuda.attention_decode import attention_decode_usual, attention_decode_why_not
from fastattn.ops.attention import _check_extras, _check_integers, _options, _torch_attention

OP = "attention_decode"
MAX_SPLITS = 256


def attention_decode(q, k_cache, v_cache, cache_lens, *, block_table=None, k_new=None, v_new=None, window=None, softcap=0.0,
                     alibi_slopes=None, sinks=None, scale=None, num_splits=None, return_lse=False):  # fmt: skip
    """o = softmax(s) v, s = softcap(scale * q k^T) - slope * distance, over the keys that a sequence has cached so far.

    q (B, H, S_q, D): the last S_q positions of each sequence, so that query i sees the keys up to L - S_q + i, where L is the
    sequence's length after the append. fp16, bf16 or fp32; H a multiple of H_kv. Returns o (B, H, S_q, D_v), laid out so that
    o.transpose(1, 2).reshape(B, S_q, H * D_v) is a view; with return_lse also lse (B, H, S_q), fp32, natural log, with the sink.

    k_cache, v_cache: (B, H_kv, S, D | D_v), or pages (pages, page_size, H_kv, D | D_v) that block_table (B, n) puts in order; of q's
    dtype. cache_lens (B,): positions filled before the call; it is not changed. k_new, v_new (B, H_kv, S_new, D | D_v) are
    written into the caches at cache_lens, in place, and L = cache_lens + S_new. What lies past L is never read.

    window (left, right): inclusive, None = open; no query sees a later key, whatever `right`. softcap c > 0: c * tanh(s / c).
    alibi_slopes (H,) or (B, H). sinks (H,): one more logit of the denominator. scale: D**-0.5 by default. num_splits: programs
    that share a sequence's keys, chosen from the shapes by default; it changes the order of a sum and nothing else. A query
    that sees no key gives 0. The lengths are read on the device only: a captured CUDA graph serves a growing cache.

    Inference only: the kernels refuse an input that requires grad; stock torch, which serves CPU tensors, differentiates.
    Raises ValueError, TypeError or IndexError naming the argument; lengths and pages on a GPU are checked under backend.debug.
    Under autocast q, k_new and v_new are cast to the cache's dtype. Sources: arXiv 1911.02150 and 2305.13245 (shared heads), 2309.06180
    (pages), and those of `attention`.
    """
    if window is alibi_slopes is sinks is num_splits is None and not softcap:
        found = _decode_usually(q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, scale)
        if found is not None:
            return found if return_lse else found[0]
    backend.need_tensors("attention_decode", q=q, k_cache=k_cache, v_cache=v_cache, cache_lens=cache_lens)
    if torch.is_autocast_enabled(q.device.type):
        q, k_new, v_new = (t if t is None else t.to(k_cache.dtype) for t in (q, k_new, v_new))
    capacity = _check(q, k_cache, v_cache, cache_lens, block_table, k_new, v_new)
    _check_extras(q, q.shape[0], q.shape[1], None, None, alibi_slopes, sinks, None, None)
    if num_splits is not None and not (isinstance(num_splits, int) and 1 <= num_splits <= MAX_SPLITS):
        raise ValueError(
            f"attention_decode: num_splits is {num_splits!r}, needs an int from 1 to {MAX_SPLITS}, or None to choose"
        )
    options = _options(q, (q.shape[2], capacity), "bottom_right", window, softcap, 0.0, scale)
    operands = (q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks)
    chosen = backend.choose(OP, WHY_NOT, *operands, N=capacity)
    if chosen == "torch":
        o, lse = _torch_attention_decode(*operands, options, return_lse)
    else:
        o, lse = _launch(chosen, *operands, options, num_splits or 0)
    return (o, lse) if return_lse else o


def _decode_usually(q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, scale):
    """(o, lse) of a call without rules beside its lengths, in a fraction of the time of the steps that any call takes; None means nothing."""
    if torch.compiler.is_compiling() or not type(q) is type(k_cache) is type(cache_lens) is torch.Tensor:
        return None
    if (
        q.dtype not in HALF
        or backend.readable(cache_lens)
        or backend.needs_grad(q, k_cache, v_cache, k_new, v_new)
    ):
        return None
    paged = block_table is not None
    if k_cache.dim() != 4 or (paged and block_table.dim() != 2):
        return None
    capacity = block_table.shape[1] * k_cache.shape[1] if paged else k_cache.shape[2]
    if not backend.certain("cuda", OP, q, capacity) or not (_C := cuda.ready(q)):
        return None
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else float(scale)
    found = attention_decode_usual(_C, q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, scale)
    if found is not None:
        backend.calls[OP, "cuda"] += 1
        _tell_of_append(k_cache, v_cache, k_new)
    return found


def _tell_of_append(k_cache, v_cache, k_new):
    """The kernels write past autograd's sight: whoever saved the cache for a backward must hear of it."""
    if k_new is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([c for c in (k_cache, v_cache) if not c.is_inference()])


def _check(q, k_cache, v_cache, cache_lens, block_table, k_new, v_new):
    """The number of positions that a sequence of this cache can have; raises where arguments do not fit together."""
    paged = block_table is not None
    if q.dim() != 4:
        raise ValueError(f"attention_decode: q has shape {tuple(q.shape)}, needs (B, H, S_q, D)")
    if not q.is_floating_point():
        raise TypeError(f"attention_decode: q is {q.dtype}, needs a floating dtype")
    layout = (
        "(pages, page_size, H_kv, D) with a block_table" if paged else "(B, H_kv, S, D) without a block_table"
    )
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dim() != 4:
            raise ValueError(f"attention_decode: {name} has shape {tuple(t.shape)}, needs {layout}")
        _check_like(q, name, t)
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"attention_decode: v_cache is {tuple(v_cache.shape)}, needs k_cache's first dims {tuple(k_cache.shape[:3])}"
        )
    B, H, _, D = q.shape
    _check_integers("cache_lens", cache_lens, (B,), q.device)
    if paged:
        if block_table.dim() != 2:
            raise ValueError(
                f"attention_decode: block_table has shape {tuple(block_table.shape)}, needs ({B}, n)"
            )
        _check_integers("block_table", block_table, (B, block_table.shape[1]), q.device)
    H_kv = k_cache.shape[2 if paged else 1]
    if k_cache.shape[3] != D or not (paged or k_cache.shape[0] == B):
        raise ValueError(
            f"attention_decode: k_cache is {tuple(k_cache.shape)}, needs {layout}; q is {tuple(q.shape)}"
        )
    if H != H_kv and (H_kv == 0 or H % H_kv):
        raise ValueError(f"attention_decode: q has {H} heads, which must be a multiple of k_cache's {H_kv}")
    if (k_new is None) != (v_new is None):
        raise ValueError("attention_decode: k_new and v_new come together; one is None")
    S_new = 0
    if k_new is not None:
        S_new = k_new.shape[2] if k_new.dim() == 4 else -1
        for name, t, width in (("k_new", k_new, D), ("v_new", v_new, v_cache.shape[3])):
            if t.shape != (B, H_kv, S_new, width):
                raise ValueError(
                    f"attention_decode: {name} is {tuple(t.shape)}, needs ({B}, {H_kv}, S_new, {width}), S_new as k_new's"
                )
            _check_like(q, name, t)
    capacity = block_table.shape[1] * k_cache.shape[1] if paged else k_cache.shape[2]
    if backend.readable(cache_lens) and B:
        low, high = int(cache_lens.min()), int(cache_lens.max())
        if low < 0 or high + S_new > capacity:
            raise IndexError(
                f"attention_decode: cache_lens has values {low} to {high}; with {S_new} new keys they must lie in 0 .. {capacity}"
            )
        if paged and backend.readable(block_table):
            _check_pages(block_table, k_cache, cache_lens + S_new)
    return capacity


def _check_like(q, name, t):
    if t.dtype != q.dtype:
        raise TypeError(f"attention_decode: {name} is {t.dtype}, needs q's {q.dtype}")
    if t.device != q.device:
        raise ValueError(f"attention_decode: {name} is on {t.device}, q is on {q.device}")


def _check_pages(block_table, k_cache, lens):
    """Only the entries that the lengths reach must be pages; the rest may hold anything."""
    first = torch.arange(block_table.shape[1], device=lens.device) * k_cache.shape[1]
    used = block_table[first < lens[:, None]]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < len(k_cache):
        raise IndexError(
            f"attention_decode: block_table has ids {int(used.min())} to {int(used.max())}, k_cache has {len(k_cache)} pages"
        )


def _launch(
    chosen,
    q,
    k_cache,
    v_cache,
    cache_lens,
    block_table,
    k_new,
    v_new,
    alibi_slopes,
    sinks,
    options,
    num_splits,
):
    # the kernels read rows of unit stride; a few new rows with another innermost stride are copied, a cache is not
    q, k_new, v_new = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k_new, v_new))
    cache_lens = cache_lens.contiguous()
    block_table = (
        block_table if block_table is None or block_table.stride(1) == 1 else block_table.contiguous()
    )
    _, _, _, left, right, softcap, _, scale, tf32 = options
    _tell_of_append(k_cache, v_cache, k_new)
    return backend.run(
        "attention_decode_fwd", chosen, OP, q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks,
        left, right, softcap, scale, num_splits, tf32,
    )  # fmt: skip


def _torch_attention_decode(
    q, k_cache, v_cache, cache_lens, block_table, k_new, v_new, alibi_slopes, sinks, options, return_lse
):
    """Stock torch: index_put_ for the append, a gather of the pages, and its SDPA under a mask wherever that can say it."""
    lens, capacity = cache_lens.long(), options[1]
    # clamped for the GPU, whose indices nobody has checked: a wrong one must not end the process
    pages = block_table if block_table is None else block_table.long().clamp(0, max(len(k_cache) - 1, 0))
    if k_new is not None and k_new.numel():
        at = lens[:, None] + torch.arange(k_new.shape[2], device=q.device)
        at = at.clamp(0, max(capacity - 1, 0))
        rows = torch.arange(len(lens), device=q.device)[:, None]
        for cache, new in ((k_cache, k_new), (v_cache, v_new)):
            if pages is None:
                cache[rows, :, at] = new.transpose(1, 2)
            else:
                cache[pages[rows, at // cache.shape[1]], at % cache.shape[1]] = new.transpose(1, 2)
    lens = lens + (0 if k_new is None else k_new.shape[2])
    if not math.prod(q.shape[:3]):
        return q.new_empty(*q.shape[:3], v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if pages is not None:
        pages = pages[:, : None if len(k_cache) else 0]
        k_cache, v_cache = (c[pages].flatten(1, 2).transpose(1, 2) for c in (k_cache, v_cache))
    extras = (None, None, alibi_slopes, sinks, None, lens, None, None)
    return _torch_attention(q, k_cache, v_cache, extras, options, return_lse, False)[:2]


backend.define(
    OP,
    "attention_decode_fwd(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, Tensor? block_table, Tensor? k_new, "
    "Tensor? v_new, Tensor? alibi_slopes, Tensor? sinks, int window_left, int window_right, float softcap, float scale, "
    "int num_splits, bool allow_tf32, str backend) -> (Tensor, Tensor)",
    lambda q, k_cache, v_cache, *_: (
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_cache.shape[3]).transpose(1, 2),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    ),
)


@register_flop_formula(torch.ops.fastattn.attention_decode_fwd)
def _flops(q, k_cache, v_cache, cache_lens, block_table, *_, out_shape=None, **__):
    """Both products over the cache's whole capacity: a count from shapes cannot know the lengths."""
    capacity = k_cache[2] if block_table is None else block_table[1] * k_cache[1]
    return 2 * math.prod(q[:3]) * capacity * (q[3] + v_cache[3])


def _triton_why_not(q, k_cache, v_cache, *rest):
    if backend.needs_grad(q, k_cache, v_cache, *rest):
        return "an input requires grad and decoding has no backward kernel; call it under torch.no_grad(), or use attention"
    widths = q.shape[3], v_cache.shape[3]
    if not 0 < min(widths) <= max(widths) <= 256:
        return f"head dims from 1 to 256 are served, q has {widths[0]} and v_cache has {widths[1]}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1 and cache.numel():
            return f"{name}'s last dim has stride {cache.stride(3)}, and a cache is read in place: it needs 1"
    return backend.triton_why_not(q, k_cache, v_cache, *rest)


WHY_NOT = {"cuda": attention_decode_why_not, "triton": _triton_why_not}
