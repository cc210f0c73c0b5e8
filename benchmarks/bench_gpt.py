"""A GPT learns English: the same model from the same seed on stock torch ("eager") and on fastattn, step by step.

Eager is the same GPT with use_backend("torch"), that is F.scaled_dot_product_attention, F.layer_norm, F.embedding and
their like, and F.cross_entropy of all logits at once: on a CPU, where fastattn runs stock torch too, it is torch against
torch and only the agreement says something. There Triton follows in its interpreter: 30 steps of a two-layer GPT whose every gradient is held to the 2 x rule.

Tokens are bytes. The default text is the one that ships inside Python itself, pydoc_data.topics.
"""

import collections
import contextlib
import copy
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fastattn import backend, check
from fastattn.models.gpt import GPT, SIZES, GPTConfig

LEARNING_RATE = 1e-3
FOLLOWED_STEPS = 30


@dataclasses.dataclass(frozen=True)
class Plan:
    config: GPTConfig
    batch: int
    steps: int
    autocast: bool  # bf16 activations over fp32 weights

    @property
    def tokens(self):
        return self.batch * self.config.n_positions


def plan(device, quick):
    if device.type == "cuda":
        return Plan(GPTConfig(**SIZES["gpt2"]), batch=16, steps=20 if quick else 100, autocast=True)
    config = GPTConfig(vocab_size=256, n_positions=128, n_layer=4, n_head=4, n_embd=128)
    if quick:
        config = dataclasses.replace(config, n_positions=64, n_layer=2, n_embd=64)
    return Plan(config, batch=16, steps=20 if quick else 200, autocast=False)


def read_text(data):
    """(bytes as a tensor, what they are)."""
    if data is not None:
        raw, name = data.read_bytes(), data.name
    else:
        from pydoc_data import topics

        raw, name = "\n\n".join(topics.topics.values()).encode(), "pydoc_data.topics"
    if len(raw) < 1024:
        raise ValueError(f"{name}: {len(raw)} bytes of text, need at least 1024 to train on")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long(), name


