"""The attention kernels by their launchers: every output and gradient against the float64 reference.

Triton's tiles are small (16 to 32) and lengths around 80, so that each walk has several tiles, a ragged last one, and clean
and masked parts, at a cost the interpreter can bear; the shipped tiles have their own test. CUDA's are those it ships, its
lengths the same and, in a test of their own, those around its tiles; it serves 16-bit inputs only.
"""

import itertools
import math

import emulated_cases
import pytest
import torch

from fastattn import backend, cuda, functional, reference
from fastattn.check import compare
from fastattn.cuda import attention as cuda_attention

attention = pytest.importorskip("fastattn.kernels.attention")
launchers = attention  # those that `launch` takes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TWO = [torch.float32, torch.bfloat16]  # where a third would say nothing new
CAUSAL = (False, "top_left", "bottom_right")
TILE = dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
CONFIG = {"fwd": TILE, "dkdv": TILE, "dq": TILE}
SHIPPED = {"fwd": None}


@pytest.fixture(autouse=True)
def _launchers_of_each_backend(fused):
    global launchers
    launchers = {"triton": attention, "cuda": cuda_attention}[fused]


def fp32():
    """The widest dtype that the backend of this test serves."""
    return torch.float32 if launchers is attention else torch.bfloat16


def tensors(device, dtype, *, B=1, H=2, H_kv=None, S_q=75, S_k=75, D=32, DV=None, std=1.0):
    """q, k, v whose logits have the standard deviation `std`."""
    q, k = torch.randn(B, H, S_q, D) * std, torch.randn(B, H_kv or H, S_k, D)
    v = torch.randn(B, H_kv or H, S_k, DV or D)
    return [t.to(device, dtype) for t in (q, k, v)]


def launch(q, k, v, *, do=None, dlse=None, bias=None, mask=None, causal=0, window=None, softcap=0.0, slopes=None, sinks=None,
           q_lens=None, kv_lens=None, cu=(None, None), longest=(0, 0), seed=None, p=0.0, scale=None, config=CONFIG):  # fmt: skip
    """o, lse and, where do is given, every gradient, by name."""
    if bias is not None or mask is not None:
        bias, mask = (t if t is None else t.expand(*q.shape[:3], k.shape[2]) for t in (bias, mask))
    left, right = (-1 if w is None else w for w in window or (None, None))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rest = (
        bias,
        mask,
        slopes,
        sinks,
        q_lens,
        kv_lens,
        *cu,
        seed,
        *longest,
        causal,
        left,
        right,
        softcap,
        p,
        scale,
        False,
    )
    forward, backward = {}, {}
    if launchers is attention:
        forward, backward = dict(config=config["fwd"]), dict(config=config if "dq" in config else None)
    elif q.dtype == torch.float32:
        pytest.skip("fp32 is refused")
    o, lse = launchers.attention_fwd(q, k, v, *rest, **forward)
    if do is None:
        return dict(o=o, lse=lse)
    wanted = bias is not None, sinks is not None
    grads = launchers.attention_bwd(do, dlse, q, k, v, o, lse, *rest, *wanted, **backward)
    return dict(o=o, lse=lse, **dict(zip(("dq", "dk", "dv", "dbias", "dsinks"), grads, strict=True)))


def specify(
    dtype, q, k, v, *, do, dlse, causal=0, slopes=None, sinks=None, bias=None, p=0.0, config=None, **options
):
    """The same from the reference, computed in `dtype`."""
    leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in (q, k, v, bias, sinks)]
    q, k, v, bias, sinks = leaves
    o, lse, _ = reference.attention(
        q, k, v, bias=bias, sinks=sinks, causal=CAUSAL[causal], alibi_slopes=slopes, dropout_p=p, **options
    )
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad([o, lse], wanted, [do.to(dtype), dlse.to(dtype)]))
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    return dict(o=o, lse=lse, **{n: next(grads) for n, t in zip(names, leaves, strict=True) if t is not None})


