"""The reference GPT: parameters, padding, packing, other people's checkpoints, and thirty steps of training through Triton."""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import DEVICE

import fastattn
from fastattn import backend, check
from fastattn.models import training
from fastattn.models.checkpoint import CheckpointError
from fastattn.models.gpt import (
    GPT,
    SIZES,
    GPTConfig,
    GPTForSequenceClassification,
    Keys,
    config_from,
    document_bounds,
    document_positions,
)

TINY = dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64)


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def tiny(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**TINY | options))


def ids(B=2, T=32, seed=0):
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator(DEVICE).manual_seed(seed))


@pytest.mark.parametrize(
    "size, millions",
    [
        ("gpt1", 117),
        ("gpt2", 124),
        ("gpt2-medium", 355),
        ("gpt2-large", 774),
        ("gpt2-xl", 1558),
        ("gpt3-125m", 125),
        ("gpt3-1.3b", 1316),
        ("gpt3-13b", 12853),
        ("gpt3-175b", 174604),
    ],
)
def test_published_sizes(size, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES[size]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_parameters_have_the_names_and_layout_of_gpt2():
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    modules = [f"h.{i}.{name}" for i in range(2) for name in block] + ["ln_f"]
    names = ["wte.weight", "wpe.weight"] + [f"{m}.{kind}" for m in modules for kind in ("weight", "bias")]
    model = tiny()
    assert list(model.state_dict()) == names
    assert model.h[0].attn.c_attn.weight.shape == (96, 32) and model.h[0].mlp.c_fc.weight.shape == (128, 32)


def test_initial_values():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, n_positions=64, vocab_size=512))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif ".ln_" in name or name.startswith("ln_"):
            assert (p == 1).all()
        else:
            std = 0.01 if "c_proj" in name else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert abs(p.std() / std - 1) < 0.05, name


def test_head_is_the_token_table():
    model = tiny()
    logits, nothing = model(ids())
    assert logits.shape == (2, 32, 64) and nothing is None
    logits, loss = model(ids(), ids(seed=1))
    assert logits is None and loss.shape == () and loss.dtype == torch.float32
    loss.backward()
    unseen = torch.ones(64, dtype=torch.bool)
    unseen[ids()] = False
    assert model.wte.weight.grad[unseen].any(dim=1).all(), (
        "a token that is never read gets its gradient as an output"
    )
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.wte.weight.zero_()
    assert not twin(ids())[0].any()


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model, targets = tiny(), ids(seed=1)
    loss = torch.nn.functional.cross_entropy(model(ids())[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids(), targets)[1], loss)


def test_targets_of_minus_100_do_not_count():
    model, targets = tiny(), ids(seed=1)
    masked = targets.clone()
    masked[1] = -100
    torch.testing.assert_close(model(ids(), masked)[1], model(ids()[:1], targets[:1])[1])


def test_no_position_sees_a_later_one():
    model = tiny().eval()
    changed = ids()
    changed[:, 20:] = 0
    torch.testing.assert_close(model(ids())[0][:, :20], model(changed)[0][:, :20])


def right_logits(model, sequence):
    """Those of one sequence by itself."""
    return model(sequence[None])[0][0]


