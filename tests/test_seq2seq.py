"""Encoder and decoder: attention over another sequence, its masks, torch's containers around our layers, and a model that learns."""

import importlib.util
import pathlib

import pytest
import torch
from conftest import DEVICE
from module_runs import outputs_and_gradients

import fastattn
from fastattn import backend, check, functional, nn, reference

N, L, S, E, H = 3, 7, 11, 24, 4
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def pair(name, *args, **options):
    made = []
    for module in (nn, torch.nn):
        torch.manual_seed(0)
        made.append(getattr(module, name)(*args, **options))
    return made


def causal(size=L):
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def past(lens, size):
    """(N, size) bool, True where there is padding."""
    return torch.arange(size) >= torch.tensor(lens)[:, None]


MASKS = {
    "none": dict(),
    "causal": dict(tgt_mask=causal()),
    "causal, with the hint": dict(tgt_mask=causal(), tgt_is_causal=True),
    "rectangular": dict(memory_mask=torch.rand(L, S, generator=torch.Generator().manual_seed(0)) < 0.3),
    "rectangular, float": dict(memory_mask=torch.randn(L, S, generator=torch.Generator().manual_seed(0))),
    "rectangular, each head its own": dict(memory_mask=torch.randn(N * H, L, S, generator=torch.Generator().manual_seed(0))),
    "padded": dict(tgt_key_padding_mask=past([7, 2, 5], L), memory_key_padding_mask=past([4, 11, 1], S)),
    "all": dict(
        tgt_mask=causal(), tgt_key_padding_mask=past([7, 2, 5], L), memory_key_padding_mask=past([4, 11, 1], S),
        memory_mask=causal(S)[:L],
    ),
}  # fmt: skip
MASKS = {
    name: {k: v.to(DEVICE) if k.endswith("mask") else v for k, v in m.items()} for name, m in MASKS.items()
}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_decoder_layer(masks, batch_first, norm_first):
    options = dict(dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    ours, stock = pair("TransformerDecoderLayer", E, H, 16, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    tgt, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    args = (tgt, memory) if batch_first else (tgt.transpose(0, 1), memory.transpose(0, 1))
    before = backend.calls.copy()
    got = outputs_and_gradients(ours, args, MASKS[masks])
    ran = {op: n for (op, _), n in (backend.calls - before).items()}
    assert ran == {"attention": 2} | (
        {"add_layer_norm": 2, "layer_norm": 1} if norm_first else {"add_layer_norm": 3}
    )
    torch.testing.assert_close(got, outputs_and_gradients(stock, args, MASKS[masks]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", ["rectangular", "all"])
def test_decoder_layer_through_triton(masks):
    """Every value and gradient within twice stock torch's own error."""
    ours, stock = pair("TransformerDecoderLayer", E, H, 16, dropout=0.0, batch_first=True)
    args = torch.randn(N, L, E), torch.randn(N, S, E)
    with fastattn.use_backend("triton"):
        got = outputs_and_gradients(ours, args, MASKS[masks])
    runs = (
        got,
        outputs_and_gradients(stock, args, MASKS[masks]),
        outputs_and_gradients(stock.double(), args, MASKS[masks]),
    )
    wrong = [check.compare(f"tensor {i}", *tensors) for i, tensors in enumerate(zip(*runs, strict=True))]
    assert not [w for w in wrong if w]


def test_decoder_layer_dropout_and_replaced_norms():
    layer = nn.TransformerDecoderLayer(E, H, 16, dropout=0.5, batch_first=True)
    tgt, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    assert not torch.equal(layer(tgt, memory), layer(tgt, memory))
    layer.eval()
    assert torch.equal(layer(tgt, memory), layer(tgt, memory))
    ours, stock = pair("TransformerDecoderLayer", E, H, 16, dropout=0.0, batch_first=True)
    for module in (ours, stock):
        module.norm2 = torch.nn.Identity()
        module.norm3.register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(ours(tgt, memory), stock(tgt, memory))


def test_decoder_layer_leaves_nested_tensors_to_torch():
    layer = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True).eval()
    tgt = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    before = backend.calls["TransformerDecoderLayer", "torch"]
    with pytest.raises((RuntimeError, AssertionError)):  # torch's layer takes none: its error, not ours
        layer(tgt, tgt)
    assert backend.calls["TransformerDecoderLayer", "torch"] == before + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first, training):
    """torch's container and weights; a padded batch takes no nested tensor and no inference kernel of torch."""
    ours, stock = (
        m.train(training) for m in pair("Transformer", E, H, 2, 2, 16, dropout=0.0, batch_first=batch_first)
    )
    assert isinstance(ours, torch.nn.Transformer) and ours.state_dict().keys() == stock.state_dict().keys()
    src, tgt = torch.randn(N, S, E), torch.randn(N, L, E)
    args = (src, tgt) if batch_first else (src.transpose(0, 1), tgt.transpose(0, 1))
    padding = past([4, 11, 1], S)
    masks = dict(
        tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(L),
        src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True,
    )  # fmt: skip
    before = backend.calls.copy()
    y = outputs_and_gradients(ours, args, masks)
    ran = {op: n for (op, _), n in (backend.calls - before).items()}
    assert ran == {"attention": 6, "add_layer_norm": 10, "layer_norm": 2}
    torch.testing.assert_close(y, outputs_and_gradients(stock, args, masks), rtol=1e-4, atol=2e-5)
    if not training:
        before = backend.calls.copy()
        # torch.device as a context is a torch function, under which the encoder would not make nested tensors anyway
        with torch.no_grad(), torch._C.DisableTorchFunction():
            torch.testing.assert_close(ours(*args, **masks), y[0])
        assert (backend.calls - before)["attention", "torch"] == 6


def test_transformer_keeps_custom_parts():
    encoder = torch.nn.Identity()
    model = nn.Transformer(E, H, 1, 1, 16, custom_encoder=encoder)
    assert model.encoder is encoder and type(model.decoder.layers[0]) is nn.TransformerDecoderLayer
    assert type(model.decoder.norm) is nn.LayerNorm


def test_torchs_decoder_of_our_layers():
    ours, stock = pair("TransformerDecoderLayer", E, H, 16, dropout=0.0, batch_first=True)
    stacks = [torch.nn.TransformerDecoder(layer, 2) for layer in (ours, stock)]
    tgt, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    torch.testing.assert_close(*(stack(tgt, memory, tgt_mask=causal()) for stack in stacks))


@pytest.mark.parametrize("mask", ["(B, H, S_q, S_k)", "(B, 1, 1, S_k)", "lengths", "nothing for one query"])
@pytest.mark.parametrize("S_q, S_k", [(33, 100), (100, 33), (1, 70)])
def test_attention_over_another_sequence(S_q, S_k, mask):
    """Rectangular masks through Triton; more than two tiles on either side."""
    q = torch.randn(2, 2, S_q, 16).requires_grad_()
    k, v = (torch.randn(2, 2, S_k, 16).requires_grad_() for _ in range(2))
    if mask == "lengths":
        options = dict(q_lens=torch.tensor([S_q, S_q // 2]), kv_lens=torch.tensor([S_k // 3, S_k]))
    else:
        shape = {"(B, 1, 1, S_k)": (2, 1, 1, S_k), "(1, 1, S_q, S_k)": (1, 1, S_q, S_k)}.get(
            mask, (2, 2, S_q, S_k)
        )
        options = dict(mask=torch.rand(shape) < 0.7)
        if mask == "nothing for one query":
            options["mask"][:, :, S_q // 2] = False

    def ours(q, k, v):
        with fastattn.use_backend("triton"):
            return functional.attention(q, k, v, **options)

    assert not check.check(ours, lambda q, k, v: reference.attention(q, k, v, **options)[0], (q, k, v))


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learns_to_write_backwards():
    """A symbol guessed is right one time in sixteen; a decoder that cannot look at the source does no better."""
    reverse = example("reverse")
    with torch.device("cpu"):
        _, (symbols, whole) = reverse.train(steps=220, report=lambda line: None)
    print(f"{symbols:.1%} of the symbols, {whole:.1%} of the sequences")
    assert symbols > 0.95 and whole > 0.7


def test_the_model_that_learns_runs_through_triton():
    reverse = example("reverse")
    model = reverse.Seq2Seq(19, width=32, layers=1)
    source, wanted = (t.to(DEVICE) for t in reverse.batch(3, torch.Generator("cpu").manual_seed(0)))
    before = backend.calls.copy()
    with fastattn.use_backend("triton"):
        logits = model(source, wanted)
    assert set(name for _, name in backend.calls - before) == {"triton"}
    torch.testing.assert_close(logits, model(source, wanted), rtol=1e-4, atol=1e-5)
    padded = torch.nn.functional.pad(source, (0, 3), value=reverse.PAD)
    torch.testing.assert_close(model(padded, wanted), model(source, wanted), rtol=1e-4, atol=1e-5)
    changed = wanted.clone()
    changed[:, 5:] = 3
    torch.testing.assert_close(model(source, changed)[:, :5], model(source, wanted)[:, :5])
