"""add_positional_encoding and embeddings against the reference, in every dtype, on every path of their backwards."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import backend, cuda, reference, use_backend
from fastattn.check import check
from fastattn.functional import add_positional_encoding, embeddings

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _fused(fused):
    with use_backend(fused):
        yield


cuda_only = pytest.mark.parametrize("fused", ["cuda"], indirect=True)


@pytest.fixture
def kernels(fused):
    return importlib.import_module(f"{backend.MODULES[fused]}position")


def randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def ids(*shape, rows, device="cpu", dtype=torch.int64):
    return torch.randint(rows, shape, device=device, dtype=dtype)


def seeded(function, device):
    """`function` with a fixed draw of its dropout seed, and that seed."""

    def with_seed(*args, **kwargs):
        torch.manual_seed(3)
        return function(*args, **kwargs)

    torch.manual_seed(3)
    return with_seed, torch.randint(0, 2**63 - 1, (2,), device=device)


def stock_sinusoid(x, offset=0, scale=1.0, position_ids=None):
    """What a PyTorch model does: angles, sine and cosine in fp32, the sum in x's dtype."""
    S, C = x.shape[-2:]
    positions = torch.arange(S, device=x.device) + offset if position_ids is None else position_ids
    frequency = torch.exp(torch.arange(0, C, 2, device=x.device).float() * (-math.log(10000.0) / C))
    angle = positions.float()[..., None] * frequency
    return scale * x + torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., :C].to(x.dtype)


# Tiles are 32 x 64 (backward 16 x 64) at C <= 64 and 8 x 256 (4 x 256) beyond 128: three or more of each, the last ragged.
ADD_SHAPES = [(1, 1, 5), (2, 3, 70, 33), (2, 18, 600), (3, 768), (2, 2, 1025)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ADD_SHAPES, ids=str)
def test_add_matches_the_reference(shape, dtype, device):
    x = randn(*shape, dtype=dtype, device=device)
    table = randn(shape[-2] + 9, shape[-1], dtype=dtype, device=device)
    learned, sinusoidal = dict(offset=4, scale=shape[-1] ** 0.5), dict(offset=1000, scale=2.0)
    assert not check(add_positional_encoding, reference.add_positional_encoding, (x, table), options=learned)
    rule = dict(options=sinusoidal, baseline=stock_sinusoid)
    assert not check(add_positional_encoding, reference.add_positional_encoding, (x,), **rule)


