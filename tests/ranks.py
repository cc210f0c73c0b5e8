"""Started twice by test_distributed.py: checks that need two processes, each a function here; rank 0 prints their outcomes."""

import os
import pathlib
import re
import sys
import traceback

import torch
import torch.distributed as dist

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import fastattn
from fastattn import backend, check, check_cases, cuda, functional, reference
from fastattn.integrations import distributed

W = int(os.environ.get("WORLD_SIZE", 2))
CHECKS = {}


def case(**cases):
    def add(function):
        for name, arguments in cases.items() or [("", ())]:
            CHECKS[f"{function.__name__} {name}".strip()] = (function, arguments)
        return function

    return add


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def operands(H=2 * W, H_kv=W, S=8 * W, D=8, D_v=8, dtype=torch.float32):
    shapes = ((2, H, S, D), (2, H_kv, S, D), (2, H_kv, S, D_v), (2, H, S, D_v))
    return [drawn(*shape, seed=20 + i, dtype=dtype) for i, shape in enumerate(shapes)]


def over_the_ranks(function, q, k, v, do, order, **options):
    """The whole output and gradients from parts on the two ranks."""
    parts = [distributed.shard(t, 2, order=order).requires_grad_() for t in (q, k, v)]
    options = with_leaves(options)
    o = function(*parts, order=order, **options)
    o.backward(distributed.shard(do, 2, order=order))
    sinks = [t.grad for t in (options.get("sinks"),) if t is not None]
    for t in sinks:
        dist.all_reduce(t)
    return [*(distributed.unshard(t, 2, order=order) for t in (o, *(p.grad for p in parts))), *sinks]


def with_leaves(options, dtype=None):
    """Sinks as a leaf of their own, slopes like them in dtype."""
    found = {n: t.to(dtype) if dtype and n in ("alibi_slopes", "sinks") else t for n, t in options.items()}
    if "sinks" in found:
        found["sinks"] = found["sinks"].detach().clone().requires_grad_()
    return found


