"""Training: the loop's arithmetic, runs that are interrupted, several processes, and what a person types wrongly."""

import collections
import copy
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from fastattn import cli
from fastattn.backend import calls, use_backend
from fastattn.models import checkpoint
from fastattn.models.gpt import GPT, GPTConfig
from fastattn.recipes import data, loop, parallel, runs, tokens, train

BYTES = types.SimpleNamespace(sep_id=257, encode=lambda text: list(text.encode()))
TEXT = [f"{i} green bottles hanging on the wall, and if one should fall: {i * i}. " * 6 for i in range(9)]
CONFIG = GPTConfig(vocab_size=258, n_positions=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)


ALONE = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(dataclasses.replace(CONFIG, **changes))


def batches(size=4, texts=TEXT, **options):
    return data.Batches(data.Blocks(texts, BYTES, 16), size, **options)


def run(out, model=None, resume=None, on=None, **options):
    """A short run; `options` are loop.Options, `on` the batches."""
    model = model or (GPT.from_pretrained(resume) if resume else gpt())
    options = loop.Options(**{"steps": 8, "lr": 1e-2, "warmup": 2, "log_every": 1000} | options)
    return loop.run(model, on or batches(), options, out, resume=resume)


def log(out):
    return [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in log(out) if "lr" in record]


def files(folder):
    return {f.relative_to(folder): f.read_bytes() for f in pathlib.Path(folder).rglob("*") if f.is_file()}


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    options = loop.Options(steps=100, lr=2.0, warmup=10, min_lr=0.1)
    at = [loop.learning_rate(options, step, step / 100) for step in range(101)]
    assert math.isclose(at[0], 0.2 * (0.1 + 0.9 * 1.0))
    assert max(at) == at[9] and math.isclose(at[50], 2 * 0.55) and math.isclose(at[100], 0.2)
    assert at[:10] == sorted(at[:10]) and at[10:] == sorted(at[10:], reverse=True)
    assert loop.learning_rate(options, 0, 5.0) < 0.03, "beyond its end a run stays at the smallest rate"


@pytest.mark.parametrize(
    "wrong", [{}, dict(steps=0), dict(minutes=-1), dict(steps=1, accumulate=0), dict(steps=1, eval_every=-1)]
)
def test_options_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="need"):
        loop.Options(**wrong)


