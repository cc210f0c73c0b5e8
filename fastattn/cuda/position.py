"""The launchers of positional encodings and embeddings in CUDA C++: csrc/position.cu."""

import math

import torch

from fastattn import cuda

# What a launch aims at where it may choose: enough to keep 132 multiprocessors busy to the end, by the register counts; no
# GPU has timed them. Tests ask for something else with config=dict(ROWS=...), rows of a thread, or dict(GROUPS=...).
ADD = 4096  # blocks of 256 threads
ADD_BACKWARD = 1024
NORM_BACKWARD = [(512, 1584), (1024, 660), (math.inf, 264)]  # (widest C, groups of threads that walk rows)
BLOCK_BYTES = 256 * 16  # of x, that a block moves at a time
ROWS = 16  # of one thread at most, which share what it prepares for its columns
CHUNK = (16, 128)  # least and most sorted rows that a thread adds one after the other


def add_positional_encoding_fwd(x, table, position_ids, seed, offset, scale, dropout_p, config=None):
    """y of x (..., S, C), table (P, C) or None, position_ids broadcastable to (..., S) or None, seed (2,) int64 or None."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = _batched(x)
    cuda.module(x).add_positional_encoding_fwd(
        rows, _readable(table, x.dtype), _batched_ids(position_ids, x.shape[:-1]), y, seed, offset, scale,
        dropout_p, *_lanes(rows, ADD, config),
    )  # fmt: skip
    return y


def add_positional_encoding_bwd(
    dy, table, position_ids, seed, offset, scale, dropout_p, x_grad, table_grad, config=None
):
    """(dx, dtable) for dy (..., S, C) and what forward took; an unwanted one is empty."""
    dx = torch.empty(dy.shape if x_grad else 0, dtype=dy.dtype, device=dy.device)
    if dy.numel() == 0:
        return dx, _zeros(table) if table_grad else dx.new_empty(0)
    ids = _batched_ids(position_ids, dy.shape[:-1])
    wanted, summed = dx if x_grad else None, table if table_grad else None
    dtable = _batch_sums(dy, wanted, summed, ids, seed, offset, scale, dropout_p, config)
    return dx, dx.new_empty(0) if dtable is None else dtable


def embeddings_fwd(
    input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias, seed, eps, dropout_p
):  # fmt: skip
    """(y (..., S, C), mean (M,), rstd (M,)) for ids (..., S) and tables (V, C), (T, C), (P, C); no norm, no statistics."""
    M, C = input_ids.numel(), token_table.shape[1]
    y = torch.empty(*input_ids.shape, C, dtype=token_table.dtype, device=token_table.device)
    mean, rstd = (
        torch.empty(0 if norm_weight is None else M, dtype=torch.float32, device=y.device) for _ in range(2)
    )
    if y.numel() == 0:
        return y, mean, rstd
    saved = (None, None) if norm_weight is None else (mean, rstd)
    looked_up = _lookups(
        input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias
    )
    cuda.module(y).embeddings_fwd(_batched(y), *saved, seed, eps, dropout_p, *looked_up)
    return y, mean, rstd


def embeddings_bwd(
    dy, input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias,
    mean, rstd, seed, padding_idx, dropout_p, token_grad, type_grad, position_grad, norm_grad, config=None,
):  # fmt: skip
    """(dtoken, dtype, dposition, dweight, dbias) for dy (..., S, C) and what forward took; an unwanted one is empty.

    Rows of padding_idx (-1: none) get nothing in dtoken.
    """
    wanted = (token_grad, type_grad, position_grad, norm_grad, norm_grad and norm_bias is not None)
    targets = (token_table, type_table, position_table, norm_weight, norm_bias)
    if dy.numel() == 0:
        return tuple(_zeros(t) if w else dy.new_empty(0) for t, w in zip(targets, wanted, strict=True))
    dtoken, dtype, dposition, dweight, dbias = (dy.new_empty(0) for _ in targets)
    rows = _batched(dy)
    B, S, C = rows.shape
    row_ids, row_types, row_positions = (
        _batched_ids(ids, input_ids.shape) for ids in (input_ids, type_ids, position_ids)
    )
    dx, dx_seed, sums = rows, seed, None  # without the norm the tables' rows take dropout(dy) itself
    if norm_weight is None and position_grad:
        dposition = _batch_sums(rows, None, position_table, row_positions, seed, 0, 1.0, dropout_p)
    if norm_weight is not None:
        dx_seed = None
        summed = position_grad and _shared(row_positions)
        lanes = _norm_lanes(B, S, C, summed, config)
        if summed:
            dposition, sums = _position_sums(position_table, row_positions, 0, lanes[0], S, torch.float32)
        rows_wanted = (
            token_grad or (position_grad and not summed) or (type_grad and not (summed and type_ids is None))
        )
        dx = torch.empty(B, S, C, dtype=token_table.dtype, device=dy.device) if rows_wanted else None
        norm_sums = None
        if norm_grad:
            norm_sums = torch.empty(lanes[0] * lanes[1], 2, C, dtype=torch.float32, device=dy.device)
            dweight = torch.empty_like(norm_weight, memory_format=torch.contiguous_format)
            if norm_bias is not None:
                dbias = torch.empty_like(norm_bias, memory_format=torch.contiguous_format)
        looked_up = _lookups(
            input_ids, type_ids, position_ids, token_table, type_table, position_table, norm_weight, norm_bias
        )
        cuda.module(dy).embeddings_bwd(
            rows, mean, rstd, dx, sums, norm_sums, dweight if norm_grad else None, dbias if wanted[4] else None, seed,
            dropout_p, *lanes, *looked_up,
        )  # fmt: skip
        if type_grad and summed and type_ids is None:  # every row is of type 0
            dtype = _zeros(type_table)
            _add_up(sums.view(-1, C), dtype[0])
        if summed:
            _finish_positions(dposition, sums, row_positions, 0)
        elif position_grad:
            dposition = _segment_sums(_zeros(position_table), dx, row_positions)
    if token_grad:
        dtoken = _segment_sums(_zeros(token_table), dx, row_ids, dx_seed, dropout_p, padding_idx)
    if type_grad and type_ids is not None:
        dtype = _segment_sums(_zeros(type_table), dx, row_types, dx_seed, dropout_p)
    elif type_grad and dtype.numel() == 0:  # every row is of type 0: one position, B * S times
        dtype = _batch_sums(dx.reshape(-1, 1, C), None, type_table, None, dx_seed, 0, 1.0, dropout_p)
    return dtoken, dtype, dposition, dweight, dbias


def _batch_sums(dy, dx, table, ids, seed, offset, scale, dropout_p, config=None):
    """Fill dx = scale * dropout(dy), if there is one, and return the gradient of the table that was added, if any."""
    rows = _batched(dy)
    B, S, C = rows.shape
    shared = table is not None and _shared(ids)
    lanes, dtable, sums = _lanes(rows, ADD_BACKWARD, config), None, None
    if shared:
        # Partials are S * C fp32 a lane: at B / 32 lanes at most a tenth of what the rows themselves are.
        blocks = _cdiv(S * C * rows.element_size(), BLOCK_BYTES)
        each = _cdiv(B, max(1, min(ADD_BACKWARD // blocks, B // 32)))
        lanes = _cdiv(B, each if config is None else config["ROWS"]), S
        dtable, sums = _position_sums(table, ids, offset, lanes[0], S)
    if dx is not None or shared:
        cuda.module(dy).add_positional_encoding_bwd(rows, dx, sums, seed, scale, dropout_p, *lanes)
    if shared:
        _finish_positions(dtable, sums, ids, offset)
    elif table is not None:
        dtable = _segment_sums(_zeros(table), rows, ids, seed, dropout_p)
    return dtable


def _position_sums(table, ids, offset, lanes, S, dtype=None):
    """The gradient of a table whose row at s is one for every b, and where a kernel leaves its sums (lanes, S, C).

    That is in the gradient itself, (S, C), if nothing is to be added or sorted afterwards and the kernel writes its dtype
    (None: any). Rows that no position points to are zeroed by torch.zeros: a memset at full bandwidth, where a kernel
    would have to search the ids for the gaps.
    """
    P, C = table.shape
    whole = ids is None and S == P
    dtable = torch.empty(P, C, dtype=table.dtype, device=table.device) if whole else _zeros(table)
    if ids is None and lanes == 1 and dtype in (None, table.dtype):
        return dtable, dtable.narrow(0, offset, S)
    return dtable, torch.empty(lanes, S, C, dtype=torch.float32, device=table.device)


def _finish_positions(dtable, sums, ids, offset):
    """Bring the sums of _position_sums into dtable where they are not there yet."""
    if sums.dim() == 2:
        return
    lanes, S, C = sums.shape
    if ids is None:
        _add_up(sums.flatten(1), dtable.narrow(0, offset, S))
        return
    rows = sums if lanes == 1 else torch.empty(1, S, C, dtype=torch.float32, device=sums.device)
    if lanes > 1:
        _add_up(sums.flatten(1), rows)
    _segment_sums(dtable, rows, ids.select(0, 0))


def _add_up(partials, out):
    """out (R numbers) = the sum of partials (G, R) fp32 over G."""
    cuda.module(out).sum_partials(partials, out)
    return out


def _segment_sums(dtable, dx, ids, seed=None, dropout_p=0.0, skip=-1):
    """Add the rows of dx (B, S, C), dropped out if there is a seed, into those of dtable (zeros) that ids (B, S) name."""
    B, S, C = dx.shape
    # 32-bit keys halve the passes of the radix sort; stable, so that equal ids keep the order of their rows.
    keys, order = torch.sort(ids.reshape(-1).to(torch.int32), stable=True)
    least, most = CHUNK
    chunk = min(max(_cdiv(B * S, 1024), least), most)
    partials = torch.empty(_cdiv(B * S, chunk), 2, C, dtype=torch.float32, device=dx.device)
    cuda.module(dx).segment_sums(dx, keys, order, dtable, partials, seed, dropout_p, skip, chunk)
    return dtable


def _lanes(rows, blocks, config):
    """(b_lanes, s_lanes) for about `blocks` blocks: first over b, which share an encoding, then over s."""
    B, S = rows.shape[:2]
    each = min(max(rows.numel() * rows.element_size() // (BLOCK_BYTES * blocks), 1), ROWS)
    each = each if config is None else config["ROWS"]
    each_b = min(each, B)
    return _cdiv(B, each_b), _cdiv(S, min(each // each_b, S))


def _norm_lanes(B, S, C, summed, config):
    """(b_lanes, s_lanes) of the backward of embeddings with a norm: groups of threads that walk rows."""
    groups = next(groups for widest, groups in NORM_BACKWARD if widest >= C)
    groups = max(
        1, min(groups, B * S // 32)
    )  # each leaves 2 * C fp32 sums of the norm: 8 % of its rows' bytes
    groups = groups if config is None else config["GROUPS"]
    s_lanes = _cdiv(S, _cdiv(S, groups))
    # Each lane over b leaves S * C fp32: at B / 8 lanes a tenth of what the rows themselves are.
    b_lanes = max(1, min(groups // s_lanes, B // 8 if summed else B))
    return _cdiv(B, _cdiv(B, b_lanes)), s_lanes


def _cdiv(a, b):
    return -(-a // b)


def _batched(x):
    return x.reshape(-1, *x.shape[-2:])  # a view unless the leading dims have no common stride


def _batched_ids(ids, lead):
    return None if ids is None else ids.expand(lead).reshape(-1, lead[-1])


def _shared(ids):
    """Whether every b has the same positions."""
    return ids is None or ids.shape[0] == 1 or ids.stride(0) == 0


def _lookups(input_ids, type_ids, position_ids, token_table, type_table, position_table, weight, bias):
    """What both embedding kernels take: ids (B, S), tables, and the norm's parameters."""
    ids = (_batched_ids(t, input_ids.shape) for t in (input_ids, type_ids, position_ids))
    return *ids, *(
        _readable(t, token_table.dtype) for t in (token_table, type_table, position_table, weight, bias)
    )


def _readable(table, dtype):
    """`table` as kernels for rows of `dtype` read it; rarely, where it is transposed or of a third dtype, a copy."""
    if table is None or (table.stride(-1) == 1 and table.dtype in (dtype, torch.float32)):
        return table
    return table.to(table.dtype if table.dtype == dtype else torch.float32).contiguous()


def _zeros(t):
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