LAYOUTS = {
    "GPT-2": {},
    "GPT-1": dict(post_norm=True),
    "GPT-3": dict(local_window=5, n_layer=3),
    "sinusoidal": dict(positions="sinusoidal"),
    "exact gelu": dict(gelu="none", n_inner=48),
    "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True, n_layer=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_do_not_see_each_other(layout):
    model = tiny(**LAYOUTS[layout]).eval()
    packed, cu = (
        ids(B=2, T=16),
        torch.tensor([0, 5, 6, 16, 31], dtype=torch.int32),
    )  # one token belongs to nobody
    logits = model(packed, cu_seqlens=cu, longest=15)[0].flatten(0, 1)
    torch.testing.assert_close(model(packed, cu_seqlens=cu)[0].flatten(0, 1), logits)
    for begin, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        alone = right_logits(model, packed.flatten()[begin:end])
        torch.testing.assert_close(logits[begin:end], alone, atol=1e-5, rtol=1e-5)
    others = packed.clone()
    others[0, :6] = 0  # the first two documents
    changed = model(others, cu_seqlens=cu)[0].flatten(0, 1)
    assert torch.equal(changed[6:], logits[6:]) and not torch.equal(changed[:6], logits[:6])


def test_packed_gradients_are_those_of_the_documents():
    model, packed, targets = tiny(), ids(B=1, T=20), ids(B=1, T=20, seed=1)
    cu = torch.tensor([0, 8, 20], dtype=torch.int32)
    model(packed, targets, cu_seqlens=cu)[1].backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(model(packed[:, a:b], targets[:, a:b])[1] * (b - a) / 20 for a, b in ((0, 8), (8, 20))).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, atol=1e-6, rtol=1e-4)


def test_documents_of_a_batch():
    rows = torch.tensor([[1, 9, 2, 3], [9, 9, 4, 5], [6, 7, 8, 9]])
    cu = document_bounds(rows, eos_token_id=9)
    assert cu.dtype == torch.int32 and cu.tolist() == [0, 2, 4, 5, 6, 8, 12]
    assert document_positions(cu, 14).tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 2, 3, 0, 0]
    assert document_positions(torch.tensor([0, 2, 2, 3]), 3).tolist() == [0, 1, 0], "an empty document"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, layout):
    model, tokens = tiny(**LAYOUTS[layout]).eval(), ids(B=3, T=12)
    mask = torch.ones(3, 12, dtype=torch.int64)
    for row, n in enumerate((0, 4, 11)):
        mask[row, :n] = 0
    mask = mask if side == "left" else mask.flip(1)
    logits = model(tokens, attention_mask=mask)[0]
    for row in range(3):
        at = mask[row].bool()
        torch.testing.assert_close(
            logits[row][at], right_logits(model, tokens[row][at]), atol=1e-5, rtol=1e-5
        )
    assert logits.isfinite().all()


def test_a_banded_layer_sees_its_window_and_no_more():
    config = GPTConfig(**TINY | dict(n_layer=4, local_window=3))
    assert [config.window(layer) for layer in range(4)] == [None, (2, None), None, (2, None)]
    model = tiny(n_layer=2, local_window=3).eval()
    banded, x = model.h[1].attn, torch.randn(1, 10, 32)
    changed = x.clone()
    changed[:, 4] += 1.0
    differs = (banded(x, Keys()) != banded(changed, Keys())).any(-1)[0]
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_activation_checkpointing_recomputes_the_same():
    model = tiny(dropout=0.3)
    results = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        before = backend.calls["attention", "torch"]
        loss = model(ids(), ids(seed=1))[1]
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
        assert backend.calls["attention", "torch"] - before == (4 if checkpointing else 2)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_what_does_not_go_together():
    model, mask, cu = tiny(), torch.ones(2, 32), torch.tensor([0, 64], dtype=torch.int32)
    for options, message in (
        (dict(attention_mask=mask, cu_seqlens=cu), "exclude each other"),
        (dict(attention_mask=mask[:, 1:]), r"attention_mask is \(2, 31\), needs input_ids' \(2, 32\)"),
        (dict(cu_seqlens=cu), "a document of 64 tokens, but n_positions is 32"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids(), **options)
    with pytest.raises(ValueError, match="n_positions is 32"):
        model(ids(T=33))


def test_optimizer_groups():
    model = tiny()
    model.wpe.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(1e-3, weight_decay=0.2)
    decays, rest = optimizer.param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].rpartition(".")[2] for p in decays["params"]} == {"weight"}
    assert {names[p] for p in rest["params"]} == {n for n, p in model.named_parameters() if p.dim() < 2}
    assert len(decays["params"]) + len(rest["params"]) == len(names) - 1
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.2, 0.0) and optimizer.defaults["fused"]
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(ids(), ids(seed=1))[1]
        loss.backward()
        optimizer.step()
    assert model(ids(), ids(seed=1))[1] < loss