def test_the_log_has_every_step(tmp_path):
    done = run(tmp_path, steps=5, clip=0.5)
    first, *records = log(tmp_path)
    steps = [r for r in records if "lr" in r]
    assert "run" in first and [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert {"loss", "lr", "norm", "ms", "tokens_per_s", "mib", "tokens"} <= steps[0].keys()
    assert steps[-1]["tokens"] == 5 * 4 * 16 and all(r["norm"] > 0.5 for r in steps)
    assert done["stopped"] == "done" and done["step"] == 5 and done["loss"] == steps[-1]["loss"]
    assert records[-1] == {"step": 5, "checkpoint": str(tmp_path / "step-0000005")}


def test_the_loss_falls(tmp_path):
    run(tmp_path, steps=40)
    assert sum(losses(tmp_path)[-5:]) < 0.75 * sum(losses(tmp_path)[:5])


def test_one_batch_is_learned_by_heart(tmp_path):
    found = run(tmp_path, gpt(dropout=0.0), steps=150, on=batches(size=2, only_first=True), min_lr=0.0)
    assert found["loss"] < 0.2


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    options = dict(accumulate=2, skip_above=4.0, steps=9)
    run(tmp_path / "whole", **options)
    run(tmp_path / "cut", **options, save_every=4, keep=None)
    for step in (8, 9):  # as if killed between steps 5 and 8, while writing its log
        shutil.rmtree(tmp_path / "cut" / f"step-000000{step}")
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:
        f.write('{"step": 10, "lo')
    torch.manual_seed(99)
    run(tmp_path / "cut", resume=runs.newest(tmp_path / "cut"), **options)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (files(tmp_path / out / "step-0000009") for out in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name in ("model.safetensors", "training.safetensors", "config.json"):
        assert whole[pathlib.Path(name)] == cut[pathlib.Path(name)], name
    whole, cut = (runs.read_training(tmp_path / out / "step-0000009")[0] for out in ("whole", "cut"))
    assert {**whole, "elapsed": 0} == {**cut, "elapsed": 0}


def test_a_run_that_was_never_interrupted_differs_with_another_seed(tmp_path):
    """What the test above compares depends on the generators: dropout and the order of the data."""
    for out, seed in (("a", 0), ("b", 1)):
        run(tmp_path / out, gpt(), seed=seed)
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_the_last_checkpoints_are_kept(tmp_path):
    run(tmp_path, steps=7, save_every=2, keep=2)
    assert [f.name for f in runs.checkpoints(tmp_path)] == ["step-0000006", "step-0000007"]
    assert runs.newest(tmp_path).name == "step-0000007" and runs.newest(tmp_path / "x").name == "x"


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    run(tmp_path, steps=2)
    before = files(tmp_path / "step-0000002")

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(runs, "write_training", fails)
    with pytest.raises(OSError, match="no space"):
        run(tmp_path, steps=4, resume=runs.newest(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "step-0000002"]
    assert files(tmp_path / "step-0000002") == before


def test_evaluation_changes_nothing(tmp_path):
    held_out = batches(texts=TEXT[:2])
    for out, extra in (("with", dict(validation=held_out)), ("without", {})):
        options = loop.Options(steps=4, eval_every=2, eval_batches=1)
        loop.run(gpt(), batches(), options, tmp_path / out, **extra)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    found = [r["validation"] for r in log(tmp_path / "with") if "validation" in r]
    assert len(found) == 2 and found[0] != found[1]
    model = GPT.from_pretrained(tmp_path / "with" / "step-0000004").eval()
    blocks = held_out.samples
    batch = data.stack([blocks[i] for i in range(len(blocks))])
    torch.testing.assert_close(
        found[-1]["loss"], model(batch["input_ids"], batch["targets"])[1].item(), rtol=1e-5, atol=0
    )


def test_an_outlier_is_left_out(tmp_path):
    model = gpt(dropout=0.0)

    def spoiled(model, batch):
        loss = loop.loss_of(model, batch)["loss"]
        spoiled.calls += 1
        return {"loss": loss * 1e4 if spoiled.calls == 23 else loss}

    spoiled.calls = 0
    options = loop.Options(steps=25, skip_above=50.0)
    loop.run(model, batches(), options, tmp_path, losses=spoiled)
    assert [r["step"] for r in log(tmp_path) if r.get("skipped")] == [23]
    assert losses(tmp_path)[23] < 10


def test_gradients_that_stay_infinite_end_the_run(tmp_path):
    model = gpt()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    broken = lambda model, batch: {"loss": loop.loss_of(model, batch)["loss"] * math.inf}  # noqa: E731
    with pytest.raises(loop.Diverged, match="smaller learning rate"):
        loop.run(model, batches(), loop.Options(steps=9), tmp_path, losses=broken)
    assert all((model.state_dict()[name] == t).all() for name, t in before.items())


@pytest.mark.parametrize(
    "damage",
    [
        ("training.safetensors", lambda raw: raw[:1000], "cut off"),
        ("training.safetensors", lambda raw: b"", "cut off"),
        ("training.json", lambda raw: raw[:20], "JSON"),
        ("training.json", None, "cannot be taken up"),
        ("training.safetensors", "another width", "no optimizer state that fits"),
    ],
    ids=["cut", "empty", "half a JSON", "missing", "another width"],
)
def test_a_damaged_checkpoint_is_one_error(tmp_path, damage):
    name, how, message = damage
    run(tmp_path, steps=2)
    folder = runs.newest(tmp_path)
    model = GPT.from_pretrained(folder)
    if how is None:
        (folder / name).unlink()
    elif how == "another width":
        model = gpt(n_embd=64)
    else:
        (folder / name).write_bytes(how((folder / name).read_bytes()))
    before = files(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        run(tmp_path, model, steps=4, resume=folder)
    assert files(tmp_path) == before


# The same curve, whoever computes it.


class PlainGPT(torch.nn.Module):
    """GPT-2 from torch's own functions alone, with the parameters of ours."""

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        self.inner = copy.deepcopy(model)

    def forward(self, ids, targets):
        p = dict(self.inner.named_parameters())
        linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # noqa: E731
        x = p["wte.weight"][ids] + p["wpe.weight"][: ids.shape[1]]
        for i in range(self.config.n_layer):
            q, k, v = linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for t in (q, k, v))
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -math.inf).softmax(-1)
            x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
            h = linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + linear(h, f"h.{i}.mlp.c_proj")
        logits = self.norm(x, "ln_f") @ p["wte.weight"].T
        chosen = logits.log_softmax(-1).gather(-1, targets.clamp(0)[..., None])[..., 0]
        valid = targets != data.IGNORED
        return None, -(chosen * valid).sum() / valid.sum()

    def norm(self, x, name):
        p = dict(self.inner.named_parameters())
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.config.layer_norm_epsilon).rsqrt()
        return centred * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def curve(out, model, backend=None, steps=30, size=4):
    with use_backend(backend):
        options = loop.Options(steps=steps, lr=1e-2, warmup=2)
        loop.run(model, batches(size), options, out, save=lambda model, folder: None)
    return losses(out)


def test_the_curve_is_that_of_a_gpt_in_plain_torch(tmp_path):
    model = gpt(dropout=0.0)
    plain = curve(tmp_path / "plain", PlainGPT(model))
    torch.testing.assert_close(curve(tmp_path / "ours", model), plain, rtol=1e-4, atol=0)
    assert plain[-1] < 0.8 * plain[0]


def test_the_curve_is_that_of_eager_ops(tmp_path):
    short = dict(steps=5, size=2)
    eager = curve(tmp_path / "eager", gpt(dropout=0.0), "torch", **short)
    before = calls.copy()
    ours = curve(tmp_path / "ours", gpt(dropout=0.0), "triton", **short)
    assert all((calls - before)[op, "triton"] for op in ("attention", "layer_norm")), calls - before
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=0)


