"""Calls of attention that come by every rule, walk and edge of its CUDA kernels, each as small as that allows.

Tiles are 16 to 128 queries by 16 to 128 keys, a ring holds up to 4 tiles and pads head dims to 64, 128, 192 or 256: lengths
around 70 to 200 give each walk ragged ends, a clean middle and more tiles than slots.
"""

import dataclasses
import functools
import itertools
import math

import torch

from fastattn import cuda, functional, reference
from fastattn.check_cases import Case, Specification


def attended(label, *, B=1, H=1, H_kv=None, S_q=70, S_k=100, D=64, D_v=None, std=1.0, learned=None, view=None,
             backward=True, **options):  # fmt: skip
    """A call of attention; `learned`: shapes of a bias and sinks that get gradients; `view` makes q, k, v of what is drawn.

    std of q: a number, or one of each row.
    """
    shapes = [(B, H, S_q, D), (B, H_kv or H, S_k, D), (B, H_kv or H, S_k, D_v or D)]
    learned = learned or {}
    lens = options.get("q_lens"), options.get("kv_lens"), options.get("kv_lens")

    def make():
        drawn = view[0](*shapes) if view else [torch.randn(shape) for shape in shapes]
        return (drawn[0] * std, *drawn[1:], *(torch.randn(shape) for shape in learned.values()))

    def call(f, *inputs):
        n = len(inputs) - len(learned)
        qkv = view[1](*inputs[:n]) if view else inputs[:n]
        if f is functional:
            qkv = [poisoned(t, of) for t, of in zip(qkv, lens, strict=True)]
        given = options | dict(zip(learned, inputs[n:], strict=True))
        return f.attention(*qkv, **{"return_lse": True, **given})

    return Case("attention", f"{label} {shapes[0]} x {S_k}", make, call, "dropout_p" in options, backward)


def poisoned(t, lens):
    """NaN in the rows past each sequence's end."""
    if lens is None:
        return t
    past = torch.arange(t.shape[2])[:, None] >= lens.view(-1, 1, 1, 1)
    return t.masked_fill(past, math.nan)


def lengths(*lens):
    return torch.tensor(lens, dtype=torch.int32)


def of_a_projection(*shapes):
    """q, k, v as slices of one packed projection (B, S, 3, H, D)."""
    (B, H, S, D), *_ = shapes
    return (torch.randn(B, S, 3, H, D),)


def off_by_one(*shapes):
    """Rows that do not start on 16 bytes."""
    return [torch.randn(math.prod(shape) + 1) for shape in shapes]


VIEWS = {
    "projection": (of_a_projection, lambda qkv: [t.transpose(1, 2) for t in qkv.unbind(2)]),
    "unaligned": (
        off_by_one,
        lambda *flat: [
            t[1:].view(s) for t, s in zip(flat, [(1, 2, 40, 24), (1, 1, 70, 24), (1, 1, 70, 24)], strict=True)
        ],
    ),
}


