"""Positional encodings and the fused embeddings: public functions, torch ops, gradients, which backends can serve them."""

import math
import string

import torch
import torch.nn.functional as F

from fastattn import backend, cuda

OP = "position"
stock_layer_norm = F.layer_norm  # bound at import, since fastattn.enable() puts ours there
MAX_NORM_C = 4096  # a wider row with its sums does not fit a Triton program's registers


def add_positional_encoding(x, table=None, *, position_ids=None, offset=0, scale=1.0, dropout_p=0.0):
    """y = dropout(scale * x + E[p]), E a learned table or the sinusoids of arXiv 1706.03762, section 3.5.

    E[p, 2i] = sin(p / 10000^(2i / C)) and E[p, 2i+1] = cos(same) where table is None, exact to fp32 for p < 2^24.

    x: (..., S, C), fp16, bf16 or fp32. table: (P, C), any of these dtypes, or None. The position of row s is offset + s, or
    position_ids[..., s], int32 or int64, (S,) or anything that broadcasts to x's (..., S). dropout_p in [0, 1] is
    applied whenever it is above 0: pass 0 in evaluation. Returns x's shape and dtype; x and table get gradients, the table's in
    a fixed order of summation. Raises TypeError and ValueError for what does not fit, IndexError for positions outside
    the table (values on a GPU are only read under fastattn.backend.debug; a wrong one gives wrong numbers there).

    >>> add_positional_encoding(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """
    name = "add_positional_encoding"
    backend.need_tensors(name, x=x)
    backend.need_tensors_or_none(name, table=table, position_ids=position_ids)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"{name}: x must be floating (..., S, C); it is {x.dtype} {tuple(x.shape)}")
    S, C = x.shape[-2:]
    _check_dropout(name, dropout_p)
    if isinstance(offset, torch.Tensor):
        raise TypeError(
            f"{name}: offset is a tensor, must be an int; positions on the device go into position_ids"
        )
    if position_ids is not None and offset != 0:
        raise ValueError(f"{name}: offset is {offset}, but position_ids were given: add it to them")
    if table is not None:
        _check_table(name, "table", table, C, x)
        if position_ids is None and not 0 <= offset <= table.shape[0] - S:
            raise IndexError(
                f"{name}: offset {offset} and S {S} need rows {offset} .. {offset + S - 1}; table has {table.shape[0]}"
            )
    _check_ids(name, "position_ids", position_ids, x.shape[:-1], x, None if table is None else table.shape[0])
    if backend.in_parts(x) and not dropout_p:

        def call(x, table, position_ids):
            return add_positional_encoding(x, table, position_ids=position_ids, offset=offset, scale=scale)

        dims = string.ascii_lowercase[: x.dim()]
        names = dims, f"P{dims[-1]}", _names_of_ids(dims[:-1], position_ids)
        # rows know their places only by their ids
        split = dims[: -2 if position_ids is None else -1]
        y = backend.on_parts(call, (x, table, position_ids), names, split, (dims,))
        if y is not NotImplemented:
            return y
    chosen = backend.choose(OP, WHY_NOT, x, table, position_ids, N=C)
    if chosen == "torch":
        y = _stock_add(x, table, position_ids, offset, scale)
        return F.dropout(y, dropout_p) if dropout_p else y
    seed = backend.draw_seed(x) if dropout_p else None
    if backend.needs_grad(x, table):
        return _AddPositionalEncoding.apply(x, table, position_ids, seed, offset, scale, dropout_p, chosen)
    return backend.run(
        "add_positional_encoding_fwd", chosen, OP, x, table, position_ids, seed, offset, scale, dropout_p
    )


