"""Attention: the public functions, their torch ops, their gradient, and which backends can serve them."""

import math
import sys

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from fastattn import backend, cuda, reference
from fastattn.cuda.attention import HALF, NO_HEADS, attention_usual, attention_why_not

OP = "attention"
# bound at import, since fastattn.enable() puts ours there
stock_attention, stock_softmax = F.scaled_dot_product_attention, torch.softmax
CAUSAL = {False: 0, True: 1, "top_left": 1, "bottom_right": 2}


def attention(q, k, v, *, bias=None, mask=None, causal=False, window=None, softcap=0.0, alibi_slopes=None, sinks=None,
              q_lens=None, kv_lens=None, dropout_p=0.0, scale=None, return_lse=False, return_weights=False):  # fmt: skip
    """o = dropout(softmax(s)) v with s = softcap(scale * q k^T) + bias - slope * |distance| over the allowed pairs.

    q (B, H, S_q, D), k (B, H_kv, S_k, D), v (B, H_kv, S_k, D_v): fp16, bf16 or fp32, H a multiple of H_kv (query head h reads
    key head h // (H / H_kv)). Views are read in place; o (B, H, S_q, D_v) is laid out so that o.transpose(1, 2).reshape(B,
    S_q, H * D_v) is a view.

    scale: D**-0.5 by default. softcap c > 0: c * tanh(s / c). bias: any float dtype, broadcast to (B, H, S_q, S_k), may
    require grad. alibi_slopes (H,) or (B, H). mask: bool, True = attend, broadcast alike. causal: False, True or "top_left"
    (query i sees keys <= i), "bottom_right" (keys <= i + S_k - S_q, by each sequence's lengths where given). window (left,
    right): inclusive, None = open, around the same aligned position. q_lens, kv_lens (B,): lengths of padded sequences.
    sinks (H,): one more logit of the denominator. dropout_p: of the probabilities, in steps of 1/256 (stock torch: any).

    A row that attends to nothing gives 0 with gradients 0. return_lse adds lse (B, H, S_q), fp32 (float64 for such q), natural log of the
    denominator, -inf where it is 0. return_weights adds the probabilities before dropout (B, H, S_q, S_k), in q's dtype.

    Raises ValueError, TypeError or IndexError naming the argument. Sources: arXiv 1706.03762 (attention), 2205.14135 and
    2307.08691 (the tiling), 2108.12409 (ALiBi), 2309.17453 (sinks), 2305.13245 (grouped heads).
    """
    _check_context()
    if bias is mask is window is alibi_slopes is sinks is q_lens is kv_lens is None:
        if not (softcap or dropout_p or return_lse or return_weights):
            if (o := _attend_usually(q, k, v, causal, scale)) is not None:
                return o
    backend.need_tensors("attention", q=q, k=k, v=v)
    backend.need_tensors_or_none(
        "attention", bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, q_lens=q_lens, kv_lens=kv_lens
    )  # fmt: skip
    q, k, v, bias, mask = _autocast(q, k, v, bias, mask)
    _check_dense(q, k, v, q_lens, kv_lens)
    B, H, S_q, S_k = *q.shape[:3], k.shape[2]
    bias = _broadcastable("bias", bias, (B, H, S_q, S_k))
    mask = _broadcastable("mask", mask, (B, H, S_q, S_k))
    extras = (bias, mask, alibi_slopes, sinks, q_lens, kv_lens, None, None)
    _check_extras(q, B, H, *extras[:6])
    options = _options(q, (S_q, S_k), causal, window, softcap, dropout_p, scale)
    # dropout goes by the head's place in the whole, which a part does not know
    if backend.in_parts(q) and not dropout_p:

        def call(q, k, v, bias, mask, alibi_slopes, sinks, q_lens, kv_lens):
            return attention(
                q, k, v, bias=bias, mask=mask, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
                sinks=sinks, q_lens=q_lens, kv_lens=kv_lens, scale=scale, return_lse=return_lse, return_weights=return_weights,
            )  # fmt: skip

        outputs = ("bhme", *["bhm"] * return_lse, *["bhmn"] * return_weights)
        found = _on_parts(call, (q, k, v, *extras[:6]), outputs)
        if found is not NotImplemented:
            return found
    o, lse, weights = _attend(q, k, v, extras, options, return_lse, return_weights)
    result = (o, *((lse,) if return_lse else ()), *((weights,) if return_weights else ()))
    return result if len(result) > 1 else o


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, window=None,
                     softcap=0.0, alibi_slopes=None, sinks=None, dropout_p=0.0, scale=None, return_lse=False):  # fmt: skip
    """attention of B sequences packed one after another; sequence b owns rows cu_seqlens[b] : cu_seqlens[b + 1].

    q (T_q, H, D), k (T_k, H_kv, D), v (T_k, H_kv, D_v); cu_seqlens_q, cu_seqlens_k (B + 1,) integers from 0, ascending; max_seqlen_*
    at least the longest sequence. Everything else as in `attention`, alignment by each sequence. Returns o (T_q, H, D_v),
    and lse (H, T_q) with return_lse.
    """
    _check_context()
    name = "attention_varlen"
    backend.need_tensors(name, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    backend.need_tensors_or_none(name, alibi_slopes=alibi_slopes, sinks=sinks)
    q, k, v, _, _ = _autocast(q, k, v, None, None)
    B = _check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    extras = (None, None, alibi_slopes, sinks, None, None, cu_seqlens_q, cu_seqlens_k)
    _check_extras(q, B, q.shape[1], None, None, alibi_slopes, sinks, None, None)
    options = _options(q, (max_seqlen_q, max_seqlen_k), causal, window, softcap, dropout_p, scale)
    if backend.in_parts(q) and not dropout_p:

        def call(q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k):
            return attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, window=window, softcap=softcap,
                alibi_slopes=alibi_slopes, sinks=sinks, scale=scale, return_lse=return_lse,
            )  # fmt: skip

        slopes = "bh" if alibi_slopes is not None and alibi_slopes.dim() == 2 else "h"
        names = ("thd", "uhd", "uhe", slopes, "h", "c", "c")
        tensors = (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
        found = backend.on_parts(call, tensors, names, "h", ("the", *["ht"] * return_lse))
        if found is not NotImplemented:
            return found
    o, lse, _ = _attend(q, k, v, extras, options, return_lse, False)
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False):  # fmt: skip
    """torch.nn.functional.scaled_dot_product_attention, argument for argument: softmax(scale * q k^T + mask) v.

    query (..., H, L, E), key (..., H, S, E), value (..., H, S, E_v); attn_mask broadcast to (..., L, S), bool (True = attend) or
    float (added, may require grad), or one of torch.nn.attention.bias. What the kernels cannot serve goes to torch's own
    function, errors included.
    """
    _check_context()
    if not (
        isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)
    ):
        # which raises, or is recorded by what torch.fx traces with
        args = (query, key, value, attn_mask, dropout_p, is_causal)
        return stock_attention(*args, scale=scale, enable_gqa=enable_gqa)
    stock, causal = stock_attention, is_causal
    if is_causal_bias(attn_mask):
        if is_causal:
            raise ValueError(
                "scaled_dot_product_attention: CausalBias should not be used with causal=True; leave one of them out"
            )
        # not stock_attention, which would ask the bias whether torch's function is in its place; under enable() it is not
        stock, causal = attn_mask._dispatch, "bottom_right"
        if attn_mask.variant.name == "UPPER_LEFT" or attn_mask.seq_len_q == attn_mask.seq_len_kv:
            causal = "top_left"
    # torch divides by that number
    if enable_gqa and any(t.dim() > 2 and t.shape[-3] == 0 for t in (key, value)):
        raise ValueError("scaled_dot_product_attention: enable_gqa with a key or value of no heads")
    if attn_mask is None and not dropout_p:
        if (o := _attend_usually(query, key, value, is_causal, scale, enable_gqa)) is not None:
            return o
    if backend.in_parts(query) and not dropout_p and causal is is_causal:
        found = _sdpa_on_parts(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if found is not NotImplemented:
            return found
    if backend.stock_only(OP, query):
        return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    try:
        if not isinstance(is_causal, bool):
            raise ValueError(f"is_causal is {is_causal!r}, must be a bool")
        lengths = (*query.shape[-2:-1], *key.shape[-2:-1])
        if causal == "bottom_right" and lengths != (attn_mask.seq_len_q, attn_mask.seq_len_kv):
            raise ValueError("attn_mask is a CausalBias of other lengths than query and key have")
        mask = None if is_causal_bias(attn_mask) else attn_mask
        (q, k, v, bias, mask), batch = _as_attention(
            query, key, value, mask, dropout_p, causal, scale, enable_gqa
        )
    except (ValueError, RuntimeError) as e:
        problem = str(e)
        chosen = backend.choose(OP, dict.fromkeys(WHY_NOT, lambda *_: problem), query)
    else:
        extras = (bias, mask, None, None, None, None, None, None)
        chosen = backend.choose(OP, WHY_NOT, q, k, v, extras, False, N=k.shape[2])
    if chosen == "torch":
        return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    options = _options(q, (q.shape[2], k.shape[2]), causal, None, 0.0, dropout_p, scale)
    o = _launch(chosen, q, k, v, extras, options, False)[0]
    return o if query.dim() == key.dim() == 4 else o.reshape(*batch, *o.shape[-2:])


def is_causal_bias(t):
    """Whether t is a CausalBias of torch.nn.attention.bias, told by name: a call without one shall not wait for the import."""
    return type(t).__name__ == "CausalBias" and isinstance(t, torch.Tensor)


def _check_context():
    """torch's context_parallel puts the other ranks' keys into torch's function alone: here they would be missing."""
    current = F.scaled_dot_product_attention
    if current is not stock_attention and _from_context_parallel(current):
        raise RuntimeError(
            "attention: inside torch's context_parallel this would see one rank's keys only; call torch.nn.functional."
            "scaled_dot_product_attention there, or fastattn.integrations.distributed.ring_attention outside of it"
        )


def _on_parts(call, tensors, outputs):
    """DTensors are split by batch and heads; where they are split by the queries' rows, those are exchanged for either."""
    _check_order(tensors[0])
    slopes = "bh" if tensors[5] is not None and tensors[5].dim() == 2 else "h"
    names = ("bhmd", "bhnd", "bhne", "bhmn", "bhmn", slopes, "h", "b", "b")
    return backend.on_parts(call, tensors, names, "bh", outputs, gathered="m")


def _sdpa_on_parts(query, key, value, attn_mask, is_causal, scale, enable_gqa):
    if not query.dim() == key.dim() == value.dim() == 4 or (attn_mask is not None and attn_mask.dim() > 4):
        return NotImplemented
    _check_order(query)

    def call(query, key, value, attn_mask):
        return scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)

    names = ("bhmd", "bhnd", "bhne", "" if attn_mask is None else "bhmn"[4 - attn_mask.dim() :])
    return backend.on_parts(call, (query, key, value, attn_mask), names, "bh", ("bhme",), gathered="m")