def plain():
    """A positive scale, lengths and a band: what the first of the two variants of each kernel serves."""
    yield attended("full", S_q=150, S_k=140)
    yield attended("no gradient of lse", H=2, H_kv=1, return_lse=False)
    yield attended("causal", S_q=140, S_k=150, causal=True)
    yield attended("bottom-right", S_q=70, S_k=260, causal="bottom_right")
    yield attended("bottom-right, more queries", S_q=150, S_k=70, causal="bottom_right")
    for S_q, S_k in ((1, 1), (64, 64), (65, 63), (128, 129), (129, 1), (1, 200)):
        # of one key lse is a logit, which stock torch does not round again, and its gradient 0 exactly
        many = S_k > 1
        yield attended("edge", S_q=S_q, S_k=S_k, causal="bottom_right", return_lse=many, backward=many)
    for window in ((40, 10), (2, 0), (None, 5), (33, None), (0, 0)):
        yield attended(f"window {window}", S_q=150, S_k=170, window=window)
    # bands that leave out one pair of a tile, or have one
    for window in ((None, 62), (62, None), (65, None)):
        yield attended(f"window {window}", S_q=192, S_k=192, window=window, return_lse=False)
    yield attended("whole tiles of several heads", B=2, H=2, S_q=128, S_k=128, return_lse=False)
    # a block's first query sees one key before its tile, or its last one sees one behind it
    for window in ((1, 0), (None, 1)):
        yield attended(f"window {window}", S_q=192, S_k=192, window=window, return_lse=False)
    yield attended("one key less than tiles", S_q=128, S_k=127)
    yield attended("window past the end", S_q=128, S_k=100, window=(None, 200))
    yield attended("one query less than tiles", S_q=127, S_k=128)
    yield attended("causal, window", S_q=200, S_k=140, causal=True, window=(70, None))
    yield attended("window beside the end", S_q=60, S_k=200, window=(20, 20), causal="bottom_right")
    lens = dict(q_lens=lengths(75, 20, 0, 64), kv_lens=lengths(50, 130, 7, 128))
    for causal in (False, True, "bottom_right"):
        yield attended(f"lengths, {causal}", B=4, S_q=75, S_k=130, causal=causal, **lens)
    yield attended("no keys", B=2, S_q=20, S_k=40, kv_lens=lengths(0, 40))
    yield attended(
        "window, lengths",
        B=2,
        S_q=150,
        S_k=150,
        window=(60, 9),
        q_lens=lengths(140, 100),
        kv_lens=lengths(150, 70),
    )
    yield attended("many keys", S_q=16, S_k=400)
    yield attended("many queries", S_q=300, S_k=16)
    yield attended("large logits", S_q=100, S_k=200, std=12.0)
    # maxima that grow in some of a warp's rows, below those of others
    unlike = torch.tensor([0.1, 10.0, 30.0, 30.0]).repeat_interleave(8).repeat(4)[:, None]
    yield attended("rows unlike each other", S_q=128, S_k=200, std=unlike)
    yield attended("projection", H=2, S_q=70, S_k=70, D=40, view=VIEWS["projection"], causal=True)
    yield attended("unaligned", H=2, H_kv=1, S_q=40, S_k=70, D=24, view=VIEWS["unaligned"])
    for D, D_v in ((40, 40), (8, 64), (64, 8), (72, 24), (96, 96), (128, 128), (40, 128), (136, 192), (192, 136), (192, 192),
                   (200, 256), (256, 256), (256, 40)):  # fmt: skip
        yield attended(f"D_v {D_v}", S_q=90, S_k=110, D=D, D_v=D_v, causal=D != D_v)
    lens = dict(q_lens=lengths(60, 90), kv_lens=lengths(100, 110))
    yield attended(
        "grouped heads", B=2, H=4, H_kv=2, S_q=90, S_k=110, causal="bottom_right", window=(70, None), **lens
    )
    for D in (96, 192, 256):
        yield attended(
            "grouped heads",
            B=2,
            H=2,
            H_kv=1,
            S_q=40,
            S_k=80,
            D=D,
            q_lens=lengths(40, 30),
            causal="bottom_right",
        )
    yield attended("all on one head", H=3, H_kv=1, S_q=140, S_k=70, D=128, causal=True)
    yield attended("expanded gradient", S_q=30, S_k=30)


