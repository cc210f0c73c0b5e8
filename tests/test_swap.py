"""fastattn.patch and unpatch: what a swap keeps, what it leaves alone and why, what its report says, and how it is undone."""

import copy
import io
import pathlib
import pickle
import re
import sys
import types
import warnings

import pytest
import torch
from conftest import DEVICE
from module_runs import outputs_and_gradients
from torch import nn
from torch.nn.utils import parametrize

import fastattn
from fastattn import backend, swap

E, H = 32, 2


# Not `with torch.device(...)`: that is a torch function mode, and any of those turns torch's inference path off.
def rand(*shape):
    return torch.randn(shape, device=DEVICE)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).to(DEVICE)


class Net(nn.Module):
    """One module of every kind that patch knows, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder()
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=True), 1
        )
        self.norm = nn.LayerNorm(E, eps=1e-3)
        self.same_norm = self.norm
        self.wide_norm = nn.LayerNorm((5, E), bias=False)
        self.rms = nn.RMSNorm(E)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.softmax, self.log_softmax = nn.Softmax(1), nn.LogSoftmax(-1)

    def forward(self, x):
        x = self.decoder(self.norm(x), self.encoder(x))
        x = self.wide_norm(self.rms(self.same_norm(x)))
        y, weights = self.attention(x, x, x)
        return self.log_softmax(self.softmax(y) + y), weights


def net():
    model = Net().to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def counted(run):
    """Which functions ran on which backend."""
    before = backend.calls.copy()
    run()
    return backend.calls - before


def test_every_known_module_is_swapped_and_computes_the_same():
    model, x = net().double(), rand(3, 5, E)
    stock = copy.deepcopy(model)
    report = fastattn.patch(model, strict=True)
    assert {(before, after) for _, before, after in report.swapped} == set(swap.TARGETS.items())
    assert not report.skipped
    torch.testing.assert_close(
        outputs_and_gradients(model, (x,), {}), outputs_and_gradients(stock, (x,), {}), rtol=1e-9, atol=1e-12
    )
    made = counted(lambda: model(x.double()))
    assert {op for op, _ in made} == {
        "layer_norm", "rms_norm", "add_layer_norm", "attention", "softmax", "log_softmax",
    }  # fmt: skip


def test_kernels_agree_too():
    """fp32, where the kernels run: within twice the distance that torch keeps from float64, and a few roundings."""
    model, x = net(), rand(2, 5, E)
    exact = outputs_and_gradients(copy.deepcopy(model).double(), (x,), {})
    base = outputs_and_gradients(model, (x,), {})
    fastattn.patch(model)
    with fastattn.use_backend("triton"):
        ours = outputs_and_gradients(model, (x,), {})
    for o, b, e in zip(ours, base, exact, strict=True):
        ulp = torch.finfo(torch.float32).eps * e.abs().max()
        assert (o - e).abs().max() <= 2 * (b - e).abs().max() + 4 * ulp


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_patched_and_can_be_unpatched(copied):
    model, x = net(), rand(3, 5, E)
    with torch.no_grad():
        y = model(x)[0]
        types = [type(m) for m in model.modules()]
        before = {name: dict(m.__dict__) for name, m in model.named_modules()}
        fastattn.patch(model, out_dtype="input")
        patched = model(x)[0]
        other = copied(model)
        assert torch.equal(other(x)[0], patched)
        assert isinstance(other.norm, fastattn.nn.LayerNorm) and other.norm is other.same_norm
        report = fastattn.unpatch(other)
        assert [type(m) for m in other.modules()] == types
        assert torch.equal(other(x)[0], y)
        assert len(report.swapped) == len([t for t in types if t in swap.TARGETS])
    if other is model:
        for name, m in model.named_modules():
            assert m.__dict__.keys() == before[name].keys(), "something of the patch stayed behind"
            assert m.__dict__.get("use_nested_tensor") == before[name].get("use_nested_tensor")
    else:
        assert isinstance(model.norm, fastattn.nn.LayerNorm), "unpatching a copy reached the original"


def test_what_others_hold_stays():
    """Hooks, shared modules, references, parameters, the optimizer's and the state_dict's view of them."""
    model, x = net().train(), rand(3, 5, E)
    held, parameters, keys = model.norm, list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    held.register_forward_hook(lambda *_: seen.append("forward"))
    held.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    fastattn.patch(model)
    assert model.norm is held is model.same_norm and type(held) is fastattn.nn.LayerNorm
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys and isinstance(held, nn.LayerNorm)
    model(x)[0].square().sum().backward()
    assert seen.count("forward") == 2 and "backward" in seen
    weight = held.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(held.weight, weight), "the optimizer steps other parameters"
    stock = net()
    model.load_state_dict(stock.state_dict())
    assert "load" in seen and torch.equal(held.weight, stock.norm.weight)


def test_a_hook_inside_a_layer_is_called():
    """The fused sum and norm would step over a hook on that norm; it is called, as without the patch."""
    model, seen = encoder().eval(), []
    model.layers[0].norm1.register_forward_hook(lambda *_: seen.append("hook"))
    fastattn.patch(model)
    norm = model.layers[1].norm2
    forward = norm.forward
    norm.forward = lambda x: seen.append("forward") or forward(x)  # as accelerate does
    model(rand(2, 5, E))
    assert seen == ["hook", "forward"]


def test_patching_and_unpatching_again_is_harmless():
    model = net()
    first = fastattn.patch(model)
    types = [type(m) for m in model.modules()]
    second = fastattn.patch(model, strict=True)
    assert not second.swapped and second.already == len(first.swapped)
    assert [type(m) for m in model.modules()] == types
    fastattn.unpatch(model)
    plain = fastattn.unpatch(model)
    assert not plain.swapped and not plain.attributes
    x = rand(2, 5, E)
    assert torch.equal(model(x)[0], copy.deepcopy(model)(x)[0])


def test_own_modules_are_not_unpatched():
    """A model made of fastattn's classes was never patched: there is nothing to warn of, and nothing to undo."""
    model = nn.Sequential(fastattn.nn.LayerNorm(E))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastattn.patch(model, strict=True).already == 1
    fastattn.unpatch(model)
    assert type(model[0]) is fastattn.nn.LayerNorm


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Alike(nn.Module):
    """As nanoGPT has it: a norm of its own, which is no torch.nn.LayerNorm."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class AlikeLayerNorm(Alike):
    pass


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def fast_alike(self, x):
    return fastattn.functional.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class FastAlike(AlikeLayerNorm):
    forward = fast_alike


def parametrised():
    module = nn.LayerNorm(E)
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def quantised():
    return torch.ao.nn.quantized.LayerNorm(E, None, None, 1.0, 0)


def scripted():
    return torch.jit.script(nn.LayerNorm(E))


def hooked():
    """As accelerate and Liger do: a forward of its own on the instance."""
    module = nn.LayerNorm(E)
    forward = module.forward
    module.forward = lambda *args: forward(*args)
    return module


NEAR_MISSES = {
    "a subclass": (lambda: Scaled(E), "a subclass of LayerNorm"),
    "parametrised": (parametrised, "parametrised"),
    "quantised": (quantised, "quantised"),
    "scripted": (scripted, "scripted"),
    "forward on the instance": (hooked, "forward was replaced on the instance"),
    "a class of that name": (lambda: AlikeLayerNorm(E), "extra={AlikeLayerNorm: fastattn.rerouted}"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of scripting and quantising
@pytest.mark.parametrize("make, reason", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_a_near_miss_is_left_and_listed(make, reason):
    near = make()
    model = nn.ModuleDict(dict(near=near, norm=nn.LayerNorm(E)))
    kind = type(near)
    report = fastattn.patch(model)
    assert type(model["near"]) is kind
    assert [(name, cls) for name, cls, _ in report.skipped] == [("near", kind)]
    assert reason in report.skipped[0][2] and reason in " ".join(str(report).split())
    assert [name for name, *_ in report.swapped] == ["norm"]
    alone = nn.Sequential(make())
    with pytest.warns(UserWarning, match="nothing in this Sequential could be swapped"):
        fastattn.patch(alone)
    with pytest.raises(RuntimeError, match="nothing in this Sequential"):
        fastattn.patch(alone, strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao")
@pytest.mark.parametrize("first", ["quantised", "patched"])
def test_linears_of_dynamic_quantisation_are_called(first):
    """They sit inside layers of torch's own classes, which are swapped around them."""
    layer, x = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, E)

    def quantised(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).train()

    with torch.no_grad():
        stock = quantised(nn.Sequential(layer))
        y = stock(x)  # in training mode: torch's inference path cannot read these weights
        model = nn.Sequential(copy.deepcopy(layer))
        if first == "patched":
            fastattn.patch(model)
        model = quantised(model)
        if first == "quantised":
            fastattn.patch(model)
        assert type(model[0]) is fastattn.nn.TransformerEncoderLayer
        assert type(model[0].linear1) is torch.ao.nn.quantized.dynamic.Linear
        torch.testing.assert_close(model(x), y)
        fastattn.unpatch(model)
        assert torch.equal(model(x), y)


