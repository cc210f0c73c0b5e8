"""Generation: the cache against no cache, padding, sampling, stopping, streaming, and greedy text equal to transformers'."""

import pytest
import torch
from conftest import DEVICE

import fastattn
from fastattn.models.generation import KVCache, compacted, sample
from fastattn.models.gpt import GPT, GPTConfig

TINY = dict(n_layer=2, n_head=2, n_embd=32, n_positions=48, vocab_size=64)
LAYOUTS = {
    "GPT-2": {},
    "GPT-1": dict(post_norm=True),
    "GPT-3": dict(local_window=5, n_layer=3),
    "sinusoidal": dict(positions="sinusoidal"),
}


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def stirred(model):
    """Evaluated, with weights that make the likeliest token depend on what was read: a fresh model repeats itself."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.4 if "attn" in name or "mlp" in name or "wpe" in name else 0.2) * torch.randn_like(p))
    return model.eval()


def tiny(**options):
    torch.manual_seed(0)
    return stirred(GPT(GPTConfig(**TINY | options)))


def ids(B=2, T=32, seed=0):
    return torch.randint(TINY["vocab_size"], (B, T), generator=seeded(seed))


def seeded(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


def without_cache(model, prompt, n):
    for _ in range(n):
        prompt = torch.cat([prompt, model(prompt)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    return prompt


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.no_grad()
def test_logits_are_the_same_with_and_without_the_cache(layout, backend):
    model = tiny(**LAYOUTS[layout])
    with fastattn.use_backend(backend):
        expected = model(ids(T=24))[0]
        cache = KVCache(model.config, 2, 24)
        parts = [model.hidden(ids(T=24)[:, a:b], cache) for a, b in ((0, 9), (9, 10), (10, 11), (11, 24))]
        logits = model.head(torch.cat(parts, dim=1))
    assert cache.lens.tolist() == [24, 24] and cache.used == 24
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_greedy_is_what_the_whole_sequence_gives(layout):
    model, prompt = tiny(**LAYOUTS[layout]), ids(T=5)
    expected = without_cache(model, prompt, 12)
    assert len(expected[0, 5:].unique()) > 3
    assert torch.equal(model.generate(prompt, 12, temperature=0), expected)
    assert torch.equal(model.generate(prompt, 12, top_k=1), expected)
    assert torch.equal(
        model.generate(prompt[:, :1], 3, temperature=0), without_cache(model, prompt[:, :1], 3)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@torch.no_grad()
def test_padded_prompts_go_on_as_if_alone(side, layout):
    model, tokens = tiny(**LAYOUTS[layout]), ids(B=3, T=7)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, :6] = 0
    mask = {"left": mask, "right": mask.flip(1), "scattered": mask[:, [6, 0, 1, 5, 2, 3, 4]]}[side]
    out = model.generate(tokens, 10, temperature=0, attention_mask=mask)
    assert torch.equal(out[:, :7], tokens)
    for row in range(3):
        alone = without_cache(model, tokens[row][mask[row].bool()][None], 10)
        assert torch.equal(out[row, 7:], alone[0, -10:]), row


def test_compacted():
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    moved, lens = compacted(torch.arange(12).view(3, 4), mask)
    assert lens.tolist() == [2, 4, 1]
    assert moved[0, :2].tolist() == [1, 3] and moved[1].tolist() == [4, 5, 6, 7] and moved[2, 0] == 11


def test_seeds_and_the_mode_of_the_model():
    model = tiny(dropout=0.5).train()
    drawn = [model.generate(ids(T=5), 20, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert model.training and drawn[0].shape == (2, 25)
    assert torch.equal(model.generate(ids(T=5), 6, temperature=0), model.generate(ids(T=5), 6, temperature=0))
    assert torch.equal(model.generate(ids(T=5), 0), ids(T=5))


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    drawn = sample(logits, temperature=2.0, top_k=3, generator=seeded(0))
    expected = torch.tensor([0.0, 0.5, 1.0, 1.5]).exp() * torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert (drawn.flatten().bincount(minlength=4) / 4000 - expected / expected.sum()).abs().max() < 0.03


# probabilities 0.1, 0.2, 0.3, 0.4
KEPT = [
    (dict(top_k=2), {2, 3}), (dict(top_k=9), {0, 1, 2, 3}), (dict(top_p=0.4), {3}), (dict(top_p=0.41), {2, 3}),
    (dict(top_p=1.0), {0, 1, 2, 3}), (dict(top_p=1e-9), {3}), (dict(min_p=0.6), {2, 3}), (dict(min_p=0.0), {0, 1, 2, 3}),
    (dict(min_p=1.0), {3}), (dict(top_k=3, top_p=0.7), {2, 3}), (dict(top_k=3, min_p=0.45), {1, 2, 3}),
    (dict(temperature=0.0), {3}), (dict(temperature=2.0, min_p=0.6), {1, 2, 3}),
]  # fmt: skip


@pytest.mark.parametrize("options, kept", KEPT, ids=[str(o) for o, _ in KEPT])
def test_what_sampling_leaves(options, kept):
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log().expand(400, 4)  # not in order
    drawn = sample(logits, generator=seeded(0), **options)
    order = [1, 3, 0, 2]  # likeliest first: what 3, 2, 1, 0 are above
    assert set(drawn.flatten().tolist()) == {order[3 - k] for k in kept}


@torch.no_grad()
def test_sampling_filters_are_transformers():
    pytest.importorskip("transformers")
    from transformers.generation import logits_process as hf

    logits = 3 * torch.randn(6, 50)
    for options, warper in (
        (dict(top_k=7), hf.TopKLogitsWarper(7)),
        (dict(top_p=0.8), hf.TopPLogitsWarper(0.8)),
        (dict(min_p=0.1), hf.MinPLogitsWarper(0.1)),
        (dict(temperature=0.5), hf.TemperatureLogitsWarper(0.5)),
    ):
        expected = torch.multinomial(warper(None, logits).softmax(-1), 1, generator=seeded(3))
        assert torch.equal(sample(logits, generator=seeded(3), **options), expected), options


@torch.no_grad()
def test_stopping():
    model, prompt = tiny(), ids(T=5)
    free = model.generate(prompt, 12, temperature=0)[:, 5:]
    eos = int(free[0, 3])
    first = [row.tolist().index(eos) if eos in row else 12 for row in free]
    assert first[0] <= 3 and first[1] != first[0], "the rows stop at different times"
    for options in (dict(eos_token_id=eos), dict(eos_token_id=(eos, 63)), dict(stop=[[eos]])):
        out = model.generate(prompt, 12, temperature=0, pad_token_id=60, **options)[:, 5:]
        for row, n in enumerate(first):
            assert torch.equal(out[row, : n + 1], free[row, : n + 1])
            assert (out[row, n + 1 :] == 60).all()
        assert out.shape[1] == min(max(first) + 1, 12)
    stop = free[0, 2:4].tolist()  # two tokens in a row
    assert torch.equal(
        model.generate(prompt[:1], 12, temperature=0, stop=[stop, [61, 62, 63]])[0, 5:], free[0, :4]
    )
    assert model.generate(prompt[:1], 12, temperature=0, eos_token_id=eos).shape[1] == 5 + first[0] + 1
    configured = tiny(eos_token_id=eos)
    assert configured.generate(prompt[:1], 12, temperature=0).shape[1] == 5 + first[0] + 1
    assert configured.generate(prompt[:1], 12, temperature=0, eos_token_id=()).shape[1] == 17


@torch.no_grad()
def test_a_prompt_that_ends_like_a_stop_does_not_stop():
    model = tiny()
    prompt = ids(T=5)[:1]
    stop = prompt[0, -2:].tolist()
    assert model.generate(prompt, 4, temperature=0, stop=[stop]).shape[1] >= 6


def test_streaming():
    model = tiny(dropout=0.5).train()
    expected = model.generate(ids(T=5), 8, temperature=0)[:, 5:]
    steps = model.stream(ids(T=5), 8, temperature=0)
    first = next(steps)
    assert first.shape == (2,) and torch.equal(first, expected[:, 0])
    assert torch.is_grad_enabled(), "between two tokens the caller's own mode holds"
    assert torch.equal(torch.stack([first, *steps], 1), expected) and model.training
    steps = model.stream(ids(T=5), 8, temperature=0)
    next(steps)
    steps.close()
    assert model.training


@torch.no_grad()
def test_repetition_penalty():
    model, prompt = tiny(), ids(T=5)
    penalty, sequence = 1.7, prompt
    for _ in range(10):
        logits = model(sequence)[0][:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, sequence, True)
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(prompt, 10, temperature=0, repetition_penalty=penalty), sequence)
    assert not torch.equal(model.generate(prompt, 10, temperature=0), sequence)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_cache_kept_across_turns(layout):
    """Three turns of a chat read each token once and say what they would have said on reading everything again."""
    model = tiny(**LAYOUTS[layout])
    cache = model.new_cache()
    assert cache.length == 48
    conversation = ids(B=1, T=0)
    for turn, n in enumerate((6, 1, 4)):
        said = ids(B=1, T=n, seed=turn)
        conversation = torch.cat([conversation, said], 1)
        if turn == 1:  # something is said in two parts, the first of which is not answered
            conversation = torch.cat([conversation, said], 1)
            assert torch.equal(model.generate(said, 0, cache=cache), said)
        expected = without_cache(model, conversation, 5)
        reply = model.generate(said, 5, temperature=0, repetition_penalty=1.0, cache=cache)
        assert torch.equal(reply, torch.cat([said, expected[:, -5:]], 1)), turn
        conversation = expected
        assert cache.used == cache.lens.item() == conversation.shape[1] - 1


@torch.no_grad()
def test_turns_of_several_sequences_that_stop_by_themselves():
    model = tiny()
    first, second = ids(B=2, T=5), ids(B=2, T=4, seed=1)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache, options = KVCache(model.config, 2, 48), dict(temperature=0, repetition_penalty=1.3)
    free = model.generate(first, 8, **options)[:, 5:].tolist()
    options["eos_token_id"] = next(token for token in free[0] if token not in free[1])
    replies = [model.generate(first, 8, cache=cache, **options)[:, 5:]]
    replies.append(model.generate(second, 8, cache=cache, attention_mask=mask, **options)[:, 4:])
    assert (replies[0] == options["eos_token_id"]).any(1).tolist() == [True, False]
    for row in range(2):
        conversation = ids(B=1, T=0)
        for said, reply in ((first[row], replies[0][row]), (second[row][mask[row].bool()], replies[1][row])):
            conversation = torch.cat([conversation, said[None]], 1)
            whole = model.generate(conversation, 8, **options)[:, conversation.shape[1] :]
            assert torch.equal(whole[0], reply[: whole.shape[1]]), row
            conversation = torch.cat([conversation, whole], 1)


@torch.no_grad()
def test_autocast_and_low_precision():
    model = tiny()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert model.generate(ids(T=5), 6, temperature=0).shape == (2, 11)
        cache = model.new_cache(2, 20)
        assert cache.kv.dtype == torch.bfloat16
        model.generate(ids(T=5), 6, cache=cache)
    assert tiny().bfloat16().generate(ids(T=5), 6).shape == (2, 11)


def test_what_cannot_be_generated():
    model, cache = tiny(), KVCache(GPTConfig(**TINY), 2, 10)
    prompt = ids(T=5)
    for call, message in (
        (lambda: model.generate(prompt, 44), r"5 \+ 44 tokens, but n_positions is 48"),
        (
            lambda: model.generate(prompt, 7, cache=cache),
            r"0 cached \+ 5 \+ 7 tokens, but the cache holds 10",
        ),
        (lambda: model.generate(prompt[:, :0], 4), r"input_ids is \(2, 0\)"),
        (lambda: model.generate(prompt, 4, attention_mask=torch.ones(2, 4)), r"attention_mask is \(2, 4\)"),
        (
            lambda: model.generate(prompt, 4, attention_mask=torch.eye(2, 5)[[1, 1]] * 0),
            "a row without a token",
        ),
        (lambda: model.generate(prompt, 4, stop=[[]]), "none of them empty"),
        (lambda: model.generate(prompt, 4, temperature=-1.0), "temperature is -1.0"),
        (lambda: model.generate(prompt, 4, top_k=0), "top_k is 0"),
        (lambda: model.generate(prompt, 4, top_p=0.0), "top_p is 0.0"),
        (lambda: model.generate(prompt, 4, min_p=2), "min_p is 2"),
        (lambda: model.hidden(ids(T=11), cache), "11 tokens after 0, but it holds 10"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="cuda_graph needs a model on a GPU"):
            model.generate(prompt, 4, cuda_graph=True)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_decodes_the_same():
    model, prompt = tiny(), ids(T=5)
    expected = model.generate(prompt, 20, temperature=0)
    assert torch.equal(model.generate(prompt, 20, temperature=0, cuda_graph=True), expected)
    eos = int(expected[0, 8])
    options = dict(temperature=0, eos_token_id=eos)
    expected = model.generate(prompt, 20, **options)
    assert torch.equal(model.generate(prompt, 20, cuda_graph=True, **options), expected)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_greedy_is_transformers(padded):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = TINY | dict(n_layer=3, n_head=4)
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    theirs = stirred(transformers.GPT2LMHeadModel(config))
    ours, prompt = GPT.from_pretrained(theirs), ids(B=3, T=8)
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [7]])).long() if padded else torch.ones(3, 8).long()
    free = ours.generate(prompt, 20, temperature=0, attention_mask=mask, eos_token_id=())
    eos = int(free[0, 16])
    options = dict(attention_mask=mask, max_new_tokens=20, pad_token_id=2, eos_token_id=eos)
    for penalty in (1.0, 1.5):
        expected = theirs.generate(prompt, do_sample=False, repetition_penalty=penalty, **options)
        if penalty == 1.0 or not padded:  # theirs also punishes what padding happens to be
            assert torch.equal(
                ours.generate(prompt, temperature=0, repetition_penalty=penalty, **options), expected
            )
