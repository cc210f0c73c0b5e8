"""The reference GPT: its parameters, its cache, and thirty steps of training through the Triton backend."""

import copy

import pytest
import torch
from conftest import DEVICE

import fastattn
from fastattn import backend, check
from fastattn.models.gpt import GPT, SIZES, GPTConfig, KVCache, sample

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
    "size, millions", [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
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
    logits, loss = model(ids(), ids(seed=1))
    assert logits.shape == (2, 32, 64) and model(ids())[1] is None
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


def test_logits_are_the_same_with_and_without_the_cache():
    model = tiny().eval()
    with torch.no_grad():
        expected = model(ids())[0]
        cache = KVCache(model.config, 2, 32)
        parts = [model.hidden(ids()[:, a:b], cache) for a, b in ((0, 9), (9, 10), (10, 11), (11, 32))]
    assert cache.lens.tolist() == [32, 32]
    torch.testing.assert_close(torch.cat(parts, dim=1) @ model.wte.weight.T, expected)


def test_generate():
    model = tiny(dropout=0.5)
    prompt = ids(T=5)
    greedy = model.generate(prompt, 6, temperature=0)
    assert model.training and greedy.shape == (2, 11) and torch.equal(greedy[:, :5], prompt)
    slow = prompt
    model.eval()
    for _ in range(6):
        slow = torch.cat([slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy, slow)
    assert torch.equal(model.generate(prompt, 6, top_k=1), slow)

    def drawn(seed):
        return model.generate(prompt, 20, generator=torch.Generator(DEVICE).manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    with pytest.raises(ValueError, match="n_positions is 32"):
        model.generate(prompt, 28)
    with pytest.raises(ValueError, match="n_positions is 32"):
        model(ids(T=33))


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    drawn = sample(logits, temperature=2.0, top_k=3, generator=torch.Generator(DEVICE).manual_seed(0))
    expected = torch.tensor([0.0, 0.5, 1.0, 1.5]).exp() * torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert (drawn.flatten().bincount(minlength=4) / 4000 - expected / expected.sum()).abs().max() < 0.03


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


def test_thirty_steps_through_triton_follow_eager():
    """Loss and every gradient, over 30 steps, within 2 x eager's own error at the same parameters; the curve of eager training."""
    ours = tiny()
    eager, baseline, exact = copy.deepcopy(ours), copy.deepcopy(ours), copy.deepcopy(ours).double()
    models = ((ours, "triton"), (baseline, "torch"), (exact, "torch"), (eager, "torch"))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (ours, eager)]
    batch, targets = ids(), ids(seed=1)
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
    assert ran == {"position": 30, "layer_norm": 30, "add_layer_norm": 120, "attention": 60}
