"""The drop-in modules against torch's, argument by argument, and what makes them drop-in: state_dict, pickle, isinstance."""

import copy
import io
import pickle

import pytest
import torch
from conftest import DEVICE
from module_runs import outputs_and_gradients

import fastattn
from fastattn import backend, check, nn, reference

N, L, S, E, H = 2, 5, 7, 12, 3


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def pair(name, *args, **kwargs):
    """Our module and torch's with the same parameters, moved off their initial values."""
    stock = getattr(torch.nn, name)(*args, **kwargs)
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    ours = getattr(nn, name)(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def agree(ours, stock, *args, **kwargs):
    """Outputs and every gradient in float64, where an argument taken in another sense shows and rounding does not."""
    runs = (outputs_and_gradients(copy.deepcopy(m).double(), args, kwargs) for m in (ours, stock))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


def torch_calls(name):
    return backend.calls[name, "torch"]


MODULES = {
    "LayerNorm": ((E,), {}),
    "RMSNorm": ((E,), {}),
    "Softmax": ((-1,), {}),
    "LogSoftmax": ((-1,), {}),
    "MultiheadAttention": ((E, H), dict(batch_first=True, add_bias_kv=True)),
    "TransformerEncoderLayer": ((E, H, 16), dict(dropout=0.0, batch_first=True)),
}


def call(name, module, x):
    return module(x, x, x)[0] if name == "MultiheadAttention" else module(x)


@pytest.mark.parametrize("name", MODULES)
def test_is_torchs_class_in_every_way_that_shows(name):
    args, kwargs = MODULES[name]
    torch.manual_seed(1)
    stock = getattr(torch.nn, name)(*args, **kwargs)
    torch.manual_seed(1)
    ours = getattr(nn, name)(*args, **kwargs)
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), stock.state_dict().values())), (
        "other initial values"
    )

    x = torch.randn(N, L, E)
    y = call(name, ours, x)
    torch.testing.assert_close(y, call(name, stock, x))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(ours)
        assert torch.equal(call(name, other, x), y)
    stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    "shape, options", [((E,), {}), ((L, E), dict(bias=False)), ((E,), dict(elementwise_affine=False))]
)
def test_layer_norm(shape, options):
    agree(*pair("LayerNorm", shape, eps=1e-3, **options), torch.randn(N, 3, L, E))


@pytest.mark.parametrize("options", [{}, dict(eps=1e-3), dict(elementwise_affine=False)])
def test_rms_norm(options):
    agree(*pair("RMSNorm", E, **options), torch.randn(N, L, E))


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(name, dim):
    agree(*pair(name, dim), torch.randn(N, L, E))


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_without_a_dim_is_torchs(name):
    before = torch_calls(name)
    agree(*pair(name), torch.randn(N, L, E))
    assert torch_calls(name) > before


def bool_padding(n=N, s=S):
    return (torch.arange(s) >= torch.tensor([s - 2, s])[:n, None]).to(DEVICE)


_generator = torch.Generator().manual_seed(0)  # these are drawn at import


def floats(*shape):
    return torch.randn(shape, generator=_generator).to(DEVICE)


def bools(*shape):
    """About a third to be ignored, never the first key: every query has somewhere to look."""
    return ((torch.rand(shape, generator=_generator) < 0.3) & (torch.arange(shape[-1]) > 0)).to(DEVICE)