def check(q, k, v, *, poisoned=None, do=None, lse_steps=0, **options):
    """Asserts the comparison rule; poisoned: (q, k, v) for the kernels where they differ from the reference's."""
    shape = (*q.shape[:3], v.shape[3])
    do = torch.randn(shape).to(q) if do is None else do
    grads = dict(do=do, dlse=torch.randn(shape[:3], device=q.device))
    ours = launch(*(poisoned or (q, k, v)), **grads, **options)
    exact, baseline = (specify(dtype, q, k, v, **grads, **options) for dtype in (torch.float64, q.dtype))
    broken = [compare(name, ours[name], baseline[name], exact[name]) for name in exact]
    if lse_steps:
        # Recomputing p from an fp32 lse costs every gradient lse's own rounding, which stock torch (it keeps p) has not.
        step = lse_steps * 2**-24 * exact["lse"].abs().max()
        allowed = {
            name: step * exact[name].abs().max() for name in ("dq", "dk", "dv", "dbias") if name in exact
        }
        broken = [
            sentence
            for name, sentence in zip(exact, broken, strict=True)
            if sentence and not (name in allowed and (ours[name] - exact[name]).abs().max() <= allowed[name])
        ]
    assert not any(broken), "\n".join(filter(None, broken))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [0, 1, 2])
@pytest.mark.parametrize("S_q, S_k", [(75, 75), (37, 90), (90, 37)])
def test_plain_and_causal(device, dtype, causal, S_q, S_k):
    check(*tensors(device, dtype, S_q=S_q, S_k=S_k), causal=causal, lse_steps=4)


@pytest.mark.parametrize("S_q, S_k", [(1, 1), (1, 50), (50, 1), (64, 64), (63, 65)])
@pytest.mark.parametrize("causal", [0, 1, 2])
def test_tile_edges(device, causal, S_q, S_k):
    """Not by the rule: with one key to attend to, stock torch's dq is exact, ours a difference of two equal sums."""
    q, k, v = tensors(device, torch.float32, S_q=S_q, S_k=S_k, D=16)
    grads = dict(do=torch.randn_like(q), dlse=torch.randn(1, 2, S_q, device=device))
    ours, exact = (
        launch(q, k, v, causal=causal, **grads),
        specify(torch.float64, q, k, v, causal=causal, **grads),
    )
    for name in exact:
        torch.testing.assert_close(ours[name].double(), exact[name], atol=1e-5, rtol=1e-5)


