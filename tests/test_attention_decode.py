"""Decoding over contiguous and paged caches: values against the specification, the append, what is never read, refusals."""

import itertools
import math

import emulated_cases
import pytest
import torch
from conftest import present

import fastattn
from fastattn import backend, cuda, reference
from fastattn.check import check
from fastattn.cuda import attention_decode as cuda_kernels
from fastattn.functional import attention_decode
from fastattn.kernels import attention_decode as kernels
from fastattn.kernels import attention_host
from fastattn.ops import attention_decode as ops_attention_decode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENS = (0, 131, 395)  # nothing cached, one key past a tile, several tiles and a ragged one


@pytest.fixture(params=["triton", "cuda", "torch"])
def name(request):
    """Every backend; the tests that stock torch has no part in take `fused`."""
    return present(request.param)


def widest(name):
    """The widest dtype that a backend serves."""
    return torch.float16 if name == "cuda" else torch.float32


def inputs(
    device,
    dtype=torch.float32,
    H=4,
    H_kv=2,
    S_q=1,
    D=64,
    D_v=None,
    S=400,
    page_size=0,
    S_new=None,
    lens=LENS,
    std=1.0,
):
    """q, k_cache, v_cache, cache_lens and the keyword tensors of a call; page_size 0 means a contiguous cache."""
    B, D_v, S_new = len(lens), D_v or D, S_q if S_new is None else S_new
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    q = draw(B, H, S_q, D) * math.sqrt(std)
    options = {}
    if page_size:
        n = -(-S // page_size)
        k, v = draw(B * n + 2, page_size, H_kv, D), draw(B * n + 2, page_size, H_kv, D_v)
        options["block_table"] = torch.randperm(B * n + 2, device=device)[: B * n].view(B, n).int()
    else:
        k, v = draw(B, H_kv, S, D), draw(B, H_kv, S, D_v)
    if S_new:
        options |= dict(k_new=draw(B, H_kv, S_new, D), v_new=draw(B, H_kv, S_new, D_v))
    return (q, k * math.sqrt(std), v, torch.tensor(lens, dtype=torch.int32, device=device)), options


def ours(q, k_cache, v_cache, cache_lens, **options):
    """On caches of its own, so that what one run appends is not there for the next."""
    return attention_decode(q, k_cache.clone(), v_cache.clone(), cache_lens, return_lse=True, **options)


def exact(q, k_cache, v_cache, cache_lens, num_splits=None, **options):
    return reference.attention_decode(q, k_cache.clone(), v_cache.clone(), cache_lens, **options)


def extras(device, alibi=None, sinks=False, H=4, **options):
    """The options of a case, with its tensors drawn: alibi is the shape of the slopes."""
    if alibi:
        options["alibi_slopes"] = torch.rand(alibi, device=device)
    if sinks:
        options["sinks"] = torch.randn(H, device=device)
    return options


CASES = {
    "one query": (dict(), dict(num_splits=1)),
    "no append": (dict(S_new=0, lens=(0, 131, 400)), dict(num_splits=2)),
    "all heads on one key head": (dict(H_kv=1, S_q=5), dict(num_splits=3)),
    "a key head each": (dict(H=3, H_kv=3, S_q=2, D=40), dict(num_splits=2)),
    "head dim 128, wider values": (dict(D=64, D_v=128, S_q=3), dict(num_splits=2)),
    "narrower values": (dict(D=128, D_v=24), dict(num_splits=1)),
    "more new keys than queries": (dict(S_q=2, S_new=5), dict(num_splits=2)),
    "more queries than new keys": (dict(S_q=4, S_new=1, lens=(0, 2, 300)), dict(num_splits=3)),
    "tiles of query rows": (dict(H=4, H_kv=1, S_q=35, D=16, lens=(10, 360)), dict(num_splits=1)),
    "window": (dict(S_q=3), dict(window=(140, 0), num_splits=2)),
    "window of one key": (dict(S_q=2), dict(window=(0, None), num_splits=1)),
    "softcap": (dict(S_q=2, std=8.0), dict(softcap=5.0, num_splits=3)),
    "alibi and sinks": (dict(S_q=2), dict(alibi=(4,), sinks=True, num_splits=3)),
    "alibi of each sequence": (dict(S_q=2), dict(alibi=(3, 4), num_splits=1)),
    "sinks, one share": (dict(S_q=2, lens=(0, 1, 300)), dict(sinks=True, num_splits=1, scale=0.3)),
    "negative scale": (dict(), dict(scale=-0.2, num_splits=2)),
    # D = 32: beyond it a CPU's BLAS sums several chains a dot product, which rounds less than the kernels' single one.
    "logits of std 30": (dict(S_q=4, D=32, std=30.0), dict(num_splits=4)),
    "small pages": (dict(S_q=2, page_size=16), dict(num_splits=3)),
    "odd pages": (dict(S_q=2, page_size=24, S=408), dict(num_splits=2, sinks=True)),
    "large pages": (dict(S_q=1, page_size=256, S=512), dict(window=(200, 3), num_splits=2)),
}  # fmt: skip


@pytest.mark.parametrize(
    "dtype, case",
    [(dtype, case) for dtype in DTYPES for case in list(CASES)[:: 3 if dtype == torch.float16 else 1]],
    ids=str,
)
def test_values(dtype, case, device, fused):
    if fused == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 is refused")
    shape, options = CASES[case]
    tensors, given = inputs(device, dtype, **shape)
    given |= extras(device, **options)
    with backend.use_backend(fused):
        assert check(ours, exact, tensors, options=given) == []


@pytest.mark.parametrize("case", CASES)
def test_stock_torch(case, device):
    shape, options = CASES[case]
    tensors, given = inputs(device, **shape)
    given |= extras(device, **options)
    with backend.use_backend("torch"):
        assert check(ours, exact, tensors, options=given) == []
        o = attention_decode(
            *(t.clone() for t in tensors), **given
        )  # no lse wanted: torch's own SDPA may serve
        torch.testing.assert_close(o, exact(*tensors, **given)[0])


@pytest.mark.parametrize("num_splits", [1, 2, 3, 4, 5, 20, None])
def test_shares_without_keys(num_splits, device, fused):
    """Four tiles of keys at most: beyond that some shares get none, and the short sequence leaves all but one without."""
    tensors, given = inputs(device, torch.float16, H=2, H_kv=1, lens=(3, 395))
    with backend.use_backend(fused):
        assert check(ours, exact, tensors, options=given | dict(num_splits=num_splits)) == []


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_nothing_cached(name, num_splits, sinks, device):
    tensors, _ = inputs(device, widest(name), S_q=3, S_new=0, lens=(0, 1))
    given = extras(device, sinks=sinks, num_splits=num_splits)
    with backend.use_backend(name):
        o, lse = ours(*tensors, **given)
    assert not o[0].any() and not o[1, :, :2].any() and o[1, :, 2].all()
    empty = torch.full((4,), -math.inf, device=device) if not sinks else given["sinks"]
    torch.testing.assert_close(lse[0], empty[:, None].expand(4, 3))


@pytest.mark.parametrize("D, page_size", [(64, 0), (128, 24), (256, 16)])
def test_every_order_of_threads_gives_the_same_bits(D, page_size, device):
    if device == "cuda" or cuda.not_emulated():
        pytest.skip("the emulation's")
    (q, k, v, lens), given = inputs(device, torch.float16, S_q=5, D=D, page_size=page_size, S=408)
    module, results = cuda.extension("_C_emulated"), []
    try:
        for order in emulated_cases.ORDERS.values():
            module.schedule(*order)
            with backend.use_backend("cuda"):
                results.append(ours(q, k, v, lens, num_splits=2, window=(300, 0), **given))
    finally:
        module.schedule(0)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("page_size", [16, 128, 256])
def test_pages_equal_contiguous(page_size, device, fused):
    (q, k, v, lens), given = inputs(
        device, torch.bfloat16, H=2, H_kv=1, S_q=2, page_size=page_size, S=512, lens=(131, 509)
    )
    table = given.pop("block_table")
    contiguous = [c[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for c in (k, v)]
    with backend.use_backend(fused):
        for num_splits in (1, 3):
            one = ours(q, k, v, lens, block_table=table, num_splits=num_splits, **given)
            other = ours(q, *contiguous, lens, num_splits=num_splits, **given)
            assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("page_size", [0, 8, 64])
def test_append_writes_the_new_rows_and_nothing_else(page_size, name, device):
    (q, k, v, lens), given = inputs(
        device, torch.float16, D=40, D_v=24, page_size=page_size, S_new=21, lens=(0, 5, 130), S=160
    )
    expected_k, expected_v, before = k.clone(), v.clone(), lens.clone()
    reference.attention_decode(q, expected_k, expected_v, lens, **given)
    versions = k._version, v._version
    with backend.use_backend(name):
        attention_decode(q, k, v, lens, **given)
    assert torch.equal(k, expected_k) and torch.equal(v, expected_v) and torch.equal(lens, before)
    assert k._version > versions[0] and v._version > versions[1]


@pytest.mark.parametrize("page_size", [0, 16])
def test_short_way_of_usual_calls_gives_the_same_bits(page_size, device, monkeypatch):
    """The same append too, and a note of it; lengths whose values can be looked at take the way of any call, which looks."""
    present("cuda")
    (q, k, v, lens), options = inputs(device, torch.bfloat16, page_size=page_size)
    monkeypatch.setattr(backend, "readable", lambda t: False)
    served, usually = [], ops_attention_decode._decode_usually
    monkeypatch.setattr(
        ops_attention_decode, "_decode_usually", lambda *a: served.append(usually(*a)) or served[-1]
    )

    def results():
        caches = k.clone(), v.clone()
        before = [t._version for t in caches]
        with backend.use_backend("cuda"):
            found = attention_decode(q, *caches, lens, return_lse=True, **options)
        assert [t._version for t in caches] == [n + 1 for n in before]
        return [*found, *caches]

    short = results()
    assert served[0] is not None
    monkeypatch.setattr(ops_attention_decode, "_decode_usually", lambda *a: None)
    for a, b in zip(short, results(), strict=True):
        assert torch.equal(a, b)


def test_short_way_leaves_the_rest_alone(device, monkeypatch):
    present("cuda")
    (q, k, v, lens), _ = inputs(device, torch.bfloat16, D=64, S_new=0)
    nothing = (None, None, None, None)
    with backend.use_backend("cuda"):
        if device == "cpu":
            assert ops_attention_decode._decode_usually(q, k, v, lens, *nothing) is None
        monkeypatch.setattr(backend, "readable", lambda t: False)
        assert ops_attention_decode._decode_usually(q, k, v, lens, *nothing) is not None
        strided = k.transpose(2, 3).contiguous().transpose(2, 3)
        for other in ((q.float(), k.float(), v.float(), lens), (q[0], k, v, lens), (q, strided, v, lens), (q, k, v[0], lens),
                      (q, k, v, lens.float()), (q, k, v, lens[:1]), (q[..., :8], k, v, lens), (q[:, :3], k, v, lens)):  # fmt: skip
            assert ops_attention_decode._decode_usually(*other, *nothing) is None
        assert ops_attention_decode._decode_usually(q.clone().requires_grad_(), k, v, lens, *nothing) is None


@pytest.mark.parametrize("page_size", [0, 16, 128])
def test_nothing_past_the_length_leaks(page_size, name, device):
    """NaN in every slot that no length reaches, whole pages among them, and nonsense in the table's unused entries."""
    (q, k, v, lens), given = inputs(
        device, widest(name), S_q=2, page_size=page_size, S=512, lens=(0, 100, 300)
    )
    clean = ours(q, k, v, lens, **given)
    held = lens[:, None] > torch.arange(512, device=device)
    if page_size:
        table = given["block_table"]
        dirty = torch.ones(k.shape[:2], dtype=torch.bool, device=device)
        dirty[table.long()] = ~held.view(len(lens), -1, page_size)
        k[dirty], v[dirty] = math.nan, math.nan
        unused = torch.arange(table.shape[1], device=device) * page_size >= lens[:, None] + 2
        table[unused] = torch.tensor([-1, 10**9], dtype=torch.int32, device=device).repeat(table.numel())[
            : unused.sum()
        ]
    else:
        k.transpose(1, 2)[~held], v.transpose(1, 2)[~held] = math.nan, math.nan
    with backend.use_backend(name):
        o, lse = ours(q, k, v, lens, **given)
    tolerance = dict(atol=2e-3, rtol=2e-3) if name == "cuda" else {}
    torch.testing.assert_close(o, clean[0], **tolerance)
    torch.testing.assert_close(lse, clean[1].float(), **tolerance)


def test_wrong_lengths_and_pages_stay_in_bounds(device, fused):
    """The op checks what it can see; what it cannot must not fault in the kernels. A page that does not exist is not written."""
    launchers = {"triton": kernels, "cuda": cuda_kernels}[fused]
    (q, k, v, _), given = inputs(device, widest(fused), H=2, H_kv=1, S_q=2, page_size=16, S=64)
    table = given["block_table"]
    table[:, 1:] = torch.tensor([-5, 2**31 - 1, len(k)], dtype=torch.int32, device=device)
    before = k.clone()
    for lens in ([-7, 17, 2**31 - 1], [63, -(2**31), 10**6]):
        lens = torch.tensor(lens, dtype=torch.int32, device=device)
        for num_splits in (1, 3):
            o, _ = launchers.attention_decode_fwd(
                q, k, v, lens, table, given["k_new"], given["v_new"], None, None,
                -1, -1, 0.0, 0.125, num_splits, False,
            )  # fmt: skip
            assert o.isfinite().all()
    assert torch.equal(k, before)


def test_strides(name, device):
    """q of a packed projection, caches kept as (B, S, H_kv, D) and as halves of one buffer, a row offset that is not aligned."""
    (q, k, v, lens), given = inputs(device, torch.float16, S_q=2, D=40)
    packed = torch.cat([q.transpose(1, 2).flatten(2), torch.randn(3, 2, 7, device=device).half()], dim=-1)
    strided_q = packed[..., :160].view(3, 2, 4, 40).transpose(1, 2)
    both = torch.cat([k.transpose(1, 2), v.transpose(1, 2)], dim=-1)  # (B, S, H_kv, D + D_v)
    strided = {key: torch.stack([t, t], dim=-1)[..., 1] for key, t in given.items()}
    odd = torch.empty(k.numel() + 1, dtype=k.dtype, device=device)[1:].view(k.shape)
    odd.copy_(k)
    with backend.use_backend(name):
        expected = ours(q, k, v, lens, num_splits=2, **given)
        halves = both[..., :40].transpose(1, 2), both[..., 40:].transpose(1, 2)
        for caches in (halves, (odd, v))[: 1 if name == "cuda" else 2]:
            got = attention_decode(strided_q, *caches, lens.long(), num_splits=2, return_lse=True, **strided)
            assert all(map(torch.allclose if name == "torch" else torch.equal, got, expected))
    assert name == "torch" or got[0].transpose(1, 2).reshape(3, 2, 160).data_ptr() == got[0].data_ptr()


def test_a_cache_with_strided_rows_is_not_copied(device):
    (q, k, v, lens), _ = inputs(device, S_new=0, lens=(0, 100, 300))
    backwards = k.mT.contiguous().mT
    with (
        backend.use_backend("triton"),
        pytest.raises(NotImplementedError, match="k_cache's last dim has stride 400"),
    ):
        attention_decode(q, backwards, v, lens)
    for cache in (backwards.half(), torch.zeros(k.numel() + 1, dtype=torch.float16)[1:].view(k.shape)):
        reason = cuda_kernels.attention_decode_why_not(q.half(), cache, v.half(), lens, *(None,) * 5)
        assert "rows of unit stride that start on 16 bytes" in reason
    with backend.use_backend("torch"):
        torch.testing.assert_close(attention_decode(q, backwards, v, lens), attention_decode(q, k, v, lens))


def test_empty(name, device):
    with backend.use_backend(name):
        for empty in (
            dict(lens=()),
            dict(S_q=0, S_new=2),
            dict(S=0, S_new=0, lens=(0, 0)),
            dict(H=0, H_kv=0),
        ):
            tensors, given = inputs(device, widest(name), **empty)
            o, lse = ours(*tensors, **given)
            assert o.shape == tensors[0].shape and lse.shape == o.shape[:3] and not o.any()
        (q, k, v, lens), given = inputs(device, widest(name), S_new=0, page_size=16, lens=(0, 0))
        assert not attention_decode(q, k[:0], v[:0], lens, block_table=given["block_table"]).any()
        assert not attention_decode(q, k, v, lens, block_table=given["block_table"][:, :0]).any()


def test_no_backward_but_the_composite(device, fused):
    (q, k, v, lens), given = inputs(device, widest(fused), S_new=0, lens=(1, 100, 300))
    q.requires_grad_()
    with backend.use_backend(fused):
        with pytest.raises(NotImplementedError, match="no backward"):
            attention_decode(q, k, v, lens)
        with torch.no_grad():
            assert attention_decode(q, k, v, lens).isfinite().all()
    with backend.use_backend("torch"):
        attention_decode(q, k, v, lens).sum().backward()
    assert q.grad.isfinite().all()


def test_autocast_follows_the_cache(device, fused):
    (q, k, v, lens), given = inputs(device, torch.bfloat16)
    wide = {name: t.float() for name, t in given.items()}
    with backend.use_backend(fused), torch.autocast(torch.device(device).type, torch.float16):
        got = ours(q.float(), k, v, lens, **wide)
        assert all(map(torch.equal, got, ours(q, k, v, lens, **given)))


def wrong(name, error, match, **changes):
    return pytest.param(error, match, changes, id=name)


@pytest.mark.parametrize(
    "error, match, changes",
    [
        wrong("q rank", ValueError, r"q has shape \(3, 4, 64\)", q=torch.zeros(3, 4, 64)),
        wrong("q dtype", TypeError, "q is torch.int64", q=torch.zeros(3, 4, 1, 64, dtype=torch.int64)),
        wrong("cache rank", ValueError, "k_cache has shape", k_cache=torch.zeros(2, 400, 64)),
        wrong("cache dtype", TypeError, "v_cache is torch.float16", v_cache=torch.zeros(3, 2, 400, 64).half()),
        wrong("cache device", ValueError, "k_cache is on meta", k_cache=torch.zeros(3, 2, 400, 64, device="meta")),
        wrong("batch", ValueError, r"k_cache is \(2, 2, 400, 64\)", k_cache=torch.zeros(2, 2, 400, 64), v_cache=torch.zeros(2, 2, 400, 64)),
        wrong("head dim", ValueError, "k_cache is", k_cache=torch.zeros(3, 2, 400, 32)),
        wrong("caches differ", ValueError, "v_cache is", v_cache=torch.zeros(3, 2, 300, 64)),
        wrong("heads", ValueError, "multiple of k_cache's 3", k_cache=torch.zeros(3, 3, 400, 64), v_cache=torch.zeros(3, 3, 400, 64)),
        wrong("lens shape", ValueError, "cache_lens is", cache_lens=torch.zeros(2, dtype=torch.int32)),
        wrong("lens dtype", ValueError, "cache_lens is", cache_lens=torch.zeros(3)),
        wrong("lens range", IndexError, "cache_lens has values 0 to 401", cache_lens=torch.tensor([0, 401, 3])),
        wrong("no room", IndexError, "with 1 new keys", cache_lens=torch.tensor([0, 400, 3])),
        wrong("lens negative", IndexError, "cache_lens has values -1", cache_lens=torch.tensor([0, -1, 3])),
        wrong("one of two", ValueError, "k_new and v_new", v_new=None),
        wrong("new shape", ValueError, "v_new is", v_new=torch.zeros(3, 2, 2, 64)),
        wrong("new dtype", TypeError, "k_new is torch.float64", k_new=torch.zeros(3, 2, 1, 64).double()),
        wrong("table rank", ValueError, "block_table has shape", block_table=torch.zeros(3, dtype=torch.int32)),
        wrong("table dtype", ValueError, "block_table is", block_table=torch.zeros(3, 4)),
        wrong("table range", IndexError, r"block_table has ids 0 to 3, k_cache has 3 pages",
              block_table=torch.tensor([[0, 3]] * 3), k_cache=torch.zeros(3, 400, 2, 64), v_cache=torch.zeros(3, 400, 2, 64),
              cache_lens=torch.tensor([3, 450, 0])),
        wrong("window", ValueError, "window", window=(-1, 0)),
        wrong("softcap", ValueError, "softcap", softcap=-1.0),
        wrong("slopes", ValueError, "alibi_slopes", alibi_slopes=torch.zeros(3)),
        wrong("sinks", ValueError, "sinks", sinks=torch.zeros(2)),
        wrong("splits", ValueError, "num_splits is 0", num_splits=0),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(error, match, changes):
    (q, k, v, lens), given = inputs("cpu")
    arguments = dict(q=q, k_cache=k, v_cache=v, cache_lens=lens, **given) | changes
    with pytest.raises(error, match=match):
        attention_decode(**arguments)


def test_explain(device):
    (q, k, v, lens), _ = inputs(device, S_new=0)
    assert "attention_decode, triton" in fastattn.explain(attention_decode, q, k, v, lens)
    wide = [torch.zeros(3, 2, S, 264, device=device) for S in (1, 400, 400)]
    assert "head dims from 1 to 256" in fastattn.explain(attention_decode, *wide, lens)


def test_compiles_to_one_graph(device, fused):
    """Two steps of generation with the append, against eager; nothing but the op and its arguments' arithmetic is traced."""

    def step(q, k, v, lens, k_new, v_new):
        o = attention_decode(q, k, v, lens, k_new=k_new, v_new=v_new, num_splits=2)
        return o * 2, lens + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (q, k, v, lens), given = inputs(device, torch.float16)
    caches = [(k.clone(), v.clone()) for _ in range(2)]
    seen = [lens, lens]
    with backend.use_backend(fused), torch.no_grad():
        for _ in range(2):
            results = [f(q, *c, n, **given) for f, c, n in zip((step, compiled), caches, seen, strict=True)]
            assert all(map(torch.equal, *results))
            seen = [n for _, n in results]
    assert all(map(torch.equal, *caches))


def test_tables_are_legal():
    for rows in kernels.TILES.values():
        limits = [limit for limit, _ in rows]
        assert limits == sorted(limits) and limits[-1] == 256
        for _, row in rows:
            assert all(n & (n - 1) == 0 for n in (row["MAX_M"], row["BLOCK_N"], row["num_warps"]))
            assert row["BLOCK_N"] >= 16 <= row["MAX_M"]  # tl.dot takes no dim below 16


def test_choice_of_splits():
    choose = attention_host.choose_splits
    assert choose(2048, 512, 132) == 1  # many waves without any split
    assert choose(8, 1, 132) == choose(8, 3, 132) == 1  # nothing to share
    for programs, blocks in itertools.product((1, 7, 64, 200, 265, 300), (4, 40, 2048)):
        splits = choose(programs, blocks, 132)
        assert 1 <= splits <= max(1, blocks // 2)
    assert 8 * choose(8, 2048, 132) >= 0.8 * 2 * 132  # one small batch fills the GPU


@pytest.mark.gpu
def test_graph_follows_the_lengths(device, fused):
    """One captured graph generates token after token: it reads the lengths on the device."""
    (q, k, v, lens), given = inputs(device, torch.bfloat16, D=128, S=5000, lens=(0, 131, 4000))
    with backend.use_backend(fused):
        attention_decode(q, k, v, lens, **given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = attention_decode(q, k, v, lens, **given)
            lens += 1
        for _ in range(3):
            expected = ours(q, k, v, lens, **given)[0]
            graph.replay()
            assert torch.equal(o, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 16, 256])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_caches(dtype, D, page_size, device, fused):
    if fused == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 is refused")
    tensors, given = inputs(
        device, dtype, H=16, D=D, S_q=2, S=20480, page_size=page_size, lens=(0, 4097, 20001, 20478)
    )
    with backend.use_backend(fused):
        assert check(ours, exact, tensors, options=given) == []
        first = ours(*tensors, **given)
        assert all(map(torch.equal, first, ours(*tensors, **given)))


@pytest.mark.gpu
def test_more_than_2_31_elements_and_65535_programs(device, fused):
    B, S, D = 70_000, 256, 128  # 2.3e9 elements a cache
    k = torch.randn(1, 1, S, D, device=device, dtype=torch.float16).expand(B, 1, S, D).contiguous()
    q = torch.randn(B, 2, 1, D, device=device, dtype=torch.float16)
    lens = torch.randint(1, S, (B,), device=device, dtype=torch.int32)
    with backend.use_backend(fused):
        o = attention_decode(q, k, k, lens)
    rows = torch.tensor([0, 40_000, B - 1], device=device)
    torch.testing.assert_close(o[rows], exact(q[rows], k[rows], k[rows], lens[rows])[0], atol=2e-3, rtol=2e-3)