MASKS = {
    "none": {},
    "padding": dict(key_padding_mask=bool_padding()),
    "float padding": dict(key_padding_mask=floats(N, S)),
    "mask": dict(attn_mask=bools(L, S)),
    "float mask": dict(attn_mask=floats(L, S)),
    "mask per head": dict(attn_mask=bools(N * H, L, S)),
    "float mask per head": dict(attn_mask=floats(N * H, L, S)),
    "both": dict(attn_mask=bools(L, S), key_padding_mask=bool_padding()),
    "both float": dict(attn_mask=floats(L, S), key_padding_mask=floats(N, S)),
    "both float, per head": dict(attn_mask=floats(N * H, L, S), key_padding_mask=floats(N, S)),
    "float mask, padding": dict(attn_mask=floats(L, S), key_padding_mask=bool_padding()),
    "mask, float padding": dict(attn_mask=bools(L, S), key_padding_mask=floats(N, S)),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_masks(masks, need_weights):
    ours, stock = pair("MultiheadAttention", E, H, batch_first=True)
    q, k = torch.randn(N, L, E), torch.randn(N, S, E)
    agree(ours, stock, q, k, k, need_weights=need_weights, **MASKS[masks])
    ours, stock = pair("MultiheadAttention", E, H, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    agree(ours, stock, q, k, k, need_weights=need_weights, average_attn_weights=False, **MASKS[masks])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "inputs", ["self", "key is value", "three", "query is key", "unbatched", "unbatched self"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_attention_inputs(batch_first, inputs, bias):
    ours, stock = pair("MultiheadAttention", E, H, batch_first=batch_first, bias=bias)
    lengths = dict(three=(L, S, S)).get(
        inputs, (L, L, L) if "self" in inputs or "is key" in inputs else (L, S, S)
    )
    shapes = [(N, n, E) if batch_first else (n, N, E) for n in lengths]
    shapes = [(n, E) for n in lengths] if "unbatched" in inputs else shapes
    q, k, v = (torch.randn(shape) for shape in shapes)
    args = {
        "self": (q, q, q),
        "unbatched self": (q, q, q),
        "key is value": (q, k, k),
        "query is key": (q, q, v),
    }
    args = args.get(inputs, (q, k, v))
    before = backend.calls.copy()
    for average, need_weights in ((True, True), (False, True), (True, False)):
        agree(ours, stock, *args, need_weights=need_weights, average_attn_weights=average)
    assert set(backend.calls - before) == {("attention", "torch")}, "something was left to torch's forward"


@pytest.mark.parametrize("widths", [dict(kdim=8), dict(vdim=10), dict(kdim=8, vdim=10, bias=False)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_widths(widths, batch_first):
    ours, stock = pair("MultiheadAttention", E, H, batch_first=batch_first, **widths)
    q, k, v = (
        torch.randn(N, L, E),
        torch.randn(N, S, widths.get("kdim", E)),
        torch.randn(N, S, widths.get("vdim", E)),
    )
    args = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    agree(ours, stock, *args, key_padding_mask=bool_padding())


@pytest.mark.parametrize("shapes", [((0, L), (0, S)), ((N, 0), (N, S))])
def test_attention_of_nothing(shapes):
    ours, stock = pair("MultiheadAttention", E, H, batch_first=True)
    q, k = (torch.randn(*shape, E) for shape in shapes)
    agree(ours, stock, q, k, k)
    agree(ours, stock, q, k, k, need_weights=False)


@pytest.mark.parametrize("options", [dict(add_bias_kv=True), dict(add_zero_attn=True), {}])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_causal_hint(options, need_weights, padded):
    ours, stock = pair("MultiheadAttention", E, H, batch_first=True, **options)
    x = torch.randn(N, S, E)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(S)
    padding = (
        dict(key_padding_mask=bool_padding().float().masked_fill(bool_padding(), float("-inf")))
        if padded
        else {}
    )
    before = torch_calls("MultiheadAttention")
    agree(ours, stock, x, x, x, need_weights=need_weights, attn_mask=mask, is_causal=True, **padding)
    assert (torch_calls("MultiheadAttention") > before) == bool(options)


def test_attention_masks_stay_small(monkeypatch):
    """No tensor of the size of N x H x L x S reaches attention for a mask, and q, k, v are views of one projection."""
    seen = {}
    attention = fastattn.functional.attention

    def spy(q, k, v, **options):
        seen.update(options, q=q, k=k, v=v, o=attention(q, k, v, **options))
        return seen["o"]

    monkeypatch.setattr(fastattn.functional, "attention", spy)
    module = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, S, E)
    module(x, x, x, key_padding_mask=bool_padding(), attn_mask=causal(), need_weights=False)
    assert seen["mask"].shape == (1, 1, S, S) and seen["bias"].shape == (N, 1, 1, S)
    base = {t.untyped_storage().data_ptr() for t in (seen["q"], seen["k"], seen["v"])}
    assert len(base) == 1 and seen["q"].stride() == (S * 3 * E, E // H, 3 * E, 1)
    assert seen["o"].transpose(1, 2).is_contiguous(), "the heads could not be joined without a copy"
    module(x, x, x, key_padding_mask=bool_padding(), need_weights=False)
    assert seen["mask"].shape == (N, 1, 1, S) and seen["bias"] is None
    module(x, x, x, attn_mask=causal(), need_weights=False, is_causal=True)
    assert seen["mask"] is None and seen["causal"]


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_query_with_nothing_to_attend_to_gives_zero(name):
    """torch 2.13: the same with need_weights=False; NaN with weights and in its inference kernel."""
    ours, stock = pair("MultiheadAttention", 32, 2, batch_first=True)
    x = torch.randn(N, L, 32, requires_grad=True)
    padding = torch.tensor([[True] * L, [False] * L])
    with fastattn.use_backend(name):
        y = ours(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        torch.testing.assert_close(y, stock(x, x, x, key_padding_mask=padding, need_weights=False)[0])
        y, weights = ours(x, x, x, key_padding_mask=padding)
        y.sum().backward()
    assert (
        torch.equal(y[0], ours.out_proj.bias.expand(L, 32)) and not weights[0].any() and not x.grad[0].any()
    )
    assert stock(x, x, x, key_padding_mask=padding)[0][0].isnan().all()


def test_attention_dropout():
    """Half of the weights, twice as large: right on average over many queries; off in evaluation; weights are torch's."""
    torch.manual_seed(0)
    module, stock = pair("MultiheadAttention", E, H, dropout=0.5, batch_first=True)
    x = torch.randn(1, 64, E)
    exact = stock.eval()(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(module.eval()(x, x, x, need_weights=False)[0], exact)
    module.train()
    with torch.no_grad():
        drawn = torch.stack([module(x, x, x, need_weights=False)[0] for _ in range(200)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()
    before = torch_calls("MultiheadAttention")
    _, weights = module(x, x, x)
    assert torch_calls("MultiheadAttention") == before + 1 and (weights == 0).any()


def test_what_attention_leaves_to_torch_says_why():
    module = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(N, L, E)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad(), torch._C.DisableTorchFunction():  # a default device would close torch's nested path
        assert (
            nn.MultiheadAttention(E, 2, batch_first=True)
            .to(DEVICE)
            .eval()(nested, nested, nested)[0]
            .is_nested
        )
    cases = [
        ((nested, nested, nested), {}, "nested"),
        ((x, x, x), dict(is_causal=True), "is_causal"),
        ((x[None], x, x), {}, "2-D or all 3-D"),
        ((x, x[:1], x[:1]), {}, "shapes do not fit"),
        ((x, x, x), dict(attn_mask=torch.zeros(L, L + 1)), "a mask is"),
        ((x, x, x), dict(key_padding_mask=torch.zeros(N, L, dtype=torch.int32)), "a mask is"),
    ]
    for args, kwargs, reason in cases:
        with fastattn.use_backend("triton"), pytest.raises(NotImplementedError, match=reason):
            module(*args, **kwargs)
        assert reason in fastattn.explain(module, *args, **kwargs)
        if reason != "nested":
            with pytest.raises((AssertionError, RuntimeError)):  # torch's own
                module(*args, **kwargs)


LAYER__generator = torch.Generator().manual_seed(0)  # these are drawn at import


def floats(*shape):
    return torch.randn(shape, generator=_generator).to(DEVICE)


def bools(*shape):
    """About a third to be ignored, never the first key: every query has somewhere to look."""
    return ((torch.rand(shape, generator=_generator) < 0.3) & (torch.arange(shape[-1]) > 0)).to(DEVICE)


def causal():
    return torch.ones(S, S, dtype=torch.bool, device=DEVICE).triu(1)


LAYER_MASKS = {
    "none": {},
    "causal": dict(src_mask=causal(), is_causal=True),
    "mask": dict(src_mask=causal()),
    "padding": dict(src_key_padding_mask=bool_padding()),
    "both": dict(src_mask=causal(), src_key_padding_mask=bool_padding()),
    "float": dict(src_mask=floats(N * H, S, S)),
}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", LAYER_MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layer(norm_first, masks, batch_first):
    options = dict(dropout=0.0, norm_first=norm_first, batch_first=batch_first)
    ours, stock = pair("TransformerEncoderLayer", E, H, 16, **options)
    x = torch.randn((N, S, E) if batch_first else (S, N, E))
    before = backend.calls.copy()
    agree(ours, stock, x, **LAYER_MASKS[masks])
    ran = {op for op, _ in backend.calls - before}
    assert ran == {"attention", "add_layer_norm"} | ({"layer_norm"} if norm_first else set())


@pytest.mark.parametrize(
    "options",
    [
        dict(activation="gelu"),
        dict(activation=torch.nn.functional.silu),
        dict(bias=False),
        dict(layer_norm_eps=1e-2),
    ],
)
def test_encoder_layer_options(options):
    ours, stock = pair("TransformerEncoderLayer", E, H, 16, dropout=0.0, batch_first=True, **options)
    agree(ours, stock, torch.randn(N, S, E))
    agree(ours, stock, torch.randn(S, E))


def test_encoder_layer_does_not_take_torchs_inference_kernel():
    ours, stock = pair("TransformerEncoderLayer", E, 2, 16, batch_first=True)
    ours.eval(), stock.eval()
    x, padding = torch.randn(N, S, E), bool_padding()
    before = backend.calls["attention", "torch"]
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=padding), stock(x, src_key_padding_mask=padding)
        )
    assert backend.calls["attention", "torch"] == before + 1


def test_encoder_of_our_layers():
    """torch's container, padding and all; its nested tensors are served by torch's own kernel."""
    ours, stock = pair("TransformerEncoderLayer", E, 2, 16, batch_first=True)
    x, padding = torch.randn(N, S, E), bool_padding()
    keep = ~padding[..., None]
    for nested in (True, False):
        encoders = [
            torch.nn.TransformerEncoder(m, 2, enable_nested_tensor=nested).eval() for m in (ours, stock)
        ]
        before = torch_calls("TransformerEncoderLayer")
        with torch.no_grad(), torch._C.DisableTorchFunction():  # as above
            y, expected = (e(x, src_key_padding_mask=padding) for e in encoders)
        torch.testing.assert_close(y * keep, expected * keep)
        assert torch_calls("TransformerEncoderLayer") - before == (2 if nested else 0)


def test_encoder_layer_calls_replaced_and_hooked_norms():
    ours, stock = pair("TransformerEncoderLayer", E, H, 16, dropout=0.0, batch_first=True)
    x = torch.randn(N, S, E)
    for module in (ours, stock):
        module.norm1 = torch.nn.Identity()
        module.norm2.register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(ours(x), stock(x))


def test_encoder_layer_dropout_is_off_in_evaluation_only():
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.5, batch_first=True)
    x = torch.randn(N, S, E)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("name", MODULES)
def test_compiles_to_one_graph(name):
    args, kwargs = MODULES[name]
    module = getattr(nn, name)(*args, **kwargs)
    x = torch.randn(N, L, E)
    compiled = torch.compile(lambda x: call(name, module, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(name, module, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_transforms(name):
    """What walks over stock torch modules walks over ours: meta tensors, export, trace, vmap, grad."""
    args, kwargs = MODULES[name]
    module = getattr(nn, name)(*args, **kwargs).eval()
    x = torch.randn(N, L, E)
    y = call(name, module, x)
    assert call(name, copy.deepcopy(module).to("meta"), x.to("meta")).shape == y.shape
    inputs = (x, x, x) if name == "MultiheadAttention" else (x,)
    for other in (
        torch.export.export(module, inputs).module(),
        torch.jit.trace(module, inputs, check_trace=False),
    ):
        torch.testing.assert_close(call(name, other, x), y)
    torch.testing.assert_close(torch.vmap(lambda x: call(name, module, x))(x[None])[0], y)
    gradient = torch.func.grad(lambda x: call(name, module, x).square().sum())(x)
    x.requires_grad_()
    call(name, module, x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_autocast_gives_torchs_dtypes(name):
    ours, stock = pair(name, E, H, batch_first=True)
    x = torch.randn(N, L, E)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = [m.eval()(*([x] * 3 if name == "MultiheadAttention" else [x])) for m in (ours, stock)]
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_through_triton(name):
    """Masked, forward and backward: every tensor within 2 x torch's own error against float64."""
    args, (n, kwargs) = (32, 2), (3, dict(key_padding_mask=bool_padding(), need_weights=False))
    if name == "TransformerEncoderLayer":
        args, (n, kwargs) = (32, 2, 24, 0.0), (1, dict(src_key_padding_mask=bool_padding()))
    for dtype in (torch.float16, torch.bfloat16):
        ours, stock = pair(name, *args, batch_first=True, dtype=dtype)
        x = torch.randn(N, S, 32, dtype=dtype)
        with fastattn.use_backend("triton"):
            got = outputs_and_gradients(ours, (x,) * n, kwargs)
        base, exact = (
            outputs_and_gradients(m, (x,) * n, kwargs) for m in (stock, copy.deepcopy(stock).double())
        )
        rows = enumerate(zip(got, base, exact, strict=True))
        assert not [s for i, row in rows if (s := check.compare(f"{dtype} {i}", *row))]


def test_sinusoidal_positions():
    module = nn.SinusoidalPositionalEncoding(E, scale=E**0.5)
    x = torch.randn(N, L, E)
    expected = E**0.5 * x.double() + reference.sinusoidal(torch.arange(L) + 3, E)
    torch.testing.assert_close(module(x, offset=3), expected.float())
    ids = torch.randint(0, 50, (N, L))
    torch.testing.assert_close(module(x, ids), (E**0.5 * x.double() + reference.sinusoidal(ids, E)).float())
    assert not module.state_dict()
    with pytest.raises(ValueError, match=r"must be \(..., S, 12\)"):
        module(x[..., :-1])


def test_learned_positions():
    module = nn.LearnedPositionalEncoding(10, E)
    x = torch.randn(N, L, E)
    y = module(x, offset=2)
    torch.testing.assert_close(y, x + module.weight[2 : 2 + L])
    y.sum().backward()
    assert torch.equal(module.weight.grad[:, 0], torch.tensor([0.0] * 2 + [float(N)] * L + [0.0] * 3))
    assert list(module.state_dict()) == ["weight"] and module.weight.std() < 0.04
    module = nn.LearnedPositionalEncoding(10, E, dropout=0.5)
    assert (module(x) == 0).any() and not (module.eval()(x) == 0).any()


def test_embeddings():
    module = nn.Embeddings(20, E, 10, 2, padding_idx=0)
    names = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    assert list(module.state_dict()) == [f"{n}.weight" for n in names] + [
        "LayerNorm.weight",
        "LayerNorm.bias",
    ]
    assert not module.word_embeddings.weight[0].any()
    ids, types = torch.randint(0, 20, (N, L)), torch.randint(0, 2, (N, L))
    parts = [getattr(module, n).weight for n in names]
    expected = parts[0][ids] + parts[2][types] + parts[1][:L]
    expected = torch.nn.functional.layer_norm(expected, (E,), eps=1e-12)
    torch.testing.assert_close(module(ids, types), expected)
    assert module(ids).shape == (N, L, E)
    module(ids).square().sum().backward()
    assert not module.word_embeddings.weight.grad[0].any()

    plain = nn.Embeddings(20, E, norm=False, dropout=0.5)
    assert list(plain.state_dict()) == ["word_embeddings.weight"]
    assert (plain(ids) == 0).any()
    torch.testing.assert_close(plain.eval()(ids), plain.word_embeddings(ids))
    with pytest.raises(ValueError, match="set num_types"):
        plain(ids, types)
    with pytest.raises(ValueError, match="set num_positions"):
        plain(ids, position_ids=ids)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["LayerNorm", "Softmax", "MultiheadAttention", "TransformerEncoderLayer", "Embeddings"]
)
def test_scripting_is_refused_with_a_way_out(name):
    args = {
        "Softmax": (-1,),
        "MultiheadAttention": (8, 2),
        "TransformerEncoderLayer": (8, 2),
        "Embeddings": (8, 8),
    }
    module = getattr(nn, name)(*args.get(name, (8,)))
    for model in (module, torch.nn.Sequential(module)):
        with pytest.raises(NotImplementedError, match=f"cannot compile fastattn's {name}.*trace"):
            torch.jit.script(model)


def test_fx_keeps_modules_as_it_keeps_torchs():
    class Model(torch.nn.Module):
        def __init__(self, nn):
            super().__init__()
            self.norms = torch.nn.Sequential(
                nn.LayerNorm(8), nn.RMSNorm(8), nn.Softmax(-1), nn.LogSoftmax(-1)
            )
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x, mask):
            y = self.attention(self.norms(x), x, x, need_weights=False, attn_mask=mask)[0]
            y = torch.nn.functional.softmax(self.encoder(y, mask), -1)
            z = nn.functional.scaled_dot_product_attention(y, x, x, mask, scale=0.5)
            return self.decoder(z, memory=x, tgt_mask=mask)

    stock, ours = Model(torch.nn).to(DEVICE), Model(nn).to(DEVICE)
    ours.load_state_dict(stock.state_dict())
    graphs = [torch.fx.symbolic_trace(model) for model in (stock, ours)]
    names = [[(node.op, str(node.target)) for node in g.graph.nodes] for g in graphs]
    assert names[0] == names[1] and ("call_module", "decoder") in names[1]
    x = torch.randn(2, 5, 8, device=DEVICE)
    mask = torch.zeros(5, 5, device=DEVICE).masked_fill(torch.ones(5, 5, device=DEVICE).triu(1).bool(), -1.0)
    torch.testing.assert_close(graphs[1](x, mask), ours(x, mask))
    torch.testing.assert_close(graphs[1](x, mask), stock(x, mask))
    with pytest.raises(NotImplementedError, match="trace a model that holds it"):
        torch.fx.symbolic_trace(ours.decoder)