EDGES = (1, 63, 64, 65, 127, 128, 129, 257)  # around CUDA's tiles of queries and keys
EDGE_SIZES = [*zip(EDGES, EDGES, strict=True), *zip(EDGES, EDGES[::-1], strict=True), (64, 129), (129, 64)]


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("S_q, S_k", EDGE_SIZES)
def test_cuda_tile_edges(device, D, S_q, S_k):
    if launchers is attention:
        pytest.skip("Triton's tiles have other edges")
    q, k, v = tensors(device, torch.bfloat16, H=1, S_q=S_q, S_k=S_k, D=D)
    # with one key to attend to, stock torch's gradients are exact, ours differences of two equal sums
    check(q, k, v, causal=(S_q + D // 64) % 3, lse_steps=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, *(pytest.param(D, marks=pytest.mark.gpu) for D in (32, 96, 128, 256))])
def test_shipped_tiles(device, dtype, D):
    S = 1000 if device == "cuda" else 150 if dtype == torch.float32 else 300
    check(*tensors(device, dtype, H=1, S_q=S, S_k=S, D=D), causal=1, config=SHIPPED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [8.0, 30.0])
def test_large_logits(device, dtype, std):
    check(*tensors(device, dtype, std=std), causal=1, lse_steps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_lse_beyond_what_exp_holds(device, dtype, offset):
    q, k, v = tensors(device, dtype)
    bias = torch.full((1, 1, *q.shape[2:3], *k.shape[2:3]), offset, device=device, dtype=dtype)
    ours = check(q, k, v, bias=bias, lse_steps=2)
    assert (ours["lse"].abs() > 100).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_dominant_key(device, dtype):
    q, k, v = tensors(device, dtype)
    k[:, :, 40] = 20 * q.mean(2)
    check(q, k, v)


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("causal", [0, 1, 2])
def test_lengths_keep_poison_out(device, dtype, causal):
    q, k, v = tensors(device, dtype, B=3, H=1)
    q_lens, kv_lens = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([75, 20, 0], [50, 75, 7]))
    poisoned = [t.clone() for t in (q, k, v)]
    for t, lens in zip(poisoned, (q_lens, kv_lens, kv_lens), strict=True):
        for b in range(3):
            t[b, :, lens[b] :] = math.nan if b else math.inf
    ours = check(q, k, v, poisoned=poisoned, causal=causal, q_lens=q_lens, kv_lens=kv_lens)
    assert (ours["o"][1, :, 20:] == 0).all() and (ours["lse"][1, :, 20:] == -math.inf).all()


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("kept", [(1, 1, 0, 1), (0, 0, 1, 1), (1, 0, 1, 0)])
def test_bool_mask(device, dtype, kept):
    q, k, v = tensors(device, dtype, B=2)
    mask = (
        torch.rand([n if keep else 1 for n, keep in zip((2, 2, 75, 75), kept, strict=True)], device=device)
        < 0.6
    )
    mask[0, 0, :2] = False  # rows that attend to nothing
    check(q, k, v, mask=mask, causal=1)


@pytest.mark.parametrize("kept", [*itertools.product((0, 1), repeat=4)], ids=str)
def test_bias_gradient_of_every_pattern(device, kept):
    q, k, v = tensors(device, fp32(), B=2, S_q=37, S_k=45, D=16)
    shape = [n if keep else 1 for n, keep in zip((2, 2, 37, 45), kept, strict=True)]
    check(q, k, v, bias=torch.randn(shape, device=device), causal=2, lse_steps=8)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0)])
def test_bias(device, dtype, kept):
    q, k, v = tensors(device, dtype, B=2, H=2, H_kv=1, S_q=50, S_k=70)
    shape = [n if keep else 1 for n, keep in zip((2, 2, 50, 70), kept, strict=True)]
    lens = torch.tensor([70, 40], dtype=torch.int32, device=device)
    check(q, k, v, bias=torch.randn(shape, device=device, dtype=dtype), kv_lens=lens)


