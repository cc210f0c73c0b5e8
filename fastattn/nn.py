"""Drop-in modules: torch's constructors, arguments, return values and state_dict, computed by fastattn.functional.

Each class with a namesake in torch.nn is its subclass and replaces little but forward. What a class leaves to torch's own
forward is listed in its docstring; such a call counts as (class name, "torch") in fastattn.backend.calls, warns on a GPU
like any refused op, and raises under use_backend("triton") or use_backend("cuda"). TorchScript cannot compile these classes;
torch.fx.symbolic_trace keeps each as one node, as it keeps torch's, where it is part of a model.

Letters: N batch, L query length, S key length, E width, H heads, D = E / H.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Proxy

from fastattn import backend, functional

# Where autocast makes torch's softmax, and with it the weights of its MultiheadAttention, fp32.
SOFTMAX_WIDENED = backend.autocast_devices("softmax.int")


def _refuse_script(self):
    # torch.jit.script asks before it compiles; what it would say of our code names neither the module nor a way out
    raise NotImplementedError(
        f"torch.jit.script cannot compile fastattn's {type(self).__name__}; torch.jit.trace and torch.export can take it, or "
        "script the model as torch's modules compute it (after fastattn.unpatch, or built of torch.nn's classes)"
    )


def _recorded(module, *args):
    """Under torch.fx.symbolic_trace: the one node that a module of torch's would be."""
    tracer = args[0].tracer
    if not (path := tracer.path_of_module(module)):
        raise NotImplementedError(
            f"torch.fx.symbolic_trace cannot look into fastattn's {type(module).__name__}; trace a model that holds it, or use torch.export"
        )
    return tracer.create_proxy("call_module", path, args, {})


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on functional.layer_norm. Left to torch: nested tensors."""

    __prepare_scriptable__ = _refuse_script

    out_dtype = None  # here and below, as the function's: "input" keeps the input's dtype under autocast

    def forward(self, input):
        if isinstance(input, Proxy):
            return _recorded(self, input)
        if input.is_nested:
            backend.leave_to_torch(type(self).__name__, "nested tensors take torch's own kernels", input)
            return super().forward(input)
        return functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, out_dtype=self.out_dtype
        )


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm on functional.rms_norm. Left to torch: nested tensors."""

    __prepare_scriptable__ = _refuse_script

    out_dtype = None

    def forward(self, x):
        if isinstance(x, Proxy):
            return _recorded(self, x)
        if x.is_nested:
            backend.leave_to_torch(type(self).__name__, "nested tensors take torch's own kernels", x)
            return super().forward(x)
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps, out_dtype=self.out_dtype)


class Softmax(nn.Softmax):
    """torch.nn.Softmax on functional.softmax. Left to torch: nested tensors, and dim=None, which it deprecates and guesses."""

    __prepare_scriptable__ = _refuse_script

    out_dtype = None

    def forward(self, input):
        if isinstance(input, Proxy):
            return _recorded(self, input)
        if reason := _softmax_why_not(self, input):
            backend.leave_to_torch(type(self).__name__, reason, input)
            return super().forward(input)
        return functional.softmax(input, self.dim, out_dtype=self.out_dtype)


class LogSoftmax(nn.LogSoftmax):
    """torch.nn.LogSoftmax on functional.log_softmax. Left to torch: what Softmax leaves to it."""

    __prepare_scriptable__ = _refuse_script

    out_dtype = None

    def forward(self, input):
        if isinstance(input, Proxy):
            return _recorded(self, input)
        if reason := _softmax_why_not(self, input):
            backend.leave_to_torch(type(self).__name__, reason, input)
            return super().forward(input)
        return functional.log_softmax(input, self.dim, out_dtype=self.out_dtype)


