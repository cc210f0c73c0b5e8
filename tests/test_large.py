"""Places beyond element 2^31, which a 32-bit number does not hold: of inputs that lie far apart, and of whole tensors.

Memory that nobody wrote is zero. On a CPU it costs addresses only, and Triton's interpreter runs those few programs of a
launch that own what is compared, so that such sizes are affordable there; the emulation runs every block, so that for
CUDA it sees the inputs only. On a GPU everything runs.
"""

import contextlib
import dataclasses
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE

from fastattn import backend, check, check_cases, functional

DTYPE = torch.bfloat16
FAR = 2**31
ON_A_GPU = DEVICE == "cuda"
if not ON_A_GPU:
    pytest.importorskip("triton")
    from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _unwritten_memory_stays_as_it_is():
    torch.utils.deterministic.fill_uninitialized_memory = ON_A_GPU
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def room():
    """room(gigabytes): skips where a GPU has less memory free; three tests use it at a time, however many processes there are."""
    with contextlib.ExitStack() as stack:

        def enter(gigabytes):
            if not ON_A_GPU:
                return
            stack.enter_context(one_of_three())
            last = time.monotonic() + 40
            while (free := torch.cuda.mem_get_info()[0] / 2**30) < gigabytes:
                if time.monotonic() > last:
                    pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")
                time.sleep(0.2)

        yield enter
        if ON_A_GPU:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def one_of_three():
    paths = [os.path.join(tempfile.gettempdir(), f"fastattn-large-{os.getuid()}-{i}") for i in range(3)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "w")) for path in paths]
        while True:
            for file in files:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield
                    return
            time.sleep(0.05)


@contextlib.contextmanager
def skipped_where_refused():
    try:
        yield
    except NotImplementedError as e:
        pytest.skip(str(e))


def nothing(shape, dtype):
    """Zeros."""
    if ON_A_GPU:
        return torch.zeros(shape, dtype=dtype, device="cuda")
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of addresses: {e}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# Inputs of which one dim's elements lie so far apart that the last is beyond element 2^31.