@pytest.mark.parametrize("shape", [(50,), (1, 50), (3, 50), (2, 1, 50)], ids=["S", "1 S", "B S", "A 1 S"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_add_takes_explicit_positions_that_repeat(shape, dtype, device):
    x = randn(*((2, 3, 50, 12) if len(shape) == 3 else (3, 50, 12)), device=device)
    table, positions = randn(7, 12, device=device), ids(*shape, rows=7, device=device, dtype=dtype)
    rule = dict(options=dict(position_ids=positions))
    assert not check(add_positional_encoding, reference.add_positional_encoding, (x, table), **rule)
    rule["baseline"] = stock_sinusoid
    assert not check(add_positional_encoding, reference.add_positional_encoding, (x,), **rule)


def test_sinusoid_is_exact_for_positions_in_the_millions(device):
    positions = torch.tensor([0, 1, 65535, 999_983, 1_000_003, 2**24 - 1], device=device)
    for C in (1, 7, 512):
        y = add_positional_encoding(torch.zeros(6, C, device=device), position_ids=positions)
        torch.testing.assert_close(y.double(), reference.sinusoidal(positions, C), atol=3e-7, rtol=0)
    negative = add_positional_encoding(torch.zeros(6, 4, device=device), position_ids=-positions)
    torch.testing.assert_close(negative.double(), reference.sinusoidal(-positions, 4), atol=3e-7, rtol=0)


def test_add_sums_a_long_batch_in_chunks(device):
    x, table = randn(100, 2, 5, device=device), randn(3, 5, device=device)
    assert not check(
        add_positional_encoding, reference.add_positional_encoding, (x, table)
    )  # 3 chunks, added up


@pytest.mark.parametrize("fused", ["triton"], indirect=True)
def test_add_shares_an_encoding_among_batches(device, kernels):
    """Few programs, each for 16 of 37 batches, as a launch of many more rows has it."""
    x, table, positions = (
        torch.randn(37, 5, 6, device=device),
        torch.randn(9, 6, device=device),
        ids(5, rows=9),
    )
    config = dict(BLOCK_S=2, BLOCK_C=8, num_warps=4, PROGRAMS=1)
    for arguments in ((table, None, None, 2), (None, None, None, 7), (table, positions.to(device), None, 0)):
        arguments = (x, *arguments, 1.0, 0.0)
        got = kernels.add_positional_encoding_fwd(*arguments, config=config)
        assert torch.equal(got, kernels.add_positional_encoding_fwd(*arguments))


@cuda_only
@pytest.mark.parametrize("rows", [2, 16, 100])
def test_add_walks_rows(rows, device, kernels):
    """A thread with `rows` rows, first over 37 batches and then over positions, as a launch of many more has it."""
    x, table = torch.randn(37, 5, 6, device=device), torch.randn(9, 6, device=device)
    shared, per_batch = ids(5, rows=9, device=device), ids(37, 5, rows=9, device=device)
    seed = torch.tensor([3, 4], device=device)
    for arguments in (
        (table, None, None, 2),
        (None, None, seed, 7),
        (table, shared, None, 0),
        (None, per_batch, None, 0),
        (table, per_batch, seed, 0),
    ):
        arguments = (x, *arguments, 1.0, 0.0 if arguments[2] is None else 0.5)
        got = kernels.add_positional_encoding_fwd(*arguments, config=dict(ROWS=rows))
        assert torch.equal(got, kernels.add_positional_encoding_fwd(*arguments))


@cuda_only
@pytest.mark.parametrize("rows", [3, 16, 37, 80])
def test_add_backward_walks_batches(rows, device, kernels):
    """Small integers, so that the sums have no rounding, however many CUDA threads share them."""
    dy = torch.randint(-8, 8, (37, 5, 6), device=device).float()
    table, positions = torch.zeros(9, 6, device=device), ids(1, 5, rows=9, device=device)
    for like, given, offset in ((table, None, 2), (table.half(), None, 4), (table, positions, 0)):
        named = torch.arange(5, device=device) + offset if given is None else given[0]
        for seed, p in ((None, 0.0), (torch.tensor([3, 4], device=device), 0.5)):
            mask = 1.0 if seed is None else reference.dropout_mask(seed, (37 * 5, 6), p).view(37, 5, 6).to(dy)
            arguments = (dy, like, given, seed, offset, 3.0, p, True, True)
            dx, dtable = kernels.add_positional_encoding_bwd(*arguments, config=dict(ROWS=rows))
            assert torch.equal(dx, 3 * dy * mask)
            wanted = torch.zeros(9, 6, device=device).index_add(0, named, (dy * mask).sum(0))
            assert torch.equal(dtable, wanted.to(like.dtype))
            dx, nothing = kernels.add_positional_encoding_bwd(*arguments[:-1], False, config=dict(ROWS=rows))
            assert torch.equal(dx, 3 * dy * mask) and nothing.numel() == 0


TABLES = dict(V=40, T=3, P=20)
EMBEDDING_OPTIONS = {
    "plain": {},
    "types": dict(type_ids=(5, 17)),
    "broadcast types": dict(type_ids=(17,)),
    "padding": dict(padding_idx=-3),
    "shared positions": dict(position_ids=(1, 17)),
    "positions": dict(position_ids=(5, 17)),
}


def lookups(row, device, dtype=torch.int64):
    options = dict(EMBEDDING_OPTIONS[row])
    for name, rows in (("type_ids", TABLES["T"]), ("position_ids", TABLES["P"])):
        if name in options:
            options[name] = ids(*options[name], rows=rows, device=device, dtype=dtype)
    return options


def with_ids(function, input_ids):
    """`function` of the tables alone, in the order of its results' gradients."""

    def of_tables(token, position, type_, weight, bias, **options):
        return function(
            input_ids, token, position, type_table=type_, norm_weight=weight, norm_bias=bias, **options
        )

    return of_tables


def tables(C, dtype, device, norm=True, norm_dtype=None):
    rows = [randn(TABLES[size], C, dtype=dtype, device=device) for size in "VPT"]
    affine = [randn(C, dtype=norm_dtype or dtype, device=device) if norm else None for _ in range(2)]
    return *rows, *affine


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bare"])
@pytest.mark.parametrize("row", EMBEDDING_OPTIONS)
def test_embeddings_match_the_reference(row, norm, device):
    input_ids = ids(5, 17, rows=TABLES["V"], device=device)
    ours, wanted = with_ids(embeddings, input_ids), with_ids(reference.embeddings, input_ids)
    assert not check(ours, wanted, tables(33, torch.float32, device, norm), options=lookups(row, device))


@pytest.mark.parametrize("C", [5, 768, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_in_every_dtype_and_width(dtype, C, device):
    input_ids = ids(2, 3, rows=TABLES["V"], device=device, dtype=torch.int32)
    ours, wanted = with_ids(embeddings, input_ids), with_ids(reference.embeddings, input_ids)
    stock = with_ids(stock_embeddings, input_ids)
    for norm in (True, False) if C == 768 else (True,):
        assert not check(ours, wanted, tables(C, dtype, device, norm), baseline=stock)


# Of threads to a row: a warp, 128, 256 and 512; held in registers or read again; by vectors or single columns.
WIDTHS = [1, 2, 7, 8, 9, 31, 33, 384, 2048, 5000, 8200]


@cuda_only
@pytest.mark.parametrize("C", WIDTHS)
def test_every_width(C, device):
    for dtype in DTYPES:
        x, table = randn(3, 4, C, dtype=dtype, device=device), randn(9, C, dtype=dtype, device=device)
        add = dict(options=dict(offset=3, scale=0.5))
        assert not check(add_positional_encoding, reference.add_positional_encoding, (x, table), **add)
        add["baseline"] = stock_sinusoid
        assert not check(add_positional_encoding, reference.add_positional_encoding, (x,), **add)
        input_ids = ids(3, 4, rows=TABLES["V"], device=device)
        ours, wanted = with_ids(embeddings, input_ids), with_ids(reference.embeddings, input_ids)
        stock = with_ids(stock_embeddings, input_ids)
        assert not check(ours, wanted, tables(C, dtype, device), baseline=stock)


UNALIGNED = ("nothing", "everything", "x", "table", "dy", "token", "position", "type", "weight", "bias")


@cuda_only
def test_unaligned_tensors(device):
    """One tensor, or every one, an element past an aligned address changes nothing but the order of sums."""
    x, table, dy = randn(3, 5, 48, device=device), randn(9, 48, device=device), randn(3, 5, 48, device=device)
    given = dict(x=x, table=table, dy=dy, positions=ids(3, 5, rows=9, device=device))
    names = ("token", "position", "type", "weight", "bias")
    given |= dict(zip(names, tables(48, torch.float32, device), strict=True))
    ours, _ = seeded(add_positional_encoding, device)
    embed, _ = seeded(with_ids(embeddings, ids(3, 5, rows=TABLES["V"], device=device)), device)
    runs = []
    for moved in UNALIGNED:
        t = {name: shifted(t) if moved in (name, "everything") else t for name, t in given.items()}
        rows = [t[name] for name in names]
        y = ours(t["x"], t["table"], position_ids=t["positions"], dropout_p=0.2)
        z, flat = embed(*rows, dropout_p=0.2), ours(t["x"], t["table"][:5], dropout_p=0.2)
        runs.append((y, z, flat))
        runs[-1] += torch.autograd.grad(y, (t["x"], t["table"]), t["dy"])
        runs[-1] += torch.autograd.grad(flat, (t["x"], t["table"]), t["dy"])
        runs[-1] += torch.autograd.grad(z, rows, t["dy"])
    for run in runs[1:]:
        for got, wanted in zip(run, runs[0], strict=True):
            torch.testing.assert_close(got, wanted)


def shifted(t):
    moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
    return moved.copy_(t.detach()).requires_grad_(t.requires_grad)


@cuda_only
def test_rows_of_an_uneven_stride(device):
    """Rows that begin between two vectors though the first one does not."""
    wide, table = torch.randn(3, 5, 50, device=device), torch.randn(9, 50, device=device)
    x, rows = wide[..., :48], table[:, :48]
    for inputs in ((x, rows), (x, rows.contiguous()), (x.contiguous(), rows)):
        assert torch.equal(add_positional_encoding(*inputs, offset=2), x + rows[2:7])
    token = torch.randn(9, 50, device=device)[:, :48].requires_grad_()
    input_ids = ids(3, 5, rows=9, device=device)
    y = embeddings(input_ids, token, rows, norm_weight=torch.ones(48, device=device))
    exact = reference.embeddings(
        input_ids, token.double(), rows.double(), norm_weight=torch.ones(48, device=device).double()
    )
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    for dy in (torch.randn(3, 5, 50, device=device)[..., :48], torch.randn(3, 5, 48, device=device)):
        got = torch.autograd.grad(y, token, dy, retain_graph=True)[0]
        wanted = torch.autograd.grad(exact, token, dy.double(), retain_graph=True)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, check_dtype=False)


def stock_embeddings(input_ids, token, position, *, type_table, norm_weight, norm_bias):
    y = F.embedding(input_ids, token) + type_table[0] + position[: input_ids.shape[-1]]
    return y if norm_weight is None else F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, 1e-12)


@pytest.mark.parametrize("shape", [(3, 20), (40, 3)], ids=str)
def test_embeddings_backward_walks_positions_and_batches(shape, device, kernels, fused):
    """Few programs, each over several positions and tiles of batches, with partial sums for every gradient."""
    C = 24 + (fused == "cuda" and shape[1] % 2)  # 25: a CUDA thread takes single columns, not vectors
    rows = [t if t is None else t.detach() for t in tables(C, torch.float32, device)]
    arguments = (
        ids(*shape, rows=TABLES["V"], device=device),
        None,
        None,
        rows[0],
        rows[2],
        rows[1],
        *rows[3:],
    )
    y, *stats = kernels.embeddings_fwd(*arguments, None, 1e-12, 0.0)
    dy = torch.randn_like(y)
    arguments = (dy, *arguments, *stats, None, -1, 0.0, True, True, True, True)
    configs = {
        "triton": [dict(BLOCK_B=2, BLOCK_C=32, num_warps=4, PROGRAMS=12)],
        "cuda": [dict(GROUPS=groups) for groups in (1, 5, 12, 1000)],
    }[fused]
    for config in configs:
        few, many = kernels.embeddings_bwd(*arguments, config=config), kernels.embeddings_bwd(*arguments)
        for got, wanted in zip(few, many, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_embeddings_mix_dtypes(device):
    token, position, type_, weight, bias = tables(16, torch.bfloat16, device, norm_dtype=torch.float32)
    position = randn(TABLES["P"], 16, device=device)
    input_ids = ids(4, 9, rows=TABLES["V"], device=device)
    y = with_ids(embeddings, input_ids)(token, position, type_, weight, bias)
    grads = torch.autograd.grad(y.float().sin().sum(), (token, position, type_, weight, bias))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.bfloat16] + 2 * [torch.float32]
    only_token = embeddings(input_ids, token)
    assert torch.equal(only_token, token[input_ids])


@cuda_only
def test_every_table_has_a_dtype_of_its_own(device):
    """x and the token table in the kernel's dtype, all else in any: that, fp32, or a third one, which is copied."""
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    input_ids = ids(4, 9, rows=TABLES["V"], device=device)
    for dtypes in ((bfloat, single, single, single, bfloat), (single, bfloat, half, bfloat, single)):
        arguments = tables(16, single, device)
        arguments = [t.detach().to(d).requires_grad_() for t, d in zip(arguments, dtypes, strict=True)]
        ours, wanted = with_ids(embeddings, input_ids), with_ids(reference.embeddings, input_ids)
        y, exact = ours(*arguments), wanted(*(t.double() for t in arguments))
        assert y.dtype == dtypes[0]
        torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, arguments, dy)
        for g, e, dtype in zip(got, torch.autograd.grad(exact, arguments, dy.double()), dtypes, strict=True):
            assert g.dtype == dtype
            torch.testing.assert_close(g, e, rtol=3e-2, atol=3e-2)
    for x_dtype, table_dtype in ((bfloat, single), (bfloat, half), (single, half)):
        x = randn(3, 5, 16, dtype=x_dtype, device=device)
        table = randn(5, 16, dtype=table_dtype, device=device)
        y = add_positional_encoding(x, table)
        dtable = torch.autograd.grad(y, table, torch.ones_like(y))[0]
        assert torch.equal(y, (x.float() + table.float()).to(x_dtype))
        assert dtable.dtype == table_dtype and torch.equal(dtable, torch.full_like(table, 3.0))


@cuda_only
@pytest.mark.parametrize("C", [33, 384, 2048, 8200])
def test_a_large_mean_does_not_cancel(C, device, kernels):
    """Whole numbers around 2^20: every difference from the mean is exact, the mean's own rounding is what could remain."""
    token = (torch.randn(TABLES["V"], C, device=device) * 4).round() + 2**20
    weight, input_ids = torch.ones(C, device=device), ids(2, 3, rows=TABLES["V"], device=device)
    y = embeddings(input_ids, token, norm_weight=weight)
    exact = reference.embeddings(input_ids, token.double(), norm_weight=weight.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    arguments = (input_ids, None, None, token, None, None, weight, None, None, 1e-12, 0.0)
    mean = kernels.embeddings_fwd(*arguments)[1].double()
    assert (mean - token[input_ids].double().mean(-1).view(-1)).abs().max() <= 2**-4  # half a unit of 2^20


def test_a_table_without_gradient_costs_nothing(device):
    frozen = [t.detach() for t in tables(16, torch.float32, device)]
    input_ids = ids(2, 3, rows=TABLES["V"], device=device)
    for i in range(5):
        mixed = [t.requires_grad_() if i == j else t.detach() for j, t in enumerate(frozen)]
        assert not check(with_ids(embeddings, input_ids), with_ids(reference.embeddings, input_ids), mixed)


def test_dropout_is_the_reference_stream(device):
    ours, seed = seeded(add_positional_encoding, device)
    for p in (0.1, 0.5, 1.0):
        y = ours(torch.ones(3, 37, 45, device=device), torch.zeros(37, 45, device=device), dropout_p=p)
        assert torch.equal(y.cpu(), reference.dropout_mask(seed, (111, 45), p).float().view_as(y))
    rule = dict(options=dict(dropout_p=0.1), reference_options=dict(dropout_p=0.1, seed=seed))
    inputs = randn(3, 37, 45, device=device), randn(37, 45, device=device)
    assert not check(ours, reference.add_positional_encoding, inputs, **rule)
    input_ids = ids(3, 7, rows=TABLES["V"], device=device)
    ours, _ = seeded(with_ids(embeddings, input_ids), device)
    for norm in (True, False):
        inputs = tables(45, torch.float32, device, norm)
        assert not check(ours, with_ids(reference.embeddings, input_ids), inputs, **rule)
    types = dict(type_ids=ids(3, 7, rows=TABLES["T"], device=device))
    rule = {name: options | types for name, options in rule.items()}
    assert not check(ours, with_ids(reference.embeddings, input_ids), inputs, **rule)


RUNS = {
    "one id": [4] * 50,
    "two ids, crossing a chunk": [2] * 30 + [5] * 20,
    "all different": list(range(50)),
    "runs that end with a chunk": [1] * 16 + [2] * 32 + [3] * 2,
    "a run inside, one across three chunks": [0] * 3 + [7] * 41 + [49] * 6,
}


@pytest.mark.parametrize("runs", RUNS)
def test_rows_of_one_id_are_added_exactly(runs, device, kernels):
    """Small integers, so that the sums have no rounding: any row lost, doubled or misplaced shows."""
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor(RUNS[runs])[order].to(device)
    dy = torch.randint(-8, 8, (50, 300), device=device).float()
    table = torch.zeros(50, 300, device=device)
    arguments = (positions, None, 0, 1.0, 0.0, False, True)
    for rows in (dy, dy.half()):
        got = kernels.add_positional_encoding_bwd(rows[None], table, *arguments)[1]
        assert torch.equal(got, table.index_add(0, positions, dy))


@cuda_only
@pytest.mark.parametrize("chunk", [1, 3, 6])
@pytest.mark.parametrize("runs", RUNS)
def test_rows_of_one_id_are_added_exactly_in_any_chunk(runs, chunk, device, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", (chunk, chunk))
    for C in (300, 33):
        dy, positions = torch.randint(-8, 8, (1, 50, C), device=device).float(), torch.tensor(RUNS[runs])
        table, positions = torch.zeros(50, C, device=device), positions.to(device)
        got = kernels.add_positional_encoding_bwd(dy, table, positions, None, 0, 1.0, 0.0, False, True)[1]
        assert torch.equal(got, table.index_add(0, positions, dy[0]))


def test_wrong_ids_are_clamped_where_nobody_reads_them(device, kernels):
    wrong, right = torch.tensor([[-5, 2, 2**40]], device=device), torch.tensor([[0, 2, 3]], device=device)
    table, x = randn(4, 8, device=device).detach(), torch.zeros(1, 3, 8, device=device)
    for function in (
        lambda i: kernels.embeddings_fwd(i, i, i, table, table, table, None, None, None, 1e-12, 0.0)[0],
        lambda i: kernels.add_positional_encoding_fwd(x, table, i, None, 0, 1.0, 0.0),
    ):
        assert torch.equal(function(wrong), function(right))
    dy, wrong = torch.randn(1, 3, 8, device=device), torch.tensor([[-5, 2, 2**20]], device=device)
    got = kernels.add_positional_encoding_bwd(dy, table, wrong, None, 0, 1.0, 0.0, False, True)[1]
    assert torch.equal(got[[0, 2, 3]], dy[0])


def test_strided_and_expanded_tensors(device, fused):
    x, table = randn(3, 19, 24, device=device).detach(), randn(60, 20, device=device).detach()
    views = (x.transpose(0, 1), x[..., ::2], x[:1].expand(5, 19, 24), x.movedim(2, 0)[:, None])
    for view in views:
        rows = table[::3, : view.shape[-1]] if view.shape[-1] <= 20 else table.new_ones(24, 30).T[:20, :24]
        wanted = add_positional_encoding(view.contiguous(), rows.contiguous()[: view.shape[-2]].contiguous())
        assert torch.equal(add_positional_encoding(view, rows[: view.shape[-2]]), wanted)
    x.requires_grad_(), table.requires_grad_()
    y = add_positional_encoding(x[..., :20], table)
    y.sum().backward()  # a gradient of stride 0
    assert (
        torch.equal(table.grad[:19], torch.full((19, 20), 3.0, device=device)) and not table.grad[19:].any()
    )
    strided = randn(3, 20, 19, device=device).detach().transpose(1, 2)
    strided_grads = torch.autograd.grad(add_positional_encoding(x[..., :20], table), table, strided)
    dense_grads = torch.autograd.grad(
        add_positional_encoding(x[..., :20], table), table, strided.contiguous()
    )
    assert torch.equal(*strided_grads, *dense_grads)

    input_ids = ids(17, 4, rows=TABLES["V"], device=device).T
    arguments = tables(24, torch.float32, device)
    ours = with_ids(embeddings, input_ids)
    assert torch.equal(ours(*arguments), with_ids(embeddings, input_ids.contiguous())(*arguments))
    for dy in (torch.ones((), device=device).expand(4, 17, 24), torch.randn(4, 24, 17, device=device).mT):
        got, wanted = (torch.autograd.grad(ours(*arguments), arguments, g) for g in (dy, dy.contiguous()))
        if fused == "triton":
            assert all(map(torch.equal, got, wanted))
        for pair in zip(
            got, wanted, strict=True
        ):  # a CUDA thread adds other columns where it cannot move vectors
            torch.testing.assert_close(*pair)


def test_two_runs_are_equal_to_the_bit(device):
    input_ids, arguments = ids(5, 7, rows=4, device=device), tables(33, torch.bfloat16, device)
    ours, _ = seeded(with_ids(embeddings, input_ids), device)
    runs = [torch.autograd.grad(ours(*arguments, dropout_p=0.1).square().sum(), arguments) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, device):
    x, table = randn(*shape, device=device), randn(5, shape[-1], device=device)
    y = add_positional_encoding(x, table, dropout_p=0.1)
    dx, dtable = torch.autograd.grad(y.sum(), (x, table))
    assert y.shape == dx.shape == shape and dtable.shape == table.shape and not dtable.any()
    assert add_positional_encoding(x).shape == shape
    input_ids = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    arguments = tables(shape[-1], torch.float32, device)
    y = with_ids(embeddings, input_ids)(*arguments)
    grads = torch.autograd.grad(y.sum(), arguments)
    assert y.shape == shape and [g.shape for g in grads] == [t.shape for t in arguments]
    assert not any(g.any() for g in grads)


X, TABLE, IDS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    (lambda: add_positional_encoding(X[0, 0]), ValueError, r"x must be floating \(\.\.\., S, C\)"),
    (lambda: add_positional_encoding(X.long()), ValueError, "x must be floating"),
    (lambda: add_positional_encoding(X, TABLE[:, :3]), ValueError, r"table must be \(rows, C\) with C = 4"),
    (lambda: add_positional_encoding(X, TABLE.long()), TypeError, "table is torch.int64"),
    (lambda: add_positional_encoding(X, TABLE.to("meta")), ValueError, "table is on meta"),
    (
        lambda: add_positional_encoding(X, TABLE, offset=3),
        IndexError,
        r"offset 3 .* rows 3 \.\. 5; table has 5",
    ),
    (lambda: add_positional_encoding(X, TABLE, offset=-1), IndexError, "offset -1"),
    (lambda: add_positional_encoding(X, position_ids=IDS, offset=1), ValueError, "position_ids were given"),
    (
        lambda: add_positional_encoding(X, position_ids=IDS.float()),
        TypeError,
        "position_ids is torch.float32",
    ),
    (lambda: add_positional_encoding(X, position_ids=IDS[:, :2]), ValueError, "position_ids is .* broadcast"),
    (lambda: add_positional_encoding(X, TABLE, position_ids=IDS + 5), IndexError, "position_ids has values"),
    (lambda: add_positional_encoding(X, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    (lambda: embeddings(IDS - 1, TABLE), IndexError, "input_ids has values from -1"),
    (lambda: embeddings(IDS + 5, TABLE), IndexError, r"input_ids .* rows 0 \.\. 4"),
    (lambda: embeddings(IDS.short(), TABLE), TypeError, "input_ids is torch.int16"),
    (lambda: embeddings(IDS[0, 0], TABLE), ValueError, "input_ids must be"),
    (lambda: embeddings(IDS, TABLE[0]), ValueError, "token_table must be"),
    (lambda: embeddings(IDS, TABLE, TABLE[:2]), IndexError, "position_table has 2 rows"),
    (lambda: embeddings(IDS, TABLE, TABLE[:, :2]), ValueError, "position_table must be"),
    (lambda: embeddings(IDS, TABLE, position_ids=IDS), ValueError, "position_ids were given without"),
    (lambda: embeddings(IDS, TABLE, type_ids=IDS), ValueError, "type_ids were given without a type_table"),
    (lambda: embeddings(IDS, TABLE, type_table=TABLE[:0]), IndexError, "type_table has no rows"),
    (lambda: embeddings(IDS, TABLE, norm_weight=TABLE), ValueError, "norm_weight must be"),
    (lambda: embeddings(IDS, TABLE, norm_bias=TABLE[0]), ValueError, "norm_bias was given without"),
    (lambda: embeddings(IDS, TABLE, padding_idx=5), ValueError, "padding_idx 5 is outside"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[1].__name__} {case[2]}"[:40])
def test_bad_input_is_named(case):
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


@cuda_only
def test_the_extension_refuses_what_its_kernels_cannot_read(device):
    module = cuda.module(torch.empty(0, device=device))
    x, table, positions, y, seed = (
        t.to(device) for t in (X, TABLE, IDS, torch.empty_like(X), torch.tensor([1, 2]))
    )

    def add(x=x, table=table, positions=positions, y=y, seed=seed, lanes=(1, 1)):
        module.add_positional_encoding_fwd(x, table, positions, y, seed, 0, 1.0, 0.5, *lanes)

    add()
    for arguments, message in (
        (dict(x=x[0]), r"x is float32 \(3, 4\) .* must be \(B, S, C\)"),
        (dict(table=table[:, :3]), r"table is .* must be \(rows, 4\)"),
        (dict(table=table.half()), "table is float16"),
        (dict(table=table[:0]), "with a row at least"),
        (dict(positions=positions.T), r"position_ids is .* must be int32 or int64 \(2, 3\)"),
        (dict(positions=positions.short()), "position_ids is int16"),
        (dict(y=y.half()), "y is float16 .* of their dtype"),
        (dict(y=y[:1]), "y is .* of 24 elements"),
        (dict(seed=seed[:1]), r"seed is .* must be int64 \(2,\)"),
        (dict(lanes=(3, 1)), r"lanes are 3 and 1, must be 1 \.\. B"),
    ):
        with pytest.raises(ValueError, match=message):
            add(**arguments)
    with pytest.raises(TypeError, match="x is float64"):
        add(x=x.double())


def test_a_row_too_wide_for_the_norm_is_refused_with_a_reason():
    token, weight = torch.zeros(2, 5000), torch.ones(5000)
    with use_backend("triton"), pytest.raises(NotImplementedError, match="C 5000 is above 4096"):
        embeddings(IDS, token, norm_weight=weight)
    with use_backend(None):
        assert embeddings(IDS, token, norm_weight=weight).shape == (2, 3, 5000)


@pytest.mark.parametrize("row", EMBEDDING_OPTIONS)
def test_stock_torch_serves_every_option(row):
    with use_backend("torch"):
        input_ids = ids(5, 17, rows=TABLES["V"])
        ours, wanted = with_ids(embeddings, input_ids), with_ids(reference.embeddings, input_ids)
        assert not check(ours, wanted, tables(33, torch.float32, "cpu"), options=lookups(row, "cpu"))
        x, table = randn(5, 17, 33), randn(TABLES["P"], 33)
        options = {k: v for k, v in lookups(row, "cpu").items() if k == "position_ids"} | dict(scale=3.0)
        for inputs in ((x, table), (x,)):
            assert not check(
                add_positional_encoding, reference.add_positional_encoding, inputs, options=options
            )


def test_torch_func_takes_stock_torch():
    table, input_ids = torch.randn(5, 4), ids(3, 2, rows=5)
    with use_backend(None):
        batched = torch.vmap(lambda i: embeddings(i, table))(input_ids)
        assert torch.equal(batched, table[input_ids])
        tangent = torch.func.jvp(lambda t: add_positional_encoding(t, table), (table,), (table,))[1]
        assert torch.equal(tangent, table)
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.vmap(lambda i: embeddings(i, table))(input_ids)


def test_dropout_of_stock_torch_keeps_the_mean():
    with use_backend("torch"):
        for y in (
            add_positional_encoding(torch.ones(200, 50), torch.zeros(200, 50), dropout_p=0.25),
            embeddings(torch.zeros(200, dtype=torch.int64), torch.ones(1, 50), dropout_p=0.25),
        ):
            assert y.unique().tolist() == pytest.approx([0, 4 / 3]) and abs(y.mean() - 1) < 0.05


def operands():
    """Arguments of each torch op, as the public functions pass them."""
    seed, weight = torch.tensor([5, 6]), randn(8).detach()
    token, position, type_ = (randn(n, 8).detach() for n in (9, 4, 2))
    words, rows = ids(2, 3, rows=9), (ids(2, 3, rows=2), None)
    stats = (torch.zeros(6), torch.ones(6), seed)
    return {
        "add_positional_encoding_fwd": (X, TABLE, IDS, seed, 0, 1.0, 0.1),
        "add_positional_encoding_bwd": (X, TABLE, None, seed, 1, 1.0, 0.1, True, True),
        "embeddings_fwd": (words, *rows, token, type_, position, weight, weight, seed, 1e-12, 0.1),
        "embeddings_bwd": (
            X.new_zeros(2, 3, 8), words, *rows, token, type_, position, weight, weight, *stats, -1, 0.1,
            True, True, True, True,
        ),  # fmt: skip
    }  # fmt: skip


@pytest.mark.parametrize("name", operands())
def test_torch_ops_pass_opcheck(name, device):
    arguments = (a.to(device) if isinstance(a, torch.Tensor) else a for a in operands()[name])
    torch.library.opcheck(getattr(torch.ops.fastattn, name).default, (*arguments, "triton"))


def test_compiles_to_one_graph(device):
    input_ids = ids(2, 6, rows=TABLES["V"], device=device)
    arguments = tables(12, torch.float32, device)

    def model(*arguments):
        y = with_ids(embeddings, input_ids)(*arguments, type_ids=input_ids % 3, dropout_p=0.5)
        y = y + embeddings(input_ids, arguments[0], arguments[0], position_ids=input_ids)  # one tensor twice
        return add_positional_encoding(y, scale=2.0)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        torch.manual_seed(1)
        y = function(*arguments)
        results.append((y, *torch.autograd.grad(y.square().sum(), arguments)))
    assert all(map(torch.equal, *results))


def test_double_backward(device):
    """Through the composite path, with the same dropout mask."""
    input_ids = ids(2, 5, rows=6, device=device)
    x, table = randn(2, 5, 12, device=device), randn(7, 12, device=device)
    rows = tables(12, torch.float32, device)
    for function, wanted, inputs in (
        (add_positional_encoding, reference.add_positional_encoding, (x, table)),
        (with_ids(embeddings, input_ids), with_ids(reference.embeddings, input_ids), rows),
    ):
        function, seed = seeded(function, device)
        ours = second_gradients(lambda *a, f=function: f(*a, dropout_p=0.2), inputs)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        theirs = second_gradients(lambda *a, f=wanted, s=seed: f(*a, dropout_p=0.2, seed=s), exact)
        for got, want in zip(ours, theirs, strict=True):
            assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def second_gradients(function, inputs):
    first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


def test_tiles_are_legal():
    from fastattn.ops.position import MAX_NORM_C

    kernels = importlib.import_module("fastattn.kernels.position")
    assert kernels.NORM[-1][0] == kernels.NORM_BACKWARD[-1][0] == MAX_NORM_C
    for table in (kernels.ADD, kernels.ADD_BACKWARD, kernels.NORM, kernels.NORM_BACKWARD):
        limits = [limit for limit, _ in table]
        assert limits == sorted(limits)
        sizes = [size for _, tile in table for name, size in tile.items() if name != "PROGRAMS"]
        assert all(size & (size - 1) == 0 for size in sizes)
        assert all(tile["BLOCK_C"] >= 8 for _, tile in table)  # row_dropout draws for eight columns
    for limit, tile in kernels.NORM + kernels.NORM_BACKWARD:
        assert tile["BLOCK_C"] == limit  # the norm needs a row in one tile


def test_calls_are_counted(device, fused):
    before = backend.calls["position", fused]
    add_positional_encoding(torch.zeros(1, 2, 4, device=device))
    assert backend.calls["position", fused] == before + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_2_31_elements(dtype):
    B, S, C = 2**11 + 1, 1024, 1024
    x = torch.zeros(B, S, C, dtype=dtype, device="cuda")
    table = torch.randn(S, C, device="cuda").to(dtype)
    y = add_positional_encoding(x, table)
    assert torch.equal(y[-1], table) and torch.equal(y[0], table)
    del x
    token = torch.randn(50, C, device="cuda").to(dtype)
    input_ids = torch.full((B, S), 49, dtype=torch.int32, device="cuda")
    y = embeddings(input_ids, token)
    assert torch.equal(y[-1, -1], token[49])