def embeddings(
    input_ids, token_table, position_table=None, *, type_ids=None, type_table=None, position_ids=None,
    norm_weight=None, norm_bias=None, eps=1e-12, padding_idx=None, dropout_p=0.0,
):  # fmt: skip
    """y = dropout(layer_norm(token_table[input_ids] + type_table[type_ids] + position_table[position_ids])) in one pass.

    input_ids: (..., S) int32 or int64; token_table (V, C), type_table (T, C), position_table (P, C), norm_weight, norm_bias
    (C,): fp16, bf16 or fp32, each its own. Only what is given takes part: no norm_weight, no norm. type_ids and position_ids
    broadcast to input_ids' shape; absent ones are 0 and 0 .. S-1. Rows of padding_idx get no gradient.
    Returns (..., S, C) in token_table's dtype; every table and the norm get gradients, summed in a fixed order. dropout_p
    is applied whenever it is above 0. Errors as add_positional_encoding's.

    >>> embeddings(torch.tensor([[1, 0]]), torch.eye(2))
    tensor([[[0., 1.],
             [1., 0.]]])
    """
    name = "embeddings"
    backend.need_tensors(name, input_ids=input_ids, token_table=token_table)
    backend.need_tensors_or_none(
        name, position_table=position_table, type_ids=type_ids, type_table=type_table, position_ids=position_ids,
        norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    if token_table.dim() != 2:
        raise ValueError(f"{name}: token_table must be (V, C); it is {tuple(token_table.shape)}")
    V, C = token_table.shape
    if input_ids.dim() == 0:
        raise ValueError(f"{name}: input_ids must be (..., S); it has no dimension")
    _check_dropout(name, dropout_p)
    _check_table(name, "token_table", token_table, C, input_ids)
    _check_ids(name, "input_ids", input_ids, input_ids.shape, token_table, V)
    for kind, ids, table in (("type", type_ids, type_table), ("position", position_ids, position_table)):
        if table is not None:
            _check_table(name, f"{kind}_table", table, C, input_ids)
            _check_ids(name, f"{kind}_ids", ids, input_ids.shape, token_table, table.shape[0])
        elif ids is not None:
            raise ValueError(f"{name}: {kind}_ids were given without a {kind}_table")
    if position_table is not None and position_ids is None and input_ids.shape[-1] > position_table.shape[0]:
        raise IndexError(
            f"{name}: input_ids has S {input_ids.shape[-1]}; position_table has {position_table.shape[0]} rows"
        )
    for what, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None and tuple(t.shape) != (C,):
            raise ValueError(f"{name}: {what} must be ({C},) like token_table's rows; it is {tuple(t.shape)}")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{name}: norm_bias was given without a norm_weight")
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"{name}: padding_idx {padding_idx} is outside token_table's {V} rows")

    tables = (token_table, type_table, position_table, norm_weight, norm_bias)
    if backend.in_parts(input_ids) and not dropout_p:

        def call(input_ids, type_ids, position_ids, token_table, type_table, position_table, *norm):
            return embeddings(
                input_ids, token_table, position_table, type_ids=type_ids, type_table=type_table, position_ids=position_ids,
                norm_weight=norm[0], norm_bias=norm[1], eps=eps, padding_idx=padding_idx,
            )  # fmt: skip

        dims = string.ascii_lowercase[: input_ids.dim()]
        ids = (input_ids, type_ids, position_ids)
        names = (*(_names_of_ids(dims, t) for t in ids), "VC", "TC", "PC", "C", "C")
        split = dims if position_table is None or position_ids is not None else dims[:-1]
        y = backend.on_parts(call, (*ids, *tables), names, split, (f"{dims}C",))
        if y is not NotImplemented:
            return y
    chosen = backend.choose(
        OP,
        WHY_NOT_EMBEDDINGS,
        *tables,
        input_ids,
        type_ids,
        position_ids,
        N=C,
        elements=input_ids.numel() * C,
    )
    if chosen == "torch":
        y = _stock_embeddings(input_ids, type_ids, position_ids, *tables, eps, padding_idx)
        return F.dropout(y, dropout_p) if dropout_p else y
    seed = backend.draw_seed(token_table) if dropout_p else None
    ids = (input_ids, type_ids, position_ids)
    if backend.needs_grad(*tables):
        tensors = (*ids, *tables)
        if torch.compiler.is_compiling():
            tensors = backend.distinct(*tensors)
        return _Embeddings.apply(*tensors, seed, eps, dropout_p, padding_idx, chosen)
    return backend.run("embeddings_fwd", chosen, OP, *ids, *tables, seed, eps, dropout_p)[0]


def _names_of_ids(dims, ids):
    """The names of ids' dims, which broadcast to `dims` from the right."""
    return "" if ids is None else dims[len(dims) - ids.dim() :]


def _check_dropout(name, dropout_p):
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p is {dropout_p}, must be between 0 and 1")


def _check_table(name, what, table, C, other):
    if not table.is_floating_point():
        raise TypeError(f"{name}: {what} is {table.dtype}, must be floating")
    if table.dim() != 2 or table.shape[1] != C:
        raise ValueError(f"{name}: {what} must be (rows, C) with C = {C}; it is {tuple(table.shape)}")
    if table.device != other.device:
        raise ValueError(f"{name}: {what} is on {table.device}, the other tensors on {other.device}")
    if table.shape[0] == 0 and other.numel():
        raise IndexError(f"{name}: {what} has no rows")