# What is learned, from texts and through the command.


def test_documents_of_a_block_do_not_see_each_other():
    kind = train.NextTokens(train.Settings(batch=2))
    on = kind.batches(kind.samples([c * 4 for c in "abcdefghij"], BYTES, 16))
    model, batch = gpt(dropout=0.0).eval(), data.packed([on.samples[i] for i in range(len(on.samples))])
    assert len(batch["cu_seqlens"]) > len(batch["input_ids"]) + 1
    with torch.no_grad():
        for p in model.h.parameters():
            p.mul_(10)  # what a token sees has to matter
    found = kind.losses(model, batch)["loss"].item()
    ids, targets, total = batch["input_ids"].flatten(), batch["targets"].flatten(), 0.0
    for start, end in zip(batch["cu_seqlens"][:-1].tolist(), batch["cu_seqlens"][1:].tolist(), strict=True):
        logits = model(ids[None, start:end])[0][0]
        total += torch.nn.functional.cross_entropy(logits, targets[start:end], reduction="sum").item()
    assert math.isclose(found, total / kind.targets(batch)["loss"], rel_tol=1e-5)
    apart = kind.losses(model, {name: batch[name] for name in ("input_ids", "targets")})["loss"].item()
    assert not math.isclose(found, apart, rel_tol=1e-4)


def entropy(texts):
    """Bits a byte of someone who knows how frequent each byte is."""
    counts = collections.Counter(b"".join(t.encode() for t in texts)).values()
    return -sum(n * math.log2(n / sum(counts)) for n in counts) / sum(counts)