def test_flops_are_those_of_the_products():
    """Three times what torch counts of a forward's linear layers, and attention with its causality."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny()
    with FlopCounterMode(display=False) as counter, fastattn.use_backend("torch"):
        model(ids(B=1))
    counted = counter.get_flop_counts()["Global"].items()
    products = sum(n for op, n in counted if op.__name__ in ("mm", "addmm")) / 32
    causal = 12 * 2 * 32 * 33 / 2  # two layers of width 32, whose queries see 33 / 2 keys on average
    assert model.flops_per_token() == 3 * products + causal
    banded = tiny(local_window=4).flops_per_token()
    seen = (1 + 2 + 3 + 29 * 4) / 32
    assert banded == pytest.approx(3 * products + causal / 2 + 12 * 32 * seen)


def test_mfu_needs_a_gpu_that_is_known(monkeypatch):
    model = tiny()
    if DEVICE == "cpu":
        assert model.mfu(1e6) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.pop())
    names = ["Some GPU", "NVIDIA H100 PCIe", "NVIDIA H200"]
    peaks = [training.peak_flops("cuda:0") for _ in range(3)]
    assert peaks == [989.5e12, 756.5e12, None]
    names = ["NVIDIA A100-SXM4-80GB"]
    assert training.mfu(1e9, 312e3, "cuda:0", devices=2) == 0.5


def test_dropout_is_off_in_evaluation_only():
    model = tiny(dropout=0.3)
    assert not torch.equal(model(ids())[0], model(ids())[0])
    model.eval()
    assert torch.equal(model(ids())[0], model(ids())[0])


def test_autocast():
    model = tiny()
    expected = model(ids(), ids(seed=1))[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(ids(), ids(seed=1))[1]
        loss.backward()
        greedy = model.generate(ids(T=5), 6, temperature=0)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert greedy.shape == (2, 11) and all(p.grad.isfinite().all() for p in model.parameters())


def test_bad_sizes():
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig(n_embd=30, n_head=4)


def test_compiles_to_one_graph():
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids())[0], model(ids())[0])
    torch.testing.assert_close(compiled(ids(), ids(seed=1))[1], model(ids(), ids(seed=1))[1])


def test_thirty_steps_through_triton_follow_eager():
    """Loss and every gradient, over 30 steps, within 2 x eager's own error at the same parameters; the curve of eager training."""
    ours = tiny()
    eager, baseline, exact = copy.deepcopy(ours), copy.deepcopy(ours), copy.deepcopy(ours).double()
    models = ((ours, "triton"), (baseline, "torch"), (exact, "torch"), (eager, "torch"))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (ours, eager)]
    batch, targets = ids(T=16), ids(T=16, seed=1)  # Triton is interpreted: every token costs
    before, steps = backend.calls.copy(), []
    for _ in range(30):
        baseline.load_state_dict(ours.state_dict())
        exact.load_state_dict(ours.state_dict())
        seen = []
        for model, name in models:
            model.zero_grad()
            with fastattn.use_backend(name):
                loss = model(batch, targets)[1]
                loss.backward()
            seen.append({"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()})
        for optimizer in optimizers:
            optimizer.step()
        steps.append(seen)
    # One tensor for each name, all steps in it: the largest of 30 rounding errors is a measure, one alone is luck.
    runs = [{n: torch.stack([seen[i][n] for seen in steps]) for n in steps[0][0]} for i in range(4)]
    assert not [s for n in runs[0] if (s := check.compare(n, *(run[n] for run in runs[:3])))]
    curve = runs[0]["loss"]
    torch.testing.assert_close(curve, runs[3]["loss"], rtol=1e-4, atol=0)
    assert curve[-1] < curve[0] - 1
    ran = {op: n for (op, name), n in (backend.calls - before).items() if name == "triton"}
    print(f"calls through Triton: {ran}, loss {curve[0]:.3f} -> {curve[-1]:.3f}")
    assert ran == {
        "position": 30, "layer_norm": 30, "add_layer_norm": 120, "attention": 60, "bias_gelu": 60, "linear_cross_entropy": 30,
    }  # fmt: skip


# Checkpoints of transformers.


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


def hf_gpt2(hf, kind="GPT2LMHeadModel", **options):
    torch.manual_seed(0)
    sizes = {k: v for k, v in (TINY | dict(n_layer=3, n_head=4)).items() if k in hf.GPT2Config().to_dict()}
    config = hf.GPT2Config(**sizes | dict(bos_token_id=1, eos_token_id=1) | options)
    model = getattr(hf, kind)(config)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too, which start as if they were not there
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def hf_gpt1(hf, kind="OpenAIGPTLMHeadModel"):
    torch.manual_seed(0)
    model = getattr(hf, kind)(hf.OpenAIGPTConfig(**TINY))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


MAKERS = {
    "GPT-2": hf_gpt2,
    "exact gelu": lambda hf: hf_gpt2(hf, activation_function="gelu", n_inner=40),
    "scaled by layer": lambda hf: hf_gpt2(hf, scale_attn_by_inverse_layer_idx=True),
    "unscaled": lambda hf: hf_gpt2(hf, scale_attn_weights=False),
    "GPT-1": hf_gpt1,
}


@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_logits_are_transformers(maker, hf):
    theirs = MAKERS[maker](hf)
    ours = GPT.from_pretrained(theirs)
    torch.testing.assert_close(ours(ids())[0], theirs(ids()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_logits_are_transformers(side, hf):
    theirs, tokens = hf_gpt2(hf), ids(B=3, T=12)
    ours = GPT.from_pretrained(theirs)
    mask = torch.arange(12) >= torch.tensor([[0], [4], [11]])
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # which their generate derives, and their forward is told
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(ours(tokens, attention_mask=mask)[0][mask], expected[mask], atol=1e-5, rtol=0)
    plain = theirs(tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(
        ours(tokens, attention_mask=mask, position_ids=torch.arange(12).expand(3, 12))[0][mask], plain[mask],
        atol=1e-5, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_saved_here_transformers_reads_it_and_back(maker, hf, tmp_path):
    theirs = MAKERS[maker](hf)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert ours.config == GPT.from_pretrained(theirs).config
    ours.save_pretrained(tmp_path / "ours")
    again, loading = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(again) is type(theirs)
    assert torch.equal(again.eval()(ids()).logits, theirs(ids()).logits)
    back = GPT.from_pretrained(tmp_path / "ours").eval()
    assert back.config == ours.config and torch.equal(back(ids())[0], ours(ids())[0])


@torch.no_grad()
def test_other_layouts_of_keys(hf, tmp_path):
    theirs = hf_gpt2(hf)
    expected = GPT.from_pretrained(theirs)(ids())[0]
    bare = theirs.transformer  # without the prefix
    bare.save_pretrained(tmp_path / "bare")
    for source in (bare, tmp_path / "bare"):
        assert torch.equal(GPT.from_pretrained(source)(ids())[0], expected)
    old = {"lm_head.weight": theirs.lm_head.weight} | theirs.state_dict()  # as files of long ago have them
    old |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(3)}
    old |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    theirs.state_dict = lambda: old
    assert torch.equal(GPT.from_pretrained(theirs)(ids())[0], expected)


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_sequence_classification_is_transformers(padding, hf, tmp_path):
    theirs = hf_gpt2(hf, "GPT2ForSequenceClassification", num_labels=3, pad_token_id=0)
    theirs.save_pretrained(tmp_path)
    ours = GPTForSequenceClassification.from_pretrained(tmp_path)
    assert ours.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    tokens, labels = ids(B=3, T=12).clamp(min=1), torch.tensor([0, 2, 1])
    padded = torch.arange(12) < torch.tensor([[0], [4], [11]])
    padded = padded if padding == "left" else padded.flip(1)
    tokens[padded] = 0
    positions = ((~padded).cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=(~padded).long(), position_ids=positions, labels=labels)
    for options in ({}, dict(attention_mask=~padded)):
        logits, loss = ours(tokens, labels, **options)
        torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(loss, expected.loss)
    ours.save_pretrained(tmp_path / "ours")
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert again.config.id2label == theirs.config.id2label
    whole = ids(B=3, T=12).clamp(min=1)
    torch.testing.assert_close(again(whole).logits, ours(whole)[0], atol=1e-5, rtol=0)


def test_classifier_losses_and_new_heads(hf):
    base = hf_gpt2(hf)
    with pytest.warns(UserWarning, match="lacks score.weight, which starts anew"):
        model = GPTForSequenceClassification.from_pretrained(base)
        three = GPTForSequenceClassification.from_pretrained(base, num_labels=3, dropout=0.0)
    assert three.score.weight.shape == (3, 32) and three.config.dropout == 0.0
    assert model.score.weight.shape == (2, 32) and 0 < model.score.weight.std() < 0.05
    assert torch.equal(model.wte.weight, base.transformer.wte.weight)
    tokens = ids(B=3, T=12)
    logits, _ = model(tokens)
    labels = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    several = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(model(tokens, labels)[1], several)
    one = GPTForSequenceClassification(GPTConfig(**TINY, num_labels=1))
    scores, loss = one(tokens, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(loss, (scores[:, 0] - torch.tensor([1.0, 2.0, 3.0])).square().mean())
    classifier = GPTForSequenceClassification(GPTConfig(**TINY))
    assert type(GPT.from_pretrained(Disguised(classifier))) is GPT, "a language model leaves the head behind"


class Disguised(torch.nn.Module):
    """A model of ours as transformers would have it."""

    def __init__(self, model):
        super().__init__()
        stored = dataclasses.asdict(model.config) | {"model_type": "fastattn-gpt"}
        self.config = type("Config", (), {"to_dict": lambda self: stored})()
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        self.state = {n: t.t() if n.endswith(transposed) else t for n, t in model.state_dict().items()}

    def state_dict(self):
        return self.state


@pytest.mark.parametrize("layout", ["GPT-3", "sinusoidal"])
def test_what_transformers_has_not_is_saved_for_ourselves(layout, tmp_path):
    model = tiny(**LAYOUTS[layout], dropout=0.2).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastattn-gpt"
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again(ids())[0], model(ids())[0])
    assert GPT.from_pretrained(tmp_path, dropout=0.0, dtype=torch.bfloat16).wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama', needs one of gpt2, openai-gpt, fastattn-gpt"),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "relu"}, "activation_function is 'relu', needs one of gelu_new"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"attn_pdrop": 0.3}, "pass dropout="),
        ({"n_head": 7}, "multiple of n_head 7"),
    ],
)
def test_a_config_that_asks_for_something_else(change, message):
    config = {"model_type": "gpt2", "n_embd": 32, "n_head": 4} | change
    with pytest.raises(CheckpointError, match=message):
        config_from(config)
    if "attn_pdrop" in change:
        assert config_from(config, dropout=0.2).dropout == 0.2


def test_a_checkpoint_of_another_size_is_one_clear_error(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 64, "n_layer": 1}))
    with pytest.raises(
        CheckpointError,
        match=r"does not fit GPT. unexpected: .*; of another shape: .*c_attn.weight \(32, 96\) for h.0",
    ):
        GPT.from_pretrained(tmp_path)