def _softmax_why_not(module, input):
    if input.is_nested:
        return "nested tensors take torch's own kernels"
    return "dim=None lets torch guess the dim" if module.dim is None else None


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on functional.attention: softmax(q k^T / sqrt(D) + masks) v per head, then out_proj.

    Native: self- and cross-attention, batch_first or not, unbatched input, kdim and vdim, bias, add_bias_kv,
    add_zero_attn, boolean (True = ignore) and float masks in any combination, is_causal, dropout, and the weights,
    averaged or per head. Self-attention projects once; q, k and v are views of the result. Masks stay un-expanded, and
    the padding mask apart from attn_mask, unless both are float: then their sum (N, 1 or H, L, S) is made.

    Left to torch's forward:
    - nested tensors;
    - need_weights=True while dropout is active: torch returns the weights after dropout, ours are from before it;
    - is_causal=True with add_bias_kv or add_zero_attn, where the hint hides the added keys;
    - whatever torch refuses (shapes, mask dtypes, is_causal without attn_mask), so that the error is torch's.

    Differences: a query that may attend to nothing gets weights 0 and attends 0, so that its output is out_proj.bias, as
    in torch 2.13 with need_weights=False; torch gives NaN with need_weights=True and in its inference kernel. The output
    is contiguous, with batch_first too.
    """

    __prepare_scriptable__ = _refuse_script

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):  # fmt: skip
        if isinstance(query, Proxy):
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return _recorded(self, query, key, value, *options)
        reason = self._why_not(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if reason is not None:
            backend.leave_to_torch(type(self).__name__, reason, query)
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        q, k, v = self._project(query, key, value)  # (N, H, length, D)
        # As in torch: the hint replaces the mask only where nothing else has to be merged into it.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask, bias = _merge(None if causal else attn_mask, key_padding_mask, q)
        for k_row, v_row in self._added_keys(k):  # one more key and value, seen by every query
            k, v = torch.cat([k, k_row], dim=2), torch.cat([v, v_row], dim=2)
            mask = mask if mask is None else F.pad(mask, (0, 1), value=True)
            bias = bias if bias is None else F.pad(bias, (0, 1))
        dropout_p = self.dropout if self.training else 0.0
        options = dict(bias=bias, mask=mask, causal=causal, dropout_p=dropout_p)
        if need_weights:
            o, weights = functional.attention(q, k, v, **options, return_weights=True)
            weights = weights.to(backend.autocast_dtype(SOFTMAX_WIDENED, weights))
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            o, weights = functional.attention(q, k, v, **options), None

        y = F.linear(o.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)  # (N, L, E)
        if query.dim() == 2:
            return y[0], None if weights is None else weights[0]
        # The one layout copy, for batch_first=False: torch's output is contiguous there, and callers view it.
        return y if self.batch_first else y.transpose(0, 1).contiguous(), weights

    def _why_not(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
        """A sentence on a call that torch's forward serves, else None."""
        tensors = (query, key, value)
        if any(t.is_nested for t in tensors):
            return "nested tensors take torch's own kernels"
        if need_weights and self.training and self.dropout > 0.0:
            return "the weights after dropout were asked for (need_weights=False leaves them out)"
        if is_causal and (attn_mask is None or self.bias_k is not None or self.add_zero_attn):
            return "is_causal is a hint about attn_mask, and hides the keys that add_bias_kv or add_zero_attn adds"
        if query.dim() not in (2, 3) or any(t.dim() != query.dim() for t in tensors):
            return "query, key and value must all be 2-D or all 3-D"
        (L, N), (S, N_k) = (self._length_and_batch(t) for t in (query, key))
        widths = (self.embed_dim, self.kdim, self.vdim)
        if tuple(t.shape[-1] for t in tensors) != widths or N != N_k or key.shape[:-1] != value.shape[:-1]:
            return f"the shapes do not fit each other or the widths {widths} of query, key and value"
        for mask, shapes in (
            (key_padding_mask, ((N, S),) if query.dim() == 3 else ((S,),)),
            (attn_mask, ((L, S), (N * self.num_heads, L, S))),
        ):
            if mask is not None and not (
                mask.shape in shapes and (mask.dtype is torch.bool or mask.is_floating_point())
            ):
                return f"a mask is {mask.dtype} {tuple(mask.shape)}, not bool or float of {shapes[-1]}"
        return None

    def _length_and_batch(self, t):
        if t.dim() == 2:
            return t.shape[0], 1
        return (t.shape[1], t.shape[0]) if self.batch_first else (t.shape[0], t.shape[1])

    def _project(self, query, key, value):
        """q (N, H, L, D), k and v (N, H, S, D): views of one matmul for each different tensor that came in."""
        E, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            parts = zip((query, key, value), weights, biases, strict=True)
            return [self._heads(x, w, b)[0] for x, w, b in parts]
        if query is key and key is value:
            return self._heads(query, self.in_proj_weight, bias)
        sizes, inputs = ([E, 2 * E], (query, key)) if key is value else ([E, E, E], (query, key, value))
        weights = self.in_proj_weight.split(sizes)
        biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
        return [t for x, w, b in zip(inputs, weights, biases, strict=True) for t in self._heads(x, w, b)]

    def _heads(self, x, weight, bias):
        """The blocks of E columns of x weight^T + bias, each as an (N, H, length, D) view."""
        y = F.linear(x, weight, bias)
        if y.dim() == 2:
            y = y[None]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        y = y.view(*y.shape[:2], y.shape[2] // self.embed_dim, self.num_heads, self.head_dim)
        return [t.transpose(1, 2) for t in y.unbind(2)]

    def _added_keys(self, k):
        """Pairs of rows (N, H, 1, D) that add_bias_kv and add_zero_attn append to the keys and values."""
        shape = (*k.shape[:2], 1, k.shape[3])
        if self.bias_k is not None:
            yield tuple(t.view(1, *shape[1:]).expand(shape) for t in (self.bias_k, self.bias_v))
        if self.add_zero_attn:
            yield k.new_zeros(shape), k.new_zeros(shape)


def _merge(attn_mask, key_padding_mask, q):
    """torch's two masks (True = ignore, float = added) as attention's (mask, bias): True = attend, un-expanded, 4-D."""
    mask = bias = None
    if attn_mask is not None:
        attn_mask = (
            attn_mask[None, None]
            if attn_mask.dim() == 2
            else attn_mask.view(*q.shape[:2], *attn_mask.shape[1:])
        )
        mask, bias = (~attn_mask, None) if attn_mask.dtype is torch.bool else (None, attn_mask)
    if key_padding_mask is not None:
        padding = key_padding_mask.view(q.shape[0], 1, 1, -1)
        if padding.dtype is torch.bool and mask is None:
            mask = ~padding
        elif padding.dtype is torch.bool:  # both boolean: as a bias of -inf the padding stays (N, 1, 1, S)
            bias = q.new_zeros(padding.shape).masked_fill(padding, float("-inf"))
        else:
            bias = padding if bias is None else bias + padding
    return mask, bias


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on the modules above: post-norm by default, pre-norm with norm_first.

    The residual sum, its dropout and the norm behind it are one functional.add_layer_norm, unless one of the two modules
    was replaced or has hooks, which are then called as in torch. The inference kernel of torch is never taken. Masks go to
    MultiheadAttention as they come. A subclass that overrides torch's `_sa_block` or `_ff_block` overrides forward here.

    Left to torch's forward: nested tensors.
    """

    __prepare_scriptable__ = _refuse_script

    @functools.wraps(nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if isinstance(src, Proxy):
            return _recorded(self, src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            backend.leave_to_torch(type(self).__name__, "nested tensors take torch's own kernels", src)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x):
            masks = dict(attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
            return self.self_attn(x, x, x, need_weights=False, **masks)[0]

        def feed_forward(x):
            return self.linear2(self.dropout(self.activation(self.linear1(x))))

        if self.norm_first:
            x, residual = _add_norm(attend(self.norm1(src)), src, self.dropout1, self.norm2, prenorm=True)
            return residual + self.dropout2(feed_forward(x))
        x = _add_norm(attend(src), src, self.dropout1, self.norm1)
        return _add_norm(feed_forward(x), x, self.dropout2, self.norm2)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on the modules above: self-attention, attention over an encoder's memory, feed-forward.

    As TransformerEncoderLayer; masks are torch's own, True = ignore, tgt_mask (L, L) and memory_mask (L, S). A subclass
    that overrides torch's `_sa_block`, `_mha_block` or `_ff_block` overrides forward here. Left to torch's forward: nested tensors.
    """

    __prepare_scriptable__ = _refuse_script

    @functools.wraps(nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
                memory_key_padding_mask=None, tgt_is_causal=False, memory_is_causal=False):  # fmt: skip
        if isinstance(tgt, Proxy):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            return _recorded(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        own = dict(attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
        across = dict(
            attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal
        )
        if tgt.is_nested or memory.is_nested:
            backend.leave_to_torch(type(self).__name__, "nested tensors take torch's own kernels", tgt)
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )

        def attend(x):
            return self.self_attn(x, x, x, need_weights=False, **own)[0]

        def attend_across(x):
            return self.multihead_attn(x, memory, memory, need_weights=False, **across)[0]

        def feed_forward(x):
            return self.linear2(self.dropout(self.activation(self.linear1(x))))

        if self.norm_first:
            x, residual = _add_norm(attend(self.norm1(tgt)), tgt, self.dropout1, self.norm2, prenorm=True)
            x, residual = _add_norm(attend_across(x), residual, self.dropout2, self.norm3, prenorm=True)
            return residual + self.dropout3(feed_forward(x))
        x = _add_norm(attend(tgt), tgt, self.dropout1, self.norm1)
        x = _add_norm(attend_across(x), x, self.dropout2, self.norm2)
        return _add_norm(feed_forward(x), x, self.dropout3, self.norm3)


class Transformer(nn.Transformer):
    """torch.nn.Transformer of the layers above: the encoder and decoder of arXiv 1706.03762, without embeddings or head.

    A custom_encoder or custom_decoder stays as it is. The encoder makes no nested tensors of a padded batch.
    """

    __prepare_scriptable__ = _refuse_script

    @functools.wraps(nn.Transformer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stack, kind in ((self.encoder, nn.TransformerEncoder), (self.decoder, nn.TransformerDecoder)):
            if type(stack) is kind:
                for layer in stack.layers:
                    _take_over(layer)
                _take_over(stack)
        if type(self.encoder) is nn.TransformerEncoder:
            self.encoder.use_nested_tensor = False


OURS = {
    nn.LayerNorm: LayerNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


def _take_over(module):
    """Children, and the module itself, become ours where torch's: re-classed, not rebuilt, so that a seed gives torch's weights."""
    for m in (module, *module.children()):
        m.__class__ = OURS.get(type(m), type(m))


def _add_norm(x, residual, dropout, norm, prenorm=False):
    """norm(residual + dropout(x)), and the sum itself with prenorm; fused where both modules are what their types say."""
    plain = (
        type(dropout) is nn.Dropout and type(norm) is LayerNorm and not any(map(_has_hooks, (dropout, norm)))
    )
    # Autocast leaves x narrower than the residual. On a GPU it makes the norm fp32 again; on a CPU the sum's dtype decides.
    if plain and (x.dtype == residual.dtype or not x.is_cpu):
        p = dropout.p if dropout.training else 0.0
        affine = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return functional.add_layer_norm(
            x, residual, *affine, dropout_p=p, prenorm=prenorm, out_dtype=norm.out_dtype
        )
    total = residual + dropout(x)
    return (norm(total), total) if prenorm else norm(total)


def _has_hooks(module):
    """Whether a call of the module does more than its class's forward, by torch's hooks or accelerate's, which fetch weights."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class SinusoidalPositionalEncoding(nn.Module):
    """y = dropout(scale * x + PE), PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos(same); x, y (..., S, C).

    Position pos of a row is its index plus offset, or position_ids (any shape that broadcasts to (..., S)). There are no
    parameters and no longest sequence; "Attention Is All You Need" has scale = sqrt(C).
    """

    __prepare_scriptable__ = _refuse_script

    def __init__(self, dim, dropout=0.0, scale=1.0):
        super().__init__()
        self.dim, self.dropout, self.scale = dim, dropout, scale

    def forward(self, x, position_ids=None, offset=0):
        _check_width(self, x, self.dim)
        p = self.dropout if self.training else 0.0
        return functional.add_positional_encoding(
            x, position_ids=position_ids, offset=offset, scale=self.scale, dropout_p=p
        )

    def extra_repr(self):
        return f"{self.dim}, dropout={self.dropout}, scale={self.scale}"


class LearnedPositionalEncoding(nn.Module):
    """y = dropout(scale * x + weight[pos]) with a trained table weight (num_positions, dim); x, y (..., S, dim).

    Position pos of a row is its index plus offset, or position_ids. The table starts at N(0, 0.02).
    """

    __prepare_scriptable__ = _refuse_script

    def __init__(self, num_positions, dim, dropout=0.0, scale=1.0, device=None, dtype=None):
        super().__init__()
        self.num_positions, self.dim, self.dropout, self.scale = num_positions, dim, dropout, scale
        self.weight = nn.Parameter(torch.empty(num_positions, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x, position_ids=None, offset=0):
        _check_width(self, x, self.dim)
        p = self.dropout if self.training else 0.0
        return functional.add_positional_encoding(
            x, self.weight, position_ids=position_ids, offset=offset, scale=self.scale, dropout_p=p
        )

    def extra_repr(self):
        return f"{self.num_positions}, {self.dim}, dropout={self.dropout}, scale={self.scale}"


def _check_width(module, x, dim):
    if x.dim() < 2 or x.shape[-1] != dim:
        raise ValueError(f"{type(module).__name__}: x is {tuple(x.shape)}, must be (..., S, {dim})")


class Embeddings(nn.Module):
    """y = dropout(LayerNorm(token[ids] + type[type_ids] + position[position_ids])): input_ids (..., S) -> y (..., S, dim).

    Positions, types and the norm are optional (num_positions=0, num_types=0, norm=False). Absent type_ids are 0, absent
    position_ids 0 .. S-1. The parameter names are those of BERT's embeddings; tables start at N(0, 0.02), padding_idx at 0.
    """

    __prepare_scriptable__ = _refuse_script

    def __init__(self, num_tokens, dim, num_positions=0, num_types=0, *, norm=True, eps=1e-12, padding_idx=None,
                 dropout=0.0, device=None, dtype=None):  # fmt: skip
        super().__init__()
        options = dict(device=device, dtype=dtype)
        self.dropout = dropout
        self.word_embeddings = nn.Embedding(num_tokens, dim, padding_idx=padding_idx, **options)
        self.position_embeddings = nn.Embedding(num_positions, dim, **options) if num_positions else None
        self.token_type_embeddings = nn.Embedding(num_types, dim, **options) if num_types else None
        self.LayerNorm = LayerNorm(dim, eps=eps, **options) if norm else None
        self.reset_parameters()

    def reset_parameters(self):
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
                table._fill_padding_idx_with_zero()
        if self.LayerNorm is not None:
            self.LayerNorm.reset_parameters()

    def forward(self, input_ids, type_ids=None, position_ids=None):
        norm, tokens = self.LayerNorm, self.word_embeddings
        positions, types = (
            None if table is None else table.weight
            for table in (self.position_embeddings, self.token_type_embeddings)
        )
        if type_ids is not None and types is None:
            raise ValueError("Embeddings: type_ids were given to a module without types; set num_types")
        if position_ids is not None and positions is None:
            raise ValueError(
                "Embeddings: position_ids were given to a module without positions; set num_positions"
            )
        affine = {} if norm is None else dict(norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)
        p = self.dropout if self.training else 0.0
        return functional.embeddings(
            input_ids, tokens.weight, positions, type_ids=type_ids, type_table=types, position_ids=position_ids,
            padding_idx=tokens.padding_idx, dropout_p=p, **affine,
        )  # fmt: skip

    def extra_repr(self):
        return f"dropout={self.dropout}"