def _check_ids(name, what, ids, shape, other, rows):
    """ids broadcast to `shape` and, where their values can be read for nothing, lie in 0 .. rows - 1 (rows None: anywhere)."""
    if ids is None:
        return
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: {what} is {ids.dtype}, must be int32 or int64")
    if ids.device != other.device:
        raise ValueError(f"{name}: {what} is on {ids.device}, the other tensors on {other.device}")
    kept = shape[len(shape) - ids.dim() :]
    if ids.dim() > len(shape) or any(
        size not in (1, full) for size, full in zip(ids.shape, kept, strict=True)
    ):
        raise ValueError(f"{name}: {what} is {tuple(ids.shape)}, must broadcast to {tuple(shape)}")
    if rows is None or ids.numel() == 0 or not backend.readable(ids):
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(
            f"{name}: {what} has values from {low} to {high}; its table has rows 0 .. {rows - 1}"
        )


def _dropout_mask(seed, shape, dropout_p, chosen):
    """fp32 of `shape`: 0 or the rescale, the kernels' own draw, as dropout(1 * 1 + 0)."""
    C = shape[-1]
    ones = torch.ones((), device=seed.device).expand(math.prod(shape[:-1]), 1, C)
    zeros = torch.zeros(1, C, device=seed.device)
    arguments = (ones, zeros, None, seed, 0, 1.0, dropout_p)
    return backend.run("add_positional_encoding_fwd", chosen, OP, *arguments).view(shape)


def _sinusoidal(positions, C):
    # In float64: an fp32 angle of a million radians has lost its last 0.06.
    pair = torch.arange((C + 1) // 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None] * torch.exp(pair * (-2 * math.log(10000.0) / max(C, 1)))
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., :C]


def _stock_add(x, table, position_ids, offset, scale):
    S, C = x.shape[-2:]
    if table is None:
        positions = (
            torch.arange(offset, offset + S, device=x.device) if position_ids is None else position_ids
        )
        e = _sinusoidal(positions, C).to(x.dtype)
    else:
        e = table[offset : offset + S] if position_ids is None else F.embedding(position_ids, table)
    return torch.add(e, x, alpha=scale).to(x.dtype)


def _stock_embeddings(
    input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias, eps, padding_idx
):  # fmt: skip
    y = F.embedding(input_ids, token_table, padding_idx)
    if type_table is not None:
        y = y + (type_table[0] if type_ids is None else F.embedding(type_ids, type_table))
    if position_table is not None:
        rows = (
            position_table[: y.shape[-2]]
            if position_ids is None
            else F.embedding(position_ids, position_table)
        )
        y = y + rows
    if norm_weight is not None:
        dtype = torch.promote_types(y.dtype, norm_weight.dtype)  # a GPU's layer_norm takes no mixture
        bias = None if norm_bias is None else norm_bias.to(dtype)
        y = stock_layer_norm(y.to(dtype), y.shape[-1:], norm_weight.to(dtype), bias, eps)
    return y.to(token_table.dtype)


class _AddPositionalEncoding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, position_ids, seed, offset, scale, dropout_p, chosen):
        ctx.save_for_backward(table, position_ids, seed)
        ctx.options = offset, scale, dropout_p
        ctx.chosen = chosen
        return backend.run(
            "add_positional_encoding_fwd", chosen, OP, x, table, position_ids, seed, offset, scale, dropout_p
        )

    @staticmethod
    def backward(ctx, dy):
        table, position_ids, seed = ctx.saved_tensors
        offset, scale, dropout_p = ctx.options
        x_grad, table_grad = ctx.needs_input_grad[:2]
        if backend.wants_double_backward():
            x = torch.zeros_like(dy, requires_grad=x_grad)  # y is linear in x: its value does not matter
            mask = None if seed is None else _dropout_mask(seed, dy.shape, dropout_p, ctx.chosen)

            def composite(x, table):
                y = _stock_add(x, table, position_ids, offset, scale)
                return y if mask is None else (y * mask).to(y.dtype)

            return *backend.composite_backward(composite, (x, table), (dy,)), *(None,) * 6
        if not table_grad and seed is None:  # dx is dy but for a factor: no kernel of ours is better
            return dy if scale == 1.0 else dy * scale, *(None,) * 7
        dx, dtable = backend.run(
            "add_positional_encoding_bwd", ctx.chosen, OP,
            dy, table, position_ids, seed, offset, scale, dropout_p, x_grad, table_grad,
        )  # fmt: skip
        return dx if x_grad else None, dtable if table_grad else None, *(None,) * 6