class Far:
    """One memory for all of a process; tensors lie in it side by side."""

    def __init__(self):
        self.memory = nothing((FAR + 2**28,), DTYPE)

    def place(self, tensors, dim):
        placed, start = [], 0
        for t in tensors:
            if spreads(t, dim):
                size, others = t.shape[dim], t.movedim(dim, 0)[0]
                step = (FAR // (size - 1) // 16 + 2) * 16
                stride = list(torch.empty(others.shape, device="meta").stride())
                stride.insert(dim % t.dim(), step)
                memory = self.memory.view(t.dtype)
                at = start * DTYPE.itemsize // t.dtype.itemsize
                t = memory.as_strided(t.shape, stride, at).copy_(t)
                start += (others.numel() // 2**16 + 1) * 2**16
            placed.append(t)
        return placed


def spreads(t, dim):
    return t.dtype in (DTYPE, torch.bool) and -t.dim() <= dim < max(t.dim() - 1, 0) and t.shape[dim] > 1


@pytest.fixture(scope="module")
def far():
    return Far()


def cases_that_spread():
    for case in check_cases.CASES:
        for dim in (0, 1, 2, -1):
            torch.manual_seed(0)
            made = [t.to(DTYPE) if t.is_floating_point() else t for t in case.make()]
            if any(spreads(t, dim) for t in made):
                yield pytest.param(case, dim, id=f"{case.function}, {case.label}, dim {dim}")


@pytest.mark.parametrize("case, dim", list(cases_that_spread()))
def test_inputs_that_lie_far_apart(case, dim, fused, far):
    made = [t.to(DEVICE, DTYPE) if t.is_floating_point() else t.to(DEVICE) for t in case.make()]
    with backend.use_backend("torch"):
        outputs = case.call(functional, *made)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = made + [torch.randn_like(o).to(DTYPE) for o in outputs]
    placed = far.place(values, dim)
    assert all(torch.equal(*pair) for pair in zip(placed, values, strict=True)), "these overlap in memory"
    inputs, grad_outputs = placed[: len(made)], placed[len(made) :]
    for t in inputs:
        t.requires_grad_(case.backward and t.is_floating_point())
    with skipped_where_refused():
        wrong = check_cases.broken_rules(case, fused, inputs, grad_outputs=grad_outputs)
    assert not wrong, wrong


# Whole tensors of more than 2^31 elements: zeros, but for a few places that are compared with the same call on those alone.


@dataclasses.dataclass(frozen=True)
class Large:
    """A call whose tensors split along `dim` into `count` places, of which every `item` are independent of all others."""

    label: str
    count: int
    split: Callable  # count -> tensors that split
    call: Callable  # (f, *split, *shared) -> outputs that split
    shared: tuple = ()  # shapes of what all places meet
    item: int = 1
    dim: int = 0
    gigabytes: int = 30  # of a GPU's memory
    on_a_cpu: bool = True
    backward: bool = True


def of(*shapes, before=()):
    """count -> a tensor (*before, count, *shape) for each shape."""
    return lambda count: [nothing((*before, count, *shape), DTYPE) for shape in shapes]


def with_ids(split, largest, *shape):
    """The same and int64 ids (1, count, *shape)."""
    return lambda count: [*split(count), torch.randint(largest, (1, count, *shape), device=DEVICE)]


def masked(shape):
    """count -> scores and their mask."""
    return lambda count: [nothing((count, *shape), DTYPE), nothing((count, *shape), torch.bool)]


def cached(count):
    caches = [nothing((count, 2, 1024, 64), DTYPE) for _ in "kv"]
    return [nothing((count, 8, 1, 64), DTYPE), *caches, torch.full((count,), 1000, device=DEVICE)]


def packed(f, q, k, v):
    cu = torch.arange(0, q.shape[0] + 1, 512, dtype=torch.int32, device=q.device)
    return f.attention_varlen(q, k, v, cu, cu, 512, 512, causal=True)


# fmt: off
LARGE = [
    Large("softmax", FAR // 512 + 3, of((512,)), lambda f, x: f.softmax(x)),
    Large("softmax of 9", FAR // 9 + 3, of((9,)), lambda f, x: f.softmax(x)),
    Large("softmax of 1", FAR + 5, of((1,)), lambda f, x: f.softmax(x)),
    Large("softmax of 1, fewer than 2^31", FAR // 2 - 1, of((2, 1)), lambda f, x: f.softmax(x)),
    Large("softmax across", FAR // 8192 + 3, of((64, 128)), lambda f, x: f.softmax(x, 1)),
    Large("softmax across few", FAR // 2 + 3, of((2,), before=(2,)), lambda f, x: f.softmax(x, 0), dim=1),
    Large("softmax of long rows", FAR // 2**16 + 2, of((2**16,)), lambda f, x: f.softmax(x)),
    Large("log_softmax", FAR // 512 + 3, of((512,)), lambda f, x: f.log_softmax(x)),
    Large("scaled_masked_softmax", FAR // 2**14 + 2, masked((2, 64, 128)),
          lambda f, x, mask: f.scaled_masked_softmax(x, mask, 0.5, True)),
    Large("layer_norm", FAR // 512 + 3, of((512,)), lambda f, x, w, b: f.layer_norm(x, (512,), w, b), ((512,), (512,))),
    Large("layer_norm of 9", FAR // 9 + 3, of((9,)), lambda f, x, w, b: f.layer_norm(x, (9,), w, b), ((9,), (9,))),
    Large("layer_norm of 1", FAR + 5, of((1,)), lambda f, x, w, b: f.layer_norm(x, (1,), w, b), ((1,), (1,)), gigabytes=60),
    Large("layer_norm of long rows", FAR // 2**15 + 2, of((2**15,)), lambda f, x, w: f.layer_norm(x, (2**15,), w), ((2**15,),)),
    Large("rms_norm", FAR // 512 + 3, of((512,)), lambda f, x, w: f.rms_norm(x, (512,), w, 1e-6), ((512,),)),
    Large("add_layer_norm", FAR // 512 + 3, of((512,), (512,)),
          lambda f, x, r, w, b: f.add_layer_norm(x, r, (512,), w, b, prenorm=True), ((512,), (512,)), gigabytes=45),
    Large("bias_gelu", FAR // 1024 + 2, of((1024,)), lambda f, x, b: f.bias_gelu(x, b), ((1024,),)),
    Large("bias_gelu of 9", FAR // 9 + 3, of((9,)), lambda f, x, b: f.bias_gelu(x, b), ((9,),)),
    Large("bias_gelu of 1", FAR - 1, of((1,)), lambda f, x: f.bias_gelu(x)),
    Large("bias_gelu of one row", FAR + 5, of((), before=(1,)), lambda f, x: f.bias_gelu(x), dim=1),
    Large("bias_gelu of one row, less than 2^31", FAR - 1, of((), before=(1,)), lambda f, x: f.bias_gelu(x), dim=1),
    Large("linear_cross_entropy", FAR // 512 + 3, lambda n: [*of((512,))(n), torch.randint(64, (n,), device=DEVICE)],
          lambda f, x, targets, w: f.linear_cross_entropy(x, w, targets, reduction="none"), ((64, 512),), on_a_cpu=False),
    Large("add_positional_encoding, batches", FAR // 2**17 + 2, of((512, 256)),
          lambda f, x, table: f.add_positional_encoding(x, table), ((512, 256),), on_a_cpu=False),
    Large("add_positional_encoding, ids", FAR // 768 + 2, with_ids(of((256,), before=(3,)), 1000),
          lambda f, x, ids, table: f.add_positional_encoding(x, table, position_ids=ids), ((1000, 256),), dim=1),
    Large("add_positional_encoding, sinusoidal", FAR // 768 + 2, with_ids(of((256,), before=(3,)), 2**20),
          lambda f, x, ids: f.add_positional_encoding(x, position_ids=ids), dim=1),
    Large("embeddings", FAR // 256 + 2, with_ids(lambda _: [], 1000), lambda f, ids, table: f.embeddings(ids, table), ((1000, 256),), dim=1),
    Large("embeddings, norm", FAR // 256 // 64 + 2, with_ids(lambda _: [], 1000, 64),
          lambda f, ids, table, at, w, b: f.embeddings(ids[0], table, at, norm_weight=w, norm_bias=b)[None],
          ((1000, 256), (64, 256), (256,), (256,)), dim=1),
    Large("attention", FAR // 2**14 + 2, of(*[(2, 128, 64)] * 3), lambda f, q, k, v: f.attention(q, k, v, causal=True), gigabytes=45),
    Large("attention, bias and mask", FAR // 2**14 + 2, lambda n: [*of(*[(1, 128, 64)] * 3, (1, 128, 128))(n), nothing((n, 1, 128, 128), torch.bool)],
          lambda f, q, k, v, bias, mask: f.attention(q, k, v, bias=bias, mask=mask), gigabytes=45),
    Large("attention, more than 2^31 pairs", FAR // 4096 + 3, of((32,), (4096,), before=(1, 1)),
          lambda f, q, bias, k, v: f.attention(q, k, v, bias=bias), ((1, 1, 4096, 32), (1, 1, 4096, 32)), dim=2, gigabytes=20, on_a_cpu=False),
    Large("attention_varlen", FAR // 64 + 512, of(*[(1, 64)] * 3), packed, item=512, gigabytes=45, on_a_cpu=False),
    Large("attention_decode", FAR // 2**17 + 2, cached, lambda f, *inputs: f.attention_decode(*inputs), backward=False),
]
# fmt: on


def compared(large, elements):
    """[(first place, places)]: the first items, those where element 2^31 of a tensor of so many is, the last ones."""
    items = large.count // large.item
    around = min(int(items * FAR / elements), items - 3) if elements > FAR else items // 2
    firsts = sorted({0, max(around - 1, 2), items - 2})
    return [(first * large.item, min(large.item * 2, large.count)) for first in firsts]


@pytest.mark.parametrize("large", LARGE, ids=lambda large: large.label)
def test_more_elements_than_a_32_bit_number_counts(large, fused, room, monkeypatch):
    if not ON_A_GPU and not (large.on_a_cpu and fused == "triton"):
        pytest.skip("every block of the launches runs, which takes a GPU")
    room(large.gigabytes)
    split = large.split(large.count)
    shared = [torch.randn(shape, device=DEVICE).to(DTYPE) for shape in large.shared]
    places = compared(large, max(t.numel() for t in split))
    picks = lambda t: torch.cat([t.narrow(large.dim, first, count) for first, count in places], large.dim)  # noqa: E731

    def fill(t):
        for first, count in places:
            part = t.narrow(large.dim, first, count)
            part.copy_(
                torch.randn(part.shape, device=DEVICE) > -0.5
                if t.dtype == torch.bool
                else torch.randn(part.shape, device=DEVICE)
            )

    for t in split:
        if t.dtype in (DTYPE, torch.bool):
            fill(t)
    picked = [picks(t) for t in split]
    if not ON_A_GPU:
        run_only(
            monkeypatch, [(first / large.count, (first + count) / large.count) for first, count in places]
        )

    def run(f, name, split, shared, dys):
        wanted = [t.requires_grad_() for t in split if t.is_floating_point() and large.backward]
        if (
            ON_A_GPU or split is not whole
        ):  # on a CPU the sum over all places would be a walk over all of them
            wanted += [t.requires_grad_() for t in shared if large.backward]
        with backend.use_backend(name):
            outputs = large.call(f, *split, *shared)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            dys = (
                dys(outputs)
                if callable(dys)
                else [dy.to(o.dtype) for dy, o in zip(dys, outputs, strict=True)]
            )
            grads = torch.autograd.grad(outputs, wanted, dys) if wanted else ()
        return [o.detach() for o in outputs], list(grads), dys

    def zeros_but_there(outputs):
        dys = [nothing(o.shape, o.dtype) for o in outputs]
        for dy in dys:
            fill(dy)
        return dys

    whole = [t.detach() for t in split]
    with skipped_where_refused():
        outputs, grads, dys = run(functional, fused, whole, [t.detach() for t in shared], zeros_but_there)
    dys = [picks(dy) for dy in dys]
    double = lambda tensors: [t.detach().double() if t.is_floating_point() else t for t in tensors]  # noqa: E731
    copies = lambda tensors: [t.detach().clone() for t in tensors]  # noqa: E731
    exact = run(check_cases.Specification, None, double(picked), double(shared), double(dys))[:2]
    stock = run(functional, "torch", copies(picked), copies(shared), dys)[:2]
    of_split = sum(t.is_floating_point() for t in split)
    found = [picks(t) for t in outputs] + [picks(t) for t in grads[:of_split]] + grads[of_split:]
    wrong = [
        sentence
        for i, three in enumerate(zip(found, sum(stock, []), sum(exact, []), strict=ON_A_GPU))
        if (sentence := check.compare(f"{('output', 'gradient')[i >= len(outputs)]} {i}", *three))
    ]
    assert not wrong, wrong
    if ON_A_GPU:
        for t in (*outputs, *grads):
            assert all(part.isfinite().all() for part in t.reshape(-1).split(2**28)), (
                "some of it was not written"
            )


def run_only(monkeypatch, shares):
    """Of every launch that is interpreted, the programs in these shares of it; kernels are launched with one for each of their tiles."""
    from fastattn.kernels import bias_gelu, layer_norm

    builder, run = interpreter.interpreter_builder, interpreter.InterpretedFunction.run
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def some(self, *args, grid, warmup, **kwargs):
        of = range(grid[0])
        near = {
            i
            for first, end in shares
            for i in of[max(int(first * len(of)) - 1, 0) : max(int(end * len(of)) + 2, 0)]
        }
        programs = sorted(near)
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: set_dim(grid[0], 1, 1))
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(programs[x], y, z))
        return run(self, *args, grid=(len(programs),), warmup=warmup, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", some)
    for module in (bias_gelu, layer_norm):
        monkeypatch.setattr(module, "multiprocessors", lambda x: FAR)


# What does not split.


@pytest.mark.gpu
@pytest.mark.parametrize("N", [FAR - 1, FAR + 8])
@pytest.mark.parametrize("function", ["softmax", "layer_norm", "rms_norm"])
def test_one_row(function, N, fused, room):
    """Zeros but at a few columns, so that sums over all of it are known from those."""
    room(40)
    x, dy = nothing((1, N), DTYPE).requires_grad_(), nothing((1, N), DTYPE)
    places = torch.tensor([0, 1, N // 2, N - 2**20, N - 2, N - 1], device=DEVICE)
    at, slope = 8 * torch.randn(2, len(places), device=DEVICE).to(DTYPE)
    x.data[0, places], dy[0, places] = at, slope
    with skipped_where_refused(), backend.use_backend(fused):
        y = getattr(functional, function)(
            x, *(() if function == "softmax" else ((N,), *[None] * (1 + (function == "layer_norm")), 1e-5))
        )
    (dx,) = torch.autograd.grad(y, x, dy)

    at, slope, zeros = at.double(), slope.double(), N - len(places)
    if function == "softmax":
        exact = at.exp() / (at.exp().sum() + zeros)
        exact_dx = exact * (slope - (slope * exact).sum())
    else:
        mean = at.sum() / N if function == "layer_norm" else 0.0
        rstd = ((((at - mean) ** 2).sum() + zeros * mean**2) / N + 1e-5).rsqrt()
        exact = (at - mean) * rstd
        exact_dx = rstd * (
            slope - exact * (slope * exact).sum() / N - (slope.sum() / N if function == "layer_norm" else 0.0)
        )
    for name, ours, wanted in (("y", y.detach(), exact), ("dx", dx, exact_dx)):
        assert not (wrong := check.compare(name, ours[0, places], wanted.to(DTYPE), wanted)), wrong
        assert all(part.isfinite().all() for part in ours[0].split(2**28)), f"some of {name} was not written"


def test_a_window_over_more_elements(fused, room, monkeypatch):
    """Attention over 2^25 positions of one head; the gradient of a few queries reaches the keys of their window only."""
    if not ON_A_GPU and fused == "cuda":
        pytest.skip("every block of the launches runs, which takes a GPU")
    room(45)
    S, rows, reach = FAR // 64 + 640, 128, 64
    inputs = [nothing((1, 1, S, 64), DTYPE) for _ in "qkv"]
    dy = nothing((1, 1, S, 64), DTYPE)
    firsts = (0, FAR // 64 - 64, S - rows)
    for first in firsts:
        for t in (*inputs, dy):
            near = t[:, :, max(first - reach, 0) : first + rows]
            near.copy_(torch.randn(near.shape, device=DEVICE))
        dy[:, :, max(first - reach, 0) : first] = 0
    if not ON_A_GPU:
        near = [(max(first - 2 * reach, 0) / S, (first + rows + 2 * reach) / S) for first in firsts]
        run_only(
            monkeypatch, [*near, *((1 - end, 1 - start) for start, end in near)]
        )  # some kernels begin with the last queries
    for t in inputs:
        t.requires_grad_()
    with skipped_where_refused(), backend.use_backend(fused):
        o = functional.attention(*inputs, causal=True, window=(reach, None))
    grads = torch.autograd.grad(o, inputs, dy)
    for first in firsts:
        keys, queries = slice(max(first - reach, 0), first + rows), slice(first, first + rows)
        cut = [inputs[0][:, :, queries], *(t[:, :, keys] for t in inputs[1:])]
        call = lambda f: lambda q, k, v: f.attention(q, k, v, causal="bottom_right", window=(reach, None))  # noqa: E731
        with backend.use_backend("torch"):
            stock = check.run(
                call(functional), [t.detach().clone().requires_grad_() for t in cut], [dy[:, :, queries]], {}
            )
        exact = check.run(
            call(check_cases.Specification),
            [t.detach().double().requires_grad_() for t in cut],
            [dy[:, :, queries].double()],
            {},
        )
        found = [o[:, :, queries], grads[0][:, :, queries], *(g[:, :, keys] for g in grads[1:])]
        for name, *three in zip(
            ("o", "dq", "dk", "dv"), found, [*stock[0], *stock[1]], [*exact[0], *exact[1]], strict=True
        ):
            assert not (wrong := check.compare(f"{name} from {first}", *three)), wrong


def test_pages_beyond(fused, room):
    """Decoding over pages of which the last lie beyond element 2^31, and new rows into one."""
    room(20)
    pages = FAR // 2048 + 3
    caches = [nothing((pages, 16, 2, 64), DTYPE) for _ in "kv"]
    used = torch.tensor(
        [[0, pages - 1, 5, pages - 2], [pages - 3, 1, 2, pages // 2]], dtype=torch.int32, device=DEVICE
    )
    for cache in caches:
        cache[used.long().flatten()] = torch.randn(8, 16, 2, 64, device=DEVICE).to(DTYPE)
    small = [cache[used.long().flatten()] for cache in caches]
    q, k_new, v_new = (torch.randn(2, h, 1, 64, device=DEVICE).to(DTYPE) for h in (4, 2, 2))
    lens = torch.tensor([50, 63], device=DEVICE)

    def run(f, caches, table, name, double=False):
        cast = [t.double() if double else t for t in (q, *caches, k_new, v_new)]
        with backend.use_backend(name):
            return f.attention_decode(*cast[:3], lens, block_table=table, k_new=cast[3], v_new=cast[4])

    with skipped_where_refused():
        ours = run(functional, caches, used, fused)
    table = torch.arange(8, dtype=torch.int32, device=DEVICE).view(2, 4)
    stock = run(functional, [c.clone() for c in small], table, "torch")
    exact = run(check_cases.Specification, [c.clone() for c in small], table, None, double=True)
    assert not (wrong := check.compare("o", ours, stock, exact)), wrong
    for cache, new in zip(caches, (k_new, v_new), strict=True):
        assert torch.equal(cache[pages - 2, 2], new[0, :, 0]) and torch.equal(
            cache[pages // 2, 15], new[1, :, 0]
        )


def test_a_table_beyond(fused, room):
    """Embeddings whose ids point to both ends of a table of more than 2^31 elements, and back into its gradient on a GPU."""
    room(25)
    V = FAR // 256 + 5
    table = nothing((V, 256), DTYPE)
    ids = torch.tensor([[0, V - 1, V - 2, 7, V // 2, V - 1]], device=DEVICE)
    table[ids[0]] = torch.randn(6, 256, device=DEVICE).to(DTYPE)
    table.requires_grad_(ON_A_GPU)  # its gradient is zeroed, which on a CPU takes its memory
    with skipped_where_refused(), backend.use_backend(fused):
        y = functional.embeddings(ids, table)
    assert torch.equal(y, table[ids])
    if ON_A_GPU:
        dy = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, table, dy)
        assert torch.equal(grad[0], dy[0, 0]) and torch.equal(grad[V - 2], dy[0, 2])
        assert not check.compare(
            "sum", grad[V - 1], (dy[0, 1] + dy[0, 5]), dy[0, 1].double() + dy[0, 5].double()
        )
        assert int(sum(part.count_nonzero() for part in grad.split(2**20))) == int(
            grad[ids[0].unique()].count_nonzero()
        )
