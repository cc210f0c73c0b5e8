"""What torch's machinery sees of each op: schemas, fake tensors, graphs, export, checkpointing, counters, modes, threads."""

import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fastattn import backend, functional

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU counterparts are marked gpu")


def floats(*shape, grad=True):
    return torch.randn(shape, requires_grad=grad)


def qkv(S=20, H=2, H_kv=2, D=16):
    return floats(1, H, S, D), floats(1, H_kv, S, D), floats(1, H_kv, S, D)


def packed(S=20):
    cu = torch.tensor([0, S // 2, S], dtype=torch.int32)
    return floats(S, 2, 16), floats(S, 2, 16), floats(S, 2, 16), cu


def cache(S=20):
    lens = torch.tensor([S - 3, S // 2], dtype=torch.int32)
    return *(t.detach() for t in (floats(2, 2, 1, 16), floats(2, 2, S, 16), floats(2, 2, S, 16))), lens


f = functional
# name: (function of tensors, its tensors at size S). Every public function, and between them every launcher.
CASES = {
    "layer_norm": (lambda x, w, b: f.layer_norm(x, w.shape, w, b), lambda S: (floats(2, S, 24), floats(24), floats(24))),
    "rms_norm": (lambda x, w: f.rms_norm(x, w.shape, w), lambda S: (floats(2, S, 24), floats(24))),
    "add_layer_norm": (
        lambda x, r, w, b: f.add_layer_norm(x, r, w.shape, w, b, dropout_p=0.3, prenorm=True),
        lambda S: (floats(2, S, 24), floats(2, S, 24), floats(24), floats(24)),
    ),
    "add_rms_norm": (
        lambda x, r, w: f.add_rms_norm(x, r, w.shape, w, prenorm=True),
        lambda S: (floats(2, S, 24), floats(2, S, 24), floats(24)),
    ),
    "bias_gelu": (lambda x, b: f.bias_gelu(x, b, "tanh"), lambda S: (floats(2, S, 24), floats(24))),
    "softmax": (lambda x: f.softmax(x, -1), lambda S: (floats(2, S, 24),)),
    "log_softmax": (lambda x: f.log_softmax(x, -1), lambda S: (floats(2, S, 24),)),
    "scaled_masked_softmax": (
        lambda s, m: f.scaled_masked_softmax(s, m, scale=0.5, causal=True),
        lambda S: (floats(2, 2, S, S), torch.ones(2, 1, S, S, dtype=torch.bool).tril()),
    ),
    "linear_cross_entropy": (
        lambda x, w, b, t: f.linear_cross_entropy(x, w, t, bias=b),
        lambda S: (floats(2, S, 24), floats(40, 24), floats(40), torch.randint(0, 40, (2, S))),
    ),
    "linear_cross_entropy, a loss each": (
        lambda x, w, t: f.linear_cross_entropy(x, w, t, reduction="none", softcap=3.0),
        lambda S: (floats(2, S, 24), floats(40, 24), torch.randint(0, 40, (2, S))),
    ),
    "add_positional_encoding": (
        lambda x, t: f.add_positional_encoding(x, t, dropout_p=0.2),
        lambda S: (floats(2, S, 16), floats(64, 16)),
    ),
    "embeddings": (
        lambda ids, t, p, w, b: f.embeddings(ids, t, p, norm_weight=w, norm_bias=b),
        lambda S: (torch.randint(0, 9, (2, S)), floats(9, 16), floats(64, 16), floats(16), floats(16)),
    ),
    "attention": (lambda q, k, v: f.attention(q, k, v, causal=True, return_lse=True), lambda S: qkv(S)),
    "attention, masked": (
        lambda q, k, v, bias, lens: f.attention(q, k, v, bias=bias, kv_lens=lens, dropout_p=0.25, window=(9, 3)),
        lambda S: (*qkv(S), floats(1, 2, S, S), torch.tensor([S - 5])),
    ),
    "attention, weights": (
        lambda q, k, v: f.attention(q, k, v, return_weights=True)[1],
        lambda S: tuple(t.detach() for t in qkv(S)),
    ),
    "attention, one tensor three times": (
        lambda x: f.attention(x, x, x),
        lambda S: (floats(1, 2, S, 16),),
    ),
    "attention_varlen": (
        lambda q, k, v, cu: f.attention_varlen(q, k, v, cu, cu, q.shape[0], q.shape[0], causal=True),
        packed,
    ),
    "scaled_dot_product_attention": (
        lambda q, k, v, m: f.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
        lambda S: (*qkv(S, H_kv=1), floats(S, S)),
    ),
    "attention_decode": (lambda q, k, v, n: f.attention_decode(q, k, v, n), cache),
    "attention_decode, append": (
        lambda q, k, v, n, new: f.attention_decode(q, k, v, n, k_new=new, v_new=new),
        lambda S: (*cache(S), floats(2, 2, 1, 16, grad=False)),
    ),
}  # fmt: skip


def run(name, tensors, function=None):
    """Outputs and gradients of a case, with the seed set for its dropout."""
    function = function or CASES[name][0]
    torch.manual_seed(1)
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in tensors if t.requires_grad]
    if not wanted or not outputs[0].requires_grad:
        return outputs
    total = sum((o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    return *outputs, *torch.autograd.grad(total, wanted)


@pytest.fixture(autouse=True)
def _triton():
    with backend.use_backend("triton"):
        yield


class Seen(TorchDispatchMode):
    """Notes every call of an op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def registered():
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastattn::")}


def test_public_functions_are_all_here():
    assert {name.partition(",")[0] for name in CASES} == set(functional.__all__)


def test_a_mode_sees_every_op_and_opcheck_agrees():
    checked = {}
    for name, (_, make) in CASES.items():
        with Seen() as seen:
            run(name, make(11))
        assert seen.calls, f"{name}: a dispatch mode saw no op"
        for op, args in seen.calls:
            key = (op, tuple(type(a) for a in args))
            if key not in checked:
                checked[key] = name
                args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
                torch.library.opcheck(op, args)
    assert {op.name().partition(".")[0] for op, _ in checked} == registered()


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_one_graph(name):
    function, make = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in pairs(name, make(20), compiled):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_changing_sizes(name):
    function, make = CASES[name]
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for S in (20, 33):
        for ours, eager in pairs(name, make(S), compiled):
            torch.testing.assert_close(ours, eager)
        graphs.append(len(counter.graphs))
    assert graphs[0] == graphs[1], "another size compiled anew"


def pairs(name, tensors, compiled):
    # in-place appends write the same values again, so one set of tensors serves both
    return zip(run(name, tensors, compiled), run(name, tensors), strict=True)


@pytest.mark.parametrize("name", ["attention", "layer_norm", "softmax", "add_positional_encoding"])
def test_exports(name):
    function, make = CASES[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    tensors = tuple(t.detach() for t in make(20))
    program = torch.export.export(Module(), tensors)
    assert any("fastattn" in str(node.target) for node in program.graph.nodes), program.graph
    for ours, eager in zip(run(name, tensors, program.module()), run(name, tensors), strict=True):
        torch.testing.assert_close(ours, eager)


def leaves(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_selective_checkpointing_keeps_what_it_is_told_to():
    q, k, v = qkv()
    launches = []

    def policy(context, op, *args, **kwargs):
        if op.namespace == "fastattn":
            launches.append((op.name(), context.is_recompute))
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    block = lambda *qkv: functional.attention(*qkv, causal=True).sin()  # noqa: E731
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    kept = checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts)
    plain = block(q, k, v)
    torch.testing.assert_close(
        torch.autograd.grad(kept.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), (q, k, v))
    )
    assert ("fastattn::attention_fwd", False) in launches


def test_checkpointing_redraws_the_same_dropout():
    q, k, v = qkv()
    block = lambda *qkv: functional.attention(*qkv, dropout_p=0.5)  # noqa: E731
    grads = []
    for recompute in (True, False):
        torch.manual_seed(3)
        o = checkpoint(block, q, k, v, use_reentrant=False) if recompute else block(q, k, v)
        grads.append(torch.autograd.grad(o.sum(), (q, k, v)))
    torch.testing.assert_close(*grads)


def test_flops_are_counted():
    q, k, v = qkv(S=32)
    with FlopCounterMode(display=False) as counter:
        functional.attention(q, k, v).sum().backward()
    forward = 4 * 2 * 32 * 32 * 16
    assert counter.get_total_flops() == 3.5 * forward


def test_the_profiler_names_the_op():
    q, k, v = qkv()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.attention(q, k, v).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastattn::attention_fwd", "fastattn::attention_bwd"} <= names


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_on_a_second_gpu(name):
    """Every op of a case, backward included: shape, dtype, strides and device, with no GPU and no launch."""
    with Seen() as seen:
        run(name, CASES[name][1](20))
    for op, args in seen.calls:
        expected = leaves(op(*args))
        with FakeTensorMode(allow_non_fake_inputs=True):
            got = leaves(op(*(on_second_gpu(a) for a in args)))
        for g, e in zip(got, expected, strict=True):
            assert g.device == torch.device("cuda:1")
            assert (g.shape, g.dtype, g.stride()) == (e.shape, e.dtype, e.stride()), op


def on_second_gpu(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:1")


def test_a_dtensor_of_one_rank_is_served_but_with_dropout(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q, k, v = (distribute_tensor(t.detach(), mesh, [Replicate()]) for t in qkv())
        with pytest.raises(NotImplementedError, match="DTensor"):
            functional.attention(q, k, v, dropout_p=0.5)
        o, plain = functional.attention(q, k, v), [t.to_local() for t in (q, k, v)]
        assert torch.equal(o.to_local(), functional.attention(*plain))
    finally:
        dist.destroy_process_group()


def test_two_threads_get_the_same_as_one(monkeypatch):
    launcher, one_at_a_time = backend.launcher, threading.Lock()  # the interpreter itself serves one thread

    def locked(*which):
        def launch(*args):
            with one_at_a_time:
                return launcher(*which)(*args)

        return launch

    monkeypatch.setattr(backend, "launcher", locked)
    tensors = {name: CASES[name][1](20) for name in ("attention", "layer_norm", "softmax")}
    expected = {name: run(name, t) for name, t in tensors.items()}
    found, failed = [], []

    def work():
        try:
            for name, t in tensors.items():
                found.append((name, run(name, t)))
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed, failed
    for name, got in found:
        torch.testing.assert_close(got, expected[name], rtol=0, atol=0)