def rich():
    """What the other variant is for."""

    def biased(B, H, S_q, S_k, D, kept, **options):
        bias = tuple(n if keep else 1 for n, keep in zip((B, H, S_q, S_k), kept, strict=True))
        # what is the same for all keys has a gradient only beside a sink
        learned = dict(bias=bias) if kept[3] else dict(bias=bias, sinks=(H,))
        return attended(f"bias {bias}", B=B, H=H, S_q=S_q, S_k=S_k, D=D, learned=learned, **options)

    for kept in itertools.product((0, 1), repeat=4):
        yield biased(2, 2, 70, 90, 32, kept)
    patterns = ((96, (1, 1, 1, 1)), (128, (0, 1, 1, 1)), (192, (1, 0, 1, 1)), (256, (0, 0, 1, 1)), (192, (1, 1, 0, 1)), (256, (1, 1, 1, 0)))  # fmt: skip
    for D, kept in patterns:
        yield biased(2, 2, 40, 70, D, kept, H_kv=1, causal="bottom_right")
    lens = dict(q_lens=lengths(150, 30), kv_lens=lengths(90, 140))
    for kept in ((1, 1, 1, 1), (0, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0)):
        yield biased(2, 2, 150, 140, 16, kept, window=(30, 5), **lens)
    yield biased(2, 1, 40, 100, 16, (1, 1, 1, 1), kv_lens=lengths(64, 96))
    yield biased(2, 1, 130, 97, 16, (1, 1, 1, 1), causal=True)
    yield biased(2, 2, 128, 128, 16, (0, 1, 1, 1))
    yield biased(2, 2, 130, 97, 16, (0, 1, 1, 1), window=(1, 0))
    for kept in ((0, 1, 1, 1), (1, 0, 0, 1)):  # one key less than tiles
        yield biased(2, 2, 70, 130, 16, kept, kv_lens=lengths(127, 63))
    infinite = torch.zeros(1, 1, 70, 100, dtype=torch.float16)
    infinite[..., 30:, 10:50], infinite[..., :30, 20:60], infinite[..., 65, :] = (
        -65504.0,
        -math.inf,
        -math.inf,
    )
    yield attended("bias of infinities", bias=infinite)
    yield attended("transposed bias of float", bias=torch.randn(1, 2, 100, 70).mT, H=2)
    yield attended(
        "bias, softcap, sinks", H=2, learned=dict(bias=(1, 2, 70, 100), sinks=(2,)), softcap=2.0, std=3.0
    )
    masks = {
        "keys": torch.rand(2, 1, 1, 140) > 0.3,
        "queries": torch.rand(1, 2, 70, 1) > 0.3,
        "all": torch.rand(2, 2, 70, 140) > 0.4,
        "pairs": torch.rand(1, 1, 140, 70).mT > 0.4,
    }
    masks["pairs"][..., 3, :] = False
    for name, mask in masks.items():
        yield attended(f"mask of {name}", B=2, H=2, S_k=140, D=24, mask=mask)
    yield attended(
        "mask, lengths",
        B=2,
        H=2,
        S_k=140,
        D=24,
        mask=masks["all"],
        q_lens=lengths(70, 33),
        kv_lens=lengths(100, 140),
    )
    yield attended("ALiBi", H=2, S_q=150, causal=True, alibi_slopes=torch.rand(2))
    slopes = torch.rand(2, 2)
    yield attended(
        "ALiBi of each", B=2, H=2, alibi_slopes=slopes, kv_lens=lengths(60, 100), causal="bottom_right"
    )
    yield attended("softcap", S_q=150, S_k=140, softcap=3.0, std=4.0, causal=True)
    yield attended("softcap", S_q=70, D=192, softcap=3.0, std=4.0)
    sinks = torch.tensor([1.0, -math.inf])
    yield attended("sinks", B=2, H=2, S_q=150, learned=dict(sinks=(2,)), causal=True, kv_lens=lengths(100, 0))
    yield attended("sinks of which one is none", H=2, sinks=sinks, causal="bottom_right", S_q=110)
    yield attended("sinks of float, half", H=2, sinks=torch.randn(2), D=96, q_lens=lengths(50))
    yield attended("dropout", B=2, H=2, S_q=150, S_k=140, D=32, dropout_p=0.3)
    for D in (96, 192, 256):
        yield attended("dropout", H=2, H_kv=1, D=D, dropout_p=0.3, causal=True)
    yield attended("dropout of all", S_q=20, S_k=30, dropout_p=1.0)
    yield attended("negative scale", S_q=130, S_k=140, scale=-0.2, causal=True)
    yield attended("no scale", S_q=30, S_k=40, scale=0.0)
    for D in (64, 128, 192, 256):
        yield attended(
            "everything", B=2, H=2, H_kv=1, S_q=75, S_k=97, D=D, D_v=D - 24, std=2.0, causal="bottom_right", window=(60, None),
            softcap=10.0, mask=torch.rand(2, 1, 1, 97) < 0.9, alibi_slopes=torch.rand(2) / 10, dropout_p=0.2,
            q_lens=lengths(75, 50), kv_lens=lengths(60, 97), learned=dict(bias=(1, 2, 75, 97), sinks=(2,)),
        )  # fmt: skip


def packed():
    """Sequences one after another, one of them empty, with rows of nobody behind them."""
    q_lens, kv_lens = (50, 0, 1, 140, 20), (30, 40, 33, 81, 0)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (q_lens, kv_lens))

    def varlen(label, D=64, H=2, H_kv=1, learned=False, **options):
        def make():
            shapes = (sum(q_lens), H, D), (sum(kv_lens), H_kv, D), (sum(kv_lens), H_kv, D)
            return (*map(torch.randn, shapes), *((torch.randn(H),) if learned else ()))

        def call(f, q, k, v, *sinks):
            tail = torch.full((7, 1, D), math.nan)
            if f is functional:
                q, k, v = (torch.cat([t, tail.to(t).expand(-1, t.shape[1], -1)]) for t in (q, k, v))
            given = options | (dict(sinks=sinks[0]) if sinks else {})
            return f.attention_varlen(q, k, v, cu_q, cu_k, 140, 81, **given)[: sum(q_lens)]

        return Case("attention_varlen", label, make, call)

    yield varlen("full")
    yield varlen("causal", causal=True)
    yield varlen("bottom-right, window", causal="bottom_right", window=(30, None), D=96)
    yield varlen("each head its own", H_kv=2, D=192, window=(50, 9))
    yield varlen(
        "ALiBi, sinks, softcap", H=3, H_kv=3, D=40, learned=True, softcap=5.0, alibi_slopes=torch.rand(3)
    )
    yield varlen("D 256", H=2, H_kv=1, D=256, causal="bottom_right")