def _check_order(q):
    """torch's context_parallel by module, with a load balancer, gives DTensors whose rows are not in their sequence's order."""
    if any(p.is_shard(2) for p in q.placements) and _reordered():
        raise RuntimeError(
            "attention: torch's context_parallel has put the rows of q into its load balancer's order, which causal, window, bias "
            "and masks do not follow; shard with load_balancer=None, or use fastattn.integrations.distributed.ring_attention"
        )


def _reordered():
    module = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    wrapped = module is not None and module._dispatch_mode is module._DispatchMode.MODULE_WRAPPER
    return wrapped and module._cp_options.enable_load_balance


def _from_context_parallel(function):
    return function.__qualname__.startswith("_distribute_function")


# Dynamo guards on the function, and cannot read its name; nor does it read sys.modules
_from_context_parallel._dynamo_marked_constant = _reordered._dynamo_marked_constant = True


def _as_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """SDPA's arguments as (q, k, v, bias, mask) with four dims each, and the leading dims; ValueError says what does not fit."""
    if not all(isinstance(t, torch.Tensor) and t.dim() >= 2 and not t.is_nested for t in (query, key, value)):
        raise ValueError(
            "query, key and value must be tensors of two dims or more (attention_varlen takes packed ones)"
        )
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal are both set")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}")
    query, key, value, attn_mask, _ = _autocast(query, key, value, attn_mask, None)
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"query, key and value have dtypes {query.dtype}, {key.dtype}, {value.dtype}")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    grouped = enable_gqa and query.dim() >= 3 and key.shape[-3:-2] != query.shape[-3:-2]
    leads = [t.shape[:-2] for t in (query, key, value)]
    same = grouped or leads[0] == leads[1] == leads[2]
    try:
        batch = leads[0] if same else torch.broadcast_shapes(*leads)  # slow, and rarely needed
        kv_batch = (*batch[:-1], key.shape[-3]) if grouped else batch
        heads, kv_heads = (lead[-1] if lead else 1 for lead in (batch, kv_batch))
        q, k, v = _four_dims(query, batch, heads), *(_four_dims(t, kv_batch, kv_heads) for t in (key, value))
    except RuntimeError:
        raise ValueError(f"{shapes} do not broadcast") from None
    if k.shape[2:] != (v.shape[2], q.shape[3]) or (grouped and (kv_heads == 0 or heads % kv_heads)):
        raise ValueError(f"{shapes} do not fit together")
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise ValueError(f"attn_mask has dtype {attn_mask.dtype}")
        if (
            len(batch) != 2 and attn_mask.dim() > 2
        ):  # a mask with leading dims of its own follows them into (B, H)
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-2:]).reshape(
                *q.shape[:2], *attn_mask.shape[-2:]
            )
        attn_mask = _broadcastable("attn_mask", attn_mask, (*q.shape[:3], k.shape[2]))
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    return (q, k, v, None if is_bool else attn_mask, attn_mask if is_bool else None), batch