def test_a_sharded_leaf_is_left_and_listed(tmp_path):
    """fully_shard gives the module it wraps a class of its own; what lies inside it keeps its class, and can be swapped."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meet")
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.LayerNorm(E), nn.Sequential(nn.LayerNorm(E)))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model[1], mesh=mesh)
        report = fastattn.patch(model)
        assert [(name, "fully_shard" in reason) for name, _, reason in report.skipped] == [("0", True)]
        assert isinstance(model[0], FSDPModule) and type(model[1][0]) is fastattn.nn.LayerNorm

        model = nn.Sequential(nn.LayerNorm(E))
        fastattn.patch(model)
        fully_shard(model[0], mesh=mesh)  # the right order
        x = torch.randn(2, E)
        torch.testing.assert_close(model(x), nn.functional.layer_norm(x, (E,)))
        with pytest.warns(UserWarning, match="changed again after the patch"):
            fastattn.unpatch(model)
        assert isinstance(model[0], FSDPModule)
    finally:
        dist.destroy_process_group()


def test_a_forward_replaced_after_the_patch_keeps_it():
    """As accelerate's hooks do: they hold the forward they found, which must stay its module's."""
    model, x = nn.Sequential(nn.LayerNorm(E), nn.LayerNorm(E)).to(DEVICE), rand(2, E)
    y = model(x)
    fastattn.patch(model)
    forward = model[0].forward
    model[0].forward = lambda *args: forward(*args)
    with pytest.warns(UserWarning, match="undo that first"):
        report = fastattn.unpatch(model)
    assert [name for name, *_ in report.skipped] == ["0"] and [name for name, *_ in report.swapped] == ["1"]
    torch.testing.assert_close(model(x), y)
    model[0].forward = forward  # as accelerate puts it back
    fastattn.unpatch(model)
    assert torch.equal(model(x), y) and not counted(lambda: model(x))


@pytest.mark.parametrize("wanted", [FastAlike, fast_alike, fastattn.rerouted])
def test_extra_takes_a_subclass_or_a_forward(wanted):
    model, x = nn.Sequential(AlikeLayerNorm(E), nn.Linear(E, E)).to(DEVICE), rand(3, E)
    y = model(x)
    report = fastattn.patch(model, strict=True, extra={AlikeLayerNorm: wanted})
    assert [(name, before) for name, before, _ in report.swapped] == [("0", AlikeLayerNorm)]
    assert isinstance(model[0], AlikeLayerNorm)
    assert counted(lambda: model(x)) == {("layer_norm", "torch"): 1}
    for other in (copy.deepcopy(model), through_pickle(model), model):
        torch.testing.assert_close(other(x), y)
        assert type(other[0]) is type(model[0])
        fastattn.unpatch(other)
        assert type(other[0]) is AlikeLayerNorm and torch.equal(other(x), y)


def library_class(dotted, base=nn.Module, **members):
    """As a library would define it; patch knows these classes by their names alone."""
    module, _, name = dotted.rpartition(".")
    return type(name, (base,), members | {"__module__": module})


def vit_attention(self, x):
    q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, E // H).permute(2, 0, 3, 1, 4)
    return nn.functional.scaled_dot_product_attention(self.q_norm(q), k, v).transpose(1, 2).flatten(2)


def processed(self, x):
    return self.processor(self, x)


class Processor:
    def __call__(self, attn, x):
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


@pytest.mark.parametrize("dotted", swap.REROUTED)
def test_classes_of_other_libraries_keep_their_forward(dotted):
    if dotted.startswith("diffusers"):
        kind = library_class(dotted, forward=processed)
        if dotted.endswith("Mixin"):
            kind = library_class("diffusers.models.transformers.transformer_flux.FluxAttention", kind)
        model, op = kind(), "softmax"
        model.processor = Processor()
    elif "Norm" in dotted:
        model, op = (
            library_class(dotted, nn.LayerNorm, forward=lambda self, x: nn.functional.layer_norm(x, (E,)))(E),
            "layer_norm",
        )
    else:
        model, op = library_class(dotted, forward=vit_attention)(), "attention"
        model.qkv, model.q_norm = nn.Linear(E, 3 * E), nn.Identity()
    model, x = nn.Sequential(model.to(DEVICE)), rand(2, 17, E)  # a class token: an odd length
    y = model(x)
    assert not fastattn.patch(model, strict=True).skipped
    assert counted(lambda: torch.testing.assert_close(model(x), y)) == {(op, "torch"): 1}
    assert fastattn.patch(model, strict=True).already == 1
    other = copy.deepcopy(model)
    assert counted(lambda: other(x)) == {(op, "torch"): 1}
    torch._dynamo.reset()  # Sequential.forward, once more
    with torch.no_grad(), fastattn.use_backend("triton"):
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    fastattn.unpatch(model)
    assert torch.equal(model(x), y) and not counted(lambda: model(x))


def test_extra_that_fits_nothing_is_said():
    model = nn.Sequential(nn.LayerNorm(E))
    report = fastattn.patch(model, extra={AlikeLayerNorm: FastAlike})
    assert report.skipped == [("", AlikeLayerNorm, "extra: the model has no module of exactly this class")]
    assert fastattn.patch(model, extra={nn.LayerNorm: fastattn.nn.LayerNorm}).skipped == []
    with pytest.raises(TypeError, match="must be a subclass of AlikeLayerNorm"):
        fastattn.patch(model, extra={AlikeLayerNorm: nn.LayerNorm})
    with pytest.raises(TypeError, match="must be a class or a function"):
        fastattn.patch(model, extra={AlikeLayerNorm: "fast"})


def test_what_patch_refuses():
    with pytest.raises(TypeError, match="got a str, needs a torch.nn.Module"):
        fastattn.patch("gpt2")
    with pytest.raises(ValueError, match="out_dtype is torch.float16"):
        fastattn.patch(net(), out_dtype=torch.float16)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x):
        x = self.layer(x)
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("patched", ["before", "between"])
def test_with_torch_compile(patched):
    """Patched before it is compiled, or after its first call, which compiles it again."""
    model, x, ran = Block().to(DEVICE), rand(2, 5, E), []
    y = model(x)

    def keep(graph, _):
        def run(*args):
            ran.append([str(node.target) for node in graph.graph.nodes])
            return graph(*args)

        return run

    if patched == "before":
        fastattn.patch(model)
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    if patched == "between":
        compiled(x)
        report = fastattn.patch(compiled)
        assert all(name.startswith("_orig_mod.") for name, *_ in report.swapped)
    assert type(model.layer) is fastattn.nn.TransformerEncoderLayer
    with fastattn.use_backend("triton"):  # whose launches are ops in the graph
        torch.testing.assert_close(compiled(x), y)
        assert "autograd_function_apply" in ran[-1]
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)
    fastattn.unpatch(compiled)
    torch.testing.assert_close(compiled(x), y)
    assert "autograd_function_apply" not in ran[-1]
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_inference_path_of_torchs_encoder_calls_the_kernels(norm_first, padded):
    """In eval and no_grad torch's layers compute in one native call, which steps over their children; ours do not."""
    model, x = (
        encoder(norm_first=norm_first).eval(),
        rand(2, 5, E),
    )
    padding = (torch.arange(5) >= torch.tensor([[3], [5]])).to(DEVICE) if padded else None
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        fastattn.patch(model.layers[0].self_attn)  # a child alone is stepped over
        assert not counted(lambda: model(x, src_key_padding_mask=padding))
        report = fastattn.patch(model)
        made = counted(lambda: model(x, src_key_padding_mask=padding))
        ours = model(x, src_key_padding_mask=padding)
    fused = 2 if norm_first else 4
    assert made == {("attention", "torch"): 2, ("add_layer_norm", "torch"): fused} | (
        {("layer_norm", "torch"): 2} if norm_first else {}
    )
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(ours[real], y[real])
    if padded and not norm_first:
        assert report.attributes == [("", "use_nested_tensor", True, False)]
        assert not y[padding].any() and ours[padding].any(), "docs/swap.md says so of padded rows"