def test_bias_of_another_dtype_and_both_masks(device):
    q, k, v = tensors(device, torch.float16)
    bias, mask = torch.randn(1, 2, 75, 75, device=device), torch.rand(1, 1, 75, 75, device=device) < 0.7
    ours = check(q, k, v, bias=bias, mask=mask)
    assert "dbias" not in ours or ours["dbias"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_a_true_infinity_excludes(device, dtype):
    q, k, v = tensors(device, dtype)
    bias = torch.zeros(1, 1, 75, 75, dtype=dtype, device=device)
    bias[..., 30:, 10:50] = torch.finfo(dtype).min
    bias[..., :30, 20:60] = -math.inf
    bias[..., 70, :] = -math.inf
    check(q, k, v, bias=bias)
    if dtype == torch.float16:
        return  # its minimum does not swallow a logit
    bias[..., 5, :] = torch.finfo(dtype).min  # attends to everything alike
    o = launch(q, k, v, bias=bias)["o"]
    torch.testing.assert_close(o[:, :, 5].float(), v.float().mean(2), atol=1e-2, rtol=1e-2)
    # its lse cannot hold the number of keys beside finfo.min, but a padding row, whose gradient is 0, must add nothing
    do = torch.randn_like(q)
    do[:, :, 5] = 0
    ours = launch(q, k, v, bias=bias, do=do)
    assert all(t.isfinite().all() for name, t in ours.items() if name != "lse") and (
        "dq" not in ours or (ours["dq"][:, :, 5] == 0).all()
    )


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("H_kv", [1, 2])
def test_grouped_heads(device, dtype, H_kv):
    check(*tensors(device, dtype, H=4, H_kv=H_kv, S_q=40, S_k=60), causal=2)


@pytest.mark.parametrize("D, DV", [(8, 8), (5, 20), (40, 40), (80, 96), (160, 64), (64, 160), (256, 256)])
def test_head_dims(device, D, DV):
    dtype = torch.bfloat16 if D in (40, 256) else fp32()
    if launchers is cuda_attention and D % 8:
        pytest.skip("head dims that are no multiple of 8 are refused")
    check(*tensors(device, dtype, H=1, S_q=40, S_k=50, D=D, DV=DV), causal=1)


def packed(q, k, v, q_lens, kv_lens, tail=0):
    """q, k, v (B, H, S, D) as sequences one after another, with `tail` rows of nobody, and their cu_seqlens."""

    def pack(x, lens):
        x = torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lens)])
        return torch.cat([x, x.new_full((tail, *x.shape[1:]), math.nan)])

    cu = [torch.tensor([0, *lens], device=q.device).cumsum(0).int() for lens in (q_lens, kv_lens)]
    return (pack(q, q_lens), pack(k, kv_lens), pack(v, kv_lens)), cu


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize(
    "options", [{}, dict(causal=1), dict(causal=2, window=(20, None)), dict(p=0.3)], ids=str
)
def test_varlen(device, dtype, options):
    q_lens, kv_lens, tail = (50, 0, 1, 70), (30, 40, 33, 81), 5
    q, k, v = tensors(device, dtype, B=4, H=2, H_kv=1, S_q=70, S_k=81)
    if "p" in options:
        options = dict(options, seed=torch.tensor([5, 6], device=device))
    (pq, pk, pv), cu = packed(q, k, v, q_lens, kv_lens, tail)
    grads = dict(do=torch.randn_like(q), dlse=torch.randn(4, 2, 70, device=device))
    (pdo, _, _), _ = packed(grads["do"], k, v, q_lens, kv_lens, tail)
    (pdlse, _, _), _ = packed(grads["dlse"][..., None], k, v, q_lens, kv_lens, tail)
    ours = launch(pq, pk, pv, do=pdo, dlse=pdlse[..., 0].T, cu=cu, longest=(70, 81), **options)

    lens = dict(q_lens=torch.tensor(q_lens, device=device), kv_lens=torch.tensor(kv_lens, device=device))
    exact, base = (specify(t, q, k, v, **grads, **lens, **options) for t in (torch.float64, dtype))
    for name in ours.keys() & {"o", "dq", "dk", "dv", "lse"}:
        want, like = exact[name], base[name]
        if name == "lse":
            want, like, ours[name] = want[..., None], like[..., None], ours[name].T[..., None]
        assert (ours[name][-tail:] == (-math.inf if name == "lse" else 0)).all()
        counts = kv_lens if name in ("dk", "dv") else q_lens
        want, like = (
            torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)]) for t in (want, like)
        )
        assert compare(name, ours[name][:-tail], like, want) is None


def test_cu_seqlens_that_point_outside_read_nothing_there(device):
    q, k, v = (t[0].transpose(0, 1) for t in tensors(device, fp32()))
    cu = torch.tensor([-5, 40, 4000], dtype=torch.int32, device=device)
    assert launch(q, k, v, cu=(cu, cu), longest=(75, 75))["o"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [0, 1])
def test_dropout(device, dtype, causal):
    seed = torch.tensor([0x1234567890ABCDEF, 77], device=device)
    check(*tensors(device, dtype), causal=causal, seed=seed, p=0.3)


@pytest.mark.parametrize("config", [CONFIG, SHIPPED], ids=["small", "shipped"])
def test_dropout_mask_is_the_specification_to_the_bit(device, config):
    B, H, S_q, S_k = 2, 2, 75, 90
    seed, p = torch.tensor([-(2**62) + 12345, 2**40 + 3], device=device), 0.25
    q, k = (torch.zeros(B, H, S, 16, device=device, dtype=fp32()) for S in (S_q, S_k))
    v = torch.eye(S_k, 96, device=device, dtype=fp32()).expand(B, H, S_k, 96)
    kept = launch(q, k, v, seed=seed, p=p, config=config)["o"][..., :S_k] * S_k
    expected = reference.dropout_mask(seed, (B, H, S_q, S_k), p).to(kept)
    assert torch.equal(kept != 0, expected != 0)
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("p", [1.0, 0.001])
def test_dropout_of_everything_and_of_nothing(device, p):
    check(*tensors(device, fp32()), seed=torch.tensor([1, 2], device=device), p=p)


