"""Tiny models of many families of transformers: patched, set by name, and under `accelerated`, each is what it was on eager."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from test_transformers import BERT, DECODER, PADDING, SMALL, V, assert_close, ids

import fastattn
from fastattn import backend
from fastattn.integrations import transformers as ours

IMAGE = dict(SMALL, intermediate_size=48, image_size=32, patch_size=16)
SEQ2SEQ = dict(
    vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, init_std=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)  # fmt: skip
SPEECH = dict(num_mel_bins=8, max_source_positions=16, max_target_positions=64, begin_suppress_tokens=None)
# {family: (what its classes' names end in, changes)}
FAMILIES = {
    "Arcee": ("ForCausalLM", DECODER),
    "Cohere2": ("ForCausalLM", DECODER | dict(sliding_window=5)),
    "DeepseekV3": ("ForCausalLM", DECODER | LATENT | dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1)),
    "Exaone4": ("ForCausalLM", DECODER | dict(sliding_window=5)),
    "Gemma3": ("ForCausalLM", DECODER | dict(sliding_window=5)),
    "Glm4": ("ForCausalLM", DECODER),
    "GPTNeoX": ("ForCausalLM", DECODER | dict(hidden_dropout=0.0)),
    "Granite": ("ForCausalLM", DECODER),
    "Mixtral": ("ForCausalLM", DECODER | MOE),
    "Olmo2": ("ForCausalLM", DECODER),
    "OPT": ("ForCausalLM", SMALL | dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, init_std=0.3)),
    "Phi3": ("ForCausalLM", DECODER),
    "Qwen3Moe": ("ForCausalLM", DECODER | MOE),
    "SmolLM3": ("ForCausalLM", DECODER | dict(no_rope_layers=[1, 0])),
    "StableLm": ("ForCausalLM", DECODER),
    "Starcoder2": ("ForCausalLM", DECODER | dict(residual_dropout=0.0, embedding_dropout=0.0)),
    "Albert": ("ForMaskedLM", BERT | dict(embedding_size=16)),
    "DistilBert": ("ForMaskedLM", dict(vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=48, dropout=0.0, attention_dropout=0.0, initializer_range=0.3)),
    "ModernBert": ("ForMaskedLM", SMALL | dict(intermediate_size=48, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)),
    "Bart": ("ForConditionalGeneration", SEQ2SEQ),
    "Pegasus": ("ForConditionalGeneration", SEQ2SEQ),
    "Whisper": ("ForConditionalGeneration", SEQ2SEQ | SPEECH),
    "CLIPVision": ("Model", IMAGE),
    "Dinov2": ("Model", IMAGE),
    "Siglip2Text": ("Model", SMALL | dict(intermediate_size=48)),
    "ViT": ("Model", IMAGE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
}  # fmt: skip


def built(family):
    ending, changes = FAMILIES[family]
    names = (f"{family}{ending}", f"{family}Config", f"{family}TextConfig")
    model, config, text_config = (getattr(transformers, name, None) for name in names)
    if model is None:
        pytest.skip(f"this transformers has no {family}")
    config = (text_config or config)(**changes)
    torch.manual_seed(0)
    model = model._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return model


def inputs_for(model):
    if model.main_input_name == "pixel_values":
        return dict(pixel_values=torch.randn(2, 3, 32, 32)), None
    if model.main_input_name == "input_features":
        return dict(input_features=torch.randn(2, 8, 32), decoder_input_ids=ids(length=5)), None
    inputs = dict(input_ids=ids(), attention_mask=PADDING["left"])
    if model.config.is_encoder_decoder:
        return inputs | dict(decoder_input_ids=ids(length=5)), None
    return inputs, PADDING["left"].bool()


def state_and_gradients(model, inputs, keep):
    model.zero_grad()
    out = model(**inputs)[0]
    out = out if keep is None else out[keep]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).mean().backward()
    return {"out": out} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_in_gives_what_eager_gives(family):
    eager = built(family)
    inputs, keep = inputs_for(eager)
    want = state_and_gradients(eager, inputs, keep)
    named, model = copy.deepcopy(eager), copy.deepcopy(eager)
    named.set_attn_implementation("fastattn")
    assert ours.uses_fastattn(named)
    before = backend.calls.copy()
    assert_close(state_and_gradients(named, inputs, keep), want)
    assert (backend.calls - before)["attention", "torch"]

    report = fastattn.patch(model, strict=True)
    assert report.attention == [("", "eager", "fastattn")] and not report.skipped
    assert_close(state_and_gradients(model, inputs, keep), want)
    fastattn.unpatch(model)
    after = state_and_gradients(model, inputs, keep)
    assert all(torch.equal(after[name], want[name]) for name in want)
    with fastattn.accelerated():
        assert_close(state_and_gradients(eager, inputs, keep), want)