def test_report_counts_the_calls_and_says_why_stock_torch_ran():
    model, x = nn.Sequential(nn.LayerNorm(E), nn.Softmax()).to(DEVICE), rand(2, E)
    report = fastattn.patch(model)
    assert report.calls() == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about the dim it guesses
        for _ in range(3):
            model(x)
    model[1].dim = -1
    with fastattn.use_backend("triton"):
        model(x)
    with fastattn.use_backend("torch"):
        model[1](x)
    assert report.calls() == [
        ("Softmax", "torch", 3, "dim=None lets torch guess the dim"),
        ("layer_norm", "torch", 3, backend.ON_A_CPU),
        ("layer_norm", "triton", 1, ""),
        ("softmax", "torch", 1, backend.FORCED),
        ("softmax", "triton", 1, ""),
    ]
    text = str(report)
    for line in ("swapped  1  LayerNorm -> fastattn.nn.LayerNorm  0", "calls    3  layer_norm on torch", "calls    1  softmax on triton"):  # fmt: skip
        assert line in " ".join(text.split("\n")) or line.split() <= text.split(), text
    assert fastattn.Report().calls() == []


def test_report_has_each_backends_reason_of_a_gpus_fallback():
    tensor, report = types.SimpleNamespace(is_cpu=False), fastattn.Report()
    why_not = {
        "cuda": lambda *_: "dtype float64 has no kernel",
        "triton": lambda *_: "head dim 300 is above 256",
    }
    for _ in range(2):
        with pytest.warns(backend.FallbackWarning):
            assert backend.choose("attention", why_not, tensor) == "torch"
    reason = "cuda: dtype float64 has no kernel; triton: head dim 300 is above 256"
    assert report.calls() == [("attention", "torch", 2, reason)]
    assert reason in " ".join(str(report).split())