def alone(q, k, v, do, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    options = with_leaves(options, dtype)
    o = reference.attention(*leaves, **options)[0]
    o.backward(do.to(dtype))
    return [o, *(t.grad for t in leaves), *(t.grad for t in (options.get("sinks"),) if t is not None)]


def same(q, k, v, do, function, order, **options):
    got = over_the_ranks(function, q, k, v, do, order, **options)
    base, exact = (alone(q, k, v, do, dtype, **options) for dtype in (q.dtype, torch.float64))
    names = ("o", "dq", "dk", "dv", "dsinks")[: len(got)]
    problems = [check.compare(n, *three) for n, *three in zip(names, got, base, exact, strict=True)]
    assert not any(problems), problems


ATTENTION = {
    f"{kind} {order}{' causal' * causal}": (kind, order, causal)
    for kind in ("ring_attention", "ulysses_attention")
    for order in distributed.ORDERS
    for causal in (False, True)
}


@case(**ATTENTION)
def attends(kind, order, causal):
    same(*operands(), getattr(distributed, kind), order, causal=causal)


@case(ring=("ring_attention",), ulysses=("ulysses_attention",))
def softcap_scale_and_two_head_dims(kind):
    same(*operands(D_v=12), getattr(distributed, kind), "head_tail", causal=True, softcap=3.0, scale=0.6)


@case(contiguous=("contiguous",), head_tail=("head_tail",))
def ulysses_with_window_and_sinks(order):
    q, k, v, do = operands()
    sinks = drawn(2 * W, seed=9)
    options = dict(causal=True, window=(5, 0), sinks=sinks)
    same(q, k, v, do, distributed.ulysses_attention, order, **options)


SLOPES_AND_SINKS = dict(alibi_slopes=drawn(2 * W, seed=8).abs(), sinks=drawn(2 * W, seed=9))
RING = {
    "window": dict(causal=True, window=(5, 0)),
    "window in a piece": dict(causal=True, window=(2, None)),
    "window both ways": dict(window=(3, 6)),
    "window ahead": dict(window=(None, 1)),
    "no window back": dict(window=(0, 2)),
    "alibi": dict(causal=True, alibi_slopes=SLOPES_AND_SINKS["alibi_slopes"]),
    "alibi both ways": dict(window=(9, 6), alibi_slopes=drawn(2, 2 * W, seed=8).abs()),
    "sinks": dict(sinks=SLOPES_AND_SINKS["sinks"]),
    "lengths": dict(causal=True, q_lens=torch.tensor([16, 5]), kv_lens=torch.tensor([3, 13])),
    "all": dict(causal=True, window=(6, 0), softcap=2.0, scale=0.5, kv_lens=torch.tensor([16, 7]), q_lens=torch.tensor([9, 7]), **SLOPES_AND_SINKS),
}  # fmt: skip


@case(
    **{f"{name}, {order}": (order, options) for name, options in RING.items() for order in distributed.ORDERS}
)
def ring_with(order, options):
    """In 64 bits to the rounding, which shows any pair too many; in 16 by the rule."""
    given = operands(S=12 * W, dtype=torch.float64)
    got = over_the_ranks(distributed.ring_attention, *given, order, **with_leaves(options, torch.float64))
    for have, want in zip(got, alone(*given, torch.float64, **options), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    same(*operands(S=12 * W, dtype=torch.bfloat16), distributed.ring_attention, order, **options)


@case(ring=("ring_attention",), ulysses=("ulysses_attention",))
def on_the_kernels(kind):
    before = backend.calls["attention", "triton"]
    with fastattn.use_backend("triton"):
        same(*operands(), getattr(distributed, kind), "head_tail", causal=True)
    assert backend.calls["attention", "triton"] > before


@case(**{order: (order,) for order in distributed.ORDERS})
def ring_with_all_on_the_kernels(order):
    for name, dtype in (("triton", torch.float32), ("cuda", torch.bfloat16)):
        if name == "triton" or cuda.not_emulated() is None:
            with fastattn.use_backend(name):
                same(*operands(dtype=dtype), distributed.ring_attention, order, **RING["all"])


@case(ring=("ring_attention",), ulysses=("ulysses_attention",))
def in_16_bits(kind):
    same(*operands(dtype=torch.bfloat16), getattr(distributed, kind), "head_tail", causal=True)


@case()
def positions_and_parts():
    x = torch.arange(2 * 3 * 16).view(2, 3, 16)
    for order in distributed.ORDERS:
        part = distributed.shard(x, 2, order=order)
        where = distributed.positions(16 // W, order=order)
        assert torch.equal(part, x[..., where])
        assert torch.equal(distributed.unshard(part, 2, order=order), x)
    assert W > 2 or where.tolist() == ([0, 1, 2, 3, 12, 13, 14, 15], list(range(4, 12)))[dist.get_rank()]


@case()
def what_cannot_be_split_is_refused():
    q, k, v, _ = operands(H_kv=1)
    for message, call in {
        "k has 1 heads": lambda: distributed.ulysses_attention(q, k, v),
        "mask cannot be split": lambda: distributed.ulysses_attention(q, q, q, mask=None),
        "causal is 'bottom_right'": lambda: distributed.ring_attention(q, k, v, causal="bottom_right"),
        "k 6": lambda: distributed.ring_attention(q, k[:, :, :6], v[:, :, :6]),
        "even number of rows": lambda: distributed.ring_attention(
            *(t[:, :, :7] for t in (q, k, v)), order="head_tail"
        ),
        "dropout_p is 0.1": lambda: distributed.ring_attention(q, k, v, dropout_p=0.1),
        "alibi_slopes requires grad": lambda: distributed.ring_attention(
            q, k, v, alibi_slopes=torch.ones(2 * W, requires_grad=True)
        ),
        "kv_lens is [3, 99]": lambda: distributed.ring_attention(q, k, v, kv_lens=torch.tensor([3, 99])),
        "window is (-1, 0)": lambda: distributed.ring_attention(q, k, v, window=(-1, 0)),
        "order is 'zigzag'": lambda: distributed.ring_attention(q, k, v, order="zigzag"),
        "do not make 4": lambda: distributed.shard(q[:, :, :6], 2, order="head_tail"),
    }.items():
        try:
            call()
        except (ValueError, TypeError, IndexError) as e:
            assert message in str(e), e
        else:
            raise AssertionError(f"nothing said that {message}")


@case()
def context_parallel_is_refused():
    from torch.distributed.tensor.experimental import context_parallel

    buffer = torch.zeros(1, 4, 16, 8)
    with context_parallel(mesh(), buffers=[buffer], buffer_seq_dims=[2]):
        q, k, v, _ = operands(H_kv=2 * W)
        for call in (functional.attention, functional.scaled_dot_product_attention):
            try:
                call(q, k, v)
            except RuntimeError as e:
                assert "context_parallel" in str(e)
            else:
                raise AssertionError("a rank's own keys were taken for all")
    functional.attention(q, k, v)


@case()
def context_parallel_by_module():
    """It hands over DTensors, split by rows: right in the sequence's order, refused in a load balancer's."""
    from torch.distributed.tensor.experimental import _attention as cp

    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v, do = operands(H_kv=2 * W)
    expected = alone(q, k, v, do, torch.float64, causal=True)
    on = mesh()
    attend = torch.distributed.tensor.parallel.parallelize_module(
        Attend(), on, cp._ContextParallel(2, cp._ContextParallel.AttentionType.SDPA)
    )
    cp._enable_context_parallel_dispatcher()
    try:
        parts = [t.requires_grad_() for t in cp._context_parallel_shard(on, [q, k, v], [2, 2, 2])]
        o = attend(*parts)
        o.backward(do.chunk(W, 2)[dist.get_rank()])
        for have, want in zip((o, *(p.grad for p in parts)), expected, strict=True):
            mine = want.chunk(W, 2)[dist.get_rank()].float()
            torch.testing.assert_close(have, mine, rtol=1e-5, atol=1e-5)
        balancer = cp._HeadTailLoadBalancer(q.shape[2], W, torch.device("cpu"))
        parts = cp._context_parallel_shard(on, [q, k, v], [2, 2, 2], balancer)
        try:
            attend(*parts)
        except RuntimeError as e:
            assert "load balancer" in str(e)
        else:
            raise AssertionError("rows in another order were taken for the sequence")
    finally:
        cp._context_parallel_shard(on, [q], [2])  # which leaves torch's switch as it was found
        cp._disable_context_parallel_dispatcher()
    functional.attention(q, k, v)


def mesh(name="x"):
    return torch.distributed.device_mesh.init_device_mesh("cpu", (W,), mesh_dim_names=(name,))


class Block(torch.nn.Module):
    """A transformer block of fastattn's modules, whose attention goes by the heads that its projections give it."""

    def __init__(self, width=16, head=4):
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = fastattn.nn.LayerNorm(width), fastattn.nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        o = functional.attention(q, k, v, causal=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.down(functional.bias_gelu(self.up(self.norm2(x))))


def block_and_batch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(), Block())
    x = drawn(4, 6, 16)
    model(x).square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return model, x, wanted


def close(got, wanted):
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        have = got[name].full_tensor() if hasattr(got[name], "full_tensor") else got[name]
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@case(plain=(None,), kernels=("triton",))
def ddp(name):
    model, x, wanted = block_and_batch()
    spread = torch.nn.parallel.DistributedDataParallel(model)
    with backend.use_backend(name):
        spread(x.chunk(W)[dist.get_rank()]).square().mean().backward()
    close({n: p.grad for n, p in model.named_parameters()}, wanted)


@case(plain=(None,), kernels=("triton",))
def fsdp2(name):
    from torch.distributed.fsdp import fully_shard

    model, x, wanted = block_and_batch()
    for block in model:
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())
    with backend.use_backend(name):
        model(x.chunk(W)[dist.get_rank()]).square().mean().backward()
    close({n: p.grad for n, p in model.named_parameters()}, wanted)


@case()
def fsdp2_in_mixed_precision():
    """Norms meet 16-bit weights, and leave gradients that are summed in 32: to their rounding those of the whole model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    import fastattn.interpreter  # noqa: F401  bfloat16 in Triton's interpreter

    model, x, wanted = block_and_batch()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in (*model, model):
        fully_shard(block, mesh=mesh(), mp_policy=policy)
    met = set()
    model[0].norm1.register_forward_pre_hook(lambda norm, given: met.add((norm.weight.dtype, given[0].dtype)))
    before = backend.calls["layer_norm", "triton"]
    with backend.use_backend("triton"):
        model(x.chunk(W)[dist.get_rank()]).float().square().mean().backward()
    assert met == {(torch.bfloat16,) * 2} and backend.calls["layer_norm", "triton"] == before + 4
    for name, p in model.named_parameters():
        got, want = p.grad.full_tensor(), wanted[name]
        torch.testing.assert_close(got, want, rtol=0, atol=0.05 * want.abs().max().item() + 1e-4, msg=name)


def tensor_parallel_plan(sequence):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor import parallel as tp

    column, row = tp.ColwiseParallel, tp.RowwiseParallel
    if not sequence:
        return {"q": column(), "k": column(), "v": column(), "out": row(), "up": column(), "down": row()}
    columns = {n: column(input_layouts=Shard(1)) for n in ("q", "k", "v", "up")}
    rows = {n: row(output_layouts=Shard(1)) for n in ("out", "down")}
    norms = {n: tp.SequenceParallel(use_local_output=True) for n in ("norm1", "norm2")}
    return {**columns, **rows, **norms}


@case(plain=(None, False), kernels=("triton", False), sequence=("triton", True))
def tensor_parallel(name, sequence):
    """Each rank has half of the heads and of the MLP; with `sequence` also half of the rows between them."""
    from torch.distributed.tensor.parallel import parallelize_module

    model, x, wanted = block_and_batch()
    for block in model:
        parallelize_module(block, mesh("tp"), tensor_parallel_plan(sequence))
    calls = backend.calls.copy()
    with backend.use_backend(name):
        y = model(x.chunk(W, 1)[dist.get_rank()] if sequence else x)
    calls = backend.calls - calls
    assert calls["attention", name or "torch"] == 2 and calls["layer_norm", name or "torch"] == 4
    loss = y.square().sum() / x.numel()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    close(grads, wanted)


X, ROW, Q, KV = (
    (3, 5, 8),
    (8,),
    (2, 4, 6, 8),
    (2, 2, 6, 8),
)  # neither 3 nor 5 is even: the parts of two ranks differ
IDS, MASK = torch.tensor([[1, 3, 0, 2, 2], [0, 0, 3, 1, 2], [2, 1, 1, 0, 3]]), drawn(5, 8, seed=1) > 0
BOUNDS, SLOPES = torch.tensor([0, 4, 9], dtype=torch.int32), drawn(2, 4, seed=2).abs()
RULES = {
    # the call; its inputs, those given by a shape with a gradient; where each lies and then its outputs, a digit being Shard's
    # dim and "-" Replicate
    "layer_norm": (
        lambda f, x, w, b: f.layer_norm(x, (8,), w, b), (X, ROW, ROW), "0--0 1--1 2--- 1001 ----"),
    "layer_norm of two dims": (lambda f, x: f.layer_norm(x, (5, 8)), (X,), "00 1-"),
    "rms_norm": (lambda f, x, w: f.rms_norm(x, (8,), w, 1e-6), (X, ROW), "1-1"),
    "add_layer_norm": (
        lambda f, x, r, w, b: f.add_layer_norm(x, r, (8,), w, b, prenorm=True), (X, X, ROW, ROW), "00--00 -1--11 21--11"),
    "add_rms_norm": (lambda f, x, r, w: f.add_rms_norm(x, r, (8,), w, 1e-6), (X, X, ROW), "01-0"),
    "softmax": (lambda f, x: f.softmax(x, 1), (X,), "00 1- 22"),
    "log_softmax": (lambda f, x: f.log_softmax(x, -1), (X,), "11"),
    "scaled_masked_softmax": (lambda f, x, m: f.scaled_masked_softmax(x, m, 0.3), (X, MASK), "0-0 101 -01 2--"),
    "scaled_masked_softmax, causal": (lambda f, x: f.scaled_masked_softmax(x, None, 0.3, True), (X,), "00 1-"),
    "bias_gelu": (lambda f, x, b: f.bias_gelu(x, b), (X, ROW), "0-0 202 2-2"),
    "add_positional_encoding": (lambda f, x, t: f.add_positional_encoding(x, t, scale=2.0), (X, (9, 8)), "0-0 1--"),
    "embeddings": (
        lambda f, ids, t, p, w, b: f.embeddings(ids, t, p, norm_weight=w, norm_bias=b, eps=1e-5),
        (IDS, (4, 8), (9, 8), ROW, ROW), "0----0 1-----"),
    "embeddings, position_ids": (
        lambda f, ids, t, p, at: f.embeddings(ids, t, p, position_ids=at), (IDS, (4, 8), (9, 8), IDS[0]), "1--01 0---0"),
    "attention": (
        lambda f, q, k, v, b, a, s: f.attention(q, k, v, bias=b, alibi_slopes=a, sinks=s, causal=True),
        (Q, KV, (2, 2, 6, 16), (2, 1, 6, 6), SLOPES, (4,)), "000-0-0 111-101 22----2 -111--1"),
    "attention of one key head": (
        lambda f, q, k, v: f.attention(q, k, v, window=(2, 1)), (Q, (2, 1, 6, 8), (2, 1, 6, 8)), "1--1 1111 2--2"),
    "attention of three heads": (lambda f, q, k, v: f.attention(q, k, v, causal=True), ((1, 3, 6, 8),) * 3, "1111 2222"),
    "attention of three key heads": (
        lambda f, q, k, v: f.attention(q, k, v, causal=True), ((1, 6, 6, 8), (1, 3, 6, 8), (1, 3, 6, 8)), "111- 2222"),
    "attention of one head": (lambda f, q, k, v: f.attention(q, k, v, causal=True), ((1, 1, 6, 8),) * 3, "2222 111-"),
    "scaled_dot_product_attention": (
        lambda f, q, k, v, m: f.scaled_dot_product_attention(q, k, v, m), (Q, Q, Q, (6, 6)), "111-1 222-2"),
    "attention_varlen": (
        lambda f, q, k, v, a, b: f.attention_varlen(q, k, v, a, b, 5, 5, causal=True),
        ((9, 4, 8), (9, 2, 8), (9, 2, 8), BOUNDS, BOUNDS), "111--1 0-----"),
}  # fmt: skip


@case(**RULES)
def rules(call, inputs, places):
    """Wherever a call's DTensors lie: results and gradients are right, and the kernel runs once, on the local parts."""
    for where in places.split():
        placed(call, inputs, where, "triton")


@case(layer_norm=(RULES["layer_norm"], torch.float32), attention=(RULES["attention"], torch.bfloat16))
def rules_in_cuda(rule, dtype):
    if cuda.not_emulated() is None:
        call, inputs, places = rule
        placed(call, inputs, places.split()[1], "cuda", dtype)


def placed(call, inputs, where, name, dtype=torch.float32):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    on, placements = mesh(), [Replicate() if p == "-" else Shard(int(p)) for p in where]
    inputs = [
        t if isinstance(t, torch.Tensor) else drawn(*t, seed=i).to(dtype).requires_grad_()
        for i, t in enumerate(inputs)
    ]

    def ours(*inputs):
        parts = [
            DTensor.from_local(t, on, [Replicate()], run_check=False).redistribute(placements=[p])
            for t, p in zip(inputs, placements, strict=False)
        ]
        before = backend.calls.copy()
        with backend.use_backend(name):
            outputs = call(functional, *parts)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ran = [count for (_, chosen), count in (backend.calls - before).items() if chosen == name]
        assert ran == [1] and before + backend.calls, f"{where}: {backend.calls - before}"
        for y, p in zip(outputs, placements[len(inputs) :], strict=True):
            assert y.placements == (p,), f"{where}: {y.placements}"
            local = [
                n if p != Shard(d) else len(torch.arange(n).chunk(W)[dist.get_rank()])
                for d, n in enumerate(y.shape)
            ]
            assert list(y.to_local().shape) == local, f"{where}: {y.to_local().shape} of {y.shape}"
        return tuple(y.full_tensor() for y in outputs)

    problems = check.check(ours, lambda *t: call(check_cases.Specification, *t), inputs)
    assert not problems, f"{where}: {problems}"


@case()
def rules_in_a_compiled_graph():
    """Dynamo sees through the rules: one graph, whose kernels are ops on local tensors, of DTensors from outside and inside."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    on = mesh()

    def call(x, w, q, k):
        x = DTensor.from_local(
            x.to_local(), on, (Shard(1),), run_check=False, shape=x.shape, stride=x.stride()
        )
        return functional.layer_norm(x, (8,), w, w), functional.attention(q, k, k, causal=True)

    shapes, places = (X, ROW, Q, KV), (Shard(1), Replicate(), Shard(2), Shard(2))
    runs = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        parts = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
        parts = [distribute_tensor(t, on, [p]).requires_grad_() for t, p in zip(parts, places, strict=True)]
        with backend.use_backend("triton"):
            y, o = run(*parts)
            (y.square().sum() + o.square().sum()).backward()
        assert (y.placements, o.placements) == ((Shard(1),), (Shard(2),))
        runs.append([t.full_tensor() for t in (y, o, *(p.grad for p in parts))])
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)


@case()
def a_dtensor_without_a_rule():
    """It stays with torch's own op and sharding rule; a forced backend says why it does not run."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, w = drawn(4, 6, 16), drawn(16, seed=1)
    split = distribute_tensor(x, mesh(), [Shard(0)])
    dropped = functional.add_layer_norm(split, split, (16,), dropout_p=0.5)
    assert dropped.placements == (Shard(0),)
    tables = [distribute_tensor(t, mesh(), [Replicate()]) for t in (w, w)]
    whole = functional.layer_norm(split, (16,), *tables).full_tensor()
    torch.testing.assert_close(whole, torch.nn.functional.layer_norm(x, (16,), w, w))
    q = distribute_tensor(drawn(2, 4, 6, 8), mesh(), [Shard(1)])
    with backend.use_backend("triton"):
        for call in (
            lambda: functional.layer_norm(split, (16,), w),
            lambda: functional.add_layer_norm(split, split, (16,), dropout_p=0.5),
            lambda: functional.attention(q, q, q, dropout_p=0.5),
        ):
            try:
                call()
            except NotImplementedError as e:
                assert "DTensor" in str(e), e
            else:
                raise AssertionError("a kernel ran on a DTensor")


@case()
def two_dims_of_a_mesh():
    """Batch along one and heads, or the sequence, along the other; on two ranks one of them is 1."""
    from torch.distributed.tensor import Shard, distribute_tensor

    q, k, v, do = operands()
    expected = alone(q, k, v, do, torch.float64, causal=True)
    for shape in ((1, W), (W, 1)):
        on = torch.distributed.device_mesh.init_device_mesh("cpu", shape)
        for where in ((Shard(0), Shard(1)), (Shard(2), Shard(2)), (Shard(1), Shard(2)), (Shard(0), Shard(2))):
            parts = [distribute_tensor(t, on, where).requires_grad_() for t in (q, k, v)]
            o = functional.attention(*parts, causal=True)
            assert o.placements == where
            o.backward(distribute_tensor(do, on, where))
            for have, want in zip((o, *(p.grad for p in parts)), expected, strict=True):
                torch.testing.assert_close(have.full_tensor(), want.float(), rtol=1e-5, atol=1e-5)


@case()
def the_documentation():
    text = (pathlib.Path(__file__).parents[1] / "docs/distributed.md").read_text()
    shown = {"fastattn": fastattn}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(snippet, "docs/distributed.md", "exec"), shown)
    q, k, v, _ = operands()
    expected = functional.attention(q, k, v, causal=True)
    torch.testing.assert_close(shown["attend"](q, k, v), expected)
    torch.testing.assert_close(shown["attend_by_heads"](mesh(), q, k, v).full_tensor(), expected)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    chosen = {name: check for name, check in CHECKS.items() if len(sys.argv) < 2 or sys.argv[1] in name}
    for name, (function, arguments) in chosen.items():
        try:
            function(*arguments)
            outcome = "ok"
        except Exception:
            outcome = traceback.format_exc()
        outcomes = [None] * W
        dist.all_gather_object(outcomes, outcome)
        if dist.get_rank() == 0:
            wrong = "\n".join(o for o in outcomes if o != "ok")
            print(f"{name}: {wrong or 'ok'}", end="\n\0\n", flush=True)
    dist.destroy_process_group()
