"""Text generation by GPT-2: a prompt into an empty cache, then a token at a time from the cache.

The tokens are given, so that everybody computes the same; what is compared is the logits of every step, with those of one pass over
the whole text in float64.
"""

import functools

import torch
from torch.func import functional_call

from fastattn import backend
from fastattn.benchmarks.suite import Case, Work
from fastattn.models.gpt import GPT, SIZES, GPTConfig


def cases(device, quick):
    if device.type == "cpu":
        yield generate("tiny", 2, 8, 4, torch.float32)
        return
    for B in (8,) if quick else (1, 8):
        yield generate("gpt2", B, 128, 32 if quick else 64, torch.bfloat16)


class Steps(torch.nn.Module):
    """The logits at each of the last tokens of ids (B, prompt + new), from a cache or from one pass over all of them."""

    def __init__(self, config, prompt):
        super().__init__()
        self.model, self.prompt = GPT(config).eval(), prompt

    def forward(self, ids, cached):
        if not cached:
            return self.model.head(self.model.hidden(ids[:, :-1])[:, self.prompt - 1 :])
        cache = self.model.new_cache(*ids.shape)
        parts = [ids[:, : self.prompt], *ids[:, self.prompt : -1].split(1, dim=1)]
        return torch.cat([self.model.head(self.model.hidden(part, cache)[:, -1:]) for part in parts], 1)


def generate(size, B, prompt, new, dtype):
    config = GPTConfig(**SIZES[size])
    with torch.device("meta"):
        steps = Steps(config, prompt)
    names = [name for name, _ in steps.named_parameters()]

    def make(device):
        ids = torch.randint(config.vocab_size, (B, prompt + new), device=device)
        with device:
            return ids, *(p.detach().to(dtype) for p in Steps(config, prompt).parameters())

    def ours(ids, *parameters, cached=True):
        return functional_call(steps, dict(zip(names, parameters, strict=True)), (ids, cached))

    def stock(*inputs, cached=True):
        with backend.use_backend("torch"):
            return ours(*inputs, cached=cached)

    weights = sum(p.numel() for p in steps.parameters()) * dtype.itemsize
    a_token = 2 * config.n_layer * config.n_embd * dtype.itemsize  # of the cache
    return Case(
        op="generate",
        shape=f"{size}, B {B}, {prompt} + {new} tokens",
        dtype=dtype,
        make=make,
        providers={"eager": stock, "fastattn": ours},
        reference=functools.partial(stock, cached=False),
        forward=Work(
            read=new * weights + B * sum(range(prompt, prompt + new)) * a_token,
            write=B * (prompt + new) * a_token,
            flops=int(B * (prompt + new) * steps.model.flops_per_token(prompt + new) / 3),
        ),
        tokens=B * new,
        model=True,
    )