def test_gpt_learns_the_default_text(tmp_path):
    """The loose check of a number in the README: the full run has three minutes, this one seconds."""
    done = train.train(train.Settings(out=str(tmp_path), steps=250, log_every=50, eval_every=0))
    assert done["validation"]["bits_per_byte"] < 4.05 < entropy(data.documents()) - 0.7


def test_bert_learns_to_tell_tokens_and_successors(tmp_path):
    """Two documents of one kind of line each: a pair continues if both its parts are of one kind."""
    for place, things in (("sea", "crab shell wave"), ("wood", "bear berry leaf")):
        a, b, c = things.split()
        lines = [f"{x} and {y} in the {place}\n" for x, y in itertools.permutations((a, b, c), 2)]
        (tmp_path / f"{place}.txt").write_text("".join(lines * 30))
    settings = train.Settings(
        model="bert", data=str(tmp_path), out=str(tmp_path / "out"), steps=350, block=32, vocab=320, dropout=0.0,
        held_out=0.0, log_every=50,
    )  # fmt: skip
    train.train(settings)
    last = [r for r in log(tmp_path / "out") if "lr" in r][-30:]
    mlm, nsp = (sum(r[name] for r in last) / len(last) for name in ("mlm", "nsp"))
    assert mlm < 0.6 and nsp < 0.3, (mlm, nsp)


# Several processes. tests/two_ranks.py runs what is compared here.

TOGETHER = dict(lr=1e-2, warmup=0, accumulate=2, clip=0.0, keep=None, save_every=1)


def plain_gpt():
    return gpt(dropout=0.0)


def uneven(size=4, **options):
    """Blocks of which one has fewer targets, so that the ranks' means do not count alike."""
    texts = ["ab" * 9, "some text that is longer than a block of sixteen", "more of it"]
    blocks = data.Blocks(texts, BYTES, 16)
    assert len({int((blocks[i]["targets"] != data.IGNORED).sum()) for i in range(len(blocks))}) > 1
    return data.Batches(blocks, size, **options)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    for size, accumulate in ((8, 1), (2, 4)):
        options = loop.Options(steps=6, **TOGETHER | {"accumulate": accumulate})
        loop.run(plain_gpt(), uneven(size), options, tmp_path / str(size))
    torch.testing.assert_close(losses(tmp_path / "8"), losses(tmp_path / "2"), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    script = pathlib.Path(__file__).with_name("two_ranks.py")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *torchrun, script, out], capture_output=True, text=True, timeout=180, env=ALONE
    )
    assert done.returncode == 0, done.stderr
    options = loop.Options(steps=4, **TOGETHER)
    loop.run(plain_gpt(), uneven(), options, out / "one", validation=uneven())
    return out


@pytest.mark.parametrize("kind", parallel.KINDS)
def test_two_ranks_have_the_gradients_of_one_process(two_ranks, kind):
    """After one step AdamW's exp_avg is (1 - beta1) times the gradient."""
    ours, alone = (runs.read_training(two_ranks / out / "step-0000001")[1] for out in (kind, "one"))
    gradients = [name for name in alone if name.endswith("/exp_avg")]
    assert len(gradients) == len(list(plain_gpt().parameters()))
    for name in gradients:
        torch.testing.assert_close(ours[name], alone[name], rtol=1e-5, atol=1e-8, msg=name)
    assert ours["generator/cpu/0"].equal(alone["generator/cpu/0"])
    assert not ours["generator/cpu/1"].equal(ours["generator/cpu/0"]), "each rank has its own dropout"