def _four_dims(t, batch, heads):
    """(B, heads, S, E), in place wherever leading dims merge; torch's function copies the others too."""
    t = t if t.shape[:-2] == batch else t.expand(*batch, *t.shape[-2:])
    return t if len(batch) == 2 else t.reshape(math.prod(batch[:-1]), heads, *t.shape[-2:])


def _autocast(q, k, v, bias, mask):
    """Under autocast torch's function runs in the autocast dtype; so do we."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # torch raises on "meta"
        dtype = torch.get_autocast_dtype(device)
        cast = lambda t: t.to(dtype) if t is not None and t.dtype in backend.TRITON_DTYPES else t  # noqa: E731
        return *map(cast, (q, k, v, bias)), mask
    return q, k, v, bias, mask


def _check_operands(q, k, v, dims, layout):
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims:
            raise ValueError(f"attention: {name} has shape {tuple(t.shape)}, needs {dims} dims {layout}")
        if t.dtype != q.dtype or not t.is_floating_point():
            raise TypeError(
                f"attention: {name} is {t.dtype}, q is {q.dtype}; q, k, v need one floating dtype"
            )
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}, q is on {q.device}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"attention: k has head dim {k.shape[-1]}, q has {q.shape[-1]}")


def _check_heads(H, k, v, dim):
    if v.shape[dim] != k.shape[dim]:
        raise ValueError(f"attention: v has {v.shape[dim]} heads, k has {k.shape[dim]}")
    if H != k.shape[dim] and (k.shape[dim] == 0 or H % k.shape[dim]):
        raise ValueError(f"attention: q has {H} heads, which must be a multiple of k's {k.shape[dim]}")


def _check_dense(q, k, v, q_lens, kv_lens):
    _check_operands(q, k, v, 4, "(B, H, S, D)")
    _check_heads(q.shape[1], k, v, 1)
    for name, t in (("k", k), ("v", v)):
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"attention: {name} has batch {t.shape[0]}, q has {q.shape[0]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"attention: v has {v.shape[2]} positions, k has {k.shape[2]}")
    for name, lens, S in (("q_lens", q_lens, q.shape[2]), ("kv_lens", kv_lens, k.shape[2])):
        if lens is None:
            continue
        _check_integers(name, lens, (q.shape[0],), q.device)
        if backend.readable(lens) and lens.numel() and not 0 <= int(lens.min()) <= int(lens.max()) <= S:
            raise IndexError(
                f"attention: {name} has values {int(lens.min())} to {int(lens.max())}, must lie in 0 .. {S}"
            )


def _check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    _check_operands(q, k, v, 3, "(T, H, D)")
    _check_heads(q.shape[1], k, v, 1)
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"attention_varlen: v has {v.shape[0]} rows, k has {k.shape[0]}")
    if cu_seqlens_q.dim() != 1 or len(cu_seqlens_q) < 1:
        raise ValueError(
            f"attention_varlen: cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}, needs (B + 1,)"
        )
    for name, cu, T, longest in (
        ("q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        ("k", cu_seqlens_k, k.shape[0], max_seqlen_k),
    ):
        _check_integers(f"cu_seqlens_{name}", cu, cu_seqlens_q.shape, q.device)
        if not isinstance(longest, (int, torch.SymInt)) or longest < 0:
            raise ValueError(f"attention_varlen: max_seqlen_{name} is {longest!r}, needs an int >= 0")
        if backend.readable(cu):
            lens = cu.diff()
            if cu[0] != 0 or cu[-1] > T or (lens < 0).any():
                raise IndexError(
                    f"attention_varlen: cu_seqlens_{name} must ascend from 0 to at most {T}, is {cu.tolist()}"
                )
            if lens.numel() and lens.max() > longest:
                raise IndexError(
                    f"attention_varlen: max_seqlen_{name} is {longest}, a sequence has {int(lens.max())}"
                )
    return len(cu_seqlens_q) - 1


def _check_integers(name, t, shape, device):
    if t.shape != shape or t.dtype not in (torch.int32, torch.int64) or t.device != device:
        raise ValueError(
            f"attention: {name} is {t.dtype} {tuple(t.shape)} on {t.device}, needs int32 or int64 {tuple(shape)} on {device}"
        )


def _check_extras(q, B, H, bias, mask, alibi_slopes, sinks, q_lens, kv_lens):
    for name, t in (("bias", bias), ("mask", mask), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if t is None:
            continue
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}, q is on {q.device}")
        if (t.dtype != torch.bool) if name == "mask" else not t.is_floating_point():
            need = "bool (True = attend; a float mask is a bias)" if name == "mask" else "a floating dtype"
            raise TypeError(f"attention: {name} is {t.dtype}, needs {need}")
    if alibi_slopes is not None and alibi_slopes.shape not in ((H,), (B, H)):
        raise ValueError(
            f"attention: alibi_slopes is {tuple(alibi_slopes.shape)}, needs ({H},) or ({B}, {H})"
        )
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"attention: sinks is {tuple(sinks.shape)}, needs ({H},)")


def _broadcastable(name, t, shape):
    """`t` with four dims, of size 1 wherever it broadcasts, also where the caller had expanded it."""
    if t is None:
        return None
    if t.dim() > 4 or any(n not in (1, whole) for n, whole in zip(t.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(
            f"attention: {name} has shape {tuple(t.shape)}, which does not broadcast to {tuple(shape)}"
        )
    t = t[(None,) * (4 - t.dim())]
    for dim, stride in enumerate(t.stride()):
        # a leaf that is itself expanded wants a gradient for each of its elements: leave it whole
        if stride == 0 and t.shape[dim] > 1 and not (t.requires_grad and t.is_leaf):
            t = t.narrow(dim, 0, 1)
    return t.contiguous() if t.requires_grad and t.is_leaf else t


def _options(q, lengths, causal, window, softcap, dropout_p, scale):
    """The scalars of a launcher, from max_seqlen_q to allow_tf32."""
    if causal not in CAUSAL:
        raise ValueError(f'attention: causal is {causal!r}, needs False, True, "top_left" or "bottom_right"')
    if window is not None and not (
        isinstance(window, (tuple, list)) and len(window) == 2 and all(w is None or w >= 0 for w in window)
    ):
        raise ValueError(
            f"attention: window is {window!r}, needs (left, right), each an int >= 0 or None for open"
        )
    left, right = (-1 if w is None else w for w in window or (None, None))
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p is {dropout_p}, needs a probability from 0 to 1")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}, needs a finite number >= 0 (0 is off)")
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else float(scale)
    tf32 = q.dtype == torch.float32 and q.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return (*lengths, CAUSAL[causal], left, right, float(softcap), float(dropout_p), scale, tf32)


def _attend_usually(q, k, v, causal, scale, grouped=True):
    """o of a call without rules but causality, in a fraction of the time of the steps that any call takes; None means nothing."""
    if torch.compiler.is_compiling() or not type(q) is type(k) is type(v) is torch.Tensor:
        return None
    if q.dtype not in HALF or k.dim() != 4 or (causal is not False and causal is not True):
        return None
    if not backend.certain("cuda", OP, q, k.shape[2]) or not (_C := cuda.ready(q)):
        return None
    if not grouped and q.shape[1:2] != k.shape[1:2]:
        return None
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else float(scale)
    if backend.needs_grad(q, k, v):
        # where backward's launch would copy or refuse, the usual Function does it
        o = _UsualAttention.apply(q, k, v, causal, scale, _C)
    else:
        o = attention_usual(_C, q, k, v, causal, scale)
        o = o if o is None else o[0]
    if o is not None:
        backend.calls[OP, "cuda"] += 1
    return o


def _attend(q, k, v, extras, options, return_lse, return_weights):
    chosen = backend.choose(OP, WHY_NOT, q, k, v, extras, return_weights, N=options[1])
    # The gradient of weights is taken by autograd within a backward, which Dynamo does not trace.
    untraceable = return_weights and torch.compiler.is_compiling() and backend.needs_grad(q, k, v, *extras)
    if chosen == "torch" or untraceable:
        return _torch_attention(q, k, v, extras, options, return_lse, return_weights)
    return _launch(chosen, q, k, v, extras, options, return_weights)


def _launch(chosen, q, k, v, extras, options, return_weights):
    # the kernels read rows of unit stride; only a view with another innermost stride is copied, as torch's own kernels do
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    bias, mask, alibi_slopes, sinks, *lengths = extras
    # few numbers, which the kernels read without a stride
    lengths = [t if t is None else t.to(torch.int32).contiguous() for t in lengths]
    sinks = sinks if sinks is None else sinks.contiguous()
    alibi_slopes = alibi_slopes if alibi_slopes is None else alibi_slopes.float()
    seed = backend.draw_seed(q) if options[6] > 0 else None
    operands = (q, k, v, bias, mask, alibi_slopes, sinks, *lengths, seed)
    if backend.needs_grad(q, k, v, bias, sinks):
        if torch.compiler.is_compiling():
            operands = backend.distinct(*operands)
        return _Attention.apply(*operands, options, chosen, return_weights)
    return _forward(*operands, options, chosen, return_weights)


def _forward(q, k, v, bias, mask, *rest):
    *extras, options, chosen, return_weights = rest
    given = (*_spread(q, k, bias, mask), *extras, *options)
    o, lse = backend.run("attention_fwd", chosen, OP, q, k, v, *given)
    weights = backend.run("attention_weights", chosen, OP, q, k, lse, *given) if return_weights else None
    return o, lse, weights


class _Attention(torch.autograd.Function):
    """Saves q, k, v, o, lse and the seed; backward recomputes the probabilities tile by tile."""

    @staticmethod
    def forward(ctx, *operands):
        o, lse, weights = _forward(*operands)
        *saved, ctx.options, ctx.chosen, _ = operands
        q, k, v, *extras = saved
        ctx.save_for_backward(q, k, v, o, lse, *extras)
        ctx.set_materialize_grads(False)
        return o, lse, weights

    @staticmethod
    def backward(ctx, do, dlse, dweights):
        q, k, v, o, lse, bias, mask, *extras = ctx.saved_tensors
        nothing = (None,) * 8  # lengths, seed, options, chosen, return_weights
        if do is None and dlse is None and dweights is None:
            return (None,) * 15
        if dweights is not None or backend.wants_double_backward():
            inputs = (q, k, v, bias, mask, *extras, ctx.options)
            return *backend.composite_backward(_composite, inputs, (do, dlse, dweights)), None, None
        do = torch.zeros_like(o) if do is None else do
        given = (*_spread(q, k, bias, mask), *extras, *ctx.options)
        needs_bias, needs_sinks = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
        grads = backend.run(
            "attention_bwd", ctx.chosen, OP, do, dlse, q, k, v, o, lse, *given, needs_bias, needs_sinks
        )
        dq, dk, dv, dbias, dsinks = (
            g if ctx.needs_input_grad[i] else None for g, i in zip(grads, (0, 1, 2, 3, 6), strict=True)
        )
        return dq, dk, dv, dbias, None, None, dsinks, *nothing


class _UsualAttention(torch.autograd.function._SingleLevelFunction):
    """_Attention of _attend_usually. Its base class is Function without what serves torch.func, which `certain` has ruled out."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, _C):
        found = attention_usual(_C, q, k, v, causal, scale)
        if found is None:
            return None
        ctx.save_for_backward(q, k, v, *found)
        ctx.options = (q.shape[2], k.shape[2], int(causal), -1, -1, 0.0, 0.0, scale, False)
        return found[0]

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        nothing = (None,) * 9
        if backend.wants_double_backward():
            inputs = (q, k, v, *nothing, ctx.options)
            return *backend.composite_backward(_composite, inputs, (do, None, None))[:3], None, None, None
        grads = backend.run(
            "attention_bwd", "cuda", OP, do, None, q, k, v, o, lse, *nothing, *ctx.options, False, False
        )
        needed = ctx.needs_input_grad[:3]
        return *(g if wanted else None for g, wanted in zip(grads[:3], needed, strict=True)), None, None, None


