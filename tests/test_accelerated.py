"""accelerated and enable: which calls of torch's functions they bring to ours, in which threads and graphs, and that they end."""

import contextlib
import inspect
import pathlib
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import nn
from torch.nn.functional import softmax as bound_earlier
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import backend, reroute

E, H = 32, 2


@contextlib.contextmanager
def enabled():
    fastattn.enable()
    try:
        yield
    finally:
        fastattn.disable()


WAYS = pytest.mark.parametrize("way", [fastattn.accelerated, enabled])


def rand(*shape):
    return torch.randn(shape, device=DEVICE)


def counted(run):
    before = backend.calls.copy()
    run()
    return {op for op, _ in backend.calls - before}


X, Q = rand(3, 5, E), rand(2, H, 5, 16)
WEIGHT = rand(E)
NORM = nn.LayerNorm(E, device=DEVICE)
ATTENTION = nn.MultiheadAttention(E, H, batch_first=True, device=DEVICE)
LAYER = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True, device=DEVICE).eval()
CALLS = {
    "F.scaled_dot_product_attention": (lambda: F.scaled_dot_product_attention(Q, Q, value=Q, is_causal=True), "attention"),
    "F.layer_norm": (lambda: F.layer_norm(input=X, normalized_shape=[E], weight=WEIGHT, eps=1e-3), "layer_norm"),
    "F.rms_norm": (lambda: F.rms_norm(X, (5, E)), "rms_norm"),
    "F.softmax": (lambda: F.softmax(X, 1, 3, torch.float32), "softmax"),
    "torch.softmax": (lambda: torch.softmax(X, dim=0), "softmax"),
    "torch.special.softmax": (lambda: torch.special.softmax(X, -1), "softmax"),
    "Tensor.softmax": (lambda: X.softmax(-1), "softmax"),
    "F.log_softmax": (lambda: F.log_softmax(X, dim=-1), "log_softmax"),
    "torch.log_softmax": (lambda: torch.log_softmax(X, -1, torch.float32), "log_softmax"),
    "Tensor.log_softmax": (lambda: X.log_softmax(1), "log_softmax"),
    "nn.LayerNorm": (lambda: NORM(X), "layer_norm"),
    "nn.MultiheadAttention": (lambda: ATTENTION(X, X, X, need_weights=False)[0], "attention"),
    "nn.MultiheadAttention, weights": (lambda: ATTENTION(X, X, X)[1], "softmax"),
    "bound earlier": (lambda: bound_earlier(X, -1), "softmax"),
    "torch.layer_norm": (lambda: torch.layer_norm(X, (E,)), "layer_norm"),
}  # fmt: skip
ONLY_ACCELERATED = {"bound earlier", "torch.layer_norm"}


@WAYS
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_brought_to_ours_and_gives_the_same(way, name):
    call, op = CALLS[name]
    y = call()
    with way():
        rerouted = counted(lambda: torch.testing.assert_close(call(), y))
    reached = way is fastattn.accelerated or name not in ONLY_ACCELERATED
    if name == "bound earlier" and way is enabled:  # F.softmax calls Tensor.softmax
        reached = True
    assert rerouted == ({op} if reached else set())
    assert not counted(call), "it went on after its end"


@WAYS
def test_kernels_serve_the_calls(way):
    for name, (call, op) in CALLS.items():
        if name in ONLY_ACCELERATED:
            continue
        y = call()
        before = backend.calls.copy()
        with way(), fastattn.use_backend("triton"):
            torch.testing.assert_close(call(), y)
        assert set(backend.calls - before) == {(op, "triton")}, name


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), nn.MultiheadAttention(E, H, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = self.layer(self.norm(x))
        q = self.attention(x, x, x, need_weights=False)[0][:, None]
        return bound_earlier(F.scaled_dot_product_attention(q, q, q), -1)


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))


@WAYS
def test_a_models_gradients(way):
    model = Model().to(DEVICE).double()
    stock = gradients(model, X.double())
    with way():
        torch.testing.assert_close(gradients(model, X.double()), stock, rtol=1e-9, atol=1e-12)
    with way(), fastattn.use_backend("triton"):
        torch.testing.assert_close(
            gradients(model.float(), X), tuple(t.float() for t in stock), rtol=1e-3, atol=1e-5
        )


@WAYS
def test_double_backward_ends(way):
    """The gradient of a gradient is taken through stock ops, which must not be brought back."""
    with way(), fastattn.use_backend("triton"):
        x = X.clone().requires_grad_()
        for y in (F.layer_norm(x, (E,)), F.scaled_dot_product_attention(x, x, x), torch.softmax(x, -1)):
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            assert torch.autograd.grad(g.square().sum(), x)[0].isfinite().all()