@pytest.mark.parametrize("kind", parallel.KINDS)
def test_two_ranks_stop_and_go_on_like_one_process(two_ranks, kind):
    torch.testing.assert_close(losses(two_ranks / kind), losses(two_ranks / "one"), rtol=1e-5, atol=0)
    found, alone = (
        GPT.from_pretrained(two_ranks / out / "step-0000004").state_dict() for out in (kind, "one")
    )
    for name, t in alone.items():
        if name.endswith(
            "c_attn.bias"
        ):  # softmax forgets what is added to all keys: AdamW walks by rounding errors there
            t, found[name] = (both.view(3, -1)[[0, 2]] for both in (t, found[name]))
        torch.testing.assert_close(found[name], t, rtol=1e-4, atol=1e-5, msg=name)
    held = [
        [r["validation"]["loss"] for r in log(two_ranks / out) if "validation" in r][-1]
        for out in (kind, "one")
    ]
    torch.testing.assert_close(*held, rtol=1e-5, atol=0)
    steps = [r["step"] for r in log(two_ranks / kind) if "lr" in r]
    assert steps == [1, 2, 3, 4], "rank 0 alone writes the log"


def test_one_process_goes_on_with_what_two_left(two_ranks, tmp_path):
    shutil.copytree(two_ranks / "fsdp" / "step-0000001", tmp_path / "step-0000001")
    folder = runs.newest(tmp_path)
    options = loop.Options(steps=4, **TOGETHER)
    loop.run(GPT.from_pretrained(folder), uneven(), options, tmp_path, resume=folder)
    torch.testing.assert_close(losses(tmp_path), losses(two_ranks / "one")[1:], rtol=1e-5, atol=0)


# The command.

TINY = ("--size", "tiny", "--block", "16", "--batch", "4", "--device", "cpu", "--log-every", "1")