def _spread(q, k, bias, mask):
    """bias and mask as views of (B, H, S_q, S_k), stride 0 where they broadcast."""
    if bias is None and mask is None:
        return None, None
    shape = (*q.shape[:3], k.shape[2])
    return tuple(t if t is None else t.expand(shape) for t in (bias, mask))


def _named(options):
    """The reference's keyword arguments for a launcher's scalars."""
    _, _, causal, left, right, softcap, dropout_p, scale, _ = options
    window = None if left == right == -1 else tuple(None if w == -1 else w for w in (left, right))
    causal = (False, True, "bottom_right")[causal]
    return dict(causal=causal, window=window, softcap=softcap, dropout_p=dropout_p, scale=scale)


def _composite(
    q, k, v, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, seed, options
):
    """attention in stock ops, at least in fp32: what weights, double backward and the rarer options of "torch" use."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    named = dict(alibi_slopes=alibi_slopes, sinks=sinks, seed=seed, **_named(options))
    if cu_seqlens_q is not None:
        o, lse = reference.attention_varlen(
            q.to(dtype), k.to(dtype), v.to(dtype), cu_seqlens_q, cu_seqlens_k, **named
        )
        return o.to(q.dtype), lse, None
    bias = bias if bias is None else bias.to(dtype)
    o, lse, weights = reference.attention(
        q.to(dtype), k.to(dtype), v.to(dtype), bias=bias, mask=mask, q_lens=q_lens, kv_lens=kv_lens, **named
    )
    return o.to(q.dtype), lse, weights.to(q.dtype)


def _torch_attention(q, k, v, extras, options, return_lse, return_weights):
    """Stock torch: its SDPA wherever that can say what is asked, plain ops where it cannot."""
    sinks, cu_seqlens_q = extras[3], extras[6]
    named = _named(options)
    dropout_p, scale = named["dropout_p"], named["scale"]
    if cu_seqlens_q is not None:
        return _torch_varlen(q, k, v, extras, options, return_lse)
    if return_lse or named["softcap"] or sinks is not None or (return_weights and k.shape[1] != q.shape[1]):
        seed = backend.draw_seed(q) if dropout_p else None
        return _composite(q, k, v, *extras, seed, options)
    k, v, attn_mask, is_causal = _stock_mask(q, k, v, extras, named, explicit=return_weights)
    if return_weights:
        s = q * scale @ k.transpose(-1, -2)
        if attn_mask is not None:
            s = s.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else s + attn_mask
            nothing = s.isneginf().all(-1, keepdim=True)  # such a row would be NaN, in the gradient too
            s = s.masked_fill(nothing, 0.0)
        weights = stock_softmax(s, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        weights = weights if attn_mask is None else weights.masked_fill(nothing, 0.0)
        return F.dropout(weights, dropout_p) @ v, None, weights
    gqa = bool(q.shape[1] != k.shape[1])  # a tensor under torch.jit.trace
    o = stock_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=gqa)
    return o, None, None


def _stock_mask(q, k, v, extras, named, explicit):
    """k and v without their padding, and all exclusions and biases as one mask for stock torch, with its is_causal flag.

    explicit: causality too goes into the mask.
    """
    bias, mask, alibi_slopes, _, q_lens, kv_lens, _, _ = extras
    causal, window = named["causal"], named["window"]
    lengths = q_lens is not None or kv_lens is not None
    pattern = lengths or window is not None or alibi_slopes is not None or causal == "bottom_right"
    attn_mask = mask if bias is None else bias.to(q.dtype)
    alone = attn_mask is None and not explicit
    if not pattern and (bias is None or mask is None) and (alone or not causal):
        return k, v, attn_mask, causal is True
    B, S_q, S_k = q.shape[0] if lengths else 1, q.shape[2], k.shape[2]
    keep, distance, _, past_k = reference.allowed_pairs(
        B, S_q, S_k, causal, window, q_lens, kv_lens, q.device
    )
    attn_mask = keep if mask is None else keep & mask
    if bias is not None or alibi_slopes is not None:
        added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        if alibi_slopes is not None:
            added = added - alibi_slopes.reshape(-1, q.shape[1], 1, 1) * distance.abs()
        attn_mask = torch.where(attn_mask, added.to(q.dtype), -math.inf)
    if lengths:  # stock attention multiplies padding by zero, and NaN times zero is NaN
        k, v = k.masked_fill(past_k, 0.0), v.masked_fill(past_k, 0.0)
    return k, v, attn_mask, False


def _torch_varlen(q, k, v, extras, options, return_lse):
    _, _, alibi_slopes, sinks, _, _, cu_seqlens_q, cu_seqlens_k = extras
    outputs, lses = (
        [q.new_empty(0, q.shape[1], v.shape[-1])],
        [q.new_empty(q.shape[1], 0, dtype=torch.float32)],
    )
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_bounds) - 1):
        one_q = q[q_bounds[b] : q_bounds[b + 1]].transpose(0, 1)[None]
        one_k, one_v = (t[k_bounds[b] : k_bounds[b + 1]].transpose(0, 1)[None] for t in (k, v))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        o, lse, _ = _torch_attention(
            one_q, one_k, one_v, (None, None, slopes, sinks) + (None,) * 4, options, return_lse, False
        )
        outputs.append(o[0].transpose(0, 1))
        lses.append(lse[0] if return_lse else None)
    unowned = q.shape[0] - q_bounds[-1]
    outputs.append(q.new_zeros(unowned, q.shape[1], v.shape[-1]))
    lses.append(q.new_full((q.shape[1], unowned), -math.inf, dtype=torch.float32))
    return torch.cat(outputs), torch.cat(lses, dim=1) if return_lse else None, None


_GIVEN = (
    "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? q_lens, Tensor? kv_lens, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seed, SymInt max_seqlen_q, SymInt max_seqlen_k, int causal, int window_left, int window_right, "
    "float softcap, float dropout_p, float scale, bool allow_tf32"
)


def _fwd_fake(q, k, v, *_):
    if q.dim() == 3:
        return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(
            q.shape[1], q.shape[0], dtype=torch.float32
        )
    B, H, S_q, _ = q.shape
    return q.new_empty(B, S_q, H, v.shape[-1]).transpose(1, 2), q.new_empty(B, H, S_q, dtype=torch.float32)


def _bwd_fake(do, dlse, q, k, v, o, lse, bias, *rest):
    needs_bias, needs_sinks, sinks = rest[-3], rest[-2], rest[2]
    shape = (
        tuple(1 if stride == 0 else n for n, stride in zip(bias.shape, bias.stride(), strict=True))
        if needs_bias
        else (0,)
    )
    dbias = (q if bias is None else bias).new_empty(shape)
    dsinks = (q if sinks is None else sinks).new_empty(
        q.shape[-2 if q.dim() == 3 else 1] if needs_sinks else 0
    )
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


backend.define(
    OP, f"attention_fwd(Tensor q, Tensor k, Tensor v, {_GIVEN}, str backend) -> (Tensor, Tensor)", _fwd_fake
)
backend.define(
    OP,
    f"attention_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_GIVEN}, bool bias_grad, "
    "bool sinks_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
backend.define(
    OP,
    f"attention_weights(Tensor q, Tensor k, Tensor lse, {_GIVEN}, str backend) -> Tensor",
    lambda q, k, *_: q.new_empty(*q.shape[:3], k.shape[2]),
)


@register_flop_formula(torch.ops.fastattn.attention_fwd)
def _fwd_flops(q, k, v, *_, out_shape=None, **__):
    """Both products over all pairs, as torch counts its own: causality and masks are not discounted."""
    return 2 * _pairs(q, k) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.fastattn.attention_bwd)
def _bwd_flops(do, dlse, q, k, v, *_, out_shape=None, **__):
    return 2 * _pairs(q, k) * (3 * q[-1] + 2 * v[-1])


def _pairs(q, k):
    return math.prod(q[:3]) * k[2] if len(q) == 4 else q[1] * q[0] * k[0]


def _triton_why_not(q, k, v, extras, return_weights):
    bias, mask, alibi_slopes, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k = extras
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"head dims up to 256 are served, q has {q.shape[-1]} and v has {v.shape[-1]}"
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        return f"a head dim of 0 (q {q.shape[-1]}, v {v.shape[-1]})"
    if k.shape[1] and not q.shape[1]:
        return NO_HEADS
    if backend.needs_grad(alibi_slopes):
        return "alibi_slopes requires grad, which only the composite computes"
    return backend.triton_why_not(q, k, v, *extras)


WHY_NOT = {"cuda": attention_why_not, "triton": _triton_why_not}
