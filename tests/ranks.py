"""Started twice by test_distributed.py: checks that need two processes, each a function here; rank 0 prints their outcomes."""

import os
import pathlib
import re
import traceback

import torch
import torch.distributed as dist

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import fastattn
from fastattn import backend, check, functional, reference
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


def operands(H=2 * W, H_kv=W, S=16, D=8, D_v=8, dtype=torch.float32):
    shapes = ((2, H, S, D), (2, H_kv, S, D), (2, H_kv, S, D_v), (2, H, S, D_v))
    return [drawn(*shape, seed=20 + i, dtype=dtype) for i, shape in enumerate(shapes)]


def over_the_ranks(function, q, k, v, do, order, **options):
    """The whole output and gradients from parts on the two ranks."""
    parts = [distributed.shard(t, 2, order=order).requires_grad_() for t in (q, k, v)]
    o = function(*parts, order=order, **options)
    o.backward(distributed.shard(do, 2, order=order))
    return [distributed.unshard(t, 2, order=order) for t in (o, *(p.grad for p in parts))]


def alone(q, k, v, do, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    o = reference.attention(*leaves, **options)[0]
    o.backward(do.to(dtype))
    return [o, *(t.grad for t in leaves)]


def same(q, k, v, do, function, order, **options):
    got = over_the_ranks(function, q, k, v, do, order, **options)
    base, exact = (alone(q, k, v, do, dtype, **options) for dtype in (q.dtype, torch.float64))
    names = ("o", "dq", "dk", "dv")
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


@case(ring=("ring_attention",), ulysses=("ulysses_attention",))
def on_the_kernels(kind):
    before = backend.calls["attention", "triton"]
    with fastattn.use_backend("triton"):
        same(*operands(), getattr(distributed, kind), "head_tail", causal=True)
    assert backend.calls["attention", "triton"] > before


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
        "order is 'zigzag'": lambda: distributed.ring_attention(q, k, v, order="zigzag"),
        "do not make 4": lambda: distributed.shard(q[:, :, :6], 2, order="head_tail"),
    }.items():
        try:
            call()
        except (ValueError, TypeError) as e:
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


@case(plain=(None, False), kernels=("triton", False), sequence=(None, True))
def tensor_parallel(name, sequence):
    """Each rank has half of the heads and of the MLP; with `sequence` also half of the rows between them."""
    from torch.distributed.tensor.parallel import parallelize_module

    model, x, wanted = block_and_batch()
    for block in model:
        parallelize_module(block, mesh("tp"), tensor_parallel_plan(sequence))
    calls = backend.calls.copy()
    with backend.use_backend(name):
        y = model(x.chunk(W, 1)[dist.get_rank()] if sequence else x)
    assert (backend.calls - calls)["attention", name or "torch"] == 2
    loss = y.square().sum() / x.numel()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    close(grads, wanted)


@case()
def a_dtensor_takes_stock_torch():
    """No kernel reads a DTensor: torch's own op and sharding rule serve it, and a forced backend says so."""
    from torch.distributed.tensor import Shard, distribute_tensor

    x = drawn(4, 6, 16)
    whole = distribute_tensor(x, mesh(), [Shard(0)])
    y = functional.layer_norm(whole, (16,))
    assert y.placements == (Shard(0),)
    torch.testing.assert_close(y.full_tensor(), torch.nn.functional.layer_norm(x, (16,)))
    for call in (lambda: functional.layer_norm(whole, (16,)), lambda: functional.softmax(whole, -1)):
        try:
            with backend.use_backend("triton"):
                call()
        except NotImplementedError as e:
            assert "DTensor" in str(e)
        else:
            raise AssertionError("a kernel ran on a DTensor")


@case(batch=(0,), heads=(1,))
def kernels_on_the_local_parts_of_dtensors(dim):
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map

    q, k, v, do = operands()
    parts = [distribute_tensor(t, mesh(), [Shard(dim)]).requires_grad_() for t in (q, k, v)]
    attend = local_map(
        functional.attention,
        out_placements=[Shard(dim)],
        in_placements=([Shard(dim)],) * 3,
        in_grad_placements=([Shard(dim)],) * 3,
        device_mesh=mesh(),
    )
    with backend.use_backend("triton"):
        o = attend(*parts)
        o.backward(distribute_tensor(do, mesh(), [Shard(dim)]))
    got = [t.full_tensor() for t in (o, *(p.grad for p in parts))]
    for have, want in zip(got, alone(q, k, v, do, torch.float64), strict=True):
        torch.testing.assert_close(have, want.float(), rtol=1e-5, atol=1e-5)


@case()
def the_documentation():
    from torch.distributed.tensor import Shard, distribute_tensor

    text = (pathlib.Path(__file__).parents[1] / "docs/distributed.md").read_text()
    shown = {"fastattn": fastattn}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(snippet, "docs/distributed.md", "exec"), shown)
    q, k, v, _ = operands()
    expected = functional.attention(q, k, v, causal=True)
    torch.testing.assert_close(shown["attend"](q, k, v), expected)
    parts = [distribute_tensor(t, mesh(), [Shard(1)]) for t in (q, k, v)]
    split = shown["split_by_heads"](mesh())(*parts, causal=True).full_tensor()
    torch.testing.assert_close(split, expected)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name, (function, arguments) in CHECKS.items():
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