@WAYS
def test_the_inference_path_of_torch_is_off(way):
    with torch.no_grad():
        y = LAYER(X)
        assert not counted(lambda: LAYER(X))
        with way():
            assert counted(lambda: torch.testing.assert_close(LAYER(X), y)) == {"attention", "layer_norm"}
        assert torch.backends.mha.get_fastpath_enabled()


def test_nested_and_left_by_an_exception():
    def one():
        before = backend.calls.copy()
        F.layer_norm(X, (E,))
        return sum((backend.calls - before).values())

    with fastattn.accelerated():
        with pytest.raises(ZeroDivisionError), fastattn.accelerated():
            assert one() == 1, "a call was rerouted twice"
            raise ZeroDivisionError
        assert one() == 1, "the inner block ended the outer one"
    assert one() == 0
    with pytest.raises(ZeroDivisionError), fastattn.accelerated():
        raise ZeroDivisionError
    assert one() == 0
    fastattn.enable()
    fastattn.enable()
    assert one() == 1
    fastattn.disable()
    assert one() == 0
    fastattn.disable()


def test_what_was_there_is_back():
    before = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name in reroute.PLACES]
    with enabled():
        assert all(getattr(owner, name) is not stock for owner, name, stock, _ in before)
    for owner, name, stock, own in before:
        assert getattr(owner, name) is stock and (name in vars(owner)) == own
    assert "softmax" not in vars(torch.Tensor), "it is inherited"


def test_ops_call_torchs_functions_by_names_bound_at_import():
    """A look-up at run time would find ours there, and go round for ever."""
    names = "|".join({name for _, name in reroute.PLACES})
    root = pathlib.Path(fastattn.__file__).parent
    for path in (*root.glob("ops/*.py"), root / "reference.py"):
        found = re.findall(rf"\b(?:F|torch|torch\.special)\.(?:{names})\(", path.read_text())
        assert not found, (
            f"{path.name}: {found[0]}...): bind it at the top of the file, as ops/softmax.py does"
        )