class _Embeddings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias,
        seed, eps, dropout_p, padding_idx, chosen,
    ):  # fmt: skip
        ids, tables = (
            (input_ids, type_ids, position_ids),
            (token_table, type_table, position_table, norm_weight, norm_bias),
        )
        y, mean, rstd = backend.run("embeddings_fwd", chosen, OP, *ids, *tables, seed, eps, dropout_p)
        ctx.save_for_backward(*ids, *tables, mean, rstd, seed)
        ctx.options = eps, dropout_p, padding_idx
        ctx.chosen = chosen
        return y

    @staticmethod
    def backward(ctx, dy):
        *ids_and_tables, mean, rstd, seed = ctx.saved_tensors
        ids, tables = ids_and_tables[:3], ids_and_tables[3:]
        eps, dropout_p, padding_idx = ctx.options
        wanted = ctx.needs_input_grad[3:8]
        if backend.wants_double_backward():
            mask = None if seed is None else _dropout_mask(seed, dy.shape, dropout_p, ctx.chosen)

            def composite(*tables):
                y = _stock_embeddings(*ids, *tables, eps, padding_idx)
                return y if mask is None else (y * mask).to(y.dtype)

            return *(None,) * 3, *backend.composite_backward(composite, tables, (dy,)), *(None,) * 5
        padding_row = -1 if padding_idx is None else padding_idx % tables[0].shape[0]
        grads = backend.run(
            "embeddings_bwd", ctx.chosen, OP,
            dy, *ids, *tables, mean, rstd, seed, padding_row, dropout_p, *wanted[:3], wanted[3] or wanted[4],
        )  # fmt: skip
        return *(None,) * 3, *(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 5


def _fake_add_bwd(dy, table, position_ids, seed, offset, scale, dropout_p, x_grad, table_grad, backend):
    return (
        dy.new_empty(dy.shape if x_grad else (0,)),
        table.new_empty(table.shape) if table_grad else dy.new_empty(0),
    )


def _fake_embeddings_fwd(
    input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias,
    seed, eps, dropout_p, backend,
):  # fmt: skip
    M = 0 if norm_weight is None else input_ids.numel()
    mean, rstd = (token_table.new_empty(M, dtype=torch.float32) for _ in range(2))
    return token_table.new_empty(*input_ids.shape, token_table.shape[1]), mean, rstd


def _fake_embeddings_bwd(
    dy, input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias,
    mean, rstd, seed, padding_idx, dropout_p, token_grad, type_grad, position_grad, norm_grad, backend,
):  # fmt: skip
    targets = (
        (token_table, token_grad),
        (type_table, type_grad),
        (position_table, position_grad),
        (norm_weight, norm_grad),
        (norm_bias, norm_grad),
    )
    return tuple(
        t.new_empty(t.shape) if wanted and t is not None else dy.new_empty(0) for t, wanted in targets
    )


backend.define(
    OP,
    "add_positional_encoding_fwd(Tensor x, Tensor? table, Tensor? position_ids, Tensor? seed, int offset, float scale,"
    " float dropout_p, str backend) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)
backend.define(
    OP,
    "add_positional_encoding_bwd(Tensor dy, Tensor? table, Tensor? position_ids, Tensor? seed, int offset, float scale,"
    " float dropout_p, bool x_grad, bool table_grad, str backend) -> (Tensor, Tensor)",
    _fake_add_bwd,
)
backend.define(
    OP,
    "embeddings_fwd(Tensor input_ids, Tensor? type_ids, Tensor? position_ids, Tensor token_table, Tensor? type_table,"
    " Tensor? position_table, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, float eps, float dropout_p,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _fake_embeddings_fwd,
)
backend.define(
    OP,
    "embeddings_bwd(Tensor dy, Tensor input_ids, Tensor? type_ids, Tensor? position_ids, Tensor token_table,"
    " Tensor? type_table, Tensor? position_table, Tensor? norm_weight, Tensor? norm_bias, Tensor mean, Tensor rstd,"
    " Tensor? seed, int padding_idx, float dropout_p, bool token_grad, bool type_grad, bool position_grad,"
    " bool norm_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_embeddings_bwd,
)


def _why_not_embeddings(token_table, type_table, position_table, norm_weight, *others):
    C = token_table.shape[1]
    if norm_weight is not None and C > MAX_NORM_C:
        return f"C {C} is above {MAX_NORM_C}, the widest row the fused norm holds in registers"
    return backend.triton_why_not(token_table, type_table, position_table, norm_weight, *others)


WHY_NOT = {"cuda": cuda.why_not, "triton": backend.triton_why_not}
WHY_NOT_EMBEDDINGS = {"cuda": cuda.why_not, "triton": _why_not_embeddings}