def decoded(label, *, B=2, H=4, H_kv=2, S_q=1, D=64, D_v=None, S=300, lens=(131, 0), page_size=0, S_new=None, std=1.0, wide=False,
            view=None, **options):  # fmt: skip
    """A call of attention_decode that returns the caches too; page_size 0: contiguous ones. `view` of each cache."""
    D_v, B, S_new = D_v or D, len(lens), S_q if S_new is None else S_new
    pages = -(-S // page_size) * B + 2 if page_size else 0

    def make():
        caches = [(pages, page_size, H_kv, d) if page_size else (B, H_kv, S, d) for d in (D, D_v)]
        new = [torch.randn(B, H_kv, S_new, d) for d in (D, D_v)] if S_new else []
        return (torch.randn(B, H, S_q, D) * std, *map(torch.randn, caches), *new)

    torch.manual_seed(len(label))
    table = torch.randperm(pages)[: pages - 2].view(B, -1) if page_size else None
    if page_size and not wide:  # entries that no length reaches name no page
        used = torch.arange(table.shape[1]) * page_size < torch.tensor(lens)[:, None] + S_new
        table = table.masked_fill(~used, -1).int()
    filled = torch.tensor(lens, dtype=torch.int64 if wide else torch.int32)

    def call(f, q, k, v, *new):
        past = torch.arange(S)[:, None] >= (filled + S_new).view(-1, 1, 1, 1)
        k, v = (c.clone() if page_size else c.masked_fill(past, math.nan) for c in (k, v))
        k, v = (view(c) if view else c for c in (k, v))
        given = dict(zip(("k_new", "v_new"), new, strict=False), **options)
        if f is Specification:
            given.pop("num_splits", None)
            given["block_table"] = table if table is None else table.clamp(min=0)
            o, lse = reference.attention_decode(q, k, v, filled, **given)
        else:
            o, lse = f.attention_decode(q, k, v, filled, block_table=table, return_lse=True, **given)
        return o, lse, k.clone(), v.clone()

    return Case("attention_decode", f"{label} {(B, H, S_q, D)}", make, call, backward=False)


def rows_apart(cache):
    """The same cache with its positions outermost, as a model that keeps (B, S, H_kv, D) has it, and rows that are wider."""
    B, H_kv, S, D = cache.shape
    wider = cache.new_full((B, S, H_kv, D + 8), math.nan)
    wider[..., :D] = cache.transpose(1, 2)
    return wider[..., :D].transpose(1, 2)


def decoding():
    yield decoded("one query", num_splits=1)
    yield decoded("no append", S_new=0, lens=(300, 131), num_splits=2)
    yield decoded("rows fill a tile", H=8, S_q=4, num_splits=2)
    yield decoded("window 0", S_q=3, window=(0, 0), num_splits=1)
    yield decoded("nothing cached", S_new=0, lens=(0, 131), num_splits=1)
    yield decoded("nothing cached", S_new=0, lens=(0, 131), num_splits=2)
    yield decoded("long", H=1, H_kv=1, S=900, lens=(850,), num_splits=1)
    yield decoded("long, shared", H=1, H_kv=1, S=900, lens=(850,), num_splits=2)
    yield decoded("to the end", S_q=2, lens=(298, 127), num_splits=1)
    yield decoded("all heads on one key head", H_kv=1, S_q=5, num_splits=3, lens=(290, 3))
    yield decoded("a key head each", H=3, H_kv=3, S_q=2, D=40, num_splits=2)
    yield decoded("tiles of query rows", H=4, H_kv=1, S_q=35, D=16, lens=(10, 250), num_splits=1)
    yield decoded("tiles of query rows", H=2, H_kv=1, S_q=20, D=96, lens=(100, 250), num_splits=2)
    for D, D_v in ((64, 128), (128, 24), (96, 96), (192, 192), (136, 192), (256, 256), (256, 200)):
        yield decoded(f"D_v {D_v}", D=D, D_v=D_v, S_q=2, lens=(290, 60), num_splits=1 + D % 3)
    yield decoded("D 192, long", H=2, H_kv=1, D=192, S=400, lens=(390,), num_splits=1)
    yield decoded("D 256, long", H=2, H_kv=1, D=256, S=400, lens=(390,), num_splits=1)
    yield decoded("more new keys than queries", S_q=2, S_new=5, num_splits=2)
    yield decoded("more queries than new keys", S_q=4, S_new=1, lens=(0, 2, 290), num_splits=3)
    yield decoded("window", S_q=3, window=(140, 0), lens=(290, 100, 4), num_splits=2)
    yield decoded("window", S_q=3, window=(140, 0), lens=(290, 100, 4), num_splits=1)
    for left in (127, 128):  # the first key is a tile's first, or the one before
        yield decoded(f"window {left}", window=(left, 0), S=256, lens=(255,), num_splits=1)
    unlike = torch.tensor([0.1, 30.0]).repeat_interleave(8)[:, None, None]
    yield decoded("rows unlike each other", H=16, H_kv=1, std=unlike, lens=(290,), num_splits=1)
    yield decoded("window of one key", S_q=2, window=(0, None), num_splits=1, lens=(250, 0))
    yield decoded("softcap", S_q=2, std=8.0, softcap=5.0, num_splits=3)
    yield decoded("ALiBi, sinks", S_q=2, alibi_slopes=torch.rand(4), sinks=torch.randn(4), num_splits=3)
    yield decoded("ALiBi of each", S_q=2, H=8, alibi_slopes=torch.rand(2, 8), num_splits=1)
    yield decoded("sinks", S_q=2, S_new=0, lens=(0, 1, 290), sinks=torch.randn(4), num_splits=1, scale=0.3)
    yield decoded("sinks, shares", S_q=2, S_new=0, lens=(0, 1, 290), sinks=torch.randn(4), num_splits=3, D=40)
    yield decoded("negative scale", scale=-0.2, num_splits=2)
    yield decoded("large logits", S_q=4, D=32, std=30.0, num_splits=4, lens=(290, 200))
    yield decoded("many shares", S=520, lens=(511, 70), num_splits=40)
    yield decoded("many shares", H=2, H_kv=1, D=128, S=2500, lens=(2400,), num_splits=38)
    yield decoded("small pages", S_q=2, page_size=16, num_splits=3)
    yield decoded("odd pages", S_q=2, page_size=24, num_splits=2, sinks=torch.randn(4), lens=(250, 10))
    yield decoded("odd pages, wide integers", S_q=2, page_size=24, wide=True, D_v=40, num_splits=1)
    yield decoded(
        "large pages", page_size=256, S=512, window=(200, 3), num_splits=2, lens=(400, 250), H=2, H_kv=2
    )
    yield decoded("pages, D 192", page_size=8, D=192, S_q=3, S_new=20, num_splits=2)
    yield decoded("rows apart", S_q=2, D=40, view=rows_apart, num_splits=2)


def of_sm90():
    """What csrc/attention_sm90.cu serves: tiles are 128 queries, 64 of them a warpgroup's, by 128 keys, 2 of them in a ring."""
    calls = [
        attended("full", S_q=150, S_k=140),
        attended("causal", H=2, S_q=300, S_k=290, causal=True, backward=False),
        attended("bottom-right", B=2, S_q=70, S_k=520, causal="bottom_right", backward=False),
        # the first tile sees no key, the second none in half of its rows
        attended("bottom-right, more queries", S_q=300, S_k=110, causal="bottom_right"),
        attended("many keys", S_q=16, S_k=900, backward=False),
        attended(
            "grouped heads", B=2, H=4, H_kv=2, S_q=130, S_k=260, D=128, causal="bottom_right", backward=False
        ),
        attended("whole tiles", H=2, S_q=256, S_k=384, D=128, return_lse=False, backward=False),
        attended("large logits", S_q=100, S_k=400, std=12.0, D=128, backward=False),
        attended(
            "projection", B=2, H=3, S_q=200, S_k=200, view=VIEWS["projection"], causal=True, backward=False
        ),
    ]
    unlike = torch.tensor([0.1, 10.0, 30.0, 30.0]).repeat_interleave(8).repeat(4)[:, None]
    calls.append(attended("rows unlike each other", S_q=128, S_k=500, std=unlike, backward=False))
    for S_q, S_k in ((1, 2), (64, 128), (65, 127), (128, 129), (129, 256), (192, 257)):
        calls.append(attended("edge", S_q=S_q, S_k=S_k, D=128, causal="bottom_right", backward=False))
    for case in calls:
        yield dataclasses.replace(
            case, label=f"sm_90, {case.label}", call=functools.partial(on_sm90, case.call)
        )


def on_sm90(call, f, *inputs):
    module = cuda.extension("_C_emulated")
    module.pretend(9)
    try:
        return call(f, *inputs)
    finally:
        module.pretend(8)


def cases():
    torch.manual_seed(1)
    return [*plain(), *rich(), *packed(), *decoding(), *of_sm90()]