def fastattn(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def said(done):
    """The text of an error without the frame around it."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", done.output).split())


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(TEXT))
    return file


def test_train_gpt_saves_what_goes_on_from(tmp_path, text):
    out = tmp_path / "out"
    done = fastattn("train", "gpt", "--data", text, "--out", out, "--steps", 4, "--sample-every", 4, *TINY)
    assert done.exit_code == 0, done.output
    for expected in ("step      4  loss", "tokens/s", "MFU", "MiB", "bits per byte", "sample: The "):
        assert expected in done.output
    folder = runs.newest(out)
    assert folder.name == "step-0000004" and tokens.beside(folder, 260).vocab_size == 260
    again = fastattn("train", "gpt", "--data", text, "--out", out, "--steps", 8, *TINY)
    assert again.exit_code == 2 and "--resume goes on with it" in said(again)
    ended = fastattn("train", "gpt", "--out", out, "--resume")
    assert ended.exit_code == 2 and "ask for more --steps" in said(ended)
    other = fastattn("train", "gpt", "--out", out, "--resume", "--seed", 3, "--steps", 8)
    assert other.exit_code == 2 and "was started with 0" in said(other)
    text.write_text("".join(TEXT[:-1]))
    other = fastattn("train", "gpt", "--out", out, "--resume", "--steps", 8)
    assert other.exit_code == 2 and "is not the text" in said(other)
    text.write_text("".join(TEXT))
    more = fastattn("train", "gpt", "--out", out, "--resume", "--steps", 6, "--device", "cpu")
    assert more.exit_code == 0, more.output
    assert [r["step"] for r in log(out) if "lr" in r] == [1, 2, 3, 4, 5, 6]
    (runs.newest(out) / "model.safetensors").write_bytes(b"no tensors")
    before = files(out)
    damaged = fastattn("train", "gpt", "--out", out, "--resume", "--steps", 9)
    assert damaged.exit_code == 2 and "model.safetensors: cannot be read" in said(damaged)
    assert files(out) == before


def test_a_bpe_is_learned_on_the_way(tmp_path, text):
    done = fastattn(
        "train", "gpt", "--data", text, "--out", tmp_path / "o", "--steps", 2, "--vocab", 300, *TINY
    )
    assert done.exit_code == 0, done.output
    assert 260 < tokens.load(runs.newest(tmp_path / "o")).vocab_size <= 300


def test_what_saves_memory_or_time_computes_the_same(tmp_path, text):
    """bf16 rounds, recomputing blocks does not."""
    for out, more in (("plain", ()), ("recompute", ("--recompute",)), ("bf16", ("--bf16",))):
        done = fastattn("train", "gpt", "--data", text, "--out", tmp_path / out, "--steps", 5, *TINY, *more)
        assert done.exit_code == 0, done.output
    plain, recomputed, rounded = (losses(tmp_path / out) for out in ("plain", "recompute", "bf16"))
    assert plain == recomputed != rounded
    torch.testing.assert_close(rounded, plain, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--size", "huge"), "--size huge: need one of tiny, gpt1"),
        (("--data", "nowhere.txt"), "nowhere.txt: there is no such file"),
        (("--tokenizer", "nowhere"), "nowhere: there is no such tokenizer"),
        (("--tokenizer", "x.json", "--vocab", "300"), "give one of them"),
        (("--block", "100000"), "do not fill one block of 100000"),
        (("--block", "600"), "--held-out 0.05: "),
        (("--steps", "0"), "steps 0: need at least 1"),
        (("--accumulate", "-1"), "accumulate -1: need at least 1"),
        (("--lr", "0"), "lr 0.0: need more than 0"),
        (("--batch", "0"), "--batch 0: need 1 to inf"),
        (("--held-out", "0.9"), "--held-out 0.9: need 0 to 0.5"),
        (("--seed", "-1"), "--seed -1: need 0 to"),
        (("--resume",), "there is no run"),
        (("--parallel", "tensor"), "need one of ddp, fsdp"),
    ],
)
def test_what_is_typed_wrongly_is_named_and_nothing_is_written(tmp_path, text, wrong, message):
    out = tmp_path / "out"
    done = fastattn("train", "gpt", "--steps", 2, *TINY, "--data", text, "--out", out, *wrong)
    assert done.exit_code == 2 and message in said(done), done.output
    assert not out.exists()


def test_an_unknown_model_is_named(tmp_path):
    done = fastattn("train", "lstm", "--out", tmp_path)
    assert done.exit_code == 2 and "model 'lstm': need one of gpt" in said(done)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_a_clean_exit(tmp_path, text, sent):
    """And what goes on from there is what would have been."""
    command = ("train", "gpt", "--data", text, "--steps", "250", *TINY, "--dropout", "0.1", "--held-out", "0")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastattn.cli", *command, "--out", out],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ALONE,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step      5"):
            process.send_signal(sent)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest
    stopped = runs.read_training(runs.newest(out))[0]["step"]
    assert 5 <= stopped < 250 and f"Stopped by {sent.name} at step {stopped}; --resume" in rest
    if sent == signal.SIGTERM:
        assert fastattn("train", "gpt", "--out", out, "--resume", "--device", "cpu").exit_code == 0
        assert fastattn(*command, "--out", tmp_path / "whole").exit_code == 0
        assert losses(out) == losses(tmp_path / "whole")


def test_train_bert_goes_on_to_the_bit(tmp_path, text):
    command = ("train", "bert", "--data", text, *TINY, "--block", 64, "--whole-words", "--held-out", "0.2")
    assert fastattn(*command, "--steps", 3, "--out", tmp_path / "cut").exit_code == 0
    done = fastattn("train", "bert", "--out", tmp_path / "cut", "--resume", "--steps", 6, "--device", "cpu")
    assert done.exit_code == 0 and "nsp accuracy" in done.output, done.output
    assert fastattn(*command, "--steps", 6, "--out", tmp_path / "whole").exit_code == 0
    steps = [r for r in log(tmp_path / "whole") if "lr" in r]
    assert math.isclose(steps[0]["loss"], steps[0]["mlm"] + steps[0]["nsp"], rel_tol=1e-6)
    wrong = fastattn(*command, "--sample-every", 2, "--out", tmp_path / "other")
    assert wrong.exit_code == 2 and "writes no text" in said(wrong)