def test_threads():
    """A block is its own thread's; enable is everybody's; many at once leave nothing behind."""

    def elsewhere(found):
        found.append(counted(lambda: F.layer_norm(X, (E,))))

    def in_a_thread(function, *args):
        thread = threading.Thread(target=function, args=args)
        thread.start()
        thread.join()

    for way, expected in ((fastattn.accelerated, set()), (enabled, {"layer_norm"})):
        with way():
            in_a_thread(elsewhere, found := [])
        assert found == [expected]

    y, wrong = F.layer_norm(X, (E,)), []

    def work(way):
        for _ in range(30):
            with way():
                if not torch.allclose(F.layer_norm(X, (E,)), y):
                    wrong.append(way)

    threads = [threading.Thread(target=work, args=(way,)) for way in (fastattn.accelerated, enabled) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert F.layer_norm is reroute.stock_layer_norm and torch.backends.mha.get_fastpath_enabled()


@WAYS
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(way, reentrant):
    """With the block around the backward pass too, what is recomputed is what was computed, dropout's mask included."""
    x = Q.clone().requires_grad_()

    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    grads = []
    with way(), fastattn.use_backend("triton"):
        for run in (attend, lambda q: checkpoint(attend, q, use_reentrant=reentrant)):
            torch.manual_seed(1)
            grads.append(torch.autograd.grad(run(x).square().sum(), x)[0] if run is attend else None)
            if grads[-1] is None:
                run(x).square().sum().backward()
                grads[-1] = x.grad
    torch.testing.assert_close(*grads)


def compiled(function):
    ran = []

    def keep(graph, _):
        names = [str(node.target) for node in graph.graph.nodes]

        def run(*args):
            ran.append(any("fastattn" in name for name in names))
            return graph(*args)

        return run

    return torch.compile(function, backend=keep, fullgraph=True), ran


@WAYS
def test_compiled_code_follows(way):
    """Compiled before, inside and after, with one graph each and the right one taken; Tensor methods are accelerated's alone."""
    for name, (call, _) in CALLS.items():
        torch._dynamo.reset()
        function, ran = compiled(call)
        with torch.no_grad(), fastattn.use_backend("triton"):
            y = function()
            with way():
                torch.testing.assert_close(function(), y)
                function()
            function()
        reached = way is fastattn.accelerated or not (name in ONLY_ACCELERATED or name.startswith("Tensor."))
        assert ran == [False, reached, reached, False], name


def test_enabled_before_anything_was_compiled():
    """Dynamo keeps tables of torch's functions, made when they are first needed: in a process of its own, while they are ours."""
    code = """
import torch, fastattn
x = torch.randn(3, 8)
fastattn.enable()
y = torch.compile(lambda: torch.softmax(x, -1) + torch.log_softmax(x, -1), backend="eager", fullgraph=True)()
fastattn.disable()
z = torch.compile(lambda: torch.softmax(x, -1) + x.log_softmax(-1), backend="eager", fullgraph=True)()
torch.testing.assert_close(y, z)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[1])


def test_a_block_inside_compiled_code():
    def function(x):
        with fastattn.accelerated(), fastattn.accelerated():
            q = NORM(x)[:, None]
            return bound_earlier(F.scaled_dot_product_attention(q, q, q), -1)

    y = function(X)
    with fastattn.use_backend("triton"):
        torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(X), y)
        with torch.no_grad():
            function, ran = compiled(function)
            function(X)
    assert ran == [True]


# torch warns of nested tensors, and of the dim it guesses
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_left_to_torch():
    """Arguments that only torch understands: served as without us, counted with a reason where it is a matter of ours."""

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "mine"

    nested = torch.nested.nested_tensor([rand(2, E), rand(3, E)])
    out = torch.empty_like(X)
    with fastattn.accelerated():
        report = fastattn.Report()
        F.softmax(nested, -1)
        assert report.calls() == [("softmax", "torch", 1, "nested tensors take torch's own kernels")]
        assert torch.softmax(X, -1, out=out) is out
        assert F.softmax(X).shape == X.shape
        with pytest.raises(TypeError):
            F.layer_norm([1.0], (1,))
        with pytest.raises(RuntimeError):
            F.layer_norm(X, (E + 1,))
    with enabled():
        assert F.layer_norm(X.as_subclass(Mine), (E,)) == "mine"
        assert F.scaled_dot_product_attention(Q, Q.as_subclass(Mine), Q) == "mine"


def test_places_that_another_library_took_are_left(monkeypatch):
    """As torch's context_parallel does: its attention is called, by nn.MultiheadAttention too, and is not put back by us."""
    seen = []

    def theirs(*args, **kwargs):
        seen.append(1)
        return reroute.stock_attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with pytest.warns(UserWarning, match="scaled_dot_product_attention is .*theirs"), enabled():
        assert counted(lambda: F.layer_norm(X, (E,))) == {"layer_norm"}
        ATTENTION(X, X, X, need_weights=False)
    with fastattn.accelerated():
        ATTENTION(X, X, X, need_weights=False)
        assert not counted(lambda: F.scaled_dot_product_attention(Q, Q, Q)), "what they call themselves"
    assert F.scaled_dot_product_attention is theirs and len(seen) == 3
    monkeypatch.undo()
    fastattn.enable()
    monkeypatch.setattr(F, "layer_norm", theirs)
    with pytest.warns(UserWarning, match="layer_norm was replaced again"):
        fastattn.disable()
    assert F.layer_norm is theirs
    monkeypatch.undo()
    F.layer_norm = reroute.stock_layer_norm  # what monkeypatch found there was ours


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with enabled(), fastattn.accelerated():
            Model().to(DEVICE)(X)


class Told(torch.Tensor):
    """A tensor that keeps what functions it was told of, and whether torch's places held them then."""

    told = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.told.append((func, func in [getattr(owner, name) for owner, name in reroute.PLACES]))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_subclasses_are_told_of_torchs_functions():
    told, q, weight, A = X.as_subclass(Told), Q.as_subclass(Told), WEIGHT.as_subclass(Told), ATTENTION
    calls = [
        lambda: F.scaled_dot_product_attention(Q, q, Q),
        lambda: F.layer_norm(told, [E]),
        lambda: F.rms_norm(X, [E], weight),
        lambda: F.softmax(told),
        lambda: torch.softmax(told, 1),
        lambda: torch.special.log_softmax(told, dim=1),
        lambda: told.log_softmax(1),
        lambda: F.log_softmax(told, dim=1),
        lambda: F.multi_head_attention_forward(told, X, X, E, H, A.in_proj_weight, A.in_proj_bias, None, None, False, 0.0,
                                               A.out_proj.weight, A.out_proj.bias),
    ]  # fmt: skip

    def heard():
        first = []
        for call in calls:
            Told.told.clear()
            call()
            first.append(Told.told[0])
        return first

    expected = heard()
    with enabled():
        assert heard() == expected
        assert F.softmax is reroute.functional_softmax
    assert all(in_place for _, in_place in expected)


def test_what_a_subclass_does_meanwhile_may_end_it():
    class Ending(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            fastattn.disable()
            return super().__torch_function__(func, types, args, kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.enable()
        F.softmax(X.as_subclass(Ending), -1)
    assert F.softmax is reroute.stock_functional_softmax and "softmax" not in vars(torch.Tensor)


def corner(name, *lengths):
    from torch.nn.attention import bias

    return getattr(bias, f"causal_{name}")(*lengths)


@WAYS
@pytest.mark.parametrize("by", ["torch", "triton"])
@pytest.mark.parametrize("name", ["upper_left", "lower_right"])
@pytest.mark.parametrize("L, S", [(5, 9), (7, 7)])
def test_causal_biases(way, by, name, L, S):
    q, k = rand(2, H, L, 16).requires_grad_(), rand(2, H, S, 16).requires_grad_()
    bias = corner(name, L, S)
    expected = F.scaled_dot_product_attention(q, k, k, bias._materialize(DEVICE))
    with way(), fastattn.use_backend(by):
        before = backend.calls.copy()
        got = F.scaled_dot_product_attention(q, k, k, bias)
        assert (backend.calls - before)["attention", by]
        alone = F.scaled_dot_product_attention(q[0], k[0], k[0], attn_mask=bias)
        with pytest.raises(ValueError, match="should not be used with causal=True"):
            F.scaled_dot_product_attention(q, k, k, bias, is_causal=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(alone, expected[0])
    dy = torch.randn_like(got)
    for pair in zip(*(torch.autograd.grad(o, (q, k), dy) for o in (got, expected)), strict=True):
        torch.testing.assert_close(*pair)


def test_a_causal_bias_of_other_lengths_is_refused():
    with fastattn.use_backend("triton"), pytest.raises(NotImplementedError, match="other lengths"):
        fastattn.functional.scaled_dot_product_attention(Q, Q, Q, corner("lower_right", 3, 5))


@WAYS
def test_a_causal_bias_in_compiled_code(way):
    function, _ = compiled(lambda q, k, bias: F.scaled_dot_product_attention(q, k, k, bias))
    k = rand(2, H, 9, 16)
    for name in ("upper_left", "lower_right"):
        bias = corner(name, 5, 9)
        expected = F.scaled_dot_product_attention(Q, k, k, bias._materialize(DEVICE))
        with way():
            torch.testing.assert_close(function(Q, k, bias), expected)


@WAYS
def test_numpys_names_of_arguments(way):
    expected = [torch.softmax(X, 1), X.log_softmax(0)]
    with way():
        assert torch.equal(torch.softmax(X, axis=1), expected[0])
        assert torch.equal(torch.softmax(x=X, dim=1), expected[0])
        assert torch.equal(X.log_softmax(axis=0), expected[1])
        for wrong in (
            lambda: torch.softmax(X),
            lambda: torch.softmax(X, 1, dim=1),
            lambda: X.softmax("a", 1.0),
        ):
            with pytest.raises(TypeError, match="softmax"):
                wrong()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_are_made_of_torchs_functions():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.Sequential(nn.LayerNorm(E), nn.RMSNorm(E), nn.Softmax(-1), nn.LogSoftmax(-1))
            self.attention, self.layer = ATTENTION, LAYER

        def forward(self, x):
            y = self.attention(self.norms(x), x, x)[0]
            y = torch.softmax(y, 1) + y.softmax(0) + F.scaled_dot_product_attention(y, y, y)
            return self.layer(y)

    model = Scripted().to(DEVICE)
    with enabled():
        script = torch.jit.script(model)
        ran = counted(lambda: torch.testing.assert_close(script(X), model(X)))
        assert ran  # of the model; a script is counted nowhere
        assert not counted(lambda: script(X))


def test_signatures_are_torchs():
    places = [(owner, name) for owner, name in reroute.PLACES if inspect.isfunction(getattr(owner, name))]
    expected = [inspect.signature(getattr(*place)) for place in places]
    with enabled():
        assert [inspect.signature(getattr(*place)) for place in places] == expected
    assert len(places) == 5
    for name in ("LayerNorm", "RMSNorm", "Softmax", "LogSoftmax", "MultiheadAttention", "TransformerEncoderLayer",
                 "TransformerDecoderLayer", "Transformer"):  # fmt: skip
        assert inspect.signature(getattr(fastattn.nn, name)) == inspect.signature(getattr(nn, name)), name


def test_what_is_no_tensor_gets_torchs_error():
    calls = [
        lambda: F.layer_norm(None, (8,)),
        lambda: torch.softmax(None, 1),
        lambda: F.scaled_dot_product_attention(Q, None, Q),
        lambda: torch.softmax(X, True),
        lambda: F.rms_norm(X.numpy(force=True), (E,)),
    ]
    for call in calls:
        with pytest.raises(TypeError) as stock:
            call()
        with enabled(), pytest.raises(TypeError) as ours:
            call()
        assert str(ours.value) == str(stock.value)