@pytest.mark.parametrize("window", [(20, 10), (2, 0), (None, 5), (33, None), (200, 200)], ids=str)
@pytest.mark.parametrize("causal", [0, 2])
def test_window(device, window, causal):
    dtype = fp32() if causal else torch.float16
    check(*tensors(device, dtype, H=1, S_q=70, S_k=97, D=16), causal=causal, window=window, lse_steps=8)


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(device, dtype, softcap):
    check(*tensors(device, dtype, std=4.0), causal=1, softcap=softcap)


@pytest.mark.parametrize("dtype", TWO, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_alibi(device, dtype, shape):
    slopes = torch.rand(shape, device=device)
    lens = torch.tensor([75, 20, 40], dtype=torch.int32, device=device)
    check(*tensors(device, dtype, B=3), causal=2, slopes=slopes, kv_lens=lens)


@pytest.mark.parametrize("dtype", TWO, ids=str)
def test_sinks(device, dtype):
    sinks = torch.tensor([3.0, -math.inf], dtype=dtype, device=device)
    lens = torch.tensor([75, 0], dtype=torch.int32, device=device)
    check(*tensors(device, dtype, B=2), causal=1, sinks=sinks, q_lens=lens.flip(0), kv_lens=lens)


@pytest.mark.parametrize("dtype", TWO, ids=str)
def test_everything_together(device, dtype):
    q, k, v = tensors(device, dtype, B=2, H=2, H_kv=1, S_k=97, std=3.0)
    options = dict(
        bias=torch.randn(1, 2, 75, 97, device=device, dtype=dtype),
        mask=torch.rand(2, 1, 1, 97, device=device) < 0.9,
        slopes=torch.rand(2, device=device) / 10,
        sinks=torch.randn(2, device=device, dtype=dtype),
        q_lens=torch.tensor([75, 50], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([60, 97], dtype=torch.int32, device=device),
        seed=torch.tensor([11, 13], device=device),
    )
    check(q, k, v, causal=2, window=(40, None), softcap=10.0, p=0.2, **options)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(device, scale):
    check(*tensors(device, torch.float16), causal=1, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(device, dtype):
    q, k, v = tensors(device, dtype, H=4, H_kv=2)
    mask = torch.rand(1, 1, 75, 75, device=device) < 0.5
    mask[..., 3, :] = False
    if launchers is cuda_attention:
        pytest.skip("weights are refused")
    lse = launch(q, k, v, mask=mask, causal=1)["lse"]
    rest = (None, mask.expand(1, 4, 75, 75), *(None,) * 7, 0, 0, 1, -1, -1, 0.0, 0.0, 32**-0.5, False)
    weights = attention.attention_weights(q, k, lse, *rest, config=TILE)
    exact, base = (
        reference.attention(*(t.to(d) for t in (q, k, v)), mask=mask, causal="top_left")[2]
        for d in (torch.float64, dtype)
    )
    assert compare("weights", weights, base, exact) is None


def test_views_of_a_packed_projection(device):
    qkv = torch.randn(2, 40, 3, 2, 24, device=device, dtype=torch.bfloat16)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    ours = check(q, k, v, causal=1)
    assert ours["o"].transpose(1, 2).reshape(2, 40, 48).data_ptr() == ours["o"].data_ptr()


def test_unaligned_and_expanded(device):
    q = torch.randn(1 + 2 * 40 * 17, device=device)[1:].view(1, 2, 40, 17)[..., 1:]
    k, v = (torch.randn(1, 1, 40, 16, device=device).expand(1, 2, 40, 16) for _ in range(2))
    check(q, k, v, do=torch.ones((), device=device).expand(1, 2, 40, 16))


@pytest.mark.parametrize("B, H, S_q, S_k", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (1, 2, 0, 0)])
def test_empty(device, B, H, S_q, S_k):
    bias = torch.randn(1, 1, S_q, S_k, device=device)
    check(*tensors(device, fp32(), B=B, H=H, S_q=S_q, S_k=S_k), bias=bias)
    check(*tensors(device, fp32(), B=B, H=H, S_q=S_q, S_k=S_k), bias=bias[:, :, :1, :] if S_q else bias)


def test_keys_without_a_query_head(fused, device):
    q = torch.zeros(1, 0, 5, 64, device=device).half()
    k = torch.randn(1, 2, 7, 64, device=device).half().requires_grad_()
    with backend.use_backend(fused), pytest.raises(NotImplementedError, match="no heads"):
        functional.attention(q, k, k)
    (functional.attention(q, k, k).sum() + k.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k))


def test_two_runs_agree_to_the_bit(device):
    q, k, v = tensors(device, torch.bfloat16, H=2, H_kv=1)
    bias, sinks = torch.randn(1, 2, 1, 75, device=device), torch.randn(2, device=device)
    given = dict(bias=bias, sinks=sinks, do=torch.randn_like(q), dlse=torch.randn(1, 2, 75, device=device))
    once, again = (launch(q, k, v, causal=1, **given) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize(
    "D, rich", [(64, False), (64, True), (128, False), (128, True), (192, False), (256, False)]
)
def test_every_order_of_threads_gives_the_same_bits(device, D, rich):
    if launchers is attention or device == "cuda":
        pytest.skip("the emulation's")
    q, k, v = tensors(device, torch.bfloat16, H=2, H_kv=1, S_q=150, S_k=140, D=D)
    given = dict(causal=2, window=(90, None), kv_lens=torch.tensor([135], dtype=torch.int32))
    if rich:
        # broadcast over heads for one D, not for the other: its gradient comes about in two ways
        bias = torch.randn(1, D // 64, 150, 140)
        given |= dict(bias=bias, mask=torch.rand(1, 1, 1, 140) < 0.9, softcap=5.0, p=0.3)
        given |= dict(seed=torch.tensor([1, 2]), slopes=torch.rand(2))
    module, results = cuda.extension("_C_emulated"), []
    try:
        for order in emulated_cases.ORDERS.values():
            module.schedule(*order)
            results.append(
                launch(
                    q, k, v, do=torch.randn(1, 2, 150, D, dtype=q.dtype, generator=torch.Generator()), **given
                )
            )
    finally:
        module.schedule(0)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_tile_rows_are_legal():
    for key, table in attention.TILES.items():
        limits = [limit for limit, _ in table]
        assert limits == sorted(set(limits)) and limits[-1] == 256, key
        for _, row in table:
            assert set(row) == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}, key
            assert all(row[n] >= 16 and row[n] & (row[n] - 1) == 0 for n in ("BLOCK_M", "BLOCK_N")), key


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis(device):
    q, k, v = tensors(device, torch.float16, B=33000, H=2, S_q=4, S_k=4, D=16)
    o = launch(q, k, v, config=SHIPPED)["o"]
    torch.testing.assert_close(
        o, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=2e-3, rtol=2e-3
    )


@pytest.mark.gpu
def test_more_than_2_to_31_elements(device):
    S = 2**24 + 40  # rows of 128: past 2^31 from the start of a head
    q, k, v = (torch.zeros(1, 1, S, 128, device=device, dtype=torch.float16) for _ in range(3))
    q[..., -64:, :], k[..., :64, :], v[..., :64, :] = (torch.randn(64, 128, device=device) for _ in range(3))
    cut = dict(kv_lens=torch.tensor([64], dtype=torch.int32, device=device), config=SHIPPED)
    o = launch(q, k, v, **cut)["o"][..., -64:, :]
    exact = torch.nn.functional.scaled_dot_product_attention(q[..., -64:, :], k[..., :64, :], v[..., :64, :])
    torch.testing.assert_close(o, exact, atol=2e-3, rtol=2e-3)