def batch_of(text, size, length, step):
    """(ids, targets) of a step, the same for everybody who asks."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length, (size, 1), generator=generator)
    window = text[starts + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


class Runner:
    """One model, its optimizer and the surroundings it trains in."""

    def __init__(self, plan, device, surroundings, compile=False, whole_logits=True):
        torch.manual_seed(0)
        self.plan, self.device, self.surroundings = plan, device, surroundings
        self.model = GPT(plan.config).to(device)
        self.loss = (
            self._whole_logits_loss if whole_logits else lambda ids, targets: self.model(ids, targets)[1]
        )
        if compile:
            self.loss = torch.compile(self.loss)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda"
        )
        self.losses, self.seconds, self.peak = [], [], 0

    def step(self, ids, targets):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        with self.surroundings():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.autocast):
                loss = self.loss(ids, targets)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # synchronises
        self.seconds.append(time.perf_counter() - began)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)

    def _whole_logits_loss(self, ids, targets):
        return cross_entropy(self.model(ids)[0].flatten(0, 1).float(), targets.flatten())


def runners(plan, device):
    stock = lambda: backend.use_backend("torch")  # noqa: E731
    if device.type == "cpu":
        return {
            "eager": Runner(plan, device, stock),
            "fastattn": Runner(plan, device, contextlib.nullcontext, whole_logits=False),
        }

    @contextlib.contextmanager
    def naive():
        with stock(), sdpa_kernel(SDPBackend.MATH):
            yield

    found = {
        "eager": Runner(plan, device, stock),
        "eager, attention by matrix products": Runner(plan, device, naive),
        "compile": Runner(plan, device, stock, compile=True),
        "fastattn triton": Runner(plan, device, lambda: backend.use_backend("triton"), whole_logits=False),
    }
    if backend.PROVEN or backend.verdict(device):
        # what runs by default on this card
        found["fastattn"] = Runner(plan, device, contextlib.nullcontext, whole_logits=False)
    return found


def run(device, quick, data, progress):
    """({everything to print and plot}, [sentences of what went wrong])."""
    text, name = read_text(data)
    settings, wrong = plan(device, quick), []
    length = settings.config.n_positions
    if len(text) <= length + 1:
        raise ValueError(f"{name}: {len(text)} bytes of text, need more than {length + 1}")
    found = runners(settings, device)
    task = progress.add_task(f"GPT on {name}", total=settings.steps)
    before = backend.calls.copy()
    for step in range(settings.steps):
        ids, targets = (t.to(device) for t in batch_of(text, settings.batch, length, step))
        for runner in found.values():
            runner.step(ids, targets)
        progress.advance(task)
    calls = {f"{op} on {used}": n - before[op, used] for (op, used), n in sorted(backend.calls.items())}
    eager = found["eager"]
    # Rounding is the only difference between the runs, and training amplifies it: half the digits are asked for.
    tolerance = math.sqrt(torch.finfo(torch.bfloat16 if settings.autocast else torch.float32).eps)
    apart = {}
    for runner_name, runner in found.items():
        apart[runner_name] = max(abs(a - b) / b for a, b in zip(runner.losses, eager.losses, strict=True))
        if runner_name.startswith("fastattn") and not apart[runner_name] <= tolerance:
            wrong.append(
                f"{runner_name}: losses are {apart[runner_name]:.1e} apart from eager's, allowed {tolerance:.1e}"
            )
        if not runner.losses[-1] < runner.losses[0]:
            wrong.append(
                f"{runner_name}: the loss does not fall ({runner.losses[0]:.3f} to {runner.losses[-1]:.3f})"
            )
    ours = list(found.values())[-1]
    prompt = "The "
    with ours.surroundings(), torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.tensor([list(prompt.encode())], device=device)
        room = min(400, length - ids.shape[1])
        made = ours.model.generate(ids, room, temperature=0.8, top_k=40, generator=generator)[0]
    speeds = {n: settings.tokens / statistics.median(r.seconds) for n, r in found.items()}
    result = {
        "text": f"{name}, {len(text):,} bytes",
        "model": f"{settings.config.n_layer} layers, width {settings.config.n_embd}, "
        f"{sum(p.numel() for p in ours.model.parameters()) / 1e6:.1f} M parameters, batch {settings.batch} x {length}, "
        + ("bf16 autocast" if settings.autocast else "fp32"),
        "device": device.type,
        "losses": {runner_name: runner.losses for runner_name, runner in found.items()},
        "apart": apart,
        "tolerance": tolerance,
        "tokens_per_s": speeds,
        "peak_mb": {n: r.peak / 1e6 for n, r in found.items()} if device.type == "cuda" else {},
        # of the card's dense bf16 peak; a card whose peak is not known has none
        "mfu": {n: share for n, speed in speeds.items() if (share := ours.model.mfu(speed)) is not None},
        "calls": calls,
        "sample": bytes(t if t < 256 else 63 for t in made.tolist()).decode(errors="replace"),
    }
    task = progress.add_task("GPT through Triton", total=FOLLOWED_STEPS)
    try:
        result["followed"] = _followed(device, FOLLOWED_STEPS, lambda: progress.advance(task))
        wrong += result["followed"]["wrong"]
    except Exception as e:  # its process may die in any way; the other results are still worth printing
        result["followed"] = None
        wrong.append(f"Triton's steps did not finish: {e}")
    return result, wrong


def follow(device, steps, step_done):
    """Train a two-layer GPT with use_backend("triton"); at every step stock torch computes the same loss and gradients, in fp32
    and in float64, at the same weights. Beside it, eager trains by itself from the same seed.

    The 2 x rule is applied to the loss and to each parameter's gradient over the whole run, all steps as one tensor: a
    single step of a small parameter has too few numbers for a ratio of two rounding errors to mean anything.
    """
    settings = Plan(GPTConfig(**SIZES["tiny"] | {"n_positions": 32}), batch=2, steps=steps, autocast=False)
    runner = Runner(settings, device, lambda: backend.use_backend("triton"), whole_logits=False)
    free = Runner(settings, device, lambda: backend.use_backend("torch"))
    models = {
        "triton": runner.model,
        "eager": copy.deepcopy(runner.model),
        "float64": copy.deepcopy(runner.model).double(),
    }
    losses = {name: [] for name in models}
    grads = {name: {parameter: [] for parameter, _ in runner.model.named_parameters()} for name in models}
    text, _ = read_text(None)
    calls = collections.Counter()
    for step in range(steps):
        ids, targets = (
            t.to(device) for t in batch_of(text, settings.batch, settings.config.n_positions, step)
        )
        for name in ("eager", "float64"):
            models[name].load_state_dict(runner.model.state_dict())
            models[name].zero_grad()
            with backend.use_backend("torch"):
                loss = models[name](ids, targets)[1]
                loss.backward()
            losses[name].append(loss.item())
        before = backend.calls.copy()
        runner.step(ids, targets)
        calls.update({f"{op} on {used}": n - before[op, used] for (op, used), n in backend.calls.items()})
        losses["triton"].append(runner.losses[-1])
        free.step(ids, targets)
        for name, model in models.items():
            for parameter, p in model.named_parameters():
                grads[name][parameter].append(p.grad.clone())
        step_done()
    triton, eager, exact = (torch.tensor(losses[name], dtype=torch.float64) for name in models)
    sentences = [check.compare("losses", triton.float(), eager.float(), exact)]
    for parameter in grads["triton"]:
        sentences.append(
            check.compare(
                f"gradient of {parameter}", *(torch.stack(grads[name][parameter]) for name in models)
            )
        )
    if not any(n and name.endswith(" on triton") for name, n in calls.items()):
        sentences.append("no call reached Triton")
    return {
        "losses": losses | {"eager alone": free.losses},
        "wrong": [sentence for sentence in sentences if sentence],
        "calls": {name: n for name, n in calls.items() if n},
        "parameters": len(grads["triton"]),
    }


def _followed(device, steps, step_done):
    if device.type == "cuda":
        return follow(device, steps, step_done)
    command = [sys.executable, "-m", "fastattn.benchmarks.bench_gpt", str(steps)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("{"):
                result = json.loads(line)
            step_done()
    if process.returncode:
        raise RuntimeError(f"the interpreter's process ended with status {process.returncode}")
    return result


def tell(result, wrong):
    """What a person reads of the result."""
    steps = len(result["losses"]["eager"])
    marks = sorted({0, *(round(i * (steps - 1) / 8) for i in range(9))})
    lines = [
        f"GPT on {result['text']}: {result['model']}",
        "",
        "loss at step".ljust(38) + "".join(f"{m:>8}" for m in marks),
    ]
    for name, losses in result["losses"].items():
        lines.append(name.ljust(38) + "".join(f"{losses[m]:>8.4f}" for m in marks))
    lines.append("")
    for name in result["losses"]:
        line = f"{name}: {result['tokens_per_s'][name]:,.0f} tokens/s"
        line += f"; a step's peak memory {result['peak_mb'][name]:,.0f} MB" if result["peak_mb"] else ""
        line += f", MFU {result['mfu'][name]:.1%}" if result["mfu"] else ""
        if name != "eager":
            line += f", losses at most {result['apart'][name]:.1e} apart from eager's (allowed {result['tolerance']:.1e})"
        lines.append(line)
    if result["device"] == "cpu":
        lines.append("On a CPU fastattn runs stock torch: torch against torch, so no speed-up is claimed.")
    lines += ["Calls: " + ", ".join(f"{name} {n}" for name, n in result["calls"].items() if n), ""]
    followed = result["followed"]
    if followed:
        losses = followed["losses"]
        where = "its interpreter, on the CPU" if result["device"] == "cpu" else "the GPU"
        verdict = (
            "all within the 2 x rule"
            if not followed["wrong"]
            else f"{len(followed['wrong'])} break the 2 x rule"
        )
        lines += [
            f"Through Triton ({where}): {len(losses['triton'])} steps of a two-layer GPT, the loss and the "
            f"gradients of {followed['parameters']} parameters at every step: {verdict}.",
            f"loss {losses['triton'][0]:.6f} to {losses['triton'][-1]:.6f}, "
            f"eager by itself {losses['eager alone'][0]:.6f} to {losses['eager alone'][-1]:.6f}",
            "Calls: " + ", ".join(f"{name} {n}" for name, n in followed["calls"].items()),
            "",
        ]
    lines += ["Text the model writes:", result["sample"]]
    lines += ["", "Wrong:", *wrong[:20]] if wrong else []
    return "\n".join(lines)


if __name__ == "__main__":
    print(
        json.dumps(follow(torch.device("cpu"), int(sys.argv[1]), lambda: print("step", flush=True))),
        flush=True,
    )