def test_out_dtype_keeps_the_inputs_dtype_under_autocast(monkeypatch):
    monkeypatch.setitem(
        fastattn.ops.layer_norm.WIDENED, "layer_norm", frozenset({"cpu", "cuda"})
    )  # as a GPU's autocast does
    model = nn.Sequential(nn.Linear(E, E), nn.LayerNorm(E)).to(DEVICE)
    x = rand(2, E)
    for out_dtype, dtype in ((None, torch.float32), ("input", torch.bfloat16)):
        fastattn.patch(model, out_dtype=out_dtype)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert model(x).dtype == dtype
    fastattn.unpatch(model)
    assert "out_dtype" not in model[1].__dict__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_torch(dtype):
    model, x = net().train(), rand(2, 5, E)
    seen = [[], []]
    for run in (0, 1):
        hooks = [
            m.register_forward_hook(
                lambda _, args, out, name=name, run=run: seen[run].append(
                    (name, [t.dtype for t in (out if isinstance(out, tuple) else (out,))])
                )
            )
            for name, m in model.named_children()
        ]
        with torch.autocast(DEVICE, dtype):
            y, weights = model(x)
        seen[run].append(("all", [y.dtype, weights.dtype]))
        for hook in hooks:
            hook.remove()
        fastattn.patch(model)
    assert seen[0] == seen[1] and len(seen[0]) > 6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_sample_that_is_all_padding():
    model, x = encoder().eval(), rand(2, 5, E)
    padding = torch.tensor([[False] * 5, [True] * 5]).to(DEVICE)
    fastattn.patch(model)
    with torch.no_grad():
        assert model(x, src_key_padding_mask=padding).isfinite().all()
    model(x, src_key_padding_mask=padding).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_transformers_that_is_too_old_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", None)
    monkeypatch.setitem(
        sys.modules, "fastattn.integrations.transformers", None
    )  # it raises ImportError there
    with pytest.warns(UserWarning, match="models of this transformers are not swapped"):
        assert fastattn.patch(nn.Sequential(nn.LayerNorm(E))).swapped


def test_what_the_docs_show_runs():
    text = (pathlib.Path(__file__).parents[1] / "docs/swap.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "docs/swap.md", "exec"), {"__name__": __name__})
